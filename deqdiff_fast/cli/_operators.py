"""Measurement operators by the names that the command line has for them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ._output import CommandError

NAMES = "sr2, sr4, sr8, bicubic2, bicubic4, bicubic8, blur, motion, inpaint, grey, cs25 (any per cent)"
_SCALED = re.compile(r"(sr|bicubic)([2-9]|1[0-6])")
_SENSED = re.compile(r"cs([1-9][0-9]?)")


def operator_name(text: str) -> str:
    """An operator's name, for argparse."""
    if _SCALED.fullmatch(text) or _SENSED.fullmatch(text) or text in ("blur", "motion", "inpaint", "grey"):
        return text
    raise argparse.ArgumentTypeError(f"{text!r}: expected one of {NAMES}")


def make_operator(name: str, shape: tuple[int, ...], *, width: float, mask: Path | None, seed: int) -> Any:
    """The operator of that name for images of `shape`, (C, H, W).

    Args:
        width: of the kernel of "blur" (standard deviation) and "motion" (length, at least 3), in pixels.
        mask: a picture, white where it is measured, for "inpaint"; None: half of the pixels, drawn by `seed`.

    Raises:
        CommandError: a mask that cannot be read.
        ValueError: the operator does not fit the images.
    """
    import torch

    from .. import operators

    scaled, sensed = _SCALED.fullmatch(name), _SENSED.fullmatch(name)
    if scaled:
        kind = operators.Downsample if scaled[1] == "sr" else operators.Bicubic
        return kind(int(scaled[2]))
    if sensed:
        return operators.WalshHadamard((shape[1], shape[2]), int(sensed[1]) / 100, seed)
    if name == "grey":
        return operators.Colorize()
    if name == "inpaint":
        return operators.Inpaint(_mask(mask, shape, seed))
    if name == "blur":
        return operators.Blur.gaussian(width)
    length = min(2 * max(round(width / 2), 1) + 1, shape[2])
    return operators.Blur(torch.full((1, length), 1 / length, dtype=torch.float64))


def _mask(path: Path | None, shape: tuple[int, ...], seed: int) -> Any:
    import torch

    if path is None:
        draw = torch.Generator().manual_seed(seed)
        return torch.rand(shape[1:], generator=draw) < 0.5
    from ._reading import read_picture

    mask = read_picture(path, (1, *shape[1:]), None)[0] > 0
    if not bool(mask.any()):
        raise CommandError(f"--mask {path}: it has no white pixel: nothing would be measured")
    return mask
