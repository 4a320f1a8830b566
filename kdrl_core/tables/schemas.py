"""Arrow schemas of a step's Parquet files, version 1. A row is one response; `prompt_id` and `sample` join the files.

A version may gain nullable columns and loses none: UPDATE files of earlier kdrl lack `entropies`.

stage and step are the hive partition (`stage=stage2/step=000012`), not columns. Every file has its rows in the same
order: prompts as drawn, the G responses of a prompt together.
"""

import pyarrow as pa

SCHEMA_VERSION = "1"
_FLOATS, _INTS = pa.list_(pa.float32()), pa.list_(pa.int32())


def _field(name: str, kind: pa.DataType, text: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": text})


_IDS = [
    _field("prompt_id", pa.string(), "problem_id of the pool"),
    _field("sample", pa.int32(), "number of the response within its group, from 0"),
]
_GROUND_TRUTH = _field("ground_truth", pa.string(), "the problem's answer")
_LENGTH = _field("length", pa.int32(), "response tokens, EOS included")
_FOUND = [
    _field("extracted", pa.string(), "the answer found in the response", nullable=True),
    _field("reason", pa.string(), "the verdict in words"),
]

ROLLOUTS = pa.schema(
    [
        *_IDS,
        _field("prompt", pa.string(), "the rendered prompt"),
        _field("response", pa.string(), "decoded response, special tokens left out"),
        _GROUND_TRUTH,
        _field("prompt_token_ids", _INTS, "tokens of the prompt"),
        _field("token_ids", _INTS, "tokens of the response, EOS included"),
        _field("rollout_logprobs", _FLOATS, "the engine's logprob of each token under softmax(logits/T)"),
        _LENGTH,
        _field("finish_reason", pa.string(), "stop | length (cut at the response limit)"),
        _field("repetition_rate", pa.float32(), "share of 8-grams of tokens that occurred before in the response"),
        _field("seed", pa.uint64(), "of the response, from (seed, stage, step or sft, prompt_id, sample)"),
        _field("policy_version", pa.int32(), "updates behind the sampling policy: the step's number; -1: the teacher"),
        _field("engine", pa.string(), "rollout engine"),
    ]
)

TEACHER = pa.schema([*_IDS, _field("teacher_logprobs", _FLOATS, "π_T's logprob of each token under softmax(logits/T)")])

TEACHER_TOPK = TEACHER.append(
    _field("topk_ids", pa.list_(_INTS), "per response token π_T's K likeliest tokens, best first (A.3)")
).append(_field("topk_logprobs", pa.list_(_FLOATS), "their logprobs under softmax(logits/T)"))

REFERENCE = pa.schema([*_IDS, _field("ref_logprobs", _FLOATS, "the stage's initial policy's logprob of each token")])

REWARDS = pa.schema(
    [
        *_IDS,
        _field("reward", pa.float32(), "format_reward × accuracy_reward, or accuracy alone for R1-Zero (B.1.2)"),
        _field("format_reward", pa.float32(), "1 if the response has the expected structure"),
        _field("accuracy_reward", pa.float32(), "1 if the answer equals the ground truth"),
        _field("verdict", pa.string(), "correct | wrong | malformed | no_answer | timeout | error"),
        *_FOUND,
    ]
)

REWARD_VALUES = "reward_values"
"""The column of REWARDS_OF_FUNCTIONS that REWARDS lacks."""
REWARDS_OF_FUNCTIONS = REWARDS.append(
    _field(
        REWARD_VALUES,
        pa.list_(pa.struct([("name", pa.string()), ("value", pa.float32())])),  # not every reader knows a map
        "with reward.functions: what each returned, by its name; null where it does not apply or failed",
        nullable=True,
    )
)
"""In it `reward` is their weighted sum, and `accuracy_reward` is 1 where that is above `reward.success_above`."""

UPDATE = pa.schema(
    [
        *_IDS,
        _field("advantage", pa.float32(), "Â of the response (2), as the update used it; null: SFT", nullable=True),
        _field(
            "kd_weight",
            pa.float32(),
            "1 if KD applied to the response (Sec. 3.4), 0 if masked or without teacher; null: SFT",
            nullable=True,
        ),
        _field("logprobs", _FLOATS, "the trainer's logprob of each token before the update"),
        _field("kl_sum", pa.float32(), "Σ_t of the KL estimate to the teacher", nullable=True),
        _field("kl_mean", pa.float32(), "mean over tokens of the KL estimate to the teacher", nullable=True),
        _field("log_ratio_sum", pa.float32(), "Σ_t R_t = log π_T − log π_θ", nullable=True),
        _field(
            "entropies",
            _FLOATS,
            "entropy in nats of the trainer's softmax(logits/T) at each token before the update; null: SFT",
            nullable=True,
        ),
    ]
)

ALARMS = pa.schema(
    [
        _field("step", pa.int64(), "the step whose update raised it"),
        _field("rule", pa.string(), "name in the recipe's `alarms`"),
        _field("severity", pa.string(), "warning | critical"),
        _field("metric", pa.string(), "column of metrics.parquet"),
        _field("value", pa.float64(), "what was compared: of a fall, the mean over the rule's window; else the metric"),
        _field("threshold", pa.float64(), "what it was compared with"),
        _field("since", pa.int64(), "first of the steps in a row that breached the rule"),
        _field("text", pa.string(), "what happened, in words"),
    ]
)

SFT_DATASET = pa.schema(
    [
        *_IDS,
        _field("shard", pa.int32(), "number of the shard of samples that the response is from"),
        _field("prompt_token_ids", _INTS, "tokens of the prompt"),
        _field("token_ids", _INTS, "tokens of the response, EOS included"),
        _LENGTH,
    ]
)

EVALUATION = pa.schema(
    [
        _field("benchmark", pa.string(), "name of the benchmark"),
        *_IDS,
        _field("question", pa.string(), "the problem"),
        _GROUND_TRUTH,
        _field("response", pa.string(), "decoded response"),
        _LENGTH,
        _field("finish_reason", pa.string(), "stop | length"),
        _field("verdict", pa.string(), "correct | wrong | malformed | no_answer | timeout | error"),
        _field("accuracy_reward", pa.float32(), "1 if the answer equals the ground truth"),
        *_FOUND,
        _field("seed", pa.uint64(), "of the response"),
    ]
)

LABELS = pa.schema(
    [
        _field("problem_id", pa.string(), "of the problem"),
        _field("sample", pa.int32(), "number of the response, from 0"),
        _field("prompt", pa.string(), "the rendered prompt"),
        _field("response", pa.string(), "decoded response, special tokens left out"),
        _GROUND_TRUTH,
        _LENGTH,
        _field("finish_reason", pa.string(), "stop | length (cut at the response limit)"),
        _field("verdict", pa.string(), "correct | wrong | no_answer | timeout | error; all but correct are failures"),
        _field("accuracy_reward", pa.float32(), "1 if the answer equals the ground truth; what the label counts"),
        _field("format_reward", pa.float32(), "1 if the response has the expected structure; not part of the label"),
        *_FOUND,
        _field("seed", pa.uint64(), "of the response, from (seed, 'label', problem_id, sample)"),
    ]
)
"""A shard of `kdrl label`; the responses to a problem are adjacent rows."""


SCHEMAS = {name: found for name, found in globals().items() if isinstance(found, pa.Schema)}
"""By their names in the table of artifacts."""
