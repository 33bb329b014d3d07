"""What a user starts: solves of every kind on one small network, for tests of what they find and leave around them.

`from entry_points import RUNS, Net`, which tests/conftest.py makes possible. Each of RUNS takes the network and returns
what comes out, a tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.integrations.k_diffusion import sample_deq
from deqdiff_fast.operators import Inpaint

STEPS, SHAPE = 12, (1, 3, 8, 8)
ALPHAS = torch.linspace(0.9999, 0.98, 1000).cumprod(0)
TIMES = torch.arange(0, 1000, 1000 // STEPS)[:STEPS].flip(0)
LONG = torch.arange(0, 1000, 25).flip(0)  # as many steps as rounds on nodes are made for
SIGMAS = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.5, 0.0])
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
ONE = torch.ones(1, 1)
MASK = torch.rand(SHAPE[1:], generator=torch.Generator().manual_seed(3)) > 0.5
SOLVERS = ("auto", "quasi-newton", "picard", "anderson", "triangular", "deq-ddim", "paradigms", "parataa", "parareal")
METHODS = ("equilibrium", "fixed_point", "ddim", "gradient")


class Net(torch.nn.Module):
    """A small network that notes something of what it finds."""

    def __init__(self, look: Callable[[], object]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layer = torch.nn.Conv2d(3, 3, 3, padding=1)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
        self.look, self.found = look, set[object]()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.found.add(self.look())
        return 0.8 * torch.tanh(self.layer(x))


def schedule(times: Tensor = TIMES) -> dq.Schedule:
    return dq.Schedule.ddim(ALPHAS, times)


def sample(net, solver="auto", times=TIMES, **options):
    return dq.DEQSampler(net, schedule(times), solver=solver, tol=1e-4, **options).sample(NOISE).sample


def backward(net, gradient):
    net.requires_grad_(True).zero_grad()
    dq.DEQSampler(net, schedule(), gradient=gradient, tol=1e-4).sample(NOISE).sample.square().sum().backward()
    return net.layer.weight.grad.clone()


def invert(net, method):
    options = {"max_rounds": 4} if method == "gradient" else {}
    return dq.DEQInverter(net, schedule(), method, on_failure="warn", **options).invert(NOISE * 0.3).noise


def guided(net):
    model = dq.guided(lambda x, t, c: net(x, t) * c.view(-1, 1, 1, 1), ONE, 0 * ONE, 3.0)
    return dq.DEQSampler(model, schedule(), tol=1e-4).sample(NOISE).sample


def restore(net):
    return dq.DEQRestorer(net, schedule(), Inpaint(MASK)).restore(0.3 * NOISE * MASK, noise=NOISE).sample


RUNS = {f"solver {name}": lambda net, name=name: sample(net, name) for name in SOLVERS}
RUNS |= {
    f"gradient {name}": lambda net, name=name: backward(net, name)
    for name in ("implicit", "phantom", "unrolled", "reversible")
}
RUNS |= {f"invert {name}": lambda net, name=name: invert(net, name) for name in METHODS}
RUNS |= {
    "serial": lambda net: dq.DEQSampler(net, schedule()).serial(NOISE).sample,
    "nodes": lambda net: sample(net, "quasi-newton", LONG),
    "draft": lambda net: sample(net, "draft", LONG, draft=lambda x, t: 0.9 * net(x, t).to(x.dtype)),
    "guided": guided,
    "sample_deq": lambda net: sample_deq(lambda x, sigma: net(x, sigma), 10 * NOISE, SIGMAS, disable=True),
    "restore": restore,
}
