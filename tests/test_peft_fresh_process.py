"""Adapters in a new process: bit-equal after `import kron_hf`, and a loud failure without it."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_peft import INPUTS, PEFT_NOISE, adapted, logits, quiet_peft, save_base

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)

# argv: folder of the base, the adapter and the inputs; file for the outputs; modules to import before.
CHILD = """
import importlib, json, sys, traceback
folder = sys.argv[1]
for name in sys.argv[3:]:
    importlib.import_module(name)
import torch, transformers
from peft import AutoPeftModel, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

def base():
    return transformers.AutoModelForImageClassification.from_pretrained(folder + "/base")

def load_adapter():
    model = base()
    model.load_adapter(folder + "/adapter")
    return model

LOADERS = {
    "PeftModel": lambda: PeftModel.from_pretrained(base(), folder + "/adapter"),
    "low_cpu_mem_usage": lambda: PeftModel.from_pretrained(base(), folder + "/adapter", low_cpu_mem_usage=True),
    "AutoPeftModel": lambda: AutoPeftModel.from_pretrained(folder + "/adapter"),
    "load_adapter": load_adapter,
    "AutoModel": lambda: transformers.AutoModelForImageClassification.from_pretrained(folder + "/adapter"),
    "PeftConfig": lambda: PeftConfig.from_pretrained(folder + "/adapter"),
    "pipeline": lambda: transformers.pipeline(
        "image-classification",
        model=folder + "/adapter",
        image_processor=transformers.ViTImageProcessor(size={"height": 16, "width": 16}),
        device="cpu",
    ).model,
}
inputs = load_file(folder + "/inputs.safetensors")
outcomes, outputs = {}, {}
for name, load in LOADERS.items():
    try:
        model = load()
    except Exception as error:
        outcomes[name] = "".join(traceback.format_exception_only(error))
        continue
    outcomes[name] = "loaded"
    if name != "PeftConfig":
        with torch.no_grad():
            outputs[name] = model.eval()(**inputs).logits
save_file({name: tensor.clone() for name, tensor in outputs.items()}, sys.argv[2])
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    save_base(folder / "base")
    with quiet_peft():
        model = adapted(folder / "base", modules_to_save=["classifier"])
    model.save_pretrained(folder / "adapter")
    save_file(INPUTS, folder / "inputs.safetensors")
    save_file({"logits": logits(model)}, folder / "expected.safetensors")
    return folder


@pytest.fixture(scope="module")
def outcomes(folder):
    """What each loader came to, with and without the import; both processes run at once."""
    processes = {
        modules: subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), str(folder / f"outputs{len(modules)}"), *modules],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for modules in (("kron_hf",), ())
    }
    printed = {modules: process.communicate() for modules, process in processes.items()}
    for modules, process in processes.items():
        assert process.returncode == 0, printed[modules][1]
    return {modules: json.loads(output.splitlines()[-1]) for modules, (output, _) in printed.items()}


def test_every_loader_gives_the_same_outputs_after_import_kron_hf(folder, outcomes):
    with_import = outcomes[("kron_hf",)]
    assert set(with_import.values()) == {"loaded"}, with_import
    outputs = load_file(folder / "outputs1")
    assert len(outputs) == len(with_import) - 1
    expected = load_file(folder / "expected.safetensors")["logits"]
    assert not [name for name, tensor in outputs.items() if not torch.equal(tensor, expected)]


def test_without_import_kron_hf_every_loader_fails(outcomes):
    without = outcomes[()]
    assert len(without) == 7
    assert all("KRON" in error for error in without.values()), without
