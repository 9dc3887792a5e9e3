"""Small text-to-image models as they are published: the files of their repositories, with random weights."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from filling import fill_state_dict
from goldens import FOLDER
from softcfg.models.emu3.prompts import SPECIAL_TOKENS
from softcfg.models.emu3.vocabulary import FIRST_SPECIAL
from softcfg.zoo import MODELS, ModelEntry, ModelFile

JANUS = {"code_count": 96, "grid_size": 6}
EMU3 = {"code_count": 64, "image_size": 32}
VISUAL = [f"<|visual token {i:06d}|>" for i in range(EMU3["code_count"])]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
JANUS_TOKENS = [
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|User|>", "<|Assistant|>", "<｜▁pad▁｜>"),
    *("<begin_of_image>", "<image_placeholder>"),
]
EMU3_TOKENS = [*FIRST_SPECIAL, "<|image token|>", "<|image start|>", "<|image end|>", *VISUAL]
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "fox", "in", "the", "snow", "of", "all", "colours"]


def golden(name: str, **sizes: int) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Configuration and tensor shapes of a golden file; `sizes` replaces fields and the first sizes of tables."""
    about = json.loads((FOLDER / f"{name}.json").read_text())
    config, shapes = about["config"], about["tensors"]
    for key, size in sizes.items():
        old, config[key] = config[key], size
        tables = ("embed_tokens.weight", "lm_head.weight", "quantize.embedding.weight")
        shapes |= {
            name: [size, *shape[1:]] for name, shape in shapes.items() if name.endswith(tables) and shape[0] == old
        }
    return config, shapes


def filled(shapes: Mapping[str, list[int]], seed: int) -> dict[str, Tensor]:
    return fill_state_dict(shapes, seed)


def byte_tokenizer(special: list[str]) -> Tokenizer:
    """Bytes, and `special` tokens after them."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(special)
    return tokenizer


def save_split(state: Mapping[str, Tensor], index: Path) -> None:
    """Weights in two files and their index, as `save_pretrained` writes them."""
    stem, suffix = index.name.removesuffix(".index.json").rsplit(".", 1)
    names = {name: f"{stem}-0000{1 + i % 2}-of-00002.{suffix}" for i, name in enumerate(state)}
    for file in set(names.values()):
        part = {name: tensor.clone() for name, tensor in state.items() if names[name] == file}
        save(part, index.with_name(file))
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))


def save(state: Mapping[str, Tensor], path: Path) -> None:
    if path.name.endswith(".index.json"):
        save_split(state, path)
    elif path.suffix == ".safetensors":
        save_file(dict(state), path)
    else:
        torch.save(dict(state), path)


def write(name: str, folder: Path) -> ModelEntry:
    """Write the files of a small stand-in for the zoo's model `name`, each under REPOSITORY/NAME, and return its entry.

    The entry differs from that of the zoo in the sizes alone.
    """
    known = MODELS[name]
    for file in known.files:
        place(folder, file).parent.mkdir(parents=True, exist_ok=True)
    if name.startswith("janus"):
        generator, tokenizer = write_janus(known, folder)
    elif name.startswith("emu3"):
        generator, tokenizer = write_emu3(known, folder)
    else:
        generator, tokenizer = write_llamagen(known, folder)
    return replace(
        known,
        generator=replace(known.generator, config=generator),
        tokenizer=replace(known.tokenizer, config=tokenizer),
    )


def place(folder: Path, file: ModelFile) -> Path:
    return folder / file.repository / file.name


def write_janus(known: ModelEntry, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    original = known.name.endswith("original")
    layout, prefix = ("-original", "gen_vision_model.") if original else ("", "model.vqmodel.")
    vq, vq_shapes = golden(f"janus/golden-tokenizer-decode{layout}-a")
    config, shapes = golden(
        f"janus/golden-generator-{'original' if original else 'cfg'}-a", vocab_size=256 + len(JANUS_TOKENS)
    )
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}
    bare = {name.removeprefix(prefix): shape for name, shape in vq_shapes.items()}
    state = {**filled(shapes, 1), **{prefix + name: tensor for name, tensor in filled(bare, 2).items()}}
    save({name: as_published(tensor) for name, tensor in state.items()}, place(folder, known.generator.file))
    assert known.text is not None
    byte_tokenizer(JANUS_TOKENS).save(str(place(folder, known.text.files["tokenizer"])))
    return {**config, **JANUS}, {**vq, "grid_size": JANUS["grid_size"]}


def write_emu3(known: ModelEntry, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    assert known.text is not None
    original = known.name.endswith("original")
    vq, vq_shapes = golden(f"emu3/golden-tokenizer-decode{'-original' if original else ''}-a")
    vocab = 256 + len(EMU3_TOKENS)
    config, shapes = golden(f"emu3/golden-generator-{'original' if original else 'cfg'}-a", vocab_size=vocab)
    ids = {key: 256 + EMU3_TOKENS.index(token) for key, token in SPECIAL_TOKENS.items()}
    config = {**config, **EMU3, "special_ids": ids, "max_position_embeddings": 1024}
    prefix = "model.vqmodel."
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}
    bare = {name.removeprefix(prefix): shape for name, shape in vq_shapes.items()}
    image = filled(bare, 2)
    if original:
        save(filled(shapes, 1), place(folder, known.generator.file))  # float32, as published
        save(image, place(folder, known.tokenizer.file))
        lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
        place(folder, known.text.files["tokenizer"]).write_text("".join(lines))
        names = EMU3_TOKENS[len(FIRST_SPECIAL) :]
        place(folder, known.text.files["special_tokens"]).write_text("\n".join(names))
    else:
        state = {**filled(shapes, 1), **{prefix + name: tensor for name, tensor in image.items()}}
        save({name: as_published(tensor) for name, tensor in state.items()}, place(folder, known.generator.file))
        byte_tokenizer(EMU3_TOKENS).save(str(place(folder, known.text.files["tokenizer"])))
    return config, {**vq, "image_size": EMU3["image_size"]}


def write_llamagen(known: ModelEntry, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from transformers import T5Config, T5EncoderModel

    config, shapes = golden("llamagen-t2i/golden-generator-cfg-a")
    vq, vq_shapes = golden("llamagen-t2i/golden-tokenizer-decode-a", codebook_size=config["vocab_size"])
    torch.save({"model": filled(shapes, 1), "steps": 3}, place(folder, known.generator.file))
    torch.save({"model": filled(vq_shapes, 2)}, place(folder, known.tokenizer.file))
    assert known.text is not None
    home = place(folder, known.text.files["encoder"]).parent
    with torch.random.fork_rng():
        torch.manual_seed(0)
        t5 = T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=48, d_kv=8, d_ff=32, num_layers=2, num_heads=4))
    t5.save_pretrained(home, max_shard_size="20KB")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words.save(str(home / "tokenizer.json"))
    return config, {**vq, "grid_size": 6}


def as_published(tensor: Tensor) -> Tensor:
    """In bfloat16, but for counters."""
    return tensor.bfloat16() if tensor.is_floating_point() else tensor
