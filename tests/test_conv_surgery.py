"""Convolutions in surgery, checkpoints and adapters: what may be named, what is refused, what a file may claim."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_convs import MODELS
from tiny_peft import PEFT_NOISE
from torch import nn

from kron_hf import KronConfig, KronConv2d, KronLinear, Sparsifier, get_kron_model, kron_param_groups, kron_summary
from kron_hf.baselines.targets import block_layers
from kron_hf.checkpoint import attach_kron_config
from kron_hf.selection import BlockSizeSelector, KronCandidates, replace_by_chosen
from kron_hf.sparsity.pruning import block_entries, kron_layers
from kron_hf.targets import find_targets


def names(model, **options):
    config = KronConfig(**{"block_size": 4, "rank": 1, "init_weights": "random", **options})
    return [target.name for target in find_targets(model, config)]


class Standardised(nn.Conv2d):
    """Computes with another weight than it holds, as some models' own convolutions do."""


def net(conv=None) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), conv or nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8, 4))


# What may be named


def test_convolutions_are_left_alone_unless_named():
    convnext = MODELS["convnext"]()
    assert {name.rpartition(".")[2] for name in names(convnext, target_modules="all-linear")} == {"pwconv1", "pwconv2"}
    vit = MODELS["vit-patches"]()
    assert "vit.embeddings.patch_embeddings.projection" not in names(vit)
    assert names(vit, target_modules=["projection"], block_size=(4, 3)) == [
        "vit.embeddings.patch_embeddings.projection"
    ]


def test_a_model_of_convolutions_says_which_can_be_named():
    with pytest.raises(ValueError, match=r"no module to replace matches the default.*layer\.\*\.convolution"):
        names(MODELS["resnet"]())
    with pytest.raises(ValueError, match=r"could be named: convnext.embeddings.patch_embeddings, (?!.*dwconv)"):
        names(MODELS["convnext"]())


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), "2: groups must be 1.*this depthwise convolution has groups=8"),
        (nn.Conv2d(8, 8, 3, groups=2), "2: groups must be 1.*this grouped convolution has groups=2"),
        (Standardised(8, 8, 3), "2: only nn.Linear and nn.Conv2d can become.*this is a Standardised"),
        (nn.ConvTranspose2d(8, 8, 3), "2: only nn.Linear and nn.Conv2d can become.*this is a ConvTranspose2d"),
        (nn.Conv2d(6, 8, 3), r"2: block_size \(4, 4\) does not divide its weight of shape \(8, 6\) \(out, in\)"),
    ],
    ids=["depthwise", "grouped", "subclass", "transposed", "block"],
)
@pytest.mark.parametrize("target_modules", [["2"], r"0|2"], ids=str)
def test_what_cannot_be_replaced_is_refused_by_name(conv, message, target_modules):
    model = net(conv)
    with pytest.raises(ValueError, match=f"^{message}"):
        get_kron_model(model, KronConfig(block_size=4, rank=1, target_modules=target_modules))
    assert model[2] is conv


def test_depthwise_convolutions_of_convnext_are_refused_by_name():
    with pytest.raises(ValueError, match=r"stages\.0\.layers\.0\.dwconv: groups must be 1.*depthwise.*groups=8"):
        names(MODELS["convnext"](), target_modules=["dwconv"])


@pytest.mark.filterwarnings("ignore:These modules need as many FLOPs as dense ones")
def test_the_rank_may_reach_the_entries_of_a_block():
    assert names(net(), target_modules=["0"], block_size=2, rank=36) == ["0"]
    with pytest.raises(ValueError, match=r"0: rank must be at most bo \* bi \* kh \* kw = 36, got 37"):
        names(net(), target_modules=["0"], block_size=2, rank=37)
    with pytest.raises(ValueError, match=r"4: rank must be at most bo \* bi = 4, got 5"):
        names(net(), target_modules=["4"], block_size=2, rank=5)


def test_a_convolution_that_does_not_get_cheaper_is_warned_of():
    with pytest.warns(UserWarning, match=r"need as many FLOPs as dense ones or more.*: 0 \(4\.\d\dx\)"):
        names(net(), target_modules=["0"], rank=8)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, config: get_kron_model(model, config, calibration_data=torch.randn(4, 8, 3, 3)),
        lambda model, config: block_layers(model, config),
    ],
    ids=["calibration", "baselines"],
)
def test_what_works_on_linears_alone_refuses_convolutions_by_name(use):
    with pytest.raises(ValueError, match=r"^0: this works on nn\.Linear alone, the module is a Conv2d"):
        use(net(), KronConfig(block_size=4, rank=1, target_modules=["0", "4"]))


def test_random_factors_have_the_variance_of_the_replaced_weight_and_keep_what_is_trained():
    conv = nn.Conv2d(64, 128, 3)
    nn.init.normal_(conv.weight, std=2.0)
    conv.bias.requires_grad_(False)
    model = get_kron_model(net(conv), KronConfig(block_size=8, rank=4, target_modules=["2"], init_weights="random"))
    assert type(model[2]) is KronConv2d
    # a has 512 entries, b 2,304: their variances are known to 6 % and 3 %.
    torch.testing.assert_close(model[2].dense_weight().var().item(), 4.0, rtol=0.3, atol=0)
    assert {name: p.requires_grad for name, p in model[2].named_parameters()} == {
        "s": True,
        "a": True,
        "b": True,
        "bias": False,
    }
    assert torch.equal(model[2].bias, conv.bias)


# Sparsity


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_sparsity_is_the_share_of_entries_of_kernels_and_matrices(scope):
    model = MODELS["lenet5"].converted().train()
    for layer in kron_layers(model):
        layer.reset_parameters()
    optimizer = torch.optim.AdamW(kron_param_groups(model, 0.01))
    sparsifier = Sparsifier(model, target_sparsity=0.5, scope=scope, total_steps=4, interval=1, end=0.5)
    sparsifier.attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(pixel_values=MODELS["lenet5"].images).logits.square().sum().backward()
        optimizer.step()
    sparsifier.close()
    weights = [layer.dense_weight() for layer in kron_layers(model)]
    zeros, entries = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert sparsifier.sparsity == kron_summary(model).sparsity == pytest.approx(zeros / entries)
    assert 0 <= zeros - 0.5 * entries < max(block_entries(layer) for layer in kron_layers(model))
    assert all(bool(layer.block_mask.any()) for layer in kron_layers(model))
    if scope == "layer":
        shares = [layer.sparsity for layer in kron_layers(model)]
        assert max(shares) - min(shares) < 0.2  # conv1 has 3 blocks


def test_l1_zeroes_blocks_of_kernels():
    model = get_kron_model(net(), KronConfig(block_size=2, rank=1, target_modules=["0", "2"], init_weights="random"))
    optimizer = torch.optim.SGD(kron_param_groups(model, 0.01))
    sparsifier = Sparsifier(model, l1=2000.0, total_steps=10, interval=2, end=1.0)
    sparsifier.attach(optimizer)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(4, 8, 3, 3)).square().mean().backward()
        optimizer.step()
    sparsifier.close()
    assert [int(layer.block_mask.sum()) for layer in kron_layers(model)] == [1, 1]
    assert torch.count_nonzero(model[0].to_conv().weight) == 2 * 2 * 9


def test_s_of_a_convolution_is_not_decayed():
    model = MODELS["resnet"].converted()
    groups = kron_param_groups(model, 0.1, weight_decay=0.5)
    by_rate = {(group["lr"], group["weight_decay"]): group["params"] for group in groups}
    assert {id(p) for p in by_rate[0.1, 0.0]} >= {id(layer.s) for layer in kron_layers(model)}
    assert {id(p) for p in by_rate[0.4, 0.5]} == {id(p) for layer in kron_layers(model) for p in (layer.a, layer.b)}


# Candidates


def test_candidates_are_the_sum_of_convolutions_and_the_chosen_one_is_a_kron_conv2d():
    conv = nn.Conv2d(8, 12, 3, padding=1, stride=2)
    layer = KronCandidates.like(conv, [((4, 4), 1), ((2, 2), 3), ((12, 1), 2)])
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(layer.dense_weight().var().item(), 1 / (3 * 72), rtol=0.6, atol=0)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    layer.drop("4x4_rank1")
    layer.drop("12x1_rank2")
    layer(x).sum().backward()  # with parameters that take no part
    chosen = layer.chosen()
    assert repr(chosen) == (
        "KronConv2d(8, 12, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), block_size=(2, 2), rank=3, bias=True)"
    )
    torch.testing.assert_close(chosen(x), layer(x))  # the one adds the bias in the convolution
    fresh = KronCandidates.like(conv, [((4, 4), 1), ((2, 2), 3), ((12, 1), 2)])
    fresh.load_state_dict(chosen.state_dict())
    assert fresh.alive == ["2x2_rank3"]
    torch.testing.assert_close(fresh(x), chosen(x))


@pytest.mark.parametrize("cost", ["params", "flops", "latency"])
def test_block_sizes_of_convolutions_are_selected(cost):
    config = KronConfig(candidate_block_sizes=[2, 4], rank=1, target_modules=["0", "2", "4"], init_weights="random")
    model = get_kron_model(net(), config)
    x, y = torch.randn(32, 8, 3, 3), torch.randint(4, (32,))

    def loss():
        return nn.functional.cross_entropy(model(x), y)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    selector = BlockSizeSelector(
        model, total_steps=20, evaluate=lambda: float(loss()), cost=cost, cost_weight=0.1, scope="layer"
    )
    selector.attach(optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    result = selector.result
    assert result.shapes == {"0": [8, 8, 9, 1], "2": [8, 8, 1, 1], "4": [4, 8]}
    assert all(len(keys) == 1 for keys in result.alive.values())
    state = json.loads(json.dumps(selector.state_dict()))
    if cost != "latency":
        entries = {"params": (4 * 4 * 2 + 4 * 9, 576), "flops": (2 * (9 * 8 * 2 + 8 * 4), 1152)}[cost]
        assert (state["costs"]["candidates"][0]["2x2_rank1"], state["costs"]["dense"][0]) == entries
    expected = model(x)
    replace_by_chosen(model)
    assert [type(model[i]) for i in (0, 2, 4)] == [KronConv2d, KronConv2d, KronLinear]
    torch.testing.assert_close(model(x), expected)
    assert "2x2_rank1" in str(result)


def test_a_checkpoint_may_hold_candidates_of_convolutions(tmp_path):
    spec = MODELS["resnet"]
    model = get_kron_model(
        spec(),
        KronConfig(candidate_block_sizes=[4, (4, 8)], rank=1, target_modules=["1.convolution"], init_weights="random"),
    ).eval()
    next(module for module in model.modules() if isinstance(module, KronCandidates)).drop("4x8_rank1")
    attach_kron_config(model)  # as BlockSizeCallback does
    model.save_pretrained(tmp_path)
    loaded = spec.kind.from_pretrained(tmp_path)
    alive = [module.alive for module in loaded.modules() if isinstance(module, KronCandidates)]
    assert alive == [["4x4_rank1"], *[["4x4_rank1", "4x8_rank1"]] * 2]
    assert kron_summary(loaded).dense_params == sum(parameter.numel() for parameter in spec().parameters())
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=spec.images).logits, model(pixel_values=spec.images).logits)


# What a file may claim


@pytest.fixture
def checkpoint(tmp_path):
    MODELS["convnext"].converted().save_pretrained(tmp_path)
    return tmp_path


def set_module(folder, name, entry):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules"][name] = entry
    path.write_text(json.dumps(config))


DOWNSAMPLING = "convnext.encoder.stages.1.downsampling_layer.1"


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("convnext.encoder.stages.0.layers.0.dwconv", ([4, 4], 1), "dwconv.*groups must be 1.*depthwise"),
        ("convnext.encoder.stages.0.layers.0.layernorm", ([4, 4], 1), "only nn.Linear and nn.Conv2d can become"),
        (DOWNSAMPLING, ([5, 4], 1), r"is \(16, 8\) \(out, in\): .*\(5, 4\) does not divide"),
        (DOWNSAMPLING, ([4, 4], 65), r"rank must be an int from 1 to bo \* bi \* kh \* kw = 64, got 65"),
        (DOWNSAMPLING, ([4, 4], 3), r"downsampling_layer.1.a' has shape \[2, 4, 2\], config.json requires \[3, 4, 2\]"),
    ],
    ids=["depthwise", "norm", "block", "rank", "shape"],
)
def test_a_map_that_does_not_fit_is_refused(checkpoint, name, entry, message):
    set_module(checkpoint, name, {"block_size": entry[0], "rank": entry[1]})
    with pytest.raises(ValueError, match=message):
        MODELS["convnext"].kind.from_pretrained(checkpoint)


def test_a_kernel_of_another_size_is_refused(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[f"{DOWNSAMPLING}.b"] = torch.zeros(2, 4, 4, 3, 3)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1\.b' has shape \[2, 4, 4, 3, .*\], config.json requires \[2, 4, 4, 2, 2\]"):
        MODELS["convnext"].kind.from_pretrained(checkpoint)


# Adapters


@pytest.mark.filterwarnings(PEFT_NOISE)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_of_convolutions(tmp_path, low_cpu_mem_usage):
    spec = MODELS["convnext"]
    spec().save_pretrained(tmp_path / "base")

    def base():
        return spec.kind.from_pretrained(tmp_path / "base")

    model = get_peft_model(base(), KronConfig(**spec.kron, init_weights="random")).eval()
    with torch.no_grad():
        for layer in kron_layers(model):
            layer.s[0, 0] = 0
            layer.freeze_mask()
        expected = model(pixel_values=spec.images).logits
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(loaded(pixel_values=spec.images).logits, expected)
        assert [layer.dead_blocks is None for layer in kron_layers(loaded)] == [False] * 5
        merged = loaded.merge_and_unload()
        assert [repr(module) for module in merged.modules()] == [repr(module) for module in base().modules()]
        torch.testing.assert_close(merged(pixel_values=spec.images).logits, expected, rtol=1e-4, atol=1e-5)
