"""What must work right after `pip install`: the import, `info`, and solves with the compiled core."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import deqdiff_fast as dq

STEPS, SHAPE = 40, (2, 3, 8, 8)


def main() -> None:
    """Raise where something does not work; print one line."""
    assert Path(sys.prefix).resolve() in Path(dq.__file__).resolve().parents, (
        f"not the installed package: {dq.__file__}"
    )
    info = subprocess.run([sys.executable, "-m", "deqdiff_fast.info"], capture_output=True, text=True, check=True)
    assert "cpp" in info.stdout, info.stdout
    from deqdiff_fast.kernels import available_backends

    assert available_backends()["cpp"] == "available", available_backends()
    torch.manual_seed(0)
    scale = torch.rand(SHAPE[1:]) * 0.5 + 0.25

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * scale) + 0.1 * torch.cos(t.to(x.dtype) / 300).view(-1, 1, 1, 1)

    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    schedule = dq.Schedule.ddim(abar, torch.arange(STEPS).flip(0) * (1000 // STEPS))
    noise = torch.randn(SHAPE)
    worst = 0.0
    for solver in ("quasi-newton", "triangular", "picard"):
        sampler = dq.DEQSampler(model, schedule, solver=solver, backend="cpp", window=STEPS)
        out, serial = sampler.sample(noise), sampler.serial(noise).sample
        error = float((out.sample - serial).norm() / serial.norm())
        assert out.converged.all(), f"{solver}: not converged, {out.stats}"
        assert error <= 1e-2, f"{solver}: {error:.1e} from the serial chain"
        assert not out.stats.finished_serially, f"{solver}: finished serially"
        worst = max(worst, error)
    python = ".".join(map(str, sys.version_info[:3]))
    print(
        f"Python {python}, torch {torch.__version__}: three solvers within {worst:.0e} of the serial chain, C++ backend"
    )


if __name__ == "__main__":
    main()
