"""The page of a pipeline: its numbers are those of the documents on disk, also after attempts that failed, and nothing of it runs."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from data_pipelines.corpus.histogram import histogram
from data_pipelines.corpus.report import REPORT, page_of
from data_pipelines.corpus.rules import Rule
from data_pipelines.frame.config import load_pipeline
from data_pipelines.frame.runner import run_pipeline
from m4train.errors import ConfigError, DataError
from tests.helpers.corpus import documents_of, run_stages

RULES = {
    "image": {"width": [8, 100]},
    "paragraph": {"words": [3, 50]},
    "document": {"images": [1, 3], "words": [4, 100]},
}
STAGES = {
    "clean": {"steps": {"filter": {"rules": RULES}}},
    "write": {"steps": {"write": {"validation": 0.1}}, "keep": False},
    "report": {"steps": {"report": {}}, "keep": False, "reads": None, "tasks": 1},
}
NASTY = "<script>alert('x')</script> & \"quoted\" words here"
PAGES = [
    [n, [NASTY if n % 4 == 0 else f"Page {n} has a text of some words.", *([f"png:{n}"] if n % 3 else []), "Two words"], f"http://s.org/{n}?<b>", {}]
    for n in range(30)
]  # fmt: skip


class _Cells(HTMLParser):
    """The rows of all tables, and every link to something outside."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.outside, self.scripts, self._open = [], [], 0, False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._open = True
        for name, value in attributes:
            if name in ("src", "href") and not (value or "").startswith("data:"):
                self.outside.append(value)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._open = False

    def handle_data(self, data):
        if self._open:
            self.rows[-1][-1] += data.strip()


def _funnel(page):
    return {row[1]: row for row in _Cells(page).rows if len(row) == 9 and row[0] != "stage"}


def test_the_funnel_is_what_is_on_disk_and_adds_up(tmp_path):
    assert run_stages(tmp_path, PAGES, STAGES) == 0
    root = tmp_path / "out"
    page = (root / REPORT).read_text()
    funnel = _funnel(page)
    given, kept = documents_of(root / "given"), documents_of(root / "clean")
    images = lambda documents: sum(node["type"] == "image" for d in documents for node in d.metadata["nodes"])
    words = lambda documents: sum(len(d.text.split()) for d in documents)
    assert 0 < len(kept) < len(given) == 30
    wanted = [len(given), len(kept), images(given), images(kept), words(given), words(kept)]
    assert [int(cell) for cell in funnel["filter"][2:8]] == wanted
    assert [int(cell) for cell in funnel["write"][2:4]] == [len(kept), len(kept)]
    counts = {row[0]: int(row[1]) for row in _Cells(page).rows if len(row) == 2 and row[1].isdigit()}
    assert sum(n for label, n in counts.items() if label.startswith("document/")) + counts["kept"] == 30
    assert counts["paragraph/words"] == 30


def _rules(page):
    """The rows of the tables of rules, by step."""
    rows = [row for row in _Cells(page).rows if len(row) == 7 and row[0] != "rule"]
    return [(row[0], *(int(cell.replace(",", "")) for cell in row[1:])) for row in rows]


def test_rules_one_after_the_other_lead_from_what_came_in_to_what_went_out(tmp_path):
    repeated = {"image": 1, "paragraph": 3, "url": True}
    stages = {
        "clean": STAGES["clean"],
        "keys": {"steps": {"keys": {"rules": repeated}}, "keep": False},
        "buckets": {"steps": {"buckets": {"rules": repeated}}, "keep": False, "reads": None},
        "once": {"steps": {"dedup": {"rules": repeated}}},
        "report": STAGES["report"],
    }
    pages = [[n, [f"Page {n % 25} is about\n\nnothing but  words.\n\n\n\nAll of these are shared by all.", f"png:{n % 9}", "Two words", *(["png:3"] * (n % 5))], f"http://s.org/{n % 20}", {"date": f"20{10 + n}"}] for n in range(40)]  # fmt: skip
    assert run_stages(tmp_path, pages, stages) == 0
    page = (tmp_path / "out" / REPORT).read_text()
    funnel, rules = _funnel(page), _rules(page)
    numbers = lambda row: [int(cell.replace(",", "")) for cell in row[2:8]]
    for step, labels in (("filter", ("image/", "paragraph/", "document/")), ("dedup", ("url", "image", "paragraph"))):
        rows = [row for row in rules if row[0].startswith(labels) and ("/" in row[0]) == (step == "filter")]
        came_in, went_out = numbers(funnel[step])[::2], numbers(funnel[step])[1::2]
        assert len(rows) >= 2
        assert list(rows[0][1::2]) == came_in
        assert all(list(before[2::2]) == list(after[1::2]) for before, after in pairwise(rows))
        assert list(rows[-1][2::2]) == went_out, (step, rows)


def test_the_page_is_escaped_and_needs_nothing_from_outside(tmp_path):
    assert run_stages(tmp_path, PAGES, STAGES) == 0
    page = (tmp_path / "out" / REPORT).read_text()
    cells = _Cells(page)
    assert cells.scripts == 0
    assert cells.outside == []
    assert "&lt;script&gt;alert(" in page
    assert "?&lt;b&gt;" in page
    assert page.count('src="data:image/jpeg;base64,') >= 3  # pictures of what was kept
    assert "paragraph: Two words" in page
    assert "value: 2" in page


def test_the_page_after_failures_is_the_page_of_a_run_without(tmp_path):
    assert run_stages(tmp_path / "a", PAGES, STAGES) == 0
    assert run_stages(tmp_path / "b", PAGES, {"clean": STAGES["clean"]}) == 0
    clean = tmp_path / "b" / "out" / "clean"
    for part in ("ranks/completions/00001", "statistics/00001.json", "documents-00001.jsonl.gz"):
        (clean / part).unlink()
    page = page_of(tmp_path / "b" / "out")
    assert "(2 of 3 ranks)" in page
    assert int(_funnel(page)["filter"][2]) == 20
    assert run_stages(tmp_path / "b", PAGES, STAGES) == 0
    assert (tmp_path / "b" / "out" / REPORT).read_text() == (tmp_path / "a" / "out" / REPORT).read_text()


def test_a_report_can_be_made_of_another_pipeline(tmp_path):
    assert run_stages(tmp_path, PAGES, {"clean": STAGES["clean"]}) == 0
    run_pipeline(load_pipeline("report", [f"folder={tmp_path / 'record'}", f"pipeline={tmp_path / 'out'}"]))
    assert "filter" in _funnel((tmp_path / "out" / REPORT).read_text())
    config = load_pipeline("report", [f"folder={tmp_path / 'other'}", f"pipeline={tmp_path / 'none'}"])
    with pytest.raises(ConfigError, match="is not the folder of a pipeline"):
        run_pipeline(config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no stage"):
        page_of(tmp_path / "empty")


def test_histograms_draw_thresholds_where_values_are_divided():
    rule = Rule("words", 4, 1000)
    counts = [0] * (len(rule.edges) + 1)
    import bisect

    for value in (3, 4, 1000, 1001):
        counts[bisect.bisect_right(rule.edges, value)] += 1
    below, above = rule.edges.index(4), max(n for n, edge in enumerate(rule.edges) if edge < 1000.5)
    assert sum(counts[: below + 1]) == 1  # 3 alone is below the least
    assert sum(counts[above + 1 :]) == 1  # 1001 alone is above the most
    svg = histogram(rule.edges, counts, rule.thresholds, "<words>")
    assert 'aria-label="&lt;words&gt;"' in svg
    lines = [float(x) for x in re.findall(r'class="threshold" x1="([\d.]+)"', svg)]
    width = (640 - 2 * 8) / len(counts)
    assert lines == pytest.approx([8 + width * (rule.edges.index(4) + 1), 8 + width * (above + 1)], abs=0.2)
    labels = re.findall(
        r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">([\d.e+]+|<tspan[^<]*</tspan>)</text>', svg
    )
    places = sorted((float(x), label) for x, label in labels if label not in ("1", "2"))  # but the counts on columns
    assert [re.sub("<.*?>", "", label) for _, label in places][:2] == ["4", "10"]
    assert min(after - before for (before, _), (after, _) in pairwise(places)) > width / 2  # none on another
    share = Rule("flagged_words", float("-inf"), 0.01)  # its only threshold is the first border
    first = histogram(share.edges, [1] * (len(share.edges) + 1), share.thresholds, "x")
    assert float(re.search(r'class="threshold" x1="([\d.]+)"', first)[1]) == pytest.approx(
        8 + 624 / (len(share.edges) + 1), abs=0.1
    )
    inside = histogram([0, 10], [1, 1, 1], [5], "x")
    assert float(re.search(r'class="threshold" x1="([\d.]+)"', inside)[1]) == pytest.approx(8 + 624 / 3 * 1.5, abs=0.1)


def test_ranks_of_other_numbers_of_tasks_are_one_page(tmp_path):
    assert run_stages(tmp_path / "a", PAGES, STAGES, tasks=1) == 0
    assert run_stages(tmp_path / "b", PAGES, STAGES, tasks=4) == 0
    pages = [(tmp_path / name / "out" / REPORT).read_text() for name in "ab"]
    assert _funnel(pages[0]) == _funnel(pages[1])
    assert json.loads((tmp_path / "b" / "out" / "clean" / "statistics.json").read_text())[0]["counts"]["kept"] > 0
