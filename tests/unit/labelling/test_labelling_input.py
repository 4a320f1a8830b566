"""What is refused before a tokenizer or model is loaded."""

from pathlib import Path
from typing import Any

import pytest
from unit.labelling.conftest import LABEL, ROWS, SAMPLES, write

from kdrl_core.config import Recipe, load_recipe
from kdrl_core.errors import DataError, KdrlError, ModelError, RecipeError
from kdrl_core.labelling import LabelOptions, plan_labels


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": 16}, RecipeError, r"--samples 16 differs from stage2\.data\.difficulty\.num_samples=4.*add --set"),
        ({"stage": "stage3"}, RecipeError, r"has no stage 'stage3'; set --stage to stage1 or stage2"),
        ({"model": "no-such-model", "label": "x"}, ModelError, "^--model no-such-model: no such directory .*; give a"),
        (
            {"model": "builtin:miniature/teacher"},
            RecipeError,
            rf"^--model builtin:miniature/teacher: its label needs a name .* '{LABEL}' is the student's; add --label",
        ),
        ({"files": ["none.jsonl"]}, DataError, r"none\.jsonl does not exist"),
        ({"rows": []}, DataError, "no problems in it; give files with rows"),
        ({"rows": [{**ROWS[0], "answer": ""}]}, DataError, "row 1, field 'answer': empty; drop the row"),
        (
            {"rows": [{**ROWS[0], "id": "p"}, {**ROWS[1], "id": "p"}]},
            DataError,
            r"^problem_id 'p' stands on two questions, '3\+5' \(source in\.jsonl\) and '2\*4' \(source in\.jsonl\); "
            r"make ids unique, or leave them out",
        ),
        (
            {"rows": [ROWS[0], ROWS[1], {**ROWS[0], "answer": "9", "source": "mine"}]},
            DataError,
            r"^problem_id 'q-\w+', question '3\+5': the answer is '8' in one row \(source in\.jsonl\) and '9' in "
            r"another \(source mine\); make the answers agree, remove one of the rows, or give each an id of its own$",
        ),
    ],
)
def test_bad_input_is_refused(
    recipe: Recipe, tmp_path: Path, options: dict[str, Any], error: type[KdrlError], message: str
) -> None:
    source = write(tmp_path / "in.jsonl", options.pop("rows", ROWS))
    with pytest.raises(error, match=message):
        plan_labels(recipe, options.pop("files", [source]), LabelOptions(**options))


def test_limits_beyond_the_context_are_refused(tmp_path: Path) -> None:
    recipe = load_recipe("miniature", [SAMPLES, "stage2.max_response_tokens=120"])
    with pytest.raises(
        RecipeError, match=r"144, beyond the context of .* of 128; add --set stage2.max_response_tokens=104"
    ):
        plan_labels(recipe, [write(tmp_path / "in.jsonl", ROWS)])


def test_malformed_rows_can_be_dropped(tmp_path: Path) -> None:
    recipe = load_recipe("miniature", [SAMPLES, "stage2.data.max_malformed_share=0.5"])
    source = write(tmp_path / "in.jsonl", [ROWS[0], {**ROWS[1], "answer": ""}])
    assert len(plan_labels(recipe, [source], LabelOptions(on_error="drop")).problems) == 1


def test_the_recipes_own_student_is_named_as_such(tmp_path: Path) -> None:
    recipe = load_recipe("miniature", [SAMPLES, "student.path=no-such-model"])
    with pytest.raises(ModelError, match=r"^student\.path=no-such-model: no such directory"):
        plan_labels(recipe, [write(tmp_path / "in.jsonl", ROWS)])


@pytest.mark.parametrize(
    "other",
    [
        {**ROWS[0], "problem": "3  + 5"},  # the same question to a reader
        {"id": "mine", "problem": "3 + 5", "answer": "9"},  # an answer of its own, under its own id
    ],
)
def test_rows_that_do_not_disagree_are_taken(recipe: Recipe, tmp_path: Path, other: dict[str, Any]) -> None:
    rows = [{**ROWS[0], "problem": "3 + 5"}, other]
    plan = plan_labels(recipe, [write(tmp_path / "in.jsonl", rows)])
    assert plan.todo == ((0, 1) if "id" in other else (0,))
