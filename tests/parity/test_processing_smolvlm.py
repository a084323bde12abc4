"""SmolVLM's processor against the parts of the reference's that need neither video decoding nor other packages."""

from __future__ import annotations

import numpy as np
import pytest
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from m4train.processing import SmolVLMImageProcessor, SmolVLMProcessor, Tokenizer
from m4train.processing.chat import ChatTemplate
from tests.helpers.processing import picture, tokenizer_folder

SETTINGS = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}}


@pytest.mark.parametrize("size", [(640, 480), (30, 100), (32, 32), (7, 5), (1, 3000), (3000, 1)], ids=str)
@pytest.mark.parametrize("split", [True, False])
def test_pixels(size, split):
    settings = {**SETTINGS, "do_image_splitting": split}
    options = {"return_tensors": "np", "return_row_col_info": True}
    ours = SmolVLMImageProcessor(**settings)(picture(*size), **options)
    theirs = SmolVLMImageProcessorPil(**settings)(picture(*size), **options)
    for name in ("pixel_values", "pixel_attention_mask", "rows", "cols"):
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(theirs[name]))


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, 4), (3, 2)])
def test_expansion_string(rows, columns):
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder())
    ours = SmolVLMProcessor(SmolVLMImageProcessor(**SETTINGS), tokenizer, image_seq_len=3)
    expected = processing_smolvlm.get_image_prompt_string(
        rows, columns, 3, "<fake_token_around_image>", "<image>", "<global-img>"
    )
    assert ours.image_string(rows, columns) == expected


def test_chat_template():
    ours = ChatTemplate(SmolVLMProcessor.default_template, {"bos_token": "<|im_start|>"})
    theirs = ChatTemplate(processing_smolvlm.DEFAULT_CHAT_TEMPLATE, {})
    image, text = {"type": "image"}, {"type": "text", "text": "What is it?"}
    messages = [
        {"role": "user", "content": [image, text]},
        {"role": "assistant", "content": [text]},
        {"role": "user", "content": [text, image, image, text]},
    ]
    for prompt in (False, True):
        assert ours.render(messages, prompt) == theirs.render(messages, prompt)
