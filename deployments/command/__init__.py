"""What a person types: the command line, the cluster it starts or joins, and generation without a server."""
