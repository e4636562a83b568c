"""What the demo shows: the table of the two models, and pictures of the masks."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kron_hf.command.table import aligned
from kron_hf.escaping import plain
from kron_hf.sparsity.pruning import kron_layers

__all__ = ["comparison_table", "draw_masks", "named_masks", "save_mask_picture"]

# Label, key of the dense model in metrics.json, key of the Kronecker model, format, whether a ratio makes sense.
LINES = [
    ("test accuracy", "dense_accuracy", "eval_accuracy", ".4f", False),
    ("validation accuracy", "dense_validation_accuracy", "validation_accuracy", ".4f", False),
    ("block sparsity", "", "sparsity", ".4f", False),
    ("trained parameters", "dense_params", "trainable_params", ",", True),
    ("  of the converted layers", "converted_dense_params", "converted_trainable_params", ",", True),
    ("deployed parameters", "dense_params", "deployed_params", ",", True),
    ("forward FLOPs per token", "dense_forward_flops", "forward_flops", ",", True),
    ("training FLOPs per token", "dense_training_flops", "training_flops", ",", True),
    ("seconds of one training", "dense_seconds", "seconds", ".1f", True),
    ("bytes of model.safetensors", "dense_file_bytes", "file_bytes", ",", True),
    ("learning rate chosen", "dense_learning_rate", "learning_rate", "g", False),
]
# One terminal character shows four blocks; the bits are upper left, upper right, lower left, lower right.
QUADRANTS = " ▘▝▀▖▌▞▛▗▚▐▜▄▙▟█"


def comparison_table(metrics: dict[str, Any]) -> str:
    """The table of the demo, from what it writes to `metrics.json`."""
    rows = [("", "dense", "Kronecker", "ratio")]
    rows += [_row(metrics, *line) for line in LINES]
    return aligned(rows)


def _row(metrics: dict[str, Any], label: str, dense: str, kronecker: str, style: str, ratio: bool) -> tuple[str, ...]:
    before, after = metrics[dense] if dense else 0.0, metrics[kronecker]
    return label, format(before, style), format(after, style), f"{after / before:.3f}" if ratio else ""


def named_masks(model: nn.Module) -> dict[str, Tensor]:
    """The block mask `[O, I]` of each Kronecker layer by its name."""
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: layer.block_mask.cpu() for layer in kron_layers(model)}


def draw_masks(masks: dict[str, Tensor], width: int = 100) -> str:
    """The masks in block characters, 2 x 2 blocks each, side by side as far as `width` characters allow."""
    pictures = [[_label(name), *_draw(mask)] for name, mask in masks.items()]
    lines: list[str] = []
    while pictures:
        shelf, used = [], 0
        while pictures and (not shelf or used + _columns(pictures[0]) <= width):
            shelf.append(pictures.pop(0))
            used += _columns(shelf[-1])
        for index in range(max(map(len, shelf))):
            cells = ((part[index] if index < len(part) else "").ljust(_columns(part)) for part in shelf)
            lines.append("".join(cells).rstrip())
        lines.append("")
    return "\n".join(lines[:-1])


def _draw(mask: Tensor) -> list[str]:
    rows, columns = mask.shape
    cells = torch.zeros(rows + rows % 2, columns + columns % 2, dtype=torch.long)
    cells[:rows, :columns] = mask
    codes = cells[::2, ::2] + 2 * cells[::2, 1::2] + 4 * cells[1::2, ::2] + 8 * cells[1::2, 1::2]
    return ["".join(QUADRANTS[code] for code in line) for line in codes.tolist()]


def _columns(picture: list[str]) -> int:
    return max(map(len, picture)) + 2


def _label(name: str) -> str:
    """`vit.layers.0.mlp.fc1` as `0 fc1`, to fit over its picture."""
    parts = name.split(".")
    return plain(" ".join([*(part for part in parts[:-1] if part.isdigit()), parts[-1]]))


def save_mask_picture(model: nn.Module, path: Path) -> None:
    """Draws every mask into one PNG, in the shape of its weight: dark blocks are alive, light ones exactly zero."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    masks, layers = named_masks(model), kron_layers(model)
    columns = min(6, len(masks))
    rows = -(-len(masks) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Blocks of the weights: dark = alive, light = exactly zero")
    for index, ((name, mask), layer) in enumerate(zip(masks.items(), layers, strict=True)):
        block_out, block_in = layer.block_size
        axes = figure.add_subplot(rows, columns, index + 1)
        picture = mask.float().numpy()
        axes.imshow(picture, cmap="Blues", vmin=-0.15, vmax=1.2, interpolation="nearest", aspect=block_out / block_in)
        axes.set_title(f"{_label(name)}\nsparsity {1 - picture.mean():.2f}", fontsize=8, parse_math=False)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=100)
