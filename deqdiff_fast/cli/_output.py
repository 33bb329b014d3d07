"""Files that a command writes: refused before any work if they cannot be written, and never left half-written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class CommandError(Exception):
    """A mistake that the user can mend; printed as one line."""

    status = 2


class UnfinishedError(CommandError):
    """What was left out, once all else is written."""

    status = 1


def check_folder(folder: Path) -> None:
    """Create `folder` if need be and try to write in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"cannot write in {folder}: {error.strerror or error}; name another folder") from error


def check_file(option: str, path: Path) -> None:
    """Refuse a file that could not be written at the end."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long
        raise CommandError(f"{option} {path}: cannot be written ({error.strerror}); name another file") from error
    if path.is_dir():
        raise CommandError(f"{option} {path}: that is a folder; name a file in it")
    if path.exists() and not os.access(path, os.W_OK):
        raise CommandError(f"{option} {path}: the file is there and write-protected; name another one")
    check_folder(path.parent)


def check_picture(option: str, path: Path | None) -> None:
    """Refuse a picture that could not be written at the end."""
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise CommandError(f"{option} {path}: pictures are written as PNG; name a file that ends in .png")
    check_file(option, path)


def require_pillow() -> None:
    """Refuse early what reads or writes pictures."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise CommandError('pictures need Pillow: pip install "deqdiff_fast[diffusers]"') from error
