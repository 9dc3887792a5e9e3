"""Find a model's weights in what a checkpoint holds: under which entry, and with which prefix of their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from softcfg.errors import CheckpointError, clean, quote

if TYPE_CHECKING:
    from torch import Tensor

ENTRIES = ("model", "state_dict")
# Where training checkpoints keep weights, besides the entries of a family; the preferred ones come first.
WRAPPERS = (
    *ENTRIES,
    "model_state_dict",
    "module",
    "generator",
    "net",
    "network",
    "weights",
    "params",
    "ema",
    "model_ema",
    "ema_model",
    "state_dict_ema",
    "model_ema_state_dict",
    "ema_state_dict",
)
# What torch.compile, FSDP and activation checkpointing put into names, wherever they wrapped a module.
MARKERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
MARKED = re.compile("|".join(map(re.escape, MARKERS)))
COUNTER = "n_averaged"  # the one tensor of an AveragedModel that is not a weight
DEEPEST = 8  # levels of entries, and of a prefix
MOST_PREFIXES = 100  # that are tried
MOST_NAMES = 50_000  # among which a prefix is looked for

Match = Callable[[Mapping[str, "Tensor"]], int]


@dataclass(frozen=True)
class Found:
    """Tensors and where they were.

    Attributes:
        how: what was unwrapped, in words; "" if nothing was.
        notable: whether that is more than how the family's files are laid out, or there was a choice.
    """

    tensors: dict[str, Tensor]
    how: str = ""
    notable: bool = False


def find_weights(
    content: Any, source: str, entries: Sequence[str] = ENTRIES, match: Match | None = None, wanted: int = 0
) -> Found:
    """Find the state dict in `content`: itself, or what it holds under an entry, with or without a prefix.

    Without `match` it is under the first of `entries`, or of what trainings usually call it, that is there; the prefix
    "module." is dropped if all names share it. What torch.compile and FSDP add to names is dropped in any case, and
    so are entries beside the weights that are not tensors.

    Args:
        entries: keys under which the weights may be, the preferred one first.
        match: how many tensors of the model are among those of a state dict.
        wanted: the number of tensors of the model.

    Raises:
        CheckpointError: there is no mapping of names to tensors.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source} holds no mapping of names to tensors but a {type(content).__name__}")
    if match is not None:
        best: tuple[tuple[str, ...], str] | None = None
        most = 0
        for path, level in _levels(content, entries):
            names = _unmarked(level)
            for prefix in _prefixes(names, entries):
                kept = {name.removeprefix(prefix): names[name] for name in names if name.startswith(prefix)}
                if (matched := match(kept)) > most:
                    best, most = (path, prefix), matched
                if matched == wanted:
                    return _found(content, path, prefix, entries)
        if best is not None and 2 * most > wanted:
            return _found(content, *best, entries)
    path, level = (), content
    while len(path) < DEEPEST and (name := _next(level, entries)) is not None:
        path, level = (*path, name), level[name]
    _require_tensors(level, source)
    names, prefix = _unmarked(level), ""
    names.pop(COUNTER, None)
    while names and all(name.startswith(f"{prefix}module.") for name in names):
        prefix += "module."
    return _found(content, path, prefix, entries)


def _found(content: Any, path: tuple[str, ...], prefix: str, entries: Sequence[str]) -> Found:
    level, beside = content, False
    for name in path:
        beside |= any(
            other in WRAPPERS and other not in entries for other in level if isinstance(level[other], Mapping)
        )
        level = level[name]
    names = _unmarked(level)
    markers = [marker for marker in MARKERS if any(marker in name for name in level if isinstance(name, str))]
    dropped = len(names) - sum(name.startswith(prefix) for name in names)
    words = []
    if path:
        words.append(f"the entry {' / '.join(clean(name, 40) for name in path)}")
    if prefix or markers:
        words.append(f"names without {' and '.join([*([clean(prefix, 100)] if prefix else []), *markers])}")
    if dropped:
        words.append(f"without {dropped} {'tensor that has' if dropped == 1 else 'tensors that have'} no such prefix")
    return Found(
        {name.removeprefix(prefix): tensor for name, tensor in names.items() if name.startswith(prefix)},
        ", ".join(words),
        bool(prefix or markers) or beside or not set(path) <= set(entries),
    )


def _next(level: Mapping[Any, Any], entries: Sequence[str]) -> str | None:
    """The entry of a level that holds the weights, by its name."""
    found = (name for name in (*entries, *WRAPPERS) if isinstance(level.get(name), Mapping) and level[name])
    return next(found, None)


def _levels(content: Mapping[Any, Any], entries: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """All mappings in a checkpoint that hold tensors: first what the family prefers, then from the outside in."""

    seen = set()  # a mapping may hold itself

    def visit(path: tuple[str, ...], level: Mapping[Any, Any]) -> Iterator[Any]:
        if id(level) in seen:
            return
        seen.add(id(level))
        inner = [name for name in level if isinstance(name, str) and isinstance(level[name], Mapping)]
        inner = sorted(inner, key=lambda name: _rank(name, entries)) if len(path) < DEEPEST else []
        for name in inner:
            if name in entries:
                yield from visit((*path, name), level[name])
        if any(_is_tensor(value) for value in level.values()):
            yield path, level
        for name in inner:
            if name not in entries:
                yield from visit((*path, name), level[name])

    yield from visit((), content)


def _prefixes(names: Mapping[str, Tensor], entries: Sequence[str]) -> Iterator[str]:
    """Beginnings of dotted names that may be a wrapper's, from short to long."""
    waiting, tried = [""], 0
    while waiting and tried < MOST_PREFIXES:
        prefix = waiting.pop(0)
        yield prefix
        tried += 1
        if prefix.count(".") >= DEEPEST or len(names) > MOST_NAMES:
            continue
        parts = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
        longer = [part for part in parts if not part.isdigit() and f"{prefix}{part}" not in names]
        waiting += [f"{prefix}{part}." for part in sorted(longer, key=lambda part: (_rank(part, entries), part))]


def _rank(name: str, entries: Sequence[str]) -> int:
    order = (*entries, *WRAPPERS)
    return order.index(name) if name in order else len(order)


def _unmarked(level: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a level, their names without what wrappers of modules put into them."""
    tensors = {name: value for name, value in level.items() if isinstance(name, str) and _is_tensor(value)}
    plain = {MARKED.sub("", name): tensor for name, tensor in tensors.items()}
    return plain if len(plain) == len(tensors) else tensors  # names that would fall together stay as they are


def _require_tensors(level: Mapping[Any, Any], source: str) -> None:
    problem = f"{source} holds no mapping of names to tensors"
    if not level:
        raise CheckpointError(f"{problem}: it is empty")
    for name, value in level.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{problem}: under {quote(name)} there is a {type(value).__name__}")
    if not any(map(_is_tensor, level.values())):
        name, value = next(iter(level.items()))
        raise CheckpointError(f"{problem}: under {quote(name)} there is a {type(value).__name__}")


def require_plain(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise `CheckpointError` for tensors that cannot be weights."""
    import torch

    for name, tensor in tensors.items():
        if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(
                f"{source} holds no mapping of names to tensors: under {quote(name)} there is a sparse, nested or "
                "quantized one"
            )


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)
