"""Where the files of models lie, and how to get those that are missing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from softcfg.errors import CheckpointError
from softcfg.files import as_path, is_file
from softcfg.zoo.reading import is_index, shards_of
from softcfg.zoo.registry import ModelEntry, ModelFile

FOLDER_VARIABLE = "SOFTCFG_CHECKPOINTS"


def checkpoints_folder() -> Path:
    """The folder of weights files put in place by hand: $SOFTCFG_CHECKPOINTS, or one in the user's cache."""
    return as_path(os.environ.get(FOLDER_VARIABLE) or "~/.cache/softcfg/checkpoints")


def find_file(file: ModelFile) -> Path | None:
    """Return where a model's file lies: its own folder, the checkpoints folder, or the Hugging Face cache."""
    path = (file.folder or checkpoints_folder()) / file.local_name
    if file.repository and not is_whole(path):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(file.repository, file.name)
        if isinstance(cached, str):
            return Path(cached)
    return path if is_file(path) else None


def is_whole(path: Path) -> bool:
    """Whether there is such a file and, beside an index, all that it lists: index and parts come from one place."""
    return is_file(path) and not (is_index(path) and lacking(path))


def lacking(index: Path) -> list[Path]:
    """The files that an index lists and that are not beside it."""
    return [shard for shard in shards_of(index) if not is_file(shard)]


def require_file(file: ModelFile, entry: ModelEntry) -> Path:
    """Return where a file of `entry` lies.

    Raises:
        CheckpointError: it is nowhere; the text says how to get it.
    """
    path = find_file(file)
    for missing in missing_files([file]):
        raise CheckpointError(f"{missing.name} of {entry.name} is missing: {how_to_get([missing], entry)}")
    assert path is not None
    return path


def require_files(entry: ModelEntry, *given: object) -> None:
    """Raise a `CheckpointError` that names all files of `entry` that are missing.

    Args:
        given: files that take the place of the weights of the generator and of the tokenizer; None: the model's own.
    """
    replaced = [part.file for part, file in zip(entry.components, given, strict=False) if file is not None]
    missing = missing_files(file for file in entry.files if file not in replaced)
    if missing:
        names, are = ", ".join(file.name for file in missing), "is" if len(missing) == 1 else "are"
        raise CheckpointError(f"{names} of {entry.name} {are} missing: {how_to_get(missing, entry)}")


def missing_files(files: Iterable[ModelFile]) -> list[ModelFile]:
    """Return those of `files`, and of the files that indexes among them list, that are not here."""
    missing = []
    for file in files:
        path = find_file(file)
        if path is None:
            missing.append(file)
        elif is_index(path):
            missing += [file.beside(shard.name) for shard in lacking(path)]
    return missing


def how_to_get(files: Sequence[ModelFile], entry: ModelEntry) -> str:
    """Say, in the imperative, how the user gets missing files of `entry`."""
    by_hand = [file for file in files if file.drive_id]
    if by_hand:
        links = " and ".join(f"{file.local_name} ({file.published})" for file in by_hand)
        them, names = ("it", "this name") if len(by_hand) == 1 else ("them", "these names")
        return (
            f"download {links} in a browser and put {them} into {checkpoints_folder()} under {names}, "
            f"which `softcfg fetch {entry.name} --from PATH` does too"
        )
    if entry.folder:
        return f"put it into {entry.folder}"
    return f"run `softcfg fetch {entry.name}`"
