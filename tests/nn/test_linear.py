import warnings

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
            assert (layer.packed is not None) == PACKS
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


def test_layers_for_which_there_is_no_memory_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = torch.nn.Sequential(*(Linear(16, 16) for _ in range(3))).requires_grad_(False)
    x, prepare, done = torch.randn(4, 16), Linear.prepare, []

    def prepared(layer: Linear, rows: int) -> None:
        if rows and done:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1024 bytes")
        done.append(layer)
        prepare(layer, rows)

    expected = layers(x)
    monkeypatch.setattr(Linear, "prepare", prepared)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with prepared_linear_layers(layers, 4):
            torch.testing.assert_close(layers(x), expected)
    assert [str(warning.message) for warning in caught] == [
        "there is no memory for a second layout of the weights, so their products are slower"
    ]
    monkeypatch.setattr(Linear, "prepare", lambda layer, rows: 1 / rows)
    with pytest.raises(ZeroDivisionError), prepared_linear_layers(layers, 0):
        pass
