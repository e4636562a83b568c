"""The one place that adds a member to PEFT's enum of methods."""

import enum

import pytest
from peft import PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from kron_hf import KronConfig
from kron_hf.peft_tuner import KronModel, register
from kron_hf.peft_type import kron_peft_type


def fresh_enum():
    return enum.Enum("PeftType", {"LORA": "LORA", "IA3": "IA3"}, type=str)


def test_the_installed_peft_knows_the_method():
    member = PeftType("KRON")
    assert member is PeftType.KRON is PeftType["KRON"] is kron_peft_type() is KronConfig().peft_type
    assert (member.name, member.value, str(member)) == ("KRON", "KRON", "PeftType.KRON")
    assert list(PeftType).count(member) == 1
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is KronConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is KronModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "kron_"
    assert isinstance(get_peft_config({"peft_type": "KRON", "rank": 2}), KronConfig)


def test_a_second_registration_changes_nothing():
    before = (list(PeftType), dict(PeftType.__members__), dict(PEFT_TYPE_TO_CONFIG_MAPPING))
    register()
    assert kron_peft_type() is PeftType.KRON
    assert (list(PeftType), dict(PeftType.__members__), dict(PEFT_TYPE_TO_CONFIG_MAPPING)) == before


def test_the_other_members_stay_as_they_are():
    grown = fresh_enum()
    lora, ia3 = grown.LORA, grown.IA3
    member = kron_peft_type(grown)
    assert list(grown) == [lora, ia3, member]
    assert grown("LORA") is lora is grown.LORA
    with pytest.raises(ValueError, match="'OFT' is not a valid PeftType"):
        grown("OFT")


UNSUPPORTED = {
    "a class": type("PeftType", (), {"__members__": {"LORA": "LORA"}}),
    "a dict": {"LORA": "LORA"},
    "an enum of numbers": enum.Enum("PeftType", {"LORA": 1}),
    "another value of this name": enum.Enum("PeftType", {"KRON": "KRONECKER"}, type=str),
    "another member of this value": enum.Enum("PeftType", {"KRON": "KRONECKER", "OTHER": "KRON"}, type=str),
}


@pytest.mark.parametrize("other", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_a_peft_that_takes_no_new_method_is_named(other):
    with pytest.raises(ImportError, match=r"kron_hf supports peft>=0\.21,<1, this is peft \d+\.\d+.*PeftType"):
        kron_peft_type(other)


def test_another_library_with_the_same_name_is_not_replaced(monkeypatch):
    class Other:
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.KRON, Other)
    with pytest.raises(ImportError, match="PEFT already has a method 'kron', of test_peft_type"):
        register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.KRON] is Other
