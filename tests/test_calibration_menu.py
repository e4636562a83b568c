import pytest

from kron_hf import KronLinear
from kron_hf.calibration.menu import dense_option, is_low_rank, layer_menu
from kron_hf.factors import kron_flops


@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shapes", [None, [(1, -1), 4, (2, 8)]], ids=["default", "given"])
def test_parameters_and_flops_are_those_of_the_layers(shapes, has_bias):
    *options, dense = layer_menu(12, 16, has_bias, shapes=shapes, ranks=[1, 2, 3])
    assert options
    for option in options:
        assert option.block_size is not None
        assert option.rank is not None
        layer = KronLinear(16, 12, block_size=option.block_size, rank=option.rank, bias=has_bias)
        assert option.params == sum(p.numel() for p in layer.parameters()) - layer.s.numel()  # S is folded into A
        assert option.flops == kron_flops(12, 16, option.block_size, option.rank)
        assert option.params < dense.params
    assert (dense.params, dense.flops) == (12 * 16 + 12 * has_bias, 2 * 12 * 16)
    assert dense == dense_option(12, 16, has_bias)
    assert dense.is_dense
    assert not any(option.is_dense for option in options)


def test_low_rank_is_offered_at_every_rank_that_saves_parameters():
    menu = layer_menu(384, 1536, True)
    # rank * (384 + 1536) < 384 * 1536
    assert [option.rank for option in menu if option.block_size == (1, 1536)] == [*range(1, 308)]
    assert [option.rank for option in menu if option.block_size == (4, 64)] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert len(menu) == 307 + 10 + 1
    assert [option.params for option in menu] == sorted(option.params for option in menu)


def test_columns_are_low_rank_too():
    assert is_low_rank((1, 16), 12, 16)
    assert is_low_rank((12, 1), 12, 16)
    assert not is_low_rank((1, 8), 12, 16)
    assert not is_low_rank((12, 16), 12, 16)
    ranks = [option.rank for option in layer_menu(12, 16, False, shapes=[(-1, 1)])]
    assert ranks == [1, 2, 3, 4, 5, 6, None]


@pytest.mark.parametrize(
    ("out_features", "in_features", "expected"),
    [
        (384, 1536, (4, 64)),
        (10, 48, (5, 48)),
        (6, 128, (3, 64)),
        (9, 192, (3, 64)),
        (8, 96, (4, 48)),
        (8, 80, (4, 80)),
        (16, 32, (4, 32)),
    ],
    ids=str,
)
def test_the_nearest_rectangle_that_divides(out_features, in_features, expected):
    blocks = {option.block_size for option in layer_menu(out_features, in_features, False)}
    assert blocks == {(1, in_features), expected, None}


def test_sizes_without_divisors_leave_low_rank():
    assert {option.block_size for option in layer_menu(7, 97, True)} == {(1, 97), None}


def test_shapes_that_do_not_divide_are_left_out():
    blocks = {option.block_size for option in layer_menu(12, 16, True, shapes=[5, (3, 4), (4, 3), (4, -1)])}
    assert blocks == {(3, 4), (4, 16), None}
    assert layer_menu(12, 16, True, shapes=[5, (7, 4)]) == [dense_option(12, 16, True)]


def test_a_shape_given_twice_is_offered_once():
    assert layer_menu(8, 16, False, shapes=[(1, -1), (1, 16), (4, 4), 4]) == layer_menu(
        8, 16, False, shapes=[4, (1, -1)]
    )


def test_ranks_end_where_any_matrix_is_reached():
    shapes: list[int | tuple[int, int]] = [(2, 2)]
    assert [option.rank for option in layer_menu(64, 64, False, shapes=shapes, ranks=[2, 3, 4, 5])] == [2, 3, None]
    # 4 terms of (2, 2) have 4 * (1024 + 4) parameters, more than dense; of (4, 4) 16 would have as many.
    assert [option.rank for option in layer_menu(8, 8, False, shapes=[4], ranks=[3, 4, 5])] == [3, None]
