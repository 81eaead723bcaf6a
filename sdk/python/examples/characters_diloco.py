"""A small transformer learns Python's own help texts by characters, with DiLoCo: workers meet every 50 steps.

    python -m thalweg up                                       # in another terminal
    RANK=0 WORLD_SIZE=2 python examples/characters_diloco.py & RANK=1 WORLD_SIZE=2 python examples/characters_diloco.py

`--mode synchronous` averages gradients in every step instead, `--mode alone` does what those workers do in one process and
without the service. Rank 0 prints a line of JSON every `--validate` steps (steps,
tokens that all workers have seen, validation loss in nats per character), and at the end also the bytes that it has
sent and received for its rounds. The default model has about 1 million parameters; `--width 64 --layers 2` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import pydoc_data.topics

import numpy
import torch
from digits import from_environment
from torch import nn

import thalweg.torch

#: Characters of the text that a worker sees at once.
CONTEXT = 64


def load() -> tuple[torch.Tensor, torch.Tensor, int]:
    """The texts of ``help()``, which every CPython ships, as numbers: to train with and to validate with (the last tenth
    of each), and how many characters there are."""
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    alphabet = {character: index for index, character in enumerate(sorted(set("".join(texts))))}
    coded = [torch.tensor([alphabet[character] for character in text]) for text in texts]
    cuts = [len(text) * 9 // 10 for text in texts]
    train = torch.cat([text[:cut] for text, cut in zip(coded, cuts)])
    validate = torch.cat([text[cut:] for text, cut in zip(coded, cuts)])
    return train, validate, len(alphabet)


class Block(nn.Module):
    """Attention to what came before, and a layer for each place by itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.think = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.register_buffer("later", torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, places, width = x.shape
        parts = self.attend(self.before(x)).view(batch, places, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / math.sqrt(width // self.heads)
        scores = scores.masked_fill(self.later[:places, :places], float("-inf"))
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, places, width)
        x = x + self.out(mixed)
        return x + self.think(self.between(x))


class Characters(nn.Module):
    """Logits of the next character at every place."""

    def __init__(self, characters: int, width: int, layers: int) -> None:
        super().__init__()
        self.character, self.place = nn.Embedding(characters, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(layers)))
        self.end, self.logits = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.character(text) + self.place.weight[: text.shape[1]]
        return self.logits(self.end(self.blocks(x)))


def loss_of(model: nn.Module, text: torch.Tensor, starts: numpy.ndarray) -> torch.Tensor:
    """Mean cross-entropy of the characters after each of these places."""
    samples = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
    return nn.functional.cross_entropy(model(samples[:, :-1]).flatten(0, 1), samples[:, 1:].flatten())


def validation(model: nn.Module, text: torch.Tensor) -> float:
    """Over all of the text that nobody is trained with."""
    starts = numpy.arange(0, len(text) - CONTEXT - 1, CONTEXT)
    with torch.no_grad():
        return float(sum(loss_of(model, text, part) * len(part) for part in numpy.array_split(starts, 16)) / len(starts))


def rate(highest: float, step: int, steps: int) -> float:
    """Up in the first hundredth of the steps, then down along half a cosine to a twentieth."""
    warm = min(1.0, step / max(1, steps // 100))
    return highest * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["diloco", "synchronous", "alone"], default="diloco")
    parser.add_argument("--every", type=int, default=50, help="steps between rounds of DiLoCo")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--validate", type=int, default=50, help="steps between validations")
    parser.add_argument("--batch", type=int, default=16, help="places in the text that a worker sees in a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--outer-lr", type=float, default=0.9)
    parser.add_argument("--outer-momentum", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rank, workers = from_environment()
    train, validate, characters = load()

    alone = arguments.mode == "alone"
    if not alone:
        thalweg.init()
    torch.manual_seed(arguments.seed)
    model = Characters(characters, arguments.width, arguments.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.1)
    job = None
    with contextlib.ExitStack() as stack:
        if arguments.mode == "diloco":
            settings = {"outer_lr": arguments.outer_lr, "outer_momentum": arguments.outer_momentum}
            outer = thalweg.torch.DiLoCo(model, optimizer, sync_every=arguments.every, **settings)
            job = stack.enter_context(outer).job
        elif not alone:
            optimizer = thalweg.torch.DistributedOptimizer(optimizer, model.named_parameters())
            job = optimizer.job
        for step in range(1, arguments.steps + 1):
            # Every worker's own, in any mode the same.
            draws = [
                numpy.random.default_rng([arguments.seed, worker, step])
                for worker in (range(workers) if alone else [rank])
            ]
            starts = [random.integers(0, len(train) - CONTEXT - 1, arguments.batch) for random in draws]
            for group in optimizer.param_groups:
                group["lr"] = rate(arguments.lr, step, arguments.steps)
            optimizer.zero_grad()
            loss_of(model, train, numpy.concatenate(starts)).backward()
            optimizer.step()
            if rank == 0 and step % arguments.validate == 0:
                seen = {"steps": step, "tokens": step * workers * arguments.batch * CONTEXT}
                print(json.dumps({**seen, "loss": validation(model, validate)}), flush=True)
        if rank == 0:
            parameters = sum(parameter.numel() for parameter in model.parameters())
            traffic = sum(job.traffic) if job is not None else 0
            print(json.dumps({"bytes": traffic, "parameters": parameters}), flush=True)


if __name__ == "__main__":
    main()
