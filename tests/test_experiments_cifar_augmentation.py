"""The augmentation of `examples/experiments/cifar100`, against Pillow and by hand."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "experiments" / "cifar100"))

from augmentation import Augmentation
from erasing import random_boxes, random_erasing
from image_ops import COLOUR_OPS
from mixing import cut_box, mix, soft_cross_entropy, soft_labels
from rand_augment import OPERATIONS, argument, rand_augment
from recipe import load_recipes
from warping import WARPS, random_resized_crop, resize_crops, warp

PILLOW = {
    "auto_contrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
    "posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
    "solarize": lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    "solarize_add": lambda image, add: image.point([min(255, i + int(add)) if i < 128 else i for i in range(256)] * 3),
    "color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
}
FILL = (124, 116, 104)
# As timm writes them.
PILLOW_WARPS = {
    "rotate": lambda image, degrees, **how: image.rotate(degrees, **how),
    "shear_x": lambda image, factor, **how: _affine(image, (1, factor, 0, 0, 1, 0), how),
    "shear_y": lambda image, factor, **how: _affine(image, (1, 0, 0, factor, 1, 0), how),
    "translate_x": lambda image, share, **how: _affine(image, (1, 0, share * image.size[0], 0, 1, 0), how),
    "translate_y": lambda image, share, **how: _affine(image, (1, 0, 0, 0, 1, share * image.size[1]), how),
}


def _affine(image, numbers, how):
    return image.transform(image.size, Image.Transform.AFFINE, numbers, **how)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=6, size=24, seed=0):
    """Noise of different ranges, slopes, a constant image and one of two values."""
    draw = generator(seed)
    images = torch.randint(256, (max(count, 4), 3, size, size), generator=draw, dtype=torch.uint8)
    slope = torch.arange(size).expand(3, size, size)
    images[0] = (slope * 5 + 60).to(torch.uint8)
    images[1] = 77
    images[2] = torch.where(slope < 3, 10, 200).to(torch.uint8)
    images[3] = images[3] // 3 + 50
    return images[:count]


def to_pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def levels(name, count):
    level = torch.linspace(0.51, 0.97, count)  # no pixel comes from exactly the border
    return argument(name, level, torch.arange(count) % 2 == 1)


@pytest.mark.parametrize("name", COLOUR_OPS)
def test_colour_operations_are_pillows_bit_for_bit(name):
    images = pictures(12)
    values = levels(name, len(images))
    expected = [PILLOW[name](to_pillow(image), value.item()) for image, value in zip(images, values, strict=True)]
    result = COLOUR_OPS[name](images, values)
    assert result.dtype == torch.uint8
    torch.testing.assert_close(result, torch.stack([to_tensor(image) for image in expected]), rtol=0, atol=0)


@pytest.mark.parametrize("name", WARPS)
def test_warps_are_pillows_to_its_rounding(name):
    images = pictures(12)
    values = levels(name, len(images))
    how = {"resample": Image.Resampling.BILINEAR, "fillcolor": FILL}
    expected = [
        PILLOW_WARPS[name](to_pillow(image), value.item(), **how) for image, value in zip(images, values, strict=True)
    ]
    result = warp(images, WARPS[name](values, 24, 24), torch.tensor(FILL))
    torch.testing.assert_close(
        result.int(), torch.stack([to_tensor(image) for image in expected]).int(), rtol=0, atol=1
    )


@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [
        ("rotate", 0.9, 27.0),
        ("shear_x", 0.9, 0.27),
        ("translate_y", 0.9, 0.405),
        ("posterize", 0.9, 1.0),
        ("posterize", 0.4, 3.0),
        ("solarize", 0.9, 256.0 - 230),
        ("solarize_add", 0.9, 99.0),
        ("color", 0.9, 1.81),
    ],
)
def test_arguments_at_a_level_are_timms(name, level, expected):
    value, negated = argument(name, torch.tensor([level, level]), torch.tensor([False, True])).tolist()
    assert value == pytest.approx(expected)
    both = {"rotate": -expected, "shear_x": -expected, "translate_y": -expected, "color": 2 - expected}
    assert negated == pytest.approx(both.get(name, expected))


def augmented(images, seed=0, **changes):
    options = {"magnitude": 9.0, "magnitude_std": 0.5, "operations": 2, "probability": 0.5, "fill": torch.tensor(FILL)}
    return rand_augment(images, generator(seed), **{**options, **changes})


def test_rand_augment_draws_for_each_image_and_repeats_itself():
    images = pictures(1)[:1].expand(400, -1, -1, -1)
    result = augmented(images)
    torch.testing.assert_close(result, augmented(images), rtol=0, atol=0)
    assert not torch.equal(result, augmented(images, seed=1))
    unchanged = (result == images).flatten(1).all(1).float().mean()
    # Neither of two operations is applied to a quarter of the images; few operations change nothing.
    assert 0.2 < unchanged < 0.4
    kinds = {image.numpy().tobytes() for image in result}
    assert len(kinds) > 150


def test_rand_augment_applies_what_was_drawn_alone():
    images = pictures(300, size=8)
    torch.testing.assert_close(augmented(images, probability=0.0), images, rtol=0, atol=0)
    result = augmented(images, probability=1.0, operations=1, magnitude_std=0.0)
    level, close = torch.tensor([0.9]), 0
    for image, drawn in zip(images[:100], result, strict=False):
        outcomes = []
        for name in OPERATIONS:
            for negative in (False, True):
                value = argument(name, level, torch.tensor([negative]))
                if name in WARPS:
                    outcomes.append(warp(image[None], WARPS[name](value, 8, 8), torch.tensor(FILL))[0])
                else:
                    outcomes.append(COLOUR_OPS[name](image[None], value)[0])
        close += any(torch.equal(drawn, outcome) for outcome in outcomes)
    assert close == 100


def test_magnitudes_scatter_by_their_deviation_and_stay_in_range():
    slope = torch.arange(64).expand(3, 64, 64).to(torch.uint8).clone()
    slope[:, -1, -1] = 255  # so that there is no contrast to stretch
    images = slope.expand(1500, -1, -1, -1)
    drawn = augmented(images, operations=1, probability=1.0, magnitude=9.0, magnitude_std=0.5)
    factors = drawn[:, 0, 0, 50] / 50
    # Brightness scales all values (equalize does by 4); its factors are 1 + .09 * N(9, .5), at most 1.9.
    scaled = [
        factor.item()
        for factor, image in zip(factors, drawn, strict=True)
        if 1.2 < factor < 3 and ((slope * factor - image)[:, :-1].abs() <= 1.5).all()
    ]
    assert len(scaled) > 30
    assert max(scaled) <= 1.9
    assert np.mean(scaled) == pytest.approx(1.81, abs=0.02)
    assert 0.03 < np.std(scaled) < 0.055


def test_a_whole_box_only_enlarges_and_mirrors():
    images = pictures(2, size=8)
    boxes = torch.tensor([[0, 0, 8, 8], [0, 0, 8, 8]])
    same = resize_crops(images, boxes, torch.tensor([False, True]), 8)
    torch.testing.assert_close(same, torch.stack([images[0], images[1].flip(2)]), rtol=0, atol=0)
    larger = resize_crops(images, boxes, torch.tensor([False, True]), 16)
    expected = F.interpolate(images.float(), size=16, mode="bicubic").round().clamp(0, 255).to(torch.uint8)
    torch.testing.assert_close(larger, torch.stack([expected[0], expected[1].flip(2)]), rtol=0, atol=1)


def test_crops_have_the_share_and_the_shape_that_were_asked_for():
    column, row = torch.arange(64).expand(64, 64), torch.arange(64).view(64, 1).expand(64, 64)
    images = torch.stack([column, row, row]).to(torch.uint8).mul(3).expand(500, -1, -1, -1)
    cut = random_resized_crop(images, 64, (0.25, 0.5), (0.75, 4 / 3), 0.5, generator()).float() / 3
    widths = (cut[:, 0, 32, 60] - cut[:, 0, 32, 4]) * 64 / 56
    heights = (cut[:, 1, 60, 32] - cut[:, 1, 4, 32]) * 64 / 56
    assert 0.4 < (widths < 0).float().mean() < 0.6  # mirrored
    shares, ratios = widths.abs() * heights / 64**2, widths.abs() / heights
    assert (shares > 0.22).all()
    assert (shares < 0.53).all()
    assert (ratios > 0.7).all()
    assert (ratios < 1.4).all()
    assert shares.std() > 0.05


def test_images_that_would_be_shrunk_are_refused():
    with pytest.raises(ValueError, match=r"\[9, 9\] are larger than image_size 8"):
        random_resized_crop(pictures(1, size=9), 8, (0.08, 1), (0.75, 4 / 3), 0.5, generator())


def mixed(mixup, cutmix, seed, count=8, smoothing=0.0):
    """Image i has the value i everywhere, and label i."""
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    labels = torch.arange(count)
    options = {"mixup": mixup, "cutmix": cutmix, "switch": 0.5, "smoothing": smoothing}
    return mix(images, labels, count, generator(seed), **options)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)], ids=["mixup", "cutmix", "both"])
def test_image_and_label_are_mixed_by_the_same_lambda(mixup, cutmix):
    boxes = shares = 0
    for seed in range(40):
        images, labels = mixed(mixup, cutmix, seed)
        torch.testing.assert_close(labels.sum(1), torch.ones(8))
        # The mean of image i is lambda * i + (1 - lambda) * (7 - i): the mean of its label.
        torch.testing.assert_close(images.mean((1, 2, 3)), labels @ torch.arange(8.0), rtol=1e-5, atol=1e-5)
        is_box = len(images[0].unique()) == 2
        boxes, shares = boxes + is_box, shares + (not is_box and 0 < labels[0, 0] < 1)
    if mixup == 0:
        assert boxes > 30
        assert shares == 0
    elif cutmix == 0:
        assert (boxes, shares) == (0, 40)
    else:
        assert 10 < boxes < 30
        assert 10 < shares < 30


def test_lambda_has_the_beta_distribution():
    shares = torch.stack([mixed(0.8, 0.0, seed, count=2)[1][0, 0] for seed in range(1000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)  # of Beta(a, a)


def test_without_mixing_labels_are_only_smoothed():
    images, labels = mixed(0.0, 0.0, 0, smoothing=0.1)
    torch.testing.assert_close(images[:, 0, 0, 0], torch.arange(8.0), rtol=0, atol=0)
    torch.testing.assert_close(labels, soft_labels(torch.arange(8), 8, 0.1))
    torch.testing.assert_close(labels.diagonal(), torch.full((8,), 0.9 + 0.1 / 8))
    torch.testing.assert_close(labels.sum(1), torch.ones(8))


def test_cut_boxes_stay_inside_and_cover_what_is_left_for_them():
    for seed in range(200):
        left, top, width, height = cut_box(0.75, 20, 30, generator(seed))
        assert 0 <= left <= left + width <= 30
        assert 0 <= top <= top + height <= 20
        assert width <= 15
        assert height <= 10
    assert cut_box(1.0, 20, 30, generator())[2:] == (0, 0)


def test_soft_loss_of_accumulated_batches_is_that_of_the_whole():
    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    soft = soft_labels(labels, 5, 0.1)
    whole = soft_cross_entropy({"logits": logits}, soft)
    torch.testing.assert_close(whole, -(soft * logits.log_softmax(1)).sum() / 6)
    parts = [soft_cross_entropy({"logits": logits[i : i + 2]}, soft[i : i + 2], torch.tensor(6)) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(soft_cross_entropy({"logits": logits}, labels), F.cross_entropy(logits, labels))


def test_erasing_takes_its_share_of_images_and_area():
    images = torch.full((2000, 3, 32, 32), 100.0)
    erased = random_erasing(images, generator(), generator(1), probability=0.25, area=(0.02, 1 / 3))
    changed = (erased != images).all(1)
    hit = changed.flatten(1).any(1)
    assert hit.float().mean() == pytest.approx(0.25, abs=0.03)
    shares = changed[hit].float().mean((1, 2))
    assert shares.min() > 0.01
    assert shares.max() < 0.36
    assert shares.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    noise = erased[changed.unsqueeze(1).expand_as(erased)]
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std() == pytest.approx(1, abs=0.02)


def test_erased_boxes_are_rectangles_of_the_allowed_shapes():
    left, top, width, height = random_boxes(1000, 40, 60, (0.02, 1 / 3), generator()).unbind(1)
    assert (left >= 0).all()
    assert (left + width <= 60).all()
    assert (top + height <= 40).all()
    ratio = height[(width > 5) & (height > 5)] / width[(width > 5) & (height > 5)]
    assert ratio.min() > 0.25
    assert ratio.max() < 4
    empty = random_boxes(5, 8, 8, (1.0, 1.0), generator())
    assert (empty[:, 2:] == 0).all()  # nothing fits


@pytest.fixture(scope="module")
def whole():
    return Augmentation(load_recipes().augmentation, num_labels=10, seed=3)


def test_the_whole_augmentation_gives_a_batch_for_the_model(whole):
    images, labels = pictures(8, size=32), torch.arange(8)
    before = images.clone()
    pixels, soft = whole(images, labels, step=5)
    assert pixels.shape == (8, 3, 224, 224)
    assert pixels.dtype == soft.dtype == torch.float32
    assert soft.shape == (8, 10)
    torch.testing.assert_close(soft.sum(1), torch.ones(8))
    assert soft.min() >= 0.1 / 10 - 1e-6  # label smoothing
    low, high = ((value - 0.45) / 0.225 for value in (0, 1))
    assert ((pixels > low - 0.3) & (pixels < high + 0.3)).float().mean() > 0.99  # but for the noise of erasing
    torch.testing.assert_close(images, before, rtol=0, atol=0)


def test_draws_are_a_function_of_seed_step_batch_and_rank_alone(whole):
    images, labels = pictures(4, size=16), torch.arange(4)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = whole(images, labels, step=7, micro_batch=1, rank=1)
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn from the global generator
    torch.manual_seed(1)
    torch.testing.assert_close(whole(images, labels, step=7, micro_batch=1, rank=1), first, rtol=0, atol=0)
    other_seed = Augmentation(whole.settings, num_labels=10, seed=4)
    for other in (
        whole(images, labels, step=8, micro_batch=1, rank=1),
        whole(images, labels, step=7, micro_batch=2, rank=1),
        whole(images, labels, step=7, micro_batch=1, rank=0),
        other_seed(images, labels, step=7, micro_batch=1, rank=1),
    ):
        assert not torch.equal(other[0], first[0])


def test_other_inputs_are_refused(whole):
    with pytest.raises(ValueError, match="uint8 images"):
        whole(torch.rand(2, 3, 8, 8), torch.arange(2), step=0)
