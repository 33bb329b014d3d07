"""diffusers pipelines whose denoising loop is solved in parallel, and the latents behind an image."""

from .invert import invert
from .parallel import parallelize, restore

__all__ = ["invert", "parallelize", "restore"]
