"""The text tokenizer of Emu3 as its authors publish it: byte pairs in the format of tiktoken.

Pattern, special tokens and their order are those of `tokenization_emu3.py` of https://github.com/baaivision/Emu3.
"""

from __future__ import annotations

import base64
import binascii
import heapq
from pathlib import Path

from softcfg.errors import CheckpointError
from softcfg.files import read_text
from softcfg.models.text import TextTokenizer
from softcfg.text_tokenizers import LARGEST, check_text

# Words that are encoded one by one.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FIRST_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


class EmuTokenizer(TextTokenizer):
    """The text tokenizer of Emu3, from its two files; special tokens have the ids after those of the vocabulary.

    Args:
        path: `emu3.tiktoken`, a token in base 64 and its rank per line. Ranks are ids, and lower ones merge first.
        special: `emu3_vision_tokens.txt`, a special token per line, after `FIRST_SPECIAL`.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, path: str | Path, special: str | Path) -> None:
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import Split

        self.path = Path(path)
        self._ranks = _read_ranks(self.path)
        names = (*FIRST_SPECIAL, *filter(None, map(str.strip, _read(Path(special)).splitlines())))
        self._added = {name: len(self._ranks) + i for i, name in enumerate(names)}
        self._vocab = {}
        self._words = Split(Regex(PATTERN), "isolated")

    def _text_ids(self, text: str) -> list[int]:
        check_text(text)
        return [token for word, _ in self._words.pre_tokenize_str(text) for token in self._merge(word.encode())]

    def _merge(self, word: bytes) -> list[int]:
        """Merge neighbours that are a token, the pair of the lowest rank first (the first of those), until none are."""
        if (whole := self._ranks.get(word)) is not None:
            return [whole]
        ends = [*range(1, len(word) + 1)]  # part i is word[i : ends[i]]; 0 where it went into another
        before = [*range(-1, len(word) - 1)]
        pairs: list[tuple[int, int, int]] = []

        def offer(left: int) -> None:
            right = ends[left]
            if right < len(word) and (rank := self._ranks.get(word[left : ends[right]])) is not None:
                heapq.heappush(pairs, (rank, left, ends[right]))

        for left in range(len(word)):
            offer(left)
        while pairs:
            _, left, end = heapq.heappop(pairs)
            right = ends[left]
            if not right or right >= len(word) or ends[right] != end:
                continue  # one of the two has been merged since
            ends[left], ends[right] = end, 0
            if end < len(word):
                before[end] = left
                offer(left)
            if left:
                offer(before[left])
        return [self._ranks[word[left:end]] for left, end in enumerate(ends) if end]


def _read(path: Path) -> str:
    try:
        return read_text(path, LARGEST)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in _read(path).splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise CheckpointError(f"{path} is damaged or no vocabulary of tiktoken; get it again") from error
    letters = {bytes([letter]) for letter in range(256)}
    if not letters <= ranks.keys() or sorted(ranks.values()) != [*range(len(lines))]:
        raise CheckpointError(f"{path} is damaged: its tokens lack a byte, or their ranks a number; get it again")
    return ranks
