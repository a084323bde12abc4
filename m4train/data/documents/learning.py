"""What records, turns and items say about whether and how much they are learnt: which fields say it, and in which direction."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from m4train.errors import BadSample, described


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# How much: a number from 0 (not at all) on, or true and false.
WEIGHTS = _words(
    "weight loss_weight sample_weight loss_scale loss loss_mask train training trainable is_trainable is_trained trained "
    "is_train train_on train_on_turn learn learned learnt compute_loss need_loss with_loss has_loss output_with_loss"
)
# True: not at all.
LEFT_OUT = _words(
    "masked is_masked mask_loss mask_out ignore ignored is_ignored ignore_loss skip skipped is_skipped exclude excluded "
    "is_excluded no_loss no_train do_not_train not_trained frozen"
)
# Which of the two is meant, or which part of a text or which turn, cannot be told.
_UNCLEAR = _words(
    "mask masks train_mask label_mask turn_mask loss_masks train_detail training_detail weights turn_weights loss_weights "
    "train_turns"
)
# False: an answer that should not be learnt. Those that `perhaps` say it may hold something else, so only true and false count.
_GOOD = _words(
    "kto_tag kto_label is_correct is_right is_preferred is_chosen is_accepted is_approved is_desirable is_good is_valid "
    "is_positive thumbs_up"
)
_PERHAPS_GOOD = _words("correct preferred chosen accepted approved desirable valid use keep include")
# True: likewise.
_POOR = _words("is_rejected is_wrong is_incorrect is_undesirable is_bad is_invalid is_deleted is_negative thumbs_down")
_PERHAPS_POOR = _words(
    "rejected wrong incorrect undesirable invalid deleted drop dropped remove removed discard discarded filtered"
)
_TRUTH = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
_NOTHING = ("", "nan", "none", "null", "n/a", "<na>")
_MOST = 100.0  # a larger weight of a record is that of something else


def says_how_much(name: str) -> bool:
    """Whether a field of this name may say whether or how much something is learnt."""
    return bool(_kind(name))


def weight_of(content: Mapping[str, Any], what: str = "a turn") -> tuple[float, list[str]]:
    """How much a turn, an item or a record is learnt, 1 if it does not say, and the fields that say so. `what` it is.

    Raises BadSample `bad_weight` for values that mean nothing, and for fields that contradict each other.
    """
    found: dict[str, float] = {}
    for name, value in content.items():
        weight = _weight(name, value, what)
        if weight is not None:
            found[name] = weight
    if what != "a record":
        found |= {name: float(not poor) for name, poor in refused(content)}
    said = {name: weight for name, weight in found.items() if weight != 1 or _kind(name) == "weight"}
    if len(set(said.values())) > 1:
        shown = ", ".join(f"{name!r} {described(content[name], 60)}" for name in said)
        raise BadSample("bad_weight", f"{what} has different weights: {shown}")
    return next(iter(said.values()), 1.0), list(found)


def refused(content: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """The fields that say of an answer whether it is a good one, and whether it should not be learnt."""
    pair = "chosen" in content and "rejected" in content
    for name, value in content.items():
        kind = _kind(name) if not (pair and name in ("chosen", "rejected")) else ""
        if kind.endswith(("good", "poor")):
            truth = _truth(value, strict=kind.startswith("perhaps"))
            if truth is not None:
                yield name, truth is kind.endswith("poor")


def _weight(name: str, value: Any, what: str) -> float | None:
    """What one field says; None if nothing."""
    kind = _kind(name)
    if kind not in ("weight", "left_out", "unclear") or _is_nothing(value):
        return None
    advice = (
        f"say what it is with fields={{weight: {name}}} or {{masked: {name}}}, or leave it with ignore_fields=[{name}]"
    )
    if kind == "unclear":
        if not isinstance(value, (bool, int, float, list)) and _truth(value) is None:
            return None  # a picture, or a text
        raise BadSample("bad_weight", f"{what} has {name!r} {described(value, 60)}, which may mean either: {advice}")
    number = _TRUTH.get(value.strip().lower(), value) if isinstance(value, str) else value
    try:
        number = float(number) if isinstance(number, (str, bool, int, float)) else -1.0
    except ValueError:
        number = -1.0
    flag = kind == "left_out" or (what == "a record" and _plain(name) == "loss")  # as a number it may be a measured one
    most = _MOST if what == "a record" else float("inf")
    if not 0 <= number <= most or number == float("inf") or (flag and number not in (0, 1)):
        wanted = "true or false" if flag else "a number from 0 on, true or false"
        raise BadSample("bad_weight", f"{what} has {name!r} {described(value, 60)}, but must have {wanted}: {advice}")
    return 1.0 - number if kind == "left_out" else number


@lru_cache(4096)
def _kind(name: str) -> str:
    """What a field of this name says; empty if it is another."""
    plain = _plain(name)
    kinds = {"weight": WEIGHTS, "left_out": LEFT_OUT, "unclear": _UNCLEAR, "good": _GOOD, "poor": _POOR}
    kinds |= {"perhaps_good": _PERHAPS_GOOD, "perhaps_poor": _PERHAPS_POOR}
    return next((kind for kind, names in kinds.items() if plain in names), "")


def _truth(value: Any, strict: bool = False) -> bool | None:
    """What a value says if it is true or false, `strict`: and not also a number; None if it is neither."""
    if isinstance(value, str):
        text = value.strip().lower()
        value = {"true": True, "false": False}.get(text, {"1": 1, "0": 0}.get(text))
    if isinstance(value, bool):
        return value
    return bool(value) if not strict and isinstance(value, (int, float)) and value in (0, 1) else None


def _is_nothing(value: Any) -> bool:
    if isinstance(value, float):
        return value != value
    return value is None or (isinstance(value, str) and value.strip().lower() in _NOTHING)


def _plain(name: str) -> str:
    """A name in small letters, its words divided by underscores, whether they were by capitals or signs."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\s\-]+", "_", str(name)).lower()
