"""The Jacobian of a remainder along the secants of the last rounds, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


class Secants:
    """dR (dZ^T dZ + ridge)^-1 dZ^T (x - Z) for some rows, with dZ = z[older] - z[column] and dR likewise.

    z, rest: (H + 1, N, B, D) rings; filled: (N, B), how many of `older` are usable. Columns are normalised; those
    shorter than floor |Z| count as zero. As in `kernels.newton_scan` (Fang and Saad 2009).
    """

    def __init__(
        self, z: Tensor, rest: Tensor, filled: Tensor, column: int, older: list[int], rows: slice, ridge: float,
        floor: float,
    ) -> None:  # fmt: skip
        self.first, self.count = rows.start, len(older) if rows.start < rows.stop else 0
        if not self.count:
            return
        dz = torch.stack([z[k, rows] for k in older], 2).sub_(z[column, rows, :, None])  # (rows, B, n, D)
        dr = torch.stack([rest[k, rows] for k in older], 2).sub_(rest[column, rows, :, None])
        norm = dz.norm(dim=-1, keepdim=True)
        order = torch.arange(self.count, device=z.device)
        keep = norm > floor * z[column, rows, :, None].norm(dim=-1, keepdim=True)
        keep &= (order < filled[rows, :, None])[..., None]
        scale = torch.where(keep, 1 / norm, 0)
        self.unit = torch.where(keep, dz.mul_(scale), 0)
        gram = (self.unit @ self.unit.mT).double()
        diagonal = torch.where(keep[..., 0], ridge, 1.0).double()
        inverse = torch.linalg.inv_ex(gram + torch.diag_embed(diagonal)).inverse.to(z.dtype)
        self.slope = inverse @ torch.where(keep, dr.mul_(scale), 0)

    def add(self, row: int, dx: Tensor, change: Tensor) -> Tensor:
        """change + how much further the remainder is at x than in that row; dx: (B, D) x - Z, change: (B, D)."""
        if not self.count:
            return change
        # elementwise: a matrix product this small would wake other threads, and wait for them
        along = (self.unit[row - self.first] * dx[:, None]).sum(-1, keepdim=True)
        further: Tensor = (self.slope[row - self.first] * along).sum(1)
        return further.add_(change)
