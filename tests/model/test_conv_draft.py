"""The draft to train: linear before it is trained, the same in every prediction type, and on disk what it was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import deqdiff_fast as dq
from deqdiff_fast.model.draft_levels import DraftLevels

SHAPE = (3, 8, 8)


def spectrum() -> dq.SpectralSlope:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(30, *SHAPE, generator=draw)
    return dq.SpectralSlope.fit(x + 3 * x.mean((2, 3), keepdim=True))


def trained(abar, prediction: str = "epsilon", **sizes) -> dq.ConvDraft:
    """Weights that are not zero."""
    torch.manual_seed(1)
    draft = dq.ConvDraft(abar, prediction, spectrum(), **({"width": 8, "depth": 2} | sizes)).requires_grad_(False)
    for parameter in draft.parameters():
        parameter.copy_(0.1 * torch.randn_like(parameter))
    return draft


@pytest.fixture
def abar(ddim) -> torch.Tensor:
    return (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_untrained_it_is_the_linear_prediction(abar, ddim, noise, prediction):
    schedule, slope = ddim(10, prediction_type=prediction), spectrum()
    draft, x = dq.ConvDraft(abar, prediction, slope, 8, 1), noise(2)
    basis, table = slope.basis(), slope.slope(schedule)
    for i, t in enumerate(schedule.timesteps.tolist()):
        expected = basis.inverse(table[i] * basis.forward(x.double().flatten(1))).view_as(x)
        found = draft(x, torch.full((2,), t)).detach()
        assert torch.allclose(found.double(), expected, atol=2e-5 * float(expected.abs().max()) + 1e-5)


def test_prediction_types_say_the_same(abar, noise):
    x, t = noise(3), torch.tensor([3, 500, 999])
    denoised = {}
    alpha, sigma = (root[t].float()[:, None, None, None] for root in (abar.sqrt(), (1 - abar).sqrt()))
    for kind in ("epsilon", "v_prediction", "sample"):
        output = trained(abar, kind)(x, t)
        denoised[kind] = {
            "epsilon": lambda e: (x - sigma * e) / alpha, "v_prediction": lambda v: alpha * x - sigma * v,
            "sample": lambda c: c,
        }[kind](output) * alpha  # fmt: skip
    assert torch.allclose(denoised["epsilon"], denoised["sample"], atol=1e-4)
    assert torch.allclose(denoised["v_prediction"], denoised["sample"], atol=1e-4)


def test_it_is_on_disk_what_it_was(abar, noise, tmp_path):
    draft = trained(abar, "v_prediction", width=6, depth=1)
    draft.save(tmp_path / "draft.safetensors")
    again = dq.ConvDraft.load(tmp_path / "draft.safetensors")
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    x, t = noise(2), torch.tensor([10, 900])
    assert torch.allclose(again(x, t), draft(x, t), atol=1e-2)  # half precision
    assert (again.width, again.depth, again.prediction_type) == (6, 1, "v_prediction")
    spectrum().save(tmp_path / "spectrum.safetensors")
    with pytest.raises(ValueError, match=r"ConvDraft\.save"):
        dq.ConvDraft.load(tmp_path / "spectrum.safetensors")


def change(stored, facts, kind):
    """What a file of another version, or one that was mended by hand, may hold."""
    return {
        "unknown fact": (stored, facts | {"frob": 1}),
        "no width": (stored, {"prediction_type": "epsilon", "depth": 2}),
        "another width": (stored, facts | {"width": 10**9}),
        "another depth": (stored, facts | {"depth": 3}),
        "a list": (stored, [1, 2]),
        "another prediction": (stored, facts | {"prediction_type": "flow"}),
        "no weight": ({k: v for k, v in stored.items() if k != "network.last.bias"}, facts),
        "a weight more": (stored | {"network.extra": torch.ones(1)}, facts),
        "another weight": (stored | {"network.last.bias": torch.ones(3)}, facts),
        "NaN": (stored | {"network.last.bias": stored["network.last.bias"] * float("nan")}, facts),
        "no noise schedule": (stored | {"alphas_cumprod": torch.ones(0)}, facts),
        "odd size": (stored | {"variance": torch.ones(3, 7, 7)}, facts),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["unknown fact", "no width", "another width", "another depth", "a list", "another prediction", "no weight",
     "a weight more", "another weight", "NaN", "no noise schedule", "odd size"],
)  # fmt: skip
def test_files_of_another_version_are_refused(abar, tmp_path, kind):
    path = tmp_path / "draft.safetensors"
    trained(abar).save(path)
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()["conv_draft"])
    dq.ConvDraft.load(path)
    tensors, changed = change(stored, facts, kind)
    save_file(tensors, path, metadata={"conv_draft": json.dumps(changed)})
    with pytest.raises(ValueError, match=r"draft\.safetensors: expected a file that ConvDraft\.save wrote"):
        dq.ConvDraft.load(path)


def test_rows_times_and_dtypes(abar, noise):
    draft, x = trained(abar), noise(4)
    t = torch.tensor([0, 1, 500, 999])
    alone = torch.cat([draft(x[k : k + 1], t[k : k + 1]) for k in range(4)])
    assert torch.allclose(draft(x, t), alone, atol=1e-5)
    assert torch.allclose(draft(x, t.float()), alone, atol=1e-4)
    interpolated = draft(x[:1], torch.tensor([500.5]))
    assert not torch.allclose(interpolated, draft(x[:1], torch.tensor([500])), atol=1e-7)
    assert draft(x.bfloat16(), t).dtype == torch.bfloat16
    assert torch.allclose(draft(x, t, torch.ones(4, 5), labels=torch.ones(4)), draft(x, t))


def test_what_is_refused(abar):
    with pytest.raises(ValueError, match="prediction_type: expected"):
        dq.ConvDraft(abar, "flow", spectrum())
    with pytest.raises(ValueError, match="even H and W"):
        dq.ConvDraft(abar, "epsilon", dq.SpectralSlope.fit(torch.randn(5, 3, 7, 8)))
    with pytest.raises(ValueError, match="alphas_cumprod: expected"):
        dq.ConvDraft(torch.cat([abar, abar.new_zeros(1)]), "epsilon", spectrum())


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen, self.launched = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        if not func.is_view and "unsafe_view" not in str(func):
            self.launched.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "count"), [("v_prediction", 32), ("epsilon", 34), ("sample", 34)])
def test_a_call_is_so_many_operations(abar, kind, count):
    """What a device launches, as docs/gpu.md counts them for the bundled draft: views apart."""
    draft = trained(abar, kind, depth=3)
    x, t = torch.randn(1, *SHAPE), torch.tensor([500])
    draft(x, t)
    with Operations() as seen:
        draft(x, t)
    assert len(seen.launched) == count, seen.launched


def test_what_depends_on_the_timestep_alone_is_looked_up(abar, noise):
    """Until the weights change; a draft that learns is not looked up."""
    draft, x, t = trained(abar), noise(2), torch.tensor([10, 900])
    first = draft(x, t)
    with Operations() as count:
        assert torch.equal(draft(x, t), first)
    assert not any("sigmoid" in name or "addmm" in name for name in count.seen)
    exact = draft(x, t.double())
    torch.testing.assert_close(first, exact, rtol=1e-4, atol=1e-4)
    draft.level[2].bias.add_(0.1)
    changed = draft(x, t)
    assert not torch.allclose(changed, first, atol=1e-4)
    torch.testing.assert_close(changed, draft(x, t.double()), rtol=1e-4, atol=1e-4)
    draft.load_state_dict(trained(abar).state_dict())
    torch.testing.assert_close(draft(x, t), first, rtol=0, atol=0)
    draft.requires_grad_(True)
    draft(x, t).square().sum().backward()
    assert float(draft.level[0].weight.grad.abs().sum()) > 0
    with torch.no_grad():
        draft.double()
        assert draft(x.double(), t).dtype == torch.float64
        torch.testing.assert_close(draft(x.double(), t).float(), first, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("scale", [1.0, 0.3, 40.0])
def test_a_general_draft_begins_as_the_linear_prediction(kind, scale):
    """Of Gaussian data of any size about any mean, in any coordinates, at any times."""
    draw = torch.Generator().manual_seed(0)
    samples = scale * (torch.randn(40, 2, 70, generator=draw).cumsum(-1) / 8 + 3)
    slope, mean = dq.SpectralSlope.fit(samples), samples.mean(0)
    sigmas = torch.cat([torch.logspace(1.5, -1, 30) * scale, torch.zeros(1)])
    schedules = [dq.Schedule.from_sigmas(sigmas, prediction_type=kind)]
    if kind == "flow":
        schedules.append(dq.Schedule.from_sigmas(torch.linspace(0.99, 0, 31), flow=True))
    for schedule in schedules:
        size = float((samples - mean).square().mean().sqrt())
        draft = dq.Draft(DraftLevels.of(schedule), slope, kind, mean=mean, scale=size, width=8, depth=1)
        table, basis = slope.slope(schedule), slope.basis()
        for i in (0, 7, 20, 29):
            p, q = schedule.denoised_coef()[i]
            about = schedule.signal[i] * mean.double()
            state = about + (schedule.sigma[i] + scale) * torch.randn(2, 2, 70, generator=draw).double()
            inner = basis.inverse(table[i] * basis.forward((state - about).flatten(1))).view_as(state)
            expected = inner + ((1 - p * schedule.signal[i]) / q) * mean
            found = draft((state * schedule.input_scale[i]).float(), schedule.timesteps[i].expand(2))
            assert float((found.double() - expected).norm() / expected.norm()) < 1e-4, (kind, i)


def test_the_bundled_draft_predicts_what_it_always_did():
    """Numbers of the release that wrote its file."""
    pytest.importorskip("diffusers")
    from deqdiff_fast.integrations.diffusers import bundled_model

    draft = dq.ConvDraft.load(bundled_model() / "draft.safetensors")
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole, between = draft(x, torch.tensor([0, 17, 500, 999])), draft(x, torch.tensor([0.0, 17.5, 500.25, 999.0]))
    assert torch.allclose(whole.flatten()[:4], torch.tensor([11.4955, -24.2502, 6.3835, 3.4579]), atol=2e-3)
    assert float(whole.double().square().sum()) == pytest.approx(2883355.17, rel=1e-5)
    assert float(between.double().square().sum()) == pytest.approx(2872255.38, rel=1e-5)
