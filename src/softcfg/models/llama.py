"""Shared parts of the generators that are Llama decoders and read prompts as token ids."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.configuration import require_positive
from softcfg.errors import UserError, quote
from softcfg.models.base import Condition, Generator
from softcfg.models.geometry import Geometry
from softcfg.models.ids import as_ids
from softcfg.nn.fused import products
from softcfg.nn.linear import Linear
from softcfg.nn.llama import LlamaAttention, LlamaBlock, LlamaDecoder
from softcfg.nn.position import Position
from softcfg.nn.rotary import Rotary, angles_1d

# What a published configuration may say beside the fields of `LlamaConfig`, and of the rotary embedding.
COMPUTED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
COMPUTED_ROPE = {"type": "default", "rope_type": "default", "partial_rotary_factor": 1.0}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of a Llama decoder, under the names of the published `config.json`.

    Attributes:
        vocab_size: rows of the table of text tokens.
        num_key_value_heads: by default `num_attention_heads`.
        max_position_embeddings: the longest sequence, prompt and image together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float

    def __post_init__(self) -> None:
        require_positive(
            self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "rms_norm_eps", "rope_theta",
        )  # fmt: skip
        heads = self.num_attention_heads
        if self.hidden_size % (2 * heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 x num_attention_heads ({heads}), for the "
                "rotary embedding"
            )
        if self.key_heads < 1 or heads % self.key_heads:
            raise ValueError(
                f"num_attention_heads {heads} must be a multiple of num_key_value_heads ({self.num_key_value_heads})"
            )

    @classmethod
    def of_published(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a published `config.json`, with `rope_theta` also where transformers 5 puts it elsewhere.

        Raises:
            ValueError: a value stands for a computation that is not that of the decoder.
        """
        given, computed = dict(values), dict(COMPUTED)
        for rope in ("rope_scaling", "rope_parameters"):
            inside = values.get(rope)
            if isinstance(inside, Mapping):
                given |= {rope: None, **{f"{rope}.{name}": value for name, value in inside.items()}}
            computed |= {rope: None, **{f"{rope}.{name}": value for name, value in COMPUTED_ROPE.items()}}
        width, heads = (values.get(name, getattr(cls, name, None)) for name in ("hidden_size", "num_attention_heads"))
        if isinstance(width, int) and isinstance(heads, int) and heads:
            computed["head_dim"] = width // heads
        for name, value in computed.items():
            if given.get(name) not in (None, value):
                raise ValueError(f"{name} is {quote(given[name])}, only {value!r} is computed")
        theta = given.get("rope_parameters.rope_theta")
        return {**values, **({} if theta is None else {"rope_theta": theta})}

    @property
    def key_heads(self) -> int:
        """Heads of the keys and values."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    def check_ids(self, ids: dict[str, int], names: Sequence[str], limit: int) -> None:
        """Raise `ValueError` unless `ids` has a token id below `limit` for each of `names`."""
        for name in names:
            if not 0 <= ids.get(name, -1) < limit:
                raise ValueError(f"special_ids must have {name} in 0..{limit - 1}, got {ids.get(name)}")


ConfigT = TypeVar("ConfigT", bound=LlamaConfig)


class PromptIds(Condition):
    """Prompts of token ids, left-padded to one length.

    Attributes:
        ids: int64 [rows, slots], padding in front.
    """

    def __init__(self, ids: Tensor, padding: Tensor | None, geometry: Geometry) -> None:
        rows, slots = ids.shape
        super().__init__(rows, slots, geometry.num_tokens, padding, geometry)
        self.ids = ids

    def __getitem__(self, rows: slice) -> PromptIds:
        """See `Condition.__getitem__`."""
        padding = None if self.padding is None else self.padding[rows]
        return PromptIds(self.ids[rows], padding, self.geometry)


def left_pad(prompts: Sequence[Tensor], pad: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Put prompts int64 [n] of different lengths into one batch.

    Returns:
        int64 [rows, longest] with `pad` in front of the shorter ones, and how much of it, int64 [rows]; None for the
        latter if all have one length.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    ids = torch.stack([F.pad(prompt, (longest - len(prompt), 0), value=pad) for prompt in prompts])
    padding = (longest - lengths).to(device) if (lengths < longest).any() else None
    return ids.to(device), padding


def prompt_ids(prompt: Sequence[int] | Tensor, vocab_size: int) -> Tensor:
    """A prompt of token ids as int64 [n].

    Raises:
        UserError: it is empty, or holds something that is not a token id.
    """
    ids = as_ids(prompt, "prompt ids", vocab_size)
    if ids.dim() != 1 or not len(ids):
        raise UserError(f"a prompt must be a flat list of at least one token id, got shape {list(ids.shape)}")
    return ids


class LlamaGenerator(Generator):
    """A generator whose body is a Llama decoder; positions count from 0 at the first token after the padding.

    A family makes its modules, with `make_decoder`, and says what the inputs and the logits are.
    """

    no_split_modules = ("LlamaBlock",)
    steps_replay = True

    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.cache_shape = (config.num_hidden_layers, config.key_heads, config.head_dim)
        positions = torch.arange(config.max_position_embeddings, device="cpu")
        angles = angles_1d(positions, config.head_dim // 2, config.rope_theta)
        self.keep_rotary(angles.cos(), angles.sin())

    @property
    def decoder(self) -> LlamaDecoder:
        """The body, wherever the published names have it."""
        raise NotImplementedError

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        return self.decoder.layers

    def embed_condition(self, condition: Condition) -> Tensor:
        """See `Generator.embed_condition`."""
        assert isinstance(condition, PromptIds)
        return self.decoder.embed_tokens(condition.ids)

    def rotary(self, condition: Condition, position: Position, new: int) -> Rotary:
        """See `Generator.rotary`."""
        where = position.index(new, condition.padding)
        return Rotary(self.rotary_cos[where], self.rotary_sin[where], halves=True)

    def check_length(self, condition: Condition) -> None:
        """Raise `UserError` for a condition that is longer than the model's positions."""
        most = self.config.max_position_embeddings
        if condition.cache_slots > most:
            raise UserError(
                f"prompt and image take {condition.cache_slots} positions, but the model has {most}; give a shorter "
                "prompt or a smaller image"
            )


class SharedVocabularyGenerator(LlamaGenerator):
    """A Llama decoder over one vocabulary of text, structure and image codes, with published names `model`, `lm_head`.

    Image tokens are ids of the whole vocabulary; a rule says which are allowed at a step. A family says which structure
    token stands where no code does.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.model = self.make_body()
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def make_body(self) -> LlamaDecoder:
        """A new body; by default of `LlamaBlock`s."""
        return make_decoder(self.config)

    @property
    @abstractmethod
    def code_ids(self) -> range:
        """The tokens that are image codes, in the order of the codes."""

    @abstractmethod
    def structure(self, steps: Tensor, condition: Condition) -> Tensor:
        """The tokens, int64 like `steps` [n] or [B, n], that must stand at steps where no code does."""

    @property
    def decoder(self) -> LlamaDecoder:
        """See `LlamaGenerator.decoder`."""
        return self.model

    @property
    def token_embedding(self) -> nn.Embedding:
        """See `Generator.token_embedding`."""
        return self.model.embed_tokens

    def logits(self, x: Tensor) -> Tensor:
        """See `Generator.logits`; they are float32 or better."""
        return precise(products(x, self.lm_head, norm=self.model.norm)[0])

    def allowed(self, steps: Tensor, condition: Condition) -> Tensor:
        """See `Generator.allowed`."""
        is_code, structure = condition.geometry.is_code(steps), self.structure(steps, condition)
        first, stop = (
            structure.where(~is_code, self.code_ids.start),
            (structure + 1).where(~is_code, self.code_ids.stop),
        )
        return torch.stack((first, stop), dim=-1)

    def image_codes(self, tokens: Tensor, condition: Condition) -> Tensor:
        """See `Generator.image_codes`."""
        steps = torch.arange(condition.num_tokens, device=tokens.device)
        return tokens[:, condition.geometry.is_code(steps)] - self.code_ids.start


def only_size(sizes: Sequence[tuple[int, int]], what: str = "") -> tuple[int, int]:
    """The size that all images of a batch have; raises `UserError` if they differ. `what` the sizes are, in words."""
    if len(found := sorted(set(sizes))) > 1:
        listed = ", ".join(f"{one} x {other}" for one, other in found)
        raise UserError(f"all images of a batch must have one size, got {what}{listed}")
    return found[0]


def llama_block(config: LlamaConfig) -> LlamaBlock:
    """A block of a Llama of these sizes."""
    attention = LlamaAttention(config.hidden_size, config.num_attention_heads, config.key_heads)
    return LlamaBlock(attention, config.hidden_size, config.intermediate_size, config.rms_norm_eps)


def make_decoder(config: ConfigT, block: Callable[[ConfigT], LlamaBlock] = llama_block) -> LlamaDecoder:
    """The body of a Llama of these sizes, of blocks that `block` makes."""
    blocks = [block(config) for _ in range(config.num_hidden_layers)]
    return LlamaDecoder(config.vocab_size, config.hidden_size, blocks, config.rms_norm_eps)


def precise(logits: Tensor) -> Tensor:
    """Logits in float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
