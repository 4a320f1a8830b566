"""Sharing between runs: find the parts that are the same work, and take them over from another run.

A *part* is a piece of a run (its pool, a stage, the samples of an SFT stage, the evaluation of one model) with the hash
of every recipe field that may change a byte of it. Files that the recipe names count by their content. The table of
artifacts says which fields these are, and what belongs to a part; a section that is new to recipes counts for every
part. Parts with equal hashes are the same work, so one run takes the other's artifacts. Each is compared with its
manifest first, and keeps that manifest, which names places and inputs relative to a run. The inputs of an artifact come
along with it. So `kdrl check` and resuming work as if the run had done the work itself. The run's manifest.json names
the run that did it.
"""

import fnmatch
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdrl_core.config import Recipe
from kdrl_core.config.changes import leaves
from kdrl_core.config.outside import filled, function_of
from kdrl_core.errors import DamagedArtifactError, KdrlError
from kdrl_core.ledger import (
    Manifest,
    Outside,
    Run,
    adopt_published,
    is_published,
    manifest_of,
    open_run,
    outside_of,
    published_below,
    record_adoption,
    required_sha256,
    verify_own,
)
from kdrl_core.ledger.artifact import ARTIFACTS, Node
from kdrl_core.ledger.graph import CLAIMED, EVALUATION, checkpoint_label, needs, node_at, part_ends, part_of
from kdrl_core.tables.files import rebuild_metrics

_NO_ACCOUNT = ("name", "description", "alarms.*", "tracking.*")
"""Fields that change no byte of any artifact."""
_logger = logging.getLogger("kdrl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a run that another may share."""

    name: str
    """`data`, `samples of stage2`, `stage1`, `evaluation of teacher`."""
    key: str
    """Hash of the recipe's fields that it depends on: equal keys, equal bytes."""
    results: tuple[str, ...]
    """Places of artifacts: all are published exactly when the part is finished. They need not belong to it."""
    is_waited_for: bool = True
    """Whether a cell that needs the part waits while another cell makes it."""


def parts_of(recipe: Recipe, outside: Outside | None = None) -> list[Part]:
    """The parts of a run of `recipe`, in the order in which they are made. `outside`: what the run has recorded of the
    files that the recipe names; their content then counts in place of their paths."""
    found: dict[str, list[tuple[Node, str]]] = {}
    for name, node, place in part_ends(recipe):
        found.setdefault(name, []).append((node, place))
    recorded = outside or {}

    def content(slot: str, text: str) -> str:
        return f"{recorded[slot]['sha256']} {function_of(slot, text)}" if slot in recorded else text

    fields = leaves(filled(recipe, content))
    return [
        Part(
            name=name,
            key=_key(recipe, name, [node for node, _ in made], fields),
            results=tuple(place for _, place in made),
            is_waited_for=all(node.row.per != "label" for node, _ in made),
        )
        for name, made in sorted(found.items(), key=lambda part: _position(recipe, part[1][0][0]))
    ]


def is_finished_part(root: Path, part: Part) -> bool:
    """Whether the run in `root` has finished a part."""
    return all(is_published(root / place) for place in part.results)


def adopt_parts(run: Run, donors: Iterable[str]) -> dict[str, str]:
    """Take over every part that the run lacks and one of the `donors` has finished. Call it only under the run's lock.

    A part is taken whole or not at all. It is not taken if the run holds other bytes of it, or something that was made
    from other bytes. Donors that do not exist yet, or cannot be read, are skipped.

    Returns:
        what was taken over → from which run.
    """
    others = _open(run, donors)
    taken: dict[str, str] = {}
    for part in parts_of(run.recipe, outside_of(run)):
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
                keys = {part.key for part in parts_of(other.recipe, outside_of(other))}
            except KdrlError:  # not begun yet, or damaged: no reason to fail here
                continue
            others.append((other, keys))
    return others


def _adopt(run: Run, donor: Run, part: Part) -> bool:
    sources = {donor.paths.relative(path): path for path in published_below(donor.paths.root)}
    rows = list(ARTIFACTS)
    order = {place: rows.index(node.name) for place in sources if (node := _in(run.recipe, part, place)) is not None}
    try:
        ordered = sorted(order, key=lambda place: (order[place], place))
        wanted = {place: verify_own(donor, sources[place]) for place in ordered}
        if not wanted:  # shards may be gone once there is a dataset
            return False
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


def _in(recipe: Recipe, part: Part, place: str) -> Node | None:
    """The node at `place`, if it belongs to the part."""
    node = node_at(place)
    return node if node is not None and part_of(recipe, node) == part.name else None


def _misfit(run: Run, part: Part, wanted: Mapping[str, Manifest]) -> str | None:
    """Why the artifacts do not fit the run's own; None if they do."""
    for place, manifest in wanted.items():
        path = run.paths.root / place
        if is_published(path):
            if manifest_of(path).sha256 != manifest.sha256:
                return f"{place} is here already, with other bytes"
        elif path.is_dir():
            return f"{place} is here without a manifest"
        if required_sha256(run, path) not in (None, manifest.sha256):
            return f"something here was made from another {place}"
        for name, sha256 in manifest.inputs.items():
            if Path(name).is_absolute() or _in(run.recipe, part, name) is not None:
                continue
            source = run.paths.root / name
            if not is_published(source) or manifest_of(source).sha256 != sha256:
                return f"{place} was made from {name}, which is missing here or has other bytes"
    return None


def _position(recipe: Recipe, node: Node) -> int:
    """Data come first, then each stage with its evaluation, then the models that lie outside of the run."""
    stages: list[object] = [None, *recipe.stages]
    about = node.stage or node.at
    return stages.index(about) if about in stages else len(stages)


def _key(recipe: Recipe, name: str, ends: Sequence[Node], fields: Mapping[str, object]) -> str:
    """Hash of the fields that the part depends on: its artifacts, or anything that they are made from, read them."""
    readers = {node.row.reads(recipe, node) for node in _made_for(recipe, [*ends, *_watched(recipe, name)])}
    counted = {
        field: value
        for field, value in fields.items()
        if not _matches(field, _NO_ACCOUNT)
        and (not _matches(field, CLAIMED) or any(_reads(patterns, field) for patterns in readers))
    }
    return hashlib.sha256(json.dumps([name, counted], sort_keys=True).encode()).hexdigest()


def _watched(recipe: Recipe, name: str) -> list[Node]:
    """The first evaluation that a stage makes while it trains, if it makes any: the others read the same fields."""
    every = recipe.stage(name).evaluate_every if name in recipe.stages and recipe.evaluation.periodic else None
    return [] if every is None else [EVALUATION.node(at=checkpoint_label(name, every))]


def _made_for(recipe: Recipe, ends: Sequence[Node]) -> set[Node]:
    """These nodes and all that they are made from. Of many steps, the first and last: the others read the same."""
    found: set[Node] = set()
    seen: set[tuple[str, str | None, bool]] = set()
    left = list(ends)
    while left:
        node = left.pop()
        first = [node.row.node(node.stage, 0)] if node.row.per == "step" and not node.row.is_pruned else []
        for each in (node, *first):
            if node.row.per == "label" or (each.name, each.stage, each.at == 0) not in seen:
                seen.add((each.name, each.stage, each.at == 0))
                found.add(each)
                left += [other for choice in needs(recipe, each) for other in choice]
    return found


def _reads(patterns: tuple[str, ...], field: str) -> bool:
    out = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    return _matches(field, patterns) and not _matches(field, out)


def _matches(field: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(field, pattern) for pattern in patterns)
