"""SQL over rollouts: right answers, read-only, and confined to the files of the runs."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rollout_runs import part_path, write_step

from kdrl_core.errors import DataError
from kdrl_core.ledger import Run
from kdrl_core.look.rollouts.query import RolloutFilter, RolloutStore
from kdrl_core.look.rollouts.record import BULKY, RECORD
from kdrl_core.look.rollouts.views import PROMPTS, STEPS, sql_type

QUERIES = {
    "select count(*) from rollouts where response is null or logprobs is null or teacher_logprobs is null": (0,),
    "select avg(len(response)), avg(list_sum(teacher_logprobs) - list_sum(logprobs)) from rollouts": (19, -7.0),
    "select count(*) from (select * from rollouts) where teacher_logprobs[1] < -1": (18,),
    "select count(*) from (from rollouts) where len(token_ids) = length": (18,),
    "select count(r.response) from rollouts r": (18,),
    "select count(*) from rollouts where 'number' in response": (18,),
    "select any_value(rollouts).prompt from rollouts where prompt_id = 'q-a'": ("What is q-a?",),
    "select count(*) from rollouts a join rollouts b using (step, prompt_id) where a.response < b.response": (9,),
    "with x as (select step, count(*) n from rollouts group by all) select max(n) from x": (6,),
    "select count(*) from rollouts where step = 1 and prompt ilike '%Q-C%'": (2,),
    'select sum("loss/total"), sum("time/rollout_s") from steps': (3.0, 7.5),
    "select num_steps, first_step, last_step, num_rollouts, reward_mean, prompt from prompts where prompt_id = 'q-b'": (
        3,
        0,
        2,
        6,
        0.5,
        "What is q-b?",
    ),
    "select count(*) from rollouts semi join prompts using (prompt_id)": (18,),
    "select rollout_s, verify_s from rollouts limit 1": (2.5, None),
}


@pytest.mark.parametrize("query", QUERIES)
def test_answers(whole: RolloutStore, query: str) -> None:
    (row,) = whole.sql(query).to_pylist()
    assert tuple(row.values()) == pytest.approx(QUERIES[query])


EMPTY = ("ref_logprobs", "entropies", "reward_values")


def test_the_views_have_the_documented_columns(whole: RolloutStore) -> None:
    described = {row["column_name"]: row["column_type"] for row in whole.sql("describe rollouts").to_pylist()}
    assert described == {name: sql_type(name) for name in RECORD.names}
    assert whole.sql("from prompts").column_names == [*PROMPTS]
    assert whole.sql("from steps").column_names[: len(STEPS)] == [*STEPS]
    assert whole.sql("summarize rollouts").num_rows == len(RECORD.names)
    rows = whole.sql("select * from rollouts").to_pylist()
    assert len(rows) == 18
    assert all(row[name] is not None for row in rows for name in BULKY if name not in EMPTY)


@pytest.mark.parametrize("name", RECORD.names)
def test_a_column_alone_is_the_column_of_all(whole: RolloutStore, name: str) -> None:
    """Whichever files a query is answered from."""
    order = "order by step, prompt_id, sample"
    every = whole.sql(f"select * from rollouts {order}")[name].to_pylist()
    assert whole.sql(f"select {name} from rollouts {order}")[name].to_pylist() == every


def test_only_the_files_that_a_query_needs_are_read(run: Run) -> None:
    with RolloutStore.open(["small"]) as store:
        part_path(run.paths, "stage2", 0, "rollouts").unlink()  # the index has what the first query asks for
        assert store.sql("select avg(length) a from rollouts").to_pylist() == [{"a": 14.0}]
        assert store.sql("select count(response) n from rollouts").to_pylist() == [{"n": 12}]


def test_the_first_rows_alone(whole: RolloutStore) -> None:
    assert whole.sql("select * from range(1000000)", limit=5).num_rows == 5
    assert whole.sql("select 1 where false", limit=5).column_names == ["1"]


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("selct 1", r"the query failed: Parser Error: syntax error at or near \"selct\""),
        ("select rewrd from rollouts", r"(?s)\"rewrd\" not found.*\"reward\".*LINE 1: select rewrd from rollouts"),
        (
            "select * from rolouts",
            "(?s)name rolouts does not exist.*The views are rollouts, steps and prompts",
        ),
        ("select 'a'::int", "Could not convert string 'a'"),
        (
            "select case when i > 90000 then ('a' || i)::int end from range(100000) t(i)",  # while results are fetched
            "the query failed: Conversion Error: Could not convert string 'a90001'",
        ),
        ("", "one query at a time, not 0"),
        ("select 1; select 2", "one query at a time, not 2"),
        ("drop view rollouts", "DROP is not possible here, since rollouts are only read"),
        ("insert into step_rows select * from step_rows", "INSERT is not possible here"),
        ("set memory_limit = '100GB'", "SET is not possible here"),
        ("explain analyze copy (select 1) to 'x'", "EXPLAIN is not possible here"),
        ("with x as (insert into step_rows select * from step_rows returning *) select * from x", "read-only mode"),
    ],
)
def test_a_bad_query_is_told(whole: RolloutStore, query: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        whole.sql(query)
    assert whole.sql("select count(*) n from rollouts").to_pylist() == [{"n": 18}]


ATTACKS = [
    "select * from read_text('{secret}')",
    "select * from read_blob('{secret}')",
    "select * from read_csv('{secret}')",
    "select * from read_json('{secret}')",
    "select * from '{secret}'",
    "select * from read_parquet('{parquet}')",
    "select * from '{parquet}'",
    "select * from glob('{folder}/*')",
    "select * from parquet_metadata('{parquet}')",
    "select * from sniff_csv('{secret}')",
    "copy (select 1) to '{folder}/made.csv'",
    "copy (select 1) to '{allowed}' (format parquet)",
    "export database '{folder}/made'",
    "attach '{folder}/made.db'",
    "install httpfs",
    "load httpfs",
    "select * from read_csv('https://localhost/x.csv')",
    "set enable_external_access = true",
    "pragma enable_profiling = 'json'",
    "set allowed_paths = ['{secret}']",
    "reset lock_configuration",
    "call enable_logging('QueryLog', storage = 'file', storage_path = '{folder}/made')",
    "select * from enable_logging('QueryLog', storage = 'file', storage_path = '{folder}/made')",
    "select * from enable_logging('QueryLog')",
    "select * from secret_of_this_process",
    "select getenv('HOME')",
    "create table t as select 1",
    "create macro f(x) as x",
    "prepare p as select 1",
    "select * from query('copy (select 1) to ''{folder}/made''')",
    "select * from query_table('{secret}')",
    "select * from json_execute_serialized_sql('copy (select 1) to ''{folder}/made''')",
    "vacuum",
    "checkpoint",
    "detach memory",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_else_can_be_read_or_written(whole: RolloutStore, tmp_path: Path, attack: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    secret_of_this_process = pa.table({"secret": [1]})
    (tmp_path / "secret").write_text("secret")
    pq.write_table(secret_of_this_process, tmp_path / "x.parquet")
    before = sorted(tmp_path.iterdir())
    allowed = part_path_of(whole)
    content = allowed.read_bytes()
    query = attack.format(secret=tmp_path / "secret", parquet=tmp_path / "x.parquet", folder=tmp_path, allowed=allowed)
    with pytest.raises(DataError):
        print(whole.sql(query))
    assert sorted(tmp_path.iterdir()) == before
    assert allowed.read_bytes() == content


def part_path_of(store: RolloutStore) -> Path:
    """A file that queries may read."""
    return store.runs()[0].path / "rollouts" / "stage=stage2" / "step=000000" / "rollouts.parquet"


def test_what_is_put_on_disk_for_a_query_goes_with_the_store(run: Run, tmp_path: Path) -> None:
    """In a process of its own, whose temporary folder is empty before and after."""
    spill = tmp_path / "spill"
    spill.mkdir()
    script = (
        "import sys\n"
        "from kdrl_core.look.rollouts.query import RolloutStore\n"
        "with RolloutStore.open([sys.argv[1]]) as store:\n"
        "    print(store.sql('select count(*) n from rollouts').to_pylist())\n"
    )
    environment = {**os.environ, "TMPDIR": str(spill)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(run.paths.root)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[{'n': 18}]\n"
    assert list(spill.iterdir()) == []


def test_a_run_that_goes_on_is_queried_as_it_is_now(store: RolloutStore, run: Run) -> None:
    write_step(run, "stage2", 3)
    store.refresh()
    assert store.sql("select max(step) s, count(response) n from rollouts").to_pylist() == [{"s": 3, "n": 24}]


@pytest.mark.parametrize(
    "query",
    [
        "select list_sum(range(3000000000))",
        "select repeat('x', 4000000000)",
        "select list(i) from range(3000000000) t(i)",
        "select len(list_sort(range(3000000000)))",
    ],
)
def test_a_query_cannot_fill_the_memory(run: Run, query: str) -> None:
    """In a process of its own, so that its peak is the query's."""
    script = (
        "import resource, sys\n"
        "from kdrl_core.errors import DataError\n"
        "from kdrl_core.look.rollouts.query import RolloutStore\n"
        "with RolloutStore.open([sys.argv[1]]) as store:\n"
        "    try:\n"
        "        store.sql(sys.argv[2])\n"
        "    except DataError as error:\n"
        "        print(error)\n"
        "    print(store.sql('select count(*) n from rollouts').to_pylist())\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, resource.getrlimit(resource.RLIMIT_AS)[0])\n"
    )
    command = [sys.executable, "-c", script, str(run.paths.root), query]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    told, after, used = done.stdout.splitlines()
    assert told.startswith("the query needs more memory than queries may use")
    assert after == "[{'n': 18}]"
    peak_mib, limit = map(int, used.split())
    assert peak_mib < 5000
    assert limit == resource.getrlimit(resource.RLIMIT_AS)[0]


def test_a_query_of_ours_ends_on_ctrl_c(whole: RolloutStore) -> None:
    never_ends = "select count(*) n from rows, range(100000000000) a, range(1000) b where a.range * b.range % 7 = 3"
    asked = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # libraries of other tests may have set their own
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            whole.aggregate(RolloutFilter(), never_ends)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - asked < 10
    assert whole.page().total == 18


ENDLESS = "select count(*) from range(100000000000) a, range(1000) b where a.range * b.range % 7 = 3"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_query_ends_on_a_signal_and_leaves_nothing(run: Run, tmp_path: Path, number: signal.Signals) -> None:
    spill = tmp_path / "spill"
    spill.mkdir()
    command = [sys.executable, "-m", "flows.cli", "rollouts", "sql", str(run.paths.root), ENDLESS]
    environment = {**os.environ, "TMPDIR": str(spill)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not any(spill.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.0)
        asked = time.monotonic()
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 130, told
    assert time.monotonic() - asked < 5
    assert told == "interrupted; nothing was changed\n"
    assert list(spill.iterdir()) == []
