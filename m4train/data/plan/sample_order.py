"""The samples of one source, in the order the plan draws them, each with the segments it becomes."""

from __future__ import annotations

from dataclasses import dataclass

from m4train.config import DataConfig
from m4train.data.documents.pieces import loss_tokens
from m4train.data.documents.splitting import piece_range
from m4train.data.plan.packing import Unit
from m4train.data.plan.permutation import Permutation, WindowOrder
from m4train.data.source import Source
from m4train.errors import DataError

_CHUNK = 4096  # samples of the order computed at a time


@dataclass(frozen=True)
class Dropped:
    """A sample the plan passed over: the index knows it is bad, or it is too long to be packed."""

    source: int
    sample: int
    reason: str
    detail: str


@dataclass(frozen=True)
class NextSample:
    """The next sample that can be packed, as its units; `amount` is what it counts in the mixture; `dropped` are the samples
    passed over on the way."""

    units: list[Unit]
    amount: int
    dropped: list[Dropped]
    after: tuple[int, int]  # epoch and position behind it


class SampleOrder:
    """Every sample of a source once per epoch, in an order of its own each epoch."""

    def __init__(self, source: Source, number: int, data: DataConfig, seed: int) -> None:
        self._source, self._number, self._data, self._seed = source, number, data, seed
        self.epoch = self.position = 0
        self._epochs = data.epochs if source.config.epochs is None else source.config.epochs
        self._head: NextSample | None = None
        self._chunk: list[int] = []
        self._chunk_start = self._chunk_epoch = 0
        self._epoch_order: tuple[int, Permutation | WindowOrder] | None = None  # costs time by the number of blocks

    def peek(self) -> NextSample | None:
        """The next sample, without taking it; None after the last epoch, with nothing more to report.

        Raises DataError if a whole epoch holds no sample that can be packed.
        """
        if self._head is None:
            self._head = self._find()
        return self._head if self._head.units else None

    def take(self) -> NextSample:
        """The next sample; after the last epoch one without units, which reports what was dropped at its end."""
        self.peek()
        assert self._head is not None
        head, self._head = self._head, None
        self.epoch, self.position = head.after
        return head

    def _find(self) -> NextSample:
        dropped: list[Dropped] = []
        epoch, position, tried = self.epoch, self.position, 0
        while True:
            if position == len(self._source):
                epoch, position = epoch + 1, 0
            if self._epochs is not None and epoch >= self._epochs:
                return NextSample([], 0, dropped, (epoch, position))
            sample = self._sample(epoch, position)
            position += 1
            units = self._units(sample, epoch, dropped)
            if units:
                return NextSample(units, self._amount(sample, epoch, units), dropped, (epoch, position))
            tried += 1
            if tried > 2 * len(self._source):  # the end of one epoch and the beginning of the next hold fewer in a row
                raise DataError(
                    f"None of the {len(self._source)} samples of source {self._source.name!r} can be packed, "
                    f"last: {dropped[-1].detail}."
                )

    def _sample(self, epoch: int, position: int) -> int:
        if not self._data.shuffle:
            return position
        if not self._chunk_start <= position < self._chunk_start + len(self._chunk) or epoch != self._chunk_epoch:
            self._chunk_start, self._chunk_epoch = position, epoch
            self._chunk = self._order(epoch).take(position, _CHUNK).tolist()
        return self._chunk[position - self._chunk_start]

    def _order(self, epoch: int) -> Permutation | WindowOrder:
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            self._epoch_order = epoch, self._made_order(epoch)
        return self._epoch_order[1]

    def _made_order(self, epoch: int) -> Permutation | WindowOrder:
        key = f"{self._seed} {self._source.name} {epoch}"
        blocks = self._source.block_ends()
        if blocks is None:
            return Permutation(len(self._source), key)
        return WindowOrder(blocks, self._data.shuffle_window, key)

    def _amount(self, sample: int, epoch: int, units: list[Unit]) -> int:
        """What a sample counts in the mixture."""
        by, source = self._data.mixture.by, self._source
        if by == "samples":
            return 1
        if by == "tokens":
            return sum(unit.tokens for unit in units)
        if by == "images":
            return source.index.image_count(sample)
        return loss_tokens(source.draw(sample, self._seed, epoch).pieces, source.config.loss)

    def _units(self, sample: int, epoch: int, dropped: list[Dropped]) -> list[Unit]:
        """The units of a sample."""
        data, source = self._data, self._source
        tokens, frames = source.index.size(sample, source.variant(sample, self._seed, epoch))
        if tokens == 0:
            where = source.locate(sample)
            dropped.append(Dropped(self._number, sample, *where.shard.bad[where.number]))
            return []
        fits = tokens <= data.sequence_length and frames <= data.images_per_pack
        if fits and source.config.documents.end_marker is None:
            return [Unit(self._number, sample, epoch, 0, -1, tokens, frames)]
        division = source.draw(sample, self._seed, epoch).division(data)
        units = []
        for first, last in division.ranges:
            pieces = piece_range(division.pieces, first, last)
            size = int(pieces.tokens.sum()), int(pieces.frames.sum())
            units.append(Unit(self._number, sample, epoch, first, last, *size))
        for first, last in division.lost:
            pieces = piece_range(division.pieces, first, last)
            limits = f"data.sequence_length={data.sequence_length} and data.images_per_pack={data.images_per_pack}"
            detail = f"{pieces.tokens.sum()} tokens and {pieces.frames.sum()} frames do not fit {limits}"
            dropped.append(Dropped(self._number, sample, "too_long", detail))
        return units

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._head, self._chunk = None, []
