"""What a running solve shows: the user's callback and a progress bar."""

from __future__ import annotations

import torch
from torch import Tensor

from .._devices import users_settings
from ..loop.window import Window
from ..solution import Callback, RoundInfo, asks_to_stop
from .reporting import ProgressBar
from .workspace import Workspace


class Reporter:
    """Called by the loop after every round; a context manager, so that the bar is closed whatever happens."""

    def __init__(self, work: Workspace, tolerance: float, limit: int, callback: Callback | None, bar: bool) -> None:
        self.work, self.tolerance, self.limit, self.callback = work, tolerance, limit, callback
        self.bar = ProgressBar(bar, "solving", "state", work.system.num_steps * work.system.batch)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.__exit__(*exc)

    def __call__(self, round: int, where: Window | list[int], residual: Tensor) -> object:
        front = where.lo if isinstance(where, Window) else where
        self.bar.show(sum(front), residual, round=round)
        if self.callback is None:
            return None
        with users_settings():
            return asks_to_stop(self.callback(self._info(round, list(front), where, residual)))

    def _info(self, round: int, front: list[int], where: Window | list[int], residual: Tensor) -> RoundInfo:
        system, chain = self.work.system, self.work.chain
        last = [max(hi - 1, 0) for hi in chain.hi.tolist()]

        def state(step: int) -> Tensor:
            return system.from_basis(chain.states[step]).view(system.batch, *system.shape).to(system.model_dtype)

        return RoundInfo(
            round=round,
            max_rounds=self.limit,
            num_steps=system.num_steps,
            front=torch.tensor(front),
            residual=residual,
            tolerance=self.tolerance,
            _preview=lambda: system.denoised(chain.states, chain.predictions, last),
            _sample=lambda: state(-1),
            _state=state,
            _denoised=lambda step: system.denoised(chain.states, chain.predictions, [step] * system.batch),
        )
