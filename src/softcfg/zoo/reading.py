"""Read weights files without executing anything in them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from softcfg.errors import CheckpointError, clean, quote
from softcfg.files import hash_file, is_folder, open_regular, read_text, reopened

if TYPE_CHECKING:
    from torch import Tensor

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
INDEX_SUFFIX = ".safetensors.index.json"
MOST_FILES = 1000  # of an index
LARGEST_JSON = 1 << 24  # bytes of an index or a configuration
LARGEST_HEADER = 1 << 24  # bytes of the header of a .safetensors file
UNPACKED = 4  # times the size of its file that the tensors of a checkpoint may have: some share their numbers


def read_state_dict(
    path: str | Path, entries: Sequence[str] = ("model", "state_dict"), allowed_types: Sequence[type] = ()
) -> dict[str, Tensor]:
    """Read a weights file (.safetensors, or .bin, .pt, .pth, .ckpt of PyTorch) without executing anything in it.

    Of weights in several .safetensors files, `path` is the index.

    Tensors are mapped from the file where its format allows, so that reading is cheap until they are used.

    Args:
        entries: keys under which a training checkpoint may hold the weights, the preferred one first.
        allowed_types: harmless types that the file may hold beside tensors and plain containers.

    Raises:
        CheckpointError: the file is missing, empty, truncated, unsafe to open or no weights file.
    """
    import torch
    from safetensors.torch import load_file

    path = Path(path)
    if is_index(path):
        return _read_shards(path)
    with _open_weights(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = _read_head(file, path, size)
        try:
            if path.suffix == ".safetensors":
                content = load_file(reopened(file))
            else:
                with torch.serialization.safe_globals(list(allowed_types)):
                    mapped = head.startswith(b"PK")
                    content = torch.load(reopened(file), map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # readers raise a dozen types on damaged files
            if forbidden := re.search(r"GLOBAL ([\w.]+)", str(error)):
                raise CheckpointError(
                    f"{path} was refused: it contains Python objects other than tensors ({clean(forbidden[1], 100)}), "
                    "which could run code when opened; save its tensors alone, best as .safetensors"
                ) from error
            raise CheckpointError(f"{path} is truncated, damaged or no weights file; get it again") from error
    state = unwrap(content, str(path), entries)
    if (unpacked := sum(tensor.numel() * tensor.itemsize for tensor in state.values())) > UNPACKED * size:
        raise CheckpointError(
            f"{path} was refused: its {size:,} bytes unpack to {unpacked:,}, more than {UNPACKED} times as many"
        )
    return state


def is_index(path: Path) -> bool:
    """Whether the file is the index of weights in several files."""
    return path.name.endswith(INDEX_SUFFIX)


def shards_of(index: Path) -> list[Path]:
    """Return the files that the index of a checkpoint lists, beside it.

    Raises:
        CheckpointError: it is no such index.
    """
    names = _weight_map(index).values()
    return [index.with_name(name) for name in dict.fromkeys(names)]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is no index of weights files: it has no weight_map; get it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
            raise CheckpointError(f"{index} names {quote(name)}, which is no file beside it")
        if not name.endswith((".safetensors", *TORCH_SUFFIXES)):
            raise CheckpointError(f"{index} names {quote(name)}, which is no weights file")
    if (files := len(set(weight_map.values()))) > MOST_FILES:
        raise CheckpointError(f"{index} names {files:,} files, more than {MOST_FILES:,}, the limit")
    return weight_map


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files of an index; they stay mapped until they are used."""
    tensors: dict[str, Tensor] = {}
    for path in shards_of(index):
        tensors.update(read_state_dict(path))
    if lacking := [name for name in _weight_map(index) if name not in tensors]:
        raise CheckpointError(
            f"{index} lists {len(lacking)} tensors that its files lack, {quote(lacking[0])} among them"
        )
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping; raises `CheckpointError` if it is anything else."""
    try:
        content = json.loads(read_text(path, LARGEST_JSON))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or no JSON file; get it again ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a mapping of names to values")
    return content


def _open_weights(path: Path) -> BinaryIO:
    if is_folder(path):
        raise CheckpointError(f"{path} is a folder; give the path of a weights file")
    try:
        return open_regular(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _read_head(file: BinaryIO, path: Path, size: int) -> bytes:
    """Return the first bytes of a weights file of `size` bytes, or say what the file is instead."""
    try:
        head = file.read(512)
        file.seek(0)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{path} is empty; get it again")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not weights; download the file itself, in a browser")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not weights; get it with `git lfs pull`")
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise CheckpointError(f"{path} must end in one of .safetensors, {', '.join(TORCH_SUFFIXES)}")
    if path.suffix == ".safetensors" and LARGEST_HEADER < int.from_bytes(head[:8], "little") < size:
        raise CheckpointError(f"{path} has a header of more than {LARGEST_HEADER:,} bytes, the limit")
    return head


def unwrap(content: Any, source: str, entries: Sequence[str] = ("model", "state_dict")) -> dict[str, Tensor]:
    """Return the state dict in `content`: itself, or what it holds under the first of `entries` it has.

    A prefix "module." that all names share is dropped.

    Raises:
        CheckpointError: there is no mapping of names to tensors.
    """
    import torch

    if isinstance(content, Mapping):
        content = next((content[name] for name in entries if isinstance(content.get(name), Mapping)), content)
    problem = f"{source} holds no mapping of names to tensors"
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{problem} but a {type(content).__name__}")
    if not content:
        raise CheckpointError(f"{problem}: it is empty")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{problem}: under {quote(name)} there is a {type(value).__name__}")
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{problem}: under {quote(name)} there is a sparse or quantized one")
    if all(name.startswith("module.") for name in content):
        return {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return dict(content)


def hash_weights(path: str | Path) -> str:
    """Return the SHA-256 of a weights file; of weights in several files, that of their hashes, in order."""
    path = Path(path)
    if not is_index(path):
        return hash_file(path)
    hashes = "\n".join(hash_file(part) for part in (path, *shards_of(path)))
    return hashlib.sha256(hashes.encode()).hexdigest()
