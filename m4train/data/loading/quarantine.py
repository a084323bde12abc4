"""Samples that could not be used: each named once in `quarantine.jsonl`, all counted, too many of them an error."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from m4train.errors import DataError, without_secrets
from m4train.json_lines import keep_lines

_FEWEST = 50  # bad samples before the share of them means anything
# left out because the configuration or the sample says so, not because they are bad
CHOICES = frozenset({"too_long", "skipped", "not_preferred"})


@dataclass(frozen=True)
class QuarantineEntry:
    """One sample that was dropped: from which step and pack (-1: before packing), why, and where it is stored, without the
    password that a URL may hold."""

    step: int
    pack: int
    source: str
    key: str
    shard: str
    reason: str
    detail: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shard", without_secrets(self.shard))


class Quarantine:
    """Writes entries to `path` and stops a run that loses more than `max_fraction` of its samples.

    A sample met again in a later epoch, or after a restart, is counted but not written twice. Lines are appended whole,
    so several ranks of one machine may share the file.
    """

    def __init__(self, path: str | Path, max_fraction: float) -> None:
        self.path = Path(path)
        self.max_fraction = max_fraction
        self.counts: Counter[tuple[str, str]] = Counter()  # by source and reason
        self.documents = 0
        entries = keep_lines(self.path, needs=("source", "shard", "key"))
        self._written = {(entry["source"], entry["shard"], entry["key"]) for entry in entries}

    @property
    def bad(self) -> int:
        """Bad samples met so far, without those left out by choice."""
        return sum(count for (_, reason), count in self.counts.items() if reason not in CHOICES)

    def add(self, entries: Iterable[QuarantineEntry], documents: int) -> None:
        """Records the entries of one step with its number of good documents. Raises DataError above the limit."""
        self.documents += documents
        lines = []
        for entry in entries:
            self.counts[entry.source, entry.reason] += 1
            name = (entry.source, entry.shard, entry.key)
            if name not in self._written:
                self._written.add(name)
                lines.append(json.dumps(asdict(entry)) + "\n")
        if lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write("".join(lines))
        if self.bad >= _FEWEST and self.bad > self.max_fraction * (self.documents + self.bad):
            reasons = ", ".join(
                f"{count} {reason} in {source}" for (source, reason), count in self.counts.most_common(5)
            )
            raise DataError(
                f"{self.bad} of {self.documents + self.bad} samples were bad, more than data.max_bad_fraction="
                f"{self.max_fraction} ({reasons}): look at {self.path} and repair the shards."
            )
