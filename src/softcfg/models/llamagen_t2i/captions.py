"""How LlamaGen's text-to-image models read captions: cleaned, then encoded by a T5 encoder.

The models were trained on captions cleaned by `language/t5.py` of https://github.com/FoundationVision/LlamaGen, a
cleaner of web captions that comes from DeepFloyd IF. Its behaviour is kept exactly, oddities included.
"""

from __future__ import annotations

import contextlib
import html
import re
import urllib.parse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softcfg.errors import CheckpointError, UserError, how_to_install, quote
from softcfg.files import is_file, is_folder
from softcfg.models.conditioning import PromptConditioning
from softcfg.models.text import plain_tokenizer
from softcfg.nn.precision import own_dtype
from softcfg.prompts import Prompt
from softcfg.text_tokenizers import read_tokenizer_json, text_ids, text_tokenizer

if TYPE_CHECKING:
    from softcfg.models.llamagen_t2i.generator import LlamaGenT2I

PASSES = 2  # the released code cleans twice, and the second pass may find more
MOST_CHARACTERS = 10_000  # some patterns take time that grows with the square of the length

Step = tuple[re.Pattern[str], str]  # what matches, and its replacement

FILE_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
HOST = r"[a-zA-Z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"


def _steps(*pairs: tuple[str, str]) -> list[Step]:
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


BEFORE_MARKUP = _steps(
    ("<person>", "person"),
    # Web addresses: a scheme by itself, or a host with its path.
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{HOST})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{HOST})", ""),
)
BEFORE_REPAIR = _steps(
    (r"@\w+\b", ""),
    ("[\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]+", ""),
    # Dashes and quotation marks of all kinds.
    (
        "[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
        "\ufe63\uff0d]+",
        "-",
    ),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    # Addresses of computers, article numbers, written line ends, tags and long numbers, names of files.
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{FILE_ENDINGS})", ""),
    # Punctuation.
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
AFTER_REPAIR = _steps(
    # Codes of articles.
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    # Words of shops and downloads.
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{FILE_ENDINGS})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    ("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b", ""),  # sizes, with x, Cyrillic x or the sign of multiplication
    # Blanks, and what stands around the whole.
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)
HYPHEN = re.compile("[-_]")
MOST_HYPHENS = 3  # with more, a caption is a name written with them


def clean_caption(caption: str, passes: int = PASSES) -> str:
    """Return `caption` as the text encoder of LlamaGen's text-to-image models reads it; it may be left empty.

    Raises:
        UserError: the caption is far too long or not valid Unicode, or ftfy or Beautiful Soup is not installed.
    """
    if len(caption) > MOST_CHARACTERS:
        raise UserError(f"a caption may have at most {MOST_CHARACTERS} characters, got {len(caption)}")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"a caption must be valid Unicode text, got {quote(caption)}") from error
    for _ in range(passes):
        caption = _clean_once(caption)
    return caption


def _clean_once(caption: str) -> str:
    try:
        import ftfy
        from bs4 import BeautifulSoup, ParserRejectedMarkup
    except ImportError as error:
        raise UserError(f"cleaning captions needs {error.name}: {how_to_install('llamagen-t2i')}") from error

    caption = urllib.parse.unquote_plus(caption).strip().lower()
    caption = _apply(BEFORE_MARKUP, caption)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about captions that look like names of files or addresses
        with contextlib.suppress(ParserRejectedMarkup):  # what is not markup stays as it is
            caption = BeautifulSoup(caption, features="html.parser").text
    caption = _apply(BEFORE_REPAIR, caption)
    if len(HYPHEN.findall(caption)) > MOST_HYPHENS:
        caption = HYPHEN.sub(" ", caption)
    caption = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
    return _apply(AFTER_REPAIR, caption).strip()


def _apply(steps: list[Step], text: str) -> str:
    for pattern, replacement in steps:
        text = pattern.sub(replacement, text)
    return text


class CaptionEncoder:
    """The encoder of flan-T5 (https://arxiv.org/abs/2210.11416), by the transformers library.

    Captions are encoded one by one, so what becomes of one does not depend on the others.

    Args:
        folder: holds `config.json`, `tokenizer.json` and the weights.
        most: tokens of a caption, the end of the text included; longer ones are cut.
        dtype, device: of the encoder.

    Raises:
        CheckpointError: a file is missing or damaged.
        UserError: transformers is not installed.
    """

    def __init__(self, folder: Path, most: int, *, dtype: torch.dtype, device: torch.device) -> None:
        try:
            from transformers import T5EncoderModel
        except ImportError as error:
            raise UserError(f"encoding captions needs transformers: {how_to_install('llamagen-t2i')}") from error
        path = folder / "tokenizer.json"
        self.tokenizer = text_tokenizer(plain_tokenizer(read_tokenizer_json(path), path), path)
        self.tokenizer.enable_truncation(most)
        # The library opens whatever has the name of a file that it looks for.
        if strange := [entry for entry in folder.iterdir() if not (is_file(entry) or is_folder(entry))]:
            raise CheckpointError(f"{strange[0]} is no regular file, so the text encoder beside it is not read")
        try:
            model = T5EncoderModel.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
        except Exception as error:  # the libraries raise plain exceptions
            raise CheckpointError(f"the text encoder in {folder} is incomplete or damaged ({error})") from error
        self.model = model.to(device).eval()

    @torch.no_grad()
    @own_dtype()
    def encode(self, caption: str) -> Tensor:
        """Return the features [n, width] of a cleaned caption of n tokens."""
        ids = torch.tensor([text_ids(self.tokenizer, caption, specials=True)], device=self.model.device)
        features: Tensor = self.model(input_ids=ids).last_hidden_state[0]
        return features


class LlamaGenCaptions(PromptConditioning):
    """The captions of a text-to-image LlamaGen model, for images of one size.

    Its files are "encoder", the weights of the text encoder, "encoder_config" and "tokenizer", in one folder. The
    encoder is loaded with the first caption, in the generator's dtype and on its device.
    """

    generator: LlamaGenT2I

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._encoder: CaptionEncoder | None = None

    @property
    def encoder(self) -> CaptionEncoder:
        """The text encoder.

        Raises:
            UserError: the model has none.
        """
        if self._encoder is None:
            if "encoder" not in self.files:
                raise UserError(f"{self.name} has no text encoder, so it cannot read prompts")
            folder, generator = self.files["encoder"].parent, self.generator
            most = generator.config.cls_token_num
            self._encoder = CaptionEncoder(folder, most, dtype=generator.dtype, device=generator.device)
        return self._encoder

    def inputs(self, requests: Sequence[Prompt]) -> list[Tensor]:
        """See `Conditioning.inputs`; a text that occurs several times is encoded once."""
        features = {text: self.encoder.encode(clean_caption(text)) for text in {prompt.text for prompt in requests}}
        return [features[prompt.text] for prompt in requests]
