"""The linear part of a denoiser: how data of a known power spectrum is denoised, coefficient by coefficient.

In the orthonormal basis of a DCT over the spatial axes and decorrelated channels, natural data is close to independent
Gaussians. Their best model is diagonal there: E[o_i | x_i] = c_i(f) x_i with the slope of `Schedule.slope` at the
variance S(f) of that coefficient. Exact for Gaussian data with this covariance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._devices import with_torch_defaults
from .._types import Model
from .chain import draw_samples
from .schedule import Schedule
from .tensor_file import read_tensors, write_tensors, written_by

SAME_VARIANCE = 0.05  # of its logarithm: half of that changes s v / (s^2 v + sigma^2) by less than a hundredth of 1 / s
MIN_VARIANCE = 1e-4  # a coefficient that a few samples never show is not known to be zero


def dct_matrix(n: int) -> Tensor:
    """(n, n) float64 orthonormal DCT-II; row k holds frequency k."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / n) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


@dataclass(frozen=True, eq=False)
class SpectralSlope:
    """The power spectrum of the data, from which follows the slope of the best diagonal linear model.

    Build one with `fit` or `from_model`, keep it with `save`.

    Args:
        variance: (*shape), > 0, of every coefficient in the basis; shape is (C, ...) with any number of spatial axes,
            or (C,) for data without any. Kept in float64 on the CPU.
        channels: (C, C) orthonormal, rows are the decorrelated channels.

    Raises:
        ValueError: a wrong shape, variances that are not finite and > 0, or channels that are not orthonormal.
    """

    variance: Tensor
    channels: Tensor

    @with_torch_defaults
    def __post_init__(self) -> None:
        variance, channels = self.variance.detach().cpu().double(), self.channels.detach().cpu().double()
        count = variance.shape[0] if variance.dim() else 0
        if count == 0 or not bool((variance.isfinite() & (variance > 0)).all()):
            raise ValueError(
                f"variance: expected positive finite values of shape (C, ...), got {tuple(variance.shape)}"
            )
        if channels.shape != (count, count):
            raise ValueError(f"channels: expected shape {(count, count)}, got {tuple(channels.shape)}")
        if not torch.allclose(channels @ channels.T, torch.eye(count, dtype=torch.float64), atol=1e-6):
            raise ValueError("channels: expected an orthonormal matrix")
        object.__setattr__(self, "variance", variance)
        object.__setattr__(self, "channels", channels)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, ...), of one sample."""
        return tuple(self.variance.shape)

    @classmethod
    @with_torch_defaults
    def fit(cls, samples: Tensor) -> SpectralSlope:
        """From samples: channel covariance, then variances averaged over rings of equal frequency.

        The averages make a few samples enough.

        Args:
            samples: (N, C, ...) images or latents, N >= 2.

        Raises:
            ValueError: fewer than 2 samples, or values that are not finite.
        """
        if samples.dim() < 2 or samples.shape[0] < 2 or not bool(samples.isfinite().all()):
            raise ValueError(
                f"samples: expected at least 2 finite samples (N, C, ...), got shape {tuple(samples.shape)}"
            )
        x = samples.detach().cpu().double()
        x = x - x.mean(0)
        flat = x.flatten(2) if x.dim() > 2 else x[..., None]
        covariance = torch.einsum("ncp,ndp->cd", flat, flat)
        channels = torch.linalg.eigh(covariance).eigenvectors.T.flip(0).contiguous()
        shape = tuple(x.shape[1:])
        basis = Basis(channels, shape)
        power = basis.forward(x.flatten(1).contiguous()).view(-1, *shape).square().sum(0) / (len(x) - 1)
        return cls(average_rings(power).clamp_min(MIN_VARIANCE), channels)

    @classmethod
    @with_torch_defaults
    def from_model(
        cls, model: Model, schedule: Schedule, shape: tuple[int, ...], *, count: int = 16, seed: int = 0,
        model_kwargs: dict[str, Any] | None = None, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> SpectralSlope:  # fmt: skip
        """From samples of a model, drawn by the serial chain of a (short) schedule.

        Args:
            model: `model(x, t, **model_kwargs)`, as for `DEQSampler`.
            schedule: the chain.
            shape: (C, ...), of one sample.
            count: how many samples, all in one batch.
            seed: of the noise.
            model_kwargs: passed to every call, `count` samples at a time.
            device, dtype: of the draw.

        Raises:
            NonFiniteError: the model returned NaN or Inf.
        """
        draw = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, *shape, generator=draw) * schedule.init_noise_sigma
        return cls.fit(draw_samples(model, schedule, noise.to(device, dtype), model_kwargs, draw))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file. Raises OSError, and leaves what was there."""
        write_tensors({"variance": self.variance.float(), "channels": self.channels}, path)

    @classmethod
    @with_torch_defaults
    def load(cls, path: str | Path) -> SpectralSlope:
        """Read a file that `save` wrote.

        Raises:
            ValueError: it is damaged, or another kind of file.
            OSError: it is not there, or may not be read.
        """
        with written_by("SpectralSlope.save", path):
            stored, _ = read_tensors(path)
            return cls(stored["variance"], stored["channels"])

    @with_torch_defaults
    def basis(self) -> Basis:
        """The change of basis between samples and coefficients."""
        return Basis(self.channels, self.shape)

    @with_torch_defaults
    def classes(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """(T, K) float64 the slopes of variances that are not about the same, and (D,) int64 which of them each
        coefficient has."""
        level = (self.variance.flatten().log() / SAME_VARIANCE).round()
        values, which = torch.unique(level, return_inverse=True)
        return schedule.slope((values * SAME_VARIANCE).exp()), which

    @with_torch_defaults
    def slope(self, schedule: Schedule) -> Tensor:
        """(T, D) float64: c_i of every coefficient, see `Schedule.slope`."""
        return schedule.slope(self.variance.flatten())


class Basis:
    """The orthonormal change of basis, on rows (n, D): one matrix product an axis."""

    def __init__(self, channels: Tensor, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.matrices = [channels, *(dct_matrix(n) for n in shape[1:])]
        self._ready: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}

    def forward(self, rows: Tensor, spare: Tensor | None = None) -> Tensor:
        """Samples -> coefficients, in place; spare: scratch of the same shape and dtype. Returns rows."""
        if in_tf32(rows):
            return rows.copy_(self.forward(rows.double()))
        return self._apply(rows, spare, self._on(rows))

    def inverse(self, rows: Tensor, spare: Tensor | None = None) -> Tensor:
        """Coefficients -> samples, in place."""
        if in_tf32(rows):
            return rows.copy_(self.inverse(rows.double()))
        return self._apply(rows, spare, [m.T for m in self._on(rows)])

    def _on(self, rows: Tensor) -> list[Tensor]:
        key = (rows.device, rows.dtype)
        if key not in self._ready:
            self._ready[key] = [m.to(rows.device, rows.dtype).contiguous() for m in self.matrices]
        return self._ready[key]

    def _apply(self, rows: Tensor, spare: Tensor | None, matrices: list[Tensor]) -> Tensor:
        """Each axis multiplied by its matrix, from the left, to and fro between the rows and the scratch."""
        source, target = rows, torch.empty_like(rows) if spare is None else spare
        before, after = len(rows), math.prod(self.shape)
        for size, matrix in zip(self.shape, matrices):
            after //= size
            if after == 1:
                torch.mm(source.view(before, size), matrix.T, out=target.view(before, size))
            else:
                view = (before, size, after)
                torch.bmm(matrix.expand(before, -1, -1), source.view(view), out=target.view(view))
            before, source, target = before * size, target, source
        return rows if source is rows else rows.copy_(source)


def in_tf32(rows: Tensor) -> bool:
    """Whether a product of these would be taken in TF32, to three digits, which a change of basis must not be: what is
    lost in it is lost in every state. The setting is the whole process', so it is not for us to change for a while."""
    if rows.dtype != torch.float32 or rows.device.type != "cuda":
        return False
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # torch's since 2.9; the other may then not be read
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


def average_rings(power: Tensor) -> Tensor:
    """Mean over coefficients of the same channel and (rounded) distance from frequency zero."""
    if power.dim() < 2:
        return power
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) / n for n in power.shape[1:]), indexing="ij")
    radius = (torch.stack([a.square() for a in axes]).sum(0).sqrt() * max(power.shape[1:])).round().long().flatten()
    flat, rings = power.flatten(1), int(radius.max()) + 1
    total = torch.zeros(len(flat), rings, dtype=power.dtype).index_add_(1, radius, flat)
    return (total / torch.bincount(radius, minlength=rings).clamp_min(1))[:, radius].view(power.shape)
