"""The RAR generator: a decoder with learned positions and adaptive layer norm, in raster order.

Parameter names are those of the released checkpoints (`rar_b.bin` to `rar_xxl.bin`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.configuration import require_multiple, require_positive
from softcfg.models.base import ClassCondition, ClassGenerator, Condition
from softcfg.nn.attention import AttentionContext, SelfAttention
from softcfg.nn.fused import add_norm, products
from softcfg.nn.linear import Linear
from softcfg.nn.mlp import MLP
from softcfg.nn.position import Position

EPS = 1e-6  # of every layer norm
WINDOW_ROWS = 256  # rows of a product at which it runs near full speed
HELD_BYTES = 2 * 2**30  # that the modulations of a whole batch and sequence may take

Branch = tuple[Tensor | None, Tensor | None]  # what a branch adds to the residual stream, and the gate on it


@dataclass(frozen=True)
class RARConfig:
    """Sizes of a RAR generator, under the names of the released configurations.

    Attributes:
        intermediate_size: width of the MLP.
        codebook_size: V, image codes.
        image_seq_len: T, image tokens in raster order.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    codebook_size: int = 1024
    condition_num_classes: int = 1000
    image_seq_len: int = 256

    def __post_init__(self) -> None:
        require_positive(
            self, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "codebook_size", "condition_num_classes", "image_seq_len",
        )  # fmt: skip
        require_multiple(self, ("hidden_size", "num_attention_heads"))


@dataclass(frozen=True)
class RobusTokConfig(RARConfig):
    """Sizes of a RobusTok generator: RAR with more image codes."""

    codebook_size: int = 4096


class RARCondition(ClassCondition):
    """Classes, and what the layers make of them and of the slots ahead, computed for all distinct rows together.

    The modulations do not depend on the tokens. A decoding step would spend a third of its weights on them, for a
    few rows; one product for many slots, with the unconditional rows done once, is many times cheaper. Its shape
    depends on the batch size alone, so an image gets the same bits in any batch of that size. Where rows stand at
    slots of their own, as on a GPU, the window is the whole sequence, if that takes at most `HELD_BYTES`. With more
    rows each step computes what it needs, which then costs little beside the rest of it.

    Attributes:
        distinct: class ids [U], those of the conditional rows and, once, the null class.
        source: int64 [rows], where in `distinct` each row's class is.
        windows: layer -> first slot of the window, and its modulations [U, slots, parts * hidden_size].
    """

    def __init__(self, classes: Tensor, slots: int, num_tokens: int, null: int, device: torch.device) -> None:
        super().__init__(classes.to(device), slots, num_tokens)
        self.null = null
        self._on_host = classes.cpu()  # the device is not waited for
        conditional = self._on_host != null
        count = int(conditional.sum())
        self.source = torch.where(conditional, conditional.cumsum(0) - 1, count).to(device)
        distinct = self._on_host[conditional]
        if count < len(classes):
            distinct = torch.cat((distinct, distinct.new_full((1,), null)))
        self.distinct = distinct.to(device)
        self.windows: dict[int, tuple[int, Tensor]] = {}

    def __getitem__(self, rows: slice) -> RARCondition:
        """See `Condition.__getitem__`."""
        return RARCondition(self._on_host[rows], self.slots, self.num_tokens, self.null, self.classes.device)


class Modulation(nn.Module):
    """Linear(SiLU(condition)), `parts` pieces of the hidden size."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class RARBlock(Modulation):
    """Pre-norm transformer block whose norms are shifted and scaled, and whose branches are gated."""

    def __init__(self, config: RARConfig) -> None:
        width, heads = config.hidden_size, config.num_attention_heads
        super().__init__(width, parts=6)
        self.norm1 = nn.LayerNorm(width, EPS)
        self.attn = SelfAttention(
            width, heads, q_norm=nn.LayerNorm(width // heads, EPS), k_norm=nn.LayerNorm(width // heads, EPS)
        )
        self.norm2 = nn.LayerNorm(width, EPS)
        self.mlp = MLP(width, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        branch: Branch,
        modulation: Tensor,
        layer: int,
        context: AttentionContext,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Branch]:
        """The residual stream [rows, n, hidden_size] and what is still to be added to it, before and after the block.

        `modulation` is [rows, n, 6 * hidden_size]; with `at` [rows, n] it is a table of entries, and so is the gate.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x, inputs = add_norm(x, *branch, norm=self.norm1, modulation=(scale1, shift1), at=at)
        attended = self.attn(inputs, layer, context)
        x, inputs = add_norm(x, attended, gate1, norm=self.norm2, modulation=(scale2, shift2), at=at)
        return x, (self.mlp(inputs), gate2)


class HeadNorm(Modulation):
    """Layer norm without weights, scaled and shifted (in this order in the released tensor)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, parts=2)
        self.norm = nn.LayerNorm(width, EPS, elementwise_affine=False)

    def forward(self, x: Tensor, branch: Branch, modulation: Tensor, at: Tensor | None = None) -> Tensor:
        """As `RARBlock` takes them -> [rows, n, width]; `modulation` is [rows, n, 2 * width]."""
        scale, shift = modulation.chunk(2, dim=-1)
        return add_norm(x, *branch, norm=self.norm, modulation=(scale, shift), at=at)[1]


class RAR(ClassGenerator):
    """The RAR generator; RobusTok's generators are the same function with 4,096 codes.

    The sequence is: cls token, class, image tokens. One table embeds image codes (rows 0 .. V - 1), a mask
    token (row V, not used in sampling), classes (row V + 1 + class) and the null class (the last row). A slot
    also carries the target-aware position of the token that it predicts.
    """

    condition_slots = 2

    def __init__(self, config: RARConfig) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = config.image_seq_len
        self.vocab_size = config.codebook_size
        self.num_classes = config.condition_num_classes
        width, length = config.hidden_size, config.image_seq_len
        self.cache_shape = (config.num_hidden_layers, config.num_attention_heads, width // config.num_attention_heads)

        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        # The released tables are longer than generation needs.
        self.pos_embed = nn.Parameter(torch.zeros(1, length + 1024, width))
        self.target_aware_pos_embed = nn.Parameter(torch.zeros(1, length + 1024, width))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, length + 100, width))
        for table in (self.pos_embed, self.target_aware_pos_embed, self.timesteps_embeddings):
            nn.init.trunc_normal_(table, std=0.02)
        self.blocks = nn.ModuleList(RARBlock(config) for _ in range(config.num_hidden_layers))
        self.embeddings = nn.Embedding(config.codebook_size + config.condition_num_classes + 2, width)
        self.adaln_before_head = HeadNorm(width)
        self.lm_head = Linear(width, config.codebook_size)

    def embed_condition(self, condition: Condition) -> Tensor:
        """See `Generator.embed_condition`."""
        assert isinstance(condition, RARCondition)
        label = self.embeddings(condition.classes + self.vocab_size + 1)[:, None]
        return torch.cat((self.cls_token.expand(condition.rows, -1, -1), label), dim=1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """See `Generator.embed_tokens`."""
        return self.embeddings(tokens)

    def add_positions(self, x: Tensor, condition: Condition, position: Position) -> Tensor:
        """See `Generator.add_positions`: each slot's position, and that of the token which it predicts."""
        new = x.shape[1]
        target = self.target_aware_pos_embed[0, position.shifted(1).index(new)]
        if position.is_start:  # the cls token predicts nothing
            target = torch.cat((torch.zeros_like(target[:1]), target[1:]))
        return x + (self.pos_embed[0, position.index(new)] + target)

    def run_blocks(self, x: Tensor, condition: Condition, context: AttentionContext) -> Tensor:
        """See `Generator.run_blocks`: every block, and the norm after the last one, takes its modulation."""
        assert isinstance(condition, RARCondition)
        modulation, at = self._modulations(condition, context.position, x.shape[1])
        branch: Branch = (None, None)
        for layer, block in enumerate(self.blocks):
            x, branch = block(x, branch, modulation(layer, block), layer, context, at)
        head = self.adaln_before_head
        return head(x, branch, modulation(len(self.blocks), head), at)

    def logits(self, x: Tensor) -> Tensor:
        """See `Generator.logits`."""
        return products(x.contiguous(), self.lm_head)[0]  # else product and bias are two operations

    def class_condition(self, classes: Tensor) -> RARCondition:
        """See `Generator.class_condition`."""
        return RARCondition(classes, self.condition_slots, self.num_tokens, self.num_classes, self.device)

    def ahead_bytes(self, condition: Condition) -> int:
        """See `Generator.ahead_bytes`: the modulations of a window of slots, or of all."""
        assert isinstance(condition, RARCondition)
        ahead = max(1, WINDOW_ROWS // len(condition.distinct))
        if self.device.type != "cpu":
            ahead = condition.cache_slots if self._holds_all(condition) else 0
        return ahead * self._slot_bytes(condition)

    def _slot_bytes(self, condition: RARCondition) -> int:
        """What the modulations of a slot take, of all layers and distinct rows."""
        layers, width = self.config.num_hidden_layers, self.config.hidden_size
        return len(condition.distinct) * (6 * layers + 2) * width * self.dtype.itemsize

    def _holds_all(self, condition: RARCondition) -> bool:
        return condition.cache_slots * self._slot_bytes(condition) <= HELD_BYTES

    def _modulations(
        self, condition: RARCondition, position: Position, new: int
    ) -> tuple[Callable[[int, Modulation], Tensor], Tensor | None]:
        """What gives the modulation of a layer (or, last, of the head) for a pass, [rows, new, parts * hidden_size].

        Where all slots are held it is a table [entries, parts * hidden_size]; then an index [rows, new] comes with it.
        """
        if position.slot is not None:
            return partial(self._modulation, condition, position.slot, new), None
        slots = position.index(new)
        assert isinstance(slots, Tensor)
        if self._holds_all(condition):
            at = condition.source[:, None] * condition.cache_slots + slots
            return lambda layer, module: self._held(condition, layer, module).flatten(0, 1), at
        label = self.embeddings(condition.classes + self.vocab_size + 1)[:, None]
        inputs = F.silu(label + self.timesteps_embeddings[0, slots])
        return lambda layer, module: module.adaLN_modulation[1](inputs), None

    def _held(self, condition: RARCondition, layer: int, module: Modulation) -> Tensor:
        """The modulations of all slots, [U, slots, parts * hidden_size]."""
        window = condition.windows.get(layer)
        if window is None or (window[0], window[1].shape[1]) != (0, condition.cache_slots):
            window = condition.windows[layer] = (0, self._modulate(condition, module, 0, condition.cache_slots))
        return window[1]

    def _modulation(self, condition: RARCondition, slot: int, new: int, layer: int, module: Modulation) -> Tensor:
        if new > 1:  # many slots as it is
            return self._modulate(condition, module, slot, new)[condition.source]
        window = condition.windows.get(layer)
        if window is None or not window[0] <= slot < window[0] + window[1].shape[1]:
            ahead = max(1, WINDOW_ROWS // len(condition.distinct))
            window = condition.windows[layer] = (slot, self._modulate(condition, module, slot, ahead))
        start, values = window
        return values[condition.source, slot - start, None]

    def _modulate(self, condition: RARCondition, module: Modulation, slot: int, count: int) -> Tensor:
        """Modulations of the distinct rows for at most `count` slots, [U, slots, parts * hidden_size]."""
        label = self.embeddings(condition.distinct + self.vocab_size + 1)[:, None]
        return module.adaLN_modulation(label + self.timesteps_embeddings[:, slot : slot + count])
