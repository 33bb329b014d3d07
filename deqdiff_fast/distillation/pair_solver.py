"""Pairs by their numbers: the noise and the condition of each, and the sample that a model makes of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .._types import Model
from ..model.guidance import Guided
from ..model.knowledge import nothing_known
from ..model.sample_kwargs import is_list_of_strings, select_samples
from ..sampler import DEQSampler
from ..schedule import Schedule
from .fingerprint import hash_schedule, hash_values, hash_weights
from .teacher import count_conditions

SEED_STRIDE = 1_000_003  # between the pairs number 0 of two seeds
CONDITION = "condition."
SERIAL, ROUNDS = "serial", "rounds"
ASKED, ANSWERS = 2, 4  # timesteps and numbers of each, by which a model is known again

Conditions = dict[str, Any] | Callable[[Tensor], dict[str, Any]] | None

_log = logging.getLogger("deqdiff_fast")


class Method(NamedTuple):
    """How pairs are made: by the plain chain or in rounds, and how many at a time."""

    name: str
    batch: int
    channels_last: bool = False  # the memory format of the model's inputs, in the plain chain

    @classmethod
    def of(cls, identity: dict[str, Any]) -> Method:
        """That of a folder; of a strange one, something that is not equal to any."""
        return cls(identity.get("method", ""), identity.get("batch", 0), bool(identity.get("channels_last")))


def in_format(noise: Tensor, method: Method) -> Tensor:
    """The initial states, (B, C, H, W), as the plain chain is to give them to the model: it keeps their format."""
    return noise.contiguous(memory_format=torch.channels_last) if method.channels_last else noise


def pair_seed(seed: int, number: int) -> int:
    """The seed of a pair's own generator, `torch.Generator().manual_seed(...)`, which draws first its noise and then
    that of the steps; `deqdiff-fast sample --seed` draws image number `number` so too. The 32 bits of it that torch's
    generator on the CPU looks at are others for every pair."""
    return seed * SEED_STRIDE + number


def same_answers(dtype: torch.dtype) -> float:
    """How far answers of one model may be apart, on two devices or in two memory formats, relative to their size."""
    return 1e-3 if dtype.itemsize > 2 else 5e-2


class PairSolver:
    """Any of the pairs of one model.

    Args:
        model, schedule, shape, model_kwargs, seed, tol, draft, spectrum: see `Pairs.make`.
        like: of what dtype and device the model's inputs are.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    def __init__(
        self, model: Model, schedule: Schedule, shape: tuple[int, ...], model_kwargs: Conditions, like: Tensor,
        seed: int, **settings: Any,
    ) -> None:  # fmt: skip
        self.model, self.schedule, self.shape, self.seed = model, schedule, shape, seed
        self.device, self.dtype, self.settings = like.device, like.dtype, settings
        self.drawn = model_kwargs if callable(model_kwargs) else None
        self.kwargs: dict[str, Any] = {} if callable(model_kwargs) else dict(model_kwargs or {})
        if self.drawn is not None and isinstance(model, Guided):
            raise ValueError("model_kwargs: expected a dict for a guided model, whose conditions are its own")
        self.count = count_conditions(model, self.kwargs)
        self.node_sizes = DEQSampler(model, schedule, **settings).options.node_sizes  # refuses what is wrong as well

    def conditions(self, numbers: range) -> tuple[Model, dict[str, Any], dict[str, Tensor]]:
        """The model and its keyword arguments for these pairs, and what of them is kept, by name."""
        if self.drawn is not None:
            kwargs = self.drawn(torch.tensor(numbers))
            if not isinstance(kwargs, dict):
                raise TypeError(f"model_kwargs: expected a function that returns a dict, got {type(kwargs).__name__}")
            return self.model, kwargs, dict(_rows("", kwargs, len(numbers)))
        at = torch.tensor(numbers) % self.count
        kwargs = select_samples(self.kwargs, self.count, at)
        model, own = self.model, {}
        if isinstance(model, Guided):
            cond, uncond, scale = (self._own_rows(v, at) for v in (model.cond, model.uncond, model.scale))
            own = dict(_rows("", {"cond": cond} if isinstance(cond, Tensor) else cond, len(numbers)))
            model = Guided(model.model, cond, uncond, scale, model.rescale)
        return model, kwargs, {**own, **dict(_rows("", kwargs, len(numbers)))}

    def _own_rows(self, values: Any, at: Tensor) -> Any:
        """What a guided model has for these conditions; one row for all of them stays one."""

        def select(value: Any) -> Any:
            rows = self.count > 1 and isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.count
            return value.index_select(0, at.to(value.device)) if rows else value

        return tree_map(select, values)

    def noise(self, numbers: range) -> tuple[Tensor, list[torch.Generator]]:
        """(b, *shape) initial states in the model's dtype and on its device, and the generators that drew them."""
        streams = [torch.Generator().manual_seed(pair_seed(self.seed, k)) for k in numbers]
        drawn = torch.stack([torch.randn(self.shape, generator=stream) for stream in streams])
        drawn *= self.schedule.init_noise_sigma
        return drawn.to(self.device, self.dtype), streams

    def sampler(self, model: Model, method: Method) -> DEQSampler:
        """That of a batch: what it does depends on nothing but the batch, no clock and no solve before it."""
        steps = self.schedule.num_steps
        if method.name == SERIAL:
            return DEQSampler(model, self.schedule, max_batch=method.batch, cuda_graph=False)
        return DEQSampler(
            model, self.schedule, solver="quasi-newton" if self.settings.get("draft") is None else "draft",
            window=steps, cuda_graph=False, **self.settings,
        )  # fmt: skip

    def solve(self, numbers: range, method: Method) -> dict[str, Tensor]:
        """These pairs, one batch of them, on the CPU: noise and sample (b, *shape) float32, and conditions.

        Raises:
            NonFiniteError, ModelOutputError: the model's fault.
        """
        noise, streams = self.noise(numbers)
        model, kwargs, kept = self.conditions(numbers)
        sampler, start = self.sampler(model, method), in_format(noise, method)
        with torch.no_grad(), nothing_known(model):
            try:
                solve = sampler.serial if method.name == SERIAL else sampler.sample
                found = solve(start, kwargs or None, streams)
                if not bool(found.converged.all()):  # the tolerance is below the model's rounding
                    noise, streams = self.noise(numbers)
                    found = sampler.serial(noise, kwargs or None, streams)
            except Exception:
                _log.error("pairs %d to %d could not be made", numbers.start, numbers.stop - 1)
                raise
        tensors = {"noise": noise.float(), "sample": found.sample.float()}
        tensors |= {CONDITION + name: value for name, value in kept.items()}
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def identity(self, method: Method) -> dict[str, Any]:
        """What pairs depend on, by name."""
        in_rounds = method.name == ROUNDS
        draft, spectrum = self.settings.get("draft"), self.settings.get("spectrum")
        some = self.conditions(range(max(self.count, ASKED)))[2]
        given = [some, self.kwargs, self.model.uncond if isinstance(self.model, Guided) else None]
        return {
            "weights": hash_weights(self.model),
            "schedule": hash_schedule(self.schedule),
            "timesteps": self.schedule.num_steps,
            "model_kwargs": hash_values(given),
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "method": method.name,
            "batch": method.batch,
            "channels_last": method.channels_last or None,
            "tol": self.settings.get("tol") if in_rounds else None,
            "draft": hash_weights(draft) or "given" if in_rounds and draft is not None else None,
            "spectrum": hash_values([spectrum.variance, spectrum.channels]) if in_rounds and spectrum else None,
        }

    def answers(self) -> list[float]:
        """Some numbers of the model's predictions, of the size of one value of them."""
        numbers = range(ASKED)
        noise = self.noise(numbers)[0]
        model, kwargs, _ = self.conditions(numbers)
        system = self.sampler(model, Method(SERIAL, ASKED)).options.system(noise, kwargs, serial=True)
        step = torch.tensor([self.schedule.num_steps // 2, self.schedule.num_steps - 1], device=self.device)
        size = math.prod(self.shape)
        signs = torch.randint(2, (ANSWERS, size), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
        with torch.no_grad():
            rows = noise.reshape(ASKED, size).to(system.dtype) / self.schedule.init_noise_sigma
            at = torch.arange(ASKED, device=self.device)
            said = system.predict(rows, step, system.expand_kwargs(at)).cpu().double()
        found: list[float] = (said @ signs.double().T / size**0.5).flatten().tolist()
        return found


def _rows(name: str, value: Any, batch: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that has one row a sample, in nested dicts too."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _rows(f"{name}.{key}" if name else str(key), item, batch)
    elif isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch:
        yield name, value
    elif is_list_of_strings(value, batch):
        raise ValueError(f"model_kwargs: expected tensors, got strings in {name!r}; give their embeddings")
