"""find_targets with a resolved map, with names to save, and on models with adapters."""

import pytest
import transformers as hf
from families import FAMILIES
from peft import LoraConfig, get_peft_model

from kron_hf import KronConfig, get_kron_model
from kron_hf.targets import find_targets, names_to_save

FC1, FC2 = "vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc2"


def entry(block_size, rank):
    return {"block_size": list(block_size), "rank": rank}


def stored(modules, **options):
    return KronConfig(modules=modules, **options)


def sizes(targets):
    return {target.name: (target.block_size, target.rank) for target in targets}


def test_each_module_gets_what_its_entry_says():
    targets = find_targets(FAMILIES["vit"](), stored({FC1: entry((4, 8), 3), FC2: entry((1, 64), 1)}))
    assert sizes(targets) == {FC1: ((4, 8), 3), FC2: ((1, 64), 1)}


def test_names_hold_with_and_without_the_prefix():
    vit, backbone = FAMILIES["vit"](), hf.ViTModel(FAMILIES["vit"]().config)
    bare = FC1.removeprefix("vit.")
    assert sizes(find_targets(vit, stored({bare: entry((4, 8), 1)}))) == {FC1: ((4, 8), 1)}
    assert sizes(find_targets(backbone, stored({FC1: entry((4, 8), 1)}))) == {bare: ((4, 8), 1)}


def test_a_head_that_is_in_the_map_is_replaced():
    assert sizes(find_targets(FAMILIES["vit"](), stored({"classifier": entry((2, 8), 1)})))


@pytest.mark.filterwarnings("error")
def test_a_stored_map_gives_no_advice():
    assert find_targets(FAMILIES["vit"](), stored({FC1: entry((4, 8), 32)}))  # dearer than dense


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({FC1: entry((5, 8), 1)}, r"fc1: block_size \(5, 8\) does not divide its weight of shape \(64, 32\)"),
        ({FC1: entry((4, 8), 33)}, "fc1: rank must be at most .* = 32, got 33"),
        ({FC1: entry((4, 8), 1), "fc1": entry((4, 8), 1)}, r"no module 'fc1' \(1 of 2 are missing\)"),
        ({"mlp.fc1": entry((4, 8), 1)}, "no module 'mlp.fc1'"),
        ({"vit.layers.0": entry((4, 8), 1)}, "layers.0: only nn.Linear and nn.Conv2d can become"),
    ],
    ids=["block", "rank", "no ending", "no part", "no linear"],
)
def test_a_map_that_does_not_fit(modules, message):
    with pytest.raises(ValueError, match=message):
        find_targets(FAMILIES["vit"](), stored(modules))


@pytest.mark.parametrize("door", [find_targets, get_kron_model, get_peft_model], ids=lambda door: door.__name__)
def test_patterns_of_a_config_from_a_file_are_refused(tmp_path, door):
    KronConfig(block_size=8, rank=1, target_modules=r".*\.fc1").save_pretrained(str(tmp_path))
    model = FAMILIES["vit"]()
    with pytest.raises(ValueError, match=r"was read from a file and has patterns \(target_modules\)"):
        door(model, KronConfig.from_pretrained(str(tmp_path)))
    assert all("kron" not in type(module).__name__.lower() for module in model.modules())


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (None, []),
        (["classifier"], ["classifier"]),
        (["embeddings"], ["vit.embeddings"]),
        (["mlp.fc1"], [FC1, FC1.replace("0", "1")]),
        (["mbeddings", "vit.embed", ".*", "fc1|fc2"], []),
    ],
    ids=repr,
)
def test_names_to_save_are_names_or_endings_at_a_dot(entries, expected):
    assert names_to_save(FAMILIES["vit"](), KronConfig(modules_to_save=entries)) == expected


@pytest.mark.parametrize("target_modules", [None, "all-linear", r".*mlp\.fc\d", ["fc1", "fc2"]], ids=repr)
@pytest.mark.filterwarnings("ignore:Left dense:UserWarning")
def test_modules_to_save_are_no_targets(target_modules):
    options = {"block_size": (2, 8), "rank": 1, "target_modules": target_modules}
    model = FAMILIES["vit"]()
    found = sizes(find_targets(model, KronConfig(**options, modules_to_save=["layers.0", "fc2"])))
    kept = sizes(find_targets(model, KronConfig(**options)))
    assert set(found) == {name for name in kept if "layers.0" not in name and not name.endswith("fc2")}
    assert found


def test_a_model_with_adapters_is_refused():
    model = FAMILIES["swin"]()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"carries PEFT adapters \(first: swin.*q_proj\); merge them first"):
        find_targets(model, KronConfig(block_size=8))
