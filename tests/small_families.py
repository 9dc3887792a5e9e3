"""A small generator of every family, with weights large enough for roundings to matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import softcfg
from softcfg.models.base import Generator
from softcfg.zoo import GENERATORS, Component, ModelFile
from tiny_models import ALITOK, LUMINA, RAR, weights

LLAMA = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 160,
}  # fmt: skip
LLAMAGEN = {"dim": 32, "n_layer": 2, "n_head": 2, "vocab_size": 16, "block_size": 4}
EMU3_IDS = {"pad": 0, "boi": 1, "img": 2, "eol": 3, "eof": 4, "eoi": 5, "eos": 6, "bos": 7, "visual0": 40}
FAMILIES: dict[str, dict[str, Any]] = {
    "alitok": ALITOK,
    "rar": {**RAR, "hidden_size": 32},
    "robustok": {**RAR, "hidden_size": 32},
    "llamagen": {**LLAMAGEN, "num_classes": 3},
    "llamagen-t2i": {**LLAMAGEN, "cls_token_num": 4, "caption_dim": 8},
    "janus-pro": {
        **LLAMA, "code_count": 16, "code_dim": 4, "grid_size": 2, "special_ids": {"bos": 1, "pad": 2, "boi": 3},
    },
    "emu3": {**LLAMA, "code_count": 16, "special_ids": EMU3_IDS, "image_size": 24},
    "lumina-mgpt-2": LUMINA,
}  # fmt: skip


def state_of(family: str) -> dict[str, Tensor]:
    """Random weights of a family under its released names."""
    state = weights(Component(GENERATORS[family], FAMILIES[family], ModelFile("none")))
    scaled = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=scaled) * 0.4 if tensor.dim() > 1 else tensor
        for name, tensor in state.items()
    }


def load(family: str, dtype: torch.dtype | None = None) -> Generator:
    return softcfg.load_generator(family, config=FAMILIES[family], checkpoint=state_of(family), dtype=dtype)
