"""LoRA adapters: reading any public format, caching, exact merge and restore. No ray, no HTTP."""
