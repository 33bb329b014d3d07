"""Products of float32 on a device that may take them in TF32."""

from __future__ import annotations

import pytest
import torch

from deqdiff_fast.schedule import Basis
from deqdiff_fast.schedule.spectral import dct_matrix


def rounded(x):
    """To the ten bits that TF32 has behind the point."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture(params=["allow_tf32", "fp32_precision"])
def tf32(request, monkeypatch):
    """The setting, by the old name and the new one of torch 2.9, and a product that goes by it."""
    matmul = torch.backends.cuda.matmul
    if getattr(matmul, request.param, None) is None:
        pytest.skip("not a setting of this torch")
    plain, before = torch.mm, getattr(matmul, request.param)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: plain(
        *((rounded(a), rounded(b)) if a.dtype == torch.float32 and a.is_cuda else (a, b)), out=out
    ))  # fmt: skip
    setattr(matmul, request.param, True if request.param == "allow_tf32" else "tf32")
    yield
    setattr(matmul, request.param, before)


def test_changes_of_basis_keep_float32(device, tf32):
    channels = dct_matrix(3)
    basis, rows = Basis(channels, (3, 8, 8)), torch.randn(5, 192, generator=torch.Generator().manual_seed(0))
    expected = basis.forward(rows.double())
    with device:
        there = basis.forward(rows.to("cuda:0"))
        assert there.dtype == torch.float32
        assert (there.held - expected).norm() < 1e-6 * expected.norm()
        back = basis.inverse(there, torch.empty_like(there))
    assert (back.held - rows).norm() < 1e-6 * rows.norm()
