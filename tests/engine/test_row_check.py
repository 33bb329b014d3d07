"""Models whose rows are not what they are alone: named before any work, or known as rounding."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import deqdiff_fast as dq
from deqdiff_fast.engine.row_check import LARGEST, MOST_SOLVES, RowRecord

PARALLEL = ["quasi-newton", "anderson", "picard"]


def first_timestep(model):
    """t[0] for all rows."""
    return lambda x, t: model(x, t[:1].expand_as(t))


def window_of_the_first(model):
    """A condition that is on or off for the whole batch, by the first row."""
    return lambda x, t: model(x, t) * (1.3 if t[0] > 500 else 1.0)


def batch_norm(model):
    """Statistics over the batch."""
    norm = nn.BatchNorm2d(3)
    return lambda x, t: norm(model(x, t))


def attention(model):
    """Rows that look at each other, as frames of one video do."""

    def attend(x, t):
        y = model(x, t)
        return y + 0.5 * y.mean(0, keepdim=True)

    return attend


def counting(model):
    """Every second call says something else."""
    calls = []

    def count(x, t):
        calls.append(1)
        return model(x, t) * (1.1 if len(calls) % 2 else 1.0)

    return count


def centred(model):
    """What is taken from the rows is the same at every timestep."""
    return lambda x, t: model(x, t) - 0.2 * x.mean(0, keepdim=True)


def normalised(model):
    """Their common size, whatever their signs."""
    return lambda x, t: model(x, t) / x.square().mean().sqrt()


BROKEN = [first_timestep, window_of_the_first, batch_norm, attention, counting, centred, normalised]


@pytest.mark.parametrize("solver", PARALLEL)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("broken", BROKEN)
def test_rows_that_are_not_independent_are_refused(mixture, ddim, noise, broken, batch, solver):
    sampler = dq.DEQSampler(broken(mixture()), ddim(20), solver=solver)
    with (
        pytest.raises(dq.ModelOutputError, match=r"not independent.*timestep \d+ \(sample \d\).*serial"),
        torch.no_grad(),
    ):
        sampler.sample(noise(batch))


def test_dropout_is_found(mixture, ddim, noise):
    drop, model = nn.Dropout(0.3), mixture()
    sampler = dq.DEQSampler(lambda x, t: drop(model(x, t)), ddim(20), solver="quasi-newton")
    with pytest.raises(dq.ModelOutputError, match=r"model\.eval"):
        sampler.sample(noise(1))
    drop.eval()
    assert sampler.sample(noise(1)).converged.all()


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: dq.guided(net, {}, {}, 2.0)])
def test_a_model_that_is_put_into_training_mode_between_two_solves(ddim, noise, wrap):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.3)

        def forward(self, x, t):
            return 0.5 * self.drop(x)

    net = Net().eval()
    sampler = dq.DEQSampler(wrap(net), ddim(20), solver="picard")
    for _ in range(2):  # the third one would not look again
        assert sampler.sample(noise(1)).converged.all()
    net.train()
    with pytest.raises(dq.ModelOutputError, match=r"model\.eval"):
        sampler.sample(noise(1))


def test_the_serial_chain_of_such_a_model_is_as_it_was(mixture, ddim, noise):
    model = first_timestep(mixture())
    assert dq.DEQSampler(model, ddim(20)).serial(noise(2)).converged.all()


def test_a_few_evaluations_in_a_few_solves(mixture, ddim, noise):
    model = mixture()
    sampler = dq.DEQSampler(model, ddim(12), solver="picard")
    looked = []
    for _ in range(9):
        model.rows = 0
        stats = sampler.sample(noise(2)).stats
        assert stats.model_evals == model.rows
        looked.append(stats.check_evals)
    assert [number for number, count in enumerate(looked, 1) if count] == [1, 2, 4, 8]
    assert max(looked) == (3 + 2) * 2


@pytest.mark.parametrize("room", [1, 3, 5])
def test_a_lack_of_memory_is_the_solves_own_affair(mixture, ddim, noise, relative_error, room):
    plain = mixture()

    def small(x, t):
        if len(x) > room:
            raise torch.OutOfMemoryError("out of memory")
        return plain(x, t)

    out = dq.DEQSampler(small, ddim(12), solver="picard").sample(noise(4))
    assert out.converged.all()
    assert relative_error(out.sample, dq.DEQSampler(plain, ddim(12)).serial(noise(4)).sample).max() < 1e-2


def test_what_is_recorded_is_on_the_chain(mixture, ddim, noise):
    model, recording = mixture(), dq.Recording()
    stats = dq.DEQSampler(model, ddim(12), solver="picard").record(recording).sample(noise(1)).stats
    assert stats.check_evals == 0
    assert stats.model_evals == model.rows


def test_looks_become_rare_and_do_not_end():
    record = RowRecord()
    due = [solve for solve in range(1, 200) if record.due()]
    assert due[:6] == [1, 2, 4, 8, 16, 32]
    assert due[6:] == list(range(2 * MOST_SOLVES, 200, MOST_SOLVES))


class Rounded:
    """A model whose predictions depend on the size of a batch by `size`, as TF32 or another convolution makes them."""

    def __init__(self, model, size):
        self.model, self.size = model, size

    def __call__(self, x, t):
        y = self.model(x, t)
        draw = torch.Generator().manual_seed(len(x))
        return y + self.size * y.norm() / y.numel() ** 0.5 * torch.randn(y.shape, generator=draw)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 5])
def test_rounding_is_not_refused_and_bounds_the_tolerance(mixture, ddim, noise, relative_error, caplog, seed):
    plain, x = mixture(), noise(1, seed=seed)
    sampler = dq.DEQSampler(Rounded(plain, 5e-4), ddim(50), solver="quasi-newton", tol=1e-4)
    with caplog.at_level(logging.WARNING, logger="deqdiff_fast"):
        found = [sampler.sample(x) for _ in range(2)]
    assert sum("out of reach" in record.message for record in caplog.records) == 1
    for one in found:
        assert one.stats.stop_reason == "rounding"
        assert not one.converged.any()
        assert one.stats.rounds <= 15
        assert one.stats.finished_serially == 0
        assert relative_error(one.sample, sampler.serial(x).sample).max() < 5e-3
    looser = dq.DEQSampler(Rounded(plain, 5e-4), ddim(50), solver="quasi-newton", tol=1e-2).sample(x)
    assert looser.converged.all()
    assert looser.stats.stop_reason == "converged"


@pytest.mark.parametrize("settings", [{"window": 6}, {"solver": "picard"}])
def test_rounding_ends_no_window_and_no_slow_solver_early(mixture, ddim, noise, relative_error, settings):
    """What they have made after as many rounds is far from a sample."""
    plain, x = mixture(), noise(1)
    sampler = dq.DEQSampler(Rounded(plain, 2e-4), ddim(100), tol=1e-5, **{"solver": "quasi-newton"} | settings)
    found = sampler.sample(x)
    assert found.stats.rounds > 15
    assert found.stats.stop_reason == "rounding"
    assert relative_error(found.sample, sampler.serial(x).sample).max() < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_honest_models_pass(mixture, ddim, noise, dtype):
    assert dq.DEQSampler(mixture(), ddim(20), solver="picard").sample(noise(2).to(dtype)).converged.all()
    assert LARGEST[torch.float32] > 1e-3


@pytest.mark.parametrize(("dtype", "reached"), [(torch.float32, False), (torch.float64, True)])
def test_a_tolerance_below_the_rounding_of_the_states(caplog, mixture, ddim, noise, dtype, reached):
    """The sample is as good as it can be, and is not called converged."""
    sampler = dq.DEQSampler(mixture(), ddim(20), solver="quasi-newton", tol=1e-9)
    with caplog.at_level(logging.WARNING):
        found = sampler.sample(noise(2).to(dtype))
    assert found.converged.tolist() == [reached] * 2
    assert (found.stats.stop_reason == "rounding") is not reached
    assert ("tol = 1.0e-09 is out of reach: the states are float32" in caplog.text) is not reached
    off = (found.sample - sampler.serial(noise(2).to(dtype)).sample).norm() / found.sample.norm()
    assert off < (1e-9 if reached else 1e-5)


@pytest.mark.parametrize(
    ("steps", "tol", "reached"), [(10, 1e-3, True), (10, 1e-4, False), (50, 2e-4, True), (50, 1e-4, False)]
)
def test_a_tolerance_below_what_a_chain_makes_of_rounding(noise, relative_error, steps, tol, reached):
    """Cosine betas begin where there is next to no signal: a predicted noise is multiplied by thousands there."""
    bar = torch.cos((torch.linspace(0, 1, 1001).double() + 0.008) / 1.008 * torch.pi / 2) ** 2
    alphas = (1 - (1 - bar[1:] / bar[:-1]).clamp_max(0.999)).cumprod(0)
    mean = torch.linspace(-0.6, 0.8, 48).view(3, 4, 4)

    def model(x, t):
        signal, sigma = (part.sqrt()[t.long()].view(-1, 1, 1, 1).to(x) for part in (alphas, 1 - alphas))
        level = 0.05 * signal**2 + sigma**2
        side = mean * ((x * mean).sum((1, 2, 3), keepdim=True) * signal / level).tanh()
        return (x - signal * (side + 0.05 * signal / level * (x - signal * side))) / sigma

    times = torch.arange(steps).flip(0) * (1000 // steps) + 1000 // steps - 1
    sampler = dq.DEQSampler(model, dq.Schedule.ddim(alphas, times), solver="quasi-newton", tol=tol)
    found = sampler.sample(noise(4, (3, 4, 4)))
    assert found.converged.tolist() == [reached] * 4
    assert found.stats.stop_reason == ("converged" if reached else "rounding")
    if reached:
        assert relative_error(found.sample, sampler.serial(noise(4, (3, 4, 4))).sample).max() < tol


def test_outputs_whose_batch_axis_lies_innermost(mixture, ddim, noise):
    def last(x, t):
        return mixture()(x, t).movedim(0, -1).contiguous().movedim(-1, 0)

    assert dq.DEQSampler(last, ddim(20), solver="quasi-newton").sample(noise(2)).converged.all()
