"""Models small enough to save and load in a moment, and their weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as TextTokenizer
from tokenizers import models, pre_tokenizers
from torch import Tensor, nn

from softcfg.configuration import load_config
from softcfg.zoo import GENERATORS, TOKENIZERS, Component, ModelEntry, ModelFile, TextComponent

ALITOK = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "codebook_size": 16,
    "condition_num_classes": 3,
    "image_seq_len": 6,
    "grid_size": 2,
}
# Wide enough for a file of more than 10 MiB, the unit in which the Hub's client writes to the disk.
RAR = {
    "hidden_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "codebook_size": 16,
    "condition_num_classes": 3,
    "image_seq_len": 4,
}
VQ = {
    "channel_mult": [1, 1],
    "hidden_channels": 32,
    "num_res_blocks": 1,
    "resolution": 4,
    "z_channels": 4,
    "codebook_size": 16,
}

LUMINA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 160, "vocab_size": 40, "prompt_start_id": 7, "separator_id": 8, "image_start_id": 9,
    "image_end_id": 10, "new_line_id": 11, "size_id": 12, "first_code_id": 20, "num_codes": 20, "codes_per_cell": 2,
    "cell_pixels": 4, "image_size": 8,
}  # fmt: skip
MOVQ = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "resolution": 8, "n_embed": 20}
WORDS = ["[UNK]", "a", "red", "green", "apple", "star", "and"]

VQ_ON_DRIVE = Component(TOKENIZERS["maskgit-vq"], VQ, ModelFile("tiny_vq.pth", drive_id="vq-id"))
ON_DRIVE = ModelEntry(
    "tiny-drive",
    Component(GENERATORS["alitok"], ALITOK, ModelFile("tiny_alitok.bin", drive_id="alitok-id")),
    VQ_ON_DRIVE,
    "a model on Google Drive",
)


def on_hub(repository: str, file: str) -> ModelEntry:
    """A model whose generator is a file of a Hugging Face repository."""
    return ModelEntry(
        "tiny-hub",
        Component(GENERATORS["rar"], RAR, ModelFile(file, repository=repository)),
        Component(TOKENIZERS["maskgit-vq"], VQ, ModelFile("tiny_vq.bin", repository="someone/tiny")),
        "a model on Hugging Face",
    )


def text_tokenizer(special: Sequence[str] = ()) -> TextTokenizer:
    """A text tokenizer that knows `WORDS` and, behind them, `special` tokens."""
    text = TextTokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    text.pre_tokenizer = pre_tokenizers.Whitespace()
    text.add_special_tokens(list(special))
    return text


RELEASED_SPECIAL = [
    *("<eoss>", "<racm3:break>", "<|im_end|>", "<reserved08706>", "<reserved08799>"),
    *(f"<reserved{8800 + cells:05d}>" for cells in range(1, 25)),
]


def lumina_on_hub() -> ModelEntry:
    """A text-to-image model as Lumina-mGPT 2.0 is published: weights in several files, a configuration, a tokenizer."""

    def published(name: str) -> ModelFile:
        return ModelFile(name, "someone/lumina", alias=f"tiny-lumina/{name}")

    known = {**LUMINA, "vocab_size": 64, "first_code_id": 40}
    return ModelEntry(
        "tiny-lumina",
        Component(
            GENERATORS["lumina-mgpt-2"],
            {**known, "num_hidden_layers": 1},
            published("model.safetensors.index.json"),
            config_file=published("config.json"),
            dtype="bfloat16",
        ),
        Component(TOKENIZERS["movq"], MOVQ, ModelFile("movq.ckpt", "someone/movq")),
        "text to image, on Hugging Face",
        {"guidance_scale": 3.0, "schedule": "constant"},
        text=TextComponent({"tokenizer": published("tokenizer.json")}),
    )


def write_lumina_files(folder: Path) -> None:
    """The files of `lumina_on_hub`; its configuration file has one layer more than the registry says."""
    entry = lumina_on_hub()
    sizes = {"num_hidden_layers": 2, "vocab_size": 64, "rope_scaling": None, "vocabulary_map": {"<eoss>": 7}}
    whole = replace(entry.generator, config={**entry.generator.config, "num_hidden_layers": 2})
    state = {name: tensor.bfloat16() for name, tensor in weights(whole).items()}
    (folder / "config.json").write_text(json.dumps(sizes))
    text_tokenizer(RELEASED_SPECIAL).save(str(folder / "tokenizer.json"))
    files = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: state[name].clone() for name in state if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    torch.save({**weights(entry.tokenizer), "loss.perceptual.weight": torch.ones(3)}, folder / "movq.ckpt")


def module(component: Component, device: str = "cpu") -> nn.Module:
    """A generator or tokenizer with random weights; on "meta" they take no memory."""
    module_class, config_class = component.family.classes()
    torch.manual_seed(0)
    with torch.device(device):
        return module_class(load_config(config_class, component.config))


def weights(component: Component, device: str = "cpu") -> dict[str, Tensor]:
    """The state dict of `module(component, device)`."""
    return module(component, device).state_dict()


def tiny_llama() -> Any:
    """A Llama of transformers with 40 tokens and attention by the plug, which must be imported."""
    import transformers

    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    model.set_attn_implementation("softcfg")
    return model
