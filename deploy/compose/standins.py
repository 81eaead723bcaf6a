"""Images under the names of the base images, made of Debian packages and of what this machine has, so that the test of
the compose file needs no registry. Names that the engine has already are left as they are.

Not the real ones, so what depends on them alone is not tested: that the tags exist, and what else is in them. Grafana
has none."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
APPLETS = ("sh", "chown", "kill", "stat", "wget")
ENTRYPOINT = """\
#!/bin/sh
if [ "$#" -eq 0 ] || [ "${1#-}" != "$1" ]; then set -- nats-server "$@"; fi
exec "$@"
"""


def run(*command: str | Path, cwd: Path | None = None, stdin: int | None = subprocess.DEVNULL) -> str:
    done = subprocess.run(command, cwd=cwd, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.returncode}\n{said}"
    return done.stdout


def exists(image: str) -> bool:
    return subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode == 0


def names() -> dict[str, str]:
    """The images that the files name, by what is before the colon."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    images = {service["image"] for service in services.values()}
    dockerfile = (ROOT / "Dockerfile").read_text()
    (version,) = re.findall(r"^ARG RUST_VERSION=(.+)$", dockerfile, re.MULTILINE)
    bases = re.findall(r"^FROM (\S+:\S+)", dockerfile, re.MULTILINE)
    images |= {name.replace("${RUST_VERSION}", version) for name in bases}
    return {image.split(":")[0]: image for image in images if not image.startswith("$")}


def copy_tree(target: Path) -> None:
    """What git knows of this tree, or would, with the crates that the binary is made of beside it."""
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    (target / ".cargo").mkdir()
    (target / ".cargo" / "config.toml").write_text(run("cargo", "vendor", "--locked", "--versioned-dirs", cwd=target))
    tree = ("cargo", "tree", "--locked", "--offline", "--package=thalweg", "--edges=normal,build", "--prefix=none")
    lines = [line.split() for line in run(*tree, cwd=target).splitlines() if line]
    needed = {f"{name}-{version.removeprefix('v')}" for name, version, *_ in lines}
    # Cargo wants to see all crates of the lock file; of those for other platforms their names will do, and they are two
    # thirds of the bytes.
    for crate in (target / "vendor").iterdir():
        if crate.name not in needed:
            for file in set(crate.iterdir()) - {crate / "Cargo.toml", crate / ".cargo-checksum.json"}:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            (crate / "src").mkdir()
            (crate / "src" / "lib.rs").touch()


def unpack(root: Path, *packages: str) -> None:
    """The files of Debian packages, without what they depend on."""
    with tempfile.TemporaryDirectory() as directory:
        # By its user for downloads it could not write here.
        run("apt-get", "-o", "APT::Sandbox::User=root", "download", *packages, cwd=Path(directory))
        for package in Path(directory).glob("*.deb"):
            run("dpkg-deb", "--extract", package, root)


def applets(root: Path) -> None:
    unpack(root, "busybox-static")
    (root / "tmp").mkdir(mode=0o1777)
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")


def nats(root: Path, _: str) -> list[str]:
    applets(root)
    version = re.search(r"^TEST_NATS_VERSION = (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert version
    server = run(sys.executable, ROOT / "scripts" / "nats-server.py", "--version", version[1]).strip()
    bin_ = root / "usr" / "local" / "bin"
    bin_.mkdir(parents=True)
    shutil.copy(server, bin_ / "nats-server")
    (bin_ / "docker-entrypoint.sh").write_text(ENTRYPOINT)
    (bin_ / "docker-entrypoint.sh").chmod(0o755)
    return [
        "ENV PATH=/usr/local/bin:/usr/bin:/bin",
        'ENTRYPOINT ["docker-entrypoint.sh"]',
        'CMD ["nats-server", "--config", "/etc/nats/nats-server.conf"]',
    ]


def prometheus(root: Path, _: str) -> list[str]:
    applets(root)
    unpack(root, "libc6", "prometheus")
    shutil.copy(root / "usr" / "bin" / "prometheus", root / "bin" / "prometheus")
    data = root / "prometheus"
    data.mkdir()
    shutil.chown(data, 65534, 65534)
    return ["ENV PATH=/bin", "USER 65534", "WORKDIR /prometheus", 'ENTRYPOINT ["/bin/prometheus"]']


def rust(root: Path, image: str) -> list[str]:
    version = image.split(":")[1].split("-")[0]
    sysroot = Path(run("rustc", "--print", "sysroot").strip())
    found = run(sysroot / "bin" / "rustc", "--version").split()[1]
    assert found == version, f"{image} is to have Rust {version}, and this machine has {found}"
    suite = image.rsplit("-", 1)[1]
    packages = "--include=gcc,libc6-dev,ca-certificates"
    run("mmdebstrap", "--quiet", "--variant=essential", "--format=directory", packages, suite, root)
    home = root / "usr" / "local" / "cargo"
    (home / "bin").mkdir(parents=True)
    for program in ("cargo", "rustc"):
        shutil.copy(sysroot / "bin" / program, home / "bin")
    tools = shutil.ignore_patterns("etc", "src", "*.html")
    shutil.copytree(sysroot / "lib", home / "lib", symlinks=True, ignore=tools)
    return ["ENV PATH=/usr/local/cargo/bin:/usr/sbin:/usr/bin:/sbin:/bin"]


MAKERS: dict[str, Callable[[Path, str], list[str]]] = {"nats": nats, "prom/prometheus": prometheus, "rust": rust}


def make(image: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "root"
        root.mkdir(mode=0o755)
        changes = MAKERS[image.split(":")[0]](root, image)
        options = [option for change in changes for option in ("--change", change)]
        archive = ["tar", "--create", "--numeric-owner", "--directory", str(root), "--exclude", "./dev/*", "."]
        with subprocess.Popen(archive, stdout=subprocess.PIPE) as tar:
            assert tar.stdout
            run("docker", "import", *options, "-", image, stdin=tar.stdout.fileno())
        assert tar.returncode == 0


@contextmanager
def standins(*wanted: str, keep: bool = False) -> Iterator[None]:
    """Those of the wanted images that are not there; removed at the end."""
    made = []
    try:
        for name in wanted:
            if not exists(image := names()[name]):
                made.append(image)
                make(image)
        yield
    finally:
        for image in [] if keep else made:
            subprocess.run(["docker", "image", "rm", "--force", image], capture_output=True)
