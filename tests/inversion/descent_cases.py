"""A bent model, and inversions of its images by descent."""

from __future__ import annotations

import torch

import deqdiff_fast as dq


class Bend:
    """A mildly nonlinear model around that of unit Gaussian data: its chain keeps the size of a state."""

    sigma = (1 - (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)).sqrt().float()

    def __call__(self, x, t, shift=0.0):
        flat = x.flatten(1)
        bent = 0.8 * flat + 0.3 * torch.tanh(flat.roll(1, dims=1) + shift)
        return (self.sigma[t][:, None] * bent).view_as(x)


def invert(schedule, image, model=None, **options):
    tol = options.pop("tol", None)
    return dq.DEQInverter(model or Bend(), schedule, method="gradient", tol=tol, **options)
