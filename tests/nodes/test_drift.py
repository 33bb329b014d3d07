"""The noise of a stochastic chain from node to node, against the chain stepped one by one."""

from __future__ import annotations

import pytest
import torch

from deqdiff_fast.nodes.composite import composite_steps
from deqdiff_fast.nodes.drift import composite_drift


@pytest.mark.parametrize("lags", [1, 2, 3])
@pytest.mark.parametrize("nodes", [[0], [0, 22], [0, 3, 7, 8, 15, 21, 22], list(range(23))], ids=len)
def test_the_chain_with_noise(random_chain, step_by_step, scan, gaussian, nodes, lags):
    chain, classes = random_chain(23, lags, 3), torch.tensor([0, 2, 1, 1, 0])
    remainder, start, drift = gaussian(len(nodes), 2, 5), gaussian(2, 5, seed=2), gaussian(23, 2, 5, seed=3)
    at = torch.tensor(nodes)
    composite = composite_drift(chain, classes, tuple(nodes), drift)
    assert composite.shape == (len(nodes), lags, 2, 5)
    made = scan(composite_steps(chain, at, at), remainder, start, classes, composite)
    expected = step_by_step(chain, nodes, nodes, remainder, start, classes, drift)[[*nodes, 23]]
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)


def test_one_class_for_all_elements(random_chain, gaussian):
    chain, drift, nodes = random_chain(23, 2, 1), gaussian(23, 2, 5), (0, 3, 7, 22)
    expected = composite_drift(chain, torch.zeros(5, dtype=torch.int32), nodes, drift)
    torch.testing.assert_close(composite_drift(chain, None, nodes, drift), expected)


def test_noise_that_is_not_there(random_chain):
    assert not composite_drift(random_chain(23, 2, 1), None, (0, 3, 22), torch.zeros(23, 2, 5)).any()
