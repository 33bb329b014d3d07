"""Which noise level belongs to which of a model's times, and what the model predicts there: a table of a schedule.

A draft sees inputs and times as the model does, of any schedule of that model. The table is made of one of them, and
is read in between by linear interpolation. Where the times are a known function of the noise-to-signal ratio, as those
of k-diffusion and flow models are, it is filled in by that function, however few steps the schedule has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..schedule import Schedule

LAWS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda ratio: ratio,  # k-diffusion: t = sigma
    lambda ratio: ratio / (1 + ratio),  # flow matching: t = 1000 sigma
    lambda ratio: ratio.log(),  # EDM: t = log(sigma) / 4
    torch.atan,  # TrigFlow
)
EXACT, DENSE, BEYOND = 1e-3, 1024, 8.0  # a law's largest misfit; rows of the table then, how far past both ends it goes
MAX_LOG_SNR = 28.0  # a vanishing signal, or vanishing noise, in numbers that float32 can divide by


class DraftLevels(NamedTuple):
    """K rows in the order of the model's times; the model's input is y, with y input_norm = a x0 + b eps, a^2 + b^2 =
    1, and its output o = clean x0 + noise eps."""

    times: Tensor  # (K,) ascending
    log_snr: Tensor  # (K,) log(a^2 / b^2)
    input_norm: Tensor  # (K,)
    clean: Tensor  # (K,)
    noise: Tensor  # (K,)

    @classmethod
    def of(cls, schedule: Schedule) -> DraftLevels:
        """float64 on the CPU.

        Raises:
            ValueError: fewer than two different times at which the prediction says anything.
        """
        signal, sigma = schedule.signal[:-1], schedule.sigma[:-1]
        p, q = schedule.denoised_coef().unbind(1)
        log_snr = (2 * (signal.log() - sigma.log())).clamp(-MAX_LOG_SNR, MAX_LOG_SNR)
        input_norm = 1 / (schedule.input_scale * torch.hypot(signal, sigma))
        rows = torch.stack(
            [schedule.timesteps.double(), log_snr, input_norm, (1 - p * signal) / q, -p * sigma / q]
        )  # fmt: skip
        rows = rows[:, rows.isfinite().all(0) & (q != 0)]
        rows = rows[:, rows[0].argsort(stable=True)]
        rows = rows[:, torch.cat([torch.ones(1, dtype=torch.bool), rows[0].diff() > 0])[: rows.shape[1]]]
        if rows.shape[1] < 2:
            raise ValueError(f"schedule: expected at least two different timesteps, got {rows.shape[1]}")
        levels = cls(*rows.unbind(0))
        if schedule.x0_coef is None:  # without the rounding of the above
            levels = levels._replace(**_outputs(levels.log_snr, schedule.prediction_type))
        return levels if schedule.timesteps.dtype == torch.int64 else levels._filled(schedule)

    @classmethod
    def of_alphas(cls, alphas_cumprod: Tensor, prediction_type: str) -> DraftLevels:
        """Of the timesteps 0 ... N - 1 of a DDPM noise schedule, (N,) in (0, 1)."""
        log_snr = (alphas_cumprod / (1 - alphas_cumprod)).log()
        times, ones = torch.arange(len(log_snr), dtype=torch.float64), torch.ones_like(log_snr)
        return cls(times, log_snr, ones, **_outputs(log_snr, prediction_type))

    def is_velocity(self) -> bool:
        """Whether the output is a eps - b x0 itself, rounding aside."""
        expected = _outputs(self.log_snr.double(), "v_prediction")
        return all(torch.allclose(getattr(self, name).double(), expected[name], atol=1e-6) for name in expected)

    def _filled(self, schedule: Schedule) -> DraftLevels:
        """Many rows where the times follow a law; else as it is."""
        ratio = (-self.log_snr / 2).exp()
        for law in LAWS if len(ratio) > 3 else ():
            terms = torch.stack([torch.ones_like(ratio), law(ratio)], 1)
            weights = torch.linalg.lstsq(terms, self.times[:, None]).solution
            off = (terms @ weights)[:, 0] - self.times
            if float(off.abs().max()) > EXACT * float(self.times.max() - self.times.min()) or float(weights[1]) == 0:
                continue
            order = self.log_snr.argsort()
            low, high = (float(self.log_snr[order[end]]) for end in (0, -1))
            low, high = max(low - BEYOND, -MAX_LOG_SNR), min(high + BEYOND, MAX_LOG_SNR)
            log_snr = torch.linspace(low, high, DENSE, dtype=torch.float64)
            times = float(weights[0]) + float(weights[1]) * law((-log_snr / 2).exp())
            outputs = {"input_norm": self._input_norm(log_snr)}
            for name in ("clean", "noise"):
                outputs[name] = interpolate(self.log_snr[order], getattr(self, name)[order], log_snr)
            if schedule.x0_coef is None:
                outputs |= _outputs(log_snr, schedule.prediction_type)
            dense = torch.stack([times, log_snr, *outputs.values()])
            dense = dense[:, dense[0].argsort(stable=True)]
            return DraftLevels(*dense[:, torch.cat([torch.tensor([True]), dense[0].diff() > 0])].unbind(0))
        return self

    def _input_norm(self, log_snr: Tensor) -> Tensor:
        """`input_norm` at other noise levels: of inputs in variance-preserving, unscaled or flow coordinates, or, where
        it is neither, by interpolation."""

        def forms(log_snr: Tensor) -> list[Tensor]:
            a, b = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
            return [torch.ones_like(a), a, a + b]

        for here, there in zip(forms(self.log_snr), forms(log_snr)):
            factor = self.input_norm / here
            if torch.allclose(factor, factor[:1].expand_as(factor), rtol=1e-5):
                return factor[0] * there
        order = self.log_snr.argsort()
        return interpolate(self.log_snr[order], self.input_norm[order].log(), log_snr).exp()


def _outputs(log_snr: Tensor, prediction_type: str) -> dict[str, Tensor]:
    """`clean` and `noise` of a known prediction type."""
    a, b = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    clean, noise = {
        "epsilon": (zero, one), "sample": (one, zero), "v_prediction": (-b, a), "flow": (-one, one),
    }[prediction_type]  # fmt: skip
    return {"clean": clean, "noise": noise}


def interpolate(at: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """values: (K,), of ascending points at: (K,), K > 1, linearly between them and constant beyond, at wanted: (n,)."""
    below = (torch.searchsorted(at, wanted.contiguous(), right=True) - 1).clamp(0, len(at) - 2)
    weight = ((wanted - at[below]) / (at[below + 1] - at[below])).clamp(0, 1)
    return torch.lerp(values[below], values[below + 1], weight.to(values.dtype))
