"""One stored sample becomes one labelled document: the same path for planned and for streamed data.

In order: the text is rendered to pieces (`prepare`), then the images that the wanted pieces name are decoded, augmented and
cut into frames, everything is laid out as token ids, and the tokens to train on are chosen (`finish`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from PIL import Image

from m4train.batch import DocumentRecord
from m4train.config import AugmentConfig
from m4train.data.documents.assemble import Document
from m4train.data.documents.augment import augment
from m4train.data.documents.labels import trained_tokens, weight_sum
from m4train.data.documents.pieces import Pieces
from m4train.data.documents.rendering import Prepared, Renderer, as_planned, encode_view, expand, needed_sizes
from m4train.data.documents.sample import Sample
from m4train.data.documents.splitting import piece_range
from m4train.data.documents.variants import View
from m4train.errors import BadSample, StaleIndexError
from m4train.processing.images import decode_scaled
from m4train.processing.pieces import EncodedImage, ImagePiece

Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True)
class StoredSample:
    """A sample as it is read.

    `sizes` are those of all its images, upright, by their headers; `decode(wanted, least)` gives the images numbered
    `wanted`, those with a `least` size no larger than a JPEG decoder must make them, and raises BadSample.
    """

    sample: Sample
    sizes: Sequence[Size]
    decode: Callable[[Sequence[int], Mapping[int, Size]], dict[int, Image.Image]]


class DocumentBuilder:
    """Builds the documents of one source, number `source` of those in a batch.

    `clock(stage)` surrounds the stages tokenize, decode and tile, for measurements.
    """

    def __init__(
        self,
        renderer: Renderer,
        augmentation: AugmentConfig,
        source: int,
        clock: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> None:
        self.renderer, self._processor, self._config = renderer, renderer.processor, renderer.config
        self._augmentation, self._source, self._clock = augmentation, source, clock

    def prepare(self, stored: StoredSample, key: str, variant: int) -> Prepared:
        """The pieces of one variant of the sample and how its images are encoded. Raises BadSample."""
        with self._clock("tokenize"):
            return self.renderer.prepare(stored.sample, key, stored.sizes, variant)

    def finish(
        self,
        stored: StoredSample,
        prepared: Prepared,
        record: DocumentRecord,
        draws: bytes,
        planned: Pieces,
        first: int = 0,
        last: int = -1,
    ) -> Document:
        """The pieces from `first` up to `last` (-1: all) as a document.

        `planned` is what the whole sample was planned to take; `draws` names its random augmentation (see `draw_key`);
        the counts of `record` are filled in. Raises BadSample, and StaleIndexError if the sample takes something else.
        """
        count = len(planned.tokens)
        if len(prepared.pieces) != count:
            raise StaleIndexError(f"renders to {len(prepared.pieces)} pieces, but the index has {count}")
        last = count if last < 0 else last
        wanted_pieces = prepared.pieces[first:last]
        wanted = sorted({piece.image for piece in wanted_pieces if isinstance(piece, ImagePiece)})
        encoded = self._encoded(stored, {image: prepared.views[image] for image in wanted}, draws)
        rendered = expand(wanted_pieces, encoded, piece_range(planned, first, last), prepared.weights)
        trained = trained_tokens(rendered, self._config.loss)
        tokens, loss_tokens = len(rendered.ids), int(trained.sum())
        record = replace(
            record,
            tokens=tokens,
            images=len(wanted),
            loss_tokens=loss_tokens,
            loss_weight=weight_sum(rendered, trained),
        )
        return Document(record, self._source, rendered, trained)

    def _encoded(self, stored: StoredSample, views: dict[int, View], draws: bytes) -> dict[int, EncodedImage]:
        """The images that `views` names, decoded, augmented and cut into frames."""
        sizes = {image: stored.sizes[image] for image in views}
        least: dict[int, Size] = {}
        if self._config.images.scaled_decode and not draws:  # augmentations count in pixels of the whole image
            least = needed_sizes(views, sizes, self._processor)
        with self._clock("decode"):
            images = stored.decode(list(views), least) if views else {}
        with self._clock("tile"):
            return {n: self._frames(image, views[n], sizes[n], n, n in least, draws) for n, image in images.items()}

    def _frames(
        self, image: Image.Image, view: View, size: Size, number: int, scaled: bool, draws: bytes
    ) -> EncodedImage:
        """The frames and ids of image `number` of its sample, whose file has `size`."""
        if scaled:
            return encode_view(image, view, self._processor, size)
        image = augment(image, self._augmentation, draws, number)
        return encode_view(as_planned(image, size, view, self._processor), view, self._processor)


def decode_wanted(
    wanted: Sequence[int],
    sizes: Sequence[Size],
    least: Mapping[int, Size],
    whole: Callable[[], dict[int, Image.Image]],
    files: Callable[[], list[bytes]],
) -> dict[int, Image.Image]:
    """The images numbered `wanted`, from `whole()`, or out of their `files()` if some may be decoded smaller.

    Raises BadSample if one does not have the size its header states.
    """
    if least:
        decoded = dict(zip(wanted, (decode_scaled(d, least.get(n)) for n, d in zip(wanted, files())), strict=True))
        images = {number: image for number, (image, _) in decoded.items()}
        found = {number: size for number, (_, size) in decoded.items()}
    else:
        images = whole()
        found = {number: image.size for number, image in images.items()}
    for number, size in found.items():
        if size != tuple(sizes[number]):
            detail = f"image {number} is {size} when decoded but {tuple(sizes[number])} by its header"
            raise BadSample("unreadable_image", detail)
    return images
