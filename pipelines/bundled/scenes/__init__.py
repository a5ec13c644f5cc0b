"""Scenes of everyday things, as values: sampled from a seed, put into words, drawn from the Noto Color Emoji font."""
