"""A history on the host of a pretended device: what stays on the device, what is copied, and that nothing waits."""

from __future__ import annotations

import pytest
import torch
from conftest import PeakBytes
from graph_solves import start
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.engine import placement
from deqdiff_fast.engine.placement import Placement
from deqdiff_fast.memory import SolverMemory, pool
from deqdiff_fast.nodes.rounds import NodeRounds
