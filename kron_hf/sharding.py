"""Factors that are sharded over processes: FSDP2 turns each parameter into a `DTensor`, by default sharded on dim 0.

Everything here is the identity on plain tensors. Masks are whole on every process, so that the part of one that belongs
to a shard is found without communication: only `gather`, `scatter_from_first` and
`sum_over_shards` communicate.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

__all__ = [
    "gather",
    "is_sharded",
    "laid_out_as",
    "local",
    "reshard",
    "scatter_from_first",
    "shard_of",
    "sum_over_shards",
]


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is spread over processes."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor that this process holds, without gradient; it shares the memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def reshard(model: nn.Module) -> None:
    """Puts the shards back into a model under FSDP2 after a forward without backward.

    Some modules, the root among them, hold whole parameters until a backward: other objects than the optimizer's, so
    that what is written into them is lost, and `model.zero_grad()` leaves the gradients of the shards as they are.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def laid_out_as(full: Tensor, like: Tensor) -> Tensor:
    """`full`, which every process holds whole, spread as `like` is."""
    if not isinstance(like, DTensor):
        return full.to(like.device)
    # None: each process cuts its part out of its own copy and nothing is sent.
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard_of(full: Tensor, like: Tensor) -> Tensor:
    """The part of `full`, which every process holds whole, that belongs to `local(like)`."""
    return local(laid_out_as(full, like)).to(local(like).device)  # offloaded shards are not on the mesh's device


def gather(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The whole tensors, without gradient. All processes must call it if a tensor is sharded.

    One all-gather for all tensors together, if each is sharded along one dimension over one process group, as
    FSDP2 does; other layouts (tensor parallelism on top) are gathered tensor by tensor.
    """
    sharded = [cast(DTensor, tensor.detach()) for tensor in tensors if is_sharded(tensor)]
    shard_dims = [_shard_dim(tensor) for tensor in sharded]
    groups = {tensor.device_mesh.get_group(dims[0]) for tensor, dims in zip(sharded, shard_dims, strict=True) if dims}
    if len(groups) == 1 and None not in shard_dims:
        whole = iter(_gather_packed(sharded, [dims[1] for dims in shard_dims if dims], groups.pop()))
    else:
        whole = (tensor.full_tensor() for tensor in sharded)
    return [next(whole) if is_sharded(tensor) else tensor.detach() for tensor in tensors]


def scatter_from_first(full: Tensor | None, like: Tensor) -> Tensor | None:
    """The first process's `full`, spread as the sharded `like` is; None if it has none. All processes must call it."""
    sharded = cast(DTensor, like.detach())
    mesh = sharded.device_mesh
    has_one = torch.tensor(float(full is not None), device=mesh.device_type)
    for mesh_dim in range(mesh.ndim):
        dist.broadcast(has_one, group=mesh.get_group(mesh_dim), group_src=0)
    if not has_one:
        return None
    whole = torch.zeros(sharded.shape, dtype=sharded.dtype) if full is None else full.detach()
    return distribute_tensor(whole.to(mesh.device_type), mesh, sharded.placements).to(sharded.to_local().device)


def sum_over_shards(parts: Sequence[Tensor], likes: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Completes sums along dimension `dim` of each `local(like)` to sums along that dimension of the whole `like`.

    One all-reduce for all parts of one process group; none where `dim` is not sharded. All processes must call it.
    """
    groups: dict[dist.ProcessGroup, list[int]] = {}
    for index, like in enumerate(likes):
        if isinstance(like, DTensor):
            for mesh_dim, placement in enumerate(like.placements):
                if placement.is_shard(dim):
                    groups.setdefault(like.device_mesh.get_group(mesh_dim), []).append(index)
    sums = list(parts)
    for group, members in groups.items():
        device = cast(DTensor, likes[members[0]]).device_mesh.device_type  # offloaded shards are out of its reach
        flat = torch.cat([sums[index].flatten() for index in members]).to(device)
        dist.all_reduce(flat, group=group)
        for index, whole in zip(members, flat.split([sums[index].numel() for index in members]), strict=True):
            sums[index] = whole.view_as(sums[index]).to(sums[index])
    return sums


def _shard_dim(tensor: DTensor) -> tuple[int, int] | None:
    """The one mesh dimension over which the tensor is sharded and its sharded dimension; None for other layouts."""
    split = [(mesh_dim, p) for mesh_dim, p in enumerate(tensor.placements) if not p.is_replicate()]
    if len(split) != 1 or type(split[0][1]) is not Shard:
        return None
    return split[0][0], split[0][1].dim


def _gather_packed(tensors: Sequence[DTensor], dims: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    processes = group.size()
    shapes = [_shard_shapes(t.shape, dim, processes) for t, dim in zip(tensors, dims, strict=True)]
    totals = [sum(math.prod(shape[process]) for shape in shapes) for process in range(processes)]
    parts = [t.to_local() for t in tensors]
    dtype = parts[0].dtype
    for part in parts:  # a wider dtype holds the values of a narrower one exactly
        dtype = torch.promote_types(dtype, part.dtype)
    # The mesh's device and not the shards': offloaded shards lie where the group cannot reach them.
    flat = torch.zeros(max(totals), dtype=dtype, device=tensors[0].device_mesh.device_type)
    own = torch.cat([part.reshape(-1).to(flat) for part in parts])
    flat[: len(own)] = own
    packed = flat.new_empty(processes, len(flat))
    dist.all_gather(list(packed), flat, group=group)
    by_process = [
        row[:total].split([math.prod(shape[process]) for shape in shapes])
        for process, (row, total) in enumerate(zip(packed, totals, strict=True))
    ]
    return [
        torch.cat([by_process[p][i].view(shapes[i][p]) for p in range(processes)], dim).to(parts[i])
        for i, dim in enumerate(dims)
    ]


def _shard_shapes(shape: Sequence[int], dim: int, processes: int) -> list[list[int]]:
    """Of each process, by the rule of `torch.chunk`: the last ones may be smaller, or empty."""
    size = shape[dim]
    edges = [min(size, -(-size // processes) * process) for process in range(processes + 1)]
    return [[*shape[:dim], stop - start, *shape[dim + 1 :]] for start, stop in pairwise(edges)]
