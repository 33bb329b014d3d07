"""The solver step as fused kernels: one folder per op, each with a plain-torch reference beside its compiled forms.

`ddim_update` advances every timestep of the chain at once (an affine scan) and measures the residuals; `anderson_step`
does the same and extrapolates from the last rounds; `newton_scan` linearises the model instead, `inverse_scan` the
steps from the sample back to the noise; `node_scan` goes in composite steps between the timesteps that were evaluated.
`secant_fit` is the small solve of many of its rows.
`mark_converged` and `advance_window` are the stopping rule, `copy_rows` moves rows as it says. All work in place and
none waits for the device. Importing this package needs neither Triton, nor a GPU, nor the compiled extension.
"""

# In the root of a checkout this folder answers to `import kernels`, which transformers tries for a library it knows:
# it then finds nothing in here, which it takes for what it is.
if __name__ != "kernels":
    from ._backends import BACKENDS, available_backends
    from .advance_window import advance_window
    from .anderson_step import anderson_step, anderson_step_bytes
    from .copy_rows import copy_rows
    from .ddim_update import ddim_update, ddim_update_bytes
    from .inverse_scan import inverse_scan, inverse_scan_bytes
    from .mark_converged import mark_converged
    from .newton_scan import newton_scan, newton_scan_bytes
    from .node_scan import node_scan
    from .secant_fit import secant_fit

__all__ = [
    "BACKENDS", "advance_window", "anderson_step", "anderson_step_bytes", "available_backends", "copy_rows",
    "ddim_update", "ddim_update_bytes", "inverse_scan", "inverse_scan_bytes", "mark_converged", "newton_scan",
    "newton_scan_bytes", "node_scan", "secant_fit",
]  # fmt: skip
