"""JAX and Optax: the gradients of a jitted step are averaged by Thalweg.

    python -m thalweg up                                       # in another terminal
    RANK=0 WORLD_SIZE=2 python examples/digits_jax.py & RANK=1 WORLD_SIZE=2 python examples/digits_jax.py

Prints a line of JSON with the accuracy on images that it was not trained with.
"""

from __future__ import annotations

import argparse
import json

import jax
import jax.numpy as jnp
import optax
from digits import batch, from_environment, load

import thalweg.jax


def logits(parameters, images):  # type: ignore[no-untyped-def]
    hidden = jax.nn.relu(images @ parameters["hidden"]["weight"] + parameters["hidden"]["bias"])
    return hidden @ parameters["out"]["weight"] + parameters["out"]["bias"]


def loss(parameters, images, labels):  # type: ignore[no-untyped-def]
    return optax.softmax_cross_entropy_with_integer_labels(logits(parameters, images), labels).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    rank, workers = from_environment()

    thalweg.init()
    one, two = jax.random.split(jax.random.key(0))
    parameters = {
        "hidden": {"weight": jax.random.normal(one, (64, 64)) / 8, "bias": jnp.zeros(64)},
        "out": {"weight": jax.random.normal(two, (64, 10)) / 8, "bias": jnp.zeros(10)},
    }
    optimizer = optax.chain(thalweg.jax.average_gradients(), optax.adam(3e-3))
    state = optimizer.init(parameters)

    @jax.jit
    def step(parameters, state, images, labels):  # type: ignore[no-untyped-def]
        gradients = jax.grad(loss)(parameters, images, labels)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state

    images, labels, test_images, test_labels = load()
    for number in range(arguments.steps):
        mine = batch(number, 128, rank, workers, len(images))
        parameters, state = step(parameters, state, images[mine], labels[mine])
    accuracy = float((logits(parameters, test_images).argmax(1) == test_labels).mean())
    sums = [float(leaf.sum()) for leaf in jax.tree.leaves(parameters)]
    print(json.dumps({"accuracy": accuracy, "parameters": sums}), flush=True)


if __name__ == "__main__":
    main()
