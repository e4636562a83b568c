import copy
import json
import math

import pytest
import torch
from accelerate import Accelerator
from tiny_selection import TWO, TwoLayers, fit, groups_of, planted
from tiny_training import batch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR

from kron_hf.layers import KronLinear
from kron_hf.selection import BlockSizeSelector, KronCandidates, replace_by_chosen
from kron_hf.selection.validation import left_after

BLOCKS = [(4, 1), (8, 1), (16, 1)]
STEPS = 20  # validation drops after 6 and 10 steps


def loss_of(model):
    return float(model(**batch(99, 32))["loss"])


def attached(model, optimizer, scheduler=None, total_steps=STEPS, **options):
    options = {"restart": True, **options}
    selector = BlockSizeSelector(model, total_steps=total_steps, evaluate=lambda: loss_of(model), **options)
    selector.attach(optimizer, scheduler)
    return selector


def adamw(model, **options):
    return torch.optim.AdamW(groups_of(model), **options)


def train(model, optimizer, steps, scheduler=None):
    for step in steps:
        optimizer.zero_grad()
        model(**batch(step))["loss"].backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same(value, expected):
    torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mode", "block"),
    # Of blocks of 16 a teacher of 32 has four only: too few for the penalty.
    [("validation", 4), ("validation", 8), ("validation", 16), ("penalty", 4), ("penalty", 8)],
)
def test_finds_the_planted_block_size(block, mode):
    torch.manual_seed(block)
    model = KronCandidates(32, 32, BLOCKS, bias=False)
    selector = fit(model, *planted(block, seed=block, noise=0.3), steps=300, mode=mode)
    assert selector.done
    assert model.alive == [f"{block}x{block}_rank1"]


class Stack(nn.Module):
    """Two layers side by side, each with its own planted weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = (KronCandidates(32, 32, [(4, 1), (16, 1)], bias=False) for _ in range(2))

    def forward(self, x):
        return torch.cat([self.left(x[:, :32]), self.right(x[:, 32:])], 1)


@pytest.mark.parametrize("mode", ["validation", "penalty"])
def test_layer_scope_chooses_in_each_layer(mode):
    (x, y), (other_x, other_y) = planted(4, seed=1), planted(16, seed=2)
    model = Stack()
    inputs, targets = torch.cat([x, other_x], 1), torch.cat([y, other_y], 1)
    selector = fit(model, inputs, targets, steps=300, mode=mode, scope="layer")
    assert (model.left.alive, model.right.alive) == (["4x4_rank1"], ["16x16_rank1"])
    assert {event["layer"] for event in selector.result.events} == {"left", "right"}
    assert {name: entry["block_size"] for name, entry in selector.result.modules.items()} == {
        "left": [4, 4],
        "right": [16, 16],
    }


def losses_by_candidate(model, losses):
    """An evaluation that gives a loss for each candidate that is left out."""
    calls = []

    def evaluate():
        assert not torch.is_grad_enabled()
        assert not model.training
        (muted,) = model.fc1._muted
        assert model.fc2._muted == {muted}
        calls.append(muted)
        return losses[muted]

    return evaluate, calls


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        pytest.param({}, "2x2_rank1", id="loss alone"),
        pytest.param({"cost": "params", "cost_weight": 0.1}, "2x2_rank1", id="low cost"),
        pytest.param({"cost": "params", "cost_weight": 10.0}, "8x8_rank1", id="high cost of parameters"),
        pytest.param({"cost": "flops", "cost_weight": 10.0}, "8x8_rank1", id="high cost of FLOPs"),
    ],
)
def test_drops_what_is_missed_least_counting_cost(options, chosen):
    model = TwoLayers()
    losses = {"2x2_rank1": 0.9, "4x4_rank1": 0.5, "8x8_rank1": 0.6}
    evaluate, calls = losses_by_candidate(model, losses)
    selector = BlockSizeSelector(model, total_steps=STEPS, evaluate=evaluate, **options)
    model.norm.eval()
    for _ in range(STEPS):
        selector.step()
    assert model.fc1.alive == model.fc2.alive == [chosen]
    assert [event["step"] for event in selector.result.events] == [6, 10]
    assert calls[:3] == list(losses)
    assert len(calls) == 5
    assert selector.result.events[0]["losses_without"] == losses
    assert model.training
    assert not model.norm.training, "every module gets its own mode back"


def test_the_cost_is_a_share_of_all_layers_that_are_chosen_in():
    selector = BlockSizeSelector(
        TwoLayers(), total_steps=STEPS, evaluate=float, scope="layer", cost="params", cost_weight=1.0
    )
    candidates = selector._set
    assert candidates.cost(0, 0, of_all=False) == (8 * 16 * 2 + 4) / 512
    assert candidates.cost(0, 0, of_all=True) == (8 * 16 * 2 + 4) / 1024


def test_latency_is_measured_once_and_kept_in_the_state():
    model = TwoLayers()
    options = {"total_steps": STEPS, "evaluate": float, "cost": "latency", "cost_weight": 0.1}
    selector = BlockSizeSelector(model, **options)
    costs = selector.state_dict()["costs"]
    assert all(seconds > 0 for layer in costs["candidates"] for seconds in layer.values())
    assert all(seconds > 0 for seconds in costs["dense"])
    other = BlockSizeSelector(TwoLayers(), **options)
    other.load_state_dict(json.loads(json.dumps(selector.state_dict())))
    assert other.state_dict()["costs"] == costs


def test_no_random_number_of_the_training_is_spent():
    model, state = TwoLayers(), torch.get_rng_state()
    options = {"cost": "latency", "cost_weight": 0.1, "restart": True}
    selector = BlockSizeSelector(model, total_steps=STEPS, evaluate=lambda: 1.0, **options)
    for _ in range(STEPS):
        selector.step()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_is_not_finite_is_never_the_smallest():
    model = TwoLayers()
    losses = {"2x2_rank1": math.nan, "4x4_rank1": 0.5, "8x8_rank1": math.inf}
    selector = BlockSizeSelector(model, total_steps=STEPS, evaluate=losses_by_candidate(model, losses)[0])
    for _ in range(6):
        selector.step()
    assert model.fc1.alive == ["2x2_rank1", "8x8_rank1"]
    for _ in range(3):
        selector.step()
    with pytest.raises(ValueError, match="held-out loss is not finite, whichever candidate is left out"):
        selector.step()
    assert model.training


@pytest.mark.parametrize("drops", [1, 2, 5])
def test_drops_lie_at_equal_distances_and_the_last_at_the_end(drops):
    left = [left_after(step, 10, 50, drops) for step in range(51)]
    assert left[:11] == [drops + 1] * 11
    assert left[50] == 1
    assert left[49] == 2
    changes = [step for step in range(1, 51) if left[step] < left[step - 1]]
    assert changes == [10 + 40 // drops * number for number in range(1, drops + 1)]


@pytest.mark.filterwarnings("ignore:the penalty had left:UserWarning")
@pytest.mark.parametrize("mode", ["validation", "penalty"])
def test_dropped_candidates_leave_memory_and_optimizer_at_once(mode):
    model = TwoLayers()
    optimizer = adamw(model)
    selector = attached(model, optimizer, total_steps=100, mode=mode)
    before = dict(model.named_parameters())
    for step in range(100):
        train(model, optimizer, [step])
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in before.items():
            key = name.split(".")[2] if ".candidates." in name else None
            gone = key is not None and key not in model.fc1.alive
            assert (parameter.untyped_storage().nbytes() == 0) == gone, name
            assert (id(parameter) in held) != gone, name
            assert (parameter in optimizer.state) != gone or selector.done, name
    assert selector.done
    assert selector.drop_count == 2


def test_the_winner_is_drawn_anew_and_the_schedule_runs_again():
    model = TwoLayers()
    optimizer = adamw(model)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, step / 4) * (1 - step / STEPS))
    selector = attached(model, optimizer, scheduler)
    variance = [layer.dense_weight().square().mean().item() for layer in (model.fc1, model.fc2)]
    train(model, optimizer, range(9), scheduler)
    winner = model.fc1.layer(model.fc1.alive[0])
    head = copy.deepcopy(optimizer.state[model.head.weight])
    train(model, optimizer, [9], scheduler)
    assert selector.done
    winner = model.fc1.layer(model.fc1.alive[0])
    assert torch.all(winner.s == 1)
    assert not optimizer.state.get(winner.a), "the optimizer knows nothing of it any more"
    assert optimizer.state[model.head.weight]["step"] == head["step"] + 1, "the head goes on"
    std = (selector.state_dict()["variances"][0]) ** 0.25
    assert selector.state_dict()["variances"][0] == pytest.approx(variance[0], rel=0.5)
    assert winner.a.std().item() == pytest.approx(std, rel=0.5)
    rates = []
    for step in range(10, STEPS):
        rates.append(scheduler.get_last_lr()[0] / 0.01)
        train(model, optimizer, [step], scheduler)
    # The ten steps that are left pass through all of the schedule's twenty.
    assert rates == pytest.approx([min(1.0, 2 * n / 4) * (1 - 2 * n / STEPS) for n in range(10)])
    other = TwoLayers()
    other_optimizer = adamw(other)
    attached(other, other_optimizer, seed=1)
    train(other, other_optimizer, range(10))
    assert not torch.equal(other.fc1.layer(other.fc1.alive[0]).a, winner.a)


def test_without_restart_the_winner_goes_on():
    model = TwoLayers()
    optimizer = adamw(model)
    scheduler = StepLR(optimizer, 1)
    attached(model, optimizer, scheduler, restart=False)
    train(model, optimizer, range(10), scheduler)
    winner = model.fc1.layer(model.fc1.alive[0])
    assert not torch.all(winner.s == 1)
    assert optimizer.state[winner.s]["step"] == 10


def test_restart_refuses_a_schedule_that_cannot_be_run_again():
    model = TwoLayers()
    optimizer = adamw(model)
    with pytest.raises(TypeError, match=r"needs a LambdaLR .* got StepLR; pass restart=False"):
        attached(model, optimizer, StepLR(optimizer, 1))


@pytest.mark.filterwarnings("ignore:the penalty had left:UserWarning")
@pytest.mark.parametrize("mode", ["validation", "penalty"])
@pytest.mark.parametrize("at", [4, 6, 8, 10, 14])
def test_resume_is_bit_equal(at, mode):
    model = TwoLayers()
    optimizer = adamw(model)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    selector = attached(model, optimizer, scheduler, mode=mode)
    train(model, optimizer, range(at), scheduler)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    text = json.dumps(selector.state_dict(), sort_keys=True)
    train(model, optimizer, range(at, STEPS), scheduler)

    resumed = TwoLayers(seed=1)
    resumed.load_state_dict(saved[0])
    optimizer = adamw(resumed)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    options = {"evaluate": lambda: loss_of(resumed), "mode": mode, "restart": True}
    again = BlockSizeSelector(resumed, total_steps=STEPS, **options)
    again.load_state_dict(json.loads(text))
    again.attach(optimizer, scheduler)
    optimizer.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    train(resumed, optimizer, range(at, STEPS), scheduler)
    assert_same(resumed.state_dict(), model.state_dict())
    assert again.state_dict() == selector.state_dict()
    assert again.result.to_dict() == selector.result.to_dict()


def test_accelerate_checkpoint_resumes_bit_equal(tmp_path):
    def prepared(seed):
        accelerator = Accelerator(cpu=True)
        model = TwoLayers(seed)
        model, optimizer = accelerator.prepare(model, adamw(model))
        selector = attached(model, optimizer)
        accelerator.register_for_checkpointing(selector)
        return accelerator, model, optimizer, selector

    accelerator, model, optimizer, _ = prepared(0)
    train(model, optimizer, range(8))
    accelerator.save_state(tmp_path, safe_serialization=False)
    train(model, optimizer, range(8, STEPS))
    accelerator, resumed, optimizer, selector = prepared(1)
    accelerator.load_state(tmp_path)
    train(resumed, optimizer, range(8, STEPS))
    assert selector.done
    assert_same(resumed.state_dict(), model.state_dict())


def test_chosen_layers_take_the_place_of_the_candidates():
    model = TwoLayers()
    optimizer = adamw(model)
    attached(model, optimizer)
    train(model, optimizer, range(10))
    parameters = dict(model.fc1.layer(model.fc1.alive[0]).named_parameters())
    expected = model(**batch(0))["logits"]
    layers = replace_by_chosen(model)
    assert list(layers) == ["fc1", "fc2"]
    assert type(model.fc1) is KronLinear
    assert all(dict(model.fc1.named_parameters())[name] is value for name, value in parameters.items())
    torch.testing.assert_close(model(**batch(0))["logits"], expected)
    train(model, optimizer, range(10, 12))
    with pytest.raises(ValueError, match="TwoLayers has no KronCandidates layers"):
        BlockSizeSelector(model, total_steps=STEPS, evaluate=float)


def test_layers_with_several_candidates_left_are_not_replaced():
    model = TwoLayers()
    with pytest.raises(ValueError, match="3 candidates are left"):
        replace_by_chosen(model)
    assert isinstance(model.fc1, KronCandidates)


def test_momentum_and_other_optimizers():
    for optimizer_class in (torch.optim.SGD, torch.optim.RMSprop):
        model = TwoLayers()
        optimizer = optimizer_class(groups_of(model), momentum=0.9)
        selector = attached(model, optimizer)
        train(model, optimizer, range(STEPS))
        assert selector.done
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_a_step_skipped_for_overflow_does_not_count():
    model = TwoLayers()
    optimizer = torch.optim.AdamW(groups_of(model), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    selector = attached(model, optimizer)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model(**batch(step))["loss"]).backward()
        if step == 1:
            model.head.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert selector.step_count == 2


def test_attach_and_step_exclude_each_other():
    model = TwoLayers()
    optimizer = adamw(model)
    selector = attached(model, optimizer)
    with pytest.raises(RuntimeError, match="never both"):
        selector.attach(optimizer)
    with pytest.raises(RuntimeError, match="must not be called by hand"):
        selector.step()
    selector.detach()
    selector.step(optimizer)
    with pytest.raises(RuntimeError, match="never both"):
        selector.attach(optimizer)


def test_closing_early_warns():
    model = TwoLayers()
    optimizer = adamw(model)
    selector = attached(model, optimizer)
    train(model, optimizer, range(7))
    with pytest.warns(UserWarning, match="ended after 7 optimizer steps, before .* step 10: 2 candidates are left"):
        selector.close()
    train(model, optimizer, range(7, 12))
    assert len(model.fc1.alive) == 2, "closed: nothing happens any more"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode must be one of .*, got 'both'"),
        ({"scope": "model"}, "scope must be one of .*, got 'model'"),
        ({"cost": "watts", "cost_weight": 1.0}, "cost must be one of .*, got 'watts'"),
        ({"cost": "params"}, r"cost and a cost_weight above 0 go together, got cost='params' and cost_weight=0\.0"),
        ({"cost_weight": 1.0}, r"go together, got cost=None and cost_weight=1\.0"),
        ({"cost": "params", "cost_weight": -1.0}, r"cost_weight must be a finite number .*, got -1\.0"),
        ({"cost": "params", "cost_weight": math.nan}, "cost_weight must be a finite number .*, got nan"),
        ({"start": 0.5, "end": 0.5}, r"start must be before end, got start=0\.5, end=0\.5"),
        ({"end": 1.5}, r"end must be a share of the training steps in \[0, 1\], got 1\.5"),
        ({"penalty_weights": "l2"}, "penalty_weights must be one of .*, got 'l2'"),
        ({"penalty_weights": "size"}, "penalty_weights='size' needs mode='penalty'"),
        ({"restart": 1}, "restart must be a bool or None, got 1"),
        ({"seed": -1}, r"seed must be an int in \[0, 2\*\*32\), got -1"),
        ({"total_steps": 0}, "total_steps must be a positive int, got 0"),
        ({"evaluate": None}, "mode='validation' needs evaluate="),
        (
            {"total_steps": 4},
            r"2 candidates have to be dropped, one a step, and with total_steps=4 there are 2 steps from step 0 .* to "
            r"step 2|2 candidates have to be dropped",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_raise(options, message):
    if options.get("total_steps") == 4:
        options = {**options, "start": 0.3}  # steps 1 to 2
    with pytest.raises(ValueError, match=message):
        BlockSizeSelector(TwoLayers(), **{"total_steps": STEPS, "evaluate": float, **options})


def test_a_budget_that_is_just_long_enough():
    model = TwoLayers()
    selector = BlockSizeSelector(model, total_steps=4, start=0.0, evaluate=lambda: 1.0)
    for _ in range(2):
        selector.step()
    assert selector.done


def test_a_global_choice_needs_the_same_candidates_everywhere():
    model = TwoLayers()
    model.fc1.drop("2x2_rank1")
    with pytest.raises(ValueError, match=r"different numbers of them left: \[2, 3\]; pass scope='layer'"):
        BlockSizeSelector(model, total_steps=STEPS, evaluate=float)
    selector = BlockSizeSelector(model, total_steps=STEPS, evaluate=lambda: 1.0, scope="layer")
    for _ in range(6):
        selector.step()
    assert [len(layer.alive) for layer in (model.fc1, model.fc2)] == [2, 2], "the one with fewer waits"


def test_candidates_named_by_whole_dimensions():
    """-1 makes another block size of each layer: one choice all the same."""
    model = TwoLayers(candidates=[((1, -1), 2), ((4, 4), 1)])
    selector = BlockSizeSelector(model, total_steps=STEPS, evaluate=lambda: 1.0, restart=False)
    for _ in range(10):
        selector.step()
    (event,) = selector.result.events
    assert event["dropped"] == "1x16_rank2 / 1x32_rank2"
    assert "1x16_rank2 / 1x32_rank2" in str(selector.result)
    assert model.fc1.alive == model.fc2.alive == ["4x4_rank1"]


def damaged(name, value):
    state = BlockSizeSelector(TwoLayers(), total_steps=STEPS, evaluate=float).state_dict()
    return {**state, name: value}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "malformed: options is None"),
        (damaged("step_count", -1), "malformed: step_count is -1"),
        (damaged("alive", [["2x2_rank1"]]), "lists are of different numbers of layers"),
        (damaged("alive", [["2x2_rank1"], ["9x9_rank1"]]), r"has candidates \['9x9_rank1'\] left in 'fc2'"),
        (damaged("alive", [[], ["2x2_rank1"]]), r"has candidates \[\] left in 'fc1'"),
        (damaged("sizes", [[[2, 2]], [[2, 2]]]), "malformed: sizes"),
        (damaged("method", {"references": "x"}), "malformed: method"),
        (damaged("events", [{"step": 1}]), "malformed: events"),
        (damaged("record", {"steps": [1], "norms": []}), "malformed: record"),
        (damaged("costs", {"dense": [1]}), "malformed: costs"),
        (damaged("variances", ["x", 1]), "malformed: variances"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_damaged_states_raise(state, message):
    selector = BlockSizeSelector(TwoLayers(), total_steps=STEPS, evaluate=float)
    with pytest.raises(ValueError, match=message):
        selector.load_state_dict(state)


def test_table_dict_and_picture(tmp_path):
    model = TwoLayers()
    losses = {"2x2_rank1": 0.75, "4x4_rank1": 0.5, "8x8_rank1": 0.625}
    selector = BlockSizeSelector(model, total_steps=STEPS, evaluate=losses_by_candidate(model, losses)[0])
    with pytest.raises(ValueError, match="has not begun"):
        selector.result.plot(tmp_path / "none.png")
    for _ in range(6):
        selector.step()
    with pytest.raises(ValueError, match="not finished: 2 candidates are left"):
        _ = selector.result.modules
    assert selector.result.to_dict()["modules"] is None
    for _ in range(6, STEPS):
        selector.step()
    result = selector.result
    assert [line.split() for line in str(result).splitlines()[1:]] == [
        ["2x2_rank1", "0.5078", f"{(16 * 2 + 32 * 8) / 512:.4f}", "2", "kept"],
        ["4x4_rank1", "0.1562", "0.3750", "0", "6", "0.5000"],
        ["8x8_rank1", "0.1562", "0.3750", "0", "10", "0.6250"],
    ]
    saved = json.loads(json.dumps(result.to_dict()))
    assert saved["modules"]["fc1"] == {"block_size": [2, 2], "rank": 1}
    assert result.steps == [*range(1, 11), 10]
    assert [norm is None for norm in result.norms["4x4_rank1"]] == [False] * 6 + [True] * 5
    assert result.norms["2x2_rank1"][0] > 0
    for ending in ("png", "svg"):
        result.plot(tmp_path / f"norms.{ending}")
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "norms.svg").read_text()
    assert all(f"<!-- {key.replace('_', ', ')} -->" in drawn for key in losses)


def test_the_names_of_wrappers_are_left_out():
    model = torch.compile(TwoLayers(), backend="eager")
    assert BlockSizeSelector(model, total_steps=STEPS, evaluate=float).state_dict()["names"] == ["fc1", "fc2"]


def test_keys_of_two():
    assert TwoLayers().fc1.keys == [f"{size[0]}x{size[1]}_rank{rank}" for size, rank in TWO]
