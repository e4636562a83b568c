"""Stochastic depth in `examples/experiments/cifar100`."""

import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "experiments" / "cifar100"))

from stochastic_depth import add_drop_path, drop_path


def test_drop_path_drops_samples_and_keeps_the_expectation():
    branch = torch.randn(20_000, 2, 3).abs() + 1
    dropped = drop_path(branch, 0.3)
    kept = dropped.flatten(1).ne(0)
    assert torch.equal(kept.all(1), kept.any(1))  # whole samples
    assert kept[:, 0].float().mean() == pytest.approx(0.7, abs=0.02)
    torch.testing.assert_close(dropped[kept[:, 0]], branch[kept[:, 0]] / 0.7)
    assert dropped.mean() == pytest.approx(branch.mean().item(), rel=0.02)


def tiny(kind, **more):
    if kind == "vit":
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = ViTConfig(**sizes, image_size=8, patch_size=4, initializer_range=0.3)
        return ViTForImageClassification(config)
    sizes = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 2, "patch_size": 2}
    return SwinForImageClassification(SwinConfig(**sizes, image_size=16, initializer_range=0.3, **more))


def branches_of_last_layer(model, pixels):
    """What the last layer adds to each sample."""
    layer = [module for module in model.modules() if type(module).__name__ in ("ViTLayer", "SwinLayer")][-1]
    seen = {}
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], y=output))
    model(pixels)
    hook.remove()
    y = seen["y"][0] if isinstance(seen["y"], tuple) else seen["y"]
    return (y - seen["x"]).flatten(1).abs().amax(1)


@pytest.mark.parametrize(
    ("kind", "size", "more"), [("vit", 8, {}), ("swin", 16, {"drop_path_rate": 0.5})], ids=["vit", "swin"]
)
def test_stochastic_depth_drops_both_branches_in_training_only(kind, size, more):
    model, pixels = tiny(kind, **more), torch.randn(400, 3, size, size)
    plain = tiny(kind)
    plain.load_state_dict(model.state_dict())
    add_drop_path(model, 0.5)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.eval(), plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, plain(pixels).logits, rtol=0, atol=0)
        model.train()
        changes = branches_of_last_layer(model, pixels)
    # Both branches of the last layer are dropped for a quarter of the samples.
    assert (changes < 1e-5).float().mean() == pytest.approx(0.25, abs=0.07)


def test_stochastic_depth_grows_with_the_layers():
    model, pixels = tiny("vit"), torch.randn(64, 3, 8, 8)
    add_drop_path(model, 0.6)
    model.train()
    first, middle, last = model.vit.layers
    hidden = first(torch.randn(2000, 5, 8))
    shares = []
    for layer in (first, middle, last):
        with torch.no_grad():
            shares.append((layer.mlp(hidden) == 0).flatten(1).all(1).float().mean().item())
    assert shares == pytest.approx([0, 0.3, 0.6], abs=0.04)
    assert model(pixels).logits.isfinite().all()


@pytest.mark.parametrize(
    ("model", "rate", "message"),
    [
        (torch.nn.Linear(2, 2), 0.1, "Linear has no layers of"),
        (torch.nn.Linear(2, 2), 1.0, r"must be in \[0, 1\), got 1.0"),
        (torch.nn.Linear(2, 2), math.nan, "got nan"),
    ],
    ids=["other model", "all", "nan"],
)
def test_stochastic_depth_refuses(model, rate, message):
    with pytest.raises(ValueError, match=message):
        add_drop_path(model, rate)
