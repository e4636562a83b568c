import copy

import pytest
import torch
from tiny_training import TinyKron, masks, train
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kron_hf.layers import KronLinear
from kron_hf.sparsity import Sparsifier
from kron_hf.sparsity.masks import copy_masks, pack_mask, unpack_mask
from kron_hf.sparsity.pruning import model_sparsity


def test_an_ema_begun_before_the_freeze_takes_the_masks_over():
    model = TinyKron()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    Sparsifier(model, target_sparsity=0.5, total_steps=40).attach(optimizer)
    train(model, optimizer, range(40), after_step=lambda: average.update_parameters(model))
    assert model_sparsity(average) == 0.0
    alive = average.module.fc1.s[model.fc1.block_mask].clone()
    copy_masks(model, average)
    assert all(torch.equal(a, b) for a, b in zip(masks(average), masks(model), strict=True))
    assert torch.equal(average.module.fc1.s[model.fc1.block_mask], alive)
    assert torch.equal(average.module.state_dict()["fc1.s"] == 0, ~model.fc1.block_mask)
    average.update_parameters(model)
    assert model_sparsity(average) == 0.5


def test_masks_that_the_source_lacks_are_lifted():
    model, other = TinyKron(), TinyKron()
    other.fc1.freeze_mask(torch.ones(8, 4, dtype=torch.bool))
    copy_masks(model, other)
    assert other.fc1.dead_blocks is None


def test_copies_are_independent():
    model = TinyKron()
    model.fc1.freeze_mask(torch.eye(8, 4).bool())
    other = copy.deepcopy(model)
    copy_masks(model, other)
    other.fc1.dead_blocks.fill_(True)
    assert model.fc1.dead_blocks.sum() == 4


def test_other_layers_raise():
    with pytest.raises(ValueError, match=r"source has S of shapes \[\[2, 2\]\], target \[\[4, 4\]\]"):
        copy_masks(KronLinear(8, 8, 4, 1), KronLinear(8, 8, 2, 1))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 4)])
def test_packed_masks_round_trip(shape):
    mask = torch.rand(shape) < 0.5
    assert torch.equal(unpack_mask(pack_mask(mask), torch.empty(shape)), mask)
