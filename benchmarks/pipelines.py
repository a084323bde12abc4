"""Pages a second of one core, step by step, and peak memory, next to datatrove's WARC reader with trafilatura (with images) on the
same pages in one run.

    python benchmarks/pipelines.py [WARC ...] [--pages 60] [--kilobytes 100] [--rounds 3] [--json FILE]

Without WARC files, pages of about `--kilobytes` are made of those in tests/fixtures. Times are those of this process and its children
(`process_time`), the best of the rounds, which take turns so that another load of the machine meets all of them. The steps after extraction
get the documents of these pages with the images of the fixture, and rules so wide that every one of them is applied to every page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
        text = f"<html><head><title>{number}</title><base href='http://docs.example/gimp/'></head>{''.join(parts)}</body></html>"
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


# The steps after extraction ----------------------------------------------------------------------------------------------

AFTER = ("fetch", "resolve", "filter", "keys", "buckets", "dedup", "write")
SAME = {"url": True, "image": 10, "paragraph": 2, "image_set": True, "minhash": True}


def wide_rules(reference: str) -> dict[str, Any]:
    """The rules of OBELICS, with limits that let pages of this size through to the last of them."""
    import yaml

    rules = yaml.safe_load((ROOT / "conf" / "pipeline" / "filters" / "obelics.yaml").read_text())
    rules["image"] |= {"url_words": [], "once": False} | {key: [0.001, 10**6] for key in ("width", "height", "aspect")}
    for part in ("paragraph", "document"):
        rules[part] = {name: [0, 10**9] for name in rules[part]}
    return rules | {
        "document": rules["document"] | {"nsfw": "off"},
        "models": rules["models"] | {"reference": reference},
    }


def step_of(name: str, folder: Path) -> Any:
    """A step, working under `folder`, where `prepared` put what it needs."""
    from data_pipelines.corpus.dedup import Dedup, DedupBuckets, DedupKeys
    from data_pipelines.corpus.filter import Filter
    from data_pipelines.corpus.write import WriteShards
    from data_pipelines.frame.step import Place
    from data_pipelines.web.extract import Extract
    from data_pipelines.web.fetch import Fetch
    from data_pipelines.web.resolve import Resolve

    made: dict[str, Callable[[], Any]] = {
        "extract": lambda: Extract(seconds=120),
        "fetch": lambda: Fetch(
            allow_private=True, delay=0, per_host=64, respect_robots=False, respect_opt_out=False, seconds=600
        ),
        "resolve": lambda: Resolve(warc=[str(FIXTURE)]),
        "filter": lambda: Filter(wide_rules(str(folder / "reference.txt"))),
        "keys": lambda: DedupKeys(SAME),
        "buckets": lambda: DedupBuckets(SAME),
        "dedup": lambda: Dedup(SAME),
        "write": lambda: WriteShards(validation=0.1),
    }
    step = made[name]()
    step.place = Place(folder, name)
    return step


def prepared(warcs: list[str], folder: Path) -> None:
    """Documents after `warc`, `extract` and `resolve` under `folder`, and texts that models of the filters learn from."""
    from data_pipelines.frame.store import read_documents, write_documents

    write_documents(ReadWarc(warcs).run(None), folder / "pages", 0)
    write_documents(step_of("extract", folder).run(read_documents(folder / "pages")), folder / "extracted", 0)
    write_documents(step_of("resolve", folder).run(read_documents(folder / "extracted")), folder / "resolved", 0)
    with open(folder / "reference.txt", "w") as file:
        for document in read_documents(folder / "resolved"):
            file.write(document.text[:20_000] + "\n\n")


def documents_for(name: str, folder: Path, times: int, address: str = "") -> Iterator[Any]:
    """What a step is given, so many times under other URLs; the images at `address` instead of where they are from."""
    from data_pipelines.frame.document import images_of
    from data_pipelines.frame.store import read_documents

    source = {"extract": "pages", "fetch": "extracted", "resolve": "extracted"}.get(name, "resolved")
    for number in range(times):
        for document in read_documents(folder / source) if name != "buckets" else ():
            document.id = f"{document.id}-{number}"
            document.metadata["url"] += f"?{number}"
            for node in images_of(document) if name == "fetch" else ():
                node["url"] = node["url"].replace("http://docs.example/", address) + f"?{document.id}"  # each asked for
            yield document


@contextlib.contextmanager
def image_server(folder: Path) -> Iterator[str]:
    """The address of a web server on loopback, in a process of its own, with the images of the fixture."""
    site = folder / "images"
    for one in read_records(str(FIXTURE), 10**7):
        if not is_html(one):
            path = site / one.url.removeprefix("http://docs.example/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(one.payload)
    code = (
        "import sys\nfrom pathlib import Path\nfrom data_pipelines.web.wrap import served\n"
        "with served(Path(sys.argv[1])) as address:\n    print(address, flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(site)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.kill()


def later_steps(folder: Path, address: str, rounds: int) -> dict[str, float]:
    """Pages a second of one core of every step after extraction, one after the other."""
    found = {}
    for name in AFTER:
        stored = [pickle.dumps(document) for document in documents_for(name, folder, 1, address)]
        pages = len(stored) or len([*documents_for("write", folder, 1)])
        best = float("inf")
        for _ in range(rounds):
            documents = [pickle.loads(one) for one in stored]
            begun = seconds_of_core()
            sum(1 for _ in step_of(name, folder).run(documents))
            best = min(best, seconds_of_core() - begun)
        found[name] = round(pages / best, 1)
    return found


def peak_memory(name: str, folder: Path, times: int, address: str) -> float:
    """Peak memory in MB of one step, with its processes, on the documents so many times: what this process prints with --peak."""
    import psutil

    def peak(process: Any) -> float:  # VmHWM and not ru_maxrss, which a process inherits from the one that started it
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
        return int(found[1]) / 1024 if found else 0.0

    most, number = 0.0, 0
    if name == "warc":
        documents = (one for _ in range(times) for one in ReadWarc([str(folder / "made.warc.gz")]).run(None))
    else:
        documents = step_of(name, folder).run(documents_for(name, folder, times, address))
    for number, _ in enumerate(documents, 1):
        if number % 10 == 0:
            most = max(most, peak("self") + sum(peak(child.pid) for child in psutil.Process().children()))
    return round(max(most, peak("self")), 1)


def memory_growth(folder: Path, address: str) -> dict[str, dict[str, float]]:
    """Peak memory in MB of every step on the pages once and ten times, each in a process of its own."""
    found: dict[str, dict[str, float]] = {}
    for times in (1, 10):  # `buckets` and `dedup` work on what `keys` wrote just before
        for name in ("warc", "extract", *AFTER):
            command = [sys.executable, __file__, "--peak", name, str(folder), str(times), address]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            found.setdefault(name, {})[f"x{times}"] = float(done.stdout.split()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("warcs", nargs="*")
    parser.add_argument("--pages", type=int, default=60)
    parser.add_argument("--kilobytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        name, place, times, address = options.peak
        print(peak_memory(name, Path(place), int(times), address))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        made = made_warc(folder, options.pages, options.kilobytes * 1000)
        found = measure(options.warcs or [str(made)], options.rounds)
        prepared([str(made)], folder)
        with image_server(folder) as address:
            found["pages_per_second"] |= later_steps(folder, address, options.rounds)
            print(json.dumps(found), file=sys.stderr)
            found["peak_memory_mb"] = memory_growth(folder, address)
    found["measured_at"] = time.strftime("%Y-%m-%d")
    print(json.dumps(found, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
