"""A SmolVLM folder written here, opened by transformers: prompt, ids, pixels, logits and greedy answer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from m4train.models import SmolVLMConfig, SmolVLMForConditionalGeneration
from m4train.processing import SmolVLMImageProcessor, SmolVLMProcessor, Tokenizer
from tests.helpers.models import perturb, tiny_idefics3
from tests.helpers.processing import picture, tokenizer_folder
from tests.helpers.rounding import assert_near
from tests.parity.models_reference import rounding

SETTINGS = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
QUESTION = [{"type": "image"}, {"type": "text", "text": "Which digit is this?"}]


class _WithoutVideo(transformers.SmolVLMProcessor):
    """The reference's processor reads videos with torchvision, which is not installed here; images need none of it."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name != "video_processor":
            super().check_argument_for_proper_class(argument_name, argument)


def _theirs(folder: Path) -> transformers.SmolVLMProcessor:
    return _WithoutVideo(
        SmolVLMImageProcessorPil.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
        SimpleNamespace(num_frames=1, fps=1, video_sampling={"video_size": {"longest_edge": 16}}),
        image_seq_len=4,
        chat_template=(folder / "chat_template.jinja").read_text(),
    )


def test_transformers_agrees_on_a_whole_folder(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder())
    ours = SmolVLMProcessor(SmolVLMImageProcessor(**SETTINGS), tokenizer, image_seq_len=4)
    values = tiny_idefics3(model_type="smolvlm", image_token_id=ours.image_token_id)
    values["vision_config"] |= {"model_type": "smolvlm_vision", "image_size": 16}
    values["text_config"]["vocab_size"] = len(tokenizer)
    model = SmolVLMForConditionalGeneration(SmolVLMConfig.from_dict(values)).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)

    reference = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    images = [[picture(32, 24)], [picture(10, 30, seed=1)]]
    seen = []
    for processor, network in ((ours, model), (_theirs(tmp_path), reference)):
        processor.tokenizer.padding_side = "left"
        prompt = processor.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
        options = {"padding": True, "add_special_tokens": False, "return_tensors": "pt"}
        inputs = processor(text=[prompt, prompt], images=images, **options)
        with torch.no_grad():
            logits = network(**inputs).logits
            answer = network.generate(**inputs, max_new_tokens=8, do_sample=False)
        seen.append((prompt, inputs, logits, answer))
    (prompt, inputs, logits, answer), (their_prompt, their_inputs, their_logits, their_answer) = seen
    assert prompt == their_prompt
    assert inputs.keys() == their_inputs.keys()
    for key in inputs:
        np.testing.assert_array_equal(np.asarray(inputs[key]), np.asarray(their_inputs[key]), err_msg=key)
    real = inputs["attention_mask"].bool()
    assert_near(logits[real], their_logits[real], rounding(reference, inputs))
    assert answer.tolist() == their_answer.tolist()
