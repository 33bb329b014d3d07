"""What interpolation between nodes misses of a model, measured once: a sample whose chain was asked nearly everywhere.

Leave one out, the estimate of a round, looks at intervals twice as long as those that are left out. Of what is smooth
in time it is several times too large, and of what is rough, as a network's embedding of the timestep makes it, it may
be too small where nodes and roughness fall into step. How much depends on the model and on the nodes, and hardly on the
sample: with one sample of which everything is known the ratio can be computed for any set of nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .composite import LinearChain, interpolation
from .grid import equidistribute
from .node_grid import NodeGrid, per_element

MOST_NUMBERS = 2**19  # that are kept of a sample's chain: of long chains those elements that count most
SAFETY = 1.6  # times the ratio that was found: samples differ by that much
LEAST, MOST = 0.25, 10.0  # what a ratio, with that, may be
FINE = 0.65  # of the tolerance: what the nodes of the last round may leave
MOST_SETS = 256  # of nodes that are remembered: those that a sample refines are its own
TINY = 1e-300
FEWEST = 0.75  # of the usual number of nodes


class TimeReference:
    """Predictions along one sample's chain.

    Args:
        chain, classes: the linear model at the time; (D,), the class of every element, None for a single one.
        timesteps: (m,), sorted, at which the model was asked.
        remainder: (m, D) there.
        score: (D,), how much of each element interpolation was seen to miss.
        size: L2 norm of the sample.
    """

    def __init__(
        self, chain: LinearChain, classes: Tensor | None, timesteps: Tensor, remainder: Tensor, score: Tensor,
        size: float,
    ) -> None:  # fmt: skip
        steps, total = len(chain.unit), float(score.square().sum())
        kept = score.topk(min(len(score), max(1, MOST_NUMBERS // steps))).indices
        held = float(score[kept].square().sum())
        self.chain = chain
        self.size = max(size, TINY) * math.sqrt(held / total if held > 0 else 1.0)
        self.classes = None if classes is None else classes[kept].cpu()
        known = remainder[:, kept].cpu().double()
        self.remainder = interpolation(timesteps, torch.arange(steps), chain.unit) @ known  # (T, d)
        self.influence = per_element(chain.influence, self.classes)[:, 0]
        self._ratios: dict[tuple[int, ...], float] = {}
        self._sets: dict[tuple[int, int, float], tuple[list[int], list[int]] | None] = {}

    def missed(self, nodes: Sequence[int]) -> float:
        """Relative error of that sample by what interpolation between these nodes misses."""
        at = torch.tensor(nodes)
        made = interpolation(at, torch.arange(len(self.remainder)), self.chain.unit) @ self.remainder[at]
        return float(((self.remainder - made) * self.influence).sum(0).norm()) / self.size

    def ratio(self, nodes: tuple[int, ...]) -> float:
        """By how much the estimate of interpolation between these nodes is to be multiplied."""
        if nodes not in self._ratios:
            grid = NodeGrid.of(self.chain, list(nodes), torch.float64, torch.device("cpu"))
            left_out = grid.leave_one_out @ self.remainder[grid.at]
            told = float((left_out * per_element(grid.excess, self.classes)[:, 0]).norm()) / self.size
            found = SAFETY * self.missed(nodes) / told if told > 0 else 1.0
            if len(self._ratios) == MOST_SETS:
                self._ratios.clear()
            self._ratios[nodes] = min(max(found, LEAST), MOST)
        return self._ratios[nodes]

    def sets(self, density: Tensor, usual: int, most: int, tol: float) -> tuple[list[int], list[int]] | None:
        """Few nodes for the rounds before the last, and more, those among them, for the last; None where no number of
        nodes leaves little enough.

        Args:
            density: (T,), how nodes are spread.
            usual, most: how many there are where nothing is known, and how many there may be.
        """
        key = usual, most, tol
        if key not in self._sets:
            least = math.ceil(FEWEST * usual)
            every = (equidistribute(density, count) for count in range(least, most + 1))
            fine = next((nodes for nodes in every if SAFETY * self.missed(nodes) <= FINE * tol), None)
            self._sets[key] = None if fine is None else (some(fine, least), fine)
        return self._sets[key]


def some(nodes: list[int], count: int) -> list[int]:
    """So many of them, the first and the last included, evenly chosen."""
    last, count = len(nodes) - 1, min(count, len(nodes))
    return [nodes[round(k * last / (count - 1))] for k in range(count)]
