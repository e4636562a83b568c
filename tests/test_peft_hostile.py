"""adapter_config.json from a stranger: clean errors, no pattern ever runs, no memory for claimed sizes."""

import json
import shutil

import peft
import pytest
import torch
from families import VIT_SIZES
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file, save_file
from tiny_peft import PEFT_NOISE, adapted, config, load_base, logits, quiet_peft, save_base
from transformers import ViTConfig, ViTForImageClassification

from kron_hf import KronConfig, get_kron_model
from kron_hf.sparsity.pruning import kron_layers

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)

# On these names of a ViT re would be busy for longer than the universe has existed.
BOMB = r"((\w|\.|_)+)+!"
FC1 = "vit.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    with quiet_peft():
        adapted(base).save_pretrained(folder)
    return folder


def load_with(model, adapter):
    model.load_adapter(str(adapter))
    return model


LOADERS = {
    "PeftModel": lambda base, adapter: PeftModel.from_pretrained(load_base(base), adapter),
    "low_cpu_mem_usage": lambda base, adapter: PeftModel.from_pretrained(
        load_base(base), adapter, low_cpu_mem_usage=True
    ),
    "AutoPeftModel": lambda base, adapter: AutoPeftModel.from_pretrained(adapter),
    "load_adapter": lambda base, adapter: load_with(load_base(base), adapter),
    "AutoModel": lambda base, adapter: load_base(adapter),
    "get_peft_model": lambda base, adapter: peft.get_peft_model(
        load_base(base), peft.PeftConfig.from_pretrained(adapter)
    ),
    "get_kron_model": lambda base, adapter: get_kron_model(load_base(base), KronConfig.from_pretrained(str(adapter))),
}


def one(**entry):
    return {"modules": {FC1: entry}}


def fc1(block_size, rank):
    return one(block_size=block_size, rank=rank)


NO_MAP = {"modules": None}
HOSTILE = {
    "a pattern as target": ({**NO_MAP, "target_modules": BOMB}, r"has patterns \(target_modules\)"),
    "a pattern to exclude": ({**NO_MAP, "exclude_modules": BOMB}, r"has patterns \(exclude_modules\)"),
    "a pattern of block sizes": ({**NO_MAP, "block_size_pattern": {BOMB: 4}}, r"has patterns \(block_size_pattern\)"),
    "a pattern of ranks": ({**NO_MAP, "rank_pattern": {BOMB: 1}}, r"has patterns \(rank_pattern\)"),
    "a pattern of layers": (
        {**NO_MAP, "target_modules": ["fc1"], "layers_to_transform": [0], "layers_pattern": BOMB},
        r"has patterns \(layers_pattern\)",
    ),
    "patterns beside the map": ({"target_modules": BOMB}, "modules already says which modules"),
    "a pattern of ranks beside the map": ({"rank_pattern": {BOMB: 1}}, "modules already says which modules"),
    "a pattern in the map": ({"modules": {BOMB: {"block_size": [4, 8], "rank": 2}}}, "has no module"),
    "a name that is not there": (
        fc1([4, 8], 2) | {"modules": {"vit.x": {"block_size": [4, 8], "rank": 2}}},
        "no module",
    ),
    "a name above the model": ({"modules": {"..": {"block_size": [4, 8], "rank": 2}}}, "has no module '..'"),
    "the model itself": (
        {"modules": {"vit": {"block_size": [4, 8], "rank": 2}}},
        "vit: only nn.Linear and nn.Conv2d can become",
    ),
    "a norm": (
        {"modules": {"vit.layernorm": {"block_size": [4, 8], "rank": 2}}},
        "only nn.Linear and nn.Conv2d can become",
    ),
    "an empty map": ({"modules": {}}, "modules must be a non-empty dict"),
    "a map that is a list": ({"modules": [FC1]}, "modules must be a non-empty dict"),
    "a block that does not divide": (fc1([5, 7], 1), r"fc1: block_size \(5, 7\) does not divide"),
    "a block above the layer": (fc1([128, 32], 1), r"fc1: block_size \(128, 32\) does not divide"),
    "a huge block": (fc1([10**4000, 2**30], 1), "with positive ints below"),
    "an open block": (fc1([1, -1], 1), "with positive ints"),
    "a huge rank": (fc1([4, 8], 2**31 - 1), r"rank must be at most .* bi = 32, got 2147483647"),
    "a rank of zero": (fc1([4, 8], 0), "with positive ints"),
    "a rank that is a string": (fc1([4, 8], "2"), "with positive ints"),
    "an infinite rank": (fc1([4, 8], float("inf")), "with positive ints"),
    "another key in the map": (one(block_size=[4, 8], rank=2, code="x"), "must be"),
    "an unknown key": ({"auto_map": "os.system"}, r"does not know: \['auto_map'\]"),
    "a newer version": ({"format_version": 99}, "has format_version 99, this kron_hf reads up to 1; upgrade"),
    "a version that is a list": ({"format_version": [1]}, "format_version must be an int"),
    "a huge version": ({"format_version": 10**4000}, "has format_version .*upgrade"),
    "a task that is none": ({"task_type": "EVAL"}, "Invalid task type"),
    "a task that is a dict": ({"task_type": {}}, "Invalid task type"),
    "a mode that is a string": ({"inference_mode": "no"}, "inference_mode must be a bool"),
    "a block size that is a dict": ({"block_size": {}}, "block_size must be"),
    "a rank above the block": ({"rank": 10**4000}, "rank must be at most"),
    "escapes": ({"task_type": "\x1b[31m\n", "revision": "\x1b[31m\n"}, r"Invalid task type: .\\x1b\[31m\\n"),
    "deep nesting": ({"block_size": json.loads("[" * 500 + "]" * 500)}, "block_size must be"),
    "a rank that is a list": ({"rank": [1]}, "rank must be an int"),
    "names to save that are numbers": ({"modules_to_save": [1]}, "modules_to_save must be"),
    "names to save that are a string": ({"modules_to_save": BOMB}, "modules_to_save must be"),
}


# Two ways to read a config, PEFT's by class and its general one; the patterns are tried on every loader.
CASES = [
    pytest.param(loader, *case, id=f"{name}-{loader}")
    for name, case in HOSTILE.items()
    for loader in (LOADERS if "a pattern" in name else ("PeftModel", "load_adapter"))
]


@pytest.mark.parametrize(("loader", "change", "message"), CASES)
def test_a_hostile_config(base, saved, tmp_path, loader, change, message):
    shutil.copy(saved / "adapter_model.safetensors", tmp_path)
    stored = json.loads((saved / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**stored, **change}))
    with pytest.raises(ValueError, match=message) as caught:
        LOADERS[loader](base, tmp_path)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("loader", [name for name in LOADERS if name not in ("get_kron_model", "get_peft_model")])
def test_a_pattern_in_modules_to_save_is_a_name_that_no_module_has(base, saved, tmp_path, loader):
    shutil.copy(saved / "adapter_model.safetensors", tmp_path)
    stored = json.loads((saved / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**stored, "modules_to_save": [BOMB]}))
    assert torch.equal(logits(LOADERS[loader](base, tmp_path)), logits(load_base(saved)))


@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_claimed_sizes_take_no_memory(tmp_path, low):
    sizes = {**VIT_SIZES, "hidden_size": 512, "num_hidden_layers": 1}
    model = ViTForImageClassification(ViTConfig(**sizes))
    peft.get_peft_model(model, KronConfig(target_modules=["q_proj"], block_size=64)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    stored = json.loads(file.read_text())
    # One block, at full rank: B would take 275 GB. The file holds much less.
    stored["modules"] = {name: {"block_size": [512, 512], "rank": 512 * 512} for name in stored["modules"]}
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"has shape \[8, 8\], its config requires \[1, 1\]"):
        PeftModel.from_pretrained(ViTForImageClassification(ViTConfig(**sizes)), tmp_path, low_cpu_mem_usage=low)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ViTForImageClassification(ViTConfig(**sizes)).load_adapter(str(tmp_path))


def test_layers_take_memory_when_their_tensors_arrive(base, saved):
    waiting = peft.get_peft_model(load_base(base), peft.PeftConfig.from_pretrained(saved))
    assert all(parameter.is_meta for layer in kron_layers(waiting) for parameter in layer.parameters())
    short = {key: tensor[:1] for key, tensor in peft.get_peft_model_state_dict(adapted(base)).items()}
    with pytest.raises(ValueError, match="its config requires"):
        peft.set_peft_model_state_dict(waiting, short)
    assert all(parameter.is_meta for layer in kron_layers(waiting) for parameter in layer.parameters())


def test_names_of_a_stranger_are_shown_escaped_and_short(base, saved, tmp_path):
    name = "\x1b[31mfc1\n" + "x" * 10**5
    stored = json.loads((saved / "adapter_config.json").read_text())
    stored["modules"] = {name: {"block_size": [4, 8], "rank": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="has no module") as caught:
        PeftModel.from_pretrained(load_base(base), tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_tensor_names_of_a_stranger_are_shown_escaped_and_short(base, saved, tmp_path):
    shutil.copy(saved / "adapter_config.json", tmp_path)
    tensors = load_file(saved / "adapter_model.safetensors")
    tensors["base_model.model.\x1b[31m\n" + "x" * 10**4 + ".kron_layers.s"] = torch.zeros(1)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="its config does not name") as caught:
        PeftModel.from_pretrained(load_base(base), tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_matching_a_stored_map_runs_no_regular_expression(base, saved, monkeypatch):
    def no_matching(*args):
        raise AssertionError("a name of a stored adapter was matched")

    monkeypatch.setattr("kron_hf.targets.check_target_module_exists", no_matching)
    monkeypatch.setattr("kron_hf.targets.get_pattern_key", no_matching)
    monkeypatch.setattr("peft.tuners.tuners_utils.check_target_module_exists", no_matching)
    monkeypatch.setattr("peft.tuners.tuners_utils.match_target_against_key", no_matching)
    monkeypatch.setattr("peft.utils.save_and_load.match_target_against_key", no_matching)
    expected = logits(load_base(saved))
    assert torch.equal(logits(PeftModel.from_pretrained(load_base(base), saved)), expected)
    with pytest.raises(AssertionError, match="was matched"):
        peft.get_peft_model(load_base(base), config())
