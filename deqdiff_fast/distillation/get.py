"""GET: one step from noise to sample, by a transformer whose block with tied weights is solved for its fixed point."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ..equilibrium import EquilibriumInfo, equilibrium
from ..schedule.tensor_file import read_tensors, write_tensors, written_by
from .get_blocks import InjectedBlock, grid_positions


@dataclass(frozen=True)
class GETSize:
    """How large a `GET` is.

    Args:
        width: features of a patch, a multiple of 4 and of `heads`.
        injection_depth: blocks of the injection transformer, which runs once.
        equilibrium_depth: blocks of the equilibrium transformer, which is iterated.
        heads: of the attention.
        equilibrium_ratio: width of the equilibrium's MLPs / width.
        injection_ratio: the same of the injection's.
    """

    width: int
    injection_depth: int
    equilibrium_depth: int
    heads: int
    equilibrium_ratio: float
    injection_ratio: float = 4.0


SIZES = {
    "T": GETSize(256, 6, 3, 4, 6),
    "M": GETSize(384, 6, 3, 6, 6),
    "S": GETSize(512, 6, 3, 8, 8),
    "B": GETSize(768, 1, 3, 12, 12),
    "B+": GETSize(768, 6, 3, 12, 8),
}
NAMES = {"tiny": "T", "mini": "M", "small": "S", "base": "B"}
START_SCALE = 0.5  # of what the untrained equilibrium adds, so that it contracts


class GET(nn.Module):
    """Generative Equilibrium Transformer: noise -> sample in one call (Geng et al. 2023, arXiv 2401.08639).

    The noise is cut into patches; the injection transformer makes x and an injection u for each equilibrium block of
    them, once; z = x + D(z, u) is solved with `dq.equilibrium`, where D is what the equilibrium blocks add to z; a last
    norm and linear layer make the sample of z. The paper iterates z + D(z, u); with x in the place of the first z the
    layer has a fixed point that Anderson acceleration and the implicit gradient can find, and it is the paper's when x
    is zero. Depth is a choice of the call: more steps, more of the fixed point.

        student = GET((3, 32, 32), size="T")
        sample = student(torch.randn(16, 3, 32, 32))

    Args:
        shape: (C, H, W) of a sample; H and W multiples of `patch`.
        size: "T", "M", "S", "B", "B+" of the paper (also "tiny", "mini", "small", "base"), or a `GETSize`.
        patch: pixels of a patch's side.
        classes: number of labels, 0 for none; forward then takes (B,) integers as `condition`.
        features: of a vector that conditions, 0 for none; forward then takes (B, features) numbers.
        noise_scale: standard deviation of the noises that it is trained on.
        solver, tol, max_steps, gradient: of `dq.equilibrium`.

    Raises:
        ValueError: a bad argument, by its name.
    """

    def __init__(
        self, shape: tuple[int, int, int], *, size: str | GETSize = "T", patch: int = 2, classes: int = 0,
        features: int = 0, noise_scale: float = 1.0, solver: Any = "anderson", tol: float = 1e-2, max_steps: int = 16,
        gradient: Any = "implicit",
    ) -> None:  # fmt: skip
        super().__init__()
        self.size = _sized(size)
        self.shape, self.patch, self.classes, self.features = tuple(shape), patch, classes, features
        _check(self.shape, self.size, patch, classes, features, noise_scale)
        self.noise_scale = float(noise_scale)
        self.solver, self.tol, self.max_steps, self.gradient = solver, tol, max_steps, gradient
        width, inner = self.size.width, shape[0] * patch * patch
        self.rows, self.columns = shape[1] // patch, shape[2] // patch
        self.embed = nn.Linear(inner, width)
        self.register_buffer("positions", grid_positions(self.rows, self.columns, width), persistent=False)
        self.label = nn.Embedding(classes, 3 * width) if classes else None
        self.vector = nn.Linear(features, 3 * width) if features else None
        s = self.size
        self.injection = nn.ModuleList(
            InjectedBlock(width, s.heads, s.injection_ratio) for _ in range(s.injection_depth)
        )
        self.inject = nn.Linear(width, 3 * width * s.equilibrium_depth, bias=False)
        self.equilibrium = nn.ModuleList(
            InjectedBlock(width, s.heads, s.equilibrium_ratio) for _ in range(s.equilibrium_depth)
        )
        self.last_norm, self.last = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, inner)
        self._start()

    def _start(self) -> None:
        """Untrained weights: what the equilibrium adds is small, and the sample zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        with torch.no_grad():
            for block in self.equilibrium:
                assert isinstance(block, InjectedBlock)
                for layer in (block.attention.out, block.mlp[-1]):
                    layer.weight.mul_(START_SCALE)  # type: ignore[operator]
        nn.init.zeros_(self.last.weight)

    @overload
    def forward(self, noise: Tensor, condition: Tensor | None = None, *, max_steps: int | None = None,
                return_info: Literal[False] = False) -> Tensor: ...  # fmt: skip
    @overload
    def forward(self, noise: Tensor, condition: Tensor | None = None, *, max_steps: int | None = None,
                return_info: Literal[True]) -> tuple[Tensor, EquilibriumInfo]: ...  # fmt: skip
    def forward(
        self, noise: Tensor, condition: Tensor | None = None, *, max_steps: int | None = None, return_info: bool = False
    ) -> Tensor | tuple[Tensor, EquilibriumInfo]:
        """The sample of each noise.

        Args:
            noise: (B, C, H, W).
            condition: (B,) labels or (B, features), where the model has a condition.
            max_steps: of the equilibrium, None for the model's own. One that has not converged by then is taken as it
                is.
            return_info: the equilibrium's `EquilibriumInfo` too.

        Returns:
            (B, C, H, W) in the dtype of the noise, with `info` if asked.

        Raises:
            ValueError: the noise has another shape, or the condition is missing or of another kind.
            NonFiniteError: NaN or Inf in the equilibrium.
        """
        x, injections = self._inject(noise, condition)

        def f(z: Tensor) -> Tensor:
            h = z
            for block, injection in zip(self.equilibrium, injections, strict=True):
                h = block(h, injection)
            return x + (h - z)

        start = x.detach().to(self.embed.weight.dtype)  # under autocast it may be half
        steps = self.max_steps if max_steps is None else max_steps
        z, info = equilibrium(
            f, start, solver=self.solver, tol=self.tol, max_steps=steps, gradient=self.gradient, on_failure="ignore"
        )
        patches = (
            self.last(self.last_norm(z))
            .to(noise.dtype)
            .view(len(z), self.rows, self.columns, -1, self.patch, self.patch)
        )
        sample = patches.permute(0, 3, 1, 4, 2, 5).reshape(len(z), *self.shape)
        return (sample, info) if return_info else sample

    def _inject(self, noise: Tensor, condition: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """x: (B, N, width), and the injection of each equilibrium block, (B, N, 3 width)."""
        if noise.dim() != 4 or tuple(noise.shape[1:]) != self.shape:
            raise ValueError(f"noise: expected shape (B, {', '.join(map(str, self.shape))}), got {tuple(noise.shape)}")
        added = self._condition(condition, len(noise))
        p = self.patch
        cut = (noise / self.noise_scale).view(len(noise), self.shape[0], self.rows, p, self.columns, p)
        x = self.embed(cut.permute(0, 2, 4, 1, 3, 5).reshape(len(noise), self.rows * self.columns, -1)) + self.positions
        for block in self.injection:
            x = block(x, added)
        injections = self.inject(x).chunk(self.size.equilibrium_depth, dim=2)
        return x, [u if added is None else u + added for u in injections]

    def _condition(self, condition: Tensor | None, batch: int) -> Tensor | None:
        """(B, 1, 3 width), what all blocks are given."""
        expected = self.label is not None or self.vector is not None
        if not expected or condition is None:
            if expected or condition is not None:
                raise ValueError(f"condition: expected {'one' if expected else 'none'} for this model")
            return None
        shape = (batch,) if self.label is not None else (batch, self.features)
        if tuple(condition.shape) != shape or condition.is_floating_point() == (self.label is not None):
            kind = "integer labels" if self.label is not None else "numbers"
            raise ValueError(f"condition: expected {kind} {shape}, got {condition.dtype} {tuple(condition.shape)}")
        found: Tensor = (self.label or self.vector)(condition)  # type: ignore[misc]
        return found[:, None]

    def save(self, path: str | Path, **extra: str) -> None:
        """Write a safetensors file. extra: texts to keep beside, say where it comes from. Raises OSError."""
        facts = {
            "shape": self.shape, "size": asdict(self.size), "patch": self.patch, "classes": self.classes,
            "features": self.features, "noise_scale": self.noise_scale, "tol": self.tol, "max_steps": self.max_steps,
        }  # fmt: skip
        write_tensors(self.state_dict(), path, {**extra, "get": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> GET:
        """Read a file that `save` wrote; solver and gradient are the defaults.

        Returns:
            The model in eval mode.

        Raises:
            ValueError: it is damaged, or another kind of file.
            OSError: it is not there, or may not be read.
        """
        with written_by("GET.save", path):
            stored, metadata = read_tensors(path)
            facts = json.loads(metadata["get"])
            facts["shape"], facts["size"] = tuple(facts["shape"]), GETSize(**facts["size"])
            model = cls(**facts)
            model.load_state_dict(stored)
        return model.to(device).eval()


def _sized(size: str | GETSize) -> GETSize:
    if isinstance(size, GETSize):
        return size
    name = NAMES.get(size, size)
    if name not in SIZES:
        raise ValueError(f"size: expected one of {', '.join(map(repr, (*SIZES, *NAMES)))} or a GETSize, got {size!r}")
    return SIZES[name]


def _check(shape: Any, size: GETSize, patch: Any, classes: Any, features: Any, noise_scale: float) -> None:
    if len(shape) != 3 or not all(isinstance(n, int) and n >= 1 for n in shape):
        raise ValueError(f"shape: expected (C, H, W), got {shape!r}")
    if not isinstance(patch, int) or patch < 1 or shape[1] % patch or shape[2] % patch:
        raise ValueError(f"patch: expected a divisor of H and W, {shape[1:]}, got {patch!r}")
    if size.width % 4 or size.width % size.heads or min(size.injection_depth + 1, size.equilibrium_depth) < 1:
        raise ValueError(f"size: expected a width that 4 and heads divide, and at least one block, got {size}")
    if min(classes, features) < 0 or (classes and features):
        raise ValueError(f"classes, features: expected one of them > 0 at most, got {classes!r}, {features!r}")
    if not 0 < noise_scale < math.inf:
        raise ValueError(f"noise_scale: expected a number > 0, got {noise_scale!r}")
