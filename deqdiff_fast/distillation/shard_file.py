"""One shard of pairs on disk: a safetensors file whose bytes follow from its tensors, with a checksum of them.

The format is written out here since the library that writes it orders what stands beside the tensors at random, and two
shards of the same pairs are to be the same file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DamagedPairsError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNED = 8  # bytes, of the header and so of the first tensor
LONGEST_HEADER = 1 << 24
CHECKSUM = "sha256"


def pack_shard(tensors: dict[str, Tensor], metadata: dict[str, str]) -> list[bytes]:
    """The pieces of the file: tensors on the CPU in the order of their item sizes, a checksum added to the metadata."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {}
    parts, offset = list[bytes](), 0
    for name in order:
        value = tensors[name].detach().cpu().contiguous()
        parts.append(value.view(-1).view(torch.uint8).numpy().tobytes())
        end = offset + len(parts[-1])
        entries[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    digest = hashlib.sha256(_layout(entries, metadata))
    for part in parts:
        digest.update(part)
    text = json.dumps({"__metadata__": {**metadata, CHECKSUM: digest.hexdigest()}, **entries}).encode()
    text += b" " * (-len(text) % ALIGNED)
    return [len(text).to_bytes(8, "little"), text, *parts]


def _layout(entries: dict[str, Any], metadata: dict[str, str]) -> bytes:
    """What the checksum is of, beside the data."""
    return json.dumps([entries, {key: metadata[key] for key in sorted(metadata) if key != CHECKSUM}]).encode()


class ShardFile:
    """A shard that was written, mapped into memory.

    Args:
        path: of the file.
        check: whether to compare all of it with its checksum.

    Raises:
        FileNotFoundError: it is not there.
        DamagedPairsError: it is not as it was written.
    """

    def __init__(self, path: Path, check: bool = True) -> None:
        size = path.stat().st_size
        try:
            self.metadata, self.tensors = self._map(path, size, check)
        except OSError:
            raise
        except Exception as error:
            reason = f"no {error} in it" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
            raise DamagedPairsError(
                f"{path}: expected a shard of pairs as it was written: {reason}; the other shards are of use, and "
                "making the same pairs again makes this one anew",
                str(path),
            ) from error

    @staticmethod
    def _map(path: Path, size: int, check: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(LONGEST_HEADER, size - 8):
                raise ValueError(f"its {size} bytes hold no header")
            entries = json.loads(file.read(length))
        metadata, start = entries.pop("__metadata__"), 8 + length
        end = max(entry["data_offsets"][1] for entry in entries.values())
        if start % ALIGNED or start + end != size:
            raise ValueError(f"expected {start + end} bytes, got {size}")
        whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)  # no descriptor stays open
        if check:
            digest = hashlib.sha256(_layout(entries, metadata))
            digest.update(whole[start:].numpy().data)
            if digest.hexdigest() != metadata[CHECKSUM]:
                raise ValueError("its checksum is another one")
        tensors = {}
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            data = whole[start + first : start + last].view(DTYPES[entry["dtype"]])
            tensors[name] = data.view(entry["shape"])
        return metadata, tensors
