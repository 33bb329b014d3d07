"""copy_rows: the Triton kernel against the plain-torch reference; arguments, opcheck."""

from __future__ import annotations

import os

import pytest
import torch

from deqdiff_fast.kernels import copy_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_triton = pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"), reason="needs CUDA or TRITON_INTERPRET=1")


@runs_triton
@pytest.mark.parametrize(("kind", "size"), [(torch.float32, 40), (torch.bfloat16, 2051)])
def test_triton_copies_as_the_reference(kind, size):
    target, ring = torch.randn(11, 3, size, device=DEVICE), torch.randn(5, 3, size, device=DEVICE).to(kind)
    first = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    last = torch.tensor([4, 4, 13], dtype=torch.int32, device=DEVICE)
    sides = [target.clone() for _ in range(2)]
    for side, backend in zip(sides, ("reference", "triton")):
        copy_rows(side, ring, first, last, backend=backend)
    assert torch.equal(*sides)
    assert not torch.equal(sides[0], target)


@pytest.mark.skipif(INTERPRETED, reason="the dispatcher is tested where nothing is interpreted")
def test_opcheck():
    args = (torch.randn(5, 2, 8), torch.randn(2, 2, 8), torch.zeros(2).int(), torch.full((2,), 3).int())
    torch.library.opcheck(torch.ops.deqdiff_fast.copy_rows.default, args)


def test_bad_arguments():
    bounds = torch.zeros(3, dtype=torch.int32), torch.full((3,), 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="target, source: expected shapes"):
        copy_rows(torch.zeros(3, 2, 8), torch.zeros(2, 8), *bounds)
    with pytest.raises(ValueError, match="first: expected shape"):
        copy_rows(torch.zeros(3, 2, 8), torch.zeros(2, 2, 8), *bounds)
