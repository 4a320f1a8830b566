"""The file for readers of lm-evaluation-harness: held against one that the harness has written, and read by it.

Without the package `lm_eval` the file is compared with tests/golden alone. To have the harness itself read it, install
it (here, or elsewhere and set KDRL_LM_EVAL_PYTHON to that interpreter).
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lm_eval_harness as harness
import pyarrow as pa
import pytest

from kdrl_core.evaluation.lm_eval import lm_eval_results
from kdrl_core.evaluation.outcome import benchmark_result
from kdrl_core.types import VerdictKind

GOLDEN = Path(__file__).parents[2] / "golden" / "lm_eval-0.4.13.json"
PYTHON = os.environ.get("KDRL_LM_EVAL_PYTHON") or (sys.executable if find_spec("lm_eval") else None)
needs_lm_eval = pytest.mark.skipif(PYTHON is None, reason="needs lm_eval, or KDRL_LM_EVAL_PYTHON set")

LEFT_OUT = {
    "bootstrap_iters",
    "chat_template",
    "chat_template_sha",
    "git_hash",
    "lm_eval_version",
    "pretty_env_info",
    "transformers_version",
    "upper_git_hash",
}
"""What kdrl does not know, or is not."""
UNKNOWN = {"numpy_seed", "torch_seed", "fewshot_seed", "fewshot_as_multiturn"}
"""Null in kdrl's: there is no such thing in its evaluations."""


def found(answers: dict[str, list[str]]) -> dict[str, Any]:
    """What kdrl finds over the same answers that the harness was given."""
    given = [(answer, harness.TRUTHS[problem]) for problem, group in answers.items() for answer in group]
    table = pa.table(
        {
            "accuracy_reward": [float(answer == truth) for answer, truth in given],
            "extracted": [answer for answer, _ in given],
            "verdict": [(VerdictKind.CORRECT if a == truth else VerdictKind.WRONG).value for a, truth in given],
            "length": [3] * len(given),
            "finish_reason": ["stop"] * len(given),
        }
    )
    return benchmark_result(table, 4, seed=7)


def shaped(**benchmarks: dict[str, Any]) -> dict[str, Any]:
    content = {"model": "student-1", "date": 12.5, "seconds": 1.5, "benchmarks": benchmarks}
    result: dict[str, Any] = json.loads(json.dumps(lm_eval_results(content, temperature=0.6, seed=7)))
    return result


def golden() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(GOLDEN.read_text())
    return content


def kinds(value: Any) -> Any:
    """Names of keys and types of values, all the way down; of a list those of its first element."""
    if isinstance(value, dict):
        return {key: kinds(each) for key, each in value.items()}
    return [kinds(each) for each in value[:1]] if isinstance(value, list) else type(value).__name__


def test_figures_are_those_of_the_harness() -> None:
    """Values, standard errors and their keys, of Avg@4, pass@k and maj@4."""
    ours, theirs = shaped(toy=found(harness.ANSWERS))["results"], golden()["results"]
    assert list(ours["toy"]) == list(theirs["toy"])
    assert ours["toy"] == {
        key: pytest.approx(value, abs=1e-12) if isinstance(value, float) else value
        for key, value in theirs["toy"].items()
    }


def test_keys_and_types_are_those_of_the_harness() -> None:
    ours, theirs = kinds(shaped(toy=found(harness.ANSWERS))), kinds(golden())
    for whole in (ours, theirs):
        whole |= {f"config.{key}": kind for key, kind in whole.pop("config").items()}
    configs, their_configs = ours.pop("configs")["toy"], theirs.pop("configs")["toy"]
    left_out = {key for key in theirs if key.removeprefix("config.") in LEFT_OUT}
    unknown = {key for key in theirs if key.removeprefix("config.") in UNKNOWN}
    assert set(theirs) - set(ours) == left_out
    assert {key: ours[key] for key in unknown} == dict.fromkeys(unknown, "NoneType")
    assert {k: v for k, v in ours.items() if k not in unknown} == {
        k: v for k, v in theirs.items() if k not in left_out | unknown
    }
    assert configs.pop("metadata").items() <= their_configs["metadata"].items()
    assert configs.pop("generation_kwargs") == their_configs["generation_kwargs"] | {"until": []}  # of no strings
    assert configs == {key: their_configs[key] for key in configs}


def test_what_is_said_of_the_evaluation() -> None:
    result = shaped(toy=found(harness.ANSWERS))
    assert result["config"]["random_seed"] == 7
    assert result["date"] == 12.5
    assert result["configs"]["toy"]["repeats"] == 4
    assert result["configs"]["toy"]["generation_kwargs"]["temperature"] == 0.6
    assert [each["metric"] for each in result["configs"]["toy"]["metric_list"]] == list(harness.METRICS)


def test_one_problem_has_no_standard_error() -> None:
    one = found({"1+1": harness.ANSWERS["1+1"]})
    errors = {key: value for key, value in shaped(one=one)["results"]["one"].items() if "_stderr" in key}
    assert errors == {f"{metric}_stderr,none": "N/A" for metric in harness.METRICS}


def test_evaluations_of_older_versions_say_that_they_kept_no_more() -> None:
    old = found(harness.ANSWERS)
    del old["stderrs"]
    result = lm_eval_results({"model": "m", "seconds": 1.0, "benchmarks": {"toy": old}}, temperature=0.0, seed=0)
    assert result["results"]["toy"]["pass@2_stderr,none"] == "N/A"
    assert result["results"]["toy"]["exact_match_stderr,none"] == pytest.approx(0.1767766952966369)
    assert "date" not in result


def run_harness(*arguments: str, **environment: str) -> str:
    assert PYTHON is not None
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **environment}
    done = subprocess.run(
        [PYTHON, harness.__file__, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **offline},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_lm_eval
@pytest.mark.slow
def test_the_harness_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "lm_eval.json"
    half = found({problem: harness.ANSWERS[problem] for problem in ("1+1", "2+2")})
    file.write_text(json.dumps(shaped(toy=found(harness.ANSWERS), half=half)))
    read = json.loads(run_harness("read", str(file)))
    assert (read["unknown"], read["unknown_config"], read["missing"]) == ([], [], [])
    assert (read["model_name"], read["sanitized"]) == ("student-1", "student-1")
    assert read["group"] == pytest.approx((5 * 0.5 + 2 * 0.5) / 7)
    assert read["group_stderr"] > 0.1
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in read["table"].splitlines()]
    assert rows[0] == ["Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr"]
    assert ["half", "1", "none", "0", "exact_match", "↑", "0.5000", "±", "0.2500"] in rows
    assert ["", "", "none", "0", "pass@2", "↑", "0.6667", "±", "0.1900"] in rows
    assert len(rows) == 2 + 2 * len(harness.METRICS)


@needs_lm_eval
@pytest.mark.slow
def test_the_golden_file_is_what_the_harness_writes(tmp_path: Path) -> None:
    run_harness("write", str(tmp_path), HF_HOME=str(tmp_path / "hf"))
    (written,) = tmp_path.glob("lm_eval-*.json")
    if written.name != GOLDEN.name:
        pytest.skip(f"the harness here is {written.stem}, the golden file is of {GOLDEN.stem}")
    assert json.loads(written.read_text()) == golden()
