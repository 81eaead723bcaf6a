"""Metrics as a real Prometheus sees them while jobs train: their names, and that every panel of a dashboard shows something.

`thalweg up` runs its invokers as child processes here, so that theirs come through it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BINARY = ROOT / "sdk" / "python" / "python" / "thalweg" / "bin" / "thalweg"
DASHBOARDS = sorted((HERE / "grafana" / "dashboards").glob("*.json"))
PATIENCE = 90.0

#: Labels that a sample may have beside those of a histogram. Each is bounded: by us, or by the number of jobs that have
#: names, partitions, pools or invokers.
LABELS = {"code", "reason", "outcome", "state", "kind", "route", "status", "below_quorum", "unclean", "worked"}
LABELS |= {"invariant", "pool", "partition", "tenant", "job", "invoker"}
#: What a gauge or a histogram counts, where the name does not end in a unit.
COUNTED = {"messages", "jobs", "workers", "invokers", "rounds", "contributions", "contributors", "letters"}

#: A worker that trains until it is ended.
WORKER = """
import numpy, thalweg
thalweg.init()
gradient = numpy.ones(300_000, numpy.float32)
while True:
    thalweg.push_pull(gradient)
"""


def free_port() -> int:
    """One that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def get(url: str) -> str:
    """The body of an answer."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def eventually(what: str, done: Callable[[], Any]) -> Any:
    """What `done` returns once that is something; errors of connections are waited out."""
    until, seen = time.monotonic() + PATIENCE, None
    while time.monotonic() < until:
        try:
            seen = done()
        except OSError as error:
            seen = error
        if seen and not isinstance(seen, OSError):
            return seen
        time.sleep(0.1)
    pytest.fail(f"waited too long for {what}: {seen}")


class Deployment(NamedTuple):
    """What runs."""

    metrics: str
    prometheus: str


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    if shutil.which("prometheus") is None:
        assert not os.environ.get("REQUIRE_PROMETHEUS"), "prometheus is missing"
        pytest.skip("prometheus is not installed (make deps)")
    directory = tmp_path_factory.mktemp("metrics")
    admin, nats, web = free_port(), free_port(), free_port()
    sets = {
        "gateway.http_listen": "127.0.0.1:0",
        "embedded.port": nats,
        "embedded.data_dir": directory / "nats",
        "store.data_dir": directory / "store",
        "autoscaler.actuator": "process",
    }
    up = [str(BINARY), "up", "--with-stdin", "--admin", f"127.0.0.1:{admin}"]
    up += [f"--set={key}={value}" for key, value in sets.items()]
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "thalweg", "static_configs": [{"targets": [f"127.0.0.1:{admin}"]}]}],
    }
    (directory / "prometheus.yml").write_text(json.dumps(config))
    prometheus = ["prometheus", f"--config.file={directory / 'prometheus.yml'}", "--log.level=error"]
    prometheus += [f"--storage.tsdb.path={directory / 'tsdb'}", f"--web.listen-address=127.0.0.1:{web}"]
    environment = {**os.environ, "THALWEG_URL": f"nats://127.0.0.1:{nats}", "WORLD_SIZE": "2"}
    with ExitStack() as stack:

        def start(command: list[str], **more: str) -> None:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, env={**environment, **more})
            stack.callback(process.wait)
            stack.callback(process.kill if command is not up else process.stdin.close)

        environment.pop("THALWEG_URL")
        start(up)
        eventually("the service", lambda: get(f"http://127.0.0.1:{admin}/readyz"))
        environment["THALWEG_URL"] = f"nats://127.0.0.1:{nats}"
        for job in ("red", "blue"):
            for rank in ("0", "1"):
                start([sys.executable, "-c", WORKER], THALWEG_JOB=job, RANK=rank)
        start(prometheus)
        yield Deployment(f"http://127.0.0.1:{admin}/metrics", f"http://127.0.0.1:{web}")


def queries() -> Iterator[tuple[str, str]]:
    """Place and text of every query."""
    for file in DASHBOARDS:
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{file.stem}: {panel['title']}: {target['legendFormat']}", target["expr"].replace("$job", ".*")


def numbers(prometheus: str, query: str) -> list[float]:
    """What a query returns now, without gaps."""
    answer = json.loads(get(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"))
    assert answer["status"] == "success", answer
    values = [float(series["value"][1]) for series in answer["data"]["result"]]
    return [value for value in values if not math.isnan(value)]


def test_every_panel_shows_something(deployment: Deployment) -> None:
    empty = dict(queries())
    assert len(empty) > 40

    def all_show() -> bool:
        for place, query in list(empty.items()):
            if numbers(deployment.prometheus, query):
                del empty[place]
        return not empty

    try:
        eventually("every panel", all_show)
    finally:
        assert not empty, f"nothing to see: {empty}"
    # And it is what happens: rounds of two jobs, by invokers that are processes of their own.
    assert len(numbers(deployment.prometheus, "rate(thalweg_job_rounds_total[1m]) > 0")) == 2
    assert numbers(deployment.prometheus, 'rate(thalweg_invoker_rounds_total{invoker=~"auto-.*"}[1m]) > 0')


def test_metrics_are_named_as_prometheus_wants_them(deployment: Deployment) -> None:
    def samples() -> str:
        text = get(deployment.metrics)
        return text if 'thalweg_invoker_fold_seconds_count{invoker="' in text else ""

    text = eventually("an invoker's metrics", samples)
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    found = {name for labels in re.findall(r"^\w+\{(.*)\} ", text, re.MULTILINE) for name in re.findall(r"(\w+)=\"", labels)}
    assert found - {"le"} <= LABELS, found


def test_names_say_their_unit_and_all_are_described() -> None:
    described = set()
    for file in ROOT.glob("*/src/metrics.rs"):
        source = file.read_text()
        named = dict(re.findall(r"const (\w+): &str =\s*\"(thalweg_\w+)\"", source))
        here = {(kind, named[constant]) for kind, constant in re.findall(r"describe_(\w+)!\(\s*(\w+),", source)}
        assert {name for _, name in here} == set(named.values()), file
        described |= here
    assert len(described) > 60
    for kind, name in described:
        assert (kind == "counter") == name.endswith("_total"), name
        if kind != "counter":
            words = name.split("_")
            unit = words[-1] in {"seconds", "bytes", "ratio", "leads", "connected"} or "per" in words
            assert unit or COUNTED & set(words), name


def test_dashboards_are_those_that_the_program_writes() -> None:
    sys.path.insert(0, str(HERE / "grafana"))
    import make_dashboards

    assert {file.name: file.read_text() for file in DASHBOARDS} == make_dashboards.files()
