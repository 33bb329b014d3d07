"""Drafts of models of every kind of data: made, written, found again, and of use to a solve."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import deqdiff_fast as dq
from deqdiff_fast.distillation.chains import draw_grids, thinned
from deqdiff_fast.distillation.teacher import count_conditions

SETTINGS = {"steps": 60, "measure": False}


class Exact(nn.Module):
    """The exact prediction for two Gaussians with a small spread, in any of a schedule's prediction types and times;
    a class, a vector or guidance moves their means."""

    def __init__(self, schedule: dq.Schedule, shape: tuple[int, ...], scale: float = 1.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        count = math.prod(shape)
        smooth = torch.randn(2, count, generator=draw).cumsum(1) / count**0.5
        self.register_buffer("means", scale * smooth)
        self.weight = nn.Parameter(torch.zeros(1))
        self.order = schedule.timesteps.double().argsort()
        self.tables = torch.stack([schedule.timesteps.double(), schedule.signal[:-1], schedule.sigma[:-1],
                                   schedule.input_scale, *schedule.denoised_coef().unbind(1)])  # fmt: skip
        self.spread, self.rows, self.scale = 0.1 * scale, 0, scale

    def forward(self, x: Tensor, t: Tensor, moved: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        self.rows += len(x)
        at = self.order[torch.searchsorted(self.tables[0, self.order], t.double()).clamp(0, len(self.order) - 1)]
        _, signal, sigma, input_scale, p, q = self.tables[:, at, None]
        y = x.double().flatten(1) / input_scale
        shift = 0.0 if moved is None else moved.double()
        shift = shift if labels is None else shift + self.scale * labels.double()[:, None]
        means = signal[..., None] * (self.means[None] + (shift[:, None] if isinstance(shift, Tensor) else 0.0))
        variance = signal**2 * self.spread**2 + sigma**2
        offset = y[:, None] - means
        share = (-offset.square().sum(-1) / (2 * variance)).softmax(-1)[..., None]
        pulled = (share * offset).sum(1)
        eps = sigma * pulled / variance
        clean = (y - sigma * eps) / signal
        return ((clean - p * y) / q).view_as(x).to(x.dtype)


def ddpm(steps: int, kind: str = "epsilon") -> dq.Schedule:
    alphas = (1 - torch.linspace(1e-3, 0.12, 100, dtype=torch.float64)).cumprod(0)
    return dq.Schedule.ddim(alphas, torch.arange(steps).flip(0) * (100 // steps), prediction_type=kind)


def ddpm_long() -> dq.Schedule:
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return dq.Schedule.ddim(alphas, torch.arange(1000).flip(0))


def flow(steps: int) -> dq.Schedule:
    return dq.Schedule.from_sigmas(torch.linspace(0.98, 0, steps + 1), flow=True)


def unscaled(steps: int, kind: str = "sample") -> dq.Schedule:
    sigmas = torch.cat([torch.logspace(1.3, -1, steps), torch.zeros(1)])
    return dq.Schedule.from_sigmas(sigmas, prediction_type=kind)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def solved(model, schedule, draft, shape, **kwargs) -> dq.Solution:
    """Two samples by the draft; they are the serial chain's."""
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3)) * schedule.init_noise_sigma
    sampler = dq.DEQSampler(model, schedule, solver="draft", draft=draft)
    with torch.no_grad():
        found, exact = sampler.sample(noise, kwargs or None), sampler.serial(noise, kwargs or None)
    assert bool(found.converged.all())
    assert apart(found.sample, exact.sample) < 1e-2
    assert found.stats.draft_evals > 0
    return found


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


def test_files_are_found_and_hold_the_same(tmp_path):
    schedule, shape = ddpm(100), (3, 8, 8)
    model = Exact(schedule, shape)
    pool = {"labels": torch.arange(3), "moved": torch.rand(3, 2)[:, :1]}
    draft = dq.distill(model, schedule, shape, pool, out=tmp_path / "new", **SETTINGS)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"draft.safetensors", "spectrum.safetensors"}
    again = dq.Draft.load(tmp_path / "new" / "draft.safetensors")
    assert dq.SpectralSlope.load(tmp_path / "new" / "spectrum.safetensors").shape == shape
    x, t = torch.randn(3, *shape), torch.tensor([0, 50, 99])
    kwargs = {"labels": torch.tensor([0, 1, 2]), "moved": torch.rand(3, 1)}
    assert apart(again(x, t, **kwargs), draft(x, t, **kwargs)) < 5e-3  # half precision
    assert not any(p.requires_grad for p in again.parameters())


def test_it_is_taken_up_again(tmp_path, monkeypatch):
    schedule, shape = ddpm(100), (10,)
    model = Exact(schedule, shape)

    def steps_until(limit):
        from deqdiff_fast.distillation.fit import Fit

        counted, step = [0], Fit.step

        def counting(self, done):
            if counted[0] == limit:
                raise KeyboardInterrupt
            counted[0] += 1
            step(self, done)

        monkeypatch.setattr(Fit, "step", counting)
        return counted

    steps_until(40)
    with pytest.raises(KeyboardInterrupt):
        dq.distill(model, schedule, shape, out=tmp_path, **SETTINGS)
    assert {path.name for path in tmp_path.iterdir()} == {"distillation.pt", "distillation_rows.pt"}
    rows = model.rows
    monkeypatch.undo()
    with pytest.raises(ValueError, match="another seed; delete it"):
        dq.distill(model, schedule, shape, out=tmp_path, seed=5, **SETTINGS)
    counted = steps_until(10**9)
    first = model.rows
    draft = dq.distill(model, schedule, shape, out=tmp_path, **SETTINGS)
    assert 0 < counted[0] <= 20  # of 60
    assert model.rows - first < rows  # its own chains are not made again
    assert {path.name for path in tmp_path.iterdir()} == {"draft.safetensors", "spectrum.safetensors"}
    solved(model, schedule, draft, shape)
    (tmp_path / "distillation.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"distillation\w*\.pt: expected an unfinished distillation, whole"):
        dq.distill(model, schedule, shape, out=tmp_path, **SETTINGS)


def test_the_report_is_of_solves(caplog):
    schedule, shape = ddpm(100), (10,)
    model = Exact(schedule, shape)
    with caplog.at_level("INFO", logger="deqdiff_fast"):
        draft = dq.distill(model, schedule, shape, steps=60)
    report = draft.report
    assert 0 < report.rounds <= 100
    assert report.error < 1e-2
    assert report.pays == (report.seconds < report.seconds_without)
    assert ("It pays" in str(report)) == report.pays
    assert str(report) in caplog.text
    assert min(report.cost, report.cost_of_row, report.seconds, report.seconds_serial) > 0


def test_the_time_is_kept(monkeypatch):
    """With a clock of the test's: the fit ends when the minutes are over, however many steps that were."""
    from deqdiff_fast.distillation import job

    now = [0.0]

    def clock():
        now[0] += 0.03
        return now[0]

    monkeypatch.setattr(job.time, "perf_counter", clock)
    schedule, shape = ddpm(50), (10,)
    dq.distill(Exact(schedule, shape), schedule, shape, minutes=0.5, measure=False)
    assert 25 < now[0] < 40


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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"minutes": 0}, ValueError, "minutes: expected a number > 0"),
        ({"minutes": None}, ValueError, "minutes: expected a number > 0"),
        ({"steps": 0}, ValueError, "steps: expected"),
        ({"shape": (3.5,)}, (ValueError, TypeError), "shape"),
        ({"schedule": "ddim"}, TypeError, "schedule: expected"),
        ({"model": 3}, TypeError, "model"),
        ({"recording": [1]}, TypeError, "recording: expected a deqdiff_fast.Recording"),
        ({"recording": dq.Recording()}, ValueError, "recording: expected predictions of solves, got none"),
        ({"model_kwargs": {"a": torch.ones(2), "b": torch.ones(3)}}, ValueError, "model_kwargs: expected as many rows"),
        ({"model_kwargs": lambda count: [1]}, TypeError, "model_kwargs: expected a function that returns a dict"),
        ({"model": lambda x, t: x * float("nan")}, dq.NonFiniteError, "the model returned NaN or Inf"),
        ({"model": lambda x, t: x[:, :1]}, dq.ModelOutputError, "the model returned"),
        ({"surprise": 1}, TypeError, "surprise"),
    ],
)
def test_what_is_refused(change, error, message):
    schedule, shape = ddpm(50), (10,)
    given = {"model": Exact(schedule, shape), "schedule": schedule, "shape": shape, **SETTINGS}
    with pytest.raises(error, match=message):
        dq.distill(**(given | change))


def test_a_model_that_is_too_slow_is_told_so(monkeypatch):
    from deqdiff_fast.distillation import job

    now = [0.0]

    def clock():
        now[0] += 500.0
        return now[0]

    monkeypatch.setattr(job.time, "perf_counter", clock)
    schedule, shape = ddpm(50), (10,)
    with pytest.raises(ValueError, match=r"minutes: expected at least .* for a model whose call takes"):
        dq.distill(Exact(schedule, shape), schedule, shape, minutes=0.1)


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
