"""The tables against the formulas of the papers, and their identities."""

from __future__ import annotations

import math

import pytest
import torch

from deqdiff_fast.schedule import Schedule, timesteps

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
