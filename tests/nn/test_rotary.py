import math

import pytest
import torch

from softcfg.nn.rotary import Rotary, angles_1d, angles_2d, rotate


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 0.03)])
def test_pairs_turn_by_their_angles(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 8).to(dtype)
    angles = torch.rand(4, 4) * 6
    got = rotate(x, angles.cos(), angles.sin())
    assert got.dtype == dtype
    for n in range(4):
        for i in range(4):
            a, b = x[..., n, 2 * i].double(), x[..., n, 2 * i + 1].double()
            cos, sin = math.cos(angles[n, i]), math.sin(angles[n, i])
            torch.testing.assert_close(got[..., n, 2 * i].double(), a * cos - b * sin, rtol=0, atol=tolerance)
            torch.testing.assert_close(got[..., n, 2 * i + 1].double(), b * cos + a * sin, rtol=0, atol=tolerance)


@pytest.mark.parametrize("halves", [False, True])
def test_tables_of_a_generator_that_was_cast(halves: bool) -> None:
    """`generator.to(bfloat16)` casts the tables, too; the rotation is then that of the rounded tables, in float32."""
    x, angles = torch.randn(2, 3, 4, 8).bfloat16(), torch.rand(4, 4) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    got = Rotary(cos, sin, halves)(x)
    assert torch.equal(got, Rotary(cos.float(), sin.float(), halves)(x.float()).bfloat16())


@pytest.mark.parametrize("rows", [(), (2,)])
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
def test_without_a_gradient_the_bits_are_the_same(rows: tuple[int, ...], table: torch.dtype) -> None:
    x = torch.randn(2, 4, 3, 3, 8).permute(2, 0, 3, 1, 4)[1]  # as keys lie in a product
    angles = torch.rand(*rows, 4, 4) * 6
    cos, sin = angles.cos().to(table), angles.sin().to(table)
    wanted = rotate(x, cos, sin)
    with torch.inference_mode():
        assert torch.equal(Rotary(cos, sin)(x), wanted)


def test_a_zero_row_makes_zero_vectors() -> None:
    assert (rotate(torch.randn(1, 1, 1, 8), torch.zeros(1, 4), torch.zeros(1, 4)) == 0).all()


def test_angles() -> None:
    one = angles_1d(torch.tensor([0, 3]), 4, 10_000.0)
    assert one[0].tolist() == [0.0] * 4
    assert one[1].tolist() == pytest.approx([3 * 10_000 ** (-2 * i / 8) for i in range(4)])
    two = angles_2d(torch.tensor([5]), torch.tensor([7]), 4, 10_000.0)
    assert two[0].tolist() == pytest.approx([5, 5 * 10_000**-0.5, 7, 7 * 10_000**-0.5])
