"""How much the features depend on each layer, against gradients of every single feature; and the token weights."""

import pytest
import tiny_calibration as tiny
import torch
from torch import nn

from kron_hf.calibration import gradients
from kron_hf.calibration.batches import Batches, SpreadBatches, split_examples
from kron_hf.calibration.gradients import OutputGradients, output_gradients
from kron_hf.calibration.route import Block, Route
from kron_hf.calibration.token_weights import first_token_weights, no_weights, weights_by_stage

LAYERS = ("encoder.layer.0.attention.q_proj", "encoder.layer.1.attention.v_proj", "encoder.layer.1.mlp.fc2")


def exact(model, name, batch, features_of, examples):
    """Squared gradients of all features by the outputs, over the variance of the features, `[examples, T, out]`."""
    kept = []

    def keep(module, args, output):
        kept.append(output)

    handle = model.get_submodule(name).register_forward_hook(keep)
    features = features_of(model(**batch))
    handle.remove()
    total = torch.zeros_like(kept[0])
    for feature in features.flatten(1).unbind(1):
        total += torch.autograd.grad(feature.sum(), kept[0], retain_graph=True)[0].square()
    rows = features.detach().flatten(0, -2)
    return total / ((rows - rows.mean(0)).square().sum() / examples)


@pytest.mark.parametrize("first_token_alone", [True, False], ids=["first token", "all tokens"])
def test_they_are_the_mean_squared_gradients_of_the_features(monkeypatch, first_token_alone):
    model, batch = tiny.dinov2().double(), {"pixel_values": tiny.pixels(6).double()}
    monkeypatch.setattr(gradients, "EXAMPLES", 6 * 400)  # the same images again, with other random sums
    found = output_gradients(model, LAYERS, [batch] * 400, features=model, first_token_alone=first_token_alone)

    def features_of(output):
        return output.last_hidden_state[:, :1] if first_token_alone else output.last_hidden_state

    for name in LAYERS:
        wanted = exact(model, name, batch, features_of, examples=6)
        torch.testing.assert_close(
            found[name].outputs, wanted.sum(1).mean(0), rtol=0.2, atol=0.05 * wanted.sum().item()
        )
        assert found[name].outputs.sum().item() == pytest.approx(wanted.sum().item() / 6, rel=0.05)
        assert found[name].first == pytest.approx(wanted[:, 0].sum().item() / 6, rel=0.1)
        assert found[name].others == pytest.approx(wanted[:, 1:].sum().item() / 6 / 16, rel=0.1, abs=1e-12)
    last = found[LAYERS[-1]]
    assert (last.others == 0) is first_token_alone


def test_a_frozen_model_its_modes_and_its_gradients_stay():
    model = tiny.vit().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = output_gradients(model, ["vit.layers.0.mlp.fc1"], tiny.image_batches(), features=model.base_model)
    assert found["vit.layers.0.mlp.fc1"].outputs.min() > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_padding_is_no_token():
    model, (batch, *_) = tiny.bert(), tiny.text_batches()
    name = "bert.encoder.layer.0.intermediate.dense"
    alone = output_gradients(model, [name], [batch], features=model.base_model)[name]
    padded = {key: torch.cat([value, torch.zeros_like(value[:, :3])], 1) for key, value in batch.items()}
    more = output_gradients(model, [name], [padded], features=model.base_model, first_token_alone=True)[name]
    fewer = output_gradients(model, [name], [batch], features=model.base_model, first_token_alone=True)[name]
    assert more.first == pytest.approx(fewer.first, rel=1e-4)
    assert more.others == pytest.approx(fewer.others, rel=1e-4)
    assert alone.others > fewer.others


@pytest.mark.parametrize("filler", [7.0, float("nan")])
def test_features_of_padding_do_not_count(filler):
    model, x = nn.Linear(5, 4), torch.randn(6, 3, 5)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]] * 3)
    rows = model(x)[mask.bool()].detach()

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model

        def forward(self, x, attention_mask):
            return self.layer(x)

    x[mask == 0] = filler
    batch = {"x": x, "attention_mask": mask}
    found = output_gradients(Masked(), ["layer"], [batch], features=nn.Identity())["layer"]
    # The features are the outputs, so each real token of six examples has squared gradients of one.
    wanted = len(rows) / 6 / ((rows - rows.mean(0)).square().sum() / 6)
    torch.testing.assert_close(found.outputs, wanted.double().expand(4))


class Towers(nn.Module):
    """Two outputs, the second of which alone depends on the second layer; one layer changes its output in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 4)

    def forward(self, x):
        y = self.first(x)
        y.mul_(3)
        self.unused(x)
        return y, self.second(x)[:, 0]


def test_a_layer_is_judged_by_the_first_output_that_depends_on_it():
    torch.manual_seed(0)
    model, x = Towers(), torch.randn(64, 4)
    found = output_gradients(model, ["first", "second", "unused"], [{"": x}], features=nn.Identity())
    y = 3 * model.first(x)
    assert found["first"].outputs.mean().item() == pytest.approx(9 / y.var(0, unbiased=False).sum().item(), rel=0.3)
    assert found["second"].outputs.item() == pytest.approx(1 / model.second(x).var(unbiased=False).item(), rel=0.5)
    assert found["unused"].outputs.tolist() == [0] * 4
    assert (found["first"].first, found["unused"].others) == (None, None)


def test_what_has_no_features_or_no_finite_gradient_is_refused():
    class Names(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x).argmax(-1)

    with pytest.raises(ValueError, match="Names: its output holds no floating point tensor"):
        output_gradients(Names(), ["layer"], [{"": torch.randn(5, 4)}], features=nn.Identity())
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"^0: the gradients of the model.s features"):
        output_gradients(model, ["0"], [{"": torch.randn(5, 4)}], features=model)


def test_only_so_many_examples_are_read(monkeypatch):
    monkeypatch.setattr(gradients, "EXAMPLES", 16)
    seen = []
    model = nn.Sequential(nn.Linear(4, 2))
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    output_gradients(model, ["0"], [{"": torch.randn(20, 4)}] * 2, features=model)
    assert seen == [8, 8]


def test_a_batch_is_split_into_examples():
    batch = {"pixel_values": torch.arange(5), "flag": True, "names": list("abcde")}
    parts = list(split_examples(batch, 2))
    assert [part["pixel_values"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert [part["names"] for part in parts] == [["a", "b"], ["c", "d"], ["e"]]
    assert all(part["flag"] is True for part in parts)
    uneven = {"a": torch.zeros(3), "b": torch.zeros(2)}
    assert list(split_examples(uneven, 2)) == [uneven]


@pytest.mark.parametrize(
    ("first", "others", "wanted"),
    [
        pytest.param(11.0, 2.0, [11.0, 2.0, 2.0], id="as they are"),
        pytest.param(3.0, 0.0, [3.0, 0.02, 0.02], id="others have a least weight"),
        pytest.param(0.0, 3.0, [0.04, 3.0, 3.0], id="the first has one, too"),
    ],
)
def test_weights_of_tokens(first, others, wanted):
    weigh = first_token_weights(first, others)
    x = torch.zeros(2, 3, 5)
    assert weigh({"pixel_values": x}, x).tolist() == pytest.approx(wanted * 2)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    padded = [*wanted, *wanted[:2], 0.0]
    assert weigh({"input_ids": mask, "attention_mask": mask}, x).tolist() == pytest.approx(padded)
    windows = torch.zeros(8, 3, 5)
    assert weigh({"pixel_values": x}, windows) is no_weights({"pixel_values": x}, windows) is None
    assert weigh({"pixel_values": x}, x[:, :1]) is None


def test_how_examples_are_batched_does_not_matter():
    model, images = tiny.vit().double(), tiny.pixels(20).double()
    name = "vit.layers.0.mlp.fc1"
    whole, parts = (
        output_gradients(model, [name], [{"pixel_values": p} for p in images.split(size)], features=model.base_model)
        for size in (20, 3)
    )
    torch.testing.assert_close(whole[name].outputs, parts[name].outputs)


@pytest.mark.parametrize(
    ("examples", "wanted"),
    [
        pytest.param(4, [0, 5], id="two of ten"),
        pytest.param(7, [0, 2, 5, 8], id="an odd number"),
        pytest.param(1, [0], id="one"),
        pytest.param(100, list(range(10)), id="all"),
    ],
)
def test_batches_are_spread_over_the_data(examples, wanted):
    batches = Batches([torch.full((2, 1), float(number)) for number in range(10)])
    spread = SpreadBatches(batches, examples)
    for _ in range(2):
        assert [int(batch[""][0, 0]) for batch in spread] == wanted


def test_linears_with_the_same_input_share_the_sum_of_their_weights():
    route = Route((Block("0", (("q", "k"), ("o",), ("dead",))),), in_turn=True)
    ones = torch.ones(2)
    each = {
        "q": OutputGradients(ones, 8.0, 0.0),
        "k": OutputGradients(ones, 1.0, 3.0),
        "o": OutputGradients(ones, 5.0, 4.0),
        "dead": OutputGradients(ones, None, None),
    }
    weights = weights_by_stage(route, each)
    x = torch.zeros(1, 3, 2)
    batch = {"pixel_values": x}
    assert weights.keys() == {"q", "o"}
    assert weights["q"](batch, x).tolist() == [9.0, 3.0, 3.0]
    assert weights["o"](batch, x).tolist() == [5.0, 4.0, 4.0]


def test_the_device_that_torch_defaults_to_does_not_matter():
    model, batch = tiny.vit(), {"pixel_values": tiny.pixels(4)}
    name = "vit.layers.0.mlp.fc1"
    wanted = output_gradients(model, [name], [batch], features=model.base_model)[name]
    with torch.device("meta"):
        found = output_gradients(model, [name], [batch], features=model.base_model)[name]
    assert torch.equal(found.outputs, wanted.outputs)
