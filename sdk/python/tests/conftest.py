"""A real service for the tests, and workers in it: as threads of this process, or as processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import thalweg

#: Longest wait for anything, seconds.
PATIENCE = 60.0
T = TypeVar("T")
_numbers = itertools.count()


@pytest.fixture(scope="session")
def service() -> Iterator[thalweg.up]:
    """One service for all tests that do not hurt it."""
    with thalweg.up() as running:
        yield running


@pytest.fixture
def name() -> str:
    """A name that no other test uses."""
    return f"test-{next(_numbers)}"


@pytest.fixture(autouse=True)
def _left() -> Iterator[None]:
    yield
    thalweg.shutdown()


def together(workers: Sequence[T], call: Callable[[T], Any]) -> list[Any]:
    """What `call` gives for each worker, all at once."""
    with ThreadPoolExecutor(len(workers)) as pool:
        return list(pool.map(call, workers))


def eventually(what: str, done: Callable[[], bool]) -> None:
    """Waits until `done` says so."""
    until = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < until, f"waited too long for {what}"
        time.sleep(0.01)


class Workers:
    """Python processes, one for each rank; each runs `code` with `report(value)` to answer by."""

    def __init__(self, count: int, code: str, *arguments: str, **environment: str) -> None:
        prelude = "import json, sys\ndef report(value): print(json.dumps(value), flush=True)\n"
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", prelude + code, *arguments],
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]

    def results(self) -> list[Any]:
        """What each has reported last, once all have ended well."""
        with ThreadPoolExecutor(len(self.processes)) as pool:
            outputs = list(pool.map(lambda process: process.communicate(timeout=PATIENCE), self.processes))
        for process, (_, errors) in zip(self.processes, outputs):
            assert process.returncode == 0, errors
        return [json.loads(output.splitlines()[-1]) for output, _ in outputs]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()


def run_workers(count: int, code: str, *arguments: str, **environment: str) -> list[Any]:
    """Runs one process for each rank and gives what they report."""
    with Workers(count, code, *arguments, **environment) as workers:
        return workers.results()
