"""Bring the files of models onto this machine and check that they fit."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from softcfg.errors import CheckpointError, UserError, quote
from softcfg.files import TEMPORARY, as_path, hash_file, is_file, is_folder, open_atomically, open_regular
from softcfg.zoo.files import checkpoints_folder, how_to_get, is_whole, require_file
from softcfg.zoo.loading import config_of_texts, empty_module, require_fit, weights_for, with_config_file
from softcfg.zoo.reading import is_index, shards_of
from softcfg.zoo.registry import ModelEntry, ModelFile, is_repository, read_model_folder, resolve

TRIES = 3  # of a download that breaks off


def fetch(model: str | Path | ModelEntry, source: str | Path | None = None, *, link: bool = False) -> list[Path]:
    """Bring the weights of a model onto this machine, check that they fit it, and return where they lie.

    A model may also be the repository, "user/name", of a model folder on Hugging Face. Files there are downloaded by
    its own client, into its own cache. Those on Google Drive are downloaded in a browser, and taken from `source` into
    the checkpoints folder.

    Args:
        source: a file, or a folder, of which those with the names of the model's files are taken.
        link: make symbolic links to `source` rather than copies.

    Raises:
        CheckpointError: a file cannot be had, is damaged or does not fit; nothing is left half-written.
        UserError: a `source` for a model whose files are in its own folder or repository.
    """
    if isinstance(model, str) and is_repository(model):
        if source is not None:
            raise UserError(f"{model} is downloaded from Hugging Face, as a whole: leave out --from (source)")
        return _fetch_repository(model)
    entry = resolve(model)
    if entry.folder and source is not None:
        where = "bundled with softcfg" if entry.bundled else f"the folder {entry.folder}"
        raise UserError(f"{entry.name} is {where} and takes no files from elsewhere: leave out --from (source)")
    if entry.folder:
        return [require_file(file, entry) for file in entry.files]
    if source is not None:
        return _take(entry, as_path(source), link)
    found: dict[ModelFile, Path] = {}
    missing: list[ModelFile] = []
    for file in entry.files:
        local = checkpoints_folder() / file.local_name
        if is_whole(local):
            found[file] = local
        elif file.repository:
            found[file] = _download(file)
        else:
            missing.append(file)
            continue
        if is_index(found[file]):
            for shard in shards_of(found[file]):
                found[file.beside(shard.name)] = shard if found[file] == local else _download(file.beside(shard.name))
    _check_files(entry, found)
    if missing:
        raise CheckpointError(f"{entry.name} cannot be downloaded by a program: {how_to_get(missing, entry)}")
    return list(found.values())


def _fetch_repository(repository: str) -> list[Path]:
    """Download `model.yaml` of a repository and the files that it names, into one folder of the Hugging Face cache."""
    try:
        description = _download(ModelFile("model.yaml", repository))
    except CheckpointError as error:
        raise CheckpointError(f"there is no folder {repository}, and {error}") from error
    entry = read_model_folder(description.parent)
    found: dict[ModelFile, Path] = {}
    for file in entry.files:
        if Path(file.name).is_absolute() or ".." in Path(file.name).parts:
            raise CheckpointError(f"model.yaml of {repository} names {quote(file.name)}, which is not beside it")
        found[file] = _download(ModelFile(file.name, repository))
        if is_index(found[file]):
            for shard in shards_of(found[file]):
                found[file.beside(shard.name)] = _download(ModelFile(shard.name, repository))
    _check_files(entry, found)
    return [description, *found.values()]


def _check_files(entry: ModelEntry, found: Mapping[ModelFile, Path]) -> None:
    """Raise a `CheckpointError` unless the weights files among `found` hold exactly the tensors of their parts.

    No tensor is allocated.
    """
    for component in entry.components:
        if component.config_file is not None and component.config_file in found:
            component = replace(component, config=with_config_file(component, found[component.config_file]))
        if component.file in found:
            path = found[component.file]
            module, family = empty_module(component), component.family
            require_fit(module, *weights_for(module, family, path), extras=family.extras)
    config_of_texts(entry, found)


def _download(file: ModelFile) -> Path:
    """Download a file into the Hugging Face cache and compare it with the hash that the Hub gives for it.

    One that is damaged is downloaded once more.
    """
    from huggingface_hub import constants

    path = _from_hub(file)
    if _is_damaged(path) and not constants.HF_HUB_OFFLINE:
        path = _from_hub(file, force=True)
    if _is_damaged(path):
        raise CheckpointError(f"{path} is damaged, its hash is not the Hub's; fetch it again")
    return path


def _is_damaged(path: Path) -> bool:
    """Whether a file of the cache is not what the name of its blob says: its SHA-256 or, of small files, git's hash."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{40}", name):
        return hash_file(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)) != name
    return re.fullmatch(r"[0-9a-f]{64}", name) is not None and hash_file(path) != name


def _from_hub(file: ModelFile, *, force: bool = False) -> Path:
    """Where the client of Hugging Face has a file; with `force` it is downloaded in any case."""
    from huggingface_hub import constants, errors, hf_hub_download

    page = f"{constants.ENDPOINT}/{file.repository}"
    reasons = (
        (errors.GatedRepoError, f"accept its licence at {page} first, and log in with `hf auth login`"),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private"),
        (errors.LocalEntryNotFoundError, f"{constants.ENDPOINT} cannot be reached"),
        (errors.EntryNotFoundError, "the repository has no such file"),
    )
    for left in reversed(range(TRIES)):
        try:
            path = Path(hf_hub_download(file.repository, file.name, force_download=force))
            break
        except Exception as error:  # the client lets errors of several libraries through
            known = next((text for kind, text in reasons if isinstance(error, kind)), None)
            reason = known or " ".join(str(error).split())
            if constants.HF_HUB_OFFLINE:
                reason = "it is not in the cache, and HF_HUB_OFFLINE forbids to download it"
            elif left and known is None and getattr(error, "errno", None) is None:
                continue  # a connection that broke: what has come is on the disk, and the client goes on from there
            raise CheckpointError(f"{file.name} was not downloaded from {file.repository}: {reason}") from error
    return path


def _take(entry: ModelEntry, source: Path, link: bool) -> list[Path]:
    """Put the files of `entry` that are in `source` into the checkpoints folder, once all are checked."""
    if not os.path.exists(source):
        raise CheckpointError(f"{source} does not exist")
    offered = {path.name: path for path in (source.iterdir() if is_folder(source) else [source])}
    found: dict[ModelFile, Path] = {}
    for file in entry.files:
        name = file.local_name if file.local_name in offered else file.name
        if name in offered:
            found[file] = offered[name]
            if is_index(offered[name]):
                found |= {file.beside(shard.name): shard for shard in shards_of(offered[name])}
    if not found:
        names = " nor ".join(file.name for file in entry.files)
        raise CheckpointError(f"{source} is or holds neither {names}")
    _check_files(entry, found)
    return [_place(path, file.local_name, link) for file, path in found.items()]


def _place(source: Path, name: str, link: bool) -> Path:
    """Copy or link a file into the checkpoints folder, under `name`, whole or not at all."""
    target = checkpoints_folder() / name
    if is_file(target) and target.samefile(source):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            _link(source.resolve(), target)
        else:
            with open_regular(source) as file, open_atomically(target, replace=True) as copy:
                shutil.copyfileobj(file, copy, 1 << 22)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{source} cannot be put into {target.parent}: {reason}") from error
    except UserError as error:
        raise CheckpointError(f"{source} cannot be put into {target.parent}: {error}") from error
    return target


def _link(source: Path, target: Path) -> None:
    """Make `target` a link to `source`, in place of what stands there."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}{TEMPORARY}")
    temporary.symlink_to(source)
    try:
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
