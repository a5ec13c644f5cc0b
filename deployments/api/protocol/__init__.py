"""The wire models: what clients send (`requests`, `lora`) and what they get (`responses`)."""
