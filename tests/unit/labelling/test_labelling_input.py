"""What is refused before a tokenizer or model is loaded."""

from pathlib import Path
from typing import Any

import pytest
from unit.labelling.conftest import ROWS, SAMPLES, write

from kdrl_core.config import Recipe, load_recipe
from kdrl_core.errors import DataError, KdrlError, ModelError, RecipeError
from kdrl_core.labelling import plan_labels


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": 16}, RecipeError, r"--samples 16 differs from stage2\.data\.difficulty\.num_samples=4.*add --set"),
        ({"stage": "stage3"}, RecipeError, r"has no stage 'stage3'; set --stage to stage1 or stage2"),
        ({"model": "no-such-model"}, ModelError, "student.path=no-such-model: no such directory"),
        ({"files": ["none.jsonl"]}, DataError, r"none\.jsonl does not exist"),
        ({"rows": []}, DataError, "no problems in it; give files with rows"),
        ({"rows": [{**ROWS[0], "answer": ""}]}, DataError, "row 1, field 'answer': empty; drop the row"),
        (
            {"rows": [{**ROWS[0], "id": "p"}, {**ROWS[1], "id": "p"}]},
            DataError,
            r"row 2 of the input, field 'problem_id': 'p' stands on another problem .*'3\+5'\); make ids unique",
        ),
    ],
)
def test_bad_input_is_refused(
    recipe: Recipe, tmp_path: Path, options: dict[str, Any], error: type[KdrlError], message: str
) -> None:
    source = write(tmp_path / "in.jsonl", options.pop("rows", ROWS))
    with pytest.raises(error, match=message):
        plan_labels(recipe, options.pop("files", [source]), **options)


def test_limits_beyond_the_context_are_refused(tmp_path: Path) -> None:
    recipe = load_recipe("miniature", [SAMPLES, "stage2.max_response_tokens=120"])
    with pytest.raises(
        RecipeError, match=r"144, beyond the context of .* of 128; add --set stage2.max_response_tokens=104"
    ):
        plan_labels(recipe, [write(tmp_path / "in.jsonl", ROWS)])


def test_malformed_rows_can_be_dropped(recipe: Recipe, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [ROWS[0], {**ROWS[1], "answer": ""}])
    assert len(plan_labels(recipe, [source], on_error="drop").problems) == 1
