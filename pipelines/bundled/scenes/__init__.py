"""Scenes of everyday things, as values: sampled from a seed, put into words, and drawn from the Noto Color Emoji font."""
