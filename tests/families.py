"""Tiny models of every family that is tested, built from their configs."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers as hf
from family_sizes import (
    AST_SIZES,
    BART_SIZES,
    BERT_SIZES,
    DINOV2_SIZES,
    DISTILBERT_SIZES,
    HIERA_SIZES,
    LEVIT_SIZES,
    MAE_DECODER_SIZES,
    MOBILEVIT_SIZES,
    PYRAMID_SIZES,
    SWIN_SIZES,
    T5_SIZES,
    TWO_TOWERS,
    VIT_SIZES,
    detr_config,
    dpt_hybrid_config,
    four_stage_swin,
    mask2former_config,
)
from torch import Tensor, nn

from kron_hf import KronConfig, KronLinear, get_kron_model


@dataclass(frozen=True)
class Family:
    """A class of transformers at a tiny size.

    Args:
        title: Name of the architecture, as its authors write it.
        build: Makes the model from its config.
        loader: The class of transformers that users load it with.
    """

    title: str
    build: Callable[[], hf.PreTrainedModel]
    loader: str = "AutoModelForImageClassification"

    def __call__(self) -> hf.PreTrainedModel:
        return self.build()


# The families that the tests of every part run over.
FAMILIES: dict[str, Family] = {
    "vit": Family("ViT", lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT_SIZES))),
    "deit": Family("DeiT", lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**VIT_SIZES))),
    "swin": Family("Swin", lambda: hf.SwinForImageClassification(hf.SwinConfig(**SWIN_SIZES))),
    "dinov2": Family("DINOv2", lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINOV2_SIZES))),
    "dinov2-swiglu": Family(
        "DINOv2, SwiGLU",
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINOV2_SIZES, use_swiglu_ffn=True)),
    ),
    "beit": Family("BEiT", lambda: hf.BeitForImageClassification(hf.BeitConfig(**VIT_SIZES))),
    "vit-msn": Family("ViT-MSN", lambda: hf.ViTMSNForImageClassification(hf.ViTMSNConfig(**VIT_SIZES))),
    "bert": Family(
        "BERT",
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT_SIZES)),
        "AutoModelForSequenceClassification",
    ),
}

# Further ones: targets, round trips and training are tested for each of these, too.
MORE_FAMILIES: dict[str, Family] = {
    "swinv2": Family("Swin V2", lambda: hf.Swinv2ForImageClassification(hf.Swinv2Config(**SWIN_SIZES))),
    "dinov2-registers": Family(
        "DINOv2 with registers",
        lambda: hf.Dinov2WithRegistersForImageClassification(hf.Dinov2WithRegistersConfig(**DINOV2_SIZES)),
    ),
    "dinov3": Family("DINOv3 ViT", lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VIT_SIZES)), "AutoModel"),
    "dinov3-gated": Family(
        "DINOv3 ViT, gated MLP",
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VIT_SIZES, use_gated_mlp=True)),
        "AutoModel",
    ),
    "vit-mae": Family(
        "ViT-MAE",
        lambda: hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**VIT_SIZES, **MAE_DECODER_SIZES)),
        "AutoModelForPreTraining",
    ),
    "vit-mae-encoder": Family("ViT-MAE, encoder", lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**VIT_SIZES)), "AutoModel"),
    "data2vec-vision": Family(
        "Data2Vec vision", lambda: hf.Data2VecVisionForImageClassification(hf.Data2VecVisionConfig(**VIT_SIZES))
    ),
    "ijepa": Family("I-JEPA", lambda: hf.IJepaForImageClassification(hf.IJepaConfig(**VIT_SIZES))),
    "hiera": Family("Hiera", lambda: hf.HieraForImageClassification(hf.HieraConfig(**HIERA_SIZES))),
    "vitdet": Family(
        "ViTDet", lambda: hf.VitDetModel(hf.VitDetConfig(**DINOV2_SIZES, pretrain_image_size=16)), "AutoModel"
    ),
    "clip": Family("CLIP", lambda: hf.CLIPModel(hf.CLIPConfig(**TWO_TOWERS)), "AutoModel"),
    "clip-vision": Family(
        "CLIP, vision tower", lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT_SIZES)), "CLIPVisionModel"
    ),
    "clip-vision-projection": Family(
        "CLIP, vision tower with projection",
        lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**VIT_SIZES)),
        "CLIPVisionModelWithProjection",
    ),
    "clip-classifier": Family("CLIP, classifier", lambda: hf.CLIPForImageClassification(hf.CLIPConfig(**TWO_TOWERS))),
    "siglip": Family("SigLIP", lambda: hf.SiglipModel(hf.SiglipConfig(**TWO_TOWERS)), "AutoModel"),
    "siglip-vision": Family(
        "SigLIP, vision tower", lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VIT_SIZES)), "SiglipVisionModel"
    ),
    "siglip-classifier": Family(
        "SigLIP, classifier", lambda: hf.SiglipForImageClassification(hf.SiglipConfig(**TWO_TOWERS))
    ),
    "siglip2-classifier": Family(
        "SigLIP 2, classifier",
        lambda: hf.Siglip2ForImageClassification(
            hf.Siglip2Config(**{**TWO_TOWERS, "vision_config": {**VIT_SIZES, "num_patches": 4}})
        ),
    ),
    "blip-vision": Family(
        "BLIP, vision tower", lambda: hf.BlipVisionModel(hf.BlipVisionConfig(**VIT_SIZES)), "BlipVisionModel"
    ),
    "yolos": Family(
        "YOLOS",
        lambda: hf.YolosForObjectDetection(
            hf.YolosConfig(**{**VIT_SIZES, "image_size": [16, 16]}, num_detection_tokens=4)
        ),
        "AutoModelForObjectDetection",
    ),
    "detr": Family("DETR", lambda: hf.DetrForObjectDetection(detr_config()), "AutoModelForObjectDetection"),
    "maskformer": Family(
        "MaskFormer",
        lambda: hf.MaskFormerForInstanceSegmentation(
            hf.MaskFormerConfig(
                backbone_config=four_stage_swin(),
                decoder_config=detr_config(),
                fpn_feature_size=32,
                mask_feature_size=32,
            )
        ),
        "AutoModelForInstanceSegmentation",
    ),
    "mask2former": Family(
        "Mask2Former",
        lambda: hf.Mask2FormerForUniversalSegmentation(mask2former_config()),
        "AutoModelForUniversalSegmentation",
    ),
    "segformer": Family(
        "SegFormer",
        lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**PYRAMID_SIZES, decoder_hidden_size=32)),
        "AutoModelForSemanticSegmentation",
    ),
    "segformer-classifier": Family(
        "SegFormer, classifier", lambda: hf.SegformerForImageClassification(hf.SegformerConfig(**PYRAMID_SIZES))
    ),
    "dpt-hybrid": Family(
        "DPT-hybrid (BiT + ViT)",
        lambda: hf.DPTForDepthEstimation(dpt_hybrid_config()),
        "AutoModelForDepthEstimation",
    ),
    "cvt": Family(
        "CvT",
        lambda: hf.CvtForImageClassification(
            hf.CvtConfig(embed_dim=[16, 32, 32], num_heads=[1, 2, 2], depth=[1, 2, 3], mlp_ratio=[2.0, 2.0, 2.0])
        ),
    ),
    "levit": Family("LeViT", lambda: hf.LevitForImageClassification(hf.LevitConfig(**LEVIT_SIZES))),
    "mobilevit": Family("MobileViT", lambda: hf.MobileViTForImageClassification(hf.MobileViTConfig(**MOBILEVIT_SIZES))),
    "pvt": Family("PVT", lambda: hf.PvtForImageClassification(hf.PvtConfig(**PYRAMID_SIZES))),
    "pvt-v2": Family("PVT v2", lambda: hf.PvtV2ForImageClassification(hf.PvtV2Config(**PYRAMID_SIZES))),
    "swiftformer": Family(
        "SwiftFormer",
        lambda: hf.SwiftFormerForImageClassification(
            hf.SwiftFormerConfig(image_size=32, depths=[1, 1, 1, 1], embed_dims=[8, 16, 16, 32])
        ),
    ),
    "videomae": Family(
        "VideoMAE",
        lambda: hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**VIT_SIZES, num_frames=2)),
        "AutoModelForVideoClassification",
    ),
    "vivit": Family(
        "ViViT",
        lambda: hf.VivitForVideoClassification(hf.VivitConfig(**VIT_SIZES, num_frames=2, tubelet_size=[2, 8, 8])),
        "AutoModelForVideoClassification",
    ),
    "ast": Family(
        "AST (audio)",
        lambda: hf.ASTForAudioClassification(hf.ASTConfig(**AST_SIZES)),
        "AutoModelForAudioClassification",
    ),
    "bert-mlm": Family(
        "BERT, masked LM", lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT_SIZES)), "AutoModelForMaskedLM"
    ),
    "distilbert": Family(
        "DistilBERT",
        lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTILBERT_SIZES)),
        "AutoModelForSequenceClassification",
    ),
    "distilbert-mlm": Family(
        "DistilBERT, masked LM",
        lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(**DISTILBERT_SIZES)),
        "AutoModelForMaskedLM",
    ),
    "roberta": Family(
        "RoBERTa",
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**BERT_SIZES)),
        "AutoModelForSequenceClassification",
    ),
    "roberta-mlm": Family(
        "RoBERTa, masked LM", lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**BERT_SIZES)), "AutoModelForMaskedLM"
    ),
    "electra": Family(
        "ELECTRA",
        lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**BERT_SIZES, embedding_size=32)),
        "AutoModelForSequenceClassification",
    ),
    "albert": Family(
        "ALBERT",
        lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**BERT_SIZES, embedding_size=16)),
        "AutoModelForSequenceClassification",
    ),
    "modernbert": Family(
        "ModernBERT",
        lambda: hf.ModernBertForSequenceClassification(
            hf.ModernBertConfig(
                **BERT_SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
            )
        ),
        "AutoModelForSequenceClassification",
    ),
    "t5": Family(
        "T5",
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5_SIZES, decoder_start_token_id=0)),
        "AutoModelForSeq2SeqLM",
    ),
    "t5-gated": Family(
        "T5, gated MLP, encoder",
        lambda: hf.T5EncoderModel(hf.T5Config(**T5_SIZES, feed_forward_proj="gated-gelu")),
        "T5EncoderModel",
    ),
    "bart": Family(
        "BART", lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART_SIZES)), "AutoModelForSeq2SeqLM"
    ),
    "mbart": Family(
        "mBART", lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**BART_SIZES)), "AutoModelForSeq2SeqLM"
    ),
}
ALL_FAMILIES = FAMILIES | MORE_FAMILIES


CONFIG = KronConfig(block_size=(4, 8), rank=1)


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warning about modules whose weight is read directly: Mask2Former has some."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Left dense: .* reads its weight directly")
        yield


def convert(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    with quietly():
        return get_kron_model(model, CONFIG)


def kron_layers(model: nn.Module) -> dict[str, KronLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, KronLinear)}


def example_input(model: nn.Module) -> dict[str, Tensor]:
    """A batch of two of whatever the forward takes."""
    wanted = inspect.signature(model.forward).parameters
    inputs: dict[str, Tensor] = {}
    if "input_ids" in wanted:
        inputs["input_ids"] = torch.arange(8).view(2, 4)
    if "decoder_input_ids" in wanted:
        inputs["decoder_input_ids"] = torch.arange(6).view(2, 3)
    if "input_values" in wanted:
        inputs["input_values"] = _noise(2, 16, 16)
    if "spatial_shapes" in wanted:  # SigLIP 2 takes images as patches
        inputs |= {"pixel_values": _noise(2, 4, 3 * 8 * 8), "spatial_shapes": torch.full((2, 2), 2)}
        inputs["pixel_attention_mask"] = torch.ones(2, 4, dtype=torch.long)
    elif "pixel_values" in wanted:
        frames = [model.config.num_frames] if hasattr(model.config, "num_frames") else []
        inputs["pixel_values"] = _noise(2, *frames, 3, _image_size(model), _image_size(model))
    if "noise" in wanted:  # that of MAE's random masking
        inputs["noise"] = torch.linspace(0, 1, 8).view(2, 4)
    return inputs


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _image_size(model: nn.Module) -> int:
    size = getattr(getattr(model.config, "vision_config", model.config), "image_size", 32)
    return size if isinstance(size, int) else size[0]


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of a headed model, last hidden state of a backbone, else the first output."""
    return main_output(model.eval()(**inputs))


def main_output(result: hf.utils.ModelOutput) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if name in result:
            return result[name]
    first = result.to_tuple()[0]
    return first if isinstance(first, Tensor) else first[-1]
