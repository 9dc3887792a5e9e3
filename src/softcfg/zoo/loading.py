"""Build models from a configuration and exactly the weights that fit it."""

from __future__ import annotations

import functools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.configuration import ConfigSource, load_config
from softcfg.errors import CheckpointError, UserError, clean, quote, require_name
from softcfg.zoo.files import find_file, require_file
from softcfg.zoo.mapped import MappedFiles, give_back_freed
from softcfg.zoo.reading import read_json, read_weights
from softcfg.zoo.registry import GENERATORS, MODELS, TOKENIZERS, Component, Family, ModelEntry, ModelFile, resolve
from softcfg.zoo.unwrapping import find_weights, require_plain

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from softcfg.models.base import Generator
    from softcfg.models.conditioning import Conditioning
    from softcfg.tokenizers.base import Tokenizer

Place = Callable[["nn.Module"], "nn.Module"]

MOST_TENSORS = 4_000  # of a model
LARGEST_TABLE = 1 << 24  # numbers
PLAIN = ("torch.float16", "torch.bfloat16", "torch.float32", "torch.float64")  # numbers without scales beside them
SHOWN = 4  # names listed in an error message, of each kind
LIKE, UNLIKE = 0.8, 0.3  # shares of names: the least for a guess, and below which sizes need not be tried


def load_generator(
    family: str | Path | ModelEntry,
    config: ConfigSource | None = None,
    checkpoint: str | Path | Mapping[str, Tensor] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> Generator:
    """Load a generator in eval mode, its parameters without gradients.

    Args:
        family: one of `softcfg.zoo.registry.GENERATORS`, such as "alitok"; or a model of the zoo ("alitok-xl") or a
            model folder, which then supplies what is not given.
        config: the family's configuration dataclass, a mapping (flat or as released) or a YAML file.
        checkpoint: a weights file, the index of several, or a state dict, under the released names. Tensors that need
            no conversion are used as they are, not copied.
        device: where the weights go; the CPU by default.
        dtype: dtype of the weights, or its name; by default float32, or what suits a model of the zoo. "fastest" is
            float32 or bfloat16, in whichever this machine multiplies the weights faster.

    Raises:
        CheckpointError: the weights are missing, damaged, unsafe to open or do not fit the configuration.
        UserError: an unknown family, or a configuration that is not valid.
    """
    return _load(GENERATORS, family, config, checkpoint, device, dtype)


def load_tokenizer(
    family: str | Path | ModelEntry,
    config: ConfigSource | None = None,
    checkpoint: str | Path | Mapping[str, Tensor] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> Tokenizer:
    """Load an image tokenizer, of a family of `softcfg.zoo.registry.TOKENIZERS`, such as "maskgit-vq", or of a model.

    See `load_generator`.
    """
    return _load(TOKENIZERS, family, config, checkpoint, device, dtype)


def load_conditioning(
    entry: ModelEntry,
    generator: Generator,
    tokenizer: Tokenizer,
    *,
    with_files: bool = True,
    quantize: str | None = None,
    place: Place | None = None,
) -> Conditioning:
    """What turns labels or prompts into what the generator of a model is conditioned on.

    Args:
        with_files: whether to read the files that texts are read with; without them no prompt can be read.
        quantize: of text encoders; see `Conditioning`.
        place: rounds and moves a part of a text encoder; by default it goes where the generator is.

    Raises:
        CheckpointError: a file is missing or damaged.
        UserError: the tokenizer does not decode what the generator draws.
    """
    conditioning_type = generator.conditioning_type
    if conditioning_type is None:
        raise UserError(f"the {entry.generator.family.name} generator does not say what it is conditioned on")
    text: dict[str, Any] = {}
    if entry.text is not None:
        place = place or (lambda part: part.to(generator.device))
        load = functools.partial(load_text_encoder, place=place)
        text |= {"settings": entry.text.settings, "quantize": quantize, "load": load}
        if with_files:
            text["files"] = {role: require_file(file, entry) for role, file in entry.text.files.items()}
    return conditioning_type(generator, tokenizer, name=entry.name, classes=entry.classes, **text)


def _load(
    families: Mapping[str, Family],
    name: str | Path | ModelEntry,
    config: ConfigSource | None,
    checkpoint: str | Path | Mapping[str, Tensor] | None,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
) -> Any:
    kind = "generator" if families is GENERATORS else "tokenizer"
    if isinstance(name, str) and name in families:
        family = families[name]
        if checkpoint is None:
            raise UserError(f"loading a {name} {kind} needs checkpoint=, a weights file or a state dict")
    else:
        if isinstance(name, str) and not os.path.exists(name):
            require_name(name, {**families, **MODELS}, f"there is no {kind} family or model named")
        entry = resolve(name)
        component = entry.generator if families is GENERATORS else entry.tokenizer
        family = component.family
        config = published_config(entry, component) if config is None else config
        checkpoint = require_file(component.file, entry) if checkpoint is None else checkpoint
        dtype = component.dtype if dtype in (None, "auto") else dtype
    module_class, config_class = family.classes()
    settings: Any = load_config(config_class, {} if config is None else config, family.sections)
    module = _on_meta(module_class, settings)
    if dtype == "fastest":
        from softcfg.nn.precision import as_device

        dtype = _fastest_dtype(module, as_device(device or "cpu"))
    state, source = weights_for(module, family, checkpoint)
    mapped = None if isinstance(checkpoint, Mapping) else MappedFiles()
    return _fill(module, state, device=device, dtype=dtype, source=source, extras=family.extras, mapped=mapped)


def published_config(entry: ModelEntry, component: Component) -> dict[str, Any]:
    """The configuration of a component, completed by the files published beside its weights, where they are here.

    That is `config.json`, and what the family finds in the files that it reads texts with.
    """
    config = with_config_file(component, find_config_file(component))
    if entry.text is not None and component is entry.generator:
        config.update(config_of_texts(entry, {file: find_file(file) for file in entry.text.files.values()}))
    return config


def find_config_file(component: Component) -> Path | None:
    """Where the `config.json` of a component lies, if it has one that is here."""
    return None if component.config_file is None else find_file(component.config_file)


def with_config_file(component: Component, path: Path | None) -> dict[str, Any]:
    """The configuration of a component, completed by the `config.json` at `path`, if there is one.

    Raises:
        CheckpointError: the file is damaged, or describes a model that computes something else than the family.
    """
    if path is None:
        return dict(component.config)
    config_class: Any = component.family.classes()[1]
    config = {**component.config, **read_json(path)}
    try:
        return config_class.of_published(config) if hasattr(config_class, "of_published") else config
    except ValueError as error:
        raise CheckpointError(f"{path} describes another model than a {component.family.name}: {error}") from error


def config_of_texts(entry: ModelEntry, found: Mapping[ModelFile, Path | None]) -> dict[str, Any]:
    """Fields of the generator's configuration that the files say with which a model reads texts.

    Args:
        found: where files are; those that are not there, or not named, are left out.

    Raises:
        CheckpointError: a file is damaged.
    """
    if entry.text is None:
        return {}
    module_class: Any = entry.generator.family.classes()[0]
    conditioning_type: type[Conditioning] | None = module_class.conditioning_type
    files = {role: path for role, file in entry.text.files.items() if (path := found.get(file)) is not None}
    return {} if conditioning_type is None else conditioning_type.published_config(files)


def weights_for(
    module: nn.Module, family: Family, checkpoint: str | Path | Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    """What a weights file, or a state dict, holds for `module` of `family`; and where that was, in words."""
    expected = module.state_dict().keys()

    def match(tensors: Mapping[str, Tensor]) -> int:
        return len(expected & family.needed(tensors).keys())

    if not isinstance(checkpoint, (str, os.PathLike, Mapping)):
        raise UserError(f"a checkpoint must be the path of a file or a state dict, got {quote(checkpoint)}")
    if isinstance(checkpoint, Mapping):
        source = "the given state dict"
        found = find_weights(checkpoint, source, family.entries, match, len(expected))
        require_plain(found.tensors, source)
    else:
        source = str(checkpoint)
        found = read_weights(checkpoint, family.entries, family.allowed_types, match, len(expected))
    if found.how:
        source = f"{source} ({found.how})"
    if found.notable:
        warnings.warn(f"weights of the {family.name} {family.kind} were read from {clean(source)}", stacklevel=4)
    return family.needed(found.tensors), source


def load_weights(
    module_class: type[nn.Module],
    config: Any,
    state_dict: Mapping[str, Tensor],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    source: str = "the state dict",
    extras: bool = False,
) -> nn.Module:
    """Build `module_class(config)` with exactly the weights of `state_dict`, in eval mode, without gradients.

    With `extras`, the state dict may hold other tensors too.

    Names, shapes and kinds of numbers are compared before anything is allocated on `device`.

    Raises:
        CheckpointError: the weights do not fit; all kinds of differences are listed together.
    """
    module = _on_meta(module_class, config)
    return _fill(module, state_dict, device=device, dtype=dtype, source=source, extras=extras)


def _fill(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    device: str | torch.device | None,
    dtype: torch.dtype | str | None,
    source: str,
    extras: bool,
    mapped: MappedFiles | None = None,
) -> nn.Module:
    """Give a module on the meta device its weights; see `load_weights`.

    Args:
        mapped: where the tensors may lie; what was converted, or copied to a device, is given back one by one.
    """
    import torch

    from softcfg.nn.memory import require_memory
    from softcfg.nn.precision import as_device, as_dtype, dtype_name, tell_of_slow_dtype

    require_fit(module, state_dict, source, extras=extras)
    device = as_device("cpu" if device is None else device)
    number = as_dtype(dtype) or torch.float32
    tell_of_slow_dtype(number, device)
    wanted = {name: number if like.is_floating_point() else like.dtype for name, like in module.state_dict().items()}
    if device.type == "cpu":  # where what is in its dtype stays in the file
        converted = sum(
            state_dict[name].numel() * kind.itemsize for name, kind in wanted.items() if state_dict[name].dtype != kind
        )
        require_memory(converted, f"the weights of {source} in {dtype_name(number)}")

    def take(name: str) -> Tensor:
        read = state_dict[name].detach()
        made = read.to(device, wanted[name])
        if mapped is not None and made is not read:
            mapped.forget(read)
        return made

    taken = {name: take(name) for name in wanted}
    module.load_state_dict(taken, assign=True)
    module.to(device)  # tables that are not weights
    return module.requires_grad_(False).eval()


def load_text_encoder(
    module: nn.Module, checkpoint: Path, dtype: torch.dtype, parts: Iterable[nn.Module], *, place: Place
) -> nn.Module:
    """Give a text encoder that lies on the meta device its weights; see `models.conditioning.TextEncoderLoader`.

    Args:
        checkpoint: a weights file or the index of several; what else it holds, such as a decoder, is not read. Under
            the names that the encoder's own begin with it holds nothing else.
        place: rounds and moves a part, or what is left of the whole.

    Raises:
        CheckpointError: the weights are missing, damaged or do not fit.
    """
    from torch import nn

    state = read_weights(checkpoint).tensors
    names: dict[Tensor, str] = {}  # of tensors that are one, the name that the file has
    known = dict(module.named_parameters(remove_duplicate=False))
    for name, parameter in known.items():
        if name in state or parameter not in names:
            names[parameter] = name
    expected = {name: parameter for parameter, name in names.items()}
    others = known.keys() - expected.keys()
    own = {name.partition(".")[0] for name in known}
    found = {name: state[name] for name in state if name.partition(".")[0] in own and name not in others}
    if differences := _differences(expected, found):
        raise CheckpointError(f"{checkpoint} does not fit the text encoder: {'; '.join(differences)}")
    mapped = MappedFiles()

    def fill(modules: Iterable[nn.Module]) -> list[Tensor]:
        filled: dict[Tensor, nn.Parameter] = {}
        for owner in modules:
            for key, parameter in owner._parameters.items():
                if parameter is not None:
                    if parameter not in filled:
                        read = state[names[parameter]]
                        filled[parameter] = nn.Parameter(read.to(dtype), requires_grad=False)
                        mapped.forget(read)
                    owner._parameters[key] = filled[parameter]
        return [state[names[parameter]] for parameter in filled]

    parts = list(parts)
    inside = {each for part in parts for each in part.modules()}
    fill(each for each in module.modules() if each not in inside)  # with the largest table, while little else is there
    for part in parts:
        read = fill(part.modules())
        place(part)
        for tensor in read:  # what is still used is read again
            mapped.forget(tensor)
        del read
        give_back_freed()
    return place(module).eval()


def random_weights(
    component: Component,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
) -> Any:
    """The module of `component` with random weights, for measuring speed without its file; in eval mode."""
    import torch

    from softcfg.nn.precision import as_dtype

    module_class, config_class = component.family.classes()
    config: Any = load_config(config_class, component.config, component.family.sections)
    empty = _on_meta(module_class, config)  # what is too large is refused before it takes memory
    # A GPU makes a billion numbers in no time; elsewhere they are those of the CPU.
    maker = device if device is not None and torch.device(device).type == "cuda" else "cpu"
    with torch.random.fork_rng(), torch.device(maker):
        torch.manual_seed(seed)
        try:
            module = module_class(config)
        except (RuntimeError, MemoryError) as error:
            family = component.family
            raise UserError(f"there is no memory for the {family.name} {family.kind} here") from error
    number = _fastest_dtype(empty, torch.device(maker)) if dtype == "fastest" else as_dtype(dtype)
    return module.to(device, number).requires_grad_(False).eval()


def _fastest_dtype(module: nn.Module, device: torch.device) -> torch.dtype:
    from softcfg.decoding import throughput
    from softcfg.models.base import Generator
    from softcfg.nn import linear

    return (throughput if isinstance(module, Generator) else linear).fastest_dtype(module, device)


def _on_meta(module_class: type[nn.Module], config: Any) -> nn.Module:
    import torch
    from torch.overrides import TorchFunctionMode

    class SkippingInit(TorchFunctionMode):
        """Skips initialisation, which on meta only makes torch import its compiler, and bounds what is built."""

        tensors = 0

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if getattr(function, "__module__", "") == "torch.nn.init":
                return args[0] if args else kwargs["tensor"]
            self.tensors += function is torch.empty
            if self.tensors > MOST_TENSORS:
                raise CheckpointError(f"the configured {module_class.__name__} has more than {MOST_TENSORS:,} tensors")
            if _size(function, args) > LARGEST_TABLE:
                raise CheckpointError(
                    f"the configured {module_class.__name__} needs tables of more than {LARGEST_TABLE:,} numbers"
                )
            return function(*args, **kwargs)

    def _size(function: Any, args: Sequence[Any]) -> int:
        """Numbers in what a function makes of tensors that take memory, which tables such as those of rotation do."""
        if function is torch.arange:
            return max((int(arg) for arg in args if isinstance(arg, (int, float))), default=0)
        shapes = [arg.shape for arg in args if isinstance(arg, torch.Tensor) and not arg.is_meta]
        # `torch.broadcast_shapes` imports a part of the compiler, which takes a second.
        sizes = list(zip_longest(*map(reversed, shapes), fillvalue=1))
        is_elementwise = len(shapes) > 1 and all(len({*each, 1}) <= 2 for each in sizes)
        return math.prod(map(max, sizes)) if is_elementwise else 0

    try:
        with torch.device("meta"), SkippingInit():
            return module_class(config)
    except (RuntimeError, OverflowError, MemoryError) as error:
        problem = clean(str(error).partition("\n")[0], 200)
        raise CheckpointError(f"the configured {module_class.__name__} cannot be built: {problem}") from error


def empty_module(component: Component) -> nn.Module:
    """The module of `component` as it should be, without memory for its weights."""
    module_class, config_class = component.family.classes()
    return _on_meta(module_class, load_config(config_class, component.config, component.family.sections))


def require_fit(module: nn.Module, state_dict: Mapping[str, Tensor], source: str, *, extras: bool = False) -> None:
    """Raise a `CheckpointError` that lists all differences unless the tensors of `module` are those of `state_dict`."""
    expected = module.state_dict()
    found = {name: state_dict[name] for name in expected if name in state_dict} if extras else state_dict
    if differences := _differences(expected, found):
        problem = f"{source} does not fit the configured {type(module).__name__}: {'; '.join(differences)}"
        raise CheckpointError(problem + _recognise(state_dict, type(module)))
    if empty := [name for name in expected if found[name].is_meta]:
        raise CheckpointError(
            f"{source} holds no numbers for {len(empty)} tensors, {_short(empty[0])} among them: the model was saved "
            "while it was offloaded; save it once it is in memory"
        )


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Say how `found` differs from `expected` in names, shapes and kinds of numbers; empty if it does not."""
    shared = [(name, expected[name], found[name]) for name in expected if name in found]
    misshapen = [name for name, one, other in shared if one.shape != other.shape]
    mistyped = [name for name, one, other in shared if one.is_floating_point() != other.is_floating_point()]
    quantized = [name for name, _, other in shared if other.is_floating_point() and str(other.dtype) not in PLAIN]

    def listing(what: str, names: list[str], describe: Any = _short) -> list[str]:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return [f"{len(names)} {what} ({', '.join(map(describe, names[:SHOWN]))}{more})"] if names else []

    def shapes(name: str) -> str:
        return f"{_short(name)} is {quote(list(found[name].shape))}, expected {list(expected[name].shape)}"

    def dtypes(name: str) -> str:
        return f"{_short(name)} is {found[name].dtype}, expected {expected[name].dtype}"

    return [
        *listing("missing", [name for name in expected if name not in found]),
        *listing("unexpected", [name for name in found if name not in expected]),
        *listing("of another shape", misshapen, shapes),
        *listing("of another type", mistyped, dtypes),
        *listing("quantized, to be converted first", quantized, dtypes),
    ]


def _short(name: str) -> str:
    return clean(name, 100)


def _recognise(found: Mapping[str, Tensor], module_class: type[nn.Module]) -> str:
    """Guess whose weights these are: those of a known model, or at least of another family."""
    anatomy = _generic_names(found)
    likeness = {"": LIKE}
    seen: list[Component] = []
    for name, component in ((entry.name, component) for entry in MODELS.values() for component in entry.components):
        label = f"{component.family.name} {component.family.kind}"
        # Models share tokenizers, and where one size of a family is altogether different, so are the others.
        if component in seen or likeness.get(label, 1) < UNLIKE:
            continue
        seen.append(component)
        known = empty_module(component)
        fits = not _differences(known.state_dict(), component.family.needed(found))
        if isinstance(known, module_class):
            if fits:
                return f"; it fits {name}"
        elif fits:
            return f"; this looks like a checkpoint of the {label} (it fits {name})"
        else:
            expected = _generic_names(known.state_dict())
            likeness[label] = len(expected & anatomy) / len(expected | anatomy)
    best = max(likeness, key=likeness.__getitem__)
    return f"; this looks like a checkpoint of the {best}" if best else ""


def _generic_names(names: Iterable[str]) -> set[str]:
    """The names without their numbers: the same for every size of a family."""
    return {re.sub(r"\d+", "#", name) for name in names}
