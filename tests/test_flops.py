import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kron_hf import KronLinear, kron_summary


@pytest.mark.parametrize("block_size", [(4, 8), (8, 2), (1, -1)], ids=str)
@pytest.mark.parametrize("needs_input_gradient", [True, False])
def test_the_flop_counter_agrees_with_the_summary(block_size, needs_input_gradient):
    layer = KronLinear(32, 16, block_size, rank=2)
    x = torch.randn(3, 5, 32, requires_grad=needs_input_gradient)
    summary = kron_summary(layer).converted
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() == 15 * summary.forward_flops
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 15 * summary.forward_flops * (2 if needs_input_gradient else 1)


def test_the_flop_counter_sees_two_products_written_out():
    layer = KronLinear(32, 16, (4, 8), rank=2, bias=False)
    x = torch.randn(6, 32)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    total = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        z = x.view(24, 8) @ layer.b.flatten(0, 1).T  # [6 * I, rank * bo]
        z = z.view(6, 4, 2, 4).permute(2, 1, 0, 3).reshape(8, 24)
        _ = layer.a.permute(1, 0, 2).reshape(4, 8) @ z
    assert total == counter.get_total_flops()
