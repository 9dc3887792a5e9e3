"""Tensors in files of a cache: what is damaged counts as absent, and is made again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from softcfg.files import make_folder, open_regular, reopened, write_atomically

if TYPE_CHECKING:
    from torch import Tensor


def read_kept(path: Path, limit: int | None = None) -> dict[str, Tensor] | None:
    """The tensors by name that `write_kept` wrote; None if they are absent, damaged or not as they were written.

    Args:
        limit: bytes that the file may have at most.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path, limit) as file, safe_open(reopened(file), "pt") as kept:
            tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
            expected = (kept.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return tensors if _digest(tensors) == expected else None


def write_kept(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of the CPU; the folder is made where it is missing.

    Raises:
        UserError: the file cannot be written.
    """
    from safetensors.torch import save

    make_folder(path.parent)
    content = save(dict(tensors), {"sha256": _digest(tensors)})
    write_atomically(path, content, durable=False, replace=True)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the name, dtype, shape and bytes of every tensor."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
