"""AdamW in the service: workers push gradients and pull parameters, and may come and go.

    python -m thalweg up                                       # in another terminal
    torchrun --standalone --nproc-per-node 4 examples/digits_server.py

Kill one of the workers: the others go on when its lease has ended (10 s). Start another one with a rank that is free:

    RANK=4 WORLD_SIZE=4 THALWEG_JOB=<as before> python examples/digits_server.py

It begins with the service's parameters. Every worker prints a line of JSON for each of its steps.
"""

from __future__ import annotations

import argparse
import json

import torch
from digits import batch, from_environment, load, torch_model

import thalweg.torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["mlp", "cnn"], default="mlp")
    parser.add_argument("--rounds", type=int, default=200, help="train until this round")
    parser.add_argument("--pace", type=float, default=0, help="seconds to wait in each step, to watch it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rank, workers = from_environment()

    thalweg.init()
    # What rank 0 begins with; the others, and who joins later, take the service's.
    model = torch_model(arguments.model, seed=rank)
    optimizer = thalweg.torch.ServerOptimizer(
        model.parameters(), "adamw", named_parameters=model.named_parameters(), lr=3e-3
    )
    images, labels, test_images, test_labels = map(torch.from_numpy, load())
    step = done = 0
    while done < arguments.rounds:
        mine = batch(step, 128, rank % workers, workers, len(images))
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[mine]), labels[mine])
        loss.backward()
        optimizer.step()
        step, done = step + 1, optimizer.job.last_round.number
        print(json.dumps({"round": done, "contributors": optimizer.contributors, "loss": loss.item()}), flush=True)
        if arguments.pace:
            import time

            time.sleep(arguments.pace)
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    print(json.dumps({"round": done, "accuracy": accuracy, "model": [float(p.sum()) for p in model.parameters()]}))


if __name__ == "__main__":
    main()
