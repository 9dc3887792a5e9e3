"""What softcfg knows by name: families of generators and tokenizers, and the models built from them.

A new family is one file under `models/` or `tokenizers/` and one entry here. Importing this module does
not import torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from softcfg.configuration import read_yaml
from softcfg.errors import UserError, quote
from softcfg.files import is_file, is_folder
from softcfg.prompts import TEXT_TO_IMAGE

if TYPE_CHECKING:
    from torch import nn

BUNDLED = Path(__file__).parent / "bundled"

LARGEST_SETTING = 1e9  # of the default sampling

# Training checkpoints may keep the settings of the training, which hold no code.
TRAINING_ARGUMENTS = (argparse.Namespace,)

Named = TypeVar("Named")


@dataclass(frozen=True)
class Family:
    """An architecture: where its module and its configuration are defined, and how its released files look.

    Attributes:
        kind: "generator" or "tokenizer".
        module: dotted name of the Python module that holds the classes `model` and `config`.
        sections: where a configuration in the released, nested layout keeps this family's fields.
        entries: keys under which a training checkpoint may hold the weights, the preferred one first.
        ignored: beginnings of the names of tensors that released files hold and generation does not need.
        allowed_types: what released files hold beside tensors and plain containers, and may be unpickled.
        extras: whether released files may hold more tensors than the model has, which are dropped.
        layouts: a function of the module that takes the tensors of any published layout and returns those of this
            model under its parameter names; empty if there is one layout, under these names.
    """

    kind: str
    name: str
    module: str
    model: str
    config: str
    sections: tuple[str, ...]
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
        name: weights in several files go by their index, `NAME.safetensors.index.json`, which lists those beside it.
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
class Part:
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
class Text:
    """How a text-to-image model reads prompts: its `tokenizer.json`, and the sentence around a prompt."""

    file: ModelFile
    template: str = TEXT_TO_IMAGE


@dataclass(frozen=True)
class ModelEntry:
    """A model that can be sampled from.

    Attributes:
        text: how it reads prompts; None for models that draw classes.
        sampling: default settings, as far as known: temperature, top_k, guidance_scale, guidance_scale_pow, schedule,
            seed.
        fid: the FID its authors report for 50,000 samples with plain guidance.
        classes: names of the classes; empty for ImageNet's thousand.
    """

    name: str
    generator: Part
    tokenizer: Part
    description: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    fid: float | None = None
    classes: tuple[str, ...] = ()
    text: Text | None = None

    @property
    def parts(self) -> tuple[Part, Part]:
        """The generator and the tokenizer."""
        return self.generator, self.tokenizer

    @property
    def files(self) -> list[ModelFile]:
        """The files of the model; of weights in several files, the index."""
        files = [file for part in self.parts for file in part.files]
        return files if self.text is None else [*files, self.text.file]

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


def _generator(name: str, module: str, model: str, config: str, **layout: Any) -> Family:
    return Family("generator", name, module, model, config, ("model.vq_model", "model.generator"), **layout)


def _tokenizer(name: str, module: str, model: str, config: str, **layout: Any) -> Family:
    return Family("tokenizer", name, module, model, config, ("model.vq_model",), **layout)


GENERATORS: dict[str, Family] = _by_name(
    [
        _generator("alitok", "softcfg.models.alitok", "AliTok", "AliTokConfig"),
        _generator("rar", "softcfg.models.rar", "RAR", "RARConfig"),
        _generator("robustok", "softcfg.models.rar", "RAR", "RobusTokConfig"),
        _generator(
            "llamagen",
            "softcfg.models.llamagen",
            "LlamaGen",
            "LlamaGenConfig",
            entries=("model", "module", "state_dict"),
            ignored=("freqs_cis",),
            allowed_types=TRAINING_ARGUMENTS,
        ),
        _generator("lumina-mgpt-2", "softcfg.models.lumina", "Lumina", "LuminaConfig", ignored=("model.vqmodel.",)),
    ]
)

TOKENIZERS: dict[str, Family] = _by_name(
    [
        _tokenizer("alitok", "softcfg.tokenizers.alitok", "AliTokTokenizer", "AliTokTokenizerConfig"),
        _tokenizer("maskgit-vq", "softcfg.tokenizers.maskgit_vq", "MaskGITVQ", "MaskGITVQConfig"),
        _tokenizer(
            "robustok",
            "softcfg.tokenizers.robustok",
            "RobusTokTokenizer",
            "RobusTokTokenizerConfig",
            entries=("ema", "model", "state_dict"),
            ignored=("semantic_model.", "quantize.ema_vocab_hit_SV", "encoder.lvl1LC", "decoder.lvl1LC"),
            allowed_types=TRAINING_ARGUMENTS,
        ),
        _tokenizer(
            "llamagen-vq",
            "softcfg.tokenizers.llamagen_vq",
            "LlamaGenVQ",
            "LlamaGenVQConfig",
            ignored=("quantize.codebook_used",),
            allowed_types=TRAINING_ARGUMENTS,
        ),
        _tokenizer("movq", "softcfg.tokenizers.movq", "MoVQ", "MoVQConfig", extras=True),
        _tokenizer(
            "janus-vq",
            "softcfg.tokenizers.janus_vq",
            "JanusVQ",
            "JanusVQConfig",
            ignored=("quantize.codebook_used",),
            layouts="from_published",
        ),
        _tokenizer("emu3-vq", "softcfg.tokenizers.emu3_vq", "Emu3VQ", "Emu3VQConfig", layouts="from_published"),
    ]
)

ALITOK_TOKENIZER = Part(
    TOKENIZERS["alitok"],
    {
        "image_size": 256,
        "patch_size": 16,
        "aux_tokens": 17,
        "num_latent_tokens": 273,
        "num_buffer_tokens": 32,
        "token_size": 32,
        "codebook_size": 4096,
        "encoder_width": 768,
        "encoder_num_layers": 12,
        "encoder_num_heads": 12,
        "decoder_width": 1024,
        "decoder_num_layers": 24,
        "decoder_num_heads": 16,
        "mlp_ratio": 4,
        "layer_norm_eps": 1e-5,
    },
    ModelFile("AliTok.pth", drive_id="1Rir4QEJ_HTvZkhcnw9MTfWlSFemcGVIW"),
    389_899_308,
)

MASKGIT_VQ_TOKENIZER = Part(
    TOKENIZERS["maskgit-vq"],
    {
        "channel_mult": [1, 1, 2, 2, 4],
        "hidden_channels": 128,
        "num_channels": 3,
        "num_res_blocks": 2,
        "resolution": 256,
        "z_channels": 256,
        "codebook_size": 1024,
    },
    ModelFile("maskgit-vqgan-imagenet-f16-256.bin", repository="fun-research/TiTok"),
    54_515_587,
)

ROBUSTOK_TOKENIZER = Part(
    TOKENIZERS["robustok"],
    {
        "codebook_size": 4096,
        "codebook_embed_dim": 64,
        "codebook_l2_norm": True,
        "vit_embed_dim": 768,
        "vit_depth": 12,
        "vit_num_heads": 12,
        "mlp_ratio": 4,
        "image_size": 256,
        "patch_size": 16,
        "num_latent_tokens": 256,
    },
    ModelFile("post-train.pt", repository="qiuk6/RobusTok"),
    172_288_064,
)


MOVQ_TOKENIZER = Part(
    TOKENIZERS["movq"],
    {
        "ch": 256,
        "ch_mult": [1, 2, 2, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [32],
        "resolution": 256,
        "z_channels": 4,
        "n_embed": 16384,
        "embed_dim": 4,
    },
    ModelFile("movqgan_270M.ckpt", repository="ai-forever/MoVQGAN"),
    270_669_103,
)


def _llamagen_tokenizer(image_size: int) -> Part:
    return Part(
        TOKENIZERS["llamagen-vq"],
        {
            "ch": 128,
            "ch_mult": [1, 1, 2, 2, 4],
            "num_res_blocks": 2,
            "z_channels": 256,
            "codebook_size": 16384,
            "codebook_embed_dim": 8,
            "codebook_l2_norm": True,
            "num_groups": 32,
            "norm_eps": 1e-6,
            "image_size": image_size,
        },
        ModelFile("vq_ds16_c2i.pt", repository="FoundationVision/LlamaGen"),
        71_883_403,
    )


def _alitok(
    name: str, hidden_size: int, layers: int, parameters: int, drive_id: str,
    scale: float, power: float, seed: int, fid: float,
) -> ModelEntry:  # fmt: skip
    config = {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "codebook_size": 4096,
        "condition_num_classes": 1000,
        "image_seq_len": 273,
    }
    file = ModelFile(name.replace("-", "_") + ".bin", drive_id=drive_id)
    return ModelEntry(
        name,
        Part(GENERATORS["alitok"], config, file, parameters),
        ALITOK_TOKENIZER,
        "AliTok, ImageNet 256 x 256, 273 tokens",
        {"temperature": 1.0, "guidance_scale": scale, "guidance_scale_pow": power, "seed": seed},
        fid,
    )


def _rar_config(hidden_size: int, layers: int, mlp: int, codes: int) -> dict[str, int]:
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "intermediate_size": mlp,
        "codebook_size": codes,
        "condition_num_classes": 1000,
        "image_seq_len": 256,
    }


def _rar(
    name: str, hidden_size: int, layers: int, mlp: int, parameters: int,
    temperature: float, scale: float, power: float, fid: float,
) -> ModelEntry:  # fmt: skip
    file = ModelFile(name.replace("-", "_") + ".bin", repository="yucornetto/RAR")
    return ModelEntry(
        name,
        Part(GENERATORS["rar"], _rar_config(hidden_size, layers, mlp, 1024), file, parameters),
        MASKGIT_VQ_TOKENIZER,
        "RAR, ImageNet 256 x 256, 256 tokens in raster order",
        {"temperature": temperature, "guidance_scale": scale, "guidance_scale_pow": power, "seed": 42},
        fid,
    )


def _robustok(
    size: str, hidden_size: int, layers: int, mlp: int, parameters: int,
    temperature: float, scale: float, power: float, fid: float,
) -> ModelEntry:  # fmt: skip
    # RAR publishes files of the same names.
    file = ModelFile(f"rar_{size}.bin", repository="qiuk6/RobusTok", alias=f"robustok_rar_{size}.bin")
    return ModelEntry(
        f"robustok-{size}",
        Part(GENERATORS["robustok"], _rar_config(hidden_size, layers, mlp, 4096), file, parameters),
        ROBUSTOK_TOKENIZER,
        "RobusTok, ImageNet 256 x 256, 256 tokens in raster order "
        "(for the tokenizer before post-training: --tokenizer-checkpoint main-train.pt)",
        {"temperature": temperature, "guidance_scale": scale, "guidance_scale_pow": power},
        fid,
    )


def _llamagen(
    size: str, image_size: int, dim: int, layers: int, heads: int, parameters: int, scale: float, fid: float
) -> ModelEntry:
    side = image_size // 16
    config = {
        "dim": dim,
        "n_layer": layers,
        "n_head": heads,
        "num_classes": 1000,
        "vocab_size": 16384,
        "block_size": side * side,
        "multiple_of": 256,
        "norm_eps": 1e-5,
        "rope_base": 10000,
        "cls_token_num": 1,
        "model_type": "c2i",
    }
    name = f"{size}_{image_size}"
    file = ModelFile(f"c2i_{name}.pt", repository="FoundationVision/LlamaGen")
    return ModelEntry(
        f"llamagen-{name.replace('_', '-').lower()}",
        Part(GENERATORS["llamagen"], config, file, parameters),
        _llamagen_tokenizer(image_size),
        f"LlamaGen, ImageNet {image_size} x {image_size}, {side * side} tokens in raster order"
        + (", FID at 256 x 256" if image_size != 256 else ""),
        {"temperature": 1.0, "guidance_scale": scale, "schedule": "constant"},
        fid,
    )


def _lumina(name: str, description: str) -> ModelEntry:
    def published(file: str) -> ModelFile:
        repository = f"Alpha-VLLM/{name.replace('lumina-mgpt-2', 'Lumina-mGPT-2.0').replace('-omni', '-Omni')}"
        return ModelFile(file, repository=repository, alias=f"{name}/{file}")

    config = {
        "vocab_size": 171385,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 10240,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "model_parallel_size": 1,
        "swin_norm": False,
    }
    return ModelEntry(
        name,
        Part(
            GENERATORS["lumina-mgpt-2"],
            config,
            published("model.safetensors.index.json"),
            7_880_273_920,
            published("config.json"),
            "bfloat16",
        ),
        MOVQ_TOKENIZER,
        description,
        {"temperature": 1.0, "guidance_scale": 4.0, "schedule": "constant", "top_k": 4096},
        text=Text(published("tokenizer.json")),
    )


def find(table: Mapping[str, Named], name: str, problem: str) -> Named:
    """Return `table[name]`, or raise a `UserError` that starts with `problem` and suggests near names."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name[:100].lower().replace("_", "-"), table, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(table)}"
    raise UserError(f"{problem} {quote(name)}; {hint}")


def read_model_folder(folder: Path) -> ModelEntry:
    """Read `model.yaml` of a model folder; the files it names lie beside it.

    Raises:
        UserError: the file is missing or malformed; the field is named.
    """
    path = folder / "model.yaml"
    content = read_yaml(path)
    kinds: dict[type, str] = {dict: "a mapping", list: "a list", str: "a text", int: "a whole number"}

    def expect(kind: type, where: Mapping[str, Any], key: str, default: Any = None) -> Any:
        value = where.get(key, default)
        if not isinstance(value, kind):
            raise UserError(f"{path}: {key} must be {kinds[kind]}, got {quote(value)}")
        return value

    def part(key: str, families: Mapping[str, Family]) -> Part:
        section = expect(dict, content, key)
        return Part(
            find(families, expect(str, section, "family"), f"{path}: unknown {key} family"),
            expect(dict, section, "config", {}),
            ModelFile(expect(str, section, "checkpoint", f"{key}.safetensors"), folder=folder),
            expect(int, section, "parameters", 0) or None,
        )

    sampling = expect(dict, content, "sampling", {})
    for key, value in sampling.items():
        if key == "schedule":
            expect(str, {f"sampling.{key}": value}, f"sampling.{key}")
        elif not isinstance(value, (int, float)) or not abs(value) <= LARGEST_SETTING:
            raise UserError(f"{path}: sampling.{key} must be a number, got {quote(value)}")
    text = None
    if "text" in content:
        section = expect(dict, content, "text")
        file = ModelFile(expect(str, section, "tokenizer", "tokenizer.json"), folder=folder)
        text = Text(file, expect(str, section, "template", TEXT_TO_IMAGE))
    return ModelEntry(
        expect(str, content, "name", folder.name),
        part("generator", GENERATORS),
        part("tokenizer", TOKENIZERS),
        expect(str, content, "description", ""),
        sampling,
        classes=tuple(str(name) for name in expect(list, content, "classes", [])),
        text=text,
    )


# fmt: off
MODELS: dict[str, ModelEntry] = _by_name(
    [
        *(read_model_folder(file.parent) for file in sorted(BUNDLED.glob("*/model.yaml"))),
        #       name       hidden layers parameters                                   scale  power seed  FID
        _alitok("alitok-b",   768, 24, 177_048_064, "1PNVX9wqePxRjuOKpt4iw6CpIYLlyJWlX", 16.0, 1.8, 42, 1.50),
        _alitok("alitok-l",  1024, 24, 317_851_648, "1tmwAa724pNY4FgUsLne2VJVGoK_TBuMa",  6.0, 0.7, 42, 1.42),
        _alitok("alitok-xl", 1280, 32, 662_141_696, "1Vu0UsQfqzZ8HMKFqE2tIGdAcJ6zPXvFd", 13.0, 1.4,  2, 1.35),
        #    name    hidden layers  mlp  parameters  temperature  scale  power   FID
        _rar("rar-b",   768, 24, 3072,   260_923_648,  1.0,  16.0, 2.75, 1.95),
        _rar("rar-l",  1024, 24, 4096,   461_668_352,  1.02, 15.5, 2.5,  1.70),
        _rar("rar-xl", 1280, 32, 5120,   955_425_024,  1.02,  6.9, 1.5,  1.50),
        _rar("rar-xxl", 1408, 40, 6144, 1_498_520_704, 1.02,  8.0, 1.2,  1.48),
        #    size hidden layers mlp  parameters temperature scale power FID
        _robustok("b",  768, 24, 3072, 265_645_312, 1.02, 6.0,  1.15, 1.60),
        _robustok("l", 1024, 24, 4096, 467_962_880, 1.04, 6.75, 1.01, 1.36),
        #        size pixels dim layers heads  parameters  scale  FID
        _llamagen("B",   256,  768, 12, 12,   110_888_448, 2.0,  5.46),
        _llamagen("L",   256, 1024, 24, 16,   342_910_976, 1.75, 3.80),
        _llamagen("B",   384,  768, 12, 12,   110_888_448, 2.25, 6.09),
        _llamagen("L",   384, 1024, 24, 16,   342_910_976, 2.0,  3.07),
        _llamagen("XL",  384, 1280, 36, 20,   774_699_520, 1.75, 2.62),
        _llamagen("XXL", 384, 1536, 48, 24, 1_410_972_672, 1.75, 2.34),
        _llamagen("3B",  384, 3200, 24, 32, 3_096_659_200, 1.65, 2.18),
        _lumina("lumina-mgpt-2", "Lumina-mGPT 2.0, text to image, 768 x 768 and other sizes"),
        _lumina("lumina-mgpt-2-omni", "Lumina-mGPT 2.0 Omni, also pairs of image and map, and images to draw from"),
    ]
)
# fmt: on


def resolve(model: str | Path | ModelEntry) -> ModelEntry:
    """Return the entry of a model given by name or by the path of a model folder (or of its model.yaml).

    Raises:
        UserError: no such model (the nearest names are suggested), or a folder that is no model folder.
    """
    if isinstance(model, ModelEntry):
        return model
    path = Path(model)
    if str(model) not in MODELS:
        if path.name == "model.yaml" and is_file(path):
            return read_model_folder(path.parent)
        if is_folder(path):
            if not os.path.lexists(path / "model.yaml"):
                raise UserError(f"folder {path} holds no model.yaml, so it is no model folder")
            return read_model_folder(path)
        if path.parent != Path():
            raise UserError(f"{path} does not exist; give the name of a model or the path of a model folder")
    return find(MODELS, str(model), "there is no model named")
