"""Which blocks of a calibrated layer to prune: three measures of what a block is worth, by the error that is left.

python -m examples.conversion.saliency --model facebook/dinov2-small

Every projection gets 16 x 16 blocks at rank 8, on the dense model's own inputs; half of its blocks are pruned in four
rounds with refits (`prune_gradually`), and the relative squared error of its outputs is measured on other images.
"""

import argparse
import os
from statistics import mean
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel

from examples.conversion.images import fashion
from examples.conversion.run import POOL, projections
from kron_hf.calibration import block_pruning
from kron_hf.calibration.fit import dense, fit_factors, output_error
from kron_hf.calibration.moments import Covariances, Moments
from kron_hf.factors import to_blocks

__all__ = ["SALIENCIES", "compare", "main", "surgeon"]

RIDGE = 1e-4


def magnitude(covariances: Covariances, s: Tensor | None, a: Tensor, b: Tensor, *_: object) -> Tensor:
    """Squared norm of each block."""
    return to_blocks(dense(a, b), (b.shape[1], b.shape[2])).square().sum(1).view(a.shape[1:])


def surgeon(covariances: Covariances, s: Tensor | None, a: Tensor, b: Tensor, *_: object) -> Tensor:
    """What leaving out a block adds if all other entries of W may make up for it (Hassibi and Stork, 1992).

    `tr(W_pq ((C^-1)_qq)^-1 W_pq^T)`, with the ridge of the fit.
    """
    size, columns = b.shape[2], a.shape[2]
    c = covariances.c
    inverse = torch.linalg.inv(c + RIDGE * c.diagonal().mean() * torch.eye(len(c)).to(c))
    own = torch.linalg.inv(inverse.view(columns, size, columns, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1))
    blocks = dense(a.to(c), b.to(c)).view(a.shape[1], b.shape[1], columns, size)
    return torch.einsum("pkqm,qmn,pkqn->pq", blocks, own, blocks)


SALIENCIES = {"output error": block_pruning.block_saliency, "optimal brain surgeon": surgeon, "magnitude": magnitude}


def compare(
    model: nn.Module, images: Tensor, held_out: Tensor, size: int = 16, rank: int = 8
) -> dict[str, list[float]]:
    """Relative squared error of each projection on held-out images: not pruned, and pruned by each measure."""
    layers = projections(model)
    fitted, judged = (_covariances(model, layers, part) for part in (images, held_out))
    errors: dict[str, list[float]] = {name: [] for name in ("not pruned", *SALIENCIES)}
    for name in tqdm(layers, unit="layer"):
        own, other = fitted[name], judged[name]
        start = fit_factors(own, (size, size), rank, ridge=RIDGE)
        errors["not pruned"].append(output_error(other, start))
        for measure, saliency in SALIENCIES.items():
            with patch.object(block_pruning, "block_saliency", saliency):
                _, a, b = block_pruning.prune_gradually(own, *start, start[0][0].numel() // 2, ridge=RIDGE)
            errors[measure].append(output_error(other, (a, b)))
    return errors


def _covariances(model: nn.Module, layers: dict[str, nn.Linear], images: Tensor) -> dict[str, Covariances]:
    moments = {name: Moments(layer.in_features) for name, layer in layers.items()}
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, into=moments[name]: into.update(inputs[0].flatten(0, -2)))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for part in images.split(100):
            model(pixel_values=part)
    for handle in handles:
        handle.remove()
    return {name: moments[name].result().linear(layer.weight.detach(), layer.bias) for name, layer in layers.items()}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="facebook/dinov2-small", help="id or directory of a DINOv2 backbone")
    options = parser.parse_args()
    model = AutoModel.from_pretrained(options.model).eval()
    images, _ = fashion("train", 0, POOL)
    chosen = images[torch.randperm(POOL, generator=torch.Generator().manual_seed(0))[:1500]]
    errors = compare(model, chosen[:1000], chosen[1000:])
    print("| pruned by | error on held-out images | least of the three in |\n|---|---|---|")
    for name, values in errors.items():
        best = sum(value == min(errors[each][at] for each in SALIENCIES) for at, value in enumerate(values))
        wins = "" if name == "not pruned" else f"{best} of {len(values)}"
        print(f"| {name} | {mean(values):.4f} | {wins} |")


if __name__ == "__main__":
    main()
