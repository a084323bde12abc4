"""Every name that transformers documents for generation, loading and saving, given to our classes: it acts as there, or one
sentence names it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import m4train
from m4train.errors import M4Error
from tests.helpers.models import tiny_idefics3
from tests.parity.models_inputs import idefics3_inputs
from tests.parity.models_reference import reference_pair

pytestmark = pytest.mark.filterwarnings("ignore")
SENTENCES = (ValueError, TypeError, NotImplementedError, M4Error)
PLAIN = {"max_new_tokens": 5, "eos_token_id": 96, "pad_token_id": 3, "do_sample": False}
DRAWN = {"do_sample": True, "temperature": 1.3}
BEAMS = {"num_beams": 3}
ANSWERED = {"return_dict_in_generate": True}
# field of GenerationConfig -> a value that is not the default, and what else has to be said for it to act
ACTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "max_length": (40, {"max_new_tokens": None}),
    "max_new_tokens": (3, {}),
    "min_length": (30, {"eos_token_id": [*range(60)]}),
    "min_new_tokens": (4, {"eos_token_id": [*range(60)]}),
    "early_stopping": (True, BEAMS),
    "do_sample": (True, DRAWN),
    "num_beams": (3, {}),
    "use_cache": (False, {"bad_words_ids": [[90]]}),
    "temperature": (0.7, DRAWN),
    "top_k": (5, DRAWN),
    "top_p": (0.6, DRAWN),
    "min_p": (0.2, DRAWN),
    "top_h": (0.4, DRAWN),
    "typical_p": (0.5, DRAWN),
    "epsilon_cutoff": (0.01, DRAWN),
    "eta_cutoff": (0.01, DRAWN),
    "repetition_penalty": (1.7, {}),
    "encoder_repetition_penalty": (1.7, {}),
    "length_penalty": (0.2, BEAMS),
    "no_repeat_ngram_size": (2, {}),
    "encoder_no_repeat_ngram_size": (2, {}),
    "bad_words_ids": ([[90], [5, 6]], {}),
    "renormalize_logits": (True, DRAWN),
    "forced_bos_token_id": (7, {}),
    "forced_eos_token_id": (7, {}),
    "remove_invalid_values": (True, {}),
    "exponential_decay_length_penalty": ((1, 1.5), {}),
    "suppress_tokens": ([*range(30)], {}),
    "begin_suppress_tokens": ([*range(90)], {}),
    "sequence_bias": ([[[10], 9.0]], {}),
    "num_return_sequences": (2, DRAWN),
    "output_attentions": (True, ANSWERED),
    "output_hidden_states": (True, ANSWERED),
    "output_scores": (True, ANSWERED),
    "output_logits": (True, ANSWERED),
    "return_dict_in_generate": (True, {}),
    "pad_token_id": (5, {"eos_token_id": [*range(60)]}),
    "bos_token_id": (4, {}),
    "eos_token_id": ([*range(60)], {}),
    "stop_strings": (["a"], {}),
    "max_time": (100.0, {}),
    "guidance_scale": (1.5, {}),
    "watermarking_config": ({"bias": 3.0}, {}),
    "token_healing": (True, {}),
    "cache_implementation": ("static", {}),
    "cache_config": ({"max_cache_len": 64}, {}),
    "max_cache_len": (64, {}),
    "compile_config": ({"fullgraph": False}, {}),
    "disable_compile": (True, {}),
    "low_memory": (True, {}),
    "penalty_alpha": (0.6, {"top_k": 4}),
    "dola_layers": ("high", {}),
    "diversity_penalty": (0.5, {"num_beams": 4, "num_beam_groups": 2}),
    "num_beam_groups": (2, {"num_beams": 4, "diversity_penalty": 0.5}),
    "constraints": ([object()], BEAMS),
    "force_words_ids": ([[5, 6]], BEAMS),
    "prefill_chunk_size": (4, {}),
    "prompt_lookup_num_tokens": (2, {}),
    "use_mtp": (True, {}),
    "decoder_start_token_id": (4, {}),
    "continuous_batching_config": ({"block_size": 4}, {}),
}
# Of a second, small model that drafts, which is not given here, or of the file itself.
OTHERS = {
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "speculation_type", "_from_model_config", "transformers_version",
}  # fmt: skip
# Of these transformers takes objects of its own, one prompt, or models with more heads; they only say how fast tokens come.
SPEED = {"compile_config", "prompt_lookup_num_tokens", "use_mtp"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, Any]]:
    config = tiny_idefics3(model_type="idefics3")
    folder = tmp_path_factory.mktemp("names")
    theirs, ours = reference_pair("Idefics3", config, m4train.Idefics3ForConditionalGeneration, folder)
    return theirs, ours, idefics3_inputs(config, "left")


def _said(call: Any) -> tuple[Any, str]:
    torch.manual_seed(0)
    try:
        found = call()
    except SENTENCES as error:
        return None, str(error)
    return getattr(found, "sequences", found).tolist(), ""


def test_every_field_of_a_generation_configuration_is_tried() -> None:
    assert set(transformers.GenerationConfig().to_dict()) - OTHERS == set(ACTS)


@pytest.mark.parametrize("name", ACTS)
def test_a_field_of_generation_acts_or_is_named(pair: tuple[Any, Any, dict[str, Any]], name: str) -> None:
    theirs, ours, inputs = pair
    value, more = ACTS[name]
    given = {key: value for key, value in {**PLAIN, **more, name: value}.items() if value is not None}
    mine, sentence = _said(lambda: ours.generate(**inputs, **given))
    if mine is None:
        assert name in sentence or "\n" not in sentence.strip()
        assert sentence.count("\n") <= 1
        return
    other, _ = _said(lambda: theirs.generate(**inputs, **(PLAIN if name in SPEED else given)))
    assert mine == other


# argument of from_pretrained -> a value that asks for something; True: it acts or has no meaning here, else it is refused
LOADING: dict[str, tuple[Any, bool]] = {
    "cache_dir": ("CACHE", True),
    "force_download": (False, True),
    "local_files_only": (True, True),
    "token": ("hf_none", True),
    "revision": ("main", True),
    "use_safetensors": (True, True),
    "weights_only": (True, True),
    "fusion_config": ({"norm": True}, False),
    "ignore_mismatched_sizes": (True, False),
    "output_loading_info": (True, True),
    "dtype": (torch.bfloat16, True),
    "torch_dtype": ("float16", True),
    "device_map": ({"": "cpu"}, True),
    "attn_implementation": ("sdpa", True),
    "low_cpu_mem_usage": (True, True),
    "trust_remote_code": (True, True),
    "state_dict": ({"x": 1}, False),
    "from_tf": (True, False),
    "from_flax": (True, False),
    "gguf_file": ("a.gguf", False),
    "subfolder": ("deep", False),
    "variant": ("fp16", False),
    "load_in_8bit": (True, False),
    "max_memory": ({0: "1GB"}, False),
    "offload_folder": ("there", False),
    "tp_plan": ("auto", False),
    "disable_mmap": (True, False),
    "no_such_argument": (1, False),
}
SAVING: dict[str, tuple[Any, bool]] = {
    "is_main_process": (True, True),
    "state_dict": (None, True),
    "push_to_hub": (True, False),
    "max_shard_size": ("5MB", True),
    "variant": ("fp16", False),
    "token": ("hf_none", True),
    "save_peft_format": (False, True),
    "save_original_format": (False, False),
    "distributed_checkpoint": (True, False),
    "safe_serialization": (True, True),
    "no_such_argument": (1, False),
}


def test_every_documented_argument_of_loading_and_saving_is_tried() -> None:
    for call, tried in (
        (transformers.PreTrainedModel.from_pretrained, LOADING),
        (transformers.PreTrainedModel.save_pretrained, SAVING),
    ):
        kinds = inspect.signature(call).parameters.values()
        named = {one.name for one in kinds if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)}
        assert named - {"self", "pretrained_model_name_or_path", "config", "save_directory"} <= set(tried)


@pytest.mark.parametrize("name", LOADING)
def test_an_argument_of_loading(pair: tuple[Any, Any, dict[str, Any]], name: str, tmp_path: Path) -> None:
    pair[1].save_pretrained(tmp_path)
    value, acts = LOADING[name]
    call = lambda: m4train.Idefics3ForConditionalGeneration.from_pretrained(tmp_path, **{name: value})
    if acts:
        found = call()
        model = found[0] if isinstance(found, tuple) else found
        assert model.dtype == {"dtype": torch.bfloat16, "torch_dtype": torch.float16}.get(name, torch.float32)
    else:
        with pytest.raises(SENTENCES, match=name) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SAVING)
def test_an_argument_of_saving(pair: tuple[Any, Any, dict[str, Any]], name: str, tmp_path: Path) -> None:
    value, acts = SAVING[name]
    if acts:
        pair[1].save_pretrained(tmp_path / "model", **{name: value})
        assert m4train.Idefics3ForConditionalGeneration.from_pretrained(tmp_path / "model").dtype == torch.float32
    else:
        with pytest.raises(SENTENCES, match=name):
            pair[1].save_pretrained(tmp_path / "model", **{name: value})
