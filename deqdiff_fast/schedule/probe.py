"""Run a diffusers scheduler on random probes in float64 and record what went in and what came out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import NotAffineError

SHAPE = (2, 3, 4, 8)  # two samples: anything computed per sample or per channel shows up as a misfit between them
_NORMAL = (torch.randn, torch.randn_like)
_OTHER = (torch.rand, torch.rand_like, torch.randint, torch.bernoulli, torch.multinomial, torch.normal)
_CASTS = (torch.Tensor.to, torch.Tensor.float, torch.Tensor.type)


class StepRange(NamedTuple):
    """Steps start <= i < stop of a chain; stop = None: to its end. scaled: the loop steps what `scale_model_input`
    returns, as DiT's does."""

    start: int = 0
    stop: int | None = None
    scaled: bool = False


ALL_STEPS = StepRange()


class Probing(TorchFunctionMode):
    """Hands out our noise in place of torch.randn, and keeps probes in float64 where a scheduler casts to float32.

    A function mode is local to the thread and to the `with` block: no module is patched, no lock is needed, and another
    thread that samples meanwhile draws its own noise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.noise = torch.zeros(SHAPE, dtype=torch.float64)
        self.draws = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NORMAL:
            self.draws += 1
            return self.noise.clone()
        if func in _OTHER:
            raise NotAffineError(f"step() draws random numbers with torch.{func.__name__}, which is not Gaussian noise")
        if func in _CASTS and args and args[0].shape == SHAPE and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **kwargs)


@dataclass
class ProbeRun:
    """What went in and out of a scheduler. K = 192 columns: the two samples of SHAPE, flattened. Float64."""

    timesteps: list[Tensor]  # what step() and the model are given
    input_scale: Tensor  # (T,)
    states: Tensor  # (T+1, K)
    outputs: Tensor  # (T, K)
    noises: Tensor  # (T, K), zero where none was drawn
    draws: Tensor  # (T,) bool
    denoised: Tensor | None  # (T, K) pred_original_sample where step() returns it


@dataclass
class Adapter:
    """What a pipeline does around step() that the generic loop does not."""

    drop_last: bool = False  # the last entry of scheduler.timesteps is the end point, not a call
    batched: bool = False  # step() wants t per sample
    extra: Callable[[list[Tensor], int], dict[str, Any]] | None = None
    """(timesteps, i) -> keyword arguments of step() that vary along the chain."""


def _unclip(timesteps: list[Tensor], i: int) -> dict[str, Any]:
    return {"prev_timestep": timesteps[i + 1] if i + 1 < len(timesteps) else None}


ADAPTERS = {
    "UnCLIPScheduler": Adapter(extra=_unclip),
    "SCMScheduler": Adapter(drop_last=True),
    "DDPMWuerstchenScheduler": Adapter(drop_last=True, batched=True),
}
DEFAULT_ADAPTER = Adapter()


def adapter_of(scheduler: Any) -> Adapter:
    """That of the scheduler's class, or of the nearest base class that has one."""
    return next((ADAPTERS[c.__name__] for c in type(scheduler).__mro__ if c.__name__ in ADAPTERS), DEFAULT_ADAPTER)


def step_accepts(scheduler: Any) -> set[str]:
    """Names of the keyword arguments of step() that a user may fix for the whole chain."""
    own = {"model_output", "timestep", "sample", "generator", "variance_noise", "return_dict", "pred_original_sample",
           "prev_timestep", "r_timestep", "per_token_timesteps"}  # fmt: skip
    return set(inspect.signature(scheduler.step).parameters) - own


def chain_timesteps(scheduler: Any) -> list[Tensor]:
    """The timesteps at which a pipeline calls the model, in order (multi-call schedulers repeat them)."""
    steps = list(torch.as_tensor(scheduler.timesteps).cpu())
    return steps[:-1] if adapter_of(scheduler).drop_last else steps


@torch.no_grad()
def run(
    scheduler: Any, step_kwargs: dict[str, Any], seed: int, output_scale: float = 1.0, steps: StepRange = ALL_STEPS
) -> ProbeRun:
    """Step through the chain with random outputs. The scheduler is used up: pass a fresh copy.

    The second sample is `output_scale` times larger throughout, so that a bound anywhere in step() is met.
    """
    adapter = adapter_of(scheduler)
    timesteps = chain_timesteps(scheduler)[steps.start : steps.stop]
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1.0, output_scale], dtype=torch.float64).view(2, 1, 1, 1)

    def draw(scale: float = 1.0) -> Tensor:
        return torch.randn(SHAPE, generator=generator, dtype=torch.float64) * sizes * scale

    x = draw(float(getattr(scheduler, "init_noise_sigma", 1.0)))
    scales, states, outputs, noises, draws = [], [x], [], [], []
    denoised: list[Any] = []
    probing = Probing()
    for i, t in enumerate(timesteps):
        output, probing.noise, probing.draws = draw(), draw(), 0
        extra = adapter.extra(timesteps, i) if adapter.extra else {}
        with probing:
            scales.append(_input_scale(scheduler, x, t))
            when = t.expand(SHAPE[0]) if adapter.batched else t
            sample = x * scales[-1] if steps.scaled else x.clone()
            result = scheduler.step(output.clone(), when, sample, **step_kwargs, **extra)
        x = next_state(result)
        if not isinstance(x, Tensor) or x.shape != SHAPE or x.dtype != torch.float64:
            what = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise NotAffineError(f"step {i} does not return a state like its input but {what}")
        if not bool(x.isfinite().all()):
            raise NotAffineError(f"step {i} (timestep {t.item():g}) returns non-finite values{_hint(scheduler)}")
        if probing.draws > 1:
            raise NotAffineError(f"step {i} draws noise {probing.draws} times; a chain here has one noise a step")
        states.append(x)
        outputs.append(output)
        noises.append(probing.noise if probing.draws else torch.zeros_like(output))
        draws.append(probing.draws > 0)
        denoised.append(getattr(result, "pred_original_sample", None))
    whole = all(isinstance(d, Tensor) and d.shape == SHAPE for d in denoised)
    return ProbeRun(
        timesteps=timesteps,
        input_scale=torch.tensor(scales, dtype=torch.float64),
        states=torch.stack(states).flatten(1),
        outputs=torch.stack(outputs).flatten(1),
        noises=torch.stack(noises).flatten(1),
        draws=torch.tensor(draws),
        denoised=torch.stack(denoised).flatten(1).to(torch.float64) if whole else None,
    )


def _hint(scheduler: Any) -> str:
    config = scheduler.config
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type") == "epsilon":
        return (
            "; config.rescale_betas_zero_snr=True with prediction_type='epsilon' divides by a zero signal: set "
            "prediction_type='v_prediction' (if the model was trained so) or rescale_betas_zero_snr=False"
        )
    return ""


def next_state(result: Any) -> Any:
    """x_{i+1} in what a scheduler's `step` returns."""
    return result.prev_sample if hasattr(result, "prev_sample") else result[0]


def _input_scale(scheduler: Any, x: Tensor, t: Tensor) -> float:
    """scale_model_input must be called in any case: several schedulers count on it."""
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    scaled = scheduler.scale_model_input(x.clone(), t)
    scale = float((scaled * x).sum() / x.square().sum())
    if not torch.allclose(scaled, scale * x, rtol=1e-6, atol=1e-9 * float(x.abs().max())):
        raise NotAffineError(f"scale_model_input at timestep {t.item():g} is not a multiplication by a number")
    return scale
