"""No launch of an op makes the host wait for a device."""

from __future__ import annotations

import importlib

import pytest
from kernel_operands import OPS, given_to
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

LOOKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "masked_select")


class Reads(TorchDispatchMode):
    """Operations for which the host waits on a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(look in str(func) for look in LOOKS):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS)
def test_no_launch_reads_a_value(launched, op):
    module = importlib.import_module(f"deqdiff_fast.kernels.{op}._triton")
    with Reads() as reads:
        module.launch(*given_to(op).values())
    assert launched
    assert not reads.found
