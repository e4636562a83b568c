"""The formulation of public code, written anew from its description, as a baseline.

All products with B_i at once, Z written out and permuted so that those with M_i are one large product, and its result
permuted back. Autograd keeps the permuted Z for backward.
"""

from torch import Tensor, nn

from kron_hf import KronLinear

__all__ = ["VecParallel", "replace_layers"]


class VecParallel(nn.Module):
    """Computes what a Kronecker layer computes, from the same parameters."""

    def __init__(self, layer: KronLinear) -> None:
        super().__init__()
        self.s, self.a, self.b, self.bias = layer.s, layer.a, layer.b, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in_features]` to `[..., out_features]`."""
        (rank, out_blocks, in_blocks), (_, block_out, block_in) = self.a.shape, self.b.shape
        z = x.reshape(-1, block_in) @ self.b.reshape(rank * block_out, block_in).T
        z = z.view(-1, in_blocks, rank, block_out).permute(1, 2, 3, 0).reshape(in_blocks * rank, -1)
        m = (self.s * self.a).permute(1, 2, 0).reshape(out_blocks, in_blocks * rank)
        y = (m @ z).view(out_blocks * block_out, -1).T.reshape(*x.shape[:-1], out_blocks * block_out)
        return y if self.bias is None else y + self.bias


def replace_layers(model: nn.Module) -> nn.Module:
    """Puts it in the place of each Kronecker layer, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, KronLinear):
            model.set_submodule(name, VecParallel(layer))
    return model
