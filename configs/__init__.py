"""What can be configured: pure pydantic data that imports nothing else of the project."""
