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
        self._command = [sys.executable, "-c", prelude + code, *arguments]
        self._environment = {**os.environ, "WORLD_SIZE": str(count), **environment}
        self.processes: list[subprocess.Popen[str]] = []
        for rank in range(count):
            self.start(rank)

    def start(self, rank: int) -> None:
        """Starts one more."""
        process = subprocess.Popen(
            self._command,
            env={**self._environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)

    def results(self, but: int | None = None) -> list[Any]:
        """What each has reported last, once all have ended well, but for one that was killed."""
        with ThreadPoolExecutor(len(self.processes)) as pool:
            outputs = list(pool.map(lambda process: process.communicate(timeout=PATIENCE), self.processes))
        reported = []
        for rank, (process, (output, errors)) in enumerate(zip(self.processes, outputs)):
            assert process.returncode == 0 or rank == but, errors
            reported.append(json.loads(output.splitlines()[-1]) if rank != but else None)
        return reported

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
