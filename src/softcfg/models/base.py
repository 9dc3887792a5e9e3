"""The generator: the interface that decoding, guidance and tracing are written against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from softcfg.errors import UserError
from softcfg.models.conditioning import Conditioning, LabelConditioning
from softcfg.models.geometry import Geometry
from softcfg.models.ids import IdsLike, as_ids
from softcfg.nn.backends import numba_decode
from softcfg.nn.context import AttentionContext
from softcfg.nn.kv_cache import CACHES, KVCache
from softcfg.nn.linear import PREPARED, Preparable, Prepared
from softcfg.nn.memory import free_memory, keep_freed
from softcfg.nn.position import Position
from softcfg.nn.replay import replayed
from softcfg.nn.rotary import Rotary

LEFT_SHARE = 0.25  # of the free memory: what a batch may leave to the next one, beside which pixels are decoded


class Condition(ABC):
    """What the rows of a batch are conditioned on.

    The sequence of a row starts with `slots` slots that the condition fills; image token i stands at slot
    `slots + i`, and its logits come from the slot before it.

    Attributes:
        rows: sequences in the batch; with guidance the conditional ones first, then as many unconditional.
        slots: slots in front of the first image token, the same for all rows.
        num_tokens: T, image tokens to decode.
        padding: int64 [rows], leading slots of each row that no query sees (left-padded prompts); None for none.
        geometry: how the T tokens make up an image; by default the largest square of the last of them.
        grid: rows and columns (h, w) of the images' codes, where `geometry` is given; None for the image tokenizer's.
    """

    def __init__(
        self, rows: int, slots: int, num_tokens: int, padding: Tensor | None = None, geometry: Geometry | None = None
    ) -> None:
        self.rows = rows
        self.slots = slots
        self.num_tokens = num_tokens
        self.padding = padding
        self.geometry = Geometry.square(num_tokens) if geometry is None else geometry
        self.grid = None if geometry is None else geometry.grid

    @abstractmethod
    def __getitem__(self, rows: slice) -> Condition:
        """The condition of some of the rows."""

    @property
    def num_codes(self) -> int:
        """How many of the T image tokens are image codes, not structure like the ends of lines."""
        return self.geometry.num_codes

    @property
    def cache_slots(self) -> int:
        """Slots that the cache needs: all but that of the last token, which is drawn and never fed."""
        return self.slots + self.num_tokens - 1


class ClassCondition(Condition):
    """One class id per row, `num_classes` for the null class.

    Attributes:
        classes: int64 [rows].
    """

    def __init__(self, classes: Tensor, slots: int, num_tokens: int) -> None:
        super().__init__(len(classes), slots, num_tokens)
        self.classes = classes

    def __getitem__(self, rows: slice) -> ClassCondition:
        """See `Condition.__getitem__`."""
        return ClassCondition(self.classes[rows], self.slots, self.num_tokens)


class Generator(Preparable, ABC):
    """A decoder-only transformer that predicts image tokens under a condition.

    A family implements `condition`, `embed_condition`, `token_embedding` or `embed_tokens`, `logits` and, as its
    positions need, `add_positions` or `rotary`; `forward` puts them together. A model that computes its logits in
    another way, such as one of another library, implements `forward` instead.

    Attributes:
        config: the family's configuration, a dataclass.
        num_tokens: T, image tokens per image; where the condition can choose, the most.
        vocab_size: V, the number of tokens that may be drawn.
        num_classes: classes are 0 .. num_classes - 1; 0 for models that are conditioned on something else.
        cache_shape: (layers, heads, head_dim) of the key/value cache.
        cache_dtype: what the key/value cache stores, of `nn.kv_cache.CACHES`; None for the dtype of the weights.
        supports_row_positions: whether a pass may start at a slot of its own in each row (`Position.by_row`).
        steps_replay: whether blocks and logits of a step depend on nothing but its input, its attention context and
            what `prepare` returns, so that its kernels may be launched again without them (`nn.replay`).
        layer_devices: where each layer computes, if they are spread over several devices.
        blocks: the transformer blocks in order; each is called as `block(x, layer, context)`.
        conditioning_type: how what users ask for becomes what `condition` takes; None for a generator that is used
            without a `Pipeline`.
        no_split_modules: names of the classes of the layers, for a generator whose layers can be spread over several
            devices; each layer stays whole.
    """

    config: Any
    conditioning_type: type[Conditioning] | None = None
    no_split_modules: tuple[str, ...] = ()
    num_tokens: int
    vocab_size: int
    num_classes: int = 0
    cache_shape: tuple[int, int, int]
    cache_dtype: torch.dtype | None = None
    supports_row_positions: bool = True
    steps_replay: bool = False
    layer_devices: list[torch.device] | None = None
    blocks: Any
    rotary_cos: Tensor
    rotary_sin: Tensor

    @abstractmethod
    def condition(self, inputs: Any, *, guided: bool) -> Condition:
        """The condition of a batch: rows for `inputs` and, if `guided`, as many unconditional rows after them.

        Args:
            inputs: one per row: the labels of class-conditional models, the prompts of others.

        Raises:
            UserError: the inputs do not fit the model.
        """

    def example_inputs(self, count: int) -> list[Any]:
        """Inputs that `condition` takes, one per image, of a usual length: for measuring speed and memory.

        Raises:
            UserError: the family has none.
        """
        raise UserError(f"{type(self).__name__} does not say what it could be conditioned on, so it cannot be timed")

    def forward(
        self,
        condition: Condition,
        tokens: Tensor,
        *,
        cache: KVCache | None = None,
        slot: Position | int = 0,
        value_weights: Tensor | None = None,
        key_weights: Tensor | None = None,
        attention_weights: Tensor | None = None,
    ) -> Tensor:
        """Process the sequence from `slot` on and return logits [rows, m, V].

        Args:
            condition: of all rows (with guidance the conditional rows first, then the unconditional).
            tokens: int64 [rows, n], the image tokens to feed. A pass at slot 0 puts the condition in front of
                them (n may be 0); a later pass starts at the slot of its first token, `condition.slots + i`.
            cache: keys and values of the slots before `slot`; those of this pass are written into it. Without
                it the pass must start at slot 0.
            slot: where the pass starts; `Position.by_row` if each row starts at a slot of its own (after the condition,
                and all of the pass inside the cache). Shapes then do not depend on the slots: attention covers the
                whole cache.
            value_weights, key_weights: weights on the cached values or keys of every slot, [rows, slots] or
                [rows, n, slots]; None for none.
            attention_weights: weights on the attention to every slot, which is renormalised; shaped likewise.

        Returns:
            One row of logits for every input from which an image token is predicted: `tokens` [rows, T - 1] at
            slot 0 give [rows, T, V], the condition alone or one token give [rows, 1, V].

        Raises:
            ValueError: the pass needs a cache and there is none, or it does not fit into the cache.
        """
        position = Position.of(slot)
        x = self.embed_tokens(tokens)
        if position.is_start:
            x = torch.cat((self.embed_condition(condition), x), dim=1)
        x = self.add_positions(x, condition, position)
        context = AttentionContext.create(
            position,
            x.shape[1],
            cache,
            rotary=self.rotary(condition, position, x.shape[1]),
            value_weights=value_weights,
            key_weights=key_weights,
            attention_weights=attention_weights,
            padding=condition.padding,
            prepared=self.prepare(condition, position, x.shape[1]),
            rows=x.shape[0],
        )

        def run(x: Tensor, context: AttentionContext) -> Tensor:
            x = self.run_blocks(x, condition, context)
            return self.logits(x[:, position.first_predicting(condition.slots) :])

        known = self._prepared if self.steps_replay else None
        logits = None if known is None else replayed(self, known.programs, x, context, run)
        return (run(x, context) if logits is None else logits).to(tokens.device)

    def embed_condition(self, condition: Condition) -> Tensor:
        """The inputs for the slots of the condition, [rows, condition.slots, width]."""
        raise NotImplementedError(f"{type(self).__name__} must implement embed_condition (or forward as a whole)")

    @property
    def token_embedding(self) -> nn.Embedding | None:
        """The table whose rows are the inputs for image tokens, where they are nothing else; by default none."""
        return None

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """The inputs for image tokens int64 [rows, n], [rows, n, width]; by default those of `token_embedding`."""
        table = self.token_embedding
        if table is None:
            name = type(self).__name__
            raise NotImplementedError(f"{name} must implement token_embedding or embed_tokens (or forward as a whole)")
        return table(tokens)

    @property
    def fed_rows_of(self) -> Tensor | None:
        """The table, contiguous [V, width], of which a step's inputs are rows.

        None if the inputs are more than that, or if blocks read more than them and the context.
        """
        table = self.token_embedding
        if overrides(self, "embed_tokens", "add_positions", "prepare"):
            return None
        if type(table) is not nn.Embedding or table.max_norm is not None:
            return None
        weight = table.weight.data
        return weight if type(weight) is Tensor and weight.is_contiguous() else None

    def add_positions(self, x: Tensor, condition: Condition, position: Position) -> Tensor:
        """The inputs `x` [rows, n, width] of a pass with learned positions added; by default as they are."""
        return x

    def rotary(self, condition: Condition, position: Position, new: int) -> Rotary | None:
        """The rotary embedding of the `new` slots of a pass; by default that of `keep_rotary`, or none without it."""
        if "rotary_cos" not in self._buffers:
            return None
        where = position.index(new)
        return Rotary(self.rotary_cos[where], self.rotary_sin[where])

    def keep_rotary(self, cos: Tensor, sin: Tensor) -> None:
        """Keep the tables of the rotary embedding, float32 [slots, head_dim / 2]."""
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)

    def prepare(self, condition: Condition, position: Position, new: int) -> object:
        """Make ready what the blocks of a pass read beside their inputs and context; by default nothing.

        Returns:
            What holds the prepared tensors, an object that can be weakly referenced, which blocks find in
            `context.prepared`; None for nothing. To return the same one again promises that the tensors were updated
            in place.
        """
        return None

    def run_blocks(self, x: Tensor, condition: Condition, context: AttentionContext) -> Tensor:
        """The inputs [rows, n, width] through all blocks; to be overridden where a block takes more than that."""
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, context)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The logits [rows, m, V] from what leaves the blocks, [rows, m, width]."""
        raise NotImplementedError(f"{type(self).__name__} must implement logits (or forward as a whole)")

    @property
    def device(self) -> torch.device:
        """The device of the weights; where they are spread over several, that of the first layer."""
        return next(self.parameters()).device if self.layer_devices is None else self.layer_devices[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    def new_cache(self, condition: Condition) -> KVCache:
        """A key/value cache for the rows of `condition`, on the device of the weights and for their dtype."""
        return self._cache_type()(
            *self._cache_size(condition),
            dtype=self.dtype,
            device=self.layer_devices or self.device,
            by_slot=self._lies_by_slot(),
        )

    def take_cache(self, condition: Condition) -> KVCache:
        """The same, for a batch: the cache that one before it has left, emptied, or a new one."""
        known = self._prepared
        if known is None or not known.caches:
            return self.new_cache(condition)
        try:
            cache: KVCache = known.caches[self._cache_kind(condition)].pop()
        except IndexError:
            known.caches.clear()  # of batches of another size: none comes any more
            return self.new_cache(condition)
        cache.clear()
        return cache

    def leave_cache(self, condition: Condition, cache: KVCache) -> None:
        """Leave the cache of a batch that is done to the next one, if there may be one (see `weights_in_use`).

        On a CPU new memory is slow when it is first written; a GPU's is PyTorch's own, which keeps it anyway.
        """
        known = self._prepared
        if known is None or self.device.type != "cpu" or type(cache) is not self._cache_type():
            return
        free = free_memory(self.device)
        if free is not None and cache.nbytes <= LEFT_SHARE * free:
            known.caches[self._cache_kind(condition)].append(cache)
            keep_freed()  # as the freed cache would have done

    @property
    def _prepared(self) -> Prepared | None:
        """What is kept while batches are drawn."""
        return vars(self).get(PREPARED)

    def _lies_by_slot(self) -> bool:
        return numba_decode.reads_cache(self.dtype, self.device)

    def _cache_kind(self, condition: Condition) -> Hashable:
        """What a cache has to serve."""
        return self._cache_type(), self._cache_size(condition), self.dtype, self._lies_by_slot()

    def cache_bytes(self, condition: Condition) -> int:
        """The memory that `new_cache` takes."""
        cache = self._cache_type()(*self._cache_size(condition), dtype=self.dtype, device="meta")
        return cache.nbytes

    def ahead_bytes(self, condition: Condition) -> int:
        """The memory of what a batch computes once for several steps, beside the cache; by default 0."""
        return 0

    def steps_ahead(self, condition: Condition) -> int:
        """For how many steps `prepare` works at once, if it has to; by default 0, as there is nothing to be done."""
        return 0

    def _cache_type(self) -> type[KVCache]:
        return KVCache if self.cache_dtype is None else CACHES[self.cache_dtype]

    def _cache_size(self, condition: Condition) -> tuple[int, int, int, int, int]:
        layers, heads, head_dim = self.cache_shape
        return layers, condition.rows, heads, condition.cache_slots, head_dim

    def allowed(self, steps: Tensor, condition: Condition) -> Tensor | None:
        """Which tokens may stand at `steps`, the indices of image tokens, int64 [n] or [B, n].

        Returns:
            The first of them and the one after the last, int64 [..., 2]; None for all tokens, which is the default.
        """
        return None

    def constrain(self, logits: Tensor, steps: Tensor, condition: Condition) -> Tensor:
        """Rule out the tokens that are not allowed at a position, by logits of -inf.

        It acts on the branches too, before a rule that is `constrained`, and so must not depend on the logits.

        Args:
            logits: [B, n, V], guided ones or those of a branch.
            steps: int64 [n] or [B, n], the index of the image token that each position predicts.
            condition: of the batch, with or without its unconditional rows.
        """
        allowed = self.allowed(steps, condition)
        if allowed is None:
            return logits
        token, (first, stop) = torch.arange(logits.shape[-1], device=logits.device), allowed[..., None, :].unbind(-1)
        return logits.masked_fill((token < first) | (token >= stop), float("-inf"))

    def processed(self, logits: Tensor, steps: Tensor, condition: Condition) -> Tensor:
        """What tokens are drawn from, in the place of guided logits; by default these as they are.

        It is called once for every step that is decoded, after the rule, the third branch and `constrain`, so it may
        depend on the logits and on the tokens that were fed. Arguments as of `constrain`.
        """
        return logits

    def is_code(self, steps: Tensor, condition: Condition) -> Tensor | None:
        """Which image tokens are image codes (bool like `steps`), not structure like the ends of lines; None: all.

        Only codes get a confidence in SoftCFG.
        """
        return condition.geometry.is_code(steps) if condition.geometry.has_structure else None

    def image_codes(self, tokens: Tensor, condition: Condition) -> Tensor:
        """What the image tokenizer decodes, int64 [B, h w] in [0, codebook_size), of the drawn `tokens` [B, T]."""
        return tokens


def overrides(generator: Generator, *methods: str) -> bool:
    """Whether one of these methods of `Generator` is another one here, as `forward` is in what `torch.compile` returns.

    It is no method itself: such a wrapper would answer for what it wraps.
    """
    return any(getattr(getattr(generator, name), "__func__", None) is not getattr(Generator, name) for name in methods)


class ClassGenerator(Generator):
    """A generator that is conditioned on a class.

    Attributes:
        condition_slots: slots that the class takes in front of the first image token.
    """

    conditioning_type = LabelConditioning
    condition_slots: int

    def condition(self, labels: IdsLike, *, guided: bool) -> ClassCondition:
        """See `Generator.condition`.

        Raises:
            UserError: `labels` is not a flat list of class ids in 0 .. num_classes - 1.
        """
        classes = as_ids(labels, "labels", self.num_classes)
        if classes.dim() != 1:
            raise UserError(f"labels must be a flat list of class ids, got shape {list(classes.shape)}")
        if guided:
            classes = torch.cat((classes, torch.full_like(classes, self.num_classes)))
        return self.class_condition(classes)

    def example_inputs(self, count: int) -> list[int]:
        """See `Generator.example_inputs`: the classes in turn."""
        return [row % self.num_classes for row in range(count)]

    def class_condition(self, classes: Tensor) -> ClassCondition:
        """The condition of rows given as int64 class ids, where `num_classes` stands for the null class."""
        return ClassCondition(classes.to(self.device), self.condition_slots, self.num_tokens)
