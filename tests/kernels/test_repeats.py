"""What the second call of an op on tensors alike does on a GPU, with Triton's launches stubbed."""

from __future__ import annotations

import gc

import pytest
import torch
from kernel_operands import OPS, given_to

import deqdiff_fast.kernels as kernels
from deqdiff_fast.kernels import _config, _launches
from deqdiff_fast.kernels._register import register

jit = pytest.importorskip("triton.runtime.jit")


@pytest.fixture
def checks(monkeypatch):
    """How often arguments were checked."""
    seen, check = [], register.check
    monkeypatch.setattr(register, "check", lambda self, given: seen.append(self.name) or check(self, given))
    return seen


def call(op, given, **changed):
    getattr(kernels, op)(**given | changed, backend="triton")


def addresses(arguments):
    return {name: v.data_ptr() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}


@pytest.mark.parametrize("op", OPS)
def test_the_second_call_is_its_launches_and_no_more(launched, checks, op):
    given = given_to(op)
    call(op, given)
    first, before = [*launched], len(checks)
    del launched[:]
    for _ in range(2):
        call(op, given)
    assert len(checks) == before == 1
    assert {how for how, *_ in first} == {"bound"}
    assert [("again", name, grid, addresses(arguments)) for _, name, grid, arguments in first] * 2 == launched


def test_auto_and_by_name_are_the_same_call(launched, checks):
    given = given_to("newton_scan")
    call("newton_scan", given)
    del launched[:]
    kernels.newton_scan(**given)
    assert {how for how, *_ in launched} == {"again"}
    kernels.newton_scan(**given, backend="reference")
    assert len(checks) == 2


def test_other_tensors_alike_are_launched_on(launched, checks):
    """Addresses are those of the call, in the workspace as well."""
    for op in OPS:
        call(op, given_to(op))
        first = [*launched]
        del launched[:]
        given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given_to(op).items()}
        call(op, given)
        assert len(checks) == 1, op
        assert {how for how, *_ in launched} == {"again"}
        again = [*launched]
        _launches.reset()
        del launched[:], checks[:]
        call(op, given)
        assert [entry[1:] for entry in again] == [(*e[1:3], addresses(e[3])) for e in launched]
        assert len(first) == len(again)
        del launched[:], checks[:]


@pytest.mark.parametrize(
    "change",
    [
        {"column": 2},
        {"ridge": 1e-3},
        {"drift": None},
        {"slope": torch.zeros(4, 6)},
        {"slope": torch.zeros(4, 1, dtype=torch.float64)},
        {"slope": torch.zeros(5)[1:, None]},
        {"workspace": torch.zeros((1 << 20) + 1, dtype=torch.uint8)},
    ],
    ids=["column", "ridge", "no drift", "shape", "dtype", "alignment", "size of the workspace"],
)
def test_another_call_is_checked(launched, checks, change):
    given = given_to("newton_scan")
    call("newton_scan", given)
    call("newton_scan", given, **change)
    assert len(checks) == 2
    assert launched[-1][0] == "bound"
    call("newton_scan", given)
    assert len(checks) == 2


def test_what_is_wrong_is_refused(launched):
    given = given_to("newton_scan")
    call("newton_scan", given)
    for bad in ([1.0], torch.zeros(4, 1).to_sparse(), None):
        with pytest.raises(ValueError, match=r"slope: expected a (dense )?tensor"):
            call("newton_scan", given, slope=bad)
    for name, value in (("predictions", given["predictions"][1:]), ("lo", given["lo"].long()), ("ridge", -1.0)):
        with pytest.raises(ValueError, match=name):
            call("newton_scan", given, **{name: value})


@pytest.mark.parametrize("kind", [torch.nn.Parameter, torch._neg_view, lambda t: t.T.contiguous().T])
def test_tensors_of_another_kind(launched, checks, kind):
    """Those that say something else of themselves, and those that are copied: checked every time."""
    given = given_to("newton_scan")
    call("newton_scan", given)
    for _ in range(2):
        call("newton_scan", given, slope=kind(torch.zeros(4, 6)).requires_grad_(False))
    assert len(checks) == 3


@pytest.mark.parametrize("change", ["workspace", "not dense"])
def test_memory_that_is_gone_is_not_launched_on(launched, checks, change):
    """Scratch memory of one call, and dense copies."""
    given = given_to("ddim_update")
    if change == "workspace":
        given["workspace"] = None
    else:
        given["states"] = given["states"].transpose(0, 2).contiguous().transpose(0, 2)
    for _ in range(3):
        call("ddim_update", given)
    assert len(checks) == 3
    assert {how for how, *_ in launched} == {"bound"}


@pytest.mark.parametrize("change", ["dtype", "strides", "sign", "size"])
def test_a_tensor_that_was_changed_in_its_place(launched, checks, change):
    """Of the tensors that come with a workspace only address and shape are looked at, as long as they are the same."""
    given = given_to("newton_scan") | {"slope": torch.zeros(4, 6)}
    for _ in range(3):
        call("newton_scan", given)
    assert len(checks) == 1
    slope = given["slope"]
    if change == "dtype":
        slope.data = torch.zeros(4, 6, dtype=torch.float64)
    elif change == "strides":
        slope.data = torch.zeros(6, 4).T
    elif change == "sign":
        slope.data = torch._neg_view(torch.zeros(4, 6))
    else:
        slope.resize_(4, 1)
    call("newton_scan", given)
    assert len(checks) == 2


def test_another_tensor_in_the_same_place(launched, checks):
    given = given_to("newton_scan")
    for _ in range(3):
        call("newton_scan", given)
    with pytest.raises(ValueError, match="slope: expected a floating-point tensor"):
        call("newton_scan", given, slope=given["slope"].view(torch.int32))
    assert len(checks) == 2


def test_two_calls_share_a_workspace(launched, checks):
    one, other = given_to("newton_scan"), given_to("newton_scan")
    other["workspace"] = one["workspace"]
    for given in (one, other, one, one, other):
        call("newton_scan", given)
    assert len(checks) == 1
    assert [seen[3]["states"] for seen in launched[3::3]] == [g["states"].data_ptr() for g in (other, one, one, other)]


def test_a_number_of_another_type_is_another_call(launched):
    given = given_to("anderson_step")
    call("anderson_step", given)
    with pytest.raises(ValueError, match="column: expected an int"):
        call("anderson_step", given, column=True)


def test_nothing_is_held_on_to(launched):
    given = given_to("newton_scan")
    for _ in range(3):
        call("newton_scan", given)
    held = [torch.utils.weak.WeakTensorKeyDictionary({given[name]: 1}) for name in ("states", "workspace")]
    given.clear(), launched.clear()
    gc.collect()
    assert not any(len(entry) for entry in held)


def test_other_launch_shapes(launched, monkeypatch):
    given = given_to("node_scan")
    call("node_scan", given)
    monkeypatch.setattr(_config, "TABLE", {"cpu": _config.DEFAULT | {"node_scan": _config.Config(4)}})
    _launches.reset()
    call("node_scan", given)
    assert [entry[0] for entry in launched] == ["bound", "bound"]
    assert launched[1][3]["BLOCK"] == 4 * launched[0][3]["BLOCK"]


def test_a_tensor_that_is_given_twice(launched, checks):
    """Nothing is kept of that, for another call may give two."""
    given = given_to("mark_converged")
    call("mark_converged", given, previous=given["sq_norm"])
    call("mark_converged", given)
    assert len(checks) == 2
    assert launched[-1][3]["previous"] is given["previous"]


def test_a_triton_with_other_compiled_kernels(launched, checks, monkeypatch):
    """Then every call is made from the start."""
    given = given_to("newton_scan")
    call("newton_scan", given)
    (repeats,) = [r for r in _launches._every if r._kept]
    monkeypatch.setattr(repeats, "works", True)
    for (kept,) in repeats._kept.values():
        kept.launches[0] = lambda: None, kept.launches[0][1]
    for _ in range(2):
        call("newton_scan", given)
    assert len(checks) == 3
    assert {how for how, *_ in launched} == {"bound"}
    assert not repeats.works


def test_no_more_are_kept_than_a_solve_needs(launched):
    given = given_to("newton_scan")
    for k in range(2 * _launches.MOST):
        call("newton_scan", given, ridge=1e-6 * (k + 1))
    repeats = next(r for r in _launches._every if len(r._kept))
    assert 0 < len(repeats._kept) <= _launches.MOST


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op", OPS)
def test_on_a_device(op):
    """The same bits as calls that are made from the start."""
    again, anew = ({name: _moved(value) for name, value in given_to(op).items()} for _ in range(2))
    for _ in range(3):
        call(op, again)
    for _ in range(3):
        _launches.reset()
        call(op, anew)
    for name, value in anew.items():
        if isinstance(value, torch.Tensor) and name != "workspace":
            torch.testing.assert_close(again[name], value, rtol=0, atol=0, equal_nan=True)


def _moved(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.to("cuda", torch.float32 if value.dtype == torch.float64 else value.dtype)
