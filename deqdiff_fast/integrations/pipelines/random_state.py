"""Where random numbers come from, to be put back there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RandomState:
    """The states of the generators that a pipeline was given (one, a list, or None), or of the device's own."""

    def __init__(self, generator: Any, device: torch.device) -> None:
        given = generator if isinstance(generator, (list, tuple)) else [generator] if generator else []
        self.generators: list[torch.Generator] = list(given)
        self.device = device
        self.saved: list[Tensor] = [g.get_state() for g in self.generators] or [self._own().get_state()]

    def restore(self) -> None:
        for generator, state in zip(self.generators or [self._own()], self.saved):
            generator.set_state(state)

    def changed(self) -> bool:
        """Whether somebody has drawn since."""
        now = [g.get_state() for g in self.generators or [self._own()]]
        return not all(torch.equal(a, b) for a, b in zip(self.saved, now))

    def _own(self) -> torch.Generator:
        if self.device.type == "cuda":
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            return torch.cuda.default_generators[index]
        return torch.default_generator
