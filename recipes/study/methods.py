"""The guidance methods that the study compares, and the settings of each among which its best is looked for.

Beside CFG and SoftCFG each has ten settings on `fashion-small`, and fewer on the other models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace

from softcfg import CFG, SoftCFG
from softcfg.guidance import PERTURBATIONS, RULES

NONE = CFG(guidance_scale=1.0)
SCALES = (2.0, 3.0, 5.0, 8.0, 12.0)
LATE = (32, 64)  # the second half of the steps of `fashion-small`
LATE_OF_LONGER = (128, 256)  # and of `fashion`


def _rule(name: str, *settings: Mapping[str, float]) -> list[CFG]:
    return [CFG(rule=RULES[name](**each)) for each in settings]


def _perturbation(name: str, *settings: Mapping[str, float]) -> list[CFG]:
    return [CFG(perturbation=PERTURBATIONS[name](**each)) for each in settings]


def _at(variants: Iterable[CFG], scales: Sequence[float] = SCALES) -> list[CFG]:
    return [replace(variant, guidance_scale=scale) for variant in variants for scale in scales]


def _at_powers(variants: Iterable[CFG]) -> list[CFG]:
    """At all scales, each with a power of 1 and of 2."""
    return [replace(each, guidance_scale_pow=power) for power in (1.0, 2.0) for each in _at(variants)]


def _third(name: str) -> list[CFG]:
    """The conditional branch perturbed, as a third one beside the two of CFG, or alone."""
    scales = [(scale, own) for scale in (3.0, 5.0) for own in (0.5, 1.0)]
    scales += [(1.0, 1.0), (1.0, 2.0), (2.0, 1.0), (3.0, 2.0), (5.0, 0.25), (8.0, 0.5)]
    return [CFG(scale, perturbation=PERTURBATIONS[name](), perturbation_scale=own) for scale, own in scales]


def _with_softcfg(rule: str, strengths: Sequence[float] = (1.0, 0.5), **settings: float) -> list[CFG]:
    return [SoftCFG(rule=RULES[rule](**settings), strength=strength) for strength in strengths]


RULE_CANDIDATES: Mapping[str, Sequence[CFG]] = {
    "rescaled CFG": _at(_rule("rescale", {"share": 0.3}, {"share": 0.7})),
    "APG": _at(_rule("apg", {}, {"momentum": -0.5})),
    "CFG-Zero*": _at(_rule("zero_star", {}, {"init_steps": 0})),
    "tangential damping": _at_powers(_rule("tcfg", {})),
    "adaptive scale": _at(_rule("adaptive", {"alpha": 0.3}, {"alpha": 1.0})),
    "CFG of probabilities": _at_powers(_rule("probability", {})),
}
PERTURBATION_CANDIDATES: Mapping[str, Sequence[CFG]] = {
    "low confidence hidden": _at(_perturbation("low_confidence", {"share": 0.1}, {"share": 0.5})),
    "shorter memory": _at(_perturbation("window", {"size": 16}, {"size": 32})),
    "fading memory": _at(_perturbation("decay", {"half_life": 16.0}, {"half_life": 64.0})),
    "PAG of the unconditional branch": _at_powers(_perturbation("pag", {})),
    "TPG of the unconditional branch": _at(_perturbation("tpg", {"window": 4}, {"window": 16})),
    "VPG of the unconditional branch": _at(_perturbation("vpg", {"rate": 0.1}, {"rate": 0.5})),
    "PAG as a third branch": _third("pag"),
    "VPG as a third branch": _third("vpg"),
}
SOFTCFG_CANDIDATES: Mapping[str, Sequence[CFG]] = {
    "SoftCFG of strength below 1": _at([SoftCFG(strength=0.25), SoftCFG(strength=0.5)]),
    "CFG in the second half": _at_powers([CFG(interval=LATE)]),
    "SoftCFG in the second half": _at_powers([SoftCFG(interval=LATE)]),
    "SoftCFG and rescaled CFG": _at(_with_softcfg("rescale")),
    "SoftCFG and APG": _at(_with_softcfg("apg")),
    "SoftCFG and APG with momentum": _at(_with_softcfg("apg", (0.5, 0.25), momentum=-0.5)),
    "SoftCFG and CFG-Zero*": _at(_with_softcfg("zero_star")),
    "SoftCFG and tangential damping": _at(_with_softcfg("tcfg")),
    "SoftCFG and adaptive scale": _at(_with_softcfg("adaptive")),
}
CANDIDATES: Mapping[str, Sequence[CFG]] = {**RULE_CANDIDATES, **SOFTCFG_CANDIDATES, **PERTURBATION_CANDIDATES}

# SoftCFG, and the method from whose best setting it starts, without SoftCFG.
WITHOUT_SOFTCFG: Mapping[str, str] = {
    "SoftCFG of strength below 1": "CFG",
    "SoftCFG in the second half": "CFG in the second half",
    "SoftCFG and APG with momentum": "APG",
    **{f"SoftCFG and {rule}": rule for rule in RULE_CANDIDATES if f"SoftCFG and {rule}" in SOFTCFG_CANDIDATES},
}


def without_softcfg(guidance: SoftCFG) -> CFG:
    """The same rule, scales and interval with nothing perturbed."""
    kept = {field.name: getattr(guidance, field.name) for field in fields(CFG) if field.name != "perturbation"}
    return CFG(**kept)


def _on_other_models(scales: Sequence[float], late: tuple[int, int]) -> dict[str, Sequence[CFG]]:
    """Where SoftCFG may do better: the same few methods on other models, at as many scales each."""
    (apg,) = _rule("apg", {"momentum": -0.5})  # the best of the rules on `fashion-small`
    methods = {
        "CFG": CFG(),
        "SoftCFG": SoftCFG(),
        "SoftCFG of strength 0.5": SoftCFG(strength=0.5),
        "SoftCFG of strength 0.25": SoftCFG(strength=0.25),
        "CFG in the second half": CFG(interval=late),
        "APG": apg,
    }
    return {"no guidance": [NONE], **{name: _at([method], scales) for name, method in methods.items()}}


HALF_TRAINED_CANDIDATES: Mapping[str, Sequence[CFG]] = {
    **_on_other_models(SCALES, LATE),
    "SoftCFG in the second half": _at([SoftCFG(interval=LATE)]),
    "SoftCFG of strength 0.5 and APG": _at(_with_softcfg("apg", (0.5,), momentum=-0.5)),
}
LONGER_CANDIDATES: Mapping[str, Sequence[CFG]] = _on_other_models((2.0, 3.0), LATE_OF_LONGER)
