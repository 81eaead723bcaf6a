"""Processes: the service's own, forked ones, interrupted ones, killed ones."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
import thalweg
from conftest import PATIENCE, Workers, eventually
from test_bad_input import free_port
from thalweg import errors


def listens(url: str) -> bool:
    host, port = url.removeprefix("nats://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_up_leaves_nothing_behind() -> None:
    former = os.environ.get("THALWEG_URL")
    with thalweg.up() as service:
        assert listens(service.url) and os.environ["THALWEG_URL"] == service.url
        pid, directory = service.pid, Path(service._temporary.name)  # type: ignore[union-attr]
        thalweg.init(job="short")
        assert thalweg.push_pull(numpy.float32([1])).tolist() == [1]
    assert os.environ.get("THALWEG_URL") == former
    assert not listens(service.url) and not directory.exists()
    assert not Path(f"/proc/{pid}").exists()
    service.stop()


def test_a_service_leaves_connections_to_others_alone(service: thalweg.up, name: str) -> None:
    thalweg.init(service.url, job=name)
    thalweg.push_pull(numpy.float32([1]))
    with thalweg.up() as other, thalweg.Job(name, client=thalweg.connect(other.url)) as job:
        assert job.push_pull(numpy.float32([2])).tolist() == [2]
    assert thalweg.push_pull(numpy.float32([3])).tolist() == [3]


def test_the_service_ends_with_its_python(tmp_path: Path) -> None:
    code = """
import os, sys, thalweg
service = thalweg.up(data_dir=sys.argv[1]).start()
print(service.url, flush=True)
os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PATIENCE)
    eventually("the service to end", lambda: not listens(done.stdout.strip()))


def test_a_service_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(errors.ServiceError, match="no.such.key|no_such_key"):
        thalweg.up(settings={"no_such_key": 1}).start()
    monkeypatch.setenv("THALWEG_BINARY", str(tmp_path / "none"))
    with pytest.raises((errors.ServiceError, FileNotFoundError)):
        thalweg.up().start()


def test_the_binary_answers_from_python() -> None:
    done = subprocess.run([sys.executable, "-m", "thalweg", "--version"], capture_output=True, text=True, timeout=PATIENCE)
    # Followed by the commit, where it was built in a repository.
    assert done.stdout.split()[:2] == ["thalweg", thalweg.__version__]


def test_a_nats_server_without_thalweg_is_told_from_a_service(tmp_path: Path) -> None:
    port = free_port()
    arguments = ["--addr", "127.0.0.1", "--port", str(port), "-js", "-sd", str(tmp_path)]
    server = subprocess.Popen([os.environ["THALWEG_NATS_SERVER"], *arguments], stderr=subprocess.DEVNULL)
    try:
        eventually("nats-server", lambda: listens(f"nats://127.0.0.1:{port}"))
        with pytest.raises(errors.TimedOutError, match="thalweg gateway"):
            thalweg.init(f"nats://127.0.0.1:{port}", connect_timeout=1)
    finally:
        server.kill()
        server.wait()


def test_training_goes_on_after_the_service_was_killed(tmp_path: Path) -> None:
    def start(port: int) -> thalweg.up:
        return thalweg.up(data_dir=tmp_path, settings={"embedded.port": port}).start()

    first = start(0)
    port = int(first.url.rsplit(":", 1)[1])
    job = thalweg.Job("durable", client=thalweg.connect(first.url), function="sgd", settings={"lr": 1.0},
                      initial=numpy.zeros(1, numpy.float32))
    assert job.push_pull(numpy.float32([1])).tolist() == [-1]
    os.kill(first.pid, signal.SIGKILL)
    first._process.wait()  # type: ignore[union-attr]
    handle = job.push_pull_async(numpy.float32([1]))
    with pytest.raises(errors.TimedOutError):
        handle.wait(0.3)
    first.stop()
    second = start(port)
    try:
        assert handle.wait(PATIENCE).tolist() == [-2]
        assert job.push_pull(numpy.float32([1])).tolist() == [-3]
        job.leave()
    finally:
        second.stop()


def test_a_forked_process_is_told_and_may_begin_anew(service: thalweg.up, name: str) -> None:
    code = """
import os, sys, numpy, thalweg
thalweg.init(job=sys.argv[1])
ones = numpy.ones(1000, numpy.float32)
assert thalweg.push_pull(ones)[0] == 1
job, handle = thalweg.default_job(), thalweg.push_pull_async(ones)
told, child_told = os.pipe()
if os.fork() == 0:
    answers = []
    for call in [lambda: thalweg.push_pull(ones), lambda: job.push_pull(ones), handle.wait, job.members]:
        try:
            call()
            answers.append("went through")
        except thalweg.ThalwegError as error:
            answers.append(f"{type(error).__name__}: {error}")
    thalweg.init(job=sys.argv[1] + "-child")
    answers.append(str(thalweg.push_pull(ones)[0]))
    thalweg.shutdown()
    os.write(child_told, "|".join(answers).encode())
    os._exit(0)
os.wait()
report([os.read(told, 10000).decode().split("|"), float(handle.wait()[0])])
"""
    with Workers(1, code, name) as workers:
        (answers, after), = workers.results()
    assert after == 1
    assert all("fork" in answer for answer in answers[:4]), answers
    assert answers[1].startswith("ForkedError") and answers[4] == "1.0"


def test_ctrl_c_interrupts_at_once_and_training_can_go_on(service: thalweg.up, name: str) -> None:
    code = """
import sys, time, numpy, thalweg
thalweg.init(job=sys.argv[1], workers=2)
thalweg.push_pull(numpy.zeros(1, numpy.float32))
if thalweg.rank() == 1:
    sys.stdin.read(1)
    report(float(thalweg.push_pull(numpy.float32([3]))[0]))
else:
    handle = thalweg.push_pull_async(numpy.float32([1]))
    try:
        print("waiting", flush=True)
        handle.wait()
    except KeyboardInterrupt:
        interrupted = time.time()
        print("interrupted", flush=True)
    report([interrupted, float(handle.wait()[0])])
"""
    prelude = "import json\ndef report(value): print(json.dumps(value), flush=True)\n"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", prelude + code, name],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert processes[0].stdout is not None and processes[1].stdin is not None
        assert processes[0].stdout.readline() == "waiting\n"
        sent = time.time()
        processes[0].send_signal(signal.SIGINT)
        assert processes[0].stdout.readline() == "interrupted\n"
        processes[1].communicate("\n", timeout=PATIENCE)
        output, _ = processes[0].communicate(timeout=PATIENCE)
        interrupted, mean = json.loads(output)
        assert interrupted - sent < 1 and mean == 2
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def test_ctrl_c_interrupts_joining(service: thalweg.up, name: str) -> None:
    job = thalweg.Job(name, workers=2)
    began = time.monotonic()
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        job.push_pull(numpy.zeros(1, numpy.float32))
    assert time.monotonic() - began < 5
    timer.join()


def test_other_threads_run_while_one_waits(service: thalweg.up, name: str) -> None:
    job = thalweg.Job(name, workers=2, timeout=1.0)
    counted = 0
    waiting = threading.Event()

    def wait() -> None:
        with pytest.raises(errors.TimedOutError):
            job.push_pull(numpy.zeros(1, numpy.float32))
        waiting.set()

    thread = threading.Thread(target=wait)
    thread.start()
    while not waiting.is_set():
        counted += 1
    thread.join()
    # With the lock held they would have got none of that second.
    assert counted > 10_000
