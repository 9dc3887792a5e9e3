"""Where tokens stand: prefixes, ends of rows, what is given."""

import numpy as np
import pytest
import torch

from softcfg import UserError
from softcfg.models.base import ClassCondition
from softcfg.models.geometry import Geometry


def test_codes_in_front_have_no_place() -> None:
    geometry = ClassCondition(torch.tensor([0]), slots=1, num_tokens=273).geometry
    assert geometry == Geometry(16, 16, front=17)
    assert (geometry.num_tokens, geometry.num_codes, geometry.has_structure) == (273, 273, False)
    assert [geometry.place(token) for token in (16, 17, 272, 273)] == [None, (0, 0), (15, 15), None]
    assert np.array_equal(geometry.on_grid(np.arange(273)), np.arange(17, 273).reshape(16, 16))
    assert geometry.is_code(torch.arange(273)).all()


def test_structure_is_no_code_and_has_no_place() -> None:
    # Two rows of three codes, each with an end, then two tokens that end the image.
    geometry = Geometry(2, 3, row_end=1, tail=2)
    assert (geometry.num_tokens, geometry.num_codes, geometry.grid, geometry.stride) == (10, 6, (2, 3), 4)
    places = [(0, 0), (0, 1), (0, 2), None, (1, 0), (1, 1), (1, 2), None, None, None]
    assert [geometry.place(token) for token in range(10)] == places
    assert geometry.is_code(torch.arange(10)).tolist() == [place is not None for place in places]
    assert geometry.on_grid(torch.arange(20).view(2, 10)).tolist()[1] == [[10, 11, 12], [14, 15, 16]]
    codes = geometry.codes_only()
    assert (codes.num_tokens, codes.has_structure) == (6, False)


def test_given_rows_are_not_drawn() -> None:
    geometry = Geometry(4, 2, row_end=1, tail=1, given_rows=3)
    assert (geometry.num_tokens, geometry.num_codes, geometry.grid) == (4, 2, (4, 2))
    assert [geometry.place(token) for token in range(4)] == [(3, 0), (3, 1), None, None]
    assert geometry.on_grid(np.arange(4)).tolist() == [[0, 1]]


@pytest.mark.parametrize(("tokens", "front", "side"), [(256, 0, 16), (273, 17, 16), (3, 2, 1), (1, 0, 1)])
def test_squares(tokens: int, front: int, side: int) -> None:
    assert Geometry.square(tokens) == Geometry(side, side, front=front)
    assert Geometry.square(tokens).num_tokens == tokens


def test_images() -> None:
    assert Geometry.of_image(24, 16, 8, row_end=1) == Geometry(2, 3, row_end=1)
    for size in ((20, 16), (16, 0)):
        with pytest.raises(UserError, match="must be a multiple of 8"):
            Geometry.of_image(*size, 8)
