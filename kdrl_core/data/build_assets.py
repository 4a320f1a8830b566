"""Build the problems and benchmarks in kdrl_core/assets from normalised JSON Lines.

    python -m kdrl_core.data.build_assets --source DIR [--output DIR]

DIR holds `eval/<benchmark>.jsonl` and `train/{deepscaler_aime,deepscaler_math,omni_math_num}.jsonl`; their sources and
licences are in kdrl_core/assets/README.md. The same input gives the same bytes (Parquet: with the same pyarrow).

The problems are real, but the **difficulty labels are made up** by a logistic model (Rasch). A problem has a hidden
difficulty z (its contest position or level, plus noise), a model m has an ability a_m, and each of 16 samples is right
with probability σ(a_m − z + noise_m). The label counts the wrong samples. As in the published data, harder problems
have more failures, labels correlate over models, some are 16, some are 0, and a few are missing.
"""

import argparse
import hashlib
import json
import math
import shutil
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdrl_core.config.paths import ASSETS
from kdrl_core.data.schema import SKYWORK_LABELS, SKYWORK_SCHEMA
from kdrl_core.errors import DataError

BENCHMARKS = ("aime24", "aime25", "amc23", "math500", "minerva_math", "olympiad_bench")
TRAIN_FILES = ("deepscaler_aime", "deepscaler_math", "omni_math_num")
SEED = 20250
NUM_SAMPLES = 16
NOTICE = (
    "Real problems, SYNTHETIC difficulty labels: model_difficulty was drawn from a seeded logistic model by "
    "kdrl_core.data.build_assets and was measured on no model. Do not report results that rest on it."
)

_ABILITY = {
    "DeepSeek-R1-Distill-Qwen-1.5B": 0.6,
    "DeepSeek-R1-Distill-Qwen-7B": 2.0,
    "DeepSeek-R1-Distill-Qwen-32B": 2.8,
}
_PROBLEM_SPREAD, _MODEL_SPREAD = 2.2, 0.5
_NO_LABELS, _NO_LABEL_OF_ONE = 0.01, 0.005


def build_assets(source: Path, output: Path) -> None:
    """Write benchmarks/*.jsonl, problems/deepscaler.json and problems/skywork_synthetic_labels.parquet below `output`.

    Raises:
        DataError: a source file is missing or not JSON Lines.
    """
    for folder in ("benchmarks", "problems"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for name in BENCHMARKS:
        _rows(source / "eval" / f"{name}.jsonl")
        shutil.copyfile(source / "eval" / f"{name}.jsonl", output / "benchmarks" / f"{name}.jsonl")
    train = {name: _rows(source / "train" / f"{name}.jsonl") for name in TRAIN_FILES}
    _write_deepscaler([*train["deepscaler_aime"], *train["deepscaler_math"]], output / "problems" / "deepscaler.json")
    _write_skywork(train, output / "problems" / "skywork_synthetic_labels.parquet")


def synthetic_failures(problem_id: str, difficulty: float) -> dict[str, int | None] | None:
    """Made-up labels of one problem: model → failures of 16, None where a label is missing.

    Args:
        difficulty: z before noise, in logits; an ability of 0 solves a problem of difficulty 0 half the time.
    """
    if _uniform(problem_id, "no labels") < _NO_LABELS:
        return None
    hidden = difficulty + _PROBLEM_SPREAD * _normal(problem_id, "problem")
    labels: dict[str, int | None] = {}
    for name in SKYWORK_LABELS:
        skill = _ABILITY[name] - hidden + _MODEL_SPREAD * _normal(problem_id, name)
        chance = 1.0 / (1.0 + math.exp(-skill))
        labels[name] = sum(_uniform(problem_id, f"{name} {i}") >= chance for i in range(NUM_SAMPLES))
    if _uniform(problem_id, "no label of one") < _NO_LABEL_OF_ONE:
        labels[SKYWORK_LABELS[0]] = None
    return labels


def _write_deepscaler(rows: list[dict[str, Any]], path: Path) -> None:
    """A JSON array of {problem, answer, solution}, one row a line; `solution` is left out where a row has none."""
    fields = ("problem", "answer", "solution")
    lines = [json.dumps({name: row[name] for name in fields if name in row}, ensure_ascii=False) for row in rows]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8", newline="\n")


def _write_skywork(train: dict[str, list[dict[str, Any]]], path: Path) -> None:
    records: list[dict[str, Any]] = []
    for name, rows in train.items():
        for row in rows:
            records.append(
                {
                    "data_source": f"synthetic-labels-{name.replace('_', '-')}",
                    "prompt": [{"content": row["problem"], "role": "user"}],
                    "ability": "math",
                    "reward_model": {"ground_truth": json.dumps([row["answer"]]), "style": "rule"},
                    "extra_info": {
                        "index": len(records),
                        "model_difficulty": synthetic_failures(row["id"], _difficulty(name, row)),
                    },
                }
            )
    schema = SKYWORK_SCHEMA.with_metadata({"kdrl.notice": NOTICE, "kdrl.label_seed": str(SEED)})
    pq.write_table(pa.Table.from_pylist(records, schema), path, compression="zstd", compression_level=19)


def _difficulty(name: str, row: dict[str, Any]) -> float:
    """z before noise: from the position 1–15 in an AIME, the level 0–5 in MATH or 1–9.5 in Omni-MATH."""
    if name == "deepscaler_aime":
        position = int(row["id"].rsplit("-", 1)[1])
        return -0.4 + 0.28 * position
    if name == "deepscaler_math":
        return -3.4 + 0.7 * float(row["level"])
    return -1.6 + 0.6 * float(row["difficulty"])


def _uniform(problem_id: str, use: str) -> float:
    """A number in (0, 1) from a hash: the same on every platform and in every order."""
    digest = hashlib.sha256(f"{SEED}\0{use}\0{problem_id}".encode()).digest()
    return (int.from_bytes(digest[:6]) + 0.5) / 2.0**48


def _normal(problem_id: str, use: str) -> float:
    return NormalDist().inv_cdf(_uniform(problem_id, f"normal {use}"))


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON Lines ({error}); give the folder with --source") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="folder with eval/ and train/ JSON Lines")
    parser.add_argument("--output", type=Path, default=ASSETS, help="assets folder (default: the package's own)")
    arguments = parser.parse_args()
    try:
        build_assets(arguments.source, arguments.output)
    except DataError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
