"""The samplers of k-diffusion as their papers and its documentation have them, written out in plain loops."""

from __future__ import annotations

import numpy as np
import torch


def ones(x, sigma):
    return sigma * x.new_ones(len(x))


def told(callback, x, i, sigma, sigma_hat, denoised):
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma_hat, "denoised": denoised})


def churned(x, sigma, count, s_churn):
    noise, wider = torch.randn_like(x), sigma * (1 + min(s_churn / count, 2**0.5 - 1))
    return x + noise * (wider**2 - sigma**2).clamp_min(0) ** 0.5, wider


def sample_heun(model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0):
    """Karras et al. 2022, algorithm 2."""
    for i in range(len(sigmas) - 1):
        x, sigma = churned(x, sigmas[i], len(sigmas) - 1, s_churn)
        denoised = model(x, ones(x, sigma), **(extra_args or {}))
        told(callback, x, i, sigmas[i], sigma, denoised)
        slope, step = (x - denoised) / sigma, sigmas[i + 1] - sigma
        if sigmas[i + 1] > 0:
            ahead = x + slope * step
            second = (ahead - model(ahead, ones(x, sigmas[i + 1]), **(extra_args or {}))) / sigmas[i + 1]
            slope = (slope + second) / 2
        x = x + slope * step
    return x


def sample_dpm_2(model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0):
    """DPM-Solver-2 (Lu et al. 2022, arXiv 2206.00927) over sigmas."""
    for i in range(len(sigmas) - 1):
        x, sigma = churned(x, sigmas[i], len(sigmas) - 1, s_churn)
        denoised = model(x, ones(x, sigma), **(extra_args or {}))
        told(callback, x, i, sigmas[i], sigma, denoised)
        slope = (x - denoised) / sigma
        if sigmas[i + 1] > 0:
            between = (sigma * sigmas[i + 1]) ** 0.5
            ahead = x + slope * (between - sigma)
            slope = (ahead - model(ahead, ones(x, between), **(extra_args or {}))) / between
        x = x + slope * (sigmas[i + 1] - sigma)
    return x


def sample_lms(model, x, sigmas, extra_args=None, callback=None, disable=None, order=4):
    """Adams-Bashforth over uneven sigmas: the integral of the polynomial through the last slopes."""
    levels, slopes = sigmas.double().cpu().numpy(), []
    for i in range(len(sigmas) - 1):
        denoised = model(x, ones(x, sigmas[i]), **(extra_args or {}))
        told(callback, x, i, sigmas[i], sigmas[i], denoised)
        slopes = [(x - denoised) / sigmas[i], *slopes][:order]
        points = levels[i - np.arange(len(slopes))]
        for j, slope in enumerate(slopes):
            others = np.delete(points, j)
            weight = np.polyint(np.atleast_1d(np.poly(others)) / np.prod(points[j] - others))
            x = x + float(np.polyval(weight, levels[i + 1]) - np.polyval(weight, levels[i])) * slope
    return x


def sample_euler_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None
):
    """Euler down to below the next sigma, and noise back up to it."""
    noise_sampler = noise_sampler or (lambda sigma, after: torch.randn_like(x))
    for i in range(len(sigmas) - 1):
        now, after = sigmas[i], sigmas[i + 1]
        denoised = model(x, ones(x, now), **(extra_args or {}))
        told(callback, x, i, now, now, denoised)
        up = torch.minimum(after, eta * (after**2 * (now**2 - after**2) / now**2) ** 0.5)
        x = x + (x - denoised) / now * ((after**2 - up**2) ** 0.5 - now)
        if after > 0:
            x = x + noise_sampler(now, after) * s_noise * up
    return x


def sample_dpmpp_2m_sde(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
    solver_type="midpoint",
):  # fmt: skip
    """SDE-DPM-Solver++(2M), Lu et al. 2022, arXiv 2211.01095."""
    noise_sampler = noise_sampler or (lambda sigma, after: torch.randn_like(x))
    before = last = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, ones(x, sigmas[i]), **(extra_args or {}))
        told(callback, x, i, sigmas[i], sigmas[i], denoised)
        if sigmas[i + 1] == 0:
            return denoised
        h = (sigmas[i] / sigmas[i + 1]).log()
        whole = h * (1 + eta)
        used = denoised
        share = -torch.expm1(-whole)
        weight = share / 2 if solver_type == "midpoint" else 1 - share / whole
        x = sigmas[i + 1] / sigmas[i] * torch.exp(-eta * h) * x + share * used
        if before is not None:
            x = x + weight * h / last * (denoised - before)
        if eta:
            size = sigmas[i + 1] * (-torch.expm1(-2 * eta * h)).sqrt() * s_noise
            x = x + noise_sampler(sigmas[i], sigmas[i + 1]) * size
        before, last = denoised, h
    return x


def sample_dpmpp_sde(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
    """Two noises a step, of which the second state does not see the first."""
    noise_sampler = noise_sampler or (lambda sigma, after: torch.randn_like(x))
    for i in range(len(sigmas) - 1):
        now, after = sigmas[i], sigmas[i + 1]
        denoised = model(x, ones(x, now), **(extra_args or {}))
        told(callback, x, i, now, now, denoised)
        if after == 0:
            return x + (x - denoised) / now * (after - now)
        between = (now * after) ** 0.5
        states = []
        for goal, kept in ((between, denoised), (after, None)):
            if kept is None:
                kept = model(states[0], ones(x, between), **(extra_args or {}))
            up = torch.minimum(goal, (goal**2 * (now**2 - goal**2) / now**2) ** 0.5)
            down = (goal**2 - up**2) ** 0.5
            states.append(down / now * x + (1 - down / now) * kept + noise_sampler(now, goal) * up)
        x = states[1]
    return x
