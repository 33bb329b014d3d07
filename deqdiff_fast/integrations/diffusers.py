"""Models and schedulers out of diffusers folders, from disk, from the hub, or bundled with this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..model.conv_draft import ConvDraft
from ..model.draft import Draft
from ..model.stand_in import load_draft
from ..schedule import SpectralSlope
from .ddim import ddim_schedule as ddim_schedule
from .pipelines import invert as invert
from .pipelines.own_loop import parallel_loop as parallel_loop
from .pipelines.parallel import parallelize as parallelize
from .pipelines.parallel import restore as restore

BUNDLED = "bundled"
_DENOISERS = ("unet", "transformer", "")  # "": a flat folder, as diffusers wrote them at first
_UNCONDITIONAL = ("UNet2DModel",)
_CONDITIONS = {"UNet2DConditionModel": "encoder_hidden_states", "DiTTransformer2DModel": "class_labels"}


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded."""

    name: str
    model_class: str
    scheduler_class: str
    sample_shape: tuple[int, ...]  # (C, H, W)
    parameters: int  # their number
    conditional: str  # the inputs that the model needs besides x and t, or ""


class LoadedModel(NamedTuple):
    """What `load_model` found."""

    model: torch.nn.Module  # `model(x, t)`, in eval mode and without gradients for its weights
    scheduler: Any  # of diffusers
    info: ModelInfo
    spectrum: SpectralSlope | None  # of its samples, where the folder has a spectrum.safetensors
    draft: Draft | None  # of it, where the folder has a draft.safetensors


def bundled_model() -> Path:
    """The folder of the CIFAR-10 model that comes with the package."""
    spec = find_spec("deqdiff_fast.assets")  # in an editable installation it is not below the package's own folder
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "cifar10" / "unet" / "config.json").is_file():
            return Path(place) / "cifar10"
    raise FileNotFoundError("the bundled model is not part of this installation; reinstall deqdiff_fast")


def load_model(
    name_or_folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load the denoiser and the scheduler of a diffusers pipeline, and nothing else of it.

    Args:
        name_or_folder: "bundled", a folder or a hub name. The folder holds `unet/` or `transformer/` and `scheduler/`,
            or is flat, with config.json, weights and scheduler_config.json side by side. It may also hold
            spectrum.safetensors (see `SpectralSlope.save`) and draft.safetensors (see `distill`).
        device: of the model.
        dtype: of the weights, whatever they were saved in.

    Raises:
        FileNotFoundError, OSError: there is nothing to load.
        ValueError: it is no diffusers model, or a file of it is damaged, of another model or of another version.
        ImportError: diffusers is not installed.
    """
    library = _library()
    source = _source(name_or_folder)
    config, part = _config(library.UNet2DModel, source, _DENOISERS, "a denoiser (unet/ or transformer/)")
    model_class = _class(library, config, Path(source, part, "config.json"), "ModelMixin")
    model = _model(model_class, source, part, dtype).to(device=device).eval().requires_grad_(False)
    rules, place = _config(library.DDIMScheduler, source, ("scheduler", ""), "a scheduler (scheduler_config.json)")
    rules_file = Path(source, place, "scheduler_config.json")
    scheduler_class = _class(library, rules, rules_file, "SchedulerMixin")
    with _readable(rules_file, "the configuration of a scheduler"):
        scheduler = scheduler_class.from_config(rules)
    name = model_class.__name__
    with _readable(Path(source, part, "config.json"), "the configuration of a model of images, with its sample_size,"):
        free = name in _UNCONDITIONAL and not model.config.class_embed_type and not model.config.num_class_embeds
        shape = _sample_shape(model.config)
    info = ModelInfo(
        name=str(name_or_folder),
        model_class=name,
        scheduler_class=type(scheduler).__name__,
        sample_shape=shape,
        parameters=sum(p.numel() for p in model.parameters()),
        conditional="" if free else _CONDITIONS.get(name, "class_labels or other conditioning"),
    )
    return LoadedModel(model, scheduler, info, _spectrum(source, shape), _draft(source, shape, scheduler, device))


def _library() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError('loading a model needs diffusers: pip install "deqdiff_fast[diffusers]"') from error
    return diffusers


def _source(name_or_folder: str | Path) -> str:
    """A folder that exists, or what can only be a hub name."""
    text = str(name_or_folder)
    if text == BUNDLED:
        return str(bundled_model())
    folder = Path(text)
    with suppress(RuntimeError):  # ~ of a user that is not there
        folder = folder.expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise FileNotFoundError(f"model {text!r} is a file; name the folder that holds it")
    if isinstance(name_or_folder, Path) or text.startswith((".", "~", "/")) or text.count("/") != 1:
        raise FileNotFoundError(f"model {text!r}: there is no such folder, and a hub name has the form owner/name")
    return text


def _config(loader: Any, source: str, parts: tuple[str, ...], what: str) -> tuple[dict[str, Any], str]:
    """The first configuration among `parts` (subfolders) of `source`, and where it was."""
    reason = ""
    for part in parts:
        file = Path(source, part, loader.config_name)
        try:
            with _readable(file, "a configuration"):
                return dict(loader.load_config(source, **({"subfolder": part} if part else {}))), part
        except OSError as error:
            if file.is_file():
                raise ValueError(f"{file}: expected a configuration that diffusers wrote: {error}") from error
            reason = str(error)
    if Path(source).is_dir():
        raise FileNotFoundError(f"model {source!r}: no {what.removeprefix('a ')} in it; is it a diffusers folder?")
    raise OSError(
        f"model {source!r}: no such folder, and the hub did not give {what} (wrong name, or no network?): {reason}"
    )


def _class(library: Any, config: dict[str, Any], file: Path, base: str) -> Any:
    name = config.get("_class_name")
    found = getattr(library, str(name), None)
    if not (isinstance(found, type) and issubclass(found, getattr(library, base))):
        raise ValueError(
            f"{file}: expected the class of a {base.removesuffix('Mixin').lower()}, and diffusers "
            f"{library.__version__} has none called {name!r}; update diffusers?"
        )
    return found


def _model(model_class: Any, source: str, part: str, dtype: torch.dtype) -> Any:
    """The network with its weights, all of them: diffusers would leave at random what a file does not have."""
    place = {"subfolder": part} if part else {}
    weights = sorted(Path(source, part).glob("diffusion_pytorch_model*"))
    file, what = weights[0] if weights else Path(source, part), f"weights of a {model_class.__name__}"
    try:
        with _readable(file, what):
            model, found = model_class.from_pretrained(
                source, torch_dtype=dtype, low_cpu_mem_usage=False, output_loading_info=True, **place
            )
    except OSError as error:
        if not weights:
            raise
        raise ValueError(f"{file}: expected {what}, whole and unchanged: {error}") from error
    if found["missing_keys"]:
        lacking = f"{len(found['missing_keys'])} tensors are missing, such as {min(found['missing_keys'])}"
        raise ValueError(f"{file}: expected {what}: {lacking}")
    return model


@contextmanager
def _readable(file: Path, what: str) -> Iterator[None]:
    """Whatever diffusers raises over a file that is not what it should be is a ValueError that names it."""
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{file}: expected {what} that diffusers can use ({reason})") from error


def _spectrum(source: str, shape: tuple[int, ...]) -> SpectralSlope | None:
    """What lies beside the model, if it is for its samples."""
    path = Path(source, "spectrum.safetensors")
    found = SpectralSlope.load(path) if path.is_file() else None
    if found is not None and found.shape != shape:
        raise ValueError(f"{path}: expected the spectrum of samples of shape {shape}, got {found.shape}")
    return found


def _draft(source: str, shape: tuple[int, ...], scheduler: Any, device: torch.device | str) -> Draft | None:
    """What lies beside the model, if it is a draft of this one."""
    path = Path(source, "draft.safetensors")
    found = load_draft(path, device=device) if path.is_file() else None
    if found is not None and hasattr(scheduler, "alphas_cumprod"):
        wanted = (shape, len(scheduler.alphas_cumprod), scheduler.config.prediction_type)
        known = int(found.last_timestep) + 1  # of some of the timesteps, a draft may have been made from few
        counted = isinstance(found, ConvDraft) or known > wanted[1]
        got = (found.shape, known if counted else wanted[1], found.prediction_type)
        if got != wanted:
            raise ValueError(f"{path}: expected a draft with shape, timesteps and prediction_type {wanted}, got {got}")
    return found


def _sample_shape(config: Any) -> tuple[int, ...]:
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return (int(config.in_channels), int(height), int(width))
