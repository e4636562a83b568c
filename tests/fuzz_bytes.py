"""Seeded mutations of bytes and of parsed JSON, as the fuzz tests use them."""

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

HOSTILE_NAMES = [
    "\x1b[31mred\x1b[0m",
    "two\nlines",
    "\u202egnp.exe",
    "null\x00byte",
    "<script>alert(1)</script>",
    "| cell | [x](javascript:alert(1)) `code`",
    "(a+)+$",
    "../../../etc/passwd",
    "/etc/passwd",
    "..",
    "",
    "a" * 20_000,
    "vit..layers",
    "__class__",
    "__dict__.x",
    "lone \ud800 surrogate",
    "{0.__class__}%s%n",
    "vit.layers.0.mlp.fc1\r",
]
HOSTILE_NUMBERS = [0, -1, 1, 2**31, 2**60, 2**63, 2**64, 10**30, -(2**63), 1.5, 1e308]
# Python's json writes and reads NaN and Infinity.
HOSTILE_VALUES = [
    *HOSTILE_NUMBERS,
    *HOSTILE_NAMES,
    *(None, True, False, float("nan"), float("inf")),
    *([], {}, [[]], [None], [1, 2, 3], {"a": 1}, {"quant_method": "kron"}, list(range(2000))),
]


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value] if levels % 2 else {"a": value}
    return value


def random_value(rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return nested(rng.choice([5, 40, 41, 400, 401, 900]))
    return copy.deepcopy(rng.choice(HOSTILE_VALUES))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside parsed JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def with_random_value(content: Any, rng: random.Random) -> str:
    """Puts a random value somewhere into parsed JSON, in place, or takes or renames a key; says where."""
    holder, key = rng.choice(list(places(content)))
    action = rng.choice(["set", "set", "set", "remove", "rename", "add"])
    if action == "set":
        holder[key] = random_value(rng)
    elif action == "remove":
        del holder[key]
    elif action == "rename" and isinstance(holder, dict):
        holder[rng.choice(HOSTILE_NAMES)] = holder.pop(key)
    elif isinstance(holder, dict):
        holder[rng.choice(HOSTILE_NAMES)] = random_value(rng)
    else:
        holder.append(random_value(rng))
    return f"{action} at {key!r:.60}"


def dump(content: Any) -> bytes:
    return json.dumps(content).encode()


def truncated(data: bytes, rng: random.Random, edges: list[int]) -> tuple[bytes, str]:
    """The beginning of a file, ending at a random place or right at, before or after one of the edges."""
    length = rng.randrange(len(data)) if rng.random() < 0.5 else rng.choice(edges) + rng.choice([-1, 0, 1])
    length = min(max(length, 0), len(data) - 1)
    return data[:length], f"truncated to {length} of {len(data)}"


def flipped(data: bytes, rng: random.Random, start: int, stop: int) -> tuple[bytes, str]:
    """One to three bits between two offsets turned over."""
    content = bytearray(data)
    where = [rng.randrange(start, stop) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    for offset in where:
        content[offset] ^= 1 << rng.randrange(8)
    return bytes(content), f"bits flipped at {where}"


def garbage(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    kinds: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "random": lambda: rng.randbytes(rng.choice([1, 8, 100, 5000])),
        "zeros": lambda: bytes(len(data)),
        "pickle": lambda: b"\x80\x04cos\nsystem\n(S'false'\ntR.",
        "zip": lambda: b"PK\x03\x04" + bytes(60),
        "utf-16": lambda: "{}".encode("utf-16"),
        "invalid utf-8": lambda: b'{"a": "\xff\xfe\xc3"}',
        "appended": lambda: data + rng.randbytes(100),
        "twice": lambda: data + data,
        "large": lambda: data + b" " * 3_000_000,
        "not json": lambda: b"{" * 2000,
        "nested": lambda: b"[" * 5000 + b"]" * 5000,
        "huge int": lambda: b'{"hidden_size": ' + b"9" * 5000 + b"}",
        "scalar": lambda: rng.choice([b"1", b"null", b'"text"', b"[]", b"{}", b"NaN"]),
    }
    kind = rng.choice(sorted(kinds))
    return kinds[kind](), kind


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(header: Any, payload: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else dump(header)
    return struct.pack("<Q", len(raw)) + raw + payload
