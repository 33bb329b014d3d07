"""Files of tensors: what is damaged or foreign is refused by name, and a write that fails leaves what was there."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import deqdiff_fast as dq


def spectrum() -> dict[str, torch.Tensor]:
    return {"variance": torch.ones(3, 8, 8), "channels": torch.eye(3)}


DAMAGED = {
    "empty": b"",
    "text": b"hello world, hello",
    "pickle": pickle.dumps({"variance": 1}),
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "header only": b"\x02" + b"\0" * 7 + b"{}",
}
FOREIGN = {
    "other tensors": {"x": torch.ones(2)},
    "half of it": {"variance": torch.ones(3, 8, 8)},
    "other shape": spectrum() | {"channels": torch.eye(2)},
    "a scalar": spectrum() | {"variance": torch.tensor(1.0)},
    "integers": spectrum() | {"variance": torch.ones(3, 8, 8, dtype=torch.int64)},
    "complex": spectrum() | {"channels": torch.eye(3, dtype=torch.complex64)},
    "NaN": spectrum() | {"variance": torch.full((3, 8, 8), float("nan"))},
}


@pytest.mark.parametrize("load", [dq.SpectralSlope.load, dq.ConvDraft.load])
@pytest.mark.parametrize("kind", [*DAMAGED, *FOREIGN, "cut", "a folder"])
def test_what_cannot_be_used_is_a_value_error_with_its_name(tmp_path, kind, load):
    path = tmp_path / "f.safetensors"
    if kind in DAMAGED:
        path.write_bytes(DAMAGED[kind])
    elif kind in FOREIGN:
        save_file(FOREIGN[kind], path)
    elif kind == "cut":
        save_file(spectrum(), path)
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.mkdir()
    writer = load.__qualname__.replace("load", "save")
    with pytest.raises(ValueError, match=rf"f\.safetensors: expected a file that {writer} wrote"):
        load(path)


@pytest.mark.parametrize("load", [dq.SpectralSlope.load, dq.ConvDraft.load])
def test_a_file_that_is_not_there(tmp_path, load):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load(tmp_path / "nothing")


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path, whole = tmp_path / "spectrum.safetensors", dq.SpectralSlope(**spectrum())
    whole.save(path)
    before, write = path.read_bytes(), Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        write(self, data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"spectrum\.safetensors: not written \(No space left"):
        whole.save(path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["spectrum.safetensors"]
