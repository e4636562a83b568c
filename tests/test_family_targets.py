"""Every family: which modules the default converts, that they are trained, and the list in the README."""

import re
from pathlib import Path

import pytest
import readme_families
import torch
from families import ALL_FAMILIES, CONFIG, MORE_FAMILIES, convert, example_input, kron_layers, main_output, quietly
from torch import nn

from kron_hf import KronConfig
from kron_hf.targets import find_targets


def within(stack: str, *names: str) -> set[str]:
    return {f"{stack}.{name}" for name in names}


# Names of the projections in one layer, by style.
VIT = [*(f"attention.{letter}_proj" for letter in "qkvo"), "mlp.fc1", "mlp.fc2"]
CLIP = [*(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")), "mlp.fc1", "mlp.fc2"]
BERT = [
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
]
OLD_VIT = [name.replace("attention.self", "attention.attention") for name in BERT]
DETR = [*(f"self_attn.{letter}_proj" for letter in "qkvo"), "mlp.fc1", "mlp.fc2"]
DETR_DECODER = [*DETR, *(f"encoder_attn.{letter}_proj" for letter in "qkvo")]
PVT = [*BERT[:4], "mlp.dense1", "mlp.dense2"]
DISTILBERT = [*(f"attention.{name}_lin" for name in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2"]
T5_ATTENTION = [f"SelfAttention.{letter}" for letter in "qkvo"]
T5 = [*T5_ATTENTION, "DenseReluDense.wi", "DenseReluDense.wo"]
BART = [*CLIP[:4], "fc1", "fc2"]
BART_DECODER = [*BART, *(name.replace("self_attn", "encoder_attn") for name in CLIP[:4])]
SIGLIP_HEAD = ["head.attention.out_proj", "head.mlp.fc1", "head.mlp.fc2"]

# family: (projections that the default chooses, with * for a number; how many modules; every other nn.Linear)
EXPECTED: dict[str, tuple[set[str], int, set[str]]] = {
    "swinv2": (
        within("swinv2.encoder.layers.*.blocks.*", *BERT),
        12,
        within(
            "swinv2.encoder.layers.*",
            "blocks.*.attention.self.continuous_position_bias_mlp.*",
            "downsample.reduction",
        )
        | {"classifier"},
    ),
    "dinov2-registers": (within("dinov2_with_registers.encoder.layer.*", *VIT), 12, {"classifier"}),
    "dinov3": (within("model.layer.*", *VIT[:4], "mlp.up_proj", "mlp.down_proj"), 12, set()),
    "dinov3-gated": (
        within("model.layer.*", *VIT[:4], "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        14,
        set(),
    ),
    "vit-mae": (
        within("vit.layers.*", *VIT),
        12,
        within("decoder", "decoder_embed", "decoder_pred") | within("decoder.decoder_layers.*", *VIT),
    ),
    "vit-mae-encoder": (within("layers.*", *VIT), 12, set()),
    "data2vec-vision": (within("data2vec_vision.encoder.layer.*", *OLD_VIT), 12, {"classifier"}),
    "ijepa": (within("ijepa.layers.*", *VIT), 12, {"classifier"}),
    "hiera": (
        within("hiera.encoder.stages.*.layers.*", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
        8,
        {"classifier", "hiera.encoder.stages.*.layers.*.proj"},
    ),
    "vitdet": (within("encoder.layer.*", "attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2"), 8, set()),
    "clip": (
        within("vision_model.encoder.layers.*", *CLIP) | within("text_model.encoder.layers.*", *CLIP),
        24,
        {"visual_projection", "text_projection"},
    ),
    "clip-vision": (within("encoder.layers.*", *CLIP), 12, set()),
    "clip-vision-projection": (within("vision_model.encoder.layers.*", *CLIP), 12, {"visual_projection"}),
    "clip-classifier": (within("vision_model.encoder.layers.*", *CLIP), 12, {"classifier"}),
    "siglip": (
        within("vision_model.encoder.layers.*", *CLIP) | within("text_model.encoder.layers.*", *CLIP),
        24,
        within("vision_model", *SIGLIP_HEAD) | {"text_model.head"},
    ),
    "siglip-vision": (within("encoder.layers.*", *CLIP), 12, set(SIGLIP_HEAD)),
    "siglip-classifier": (
        within("vision_model.encoder.layers.*", *CLIP),
        12,
        within("vision_model", *SIGLIP_HEAD) | {"classifier"},
    ),
    "siglip2-classifier": (
        within("vision_model.encoder.layers.*", *CLIP),
        12,
        within("vision_model", *SIGLIP_HEAD, "embeddings.patch_embedding") | {"classifier"},
    ),
    "blip-vision": (
        within("encoder.layers.*", "self_attn.qkv", "self_attn.projection", "mlp.fc1", "mlp.fc2"),
        8,
        set(),
    ),
    "yolos": (
        within("vit.encoder.layer.*", *OLD_VIT),
        12,
        {"class_labels_classifier.layers.*", "bbox_predictor.layers.*"},
    ),
    "detr": (
        within("model.encoder.layers.*", *DETR) | within("model.decoder.layers.*", *DETR_DECODER),
        32,
        {"class_labels_classifier", "bbox_predictor.layers.*"},
    ),
    "maskformer": (
        within("model.pixel_level_module.encoder.model.encoder.layers.*.blocks.*", *BERT)
        | within("model.transformer_module.decoder.layers.*", *DETR_DECODER),
        44,
        {
            "class_predictor",
            "mask_embedder.*.*",
            "model.pixel_level_module.encoder.model.encoder.layers.*.downsample.reduction",
        },
    ),
    "mask2former": (
        within("model.pixel_level_module.encoder.swin.encoder.layers.*.blocks.*", *VIT)
        | within(
            "model.pixel_level_module.decoder.encoder.layers.*",
            *("self_attn.value_proj", "self_attn.output_proj", "fc1", "fc2"),
        )
        | within("model.transformer_module.decoder.layers.*", *CLIP[:4], "fc1", "fc2"),
        34,
        {
            "class_predictor",
            "model.pixel_level_module.decoder.encoder.layers.*.self_attn.attention_weights",
            "model.pixel_level_module.decoder.encoder.layers.*.self_attn.sampling_offsets",
            "model.pixel_level_module.encoder.swin.encoder.layers.*.downsample.reduction",
            "model.transformer_module.decoder.layers.*.cross_attn.out_proj",
            "model.transformer_module.decoder.mask_predictor.mask_embedder.*.*",
        },
    ),
    "segformer": (within("segformer.stages.*.blocks.*", *VIT), 24, {"decode_head.linear_projections.*.proj"}),
    "segformer-classifier": (within("segformer.stages.*.blocks.*", *VIT), 24, {"classifier"}),
    "dpt-hybrid": (within("dpt.encoder.layer.*", *OLD_VIT), 24, {"neck.reassemble_stage.readout_projects.*.*"}),
    "cvt": (
        within(
            "cvt.encoder.stages.*.layers.*",
            *(f"attention.attention.projection_{name}" for name in ("query", "key", "value")),
            *BERT[3:],
        ),
        36,
        {"classifier"},
    ),
    "levit": (
        within(
            "levit.encoder.stages.*.layers.*",
            *(f"{name}.linear" for name in ("queries", "keys_values", "projection")),
            *(f"module.{name}.linear" for name in ("queries_keys_values", "projection", "linear_up", "linear_down")),
        ),
        22,
        {"classifier.linear"},
    ),
    "mobilevit": (within("mobilevit.encoder.layer.*.transformer.layer.*", *OLD_VIT), 54, {"classifier"}),
    "pvt": (within("pvt.encoder.block.*.*", *PVT), 24, {"classifier"}),
    "pvt-v2": (
        within(
            "pvt_v2.encoder.layers.*.blocks.*",
            *(f"attention.{name}" for name in ("query", "key", "value", "proj")),
            *PVT[4:],
        ),
        24,
        {"classifier"},
    ),
    "swiftformer": (
        within(
            "swiftformer.encoder.network.*.blocks.*",
            *(f"attn.{name}" for name in ("to_query", "to_key", "proj", "final")),
        ),
        16,
        {"head", "dist_head"},
    ),
    "videomae": (within("videomae.encoder.layer.*", *OLD_VIT), 12, {"classifier"}),
    "vivit": (within("vivit.layers.*", *VIT), 12, {"classifier"}),
    "ast": (within("audio_spectrogram_transformer.layers.*", *VIT), 12, {"classifier.dense"}),
    "bert-mlm": (
        within("bert.encoder.layer.*", *BERT),
        12,
        {"cls.predictions.transform.dense", "cls.predictions.decoder"},
    ),
    "distilbert": (within("distilbert.transformer.layer.*", *DISTILBERT), 12, {"pre_classifier", "classifier"}),
    "distilbert-mlm": (
        within("distilbert.transformer.layer.*", *DISTILBERT),
        12,
        {"vocab_transform", "vocab_projector"},
    ),
    "roberta": (within("roberta.encoder.layer.*", *BERT), 12, {"classifier.dense", "classifier.out_proj"}),
    "roberta-mlm": (within("roberta.encoder.layer.*", *BERT), 12, {"lm_head.dense", "lm_head.decoder"}),
    "electra": (within("electra.encoder.layer.*", *BERT), 12, {"classifier.dense", "classifier.out_proj"}),
    "albert": (  # all layers share one
        within(
            "albert.encoder.albert_layer_groups.*.albert_layers.*",
            *(f"attention.{name}" for name in ("query", "key", "value", "dense")),
            *("ffn", "ffn_output"),
        ),
        6,
        {"albert.encoder.embedding_hidden_mapping_in", "albert.pooler", "classifier"},
    ),
    "modernbert": (
        within("model.layers.*", "attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"),
        8,
        {"head.dense", "classifier"},
    ),
    "t5": (
        within("encoder.block.*.layer.*", *T5)
        | within("decoder.block.*.layer.*", *T5, *(name.replace("Self", "EncDec") for name in T5_ATTENTION)),
        32,
        {"lm_head"},
    ),
    "t5-gated": (
        within(
            "encoder.block.*.layer.*", *T5_ATTENTION, *(f"DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo"))
        ),
        14,
        set(),
    ),
    "bart": (
        within("model.encoder.layers.*", *BART) | within("model.decoder.layers.*", *BART_DECODER),
        32,
        {"lm_head"},
    ),
    "mbart": (
        within("model.encoder.layers.*", *BART) | within("model.decoder.layers.*", *BART_DECODER),
        32,
        {"lm_head"},
    ),
}
# DETR's queries start at zero: so do the values of the first self-attention, and what they would pass on.
NO_GRADIENT = {
    family: within(f"{decoder}.layers.0", *DETR[:4])
    for family, decoder in {"detr": "model.decoder", "maskformer": "model.transformer_module.decoder"}.items()
}


def numberless(names) -> set[str]:
    return {re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names}


def chosen_names(model) -> list[str]:
    with quietly():
        return [target.name for target in find_targets(model, CONFIG)]


# Which modules


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_the_default_is_exactly_the_projections(family):
    model = MORE_FAMILIES[family]()
    chosen = chosen_names(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    projections, count, others = EXPECTED[family]
    assert numberless(chosen) == projections
    assert len(chosen) == count
    assert numberless(linears - set(chosen)) == others


@pytest.mark.parametrize("family", ["clip-classifier", "siglip-classifier", "siglip2-classifier"])
def test_all_linear_leaves_the_head_of_a_model_without_a_backbone(family):
    config = KronConfig(block_size=(2, 8), rank=1, target_modules="all-linear", exclude_modules=r".*head\..*")
    names = {target.name for target in find_targets(MORE_FAMILIES[family](), config)}
    assert numberless(names) - EXPECTED[family][0] <= {"vision_model.embeddings.patch_embedding"}


def test_a_multihead_attention_in_the_decoder_is_left_with_a_warning_and_refused_by_name():
    model = MORE_FAMILIES["mask2former"]()
    with pytest.warns(UserWarning, match=r"cross_attn\.out_proj: MultiheadAttention reads its weight directly"):
        find_targets(model, CONFIG)
    with pytest.raises(ValueError, match=r"cross_attn\.out_proj: MultiheadAttention reads its weight directly"):
        find_targets(model, KronConfig(block_size=4, rank=1, target_modules=["cross_attn.out_proj"]))


# Training


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_factor_is_trained_where_the_dense_weight_is(family):
    model = ALL_FAMILIES[family]()
    inputs, names = example_input(model), chosen_names(model)
    backward(model, inputs)
    trained = {name for name in names if has_gradient(model.get_submodule(name).weight)}
    assert set(names) - trained == NO_GRADIENT.get(family, set())
    convert(model)
    assert list(kron_layers(model)) == names
    backward(model, inputs)
    for name, layer in kron_layers(model).items():
        for factor in (layer.s, layer.a, layer.b):
            assert has_gradient(factor) == (name in trained), name


def backward(model, inputs):
    model.train().zero_grad()
    torch.manual_seed(0)
    main_output(model(**inputs)).square().mean().backward()


def has_gradient(parameter) -> bool:
    assert parameter.grad is None or parameter.grad.isfinite().all()
    return parameter.grad is not None and bool(parameter.grad.any())


# README


def test_readme_lists_what_is_tested():
    path = Path(__file__).parent.parent / "README.md"
    message = "README.md differs from the tested families; run `python tests/readme_families.py`"
    assert readme_families.updated(path.read_text()) == path.read_text(), message
