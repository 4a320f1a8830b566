"""Looking at somebody else's files is harmless: FIFOs, devices, links, huge files, small ones that become huge."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from rollout_runs import make_run, part_path
from typer.testing import CliRunner

from flows.cli.app import app
from kdrl_core.boxes.make import read_progress
from kdrl_core.config import read_fields
from kdrl_core.config.paths import UnusableFileError, read_json, read_small
from kdrl_core.errors import DamagedArtifactError, KdrlError
from kdrl_core.evaluation.results import read_results
from kdrl_core.labelling.label import SETTINGS, open_work
from kdrl_core.ledger import Run, open_run, publish_file
from kdrl_core.ledger.manifest import read_manifest
from kdrl_core.look.rollouts.query import RolloutStore
from kdrl_core.look.sweeps.state import read_record
from kdrl_core.look.tracking import stream
from kdrl_core.look.ui.app import create_app
from kdrl_core.sampling.journal import Journal
from kdrl_core.tables.files import read_table

PATIENCE_S = 20


@pytest.fixture(autouse=True)
def never_waits() -> Iterator[None]:
    """A reader that waits for a FIFO's writer fails, rather than holding up the tests."""

    def give_up(*_: object) -> None:
        raise TimeoutError("it waits for ever")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run(artifacts: Path) -> Run:
    return make_run(artifacts)


def sparse(path: Path) -> None:
    path.write_bytes(b"{")
    os.truncate(path, 2**40)


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(path.parent, os.O_RDONLY)  # a socket's path has 107 bytes at most
        server.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


PLACED: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "link": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "bytes": sparse,
    "socket": bound_socket,
}


@pytest.fixture(params=PLACED)
def placed(request: pytest.FixtureRequest) -> tuple[str, Callable[[Path], None]]:
    """A word of the error, and a function that puts something harmful in a file's place."""
    kind: str = request.param

    def put(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        PLACED[kind](path)

    return kind, put


def test_the_reader(tmp_path: Path, placed: tuple[str, Callable[[Path], None]]) -> None:
    kind, put = placed
    put(tmp_path / "x.json")
    for read in (read_small, read_json):
        with pytest.raises(UnusableFileError, match=kind):
            read(tmp_path / "x.json")


def test_what_the_reader_reads(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"1234")
    (tmp_path / "link").symlink_to(path)
    assert read_small(path, most_bytes=4) == read_small(tmp_path / "link", follow_links=True) == b"1234"
    assert read_json(path) == 1234
    with pytest.raises(UnusableFileError, match="has 4 bytes, and at most 3 are read"):
        read_small(path, most_bytes=3)
    with pytest.raises(FileNotFoundError):
        read_small(tmp_path / "none")
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(path)


READERS: dict[str, Callable[[Run, Path], object]] = {
    "manifest.json": lambda run, path: open_run(run.name),
    "recipe.yaml": lambda run, path: read_fields(path, what="recipe"),
    "evaluation/base/results.json": lambda run, path: read_results(path.parent),
    "rollouts/stage=stage2/step=000001/_rewards.manifest.json": lambda run, path: read_manifest(path),
    "metrics/stage=stage2/metrics.parquet": lambda run, path: read_table(path),
}


@pytest.mark.parametrize("place", READERS)
def test_errors_name_the_file(run: Run, placed: tuple[str, Callable[[Path], None]], place: str) -> None:
    kind, put = placed
    path = run.paths.root / place
    put(path)
    with pytest.raises(KdrlError, match=None if kind == "bytes" else kind) as raised:
        READERS[place](run, path)
    assert str(path) in str(raised.value)


def test_hints_that_cannot_be_read_are_none(run: Run, placed: tuple[str, Callable[[Path], None]]) -> None:
    _, put = placed
    put(run.paths.scratch / "progress.json")
    put(run.paths.tracking / "wandb.json")
    put(run.paths.root / "run.holder.json")
    assert read_progress(run.paths) is None
    assert stream._read(run, "wandb").steps == {}


def test_files_of_sweeps_labels_and_journals(
    artifacts: Path, tmp_path: Path, placed: tuple[str, Callable[[Path], None]]
) -> None:
    _, put = placed
    put(artifacts / "sweeps" / "s" / "sweep.json")
    with pytest.raises(KdrlError, match=r"sweep\.json cannot be read"):
        read_record("s")
    put(tmp_path / "work" / SETTINGS)
    with pytest.raises(KdrlError, match=r"label\.json cannot be read"), open_work(tmp_path / "work", {"a": 1}):
        pass
    put(tmp_path / "journal")
    if placed[0] != "bytes":
        with pytest.raises(UnusableFileError):
            Journal(tmp_path / "journal", [], settings="")


def test_status_of_all_runs_goes_past_a_broken_one(
    run: Run, artifacts: Path, placed: tuple[str, Callable[[Path], None]]
) -> None:
    _, put = placed
    broken = make_run(artifacts, "broken", steps=1)
    unread = make_run(artifacts, "unread", steps=1)
    put(broken.paths.manifest)
    put(unread.paths.metrics("stage2"))
    done = CliRunner().invoke(app, ["status", "--json"])
    assert done.exit_code == 0, done.output
    states = {row["run"]: row["state"] for row in json.loads(done.stdout)}
    assert states["small"].startswith("stopped")
    assert "manifest.json cannot be read" in states["broken"]
    assert "metrics.parquet" in states["unread"]


@pytest.mark.parametrize("name", ["catalog.json", "segment", "lock"])
def test_an_index_with_something_else_in_a_files_place(
    run: Run, placed: tuple[str, Callable[[Path], None]], name: str
) -> None:
    with RolloutStore.open([run.name]) as store:
        expected = store.page().rows
    (path,) = (run.paths.root / ".index").glob(f"{name}*")
    placed[1](path)
    with RolloutStore.open([run.name]) as store:
        assert store.page().rows == expected


@pytest.mark.parametrize("part", ["rollouts", "rewards"])
def test_a_file_of_a_step_that_is_none(run: Run, placed: tuple[str, Callable[[Path], None]], part: str) -> None:
    path = part_path(run.paths, "stage2", 1, part)
    placed[1](path)
    with RolloutStore.open([run.name]) as store:
        assert store.page().total == (12 if part == "rollouts" else 18)
        assert store.sql("select count(response) n from rollouts").to_pylist()


def bomb(path: Path, name: str, value: pa.Scalar, *, rows: int = 40_000) -> None:
    """A step's file of about 2 KB in which one column has the same value `rows` times; published like any other."""
    table = pq.ParquetFile(path).read().slice(0, 1).take(pa.array([0] * rows))
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    table = table.set_column(table.column_names.index(name), name, repeated)
    path.unlink()
    path.with_name(f"_{path.stem}.manifest.json").unlink()
    publish_file(path, lambda file: pq.write_table(table, file, compression="zstd", store_schema=False))


@pytest.mark.parametrize(("part", "name"), [("rollouts", "response"), ("rewards", "reason"), ("rollouts", "prompt")])
def test_a_small_file_that_decodes_to_gigabytes(run: Run, part: str, name: str) -> None:
    path = part_path(run.paths, "stage2", 1, part)
    bomb(path, name, "x" * 2**20)
    assert path.stat().st_size < 50_000
    script = (
        "import json, sys\n"
        "from fastapi.testclient import TestClient\n"
        "from kdrl_core.look.rollouts.query import RolloutFilter, RolloutStore\n"
        "from kdrl_core.look.ui.app import create_app\n"
        "with RolloutStore.open([sys.argv[1]]) as store:\n"
        "    client = TestClient(create_app(store), base_url='http://127.0.0.1:1')\n"
        "    found = [client.get('/api/rollouts', params={'text': 'number'}).json()['total']]\n"
        "    found.append(client.get('/api/rollouts', params={'limit': 500}).status_code)\n"
        "    found.append(store.sql('select count(response) n, max(len(reason)) m from rollouts').to_pylist()[0])\n"
        "    found.append([file.problem for file in store.damaged])\n"
        "    print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(run.paths.root)],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**30, 3 * 2**30)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    hits, status, _, damaged = json.loads(done.stdout)
    assert status == 200
    assert hits >= 12
    assert damaged == ["decodes to more than 2 GiB, the most that is read"]


def test_numbers_and_lists_that_decode_to_gigabytes(tmp_path: Path) -> None:
    rows = 2**17
    nulls = pa.table({f"column{number}": pa.nulls(rows, pa.float64()) for number in range(300)})
    pq.write_table(nulls, tmp_path / "nulls.parquet", compression="zstd")
    with pytest.raises(DamagedArtifactError, match=r"nulls\.parquet decodes to more than 0.125 GiB"):
        read_table(tmp_path / "nulls.parquet", most_bytes=2**27)
    assert read_table(tmp_path / "nulls.parquet", ["column1"], most_bytes=2**27).num_rows == rows
    texts = pa.table({"text": [f"response {number} {'word ' * 200}" for number in range(5000)]})
    pq.write_table(texts, tmp_path / "texts.parquet", compression="zstd")
    assert read_table(tmp_path / "texts.parquet", most_bytes=2**23).equals(texts)  # measured, and small enough
    with pytest.raises(DamagedArtifactError):
        read_table(tmp_path / "texts.parquet", most_bytes=2**20)


@pytest.mark.parametrize(
    "query",
    [
        f"rollout?run=small&stage=stage2&step=1&prompt_id=q-b&sample={10**25}",
        f"rollout?run=small&stage=stage2&step={10**25}&prompt_id=q-b&sample=1",
        "rollout?run=small&stage=stage2&step=-1&prompt_id=q-b&sample=1",
        f"group?run=small&stage=stage2&step={10**400}&prompt_id=q-b",
        f"rollouts?limit={10**25}",
        "rollouts?limit=-1",
        f"rollouts?offset={10**25}",
        "rollouts?offset=-1",
        f"rollouts?step_min={10**25}",
        f"rollouts?sample={'9' * 5000}",
        "rollouts?reward_min=nan",
        "rollouts?sort=%00",
    ],
)
def test_impossible_numbers_in_addresses(run: Run, query: str) -> None:
    with RolloutStore.open([run.name]) as store:
        client = TestClient(create_app(store), base_url="http://127.0.0.1:1", raise_server_exceptions=False)
        answer = client.get(f"/api/{query}")
    assert 400 <= answer.status_code < 500, answer.text
    assert len(answer.json()["error"]) < 1000


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "small", "--sample", str(10**25)],
        ["show", "small", "--limit", str(10**25)],
        ["show", "small", "--offset", str(10**400)],
        ["show", "small", "--step", "1e999"],
        ["show", "small", "--step", "nan"],
        ["show", "small", "--step", "1e25-"],
        ["show", "small", "--reward", "nan"],
        ["show", "small", "--text", "\udcff"],
        ["show", "small", "--prompt", "\udcff"],
        ["stats", "small", "--step", str(10**25)],
        ["sql", "small", "select '\udcff'"],
        ["sql", "small", "select 1", "--limit", str(10**25)],
        ["export", "small", "-o", "x.csv", "--limit", str(10**25)],
        ["diff", "small", str(10**25), "1"],
        ["diff", "small", "0", "1", "--prompt", "\udcff"],
    ],
)
def test_impossible_numbers_and_texts_in_commands(
    run: Run, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["rollouts", *arguments])
    assert done.exit_code in (1, 2), done.output
    assert isinstance(done.exception, SystemExit), done.exception
    assert len(done.output) < 2000
