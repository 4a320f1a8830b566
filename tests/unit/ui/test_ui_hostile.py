"""The pages over hand-made runs: texts that attack, more rows than a browser can hold, damage, a run that goes on."""

import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from browser import needs_chromium
from unit.ui import handmade
from unit.ui.conftest import GROUP_SIZE, Visit

from kdrl_core.ledger import run_lock

pytestmark = needs_chromium

NUM_ROWS = 150_000  # 34 pixels each are more than the table's 4 million: its scroll bar is coarse


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with NUM_ROWS rollouts."""
    root = tmp_path_factory.mktemp("many") / "many"
    handmade.write_many(root, NUM_ROWS)
    return root


def address_of(view: str) -> str:
    where = {"run": "hostile", "stage": "stage1", "step": "0", "prompt": handmade.SCRIPT, "sample": "0"}
    return f"#/{view}?{urlencode(where)}"


@pytest.mark.parametrize("view", ["trends", "rollouts", "sample", "group", "compare"])
def test_hostile_text_is_text(visit: Visit, hostile: Path, view: str) -> None:
    page = visit(hostile, at=address_of(view) if view in ("sample", "group") else f"#/{view}")
    page.wait_for_selector({"trends": ".chart", "rollouts": ".rows .cell"}.get(view, "pre.prompt"))
    page.wait_for_timeout(200)  # an <img> that fails would need a moment to say so
    assert page.evaluate("window.pwned") is None
    assert page.locator("main img, main script, main a[href^='javascript']").count() == 0
    text = page.text_content("main")
    if view != "trends":
        assert handmade.SCRIPT in text
        assert not any(sign in text for sign in "\x00\x07\x1b\u202e")
    if view in ("sample", "group", "compare"):
        assert handmade.IMAGE in text
        assert "bell \\x07, escape \\x1b[31m, reversed \\u202eabc, nul \\x00" in text


def test_hostile_tokens_and_recorded_entropies(visit: Visit, hostile: Path) -> None:
    page = visit(hostile, at=f"{address_of('sample')}&colour=entropy")
    tokens = page.eval_on_selector_all(".token", "all => all.map(one => [one.textContent, one.childElementCount])")
    assert len(tokens) == len(handmade.TOKENS)
    assert all(children == 0 for _, children in tokens)
    assert tokens[0][0].strip() == handmade.SCRIPT
    assert tokens[1][0].strip() == handmade.IMAGE
    assert page.get_attribute("[data-value=entropy]", "aria-pressed") == "true"
    sizes = page.eval_on_selector_all(".token", "all => all.map(one => Number(one.style.getPropertyValue('--v')))")
    assert sizes == sorted(sizes)
    assert sizes[0] == 0  # entropies 0, 1/8, … of the hand-made step
    page.hover(".token >> nth=3")
    assert "entropy 0.3750" in page.inner_text(".token-readout")
    assert str(2**64 - 1) in page.inner_text(".answers").replace("\n", "")  # a seed, digit for digit


def test_html_cannot_be_made_even_by_a_mistake_in_the_pages(visit: Visit, hostile: Path) -> None:
    visit.excused.append("requires 'TrustedHTML' assignment")
    page = visit(hostile)
    refused = page.evaluate(
        """() => {
          try { document.querySelector("main").innerHTML = "<b>bold</b>"; return "allowed"; }
          catch (error) { return error.name; }
        }"""
    )
    assert refused == "TypeError"


def in_sight(page: Any) -> list[int]:
    found: list[int] = page.eval_on_selector_all(".rows .row", "rows => rows.map(row => Number(row.dataset.index))")
    return found


def test_the_last_of_many_rows(visit: Visit, many: Path) -> None:
    page = visit(many, at="#/rollouts")
    page.wait_for_selector(f"text={NUM_ROWS:,} rollouts")
    page.keyboard.press("End")
    page.wait_for_selector(f"text=response {NUM_ROWS - 1}")
    assert page.get_attribute("[aria-selected=true]", "data-index") == str(NUM_ROWS - 1)
    assert page.is_visible(f"text=response {NUM_ROWS - 1}")
    assert len(in_sight(page)) < 60
    page.keyboard.press("Home")
    page.wait_for_selector("text=/response 0$/")

    page.hover(".rows")
    page.mouse.wheel(0, 340)  # a wheel moves by rows, however coarse the scroll bar
    page.wait_for_function("() => Number(document.querySelector('.rows .row')?.dataset.index) === 10")
    page.evaluate("() => { const table = document.querySelector('.table'); table.scrollTop = table.scrollHeight / 2; }")
    page.wait_for_function("() => Number(document.querySelector('.rows .row')?.dataset.index) > 10")
    page.wait_for_function("() => !document.querySelector('.rows .waiting')")
    first = in_sight(page)[0]
    assert abs(first - NUM_ROWS / 2) < NUM_ROWS / 100
    assert page.text_content(f"[data-index='{first}'] .of-response") == f"response {first}"


def test_the_row_of_an_address_is_in_sight(visit: Visit, many: Path) -> None:
    page = visit(many, at="#/rollouts?reward_min=1&sort=length&descending=1&row=7000")
    page.wait_for_selector(f"text={NUM_ROWS // 10:,} rollouts")
    page.wait_for_selector("[data-index='7000'] .of-response")
    assert page.is_visible("[data-index='7000']")
    assert page.text_content("[data-index='7000'] .of-response") == f"response {NUM_ROWS - 10 - 70_000}"
    page.keyboard.press("Enter")
    page.wait_for_selector(".view.sample")
    assert f"response {NUM_ROWS - 10 - 70_000}" == page.text_content("details.raw pre")


def test_a_damaged_file_is_named_in_a_banner(visit: Visit, runs: tuple[Path, Path], tmp_path: Path) -> None:
    root = tmp_path / "kdrl"
    shutil.copytree(runs[0], root, ignore=shutil.ignore_patterns(".index"))
    (root / "rollouts" / "stage=stage2" / "step=000002" / "rollouts.parquet").write_bytes(b"PAR1 and no more")
    page = visit(root, at="#/rollouts")
    page.wait_for_selector(f"text={5 * 4 * GROUP_SIZE} rollouts")
    assert "step=000002/rollouts.parquet" in page.inner_text("#banner")
    assert "everything else is shown" in page.inner_text("#banner")


def test_pages_follow_a_run_that_goes_on(visit: Visit, tmp_path: Path) -> None:
    root = tmp_path / "going"
    handmade.write_step(root, "stage1", 0, [{}] * 4)
    page = visit(root, clock=True)
    page.wait_for_selector("[data-chart=reward] circle.point")  # a line of one step is a point
    assert page.inner_text(".live") == ""
    page.hover("[data-chart=reward] .plot-body")
    with run_lock(root / "run.lock"):
        handmade.write_step(root, "stage1", 1, [{"reward": 0.0, "verdict": "wrong"}] * 4)
        page.clock.fast_forward(5000)
        page.wait_for_selector("[data-chart=reward] path.line[d*=L]")  # without anybody's doing
        page.wait_for_selector(".live.on >> text=going: running")
        assert page.get_attribute("[data-chart=reward] .cross", "visibility") == "visible"  # the pointer is still there
    page.keyboard.press("r")
    page.wait_for_selector("text=8 rollouts")
    handmade.write_step(root, "stage1", 2, [{}])
    page.clock.fast_forward(5000)
    page.click("text=new rows: show")
    page.wait_for_selector("text=9 rollouts")


def test_an_address_of_nothing_says_so(visit: Visit, hostile: Path) -> None:
    visit.excused.append("status of 400")
    for at, words in {
        "#/nowhere": "there is no view nowhere",
        "#/rollouts?sort=lenght": "did you mean",
    }.items():
        page = visit(hostile, at=at)
        page.wait_for_selector(f".failure >> text={words}")


def test_without_a_server_the_page_says_so(visit: Visit, hostile: Path) -> None:
    visit.excused.append("Failed to load resource")
    page = visit(hostile, at="#/rollouts")
    page.wait_for_selector(".rows .cell")
    page.context.set_offline(True)
    page.keyboard.press("/")
    page.keyboard.type("x")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=kdrl ui does not answer")


def test_a_run_that_has_only_begun(visit: Visit, tmp_path: Path) -> None:
    root = tmp_path / "begun"
    (root / "rollouts").mkdir(parents=True)
    page = visit(root, clock=True)
    page.wait_for_selector("text=No step is finished yet")
    page.keyboard.press("r")
    page.wait_for_selector("text=No rollout fits these filters.")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.keyboard.press("c")
    page.wait_for_selector("text=there is nothing to compare")
    page.keyboard.press("t")
    handmade.write_step(root, "stage1", 0, [{}])
    page.clock.fast_forward(5000)
    page.wait_for_selector("[data-chart=reward] circle.point")
