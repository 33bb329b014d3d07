"""Train the bundled CIFAR-10 model: a small v-prediction U-Net, saved as a diffusers pipeline folder.

    python examples/train_cifar10.py DATA --out runs/cifar10 --steps 7000

DATA is either the folder `cifar-10-batches-py` (the usual python version of CIFAR-10) or an `.npz` with the
training images packed as JPEG bytes (arrays `jpeg` and `offset`). Runs on CPU (bfloat16 autocast) or GPU.
Interrupt it whenever you like: `--resume` goes on from the last checkpoint, bit for bit the same data order.
A network of another kind, as the second U-Net of bench/results: `--channels 48 96 96 --betas squaredcos_cap_v2
--prediction epsilon --steps 2500 --batch 32`.

Needs: torch, diffusers, pillow, tqdm (`pip install deqdiff_fast[diffusers]`).
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import pickle
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from tqdm import tqdm


def load_images(path: Path) -> torch.Tensor:
    """All training images as a uint8 tensor (N, 3, 32, 32)."""
    if path.is_dir():
        batches = [pickle.loads((path / f"data_batch_{i}").read_bytes(), encoding="bytes") for i in range(1, 6)]
        return torch.from_numpy(np.concatenate([b[b"data"] for b in batches]).reshape(-1, 3, 32, 32))
    with np.load(path) as packed:
        jpeg, offset = packed["jpeg"], packed["offset"]
    images = [Image.open(io.BytesIO(jpeg[a:b].tobytes())).convert("RGB") for a, b in itertools.pairwise(offset)]
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).contiguous()


def build_model(channels: tuple[int, ...] = (32, 64, 128)) -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=channels[-1] // 2,
        norm_num_groups=16,
    )


def build_scheduler(betas: str = "linear", prediction: str = "v_prediction") -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=betas,
        clip_sample=False,
        prediction_type=prediction,
        timestep_spacing="leading",
    )


def learning_rate(step: int, steps: int, peak: float, warmup: int = 300) -> float:
    """Linear warm-up, then a cosine down to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


@torch.no_grad()
def update_ema(ema: UNet2DModel, model: UNet2DModel, step: int, decay: float) -> None:
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


@torch.no_grad()
def sample_grid(model: UNet2DModel, scheduler: DDIMScheduler, path: Path, device: torch.device, rows: int) -> None:
    """A rows x rows PNG drawn with 50 DDIM steps from fixed noise, so that grids of one run can be compared."""
    x = torch.randn(rows * rows, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    scheduler.set_timesteps(50)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x).prev_sample
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    grid = pixels.reshape(rows, rows, 3, 32, 32).transpose(0, 3, 1, 4, 2).reshape(rows * 32, rows * 32, 3)
    Image.fromarray(grid).resize((rows * 96, rows * 96), Image.NEAREST).save(path)


def save_pipeline(ema: UNet2DModel, scheduler: DDIMScheduler, folder: Path, facts: dict) -> None:
    """Write the EMA weights in half precision as `folder`, a diffusers pipeline, with training.json beside it."""
    half = UNet2DModel.from_config(ema.config)
    half.load_state_dict(ema.state_dict())
    DDIMPipeline(half.half(), scheduler).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--channels", type=int, nargs=3, default=(32, 64, 128), help="multiples of 16")
    parser.add_argument("--betas", choices=("linear", "squaredcos_cap_v2"), default="linear")
    parser.add_argument("--prediction", choices=("v_prediction", "epsilon"), default="v_prediction")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints and sample grids")
    parser.add_argument("--grid", type=int, default=6, help="rows and columns of the sample grids")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0: torch's default")
    parser.add_argument("--compile", action="store_true", help="torch.compile the U-Net")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    images, scheduler = load_images(args.data), build_scheduler(args.betas, args.prediction)
    model = build_model(tuple(args.channels)).to(device, memory_format=torch.channels_last)
    ema = build_model(tuple(args.channels)).to(device, memory_format=torch.channels_last).requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    start, seconds, losses = 0, 0.0, []
    if args.resume:
        state = torch.load(args.out / "checkpoint.pt", map_location=device)
        model.load_state_dict(state["model"]), ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds, losses = state["step"], state["seconds"], state["losses"]

    abar = scheduler.alphas_cumprod.to(device)
    network = torch.compile(model) if args.compile else model
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, smoothing=0.02)
    clock = time.monotonic()
    for step in bar:
        draw = torch.Generator().manual_seed(
            args.seed * 1_000_003 + step
        )  # one stream a step: resuming changes nothing
        pick = torch.randint(len(images), (args.batch,), generator=draw)
        x = (images[pick].float() / 127.5 - 1).to(device)
        flip = torch.rand(args.batch, generator=draw).to(device) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        t = torch.randint(1000, (args.batch,), generator=draw).to(device)
        noise = torch.randn(x.shape, generator=draw).to(device)
        signal, sigma = abar[t].sqrt()[:, None, None, None], (1 - abar[t]).sqrt()[:, None, None, None]
        noisy = (signal * x + sigma * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            out = network(noisy, t).sample
        wanted = noise if args.prediction == "epsilon" else signal * noise - sigma * x
        loss = (out.float() - wanted).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.step(), optimizer.zero_grad()
        update_ema(ema, model, step, args.ema)
        losses.append(loss.item())
        recent = sum(losses[-200:]) / len(losses[-200:])
        bar.set_postfix(loss=f"{recent:.4f}", lr=f"{optimizer.param_groups[0]['lr']:.1e}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            now = time.monotonic()
            seconds, clock = seconds + now - clock, now
            facts = {
                "steps": step + 1, "planned_steps": args.steps, "batch": args.batch, "peak_lr": args.lr,
                "ema": args.ema, "seed": args.seed, "training_seconds": round(seconds), "device": device.type,
                "threads": torch.get_num_threads(), "torch": torch.__version__,
                "mean_loss_last_200_steps": round(recent, 5),
            }  # fmt: skip
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step + 1, "seconds": seconds, "losses": losses}, args.out / "checkpoint.tmp")
            (args.out / "checkpoint.tmp").replace(args.out / "checkpoint.pt")
            save_pipeline(ema, scheduler, args.out / "pipeline", facts)
            if (step + 1) % (4 * args.save_every) == 0 or step + 1 == args.steps:
                sample_grid(ema, scheduler, args.out / f"grid_{step + 1:06d}.png", device, args.grid)


if __name__ == "__main__":
    main()
