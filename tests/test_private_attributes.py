"""What kron_hf takes for granted of other libraries without their word stands in one file each, and is tried.

The tests of `test_private_*.py` need as little of kron_hf as possible. The first of them to fail with a new version
says what that version broke.
"""

import pytest
import test_private_loading  # noqa: F401  # each names what it tests
import test_private_peft  # noqa: F401
import test_private_torch  # noqa: F401
import test_private_training  # noqa: F401
from private_names import (
    OVERRIDDEN,
    PRIVATE,
    TESTED,
    UNDOCUMENTED,
    class_at,
    files_with,
    foreign_private_names,
    overridden_private_methods,
    relies_on,
)


@pytest.mark.parametrize(("name", "file"), [*PRIVATE.items(), *UNDOCUMENTED.items()])
def test_one_file_touches_it(name, file):
    assert files_with(name) == {file}


def test_every_private_name_is_in_the_table():
    assert foreign_private_names() == set(PRIVATE)
    assert overridden_private_methods() == {name: class_at(path) for name, path in OVERRIDDEN.items()}


def test_every_name_in_the_table_is_tested():
    assert {*PRIVATE, *UNDOCUMENTED, *OVERRIDDEN} == TESTED


def test_a_failure_names_the_version_and_what_broke():
    @relies_on("pytest")
    def broken():
        """Nothing is ever zero."""
        assert min(1, 0)

    with pytest.raises(AssertionError, match=rf"^pytest {pytest.__version__} broke .*: Nothing is ever zero\.$"):
        broken()
