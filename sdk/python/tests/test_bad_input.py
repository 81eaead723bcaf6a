"""What callers get wrong, and what they are told."""

from __future__ import annotations

import pickle
import socket
import time
from typing import Any

import numpy
import pytest
import thalweg
from thalweg import errors


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (numpy.zeros(2), "float64.*astype"),
        (numpy.zeros(2, numpy.int32), "int32"),
        (numpy.zeros(2, ">f4"), ">f4"),
        (1.5, "numpy.float32"),
        (None, "zeros"),
        ("text", "str"),
        (object(), "no tensor"),
        ({}, "no tensors"),
        ([], "no tensors"),
        ({"a": ()}, "no tensors"),
        ({"a.b": numpy.zeros(1, numpy.float32), "a": {"b": numpy.zeros(1, numpy.float32)}}, "two leaves.*a.b"),
        ({"x" * 300: numpy.zeros(1, numpy.float32)}, "256"),
        (numpy.zeros((0, 3), numpy.float32), "empty|element"),
    ],
)
def test_what_is_no_tree_of_tensors_is_refused(service: thalweg.up, name: str, value: Any, told: str) -> None:
    with pytest.raises(errors.ThalwegError, match=told) as raised:
        thalweg.Job(name).push_pull(value)
    assert isinstance(raised.value, errors.BadInputError | errors.RefusedError)


def test_shapes_and_names_stay_the_same(service: thalweg.up, name: str) -> None:
    job = thalweg.Job(name)
    tree = {"a": numpy.zeros((2, 3), numpy.float32), "b": numpy.zeros(1, numpy.float32)}
    job.push_pull(tree)
    with pytest.raises(errors.ShapeError, match=r"'a'.*\(2, 3\) to \(3, 2\).*name="):
        job.push_pull({**tree, "a": numpy.zeros((3, 2), numpy.float32)})
    with pytest.raises(errors.UnknownTensorError, match="'c'"):
        job.push_pull({**tree, "c": numpy.zeros(1, numpy.float32)})
    with pytest.raises(errors.ShapeError, match="'b'.*missing"):
        job.push_pull({"a": tree["a"]})
    # Nothing of it was sent: the job goes on.
    assert job.push_pull_async(tree).round.number == 2


def test_workers_that_disagree_are_told(service: thalweg.up, name: str) -> None:
    job = thalweg.Job(name, like=numpy.zeros(3, numpy.float32))
    with pytest.raises(errors.RefusedError, match="tensor") as raised:
        thalweg.Job(name, rank=1, like=numpy.zeros(4, numpy.float32))
    assert raised.value.code == "spec_mismatch"
    job.leave()


@pytest.mark.parametrize("wrong", [{"function": "median"}, {"function": "sgd", "settings": {"rate": 1}}])
def test_functions_and_settings_that_are_not_there_are_refused(
    service: thalweg.up, name: str, wrong: dict[str, Any]
) -> None:
    with pytest.raises(errors.RefusedError) as raised:
        thalweg.Job(name, initial=numpy.zeros(1, numpy.float32), **wrong)
    assert raised.value.code == "invalid_spec"


@pytest.mark.parametrize("name", ["", "é", "x" * 65])
def test_names_that_cannot_be_used_are_refused(service: thalweg.up, name: str) -> None:
    with pytest.raises(errors.BadInputError, match="a-z"):
        thalweg.Job(name)


def test_no_service_is_told_in_time_and_by_its_url() -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(errors.ConnectError, match=url) as raised:
        thalweg.init(url, connect_timeout=0.5)
    assert time.monotonic() - began < 3
    assert "python -m thalweg up" in str(raised.value) and isinstance(raised.value, ConnectionError)


@pytest.mark.parametrize("url", ["nats://", "http://127.0.0.1:1", "nats://127.0.0.1:port"])
def test_a_url_that_cannot_be_used_is_told(url: str) -> None:
    with pytest.raises(errors.ConnectError):
        thalweg.init(url, connect_timeout=0.5)


def test_after_leaving_nothing_goes(service: thalweg.up, name: str) -> None:
    job = thalweg.Job(name)
    job.push_pull(numpy.zeros(1, numpy.float32))
    job.leave()
    job.leave()
    with pytest.raises(errors.LeftError, match="make another Job"):
        job.push_pull(numpy.zeros(1, numpy.float32))


def test_a_rank_is_one_workers(service: thalweg.up, name: str) -> None:
    with thalweg.Job(name, like=numpy.zeros(1, numpy.float32)) as job:
        with pytest.raises(errors.ThalwegError) as raised:
            thalweg.Job(name, like=numpy.zeros(1, numpy.float32), timeout=1)
        # It waits a while for the rank to fall back.
        assert isinstance(raised.value, errors.TimedOutError) or raised.value.code == "rank_taken"  # type: ignore[attr-defined]
        job.push_pull(numpy.zeros(1, numpy.float32))


def test_a_job_that_is_removed_is_told(service: thalweg.up, name: str) -> None:
    job = thalweg.Job(name, like=numpy.zeros(1, numpy.float32))
    thalweg.delete(name)
    with pytest.raises(errors.RefusedError) as raised:
        while True:
            job.push_pull(numpy.zeros(1, numpy.float32))
    assert raised.value.code == "gone"
    assert pickle.loads(pickle.dumps(raised.value)).code == "gone"


def test_objects_are_small_and_of_json(service: thalweg.up, name: str) -> None:
    thalweg.init(job=name)
    with pytest.raises(errors.BadInputError, match="JSON"):
        thalweg.broadcast_object({1, 2})
    with pytest.raises(errors.BadInputError, match="broadcast_parameters|at most"):
        thalweg.broadcast_object("x" * 70_000)
    with pytest.raises(errors.BadInputError, match="numbers"):
        thalweg.broadcast_parameters({"x": numpy.array(["text"])})


def test_exceptions_are_also_pythons() -> None:
    assert issubclass(errors.TimedOutError, TimeoutError)
    assert issubclass(errors.BadInputError, ValueError)
    assert issubclass(errors.FileError, OSError)
