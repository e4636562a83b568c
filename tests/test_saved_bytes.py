"""What a Kronecker layer keeps for backward: what a dense one keeps, its input and parameters; nothing of Z, M or W."""

from itertools import product

import pytest
import torch
from torch import nn

from kron_hf import KronLinear
from kron_hf.ops.backend import BACKENDS, forced

SHAPES = {  # (out, in), block size, rank
    **{f"{n}_{b}x{b}_{r}": ((n, n), b, r) for n, b, r in product((64, 192), (2, 8, 16, 64), (1, 2, 4))},
    "wide": ((256, 64), 16, 2),
    "narrow": ((64, 256), 16, 2),
    "rectangular": ((64, 128), (4, 64), 8),
    "low_rank": ((64, 96), (1, -1), 8),
    "one_column": ((64, 96), (-1, 1), 3),
    "one_block": ((48, 32), (-1, -1), 1),
}


def kept(layer, x):
    """Storages kept for backward, by address: their bytes."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return found


def addresses(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def bytes_without_parameters(layer, x):
    own = addresses(layer.parameters())
    return sum(size for address, size in kept(layer, x).items() if address not in own)


@pytest.mark.parametrize("lead", [(1,), (5, 7), (600,)], ids=str)
@pytest.mark.parametrize(("features", "block_size", "rank"), SHAPES.values(), ids=list(SHAPES))
def test_as_many_bytes_as_a_dense_layer_at_every_shape(features, block_size, rank, lead):
    out_features, in_features = features
    kron, dense = KronLinear(in_features, out_features, block_size, rank), nn.Linear(in_features, out_features)
    x = torch.randn(*lead, in_features, requires_grad=True)
    assert bytes_without_parameters(kron, x) == bytes_without_parameters(dense, x) == x.nbytes
    assert set(kept(kron, x)) == addresses((x, kron.s, kron.a, kron.b))


@pytest.mark.parametrize("way", [name for name in BACKENDS if name != "fused"])
def test_whatever_the_way(way):
    layer, x = KronLinear(64, 32, 8, 2), torch.randn(9, 64, requires_grad=True)
    with forced(way):
        assert set(kept(layer, x)) == addresses((x, layer.s, layer.a, layer.b))


@pytest.mark.parametrize(
    "trained", [{"input"}, {"weights"}, {"bias"}, {"input", "bias"}], ids=lambda names: "_".join(sorted(names))
)
def test_the_input_is_kept_only_where_weights_are_trained(trained):
    kron, dense = KronLinear(64, 32, 8, 2), nn.Linear(64, 32)
    for layer in (kron, dense):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(("bias" if name == "bias" else "weights") in trained)
    x = torch.randn(9, 64, requires_grad="input" in trained)
    assert bytes_without_parameters(kron, x) == bytes_without_parameters(dense, x) == x.nbytes * ("weights" in trained)


def test_without_the_input_its_gradient_is_the_same():
    layer, x = KronLinear(64, 32, 8, 2, dtype=torch.float64), torch.randn(3, 5, 64, dtype=torch.float64)
    expected = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x)
    layer.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(dtype):
    kron, dense = KronLinear(64, 32, 8, 2), nn.Linear(64, 32)
    x = torch.randn(50, 64, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        copies, dense_copies = sum(kept(kron, x).values()), sum(kept(dense, x).values())
    factors = sum(factor.numel() for factor in (kron.s, kron.a, kron.b))
    assert dense_copies - copies == 2 * (dense.weight.numel() - factors)


def test_a_frozen_mask_costs_what_s_does():
    layer, x = KronLinear(64, 64, 8, 2), torch.randn(50, 64, requires_grad=True)
    layer.freeze_mask(torch.eye(8) == 1)
    assert bytes_without_parameters(layer, x) == x.nbytes + layer.s.nbytes + layer.dead_blocks.nbytes
