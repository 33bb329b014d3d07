"""An MPS device that is not there: tensors that say they live on it and keep their numbers on the CPU.

An operation there whose result is float64 raises what torch raises on a Mac, and so does one on tensors of two devices.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device("mps:0")
BOTH = ("_to_copy", "copy_", "index.", "index_put", "_local_scalar_dense")  # they take tensors of two devices
NO_FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."


class There(Tensor):
    """A tensor on the pretended device."""

    held: Tensor
    device = property(lambda self: MPS)  # type: ignore[assignment]
    is_mps = True  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held):
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: outside of `with device`")

    def data_ptr(self):
        return self.held.data_ptr()


def on_mps(device) -> bool:
    return device is not None and torch.device(device).type == "mps"


class Pretended(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), str(func)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = [t for t in tensors if isinstance(t, There)]
        asked = kwargs.pop("device", None)
        kwargs.pop("pin_memory", None)
        on = on_mps(asked) if asked is not None else bool(there)
        mixed = there and any(not isinstance(t, There) and t.dim() for t in tensors)
        if mixed and not any(part in name for part in BOTH):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found mps:0 and cpu")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        held = tree_map(lambda t: t.held if isinstance(t, There) else t, (args, kwargs))
        out = func(*held[0], **held[1])
        if on and any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tree_leaves(out)):
            raise TypeError(NO_FLOAT64)
        same = {id(t.held): t for t in there}
        return tree_map(lambda t: same.get(id(t), There(t) if on else t) if isinstance(t, Tensor) else t, out)


@pytest.fixture
def device(monkeypatch):
    """The mode to work under; `tensor.to("mps:0")` puts something there."""
    to, cpu, tolist = Tensor.to, Tensor.cpu, Tensor.tolist

    def read(tensor):
        return tensor.held.clone() if isinstance(tensor, There) else tensor

    def move(self, *args, **kwargs):
        if args and isinstance(args[0], There):  # like another tensor: its dtype and its device
            args = (MPS, args[0].dtype)
        if isinstance(self, There) and args and isinstance(args[0], (str, torch.device)) and not on_mps(args[0]):
            return to(read(self), *args[1:], **kwargs)
        if isinstance(self, There) and args and isinstance(args[0], Tensor):  # like one on the CPU
            return to(read(self), args[0].dtype)
        return to(self, *args, **kwargs)

    def made(plain):
        def make(data, *args, device=None, **kwargs):
            out = data if isinstance(data, There) else plain(data, *args, **kwargs)
            return out.to(MPS) if on_mps(device) and not isinstance(out, There) else out

        return make

    monkeypatch.setattr(Tensor, "to", move)
    monkeypatch.setattr(Tensor, "cpu", lambda self, *a, **k: read(self) if isinstance(self, There) else cpu(self))
    monkeypatch.setattr(Tensor, "tolist", lambda self: tolist(read(self)))
    monkeypatch.setattr(torch, "tensor", made(torch.tensor))
    monkeypatch.setattr(torch, "as_tensor", made(torch.as_tensor))
    return Pretended()
