"""Keys that have a new name. The old one is still taken, in overrides, YAML files and stored configurations (`values.py`)."""

from __future__ import annotations

# old -> new; the new one is in the group of the old one, or below it
RENAMED = {
    "trainer.save_beside": "trainer.async_checkpoint",
    "logging.project": "logging.wandb.project",
    "logging.group": "logging.wandb.group",
}
# A group of keys -> the one that is meant by a value that is given to the group itself
MEANT = {"logging.wandb": "mode"}
