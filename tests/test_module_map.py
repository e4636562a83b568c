import re

import pytest
from torch import nn

from kron_hf.module_map import checked_module_map, entry_sizes, localize_names, size_entry

ENTRY = {"block_size": [4, 8], "rank": 2}


class Backbone(nn.Module):
    base_model_prefix = "vit"

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


class Headed(nn.Module):
    base_model_prefix = "vit"

    def __init__(self):
        super().__init__()
        self.vit = Backbone()
        self.classifier = nn.Linear(2, 2)


def test_block_sizes_become_lists_as_in_json():
    assert checked_module_map({"fc": {"block_size": (4, 8), "rank": 2}}) == {"fc": ENTRY}


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        "fc.*",
        ["fc"],
        {1: ENTRY},
        {"": ENTRY},
        {"fc": None},
        {"fc": [4, 8, 2]},
        {"fc": {"block_size": [4, 8]}},
        {"fc": {"rank": 2}},
        {"fc": {**ENTRY, "dtype": "float32"}},
        {"fc": {"block_size": 4, "rank": 2}},
        {"fc": {"block_size": [4], "rank": 2}},
        {"fc": {"block_size": [4, -1], "rank": 2}},
        {"fc": {"block_size": [4, 8.0], "rank": 2}},
        {"fc": {"block_size": [True, 8], "rank": 2}},
        {"fc": {"block_size": [4, 8], "rank": 0}},
        {"fc": {"block_size": [4, 8], "rank": "2"}},
        {"": {"candidates": [ENTRY]}},
        {1: {"candidates": [ENTRY]}},
    ],
    ids=repr,
)
def test_a_malformed_map(value):
    with pytest.raises(ValueError, match=r"^modules(\[.*\])? must be .*got"):
        checked_module_map(value)


def test_candidates_are_kept_in_their_order():
    sizes = [{"block_size": (8, 8), "rank": 1}, {"block_size": [4, 8], "rank": 2}]
    checked = checked_module_map({"fc": {"candidates": sizes}})
    assert checked == {"fc": {"candidates": [{"block_size": [8, 8], "rank": 1}, ENTRY]}}
    assert entry_sizes(checked["fc"]) == [((8, 8), 1), ((4, 8), 2)]
    assert entry_sizes(ENTRY) == [((4, 8), 2)]
    assert size_entry((4, 8), 2) == ENTRY


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([], "must be a list of 1 to 64, got 0 of them"),
        ([ENTRY] * 10**6, "must be a list of 1 to 64, got 1000000 of them"),
        ("4x8", "must be a list of 1 to 64, got '4x8'"),
        (ENTRY, "must be a list of 1 to 64, got {"),
        ([ENTRY, {**ENTRY}], r"candidates\[1\] is there before, {"),
        ([ENTRY, {"block_size": (4, 8), "rank": 2}], r"candidates\[1\] is there before, {"),
        ([ENTRY, None], r"candidates\[1\] must be .*got None"),
        ([{"candidates": [ENTRY]}], r"candidates\[0\] must be .*got {'candidates'"),
        ([{"block_size": [4, 0], "rank": 1}], r"candidates\[0\] must be"),
    ],
    ids=["none", "million", "text", "dict", "twice", "twice as tuple", "null", "nested", "zero"],
)
def test_malformed_candidates(candidates, message):
    with pytest.raises(ValueError, match=rf"^modules\['fc'\].*{message}") as caught:
        checked_module_map({"fc": {"candidates": candidates}})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "entry", [{"candidates": [ENTRY], **ENTRY}, {"candidates": [ENTRY], "x": 1}], ids=["both", "x"]
)
def test_candidates_stand_alone_in_their_entry(entry):
    with pytest.raises(ValueError, match=r"^modules\['fc'\] must be"):
        checked_module_map({"fc": entry})


def test_a_huge_map_gives_a_short_error():
    with pytest.raises(ValueError, match=r"^modules") as caught:
        checked_module_map({"x" * 10**6: {"block_size": list(range(10**5)), "rank": "r" * 10**6}})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("model", "stored", "local"),
    [
        (Backbone, "layers.1", "layers.1"),
        (Backbone, "vit.layers.1", "layers.1"),
        (Headed, "vit.layers.1", "vit.layers.1"),
        (Headed, "layers.1", "vit.layers.1"),
    ],
)
def test_names_match_with_and_without_the_prefix(model, stored, local):
    assert localize_names(model(), {stored: ENTRY}) == {local: ENTRY}


@pytest.mark.parametrize("name", ["layers.9", "layers..*", "(a+)+$", "ayers.1"])
def test_names_are_matched_literally_and_a_miss_is_named(name):
    message = re.escape(f"Headed has no module {name!r} (1 of 2 are missing)")
    with pytest.raises(ValueError, match=message):
        localize_names(Headed(), {"vit.layers.0": 1, name: 2})


def test_two_names_of_one_module_are_not_merged():
    with pytest.raises(ValueError, match="no module"):
        localize_names(Backbone(), {"vit.layers.1": 1, "layers.1": 2})
