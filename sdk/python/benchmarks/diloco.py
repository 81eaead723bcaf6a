"""DiLoCo against synchronous training: the same tokens, and how good the model is then.

Trains `examples/characters_diloco.py` in both modes with several learning rates and seeds, one run after the other, on a
service of its own. Prints a line of JSON for each run, then one with the comparison: the mean loss over the seeds of
DiLoCo's best learning rate over that of the best of synchronous training, and the ratio of bytes. `--plot FILE` draws
the curves.

    make diloco                                                # hours, on a few cores
    make diloco ARGS="--steps 100 --width 32 --layers 1 --rates 0.01 --seeds 1"
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import thalweg

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "characters_diloco.py"


def run(arguments: argparse.Namespace, mode: str, rate: float, seed: int) -> dict[str, Any]:
    """One training run: curve of (tokens, loss), and bytes of rank 0."""
    options = {"mode": mode, "lr": rate, "seed": seed, "steps": arguments.steps}
    options |= {"batch": arguments.batch, "every": arguments.every, "width": arguments.width, "layers": arguments.layers}
    command = [arguments.python, str(EXAMPLE), *(f"--{key}={value}" for key, value in options.items())]
    job = f"{mode}-{rate}-{seed}".replace(".", "-")
    environment = {**os.environ, "WORLD_SIZE": str(arguments.workers), "THALWEG_JOB": job}
    # A worker is one thread; OpenBLAS's threads are its own, whatever PyTorch is told.
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(arguments.workers)
    ]
    output = [worker.communicate()[0] for worker in workers][0]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"a worker of {job} failed")
    *progress, end = [json.loads(line) for line in output.splitlines()]
    curve = [(line["tokens"], line["loss"]) for line in progress]
    return {"mode": mode, "lr": rate, "seed": seed, "loss": curve[-1][1], "curve": curve, **end}


def best(runs: list[dict[str, Any]], mode: str) -> tuple[float, float]:
    """(learning rate, mean loss over its seeds) of the best one."""
    losses = defaultdict(list)
    for done in runs:
        if done["mode"] == mode:
            losses[done["lr"]].append(done["loss"])
    return min(((rate, sum(each) / len(each)) for rate, each in losses.items()), key=lambda pair: pair[1])


def plot(runs: list[dict[str, Any]], rates: dict[str, float], file: str) -> None:
    """The curves of the best learning rate of each mode, a line for each seed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for colour, (mode, rate) in zip(["C0", "C1"], rates.items()):
        chosen = [done for done in runs if done["mode"] == mode and done["lr"] == rate]
        for place, done in enumerate(chosen):
            axes.plot(*zip(*done["curve"]), color=colour, label=f"{mode}, lr {rate}" if place == 0 else None)
    axes.set(xlabel="tokens, all workers", ylabel="validation loss (nats per character)")
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="a Python with PyTorch")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--diloco-rates", type=float, nargs="+", help="of DiLoCo; the same where not given")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", help="file for the curves (.png, .svg)")
    arguments = parser.parse_args()
    runs = []
    with thalweg.up():
        for mode, rates in (("diloco", arguments.diloco_rates or arguments.rates), ("synchronous", arguments.rates)):
            for rate in rates:
                for seed in range(arguments.seeds):
                    runs.append(run(arguments, mode, rate, seed))
                    print(json.dumps(runs[-1]), flush=True)
    (rate, loss), (base_rate, base) = best(runs, "diloco"), best(runs, "synchronous")
    sent = {done["mode"]: done["bytes"] for done in runs}
    report = {"loss_ratio": loss / base, "bytes_ratio": sent["synchronous"] / sent["diloco"]}
    print(json.dumps({**report, "diloco": [rate, loss], "synchronous": [base_rate, base]}))
    if arguments.plot:
        plot(runs, {"synchronous": base_rate, "diloco": rate}, arguments.plot)


if __name__ == "__main__":
    main()
