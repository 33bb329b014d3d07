"""Restoration: ours in parallel rounds and serially, and deepinv's own DDRM, DiffPIR and DPS, on the same measurements.

The same model, images, operators and noise for all. Evaluations are those of a sample; sequential calls are what a
device with room for all rows of a call has to wait for. deepinv's methods have pixels in [0, 1], ours in [-1, 1]: its
measurements are ours, mapped along with the images. PSNR rewards means and not samples: deepinv's DDRM draws all noise
with a standard deviation of 0.71 of the paper's (its code, made for complex coefficients), ours have a temperature.
--tune gives deepinv's methods their best of several settings on these very images, which is more than ours get.

--rounds asks something else: how many rounds ours take, and the paper's Anderson acceleration; see
`_restoration_rounds`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deqdiff_fast import operators
from deqdiff_fast.cli._numbers import factor
from deqdiff_fast.restorer import DEQRestorer
from deqdiff_fast.schedule.tables import SPACINGS

from . import _restoration_rounds
from ._common import environment, markdown, note, positive_float, positive_int, summary, write_json
from ._images import images
from ._problems import Problem, add_model_arguments, load, relative_error, warm_up
from ._restoration_rounds import OTHER_NOISE

OURS = ("ddnm", "ddrm", "pigdm", "diffpir")
THEIRS = ("DDRM", "DiffPIR", "DPS")
ALLOWED = 0.3  # dB that ours may be below the best of theirs


def _half(shape: tuple[int, ...]) -> Tensor:
    return torch.rand((1, *shape[1:]), generator=torch.Generator().manual_seed(0)) < 0.5


# Where there is noise, singular values of blurs below 0.03 count as zero, as in the code of DDRM (Kawar et al. 2022).
_ZERO = 0.03
OPERATORS: dict[str, Callable[[tuple[int, ...], float | None], operators.Operator]] = {
    "sr4": lambda shape, rtol: operators.Downsample(4),
    "bicubic4": lambda shape, rtol: operators.Bicubic(4),
    "gaussian": lambda shape, rtol: operators.Blur.gaussian(1.5, size=min(9, shape[1] - 1 + shape[1] % 2), rtol=rtol),
    "uniform": lambda shape, rtol: operators.Blur.uniform(5, rtol=rtol),
    "inpaint": lambda shape, rtol: operators.Inpaint(_half(shape)),
    "colorize": lambda shape, rtol: operators.Colorize(),
    "hadamard": lambda shape, rtol: operators.WalshHadamard((shape[1], shape[2]), 0.25),
}


def operator_for(name: str, shape: tuple[int, ...], sigma: float) -> operators.Operator:
    """One of `OPERATORS`, for measurements with noise of sigma."""
    return OPERATORS[name](shape, _ZERO if sigma else None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--images", type=Path, metavar="PATH", help="CIFAR-10 (default: images made by the model)")
    parser.add_argument("--count", type=positive_int, default=8, help="images (default 8)")
    parser.add_argument(
        "--operators", nargs="+", choices=tuple(OPERATORS), default=["sr4", "gaussian", "inpaint"],
        help="default sr4 gaussian inpaint",
    )  # fmt: skip
    parser.add_argument("--sigma", type=float, default=0.05, help="of the noise, pixels in [-1, 1] (default 0.05)")
    parser.add_argument("--steps", type=positive_int, default=50, help="T of ours (default 50)")
    parser.add_argument("--eta", type=float, default=1.0, help="of ours (default 1)")
    parser.add_argument("--spacing", choices=SPACINGS, help="of the timesteps of ours (default: the model's own)")
    parser.add_argument(
        "--temperatures", type=factor, nargs="+", default=[0.25], metavar="FACTOR",
        help="of ours: 1 for samples of the posterior, less is nearer to its mean, which PSNR rewards (default 0.25)",
    )  # fmt: skip
    parser.add_argument(
        "--serial", action="store_true", help="ours: the serial chain only, which makes as many evaluations as theirs"
    )
    parser.add_argument("--plan", action="store_true", help="ours: what solver and window the planner picks here")
    parser.add_argument("--tol", type=positive_float, help="of ours (default: the restorer's own)")
    parser.add_argument(
        "--evaluations", type=positive_int, nargs="+", default=[50, 100], help="of theirs (default 50 100)"
    )
    parser.add_argument("--methods", nargs="+", choices=(*OURS, *THEIRS), help="default: all")
    parser.add_argument("--rounds", action="store_true", help="the table of rounds instead; of ours, without deepinv")
    parser.add_argument(
        "--etas", type=float, nargs="+", default=[0.0, 0.85], metavar="ETA", help="of --rounds (default 0 0.85)"
    )
    parser.add_argument(
        "--watched", type=positive_int, default=2, help="of --rounds: images for tol 1e-5 and for Anderson (default 2)"
    )
    parser.add_argument("--tune", action="store_true", help="theirs: the best of several settings on these images")
    parser.add_argument(
        "--check", action="store_true", help=f"exit status 1 where the best of ours is {ALLOWED} dB below theirs"
    )


def run(args: argparse.Namespace) -> int:
    wanted = args.methods or [*OURS, *THEIRS]
    if not args.rounds:
        _require(deepinv=any(name in THEIRS for name in wanted))
    if not 0 <= args.sigma < float("inf"):
        raise ValueError(f"--sigma: expected a number >= 0, got {args.sigma}")
    problem, facts = load(args), environment(args.device)
    warm_up(problem)
    seeds = range(args.seed, args.seed + args.count)
    truth = images(problem, args.images, seeds)
    rows: list[dict[str, Any]] = []
    for name in args.operators:
        operator = operator_for(name, problem.shape, args.sigma)
        clean = operator.A(truth)
        drawn = [torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(2 * 10**6 + k)) for k in seeds]
        noise = torch.stack(drawn).to(clean)
        if args.rounds:
            methods = [method for method in OURS if method in wanted]
            chosen = {sigma: operator_for(name, problem.shape, sigma) for sigma in (0.0, args.sigma)}
            found = _restoration_rounds.measure(args, problem, name, chosen, truth, noise, methods)
        else:
            found = _measure(args, problem, name, operator, truth, clean + args.sigma * noise, wanted)
        for row in found:
            rows.append(row)
            write_json(args, facts, rows)
    if args.rounds:
        print(f"{summary(facts)}\n{args.count} images, T = {args.steps}\n\n{_restoration_rounds.table(args, rows)}\n")
        print(_restoration_rounds.verdict(args, rows))
        return 0
    source = "CIFAR-10" if args.images else "images of the model itself"
    tuned = ", theirs at their best setting" if args.tune else ""
    print(
        f"{summary(facts)}\n{args.count} {source}, sigma {args.sigma:g}, T = {args.steps}, eta = {args.eta:g}{tuned}\n"
    )
    header = (
        "operator",
        "method",
        "setting",
        "PSNR",
        "SSIM",
        "evaluations",
        "sequential calls",
        "seconds",
        "not converged",
    )
    print(markdown(header, [_cells(row) for row in rows]))
    print("\nPSNR and SSIM: means over the images, pixels in [0, 1]. Seconds: for the whole batch, once.")
    return _compare(rows, args.check)


def _require(deepinv: bool) -> None:
    """Refuse before the work, not after it."""
    try:
        import torchmetrics  # noqa: F401

        if deepinv:
            import deepinv as _  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'deqdiff_fast[restoration]'") from error


def _measure(
    args: argparse.Namespace,
    problem: Problem,
    name: str,
    operator: operators.Operator,
    truth: Tensor,
    y: Tensor,
    wanted: list[str],
) -> Iterator[dict[str, Any]]:
    """One row for every method (and budget)."""
    pinv, began = operator.A_dagger(y), time.perf_counter()
    yield _row(name, "A_dagger y", "", pinv, truth, 0.0, 0, began)
    for method in (method for method in OURS if method in wanted):
        for temperature in args.temperatures:
            note(f"{name}: ours, {method}, temperature {temperature:g} ...")
            yield from _ours(args, problem, name, operator, truth, y, method, temperature)
    if any(method in THEIRS for method in wanted):
        from ._deepinv import SigmaDenoiser, baselines, physics_of

        physics = physics_of(operator, tuple(truth.shape), args.sigma / 2, args.device)
        pixels = (y + operator.A(torch.ones_like(truth))) / 2
        denoiser = SigmaDenoiser(problem)
        for budget in args.evaluations:
            found: dict[str, dict[str, Any]] = {}
            for baseline in baselines(denoiser, budget, args.sigma / 2, args.device, args.tune):
                if baseline.name not in wanted:
                    continue
                note(f"{name}: deepinv's {baseline.name}, {baseline.setting}, {budget} evaluations ...")
                denoiser.calls = denoiser.rows = 0
                began = time.perf_counter()
                restored = 2 * baseline.run(pixels, physics, tuple(truth.shape), args.seed + 1).to(truth) - 1
                evaluations = denoiser.rows / len(truth)
                row = _row(name, f"deepinv {baseline.name}", baseline.setting, restored, truth, evaluations,
                           denoiser.calls, began)  # fmt: skip
                if baseline.name not in found or row["psnr"] > found[baseline.name]["psnr"]:
                    found[baseline.name] = row
            yield from found.values()


def _ours(
    args: argparse.Namespace,
    problem: Problem,
    name: str,
    operator: operators.Operator,
    truth: Tensor,
    y: Tensor,
    method: str,
    temperature: float,
) -> list[dict[str, Any]]:
    """In parallel rounds, and the serial chain."""
    options = problem.aids | {"tol": args.tol, "max_batch": args.max_batch}
    if not args.plan:
        options["window"] = args.steps
    restorer = DEQRestorer(
        problem.model, problem.schedule(args.steps, args.eta, args.spacing), operator, sigma=args.sigma, method=method,
        temperature=temperature, **options,
    )  # fmt: skip
    seeds = range(args.seed + OTHER_NOISE, args.seed + OTHER_NOISE + len(y))
    rows, samples = [], []
    for kind in ("serial",) if args.serial else ("parallel", "serial"):
        noise, generators = problem.noise(seeds), problem.generators(seeds)
        began = time.perf_counter()
        out = (restorer.restore if kind == "parallel" else restorer.serial)(y, generator=generators, noise=noise)
        plain = out.stats.stop_reason == "serial"
        calls = out.stats.rounds + (0 if plain else out.stats.finished_serially)
        setting = f"{kind}, temperature {temperature:g}"
        row = _row(name, f"ours {method}", setting, out.sample, truth, out.stats.model_evals / len(y), calls, began)
        rows.append(row | {"unconverged": int((~out.converged).sum())})
        samples.append(out.sample)
    if len(samples) == 2:
        rows[0]["from_serial"] = float(relative_error(*samples).max())
    return rows


def _row(
    operator: str,
    method: str,
    setting: str,
    restored: Tensor,
    truth: Tensor,
    evaluations: float,
    calls: int,
    began: float,
) -> dict[str, Any]:
    seconds = time.perf_counter() - began
    psnr, ssim = _quality(restored, truth)
    return {
        "operator": operator,
        "method": method,
        "setting": setting,
        "psnr": float(psnr.mean()),
        "ssim": float(ssim.mean()),
        "psnr_of_each": psnr.tolist(),
        "evaluations": evaluations,
        "sequential_calls": calls,
        "seconds": seconds,
    }


def _quality(restored: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) PSNR in dB and SSIM of pixels in [0, 1]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    found, true = ((x.detach().float().cpu().clamp(-1, 1) + 1) / 2 for x in (restored, truth))
    psnr = [peak_signal_noise_ratio(a[None], b[None], data_range=1.0) for a, b in zip(found, true)]
    return torch.stack(psnr), structural_similarity_index_measure(found, true, data_range=1.0, reduction="none")


def _compare(rows: list[dict[str, Any]], check: bool) -> int:
    """Print how far each of ours is from the best of theirs; the exit status."""
    failed = False
    for name in dict.fromkeys(row["operator"] for row in rows):
        here = [row for row in rows if row["operator"] == name]
        theirs = [row for row in here if row["method"].startswith("deepinv")]
        apart = []
        for ours in (row for row in here if row["method"].startswith("ours") and theirs):
            least = min(row["evaluations"] for row in theirs)
            fair = [row for row in theirs if row["evaluations"] <= max(ours["evaluations"], least)]
            for group, what in ((fair, "at no more evaluations"), (theirs, "of all")):
                other = max(group, key=lambda row: row["psnr"])
                apart.append((what, ours["psnr"] - other["psnr"]))
                print(
                    f"{name}: {ours['method']} {ours['setting']} {apart[-1][1]:+.2f} dB from {other['method']}, the "
                    f"best {what} ({ours['evaluations']:.0f} and {other['evaluations']:.0f})"
                )
        for what in {what for what, _ in apart}:
            failed |= max(away for group, away in apart if group == what) < -ALLOWED
    return int(check and failed)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    setting = row["setting"]
    if "from_serial" in row:
        setting += f", {row['from_serial']:.0e} from serial"
    return (
        row["operator"], row["method"], setting, f"{row['psnr']:.2f}", f"{row['ssim']:.3f}",
        f"{row['evaluations']:.0f}", str(row["sequential_calls"]), f"{row['seconds']:.1f}",
        str(row.get("unconverged", "")),
    )  # fmt: skip
