"""Read weights files without executing anything in them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from softcfg.errors import CheckpointError, clean, quote
from softcfg.files import as_path, hash_file, is_folder, open_regular, read_text, reading, reopened
from softcfg.zoo.unwrapping import ENTRIES, Found, Match, find_weights, require_plain

if TYPE_CHECKING:
    from torch import Tensor

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
MOST_FILES = 1000  # of an index
LARGEST_JSON = 1 << 24  # bytes of an index or a configuration
LARGEST_HEADER = 1 << 24  # bytes of the header of a .safetensors file
# What training checkpoints keep beside weights: settings, numpy scalars, paths. None of it is needed.
HARMLESS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "typing.Any",
    "collections.defaultdict",
    *(f"builtins.{name}" for name in ("bool", "bytes", "complex", "dict", "float", "int", "list", "str", "tuple")),
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    *(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
    *(f"pathlib.{kind}" for kind in ("Path", "PurePath", "PurePosixPath", "PureWindowsPath")),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(
        f"omegaconf.nodes.{kind}Node"
        for kind in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Interpolation", "Path", "String")
    ),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.ndarray",
    "numpy.dtype",
)
MOST_GROWTH = 4  # times the size of its file that the tensors of a checkpoint may have: some share their numbers


def read_state_dict(
    path: str | Path, entries: Sequence[str] = ENTRIES, allowed_types: Sequence[type] = ()
) -> dict[str, Tensor]:
    """Read a weights file (.safetensors, or .bin, .pt, .pth, .ckpt of PyTorch) without executing anything in it.

    Of weights in several files, `path` is the index.

    Tensors are mapped from the file where its format allows, so that reading is cheap until they are used.

    Args:
        entries: keys under which a training checkpoint may hold the weights, the preferred one first.
        allowed_types: types that the file may hold beside tensors, plain containers and the `HARMLESS`.

    Raises:
        CheckpointError: the file is missing, empty, truncated, unsafe to open or no weights file.
    """
    return read_weights(path, entries, allowed_types).tensors


def read_weights(
    path: str | Path,
    entries: Sequence[str] = ENTRIES,
    allowed_types: Sequence[type] = (),
    match: Match | None = None,
    wanted: int = 0,
) -> Found:
    """Like `read_state_dict`, with what was unwrapped; `match` and `wanted` as in `find_weights`."""
    path = as_path(path)
    if is_index(path):
        content, size = _read_shards(path), sum(os.path.getsize(part) for part in shards_of(path))
    else:
        content, size = _read_content(path, allowed_types)
    found = find_weights(content, str(path), entries, match, wanted)
    require_plain(found.tensors, str(path))
    if (unpacked := sum(tensor.numel() * tensor.itemsize for tensor in found.tensors.values())) > MOST_GROWTH * size:
        raise CheckpointError(
            f"{path} was refused: its {size:,} bytes unpack to {unpacked:,}, more than {MOST_GROWTH} times as many"
        )
    return found


def _read_content(path: Path, allowed_types: Sequence[type] = ()) -> tuple[Any, int]:
    """What a weights file holds, and its size in bytes."""
    import torch
    from safetensors.torch import load_file

    with _open_weights(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = _read_head(file, path, size)
        try:
            if path.suffix.lower() == ".safetensors":
                content: Any = load_file(reopened(file))
            else:
                mapped = head.startswith(b"PK")
                if mapped:
                    _require_stored(file, path)
                with torch.serialization.safe_globals([*allowed_types, *_placeholders()]):
                    content = torch.load(reopened(file), map_location="cpu", weights_only=True, mmap=mapped)
        except CheckpointError:
            raise
        except Exception as error:  # readers raise a dozen types on damaged files
            if forbidden := re.search(r"GLOBAL ([\w.]+)", str(error)):
                raise CheckpointError(
                    f"{path} was refused: it contains Python objects other than tensors ({clean(forbidden[1], 100)}), "
                    "which could run code when opened; save its tensors alone, best as .safetensors"
                ) from error
            raise CheckpointError(f"{path} is truncated, damaged or not a weights file; get it again") from error
    return content, size


def _require_stored(file: BinaryIO, path: Path) -> None:
    """Raise `CheckpointError` for an archive whose records are compressed: PyTorch maps their bytes as they are."""
    with zipfile.ZipFile(file) as archive:
        compressed = any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist())
    if compressed:
        raise CheckpointError(
            f"{path} is a compressed archive: some program packed it anew; get the file as `torch.save` wrote it"
        )


@cache
def _placeholders() -> tuple[type, ...]:
    """A class for each of `HARMLESS` that has its name and keeps nothing: the code of the real one never runs."""
    return tuple(
        type(name.rpartition(".")[2], (_Ignored,), {"__module__": name.rpartition(".")[0]}) for name in HARMLESS
    )


class _Ignored:
    def __new__(cls, *args: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def is_index(path: Path) -> bool:
    """Whether the file is the index of weights in several files."""
    return path.name.endswith(INDEX_SUFFIXES)


def shards_of(index: Path) -> list[Path]:
    """Return the files that the index of a checkpoint lists, beside it.

    Raises:
        CheckpointError: it is not such an index.
    """
    names = _weight_map(index).values()
    return [index.with_name(name) for name in dict.fromkeys(names)]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is not an index of weights files: it has no weight_map; get it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
            raise CheckpointError(f"{index} names {quote(name)}, which is not a file beside it")
        if not name.lower().endswith((".safetensors", *TORCH_SUFFIXES)):
            raise CheckpointError(f"{index} names {quote(name)}, which is not a weights file")
    if (files := len(set(weight_map.values()))) > MOST_FILES:
        raise CheckpointError(f"{index} names {files:,} files, more than {MOST_FILES:,}, the limit")
    return weight_map


def _read_shards(index: Path) -> dict[str, Any]:
    """What the files of an index hold, each of what the index says; the tensors stay mapped until they are used."""
    weight_map = _weight_map(index)
    tensors: dict[str, Any] = {}
    for path in shards_of(index):
        content, _ = _read_content(path)
        find_weights(content, str(path))
        tensors |= {name: tensor for name, tensor in content.items() if weight_map.get(name) == path.name}
    if lacking := [name for name in weight_map if name not in tensors]:
        raise CheckpointError(
            f"{index} lists {len(lacking)} tensors that its files lack, {quote(lacking[0])} among them"
        )
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping; raises `CheckpointError` if it is anything else."""
    with reading(path, CheckpointError):
        text = read_text(path, LARGEST_JSON)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or no JSON file; get it again ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a mapping of names to values")
    return content


def _open_weights(path: Path) -> BinaryIO:
    if is_folder(path):
        raise CheckpointError(f"{path} is a folder; give the path of a weights file")
    with reading(path, CheckpointError):
        return open_regular(path)


def _read_head(file: BinaryIO, path: Path, size: int) -> bytes:
    """Return the first bytes of a weights file of `size` bytes, or say what the file is instead."""
    with reading(path, CheckpointError):
        head = file.read(512)
        file.seek(0)
    if not head:
        raise CheckpointError(f"{path} is empty; get it again")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not weights; download the file itself, in a browser")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not weights; get it with `git lfs pull`")
    if path.suffix.lower() not in (".safetensors", *TORCH_SUFFIXES):
        raise CheckpointError(f"{path} must end in one of .safetensors, {', '.join(TORCH_SUFFIXES)}")
    if path.suffix.lower() == ".safetensors" and LARGEST_HEADER < int.from_bytes(head[:8], "little") < size:
        raise CheckpointError(f"{path} has a header of more than {LARGEST_HEADER:,} bytes, the limit")
    return head


def hash_weights(path: str | Path) -> str:
    """Return the SHA-256 of a weights file; of weights in several files, that of their hashes, in order."""
    path = as_path(path)
    if not is_index(path):
        return hash_file(path)
    hashes = "\n".join(hash_file(part) for part in (path, *shards_of(path)))
    return hashlib.sha256(hashes.encode()).hexdigest()
