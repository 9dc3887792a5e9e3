"""Weights that are laid out: state dicts and copies hold them all the same, and nothing changes them meanwhile."""

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

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


@pytest.fixture(params=[name for name, product in PRODUCTS.items() if product.serves_any_rows])
def net(request: pytest.FixtureRequest) -> Iterator[Net]:
    module = Net().requires_grad_(False)
    if not PRODUCTS[request.param].can_serve(module.layer.weight):
        pytest.skip("it does not run here")
    with use_product(request.param):
        yield module


def test_state_dicts_and_copies_are_whole(net: Net) -> None:
    wanted, x, count = net.state_dict(), torch.arange(4), parameter_count(net)
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
