"""Run by the processes of test_shared_states.py: every rank holds its share of the states, and the sample is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equality_checks import ROUNDING, alike, draw_kwargs
from fault_checks import Faulty, raised, raising, same_error
from problems import Denoiser, apart, noise, schedule
from rank_launch import run_checks
from torch import Tensor
from torch import distributed as dist

import deqdiff_fast as dq
from deqdiff_fast.engine.placement import Placement
from deqdiff_fast.nodes.rounds import most_nodes
from deqdiff_fast.ranks.group import Ranks
from deqdiff_fast.ranks.shares import share_of


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_checks({check.__name__: check for check in CHECKS})
