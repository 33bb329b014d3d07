"""Files that a command writes: refused before any work if they cannot be written, and never left half-written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CommandError(Exception):
    """A mistake that the user can mend; printed as one line, exit status 2."""


def check_folder(folder: Path) -> None:
    """Create `folder` if need be and try to write in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"cannot write in {folder}: {error.strerror or error}; name another folder") from error


def check_picture(option: str, path: Path | None) -> None:
    """Refuse a picture that could not be written at the end."""
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise CommandError(f"{option} {path}: pictures are written as PNG; name a file that ends in .png")
    if path.is_dir():
        raise CommandError(f"{option} {path}: that is a folder; name a file in it")
    if path.exists() and not os.access(path, os.W_OK):
        raise CommandError(f"{option} {path}: the file is there and write-protected; name another one")
    check_folder(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place once the block has ended well."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
