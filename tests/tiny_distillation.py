"""Tiny students and teachers, and batches for them, for the distillation tests."""

import torch
import transformers as hf
from family_sizes import BERT_SIZES, DINOV2_SIZES, SWIN_SIZES

from kron_hf import KronConfig, get_kron_model
from kron_hf.distillation.parts import cosine_distance, kl_divergence, relative_mse

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "num_labels": 4,
}
BACKBONES = {
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**SIZES)),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINOV2_SIZES)),
    "dinov2-backbone": lambda: hf.Dinov2Backbone(hf.Dinov2Config(**DINOV2_SIZES)),
    "swin": lambda: hf.SwinModel(hf.SwinConfig(**SWIN_SIZES)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**BERT_SIZES)),
}
HEADS = {
    "vit": lambda: vit(),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINOV2_SIZES)),
    "swin": lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN_SIZES)),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT_SIZES)),
}


def vit(**sizes):
    return hf.ViTForImageClassification(hf.ViTConfig(**{**SIZES, **sizes}))


def student(seed=1, teacher=False, **sizes):
    """A ViT in float64, with Kronecker layers unless it is the teacher."""
    torch.manual_seed(seed)
    model = vit(**sizes)
    return (model if teacher else get_kron_model(model, KronConfig(block_size=4, rank=1))).double()


def teacher(seed=0, **sizes):
    return student(seed, teacher=True, **sizes)


def images(size=32, labels=True):
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64)
    rows = [{"pixel_values": p, "labels": int(p[0, 0, :4].argmax())} for p in pixels]
    return rows if labels else [{"pixel_values": row["pixel_values"]} for row in rows]


def batch(rows):
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def inputs_of(model, size=2):
    """What a model of BACKBONES or HEADS takes; the second text is shorter."""
    if model.main_input_name == "input_ids":
        mask = torch.ones(size, 6, dtype=torch.long)
        mask[1, 3:] = 0
        return {"input_ids": torch.randint(5, 20, (size, 6)), "attention_mask": mask}
    config = model.config
    return {"pixel_values": torch.randn(size, config.num_channels, config.image_size, config.image_size)}


def vit_parts(own, other, rows, temperature=2.0):
    """The parts of a ViT by the formulas, from what its body and its head give."""
    states = []
    for model in (own, other):
        body = model.vit(batch(rows)["pixel_values"], output_hidden_states=True)
        states.append((body.last_hidden_state, body.hidden_states, model.classifier(body.last_hidden_state[:, 0])))
    (tokens, hidden, logits), (tokens2, hidden2, logits2) = states
    return {
        "logits": kl_divergence(logits, logits2, temperature),
        "tokens": relative_mse(tokens, tokens2),
        "cls": cosine_distance(tokens[:, 0], tokens2[:, 0]),
        "hidden": sum(relative_mse(a, b) for a, b in zip(hidden, hidden2, strict=True)) / len(hidden),
    }
