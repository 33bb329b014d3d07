"""Both memories of solvers."""

from __future__ import annotations

import pytest

from deqdiff_fast.memory import pool as module


@pytest.fixture(params=["extension", "torch"])
def arena(request, monkeypatch):
    """Runs the test once with the C++ arena and once with torch's memory: the arena's class, or None."""
    kind = pytest.importorskip("deqdiff_fast._C").Arena if request.param == "extension" else None
    monkeypatch.setattr(module, "_arena_class", lambda: kind)
    return kind


@pytest.fixture
def reusing(monkeypatch):
    """For what only the C++ arena does: hand the same slab out again."""
    kind = pytest.importorskip("deqdiff_fast._C").Arena
    monkeypatch.setattr(module, "_arena_class", lambda: kind)
    return kind
