"""What a callback sees: every final state once it is final, serial steps included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import deqdiff_fast as dq


@pytest.mark.parametrize("window", ["auto", 8])
@pytest.mark.parametrize("max_rounds", [None, 3], ids=["converges", "finished-serially"])
def test_callback_sees_every_final_state(mixture, ddim, noise, relative_error, window, max_rounds):
    model, schedule, states, clean = mixture(prediction="sample"), ddim(20, prediction_type="sample"), {}, {}

    def callback(info):
        for i in range(len(clean), int(info.front.min())):
            states[i], clean[i] = info.state(i), info.denoised(i)
        with pytest.raises(IndexError, match="step: expected a number from 0 to 19, got 20"):
            info.denoised(20)

    sampler = dq.DEQSampler(model, schedule, solver="quasi-newton", window=window, max_rounds=max_rounds, tol=1e-5)
    out = sampler.sample(noise(2), callback=callback, return_trajectory=True)
    assert list(states) == list(range(20))
    for i, t in enumerate(schedule.timesteps.tolist()):
        assert torch.equal(states[i], out.trajectory[i])
        expected = model(states[i], torch.full((2,), t))
        assert relative_error(clean[i], expected).max() < 1e-4


def test_callback_stops_a_serial_finish(mixture, ddim, noise):
    sampler = dq.DEQSampler(mixture(), ddim(20), solver="quasi-newton", max_rounds=2, tol=1e-6)
    rounds = []
    out = sampler.sample(noise(2), callback=lambda info: rounds.append(info.round) or info.round == 5)
    assert rounds == [1, 2, 3, 4, 5]
    assert out.stats.stop_reason == "callback"
    assert out.stats.finished_serially == 3
    assert not out.converged.any()


TRUE = [True, np.True_, np.array(True), torch.tensor(True), torch.tensor([True])]
NOT_TRUE = [None, False, np.False_, torch.tensor(False), 1, "stop", torch.ones(2), np.ones(2)]


@pytest.mark.parametrize("solver", ["quasi-newton", "parareal", "auto"])
@pytest.mark.parametrize("answer", TRUE, ids=[repr(value) for value in TRUE])
def test_any_true_stops(mixture, ddim, noise, solver, answer):
    sampler = dq.DEQSampler(mixture(), ddim(10), solver=solver, tol=1e-6)
    assert sampler.sample(noise(1), callback=lambda info: answer).stats.stop_reason == "callback"
    assert sampler.serial(noise(1), callback=lambda info: answer).stats.stop_reason == "callback"


def test_any_true_stops_an_inversion_and_an_unrolled_solve(mixture, ddim, noise):
    image = noise(1).clamp(-1, 1)
    inverted = dq.DEQInverter(mixture(), ddim(10)).invert(image, callback=lambda info: torch.tensor(True))
    assert inverted.stats.stop_reason == "callback"
    sampler = dq.DEQSampler(lambda x, t: 0.1 * x, ddim(10), gradient="unrolled", tol=1e-6)
    out = sampler.sample(noise(1).requires_grad_(), callback=lambda info: np.True_)
    assert out.stats.stop_reason == "callback"
    assert out.stats.rounds == 1


@pytest.mark.parametrize("answer", NOT_TRUE, ids=[repr(value) for value in NOT_TRUE])
def test_nothing_else_does(mixture, ddim, noise, answer):
    sampler = dq.DEQSampler(mixture(), ddim(6), solver="quasi-newton")
    assert sampler.sample(noise(1), callback=lambda info: answer).stats.stop_reason == "converged"


@pytest.mark.parametrize("answer", [torch.tensor([True, False]), np.array([True, True])])
def test_several_bools_are_no_answer(mixture, ddim, noise, answer):
    sampler = dq.DEQSampler(mixture(), ddim(6), solver="quasi-newton")
    with pytest.raises(ValueError, match=r"callback: expected it to return True to stop, got bools of shape \(2,\)"):
        sampler.sample(noise(1), callback=lambda info: answer)
