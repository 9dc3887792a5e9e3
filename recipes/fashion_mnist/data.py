"""Fashion-MNIST from its IDX files, as gray images of 32x32 pixels."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from softcfg.errors import UserError

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_PREFIX = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 0x08


@dataclass(frozen=True)
class Split:
    """One split of the data: `images` uint8 `[N, 32, 32]` and `labels` int64 `[N]`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: Tensor | slice, device: torch.device | str = "cpu") -> Tensor:
        """Return chosen images as float32 `[B, 3, 32, 32]` in [0, 1], the gray value in all three channels."""
        gray = self.images[index].to(device).unsqueeze(1).float() / 255
        return gray.expand(-1, 3, -1, -1)


def load(folder: Path, split: str) -> Split:
    """Read the `train` or `test` split; 28x28 images get a border of two black pixels.

    Raises:
        UserError: a file is missing, damaged or not what its name says.
    """
    images = read_idx(_find(folder, f"{_PREFIX[split]}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{_PREFIX[split]}-labels-idx1-ubyte"))
    if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise UserError(
            f"{folder}: expected N images of 28x28 and N labels, found {list(images.shape)} and {list(labels.shape)}"
        )
    return Split(F.pad(torch.from_numpy(images), (2, 2, 2, 2)), torch.from_numpy(labels).long())


def read_idx(path: Path) -> np.ndarray:
    """Read a file of unsigned bytes in the IDX format, gzipped or plain.

    Raises:
        UserError: the file is damaged or holds something else.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a gzip file ({error}); download it again.") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise UserError(f"{path} is not an IDX file of unsigned bytes; download it again.")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise UserError(f"{path} ends within its header; download it again.")
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    if len(content) != start + shape.prod():
        raise UserError(
            f"{path} is {len(content)} bytes long, its header says {start + shape.prod()}; download it again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(
        f"no {name} or {name}.gz in {folder}: install the Debian package dataset-fashion-mnist, or put the "
        "four files of Fashion-MNIST (github.com/zalandoresearch/fashion-mnist) into a folder and name it with --data."
    )
