"""What `kron-hf train` reads: images, mirrored anew in each epoch."""

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessorPil

from kron_hf.data.examples import Examples

PROCESSOR = ViTImageProcessorPil(size={"height": 4, "width": 4})


def examples(**options):
    picture = Image.new("RGB", (4, 4))
    picture.putpixel((0, 0), (255, 255, 255))
    return Examples([(picture, 0)] * 32, PROCESSOR, 3, flip=True, **options)


def flips(batches):
    """Which of the images were mirrored: the white corner is on the right."""
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    return (pixels[:, 0, 0, 3] > pixels[:, 0, 0, 0]).tolist()


def epochs(data, **options):
    loader = DataLoader(data, batch_size=8, **options)
    seen = []
    for epoch in range(3):
        data.set_epoch(epoch)
        seen.append(flips(loader))
    return seen


@pytest.mark.parametrize("persistent", [False, True], ids=["new-workers", "persistent-workers"])
def test_every_epoch_mirrors_others_on_any_number_of_workers(persistent):
    alone = epochs(examples())
    assert len({tuple(epoch) for epoch in alone}) == 3
    assert all(8 < sum(epoch) < 24 for epoch in alone)
    assert epochs(examples(), num_workers=1, persistent_workers=persistent) == alone
    assert epochs(examples(seed=1)) != alone
