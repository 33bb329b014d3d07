"""A small network that predicts roughly what a diffusion model will, for `DEQSampler(draft=...)`.

Fixed: the best linear prediction for data of a known power spectrum (`SpectralSlope`). Learned: what a few convolutions
add to it, for edges and textures are not Gaussian. Any other callable that is much cheaper than the model may take its
place; `examples/distill_draft.py` makes one of these from a model in minutes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..schedule import SpectralSlope
from ..schedule.tensor_file import read_tensors, write_tensors, written_by

PREDICTIONS = ("epsilon", "v_prediction", "sample")
PATCH = 2  # pixels of a block that the convolutions see as channels
BASIS = ("channels", "rows", "columns")
WAVES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # frequencies of the sinusoidal embedding of a quarter of log-SNR


class ConvDraft(nn.Module):
    """draft(x, t) -> prediction, for images or latents of a DDPM noise schedule; untrained, the linear prediction.

    Args:
        alphas_cumprod: (N,) in (0, 1), the model's.
        prediction_type: what the model predicts, "epsilon", "v_prediction" or "sample".
        spectrum: of the model's samples; it sets the shape (C, H, W), H and W even.
        width: channels of the convolutions.
        depth: number of convolutions between the first and the last.

    Raises:
        ValueError: a bad argument, by name.
    """

    def __init__(
        self, alphas_cumprod: Tensor, prediction_type: str, spectrum: SpectralSlope, width: int = 48, depth: int = 3
    ) -> None:
        super().__init__()
        shape = spectrum.shape
        if prediction_type not in PREDICTIONS:
            raise ValueError(f"prediction_type: expected one of {', '.join(PREDICTIONS)}, got {prediction_type!r}")
        if len(shape) != 3 or shape[1] % PATCH or shape[2] % PATCH:
            raise ValueError(f"spectrum: expected one of images (C, H, W) with even H and W, got {shape}")
        inside = (alphas_cumprod > 0) & (alphas_cumprod < 1)
        if alphas_cumprod.dim() != 1 or not inside.numel() or not bool(inside.all()):
            raise ValueError("alphas_cumprod: expected values between 0 and 1 of shape (N,)")
        self.prediction_type, self.spectrum, self.width, self.depth = prediction_type, spectrum, width, depth
        alphas = alphas_cumprod.detach().double().cpu()
        self.register_buffer("alphas_cumprod", alphas.float())
        self.register_buffer("log_snr", (alphas / (1 - alphas)).log().float(), persistent=False)
        self.register_buffer("waves", torch.tensor(WAVES), persistent=False)
        self.register_buffer("variance", spectrum.variance.float(), persistent=False)
        self.register_buffer("excess", 1 - spectrum.variance.float(), persistent=False)
        self._table: tuple[Any, Tensor] | None = None
        basis = spectrum.basis()
        for name, matrix in zip(BASIS, basis.matrices):
            self.register_buffer(name, matrix.float(), persistent=False)
        blocks = shape[0] * PATCH**2
        self.first = nn.Conv2d(2 * blocks, width, 3, padding=1)
        self.inner = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.last = nn.Conv2d(width, blocks, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]
        self.level = nn.Sequential(nn.Linear(1 + 2 * len(WAVES), 64), nn.SiLU(), nn.Linear(64, 2 * width * (depth + 1)))

    def forward(self, x: Tensor, t: Tensor, *conditions: Any, **more: Any) -> Tensor:
        """The prediction.

        Args:
            x: (n, C, H, W).
            t: (n,) timesteps, integers or floats between them.
            *conditions, **more: ignored; a draft is called as the model is.

        Returns:
            (n, C, H, W) in the dtype of x.
        """
        dtype, x = x.dtype, x.to(self.last.weight.dtype)
        level = self._level(t)
        signal, noise, *ratios = (level[:, k, None, None, None] for k in range(4))
        scales, shifts = level[:, 4:, None, None].chunk(2, 1)
        scale, shift = scales.chunk(self.depth + 1, 1), shifts.chunk(self.depth + 1, 1)
        velocity = self._linear(x, *ratios)
        denoised = torch.addcmul(signal * x, noise, velocity, value=-1)
        hidden = self.first(F.pixel_unshuffle(torch.cat([velocity, denoised], 1), PATCH))
        hidden = F.silu(torch.addcmul(shift[0], hidden, scale[0]))
        for k, conv in enumerate(self.inner, 1):
            hidden = hidden + F.silu(torch.addcmul(shift[k], conv(hidden), scale[k]))
        velocity = velocity + F.pixel_shuffle(self.last(hidden), PATCH)
        if self.prediction_type == "epsilon":
            velocity = torch.addcmul(noise * x, signal, velocity)
        elif self.prediction_type == "sample":
            velocity = torch.addcmul(signal * x, noise, velocity, value=-1)
        return velocity.to(dtype)

    def _level(self, t: Tensor) -> Tensor:
        """(n, 4 + 2 width (depth + 1)): all that depends on the noise level alone, see `_level_terms`.

        A draft is called on one sample at a time, over and over, and two fifths of its operations would go into these
        few numbers: for the schedule's own timesteps they are looked up.
        """
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.level.parameters())
        if t.is_floating_point() or learning or torch.compiler.is_compiling():
            return self._level_terms(self._log_snr(t))
        sources = (*self.level.parameters(), self.get_buffer("log_snr"))
        state = tuple((p.device, p.dtype, p.data_ptr(), 0 if p.is_inference() else p._version) for p in sources)
        if self._table is None or self._table[0] != state:
            self._table = state, self._level_terms(self.get_buffer("log_snr"))
        return self._table[1][t.long()]

    def _level_terms(self, log_snr: Tensor) -> Tensor:
        """(n,) -> signal, noise, noise / signal, signal / noise, and scales and shifts of the convolutions."""
        signal, noise = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        scales, shifts = self.level(self._embedding(log_snr)).chunk(2, 1)
        terms = torch.stack([signal, noise, noise / signal, signal / noise], 1)
        return torch.cat([terms, 1 + scales, shifts], 1)

    def _log_snr(self, t: Tensor) -> Tensor:
        """(n,) log(alpha / (1 - alpha)), linear between the schedule's own timesteps."""
        table = self.get_buffer("log_snr")
        if not t.is_floating_point():
            return table[t.long()]
        below = t.floor().long().clamp(0, len(table) - 2)
        return torch.lerp(table[below], table[below + 1], (t - below).to(table.dtype))

    def _embedding(self, log_snr: Tensor) -> Tensor:
        """(n,) -> (n, 1 + 2 len(WAVES)), sinusoidal."""
        level = log_snr[:, None] / 4
        angles = level * self.get_buffer("waves")
        return torch.cat([level, angles.sin(), angles.cos()], 1)

    def _linear(self, x: Tensor, noise_to_signal: Tensor, signal_to_noise: Tensor) -> Tensor:
        """signal z - noise x0 as expected of x = signal x0 + noise z, were the data Gaussian (Wiener filter): in the
        basis of the spectrum, x times signal noise (1 - variance) / (signal^2 variance + noise^2)."""
        variance, matrices = self.get_buffer("variance"), [self.get_buffer(name) for name in BASIS]
        gain = self.get_buffer("excess") / torch.addcmul(noise_to_signal, signal_to_noise, variance)
        return self._rotate(self._rotate(x, *matrices) * gain, *(matrix.T for matrix in matrices))

    @staticmethod
    def _rotate(x: Tensor, channels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return rows @ (channels @ x.reshape(n, c, h * w)).view(n, c, h, w) @ columns.T

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, weights in half precision. Raises OSError, and leaves what was there."""
        state = {f"network.{name}": value.half() for name, value in self.state_dict().items() if "alphas" not in name}
        tables = {
            "alphas_cumprod": self.get_buffer("alphas_cumprod"), "variance": self.spectrum.variance.float(),
            "channels": self.spectrum.channels,
        }  # fmt: skip
        facts = {"prediction_type": self.prediction_type, "width": self.width, "depth": self.depth}
        write_tensors(state | tables, path, {"conv_draft": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> ConvDraft:
        """Read a file that `save` wrote.

        Returns:
            The draft in eval mode, without gradients for its weights.

        Raises:
            ValueError: it is damaged, or another kind of file.
            OSError: it is not there, or may not be read.
        """
        with written_by("ConvDraft.save", path):
            stored, metadata = read_tensors(path)
            facts = json.loads(metadata["conv_draft"])
            spectrum = SpectralSlope(stored.pop("variance"), stored.pop("channels"))
            alphas = stored.pop("alphas_cumprod")
            own = {name.removeprefix("network."): value.float() for name, value in stored.items()}
            depth = sum(name.startswith("inner.") and name.endswith(".weight") for name in own)
            sizes = {"width": len(own["first.weight"]), "depth": depth}
            if facts != {**sizes, "prediction_type": facts["prediction_type"]}:
                raise ValueError(f"its metadata {facts} are not those of weights of {sizes}")
            draft = cls(alphas, spectrum=spectrum, **facts)
            draft.load_state_dict({"alphas_cumprod": draft.alphas_cumprod, **own})
        # channels last: a tenth faster on a CPU
        draft.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return draft.eval().requires_grad_(False)
