"""`deqdiff-fast distill`: make a draft of a model, for fewer rounds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._numbers import positive_float, seed
from ._output import CommandError, check_folder

if TYPE_CHECKING:
    from ..schedule import Schedule

CONTINUOUS_STEPS = 256
DRAFT, SPECTRUM = "draft.safetensors", "spectrum.safetensors"


def add_parser(commands: Any) -> None:
    """Add `distill` and its options."""
    parser = commands.add_parser(
        "distill",
        help="make a draft of a model: fewer rounds",
        description="Fit a small network to a model's own predictions; no data is needed. What was interrupted is "
        "taken up again when the same is asked for once more.",
    )
    parser.add_argument("model", metavar="MODEL", help="diffusers folder, hub name or 'bundled'")
    parser.add_argument("--minutes", type=positive_float, default=6.0, help="in all (default 6)")
    where = f"where {DRAFT} and {SPECTRUM} go (default: the model's own folder, where they are found)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=where)
    parser.add_argument("--seed", type=seed, default=0, help="of noise and weights (default 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Distil, write the files, and say whether it pays. Returns the exit status."""
    folder: Path | None = args.out
    if folder is None:
        folder = Path(args.model).expanduser()
        if not folder.is_dir():
            raise CommandError(f"{args.model} is no folder on this machine; say with --out where the draft is to go")
    check_folder(folder)

    from ..distillation import distill
    from ..integrations.diffusers import load_model
    from ._run import pick_device

    device = pick_device(args.device)
    loaded = load_model(args.model, device=device)
    conditions = conditions_of(args.model, loaded, device)
    draft = distill(
        loaded.model, _all_levels(loaded.scheduler), loaded.info.sample_shape, conditions, args.minutes, out=folder,
        seed=args.seed, device=device, progress=True,
    )  # fmt: skip
    print(draft.report)
    print(f"wrote {folder / DRAFT} and {folder / SPECTRUM}")
    return 0


def _all_levels(scheduler: Any) -> Schedule:
    """A deterministic chain through every timestep of a DDPM noise schedule, or many of one that is continuous."""
    from ..integrations.diffusers import ddim_schedule

    if hasattr(scheduler, "alphas_cumprod"):
        return ddim_schedule(scheduler, len(scheduler.alphas_cumprod), spacing="linspace")
    return ddim_schedule(scheduler, CONTINUOUS_STEPS)


def conditions_of(name: str, loaded: Any, device: Any) -> dict[str, Any] | None:
    """All classes of a model of classes. Raises CommandError for a model that needs anything else."""
    if not loaded.info.conditional:
        return None
    classes = loaded.model.config.get("num_class_embeds")
    if classes is None or loaded.info.model_class != "UNet2DModel":
        raise CommandError(
            f"{name} is a {loaded.info.model_class}, which needs {loaded.info.conditional}; the command line knows "
            "class labels of a UNet2DModel: give model_kwargs in Python"
        )
    import torch

    return {"class_labels": torch.arange(int(classes), device=device)}
