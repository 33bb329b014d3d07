"""Find the noise behind two images, check the round trip, and walk from one to the other through their noises.

    python examples/invert_and_edit.py                      # two samples of the bundled CIFAR-10 model
    python examples/invert_and_edit.py a.png b.png          # images of your own, scaled to 32x32

The inversion solves for all states of the chain at once and takes no gradient; its error is what the plain serial chain
makes of the noise it found. Writes a strip of pictures: the first image, the walk, the second image.

Needs: deqdiff_fast[diffusers].
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.integrations.diffusers import ddim_schedule, load_model


def load(paths: list[Path]) -> Tensor:
    """(2, 3, 32, 32) in [-1, 1]."""
    pictures = [Image.open(path).convert("RGB").resize((32, 32), Image.LANCZOS) for path in paths]
    rows = [torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in pictures]
    return torch.stack(rows).view(-1, 32, 32, 3).permute(0, 3, 1, 2) / 127.5 - 1


def save(images: Tensor, path: Path) -> None:
    """A strip, four times enlarged."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    strip = torch.cat(list(pixels), dim=2).permute(1, 2, 0).contiguous()
    picture = Image.frombytes("RGB", (strip.shape[1], strip.shape[0]), strip.numpy().tobytes())
    picture.resize((4 * picture.width, 4 * picture.height), Image.NEAREST).save(path)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Between two noises, along the sphere on which they lie."""
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="*", help="two pictures")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--frames", type=int, default=5, help="pictures between the two")
    parser.add_argument("--out", type=Path, default=Path("walk.png"))
    args = parser.parse_args()
    if len(args.images) not in (0, 2):
        parser.error(f"expected no picture or two, got {len(args.images)}")

    loaded = load_model("bundled")
    schedule = ddim_schedule(loaded.scheduler, args.steps)
    sampler = dq.DEQSampler(loaded.model, schedule, spectrum=loaded.spectrum)
    if args.images:
        images = load(args.images)
    else:
        images = sampler.sample(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))).sample

    found = dq.DEQInverter(loaded.model, schedule, "equilibrium", spectrum=loaded.spectrum).invert(images)
    print("round trip error:", ", ".join(f"{error:.1e}" for error in found.error.tolist()))
    if not bool(found.converged.all()):
        print("not within the tolerance: very few steps leave no noise that gives an image back; take more")

    shares = torch.linspace(0, 1, args.frames + 2).tolist()[1:-1]
    noise = torch.stack([slerp(found.noise[0], found.noise[1], share) for share in shares])
    walk = sampler.sample(noise)
    save(torch.cat([images[:1], walk.sample, images[1:]]), args.out)
    print(f"{args.frames} pictures in between: {args.out}")


if __name__ == "__main__":
    main()
