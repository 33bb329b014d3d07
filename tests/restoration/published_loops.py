"""Restoration as in the papers, one step after the other, on whole states: what the restorer is compared with.

Every operator is a dense matrix here, with its own singular value decomposition.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deqdiff_fast import Schedule
from deqdiff_fast.operators import Operator


def dense(operator: Operator, shape: tuple[int, ...]) -> Tensor:
    """The matrix (m, n) of an operator for images of that shape, float64."""
    unit = torch.eye(torch.Size(shape).numel(), dtype=torch.float64)
    return operator.A(unit.view(-1, *shape)).flatten(1).T


class Loop:
    """One chain: x' = signal' x0' + k eps' + noise z, eps' = (x - signal x0') / sigma, k^2 = sigma'^2 - noise^2."""

    def __init__(
        self, model: Callable[..., Tensor], schedule: Schedule, operator: Operator, y: Tensor, sigma: float,
        shape: tuple[int, ...], seed: int, fresh: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.schedule, self.shape, self.noise_level = model, schedule, shape, sigma
        self.matrix = dense(operator, shape)
        self.left, values, right = torch.linalg.svd(self.matrix, full_matrices=True)
        count = self.matrix.shape[1]
        self.values = torch.zeros(count, dtype=torch.float64)
        self.values[: len(values)] = torch.where(values > 1e-6 * values.max(), values, 0)
        self.right = right  # (n, n)
        self.y = y.flatten(1)
        draw = torch.Generator().manual_seed(seed)
        size = (len(y), *shape)
        self.start = torch.randn(size, generator=draw, dtype=y.dtype).flatten(1)
        steps = range(schedule.num_steps)
        drawn = [fresh or bool(schedule.draws[i]) for i in steps]
        self.draws = [
            torch.randn(size, generator=draw, dtype=y.dtype).flatten(1) if d else torch.zeros_like(self.start)
            for d in drawn
        ]

    def run(self, step: Callable[[int, Tensor, Tensor], Tensor], start: Tensor | None = None) -> Tensor:
        """The sample. step: (i, x, x0) -> x'."""
        x = self.start if start is None else start
        for i in range(self.schedule.num_steps):
            x = step(i, x, self.clean(i, x))
        return x.view(-1, *self.shape)

    def clean(self, i: int, x: Tensor) -> Tensor:
        p, q = self.schedule.denoised_coef()[i].tolist()
        t = self.schedule.timesteps[i].expand(len(x))
        return p * x + q * self.model(x.view(-1, *self.shape), t).flatten(1)

    def levels(self, i: int) -> tuple[float, float, float, float, float]:
        """(signal, sigma, signal', sigma', noise)."""
        s = self.schedule
        return tuple(float(v) for v in (s.signal[i], s.sigma[i], s.signal[i + 1], s.sigma[i + 1], s.noise_coef[i]))

    def ddim(self, i: int, x: Tensor, x0: Tensor) -> Tensor:
        signal, sigma, signal_next, sigma_next, noise = self.levels(i)
        k = max(sigma_next**2 - noise**2, 0.0) ** 0.5
        return signal_next * x0 + k * (x - signal * x0) / sigma + noise * self.draws[i]

    def pinv(self) -> Tensor:
        return torch.linalg.pinv(self.matrix, rtol=1e-6)

    def ddnm(self) -> Tensor:
        """Wang et al. 2022, equation 13, without noise."""
        back = self.pinv()
        return self.run(lambda i, x, x0: self.ddim(i, x, x0 + (self.y - x0 @ self.matrix.T) @ back.T))

    def ddrm(self) -> Tensor:
        """Kawar et al. 2022, equations 4, 7 and 8, in the scale of a signal; their eta is noise / sigma'."""
        measured = self.values > 0
        inverse = torch.where(measured, 1 / torch.where(measured, self.values, 1), 0)
        bar = torch.zeros_like(self.start)
        count = min(self.left.shape[0], len(self.values))
        bar[:, :count] = (self.y @ self.left)[:, :count]
        bar = bar * inverse
        tau = torch.where(measured, self.noise_level * inverse, torch.inf)
        signal, sigma = self.levels(0)[:2]
        z = self.start @ self.right.T
        known = sigma >= signal * tau
        share = (sigma**2 - signal**2 * tau.square()).clamp_min(0).sqrt() / sigma
        start = torch.where(known, signal * bar + share * z, z) @ self.right

        def step(i: int, x: Tensor, x0: Tensor) -> Tensor:
            _, _, signal, sigma, noise = self.levels(i)
            k = max(sigma**2 - noise**2, 0.0) ** 0.5
            c, z = x0 @ self.right.T, self.draws[i] @ self.right.T
            plain = self.ddim(i, x, x0) @ self.right.T
            below = signal * c + k * (bar - c) / tau + noise * z
            above = signal * bar + (sigma**2 - signal**2 * tau.square()).clamp_min(0).sqrt() * z
            new = torch.where(sigma >= signal * tau, above, below)
            return torch.where(measured, new, plain) @ self.right

        return self.run(step, start)

    def diffpir(self, weight: float) -> Tensor:
        """Zhu et al. 2023, algorithm 1, the proximal step as a linear system."""
        gram, back = self.matrix.T @ self.matrix, self.y @ self.matrix

        def step(i: int, x: Tensor, x0: Tensor) -> Tensor:
            signal, sigma = self.levels(i)[:2]
            rho = weight * (self.noise_level * signal / sigma) ** 2
            system = gram + rho * torch.eye(len(gram), dtype=torch.float64)
            return self.ddim(i, x, torch.linalg.solve(system, (back + rho * x0).T).T)

        return self.run(step)

    def pigdm(self) -> Tensor:
        """Song et al. 2023, equations 7 and 8, with r = sigma / signal and the whole Jacobian."""
        back = self.pinv()

        def step(i: int, x: Tensor, x0: Tensor) -> Tensor:
            signal, sigma = self.levels(i)[:2]
            r = (sigma / signal) ** 2
            off = self.y - x0 @ self.matrix.T
            if self.noise_level:
                system = r * self.matrix @ self.matrix.T + self.noise_level**2 * torch.eye(len(self.matrix)).double()
                towards = torch.linalg.solve(system, off.T).T @ self.matrix
            else:
                towards = off @ back.T / r
            rows = []
            for one, v in zip(x, towards):
                jacobian = torch.autograd.functional.jacobian(lambda s: self.clean(i, s[None])[0], one, vectorize=True)
                rows.append(v @ jacobian)
            new = x0 + sigma**2 / signal * torch.stack(rows)
            if not self.noise_level:
                new = new + (self.y - new @ self.matrix.T) @ back.T
            return self.ddim(i, x, new)

        return self.run(step)

    def ddnm_plus(self) -> Tensor:
        """DDNM+ as `known_vectors` words it, on whole components of the state."""
        measured = self.values > 0
        inverse = torch.where(measured, 1 / torch.where(measured, self.values, 1), 0)
        bar = torch.zeros_like(self.start)
        count = min(self.left.shape[0], len(self.values))
        bar[:, :count] = (self.y @ self.left)[:, :count]
        bar = bar * inverse
        tau = torch.where(measured, self.noise_level * inverse, torch.inf)
        weight, noise = 0.0, self.start @ self.right.T

        def step(i: int, x: Tensor, x0: Tensor) -> Tensor:
            nonlocal weight, noise
            signal, sigma, signal_next, sigma_next, fresh = self.levels(i)
            k = max(sigma_next**2 - fresh**2, 0.0) ** 0.5
            z, plain = self.draws[i] @ self.right.T, self.ddim(i, x, x0) @ self.right.T
            noise = k / sigma * noise + fresh * z
            weight = signal_next - k * signal / sigma + k / sigma * weight
            share = (1 - (weight * tau / max(sigma_next, 1e-30)).square()).clamp_min(0).sqrt()
            return torch.where(sigma_next >= signal_next * tau, weight * bar + share * noise, plain) @ self.right

        return self.run(step)
