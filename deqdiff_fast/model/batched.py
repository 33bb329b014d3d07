"""The model called on many (timestep, sample) rows as one batch: chunks, padding, conditioning, clipping, checks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._types import Coordinates, Model, Rows
from ..errors import ModelOutputError, RankError
from ..memory import Lease, MemoryPlan
from ..schedule import Schedule
from ..schedule.cache import cached
from .outputs import output_fault
from .padding import is_compiled, out_of_memory, padded_sizes
from .row_tables import count_users, row_tables, told_steps
from .sample_kwargs import select_rows, select_samples
from .transforms import call

_log = logging.getLogger("deqdiff_fast")


class BatchedModel:
    """A model on the rows of one chain. The states are float32, or float64 where the noise is; the model is called in
    the dtype of the noise.

    Args:
        noise: (B, *shape), for its shape, dtype and device.
        model_kwargs: passed to every call; tensors of B rows belong to the samples.
        max_batch: most rows in one call, None for no limit.
        basis: the coordinates of the solver, None for the model's own.
    """

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        noise: Tensor,
        model_kwargs: dict[str, Any] | None,
        max_batch: int | None,
        basis: Coordinates | None = None,
    ) -> None:
        self.model, self.schedule, self.max_batch, self.basis = model, schedule, max_batch, basis
        self.model_kwargs = dict(model_kwargs or {})
        if hasattr(model, "bind_batch"):  # a guided model brings per-sample tensors of its own
            self.model_kwargs = model.bind_batch(noise.shape[0], self.model_kwargs)
        self.num_steps, self.batch, self.shape = schedule.num_steps, noise.shape[0], tuple(noise.shape[1:])
        self.numel, self.model_dtype, self.device = math.prod(self.shape), noise.dtype, noise.device
        self.dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
        on_cpu = noise.device.type == "cpu"
        self.accumulator = torch.float64 if on_cpu or self.dtype == torch.float64 else torch.float32
        place = (noise.device, self.dtype, self.accumulator)
        self.times, self.denoised_coef, self.input_scale, self.clip_gain = cached(
            schedule, ("model", *place), lambda: self._tables(schedule)
        )
        self.row_tables = cached(schedule, ("rows", *place, self.batch), lambda: row_tables(self.times, self.batch))
        self.padded = is_compiled(model)
        self.told_steps = told_steps(model)
        self.sizes: tuple[int, ...] = ()
        self.cheaper: tuple[tuple[int, int], ...] = ()
        """(least, size): calls of at least so many rows, but fewer than `size`, are faster with `size` of them."""
        self.largest: int | None = None  # rows that the padded sizes are made for; None: those of the workspace
        self.learned: dict[str, int] = {}
        """What calls have told of the model: max_batch, where it ran out of memory on more; keeps_inputs."""
        self.shrinks = True  # False: a lack of memory is an error
        self.give_way: Callable[[], bool] = bool
        """Frees memory that is held for speed only; returns whether there was any."""
        self.model_evals = self.model_calls = 0
        self.check_evals = 0  # those of them that only checked the model
        self._expanded: tuple[Any, dict[str, Any]] | None = None

    def _tables(self, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The model's times, [p, q] of the denoised estimate, and, where there are any, input scales and clip gains."""
        times = schedule.timesteps if not schedule.timesteps.is_floating_point() else schedule.timesteps.to(self.dtype)
        scaled = not bool((schedule.input_scale == 1).all())
        return (
            times.to(self.device),
            schedule.denoised_coef().to(self.device, self.accumulator).contiguous(),
            schedule.input_scale.to(self.device, self.dtype) if scaled else None,
            None if schedule.clip is None else schedule.clip.gain.to(self.device, self.accumulator).contiguous(),
        )

    def plan(self, plan: MemoryPlan, rows: int) -> None:
        """Ask for what `evaluate` needs for that many rows in one call of the model."""
        if self.padded:
            self.sizes = padded_sizes(max(rows, self.largest or rows), self.batch)
        rows = max(self.pad(rows), *(size for least, size in self.cheaper if least <= rows), 0)
        plan.add("rows", (rows, self.numel), self.dtype)
        plan.add("inputs", (rows, self.numel), self.model_dtype)
        if self.basis is not None:
            plan.add("spare", (rows, self.numel), self.dtype)

    def pad(self, rows: int) -> int:
        """The size of the model call for that many rows: the next of the padded sizes, or a faster one, if any."""
        faster = next((size for least, size in self.cheaper if least <= rows < size), rows)
        return next((size for size in self.sizes if size >= rows), faster)

    def pad_round(self, rows: int) -> int:
        """The rows of the model calls of a round of that many rows, padding included."""
        full = rows - rows % self.max_batch if self.max_batch else 0
        return full + (self.pad(rows - full) if rows > full else 0)

    def chunks(self, count: int) -> Iterator[tuple[int, int]]:
        """[start, stop) pieces of `count` rows, none larger than `max_batch`."""
        size = self.max_batch or max(count, 1)
        return ((start, min(start + size, count)) for start in range(0, count, size))

    def evaluate(self, states: Tensor, predictions: Tensor, rows: Rows, lease: Lease, round: int) -> None:
        """predictions[i, b] = model(states[i, b], timestep i) for the given rows, in chunks of at most `max_batch`.

        Where a model runs out of memory, what is held for speed is given up first; then it gets half as many rows
        from then on.

        Args:
            states: (T + 1, B, D).
            predictions: (T, B, D), or (T B + 1, D) where `rows` has the spare row T B among them.
            lease: the memory asked for in `plan`.

        Raises:
            ModelOutputError: the model returned something that is not a prediction.
        """
        source, target = states.flatten(0, 1), predictions.view(-1, self.numel)
        start = 0
        while start < rows.count:
            stop = min(start + (self.max_batch or rows.count), rows.count)
            try:
                self._evaluate(source, target, rows, start, stop, lease, round)
                start = stop
                continue
            except RuntimeError as error:
                if not out_of_memory(error) or not self.shrinks or (stop - start == 1 and not self.give_way()):
                    raise
            if stop - start > 1 and not self.give_way():  # the error, and the memory that it holds on to, is gone
                self._shrink(stop - start)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _shrink(self, rows: int) -> None:
        """At most half of `rows` in a call from now on."""
        self.max_batch = max(1, rows // 2)
        _log.warning("the model ran out of memory on %d rows; at most %d from now on", rows, self.max_batch)
        self.largest, self.cheaper = None, ()  # those rows were too many
        if self.sizes:
            self.sizes = padded_sizes(self.max_batch, min(self.batch, self.max_batch))
        self.learned["max_batch"] = self.max_batch

    def _evaluate(
        self, source: Tensor, target: Tensor, rows: Rows, start: int, stop: int, lease: Lease, round: int
    ) -> None:
        """One call of the model, for rows [start, stop) of `rows`."""
        count, size, first = stop - start, self.pad(stop - start), rows.lo * self.batch + start
        at = slice(first, first + count) if rows.flat is None else rows.flat[start:stop].to(self.device)
        step, sample, times = (table[at] for table in self.row_tables)
        if rows.slots is not None:
            at = rows.slots[start:stop]
        if size > count:
            step, sample, times = (torch.cat([t, t[:1].expand(size - count)]) for t in (step, sample, times))
        elif isinstance(at, slice):
            times = times.clone()  # the model may write to its arguments
        spare = None if self.basis is None else lease["spare"][:count]
        if isinstance(at, slice):
            states = source[at] if self.basis is None else lease["rows"][:count].copy_(source[at])
        else:
            states = torch.index_select(source, 0, at, out=lease["rows"][:count])
        if self.basis is not None:
            self.basis.inverse(states, spare)
        inputs, users = self._input_memory(lease, size)
        inputs[:count].copy_(states)
        if size > count:
            inputs[count:].copy_(inputs[:1].expand(size - count, self.numel))
        if self.input_scale is not None:
            inputs.mul_(self.input_scale[step, None])  # not rounded to 16 bits itself: the serial chain's is not
        kwargs = self.expand_kwargs(sample, (rows.lo, rows.hi, start, stop) if rows.flat is None else None)
        output = self._call(inputs, step, kwargs, round, times, count)[:count]
        output = self.clip(output, states, step[:count])
        if self.basis is not None:
            output = self.basis.forward(states.copy_(output), spare)
        if isinstance(at, slice):
            target[at].copy_(output)
        else:
            target.index_copy_(0, at, output if output.dtype == target.dtype else states.copy_(output))
        del output  # it may be the input itself
        if users and count_users(inputs) > users:
            self.learned["keeps_inputs"] = 1

    def _input_memory(self, lease: Lease, size: int) -> tuple[Tensor, int]:
        """(size, D) for the input of a call, and by how many the memory is used; 0 where it is this call's alone: a
        model that keeps what it was given (a hook, a cache) must not find the next call's values in it."""
        users = 0 if "keeps_inputs" in self.learned else count_users(lease["inputs"])
        if not users:
            return torch.empty(size, self.numel, dtype=self.model_dtype, device=self.device), 0
        return lease["inputs"][:size], users

    def predict(self, states: Tensor, step: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """(n, D) states at timesteps step: (n,) -> (n, D) predictions, differentiable, in the model's own coordinates;
        kwargs as the rows need them. The model may write to its input and, in the next call, to its output."""
        inputs = states.clone() if self.input_scale is None else states * self.input_scale[step, None]
        output = self.clip(self._call(inputs.to(self.model_dtype), step, kwargs, 0), states, step)
        return output.to(self.dtype, copy=True)

    def expand_kwargs(self, sample: Tensor, key: Any = None) -> dict[str, Any]:
        """model_kwargs with every per-sample tensor (first dimension B) indexed by `sample`: (n,), for n rows.

        What was expanded for the last `key` is cached: neighbouring rounds often ask for the same rows.
        """
        if not self.model_kwargs:
            return {}
        if key is not None and self._expanded is not None and self._expanded[0] == key:
            return self._expanded[1]

        expanded = self.select(self.model_kwargs, sample)
        self._expanded = (key, expanded) if key is not None else None
        return expanded

    def select(self, values: dict[str, Any], sample: Tensor) -> dict[str, Any]:
        """Arguments as a call on rows of those samples wants them, (n,)."""
        cuts = getattr(self.model, "takes_marks", False)  # what has n rows, unless it is marked
        return dict((select_samples if cuts else select_rows)(values, self.batch, sample))

    def _call(
        self, inputs: Tensor, step: Tensor, kwargs: dict[str, Any], round: int, times: Tensor | None = None,
        count: int | None = None,
    ) -> Tensor:  # fmt: skip
        """One call on rows `inputs`: (n, D), of which the first `count` are wanted; checked, (n, D)."""
        kwargs = {**kwargs, "step": step} if self.told_steps else kwargs
        try:
            value = call(self.model, inputs.view(-1, *self.shape), self.times[step] if times is None else times, kwargs)
        except RankError as error:
            error.round = round or None
            raise
        self.model_calls += 1
        self.model_evals += len(step) if count is None else count
        fault = output_fault(value, (len(step), *self.shape), self.device)
        if fault:  # only here are the times read: they may lie on a device that must not be waited for
            first, last = (self.times[step[k]].item() for k in (0, -1))
            raise ModelOutputError(f"the model returned {fault} (round {round}, timesteps {first:g} to {last:g})")
        prediction: Tensor = value
        return prediction.reshape(len(step), self.numel)

    def clip(self, output: Tensor, states: Tensor, step: Tensor) -> Tensor:
        """output + gain (clamp(x0) - x0): clipping the predicted sample, as a pointwise map of the prediction."""
        if self.schedule.clip is None or self.clip_gain is None:
            return output
        p, q = self.denoised_coef[step].to(self.dtype).unbind(-1)
        clean = p[:, None] * states.to(self.dtype) + q[:, None] * output.to(self.dtype)
        excess = clean.clamp(-self.schedule.clip.range, self.schedule.clip.range) - clean
        return output.to(self.dtype) + self.clip_gain[step, None].to(self.dtype) * excess
