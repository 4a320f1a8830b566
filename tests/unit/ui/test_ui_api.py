"""What the app answers: rollouts as JSON that a browser reads without loss, errors in words, nothing to strangers."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from unit.ui import handmade
from unit.ui.conftest import GROUP_SIZE

from kdrl_core.errors import RunError
from kdrl_core.ledger import open_run_dir
from kdrl_core.look.rollouts.query import RolloutStore
from kdrl_core.look.ui.api import Live, columns, plain
from kdrl_core.look.ui.app import create_app
from kdrl_core.tables.files import load_metrics

HERE = "http://127.0.0.1:1234"


@pytest.fixture(scope="module")
def client(runs: tuple[Path, Path]) -> Iterator[TestClient]:
    """The app over the two trained runs."""
    with RolloutStore.open(list(runs)) as store:
        yield TestClient(create_app(store), base_url=HERE, raise_server_exceptions=False)


def test_values_that_json_would_lose() -> None:
    found = plain({"seed": 2**64 - 1, "exact": 2**53, "log": float("-inf"), "no": float("nan"), "list": (1.5, None)})
    assert found == {"seed": "18446744073709551615", "exact": 2**53, "log": "-inf", "no": "nan", "list": [1.5, None]}
    json.dumps(found, allow_nan=False)


def test_columns_of_rows_that_do_not_all_have_them() -> None:
    assert columns([{"a": 1}, {"b": 2.0}]) == {"a": [1, None], "b": [None, 2.0]}


def test_runs(client: TestClient) -> None:
    found = client.get("/api/runs").json()
    assert found["damaged"] == []
    assert [(run["name"], run["num_steps"], run["num_rollouts"]) for run in found["runs"]] == [
        ("kdrl", {"stage1": 2, "stage2": 4}, 6 * 4 * GROUP_SIZE),
        ("grpo", {"stage1": 2, "stage2": 4}, 6 * 4 * GROUP_SIZE),
    ]


def test_steps_hold_what_the_run_recorded(client: TestClient, runs: tuple[Path, Path]) -> None:
    found = client.get("/api/steps", params={"run": "kdrl", "stage": "stage2"}).json()
    rows = load_metrics(open_run_dir(runs[0]), "stage2")
    assert found["columns"]["step"] == [0, 1, 2, 3]
    assert found["columns"]["reward_mean"] == pytest.approx([row["reward/mean"] for row in rows])
    assert found["metrics"]["optim/grad_norm"] == [row["optim/grad_norm"] for row in rows]


def test_a_page_of_rollouts_is_what_the_files_hold(client: TestClient, runs: tuple[Path, Path]) -> None:
    query = {"run": "kdrl", "stage": "stage2", "step_min": 1, "step_max": 1, "verdict": ["wrong", "malformed"]}
    query |= {"sort": "length", "descending": True, "limit": 5, "offset": 2}
    found = client.get("/api/rollouts", params=query).json()
    folder = runs[0] / "rollouts" / "stage=stage2" / "step=000001"
    rewards, rollouts = (pq.ParquetFile(folder / f"{name}.parquet").read() for name in ("rewards", "rollouts"))
    wanted = [
        (-length, row)
        for row, (verdict, length) in enumerate(
            zip(rewards["verdict"].to_pylist(), rollouts["length"].to_pylist(), strict=True)
        )
        if verdict in ("wrong", "malformed")
    ]
    assert found["total"] == len(wanted) > 7
    ids = [(rollouts["prompt_id"][row].as_py(), rollouts["sample"][row].as_py()) for _, row in sorted(wanted)[2:7]]
    assert [(row["prompt_id"], row["sample"]) for row in found["rows"]] == ids


def test_a_response_in_full(client: TestClient) -> None:
    row = client.get("/api/rollouts", params={"run": "kdrl", "stage": "stage2", "limit": 1}).json()["rows"][0]
    where = {name: row[name] for name in ("run", "stage", "step", "prompt_id", "sample")}
    found = client.get("/api/rollout", params=where).json()
    assert len(found["tokens"]) == found["length"] == len(found["teacher_logprobs"]) == len(found["logprobs"])
    assert "".join(found["tokens"]).startswith(found["response"])
    assert isinstance(found["seed"], str) or found["seed"] < 2**53


def test_a_group_has_all_answers_without_their_tokens(client: TestClient) -> None:
    row = client.get("/api/rollouts", params={"run": "grpo", "stage": "stage1", "limit": 1}).json()["rows"][0]
    where = {name: row[name] for name in ("run", "stage", "step", "prompt_id")}
    found = client.get("/api/group", params=where).json()["responses"]
    assert [one["sample"] for one in found] == list(range(GROUP_SIZE))
    assert all("response" in one and not any(isinstance(value, list) for value in one.values()) for one in found)


def test_a_very_long_response_of_a_group_is_cut_and_says_so(tmp_path: Path) -> None:
    handmade.write_step(tmp_path / "long", "stage1", 0, [{"response": "a" * 20_001}, {"response": "b" * 20_000}])
    with RolloutStore.open([tmp_path / "long"]) as store:
        client = TestClient(create_app(store), base_url=HERE)
        query = {"run": "long", "stage": "stage1", "step": 0, "prompt_id": "p0"}
        found = client.get("/api/group", params=query).json()["responses"]
        assert [(len(one["response"]), one["is_cut"]) for one in found] == [(20_000, True), (20_000, False)]
        assert len(client.get("/api/rollout", params={**query, "sample": 0}).json()["response"]) == 20_001


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("rollouts?sort=lenght", 400, "did you mean"),
        ("rollouts?verdict=rong", 400, "'rong'"),
        ("rollouts?reward_min=much", 400, "reward_min: "),
        ("rollouts?limit=100000", 400, "limit: "),
        ("rollouts?offset=-1", 400, "offset: "),
        ("rollout?run=kdrl&stage=stage2&step=99&prompt_id=p&sample=0", 400, "it has steps 0 to 3"),
        ("group?run=nobody&stage=stage2&step=0&prompt_id=p", 400, "runs that are open: kdrl, grpo"),
        ("rollout?run=kdrl", 400, "stage: Field required"),
        ("nothing", 404, "/api/nothing: Not Found"),
    ],
)
def test_bad_requests_are_answered_in_words(client: TestClient, path: str, status: int, words: str) -> None:
    answer = client.get(f"/api/{path}")
    assert answer.status_code == status
    assert words in answer.json()["error"]


def test_a_fault_of_kdrl_itself_shows_no_traceback(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret path")

    monkeypatch.setattr(RolloutStore, "steps", fail)
    answer = client.get("/api/steps")
    assert answer.status_code == 500
    assert "ZeroDivisionError" in answer.json()["error"]
    assert "secret" not in answer.text


def test_a_question_that_is_too_much_for_the_database(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        with duckdb.connect(config={"memory_limit": "1MB"}) as small:
            small.sql("select i from range(10000000) t(i) order by hash(i) limit 9000000").fetchall()

    monkeypatch.setattr(RolloutStore, "page", fail)
    answer = client.get("/api/rollouts", params={"sort": "length"})
    assert answer.status_code == 503
    error = answer.json()["error"]
    assert error.startswith("DuckDB: Out of Memory Error: ")
    assert "narrow it down" in error
    assert "\n" not in error


@pytest.mark.parametrize("host", ["127.0.0.1:8741", "localhost:1", "LOCALHOST", "[::1]:8741"])
def test_loopback_names_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/api/runs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8741", "127.0.0.1.evil.example", "", "127.0.0.1:8741@evil"]
)
@pytest.mark.parametrize("path", ["/", "/api/runs", "/static/main.js"])
def test_a_name_that_was_made_to_resolve_to_loopback_is_refused(client: TestClient, host: str, path: str) -> None:
    answer = client.get(path, headers={"Host": host})
    assert answer.status_code == 421
    assert "kdrl" not in answer.text.replace("kdrl ui", "")


def test_other_sites_get_nothing(client: TestClient) -> None:
    foreign = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
    assert client.get("/api/runs", headers=foreign).status_code == 403
    allowed = client.get("/api/runs", headers={"Origin": "https://evil.example"})  # of an old browser: answered, unread
    assert "access-control-allow-origin" not in allowed.headers
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=followed).status_code == 200  # a link to the app in a chat or a wiki


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_nothing_can_be_written(client: TestClient, method: str) -> None:
    answer = client.request(method, "/api/runs")
    assert answer.status_code == 405
    assert answer.json()["error"] == "kdrl ui only reads: use GET"


@pytest.mark.parametrize("path", ["/", "/static/main.js", "/api/runs", "/api/nothing", "/static/../api.py"])
def test_every_answer_carries_the_policy(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd", "/etc/passwd"])
def test_no_other_file_is_served(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert "error" in answer.json()


def test_pages_load_nothing_from_elsewhere() -> None:
    static = Path(__file__).parents[3] / "kdrl_core" / "look" / "ui" / "static"
    files = sorted(static.iterdir())
    assert {file.suffix for file in files} == {".html", ".js", ".css", ".svg"}
    for file in files:
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text
        assert not any(
            word in text for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(")
        )


def test_a_damaged_file_is_named_and_the_rest_shown(runs: tuple[Path, Path], tmp_path: Path) -> None:
    root = tmp_path / "kdrl"
    shutil.copytree(runs[0], root, ignore=shutil.ignore_patterns(".index"))
    damaged = root / "rollouts" / "stage=stage2" / "step=000001" / "rewards.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with RolloutStore.open([root]) as store:
        client = TestClient(create_app(store), base_url=HERE)
        (named,) = client.get("/api/runs").json()["damaged"]
        assert named["path"].endswith("stage=stage2/step=000001/rewards.parquet")
        found = client.get("/api/rollouts", params={"stage": "stage2"}).json()
        assert found["total"] == 4 * 4 * GROUP_SIZE
        assert {row["verdict"] is None for row in found["rows"] if row["step"] == 1} <= {True}


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "going"
    handmade.write_step(root, "stage1", 0, [{}])
    with RolloutStore.open([root]) as store:
        live = Live(store, every_s=0.0)
        assert live.look() == 0
        handmade.write_step(root, "stage1", 1, [{}, {}])
        assert live.look() == 1
        client = TestClient(create_app(store), base_url=HERE)
        assert client.get("/api/rollouts").json()["total"] == 3
        patient = Live(store)
        handmade.write_step(root, "stage1", 2, [{}])
        assert patient.look() == 0  # however many pages ask: every two seconds
        assert live.look() == 2


def test_a_slow_look_at_the_disk_keeps_no_page_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handmade.write_step(tmp_path / "slow", "stage1", 0, [{}])
    free, looks = threading.Event(), []

    def refresh(_: RolloutStore) -> bool:
        looks.append(free.wait(20))
        return True

    monkeypatch.setattr(RolloutStore, "refresh", refresh)
    with RolloutStore.open([tmp_path / "slow"]) as store:
        live = Live(store, every_s=0.0)
        assert [live.look(), live.look()] == [0, 0]
        free.set()
        while live.look() == 0:
            pass
        assert all(looks)  # the second call did not start another look beside the first


def test_a_run_that_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handmade.write_step(tmp_path / "gone", "stage1", 0, [{}])
    with RolloutStore.open([tmp_path / "gone"]) as store:
        client = TestClient(create_app(store, look_every_s=0.0), base_url=HERE)

        def refresh(_: RolloutStore) -> bool:
            raise RunError("the folder is not there any more")

        monkeypatch.setattr(RolloutStore, "refresh", refresh)
        answer = client.get("/api/runs")
        assert (answer.status_code, answer.json()) == (404, {"error": "the folder is not there any more"})


def test_many_ask_at_once(client: TestClient) -> None:
    def ask(number: int) -> Any:
        return client.get("/api/rollouts", params={"offset": number, "limit": 1, "sort": "length"}).json()["rows"]

    alone = [ask(number) for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(12))) == alone
