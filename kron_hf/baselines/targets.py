"""Which linears of a model a baseline prunes: those that `get_kron_model` would convert."""

from dataclasses import replace

from torch import nn

from kron_hf.baselines.block_layer import BlockLayer, share_of_zero_blocks
from kron_hf.config import BlockSize, KronConfig
from kron_hf.targets import Target, find_targets

__all__ = ["block_layers", "block_sparsity", "dense_targets"]


def block_layers(
    model: nn.Module, config: KronConfig | BlockSize, target_modules: list[str] | str | None = None
) -> dict[str, BlockLayer]:
    """The linears of a dense model that `get_kron_model(model, config)` would convert, with their block sizes, by name.

    Args:
        model: A dense model.
        config: Its block sizes and module names count, its ranks do not; or a block size alone.
        target_modules: As in `KronConfig`; only with a block size.

    Raises:
        ValueError: The model is converted already or has no such linear, or a block does not divide a layer that was
            named explicitly. Under the default names and "all-linear" such a layer is left out, with a warning.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
        >>> {name: layer.grid for name, layer in block_layers(model, (2, 4)).items()}
        {'0': (8, 2)}
    """
    targets = dense_targets(model, config, target_modules)
    return {target.name: BlockLayer(target.linear, target.block_size) for target in targets}


def block_sparsity(
    model: nn.Module, config: KronConfig | BlockSize, target_modules: list[str] | str | None = None
) -> float:
    """Share of the entries of the layers of `block_layers` that lie in blocks whose entries are all exactly zero.

    In [0, 1], counted in the weights. For a model with Kronecker layers see `kron_summary`.

    Raises:
        ValueError: As in `block_layers`.
    """
    return share_of_zero_blocks(block_layers(model, config, target_modules).values())


def dense_targets(
    model: nn.Module, config: KronConfig | BlockSize, target_modules: list[str] | str | None
) -> list[Target]:
    """The targets of `block_layers`; called directly by a public function, so that warnings name its caller."""
    if not isinstance(config, KronConfig):
        config = KronConfig(block_size=config, rank=1, target_modules=target_modules)
        return find_targets(model, config, compare_cost=False)
    if target_modules is not None:
        raise ValueError("target_modules goes with a block size; a KronConfig has its own")
    if config.budget is not None:
        raise ValueError(f"blocks need a block_size; with {config.budget} calibration data would choose it")
    return find_targets(model, replace(config, rank=1, rank_pattern={}), compare_cost=False)
