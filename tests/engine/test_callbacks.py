"""What a callback sees: every final state once it is final, serial steps included."""

from __future__ import annotations

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
