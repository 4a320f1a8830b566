"""Ways to damage an artifact, and what of a stopped run a resume has to notice and make again."""

import random
from collections.abc import Callable
from pathlib import Path

from kdrl_core.boxes.stage import latest_checkpoint
from kdrl_core.ledger import Run, is_published
from kdrl_core.ledger.manifest import manifest_path
from kdrl_core.look.rollouts.query import RolloutStore

Damage = Callable[[Path], None]


def flip(path: Path) -> None:
    """One bit of the middle byte."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def unlink(path: Path) -> None:
    path.unlink()


def lose_manifest(path: Path) -> None:
    manifest_for(path).unlink()


def garble_manifest(path: Path) -> None:
    manifest_for(path).write_text('{"artifact": "?')


def alter_manifest(path: Path) -> None:
    """Another hash: the file is right, and its manifest is not."""
    where = manifest_for(path)
    where.write_text(where.read_text().replace('"sha256": "', '"sha256": "0'))


DAMAGES: list[Damage] = [flip, truncate, empty, unlink, lose_manifest, garble_manifest, alter_manifest]


def manifest_for(path: Path) -> Path:
    """The manifest of an artifact, or of the directory that a file is in."""
    inside = (folder / "manifest.json" for folder in path.parents if folder.parent.name != "runs")
    return next((where for where in inside if where.is_file()), manifest_path(path))


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def damage_journal(run: Run, rng: random.Random) -> bool:
    """Flip a bit of a journal of responses, the run's own or that of its labelling; whether there was one."""
    artifacts = run.paths.root.parent.parent
    journals = sorted(path for path in artifacts.rglob("*.jsonl") if path.stat().st_size)
    if journals:
        flip_a_bit(rng.choice(journals), rng)
    return bool(journals)


def damage_index(run: Run, rng: random.Random) -> bool:
    """Look at the run, and flip a bit of the index that this leaves; whether there was something to look at."""
    if not any(run.paths.root.glob("rollouts/*/*/rollouts.parquet")):
        return False
    with RolloutStore.open([run.paths.root]) as store:
        store.steps()
    flip_a_bit(rng.choice(sorted(path for path in (run.paths.root / ".index").rglob("*") if path.is_file())), rng)
    return True


def damage_something(run: Run, rng: random.Random) -> bool:
    """Damage one artifact that a resume of the run goes on from; whether there was one."""
    targets = [path for path in (run.paths.pool, run.paths.filter_report) if is_published(path)]
    for stage in run.recipe.stages:
        latest = latest_checkpoint(run, stage)
        folder = run.paths.checkpoint(stage, latest)
        if is_published(folder):
            targets += [folder / "model.safetensors", folder / "trainer" / "optimizer.safetensors"]
        if latest < run.recipe.stage(stage).steps:
            steps = run.paths.step(stage, latest).parent.glob("step=*/*.parquet")
            targets += [path for path in steps if int(path.parent.name[5:]) >= latest and is_published(path)]
    if not targets:
        return False
    rng.choice(DAMAGES)(rng.choice(sorted(targets)))
    return True
