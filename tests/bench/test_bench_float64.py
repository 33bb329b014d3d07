"""The benchmarks' own float64 convolution gives what torch's gives, and stays out of the way of everything else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

_path = list(sys.path)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the benchmarks are in the checkout only
from bench._float64 import ShiftedConv2d, quicken  # noqa: E402

sys.path[:] = _path


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (1, 5, 1, 1), (3, 5, 8, 2)])
def test_the_same_convolution(bias: bool, shape: tuple[int, ...]) -> None:
    conv = nn.Conv2d(shape[1], 4, 3, padding=1, bias=bias).double()
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        expected = conv(x)
        quicken(conv)
        assert type(conv) is ShiftedConv2d
        torch.testing.assert_close(conv(x), expected, rtol=1e-13, atol=1e-13)


def test_gradients_and_float32_are_torchs_own() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1).double()
    quicken(conv)
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad is not None
    assert conv.weight.grad is not None
    with torch.no_grad():
        assert conv.float()(x.float()).dtype == torch.float32


def test_other_convolutions_stay_as_they_are() -> None:
    others = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    )  # fmt: skip
    quicken(others)
    assert all(type(module) is nn.Conv2d for module in others)
