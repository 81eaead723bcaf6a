# %% [markdown]
# # Three optimizers in the service
#
# Four workers (threads of this notebook) train a softmax regression on handwritten digits. They only compute gradients;
# the step is the service's: by SGD with momentum, by Adam and by Lion. To be run cell by cell in a notebook, or as
# `python examples/curves.py curves.png`.

# %%
import sys
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy
from digits import batch, load

import thalweg

WORKERS, STEPS = 4, 60
images, labels, test_images, test_labels = load()


# %%
def loss_and_gradient(parameters: dict, images: numpy.ndarray, labels: numpy.ndarray) -> tuple[float, dict]:
    """Mean cross-entropy, and what it grows by."""
    logits = images @ parameters["weight"] + parameters["bias"]
    logits -= logits.max(axis=1, keepdims=True)
    chances = numpy.exp(logits) / numpy.exp(logits).sum(axis=1, keepdims=True)
    loss = -numpy.log(chances[numpy.arange(len(labels)), labels]).mean()
    chances[numpy.arange(len(labels)), labels] -= 1
    chances /= numpy.float32(len(labels))
    return float(loss), {"weight": images.T @ chances, "bias": chances.sum(axis=0)}


def train(rank: int, name: str, settings: dict) -> list[float]:
    """One worker; gives the loss on the test images after each round."""
    start = {"weight": numpy.zeros((64, 10), numpy.float32), "bias": numpy.zeros(10, numpy.float32)}
    losses = []
    with thalweg.Job(
        f"curves-{name}", rank=rank, workers=WORKERS, function=name, settings=settings, initial=start
    ) as job:
        parameters = start
        for step in range(STEPS):
            mine = batch(step, 128, rank, WORKERS, len(images))
            _, gradient = loss_and_gradient(parameters, images[mine], labels[mine])
            parameters = job.push_pull(gradient)
            losses.append(loss_and_gradient(parameters, test_images, test_labels)[0])
    return losses


# %%
curves = {}
with thalweg.up():
    for name, settings in {
        "sgd": {"lr": 0.5, "momentum": 0.9},
        "adam": {"lr": 0.05},
        "lion": {"lr": 0.01},
    }.items():
        with ThreadPoolExecutor(WORKERS) as pool:
            of_workers = list(pool.map(lambda rank: train(rank, name, settings), range(WORKERS)))
        assert all(losses == of_workers[0] for losses in of_workers), "every worker has the same bits"
        curves[name] = of_workers[0]

# %%
if len(sys.argv) > 1:
    matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402

figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
for name, losses in curves.items():
    axes.plot(range(1, STEPS + 1), losses, label=f"{name}: {losses[-1]:.2f}")
axes.set(xlabel="round", ylabel="loss on test images (nats)", yscale="log")
axes.legend()
if len(sys.argv) > 1:
    figure.savefig(sys.argv[1], dpi=120)
    print({name: [losses[0], losses[-1]] for name, losses in curves.items()})
else:
    pyplot.show()
