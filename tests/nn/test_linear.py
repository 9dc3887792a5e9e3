"""Weights that are laid out: state dicts and copies hold them all the same, and nothing changes them meanwhile."""

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from softcfg import UserError
from softcfg.nn.linear import Linear, Preparable, parameter_count, prepared_linear_layers, weights_at_rest
from softcfg.nn.products import PRODUCTS, use_product

IN_USE = "the weights of the model are in use, as it draws at the moment"


class Net(Preparable):
    """A table before a layer, so that what stops at the layer has changed the table already."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 32)
        self.layer = Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.table(x))


def pickled(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def name_of(net: Net) -> str:
    """The product that its layer is prepared with."""
    with prepared_linear_layers(net, 4):
        assert net.layer.product is not None
        return net.layer.product.name


@pytest.fixture(params=[name for name, product in PRODUCTS.items() if product.serves_any_rows])
def net(request: pytest.FixtureRequest) -> Iterator[Net]:
    module = Net().requires_grad_(False)
    if not PRODUCTS[request.param].can_serve(module.layer.weight):
        pytest.skip("it does not run here")
    with use_product(request.param):
        yield module


def test_state_dicts_and_copies_are_whole(net: Net) -> None:
    wanted, x, count = copy.deepcopy(net.state_dict()), torch.arange(4), parameter_count(net)
    expected = net(x)
    with prepared_linear_layers(net, 4), torch.inference_mode():
        assert not net.layer.weight.numel()
        assert parameter_count(net) == count
        found = net.state_dict()
        copies = [copy.deepcopy(net), pickled(net), copy.copy(net.layer)]
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    for each in copies[:2]:
        assert torch.equal(each(x), expected)
        assert vars(each).keys() == vars(net).keys()
    for layer in (copies[0].layer, copies[1].layer, copies[2]):
        assert not layer.is_prepared
        assert torch.equal(layer.weight, wanted["layer.weight"])
        assert not layer.weight.requires_grad
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("part", [lambda net: net, lambda net: net.layer], ids=["whole", "layer"])
@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.load_state_dict({name: torch.zeros_like(t) for name, t in module.state_dict().items()}),
        lambda module: module.bfloat16(),
        lambda module: module.to(torch.float64),
    ],
    ids=["load", "bfloat16", "to"],
)
def test_nothing_changes_them(
    net: Net, part: Callable[[Net], nn.Module], change: Callable[[nn.Module], object]
) -> None:
    wanted = net.state_dict()
    with prepared_linear_layers(net, 4), pytest.raises(UserError, match=IN_USE):
        change(part(net))
    for name, tensor in net.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, wanted[name])
    change(part(net))  # at rest it is done


def test_who_is_last_lets_go(net: Net) -> None:
    outer, inner = prepared_linear_layers(net, 4), prepared_linear_layers(net, 4)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    with pytest.raises(UserError, match=IN_USE), weights_at_rest(net):
        pass
    inner.__exit__(None, None, None)
    with weights_at_rest(net):
        pass


def test_all_who_draw_at_once_have_what_the_first_prepared(net: Net) -> None:
    """Whoever comes or goes meanwhile."""
    x = torch.arange(4)
    wanted = net(x)
    contexts = [prepared_linear_layers(net, rows) for rows in (4, 7, 5)]
    contexts[0].__enter__()
    laid_out = net.layer.laid_out
    contexts[1].__enter__()
    contexts[0].__exit__(None, None, None)
    contexts[2].__enter__()
    with torch.inference_mode():
        assert net.layer.laid_out is laid_out
        torch.testing.assert_close(net(x), wanted)
        contexts[1].__exit__(None, None, None)
        torch.testing.assert_close(net(x), wanted)
    contexts[2].__exit__(None, None, None)
    assert not net.layer.is_prepared
    assert torch.equal(net(x), wanted)


def test_who_has_the_same_memory_keeps_it(net: Net) -> None:
    weight, state = net.layer.weight.data, net.state_dict()
    with prepared_linear_layers(net, 4), torch.inference_mode():
        net(torch.arange(4))
    weight.zero_()
    assert not net.layer.weight.any()
    assert not state["layer.weight"].any()


def test_layers_of_two_modules_may_have_one_weight(net: Net) -> None:
    other, x = Net().requires_grad_(False), torch.arange(4)
    other.layer.weight = net.layer.weight
    wanted = net(x), other(x)
    with prepared_linear_layers(net, 4), prepared_linear_layers(other, 4), torch.inference_mode():
        for module, expected in zip((net, other), wanted, strict=True):
            torch.testing.assert_close(module(x), expected)
    assert other.layer.weight is net.layer.weight
    assert torch.equal(net(x), wanted[0])


def test_ctrl_c_while_weights_are_put_back(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.ModuleList([copy.deepcopy(net) for _ in range(4)])
    wanted, product = copy.deepcopy(layers.state_dict()), type(PRODUCTS[name_of(net)])
    restore, calls = product.restore, []

    def interrupted(self: object, laid_out: Tensor) -> Tensor:
        calls.append(laid_out)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return restore(self, laid_out)  # type: ignore[arg-type]

    monkeypatch.setattr(product, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt), prepared_linear_layers(layers, 4):
        pass
    assert not any(each.layer.is_prepared for each in layers)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in layers.state_dict().items())
    layers.double()


@pytest.mark.parametrize("bias", [lambda b: torch.stack((b, b), 1)[:, 0], lambda b: torch.full((1,), 0.3).expand(48)])
def test_a_bias_of_any_strides(net: Net, bias: Callable[[Tensor], Tensor]) -> None:
    net.layer.bias = nn.Parameter(bias(net.layer.bias.data), requires_grad=False)
    x = torch.arange(4)
    wanted = net(x)
    with prepared_linear_layers(net, 4), torch.inference_mode():
        torch.testing.assert_close(net(x), wanted)


def test_a_bias_of_another_dtype_is_left_to_pytorch(net: Net) -> None:
    net.layer.bias.data = net.layer.bias.data.double()
    with prepared_linear_layers(net, 4), torch.inference_mode(), pytest.raises(RuntimeError, match="dtype"):
        net(torch.arange(4))


MADE: dict[str, Callable[[nn.Module], object]] = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrized": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("how", MADE)
def test_weights_that_are_made_at_each_call_are_those_of_now(net: Net, how: str) -> None:
    MADE[how](net.eval().layer)
    x = torch.arange(4)
    before = net(x)
    for parameter in net.layer.parameters():
        parameter.data += torch.rand_like(parameter)
    with prepared_linear_layers(net, 4), torch.inference_mode():
        found = net(x)
    torch.testing.assert_close(found, net(x))
    assert not torch.allclose(found, before)
