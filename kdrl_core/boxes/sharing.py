"""What two runs have in common: parts of a run that are the same work, and how one run takes over another's.

A *part* is a piece of a run (its pool, a stage, the samples of an SFT stage, the evaluation of one model) with the hash
of every recipe field that may change a byte of it. A field counts unless it is listed here as of no account, so a
field that is new to recipes counts. Two runs with equal hashes do the same work; the one takes the other's artifacts,
each compared with its manifest first, under the very manifests that they have: these name places and inputs relative to
a run, and what an artifact was made from comes along with it. So `kdrl check` and resuming find what they would find
had the run done the work itself. manifest.json of the run names the run that did it.
"""

import fnmatch
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdrl_core.config import Recipe
from kdrl_core.config.changes import leaf_fields
from kdrl_core.errors import DamagedArtifactError, KdrlError
from kdrl_core.ledger import (
    Manifest,
    Run,
    adopt_published,
    is_published,
    manifest_of,
    open_run,
    published_below,
    record_adoption,
    required_sha256,
    verify_own,
)
from kdrl_core.tables.metrics import rebuild_metrics

_NO_ACCOUNT = ("name", "description", "alarms.*", "tracking.*")
_OF_POOL = ("stage?.data.*", "stage?.max_prompt_tokens")
"""What the pool depends on in the stages, all of which it holds: its hash is in whatever is made from it."""
_OF_SAMPLES = ("objective", "temperature", "max_response_tokens", "sft.*", "prompts_per_step")
"""What an SFT stage's teacher samples depend on besides the pool."""
_ENGINES = ("evaluation.*", "rollout.*", "vllm.*", "trainer.*", "trainer")
_TEACHER = ("teacher", "teacher.*")
_logger = logging.getLogger("kdrl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a run that another may share."""

    name: str
    """`data`, `samples of stage2`, `stage1`, `evaluation of teacher`."""
    key: str
    """Hash of the recipe's fields that it depends on: equal keys, equal bytes."""
    places: tuple[str, ...]
    """Patterns of the places that belong to it, in the order in which they come to be."""
    results: tuple[str, ...]
    """Places that are published exactly when it is finished."""
    is_waited_for: bool = True
    """Whether a cell that needs it waits for one that is making it."""


def parts_of(recipe: Recipe) -> list[Part]:
    """The parts of a run of `recipe`, in the order in which they come to be."""
    fields = leaf_fields(recipe)
    stages = list(recipe.stages)

    def part(
        name: str, places: Sequence[str], results: Sequence[str], *, waits: bool = True, **of: Sequence[str]
    ) -> Part:
        return Part(
            name=name,
            key=_key(name, fields, **of),
            places=tuple(places),
            results=tuple(results),
            is_waited_for=waits,
        )

    def evaluation(label: str, **of: Sequence[str]) -> Part:
        place = f"evaluation/{label}"
        return part(f"evaluation of {label}", [place], [place], waits=False, **of)

    data = ("data/pool.parquet", "data/filter.json")
    parts = [part("data", data, data, ignored=("stage?.*", *_TEACHER, *_ENGINES), kept=_OF_POOL)]
    for position, stage in enumerate(stages):
        if recipe.stage(stage).objective == "sft":
            dataset = f"samples/stage={stage}/dataset.parquet"
            kept = (*_OF_POOL, *(f"{stage}.{field}" for field in _OF_SAMPLES))
            places = [f"samples/stage={stage}/shard=*", dataset]
            parts.append(part(f"samples of {stage}", places, [dataset], ignored=("stage?.*",), kept=kept))
        places = [f"samples/stage={stage}/*", f"rollouts/stage={stage}/*", f"checkpoints/{stage}/*"]
        places.append(f"evaluation/{stage}-step-*")
        final = f"checkpoints/{stage}/step-{recipe.stage(stage).steps:06d}"
        taught = any(recipe.stage(before).uses_teacher for before in stages[: position + 1])
        ignored = [*(f"{later}.*" for later in stages[position + 1 :]), *(() if taught else _TEACHER)]
        parts.append(part(stage, places, [final], ignored=ignored, kept=_OF_POOL))
        parts.append(evaluation(stage, ignored=ignored, kept=_OF_POOL))
    parts.append(evaluation("base", ignored=("stage?.*", *_TEACHER), kept=()))
    if recipe.teacher is not None:
        parts.append(evaluation("teacher", ignored=("stage?.*",), kept=()))
    return parts


def is_finished_part(root: Path, part: Part) -> bool:
    """Whether the run in `root` has all of a part."""
    return all(is_published(root / place) for place in part.results)


def adopt_parts(run: Run, donors: Iterable[str]) -> dict[str, str]:
    """Take over every part that the run does not have and one of the `donors` has finished. Only under the run's lock.

    A part is taken whole or not at all: not if the run has begun it itself with other bytes, or holds something that
    was made from others. Donors that do not exist yet, or cannot be read, are passed over.

    Returns:
        what was taken over → from which run.
    """
    others = _open(run, donors)
    taken: dict[str, str] = {}
    for part in parts_of(run.recipe):
        if is_finished_part(run.paths.root, part):
            continue
        for donor, keys in others:
            if part.key in keys and is_finished_part(donor.paths.root, part) and _adopt(run, donor, part):
                taken[part.name] = donor.name
                break
    return taken


def _open(run: Run, donors: Iterable[str]) -> list[tuple[Run, set[str]]]:
    others = []
    for name in dict.fromkeys(donors):
        if name != run.name:
            try:
                other = open_run(name, artifacts=run.paths.root.parent.parent)
            except KdrlError:  # not begun yet, or somebody's to mend: it is no reason to fail here
                continue
            others.append((other, {part.key for part in parts_of(other.recipe)}))
    return others


def _adopt(run: Run, donor: Run, part: Part) -> bool:
    sources = {donor.relative(path): path for path in published_below(donor.paths.root)}
    order = {place: rank for place in sources if (rank := _rank(place, part)) is not None}
    try:
        ordered = sorted(order, key=lambda place: (order[place], place))
        wanted = {place: verify_own(donor, sources[place]) for place in ordered}
        if (misfit := _misfit(run, part, wanted)) is not None:
            _logger.info("%s of %s is not taken over: %s", part.name, donor.name, misfit)
            return False
        _logger.info(
            "%s is taken over from run %s, which did the same work: %d artifacts", part.name, donor.name, len(wanted)
        )
        record_adoption(run, donor, part.name, {place: manifest.sha256 for place, manifest in wanted.items()})
        for place in wanted:
            if not is_published(run.paths.root / place):
                adopt_published(sources[place], run.paths.root / place)
    except DamagedArtifactError as error:
        _logger.warning("%s; so %s of %s is not taken over, and made here", error.problem, part.name, donor.name)
        return False
    if part.name in run.recipe.stages:
        rebuild_metrics(run, part.name, num_steps=run.recipe.stage(part.name).steps)
    return True


def _rank(place: str, part: Part) -> int | None:
    return next((rank for rank, pattern in enumerate(part.places) if fnmatch.fnmatchcase(place, pattern)), None)


def _misfit(run: Run, part: Part, wanted: Mapping[str, Manifest]) -> str | None:
    """Why the artifacts do not fit into what the run has; None if they do."""
    for place, manifest in wanted.items():
        path = run.paths.root / place
        if is_published(path):
            if manifest_of(path).sha256 != manifest.sha256:
                return f"{place} is here already, and another one"
        elif path.is_dir():
            return f"{place} is here without a manifest"
        if required_sha256(run, path) not in (None, manifest.sha256):
            return f"something here was made from another {place}"
        for name, sha256 in manifest.inputs.items():
            if Path(name).is_absolute() or _rank(name, part) is not None:
                continue
            source = run.paths.root / name
            if not is_published(source) or manifest_of(source).sha256 != sha256:
                return f"{place} was made from another {name} than is here, if any"
    return None


def _key(name: str, fields: Mapping[str, object], *, ignored: Sequence[str] = (), kept: Sequence[str] = ()) -> str:
    counted = {
        field: value
        for field, value in fields.items()
        if not _matches(field, _NO_ACCOUNT) and (_matches(field, kept) or not _matches(field, ignored))
    }
    return hashlib.sha256(json.dumps([name, counted], sort_keys=True).encode()).hexdigest()


def _matches(field: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(field, pattern) for pattern in patterns)
