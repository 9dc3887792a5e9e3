"""Peak memory and time of making the .npz of a run, from shards of made-up images.

python -m benchmarks.export --images 50000      # writes 20 GB below the current folder and removes them again
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from softcfg.runs.export import export_npz
from softcfg.runs.folder import RunFolder
from softcfg.runs.shards import Shard, write_shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=125)
    parser.add_argument("--size", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = _make(Path(folder) / "run", args.images, args.batch_size, args.size)
        started = time.perf_counter()
        print(f"{run.plan.num_shards} shards, {len(run.missing())} missing: {time.perf_counter() - started:.2f} s")
        # A process of its own, so that the peak is the export's alone.
        process = multiprocessing.get_context("spawn").Process(target=_export, args=(run.path,))
        process.start()
        process.join()


def _export(folder: Path) -> None:
    started = time.perf_counter()
    shape = export_npz(RunFolder.open(folder), folder.with_suffix(".npz"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = np.prod(shape) / 1e9
    print(f"arr_0 {list(shape)}, {size:.1f} GB: {time.perf_counter() - started:.0f} s, peak {peak:.0f} MiB")


def _make(path: Path, images: int, batch_size: int, size: int) -> RunFolder:
    settings = {
        "model": "made-up", "seed": 0, "labels": list(range(1000)), "num_classes": 1000, "num_samples": images,
        "batch_size": batch_size, "environment": [],
    }  # fmt: skip
    run = RunFolder.claim(path, settings)
    numbers = np.random.default_rng(0)
    for number in range(run.plan.num_shards):
        indices = run.plan.indices(number)
        count = len(indices)
        shard = Shard(
            number,
            run.fingerprint,
            batch_size,
            np.array(indices),
            np.array(run.plan.labels_of(indices)),
            numbers.integers(0, 4096, (count, 273)),
            numbers.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
        )
        write_shard(run.shard_path(number), shard)
    return run


if __name__ == "__main__":
    main()
