import copy
import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from tiny_training import TinyKron, assert_same_weights, assert_target, batch, masks, train
from torch import nn

from kron_hf.layers import KronLinear
from kron_hf.selection import KronCandidates
from kron_hf.sparsity import Sparsifier
from kron_hf.sparsity.pruning import kron_layers

STEPS = 40  # ramp from step 2 to 20, pruned at 10 and frozen at 20


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01, **options)


def attached(model, optimizer, total_steps=STEPS, **options):
    sparsifier = Sparsifier(model, **{"target_sparsity": 0.5, "total_steps": total_steps, **options})
    sparsifier.attach(optimizer)
    return sparsifier


@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("make_optimizer", [sgd, adamw], ids=["sgd", "adamw"])
def test_ends_within_one_block_of_the_target(target, scope, make_optimizer):
    model = TinyKron()
    optimizer = make_optimizer(model)
    sparsifier = attached(model, optimizer, target_sparsity=target, scope=scope)
    train(model, optimizer, range(STEPS))
    sparsifier.close()
    assert sparsifier.frozen
    assert_target(model, target)
    assert sparsifier.sparsity == pytest.approx(target, abs=32 / 1024)


def test_layer_scope_takes_the_same_share_from_each_layer():
    model = TinyKron()
    with torch.no_grad():
        model.fc1.b.mul_(0.1)  # under global scope it would lose nearly all
    optimizer = sgd(model)
    attached(model, optimizer, scope="layer")
    train(model, optimizer, range(STEPS))
    assert [layer.sparsity for layer in kron_layers(model)] == [0.5, 0.5]


def test_ramps_by_interval_then_holds_one_mask():
    model = TinyKron()
    optimizer = adamw(model)
    sparsifier = attached(model, optimizer, target_sparsity=0.8, start=0.0, end=0.75)
    seen, frozen_masks = [], []

    def watch():
        seen.append(sparsifier.sparsity)
        if sparsifier.frozen:
            frozen_masks.append(masks(model))

    train(model, optimizer, range(STEPS), after_step=watch)
    assert seen[8] == 0.0
    assert 0.4 < seen[9] < seen[19] < seen[29]  # after steps 10, 20, 30
    assert seen[10] < seen[9], "blocks may grow back between two prunings"
    assert len(frozen_masks) == 11
    assert all(torch.equal(a, b) for later in frozen_masks for a, b in zip(frozen_masks[0], later, strict=True))


def test_adam_momentum_revives_zeros_that_no_mask_holds():
    model = TinyKron()
    optimizer = adamw(model)
    train(model, optimizer, range(3))
    with torch.no_grad():
        model.fc1.s[:, ::2] = 0.0
        model.fc2.s[:, ::2] = 0.0
    model.fc2.freeze_mask()
    train(model, optimizer, range(3, 4))
    assert model.fc1.sparsity == 0.0
    assert model.fc2.sparsity == 0.5


def test_saved_zeros_are_exact_and_stay_zero_in_later_training():
    model = TinyKron()
    optimizer = adamw(model)
    attached(model, optimizer, target_sparsity=0.7)
    train(model, optimizer, range(STEPS))
    saved = copy.deepcopy(model.state_dict())
    assert_target(model, 0.7)
    assert [int((saved[f"{name}.s"] == 0).sum()) for name in ("fc1", "fc2")] == [int((~m).sum()) for m in masks(model)]
    loaded = TinyKron(seed=1)
    loaded.load_state_dict(saved)
    train(loaded, adamw(loaded), range(20))
    assert all(torch.equal(a, b) for a, b in zip(masks(loaded), masks(model), strict=True))
    after = loaded.state_dict()
    assert all(torch.equal(after[f"{name}.s"] == 0, saved[f"{name}.s"] == 0) for name in ("fc1", "fc2"))
    assert not torch.equal(after["fc1.s"], saved["fc1.s"])


def test_optimizer_state_of_dead_entries_is_cleared():
    model = TinyKron()
    optimizer = adamw(model)
    attached(model, optimizer)
    train(model, optimizer, range(20))
    for layer in kron_layers(model):
        dead = layer.dead_blocks
        for parameter in (layer.s, layer.a):
            for key in ("exp_avg", "exp_avg_sq"):
                value = optimizer.state[parameter][key]
                assert torch.all(value[..., dead] == 0), key
                assert torch.any(value[..., ~dead] != 0), key


@pytest.mark.parametrize("accumulate", [2, 4])
def test_counts_optimizer_steps_not_batches(accumulate):
    model, other = TinyKron().double(), TinyKron().double()
    for each, parts in ((model, 1), (other, accumulate)):
        optimizer = sgd(each)
        sparsifier = attached(each, optimizer)
        train(each, optimizer, range(STEPS), accumulate=parts)
        assert sparsifier.step_count == STEPS
    assert all(torch.equal(a, b) for a, b in zip(masks(model), masks(other), strict=True))
    assert_target(other, 0.5)


@pytest.mark.parametrize("wrapped", [False, True], ids=["raw", "accelerate"])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_step_skipped_for_overflow_neither_counts_nor_prunes(fused, wrapped):
    model = TinyKron()
    optimizer = adamw(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    sparsifier = Sparsifier(model, target_sparsity=0.5, total_steps=4, start=0.0, end=0.5, interval=2)
    if wrapped:
        Accelerator(cpu=True)
        step = AcceleratedOptimizer(optimizer, scaler=scaler)
        sparsifier.attach(step)
    else:
        sparsifier.attach(optimizer)

    def scaled_step(number, overflow):
        optimizer.zero_grad()
        scaler.scale(model(**batch(number))["loss"]).backward()
        if overflow:
            model.fc1.s.grad[0, 0] = torch.inf
        if wrapped:
            step.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    scaled_step(0, overflow=False)
    before = copy.deepcopy(model)
    for number in range(1, 4):
        scaled_step(number, overflow=True)
    assert_same_weights(model, before)
    assert sparsifier.step_count == 1
    assert not sparsifier.frozen
    scaled_step(4, overflow=False)
    assert sparsifier.step_count == 2
    assert_target(model, 0.5)


def test_raw_accelerate_loop():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = TinyKron()
    loader = torch.utils.data.DataLoader([batch(i) for i in range(2 * STEPS)], batch_size=None)
    model, optimizer, loader = accelerator.prepare(model, adamw(model), loader)
    sparsifier = attached(model, optimizer)
    for inputs in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**inputs)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    sparsifier.close()
    assert sparsifier.step_count == STEPS
    assert_target(accelerator.unwrap_model(model), 0.5)


def test_accelerate_checkpoint_resumes_bit_equal(tmp_path):
    def prepared(seed):
        accelerator = Accelerator(cpu=True)
        model = TinyKron(seed)
        model, optimizer = accelerator.prepare(model, adamw(model))
        sparsifier = attached(model, optimizer)
        accelerator.register_for_checkpointing(sparsifier)
        return accelerator, model, optimizer, sparsifier

    accelerator, model, optimizer, _ = prepared(0)
    train(model, optimizer, range(10))
    accelerator.save_state(tmp_path, safe_serialization=False)
    train(model, optimizer, range(10, STEPS))
    accelerator, resumed, optimizer, sparsifier = prepared(1)
    accelerator.load_state(tmp_path)
    train(resumed, optimizer, range(10, STEPS))
    assert sparsifier.frozen
    assert_same_weights(resumed, model)


def pruned_model(seed=0):
    """An eighth of all entries dead and frozen, unevenly: half of fc2's first row."""
    model = TinyKron(seed)
    with torch.no_grad():
        model.fc2.s[0, :4] = 0.0
    model.fc2.freeze_mask()
    return model


@pytest.mark.parametrize("initially_pruned", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize("at", [10, 15, 35], ids=["at a pruning", "between prunings", "after the freeze"])
def test_resume_is_bit_equal(at, initially_pruned):  # pruned after 10 and 20 steps, frozen after 30
    model = pruned_model() if initially_pruned else TinyKron()
    optimizer = adamw(model)
    sparsifier = attached(model, optimizer, end=0.75)
    train(model, optimizer, range(at))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict())), json.dumps(sparsifier.state_dict())
    train(model, optimizer, range(at, STEPS))

    resumed = TinyKron(seed=1)
    optimizer = adamw(resumed)
    resumed.load_state_dict(saved[0][0])
    optimizer.load_state_dict(saved[0][1])
    sparsifier = attached(resumed, optimizer, end=0.75)
    sparsifier.load_state_dict(json.loads(saved[1]))
    assert sparsifier.step_count == at
    assert sparsifier.frozen == (at > 30)
    train(resumed, optimizer, range(at, STEPS))
    assert_same_weights(resumed, model)
    assert_target(resumed, 0.5)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_blocks_frozen_before_count_and_stay_dead(scope):
    model = pruned_model()
    optimizer = adamw(model)
    attached(model, optimizer, scope=scope)
    always_dead = ~model.fc2.block_mask
    revived = []
    train(model, optimizer, range(STEPS), after_step=lambda: revived.append(model.fc2.block_mask[always_dead].any()))
    assert not any(revived)
    assert_target(model, 0.5)


def test_a_model_already_sparser_is_left_alone_with_one_warning():
    model = pruned_model()
    optimizer = adamw(model)
    sparsifier = attached(model, optimizer, target_sparsity=0.1)
    before = masks(model)
    with pytest.warns(UserWarning, match=r"already have sparsity 0\.1250.*target_sparsity=0\.1") as caught:
        train(model, optimizer, range(STEPS))
    assert len(caught) == 1
    assert all(torch.equal(a, b) for a, b in zip(masks(model), before, strict=True))
    assert sparsifier.frozen


def test_works_through_torch_compile():
    model = TinyKron()
    compiled = torch.compile(model, backend="eager")
    optimizer = sgd(compiled)
    attached(compiled, optimizer)
    train(compiled, optimizer, range(STEPS))
    assert_target(model, 0.5)


def test_explicit_step_equals_attach():
    model, other = TinyKron(), TinyKron()
    optimizer, other_optimizer = adamw(model), adamw(other)
    attached(model, optimizer)
    train(model, optimizer, range(STEPS))
    sparsifier = Sparsifier(other, target_sparsity=0.5, total_steps=STEPS)
    train(other, other_optimizer, range(STEPS), after_step=lambda: sparsifier.step(other_optimizer))
    assert_same_weights(model, other)


def test_attach_and_step_do_not_mix():
    model = TinyKron()
    sparsifier = attached(model, sgd(model))
    with pytest.raises(RuntimeError, match="must not be called by hand"):
        sparsifier.step()
    with pytest.raises(RuntimeError, match="never both"):
        sparsifier.attach(sgd(model))
    by_hand = Sparsifier(model, target_sparsity=0.5, total_steps=STEPS)
    by_hand.step()
    with pytest.raises(RuntimeError, match="never both"):
        by_hand.attach(sgd(model))


def test_detach_stops_counting():
    model = TinyKron()
    optimizer = sgd(model)
    sparsifier = attached(model, optimizer)
    train(model, optimizer, range(3))
    sparsifier.detach()
    sparsifier.detach()
    train(model, optimizer, range(3))
    assert sparsifier.step_count == 3


def test_attach_needs_an_optimizer():
    with pytest.raises(TypeError, match=r"a torch\.optim\.Optimizer is required to attach to, got a Linear"):
        Sparsifier(TinyKron(), target_sparsity=0.5, total_steps=STEPS).attach(nn.Linear(1, 1))


def test_closing_before_the_end_warns():
    model = TinyKron()
    optimizer = sgd(model)
    sparsifier = attached(model, optimizer)
    train(model, optimizer, range(12))
    with pytest.warns(UserWarning, match=r"after 12 optimizer steps.*step 20.*target_sparsity=0\.5 was not reached"):
        sparsifier.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_sparsity": 1.0}, r"target_sparsity must be a number in \[0, 1\), got 1\.0"),
        ({"target_sparsity": -0.1}, r"target_sparsity must be .* got -0\.1"),
        ({"target_sparsity": float("nan")}, r"target_sparsity must be .* got nan"),
        ({"target_sparsity": "0.5"}, r"target_sparsity must be .* got '0\.5'"),
        ({"target_sparsity": True}, r"target_sparsity must be .* got True"),
        ({"target_sparsity": None}, "exactly one of target_sparsity and l1, got target_sparsity=None and l1=None"),
        ({"scope": "block"}, r"scope must be one of \('global', 'layer'\), got 'block'"),
        ({"start": 0.5, "end": 0.5}, r"start must be before end, got start=0\.5, end=0\.5"),
        ({"start": -0.1}, r"start must be a share .* got -0\.1"),
        ({"end": 1.5}, r"end must be a share .* got 1\.5"),
        ({"regrowth": "none"}, r"regrowth must be one of \('interval', 'straight_through'\), got 'none'"),
        ({"regrowth": True}, "regrowth must be one of .*, got True"),
        ({"group_penalty": -0.1}, r"group_penalty must be a number in \[0, 1\], got -0\.1"),
        ({"group_penalty": 1.5}, r"group_penalty must be .* got 1\.5"),
        ({"group_penalty": float("nan")}, "group_penalty must be .* got nan"),
        ({"group_penalty": True}, "group_penalty must be .* got True"),
        ({"groups": "row"}, r"groups must be one of \('rows', 'columns', 'both'\), got 'row'"),
        ({"interval": 0}, "interval must be a positive int, got 0"),
        ({"interval": 2.0}, r"interval must be a positive int, got 2\.0"),
        ({"total_steps": 0}, "total_steps must be a positive int, got 0"),
        ({"total_steps": -5}, "total_steps must be a positive int, got -5"),
        ({"total_steps": 10}, r"total_steps=10 the ramp runs from step 0 .* to step 5 .* interval of 10 steps"),
        ({"start": 0.0, "end": 0.001}, r"total_steps=40 .* to step 0 "),
        ({"target_sparsity": 0.96}, r"needs 984 of 1024 entries .* 2 layers at most 976"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        Sparsifier(TinyKron(), **{"target_sparsity": 0.5, "total_steps": STEPS, **options})


def test_flattened_parameters_raise():
    model = TinyKron()
    model.fc1.s = nn.Parameter(model.fc1.s.detach().flatten())  # as FSDP version 1 leaves it
    with pytest.raises(ValueError, match=r"S of shape \[8, 4\] has been flattened to \[32\].*use fsdp_version 2"):
        Sparsifier(model, target_sparsity=0.5, total_steps=STEPS)


@pytest.mark.parametrize("options", [{"target_sparsity": 0.5}, {"l1": 1.0}], ids=lambda options: next(iter(options)))
def test_a_model_in_the_middle_of_a_selection_is_refused(options):
    model = nn.Sequential(KronCandidates(16, 16, [(4, 1), (8, 1)]), KronLinear(16, 16, 4, 1))
    for total_steps in (100, 5):  # it is also the first thing to say of a short training
        with pytest.raises(ValueError, match=r"size is chosen: .*get_kron_model\(model, callback\.config\)"):
            Sparsifier(model, **options, total_steps=total_steps)


def test_a_model_without_kronecker_layers_raises():
    with pytest.raises(ValueError, match="Linear has no Kronecker layers"):
        Sparsifier(nn.Linear(4, 4), target_sparsity=0.5, total_steps=STEPS)


def test_state_of_another_model_raises():
    state = attached(pruned_model(), sgd(pruned_model())).state_dict()
    small = Sparsifier(KronLinear(16, 16, 4, 1), target_sparsity=0.5, total_steps=STEPS)
    with pytest.raises(ValueError, match="state is of 2 Kronecker layers, this model has 1"):
        small.load_state_dict(state)
    with pytest.raises(ValueError, match="mask of 2 bytes for a layer of 4 blocks"):
        Sparsifier(
            nn.Sequential(KronLinear(8, 8, 4, 1), KronLinear(8, 8, 4, 1)), target_sparsity=0.5, total_steps=STEPS
        ).load_state_dict({**state, "initial_dead": [None, state["initial_dead"][1]]})
