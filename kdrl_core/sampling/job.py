"""Prompts ─▶ sample and verify ─▶ shards: published tables of responses and verdicts, which survive a kill.

    shard-00000.parquet    of some prompts; its manifest names the hash of the settings
    shard-00001.jsonl      the responses of the shard that is being sampled (`Journal`)

A stopped job goes on after its last response. Shards of other settings do not count.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kdrl_core.config import Recipe
from kdrl_core.config.outside import code_sources
from kdrl_core.errors import RunLockedError
from kdrl_core.ledger import (
    find_intact,
    is_published,
    lock_holder,
    manifest_of,
    publish_file,
    run_lock,
    sweep_temporaries,
    verify_published,
)
from kdrl_core.ledger.identity import identify_code
from kdrl_core.ledger.lock import stop_if_requested
from kdrl_core.ledger.manifest import file_manifest_path
from kdrl_core.sampling.journal import Journal
from kdrl_core.sampling.responses import Response, Source, requests_for, response_columns
from kdrl_core.tables.files import verdict_columns, write_table
from kdrl_core.types import ThinkOpened, Verdict
from kdrl_core.verify import VerdictOptions, Verifier
from kdrl_core.verify.screening import refuse_failures

if TYPE_CHECKING:
    from kdrl_core.rewards.judge import Judge
    from kdrl_core.rewards.score import Scored

_logger = logging.getLogger("kdrl")

Progress = Callable[[int, int], None]
"""Called with the responses done (earlier calls included) and the responses in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Answers the requests of a job and judges the responses by accuracy alone (`require_format=False`), or by the
    functions of the reward."""

    source: Source
    verifier: Verifier
    prompts: Mapping[str, Sequence[int]]
    """Token ids by prompt_id."""
    think_opened: ThinkOpened
    """How the prompts leave the thought."""
    judge: "Judge | None" = None
    """With `reward.functions`: judges in place of the verifier."""
    asked: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Question and source by prompt_id, for `judge`."""
    mend: Callable[[Sequence[Response]], Sequence[Response]] = list
    """Applied to the responses of a shard before they are judged and published."""

    def sample(
        self, journal: Journal, ground_truths: Mapping[str, str], on_progress: Callable[[int], None]
    ) -> tuple[list[Response], list[Verdict]]:
        """Ask for the responses that the journal lacks; return all responses and their verdicts.

        The first responses are judged while the last are still to come. `on_progress` gets the number of responses.
        """

        def items(responses: Sequence[Response]) -> list[tuple[str, str]]:
            return [(response.text, ground_truths[response.prompt_id]) for response in responses]

        def finished(responses: Sequence[Response]) -> None:
            journal.keep(responses)
            if self.judge is None or self.judge.reward.uses_math:
                ahead = items(self.mend(responses))
                self.verifier.verify_ahead(ahead, require_format=False, think_opened=self.think_opened)
            on_progress(len(journal))

        on_progress(len(journal))
        if missing := journal.missing:
            journal.keep(self.source(missing, finished))
        responses = list(self.mend(journal.responses))
        options: VerdictOptions = {"require_format": False, "think_opened": self.think_opened}
        if self.judge is None:
            return responses, self.verifier.verify_batch(items(responses), **options)
        judged = self.judge.judge_batch([self._scored(each, ground_truths) for each in responses], **options)
        return responses, [one.verdict for one in judged]

    def _scored(self, response: Response, ground_truths: Mapping[str, str]) -> "Scored":
        from kdrl_core.rewards.judge import facts_of

        question, source = self.asked[response.prompt_id]
        facts = facts_of(
            problem_id=response.prompt_id,
            question=question,
            source=source,
            sample=response.sample,
            length=response.length,
            finish_reason=response.finish_reason.value,
            think_opened=self.think_opened,
        )
        return response.text, ground_truths[response.prompt_id], facts


def open_judge(recipe: Recipe, verifier: Verifier, stack: ExitStack) -> "Judge | None":
    """What judges by the functions of the recipe's reward, with the users' code as it is now; None without functions.
    `stack` closes it. Raises RecipeError if a function cannot be used."""
    if not recipe.reward.functions:
        return None
    from kdrl_core.rewards.judge import Judge

    judge = Judge(recipe.reward, recipe.verification, verifier, code_sources(identify_code(recipe), recipe))
    stack.callback(judge.close)
    judge.check()
    return judge


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingJob:
    """What is sampled, how it is published, and where."""

    folder: Path
    inputs: Mapping[str, str]
    """Of the shards' manifests: the hash of all that a response or a verdict depends on."""
    ground_truths: Mapping[str, str]
    """By prompt_id; these prompts are sampled, in this order."""
    samples: int
    """Responses per prompt."""
    seed_names: tuple[object, ...]
    """As `requests_for` takes them."""
    shard_prompts: int
    """Prompts sampled and published together."""
    name: Callable[[Sequence[str]], str]
    """Names a shard with these prompts in error texts."""
    max_failed_share: float
    schema: pa.Schema
    """Of a shard."""
    more_columns: Callable[[list[str]], dict[str, Any]]
    """Makes the columns beside those of responses and verdicts, from the rows' prompt_ids."""
    load: Callable[[], Sampler]
    """Called once, when a shard must be sampled; if all shards exist, nothing is loaded."""
    is_timed: bool = False
    """The shards' manifests hold the seconds that they took, over all calls."""
    heals: bool = False
    """A damaged shard is named in the log and sampled again; else it is refused."""

    def run(self, on_progress: Progress | None = None) -> list[Path]:
        """Sample the missing shards; return all shards, in order.

        Raises:
            VerificationError: too many verdicts of a shard are timeouts or errors.
            DamagedArtifactError: a shard was altered.
            Stopped: somebody asked for it; all shards so far are published.
            StorageError: no space, or the folder cannot be written.
        """
        ids = list(self.ground_truths)

        def tell(before: int, more: int) -> None:
            if on_progress is not None:
                on_progress(before + more, len(ids) * self.samples)

        sampler: Sampler | None = None
        paths: list[Path] = []
        for start in range(0, len(ids), self.shard_prompts):
            part = ids[start : start + self.shard_prompts]
            path = self.folder / f"shard-{len(paths):05d}.parquet"
            if not self._is_there(path):
                started = time.perf_counter()
                sampler = sampler or self.load()
                self._make(path, part, sampler, partial(tell, start * self.samples), started)
            path.with_suffix(".jsonl").unlink(missing_ok=True)
            paths.append(path)
            tell(start * self.samples, len(part) * self.samples)
            stop_if_requested()
        return paths

    def _is_there(self, path: Path) -> bool:
        if self.heals:
            return find_intact(path, self.inputs, is_exact=False) is not None
        if not is_published(path):
            return False
        if manifest_of(path).inputs == dict(self.inputs):
            verify_published(path)
            return True
        _logger.warning("%s was sampled with other settings; it is sampled again", path)
        file_manifest_path(path).unlink()
        return False

    def _make(
        self, path: Path, part: Sequence[str], sampler: Sampler, on_progress: Callable[[int], None], started: float
    ) -> None:
        prompts = {prompt_id: sampler.prompts[prompt_id] for prompt_id in part}
        requests = requests_for(prompts, self.samples, *self.seed_names)
        journal = Journal(path.with_suffix(".jsonl"), requests, settings=" ".join(self.inputs.values()))
        responses, verdicts = sampler.sample(journal, self.ground_truths, on_progress)
        refuse_failures(verdicts, self.name(part), self.max_failed_share)
        columns = response_columns(responses, self.ground_truths) | verdict_columns(verdicts)
        columns |= self.more_columns(columns["prompt_id"])
        table = pa.Table.from_pydict(columns, schema=self.schema)
        seconds = {"seconds": time.perf_counter() - started + journal.seconds} if self.is_timed else {}
        publish_file(path, partial(write_table, table), inputs=self.inputs, metadata=seconds)


def settings_hash(settings: dict[str, Any]) -> str:
    """sha256 over the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@contextmanager
def hold_work(work: Path, lock_name: str, *, remedy: str) -> Iterator[None]:
    """Lock the folder `work`, and delete what a kill has left in it. `remedy` ends the error text.

    Raises RunLockedError if another process works in it.
    """
    lock = work / lock_name
    with ExitStack() as stack:
        try:
            stack.enter_context(run_lock(lock))
        except RunLockedError as error:
            holder = lock_holder(lock) or "another process"
            raise RunLockedError(f"{work} is in use by {holder}{remedy}") from error
        sweep_temporaries(work)
        yield
