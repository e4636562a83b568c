"""Tiny models with convolutions, and how each is converted."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from kron_hf import KronConfig, KronConv2d, get_kron_model
from kron_hf.sparsity.pruning import kron_layers


class LeNetConfig(hf.PreTrainedConfig):
    """LeNet-5 has no class in transformers; this one saves and loads it."""

    model_type = "lenet5"


class LeNet(hf.PreTrainedModel):
    """LeCun et al. (1998), for images of 28 x 28."""

    config_class = LeNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: LeNetConfig) -> None:
        super().__init__(config)
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        hidden = torch.max_pool2d(torch.relu(self.conv1(pixel_values)), 2)
        hidden = torch.max_pool2d(torch.relu(self.conv2(hidden)), 2).flatten(1)
        hidden = torch.relu(self.fc2(torch.relu(self.fc1(hidden))))
        logits = self.fc3(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return hf.modeling_outputs.ImageClassifierOutput(loss=loss, logits=logits)


class UnevenConv(nn.Module):
    """S of 5 and 1 block rows: shards of different sizes, and an empty one on the second of two processes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1 = KronConv2d(4, 20, 3, block_size=(4, 1), rank=3, padding=1)
        self.norm = nn.GroupNorm(1, 20)
        self.fc2 = KronConv2d(20, 16, 2, block_size=(16, 4), rank=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The loss for rows of 16 values, seen as 4 channels of 2 x 2."""
        hidden = torch.tanh(self.norm(self.fc1(x.view(-1, 4, 2, 2))))
        return nn.functional.cross_entropy(self.head(torch.tanh(self.fc2(hidden)).flatten(1)).float(), labels)


@dataclass(frozen=True)
class ConvModel:
    """A model, what of it is named, and the size of its images."""

    config: hf.PreTrainedConfig
    kind: type[hf.PreTrainedModel]
    size: tuple[int, int, int]
    kron: dict[str, Any]
    others: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> hf.PreTrainedModel:
        return self.kind(self.config).eval()

    def converted(self, **options: Any) -> hf.PreTrainedModel:
        """With random factors and a frozen zero in each layer."""
        model = get_kron_model(self(), KronConfig(**{"init_weights": "random", **self.kron, **options})).eval()
        for layer in kron_layers(model):
            with torch.no_grad():
                layer.s.copy_(torch.randn_like(layer.s))
                layer.s[-1, 0] = 0
            layer.freeze_mask()
        return model

    @property
    def images(self) -> Tensor:
        return torch.randn(2, *self.size, generator=torch.Generator().manual_seed(0))


MODELS: dict[str, ConvModel] = {
    "lenet5": ConvModel(
        LeNetConfig(),
        LeNet,
        (1, 28, 28),
        {
            "block_size": (2, 2),
            "rank": 2,
            "target_modules": ["conv1", "conv2", "fc1", "fc2"],
            "block_size_pattern": {"conv1": (2, 1), "fc1": (8, 25), "fc2": (4, 12)},
        },
    ),
    "resnet": ConvModel(
        hf.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], layer_type="bottleneck", num_labels=4),
        hf.ResNetForImageClassification,
        (3, 32, 32),
        {"block_size": 4, "rank": 1, "target_modules": r".*encoder.*convolution"},
    ),
    "convnext": ConvModel(
        hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=4),
        hf.ConvNextForImageClassification,
        (3, 32, 32),
        {"block_size": 4, "rank": 2, "target_modules": ["pwconv1", "pwconv2", "downsampling_layer.1"]},
    ),
    "vit-patches": ConvModel(
        hf.ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            num_labels=4,
        ),
        hf.ViTForImageClassification,
        (3, 16, 16),
        {
            "block_size": (4, 8),
            "rank": 2,
            "target_modules": ["patch_embeddings.projection", "fc1", "fc2"],
            "block_size_pattern": {"projection": (4, 1)},
        },
    ),
}
hf.AutoConfig.register("lenet5", LeNetConfig)
hf.AutoModelForImageClassification.register(LeNetConfig, LeNet)
