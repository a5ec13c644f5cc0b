"""The state: what the server remembers of videos, images, files and adapters, in one actor and on disk."""
