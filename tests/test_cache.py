import hashlib
import json
import os

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from kron_hf import KronConfig, get_kron_model
from kron_hf.checkpoint.cache import check_cached_files

FILES = ["config.json", "model.safetensors"]


def git_sha1(data):
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def cached(root, contents, checksum):
    """A cache's layout: `snapshots/REVISION/name` is a link to `blobs/CHECKSUM`."""
    snapshot = root / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for name, data in contents.items():
        blob = root / "blobs" / checksum(data)
        blob.write_bytes(data)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def contents(tmp_path):
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, num_labels=4,
    )  # fmt: skip
    model = get_kron_model(ViTForImageClassification(config), KronConfig(block_size=4, rank=2))
    model.save_pretrained(tmp_path / "saved")
    return {name: (tmp_path / "saved" / name).read_bytes() for name in FILES}


def flip(path, index):
    data = bytearray(path.read_bytes())
    data[index] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("checksum", [git_sha1, sha256])
def test_whole_files_load(tmp_path, contents, checksum):
    snapshot = cached(tmp_path, contents, checksum)
    check_cached_files([str(snapshot / name) for name in FILES])
    assert AutoModelForImageClassification.from_pretrained(snapshot).num_labels == 4


@pytest.mark.parametrize("checksum", [git_sha1, sha256])
@pytest.mark.parametrize("index", [-1, -400])
def test_flipped_bit_of_the_weights_is_refused(tmp_path, contents, checksum, index):
    snapshot = cached(tmp_path, contents, checksum)
    flip(snapshot / "model.safetensors", index)
    with pytest.raises(ValueError, match=r"model\.safetensors: the cached file is damaged") as raised:
        AutoModelForImageClassification.from_pretrained(snapshot)
    assert "force_download=True" in str(raised.value)
    assert str(tmp_path) not in str(raised.value)


def test_changed_number_in_the_config_is_refused(tmp_path, contents):
    snapshot = cached(tmp_path, contents, git_sha1)
    blob = (snapshot / "config.json").resolve()
    config = json.loads(blob.read_text())
    blob.write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match=r"config\.json: the cached file is damaged"):
        AutoModelForImageClassification.from_pretrained(snapshot)


def test_files_outside_a_cache_are_not_hashed(tmp_path, contents):
    (tmp_path / "blobs").mkdir()
    for name, data in contents.items():
        (tmp_path / "blobs" / name).write_bytes(data)
    flip(tmp_path / "blobs" / "model.safetensors", -1)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "blobs")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_blob_may_be_a_link_into_another_store(tmp_path, contents):
    snapshot = cached(tmp_path, contents, sha256)
    blob = tmp_path / "blobs" / sha256(contents["model.safetensors"])
    store = tmp_path / "store" / "blobs" / ("0" * 64)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(store)
    check_cached_files([str(snapshot / "model.safetensors")])
    flip(store, -1)
    with pytest.raises(ValueError, match="damaged"):
        check_cached_files([str(snapshot / "model.safetensors")])


def test_every_file_of_a_sharded_model_is_compared(tmp_path):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    snapshot = cached(tmp_path, {name: name.encode() for name in names}, sha256)
    shards = [str(snapshot / name) for name in names[:2]]
    check_cached_files(shards)
    for name in names:
        flip(snapshot / name, 0)
        with pytest.raises(ValueError, match=f"{name}: the cached file is damaged"):
            check_cached_files(shards)
        flip(snapshot / name, 0)
