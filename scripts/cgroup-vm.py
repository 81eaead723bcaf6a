#!/usr/bin/env python3
"""Run the test of CPU quotas by cgroups on a kernel of its own, in a virtual machine, for hosts that have no cgroups of
version 2 or let nobody make some.

Needs, on a Debian: qemu-system-x86 (no KVM), busybox-static, cpio, cargo. The kernel is the distribution's for clouds,
fetched with apt-get and unpacked into target/cgroup-vm (nothing is installed), or the one that --kernel names. Nothing
of the host is visible inside: an initramfs with the test program, its libraries and busybox is all there is.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEST = "process::tests::the_kernel_keeps_all_threads_to_the_quota_where_it_can"
# Longest that the machine may take, seconds; without KVM it is some thirty times slower than the host.
PATIENCE = 600

# In the root, where processes and controllers may share a cgroup; as a service to which one is delegated, where they may
# not and thalweg has to move aside; and as one process of two, where it must see that it cannot be done.
INIT = f"""#!/bin/sh
mount -t proc none /proc
mount -t devtmpfs none /dev
mount -t cgroup2 none /sys/fs/cgroup
echo "kernel $(uname -r)"
test="/tested --exact --nocapture {TEST}"
$test
echo "as root: $?"
cd /sys/fs/cgroup
echo +cpu > cgroup.subtree_control
mkdir service shared
sh -c "echo 0 > service/cgroup.procs; exec $test"
echo "as a service: $?"
sh -c "echo 0 > shared/cgroup.procs; $test; true"
poweroff -f
"""
# What it says then, in the order in which it comes.
EXPECTED = [r"kernel \d", r"1 passed", r"as root: 0", r"1 passed", r"as a service: 0", r"SKIPPED: .* other processes"]


def run(*command, **options):
    return subprocess.run(command, check=True, text=True, stdin=subprocess.DEVNULL, **options)


def output(*command, **options):
    return run(*command, stdout=subprocess.PIPE, **options).stdout


def fetch_kernel(directory):
    """The distribution's kernel for clouds: everything that a virtual machine needs is built in."""
    kernels = sorted(directory.glob("boot/vmlinuz-*"))
    if not kernels:
        depends = output("apt-cache", "depends", "linux-image-cloud-amd64")
        package = re.search(r"Depends: (linux-image-\S+)", depends)
        if package is None:
            sys.exit("apt-cache knows no linux-image-cloud-amd64: run apt-get update, or name a kernel with --kernel")
        run("apt-get", "download", "--quiet", package[1], cwd=directory)
        (deb,) = directory.glob("linux-image-*.deb")
        run("dpkg-deb", "--extract", deb, directory)
        deb.unlink()
        kernels = sorted(directory.glob("boot/vmlinuz-*"))
    return kernels[-1]


def build_test():
    # As `make test` builds it, so that it is not built again.
    messages = output("cargo", "test", "--workspace", "--features", "thalweg/failpoints", "--lib", "--no-run",
                      "--message-format", "json", cwd=ROOT)
    for message in map(json.loads, messages.splitlines()):
        if message.get("executable") and message["target"]["name"] == "thalweg_autoscaler":
            return Path(message["executable"])
    sys.exit("cargo built no test program")


def pack(directory, program):
    """An initramfs with the program and its libraries, each where it is on the host."""
    tree = directory / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for each in ("bin", "dev", "proc", "sys/fs/cgroup", "tmp"):
        (tree / each).mkdir(parents=True)
    shutil.copy(shutil.which("busybox"), tree / "bin/busybox")
    for applet in ("sh", "mount", "mkdir", "uname", "poweroff", "kill", "sleep"):
        (tree / "bin" / applet).symlink_to("busybox")
    run("objcopy", "--strip-debug", program, tree / "tested")
    for library in re.findall(r"(/\S+) \(0x", output("ldd", program)):
        target = tree / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    archive = directory / "initramfs"
    with archive.open("wb") as file:
        names = b"\0".join(bytes(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
        subprocess.run(["cpio", "--null", "--create", "--quiet", "--format=newc"],
                       cwd=tree, input=names, stdout=file, check=True)
    return archive


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, help="kernel to start, with all that it needs built in")
    arguments = parser.parse_args()
    missing = [tool for tool in ("qemu-system-x86_64", "busybox", "cpio", "objcopy", "cargo") if not shutil.which(tool)]
    if missing:
        sys.exit(f"missing: {', '.join(missing)} (apt-get install qemu-system-x86 busybox-static cpio binutils)")
    directory = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "cgroup-vm"
    directory.mkdir(parents=True, exist_ok=True)
    kernel = arguments.kernel or fetch_kernel(directory)
    initramfs = pack(directory, build_test())
    machine = run(
        "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max", "-smp", "2", "-m", "1024", "-nographic",
        "-no-reboot", "-nic", "none", "-kernel", kernel, "-initrd", initramfs, "-append", "console=ttyS0 quiet panic=-1",
        stdout=subprocess.PIPE, timeout=PATIENCE,
    )
    print(machine.stdout)
    if not re.search(".*".join(EXPECTED), machine.stdout, re.DOTALL) or machine.stdout.count("SKIPPED") != 1:
        sys.exit("quotas by cgroups failed, or were not tested")


if __name__ == "__main__":
    main()
