"""What is compared of a model, and what a teacher is given."""

import pytest
import torch
from torch import nn

from kron_hf.distillation.states import as_tokens, softmax_logits, token_mask
from kron_hf.distillation.teacher import Teacher


def test_tokens_of_feature_maps_and_single_vectors():
    maps = torch.randn(2, 3, 4, 5)
    tokens = as_tokens(maps)
    assert tokens.shape == (2, 20, 3)
    assert torch.equal(tokens[1, 7], maps[1, :, 1, 2])
    assert torch.equal(as_tokens(maps[:, :, 0, 0]), maps[:, None, :, 0, 0])
    assert as_tokens(tokens) is tokens


def test_logits_of_each_pixel_have_their_classes_last():
    logits = torch.randn(2, 3, 4, 5)
    found = softmax_logits(nn.Identity(), logits)
    assert torch.equal(found[1, 7], logits[1, :, 1, 2])
    assert softmax_logits(nn.Identity(), logits[:, :1]) is None  # one class has no softmax


def test_a_mask_of_other_tokens_is_refused():
    inputs = {"attention_mask": torch.ones(2, 7)}
    assert token_mask(inputs, torch.zeros(2, 7, 3)) is inputs["attention_mask"]
    assert token_mask(inputs, torch.zeros(2, 3)) is None
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, tokens\] = \[2, 5\] .* got \[2, 7\]"):
        token_mask(inputs, torch.zeros(2, 5, 3))


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_a_teacher_is_given_the_inputs_of_the_model_in_its_dtype(encoder_decoder):
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1).double()
            self.config = type("Config", (), {"is_encoder_decoder": encoder_decoder})()

        def forward(self, **given):
            self.given = given
            return {}

    model = Given()
    inputs = {"pixel_values": torch.ones(2), "input_ids": torch.ones(2, dtype=torch.long), "labels": torch.ones(2)}
    inputs |= {
        "start_positions": torch.ones(2),
        "num_items_in_batch": 3,
        "return_dict": False,
        "output_attentions": True,
    }
    Teacher(model, hidden=False).states(inputs)
    expected = {"pixel_values", "input_ids"} | ({"labels", "start_positions"} if encoder_decoder else set())
    assert set(model.given) == expected
    assert {name: value.dtype for name, value in model.given.items()} == {
        name: torch.long if name == "input_ids" else torch.float64 for name in expected
    }
