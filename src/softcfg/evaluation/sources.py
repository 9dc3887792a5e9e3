"""Images to be measured, read as a stream: ADM .npz batches, folders of image files, run folders, arrays."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softcfg.errors import UserError
from softcfg.files import hash_file

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SHARDS = "shard-*.safetensors"
PICTURES_OF_A_RUN = ("grid.png", "comparison.png")  # beside run.json; they show the samples, but are none


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
        """Yield all images in their order, uint8 `[batch_size, H, W, 3]`; the last batch may be shorter."""
        for array in self._arrays(batch_size):
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
    path = Path(source)
    if path.is_dir():
        shards = sorted((path / "shards").glob(SHARDS)) or sorted(path.glob(SHARDS))
        return ShardsSource(path, shards) if shards else FolderSource(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give an .npz file, a folder of images or a run folder")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no .npz file, or a truncated one; give an .npz file or a folder of images")
    return NpzSource(path)


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
        with _open_member(path, "arr_0") as (_, shape, dtype, fortran):
            self.count, self.size = _check(f"arr_0 of {path}", dtype, shape)
        # Only an array in C order holds one image after the other.
        self.array = _read_array(path, "arr_0") if fortran else None
        self.labels = self._labels()

    def _labels(self) -> Tensor | None:
        """`arr_1`, where the samplers of ADM put the classes."""
        with zipfile.ZipFile(self.path) as archive:
            if "arr_1.npy" not in archive.namelist():
                return None
        with _open_member(self.path, "arr_1") as (_, shape, dtype, _):
            if shape != (self.count,) or not np.issubdtype(dtype, np.integer):
                return None  # something else
        return torch.from_numpy(_read_array(self.path, "arr_1").astype(np.int64))

    def _hash(self) -> str:
        return hash_file(self.path)

    def _arrays(self, count: int) -> Iterator[NDArray[np.uint8]]:
        if self.array is not None:
            yield from ArraySource(self.array)._arrays(count)
            return
        height, width = self.size
        with _open_member(self.path, "arr_0") as (stream, _, _, _):
            for start in range(0, self.count, count):
                n = min(count, self.count - start)
                data = bytearray(n * height * width * 3)
                with _reading(self.path, "arr_0"):
                    _fill(stream, data)  # at the end the checksum is compared
                yield np.frombuffer(data, dtype=np.uint8).reshape(n, height, width, 3)


@contextlib.contextmanager
def _open_member(path: Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any], bool]]:
    """One array in an .npz file: its stream, behind the header; shape, dtype, and whether in Fortran order."""
    with contextlib.ExitStack() as stack:
        with _reading(path, name):
            archive = stack.enter_context(zipfile.ZipFile(path))
            names = [member.removesuffix(".npy") for member in archive.namelist()]
            if name not in names:
                raise UserError(f"{path} has no array {name}, the images; it holds {', '.join(names) or 'nothing'}")
            stream = stack.enter_context(archive.open(f"{name}.npy"))
            old = np.lib.format.read_magic(stream) == (1, 0)
            # Version 3 differs from 2 in the encoding of field names alone, and images have no fields.
            read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read_header(stream)
        yield stream, shape, dtype, fortran


@contextlib.contextmanager
def _reading(path: Path, name: str) -> Iterator[None]:
    """Turns errors of reading into one sentence."""
    try:
        yield
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged: its array {name} cannot be read ({error})") from error


class FolderSource(ImageSource):
    """Image files in a folder and the folders in it, in the order of their names."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        skipped = {folder / name for name in PICTURES_OF_A_RUN} if (folder / "run.json").exists() else set()
        self.files = sorted(
            path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path not in skipped
        )
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


class ShardsSource(ImageSource):
    """The pixels in the shards of a sampling run, in the order of their indices."""

    def __init__(self, folder: Path, shards: list[Path]) -> None:
        self.name = str(folder)
        self.folder = folder
        found: list[NDArray[np.int64]] = []
        sizes: dict[tuple[int, int], str] = {}
        for path in shards:
            indices, shape = _shard_header(path)
            found.append(indices)
            count, size = _check(f"pixels of {path}", np.dtype(np.uint8), shape)
            if count != len(indices):
                raise UserError(f"{path} is damaged: {len(indices)} indices for {count} images")
            sizes.setdefault(size, path.name)
        if len(sizes) > 1:
            listed = ", ".join(f"{name} has {_by(size)}" for size, name in sizes.items())
            raise UserError(f"the shards of {folder} differ in image size: {listed}")
        indices = np.concatenate(found)
        if len(np.unique(indices)) != len(indices):
            raise UserError(f"the shards of {folder} hold some images twice")
        self.shards = shards
        self.count, self.size = len(indices), next(iter(sizes))
        # Where the images lie, in the order of their indices: number of the shard and row in it.
        places = [(shard, row) for shard, part in enumerate(found) for row in range(len(part))]
        order = indices.argsort()
        self.places = [places[n] for n in order]
        labels = [_shard_labels(path) for path in shards]
        if all(part is not None for part in labels):
            self.labels = torch.cat(labels)[torch.from_numpy(order)]  # type: ignore[arg-type]

    def _hash(self) -> str:
        return _hash_files(self.folder, self.shards)

    def _arrays(self, count: int) -> Iterator[NDArray[np.uint8]]:
        from safetensors import safe_open

        for start in range(0, self.count, count):
            places = self.places[start : start + count]
            images = np.empty((len(places), *self.size, 3), dtype=np.uint8)
            for shard in sorted({shard for shard, _ in places}):
                with safe_open(self.shards[shard], "np") as file:
                    pixels = file.get_slice("pixels")
                    for n, (place, row) in enumerate(places):
                        if place == shard:
                            images[n] = pixels[row]
            yield images


def _shard_header(path: Path) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as shard:
            pixels = shard.get_slice("pixels")
            if pixels.get_dtype() != "U8":
                raise UserError(f"pixels of {path} are {pixels.get_dtype()}; they must be uint8")
            return shard.get_tensor("indices").numpy(), tuple(pixels.get_shape())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no shard of a run, or damaged ({error})") from error


def _shard_labels(path: Path) -> Tensor | None:
    from safetensors import safe_open

    with safe_open(path, "pt") as shard:
        return shard.get_tensor("labels") if "labels" in shard.keys() else None  # noqa: SIM118


def _read_image(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
                raise UserError(f"{path} is partly transparent; put it on a background first")
            if image.mode not in ("RGB", "RGBA", "L", "P"):
                raise UserError(f"{path} has the mode {image.mode}; images must be RGB or grey, 8 bits a channel")
            return np.array(image.convert("RGB"))
    except UserError:
        raise
    except Exception as error:  # decoders raise a dozen types on damaged files
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def _read_array(path: Path, name: str) -> NDArray[Any]:
    with _reading(path, name), np.load(path, allow_pickle=False) as file:
        return file[name]


def _check(what: str, dtype: np.dtype[Any], shape: Iterable[int]) -> tuple[int, tuple[int, int]]:
    """Return number and size of the images, or say why these are none."""
    shape = tuple(shape)
    if len(shape) != 4 or shape[3] != 3:
        raise UserError(f"{what} must be images [N, height, width, 3], got {list(shape)}")
    if dtype != np.uint8:
        raise UserError(f"{what} must be uint8, 0 to 255, got {dtype}; convert the images first")
    if 0 in shape:
        raise UserError(f"{what} holds no images, its shape is {list(shape)}")
    return shape[0], (shape[1], shape[2])


def _fill(stream: IO[bytes], data: bytearray) -> None:
    """Read into all of `data`."""
    view = memoryview(data)
    while view:
        read = stream.readinto(view)  # type: ignore[attr-defined]
        if not read:
            raise EOFError("it ends early")
        view = view[read:]


def _hash_files(folder: Path, files: list[Path]) -> str:
    """SHA-256 of the list of the files' own SHA-256 and names."""
    lines = [[hash_file(path), path.relative_to(folder).as_posix()] for path in files]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"
