"""Checkpoints of models whose block sizes are being selected: saved and loaded between two drops, broken, hostile."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, example_input, outputs_of
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification, ViTForImageClassification, ViTModel

from kron_hf import KronConfig, KronLinear, get_kron_model, to_dense
from kron_hf.checkpoint import KronCheckpointConfig, attach_kron_config
from kron_hf.module_map import MAX_CANDIDATES
from kron_hf.selection import KronCandidates
from kron_hf.selection.candidates import converted_layers
from kron_hf.surgery import replace_modules

CONFIG = KronConfig(candidate_block_sizes=[4, (4, 8)], candidate_ranks=[1, 2])
FC1, FC2 = "vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc2"
DROPPED = "4x4_rank2"


def entry(block_size, rank):
    return {"block_size": list(block_size), "rank": rank}


LEFT = [entry((4, 4), 1), entry((4, 8), 1), entry((4, 8), 2)]


def candidates_of(model):
    return {name: layer for name, layer in converted_layers(model).items() if isinstance(layer, KronCandidates)}


def build():
    """A converted tiny model of which one candidate was dropped everywhere, and another in one layer."""
    model = get_kron_model(FAMILIES["vit"](), CONFIG).eval()
    for layer in candidates_of(model).values():
        layer.drop(DROPPED)
        with torch.no_grad():
            layer.layer("4x8_rank1").s[0, 0] = 0
        layer.layer("4x8_rank1").freeze_mask()
    model.get_submodule(FC2).drop("4x8_rank2")
    attach_kron_config(model)
    return model


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("candidates")
    torch.manual_seed(0)
    build().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A copy to be damaged."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def edit_map(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["modules"])
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder, **options):
    return AutoModelForImageClassification.from_pretrained(folder, **options)


# What is written


def test_the_map_names_the_candidates_that_are_left(saved):
    modules = json.loads((saved / "config.json").read_text())["quantization_config"]["modules"]
    assert len(modules) == 12
    assert modules[FC1] == {"candidates": LEFT}
    assert modules[FC2] == {"candidates": LEFT[:2]}


def test_the_file_holds_nothing_of_a_dropped_candidate(saved):
    tensors = load_file(saved / "model.safetensors")
    assert not [name for name in tensors if DROPPED in name]
    held = {name.removeprefix(f"{FC2}.") for name in tensors if name.startswith(f"{FC2}.")}
    left = {f"candidates.{key}.{name}" for key in ("4x4_rank1", "4x8_rank1") for name in ("s", "a", "b", "weight")}
    assert held == {"weight", "bias", *left}


def test_mixed_models_are_described(saved):
    model = build()
    layer = model.get_submodule(FC2)
    layer.drop("4x8_rank1")
    replace_modules(model, {FC2: layer.chosen()})
    modules = KronCheckpointConfig.of(model).modules
    assert modules[FC2] == entry((4, 4), 1)
    assert modules[FC1] == {"candidates": LEFT}
    again = get_kron_model(FAMILIES["vit"](), KronConfig(modules=modules))
    assert KronCheckpointConfig.of(again).modules == modules
    again.load_state_dict(model.state_dict())


# What is read


FRESH = """
import sys
import torch
import kron_hf
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification, ViTModel
tensors = load_file(sys.argv[2])
pixels = tensors["pixel_values"]
headed = AutoModelForImageClassification.from_pretrained(sys.argv[1] + "/headed").eval()
assert torch.equal(headed(pixels).logits, tensors["logits"])
assert headed.vit.layers[1].mlp.fc2.keys == ["4x4_rank1", "4x8_rank1"]
assert int(headed.vit.layers[0].mlp.fc1.layer("4x8_rank1").dead_blocks.sum()) == 1
backbone = AutoModel.from_pretrained(sys.argv[1] + "/headed", add_pooling_layer=False).eval()
assert torch.equal(backbone(pixels).last_hidden_state, tensors["hidden"])
inner = AutoModelForImageClassification.from_pretrained(sys.argv[1] + "/backbone").eval()
assert torch.equal(inner.vit(pixels).last_hidden_state, tensors["hidden"])
part = ViTModel.from_pretrained(sys.argv[1] + "/part", add_pooling_layer=False).eval()
assert torch.equal(part(pixels).last_hidden_state, tensors["hidden"])
headed.save_pretrained(sys.argv[1] + "/again")
assert len(kron_hf.kron_summary(headed).layers) == 12
print("equal")
"""


def test_a_fresh_process_loads_the_same_bits_headed_and_not(saved, tmp_path):
    model = load(saved).eval()
    inputs = example_input(model)
    hidden = model.vit(**inputs).last_hidden_state.detach()
    tensors = {**inputs, "logits": outputs_of(model, inputs), "hidden": hidden}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "tensors.safetensors")
    model.save_pretrained(tmp_path / "headed")
    ViTModel.from_pretrained(saved, add_pooling_layer=False).save_pretrained(tmp_path / "backbone")
    model.vit.save_pretrained(tmp_path / "part")  # tensor names of its own beside the map of the whole
    command = [sys.executable, "-c", FRESH, str(tmp_path), str(tmp_path / "tensors.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "equal\n", done.stderr
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"ignore_mismatched_sizes": True}], ids=str
)
def test_load_options(saved, options):
    model = load(saved, **options)
    dtype = options.get("dtype", torch.float32)
    stored = {name: tensor.to(dtype) for name, tensor in load_file(saved / "model.safetensors").items()}
    assert_equal(dict(model.state_dict()), stored)


def test_a_checkpoint_without_the_empty_tensors_loads(checkpoint):
    expected = load(checkpoint).state_dict()
    edit_tensors(checkpoint, lambda tensors: [tensors.pop(name) for name in list(tensors) if not tensors[name].numel()])
    assert_equal(load(checkpoint).state_dict(), expected)


def test_one_candidate_left_is_still_a_sum(checkpoint, tmp_path):
    model = load(checkpoint)
    for layer in candidates_of(model).values():
        for key in layer.alive[1:]:
            layer.drop(key, free=False)
    attach_kron_config(model)
    model.save_pretrained(tmp_path / "one")
    again = load(tmp_path / "one")
    assert {tuple(layer.keys) for layer in candidates_of(again).values()} == {("4x4_rank1",)}
    inputs = example_input(again)
    assert_equal(outputs_of(again, inputs), outputs_of(model, inputs))


def test_a_loaded_model_goes_on_to_a_plain_one(saved, tmp_path):
    model = load(saved)
    for name, layer in candidates_of(model).items():
        for key in [key for key in layer.alive if key != "4x8_rank1"]:
            layer.drop(key)
        replace_modules(model, {name: layer.chosen()})
    attach_kron_config(model)
    model.save_pretrained(tmp_path)
    modules = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules"]
    assert modules == dict.fromkeys(modules, entry((4, 8), 1))
    again = load(tmp_path)
    assert {type(layer) for layer in converted_layers(again).values()} == {KronLinear}
    inputs = example_input(again)
    assert_equal(outputs_of(again, inputs), outputs_of(model, inputs))


def test_a_model_of_all_candidates_takes_over_any_later_state(saved):
    inputs = example_input(load(saved))
    for later in (load(saved), get_kron_model(FAMILIES["vit"](), KronConfig(block_size=(4, 8), rank=2))):
        model = get_kron_model(FAMILIES["vit"](), CONFIG)
        result = model.load_state_dict(later.state_dict(), strict=False)  # as Trainer does
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        torch.testing.assert_close(outputs_of(model, inputs), outputs_of(later, inputs))


def test_to_dense_is_exact(saved, tmp_path):
    model = load(saved).double().eval()
    inputs = {name: tensor.double() for name, tensor in example_input(model).items()}
    before = outputs_of(model, inputs)
    model.vit.layers[0].requires_grad_(False)
    dense = to_dense(model)
    assert not converted_layers(dense)
    assert not dense.vit.layers[0].mlp.fc1.weight.requires_grad
    assert dense.vit.layers[1].mlp.fc1.weight.requires_grad
    torch.testing.assert_close(outputs_of(dense, inputs), before)
    dense.save_pretrained(tmp_path)
    assert "kron" not in (tmp_path / "config.json").read_text()
    torch.testing.assert_close(outputs_of(load(tmp_path), inputs), before)


def test_the_loaded_weights_count_as_trained(saved):
    with pytest.raises(ValueError, match="holds trained weights"):
        get_kron_model(to_dense(load(saved)), CONFIG)


def test_copies_of_a_loaded_model_save_the_same(saved, tmp_path):
    copy.deepcopy(load(saved)).save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


# Broken and hostile


@pytest.mark.parametrize("key", ["s", "a", "b"])
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=["plain", "ignore_mismatched_sizes"])
def test_a_tensor_of_a_living_candidate_is_missing(checkpoint, key, options):
    name = f"{FC1}.candidates.4x8_rank2.{key}"
    edit_tensors(checkpoint, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"^model\.safetensors: tensor '{re.escape(name)}' is missing$"):
        load(checkpoint, **options)


def test_a_whole_living_candidate_is_missing(checkpoint):
    """The map names it, so it is no drop."""
    begin = f"{FC1}.candidates.4x8_rank2."
    edit_tensors(checkpoint, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(begin)])
    with pytest.raises(ValueError, match=rf"^model\.safetensors: tensor '{re.escape(begin)}s' is missing$"):
        load(checkpoint)


def test_the_bias_is_missing(checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors.pop(f"{FC1}.bias"))
    with pytest.raises(ValueError, match=rf"^model\.safetensors: tensor '{FC1}\.bias' is missing$"):
        load(checkpoint)


def test_a_tensor_of_another_shape_or_dtype(checkpoint):
    name = f"{FC1}.candidates.4x8_rank2.a"
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: torch.zeros(2, 16, 5)}))
    with pytest.raises(ValueError, match=rf"tensor '{name}' has shape \[2, 16, 5\], config.json requires \[2, 16, 4\]"):
        load(checkpoint)
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: torch.zeros(2, 16, 4, dtype=torch.int32)}))
    with pytest.raises(ValueError, match=rf"tensor '{name}' has dtype I32"):
        load(checkpoint)


def test_a_tensor_is_missing_from_a_given_state_dict(saved):
    config = ViTForImageClassification.config_class.from_pretrained(saved)
    state = load(saved).state_dict()
    name = f"{FC1}.candidates.4x8_rank2.a"
    model = ViTForImageClassification.from_pretrained(None, config=config, state_dict=dict(state))
    assert_equal(model.state_dict(), state)
    del state[name]
    with pytest.raises(ValueError, match=f"tensor '{name}' is missing from the given state_dict"):
        ViTForImageClassification.from_pretrained(None, config=config, state_dict=state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(candidates=[]), "must be a list of 1 to 64, got 0 of them"),
        (lambda entry: entry.update(candidates={"4x4_rank1": 1}), "must be a list of 1 to 64, got {'4x4_rank1': 1}"),
        (lambda entry: entry.update(candidates=LEFT * 300), "must be a list of 1 to 64, got 900 of them"),
        (lambda entry: entry.update(candidates=[LEFT[0], LEFT[0]]), r"candidates\[1\] is there before"),
        (lambda entry: entry.update(rank=1), 'must be {"block_size"'),
        (lambda entry: entry["candidates"][1].update(dtype="int8"), r"candidates\[1\] must be {\"block_size\""),
        (lambda entry: entry["candidates"][1].update(rank=True), r"candidates\[1\] must be"),
        (lambda entry: entry["candidates"][1].update(block_size=[-1, 8]), r"candidates\[1\] must be"),
        (lambda entry: entry["candidates"].append(None), r"candidates\[3\] must be"),
        (lambda entry: entry["candidates"].append([4, 4]), r"candidates\[3\] must be"),
        (lambda entry: entry["candidates"].append({"candidates": LEFT}), r"candidates\[3\] must be"),
    ],
    ids=["none", "dict", "900", "twice", "both", "unknown key", "bool", "negative", "null", "list", "nested"],
)
def test_malformed_entries_are_refused_by_name(checkpoint, change, message):
    edit_map(checkpoint, lambda modules: change(modules[FC1]))
    with pytest.raises(
        ValueError, match=rf"^config\.json: quantization_config\.modules\['{FC1}'\].*{message}"
    ) as caught:
        load(checkpoint)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry["candidates"].append({"block_size": [5, 8], "rank": 1}), r"\(5, 8\) does not divide"),
        (lambda entry: entry["candidates"].append({"block_size": [4, 4], "rank": 17}), "1 to bo .* = 16, got 17"),
        (lambda entry: entry["candidates"].append({"block_size": [64, 32], "rank": 3}), r"64x32_rank3\.s' is missing"),
        (lambda entry: entry["candidates"].pop(), "holds Kronecker factors of '.*4x8_rank2', which the map does not"),
        (lambda entry: entry["candidates"].pop(0), "holds Kronecker factors of '.*4x4_rank1', which the map does not"),
        (lambda entry: (entry.clear(), entry.update(LEFT[0])), "holds Kronecker factors of '.*', which the map does"),
    ],
    ids=["block", "rank", "one more", "one less", "first less", "plain"],
)
def test_a_map_that_does_not_fit_the_files(checkpoint, change, message):
    edit_map(checkpoint, lambda modules: change(modules[FC1]))
    with pytest.raises(ValueError, match=message):
        load(checkpoint)


def test_claims_are_refused_before_layers_are_built(checkpoint, monkeypatch):
    """Of the claimed candidates none is built but those of the first module that lacks its tensors."""
    many = [entry((1, 1), 1), *(entry((2**i, 2**j), 1 + k) for i in range(1, 6) for j in range(1, 6) for k in range(2))]
    edit_map(checkpoint, lambda modules: modules.update({name: {"candidates": many} for name in modules}))
    built = []
    init = KronLinear.__init__
    monkeypatch.setattr(KronLinear, "__init__", lambda self, *a, **k: (built.append(1), init(self, *a, **k))[0])
    with pytest.raises(ValueError, match=r"is missing|which the map does not name"):
        load(checkpoint)
    assert len(built) <= len(many) < MAX_CANDIDATES


def test_an_adapter_has_no_candidates(saved):
    from peft import get_peft_model

    message = r"not selected in an adapter: select them with kron_hf\.get_kron_model.*its `config` to get_peft_model"
    modules = {FC1: {"candidates": LEFT}}
    for config in (CONFIG, KronConfig(modules=modules)):
        model = FAMILIES["vit"]()
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, config)
        assert type(model.get_submodule(FC1)) is nn.Linear
