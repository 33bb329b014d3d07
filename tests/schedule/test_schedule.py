"""The tables against the formulas of the papers, their identities, and what the constructors refuse."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from deqdiff_fast import DEQSampler
from deqdiff_fast.schedule import Clip, Schedule, timesteps

ABAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
ZERO_SNR = torch.cat([ABAR[:-1], torch.zeros(1, dtype=torch.float64)])
KINDS = ("epsilon", "v_prediction", "sample")
SIGMAS = torch.cat([torch.linspace(math.log(14.6), math.log(0.03), 12, dtype=torch.float64).exp(), torch.zeros(1)])


def output_for(kind: str, x: torch.Tensor, x0: torch.Tensor, signal: float, sigma: float) -> torch.Tensor:
    """The raw model output that means the estimate x0 at the state x."""
    eps = (x - signal * x0) / sigma
    r = math.hypot(signal, sigma)
    return {"epsilon": eps, "sample": x0, "v_prediction": (signal * eps - sigma * x0) / r, "flow": eps - x0}[kind]


def estimate(x: torch.Tensor, i: int) -> torch.Tensor:
    """A nonlinear denoiser: some x0 that is not the true one."""
    return torch.tanh(0.7 * x + 0.1 * i)


def replay(schedule: Schedule, x: torch.Tensor, noises: torch.Tensor | None = None) -> torch.Tensor:
    states, outputs = [x], []
    for i in range(schedule.num_steps):
        args = (schedule.signal[i].item(), schedule.sigma[i].item())
        outputs.append(output_for(schedule.prediction_type, states[i], estimate(states[i], i), *args))
        new = torch.zeros_like(x) if noises is None else schedule.noise_coef[i] * noises[i]
        for lag in range(min(schedule.lags, i + 1)):
            new = new + schedule.state_coef[i, lag] * states[i - lag] + schedule.model_coef[i, lag] * outputs[i - lag]
        states.append(new)
    return states[-1]


@pytest.fixture
def start() -> torch.Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_ddim_is_equation_12_of_the_paper(kind, eta, start):
    steps = timesteps(1000, 20, "trailing")
    schedule = Schedule.ddim(ABAR, steps, eta=eta, prediction_type=kind, final_alpha_cumprod=ABAR[0].item())
    noises = torch.randn(20, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = start
    for i, t in enumerate(steps):
        now, after = ABAR[t], ABAR[steps[i + 1]] if i < 19 else ABAR[0]
        x0 = estimate(x, i)
        eps = (x - now.sqrt() * x0) / (1 - now).sqrt()
        s = eta * ((1 - after) / (1 - now)).sqrt() * (1 - now / after).sqrt()
        x = after.sqrt() * x0 + (1 - after - s**2).sqrt() * eps + s * noises[i]
    torch.testing.assert_close(replay(schedule, start, noises), x, rtol=1e-10, atol=1e-12)
    assert schedule.stochastic == (eta > 0)
    assert torch.equal(schedule.draws, schedule.noise_coef != 0)


@pytest.mark.parametrize("kind", KINDS)
def test_ddpm_is_equation_7_of_the_paper_at_every_step(kind, start):
    steps = timesteps(1000, 1000)
    betas = 1 - ABAR / torch.cat([torch.ones(1), ABAR[:-1]])
    noises = torch.randn(1000, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for variance in ("fixed_small", "fixed_large"):
        schedule = Schedule.ddpm(ABAR, steps, prediction_type=kind, variance=variance)
        x = start
        for i, t in enumerate(steps.tolist()):
            before = ABAR[t - 1] if t else torch.tensor(1.0, dtype=torch.float64)
            mean = before.sqrt() * betas[t] / (1 - ABAR[t]) * estimate(x, i)
            mean = mean + (1 - betas[t]).sqrt() * (1 - before) / (1 - ABAR[t]) * x
            added = betas[t] * (1 - before) / (1 - ABAR[t]) if variance == "fixed_small" else betas[t]
            x = mean + (added.sqrt() if t else 0) * noises[i]
        torch.testing.assert_close(replay(schedule, start, noises), x, rtol=1e-8, atol=1e-10)
        assert not schedule.draws[-1]


def test_ddpm_is_ddim_with_eta_one():
    steps = timesteps(1000, 30)
    a, b = Schedule.ddpm(ABAR, steps), Schedule.ddim(ABAR, steps, eta=1.0)
    for name in ("state_coef", "model_coef", "noise_coef"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("kind", [None, "epsilon", "v_prediction", "flow"])
def test_euler_is_the_ode_step(kind, flow, start):
    sigmas = torch.linspace(0.98, 0, 11, dtype=torch.float64) if flow else SIGMAS
    schedule = Schedule.from_sigmas(sigmas, prediction_type=kind, flow=flow)
    x = start * schedule.init_noise_sigma
    for i, sigma in enumerate(sigmas[:-1]):
        x0 = estimate(x, i)
        slope = (x - x0) / sigma  # dx/dsigma on both paths: eps, and eps - x0 with eps = (x - (1 - sigma) x0) / sigma
        x = x + slope * (sigmas[i + 1] - sigma)
    got = replay(schedule, start * schedule.init_noise_sigma)
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-11)
    assert schedule.prediction_type == (kind or ("flow" if flow else "sample"))


def test_euler_of_a_flow_that_starts_at_pure_noise():
    schedule = Schedule.from_sigmas(torch.linspace(1, 0, 11), flow=True)
    torch.testing.assert_close(schedule.state_coef, torch.ones(10, 1, dtype=torch.float64))
    torch.testing.assert_close(schedule.model_coef, torch.full((10, 1), -0.1, dtype=torch.float64), atol=1e-7, rtol=0)
    torch.testing.assert_close(schedule.timesteps, 1000 * schedule.sigma[:-1])
    assert schedule.init_noise_sigma == 1


@pytest.mark.parametrize("kind", [None, "epsilon", "v_prediction"])
def test_dpmpp_2m_is_k_diffusions(kind, start):
    schedule = Schedule.from_sigmas(SIGMAS, method="dpmpp_2m", prediction_type=kind)
    x, old = start * SIGMAS[0], None
    for i in range(len(SIGMAS) - 1):  # sample_dpmpp_2m of k-diffusion, line by line
        denoised = estimate(x, i)
        t, t_next = -SIGMAS[i].log(), -SIGMAS[i + 1].log()
        h = t_next - t
        if old is None or SIGMAS[i + 1] == 0:
            x = (SIGMAS[i + 1] / SIGMAS[i]) * x - (-h).expm1() * denoised
        else:
            r = (t - (-SIGMAS[i - 1].log())) / h
            x = (SIGMAS[i + 1] / SIGMAS[i]) * x - (-h).expm1() * ((1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old)
        old = denoised
    assert schedule.lags == 2
    torch.testing.assert_close(replay(schedule, start * SIGMAS[0]), x, rtol=1e-9, atol=1e-11)
    scaled = kind is not None
    expected = (SIGMAS[:-1] ** 2 + 1).rsqrt() if scaled else torch.ones(12, dtype=torch.float64)
    torch.testing.assert_close(schedule.input_scale, expected)
    torch.testing.assert_close(schedule.timesteps, SIGMAS[:-1])
    assert schedule.init_noise_sigma == pytest.approx(14.6)


def test_dpmpp_2m_is_second_order_and_euler_first():
    def error(method: str, n: int, flow: bool) -> float:
        """Gaussian data of standard deviation 1/2, whose exact path is x proportional to its standard deviation."""
        sigmas = torch.linspace(0.9, 0.2, n + 1, dtype=torch.float64) if flow else \
            torch.linspace(math.log(10), math.log(0.2), n + 1, dtype=torch.float64).exp()  # fmt: skip
        schedule = Schedule.from_sigmas(sigmas, method=method, flow=flow, prediction_type="sample")
        deviation = (schedule.signal**2 / 4 + schedule.sigma**2).sqrt()
        states = [deviation[0]]
        outputs = []
        for i in range(n):
            outputs.append(schedule.signal[i] / 4 / deviation[i] ** 2 * states[i])
            states.append(sum(schedule.state_coef[i, k] * states[i - k] + schedule.model_coef[i, k] * outputs[i - k]
                              for k in range(min(schedule.lags, i + 1))))  # fmt: skip
        return float((states[-1] - deviation[-1]).abs())

    for flow in (False, True):
        assert 1.8 < error("euler", 100, flow) / error("euler", 200, flow) < 2.2
        assert 3.7 < error("dpmpp_2m", 400, flow) / error("dpmpp_2m", 800, flow) < 4.5


def every_schedule() -> list[Schedule]:
    out = [Schedule.from_sigmas(SIGMAS, m, prediction_type=k) for m in ("euler", "dpmpp_2m") for k in (*KINDS, "flow")]
    out += [Schedule.from_sigmas(torch.linspace(1, 0, 8), m, flow=True) for m in ("euler", "dpmpp_2m")]
    for n in (1, 2, 50, 1000):
        for spacing in ("leading", "trailing", "linspace", "quad"):
            steps = timesteps(1000, n, spacing)
            out += [Schedule.ddim(ABAR, steps, eta, prediction_type=k) for k in KINDS for eta in (0, 0.5, 1)]
            out += [Schedule.ddpm(ABAR, steps, prediction_type=k) for k in KINDS]
    out += [
        Schedule.ddim(ZERO_SNR, timesteps(1000, 10, "trailing"), e, prediction_type=k)
        for k in KINDS[1:]
        for e in (0, 1)
    ]
    return out


def test_a_single_data_point_stays_on_its_path_and_keeps_its_variance():
    schedules = every_schedule()
    assert max(float(s.path_error().max()) for s in schedules) < 1e-9
    steps = timesteps(1000, 50)
    wide = Schedule.ddpm(ABAR, steps, variance="fixed_large").path_error()
    assert wide[:-1].min() > 1e-6  # fixed_large adds more noise than the marginals have, and the check sees it
    off = Schedule.ddim(ABAR, steps)
    moved = Schedule(off.timesteps, off.input_scale, off.state_coef * 1.001, off.model_coef, off.noise_coef, off.signal,
                     off.sigma)  # fmt: skip
    assert moved.path_error().min() > 1e-4


@pytest.mark.parametrize("variance", [0.25, 1.0, 3.0])
def test_slope_is_the_regression_of_the_output_on_the_state(variance):
    schedules = [Schedule.ddim(ABAR, timesteps(1000, 10), prediction_type=k) for k in KINDS]
    schedules += [Schedule.from_sigmas(SIGMAS, prediction_type=k) for k in (*KINDS, "flow")]
    schedules += [Schedule.from_sigmas(torch.linspace(1, 0, 8), flow=True)]
    draw = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 400_000, generator=draw, dtype=torch.float64) * torch.tensor([[variance**0.5], [1.0]])
    for schedule in schedules:
        signal, sigma = schedule.signal[:-1, None], schedule.sigma[:-1, None]
        for i in (0, schedule.num_steps // 2, schedule.num_steps - 1):
            x = signal[i] * x0 + sigma[i] * eps
            r = torch.hypot(signal[i], sigma[i])
            o = {"epsilon": eps, "sample": x0, "flow": eps - x0, "v_prediction": (signal[i] * eps - sigma[i] * x0) / r}
            o = o[schedule.prediction_type]
            measured = (o * x).sum() / x.square().sum()
            unit = float((o.square().mean() / x.square().mean()).sqrt())
            assert schedule.slope(variance)[i].item() == pytest.approx(measured.item(), abs=0.01 * unit)
            p, q = schedule.denoised_coef()[i]
            torch.testing.assert_close(p * x + q * o, x0, rtol=1e-7, atol=1e-7)


def test_a_signal_that_is_almost_zero():
    abar = torch.cat([ABAR[:-1], torch.tensor([1e-20], dtype=torch.float64)])
    for kind in KINDS:
        assert Schedule.ddim(abar, timesteps(1000, 10, "trailing"), prediction_type=kind).state_coef.isfinite().all()


def test_spacings():
    assert timesteps(1000, 4).tolist() == [750, 500, 250, 0]
    assert timesteps(1000, 4, "trailing").tolist() == [999, 749, 499, 249]
    assert timesteps(1000, 4, "linspace").tolist() == [999, 666, 333, 0]
    assert timesteps(1000, 4, "quad").tolist() == [800, 355, 88, 0]
    for spacing in ("leading", "trailing", "linspace", "quad"):
        full = timesteps(1000, 1000, spacing)
        assert full.dtype == torch.int64
        assert full.shape == (1000,)
        assert (full.diff() <= 0).all()
    diffusers = pytest.importorskip("diffusers")
    for spacing in ("leading", "trailing", "linspace"):
        for n in (1, 7, 50, 333, 1000):
            scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
            scheduler.set_timesteps(n)
            assert torch.equal(timesteps(1000, n, spacing), scheduler.timesteps), (spacing, n)


def test_a_repeated_timestep_is_a_step_that_does_nothing():
    schedule = Schedule.ddim(ABAR, [500, 500, 100], eta=1.0)
    assert schedule.state_coef[0, 0].item() == pytest.approx(1)
    assert schedule.model_coef[0, 0].item() == pytest.approx(0, abs=1e-15)
    assert schedule.noise_coef[0] == 0


def test_the_tables_are_private_copies():
    abar, steps = ABAR.clone(), timesteps(1000, 10)
    schedule = Schedule.ddim(abar, steps)
    steps += 1
    abar.zero_()
    assert torch.equal(schedule.timesteps, timesteps(1000, 10))
    gain = torch.ones(10)
    fields = {name: getattr(schedule, name) for name in ("timesteps", "input_scale", "state_coef", "model_coef",
                                                         "noise_coef", "signal", "sigma")}  # fmt: skip
    clipped = Schedule(**fields, clip=Clip(1.0, gain))
    gain.zero_()
    assert (clipped.clip.gain == 1).all()
    assert clipped.state_coef.data_ptr() != schedule.state_coef.data_ptr()
    with pytest.raises(AttributeError):
        clipped.name = "other"
    for name in ("input_scale", "state_coef", "model_coef", "noise_coef", "signal", "sigma"):
        assert getattr(schedule, name).dtype == torch.float64
    assert Schedule(**fields | {"timesteps": torch.rand(10)}).timesteps.dtype == torch.float64


BAD_DDIM = [
    ({"alphas_cumprod": [[0.5]]}, "alphas_cumprod"),
    ({"alphas_cumprod": [0.9, float("nan")]}, "alphas_cumprod"),
    ({"alphas_cumprod": [1.0, 0.5]}, "alphas_cumprod"),
    ({"alphas_cumprod": [0.9, -0.5]}, "alphas_cumprod"),
    ({"alphas_cumprod": [0.5, 0.9]}, "alphas_cumprod"),
    ({"alphas_cumprod": [0.9, 0.0]}, "zero terminal"),
    ({"timesteps": []}, "timesteps"),
    ({"timesteps": [0, 1]}, "descending"),
    ({"timesteps": [2, 0]}, "timesteps"),
    ({"timesteps": [1, -1]}, "timesteps"),
    ({"timesteps": [0.5]}, "integers"),
    ({"eta": -0.1}, "eta"),
    ({"eta": float("nan")}, "eta"),
    ({"eta": 40.0}, "eta"),
    ({"final_alpha_cumprod": 0.0}, "final_alpha_cumprod"),
    ({"final_alpha_cumprod": 1.5}, "final_alpha_cumprod"),
    ({"prediction_type": "flow"}, "prediction_type"),
    ({"prediction_type": "eps"}, "prediction_type"),
]


@pytest.mark.parametrize(("change", "named"), BAD_DDIM)
def test_bad_arguments_are_named(change, named):
    good = {"alphas_cumprod": [0.9, 0.5], "timesteps": [1, 0]}
    Schedule.ddim(**good)
    with pytest.raises(ValueError, match=named):
        Schedule.ddim(**good | change)
    if "eta" not in change:
        with pytest.raises(ValueError, match=named):
            Schedule.ddpm(**good | change)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (([1.0],), "sigmas"),
        (([1.0, 2.0],), "sigmas"),
        (([1.0, 1.0, 0.0],), "sigmas"),
        (([1.0, -0.1],), "sigmas"),
        (([float("inf"), 0.0],), "sigmas"),
        (([2.0, 0.0], "heun"), "method"),
    ],
)
def test_bad_sigmas_are_named(args, named):
    with pytest.raises(ValueError, match=named):
        Schedule.from_sigmas(*args)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="1 to 0"):
        Schedule.from_sigmas([2.0, 0.0], flow=True)
    with pytest.raises(ValueError, match="epsilon"):
        Schedule.from_sigmas([1.0, 0.0], flow=True, prediction_type="epsilon")
    with pytest.raises(ValueError, match="input_scale"):
        Schedule.from_sigmas([2.0, 1.0, 0.0], input_scale=[1.0])
    with pytest.raises(ValueError, match="input_scale"):
        Schedule.from_sigmas([2.0, 1.0, 0.0], timesteps=[1.0])
    with pytest.raises(ValueError, match="spacing"):
        timesteps(1000, 10, "even")
    for n in (0, 1001):
        with pytest.raises(ValueError, match="n: expected"):
            timesteps(1000, n)
    with pytest.raises(ValueError, match="variance"):
        Schedule.ddpm(ABAR, [1, 0], variance="learned")
    with pytest.raises(ValueError, match="variance"):
        Schedule.ddim(ABAR, [1, 0]).slope(-1.0)
    with pytest.raises(TypeError):
        Schedule.ddim(ABAR, [1, 0], etta=1.0)


BAD_TABLES = [
    ({"state_coef": torch.ones(3)}, "state_coef"),
    ({"state_coef": torch.ones(3, 0), "model_coef": torch.ones(3, 0)}, "lag"),
    ({"model_coef": torch.ones(3, 2)}, "model_coef"),
    ({"state_coef": torch.ones(3, 2), "model_coef": torch.zeros(3, 2)}, "i - l < 0"),
    ({"state_coef": torch.tensor([[1.0], [float("nan")], [1.0]])}, "state_coef.*finite"),
    ({"noise_coef": torch.ones(2)}, "noise_coef"),
    ({"signal": torch.ones(3)}, "signal"),
    ({"sigma": -torch.ones(4)}, "sigma"),
    ({"signal": torch.zeros(4), "sigma": torch.zeros(4)}, "signal"),
    ({"input_scale": torch.ones(3, 1)}, "input_scale"),
    ({"timesteps": torch.tensor([3.0, 2.0, float("inf")])}, "timesteps"),
    ({"noise_coef": torch.ones(3), "draws": torch.tensor([True, False, True])}, "draws"),
    ({"init_noise_sigma": 0.0}, "init_noise_sigma"),
    ({"x0_coef": torch.ones(3)}, "x0_coef"),
    ({"prediction_type": "noise"}, "prediction_type"),
    ({"clip": Clip(1.0, torch.ones(2))}, "clip.gain"),
]


@pytest.mark.parametrize(("change", "named"), BAD_TABLES)
def test_bad_tables_are_named(change, named):
    good = {"timesteps": torch.tensor([2, 1, 0]), "input_scale": torch.ones(3), "state_coef": torch.ones(3, 1),
            "model_coef": torch.ones(3, 1), "noise_coef": torch.zeros(3), "signal": torch.ones(4),
            "sigma": torch.ones(4)}  # fmt: skip
    Schedule(**good)
    with pytest.raises(ValueError, match=named):
        Schedule(**good | change)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="range"):
            Clip(bad, torch.ones(3))


def without_noise() -> Schedule:
    """A chain whose scheduler draws at every step, for coefficients that are zero."""
    given = Schedule.ddim(ABAR, [900, 500, 100])
    return dataclasses.replace(given, draws=torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("way", ["sample", "serial", "unrolled"])
@pytest.mark.parametrize("several", [False, True])
def test_a_generator_ends_where_the_scheduler_would_have_left_it(noise, way, several):
    """Draws that count for nothing are made all the same; without a generator none are."""
    start = noise(2, (4,)).requires_grad_(way == "unrolled")
    sampler = DEQSampler(lambda x, t: 0.1 * x, without_noise(), gradient="unrolled")
    solve = sampler.serial if way == "serial" else sampler.sample
    given = [torch.Generator().manual_seed(k) for k in range(2)] if several else [torch.Generator().manual_seed(0)]
    solve(start, None, given if several else given[0])
    for seed, generator in enumerate(given):
        own = torch.Generator().manual_seed(seed)
        for _ in range(3):
            torch.randn(1 if several else 2, 4, generator=own)
        assert torch.equal(own.get_state(), generator.get_state())
    before = torch.get_rng_state()
    solve(start)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, lambda values: [torch.tensor(v, dtype=torch.float64) for v in values]]
)
def test_plain_numbers_keep_all_of_their_digits(kind):
    """torch makes float32 of a list of floats, which is not what tolerances below 1e-7 are asked of."""
    sigmas, alphas = [0.9, 0.7, 1 / 3, 0.1, 0.0], [0.99, 0.9, 2 / 3, 0.1]
    exact = Schedule.from_sigmas(torch.tensor(sigmas, dtype=torch.float64), flow=True)
    given = Schedule.from_sigmas(kind(sigmas), flow=True)
    tables = [
        (given, exact),
        (Schedule.ddim(kind(alphas), [3, 2, 0]), Schedule.ddim(torch.tensor(alphas, dtype=torch.float64), [3, 2, 0])),
    ]
    own = {"timesteps": kind([0.3, 0.1]), "input_scale": kind([1.0, 0.7]), "state_coef": kind([[0.9], [0.3]]),
           "model_coef": kind([[0.1], [1 / 3]]), "noise_coef": kind([0.1, 0.0]), "signal": kind([0.1, 0.3, 1.0]),
           "sigma": kind([1.0, 0.7, 0.1])} if kind in (list, tuple, np.array) else {}  # fmt: skip
    if own:
        wide = {name: torch.tensor(np.array(value, dtype=np.float64)) for name, value in own.items()}
        tables.append((Schedule(**own), Schedule(**wide)))
    for found, wanted in tables:
        for name in ("timesteps", "input_scale", "state_coef", "model_coef", "noise_coef", "signal", "sigma"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name
