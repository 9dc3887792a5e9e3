"""Images to be measured, read as a stream: ADM .npz batches, folders of image files, run folders, arrays."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softcfg.errors import UserError, clean, quote
from softcfg.evaluation.npz import fill, finish, is_npz, names, open_member, reading
from softcfg.files import FileStates, as_path, file_states, hash_file, is_file, is_folder
from softcfg.images import SUFFIXES, read_picture, resize
from softcfg.nn.limits import cores
from softcfg.nn.precision import dtype_name
from softcfg.runs.folder import PICTURES, SETTINGS, SHARDS, RunFolder
from softcfg.runs.plan import Prompts

if TYPE_CHECKING:
    from softcfg.images import Picture

    Images: TypeAlias = "str | Path | NDArray[Any] | Tensor | Sequence[Picture] | ImageSource"

LARGEST_IMAGE = 1 << 24  # pixels
MOST_IMAGES = 10_000_000
MOST_OTHER_FILES = 200_000  # and folders, in a folder of images
MOST_KINDS = 8  # of files that are named where they do not count
LARGEST_BATCH = 1 << 26  # bytes
LARGEST_IN_MEMORY = 1 << 28  # bytes of an array that cannot be read image by image


class ImageSource(ABC):
    """N images of one size, uint8 RGB, that can be read from the beginning any number of times.

    Attributes:
        name: where they come from.
        count: their number.
        size: height and width.
        labels: the classes that they were drawn for, int64 `[N]`, where the source says so; else None.
        prompts: the N prompts that they were drawn from, where the source says so; else None.
        files: those that they are read from.
    """

    name: str
    count: int
    size: tuple[int, int]
    labels: Tensor | None = None
    prompts: Sequence[str] | None = None
    files: Sequence[Path] = ()

    def __len__(self) -> int:
        return self.count

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content: that of the file where there is one file."""
        self._states  # noqa: B018  # before anything is read
        return self._hash()

    @cached_property
    def _states(self) -> FileStates:
        """Those of the files when they were first read."""
        return file_states(self.files)

    def require_unchanged(self) -> None:
        """Raise `UserError` if a file was written or replaced since the images, or their hash, were first read."""
        if file_states(self.files) != self._states:
            raise UserError(f"{self.name} changed while it was read; measure it again")

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield all images in their order, uint8 `[B, H, W, 3]`.

        B is `batch_size`, or less for large images: a batch has at most 64 MiB. The last batch may be shorter.
        """
        self._states  # noqa: B018  # before anything is read
        height, width = self.size
        for array in self._arrays(max(1, min(batch_size, LARGEST_BATCH // (3 * height * width)))):
            yield torch.from_numpy(array)

    @abstractmethod
    def _hash(self) -> str: ...

    @abstractmethod
    def _arrays(self, count: int) -> Iterator[NDArray[np.uint8]]: ...


def open_source(source: Images) -> ImageSource:
    """Open images: an .npz file with `arr_0`, a folder of images or of shards, an array `[N, H, W, 3]`, or pictures.

    Args:
        source: also a list of pictures of any kind that `softcfg.images.read_picture` reads, such as images of PIL.

    Raises:
        UserError: there are no images, or they are not uint8 RGB of one size.
    """
    if isinstance(source, ImageSource):
        return source
    if isinstance(source, Tensor):
        return ArraySource(_as_array(source))
    if isinstance(source, np.ndarray):
        return ArraySource(source)
    if isinstance(source, (list, tuple)):
        return ListSource(source)
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(
            "images must be the path of an .npz file, a folder of images or a run folder, an array uint8 [N, H, W, 3], "
            f"or a list of pictures, got {clean(quote(source), 100)}"
        )
    path = as_path(source)
    if is_folder(path):
        return _open_folder(path)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; give an .npz file, a folder of images or a run folder")
    if not is_npz(path):
        raise UserError(f"{path} is no .npz file, or a truncated one; give an .npz file or a folder of images")
    return NpzSource(path)


def files_read(given: Images | None, written: str | Path) -> list[str | Path]:
    """The files that are read of images or statistics; of a folder only `written`, if that is one of them."""
    if isinstance(given, (str, os.PathLike)):
        path, other = as_path(os.fspath(given)), as_path(written)
        if not is_folder(path):
            return [path]
        inside = os.path.realpath(other).startswith(os.path.join(os.path.realpath(path), ""))
        of_run = other.name == SETTINGS or re.fullmatch(r"shard-\d+\.safetensors", other.name)
        return [other] if inside and is_file(other) and (of_run or other.name.lower().endswith(SUFFIXES)) else []
    if isinstance(given, (list, tuple)):
        return [Path(os.path.expanduser(each)) for each in given if isinstance(each, (str, os.PathLike))]
    return []


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
        self.files = [path]
        self._states  # noqa: B018  # the shape and the labels are kept
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
                    fill(images.stream, data)
                    if start + n == self.count:
                        finish(images.stream)
                yield np.frombuffer(data, dtype=np.uint8).reshape(n, height, width, 3)


class ListSource(ImageSource):
    """Pictures one by one, of any kind that `read_picture` reads; each is read when its batch is."""

    workers = 1  # an image of PIL may be in the list twice

    def __init__(self, pictures: Sequence[Picture], names: Sequence[str] = (), name: str = "list") -> None:
        self.name = name
        self.count = len(pictures)
        self.pictures = pictures
        self.files = [Path(each) for each in pictures if isinstance(each, (str, os.PathLike))]
        self.names = names or [f"picture {n} of the list" for n in range(len(pictures))]
        if not pictures:
            raise UserError("the list of pictures holds no images")
        first = self._read(0)
        self.size = (first.shape[0], first.shape[1])

    def _hash(self) -> str:
        digest = hashlib.sha256(repr((self.count, *self.size, 3)).encode())
        for part in self._arrays(1024):
            digest.update(part.data)
        return digest.hexdigest()

    def _arrays(self, count: int) -> Iterator[NDArray[np.uint8]]:
        with ThreadPoolExecutor(self.workers) as workers:
            for start in range(0, self.count, count):
                yield np.stack(list(workers.map(self._read_sized, range(self.count)[start : start + count])))

    def _read(self, number: int) -> NDArray[np.uint8]:
        return np.array(read_picture(self.pictures[number], LARGEST_IMAGE, self.names[number]))

    def _read_sized(self, number: int) -> NDArray[np.uint8]:
        image = self._read(number)
        if image.shape[:2] != self.size:
            raise UserError(
                f"the images of {self.name} differ in size: {self.names[0]} is {_by(self.size)}, "
                f"{self.names[number]} is {_by(image.shape[:2])}"
            )
        return image


class FolderSource(ListSource):
    """Image files in a folder and the folders in it, also behind links, in the order of their names.

    Hidden ones do not count, nor do files of other kinds; a warning says what was left out, and why.
    """

    workers = min(8, cores())

    def __init__(self, folder: Path) -> None:
        own = {folder / name for name in PICTURES} if is_file(folder / SETTINGS) else set()
        found, left_out = _image_files(folder)
        files = sorted(path for path in found if path not in own)
        if left_out:
            left_out = f"left out: {clean(left_out, 500)}"
        if not files:
            problem = f"{folder} holds no images ({', '.join(SUFFIXES)}) and no shards of a run"
            raise UserError(f"{problem}; {left_out}" if left_out else problem)
        if left_out:
            warnings.warn(f"{clean(folder)}: {len(files):,} images are read; {left_out}", stacklevel=2)
        self.folder = folder
        super().__init__(files, [path.relative_to(folder).as_posix() for path in files], str(folder))

    def _hash(self) -> str:
        return _hash_files(self.folder, self.files)


class RunSource(ImageSource):
    """The pixels in the shards of a run; every shard is checked when it is read, and all must be there."""

    def __init__(self, run: RunFolder) -> None:
        self.name = str(run.path)
        self.run = run
        run.require_complete()
        self.count = run.plan.num_samples
        height, width = run.require(0).pixels.shape[1:3]
        self.size = (height, width)
        self.files = [run.shard_path(number) for number in range(run.plan.num_shards)]
        labels = run.plan.labels_of(range(self.count))
        self.labels = torch.tensor(labels)
        if prompts := Prompts.of(run.settings):
            self.prompts = [prompts.texts[label] for label in labels]

    def _hash(self) -> str:
        return _hash_files(self.run.path, self.files)

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


class ResizedSource(ImageSource):
    """The square images of another source, resized to `size` x `size` pixels as `softcfg.images.resize` does.

    Attributes:
        original: that source.
    """

    def __init__(self, original: ImageSource, size: int) -> None:
        if original.size[0] != original.size[1]:
            raise UserError(f"image_size_eval makes squares; the images of {original.name} are {_by(original.size)}")
        self.original = original
        self.name, self.count, self.size = original.name, original.count, (size, size)
        self.labels, self.prompts, self.files = original.labels, original.prompts, original.files

    def _hash(self) -> str:
        return hashlib.sha256(f"{self.original.fingerprint} {self.size}".encode()).hexdigest()

    def _arrays(self, count: int) -> Iterator[NDArray[np.uint8]]:
        for batch in self.original.batches(count):
            pixels = resize(batch.permute(0, 3, 1, 2).float(), self.size[0])
            yield pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _image_files(folder: Path) -> tuple[list[Path], str]:
    """Image files below a folder, and in words what else is there and does not count, "" if nothing is.

    Hidden files and folders do not count: macOS and Jupyter keep shadows of pictures there. Links to folders are
    followed, but each folder is read once, so none is read without end.
    """
    found: list[Path] = []
    others: Counter[str] = Counter()
    hidden = broken = again = 0
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    for here, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            again += 1
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        hidden += sum(name.startswith(".") for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            is_image = name.lower().endswith(SUFFIXES)
            if name.startswith("."):
                hidden += is_image
            elif is_image:
                found.append(Path(here, name))
            elif os.path.islink(path := os.path.join(here, name)) and not os.path.exists(path):
                broken += 1
            else:
                others[Path(name).suffix.lower()] += 1
        if others.total() + broken + len(seen) + again > MOST_OTHER_FILES:
            raise UserError(
                f"{folder} holds more than {MOST_OTHER_FILES:,} files that are no images; give their folder"
            )
    kinds = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in others.most_common(MOST_KINDS)]
    left_out = {
        "files of other kinds": ", ".join([*kinds, *(["others"] if len(others) > MOST_KINDS else [])]),
        "hidden files and folders": hidden,
        "links to what is not there": broken,
        "links to folders that are read already": again,
    }
    return found, ", ".join(f"{what} ({amount})" for what, amount in left_out.items() if amount)


def _as_array(images: Tensor) -> NDArray[Any]:
    """The values of a tensor of images; raises `UserError` if it has none that NumPy knows."""
    try:
        return images.detach().cpu().numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        dtype = dtype_name(images.dtype)
        raise UserError(f"images must be a dense tensor, uint8 [N, H, W, 3], got {dtype} on {images.device}") from error


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


def _hash_files(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 of the list of the files' own SHA-256 and names."""
    lines = [[hash_file(path), path.relative_to(folder).as_posix()] for path in files]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"
