"""How LlamaGen's text-to-image models read captions: cleaned, then encoded by a T5 encoder (see `encoder`).

The models were trained on captions cleaned by `language/t5.py` of https://github.com/FoundationVision/LlamaGen, a
cleaner of web captions that comes from DeepFloyd IF. Its behaviour is kept exactly, oddities included.
"""

from __future__ import annotations

import contextlib
import html
import re
import threading
import urllib.parse
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from softcfg.errors import UserError, needing, quote
from softcfg.models.conditioning import PromptConditioning, TextEncoderLoader
from softcfg.models.llamagen_t2i.encoder import CaptionEncoder, KeptFeatures
from softcfg.prompts import Prompt

if TYPE_CHECKING:
    from softcfg.models.llamagen_t2i.generator import LlamaGenT2I

PASSES = 2  # the released code cleans twice, and the second pass may find more
MOST_RECENT = 64  # captions whose features are kept in memory
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
    with needing("cleaning captions needs {}", "llamagen-t2i"):
        import ftfy
        from bs4 import BeautifulSoup, ParserRejectedMarkup

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


class LlamaGenCaptions(PromptConditioning):
    """The captions of a text-to-image LlamaGen model, for images of one size.

    Its files are "encoder", the weights of the text encoder, "encoder_config" and "tokenizer", in one folder. The
    encoder is loaded with the first caption that is not among those kept, in the generator's dtype and on its device.
    """

    generator: LlamaGenT2I
    read_settings = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._encoder: CaptionEncoder | None = None
        self._encoder_is_for: tuple[object, ...] = ()
        self._recent: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def encoder(self) -> CaptionEncoder:
        """The text encoder.

        Raises:
            UserError: the model has none.
        """
        file, load = self._encoder_file()
        wanted = self.generator.dtype, self.generator.device
        if self._encoder is None or self._encoder_is_for != wanted:  # the generator may have been moved since
            most = self.generator.config.cls_token_num
            self._encoder = CaptionEncoder(file, most, dtype=self.generator.dtype, load=load)
            self._encoder_is_for = wanted
        return self._encoder

    def check_inputs(self, requests: Sequence[Prompt]) -> None:
        """See `Conditioning.check_inputs`: captions are cleaned, and not yet encoded."""
        self._encoder_file()
        for prompt in requests:
            clean_caption(prompt.text)

    def inputs(self, requests: Sequence[Prompt]) -> list[Tensor]:
        """See `Conditioning.inputs`; a caption is encoded once, and its features are kept for other runs."""
        config, device = self.generator.config, self.generator.device
        kept = KeptFeatures(
            self._encoder_file()[0].parent, [self.generator.dtype, device.type, self.quantize, config.cls_token_num]
        )
        with self._lock:  # one encoder, however many threads draw
            return [self._features(clean_caption(prompt.text), kept) for prompt in requests]

    def _features(self, text: str, kept: KeptFeatures) -> Tensor:
        key = text, self.generator.dtype, self.generator.device
        if key not in self._recent:
            known = kept.read(text)
            if known is None:
                known = self.encoder.encode(text)
                if self.keep_files:
                    kept.write(text, known)
            self._recent[key] = known
            if len(self._recent) > MOST_RECENT:
                self._recent.popitem(last=False)
        return self._recent[key]

    def _encoder_file(self) -> tuple[Path, TextEncoderLoader]:
        if "encoder" not in self.files or self.load is None:
            raise UserError(f"{self.name} has no text encoder, so it cannot read prompts")
        return self.files["encoder"], self.load
