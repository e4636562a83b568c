import json
import math
import sys

import pytest

from kron_hf import KronConfig, KronLinear
from kron_hf.calibration.result import CalibratedLayer, CalibrationResult


def layer(name, block_size=None, rank=None, **options):
    return CalibratedLayer(
        name=name, out_features=8, in_features=16, has_bias=True, block_size=block_size, rank=rank, **options
    )


RESULT = CalibrationResult(
    layers=(
        layer("encoder.0.fc1", (1, 16), 2, error=0.25, held_out_error=0.5, sensitivity=3.0),
        layer("encoder.0.fc2", (4, 8), 3, error=0.125, held_out_error=0.25, sensitivity=0.25),
        layer("encoder.1.fc1", held_out_error=0.0, sensitivity=7.0),
        layer("encoder.1.fc2", (8, 1), 1, error=0.5, held_out_error=0.75, sensitivity=0.00001, sparsity=0.5),
    ),
    settings={"target_params": 0.5},
)


def test_totals_are_those_of_the_layers():
    built = [KronLinear(16, 8, block_size=size, rank=rank) for size, rank in (((1, 16), 2), ((4, 8), 3), ((8, 1), 1))]
    dense = 8 * 16 + 8
    assert RESULT.params == dense + sum(p.numel() for kron in built for p in kron.parameters()) - sum(
        kron.s.numel() for kron in built
    )
    assert RESULT.dense_params == 4 * dense
    assert RESULT.dense_flops == 4 * 2 * 8 * 16
    assert RESULT.flops == 2 * 8 * 16 + 2 * 2 * (16 + 8) + 3 * 2 * min(16 * 4 + 8 * 2, 16 * 2 + 8 * 8) + 2 * (16 + 8)


def test_table():
    assert str(RESULT) == RESULT.table(by_kind=False)
    lines = str(RESULT).splitlines()
    assert [" ".join(line.split()) for line in lines if not line.startswith("-")] == [
        "layer shape rank params of dense FLOPs of dense error held out sensitivity zero blocks",
        f"encoder.0.fc1 low rank 2 {56 / 136:.4f} 0.3750 0.250 0.500 3 0.000",
        f"encoder.0.fc2 4 x 8 3 {116 / 136:.4f} {480 / 256:.4f} 0.125 0.250 0.25 0.000",
        "encoder.1.fc1 dense 1.0000 1.0000 0.000 0.000 7 0.000",
        f"encoder.1.fc2 low rank 1 {32 / 136:.4f} 0.1875 0.500 0.750 1e-05 0.500",
        f"3 of 4 layers converted {340 / 544:.4f} {880 / 1024:.4f} 0.125 to 0.500 0.250 to 0.750",
    ]
    assert len({len(line) for line in lines if line.startswith("-")}) == 1


def test_a_table_without_zero_blocks_has_no_column_for_them():
    assert "zero blocks" not in str(CalibrationResult(layers=RESULT.layers[:3]))


def test_layers_of_a_kind_share_a_row():
    lines = [" ".join(line.split()) for line in RESULT.table(by_kind=True).splitlines()]
    assert lines[2:4] == [
        f"encoder.*.fc1 (2) 1 dense, 1 low rank 2 {192 / 272:.4f} {352 / 512:.4f} 0.000 to 0.250 0.000 to 0.500 3 to 7 "
        "0.000",
        f"encoder.*.fc2 (2) 1 4 x 8, 1 low rank 1 to 3 {148 / 272:.4f} {528 / 512:.4f} 0.125 to 0.500 0.250 to 0.750 "
        "1e-05 to 0.25 0.000 to 0.500",
    ]


@pytest.mark.parametrize(("depth", "rows"), [(24, 48), (25, 2)], ids=["short", "long"])
def test_long_tables_are_by_kind(depth, rows):
    layers = tuple(layer(f"encoder.{i}.{name}", (4, 8), 1) for i in range(depth) for name in ("fc1", "fc2"))
    assert len(str(CalibrationResult(layers=layers)).splitlines()) == rows + 4


def test_a_hostile_name_is_escaped():
    text = str(CalibrationResult(layers=(layer("fc\n\x1b[31m" + "x" * 500, (4, 8), 1),)))
    assert "\x1b" not in text
    assert len(text.splitlines()) == 5
    assert max(map(len, text.splitlines())) < 250


def test_the_map_makes_a_config_that_reproduces_the_choice():
    assert RESULT.modules == {
        "encoder.0.fc1": {"block_size": [1, 16], "rank": 2},
        "encoder.0.fc2": {"block_size": [4, 8], "rank": 3},
        "encoder.1.fc2": {"block_size": [8, 1], "rank": 1},
    }
    assert KronConfig.from_modules(RESULT.modules).modules == RESULT.modules
    assert CalibrationResult(layers=(layer("fc"),)).modules == {}


def test_saved_is_what_to_dict_says(tmp_path):
    RESULT.save_json(tmp_path / "result.json")
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved == json.loads(json.dumps(RESULT.to_dict()))
    assert saved["settings"] == {"target_params": 0.5}
    assert saved["modules"] == RESULT.modules
    assert (saved["params"], saved["dense_params"], saved["flops"], saved["dense_flops"]) == (340, 544, 880, 1024)
    assert saved["layers"][1] == {
        "name": "encoder.0.fc2",
        "out_features": 8,
        "in_features": 16,
        "has_bias": True,
        "block_size": [4, 8],
        "rank": 3,
        "error": 0.125,
        "held_out_error": 0.25,
        "sensitivity": 0.25,
        "sparsity": 0.0,
        "params": 116,
        "dense_params": 136,
        "flops": 480,
        "dense_flops": 256,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_json_holds_no_nan(tmp_path):
    CalibrationResult(layers=(layer("fc", (4, 8), 1, error=math.nan, sensitivity=math.inf),)).save_json(tmp_path / "r")
    entry = json.loads((tmp_path / "r").read_text(), parse_constant=pytest.fail)["layers"][0]
    assert (entry["error"], entry["sensitivity"]) == (None, None)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "r").write_text("old")
    monkeypatch.setattr(CalibrationResult, "to_dict", lambda self: {"settings": object()})
    with pytest.raises(TypeError):
        RESULT.save_json(tmp_path / "r")
    monkeypatch.undo()
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        RESULT.save_json(tmp_path / "r")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("r", "old")]


def test_picture(tmp_path):
    for ending in ("png", "svg"):
        RESULT.plot(tmp_path / f"choice.{ending}")
    assert (tmp_path / "choice.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "choice.svg").read_text()
    texts = ["4 x 8 (1)", "dense (1)", "low rank (2)", "0.625 of the parameters", "relative output error, held out"]
    assert all(f"<!-- {text} -->" in drawn for text in [*texts, *(one.name for one in RESULT.layers)])


def test_a_picture_of_many_layers_with_names_like_formulas(tmp_path):
    layers = tuple(layer(f"encoder.{i}.$\\frac$", (4, 8), 1, error=i / 250) for i in range(250))
    CalibrationResult(layers=layers).plot(tmp_path / "choice.svg")
    drawn = (tmp_path / "choice.svg").read_text()
    assert drawn.count("\\frac$ -->") == 84  # every third
    assert "<!-- relative output error -->" in drawn


def test_a_picture_needs_layers_and_matplotlib(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no layers to draw"):
        CalibrationResult(layers=()).plot(tmp_path / "choice.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'kron_hf\[demo\]'"):
        RESULT.plot(tmp_path / "choice.png")
