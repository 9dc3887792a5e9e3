"""Lumina-mGPT 2.0: the generator, and how it reads prompts."""

from softcfg.models.lumina.generator import Lumina, LuminaConfig, PromptCondition
from softcfg.models.lumina.prompts import (
    DUAL_PANEL,
    IMAGE_TASKS,
    PAIR_TASKS,
    TEXT_TO_IMAGE,
    LuminaPrompts,
    PromptReader,
    TokenPrompt,
    encode_upper_half,
    sentence,
)

__all__ = [
    "DUAL_PANEL",
    "IMAGE_TASKS",
    "PAIR_TASKS",
    "TEXT_TO_IMAGE",
    "Lumina",
    "LuminaConfig",
    "LuminaPrompts",
    "PromptCondition",
    "PromptReader",
    "TokenPrompt",
    "encode_upper_half",
    "sentence",
]
