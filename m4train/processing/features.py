"""The mapping that processors return: model inputs by name, as items and as attributes."""

from __future__ import annotations

from typing import Any

import numpy as np


class Features(dict):
    """Model inputs by name; `features.input_ids` is `features["input_ids"]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no model input {name!r} here; there are {', '.join(self) or 'none'}") from None

    def to(self, device: Any = None, dtype: Any = None) -> Features:
        """The same inputs with tensors moved to `device`, and floating-point ones cast to `dtype` (or `device` if that is a dtype)."""
        import torch

        if isinstance(device, torch.dtype):
            device, dtype = None, device
        moved = Features(self)
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                cast = dtype if dtype is not None and value.is_floating_point() else None
                moved[name] = value.to(device=device, dtype=cast)
        return moved

    def convert(self, tensor_type: str | None) -> Features:
        """The same inputs as numpy arrays ("np") or torch tensors ("pt"); as they are for None.

        Raises ValueError for another type, or if rows have different lengths.
        """
        if tensor_type is None:
            return self
        if tensor_type not in ("np", "pt"):
            raise ValueError(f"return_tensors={tensor_type!r} is not supported: use 'pt', 'np' or None.")
        converted = Features()
        for name, value in self.items():
            try:
                array = np.asarray(value)
            except ValueError:
                raise ValueError(
                    f"The rows of {name} have different lengths and cannot become a tensor: set padding=True (and do_pad=True)."
                ) from None
            converted[name] = _to_torch(array) if tensor_type == "pt" else array
        return converted


def _to_torch(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))
