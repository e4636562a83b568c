"""`CalibrationConfig`, and what a `KronConfig` takes for calibration."""

import json
import math
from dataclasses import asdict, fields, replace

import pytest
from peft import PeftConfig, get_peft_model
from tiny_dense import TinyDense

from kron_hf import CalibrationConfig, KronConfig, KronLinear, get_kron_model
from kron_hf.baselines.targets import block_layers
from kron_hf.peft_tuner.model import _resolved
from kron_hf.targets import find_targets

FULL = CalibrationConfig(
    readout="cls",
    ridge=0.0,
    sweeps=2,
    held_out=0.5,
    menu_shapes=[(1, -1), [4, 64], 16],
    flops_weight=1,
    batch_size=8,
    target_sparsity=0.5,
    seed=7,
)
BUDGETS = ("target_params", "target_flops", "max_error")


def test_defaults_are_the_documented_ones():
    assert asdict(CalibrationConfig()) == {
        "readout": None,
        "ridge": 1e-4,
        "sweeps": 8,
        "held_out": 0.25,
        "menu_shapes": None,
        "flops_weight": 0.0,
        "batch_size": 32,
        "target_sparsity": None,
        "seed": 0,
    }
    assert all(item.metadata.get("help") for item in fields(CalibrationConfig))


def test_values_take_their_normal_form():
    assert FULL.menu_shapes == [(1, -1), (4, 64), 16]
    assert (FULL.flops_weight, type(FULL.flops_weight)) == (1.0, float)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("readout", "mean", "readout must be one of .*'cls', 'all'.*, got 'mean'"),
        ("readout", ["cls"], "readout must be one of"),
        ("ridge", -1e-4, "ridge must be a finite number that is not negative, got -0.0001"),
        ("ridge", math.inf, "ridge must be a finite number"),
        ("ridge", math.nan, "ridge must be a finite number"),
        ("ridge", "1", "ridge must be a finite number"),
        ("ridge", True, "ridge must be a finite number"),
        ("sweeps", 0, "sweeps must be an int of at least 1, got 0"),
        ("sweeps", 2.0, "sweeps must be an int of at least 1, got 2.0"),
        ("held_out", 1, r"held_out must be a number in \[0, 1\), got 1"),
        ("held_out", -0.1, r"held_out must be a number in \[0, 1\)"),
        ("menu_shapes", [], r"menu_shapes must be None or a list of 1 to 64 entries, got \[\]"),
        ("menu_shapes", (4, 64), r"menu_shapes must be None or a list of 1 to 64 entries, got \(4, 64\)"),
        ("menu_shapes", [4] * 65, "menu_shapes must be None or a list of 1 to 64"),
        ("menu_shapes", [4, -1], r"menu_shapes\[1\] must be a positive int or a pair"),
        ("flops_weight", -1, "flops_weight must be a finite number that is not negative, got -1"),
        ("batch_size", 0, "batch_size must be an int of at least 1, got 0"),
        ("target_sparsity", 1.0, r"target_sparsity must be a number in \[0, 1\), got 1.0"),
        ("target_sparsity", "half", r"target_sparsity must be a number in \[0, 1\), got 'half'"),
        ("seed", -1, r"seed must be an int in \[0, 2\*\*32\), got -1"),
        ("seed", 2**32, r"seed must be an int in"),
    ],
)
def test_bad_values(field, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        CalibrationConfig(**{field: value})
    with pytest.raises(ValueError, match=f"^{message}"):
        KronConfig(calibration_config={field: value})


@pytest.mark.parametrize(
    "values", [{"reg": 1}, {"self": 1}, {3: 1}, {"x" * 10**6: 1, "\x1b": 2}], ids=["name", "self", "int", "hostile"]
)
def test_unknown_keys_are_refused(values):
    with pytest.raises(ValueError, match="calibration_config has keys that this kron_hf does not know: ") as caught:
        KronConfig(calibration_config=values)
    assert len(str(caught.value)) < 400
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("value", [3, "cls", [FULL], True], ids=repr)
def test_a_sub_config_of_another_kind_is_refused(value):
    with pytest.raises(ValueError, match=r"^calibration_config must be None, a CalibrationConfig or a dict, got"):
        KronConfig(calibration_config=value)


CONFIGS = {
    "params": KronConfig(target_params=0.25, calibration_config=FULL),
    "flops": KronConfig(target_flops=1, init_weights="calibrated", target_modules=["fc1"]),
    "error": KronConfig(max_error=0.3, calibration_config={"readout": "all"}),
    "uniform": KronConfig(block_size=(4, 64), init_weights="calibrated", calibration_config=CalibrationConfig()),
    "patterns": KronConfig(rank_pattern={"fc1": 2}, init_weights="calibrated", calibration_config=FULL),
    "resolved": KronConfig(modules={"fc": {"block_size": [4, 4], "rank": 1}}, calibration_config=FULL),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("reader", [KronConfig, PeftConfig], ids=lambda reader: reader.__name__)
def test_json_round_trip_is_exact(config, reader, tmp_path):
    config.save_pretrained(str(tmp_path))
    loaded = reader.from_pretrained(str(tmp_path))
    assert loaded == config
    assert repr(loaded) == repr(config)  # a list in place of a pair or an int of a float would differ here, too
    assert KronConfig(**config.to_dict()) == config
    assert isinstance(loaded.calibration_config, CalibrationConfig | None)


@pytest.mark.parametrize("reader", [KronConfig, PeftConfig], ids=lambda reader: reader.__name__)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_params": 2}, "^target_params must be a share"),
        ({"calibration_config": {"__class__": 1}}, "calibration_config has keys that this kron_hf does not know"),
        ({"calibration_config": [1]}, "^calibration_config must be"),
        ({"calibration_config": {"sweeps": 1e9}}, "^sweeps must be"),
    ],
    ids=["budget", "keys", "list", "value"],
)
def test_a_file_is_checked_as_well(tmp_path, reader, change, message):
    CONFIGS["params"].save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        reader.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("value", [0, -0.5, 1.5, 25, math.nan, math.inf, "0.25", True, [0.25]], ids=repr)
def test_a_budget_is_a_share(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be a share in \(0, 1\], got "):
        KronConfig(**{name: value})


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"block_size_pattern": {"fc1": 4}}, "chooses .* by data; it excludes block_size_pattern"),
        ({"rank_pattern": {"fc1": 4}}, "it excludes rank_pattern"),
        ({"modules": {"fc1": {"block_size": [4, 4], "rank": 1}}}, "it excludes modules"),
        ({"block_size": (4, 64)}, r"it excludes block_size\. Say .*=CalibrationConfig\(menu_shapes="),
        ({"block_size": 8, "rank": 2}, "it excludes block_size, rank"),
        ({"candidate_ranks": [1, 2]}, "is for calibration, which candidates are not fitted by"),
        ({"init_weights": "random"}, "needs init_weights None or 'calibrated', got 'random'"),
        ({"init_weights": "nearest"}, "needs init_weights None or 'calibrated', got 'nearest'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_budget_excludes_what_it_chooses(name, others, message):
    with pytest.raises(ValueError, match=f"^{name} {message}" if not message.startswith("it") else message):
        KronConfig(**{name: 0.5}, **others)


def test_one_budget_at_most():
    with pytest.raises(ValueError, match=r"^target_params, max_error: give at most one of them"):
        KronConfig(target_params=0.5, max_error=0.5)


@pytest.mark.parametrize(
    "others", [{"init_weights": "random"}, {"candidate_ranks": [1, 2]}], ids=["random", "candidates"]
)
def test_a_calibration_config_is_for_calibration(others):
    with pytest.raises(ValueError, match=r"^calibration_config "):
        KronConfig(calibration_config=FULL, **others)


NEEDS = {
    "target_params": {"target_params": 0.5},
    "target_flops": {"target_flops": 0.5, "init_weights": "calibrated"},
    "max_error": {"max_error": 0.5},
    "init_weights='calibrated'": {"init_weights": "calibrated", "calibration_config": FULL},
    "calibration_config": {"calibration_config": FULL},
}


@pytest.mark.parametrize(("what", "options"), NEEDS.items(), ids=NEEDS)
def test_without_data_an_error_says_what_needs_it(what, options):
    blocks = {} if what in BUDGETS else {"block_size": 2, "rank": 1}
    config = KronConfig(target_modules=["fc1"], **blocks, **options)
    assert config.needs_data == what
    assert config.budget == (what if what in BUDGETS else None)
    message = f"^{what} needs calibration data: get_kron_model\\(model, config, calibration_data=...\\)"
    model = TinyDense()
    for convert in (get_kron_model, get_peft_model):
        with pytest.raises(ValueError, match=message):
            convert(model, config)
    with pytest.raises(ValueError, match=message):  # before it looks for the model
        get_kron_model(replace(config, base_model_name_or_path="no/model"))


def test_nothing_else_needs_data():
    assert KronConfig().needs_data is None
    assert KronConfig(init_weights="nearest").needs_data is None


def test_with_a_budget_targets_are_found_whatever_divides_them():
    targets = find_targets(TinyDense(), KronConfig(target_params=0.5, target_modules=["fc1"]))
    assert [(target.name, target.block_size, target.rank) for target in targets] == [("fc1", (1, 16), 1)]


def test_baselines_need_a_block_size():
    with pytest.raises(ValueError, match="blocks need a block_size; with max_error calibration data would choose it"):
        block_layers(TinyDense(), KronConfig(max_error=0.5))


@pytest.mark.parametrize(
    "config", [CONFIGS["params"], CONFIGS["error"], CONFIGS["uniform"]], ids=["params", "error", "uniform"]
)
def test_an_adapter_keeps_what_was_chosen_and_not_how(config):
    resolved = _resolved(config, {"fc1": KronLinear(16, 30, block_size=2, rank=4)}, [])
    assert resolved.modules == {"fc1": {"block_size": [2, 2], "rank": 4}}
    assert [resolved.budget, resolved.calibration_config] == [None, None]


def test_a_config_from_a_resolved_map():
    modules = {
        "a": {"block_size": [4, 16], "rank": 2},
        "b": {"block_size": [1, 64], "rank": 7},
        "c": {"block_size": (1, 64), "rank": 7},
    }
    config = KronConfig.from_modules(modules, modules_to_save=["head"])
    assert (config.block_size, config.rank, config.modules_to_save) == ((1, 64), 7, ["head"])
    assert config.modules == {
        name: {**entry, "block_size": list(entry["block_size"])} for name, entry in modules.items()
    }
    with pytest.raises(ValueError, match="modules must be a non-empty dict"):
        KronConfig.from_modules({})
