"""Every operator, on images that are not square, with what is its own for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from deqdiff_fast import operators


class Case(NamedTuple):
    make: Callable[[], operators.Operator]
    shape: tuple[int, int, int, int]  # of the images


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")


def column_times_row(batch: int, channels: int) -> torch.Tensor:
    return draw(batch, channels, 3, 1, seed=3) * draw(batch, channels, 1, 4, seed=4)


Blur = operators.Blur
CASES = {
    "inpaint": Case(lambda: operators.Inpaint(draw(5, 7) > 0.4), (2, 3, 5, 7)),
    "inpaint, a mask each": Case(lambda: operators.Inpaint(draw(3, 1, 5, 7) > 0.4), (3, 2, 5, 7)),
    "inpaint, channels": Case(lambda: operators.Inpaint(draw(2, 3, 5, 7) > 0.4), (2, 3, 5, 7)),
    "average x3": Case(lambda: operators.Downsample(3), (2, 2, 9, 6)),
    "average x4": Case(lambda: operators.Downsample(4), (2, 3, 8, 12)),
    "bicubic x2": Case(lambda: operators.Bicubic(2), (2, 2, 8, 6)),
    "bicubic x3": Case(lambda: operators.Bicubic(3), (2, 1, 9, 15)),
    "bicubic x4": Case(lambda: operators.Bicubic(4), (2, 1, 8, 12)),
    "bicubic x8": Case(lambda: operators.Bicubic(8), (2, 1, 8, 16)),
    "colorize": Case(lambda: operators.Colorize(), (2, 3, 5, 3)),
    "colorize, five channels": Case(lambda: operators.Colorize([0.1, 0.0, 0.4, 0.2, -0.3]), (2, 5, 3, 4)),
    "walsh-hadamard": Case(lambda: operators.WalshHadamard((8, 4), 0.3, seed=5), (2, 3, 8, 4)),
    "walsh-hadamard, all": Case(lambda: operators.WalshHadamard((4, 8), 1.0), (2, 2, 4, 8)),
    "gaussian": Case(lambda: Blur.gaussian(0.7), (2, 2, 7, 10)),
    "anisotropic, turned": Case(lambda: Blur.gaussian((1.5, 0.6), size=5, angle=30), (2, 2, 7, 10)),
    "uniform": Case(lambda: Blur.uniform((2, 3)), (2, 2, 6, 9)),
    "any kernels": Case(lambda: Blur(draw(2, 3, 4, 3)), (2, 3, 7, 6)),
    "any kernels, for each channel": Case(lambda: Blur(draw(1, 3, 2, 5)), (2, 3, 7, 6)),
    "products, for each sample": Case(lambda: Blur(column_times_row(2, 1), "reflect"), (2, 3, 5, 7)),
    "products, for each of both": Case(lambda: Blur(column_times_row(2, 3), "valid"), (2, 3, 5, 7)),
    "blur, average": Case(lambda: operators.Compose(Blur.gaussian(0.6), operators.Downsample(2)), (2, 2, 6, 8)),
    "blurs, average, grey": Case(
        lambda: operators.Compose(
            Blur(column_times_row(2, 1), "replicate"), operators.Downsample(2), operators.Colorize()
        ),
        (2, 3, 6, 8),
    ),
    "average, mask": Case(
        lambda: operators.Compose(operators.Downsample(2), operators.Inpaint(draw(2, 1, 3, 4) > 0.3)), (2, 2, 6, 8)
    ),
    **{
        f"gaussian, {padding}": Case(
            lambda padding=padding: Blur.gaussian((0.8, 0.5), size=5, padding=padding), (2, 2, 6, 9)
        )
        for padding in ("reflect", "replicate", "constant", "valid")
    },
}


def images(case: Case, dtype: torch.dtype = torch.float64, seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(case.shape, generator=generator, dtype=torch.float64).to(dtype)
