"""Which image processor `kron-hf train` takes."""

import pytest
from transformers import ViTConfig, ViTImageProcessorPil

from kron_hf.command.options import CheckpointOptions
from kron_hf.train.arguments import ModelOptions
from kron_hf.train.model import build_image_processor

CONFIG = ViTConfig(image_size=16)


def processor_of(model):
    return build_image_processor(ModelOptions(model=str(model)), CheckpointOptions(), CONFIG)


def test_that_of_the_checkpoint(tmp_path):
    ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    assert list(processor_of(tmp_path).image_mean) == [0.1, 0.2, 0.3]


def test_one_made_for_the_config_where_there_is_none(tmp_path):
    processor = processor_of(tmp_path)
    assert list(processor.image_mean) == [0.5, 0.5, 0.5]
    assert (processor.size["height"], processor.size["width"]) == (16, 16)


def test_a_damaged_one_is_an_error(tmp_path):
    ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(path.read_text() + "}")
    with pytest.raises((OSError, ValueError), match="preprocessor_config"):
        processor_of(tmp_path)


def test_a_hub_that_does_not_answer_is_an_error():
    with pytest.raises(OSError, match=r"nobody/nothing: whether it has a preprocessor_config\.json could not be found"):
        processor_of("nobody/nothing")
