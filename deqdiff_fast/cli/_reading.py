"""Picture files as samples: every common kind is read as it is seen, or refused with the reason."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ._output import CommandError

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF 6.0
WHITES = (255, 65535, 2**31 - 1)


def read_picture(path: Path, shape: tuple[int, ...], resize: bool | None) -> Tensor:
    """(C, H, W) float64 in [-1, 1]: turned as its EXIF data say, in front of white where it is transparent.

    Args:
        path: a file.
        shape: (1, H, W) or (3, H, W).
        resize: scale it to that size; None where the user is not asked.

    Raises:
        CommandError: no picture, one of another size, or one whose values do not say what is white.
    """
    channels, height, width = shape
    if not path.is_file():
        raise CommandError(f"{path}: {'that is a folder' if path.is_dir() else 'there is no such file'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the reader finds odd and reads all the same
            planes = _planes(path, channels)
    except CommandError:
        raise
    except Exception as error:  # whatever the reader comes upon in a damaged file: SyntaxError, struct.error ...
        raise CommandError(f"{path}: not a picture that can be read ({error})") from error
    size = planes[0].size
    if size != (width, height) and not resize:
        found = f"{size[0]} x {size[1]}"
        wanted = f"and the model makes {width} x {height}; pass --resize"
        wanted = f"expected {width} x {height}; scale it first" if resize is None else wanted
        raise CommandError(f"{path}: {found} pixels, {wanted}")
    if size != (width, height):
        planes = [plane.resize((width, height), Image.Resampling.LANCZOS) for plane in planes]
    pixels = np.stack([np.asarray(plane, dtype=np.float64) for plane in planes])
    return torch.from_numpy(pixels.clip(0, 255) / 127.5 - 1).expand(shape)


def _planes(path: Path, channels: int) -> list[Image.Image]:
    """One grey picture for each channel, or one for all of them, with values from 0 to 255."""
    with Image.open(path) as opened:
        opened.load()  # before it is turned: the reader of TIFF turns it then
        tags = dict(getattr(opened, "tag_v2", {}))
        picture = ImageOps.exif_transpose(opened)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        return [_wide(path, picture, opened.format, tags)]
    if picture.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        seen = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    coloured = picture.convert("RGB")
    return [coloured.convert("L")] if channels == 1 else list(coloured.split())


def _wide(path: Path, picture: Image.Image, kind: str | None, tags: dict[int, Any]) -> Image.Image:
    """Grey values of more than 8 bits. What is white the format says, or, in 32-bit files, where the values end."""
    values = np.asarray(picture, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    whites: tuple[int, ...] = (1, *WHITES) if picture.mode == "F" else WHITES
    if picture.mode.startswith("I;"):
        white: int | None = 2 ** int(tags.get(BITS_PER_SAMPLE, (16,))[0]) - 1
    elif picture.mode == "I" and kind in ("PNG", "PPM"):
        white = 65535
    else:
        white = next((white for white in whites if low >= 0 and high <= white), None)
        if white is not None and 2 * high < white and white != 1:  # as well a dark picture of other units
            white = None
    if white is None:
        raise CommandError(
            f"{path}: its values go from {low:g} to {high:g}, and nothing says which of them is white; "
            "save it with 8 or 16 bits for each channel"
        )
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = white - values
    if isinstance(picture.info.get("transparency"), int):  # one value of a PNG file is
        values = np.where(values == picture.info["transparency"], white, values)
    return Image.fromarray((values * (255 / white)).astype(np.float32))
