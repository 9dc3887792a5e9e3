"""Drawing with SoftCFG here against `model.generate` of transformers with its own guidance, at full width.

    python -m benchmarks.against_transformers --model janus-pro-1b --layers 4
    python -m benchmarks.against_transformers --model emu3-gen --layers 2 --dtype bfloat16
    python -m benchmarks.against_transformers --device cuda --dtype bfloat16 --layers 24 --side 10 --batch-size 1 4

Both sides have the same weights (random, one copy in memory), prompts, scale and number of tokens, and take turns in
one process. Whole images of two sizes are drawn, and a step is what a token more takes, so that neither reading the
prompt nor laying out weights is part of it; images of the larger size are compared beside it.

Janus-Pro is drawn by `generate(generation_mode="image")`, Emu3 by `generate` with `guidance_scale` and
`negative_prompt_ids` (UnbatchedClassifierFreeGuidanceLogitsProcessor), its layout rule by `prefix_allowed_tokens_fn`,
as their documentation shows.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.timing import machine, medians, table
from softcfg.configuration import load_config
from softcfg.decoding import Sampling, decode, image_uniforms
from softcfg.guidance import CFG, SoftCFG
from softcfg.models.base import Generator
from softcfg.models.emu3 import Emu3Config, Emu3Prompt
from softcfg.models.janus import JanusConfig
from softcfg.zoo.loading import load_generator
from softcfg.zoo.registry import MODELS

PROMPT_TOKENS = 32


def config_of(name: str, layers: int, side: int) -> Any:
    """The configuration of a model, cut to some layers, for images of side x side codes."""
    part = MODELS[name].generator
    config: Any = load_config(part.family.classes()[1], part.config)
    size = {"grid_size": side} if isinstance(config, JanusConfig) else {"image_size": 8 * side}
    return replace(config, num_hidden_layers=layers, **size)


def llama(config: Any) -> dict[str, Any]:
    """What both libraries call the same."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "rms_norm_eps",
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    sizes = {name: getattr(config, name) for name in names}
    return {**sizes, "num_key_value_heads": config.key_heads, "rope_parameters": rope}


def build(model: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model of transformers with random weights, made in `dtype` at once, on the default device."""
    from transformers.initialization import no_init_weights

    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            made = model(config)
    finally:
        torch.set_default_dtype(usual)
    for parameter in made.parameters():
        parameter.uniform_(-0.03, 0.03)
    return made.eval()


Drawing = Callable[[int, Any], Callable[[], object]]  # of a batch, and the configuration that says the size


def janus(config: JanusConfig, dtype: torch.dtype) -> tuple[Any, Drawing]:
    """The model of transformers, and what draws with it."""
    from transformers import JanusConfig as Config
    from transformers import JanusForConditionalGeneration as Model
    from transformers import StaticCache

    tokens, special = config.grid_size**2, config.special_ids
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    whole = Config(
        text_config=llama(config),
        vision_config={**small, "num_image_tokens": tokens, "projection_dim": config.hidden_size},
        vq_config={
            "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 32,
            "embed_dim": config.code_dim, "num_embeddings": config.code_count, "projection_dim": config.hidden_size,
            "image_token_embed_dim": config.hidden_size, "num_patches": config.grid_size,
        },
    )  # fmt: skip
    model = build(Model, whole, dtype)
    generation = model.generation_config
    generation.generation_kwargs = {"boi_token_id": special["boi"]}
    generation.bos_token_id, generation.pad_token_id = special["bos"], special["pad"]

    def draw(batch: int, config: JanusConfig) -> Callable[[], object]:
        ids = torch.tensor([janus_prompt(config)] * batch, device=model.device)

        def run() -> object:
            model.model.vision_model.config.num_image_tokens = config.grid_size**2
            slots = PROMPT_TOKENS + config.grid_size**2
            # It is the cache that `generate` makes by itself, except that this fails in 5.17.
            return model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=True, top_k=0,
                guidance_scale=5.0, max_length=slots,
                past_key_values=StaticCache(model.config.get_text_config(), max_cache_len=slots),
            )  # fmt: skip

        return run

    return model, draw


def janus_prompt(config: JanusConfig) -> list[int]:
    return [config.special_ids["bos"], *[7] * (PROMPT_TOKENS - 2), config.special_ids["boi"]]


def emu3(config: Emu3Config, dtype: torch.dtype) -> tuple[Any, Drawing]:
    """The model of transformers, and what draws with it."""
    from transformers import Emu3Config as Config
    from transformers import Emu3ForConditionalGeneration as Model

    special = config.special_ids
    whole = Config(
        text_config={**llama(config), "pad_token_id": special["pad"], "bos_token_id": special["bos"]},
        vq_config={"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "attn_resolutions": [],
                   "codebook_size": config.code_count},
        vocabulary_map={"<image>": 0},
        tie_word_embeddings=False,
    )  # fmt: skip
    model = build(Model, whole, dtype)
    visual = list(range(special["visual0"], special["visual0"] + config.code_count))
    ending = [special[name] for name in ("eof", "eoi", "eos")]

    def draw(batch: int, config: Emu3Config) -> Callable[[], object]:
        geometry = config.geometry(*config.default_grid)
        codes = geometry.is_code(torch.arange(geometry.num_tokens)).tolist()
        allowed = [visual if code else [special["eol"]] for code in codes]
        allowed[-len(ending) :] = [[token] for token in ending]
        prompt, negative = (torch.tensor([emu3_prompt(config)] * batch, device=model.device) for _ in range(2))
        return lambda: model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=2048, guidance_scale=3.0,
            negative_prompt_ids=negative, negative_prompt_attention_mask=torch.ones_like(negative),
            max_new_tokens=geometry.num_tokens, eos_token_id=None,
            prefix_allowed_tokens_fn=lambda _, ids: allowed[len(ids) - PROMPT_TOKENS],
        )  # fmt: skip

    return model, draw


def emu3_prompt(config: Emu3Config) -> list[int]:
    special = config.special_ids
    return [special["bos"], *[7] * (PROMPT_TOKENS - 3), special["boi"], special["img"]]


def ours(generator: Generator, batch: int, guidance: CFG, sampling: Sampling) -> Callable[[], object]:
    config: Any = generator.config
    prompt: Any = janus_prompt(config)
    if isinstance(config, Emu3Config):
        prompt = Emu3Prompt(emu3_prompt(config), emu3_prompt(config))
    uniforms = image_uniforms(0, range(batch), generator.num_tokens)
    return lambda: decode(generator, [prompt] * batch, guidance, uniforms=uniforms, sampling=sampling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["janus-pro-1b", "janus-pro-7b", "emu3-gen"], default="janus-pro-1b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--side", type=int, default=12, help="codes along a side of the images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    dtype = getattr(torch, args.dtype)
    small, config = (config_of(args.model, args.layers, side) for side in (args.side // 2, args.side))
    family = MODELS[args.model].generator.family.name
    with torch.no_grad():
        torch.manual_seed(0)
        with torch.device(args.device):
            model, theirs = (janus if family == "janus-pro" else emu3)(config, dtype)
        generators = [load_generator(family, each, model.state_dict(), model.device, dtype) for each in (small, config)]
        scale, top_k = MODELS[args.model].sampling["guidance_scale"], MODELS[args.model].sampling["top_k"]
        sampling, rows = Sampling(1.0, top_k), []
        cfg, soft = CFG(scale, schedule="constant"), SoftCFG(scale, schedule="constant")
        for batch in args.batch_size:
            sides = {
                (name, tokens): draw
                for each, tokens in ((generator, generator.num_tokens) for generator in generators)
                for name, draw in (
                    ("transformers", theirs(batch, each.config)),
                    ("CFG", ours(each, batch, cfg, sampling)),
                    ("SoftCFG", ours(each, batch, soft, sampling)),
                )
            }
            seconds = medians(sides, args.repeats)
            few, many = (generator.num_tokens for generator in generators)
            image = {name: seconds[name, many] for name, _ in sides}
            step = {name: 1e3 * (seconds[name, many] - seconds[name, few]) / (many - few) for name in image}
            ratios = [each["transformers"] / each[name] for each in (step, image) for name in ("CFG", "SoftCFG")]
            rows.append([batch, *step.values(), *ratios])
    print(f"{args.model}, {args.layers} layers, {few} and {many} tokens, {args.dtype}, {machine(args.device)}\n")
    header = [
        "batch", "transformers, ms a step", "CFG", "SoftCFG", "times as fast, CFG", "times as fast, SoftCFG",
        "whole image, CFG", "whole image, SoftCFG",
    ]  # fmt: skip
    print(table(header, rows))


if __name__ == "__main__":
    main()
