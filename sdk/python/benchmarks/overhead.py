"""What Python adds to a round: `thalweg.push_pull` of a numpy array against the Rust SDK's `push_pull`.

One worker each, the same service, rounds of both in turns. A pair's ratio is Python's time over Rust's; the median of
all pairs comes with its 95 % interval (bootstrap). Both check every result. Peak memory is that of each process,
the array that is pushed included.

    make bench-python
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import time

import numpy

import thalweg


def interval(values: numpy.ndarray) -> tuple[float, float, float]:
    """Median, and the bounds of its 95 % interval."""
    random = numpy.random.default_rng(0)
    medians = numpy.median(random.choice(values, (10_000, len(values))), axis=1)
    low, high = numpy.quantile(medians, [0.025, 0.975])
    return float(numpy.median(values)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rust", required=True, help="the example `rounds` of the Rust SDK")
    parser.add_argument("--mib", type=int, default=64, help="size of the array")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    elements = arguments.mib * 2**18
    values = (numpy.arange(elements) % 1000).astype(numpy.float32)
    pairs = []
    with thalweg.up():
        thalweg.init(job="python")
        rust = subprocess.Popen(
            [arguments.rust, "rust", str(elements)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert rust.stdin is not None and rust.stdout is not None

        def of_rust() -> float:
            assert rust.stdin is not None and rust.stdout is not None
            print(file=rust.stdin, flush=True)
            return float(rust.stdout.readline())

        def of_python() -> float:
            start = time.perf_counter()
            result = thalweg.push_pull(values)
            seconds = time.perf_counter() - start
            assert (result == values).all()
            return seconds

        for pair in range(arguments.pairs + 3):
            # Which one is first takes turns too.
            if pair % 2:
                ours, theirs = of_python(), of_rust()
            else:
                theirs, ours = of_rust(), of_python()
            # The first ones join, and take memory for the first time.
            if pair >= 3:
                pairs.append((ours, theirs))
        rust.stdin.close()
        peak_of_rust = int(rust.stdout.readline())
        rust.wait()
    times = numpy.array(pairs)
    median, low, high = interval(times[:, 0] / times[:, 1])
    report = {
        "mib": arguments.mib,
        "pairs": len(pairs),
        "python_s": float(numpy.median(times[:, 0])),
        "rust_s": float(numpy.median(times[:, 1])),
        "ratio": median,
        "ratio_95": [low, high],
        "peak_mib_python": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_mib_rust": peak_of_rust / 2**20,
    }
    if arguments.json:
        print(json.dumps(report))
        return
    print(f"push_pull of {arguments.mib} MiB, {len(pairs)} pairs")
    print(f"  Python {report['python_s']:.3f} s, Rust {report['rust_s']:.3f} s (medians)")
    print(f"  ratio  {median:.3f}, 95 % interval {low:.3f} to {high:.3f}")
    print(f"  peak memory  Python {report['peak_mib_python']:.0f} MiB, Rust {report['peak_mib_rust']:.0f} MiB")


if __name__ == "__main__":
    main()
