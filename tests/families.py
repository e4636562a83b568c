"""Tiny models of every family that is tested, built from their configs."""

from collections.abc import Callable

import torch
import transformers as hf
from torch import Tensor, nn

VIT_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}
DINOV2_SIZES = {key: value for key, value in VIT_SIZES.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
SWIN_SIZES = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 32,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
}
BERT_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
}

FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT_SIZES)),
    "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**VIT_SIZES)),
    "swin": lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN_SIZES)),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINOV2_SIZES)),
    "dinov2-swiglu": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINOV2_SIZES, use_swiglu_ffn=True)),
    "beit": lambda: hf.BeitForImageClassification(hf.BeitConfig(**VIT_SIZES)),
    "vit-msn": lambda: hf.ViTMSNForImageClassification(hf.ViTMSNConfig(**VIT_SIZES)),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT_SIZES)),
}


def example_input(model: nn.Module) -> dict[str, Tensor]:
    if model.config.model_type == "bert":
        return {"input_ids": torch.arange(8).view(2, 4)}
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of a headed model, last hidden state of a backbone."""
    result = model.eval()(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state
