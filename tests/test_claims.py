import pytest
import torch
from transformers import CONFIG_MAPPING, SwinConfig, ViTConfig

from kron_hf.checkpoint.claims import check_config, check_elements


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 1024, "depths": [512, 512], "num_labels": 2**17},
        {"num_hidden_layers": None, "depths": [], "blocks": "x", "num_labels": float("nan")},
        {"mlp_only_layers": list(range(600)), "vocab_size": 10**9, "hidden_size": 10**9},
        {"a": [{"b": [{"c": 1}]}], "num_layers": [-(10**9), 5]},
        {"label2id": {"bricklayer": 1500, "tower blocks": 2000, "layer": 3000}, "embed_dim_per_stage": [1152, 576]},
        ViTConfig(),
        SwinConfig(depths=[2, 2, 18, 2], num_labels=21_841),
    ],
    ids=["limits", "other-types", "indices-and-widths", "nested", "names-and-widths", "vit", "swin"],
)
def test_real_configs_pass(config):
    check_config(config)


def test_the_defaults_of_every_architecture_pass():
    checked = 0
    for config_class in CONFIG_MAPPING.values():
        try:
            config = config_class()
        except Exception:  # some need arguments; what they raise is theirs
            continue
        check_config(config.to_dict())
        checked += 1
    assert checked > 300


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 1025}, "'num_hidden_layers' claims 1025, at most 1024"),
        ({"num_hidden_layers": 10**400}, r"'num_hidden_layers' claims 1e\+300, at most 1024"),
        ({"num_hidden_layers": float("inf")}, r"claims 1e\+300"),
        ({"encoder": [{"depths": [1000, 25]}]}, "'depths' claims 1025, at most 1024"),
        ({"depths": [2000, -5000]}, "'depths' claims 2000"),
        ({"num_layers": [1000, 1000]}, "'num_layers' claims 2000"),
        ({"depths": [0] * 2000}, "'depths' claims 2000"),
        ({"skip_layers": [5000]}, "'skip_layers' claims 5000"),
        ({"num_labels": 2**17 + 1}, "'num_labels' claims .*at most 131072"),
        (SwinConfig(depths=[2, 2000]), "'depths' claims 2002"),
        ({"x\n_layers": 2000}, r"config\.json: 'x\\n_layers' claims 2000"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_absurd_counts_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_config(config)


def test_nesting_is_bounded():
    config: object = {}
    for _ in range(33):
        config = {"a": config}
    with pytest.raises(ValueError, match=r"config\.json is nested deeper than 32 levels"):
        check_config(config)


def test_elements():
    free = torch.empty(2**26, device="meta")
    check_elements([free, free], 0)  # one tensor under two names
    check_elements([torch.empty(2**26 + 64 * 5, device="meta")], 5)
    with pytest.raises(ValueError, match=r"of 6.711e\+07 elements, but the weight files hold 5; more than 64 times"):
        check_elements([torch.empty(2**26 + 64 * 5 + 1, device="meta")], 5)
