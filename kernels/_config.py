"""Launch shapes of the Triton kernels: hand-picked per architecture, so that no user's first call autotunes.

Streaming kernels give every thread 16 bytes per access. The scans run one warp per program: a time step then needs no
barrier, and the grid, not the program, fills the device. Where B * D alone is too small for that, a scan splits the
window over time as well.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

WARPS_WANTED = 8  # per multiprocessor, before a scan stops splitting the window
MAX_CHUNKS, MIN_CHUNK_ROWS = 32, 4


@dataclass(frozen=True)
class Config:
    """accesses: 16-byte accesses per thread and stream, at 32 threads a warp; rows, prior: a solve's rows at a time."""

    accesses: int
    num_warps: int = 1
    rows: int = 16
    prior: int = 64

    def block(self, itemsize: int) -> int:
        """Elements per program."""
        return self.accesses * (16 // itemsize) * 32 * self.num_warps


DEFAULT = {  # by kernel
    "ddim_update": Config(2), "anderson_scan": Config(1), "anderson_solve": Config(0, 4), "anderson_mix": Config(2, 4),
    "newton_linear": Config(1), "newton_prepare": Config(1), "newton_advance": Config(1, 8),
    "node_scan": Config(1), "copy_rows": Config(2, 4), "inverse_prepare": Config(1), "inverse_advance": Config(1, 8),
}  # fmt: skip
_64_LANES = {"anderson_scan": Config(2), "newton_linear": Config(2), "newton_prepare": Config(2),
             "newton_advance": Config(2, 8), "node_scan": Config(2), "inverse_prepare": Config(2),
             "inverse_advance": Config(2, 8)}  # fmt: skip
_SMALL = {name: Config(1) for name in ("ddim_update", "anderson_mix", "newton_advance", "inverse_advance", "copy_rows")}
TABLE: dict[str, dict[str, Config]] = {
    **{f"sm_{capability}": DEFAULT for capability in (80, 90, 100)},
    "gfx942": DEFAULT | _64_LANES,  # 64 lanes share the block
    "cpu": DEFAULT | _SMALL,  # interpreted: small, so that small tests see many blocks
}


@functools.cache
def architecture(device: torch.device) -> str:
    """A key of TABLE: the newest listed architecture that is not newer than the device's."""
    if device.type != "cuda":
        return "cpu"
    name = getattr(torch.cuda.get_device_properties(device), "gcnArchName", "")
    if torch.version.hip:
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted(int(key[3:]) for key in TABLE if key.startswith("sm_"))
    return f"sm_{max((k for k in known if k <= 10 * major + minor), default=known[0])}"


ENVIRONMENT = "DEQDIFF_FAST_KERNEL_CONFIG"


def save(path: str | Path, table: dict[str, dict[str, Config]]) -> None:
    """Write launch shapes as JSON, in the layout of TABLE."""
    plain = {name: {op: asdict(config) for op, config in configs.items()} for name, configs in table.items()}
    Path(path).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def load(path: str | Path) -> None:
    """Put launch shapes that `save` wrote into TABLE. Raises ValueError, naming what is wrong, and OSError."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    for name, configs in found.items():
        if name not in TABLE or not set(configs) <= set(DEFAULT):
            raise ValueError(
                f"{path}: expected architectures {', '.join(TABLE)} and kernels {', '.join(DEFAULT)}, got {name}: "
                f"{', '.join(configs)}"
            )
        TABLE[name] = TABLE[name] | {op: Config(**values) for op, values in configs.items()}


@functools.cache
def _load_named() -> None:
    if name := os.environ.get(ENVIRONMENT):
        load(name)


def config(op: str, device: torch.device) -> Config:
    """The launch shape of one kernel on one device; DEQDIFF_FAST_KERNEL_CONFIG may name a file with others."""
    _load_named()
    return TABLE.get(architecture(device), DEFAULT)[op]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def scan_chunks(programs: int, rows: int, device: torch.device) -> int:
    """Into how many parts a scan splits `rows` time steps, when samples and blocks of D make `programs` programs."""
    wanted = WARPS_WANTED * _multiprocessors(device) // max(programs, 1)
    return max(1, min(wanted, MAX_CHUNKS, rows // MIN_CHUNK_ROWS))
