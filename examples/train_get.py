"""Train a one-step student, a Generative Equilibrium Transformer, on pairs of noises and samples of a teacher.

    deqdiff-fast pairs MODEL --count 50000 --out PAIRS
    python examples/train_get.py PAIRS --out runs/student --size T --minutes 30
    deqdiff-fast sample --student runs/student/student.safetensors

PAIRS is a folder that `deqdiff-fast pairs` has made. Runs on a CPU or a GPU, in bfloat16 autocast unless --no-bf16.
Interrupt it whenever you like: `--resume` goes on from the last checkpoint, with the same order of the pairs.
Further losses go into LOSSES: functions of (sample, target), say a perceptual one of a package of your own.

On a CPU `--minutes` are minutes of processor time: a student on a busy machine is trained as long as on an idle one.

Needs: torch, pillow, tqdm (`pip install deqdiff_fast[diffusers]`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from deqdiff_fast.distillation import GET, GETSize

LOSSES = {
    "l1": lambda sample, target: (sample - target).abs().mean(),
    "l2": lambda sample, target: (sample - target).square().mean(),
}


def load_pairs(folder: Path) -> torch.utils.data.Dataset:
    """Items of {"noise": (C, H, W), "sample": (C, H, W), "condition": tensor or None}."""
    from deqdiff_fast.distillation import Pairs

    return Pairs(folder)


def batch_of(pairs: torch.utils.data.Dataset, rows: list[int], device: torch.device) -> tuple[Tensor, ...]:
    items = [pairs[k] for k in rows]
    condition = None if items[0]["condition"] is None else torch.stack([i["condition"] for i in items]).to(device)
    return *(torch.stack([i[name] for i in items]).to(device) for name in ("noise", "sample")), condition


def build(pairs: torch.utils.data.Dataset, args: argparse.Namespace) -> GET:
    """A student for these pairs: their shape, their kind of condition, the scale of their noise."""
    first = [pairs[k] for k in range(min(64, len(pairs)))]
    condition, settings = first[0]["condition"], {}
    if isinstance(condition, dict):
        raise SystemExit(f"these pairs have {len(condition)} conditions; a GET takes labels or one vector")
    if condition is not None and condition.is_floating_point():
        settings["features"] = condition.numel()
    elif condition is not None:
        settings["classes"] = args.classes or 1 + max(int(pairs[k]["condition"]) for k in range(len(pairs)))
    scale = torch.stack([item["noise"] for item in first]).std().item()
    settings["noise_scale"] = 1.0 if 0.9 < scale < 1.1 else scale
    size = args.size if args.width is None else GETSize(args.width, *args.depth, 4, 4)
    settings |= {"patch": args.patch, "gradient": args.gradient, "max_steps": args.equilibrium_steps}
    return GET(tuple(first[0]["noise"].shape), size=size, **settings)


def order_of_epoch(count: int, epoch: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


@torch.no_grad()
def update_average(average: GET, model: GET, step: int, decay: float) -> None:
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


@torch.no_grad()
def relative_error(model: Callable, pairs: torch.utils.data.Dataset, rows: list[int], device: torch.device) -> float:
    """Of samples against the teacher's, L2 over each sample, the mean of them."""
    errors = []
    for k in range(0, len(rows), 32):
        noise, target, condition = batch_of(pairs, rows[k : k + 32], device)
        off = (model(noise, condition) - target).flatten(1).norm(dim=1)
        errors += (off / target.flatten(1).norm(dim=1)).tolist()
    return sum(errors) / max(1, len(errors))


@torch.no_grad()
def picture(model: GET, batch: tuple[Tensor, ...], path: Path) -> None:
    """The teacher's samples above, the student's below."""
    noise, target, condition = batch
    both = torch.cat([target, model(noise, condition)]).float().clamp(-1, 1).cpu()
    both = both[:, :3] if both.shape[1] >= 3 else both[:, :1].expand(-1, 3, -1, -1)
    rows = ((both + 1) * 127.5).round().byte().unflatten(0, (2, len(noise)))  # (2, n, 3, H, W)
    pixels = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).contiguous()
    found = Image.fromarray(pixels.numpy())
    found.resize((found.width * 3, found.height * 3), Image.NEAREST).save(path)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="folder that `deqdiff-fast pairs` has made")
    parser.add_argument("--out", type=Path, default=Path("runs/student"))
    parser.add_argument("--size", default="T", help="T, M, S, B or B+ of the paper (default T)")
    parser.add_argument("--width", type=int, help="a small model of this width in the place of --size")
    parser.add_argument("--depth", type=int, nargs=2, default=(2, 2), metavar=("INJECTION", "EQUILIBRIUM"),
                        help="blocks of a model of --width (default 2 2)")  # fmt: skip
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--classes", type=int, default=0, help="number of labels (default: the largest one there + 1)")
    parser.add_argument("--gradient", default="implicit", help="of the equilibrium (default implicit)")
    parser.add_argument("--equilibrium-steps", type=int, default=16, help="at most, in training (default 16)")
    parser.add_argument("--loss", choices=tuple(LOSSES), default="l1")
    parser.add_argument("--steps", type=int, help="of the optimizer")
    parser.add_argument("--minutes", type=float, help="in all, in the place of --steps")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--ema", type=float, default=0.999, help="of the weights that are saved")
    parser.add_argument("--held-out", type=int, default=64, help="pairs, the last ones, that are not trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints and pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0: torch's default")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    args = parser.parse_args(words)
    if (args.steps is None) == (args.minutes is None):
        parser.error("give one of --steps and --minutes")
    return args


class Training:
    """Weights, their average, the optimizer, and how far it is.

    make: another model for the pairs, in the place of a GET; its `save(path, **facts)` is called, too.
    """

    def __init__(self, args: argparse.Namespace, pairs: torch.utils.data.Dataset, make: Callable = build) -> None:
        self.args, self.pairs, self.device = args, pairs, torch.device(args.device)
        self.trained_on = max(1, len(pairs) - args.held_out)
        self.held_out = list(range(self.trained_on, len(pairs)))
        self.clock = time.thread_time if self.device.type == "cpu" else time.monotonic
        self.model = make(pairs, args).to(self.device)
        self.average = make(pairs, args).to(self.device).requires_grad_(False).eval()
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-2)
        self.step, self.seconds, self.losses, self.errors = 0, 0.0, [], {}
        if args.resume:
            self.restore()

    def restore(self) -> None:
        state = torch.load(self.args.out / "checkpoint.pt", map_location=self.device, weights_only=True)
        for name in ("model", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        self.errors = state["errors"]

    def save(self) -> None:
        """A checkpoint, the average as a student, a picture, and the error on held-out pairs."""
        out = self.args.out
        self.errors[self.step] = relative_error(self.average, self.pairs, self.held_out[:256], self.device)
        state = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")}
        state |= {name: getattr(self, name) for name in ("step", "seconds", "losses", "errors")}
        torch.save(state, out / "checkpoint.tmp")
        (out / "checkpoint.tmp").replace(out / "checkpoint.pt")
        facts = {"steps": self.step, "seconds": round(self.seconds), "pairs": self.trained_on, "errors": self.errors}
        self.average.save(out / "student.safetensors", training=json.dumps(facts))
        shown = self.held_out[:8] or list(range(min(8, len(self.pairs))))
        picture(self.average, batch_of(self.pairs, shown, self.device), out / f"grid_{self.step:06d}.png")

    def done(self) -> float:
        """Part of the training that is over."""
        args = self.args
        return self.step / args.steps if args.steps else self.seconds / (60 * args.minutes)

    def rows(self) -> list[int]:
        """The pairs of this step. They follow from its number, so that resuming changes nothing."""
        batch = min(self.args.batch, self.trained_on)
        epoch, place = divmod(self.step, self.trained_on // batch)
        order = order_of_epoch(self.trained_on, epoch, self.args.seed)
        return order[place * batch : (place + 1) * batch].tolist()

    def run(self) -> None:
        """Train until it is over, with a bar, checkpoints and pictures."""
        left = "{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
        with tqdm(total=100, unit="%", bar_format=left) as bar:
            while self.done() < 1:
                start = self.clock()
                self.losses.append(self.advance())
                self.seconds += self.clock() - start
                recent = sum(self.losses[-100:]) / len(self.losses[-100:])
                bar.update(round(100 * min(1.0, self.done()) - bar.n, 2))
                bar.set_postfix(step=self.step, loss=f"{recent:.4f}")
                if self.step % self.args.save_every == 0 or self.done() >= 1:
                    self.save()

    def advance(self) -> float:
        """One step of the optimizer; returns the loss."""
        noise, target, condition = batch_of(self.pairs, self.rows(), self.device)
        bf16 = torch.autocast(self.device.type, torch.bfloat16) if self.args.bf16 else contextlib.nullcontext()
        with bf16:
            sample = self.model(noise, condition)
        loss = LOSSES[self.args.loss](sample.float(), target)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        done = min(1.0, self.done())
        warm = min(1.0, max((self.step + 1) / 200, done / 0.1))  # to the full rate, then down by a cosine
        rate = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        self.optimizer.param_groups[0]["lr"] = rate * self.args.lr
        self.optimizer.step()
        update_average(self.average, self.model, self.step, self.args.ema)
        self.step += 1
        return loss.item()


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    training = Training(args, load_pairs(args.pairs))
    size = sum(p.numel() for p in training.model.parameters())
    print(f"{size / 1e6:.1f} M parameters, {training.trained_on} pairs, {training.device}")
    training.run()
    if training.errors:
        last = max(training.errors)
        print(f"relative error on {len(training.held_out[:256])} held-out pairs: {training.errors[last]:.3f}")
    print(f"wrote {args.out / 'student.safetensors'}")


if __name__ == "__main__":
    main()
