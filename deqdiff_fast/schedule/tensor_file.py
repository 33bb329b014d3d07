"""Tensors on disk: a file that is damaged or foreign is refused by its name, and none is left half-written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place once the block has ended well.

    Raises:
        OSError: `path` and the reason, whatever stopped the block.
    """
    partial = path.with_name(
        f".{secrets.token_hex(8)}{path.suffix[:16]}"
    )  # short: `path` may be as long as a name can be
    try:
        yield partial
        os.replace(partial, path)
    except Exception as error:
        raise OSError(f"{path}: not written ({getattr(error, 'strerror', None) or error})") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, with plain text beside the tensors. Raises OSError."""
    data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata)
    with replacing(Path(path)) as partial:
        partial.write_bytes(data)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; to be called in `written_by`."""
    with safe_open(str(path), "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    for name, value in tensors.items():
        if not (value.is_floating_point() and bool(value.isfinite().all())):
            raise ValueError(f"{name}: expected finite floating-point values, {value.dtype} came")
    return tensors, metadata


@contextmanager
def written_by(writer: str, path: str | Path) -> Iterator[None]:
    """Read `path` in this block: whatever goes wrong there is a ValueError that names the file and its `writer`; one
    that is not there or may not be read stays an OSError."""
    try:
        yield
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:
        reason = f"no {error} in it" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{path}: expected a file that {writer} wrote, whole and of this version: {reason}") from error
