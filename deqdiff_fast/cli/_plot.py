"""Plots: convergence over rounds, error against seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from ..schedule.tensor_file import replacing
from ._output import CommandError

MARKERS = "osD^vP*X"


@dataclass
class Curve:
    """One line of the plot: values by round; `values[0]` is after round 1."""

    label: str
    values: list[float] = field(default_factory=list)


def require_matplotlib() -> None:
    """Refuse early: a run must not end with its plot missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CommandError('a plot needs matplotlib: pip install "deqdiff_fast[plot]"') from error


def convergence_plot(curves: list[Curve], path: Path, *, ylabel: str, title: str, target: float | None = None) -> None:
    """Write `curves` over rounds, logarithmic, as PNG; `target` is drawn as a dotted line."""
    from matplotlib.ticker import MaxNLocator

    with _axes(path, title, target) as axes:
        for curve, marker in zip(curves, cycle(MARKERS), strict=False):
            axes.plot(range(1, len(curve.values) + 1), curve.values, marker=marker, markersize=4, label=curve.label)
        axes.set_xlabel("round (one batched model call over the active timesteps)")
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def error_plot(points: dict[str, tuple[float, float]], path: Path, *, title: str, target: float) -> None:
    """Write error against seconds, one point a method, both logarithmic, as PNG; `target` is drawn as a dotted line."""
    with _axes(path, title, target) as axes:
        for (name, (seconds, error)), marker in zip(points.items(), cycle(MARKERS), strict=False):
            axes.plot([seconds], [error], marker=marker, linestyle="", markersize=8, label=name)
        axes.set_xscale("log")
        axes.set_xlabel("seconds, with the serial chain that measures the error")
        axes.set_ylabel("relative error of the image")


@contextmanager
def _axes(path: Path, title: str, target: float | None) -> Iterator[Any]:
    """The axes of a figure with a logarithmic y axis that is written once the block has ended well."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    yield axes
    if target is not None:
        axes.axhline(target, color="grey", linestyle=":", label=f"{target:g}")
    axes.set_yscale("log")
    # names of models and folders may hold what is no text, or a $
    axes.set_title(title.encode("utf-8", "replace").decode(), fontsize=10, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as partial:
        figure.savefig(partial)
