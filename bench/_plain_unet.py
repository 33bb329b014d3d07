"""diffusers' UNet2DModel in plain torch, as far as the benchmark's networks need it: for machines without diffusers.

Modules have the names of diffusers' own, so that its files of weights load as they are. DDPM's U-Net (Ho et al. 2020,
arXiv 2006.11239, appendix B).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Norms, SiLU and two convolutions, the timestep's embedding added in between, around a shortcut."""

    def __init__(self, inner: int, outer: int, embedding: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inner, eps), nn.GroupNorm(groups, outer, eps)
        self.conv1, self.conv2 = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, outer)
        self.conv_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = h + self.time_emb_proj(functional.silu(embedding))[:, :, None, None]
        out: Tensor = self.conv_shortcut(x) + self.conv2(functional.silu(self.norm2(h)))
        return out


class Attention(nn.Module):
    """Of all pixels to all pixels."""

    def __init__(self, channels: int, head: int | None, groups: int, eps: float) -> None:
        super().__init__()
        self.heads = channels // head if head else 1
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        flat = self.group_norm(x).flatten(2).mT
        q, k, v = (
            part(flat).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.to_out[0](mixed).mT.reshape(x.shape)


class Resize(nn.Module):
    """Half as many pixels a side, or twice as many."""

    def __init__(self, channels: int, up: bool, padding: int = 1) -> None:
        super().__init__()
        self.up, self.padding = up, padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        elif self.padding == 0:
            x = functional.pad(x, (0, 1, 0, 1))
        out: Tensor = self.conv(x)
        return out


class Level(nn.Module):
    """The blocks of one resolution."""

    def __init__(
        self, blocks: list[Block], attentions: list[Attention], down: Resize | None, up: Resize | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(blocks)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        if down is not None:
            self.downsamplers = nn.ModuleList([down])
        if up is not None:
            self.upsamplers = nn.ModuleList([up])

    def attend(self, number: int, x: Tensor) -> Tensor:
        """After block `number`, where there is any attention."""
        out: Tensor = self.attentions[number](x) if hasattr(self, "attentions") else x
        return out


class PlainUNet(nn.Module):
    """model(x, t) -> prediction; x: (n, C, H, W), t: (n,). Arguments are those of UNet2DModel; what it cannot do is a
    ValueError."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        widths, groups, eps = tuple(config["block_out_channels"]), config["norm_num_groups"], config["norm_eps"]
        if config.get("time_embedding_type", "positional") != "positional" or config["act_fn"] != "silu":
            raise ValueError("expected positional embeddings of time and SiLU")
        self.flip, self.shift, self.width = config["flip_sin_to_cos"], config["freq_shift"], widths[0]
        size, head, layers = 4 * widths[0], config["attention_head_dim"], config["layers_per_block"]

        def block(inner: int, outer: int) -> Block:
            return Block(inner, outer, size, groups, eps)

        def attentions(kind: str, channels: int, count: int) -> list[Attention]:
            return [Attention(channels, head, groups, eps) for _ in range(count)] if kind.startswith("Attn") else []

        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(widths[0], size), "linear_2": nn.Linear(size, size)})
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        inner, last = widths[0], len(widths) - 1
        for k, (kind, outer) in enumerate(zip(config["down_block_types"], widths, strict=True)):
            blocks = [block(inner if n == 0 else outer, outer) for n in range(layers)]
            down = Resize(outer, False, config["downsample_padding"]) if k < last else None
            self.down_blocks.append(Level(blocks, attentions(kind, outer, layers), down, None))
            inner = outer
        middle = [Attention(inner, head, groups, eps)] if config.get("add_attention", True) else []
        self.mid_block = Level([block(inner, inner), block(inner, inner)], middle, None, None)
        for k, kind in enumerate(config["up_block_types"]):
            outer, skip = widths[last - k], widths[max(last - k - 1, 0)]
            kept = [outer] * layers + [skip]
            blocks = [block((inner if n == 0 else outer) + kept[n], outer) for n in range(layers + 1)]
            up = Resize(outer, True) if k < last else None
            self.up_blocks.append(Level(blocks, attentions(kind, outer, layers + 1), None, up))
            inner = outer
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps)
        self.conv_out = nn.Conv2d(widths[0], config["out_channels"], 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding = self._embed(t).to(x.dtype)
        h = self.conv_in(x)
        kept = [h]
        for level in self.down_blocks:
            for n, resnet in enumerate(level.resnets):
                h = level.attend(n, resnet(h, embedding))
                kept.append(h)
            if hasattr(level, "downsamplers"):
                h = level.downsamplers[0](h)
                kept.append(h)
        first, second = self.mid_block.resnets
        h = second(self.mid_block.attend(0, first(h, embedding)), embedding)
        for level in self.up_blocks:
            for n, resnet in enumerate(level.resnets):
                h = level.attend(n, resnet(torch.cat([h, kept.pop()], 1), embedding))
            h = level.upsamplers[0](h) if hasattr(level, "upsamplers") else h
        out: Tensor = self.conv_out(functional.silu(self.conv_norm_out(h)))
        return out

    def _embed(self, t: Tensor) -> Tensor:
        half = self.width // 2
        rate = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / (half - self.shift))
        angle = t[:, None].float() * rate
        parts = (angle.cos(), angle.sin()) if self.flip else (angle.sin(), angle.cos())
        h = self.time_embedding["linear_1"](torch.cat(parts, 1))
        out: Tensor = self.time_embedding["linear_2"](functional.silu(h))
        return out
