"""How to generate: what a call says, else what the folder of the model says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from m4train.errors import DataError, WrongArgument

# Further fields of a generation_config.json and further arguments, which choose no token if they are None, False, 0 or "".
_NOT_IMPLEMENTED = """
    begin_suppress_tokens constraints diversity_penalty dola_layers encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_eos_token_id max_time output_attentions
    assistant_model custom_generate negative_prompt_attention_mask negative_prompt_ids synced_gpus
    output_hidden_states penalty_alpha prefix_allowed_tokens_fn renormalize_logits sequence_bias token_healing top_h
    watermarking_config
"""
# The same, which choose none if they are 1 either.
_NEUTRAL_AT_ONE = "encoder_repetition_penalty guidance_scale num_beam_groups typical_p"
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_NOT_IMPLEMENTED.split(), ()),
    **dict.fromkeys(_NEUTRAL_AT_ONE.split(), (1,)),
}
# How fast the reference gets to the same tokens, and what does not concern these models.
_WITHOUT_EFFECT = """
    _from_model_config assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind
    bos_token_id cache_config cache_implementation cache_position compile_config continuous_batching_config
    decoder_start_token_id disable_compile logits_to_keep is_assistant labels low_memory max_cache_len max_matching_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values
    return_dict return_legacy_cache speculation_type target_lookbehind transformers_version use_mtp
"""
_IGNORED = frozenset(_WITHOUT_EFFECT.split())
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # what None means if the default is another value


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate; by default what `generation_config` of the model says, else these.

    max_new_tokens, or max_length, which counts the prompt too; min_new_tokens and min_length: no end before. do_sample: draw
    (with `generator`) instead of taking the most likely, after `temperature`, the `top_k` most likely (0: all), and the
    fewest that hold `top_p` of the probability; None turns each off. num_beams above 1: beam search; num_return_sequences of
    the best (or drawn) ones of a prompt; length_penalty: exponent of the length a score is divided by; early_stopping: True
    stops at num_beams finished ones, False when no running one is better, "never" when none can become better. eos_token_id:
    one id or several that end a row. pad_token_id: what follows in a row that has ended, and what prompts without
    attention_mask are padded with. bad_words_ids: sequences of ids that must not appear. repetition_penalty: divides the
    scores above 0 of ids that a row holds, and multiplies those below. no_repeat_ngram_size: no sequence of so many ids
    appears twice (0: any may). suppress_tokens: ids that never appear. min_p: no token less likely than that share of the most
    likely one is drawn. logits_processor: functions of sequences and scores that return scores, called before those of drawing.
    stop_strings: a row ends with the token that completes one of them, which `tokenizer` finds; stopping_criteria: functions
    of sequences and scores that say which rows end. streamer: its `put` gets the prompt and every new token, its `end` nothing.
    return_dict_in_generate: a `GenerateOutput`, with the scores of each token as they are chosen from (output_scores) and as
    the model gives them (output_logits). use_cache: False computes all tokens again at each step, which gives the same ones. all_ended:
    asked after each token, with whether every row has ended, whether to stop: ranks that share the weights must stop together.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    suppress_tokens: Sequence[int] | None = None
    min_p: float | None = None
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] | None = None
    stop_strings: str | Sequence[str] | None = None
    tokenizer: Any = None
    stopping_criteria: Sequence[Callable[[Tensor, Tensor | None], Any]] | None = None
    streamer: Any = None
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    use_cache: bool = True
    generator: torch.Generator | None = None
    all_ended: Callable[[bool], bool] | None = None

    @cached_property
    def ends(self) -> list[int]:
        """The ids that end a row."""
        return [] if self.eos_token_id is None else torch.as_tensor(self.eos_token_id).flatten().tolist()

    def most_new(self, prompt: int) -> int:
        """How many tokens may follow a prompt of that many columns. Raises WrongArgument if none may."""
        if self.max_new_tokens is None and self.max_length is None:
            return 20
        new = self.max_length - prompt if self.max_new_tokens is None else self.max_new_tokens  # type: ignore[operator]
        if new < 1:
            name = "max_length" if self.max_new_tokens is None else "max_new_tokens"
            raise WrongArgument(
                f"{name} is {getattr(self, name)}, which leaves no token to a prompt of {prompt}: give more, or set "
                "max_new_tokens, which does not count the prompt"
            )
        return new

    def fewest_new(self, prompt: int) -> int:
        """How many tokens must follow a prompt of that many columns."""
        return max(self.min_new_tokens or 0, (self.min_length or 0) - prompt)

    def check(self) -> None:
        """Raises DataError for settings that do not go together."""
        if self.streamer is not None and self.num_beams > 1:
            raise WrongArgument(
                f"a streamer shows each token at once, which num_beams={self.num_beams} may take back: leave one of them out"
            )
        if self.all_ended is not None and self.num_beams > 1:
            raise DataError(f"num_beams={self.num_beams} cannot stop together with other ranks: set num_beams=1")
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise DataError(
                f"num_return_sequences={self.num_return_sequences} is more than num_beams={self.num_beams}: raise num_beams, "
                "or set do_sample"
            )
        if self.repetition_penalty <= 0:
            raise DataError(
                f"repetition_penalty is {self.repetition_penalty}, but must be positive: 1.0 changes nothing"
            )


_NAMES = {field.name: field.default for field in fields(GenerationSettings)}


class StatedSettings(dict):
    """What a generation_config.json states: a mapping whose keys are also attributes; an attribute that it does not state has
    its default."""

    def __getattr__(self, name: str) -> Any:
        if name in self or name in _NAMES:
            return self.get(name, _NAMES.get(name))
        raise AttributeError(f"generation_config states no {name}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


def stated_ends(config: Any, stated: Mapping[str, Any]) -> list[int]:
    """The ids that end a row by generation_config.json `stated`, else by the model's `config`."""
    given = stated.get("eos_token_id")
    return GenerationSettings(eos_token_id=_id_of(config, "eos_token_id") if given is None else given).ends


def generation_settings(config: Any, stated: Mapping[str, Any], options: Mapping[str, Any]) -> GenerationSettings:
    """The settings among `options`; then those of its `generation_config`; then those of generation_config.json `stated`;
    then the ids of the model's `config`. GenerationSettings as generation_config are complete: nothing else is asked.

    Warns of what a generation_config asks for in vain. Raises DataError for settings that do not go together.
    """
    given = options.get("generation_config")
    if isinstance(given, GenerationSettings):
        values = {name: getattr(given, name) for name in _NAMES}
    else:
        values = {name: _id_of(config, name) for name in ("eos_token_id", "pad_token_id")}
        values |= _stated(stated, "generation_config.json") | _stated(as_mapping(given), "generation_config")
    for name in options.keys() & _NAMES.keys():
        values[name] = _NEUTRAL.get(name, _NAMES[name]) if options[name] is None else options[name]
    settings = GenerationSettings(**values)
    settings.check()
    return settings


def as_mapping(given: Any) -> Mapping[str, Any]:
    """A generation_config that a call gives: nothing, a mapping, or an object of another library that becomes one."""
    if given is None or isinstance(given, Mapping):
        return given or {}
    if not hasattr(given, "to_dict"):
        raise TypeError(
            f"generation_config is a {type(given).__name__}: give GenerationSettings, a mapping, or a GenerationConfig"
        )
    return given.to_dict()


def _stated(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings that `given` states, after a warning of what it asks for in vain."""
    vain = [f"{name}={value}" for name, value in given.items() if name not in _NAMES and not _neutral(name, value)]
    if vain:
        warnings.warn(f"generate does not do what {where} says by {', '.join(vain)}", stacklevel=5)
    return {name: value for name, value in given.items() if name in _NAMES and value is not None}


def model_arguments(options: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The options that are not settings, for the model, whose arguments are `known`.

    Raises TypeError for one that neither has, or one of the reference that would change the tokens and is not implemented.
    """
    others = {name: value for name, value in options.items() if name not in _NAMES and name != "generation_config"}
    known = sorted(known)
    for name, value in others.items():
        if name in known or name in _IGNORED:
            continue
        if name not in _UNSUPPORTED:
            raise TypeError(
                f"generate has no argument {name}: give fields of GenerationSettings, or {', '.join(known)} for the model"
            )
        if not _neutral(name, value):
            raise TypeError(f"generate does not implement {name}, which is {value!r}: leave it out")
    return {name: others[name] for name in known if name in others}


def _neutral(name: str, value: Any) -> bool:
    return not value or name in _IGNORED or value in _UNSUPPORTED.get(name, ())


def _id_of(config: Any, name: str) -> Any:
    """What the configuration says of a special token, else that of its decoder."""
    for holder in (config, config.text_config):
        value = getattr(holder, name, None)
        if value is not None:
            return value
    return None
