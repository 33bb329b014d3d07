"""Callbacks of a parallel pipeline: what they see, what they change, and how they interrupt."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import deqdiff_fast as dq  # noqa: E402
from deqdiff_fast.integrations.pipelines.guided_model import GuidedModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()


def parallel(pipe, **options):
    return dq.integrations.diffusers.parallelize(pipe, **({"solver": "quasi-newton", "tol": 1e-4} | options))


DPM, EULER, FLOW = "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("name", "rule"), [("sd", DPM), ("sd-img2img", EULER), ("sdxl", EULER), ("sd3", FLOW), ("flux", FLOW)]
)
def test_callbacks_see_every_timestep_in_order_with_its_latents(make, tiny, relative_error, name, rule):
    seen: dict[str, list] = {"plain": [], "parallel": []}
    for kind, pipe in (("plain", make(name, rule)), ("parallel", parallel(make(name, rule)))):

        def record(pipe_, index, timestep, tensors, pipe=pipe, kind=kind):
            assert pipe_ is pipe
            assert sorted(tensors) == ["latents", "prompt_embeds"]
            seen[kind].append((index, float(timestep), tensors["latents"].clone()))
            return {}

        inputs = ["latents", "prompt_embeds"]
        tiny.call(pipe, **tiny.arguments(name), callback_on_step_end=record, callback_on_step_end_tensor_inputs=inputs)
    assert len(seen["plain"]) >= tiny.STEPS // 2
    assert [row[:2] for row in seen["parallel"]] == [row[:2] for row in seen["plain"]]
    for ours, reference in zip(seen["parallel"], seen["plain"], strict=True):
        assert relative_error(ours[2], reference[2]).max() < 1e-3
    assert pipe.last_solution.stats.finished_serially == 0


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_a_callback_can_interrupt(make, tiny, relative_error, name):
    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = index == 3
        return tensors

    plain, pipe = make(name), parallel(make(name))
    reference, ours = (tiny.call(p, **tiny.arguments(name), callback_on_step_end=stop)[0] for p in (plain, pipe))
    assert relative_error(ours, reference).max() < 1e-3
    assert relative_error(ours, tiny.call(plain, **tiny.arguments(name))[0]).min() > 1e-2


def interrupted_in_its_third_call(pipe, monkeypatch) -> list[int]:
    """Sets `_interrupt` while the model is called a third time; the rows of every call."""
    calls, plain = [], GuidedModel.__call__

    def stop(self, x, t, rows):
        calls.append(len(x))
        pipe._interrupt = len(calls) == 3
        return plain(self, x, t, rows)

    monkeypatch.setattr(GuidedModel, "__call__", stop)
    return calls


@pytest.mark.usefixtures("rows_are_known")
def test_a_running_solve_can_be_interrupted(make, tiny, monkeypatch):
    pipe = parallel(make("sd"), solver="picard", tol=1e-6)
    calls = interrupted_in_its_third_call(pipe, monkeypatch)
    latents = tiny.call(pipe, **tiny.arguments("sd"), callback_on_step_end=lambda *a: a[-1])[0]
    assert pipe.last_solution.stats.stop_reason == "callback"
    assert len(calls) == 3
    assert latents.isfinite().all()
    states = []

    def store(pipe, index, timestep, tensors):
        states.append(tensors["latents"])
        return {}

    tiny.call(make("sd"), **tiny.arguments("sd"), callback_on_step_end=store)
    assert min(float((state - latents).norm() / state.norm()) for state in states) < 1e-3


def test_a_loop_that_does_not_look_at_an_interrupt_is_solved_to_its_end(make, tiny, relative_error):
    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = index >= 1
        return {}

    plain, pipe = make("lumina2"), parallel(make("lumina2"))
    given = tiny.arguments("lumina2", cfg_trunc_ratio=0.4)  # another model from the middle on: solved in two parts
    reference, ours = (tiny.call(p, **given, callback_on_step_end=stop)[0] for p in (plain, pipe))
    assert len(pipe.last_recording) == 2
    assert pipe.last_solution.converged.all()
    assert relative_error(ours, reference).max() < 1e-3


@pytest.mark.usefixtures("rows_are_known")
def test_a_loop_that_goes_on_after_its_solve_was_interrupted_is_told(make, tiny, monkeypatch):
    pipe = parallel(make("lumina2"), solver="picard", tol=1e-6)
    interrupted_in_its_third_call(pipe, monkeypatch)
    with pytest.raises(dq.DeqDiffError, match="_interrupt: it ended the solve after step 0"):
        tiny.call(pipe, **tiny.arguments("lumina2"), callback_on_step_end=lambda *a: a[-1])


def changed_latents(pipe, index, timestep, tensors):
    return {"latents": tensors["latents"] * 0.5} if index == 3 else {}


def changed_in_place(pipe, index, timestep, tensors):
    if index == 4:
        tensors["latents"].mul_(0.5)
    return {}


def cut_guidance(pipe, index, timestep, tensors):
    if index != 2:
        return {}
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}


def changed_scale(pipe, index, timestep, tensors):
    pipe._guidance_scale = 2.0 + index
    return {}


def changed_prompt(pipe, index, timestep, tensors):
    return {"prompt_embeds": tensors["prompt_embeds"].flip(0)} if index == 1 else {}


CHANGES = [(change, DPM) for change in (changed_latents, changed_in_place, cut_guidance, changed_scale, changed_prompt)]
STATEFUL = ("DDIMScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler")
CHANGES += [(changed_latents, rule) for rule in STATEFUL]


@pytest.mark.parametrize(("change", "rule"), CHANGES)
def test_what_a_callback_changes_is_honoured(make, tiny, relative_error, change, rule):
    inputs = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    reference = tiny.call(make("sd", rule), **tiny.arguments("sd"), **inputs)[0]
    pipe = parallel(make("sd", rule))
    ours = tiny.call(pipe, **tiny.arguments("sd"), **inputs)[0]
    assert relative_error(ours, reference).max() < 1e-4
    assert relative_error(ours, tiny.call(pipe, **tiny.arguments("sd"))[0]).min() > 4e-3
    tiny.call(pipe, **tiny.arguments("sd"), **inputs)
    assert pipe.last_solution.stats.finished_serially > 0
    assert torch.equal(pipe.last_solution.sample, ours)
