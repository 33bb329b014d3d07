"""A tape that stands in for a CUDA graph."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Notes operations with the tensors they took and gave; a replay computes them anew into those tensors."""

    def __init__(self):
        super().__init__()
        self.noted, self.undo = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select")):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves((args, kwargs)):  # a graph only notes: what a recording writes must not have happened
            if isinstance(t, torch.Tensor) and id(t) not in self.undo and 0 not in t.stride():  # else it is read only
                self.undo[id(t)] = (t, t.clone())
        out = func(*args, **kwargs)
        fresh = [
            t for t in tree_leaves(out)
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given
        ]  # fmt: skip
        self.noted.append((func, args, kwargs, out, fresh))
        return out

    def play(self):
        for func, args, kwargs, out, fresh in self.noted:
            again = func(*args, **kwargs)
            for target, value in zip(tree_leaves(out), tree_leaves(again)):
                if any(target is t for t in fresh):
                    target.copy_(value)


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class TapeRecorder:
    def __init__(self):
        self.tapes = 0

    def run(self, work):
        work()

    def enter(self, tensors=()):
        pass

    leave = reset = enter

    def record(self, work):
        tape = Tape()
        try:
            with tape:
                work()
        finally:
            for tensor, before in reversed(tape.undo.values()):  # of two views the one noted first knows best
                if not torch.equal(as_bytes(tensor), as_bytes(before)):
                    tensor.copy_(before)
        self.tapes += 1
        return tape.play
