"""DiLoCo against synchronous training: the same tokens, and how good the model is then.

Trains `examples/characters_diloco.py` with several learning rates and seeds, on a service of its own. What synchronous
workers do is reckoned in one process without the service, from the same batches (`--mode alone`), which takes half of the
time; one such run is made by workers through the service as well, for its bytes and to see that it ends with the same loss.
Prints a line of JSON for each run, then one with the comparison: the mean loss over the seeds of DiLoCo's best learning
rate over that of the best of synchronous training, the ratio of bytes, and by how much the two ways of synchronous
training differ. `--plot FILE` draws the curves. With `--runs FILE` the lines of the runs go there too, and what that file has already
is not trained again.

    make diloco                                                # about an hour on two cores
    make diloco ARGS="--steps 100 --width 32 --layers 1 --rates 0.01 --diloco-rates 0.01 --seeds 1"
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

NAMES = {"alone": "synchronous", "diloco": "DiLoCo"}
#: What makes two runs comparable.
SETTINGS = ("workers", "steps", "batch", "every", "validate", "width", "layers")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "characters_diloco.py"


def start(arguments: argparse.Namespace, mode: str, rate: float, seed: int) -> list[subprocess.Popen[str]]:
    """The processes of one training run."""
    options = {"mode": mode, "lr": rate, "seed": seed, "steps": arguments.steps}
    options |= {key: getattr(arguments, key) for key in ("batch", "every", "validate", "width", "layers")}
    command = [arguments.python, str(EXAMPLE), *(f"--{key}={value}" for key, value in options.items())]
    job = f"{mode}-{rate}-{seed}".replace(".", "-")
    environment = {**os.environ, "WORLD_SIZE": str(arguments.workers), "THALWEG_JOB": job}
    # A worker is one thread; OpenBLAS's threads are its own, whatever PyTorch is told.
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(1 if mode == "alone" else arguments.workers)
    ]


def finish(
    arguments: argparse.Namespace, processes: list[subprocess.Popen[str]], mode: str, rate: float, seed: int
) -> dict[str, Any]:
    """Curve of (tokens, loss), and bytes of rank 0."""
    output = [process.communicate()[0] for process in processes][0]
    if any(process.returncode for process in processes):
        raise SystemExit(f"a worker of {mode}, rate {rate}, seed {seed} failed")
    *progress, end = [json.loads(line) for line in output.splitlines()]
    curve = [(line["tokens"], line["loss"]) for line in progress]
    options = {"mode": mode, "lr": rate, "seed": seed}
    options |= {key: getattr(arguments, key) for key in SETTINGS}
    return {**options, "loss": curve[-1][1], "curve": curve, **end}


def same(done: dict[str, Any], arguments: argparse.Namespace, mode: str, rate: float, seed: int) -> bool:
    """Whether a run is this one."""
    wanted = {"mode": mode, "lr": rate, "seed": seed}
    wanted |= {key: getattr(arguments, key) for key in SETTINGS}
    return all(done.get(key) == value for key, value in wanted.items())


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
            axes.plot(*zip(*done["curve"]), color=colour, label=f"{NAMES[mode]}, lr {rate}" if place == 0 else None)
    axes.set(xlabel="tokens, all workers", ylabel="validation loss (nats per character)")
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="a Python with PyTorch")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--validate", type=int, default=200, help="steps between validations; the last is what counts")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--diloco-rates", type=float, nargs="+", default=[2e-3], help="of DiLoCo's workers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, help="file for the lines of the runs, and of those that were made before")
    parser.add_argument("--plot", help="file for the curves (.png, .svg)")
    arguments = parser.parse_args()
    before = arguments.runs.read_text().splitlines() if arguments.runs and arguments.runs.exists() else []
    before, runs = [json.loads(line) for line in before], []
    rates = {"diloco": arguments.diloco_rates, "alone": arguments.rates}
    # Seed after seed, so that one that is stopped early has something to say.
    plan = [(mode, rate, seed) for seed in range(arguments.seeds) for mode in rates for rate in rates[mode]]
    plan.append(("synchronous", arguments.rates[0], 0))
    with thalweg.up():
        while plan:
            each = plan.pop(0)
            done = next((line for line in before if same(line, arguments, *each)), None)
            if done is None:
                together = [(each, start(arguments, *each))]
                # One process leaves a core idle.
                if each[0] == "alone":
                    others = [other for other in plan if other[0] == "alone"]
                    others = [other for other in others if not any(same(line, arguments, *other) for line in before)]
                    for other in others[: arguments.workers - 1]:
                        together.append((other, start(arguments, *other)))
                for which, processes in together:
                    before.append(finish(arguments, processes, *which))
                    if arguments.runs:
                        with arguments.runs.open("a") as file:
                            print(json.dumps(before[-1]), file=file)
                done = next(line for line in before if same(line, arguments, *each))
            runs.append(done)
            print(json.dumps(done), flush=True)
    (rate, loss), (base_rate, base) = best(runs, "diloco"), best(runs, "alone")
    through = runs[-1]
    same_run = next(done for done in runs if (done["mode"], done["lr"], done["seed"]) == ("alone", through["lr"], 0))
    bytes_of_diloco = next(done["bytes"] for done in runs if done["mode"] == "diloco")
    report = {
        "loss_ratio": loss / base,
        "bytes_ratio": through["bytes"] / bytes_of_diloco,
        "synchronous_over_alone": through["loss"] / same_run["loss"],
    }
    print(json.dumps({**report, "diloco": [rate, loss], "synchronous": [base_rate, base]}))
    if arguments.plot:
        plot(runs, {"alone": base_rate, "diloco": rate}, arguments.plot)


if __name__ == "__main__":
    main()
