"""`deqdiff-fast distill`: a draft beside a diffusers model, found by `load_model`."""

from __future__ import annotations

import re

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.cli import main

diffusers = pytest.importorskip("diffusers")
SMALL = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A tiny model with random weights and its scheduler."""

    def make(scheduler, **settings):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = diffusers.UNet2DModel(**SMALL, **settings)
        unet.save_pretrained(tmp_path / "model" / "unet")
        scheduler.save_pretrained(tmp_path / "model" / "scheduler")
        return tmp_path / "model"

    return make


SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(num_train_timesteps=100, clip_sample=False),
    "offset, zero": lambda: diffusers.DDIMScheduler(
        num_train_timesteps=100, steps_offset=1, prediction_type="v_prediction", rescale_betas_zero_snr=True
    ),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "edm": lambda: diffusers.EDMEulerScheduler(),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_draft_is_made_and_found(folder, capsys, kind):
    model = folder(SCHEDULERS[kind]())
    assert main(["distill", str(model), "--minutes", "0.02", "--device", "cpu"]) == 0
    told = capsys.readouterr()
    assert re.search(r"rounds and [\d.]+ T evaluations with the draft.* It (pays|does not pay)", told.out, re.S)
    assert "draft.safetensors" in told.out
    assert "stage 3" in told.err
    loaded = dq.integrations.diffusers.load_model(model)
    assert loaded.draft is not None
    assert loaded.spectrum is not None
    schedule = dq.Schedule.from_diffusers(loaded.scheduler, 10)
    sampler = dq.DEQSampler(loaded.model, schedule, solver="draft", draft=loaded.draft, tol=1e-3)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * schedule.init_noise_sigma
    with torch.no_grad():
        found, expected = sampler.sample(noise), sampler.serial(noise)
    assert found.converged.all()
    assert float((found.sample - expected.sample).norm() / expected.sample.norm()) < 1e-2
    assert main(["sample", "--model", str(model), "--steps", "10", "--batch", "1", "--solver", "auto",
                 "--out", str(model / "x.png")]) == 0  # fmt: skip


def test_classes(folder, capsys):
    model = folder(SCHEDULERS["ddim"](), num_class_embeds=3)
    assert main(["distill", str(model), "--minutes", "0.02", "--device", "cpu"]) == 0
    draft = dq.integrations.diffusers.load_model(model).draft
    assert [(c.where, c.kind, c.size) for c in draft.conditions] == [("class_labels", "label", 3)]


def test_what_is_refused(folder, tmp_path, capsys):
    model = folder(SCHEDULERS["ddim"](), class_embed_type="timestep")
    assert main(["distill", str(model)]) == 2
    assert "the command line knows class labels" in capsys.readouterr().err
    assert main(["distill", "bundled"]) == 2
    assert "say with --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["distill", str(model), "--minutes", "0"])
    assert "expected a number > 0" in capsys.readouterr().err
