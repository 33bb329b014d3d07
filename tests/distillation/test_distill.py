"""Drafts of models of every kind of data, and of use to a solve."""

from __future__ import annotations

import pytest
import torch
from distill_cases import SETTINGS, Exact, apart, ddpm, solved

import deqdiff_fast as dq
from deqdiff_fast.distillation.chains import draw_grids, thinned
from deqdiff_fast.distillation.teacher import count_conditions


def ddpm_long() -> dq.Schedule:
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return dq.Schedule.ddim(alphas, torch.arange(1000).flip(0))


def flow(steps: int) -> dq.Schedule:
    return dq.Schedule.from_sigmas(torch.linspace(0.98, 0, steps + 1), flow=True)


def unscaled(steps: int, kind: str = "sample") -> dq.Schedule:
    sigmas = torch.cat([torch.logspace(1.3, -1, steps), torch.zeros(1)])
    return dq.Schedule.from_sigmas(sigmas, prediction_type=kind)


KINDS = {
    "images": (ddpm(100), (3, 8, 8)),
    "images, v": (ddpm(100, "v_prediction"), (3, 8, 8)),
    "small images": (ddpm(50, "sample"), (1, 8, 8)),
    "odd latents": (flow(28), (4, 9, 12)),
    "sequences": (ddpm(100), (2, 96)),
    "vectors": (flow(20), (10,)),
    "vectors of k-diffusion": (unscaled(20), (40,)),
    "scaled inputs": (unscaled(20, "epsilon"), (2, 70)),
    "volumes": (ddpm(50), (1, 6, 6, 8)),
    "four axes": (flow(12), (1, 2, 3, 4, 6)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_data_of_every_kind(kind):
    schedule, shape = KINDS[kind]
    model = Exact(schedule, shape)
    draft = dq.distill(model, schedule, shape, **SETTINGS)
    assert model.rows > 0
    assert (draft.block == ()) == (kind in ("small images", "vectors", "vectors of k-diffusion", "four axes"))
    solved(model, schedule, draft, shape)
    x = torch.randn(3, *shape)
    t = schedule.timesteps[[0, 5, -1]]
    alone = torch.cat([draft(x[k : k + 1], t[k : k + 1]) for k in range(3)])
    assert torch.allclose(draft(x, t), alone, atol=1e-4)


@pytest.mark.parametrize("kind", ["images", "sequences", "vectors", "vectors of k-diffusion"])
def test_it_learns_the_differences(kind):
    """A fit leaves less of the difference of two predictions than the linear prediction does."""
    schedule, shape = KINDS[kind]
    model = Exact(schedule, shape)
    fitted = dq.distill(model, schedule, shape, steps=200, measure=False)
    linear = dq.distill(model, schedule, shape, steps=1, measure=False)
    draw = torch.Generator().manual_seed(5)
    at = torch.arange(schedule.num_steps // 2, schedule.num_steps).repeat(4)
    signal, sigma = ((table[at].float()[:, None]) for table in (schedule.signal, schedule.sigma))
    clean = model.means[torch.randint(2, (len(at),), generator=draw)].float()
    x = signal * clean + sigma * torch.randn(len(at), clean.shape[1], generator=draw)
    y = x + 0.3 * sigma * torch.randn(x.shape, generator=draw).cumsum(1) / x.shape[1] ** 0.5
    scale, t = schedule.input_scale[at].float()[:, None], schedule.timesteps[at]
    pair = [(value * scale).view(-1, *shape) for value in (x, y)]
    with torch.no_grad():
        exact = model(pair[1], t) - model(pair[0], t)
        missed = [apart(draft(pair[1], t) - draft(pair[0], t), exact) for draft in (fitted, linear)]
    assert missed[0] < 0.8 * missed[1], missed


def test_large_data_and_a_mean():
    """Data of another size than one, about a mean of its own: still the best linear prediction to begin with."""
    schedule = unscaled(20)
    model = Exact(schedule, (40,), scale=5.0)
    with torch.no_grad():
        model.means += 30.0
    draft = dq.distill(model, schedule, (40,), steps=1, measure=False)
    assert 0.2 < draft.scale < 20
    noise = torch.randn(16, 40, generator=torch.Generator().manual_seed(3)) * schedule.init_noise_sigma
    samples = dq.DEQSampler(model, schedule).serial(noise).sample.detach()
    assert apart(draft.get_buffer("mean") * draft.scale, samples.mean(0)) < 0.1
    x = samples[:4] + 0.1 * torch.randn(4, 40)
    t = schedule.timesteps[-1:].expand(4)
    assert apart(draft(x, t), x) < 0.02


def test_classes_and_vectors():
    schedule, shape = ddpm(50), (3, 8, 8)
    model = Exact(schedule, shape)
    pool = {"labels": torch.arange(3), "moved": torch.tensor([[0.0], [0.5], [1.0]])}
    draft = dq.distill(model, schedule, shape, pool, **SETTINGS)
    assert {(c.where, c.kind, c.size) for c in draft.conditions} == {("labels", "label", 3), ("moved", "vector", 1)}
    solved(model, schedule, draft, shape, labels=torch.tensor([0, 2]), moved=torch.zeros(2, 1))
    x, t = torch.randn(2, *shape), torch.tensor([4, 60])
    seen = draft(x, t, labels=torch.tensor([0, 2]), moved=torch.zeros(2, 1))
    assert not torch.allclose(seen, draft(x, t, labels=torch.tensor([1, 2]), moved=torch.zeros(2, 1)), atol=1e-5)
    assert torch.allclose(seen, draft(x, t, labels=torch.tensor([0, 2]), moved=torch.zeros(2, 1), more="x"))
    assert draft(x, t).shape == x.shape  # absent: ignored
    assert draft(x, t, labels=torch.tensor([0, 99])).isfinite().all()
    with pytest.raises(ValueError, match="model_kwargs: moved: expected 1 features"):
        draft(x, t, moved=torch.zeros(2, 7))


def test_sequences_of_embeddings_and_maps():
    """Text embeddings are seen as their mean; what has the sample's own shape is seen where it is."""
    schedule, shape = flow(20), (2, 96)
    inner = Exact(schedule, shape)

    def model(x, t, text, mask):
        return inner(x, t, moved=text.mean((1, 2))[:, None]) * (1 + mask)

    pool = {"text": torch.randn(4, 5, 7), "mask": (torch.rand(4, 1, 96) > 0.5).float()}
    draft = dq.distill(model, schedule, shape, lambda count: {k: v.repeat(count // 4, 1, 1) for k, v in pool.items()},
                       **SETTINGS)  # fmt: skip
    assert {(c.where, c.kind, c.size) for c in draft.conditions} == {("text", "vector", 7), ("mask", "map", 1)}
    solved(model, schedule, draft, shape, **{k: v[:2] for k, v in pool.items()})


def test_a_guided_model():
    """`DEQSampler` gives the draft what it gives the guided model."""
    schedule, shape = ddpm(50), (3, 8, 8)
    inner = Exact(schedule, shape)
    inner.spread = 0.5  # sharper, guidance makes the chain itself sensitive to rounding
    pool = torch.linspace(0, 1, 4)[:, None]
    guided = dq.guided(inner, {"moved": pool}, {"moved": torch.zeros(1, 1)}, 2.0)
    draft = dq.distill(guided, schedule, shape, **SETTINGS)
    assert "rows.0.1" in {c.where for c in draft.conditions}
    two = dq.guided(inner, {"moved": pool[2:]}, {"moved": torch.zeros(1, 1)}, 2.0)
    seen = []
    draft.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    solved(two, schedule, draft, shape)
    assert all("rows" in kwargs for kwargs in seen)


def test_recorded_solves_cost_no_model_calls(tmp_path):
    schedule, shape = ddpm(50), (3, 8, 8)
    model, recording = Exact(schedule, shape), dq.Recording()
    recorder = dq.DEQSampler(model, schedule, solver="quasi-newton").record(recording)
    noise = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rounds = recorder.sample(noise)
        plain = dq.DEQSampler(model, schedule, solver="quasi-newton").sample(noise)
    assert torch.equal(rounds.sample, plain.sample)
    assert len(recording) == rounds.stats.model_evals
    before = model.rows
    draft = dq.distill(model, schedule, shape, recording=recording, **SETTINGS, out=tmp_path)
    assert model.rows == before
    assert not list(tmp_path.glob("*.pt"))
    solved(model, schedule, draft, shape)


def test_recordings_of_conditions_and_their_limit():
    schedule, shape = ddpm(20), (10,)
    model, recording = Exact(schedule, shape), dq.Recording(max_bytes=40_000)
    sampler = dq.DEQSampler(model, schedule).record(recording)
    with torch.no_grad():
        for k in range(20):
            sampler.serial(torch.randn(4, *shape), {"labels": torch.tensor([0, 1, 2, k])})
    assert 0 < recording.bytes <= 40_000
    x, t, said, pooled = recording.tensors()
    assert len(x) == len(t) == len(said) == len(pooled["labels"]) == len(recording)
    with torch.no_grad():
        assert torch.allclose(model(x, t, labels=pooled["labels"]), said, atol=1e-5)


def test_grids_and_thinned_chains():
    grid = draw_grids(ddpm_long(), 64, torch.Generator().manual_seed(0))
    assert bool((grid.diff(dim=0) > 0).all())
    assert bool((grid[0] == 0).all())
    assert int(grid.max()) <= 999
    assert len(grid.unique()) > 700
    assert float((grid[-1] - grid[-2]).double().mean()) < 0.5 * float((grid[2] - grid[1]).double().mean())
    schedule = ddpm(100)
    few = thinned(schedule, 10)
    expected = dq.Schedule.ddim((1 - torch.linspace(1e-3, 0.12, 100, dtype=torch.float64)).cumprod(0), few.timesteps)
    for name in ("state_coef", "model_coef", "signal", "sigma"):
        assert torch.allclose(getattr(few, name), getattr(expected, name), atol=1e-9), name


def test_chains_begin_where_there_is_a_signal():
    """At nearly none, where the cosine schedule begins, an error of predicted noise would grow a thousandfold."""
    t = torch.arange(1001, dtype=torch.float64) / 1000
    bar = (torch.pi / 2 * (t + 0.008) / 1.008).cos() ** 2
    alphas = (1 - (1 - bar[1:] / bar[:-1]).clamp_max(0.999)).cumprod(0)
    for kind, begins in (("epsilon", True), ("v_prediction", False), ("sample", False)):
        schedule = dq.Schedule.ddim(alphas, torch.arange(1000).flip(0), prediction_type=kind)
        first = int(draw_grids(schedule, 3, torch.Generator())[0, 0])
        assert (10 < first < 100) if begins else first == 0
        assert float(thinned(schedule, 50).model_coef.abs().max()) < 3


def test_other_timesteps_of_the_same_model():
    """A draft made of few steps of a flow or of k-diffusion knows what lies between them."""
    for make, shape in ((flow, (10,)), (unscaled, (40,))):
        few, many = make(12), make(60)
        draft = dq.distill(Exact(few, shape), few, shape, **SETTINGS)
        tables = draft._levels_at(many.timesteps)
        ratio = (many.signal[:-1] / many.sigma[:-1]).log() * 2
        assert float((tables[0].double() - ratio).abs().max()) < 2e-2
        norm = 1 / (many.input_scale * torch.hypot(many.signal, many.sigma)[:-1])
        assert float((tables[1].double() / norm - 1).abs().max()) < 3e-2
        solved(Exact(many, shape), many, draft, shape)


def test_conditions_are_counted():
    assert count_conditions(lambda x, t: x, {}) == 1
    assert count_conditions(lambda x, t: x, {"a": [torch.ones(4, 2)], "b": dq.shared(torch.ones(7)), "c": 3}) == 4
    assert count_conditions(lambda x, t: x, {"prompt": ["a", "b"]}) == 2


def test_what_cannot_be_distilled_is_said():
    schedule, recording = ddpm(20), dq.Recording()
    model = Exact(schedule, (10,))
    with torch.no_grad():
        dq.DEQSampler(model, schedule).record(recording).sample(torch.randn(4, 10))
    with pytest.raises(ValueError, match=r"recording: expected samples of shape \(12,\), got \(10,\)"):
        dq.distill(model, schedule, (12,), recording=recording, **SETTINGS)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="distill: expected torch"):
        dq.distill(model, schedule, (10,), **SETTINGS)
