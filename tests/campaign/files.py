"""Files that were damaged at random: they are read, or refused with the reason and their name; nothing else."""

from __future__ import annotations

import contextlib
import io
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import deqdiff_fast as dq
from deqdiff_fast.cli import main as command

DAMAGES = 60  # of each kind of file
DESIRED = (3, 8, 8)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Cut, flipped, overwritten, repeated, or with another header."""
    kind, at = draw.randrange(5), draw.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(draw.choice((1, 4, 64))):
            flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return data[:at] + draw.randbytes(draw.randint(1, 40)) + data[at:]
    if kind == 3:
        return data[:at] + data
    return draw.choice((b"\xff" * 8, b"\0" * 8, (1 << 62).to_bytes(8, "little"))) + data[8:]


def attempt(load: Callable[[Path], object], path: Path, allowed: tuple[type[Exception], ...]) -> str:
    """What is wrong with how a file was taken, if anything."""
    try:
        load(path)
    except allowed as caught:
        return "" if path.name in str(caught) else f"refused without its name: {caught}"
    except MemoryError:
        return ""
    except BaseException as caught:
        return f"{type(caught).__name__}: {caught}"
    return ""


def load_spectrum(path: Path) -> None:
    spectrum = dq.SpectralSlope.load(path)
    if not bool(spectrum.variance.isfinite().all()) or bool((spectrum.variance < 0).any()):
        raise AssertionError("a spectrum that is none")


def read_picture(path: Path) -> None:
    from deqdiff_fast.cli._invert import read

    pixels = read([path], DESIRED, True)
    if pixels.shape != (1, *DESIRED) or not bool((pixels.abs() <= 1).all()):
        raise AssertionError(f"pixels of shape {tuple(pixels.shape)} from {pixels.min():g} to {pixels.max():g}")


def tensor_files(folder: Path) -> dict[Path, Callable[[Path], object]]:
    """Whole files, and what loads them."""
    draft, spectrum = folder / "draft.safetensors", folder / "spectrum.safetensors"
    whole = dq.SpectralSlope(torch.rand(3, 8, 8) + 0.1, torch.eye(3))
    whole.save(spectrum)
    dq.ConvDraft(torch.linspace(0.99, 0.01, 20), "epsilon", whole, width=8, depth=1).save(draft)
    return {draft: dq.ConvDraft.load, spectrum: load_spectrum}


def pictures(folder: Path) -> dict[Path, Callable[[Path], object]]:
    """Pictures of several formats, where pillow is there to write them."""
    try:
        from PIL import Image
    except ImportError:
        return {}
    colours = (torch.rand(11, 9, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    found: dict[Path, Callable[[Path], object]] = {}
    for name in ("a.png", "a.jpg", "a.tif", "a.gif", "a.bmp", "a.webp", "a.ppm"):
        with contextlib.suppress(OSError, KeyError, ValueError):  # a format that this pillow cannot write
            Image.fromarray(colours).save(folder / name)
            found[folder / name] = read_picture
    return found


def run(seed: int) -> list[str]:
    """Returns complaints."""
    complaints, draw = [], random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = tensor_files(folder) | pictures(folder)
        for path, load in kinds.items():
            allowed = (ValueError, OSError) if load is not read_picture else _picture_errors()
            whole = path.read_bytes()
            if said := attempt(load, path, allowed):
                complaints.append(f"{path.name}, as it was written: {said}")
            for k in range(DAMAGES):
                data = damaged(whole, draw)
                path.write_bytes(data)
                if said := attempt(load, path, allowed):
                    kept = Path(tempfile.gettempdir()) / f"campaign-{k}-{path.name}"
                    kept.write_bytes(data)
                    complaints.append(f"{kept}: {said}")
        complaints += commands(folder, kinds, draw)
    return complaints


def _picture_errors() -> tuple[type[Exception], ...]:
    from deqdiff_fast.cli._output import CommandError

    return (CommandError, OSError)


def commands(folder: Path, kinds: dict[Path, Callable[[Path], object]], draw: random.Random) -> list[str]:
    """The command line says in a line what is wrong, and never shows where in its code."""
    complaints, bad = [], folder / "bad.png"
    bad.write_bytes(draw.randbytes(300))
    for words in (
        ["invert", str(bad), "--steps", "2"], ["invert", str(folder), "--steps", "2"], ["sample", "--steps", "0"],
        ["sample", "--steps", "999999999", "--batch", "1"], ["sample", "--seed", str(2**70)],
        ["sample", "--seed", "one"], ["sample", "--model", str(folder)], ["sample", "--device", "nonsense"],
        ["sample", "--window", "-3"], ["sample", "--out", str(folder)], ["sample", "--tol", "nan"], ["invert"],
        ["nonsense"],
    ):  # fmt: skip
        errors, status = io.StringIO(), -1
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                status = command(words)
        except SystemExit as caught:
            status = int(caught.code or 0)
        except BaseException as caught:
            complaints.append(f"deqdiff-fast {' '.join(words)}: {type(caught).__name__}: {caught}")
            continue
        text = errors.getvalue().strip()
        if status != 2 or "Traceback" in text or len(text.splitlines()) != 1:
            complaints.append(f"deqdiff-fast {' '.join(words)}: status {status}, {text!r}")
    return complaints
