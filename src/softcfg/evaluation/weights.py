"""Weights of feature networks: found, downloaded once, checked, loaded."""

from __future__ import annotations

import atexit
import functools
import hashlib
import http.client
import shutil
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from softcfg.errors import CheckpointError, UserError
from softcfg.files import file_states, hash_file, is_file, make_folder, open_atomically
from softcfg.zoo.files import checkpoints_folder
from softcfg.zoo.loading import load_weights
from softcfg.zoo.reading import read_state_dict

Network = TypeVar("Network", bound=nn.Module)

TIMEOUT = 30  # seconds without an answer


@dataclass(frozen=True)
class PublishedFile:
    """A file on the web whose content is known."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


INCEPTION_WEIGHTS = PublishedFile(
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)


def load_network(
    network: Callable[[], Network], path: str | Path, device: torch.device, dtype: torch.dtype
) -> tuple[Network, str]:
    """Build `network()` with the weights at `path`, for inference; return it and the SHA-256 of the file.

    Raises:
        CheckpointError: the file is missing, damaged, or does not fit.
    """
    before = file_states([path], CheckpointError)
    state = read_state_dict(path)
    module = load_weights(
        lambda _: network(),  # type: ignore[arg-type]  # a network without a configuration
        None,
        state,
        device=device,
        dtype=dtype,
        source=str(path),
    )
    digest = hash_file(path)
    if file_states([path], CheckpointError) != before:
        raise CheckpointError(f"{path} changed while it was read; try again")
    return module, digest  # type: ignore[return-value]


def require_weights(file: PublishedFile) -> Path:
    """Return where `file` lies in the checkpoints folder; download it if it is not there.

    Where nothing can be written into that folder, it is downloaded for this process alone, with a warning.

    Raises:
        CheckpointError: it cannot be downloaded, or is not what was published; nothing is left behind.
    """
    path = checkpoints_folder() / file.name
    if is_file(path):
        return path
    try:
        make_folder(path.parent)
    except UserError as error:
        path = _own_folder() / file.name
        if is_file(path):
            return path
        warnings.warn(f"{file.name} is not kept: {error}; $SOFTCFG_CHECKPOINTS names another folder", stacklevel=2)
    return download(file, path)


@functools.cache
def _own_folder() -> Path:
    """A folder that goes when the process ends."""
    folder = tempfile.mkdtemp(prefix="softcfg-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def download(file: PublishedFile, target: Path) -> Path:
    """Download `file` to `target`, which is there afterwards with the published content, or not at all.

    Raises:
        CheckpointError: see `require_weights`.
    """
    from tqdm import tqdm

    make_folder(target.parent)
    by_hand = f"download it by other means, and put it into {target.parent} or give its path"
    try:
        digest = hashlib.sha256()
        with urllib.request.urlopen(file.url, timeout=TIMEOUT) as response, open_atomically(target) as out:
            size = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, desc=file.name, unit="B", unit_scale=True, disable=None) as bar:
                while block := response.read(1 << 20):
                    out.write(block)
                    digest.update(block)
                    bar.update(len(block))
            if digest.hexdigest() != file.sha256:
                raise CheckpointError(
                    f"{file.url} was downloaded, but its SHA-256 is {digest.hexdigest()[:16]}... and not "
                    f"{file.sha256[:16]}...: it is damaged or not the published file; try again, or {by_hand}"
                )
    except CheckpointError:
        raise
    except (OSError, UserError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise CheckpointError(f"{file.url} cannot be downloaded ({reason}); {by_hand}") from error
    return target
