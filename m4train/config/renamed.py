"""Keys that have a new name. The old one is still taken, in overrides, YAML files and stored configurations (`values.py`)."""

from __future__ import annotations

RENAMED = {"trainer.save_beside": "trainer.async_checkpoint"}  # old -> new; both are settings within a group
