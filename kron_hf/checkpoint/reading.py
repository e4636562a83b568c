"""Reads configs and models of strangers through transformers: what goes wrong comes out as one clean line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from kron_hf.checkpoint.claims import check_config
from kron_hf.escaping import one_line, shown

__all__ = ["clean_errors", "read_config"]


@contextmanager
def clean_errors(name: str) -> Iterator[None]:
    """Turns whatever transformers raises on a broken checkpoint into a ValueError or OSError of one printable line.

    Args:
        name: What is read, for the message.

    Raises:
        OSError: The block raised an OSError.
        ValueError: The block raised anything else, a TypeError or KeyError over a malformed file, say.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        message = one_line(str(error))
        if message == str(error):
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(message) from error
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"{shown(name)}: transformers cannot load this checkpoint ({reason})") from error


def read_config(name: str, **kwargs: Any) -> PreTrainedConfig | tuple[PreTrainedConfig, dict[str, Any]]:
    """`AutoConfig.from_pretrained` for a file that nobody vouches for.

    Args:
        name: Directory, or id on the Hub.
        **kwargs: As for `AutoConfig.from_pretrained`.

    Raises:
        OSError: There is no readable `config.json`.
        ValueError: It is malformed, or claims more than any real model has.
    """
    where = {key: kwargs[key] for key in ("cache_dir", "revision", "subfolder", "token") if key in kwargs}
    if Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").is_file():
        raise ValueError(f"{Path(name).name} is an adapter; pass what merge_and_unload() makes of it and its base")
    with clean_errors(name):
        content, _ = PreTrainedConfig.get_config_dict(name, **where)
        if not isinstance(content, dict):
            raise ValueError(f"config.json must hold a JSON object, got {shown(content)}")
        # Before AutoConfig makes a dict of as many labels as the file claims.
        check_config(content)
        # Without an answer transformers asks on the terminal whether to run the repository's code.
        return AutoConfig.from_pretrained(name, **{"trust_remote_code": False, **kwargs})
