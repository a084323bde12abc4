"""What a person sees: a training run in a pseudo-terminal of 80 and of 140 columns, read back as a terminal shows it."""

import contextlib
import fcntl
import os
import re
import struct
import termios
import threading

import pytest

from tests.end_to_end.conftest import small_run
from tests.helpers import warm

pyte = pytest.importorskip("pyte", reason="needs pyte, which reads what a terminal is sent")
pytestmark = pytest.mark.slow
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_COLOUR = re.compile(r"\x1b\[[0-9;]*\b(3[0-8]|4[0-8]|9[0-7])[0-9;]*m")


def _terminal(width, folder, *arguments, **environment):
    """What is sent to a terminal of that width by `m4train ARGUMENTS`, and how it looks at the end, line by line."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    sent = []

    def read():
        with contextlib.suppress(OSError):  # the other side is closed
            while block := os.read(ours, 1 << 16):
                sent.append(block)

    reader = threading.Thread(target=read)
    reader.start()
    shown = {"TERM": "xterm-256color", "COLUMNS": str(width), **environment}
    run = warm.start_command(*arguments, folder=folder, terminal=os.ttyname(theirs), **shown)
    try:
        code = run.wait(timeout=240)
    finally:
        os.close(theirs)
        reader.join(timeout=60)
        os.close(ours)
    raw = b"".join(sent).decode()
    assert code == 0, raw
    screen = pyte.HistoryScreen(width, 40, history=10_000)
    pyte.Stream(screen).feed(raw)
    above = ["".join(row[column].data for column in range(width)).rstrip() for row in screen.history.top]
    return raw, [*above, *(line.rstrip() for line in screen.display)]


@pytest.mark.parametrize(
    ("width", "environment"), [(80, {}), (140, {"NO_COLOR": "1"})], ids=["80", "140 without colour"]
)
def test_a_run_in_a_terminal(width, environment, digits_root, tmp_path):
    run = [*small_run(digits_root, tmp_path), "logging.console=true", "trainer.eval_every=6", "evaluation.shown=0"]
    raw, lines = _terminal(width, tmp_path, "train", *run, **environment)
    for stage in ("reading the configuration", "reading the index of", "making the model", "the first step"):
        assert stage in raw
    assert re.search(r"elapsed", raw)
    assert re.search(r"\d+/12 steps", raw)
    steps = [line for line in lines if re.match(r"step +\d+ ", line)]
    assert [int(line.split()[1]) for line in steps] == list(range(1, 13)), lines  # each once, above the bar, in order
    assert "held-out" in steps[5]
    assert not [line for line in lines if "━" in line or "elapsed" in line], lines  # bars are gone at the end
    printed = [_CONTROL.sub("", line).rpartition("\r")[2] for line in raw.replace("\r\n", "\n").split("\n")]
    table = [line for line in printed if re.match(r"(part|text|vision|connector|total) ", line)]
    assert table
    assert max(map(len, table)) <= width
    assert any("decay" in line for line in table)
    assert bool(_COLOUR.search(raw)) == (not environment)


def test_tables_fit_the_terminal(digits_root, tmp_path):
    raw, lines = _terminal(80, tmp_path, "plan", *small_run(digits_root, tmp_path), "experiment=digits_sft")
    printed = [_CONTROL.sub("", line).rpartition("\r")[2] for line in raw.replace("\r\n", "\n").split("\n")]
    assert max(map(len, printed)) <= 80, max(printed, key=len)
    assert any("epochs in the run" in line for line in lines)
    assert "planning" in raw
