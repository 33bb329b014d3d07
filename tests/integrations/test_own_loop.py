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


def in_place(rule, model, x, label):
    """Guidance that writes over an output."""
    for t in rule.timesteps:
        noise, plain = model(x, t, label=label), model(x, t)
        x = rule.step(noise.sub_(plain).mul_(3).add_(plain), t, x).prev_sample
    return x


def in_one_step(rule, model, x, label):
    for i, t in enumerate(rule.timesteps):
        noise = model(x, t)
        if i == 3:
            noise = noise + 3 * (model(x, t, label=label) - noise)
        x = rule.step(noise, t, x).prev_sample
    return x


@pytest.mark.parametrize("run", [in_place, in_one_step])
def test_guidance_as_it_is(relative_error, start, run):
    with torch.no_grad():
        reference = run(scheduler(RULES[0]), Denoiser(), *start)
    own, model = scheduler(RULES[0]), Denoiser()
    with dq.integrations.diffusers.parallel_loop(own, model, solver="quasi-newton", tol=1e-5):
        assert relative_error(run(own, model, *start), reference).max() < 1e-3


def halved(rule, model, x):
    """The model alone is under autocast."""
    for t in rule.timesteps:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(x, t).sample
        x = rule.step(output.float(), t, x).prev_sample
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_the_models_calls_only(relative_error, dtype):
    shape = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**shape, **blocks).to(dtype)
    x = 14 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        reference = halved(scheduler("EulerDiscreteScheduler"), model, x)
    own = scheduler("EulerDiscreteScheduler")
    with dq.integrations.diffusers.parallel_loop(own, model, solver="quasi-newton", tol=1e-5) as loop:
        ours = halved(own, model, x)
    assert relative_error(ours, reference).max() < 1e-3
    assert loop.last_solution.stats.finished_serially == 0


class Tokens(torch.nn.Linear):
    def forward(self, x, t):
        return super().forward(x)


def test_what_a_loop_gives_to_step_beside_what_was_fitted(start):
    rule, model = scheduler("FlowMatchEulerDiscreteScheduler"), Tokens(8, 8)
    x = torch.stack([start[0]] * 4, 1)
    t = rule.timesteps[0]
    times = t * torch.tensor([0.0, 1.0, 1.0, 1.0]).expand(3, 4)
    own = dq.integrations.diffusers.parallel_loop(rule, model)
    with pytest.raises(dq.DeqDiffError, match="steps its scheduler with per_token_timesteps in a way"), own:
        rule.step(model(x, t), t, x, per_token_timesteps=times)
    rule = scheduler("UnCLIPScheduler")  # without prev_timestep its steps end at t - 1
    own = dq.integrations.diffusers.parallel_loop(rule, model)
    with pytest.raises(dq.DeqDiffError, match="steps its scheduler in a way"), own:
        rule.step(model(x, rule.timesteps[0]), rule.timesteps[0], x)


class Remembering(Denoiser):
    def forward(self, x, when, last=None):
        return super().forward(x if last is None else x + 0.3 * last, when)


def every_second(rule, model, x):
    output = None
    for i, t in enumerate(rule.timesteps):
        output = output if i % 2 else model(x, t)
        x = rule.step(output, t, x).prev_sample


def self_conditioned(rule, model, x):
    output = None
    for t in rule.timesteps:
        output = model(x, t, output)
        x = rule.step(output, t, x).prev_sample


@pytest.mark.parametrize("run", [every_second, self_conditioned])
def test_a_loop_that_uses_an_output_once_more_is_refused(start, run):
    rule, model = scheduler(RULES[0]), Remembering()
    own = dq.integrations.diffusers.parallel_loop(rule, model)
    with pytest.raises(dq.DeqDiffError, match="uses its model's outputs once more in a later step"), own:
        run(rule, model, start[0])


def test_a_model_that_returns_a_dict_is_refused_by_name(start):
    class Named(Denoiser):
        def forward(self, x, when):
            return {"noise": super().forward(x, when)}

    rule, model = scheduler(RULES[0]), Named()
    own = dq.integrations.diffusers.parallel_loop(rule, model)
    with pytest.raises(dq.DeqDiffError, match="takes something else than rows from its model"), own:
        model(start[0], rule.timesteps[0])


def test_loops_with_other_rules_of_timesteps_in_turns(relative_error, start):
    rules = (lambda t: (t / 1000).bfloat16(), lambda t: t.bfloat16() / 1000)
    for when in rules * 2:

        def run(rule, model, when=when):
            x = start[0]
            for t in rule.timesteps:
                x = rule.step(model(x, when(t)), t, x).prev_sample
            return x

        with torch.no_grad():
            reference = run(scheduler("FlowMatchEulerDiscreteScheduler", 30), Denoiser())
        rule, model = scheduler("FlowMatchEulerDiscreteScheduler", 30), Denoiser()
        with dq.integrations.diffusers.parallel_loop(rule, model, tol=1e-5, solver="quasi-newton"):
            assert relative_error(run(rule, model), reference).max() < 1e-3
