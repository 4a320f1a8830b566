"""The pages in Chromium over two trained runs: figures, table, tokens, groups, two runs side by side, addresses."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow.parquet as pq
import pytest
from browser import needs_chromium
from unit.ui.conftest import GROUP_SIZE, Visit

from kdrl_core.ledger import open_run_dir
from kdrl_core.look.reporting.run_report import ema
from kdrl_core.tables.files import load_metrics

pytestmark = needs_chromium

STEP = "run=kdrl&stage=stage2&step_min=1&step_max=1"
Runs = tuple[Path, Path]


def address(page: Any) -> tuple[str, dict[str, str]]:
    """View and parameters of the page's address."""
    parts = urlsplit(urlsplit(page.url).fragment)
    return parts.path.strip("/"), {name: values[-1] for name, values in parse_qs(parts.query).items()}


def rows(page: Any) -> list[list[str]]:
    """Texts of the table's cells, once there are any."""
    page.wait_for_selector(".rows .row .cell")
    found: list[list[str]] = page.eval_on_selector_all(
        ".rows .row", "rows => rows.map(row => [...row.children].map(cell => cell.textContent))"
    )
    return found


def total(page: Any, text: str) -> None:
    """Wait until the table says that it has this many rows."""
    page.wait_for_function("text => document.querySelector('.total')?.textContent === text", arg=text)


def column(runs: Runs, part: str, name: str, step: int = 1) -> list[Any]:
    """A column of a step of the KDRL run, from its file."""
    file = runs[0] / "rollouts" / "stage=stage2" / f"step={step:06d}" / f"{part}.parquet"
    return pq.ParquetFile(file).read()[name].to_pylist()


def test_trends_draw_what_the_run_recorded(visit: Visit, runs: Runs) -> None:
    page = visit(runs[0])
    page.wait_for_selector(".chart path.line")
    titles = page.eval_on_selector_all(".chart", "all => all.map(one => one.dataset.chart)")
    assert {"reward", "length", "verdicts", "clip", "kl", "entropy", "repetition", "grad", "gap", "time"} <= set(titles)
    last = load_metrics(open_run_dir(runs[0]), "stage2")[-1]
    assert float(page.inner_text("[data-chart=grad] output")) == pytest.approx(last["optim/grad_norm"], rel=1e-2)
    assert page.inner_text("[data-chart=verdicts] output") == f"{100 * last['verdict/correct']:.0f} %"
    lines = page.eval_on_selector_all(".chart path.line", "all => all.map(one => one.getAttribute('d'))")
    assert all(re.fullmatch(r"(M[-\d.]+ [-\d.]+(h0)?(L[-\d.]+ [-\d.]+)*)+", line) for line in lines)
    points = page.get_attribute("[data-chart=reward] path.line.c0", "d").split("L")
    assert len(points) == 6  # 2 + 4 steps, the stages one after the other


def test_a_click_on_a_point_goes_to_its_step_and_back(visit: Visit, runs: Runs) -> None:
    page = visit(runs[0], at="#/trends?stage=stage2")
    box = page.locator("[data-chart=reward] svg").bounding_box()
    page.mouse.move(box["x"] + 46 + (box["width"] - 56) / 3, box["y"] + 60)  # step 1 of 0 to 3
    assert page.inner_text("[data-chart=kl] output small").strip() == "step 1"  # the crosshair is in every figure
    page.mouse.click(box["x"] + 46 + (box["width"] - 56) / 3, box["y"] + 60)
    total(page, f"{4 * GROUP_SIZE} rollouts")
    assert address(page) == ("rollouts", {"run": "kdrl", "stage": "stage2", "step_min": "1", "step_max": "1"})
    assert "step 1" in page.inner_text(".strip")
    page.go_back()
    page.wait_for_selector(".chart path.line")
    assert address(page) == ("trends", {"stage": "stage2"})


def test_a_drag_zooms_and_keys_walk_along_a_figure(visit: Visit, runs: Runs) -> None:
    page = visit(runs[0], at="#/trends?stage=stage2")
    box = page.locator("[data-chart=reward] svg").bounding_box()
    page.mouse.move(box["x"] + 46, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 46 + (box["width"] - 56) * 0.6, box["y"] + 70, steps=4)
    page.mouse.up()
    page.wait_for_function("() => location.hash.includes('to=2')")
    page.click("text=whole range")
    page.wait_for_function("() => !location.hash.includes('to=')")
    page.focus("[data-chart=reward] .plot-body")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    page.wait_for_selector(".rows .row")
    assert address(page)[1]["step_min"] == "2"


def test_runs_lie_over_one_another_and_can_be_left_out(visit: Visit, runs: Runs) -> None:
    page = visit(*runs)
    page.wait_for_selector(".chart path.line")
    assert page.locator("[data-chart=reward] path.line:not(.faint)").count() == 2
    assert page.locator("[data-chart=verdicts]").count() == 2
    page.click("[data-run=kdrl]")
    page.wait_for_function("() => document.querySelectorAll('[data-chart=reward] .legend .key').length !== 2")
    assert address(page) == ("trends", {"run": "grpo"})
    assert "KL to the teacher" in page.inner_text(".notes")  # GRPO has none, and the page says so
    page.click("text=all metrics")
    page.wait_for_selector("[data-chart='metric:optim/learning_rate']")
    assert page.locator("[data-chart=reward] path.faint").count() == 3
    page.click("text=raw")
    page.wait_for_function("() => !document.querySelector('[data-chart=reward] path.faint')")


def test_filters_order_and_search(visit: Visit, runs: Runs) -> None:
    page = visit(*runs, at=f"#/rollouts?{STEP}")
    total(page, f"{4 * GROUP_SIZE} rollouts")
    verdicts = column(runs, "rewards", "verdict")
    page.click("[data-verdict=wrong]")
    total(page, f"{verdicts.count('wrong')} rollouts")
    assert {row[5] for row in rows(page)} == {"wrong"}
    page.click(".head >> text=length")
    page.wait_for_selector("[aria-sort=descending]")
    lengths = [
        length for length, one in zip(column(runs, "rollouts", "length"), verdicts, strict=True) if one == "wrong"
    ]
    page.wait_for_function(
        f"() => document.querySelector('.rows .of-length')?.textContent.startsWith('{max(lengths)}')"
    )
    page.click(".head >> text=length")
    page.wait_for_function(f"() => document.querySelector('.rows .of-length')?.textContent === '{min(lengths)}'")
    page.go_back()
    page.go_back()
    page.go_back()
    total(page, f"{4 * GROUP_SIZE} rollouts")
    assert page.get_attribute("[data-verdict=wrong]", "aria-pressed") == "false"

    response = column(runs, "rollouts", "response")[5]
    page.keyboard.press("/")
    page.keyboard.type(response.upper())
    page.keyboard.press("Enter")
    needle = response.lower()
    hits = [one for one in column(runs, "rollouts", "response") if needle in one.lower()]
    total(page, f"{len(hits)} rollout{'' if len(hits) == 1 else 's'}")
    page.click("text=clear")
    total(page, f"{2 * 6 * 4 * GROUP_SIZE} rollouts")
    page.fill("[name=length_max]", "0")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=No rollout fits these filters.")


def test_keys_lead_through_rows_to_a_response_and_back(visit: Visit, runs: Runs) -> None:
    page = visit(*runs, at=f"#/rollouts?{STEP}&sort=kl_mean&descending=1")
    ids = [(row[3], row[4]) for row in rows(page)]
    for _ in range(3):
        page.keyboard.press("j")
    page.keyboard.press("k")
    assert page.get_attribute("[aria-selected=true]", "data-index") == "2"
    page.keyboard.press("Enter")
    page.wait_for_selector(".view.sample .token")
    assert (address(page)[1]["prompt"], address(page)[1]["sample"]) == ids[2]
    page.keyboard.press("j")
    page.wait_for_function("() => location.hash.includes('at=3')")
    page.wait_for_function(f"() => document.querySelector('h1')?.textContent.endsWith('› #{ids[3][1]}')")
    page.keyboard.press("g")
    page.wait_for_selector(".view.group .card")
    page.go_back()
    page.wait_for_selector(".view.sample .token")
    page.keyboard.press("Escape")
    page.wait_for_selector(".view.rollouts [aria-selected=true]")
    assert address(page)[1] == {
        "run": "kdrl",
        "stage": "stage2",
        "step_min": "1",
        "step_max": "1",
        "sort": "kl_mean",
        "descending": "1",
        "row": "3",
    }
    page.keyboard.press("]")
    page.wait_for_function("() => location.hash.includes('step_min=2&step_max=2')")
    page.keyboard.press("Escape")
    page.wait_for_selector(".view.trends")
    page.keyboard.press("?")
    assert page.is_visible("dialog >> text=full-text search")
    page.keyboard.press("Escape")
    assert not page.is_visible("dialog")


def sample_at(runs: Runs, row: int) -> str:
    prompt, sample = (column(runs, "rollouts", name)[row] for name in ("prompt_id", "sample"))
    return f"#/sample?run=kdrl&stage=stage2&step=1&prompt={prompt}&sample={sample}"


def test_tokens_are_coloured_by_what_the_files_hold(visit: Visit, runs: Runs) -> None:
    row = 3
    page = visit(runs[0], at=sample_at(runs, row))
    student, teacher = column(runs, "update", "logprobs")[row], column(runs, "teacher", "teacher_logprobs")[row]
    ratios = [t - s for s, t in zip(student, teacher, strict=True)]
    spans = page.eval_on_selector_all(
        ".token", "all => all.map(one => [one.className, Number(one.style.getPropertyValue('--v')), one.textContent])"
    )
    assert len(spans) == column(runs, "rollouts", "length")[row]
    assert [name for name, *_ in spans] == [f"token {'neg' if ratio < 0 else 'pos'}" for ratio in ratios]
    largest = max(range(len(ratios)), key=lambda i: abs(ratios[i]))
    assert spans[largest][1] == 100
    assert "".join(text for *_, text in spans).startswith(column(runs, "rollouts", "response")[row])
    painted = page.eval_on_selector_all(".token", "all => all.map(one => getComputedStyle(one).backgroundColor)")
    assert len(set(painted)) > 2

    page.hover(f".token[data-i='{largest}']")
    said = page.inner_text(".token-readout").replace("−", "-")
    assert f"{ratios[largest]:+.4f}" in said
    assert f"{teacher[largest]:.4f}" in said
    page.click("[data-value=advantage]")
    advantage = column(runs, "update", "advantage")[row]
    sizes = page.eval_on_selector_all(".token", "all => all.map(one => [one.className, one.style.cssText])")
    assert len({tuple(one) for one in sizes}) == 1  # one number for the whole response
    assert sizes[0][0] == f"token {'neg' if advantage < 0 else 'pos'}"
    assert address(page)[1]["colour"] == "advantage"
    page.click("[data-value=entropy]")
    assert page.get_attribute("[data-value=entropy]", "aria-pressed") == "true"
    entropies = column(runs, "update", "entropies")[row]
    page.hover(f".token[data-i='{largest}']")
    assert f"entropy {entropies[largest]:.4f}" in page.inner_text(".token-readout")
    page.keyboard.press("5")
    page.wait_for_selector(".token.seq")


def test_a_step_without_teacher_says_why_there_is_no_ratio(visit: Visit, runs: Runs) -> None:
    prompt = pq.ParquetFile(runs[1] / "rollouts/stage=stage1/step=000000/rollouts.parquet").read()["prompt_id"][0]
    page = visit(runs[1], at=f"#/sample?run=grpo&stage=stage1&step=0&prompt={prompt}&sample=0")
    assert "no teacher scored this step" in page.inner_text("[data-value=ratio]")
    page.dispatch_event("[data-value=ratio]", "click")
    assert page.get_attribute("[data-value=ratio]", "aria-pressed") == "false"  # what is not there cannot be chosen
    assert page.get_attribute("[data-value=entropy]", "aria-pressed") == "true"


def test_a_group_shows_every_answer(visit: Visit, runs: Runs) -> None:
    prompt = column(runs, "rollouts", "prompt_id")[0]
    page = visit(runs[0], at=f"#/group?run=kdrl&stage=stage2&step=1&prompt={prompt}")
    shown = page.eval_on_selector_all(".card pre", "all => all.map(one => one.textContent)")
    assert shown == column(runs, "rollouts", "response")[:GROUP_SIZE]
    right = column(runs, "rewards", "verdict")[:GROUP_SIZE].count("correct")
    assert f"right {right} of {GROUP_SIZE}" in page.inner_text(".view > .facts")
    page.click("text=by length")
    samples = page.eval_on_selector_all(".card", "all => all.map(one => Number(one.dataset.sample))")
    lengths = column(runs, "rollouts", "length")[:GROUP_SIZE]
    assert [lengths[sample] for sample in samples] == sorted(lengths, reverse=True)
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector(".view.sample")
    assert address(page)[1]["sample"] == str(samples[1])
    page.go_back()
    page.wait_for_selector(".view.group")
    page.keyboard.press("]")
    page.wait_for_function("prompt => !location.hash.includes(prompt)", arg=prompt)
    assert page.locator(".card").count() == GROUP_SIZE


def test_the_same_prompt_in_two_runs_and_at_two_steps(visit: Visit, runs: Runs) -> None:
    prompt = column(runs, "rollouts", "prompt_id")[0]
    page = visit(*runs, at=f"#/compare?prompt={prompt}&run_a=kdrl&stage_a=stage2&step_a=1")
    left, right = page.locator("[data-side=a]"), page.locator("[data-side=b]")
    assert left.locator(".card").count() == right.locator(".card").count() == GROUP_SIZE
    assert left.locator(".card pre").first.text_content() == column(runs, "rollouts", "response")[0]
    assert right.locator("select").first.input_value() == "grpo"
    theirs = pq.ParquetFile(runs[1] / "rollouts/stage=stage2/step=000001/rollouts.parquet").read()["response"]
    assert right.locator(".card pre").first.text_content() == theirs[0].as_py()
    assert page.locator("[data-chart=prompt-reward] circle.point").count() >= 2
    right.locator("select").first.select_option("kdrl")
    page.wait_for_function("() => location.hash.includes('run_b=kdrl')")
    assert address(page)[1]["run_a"] == "kdrl"
    page.wait_for_function("() => document.querySelector('[data-side=b] select')?.value === 'kdrl'")


@pytest.mark.parametrize(
    "at",
    [
        "#/trends?run=kdrl&stage=stage2&from=1&to=3&raw=1",
        f"#/rollouts?{STEP}&verdict=wrong&verdict=malformed&sort=length&descending=1&row=4",
        "#/sample",
        "#/group",
        "#/compare",
    ],
)
def test_an_address_is_the_whole_view(visit: Visit, runs: Runs, at: str) -> None:
    prompt = column(runs, "rollouts", "prompt_id")[0]
    at = {
        "#/sample": f"{sample_at(runs, 2)}&colour=signal",
        "#/group": f"#/group?run=kdrl&stage=stage2&step=1&prompt={prompt}&order=length",
        "#/compare": f"#/compare?prompt={prompt}&run_a=grpo&stage_a=stage2&step_a=1&run_b=kdrl&stage_b=stage2&step_b=1",
    }.get(at, at)
    page = visit(*runs, at=at)
    before, url = seen(page), page.url
    page.reload()
    page.wait_for_selector("main > .view")
    page.wait_for_function("before => document.querySelector('main')?.innerText === before", arg=before)
    assert page.url == url
    assert url.endswith(at)


def seen(page: Any) -> str:
    """What the view says, once it rests."""
    page.wait_for_function(
        "() => !document.querySelector('.waiting, .stale') && document.querySelector('main')?.innerText.length > 80"
    )
    text: str = page.inner_text("main")
    return text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_views_fit_a_phone_in_light_and_dark(visit: Visit, runs: Runs, scheme: str) -> None:
    page = visit(*runs, width=390, height=800, color_scheme=scheme)
    prompt = column(runs, "rollouts", "prompt_id")[0]
    for at in (
        "#/trends",
        f"#/rollouts?{STEP}",
        sample_at(runs, 2),
        f"#/group?run=kdrl&stage=stage2&step=1&prompt={prompt}",
        "#/compare",
    ):
        page.goto(f"{page.url.split('#')[0]}{at}")
        page.wait_for_selector(f"body[data-view={at[2:].split('?')[0]}]")
        seen(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, at
    paper, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (sum(map(int, re.findall(r"\d+", paper))) > sum(map(int, re.findall(r"\d+", ink)))) == (scheme == "light")


def called(page: Any, call: str, *arguments: Any) -> Any:
    """What a function of scale.js returns."""
    script = f"async (given) => {{ const scale = await import('/static/scale.js'); return scale.{call}(...given); }}"
    return page.evaluate(script, list(arguments))


def test_the_arithmetic_of_figures(visit: Visit, runs: Runs) -> None:
    page = visit(runs[0])
    rewards = [row["reward/mean"] for row in load_metrics(open_run_dir(runs[0]), "stage2")]
    assert called(page, "smoothed", rewards) == pytest.approx(ema(rewards))
    assert called(page, "smoothed", [1, None, 1]) == [1, None, 1]  # a gap stays one
    assert called(page, "ticks", 0, 1) == [0, 0.5, 1]  # rough step 0.25: the next of 1, 2, 5, 10 tenths
    assert called(page, "ticks", -3, 17) == [0, 5, 10, 15]
    assert called(page, "extent", [0.2, None, 0.9]) == [
        0,
        pytest.approx(0.9 + 0.06 * 0.9),
    ]  # from 0: that squeezes little
    assert called(page, "extent", [7, 7]) == [pytest.approx(6.3), pytest.approx(7.7)]
    assert called(page, "extent", [24, 24.000000000000004]) == [pytest.approx(21.6), pytest.approx(26.4)]
    assert called(page, "ticks", 24, 24.000000000000004) == [24]  # once it never ended
    assert called(page, "nearest", [0, 1, 5], 3.1) == 2
    assert called(page, "nearest", [0, 1, 5], 2.9) == 1
    steps = list(range(10_000))
    values: list[float | None] = [0.0] * len(steps)
    values[1234], values[7777], values[10] = 1.0, -1.0, None
    kept = called(page, "thinned", steps, values, 0, len(steps), 300)
    assert {0, 1234, 7777, 9999} <= set(kept)  # no peak is lost
    assert len(kept) <= 4 * 300
    assert kept == sorted(kept)
