"""Small models with trained-like weights, and data, for the tests of calibration."""

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    Dinov2Config,
    Dinov2Model,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"image_size": 16, "patch_size": 4, "num_channels": 1}


def vit(seed: int = 0, **sizes: int) -> ViTForImageClassification:
    torch.manual_seed(seed)
    config = ViTConfig(**(SMALL | IMAGES | {"intermediate_size": 64} | sizes), num_labels=3, initializer_range=0.2)
    return ViTForImageClassification(config).eval()


def dinov2(seed: int = 0) -> Dinov2Model:
    """With a LayerScale that differs between features."""
    torch.manual_seed(seed)
    model = Dinov2Model(Dinov2Config(**SMALL, **IMAGES, mlp_ratio=2, initializer_range=0.2)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lambda1"):
                parameter.uniform_(0.1, 2.0)
    return model


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(**SMALL, intermediate_size=64, vocab_size=50, max_position_embeddings=16, initializer_range=0.2)
    return BertForSequenceClassification(config).eval()


def t5(seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def bart(seed: int = 0) -> BartForConditionalGeneration:
    torch.manual_seed(seed)
    halves = ("encoder", "decoder")
    sizes = {f"{half}_{name}": size for half in halves for name, size in (("layers", 1), ("attention_heads", 2))}
    sizes |= {f"{half}_ffn_dim": 64 for half in halves}
    config = BartConfig(**sizes, d_model=32, vocab_size=50, max_position_embeddings=16, init_std=0.2)
    return BartForConditionalGeneration(config).eval()


def swin(seed: int = 0) -> SwinForImageClassification:
    torch.manual_seed(seed)
    config = SwinConfig(
        image_size=16, patch_size=2, num_channels=1, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4
    )
    return SwinForImageClassification(config).eval()


def pixels(count: int, seed: int = 0) -> Tensor:
    """Images whose neighbouring pixels resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear") + 0.1 * torch.randn(
        count, 1, 16, 16, generator=generator
    )


def image_batches(count: int = 24, size: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    return [{"pixel_values": part} for part in pixels(count, seed).split(size)]


def text_batches(count: int = 24, size: int = 8) -> list[dict[str, Tensor]]:
    """Sentences of several lengths, padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (count, 12), generator=generator)
    lengths = torch.randint(4, 13, (count, 1), generator=generator)
    mask = (torch.arange(12) < lengths).long()
    batches = zip((ids * mask).split(size), mask.split(size), strict=True)
    return [{"input_ids": part, "attention_mask": alive} for part, alive in batches]


def translations(lengths: tuple[int, int], *, padded: int = 9, count: int = 16) -> dict[str, Tensor]:
    """A batch of texts and their labels of these lengths, both padded."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(3, 50, (2, count, padded), generator=generator).unbind()
    mask, answered = ((torch.arange(padded) < length).long().expand(count, -1) for length in lengths)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels.where(answered > 0, -100)}
