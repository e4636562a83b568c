import copy
import json
import pickle
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, PeftType, get_peft_config

from kron_hf import KronConfig


def test_defaults_are_the_documented_ones():
    config = KronConfig()
    assert (config.block_size, config.rank) == (16, 4)
    assert (config.target_modules, config.exclude_modules, config.init_weights) == (None, None, None)
    assert (config.modules_to_save, config.modules, config.format_version) == (None, None, 1)
    assert config.peft_type is PeftType.KRON


def test_every_own_field_has_help():
    inherited = {item.name for item in fields(PeftConfig)}
    own = [item for item in fields(KronConfig) if item.name not in inherited]
    assert len(own) == 18
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
        ("peft_type", "LORA", "KronConfig needs peft_type 'KRON', got 'LORA'"),
        ("target_modules", "(" * 10**4 + ")" * 10**4, "target_modules: .* is no valid regular expression"),
        ("target_modules", "a{99999999999}", "target_modules: .* is no valid regular expression"),
        ("modules_to_save", "classifier", "modules_to_save must be None or a list of names, got 'classifier'"),
        ("modules_to_save", ["classifier", 3], "modules_to_save must be None"),
        ("modules", ["fc1"], r"modules must be a non-empty dict, got \['fc1'\]"),
        ("modules", {"fc1": {"block_size": [4, 0], "rank": 1}}, r"modules\['fc1'\] must be"),
        ("format_version", 2, "has format_version 2, this kron_hf reads up to 1; upgrade kron_hf"),
        ("format_version", 0, "format_version must be an int of at least 1, got 0"),
        ("format_version", "1", "format_version must be an int of at least 1, got '1'"),
        ("inference_mode", "yes", "inference_mode must be a bool, got 'yes'"),
        ("revision", 3, "revision must be None or a string, got 3"),
        ("base_model_name_or_path", ["a"], "base_model_name_or_path must be None or a string"),
        ("auto_mapping", "transformers", "auto_mapping must be None or a dict"),
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


RESOLVED = KronConfig(
    block_size=(4, 16),
    modules={"vit.layers.0.mlp.fc1": {"block_size": (4, 16), "rank": 2}, "fc": {"block_size": [2, 2], "rank": 1}},
    modules_to_save=["classifier"],
    task_type="SEQ_CLS",
)


CANDIDATES = KronConfig(candidate_block_sizes=[4, (4, 16), 8, (1, -1)], candidate_ranks=[1, 4], init_weights="random")
CHOOSING = KronConfig(
    modules={"fc": {"candidates": [{"block_size": (4, 16), "rank": 2}, {"block_size": [2, 2], "rank": 1}]}}
)


@pytest.mark.parametrize(
    "selection",
    [
        {"target_modules": ["fc1"]},
        {"target_modules": "all-linear"},
        {"exclude_modules": ["fc1"]},
        {"block_size_pattern": {"fc1": 4}},
        {"rank_pattern": {"fc1": 4}},
        {"target_modules": ["fc1"], "layers_to_transform": 0},
    ],
    ids=lambda value: list(value)[-1],
)
def test_resolved_modules_exclude_every_other_selection(selection):
    with pytest.raises(ValueError, match="modules already says which modules to replace; it excludes"):
        replace(RESOLVED, **selection)


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


@pytest.mark.parametrize(
    "config",
    [KronConfig(), FULL, RESOLVED, CANDIDATES, CHOOSING],
    ids=["defaults", "full", "resolved", "candidates", "choosing"],
)
def test_json_round_trip_is_exact(config, tmp_path):
    config.save_pretrained(str(tmp_path))
    loaded = KronConfig.from_pretrained(str(tmp_path))
    assert loaded == config
    assert repr(loaded) == repr(config)  # a list in place of a pair would differ here, too
    loaded.save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again/adapter_config.json").read_text() == (tmp_path / "adapter_config.json").read_text()


def test_only_nested_lists_of_candidates_come_back_as_pairs(tmp_path):
    CANDIDATES.save_pretrained(str(tmp_path))
    loaded = KronConfig.from_pretrained(str(tmp_path))
    assert loaded.candidate_block_sizes == [4, (4, 16), 8, (1, -1)]
    assert loaded.candidate_ranks == [1, 4]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["candidate_block_sizes"] == [
        4,
        [4, 16],
        8,
        [1, -1],
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        (
            {"candidate_block_sizes": [4, (4, 16)], "candidate_ranks": [1, 2]},
            [(4, 1), (4, 2), ((4, 16), 1), ((4, 16), 2)],
        ),
        ({"candidate_block_sizes": [[4, 16], 4], "rank": 3}, [((4, 16), 3), (4, 3)]),
        ({"candidate_ranks": [8, 1], "block_size": (4, 4)}, [((4, 4), 8), ((4, 4), 1)]),
        ({"candidate_block_sizes": [32, 64], "rank": 500}, [(32, 500), (64, 500)]),  # block_size is not used then
    ],
    ids=["none", "both", "sizes", "ranks", "large rank"],
)
def test_candidates_are_the_cross_product(options, expected):
    assert KronConfig(**options).candidates == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"candidate_block_sizes": [4]},
            r"must give 2 to 64 candidates, got 1; .* pass block_size=4 and rank=4",
        ),
        ({"candidate_ranks": [2]}, "got 1; to train with one, pass block_size=16 and rank=2"),
        ({"candidate_block_sizes": list(range(1, 10)), "candidate_ranks": [1] * 8}, "2 to 64 candidates, got 72"),
        ({"candidate_block_sizes": []}, r"candidate_block_sizes must be None or a list of 1 to 64 entries, got \[\]"),
        ({"candidate_block_sizes": [4] * 10**6}, "candidate_block_sizes must be None or a list of 1 to 64"),
        ({"candidate_block_sizes": (4, 16)}, r"candidate_block_sizes must be None or a list .*got \(4, 16\)"),
        ({"candidate_block_sizes": 4}, "candidate_block_sizes must be None or a list .*got 4"),
        ({"candidate_block_sizes": "48"}, "candidate_block_sizes must be None or a list .*got '48'"),
        ({"candidate_block_sizes": [4, -1]}, r"candidate_block_sizes\[1\] must be a positive int or a pair"),
        ({"candidate_block_sizes": [4, [4, 8, 2]]}, r"candidate_block_sizes\[1\] must be a positive int or a pair"),
        ({"candidate_block_sizes": [4, [[4, 8], 2]]}, r"candidate_block_sizes\[1\] must be"),
        ({"candidate_block_sizes": [4, True]}, r"candidate_block_sizes\[1\] must be"),
        ({"candidate_ranks": 4}, "candidate_ranks must be None or a list .*got 4"),
        ({"candidate_ranks": [1, 0]}, r"candidate_ranks\[1\] must be an int of at least 1, got 0"),
        ({"candidate_ranks": [1, 2.0]}, r"candidate_ranks\[1\] must be an int of at least 1, got 2.0"),
        ({"candidate_block_sizes": [4, 8, 4]}, r"give blocks of \(4, 4\) at rank 4 twice"),
        ({"candidate_block_sizes": [8, (8, 8)]}, r"give blocks of \(8, 8\) at rank 4 twice"),
        ({"candidate_ranks": [1, 2, 1]}, r"give blocks of \(16, 16\) at rank 1 twice"),
        (
            {"candidate_block_sizes": [2, 8], "candidate_ranks": [1, 5]},
            "candidate of block_size 2 must be at most .* 4, got 5",
        ),
        ({"candidate_block_sizes": [1, 8]}, "candidate of block_size 1 must be at most bo . bi = 1, got 4"),
        ({"candidate_block_sizes": [4, 8], "block_size_pattern": {"fc1": 4}}, "they exclude block_size_pattern"),
        ({"candidate_ranks": [1, 2], "rank_pattern": {"fc1": 4}}, "they exclude rank_pattern"),
        ({"candidate_ranks": [1, 2], "init_weights": "nearest"}, "start with init_weights='random', got 'nearest'"),
        ({"candidate_ranks": [1, 2], "init_weights": "calibrated"}, "start with init_weights='random', got 'cal"),
        ({"candidate_ranks": [1, 2], "modules": {"fc": {"block_size": [4, 4], "rank": 1}}}, "excludes candidate_ranks"),
    ],
    ids=str,
)
def test_bad_candidates(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        KronConfig(**options)
    assert len(str(caught.value)) < 400


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


@pytest.mark.parametrize("reader", [KronConfig, PeftConfig], ids=lambda reader: reader.__name__)
def test_an_unknown_key_or_version_is_no_warning_under_any_reader(tmp_path, reader):
    KronConfig().save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    stored = json.loads(file.read_text())
    for change, message in [
        ({"blocksize": 8}, r"keys that this kron_hf does not know: \['blocksize'\]"),
        ({"format_version": 2, "blocksize": 8}, "format_version 2, this kron_hf reads up to 1; upgrade kron_hf"),
    ]:
        file.write_text(json.dumps({**stored, **change}))
        with pytest.raises(ValueError, match=message):
            reader.from_pretrained(str(tmp_path))
        with pytest.raises(ValueError, match=message):
            get_peft_config({**stored, **change})


def test_an_unknown_argument_in_code_is_an_ordinary_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'blocksize'"):
        KronConfig(blocksize=8)


@pytest.mark.parametrize(("key", "value"), [("rank", 0), ("block_size", [4, 0]), ("block_size", "16")])
def test_a_stored_config_is_checked_as_well(tmp_path, key, value):
    KronConfig().save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=f"^{key} must be"):
        KronConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("reader", [KronConfig, PeftConfig], ids=lambda reader: reader.__name__)
@pytest.mark.parametrize(
    "pattern",
    [
        {"target_modules": "(a+)+$"},
        {"exclude_modules": "(a+)+$"},
        {"block_size_pattern": {"(a+)+$": 4}},
        {"rank_pattern": {"(a+)+$": 2}},
        {"target_modules": ["fc1"], "layers_to_transform": [0], "layers_pattern": ["(a+)+$"]},
    ],
    ids=lambda value: list(value)[-1],
)
def test_a_pattern_from_a_file_is_read_but_refused_before_it_would_run(tmp_path, reader, pattern):
    config = KronConfig(**pattern)
    config.refuse_stored_patterns()
    config.save_pretrained(str(tmp_path))
    loaded = reader.from_pretrained(str(tmp_path))
    assert loaded == config
    with pytest.raises(ValueError, match=rf"read from a file and has patterns \({list(pattern)[-1]}\)"):
        loaded.refuse_stored_patterns()


def test_a_pattern_from_a_file_is_not_even_compiled(tmp_path):
    KronConfig().save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    bomb = "(" * 10**5
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": bomb, "rank_pattern": {bomb: 2}}))
    loaded = KronConfig.from_pretrained(str(tmp_path))
    assert loaded.target_modules == bomb
    with pytest.raises(ValueError, match=r"has patterns \(target_modules, rank_pattern\)") as caught:
        loaded.refuse_stored_patterns()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "config", [KronConfig(), KronConfig(target_modules=["fc1"]), KronConfig(target_modules="all-linear"), RESOLVED]
)
def test_a_stored_config_without_patterns_may_be_used(tmp_path, config):
    config.save_pretrained(str(tmp_path))
    KronConfig.from_pretrained(str(tmp_path)).refuse_stored_patterns()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config)), replace])
@pytest.mark.parametrize(
    "config", [KronConfig(), FULL, RESOLVED, CANDIDATES], ids=["defaults", "full", "resolved", "candidates"]
)
def test_copies_are_equal(config, copied):
    assert copied(config) == config
    assert copied(config).peft_type is PeftType.KRON
