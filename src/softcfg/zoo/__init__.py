"""Known models: the registry, and finding, fetching, checking and loading their weights."""

from softcfg.zoo.fetching import fetch
from softcfg.zoo.loading import load_generator, load_tokenizer, load_weights
from softcfg.zoo.reading import read_state_dict
from softcfg.zoo.registry import (
    GENERATORS,
    MODELS,
    TOKENIZERS,
    Component,
    Family,
    ModelEntry,
    ModelFile,
    TextComponent,
    register_generator,
    register_tokenizer,
    resolve,
)

__all__ = [
    "GENERATORS",
    "MODELS",
    "TOKENIZERS",
    "Component",
    "Family",
    "ModelEntry",
    "ModelFile",
    "TextComponent",
    "fetch",
    "load_generator",
    "load_tokenizer",
    "load_weights",
    "read_state_dict",
    "register_generator",
    "register_tokenizer",
    "resolve",
]
