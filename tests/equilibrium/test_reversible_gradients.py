"""Gradients by iterations made again: their memory, their anchors, and what is noticed on the way back."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from torch import nn

import deqdiff_fast as dq
from deqdiff_fast.equilibrium.anchors import CAPACITY, Anchors


def gradients(z, target, leaves):
    loss = (z - target).square().sum()
    return [g.double() for g in torch.autograd.grad(loss, leaves)]


def held_bytes(module, x, steps, **settings):
    """(bytes kept between the two passes, most of them while the backward pass runs): what autograd was given to save,
    and all tensors that Python has made since."""
    storages = {}

    def count():
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum((storages | found).values())

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    gc.collect()
    gc.freeze()  # what is there now is not counted
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            z, info = dq.equilibrium(
                lambda z: module(z, x), torch.zeros_like(x), tol=1e-30, max_steps=steps, **settings
            )  # no sample is ever accepted: all steps are made
            assert len(info.residual_trace) == steps
            kept, peaks = count(), [0]
        for parameter in list(module.parameters())[:1]:
            parameter.register_hook(lambda _: peaks.append(count()))
        torch.autograd.grad(z.square().sum(), list(module.parameters()))
    finally:
        gc.unfreeze()
    return kept, max(peaks)


@pytest.mark.filterwarnings("ignore::deqdiff_fast.ConvergenceWarning")
def test_the_memory_of_the_reversible_gradient_is_flat(layer):
    module, x = layer
    ten, hundred = (held_bytes(module, x, steps, gradient="reversible") for steps in (10, 100))
    trace = 90 * 8 * len(x)  # the residual trace on the host
    pairs = CAPACITY * 2 * 8 * x.numel()  # ten steps do not take all the anchors that a hundred do
    assert hundred[0] <= ten[0] + trace + pairs
    assert hundred[1] <= ten[1] + trace + pairs
    ten, hundred = (held_bytes(module, x, n, gradient="unrolled", solver="reversible") for n in (10, 100))
    assert hundred[0] > 5 * ten[0]


@pytest.mark.filterwarnings("ignore::deqdiff_fast.ConvergenceWarning")
@pytest.mark.parametrize("steps", [1, 2, 7, 8, 30, 100])
def test_reversible_gradients_of_any_number_of_steps(layer, steps):
    """The gradient of exactly what was computed, far from the solution too."""
    module, x = layer
    wide, x = copy.deepcopy(module).double(), x.double().requires_grad_()
    start = torch.full_like(x, 0.3).requires_grad_()
    leaves = [start, x, *wide.parameters()]
    y = z = start
    for _ in range(steps - 1):
        y = 0.2 * y + 0.8 * wide(z, x)
        z = 0.2 * z + 0.8 * wide(y, x)
    expected = gradients(wide(z, x), torch.ones_like(x), leaves)
    found, info = dq.equilibrium(lambda z: wide(z, x), start, gradient="reversible", tol=1e-30, max_steps=steps)
    got = gradients(found, torch.ones_like(x), leaves)
    assert info.evaluations == 2 * steps - 1
    for one, other in zip(got, expected, strict=True):
        assert float((one - other).norm()) <= 1e-7 * max(float(other.norm()), 1e-6 * float(expected[1].norm()))


def test_an_inexact_reversal_is_reported():
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.eye(6) * 0.5)
    x = torch.randn(2, 6)

    def f(z):
        return torch.tanh(z @ w + x) + 1e-2 * torch.randn(2, 6)

    with pytest.warns(dq.ConvergenceWarning, match="not converged"):
        z, _ = dq.equilibrium(f, torch.zeros(2, 6), gradient="reversible", max_steps=9)
    with pytest.warns(dq.ConvergenceWarning, match="missed its own states"):
        z.sum().backward()


def test_an_iteration_made_again_is_in_the_users_autocast():
    """More steps than pairs of states are kept for."""
    torch.manual_seed(0)
    module = nn.Linear(16, 16)
    x = torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(dq.ConvergenceWarning, match="not converged"):
        z, _ = dq.equilibrium(
            lambda z: torch.tanh(0.5 * module(z) + x), torch.zeros(3, 16), gradient="reversible", tol=1e-9, max_steps=60
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z.square().sum().backward()


def test_another_graph_on_the_way_back_is_noticed():
    calls = []
    w = nn.Parameter(torch.full((3,), 0.5))

    def f(z):
        calls.append(1)
        return torch.tanh(torch.sin(w * z)) + 1 if len(calls) < 8 else w * z + 1

    with pytest.warns(dq.ConvergenceWarning):
        z, _ = dq.equilibrium(f, torch.zeros(2, 3), gradient="reversible", max_steps=4, tol=1e-9)
    with pytest.raises(RuntimeError, match="must do the same in every call"):
        z.sum().backward()


@pytest.mark.parametrize("rounds", [3, 7, 50, 400])
def test_anchors_are_few_and_spread(rounds):
    anchors = Anchors((torch.zeros(1), torch.zeros(1)), 7)
    for k in range(1, rounds + 1):
        anchors.offer(k, (torch.tensor([k]), torch.tensor([k])))
        assert len(anchors.kept) <= CAPACITY + 1
    for k in range(rounds // 7 * 7, 0, -7):
        anchors.make_room(k)
        known, (y, _) = anchors.nearest(k)
        assert int(y) == known <= k
        for between in range(known + 1, k + 1):
            anchors.offer(between, (torch.tensor([between]), torch.tensor([between])))
            assert len(anchors.kept) <= CAPACITY + 1
