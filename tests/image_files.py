"""Writing images as samplers do."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file


def write_pngs(folder: Path, images: np.ndarray) -> Path:
    """000000.png, 000001.png, ... in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{n:06d}.png")
    return folder


def write_shards(folder: Path, images: np.ndarray, order: list[list[int]]) -> Path:
    """A run folder; `order` holds the indices of each shard."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text("{}")
    for n, indices in enumerate(order):
        tensors = {"pixels": torch.from_numpy(images[indices]), "indices": torch.tensor(indices)}
        save_file(tensors, folder / "shards" / f"shard-{n:05d}.safetensors")
    return folder
