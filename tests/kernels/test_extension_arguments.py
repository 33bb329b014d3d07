"""The C++ form of every op refuses each bad argument before it reads or writes anything."""

from __future__ import annotations

import types

import pytest
import torch
from kernel_operands import OPS, STEPS, operands

from deqdiff_fast import kernels
from deqdiff_fast.kernels import _backends

_C = pytest.importorskip("deqdiff_fast._C")
CPP = [op for op in OPS if op in _backends.CPP_OPS]
WINDOWED = [op for op in CPP if op not in ("mark_converged", "node_scan", "secant_fit")]
SIZES = ("T", "B", "D", "L", "M", "W", "S", "K", "R", "H", "ring", "threads", "dtype")
NEVER_ZERO = ("L", "M", "S", "K", "H", "threads")  # an empty chain is nothing to do; these are no sizes of it


class Call:
    """What Python gives the extension for valid arguments, and the tensors behind the addresses."""

    def __init__(self, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.op, self.tensors = op, operands(op)
        seen: dict[str, int | float] = {}
        with monkeypatch.context() as patch:
            recorder = types.SimpleNamespace(**{op: lambda **given: seen.update(given)})
            patch.setattr(_backends, "extension", lambda: (recorder, "available"))
            getattr(kernels, op)(**self.tensors, backend="cpp")
        self.given = seen
        self.addresses = [name for name in seen if isinstance(self.tensors.get(name), torch.Tensor)]

    def refuse(self, match: str, **changes: int | float) -> None:
        held = {name: self.tensors[name] for name in self.addresses}
        before = {name: tensor.clone() for name, tensor in held.items()}
        with pytest.raises(ValueError, match=match):
            getattr(_C, self.op)(**(self.given | changes))
        assert all(torch.equal(before[name], tensor) for name, tensor in held.items()), changes


@pytest.fixture
def call(monkeypatch):
    return lambda op: Call(op, monkeypatch)


@pytest.mark.parametrize("op", CPP)
def test_what_python_gives_is_taken(op, call):
    one = call(op)
    getattr(_C, op)(**one.given)


@pytest.mark.parametrize("op", CPP)
def test_addresses(op, call):
    one = call(op)
    for name in one.addresses:
        if name not in ("drift", "guess_error"):
            one.refuse(name, **{name: 0})
        for bad in (-8, one.given[name] + 1, float(one.given[name]), 1 << 64):
            one.refuse(name, **{name: bad})


@pytest.mark.parametrize("op", CPP)
def test_sizes(op, call):
    one = call(op)
    for name in (name for name in SIZES if name in one.given):
        for bad in (-1, 1 << 62, 1 << 64, float(one.given[name]), *([0] if name in NEVER_ZERO else [])):
            one.refuse(rf"\b{name}\b", **{name: bad})


@pytest.mark.parametrize("op", [*WINDOWED, "node_scan"])
def test_sizes_whose_product_wraps(op, call):
    one = call(op)
    for sizes in ({"T": 1 << 30, "B": 1 << 30}, {"B": 1 << 30, "D": 1 << 40}, {"T": 1 << 30, "D": 1 << 40}):
        one.refuse("a size within the address space", **sizes)


@pytest.mark.parametrize(("lo", "hi"), [(-1, 2), (3, 2), (0, STEPS + 1), (2**31 - 1, -(2**31)), (2**31 - 1, 0)])
@pytest.mark.parametrize("op", WINDOWED)
def test_windows(op, lo, hi, call):
    one = call(op)
    one.tensors["lo"][1], one.tensors["hi"][1] = lo, hi
    one.refuse("lo, hi: window .* of sample 1")


@pytest.mark.parametrize("op", ["anderson_step", "newton_scan", "inverse_scan"])
def test_rings_narrower_than_a_window(op, call):
    call(op).refuse("lo, hi: window .* at most 3 rows", W=3)
    call(op).refuse("W", W=0)


@pytest.mark.parametrize("op", [op for op in WINDOWED if op != "ddim_update"])
def test_columns_outside_of_the_ring(op, call):
    for column in (-1, 3, 1 << 31):
        call(op).refuse("column", column=column)


@pytest.mark.parametrize(("name", "bad"), [("start", -1), ("start", 3), ("classes", -1), ("classes", 5)])
def test_nodes_and_classes_out_of_range(name, bad, call):
    one = call("node_scan")
    one.tensors[name][3] = bad
    one.refuse(rf"{name}: expected .*, got {bad} for \w+ 3")


def test_a_stencil_is_no_longer_than_there_are_nodes(call):
    call("node_scan").refuse(r"\bS: expected at most M = 2", M=2)
    call("node_scan").refuse("a size within the address space", M=1 << 30, B=1 << 30)
    call("node_scan").refuse("a size within the address space", K=1 << 31, T=1 << 30, B=1, D=1)


@pytest.mark.parametrize("op", CPP)
def test_names(op, call):
    one = call(op)
    one.refuse("spare: expected no such argument", spare=1)
    for name in one.given:
        with pytest.raises(ValueError, match=f"{name}: expected a value, got none"):
            getattr(_C, op)(**{key: value for key, value in one.given.items() if key != name})
