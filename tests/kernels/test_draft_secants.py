"""draft_secants: each backend against the float64 reference; arguments, opcheck. In a sweep: test_draft_scan.py."""

from __future__ import annotations

import os

import pytest
import torch

from deqdiff_fast.kernels import available_backends, draft_secants
from deqdiff_fast.kernels.draft_secants.reference import draft_secants as reference

NAN = float("nan")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def arguments(history=2, size=9, dtype=torch.float64):
    """Two rounds behind it; what must not be read is NaN. Sample 1 starts at row 2 and ends before row 5."""
    g = torch.Generator().manual_seed(size + history)
    rows, shape = [0, 2, 4, 5], (4, 2, size)

    def draw(*sizes):
        return torch.randn(*sizes, generator=g, dtype=torch.float64).to(dtype)

    given = {"states": draw(7, 2, size), "predictions": draw(6, 2, size), "draft_cache": draw(*shape)}
    given |= {"anchor_rows": torch.tensor(rows), "lo": torch.tensor([0, 2]).int(), "hi": torch.tensor([6, 5]).int()}
    z, remainder = draw(history + 1, *shape), draw(history + 1, *shape)
    filled = torch.full((4, 2), 2).int()
    filled[2, 0] = 0
    for n in range(4):
        for b in range(2):
            for back in range(int(filled[n, b]) + 1, history + 2):  # column 0 is this round's
                z[-back % (history + 1), n, b] = remainder[-back % (history + 1), n, b] = NAN
    z[0], remainder[0] = NAN, NAN
    for n, b in ((0, 1), (3, 1)):  # not active there
        given["draft_cache"][n, b] = NAN
    given |= {"z": z, "remainder": remainder, "filled": filled}
    weights = torch.full((4, 2, history, history), NAN, dtype=torch.float64)
    return given | {"secant_weights": weights, "column": 0}


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("history", [0, 1, 3])
@pytest.mark.parametrize(("size", "dtype"), [(17, torch.float64), (301, torch.float32)])
def test_cpp_and_triton_match_the_reference(backend, history, size, dtype):
    if available_backends()[backend] != "available":
        pytest.skip(available_backends()[backend])
    given = arguments(history, size, dtype)
    expected = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    reference(*expected.values())
    device = "cpu" if INTERPRETED or backend == "cpp" else "cuda"
    got = {k: v.to(device, copy=True) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    draft_secants(**got, backend=backend)
    for name in ("z", "remainder", "filled", "secant_weights"):
        tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(
            got[name].cpu(), expected[name], **tolerance, equal_nan=True, msg=lambda t, n=name: n + t
        )


def test_opcheck():
    values, workspace = arguments().values(), torch.zeros(1 << 12, dtype=torch.uint8)
    op = torch.ops.deqdiff_fast.draft_secants.default
    torch.library.opcheck(op, (*values, 1e-6, 1e-5, workspace))
    torch.library.opcheck(op, (*arguments().values(), 1e-6, 1e-5, None))


WRONG = {
    "draft_cache": torch.zeros(2, 9).double(), "z": torch.zeros(9, 4, 2, 9).double(),
    "remainder": torch.zeros(2, 4, 2, 9).double(), "secant_weights": torch.zeros(4, 2, 2, 2), "column": 3,
    "anchor_rows": torch.zeros(4).int(), "filled": torch.zeros(4, 2), "ridge": 0.0, "floor": -1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        draft_secants(**arguments() | {name: WRONG[name]})


def test_rows_outside_the_chain_are_refused():
    if available_backends()["cpp"] != "available":
        pytest.skip(available_backends()["cpp"])
    with pytest.raises(ValueError, match="anchor_rows: row 6 must lie within"):
        draft_secants(**arguments() | {"anchor_rows": torch.tensor([0, 2, 4, 6])}, backend="cpp")
