"""Every family saved and loaded: in a fresh process, between classes, back to dense, and by Trainer's resume."""

import json
import subprocess
import sys

import pytest
import torch
import transformers as hf
from families import ALL_FAMILIES, convert, example_input, kron_layers, outputs_of
from safetensors.torch import load_file, save_file

from kron_hf import KronConfig, get_kron_model, to_dense


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# Further ones, whose round trips run with the slow tests.
SLOW = {
    *(
        "albert",
        "ast",
        "blip-vision",
        "cvt",
        "data2vec-vision",
        "electra",
        "hiera",
        "ijepa",
        "mask2former",
        "maskformer",
        "mbart",
    ),
    *(
        "t5-gated",
        "mobilevit",
        "modernbert",
        "pvt",
        "pvt-v2",
        "siglip2-classifier",
        "swiftformer",
        "videomae",
        "vitdet",
        "vivit",
    ),
}


def slowly(families) -> list:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in families]


LOAD_ALL = """
import json, pathlib, sys
import torch
from safetensors.torch import load_file
import kron_hf
import transformers
results = {}
for folder, loader in json.loads(sys.argv[1]).items():
    inputs = load_file(pathlib.Path(folder) / "example" / "tensors.safetensors")
    expected = inputs.pop("outputs")
    model = getattr(transformers, loader).from_pretrained(folder)
    with torch.no_grad():
        result = model(**inputs)
    output = next((result[name] for name in ("logits", "last_hidden_state") if name in result), result.to_tuple()[0])
    output = output if isinstance(output, torch.Tensor) else output[-1]
    layers = [m for m in model.modules() if isinstance(m, kron_hf.KronLinear)]
    results[folder] = {
        "class": type(model).__name__,
        "equal": torch.equal(output, expected),
        "kron": len(layers),
        "frozen": all(layer.dead_blocks is not None for layer in layers),
    }
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def saved(request, tmp_path_factory):
    """For every selected family a converted model with zero blocks, as training leaves them: `(model, folder)`."""
    root = tmp_path_factory.mktemp("families")
    models = {}
    here = [item for item in request.session.items if item.path == request.path]
    selected = [item for item in here if "saved" in getattr(item, "fixturenames", ())]
    for family in dict.fromkeys(item.callspec.params["family"] for item in selected):
        torch.manual_seed(0)
        model = convert(ALL_FAMILIES[family]()).eval()
        for layer in kron_layers(model).values():
            with torch.no_grad():
                layer.s.copy_(torch.randn_like(layer.s))
                layer.s[0, 0] = 0
            layer.freeze_mask()
        model.save_pretrained(root / family)
        models[family] = (model, root / family)
    return models


@pytest.fixture(scope="module")
def fresh_process_results(saved):
    for model, folder in saved.values():
        inputs = example_input(model)
        (folder / "example").mkdir()
        save_file(
            inputs | {"outputs": outputs_of(model, inputs).contiguous()}, folder / "example" / "tensors.safetensors"
        )
    loaders = {str(folder): ALL_FAMILIES[family].loader for family, (_, folder) in saved.items()}
    command = [sys.executable, "-c", LOAD_ALL, json.dumps(loaders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", slowly(ALL_FAMILIES))
def test_round_trip_in_a_fresh_process_is_bit_equal(fresh_process_results, saved, family):
    model, folder = saved[family]
    expected = {"class": type(model).__name__, "equal": True, "kron": len(kron_layers(model)), "frozen": True}
    assert fresh_process_results[str(folder)] == expected


@pytest.mark.parametrize("family", slowly(ALL_FAMILIES))
def test_files_have_the_names_of_the_model(saved, family):
    model, folder = saved[family]
    tied = {alias for alias, _ in find_tied(model)}
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys() - tied


def find_tied(model) -> list[tuple[str, str]]:
    first: dict[int, str] = {}
    names = [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]
    return [(name, first[key]) for name, key in names if first.setdefault(key, name) != name]


WITH_BACKBONE = [
    name
    for name, family in ALL_FAMILIES.items()
    if family.loader.startswith("AutoModelFor") and not name.startswith(("clip", "siglip", "t5"))
]


@pytest.mark.parametrize("family", slowly(WITH_BACKBONE))
def test_backbone_and_headed_class_load_each_others_files(tmp_path, saved, family):
    model, folder = saved[family]
    inputs = example_input(model.base_model)
    expected = outputs_of(model.base_model, inputs)
    backbone = hf.AutoModel.from_pretrained(folder)
    assert type(backbone) is type(model.base_model)
    assert_equal(outputs_of(backbone, inputs), expected)
    backbone.save_pretrained(tmp_path)
    headed = type(model).from_pretrained(tmp_path)
    assert_equal(outputs_of(headed.base_model, inputs), expected)
    assert list(kron_layers(headed)) == list(kron_layers(model))


@pytest.mark.parametrize("family", slowly(ALL_FAMILIES))
def test_to_dense_saves_plain_transformers(tmp_path, saved, family):
    folder = saved[family][1]
    model = getattr(hf, ALL_FAMILIES[family].loader).from_pretrained(folder)
    inputs = example_input(model)
    expected = outputs_of(model, inputs)
    assert to_dense(model) is model
    model.save_pretrained(tmp_path)
    assert not {"quantization_config", "fusion_config"} & json.loads((tmp_path / "config.json").read_text()).keys()
    loaded = type(model).from_pretrained(tmp_path)
    assert not kron_layers(loaded)
    torch.testing.assert_close(outputs_of(loaded, inputs), expected, rtol=1e-4, atol=1e-5)


# Classes that hold a part of another class's model


@pytest.mark.parametrize("family", ["clip-classifier"])
def test_the_whole_clip_takes_the_layers_of_its_classifier(saved, family):
    model, folder = saved[family]
    whole = hf.CLIPModel.from_pretrained(folder)
    assert list(kron_layers(whole)) == list(kron_layers(model))
    for name, layer in kron_layers(whole).items():
        assert_equal(layer.state_dict(), model.get_submodule(name).state_dict())


@pytest.mark.parametrize(
    ("family", "kind", "message"),
    [
        ("clip", "CLIPVisionModel", "You set `ignore_mismatched_sizes` to `False`"),
        ("clip", "CLIPTextModel", "You set `ignore_mismatched_sizes` to `False`"),
        ("siglip", "SiglipVisionModel", "You set `ignore_mismatched_sizes` to `False`"),
        ("clip-vision-projection", "CLIPVisionModel", "CLIPVisionModel has no module 'vision_model"),
        ("clip", "CLIPForImageClassification", "CLIPForImageClassification has no module 'text_model"),
    ],
    ids=lambda value: value if value.isidentifier() else "",
)
def test_a_tower_cannot_be_loaded_out_of_a_converted_pair_and_says_so(saved, family, kind, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        getattr(hf, kind).from_pretrained(saved[family][1])


# Trainer's resume loads state dicts by their raw names


def test_trainer_resumes_a_family_that_transformers_saves_under_older_names(tmp_path):
    ALL_FAMILIES["segformer-classifier"]().save_pretrained(tmp_path / "dense")
    dense = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    dense.save_pretrained(tmp_path / "dense")
    assert load_file(tmp_path / "dense" / "model.safetensors").keys() != dense.state_dict().keys()

    pixels = example_input(dense)["pixel_values"]
    data = [{"pixel_values": pixels[index % 2] + index, "labels": index % 2} for index in range(4)]

    def run(name, **resume):
        model = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
        config = KronConfig(block_size=(4, 8), rank=1, init_weights="random")
        arguments = hf.TrainingArguments(
            str(tmp_path / name),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = hf.Trainer(get_kron_model(model, config), arguments, train_dataset=data)
        trainer.train(**resume)
        return trainer.model.state_dict()

    whole = run("whole")
    torch.manual_seed(1)  # the second model starts from other factors
    assert_equal(run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")), whole)
