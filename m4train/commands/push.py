"""Pushing an exported folder to the Hub, if and only if a command asks for it."""

from __future__ import annotations

import re
from pathlib import Path

from m4train.errors import ConfigError, TrainingError

_NAME = re.compile(r"[\w.-]+/[\w.-]{1,96}")
# Of an earlier push, what is not there any more goes: weights in more files than now would be read as well.
_STALE = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json"]


def check_push(name: str) -> None:
    """Raises ConfigError, before anything is exported, for what cannot be pushed to."""
    from huggingface_hub import constants, get_token

    if not _NAME.fullmatch(name):
        raise ConfigError(f"--push-to {name} is not a repository: its form is ORG/NAME.")
    if constants.is_offline_mode():
        raise ConfigError(f"--push-to {name}, but HF_HUB_OFFLINE is set: unset it, or push later.")
    if get_token() is None:
        raise ConfigError(f"--push-to {name}, but there is no token of the Hub: run `hf auth login`, or set HF_TOKEN.")


def push(folder: Path, name: str, private: bool, message: str) -> str:
    """Makes the model repository `name` if it is not there yet, and uploads the folder in one commit; returns its URL.

    Files whose content is there already, also from a push that was interrupted, are not sent again. Raises ConfigError if
    `private` is asked of a repository that is public, TrainingError if the Hub does not take it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        url = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise ConfigError(f"{name} is there already, and public: choose another name, or leave --private out.")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns=_STALE)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise TrainingError(
            f"{folder} is written, but could not be pushed to {name} ({reason}): the same command goes on."
        ) from error
    return str(url)
