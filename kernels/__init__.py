"""The solver step as fused kernels: one folder per op, each with a plain-torch reference beside its compiled forms.

`ddim_update` advances every timestep of the chain at once (an affine scan) and measures the residuals; `anderson_step`
does the same and extrapolates from the last rounds. Both work in place on time-major tensors and neither waits for the
device. Importing this package needs neither Triton, nor a GPU, nor the compiled extension.
"""

from ._dispatch import BACKENDS, available_backends
from .anderson_mix import anderson_step
from .ddim_update import ddim_update
from .newton_scan import newton_scan

__all__ = ["BACKENDS", "anderson_step", "available_backends", "ddim_update", "newton_scan"]
