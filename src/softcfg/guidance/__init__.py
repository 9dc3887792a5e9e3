"""Guidance of autoregressive image models: rules, perturbations and schedules, as pure functions over tensors."""

from softcfg.guidance.composition import (
    all_settings,
    as_guidance,
    compose,
    describe,
    register_perturbation,
    register_rule,
    restore,
)
from softcfg.guidance.confidence import CONFIDENCES, register_confidence, token_confidence
from softcfg.guidance.methods import CFG, METHODS, PRESETS, SoftCFG, guidance_scales, titled
from softcfg.guidance.perturbation import (
    PERTURBATIONS,
    ConfidenceWeights,
    NoPerturbation,
    Perturbation,
    perturbation_weights,
)
from softcfg.guidance.registry import Registry, View
from softcfg.guidance.rules import RULES, Centred, Rule
from softcfg.guidance.schedule import SCHEDULES, ramp, register_schedule
from softcfg.guidance.settings import Setting, setting, settings_of
from softcfg.guidance.weakened import (
    CorruptedPrefix,
    Decay,
    LowConfidence,
    OtherTokens,
    SelfAttention,
    Shuffled,
    Window,
)

__all__ = [
    "CFG",
    "CONFIDENCES",
    "METHODS",
    "PERTURBATIONS",
    "PRESETS",
    "RULES",
    "SCHEDULES",
    "Centred",
    "ConfidenceWeights",
    "CorruptedPrefix",
    "Decay",
    "LowConfidence",
    "NoPerturbation",
    "OtherTokens",
    "Perturbation",
    "Registry",
    "Rule",
    "SelfAttention",
    "Setting",
    "Shuffled",
    "SoftCFG",
    "View",
    "Window",
    "all_settings",
    "as_guidance",
    "compose",
    "describe",
    "guidance_scales",
    "perturbation_weights",
    "ramp",
    "register_confidence",
    "register_perturbation",
    "register_rule",
    "register_schedule",
    "restore",
    "setting",
    "settings_of",
    "titled",
    "token_confidence",
]
