"""`kron-hf bench`: prints what is chosen for the layers of a model, or how fast they are."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kron_hf.bench.choice import SPEED_UP, Choice, choose, total_ratio
from kron_hf.bench.layers import ModelLayer, model_layers
from kron_hf.bench.machine import machine
from kron_hf.bench.timing import Comparison, compare
from kron_hf.escaping import plain

__all__ = ["BenchOptions", "run_bench"]

NOT_MEASURED = "Nothing was measured on devices other than CPUs: this is arithmetic for one of the H200's class.\n"


@dataclass(frozen=True)
class BenchOptions:
    """How layers are looked at.

    Attributes:
        choose: Whether choices are printed and nothing is measured.
        training: Whether choices are those for forward and backward.
        tokens: Tokens of a call, batch size times sequence length.
        dtype: Name of a floating point dtype of torch.
        device: Such as "cpu" or "cuda".
        repeats: Runs of each layer.
        as_json: Whether JSON is printed.
    """

    choose: bool
    training: bool
    tokens: int
    dtype: str
    device: str
    repeats: int
    as_json: bool


def run_bench(
    name: str, config: Any, conversion: Mapping[str, Any], options: BenchOptions, write: Callable[[str], None]
) -> None:
    """Runs the command.

    Args:
        name: The model, for messages.
        config: Its transformers config.
        conversion: What a dense model would be converted by, see `model_layers`.
        options: How its layers are looked at.
        write: Prints a text.

    Raises:
        ValueError: See `model_layers`; or the device is not there.
    """
    layers = model_layers(name, config, conversion)
    if options.choose:
        _print_choices(name, layers, options, write)
    else:
        _measure(name, layers, options, write)


def _print_choices(name: str, layers: list[ModelLayer], options: BenchOptions, write: Callable[[str], None]) -> None:
    kind, training = torch.device(options.device).type, options.training
    given: dict[str, Any] = {"device_type": kind, "dtype": getattr(torch, options.dtype), "tokens": options.tokens}
    choices = [choose(layer, **given, training=training) for layer in layers]
    total = total_ratio(choices)
    if options.as_json:
        content = {"predicted_ratio": total, "training": training, "layers": [asdict(choice) for choice in choices]}
        write(json.dumps(_about(name, options) | content, indent=2))
        return
    what = "forward and backward" if training else "forward"
    write(f"{plain(name)}: {kind}, {options.dtype}, {options.tokens} tokens, {what}; predicted time over nn.Linear\n")
    if kind != "cpu":
        write(NOT_MEASURED)
    for choice in choices:
        write(f"{choice}\n")
    write(_verdict(total, choices))


def _verdict(ratio: float, choices: list[Choice]) -> str:
    slow = sum(len(choice.layer.names) for choice in choices if choice.reason is not None)
    count = sum(len(choice.layer.names) for choice in choices)
    outlook = "" if ratio < SPEED_UP else "; no speed-up expected for this model"
    few = f"; no speed-up expected in {slow} of {count}" if slow and not outlook else ""
    return f"All {count} layers together: predicted time {ratio:.2f} of {choices[0].of_what}{outlook}{few}"


def _measure(name: str, layers: list[ModelLayer], options: BenchOptions, write: Callable[[str], None]) -> None:
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: torch finds no CUDA device here; --choose needs none")
    about = machine(options.device) | {"dtype": options.dtype, "tokens": str(options.tokens), "baseline": "nn.Linear"}
    if not options.as_json:
        write(", ".join(f"{key}: {value}" for key, value in about.items()) + "\n")
        write("| layers | in -> out | block | rank | nn.Linear ms | kron ms | forward | forward + backward |")
        write("|---|---|---|---|---|---|---|---|")
    results = []
    for layer in layers:
        results.append(
            compare(
                (layer.in_features, layer.out_features),
                layer.block_size,
                layer.rank,
                tokens=options.tokens,
                dtype=getattr(torch, options.dtype),
                repeats=options.repeats,
                bias=layer.bias,
                device=options.device,
            )
        )
        if not options.as_json:
            write(_row(layer, results[-1]))
    total = _sum(layers, results)
    if options.as_json:
        rows = [asdict(layer) | asdict(result) for layer, result in zip(layers, results, strict=True)]
        write(json.dumps(_about(name, options) | {"machine": about, "ratio": total.ratio, "layers": rows}, indent=2))
        return
    count, note = sum(len(layer.names) for layer in layers), "" if total.ratio < SPEED_UP else "; no speed-up here"
    write(
        f"\nAll {count} layers: forward {total.forward_ratio:.2f}, forward + backward {total.ratio:.2f} of nn.Linear's "
        f"time{note}. Medians of {options.repeats} runs of each, in turn."
    )


def _sum(layers: list[ModelLayer], results: list[Comparison]) -> Comparison:
    total = Comparison(0, 0, 0, 0)
    for layer, result in zip(layers, results, strict=True):
        sums = {key: getattr(total, key) + len(layer.names) * value for key, value in asdict(result).items()}
        total = replace(total, **sums)
    return total


def _row(layer: ModelLayer, result: Comparison) -> str:
    return (
        f"| {len(layer.names)} | {layer.in_features} -> {layer.out_features} | {layer.block_size[0]} x "
        f"{layer.block_size[1]} | {layer.rank} | {result.linear_both_ms:.1f} | {result.kron_both_ms:.1f} | "
        f"{result.forward_ratio:.2f} | {result.ratio:.2f} |"
    )


def _about(name: str, options: BenchOptions) -> dict[str, Any]:
    return {"model": name, "device": options.device, "dtype": options.dtype, "tokens": options.tokens}
