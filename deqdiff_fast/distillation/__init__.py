"""What is made of a model without any data: drafts, fitted to its own predictions, and pairs of noises and samples."""

from __future__ import annotations

from .distill import distill
from .get import GET, GETSize
from .pairs import Pairs
from .report import DraftReport

__all__ = ["GET", "DraftReport", "GETSize", "Pairs", "distill"]
