"""Schedule.from_diffusers against the serial loop of diffusers, for every scheduler that diffusers exports."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from unittest import mock

import pytest
import torch
from scheduler_cases import BETAS, CASES, DEFAULT, LATER, MUST_ACCEPT, OPTIONAL

diffusers = pytest.importorskip("diffusers")

from deqdiff_fast.errors import NotAffineError  # noqa: E402
from deqdiff_fast.schedule import Schedule  # noqa: E402
from deqdiff_fast.schedule.from_diffusers import REFUSED, scheduler_fields  # noqa: E402
from deqdiff_fast.schedule.probe import StepRange  # noqa: E402

diffusers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")
SHAPE = (2, 3, 6, 6)

# of some versions it does not draw with the generator that it is given, which nothing can be compared with
if "randn_like" in inspect.getsource(diffusers.FlowMatchEulerDiscreteScheduler.step):
    CASES["FlowMatchEulerDiscreteScheduler"].remove({"stochastic_sampling": True})
NAMES = sorted(n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax"))


def make(name: str, options: dict):
    """(scheduler, keyword arguments of from_diffusers) from mixed options: what __init__ does not know is passed on."""
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])
    cls = getattr(diffusers, name)
    known = cls._get_init_keys(cls) if hasattr(cls, "_get_init_keys") else set()
    config = {k: v for k, v in options.items() if k in known}
    if {"beta_schedule", "beta_start"} <= set(known):
        config = BETAS | config
    scheduler = cls(**config) if known else cls.__new__(cls)  # classes without a configuration are placeholders
    return scheduler, {k: v for k, v in options.items() if k not in known}


def cases(name: str) -> list[dict]:
    """The options to try with a class, but for those that this version of diffusers came before."""
    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    return [case for case in CASES.get(name, DEFAULT) if not (case.keys() & LATER) - known.keys()]


def toy_model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Nonlinear, time dependent, mixes pixels and channels."""
    phase = torch.as_tensor(t, dtype=x.dtype) / 300
    mixed = 0.8 * x + 0.3 * x.roll(1, 1) - 0.4 * x.roll((1, 2), (2, 3))
    return torch.tanh(mixed + 0.1 * torch.sin(phase)) * (0.9 + 0.1 * torch.cos(phase))


def diffusers_loop(scheduler, count, options: dict, noise, seed: int, dtype=torch.float32) -> torch.Tensor:
    """The loop of a diffusers pipeline."""
    name, generator = type(scheduler).__name__, torch.Generator().manual_seed(seed)
    step_names = inspect.signature(scheduler.step).parameters
    step_options = {k: v for k, v in options.items() if k in step_names and k != "timesteps"}
    set_options = {k: v for k, v in options.items() if k not in step_options}
    scheduler.set_timesteps(**({} if is_custom(options) else {"num_inference_steps": count}), **set_options)
    if "generator" in step_names:
        step_options["generator"] = generator
    x = noise.to(dtype) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    steps = scheduler.timesteps[:-1] if name in ("SCMScheduler", "DDPMWuerstchenScheduler") else scheduler.timesteps
    for i, t in enumerate(steps):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        if name == "UnCLIPScheduler":
            step_options["prev_timestep"] = steps[i + 1] if i + 1 < len(steps) else None
        when = t.expand(len(x)) if name == "DDPMWuerstchenScheduler" else t
        x = scheduler.step(toy_model(seen, t), when, x, return_dict=False, **step_options)[0].to(dtype)
    return x


def replay(schedule: Schedule, noise: torch.Tensor, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The chain from the tables alone; noise is drawn in float32 as diffusers does."""
    generator = torch.Generator().manual_seed(seed)
    states, outputs = [(noise * schedule.init_noise_sigma).to(dtype)], []
    pq, clip = schedule.denoised_coef().to(dtype), schedule.clip
    state_coef, model_coef = schedule.state_coef.to(dtype), schedule.model_coef.to(dtype)
    for i, t in enumerate(schedule.timesteps):
        output = toy_model(schedule.input_scale[i].to(dtype) * states[i], t)
        if clip is not None:
            x0 = pq[i, 0] * states[i] + pq[i, 1] * output
            output = output + clip.gain[i].to(dtype) * (x0.clamp(-clip.range, clip.range) - x0)
        outputs.append(output)
        x = sum(
            state_coef[i, lag] * states[i - lag] + model_coef[i, lag] * outputs[i - lag]
            for lag in range(min(schedule.lags, i + 1))
        )
        if schedule.draws[i]:
            z = torch.randn(noise.shape, generator=generator, dtype=torch.float32)
            x = x + schedule.noise_coef[i].to(dtype) * z.to(dtype)
        states.append(x)
    return states[-1]


@contextlib.contextmanager
def float32_noise():
    """Noise of the float32 stream, whatever precision the loop runs in."""
    with mock.patch.object(torch, "randn", side_effect=lambda *a, dtype=None, **k: RANDN(*a, **k).to(dtype or NARROW)):
        yield


RANDN, NARROW = torch.randn, torch.float32


def difference(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def is_custom(options: dict) -> bool:
    return any(options.get(key) is not None for key in ("timesteps", "sigmas"))


def parity(name: str, options: dict, count: int) -> float:
    """Relative L2 error of our tables, replayed in float64 and in float32, against diffusers' own float32 loop."""
    scheduler, kwargs = make(name, options)
    schedule = Schedule.from_diffusers(scheduler, None if is_custom(kwargs) else count, **kwargs)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    expected = diffusers_loop(copy.deepcopy(scheduler), count, kwargs, noise, seed=11)
    assert torch.isfinite(expected).all()
    assert expected.norm() > 0
    wide, narrow = (difference(replay(schedule, noise, 11, d), expected) for d in (torch.float64, torch.float32))
    bound = 1e-5
    if wide > bound:  # a few chains amplify diffusers' own float32 rounding; its float64 loop says by how much
        with float32_noise():
            exact = diffusers_loop(copy.deepcopy(scheduler), count, kwargs, noise, seed=11, dtype=torch.float64)
        bound = 2 * difference(expected, exact)
        assert difference(replay(schedule, noise, 11), exact) < 1e-6, (options, count)
    assert wide <= bound, (options, count, wide, bound)
    assert narrow <= max(bound, FLOAT32_BOUND.get(name, 0.0)), (options, count, narrow)
    return max(wide, narrow)


# Starts at alphas_cumprod = 2.4e-9 with clipping: x0 = (x - eps) / 5e-5 loses four of float32's seven digits.
FLOAT32_BOUND = {"UnCLIPScheduler": 1e-3}


def outcome(name: str, options: dict, count: int) -> float | NotAffineError:
    try:
        return parity(name, options, count)
    except NotAffineError as refusal:
        return refusal


@pytest.mark.parametrize("name", NAMES)
def test_every_exported_scheduler_agrees_or_is_refused_with_a_reason(name, record_property):
    tried = itertools.product(cases(name), (5, 20))
    results = {f"{options}, {count} steps": outcome(name, options, count) for options, count in tried}
    refusals = {case: str(result) for case, result in results.items() if isinstance(result, NotAffineError)}
    if name in REFUSED:
        assert refusals.keys() == results.keys()
        assert all(name in text and REFUSED[name] in text for text in refusals.values())
        record_property("refused", REFUSED[name])
    else:  # also a class that a newer diffusers adds: a refusal there is a decision to take, and to write down
        assert not refusals
        record_property("largest_relative_error", max(results.values()))


def test_the_refused_schedulers_are_known_and_the_required_ones_exist():
    assert not MUST_ACCEPT & REFUSED.keys()
    assert set(NAMES) >= MUST_ACCEPT


@pytest.mark.parametrize("name", sorted(MUST_ACCEPT - {"PNDMScheduler"}))  # PNDM itself needs four steps
@pytest.mark.parametrize("count", [1, 2, 3])
def test_very_short_chains(name, count):
    assert parity(name, {}, count) < 1e-4


def test_a_thousand_steps():
    assert parity("DDPMScheduler", {}, 1000) < 1e-5


def test_noise_levels_are_those_of_the_schedulers_own_add_noise():
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
                 "KDPM2DiscreteScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"):  # fmt: skip
        scheduler, _ = make(name, {"clip_sample": False} if name == "DDIMScheduler" else {})
        schedule = Schedule.from_diffusers(scheduler, 10)
        scheduler.set_timesteps(10)
        one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        for i in range(0, schedule.num_steps, 3):
            t = scheduler.timesteps[i : i + 1]
            if name == "KDPM2DiscreteScheduler" and i % 2:
                continue  # the second call lies between two table entries, which add_noise does not know
            signal, sigma = (float(scheduler.add_noise(a, b, t)) for a, b in ((one, zero), (zero, one)))
            assert schedule.signal[i].item() == pytest.approx(signal, rel=1e-5), (name, i)
            assert schedule.sigma[i].item() == pytest.approx(sigma, rel=1e-5), (name, i)
        assert schedule.path_error().max() < 1e-5


@pytest.mark.parametrize("name", sorted({*MUST_ACCEPT, "UniPCMultistepScheduler", "TCDScheduler"}))
def test_part_of_a_chain_as_image_to_image_runs_it(name):
    """From the fifth timestep on, and without the last two: what the scheduler does when called for these only."""
    scheduler, _ = make(name, {"skip_prk_steps": True} if name == "PNDMScheduler" else {})
    scheduler.set_timesteps(12)
    start, stop = 4 * scheduler.order, 10 * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    schedule = Schedule(**scheduler_fields(scheduler, None, step_range=StepRange(start, stop)))
    assert torch.equal(schedule.timesteps, scheduler.timesteps[start:stop].to(schedule.timesteps.dtype))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    x, generator = noise * schedule.init_noise_sigma, torch.Generator().manual_seed(11)
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps[start:stop]:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(toy_model(seen, t), t, x, return_dict=False, **extra)[0]
    assert difference(replay(schedule, noise, 11), x) < 1e-5
    if name not in ("LMSDiscreteScheduler", "PNDMScheduler"):  # their own start in the middle leaves the path
        known = slice(None, -1) if name.startswith("KDPM2") else slice(None)  # its sigmas are not its calls' levels
        assert schedule.path_error()[known].max() < 1e-4
