"""Linear layers that lay out their weights for one batch size (`products` says how, and what for)."""

from __future__ import annotations

import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from softcfg.errors import UserError
from softcfg.nn.kernels import available
from softcfg.nn.memory import is_out_of_memory, is_shared, replace_contents
from softcfg.nn.precision import KeepsTables, has_bfloat16
from softcfg.nn.products import Product, choose, faster_dtype, forced_product, keeps_bits

GUIDED_ROWS = 16
PREPARED = "prepared"  # attribute of a module whose layers are laid out: a `Prepared`
OF_PREPARED = ("product", "laid_out", "keeps_bits", "_multiply")  # attributes of a prepared layer
_of_all = nn.modules.module  # holds the hooks of all modules
_preparing = threading.RLock()


class _Use:
    """That somebody draws with modules, of which nothing may change; it ends at the latest with the frame it is in."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules


_uses: WeakSet[_Use] = WeakSet()
_preparations: WeakSet[_Use] = WeakSet()  # those for which the layers are laid out


class Prepared:
    """What a module has while its layers are laid out: from the first to the last batch of `weights_in_use`.

    Attributes:
        kind: what they are laid out for: the rows of inputs, and all else that decides how.
        programs: what `nn.replay` keeps of the module's steps.
        caches: key/value caches that a batch has left for the next one, by what they serve.
    """

    def __init__(self, kind: Hashable) -> None:
        self.kind = kind
        self.programs: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self.caches: defaultdict[Hashable, list[Any]] = defaultdict(list)


def _parts(uses: Iterable[_Use]) -> dict[int, nn.Module]:
    """All modules of them, and their parts, by their ids."""
    return {id(part): part for use in list(uses) for module in use.modules for part in module.modules()}


@contextmanager
def weights_at_rest(*modules: nn.Module) -> Iterator[None]:
    """Inside, the weights of modules may change: no thread lays them out.

    Raises:
        UserError: they are in use, as a batch is drawn. Its end is not waited for: a callback of it would for ever.
    """
    with _preparing:
        used = _parts((*_uses, *_preparations))
        for module in modules:
            if any(id(part) in used for part in module.modules()):
                raise UserError(
                    "the weights of the model are in use, as it draws at the moment: change them once it is done"
                )
            _give_back(module)
        yield


@contextmanager
def weights_in_use(*modules: nn.Module) -> Iterator[None]:
    """Inside, the weights of modules must not change, and `weights_at_rest` refuses it.

    What a batch prepares (`prepared_linear_layers`) serves the next one with as many rows.
    """
    with _preparing:
        use = _Use(*modules)
        _uses.add(use)
    try:
        yield
    finally:
        with _preparing:
            _uses.discard(use)
            for module in modules:
                _give_back(module)


class Preparable(KeepsTables):
    """A module to prepare as a whole: meanwhile its weights cannot change, and copies of it are not prepared."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        with weights_at_rest(self):
            return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with weights_at_rest(self):
            super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != PREPARED}


class Linear(nn.Linear):
    """`nn.Linear` whose product with `rows` rows can run on weights that are laid out for it.

    Attributes:
        usual_rows: of its inputs, if they are not those of a step.
        product: with which it multiplies; None: plainly.
        laid_out: the weights for it. Where it serves any number of rows, `weight` is empty meanwhile; state dicts and
            copies hold the weights all the same.
        keeps_bits: whether `rows` rows are known to give the same bits on one thread and on all of them.
    """

    usual_rows: int | None = None
    product: Product | None = None
    laid_out: Tensor | None = None
    keeps_bits = False
    _multiply: Callable[[Tensor], Tensor] | None = None

    def prepare(self, product: Product, rows: int, *, keep: bool = False) -> None:
        """Lay out the weights, as they are now, for inputs of `rows` rows; `keep` them as they are as well."""
        weight = self.weight
        bias = None if self.bias is None else self.bias.detach().contiguous()  # kernels read it as it lies
        if product.name == "plain":
            if weight.is_cpu:  # to look weights up in the module takes a twentieth of a tiny product
                self._multiply = lambda x: F.linear(x, weight, bias)
            return
        self.laid_out, self.product = product.lay_out(weight.detach(), rows), product
        self._multiply = partial(product.multiply, laid_out=self.laid_out, weight=weight, bias=bias, rows=rows)
        if product.serves_any_rows and not keep:
            replace_contents(weight, lambda: weight.new_empty(0, self.in_features))

    def bring_back(self) -> None:
        """Have `weight` again, beside what is laid out."""
        if self._is_emptied:
            replace_contents(self.weight, self._original)

    def restore(self) -> None:
        """Give the memory back."""
        self.bring_back()
        self.product = self.laid_out = self._multiply = None
        self.keeps_bits = False

    @property
    def is_prepared(self) -> bool:
        """Whether it multiplies with weights, or a view of them, that were taken from the layer before."""
        return self._multiply is not None

    def unpacked(self) -> Tensor | None:
        """The weights [out, in] again, without gradients, while `weight` is empty; None while it is not."""
        with _preparing, torch.inference_mode(False), torch.no_grad():
            return self._original() if self._is_emptied else None

    @property
    def _is_emptied(self) -> bool:
        return self.laid_out is not None and not self.weight.numel()

    def _original(self) -> Tensor:
        assert self.product is not None
        assert self.laid_out is not None
        return self.product.restore(self.laid_out)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with _preparing:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            if (weight := self.unpacked()) is not None:
                destination[f"{prefix}weight"] = weight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with weights_at_rest(self):
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        with weights_at_rest(self):
            return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        with _preparing, torch.inference_mode(False):
            state = {name: value for name, value in vars(self).items() if name not in OF_PREPARED}
            if (weight := self.unpacked()) is not None:
                parameter = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
                state["_parameters"] = {**self._parameters, "weight": parameter}
            return state

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        multiply = self._multiply
        return F.linear(x, self.weight, self.bias) if multiply is None else multiply(x)


def is_unhooked(module: nn.Module) -> bool:
    """Whether a call of a module runs the `forward` of its class, and nothing before or after it."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    return not (_of_all._global_forward_hooks or _of_all._global_forward_pre_hooks)


def parameter_count(module: nn.Module) -> int:
    """How many numbers the parameters of a module hold, also while they are laid out."""
    with _preparing:
        layers = [layer for layer in module.modules() if isinstance(layer, Linear) and not layer.weight.numel()]
        laid_out = sum(layer.out_features * layer.in_features for layer in layers)
        return laid_out + sum(parameter.numel() for parameter in module.parameters())


def fastest_dtype(module: nn.Module, device: torch.device) -> torch.dtype:
    """float32 or bfloat16, in whichever the linear layers of `module`, which may hold no numbers yet, are faster.

    On a CPU with instructions for bfloat16 it is measured, for the 16 rows of 8 images with guidance.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if device.type != "cpu" or not has_bfloat16(device):
        return torch.float32
    layers = (layer for layer in module.modules() if isinstance(layer, Linear) and layer.usual_rows is None)
    return faster_dtype(Counter((layer.out_features, layer.in_features) for layer in layers), GUIDED_ROWS)


@contextmanager
def prepared_linear_layers(module: nn.Module, rows: int) -> Iterator[None]:
    """Prepare all `Linear` layers of `module` for inputs of `rows` rows, or of their usual ones.

    Inside, its weights must not change.

    On a GPU, weights of the same inputs, which a part of the module names in `together`, are laid side by side, where
    they stay: one product then serves all of them.

    Layers for which the memory is not enough stay as they are, with a warning. Inside another such context, also of
    another thread, all layers stay as that one has prepared them, until nobody uses them any more. Inside
    `weights_in_use` they stay so until its end, or until a batch comes for which it would be done in another way.
    """
    with _preparing, torch.inference_mode(False), torch.no_grad():
        use, parts = _Use(module), list(module.modules())
        layers = [layer for layer in parts if isinstance(layer, Linear)]
        # The compiler of graphs (`nn.Module.compile`) would compile the launches of kernels, too.
        compiled = any(part._compiled_call_impl is not None for part in parts)
        found = *map(id, parts), *map(id, module.parameters())  # an adapter may have been added, say
        kind = rows, compiled, forced_product(), available.may_use_cpu_kernels(), found
        known = vars(module).get(PREPARED)
        _give_back(module, between_batches=known is not None and known.kind != kind)
        try:
            if not compiled and not any(layer.is_prepared for layer in layers):
                _prepare(module, layers, rows, _bring_back(layers))
                for part in module.modules():
                    if isinstance(names := getattr(part, "together", None), tuple):
                        _lay_side_by_side([getattr(part, name) for name in names])
        except BaseException as error:
            if not is_out_of_memory(error):
                _give_back(module, between_batches=True)
                raise
            warnings.warn(
                "there is no memory to lay out the weights, so their products are slower", RuntimeWarning, stacklevel=3
            )
        vars(module).setdefault(PREPARED, Prepared(kind))
        _preparations.add(use)
    try:
        with available.without_cpu_kernels() if compiled else nullcontext():
            yield
    finally:
        with _preparing:
            _preparations.discard(use)
            _give_back(module)


def _give_back(module: nn.Module, *, between_batches: bool = False) -> None:
    """Restore those layers of a module, and forget its steps and caches, that nobody uses any more.

    Args:
        between_batches: also what is only kept for a further batch.
    """
    with _preparing, torch.inference_mode(False), torch.no_grad():
        uses = [*_preparations] if between_batches else [*_preparations, *_uses]
        if any(each is module for use in uses for each in use.modules):
            return  # and so is each part of it; to look for them all takes as long as a small step
        used = _parts(uses)
        if id(module) not in used:  # nor is it a part of another one
            vars(module).pop(PREPARED, None)
        idle = [layer for layer in module.modules() if isinstance(layer, Linear) and id(layer) not in used]
        problem: BaseException | None = None
        for layer in (*idle, *idle):  # Ctrl-C ends one of them, which is restored in the second turn
            try:
                if layer.is_prepared:
                    layer.restore()
            except BaseException as error:
                problem = problem or error
        if problem is not None:
            raise problem


def _bring_back(layers: Iterable[Linear]) -> set[int]:
    """Ids of the weights that layers of other modules, which are laid out, have too; they are there again after it."""
    others = {
        id(part.weight): part
        for part in _parts(_preparations).values()
        if isinstance(part, Linear) and part.laid_out is not None
    }
    shared = {id(layer.weight) for layer in layers} & others.keys()
    for number in shared:
        others[number].bring_back()
    return shared


def _prepare(module: nn.Module, layers: Sequence[Linear], rows: int, kept: Collection[int]) -> None:
    """Prepare the layers of a module; `kept` are the ids of weights that others use as they are."""
    uses = Counter(id(weight) for _, weight in module.named_parameters(remove_duplicate=False))
    alike = defaultdict(list)
    for layer in layers:
        if not is_unhooked(layer) or ("weight" not in layer._parameters and not is_parametrized(layer, "weight")):
            continue  # the hook of a pruned layer, say, makes its weights at each call
        bias = layer.bias
        if bias is not None and (bias.dtype, bias.device) != (layer.weight.dtype, layer.weight.device):
            continue  # PyTorch says what it thinks of that
        kind = layer.weight.shape, layer.weight.dtype, layer.weight.device, bias is None, layer.usual_rows
        alike[kind].append(layer)
    in_all = sum(layer.weight.nbytes for layer in layers)
    replayed = getattr(module, "steps_replay", False) is True
    for group in alike.values():
        usual_rows = group[0].usual_rows
        given = [layer.weight for layer in group], group[0].bias, usual_rows or rows
        product = choose(*given, in_all, replayed=replayed and usual_rows is None)
        same = keeps_bits(product, *given)
        for layer in group:
            keep = uses[id(layer.weight)] > 1 or id(layer.weight) in kept or is_shared(layer.weight)
            layer.prepare(product, usual_rows or rows, keep=keep)
            layer.keeps_bits = same


def are_side_by_side(weights: Sequence[Tensor]) -> bool:
    """Whether plain matrices [out, in] follow each other in one memory."""
    return all(type(each.data) is Tensor and each.is_contiguous() for each in weights) and all(
        one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.storage_offset() + one.numel() == other.storage_offset()
        for one, other in pairwise(weights)
    )


def _lay_side_by_side(layers: Sequence[nn.Linear]) -> None:
    if any(type(layer) not in (Linear, nn.Linear) for layer in layers):  # an adapter, say
        return
    weights = [layer.weight for layer in layers]
    if any(not available.on_gpu(each) or each.is_inference() for each in weights) or are_side_by_side(weights):
        return
    alike = len({(each.dtype, each.device, each.shape[1]) for each in weights}) == 1
    if alike and all(type(each.data) is Tensor for each in weights):
        parts = torch.cat(weights).split([len(each) for each in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.data = part
