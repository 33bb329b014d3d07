"""The samplers that solve the chains of what measurements leave open."""

from __future__ import annotations

from typing import Any

from ..engine.options import DEFAULT_TOL
from ..sampler import DEQSampler
from ..schedule import SpectralSlope


class UnknownsSolver:
    """Samplers of a restoring chain, which differ in their tolerance only.

    Attributes:
        sampler: that of the tolerance asked for.
        slope: (T,), of the predictions on the average.
        unseen: the part of the data's variance that is expected in the unknowns.
        variance: of the data, on the average.
        trusted: whether samples were as `unseen` says, so far.
    """

    def __init__(
        self, plain: DEQSampler, spectrum: SpectralSlope | None, options: dict[str, Any], unseen: float, variance: float
    ) -> None:
        self.options = {**options, "spectrum": spectrum}
        self.unseen, self.variance, self.trusted = unseen, variance, True
        self.slope = plain.schedule.slope(1.0 if spectrum is None else float(spectrum.variance.mean()))
        self.sampler = DEQSampler(plain.model, plain.schedule, **self.options)
        self._others = {1.0: self.sampler}

    def with_factor(self, factor: float) -> DEQSampler:
        """The sampler that is allowed `factor` times the relative error; a solver's own tolerance stays."""
        if self.options.get("tol") is None and self.sampler.solver.tol is not None:
            return self.sampler
        if factor not in self._others:
            tol = factor * (self.options.get("tol") or DEFAULT_TOL)
            self._others[factor] = DEQSampler(self.sampler.model, self.sampler.schedule, **{**self.options, "tol": tol})
        return self._others[factor]
