"""Seeded mutations of a saved Kronecker adapter."""

import json
import random
from collections.abc import Callable
from typing import Any

from fuzz_bytes import HOSTILE_NAMES, HOSTILE_NUMBERS, dump, with_random_value
from fuzz_checkpoints import (
    Files,
    Mutation,
    config_bytes,
    flip_weights,
    garbage_weights,
    header_bytes,
    header_claims,
    header_values,
    missing_files,
    tensors,
    truncate_weights,
)

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def mutate_adapter(seed: int, intact: Files) -> Mutation:
    """The mutation of a seed; the same seed gives the same."""
    rng = random.Random(seed)
    kind = sorted(ADAPTER_KINDS)[seed % len(ADAPTER_KINDS)]
    files = dict(intact)
    return Mutation(kind, ADAPTER_KINDS[kind](files, rng), files)


def edit(files: Files, change: Callable[[dict[str, Any]], str]) -> str:
    config = json.loads(files[ADAPTER_CONFIG])
    detail = change(config)
    files[ADAPTER_CONFIG] = dump(config)
    return detail


def any_value(files: Files, rng: random.Random) -> str:
    return edit(files, lambda config: with_random_value(config, rng))


def map_value(files: Files, rng: random.Random) -> str:
    return edit(files, lambda config: with_random_value(config["modules"], rng))


def damaged_bytes(files: Files, rng: random.Random) -> str:
    return config_bytes(files, rng, ADAPTER_CONFIG)


def map_entries(files: Files, rng: random.Random) -> str:
    def change(config: dict[str, Any]) -> str:
        modules = config["modules"]
        name = rng.choice(sorted(modules))
        other = rng.choice([*HOSTILE_NAMES, "vit", "vit.layernorm", "classifier", "vit.layers.0.mlp", "fc1"])
        edits: dict[str, Callable[[], Any]] = {
            "size": lambda: modules[name].update(block_size=[rng.choice([1, 2, 3, 16, 2**40, 10**30]), 8]),
            "rank": lambda: modules[name].update(rank=rng.choice([2, 33, 2**62, 10**30])),
            "rename": lambda: modules.update({other: modules.pop(name)}),
            "add": lambda: modules.update({other: {"block_size": [1, 1], "rank": 1}}),
            "many": lambda: modules.update({f"{other:.50}{i}": modules[name] for i in range(5000)}),
            "drop": lambda: modules.pop(name),
            "version": lambda: config.update(format_version=rng.choice([*HOSTILE_NUMBERS, "1", None, [1]])),
        }
        edit_name = rng.choice(sorted(edits))
        edits[edit_name]()
        return f"{edit_name} of {name}"

    return edit(files, change)


def selections(files: Files, rng: random.Random) -> str:
    """Patterns, classes and places that a file may not choose."""

    def change(config: dict[str, Any]) -> str:
        bomb = "(.*a){25}$|((a+)+)+$"
        updates: list[dict[str, Any]] = [
            {"target_modules": rng.choice([bomb, ".*", "(", "all-linear", HOSTILE_NAMES])},
            {"exclude_modules": rng.choice([bomb, "[", HOSTILE_NAMES])},
            {"block_size_pattern": {bomb: 8}},
            {"rank_pattern": {"(": 1}},
            {"modules": None, "target_modules": bomb},
            {"modules": None},
            {"modules_to_save": rng.choice([["classifier"], ["vit"], [bomb], HOSTILE_NAMES, "classifier", [""], [1]])},
            {"peft_type": rng.choice(["LORA", "VERA", "PROMPT_TUNING", "kron", *HOSTILE_NAMES, None, 1])},
            {"task_type": rng.choice(["SEQ_CLS", "CAUSAL_LM", *HOSTILE_NAMES])},
            {"base_model_name_or_path": rng.choice([*HOSTILE_NAMES, None])},
            {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
            {"revision": rng.choice(HOSTILE_NAMES)},
            {rng.choice(["self", "cls", "args", "runtime_config"]): 1},
        ]
        update = rng.choice(updates)
        config.update(update)
        return f"{update!r:.100}"

    return edit(files, change)


def pickled_weights(files: Files, rng: random.Random) -> str:
    del files[ADAPTER_WEIGHTS]
    files["adapter_model.bin"] = b"\x80\x04cos\nsystem\n(S'false'\ntR."
    return "a pickle"


ADAPTER_KINDS: dict[str, Callable[[Files, random.Random], str]] = {
    "config: any value": any_value,
    "config: damaged bytes": damaged_bytes,
    "config: map, any value": map_value,
    "config: map, entries": map_entries,
    "config: selections": selections,
    "missing file": missing_files,
    "pickle": pickled_weights,
    "weights: bits flipped": flip_weights,
    "weights: garbage": garbage_weights,
    "weights: header, any value": header_values,
    "weights: header, bytes": header_bytes,
    "weights: header, false claims": header_claims,
    "weights: truncated": truncate_weights,
    "weights: wrong tensors": tensors,
}
