"""Runs without a model: settings and shards of made-up images."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from softcfg.runs.folder import RunFolder
from softcfg.runs.shards import Shard, write_shard


def settings(num_samples: int = 10, batch_size: int | None = 4, **changes: Any) -> dict[str, Any]:
    return {
        "model": "made-up",
        "guidance": {"method": "CFG", "guidance_scale": 3.0},
        "sampling": {"temperature": 1.0},
        "seed": 0,
        "dtype": "float32",
        "labels": [0, 1, 2],
        "num_classes": 3,
        "num_samples": num_samples,
        "batch_size": batch_size,
        "command": "softcfg sample made-up",
        "environment": [{"softcfg": "0"}],
        **changes,
    }


def shard(run: RunFolder, number: int, size: int = 4) -> Shard:
    indices = np.array(run.plan.indices(number))
    numbers = np.random.default_rng(number)
    return Shard(
        number,
        run.fingerprint,
        run.plan.batch_size,
        indices,
        np.array(run.plan.labels_of(indices.tolist())),
        numbers.integers(0, 1000, (len(indices), 5)),
        numbers.integers(0, 256, (len(indices), size, size, 3), dtype=np.uint8),
    )


def of_images(path: Path, images: np.ndarray, batch_size: int = 4, **changes: Any) -> RunFolder:
    """A run that drew `images`, uint8 [N, H, W, 3]."""
    run = RunFolder.claim(path, settings(len(images), batch_size, **changes))
    for number in range(run.plan.num_shards):
        indices = run.plan.indices(number)
        made = dataclasses.replace(shard(run, number), pixels=images[indices.start : indices.stop])
        write_shard(run.shard_path(number), made)
    return run


def complete(path: Path, size: int = 4, **changes: Any) -> RunFolder:
    """A run whose shards are all there."""
    run = RunFolder.claim(path, settings(**changes))
    for number in range(run.plan.num_shards):
        write_shard(run.shard_path(number), shard(run, number, size))
    return run
