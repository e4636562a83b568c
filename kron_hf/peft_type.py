"""The name "KRON" among PEFT's methods.

PEFT looks methods up by members of its `PeftType` enum and offers no way to add one, so one is put into the enum here.
Private attributes of it that are touched, in this file and in no other: `_member_map_`, `_member_names_`,
`_value2member_map_`, `_name_`, `_value_`, `_sort_order_`.
"""

from importlib.metadata import version
from typing import Any

from peft.utils.peft_types import PeftType

from kron_hf.versions import REQUIRED

__all__ = ["kron_peft_type"]

NAME = "KRON"


def kron_peft_type(enum: Any = PeftType) -> PeftType:
    """The member "KRON" of PEFT's enum of methods, which is added to it on the first call.

    Args:
        enum: The enum, if not the installed peft's.

    Raises:
        ImportError: The installed peft keeps its methods in another way.
    """
    try:
        if NAME not in enum.__members__:
            _add_member(enum)
        member = enum(NAME)
        works = (
            member is getattr(enum, NAME) is enum[NAME] is enum.__members__[NAME]
            and (member.name, member.value) == (NAME, NAME)
            and isinstance(member, enum)
            and list(enum).count(member) == 1
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ImportError(_unsupported()) from error
    if not works:
        raise ImportError(_unsupported())
    return member


def _add_member(enum: Any) -> None:
    member = str.__new__(enum, NAME)
    member._name_, member._value_, member._sort_order_ = NAME, NAME, len(enum._member_names_)
    # Enums refuse ordinary assignment.
    type.__setattr__(enum, NAME, member)
    enum._member_map_[NAME] = member
    enum._value2member_map_[NAME] = member
    enum._member_names_.append(NAME)


def _unsupported() -> str:
    return (
        f"kron_hf supports peft{REQUIRED['peft']}, this is peft {version('peft')}, whose PeftType does not take a "
        "new method; install a supported version of peft or a newer kron_hf"
    )
