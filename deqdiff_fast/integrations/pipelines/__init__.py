"""diffusers pipelines whose denoising loop is solved in parallel, and the latents behind an image."""

from .invert import invert
from .own_loop import OwnLoop, parallel_loop
from .parallel import parallelize, restore

__all__ = ["OwnLoop", "invert", "parallel_loop", "parallelize", "restore"]
