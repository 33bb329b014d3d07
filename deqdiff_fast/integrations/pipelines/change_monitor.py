"""What callbacks change between two steps that the rest of a chain depends on."""

from __future__ import annotations

from typing import Any

import torch

from .fingerprint import Fingerprint
from .problem import DenoisingProblem
from .random_state import RandomState


def has_callbacks(arguments: dict[str, Any]) -> bool:
    """Whether a pipeline's call runs code of its caller between two steps."""
    return any(arguments.get(name) is not None for name in ("callback_on_step_end", "callback"))


def numbers(pipe: Any, arguments: dict[str, Any]) -> list[float]:
    """Those that a call was given and that the pipeline keeps, the scale of its guidance among them."""
    found = (*arguments.values(), *vars(pipe).values())
    return [float(value) for value in found if isinstance(value, (int, float)) and not isinstance(value, bool)]


class ChangeMonitor:
    """Compares model, scheduler and generators before a step with what they were after the last one.

    parts: {name: proxy} as put into the pipeline; active: whether there is anybody who could change more than those.
    """

    def __init__(
        self, pipe: Any, parts: dict[str, Any], denoisers: torch.nn.ModuleList, scheduler: Any, active: bool
    ) -> None:
        self.pipe, self.parts, self.scheduler = pipe, parts, scheduler
        self.denoisers = denoisers
        self.active = active
        self.model: Fingerprint | None = None
        self.rule: Fingerprint | None = None
        self.random: RandomState | None = None

    def remember(self, problem: DenoisingProblem, index: int) -> None:
        """What to compare with: after step index - 1, before the callbacks."""
        if not self.active or index >= len(problem.timesteps):
            return
        assert problem.schedule.draws is not None
        left = bool(problem.schedule.draws[index:].any())
        self.random = RandomState(problem.generator, problem.start.device) if left else None
        self.model = self.model or self._of_model()
        self.rule = Fingerprint(self.scheduler)

    def changed(self) -> str:
        """What was changed since; empty if nothing was."""
        for name, proxy in self.parts.items():
            if vars(self.pipe).get(name) is not proxy:
                return f"another {name}"
        if self.rule is None:
            return ""
        if Fingerprint(self.scheduler) != self.rule:
            return "another state of the scheduler"
        if self.random is not None and self.random.changed():
            return "another state of the generator"
        return "other weights or settings of the model" if self._of_model() != self.model else ""

    def _of_model(self) -> Fingerprint:
        return Fingerprint(*self.denoisers, only=self.denoisers, before=self.model)
