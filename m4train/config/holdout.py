"""Held-out sources that are made of the training sources, so that nobody has to cut files."""

from __future__ import annotations

from dataclasses import replace

from m4train.config.data_schema import DataConfig


def hold_out(data: DataConfig) -> None:
    """Adds to data.validation what data.holdout takes out of each source; one of the same name stays as it is."""
    if not data.holdout:
        return
    for name, source in data.sources.items():
        whole = replace(source, held_out=True, weight=1.0, loss_weight=1.0, epochs=None)
        if not source.stream:  # which the checks refuse
            data.validation.setdefault(name, whole)
