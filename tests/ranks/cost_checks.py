"""Run by the processes of test_cost.py: what rounds cost over a slow network is what the model of cost says, by a clock
that the model and the exchanges move on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from problems import Denoiser, noise, schedule
from rank_launch import run_checks
from torch import Tensor
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import deqdiff_fast as dq
from bench._rank_prediction import Link, predict
from deqdiff_fast.planner.cost_curve import Curve
from deqdiff_fast.ranks.group import Ranks

COSTS = Curve({1: 0.02, 4: 0.05, 16: 0.17, 64: 0.63})  # seconds of a call on so many rows


class Machine:
    """A clock for each rank, which an exchange sets to that of the last one to arrive and so much later."""

    def __init__(self, link: Link) -> None:
        self.link, self.now, self.rows = link, 0.0, list[int]()
        self.ranks = Ranks.of("world")
        self.plain = self.ranks.gather

    def gather(self, out: Tensor, own: Tensor) -> None:
        latest = torch.tensor(self.now, dtype=torch.float64)
        dist.all_reduce(latest, dist.ReduceOp.MAX)
        self.now = float(latest) + self.link.seconds(self.ranks.size, own.numel())
        self.plain(out, own)

    def call(self, rows: int) -> None:
        self.now += COSTS(rows)
        self.rows.append(rows)


class Timed(Denoiser):
    machine: Machine

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.machine.call(len(x))
        return super().forward(x, t)


def a_delay_costs_what_the_model_of_cost_says() -> None:
    model, ranks = Timed(torch.float32).requires_grad_(False), Ranks.of("world")
    for solver, steps in (("quasi-newton", 50), ("picard", 30)):
        sampler = dq.DEQSampler(model, schedule(steps), solver=solver, tol=1e-3, group="world")
        for number, latency in enumerate((1e-4, 1e-4, 1e-3, 1e-4, 1e-2)):
            machine = model.machine = Machine(Link(latency, 1e6))
            before, ranks.gather = ranks.messages, machine.gather  # type: ignore[method-assign]
            try:
                found = sampler.sample(noise(1, torch.float32, seed=number))
            finally:
                del ranks.gather
            if number not in (2, 4):  # the others also check rows, of which every rank gets the whole batch
                continue
            exchanges = ranks.messages - before
            shares = [json.loads(text) for text in ranks.exchange_text(json.dumps(machine.rows))]
            rows = [sum(share) for share in zip(*shares, strict=True)]  # no call has fewer than one for each
            assert len(rows) == found.stats.model_calls
            told = predict(rows, 0.0, COSTS, ranks.size, machine.link, 24)
            # one more exchange a solve, of whether all ranks were asked the same
            assert exchanges == len(rows) + 1
            assert abs(machine.now - told - machine.link.seconds(ranks.size, 104)) < 1e-9, (machine.now, told)
            assert told > len(rows) * latency


CHECKS = (a_delay_costs_what_the_model_of_cost_says,)

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_checks({check.__name__: check for check in CHECKS})
