"""Block-size selection and the baselines beside the parts of kron_hf that come before and after them."""

import json

import pytest
import torch
from tiny_selection import callback_in, digits, trainer
from tiny_training import arguments
from transformers import AutoModelForImageClassification, TrainerCallback, ViTConfig, ViTForImageClassification

from kron_hf import KronConfig, KronTrainer, SparsityCallback, get_kron_model, kron_summary, write_model_card
from kron_hf.baselines import GradualPruningCallback, block_layers, to_kron
from kron_hf.cli import main
from kron_hf.selection import KronCandidates
from kron_hf.sparsity.pruning import kron_layers
from kron_hf.summary import block_summary

STRAIGHT_THROUGH = {"regrowth": "straight_through", "interval": 2}


def logits_of(model):
    model.eval()
    with torch.no_grad():
        return model(pixel_values=torch.stack([row["pixel_values"] for row in digits()[:4]])).logits


class Keeping(TrainerCallback):
    """Saves the model, and its card, after some steps, by hand and not through Trainer."""

    def __init__(self, folder, steps):
        self.folder, self.steps, self.logits = folder, steps, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            folder = self.folder / str(state.global_step)
            model.save_pretrained(folder)
            write_model_card(model, folder)
            self.logits[state.global_step] = logits_of(model)
            model.train()


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    """A finished selection, and what was saved before, between and right after its drops."""
    keeping = Keeping(tmp_path_factory.mktemp("kept"), (3, 8, 10))
    run = trainer(tmp_path_factory.mktemp("run"), trainer_class=KronTrainer)
    run.add_callback(keeping)
    run.train()
    return run, keeping


@pytest.mark.parametrize(("step", "left"), [(3, 3), (8, 2), (10, 1)])
def test_what_is_saved_in_a_selection_loads_is_described_and_counted(selected, step, left, capsys):
    _, keeping = selected
    folder = keeping.folder / str(step)
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(logits_of(model), keeping.logits[step])
    candidates = [module for module in model.modules() if isinstance(module, KronCandidates)]
    assert [len(layer.alive) for layer in candidates] == ([left] * 6 if left > 1 else [])
    card = (folder / "README.md").read_text()
    assert str(kron_summary(model)) in card
    assert ("each is the sum of its candidates" in card) == (left > 1)
    assert main(["summary", str(folder), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted == json.loads(json.dumps(kron_summary(model).to_dict()))
    assert counted["trained_params"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("which", "options"),
    [("the same object", STRAIGHT_THROUGH), ("a fresh one", {"interval": 2})],
    ids=["the-same", "a-fresh-one"],
)
def test_the_chosen_model_is_trained_to_a_sparsity(selected, tmp_path, which, options):
    run, _ = selected
    fresh = get_kron_model(dense_vit(), callback_in(run).config)
    kinds = [(layer.block_size, layer.rank) for layer in kron_layers(run.model)]
    assert [(layer.block_size, layer.rank) for layer in kron_layers(fresh)] == kinds
    model = run.model if which == "the same object" else fresh
    target = {"target_sparsity": 0.6, "sparsity_options": options}
    KronTrainer(model, arguments(tmp_path, max_steps=20), train_dataset=digits()[:48], **target).train()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert 0.6 <= kron_summary(loaded).sparsity < 0.61
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_a_selection_and_a_target_in_one_training_are_refused(tmp_path):
    run = trainer(tmp_path)
    run.add_callback(SparsityCallback(target_sparsity=0.5))
    with pytest.raises(ValueError, match="blocks are made sparse once their size is chosen"):
        run.train()
    assert run.state.global_step == 0


def dense_vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=10))


@pytest.mark.filterwarnings("ignore:the exact Kronecker form has")
@pytest.mark.parametrize("options", [STRAIGHT_THROUGH, {"interval": 2, "group_penalty": 0.5}], ids=["shadow", "groups"])
def test_a_pruned_dense_model_is_pruned_further_in_kronecker_form(tmp_path, options):
    model, data = dense_vit(), digits()[:48]
    callback = GradualPruningCallback(4, target_sparsity=0.3, interval=2)
    KronTrainer(model, arguments(tmp_path, max_steps=20), train_dataset=data, callbacks=[callback]).train()
    sparsity, expected = block_summary(model, block_layers(model, 4)).sparsity, logits_of(model)
    assert 0.3 <= sparsity < 0.31
    to_kron(model, KronConfig(block_size=4))
    torch.testing.assert_close(logits_of(model), expected)
    assert kron_summary(model).sparsity == sparsity
    dead = [~layer.block_mask for layer in kron_layers(model)]
    target = {"target_sparsity": 0.6, "sparsity_options": options}
    KronTrainer(model, arguments(tmp_path, max_steps=20), train_dataset=data, **target).train()
    assert 0.6 <= kron_summary(model).sparsity < 0.61
    for layer, mask in zip(kron_layers(model), dead, strict=True):
        assert not layer.block_mask[mask].any()
