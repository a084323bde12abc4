"""Datasets that are published with URLs instead of images: OBELICS parquet, MMC4 JSON lines, and pairs as of LAION."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipelines.frame.document import Node, image_node, text_node
from data_pipelines.frame.store import open_lines
from m4train.config.packages import need
from m4train.errors import BadSample, DataError

Row = tuple[str, dict[str, Any], list[Node]]  # URL, where it is from, nodes

_BATCH = 256
_WARC = {"warc_filename": "file", "warc_record_offset": "offset", "warc_record_length": "length"}


def _rows(path: str) -> Iterator[dict[str, Any]]:
    need("pyarrow", f"reading {path}")
    import pyarrow

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(_BATCH):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet ({error}): fetch it again.") from None


def obelics_urls(path: str) -> Iterator[Row | BadSample]:
    """OBELICS as published: parallel lists of image URLs and texts, and what is known of each image and of the page as JSON."""
    import pyarrow.parquet  # noqa: F401 (used by name)

    for row in _rows(path):
        try:
            images, texts = row["images"], row["texts"]
            known, page = json.loads(row["metadata"]), json.loads(row["general_metadata"])
            if not len(images) == len(texts) == len(known):
                raise BadSample("bad_json", f"{len(images)} images, {len(texts)} texts and {len(known)} metadata")
            nodes = []
            for image, text, about in zip(images, texts, known):
                if (image is None) == (text is None):
                    raise BadSample("bad_json", "a place must have either an image or a text")
                nodes.append(text_node(text) if image is None else _obelics_image(image, about or {}))
            warc = {ours: page[theirs] for theirs, ours in _WARC.items() if theirs in page}
            yield page.get("url", ""), {"dataset": "obelics"} | ({"warc": warc} if warc else {}), nodes
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            yield BadSample("bad_json", f"not a row of OBELICS: {error!r}")
        except BadSample as error:
            yield error


def _obelics_image(url: str, about: dict[str, Any]) -> Node:
    names = {"alt": "alt_text", "rendered_width": "rendered_width", "rendered_height": "rendered_height"}
    return image_node(url, **{ours: about.get(theirs) for ours, theirs in names.items()})


def mmc4_urls(path: str) -> Iterator[Row | BadSample]:
    """MMC4 as published: sentences, and images that each stand before the sentence they were matched with."""
    for line in open_lines(Path(path)):
        try:
            record = json.loads(line)
            sentences, before = record["text_list"], [[] for _ in record["text_list"]]  # type: ignore[var-annotated]
            for info in record["image_info"]:
                place = info["matched_text_index"]
                if not 0 <= place < len(sentences):
                    raise BadSample("bad_json", f"an image is matched with sentence {place} of {len(sentences)}")
                before[place].append(image_node(info["raw_url"]))
            nodes: list[Node] = []
            for sentence, images in zip(sentences, before):
                nodes += images
                if nodes and nodes[-1]["type"] == "text":
                    nodes[-1] = text_node(f"{nodes[-1]['text']} {sentence}")
                else:
                    nodes.append(text_node(sentence))
            yield record.get("url", ""), {"dataset": "mmc4"}, nodes
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            yield BadSample("bad_json", f"not a record of MMC4: {error!r}")
        except BadSample as error:
            yield error


def pairs_urls(path: str) -> Iterator[Row | BadSample]:
    """Parquet of a URL and a caption, under the names that LAION, COYO and DataComp use."""
    import pyarrow.parquet  # noqa: F401 (used by name)

    for row in _rows(path):
        lower = {str(name).lower(): value for name, value in row.items()}
        url, text = (
            lower.get("url"),
            next((lower[name] for name in ("text", "caption", "top_caption") if lower.get(name)), None),
        )
        if not isinstance(url, str) or not isinstance(text, str):
            yield BadSample("no_text", f"no url and caption among {', '.join(row)}")
            continue
        yield url, {"dataset": "pairs"}, [image_node(url), text_node(text)]


PUBLISHED: dict[str, Callable[[str], Iterator[Row | BadSample]]] = {
    "obelics_urls": obelics_urls,
    "mmc4_urls": mmc4_urls,
    "pairs_urls": pairs_urls,
}
