"""Weights files: where they lie, how they are fetched, read, checked against a configuration, and loaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.configuration import ConfigSource, load_config
from softcfg.errors import CheckpointError, UserError
from softcfg.prompts import PromptReader
from softcfg.zoo.registry import (
    GENERATORS,
    MODELS,
    TOKENIZERS,
    Family,
    ModelEntry,
    ModelFile,
    Part,
    find,
    resolve,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from softcfg.models.base import Generator
    from softcfg.tokenizers.base import Tokenizer

FOLDER_VARIABLE = "SOFTCFG_CHECKPOINTS"
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
INDEX_SUFFIX = ".safetensors.index.json"
SHOWN = 4  # names listed in an error message, of each kind


# ---- loading


def load_generator(
    family: str | Path | ModelEntry,
    config: ConfigSource | None = None,
    checkpoint: str | Path | Mapping[str, Tensor] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Generator:
    """Load a generator in eval mode, its parameters without gradients.

    Args:
        family: a family ("alitok", "rar", "robustok", "llamagen"); or a model of the zoo ("alitok-xl") or a model
            folder, which then supplies what is not given.
        config: the family's configuration dataclass, a mapping (flat or as released) or a YAML file.
        checkpoint: a weights file, the index of several, or a state dict, under the released names. Tensors that need
            no conversion are used as they are, not copied.
        device: where the weights go; the CPU by default.
        dtype: dtype of the weights; by default float32, or what suits a model of the zoo.

    Raises:
        CheckpointError: the weights are missing, damaged, unsafe to open or do not fit the configuration.
        UserError: an unknown family, or a configuration that is not valid.
    """
    return _load(GENERATORS, family, config, checkpoint, device, dtype)


def load_tokenizer(
    family: str | Path | ModelEntry,
    config: ConfigSource | None = None,
    checkpoint: str | Path | Mapping[str, Tensor] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tokenizer:
    """Load an image tokenizer, of a family ("alitok", "maskgit-vq", "robustok", "llamagen-vq") or of a model.

    See `load_generator`.
    """
    return _load(TOKENIZERS, family, config, checkpoint, device, dtype)


def load_prompt_reader(model: str | Path | ModelEntry) -> PromptReader:
    """Load what turns the prompts of a text-to-image model into tokens.

    Raises:
        CheckpointError: its file is missing or damaged.
        UserError: the model does not read prompts.
    """
    entry = resolve(model)
    if entry.text is None:
        raise UserError(f"{entry.name} does not read prompts")
    return PromptReader(require_file(entry.text.file, entry), entry.text.template)


def _load(
    families: Mapping[str, Family],
    name: str | Path | ModelEntry,
    config: ConfigSource | None,
    checkpoint: str | Path | Mapping[str, Tensor] | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
) -> Any:
    import torch

    kind = "generator" if families is GENERATORS else "tokenizer"
    if isinstance(name, str) and name in families:
        family = families[name]
        if checkpoint is None:
            raise UserError(f"loading a {name} {kind} needs checkpoint=, a weights file or a state dict")
    else:
        if isinstance(name, str) and not Path(name).exists():
            find({**families, **MODELS}, name, f"there is no {kind} family or model named")
        entry = resolve(name)
        part = entry.generator if families is GENERATORS else entry.tokenizer
        family = part.family
        config = published_config(entry, part) if config is None else config
        checkpoint = require_file(part.file, entry) if checkpoint is None else checkpoint
        dtype = getattr(torch, part.dtype) if dtype is None else dtype
    module_class, config_class = family.classes()
    settings: Any = load_config(config_class, {} if config is None else config, family.sections)
    if isinstance(checkpoint, Mapping):
        source = "the given state dict"
        state = family.needed(unwrap(checkpoint, source, family.entries))
    else:
        source = str(checkpoint)
        state = _read(family, checkpoint)
    return load_weights(module_class, settings, state, device=device, dtype=dtype, source=source, extras=family.extras)


def published_config(entry: ModelEntry, part: Part) -> dict[str, Any]:
    """The configuration of a part, with what the files that were published beside its weights say, where they are here.

    That is `config.json`, and the ids of special tokens in the text tokenizer.
    """
    config = dict(part.config)
    if part.config_file is not None and (path := find_file(part.config_file)) is not None:
        config.update(_read_json(path))
    if entry.text is not None and part is entry.generator and find_file(entry.text.file) is not None:
        config.update(load_prompt_reader(entry).special_ids())
    return config


def _read(family: Family, path: str | Path) -> dict[str, Tensor]:
    """What a weights file of `family` holds for it."""
    return family.needed(read_state_dict(path, family.entries, family.allowed_types))


def load_weights(
    module_class: type[nn.Module],
    config: Any,
    state_dict: Mapping[str, Tensor],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    source: str = "the state dict",
    extras: bool = False,
) -> nn.Module:
    """Build `module_class(config)` with exactly the weights of `state_dict`, in eval mode, without gradients.

    With `extras`, the state dict may hold other tensors too.

    Names, shapes and kinds of numbers are compared before anything is allocated on `device`.

    Raises:
        CheckpointError: the weights do not fit; all kinds of differences are listed together.
    """
    import torch

    module = _on_meta(module_class, config)
    _require_fit(module, state_dict, source, extras=extras)
    device = torch.device("cpu" if device is None else device)
    dtype = torch.float32 if dtype is None else dtype
    module.load_state_dict(
        {
            name: state_dict[name].detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in module.state_dict().items()
        },
        assign=True,
    )
    module.to(device)  # the tables that are no weights
    return module.requires_grad_(False).eval()


def random_weights(
    part: Part, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None, seed: int = 0
) -> Any:
    """The module of `part` with random weights, for measuring speed without its file; in eval mode."""
    import torch

    module_class, config_class = part.family.classes()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = module_class(load_config(config_class, part.config, part.family.sections))
    return module.to(device, dtype).requires_grad_(False).eval()


def _on_meta(module_class: type[nn.Module], config: Any) -> nn.Module:
    import torch
    from torch.overrides import TorchFunctionMode

    class WithoutInit(TorchFunctionMode):
        """Skips initial values: on meta they are void, yet make torch import its compiler, for a second."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if getattr(function, "__module__", "") == "torch.nn.init":
                return args[0] if args else kwargs["tensor"]
            return function(*args, **kwargs)

    with torch.device("meta"), WithoutInit():
        return module_class(config)


def _blank(part: Part) -> nn.Module:
    """The module of `part` as it should be, without memory for its weights."""
    module_class, config_class = part.family.classes()
    return _on_meta(module_class, load_config(config_class, part.config, part.family.sections))


def _require_fit(module: nn.Module, state_dict: Mapping[str, Tensor], source: str, *, extras: bool = False) -> None:
    expected = module.state_dict()
    found = {name: state_dict[name] for name in expected if name in state_dict} if extras else state_dict
    if differences := _differences(expected, found):
        problem = f"{source} does not fit the configured {type(module).__name__}: {'; '.join(differences)}"
        raise CheckpointError(problem + _recognise(state_dict, type(module)))


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Say how `found` differs from `expected` in names, shapes and kinds of numbers; empty if it does not."""
    shared = [(name, expected[name], found[name]) for name in expected if name in found]
    misshapen = [name for name, one, other in shared if one.shape != other.shape]
    mistyped = [name for name, one, other in shared if one.is_floating_point() != other.is_floating_point()]

    def listing(what: str, names: list[str], describe: Any = str) -> list[str]:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return [f"{len(names)} {what} ({', '.join(map(describe, names[:SHOWN]))}{more})"] if names else []

    def shapes(name: str) -> str:
        return f"{name} is {list(found[name].shape)}, expected {list(expected[name].shape)}"

    def dtypes(name: str) -> str:
        return f"{name} is {found[name].dtype}, expected {expected[name].dtype}"

    return [
        *listing("missing", [name for name in expected if name not in found]),
        *listing("unexpected", [name for name in found if name not in expected]),
        *listing("of another shape", misshapen, shapes),
        *listing("of another type", mistyped, dtypes),
    ]


def _recognise(found: Mapping[str, Tensor], module_class: type[nn.Module]) -> str:
    """Guess whose weights these are: those of a known model, or at least of another family."""
    anatomy = _anatomy(found)
    likeness = {"": 0.8}  # the least for a guess
    seen: list[Part] = []
    for name, part in ((entry.name, part) for entry in MODELS.values() for part in entry.parts):
        if part in seen:  # models share tokenizers
            continue
        seen.append(part)
        known = _blank(part)
        fits = not _differences(known.state_dict(), part.family.needed(found))
        label = f"{part.family.name} {part.family.kind}"
        if isinstance(known, module_class):
            if fits:
                return f"; it fits {name}"
        elif fits:
            return f"; this looks like a checkpoint of the {label} (it fits {name})"
        else:
            expected = _anatomy(known.state_dict())
            likeness[label] = len(expected & anatomy) / len(expected | anatomy)
    best = max(likeness, key=likeness.__getitem__)
    return f"; this looks like a checkpoint of the {best}" if best else ""


def _anatomy(names: Iterable[str]) -> set[str]:
    """The names without their numbers: the same for every size of a family."""
    return {re.sub(r"\d+", "#", name) for name in names}


# ---- reading


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
    head = _read_head(path)
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with torch.serialization.safe_globals(list(allowed_types)):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK"))
    except Exception as error:  # readers raise a dozen types on damaged files
        if forbidden := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path} was refused: it contains Python objects other than tensors ({forbidden[1]}), which "
                "could run code when opened; save its tensors alone, best as .safetensors"
            ) from None
        raise CheckpointError(f"{path} is truncated, damaged or no weights file; get it again") from error
    return unwrap(content, str(path), entries)


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
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is no index of weights files: it has no weight_map; get it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is no file beside it")
    return weight_map


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files of an index; they stay mapped until they are used."""
    tensors: dict[str, Tensor] = {}
    for path in shards_of(index):
        tensors.update(read_state_dict(path))
    if lacking := [name for name in _weight_map(index) if name not in tensors]:
        raise CheckpointError(f"{index} lists {len(lacking)} tensors that its files lack, {lacking[0]} among them")
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no JSON file; get it again ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a mapping of names to values")
    return content


def _read_head(path: Path) -> bytes:
    """Return the first bytes of a weights file, or say what the file is instead."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the path of a weights file")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not head:
        raise CheckpointError(f"{path} is empty; get it again")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not weights; download the file itself, in a browser")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not weights; get it with `git lfs pull`")
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise CheckpointError(f"{path} must end in one of .safetensors, {', '.join(TORCH_SUFFIXES)}")
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
            raise CheckpointError(f"{problem}: under {name!r} there is a {type(value).__name__}")
    if all(name.startswith("module.") for name in content):
        return {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return dict(content)


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def hash_weights(path: str | Path) -> str:
    """Return the SHA-256 of a weights file; of weights in several files, that of their hashes, in order."""
    path = Path(path)
    if not is_index(path):
        return hash_file(path)
    hashes = "\n".join(hash_file(part) for part in (path, *shards_of(path)))
    return hashlib.sha256(hashes.encode()).hexdigest()


# ---- finding and fetching


def checkpoints_folder() -> Path:
    """The folder of weights files put in place by hand: $SOFTCFG_CHECKPOINTS, or one in the user's cache."""
    return Path(os.environ.get(FOLDER_VARIABLE) or "~/.cache/softcfg/checkpoints").expanduser()


def find_file(file: ModelFile) -> Path | None:
    """Return where a model's file lies: its own folder, the checkpoints folder, or the Hugging Face cache."""
    path = (file.folder or checkpoints_folder()) / file.local_name
    if path.is_file():
        return path
    if file.repository:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(file.repository, file.name)
        return Path(cached) if isinstance(cached, str) else None
    return None


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


def missing_files(files: Iterable[ModelFile]) -> list[ModelFile]:
    """Return those of `files`, and of the files that indexes among them list, that are not here."""
    missing = []
    for file in files:
        path = find_file(file)
        if path is None:
            missing.append(file)
        elif is_index(path):
            missing += [file.beside(shard.name) for shard in shards_of(path) if not shard.is_file()]
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


def fetch(model: str | Path | ModelEntry, source: str | Path | None = None, *, link: bool = False) -> list[Path]:
    """Bring the weights of a model onto this machine, check that they fit it, and return where they lie.

    Files on Hugging Face are downloaded by its own client, into its own cache. Those on Google Drive are
    downloaded in a browser, and taken from `source` into the checkpoints folder.

    Args:
        source: a file, or a folder, of which those with the names of the model's files are taken.
        link: make symbolic links to `source` rather than copies.

    Raises:
        CheckpointError: a file cannot be had, is damaged or does not fit; nothing is left half-written.
    """
    entry = resolve(model)
    if entry.folder:
        return [require_file(file, entry) for file in entry.files]
    if source is not None:
        return _take(entry, Path(source), link)
    found: dict[ModelFile, Path] = {}
    missing: list[ModelFile] = []
    for file in entry.files:
        local = checkpoints_folder() / file.local_name
        if local.is_file():
            found[file] = local
        elif file.repository:
            found[file] = _download(file)
        else:
            missing.append(file)
            continue
        if is_index(found[file]):
            for shard in shards_of(found[file]):
                found[file.beside(shard.name)] = shard if shard.is_file() else _download(file.beside(shard.name))
    _check_files(entry, found)
    if missing:
        raise CheckpointError(f"{entry.name} cannot be downloaded by a program: {how_to_get(missing, entry)}")
    return list(found.values())


def _check_files(entry: ModelEntry, found: Mapping[ModelFile, Path]) -> None:
    """Raise a `CheckpointError` unless the weights files among `found` hold exactly the tensors of their parts.

    No tensor is allocated.
    """
    for part in entry.parts:
        if part.config_file is not None and part.config_file in found:
            part = replace(part, config={**part.config, **_read_json(found[part.config_file])})
        if part.file in found:
            path = found[part.file]
            _require_fit(_blank(part), _read(part.family, path), str(path), extras=part.family.extras)
    if entry.text is not None and entry.text.file in found:
        PromptReader(found[entry.text.file])


def _download(file: ModelFile) -> Path:
    """Download a file into the Hugging Face cache and compare it with the hash that the Hub gives for it."""
    from huggingface_hub import constants, errors, hf_hub_download

    try:
        path = Path(hf_hub_download(file.repository, file.name))
    except Exception as error:  # the client lets errors of several libraries through
        reasons = (
            (errors.GatedRepoError, "its authors give access on request only; see `hf auth login`"),
            (errors.RepositoryNotFoundError, "there is no such repository, or it is private"),
            (errors.LocalEntryNotFoundError, f"{constants.ENDPOINT} cannot be reached"),
            (errors.EntryNotFoundError, "the repository has no such file"),
        )
        known = (text for kind, text in reasons if isinstance(error, kind))
        reason = next(known, " ".join(str(error).split()))
        if constants.HF_HUB_OFFLINE:
            reason = "it is not in the cache, and HF_HUB_OFFLINE forbids to download it"
        raise CheckpointError(f"{file.name} was not downloaded from {file.repository}: {reason}") from error
    # In the cache a large file is a link to a blob that is named after its SHA-256.
    blob = Path(os.readlink(path)) if path.is_symlink() else path
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and hash_file(path) != blob.name:
        raise CheckpointError(f"{path} is damaged, its SHA-256 is not the Hub's; delete it and fetch again")
    return path


def _take(entry: ModelEntry, source: Path, link: bool) -> list[Path]:
    """Put the files of `entry` that are in `source` into the checkpoints folder, once all are checked."""
    if not source.exists():
        raise CheckpointError(f"{source} does not exist")
    offered = {path.name: path for path in (source.iterdir() if source.is_dir() else [source])}
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
    if target.exists() and target.samefile(source):
        return target
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            partial.symlink_to(source.resolve())
        else:
            shutil.copyfile(source, partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{source} cannot be put into {target.parent}: {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return target
