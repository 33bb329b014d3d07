"""Tiny pipelines, shared by the tests of this folder."""

from __future__ import annotations

import pytest


@pytest.fixture
def make(tiny, tmp_path):
    def make(name: str, rule: str | None = None, **config):
        try:
            return tiny.build(name, tmp_path, rule, **config)
        except ImportError as error:
            pytest.skip(str(error).strip().splitlines()[0])

    return make
