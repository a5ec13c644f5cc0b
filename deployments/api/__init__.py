"""The HTTP resources, one file each, and the wire models they share."""
