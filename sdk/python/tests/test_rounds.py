"""Pushing and pulling: what goes in, what comes out."""

from __future__ import annotations

import array
import asyncio
import collections
import logging
from typing import Any

import numpy
import pytest
import thalweg
from conftest import eventually, run_workers, together

Pair = collections.namedtuple("Pair", "left right")


def jobs(name: str, count: int, **options: Any) -> list[thalweg.Job]:
    return [thalweg.Job(name, rank=rank, workers=count, **options) for rank in range(count)]


def test_processes_find_each_other_by_their_environment(service: thalweg.up, name: str) -> None:
    code = """
import numpy, sys, thalweg
thalweg.init(job=sys.argv[1])
values = numpy.arange(5, dtype=numpy.float32) * (thalweg.rank() + 1)
report([thalweg.push_pull(values).tolist(), thalweg.rank(), thalweg.size()])
"""
    results = run_workers(3, code, name)
    assert [rank for _, rank, _ in results] == [0, 1, 2]
    for mean, _, size in results:
        assert mean == [0.0, 2.0, 4.0, 6.0, 8.0] and size == 3


def test_trees_keep_their_form(service: thalweg.up, name: str) -> None:
    tree = {
        "layers": [numpy.ones((2, 3), numpy.float32), (numpy.zeros(1, numpy.float32), numpy.float32(4))],
        "pair": Pair(numpy.full(2, 7, numpy.float32), numpy.full((1, 1), 8, numpy.float32)),
    }
    job = thalweg.Job(name)
    got = job.push_pull(tree)
    assert list(job.tensors) == ["layers.0", "layers.1.0", "layers.1.1", "pair.0", "pair.1"]
    assert isinstance(got["pair"], Pair) and isinstance(got["layers"][1], tuple)
    numpy.testing.assert_array_equal(got["layers"][0], tree["layers"][0])
    assert got["layers"][1][1].shape == () and got["layers"][1][1] == 4
    assert got["pair"].right.shape == (1, 1)
    job.leave()


def test_dicts_agree_whatever_their_order(service: thalweg.up, name: str) -> None:
    one, two = jobs(name, 2, function="sum")
    trees = {0: {"a": numpy.ones(2, numpy.float32), "b": numpy.zeros(1, numpy.float32)}}
    trees[1] = dict(reversed(trees[0].items()))
    got = together([one, two], lambda job: job.push_pull(trees[job.rank]))
    assert list(got[1]) == ["b", "a"]
    numpy.testing.assert_array_equal(got[1]["a"], [2, 2])


def test_buffers_of_any_kind_are_read(service: thalweg.up, name: str) -> None:
    class OnlyDLPack:
        def __init__(self, values: Any) -> None:
            self.values = values

        def __dlpack__(self, **options: Any) -> Any:
            return self.values.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self.values.__dlpack_device__()

    tree = {
        "array": array.array("f", [1.0, 2.0]),
        "bytes": memoryview(numpy.float32([3, 4])),
        "dlpack": OnlyDLPack(numpy.float32([5, 6])),
    }
    got = thalweg.Job(name).push_pull(tree)
    assert [list(got[key]) for key in tree] == [[1, 2], [3, 4], [5, 6]]


def test_halves_are_folded_in_float32(service: thalweg.up, name: str) -> None:
    # In float16 2048 + 1 is 2048 and stays so, whatever is added one at a time.
    values = [2048, 1, 1, 1]
    workers = jobs(name, 4, function="sum")
    got = together(workers, lambda job: job.push_pull(numpy.float16([values[job.rank]])))
    assert all(result.dtype == numpy.float16 for result in got)
    # 2051 lies between 2050 and 2052, which are neighbours: to even.
    assert [float(result[0]) for result in got] == [2052.0] * 4


def test_bfloat16_goes_in_and_out(service: thalweg.up, name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    workers = jobs(name, 3, function="sum")
    values = [256, 1, 1]
    got = together(workers, lambda job: job.push_pull(numpy.array([values[job.rank], 0.5], ml_dtypes.bfloat16)))
    assert got[0].dtype == ml_dtypes.bfloat16
    assert got[0].astype(numpy.float32).tolist() == [258.0, 1.5]


def test_arrays_that_are_not_in_order_are_read_in_theirs(service: thalweg.up, name: str) -> None:
    square = numpy.arange(12, dtype=numpy.float32).reshape(3, 4)
    got = thalweg.Job(name).push_pull({"t": square.T, "every": square[:, ::2], "wide": numpy.broadcast_to(square, (2, 3, 4))})
    numpy.testing.assert_array_equal(got["t"], square.T)
    numpy.testing.assert_array_equal(got["every"], square[:, ::2])
    assert got["wide"].shape == (2, 3, 4)


def test_what_was_pushed_may_be_changed_at_once(service: thalweg.up, name: str) -> None:
    job = thalweg.Job(name)
    values = numpy.ones(1000, numpy.float32)
    handle = job.push_pull_async(values)
    values[:] = 5
    assert handle.wait().tolist() == [1.0] * 1000
    assert values[0] == 5


def test_nan_reaches_every_worker(service: thalweg.up, name: str) -> None:
    workers = jobs(name, 2)
    got = together(workers, lambda job: job.push_pull(numpy.float32([numpy.nan if job.rank else 1, 2])))
    for result in got:
        assert numpy.isnan(result[0]) and result[1] == 2


def test_nan_is_void_for_an_optimizer(service: thalweg.up, name: str) -> None:
    def step(rank: int) -> Any:
        start = {"w": numpy.zeros(2, numpy.float32)}
        job = thalweg.Job(name, rank=rank, workers=2, function="sgd", settings={"lr": 1.0}, initial=start)
        return job.push_pull({"w": numpy.float32([numpy.nan if rank else 1, 2])})["w"].tolist()

    # The mean over the one contribution that adds something.
    assert together([0, 1], step) == [[-1, -2], [-1, -2]]


def test_weights_count(service: thalweg.up, name: str) -> None:
    workers = jobs(name, 2, function="weighted_mean")
    got = together(workers, lambda job: job.push_pull(numpy.float32([job.rank]), weight=1 + 2 * job.rank))
    assert [float(result[0]) for result in got] == [0.75, 0.75]


def test_handles_are_done_when_all_have_pushed(service: thalweg.up, name: str) -> None:
    workers = jobs(name, 2)
    together(workers, lambda job: job.push_pull(numpy.zeros(3, numpy.float32)))
    handle = workers[0].push_pull_async(numpy.float32([1, 2, 3]))
    assert not handle.poll()
    with pytest.raises(thalweg.errors.TimedOutError, match=r"round 2 .* the ranks \[0, 1\]"):
        handle.wait(timeout=0.05)
    other = workers[1].push_pull_async(numpy.float32([3, 2, 1]))
    eventually("the round to end", handle.poll)
    assert handle.wait().tolist() == [2, 2, 2]
    assert other.synchronize().tolist() == [2, 2, 2]
    assert handle.round.number == 2 and handle.round.contributors == 2 and handle.round.counted


def test_a_push_ends_the_round_before(service: thalweg.up, name: str) -> None:
    job = thalweg.Job(name)
    handles = [job.push_pull_async(numpy.float32([step])) for step in range(4)]
    assert [float(handle.wait()[0]) for handle in handles] == [0, 1, 2, 3]


def test_handles_can_be_awaited(service: thalweg.up, name: str) -> None:
    workers = jobs(name, 2)
    together(workers, lambda job: job.push_pull(numpy.zeros(1, numpy.float32)))

    async def both() -> list[float]:
        first = workers[0].push_pull_async(numpy.float32([1]))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(first._wait_in_loop(), 0.05)
        second = workers[1].push_pull_async(numpy.float32([3]))
        return [float(result[0]) for result in (await first, await second)]

    assert asyncio.run(both()) == [2, 2]


def test_leaving_does_not_wait_for_what_is_awaited(service: thalweg.up, name: str) -> None:
    workers = jobs(name, 2)
    together(workers, lambda job: job.push_pull(numpy.zeros(1, numpy.float32)))

    async def impatient() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(workers[0].push_pull_async(numpy.float32([1]))._wait_in_loop(), 0.05)

    asyncio.run(impatient())
    workers[0].leave()
    workers[1].leave()


def test_jobs_of_one_process_do_not_mix(service: thalweg.up, name: str) -> None:
    thalweg.init(job=name)
    first = thalweg.push_pull_async(numpy.float32([1, 2]))
    second = thalweg.push_pull_async(numpy.float32([3]), name="other")
    assert thalweg.synchronize(second).tolist() == [3]
    assert thalweg.synchronize(first).tolist() == [1, 2]
    assert {name, f"{name}-other"} <= set(thalweg.jobs())
    thalweg.shutdown()
    # A reduction that nobody is left in is gone, so that the next run begins afresh.
    assert not {name, f"{name}-other"} & set(thalweg.jobs())


def test_skipping_adds_nothing(service: thalweg.up, name: str) -> None:
    workers = jobs(name, 2)
    together(workers, lambda job: job.push_pull(numpy.zeros(2, numpy.float32)))
    got = together(
        workers,
        lambda job: job.skip().wait()["value"] if job.rank else job.push_pull(numpy.float32([4, 6])),
    )
    assert [result.tolist() for result in got] == [[4, 6], [4, 6]]


def test_changes_of_the_roster_are_told(service: thalweg.up, name: str) -> None:
    told: list[int] = []
    one = thalweg.Job(name, rank=0, workers=2, on_roster_change=lambda count, _: told.append(count))
    two = thalweg.Job(name, rank=1, workers=2)
    together([one, two], lambda job: job.push_pull(numpy.zeros(1, numpy.float32)))
    two.leave()
    while not told:
        one.push_pull(numpy.zeros(1, numpy.float32))
    assert told == [1] and one.contributors == 1


def test_logs_carry_rank_and_round(service: thalweg.up, name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "thalweg")
    job = thalweg.Job(name)
    job.push_pull(numpy.zeros(1, numpy.float32))
    job.push_pull(numpy.zeros(1, numpy.float32))
    done = [record for record in caplog.records if "done" in record.message]
    assert [(record.rank, record.round, record.job) for record in done] == [(0, 1, name), (0, 2, name)]  # type: ignore[attr-defined]
    assert done[1].message.startswith(f"[{name} rank 0 round 2]")


def test_waits_are_explained_in_the_log(service: thalweg.up, name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "thalweg")
    with pytest.raises(thalweg.errors.TimedOutError, match="the other workers"):
        thalweg.Job(name, workers=2, timeout=2.5).push_pull(numpy.zeros(1, numpy.float32))
    assert any("waiting for" in record.message for record in caplog.records)


@pytest.mark.parametrize("count", [3])
def test_broadcast_gives_what_the_root_has(service: thalweg.up, name: str, count: int) -> None:
    code = """
import numpy, sys, thalweg
thalweg.init(job=sys.argv[1])
mine = thalweg.rank() + 1
tree = {
    "f32": numpy.full((2, 2), mine / 3, numpy.float32), "f16": numpy.full(3, mine, numpy.float16),
    "f64": numpy.full(1, mine / 3), "i64": numpy.array([mine * 2**40, -mine]), "u8": numpy.full(3, mine, numpy.uint8),
    "bool": numpy.array([True, mine == 2]),
}
got = thalweg.broadcast_parameters(tree, root=1)
twice = thalweg.broadcast_parameters(tree, root=2)
state = thalweg.broadcast_object({"epoch": mine, "name": "é"}, root=1)
report([
    {key: [str(value.dtype), value.shape, value.tolist()] for key, value in got.items()},
    twice["i64"].tolist(), state,
])
"""
    results = run_workers(count, code, name)
    assert results[0] == results[1] == results[2]
    got, twice, state = results[0]
    assert got["f64"] == ["float64", [1], [2 / 3]]
    assert got["i64"] == ["int64", [2], [2 * 2**40, -2]]
    assert got["f32"][2] == numpy.full((2, 2), 2 / 3, numpy.float32).tolist()
    assert got["bool"] == ["bool", [2], [True, True]] and got["u8"] == ["uint8", [3], [2, 2, 2]]
    assert twice == [3 * 2**40, -3]
    assert state == {"epoch": 2, "name": "é"}


def test_one_process_may_broadcast_to_itself(service: thalweg.up, name: str) -> None:
    thalweg.init(job=name)
    assert thalweg.broadcast_object([1, None, "x"]) == [1, None, "x"]


def test_jobs_are_called_by_what_the_environment_says(monkeypatch: pytest.MonkeyPatch, service: thalweg.up) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "Run.7")
    thalweg.init()
    assert (thalweg.default_job().name, thalweg.rank(), thalweg.size()) == ("run-7", 3, 5)
    monkeypatch.setenv("THALWEG_JOB", "named")
    thalweg.init()
    assert thalweg.default_job("part").name == "named-part"


def test_all_may_leave_at_once(service: thalweg.up, name: str) -> None:
    for turn in range(5):
        workers = jobs(f"{name}-{turn}", 4)
        together(workers, lambda job: job.push_pull(numpy.zeros(1, numpy.float32)))
        together(workers, lambda job: job.leave())
    assert not [job for job in thalweg.jobs() if job.startswith(f"{name}-")]
