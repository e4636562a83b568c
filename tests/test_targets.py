import re

import pytest
import torch
import transformers as hf
from families import BERT_SIZES, FAMILIES, VIT_SIZES
from torch import nn
from torch.nn.utils import prune

from kron_hf import KronConfig, KronLinear, get_kron_model
from kron_hf.targets import find_targets, pretrained_parts

ATTENTION = [f"attention.{letter}_proj" for letter in "qkvo"]
MLP = ["mlp.fc1", "mlp.fc2"]
SWIGLU = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
BERT = [*(f"attention.self.{x}" for x in ("query", "key", "value")), "attention.output.dense", "intermediate.dense"]

# family: (name of the backbone, names of the two layers in it, projections of a layer)
PROJECTIONS = {
    "vit": ("vit", "layers.{}", ATTENTION + MLP),
    "deit": ("deit", "layers.{}", ATTENTION + MLP),
    "swin": ("swin", "encoder.layers.{}.blocks.0", ATTENTION + MLP),
    "dinov2": ("dinov2", "encoder.layer.{}", ATTENTION + MLP),
    "dinov2-swiglu": ("dinov2", "encoder.layer.{}", ATTENTION + SWIGLU),
    "beit": ("beit", "layers.{}", ATTENTION + MLP),
    "vit-msn": ("vit", "layers.{}", ATTENTION + MLP),
    "bert": ("bert", "encoder.layer.{}", [*BERT, "output.dense"]),
}
# Linears of the backbones with a head that are no projections.
OTHER_LINEARS = {"swin": ["swin.encoder.layers.0.downsample.reduction"], "bert": ["bert.pooler.dense"]}


def config(**kwargs):
    return KronConfig(**{"block_size": (4, 8), "rank": 1, **kwargs})


def names(model, **kwargs):
    return [target.name for target in find_targets(model, config(**kwargs))]


def projections(family, prefix=True):
    backbone, layer, suffixes = PROJECTIONS[family]
    start = f"{backbone}." if prefix else ""
    return [f"{start}{layer.format(index)}.{suffix}" for index in range(2) for suffix in suffixes]


def vit():
    return FAMILIES["vit"]()


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.head = (nn.Linear(16, 16) for _ in range(4))


class Composite(nn.Module):
    """A user's module around a transformers encoder."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.project = nn.Linear(32, 16)
        self.classifier = nn.Linear(16, 8)


# The default and "all-linear"


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "gated"])
def test_default_is_the_projections_of_both_halves_of_t5(gated):
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, feed_forward_proj="gated-gelu" if gated else "relu"))
    inner = ["DenseReluDense.wi_0", "DenseReluDense.wi_1"] if gated else ["DenseReluDense.wi"]
    own = [f"layer.0.SelfAttention.{letter}" for letter in "qkvo"]
    cross = [f"layer.1.EncDecAttention.{letter}" for letter in "qkvo"]
    layers = {"encoder": [own, inner, 1], "decoder": [own + cross, inner, 2]}
    expected = [
        f"{side}.block.0.{name}"
        for side, (attention, mlp, last) in layers.items()
        for name in [*attention, *(f"layer.{last}.{name}" for name in [*mlp, "DenseReluDense.wo"])]
    ]
    assert names(model) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_default_is_the_projections_of_a_headed_model(family):
    assert sorted(names(FAMILIES[family]())) == sorted(projections(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_default_is_the_projections_of_a_backbone(family):
    backbone = hf.AutoModel.from_config(FAMILIES[family]().config)
    assert sorted(names(backbone)) == sorted(projections(family, prefix=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_all_but_the_output_head(family):
    expected = projections(family) + OTHER_LINEARS.get(family, [])
    assert sorted(names(FAMILIES[family](), target_modules="all-linear")) == sorted(expected)


def test_two_output_heads_stay():
    model = hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**VIT_SIZES))
    assert not [name for name in names(model, target_modules="all-linear") if "classifier" in name]


def test_a_language_model_head_stays():
    model = hf.BertForMaskedLM(hf.BertConfig(**BERT_SIZES))
    assert sorted(names(model, target_modules="all-linear")) == sorted(projections("bert"))


def test_all_linear_of_a_backbone_has_the_pooler():
    backbone = hf.ViTModel(hf.ViTConfig(**VIT_SIZES))
    expected = [*projections("vit", prefix=False), "pooler.dense"]
    assert sorted(names(backbone, target_modules="all-linear")) == sorted(expected)


@pytest.mark.parametrize("target_modules", [None, "all-linear"])
def test_plain_module_keeps_its_last_linear(target_modules):
    assert names(Mlp(), target_modules=target_modules) == ["fc1", "fc2", "fc3"]


def test_plain_module_with_a_single_linear():
    assert names(nn.Sequential(nn.Linear(16, 16))) == ["0"]


# A transformers model inside a plain module


def test_pretrained_parts_are_the_outermost():
    headed = vit()
    assert pretrained_parts(headed) == {"": headed}
    both = nn.ModuleDict({"a": Composite(headed), "ab": headed.vit})
    assert pretrained_parts(both) == {"a.encoder": headed}  # `ab` is the same module as `a.encoder.vit`
    assert pretrained_parts(Mlp()) == {}


def test_default_of_a_composite_is_the_projections_of_its_encoder():
    expected = [f"encoder.{name}" for name in projections("vit", prefix=False)]
    assert sorted(names(Composite(hf.ViTModel(hf.ViTConfig(**VIT_SIZES))))) == sorted(expected)


def test_default_of_a_composite_with_a_headed_model():
    assert sorted(names(Composite(vit()))) == sorted(f"encoder.{name}" for name in projections("vit"))


def test_all_linear_of_a_composite_leaves_every_head():
    expected = [*(f"encoder.{name}" for name in projections("vit")), "project"]
    assert sorted(names(Composite(vit()), target_modules="all-linear")) == sorted(expected)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # on importing Inductor
def test_default_of_a_compiled_model():
    expected = [f"_orig_mod.{name}" for name in projections("vit")]
    assert sorted(names(torch.compile(vit()))) == sorted(expected)


def test_default_of_two_encoders():
    model = nn.ModuleDict({"image": vit(), "text": FAMILIES["bert"]()})
    expected = [f"image.{name}" for name in projections("vit")] + [f"text.{name}" for name in projections("bert")]
    assert sorted(names(model)) == sorted(expected)


# Naming modules


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"target_modules": ["fc1"]}, ["layers.0.mlp.fc1", "layers.1.mlp.fc1"]),
        ({"target_modules": ["vit.layers.1.mlp.fc1", "layers.0.mlp.fc2"]}, ["layers.0.mlp.fc2", "layers.1.mlp.fc1"]),
        ({"target_modules": r".*\.1\.mlp\.fc\d"}, ["layers.1.mlp.fc1", "layers.1.mlp.fc2"]),
        ({"target_modules": ["fc1"], "layers_to_transform": [1]}, ["layers.1.mlp.fc1"]),
        ({"target_modules": ["fc1"], "layers_to_transform": 0}, ["layers.0.mlp.fc1"]),
        ({"target_modules": ["fc1"], "layers_to_transform": 0, "layers_pattern": "layers"}, ["layers.0.mlp.fc1"]),
        ({"target_modules": ["fc1", "fc2"], "exclude_modules": ["layers.0.mlp.fc1", "fc2"]}, ["layers.1.mlp.fc1"]),
        ({"target_modules": ["fc1"], "exclude_modules": r".*\.0\..*"}, ["layers.1.mlp.fc1"]),
        ({"target_modules": r".*\.fc1", "exclude_modules": r".*\.0\..*"}, ["layers.1.mlp.fc1"]),
    ],
    ids=[
        "endings",
        "full-names",
        "regex",
        "layer-list",
        "one-layer",
        "layers-pattern",
        "exclude-endings",
        "exclude-regex",
        "regex-exclude-regex",
    ],
)
def test_named_modules(kwargs, expected):
    assert names(vit(), **kwargs) == [f"vit.{name}" for name in expected]


@pytest.mark.parametrize("target_modules", [None, "all-linear"])
@pytest.mark.parametrize(
    "exclude", [["q_proj", "k_proj", "v_proj", "o_proj", "layers.0.mlp.fc1"], r".*attention.*|.*0\.mlp\.fc1"]
)
def test_exclude_from_the_default(target_modules, exclude):
    chosen = names(vit(), target_modules=target_modules, exclude_modules=exclude)
    assert chosen == ["vit.layers.0.mlp.fc2", "vit.layers.1.mlp.fc1", "vit.layers.1.mlp.fc2"]


@pytest.mark.parametrize("pattern", [None, "layers"])
def test_layer_indices_on_a_bare_backbone(pattern):
    backbone = hf.ViTModel(hf.ViTConfig(**VIT_SIZES))
    chosen = names(backbone, target_modules=["fc1"], layers_to_transform=[1], layers_pattern=pattern)
    assert chosen == ["layers.1.mlp.fc1"]


def test_an_output_head_can_be_named():
    assert names(Mlp(), target_modules=["head"]) == ["head"]


def test_sizes_come_from_the_patterns():
    targets = find_targets(
        vit(),
        config(
            target_modules=["fc1", "fc2", "q_proj"],
            block_size_pattern={"fc1": (1, -1), r"1\.mlp\.fc2": 8},
            rank_pattern={"q_proj": 2, r"layers\.0\..*": 3},
        ),
    )
    assert {target.name.removeprefix("vit.layers."): (target.block_size, target.rank) for target in targets} == {
        "0.attention.q_proj": ((4, 8), 2),  # the first pattern that matches
        "0.mlp.fc1": ((1, 32), 3),
        "0.mlp.fc2": ((4, 8), 3),
        "1.attention.q_proj": ((4, 8), 2),
        "1.mlp.fc1": ((1, 32), 1),
        "1.mlp.fc2": ((8, 8), 1),
    }


# Entries that select nothing


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block_size_pattern": {"fc9": 4}}, "block_size_pattern: 'fc9' matches none of the chosen modules"),
        ({"rank_pattern": {"classifier": 2}}, "rank_pattern: 'classifier' matches none of the chosen modules"),
        ({"target_modules": ["fc1", "fc9"]}, "target_modules: 'fc9' matches none of the modules"),
        ({"exclude_modules": ["fc1", "fc9"]}, "exclude_modules: 'fc9' matches none of the modules"),
        (
            {"target_modules": ["fc1"], "layers_to_transform": [1, 2]},
            "layers_to_transform: 2 matches none of the chosen modules",
        ),
    ],
    ids=["block-size", "rank", "target", "exclude", "layer"],
)
def test_an_entry_that_matches_nothing_warns(kwargs, message):
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as caught:
        assert names(vit(), **kwargs)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "kwargs",
    [{"target_modules": ["fc9"]}, {"target_modules": "fc1"}, {"target_modules": []}, {"exclude_modules": ".*"}],
    ids=["list", "regex", "empty", "all-excluded"],
)
def test_no_match_lists_the_candidates(kwargs):
    with pytest.raises(ValueError, match=r"^no module to replace matches") as error:
        names(vit(), **kwargs)
    listed = str(error.value).partition("modules that could be named: ")[2].split(", ")
    kinds = dict.fromkeys(name.replace(".0.", ".*.").replace(".1.", ".*.") for name in projections("vit"))
    assert listed == ["vit.embeddings.patch_embeddings.projection", *kinds, "classifier"]


def test_a_string_that_matches_no_whole_name_is_explained():
    with pytest.raises(ValueError, match=r"a string is a regular expression for whole names; .*=\['fc1'\]"):
        names(vit(), target_modules="fc1")


def test_what_is_wrong_with_many_layers_alike_is_said_once():
    with pytest.raises(ValueError, match=r"^no module to replace matches .*none can be replaced: ") as error:
        names(vit(), block_size=7)
    text = str(error.value)
    assert "vit.layers.*.mlp.fc1: block_size (7, 7) does not divide its weight of shape (64, 32) (out, in)" in text
    assert text.count("does not divide") == 3  # shapes


def test_layers_of_which_some_fit_are_named_one_by_one():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, size)) for size in (8, 6, 8, 6)), nn.Linear(6, 8))
    with pytest.warns(UserWarning, match=r"^Left dense: 1\.0, 3\.0: block_size \(4, 4\) does not divide"):
        assert names(model, block_size=4) == ["0.0", "2.0"]


def test_no_match_on_a_model_without_linears():
    with pytest.raises(ValueError, match=r"none: the model has no nn\.Linear or nn\.Conv2d below its root"):
        names(nn.Linear(16, 16))


# Blocks and ranks that do not fit


def test_a_named_layer_that_the_block_does_not_divide():
    message = "fc1: block_size (4, 5) does not divide its weight of shape (16, 16) (out, in)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        names(Mlp(), target_modules=["fc1", "fc2"], block_size=(4, 5))


@pytest.mark.parametrize("target_modules", [None, "all-linear"])
def test_default_layers_that_the_block_does_not_divide_are_skipped_with_one_warning(target_modules):
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 20), nn.Linear(20, 16), nn.Linear(16, 4))
    with pytest.warns(UserWarning, match="^Left dense: ") as caught:
        assert names(model, target_modules=target_modules, block_size=(4, 8)) == ["0"]
    assert len(caught) == 1
    for name, shape in {"1": "(20, 12)", "2": "(16, 20)"}.items():
        assert f"{name}: block_size (4, 8) does not divide its weight of shape {shape}" in str(caught[0].message)


def test_nothing_left_after_skipping_is_an_error_with_the_reasons():
    with pytest.raises(ValueError, match=r"no module to replace.*fc1, fc2, fc3: block_size \(5, 5\) does not divide"):
        names(Mlp(), block_size=5)


def test_rank_above_the_block_of_one_layer():
    kwargs = {"block_size_pattern": {"fc1": (1, 1)}, "rank": 2}
    message = r"fc1: rank must be at most bo \* bi = 1, got 2$"
    with pytest.raises(ValueError, match=f"^{message}"):
        names(Mlp(), target_modules=["fc1"], **kwargs)
    with pytest.warns(UserWarning, match=f"^Left dense: {message}"):
        assert names(Mlp(), **kwargs) == ["fc2", "fc3"]


def test_layers_that_are_not_cheaper_are_listed_in_one_warning():
    # B first: 2r (in * bo + out * I) = 2 * 16 * 4 * 2r against 2 * 16 * 16
    with pytest.warns(UserWarning, match="need as many FLOPs as dense") as caught:
        names(Mlp(), block_size=4, rank=2, rank_pattern={"fc2": 1, "fc3": 3})
    assert len(caught) == 1
    assert str(caught[0].message).endswith("another block size: fc1 (1.00x), fc3 (1.50x)")


# Modules that cannot be replaced


class WithAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
        self.head = nn.Linear(16, 4)


@pytest.mark.parametrize("target_modules", [None, "all-linear"])
def test_modules_whose_weights_are_read_directly_are_skipped(target_modules):
    with pytest.warns(UserWarning, match="^Left dense: ") as caught:
        assert names(WithAttention(), target_modules=target_modules) == ["embed"]
    for modules, kind in {
        "attention.out_proj, block.self_attn.out_proj": "MultiheadAttention",
        "block.linear1, block.linear2": "TransformerEncoderLayer",
    }.items():
        assert f"{modules}: {kind} reads its weight directly" in str(caught[0].message)


def test_an_attention_behind_the_head_is_not_taken_for_it():
    model = nn.ModuleDict(
        {"fc": nn.Linear(16, 16), "head": nn.Linear(16, 16), "attention": nn.MultiheadAttention(16, 2)}
    )
    with pytest.warns(UserWarning, match=r"^Left dense: attention\.out_proj: "):
        assert names(model) == ["fc"]


@pytest.mark.parametrize("name", ["attention.out_proj", "block.linear1", "linear2"])
def test_modules_whose_weights_are_read_directly_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name}: .* reads its weight directly, so it cannot be replaced"):
        names(WithAttention(), target_modules=[name])


def tied_parameter():
    model = Mlp()
    model.fc2.weight = model.fc1.weight
    return model


def tied_to_embedding():
    model = Mlp()
    model.embed = nn.Embedding(16, 16)
    model.fc1.weight = model.fc2.weight = model.embed.weight
    return model


def tied_to_a_parameter_of_the_module():
    model = Mlp()
    model.basis, model.other = model.fc1.weight, model.fc2.weight
    return model


def shared_module():
    model = Mlp()
    model.fc2 = model.fc1
    return model


@pytest.mark.parametrize("build", [tied_parameter, tied_to_embedding, tied_to_a_parameter_of_the_module, shared_module])
def test_tied_weights_are_skipped_by_default_and_refused_by_name(build):
    with pytest.warns(UserWarning, match="^Left dense: fc1: its weight is tied to "):
        assert names(build()) == ["fc3"]
    for name in ("fc1", "fc2"):
        with pytest.raises(ValueError, match=f"^{name}: its weight is tied to .*, so it cannot be replaced alone"):
            names(build(), target_modules=[name])


def test_a_tied_language_model_head_is_refused_by_name():
    model = hf.BertForMaskedLM(hf.BertConfig(**{**BERT_SIZES, "vocab_size": 64}))
    with pytest.raises(ValueError, match=r"decoder: its weight is tied to bert\.embeddings\.word_embeddings\.weight"):
        names(model, target_modules=["decoder"])


@pytest.mark.parametrize("target_modules", [["layernorm_before"], r".*mlp", ["embeddings"]], ids=str)
def test_only_linears_can_be_named(target_modules):
    with pytest.raises(ValueError, match=r"only nn\.Linear and nn\.Conv2d can become a Kronecker layer, this is a "):
        names(vit(), target_modules=target_modules)


def weight_norm(linear):
    return nn.utils.parametrizations.weight_norm(linear)


def pruned(linear):
    return prune.l1_unstructured(linear, "weight", amount=0.5)


def int8(linear):
    linear.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    return linear


def float8(linear):
    linear.weight = nn.Parameter(torch.zeros(16, 16).to(torch.float8_e4m3fn), requires_grad=False)
    return linear


@pytest.mark.parametrize("change", [weight_norm, pruned, int8, float8])
def test_weights_that_are_no_plain_float_parameter(change):
    model = Mlp()
    model.fc1 = change(model.fc1)
    with pytest.raises(ValueError, match=r"^fc1: .*(ParametrizedLinear|its weight must be a parameter of dtype)"):
        names(model, target_modules=["fc1"])
    with pytest.warns(UserWarning, match="^Left dense: fc1: "):
        assert names(model) == ["fc2", "fc3"]


def quantized_in_config():
    model = vit()
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return model


def quantized_by_flag():
    model = vit()
    model.is_quantized = True
    return model


@pytest.mark.parametrize("wrap", [lambda model: model, Composite], ids=["bare", "inside-a-module"])
@pytest.mark.parametrize("build", [quantized_in_config, quantized_by_flag])
def test_quantized_models_are_refused(build, wrap):
    with pytest.raises(ValueError, match=r"the model is quantized; .* load it without quantization_config"):
        names(wrap(build()))


@pytest.mark.parametrize("build", [vit, Mlp], ids=["transformers", "plain"])
def test_a_converted_model_is_refused(build):
    model = get_kron_model(build(), config())
    count = sum(isinstance(module, KronLinear) for module in model.modules())
    with pytest.raises(ValueError, match=rf"already has {count} Kronecker layers \(first: .*; convert a dense model"):
        names(model)


# Candidates to choose from


def choosing(**kwargs):
    return KronConfig(**{"candidate_block_sizes": [(4, 8), 4, (1, -1)], "candidate_ranks": [1], **kwargs})


def test_every_target_has_all_candidates_in_their_order():
    targets = find_targets(vit(), choosing(candidate_block_sizes=[(4, 8), 8, (1, -1)], candidate_ranks=[1, 2]))
    assert len(targets) == 12
    widths = {"fc2": 64}
    for target in targets:
        width = widths.get(target.name.rpartition(".")[2], 32)
        sizes = [((4, 8), 1), ((4, 8), 2), ((8, 8), 1), ((8, 8), 2), ((1, width), 1), ((1, width), 2)]
        assert target.candidates == tuple(sizes)
        assert (target.block_size, target.rank) == sizes[0]


def test_without_candidates_targets_have_none():
    assert {target.candidates for target in find_targets(vit(), config())} == {()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"candidate_block_sizes": [4, (4, 64)]},
            r"fc1: block_size \(4, 64\) does not divide its weight of .* \(64, 32\)",
        ),
        (
            {"candidate_block_sizes": [4, 128]},
            r"fc1: block_size \(128, 128\) does not divide its weight of .* \(64, 32\)",
        ),
        ({"candidate_block_sizes": [4, (1, -1)], "candidate_ranks": [40]}, "must be at most bo . bi = 16, got 40"),
        (
            {"candidate_block_sizes": [(8, 8), (1, -1)], "candidate_ranks": [40]},
            "fc1: rank must be at most .* = 32, got 40",
        ),
        ({"candidate_block_sizes": [(1, -1), (1, 32)]}, r"fc1: two candidates are blocks of \(1, 32\) at rank 1 here"),
    ],
    ids=["does not divide", "larger than the layer", "rank of any", "rank here", "equal here"],
)
def test_a_candidate_that_a_named_layer_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        find_targets(vit(), choosing(target_modules=["fc1"], **options))


def test_default_layers_that_some_candidate_does_not_fit_are_skipped_with_one_warning():
    with pytest.warns(UserWarning, match=r"^Left dense: .*fc1: block_size \(4, 64\) does not divide") as caught:
        targets = find_targets(vit(), choosing(candidate_block_sizes=[4, (4, 64)]))
    assert len(caught) == 1
    assert {target.name.rpartition(".")[2] for target in targets} == {"fc2"}


def test_no_layer_fits_all_candidates():
    with pytest.raises(
        ValueError, match=r"no module to replace matches the default .*block_size \(128, 128\) does not"
    ):
        find_targets(vit(), choosing(candidate_block_sizes=[4, 128]))


def test_candidates_that_are_not_cheaper_are_listed_in_one_warning():
    with pytest.warns(UserWarning, match="^These candidates need as many FLOPs as dense") as caught:
        find_targets(vit(), choosing(candidate_block_sizes=[(4, 8), 4], candidate_ranks=[1, 4], target_modules=["fc1"]))
    assert len(caught) == 1
    assert str(caught[0].message).endswith("another block size: 4x4_rank4 (1.25x, 2 of 2 modules)")


def test_a_model_in_the_middle_of_a_selection_is_refused():
    model = get_kron_model(vit(), choosing())
    with pytest.raises(
        ValueError, match=r"already has 12 Kronecker layers \(first: vit\.layers\.0\.attention\.[a-z]_proj\)"
    ):
        get_kron_model(model, config())
