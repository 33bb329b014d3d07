"""A draft of another model is refused before a solve begins: in the middle of it, it fails by its index."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq


def draft(timesteps: int = 1000, size: int = 8) -> dq.ConvDraft:
    spectrum = dq.SpectralSlope(torch.ones(3, size, size), torch.eye(3))
    return dq.ConvDraft(torch.linspace(0.99, 0.01, timesteps), "epsilon", spectrum, 8, 1)


def test_a_draft_of_fewer_timesteps(mixture, ddim):
    with pytest.raises(ValueError, match="draft: expected one that knows the schedule's timesteps, up to 950"):
        dq.DEQSampler(mixture(), ddim(20), draft=draft(950))
    dq.DEQSampler(mixture(), ddim(20), draft=draft(951))


def test_a_draft_of_other_samples(mixture, ddim, noise):
    sampler = dq.DEQSampler(mixture(), ddim(20), solver="draft", draft=draft(size=16))
    with pytest.raises(
        ValueError, match=r"noise: expected samples of the draft's shape \(3, 16, 16\), got \(3, 8, 8\)"
    ):
        sampler.sample(noise(1))
    assert sampler.serial(noise(1)).converged.all()
