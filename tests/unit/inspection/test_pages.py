"""Every page in a headless Chromium, at three widths, light and dark: it fits, says nothing in the console, and asks nobody."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from m4train.config.compose import load_config, save_config
from m4train.data.loading.collate import Collator
from m4train.data.plan.plan import Plan
from m4train.evaluation.benchmarks.compare import Compared
from m4train.evaluation.benchmarks.compare import page as changed_page
from m4train.inspection.compare import compare, compare_page
from m4train.inspection.live import server
from m4train.inspection.pages import frame, write
from m4train.inspection.plan_report import plan_page, plan_report
from m4train.inspection.preview import PackView, image_uri, view_pack, write_page
from m4train.inspection.replay import neighbours
from m4train.inspection.report import answers_page, report_page
from m4train.inspection.token_losses import scored_pack
from tests.helpers.data import FakeProcessor, make_sources
from tests.helpers.processing import picture

browsing = pytest.importorskip("tests.helpers.browser", reason="needs aiohttp, which speaks to the browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browsing.found() is None, reason="needs a Chromium, which is not installed here"),
]
NOTEBOOK = '<!doctype html><meta name="viewport" content="width=device-width"><title>a notebook</title>'
PAGES = ("report", "preview", "replay", "plan", "compare", "changed", "answers", "frame")


def run_files(folder: Path, steps: int = 400, seed: int = 0) -> Path:
    """A run that was never trained, with a line of everything that a run logs."""
    folder.mkdir(parents=True)
    save_config(load_config(["experiment=digits_sft", f"run_dir={folder}", f"seed={seed}"]), folder / "config.yaml")
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, steps + 1):
        loss = 4 / step**0.4 + 0.1 * rng.random() + (3 if step == 250 else 0)
        losses = {"loss": loss, "loss/single": 0.9 * loss, "loss/multi": 1.1 * loss}
        losses |= {"eval/loss/single": loss, "eval/loss": loss} if step % 100 == 0 else {}
        rates = {"lr": 1e-3 * (1 - step / 500), "lr/text": 1e-3, "lr/connector": 5e-4}
        norms = {"grad_norm": 2.0 * loss, "grad_norm/text": loss, "grad_norm/connector": 0.5 * loss}
        counts = {"tokens": 4096, "images": 40, "skipped_steps": step // 200, "quarantined": step // 50}
        left = {"too_long/single": 0.0, "too_long/multi": 0.04, "padding_fraction": 0.01, "data_wait_fraction": 0.02}
        rows.append(
            {"step": step, **losses, **rates, **norms, **counts, **left, "tokens_per_second": 30_000 + 99 * step}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dropped = [
        {"source": "multi", "key": f"a-long-key-of-a-sample-{n}", "reason": "unreadable_image"} for n in range(8)
    ]
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dropped))
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ANSWERS))
    scores = {"single": {"loss": 1.25, "loss_tokens": 9, "metric": "anls", "anls": 0.67, "count": 1}}
    (folder / "evaluation.json").write_text(json.dumps(scores))
    return folder


SCORES = {"single": {"loss": 1.25, "loss_tokens": 9, "metric": "exact_match", "exact_match": 0.5, "count": 4}}
ANSWERS = [
    {
        "source": "single",
        "key": f"k{n}",
        "question": "Which <digit> is this, and why does anybody ask?",
        "references": ["2", "two"],
        "answer": "a_very_long_answer_without_any_space_" * 3,
        "score": float(n % 2),
        "images": [image_uri(picture(40, 30, seed=n))],
    }
    for n in range(4)
]


def packs_of(folder: Path) -> tuple[Collator, Plan, list[PackView]]:
    sources, data = make_sources(folder)
    plan = Plan(sources, data, 0, 3)
    collator = Collator(sources, FakeProcessor(), data, 0)
    return collator, plan, [view_pack(collator, pack) for pack in next(plan.steps()).packs]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every page."""
    root = tmp_path_factory.mktemp("pages")
    first, second = run_files(root / "runs" / "first"), run_files(root / "runs" / "optimizer.lr=3e-3,a-second", seed=1)
    write(root / "report.html", report_page(first))
    found, runs = compare([first, second], "eval/loss", "min")
    write(root / "compare.html", compare_page(found, runs, "eval/loss"))
    collator, plan, packs = packs_of(root / "data")
    write_page(root / "preview.html", "mine: the first packs", "some packs of seed 0", packs)
    scored = []
    for pack in packs:
        used = [segment for segment in pack.segments if not segment.problem]
        losses = [np.linspace(0, place + 2, segment.loss_tokens) for place, segment in enumerate(used)]
        scored.append(scored_pack(pack, losses, collator.processor))
    write_page(root / "replay.html", "mine: step 3", "some documents", scored, neighbours(first, 3))
    write(root / "plan.html", plan_page("mine", plan_report(plan, 20, 2, 1), ["a run would stop before training"]))
    line = {"key": "k", "question": "What?", "references": ["a"], "number": 0, "answer": "x" * 200, "score": 0.0}
    changed = Compared("docvqa", 9, 0.1, (0.0, 0.2), [(line, {**line, "score": 1.0})], 0, True)
    write(root / "changed.html", changed_page([changed], "a", "b", {("docvqa", 0): [image_uri(picture(300, 90))]}))
    write(root / "answers.html", answers_page(SCORES, ANSWERS))
    write(root / "frame.html", f"{NOTEBOOK}{frame(answers_page(SCORES, ANSWERS))}")
    return root


@pytest.fixture(scope="module")
def browser() -> Iterator:
    opened = browsing.Browser()
    yield opened
    opened.close()


@pytest.mark.parametrize("width", [400, 800, 1400])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_says_nothing_and_asks_nobody(name: str, width: int, pages: Path, browser) -> None:
    page = pages / f"{name}.html"
    browser.open(page, width, dark=width == 800)
    assert browser.value("document.documentElement.scrollWidth") <= width
    # what is wider than the window lies in a box of its own that scrolls
    beyond = """[...document.querySelectorAll("main *")].filter((one) => one.getBoundingClientRect().right > innerWidth + 1
        && !one.closest(".wide, svg, dialog, .values")).map((one) => one.outerHTML.slice(0, 80))"""
    assert browser.value(beyond) == []
    assert browser.errors == []
    assert browser.requests == [page.as_uri()]


def test_dark_pages_are_dark_and_charts_are_read_at_400_pixels(pages: Path, browser) -> None:
    luminance = (
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((sum, one) => sum + Number(one), 0)"
    )
    for dark in (False, True):
        browser.open(pages / "report.html", 400, dark)
        assert (browser.value(luminance) < 200) == dark
    size = """Math.min(...[...document.querySelectorAll(".chart text")].filter((one) => one.getBoundingClientRect().height)
        .map((one) => parseFloat(getComputedStyle(one).fontSize) * one.ownerSVGElement.getBoundingClientRect().width / 640))"""
    assert browser.value(size) > 9  # pixels on the screen


OPEN = "document.querySelector('dialog').open"
SIDES = "[...document.querySelectorAll('dialog figcaption')].map((one) => one.textContent)"


def test_a_picture_is_enlarged_next_to_the_original(pages: Path, browser) -> None:
    browser.open(pages / "preview.html", 800)
    place = "(() => { const one = document.querySelector('.picture'); one.scrollIntoView({block: 'center'}); return one.getBoundingClientRect().toJSON(); })()"
    box = browser.value(place)
    browser.point(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, click=True)
    assert browser.value(OPEN)
    assert browser.value(SIDES) == ["original", "what the model saw"]
    assert browser.value("document.querySelector('dialog img').getBoundingClientRect().width") > 200
    number = "document.querySelector('dialog p').textContent"
    assert browser.value(number).startswith("1 of ")
    browser.press("ArrowRight")
    assert browser.value(number).startswith("2 of ")
    browser.press("Escape")
    assert not browser.value(OPEN)
    browser.value("document.querySelectorAll('.picture')[2].focus()")
    browser.press("Enter")
    assert browser.value(number).startswith("3 of ")
    assert browser.errors == []


SHOWN = "[...document.querySelectorAll('.values')].filter((one) => !one.hidden).map((one) => one.textContent)"


def test_values_show_on_hover_and_by_keys(pages: Path, browser) -> None:
    browser.open(pages / "report.html", 1400)
    chart = "(() => { const one = document.querySelector('.chart svg'); one.scrollIntoView({block: 'center'}); return one.getBoundingClientRect().toJSON(); })()"
    assert browser.value(SHOWN) == []
    box = browser.value(chart)
    browser.point(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    (said,) = browser.value(SHOWN)
    assert said.startswith("optimizer step ")
    assert "training: " in said
    browser.value("document.querySelector('.chart').focus()")
    browser.press("Escape")
    assert browser.value(SHOWN) == []
    browser.press("ArrowRight")
    (first,) = browser.value(SHOWN)
    browser.press("ArrowRight")
    assert first.startswith("optimizer step 1")
    assert browser.value(SHOWN) != [first]
    scales = "[...document.querySelectorAll('.chart svg')].filter((one) => one.getBoundingClientRect().height).length"
    assert browser.value(scales) == browser.value("document.querySelectorAll('.chart').length")  # one of each is shown
    scale = "document.querySelector('.chart svg:not([hidden])').dataset.scale"
    assert browser.value(scale) == "log"
    browser.value("document.querySelector('.chart button').click()")
    assert browser.value(scale) == "linear"
    assert browser.errors == []


def test_a_replay_is_sorted_by_loss_and_leads_to_neighbours(pages: Path, browser) -> None:
    browser.open(pages / "replay.html", 800)
    losses = "[...document.querySelectorAll('.document')].map((one) => Number(one.dataset.loss))"
    before = browser.value(losses)
    listed = browser.value(
        "[...document.querySelectorAll('main table td:first-child')].map((one) => Number(one.textContent))"
    )
    assert listed == pytest.approx(sorted(before, reverse=True), abs=1e-4)
    browser.value("document.querySelector('button[data-sort]').click()")
    assert browser.value(losses) == sorted(before, reverse=True)
    browser.value("document.querySelector('button[data-sort]').click()")
    assert browser.value(losses) == before
    shades = "new Set([...document.querySelectorAll('.text .trained')].map((one) => getComputedStyle(one).backgroundColor)).size"
    assert browser.value(shades) > 5  # a colour for each loss
    links = "[...document.querySelectorAll('.document header a')].every((one) => document.querySelector(one.getAttribute('href')))"
    assert browser.value(links)
    assert browser.value("document.body.textContent.includes('step before: m4train replay --step 2 run_dir=')")


def test_runs_are_watched_while_they_go_on(tmp_path: Path, browser) -> None:
    folders = [run_files(tmp_path / "one", 30), run_files(tmp_path / "two", 20, seed=1)]
    served, address = server(folders, 0)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    try:
        browser.open(address, 400)
        legend = "document.querySelector('.chart figcaption').textContent"
        assert "one training" in browser.value(legend)
        assert "two training" in browser.value(legend)
        with (folders[0] / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 4321, "loss": 0.5}) + "\n")
        deadline = time.monotonic() + 60
        while not browser.value("document.body.textContent.includes('4,321')") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert browser.value("document.body.textContent.includes('4,321')")
        assert browser.errors == []
        assert all(request.startswith(address) for request in browser.requests)
    finally:
        served.shutdown()
        served.server_close()


def test_pictures_of_a_page_are_those_it_holds():
    """A run directory of somebody else's may name anything as a picture."""
    images = ["javascript:alert(1)", "https://example.com/x.png", "data:text/html,<script>", "data:image/png;base64,AA"]
    answer = {"images": images, "question": "?", "prediction": "", "references": [""], "score": 0.0, "source": "s"}
    page = answers_page({}, [answer])
    assert re.findall(r'<img src="([^"]*)"', page) == ["", "", "", images[-1]]
