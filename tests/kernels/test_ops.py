"""The ops as torch's dispatcher has them: they check what their public functions check, and resolve lazy negation."""

from __future__ import annotations

import pytest
import torch
from kernel_operands import OPS, SIZE, STEPS, operands
from torch._subclasses.fake_tensor import FakeTensorMode

from deqdiff_fast import kernels
from deqdiff_fast.kernels import _backends

MISTAKES = {
    "one element": lambda t: t.flatten()[:1],
    "a row less": lambda t: t[1:],
    "another dtype": lambda t: t.to(torch.complex64),
    "another device": lambda t: t.to("meta"),
}
WINDOWED = [op for op in OPS if "predictions" in operands(op)]
# No shape of these follows from another argument's.
FREE = {("advance_window", "rows"), ("copy_rows", "source"), ("copy_rows", "target")}


def dispatched(op: str, arguments: dict) -> None:
    getattr(torch.ops.deqdiff_fast, op)(**arguments)


def called(op: str, arguments: dict, **keywords) -> None:
    getattr(kernels, op)(**arguments, **keywords)


def tensors(arguments: dict) -> dict[str, torch.Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}


def test_every_op_is_in_the_table():
    assert set(OPS) == {name for name in kernels.__all__ if name in dir(torch.ops.deqdiff_fast)}
    assert set(_backends.CPP_OPS) <= set(OPS)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("op", OPS)
def test_the_dispatcher_refuses_what_the_function_refuses(op, mistake):
    dispatched(op, operands(op))
    for name, tensor in tensors(operands(op)).items():
        if (op, name) in FREE and (mistake == "a row less" or (name == "rows" and mistake == "one element")):
            continue
        changed = operands(op) | {name: MISTAKES[mistake](tensor)}
        before = {key: value.clone() for key, value in tensors(changed).items()}
        with pytest.raises(ValueError, match="expected") as one:
            dispatched(op, changed)
        with pytest.raises(ValueError, match="expected") as two:
            called(op, changed)
        assert str(one.value) == str(two.value)
        for key, value in before.items():
            assert value.device.type == "meta" or torch.equal(value, changed[key]), f"{name}: {key} was written"


@pytest.mark.parametrize(("lo", "hi"), [(-1, 3), (0, STEPS + 1), (3, 2)])
@pytest.mark.parametrize("op", WINDOWED)
def test_the_dispatcher_refuses_bad_windows(op, lo, hi):
    arguments = operands(op)
    arguments["lo"][1], arguments["hi"][1] = lo, hi
    with pytest.raises(ValueError, match=r"lo, hi: expected .* sample 1"):
        dispatched(op, arguments)


@pytest.mark.parametrize(
    ("op", "changes"),
    [
        ("anderson_step", {"column": 3}),
        ("anderson_step", {"ridge": -1.0}),
        ("newton_scan", {"column": -1}),
        ("newton_scan", {"e": None}),
        ("inverse_scan", {"reach": 0.0}),
        ("newton_scan", {"ridge": 0.0}),
    ],
)
def test_the_dispatcher_refuses_bad_settings(op, changes):
    with pytest.raises(ValueError, match="expected"):
        dispatched(op, operands(op) | changes)


@pytest.mark.parametrize(
    ("op", "changes"),
    [
        ("copy_rows", {"source": torch.empty(0, 2, SIZE)}),
        ("advance_window", {"width": 0}),
        ("advance_window", {"width": -2}),
        ("advance_window", {"width": 2**40}),
    ],
)
def test_sizes_of_nothing(op, changes):
    for call in (dispatched, called):
        with pytest.raises(ValueError, match="expected"):
            call(op, operands(op) | changes)


NO_TENSORS = {"none": lambda t: None, "a list": lambda t: t.tolist(), "sparse": lambda t: t.to_sparse()}


@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize("op", OPS)
def test_what_is_no_dense_tensor_is_refused_by_name(op, kind, backend):
    """The compiled forms read memory by its address, and the reference is not to be all that notices."""
    optional = {"drift", "workspace", "z", "e", "filled", "classes", "guess_error"}
    for name, tensor in tensors(operands(op)).items():
        if kind == "none" and name in optional:
            continue
        with pytest.raises(ValueError, match=f"{name}: expected a (dense )?tensor, got"):
            called(op, operands(op) | {name: NO_TENSORS[kind](tensor)}, backend=backend)


@pytest.mark.parametrize("op", OPS)
def test_what_is_no_number_is_refused_by_name(op, backend):
    for name, value in operands(op).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            for bad in (
                None,
                True,
                "1",
                1.5 if isinstance(value, int) else "x",
                2**64 if isinstance(value, int) else "x",
            ):
                with pytest.raises(ValueError, match=f"{name}: expected an? (int|number), got"):
                    called(op, operands(op) | {name: bad}, backend=backend)


def test_a_tracer_refuses_without_running():
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) for name, value in tensors(operands("ddim_update")).items()}
        with pytest.raises(ValueError, match=r"predictions: expected shape \(4, 2, 6\), got \(3, 2, 6\)"):
            dispatched("ddim_update", operands("ddim_update") | fake | {"predictions": fake["predictions"][1:]})


def test_checks_run_once(monkeypatch):
    module = __import__("deqdiff_fast.kernels.ddim_update", fromlist=["_op"])
    calls, validate = [], module._op.validate
    monkeypatch.setattr(module._op, "validate", lambda given: (calls.append(1), validate(given)))
    called("ddim_update", operands("ddim_update"))
    dispatched("ddim_update", operands("ddim_update"))
    assert len(calls) == 2


@pytest.mark.parametrize("op", OPS)
def test_negated_views_are_read_and_written_with_their_sign(op, backend):
    """`torch._neg_view` is what `.imag` of a conjugate is: memory that holds the values without their sign."""
    plain = operands(op)
    expected = {**plain, **{name: value.clone() for name, value in tensors(plain).items()}}
    called(op, expected, backend=backend)
    for name, value in tensors(plain).items():
        if not value.is_floating_point():
            continue
        actual = {**plain, **{key: other.clone() for key, other in tensors(plain).items()}}
        actual[name] = torch._neg_view(value.neg())
        called(op, actual, backend=backend)
        assert actual[name].is_neg()
        for key, other in tensors(expected | {"workspace": None}).items():
            assert torch.equal(actual[key].resolve_neg(), other), f"{key}, with {name} negated"


def test_the_sizes_are_told_apart():
    assert len({STEPS, SIZE, 2, 3}) == 4  # or a mistake in one would pass for the other
