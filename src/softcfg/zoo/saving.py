"""Write a model as a model folder, and put such a folder on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from softcfg.errors import UserError, quote
from softcfg.files import (
    make_folder,
    open_atomically,
    open_regular,
    path_atomically,
    remove_file,
    remove_temporary,
    write_atomically,
)
from softcfg.nn.linear import parameter_count
from softcfg.nn.precision import dtype_name
from softcfg.zoo.reading import is_index, shards_of
from softcfg.zoo.registry import DTYPES, GENERATORS, TOKENIZERS, Family

if TYPE_CHECKING:
    from torch import nn

    from softcfg.models.base import Generator
    from softcfg.models.conditioning import Conditioning
    from softcfg.tokenizers.base import Tokenizer

CARD = """\
---
library_name: softcfg
tags: [softcfg, autoregressive-image-generation]
pipeline_tag: {task}
---

# {name}

{description}

```python
import softcfg

pipe = softcfg.Pipeline.from_pretrained("{repository}")
```
"""


def write_model_folder(
    folder: str | Path,
    generator: Generator,
    tokenizer: Tokenizer,
    conditioning: Conditioning,
    *,
    name: str,
    description: str = "",
    sampling: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
) -> Path:
    """Write weights, what texts are read with, and at last the `model.yaml` that describes them; return the folder.

    Raises:
        UserError: a family is not registered, weights are quantized or not in memory, the files that texts are read
            with are missing, or the folder cannot be written.
    """
    if not isinstance(folder, (str, Path)) or folder == "":
        raise UserError(f"a model is saved in a folder, whose path is a text, got {quote(folder)}")
    content: dict[str, Any] = {
        "name": name or Path(folder).resolve().name,
        "description": description,
        "generator": _describe(generator, GENERATORS, "generator"),
        "tokenizer": _describe(tokenizer, TOKENIZERS, "tokenizer"),
        "sampling": dict(sampling or {}),
        "classes": list(classes),
    }
    if conditioning.takes_prompts:
        if not conditioning.files:
            raise UserError(f"{conditioning.name} lacks the files that it reads texts with; load it by from_pretrained")
        names = _file_names(conditioning.files)
        content["text"] = {**conditioning.settings, "files": names}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    folder = make_folder(folder)
    remove_temporary(folder)
    card = folder / "model.yaml"
    with contextlib.ExitStack() as files:  # all of them are written before the first has its name, model.yaml the last
        files.enter_context(open_atomically(card, replace=True)).write(text.encode())
        _write_weights(generator, folder / "generator.safetensors", files)
        _write_weights(tokenizer, folder / "tokenizer.safetensors", files)
        if conditioning.takes_prompts:
            for role, path in conditioning.files.items():
                _copy(path, folder / names[role], files)
                for shard in shards_of(path) if is_index(path) else ():
                    _copy(shard, folder / shard.name, files)
        # Where another model was, a kill from here on leaves no model rather than parts of two.
        files.callback(remove_file, card)
    return folder


def push_folder(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a model of softcfg",
) -> str:
    """Upload a model folder to a repository on the Hugging Face Hub, which is made if need be; return its address.

    Raises:
        UserError: the Hub refused it or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=commit_message)
    except Exception as error:  # the client lets errors of several libraries through
        reason = " ".join(str(error).split())
        raise UserError(
            f"{repository} was not pushed to the Hub, where `hf auth login` lets you in: {reason}"
        ) from error
    return f"{api.endpoint}/{repository}"


def write_card(folder: Path, repository: str, *, name: str, description: str, takes_prompts: bool) -> None:
    """Write README.md of a repository: what the model is and how it is loaded."""
    task = "text-to-image" if takes_prompts else "unconditional-image-generation"
    text = CARD.format(task=task, name=name or repository, description=description, repository=repository)
    write_atomically(folder / "README.md", text.encode())


def _describe(module: nn.Module, families: Mapping[str, Family], kind: str) -> dict[str, Any]:
    """A half of the model as `model.yaml` describes it."""
    import torch

    config: Any = getattr(module, "config", None)
    classes = (type(module), type(config))
    family = next((name for name, family in families.items() if family.classes() == classes), None)
    if family is None:
        name = type(module).__name__
        if config is None and any(family.classes()[0] is type(module) for family in families.values()):
            raise UserError(f"{name} does not keep its configuration, which is saved with it: set self.config")
        raise UserError(f"{name} is of no family that is registered: see softcfg.zoo.register_{kind}")
    parameters = list(module.parameters())
    plain = all(type(parameter.data) is torch.Tensor and not parameter.is_meta for parameter in parameters)
    if not plain:
        raise UserError(f"the weights of the {kind} are quantized or offloaded; load the model without that to save it")
    dtype = dtype_name(parameters[0].dtype)
    return {
        "family": family,
        "config": _plain(dataclasses.asdict(config)),
        "checkpoint": f"{kind}.safetensors",
        "parameters": parameter_count(module),
        "dtype": dtype if dtype in DTYPES else "float32",
    }


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML has."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _write_weights(module: nn.Module, path: Path, files: contextlib.ExitStack) -> None:
    """Write weights; the file has its name when `files` are closed."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state, storages = {}, set()
    for name, tensor in module.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        state[name] = tensor.clone() if storage in storages else tensor  # a file has no shared tensors
        storages.add(storage)
    try:
        save_file(state, files.enter_context(path_atomically(path)))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def _file_names(files: Mapping[str, Path]) -> dict[str, str]:
    """The names of files in the folder, by their role: their own, with the role in front where two are the same."""
    names = [path.name for path in files.values()]
    return {role: path.name if names.count(path.name) == 1 else f"{role}-{path.name}" for role, path in files.items()}


def _copy(source: Path, target: Path, files: contextlib.ExitStack) -> None:
    """Copy a file; the copy has its name when `files` are closed."""
    if target.exists() and target.samefile(source):
        return
    try:
        with open_regular(source) as file:
            shutil.copyfileobj(file, files.enter_context(open_atomically(target, replace=True)), 1 << 22)
    except OSError as error:
        raise UserError(f"{source} cannot be put into {target.parent}: {error.strerror or error}") from error
