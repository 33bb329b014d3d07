"""Images to invert: the test set of CIFAR-10 from a path, or samples of the model itself."""

from __future__ import annotations

import io
import itertools
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import deqdiff_fast as dq

from ._problems import Problem

OWN_STEPS = 50


def images(problem: Problem, path: Path | None, seeds: range, dtype: torch.dtype = torch.float32) -> Tensor:
    """(len(seeds), *shape) in [-1, 1]: image k of the test set for seed k, or what the model makes of noise k."""
    if path is None:
        chain = dq.DEQSampler(problem.model, problem.schedule(OWN_STEPS, 0.0))
        with torch.no_grad():
            return chain.serial(problem.noise(seeds).to(dtype)).sample.clamp(-1, 1)
    pixels = cifar10(path)
    if problem.shape != (3, 32, 32):
        raise ValueError(f"--data {path}: CIFAR-10 has images of shape (3, 32, 32), the model wants {problem.shape}")
    if seeds.stop > len(pixels):
        raise ValueError(f"--data {path}: it has {len(pixels)} images; images up to {seeds.stop} were asked for")
    return (pixels[seeds.start : seeds.stop].to(dtype) / 127.5 - 1).to(problem.device)


def cifar10(path: Path) -> Tensor:
    """(N, 3, 32, 32) uint8 from the folder `cifar-10-batches-py` (its test batch), or from an .npz of packed JPEG files
    (arrays `jpeg` and `offset`)."""
    if path.is_dir():
        batch = pickle.loads((path / "test_batch").read_bytes(), encoding="bytes")
        return torch.from_numpy(np.asarray(batch[b"data"]).reshape(-1, 3, 32, 32))
    from PIL import Image

    with np.load(path) as packed:
        if not {"jpeg", "offset"} <= set(packed.files):
            raise ValueError(f"--data {path}: expected arrays jpeg and offset, got {', '.join(packed.files)}")
        jpeg, offset = packed["jpeg"], packed["offset"]
    pictures = [
        np.asarray(Image.open(io.BytesIO(jpeg[a:b].tobytes())).convert("RGB")) for a, b in itertools.pairwise(offset)
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
