"""The ComfyUI node, against a small copy of the parts of ComfyUI that it meets."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

NODE = Path(__file__).resolve().parents[2] / "integrations" / "comfyui" / "__init__.py"


class KSAMPLER:
    """comfy.samplers.KSAMPLER: wraps the guider, scales the noise, forwards callbacks."""

    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None):
        extra_args = {**extra_args, "denoise_mask": denoise_mask}
        model = Inpaint(guider, noise, latent_image)
        total = len(sigmas) - 1
        forward = None if callback is None else lambda x: callback(x["i"], x["denoised"], x["x"], total)
        return self.sampler_function(
            model,
            noise * sigmas[0],
            sigmas,
            extra_args=extra_args,
            callback=forward,
            disable=True,
            **self.extra_options,
        )


class Inpaint:
    """comfy.samplers.KSamplerX0Inpaint."""

    def __init__(self, inner_model, noise, latent_image):
        self.inner_model, self.noise, self.latent_image = inner_model, noise, latent_image

    def __call__(self, x, sigma, denoise_mask, model_options={}, seed=None):  # noqa: B006, as in ComfyUI
        if denoise_mask is not None:
            wide = sigma.reshape(-1, 1, 1, 1)
            x = x * denoise_mask + (self.latent_image + wide * self.noise) * (1 - denoise_mask)
        out = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        return out if denoise_mask is None else out * denoise_mask + self.latent_image * (1 - denoise_mask)


class Guider:
    """comfy.samplers.CFGGuider with calc_cond_batch's way of repeating a condition to the rows of a call."""

    def __init__(self, network, cfg=3.0, **entry):
        self.network, self.cfg = network, cfg
        draw = torch.Generator().manual_seed(4)
        prompts = {name: torch.randn(1, 3, generator=draw) for name in ("positive", "negative")}
        self.conds = {name: [{"model_conds": {"c": SimpleNamespace(cond=p)}}] for name, p in prompts.items()}
        self.conds["positive"][0].update(entry)

    def __call__(self, x, sigma, model_options, seed):
        outs = []
        for name in ("positive", "negative"):
            cond = self.conds[name][0]["model_conds"]["c"].cond
            outs.append(self.network(x, sigma, cond.repeat(-(-len(x) // len(cond)), 1)[: len(x)]))
        return outs[1] + (outs[0] - outs[1]) * self.cfg


def network(x, sigma, cond):
    """The denoiser of one Gaussian whose mean comes from the prompt."""
    wide = sigma.reshape(-1, 1, 1, 1)
    mean = torch.tanh(cond)[:, :, None, None]
    return mean + torch.tanh(x - mean) * 0.4 / (0.4 + wide**2)


@pytest.fixture
def comfyui(monkeypatch):
    """The node module, imported beside a fake `comfy`."""
    comfy, samplers = ModuleType("comfy"), ModuleType("comfy.samplers")
    samplers.KSAMPLER = KSAMPLER
    comfy.samplers = samplers
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)
    spec = importlib.util.spec_from_file_location("comfyui_node", NODE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make(comfyui):
    """The node with its own defaults, as ComfyUI calls it."""

    def build(**changed):
        node = comfyui.NODE_CLASS_MAPPINGS["DEQSampler"]
        widgets = {k: v[1]["default"] if len(v) > 1 else v[0][0] for k, v in node.INPUT_TYPES()["required"].items()}
        (sampler,) = getattr(node(), node.FUNCTION)(**{**widgets, **changed})
        return sampler

    return build


SIGMAS = torch.cat([torch.logspace(1.1, -1.3, 16), torch.zeros(1)])


def serial(guider, noise, latent_image=None, denoise_mask=None):
    x, model = noise * SIGMAS[0], Inpaint(guider, noise, latent_image)
    for now, after in itertools.pairwise(SIGMAS):
        x = x + (x - model(x, now.expand(len(x)), denoise_mask)) / now * (after - now)
    return x


def test_the_node_follows_comfyuis_contract(comfyui, make, noise, relative_error):
    sampler, guider, steps = make(tol=1e-4), Guider(network), []
    assert isinstance(sampler, KSAMPLER)
    assert set(comfyui.NODE_DISPLAY_NAME_MAPPINGS) == set(comfyui.NODE_CLASS_MAPPINGS)
    got = sampler.sample(guider, SIGMAS, {"model_options": {}, "seed": 1}, lambda *step: steps.append(step), noise(2))
    assert relative_error(got, serial(guider, noise(2))).max() < 1e-3
    assert [(i, total) for i, _, _, total in steps] == [(i, 16) for i in range(16)]
    assert all(clean.shape == x.shape == (2, 3, 8, 8) for _, clean, x, _ in steps)


def test_a_noise_mask_works_for_one_image(make, noise, relative_error):
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    given = {"latent_image": noise(1, seed=7), "denoise_mask": mask}
    guider = Guider(network)
    got = make(tol=1e-4).sample(guider, SIGMAS, {"model_options": {}, "seed": 1}, None, noise(1), **given)
    assert relative_error(got, serial(guider, noise(1), **given)).max() < 1e-3
    with pytest.raises(ValueError, match="a noise mask works for one image at a time, got a batch of 2"):
        make().sample(guider, SIGMAS, {"model_options": {}}, None, noise(2), **given)
    options = {"model_options": {"denoise_mask_function": print}}
    with pytest.raises(ValueError, match="a mask that changes with the step"):
        make().sample(guider, SIGMAS, options, None, noise(1), **given)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"area": (4, 4, 0, 0)}, "the positive conditioning has an area"),
        ({"mask": torch.ones(1, 8, 8)}, "has a mask"),
        ({"timestep_start": 5.0}, "has a timestep range"),
        ({"timestep_end": 1.0}, "has a timestep range"),
        ({"control": object()}, "has a ControlNet"),
        ({"gligen": ("position", None, [])}, "has GLIGEN boxes"),
        ({"hooks": object()}, "has hooks"),
        (
            {"model_conds": {"c_crossattn": SimpleNamespace(cond=torch.zeros(2, 3))}},
            "has 2 rows in c_crossattn: a batch",
        ),
        ({"model_conds": {"c": SimpleNamespace(cond=[torch.zeros(2, 3)])}}, "has 2 rows in c: a batch"),
    ],
)
def test_conditioning_that_would_be_wrong_is_refused_before_any_call(make, noise, entry, message):
    def never(*args):
        raise AssertionError("the model must not be called")

    with pytest.raises(ValueError, match=f"DEQ Sampler: .*{message}"):
        make().sample(Guider(never, **entry), SIGMAS, {"model_options": {}}, None, noise(2))


def test_what_cannot_be_seen_in_the_conditioning_is_found_by_the_comparison(make, noise):
    def patched(x, sigma, cond):
        return network(x, sigma, cond) * (0.5 if sigma[0] > 2 else 1.0)

    with pytest.raises(ValueError, match="rows are not independent"):
        make().sample(Guider(patched), SIGMAS, {"model_options": {}}, None, noise(1))
    with pytest.raises(ValueError, match="SimpleNamespace has no conds to check"):
        make().sample(SimpleNamespace(), SIGMAS, {"model_options": {}}, None, noise(1))
