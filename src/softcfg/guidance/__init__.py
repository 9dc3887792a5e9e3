"""Guidance of autoregressive image models: CFG and SoftCFG, as pure functions over tensors."""

from softcfg.guidance.confidence import CONFIDENCES, token_confidence
from softcfg.guidance.methods import CFG, SoftCFG
from softcfg.guidance.perturbation import perturbation_weights
from softcfg.guidance.schedule import SCHEDULES, guidance_scales

__all__ = [
    "CFG",
    "CONFIDENCES",
    "SCHEDULES",
    "SoftCFG",
    "guidance_scales",
    "perturbation_weights",
    "token_confidence",
]
