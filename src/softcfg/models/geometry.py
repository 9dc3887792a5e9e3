"""Where the tokens of an image are: one description for drawing, figures and the web page."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from torch import Tensor

from softcfg.errors import UserError

PerToken = TypeVar("PerToken", Tensor, np.ndarray)


@dataclass(frozen=True)
class Geometry:
    """How the T tokens of an image, in decoding order, make up its grid of codes.

    The order is: `front` codes that belong to no place of the image, then for every row of the grid that is drawn its
    `columns` codes and `row_end` structure tokens, then `tail` structure tokens. Structure (ends of lines, the end of
    the image) is drawn but not decoded, and gets no confidence.

    Attributes:
        rows, columns: (h, w), the grid of the codes of the whole image.
        front: codes before the grid, such as the prefix of AliTok.
        row_end: structure tokens after each row.
        tail: structure tokens after the last row.
        given_rows: rows at the top that are given with the condition instead of being drawn.
    """

    rows: int
    columns: int
    front: int = 0
    row_end: int = 0
    tail: int = 0
    given_rows: int = 0

    @classmethod
    def square(cls, num_tokens: int) -> Geometry:
        """The largest square grid of the last of `num_tokens` codes: 256 tokens are 16 x 16, 273 are 17 and 16 x 16."""
        side = math.isqrt(num_tokens)
        return cls(side, side, front=num_tokens - side * side)

    @classmethod
    def of_image(cls, width: int, height: int, pixels_per_code: int, *, row_end: int = 0, tail: int = 0) -> Geometry:
        """The geometry of an image of `width` x `height` pixels in raster order.

        Raises:
            UserError: a side is not a multiple of `pixels_per_code`.
        """
        for name, side in (("width", width), ("height", height)):
            if side < 1 or side % pixels_per_code:
                raise UserError(f"{name} must be a multiple of {pixels_per_code}, got {side}")
        return cls(height // pixels_per_code, width // pixels_per_code, row_end=row_end, tail=tail)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the whole image, as the image tokenizer takes it."""
        return self.rows, self.columns

    @property
    def stride(self) -> int:
        """Tokens from the beginning of one row to the beginning of the next."""
        return self.columns + self.row_end

    @property
    def drawn_rows(self) -> int:
        """The rows that are drawn."""
        return self.rows - self.given_rows

    @property
    def num_tokens(self) -> int:
        """T, all tokens that are drawn."""
        return self.front + self.drawn_rows * self.stride + self.tail

    @property
    def num_codes(self) -> int:
        """How many of the T tokens are image codes."""
        return self.front + self.drawn_rows * self.columns

    @property
    def has_structure(self) -> bool:
        """Whether some of the tokens are structure rather than image codes."""
        return self.num_codes < self.num_tokens

    def is_code(self, steps: Tensor) -> Tensor:
        """Which tokens are image codes: int64 [...], the indices of tokens -> bool [...]."""
        after_front = steps - self.front
        in_rows = after_front < self.drawn_rows * self.stride
        return (after_front < 0) | (in_rows & (after_front % self.stride < self.columns))

    def place(self, token: int) -> tuple[int, int] | None:
        """Row and column of a token; None for one that has no place in the image."""
        row, column = divmod(token - self.front, self.stride)
        placed = 0 <= row < self.drawn_rows and column < self.columns
        return (row + self.given_rows, column) if placed else None

    def on_grid(self, per_token: PerToken) -> PerToken:
        """Arrange values per token [..., T] as the drawn rows of the grid, [..., rows, columns]."""
        placed = per_token[..., self.front : self.front + self.drawn_rows * self.stride]
        return placed.reshape(*placed.shape[:-1], self.drawn_rows, self.stride)[..., : self.columns]

    def codes_only(self) -> Geometry:
        """The geometry of the image codes without the structure."""
        return replace(self, row_end=0, tail=0)
