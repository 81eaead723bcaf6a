"""JAX: pytrees, jitted steps, Optax."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed here; it is in the environment of `make python`")

import jax.numpy as jnp  # noqa: E402
import numpy  # noqa: E402
import optax  # noqa: E402
import thalweg  # noqa: E402
import thalweg.jax  # noqa: E402
from conftest import run_workers  # noqa: E402
from thalweg import errors  # noqa: E402

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


class Layer(NamedTuple):
    weight: Any
    bias: Any


def test_pytrees_keep_their_form_and_types(service: thalweg.up, name: str) -> None:
    thalweg.init(job=name)
    tree = {"a": [Layer(jnp.ones((2, 3)), jnp.zeros(3, jnp.bfloat16))], "b": (jnp.float32(2.5), None)}
    got = thalweg.jax.push_pull(tree)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all() and x.dtype == y.dtype, got, tree))
    assert list(thalweg.default_job().tensors) == ["a.0.weight", "a.0.bias", "b.0"]
    assert thalweg.jax.push_pull(jnp.ones(3), "single").tolist() == [1, 1, 1]


def test_wrong_trees_are_told_before_anything_is_sent(service: thalweg.up, name: str) -> None:
    thalweg.init(job=name)
    for call in (thalweg.jax.push_pull, jax.jit(thalweg.jax.push_pull)):
        with pytest.raises(errors.BadInputError, match="int32"):
            call({"x": jnp.arange(3)})
        with pytest.raises(errors.BadInputError, match="no arrays"):
            call({})
    assert name not in thalweg.jobs()


def test_inside_jit_each_run_is_a_round(service: thalweg.up, name: str) -> None:
    code = """
import sys, jax, jax.numpy as jnp, thalweg, thalweg.jax
thalweg.init(job=sys.argv[1])
@jax.jit
def step(x):
    return thalweg.jax.push_pull({"x": x * 2})["x"] + 1
# Large, so that JAX does not copy it on the side.
x = jnp.full(3_000_000, thalweg.rank() + 1.0)
got = [float(step(x * factor)[-1]) for factor in (1, 2, 3)]
report([got, thalweg.default_job().last_round.number])
"""
    assert run_workers(2, code, name) == [[[4.0, 7.0, 10.0], 3]] * 2


def test_errors_inside_jit_are_told(service: thalweg.up, name: str) -> None:
    thalweg.init(job=name)
    step = jax.jit(thalweg.jax.push_pull)
    step(jnp.ones(2)).block_until_ready()
    with pytest.raises(Exception, match=r"ShapeError.*\(2,\) to \(3,\)"):
        jax.block_until_ready(step(jnp.ones(3)))
        jax.effects_barrier()


def test_optax_steps_as_in_one_process(service: thalweg.up, name: str) -> None:
    code = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy, jax, optax, thalweg, thalweg.jax
from test_jax import train
thalweg.init(job=sys.argv[1])
rank = thalweg.rank()
optimizer = optax.chain(thalweg.jax.average_gradients(), optax.clip_by_global_norm(0.5), optax.adamw(0.01))
report(numpy.asarray(train(optimizer, [rank])).tolist())
"""
    one, two = run_workers(2, code, name, str(Path(__file__).parent))
    assert one == two
    alone = train(optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.01)), [0, 1])
    numpy.testing.assert_allclose(one, alone, rtol=1e-4, atol=1e-6)


def train(optimizer: Any, ranks: list[int]) -> Any:
    """Six jitted steps on the batches of these ranks."""

    def loss(weight: Any, inputs: Any, targets: Any) -> Any:
        return ((inputs @ weight - targets) ** 2).mean()

    @jax.jit
    def step(weight: Any, state: Any, batches: Any) -> Any:
        gradients = [jax.grad(loss)(weight, *batch) for batch in batches]
        updates, state = optimizer.update(sum(gradients) / len(gradients), state, weight)
        return optax.apply_updates(weight, updates), state

    weight = jnp.zeros((4, 2))
    state = optimizer.init(weight)
    for number in range(6):
        randoms = [numpy.random.default_rng([number, rank]) for rank in ranks]
        batches = [(random.normal(size=(8, 4)), random.normal(size=(8, 2))) for random in randoms]
        weight, state = step(weight, state, batches)
    return weight


def test_the_example_learns(service: thalweg.up, name: str) -> None:
    code = """
import io, json, runpy, sys, contextlib
sys.path.insert(0, sys.argv[1])
script = sys.argv[1] + "/digits_jax.py"
sys.argv[1:] = ["--steps", "150"]
with contextlib.redirect_stdout(io.StringIO()) as printed:
    runpy.run_path(script, run_name="__main__")
report(json.loads(printed.getvalue().splitlines()[-1]))
"""
    one, two = run_workers(2, code, str(EXAMPLES), THALWEG_JOB=name)
    assert one == two and one["accuracy"] > 0.9
