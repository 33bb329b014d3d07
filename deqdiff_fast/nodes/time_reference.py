"""What interpolation between nodes misses of a model, known of one sample whose chain was asked nearly everywhere.

A network's embedding of the timestep makes what it says rough in time. How much of that adds up along the chain depends
on how the nodes fall into step with it: sets of as many nodes, spread alike, differ by a factor of three and more. No
estimate that looks at the nodes alone can see which is good; one sample shows large differences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .composite import LinearChain, interpolation
from .grid import equidistribute
from .node_grid import per_element

MOST_NUMBERS = 2**19  # that are kept of a sample's chain: of long chains those elements that count most
TRIED = 16  # sets of nodes
CLEAR = 0.6  # times what the usual set misses: what one sample misses, another may miss twice, or half of it
TINY = 1e-300


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
        steps = len(chain.unit)
        kept = score.topk(min(len(score), max(1, MOST_NUMBERS // steps))).indices
        self.chain, self.size = chain, size
        known = remainder[:, kept].cpu().double()
        self.remainder = interpolation(timesteps, torch.arange(steps), chain.unit) @ known  # (T, d)
        self.influence = per_element(chain.influence, None if classes is None else classes[kept].cpu())[:, 0]
        self._best: dict[int, tuple[list[int], float]] = {}

    def missed(self, nodes: Sequence[int]) -> float:
        """Relative L2 error of that sample by what interpolation between these nodes misses in the elements kept."""
        at = torch.tensor(nodes)
        made = interpolation(at, torch.arange(len(self.remainder)), self.chain.unit) @ self.remainder[at]
        return float(((self.remainder - made) * self.influence).sum(0).norm()) / max(self.size, TINY)

    def best(self, density: Tensor, count: int, tol: float) -> list[int]:
        """So many nodes, spread by the density: (T,), so that little is missed; as ever where that is hardly less, or
        more than `tol`, for more nodes will be wanted then."""
        if count not in self._best:
            usual, *others = (equidistribute(density, count, turn) for turn in range(TRIED))
            found = min(others, key=self.missed)
            nodes = found if self.missed(found) <= CLEAR * self.missed(usual) else usual
            self._best[count] = nodes, self.missed(nodes)
        nodes, missed = self._best[count]
        return nodes if missed <= tol else equidistribute(density, count)
