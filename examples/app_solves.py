"""What the page of app.py shows, without the page: solves that are watched as they go, pictures, words and curves.

Needs: deqdiff_fast[diffusers,plot].
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.integrations.diffusers import LoadedModel, ddim_schedule, load_model

SOLVERS = ("auto", "draft", "quasi-newton", "triangular", "anderson", "picard", "deq-ddim")
Curve = list[tuple[float, float]]  # (seconds, error)
SERIAL_PICTURES = 20  # at most, of the serial chain
DRAWING = 0.15  # seconds that a browser on this machine is given for a picture before the solve goes on
CUDA = torch.cuda.is_available()


class Moment(NamedTuple):
    """A running solve after a round or a serial step."""

    seconds: float  # of the solver
    round: int
    final: int  # timesteps
    estimate: float
    image: Tensor  # (1, C, H, W), on the CPU

    def __str__(self) -> str:
        return f"{self.round}, {self.final} timesteps final, {self.seconds:.2f} s"


class View(NamedTuple):
    """What the page shows."""

    status: str
    pictures: tuple[Image.Image | None, ...]
    plot: Figure | None = None  # None: the one before


class Watched:
    """A solve in a thread of its own, to be iterated over; it waits while a moment of it is looked at.

    solve: called with a callback. stop: ends it after the current round. image: of a `RoundInfo`, what is to be seen.
    every: so many rounds apart. Afterwards `result` is what `solve` returned.
    """

    def __init__(self, solve: Callable, stop: threading.Event, image: Callable[[Any], Tensor], every: int = 1) -> None:
        self.solve, self.stop, self.image, self.every = solve, stop, image, every
        self.moments: list[Moment] = []
        self.seconds, self.result, self.error = 0.0, None, None
        self._news, self._seen = SimpleQueue(), threading.Semaphore(0)

    def __iter__(self) -> Iterator[Moment]:
        thread = threading.Thread(target=self._work, daemon=True)
        thread.start()
        try:
            while (moment := self._news.get()) is not None:
                yield moment
                self.stop.wait(DRAWING)
                self._seen.release()
        except GeneratorExit:  # nobody looks any more
            self.stop.set()
            raise
        finally:
            self._seen.release()
            thread.join()
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        self._resumed = time.perf_counter()
        try:
            with torch.no_grad():
                self.result = self.solve(callback=self._after_round)
        except BaseException as error:
            self.error = error
        self._pause()
        self._news.put(None)

    def _pause(self) -> None:
        if CUDA:
            torch.cuda.synchronize()  # what was begun is part of the time
        self.seconds += time.perf_counter() - self._resumed

    def _after_round(self, info: Any) -> bool:
        self._pause()
        final = int(info.front.min())
        if not self.stop.is_set() and (info.round % self.every == 0 or final == info.num_steps):
            image = self.image(info).detach().to("cpu", copy=True)
            self.moments.append(Moment(self.seconds, info.round, final, float(info.residual.max()), image))
            self._news.put(self.moments[-1])
            self._seen.acquire()
        self._resumed = time.perf_counter()
        return self.stop.is_set()


@lru_cache(maxsize=1)
def load(name: str) -> LoadedModel:
    loaded = load_model(name, device="cuda" if CUDA else "cpu")
    if loaded.info.conditional or loaded.info.sample_shape[0] not in (1, 3):
        needs = loaded.info.conditional or "a decoder: its samples are no pictures"
        raise ValueError(f"model {name!r} needs {needs}; this page is for unconditional models of pictures")
    return loaded


@lru_cache(maxsize=1)
def make_sampler(name: str, steps: int, tol: float, solver: str) -> dq.DEQSampler:
    """One that makes rounds whatever they cost: with a window to choose, "auto" could take the serial chain."""
    loaded = load(name)
    schedule, helps = ddim_schedule(loaded.scheduler, steps), {"spectrum": loaded.spectrum, "draft": loaded.draft}
    return dq.DEQSampler(loaded.model, schedule, solver=solver, tol=tol, window=steps, **helps)


def number(name: str, value: float | None, least: float, whole: bool = True) -> Any:
    """What a field of the page holds. Raises ValueError."""
    if value is None or not least <= value < math.inf or (whole and value != int(value)):
        kind, got = "whole number" if whole else "number", "nothing" if value is None else value
        raise ValueError(f"{name}: expected a {kind} from {least} on, got {got}")
    return int(value) if whole else float(value)


def read_picture(file: str | None, shape: tuple[int, ...], scale: bool) -> Tensor:
    """(1, C, H, W) in [-1, 1], in front of white where the picture is transparent. Raises ValueError."""
    if file is None:
        raise ValueError("upload a picture first")
    channels, height, width = shape
    try:
        with Image.open(file) as opened:
            found = ImageOps.exif_transpose(opened)
            if found.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a channel: nothing says which value is white")
            found = found.convert("RGBA")
    except Exception as error:  # whatever the reader comes upon in a damaged file
        raise ValueError(f"{Path(file).name}: not a picture that can be read here ({error})") from error
    if found.size != (width, height) and not scale:
        sizes = f"{found.width} x {found.height} pixels, and the model makes {width} x {height}"
        raise ValueError(f"{Path(file).name}: {sizes}; let it be scaled, or upload another")
    seen = Image.alpha_composite(Image.new("RGBA", found.size, "white"), found).convert("L" if channels == 1 else "RGB")
    pixels = np.array(seen.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    return torch.from_numpy(pixels).view(1, height, width, channels).permute(0, 3, 1, 2) / 127.5 - 1


def to_picture(image: Tensor) -> Image.Image:
    """(1, C, H, W) in [-1, 1], enlarged to 256 pixels or more."""
    pixels = ((image[0].float().clamp(-1, 1) + 1) * 127.5).round().byte().expand(3, -1, -1).permute(1, 2, 0).cpu()
    times = math.ceil(256 / image.shape[-1])
    return ImageOps.scale(Image.fromarray(pixels.numpy()), times, Image.Resampling.NEAREST)


def relative_error(image: Tensor, reference: Tensor) -> float:
    return float((image.cpu() - reference.cpu()).norm() / reference.cpu().norm())


def curve(moments: list[Moment], reference: Tensor | None = None) -> Curve:
    """The error of each moment against `reference`, or the solver's own estimate, as far as it has one."""
    errors = [m.estimate if reference is None else relative_error(m.image, reference) for m in moments]
    return [(m.seconds, error) for m, error in zip(moments, errors) if 0 < error < math.inf]


def chart(curves: dict[str, Curve], tol: float) -> Figure | None:
    if not any(curves.values()):
        return None
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.semilogy([x for x, _ in points], [y for _, y in points], "o-", markersize=3, label=name)
    axes.axhline(tol, color="grey", linestyle=":", label="tolerance")
    axes.set(xlabel="seconds", ylabel="relative error")
    axes.legend()
    return figure


def summary(solution: Any, seconds: float) -> str:
    """How a solve went."""
    stats, stopped = solution.stats, solution.stats.stop_reason == "callback"
    text = f"{stats.solver}, {stats.rounds} rounds" if stats.solver != "serial" else f"{stats.rounds} steps"
    text += f", {stats.model_evals} evaluations"
    if stats.check_evals:
        text += f", {stats.check_evals} of which checked the model"
    if stats.finished_serially and stats.solver != "serial":
        text += f", {stats.finished_serially} steps finished serially"
    converged = "converged" if bool(solution.converged.all()) else "NOT converged"
    return f"{text}, {seconds:.2f} s: {'stopped' if stopped else converged}"


def compare(
    name: str, seed: float | None, steps: float | None, tol: float | None, solver: str, stop: threading.Event
) -> Iterator[View]:
    """Rounds, then the serial chain, as they go."""
    steps, seed, tol = number("steps", steps, 1), number("seed", seed, 0), number("tolerance", tol, 1e-12, whole=False)
    sampler = make_sampler(name, steps, tol, solver)
    noise = torch.randn(1, *load(name).info.sample_shape, generator=torch.Generator().manual_seed(seed))
    noise = noise.to("cuda" if CUDA else "cpu") * sampler.schedule.init_noise_sigma
    rounds = Watched(partial(sampler.sample, noise), stop, lambda info: info.sample())
    for moment in rounds:
        plot = chart({"rounds, estimated": curve(rounds.moments)}, tol)
        yield View(f"Rounds: round {moment}", (to_picture(moment.image), None), plot)
    said, left = f"Rounds: {summary(rounds.result, rounds.seconds)}", to_picture(rounds.result.sample)
    if stop.is_set():
        yield View(f"{said}\nSerial chain: not begun", (left, None))
        return

    def clean(info: dq.RoundInfo) -> Tensor:
        return info.sample() if int(info.front) == info.num_steps else info.preview()

    serial = Watched(partial(sampler.serial, noise), stop, clean, every=math.ceil(steps / SERIAL_PICTURES))
    right = None
    for moment in serial:
        right = to_picture(moment.image)
        yield View(f"{said}\nSerial chain: step {moment}", (left, right))
    said, reference = f"{said}\nSerial chain: {summary(serial.result, serial.seconds)}", serial.result.sample
    if serial.result.stats.stop_reason == "callback":
        yield View(said, (left, right))
        return
    error, share = relative_error(rounds.result.sample, reference), rounds.seconds / serial.seconds
    above = ", above the tolerance" if error > tol else ""
    said += f"\nRelative error of the rounds: {error:.1e}{above}. They took {share:.2f} of the serial chain's time."
    curves = {"rounds": curve(rounds.moments, reference), "serial chain": curve(serial.moments, reference)}
    curves["rounds, estimated"] = curve(rounds.moments)
    yield View(said, (left, to_picture(reference)), chart(curves, tol))


def invert(
    name: str, steps: float | None, tol: float | None, file: str | None, scale: bool, stop: threading.Event
) -> Iterator[View]:
    """The noise behind a picture, as it is found, and what the serial chain makes of it."""
    loaded, steps, tol = load(name), number("steps", steps, 1), number("tolerance", tol, 1e-12, whole=False)
    image = read_picture(file, loaded.info.sample_shape, scale).to("cuda" if CUDA else "cpu")
    schedule = ddim_schedule(loaded.scheduler, steps)
    inverter = dq.DEQInverter(loaded.model, schedule, tol=tol, spectrum=loaded.spectrum)
    solve, given = Watched(partial(inverter.invert, image), stop, lambda info: info.noise()), to_picture(image)
    for moment in solve:
        yield View(f"Inversion: round {moment}", (given, to_picture(moment.image / 3), None))
    found = solve.result
    said = f"Inversion: {summary(found, solve.seconds)}\nRelative error of what the serial chain makes of that noise: "
    pictures = (given, to_picture(found.noise / 3), to_picture(found.reconstruction))
    yield View("\n".join([f"{said}{float(found.error):.1e}", *found.stats.notes]), pictures)
