"""A small generator behind prompts of different lengths, whose rows of tokens end with a token of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softcfg.models.base import Condition, Generator
from softcfg.models.geometry import Geometry
from softcfg.nn import AttentionContext, Position, Rotary, SelfAttention
from softcfg.nn.rotary import angles_1d

CODES, WIDTH, HEADS, LAYERS = 3, 16, 2, 2
END_OF_LINE = CODES  # the last token that may be drawn
LINE = 3  # tokens of a line, its end included


class Prompts(Condition):
    """Left-padded prompts, ids [rows, slots]."""

    def __init__(self, ids: Tensor, padding: Tensor | None, num_tokens: int, geometry: Geometry | None = None) -> None:
        super().__init__(len(ids), ids.shape[1], num_tokens, padding, geometry)
        self.ids = ids

    def __getitem__(self, rows: slice) -> Prompts:
        padding = None if self.padding is None else self.padding[rows]
        return Prompts(self.ids[rows], padding, self.num_tokens, self.geometry if self.grid else None)


class Block(SelfAttention):
    def forward(self, x: Tensor, layer: int, context: AttentionContext) -> Tensor:
        return x + super().forward(x, layer, context)


class PromptGenerator(Generator):
    """A decoder over prompts (lists of ids below 8) and image tokens; without guidance's prompt, the id 0 alone."""

    cache_shape = (LAYERS, HEADS, WIDTH // HEADS)
    vocab_size = CODES + 1

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.prompt = nn.Embedding(8, WIDTH)
        self.token = nn.Embedding(self.vocab_size, WIDTH)
        self.blocks = nn.ModuleList(
            Block(WIDTH, HEADS, nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)) for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, self.vocab_size)
        angles = angles_1d(torch.arange(64, device="cpu"), WIDTH // HEADS // 2, 100.0)
        self.register_buffer("angles", angles, persistent=False)

    def condition(self, prompts: list[list[int]], *, guided: bool) -> Prompts:
        prompts = prompts + [[0]] * len(prompts) if guided else prompts
        slots = max(map(len, prompts))
        padding = torch.tensor([slots - len(prompt) for prompt in prompts])
        ids = torch.tensor([[7] * (slots - len(prompt)) + prompt for prompt in prompts])
        return Prompts(ids, padding if padding.any() else None, self.num_tokens)

    def embed_condition(self, condition: Condition) -> Tensor:
        assert isinstance(condition, Prompts)
        return self.prompt(condition.ids)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return self.token(tokens)

    def rotary(self, condition: Condition, position: Position, new: int) -> Rotary:
        angles = self.angles[position.index(new, condition.padding)]
        return Rotary(angles.cos(), angles.sin())

    def logits(self, x: Tensor) -> Tensor:
        return self.output(self.norm(x))

    def constrain(self, logits: Tensor, steps: Tensor, condition: Condition) -> Tensor:
        end = torch.arange(self.vocab_size) == END_OF_LINE
        return logits.masked_fill(self.is_code(steps, condition)[..., None] == end, float("-inf"))

    def is_code(self, steps: Tensor, condition: Condition) -> Tensor:
        return steps % LINE != LINE - 1


def prompt_generator(num_tokens: int) -> PromptGenerator:
    """The generator with random weights large enough to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = PromptGenerator(num_tokens)
        for parameter in generator.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.7)
    return generator.requires_grad_(False).eval()
