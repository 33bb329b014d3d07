"""`parallel_loop(scheduler, model)`: a loop in a user's own code, left as it is."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

import deqdiff_fast as dq  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
RULES = ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]


class Denoiser(torch.nn.Module):
    """Of a user's own: nothing is called as in diffusers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(14, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))

    def forward(self, x, when, *, label=None):
        when = torch.as_tensor(when, dtype=x.dtype).expand(len(x))[:, None] / 1000
        label = torch.zeros(len(x), 4) if label is None else label
        return self.layers(torch.cat([x, when, 1 - when, label], 1))


def scheduler(name: str, steps: int = 9):
    rule = getattr(diffusers, name)(**({"clip_sample": False} if name == "DDIMScheduler" else {}))
    rule.set_timesteps(steps)
    return rule


def guided(rule, model, x, label, scale=3.0, until=0.0, step=lambda x, i: x):
    """Guidance in two calls, which ends below a timestep."""
    for i, t in enumerate(rule.timesteps):
        scaled = rule.scale_model_input(x, t)
        noise = model(scaled, t, label=label)
        if t > until:
            plain = model(scaled, t)
            noise = plain + scale * (noise - plain)
        x = step(rule.step(noise, t, x).prev_sample, i)
    return x


@pytest.fixture
def start():
    own = torch.Generator().manual_seed(3)
    return torch.randn(3, 8, generator=own), torch.randn(3, 4, generator=own)


@pytest.mark.parametrize("until", [-1.0, 400.0])
@pytest.mark.parametrize("rule", RULES)
def test_the_loop_gives_what_it_gave(relative_error, start, rule, until):
    x, label = start
    reference = guided(scheduler(rule), Denoiser(), x, label, until=until)
    model, own = Denoiser(), scheduler(rule)
    kinds = type(model), type(own)
    with torch.no_grad(), dq.integrations.diffusers.parallel_loop(own, model, solver="quasi-newton", tol=1e-5) as loop:
        ours = guided(own, model, x, label, until=until)
    assert relative_error(ours, reference).max() < 1e-3
    assert (type(model), type(own)) == kinds
    assert "step" not in vars(own)
    solution = loop.last_solution
    assert solution.converged.all()
    if rule != "HeunDiscreteScheduler" or until < 0:  # where guidance ends between the two calls of a step
        assert solution.stats.finished_serially == 0
    assert len(loop.last_recording) == (2 if until > 0 else 1)
    assert own.step_index == len(own.timesteps) if hasattr(own, "step_index") else True
    assert torch.equal(guided(scheduler(rule), model, x, label, until=until), reference)  # ours no more


def test_what_the_loop_changes_is_honoured(relative_error, start):
    x, label = start

    def damp(x, i):
        return x * 0.7 if i == 2 else x

    reference = guided(scheduler(RULES[0]), Denoiser(), x, label, step=damp)
    model, own = Denoiser(), scheduler(RULES[0])
    with torch.no_grad(), dq.integrations.diffusers.parallel_loop(own, model, tol=1e-5, solver="picard") as loop:
        ours = guided(own, model, x, label, step=damp)
    assert relative_error(ours, reference).max() < 1e-3
    assert loop.last_solution.stats.finished_serially > 0


def test_refusals(start):
    x, label = start
    loop = dq.integrations.diffusers.parallel_loop
    with pytest.raises(TypeError, match="scheduler"), loop(object(), Denoiser()):
        pass
    with pytest.raises(TypeError, match="model"), loop(scheduler(RULES[0]), lambda x, t: x):
        pass
    with pytest.raises(TypeError, match="nonsense"), loop(scheduler(RULES[0]), Denoiser(), nonsense=1):
        pass
    own, model = scheduler(RULES[1]), Denoiser()
    own.register_to_config(thresholding=True)
    with pytest.raises(dq.NotAffineError, match="thresholding"), torch.no_grad(), loop(own, model):
        guided(own, model, x, label)
    assert type(model) is Denoiser
    own, model = scheduler(RULES[0]), Denoiser()
    with pytest.raises(dq.DeqDiffError, match="combines"), torch.no_grad(), loop(own, model):
        own.step(model(x, own.timesteps[0]).tanh(), own.timesteps[0], x)
    assert type(own) is diffusers.DDIMScheduler
