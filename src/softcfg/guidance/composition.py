"""Guidance and its settings by name: for files, the command line, sweeps and links.

Rules and perturbations come together here: whatever is registered is known to all of these by its name, its settings as
NAME_FIELD. The settings of SoftCFG have the names of its fields.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from softcfg.guidance.methods import CFG, METHODS, PRESETS, SoftCFG
from softcfg.guidance.perturbation import PERTURBATIONS, ConfidenceWeights, NoPerturbation, Perturbation
from softcfg.guidance.registry import Registry
from softcfg.guidance.rules import RULES, Rule
from softcfg.guidance.settings import Setting, require_settings, settings_of

KindT = TypeVar("KindT", bound=type)

SOFTCFG = "softcfg"
PARTS: dict[str, Registry[Any]] = {"rule": RULES, "perturbation": PERTURBATIONS}
_DEFAULTS = {"rule": "cfg", "perturbation": SOFTCFG}
_HELP = {"rule": "how the logits of the branches are combined", "perturbation": "what the unconditional branch sees"}


def register_rule(name: str, *, label: str = "", description: str = "") -> Callable[[KindT], KindT]:
    """Return a decorator that makes a subclass of `Rule` known by `name`.

    The class becomes a frozen dataclass if it is not one; all of its fields need defaults and are numbers, texts or
    booleans. The decorator raises `ValueError` if the class or its name does not qualify.

    Args:
        label: a short title, for figures and the web page; by default the name.
        description: a few words, for help; by default the first line of the docstring.
    """
    return _registering("rule", Rule, name, label, description)


def register_perturbation(name: str, *, label: str = "", description: str = "") -> Callable[[KindT], KindT]:
    """Return a decorator that makes a subclass of `Perturbation` known by `name`; otherwise as `register_rule`."""
    return _registering("perturbation", Perturbation, name, label, description)


def all_settings() -> dict[str, Setting]:
    """All settings of guidance by name: of `CFG`, of `SoftCFG`, and of what is registered at the moment."""
    found = dict(settings_of(CFG))
    for kind, registry in PARTS.items():
        found[kind] = Setting(
            kind, str, _DEFAULTS[kind], _HELP[kind], choices=registry, flag=f"--{kind}", metavar="NAME"
        )
        for entry, part in registry.items():
            for field, known in settings_of(part).items():
                flat = field if part is ConfidenceWeights else f"{entry}_{field}".replace("-", "_")
                if flat in found:
                    raise ValueError(f"there is a setting named {flat} already; give the {kind} {entry} another name")
                flag = known.flag if part is ConfidenceWeights else "--" + flat.replace("_", "-")
                found[flat] = dataclasses.replace(known, name=flat, flag=flag, part=(kind, entry, field))
    return found


def describe(guidance: CFG) -> dict[str, Any]:
    """The settings of guidance by name, as files hold them: "method", the name of its class, and its fields.

    Rule, perturbation and its scale are left out where they are those of plain CFG.

    Raises:
        ValueError: its class, its rule or its perturbation is not registered (in `METHODS`, `RULES`, `PERTURBATIONS`),
            or has a field that is no setting.
    """
    return {"method": METHODS.name_of(type(guidance)), **_named(guidance)}


def changed(guidance: CFG, settings: Mapping[str, Any]) -> CFG:
    """Guidance of the same class with `settings` by name in place of its own; the class need not be registered.

    Raises:
        ValueError: as `restore`.
    """
    return _make(type(guidance), type(guidance), {**_named(guidance), **settings})


def _named(guidance: CFG) -> dict[str, Any]:
    """The settings of guidance by name, without that of its class; see `describe`."""
    fields = [field for field in dataclasses.fields(guidance) if field.name not in PARTS]
    names = [field.name for field in fields if not (field.kw_only and getattr(guidance, field.name) == field.default)]
    found: dict[str, Any] = {name: getattr(guidance, name) for name in names}
    for kind, registry in PARTS.items():
        part = getattr(guidance, kind)
        if part != getattr(CFG, kind):
            found[kind] = registry.name_of(type(part))
            require_settings(type(part))
            for known in all_settings().values():
                if known.part and known.part[:2] == (kind, found[kind]):
                    found[known.name] = getattr(part, known.part[2])
    return found


def restore(settings: Mapping[str, Any]) -> CFG:
    """The guidance that has these settings, as `describe` gives them.

    Raises:
        ValueError: something in them is not registered, unknown or out of its range.
    """
    return _make(METHODS.require(settings.get("method"), "method"), METHODS[settings["method"]], settings)


def compose(*, preset: str | None = None, drop_unused: bool = False, **settings: Any) -> CFG:
    """Guidance from settings by name (see `all_settings`): SoftCFG, unless `perturbation` says otherwise.

    Args:
        preset: "paper" (by default) or "released", the values of those settings of SoftCFG that are not given.
        drop_unused: leave out the settings of rules and perturbations that are not chosen. By default they are
            refused.

    Raises:
        ValueError: a setting is unknown, out of its range, or of something that is not chosen.
    """
    if settings.get("perturbation", SOFTCFG) != SOFTCFG:
        if preset is not None and not drop_unused:
            raise ValueError(f"there is no preset for the perturbation {settings['perturbation']}, only for {SOFTCFG}")
        return _make(CFG, CFG, settings, drop_unused)
    settings.pop("perturbation", None)
    return _make(PRESETS.require(preset or "paper"), SoftCFG, settings, drop_unused)


def _make(make: Callable[..., CFG], method: type[CFG], settings: Mapping[str, Any], drop_unused: bool = False) -> CFG:
    """Call `make`, which gives a `method`, with the settings sorted into its fields, its rule and its perturbation."""
    known, own = all_settings(), {field.name for field in dataclasses.fields(method)}
    fields: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {kind: {} for kind in PARTS}
    for name, value in settings.items():
        if name == "method" or name in PARTS:
            continue
        if name in own:
            fields[name] = value
            continue
        if name not in known or (part := known[name].part) is None:
            raise ValueError(f"there is no setting named {name!r}")
        kind, entry, field = part
        if settings.get(kind) == entry:
            known[name].check(value)  # under the name that it has here
            parts[kind][field] = value
        elif not drop_unused:
            raise ValueError(f"{name} is a setting of the {kind} {entry}, which is not chosen")
    for kind, registry in PARTS.items():
        if kind in settings:
            value = settings[kind]
            fields[kind] = registry.require(value, kind)(**parts[kind]) if isinstance(value, str) else value
    made = make(**fields)
    if drop_unused and _scales_nothing(made):
        return dataclasses.replace(made, perturbation_scale=0.0)
    check_scale(made)
    return made


def check_scale(guidance: CFG) -> None:
    """Raise `ValueError` for a `perturbation_scale` where nothing is perturbed, so that it would change nothing."""
    if _scales_nothing(guidance):
        raise ValueError(
            f"perturbation_scale {guidance.perturbation_scale:g} takes a perturbation, and there is none: give one, "
            "such as pag, or a perturbation_scale of 0"
        )


def _scales_nothing(guidance: CFG) -> bool:
    return guidance.perturbation_scale > 0 and isinstance(guidance.weak_branch, NoPerturbation)


def _registering(kind: str, base: type, name: str, label: str, description: str) -> Callable[[KindT], KindT]:
    def add(part: KindT) -> KindT:
        if not issubclass(part, base):
            raise ValueError(f"a {kind} is a subclass of {base.__name__}, which {part.__name__} is not")
        if "__dataclass_fields__" not in vars(part):
            dataclasses.dataclass(frozen=True)(part)
        fields = dataclasses.fields(part)  # type: ignore[arg-type]
        without = [field.name for field in fields if field.default is dataclasses.MISSING]
        if without:
            raise ValueError(f"the settings of a {kind} need defaults; {part.__name__}.{without[0]} has none")
        require_settings(part)
        PARTS[kind].register(name, label=label, description=description)(part)
        try:
            all_settings()
        except ValueError:
            del PARTS[kind][name]
            raise
        return part

    return add


def as_guidance(guidance: object, default: Callable[..., CFG] = SoftCFG) -> CFG:
    """The guidance itself; of a number `default` at that scale, and of None `default` as it is.

    Raises:
        ValueError: it is none of these, or a scale out of range.
    """
    if isinstance(guidance, CFG):
        return guidance
    if guidance is None:
        return default()
    if isinstance(guidance, bool) or not isinstance(guidance, numbers.Real):
        what = f"the class {guidance.__name__}" if isinstance(guidance, type) else repr(guidance)[:100]
        raise ValueError(f"guidance must be CFG(...), SoftCFG(...) or a scale such as 4.0, got {what}")
    return default(guidance_scale=float(guidance))
