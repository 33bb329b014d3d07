"""Whether rounds pay on a device at all, said in one sentence from a measurement of a network like a small denoiser."""

from __future__ import annotations

import time

import torch
from torch import nn

from ..nodes.grid import round_sizes
from ..plan import Plan
from .cost_curve import Curve
from .decide import PlannerInputs, decide
from .round_model import Expectation

STEPS = 100
CHANNELS, LAYERS, SIDE = 64, 6, 32  # 0.2 M parameters on 32 x 32
TRIES = 3
SIZES = (1, 8, 32)  # rows of a call, about those of rounds on nodes


def whether_rounds_pay(device: torch.device | str | None = None) -> str:
    """One sentence: whether rounds are faster than the serial chain for a small network, one sample and 100 timesteps,
    and what that rests on. device: the first GPU, else the CPU, unless given. Takes a few calls of the network."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    seconds = _measure(place)
    nodes = round_sizes(STEPS)
    expectation = Expectation(STEPS, nodes=nodes)
    inputs = PlannerInputs(
        STEPS, 1, seconds[1], Curve(seconds), lambda window: expectation(window), nodes=nodes, limit=None
    )
    threads = torch.get_num_threads()
    where = f"cpu, {threads} thread{'s' * (threads != 1)}" if place.type == "cpu" else str(place)
    return sentence(decide(inputs), seconds, where)


def sentence(plan: Plan, seconds: dict[int, float], where: str) -> str:
    """What a plan that rests on those costs says."""
    rows = max(seconds)
    ratio = seconds[rows] / max(seconds[1], 1e-12)
    pay = "do not pay" if plan.serial else "pay"
    cost = f"{rows} rows in a call cost {ratio:.1f} times one"
    return f"rounds {pay} for a small network on {where}: {cost}; {plan.summary}"


def _measure(device: torch.device) -> dict[int, float]:
    """{rows: seconds} of a call, the shortest of a few."""
    with torch.random.fork_rng(devices=[]):
        convolutions = [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(LAYERS)]
        first = nn.Conv2d(3, CHANNELS, 3, padding=1)
    layers = [part for layer in convolutions for part in (layer, nn.SiLU())]
    network = nn.Sequential(first, *layers).to(device).eval()
    found: dict[int, float] = {}
    with torch.inference_mode():
        for rows in SIZES:
            x = torch.zeros(rows, 3, SIDE, SIDE, device=device)
            times = []
            for _ in range(1 + TRIES):  # the first one chooses kernels
                began = time.perf_counter()
                network(x).sum().item()
                times.append(time.perf_counter() - began)
            found[rows] = min(times[1:])
    return found
