"""The prompts of Janus-Pro and Emu3-Gen and the captions of LlamaGen T2I are those of the released programs."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import unicodedata
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from goldens import FOLDER
from softcfg import UserError
from softcfg.errors import CheckpointError
from softcfg.models.emu3 import prompts as emu3
from softcfg.models.janus import prompts as janus
from softcfg.models.llamagen_t2i.captions import clean_caption
from softcfg.models.text import Piece, Special, TextTokenizer

MARKS = ["<|User|>", "<begin_of_image>", "<|extra_203|>", "<|image start|>", "<|image token|>"]


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / name).read_text())
    return content


@pytest.fixture
def text_tokenizer(tmp_path: Path) -> TextTokenizer:
    """Bytes as tokens, then one merge, then special tokens; of the roles of Janus it has one only."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "Ġa"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(MARKS[1:])
    tokenizer.add_tokens(MARKS[:1])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return TextTokenizer(tmp_path / "tokenizer.json")


def text_of(pieces: Iterable[Piece]) -> str:
    """A prompt as one string, special tokens by their names."""
    return "".join(piece if isinstance(piece, str) else piece.name for piece in pieces)


@pytest.mark.parametrize("pair", read("janus/golden-prompts-a.json")["pairs"], ids=lambda pair: pair["caption"][:12])
def test_prompts_of_janus(pair: dict[str, str]) -> None:
    assert text_of(janus.prompt_pieces(pair["caption"])) == pair["prompt"]


@pytest.mark.parametrize("pair", read("emu3/golden-prompts-a.json")["prompts"], ids=lambda pair: pair["prompt"][-40:])
def test_prompts_of_emu3(pair: dict[str, Any]) -> None:
    grid = emu3.grid_of_ratio(pair["ratio"])
    assert grid == tuple(pair["h_w"])
    assert text_of(emu3.prompt_pieces(pair["text"], grid)) == pair["prompt"]


@pytest.mark.parametrize("size", read("emu3/golden-prompts-a.json")["sizes"], ids=str)
def test_sizes_of_emu3(size: dict[str, Any]) -> None:
    assert emu3.grid_of_ratio(size["ratio_w_h"], size["image_area"]) == tuple(size["h_w"])


@pytest.mark.parametrize(
    ("ratio", "area", "message"),
    [
        ("16x9", 518400, "WIDTH:HEIGHT"),
        ("0:1", 518400, "WIDTH:HEIGHT"),
        ("-1:1", 518400, "WIDTH:HEIGHT"),
        ("1:1", 0, "greater than 0"),
        ("1:1", 256, "3 columns"),
        ("1:2000", 518400, "3 columns"),
        ("40000:1", 518400, "1 row "),
    ],
)
def test_sizes_that_emu3_cannot_draw(ratio: str, area: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        emu3.grid_of_ratio(ratio, area)


@pytest.mark.parametrize(
    ("text", "length", "digest"),
    [(emu3.POSITIVE_PROMPT, 41, "d5774816c5e7d095"), (emu3.NEGATIVE_PROMPT, 197, "8b8cd77fb8e3019e")],
)
def test_texts_of_the_released_program(text: str, length: int, digest: str) -> None:
    assert len(text) == length
    assert hashlib.sha256(text.encode()).hexdigest().startswith(digest)


def test_special_tokens_are_ids_and_text_is_text(text_tokenizer: TextTokenizer) -> None:
    mark = [text_tokenizer.special_id(name) for name in MARKS]
    plain = text_tokenizer.ids(["x"]), text_tokenizer.ids([": a cat\n\n<|Assistant|>:"])
    assert text_tokenizer.ids(janus.prompt_pieces("a cat")) == [mark[0], *plain[1], mark[1]]
    assert text_tokenizer.ids(emu3.prompt_pieces("x", (90, 68))) == [
        mark[2], *plain[0], mark[3], *text_tokenizer.ids(["90*68"]), mark[4]
    ]  # fmt: skip
    merged = text_tokenizer.ids([" a"])
    assert len(merged) == 1  # the blank before a caption belongs to its first word
    assert plain[1][1] == merged[0]


@pytest.mark.parametrize("name", MARKS)
def test_the_name_of_a_special_token_in_a_caption_is_text(text_tokenizer: TextTokenizer, name: str) -> None:
    special = text_tokenizer.special_id(name)
    for pieces in (janus.prompt_pieces(f"a {name} b"), emu3.prompt_pieces(f"a {name} b", (4, 4))):
        ids = text_tokenizer.ids(pieces)
        assert ids.count(special) == sum(isinstance(piece, Special) and piece.name == name for piece in pieces)
    assert len(text_tokenizer.ids([name])) == len(name)


def test_emu3_reads_text_in_form_nfc(text_tokenizer: TextTokenizer) -> None:
    decomposed = unicodedata.normalize("NFD", "café")
    assert text_tokenizer.ids([decomposed]) != text_tokenizer.ids(["café"])
    grid = (4, 4)
    assert emu3.prompt_ids(text_tokenizer, decomposed, grid) == emu3.prompt_ids(text_tokenizer, "café", grid)
    assert emu3.prompt_ids(text_tokenizer, "café", grid) == text_tokenizer.ids(emu3.prompt_pieces("café", grid))


def test_a_text_tokenizer_of_words_keeps_its_unknown_word(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 1, "<img>": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[UNK]", "<img>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert TextTokenizer(tmp_path / "tokenizer.json").ids(["cat <img>", Special("<img>")]) == [1, 0, 2]


def saved(folder: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_added_tokens_that_are_words_stay_words(text_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(text_tokenizer.path))
    tokenizer.add_tokens(["pikachu", "<tool>"])
    reader = TextTokenizer(saved(tmp_path, tokenizer))
    assert reader.ids(["pikachu"]) == [reader.find("pikachu")]
    assert reader.find("<tool>") not in reader.ids(["<tool>"])


@pytest.mark.parametrize("name", ["</s>", "<extra_id_0>"])
def test_pieces_of_a_list_keep_their_ids(tmp_path: Path, name: str) -> None:
    """The vocabulary of a T5 is a list of pieces with scores, the special ones among them."""
    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        "<extra_id_0>",
        "▁",
        "a",
        "/",
        "s",
        "<",
        ">",
        "_",
        "i",
        "d",
        "e",
        "x",
        "t",
        "r",
        "0",
    ]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    plain = tokenizer.encode("a ext a").ids
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    reader = TextTokenizer(saved(tmp_path, tokenizer))
    assert reader.ids(["a ext a"]) == plain
    assert reader.special_id(name) == pieces.index(name)
    assert reader.special_id(name) not in reader.ids([f"a {name} a"])
    assert 2 not in reader.ids([f"a {name} a"])


def test_special_tokens_of_a_template_are_meant_and_those_of_the_text_are_not(text_tokenizer: TextTokenizer) -> None:
    user, image = MARKS[0], MARKS[3]
    pieces = text_tokenizer.pieces(f"{user} draw {{prompt}}, {{{{{image}", {"prompt": f"a {user}{{b}}"})
    assert text_of(pieces) == f"{user} draw a {user}{{b}}, {{{image}"
    assert [piece.name for piece in pieces if isinstance(piece, Special)] == [user, image]


def test_text_tokenizers_that_do_not_fit(text_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no token <nothing>"):
        text_tokenizer.ids(["x", Special("<nothing>")])
    with pytest.raises(CheckpointError, match="does not exist"):
        TextTokenizer(tmp_path / "none.json")
    for content in ("{", "[]", "{}"):
        (tmp_path / "damaged.json").write_text(content)
        with pytest.raises(CheckpointError, match="damaged"):
            TextTokenizer(tmp_path / "damaged.json")


class TestCaptions:
    """Cleaned captions; they need ftfy and Beautiful Soup."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("ftfy")
        pytest.importorskip("bs4")

    @pytest.mark.parametrize(
        "pair", read("llamagen-t2i/golden-text-cleaning-a.json")["pairs"], ids=lambda pair: pair["input"][:12]
    )
    def test_captions_of_llamagen(self, pair: dict[str, str]) -> None:
        assert clean_caption(pair["input"], passes=1) == pair["once"]
        assert clean_caption(pair["input"]) == pair["output"]

    @pytest.mark.parametrize(
        ("caption", "cleaned"),
        [
            ("a.italy and end.network", "and"),
            ("mail x@y.com now", "mail x now"),
            ("a 2.5×3 frame of epsom salt", "a frame of om salt"),
            ("a <![b c", "a <! b c"),
            ("one-two-three four_five", "one-two-three four_five"),
            ("one-two-three-four_five", "one two three four five"),
        ],
    )
    def test_oddities_are_kept(self, caption: str, cleaned: str) -> None:
        assert clean_caption(caption) == cleaned

    @pytest.mark.parametrize(("caption", "message"), [("x" * 10_001, "at most 10000"), ("\ud800", "valid Unicode")])
    def test_captions_that_are_refused(self, caption: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            clean_caption(caption)


def test_what_cleaning_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    with pytest.raises(UserError, match=r"needs ftfy: pip install '\.\[llamagen-t2i\]'"):
        clean_caption("a cat")


# ---- the vocabulary of Emu3 in the format of tiktoken


def write_vocabulary(folder: Path, merges: list[bytes]) -> tuple[Path, Path]:
    """Bytes, in an order of their own, then `merges`; and a file of special tokens."""
    tokens = [bytes([255 - letter]) for letter in range(256)] + merges
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "emu3.tiktoken").write_text("".join(lines))
    visual = [f"<|visual token {i:06d}|>" for i in range(4)]
    (folder / "emu3_vision_tokens.txt").write_text("\n".join([*MARKS[4:], MARKS[3], "<|image end|>", *visual, ""]))
    return folder / "emu3.tiktoken", folder / "emu3_vision_tokens.txt"


def merged(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Byte pairs by definition: the pair of the lowest rank, the first of those, again and again."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [(ranks[one + two], i) for i, (one, two) in enumerate(pairwise(parts)) if one + two in ranks]
        if not pairs:
            return parts
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_byte_pairs_of_emu3(tmp_path: Path) -> None:
    numbers = random.Random(0)
    merges: list[bytes] = []
    known = [letter.encode() for letter in "abé "]
    while len(merges) < 60:
        token = numbers.choice(known) + numbers.choice(known)
        if token not in known and len(token) < 8:
            merges.append(token)
            known.append(token)
    path, special = write_vocabulary(tmp_path, merges)
    tokenizer = emu3.EmuTokenizer(path, special)
    ranks = {token: 256 + i for i, token in enumerate(merges)} | {bytes([255 - i]): i for i in range(256)}
    for _ in range(300):
        word = "".join(numbers.choices("abé", k=numbers.randint(1, 14)))
        expected = [word.encode()] if word.encode() in ranks else merged(word.encode(), ranks)
        assert tokenizer.ids([word]) == [ranks[part] for part in expected]
    assert len(tokenizer.ids(["a" * 20_000])) > 1  # a word of any length, in a moment


def test_words_and_special_tokens_of_emu3(tmp_path: Path) -> None:
    tokenizer = emu3.EmuTokenizer(*write_vocabulary(tmp_path, [b"90", b" a", b"a "]))
    bos = 259 + 3 + 203
    assert [tokenizer.special_id(name) for name in (MARKS[2], MARKS[4], MARKS[3])] == [bos, 259 + 208, 259 + 209]
    digits = [255 - ord(digit) for digit in "90"]
    assert tokenizer.ids(["90"]) == digits  # digits are words of their own
    assert tokenizer.ids(["x a"]) == [255 - ord("x"), 257]
    ids = tokenizer.ids(emu3.prompt_pieces(f"a {MARKS[4]}", (90, 90)))
    assert ids[0] == bos
    assert ids.count(259 + 208) == 1
    published = emu3.Emu3Prompts.published_config({"tokenizer": tokenizer.path, "special_tokens": special_of(tmp_path)})
    assert published["special_ids"]["visual0"] == 259 + 211
    assert emu3.Emu3Prompts.published_config({"tokenizer": tokenizer.path}) == {}


def special_of(folder: Path) -> Path:
    return folder / "emu3_vision_tokens.txt"


@pytest.mark.parametrize("content", ["", "YQ== 0\n", "no base 64!! 1\n", "YQ==\n", "YQ== 0\nYQ== 1\n"])
def test_vocabularies_that_are_damaged(tmp_path: Path, content: str) -> None:
    path, special = write_vocabulary(tmp_path, [])
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"emu3\.tiktoken is damaged"):
        emu3.EmuTokenizer(path, special)
    special.unlink()
    with pytest.raises(CheckpointError, match=r"emu3_vision_tokens\.txt cannot be read"):
        emu3.EmuTokenizer(write_vocabulary(tmp_path, [])[0], tmp_path / "gone" / special.name)
