import pytest
import torch

from kron_hf.checkpoint.packing import Packed, living_bits, mask_bytes, pack, unpack

SHAPES = [(1, 1), (1, 8), (3, 5), (8, 8), (7, 9), (16, 48)]


def factors(out_blocks, in_blocks, rank, sparsity, dtype=torch.float32):
    s = torch.randn(out_blocks, in_blocks, dtype=dtype)
    s[torch.rand(out_blocks, in_blocks) < sparsity] = 0
    return s, torch.randn(rank, out_blocks, in_blocks, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_round_trip(shape, sparsity, dtype):
    s, a = factors(*shape, 3, sparsity, dtype)
    packed = pack(s, a)
    again, others = unpack(packed, shape)
    torch.testing.assert_close(again, s, rtol=0, atol=0)
    torch.testing.assert_close(others, a * (s != 0), rtol=0, atol=0)
    living = int((s != 0).sum())
    assert packed.nbytes == mask_bytes(*shape) + 4 * living * s.element_size()


def test_order_of_the_bits():
    s = torch.zeros(2, 5)
    s[0, 1], s[1, 4] = 2.0, 3.0  # blocks 1 and 9
    packed = pack(s, torch.ones(1, 2, 5))
    assert packed.live_blocks.tolist() == [0b10, 0b10]
    assert packed.live_s.tolist() == [2.0, 3.0]


def test_values_that_are_no_numbers_live():
    s = torch.tensor([[float("nan"), 0.0, float("inf")]])
    again, _ = unpack(pack(s, torch.ones(2, 1, 3)), (1, 3))
    torch.testing.assert_close(again, s, rtol=0, atol=0, equal_nan=True)


def parts(mask, living):
    return Packed(torch.tensor(mask, dtype=torch.uint8), torch.ones(living), torch.ones(2, living))


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (parts([0b111], 2), "3 blocks live, but there are 2 values of S and 2 of each A"),
        (parts([0b1], 2), "1 blocks live, but there are 2"),
        (parts([0b10000001], 2), r"a bit after the last of \(2, 3\) blocks is set"),
        (parts([1, 0], 1), r"takes 1 bytes, got \[2\]"),
        (parts([], 0), r"takes 1 bytes, got \[0\]"),
        (
            Packed(torch.tensor([3], dtype=torch.uint8), torch.ones(2), torch.ones(2, 3)),
            "2 of S and 3|2 values of S and 3",
        ),
    ],
    ids=["fewer values", "more values", "bit past the end", "long mask", "no mask", "ragged"],
)
def test_what_does_not_fit_is_refused(packed, message):
    with pytest.raises(ValueError, match=message):
        unpack(packed, (2, 3))


def test_bits_on_their_own():
    assert living_bits(torch.tensor([5], dtype=torch.uint8), (1, 3)).tolist() == [[True, False, True]]
