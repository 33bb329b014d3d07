"""The standard deviation of noise, found in images that have structure."""

from __future__ import annotations

import pytest
import torch

from deqdiff_fast.operators import estimate_sigma


def smooth_images(channels: int) -> torch.Tensor:
    """(4, channels, 64, 64): a slope, a disc, stripes and a step, much the same in all channels."""
    down, right = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    plain = torch.stack([down, (down**2 + right**2 < 0.4).float(), (9 * right).sin(), (right > 0.3).float()])
    return plain[:, None] * torch.linspace(1, 0.8, channels)[:, None, None]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.3])
def test_it_finds_what_was_added(channels: int, sigma: float) -> None:
    x = smooth_images(channels)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = estimate_sigma(x + sigma * noise)
    assert found.shape == (4,)
    assert bool(((found / sigma - 1).abs() < 0.12).all()), found / sigma


def test_samples_have_their_own() -> None:
    x = smooth_images(3)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.0, 0.02, 0.1, 0.4])
    found = estimate_sigma(x + sigma[:, None, None, None] * noise)
    torch.testing.assert_close(found, sigma, rtol=0.1, atol=2e-3)
    torch.testing.assert_close(found[1:2], estimate_sigma((x + sigma[:, None, None, None] * noise)[1:2]))


def test_texture_that_channels_share_is_not_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    texture = torch.rand(1, 1, 32, 32, generator=generator).expand(1, 3, 32, 32)
    found = estimate_sigma(texture + 0.05 * torch.randn(1, 3, 32, 32, generator=generator))
    assert float(found) == pytest.approx(0.05, rel=0.15)


def test_pixels_that_were_not_measured_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1, 1, 64, 64, generator=generator) > 0.4
    y = mask * (smooth_images(3) + 0.1 * torch.randn(4, 3, 64, 64, generator=generator))
    torch.testing.assert_close(estimate_sigma(y, mask), torch.full((4,), 0.1), rtol=0.15, atol=0)
    assert bool((estimate_sigma(y) < 0.085).all())  # details of unmeasured pixels alone are 0


def test_short_dtypes_and_units() -> None:
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert estimate_sigma(noise.half()).dtype == torch.float16
    torch.testing.assert_close(estimate_sigma(255 * noise), 255 * estimate_sigma(noise))


def test_what_is_no_image_is_refused() -> None:
    for wrong, message in (
        (torch.zeros(2, 3, 16), r"\(B, C, H, W\)"),
        (torch.zeros(2, 3, 1, 16), "at least 2 x 2"),
        (torch.full((1, 1, 4, 4), torch.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate_sigma(wrong)
    with pytest.raises(ValueError, match="no 2 x 2 pixels"):
        estimate_sigma(torch.zeros(1, 1, 4, 4), torch.eye(4) > 0)
