"""Samples as pictures: grids, and the panels serial | parallel | difference."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..schedule.tensor_file import replacing

DIFFERENCE_GAIN = 16
_MARGIN, _LABEL = 8, 20


def pixels(samples: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> (B, H, W, 3) uint8, on the CPU; one channel becomes grey, more than three are cut."""
    channels = samples[:, :3] if samples.shape[1] >= 3 else samples[:, :1].expand(-1, 3, -1, -1)
    scaled = (channels.detach().float().clamp(-1, 1) + 1) * 127.5
    return torch.as_tensor(scaled.round(), dtype=torch.uint8).permute(0, 2, 3, 1).cpu()


def largest_difference(a: Tensor, b: Tensor) -> int:
    """The largest difference between two sets of samples in their 8-bit pictures, in units of 1/255."""
    return int((pixels(a).int() - pixels(b).int()).abs().max())


def relative_error(sample: Tensor, reference: Tensor) -> Tensor:
    """(B,) float64: |sample - reference| / |reference|, L2 over each sample."""
    a, b = sample.detach().cpu().double().flatten(1), reference.detach().cpu().double().flatten(1)
    error: Tensor = (a - b).norm(dim=1) / b.norm(dim=1)
    return error


def grid(images: Tensor, least: int = 96) -> Image.Image:
    """(B, H, W, 3) uint8 -> one picture, as square as can be; small images are magnified to at least `least` pixels."""
    count, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for k, image in enumerate(images.numpy()):
        top, left = k // columns * height, k % columns * width
        canvas[top : top + height, left : left + width] = image
    times = max(1, math.ceil(least / width))
    size = (canvas.shape[1] * times, canvas.shape[0] * times)
    return Image.fromarray(canvas).resize(size, Image.Resampling.NEAREST)


def panels(first: Tensor, second: Tensor, names: tuple[str, str] = ("serial", "parallel")) -> Image.Image:
    """Two sets of samples and 16 times their difference (black = none), side by side with labels."""
    a, b = pixels(first), pixels(second)
    difference = ((a.int() - b.int()).abs() * DIFFERENCE_GAIN).clamp(max=255).to(torch.uint8)
    pictures = [grid(part) for part in (a, b, difference)]
    width, height = pictures[0].size
    canvas = Image.new("RGB", (3 * width + 4 * _MARGIN, height + _LABEL + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    titles = (*names, f"difference x {DIFFERENCE_GAIN}")
    for k, (title, picture) in enumerate(zip(titles, pictures, strict=True)):
        left = _MARGIN + k * (width + _MARGIN)
        draw.text((left, _MARGIN), title, fill="black")
        canvas.paste(picture, (left, _MARGIN + _LABEL))
    return canvas


def save(picture: Image.Image, path: Path) -> None:
    with replacing(path) as partial:
        picture.save(partial)
