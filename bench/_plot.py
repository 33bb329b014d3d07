"""Errors against rounds, losses against seconds, a line for each solver or method. Importing this needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def error_curves(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """rows: those of `rounds`; one line of panels for each (T, eta)."""
    groups: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["steps"], row["eta"]), []).append(row)
    figure = Figure(figsize=(11, 4 * len(groups)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 2, squeeze=False)
    for line, ((steps, eta), members) in zip(panels, groups.items(), strict=True):
        for row, marker in zip(members, "ospD^vX*" * len(members), strict=False):
            curve = _median_curve([run["curve"] for run in row["runs"]])
            if not curve:
                continue
            evaluations, errors = zip(*curve, strict=True)
            rounds = range(1, len(curve) + 1)
            line[0].semilogy(rounds, errors, marker=marker, markersize=4, label=row["solver"])
            line[1].semilogy([n / steps for n in evaluations], errors, marker=marker, markersize=4, label=row["solver"])
        for axes, label in zip(line, ("rounds", "model evaluations / T"), strict=True):
            axes.axhline(1e-2, color="grey", linestyle=":")
            axes.set(xlabel=label, ylabel="relative error of the running sample", title=f"T = {steps}, eta = {eta:g}")
            axes.grid(alpha=0.3)
            axes.legend()
        line[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    figure.savefig(path, format="png")


def _median_curve(curves: list[list[tuple[int, float]]]) -> list[tuple[float, float]]:
    """Round by round medians, as far as every noise went."""
    return [(median(n for n, _ in points), median(e for _, e in points)) for points in zip(*curves, strict=False)]


def loss_curves(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """rows: those of `inversion`; squared loss against seconds and evaluations, one line of panels for each T."""
    counts = sorted({row["steps"] for row in rows})
    figure = Figure(figsize=(11, 4 * max(len(counts), 1)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(max(len(counts), 1), 2, squeeze=False)
    for line, steps in zip(panels, counts, strict=True):
        members = [row for row in rows if row["steps"] == steps]
        for row, marker in zip(members, "ospD^v" * len(members), strict=False):
            seconds, evaluations, _, losses, _ = zip(*row["curve"], strict=True)
            line[0].loglog(seconds, losses, marker=marker, markersize=4, label=row["method"])
            each = [count / row["images"] for count in evaluations]
            line[1].loglog(each, losses, marker=marker, markersize=4, label=row["method"])
        for axes, label in zip(line, ("seconds", "model evaluations / image"), strict=True):
            axes.axhline(0.5, color="grey", linestyle=":")
            axes.set(xlabel=label, ylabel="squared loss", title=f"T = {steps}")
            axes.grid(alpha=0.3)
            axes.legend()
    figure.suptitle(title)
    figure.savefig(path, format="png")
