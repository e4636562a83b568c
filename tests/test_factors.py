import pytest
import torch

from kron_hf.factors import balanced_std, block_norms, kron_flops, kron_weight, nearest_kronecker, to_blocks

SHAPES = [  # (out_blocks, in_blocks, block_out, block_in, rank)
    pytest.param((3, 2, 4, 4, 1), id="square"),
    pytest.param((3, 2, 2, 5, 3), id="rectangular"),
    pytest.param((6, 1, 1, 7, 2), id="low rank, 1 x in"),
    pytest.param((1, 7, 6, 1, 2), id="low rank, out x 1"),
    pytest.param((1, 1, 3, 5, 4), id="one block"),
    pytest.param((5, 3, 2, 2, 4), id="full rank"),
]


def random_factors(shape):
    out_blocks, in_blocks, block_out, block_in, rank = shape
    make = torch.randn
    kwargs = {"dtype": torch.float64}
    return (
        make(out_blocks, in_blocks, **kwargs),
        make(rank, out_blocks, in_blocks, **kwargs),
        make(rank, block_out, block_in, **kwargs),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_kron_weight_is_the_sum_of_kronecker_products(shape):
    s, a, b = random_factors(shape)
    expected = sum(torch.kron(s * a_i, b_i) for a_i, b_i in zip(a, b, strict=True))
    torch.testing.assert_close(kron_weight(s, a, b), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_kron_weight_entry_by_entry(shape):
    out_blocks, in_blocks, block_out, block_in, rank = shape
    s, a, b = random_factors(shape)
    weight = kron_weight(s, a, b)
    for j in range(out_blocks):
        for k in range(block_out):
            for l in range(in_blocks):  # noqa: E741  # the paper's letters
                for m in range(block_in):
                    entry = sum(s[j, l] * a[i, j, l] * b[i, k, m] for i in range(rank))
                    torch.testing.assert_close(weight[j * block_out + k, l * block_in + m], entry)


def test_a_zero_of_s_is_a_zero_block():
    s, a, b = random_factors((3, 2, 4, 5, 3))
    s[1, 0] = 0
    blocks = to_blocks(kron_weight(s, a, b), (4, 5))
    assert blocks.abs().sum(1).eq(0).tolist() == [False, False, True, False, False, False]


def test_the_papers_example_has_128_parameters():
    s, a, b = torch.ones(4, 8), torch.ones(1, 4, 8), torch.ones(1, 2, 32)
    assert kron_weight(s, a, b).shape == (8, 256)
    assert s.numel() + a.numel() + b.numel() == 32 + 32 + 64


@pytest.mark.parametrize("shape", SHAPES)
def test_nearest_kronecker_is_exact_at_full_rank(shape):
    out_blocks, in_blocks, block_out, block_in, _ = shape
    weight = torch.randn(out_blocks * block_out, in_blocks * block_in, dtype=torch.float64)
    a, b, retained = nearest_kronecker(weight, (block_out, block_in), block_out * block_in)
    ones = torch.ones(out_blocks, in_blocks, dtype=torch.float64)
    torch.testing.assert_close(kron_weight(ones, a, b), weight)
    assert retained == pytest.approx(1.0)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_nearest_kronecker_is_the_best_fit(rank):
    weight = torch.randn(12, 20, dtype=torch.float64)
    a, b, retained = nearest_kronecker(weight, (3, 4), rank)
    error = (kron_weight(torch.ones(4, 5, dtype=torch.float64), a, b) - weight).square().sum()
    # The truncated singular values of the rearranged weight are the smallest possible error (Eckart-Young).
    best = torch.linalg.svdvals(to_blocks(weight, (3, 4)))[rank:].square().sum()
    torch.testing.assert_close(error, best)
    assert retained == pytest.approx(1 - (error / weight.square().sum()).item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nearest_kronecker_keeps_the_dtype(dtype):
    a, b, _ = nearest_kronecker(torch.randn(8, 8).to(dtype), (2, 4), 2)
    assert (a.dtype, b.dtype) == (dtype, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_block_norms_are_those_of_the_dense_weight(shape):
    s, a, b = random_factors(shape)
    expected = to_blocks(kron_weight(s, a, b), b.shape[1:]).norm(dim=1).view(s.shape)
    torch.testing.assert_close(block_norms(s, a, b), expected)


def test_block_norms_do_not_see_the_scale_of_s_against_a():
    s, a, b = random_factors((3, 4, 2, 2, 2))
    scale = torch.rand(3, 4, dtype=torch.float64) + 0.5
    torch.testing.assert_close(block_norms(s / scale, a * scale, b), block_norms(s, a, b))


def test_balanced_std_gives_the_variance():
    std = balanced_std(rank=4, variance=0.02)
    a, b = torch.randn(4, 60, 60) * std, torch.randn(4, 60, 60) * std
    weight = kron_weight(torch.ones(60, 60), a, b)
    assert weight.var().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("out_features", "in_features", "block_size", "rank", "expected"),
    [
        pytest.param(768, 768, (16, 16), 1, 2 * (768 * 16 + 768 * 48), id="square"),
        pytest.param(3072, 768, (16, 16), 2, 4 * (768 * 16 + 3072 * 48), id="B first for d to 4d"),
        pytest.param(768, 3072, (16, 16), 2, 4 * (3072 * 48 + 768 * 16), id="A first for 4d to d"),
        pytest.param(768, 768, (1, 768), 8, 2 * 8 * (768 + 768), id="low rank"),
    ],
)
def test_kron_flops_by_hand(out_features, in_features, block_size, rank, expected):
    assert kron_flops(out_features, in_features, block_size, rank) == expected
