"""The paper's settings, on random networks with the architecture of the hub checkpoints (nothing is downloaded)."""

from __future__ import annotations

import re

import diffusers
import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.cli import main
from deqdiff_fast.integrations.diffusers import ddim_schedule, load_model
from deqdiff_fast.presets import PRESETS, preset

# config.json of google/ddpm-cifar10-32 and of google/ddpm-ema-{celebahq,bedroom,church}-256
COMMON = {
    "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "act_fn": "silu", "attention_head_dim": None,
    "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "norm_num_groups": 32,
    "mid_block_scale_factor": 1, "center_input_sample": False, "time_embedding_type": "positional",
}  # fmt: skip
CIFAR = COMMON | {
    "sample_size": 32, "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
LARGE = COMMON | {
    "sample_size": 256, "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
}  # fmt: skip
PARAMETERS = {"cifar10": 35_746_307, "celeba": 113_673_219, "bedroom": 113_673_219, "church": 113_673_219}


def scheduler():
    return diffusers.DDPMScheduler(clip_sample=True, variance_type="fixed_large")  # linear betas, 1e-4 to 0.02


@pytest.fixture(scope="module")
def networks():
    """The two architectures, random. A network for 256x256 is convolutional: here it draws 32x32."""
    torch.manual_seed(0)
    small, large = diffusers.UNet2DModel(**CIFAR), diffusers.UNet2DModel(**LARGE | {"sample_size": 32})
    return {name: (small if name == "cifar10" else large).eval().requires_grad_(False) for name in PRESETS}


@pytest.mark.parametrize(
    ("name", "model", "steps", "spacing"),
    [
        ("cifar10", "google/ddpm-cifar10-32", 1000, "quad"),
        ("celeba", "google/ddpm-ema-celebahq-256", 500, "leading"),
        ("bedroom", "google/ddpm-ema-bedroom-256", 25, "leading"),
        ("church", "google/ddpm-ema-church-256", 25, "leading"),
    ],
)
def test_settings_of_the_paper(name, model, steps, spacing):
    chosen = preset(name)
    assert (chosen.model, chosen.steps, chosen.spacing, chosen.eta) == (model, steps, spacing, 0)
    schedule = ddim_schedule(scheduler(), chosen.steps, spacing=chosen.spacing, clip=False)
    assert schedule.num_steps == steps
    assert schedule.clip is None
    assert int(schedule.timesteps[-1]) == 0
    sampler = dq.DEQSampler(
        lambda x, t: x, schedule, solver=chosen.solver, tol=chosen.tol, max_rounds=chosen.max_rounds
    )
    solver = sampler.solver
    assert (solver.history, solver.scope, solver.ridge, solver.relative_ridge) == (5, "timestep", 1e-3, False)
    assert (solver.damping, solver.guess) == (1.0, "copy")
    assert (chosen.tol, chosen.max_rounds) == (1e-3, 15)


def test_quad_spacing_is_the_papers():
    """int(k^2) for T points k evenly spaced from 0 to sqrt(0.8 N), as in the DDIM code."""
    steps = ddim_schedule(scheduler(), 1000, spacing="quad", clip=False).timesteps.tolist()
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == 0
    assert steps[0] in (799, 800)
    assert steps[499] == int((500 / 999) ** 2 * 800)


def test_unknown_preset():
    with pytest.raises(ValueError, match="cifar10, celeba, bedroom, church"):
        preset("imagenet")


@pytest.mark.parametrize("name", PRESETS)
def test_architecture(networks, name):
    assert sum(p.numel() for p in networks[name].parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["cifar10", "church"])
def test_few_steps_on_the_architecture(networks, name, noise, relative_error):
    """The preset's solver, spacing and tolerance, with the chain cut to 4 timesteps."""
    chosen = preset(name)
    schedule = ddim_schedule(scheduler(), 4, eta=chosen.eta, spacing=chosen.spacing, clip=False)
    sampler = dq.DEQSampler(
        networks[name], schedule, solver=chosen.solver, tol=chosen.tol, max_rounds=chosen.max_rounds
    )
    start = noise(1, (3, 32, 32))
    out, reference = sampler.sample(start), sampler.serial(start)
    assert out.converged.all()
    assert out.stats.rounds <= 4
    assert not out.stats.finished_serially
    assert relative_error(out.sample, reference.sample).max() <= 1e-2


def test_preset_from_the_command_line(networks, tmp_path, monkeypatch, capsys):
    """A flat folder, as the hub repositories are laid out; options win over the preset."""
    networks["cifar10"].save_pretrained(tmp_path / "flat")
    scheduler().save_pretrained(tmp_path / "flat")
    assert load_model(tmp_path / "flat").info.scheduler_class == "DDPMScheduler"
    monkeypatch.chdir(tmp_path)
    options = ["--preset", "cifar10", "--model", "flat", "--steps", "3", "--batch", "1", "--compare-serial"]
    assert main(["sample", *options]) == 0
    out = capsys.readouterr().out
    assert re.search(r"1 image, 3 timesteps, solver deq-ddim", out)
    assert float(re.search(r"relative error (\S+),", out)[1]) <= 1e-2
