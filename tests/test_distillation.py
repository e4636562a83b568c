import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from tiny_distillation import BACKBONES, HEADS, batch, images, inputs_of, student, teacher, vit, vit_parts
from tiny_training import TinyKron
from tiny_training import batch as vectors
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from kron_hf import DistillationConfig, DistillationLoss, KronConfig, get_kron_model
from kron_hf.distillation.parts import kl_divergence, relative_mse


def test_compute_is_the_weighted_sum_of_the_formulas():
    own, other, rows = student(), teacher(), images(6)
    weights = {"logits": 0.5, "tokens": 2.0, "cls": 3.0, "hidden": 0.25, "task": 0.75}
    result = DistillationLoss(other, {**weights, "temperature": 3.0}).compute(own, batch(rows))
    expected = {**vit_parts(own, other, rows, 3.0), "task": own(**batch(rows)).loss}
    torch.testing.assert_close(result.loss, sum(weights[part] * value for part, value in expected.items()))
    torch.testing.assert_close(result.parts, {part: value.detach() for part, value in expected.items()})
    result.loss.backward()
    got = [parameter.grad.clone() for parameter in own.parameters()]
    own.zero_grad()
    sum(weights[part] * value for part, value in expected.items()).backward()
    torch.testing.assert_close(got, [parameter.grad for parameter in own.parameters()])


EXPECTED = {
    "vit": {"tokens", "cls", "hidden"},
    "dinov2": {"tokens", "cls", "hidden"},
    "dinov2-backbone": {"tokens", "cls", "hidden"},
    "swin": {"tokens", "hidden"},
    "bert": {"tokens", "hidden"},
}


@pytest.mark.parametrize(
    ("family", "head"), [*((family, False) for family in EXPECTED), *((family, True) for family in HEADS)]
)
def test_every_family_is_distilled_by_default_in_all_it_gives(family, head):
    own, other = ((HEADS if head else BACKBONES)[family]() for _ in range(2))
    inputs = inputs_of(own)
    result = DistillationLoss(other).compute(own, inputs)
    assert set(result.parts) == EXPECTED[family] | ({"logits"} if head else set())
    assert all(value > 0 for value in result.parts.values())
    assert set(result.outputs) == set(own(**inputs))
    same = DistillationLoss(other).compute(copy.deepcopy(other).eval(), inputs)
    assert same.loss.item() == pytest.approx(0, abs=1e-6)


def test_the_final_tokens_of_a_model_with_a_head_are_those_after_the_norm():
    own, other, rows = student(), teacher(), images(4)
    result = DistillationLoss(other, {"hidden": 0, "logits": 0, "cls": 0}).compute(own, batch(rows))
    assert set(result.parts) == {"tokens", "task"}
    torch.testing.assert_close(result.parts["tokens"], vit_parts(own, other, rows)["tokens"].detach())


@pytest.mark.parametrize("layers", [[0], [1, -1], [2, 2]], ids=str)
def test_hidden_layers_choose(layers):
    own, other, rows = student(), teacher(), images(4)
    got = DistillationLoss(other, {"hidden_layers": layers}).compute(own, batch(rows)).parts["hidden"]
    hidden = [m.vit(batch(rows)["pixel_values"], output_hidden_states=True).hidden_states for m in (own, other)]
    expected = sum(relative_mse(hidden[0][layer], hidden[1][layer]) for layer in layers) / len(layers)
    torch.testing.assert_close(got, expected.detach())


@pytest.mark.parametrize("how", ["argument", "config", "positional"])
def test_hidden_states_that_were_asked_for_stay(how):
    own, rows = student(), images(2)
    own.config.output_hidden_states = how == "config"
    plain = own(**batch(rows), output_hidden_states=True)
    loss = DistillationLoss(teacher())
    with loss.attach(own):
        pixels = batch(rows)["pixel_values"]
        extra = {"output_hidden_states": True} if how == "argument" else {}
        outputs = own(pixels, **extra) if how == "positional" else own(pixel_values=pixels, **extra)
        assert loss(outputs) > 0
    if how == "positional":
        assert set(outputs) == {"logits"}
        assert outputs.hidden_states is None
    else:
        assert [*map(torch.equal, outputs.hidden_states, plain.hidden_states)] == [True] * 3


def test_padding_does_not_count():
    own, other = BACKBONES["bert"]().eval(), BACKBONES["bert"]()
    inputs = inputs_of(own)
    loss = DistillationLoss(other, {"cls": 1.0})
    before = loss.compute(own, inputs)
    inputs["input_ids"][1, 3:] = 4
    after = loss.compute(own, inputs)
    assert before.parts == after.parts
    assert set(before.parts) == {"tokens", "hidden", "cls"}
    shorter = {name: value[1:, :3] for name, value in inputs.items()}
    both = [loss.compute(own, {name: value[:1] for name, value in inputs.items()}), loss.compute(own, shorter)]
    for part, value in before.parts.items():
        torch.testing.assert_close(value, sum(each.parts[part] for each in both) / 2)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with pytest.raises(ValueError, match="cls: the first token is padding; pad on the right"):
        loss.compute(own, inputs)


@pytest.mark.parametrize("own_mask", [True, False], ids=["mask", "labels"])
@pytest.mark.parametrize("text", [4, 6], ids=["as long", "longer"])
def test_padding_of_a_decoder_is_its_own(text, own_mask):
    """Where both texts are equally long, the encoder's mask would pass for that of the decoder."""
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, decoder_start_token_id=0)
    own, other = T5ForConditionalGeneration(config).eval(), T5ForConditionalGeneration(config)
    mask = torch.ones(2, text, dtype=torch.long)
    mask[0, 1:] = 0
    labels = torch.tensor([[7, 8, 9, 1], [5, 1, -100, -100]])
    batch = {"input_ids": torch.randint(5, 20, (2, text)), "attention_mask": mask}
    batch["decoder_input_ids"] = own.prepare_decoder_input_ids_from_labels(labels)
    loss = DistillationLoss(other, {"temperature": 1.0, "task": 0})
    with torch.no_grad():
        logits = [model(**batch).logits for model in (own, other.eval())]
    expected = kl_divergence(*logits, 1.0, labels != -100)
    given = {"decoder_attention_mask": (labels != -100).long()} if own_mask else {"labels": labels}
    torch.testing.assert_close(loss.compute(own, batch | given).parts["logits"], expected)
    loss.attach(own)  # the stock Trainer takes labels out of the inputs
    if not own_mask:
        torch.testing.assert_close(loss(own(**batch), labels), expected)


def test_the_teacher_is_left_as_it_is_and_runs_without_dropout():
    own, other = student(), teacher(hidden_dropout_prob=0.5)
    for parameter in list(other.parameters())[::2]:
        parameter.requires_grad_(False)
    state, grads = copy.deepcopy(other.state_dict()), [p.requires_grad for p in other.parameters()]
    loss, rows = DistillationLoss(other), images(4)
    first = loss.compute(own, batch(rows))
    other.train()
    torch.manual_seed(3)
    random = torch.get_rng_state()
    again = loss.compute(own, batch(rows))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(first.loss, again.loss)
    again.loss.backward()
    assert not any(module.training for module in other.modules())
    assert [p.requires_grad for p in other.parameters()] == grads
    assert all(p.grad is None for p in other.parameters())
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["vit", "swin", "bert"])
def test_a_teacher_in_another_dtype(family, dtype):
    own, other = HEADS[family](), HEADS[family]()
    inputs = inputs_of(own)
    expected = DistillationLoss(other).compute(own.eval(), inputs)
    got = DistillationLoss(copy.deepcopy(other).to(dtype)).compute(own, inputs)
    assert got.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.loss.float(), expected.loss, rtol=0.02, atol=0)
    got.loss.backward()
    assert {parameter.dtype for parameter in own.parameters()} == {torch.float32}


def test_nothing_of_a_batch_stays_alive():
    own, other = student(), teacher()
    loss, kept = DistillationLoss(other), []
    hook = own.vit.layers[0].register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    other.vit.layers[0].register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    for attached in (False, True):
        inputs = batch(images(2))
        kept.append(weakref.ref(inputs["pixel_values"]))
        if attached:
            with loss.attach(own):
                result = loss(own(pixel_values=inputs["pixel_values"]), inputs["labels"], 2)
                del inputs
                result.backward()
                del result
                gc.collect()
                assert [ref() for ref in kept[-3:]] == [None] * 3  # while it is attached
        else:
            result = loss.compute(own, inputs)
            result.loss.backward()
            del result, inputs
            gc.collect()
            assert [ref() for ref in kept[-3:]] == [None] * 3
    hook.remove()
    assert len(kept) == 6


def test_attached_gives_what_compute_gives():
    own, other, rows = student(), teacher(), images(6)
    loss, inputs = DistillationLoss(other, {"task": 0.5}), batch(rows)
    labels = inputs["labels"]
    expected = loss.compute(own, inputs)
    recorder = loss.attach(own)
    mean = loss(own(pixel_values=inputs["pixel_values"]), labels)
    assert loss.parts == expected.parts
    share = loss(own(pixel_values=inputs["pixel_values"]), labels, 24)
    recorder.remove()
    torch.testing.assert_close(mean, expected.loss)
    torch.testing.assert_close(share, expected.loss / 4)
    assert set(own(pixel_values=inputs["pixel_values"])) == {"logits"}
    with pytest.raises(ValueError, match=r"no forward of an attached student came before: call attach\(student\)"):
        loss(own(pixel_values=inputs["pixel_values"]), labels)


def test_labels_that_do_not_count_take_no_share_of_the_attached_loss():
    own, other, rows = student(), teacher(), images(6)
    loss, inputs = DistillationLoss(other, {"task": 0.5}), batch(rows)
    parts = vit_parts(own, other, rows)
    labels = inputs["labels"].where(torch.arange(6) > 1, -100)
    with loss.attach(own):
        share = loss(own(pixel_values=inputs["pixel_values"]), labels, 24)
        with pytest.raises(ValueError, match="task: needs labels in the batch and logits of the student"):
            loss(own(pixel_values=inputs["pixel_values"]), None)
    logits = own(pixel_values=inputs["pixel_values"]).logits
    expected = 4 / 24 * sum(parts.values()) + 0.5 * F.cross_entropy(logits[2:], labels[2:], reduction="sum") / 24
    torch.testing.assert_close(share, expected)


def test_a_loss_is_attached_again_and_computed_after_it_was_removed():
    own, loss, inputs = student(), DistillationLoss(teacher()), batch(images(2))
    expected = loss.compute(own, inputs)
    for _ in range(2):
        with loss.attach(own):
            assert loss(own(pixel_values=inputs["pixel_values"])) > 0
            assert set(loss.parts) == {"logits", "tokens", "cls", "hidden"}
        assert not own._forward_hooks
    assert loss.compute(own, inputs).parts == expected.parts


def test_a_student_with_hooks_is_copied_without_the_teacher():
    own, loss = student(), DistillationLoss(teacher())
    expected = loss.compute(own, batch(images(2)))
    twin = copy.deepcopy(own)
    assert set(twin(**batch(images(2)))) == {"loss", "logits"}
    assert torch.equal(loss.compute(twin, batch(images(2))).loss, expected.loss)
    assert twin._forward_hooks
    assert not own._forward_hooks  # they went over
    assert set(own(**batch(images(2)))) == {"loss", "logits"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_a_compiled_student():
    own, loss, inputs = student(), DistillationLoss(teacher()), batch(images(4))
    expected = loss.compute(own, inputs)
    compiled = torch.compile(own, backend="eager")
    with loss.recorder(own).recording():
        outputs = compiled(**inputs)
    parts = loss.compare(outputs, inputs)
    assert set(compiled(**inputs)) == set(outputs) == {"loss", "logits"}
    assert set(parts) == {"logits", "tokens", "cls", "hidden"}
    for part, value in parts.items():
        torch.testing.assert_close(value.detach(), expected.parts[part])
    torch.testing.assert_close(loss.compute(compiled, inputs).loss, expected.loss)


def shares_a_parameter(model):
    other = copy.deepcopy(model)
    other.classifier.bias = model.classifier.bias
    return other


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda model: model, "it is the student itself"),
        (lambda model: get_kron_model(model, KronConfig(block_size=4, rank=1)), "it is the student itself"),
        (shares_a_parameter, r"it shares parameters with it \('classifier.bias', ...\)"),
    ],
    ids=["same", "converted-in-place", "shared"],
)
def test_a_teacher_that_would_be_trained_raises(make, what):
    own = vit()
    loss = DistillationLoss(make(own))
    with pytest.raises(ValueError, match=rf"{what}; get_kron_model .* teacher = copy.deepcopy\(model\)"):
        loss.compute(own, batch(images(2)))


@pytest.mark.parametrize(
    ("sizes", "config", "message"),
    [
        (
            {"num_labels": 7},
            {},
            "logits: the student has 4 labels, the teacher 7; they must be equal, or pass logits=0",
        ),
        ({"hidden_size": 8}, {}, "tokens: the student has 16 features, the teacher 8; .* or pass tokens=0"),
        ({"hidden_size": 8}, {"tokens": 0}, "cls: the student has 16 features, the teacher 8; .* or pass cls=0"),
        ({"patch_size": 2}, {}, "tokens: the student has 5 tokens, the teacher 17; they must be equal"),
        ({"num_hidden_layers": 3}, {}, "hidden: the student has 3 hidden states, the teacher 4; name those"),
        ({}, {"hidden_layers": [0, 3]}, "hidden_layers has 3, but the student has 3 hidden states and the teacher 3"),
        ({"problem_type": "regression"}, {"logits": 1}, "logits=1 .* the teacher, ViT.*, gives no logits for a soft"),
    ],
    ids=["labels", "width", "width-cls", "patches", "depth", "layer", "regression"],
)
def test_models_that_do_not_fit_together(sizes, config, message):
    with pytest.raises(ValueError, match=message):
        DistillationLoss(teacher(**sizes), config).compute(student(), batch(images(2)))


def test_hidden_layers_of_a_deeper_teacher():
    loss = DistillationLoss(teacher(num_hidden_layers=3), {"hidden_layers": [1, -1]})
    assert loss.compute(student(), batch(images(2))).parts["hidden"] > 0


@pytest.mark.parametrize(
    ("make", "part", "what"),
    [
        (BACKBONES["vit"], "logits", "student, ViTModel, gives no logits"),
        (BACKBONES["swin"], "cls", "student, SwinModel, gives no class token"),
        (TinyKron, "tokens", "student, TinyKron, gives no last_hidden_state"),
        (TinyKron, "hidden", "student, TinyKron, gives no hidden_states"),
    ],
    ids=["logits", "cls", "tokens", "hidden"],
)
def test_a_part_asked_for_that_a_model_cannot_give(make, part, what):
    own = make()
    inputs = vectors(0) if isinstance(own, TinyKron) else inputs_of(own)
    with pytest.raises(ValueError, match=rf"{part}=0\.5 was asked for, but the {what}.*; leave {part} out"):
        DistillationLoss(make(), {part: 0.5}).compute(own, inputs)


def test_a_plain_module_is_distilled_in_its_logits():
    own, other, inputs = TinyKron(1), TinyKron(0), vectors(0)
    result = DistillationLoss(other).compute(own, inputs)
    expected = kl_divergence(own(**inputs)["logits"], other(**inputs)["logits"], 2.0)
    torch.testing.assert_close(result.loss, expected + F.cross_entropy(own(**inputs)["logits"], inputs["labels"]))
    unlabelled = {"x": inputs["x"]}
    assert set(DistillationLoss(other).compute(own, unlabelled).parts) == {"logits"}
    with pytest.raises(ValueError, match="task: the student returned no loss; has the batch labels"):
        DistillationLoss(other, {"task": 1}).compute(own, unlabelled)


def test_several_labels_at_once_have_no_softmax():
    own, other = (vit(problem_type="multi_label_classification") for _ in range(2))
    inputs = {**inputs_of(own), "labels": torch.ones(2, 4)}
    assert set(DistillationLoss(other).compute(own, inputs).parts) == {"tokens", "cls", "hidden", "task"}


def test_nothing_in_common_and_outputs_that_are_no_dictionary():
    loss = DistillationLoss(Nothing())
    with pytest.raises(ValueError, match="nothing to distil: ViTModel and the teacher, Nothing, have neither"):
        loss.compute(BACKBONES["vit"](), inputs_of(vit()))
    with pytest.raises(TypeError, match=r"Linear must return a ModelOutput or a dict to be distilled, got Tensor"):
        DistillationLoss(nn.Linear(2, 2)).compute(nn.Linear(2, 2), {"input": torch.ones(1, 2)})


class Nothing(nn.Module):
    def forward(self, pixel_values):
        return {}


def test_a_causal_language_model_is_not_for_the_stock_trainer():
    own = HEADS["bert"]()
    loss, inputs = DistillationLoss(copy.deepcopy(own)), inputs_of(own)
    own.loss_type = "ForCausalLM"
    with loss.attach(own), pytest.raises(ValueError, match=r"must be shifted: use KronTrainer\(teacher=...\)"):
        loss(own(**inputs), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": -1}, "logits must be a finite number that is not negative, or None, got -1"),
        ({"task": float("nan")}, "task must be a finite number"),
        ({"cls": True}, "cls must be a finite number .* got True"),
        ({"temperature": 0}, "temperature must be a finite number above 0, got 0"),
        ({"logits": 0, "tokens": 0, "cls": 0, "hidden": 0}, "are all 0: nothing is distilled"),
        ({"hidden_layers": "12"}, "hidden_layers must be a list of ints, got '12'"),
        ({"hidden_layers": [1.0]}, "hidden_layers must be a list of ints"),
        ({"hidden_layers": []}, "hidden_layers is empty; pass hidden=0"),
        ({"hidden_layers": [1], "hidden": 0}, r"hidden_layers=\[1\] but hidden=0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**options)


def test_wrong_types():
    with pytest.raises(TypeError, match=r"the teacher must be a torch.nn.Module, got str"):
        DistillationLoss("facebook/dinov2-small")
    with pytest.raises(TypeError, match="unexpected keyword argument 'weight'"):
        DistillationLoss(nn.Identity(), {"weight": 1})
