"""Pixels: how uploads become images, and how frames become PNG, WebP, JPEG and MP4."""
