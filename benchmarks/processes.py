"""How throughput grows with the number of processes.

    python -m benchmarks.processes fashion --processes 1 2 --num-samples 2000

Every process computes with one thread (OMP_NUM_THREADS=1) and starts anew; images per second are those that the
run reports, without start-up.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile

from benchmarks.timing import machine, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name that 'softcfg models' lists, or a model folder")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    rates: dict[int, list[float]] = {count: [] for count in args.processes}
    for _ in range(args.repeats):
        for count in args.processes:
            rates[count].append(_rate(args, count))
    base = statistics.median(rates[args.processes[0]]) / args.processes[0]
    print(f"{args.model}, {args.num_samples} images in batches of {args.batch_size}, {machine()}\n")
    rows = [
        [count, statistics.median(found), min(found), max(found), statistics.median(found) / (count * base)]
        for count, found in rates.items()
    ]
    print(table(["processes", "images/s (median)", "least", "most", "efficiency"], rows))


def _rate(args: argparse.Namespace, processes: int) -> float:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    with tempfile.TemporaryDirectory() as folder:
        output = subprocess.run(
            [
                *(sys.executable, "-m", *(launcher if processes > 1 else []), "softcfg", "sample", args.model),
                *("--num-samples", str(args.num_samples), "--batch-size", str(args.batch_size)),
                *("--output-dir", f"{folder}/run", "--no-png", "--no-compare"),
            ],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ).stdout
    found = re.search(r"\((\S+) images/s\)", output)
    assert found, output
    return float(found[1])


if __name__ == "__main__":
    main()
