"""What a loop makes of outputs and of what `step` returns: it is given the scheduler's own result, and refused where
it makes one thing of large outputs and another of small ones."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import deqdiff_fast as dq  # noqa: E402
from deqdiff_fast.integrations.pipelines.combination import Combination, find_combination  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()


class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(9, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))

    def forward(self, x, timestep):
        when = torch.as_tensor(timestep, dtype=x.dtype).expand(len(x))[:, None] / 1000
        return self.layers(torch.cat([x, when], 1))


def ddim(steps: int = 12):
    rule = diffusers.DDIMScheduler(clip_sample=False)
    rule.set_timesteps(steps)
    return rule


def loop(rule, model, x, change=lambda output: output, every=1):
    previews = []
    for t in rule.timesteps[::every]:
        result = rule.step(change(model(x, t)), t, x)
        x = result.prev_sample
        previews.append(result.pred_original_sample)
        assert hasattr(result, "pred_original_sample")
    return x, torch.stack(previews)


def solved(x, rule=None, **settings):
    rule, model = rule or ddim(), Denoiser()
    with torch.no_grad(), dq.integrations.diffusers.parallel_loop(rule, model, tol=1e-5, solver="quasi-newton") as own:
        return (*loop(rule, model, x, **settings), own.last_solution)


@pytest.fixture
def start():
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(3))


def test_the_predicted_clean_samples_of_the_scheduler(relative_error, start):
    sample, previews, solution = solved(start)
    with torch.no_grad():
        reference, expected = loop(ddim(), Denoiser(), start)
    assert solution.converged.all()
    assert relative_error(sample, reference).max() < 1e-4
    assert relative_error(previews, expected).max() < 1e-4


def limited(output):
    return output * 0.7 / output.std() if output.std() > 0.7 else output


def weakened(output):
    return 0.5 * output if output.abs().mean() > 0.5 else output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda output: output.clamp(-5, 5), "combines its model's outputs"),
        (limited, "depends on their size"),
        (weakened, "depends on their size"),
    ],
)
def test_what_depends_on_the_size_of_outputs_is_refused(start, change, message):
    with pytest.raises(dq.DeqDiffError, match=message) as refused:
        solved(start, change=change)
    assert "callback" not in str(refused.value)


def projected(positive, negative):
    """Sadat et al. 2024, arXiv 2410.02416, without momentum."""
    along, apart = positive / positive.norm(), positive - negative
    return positive + 2 * (apart - (apart * along).sum() * along)


def zero_star(positive, negative):
    """Fan et al. 2025, arXiv 2503.18886."""
    negative = negative * (positive * negative).sum() / negative.square().sum()
    return negative + 3 * (positive - negative)


def of_the_batch(positive, negative):
    guided = negative + 3 * (positive - negative)
    return guided * (positive.norm() / guided.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("guidance", "batch"), [(projected, 1), (zero_star, 1), (of_the_batch, 3)])
def test_guidance_that_is_linear_for_one_draw_of_outputs_only_is_refused(start, guidance, batch, dtype):
    rule, model = ddim(), Denoiser().to(dtype)

    def run(x):
        for t in rule.timesteps:
            x = rule.step(guidance(model(x, t), model(x, t)), t, x).prev_sample

    own = dq.integrations.diffusers.parallel_loop(rule, model, solver="quasi-newton")
    with pytest.raises(dq.DeqDiffError, match=r"depends on their size|combines its model's outputs"), own:
        run(start[:batch].to(dtype))


def test_a_refused_loop_leaves_others_as_they_are(start):
    for _ in range(4):
        with pytest.raises(dq.DeqDiffError, match="passes timesteps"):
            solved(start, every=2)
    assert solved(start)[2].converged.all()


def test_a_pipeline_that_reads_more_of_a_step_than_the_next_state(tiny, relative_error):
    def pipeline():
        torch.manual_seed(0)
        parts = {"vae": tiny.conditioned.decoder(), "unet": tiny.conditioned.unet(time_cond_proj_dim=8)}
        parts["requires_safety_checker"] = False
        return tiny.families.assemble("LatentConsistencyModelPipeline", parts, tiny.scheduler("LCMScheduler"))

    def picture(pipe):
        draw = torch.Generator().manual_seed(0)
        given = tiny.conditioned.prompts(negative=False)
        return pipe(generator=draw, num_inference_steps=4, output_type="latent", height=8, width=8, **given).images

    reference, pipe = picture(pipeline()), pipeline()
    dq.integrations.diffusers.parallelize(pipe, solver="quasi-newton", tol=1e-5)
    assert relative_error(picture(pipe), reference).max() < 1e-4
    assert pipe.last_solution.converged.all()


@pytest.mark.parametrize("rescale", [0.05, 0.1, 0.2])
def test_a_small_rescaling_is_seen_in_bfloat16(rescale):
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 4, 16, 16, generator=draw).bfloat16() for _ in range(2)]
    made = Combination((), torch.bfloat16, 7.5, rescale=rescale)(parts)
    found = find_combination(parts, made, [7.5, rescale])
    assert found is not None
    assert (found.scale, found.rescale) == (7.5, rescale)
