"""Forwards of a few tokens, one after the other as a server runs them: a layer over `nn.Linear`, as it is and folded.

python -m examples.benchmarks.few_tokens --json examples/results/few_tokens.json

Blocks of 16, rank 2, float32, without gradients; nothing else runs between the calls, so that caches stay warm (the
suite `few` of the runner has training steps between them, which slow the dense call down most). Waiting threads sleep.
"""

import argparse
import copy
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: it decides how threads wait

import torch
from torch import Tensor, nn

from examples.benchmarks.alternating import medians
from kron_hf import KronLinear, fold_for_inference
from kron_hf.bench.machine import machine

__all__ = ["CALLS", "Call", "main", "measure"]

BLOCK, RANK = 16, 2


class Call(NamedTuple):
    """One layer, called with so many tokens by so many threads."""

    threads: int
    tokens: int
    in_features: int
    out_features: int


CALLS = tuple(
    Call(threads, tokens, *sizes)
    for threads in (1, 2)
    for tokens in (1, 197)
    for sizes in ((192, 192), (384, 384), (768, 768), (768, 3072))
)


def measure(call: Call, repeats: int) -> dict[str, float]:
    """Time over that of a dense layer: as it is, folded, and folded where W may be kept."""
    threads = torch.get_num_threads()
    torch.set_num_threads(call.threads)
    try:
        layer = KronLinear(call.in_features, call.out_features, BLOCK, RANK).eval()
        folded, kept = (
            fold_for_inference(copy.deepcopy(layer), tokens=call.tokens, keep_weight=keep) for keep in (False, True)
        )
        models = {"kron": layer, "folded": folded, "keep_weight": kept, "dense": layer.to_linear()}
        x = torch.randn(call.tokens, call.in_features)
        with torch.no_grad():
            times = medians({name: _call(model, x) for name, model in models.items()}, repeats)
    finally:
        torch.set_num_threads(threads)
    return {name: times[name] / times["dense"] for name in ("kron", "folded", "keep_weight")}


def _call(model: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: model(x)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=500, help="runs of each (default 500)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    options = parser.parse_args(arguments)
    rows = []
    print("threads  tokens  layer          kron  folded  keep_weight   (time over dense)")
    for call in CALLS:
        ratios = measure(call, options.repeats)
        rows.append({**call._asdict(), **ratios})
        layer = f"{call.in_features} -> {call.out_features}"
        print(
            f"{call.threads:7}  {call.tokens:6}  {layer:<13} {ratios['kron']:5.2f}  {ratios['folded']:6.2f}  "
            f"{ratios['keep_weight']:11.2f}"
        )
    if options.json:
        content = {"machine": machine(), "block_size": BLOCK, "rank": RANK, "measured": rows}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
