import pytest
import torch

from softcfg.nn.linear import Linear, prepared_linear_layers

PACKS = torch.backends.mkl.is_available()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 8, 33])
def test_prepared_layers_compute_the_same(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    layer = Linear(48, 96, bias=bias).requires_grad_(False)
    exact = layer.weight.double()
    for shape in ((rows, 48), (rows, 1, 48), (rows + 1, 48)):
        x = torch.randn(shape)
        expected = x.double() @ exact.T + (layer.bias.double() if bias else 0)
        with prepared_linear_layers(layer, rows):
            got = layer(x)
            assert (layer.packed is not None) == (PACKS and rows >= 4)
        assert got.shape == expected.shape
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
    assert layer.packed is None


def test_weights_are_prepared_as_they_are_now() -> None:
    layer = Linear(16, 16, bias=False).requires_grad_(False)
    x = torch.randn(4, 16)
    for _ in range(2):
        layer.weight.normal_()
        with prepared_linear_layers(layer, 4):
            torch.testing.assert_close(layer(x), x @ layer.weight.T)


def test_memory_is_given_back_after_an_error() -> None:
    layer = Linear(16, 16)
    with pytest.raises(KeyError), prepared_linear_layers(layer, 4):
        raise KeyError
    assert layer.packed is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_as_they_are(dtype: torch.dtype) -> None:
    layer = Linear(16, 16, dtype=dtype).requires_grad_(False)
    x = torch.randn(4, 16, dtype=dtype)
    plain = layer(x)
    with prepared_linear_layers(layer, 4):
        assert torch.equal(layer(x), plain)
