"""What came of many problems, by kind, and whether that is good enough."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from problems import Outcome

ILL, CHAOTIC = 0.25, 5e4
"""A problem is ill-conditioned where rounding alone moves its sample by more than the first part of the tolerance, or
where its chain amplifies a change by more than the second: float32 could not compute it to 1e-2 then, and residuals say
nothing about its errors. It is counted and, where it went wrong, told, but its error is not held against the solver."""
WORST, SHARE = 3.0, 0.005
"""No sample that is called converged may be further off than so many tolerances, and of no kind of problem may more
than this share be further off than one."""

KINDS: dict[str, Callable[[Outcome], str]] = {
    "model": lambda one: one.family,
    "chain": lambda one: one.chain,
    "solver": lambda one: one.solver,
    "dtype": lambda one: one.dtype,
    "certify": lambda one: one.certify,
    "tolerance": lambda one: "1e-3 and more" if one.tol >= 1e-3 else "less",
    "amplifies": lambda one: "up to 100" if one.gain < 100 else "to 10,000" if one.gain < 1e4 else "more",
}


def worst(one: Outcome) -> float:
    """The largest error over tolerance of a converged sample."""
    return max(one.ratios, default=0.0)


def ill(one: Outcome) -> bool:
    """Whether what is right is not defined to the tolerance."""
    return one.ill > ILL or one.gain > CHAOTIC


def wrong(one: Outcome) -> bool:
    """Whether it is to be looked at: it failed, or a sample that is called converged is further off than asked."""
    return bool(one.fault) or (not ill(one) and worst(one) > 1)


def kind_line(name: str, group: list[Outcome]) -> tuple[str, bool]:
    """A line of the table, and whether this kind is good enough."""
    sound = [one for one in group if not ill(one)]
    ratios = [ratio for one in sound for ratio in one.ratios]
    above, far = sum(ratio > 1 for ratio in ratios), sum(ratio > WORST for ratio in ratios)
    good = far == 0 and above <= SHARE * len(ratios) and not any(one.fault for one in group)
    largest = max(ratios, default=0.0)
    typical = statistics.median(ratios) if ratios else 0.0
    cells = (
        f"{name:28s}", f"{len(group):8d}", f"{len(group) - len(sound):8d}", f"{len(ratios):8d}",
        f"{sum(one.unconverged for one in sound):8d}", f"{above:6d}", f"{far:6d}", f"{typical:8.1e}", f"{largest:8.1e}",
        f"{sum(bool(one.fault) for one in group):6d}",
    )  # fmt: skip
    return " ".join(cells) + ("" if good else "  TOO MANY"), good


def problem_line(one: Outcome, seed: int) -> str:
    """How a problem that went wrong is made again, and what it is."""
    said = one.fault or f"{worst(one):.2g} times tol{', ill-conditioned' if ill(one) else ''}"
    about = f"{one.family}, {one.chain}, {one.dtype}, {one.what}"
    return f"  --seed {seed} --only {one.number}: {said}; {about}; {one.rounds} rounds, amplifies {one.gain:.0e} times"


def report(outcomes: Iterable[Outcome]) -> bool:
    """Print the table by kind. Returns whether all is good enough."""
    every, fine = sorted(outcomes, key=lambda one: one.number), True
    heads = ("problems", "ill-cond", "samples", "not conv", ">tol", ">3tol", "median", "largest", "faults")
    widths = (8, 8, 8, 8, 6, 6, 8, 8, 6)
    print(" ".join(["kind".ljust(28), *(head.rjust(width) for head, width in zip(heads, widths))]))
    for axis, of in KINDS.items():
        for name in sorted({of(one) for one in every}):
            line, good = kind_line(f"{axis}: {name}", [one for one in every if of(one) == name])
            fine &= good
            print(line)
    line, good = kind_line("all", every)
    print(line)
    print(f"{sum(one.seconds for one in every):.0f} s of processor time", flush=True)
    return fine and good
