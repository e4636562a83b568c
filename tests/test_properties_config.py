"""Random valid values of KronConfig survive JSON; random invalid ones raise ValueError and nothing else."""

import json
import string

import pytest
from hypothesis import strategies as st
from properties import check_all, examples

from kron_hf import CalibrationConfig, KronConfig

# Characters of module names, among them some that mean something in a regular expression.
NAMES = st.text(string.ascii_letters + string.digits + "_.-$^|é ", min_size=1, max_size=8)
LISTS = st.lists(NAMES, max_size=4)
SIZES = st.integers(1, 64)
BLOCK_SIZES = SIZES | st.tuples(SIZES | st.just(-1), SIZES | st.just(-1))


@st.composite
def valid_arguments(draw):
    block_size = draw(BLOCK_SIZES)
    sides = (block_size, block_size) if isinstance(block_size, int) else block_size
    targets = draw(st.none() | st.just("all-linear") | NAMES | LISTS | LISTS.map(tuple) | st.sets(NAMES, max_size=4))
    arguments = {
        "block_size": block_size,
        "rank": draw(st.integers(1, sides[0] * sides[1] if min(sides) > 0 else 64)),
        "target_modules": targets,
        "exclude_modules": draw(st.none() | LISTS | st.sampled_from([r".*\.0\..*", "a|b", "[x]+"])),
        "block_size_pattern": draw(st.dictionaries(NAMES, BLOCK_SIZES, max_size=3)),
        "rank_pattern": draw(st.dictionaries(NAMES, st.integers(1, 100), max_size=3)),
        "init_weights": draw(st.sampled_from([None, "random", "nearest", "calibrated"])),
        "base_model_name_or_path": draw(st.none() | NAMES),
        "revision": draw(st.none() | NAMES),
    }
    if isinstance(targets, list | tuple):
        indices = st.integers(0, 20)
        arguments["layers_to_transform"] = draw(st.none() | indices | st.lists(indices, max_size=3))
        if arguments["layers_to_transform"] is not None:
            arguments["layers_pattern"] = draw(st.none() | NAMES | LISTS)
    return arguments


def numbers(smallest, largest):
    return st.floats(smallest, largest, exclude_min=smallest == 0) | st.sampled_from([largest])


CALIBRATIONS = st.fixed_dictionaries(
    {},
    optional={
        "readout": st.sampled_from([None, "cls", "all"]),
        "ridge": numbers(0, 10),
        "sweeps": st.integers(1, 20),
        "held_out": st.floats(0, 0.99),
        "menu_shapes": st.none() | st.lists(BLOCK_SIZES, min_size=1, max_size=4),
        "flops_weight": numbers(0, 10),
        "batch_size": st.integers(1, 64),
        "target_sparsity": st.none() | st.floats(0, 0.99),
        "seed": st.integers(0, 2**32 - 1),
    },
)


@st.composite
def valid_calibrations(draw):
    """Arguments of a conversion by data, with a budget or without."""
    arguments = {"init_weights": draw(st.sampled_from([None, "calibrated"]))}
    if draw(st.booleans()):
        arguments[draw(st.sampled_from(["target_params", "target_flops", "max_error"]))] = draw(numbers(0, 1))
    else:
        arguments |= {"block_size": draw(BLOCK_SIZES), "rank": 1}
    calibration = draw(st.none() | CALIBRATIONS)
    as_dict = calibration is None or draw(st.booleans())
    return arguments | {"calibration_config": calibration if as_dict else CalibrationConfig(**calibration)}


@st.composite
def valid_candidates(draw):
    """Arguments with candidates, and what they come to."""
    size = SIZES | st.tuples(SIZES | st.just(-1), SIZES | st.just(-1))
    sizes = draw(st.lists(size, min_size=1, max_size=6, unique_by=lambda s: (s, s) if isinstance(s, int) else s))
    pairs = [(s, s) if isinstance(s, int) else s for s in sizes]
    largest = min([64, *(bo * bi for bo, bi in pairs if min(bo, bi) > 0)])
    ranks = draw(st.lists(st.integers(1, largest), min_size=1, max_size=6, unique=True))
    expected = [(s, r) for s in sizes for r in ranks]
    listed = [list(s) if isinstance(s, tuple) and draw(st.booleans()) else s for s in sizes]
    if len(expected) < 2:
        expected, listed, ranks = [(1, 1), (2, 1)], [1, 2], [1]
    if len(ranks) == 1 and draw(st.booleans()):
        return {"candidate_block_sizes": listed, "rank": ranks[0]}, expected
    if len(sizes) == 1 and len(ranks) > 1 and draw(st.booleans()):
        return {"candidate_ranks": ranks, "block_size": listed[0], "rank": 1}, expected
    return {"candidate_block_sizes": listed, "candidate_ranks": ranks}, expected


GARBAGE = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.complex_numbers()
    | st.integers(-5, 0)
    | st.text("*+?[(\\a", max_size=3)
    | st.binary(max_size=2)
    | st.lists(st.integers(-3, 3) | st.none() | st.floats(), max_size=3)
    | st.dictionaries(st.text("*(a", max_size=2) | st.integers(), st.integers(-2, 2) | st.none(), max_size=2)
    | st.builds(object)
)
FIELDS = [
    *("block_size", "rank", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("block_size_pattern", "rank_pattern", "init_weights", "candidate_block_sizes", "candidate_ranks"),
    *("target_params", "target_flops", "max_error", "calibration_config"),
]


def through_json(config):
    return KronConfig.from_peft_type(**json.loads(json.dumps(config.to_dict())))


@examples(200, 1500)
def test_json_round_trip_is_exact(examples, tmp_path):
    def check(arguments):
        config = KronConfig(**arguments)
        again = through_json(config)
        assert again == config
        assert repr(again) == repr(config)  # a pair is no list, an int no float
        config.save_pretrained(tmp_path)
        assert KronConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()

    check_all(check, valid_arguments() | valid_calibrations(), examples)


@examples(100, 1000)
def test_candidates_survive_json(examples):
    def check(case):
        arguments, expected = case
        config = KronConfig(**arguments)
        assert config.candidates == expected
        again = through_json(config)
        assert again.candidates == expected
        assert repr(again) == repr(config)

    check_all(check, valid_candidates(), examples)


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")  # Python's own word on patterns as "[["
@examples(300, 3000)
def test_garbage_is_refused_by_a_value_error_or_is_a_good_config(examples):
    refused: dict[str, set[str]] = {}

    def check(case):
        arguments, field, value = case
        try:
            config = KronConfig(**(arguments | {field: value}))
        except ValueError as error:
            refused.setdefault(field, set()).add(str(error))
        else:
            assert through_json(config) == config

    for field in FIELDS:  # each by itself: drawn among the others, one may not come up
        check_all(check, st.tuples(valid_arguments(), st.just(field), GARBAGE), examples // len(FIELDS))
    assert refused.keys() == set(FIELDS)
    # An error names the field, or what it does not go with.
    companions = {
        "target_modules": ["layers_to_transform"],
        "layers_to_transform": ["layers_pattern"],
        "block_size": ["rank"],
    }
    for field, messages in refused.items():
        assert all(any(name in message for name in [field, *companions.get(field, [])]) for message in messages)
