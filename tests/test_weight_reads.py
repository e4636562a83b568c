import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import WavLMConfig, WavLMModel
from transformers.models.detr.modeling_detr import DetrMHAttentionMap

from kron_hf import KronConfig, get_kron_model
from kron_hf.targets import find_targets
from kron_hf.weight_reads import weight_reader


class Reader(nn.Module):
    """A user's block that calls its linears; each of the cases below reads something in `read`."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(16, 16)
        self.inner = nn.ModuleDict({"fc2": nn.Linear(16, 16)})

    def forward(self, x):
        return self.read(self.fc1(self.inner["fc2"](x)))

    def read(self, x):
        return x


class Functional(Reader):
    def read(self, x):
        return F.linear(x, weight=self.fc1.weight)


class Product(Reader):
    def read(self, x):
        return x @ self.fc1.weight.T


class Shape(Reader):
    def read(self, x):
        return x * self.fc1.weight.shape[0]


class InALambda(Reader):
    def read(self, x):
        return (lambda y: y + self.fc1.weight.sum())(x)


class Inherited(Product):
    def forward(self, x):
        return self.read(x)


class OnlyDtype(Reader):
    def read(self, x):
        weight = self.fc1.weight.dtype if isinstance(self.fc1.weight, torch.Tensor) else x.dtype
        return x.to(weight).to(self.fc1.weight).type_as(self.fc1.weight).to(self.fc1.weight.device)


class OwnWeight(Reader):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        nn.init.zeros_(self.fc1.weight)

    def reset_parameters(self):
        self.fc1.weight.sum()

    def read(self, x):
        return x * self.weight


@pytest.mark.parametrize("kind", [Functional, Product, Shape, InALambda, Inherited], ids=lambda kind: kind.__name__)
def test_a_weight_that_is_read_is_seen(kind):
    assert weight_reader(kind(), "fc1") == kind.__name__
    assert weight_reader(kind(), "inner.fc2") is None


@pytest.mark.parametrize("kind", [Reader, OnlyDtype, OwnWeight], ids=lambda kind: kind.__name__)
def test_dtype_device_set_up_and_own_weights_are_harmless(kind):
    assert weight_reader(kind(), "fc1") is None


def test_a_reader_further_out_is_seen():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Reader()

        def forward(self, x):
            return self.block(x) @ self.block.fc1.weight

    assert weight_reader(Outer(), "block.fc1") == "Outer"
    assert weight_reader(nn.Sequential(Outer()), "0.block.fc1") == "Outer"


def test_a_reader_without_source_fails_in_the_forward():
    namespace = {"F": F, "Reader": Reader}
    exec("class Hidden(Reader):\n    def read(self, x):\n        return F.linear(x, self.fc1.weight)", namespace)
    model = namespace["Hidden"]()
    assert weight_reader(model, "fc1") is None
    get_kron_model(model, KronConfig(block_size=4, rank=1, target_modules=["fc1"]))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model(torch.zeros(2, 16))


def test_what_is_read_is_skipped_by_default_and_refused_by_name():
    model = nn.Sequential(Functional(), nn.Linear(16, 16), nn.Linear(16, 2))
    with pytest.warns(UserWarning, match=r"^Left dense: 0\.fc1: Functional reads its weight directly"):
        names = [target.name for target in find_targets(model, KronConfig(block_size=4, rank=1))]
    assert names == ["0.inner.fc2", "1"]
    with pytest.raises(ValueError, match=r"^0\.fc1: Functional reads its weight directly, so it cannot be replaced"):
        find_targets(model, KronConfig(block_size=4, rank=1, target_modules=["fc1"]))


def test_attention_of_transformers_that_reads_weights():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    conv = {"conv_dim": [8], "conv_kernel": [4], "conv_stride": [4], "num_conv_pos_embeddings": 4}
    model = WavLMModel(WavLMConfig(**sizes, **conv, num_conv_pos_embedding_groups=2, num_feat_extract_layers=1))
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        assert weight_reader(model, f"encoder.layers.0.attention.{name}") == "WavLMAttention"
    assert weight_reader(model, "encoder.layers.0.feed_forward.intermediate_dense") is None
    mask_head = DetrMHAttentionMap(16, 2)
    assert weight_reader(mask_head, "k_proj") == "DetrMHAttentionMap"
    assert weight_reader(mask_head, "q_proj") is None
