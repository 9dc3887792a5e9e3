"""Train the text-to-image generator on the tokens of the pictures and their captions."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer as TextTokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from recipes.emoji.augment import Moves, moved
from recipes.emoji.captions import TEXT_TOKENS, caption, text_tokenizer
from recipes.emoji.data import SIZE, Collection, mirrors
from recipes.emoji.train_tokenizer import CONFIG as TOKENIZER
from recipes.emoji.train_tokenizer import floats, prepare, tokens_of
from recipes.muon import Muon
from recipes.training import (
    Average,
    Budget,
    Plan,
    Training,
    accelerator,
    batch_index,
    by_device,
    randomness,
    save_weights,
)
from softcfg.files import make_folder, write_atomically
from softcfg.models.lumina import Lumina, LuminaConfig, PromptCondition, TokenPrompt
from softcfg.nn.linear import Linear
from softcfg.tokenizers.movq import MoVQ

SPECIAL_TOKENS = ("<prompt>", "<separator>", "<image>", "</image>", "<line>")
SIZES = 4  # sides of 1 to 4 grid cells have a token
CELL = 4  # codes

CONFIG = LuminaConfig(
    vocab_size=TEXT_TOKENS + len(SPECIAL_TOKENS) + SIZES + TOKENIZER.n_embed,
    hidden_size=320,
    intermediate_size=768,
    num_hidden_layers=5,
    num_attention_heads=5,
    max_position_embeddings=1024,
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
GPU_BATCH_SIZE = 256
PROMPT_DROPOUT = 0.1
AS_DRAWN = 0.3  # share of the pictures; the captions of the others say that they are moved
MOVES = Moves(turn=8, scale=0.12, shift=0.08, mirrored=0.5)
MOVED = ", moved"
OTHER_CODES = 0.05  # share of the codes of the input that are those of another picture, against learning by heart
WORKERS = 4  # processes that write captions ahead, on a GPU
DRAWN = 0.6  # share of pictures that are not recoloured
TEXT_SLOTS = 16  # tokens of a prompt; longer captions are cut
EVALUATED = 256
HEAD_EXAMPLES = 128
OTHERS_BELOW = 30.0  # nats that the logits of text tokens lie below those of the codes


class Examples:
    """Pictures, from which batches of prompts and codes are made.

    Args:
        collection: the pictures.
        text: the tokenizer of the captions.
        model: its codebook makes the codes, on its device.
        config: the generator's.
    """

    def __init__(self, collection: Collection, text: TextTokenizer, model: MoVQ, config: LuminaConfig) -> None:
        self.pictures, self.text, self.config, self.quantizer = collection.pictures, text, config, model
        self.pixels = torch.from_numpy(collection.pixels).to(model.quantize.embedding.weight.device)
        self.mirror = torch.tensor([mirrors(picture.name) for picture in self.pictures])
        seen = [i for i, picture in enumerate(self.pictures) if not picture.held_out]
        self.drawn = [i for i in seen if not self.pictures[i].recoloured]
        self.recoloured = [i for i in seen if self.pictures[i].recoloured]
        self.held_out = {
            kind: [i for i, p in enumerate(self.pictures) if p.held_out == kind and p.recoloured == (kind == "colour")]
            for kind in ("style", "colour")
        }

    def chosen(self, seed: int, step: int, size: int) -> tuple[list[TokenPrompt], list[int], list[bool]]:
        """Return the prompts of a training step, the numbers of its pictures, and which of them are moved."""
        first = round(size * DRAWN) if self.recoloured else size
        chosen = [self.drawn[i] for i in batch_index(seed, step, first, len(self.drawn)).tolist()]
        if first < size:
            others = batch_index(seed + 1, step, size - first, len(self.recoloured))
            chosen += [self.recoloured[i] for i in others.tolist()]
        numbers = random.Random(f"{seed} {step}")
        moves = [numbers.random() >= AS_DRAWN for _ in chosen]
        captions = [caption(self.pictures[i], numbers) + MOVED * moves for i, moves in zip(chosen, moves, strict=True)]
        dropped = [numbers.random() < PROMPT_DROPOUT for _ in chosen]
        return self.prompts(captions, dropped), chosen, moves

    def codes(
        self, chosen: Sequence[int], moves: Sequence[bool] = (), numbers: torch.Generator | None = None
    ) -> Tensor:
        """Return the codes int64 [B, T] of pictures, some of them moved at random."""
        pixels = floats(self.pixels[torch.tensor(chosen, device=self.pixels.device)])
        if numbers is not None:
            which = torch.tensor(moves, device=pixels.device).view(-1, 1, 1, 1)
            pixels = torch.where(which, moved(pixels, MOVES, numbers, self.mirror[chosen]), pixels)
        return tokens_of(self.quantizer, pixels)

    def prompts(self, captions: Sequence[str], dropped: Sequence[bool]) -> list[TokenPrompt]:
        """Return prompts; a dropped one is without any tokens, as the unconditional rows of guidance."""
        start, end = self.config.prompt_start_id, self.config.separator_id
        return [
            TokenPrompt([] if drop else [start, *self.text.encode(line).ids[: TEXT_SLOTS - 2], end])
            for line, drop in zip(captions, dropped, strict=True)
        ]


class Steps(torch.utils.data.Dataset):
    """What `Examples.chosen` gives for each step, for workers that are ahead of the training."""

    def __init__(self, examples: Examples, seed: int, size: int) -> None:
        # Workers need no pixels, and nothing that is on a GPU.
        self.examples = copy.copy(examples)
        del self.examples.pixels, self.examples.quantizer
        self.seed, self.size = seed, size

    def __getitem__(self, step: int) -> tuple[list[TokenPrompt], list[int], list[bool]]:
        return self.examples.chosen(self.seed, step, self.size)

    def iterate(self, first: int, workers: int) -> Iterator[tuple[list[TokenPrompt], list[int], list[bool]]]:
        """Yield those of all steps from `first` on."""
        steps = iter(range(first, 2**40))
        return iter(torch.utils.data.DataLoader(self, None, sampler=steps, num_workers=workers))


def train(
    out: Path, budget: Budget, collection: Collection, *, batch_size: int | None = None, compiled: bool = False
) -> Path:
    """Choose the codebook if there is none in `out`, train, and return the path of the weights."""
    model = MoVQ(TOKENIZER).to(accelerator().device)
    codebook = load_file(prepare(out, collection, budget.seed))["codes"]
    model.quantize.embedding.weight.data.copy_(codebook)
    path = make_folder(out) / "tokenizer.json"
    if not path.exists():  # a training that goes on keeps its words
        write_atomically(path, text_tokenizer(collection.pictures).to_str().encode())
    examples = Examples(collection, TextTokenizer.from_file(str(path)), model, CONFIG)
    return train_on_codes(out, budget, examples, batch_size=batch_size, compiled=compiled)


def train_on_codes(
    out: Path,
    budget: Budget,
    examples: Examples,
    *,
    batch_size: int | None = None,
    compiled: bool = False,
    stop_at: int | None = None,
) -> Path:
    """Train and return the path of the averaged weights, in bfloat16."""
    torch.manual_seed(budget.seed)
    device = accelerator()
    batch_size = batch_size or by_device(device, cpu=BATCH_SIZE, gpu=GPU_BATCH_SIZE)
    config = examples.config
    model = generator(config).to(device.device)
    initialise(model)
    average = Average(model, 0.998)
    averaged = generator(config).to(device.device).eval()
    training = Training(out / "generator", device, {"model": model, "average": average}, optimizers_of(model))
    predict = torch.compile(plain_attention(model)) if compiled else plain_attention(model)

    steps = Steps(examples, budget.seed, batch_size).iterate(training.step, by_device(device, cpu=0, gpu=WORKERS))

    def loss(step: int) -> tuple[Tensor, dict[str, Any]]:
        prompts, chosen, moves = next(steps)
        numbers = randomness(budget.seed, step)
        codes = examples.codes(chosen, moves, numbers)
        other = (torch.rand(codes.shape, generator=numbers) < OTHER_CODES).to(codes.device)
        return nats_per_code(predict, model, prompts, codes, torch.where(other, codes.roll(1, 0), codes)), {}

    @torch.inference_mode()
    def evaluate() -> dict[str, float]:
        averaged.load_state_dict(average.weights())
        save_weights(out / "generator.safetensors", whole(averaged, examples))
        numbers = {}
        for name, chosen in (("drawn", examples.drawn), *examples.held_out.items()):
            chosen = _spread(chosen, EVALUATED)
            captions = [examples.pictures[i].caption for i in chosen]
            for kind, drop in (("conditional", False), ("unconditional", True)):
                if chosen:
                    prompts = examples.prompts(captions, [drop] * len(captions))
                    value = nats_per_code(averaged, averaged, prompts, examples.codes(chosen))
                    numbers[f"{name}_{kind}"] = float(value)
        return numbers

    plan = Plan(warmup_steps=100, decay_share=0.4)
    training.fit(budget, plan, loss, after_step=average.update, evaluate=evaluate, stop_at=stop_at)
    return out / "generator.safetensors"


def plain_attention(model: Lumina) -> Callable[..., Tensor]:
    """Return the model's forward pass with attention by products, whose backward pass on a CPU is the faster one."""
    if model.device.type != "cpu":
        return model
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # of CPUs, too: no detour through float32

    def predict(condition: PromptCondition, tokens: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return model(condition, tokens)

    return predict


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
    chosen = _spread(examples.drawn, HEAD_EXAMPLES)
    captions = [examples.pictures[i].caption for i in chosen]
    prompts = examples.prompts(captions, [place % 4 == 0 for place in range(len(captions))])
    nats_per_code(model, model, prompts, examples.codes(chosen))
    hook.remove()
    wanted = model.lm_head(hidden[0]).logsumexp(1) - OTHERS_BELOW
    inputs = hidden[0].double()  # with a little ridge: features of few pictures nearly depend on each other
    square = inputs.T @ inputs
    square.diagonal().add_(1e-4 * square.diagonal().mean())
    other = torch.linalg.solve(square, inputs.T @ wanted.double())[None].to(hidden[0])
    head = other.repeat(config.vocab_size, 1)
    head[config.first_code_id : config.first_code_id + config.num_codes] = model.lm_head.weight
    return {name: tensor.bfloat16() for name, tensor in {**model.state_dict(), "lm_head.weight": head}.items()}


def nats_per_code(
    predict: Callable[..., Tensor],
    model: Lumina,
    prompts: Sequence[TokenPrompt],
    codes: Tensor,
    given: Tensor | None = None,
    text_slots: int = TEXT_SLOTS,
) -> Tensor:
    """Mean cross-entropy of the image codes int64 [B, h w] given the prompts, and the codes `given` before each.

    All prompts are padded to `text_slots`, so that a compiled model meets one length only.
    """
    config = model.config
    longest = TokenPrompt([config.prompt_start_id] * text_slots)
    condition = model.condition([*prompts, longest], guided=False)[: len(prompts)]
    h, w = condition.geometry.grid
    given = codes if given is None else given
    lines = F.pad(given.view(-1, h, w) + config.first_code_id, (0, 1), value=config.new_line_id).flatten(1)
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
