"""A draft makes the chain between the rounds: a cheap stand-in for the model, corrected by what the model predicted."""

from __future__ import annotations

from dataclasses import dataclass

from .quasi_newton import QuasiNewton


@dataclass(frozen=True)
class Drafted(QuasiNewton):
    """X <- the chain of x -> E + M(x) - M(X) + S (x - X) between nodes, by a draft M of the model.

    E is the model's prediction at X; M, `DEQSampler(draft=...)`, anything that predicts roughly what the model does and
    costs little; S the Jacobian of E - M along the secants of the last rounds. With M(x) = c x, a linear draft, this is
    `QuasiNewton`, and where rounds on nodes do not suffice, rounds on all timesteps are its own. The fixed point is the
    serial chain whatever M is; how many rounds it takes depends on how well the Jacobian of M is the model's. The first
    guess is the chain of the draft alone. Each sweep of M is one batched call on all nodes. Cf. deferred correction and
    Parareal (Lions, Maday, Turinici 2001), where the cheap propagator is a coarser step of the same model, and draft
    models in speculative decoding (Leviathan et al. 2023, arXiv 2211.17192).

    Args: as for `QuasiNewton`.

    Raises:
        ValueError: a bad setting, by its name.
    """

    needs_draft = True

    @property
    def name(self) -> str:
        return "draft"
