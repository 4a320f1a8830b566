"""Any model on any benchmark: found again, gone on with, the same by every road, refused before a model is loaded."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, chat_server
from crash.tiny_run import open_tiny

from kdrl_core.boxes.evaluate import evaluate_model
from kdrl_core.config import Recipe, load_recipe, resolve_path
from kdrl_core.errors import (
    DamagedArtifactError,
    DataError,
    EngineError,
    ModelError,
    RecipeError,
    RunLockedError,
    VerificationError,
)
from kdrl_core.evaluation import answering, evaluation_plan
from kdrl_core.evaluation import evaluate as module
from kdrl_core.evaluation.endpoint import with_thought_tags
from kdrl_core.evaluation.evaluate import EvaluatedBenchmark, combined_lm_eval, evaluate_plan
from kdrl_core.evaluation.evaluation_plan import EvaluationOptions, plain_name, plan_evaluation
from kdrl_core.ledger import model_identity, publish_directory, run_lock
from kdrl_core.sampling import job as job_module
from kdrl_core.sampling.job import Sampler
from kdrl_core.sampling.journal import Journal
from kdrl_core.tables.files import read_table
from kdrl_core.types import VerdictKind
from kdrl_core.verify import screening

STUDENT = "builtin:miniature/student"
SMALL: dict[str, Any] = {"benchmarks": ["test", "hard"], "samples": 2, "max_problems": 6}


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("miniature", ["evaluation.temperature=0.7"])


@pytest.fixture(scope="module")
def server() -> Any:
    with chat_server(resolve_path(STUDENT)) as running:
        yield running


@pytest.fixture
def fresh(server: ChatServer) -> ChatServer:
    server.style, server.context, server.owner = "plain", 256, "somebody"
    server.faults.clear()
    server.seen.clear()
    return server


def evaluated(recipe: Recipe, root: Path, model: str = STUDENT, **options: Any) -> list[EvaluatedBenchmark]:
    return evaluate_plan(plan_evaluation(recipe, model, asking(**options)), root)


def asking(**options: Any) -> EvaluationOptions:
    return EvaluationOptions(**{**SMALL, **options})


def texts(found: EvaluatedBenchmark) -> list[str]:
    responses: list[str] = read_table(found.folder / "responses.parquet")["response"].to_pylist()
    return responses


def refuse_to_load(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing is to be loaded")


def test_a_second_evaluation_loads_nothing(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluated(recipe, tmp_path)
    assert [(each.name, each.is_new, each.result["num_problems"]) for each in first] == [
        ("test", True, 6),
        ("hard", True, 6),
    ]
    for name in ("rollout_engine", "load_tokenizer", "Verifier"):
        monkeypatch.setattr(answering, name, refuse_to_load)
    second = evaluated(recipe, tmp_path)
    assert [each.is_new for each in second] == [False, False]
    assert [each.result for each in second] == [each.result for each in first]
    (alone,) = evaluated(recipe, tmp_path, benchmarks=["hard"])
    assert alone.folder == first[1].folder
    assert not list(tmp_path.rglob("*.work"))


def test_a_copy_elsewhere_is_the_same_model_and_another_is_not(recipe: Recipe, tmp_path: Path) -> None:
    (one,) = evaluated(recipe, tmp_path, benchmarks=["test"])
    shutil.copytree(resolve_path(STUDENT), tmp_path / "student")
    (copy,) = evaluated(recipe, tmp_path, str(tmp_path / "student"), benchmarks=["test"])
    assert (copy.folder, copy.is_new) == (one.folder, False)
    config = tmp_path / "student" / "generation_config.json"
    config.write_text(config.read_text() + "\n")
    (other,) = evaluated(recipe, tmp_path, str(tmp_path / "student"), benchmarks=["test"])
    assert other.is_new
    assert other.folder.parent != one.folder.parent


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        (["evaluation.temperature=0.8"], {}),
        (["seed=5"], {}),
        (["evaluation.max_context_tokens=90"], {}),
        (["prompt.template='{question}='"], {}),
        (["verification.memory_limit_mb=1024"], {}),
        ([], {"samples": 3}),
        ([], {"max_problems": 5}),
    ],
)
def test_other_settings_have_a_folder_of_their_own(
    overrides: list[str], options: dict[str, Any], recipe: Recipe, tmp_path: Path
) -> None:
    changed = load_recipe("miniature", ["evaluation.temperature=0.7", *overrides])
    plans = [
        plan_evaluation(recipe, STUDENT, asking(benchmarks=["test"])),
        plan_evaluation(changed, STUDENT, asking(**{"benchmarks": ["test"], **options})),
    ]
    one, other = (evaluation_plan.settings_of(plan, plan.benchmarks[0]) for plan in plans)
    assert one != other


def test_verdicts_of_another_verifier_are_others(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_evaluation(recipe, STUDENT, asking(benchmarks=["test"]))
    before = evaluation_plan.settings_of(plan, plan.benchmarks[0])
    monkeypatch.setattr(screening, "RULES", screening.RULES + 1)
    assert evaluation_plan.settings_of(plan, plan.benchmarks[0]) != before


def test_a_model_that_kdrl_published_is_another_once_it_is_altered(tmp_path: Path) -> None:
    target = tmp_path / "model"
    publish_directory(target, lambda folder: (folder / "chat_template.jinja").write_text("a") and None)
    shutil.copytree(target, tmp_path / "elsewhere" / "model")
    (tmp_path / "elsewhere" / "model" / "manifest.json").unlink()
    first = model_identity(target)
    assert model_identity(tmp_path / "elsewhere" / "model") == first
    (target / "chat_template.jinja").write_text("b")
    assert model_identity(target) != first


def test_code_beside_a_model_is_trusted_for_that_model_alone() -> None:
    trusting = load_recipe("miniature", ["student.trust_remote_code=true"])
    assert plan_evaluation(trusting, STUDENT, asking()).model.trust_remote_code
    assert not plan_evaluation(trusting, "builtin:miniature/teacher", asking()).model.trust_remote_code


@pytest.mark.parametrize("option", ["samples", "max_problems", "concurrency"])
def test_no_samples_are_refused(option: str, recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=f"{option}: 0 is too small; give 1 or more"):
        plan_evaluation(recipe, STUDENT, asking(**{option: 0}))


def test_a_run_s_own_evaluation_is_not_published_by_a_broken_verifier(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Sampler.sample

    def broken(*arguments: Any) -> Any:
        responses, verdicts = sample(*arguments)
        return responses, [replace(verdict, kind=VerdictKind.ERROR, accuracy_reward=0.0) for verdict in verdicts]

    monkeypatch.setattr(Sampler, "sample", broken)
    run = open_tiny(artifacts, "run")
    with pytest.raises(VerificationError, match="evaluation of base, test"):
        evaluate_model(run, "base")
    assert not run.paths.evaluation("base").exists()


def test_it_is_what_a_run_finds(artifacts: Path) -> None:
    run = open_tiny(artifacts, "run", ["evaluation.temperature=0.7"])
    theirs = evaluate_model(run, "base")["benchmarks"]
    ours = evaluate_plan(plan_evaluation(run.recipe, run.recipe.student.path), artifacts)
    assert {each.name: each.result for each in ours} == theirs


@pytest.fixture
def in_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two problems a shard."""
    monkeypatch.setattr(evaluation_plan, "SHARD_RESPONSES", 4)


@pytest.mark.usefixtures("in_shards")
def test_a_stopped_evaluation_goes_on_behind_its_last_shard(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = evaluated(recipe, tmp_path / "whole", benchmarks=["test"])
    asked: list[list[str]] = []
    sample = Sampler.sample

    def stopping(self: Sampler, journal: Journal, *arguments: Any) -> Any:
        asked.append(list(dict.fromkeys(request.prompt_id for request in journal.missing)))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return sample(self, journal, *arguments)

    monkeypatch.setattr(Sampler, "sample", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluated(recipe, tmp_path, benchmarks=["test"])
    (work,) = tmp_path.glob("evaluations/*/*.work")
    assert sorted(file.name for file in work.glob("shard-*.parquet")) == ["shard-00000.parquet", "shard-00001.parquet"]
    heard: list[tuple[str, int, int]] = []
    plan = plan_evaluation(recipe, STUDENT, asking(benchmarks=["test"]))
    (found,) = evaluate_plan(plan, tmp_path, on_progress=lambda *at: heard.append(at))
    assert asked == [["test-0", "test-1"], ["test-2", "test-3"], ["test-4", "test-5"], ["test-4", "test-5"]]
    assert (heard[0], heard[-1]) == (("test", 4, 12), ("test", 12, 12))
    assert (found.folder / "responses.parquet").read_bytes() == (whole.folder / "responses.parquet").read_bytes()
    assert not work.exists()


@pytest.mark.usefixtures("in_shards")
def test_a_damaged_shard_is_named(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "publish_outcome", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluated(recipe, tmp_path, benchmarks=["test"])
    monkeypatch.undo()
    monkeypatch.setattr(evaluation_plan, "SHARD_RESPONSES", 4)
    (shard,) = tmp_path.glob("evaluations/*/*.work/shard-00001.parquet")
    shard.write_bytes(shard.read_bytes()[:-8] + b"12345678")
    with pytest.raises(DamagedArtifactError, match=r"shard-00001\.parquet"):
        evaluated(recipe, tmp_path, benchmarks=["test"])


def test_two_at_once_do_not_sample_the_same(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(path: Path) -> Any:
        raise RunLockedError("taken")

    (done,) = evaluated(recipe, tmp_path, benchmarks=["test"])
    shutil.rmtree(done.folder)
    with run_lock(done.folder.with_name(f"{done.folder.name}.work") / "evaluate.lock"):
        monkeypatch.setattr(job_module, "run_lock", held)
        with pytest.raises(RunLockedError, match=r"\.work is in use by .*evaluates the same; wait for it"):
            evaluated(recipe, tmp_path, benchmarks=["test"])


def test_one_own_benchmark_and_all_in_the_shape_of_lm_eval(recipe: Recipe, tmp_path: Path) -> None:
    rows = [{"id": "a", "problem": "3+5", "answer": "8"}, {"id": "b", "problem": "2*4", "answer": "8"}]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluated(recipe, tmp_path, benchmarks=[f"mine={mine}", "test"])
    assert [(each.name, each.result["num_problems"]) for each in found] == [("test", 6), ("mine", 2)]
    shaped = json.loads(combined_lm_eval(found))
    assert shaped["results"]["mine"]["exact_match,none"] == found[1].result["accuracy"]
    assert set(shaped["results"]) == {"test", "mine"}
    assert shaped["configs"]["mine"]["generation_kwargs"]["temperature"] == 0.7


def test_intervals_surround_their_figures(recipe: Recipe, tmp_path: Path) -> None:
    (found,) = evaluated(recipe, tmp_path, benchmarks=["test"], max_problems=32, samples=4)
    result = found.result
    assert set(result["intervals"]) == {"pass@1", "pass@2", "pass@4", "maj@4"}
    figures = {f"pass@{k}": value for k, value in result["pass_at_k"].items()} | {"maj@4": result["maj_at_k"]}
    for name, (low, high) in result["intervals"].items():
        assert low <= figures[name] <= high
        assert high - low > 0.1  # 32 problems say no more
    assert result["pass_at_k"]["1"] == pytest.approx(result["accuracy"])


def test_a_damaged_result_is_made_again(recipe: Recipe, tmp_path: Path) -> None:
    (first,) = evaluated(recipe, tmp_path, benchmarks=["test"])
    before = (first.folder / "responses.parquet").read_bytes()
    (first.folder / "responses.parquet").write_bytes(before[:-8] + b"12345678")
    (again,) = evaluated(recipe, tmp_path, benchmarks=["test"])
    assert again.is_new
    assert (first.folder / "responses.parquet").read_bytes() == before


# An endpoint


def test_an_endpoint_is_judged_as_its_directory(fresh: ChatServer, tmp_path: Path) -> None:
    """Greedy, so that the directory's larger batches make no difference."""
    recipe = load_recipe("miniature", ["evaluation.temperature=0"])
    (theirs,) = evaluated(recipe, tmp_path, benchmarks=["test"], samples=1)
    roomy = load_recipe("miniature", ["evaluation.temperature=0", "evaluation.max_context_tokens=160"])
    for style in ("plain", "reasoning"):
        fresh.style = style
        (ours,) = evaluated(roomy, tmp_path / style, fresh.url, benchmarks=["test"], samples=1)
        assert texts(ours) == texts(theirs)
        same = ("accuracy", "low", "high", "length_mean", "verdicts", "pass_at_k", "maj_at_k")
        assert {name: ours.result[name] for name in same} == {name: theirs.result[name] for name in same}
        assert ours.folder.parent.name.startswith("chatty-")
    # Requests are in flight side by side: which one comes first is chance.
    (body, _) = (body for body in fresh.seen if body["messages"] == [{"role": "user", "content": "6+0-8"}])
    assert (body["model"], body["temperature"], body["top_p"]) == ("org/chatty", 0.0, 1.0)
    asked = len(fresh.seen)
    (again,) = evaluated(roomy, tmp_path / "plain", fresh.url, benchmarks=["test"], samples=1)
    assert not again.is_new
    assert len(fresh.seen) == asked


def test_faults_that_pass_are_tried_again(fresh: ChatServer, tmp_path: Path) -> None:
    recipe = load_recipe("miniature", ["evaluation.temperature=0", "evaluation.max_context_tokens=160"])
    fresh.faults.extend(["503", "garbage", "no usage"])
    (found,) = evaluated(recipe, tmp_path, fresh.url, benchmarks=["test"], samples=1, max_problems=2)
    assert found.result["num_problems"] == 2
    assert len(fresh.seen) == 5


@pytest.fixture
def greedy() -> Recipe:
    return load_recipe("miniature", ["evaluation.temperature=0", "evaluation.max_context_tokens=160"])


def test_a_request_that_took_longer_than_retries_go_on_is_tried_once_more(
    greedy: Recipe, fresh: ChatServer, tmp_path: Path
) -> None:
    fresh.faults.append("later")
    options: dict[str, Any] = {"benchmarks": ["test"], "samples": 1, "max_problems": 1, "retry_for_s": 1.0}
    (found,) = evaluated(greedy, tmp_path, fresh.url, **options)
    assert found.result["num_problems"] == 1
    assert len(fresh.seen) == 2


def test_responses_that_came_before_a_fault_are_kept(greedy: Recipe, fresh: ChatServer, tmp_path: Path) -> None:
    options: dict[str, Any] = {"benchmarks": ["test"], "samples": 1, "max_problems": 6, "concurrency": 1}
    (whole,) = evaluated(greedy, tmp_path / "whole", fresh.url, **options)
    fresh.seen.clear()
    fresh.faults.extend(["", "", "", "400"])
    with pytest.raises(EngineError, match="answered 400"):
        evaluated(greedy, tmp_path, fresh.url, **options)
    (kept,) = tmp_path.glob("evaluations/*/*.work/shard-00000.jsonl")
    time.sleep(0.3)  # what was in flight beside the fault
    num_kept = len(kept.read_text().splitlines())
    assert num_kept in (3, 4)
    kept.write_bytes(kept.read_bytes()[:-20])  # cut off by a kill
    asked = len(fresh.seen)
    heard: list[int] = []
    plan = plan_evaluation(greedy, fresh.url, asking(**options))
    (found,) = evaluate_plan(plan, tmp_path, on_progress=lambda _, done, __: heard.append(done))
    assert len(fresh.seen) - asked == 6 - (num_kept - 1)
    assert (heard[0], heard[-1]) == (num_kept - 1, 6)
    same = [each.folder / "responses.parquet" for each in (whole, found)]
    assert read_table(same[0]).equals(read_table(same[1]))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_what_was_evaluated_is_read_without_its_server(greedy: Recipe, fresh: ChatServer, tmp_path: Path) -> None:
    options: dict[str, Any] = {"benchmarks": ["test"], "samples": 1, "max_problems": 1, "served_as": "org/chatty"}
    (first,) = evaluated(greedy, tmp_path, fresh.url, **options)
    fresh.context = 10  # whoever asked now would be refused
    (again,) = evaluated(greedy, tmp_path, f"{fresh.url}/", **options)
    assert (again.folder, again.is_new) == (first.folder, False)


def test_only_vllm_is_told_to_sample_from_all_tokens(greedy: Recipe, fresh: ChatServer, tmp_path: Path) -> None:
    for owner in ("vllm", "somebody"):
        fresh.owner = owner
        evaluated(greedy, tmp_path / owner, fresh.url, benchmarks=["test"], samples=1, max_problems=1)
    told = [{name: body.get(name) for name in ("top_p", "top_k", "repetition_penalty")} for body in fresh.seen]
    assert told == [
        {"top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0},
        {"top_p": 1.0, "top_k": None, "repetition_penalty": None},
    ]


def test_a_filter_ends_a_response_and_a_limit_of_the_server_s_own_the_evaluation(
    greedy: Recipe, fresh: ChatServer, tmp_path: Path
) -> None:
    fresh.faults.append("filter")
    (found,) = evaluated(greedy, tmp_path, fresh.url, benchmarks=["test"], samples=1, max_problems=1)
    assert found.result["clip_ratio"] == 0.0
    fresh.faults.append("short")
    with pytest.raises(EngineError, match=r"cut a response after 7 tokens, of \d+ that it was allowed.*context"):
        evaluated(greedy, tmp_path, fresh.url, benchmarks=["hard"], samples=1, max_problems=1)


def test_a_server_that_wants_another_field_for_the_limit_gets_it(
    greedy: Recipe, fresh: ChatServer, tmp_path: Path
) -> None:
    fresh.style = "new"
    (found,) = evaluated(greedy, tmp_path, fresh.url, benchmarks=["test"], samples=1, max_problems=2, concurrency=1)
    assert found.result["num_problems"] == 2
    assert ["max_tokens" in body for body in fresh.seen] == [True, False, False]


@pytest.mark.parametrize("key", ["sk-secret/0123", "12345678"])
def test_a_key_that_is_sent_back_is_kept_nowhere(
    key: str, greedy: Recipe, fresh: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", key)
    fresh.faults.append("echo")
    options: dict[str, Any] = {"benchmarks": ["test"], "samples": 1, "max_problems": 1, "api_key": "env:MY_KEY"}
    (found,) = evaluated(greedy, tmp_path, fresh.url, **options)
    assert texts(found) == ["Bearer [the key]"]
    assert [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()] == []


def test_one_stray_end_of_a_thought_says_nothing_of_the_others(
    greedy: Recipe, fresh: ChatServer, tmp_path: Path
) -> None:
    fresh.style = "answer"
    fresh.faults.append("stray")
    (found,) = evaluated(greedy, tmp_path, fresh.url, benchmarks=["test"], samples=1, max_problems=4)
    said = texts(found)
    assert sum("</think>" in text for text in said) == 1
    assert sum(text.startswith("<think>") for text in said) == 1


def test_a_template_that_opens_the_thought_is_noticed(greedy: Recipe, fresh: ChatServer, tmp_path: Path) -> None:
    options: dict[str, Any] = {"benchmarks": ["test"], "samples": 1}
    (plain,) = evaluated(greedy, tmp_path / "plain", fresh.url, **options)
    fresh.style = "opened"
    (opened,) = evaluated(greedy, tmp_path / "opened", fresh.url, **options)
    assert texts(opened) == texts(plain)
    assert opened.result["verdicts"] == plain.result["verdicts"]


def test_variables_of_the_chat_template_reach_an_endpoint(greedy: Recipe, fresh: ChatServer, tmp_path: Path) -> None:
    options: dict[str, Any] = {"benchmarks": ["test"], "samples": 1, "max_problems": 1}
    evaluated(greedy, tmp_path / "plain", fresh.url, **options)
    assert "chat_template_kwargs" not in fresh.seen[-1]
    prompt = greedy.prompt.model_copy(update={"chat_template_kwargs": {"enable_thinking": False}})
    (found,) = evaluated(greedy.model_copy(update={"prompt": prompt}), tmp_path / "plain", fresh.url, **options)
    assert fresh.seen[-1]["chat_template_kwargs"] == {"enable_thinking": False}
    assert len(fresh.seen) == 2  # another setting, so another evaluation
    assert found.result["num_problems"] == 1


def test_variables_of_the_chat_template_are_a_setting(recipe: Recipe) -> None:
    plan = plan_evaluation(recipe, STUDENT, asking(benchmarks=["test"]))
    before = evaluation_plan.settings_of(plan, plan.benchmarks[0])
    assert set(before["prompt"]) == {"template", "think_opened"}  # as it was before there were variables
    other = load_recipe("miniature", ["evaluation.temperature=0.7", "prompt.chat_template_kwargs.a=1"])
    plan = plan_evaluation(other, STUDENT, asking(benchmarks=["test"]))
    assert evaluation_plan.settings_of(plan, plan.benchmarks[0])["prompt"]["chat_template_kwargs"] == {"a": 1}


def test_what_an_endpoint_cannot_do_is_told(fresh: ChatServer, tmp_path: Path) -> None:
    recipe = load_recipe("miniature", ["evaluation.max_context_tokens=160"])
    fresh.context = 100
    with pytest.raises(EngineError, match="context of 100 tokens is too short"):
        evaluated(recipe, tmp_path, fresh.url)
    fresh.context = None  # not told
    with pytest.raises(EngineError, match=r"serves org/chatty, not other; set --served-as to one of them"):
        evaluated(recipe, tmp_path, fresh.url, served_as="other")
    fresh.faults.append("404")
    with pytest.raises(EngineError, match="answered 404"):
        evaluated(recipe, tmp_path, fresh.url, benchmarks=["test"])
    with pytest.raises(ModelError, match=r"a question may have .* tokens .* the context 60; raise"):
        evaluated(load_recipe("miniature", ["evaluation.max_context_tokens=60"]), tmp_path, fresh.url)


def test_a_server_may_call_its_model_anything() -> None:
    names = ["org/model:latest", "..", "a b\x00\n<c>", ""]
    assert [plain_name(name.rpartition("/")[2]) for name in names] == ["model-latest", "model", "a-b-c", "model"]


def test_thoughts_that_a_template_has_opened() -> None:
    assert with_thought_tags("8", think_opened=False) == "8"
    assert with_thought_tags("sum</think>8", think_opened=False) == "<think>sum</think>8"
    assert with_thought_tags("<think>sum</think>8", think_opened=True) == "<think>sum</think>8"
    assert with_thought_tags("cut in the mid", think_opened=True) == "<think>cut in the mid"


# Bad input


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (STUDENT, {"benchmarks": ["tset"]}, DataError, "no benchmark 'tset' .known: test, hard.*did you mean 'test'"),
        (STUDENT, {"benchmarks": ["test=x.jsonl"]}, DataError, "there is a benchmark 'test' already"),
        (STUDENT, {"benchmarks": ["a b=x.jsonl"]}, DataError, "--benchmark a b=x.jsonl: .*give NAME=FILE"),
        (STUDENT, {"benchmarks": ["mine=nowhere.jsonl"]}, DataError, "benchmark mine: .*nowhere.jsonl does not exist"),
        ("nowhere", {}, ModelError, "MODEL nowhere: no such directory"),
        ("run:nowhere", {}, ModelError, "MODEL run:nowhere: "),
        (STUDENT, {"served_as": "x"}, RecipeError, "--served-as is of an endpoint, but .* is no URL"),
        (STUDENT, {"api_key": "env:X"}, RecipeError, "--api-key is of an endpoint"),
        ("http://localhost:1/v1", {"gguf_file": "x.gguf"}, RecipeError, "--gguf-file x.gguf is of a directory"),
        ("http://localhost:1/v1", {"api_key": "sk-secret"}, RecipeError, "^(?!.*sk-secret).*env:NAME"),
        ("http://user:hunter2@localhost:1/v1", {}, RecipeError, "^(?!.*hunter2).*carries a user"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    model: str,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answering, "load_tokenizer", refuse_to_load)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        evaluated(recipe, tmp_path, model, **options)
    assert not list(tmp_path.iterdir())


def test_a_context_that_is_too_short_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe("miniature", ["evaluation.max_context_tokens=4000"])
    with pytest.raises(RecipeError, match=r"4000 tokens are beyond the context of .* --set evaluation.max_context_tok"):
        evaluated(recipe, tmp_path)


def test_half_a_character_is_named(recipe: Recipe, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"id": "a", "problem": "1\\ud835+1", "answer": "2"}\n')
    with pytest.raises(DataError, match=r"mine.jsonl row 1, field 'problem': holds half of a surrogate pair"):
        plan_evaluation(recipe, STUDENT, EvaluationOptions(benchmarks=[f"mine={mine}"]))


def test_a_row_without_an_answer_is_named(recipe: Recipe, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"id": "a", "problem": "3+5", "answer": "8"}\n{"id": "b", "problem": "2*4"}\n')
    with pytest.raises(DataError, match=r"mine\.jsonl row 2, field 'answer': missing"):
        evaluated(recipe, tmp_path, benchmarks=[f"mine={mine}"])
