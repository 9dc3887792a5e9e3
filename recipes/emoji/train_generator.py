"""Train the text-to-image generator on the tokens of the pictures and their captions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as TextTokenizer
from torch import Tensor, nn

from recipes.emoji.captions import TEXT_TOKENS, caption, pair_caption, text_tokenizer
from recipes.emoji.data import SIZE, Picture
from recipes.emoji.train_tokenizer import CONFIG as TOKENIZER
from recipes.emoji.train_tokenizer import pixels_of, tokenizer_from, tokens_of
from recipes.muon import Muon
from recipes.training import Average, Budget, Plan, Training, accelerator, batch_index, save_weights
from softcfg.files import make_folder, write_atomically
from softcfg.models.lumina import Lumina, LuminaConfig, TokenPrompt
from softcfg.nn.linear import Linear

SPECIAL_TOKENS = ("<prompt>", "<separator>", "<image>", "</image>", "<line>")
SIZES = 8  # sides of 1 to 8 grid cells have a token
CELL = 4  # codes

CONFIG = LuminaConfig(
    vocab_size=TEXT_TOKENS + len(SPECIAL_TOKENS) + SIZES + TOKENIZER.n_embed,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=6,
    max_position_embeddings=2048,
    prompt_start_id=TEXT_TOKENS,
    separator_id=TEXT_TOKENS + 1,
    image_start_id=TEXT_TOKENS + 2,
    image_end_id=TEXT_TOKENS + 3,
    new_line_id=TEXT_TOKENS + 4,
    size_id=TEXT_TOKENS + 4,  # of n = 1 .. SIZES cells: the ids behind
    first_code_id=TEXT_TOKENS + len(SPECIAL_TOKENS) + SIZES,
    num_codes=TOKENIZER.n_embed,
    codes_per_cell=CELL,
    cell_pixels=CELL * TOKENIZER.patch_size,
    image_size=SIZE,
)
BATCH_SIZE = 32
PROMPT_DROPOUT = 0.1
AS_DRAWN = 0.6  # share of pictures that are not recoloured
PAIRS_EVERY = 8  # batches
EVALUATED = 256
HEAD_EXAMPLES = 128
OTHERS_BELOW = 30.0  # nats that the logits of text tokens lie below those of the codes


class Examples:
    """Pictures as codes, from which batches of prompts and images are made.

    Args:
        pictures: N pictures.
        codes: int64 [N, 64].
        text: the tokenizer of the captions.
    """

    def __init__(self, pictures: Sequence[Picture], codes: Tensor, text: TextTokenizer, config: LuminaConfig) -> None:
        self.pictures, self.codes, self.text, self.config = pictures, codes, text, config
        self.as_drawn = [i for i, picture in enumerate(pictures) if not picture.recoloured]
        self.recoloured = [i for i, picture in enumerate(pictures) if picture.recoloured and not picture.held_out]
        self.held_out = [i for i, picture in enumerate(pictures) if picture.held_out]

    def batch(self, seed: int, step: int, size: int) -> tuple[list[TokenPrompt], Tensor]:
        """Return the prompts and codes int64 [B, h w] of a training step; every eighth holds pairs of pictures."""
        first = round(size * AS_DRAWN) if self.recoloured else size
        chosen = [self.as_drawn[i] for i in batch_index(seed, step, first, len(self.as_drawn)).tolist()]
        if first < size:
            others = batch_index(seed + 1, step, size - first, len(self.recoloured))
            chosen += [self.recoloured[i] for i in others.tolist()]
        numbers = random.Random(f"{seed} {step}")
        captions = [caption(self.pictures[i], numbers) for i in chosen]
        codes = self.codes[chosen]
        dropped = [numbers.random() < PROMPT_DROPOUT for _ in chosen]
        if step % PAIRS_EVERY != PAIRS_EVERY - 1:
            return self.prompts(captions, dropped), codes
        order = numbers.sample(range(size), size // 2 * 2)
        wide = step % (2 * PAIRS_EVERY) < PAIRS_EVERY
        pairs = list(zip(order[::2], order[1::2], strict=True))
        captions = [pair_caption(captions[i], captions[j], wide=wide) for i, j in pairs]
        side = SIZE // TOKENIZER.patch_size
        both = codes.view(size, side, side)[order].unflatten(0, (-1, 2))
        merged = torch.cat(both.unbind(1), dim=2 if wide else 1).flatten(1)
        width, height = (2 * SIZE, SIZE) if wide else (SIZE, 2 * SIZE)
        return self.prompts(captions, dropped[: len(pairs)], width, height), merged

    def prompts(
        self, captions: Sequence[str], dropped: Sequence[bool], width: int = SIZE, height: int = SIZE
    ) -> list[TokenPrompt]:
        """Return prompts; a dropped one is without any tokens, as the unconditional rows of guidance."""
        start, end = self.config.prompt_start_id, self.config.separator_id
        return [
            TokenPrompt([] if drop else [start, *self.text.encode(line).ids, end], width, height)
            for line, drop in zip(captions, dropped, strict=True)
        ]


def train(out: Path, budget: Budget, pictures: Sequence[Picture], *, compiled: bool = False) -> Path:
    """Tokenise the pictures with the tokenizer in `out`, train, and return the path of the weights."""
    tokenizer = tokenizer_from(out / "tokenizer.safetensors").to(accelerator().device)
    codes = torch.cat([tokens_of(tokenizer, part).cpu() for part in pixels_of(pictures).split(250)])
    path = make_folder(out) / "tokenizer.json"
    if not path.exists():  # a training that goes on keeps its words
        write_atomically(path, text_tokenizer(pictures).to_str().encode())
    text = TextTokenizer.from_file(str(path))
    return train_on_codes(out, budget, Examples(pictures, codes, text, CONFIG), compiled=compiled)


def train_on_codes(
    out: Path,
    budget: Budget,
    examples: Examples,
    *,
    batch_size: int = BATCH_SIZE,
    compiled: bool = False,
    stop_at: int | None = None,
) -> Path:
    """Train and return the path of the averaged weights, in bfloat16."""
    torch.manual_seed(budget.seed)
    device = accelerator()
    config = examples.config
    model = generator(config).to(device.device)
    initialise(model)
    average = Average(model, 0.998)
    averaged = generator(config).to(device.device).eval()
    training = Training(out / "generator", device, {"model": model, "average": average}, optimizers_of(model))
    predict = torch.compile(model, dynamic=True) if compiled else model

    def loss(step: int) -> tuple[Tensor, dict[str, Any]]:
        return nats_per_code(predict, model, *examples.batch(budget.seed, step, batch_size)), {}

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        averaged.load_state_dict(average.weights())
        save_weights(out / "generator.safetensors", whole(averaged, examples))
        numbers = {}
        for name, chosen in (("as_drawn", examples.as_drawn), ("held_out", examples.held_out)):
            chosen = _spread(chosen, EVALUATED)
            names = [examples.pictures[i].name for i in chosen]
            for kind, drop in (("conditional", False), ("unconditional", True)):
                if chosen:
                    prompts = examples.prompts(names, [drop] * len(names))
                    value = nats_per_code(averaged, averaged, prompts, examples.codes[chosen])
                    numbers[f"{name}_{kind}"] = float(value)
        return numbers

    plan = Plan(warmup_steps=100, decay_share=0.4)
    training.fit(budget, plan, loss, after_step=average.update, evaluate=evaluate, stop_at=stop_at)
    return out / "generator.safetensors"


def _spread(values: Sequence[int], count: int) -> list[int]:
    """About `count` of the values, evenly spread."""
    return list(values[:: max(1, len(values) // count)])


def generator(config: LuminaConfig) -> Lumina:
    """Return a generator whose head knows the image codes only: other tokens are never drawn, they stand by rule."""
    model = Lumina(config)
    model.lm_head = Linear(config.hidden_size, config.num_codes, bias=False)
    return model


@torch.no_grad()
def whole(model: Lumina, examples: Examples) -> dict[str, Tensor]:
    """The weights in bfloat16 with a head of the whole vocabulary, in which all other tokens are unlikely."""
    config = model.config
    hidden: list[Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0].flatten(0, 1)))
    chosen = _spread(examples.as_drawn, HEAD_EXAMPLES)
    names = [examples.pictures[i].name for i in chosen]
    prompts = examples.prompts(names, [place % 4 == 0 for place in range(len(names))])
    nats_per_code(model, model, prompts, examples.codes[chosen])
    hook.remove()
    wanted = model.lm_head(hidden[0]).logsumexp(1) - OTHERS_BELOW
    other = torch.linalg.lstsq(hidden[0], wanted[:, None]).solution.T
    head = other.repeat(config.vocab_size, 1)
    head[config.first_code_id : config.first_code_id + config.num_codes] = model.lm_head.weight
    return {name: tensor.bfloat16() for name, tensor in {**model.state_dict(), "lm_head.weight": head}.items()}


def nats_per_code(
    predict: Callable[..., Tensor], model: Lumina, prompts: Sequence[TokenPrompt], codes: Tensor
) -> Tensor:
    """Mean cross-entropy of the image codes int64 [B, h w] given the prompts."""
    config = model.config
    condition = model.condition(prompts, guided=False)
    h, w = condition.geometry.grid
    lines = F.pad(codes.view(-1, h, w) + config.first_code_id, (0, 1), value=config.new_line_id).flatten(1)
    logits = predict(condition, lines.to(model.device))
    steps = torch.arange(condition.num_tokens, device=model.device)
    logits = logits[:, model.is_code(steps, condition)]
    return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten().to(model.device))


@torch.no_grad()
def initialise(model: Lumina) -> None:
    """Normal weights; the matrices that end a branch start at zero."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
        elif name.endswith("_proj.weight"):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name == "lm_head.weight":
            nn.init.normal_(parameter, std=0.02)
        elif name == "model.embed_tokens.weight":
            nn.init.normal_(parameter, std=0.2)


def optimizers_of(model: Lumina) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else, fast for the embedding of rare words."""
    matrices = [p for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    embedding = model.model.embed_tokens.weight
    apart = {id(p) for p in (*matrices, embedding)}
    rest = [p for p in model.parameters() if id(p) not in apart]
    groups = [{"params": [embedding], "lr": 1e-2}, {"params": rest, "lr": 3e-3}]
    return [
        Muon(matrices, lr=6e-3, weight_decay=0.01),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0),
    ]
