"""The networks of the GPU benchmark, and the serial chain as one would write it by hand: the baseline to beat."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

import deqdiff_fast as dq
from deqdiff_fast.integrations.diffusers import bundled_model
from deqdiff_fast.model.stand_in import load_draft
from deqdiff_fast.schedule.tensor_file import read_tensors

from ._plain_unet import PlainUNet
from ._problems import ABAR, TRAIN_STEPS

_UNET: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "act_fn": "silu", "attention_head_dim": None, "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # config.json of google/ddpm-cifar10-32: 35.7 M parameters
    "cifar10": _UNET | {
        "sample_size": 32, "layers_per_block": 2, "norm_num_groups": 32, "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    # the same kind, small enough for a test
    "tiny": _UNET | {
        "sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4, "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False,
    },
}  # fmt: skip
NAMES = ("bundled", *ARCHITECTURES)


def load(name: str, device: str) -> tuple[nn.Module, tuple[int, ...], str, dict[str, Any]]:
    """The model, the shape of a sample, what it predicts, and what a sampler is given beside it; without diffusers.

    All but "bundled" have random weights, and neither spectrum nor draft.
    """
    if name == "bundled":
        folder = bundled_model()
        config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        net = PlainUNet(**config)
        weights, _ = read_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors")
        net.load_state_dict({key: value.float() for key, value in weights.items()})
        spectrum = dq.SpectralSlope.load(folder / "spectrum.safetensors")
        aids = {"spectrum": spectrum, "draft": load_draft(folder / "draft.safetensors", device=device)}
    else:
        config, scheduler, aids = ARCHITECTURES[name], {"prediction_type": "epsilon"}, {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = PlainUNet(**config)
    size = config["sample_size"]
    model = net.eval().requires_grad_(False).to(device)
    return model, (config["in_channels"], size, size), scheduler["prediction_type"], aids


def schedule(steps: int, prediction_type: str) -> dq.Schedule:
    """DDIM, leading spacing."""
    timesteps = torch.arange(steps).flip(0) * (TRAIN_STEPS // steps)
    return dq.Schedule.ddim(ABAR, timesteps, prediction_type=prediction_type)


class Chain:
    """x <- a_i x + b_i model(x, t_i), one step after the other, with nothing else on the way: no library of ours.

    graph: one step is captured as a CUDA graph, its position in the chain a number on the device, and replayed T times.
    """

    def __init__(self, model: nn.Module, schedule: dq.Schedule, noise: Tensor, graph: bool = False) -> None:
        self.model, self.steps, self.noise = model, schedule.num_steps, noise
        device = noise.device
        self.times = schedule.timesteps.to(device)
        self.a = schedule.state_coef[:, 0].to(device, noise.dtype)
        self.b = schedule.model_coef[:, 0].to(device, noise.dtype)
        self.x, self.at = noise.clone(), torch.zeros(1, dtype=torch.int64, device=device)
        self.replay: Any = None
        if graph:
            self.reset()
            for _ in range(3):
                self.step()
            recorded: Any = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                self.step()
            self.replay = recorded.replay

    def reset(self) -> None:
        self.x.copy_(self.noise)
        self.at.zero_()

    def step(self) -> None:
        out = self.model(self.x, self.times[self.at].expand(len(self.x)))
        self.x.copy_(self.a[self.at] * self.x + self.b[self.at] * out)
        self.at.add_(1).clamp_(max=self.steps - 1)

    def run(self) -> Tensor:
        self.reset()
        for _ in range(self.steps):
            self.replay() if self.replay is not None else self.step()
        return self.x
