"""The server: Ray Serve deployments, the rank actors and the HTTP API."""
