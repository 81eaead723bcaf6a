"""The data and the models of the examples: handwritten digits, 8 by 8 pixels, from this repository."""

from __future__ import annotations

import os
from pathlib import Path

import numpy

DATA = Path(__file__).resolve().parents[3] / "thalweg" / "data" / "digits.csv"
TESTED = 300


def load() -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Images (n, 64) from 0 to 1 and labels to train with, then those to test with; the same in every process."""
    rows = numpy.loadtxt(DATA, delimiter=",", dtype=numpy.float32)
    rows = rows[numpy.random.default_rng(0).permutation(len(rows))]
    images, labels = rows[:, :64] / 16, rows[:, 64].astype(numpy.int64)
    return images[TESTED:], labels[TESTED:], images[:TESTED], labels[:TESTED]


def batch(step: int, size: int, rank: int, workers: int, of: int) -> numpy.ndarray:
    """Which samples a worker takes in a step: all workers' together are one random choice of `size`."""
    chosen = numpy.random.default_rng(step + 1).choice(of, size, replace=False)
    return chosen[rank::workers]


def from_environment() -> tuple[int, int]:
    """Rank and number of workers, as torchrun and others say them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def torch_model(kind: str, seed: int = 0):  # type: ignore[no-untyped-def]
    """An MLP 64-64-10, or a small CNN; the same in every process."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 10),
    )
