"""The documents hold what they say: commands and keys that exist, links that lead somewhere, code that compiles."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.frame import config as pipelines
from m4train.cli import COMMANDS, command_of
from m4train.commands import benchmark, follow, lmms
from m4train.config import compose
from m4train.evaluation.benchmarks.spec import load_benchmark

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md", "tests/README.md")
]
PAGES += [ROOT / "benchmarks/README.md", ROOT / "data_pipelines/README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.exists()]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def code_of(page: Path) -> str:
    """The indented lines of a page and its fenced blocks of shell, a line each, continuation lines joined."""
    lines, fence = [], None
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fence = None if fence is not None else line[3:]
        elif fence in ("", "bash") or (fence is None and line.startswith("    ")):
            lines.append(line.strip())
    return "\n".join(lines).replace("\\\n", " ")


def commands_of(page: Path) -> list[list[str]]:
    """The words after `m4train` of every command that a page shows; `...` stands for what the reader adds."""
    found = []
    for line in code_of(page).splitlines():
        if re.match(r"(m4train|torchrun .*-m m4train|[A-Z_]+=\S+ m4train) ", line):
            words = shlex.split(line, comments=True)
            found.append(words[words.index("m4train") + 1 :])
        elif re.match(r"\w+=\(.*\)", line):  # overrides kept in a variable of the shell
            found.append(["train", *shlex.split(line.partition("=(")[2].rpartition(")")[0], comments=True)])
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_and_keys_exist(page):
    for words in commands_of(page):
        name, rest = command_of([word for word in words if word != "..."])
        if name == "pipeline":
            if rest[0] in pipelines.presets():
                pipelines.load_pipeline(rest[0], [word for word in rest[1:] if "=" in word])
            continue
        if name.startswith("evaluate ") or rest[:1] == ["evaluate"]:
            name = name if name.startswith("evaluate ") else "evaluate follow"
            keys = {"follow": follow.KEYS, "lmms": lmms.KEYS}.get(name.split()[1], benchmark.KEYS)
            given = dict(word.partition("=")[::2] for word in rest if "=" in word)
            assert set(given) <= set(keys)
            for asked in given.get("benchmarks", "").strip("[]{}").split(","):
                assert not asked or asked.endswith(".yaml") or load_benchmark(asked.partition(":")[0].strip())
            continue
        values = COMMANDS[name].make_context(name, list(rest), resilient_parsing=True).params
        for word in values.get("overrides") or ():
            key, _, value = word.partition("=")
            # sbatch's options, keys to explain, questions and files are not overrides
            if "=" not in word or word.startswith(("--", '"', "$")):
                continue
            shown_here = f'title="conf/{key}/{value}.yaml"' in page.read_text()
            if key in compose.groups() and (value.isupper() or shown_here):  # a placeholder, or made on this page
                continue
            if not values["folders"] and not values["name"]:  # a reader's own configurations may hold more
                compose.parsed([word])


def test_every_command_is_shown_somewhere():
    shown = {command_of(words)[0] for page in PAGES for words in commands_of(page)}
    assert set(COMMANDS) <= shown, set(COMMANDS) - shown


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_blocks_compile(page):
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)):
        compile(block, f"{page.name}, block {number}", "exec")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_modules_exist(page):
    """Modules are named from the root or by the end of their path."""
    text = page.read_text(encoding="utf-8")
    made_here = set(re.findall(r'title="(\S+)"', text))
    folders = ("m4train", "data_pipelines", "launch", "benchmarks", "tests")
    modules = [f"/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*.py")]
    named = set(re.findall(r"`([\w/]+\.py)`", text)) - made_here
    missing = {name for name in named if not any(module.endswith(f"/{name}") for module in modules)}
    assert not missing


@pytest.mark.slow
def test_the_site_has_no_broken_link(tmp_path):
    """`make docs`: pages, navigation, anchors, and every name of the API pages."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ("index.html", "tutorial/index.html", "configuration/index.html", "api/training/index.html"):
        assert (tmp_path / "site" / page).exists()
    assert "load_config" in (tmp_path / "site/api/training/index.html").read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_pages_name_every_choice():
    """What can be chosen by name is named on the page of its subject."""
    from m4train.config import ADAPTERS, ENGINES, OPTIMIZERS
    from m4train.data.sources.registry import FORMATS
    from m4train.evaluation.metrics.registry import METRICS

    groups = compose.groups()
    choices = {
        "data": set(FORMATS),
        "training": {*OPTIMIZERS, *ADAPTERS, *ENGINES, *groups["freeze"], *groups["schedule"]},
        "evaluation": set(METRICS),
    }
    for page, names in choices.items():
        text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
        missing = {name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)}
        assert not missing, f"docs/{page}.md does not say {missing}"
