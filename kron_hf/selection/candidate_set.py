"""`CandidateSet`: all candidates of a model, by choice and position; their sizes, costs and norms, and who is left."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from kron_hf.factors import block_norms
from kron_hf.kron_layer import KronLayer
from kron_hf.selection.candidates import KronCandidates, candidate_key
from kron_hf.selection.costs import Costs, entries
from kron_hf.selection.groups import candidate_layers, choices_of, label_of, without
from kron_hf.selection.norms import balanced_norm, scale_, squared_norms
from kron_hf.selection.restart import forget
from kron_hf.sparsity.pruning import gather_factors

__all__ = ["CandidateSet"]


class CandidateSet:
    """The candidates of a model.

    A *choice* is made for some layers together: one choice for all layers, or one each. In every choice candidates are
    told apart by their position, since -1 in a block size gives one candidate other names in other layers.

    Args:
        model: A model with `KronCandidates` layers.
        scope: "global" or "layer".

    Attributes:
        names: Names of the layers.
        layers: The layers.
        keys: Names of the candidates of each layer, also of those that are gone.
        sizes: `[bo, bi, rank]` of these.
        shapes: `[out, in]` of each layer; of a convolution `[out, in, kh * kw, stride product]`.
        choices: Indices of the layers of each choice.
        costs: What the candidates cost, if that counts.

    Raises:
        ValueError: There is no layer with candidates, or a global choice cannot be made for them.
    """

    def __init__(self, model: nn.Module, scope: str) -> None:
        found = candidate_layers(model)
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no KronCandidates layers to choose in; convert it with "
                "get_kron_model(model, KronConfig(candidate_block_sizes=[...]))"
            )
        self.names, self.layers = list(found), list(found.values())
        _check_whole(found)
        self.keys = [layer.alive for layer in self.layers]
        self.sizes = [
            [[*layer.layer(key).block_size, layer.layer(key).rank] for key in layer.alive] for layer in self.layers
        ]
        self.shapes = [layer.shape_entry for layer in self.layers]
        self.choices = choices_of(self.layers, scope)
        self.costs: Costs | None = None

    @property
    def drops(self) -> int:
        """How many candidates the choice with most of them has to lose."""
        return max(len(self.alive(choice)) for choice in range(len(self.choices))) - 1

    def alive(self, choice: int) -> list[int]:
        """Positions of the candidates left in a choice."""
        first = self.choices[choice][0]
        left = self.layers[first].alive
        return [k for k, key in enumerate(self.keys[first]) if key in left]

    def alive_keys(self) -> list[list[str]]:
        """Names of the candidates left in each layer."""
        return [layer.alive for layer in self.layers]

    def label(self, choice: int, k: int) -> str:
        """The name of a candidate."""
        return label_of([self.keys[index][k] for index in self.choices[choice]])

    def drop(self, choice: int, k: int, optimizer: Optimizer | None) -> None:
        """Takes a candidate out of the layers of a choice, and its parameters out of the optimizer."""
        for index in self.choices[choice]:
            layer, key = self.layers[index], self.keys[index][k]
            if optimizer is not None:
                forget(optimizer, list(layer.layer(key).parameters()), leave=True)
            # A wrapper, also around one process, relies on the shapes of the parameters.
            layer.drop(key, free=False if dist.is_available() and dist.is_initialized() else None)

    def keep_only(self, sizes: Sequence[Sequence[list[int]]], alive: Sequence[Sequence[str]]) -> None:
        """Continues a selection: `sizes` are of all candidates of each layer there once were, `alive` those left.

        Raises:
            ValueError: The layers are not those of the model.
        """
        if len(alive) != len(self.layers) or len(sizes) != len(self.layers):
            raise ValueError(f"the selection state is of {len(alive)} layers, this model has {len(self.layers)}")
        for name, layer, left in zip(self.names, self.layers, alive, strict=True):
            if not left or not set(left) <= set(layer.alive):
                raise ValueError(
                    f"the selection state has candidates {list(left)} left in {name!r}, the model has {layer.alive}; "
                    "load the model's weights from the same checkpoint first"
                )
            for key in layer.alive:
                if key not in left:
                    layer.drop(key)
        self.sizes = [list(each) for each in sizes]
        self.keys = [[candidate_key((out, in_), rank) for out, in_, rank in each] for each in sizes]

    def leave_optimizer(self, optimizer: Optimizer) -> None:
        """Takes the parameters of candidates that are gone out of the optimizer's groups."""
        gone = [
            factor
            for layer in self.layers
            for key in layer.keys
            if key not in layer.alive
            for factor in layer.layer(key).parameters()
        ]
        if gone:
            forget(optimizer, gone, leave=True)

    @contextmanager
    def without(self, choice: int, k: int) -> Iterator[None]:
        """The model as if a candidate were dropped."""
        indices = self.choices[choice]
        with without([self.layers[index] for index in indices], [self.keys[index][k] for index in indices]):
            yield

    def scale(self, choice: int, k: int, factor: float) -> None:
        """Multiplies S, A and B of a candidate."""
        for index in self.choices[choice]:
            scale_(self.layers[index].layer(self.keys[index][k]), factor)

    def norms(self) -> list[dict[int, float]]:
        """`||theta_k||` of the candidates left in each choice, by position. If sharded, all processes must call it."""
        at = [(c, k, index) for c, indices in enumerate(self.choices) for k in self.alive(c) for index in indices]
        squares = squared_norms([self.layers[index].layer(self.keys[index][k]) for _, k, index in at])
        by_candidate: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
        for (choice, k, _), values in zip(at, squares, strict=True):
            by_candidate.setdefault((choice, k), []).append(values)
        return [
            {k: balanced_norm(by_candidate[choice, k]) for k in self.alive(choice)}
            for choice in range(len(self.choices))
        ]

    def root_sizes(self) -> list[dict[int, float]]:
        """`sqrt(size_k)` of the candidates left in each choice, by position: the entries of their S, A and B."""
        return [
            {
                k: math.sqrt(sum(entries(self.layers[index].layer(self.keys[index][k])) for index in indices))
                for k in self.alive(choice)
            }
            for choice, indices in enumerate(self.choices)
        ]

    def cost(self, choice: int, k: int, *, of_all: bool) -> float:
        """Cost of a candidate as a share of the dense cost, of its own layers or of all; 0 if no cost counts."""
        if self.costs is None:
            return 0.0
        own, everything = self.choices[choice], range(len(self.layers))
        paid = sum(self.costs.candidates[index][self.keys[index][k]] for index in own)
        return paid / sum(self.costs.dense[index] for index in (everything if of_all else own))

    def weight_variances(self) -> list[float]:
        """Mean square of the entries of W in each layer, the candidates taken as independent of each other.

        If layers are sharded (FSDP2), all processes must call it.
        """
        alive = [(index, layer.layer(key)) for index, layer in enumerate(self.layers) for key in layer.alive]
        sums = [0.0] * len(self.layers)
        for (index, _), factors in zip(alive, gather_factors([layer for _, layer in alive]), strict=True):
            sums[index] += float(block_norms(*factors).square().sum())
        return [total / prod(layer.weight_shape) for total, layer in zip(sums, self.layers, strict=True)]

    def last(self, index: int) -> KronLayer:
        """The Kronecker layer of the last candidate in a layer."""
        (key,) = self.layers[index].alive
        return self.layers[index].layer(key)


def _check_whole(layers: dict[str, KronCandidates]) -> None:
    for name, layer in layers.items():
        for key in layer.alive:
            s, blocks = layer.layer(key).s, [layer.layer(key).out_blocks, layer.layer(key).in_blocks]
            if list(s.shape) != blocks:
                raise ValueError(
                    f"{name}: an S of shape {blocks} has been flattened to {list(s.shape)}: FSDP version 1 and "
                    "DeepSpeed ZeRO-3 hide the parameters; use fsdp_version 2"
                )
