"""A tokenizer folder read with the `tokenizers` library alone.

Two ways to encode matter here. `encode` gives the string of a special token its id. `encode_plain` never does: text that
comes from data is only text, whatever it spells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from m4train.errors import ConfigError
from m4train.processing.features import Features
from m4train.processing.files import named_in, read_json, templates_of, write_json
from m4train.processing.sentencepiece_rules import (
    default_padding_side,
    marks_first_text_only,
    rebuilt_as_5x,
    without_first_mark,
)
from m4train.processing.settings import no_setting
from m4train.processing.token_forms import clean_up, content_of, flags_of
from m4train.processing.tokenizer_doors import TokenizerDoors

Place = Literal["start", "after_token", "inside"]

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SETTINGS = (  # of tokenizer_config.json, those that change something here
    *NAMED_TOKENS, "additional_special_tokens", "extra_special_tokens", "padding_side", "truncation_side",
    "model_max_length", "clean_up_tokenization_spaces", "chat_template",
)  # fmt: skip


class Tokenizer(TokenizerDoors):
    """Text to token ids and back. `config` holds what tokenizer_config.json and special_tokens_map.json hold."""

    def __init__(self, backend: Backend, config: dict[str, Any] | None = None) -> None:
        self.backend = backend
        self.config = dict(config or {})
        self.padding_side: str = self.config.get("padding_side") or default_padding_side(self.config)
        self.truncation_side: str = self.config.get("truncation_side", "right")
        self.model_max_length = int(min(self.config.get("model_max_length") or 1e30, 1e30))
        self.chat_template, self.named_templates = templates_of(self.config.get("chat_template"))
        self.backend.no_padding()
        self.backend.no_truncation()
        self._derived: dict[str, Any] = {}
        self._reserved: set[str] = set()
        self._add_configured_tokens()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, rule: str = "4.46", **settings: Any
    ) -> Tokenizer:
        """Reads tokenizer.json and, if they exist, tokenizer_config.json, special_tokens_map.json and added_tokens.json.

        `rule` "4.46" takes the tokenizer as it is stored, "5.23" as transformers 5.x rebuilds it (other ids after special
        tokens, with tokenizers of the LLaMA kind). `settings` override those of tokenizer_config.json. Raises
        ConfigError if tokenizer.json is missing or unreadable, and TypeError for a setting there is not.
        """
        for name in settings:
            if name not in SETTINGS:
                raise no_setting(cls.__name__, name, SETTINGS)
        folder = Path(pretrained_model_name_or_path)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{folder} holds no tokenizer.json: point to a folder of a fast tokenizer.")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:
            raise ConfigError(f"{path} cannot be read as a tokenizer: {error}.") from error
        config = read_json(folder / "tokenizer_config.json") or {}
        for name, token in (read_json(folder / "special_tokens_map.json") or {}).items():
            config.setdefault(name, token)
        for content, id_ in (read_json(folder / "added_tokens.json") or {}).items():
            config.setdefault("added_tokens_decoder", {}).setdefault(str(id_), {"content": content})
        if rule not in ("4.46", "5.23"):
            raise ConfigError(f"There is no tokenizer rule {rule!r}: use '4.46' or '5.23'.")
        jinja = folder / "chat_template.jinja"
        if jinja.is_file():
            named = {**templates_of(config.get("chat_template"))[1], **named_in(folder)}
            config["chat_template"] = {"default": jinja.read_text(encoding="utf-8"), **named}
        config |= {name: value for name, value in settings.items() if value is not None}
        return cls(rebuilt_as_5x(backend, config) if rule == "5.23" else backend, config)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json, as transformers reads them."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        special = {name: getattr(self, name) for name in NAMED_TOKENS if getattr(self, name) is not None}
        named = set(special.values())
        extra = [t.content for _, t in self._added() if t.special and t.content not in named]
        config = dict(self.config) | special
        if not isinstance(config.get("extra_special_tokens"), dict):  # a dict names them for the model: kept
            config.pop("extra_special_tokens", None)
        if config.get("tokenizer_class") in (None, "TokenizersBackend"):  # of 5.x, which earlier ones do not know
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
        config["padding_side"] = self.padding_side
        config["added_tokens_decoder"] = {str(i): flags_of(t) for i, t in self._added()}
        config["additional_special_tokens"] = extra
        config.pop("chat_template", None)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        if self.named_templates:
            every = {"default": self.chat_template, **self.named_templates}
            config["chat_template"] = [{"name": name, "template": text} for name, text in every.items() if text]
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", special | {"additional_special_tokens": extra})

    # Ids and names

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Entries of the base vocabulary, added tokens not counted."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in NAMED_TOKENS if getattr(self, name) is not None}

    @property
    def all_special_ids(self) -> list[int]:
        return [i for i, token in self._added() if token.special]

    @property
    def added_tokens(self) -> dict[str, int]:
        """Content and id of every added token, special or not."""
        return self._once("added", lambda: {token.content: i for i, token in self._added()})

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or the ids of several; the id of the unknown token (or None) if there is none."""
        if isinstance(tokens, str):
            found = self.backend.token_to_id(tokens)
            return found if found is not None or self.unk_token is None else self.backend.token_to_id(self.unk_token)
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        if isinstance(ids, int):
            return self.backend.id_to_token(ids)
        return [self.backend.id_to_token(int(i)) for i in ids]

    def add_special_tokens(self, tokens: Iterable[Any] | Mapping[str, Any]) -> int:
        """Makes each string a special token, with a new id if it has none. Returns how many ids are new.

        A mapping names them as transformers does: "pad_token" and its like, and a list of "additional_special_tokens".
        Raises ValueError for another name, or a single string.
        """
        if isinstance(tokens, str):
            raise ValueError(f"add_special_tokens is given the string {tokens!r}: give a list of tokens, or a mapping")
        tokens = self._named(tokens) if isinstance(tokens, Mapping) else [content_of(token) for token in tokens]
        present = {t.content for _, t in self._added() if t.special}
        missing = [AddedToken(t, normalized=False, special=True) for t in tokens if t not in present]
        self._derived.clear()
        return self.backend.add_special_tokens(missing)

    def _named(self, tokens: Mapping[str, Any]) -> list[str]:
        """The tokens of a mapping, after those with a name of their own got it."""
        found: list[str] = []
        for name, given in tokens.items():
            if name in NAMED_TOKENS:
                setattr(self, name, content_of(given))
                found.append(getattr(self, name))
            elif name in ("additional_special_tokens", "extra_special_tokens"):
                found += [content_of(one) for one in (given.values() if isinstance(given, Mapping) else given)]
            else:
                known = ", ".join((*NAMED_TOKENS, "additional_special_tokens"))
                raise ValueError(f"add_special_tokens has no name {name!r}: it takes {known}")
        return found

    def add_tokens(self, tokens: Iterable[Any], special_tokens: bool = False) -> int:
        """Makes each string one token wherever a text spells it, with a new id if it has none. Returns how many are new."""
        if special_tokens:
            return self.add_special_tokens(tokens)
        self._derived.clear()
        return self.backend.add_tokens([AddedToken(content_of(token) or "", normalized=False) for token in tokens])

    def reserve(self, tokens: Iterable[str]) -> None:
        """Added tokens that `encode_plain` must not produce though they are not marked special."""
        self._reserved |= set(tokens)
        self._derived.clear()

    # Text to ids

    def encode(self, text: str, add_special_tokens: bool = True, place: Place = "start") -> list[int]:
        """Ids of a text in which the strings of special tokens stand for those tokens."""
        return self._variant(plain=False, place=place).encode(text, add_special_tokens=add_special_tokens).ids

    def encode_plain(self, text: str, place: Place = "start") -> tuple[np.ndarray, np.ndarray]:
        """Ids (n,) int64 of a text that is only text, and the character (n,) after the last one of each token.

        `place` says what comes before: nothing, a special token, or text that this text goes on from. It decides whether
        tokenizers that mark the start of a word mark the start of this text.
        """
        if place == "inside":
            return self._encode_inside(text)
        encoding = self._variant(plain=True, place=place).encode(text, add_special_tokens=False)
        ends = np.fromiter((end for _, end in encoding.offsets), np.int64, len(encoding.ids))
        return np.asarray(encoding.ids, np.int64), ends

    def plain_ids(self, text: str, place: Place = "start") -> np.ndarray:
        """The ids (n,) int64 of `encode_plain` alone, which take two thirds of its time."""
        if place == "inside":
            return self._encode_inside(text)[0]
        [encoding] = self._variant(plain=True, place=place).encode_batch_fast([text], add_special_tokens=False)
        return np.asarray(encoding.ids, np.int64)

    def _encode_inside(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Encodes the text behind a line break, and takes the line break away again."""
        lead, _ = self.encode_plain("\n")
        ids, ends = self.encode_plain("\n" + text)
        if not np.array_equal(ids[: len(lead)], lead):  # joined to more line breaks: no mark comes between them
            return self.encode_plain(text)
        return ids[len(lead) :], ends[len(lead) :] - 1

    def trim(self, text: str, before: str | None, after: str | None) -> str:
        """The text without the white space that the added tokens `before` and `after` it swallow."""
        flags = self._once("flags", lambda: {token.content: token for _, token in self._added()})
        text = text.lstrip() if before in flags and flags[before].rstrip else text
        return text.rstrip() if after in flags and flags[after].lstrip else text

    @property
    def special_pattern(self) -> re.Pattern:
        """Matches the strings of the added tokens, the longest first."""
        return self._once("pattern", self._make_pattern)

    def _make_pattern(self) -> re.Pattern:
        longest_first = sorted(self.added_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @property
    def affixes(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and after every text (usually bos, and nothing)."""
        return self._once("affixes", self._find_affixes)

    def _find_affixes(self) -> tuple[list[int], list[int]]:
        probe = self.backend.encode("a", add_special_tokens=True).ids
        middle = self.backend.encode("a", add_special_tokens=False).ids
        start = next(i for i in range(len(probe)) if probe[i : i + len(middle)] == middle)
        return probe[:start], probe[start + len(middle) :]

    def __call__(
        self,
        text: str | list[str],
        add_special_tokens: bool = True,
        padding: bool | str | None = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool = True,
        return_tensors: str | None = None,
    ) -> Features:
        """`input_ids` and `attention_mask` of one text or of several. Raises ValueError if padding has no pad token."""
        rows = [self.encode(t, add_special_tokens=False) for t in ([text] if isinstance(text, str) else text)]
        prefix, suffix = self.affixes if add_special_tokens else ([], [])
        if (limit := self.limit(truncation, max_length)) is not None:
            room = max(limit - len(prefix) - len(suffix), 0)
            rows = [row[:room] if self.truncation_side == "right" else row[max(len(row) - room, 0) :] for row in rows]
        rows = [prefix + row + suffix for row in rows]
        features = self.pad(rows, padding, max_length, pad_to_multiple_of)
        if not return_attention_mask:
            del features["attention_mask"]
        if isinstance(text, str) and return_tensors is None:
            return Features({name: value[0] for name, value in features.items()})
        return features.convert(return_tensors)

    def limit(self, truncation: bool | str | None, max_length: int | None) -> int | None:
        """The number of ids at which `truncation` (True, or a strategy by name) cuts a row; None if it does not."""
        if truncation in (False, None, "do_not_truncate"):
            return None
        if truncation not in (True, "longest_first", "only_first"):  # the same for rows of one sequence
            raise ValueError(
                f"truncation={truncation!r} is not known: use True, 'longest_first', 'only_first' or False."
            )
        return self.model_max_length if max_length is None else max_length

    def pad(
        self,
        rows: list[list[int]],
        padding: bool | str | None = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
    ) -> Features:
        """Rows of ids brought to one length on `padding_side`, with the mask (1 real, 0 padding) that tells them apart."""
        longest = max((len(row) for row in rows), default=0)
        if padding in (False, None, "do_not_pad"):
            return Features(input_ids=rows, attention_mask=[[1] * len(row) for row in rows])
        if padding not in (True, "longest", "max_length"):
            raise ValueError(f"padding={padding!r} is not known: use True, 'longest', 'max_length' or False.")
        width = longest if padding != "max_length" else max(longest, max_length or self.model_max_length)
        if pad_to_multiple_of:
            width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
        pad_id = self.pad_token_id
        if pad_id is None and any(len(row) < width for row in rows):
            raise ValueError("The tokenizer has no pad token, so rows of different lengths cannot be padded: set one.")
        ids, masks = [], []
        left = (padding_side or self.padding_side) == "left"
        for row in rows:
            fill = width - len(row)
            pads, zeros, ones = [pad_id or 0] * fill, [0] * fill, [1] * len(row)
            ids.append(pads + row if left else row + pads)
            masks.append(zeros + ones if left else ones + zeros)
        return Features(input_ids=ids, attention_mask=masks)

    # Ids to text

    def decode(
        self, ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        """The text of one row of ids (list, array or tensor)."""
        row = ids.tolist() if hasattr(ids, "tolist") else ids
        row = [row] if isinstance(row, int) else [int(i) for i in row]
        text = self.backend.decode(row, skip_special_tokens=skip_special_tokens)
        clean = self.config.get("clean_up_tokenization_spaces", False)
        clean = clean if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        return clean_up(text) if clean else text

    def batch_decode(self, rows: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """The text of each row of ids."""
        rows = rows.tolist() if hasattr(rows, "tolist") else rows
        return [self.decode(row, skip_special_tokens, **options) for row in rows]

    # Inside

    def _added(self) -> list[tuple[int, AddedToken]]:
        return sorted(self.backend.get_added_tokens_decoder().items())

    def _add_configured_tokens(self) -> None:
        """Takes up the special tokens that only the configuration files name, as older folders do."""
        present = {t.content for _, t in self._added()}
        for id_, flags in sorted(self.config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
            content = flags["content"]
            if content not in present:
                self.backend.add_tokens([AddedToken(**{k: v for k, v in flags.items() if k != "__type"})])
            if (found := self.backend.token_to_id(content)) != int(id_):
                raise ConfigError(
                    f"tokenizer_config.json gives {content!r} the id {id_}, but tokenizer.json leads to {found}: take both "
                    "files from the same model."
                )
        named = [self.config.get(name) for name in NAMED_TOKENS]
        extra = self.config.get("extra_special_tokens") or []
        extra = list(extra.values()) if isinstance(extra, dict) else list(extra)
        names = named + extra + list(self.config.get("additional_special_tokens") or [])
        for name in NAMED_TOKENS:
            setattr(self, name, content_of(self.config.get(name)))
        self.add_special_tokens(list(dict.fromkeys(content for t in names if (content := content_of(t)))))

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, kept until a token is added."""
        if name not in self._derived:
            self._derived[name] = make()
        return self._derived[name]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_derived": {}}

    def _variant(self, plain: bool, place: Place) -> Backend:
        """The backend for text at `place`; a plain one finds no special or reserved token in a text."""
        place = place if marks_first_text_only(self.backend) else "start"
        if not plain and place == "start":
            return self.backend
        return self._once(f"{plain} {place}", lambda: self._make_variant(plain, place))

    def _make_variant(self, plain: bool, place: Place) -> Backend:
        state = json.loads(self.backend.to_str())
        for token in state.get("added_tokens", []):
            token["special"] = token["special"] or (plain and token["content"] in self._reserved)
        if place != "start":
            state = without_first_mark(state)
        variant = Backend.from_str(json.dumps(state))
        variant.encode_special_tokens = plain
        return variant
