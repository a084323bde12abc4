"""What both doors refuse of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from m4train.errors import DataError


@contextmanager
def naming_ids(size: int, **ids: Tensor) -> Iterator[None]:
    """What fails within it on the CPU for an id beyond the `size` of the model says which; `ids` are looked at only then."""
    try:
        yield
    except (IndexError, RuntimeError):
        for name, values in ids.items():
            check_ids(name, values, size)
        raise


def check_ids(name: str, ids: Tensor, size: int) -> None:
    """Raises DataError if `ids` (...), called `name`, holds one that is not among the `size` of the model.

    On another device than the CPU nothing is checked: to look would be to wait for it.
    """
    if ids.device.type != "cpu" or not ids.numel():
        return
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= size:
        ignored = ", and -100 where nothing is to be predicted" if name != "input_ids" else ""
        raise DataError(
            f"{name} holds the id {least if least < 0 else most}, but the model knows the ids 0 to {size - 1}: use the "
            f"tokenizer of this model{ignored}"
        )
