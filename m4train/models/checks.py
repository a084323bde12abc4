"""What both doors refuse of token ids."""

from __future__ import annotations

from torch import Tensor

from m4train.errors import DataError


def check_ids(name: str, ids: Tensor, size: int) -> None:
    """Raises DataError where `ids`, called `name`, holds one that is not among the `size` of the model.

    On another device than the CPU nothing is checked: to look would be to wait for it, at every step of a training.
    """
    if ids.device.type != "cpu" or not ids.numel():
        return
    held = ids.numpy()  # host memory: training stays without an operation that would wait for a device
    least, most = int(held.min()), int(held.max())
    if least < 0 or most >= size:
        ignored = ", and -100 where nothing is to be predicted" if name != "input_ids" else ""
        raise DataError(
            f"{name} holds the id {least if least < 0 else most}, but the model knows the ids 0 to {size - 1}: use the "
            f"tokenizer of this model{ignored}"
        )
