"""What a pipeline's loop makes of its model's outputs, found by what it makes of random numbers.

Guidance is linear in the outputs: with and without a prompt, perturbed, or with layers left out. Some pipelines then
bring the result back to the size of the output with the prompt, over a sample (Lin et al. 2023, arXiv 2305.08891) or
over the last dimension (Lumina-Image 2, Qwen-Image). Its numbers are those of a fit, rounded to what the caller gave.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._devices import float64
from ...model.guidance import combine

_TOLERANCE = 2  # in units of the dtype's rounding: the same operations on the same numbers
_CANCELS = 8.0  # times the result: how large may be what guidance makes it of; above, rescaling has made it small
_CLEARLY = 0.5  # times what the first combination that matches is off by: what is missing there is no rounding
_NEAR = {torch.float64: 1e-6, torch.float32: 1e-4}  # relative: how exact the numbers of a fit are
_NEAR_HALF = 2e-2


@dataclass(frozen=True)
class Combination:
    """`combination(parts)` -> what the scheduler is given; parts: each (n, *shape)."""

    weights: tuple[float, ...]
    """Of every part; for guidance of two parts ignored in favour of what follows."""
    dtype: torch.dtype
    scale: float | tuple[float, ...] | None = None
    """Of guidance, negative + scale (positive - negative); several along `dim`, one a frame of a video."""
    positive: int = 1
    """Which of the two parts is the one with the prompt."""
    sign: float = 1.0
    rescale: float = 0.0
    normalised: bool = False
    """To the norm of the positive part along the last dimension."""
    dim: int = 0

    def __call__(self, parts: list[Tensor]) -> Tensor:
        """In the dtype in which the pipeline computes it."""
        kind = torch.promote_types(self.dtype, parts[0].dtype)
        parts = [part.to(kind) for part in parts]
        if self.scale is None:
            if len(parts) == 1 and self.weights[0] in (1.0, -1.0):
                return parts[0] if self.weights[0] > 0 else -parts[0]
            total = self.weights[0] * parts[0]
            for weight, part in zip(self.weights[1:], parts[1:]):
                total = total + weight * part
            return total
        positive, negative = parts[self.positive], parts[1 - self.positive]
        guided = combine(negative, positive, self._scale(positive), self.rescale)
        if self.normalised:
            sizes = (torch.norm(value, dim=-1, keepdim=True) for value in (positive, guided))
            guided = guided * (next(sizes) / next(sizes))
        return guided if self.sign > 0 else -guided

    def apart(self, parts: list[Tensor], guided: Tensor) -> float:
        """By how much what the loop has made of the parts differs, in units of what rounding may do."""
        size, whole = sum(abs(w) * float64(part).norm() for w, part in zip(self._sizes(), parts)), float64(guided)
        unit = _TOLERANCE * torch.finfo(self.dtype).eps * min(float(size), _CANCELS * float(whole.norm()))
        return float((float64(self(parts)) - whole).norm() / unit)

    def still(self, parts: list[Tensor], guided: Tensor, hints: list[float], before: list[float]) -> bool:
        """Whether a later step makes the same of its outputs: of half precision numbers alone do not show it."""
        if hints != before and find_combination(parts, guided, hints) != self:
            return False
        return self.apart(parts, guided) <= 1

    @property
    def certain(self) -> bool:
        """Whether its numbers are those of guidance, which leaves equal outputs as they are. Others may be made of the
        outputs themselves, of their norms, say: then they are others where the outputs are."""
        if self.scale is not None:
            return not self.rescale
        near = _NEAR.get(self.dtype, _NEAR_HALF) * sum(self._sizes())
        return abs(abs(sum(self.weights)) - 1) <= near

    def __str__(self) -> str:
        minus = "-" if self.sign < 0 else ""
        if self.scale is None:
            return " + ".join(f"{w:.4g} o{k}" for k, w in enumerate(self.weights)) if self.weights != (1.0,) else "o"
        scale = f"{self.scale:.4g}" if isinstance(self.scale, float) else "scale per frame"
        further = f", rescale {self.rescale:.4g}" if self.rescale else ", normalised" if self.normalised else ""
        return f"{minus}(u + {scale} (c - u)){further}" if minus else f"u + {scale} (c - u){further}"

    def _scale(self, like: Tensor) -> float | Tensor:
        if isinstance(self.scale, tuple):
            shape = [len(self.scale) if d == self.dim else 1 for d in range(like.dim())]
            return torch.tensor(self.scale, dtype=like.dtype, device=like.device).view(shape)
        assert self.scale is not None
        return self.scale

    def _sizes(self) -> tuple[float, ...]:
        if self.scale is None:
            return tuple(abs(weight) for weight in self.weights)
        scale = max(map(abs, self.scale)) if isinstance(self.scale, tuple) else abs(self.scale)
        return (1.0 + scale, 1.0 + scale)


def find_combination(parts: list[Tensor], guided: Tensor, hints: list[float]) -> Combination | None:
    """The combination that makes `guided` of the parts, each (B, *shape); None: there is none that is known.

    Args:
        parts: random numbers that the loop was given in the place of outputs.
        hints: numbers that the caller gave or the pipeline keeps.
    """
    if not parts or any(part.shape != guided.shape for part in parts):
        return None
    near = _NEAR.get(parts[0].dtype, _NEAR_HALF)
    for tolerance in (near, 0.0):
        found = [(c.apart(parts, guided), c) for c in _candidates(parts, guided, hints, tolerance)]
        found = [(apart, c) for apart, c in found if apart <= 1]
        if found:
            first, best = found[0], min(found, key=lambda each: each[0])
            return (best if best[0] < _CLEARLY * first[0] else first)[1]
    return None


def _candidates(parts: list[Tensor], guided: Tensor, hints: list[float], near: float) -> Iterator[Combination]:
    known = [float64(part) for part in parts]
    total, kind = float64(guided), guided.dtype
    weights = _fit(known, total, ())[:, 0]
    plain = tuple(_rounded(float(w), hints, near) for w in weights)
    if len(parts) == 2:
        yield from _guidance(known, total, kind, hints, near)
    yield Combination(plain, kind)


def _guidance(
    parts: list[Tensor], guided: Tensor, kind: torch.dtype, hints: list[float], near: float
) -> Iterator[Combination]:
    """Of two parts, in either order: over all, one factor a sample, a frame, or a place."""
    for dims in ((), (0,), *((d,) for d in range(1, guided.dim())), tuple(range(guided.dim() - 1))):
        if dims and guided.numel() // _count(guided, dims) < 3:
            continue  # two numbers fit anything
        weights = _fit(parts, guided, dims)
        total = weights.sum(0)
        sign = 1.0 if float(total.median()) > 0 else -1.0
        for positive in (1, 0):
            each = weights[positive] / total
            scale = _rounded(float(each.median()), hints, near)
            if scale < 0.5 and not any(scale == hint for hint in hints):
                continue  # the other order, which is the same
            own = Combination((), kind, scale, positive, sign)
            if dims == (0,):
                high, low = parts[positive], parts[1 - positive]
                plain = combine(low, high, scale, 0.0)
                axes = tuple(range(1, guided.dim()))
                ratio = high.std(dim=axes) / plain.std(dim=axes) - 1
                if bool((ratio.abs() > 1e-6).all()):
                    rescale = float(((total * sign - 1) / ratio).median())
                    yield Combination((), kind, scale, positive, sign, _rounded(rescale, hints, near))
            elif len(dims) > 1:
                yield Combination((), kind, scale, positive, sign, normalised=True)
            elif dims:
                scales = tuple(_rounded(float(s), hints, near) for s in each)
                yield Combination((), kind, scales, positive, sign, dim=dims[0])
            else:
                yield own


def _fit(parts: list[Tensor], guided: Tensor, dims: tuple[int, ...]) -> Tensor:
    """(J, groups): weights of the parts for each index of `dims`, by least squares."""
    rest = [d for d in range(guided.dim()) if d not in dims]
    table = torch.stack(parts, -1).permute(*dims, *rest, guided.dim()).reshape(_count(guided, dims), -1, len(parts))
    wanted = guided.permute(*dims, *rest).reshape(_count(guided, dims), -1, 1)
    normal = table.mT @ table
    floor = 1e-300 * torch.eye(len(parts), dtype=normal.dtype, device=normal.device)
    weights: Tensor = torch.linalg.solve(normal + floor, table.mT @ wanted)[..., 0].T.cpu()
    return weights


def _count(value: Tensor, dims: tuple[int, ...]) -> int:
    return math.prod(value.shape[d] for d in dims)


def _rounded(value: float, hints: list[float], near: float) -> float:
    """The number that was meant: one that was given, or one of few digits."""
    for candidate in (*sorted(hints, key=lambda hint: abs(hint - value))[:1], float(f"{value:.4g}")):
        if abs(candidate - value) <= near * max(1.0, abs(value)):
            return candidate
    return value
