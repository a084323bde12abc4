"""What calls of the processors are given: options in groups, texts with images, conversations with images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, TypeVar, cast

from m4train.processing.chat import content_items
from m4train.processing.inputs import from_base64, is_image, nest_images

Call = TypeVar("Call", bound=Callable[..., Any])

ROW_OPTIONS = ("padding", "truncation", "max_length", "pad_to_multiple_of", "padding_side")
_GROUPS = ("text_kwargs", "images_kwargs", "common_kwargs", "processor_kwargs")


def options_in_groups(call: Call) -> Call:
    """Lets options be given in the dictionaries text_kwargs, images_kwargs, common_kwargs and processor_kwargs too.

    Raises ValueError if an option is given twice, with two values.
    """

    @functools.wraps(call)
    def spread(*positional: Any, **options: Any) -> Any:
        for group in _GROUPS:
            for name, value in (options.pop(group, None) or {}).items():
                if options.setdefault(name, value) != value:
                    raise ValueError(f"{name} is {value!r} in {group} and {options[name]!r} elsewhere: give it once.")
        return call(*positional, **options)

    return cast("Call", spread)


def refuse_other_inputs(owner: str, options: dict[str, Any]) -> None:
    """Takes out of `options` what other processors read. Raises ValueError if it asks for something."""
    for name in ("audio", "videos"):
        if options.pop(name, None) is not None:
            raise ValueError(
                f"{name} is given, but {owner} reads text and images: give the frames of a video as images."
            )
    if options.pop("is_split_into_words", False):
        raise ValueError(f"is_split_into_words=True is given, but {owner} reads whole texts: join the words of each.")


def is_text(value: Any) -> bool:
    """Whether `value` is a text or a list of texts."""
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value))


def images_per_text(texts: list[str], images: Any, placeholder: str) -> list[list[Any]]:
    """The images of each text, unread. Raises ValueError if their numbers differ from the placeholders'."""
    counts = [text.count(placeholder) for text in texts]
    if images is None:
        samples: list[list[Any]] = [[] for _ in texts]
    elif isinstance(images, (list, tuple)) and images and all(is_image(image) for image in images):
        ends = list(accumulate(counts, initial=0))
        samples = [list(images[start:end]) for start, end in pairwise(ends)]
        samples[-1] += images[ends[-1] :]
    else:
        samples = nest_images(images)
    if len(samples) != len(texts):
        raise ValueError(
            f"There are {len(texts)} texts and images for {len(samples)}: give one list of images per text."
        )
    for number, (count, sample) in enumerate(zip(counts, samples)):
        if count != len(sample):
            raise ValueError(
                f"Text {number} holds {count} {placeholder} placeholders and has {len(sample)} images: "
                "make the numbers equal."
            )
    return samples


def conversations_of(given: Any) -> tuple[list[list[dict]], bool]:
    """A conversation, or several, as a list, and whether there are several. Raises ValueError for anything else."""
    several = isinstance(given, (list, tuple)) and bool(given) and isinstance(given[0], (list, tuple))
    conversations = list(given) if several else [given]
    for one in conversations:
        if not isinstance(one, (list, tuple)) or not all(isinstance(message, dict) for message in one):
            raise ValueError(
                f"{str(one)[:80]!r} is not a conversation: give a list of messages, each like "
                "{'role': 'user', 'content': 'text'}, or a list of such lists."
            )
    return conversations, several


def refuse_to_continue(continued: bool, tokenize: bool, prompted: bool) -> None:
    """Raises ValueError for what does not go with continue_final_message."""
    if continued and tokenize:
        raise ValueError(
            "continue_final_message=True does not go with tokenize=True: render the string, then call the processor with it."
        )
    if continued and prompted:
        raise ValueError(
            "continue_final_message=True does not go with add_generation_prompt=True, which begins a new message: leave one out."
        )


def ended_in_last_message(text: str, messages: list[dict]) -> str:
    """A rendered conversation up to the end of the last text of its last message. Raises ValueError if it is not in it."""
    said = [item["text"] for item in content_items(messages[-1]) if item["type"] == "text"] if messages else []
    last = said[-1] if said else ""
    for form in (last, last.strip()):
        if form and (place := text.rfind(form)) >= 0:
            return text[: place + len(form)]
    raise ValueError(
        f"continue_final_message=True, but the chat template shows no text of the last message ({last[:40]!r})."
    )


def images_of(messages: list[dict]) -> list[Any]:
    """The images that the items of a conversation carry, unread."""
    items = [item for message in messages for item in content_items(message) if item["type"] == "image"]
    return [image for image in map(_carried, items) if image is not None]


def _carried(item: dict) -> Any:
    """The image of an item: under "image", "url" or "path", as "base64", or as the "image_url" of other libraries."""
    address = item.get("image_url")
    address = address.get("url") if isinstance(address, dict) else address
    found = next((item[name] for name in ("image", "url", "path") if item.get(name) is not None), address)
    return from_base64(item["base64"]) if found is None and item.get("base64") is not None else found
