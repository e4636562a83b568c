import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig

from kron_hf import KronConfig


def test_defaults_are_the_documented_ones():
    config = KronConfig()
    assert (config.block_size, config.rank) == (16, 4)
    assert (config.target_modules, config.exclude_modules, config.init_weights) == (None, None, None)
    assert config.peft_type == "KRON"


def test_every_own_field_has_help():
    inherited = {item.name for item in fields(PeftConfig)}
    own = [item for item in fields(KronConfig) if item.name not in inherited]
    assert len(own) == 9
    assert all(item.metadata.get("help") for item in own)


@pytest.mark.parametrize(
    "value",
    [0, -1, -4, True, 4.0, "16", "ab", None, (4,), (4, 4, 4), (), (4, 0), (4, -2), (4, 4.0), ("4", "4"), (True, 4)],
    ids=repr,
)
def test_bad_block_size(value):
    with pytest.raises(
        ValueError, match=r"^block_size must be a positive int or a pair.*got " + re.escape(repr(value))
    ):
        KronConfig(block_size=value)


def test_bad_block_size_in_a_pattern_names_the_pattern():
    with pytest.raises(ValueError, match=r"^block_size_pattern\['fc1'\] must be a positive int or a pair.*got 0"):
        KronConfig(block_size_pattern={"fc1": 0})


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "2", None, (2,)], ids=repr)
def test_bad_rank(value):
    with pytest.raises(ValueError, match="^rank must be an int of at least 1, got " + re.escape(repr(value))):
        KronConfig(rank=value)
    with pytest.raises(ValueError, match=r"^rank_pattern\['fc1'\] must be an int of at least 1"):
        KronConfig(rank_pattern={"fc1": value})


@pytest.mark.parametrize(("block_size", "largest"), [(2, 4), ((2, 3), 6)], ids=["square", "pair"])
def test_rank_above_the_block_names_both_numbers(block_size, largest):
    assert KronConfig(block_size=block_size, rank=largest).rank == largest
    with pytest.raises(ValueError, match=f"rank must be at most bo \\* bi = {largest}, got {largest + 1}"):
        KronConfig(block_size=block_size, rank=largest + 1)


def test_rank_beside_an_open_block_is_left_to_the_layer():
    assert KronConfig(block_size=(1, -1), rank=500).rank == 500


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("target_modules", 3, "target_modules must be None, a list of module names or a string, got 3"),
        ("target_modules", ["fc1", 3], r"target_modules must be None.*got \['fc1', 3\]"),
        ("target_modules", {"fc1": 1}, "target_modules must be None"),
        ("target_modules", "fc(", r"target_modules: 'fc\(' is no valid regular expression"),
        ("exclude_modules", 3, "exclude_modules must be None"),
        ("exclude_modules", "[", r"exclude_modules: '\[' is no valid regular expression"),
        ("block_size_pattern", [("fc1", 4)], "block_size_pattern must be a dict with module names as keys"),
        ("block_size_pattern", {1: 4}, "block_size_pattern must be a dict with module names as keys"),
        ("block_size_pattern", {"(": 4}, r"block_size_pattern: '\(' is no valid regular expression"),
        ("rank_pattern", None, "rank_pattern must be a dict with module names as keys, got None"),
        ("rank_pattern", {"(": 4}, r"rank_pattern: '\(' is no valid regular expression"),
        ("init_weights", "zeros", "init_weights must be one of .*'random', 'nearest', 'calibrated'.* got 'zeros'"),
        ("init_weights", True, "init_weights must be one of .* got True"),
        ("layers_pattern", "layers", "layers_pattern needs layers_to_transform"),
        ("task_type", "PAINTING", "Invalid task type: 'PAINTING'"),
    ],
)
def test_bad_field(field, value, message):
    with pytest.raises(ValueError, match=message):
        KronConfig(**{field: value})


@pytest.mark.parametrize("value", ["0", -1, [0, -1], [0.5], True, [None]], ids=repr)
def test_bad_layer_indices(value):
    with pytest.raises(ValueError, match="layers_to_transform must be None, an index or a list of indices"):
        KronConfig(target_modules=["fc1"], layers_to_transform=value)


@pytest.mark.parametrize("target_modules", [None, "all-linear", ".*fc1"], ids=repr)
def test_layer_indices_need_a_list_of_names(target_modules):
    with pytest.raises(ValueError, match="layers_to_transform needs target_modules to be a list of names"):
        KronConfig(target_modules=target_modules, layers_to_transform=[0])


def test_collections_become_lists():
    config = KronConfig(target_modules={"fc2", "fc1"}, exclude_modules=("head",), layers_to_transform=range(2))
    assert config.target_modules == ["fc1", "fc2"]
    assert config.exclude_modules == ["head"]
    assert config.layers_to_transform == [0, 1]


FULL = KronConfig(
    block_size=(4, 16),
    rank=3,
    target_modules=["fc1", "fc2"],
    exclude_modules=["layers.0.mlp.fc1"],
    layers_to_transform=[0, 1],
    layers_pattern="layers",
    block_size_pattern={"fc1": (1, -1), r"layers\.1\..*": 8},
    rank_pattern={"fc2": 2},
    init_weights="nearest",
    base_model_name_or_path="google/vit-base-patch16-224",
    revision="main",
)


@pytest.mark.parametrize("config", [KronConfig(), FULL], ids=["defaults", "full"])
def test_json_round_trip_is_exact(config, tmp_path):
    config.save_pretrained(str(tmp_path))
    loaded = KronConfig.from_pretrained(str(tmp_path))
    assert loaded == config
    assert repr(loaded) == repr(config)  # a list in place of a pair would differ here, too
    loaded.save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again/adapter_config.json").read_text() == (tmp_path / "adapter_config.json").read_text()


def test_pairs_come_back_as_pairs(tmp_path):
    FULL.save_pretrained(str(tmp_path))
    loaded = KronConfig.from_pretrained(str(tmp_path))
    assert loaded.block_size == (4, 16)
    assert loaded.block_size_pattern == {"fc1": (1, -1), r"layers\.1\..*": 8}


def test_a_path_object_is_stored_as_a_string(tmp_path):
    config = KronConfig(base_model_name_or_path=Path("some") / "dir")
    config.save_pretrained(str(tmp_path))
    assert KronConfig.from_pretrained(str(tmp_path)).base_model_name_or_path == str(Path("some") / "dir")


def test_to_dict_builds_the_same_config_again():
    assert KronConfig(**FULL.to_dict()) == FULL
    assert FULL.to_dict()["peft_type"] == "KRON"


def test_the_adapter_config_of_another_method_is_refused(tmp_path):
    LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="has peft_type 'LORA'; KronConfig needs 'KRON'"):
        KronConfig.from_pretrained(str(tmp_path))


def test_unknown_keys_are_refused_by_name(tmp_path):
    KronConfig().save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "blocksize": 8}))
    with pytest.raises(
        ValueError, match=r"adapter_config.json has keys that this kron_hf does not know: \['blocksize'\]"
    ):
        KronConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(("key", "value"), [("rank", 0), ("block_size", [4, 0]), ("block_size", "16")])
def test_a_stored_config_is_checked_as_well(tmp_path, key, value):
    KronConfig().save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=f"^{key} must be"):
        KronConfig.from_pretrained(str(tmp_path))
