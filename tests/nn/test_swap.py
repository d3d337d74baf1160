"""Block swapping: bit-equal results, where tensors are, and how many blocks are on the device at once."""

import numpy as np
import paddle
import pytest

from ppcoat.errors import ConfigError
from ppcoat.lora import DoRALinear, LoKrSettings, adapter_layers
from ppcoat.nn.convert import quantize_linears
from ppcoat.nn.swap import last_blocks, swap_blocks


class Scrambled:
    """A host on which every number is another one: whoever computes with what lies there is wrong.

    begun: blocks sent to the device. most: the largest number of blocks there at once, the one that is sent
    among them; swapper: whose blocks they are.
    """

    def __init__(self):
        self.waited, self.begun, self.most, self.swapper = [], 0, 0, None

    def to_host(self, x):
        return 255 - x if x.dtype == paddle.uint8 else -x

    def start(self, hosts):
        self.begun += 1
        self.most = max(self.most, 1 + len(self.swapper.resident))
        return [self.to_host(host) for host in hosts], self.begun

    def wait(self, ticket):
        self.waited.append(ticket)


def build(flux, build_flux, quantised=False):
    model = build_flux(2, 3, 2, 32, channels=16, text=24, pooled=12, guidance=True)
    if quantised:
        quantize_linears(model)
    return flux.with_loras(model)


def swapped(model, count):
    transport = Scrambled()
    transport.swapper = swap_blocks(list(last_blocks(model, count).values()), transport)
    return transport.swapper, transport


def assert_same(got, wanted):
    assert got[0] == wanted[0] and got[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        np.testing.assert_array_equal(got[1][name], gradient, err_msg=name)


@pytest.mark.parametrize(
    ("count", "policy", "checkpointed"),
    [(1, "none", 0), (5, "none", 0), (2, "coat+recompute", 0), (5, "coat+recompute", 0), (1, "coat", 3),
     (4, "coat", 3)],
)  # fmt: skip
def test_results_are_bit_equal_with_two_blocks_at_most(flux, build_flux, count, policy, checkpointed):
    model = build(flux, build_flux)
    batch = flux.arguments(model)
    settings = policy, checkpointed
    wanted = flux.gradients(model, batch, *settings, fp8_checkpoints=True)
    _, transport = swapped(model, count)
    for _ in range(2):  # the second step begins where the first one's backward ended
        assert_same(flux.gradients(model, batch, *settings, fp8_checkpoints=True), wanted)
    assert transport.most == min(count, 2)
    assert len(transport.waited) == len(set(transport.waited))


@pytest.mark.parametrize("settings", [{}, {"layer": DoRALinear}, {"lokr": LoKrSettings(2, 3.0)}])
def test_adapters_never_move_not_even_those_that_are_drawn_with(flux, build_flux, settings):
    model = flux.with_loras(build_flux(1, 2), **settings)
    factors = [getattr(layer, name) for layer in adapter_layers(model).values() for name in layer.factors]
    for factor in factors:
        factor.stop_gradient = True
    before = [factor.numpy() for factor in factors]
    swapped(model, 3)
    for factor, value in zip(factors, before, strict=True):
        np.testing.assert_array_equal(factor.numpy(), value)


@pytest.mark.parametrize("policy", ["none", "coat+recompute"])
def test_it_works_on_the_fp8_base(flux, build_flux, policy):
    model = build(flux, build_flux, quantised=True)
    batch = flux.arguments(model)
    wanted = flux.gradients(model, batch, policy, 1)
    _, transport = swapped(model, 4)
    assert_same(flux.gradients(model, batch, policy, 1), wanted)
    assert transport.most == 2


@pytest.mark.parametrize("policy", [None, "coat"])
def test_it_works_where_all_blocks_are_checkpointed(flux, build_flux, policy):
    model = build(flux, build_flux)
    batch = flux.arguments(model)
    wanted = flux.gradients(model, batch, policy, 5)
    _, transport = swapped(model, 5)
    assert_same(flux.gradients(model, batch, policy, 5), wanted)
    assert transport.most == 2
    assert transport.begun <= 2 * 5 + 2  # the blocks run again in backward cost no journeys of their own


def test_pictures_can_be_drawn_between_steps(flux, build_flux):
    model = build(flux, build_flux)
    batch = flux.arguments(model)
    wanted = flux.gradients(model, batch)
    with paddle.no_grad():
        picture = model(**batch)[0].numpy()
    swapped(model, 3)
    for _ in range(2):
        with paddle.no_grad():
            np.testing.assert_array_equal(model(**batch)[0].numpy(), picture)
        assert_same(flux.gradients(model, batch), wanted)


def test_only_frozen_tensors_of_these_blocks_move_and_come_back(flux, build_flux):
    model = build(flux, build_flux)
    before = {name: value.numpy() for name, value in model.state_dict().items()}
    paths = list(last_blocks(model, 2))
    assert paths == ["single_transformer_blocks.1", "single_transformer_blocks.2"]
    swapper, transport = swapped(model, 2)
    for name, value in model.state_dict().items():
        away = name.startswith(tuple(paths)) and "lora_" not in name
        same = np.array_equal(value.numpy(), before[name])
        assert same == (not away or not before[name].any()), name
    swapper.remove()
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name], err_msg=name)
    flux.gradients(model, flux.arguments(model))
    assert transport.begun == 2  # no hook is left


def test_the_next_block_travels_while_one_computes(flux, build_flux):
    model = build(flux, build_flux)
    swapper, transport = swapped(model, 4)
    seen = []
    for block in last_blocks(model, 4).values():
        block.register_forward_pre_hook(lambda *_: seen.append(transport.begun - len(transport.waited)))
    model(**flux.arguments(model))
    assert seen == [1, 1, 1, 0]  # begun and not yet waited for
    assert swapper.resident == [2, 3]


@pytest.mark.parametrize("count", [6, -1, True])
def test_a_wrong_count_is_named(flux, build_flux, count):
    with pytest.raises(ConfigError, match=f"came {count}, but this model has 5 blocks"):
        last_blocks(build(flux, build_flux), count)


def test_on_a_cpu_nothing_is_copied(flux, build_flux):
    model = build(flux, build_flux)
    batch = flux.arguments(model)
    wanted = flux.gradients(model, batch)
    weight = model.single_transformer_blocks[2].proj_out.weight
    address = weight.data_ptr()
    swap_blocks(list(last_blocks(model, 5).values()))
    assert_same(flux.gradients(model, batch), wanted)
    assert weight.data_ptr() == address
