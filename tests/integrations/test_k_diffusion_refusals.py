"""What `sample_deq` refuses: models whose rows depend on each other, and bad arguments."""

from __future__ import annotations

import pytest
import torch

from deqdiff_fast.integrations.k_diffusion import sample_deq


def denoised(x, sigma):
    return x / (1 + sigma[:, None, None, None] ** 2)


def window(x, sigma):
    """A condition that is on for middle sigmas only, decided by the first row."""
    return denoised(x, sigma) + (0.5 if 1.0 < sigma[0] < 6.0 else 0.0)


def tiled(x, sigma):
    """A mask for two samples, tiled to the rows of the call."""
    mask = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    return denoised(x, sigma) * mask.repeat(len(x) // 2, 1, 1, 1)


def first_sigma(x, sigma):
    return x / (1 + sigma[0] ** 2)


def two_rows(x, sigma):
    """What was stored for the rows of another call."""
    return denoised(x, sigma) + torch.ones(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (window, r"rows are not independent: .* sigma\[0\] for all rows"),
        (tiled, "rows are not independent: .* keep masks or conditions for one batch"),
        (first_sigma, "rows are not independent"),
        (two_rows, "works on one timestep, but not on one batch of 3 timesteps x 2 samples"),
    ],
)
def test_models_whose_rows_depend_on_each_other_are_refused(karras, noise, model, message):
    with pytest.raises(ValueError, match=message):
        sample_deq(model, noise(2), karras(), disable=True)


@pytest.mark.usefixtures("rows_are_known")
def test_the_comparison_is_made_once(karras, noise):
    calls = []

    def model(x, sigma, **extra):
        calls.append(len(x))
        return denoised(x, sigma)

    counts = []
    for extra in ({}, {}, {"cond": torch.zeros(2, 3)}):
        before = len(calls)
        sample_deq(model, noise(2), karras(6), extra, disable=True, window=6)
        counts.append(len(calls) - before)
    assert counts[0] == counts[1] + 3
    assert counts[2] == counts[0]


def test_bad_arguments(karras, noise):
    x, sigmas = noise(2), karras(5)
    with pytest.raises(TypeError, match=r"sample_deq: unknown option s_churn; there are method, .*max_rounds"):
        sample_deq(denoised, x, sigmas, s_churn=1.0)
    with pytest.raises(ValueError, match=r"method: expected 'euler' or 'dpmpp_2m', or a sampler itself, .*got 'heun'"):
        sample_deq(denoised, x, sigmas, method="heun")
    with pytest.raises(ValueError, match="sigmas: expected strictly descending"):
        sample_deq(denoised, x, sigmas.flip(0))
    with pytest.raises(TypeError, match="extra_args: expected a dict or None, got list"):
        sample_deq(denoised, x, sigmas, [1])
    with pytest.raises(TypeError, match="x: expected a tensor"):
        sample_deq(denoised, 3, sigmas)
    with pytest.raises(ValueError, match=r"the model returned .*shape"):
        sample_deq(lambda x, sigma: x[:, :1], x, sigmas)
    assert sample_deq(denoised, x, sigmas[:1]) is x


def test_a_window_that_is_switched_on_later_is_refused():
    """The comparison is made anew for a model that has changed since it passed."""

    class Windowed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.windows, self.calls = torch.nn.Parameter(torch.ones(1)), [], []

        def forward(self, x, sigma):
            out = self.scale * x / (1 + sigma.view(-1, 1, 1, 1) ** 2)
            return out * 0.5 if any(low < float(sigma[0]) <= high for low, high in self.windows) else out

    model = Windowed().requires_grad_(False)
    x = 10 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.5, 0.0])
    for _ in range(2):
        sample_deq(model, x, sigmas, disable=True)
    model.windows.append((0.0, 3.0))
    with pytest.raises(ValueError, match="not independent"):
        sample_deq(model, x, sigmas, disable=True)
    model.windows.clear()
    sample_deq(model, x, sigmas, disable=True)
