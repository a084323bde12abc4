"""Folders of models, on disk or on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from m4train.errors import ConfigError
from m4train.wandb_artifacts import FROM, artifact_folder

PROCESSOR_FILES = ("*.json", "*.jinja", "additional_chat_templates/*")  # everything of a model folder but its weights
WEIGHT_FILES = (*PROCESSOR_FILES, "*.safetensors")  # what ends an answer is known by the chat template too
CONFIG_FILES = ("config.json",)
_PICKLE_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


# What people pass for transformers' sake, which decides nothing here: tokenizers and images are read in one way, and no code.
WITHOUT_MEANING = ("trust_remote_code", "use_fast", "_from_auto")

# Arguments of `model_folder` that a caller of from_pretrained may give.
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def refuse_upload(asked: bool) -> None:
    """Raises ConfigError if `save_pretrained` is asked to upload what it writes."""
    if asked:
        raise ConfigError("push_to_hub is True, but nothing here uploads: upload the folder with huggingface_hub.")


def weight_folder(
    name: str | Path,
    allow_pickle: bool,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    **download: Any,
) -> Path:
    """The `model_folder` with what a model is loaded from: its configuration and its weights."""
    patterns = (*WEIGHT_FILES, *_PICKLE_FILES) if allow_pickle else WEIGHT_FILES
    weights = ("*.safetensors", *_PICKLE_FILES[: int(allow_pickle)])
    return model_folder(name, patterns, revision, cache_dir, required=(CONFIG_FILES, weights), **download)


def model_folder(
    name: str | Path,
    patterns: Sequence[str],
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    required: Sequence[Sequence[str]] = (),
    **download: Any,
) -> Path:
    """The folder `name`, or where the files of hub model `name` (also `name@revision`) that match `patterns` are after a
    download; also of an artifact `wandb:ENTITY/PROJECT/NAME:ALIAS`.

    Files already in the cache are not fetched again, and are enough without a network. `download` holds `token`,
    `local_files_only` and `force_download`, as huggingface_hub takes them. Raises ConfigError if there is
    neither such a folder nor such a model within reach, or if of the hub model no file matches any pattern of one of
    `required`: without a network the cache may hold no more than its processor.
    """
    if Path(name).is_dir():
        return Path(name)
    text = str(name)
    if text.startswith(FROM):
        return artifact_folder(text)
    text, _, named = text.partition("@")
    revision = named or revision
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ConfigError(f"There is no folder {text}: give an existing folder, or a hub id of the form owner/name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    at = f" at revision {revision}" if revision else ""
    try:
        given = {key: value for key, value in download.items() if value is not None}
        folder = snapshot_download(text, revision=revision, cache_dir=cache_dir, allow_patterns=list(patterns), **given)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"There is no folder {text}, and the hub model {text}{at} is neither cached nor within reach ({reason}): "
            "download it first, or give a folder."
        ) from error
    for alternatives in required:
        if not any(any(Path(folder).glob(pattern)) for pattern in alternatives):
            raise ConfigError(
                f"The cache holds no {' or '.join(alternatives)} of the hub model {text}{at}, and none could be fetched: "
                "download it first, with a network, or give a folder."
            )
    return Path(folder)


def dataset_files(name: str, pattern: str) -> Path:
    """The files of the hub dataset `name` that match `pattern` (`*` matches any text, folders too), as the folder they are in and
    that pattern, after a download or from the cache. Raises ConfigError if there are none within reach."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns=[pattern]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"The hub dataset {name} is neither cached nor within reach ({reason}): download it, and give its folder."
        ) from error
    if not any(fnmatch(str(path.relative_to(folder)), pattern) for path in folder.rglob("*")):
        raise ConfigError(
            f"The hub dataset {name} holds no file {pattern}: download the benchmark, and give its folder."
        )
    return folder / pattern
