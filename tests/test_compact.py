"""Compact files (format version 2): smaller, loaded by the stock loaders, and checked before anything is unpacked."""

import json
import re

import pytest
import torch
from families import FAMILIES, example_input, kron_layers, outputs_of
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from kron_hf import KronConfig, export, get_kron_model
from kron_hf.checkpoint.compact import pack_state_dict
from kron_hf.selection.candidates import KronCandidates

CONFIG = KronConfig(block_size=2, rank=1)
FC1 = "vit.layers.0.mlp.fc1"  # 32 x 16 blocks: a mask of 64 bytes


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def sparse(model, share):
    torch.manual_seed(0)
    for layer in kron_layers(model).values():
        with torch.no_grad():
            layer.s.copy_(torch.randn_like(layer.s))
            layer.s.view(-1)[torch.randperm(layer.s.numel())[: int(share * layer.s.numel())]] = 0
        layer.freeze_mask()
    return model.eval()


def build(share=0.8, family="vit", config=CONFIG):
    torch.manual_seed(0)
    return sparse(get_kron_model(FAMILIES[family](), config), share)


@pytest.fixture
def compact(tmp_path):
    export(build(), tmp_path / "compact", "compact")
    return tmp_path / "compact"


def version(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"]


def load(folder, **options):
    return AutoModelForImageClassification.from_pretrained(folder, **options)


def assert_same_model(loaded, model):
    """The same outputs, masks and tensors; of A, what S does not hide."""
    inputs = example_input(model)
    assert_equal(outputs_of(loaded, inputs), outputs_of(model, inputs))
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        masked = tensor * (expected[f"{name[:-2]}.s"] != 0) if name.endswith(".a") else tensor
        assert_equal(state[name], masked)
    for name, layer in kron_layers(model).items():
        assert_equal(kron_layers(loaded)[name].dead_blocks, layer.dead_blocks)
        assert_equal(kron_layers(loaded)[name].dense_weight(), layer.dense_weight())


@pytest.mark.parametrize("family", ["vit", "swin", "dinov2"])
def test_round_trip(tmp_path, family):
    model = build(family=family)
    export(model, tmp_path / "compact", "compact")
    assert version(tmp_path / "compact") == 2
    loaded = load(tmp_path / "compact")
    assert_same_model(loaded, model)
    loaded.save_pretrained(tmp_path / "plain")  # as any model
    assert version(tmp_path / "plain") == 1
    assert_same_model(load(tmp_path / "plain"), model)


def test_smaller_with_every_step_of_sparsity(tmp_path):
    build(0.5).save_pretrained(tmp_path / "plain")
    sizes = [(tmp_path / "plain" / "model.safetensors").stat().st_size]
    for share in (0.5, 0.8, 0.95, 1.0):
        export(build(share), tmp_path / str(share), "compact")
        sizes.append((tmp_path / str(share) / "model.safetensors").stat().st_size)
    assert sizes == sorted(set(sizes), reverse=True)


def test_without_zeros_the_file_is_an_ordinary_one(tmp_path):
    model = build(0.0)
    export(model, tmp_path / "compact", "compact")
    assert version(tmp_path / "compact") == 1
    assert_equal(load_file(tmp_path / "compact" / "model.safetensors"), dict(model.state_dict()))


def test_a_layer_where_zeros_hide_infinity_is_stored_whole():
    model = build()
    layer = model.get_submodule(FC1)
    with torch.no_grad():
        layer.a[:, layer.dead_blocks] = float("inf")
    state = pack_state_dict(model)
    assert f"{FC1}.a" in state
    assert "vit.layers.0.mlp.fc2.live_a" in state


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"device_map": "cpu"},
        {"num_labels": 7, "ignore_mismatched_sizes": True},
        {"key_mapping": {"nothing": "something"}},
    ],
    ids=["dtype", "device_map", "new head", "key_mapping"],
)
def test_load_options(compact, options):
    loaded, dtype = load(compact, **options).vit.state_dict(), options.get("dtype", torch.float32)
    expected = load(compact).vit.state_dict()
    assert_equal(loaded, {name: tensor.to(dtype) for name, tensor in expected.items()})


def test_offloaded_to_the_disk(compact, tmp_path):
    names = ("vit.embeddings", "vit.layers.0", "vit.layers.1", "vit.layernorm", "classifier")
    device_map = {name: "disk" if name == "vit.layers.1" else "cpu" for name in names}
    loaded = load(compact, device_map=device_map, offload_folder=tmp_path / "offloaded")
    inputs = example_input(loaded)
    assert_equal(outputs_of(loaded, inputs), outputs_of(build(), inputs))


def test_backbone_and_headed_class_load_each_other(compact, tmp_path):
    backbone = AutoModel.from_pretrained(compact)
    assert_equal(backbone.layers[0].mlp.fc1.s, build().vit.layers[0].mlp.fc1.s)
    export(backbone, tmp_path / "backbone", "compact")
    headed = ViTForImageClassification.from_pretrained(tmp_path / "backbone")
    assert_equal(headed.vit.layers.state_dict(), backbone.layers.state_dict())


def test_from_a_state_dict(compact):
    config = ViTConfig.from_pretrained(compact)
    loaded = ViTForImageClassification.from_pretrained(None, config=config, state_dict=pack_state_dict(build()))
    assert_same_model(loaded, build())


def test_shards_and_candidates(tmp_path):
    model = build(config=KronConfig(candidate_block_sizes=[2, 4], rank=1))
    export(model, tmp_path / "compact", "compact", max_shard_size="20KB")
    assert len(list((tmp_path / "compact").glob("*.safetensors"))) > 1
    loaded = load(tmp_path / "compact")
    assert any(isinstance(module, KronCandidates) for module in loaded.modules())
    assert_same_model(loaded, model)


def test_version_1_files_hold_no_compact_tensors(compact):
    path = compact / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 1
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'vit\.layers.*\.s' is missing"):
        load(compact)


def set_part(part, change):
    def edit(tensors):
        tensors[f"{FC1}.{part}"] = change(tensors[f"{FC1}.{part}"])

    return edit


def flip(bit):
    def change(mask):
        mask = mask.clone()
        mask[bit // 8] ^= 1 << bit % 8
        return mask

    return change


FAULTS = [
    pytest.param(lambda t: t.pop(f"{FC1}.live_blocks"), r"live_blocks' is missing beside others", id="no mask"),
    pytest.param(lambda t: t.pop(f"{FC1}.live_s"), r"live_s' is missing beside others", id="no S"),
    pytest.param(lambda t: t.pop(f"{FC1}.live_a"), r"live_a' is missing beside others", id="no A"),
    pytest.param(lambda t: t.pop(f"{FC1}.b"), rf"tensor '{FC1}\.b' is missing", id="no B"),
    pytest.param(lambda t: t.update({f"{FC1}.s": torch.ones(32, 16)}), r"there twice, .*\.s' is whole", id="S twice"),
    pytest.param(set_part("live_blocks", flip(3)), r"live_blocks' says that 10[24] blocks live, but .*103", id="a bit"),
    pytest.param(set_part("live_blocks", lambda m: m[:-1]), r"shape \[63\], which does not fit 32 x 16", id="short"),
    pytest.param(set_part("live_blocks", lambda m: m.repeat(9)), r"has shape \[576\], which does not", id="long"),
    pytest.param(set_part("live_blocks", lambda m: m[None]), r"has shape \[1, 64\], which", id="mask of 2 dimensions"),
    pytest.param(set_part("live_blocks", lambda m: m.float()), r"blocks' has dtype F32, not one of U8", id="float"),
    pytest.param(set_part("live_blocks", lambda m: m * 0 + 255), "says that 512 blocks live", id="all alive"),
    pytest.param(set_part("live_s", lambda s: s[:-1]), r"live_a' has shape \[1, 103\]", id="fewer of S"),
    pytest.param(set_part("live_s", lambda s: s[None]), r"live_s' has shape \[1, 103\]", id="S of 2 dimensions"),
    pytest.param(set_part("live_s", lambda s: s.long()), r"live_s' has dtype I64", id="S of ints"),
    pytest.param(set_part("live_s", lambda s: s.repeat(99)), r"has shape \[10197\], which does not fit", id="too many"),
    pytest.param(
        set_part("live_a", lambda a: a.repeat(2, 1)), r"live_a' has shape \[2, 103\], which does not", id="rank"
    ),
    pytest.param(set_part("live_a", lambda a: a.T), r"live_a' has shape \[103, 1\], which does not", id="transposed"),
    pytest.param(
        lambda t: t.update(
            {f"classifier.{p}": t[f"{FC1}.{p}"].clone() for p in ("live_blocks", "live_s", "live_a", "b")}
        ),
        "holds Kronecker factors of 'classifier', which the map does not name",
        id="another module",
    ),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_broken_files(compact, change, message):
    path = compact / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message) as caught:
        load(compact, ignore_mismatched_sizes=True)
    assert re.match(r"model\.safetensors|config\.json", str(caught.value))


def test_a_bit_after_the_last_block(tmp_path):
    model = get_kron_model(
        ViTForImageClassification(
            ViTConfig(hidden_size=30, intermediate_size=50, num_attention_heads=2, num_hidden_layers=1)
        ),
        KronConfig(block_size=2, rank=1, target_modules=["fc1"]),
    )  # 25 x 15 blocks
    export(sparse(model, 0.8), tmp_path / "compact", "compact")
    path = tmp_path / "compact" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{FC1}.live_blocks"][-1] |= 0x80
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor .*': a bit after the last of \(25, 15\)"):
        load(tmp_path / "compact")


def test_claimed_sizes_are_refused_before_anything_is_allocated(compact):
    path = compact / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": 2**30}))
    with pytest.raises(ValueError, match=r"live_blocks' has shape \[64\], which does not fit 536870912 x 16 blocks"):
        load(compact)
