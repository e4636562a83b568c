import copy

import pytest
import torch
from family_sizes import BERT_SIZES, SWIN_SIZES
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from kron_hf import KronConfig, KronLinear, get_kron_model, kron_summary, model_flops
from kron_hf.summary import ModelFlops

# ViT of width 32 with 2 layers of 2 heads on images of 8 x 8, cut into 4 patches: 5 tokens with the class token.
PATCHES = 2 * 4 * (4 * 4) * 32
PROJECTIONS = 2 * 5 * (4 * 32 * 32 + 2 * 32 * 64)  # a layer
ATTENTION = 2 * (2 * 5 * 5 * 32)  # a layer: queries with keys, and their softmax with values
HEAD = 2 * 32 * 10  # on the class token alone


def tiny_vit():
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def image(batch=1):
    return torch.zeros(batch, 1, 8, 8)


def test_vit_by_hand():
    counted = model_flops(tiny_vit(), image())
    forward = PATCHES + 2 * (PROJECTIONS + ATTENTION) + HEAD
    assert counted == ModelFlops(forward=forward, backward=2 * forward - PATCHES)
    assert counted.training == 3 * forward - PATCHES


@pytest.mark.parametrize("batch", [1, 3])
def test_kronecker_layers_cost_what_the_summary_says(batch):
    model = get_kron_model(tiny_vit(), KronConfig(block_size=4, rank=1))
    converted = kron_summary(model).converted
    counted = model_flops(model, image(batch))
    rest = PATCHES + 2 * ATTENTION + HEAD
    assert counted.forward == batch * (5 * converted.forward_flops + rest)
    assert counted.training == batch * (5 * converted.training_flops + 3 * rest - PATCHES)


def test_one_token_by_hand():
    model = nn.Sequential(KronLinear(256, 8, (4, 16), rank=1, bias=False), nn.Linear(8, 3))
    kron = 2 * min(256 * 4 + 8 * 16, 256 * 2 + 8 * 16)
    assert model_flops(model, torch.zeros(1, 256)) == ModelFlops(kron + 48, kron + 2 * 48)  # no gradient of the input


def test_meta_device_counts_what_computing_counts():
    model = get_kron_model(tiny_vit(), KronConfig(block_size=(4, 8), rank=2))
    fc1 = model.vit.layers[0].mlp.fc1
    fc1.freeze_mask(torch.rand(fc1.s.shape) < 0.5)
    batch = {"pixel_values": image(2), "labels": torch.tensor([3, 5])}
    assert model_flops(model, batch) == model_flops(model, batch, compute=True) == model_flops(model, image(2))
    assert model_flops(copy.deepcopy(model).to("meta"), image(2).to("meta")) == model_flops(model, image(2))


@pytest.mark.parametrize("compute", [False, True], ids=["meta", "computed"])
def test_the_model_stays_as_it_is(compute):
    model = tiny_vit().train()
    model.classifier.eval()
    before = copy.deepcopy(model.state_dict())
    model_flops(model, image(), compute=compute)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None and not parameter.is_meta for parameter in model.parameters())
    assert (model.vit.training, model.classifier.training) == (True, False)


def test_frozen_parameters_have_no_gradient():
    model = tiny_vit()
    model.vit.requires_grad_(False)
    assert model_flops(model, image()).backward == HEAD  # of its weight
    model.requires_grad_(False)
    assert model_flops(model, image()).backward == 0


def test_checkpointing_does_not_count_though_gradients_do():
    class Checkpointed(nn.Linear):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False) if self.training else super().forward(x)

    with torch.no_grad():
        counted = model_flops(nn.Sequential(nn.Linear(4, 4), Checkpointed(4, 4)).train(), torch.zeros(1, 4))
    assert counted == ModelFlops(forward=64, backward=96)


def test_swin_windows():
    model = SwinForImageClassification(SwinConfig(**SWIN_SIZES, num_labels=4))
    counted = model_flops(model, torch.zeros(1, 3, 16, 16))
    patches = 2 * 64 * (3 * 2 * 2) * 32
    merging = 2 * 16 * 128 * 64
    first = 2 * 64 * 12 * 32 * 32 + 2 * 2 * 64 * 4 * 32  # 64 tokens in windows of 4
    second = 2 * 16 * 12 * 64 * 64 + 2 * 2 * 16 * 4 * 64
    assert counted.forward == patches + first + merging + second + 2 * 64 * 4


def test_models_that_look_at_values():
    model = BertForSequenceClassification(BertConfig(**BERT_SIZES))
    words = torch.ones(2, 7, dtype=torch.long)
    masked = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    with pytest.raises(
        ValueError, match=r"BertForSequenceClassification does not run on the meta device.*compute=True"
    ):
        model_flops(model, masked)
    assert model_flops(model, masked, compute=True) == model_flops(model, {"input_ids": words})


def test_errors_of_the_model_are_its_own():
    with pytest.raises(RuntimeError, match=r"reduction dim|cannot be multiplied|size mismatch") as caught:
        model_flops(nn.Linear(4, 2), torch.zeros(1, 5))
    assert caught.type is RuntimeError
    with pytest.raises(ValueError, match="x must have 8 features"):
        model_flops(KronLinear(8, 8, 4, 1), torch.zeros(1, 5))


def test_models_without_floating_point_output():
    class Best(nn.Module):
        def forward(self, x):
            return {"best": x.argmax(-1)}

    with pytest.raises(ValueError, match="Best gives back no floating point tensor"):
        model_flops(Best(), torch.zeros(1, 5))
