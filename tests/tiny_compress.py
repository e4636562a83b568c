"""The smallest `kron-hf compress`: the digits, and a ViT of one layer that has been trained on them for a moment."""

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from kron_hf.data.grey import load_grey_set

SIZES = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.1,
}
NAMES = [str(digit) for digit in range(10)]
QUIET = ("--use-cpu", "--disable-tqdm")


def classifier(names=NAMES):
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    return ViTForImageClassification(ViTConfig(**SIZES, **labels)).eval()


def digits(split):
    """Pixels as the image processor makes them that suits the config, and labels."""
    images, labels = getattr(load_grey_set("digits"), split)
    pixels = (images[:, None].astype(np.float32) / 255 - 0.5) / 0.5
    return torch.tensor(pixels), torch.tensor(labels)


def trained(steps=80):
    model, (pixels, labels) = classifier(), digits("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(steps):
        rows = torch.arange(128 * step, 128 * (step + 1)) % len(pixels)
        optimizer.zero_grad()
        cross_entropy(model(pixel_values=pixels[rows]).logits, labels[rows]).backward()
        optimizer.step()
    return model


def command(model, output_dir, *more, distill=6, finetune=6):
    return [
        *("compress", "--model", str(model), "--dataset", "digits", "--output-dir", str(output_dir)),
        *("--calibration-images", "128", "--batch-size", "32", "--save-steps", "3", *QUIET),
        *("--distill-steps", str(distill), "--finetune-steps", str(finetune), *map(str, more)),
    ]
