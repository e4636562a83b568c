"""The way through a model: order, blocks, streams, readout, and passes that begin in the middle."""

import pytest
import tiny_calibration as tiny
import torch
from torch import nn
from transformers import ViTMAEConfig, ViTMAEModel

from kron_hf import KronConfig
from kron_hf.calibration.batches import Batches
from kron_hf.calibration.decoder import decoder_stages
from kron_hf.calibration.passes import hooked, run, skipped, swapped
from kron_hf.calibration.readout import reads_first_token_alone, token_count
from kron_hf.calibration.route import find_route
from kron_hf.calibration.sides import Beginning, Side, beginning
from kron_hf.calibration.streams import find_streams
from kron_hf.targets import find_targets

MODELS = {"ViT": tiny.vit, "DINOv2": tiny.dinov2, "BERT": tiny.bert, "Swin": tiny.swin}


def setting(name):
    model = MODELS[name]()
    batches = Batches(tiny.text_batches() if name == "BERT" else tiny.image_batches())
    targets = find_targets(model, KronConfig(block_size=(1, -1), rank=1), compare_cost=False)
    return model, batches, find_route(model, [target.name for target in targets], next(iter(batches)))


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_visited_in_order_and_those_with_one_input_together(name):
    model, batches, route = setting(name)
    assert route.in_turn
    assert [len(stage) for stage in route.blocks[0].stages] == [3, 1, 1, 1]
    assert beginning(model, route, next(iter(batches))).anywhere
    if name == "Swin":  # downsampling stands between the stages
        assert [block.name for block in route.blocks] == [
            *("swin.encoder.layers.0.blocks.0", "swin.encoder.layers.0.blocks.1", "swin.encoder.layers.1.blocks.0"),
        ]


@pytest.mark.parametrize("length", [1, 9])
def test_layers_that_read_the_decoders_tokens_are_found(length):
    model, batch = tiny.t5(), tiny.translations((9, 9), count=2)
    start = model.prepare_decoder_input_ids_from_labels(labels=batch.pop("labels"))[:, :length]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    batch |= {"decoder_input_ids": start, "decoder_attention_mask": torch.ones_like(start)}
    route = find_route(model, names, batch)
    expected = {stage[0] for block in route.blocks for stage in block.stages if block.name.startswith("decoder")}
    expected.remove("decoder.block.0.layer.1.EncDecAttention.k")  # with v, of the encoder's tokens
    assert decoder_stages(model, route, batch) == expected
    assert len(expected) == 6
    del batch["decoder_input_ids"]
    assert decoder_stages(model, route, batch) == set()


def test_a_layer_that_is_never_used_is_named():
    model = tiny.vit()
    model.vit.unused = nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"vit\.unused: the model does not use this layer.*exclude_modules"):
        find_route(model, ["vit.layers.0.mlp.fc1", "vit.unused"], tiny.image_batches()[0])


@pytest.mark.parametrize(
    ("name", "writers"),
    [
        ("ViT", ["attention.o_proj", "mlp.fc2"]),
        ("DINOv2", ["attention.o_proj", "mlp.fc2"]),
        ("BERT", ["attention.output.dense", "output.dense"]),
        ("Swin", ["mlp.fc2"]),
    ],
)
def test_projections_that_write_the_residual_stream_are_found_with_their_scale(name, writers):
    model, batches, route = setting(name)
    streams = find_streams(model, route, next(iter(batches)))
    expected = [f"{block.name}.{writer}" for block in route.blocks for writer in writers]
    if name == "Swin":  # windows permute the tokens, but for one that is the whole image
        expected.insert(2, "swin.encoder.layers.1.blocks.0.attention.o_proj")
    assert list(streams) == expected
    for stream in streams.values():
        wanted = torch.ones_like(stream.scale)
        if name == "DINOv2":
            scales = model.get_submodule(".".join(stream.module.split(".")[:3]))
            wanted = (scales.layer_scale2 if stream.call is None else scales.layer_scale1).lambda1.double()
        torch.testing.assert_close(stream.scale, wanted, rtol=1e-4, atol=1e-5)


def streams_in(model, dtype):
    model, batch = model.to(dtype), {"pixel_values": tiny.pixels(4).to(dtype)}
    names = [target.name for target in find_targets(model, KronConfig(block_size=(1, -1), rank=1))]
    return find_streams(model, find_route(model, names, batch), batch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loud", [0.0, 300.0], ids=["", "large beside what is written to it"])
def test_the_same_streams_are_found_in_other_dtypes(dtype, loud):
    model = tiny.dinov2()
    with torch.no_grad():
        model.embeddings.position_embeddings[..., ::8] += loud  # a few features, as in large transformers
    wanted, found = streams_in(model, torch.float32), streams_in(model, dtype)
    assert len(wanted) == 4
    for name, stream in wanted.items():
        assert (found[name].module, found[name].call) == (stream.module, stream.call)
        torch.testing.assert_close(found[name].scale, stream.scale, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_scaled_output_without_a_residual_is_no_stream(dtype):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale, self.drop = nn.Linear(32, 32), nn.Parameter(torch.rand(32)), nn.Identity()

        def forward(self, x):
            return self.drop(self.layer(x) * self.scale)

    model, batch = nn.Sequential(Chain(), Chain()).to(dtype), {"": torch.randn(64, 8, 32).to(dtype)}
    assert not find_streams(model, find_route(model, ["0.layer", "1.layer"], batch), batch)


@pytest.mark.parametrize(("name", "expected"), [("ViT", True), ("DINOv2", False), ("BERT", True), ("Swin", False)])
def test_what_the_head_reads_is_found(name, expected):
    model, batches, route = setting(name)
    batch = next(iter(batches))
    assert reads_first_token_alone(model, route, batch) is expected
    assert token_count(model, route, batch) == {"ViT": 17, "DINOv2": 17, "BERT": 12, "Swin": 16}[name]


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_that_begins_in_the_middle_gives_the_same_bits(name):
    model, batches, route = setting(name)
    wanted = [run(model, batch) for batch in batches]
    begin = beginning(model, route, next(iter(batches)))
    # Swin's embeddings give the size of the image, too, which is no tensor.
    assert [ahead.split(".")[-1] for ahead in begin.ahead] == ([] if name == "Swin" else ["embeddings"])
    side = Side(model, batches, {}, begin)
    for block in route.blocks:
        side.finish(block.name)
        calls = []
        first = model.get_submodule(route.blocks[0].stages[0][0])
        inside = [first, *(child for name in begin.ahead for child in model.get_submodule(name).children())]
        for index, batch in enumerate(batches):
            with side.at(index), hooked(before=dict.fromkeys(inside, calls.append)):
                output = run(model, batch)
            assert torch.equal(output[0], wanted[index][0])
        assert not calls
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_embeddings_that_later_blocks_read_are_computed_in_every_pass():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.turn = nn.Linear(4, 4), nn.Linear(4, 4)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

        def forward(self, x):
            y, turn = self.embed(x), self.turn(x)
            for block in self.blocks:
                y = block(y * turn)
            return y

    torch.manual_seed(0)
    model, batch = Rotary(), {"": torch.randn(5, 4)}
    route = find_route(model, [f"blocks.{number}.0" for number in range(3)], batch)
    assert beginning(model, route, batch) == Beginning(anywhere=True)


def test_passes_begin_with_the_inputs_where_a_later_part_reads_an_earlier_block():
    class Unet(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

        def forward(self, x):
            first = self.blocks[0](x)
            return self.blocks[2](self.blocks[1](first) + first)

    torch.manual_seed(0)
    model, batch = Unet(), {"": torch.randn(5, 4)}
    route = find_route(model, [f"blocks.{i}.0" for i in range(3)], batch)
    assert route.in_turn
    assert not beginning(model, route, batch).anywhere


class Decoding(nn.Module):
    """An encoder of one layer, and a decoder whose layers all read what the encoder gave, in their second linear."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh())])
        self.decoder = nn.ModuleList(nn.ModuleDict({"own": nn.Linear(4, 4), "other": nn.Linear(4, 4)}) for _ in "12")

    def forward(self, x):
        memory, y = self.encoder[0](x), x
        for layer in self.decoder:
            y = self.layer(layer, y, memory)
        return y

    def layer(self, layer, y, memory):
        return torch.tanh(layer["own"](y) + layer["other"](memory))


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, y, memory):
        return torch.tanh(self.own(y) + self.other(memory))


class CallingDecoding(Decoding):
    def __init__(self):
        super().__init__()
        self.decoder = nn.ModuleList(Called() for _ in "12")

    def layer(self, layer, y, memory):
        return layer(y, memory)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(CallingDecoding, id="its second linear reads the encoder"),
        pytest.param(Decoding, id="blocks that are not called themselves"),
    ],
)
def test_passes_begin_with_the_inputs_where_a_decoder_reads_the_encoder(build):
    torch.manual_seed(0)
    model, batch = build(), {"": torch.randn(5, 4)}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    route = find_route(model, names, batch)
    assert route.in_turn
    assert not beginning(model, route, batch).anywhere


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)

    def forward(self, x):
        hidden = torch.tanh(self.layer(x) + self.other(x))
        return self.layer(hidden)


def test_a_layer_that_is_called_twice_is_not_in_turn_and_stands_alone():
    route = find_route(Twice(), ["layer", "other"], {"": torch.randn(5, 4)})
    assert not route.in_turn
    assert route.repeated == {"layer"}
    assert [stage for block in route.blocks for stage in block.stages] == [("layer",), ("other",)]


def test_outputs_beyond_the_memory_are_given_up_and_passes_begin_with_the_inputs(monkeypatch):
    model, batches, route = setting("ViT")
    wanted = run(model, next(iter(batches))).logits
    side = Side(model, batches, {}, Beginning(anywhere=True))
    side.finish(route.blocks[0].name)
    monkeypatch.setattr("kron_hf.calibration.sides.MEMORY", 30_000)
    with pytest.warns(UserWarning, match="every pass begins with the inputs"):
        side.finish(route.blocks[1].name)
    with side.at(0):
        assert torch.equal(run(model, next(iter(batches))).logits, wanted)


def test_modules_are_put_back_after_an_error():
    model = tiny.vit()
    before = dict(model.named_modules())
    name = "vit.layers.0.mlp.fc1"

    def fail(output):
        assert model.get_submodule(name) is not before[name]
        raise RuntimeError("stop")

    with (
        pytest.raises(RuntimeError, match="stop"),
        swapped(model, {name: nn.Linear(32, 64)}),
        skipped(model, {"vit.layers.0": torch.zeros(2, 17, 32)}),
        hooked(after={model.vit: fail}),
    ):
        run(model, {"pixel_values": tiny.pixels(2)})
    assert dict(model.named_modules()) == before
    assert "forward" not in model.get_submodule("vit.layers.0").__dict__
    assert not model.vit._forward_hooks


def test_a_residual_that_is_added_in_place_is_found():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            y = self.layer(torch.tanh(x))
            y += x
            return y

    torch.manual_seed(0)
    model, batch = nn.Sequential(Block(), Block()), {"": torch.randn(4, 3, 8)}
    route = find_route(model, ["0.layer", "1.layer"], batch)
    assert list(find_streams(model, route, batch)) == ["0.layer", "1.layer"]


def test_a_head_of_zeros_reads_no_token():
    model, batches, route = setting("ViT")
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert not reads_first_token_alone(model, route, next(iter(batches)))


@pytest.mark.parametrize(("name", "expected"), [("ViT", True), ("DINOv2", False)])
def test_the_readout_behind_a_block_that_returns_a_mapping(name, expected):
    model, batches, route = setting(name)
    last = model.get_submodule(route.blocks[-1].name)
    forward = last.forward

    class Wrapped(nn.Module):
        def forward(self, *args, **kwargs):
            return {"hidden": forward(*args, **kwargs)}

    class Unwrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Wrapped()

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)["hidden"]

    inner = type(route)((type(route.blocks[-1])(f"{route.blocks[-1].name}.inner", ()),), in_turn=True)
    with swapped(model, {route.blocks[-1].name: Unwrapped()}):
        assert reads_first_token_alone(model, inner, next(iter(batches))) is expected


def test_a_model_that_draws_masks_draws_the_same_in_every_pass():
    config = ViTMAEConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config.image_size, config.patch_size, config.num_channels = 16, 4, 1
    model, batch = ViTMAEModel(config).eval(), {"pixel_values": tiny.pixels(2)}
    state = torch.get_rng_state()
    first, second = run(model, batch), run(model, batch)
    assert torch.equal(first.ids_restore, second.ids_restore)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model(**batch).ids_restore, model(**batch).ids_restore)


@pytest.mark.slow
def test_a_compiled_model_runs_as_it_was_written():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = Twice()
    model.compile(backend=backend)
    run(model, {"": torch.randn(2, 4)})
    assert not compiled
    model(torch.randn(2, 4))
    assert compiled
