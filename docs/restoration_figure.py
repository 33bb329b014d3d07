"""The figure of the page on restoration, from real runs on the bundled model.

    python docs/restoration_figure.py      # writes docs/figures/restoration.png and restoration.json

Images that the bundled model makes, for which nobody's permission is needed; measured with noise of 0.05, restored from
other noise, in rounds or serially, whichever is the faster here. Needs: deqdiff_fast[diffusers]. A few minutes on one
CPU core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast import operators
from deqdiff_fast.integrations.diffusers import ddim_schedule, load_model

HERE = Path(__file__).resolve().parent
SIGMA, STEPS, METHOD, COUNT = 0.05, 50, "diffpir", 16
ETA, TEMPERATURE = 1.0, 0.25  # for little error, as the page says
OTHER_NOISE = 10**5  # an image must not be sought from the noise that made it
MAGNIFIED, GAP = 2, 2  # pixels of the figure


def measured_by(shape: tuple[int, ...]) -> dict[str, operators.Operator]:
    """Name: operator, for images of that shape."""
    half = torch.rand((1, *shape[1:]), generator=torch.Generator().manual_seed(0)) < 0.5
    return {
        "means over 4 x 4 pixels": operators.Downsample(4),
        "Gaussian blur of 1.5 pixels": operators.Blur.gaussian(1.5, size=9),
        "half of the pixels": operators.Inpaint(half),
    }


def psnr(restored: Tensor, truth: Tensor) -> Tensor:
    """(B,) dB, of pixels in [-1, 1]."""
    return 10 * (4 / (restored.clamp(-1, 1) - truth).square().flatten(1).mean(1)).log10()


def picture(rows: list[Tensor]) -> Image.Image:
    """A grid, one row of images (B, C, H, W) in [-1, 1] for each; smaller images are magnified to the largest."""
    side = max(row.shape[-1] for row in rows) * MAGNIFIED
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (side + GAP), columns * (side + GAP), 3), 255, np.uint8)
    for i, row in enumerate(rows):
        times = side // row.shape[-1]
        large = row.clamp(-1, 1).repeat_interleave(times, 2).repeat_interleave(times, 3)
        pixels = ((large + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for j, image in enumerate(pixels):
            top, left = i * (side + GAP), j * (side + GAP)
            canvas[top : top + side, left : left + side] = image
    return Image.fromarray(canvas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=HERE / "figures")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    loaded = load_model("bundled")
    shape = loaded.info.sample_shape

    def drawn(first: int, size: tuple[int, ...]) -> Tensor:
        return torch.stack(
            [torch.randn(size, generator=torch.Generator().manual_seed(first + k)) for k in range(args.count)]
        )

    truth = dq.DEQSampler(loaded.model, ddim_schedule(loaded.scheduler, args.steps)).serial(drawn(0, shape)).sample
    truth, schedule = truth.clamp(-1, 1), ddim_schedule(loaded.scheduler, args.steps, eta=ETA)
    rows, facts = list[Tensor](), dict[str, object]()
    for name, operator in measured_by(shape).items():
        clean = operator.A(truth)
        y = clean + SIGMA * drawn(2 * 10**6, tuple(clean.shape[1:]))
        restorer = dq.DEQRestorer(
            loaded.model, schedule, operator, sigma=SIGMA, method=METHOD, temperature=TEMPERATURE,
            spectrum=loaded.spectrum, draft=loaded.draft,
        )  # fmt: skip
        generators = [torch.Generator().manual_seed(10**6 + k) for k in range(args.count)]
        found = restorer.restore(y, generator=generators, noise=drawn(OTHER_NOISE, shape))
        rows += [y, found.sample]
        facts[name] = {
            "psnr": round(float(psnr(found.sample, truth).mean()), 2),
            "calls": found.stats.rounds, "converged": int(found.converged.sum()),
        }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    picture([*rows, truth]).save(args.out / "restoration.png", optimize=True)
    settings = {"method": METHOD, "sigma": SIGMA, "steps": args.steps, "eta": ETA, "temperature": TEMPERATURE}
    (args.out / "restoration.json").write_text(json.dumps(settings | facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
