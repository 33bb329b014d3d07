"""Guidance: both branches in one call, against the two calls written out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import deqdiff_fast as dq


@pytest.fixture
def prompted(mixture):
    """A model that takes a conditioning (n, 4), and remembers the sizes of its calls."""

    class Prompted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.sizes = mixture(), []
            self.weight = torch.nn.Parameter(torch.randn(4, 192, generator=torch.Generator().manual_seed(3)) * 0.1)

        def forward(self, x, t, emb, nested=None, gain=1.0, mark=None):
            assert len(emb) == len(x)
            self.sizes.append(len(x))
            push = emb.to(x.dtype) @ self.weight.to(x.dtype)
            if nested is not None:
                push = push + nested["pool"].to(x.dtype)[:, :1]
            return self.inner(x, t) + gain * torch.tanh(push).view_as(x)

    return Prompted()


@pytest.fixture
def prompts():
    draw = torch.Generator().manual_seed(5)
    return torch.randn(3, 4, generator=draw), torch.randn(1, 4, generator=draw)


def by_hand(model, schedule, x, cond, uncond, scale, rescale):
    """The serial chain with two calls a step; rescaling as in diffusers' rescale_noise_cfg."""
    for i in range(schedule.num_steps):
        t = schedule.timesteps[i].expand(len(x))
        text, free = model(x, t, cond), model(x, t, uncond.expand(len(x), -1))
        factor = scale.view(-1, 1, 1, 1) if isinstance(scale, torch.Tensor) else scale
        out = free + factor * (text - free)
        axes = list(range(1, x.dim()))
        rescaled = out * (text.std(dim=axes, keepdim=True) / out.std(dim=axes, keepdim=True))
        out = rescale * rescaled + (1 - rescale) * out
        x = schedule.state_coef[i, 0] * x + schedule.model_coef[i, 0] * out
    return x


@pytest.mark.parametrize(
    ("scale", "rescale"),
    [(3.0, 0.0), (7.5, 0.7), (0.0, 0.0), (1.0, 0.0), (torch.tensor([1.0, 4.0, -0.5]), 0.3)],
    ids=["plain", "rescaled", "zero", "one", "per-sample"],
)
def test_guided_is_the_loop_written_by_hand(prompted, prompts, ddim, noise, relative_error, scale, rescale):
    (cond, uncond), start, schedule = prompts, noise(3), ddim(25)
    with torch.no_grad():
        expected = by_hand(prompted, schedule, start, cond, uncond, scale, rescale)
        sampler = dq.DEQSampler(
            dq.guided(prompted, cond, uncond, scale, rescale), schedule, solver="quasi-newton", tol=1e-5
        )
        prompted.sizes.clear()
        out, serial = sampler.sample(start), sampler.serial(start)
    assert out.converged.all()
    assert relative_error(serial.sample, expected).max() < 1e-5
    assert relative_error(out.sample, expected).max() < 1e-4
    branches = 1 if isinstance(scale, float) and scale == 1.0 else 2
    assert sum(prompted.sizes) == branches * (out.stats.model_evals + serial.stats.model_evals)
    assert len(prompted.sizes) == out.stats.model_calls + serial.stats.model_calls


@pytest.mark.parametrize("options", [{"window": 7}, {"max_batch": 5}, {"solver": "picard"}])
def test_rows_keep_their_conditioning(prompted, prompts, ddim, noise, relative_error, options):
    """Windows and chunks cut the rows of the samples unevenly."""
    (cond, uncond), start = prompts, noise(3)
    options = {"solver": "quasi-newton"} | options
    sampler = dq.DEQSampler(dq.guided(prompted, cond, uncond, 4.0), ddim(20), tol=1e-5, **options)
    with torch.no_grad():
        out, reference = sampler.sample(start), sampler.serial(start)
    assert relative_error(out.sample, reference.sample).max() < 1e-4


def test_dicts_nested_values_and_model_kwargs(prompted, prompts, ddim, noise, relative_error):
    cond, uncond = prompts
    pool, free_pool = torch.tensor([[0.3], [-0.2], [0.9]]), torch.zeros(1, 1)
    model = dq.guided(
        prompted,
        {"emb": cond, "nested": {"pool": pool}, "mark": "same"},
        {"nested": {"pool": free_pool}, "mark": "same", "emb": uncond},
        2.0,
    )
    gain = torch.linspace(0.5, 1.5, 3).view(3, 1)
    sampler, start = dq.DEQSampler(model, ddim(15), solver="quasi-newton", tol=1e-5), noise(3)
    with torch.no_grad():
        out = sampler.sample(start, model_kwargs={"gain": gain.mean()})
        x = start
        for i in range(15):
            t = sampler.schedule.timesteps[i].expand(3)
            text = prompted(x, t, cond, {"pool": pool}, gain.mean())
            free = prompted(x, t, uncond.expand(3, 4), {"pool": free_pool.expand(3, 1)}, gain.mean())
            eps = free + 2.0 * (text - free)
            x = sampler.schedule.state_coef[i, 0] * x + sampler.schedule.model_coef[i, 0] * eps
    assert relative_error(out.sample, x).max() < 1e-4
    with pytest.raises(ValueError, match="model_kwargs: emb is given in cond and uncond already"):
        sampler.sample(start, model_kwargs={"emb": cond})


def test_per_sample_model_kwargs_reach_both_branches(prompted, prompts, ddim, noise, relative_error):
    (cond, uncond), start = prompts, noise(3)
    shift = torch.tensor([0.1, -0.4, 0.7])
    seen = []

    def model(x, t, emb, shift, table):
        seen.append((len(x), len(shift), tuple(table.shape)))
        return SimpleNamespace(sample=prompted(x, t, emb) + shift[:, None, None, None])

    sampler = dq.DEQSampler(dq.guided(model, cond, uncond, 3.0), ddim(10), solver="quasi-newton", tol=1e-5)
    kwargs = {"shift": shift, "table": dq.shared(torch.zeros(3, 2))}  # of as many rows as there are samples
    with torch.no_grad():
        out, reference = sampler.sample(start, kwargs), sampler.serial(start, kwargs)
        alone = [
            dq.DEQSampler(dq.guided(model, cond[b : b + 1], uncond, 3.0), ddim(10)).serial(
                start[b : b + 1], {"shift": shift[b : b + 1], "table": torch.zeros(3, 2)}
            )
            for b in range(3)
        ]
    assert all(rows == shifts and table == (3, 2) for rows, shifts, table in seen)
    assert relative_error(out.sample, reference.sample).max() < 1e-4
    assert relative_error(torch.cat([one.sample for one in alone]), reference.sample).max() < 1e-5


def test_gradients_reach_conditioning_scale_and_parameters(prompted, prompts, ddim, noise):
    cond, uncond = (value.double().requires_grad_(True) for value in prompts)
    scale = torch.tensor([1.5, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    start, schedule, model = noise(3, dtype=torch.float64), ddim(6), prompted.double()
    wanted = [cond, uncond, scale, model.weight]
    loss = dq.DEQSampler(dq.guided(model, cond, uncond, scale, 0.4), schedule, solver="quasi-newton", tol=1e-9).sample(
        start
    )
    got = torch.autograd.grad(loss.sample.square().sum(), wanted)
    reference = by_hand(model, schedule, start, cond, uncond, scale, 0.4)
    expected = torch.autograd.grad(reference.square().sum(), wanted)
    for a, b in zip(got, expected):
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize("which", [0, 1, 2], ids=["cond", "uncond", "scale"])
def test_gradients_with_everything_else_frozen(prompted, prompts, ddim, noise, which):
    start, model = noise(3, dtype=torch.float64), prompted.double().requires_grad_(False)
    given = [prompts[0].double(), prompts[1].double(), torch.full((3,), 1.5, dtype=torch.float64)]
    given[which].requires_grad_(True)
    out = dq.DEQSampler(dq.guided(model, *given), ddim(6), tol=1e-9).sample(start).sample
    (got,) = torch.autograd.grad(out.square().sum(), given[which])
    (expected,) = torch.autograd.grad(by_hand(model, ddim(6), start, *given, 0.0).square().sum(), given[which])
    assert (got - expected).norm() <= 1e-3 * expected.norm()


def test_called_directly_the_rows_are_the_samples(prompted, prompts, noise):
    cond, uncond = prompts
    model, t = dq.guided(prompted, cond, uncond, 2.0), torch.full((3,), 500)
    with torch.no_grad():
        free, text = prompted(noise(3), t, uncond.expand(3, 4)), prompted(noise(3), t, cond)
        assert torch.allclose(model(noise(3), t), free + 2.0 * (text - free), atol=1e-6)


def test_a_function_around_it_is_refused(prompted, prompts, ddim, noise):
    model = dq.guided(prompted, *prompts, 2.0)
    with torch.no_grad(), pytest.raises(ValueError, match="give the object that guided"):
        dq.DEQSampler(lambda x, t: model(x, t), ddim(10), solver="quasi-newton").sample(noise(3))


ROW = torch.zeros(1, 4)


@pytest.mark.parametrize(
    ("cond", "uncond", "scale", "rescale", "error", "message"),
    [
        (ROW, None, 2.0, 0.0, TypeError, "uncond: expected a tensor or a dict .* NoneType; .* zeros"),
        (ROW, {"emb": ROW}, 2.0, 0.0, TypeError, "cond, uncond: expected two tensors or two dicts"),
        ({"emb": ROW}, {"mask": ROW}, 2.0, 0.0, ValueError, r"same keys .* \['emb'\] and \['mask'\]"),
        ({"emb": ROW}, {"emb": 1.0}, 2.0, 0.0, ValueError, "a tensor in one of them"),
        ({"gain": 1.0}, {"gain": 2.0}, 2.0, 0.0, ValueError, "equal values .* 1.0 and 2.0"),
        (ROW, torch.zeros(1, 5), 2.0, 0.0, ValueError, r"\(1, 4\) and \(1, 5\); pad the shorter one"),
        (ROW, ROW.double(), 2.0, 0.0, ValueError, "one dtype and device"),
        (torch.tensor(1.0), torch.tensor(2.0), 2.0, 0.0, ValueError, "without dimensions"),
        (ROW, ROW, float("nan"), 0.0, ValueError, "scale: expected a finite number .* nan"),
        (ROW, ROW, torch.zeros(2, 2), 0.0, ValueError, r"scale: .* a tensor of shape \(2, 2\)"),
        (ROW, ROW, 2.0, 1.5, ValueError, "rescale: expected a number from 0 to 1, got 1.5"),
    ],
)
def test_bad_arguments(prompted, cond, uncond, scale, rescale, error, message):
    with pytest.raises(error, match=message):
        dq.guided(prompted, cond, uncond, scale, rescale)


def test_wrong_batches(prompted, ddim, noise):
    with pytest.raises(TypeError, match="model: expected a callable"):
        dq.guided(3, ROW, ROW, 2.0)
    two = torch.zeros(2, 4)
    for cond, scale, message in ((two, 2.0, "tensors of 3 rows"), (ROW, torch.ones(2), "scale: .* or 3, one for each")):
        with pytest.raises(ValueError, match=message):
            dq.DEQSampler(dq.guided(prompted, cond, ROW, scale), ddim(5), solver="quasi-newton").sample(noise(3))
    with pytest.raises(ValueError, match=r"model: expected a tensor of 6 rows .* got shape"):
        dq.DEQSampler(dq.guided(lambda x, t, c: x[:1], ROW, ROW, 2.0), ddim(5)).serial(noise(3))
