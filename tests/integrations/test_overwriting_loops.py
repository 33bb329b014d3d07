"""Loops that write the noised picture over a part of the latents: in some steps, with other masks, then no more."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

import deqdiff_fast as dq  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()
STEPS = 9
RULES = {
    "DDIMScheduler": {"clip_sample": False},
    "DPMSolverMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "UniPCMultistepScheduler": {},
    "LMSDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
}


class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(9, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))

    def forward(self, x, timestep):
        when = torch.as_tensor(timestep, dtype=x.dtype).expand(len(x))[:, None] / 1000
        return self.layers(torch.cat([x, when], 1))


class Writer:
    """What a loop does after step i: until when it writes, where, and whether it noises the picture even if not."""

    def __init__(self, until=STEPS, last=True, mask=lambda i: slice(0, 3), fresh=False, always=False):
        self.until, self.last, self.mask, self.fresh, self.always = until, last, mask, fresh, always
        own = torch.Generator().manual_seed(5)
        self.picture, self.noise = torch.randn(2, 3, 8, generator=own)

    def noised(self, rule, t):
        noise = torch.randn(3, 8, generator=self.draws) if self.fresh else self.noise
        if hasattr(rule, "scale_noise"):
            return rule.scale_noise(self.picture, t[None], noise)
        return rule.add_noise(self.picture, noise, t[None])

    def __call__(self, rule, x, i):
        writes = i < self.until and (self.last or i + 1 < STEPS)
        if not (writes or self.always):
            return x
        there = self.noised(rule, rule.timesteps[i + 1]) if i + 1 < STEPS else self.picture
        x = x.clone()
        if writes:
            x[:, self.mask(i)] = there[:, self.mask(i)]
        return x


def loop(rule, model, x, write):
    write.draws = torch.Generator().manual_seed(6)
    for i, t in enumerate(rule.timesteps):
        scaled = rule.scale_model_input(x, t) if hasattr(rule, "scale_model_input") else x
        x = write(rule, rule.step(model(scaled, t), t, x).prev_sample, i)
    return x


def scheduler(name):
    rule = getattr(diffusers, name)(**RULES[name])
    rule.set_timesteps(STEPS)
    return rule


WRITERS = {
    "always": {},
    "not after the last step": {"last": False},
    "until step 4": {"until": 4},
    "once": {"until": 1},
    "until step 4, and goes on to noise": {"until": 4, "always": True},
    "less and less": {"mask": lambda i: slice(0, max(1, 4 - i))},
    "more and more": {"mask": lambda i: slice(0, min(8, 1 + i))},
    "other noise": {"fresh": True},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", WRITERS)
def test_the_picture_of_the_loop_itself(relative_error, rule, kind):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        reference = loop(scheduler(rule), Denoiser(), x, Writer(**WRITERS[kind]))
    own, model = scheduler(rule), Denoiser()
    for _ in range(2):  # the second time with what the first has shown
        own.set_timesteps(STEPS)
        with dq.integrations.diffusers.parallel_loop(own, model, solver="quasi-newton", tol=1e-5) as done:
            ours = loop(own, model, x, Writer(**WRITERS[kind]))
        assert relative_error(ours, reference).max() < 1e-3
        serial = done.last_solution.stats.finished_serially
        assert serial == 0 if kind in ("always", "not after the last step") else serial > 0 or kind == "once"


def between(rule, x, output, t, i):
    return (output, t, x * 0.8, {}) if i == 3 else (output, t, x, {})


def later_noise(rule, x, output, t, i):
    return output, t, x, {"eta": 0.0 if i < 4 else 0.5, "generator": torch.Generator().manual_seed(i)}


def other_time(rule, x, output, t, i):
    return output, rule.timesteps[min(i + (i > 4), STEPS - 1)], x, {}


@pytest.mark.parametrize("change", [between, later_noise, other_time])
def test_what_is_given_to_the_scheduler_is_compared_in_every_step(relative_error, change):
    x, results = torch.randn(3, 8, generator=torch.Generator().manual_seed(3)), []

    def run(rule, model, x):
        for i, t in enumerate(rule.timesteps):
            output, when, sample, given = change(rule, x, model(rule.scale_model_input(x, t), t), t, i)
            x = rule.step(output, when, sample, **given).prev_sample
        return x

    with torch.no_grad():
        results.append(run(scheduler("DDIMScheduler"), Denoiser(), x))
    own, model = scheduler("DDIMScheduler"), Denoiser()
    with dq.integrations.diffusers.parallel_loop(own, model, solver="quasi-newton", tol=1e-5) as done:
        results.append(run(own, model, x))
    assert relative_error(results[1], results[0]).max() < 1e-3
    assert done.last_solution.stats.finished_serially > 0


@pytest.mark.parametrize("rule", RULES)
def test_states_have_the_dtype_that_the_scheduler_gives_them(relative_error, rule):
    """The first one has another: code that draws noise like the latents draws other noise for another dtype."""
    x, seen = torch.randn(3, 8, generator=torch.Generator().manual_seed(3)), []

    def run(own, model):
        return loop(own, lambda x, t: model(x.double(), t), x, lambda _, x, i: seen[-1].append(x.dtype) or x)

    own, model = scheduler(rule), Denoiser().double()
    seen.append([])
    with torch.no_grad():
        reference = run(scheduler(rule), model)
    seen.append([])
    with dq.integrations.diffusers.parallel_loop(own, model, solver="quasi-newton", tol=1e-5) as done:
        ours = run(own, model)
    assert seen[0] == seen[1]
    assert relative_error(ours, reference).max() < 1e-3
    assert done.last_solution.stats.finished_serially == 0
