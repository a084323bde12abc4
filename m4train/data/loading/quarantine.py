"""Samples that could not be used: each named once in `quarantine.jsonl`, all counted, too many of them an error."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from m4train.errors import CHOICES, DataError, without_secrets
from m4train.json_lines import keep_lines

_FEWEST = 50  # bad samples before the share of them means anything


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


def left_out_at_end(counted: Iterable[tuple[Counter[tuple[str, str]], Counter[str]]]) -> list[str]:
    """What is said at the end of a run, of what every rank `counted`: a line for each source and reason for which samples
    were not used."""
    counts: Counter[tuple[str, str]] = Counter()
    used: Counter[str] = Counter()
    for of_rank, used_by_rank in counted:
        counts.update(of_rank)
        used.update(used_by_rank)
    lines = []
    for (source, reason), count in sorted(counts.items()):
        share = count / (used[source] + sum(n for (other, _), n in counts.items() if other == source))
        lines.append(f"left out: {source}: {count:,} {reason} ({share:.1%}), next to {used[source]:,} documents used")
    return lines


class Quarantine:
    """Writes entries to `path` and stops a run that loses more than `max_fraction` of its samples, or more than `max_too_long`
    of a source because they are too long; None if that is known from the index.

    A sample met again in a later epoch, or after a restart, is counted but not written twice. Lines are appended whole,
    so several ranks of one machine may share the file.
    """

    def __init__(self, path: str | Path, max_fraction: float, max_too_long: float | None = None) -> None:
        self.path = Path(path)
        self.max_fraction, self.max_too_long = max_fraction, max_too_long
        self.counts: Counter[tuple[str, str]] = Counter()  # by source and reason
        self.documents = 0
        self.used: Counter[str] = Counter()  # documents by source
        entries = keep_lines(self.path, needs=("source", "shard", "key"))
        self._written = {(entry["source"], entry["shard"], entry["key"]) for entry in entries}

    @property
    def bad(self) -> int:
        """Bad samples met so far, without those left out by choice."""
        return sum(count for (_, reason), count in self.counts.items() if reason not in CHOICES)

    def too_long(self, source: str) -> tuple[int, int]:
        """How many samples of a source were left out as too long so far, and how many documents of it were used."""
        return self.counts[source, "too_long"], self.used[source]

    @property
    def counted(self) -> tuple[Counter[tuple[str, str]], Counter[str]]:
        """What this rank left out, by source and reason, and the documents it used, by source."""
        return self.counts, self.used

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
        for source in self.used if self.max_too_long is not None else ():
            count, used = self.too_long(source)
            if count >= _FEWEST and count > (self.max_too_long or 0.0) * (count + used):
                raise DataError(
                    f"{count} of {count + used} samples of source {source!r} were left out as too long, more than "
                    f"data.max_dropped_fraction={self.max_too_long}: raise data.sequence_length, data.images_per_pack or it."
                )
        if self.bad >= _FEWEST and self.bad > self.max_fraction * (self.documents + self.bad):
            reasons = ", ".join(
                f"{count} {reason} in {source}" for (source, reason), count in self.counts.most_common(5)
            )
            raise DataError(
                f"{self.bad} of {self.documents + self.bad} samples were bad, more than data.max_bad_fraction="
                f"{self.max_fraction} ({reasons}): look at {self.path} and repair the shards."
            )
