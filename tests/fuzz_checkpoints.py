"""Seeded mutations of a saved Kronecker checkpoint: every kind of damage and malice that a file can hold."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from fuzz_bytes import (
    HOSTILE_NAMES,
    HOSTILE_NUMBERS,
    dump,
    flipped,
    garbage,
    join_safetensors,
    random_value,
    split_safetensors,
    truncated,
    with_random_value,
)

Files = dict[str, bytes]
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ITEM_SIZES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8},
}


class Mutation(NamedTuple):
    """A damaged checkpoint: what was done to it, and its files."""

    kind: str
    detail: str
    files: Files


def mutate(seed: int, whole: Files, sharded: Files) -> Mutation:
    """The mutation of a seed.

    Args:
        seed: The same seed gives the same mutation.
        whole: Files of the intact checkpoint in one weight file.
        sharded: The same in several, with an index.
    """
    rng = random.Random(seed)
    kind = sorted(KINDS)[seed % len(KINDS)]
    files = dict(sharded if kind.startswith("index") or rng.random() < 0.15 else whole)
    return Mutation(kind, KINDS[kind](files, rng), files)


def weights_of(files: Files, rng: random.Random) -> str:
    return rng.choice(sorted(name for name in files if name.endswith(".safetensors")))


def truncate_weights(files: Files, rng: random.Random) -> str:
    name = weights_of(files, rng)
    header, payload = split_safetensors(files[name])
    begin = len(files[name]) - len(payload)
    edges = [0, 8, begin, *(begin + entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")]
    files[name], detail = truncated(files[name], rng, edges)
    return detail


def flip_weights(files: Files, rng: random.Random) -> str:
    name = weights_of(files, rng)
    begin = len(files[name]) - len(split_safetensors(files[name])[1])
    start, stop = rng.choice([(0, 8), (8, begin), (8, begin), (begin, len(files[name]))])
    files[name], detail = flipped(files[name], rng, start, stop)
    return detail


def garbage_weights(files: Files, rng: random.Random) -> str:
    name = weights_of(files, rng)
    files[name], detail = garbage(files[name], rng)
    return detail


def header_values(files: Files, rng: random.Random) -> str:
    name = weights_of(files, rng)
    header, payload = split_safetensors(files[name])
    detail = with_random_value(header, rng)
    files[name] = join_safetensors(header, payload)
    return detail


def header_claims(files: Files, rng: random.Random) -> str:
    """Shapes, dtypes and offsets that do not belong to the data."""
    name = weights_of(files, rng)
    header, payload = split_safetensors(files[name])
    key = rng.choice([key for key in header if key != "__metadata__"])
    other = rng.choice([key for key in header if key != "__metadata__"])
    entry, size = header[key], len(payload)
    edits: dict[str, Callable[[], Any]] = {
        "huge shape": lambda: entry.update(shape=[2**60, *entry["shape"][1:]]),
        "overflowing shape": lambda: entry.update(shape=[2**32, 2**32, 4]),
        "empty huge shape": lambda: entry.update(shape=[0, 2**60], data_offsets=[0, 0]),
        "many dimensions": lambda: entry.update(shape=[1] * 5000 + entry["shape"]),
        "number in shape": lambda: entry.update(shape=[rng.choice(HOSTILE_NUMBERS), *entry["shape"]]),
        "dtype": lambda: entry.update(dtype=rng.choice([*ITEM_SIZES, "F4", "f32", "", "F128", 32])),
        "offsets": lambda: entry.update(data_offsets=[rng.choice(HOSTILE_NUMBERS), rng.choice(HOSTILE_NUMBERS)]),
        "overlap": lambda: entry.update(data_offsets=header[other]["data_offsets"]),
        "beyond the end": lambda: entry.update(data_offsets=[size, size + entry["data_offsets"][1]]),
        "reversed": lambda: entry.update(data_offsets=entry["data_offsets"][::-1]),
        "swapped": lambda: header.update({key: header[other], other: entry}),
        "metadata": lambda: header.update(__metadata__=random_value(rng)),
        "no metadata": lambda: header.pop("__metadata__", None),
    }
    edit = rng.choice(sorted(edits))
    edits[edit]()
    files[name] = join_safetensors(header, payload)
    return f"{edit} of {key}"


def header_bytes(files: Files, rng: random.Random) -> str:
    name = weights_of(files, rng)
    header, payload = split_safetensors(files[name])
    raw = dump(header)
    first = next(key for key in header if key != "__metadata__")
    twice = b"{" + dump({first: header[first]})[1:-1] + b", " + raw[1:]
    edits: dict[str, Callable[[], bytes]] = {
        "duplicate name": lambda: join_safetensors(twice, payload),
        "padding": lambda: join_safetensors(raw + b" " * rng.choice([1, 7, 4_000_000]), payload),
        "many entries": lambda: join_safetensors(
            {**header, **{f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}},
            payload,
        ),
        "length": lambda: struct.pack("<Q", rng.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1])) + raw + payload,
        "invalid utf-8": lambda: join_safetensors(raw.replace(b"layers", b"la\xffers", 1), payload),
        "nested": lambda: join_safetensors(b'{"a": ' + b"[" * 3000 + b"]" * 3000 + b"}", payload),
        "scalar": lambda: join_safetensors(rng.choice([b"1", b"null", b"[]", b"{}", b'""', b""]), payload),
    }
    edit = rng.choice(sorted(edits))
    files[name] = edits[edit]()
    return edit


def tensors(files: Files, rng: random.Random) -> str:
    """Well-formed files with the wrong tensors in them."""
    name = weights_of(files, rng)
    header, payload = split_safetensors(files[name])
    metadata = header.pop("__metadata__", {})
    blobs = {key: payload[slice(*entry["data_offsets"])] for key, entry in header.items()}
    key = rng.choice(sorted(header))
    entry, count = header[key], len(blobs[key]) // ITEM_SIZES[header[key]["dtype"]]

    def retype(dtype: str) -> None:
        entry["dtype"], blobs[key] = dtype, bytes(count * ITEM_SIZES[dtype])

    def fill(value: float) -> None:
        blobs[key] = struct.pack("<f", value) * count

    def reshape() -> None:
        entry["shape"] = rng.choice([entry["shape"][::-1], [count], [1, *entry["shape"]], [*entry["shape"], 1]])

    def resize() -> None:
        entry["shape"] = [rng.choice([0, 1, 7]), *entry["shape"][1:]]
        blobs[key] = bytes(4 * rows_times(entry["shape"]))

    def drop() -> None:
        header.pop(key)
        blobs.pop(key)

    def add(new: str) -> None:
        header[new], blobs[new] = dict(entry), blobs[key]

    edits: dict[str, Callable[[], Any]] = {
        "dtype": lambda: retype(rng.choice(sorted(ITEM_SIZES))),
        "values": lambda: fill(rng.choice([float("nan"), float("inf"), -float("inf"), 1e-45, 3e38, -0.0])),
        "reshape": reshape,
        "resize": resize,
        "drop": drop,
        "rename": lambda: (add(rng.choice(HOSTILE_NAMES)), drop()),
        "extra": lambda: add(rng.choice(HOSTILE_NAMES)),
        "unmapped factors": lambda: [add(f"vit.extra.{factor}") for factor in "sab"],
    }
    edit = rng.choice(sorted(edits))
    edits[edit]()
    offset = 0
    for item in header:
        header[item]["data_offsets"] = [offset, offset + len(blobs[item])]
        offset += len(blobs[item])
    files[name] = join_safetensors({"__metadata__": metadata, **header}, b"".join(blobs[item] for item in header))
    return f"{edit} of {key}"


def rows_times(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def config_bytes(files: Files, rng: random.Random, name: str = CONFIG) -> str:
    data = files[name]
    changed = rng.choice(
        [
            lambda: truncated(data, rng, [0, len(data)]),
            lambda: flipped(data, rng, 0, len(data)),
            lambda: garbage(data, rng),
        ]
    )
    files[name], detail = changed()
    return detail


def edit_config(files: Files, change: Callable[[dict[str, Any]], str]) -> str:
    config = json.loads(files[CONFIG])
    detail = change(config)
    files[CONFIG] = dump(config)
    return detail


def config_map(files: Files, rng: random.Random) -> str:
    return edit_config(files, lambda config: with_random_value(config["quantization_config"], rng))


def config_map_entry(files: Files, rng: random.Random) -> str:
    """Entries of the right form with wrong sizes, names and keys."""

    def change(config: dict[str, Any]) -> str:
        entry = config["quantization_config"]
        modules = entry["modules"]
        name = rng.choice(sorted(modules))
        other = rng.choice([*HOSTILE_NAMES, "vit", "vit.layernorm", "classifier", "vit.layers.0.mlp"])
        listed = modules[name].get("candidates", [modules[name]])
        size = rng.choice(listed)
        edits: dict[str, Callable[[], Any]] = {
            "candidates": lambda: modules.update({name: {"candidates": listed * rng.choice([0, 1, 2, 1000])}}),
            "another candidate": lambda: listed.append({"block_size": [rng.choice([2, 5, 2**40]), 8], "rank": 1}),
            "size": lambda: size.update(block_size=[rng.choice([1, 2, 3, 8, 16, 2**40, 10**30]), 8]),
            "rank": lambda: size.update(rank=rng.choice([2, 33, 2**62, 10**30])),
            "rename": lambda: modules.update({other: modules.pop(name)}),
            "add": lambda: modules.update({other: {"block_size": [1, 1], "rank": 1}}),
            "many": lambda: modules.update({f"{other:.50}{i}": modules[name] for i in range(5000)}),
            "drop": lambda: modules.pop(name),
            "prefix": lambda: entry.update(modules={key.removeprefix("vit."): item for key, item in modules.items()}),
            "key": lambda: entry.update({rng.choice(["self", "cls", "args", "load_in_8bit", "dequantize"]): True}),
            "version": lambda: entry.update(format_version=rng.choice([*HOSTILE_NUMBERS, "1", None, [1]])),
        }
        edit = rng.choice(sorted(edits))
        edits[edit]()
        return f"{edit} of {name}"

    return edit_config(files, change)


def config_duplicate_keys(files: Files, rng: random.Random) -> str:
    text = files[CONFIG].decode()
    key, value = rng.choice(
        [('"modules": {', '"modules": {}, '), ('"rank": 1', '"rank": 7, '), ('"quant_method"', '"quant_method": "x", ')]
    )
    extra = value + key if rng.random() < 0.5 else f"{key.partition(':')[0]}: NaN, {key}"
    files[CONFIG] = text.replace(key, extra, 1).encode()
    return f"twice {key}"


def config_anywhere(files: Files, rng: random.Random) -> str:
    return edit_config(files, lambda config: with_random_value(config, rng))


def config_claims(files: Files, rng: random.Random) -> str:
    """Sizes that would take all memory or all time."""

    def change(config: dict[str, Any]) -> str:
        keys = ["hidden_size", "num_hidden_layers", "intermediate_size", "image_size", "num_labels", "num_channels"]
        chosen = rng.sample([*keys, "patch_size", "num_attention_heads", "encoder_stride"], rng.choice([1, 1, 2]))
        for key in chosen:
            config[key] = rng.choice([2**12, 10**5, 2**20, 10**9, 2**40, 2**62])
        if rng.random() < 0.3:
            config["quantization_config"]["modules"] = dict(
                rng.sample(sorted(config["quantization_config"]["modules"].items()), 1)
            )
        return f"{[(key, config[key]) for key in chosen]}"

    return edit_config(files, change)


def config_classes(files: Files, rng: random.Random) -> str:
    """Other classes, code of the repository, and files elsewhere."""

    def change(config: dict[str, Any]) -> str:
        code = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model", "AutoModel": "evil.Model"}
        updates = [
            {"auto_map": code},
            {"auto_map": {"AutoConfig": "../evil--evil.Config"}},
            {"auto_map": code, "model_type": "evil"},
            {"auto_map": rng.choice(HOSTILE_NAMES)},
            {"model_type": rng.choice(["bert", "deit", "swin", "clip", "llama", *HOSTILE_NAMES])},
            {"architectures": rng.choice([["BertModel"], ["os"], ["nn"], [HOSTILE_NAMES[0]], [], None, "x", [1]])},
            {"transformers_weights": rng.choice(["../evil.safetensors", "/etc/passwd", "adapter_model.bin", "x"])},
            {"configuration_files": ["../config.json", "config.99.0.0.json"]},
            {"_attn_implementation": rng.choice(["evil/kernel", "flash_attention_2", *HOSTILE_NAMES])},
            {"attn_implementation": "evil/kernel"},
            {"dtype": rng.choice(["float16", "int8", "load", "complex64", *HOSTILE_NAMES])},
            {"fusion_config": rng.choice([{HOSTILE_NAMES[0]: True}, {"kron_hf": 1}, [], 1, {"patch_embeddings": 1}])},
            {"id2label": rng.choice([{name: name for name in HOSTILE_NAMES}, [], {"0": HOSTILE_NAMES[0]}, {"x": 1}])},
            {"tie_word_embeddings": True, "is_encoder_decoder": True},
            {"_name_or_path": "../evil", "name_or_path": "../evil"},
        ]
        update = rng.choice(updates)
        config.update(update)
        if rng.random() < 0.2:
            config.pop("dtype", None)
        return f"{update!r:.100}"

    files["evil.py"] = b"raise SystemExit('code of a stranger was run')\n"
    return edit_config(files, change)


def config_and_weights(files: Files, rng: random.Random) -> str:
    """Damaged weights under a config that does not name the dtype, which transformers then reads from them."""
    edit_config(files, lambda config: str(config.pop("dtype", None)))
    return rng.choice([truncate_weights, flip_weights, garbage_weights, header_claims, tensors])(files, rng)


def index_values(files: Files, rng: random.Random) -> str:
    index = json.loads(files[INDEX])
    detail = with_random_value(index, rng)
    files[INDEX] = dump(index)
    return detail


def index_bytes(files: Files, rng: random.Random) -> str:
    return config_bytes(files, rng, INDEX)


def index_places(files: Files, rng: random.Random) -> str:
    """Shards elsewhere, of another kind, or missing."""
    index = json.loads(files[INDEX])
    targets = [
        *("../outside.safetensors", "../../etc/passwd", "/etc/passwd", "/dev/zero", "pytorch_model.bin", "evil.py"),
        *("", ".", "..", "missing.safetensors", "config.json", "sub/../../outside.safetensors", "a\nb.safetensors"),
    ]
    target = rng.choice([*targets, *HOSTILE_NAMES])
    keys = rng.sample(sorted(index["weight_map"]), rng.choice([1, 3, len(index["weight_map"])]))
    index["weight_map"] |= dict.fromkeys(keys, target)
    if rng.random() < 0.2:
        edit_config(files, lambda config: str(config.pop("dtype", None)))
    files[INDEX] = dump(index)
    files["pytorch_model.bin"] = b"\x80\x04cos\nsystem\n(S'false'\ntR."
    return f"{len(keys)} tensors in {target!r:.60}"


def missing_files(files: Files, rng: random.Random) -> str:
    name = rng.choice(sorted(files))
    del files[name]
    return f"without {name}"


KINDS: dict[str, Callable[[Files, random.Random], str]] = {
    "config: another class or foreign code": config_classes,
    "config: any value": config_anywhere,
    "config: claims": config_claims,
    "config: damaged bytes": config_bytes,
    "config: duplicate keys": config_duplicate_keys,
    "config: map, entries": config_map_entry,
    "config: map, any value": config_map,
    "config without dtype, weights damaged": config_and_weights,
    "index: any value": index_values,
    "index: damaged bytes": index_bytes,
    "index: shards elsewhere": index_places,
    "missing file": missing_files,
    "weights: bits flipped": flip_weights,
    "weights: garbage": garbage_weights,
    "weights: header, any value": header_values,
    "weights: header, bytes": header_bytes,
    "weights: header, false claims": header_claims,
    "weights: truncated": truncate_weights,
    "weights: wrong tensors": tensors,
}
