"""An extension that was built before an op existed: said when asked for, done without otherwise."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq

_C = pytest.importorskip("deqdiff_fast._C")
from deqdiff_fast.kernels import _backends  # noqa: E402


@pytest.fixture
def outdated(monkeypatch):
    monkeypatch.delattr(_C, "inverse_scan")
    _backends.extension.cache_clear()
    yield
    _backends.extension.cache_clear()


def test_an_outdated_extension_is_named_or_done_without(outdated, mixture, ddim, noise):
    assert "inverse_scan" in _backends.available_backends()["cpp"]
    model, schedule = mixture(), ddim(10)
    image = dq.DEQSampler(model, schedule).serial(noise(1)).sample
    with pytest.raises(dq.BackendUnavailableError, match=r"out of date .*inverse_scan.*pip install \."):
        dq.DEQInverter(model, schedule, backend="cpp").invert(image)
    assert dq.DEQInverter(model, schedule).invert(image).converged.all()
    assert _backends.resolve("auto", (torch.zeros(1),)) == "reference"
