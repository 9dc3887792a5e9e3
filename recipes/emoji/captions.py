"""What is written about a picture: its name and keywords, in the many ways in which people would ask for it."""

from __future__ import annotations

import random
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from recipes.emoji.data import COLOURS, Picture

TEXT_TOKENS = 4096
OPENINGS = ("a", "a", "the", "an emoji of", "an emoji of a", "a picture of a")


def caption(picture: Picture, numbers: random.Random) -> str:
    """Return one of many captions; of a recoloured picture it always says the colour."""
    if picture.recoloured:
        colour, name = picture.name.split(" ", 1)
    else:
        colour, name = picture.colour, picture.name
    words = name.split()
    chosen = numbers.random()
    if chosen < 0.08 and picture.keywords:
        words = numbers.choice(picture.keywords).split()
    elif chosen < 0.16 and picture.keywords:
        words += numbers.choice(picture.keywords).split()
    elif chosen < 0.26 and len(words) > 1:
        words = [word for word in words if numbers.random() < 0.75] or [numbers.choice(words)]
    elif chosen < 0.34:
        numbers.shuffle(words)
    elif words[0] == "flag" and chosen < 0.75:
        words = ["flag", "of", *words[1:]] if chosen < 0.55 else [*words[1:], "flag"]
    if picture.recoloured or (colour and colour not in words and numbers.random() < 0.25):
        # The colour stands in front, seldom behind.
        words = [*words, colour] if numbers.random() < 0.15 else [colour, *(w for w in words if w not in COLOURS)]
    if numbers.random() < 0.2:
        words = [*numbers.choice(OPENINGS).split(), *words]
    return " ".join(words)


def pair_caption(first: str, second: str, *, wide: bool) -> str:
    """Return the caption of two pictures beside each other, or one above the other."""
    return f"{first} {'and' if wide else 'above'} {second}"


def text_tokenizer(pictures: Iterable[Picture], size: int = TEXT_TOKENS) -> Tokenizer:
    """Return a byte-pair tokenizer for captions. Case, accents and punctuation make no difference."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("[’']"), ""),
            normalizers.Replace(Regex("[^a-z0-9]+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    lines = [" ".join((picture.name, *picture.keywords)) for picture in pictures if not picture.recoloured]
    lines += [picture.name for picture in pictures]
    lines += [*COLOURS, *OPENINGS, pair_caption("", "", wide=True), pair_caption("", "", wide=False)] * 10
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=1, special_tokens=["<unknown>"], show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer
