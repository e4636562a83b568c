"""The four models, and which of their linears are compared."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kron_hf import KronConfig, get_kron_model
from kron_hf.config import BlockSize
from kron_hf.targets import Target, find_targets

__all__ = ["MLP", "LeNet5", "Linear", "TinyViT", "build_model", "compared_layers", "convert", "kron_config"]


class Linear(nn.Module):
    """One linear layer on the pixels, the paper's linear model: 784 -> 10 for images of 28 x 28."""

    converted = ("fc",)

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(size * size, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, 1, size, size]` to logits `[N, classes]`."""
        return self.fc(images.flatten(1))


class MLP(nn.Module):
    """784 -> 256 -> 128 -> 10 for images of 28 x 28; the head stays dense."""

    converted = ("fc1", "fc2")

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size * size, 256)
        self.fc2 = nn.Linear(256, 128)
        self.head = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, 1, size, size]` to logits `[N, classes]`."""
        hidden = torch.relu(self.fc1(images.flatten(1)))
        return self.head(torch.relu(self.fc2(hidden)))


class LeNet5(nn.Module):
    """LeCun et al. (1998), with ReLU and max pooling: two convolutions, then 400 -> 120 -> 84 -> 10, all converted."""

    converted = ("fc1", "fc2", "fc3")

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        if size != 28:
            raise ValueError(f"LeNet5 needs images of 28 x 28, got {size} x {size}")
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, 1, 28, 28]` to logits `[N, classes]`."""
        hidden = torch.relu(self.fc1(self.features(images)))
        return self.fc3(torch.relu(self.fc2(hidden)))


class TinyViT(nn.Module):
    """transformers' ViT with 4 layers, width 128, 4 heads and 16 patches; all attention and MLP projections convert."""

    converted = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            image_size=size,
            patch_size=size // 4,
            num_channels=1,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            initializer_range=0.1,  # .02 is meant for wide models; at this width it costs points
            label2id={str(label): label for label in range(classes)},
            id2label={label: str(label) for label in range(classes)},
        )
        self.vit = ViTForImageClassification(config)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, 1, size, size]` to logits `[N, classes]`."""
        return self.vit(pixel_values=images).logits


MODELS: dict[str, type[Linear | MLP | LeNet5 | TinyViT]] = {
    "linear": Linear,
    "mlp": MLP,
    "lenet5": LeNet5,
    "vit": TinyViT,
}


def build_model(name: str, size: int, classes: int) -> nn.Module:
    """A model with random weights."""
    return MODELS[name](size, classes)


def kron_config(name: str, block_size: tuple[int, int], rank: int = 1) -> KronConfig:
    """Which linears of a model are compared, and their blocks: for Kronecker layers and baselines alike.

    The 10 rows of LeNet-5's last layer do not divide by 4; it has blocks of (2, 4) always. Blocks of whole rows of
    pixels, (8, 56), are for the MLP's first layer alone; the second then has (8, 8).
    """
    odd: dict[str, BlockSize] = {}
    if name == "lenet5":
        odd["fc3"] = (2, 4)
    elif name == "mlp" and 256 % block_size[1]:
        odd["fc2"] = (8, 8)
    return KronConfig(
        block_size=block_size,
        rank=rank,
        target_modules=list(MODELS[name].converted),
        block_size_pattern=odd,
        init_weights="random",
    )


def compared_layers(model: nn.Module, config: KronConfig) -> list[Target]:
    """The linears that a config names, with their blocks."""
    with _any_cost():
        return find_targets(model, config)


def convert(model: nn.Module, config: KronConfig) -> None:
    """`get_kron_model`, in place."""
    with _any_cost():
        get_kron_model(model, config)


@contextmanager
def _any_cost() -> Iterator[None]:
    """Some declared sizes need as many FLOPs as dense; they are here for their accuracy."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="These modules need as many FLOPs as dense ones")
        yield
