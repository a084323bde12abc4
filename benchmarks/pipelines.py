"""Pages a second of one core, step by step, and peak memory, next to datatrove's WARC reader with trafilatura (with images) on the
same pages in one run.

    python benchmarks/pipelines.py [WARC ...] [--pages 60] [--kilobytes 100] [--rounds 3] [--json FILE]

Without WARC files, pages of about `--kilobytes` are made of those in tests/fixtures. Times are those of this process and its children
(`process_time`), the best of the rounds, which take turns so that another load of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_pipelines.web.charset import decode_page  # noqa: E402
from data_pipelines.web.page import extract  # noqa: E402
from data_pipelines.web.records import read_records  # noqa: E402
from data_pipelines.web.warc import ReadWarc, is_html  # noqa: E402
from data_pipelines.web.wrap import wrap  # noqa: E402

FIXTURE = ROOT / "tests" / "fixtures" / "documentation.warc.gz"


def seconds_of_core() -> float:
    mine = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in mine)


def made_warc(folder: Path, pages: int, size: int) -> Path:
    """A WARC file of pages of about `size` bytes: the bodies of real ones after each other."""
    bodies = [decode_page(one.payload, one.charset)[0] for one in read_records(str(FIXTURE), 10**7) if is_html(one)]
    site = folder / "site"
    site.mkdir()
    for number in range(pages):
        parts, length, place = [], 0, number
        while length < size:
            body = bodies[place % len(bodies)]
            begin = body.find("<body")
            parts.append(body[begin : body.rfind("</body")])
            length += len(parts[-1])
            place += 1
        text = f"<html><head><title>{number}</title></head>{''.join(parts)}</body></html>"
        (site / f"{number:05d}.html").write_text(text, encoding="utf-8")
    wrap(site, folder / "made.warc.gz")
    return folder / "made.warc.gz"


def steps(paths: list[str], htmls: list[tuple[str, str]]) -> dict[str, Callable[[], Any]]:
    """What is measured, each over all pages."""
    from selectolax.lexbor import LexborHTMLParser

    from data_pipelines.frame.document import new_document
    from data_pipelines.web.extract import Extract

    def in_child() -> int:
        documents = (new_document(str(n), url, {}, text=html) for n, (url, html) in enumerate(htmls))
        return sum(1 for _ in Extract(seconds=120).run(documents))

    measured: dict[str, Callable[[], Any]] = {
        "warc (fastwarc, member by member)": lambda: sum(1 for _ in ReadWarc(paths).run(None)),
        "parser alone (selectolax)": lambda: [LexborHTMLParser(html) for _, html in htmls],
        "extract, in this process": lambda: [extract(html, url, 2048) for url, html in htmls],
        "extract, the step with its process": in_child,
    }
    try:
        from datatrove.pipeline.readers import WarcReader
        from trafilatura import extract as trafilatura

        folder = str(Path(paths[0]).parent)
        measured["datatrove's WARC reader (warcio)"] = lambda: [
            *WarcReader(folder, glob_pattern=Path(paths[0]).name).run()
        ]
        measured["trafilatura with images"] = lambda: [
            trafilatura(html, url=url, include_images=True, favor_precision=True) for url, html in htmls
        ]
        next(iter(WarcReader(folder, glob_pattern=Path(paths[0]).name).run()))  # it names what it lacks when it runs
    except ImportError as error:
        measured = {name: action for name, action in measured.items() if "datatrove" not in name}
        print(f"without datatrove and trafilatura, which are compared with: {error}", file=sys.stderr)
    return measured


def measure(paths: list[str], rounds: int) -> dict[str, Any]:
    records = [one for path in paths for one in read_records(path, 10**7) if not one.trouble and is_html(one)]
    htmls = [(one.url, decode_page(one.payload, one.charset)[0]) for one in records]
    measured = steps(paths, htmls)
    best: dict[str, float] = {}
    for number in range(rounds):
        for name, action in measured.items():
            if number and best[name] > 20:  # slow ones are measured once
                continue
            begun = seconds_of_core()
            action()
            best[name] = min(best.get(name, float("inf")), seconds_of_core() - begun)
    kilobytes = sum(len(html) for _, html in htmls) / len(htmls) / 1000
    return {
        "pages": len(htmls),
        "kilobytes": round(kilobytes, 1),
        "pages_per_second": {n: round(len(htmls) / s, 1) for n, s in best.items()},
    }


def memory_growth(path: Path) -> dict[str, float]:
    """Peak memory in MB of warc and extract, both processes together, on the file once and ten times."""
    # VmHWM and not ru_maxrss, which a process inherits from the one that started it
    code = (
        "import psutil,re,sys\nfrom data_pipelines.web.warc import ReadWarc\nfrom data_pipelines.web.extract import Extract\n"
        "def peak(p): return int(re.search(r'VmHWM:\\s+(\\d+)', open(f'/proc/{p}/status').read())[1]) / 1024\n"
        "most=n=0\nfor _ in range(int(sys.argv[2])):\n  for d in Extract(seconds=120).run(ReadWarc([sys.argv[1]]).run(None)):\n    n+=1\n"
        "    if n % 10 == 0: most=max(most, peak('self') + sum(peak(c.pid) for c in psutil.Process().children()))\n"
        "print(most)"
    )
    found = {}
    for times in (1, 10):
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(times)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        found[f"x{times}"] = round(float(done.stdout), 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("warcs", nargs="*")
    parser.add_argument("--pages", type=int, default=60)
    parser.add_argument("--kilobytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = [str(made_warc(Path(folder), options.pages, options.kilobytes * 1000))] if not options.warcs else []
        found = measure(options.warcs or made, options.rounds)
        found["peak_memory_mb"] = memory_growth(Path((options.warcs or made)[0]))
    found["measured_at"] = time.strftime("%Y-%m-%d")
    print(json.dumps(found, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
