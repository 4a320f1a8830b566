"""A user's estimators and terms are tried before a run starts, so that what is wrong with them costs nothing."""

from pathlib import Path

import pytest

from kdrl_core.boxes.preflight import check_inputs
from kdrl_core.config import load_recipe
from kdrl_core.errors import RecipeError
from kdrl_core.objectives.trial import fault_of

CODE = """
import os, sys
print("at import")
sys.stdout.write("more")

def right(responses):
    return (responses.logprobs - responses.old_logprobs).exp() * responses.entropy

def flat(log_ratio):
    return log_ratio.mean()

def fails(responses):
    raise KeyError("x")

def ends(responses):
    os._exit(3)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (path := tmp_path / "mine.py").write_text(CODE)
    return path


def test_what_works_is_silent_whatever_it_prints(file: Path) -> None:
    assert fault_of("term", f"{file}:right", "of this file") is None


@pytest.mark.parametrize(
    ("slot", "name", "told"),
    [
        (
            "terms=[{{function: '{0}:rihgt', coefficient: 0.1}}]",
            "terms.0.function",
            "rihgt is not there in {0}; name a",
        ),
        ("terms=[{{function: '{0}:fails', coefficient: 1}}]", "terms.0.function", "{0}:fails, line 13: KeyError: 'x'"),
        ("terms=[{{function: '{0}:ends', coefficient: 1}}]", "terms.0.function", "ended the process with exit code 3"),
        ("kl_estimator={0}:flat", "kl_estimator", "expected shape [B, T] = (2, 3), given (); correct it there"),
    ],
)
def test_a_run_with_a_function_that_cannot_work_is_not_started(file: Path, slot: str, name: str, told: str) -> None:
    recipe = load_recipe("miniature", [f"stage2.{slot.format(file)}"])
    with pytest.raises(RecipeError) as error:
        check_inputs(recipe)
    assert str(error.value).startswith(f"recipe miniature, field 'stage2.{name}': ")
    assert told.format(file) in str(error.value)
