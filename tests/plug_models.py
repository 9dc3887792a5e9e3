"""Small models of transformers for the tests of the plug."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

TEXT = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PROMPTS = torch.tensor([[0, 0, 7, 8, 9], [10, 11, 12, 13, 14]])  # id 0 is padding
SHORT = torch.tensor([[1, 3]])
WINDOW = 5


def with_large_weights(model: Any) -> Any:
    """The model with random weights that are large enough for guidance to matter, and the plug's attention."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    model.set_attn_implementation("softcfg")
    return model.eval()


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def mistral() -> Any:
    """Every layer sees the last five slots alone."""
    return transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT, sliding_window=WINDOW))


def janus() -> Any:
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
        "num_image_tokens": 4, "projection_dim": 32,
    }  # fmt: skip
    vq = {
        "num_embeddings": 24, "latent_channels": 16, "base_channels": 32, "channel_multiplier": [1],
        "num_res_blocks": 1, "projection_dim": 32, "image_token_embed_dim": 32,
    }  # fmt: skip
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=5)
    return transformers.JanusForConditionalGeneration(config)
