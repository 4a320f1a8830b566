"""Arrow schemas of problems before and after the filter. The metadata `doc` of each field gives its meaning.

Difficulty labels count **failures** out of `data.difficulty.num_samples` (16 in the published data), not passes:
16 = never solved, 0 = always solved (B.1.1 speaks of passes = 16 − failures).
"""

import pyarrow as pa


def _field(name: str, arrow_type: pa.DataType, doc: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, arrow_type, nullable=nullable, metadata={"doc": doc})


PROBLEM_SCHEMA: pa.Schema = pa.schema(
    [
        _field("problem_id", pa.string(), "the file's own id, else 'q-' and a hash of the normalised question"),
        _field("question", pa.string(), "problem statement without any instruction, trimmed"),
        _field("answer", pa.string(), "ground truth as the verifier takes it, trimmed"),
        _field("source", pa.string(), "where the problem comes from: the file's own word, else the file's name"),
        _field(
            "failures",
            pa.map_(pa.string(), pa.int32()),
            "label name -> wrong answers out of num_samples (num_samples = never solved); null without any label",
            nullable=True,
        ),
    ]
)
"""Normalised problems, from a file of any format."""

POOL_SCHEMA: pa.Schema = pa.schema(
    [
        _field("stage", pa.string(), "stage that trains on the problem: stage1 or stage2"),
        _field("problem_id", pa.string(), "unique within the stage; rows are sorted by it"),
        _field("question", pa.string(), "problem statement without any instruction"),
        _field("answer", pa.string(), "ground truth"),
        _field("source", pa.string(), "where the problem comes from"),
        _field(
            "student_failures",
            pa.int32(),
            "failures of the model that stands for the student, out of num_samples; null without a label",
            nullable=True,
        ),
        _field("prompt", pa.string(), "the question in prompt.template, rendered by the student's chat template"),
        _field("prompt_token_ids", pa.list_(pa.int32()), "tokens of `prompt`, no special tokens added"),
    ]
)
"""The pool that a stage trains on: filtered problems, rendered and tokenised."""

SKYWORK_LABELS = ("DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen-32B", "DeepSeek-R1-Distill-Qwen-7B")

SKYWORK_SCHEMA: pa.Schema = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("index", pa.int64()),
                    ("model_difficulty", pa.struct([(name, pa.int64()) for name in SKYWORK_LABELS])),
                ]
            ),
        ),
    ]
)
"""Columns of Skywork/Skywork-OR1-RL-Data as its dataset card declares them."""
