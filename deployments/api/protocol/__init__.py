"""The wire models: what clients send (`requests`) and what they get (`answers`)."""
