"""A position that all rows share, and one by row with the same slots, mean the same."""

import pytest
import torch
from torch import Tensor

from softcfg.nn import Position

ROWS, SLOTS = 3, 8
PADDING = torch.tensor([0, 2, 5])
CASES = [(1, 1), (3, 1), (2, 4), (4, 3), (5, 3)]  # first slot, slots of the pass


def both(slot: int) -> tuple[Position, Position]:
    return Position.shared(slot), Position.by_row(torch.full((ROWS,), slot))


def entries(position: Position, new: int, padding: Tensor | None) -> list[list[int]]:
    """The entries of a table that the pass takes, row by row."""
    taken = torch.arange(100)[position.index(new, padding)]
    return taken.expand(ROWS, new).tolist()


@pytest.mark.parametrize(("slot", "new"), CASES)
def test_index(slot: int, new: int) -> None:
    for position in both(slot):
        assert entries(position, new, None) == [list(range(slot, slot + new))] * ROWS
        after = [[max(0, at - skipped) for at in range(slot, slot + new)] for skipped in PADDING.tolist()]
        assert entries(position, new, PADDING) == after
        assert entries(position.shifted(2), new, None) == [list(range(slot + 2, slot + 2 + new))] * ROWS


@pytest.mark.parametrize(("slot", "new"), CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_each_query_sees_what_is_not_padding_up_to_itself(slot: int, new: int, padded: bool) -> None:
    padding = PADDING if padded else torch.zeros_like(PADDING)
    wanted = [
        [[first <= at <= query for at in range(SLOTS)] for query in range(slot, slot + new)]
        for first in padding.tolist()
    ]
    shared, by_row = both(slot)
    mask = by_row.mask(new, by_row.covered(new, SLOTS), padding if padded else None)
    assert mask is not None
    assert mask.tolist() == wanted

    slots = shared.covered(new, SLOTS)
    mask = shared.mask(new, slots, padding if padded else None)
    assert (mask is None) is not padded
    causal = torch.ones(new, slots, dtype=torch.bool).tril(slots - new)
    seen = causal.expand(ROWS, -1, -1) if mask is None else causal & mask[:, None]
    assert seen.tolist() == [[query[:slots] for query in row] for row in wanted]


@pytest.mark.parametrize(("slot", "new"), CASES)
def test_write(slot: int, new: int) -> None:
    vectors = torch.rand(ROWS, 2, new, 4)
    for position in both(slot):
        contents = torch.zeros(ROWS, 2, SLOTS, 4)
        position.write(contents, vectors)
        assert torch.equal(contents[:, :, slot : slot + new], vectors)
        assert contents.count_nonzero() == vectors.count_nonzero()
    contents = torch.zeros(ROWS, 2, SLOTS, 4)
    Position.by_row(torch.tensor([0, 1, 3])).write(contents, vectors)
    for row, first in enumerate((0, 1, 3)):
        assert torch.equal(contents[row, :, first : first + new], vectors[row])


def test_where_the_condition_is_part_of_the_pass() -> None:
    assert Position.start().is_start
    assert Position.of(0).is_start
    assert not Position.shared(4).is_start
    assert not Position.by_row(torch.zeros(ROWS, dtype=torch.int64)).is_start
    # The last of five slots of the condition predicts the first image token, and every later input predicts one.
    assert [Position.shared(slot).first_predicting(5) for slot in (0, 1, 4, 5, 6)] == [4, 3, 0, 0, 0]
    assert Position.by_row(torch.tensor([5, 9])).first_predicting(5) == 0


def test_repeated() -> None:
    shared, by_row = Position.shared(3), Position.by_row(torch.tensor([3, 5]))
    assert entries(shared.repeated(2), 1, None) == entries(shared, 1, None)
    repeated = by_row.repeated(2)
    assert repeated.row_slots is not None
    assert repeated.row_slots.tolist() == [3, 5, 3, 5]


def test_a_later_pass_needs_a_cache() -> None:
    assert Position.start().covered(4, None) == 4
    for position in both(2):
        with pytest.raises(ValueError, match="needs the cache"):
            position.covered(1, None)


def test_a_number_is_a_position() -> None:
    assert Position.of(3) == Position.shared(3)
    by_row = Position.by_row(torch.tensor([1]))
    assert Position.of(by_row) is by_row
    with pytest.raises(TypeError, match=r"Position\.by_row"):
        Position.of(torch.tensor([1]))  # type: ignore[arg-type]
