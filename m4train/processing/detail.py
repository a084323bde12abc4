"""How finely a processor encodes an image: with the frames of its settings, or with fewer if they cost too many tokens."""

from __future__ import annotations

from typing import Any, TypeVar

from m4train.processing.image_processor import ImageProcessor

Self = TypeVar("Self", bound="Detail")


class Detail:
    """The part of a processor that answers for its image processor, and gives versions of itself with fewer frames."""

    image_processor: ImageProcessor

    def _with(self: Self, settings: dict[str, Any]) -> Self:
        raise NotImplementedError

    @property
    def most_detail(self) -> int:
        """The detail at which images are encoded, a number from 1 (the fewest frames) on."""
        return self.image_processor.most_detail

    def natural_detail(self, width: int, height: int) -> int:
        """The most detail for which an image of this size need not be enlarged, apart from rounding up to whole frames."""
        return self.image_processor.natural_detail(width, height)

    def at_detail(self: Self, detail: int) -> Self:
        """This processor with at most `detail`."""
        if detail >= self.most_detail:
            return self
        made = self.__dict__.setdefault("_at_detail", {})
        if detail not in made:
            made[detail] = self._with(self.image_processor.detail_settings(detail))
        return made[detail]

    def needed_size(self, width: int, height: int) -> tuple[int, int] | None:
        """The smallest size to decode an image of this size in; None if it must be decoded whole."""
        return self.image_processor.needed_size(width, height)

    @property
    def fixed_size(self) -> bool:
        """Whether an image is resized to the same size however large it is."""
        return self.image_processor.fixed_size
