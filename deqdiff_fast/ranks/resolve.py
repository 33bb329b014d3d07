"""From what a user gives as `group` to a process group of torch."""

from __future__ import annotations

import atexit
import os
from typing import Any

from torch import distributed as dist

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


def resolve_group(group: Any) -> Any:
    """The process group of a ProcessGroup, a 1-D DeviceMesh, or "world", which is made where torchrun has started this
    process and nobody has made it. Raises TypeError, ValueError."""
    if not dist.is_available():
        raise ValueError("group: expected None, for this torch was built without torch.distributed")
    if isinstance(group, str) and group == "world":
        if not dist.is_initialized():
            if not all(name in os.environ for name in _LAUNCHED):
                raise ValueError(
                    "group: expected processes for 'world', and there are none; start the script with torchrun "
                    "--nproc-per-node N, or call torch.distributed.init_process_group"
                )
            dist.init_process_group()
            atexit.register(_destroy)  # a process that ends without it may be aborted
        return dist.group.WORLD
    if isinstance(group, dist.ProcessGroup):
        if dist.get_rank(group) < 0:
            raise ValueError("group: expected one that this process belongs to")
        return group
    dimensions = getattr(group, "ndim", None)
    if callable(getattr(group, "get_group", None)) and dimensions is not None:
        if dimensions != 1:
            raise ValueError(f"group: expected a DeviceMesh of one dimension, say mesh['time'], got {dimensions}")
        return group.get_group()
    raise TypeError(
        "group: expected a torch.distributed ProcessGroup, a DeviceMesh of one dimension, 'world' or None, got "
        f"{group!r}"
    )


def other_dimensions(group: Any) -> list[Any]:
    """The process groups of this rank along the other dimensions of the mesh that `group` is one of; none for what is
    no such part."""
    names = getattr(group, "mesh_dim_names", None)
    if not names:
        return []
    if hasattr(group, "_get_root_mesh"):  # torch has no public way to it
        root = group._get_root_mesh()
    else:
        root = dist.device_mesh._mesh_resources.get_root_mesh(group)
    return [root.get_group(name) for name in root.mesh_dim_names if name not in names]


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
