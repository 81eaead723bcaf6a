"""Optimizers that run in the service, and their state in files."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import safetensors.numpy
import thalweg
from conftest import together
from thalweg import errors


def adam(parameters: numpy.ndarray, gradients: list[numpy.ndarray], lr: float) -> numpy.ndarray:
    """Adam in float64, as PyTorch defines it."""
    p, m, v = parameters.astype(numpy.float64), 0.0, 0.0
    for step, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p -= lr * (m / (1 - 0.9**step)) / (numpy.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return p


def test_an_optimizer_steps_in_the_service(service: thalweg.up, name: str) -> None:
    start = {"w": numpy.float32([[1, 2], [3, 4]])}
    random = numpy.random.default_rng(1)
    gradients = [random.normal(size=(2, 2, 2)).astype(numpy.float32) for _ in range(5)]

    def train(rank: int) -> numpy.ndarray:
        with thalweg.Job(name, rank=rank, workers=2, function="adam", settings={"lr": 0.1}, initial=start) as job:
            numpy.testing.assert_array_equal(job.parameters()["w"], start["w"])
            for gradient in gradients:
                got = job.push_pull({"w": gradient[rank]})
            return got["w"]

    one, two = together([0, 1], train)
    numpy.testing.assert_array_equal(one, two)
    expected = adam(start["w"], [gradient.mean(axis=0, dtype=numpy.float64) for gradient in gradients], 0.1)
    numpy.testing.assert_allclose(one, expected, rtol=1e-5)


def test_groups_and_changes_of_settings(service: thalweg.up, name: str) -> None:
    start = {"a": numpy.zeros(1, numpy.float32), "b": numpy.zeros(1, numpy.float32)}
    ones = {key: numpy.ones(1, numpy.float32) for key in start}
    groups = [thalweg.Group(["b"], {"lr": 0.5})]
    with thalweg.Job(name, function="sgd", settings={"lr": 1.0}, groups=groups, initial=start) as job:
        got = job.push_pull(ones)
        assert (got["a"][0], got["b"][0]) == (-1.0, -0.5)
        from_round = max(job.set(lr=2.0), job.set_group(0, lr=0.25))
        while (handle := job.push_pull_async(ones)).round.number < from_round:
            got = handle.wait()
        after = handle.wait()
        assert (after["a"][0] - got["a"][0], after["b"][0] - got["b"][0]) == (-2.0, -0.25)
        assert handle.round.settings_revision > 0


def test_a_schedule(service: thalweg.up, name: str) -> None:
    schedule = {"warmup_rounds": 2, "decay": "constant"}
    start = numpy.zeros(1, numpy.float32)
    with thalweg.Job(name, function="sgd", settings={"lr": 1.0}, schedule=schedule, initial=start) as job:
        values = [float(job.push_pull(numpy.ones(1, numpy.float32))[0]) for _ in range(3)]
    assert values == [-0.5, -1.5, -2.5]


def test_snapshots_go_to_files_and_back(
    service: thalweg.up, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    start = {"w": numpy.arange(6, dtype=numpy.float32).reshape(2, 3), "b": numpy.ones(2, numpy.float32)}
    gradient = {key: numpy.full(value.shape, 0.5, numpy.float32) for key, value in start.items()}
    settings = {"lr": 0.1, "momentum": 0.9}
    with thalweg.Job(name, function="sgd", settings=settings, initial=start) as job:
        third = [job.push_pull(gradient) for _ in range(3)][-1]
        assert job.snapshot(path, progress=True) == 3
        assert f"snapshot of {name}: 100%" in capsys.readouterr().err
        fourth = job.push_pull(gradient)
    stored = safetensors.numpy.load_file(path)
    numpy.testing.assert_array_equal(stored["w"], third["w"])
    # The optimizer's state goes along: the next step is the same, bit for bit.
    assert thalweg.restore(path, f"{name}-again", progress=True) == f"{name}-again"
    with thalweg.Job(f"{name}-again", function="sgd", settings=settings, like=start) as job:
        numpy.testing.assert_array_equal(job.parameters()["b"], third["b"])
        handle = job.push_pull_async(gradient)
        numpy.testing.assert_array_equal(handle.wait()["w"], fourth["w"])
        assert handle.round.number == 4
    with pytest.raises(errors.RefusedError) as raised:
        thalweg.restore(path, name)
    assert raised.value.code == "spec_mismatch"


def test_files_that_are_not_there_are_told(service: thalweg.up, name: str, tmp_path: Path) -> None:
    with pytest.raises(errors.FileError, match="nowhere"):
        thalweg.restore(tmp_path / "nowhere.safetensors")
    start = numpy.zeros(1, numpy.float32)
    with thalweg.Job(name, function="sgd", settings={"lr": 1.0}, initial=start) as job:
        with pytest.raises(errors.FileError):
            job.snapshot(tmp_path / "no" / "such" / "directory")


def test_who_joins_later_starts_from_the_services_parameters(service: thalweg.up, name: str) -> None:
    start = numpy.zeros(2, numpy.float32)
    options = {"function": "sgd", "settings": {"lr": 1.0}}
    one = thalweg.Job(name, rank=0, workers=1, initial=start, **options)  # type: ignore[arg-type]
    for _ in range(3):
        latest = one.push_pull(numpy.ones(2, numpy.float32))
    one.leave()
    other = thalweg.Job(name, rank=1, workers=1, like=start, **options)  # type: ignore[arg-type]
    numpy.testing.assert_array_equal(other.parameters()["value"], latest)
    assert other.push_pull_async(numpy.ones(2, numpy.float32)).round.number == 4
    other.leave()
