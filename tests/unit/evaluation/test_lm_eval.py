"""The shape that readers of lm-evaluation-harness's results expect."""

import json

from kdrl_core.evaluation.lm_eval import lm_eval_results


def test_shape() -> None:
    found = {
        "accuracy": 0.5,
        "stderr": 0.25,
        "num_problems": 2,
        "num_samples": 2,
        "pass_at_k": {"1": 0.5, "2": 1.0},
        "maj_at_k": 0.75,
    }
    content = {"model": "student", "seconds": 1.5, "benchmarks": {"aime24": found}}
    shaped = json.loads(json.dumps(lm_eval_results(content, temperature=0.6, seed=7)))
    assert shaped["results"] == {
        "aime24": {
            "alias": "aime24",
            "exact_match,none": 0.5,
            "pass@1,none": 0.5,
            "pass@2,none": 1.0,
            "maj,none": 0.75,
            "exact_match_stderr,none": 0.25,
        }
    }
    assert shaped["n-samples"] == {"aime24": {"original": 2, "effective": 2}}
    assert shaped["configs"]["aime24"]["repeats"] == 2
    assert shaped["config"]["random_seed"] == 7
    assert set(shaped["versions"]) == set(shaped["n-shot"]) == set(shaped["higher_is_better"]) == {"aime24"}


def test_one_problem_has_no_standard_error() -> None:
    found = {
        "accuracy": 1.0,
        "stderr": 0.0,
        "num_problems": 1,
        "num_samples": 1,
        "pass_at_k": {"1": 1.0},
        "maj_at_k": 1.0,
    }
    shaped = lm_eval_results({"model": "m", "seconds": 1.0, "benchmarks": {"one": found}}, temperature=0.0, seed=0)
    assert shaped["results"]["one"]["exact_match_stderr,none"] == "N/A"
