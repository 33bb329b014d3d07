"""Rounds on a few timesteps, the nodes: composite steps between them, secants on them, and what the result is worth."""
