"""How a rank computes a job: an iterator over the steps of a diffusers pipeline."""
