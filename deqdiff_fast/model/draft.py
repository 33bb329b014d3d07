"""A small network that predicts roughly what a diffusion model will, for `DEQSampler(draft=...)`.

Fixed: the best linear prediction for data of a known mean and power spectrum (`SpectralSlope`). Learned: what a few
layers add to it, for edges and textures are not Gaussian. `deqdiff_fast.distill` makes one from a model in minutes; any
other callable that is much cheaper than the model may take its place.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..schedule import SpectralSlope
from ..schedule.tables import PREDICTION_TYPES
from ..schedule.tensor_file import read_tensors, write_tensors, written_by
from .draft_conditions import Condition, ConditionEmbedding, Pooled, pool
from .draft_layers import DraftLayers, block_of
from .draft_levels import DraftLevels, interpolate

if TYPE_CHECKING:
    from typing_extensions import Self

WAVES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # frequencies of the sinusoidal embedding of a quarter of log-SNR
EMBEDDED = 64  # width of the embedding of noise level and conditions
TERMS = 8  # what `_level_terms` gives besides scales and shifts


class Draft(DraftLayers):
    """draft(x, t, **model_kwargs) -> prediction, for samples of any shape; untrained, the linear prediction.

    Args:
        levels: which noise level the model's times are, see `DraftLevels.of`.
        spectrum: of the model's samples about their mean; it sets the shape (C, ...).
        prediction_type: of the schedule, for those who ask; `levels` have the formula.
        mean: (C, ...), of the model's samples; None for 0.
        scale: their size, by which they are divided before the layers see them.
        conditions: what it sees of the model's keyword arguments.
        width: of the layers.
        depth: number of layers between the first and the last.
        block: elements that the convolutions see as channels, along each axis; () for a perceptron, None for what suits
            the shape.

    Raises:
        ValueError: a bad argument, by name.
    """

    def __init__(
        self, levels: DraftLevels, spectrum: SpectralSlope, prediction_type: str, *, mean: Tensor | None = None,
        scale: float = 1.0, conditions: tuple[Condition, ...] = (), width: int = 48, depth: int = 3,
        block: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        shape = spectrum.shape
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type: expected one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
        if mean is not None and tuple(mean.shape) != shape:
            raise ValueError(f"mean: expected the spectrum's shape {shape}, got {tuple(mean.shape)}")
        block = block_of(shape) if block is None else block
        maps = sum(condition.size for condition in conditions if condition.kind == "map")
        super().__init__(shape, width, depth, block, maps)
        self.spectrum, self.prediction_type, self.scale = spectrum, prediction_type, float(scale)
        self.conditions = conditions
        self._table: tuple[Any, Tensor] | None = None
        self.report: Any = None  # of `distill`, where it comes from there
        self.embed = ConditionEmbedding(conditions, EMBEDDED, shape[1:]) if conditions else None
        for name, value in levels._asdict().items():
            self.register_buffer(name, value.detach().float().cpu(), persistent=False)
        numbered = torch.equal(levels.times, torch.arange(len(levels.times), dtype=levels.times.dtype))
        self._numbered = numbered  # the times are 0, 1, 2 ..., so that they can be looked up
        variance = (spectrum.variance / self.scale**2).float()
        mean = torch.zeros(shape) if mean is None else mean.detach().float().cpu() / self.scale
        for name, value in (("waves", torch.tensor(WAVES)), ("variance", variance), ("mean", mean)):
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("excess", 1 - variance, persistent=False)
        for k, matrix in enumerate(spectrum.basis().matrices):
            self.register_buffer(f"basis{k}", matrix.float(), persistent=False)
        self.level = nn.Sequential(
            nn.Linear(1 + 2 * len(WAVES), EMBEDDED), nn.SiLU(), nn.Linear(EMBEDDED, 2 * width * (depth + 1))
        )
        self._scaled = self.scale != 1 or bool((levels.input_norm != 1).any())
        self._centred = bool((mean != 0).any())
        self._velocity = prediction_type == "v_prediction" and self.scale == 1 and levels.is_velocity()

    @property
    def last_timestep(self) -> float:
        """The largest of the model's times that it knows."""
        return float(self.get_buffer("times")[-1])

    def forward(self, x: Tensor, t: Tensor, *conditions: Any, **kwargs: Any) -> Tensor:
        """The prediction.

        Args:
            x: (n, C, ...), the model's input.
            t: (n,) the model's times, integers or floats.
            *conditions: ignored.
            **kwargs: the model's; what it was not made for is ignored.

        Returns:
            (n, C, ...) in the dtype of x.
        """
        return self.predict(x, t, pool(kwargs, len(x), self.shape[1:]) if self.embed is not None else {})

    def predict(self, x: Tensor, t: Tensor, pooled: Pooled) -> Tensor:
        """The same, with the keyword arguments as `draft_conditions.pool` makes them."""
        dtype, x = x.dtype, x.to(self.last.weight.dtype)
        level = self._level(t, pooled)
        shape = (-1, *[1] * len(self.shape))
        signal, noise, noise_to_signal, signal_to_noise, input_norm, of_input, of_velocity, of_mean = (
            level[:, k].view(shape) for k in range(TERMS)
        )
        if self._scaled:
            x = x * input_norm
        if self._centred:
            x = torch.addcmul(x, signal, self.get_buffer("mean"), value=-1)
        velocity = self._linear(x, noise_to_signal, signal_to_noise)
        denoised = torch.addcmul(signal * x, noise, velocity, value=-1)
        maps = self.embed.maps(pooled, x) if self.embed is not None else []
        velocity = velocity + self.correction([velocity, denoised, *maps], *level[:, TERMS:].chunk(2, 1))
        if not self._velocity:
            velocity = torch.addcmul(of_input * x, of_velocity, velocity)
        if self._centred:
            velocity = torch.addcmul(velocity, of_mean, self.get_buffer("mean"))
        return velocity.to(dtype)

    def output_size(self, t: Tensor) -> Tensor:
        """(n,) how far the output moves with the velocity a eps - b x0, and at least half of its own size: the unit in
        which predictions of different times, and of different types, are comparable."""
        terms = self._levels_at(t)
        log_snr, clean, noise = terms[0] + 2 * math.log(self.scale), terms[2] * self.scale, terms[3]
        moved = noise * log_snr.sigmoid().sqrt() - clean * (-log_snr).sigmoid().sqrt()
        return torch.maximum(moved.abs(), torch.hypot(clean, noise) / 2)

    def _level(self, t: Tensor, pooled: Pooled) -> Tensor:
        """(n, TERMS + 2 width (depth + 1)): all that depends on the noise level and the conditions alone.

        A draft is called on one sample at a time, over and over, and two fifths of its operations would go into these
        few numbers: for the schedule's own timesteps they are looked up.
        """
        embedded = None if self.embed is None else self.embed(pooled)
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.level.parameters())
        if embedded is not None or t.is_floating_point() or learning or torch.compiler.is_compiling():
            return self._level_terms(self._levels_at(t), embedded)
        if not self._numbered:
            return self._level_terms(self._levels_at(t), None)
        sources = (*self.level.parameters(), self.get_buffer("log_snr"))
        state = tuple((p.device, p.dtype, p.data_ptr(), 0 if p.is_inference() else p._version) for p in sources)
        if self._table is None or self._table[0] != state:
            self._table = state, self._level_terms(self._levels_at(self.get_buffer("times")), None)
        return self._table[1][t.long()]

    def _levels_at(self, t: Tensor) -> tuple[Tensor, ...]:
        """(n,) each: log-SNR of the data in units of `scale`, input_norm, clean and noise as in `DraftLevels`."""
        tables = [self.get_buffer(name) for name in DraftLevels._fields[1:]]
        if self._numbered and not t.is_floating_point():
            return tuple(table[t.long()] for table in tables)
        at = self.get_buffer("times")
        return tuple(interpolate(at, table, t.to(at.dtype)) for table in tables)

    def _level_terms(self, levels: tuple[Tensor, ...], embedded: Tensor | None) -> Tensor:
        """(n, TERMS + ...): signal, noise, noise / signal, signal / noise, input_norm; what the output takes of the
        input, of the velocity and of the mean; scales and shifts of the layers."""
        log_snr, input_norm, clean, of_noise = levels
        if self.scale != 1:
            input_norm = input_norm * (log_snr.sigmoid() * self.scale**2 + (-log_snr).sigmoid()).rsqrt()
            log_snr, clean = log_snr + 2 * math.log(self.scale), clean * self.scale
        signal, noise = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        outputs = [clean * signal + of_noise * noise, of_noise * signal - clean * noise, clean]
        hidden = self.level[0](self._embedding(log_snr))
        hidden = self.level[2](self.level[1](hidden if embedded is None else hidden + embedded))
        scales, shifts = hidden.chunk(2, 1)
        terms = torch.stack([signal, noise, noise / signal, signal / noise, input_norm, *outputs], 1)
        return torch.cat([terms, 1 + scales, shifts], 1)

    def _embedding(self, log_snr: Tensor) -> Tensor:
        """(n,) -> (n, 1 + 2 len(WAVES)), sinusoidal."""
        level = log_snr[:, None] / 4
        angles = level * self.get_buffer("waves")
        return torch.cat([level, angles.sin(), angles.cos()], 1)

    def _linear(self, x: Tensor, noise_to_signal: Tensor, signal_to_noise: Tensor) -> Tensor:
        """signal z - noise x0 as expected of x = signal x0 + noise z, were the data Gaussian (Wiener filter): in the
        basis of the spectrum, x times signal noise (1 - variance) / (signal^2 variance + noise^2)."""
        gain = self.get_buffer("excess") / torch.addcmul(noise_to_signal, signal_to_noise, self.get_buffer("variance"))
        matrices = [self.get_buffer(f"basis{k}") for k in range(len(self.shape))]
        return rotate(rotate(x, matrices) * gain, [matrix.T for matrix in matrices])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, weights in half precision. Raises OSError, and leaves what was there."""
        state = self.state_dict()
        tensors = {
            f"network.{name}": value.half() if name.endswith(("weight", "bias")) else value
            for name, value in state.items()
        }
        tensors |= {f"levels.{name}": self.get_buffer(name).float() for name in DraftLevels._fields}
        tensors |= {
            "variance": self.spectrum.variance, "channels": self.spectrum.channels,
            "mean": self.get_buffer("mean").float() * self.scale,
        }  # fmt: skip
        facts = {
            "prediction_type": self.prediction_type, "scale": self.scale, "width": self.width, "depth": self.depth,
            "block": self.block, "conditions": [[c.where, c.kind, c.size] for c in self.conditions],
        }  # fmt: skip
        write_tensors(tensors, path, {"draft": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> Draft:
        """Read a file that `save` wrote.

        Returns:
            The draft in eval mode, without gradients for its weights.

        Raises:
            ValueError: it is damaged, or another kind of file.
            OSError: it is not there, or may not be read.
        """
        with written_by("Draft.save", path):
            stored, metadata = read_tensors(path)
            facts = json.loads(metadata["draft"])
            levels = DraftLevels(*(stored.pop(f"levels.{name}") for name in DraftLevels._fields))
            spectrum = SpectralSlope(stored.pop("variance"), stored.pop("channels"))
            mean = stored.pop("mean")
            own = {name.removeprefix("network."): value.float() for name, value in stored.items()}
            if facts["width"] != len(own["first.weight"]):
                raise ValueError(f"its metadata {facts} are not those of weights of width {len(own['first.weight'])}")
            facts["conditions"] = tuple(Condition(*condition) for condition in facts["conditions"])
            facts["block"] = tuple(facts["block"])
            draft = Draft(levels, spectrum, facts.pop("prediction_type"), mean=mean, **facts)
            draft.load_state_dict(own)
        return draft.ready(device)

    def ready(self, device: torch.device | str) -> Self:
        """On that device, in eval mode, without gradients for its weights."""
        self.to(device)
        if len(self.block) == 2:  # channels last: a tenth faster on a CPU
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self.eval().requires_grad_(False)


def rotate(x: Tensor, matrices: list[Tensor]) -> Tensor:
    """x: (n, C, *axes), each axis but the first multiplied by its matrix."""
    n, c, *axes = shape = x.shape
    x = matrices[0] @ x.reshape(n, c, -1)
    for k, matrix in enumerate(matrices[1:]):
        x = (
            x.view(shape) @ matrix.T
            if k == len(axes) - 1
            else matrix @ x.view(n, -1, axes[k], math.prod(axes[k + 1 :]))
        )
    return x.view(shape)
