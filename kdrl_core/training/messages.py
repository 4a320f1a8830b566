"""Messages between a trainer and its ranks: a JSON header and plain arrays, as safetensors. Never a pickle."""

import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from kdrl_core.objectives.inputs import Objective, Totals
from kdrl_core.training.protocols import PER_RESPONSE, PER_TOKEN, Float32s, UpdateBatch
from kdrl_core.types import ScoreRequest

_HEADER = "header"

Arrays = dict[str, NDArray[Any]]


def pack(header: dict[str, Any], arrays: Arrays | None = None) -> bytes:
    """One message. The header's numbers may be NaN or infinite."""
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
    """Only the rank's responses."""
    passes: Sequence[Sequence[int]]
    """Rows of `batch` for every forward and backward pass; every rank has the same number of passes."""
    num_idle: int
    """How many of the last passes are idle: they run only so that collectives match, and their loss counts 0."""
    totals: Totals
    """Of the whole step, `group_tokens` for the rows of `batch`."""

    def pack(self, header: dict[str, Any]) -> bytes:
        """A message with `header` and this work."""
        batch = self.batch
        arrays: Arrays = {
            "prompts": _flat([s.prompt_token_ids for s in batch.sequences], np.int32),
            "prompt_lengths": np.array([len(s.prompt_token_ids) for s in batch.sequences], np.int64),
            "responses": _flat([s.token_ids for s in batch.sequences], np.int32),
            "lengths": np.array([len(s.token_ids) for s in batch.sequences], np.int64),
        }
        for name, number in PER_RESPONSE.items():
            if (values := getattr(batch, name)) is not None:
                arrays[name] = np.asarray(values, number)
        for name, kind in PER_TOKEN.items():
            if (values := getattr(batch, name)) is not None:
                arrays[name] = _flat(values, kind)
        told = {
            **header,
            "passes": [list(rows) for rows in self.passes],
            "num_idle": self.num_idle,
            "objective": asdict(batch.objective),
            "totals": asdict(self.totals),
        }
        return pack(told, arrays)

    @classmethod
    def unpack(cls, header: dict[str, Any], arrays: Arrays) -> Self:
        """The work of a message."""
        lengths = arrays["lengths"]
        prompts = ragged(arrays["prompts"], arrays["prompt_lengths"])
        responses = ragged(arrays["responses"], lengths)
        values: dict[str, Any] = {name: arrays[name].tolist() for name in PER_RESPONSE if name in arrays}
        values |= {name: ragged(arrays[name], lengths) for name in PER_TOKEN if name in arrays}
        batch = UpdateBatch(
            sequences=[
                ScoreRequest(prompt_token_ids=array("i", p.tobytes()), token_ids=array("i", r.tobytes()))
                for p, r in zip(prompts, responses, strict=True)
            ],
            objective=Objective(**{**header["objective"], "terms": tuple(map(tuple, header["objective"]["terms"]))}),
            **values,
        )
        totals = Totals(**header["totals"])
        return cls(batch=batch, passes=header["passes"], num_idle=header["num_idle"], totals=totals)


def share_of(batch: UpdateBatch, passes: Sequence[Sequence[int]], *, num_idle: int, totals: Totals) -> RankWork:
    """The work of a rank that gets `passes`, rows of `batch`.

    Its responses are those of the passes, in their order; a response in two passes is there only once.
    """
    rows = list(dict.fromkeys(row for part in passes for row in part))
    place = {row: index for index, row in enumerate(rows)}
    group_tokens = totals.group_tokens
    return RankWork(
        batch=batch.take(rows),
        passes=[[place[row] for row in part] for part in passes],
        num_idle=num_idle,
        totals=replace(totals, group_tokens=None if group_tokens is None else [int(group_tokens[row]) for row in rows]),
    )


def ragged(flat: NDArray[Any], lengths: NDArray[Any]) -> list[NDArray[Any]]:
    """Rows of the given lengths from their concatenation."""
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _flat(rows: Sequence[Sequence[int] | Float32s], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.empty(0, dtype)
