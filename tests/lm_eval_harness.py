"""What lm-evaluation-harness itself writes and reads: run as a script by an interpreter that has `lm_eval`.

    python tests/lm_eval_harness.py write FOLDER     evaluate scripted answers; FOLDER gets the harness's results file
    python tests/lm_eval_harness.py read FILE        FILE through the harness's readers; prints JSON

tests/golden/lm_eval-<version>.json is what `write` gave, less what tells of the machine and the moment. pass@k is
counted here over all subsets of k answers, which owes nothing to kdrl's formula.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

TASK = "toy"
ANSWERS: dict[str, list[str]] = {
    "1+1": ["2", "2", "3", "2"],
    "2+2": ["5", "4", "5", "6"],
    "3+3": ["6", "6", "6", "6"],
    "4+4": ["1", "2", "3", "1"],
    "5+5": ["10", "9", "10", "7"],
}
"""Four responses to each problem."""
TRUTHS = {"1+1": "2", "2+2": "4", "3+3": "6", "4+4": "8", "5+5": "10"}
METRICS = ("exact_match", "pass@1", "pass@2", "pass@4", "maj")
OF_THE_MACHINE = ("pretty_env_info", "transformers_version", "git_hash", "upper_git_hash")
"""Null in the golden file."""


def process_results(doc: dict[str, str], results: Sequence[Any]) -> dict[str, float]:
    """One problem's figures: a task's own code, as the harness calls it."""
    answers: list[str] = results[0] if isinstance(results[0], list) else list(results)
    right = [float(answer == doc["answer"]) for answer in answers]
    passes = {f"pass@{k}": fmean(max(subset) for subset in combinations(right, k)) for k in (1, 2, 4)}
    ((favourite, _),) = Counter(answers).most_common(1)
    return {"exact_match": fmean(right), **passes, "maj": float(favourite == doc["answer"])}


def write(folder: Path) -> None:
    """Let the harness evaluate ANSWERS."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.loggers import EvaluationTracker

    class Scripted(LM):  # type: ignore[misc, unused-ignore]
        def __init__(self, **_: Any) -> None:
            super().__init__()

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            asked: Counter[str] = Counter()
            answers = []
            for request in requests:
                problem = request.args[0]
                answers.append(ANSWERS[problem][asked[problem]])
                asked[problem] += 1
            return answers

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
            raise NotImplementedError("the task generates")

        loglikelihood_rolling = loglikelihood

    register_model("scripted")(Scripted)
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # so that no path of this machine is in the file
    rows = [{"problem": problem, "answer": TRUTHS[problem]} for problem in ANSWERS]
    Path("toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "toy.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{problem}}",
        "doc_to_target": "{{answer}}",
        "process_results": process_results,
        "repeats": 4,
        "num_fewshot": 0,
        "generation_kwargs": {"until": ["</s>"], "do_sample": True, "temperature": 0.6, "top_p": 1.0},
        "filter_list": [{"name": "none", "filter": [{"function": "take_first_k", "k": 4}]}],
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
        "metadata": {"version": 1.0},
    }
    tracker = EvaluationTracker(output_path="out")
    found = simple_evaluate(
        model="scripted",
        model_args="pretrained=student-1",
        tasks=[task],
        evaluation_tracker=tracker,
        log_samples=False,
        random_seed=7,
    )
    tracker.save_results_aggregated(results=found)
    (written,) = Path("out").glob("*/results_*.json")
    content = json.loads(written.read_text()) | dict.fromkeys(OF_THE_MACHINE)
    content |= {"date": type(content["date"])(0), "total_evaluation_time_seconds": "1.5"}
    content["config"]["device"] = None
    content["configs"][TASK]["process_results"] = ""
    Path(f"lm_eval-{version('lm_eval')}.json").write_text(json.dumps(content, indent=1) + "\n")


def read(file: Path) -> dict[str, Any]:
    """The file through the harness's table, its schema, its naming of models and its aggregation of tasks to groups."""
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr
    from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker
    from lm_eval.result_schema import EvalResults, _EvalConfig, _SampleCount, _TaskMetrics
    from lm_eval.utils import make_table, sanitize_model_name

    content = json.loads(file.read_text())
    tasks = list(content["results"].values())
    sizes = [task["sample_len"] for task in tasks]
    return {
        "version": version("lm_eval"),
        "table": make_table(content),
        "model_name": GeneralConfigTracker._get_model_name(content["config"]["model_args"]),
        "sanitized": sanitize_model_name(content["model_name"]),
        "group": aggregate_subtask_metrics([task["exact_match,none"] for task in tasks], sizes),
        "group_stderr": pooled_sample_stderr([task["exact_match_stderr,none"] for task in tasks], sizes),
        "unknown": sorted(set(content) - set(EvalResults.__annotations__)),
        "unknown_config": sorted(set(content["config"]) - set(_EvalConfig.__annotations__)),
        "missing": sorted(
            {key for task in tasks for key in _TaskMetrics.__required_keys__ - set(task)}
            | {key for count in content["n-samples"].values() for key in _SampleCount.__required_keys__ - set(count)}
        ),
    }


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        print(json.dumps(read(Path(sys.argv[2]))))
