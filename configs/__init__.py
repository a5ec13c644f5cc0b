"""What can be configured: pure data that imports nothing else from the project."""
