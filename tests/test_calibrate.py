"""`calibrate`, `get_kron_model(..., calibration_data=...)` and `preprocess_kron` on whole models."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import tiny_calibration as tiny
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from tiny_peft import PEFT_NOISE
from torch import nn
from transformers import AutoModelForImageClassification, T5Model

from kron_hf import (
    CalibrationConfig,
    KronConfig,
    KronLinear,
    calibrate,
    get_kron_model,
    kron_summary,
    preprocess_kron,
)
from kron_hf.calibration import fittings
from kron_hf.calibration.passes import run
from kron_hf.factors import block_norms
from kron_hf.sparsity.pruning import model_sparsity

MODELS = {
    "ViT": (tiny.vit, tiny.image_batches),
    "DINOv2": (tiny.dinov2, tiny.image_batches),
    "BERT": (tiny.bert, tiny.text_batches),
    "Swin": (tiny.swin, tiny.image_batches),
}
UNIFORM = {"block_size": (4, 8), "rank": 3}
QUICK = {**UNIFORM, "calibration_config": {"sweeps": 1}}


def output_error(model, dense, batch):
    return (run(model, batch)[0] - run(dense, batch)[0]).square().mean()


@pytest.mark.filterwarnings("ignore:These modules need as many FLOPs", "ignore:init_weights='nearest' kept")
@pytest.mark.parametrize("name", MODELS)
def test_calibration_keeps_more_of_a_model_than_the_nearest_factors(name):
    build, data = MODELS[name]
    dense, batches = build(), data(64, 16)
    held_out = data(96, 96)[0]
    errors = {}
    for init in ("calibrated", "nearest", "random"):
        torch.manual_seed(0)
        given = {"calibration_data": batches} if init == "calibrated" else {}
        model = get_kron_model(copy.deepcopy(dense), KronConfig(**UNIFORM, init_weights=init), **given)
        errors[init] = output_error(model, dense, held_out)
        assert not model.training
    assert errors["calibrated"] < 0.7 * errors["nearest"]
    assert errors["calibrated"] < 0.7 * errors["random"]


@pytest.mark.parametrize("name", MODELS)
def test_a_budget_is_met_and_its_config_makes_the_same_layers(name):
    build, data = MODELS[name]
    model = build()
    config = KronConfig(target_params=0.5, calibration_config={"menu_shapes": [(1, -1), (4, 8)], "sweeps": 2})
    calibration = calibrate(model, config, data())
    result = calibration.result
    assert 0.45 < result.params / result.dense_params <= 0.5
    assert set(calibration.layers) == set(calibration.config.modules)
    again = get_kron_model(build(), replace(calibration.config, init_weights="random", calibration_config=None))
    sizes = {name: (layer.block_size, layer.rank) for name, layer in calibration.layers.items()}
    found = {n: (m.block_size, m.rank) for n, m in again.named_modules() if isinstance(m, KronLinear)}
    assert found == sizes
    summary = kron_summary(again)
    stayed = sum(row.dense.params for row in result.layers if row.block_size is None)
    assert summary.converted.deployed_params + stayed == result.params
    assert not any(isinstance(module, KronLinear) for module in model.modules())
    assert all(0 <= row.held_out_error < 1.5 for row in result.layers)
    assert "layers converted" in str(result)


def test_a_calibration_converts_a_copy_of_its_model(tmp_path):
    dense = tiny.vit()
    calibration = calibrate(dense, KronConfig(**UNIFORM), tiny.image_batches())
    model = calibration.convert(copy.deepcopy(dense))
    whole = get_kron_model(tiny.vit(), KronConfig(**UNIFORM), calibration_data=tiny.image_batches())
    batch = {"pixel_values": tiny.pixels(4)}
    assert torch.equal(run(model, batch).logits, run(whole, batch).logits)
    assert not any(isinstance(module, KronLinear) for module in dense.modules())
    model.save_pretrained(tmp_path)
    assert torch.equal(
        run(AutoModelForImageClassification.from_pretrained(tmp_path).eval(), batch).logits, run(model, batch).logits
    )


def test_what_it_converts_shares_nothing():
    calibration = calibrate(tiny.vit(), KronConfig(**QUICK), tiny.image_batches())
    models = [calibration.convert(tiny.vit()) for _ in range(2)]
    owners = [{id(parameter) for parameter in model.parameters()} for model in models]
    kept = {id(parameter) for layer in calibration.layers.values() for parameter in layer.parameters()}
    assert not owners[0] & owners[1]
    assert not kept & (owners[0] | owners[1])


def test_the_config_of_a_calibration_makes_the_same_model_of_another_copy():
    options = CalibrationConfig(sweeps=2, target_sparsity=0.3)
    asked = KronConfig(**UNIFORM, target_modules=["q_proj", "fc2"], calibration_config=options)
    calibration = calibrate(tiny.dinov2(), asked, tiny.image_batches())
    model = calibration.convert(tiny.dinov2())
    config = KronConfig(**calibration.config.to_dict())  # as it is saved
    with pytest.raises(ValueError, match="init_weights='calibrated' needs calibration data: get_kron_model"):
        get_kron_model(tiny.dinov2(), config)
    again = get_kron_model(tiny.dinov2(), config, calibration_data=tiny.image_batches())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_config_of_a_budget_gives_the_same_fit_where_some_of_a_stage_stay_dense():
    options = {"menu_shapes": [(1, -1), (4, 8)], "sweeps": 1}
    calibration = calibrate(tiny.vit(), KronConfig(target_params=0.5, calibration_config=options), tiny.image_batches())
    attention = [name for name in calibration.layers if name.startswith("vit.layers.0.attention.")]
    assert attention == ["vit.layers.0.attention.k_proj"]  # of q, k and v, whose token weights are one
    model = calibration.convert(tiny.vit())
    again = get_kron_model(tiny.vit(), calibration.config, calibration_data=tiny.image_batches())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("build", [tiny.t5, tiny.bart], ids=["T5", "BART"])
def test_a_decoder_starts_from_what_its_model_makes_of_the_labels(build):
    model, batch, config = build(), tiny.translations((9, 9)), KronConfig(**QUICK)
    start = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    given = {**{name: batch[name] for name in ("input_ids", "attention_mask")}, "decoder_input_ids": start}
    wanted = calibrate(model, config, [given]).result
    assert all(any(f"{half}." in row.name for row in wanted.layers) for half in ("encoder", "decoder"))
    assert calibrate(model, config, [batch]).result == wanted
    examples = [{name: values[row].tolist() for name, values in batch.items()} for row in range(16)]
    assert calibrate(model, config, examples).result == wanted


@pytest.mark.parametrize("lengths", [(6, 9), (9, 6)], ids=["padded texts", "padded labels"])
def test_padding_of_encoder_and_decoder_does_not_count(lengths):
    model, padded = tiny.t5().double(), tiny.translations(lengths)
    short = {name: values[:, : lengths[name == "labels"]] for name, values in padded.items()}
    results = [calibrate(model, KronConfig(**QUICK), [batch]).result for batch in (padded, short)]
    for layer, other in zip(*(result.layers for result in results), strict=True):
        assert layer.error == pytest.approx(other.error, rel=1e-6), layer.name


@pytest.mark.parametrize(
    ("build", "message"),
    [
        pytest.param(
            tiny.t5,
            r"T5ForConditionalGeneration does not take .* holds 'input_ids', 'attention_mask': .* Give "
            "decoder_input_ids, too, or labels to make them of$",
            id="T5",
        ),
        pytest.param(
            lambda: T5Model(tiny.t5().config),
            r"T5Model does not take .* Give decoder_input_ids, too$",
            id="T5 backbone",
        ),
        pytest.param(tiny.vit, r"ViTFor.* does not take .* Give pixel_values, too$", id="ViT"),
    ],
)
def test_inputs_that_a_forward_needs_are_named(build, message):
    batch = tiny.translations((9, 9))
    del batch["labels"]
    with pytest.raises(ValueError, match=message):
        calibrate(build(), KronConfig(**UNIFORM), [batch])


class TokenByToken(nn.Module):
    """Two residual blocks over embeddings, of which that of padding may be anything."""

    def __init__(self, padding):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in "12")
        with torch.no_grad():
            self.embed.weight[0] = padding

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.mark.parametrize(
    "config", [{"block_size": (4, 8), "rank": 2}, {"target_params": 0.5}], ids=["uniform", "budget"]
)
def test_padding_may_be_nan(config):
    results = [
        calibrate(TokenByToken(padding), KronConfig(**config), tiny.text_batches()).result
        for padding in (0.0, float("nan"))
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize("budget", ["target_params", "target_flops"])
def test_a_budget_out_of_reach_is_refused_before_any_data_is_read(budget):
    class Unread(list):
        def __iter__(self):
            pytest.fail("it reads the data")

    with pytest.raises(ValueError, match=f"{budget}=0.0001 is below the smallest"):
        calibrate(tiny.vit(), KronConfig(**{budget: 1e-4}), Unread(tiny.image_batches()))


def test_calibration_is_deterministic_and_takes_any_split_into_batches():
    images, model = tiny.pixels(24).double(), tiny.vit().double()
    config = KronConfig(**UNIFORM, init_weights="calibrated")
    whole = calibrate(model, config, [{"pixel_values": images}])
    again = calibrate(model, config, [{"pixel_values": images}])
    parts = calibrate(model, config, [{"pixel_values": part} for part in images.split(7)])
    for name, layer in whole.layers.items():
        assert torch.equal(layer.a, again.layers[name].a)
    # Sums in another order: factors may differ where they hardly matter, errors may not.
    for layer, other in zip(whole.result.layers, parts.result.layers, strict=True):
        assert layer.error == pytest.approx(other.error, rel=1e-5)


def test_a_data_set_of_examples_with_labels_and_other_columns():
    examples = [{"pixel_values": image, "labels": 0, "path": "x.png"} for image in tiny.pixels(10)]
    calibration = calibrate(tiny.vit(), KronConfig(**UNIFORM), examples)
    batches = calibrate(tiny.vit(), KronConfig(**UNIFORM), [{"pixel_values": tiny.pixels(10)}])
    for name, layer in calibration.layers.items():
        torch.testing.assert_close(layer.a, batches.layers[name].a)


def test_labels_of_any_kind_are_left_out_and_columns_that_do_not_fit_are_named():
    examples = [{"pixel_values": image, "labels": {"boxes": torch.zeros(2, 4)}} for image in tiny.pixels(4)]
    assert calibrate(tiny.vit(), KronConfig(**UNIFORM), examples).layers
    pairs = [({"pixel_values": image}, 0) for image in tiny.pixels(4)]
    assert calibrate(tiny.vit(), KronConfig(**UNIFORM), pairs).layers
    with pytest.raises(
        ValueError, match=r"columns \['image', 'label'\], and ViTFor.*takes none.*pixel_values.*process"
    ):
        calibrate(tiny.vit(), KronConfig(**UNIFORM), [{"image": "x.png", "label": 0}])


def test_a_budget_below_a_menu_names_the_smallest_that_its_cheapest_options_reach():
    config = KronConfig(target_params=0.01, calibration_config={"menu_shapes": [(8, 8)]})
    with pytest.raises(ValueError, match=r"target_params=0\.01 is below the smallest .*: 0\.0") as caught:
        calibrate(tiny.vit(), config, tiny.image_batches())
    smallest = float(str(caught.value).rpartition(" ")[2])
    config = KronConfig(target_params=smallest, calibration_config=config.calibration_config)
    assert calibrate(tiny.vit(), config, tiny.image_batches()).layers


def test_a_model_that_is_not_in_memory_is_refused():
    model = tiny.vit()
    model.vit.layers[1].mlp.fc2.to("meta")
    with pytest.raises(ValueError, match=r"vit\.layers\.1\.mlp\.fc2: its weight is on the meta device"):
        calibrate(model, KronConfig(**UNIFORM), tiny.image_batches())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    dense = tiny.dinov2().to(dtype)
    model = get_kron_model(copy.deepcopy(dense), KronConfig(**UNIFORM), calibration_data=tiny.image_batches())
    layer = model.encoder.layer[0].mlp.fc1
    assert layer.a.dtype == dtype
    batch = {"pixel_values": tiny.pixels(8, seed=1).to(dtype)}
    error = output_error(model.double(), dense.double(), {"pixel_values": batch["pixel_values"].double()})
    assert error < 1.0


def test_what_comes_out_saves_loads_and_trains(tmp_path):
    model = get_kron_model(tiny.vit(), KronConfig(**UNIFORM), calibration_data=tiny.image_batches())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    batch = {"pixel_values": tiny.pixels(4)}
    assert torch.equal(run(loaded, batch).logits, run(model, batch).logits)
    loaded(**batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.vit.layers[0].mlp.fc1.parameters())


def test_train_mode_with_dropout_is_restored_and_does_not_matter():
    plain = calibrate(tiny.vit(), KronConfig(**UNIFORM), tiny.image_batches()).layers
    model = tiny.vit()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    layers = calibrate(model, KronConfig(**UNIFORM), tiny.image_batches()).layers
    assert all(module.training for module in model.modules())
    for name, layer in layers.items():
        assert torch.equal(layer.a, plain[name].a)
        assert layer.training


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(tiny.pixels(1), id="one image"),
        pytest.param(tiny.pixels(1).expand(8, -1, -1, -1), id="all images equal"),
        pytest.param(torch.zeros(4, 1, 16, 16), id="black images"),
    ],
)
def test_few_and_degenerate_images_give_finite_layers(images):
    dense = tiny.vit()
    model = get_kron_model(
        copy.deepcopy(dense), KronConfig(target_params=0.5), calibration_data=[{"pixel_values": images}]
    )
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert output_error(model, dense, {"pixel_values": images}) < 0.1


def test_a_layer_whose_outputs_never_change_is_fitted_by_its_bias():
    dense = tiny.vit()
    with torch.no_grad():
        dense.vit.layers[0].mlp.fc2.weight.zero_()
    calibration = calibrate(dense, KronConfig(**UNIFORM), tiny.image_batches())
    layer = calibration.layers["vit.layers.0.mlp.fc2"]
    assert all(bool(parameter.isfinite().all()) for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        pytest.param(UNIFORM, [], "calibration_data is empty", id="no data"),
        pytest.param({"target_params": 1e-4}, None, "target_params=0.0001 is below the smallest", id="budget"),
        pytest.param({"target_params": 1.0}, None, "leaves every layer dense", id="all dense"),
        pytest.param(
            {"target_params": 0.5, "calibration_config": {"menu_shapes": [(5, 7)]}},
            None,
            r"no shape of menu_shapes=\[\(5, 7\)\] divides a layer.*\(32, 32\), \(32, 64\), \(64, 32\)",
            id="menu",
        ),
        pytest.param({"init_weights": "random"}, None, "init_weights='random'.*calibration_data", id="random"),
        pytest.param({"block_size": 5, "target_modules": ["fc1"]}, None, r"\(5, 5\) does not divide", id="block"),
    ],
)
def test_bad_input_is_refused_and_the_model_stays(config, data, message):
    model = tiny.vit()
    with pytest.raises(ValueError, match=message):
        get_kron_model(model, KronConfig(**config), calibration_data=tiny.image_batches() if data is None else data)
    assert not any(isinstance(module, KronLinear) for module in model.modules())


@pytest.mark.parametrize("kind", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_the_wrapper_of_data_parallel_is_refused(kind):
    wrapper = kind.__new__(kind)  # DDP itself needs processes
    nn.Module.__init__(wrapper)
    wrapper.module = tiny.vit()
    with pytest.raises(ValueError, match=rf"not its {kind.__name__} wrapper: pass model\.module"):
        calibrate(wrapper, KronConfig(**UNIFORM), tiny.image_batches())


@pytest.mark.slow
def test_a_compiled_wrapper_is_calibrated_as_its_model():
    images = [{"pixel_values": image} for image in tiny.pixels(8)]
    plain = calibrate(tiny.vit(), KronConfig(**QUICK), images)
    compiled = torch.compile(tiny.vit(), backend="eager")
    found = calibrate(compiled, KronConfig(**QUICK), images)
    assert found.config.modules == plain.config.modules
    model = found.convert(compiled)
    batch = {"pixel_values": tiny.pixels(2)}
    assert torch.equal(model(**batch).logits, plain.convert(tiny.vit())(**batch).logits)
    assert isinstance(model.vit.layers[0].mlp.fc1, KronLinear)


@pytest.mark.parametrize(
    "around",
    [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_what_the_caller_has_switched_off_or_on_does_not_matter(around):
    config = KronConfig(target_params=0.4, calibration_config={"sweeps": 1})
    plain = calibrate(tiny.vit(), config, tiny.image_batches())
    model = tiny.vit()
    with around():
        calibration = calibrate(model, config, tiny.image_batches())
    assert calibration.result == plain.result
    converted = calibration.convert(model).train()
    converted(pixel_values=tiny.pixels(2), labels=torch.tensor([0, 1])).loss.backward()
    assert all(layer.a.grad is not None for layer in map(converted.get_submodule, calibration.layers))


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_texts_of_several_lengths_say_what_to_do(kind):
    texts = [{"input_ids": kind([1, 2, 3])}, {"input_ids": kind([1, 2])}]
    with pytest.raises(ValueError, match=r"which hold \['input_ids'\], make no batch: .* Pad texts to one length, or"):
        calibrate(tiny.bert(), KronConfig(**UNIFORM), texts)


def test_examples_that_make_no_tensor_say_what_to_do():
    with pytest.raises(TypeError, match=r"examples of type Image, which make no tensor: let the model's processor"):
        calibrate(tiny.vit(), KronConfig(**UNIFORM), [Image.new("L", (16, 16))] * 2)


def test_calibrated_without_data_says_how_to_pass_it():
    with pytest.raises(ValueError, match=r"needs calibration data: get_kron_model\(model, config, calibration_data"):
        get_kron_model(tiny.vit(), KronConfig(**UNIFORM, init_weights="calibrated"))


def test_an_interruption_leaves_the_model_dense(monkeypatch):
    model, calls = tiny.vit(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return fitted(*args, **kwargs)

    fitted = fittings.fitted_layer
    monkeypatch.setattr(fittings, "fitted_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_kron_model(model, KronConfig(**UNIFORM), calibration_data=tiny.image_batches())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "quantization_config" not in model.config.to_dict()


@pytest.mark.filterwarnings(PEFT_NOISE)
@pytest.mark.parametrize("config", [UNIFORM, {"target_params": 0.5}], ids=["uniform", "budget"])
def test_an_adapter_of_prepared_layers_computes_what_the_converted_model_does(config, tmp_path):
    config = KronConfig(**config, init_weights="calibrated")
    model = tiny.vit()
    calibration = preprocess_kron(model, config, tiny.image_batches())
    assert not any(isinstance(module, KronLinear) for module in model.modules())
    adapted = get_peft_model(model, config).eval()
    converted = get_kron_model(tiny.vit(), config, calibration_data=tiny.image_batches())
    batch = {"pixel_values": tiny.pixels(4)}
    assert torch.equal(run(adapted, batch).logits, run(converted, batch).logits)
    assert set(adapted.peft_config["default"].modules) == set(calibration.layers)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.vit(), tmp_path).eval()
    assert torch.equal(run(loaded, batch).logits, run(adapted, batch).logits)


@pytest.mark.filterwarnings(PEFT_NOISE)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param({"block_size": 8, "rank": 2}, r"asks for blocks of \(8, 8\) at rank 2", id="block size"),
        pytest.param({"target_params": 0.5}, r"another config .*asks for target_params=0\.5", id="budget"),
        pytest.param({**UNIFORM, "init_weights": "random"}, "init_weights='random'", id="random"),
    ],
)
def test_prepared_layers_of_another_config_are_refused(config, message):
    model = tiny.vit()
    preprocess_kron(model, KronConfig(**UNIFORM), tiny.image_batches())
    with pytest.raises(ValueError, match=f"q_proj: preprocess_kron has prepared .*{message}.*call it with the config"):
        get_peft_model(model, KronConfig(**config))
    assert not any(isinstance(module, KronLinear) for module in model.modules())


@pytest.mark.filterwarnings(PEFT_NOISE)
def test_prepared_layers_follow_the_model_and_the_last_call_counts():
    model, config = tiny.vit(), KronConfig(**UNIFORM, target_modules=["fc1"])
    preprocess_kron(model, KronConfig(**UNIFORM), tiny.image_batches())
    preprocess_kron(model, config, tiny.image_batches())
    assert not hasattr(model.vit.layers[0].mlp.fc2, "kron_prepared")
    adapted = get_peft_model(model.to(torch.bfloat16), config)
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16}


def test_an_adapter_without_prepared_layers_says_what_to_call():
    with pytest.raises(ValueError, match="preprocess_kron"):
        get_peft_model(tiny.vit(), KronConfig(**UNIFORM, init_weights="calibrated"))


def test_options_reach_the_fit():
    data = tiny.image_batches()
    few = calibrate(tiny.dinov2(), KronConfig(**UNIFORM, calibration_config=CalibrationConfig(sweeps=1)), data)
    many = calibrate(tiny.dinov2(), KronConfig(**UNIFORM, calibration_config=CalibrationConfig(sweeps=12)), data)
    assert many.result.layers[0].error < few.result.layers[0].error
    cls = calibrate(tiny.dinov2(), KronConfig(**UNIFORM, calibration_config=CalibrationConfig(readout="cls")), data)
    assert not torch.equal(cls.layers["encoder.layer.0.mlp.fc1"].a, few.layers["encoder.layer.0.mlp.fc1"].a)


@pytest.mark.parametrize("target", [0.3, 0.5])
def test_blocks_are_pruned_to_the_target_and_the_others_refitted(target):
    dense, batches = tiny.dinov2(), tiny.image_batches(64, 16)
    held_out = tiny.image_batches(96, 96, seed=1)[0]
    sparse = CalibrationConfig(target_sparsity=target)
    model = get_kron_model(
        copy.deepcopy(dense), KronConfig(**UNIFORM, calibration_config=sparse), calibration_data=batches
    )
    blocks = sum(layer.s.numel() for layer in model.modules() if isinstance(layer, KronLinear))
    assert model_sparsity(model) == pytest.approx(target, abs=1 / blocks)
    assert all(layer.sparsity < 1 for layer in model.modules() if isinstance(layer, KronLinear))
    # Against pruning the same fit in one go, by norms, without a refit.
    plain = get_kron_model(copy.deepcopy(dense), KronConfig(**UNIFORM), calibration_data=batches)
    for layer in (module for module in plain.modules() if isinstance(module, KronLinear)):
        norms = block_norms(layer.s.detach(), layer.a.detach(), layer.b.detach())
        layer.freeze_mask(norms < norms.flatten().sort().values[int(target * norms.numel())])
    assert output_error(model, dense, held_out) < 0.8 * output_error(plain, dense, held_out)
    layer = next(layer for layer in model.modules() if isinstance(layer, KronLinear) and layer.sparsity > 0)
    assert layer.dead_blocks is not None


def test_a_budget_and_a_sparsity_exclude_each_other():
    config = KronConfig(target_params=0.5, calibration_config=CalibrationConfig(target_sparsity=0.5))
    with pytest.raises(ValueError, match="target_sparsity goes with one block_size"):
        calibrate(tiny.vit(), config, tiny.image_batches())
