"""What `extract` makes of 40 real pages, each compared once by eye with a picture of it in a browser, and kept."""

import json
from pathlib import Path

from data_pipelines.web.charset import decode_page
from data_pipelines.web.page import extract
from data_pipelines.web.records import read_records
from data_pipelines.web.warc import is_html

FIXTURES = Path(__file__).parents[3] / "fixtures"
GOLDEN = FIXTURES / "documentation_nodes.jsonl"


def extracted() -> list[dict]:
    """The nodes of every page, in the order of the file."""
    found = []
    for record in read_records(str(FIXTURES / "documentation.warc.gz"), 10_000_000):
        if is_html(record):
            page = extract(decode_page(record.payload, record.charset)[0], record.url, 2048)
            found.append({"url": record.url, "title": page.get("title"), "nodes": page["nodes"]})
    return found


def test_real_pages_give_the_nodes_that_were_checked():
    expected = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    found = extracted()
    assert len(found) == len(expected) == 40
    for page, kept in zip(found, expected):
        assert page == kept


if (
    __name__ == "__main__"
):  # python -m tests.unit.data_pipelines.web.test_documentation_pages: write them again, then check by eye
    GOLDEN.write_text("".join(json.dumps(page, ensure_ascii=False) + "\n" for page in extracted()), encoding="utf-8")
