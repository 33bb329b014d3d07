"""The Jacobian of a remainder along the secants of the last rounds, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


class Secants:
    """dR (dZ^T dZ + ridge)^-1 dZ^T (x - Z) for rows first <= i < last, with dZ = z[older] - z[column] and dR likewise.

    z, rest: (H + 1, T, B, D) rings; filled: (T, B), how many of `older` are usable. Columns are normalised; those
    shorter than floor |Z| count as zero. As in `kernels.newton_scan` (Fang and Saad 2009).
    """

    def __init__(
        self, z: Tensor, rest: Tensor, filled: Tensor, column: int, older: list[int], first: int, last: int,
        ridge: float, floor: float,
    ) -> None:  # fmt: skip
        self.first, self.now, self.count = first, z[column], len(older)
        if not older or first >= last:
            self.count = 0
            return
        rows = slice(first, last)
        dz = torch.stack([z[k, rows] for k in older]).sub_(z[column, rows])
        dr = torch.stack([rest[k, rows] for k in older]).sub_(rest[column, rows])
        norm = dz.norm(dim=-1, keepdim=True)
        order = torch.arange(len(older), device=z.device)[:, None, None]
        keep = norm > floor * z[column, rows].norm(dim=-1, keepdim=True)
        keep &= (order < filled[rows])[..., None]
        scale = torch.where(keep, 1 / norm, 0)
        self.unit = torch.where(keep, dz.mul_(scale), 0)
        self.slope = torch.where(keep, dr.mul_(scale), 0)
        gram = torch.einsum("nrbd,mrbd->rbnm", self.unit, self.unit).double()
        diagonal = torch.where(keep[..., 0], ridge, 1.0).movedim(0, -1).double()
        self.inverse = torch.linalg.inv_ex(gram + torch.diag_embed(diagonal)).inverse.to(z.dtype)

    def __call__(self, i: int, state: Tensor) -> Tensor | float:
        """(B, D): how much further the remainder is at `state` than it was found to be in row i."""
        if not self.count:
            return 0.0
        k = i - self.first
        along = torch.einsum("nbd,bd->bn", self.unit[:, k], state - self.now[i])
        weight = torch.einsum("bnm,bm->bn", self.inverse[k], along)
        return torch.einsum("bn,nbd->bd", weight, self.slope[:, k])
