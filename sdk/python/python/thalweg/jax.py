"""Thalweg for JAX: rounds on pytrees, inside of jitted functions too, and as a gradient transformation of Optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy
from jax.experimental import io_callback

from . import _session
from ._tree import ROOT, Ordered
from .errors import BadInputError

_TYPES = (jnp.float32, jnp.float16, jnp.bfloat16)


def push_pull(tree: Any, name: str | None = None) -> Any:
    """A round on a pytree of arrays: what the function (`mean` by default) makes of all workers' trees.

    Works inside of `jit`, where it takes place in order with other side effects, once for each time that the compiled
    function runs. Not inside of `vmap`, `grad` or loops of JAX's whose length workers do not agree on.

    Args:
        tree: float32, float16 or bfloat16. One name means one set of arrays, with the same shapes in every round.
        name: Of the job `<job>-<name>`; the job of `thalweg.init` itself if None.

    Raises:
        BadInputError: no arrays, or of another type. What goes wrong while a jitted function runs is JAX's
            `JaxRuntimeError`, with the exception of Thalweg in its text.
    """
    leaves, form = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") or ROOT for path, _ in leaves]
    values = [jnp.asarray(leaf) for _, leaf in leaves]
    if not values:
        raise BadInputError("the tree has no arrays: a job needs at least one")
    for key, value in zip(names, values, strict=True):
        if value.dtype not in _TYPES:
            raise BadInputError(
                f"array {key!r} is {value.dtype}: Thalweg aggregates in float32 and takes float32, float16 and "
                "bfloat16; pass x.astype(jnp.float32)"
            )

    def round(*arrays: Any) -> list[Any]:
        pushed = Ordered((key, numpy.asarray(array)) for key, array in zip(names, arrays, strict=True))
        got = _session.push_pull(pushed, name)
        return [got[key] for key in names]

    if any(isinstance(value, jax.core.Tracer) for value in values):
        shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values]  # type: ignore[no-untyped-call]
        results = io_callback(round, shapes, *values, ordered=True)
    else:
        results = [jnp.asarray(result) for result in round(*values)]
    return jax.tree_util.tree_unflatten(form, results)


def average_gradients(name: str | None = None) -> Any:
    """An Optax `GradientTransformation` that puts the mean over all workers in the place of the gradients:
    `optax.chain(thalweg.jax.average_gradients(), optax.adam(1e-3))`.

    Args:
        name: As for `push_pull`. With a job of the function `sum` it is the sum, and so on.
    """
    import optax

    def init(_: Any) -> Any:
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        return push_pull(updates, name), state

    return optax.GradientTransformation(init, update)
