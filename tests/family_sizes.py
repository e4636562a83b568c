"""Tiny sizes for the configs of transformers."""

import transformers as hf

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

# Sizes of single families, where they differ from those above.
MAE_DECODER_SIZES = {f"decoder_{key}": value for key, value in VIT_SIZES.items() if not key.endswith("_size")} | {
    "decoder_hidden_size": 32,
    "decoder_intermediate_size": 64,
}
AST_SIZES = {
    "max_length": 16,
    "num_mel_bins": 16,
    "frequency_stride": 8,
    "time_stride": 8,
    **{key: value for key, value in VIT_SIZES.items() if key != "image_size"},
}
DISTILBERT_SIZES = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 48}
TEXT_TOWER = {**BERT_SIZES, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
TWO_TOWERS = {"vision_config": VIT_SIZES, "text_config": TEXT_TOWER}
T5_SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
BART_SIZES = {"d_model": 32, "vocab_size": 50, "max_position_embeddings": 16} | {
    f"{half}_{name}": size
    for half in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))
}
PYRAMID_SIZES = {
    "image_size": 64,
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
}
LEVIT_SIZES = {
    "image_size": 64,
    "hidden_sizes": [32, 32, 32],
    "num_attention_heads": [2, 2, 2],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
    "mlp_ratio": [2, 2, 2],
    "attention_ratio": [2, 2, 2],
}
MOBILEVIT_SIZES = {
    "image_size": 128,
    "hidden_sizes": [32, 32, 32],
    "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 32],
    "num_attention_heads": 2,
}
HIERA_SIZES = {
    "embed_dim": 16,
    "image_size": [32, 32],
    "depths": [1, 1],
    "num_heads": [1, 2],
    "query_stride": [2, 2],
    "masked_unit_size": [4, 4],
    "num_query_pool": 1,
}
RESNET_SIZES = {
    "embedding_size": 8,
    "hidden_sizes": [8, 8],
    "depths": [1, 1],
    "layer_type": "basic",
    "out_features": ["stage2"],
}


def detr_config() -> hf.DetrConfig:
    sides = ("encoder", "decoder")
    sizes = {f"{side}_{key}": value for side in sides for key, value in [("layers", 2), ("attention_heads", 2)]}
    sizes |= {f"{side}_ffn_dim": 64 for side in sides}
    return hf.DetrConfig(d_model=32, num_queries=5, backbone_config=hf.ResNetConfig(**RESNET_SIZES), **sizes)


def four_stage_swin() -> hf.SwinConfig:
    stages = [f"stage{number}" for number in range(1, 5)]
    sizes = SWIN_SIZES | {"image_size": 32, "depths": [1] * 4, "num_heads": [2] * 4}
    return hf.SwinConfig(**sizes, out_features=stages)


def mask2former_config() -> hf.Mask2FormerConfig:
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    sizes |= {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 5}
    sizes |= {"encoder_feedforward_dim": 64, "dim_feedforward": 64}
    return hf.Mask2FormerConfig(backbone_config=four_stage_swin(), **sizes)


def dpt_hybrid_config() -> hf.DPTConfig:
    stages = [f"stage{number}" for number in range(1, 4)]
    bit = hf.BitConfig(embedding_size=8, hidden_sizes=[8] * 3, depths=[1] * 3, num_groups=2, out_features=stages)
    sizes = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "backbone_out_indices": [0, 1, 2, 3]}
    sizes |= VIT_SIZES | {"num_hidden_layers": 4, "image_size": 32, "patch_size": 16}
    return hf.DPTConfig(**sizes, is_hybrid=True, backbone_config=bit, backbone_featmap_shape=[1, 8, 2, 2])
