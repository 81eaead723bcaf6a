"""DistributedDataParallel, with its gradients averaged by Thalweg instead of Gloo.

    python -m thalweg up                                       # in another terminal
    torchrun --standalone --nproc-per-node 4 examples/digits_ddp.py

torchrun of PyTorch 1.13 does not start under Python 3.11; there, start each worker by itself with `RANK`, `WORLD_SIZE`,
`MASTER_ADDR` and `MASTER_PORT` set. `--through gloo` does the same without Thalweg. The three lines that differ from a plain loop are marked.
"""

from __future__ import annotations

import argparse
import json

import numpy
import torch
from digits import batch, from_environment, load, torch_model
from torch.nn.parallel import DistributedDataParallel

import thalweg.torch  # 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["mlp", "cnn"], default="mlp")
    parser.add_argument("--through", choices=["thalweg", "gloo"], default="thalweg")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--meet", default="env://", help="where PyTorch's processes find each other")
    parser.add_argument("--record", help="file for rank 0's parameters after each of the first 20 steps (.npy)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rank, workers = from_environment()
    torch.distributed.init_process_group("gloo", init_method=arguments.meet, rank=rank, world_size=workers)

    model = torch_model(arguments.model)
    ddp = DistributedDataParallel(model)
    if arguments.through == "thalweg":
        state = thalweg.torch.state()  # 2
        ddp.register_comm_hook(state, thalweg.torch.hook)  # 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels, test_images, test_labels = map(torch.from_numpy, load())
    recorded = []
    for step in range(arguments.steps):
        mine = batch(step, 128, rank, workers, len(images))
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(ddp(images[mine]), labels[mine])
        loss.backward()
        optimizer.step()
        if step < 20:
            recorded.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy())
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    if rank == 0:
        print(json.dumps({"accuracy": accuracy, "loss": loss.item()}), flush=True)
        if arguments.record:
            numpy.save(arguments.record, numpy.stack(recorded))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
