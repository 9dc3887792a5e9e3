"""The text encoder of LlamaGen's text-to-image models, that of flan-T5, and the features that it gave before."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softcfg.errors import CheckpointError, UserError, needing
from softcfg.files import as_path, file_states, is_file, read_text, reading
from softcfg.kept import read_kept, write_kept
from softcfg.models.conditioning import TextEncoderLoader
from softcfg.models.text import plain_tokenizer
from softcfg.nn.precision import own_dtype
from softcfg.text_tokenizers import read_tokenizer_json, text_ids, text_tokenizer

FOLDER_VARIABLE = "SOFTCFG_CAPTIONS"
LARGEST_CONFIG = 1 << 20  # bytes
MOST_LAYERS = 200  # of the encoder
LARGEST_FEATURES = 1 << 24  # bytes of the features of a caption


class CaptionEncoder:
    """The encoder of flan-T5 (https://arxiv.org/abs/2210.11416), by the transformers library.

    Captions are encoded one by one, so what becomes of one does not depend on the others.

    Args:
        file: the weights, or the index of several files; `config.json` and `tokenizer.json` lie beside it.
        most: tokens of a caption, the end of the text included; longer ones are cut.
        dtype: of the encoder; float32 in place of float16, in which it overflows.
        load: reads the weights; see `models.conditioning`.

    Raises:
        CheckpointError: a file is missing or damaged.
        UserError: transformers is not installed.
    """

    def __init__(self, file: Path, most: int, *, dtype: torch.dtype, load: TextEncoderLoader) -> None:
        with needing("encoding captions needs transformers", "llamagen-t2i"):
            from transformers import T5Config, T5EncoderModel
        path = file.with_name("tokenizer.json")
        self.tokenizer = text_tokenizer(plain_tokenizer(read_tokenizer_json(path), path), path)
        self.tokenizer.enable_truncation(most)
        path = file.with_name("config.json")
        with reading(path, CheckpointError):
            text = read_text(path, LARGEST_CONFIG)
        try:
            config = T5Config.from_dict(json.loads(text))
            if config.num_layers > MOST_LAYERS:
                raise ValueError(f"{config.num_layers:,} layers, more than {MOST_LAYERS}, the limit")
            with torch.device("meta"):
                model = T5EncoderModel(config)
        except Exception as error:  # the library raises plain exceptions
            raise CheckpointError(f"{path} does not describe a text encoder ({error})") from error
        # float16 is too narrow for it.
        dtype = torch.float32 if dtype == torch.float16 else dtype
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        self.model: Any = load(model, file, dtype, layers)

    @torch.no_grad()
    @own_dtype()
    def encode(self, caption: str) -> Tensor:
        """Return the features [n, width] of a cleaned caption of n tokens."""
        ids = torch.tensor([text_ids(self.tokenizer, caption, specials=True)], device=self.model.device)
        features: Tensor = self.model(input_ids=ids).last_hidden_state[0]
        return features


class KeptFeatures:
    """Features of captions in the folder $SOFTCFG_CAPTIONS, by default one in the user's cache; a file per caption.

    They are found again by the caption, `how` it was encoded, and names, sizes and times of the encoder's files. What
    cannot be read or written is encoded again.

    Args:
        encoder: the folder of the encoder.
        how: what else decides the features, such as their dtype.
    """

    def __init__(self, encoder: Path, how: Sequence[object]) -> None:
        paths = [path for path in sorted(encoder.iterdir()) if is_file(path)]
        # Without device and inode, which differ after a restart; a copy with the same times has another ctime.
        files = [(path.name, *state[2:]) for path, state in zip(paths, file_states(paths), strict=True)]
        home = as_path(os.environ.get(FOLDER_VARIABLE) or "~/.cache/softcfg/captions")
        self.folder = home / hashlib.sha256(repr((files, *how)).encode()).hexdigest()[:16]

    def _path(self, caption: str) -> Path:
        return self.folder / f"{hashlib.sha256(caption.encode()).hexdigest()}.safetensors"

    def read(self, caption: str) -> Tensor | None:
        """Return the features [n, width] of a caption, None if they are not there."""
        return (read_kept(self._path(caption), LARGEST_FEATURES) or {}).get("features")

    def write(self, caption: str, features: Tensor) -> None:
        """Keep the features of a caption."""
        with contextlib.suppress(UserError):
            write_kept(self._path(caption), {"features": features.detach().cpu()})
