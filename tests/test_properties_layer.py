"""KronLinear against the naive formula, and its frozen mask under random training, over random shapes."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from properties import check_all, examples

from kron_hf import KronLinear
from kron_hf.factors import kron_weight

# float32 adds up to 36 products of 6 terms, each of about one.
TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-9}, torch.float32: {"rtol": 1e-4, "atol": 1e-4}}


@st.composite
def layers(draw, dtypes=(torch.float64, torch.float32)):
    """A layer of random sizes with random factors, some blocks of it zero."""
    out_blocks, in_blocks, block_out, block_in = (draw(st.integers(1, 6)) for _ in range(4))
    rank = draw(st.integers(1, min(6, block_out * block_in)))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layer = KronLinear(
        in_blocks * block_in,
        out_blocks * block_out,
        (block_out, block_in),
        rank,
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
        layer.s[torch.rand_like(layer.s) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0
    return layer


BATCHES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def gradients(output, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad((output * torch.randn_like(output)).sum(), inputs)


@examples(200, 1500)
def test_forward_and_gradients_are_those_of_the_naive_formula(examples):
    def check(case):
        layer, batch, frozen = case
        if frozen:
            layer.freeze_mask()
        x = torch.randn(*batch, layer.in_features, dtype=layer.s.dtype, requires_grad=True)
        inputs = [x, *layer.parameters()]
        mask = layer.s.detach() != 0 if frozen else torch.ones_like(layer.s)
        expected = F.linear(x, kron_weight(layer.s * mask, layer.a, layer.b), layer.bias)
        tolerance = TOLERANCE[layer.s.dtype]
        output = layer(x)
        torch.testing.assert_close(output, expected, **tolerance)
        torch.testing.assert_close(gradients(output, inputs), gradients(expected, inputs), **tolerance)

    check_all(check, st.tuples(layers(), BATCHES, st.booleans()), examples)


@examples(100, 1000)
def test_state_dict_round_trip_is_exact_and_freezes_zeros(examples):
    def check(layer):
        other = KronLinear(
            layer.in_features,
            layer.out_features,
            layer.block_size,
            layer.rank,
            layer.bias is not None,
            dtype=layer.s.dtype,
        )
        assert not other.load_state_dict(layer.state_dict()).missing_keys
        torch.testing.assert_close(dict(other.state_dict()), dict(layer.state_dict()), rtol=0, atol=0)
        assert torch.equal(other.dense_weight(), layer.dense_weight())
        assert torch.equal(other.block_mask, layer.block_mask)
        assert (other.dead_blocks is not None) == bool((layer.s == 0).any())

    check_all(check, layers(), examples)


@examples(100, 1000)
def test_dense_layers_there_and_back(examples):
    def check(layer):
        linear = layer.to_linear()
        x = torch.randn(3, layer.in_features, dtype=layer.s.dtype)
        torch.testing.assert_close(linear(x), layer(x), **TOLERANCE[layer.s.dtype])
        assert (linear.bias is None) == (layer.bias is None)
        full = layer.block_size[0] * layer.block_size[1]  # where every weight is met exactly
        again = KronLinear.from_linear(linear, layer.block_size, full)
        torch.testing.assert_close(again.dense_weight(), linear.weight, **TOLERANCE[layer.s.dtype])

    check_all(check, layers(), examples)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1),
    "adam-amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=0.05, amsgrad=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5),
}
ACTIONS = st.lists(st.sampled_from(["step", "step", "zero a block", "freeze", "unfreeze", "reload"]), max_size=12)


@examples(60, 600)
def test_a_frozen_mask_holds_through_random_training(examples):
    """A model of the mask beside the layer: which blocks have to be dead after every action."""

    def check(case):
        layer, optimizer_name, actions = case
        optimizer = OPTIMIZERS[optimizer_name](layer.parameters())
        dead = torch.zeros_like(layer.s, dtype=torch.bool)
        for action in actions:
            if action == "step":
                optimizer.zero_grad()
                layer(torch.randn(2, layer.in_features, dtype=layer.s.dtype)).square().mean().backward()
                assert not layer.s.grad[dead].any()
                optimizer.step()
            elif action == "zero a block":
                with torch.no_grad():
                    layer.s[-1, -1] = 0
            elif action == "freeze":
                layer.freeze_mask()
                dead = layer.s.detach() == 0
            elif action == "unfreeze":
                layer.unfreeze_mask()
                assert not layer.s[dead].any()
                dead = torch.zeros_like(dead)
            else:
                state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
                layer.load_state_dict(state)
                dead = state["s"] == 0
            assert_dead(layer, dead)

    cases = st.tuples(layers(dtypes=(torch.float64,)), st.sampled_from(list(OPTIMIZERS)), ACTIONS)
    check_all(check, cases, examples)


def assert_dead(layer, dead):
    assert not layer.block_mask[dead].any()
    block_out, block_in = layer.block_size
    dead_entries = dead.repeat_interleave(block_out, 0).repeat_interleave(block_in, 1)
    assert not layer.dense_weight()[dead_entries].any()
    assert not layer.to_linear().weight[dead_entries].any()
    assert not layer.state_dict()["s"][dead].any()
    assert (layer.dead_blocks is not None) == bool(dead.any())
