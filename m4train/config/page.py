"""Makes docs/configuration.md from the schema: python -m m4train.config.page > docs/configuration.md"""

from __future__ import annotations

from itertools import groupby

from m4train.config.compose import groups, resource_folder
from m4train.config.describe import SAME_AS, Key, all_keys

HEAD = """<!-- Made by `make configuration` from the schema in m4train/config/ and conf/. Edit the comments there, not this page. -->

# Configuration

Every key with its type, its default and its effect. A run is composed from `conf/train.yaml`, one choice for each group
(`engine=fsdp2`), an `experiment=NAME` that sets several of them, and single keys (`trainer.max_steps=50`); the rightmost wins.
A default here is that of the schema; a choice of a group may set another.

    m4train config experiment=digits_sft          # the composed configuration, as YAML
    m4train config trainer.micro_batch_size       # one key or group: what it means, and which modules read it

A key that does not exist, a value of another type, and what does not go together are refused before anything is loaded. In a
key, `NAME` stands for a name that you choose, and `N` for a number from 0.
"""


def page() -> str:
    """The whole page, as Markdown."""
    lines = [HEAD]
    for name, keys in groupby(all_keys(), key=lambda key: "" if "." not in key.name and not key.group else top(key)):
        lines += _section(name, list(keys))
    return "\n".join(lines)


def top(key: Key) -> str:
    """The first word of the key: the group that `conf/` may have choices for."""
    return key.name.partition(".")[0]


def choices_of(group: str) -> list[tuple[str, str]]:
    """The choices of a group in `conf/`, each with the comment that its file begins with; none for a name that is not such a group."""
    found = []
    for choice in groups().get(group, []):
        head = []
        for line in (resource_folder("conf") / group / f"{choice}.yaml").read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            if not line.startswith("# @"):
                head.append(line.lstrip("# ").strip())
        found.append((choice, " ".join(head)))
    return found


def _section(name: str, keys: list[Key]) -> list[str]:
    lines = [f"## {name or 'The run'}", ""]
    if name and keys[0].meaning:
        lines += [keys[0].meaning, ""]
    if choices_of(name):
        lines += [f"Choices, `{name}=`:", ""]
        lines += [f"- `{choice}`: {about}" if about else f"- `{choice}`" for choice, about in choices_of(name)] + [""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    lines += [_row(key) for key in keys if key.name != name]
    return [*lines, ""]


def _row(key: Key) -> str:
    meaning = f"{key.meaning} The keys are those of `{SAME_AS[key.name]}`." if key.name in SAME_AS else key.meaning
    default = f"`{key.default}`" if key.default else ""
    cells = [f"`{key.name}`", key.type, default, meaning]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print(page(), end="")
