"""The equilibrium transformer: its sizes, its fixed point, its conditions and its files."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.distillation import GET, GETSize
from deqdiff_fast.distillation.get_blocks import InjectedAttention, grid_positions

SMALL = GETSize(width=16, injection_depth=1, equilibrium_depth=2, heads=2, equilibrium_ratio=2)


@pytest.fixture
def student():
    torch.manual_seed(0)
    model = GET((2, 8, 6), size=SMALL, tol=1e-5, max_steps=60)
    torch.nn.init.normal_(model.last.weight, std=0.1)  # untrained it says zero
    return model


@pytest.mark.parametrize(("size", "millions"), [("T", 8.6), ("tiny", 8.6), ("M", 19.2), ("S", 37.2), ("B", 62.2)])
def test_sizes_of_the_paper(size, millions):
    with torch.device("meta"):
        model = GET((3, 32, 32), size=size)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


def test_it_solves_for_the_fixed_point(student):
    noise = torch.randn(3, 2, 8, 6)
    sample, info = student(noise, return_info=True)
    assert sample.shape == noise.shape
    assert bool(info.converged.all())
    assert bool((info.spectral_radius() < 1).all())
    more, _ = student(noise, max_steps=200, return_info=True)
    torch.testing.assert_close(sample, more, rtol=1e-3, atol=1e-4)
    few, info = student(noise, max_steps=1, return_info=True)
    assert not bool(info.converged.any())
    assert float((few - more).norm()) > 1e-3 * float(more.norm())


def test_gradients_are_those_of_unrolling(student):
    noise, target = torch.randn(2, 2, 8, 6).double(), torch.randn(2, 2, 8, 6).double()
    grads = {}
    for gradient in ("implicit", "reversible", "unrolled"):
        student.double()
        student.gradient, student.solver = gradient, None
        student.tol = 1e-7
        sample = student(noise)
        found = torch.autograd.grad((sample - target).square().mean(), list(student.parameters()))
        grads[gradient] = torch.cat([g.flatten() for g in found])
    for gradient in ("implicit", "reversible"):
        assert float((grads[gradient] - grads["unrolled"]).norm() / grads["unrolled"].norm()) < 1e-3
    assert all(bool(g.isfinite().all()) for g in grads.values())


def test_samples_do_not_depend_on_each_other(student):
    noise = torch.randn(4, 2, 8, 6)
    together = student(noise)
    alone = torch.cat([student(noise[k : k + 1]) for k in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_patches_go_back_where_they_came_from():
    model = GET((3, 4, 8), size=SMALL, patch=2)
    inner = 12
    model.embed = torch.nn.Identity()
    noise = torch.randn(2, 3, 4, 8)
    model.injection = model.equilibrium = torch.nn.ModuleList()
    model.inject = torch.nn.Linear(inner, 48 * 2)
    model.positions = torch.zeros(())
    model.last_norm = model.last = torch.nn.Identity()
    x, _ = model._inject(noise, None)
    assert x.shape == (2, 8, inner)
    patches = x.view(2, 2, 4, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 4, 8)
    assert torch.equal(patches, noise)


def test_conditions():
    torch.manual_seed(0)
    noise = torch.randn(3, 2, 8, 6)
    labels, vectors = torch.tensor([0, 3, 3]), torch.randn(3, 5)
    for settings, condition in (({"classes": 4}, labels), ({"features": 5}, vectors)):
        model = GET((2, 8, 6), size=SMALL, **settings)
        torch.nn.init.normal_(model.last.weight, std=0.1)
        if model.label is not None:
            torch.nn.init.normal_(model.label.weight)
        one, other = model(noise, condition), model(noise, condition.flip(0))
        assert float((one[0] - other[0]).norm()) > 1e-3 * float(one[0].norm())
        torch.testing.assert_close(one[1], other[1])
        for wrong in (None, condition[:2], condition.double() if "classes" in settings else labels):
            with pytest.raises(ValueError, match=r"^condition: "):
                model(noise, wrong)
    with pytest.raises(ValueError, match=r"^condition: expected none"):
        GET((2, 8, 6), size=SMALL)(noise, labels)


def test_files(student, tmp_path):
    path = tmp_path / "student.safetensors"
    student.save(path, teacher="some model")
    again = GET.load(path)
    noise = torch.randn(2, 2, 8, 6)
    assert not again.training
    assert (again.tol, again.max_steps, again.size) == (student.tol, student.max_steps, student.size)
    assert torch.equal(again(noise), student(noise))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"GET\.save"):
        GET.load(path)
    with pytest.raises(FileNotFoundError):
        GET.load(tmp_path / "none")
    draft = tmp_path / "draft.safetensors"
    spectrum = dq.SpectralSlope(torch.ones(1, 4, 4), torch.eye(1))
    dq.ConvDraft(torch.linspace(0.99, 0.01, 20), "epsilon", spectrum, width=8, depth=1).save(draft)
    with pytest.raises(ValueError, match=r"GET\.save"):
        GET.load(draft)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"size": "huge"}, "size"), ({"size": GETSize(18, 1, 1, 2, 2)}, "size"), ({"patch": 3}, "patch"),
        ({"classes": 2, "features": 2}, "classes"), ({"noise_scale": 0}, "noise_scale"),
    ],
)  # fmt: skip
def test_refusals(settings, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        GET((2, 8, 6), **{"size": SMALL, **settings})
    with pytest.raises(ValueError, match=r"^shape: "):
        GET((8, 6), size=SMALL)
    with pytest.raises(ValueError, match=r"^noise: "):
        GET((2, 8, 6), size=SMALL)(torch.randn(2, 2, 6, 8))
    with pytest.raises(TypeError):
        GET((2, 8, 6), size=SMALL, depth=3)


def test_autocast(student):
    noise = torch.randn(2, 2, 8, 6)
    student.tol = 2e-2
    exact = student(noise)
    with torch.autocast("cpu", torch.bfloat16):
        sample, info = student(noise, return_info=True)
    assert sample.dtype == torch.float32
    assert bool(info.converged.all())
    torch.testing.assert_close(sample, exact, rtol=0.1, atol=0.1)
    sample.square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in student.parameters())


def test_attention_is_the_textbook_one():
    layer = InjectedAttention(8, 2).double()
    z, u = torch.randn(2, 5, 8).double(), torch.randn(2, 5, 24).double()
    q, k, v = (layer.qkv(z) + u).chunk(3, dim=2)
    heads = [(q[..., h] @ k[..., h].mT / 2).softmax(2) @ v[..., h] for h in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(layer(z, u), layer.out(torch.cat(heads, 2)))


def test_positions_differ():
    table = grid_positions(3, 4, 16)[0]
    assert table.shape == (12, 16)
    assert float((torch.cdist(table, table) + 10 * torch.eye(12)).min()) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half(student, dtype):
    noise = torch.randn(3, 2, 8, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = student(noise), student.to(dtype)(noise.to(dtype))
    assert found.dtype == dtype
    assert float((found.float() - expected).norm() / expected.norm()) < 0.05
    with pytest.raises(ValueError, match="max_steps: expected an int >= 1, got 0"):
        student(noise.to(dtype), max_steps=0)
