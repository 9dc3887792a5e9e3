"""What softcfg knows by name: families of generators and tokenizers, and the models built from them.

A new family is one file under `models/` or `tokenizers/` and one entry here. Models are described in YAML: bundled ones
in the `model.yaml` of their folder, published ones in `published/FAMILY.yaml`, both in the format of
`read_model_folder`. Importing this module does not import torch.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from softcfg.configuration import read_yaml
from softcfg.decoding.filtering import Sampling
from softcfg.errors import UserError, clean, quote, require_name, require_uint64, suggestion
from softcfg.files import as_path, is_file, is_folder
from softcfg.guidance.composition import all_settings
from softcfg.guidance.settings import Setting, settings_of

if TYPE_CHECKING:
    from torch import nn

BUNDLED = Path(__file__).parent / "bundled"
PUBLISHED = Path(__file__).parent / "published"

DTYPES = ("float32", "float16", "bfloat16")
LARGEST_SETTING = 1e9  # of the default sampling
GUIDANCE_DEFAULTS = ("guidance_scale", "guidance_scale_pow", "schedule", "rule")  # of which a model may have its own
FIELDS = (  # of a model.yaml, and of one of its components
    "name", "description", "generator", "tokenizer", "sampling", "fid", "classes", "text", "licence", "examples",
)  # fmt: skip
COMPONENT_FIELDS = ("family", "config", "checkpoint", "parameters", "config_file", "dtype")

Named = TypeVar("Named")
ModuleClass = TypeVar("ModuleClass", bound=type)


@dataclass(frozen=True)
class Family:
    """An architecture: where its module and its configuration are defined, and how its released files look.

    Attributes:
        kind: "generator" or "tokenizer".
        module: dotted name of the Python module that holds the classes `model` and `config`.
        sections: where a configuration in the released, nested layout keeps this family's fields.
        entries: keys under which a training checkpoint may hold the weights, the preferred one first.
        ignored: beginnings of the names of tensors that released files hold and generation does not need.
        allowed_types: what released files hold beside tensors, plain containers and what `zoo.reading.HARMLESS` lists,
            and may be unpickled.
        extras: whether released files may hold more tensors than the model has, which are dropped.
        layouts: a function of the module that takes the tensors of any published layout and returns those of this
            model under its parameter names; empty if there is one layout, under these names.
    """

    kind: str
    name: str
    module: str
    model: str
    config: str
    sections: tuple[str, ...] = ()
    entries: tuple[str, ...] = ("model", "state_dict")
    ignored: tuple[str, ...] = ()
    allowed_types: tuple[type, ...] = ()
    extras: bool = False
    layouts: str = ""

    def classes(self) -> tuple[type[nn.Module], type]:
        """Import and return the module class and its configuration class."""
        module = importlib.import_module(self.module)
        return getattr(module, self.model), getattr(module, self.config)

    def needed(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The state dict under the names of the model's parameters, without what is ignored."""
        if self.layouts:
            state_dict = getattr(importlib.import_module(self.module), self.layouts)(state_dict)
        return {name: tensor for name, tensor in state_dict.items() if not name.startswith(self.ignored)}


@dataclass(frozen=True)
class ModelFile:
    """A weights file: on Hugging Face (`repository`), on Google Drive (`drive_id`) or in a local `folder`.

    Attributes:
        name: weights in several files go by their index, `NAME.safetensors.index.json` or `NAME.bin.index.json`, which
            lists those beside it.
        alias: its name in the checkpoints folder, where another model's file has the name it was published under; may
            begin with a folder.
    """

    name: str
    repository: str = ""
    drive_id: str = ""
    folder: Path | None = None
    alias: str = ""

    @property
    def local_name(self) -> str:
        """The file's name in its folder or the checkpoints folder."""
        return self.alias or self.name

    @property
    def published(self) -> str:
        """Where the file comes from: a web address or a local path."""
        if self.repository:
            return f"https://huggingface.co/{self.repository}/blob/main/{self.name}"
        if self.drive_id:
            return f"https://drive.google.com/file/d/{self.drive_id}/view"
        return str((self.folder or Path()) / self.name)

    def beside(self, name: str) -> ModelFile:
        """The file `name` that was published beside this one."""
        return replace(self, name=name, alias=str(Path(self.alias).with_name(name)) if self.alias else "")


@dataclass(frozen=True)
class Component:
    """A model's generator or tokenizer: family, configuration (released names), weights and their number.

    Attributes:
        config_file: a `config.json` that was published with the weights and overrides `config`.
        dtype: of the weights as they are loaded, unless asked for otherwise.
    """

    family: Family
    config: Mapping[str, Any]
    file: ModelFile
    parameters: int | None = None
    config_file: ModelFile | None = None
    dtype: str = "float32"

    @property
    def files(self) -> list[ModelFile]:
        """The weights (of several files, the index) and, if there is one, the configuration."""
        return [self.file] if self.config_file is None else [self.file, self.config_file]


@dataclass(frozen=True)
class TextComponent:
    """What a text-to-image model reads prompts with; its family says what files and settings it needs.

    Attributes:
        files: by their role, such as "tokenizer".
        settings: such as "template", the sentence around a prompt; the family's own by default.
    """

    files: Mapping[str, ModelFile]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelEntry:
    """A model that can be sampled from.

    Attributes:
        text: how it reads prompts; None for models that draw classes.
        sampling: default settings, as far as known: those of `default_settings`, and the seed of the released sampler.
        fid: the FID its authors report for 50,000 samples with plain guidance.
        classes: names of the classes; empty for ImageNet's thousand.
        licence: under which its weights are published, in words.
        examples: prompts or names of classes on which guidance methods differ, each with a seed.
    """

    name: str
    generator: Component
    tokenizer: Component
    description: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    fid: float | None = None
    classes: tuple[str, ...] = ()
    text: TextComponent | None = None
    licence: str = ""
    examples: Mapping[str, int] = field(default_factory=dict)

    @property
    def components(self) -> tuple[Component, Component]:
        """The generator and the tokenizer."""
        return self.generator, self.tokenizer

    @property
    def files(self) -> list[ModelFile]:
        """The files of the model, each once; of weights in several files, the index."""
        files = [file for component in self.components for file in component.files]
        return list(dict.fromkeys(files if self.text is None else [*files, *self.text.files.values()]))

    @property
    def folder(self) -> Path | None:
        """The folder of a model that is not published but local; None for a published one."""
        return self.generator.file.folder

    @property
    def bundled(self) -> bool:
        """Whether the model is part of the installed package."""
        return self.folder is not None and self.folder.parent == BUNDLED


def _by_name(items: Iterable[Named]) -> dict[str, Named]:
    return {item.name: item for item in items}  # type: ignore[attr-defined]


def _generator(name: str, module: str, model: str, config: str = "", **layout: Any) -> Family:
    sections = ("model.vq_model", "model.generator")
    return Family("generator", name, f"softcfg.models.{module}", model, config or f"{model}Config", sections, **layout)


def _tokenizer(name: str, module: str, model: str, **layout: Any) -> Family:
    sections = ("model.vq_model",)
    return Family("tokenizer", name, f"softcfg.tokenizers.{module}", model, f"{model}Config", sections, **layout)


_LLAMAGEN: dict[str, Any] = {"entries": ("model", "module", "state_dict"), "ignored": ("freqs_cis",)}
_ROBUSTOK: dict[str, Any] = {
    "entries": ("ema", "model", "state_dict"),
    "ignored": ("semantic_model.", "quantize.ema_vocab_hit_SV", "encoder.lvl1LC", "decoder.lvl1LC"),
}
_CODEBOOK_USED = ("quantize.codebook_used",)

GENERATORS: dict[str, Family] = _by_name(
    [
        _generator("alitok", "alitok", "AliTok"),
        _generator("rar", "rar", "RAR"),
        _generator("robustok", "rar", "RAR", "RobusTokConfig"),
        _generator("llamagen", "llamagen", "LlamaGen", **_LLAMAGEN),
        _generator("llamagen-t2i", "llamagen_t2i", "LlamaGenT2I", **_LLAMAGEN),
        _generator("janus-pro", "janus", "Janus", layouts="from_published"),
        _generator("emu3", "emu3", "Emu3", layouts="from_published"),
        _generator("lumina-mgpt-2", "lumina", "Lumina", ignored=("model.vqmodel.",)),
    ]
)

TOKENIZERS: dict[str, Family] = _by_name(
    [
        _tokenizer("alitok", "alitok", "AliTokTokenizer"),
        _tokenizer("maskgit-vq", "maskgit_vq", "MaskGITVQ"),
        _tokenizer("robustok", "robustok", "RobusTokTokenizer", **_ROBUSTOK),
        _tokenizer("llamagen-vq", "llamagen_vq", "LlamaGenVQ", ignored=_CODEBOOK_USED),
        _tokenizer("movq", "movq", "MoVQ", extras=True),
        _tokenizer("janus-vq", "janus_vq", "JanusVQ", ignored=_CODEBOOK_USED, layouts="from_published"),
        _tokenizer("emu3-vq", "emu3_vq", "Emu3VQ", layouts="from_published"),
    ]
)


def register_generator(name: str, config: type, **layout: Any) -> Callable[[ModuleClass], ModuleClass]:
    """Class decorator that makes a family of generators known by `name`, to everything that takes a family or a model.

    Args:
        config: the family's configuration, a dataclass.
        layout: how its released files look; see `Family`.

    Raises:
        UserError: another family has this name.
    """
    return _registering(GENERATORS, "generator", name, config, layout)


def register_tokenizer(name: str, config: type, **layout: Any) -> Callable[[ModuleClass], ModuleClass]:
    """Class decorator that makes a family of image tokenizers known by `name`; see `register_generator`."""
    return _registering(TOKENIZERS, "tokenizer", name, config, layout)


def _registering(
    families: dict[str, Family], kind: str, name: str, config: type, layout: Mapping[str, Any]
) -> Callable[[ModuleClass], ModuleClass]:
    def register(model: ModuleClass) -> ModuleClass:
        family = Family(kind, name, model.__module__, model.__name__, config.__name__, **layout)
        if families.setdefault(name, family) != family:
            raise UserError(f"there is a {kind} family named {name!r} already, in {families[name].module}")
        return model

    return register


def default_settings() -> dict[str, Setting]:
    """The settings of which a model may have values that suit it, by name: of guidance, and all of `Sampling`."""
    guidance = all_settings()
    return {**settings_of(Sampling), **{name: guidance[name] for name in GUIDANCE_DEFAULTS}}


def check_defaults(sampling: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` unless these are `default_settings`, or a seed, with values in their range.

    Args:
        where: they stand, in front of their names.
    """
    known = default_settings()
    for name, value in sampling.items():
        if name == "seed":
            require_uint64(value, f"{where}{name}")
            continue
        if name not in known:
            raise UserError(_unknown(name, [*known, "seed"], where))
        try:
            known[name].check(value)
        except ValueError as error:
            raise UserError(f"{where}{clean(error, 400)}") from error


def _unknown(name: object, known: Collection[str], where: str) -> str:
    hint = suggestion(str(name), known, most=1, cutoff=0.6)
    return f"{where}{clean(name, 100)} is not known, but {', '.join(known)}{hint and '; '}{hint}"


def read_model_folder(folder: Path) -> ModelEntry:
    """Read `model.yaml` of a model folder; the files it names lie beside it.

    Raises:
        UserError: the file is missing or malformed; the field is named.
    """
    path = folder / "model.yaml"
    return _read_entry(path, {"name": folder.name, **read_yaml(path)}, folder)


def read_published(path: Path) -> list[ModelEntry]:
    """Read the `models` of a YAML file, each as in a `model.yaml`, but with files that are published somewhere."""
    # The package's own files go through the parser in C, which is ten times as fast and sets no limits.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load(path.read_text(encoding="utf-8"), loader)
    return [_read_entry(path, entry, None) for entry in content["models"]]


def _read_entry(path: Path, content: Mapping[str, Any], folder: Path | None) -> ModelEntry:
    """The entry that `content` of the file `path` describes.

    A file is its name in `folder`, or a mapping of the fields of `ModelFile`.
    """
    kinds: dict[type, str] = {dict: "a mapping", list: "a list", str: "a text", int: "a whole number"}

    def expect(kind: type, where: Mapping[str, Any], key: str, default: Any = None) -> Any:
        value = where.get(key, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{path}: {key} must be {kinds[kind]}, got {quote(value)}")
        return value

    def fields(where: Mapping[str, Any], known: Sequence[str], section: str = "") -> None:
        for key in where:
            if key not in known:
                raise UserError(_unknown(key, known, f"{path}: {section}"))

    def number(key: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST_SETTING:
            raise UserError(f"{path}: {key} must be a number, got {quote(value)}")
        return value

    def file(where: Mapping[str, Any], key: str, default: str | None = None) -> ModelFile:
        if isinstance(where.get(key), dict) and folder is None:
            return ModelFile(**where[key])
        return ModelFile(expect(str, where, key, default), folder=folder)

    def component(key: str, families: Mapping[str, Family]) -> Component:
        section = expect(dict, content, key)
        fields(section, COMPONENT_FIELDS, f"{key}.")
        return Component(
            families[require_name(expect(str, section, "family"), families, f"{path}: unknown {key} family")],
            expect(dict, section, "config", {}),
            file(section, "checkpoint", f"{key}.safetensors"),
            expect(int, section, "parameters", 0) or None,
            file(section, "config_file") if "config_file" in section else None,
            require_name(expect(str, section, "dtype", "float32"), DTYPES, f"{path}: {key} has no dtype"),
        )

    def text() -> TextComponent:
        settings = dict(expect(dict, content, "text"))
        files = {role: file(settings["files"], role) for role in expect(dict, settings, "files", {})}
        if "tokenizer" in settings or not files:
            files = {"tokenizer": file(settings, "tokenizer", "tokenizer.json"), **files}
        if "template" in settings:
            expect(str, settings, "template")
        return TextComponent(files, {key: settings[key] for key in settings if key not in ("files", "tokenizer")})

    fields(content, FIELDS)
    examples = {str(name): seed for name, seed in expect(dict, content, "examples", {}).items()}
    classes = expect(list, content, "classes", [])
    for name in classes:
        if isinstance(name, bool) or not isinstance(name, (str, int)):  # YAML reads no, on and null as something else
            raise UserError(f"{path}: classes must be texts, got {quote(name)}; put names in quotes")
    sampling = expect(dict, content, "sampling", {})
    for key, value in sampling.items():
        if key in ("schedule", "rule"):
            expect(str, {f"sampling.{key}": value}, f"sampling.{key}")
        elif key in settings_of(Sampling) or key in GUIDANCE_DEFAULTS:
            number(f"sampling.{key}", value)
    check_defaults(sampling, f"{path}: sampling.")
    for name, seed in examples.items():
        require_uint64(seed, f"{path}: the seed of the example {quote(name)}")
        if classes and name not in map(str, classes):
            hint = suggestion(name, map(str, classes))
            raise UserError(f"{path}: the example {quote(name)} is none of the classes{hint and '; '}{hint}")
    return ModelEntry(
        expect(str, content, "name"),
        component("generator", GENERATORS),
        component("tokenizer", TOKENIZERS),
        expect(str, content, "description", ""),
        sampling,
        None if content.get("fid") is None else number("fid", content["fid"]),
        tuple(map(str, classes)),
        text() if "text" in content else None,
        expect(str, content, "licence", ""),
        examples,
    )


MODELS: dict[str, ModelEntry] = _by_name(
    [
        *(read_model_folder(file.parent) for file in sorted(BUNDLED.glob("*/model.yaml"))),
        *(
            entry
            for family in GENERATORS
            if (path := PUBLISHED / f"{family}.yaml").is_file()
            for entry in read_published(path)
        ),
    ]
)


def resolve(model: str | Path | ModelEntry) -> ModelEntry:
    """Return the entry of a model given by name or by the path of a model folder (or of its model.yaml).

    Raises:
        UserError: no such model (the nearest names are suggested), or a folder that is not a model folder.
    """
    if isinstance(model, ModelEntry):
        return model
    if not isinstance(model, (str, Path)) or model == "":
        raise UserError(f"a model is the name of one or the path of a model folder, got {quote(model)}")
    path = as_path(model)
    if str(model) not in MODELS:
        if path.name == "model.yaml" and is_file(path):
            return read_model_folder(path.parent)
        if is_folder(path):
            if not os.path.lexists(path / "model.yaml"):
                raise UserError(f"folder {path} holds no model.yaml, so it is not a model folder")
            return read_model_folder(path)
        if isinstance(model, str) and is_repository(model):
            return _fetched(model)
        if path.parent != Path() or isinstance(model, Path) or set(model) & set("/\\~"):
            raise UserError(f"there is no folder {model}; give the name of a model or the path of a model folder")
    return MODELS[require_name(str(model), MODELS, "there is no model named")]


def is_repository(model: str) -> bool:
    """Whether a name is that of a Hugging Face repository, "user/name", and not that of something here."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model, re.ASCII) is not None and not os.path.lexists(model)


def _fetched(repository: str) -> ModelEntry:
    """The model folder of a repository in the Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, "model.yaml")
    if not isinstance(path, str):
        raise UserError(
            f"there is no folder {repository}; if it is a model folder on Hugging Face, "
            f"run `softcfg fetch {repository}` first"
        )
    return read_model_folder(Path(path).parent)
