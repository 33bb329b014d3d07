"""The serial chain: its steps are a hand-written loop's, operation for operation, and nothing is read on the way."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deqdiff_fast as dq
from deqdiff_fast.schedule.chain import draw_samples

READS = ("aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.equal.default", "aten.nonzero.default")
LOOKED_AT = {"return_trajectory": True}  # such a chain is made in the solver's memory


class Operations(TorchDispatchMode):
    """Counts operations by name, views left out."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def half(x, t):
    """A model of one operation."""
    return torch.tanh(x)


def counted(run):
    with Operations() as mode:
        run()
    return mode.found


def per_step(make, start, **more):
    """What ten more steps need, for each of them."""
    few, many = (counted(lambda n=n: dq.DEQSampler(half, make(n)).serial(start, **more)) for n in (10, 20))
    return {name: (many[name] - few[name]) / 10 for name in many if many[name] != few[name]}


def by_hand(schedule, model, x, frozen=None):
    """The recursion as the docstring of `Schedule` has it, in float64."""
    states, outputs, dtype, draws = [x.double()], [], x.dtype, iter(frozen if frozen is not None else ())
    for i, t in enumerate(schedule.timesteps):
        inputs = (schedule.input_scale[i] * states[-1]).to(dtype)
        outputs.append(model(inputs, t.expand(len(x))).double())
        new = sum(
            schedule.state_coef[i, lag] * states[i - lag] + schedule.model_coef[i, lag] * outputs[i - lag]
            for lag in range(min(schedule.lags, i + 1))
        )
        states.append(new + (schedule.noise_coef[i] * next(draws).double() if schedule.draws[i] else 0))
    return states


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("eta", "most"), [(0.0, 2), (1.0, 4)])
def test_a_step_is_what_a_loop_by_hand_does(ddim, noise, batch, eta, most):
    """x <- a x + b model(x), two operations beside the model's one; noise is drawn, scaled and added."""
    found = per_step(lambda steps: ddim(steps, eta), noise(batch), generator=torch.Generator())
    assert found.pop("aten.tanh.default") == 1
    if eta > 0:
        assert found.pop("aten.randn.generator") == 1
    assert sum(found.values()) <= most, found


def test_multistep_steps_copy_what_the_model_may_write_to(noise):
    found = per_step(lambda n: dq.Schedule.from_sigmas(torch.linspace(5, 0, n + 1), method="dpmpp_2m"), noise(1))
    assert found.pop("aten.tanh.default") == 1
    assert sum(found.values()) <= 7, "copies of input and output, a scale, two states and two outputs"


def test_no_number_is_read_on_the_way(ddim, noise):
    reads = [
        sum(counted(lambda n=n: dq.DEQSampler(half, ddim(n)).serial(noise(2)))[name] for name in READS)
        for n in (20, 60)
    ]
    assert reads[0] == reads[1]
    assert counted(lambda: torch.ones(1).item())[READS[0]] == 1, "the test must see reads"


def test_in_the_solvers_memory_it_is_looked_for_nan_now_and_then(ddim, noise):
    reads = [
        sum(counted(lambda n=n: dq.DEQSampler(half, ddim(n)).serial(noise(2), **LOOKED_AT))[name] for name in READS)
        for n in (20, 60)
    ]
    assert reads[1] - reads[0] <= 40 / 16 + 1


SCHEDULES = {
    "ddim": lambda ddim: ddim(23),
    "ddpm": lambda ddim: ddim(23, 1.0),
    "euler": lambda ddim: dq.Schedule.from_sigmas(torch.linspace(5, 0, 24), method="euler"),
    "multistep": lambda ddim: dq.Schedule.from_sigmas(torch.linspace(5, 0, 24), method="dpmpp_2m"),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("batch", [1, 3])
def test_it_is_the_recursion(ddim, noise, relative_error, kind, batch):
    schedule, start = SCHEDULES[kind](ddim), noise(batch)
    drawn = torch.Generator().manual_seed(3)
    frozen = [torch.randn(start.shape, generator=drawn) for _ in range(int(schedule.draws.sum()))]
    expected = by_hand(schedule, half, start, frozen)

    def run(**more):
        return dq.DEQSampler(half, schedule).serial(start, generator=torch.Generator().manual_seed(3), **more)

    plain, seen = run(), run(**LOOKED_AT)
    assert relative_error(plain.sample.double(), expected[-1]).max() < 1e-5
    assert torch.equal(plain.sample, seen.sample), "one step, written once"
    for state, exact in zip(seen.trajectory, expected, strict=True):
        assert relative_error(state.double(), exact).max() < 1e-5
    assert (plain.stats.model_evals, plain.stats.model_calls) == (23 * batch, 23)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_model_may_write_its_next_output_over_the_last(ddim, noise, kind):
    """As a recorded graph does, or an engine with outputs of its own."""
    schedule, buffer = SCHEDULES[kind](ddim), torch.empty_like(noise(2))

    def run(model):
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        chain = dq.DEQSampler(model, schedule).serial(noise(2), generator=generators[0]).sample
        return torch.stack([chain, draw_samples(model, schedule, noise(2), None, generators[1])])

    assert torch.equal(run(lambda x, t: torch.tanh(x, out=buffer)), run(half))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_model_may_write_to_all_that_it_is_given_and_keep_it(ddim, noise, kind):
    schedule, start, kept = SCHEDULES[kind](ddim), noise(2), []

    def rude(x, t, label):
        out = torch.tanh(x) + label[:, None, None, None]
        kept.append((x, x.clone(), t))
        assert bool((t == t[0]).all())
        t.zero_()
        return out

    def ruder(x, t, label):
        out = rude(x, t, label)
        x.fill_(7.0)
        kept.pop()
        return x.copy_(out)  # the output is the input's memory

    kwargs, own = {"label": torch.tensor([0.1, 0.2])}, start.clone()
    polite = dq.DEQSampler(lambda x, t, label: torch.tanh(x) + label[:, None, None, None], schedule)
    for more in ({}, LOOKED_AT):
        draw = [torch.Generator().manual_seed(5) for _ in range(3)]
        expected = polite.serial(start, kwargs, draw[0], **more).sample
        assert torch.equal(dq.DEQSampler(rude, schedule).serial(start, kwargs, draw[1], **more).sample, expected)
        assert torch.equal(dq.DEQSampler(ruder, schedule).serial(start, kwargs, draw[2], **more).sample, expected)
    assert torch.equal(start, own)
    assert all(torch.equal(x, copy) for x, copy, _ in kept), "what it keeps stays as it was"


def broken_at(times, value=torch.nan, complains=False):
    def model(x, t):
        if complains and not bool(x.isfinite().all()):
            raise ValueError("what a strange picture")
        bad = torch.isin(t, torch.tensor(times))[:, None, None, None]
        return torch.where(bad & (torch.arange(len(x)) > 0)[:, None, None, None], value, torch.tanh(x))

    return model


@pytest.mark.parametrize("more", [{}, LOOKED_AT, {"callback": lambda info: None}], ids=["plain", "kept", "callback"])
@pytest.mark.parametrize("complains", [False, True])
@pytest.mark.parametrize("step", [0, 15, 16, 19])
def test_the_first_nan_is_located(ddim, noise, more, complains, step):
    """Though it is looked for later on, and though the model complains of it first."""
    schedule = ddim(20)
    model = broken_at(schedule.timesteps[step:].tolist(), complains=complains)
    with pytest.raises(dq.NonFiniteError) as caught:
        dq.DEQSampler(model, schedule).serial(noise(2), **more)
    error = caught.value
    assert (error.step, error.round, error.timestep) == (step, step + 1, float(schedule.timesteps[step]))
    assert "sample 1" in str(error)


def test_no_callback_sees_nan(ddim, noise):
    seen = []
    with pytest.raises(dq.NonFiniteError, match="round 6"):
        dq.DEQSampler(broken_at(ddim(20).timesteps[5:].tolist()), ddim(20)).serial(
            noise(2), callback=lambda info: seen.append(bool(info.state(info.round).isfinite().all()))
        )
    assert seen == [True] * 5


def test_a_complaint_about_something_else_passes_through(ddim, noise):
    def model(x, t):
        raise ValueError("not about NaN")

    for more in ({}, LOOKED_AT):
        with pytest.raises(ValueError, match="not about NaN"):
            dq.DEQSampler(model, ddim(5)).serial(noise(2), **more)


def test_large_states_are_no_failure(ddim, noise):
    """Their sum overflows, they do not."""
    start = noise(2).clamp(0.5, 1.0) * 1e38
    out = dq.DEQSampler(
        lambda x, t: torch.zeros_like(x),
        dq.Schedule.from_sigmas(torch.tensor([1.0, 0.5, 0.0]), prediction_type="epsilon"),
    ).serial(start)
    assert torch.equal(out.sample, start)
    assert out.stats.model_calls == 2
