"""The card at the end of a training: under the stock Trainer and KronTrainer, before and after Trainer's own card."""

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_cards import HISTORY, tiny_model
from transformers import Trainer, TrainerState, TrainingArguments

from kron_hf import KronTrainer, ModelCardCallback, SparsityCallback, measure_latency, write_model_card
from kron_hf.claims import read_claims
from kron_hf.model_card.training import ALLOWED, public_settings
from kron_hf.verify.run import verify

SECRET = "hf_secretsecretsecret"


@pytest.fixture(scope="module", params=["Trainer", "KronTrainer"])
def trained(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("alice") / "digits-vit"
    data = [{"pixel_values": torch.randn(1, 8, 8), "labels": i % 10} for i in range(16)]
    arguments = TrainingArguments(
        str(folder), max_steps=6, logging_steps=2, eval_strategy="steps", eval_steps=3, save_strategy="no",
        report_to=[], disable_tqdm=True, hub_token=SECRET, run_name="alice's run", seed=7, dataloader_pin_memory=False,
    )  # fmt: skip
    card = ModelCardCallback(dataset="me/digits", license="mit", base_model="me/base", base_license="apache-2.0")
    callbacks = [SparsityCallback(target_sparsity=0.5, start=0, end=0.5, interval=1), card]
    trainer_class = {"Trainer": Trainer, "KronTrainer": KronTrainer}[request.param]
    trainer = trainer_class(tiny_model(), arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)
    if request.param == "Trainer":
        card.attach(trainer)
    trainer.train()
    return trainer, folder


def test_a_loss_that_is_not_finite_is_no_metric_of_the_card(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to=[])
    state = TrainerState(log_history=[{"step": 3, "eval_loss": float("nan"), "eval_accuracy": 0.5}])
    tiny_model().save_pretrained(tmp_path)
    ModelCardCallback(dataset="digits").write(tiny_model(), arguments, state)
    assert [(metric.metric, metric.value) for metric in read_claims(tmp_path).metrics] == [("accuracy", 0.5)]


def test_the_training_ends_with_a_card_that_verifies_also_after_trainers_own(trained):
    trainer, folder = trained
    once = (folder / "README.md").read_text()
    assert verify(str(folder)).holds
    trainer.create_model_card(model_name="digits-vit")
    assert (folder / "README.md").read_text() == once
    trainer.save_model()
    assert verify(str(folder)).holds


def test_the_card_tells_the_training_and_no_secret(trained):
    trainer, folder = trained
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("mit", "me/base", ["me/digits"])
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-classification")
    last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    result = card.data.eval_results[0]
    assert (result.dataset_type, result.dataset_split, result.metric_type) == ("me/digits", "validation", "loss")
    assert result.metric_value == last
    for line in (
        "| seed | 7 |",
        "| target\\_sparsity | 0.5 |",
        "| max\\_steps | 6 |",
        "apache-2.0",
        "kron_training.png",
    ):
        assert line in card.text
    for path in folder.glob("*"):
        if path.suffix in (".md", ".json"):
            assert not [word for word in (SECRET, "alice", str(folder.parent)) if word in path.read_text()], path.name
    settings = read_claims(folder).stated["training"]
    assert settings["seed"] == 7
    assert settings.keys() <= set(ALLOWED)


def test_metadata_survives_a_round_trip(trained):
    data = ModelCard.load(trained[1] / "README.md").data
    again = ModelCard(f"---\n{data.to_yaml()}\n---\n").data
    assert again.to_dict() == data.to_dict()


def test_the_loading_snippet_runs_in_a_fresh_process(trained):
    trainer, folder = trained
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code += "\nprint(sum(p.double().abs().sum().item() for p in model.parameters()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder.parent, capture_output=True, text=True, check=True)
    expected = sum(p.detach().double().abs().sum().item() for p in trainer.model.parameters())
    assert float(done.stdout) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "value", ["/home/alice/x", "C:\\x", SECRET.upper(), "a b", "http://x", {"a": 1}, object(), ["x"], None]
)
def test_what_could_be_a_path_or_token_is_not_told(value):
    assert public_settings({"optim": value, "seed": 1, "hub_token": "x", "output_dir": 1}) == {"seed": 1}


def test_measured_latency_names_machine_and_versions(tmp_path):
    model = tiny_model()
    latency = measure_latency(model, batch_size=2)
    assert latency.batch_size == 2
    assert min(latency.milliseconds, latency.dense_milliseconds) > 0
    assert f"torch {torch.__version__.partition('+')[0]}" in latency.measured_on
    model.save_pretrained(tmp_path)
    text = write_model_card(model, tmp_path, latency=latency, commit="abc`123").read_text()
    assert f"{latency.milliseconds}, dense {latency.dense_milliseconds}" in text
    assert "commit `abc'123`" in text
    assert json.loads((tmp_path / "kron_claims.json").read_text())["stated"]["latency"]["batch_size"] == 2


def test_pictures_of_an_earlier_model_do_not_stay(tmp_path):
    write_model_card(tiny_model(), tmp_path, history=HISTORY)
    assert {"kron_masks.png", "kron_training.png"} <= {path.name for path in tmp_path.iterdir()}
    write_model_card(tiny_model(), tmp_path)
    assert not (tmp_path / "kron_training.png").exists()
    assert "kron_training.png" not in (tmp_path / "README.md").read_text()


def test_without_matplotlib_there_are_no_pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = write_model_card(tiny_model(), tmp_path, history=HISTORY).read_text()
    assert ".png" not in text
    assert not list(tmp_path.glob("*.png"))


def test_a_licence_is_the_hubs_abbreviation(tmp_path):
    with pytest.raises(ValueError, match="the Hub's abbreviation"):
        write_model_card(tiny_model(), tmp_path, license="MIT\n---")
    with pytest.raises(TypeError, match="no arguments"):
        ModelCardCallback(token="x")
