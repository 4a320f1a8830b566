"""What a trainer and its ranks say to each other: a JSON header and plain arrays, as safetensors. Never a pickle."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from kdrl_core.training.losses import StepTotals
from kdrl_core.training.protocols import Float32s, TopKTeacher, UpdateBatch
from kdrl_core.types import ScoreRequest

_HEADER = "header"
_SCALARS = (
    "loss",
    "tis_cap",
    "beta",
    "kl_estimator",
    "ref_beta",
    "ref_kl_estimator",
    "entropy_coef",
    "aggregation",
    "group_size",
)
_RAGGED = ("teacher_logprobs", "ref_logprobs", "rollout_logprobs")

Arrays = dict[str, NDArray[Any]]


def pack(header: dict[str, Any], arrays: Arrays | None = None) -> bytes:
    """One message. NaN and infinity may be among the numbers of the header."""
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    return save({_HEADER: text, **{name: np.ascontiguousarray(a) for name, a in (arrays or {}).items()}})


def unpack(message: bytes) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays of `pack`."""
    arrays = load(message)
    return json.loads(arrays.pop(_HEADER).tobytes()), arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWork:
    """One rank's share of an optimiser step."""

    batch: UpdateBatch
    """Its responses alone."""
    passes: Sequence[Sequence[int]]
    """Rows of `batch` for every forward and backward pass; as many passes on every rank."""
    num_idle: int
    """How many of the last passes only keep the other ranks company: their loss counts nothing."""
    totals: StepTotals
    """Of the whole step, `group_tokens` for the rows of `batch`."""

    def pack(self, header: dict[str, Any]) -> bytes:
        """A message with `header` and this work."""
        batch = self.batch
        arrays: Arrays = {
            "prompts": _flat([s.prompt_token_ids for s in batch.sequences], np.int32),
            "prompt_lengths": np.array([len(s.prompt_token_ids) for s in batch.sequences], np.int64),
            "responses": _flat([s.token_ids for s in batch.sequences], np.int32),
            "lengths": np.array([len(s.token_ids) for s in batch.sequences], np.int64),
            "advantages": np.asarray(batch.advantages, np.float64),
            "kd_weights": np.asarray(batch.kd_weights, np.float64),
        }
        for name in _RAGGED:
            if (values := getattr(batch, name)) is not None:
                arrays[name] = _flat(values, np.float32)
        if batch.topk is not None:
            arrays["topk_ids"] = np.concatenate(batch.topk.token_ids)
            arrays["topk_logprobs"] = np.concatenate(batch.topk.logprobs)
        totals = self.totals
        values = {
            **header,
            "passes": [list(rows) for rows in self.passes],
            "num_idle": self.num_idle,
            "batch": {name: getattr(batch, name) for name in _SCALARS},
            "floor": None if batch.topk is None else batch.topk.floor,
            "totals": {
                "tokens": totals.tokens,
                "kd_tokens": totals.kd_tokens,
                "group_tokens": None if totals.group_tokens is None else list(totals.group_tokens),
                "num_groups": totals.num_groups,
            },
        }
        return pack(values, arrays)

    @classmethod
    def unpack(cls, header: dict[str, Any], arrays: Arrays) -> Self:
        """The work of a message."""
        lengths = arrays["lengths"]
        prompts = ragged(arrays["prompts"], arrays["prompt_lengths"])
        responses = ragged(arrays["responses"], lengths)
        topk = None
        if "topk_ids" in arrays:
            topk = TopKTeacher(
                token_ids=ragged(arrays["topk_ids"], lengths),
                logprobs=ragged(arrays["topk_logprobs"], lengths),
                floor=header["floor"],
            )
        batch = UpdateBatch(
            sequences=[
                ScoreRequest(prompt_token_ids=p.tolist(), token_ids=r.tolist())
                for p, r in zip(prompts, responses, strict=True)
            ],
            advantages=arrays["advantages"].tolist(),
            kd_weights=arrays["kd_weights"].tolist(),
            topk=topk,
            **{**header["batch"], **{name: ragged(arrays[name], lengths) for name in _RAGGED if name in arrays}},
        )
        return cls(
            batch=batch,
            passes=header["passes"],
            num_idle=header["num_idle"],
            totals=StepTotals(**header["totals"]),
        )


def share_of(batch: UpdateBatch, passes: Sequence[Sequence[int]], *, num_idle: int, totals: StepTotals) -> RankWork:
    """The work of a rank that is dealt `passes`, rows of `batch`.

    Its responses are those of the passes in their order, one that stands in two passes only once.
    """
    rows = list(dict.fromkeys(row for part in passes for row in part))
    place = {row: index for index, row in enumerate(rows)}

    def pick(values: Sequence[Any] | None) -> Any:
        return None if values is None else [values[row] for row in rows]

    topk = batch.topk
    own = UpdateBatch(
        sequences=pick(batch.sequences),
        advantages=pick(batch.advantages),
        kd_weights=pick(batch.kd_weights),
        topk=None
        if topk is None
        else TopKTeacher(token_ids=pick(topk.token_ids), logprobs=pick(topk.logprobs), floor=topk.floor),
        **{name: pick(getattr(batch, name)) for name in _RAGGED},
        **{name: getattr(batch, name) for name in _SCALARS},
    )
    return RankWork(
        batch=own,
        passes=[[place[row] for row in part] for part in passes],
        num_idle=num_idle,
        totals=StepTotals(
            tokens=totals.tokens,
            kd_tokens=totals.kd_tokens,
            group_tokens=pick(totals.group_tokens),
            num_groups=totals.num_groups,
        ),
    )


def ragged(flat: NDArray[Any], lengths: NDArray[Any]) -> list[NDArray[Any]]:
    """Rows of the given lengths from their concatenation."""
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _flat(rows: Sequence[Sequence[int] | Float32s], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.empty(0, dtype)
