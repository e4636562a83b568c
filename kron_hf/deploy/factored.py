"""A Kronecker layer as two plain linears with reshapes between, which every exporter and quantizer knows."""

import copy

import torch
from torch import Tensor, nn

from kron_hf.escaping import printable
from kron_hf.layers import KronLinear
from kron_hf.ops import cost
from kron_hf.selection.candidates import KronCandidates, converted_layers
from kron_hf.surgery import replace_modules

__all__ = ["FactoredLinear", "factored_copy"]

TOKENS = 1024  # of a call: what the choices are made for; the results are the same for any number


class FactoredLinear(nn.Module):
    r"""`y = x W^T + bias` with `W = sum_i M_i (x) B_i`, `M_i = S * A_i`; for evaluation alone.

    Either the block factors come first, `z = x_i B^T` for every block column i and then `y = M z` over (i, rank), or
    M does, whichever takes fewer multiply-adds. Block rows and columns of S that are all zero are left out where the
    cost model says that it pays.

    Args:
        layer: What it computes; nothing of it is kept but copies.

    Attributes:
        first: The product with B, `bi -> rank * bo`, or with M, `I -> rank * O`.
        second: That with the other, `I * rank -> O`, or `rank * bi -> bo`.
        columns: Indices of the block columns that are left, int64; None if all are.
        rows: Where in the block rows that are left each of the O is found, int64 `[O]`; one past the last for a dead
            one. None if all are left.
        bias: `[O * bo]` or None.
    """

    columns: Tensor | None
    rows: Tensor | None
    bias: Tensor | None

    @torch.no_grad()
    def __init__(self, layer: KronLinear) -> None:
        super().__init__()
        self.rank, (self.block_out, self.block_in) = layer.rank, layer.block_size
        self.in_features, self.out_features = layer.in_features, layer.out_features
        m = layer.masked_s() * layer.a
        m, columns, rows = _without_dead(layer, m)
        self.register_buffer("columns", columns)
        self.register_buffer("rows", rows)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        _, out_blocks, self.in_blocks = m.shape
        b, rank, (block_out, block_in) = layer.b, self.rank, layer.block_size
        self.b_first = block_out * self.in_blocks * (block_in + out_blocks) <= block_in * out_blocks * (
            self.in_blocks + block_out
        )
        if self.b_first:
            self.first = _linear(b.reshape(rank * block_out, block_in))
            self.second = _linear(m.permute(1, 2, 0).reshape(out_blocks, self.in_blocks * rank))
        else:
            self.first = _linear(m.reshape(rank * out_blocks, self.in_blocks))
            self.second = _linear(b.permute(1, 0, 2).reshape(block_out, rank * block_in))

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in_features]` to `[..., out_features]`."""
        x = x.unflatten(-1, (-1, self.block_in))  # [..., I, bi]
        if self.columns is not None:
            x = x.index_select(-2, self.columns)
        if self.b_first:
            z = self.first(x).unflatten(-1, (self.rank, self.block_out))  # [..., I, rank, bo]
            z = z.movedim(-1, -3).flatten(-2)  # [..., bo, I * rank]
            y = self.second(z).transpose(-1, -2)  # [..., O, bo]
        else:
            z = self.first(x.transpose(-1, -2)).unflatten(-1, (self.rank, -1))  # [..., bi, rank, O]
            z = z.movedim(-3, -1).transpose(-3, -2).flatten(-2)  # [..., O, rank * bi]
            y = self.second(z)  # [..., O, bo]
        if self.rows is not None:
            y = torch.cat([y, torch.zeros_like(y[..., :1, :])], -2).index_select(-2, self.rows)
        y = y.flatten(-2)
        return y if self.bias is None else y + self.bias


def factored_copy(model: nn.Module) -> nn.Module:
    """A copy of a model for evaluation, its Kronecker layers as `FactoredLinear`, on the CPU.

    Raises:
        ValueError: The block size of a layer is not chosen yet; names the layer.
    """
    model = copy.deepcopy(model).cpu().eval()
    layers: dict[str, nn.Module] = {}
    for name, layer in converted_layers(model, remove_duplicate=False).items():
        if isinstance(layer, KronCandidates):
            raise ValueError(
                f"{printable(name)}: its block size is not chosen yet, it is a sum of {len(layer.alive)} candidates; "
                "finish the selection, or export the dense model"
            )
        if type(layer) is KronLinear:
            layers[name] = FactoredLinear(layer)
    replace_modules(model, layers)
    return model


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear


def _without_dead(layer: KronLinear, m: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """M without its dead block rows and columns, and what `FactoredLinear` finds the others by."""
    living = layer.block_mask
    rows, columns = living.any(1), living.any(0)
    blocks = (layer.out_blocks, layer.in_blocks)
    shape = cost.Shape("cpu", m.dtype, TOKENS, *blocks, *layer.block_size, layer.rank)
    dropped = cost.worth_dropping(shape, int(rows.sum()), int(columns.sum()))
    places = torch.where(rows, rows.cumsum(0) - 1, rows.sum()) if dropped.rows else None
    if dropped.rows:
        m = m[:, rows]
    if dropped.columns:
        m = m[:, :, columns]
    return m, columns.nonzero().flatten() if dropped.columns else None, places
