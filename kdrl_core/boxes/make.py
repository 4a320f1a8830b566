"""What all boxes share: find the artifact, or make it from its inputs and publish it.

A *box* is a function from tables to a table, declared with the row of the artifact that it makes:

    @box(REWARDS, rollouts=["prompt_id", "sample", "response"])
    def verify(session, at, rollouts): ...  # -> pa.Table

The first parameter is a stage's session or a run. The others are passed by name: `at` is the step or shard, `manifests`
holds the manifests of the inputs, and a parameter named like a row gets the input of that row.
"""

import inspect
import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from kdrl_core.boxes.shards import num_shards
from kdrl_core.config.paths import read_json
from kdrl_core.ledger import (
    Manifest,
    Run,
    RunPaths,
    find_intact,
    find_own,
    is_published,
    manifest_of,
    publish_directory,
    publish_file,
    required_sha256,
    verify_published,
)
from kdrl_core.ledger.graph import EVERY, Artifact, At, Choice, Node, needs
from kdrl_core.ledger.versions import replace_lost, version_of
from kdrl_core.tables.files import read_table, write_table
from kdrl_core.tables.schemas import SCHEMAS

_logger = logging.getLogger("kdrl")

Write = Callable[[Path], Any]
"""Writes a file to the given path, or fills the given folder, as `publish_directory` requires."""
Facts = Callable[[float], Mapping[str, Any]]
"""Seconds that the box took → what the manifest records besides hashes."""


def timed(**more: Any) -> Facts:
    """Facts: the seconds and `more`."""
    return lambda seconds: {"seconds": seconds, **more}


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What a box has made. Returning a bare table means `Product(content=table, facts=timed())`."""

    content: pa.Table | Write
    facts: Facts = field(default=lambda seconds: {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """An artifact that is published."""

    path: Path
    manifest: Manifest
    reused: bool
    """It was published before this call."""


Compare = Callable[[Run, Path, Manifest, Mapping[str, Any]], None]
"""Takes an artifact's path, its manifest, and the facts of the same work done again; raises if they contradict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A declared box. `make` runs it."""

    row: Artifact
    function: Callable[..., pa.Table | Product]
    columns: Mapping[str, list[str]] = field(default_factory=dict)
    """Input's row → columns to read. Inputs that are not listed are read with all columns."""
    is_kept: bool = False
    """Keep an artifact that was made from other inputs. Otherwise it is made again from the present ones."""
    replay: Compare | None = None
    """Run the box even if its artifact is published, for its effect in memory; `replay` compares both results."""
    phase: str | None = None
    """Name of the work in the run's progress."""

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters after the first."""
        return list(inspect.signature(self.function).parameters)[1:]


def box(
    row: Artifact,
    *,
    is_kept: bool = False,
    replay: Compare | None = None,
    phase: str | None = None,
    **columns: list[str],
) -> Callable[[Callable[..., pa.Table | Product]], Box]:
    """Declare a function as the box that makes a row's artifacts; the arguments are fields of `Box`."""

    def declare(function: Callable[..., pa.Table | Product]) -> Box:
        return Box(row=row, function=function, columns=columns, is_kept=is_kept, replay=replay, phase=phase)

    return declare


class HasRun(Protocol):
    """What a box may work with besides a run, such as the session of a stage."""

    @property
    def run(self) -> Run:
        """The run that the artifacts belong to."""
        ...


def make(work: HasRun | Run, made_by: Box, at: At = None) -> Made:
    """The artifact of a box: found published and intact, or made and published with its inputs in the manifest.

    Args:
        work: the first argument of the box. Its attribute `stage`, if any, is the stage of the artifact.
        at: step, shard or label.

    Raises:
        RunError: an input is not published.
        DamagedArtifactError: an input was altered, or a damaged artifact was made again and came out different.
        ForeignFileError: the artifact is whole, but not the one that belongs there.
    """
    started = time.perf_counter()
    run = work if isinstance(work, Run) else work.run
    row, stage = made_by.row, getattr(work, "stage", None)
    node = row.node(stage, at)
    path = run.paths.root / node.place
    inputs = None if made_by.is_kept else _Inputs.of(run, made_by, node)
    hashes = None if inputs is None else inputs.hashes
    found = find_own(run, path, hashes) if row.is_exact else find_intact(path, hashes, is_exact=False)
    if found is not None and made_by.replay is None:
        _logger.debug("%s is published, reused", node.place)
        return Made(path=path, manifest=found, reused=True)
    may_differ = row.by_model and not run.recipe.is_exact
    if found is None and may_differ:
        replace_lost(run, node)
    inputs = inputs or _Inputs.of(run, made_by, node)
    if made_by.phase is not None:
        report_progress(run, stage=stage or made_by.phase, at=at if isinstance(at, int) else 0, phase=made_by.phase)
    product = made_by.function(work, **inputs.arguments(made_by, at))
    if isinstance(product, pa.Table):
        product = Product(content=product, facts=timed())
    facts = product.facts(time.perf_counter() - started)
    if found is not None and made_by.replay is not None:
        made_by.replay(run, path, found, facts)
        return Made(path=path, manifest=found, reused=True)
    if not inputs.are_read:  # the box may have waited for one of them, as rollouts do for a checkpoint
        inputs = _Inputs.of(run, made_by, node)
    expected = required_sha256(run, path)
    facts = {**facts, **(version_of(run, node) if may_differ else {})}
    manifest = _publish(run, node, product.content, inputs=inputs.hashes, metadata=facts, expected=expected)
    _logger.debug("%s made and published in %.2f s", node.place, time.perf_counter() - started)
    return Made(path=path, manifest=manifest, reused=False)


def _publish(run: Run, node: Node, content: pa.Table | Write, **options: Any) -> Manifest:
    row, path = node.row, run.paths.root / node.place
    if isinstance(content, pa.Table):
        if node.stage is not None and row.schemas and content.schema != SCHEMAS[row.schema_in(run.recipe, node.stage)]:
            raise TypeError(f"{row.name}: the box made a table of another schema than {' or '.join(row.schemas)}")
        return publish_file(path, lambda file: write_table(content, file), **options)
    return (publish_file if path.suffix else publish_directory)(path, content, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """The published files and folders that an artifact is made from."""

    run: Run
    manifests: dict[Node, Manifest]
    in_shards: set[str]
    """Rows whose shards are all inputs."""
    are_read: bool
    """Whether the box reads or compares them."""

    @classmethod
    def of(cls, run: Run, box: Box, node: Node) -> "_Inputs":
        """The inputs of a node. If the box neither reads nor compares them, only their manifests are read: the session
        verified the files when it loaded them."""
        choices = needs(run.recipe, node)
        names = {choice[0].name for choice in choices}
        are_read = not box.is_kept or not names.isdisjoint(box.parameters)
        look = verify_published if are_read else manifest_of
        sources = [source for choice in choices for source in _published(run, choice)]
        return cls(
            run=run,
            manifests={source: look(run.paths.root / source.place) for source in sources},
            in_shards={choice[0].name for choice in choices if choice[0].at == EVERY},
            are_read=are_read,
        )

    @property
    def hashes(self) -> dict[str, str]:
        """Path relative to the run → sha256."""
        return {source.place: manifest.sha256 for source, manifest in self.manifests.items()}

    def arguments(self, box: Box, at: At) -> dict[str, Any]:
        """The box's arguments by name. A parameter whose input the stage does not have keeps its default."""
        given: dict[str, Any] = {"at": at, "manifests": self.manifests}
        for name in box.parameters:
            sources = [source for source in self.manifests if source.name == name]
            if name in self.in_shards:
                given[name] = (self._content(source, box) for source in sources)
            elif sources:
                given[name] = self._content(sources[0], box)
        return {name: given[name] for name in box.parameters if name in given}

    def _content(self, source: Node, box: Box) -> pa.Table | Path:
        """An input as a table, or as a path if it is a folder or JSON."""
        path = self.run.paths.root / source.place
        return read_table(path, box.columns.get(source.name)) if path.suffix == ".parquet" else path


def _published(run: Run, choice: Choice) -> list[Node]:
    """The first published node of a choice, or all shards that the stage has."""
    first = choice[0]
    if first.at == EVERY:
        assert first.stage is not None
        return [first.row.node(first.stage, shard) for shard in range(num_shards(run, first.stage))]
    return [next((node for node in choice if is_published(run.paths.root / node.place)), choice[-1])]


# --- progress --------------------------------------------------------------------------------------------------------

_MIN_INTERVAL_S = 0.2
_last_report = 0.0


def report_progress(
    run: Run, *, stage: str, at: int = 0, phase: str, done: int | None = None, total: int | None = None
) -> None:
    """Say which phase of which step or shard is under way, at most five times a second. The file in the scratch folder
    is a hint: nothing depends on it, and it may be missing or stale."""
    global _last_report
    now = time.monotonic()
    if now - _last_report < _MIN_INTERVAL_S:
        return
    _last_report = now
    content = {"stage": stage, "step": at, "phase": phase, "done": done, "total": total, "at": time.time()}
    target = run.paths.scratch / "progress.json"
    with suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(content))
        temporary.replace(target)


def read_progress(paths: RunPaths) -> dict[str, Any] | None:
    """The latest report; None if there is no valid one, since the file is only a hint."""
    with suppress(OSError, ValueError):
        content = read_json(paths.scratch / "progress.json")
        kinds = {"stage": str, "step": int, "phase": str}
        if isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in kinds.items()):
            return content
    return None
