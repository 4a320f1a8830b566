"""The record: everything that is known of one rollout, in one row. It joins a step's files (tables/schemas.py).

On disk the files stay separate, because each is published when it is made. The view `rollouts`, exports, and imported
dumps of other trainers hold records. Only the ids are never null: an unfinished step has no rewards yet, plain GRPO has
no teacher, another trainer's dump has no tokens.
"""

import pyarrow as pa

from kdrl_core.ledger.graph import REFERENCE, REWARDS, ROLLOUTS, TEACHER, UPDATE
from kdrl_core.tables import schemas as schema

RECORD_VERSION = "1"
VERSION_KEY = b"kdrl.record_version"

_FLOATS = pa.list_(pa.float32())


def _of(source: pa.Schema, *names: str) -> list[pa.Field]:
    """Fields of a step's file as they are described there, but nullable."""
    return [source.field(name).with_nullable(True) for name in names]


def _field(name: str, kind: pa.DataType, text: str, *, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": text})


IDS = [
    _field("run", pa.string(), "name of the run", nullable=False),
    _field("stage", pa.string(), "stage of the run", nullable=False),
    _field("step", pa.int32(), "step of the stage, from 0: updates behind the policy that was sampled", nullable=False),
    schema.ROLLOUTS.field("prompt_id"),
    schema.ROLLOUTS.field("sample"),
]

RECORD = pa.schema(
    [
        *IDS,
        *_of(schema.ROLLOUTS, "prompt", "response", "ground_truth"),
        *_of(schema.REWARDS, "extracted", "verdict", "reason", "reward", "format_reward", "accuracy_reward"),
        *_of(schema.REWARDS_OF_FUNCTIONS, "reward_values"),
        *_of(schema.UPDATE, "advantage", "kd_weight", "kl_sum", "kl_mean", "log_ratio_sum"),
        *_of(schema.ROLLOUTS, "length", "finish_reason", "repetition_rate"),
        _field("entropy_mean", pa.float32(), "mean over tokens of the trainer's entropy; null where none is recorded"),
        *_of(schema.ROLLOUTS, "seed", "policy_version", "engine"),
        _field("rollout_s", pa.float64(), "seconds that sampling the whole step took"),
        _field("teacher_score_s", pa.float64(), "seconds that the teacher took to score the whole step"),
        _field("verify_s", pa.float64(), "seconds that verifying the whole step took"),
        _field("update_s", pa.float64(), "seconds that the step's update took"),
        *_of(schema.ROLLOUTS, "prompt_token_ids", "token_ids", "rollout_logprobs"),
        *_of(schema.UPDATE, "logprobs"),
        *_of(schema.TEACHER, "teacher_logprobs"),
        *_of(schema.REFERENCE, "ref_logprobs"),
        _field("entropies", _FLOATS, "the trainer's entropy at each token; null where none is recorded"),
    ],
    metadata={VERSION_KEY: RECORD_VERSION.encode()},
)
"""Version 1. Each field has a `description` in its metadata."""

TIMINGS = {
    "rollout_s": "time/rollout_s",
    "teacher_score_s": "time/teacher_score_s",
    "verify_s": "time/verify_s",
    "update_s": "time/update_s",
}
"""Column → its name in timings.parquet."""

PARTS: dict[str, tuple[str, ...]] = {
    ROLLOUTS.name: ("prompt", "response", "prompt_token_ids", "token_ids", "rollout_logprobs"),
    UPDATE.name: ("logprobs", "entropies"),
    TEACHER.name: ("teacher_logprobs",),
    REFERENCE.name: ("ref_logprobs",),
    REWARDS.name: ("reward_values",),
}
"""Artifact of a step → the columns of the record that only its file has: texts, and values per token or function, read
on demand. All other columns are single values, and are also in the index."""

BULKY = tuple(name for names in PARTS.values() for name in names)

SCALARS = tuple(name for name in RECORD.names if name not in {*BULKY, *TIMINGS, "run", "stage", "step", "entropy_mean"})
"""The columns that the index copies from the files unchanged."""


def describe(name: str) -> str:
    """Description of a column of the record."""
    metadata: dict[bytes, bytes] = RECORD.field(name).metadata
    return metadata[b"description"].decode()
