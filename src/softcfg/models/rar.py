"""The RAR generator: a decoder with learned positions and adaptive layer norm, in raster order.

Parameter names are those of the released checkpoints (`rar_b.bin` to `rar_xxl.bin`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.configuration import require_multiple, require_positive
from softcfg.models.base import ClassCondition, ClassGenerator, Condition
from softcfg.nn.attention import SelfAttention
from softcfg.nn.context import AttentionContext
from softcfg.nn.fused import add_norm, products
from softcfg.nn.linear import Linear
from softcfg.nn.mlp import MLP
from softcfg.nn.position import Position

EPS = 1e-6  # of every layer norm
WINDOW_ROWS = 256  # rows of a product at which it runs near full speed
HELD_BYTES = 2 * 2**30  # that the modulations of a whole batch and sequence may take

Branch = tuple[Tensor | None, Tensor | None]  # what a branch adds to the residual stream, and the gate on it


@dataclass(eq=False)
class Window:
    """The modulations of some neighbouring slots, computed together; it moves on in the same memory.

    Attributes:
        length: most slots that it covers.
        at: int64 [rows, 1], which entry of the tables is that of each row at `slot`.
        tables: of every block and, last, of the head, [U, length, parts * hidden_size]; U distinct rows.
        slots: those that it covers.
        slot: of the step that `at` is for; None for none.
    """

    length: int
    at: Tensor
    tables: list[Tensor]
    slots: range = range(0)
    slot: int | None = None


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
        window: the one that steps are in; None before the first of them.
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
        self.window: Window | None = None

    def __getitem__(self, rows: slice) -> RARCondition:
        """See `Condition.__getitem__`."""
        return RARCondition(self._on_host[rows], self.slots, self.num_tokens, self.null, self.classes.device)


class Modulation(nn.Module):
    """Linear(SiLU(condition)), `parts` pieces of the hidden size."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        product = Linear(width, parts * width)
        product.usual_rows = WINDOW_ROWS
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), product)


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
    steps_replay = True

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

    def prepare(self, condition: Condition, position: Position, new: int) -> Window | None:
        """See `Generator.prepare`: the window of a step."""
        assert isinstance(condition, RARCondition)
        if position.slot is None:
            if not self._holds_all(condition):
                return None
            window = self._window(condition, condition.cache_slots, 0)
            window.slot = None
            return window
        if new > 1 or torch.is_grad_enabled():  # many slots as it is, or the window must not change
            return None
        window = self._window(condition, self.steps_ahead(condition) or 1, position.slot)
        if window.slot != position.slot:
            window.slot = position.slot
            first = condition.source[:, None] * window.length
            torch.add(first, position.slot - window.slots.start, out=window.at)
        return window

    def run_blocks(self, x: Tensor, condition: Condition, context: AttentionContext) -> Tensor:
        """See `Generator.run_blocks`: every block, and the norm after the last one, takes its modulation."""
        assert isinstance(condition, RARCondition)
        modulations, at = self._modulations(condition, context, x.shape[1])
        branch: Branch = (None, None)
        for layer, block in enumerate(self.blocks):
            x, branch = block(x, branch, next(modulations), layer, context, at)
        return self.adaln_before_head(x, branch, next(modulations), at)

    def logits(self, x: Tensor) -> Tensor:
        """See `Generator.logits`."""
        return products(x.contiguous(), self.lm_head)[0]  # else product and bias are two operations

    def class_condition(self, classes: Tensor) -> RARCondition:
        """See `Generator.class_condition`."""
        return RARCondition(classes, self.condition_slots, self.num_tokens, self.num_classes, self.device)

    def ahead_bytes(self, condition: Condition) -> int:
        """See `Generator.ahead_bytes`: the modulations of a window of slots, or of all."""
        assert isinstance(condition, RARCondition)
        return self.steps_ahead(condition) * self._slot_bytes(condition)

    def steps_ahead(self, condition: Condition) -> int:
        """See `Generator.steps_ahead`: the slots of a window."""
        assert isinstance(condition, RARCondition)
        if self.device.type == "cpu":
            return max(1, WINDOW_ROWS // len(condition.distinct))
        return condition.cache_slots if self._holds_all(condition) else 0

    def _slot_bytes(self, condition: RARCondition) -> int:
        """What the modulations of a slot take, of all layers and distinct rows."""
        layers, width = self.config.num_hidden_layers, self.config.hidden_size
        return len(condition.distinct) * (6 * layers + 2) * width * self.dtype.itemsize

    def _holds_all(self, condition: RARCondition) -> bool:
        return condition.cache_slots * self._slot_bytes(condition) <= HELD_BYTES

    def _modulations(
        self, condition: RARCondition, context: AttentionContext, new: int
    ) -> tuple[Iterator[Tensor], Tensor | None]:
        """The modulations of every block and, last, of the head for a pass, [rows, new, parts * hidden_size].

        Those of a window are tables [entries, parts * hidden_size]; then an index int64 [rows, new] comes with them.
        """
        window = context.prepared
        if isinstance(window, Window):
            at = window.at
            if window.slot is None and isinstance(slots := context.position.index(new), Tensor):  # rows have their own
                at = condition.source[:, None] * window.length + slots
            return (table.flatten(0, 1) for table in window.tables), at
        slots = context.position.index(new)
        if isinstance(slots, slice):
            made = self._modulate(condition, range(slots.start, slots.stop))
            return (each[condition.source] for each in made), None
        label = self.embeddings(condition.classes + self.vocab_size + 1)[:, None]
        inputs = F.silu(label + self.timesteps_embeddings[0, slots])
        return (module.adaLN_modulation[1](inputs) for module in self._modulated), None

    def _window(self, condition: RARCondition, length: int, slot: int) -> Window:
        """A window of a batch that covers a slot."""
        window = condition.window
        unchangeable = window is not None and window.at.is_inference() and not torch.is_inference_mode_enabled()
        if window is None or window.length < length or unchangeable:
            window = condition.window = Window(length, torch.empty_like(condition.source[:, None]), [])
        if slot not in window.slots:
            window.slots, window.slot = range(slot, min(slot + window.length, condition.cache_slots)), None
            for index, made in enumerate(self._modulate(condition, window.slots)):
                if index == len(window.tables):
                    window.tables.append(made.new_empty(len(made), window.length, made.shape[2]))
                window.tables[index][:, : len(window.slots)] = made
        return window

    def _modulate(self, condition: RARCondition, slots: range) -> Iterator[Tensor]:
        """Those of the distinct rows at some slots, [U, slots, parts * hidden_size] of every block and of the head."""
        label = self.embeddings(condition.distinct + self.vocab_size + 1)[:, None]
        inputs = F.silu(label + self.timesteps_embeddings[:, slots.start : slots.stop])
        return (module.adaLN_modulation[1](inputs) for module in self._modulated)

    @property
    def _modulated(self) -> list[Modulation]:
        return [*self.blocks, self.adaln_before_head]
