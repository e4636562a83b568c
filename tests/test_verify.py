"""Every claim of a card holds as it was written, and fails once it, the card or the files are changed."""

import hashlib
import json
import shutil

import pytest
import torch
from families import FAMILIES
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny_cards import HISTORY, tiny_model
from tiny_peft import quiet_peft

from kron_hf import KronConfig, kron_summary, write_model_card
from kron_hf.claims import Claims
from kron_hf.cli import main
from kron_hf.command.options import DataOptions
from kron_hf.command.processor import make_image_processor
from kron_hf.verify.model import check_merge
from kron_hf.verify.run import verify

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("verified") / "model", tiny_model()
    model.classifier.requires_grad_(False)
    model.save_pretrained(folder)
    make_image_processor(model.config).save_pretrained(folder)
    write_model_card(model, folder, history=HISTORY)
    measured = verify(str(folder), data=DataOptions(dataset="digits"))
    assert measured.holds
    accuracy, loss = _measured(model, folder)
    write_model_card(model, folder, dataset="digits", split="test", metrics={"accuracy": accuracy, "loss": loss})
    return folder


@pytest.fixture
def saved(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def _measured(model, folder):
    """By hand: scikit-learn's digits through the saved processor's numbers."""
    from kron_hf.data.grey import load_grey_set

    images, labels = load_grey_set("digits").test
    pixels = (torch.from_numpy(images)[:, None].float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    targets = torch.from_numpy(labels)
    loss = torch.nn.functional.cross_entropy(logits, targets).item()
    return (logits.argmax(-1) == targets).float().mean().item(), loss


def failures(folder, **options):
    return {check.claim: check for check in verify(str(folder), **options).checks if check.holds is False}


def test_every_claim_holds(saved):
    report = verify(str(saved), data=DataOptions(dataset="digits"))
    assert report.holds
    verdicts = {check.claim: check.verdict for check in report.checks}
    for claim in (
        *("SHA-256 of README.md", f"SHA-256 of {WEIGHTS}", "sparsity", "total params", "trained params", "image flops"),
        *("zero blocks are exactly zero in W", "the model against to_dense", "figures in the card"),
        *("accuracy on digits, test", "loss on digits, test", "figures of 6 layers"),
    ):
        assert verdicts[claim] == "holds"
    assert verdicts["versions"] == "not checked"


def test_metrics_need_the_data(saved):
    report = verify(str(saved))
    assert report.holds
    check = next(check for check in report.checks if check.claim == "accuracy on digits, test")
    assert (check.holds, check.found) == (None, "pass --dataset to measure it")


def _flip_byte(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _change_weight(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors["vit.layers.0.mlp.fc1.s"])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _change_claims(folder, change):
    path = folder / "kron_claims.json"
    claims = json.loads(path.read_text())
    change(claims)
    path.write_text(json.dumps(claims))


def _forge_files(folder):
    """What a forger does who changes a file: the checksums are made to fit."""

    def change(claims):
        for name in claims["files"]:
            content = (folder / name).read_bytes()
            claims["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    _change_claims(folder, change)


def _replace_in_card(folder, old, new):
    path = folder / "README.md"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


CHANGES = {
    "a bit of a weight": (lambda f: _flip_byte(f / WEIGHTS), f"SHA-256 of {WEIGHTS}"),
    "a zero of S": (lambda f: _change_weight(f, lambda s: s[:, 0].fill_(1e-30)), "sparsity"),
    "a bit of a picture": (lambda f: _flip_byte(f / "kron_masks.png"), "SHA-256 of kron_masks.png"),
    "prose of the card": (lambda f: _replace_in_card(f, "## Limits", "## Limit"), "SHA-256 of README.md"),
    "a figure of the card": (
        lambda f: _replace_in_card(f, "trained parameters | ", "trained parameters | 1"),
        "figures in the card",
    ),
    "a claimed count": (lambda f: _change_claims(f, lambda c: c["whole"].update(nonzeros=1)), "nonzeros"),
    "a claimed layer": (
        lambda f: _change_claims(f, lambda c: c["layers"][2].update(rank=1)),
        "figures of 6 layers: vit.layers.0.attention.v_proj, rank",
    ),
    "a claim left out": (lambda f: _change_claims(f, lambda c: c["layers"].pop()), "figures of 6 layers"),
    "what was frozen": (lambda f: _change_claims(f, lambda c: c["frozen"].clear()), "trained params"),
    "an unknown frozen name": (lambda f: _change_claims(f, lambda c: c["frozen"].append("x")), "trained parameters"),
    "a missing file": (lambda f: (f / "kron_masks.png").unlink(), "SHA-256 of kron_masks.png"),
    "another weight file": (
        lambda f: shutil.copy(f / WEIGHTS, f / "model-00001-of-00001.safetensors"),
        "SHA-256 of model-00001-of-00001.safetensors",
    ),
    "a truncated file": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "the model loads"),
    "no card": (lambda f: (f / "README.md").unlink(), "SHA-256 of README.md"),
    "config.json": (lambda f: (f / "config.json").write_text("{"), "the model loads"),
    "a number beyond floats": (lambda f: _change_claims(f, lambda c: c["whole"].update(sparsity=10**400)), "sparsity"),
    "a figure that nobody counts": (
        lambda f: _change_claims(f, lambda c: c["whole"].update({"accuracy on everything": None})),
        "accuracy on everything",
    ),
    "a card without end": (lambda f: _lengthen(f / "README.md"), "figures in the card"),
}


@pytest.mark.parametrize(("change", "claim"), CHANGES.values(), ids=list(CHANGES))
def test_a_change_fails(saved, change, claim):
    change(saved)
    assert claim in failures(saved)


# Each name stands for ten of the one before: written out, the last is a string of 10^12 characters.
BOMB = "[" + ", ".join(f"&x{n} [{', '.join([f'*x{n - 1}'] * 10) if n else 1}]" for n in range(12)) + "]"
FORGERIES = {
    "figure": (lambda f: _replace_in_card(f, "| deployed parameters (S folded into A) | ", "| deployed | "),
               "figures in the card"),
    "metric": (lambda f: _replace_in_card(f, "| accuracy | 0.", "| accuracy | 1."), "figures in the card"),
    "metadata": (lambda f: _replace_in_card(f, "type: accuracy\n      value: ", "type: accuracy\n      value: 1"),
                 "results in the card's metadata"),
    "layers": (lambda f: _replace_in_card(f, "4 x 4", "8 x 8"), "figures in the card"),
    "metadata beyond floats": (
        lambda f: _replace_in_card(f, "type: accuracy\n      value: ", f"type: accuracy\n      value: {10**400} # "),
        "results in the card's metadata",
    ),
    "metadata of gigabytes": (
        lambda f: _replace_in_card(f, "type: accuracy\n      value: ", f"type: accuracy\n      value: {BOMB} # "),
        "results in the card's metadata",
    ),
    "second figures": (lambda f: _double(f / "README.md"), "figures in the card"),
    "weights": (lambda f: _change_weight(f, lambda s: s[:, 0].fill_(1e-30)), "nonzeros"),
    "infinite factor": (lambda f: _poison(f), "zero blocks are exactly zero in W"),
}  # fmt: skip


def _lengthen(card):
    with card.open("ab") as file:
        file.truncate(2**24 + 1)


def _double(card):
    card.write_text(card.read_text() * 2)


def _poison(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["vit.layers.0.mlp.fc1.a"][0, 0, 0] = torch.inf  # in a zero block, where it makes NaN of zeros
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(("change", "claim"), FORGERIES.values(), ids=list(FORGERIES))
def test_a_change_with_fitting_checksums_fails(saved, change, claim):
    change(saved)
    _forge_files(saved)
    found = failures(saved)
    assert claim in found
    assert not any(name.startswith("SHA-256") for name in found)


def test_a_forged_metric_fails_on_the_data(saved):
    _change_claims(saved, lambda c: c["metrics"][0].update(value=c["metrics"][0]["value"] + 1 / 360))
    assert "accuracy on digits, test" in failures(saved, data=DataOptions(dataset="digits"))


def test_a_pin_tells_a_consistent_forgery(saved):
    digits = hashlib.sha256((saved / WEIGHTS).read_bytes()).hexdigest()
    assert not failures(
        saved, sha256=[digits, f"README.md={hashlib.sha256((saved / 'README.md').read_bytes()).hexdigest()}"]
    )
    torch.manual_seed(1)
    other = tiny_model()
    other.save_pretrained(saved)
    write_model_card(other, saved)
    assert verify(str(saved)).holds  # integrity, not authorship
    assert failures(saved, sha256=[digits.upper()]).keys() == {f"--sha256 of {WEIGHTS}"}
    assert failures(saved, sha256=[f"../{WEIGHTS}={digits}"]).keys() == {f"--sha256 of ../{WEIGHTS}"}


@pytest.mark.parametrize("pin", ["12", "model.safetensors", "x" * 64])
def test_a_malformed_pin_is_refused(saved, pin):
    with pytest.raises(ValueError, match="64 hex digits"):
        verify(str(saved), sha256=[pin])


def test_command(saved, capsys):
    assert main(["verify", str(saved)]) == 0
    out, err = capsys.readouterr()
    assert "0 fail" in out
    assert err == ""
    _flip_byte(saved / WEIGHTS)
    assert main(["verify", str(saved), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["holds"] is False
    assert main(["verify", str(saved), "--metric", "f1"]) == 1
    assert "--metric goes with --dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "there is no kron_claims.json", id="missing"),
        pytest.param("{", "is no JSON", id="no-json"),
        pytest.param("[" * 100_000, "is no JSON", id="nested"),
        pytest.param("[]", "must hold a JSON object", id="list"),
        pytest.param('{"format_version": 2}', "reads up to 1", id="newer"),
        pytest.param('{"format_version": 1, "x\\u001b[31m": 1}', "must have the keys", id="keys"),
    ],
)
def test_malformed_claims_are_one_clean_line(saved, capsys, content, message):
    path = saved / "kron_claims.json"
    path.unlink() if content is None else path.write_text(content)
    assert main(["verify", str(saved)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "\x1b" not in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda c: c.update(files={"../x": {"bytes": 1, "sha256": "0" * 64}}), "no name of a file", id="path"
        ),
        pytest.param(lambda c: c["files"].update(x={"bytes": 1, "sha256": "0"}), "64 hex digits", id="sha"),
        pytest.param(lambda c: c["files"].update(x=1), "needs bytes and sha256", id="file"),
        pytest.param(lambda c: c["metrics"][0].update(value="1"), "a metric needs", id="metric"),
        pytest.param(lambda c: c["metrics"][0].update(value=10**400), "a metric needs", id="beyond floats"),
        pytest.param(lambda c: c.update(frozen=[1]), "must be a list of str", id="frozen"),
        pytest.param(lambda c: c.update(whole=[]), "must be of type dict", id="whole"),
    ],
)
def test_claims_of_wrong_types_are_refused(saved, change, message):
    _change_claims(saved, change)
    with pytest.raises(ValueError, match=message):
        verify(str(saved))


def test_figures_that_another_version_wrote_otherwise_say_so(saved):
    _replace_in_card(saved, "| trained parameters |", "| trained params |")
    _change_claims(saved, lambda c: c.update(kron_hf="0.0.0\x1b[31m"))
    _forge_files(saved)
    (claim,) = [name for name in failures(saved) if name.startswith("figures in the card")]
    assert claim.startswith(r"figures in the card (of kron_hf 0.0.0\x1b[31m; kron_hf ")


def _name_other_weights(folder):
    """What `config.json` may do: transformers then passes `model.safetensors` over."""
    (folder / "other.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))


def _name_other_shards(folder):
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    (folder / "model-00001-of-00002.safetensors").write_bytes((folder / "other.safetensors").read_bytes())
    shards = dict.fromkeys(load_file(folder / "other.safetensors"), "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


@pytest.mark.parametrize("change", [_name_other_weights, _name_other_shards])
def test_weights_from_files_without_checksums_fail(saved, change):
    change(saved)
    model = tiny_model()
    write_model_card(model, saved)  # a forger's: all checksums are those of the files
    found = failures(saved)
    assert "weights are loaded from these files" in found
    assert not any(name.startswith("SHA-256") for name in found)


@pytest.mark.parametrize(("size", "message"), [(10**6, "images of 1000000 pixels"), (9, "doesn't match model")])
def test_a_size_of_images_that_cannot_be_tried_fails(size, message):
    model = tiny_model()
    model.config.image_size = size
    claims = Claims(kron_hf="", model_class="", whole={}, layers=[])
    check = check_merge(model, claims)[-1]
    assert (check.claim, check.holds) == ("the model against to_dense", False)
    assert message in check.found


def test_names_of_strangers_are_escaped(saved, capsys):
    _change_claims(saved, lambda c: c["whole"].update({"\x1b[31m": 1}))
    _change_claims(saved, lambda c: c["files"].update({"\x1b]0;": {"bytes": 1, "sha256": "0" * 64}}))
    assert main(["verify", str(saved)]) == 1
    assert "\x1b" not in "".join(capsys.readouterr())


def _saved_adapter(tmp_path, **options):
    base = FAMILIES["vit"]()
    base.save_pretrained(tmp_path / "base")
    with quiet_peft():
        adapter = get_peft_model(
            type(base).from_pretrained(tmp_path / "base"),
            KronConfig(block_size=4, rank=1, init_weights="random", **options),
        )
    adapter.save_pretrained(tmp_path / "adapter")
    return adapter


@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION"])
def test_an_adapter_without_a_card_is_inspected_and_summed_up(tmp_path, capsys, task_type):
    _saved_adapter(tmp_path, task_type=task_type)
    folder, page = str(tmp_path / "adapter"), tmp_path / "page.html"
    with quiet_peft():
        assert main(["inspect", folder, "--html", str(page)]) == 0
        assert main(["summary", folder]) == 0
    assert "base_model.model.vit.layers.1.mlp.fc2.kron_layers.default " in capsys.readouterr().out
    assert "fc1" in page.read_text()


@pytest.mark.parametrize(
    "command",
    [["bench", "--model"], ["train", "--dataset", "digits", "--output-dir", "{out}", "--model"]],
    ids=["bench", "train"],
)
def test_commands_that_take_no_adapter_say_so(tmp_path, capsys, command):
    _saved_adapter(tmp_path)
    words = [word.format(out=tmp_path / "out") for word in command]
    assert main([*words, str(tmp_path / "adapter")]) == 1
    assert "adapter is an adapter; pass what merge_and_unload() makes of it" in capsys.readouterr().err


def test_an_adapter_is_verified_with_its_base(tmp_path):
    adapter = _saved_adapter(tmp_path)
    write_model_card(adapter, tmp_path / "adapter")
    with quiet_peft():
        report = verify(str(tmp_path / "adapter"))
    assert report.holds, str(report)
    trained = next(check for check in report.checks if check.claim == "trained params")
    assert trained.found == f"{kron_summary(adapter).trained_params:,}"
    _flip_byte(tmp_path / "adapter" / "adapter_model.safetensors")
    with quiet_peft():
        assert "SHA-256 of adapter_model.safetensors" in failures(tmp_path / "adapter")
