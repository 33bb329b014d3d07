"""The scan over nodes on every backend against the float64 reference, and what it refuses."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from deqdiff_fast.errors import BackendUnavailableError
from deqdiff_fast.kernels import available_backends, node_scan
from deqdiff_fast.kernels.node_scan.reference import node_scan as reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAN = float("nan")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 17), (2, 3, 1000), (63, 2, 3073), (100, 1, 1001))  # T, B, D
CASES = [  # every pair of settings at least once
    pytest.param(dtype, shape, lags, kinds, id=f"{str(dtype)[6:]}-{'x'.join(map(str, shape))}-l{lags}-k{kinds}")
    for at, (dtype, shape) in enumerate(itertools.product(DTYPES, SHAPES))
    for lags in (1, 2, 3)
    for kinds in (1, 7)
    if kinds == (1, 7)[(at + at // 4 + lags) % 2] or (shape[0] < 10 and not INTERPRETED)
]


@dataclass
class Nodes:
    """The arguments of the op, in its order."""

    states: Tensor
    remainder: Tensor
    state_coef: Tensor
    remainder_coef: Tensor
    start: Tensor
    classes: Tensor | None
    drift: Tensor | None

    def list(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]

    def map(self, function) -> Nodes:
        return Nodes(*(None if value is None else function(value) for value in self.list()))

    def clone(self) -> Nodes:
        return self.map(torch.clone)

    def exact(self) -> Nodes:
        """What the reference needs to be the truth: the same numbers in float64 on the CPU."""
        return self.map(lambda t: (t.double() if t.is_floating_point() else t).cpu().clone())

    def serve(self, backend: str) -> Nodes:
        return self.map(torch.Tensor.cuda) if backend == "triton" and not INTERPRETED else self


def nodes(
    steps, batch, size, lags=1, stencil=4, kinds=5, *, sources=None, dtype=torch.float32, drift=True, seed=0
) -> Nodes:
    """A random chain whose carried values stay of order one; all states but the first are NaN. sources: as many
    remainders in the place of `steps`."""
    draw = torch.Generator().manual_seed(seed)
    sources = sources or steps
    stencil, wide = min(stencil, sources), torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    states = normal(steps + 1, batch, size)
    states[1:] = NAN
    state_coef = (2 * torch.rand(steps, lags, lags, kinds, generator=draw, dtype=torch.float64) - 1) * 0.9 / lags
    start = torch.randint(0, sources - stencil + 1, (steps,), generator=draw, dtype=torch.int32)
    return Nodes(
        states.to(dtype),
        normal(sources, batch, size).to(dtype),
        state_coef.to(wide),
        (normal(steps, lags, stencil, kinds) / stencil).to(wide),
        start,
        torch.randint(0, kinds, (size,), generator=draw, dtype=torch.int32) if kinds > 1 else None,
        0.3 * normal(steps, lags, batch, size).to(dtype) if drift else None,
    )


def tolerance(dtype: torch.dtype) -> float:
    """Relative to states of order one: each step rounds a dozen times, and the coefficients contract. What is carried
    is not rounded to half types."""
    eps = torch.finfo(dtype).eps
    return 32 * eps if dtype in (torch.float32, torch.float64) else eps


@pytest.mark.parametrize(("dtype", "shape", "lags", "kinds"), CASES)
def test_equals_float64(backend, dtype, shape, lags, kinds, small, close):
    (steps, size), batch = small(shape[0], shape[2]), shape[1]
    given = nodes(steps, batch, size, lags, kinds=kinds, dtype=dtype, drift=lags != 2 or kinds == 7, seed=steps)
    truth, actual = given.exact(), given.clone().serve(backend)
    if backend == "cpp" and dtype == torch.float16:
        with pytest.raises(BackendUnavailableError, match="float16"):
            node_scan(*actual.list(), backend=backend)
        return
    reference(*truth.list())
    node_scan(*actual.list(), backend=backend)
    assert not truth.states.isnan().any()
    close(actual.states, truth.states, tolerance(dtype), tolerance(dtype), "states")
    for one, two in zip(actual.list()[1:], given.list()[1:], strict=True):
        assert one is None or torch.equal(one.cpu(), two), "only states are written"


@pytest.mark.parametrize("stencil", [1, 2, 5, 8] if INTERPRETED else range(1, 9))
@pytest.mark.parametrize("lags", [1, 4])
def test_every_stencil(backend, stencil, lags, small, close):
    steps, size = small(20, 301, 8)  # as many steps as nodes in the longest stencil, or more
    given = nodes(steps, 2, size, lags, stencil, dtype=torch.float64)
    truth, actual = given.exact(), given.clone().serve(backend)
    reference(*truth.list())
    node_scan(*actual.list(), backend=backend)
    close(actual.states, truth.states, 1e-13, 1e-13, "states")


def test_many_lags(backend, close):
    given = nodes(20, 2, 65, 11, dtype=torch.float64)
    truth, actual = given.exact(), given.clone().serve(backend)
    if backend == "triton":
        with pytest.raises(BackendUnavailableError, match="at most 4 lags, got 11"):
            node_scan(*actual.list(), backend=backend)
        return
    reference(*truth.list())
    node_scan(*actual.list(), backend=backend)
    close(actual.states, truth.states, 1e-13, 1e-13, "states")


def test_the_definition(backend):
    """Two steps by hand: the second one looks ahead, and element 1 is of another class."""
    given = Nodes(
        torch.tensor([[[1.0, 2.0]], [[NAN, NAN]], [[NAN, NAN]]], dtype=torch.float64),
        torch.tensor([[[10.0, 20.0]], [[100.0, 200.0]]], dtype=torch.float64),
        torch.tensor([[[[0.5, 0.25]]], [[[2.0, 4.0]]]], dtype=torch.float64),
        torch.tensor([[[[1.0, -1.0]]], [[[0.1, 0.3]]]], dtype=torch.float64),
        torch.tensor([1, 0], dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32),
        None,
    ).serve(backend)
    node_scan(*given.list(), backend=backend)
    expected = torch.tensor([[1.0, 2.0], [100.5, -199.5], [202.0, -792.0]], dtype=torch.float64)
    torch.testing.assert_close(given.states[:, 0].cpu(), expected)


def test_one_class_is_any_class(backend, small):
    """A table of equal columns says the same with classes as one column does without."""
    steps, size = small(12, 300)
    one = nodes(steps, 2, size, 2, kinds=1, dtype=torch.float64)
    many = replace(
        one.clone(),
        state_coef=one.state_coef.expand(-1, -1, -1, 6).contiguous(),
        remainder_coef=one.remainder_coef.expand(-1, -1, -1, 6).contiguous(),
        classes=torch.arange(size, dtype=torch.int32) % 6,
    )
    zero = replace(one.clone(), classes=torch.zeros(size, dtype=torch.int32))
    runs = [run.serve(backend) for run in (one, many, zero)]
    for run in runs:
        node_scan(*run.list(), backend=backend)
    for run in runs[1:]:
        torch.testing.assert_close(run.states, runs[0].states, rtol=1e-14, atol=1e-14)


def test_non_contiguous(backend, small, close):
    steps, size = small(12, 130)
    given = nodes(steps, 2, size, 2)
    truth, dense = given.exact(), given.serve(backend)
    reference(*truth.list())

    def strided(t):  # every second element of a larger tensor, with the first and last dimension swapped in memory
        spread = torch.zeros(*(2 * n for n in t.shape), dtype=t.dtype, device=t.device)
        spread = spread.transpose(0, -1).contiguous().transpose(0, -1)
        view = spread[tuple(slice(None, None, 2) for _ in t.shape)]
        view.copy_(t)
        return view

    actual = dense.map(strided)
    assert not any(t.is_contiguous() for t in actual.list())
    node_scan(*actual.list(), backend=backend)
    close(actual.states, truth.states, 32 * 2**-23, 32 * 2**-23, "states")


def test_threads_do_not_change_bits(backend):
    if backend != "cpp":
        pytest.skip("only cpp has threads of its own")
    given, results, before = nodes(40, 3, 3073, 2), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            run = given.clone()
            node_scan(*run.list(), backend="cpp")
            results.append(run.states)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


def test_nothing_in_a_batch(backend):
    none = nodes(5, 2, 33, 2).map(lambda t: t)
    none.states, none.remainder, none.drift = none.states[:, :0], none.remainder[:, :0], none.drift[:, :, :0]
    node_scan(*none.serve(backend).list(), backend=backend)


@pytest.mark.parametrize(
    ("name", "at", "bad", "message"),
    [
        ("start", 3, -1, r"start: expected 0 <= start <= m - S = 2, got -1 for step 3"),
        ("start", 0, 3, r"start: expected 0 <= start <= m - S = 2, got 3 for step 0"),
        ("classes", 16, 5, r"classes: expected 0 <= classes <= K - 1 = 4, got 5 for element 16"),
        ("classes", 0, -(2**31), r"classes: expected 0 <= classes <= K - 1 = 4, got -2147483648 for element 0"),
    ],
)
def test_values_out_of_range(backend, name, at, bad, message):
    """Refused where reading them is cheap; on a GPU clamped, so that nothing outside of the tensors is read."""
    given = nodes(6, 2, 17)
    getattr(given, name)[at] = bad
    served = given.clone().serve(backend)
    if served.states.device.type == "cpu":
        with pytest.raises(ValueError, match=message):
            node_scan(*served.list(), backend=backend)
        torch.testing.assert_close(served.states, given.states, rtol=0, atol=0, equal_nan=True)
    elif backend == "triton":
        node_scan(*served.list(), backend=backend)
        getattr(given, name).clamp_(0, 2 if name == "start" else 4)
        truth = given.exact()
        reference(*truth.list())
        torch.testing.assert_close(served.states.cpu().double(), truth.states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("steps", "sources"), [(11, 3), (3, 11), (1, 9), (9, 1), (2, 8)])
def test_remainders_of_other_nodes(backend, steps, sources, dtype, small, close):
    """Fewer of them than steps, or more; the first and the last stencil are both taken."""
    given = nodes(steps, 2, small(20, 301)[1], 2, sources=sources, dtype=dtype, seed=steps)
    last = sources - given.remainder_coef.shape[2]
    given.start[0], given.start[-1] = (0, last) if steps > 1 else (last, last)
    truth, actual = given.exact(), given.clone().serve(backend)
    reference(*truth.list())
    node_scan(*actual.list(), backend=backend)
    assert not truth.states.isnan().any()
    close(actual.states, truth.states, tolerance(dtype), tolerance(dtype), "states")
    beyond = replace(given.clone(), start=given.start + 1).serve(backend)
    if beyond.states.device.type == "cpu":
        with pytest.raises(ValueError, match=f"start: expected 0 <= start <= m - S = {last}, got {last + 1}"):
            node_scan(*beyond.list(), backend=backend)


WRONG = {
    "states": torch.zeros(1, 2, 17), "remainder": torch.zeros(6, 2, 17).double(),
    "state_coef": torch.zeros(6, 2, 2, 5).double(), "remainder_coef": torch.zeros(6, 2, 7, 5),
    "start": torch.zeros(6).long(), "classes": None, "drift": torch.zeros(6, 1, 2, 17),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        node_scan(*replace(nodes(6, 2, 17, 2), **{name: WRONG[name]}).list())


@pytest.mark.parametrize(
    ("shape", "name"),
    [((6, 17, 17, 5), "state_coef"), ((6, 2, 2, 0), "state_coef"), ((6, 2, 3, 5), "state_coef"),
     ((6, 2, 0, 5), "remainder_coef"), ((6, 3, 4, 5), "remainder_coef"), ((6, 2, 4, 6), "remainder_coef")],
)  # fmt: skip
def test_coefficients_of_other_sizes(shape, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected shape"):
        node_scan(*replace(nodes(6, 2, 17, 2), **{name: torch.zeros(shape)}).list())


@pytest.mark.parametrize(
    ("shape", "message"),
    [((0, 2, 17), "remainder: expected shape .* m >= 1"), ((6, 17), "remainder: expected shape .* m >= 1"),
     ((6, 2, 16), "remainder: expected shape"), ((3, 2, 17), "remainder_coef: expected shape .* 1 <= S <= 3")],
)  # fmt: skip
def test_remainders_of_other_sizes(shape, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        node_scan(*replace(nodes(6, 2, 17, 2), remainder=torch.zeros(shape)).list())


def test_coefficients_of_half_types_are_of_float32():
    given = nodes(6, 2, 17, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="state_coef: expected dtype float32, got bfloat16"):
        node_scan(*replace(given, state_coef=given.state_coef.bfloat16()).list())


@pytest.mark.parametrize("kinds", [1, 5])
def test_opcheck(kinds):
    op = torch.ops.deqdiff_fast.node_scan.default
    torch.library.opcheck(op, tuple(nodes(6, 2, 17, 2, kinds=kinds, drift=kinds == 5).list()))


def test_auto_is_the_compiled_form():
    if available_backends()["cpp"] != "available":
        pytest.skip(available_backends()["cpp"])
    given = nodes(9, 2, 40, 2)
    one, two = given.clone(), given.clone()
    node_scan(*one.list())
    node_scan(*two.list(), backend="cpp")
    assert torch.equal(one.states, two.states)
