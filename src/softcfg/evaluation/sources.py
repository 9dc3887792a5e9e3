"""Images to be measured, read as a stream: ADM .npz batches, folders of image files, run folders, arrays."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softcfg.errors import UserError
from softcfg.evaluation.npz import fill, is_npz, names, open_member, reading
from softcfg.files import as_path, hash_file, is_file, is_folder
from softcfg.images import read_picture
from softcfg.runs.folder import PICTURES, SETTINGS, SHARDS, RunFolder

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LARGEST_IMAGE = 1 << 24  # pixels
MOST_IMAGES = 10_000_000
MOST_OTHER_FILES = 200_000  # in a folder of images
LARGEST_BATCH = 1 << 26  # bytes
LARGEST_IN_MEMORY = 1 << 28  # bytes of an array that cannot be read image by image


class ImageSource(ABC):
    """N images of one size, uint8 RGB, that can be read from the beginning any number of times.

    Attributes:
        name: where they come from.
        count: their number.
        size: height and width.
        labels: the classes that they were drawn for, int64 `[N]`, where the source says so; else None.
    """

    name: str
    count: int
    size: tuple[int, int]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return self.count

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content: that of the file where there is one file."""
        return self._hash()

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield all images in their order, uint8 `[B, H, W, 3]`.

        B is `batch_size`, or less for large images: a batch has at most 64 MiB. The last batch may be shorter.
        """
        height, width = self.size
        for array in self._arrays(max(1, min(batch_size, LARGEST_BATCH // (3 * height * width)))):
            yield torch.from_numpy(array)

    @abstractmethod
    def _hash(self) -> str: ...

    @abstractmethod
    def _arrays(self, count: int) -> Iterator[NDArray[np.uint8]]: ...


def open_source(source: str | Path | NDArray[Any] | Tensor | ImageSource) -> ImageSource:
    """Open images: an .npz file with `arr_0`, a folder of images or of shards, or an array `[N, H, W, 3]`.

    Raises:
        UserError: there are no images, or they are not uint8 RGB of one size.
    """
    if isinstance(source, ImageSource):
        return source
    if isinstance(source, Tensor):
        return ArraySource(source.detach().cpu().numpy())
    if isinstance(source, np.ndarray):
        return ArraySource(source)
    path = as_path(source)
    if is_folder(path):
        return _open_folder(path)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; give an .npz file, a folder of images or a run folder")
    if not is_npz(path):
        raise UserError(f"{path} is no .npz file, or a truncated one; give an .npz file or a folder of images")
    return NpzSource(path)


def _open_folder(path: Path) -> ImageSource:
    """The images of a run, or those in a folder."""
    if path.name == SHARDS and is_file(path.parent / SETTINGS):
        path = path.parent
    shards = next((path / SHARDS).glob("shard-*.safetensors"), None) or next(path.glob("shard-*.safetensors"), None)
    if shards is None:
        return FolderSource(path)
    if not is_file(path / SETTINGS):
        raise UserError(
            f"{path} holds shards of a run without its {SETTINGS}, by which they are checked; give its folder"
        )
    return RunSource(RunFolder.open(path))


class ArraySource(ImageSource):
    """Images in memory."""

    def __init__(self, array: NDArray[Any], name: str = "array") -> None:
        self.name = name
        self.count, self.size = _check(name, array.dtype, array.shape)
        self.array = array

    def _hash(self) -> str:
        digest = hashlib.sha256(repr(self.array.shape).encode())
        for part in self._arrays(1024):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def _arrays(self, count: int) -> Iterator[NDArray[np.uint8]]:
        for start in range(0, self.count, count):
            # A copy: torch wants memory that may be written to, in order.
            yield np.array(self.array[start : start + count], order="C")


class NpzSource(ImageSource):
    """The array `arr_0` of an .npz file, plain or compressed, without ever holding it as a whole."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path
        with open_member(path, "arr_0") as images:
            self.count, self.size = _check(f"arr_0 of {path}", images.dtype, images.shape)
            # Only an array in C order holds one image after the other.
            self.array = images.read(LARGEST_IN_MEMORY) if images.fortran else None
        self.labels = self._labels()

    def _labels(self) -> Tensor | None:
        """`arr_1`, where the samplers of ADM put the classes."""
        if "arr_1" not in names(self.path):
            return None
        with open_member(self.path, "arr_1") as labels:
            if labels.shape != (self.count,) or not np.issubdtype(labels.dtype, np.integer):
                return None  # something else
            return torch.from_numpy(labels.read(LARGEST_IN_MEMORY).astype(np.int64))

    def _hash(self) -> str:
        return hash_file(self.path)

    def _arrays(self, count: int) -> Iterator[NDArray[np.uint8]]:
        if self.array is not None:
            yield from ArraySource(self.array)._arrays(count)
            return
        height, width = self.size
        with open_member(self.path, "arr_0") as images:
            for start in range(0, self.count, count):
                n = min(count, self.count - start)
                data = bytearray(n * height * width * 3)
                with reading(self.path, "arr_0"):
                    fill(images.stream, data)  # at the end the checksum is compared
                yield np.frombuffer(data, dtype=np.uint8).reshape(n, height, width, 3)


class FolderSource(ImageSource):
    """Image files in a folder and the folders in it, in the order of their names; hidden ones do not count."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        skipped = {folder / name for name in PICTURES} if is_file(folder / SETTINGS) else set()
        self.files = sorted(path for path in _image_files(folder) if path not in skipped)
        if not self.files:
            raise UserError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no shards of a run")
        self.folder = folder
        self.count = len(self.files)
        first = _read_image(self.files[0])
        self.size = (first.shape[0], first.shape[1])

    def _hash(self) -> str:
        return _hash_files(self.folder, self.files)

    def _arrays(self, count: int) -> Iterator[NDArray[np.uint8]]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers:
            for start in range(0, self.count, count):
                files = self.files[start : start + count]
                yield np.stack(list(workers.map(self._read, files)))

    def _read(self, path: Path) -> NDArray[np.uint8]:
        image = _read_image(path)
        if image.shape[:2] != self.size:
            raise UserError(
                f"the images of {self.folder} differ in size: {self.files[0].name} is {_by(self.size)}, "
                f"{path.relative_to(self.folder)} is {_by(image.shape[:2])}"
            )
        return image


class RunSource(ImageSource):
    """The pixels in the shards of a run; every shard is checked when it is read, and all must be there."""

    def __init__(self, run: RunFolder) -> None:
        self.name = str(run.path)
        self.run = run
        run.require_complete()
        self.count = run.plan.num_samples
        height, width = run.require(0).pixels.shape[1:3]
        self.size = (height, width)
        self.labels = torch.tensor(run.plan.labels_of(range(self.count)))

    def _hash(self) -> str:
        return _hash_files(self.run.path, [self.run.shard_path(number) for number in range(self.run.plan.num_shards)])

    def _arrays(self, count: int) -> Iterator[NDArray[np.uint8]]:
        waiting: list[NDArray[np.uint8]] = []  # images that do not fill a batch yet
        for shard in self.run.shards():
            if shard.pixels.shape[1:3] != self.size:
                raise UserError(
                    f"the shards of {self.run.path} differ in image size: the first has {_by(self.size)}, shard "
                    f"{shard.number} has {_by(shard.pixels.shape[1:3])}"
                )
            images = np.concatenate([*waiting, shard.pixels]) if waiting else shard.pixels
            whole = len(images) - len(images) % count
            for start in range(0, whole, count):
                yield np.array(images[start : start + count])
            waiting = [images[whole:]] if whole < len(images) else []
        yield from waiting


def _image_files(folder: Path) -> Iterator[Path]:
    """Image files below a folder, but no hidden ones: macOS and Jupyter keep shadows of pictures there."""
    others = 0
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith("."):
                continue
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield Path(here, name)
            else:
                others += 1
        if others > MOST_OTHER_FILES:
            raise UserError(
                f"{folder} holds more than {MOST_OTHER_FILES:,} files that are no images; give their folder"
            )


def _read_image(path: Path) -> NDArray[np.uint8]:
    return np.array(read_picture(path, LARGEST_IMAGE))


def _check(what: str, dtype: np.dtype[Any], shape: Iterable[int]) -> tuple[int, tuple[int, int]]:
    """Return number and size of the images, or say why these are none."""
    shape = tuple(shape)
    if len(shape) != 4 or shape[3] != 3:
        raise UserError(f"{what} must be images [N, height, width, 3], got {list(shape)}")
    if dtype != np.uint8:
        raise UserError(f"{what} must be uint8, 0 to 255, got {dtype}; convert the images first")
    if 0 in shape:
        raise UserError(f"{what} holds no images, its shape is {list(shape)}")
    if shape[0] > MOST_IMAGES:
        raise UserError(f"{what} are {shape[0]:,} images, more than {MOST_IMAGES:,}, the limit")
    if shape[1] * shape[2] > LARGEST_IMAGE:
        raise UserError(f"{what} have {shape[1]} x {shape[2]} pixels, more than {LARGEST_IMAGE:,}, the limit")
    return shape[0], (shape[1], shape[2])


def _hash_files(folder: Path, files: list[Path]) -> str:
    """SHA-256 of the list of the files' own SHA-256 and names."""
    lines = [[hash_file(path), path.relative_to(folder).as_posix()] for path in files]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"
