"""The step `extract`: a page that kills the parser, or holds it up, costs that page and is named; the others are extracted."""

import hashlib
import os
import signal

import pytest

from data_pipelines.frame.document import image_bytes, new_document, nodes_of
from data_pipelines.web import child
from data_pipelines.web.child import PageLost, Parser
from data_pipelines.web.extract import Extract
from m4train.errors import ConfigError

# What the process of the parser runs instead of `child` for these tests: pages that hold one of these words end it
DEADLY = """
import os, signal, sys, time
sys.path[:0] = {paths!r}
from data_pipelines.web import child, page
true = page.extract
def extract(html, url, max_width):
    if b"KILL" in html: os.kill(os.getpid(), signal.SIGSEGV)
    if b"HANG" in html: time.sleep(60)
    if b"RAISE" in html: raise ValueError("not this one")
    if b"BOMB" in html: bytearray(1 << 40)
    return true(html, url, max_width)
page.extract = extract
child.serve(2048)
"""


def page(number, text):
    return new_document(f"{number}", f"http://example.org/{number}", {}, text=f"<p>{text} {number}</p>")


@pytest.fixture
def deadly(monkeypatch, tmp_path):
    """Parsers whose process dies of some pages."""
    script = tmp_path / "deadly.py"
    script.write_text(DEADLY.format(paths=[os.getcwd()]))
    real = child.subprocess.Popen
    monkeypatch.setattr(child.subprocess, "Popen", lambda command, **rest: real([command[0], str(script)], **rest))


def test_pages_that_kill_hold_up_or_break_the_parser_cost_themselves_alone(deadly):
    words = ["fine", "KILL", "fine", "HANG", "fine", "RAISE", "BOMB", "fine"]
    step = Extract(seconds=1.5)
    found = list(step.run(page(number, word) for number, word in enumerate(words)))
    assert [d.id for d in found] == ["0", "2", "4", "7"]
    assert [nodes_of(d) for d in found] == [[{"type": "text", "text": f"fine {d.id}"}] for d in found]
    counts = {"parser_crash": 1, "parser_timeout": 1, "parser_error": 2, "images": 0}
    assert step.ledger.counts == counts
    assert [named["url"] for named in step.ledger.examples["parser_crash"]] == ["http://example.org/1"]
    assert step.ledger.examples["parser_timeout"][0]["url"] == "http://example.org/3"
    assert "not this one" in step.ledger.examples["parser_error"][0]["detail"]


def test_a_parser_that_is_killed_from_outside_is_started_again():
    parser = Parser(2048, 20)
    try:
        first = parser.extract("<p>one", "http://example.org/")
        os.kill(parser._process.pid, signal.SIGKILL)
        with pytest.raises(PageLost, match="ended with -9"):
            parser.extract("<p>one", "http://example.org/")
        assert parser.extract("<p>one", "http://example.org/") == first
    finally:
        parser.close()


def test_large_pages_go_through_the_pipe_and_longer_ones_are_counted():
    step = Extract(max_characters=5_000_000)
    large = page(1, "word " * 900_000)
    [found] = step.run([large, page(2, "x" * 5_000_001)])
    assert len(found.text) > 4_000_000
    assert step.ledger.counts["too_long"] == 1


def test_documents_keep_what_the_page_says_and_images_within_it():
    import base64

    content = bytes(range(256)) * 8
    html = (
        "<html lang=en><title>A title</title><meta name=robots content=noai>"
        f"<p>text<img src='data:image/png;base64,{base64.b64encode(content).decode()}'><img src=b.png alt=B>"
    )
    step = Extract()
    [found] = step.run([new_document("k", "http://example.org/a/", {"date": "2026"}, text=html)])
    text, inside, other = nodes_of(found)
    assert (text["text"], found.text) == ("text", "text")
    assert other == {"type": "image", "url": "http://example.org/a/b.png", "alt": "B"}
    assert inside["sha256"] == hashlib.sha256(content).hexdigest()
    assert image_bytes(found, inside) == content
    kept = {name: found.metadata[name] for name in ("title", "language", "meta", "source")}
    assert kept == {"title": "A title", "language": "en", "meta": {"robots": "noai"}, "source": {"date": "2026"}}
    assert step.ledger.counts == {"images": 2}


def test_nothing_to_read_is_counted():
    step = Extract()
    assert not list(step.run([new_document("k", "http://example.org/", {}, text="<nav>menu</nav>")]))
    assert step.ledger.counts == {"nothing_to_read": 1}


def test_lone_surrogates_are_lost_and_not_the_page():
    step = Extract()
    [found] = step.run([new_document("k", "http://example.org/", {}, text="<p>a\ud800b</p>")])
    assert found.text.encode()


def test_a_width_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"extract\.max_width=0"):
        Extract(max_width=0)
