"""What callbacks, or a loop itself, change between two steps that the rest of a chain depends on."""

from __future__ import annotations

from typing import Any

import torch

from .fingerprint import Fingerprint
from .problem import DenoisingProblem
from .random_state import RandomState

_OF_ALL = frozenset(vars(torch.nn.Module())) - {"training"}  # attributes of every module


def has_callbacks(arguments: dict[str, Any]) -> bool:
    """Whether a pipeline's call runs code of its caller between two steps."""
    return any(arguments.get(name) is not None for name in ("callback_on_step_end", "callback"))


def numbers(pipe: Any, arguments: dict[str, Any]) -> list[float]:
    """Those that a call was given and that the pipeline keeps, the scale of its guidance among them."""
    found = (*arguments.values(), *vars(pipe).values())
    return [float(value) for value in found if isinstance(value, (int, float)) and not isinstance(value, bool)]


class ChangeMonitor:
    """Compares model, scheduler and generators before a step with what they were after the last one.

    parts: {name: proxy} as put into the pipeline; active: whether there is anybody who could change more than those and
    settings of the model, as a loop itself may.
    """

    def __init__(
        self, pipe: Any, parts: dict[str, Any], denoisers: torch.nn.ModuleList, scheduler: Any, active: bool
    ) -> None:
        self.pipe, self.parts, self.scheduler = pipe, parts, scheduler
        self.denoisers = denoisers
        self.active = active
        self.solved: DenoisingProblem | None = None
        self.settings: list[Any] | None = None
        self.model: Fingerprint | None = None
        self.rule: Fingerprint | None = None
        self.random: RandomState | None = None

    def remember(self, problem: DenoisingProblem, index: int) -> None:
        """What to compare with: after step index - 1, before the callbacks."""
        if index >= len(problem.timesteps):
            return
        if not self.active:
            if problem is not self.solved:  # networks may keep something of the calls of a solve
                self.solved, self.settings = problem, _settings(self.denoisers)
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
        if self.settings is not None and self.settings != _settings(self.denoisers):
            return "other settings of the model"
        if self.rule is None:
            return ""
        if Fingerprint(self.scheduler) != self.rule:
            return "another state of the scheduler"
        if self.random is not None and self.random.changed():
            return "another state of the generator"
        return "other weights or settings of the model" if self._of_model() != self.model else ""

    def _of_model(self) -> Fingerprint:
        return Fingerprint(*self.denoisers, only=self.denoisers, before=self.model)


def _settings(model: torch.nn.Module) -> list[Any]:
    """Which modules it has, and what attributes of their own they hold: values where they are simple, else which
    objects; a millisecond for a thousand modules, where a fingerprint takes twenty."""
    found: list[Any] = []
    for module in model.modules():
        found.append(id(module))
        for name, item in vars(module).items():
            if name not in _OF_ALL:
                found.append(item if type(item) in (bool, int, float, str) else id(item))
    return found
