"""The journal of an unfinished shard: whatever happens to its file, a response is as it came, or asked for again."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdrl_core.sampling.journal import Journal
from kdrl_core.sampling.responses import Response, requests_for
from kdrl_core.types import FinishReason, RolloutRequest

REQUESTS = requests_for({"p": (), "q": (), "ü": ()}, 2, 7, "evaluation", "test")
TEXTS = ["\\boxed{4}", "<think>1\n2</think>\\boxed{5}", "", "Ω 𝕏 \u2028", 'say "no"\\', "\r\n\x0b\x1c"]


def answer_to(request: RolloutRequest) -> Response:
    return Response(
        prompt_id=request.prompt_id,
        sample=request.sample,
        text=TEXTS[REQUESTS.index(request)],
        length=3,
        finish_reason=FinishReason.STOP if request.sample else FinishReason.LENGTH,
        seed=request.seed,
    )


ANSWERS = [answer_to(request) for request in REQUESTS]


def journal(path: Path, *, bound_to: str = "s") -> Journal:
    return Journal(path, REQUESTS, settings=bound_to)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a journal with every response."""
    path = tmp_path_factory.mktemp("whole") / "j.jsonl"
    journal(path).keep(ANSWERS[:4])
    journal(path).keep(ANSWERS[4:])
    return path.read_bytes()


def test_responses_come_back_as_they_were(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(whole)
    assert journal(path).responses == ANSWERS
    assert journal(path).missing == []
    assert len(whole.splitlines()) == len(ANSWERS)


def assert_right_or_missing(path: Path, content: bytes) -> None:
    """Every response is as it came, or asked for again; a resume then has all."""
    path.write_bytes(content)
    found = journal(path)
    assert [answer for answer in ANSWERS if answer in found.responses] == found.responses
    assert len(found.responses) + len(found.missing) == len(REQUESTS)
    found.keep([answer_to(request) for request in found.missing])
    assert found.responses == journal(path).responses == ANSWERS


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_flipped_bit_never_makes_another_text(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, 8 * len(whole) - 1))
    content = bytearray(whole)
    content[at // 8] ^= 1 << at % 8
    assert_right_or_missing(tmp_path / "j.jsonl", bytes(content))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_two_partial_writes(tmp_path: Path, whole: bytes, first: float, second: float) -> None:
    """The file is cut, another call goes on, and its last write is cut as well."""
    path = tmp_path / "j.jsonl"
    path.write_bytes(whole[: round(first * len(whole))])
    journal(path).keep(ANSWERS)
    content = path.read_bytes()
    assert_right_or_missing(path, content[: round(second * len(content))])


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: content.replace(b'"length": 3', b'"length": "3"'),
        lambda content: content.replace(b'"stop"', b'"abort"'),
        lambda content: content.replace(b"boxed", b"\xff\xfe"),
        lambda content: content.replace(b"{4}", b"{5}"),
        lambda content: content.replace(b"\n", b""),
        lambda content: b"\n".join(line.partition(b" ")[2] for line in content.splitlines()),  # without checksums
        lambda content: b"\0" * len(content),
        lambda content: b"[" * 100_000,
    ],
)
def test_other_damage_is_passed_over(tmp_path: Path, whole: bytes, damage: Callable[[bytes], bytes]) -> None:
    assert_right_or_missing(tmp_path / "j.jsonl", damage(whole))


def test_lines_of_windows_are_read(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(whole.replace(b"\n", b"\r\n"))
    assert journal(path).missing == []


def test_file_and_lines_are_named(tmp_path: Path, whole: bytes, caplog: pytest.LogCaptureFixture) -> None:
    lines = whole.splitlines(keepends=True)
    lines[1] = lines[1].replace(b"{5}", b"{4}")
    lines[4] = b"nonsense\n"
    path = tmp_path / "j.jsonl"
    path.write_bytes(b"".join(lines))
    with caplog.at_level(logging.WARNING, "kdrl"):
        found = journal(path)
    assert [(request.prompt_id, request.sample) for request in found.missing] == [("p", 1), ("ü", 0)]
    assert [record.getMessage() for record in caplog.records if record.name == "kdrl"] == [
        f"{path}: line 2, 5: damaged, cut off or of other settings (2 in all); what is missing is asked for again"
    ]


def test_lines_of_other_settings_or_seeds_do_not_count(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(whole)
    assert journal(path, bound_to="other").responses == []
    others = requests_for({"p": ()}, 2, 8, "evaluation", "test")
    assert Journal(path, others, settings="s").missing == others


def test_the_last_word_counts(tmp_path: Path) -> None:
    """A replica that was started anew has its response sampled again."""
    path = tmp_path / "j.jsonl"
    first = journal(path)
    first.keep([ANSWERS[1]])
    first.keep([answer_to(REQUESTS[1])])  # the same writes nothing
    assert len(path.read_bytes().splitlines()) == 1
    other = Response(
        prompt_id="p", sample=0, text="other", length=1, finish_reason=FinishReason.STOP, seed=ANSWERS[0].seed
    )
    first.keep([other])
    first.keep([ANSWERS[0]])
    assert journal(path).responses == ANSWERS[:2]
