"""The working tree publishes the same bytes as the code before it. KDRL_TRIPWIRE_BASE names another commit."""

import os

import pytest
from tripwire import NoBaseError, compare_with


@pytest.mark.slow
def test_the_working_tree_publishes_the_same_bytes(capfd: pytest.CaptureFixture[str]) -> None:
    commit = os.environ.get("KDRL_TRIPWIRE_BASE")
    try:
        status = compare_with(commit, os.environ.get("KDRL_TRIPWIRE_MEANT", "").split())
    except NoBaseError as error:
        if commit:
            raise
        pytest.skip(f"there is nothing to compare with: {error}")
    assert status == 0, capfd.readouterr().out
