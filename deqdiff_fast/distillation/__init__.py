"""Drafts out of models: a small network fitted to a model's own predictions. No data is needed."""

from __future__ import annotations

from .distill import distill
from .get import GET, GETSize
from .report import DraftReport

__all__ = ["GET", "DraftReport", "GETSize", "distill"]
