"""Results in the shape of lm-evaluation-harness's results file (as 0.4.13 writes it), for the tools that read it.

Departures: kdrl leaves out what it does not know or have (versions of the harness and its libraries, `git_hash`, chat
template, data set path, `bootstrap_iters`) and makes nothing up. In `n-samples`, both `original` and `effective` are
the number of problems that were asked, after the benchmark's `max_problems`.
"""

import re
from collections.abc import Mapping
from typing import Any

LM_EVAL_RESULTS = "lm_eval.json"
_SOURCE = "kdrl"
_VERSION = 1.0
"""Version of the tasks: a float, as in the harness."""


def lm_eval_results(content: Mapping[str, Any], *, temperature: float, seed: int) -> dict[str, Any]:
    """`results.json` of an evaluation in the form that lm-evaluation-harness writes; metric keys are `<metric>,none`.

    `exact_match` is Avg@k by kdrl's verifier, not a metric of the harness: compare it with other kdrl evaluations, not
    with a harness task of the same name.

    Args:
        content: `model`, `seconds`, `benchmarks` and, if known, `date` of results.json.
        temperature: of sampling.
        seed: of the recipe.
    """
    benchmarks: Mapping[str, Any] = content["benchmarks"]
    model = str(content["model"])
    figures = {name: _figures(found) for name, found in benchmarks.items()}
    shaped = {
        "results": {name: _metrics(name, benchmarks[name]["num_problems"], figures[name]) for name in benchmarks},
        "group_subtasks": {},
        "configs": {name: _config(name, benchmarks[name], figures[name], temperature) for name in sorted(benchmarks)},
        "versions": dict.fromkeys(sorted(benchmarks), _VERSION),
        "n-shot": dict.fromkeys(sorted(benchmarks), 0),
        "higher_is_better": {name: dict.fromkeys(figures[name], True) for name in sorted(benchmarks)},
        "n-samples": {
            name: {"original": found["num_problems"], "effective": found["num_problems"]}
            for name, found in benchmarks.items()
        },
        "config": {
            "model": _SOURCE,
            "model_args": f"pretrained={model}",
            "batch_size": None,
            "batch_sizes": [],
            "device": None,
            "use_cache": None,
            "limit": None,
            "gen_kwargs": None,  # what the command line adds to the tasks' own
            "random_seed": seed,
            "numpy_seed": None,
            "torch_seed": None,
            "fewshot_seed": None,
        },
        "task_hashes": {},  # of logged samples
        "model_source": _SOURCE,
        "model_name": model,
        "model_name_sanitized": re.sub(r'["<>:/|\\?*\[\]]+', "__", model),
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": None,
        "total_evaluation_time_seconds": str(content["seconds"]),
    }
    return shaped | ({"date": content["date"]} if "date" in content else {})


def _figures(found: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Metric → its value and standard error; the error is None if an older kdrl did not keep it."""
    errors: Mapping[str, float] = found.get("stderrs", {})
    passes = {f"pass@{k}": (value, errors.get(f"pass@{k}")) for k, value in found["pass_at_k"].items()}
    majority = found["maj_at_k"], errors.get(f"maj@{found['num_samples']}")
    return {"exact_match": (found["accuracy"], found["stderr"]), **passes, "maj": majority}


def _metrics(name: str, num_problems: int, figures: Mapping[str, tuple[float, float | None]]) -> dict[str, Any]:
    metrics: dict[str, Any] = {"name": name, "alias": name, "sample_len": num_problems}
    for metric, (value, stderr) in figures.items():
        is_known = stderr is not None and num_problems > 1
        metrics[f"{metric},none"] = value
        metrics[f"{metric}_stderr,none"] = stderr if is_known else "N/A"  # the harness's word for no error
    return metrics


def _config(name: str, found: Mapping[str, Any], metrics: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    return {
        "task": name,
        "num_fewshot": 0,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
        "output_type": "generate_until",
        "generation_kwargs": {
            "until": [],
            "do_sample": temperature > 0.0,
            "temperature": temperature,
            "top_p": 1.0,
        },
        "repeats": found["num_samples"],
        "metadata": {"version": _VERSION},
    }
