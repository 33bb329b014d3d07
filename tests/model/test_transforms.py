"""Forward-mode tangents and torch.func: refused with a sentence, and nothing is spoilt for the next solve."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import deqdiff_fast as dq

ROUNDS = {"solver": "picard", "backend": "reference"}
REFUSED = "forward-mode tangent, which a solve would lose"


def dual(x: torch.Tensor) -> torch.Tensor:
    return forward_ad.make_dual(x, torch.ones_like(x))


@pytest.mark.parametrize("settings", [{}, ROUNDS, {"gradient": "unrolled"}], ids=str)
def test_tangents_are_refused(ddim, noise, bent, settings):
    schedule, start, network = ddim(5), noise(2, (6,), dtype=torch.float64), bent()
    cond = torch.zeros(2, 6, dtype=torch.float64)
    sampler = dq.DEQSampler(network, schedule, **settings)
    with forward_ad.dual_level():
        for call in (sampler.sample, sampler.serial, torch.no_grad()(sampler.sample)):
            with pytest.raises(NotImplementedError, match=f"noise: .*{REFUSED}"):
                call(dual(start))
            with pytest.raises(NotImplementedError, match=f"model_kwargs: .*{REFUSED}"):
                call(start, {"cond": dual(cond)})
        guided = dq.guided(network, {"cond": dual(cond)}, {"cond": cond}, 2.0)
        with pytest.raises(NotImplementedError, match=f"model: .*{REFUSED}"):
            dq.DEQSampler(guided, schedule, **settings).sample(start)
        with pytest.raises(NotImplementedError, match=f"model: .*{REFUSED}"):
            dq.DEQInverter(guided, schedule).invert(start)
        with pytest.raises(NotImplementedError, match=f"image: .*{REFUSED}"):
            dq.DEQInverter(network, schedule).invert(dual(start))
        assert sampler.sample(start).converged.all(), "what has no tangent is none of it"


@pytest.mark.parametrize("settings", [{}, ROUNDS, {"gradient": "reversible"}, {"gradient": "unrolled"}], ids=str)
def test_tangents_of_what_only_the_model_knows(ddim, noise, bent, settings):
    """Where weights become dual tensors as PyTorch's tutorial has it, they are no parameters any more."""
    network, start = bent(), noise(2, (6,), dtype=torch.float64)
    sampler = dq.DEQSampler(network, ddim(5), **settings)
    with forward_ad.dual_level():
        weight = network.outer.weight.detach()
        del network.outer.weight
        network.outer.weight = dual(weight)
        with pytest.raises(NotImplementedError, match=f"model: .*{REFUSED}"):
            sampler.sample(start)


TRANSFORMED = {
    "grad": lambda solve, start: torch.func.grad(lambda x: solve(x).sum())(start),
    "grad of something else": lambda solve, start: torch.func.grad(lambda c: (c * solve(start)).sum())(start),
    "jvp": lambda solve, start: torch.func.jvp(solve, (start,), (start,)),
    "vmap": lambda solve, start: torch.func.vmap(lambda x: solve(x[None]))(start),
    "jacrev": lambda solve, start: torch.func.jacrev(solve)(start),
    "jacfwd": lambda solve, start: torch.func.jacfwd(solve)(start),
}


@pytest.mark.parametrize("settings", [{}, ROUNDS], ids=str)
@pytest.mark.parametrize("transformed", TRANSFORMED)
def test_torch_func_is_refused(ddim, noise, bent, transformed, settings):
    network, start, schedule = bent().requires_grad_(False), noise(2, (6,), dtype=torch.float64), ddim(5)
    sampler, inverter = dq.DEQSampler(network, schedule, **settings), dq.DEQInverter(network, schedule)
    for solve in (lambda x: sampler.sample(x).sample, lambda x: inverter.invert(x).noise):
        with pytest.raises(NotImplementedError, match=r"torch\.func: expected a call outside"):
            TRANSFORMED[transformed](solve, start)
    assert sampler.sample(start).converged.all()


def test_unrolled_under_torch_func(ddim, noise, bent, apart):
    """Back-propagation is plain torch; what a schedule remembers afterwards is of use outside."""
    try:
        torch.func.grad(lambda x: x * x.new_ones(1).tolist()[0])(torch.ones(()))
    except RuntimeError:
        pytest.skip("this torch reads no numbers within torch.func")
    network, start = bent().requires_grad_(False), noise(2, (6,), dtype=torch.float64)
    sampler = dq.DEQSampler(network, ddim(5), gradient="unrolled", tol=1e-8)
    got = torch.func.grad(lambda x: sampler.sample(x).sample.sum())(start)
    leaf = start.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sampler.sample(leaf).sample.sum(), leaf)
    assert max(apart(got, expected)) < 1e-12
    assert sampler.sample(start).converged.all()
