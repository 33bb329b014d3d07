"""The draft of a DDPM noise schedule over images, as the bundled model has one; `draft.Draft` is the general one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ..schedule import SpectralSlope
from ..schedule.tensor_file import read_tensors, write_tensors, written_by
from .draft import Draft
from .draft_levels import DraftLevels

PREDICTIONS = ("epsilon", "v_prediction", "sample")
BLOCK = (2, 2)  # pixels that the convolutions see as channels


class ConvDraft(Draft):
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
        shape = spectrum.shape
        if prediction_type not in PREDICTIONS:
            raise ValueError(f"prediction_type: expected one of {', '.join(PREDICTIONS)}, got {prediction_type!r}")
        if len(shape) != 3 or shape[1] % BLOCK[0] or shape[2] % BLOCK[1]:
            raise ValueError(f"spectrum: expected one of images (C, H, W) with even H and W, got {shape}")
        inside = (alphas_cumprod > 0) & (alphas_cumprod < 1)
        if alphas_cumprod.dim() != 1 or not inside.numel() or not bool(inside.all()):
            raise ValueError("alphas_cumprod: expected values between 0 and 1 of shape (N,)")
        alphas = alphas_cumprod.detach().cpu().double()
        levels = DraftLevels.of_alphas(alphas, prediction_type)
        super().__init__(levels, spectrum, prediction_type, width=width, depth=depth, block=BLOCK)
        self.register_buffer("alphas_cumprod", alphas.float())

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
        return draft.ready(device)
