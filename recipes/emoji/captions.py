"""What is written about a picture: name, keywords, colour and style, in the ways in which people would ask for it."""

from __future__ import annotations

import random
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from recipes.emoji.colours import COLOURS
from recipes.emoji.data import Picture, bare
from recipes.emoji.sources import STYLES

TEXT_TOKENS = 1536
OPENINGS = ("a", "the", "an emoji of a", "a picture of a")
WITHOUT_STYLE = 0.1


def caption(picture: Picture, numbers: random.Random) -> str:
    """Return one of many captions; of a recoloured picture it always says the colour."""
    words = picture.name.split()
    chosen = numbers.random()
    if chosen < 0.06 and picture.keywords:
        words = numbers.choice(picture.keywords).split()
    elif chosen < 0.10 and picture.keywords:
        words += numbers.choice(picture.keywords).split()
    elif chosen < 0.16 and len(words) > 1:
        words = [word for word in words if numbers.random() < 0.75] or [numbers.choice(words)]
    if picture.recoloured or (picture.colour and picture.colour not in words and numbers.random() < 0.25):
        words = [picture.colour, *bare(" ".join(words)).split()]
    if numbers.random() < 0.15:
        words = [*numbers.choice(OPENINGS).split(), *words]
    text = " ".join(words)
    return text if numbers.random() < WITHOUT_STYLE else f"{text}, {picture.style} style"


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
    drawn = {picture.name: picture.keywords for picture in pictures}
    lines = [*drawn] * 4 + [" ".join(keywords) for keywords in drawn.values()]
    lines += ["moved", *COLOURS, *OPENINGS, *(f"{style.word} style" for style in STYLES)] * 20
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=1, special_tokens=["<unknown>"], show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer
