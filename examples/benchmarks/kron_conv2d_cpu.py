"""Time of the three ways of `kron_conv2d` over `nn.Conv2d` on this CPU, forward and forward + backward (with dX, bias).

    OMP_WAIT_POLICY=passive python examples/benchmarks/kron_conv2d_cpu.py

The layers run in turn and the medians are compared, so that other work on the machine meets all alike. Beside them: the
multiply-adds of the cheaper order over those of the dense convolution, by which a way is chosen.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads that spin disturb what is measured

import torch
from torch import Tensor, nn

from kron_hf import KronConv2d
from kron_hf.bench.machine import machine
from kron_hf.bench.timing import alternate
from kron_hf.ops.convolution import Convolution, Way, cheapest_way, kron_conv2d

WAYS: tuple[Way, ...] = ("b_first", "m_first", "build_w")


@dataclass(frozen=True)
class Case:
    """A square convolution, and the images that it is for."""

    channels: int
    kernel: int
    block_size: tuple[int, int]
    rank: int
    size: int
    stride: int = 1


CASES = [
    *[Case(64, 3, block, 1, 32) for block in ((4, 4), (8, 8), (16, 16), (16, 4), (4, 16))],
    *[Case(64, 3, (8, 8), rank, 32) for rank in (2, 3, 4)],
    *[Case(256, 3, (16, 16), rank, 14) for rank in (1, 2, 4)],
    *[Case(256, 1, (16, 16), rank, 14) for rank in (1, 2, 4)],
    Case(128, 3, (8, 8), 1, 28, stride=2),
]


class OneWay(nn.Module):
    """`KronConv2d` with a way of its own."""

    def __init__(self, layer: KronConv2d, way: Way) -> None:
        super().__init__()
        self.layer = layer
        self.way: Way = way
        self.geometry = Convolution(layer.kernel_size, layer.stride, layer.padding)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        layer = self.layer
        return kron_conv2d(x, layer.masked_s() * layer.a, layer.b, layer.bias, self.geometry, self.way)


def row(case: Case, images: int, repeats: int) -> str:
    """One line of the table."""
    options: Any = {"padding": case.kernel // 2, "stride": case.stride}
    dense = nn.Conv2d(case.channels, case.channels, case.kernel, **options)
    layer = KronConv2d(case.channels, case.channels, case.kernel, case.block_size, case.rank, **options)
    x = torch.randn(images, case.channels, case.size, case.size, requires_grad=True)
    layers = [dense, *(OneWay(layer, way) for way in WAYS)]
    times = alternate(layers, x, torch.randn_like(dense(x)), repeats)
    ratios = [f"{forward / times[0][0]:.2f} / {both / times[0][1]:.2f}" for forward, both in times[1:]]
    shape = f"{case.kernel} x {case.kernel}, {case.channels} channels, {case.size} x {case.size}"
    share = layer.forward_flops / (2 * dense.weight.numel())
    chosen = cheapest_way(layer.a.shape, layer.b.shape, layer.input_positions, "cpu")
    return (
        f"| {shape}{f', stride {case.stride}' if case.stride > 1 else ''} | {case.block_size[0]} x "
        f"{case.block_size[1]} | {case.rank} | {times[0][1]:.1f} | {share:.2f} | {' | '.join(ratios)} | {chosen} |"
    )


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Time of kron_conv2d over nn.Conv2d on this CPU.")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9, help="runs of each layer, alternating (default 9)")
    options = parser.parse_args()
    torch.manual_seed(0)
    about = machine() | {"dtype": "float32", "images": str(options.images), "baseline": "nn.Conv2d"}
    print(", ".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    ways = " | ".join(way.replace("_", "-") for way in WAYS)
    print(f"\n| layer | block | rank | nn.Conv2d f+b ms | multiply-adds | {ways} | chosen |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for case in CASES:
        print(row(case, options.images, options.repeats), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
