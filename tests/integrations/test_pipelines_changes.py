"""Whatever a callback changes that the chain depends on is honoured, and it finds the scheduler where it would be."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers.models.attention_processor import AttnProcessor2_0  # noqa: E402

import deqdiff_fast as dq  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()
DPM, EULER, FLOW = "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"
ANCESTRAL, HEUN = "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"
AT = 2  # the step after which something is changed


def parallel(pipe, **options):
    return dq.integrations.diffusers.parallelize(pipe, **({"solver": "quasi-newton", "tol": 1e-5} | options))


class Louder(AttnProcessor2_0):
    """A processor of a user's own."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * self.factor


def weights(pipe):
    return [w for name, w in pipe.unet.named_parameters() if "conv_out" in name or "attn2" in name]


def in_place(pipe, tensors):
    with torch.no_grad():
        for w in weights(pipe):
            w.mul_(1.2)


def through_data(pipe, tensors):
    for w in weights(pipe):
        w.data.mul_(1.2)


def negated_through_data(pipe, tensors):
    for w in weights(pipe):
        w.data.neg_()


def other_data(pipe, tensors):
    for w in weights(pipe):
        w.data = w.data * 1.2


def free_u(pipe, tensors):
    pipe.enable_freeu(s1=0.5, s2=0.5, b1=1.5, b2=1.6)


def processors(pipe, tensors):
    pipe.unet.set_attn_processor(Louder(1.5))


def setting_of_a_processor(pipe, tensors):
    for processor in pipe.unet.attn_processors.values():
        processor.factor = 1.5


def hook(pipe, tensors):
    pipe.unet.mid_block.register_forward_hook(lambda module, args, output: output * 6.0)


def wrapped_forward(pipe, tensors):
    plain = pipe.unet.mid_block.forward
    pipe.unet.mid_block.forward = lambda *args, **kwargs: plain(*args, **kwargs) * 6.0


def other_module(pipe, tensors):
    pipe.unet.conv_out = torch.nn.Conv2d(8, 4, 3, padding=1).requires_grad_(False)


def other_model(pipe, tensors):
    import copy

    target = getattr(vars(pipe)["unet"], "_target", vars(pipe)["unet"])
    other = copy.deepcopy(target)
    with torch.no_grad():
        other.conv_out.weight.mul_(1.2)
    pipe.unet = other


def sigmas(pipe, tensors):
    pipe.scheduler.sigmas[AT + 1 :] *= 0.9


def scheduler_setting(pipe, tensors):
    pipe.scheduler.register_to_config(prediction_type="v_prediction")


def embeddings_in_place(pipe, tensors):
    tensors["prompt_embeds"].data.mul_(0.5)


def drawn_elsewhere(pipe, tensors):
    torch.randn(3, generator=pipe.own_generator)


CHANGES = [
    (in_place, EULER), (in_place, DPM), (through_data, "DDIMScheduler"), (negated_through_data, EULER),
    (other_data, DPM), (free_u, EULER), (processors, HEUN), (setting_of_a_processor, EULER), (hook, DPM),
    (wrapped_forward, EULER), (other_module, "DDIMScheduler"), (other_model, EULER), (other_model, DPM),
    (sigmas, EULER), (scheduler_setting, EULER), (embeddings_in_place, DPM),
    (drawn_elsewhere, ANCESTRAL), (in_place, ANCESTRAL),
]  # fmt: skip


@pytest.mark.parametrize(("change", "rule"), CHANGES, ids=[f"{c.__name__}-{r}" for c, r in CHANGES])
def test_what_a_callback_changes_is_honoured(make, tiny, relative_error, change, rule):
    def fresh():
        pipe = make("sd", rule)
        pipe.own_generator = torch.Generator().manual_seed(4)
        if change is setting_of_a_processor:
            pipe.unet.set_attn_processor(Louder(1.0))
        return pipe

    def run(pipe, changed=True):
        def callback(pipe, index, timestep, tensors):
            if changed and index == AT:
                change(pipe, tensors)
            return {}

        given = tiny.arguments("sd", callback_on_step_end=callback)
        torch.manual_seed(0)
        return pipe(
            **given, generator=pipe.own_generator, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]
        )[0]

    reference, without = run(fresh()), run(fresh(), changed=False)
    pipe = parallel(fresh())
    torch.manual_seed(0)
    ours = run(pipe)
    assert relative_error(without, reference).min() > 2e-3  # it matters
    assert relative_error(ours, reference).max() < 1e-3
    if change is not other_model:
        assert pipe.last_solution.stats.finished_serially > 0
    if change not in (setting_of_a_processor, other_model):
        assert pipe.last_solution.stats.rounds > 0


def test_embeddings_written_to_under_inference_mode(make, tiny, relative_error):
    def halve(pipe, index, timestep, tensors):
        if index == AT:
            tensors["prompt_embeds"].mul_(0.5)
        return {}

    given = tiny.arguments("sd", callback_on_step_end=halve, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    with torch.inference_mode():
        reference = tiny.call(make("sd", EULER), **given)[0]
        ours = tiny.call(parallel(make("sd", EULER)), **given)[0]
        without = tiny.call(make("sd", EULER), **tiny.arguments("sd"))[0]
    assert relative_error(without, reference).min() > 2e-3
    assert relative_error(ours, reference).max() < 1e-3


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_scales_of_adapters(make, tiny, relative_error, name):
    peft = pytest.importorskip("peft")

    def fresh():
        pipe = make(name, EULER if name == "sd" else FLOW)
        torch.manual_seed(7)
        model = pipe.unet if name == "sd" else pipe.transformer
        config = peft.LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
        model.add_adapter(config, adapter_name="a")
        model.set_adapters(["a"], [2.0])
        return pipe

    def schedule(pipe, index, timestep, tensors):
        (pipe.unet if name == "sd" else pipe.transformer).set_adapters(["a"], [2.0 - 0.25 * (index + 1)])
        return {}

    given = tiny.arguments(name)
    reference = tiny.call(fresh(), **given, callback_on_step_end=schedule)[0]
    assert relative_error(tiny.call(fresh(), **given)[0], reference).min() > 2e-3
    assert (
        relative_error(tiny.call(parallel(fresh()), **given, callback_on_step_end=schedule)[0], reference).max() < 1e-3
    )


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("sd", DPM), ("sd", "DDIMScheduler"), ("sd", ANCESTRAL), ("sd", "UniPCMultistepScheduler"), ("sd", HEUN),
        ("sd-img2img", EULER), ("sd-img2img", DPM), ("sdxl-img2img", HEUN), ("sd3-img2img", FLOW), ("dit", DPM),
        ("flux", FLOW), ("ddpm", "DDPMScheduler"),
    ],
)  # fmt: skip
def test_the_scheduler_is_where_the_loop_is(make, tiny, relative_error, name, rule):
    """Its counters, what it keeps of past steps, the noise it would add, and the generator, after every step."""
    seen: dict[str, list] = {"plain": [], "parallel": []}
    known = torch.randn(2, 4, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(2))

    def note(kind, pipe, generator, timestep):
        rule = pipe.scheduler
        kept = [m for m in getattr(rule, "model_outputs", []) if m is not None]
        noised = [rule.add_noise(known, known.flip(0), timestep[None])] if hasattr(rule, "add_noise") else []
        counters = [getattr(rule, field, None) for field in ("step_index", "lower_order_nums", "state_in_first_order")]
        seen[kind].append((counters, kept, noised, generator.get_state()))

    for kind, pipe in (("plain", make(name, rule)), ("parallel", parallel(make(name, rule)))):
        generator = torch.Generator().manual_seed(1)
        given = tiny.arguments(name)
        if name not in ("dit", "ddpm"):  # they have no callbacks: only the end can be compared
            given["callback_on_step_end"] = lambda p, index, t, tensors, kind=kind, g=generator: (
                note(kind, p, g, t) or {}
            )
        torch.manual_seed(0)
        pipe(**given, generator=generator)
        note(kind, pipe, generator, pipe.scheduler.timesteps[-1])
    for plain, ours in zip(seen["plain"], seen["parallel"], strict=True):
        assert ours[0] == plain[0]
        assert len(ours[1]) == len(plain[1])
        for a, b in zip(ours[1], plain[1], strict=True):
            assert relative_error(a, b).max() < 1e-2
        for a, b in zip(ours[2], plain[2], strict=True):
            assert torch.equal(a, b)
        assert torch.equal(ours[3], plain[3])


def test_latents_blended_with_noise_of_the_schedulers_level(make, tiny, relative_error):
    known, noise = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in (2, 3))

    def blend(pipe, index, timestep, tensors):
        if index != 3:
            return {}
        half = pipe.scheduler.add_noise(known, noise, timestep[None])[..., :4]
        return {"latents": torch.cat([half, tensors["latents"][..., 4:]], -1)}

    for name, rule in (("sd-img2img", EULER), ("sd-img2img", DPM), ("sdxl-img2img", HEUN), ("sd", "DDIMScheduler")):
        given = tiny.arguments(name, callback_on_step_end=blend)
        reference = tiny.call(make(name, rule), **given)[0]
        ours = tiny.call(parallel(make(name, rule)), **given)[0]
        assert relative_error(ours, reference).max() < 1e-3


def test_a_callback_that_changes_nothing_costs_no_serial_step(make, tiny):
    for name, rule in (("sd", DPM), ("sd", ANCESTRAL), ("sdxl", EULER), ("sd3", FLOW), ("flux", FLOW)):
        pipe = parallel(make(name, rule))
        tiny.call(pipe, **tiny.arguments(name), callback_on_step_end=lambda *args: {})
        assert pipe.last_solution.stats.finished_serially == 0
