"""The work folder of a labelling, beside its output: what was sampled so far, bound to the settings that made it.

    labels.parquet.work/label.json                  the settings
    labels.parquet.work/shards/shard-00000.parquet  responses and verdicts of some problems, published (docs/labels.md)

A shard is a function of the settings, so a labelling that was killed goes on behind its last shard and ends with the
labels of one that was not.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdrl_core.errors import RunError, RunLockedError
from kdrl_core.ledger import lock_holder, replace_file, run_lock, sweep_temporaries

SETTINGS = "label.json"


def _field(name: str, kind: pa.DataType, text: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": text})


SHARD: pa.Schema = pa.schema(
    [
        _field("problem_id", pa.string(), "of the problem"),
        _field("sample", pa.int32(), "number of the response, from 0"),
        _field("prompt", pa.string(), "the rendered prompt"),
        _field("response", pa.string(), "decoded response, special tokens left out"),
        _field("ground_truth", pa.string(), "the problem's answer"),
        _field("length", pa.int32(), "response tokens, EOS included"),
        _field("finish_reason", pa.string(), "stop | length (cut at the response limit)"),
        _field("verdict", pa.string(), "correct | wrong | no_answer | timeout | error; all but correct are failures"),
        _field("accuracy_reward", pa.float32(), "1 if the answer equals the ground truth; what the label counts"),
        _field("format_reward", pa.float32(), "1 if the response has the expected structure; not part of the label"),
        _field("extracted", pa.string(), "the answer found in the response", nullable=True),
        _field("reason", pa.string(), "the verdict in words"),
        _field("seed", pa.uint64(), "of the response, from (seed, 'label', problem_id, sample)"),
    ]
)
"""A row is one response; the responses of a problem stand together."""


def work_folder(output: Path) -> Path:
    """Where the labelling that writes `output` works."""
    return output.with_name(f"{output.name}.work")


def shard_path(work: Path, index: int) -> Path:
    """Where a shard is published."""
    return work / "shards" / f"shard-{index:05d}.parquet"


def settings_hash(settings: dict[str, Any]) -> str:
    """sha256 over the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@contextmanager
def open_work(work: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Hold the folder, which is new or was begun with the same settings.

    Raises:
        RunLockedError: another process works in it.
        RunError: it was begun with other settings; each difference is named.
    """
    lock = work / "label.lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(run_lock(lock))
        except RunLockedError as error:
            holder = lock_holder(lock) or "another process"
            raise RunLockedError(
                f"{work} is in use by {holder}; wait for it, stop it, or give another output"
            ) from error
        sweep_temporaries(work)
        _bind(work, settings)
        yield


def _bind(work: Path, settings: dict[str, Any]) -> None:
    file = work / SETTINGS
    remedy = "give another --output, or delete the folder to begin again"
    if not file.is_file():
        replace_file(file, (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode())
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{file} cannot be read ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise RunError(f"{file} holds no settings; {remedy}")
    names = sorted(name for name in {*found, *settings} if found.get(name) != settings.get(name))
    if names:
        shown = ", ".join(f"{name}: {found.get(name)} → {settings.get(name)}" for name in names)
        raise RunError(f"{work} was begun with other settings ({shown}); set them back, {remedy}")
