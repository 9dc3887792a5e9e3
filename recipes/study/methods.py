"""The other guidance methods that the study compares: ten settings of each, among which its best is looked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from softcfg import CFG, SoftCFG
from softcfg.guidance import PERTURBATIONS, RULES

SCALES = (2.0, 3.0, 5.0, 8.0, 12.0)
LATE = (32, 64)  # the second half of the steps of `fashion-small`


def _rule(name: str, *settings: Mapping[str, float]) -> list[CFG]:
    return [CFG(rule=RULES[name](**each)) for each in settings]


def _perturbation(name: str, *settings: Mapping[str, float]) -> list[CFG]:
    return [CFG(perturbation=PERTURBATIONS[name](**each)) for each in settings]


def _at(variants: Iterable[CFG], scales: Sequence[float] = SCALES) -> list[CFG]:
    return [replace(variant, guidance_scale=scale) for variant in variants for scale in scales]


def _third(name: str) -> list[CFG]:
    """The conditional branch perturbed, as a third one beside the two of CFG, or alone."""
    scales = [(scale, own) for scale in (3.0, 5.0) for own in (0.5, 1.0)]
    scales += [(1.0, 1.0), (1.0, 2.0), (2.0, 1.0), (3.0, 2.0), (5.0, 0.25), (8.0, 0.5)]
    return [CFG(scale, perturbation=PERTURBATIONS[name](), perturbation_scale=own) for scale, own in scales]


def _with_softcfg(rule: str, **settings: float) -> list[CFG]:
    return [SoftCFG(rule=RULES[rule](**settings), strength=strength) for strength in (1.0, 0.5)]


RULE_CANDIDATES: Mapping[str, Sequence[CFG]] = {
    "rescaled CFG": _at(_rule("rescale", {"share": 0.3}, {"share": 0.7})),
    "APG": _at(_rule("apg", {}, {"momentum": -0.5})),
    "CFG-Zero*": _at(_rule("zero_star", {}, {"init_steps": 0})),
    "tangential damping": [
        replace(each, guidance_scale_pow=power) for power in (1.0, 2.0) for each in _at(_rule("tcfg", {}))
    ],
    "adaptive scale": _at(_rule("adaptive", {"alpha": 0.3}, {"alpha": 1.0})),
    "CFG of probabilities": [
        replace(each, guidance_scale_pow=power) for power in (1.0, 2.0) for each in _at(_rule("probability", {}))
    ],
}
PERTURBATION_CANDIDATES: Mapping[str, Sequence[CFG]] = {
    "low confidence hidden": _at(_perturbation("low_confidence", {"share": 0.1}, {"share": 0.5})),
    "shorter memory": _at(_perturbation("window", {"size": 16}, {"size": 32})),
    "fading memory": _at(_perturbation("decay", {"half_life": 16.0}, {"half_life": 64.0})),
    "PAG of the unconditional branch": [
        replace(each, guidance_scale_pow=power) for power in (1.0, 2.0) for each in _at(_perturbation("pag", {}))
    ],
    "TPG of the unconditional branch": _at(_perturbation("tpg", {"window": 4}, {"window": 16})),
    "VPG of the unconditional branch": _at(_perturbation("vpg", {"rate": 0.1}, {"rate": 0.5})),
    "PAG as a third branch": _third("pag"),
    "VPG as a third branch": _third("vpg"),
}
SOFTCFG_CANDIDATES: Mapping[str, Sequence[CFG]] = {
    "SoftCFG of strength below 1": _at([SoftCFG(strength=0.25), SoftCFG(strength=0.5)]),
    "CFG in the second half": [
        replace(each, guidance_scale_pow=power) for power in (1.0, 2.0) for each in _at([CFG(interval=LATE)])
    ],
    "SoftCFG in the second half": [
        replace(each, guidance_scale_pow=power) for power in (1.0, 2.0) for each in _at([SoftCFG(interval=LATE)])
    ],
    "SoftCFG and rescaled CFG": _at(_with_softcfg("rescale")),
    "SoftCFG and APG": _at(_with_softcfg("apg")),
    "SoftCFG and CFG-Zero*": _at(_with_softcfg("zero_star")),
    "SoftCFG and tangential damping": _at(_with_softcfg("tcfg")),
    "SoftCFG and adaptive scale": _at(_with_softcfg("adaptive")),
}
CANDIDATES: Mapping[str, Sequence[CFG]] = {**RULE_CANDIDATES, **SOFTCFG_CANDIDATES, **PERTURBATION_CANDIDATES}
