"""The compose file, as a user runs it: on a Docker Engine, with the image that the Dockerfile makes.

Base images that the engine lacks are stood in for (standins.py). THALWEG_TEST_IMAGE names an image to test instead of
building one; THALWEG_KEEP_IMAGES=1 leaves what was built for the next run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml
from standins import ROOT, copy_tree, names, run, standins

HERE = Path(__file__).parent
T = TypeVar("T")
PARTS = ("nats", "store", "gateway", "autoscaler", "workers")
KEEP = os.environ.get("THALWEG_KEEP_IMAGES") == "1"


def obstacle() -> str | None:
    for tool in ("docker", "docker-compose"):
        if not shutil.which(tool):
            return f"there is no {tool}"
    answer = subprocess.run(["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True)
    return None if answer.returncode == 0 else "no Docker Engine answers"


needs_engine = pytest.mark.skipif(obstacle() is not None, reason=obstacle() or "")


def eventually(what: str, look: Callable[[], T], seconds: float = 60) -> T:
    """What `look` gives as soon as it is something."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Deployment:
    """The compose file under a name of its own."""

    def __init__(self, name: str, image: str, *files: str) -> None:
        self.name = name
        self.files = ["docker-compose.yml", *files]
        self.ports = {each: free_port() for each in ("NATS", "HTTP", "PROMETHEUS", "GRAFANA")}
        self.environment = {
            **os.environ,
            **{f"THALWEG_{each}_PORT": str(port) for each, port in self.ports.items()},
            "THALWEG_IMAGE": image,
            "THALWEG_NETWORK": name,
            "COMPOSE_PROJECT_NAME": name,
            "COMPOSE_FILE": ":".join(self.files),
            "THALWEG_DOCKER_GROUP": "0",
        }

    def compose(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ["docker-compose", *arguments]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def up(self, *services: str) -> float:
        """Starts it and waits until all is healthy; says how long that took."""
        begun = time.monotonic()
        self.compose("up", "--detach", "--no-build", *services)
        for part in services or self.parts():
            eventually(f"{part} to be healthy", lambda part=part: self.health(part) == "healthy")
        return time.monotonic() - begun

    def parts(self) -> list[str]:
        # docker-compose 1.29 lists services of profiles that are not asked for as well.
        return [each for each in PARTS if each != "workers" or len(self.files) == 1]

    def down(self, *options: str) -> None:
        self.compose("--profile", "demo", "--profile", "observability", "down", "--timeout", "60", *options)

    def remove(self) -> None:
        """Whatever there is of it, in whatever state."""
        if strays := run("docker", "ps", "--all", "--quiet", "--filter", f"network={self.name}").split():
            subprocess.run(["docker", "rm", "--force", *strays], capture_output=True)
        self.down("--volumes", "--remove-orphans")
        assert not self.leftovers()

    def container(self, service: str) -> str:
        return self.compose("ps", "--quiet", service).stdout.strip()

    def state(self, service: str) -> dict[str, Any]:
        container = self.container(service)
        if not container:
            return {}
        state: dict[str, Any] = json.loads(run("docker", "inspect", "--format", "{{json .State}}", container))
        return state

    def health(self, service: str) -> str | None:
        status: str | None = self.state(service).get("Health", {}).get("Status")
        return status

    def thalweg(self, *arguments: str) -> Any:
        """What a command prints with --json; None when it fails, as while a part is away."""
        command = ["docker", "exec", self.container("gateway"), "thalweg", *arguments, "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def round(self, job: str = "digits") -> int:
        shown = self.thalweg("job", "show", job)
        progress = (shown or {}).get("progress")
        return progress["min"] if progress else 0

    def invokers(self) -> int | None:
        status = self.thalweg("status")
        return None if status is None else len(status["invokers"])

    def train(self, rounds: int, *more: str) -> str:
        """Starts the demo; gives its container, to be handed to `outcome`."""
        command = ["demo", "--nats-url", "nats://nats:4222", "--json", "--rounds", str(rounds), *more]
        started = self.compose("--profile", "demo", "run", "--no-deps", "--detach", "demo", *command)
        return started.stdout.strip().splitlines()[-1]

    def outcome(self, container: str, seconds: float = 240, exact: bool = True) -> dict[str, Any]:
        """How the training went, which has to have been right; not `exact` where its workers were killed, who then may
        be missing in a round."""
        inspect = ("docker", "inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", container)
        eventually("the training to end", lambda: run(*inspect).startswith("exited"), seconds)
        logs = subprocess.run(["docker", "logs", container], capture_output=True, text=True)
        assert run(*inspect).strip() == "exited 0", logs.stderr
        subprocess.run(["docker", "rm", container], capture_output=True)
        outcome: dict[str, Any] = json.loads(logs.stdout.splitlines()[-1])
        assert outcome["accuracy"] > 0.9, outcome
        assert outcome["max_param_diff"] < 1e-4 or not exact, outcome
        return outcome

    def crash(self, service: str) -> None:
        """Kills the first process of a container behind the engine's back, as a fault would."""
        process = str(self.state(service)["Pid"])
        options = ["--rm", "--pid", "host", "--network", "none", "--user", "0:0", "--entrypoint", "kill"]
        run("docker", "run", *options, names()["nats"], "-9", process)

    def leftovers(self) -> str:
        """Containers and networks that are still there."""
        label = f"label=com.docker.compose.project={self.name}"
        containers = run("docker", "ps", "--all", "--quiet", "--filter", label)
        invokers = run("docker", "ps", "--all", "--quiet", "--filter", f"label=thalweg.deployment={self.name}")
        networks = run("docker", "network", "ls", "--quiet", "--filter", f"name={self.name}")
        return containers + invokers + networks

    def lose(self, volume: str) -> None:
        run("docker", "volume", "rm", f"{self.name}_{volume}")

    def refused(self) -> bool:
        """Whether the store says that it may not serve, and what to do."""
        return "--replace" in self.logs("store")

    def logs(self, service: str) -> str:
        return self.compose("logs", "--no-color", service).stdout


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image, made of a copy of this tree with its crates beside it, as the engine may have no network."""
    # Told to stop, it takes down what it has started.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("told to stop"))
    name = os.environ.get("THALWEG_TEST_IMAGE") or "thalweg:test"
    build = not os.environ.get("THALWEG_TEST_IMAGE")
    with standins("nats", "prom/prometheus", *(["rust"] if build else []), keep=KEEP):
        if build:
            tree = tmp_path_factory.mktemp("image") / "tree"
            copy_tree(tree)
            begun = time.monotonic()
            commit = ["--build-arg", "COMMIT=0123456789ab"]
            run("docker", "build", "--quiet", "--network", "none", "--tag", name, *commit, tree)
            shutil.rmtree(tree)
            print(f"\nimage: built in {time.monotonic() - begun:.0f} s")
        try:
            yield name
        finally:
            if build and not KEEP:
                run("docker", "image", "rm", "--force", name)
                # The stage that it was built in, which the older builder keeps without a name.
                run("docker", "image", "prune", "--force", "--filter", "label=thalweg.stage=build")


@pytest.fixture
def deployment(image: str, request: pytest.FixtureRequest) -> Iterator[Deployment]:
    files = getattr(request, "param", ())
    deployment = Deployment(f"thalweg-test-{os.getpid()}", image, *files)
    failed = request.session.testsfailed
    try:
        yield deployment
    finally:
        if request.session.testsfailed > failed:
            print(run("docker", "ps", "--all", "--filter", f"network={deployment.name}"))
            print(deployment.compose("logs", "--no-color", "--tail", "40", check=False).stdout)
        deployment.remove()


# ---- The files ---------------------------------------------------------------------------------------------------


def services(name: str = "docker-compose.yml") -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / name).read_text())["services"]
    return found


def test_every_service_is_confined() -> None:
    for name, service in services().items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "mem_limit" in service and "cpus" in service, name
        assert service.get("user") != "0:0" or service["entrypoint"][0] == "chown", name
        assert all(port.startswith("127.0.0.1:${THALWEG_") for port in service.get("ports", [])), name
        assert service["image"].startswith("${") or re.search(r":v?\d+\.\d+\.\d+", service["image"]), name
        assert service["labels"] == {"thalweg.component": name}
    assert "\nUSER 10001:10001\n" in (ROOT / "Dockerfile").read_text()


def test_they_set_what_can_be_set() -> None:
    settings = tomllib.loads((ROOT / "docs" / "thalweg.toml").read_text())
    for file in ("docker-compose.yml", "deploy/compose/docker-actuator.yml"):
        for name, service in services(file).items():
            for variable in service.get("environment", {}):
                if not variable.startswith("THALWEG__"):
                    assert variable == "THALWEG_URL" or variable.startswith("GF_"), (name, variable)
                    continue
                value: Any = settings
                for key in variable.split("__")[1:]:
                    # Without a value by default, and so commented out.
                    assert key.lower() in value, f"{name}: {variable}: there is no such setting"
                    value = value[key.lower()]


def test_stops_take_longer_than_drains() -> None:
    settings = tomllib.loads((ROOT / "docs" / "thalweg.toml").read_text())
    grace = {name: int(service.get("stop_grace_period", "10s")[:-1]) * 1000 for name, service in services().items()}
    assert grace["workers"] > settings["agent"]["drain_timeout_ms"]
    assert grace["autoscaler"] > settings["autoscaler"]["policy"]["drain_timeout_ms"] + 5_000


@needs_engine
def test_compose_takes_them() -> None:
    profiles = ["--profile", "demo", "--profile", "observability"]
    override = ["--file", "docker-compose.yml", "--file", "deploy/compose/docker-actuator.yml"]
    environment = {**os.environ, "THALWEG_DOCKER_GROUP": "1"}
    commands = [["docker-compose"]]
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        commands.append(["docker", "compose"])
    for command in commands:
        for arguments in ([], profiles, [*override, *profiles]):
            command_line = [*command, *arguments, "config"]
            done = subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{command} {arguments}: {done.stderr}"
            assert "arning" not in done.stderr, done.stderr


# ---- The image ---------------------------------------------------------------------------------------------------


@needs_engine
def test_the_image_is_small_and_says_what_it_is(image: str) -> None:
    (described,) = json.loads(run("docker", "image", "inspect", image))
    print(f"\nimage: {described['Size'] / 1e6:.1f} MB")
    assert described["Size"] <= 60e6
    prefix = "org.opencontainers.image."
    labels = {name.removeprefix(prefix): value for name, value in described["Config"]["Labels"].items()}
    assert {"title", "version", "revision", "source", "licenses"} <= set(labels)
    version = run("docker", "run", "--rm", "--network", "none", image, "--version")
    workspace = (ROOT / "Cargo.toml").read_text()
    assert f'version = "{labels["version"]}"' in workspace
    assert version == f"thalweg {labels['version']} ({labels['revision']})\n"


# ---- The deployment ----------------------------------------------------------------------------------------------


@needs_engine
def test_it_is_up_soon_trains_and_goes_to_rest(deployment: Deployment) -> None:
    took = deployment.up()
    print(f"\nfrom up to ready: {took:.1f} s")
    assert deployment.invokers() == 0
    for part in ("store", "gateway", "autoscaler", "workers"):
        assert run("docker", "exec", deployment.container(part), "thalweg", "health") == "ready\n"

    training = deployment.train(2000)
    peak = eventually("invokers", deployment.invokers)
    print(f"demo: {deployment.outcome(training)}, {peak} invokers or more")
    eventually("no invokers", lambda: deployment.invokers() == 0)
    # What it was for is gone with it.
    assert deployment.thalweg("job", "ls") == {"jobs": []}
    # The published port is the HTTP interface.
    with urllib.request.urlopen(f"http://127.0.0.1:{deployment.ports['HTTP']}/v1/jobs", timeout=10) as answer:
        assert json.load(answer)["jobs"] == []

    # And once more as README.md says, with what it starts by itself.
    table = deployment.compose("run", "--rm", "demo").stdout
    assert "test accuracy" in table and "through Thalweg" in table

    deployment.down()
    assert not deployment.leftovers()


@needs_engine
def test_any_container_may_die_while_it_trains(deployment: Deployment) -> None:
    deployment.up()
    training = deployment.train(12_000)
    eventually("training", lambda: deployment.round() > 10)
    for part in PARTS:
        # The engine starts it again.
        before = deployment.round()
        deployment.crash(part)
        begun = time.monotonic()
        eventually(f"rounds after the crash of {part}", lambda before=before: deployment.round() > before + 100)
        print(f"{part} crashed: training again after {time.monotonic() - begun:.1f} s")
        eventually(f"{part} to be healthy", lambda part=part: deployment.health(part) == "healthy")
    # What `docker kill` has killed stays down until somebody starts it.
    run("docker", "kill", *(deployment.container(part) for part in PARTS))
    deployment.up()
    assert deployment.outcome(training)["rounds"] == 12_000


@needs_engine
def test_jobs_outlive_the_containers(deployment: Deployment) -> None:
    deployment.up()
    training = deployment.train(3000)
    eventually("training", lambda: deployment.round() > 100)
    run("docker", "rm", "--force", training)
    deployment.down()
    assert not deployment.leftovers()

    deployment.up()
    reached = deployment.round()
    assert reached > 100
    assert deployment.outcome(deployment.train(3000, "--keep-job"), exact=False)["rounds"] == 3000
    assert deployment.round() >= 3000


@needs_engine
def test_a_lost_store_is_not_replaced_in_silence(deployment: Deployment) -> None:
    deployment.up()
    deployment.outcome(deployment.train(50, "--keep-job"))
    deployment.down()
    deployment.lose("store")

    # It says what is wrong and what to do, and goes on saying it.
    deployment.compose("up", "--detach", "--no-build")
    eventually("the store to refuse", deployment.refused)
    assert deployment.health("store") != "healthy"
    eventually("the gateway", lambda: deployment.health("gateway") == "healthy")
    assert deployment.thalweg("status")["store"]["answers"] is False

    # The way on.
    deployment.environment["THALWEG_STORE_REPLACE"] = "true"
    deployment.up()
    del deployment.environment["THALWEG_STORE_REPLACE"]
    deployment.up()
    deployment.outcome(deployment.train(50, "--job", "digits-2"))
    # The job that is lost can be removed, and its name is free again.
    assert deployment.thalweg("job", "rm", "digits", "--force") is not None
    deployment.outcome(deployment.train(50))


@needs_engine
def test_a_lost_registry_is_not_begun_anew_in_silence(deployment: Deployment) -> None:
    deployment.up()
    deployment.outcome(deployment.train(50, "--keep-job"))
    deployment.down()
    deployment.lose("nats")
    deployment.compose("up", "--detach", "--no-build")
    eventually("the store to have chosen", lambda: deployment.health("store") == "healthy" or deployment.refused())
    assert "holds 1 jobs" in deployment.logs("store")

    # The way on, where nobody has a copy of the volume.
    deployment.environment["THALWEG_STORE_REPLACE"] = "true"
    deployment.up()
    deployment.outcome(deployment.train(50))


@needs_engine
@pytest.mark.parametrize("deployment", [("deploy/compose/docker-actuator.yml",)], indirect=True)
def test_invokers_may_be_containers(deployment: Deployment) -> None:
    # As the engine sees it, wherever that is.
    look = ["--rm", "--network", "none", "--volume", "/var/run/docker.sock:/socket", "--entrypoint", "stat"]
    group = run("docker", "run", *look, names()["nats"], "-c", "%g", "/socket")
    deployment.environment["THALWEG_DOCKER_GROUP"] = group.strip()
    deployment.up()
    assert not deployment.container("workers")
    training = deployment.train(2000)
    invokers = ("docker", "ps", "--quiet", "--filter", f"label=thalweg.deployment={deployment.name}")
    eventually("containers of invokers", lambda: run(*invokers))
    # They are taken over by the next autoscaler, so that `down` leaves none even then.
    deployment.crash("autoscaler")
    deployment.outcome(training)
    eventually("the autoscaler to be healthy", lambda: deployment.health("autoscaler") == "healthy")

    deployment.compose("--profile", "observability", "up", "--detach", "--no-build", "prometheus")
    training = deployment.train(100_000)
    eventually("containers of invokers", lambda: run(*invokers))
    eventually("their metrics", lambda: "thalweg-invokers" in scraped(deployment))
    run("docker", "rm", "--force", training)
    deployment.down()
    assert not deployment.leftovers()


def ask(deployment: Deployment, path: str) -> Any:
    """What Prometheus answers, or nothing as long as it does not."""
    url = f"http://127.0.0.1:{deployment.ports['PROMETHEUS']}/api/v1/{path}"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)["data"]
    except (urllib.error.URLError, OSError):
        return None


def scraped(deployment: Deployment) -> set[str]:
    active = (ask(deployment, "targets") or {"activeTargets": []})["activeTargets"]
    return {each["labels"]["component"] for each in active if each["health"] == "up"}


@needs_engine
def test_prometheus_hears_of_every_part(deployment: Deployment) -> None:
    deployment.up()
    deployment.compose("--profile", "observability", "up", "--detach", "--no-build", "prometheus")
    eventually("all parts to be scraped", lambda: scraped(deployment) == set(PARTS) - {"nats"})
    training = deployment.train(2000)

    def invokers() -> bool:
        answer = ask(deployment, "query?query=thalweg_invoker_rounds_total")
        return any("invoker" in each["metric"] for each in answer["result"])

    eventually("an invoker's metrics", invokers)
    deployment.outcome(training)
    eventually("prometheus to be healthy", lambda: deployment.health("prometheus") == "healthy")
