"""`m4train generate MODEL QUESTION [IMAGE ...]`: one answer of an exported model."""

from __future__ import annotations

from pathlib import Path

from m4train.errors import ConfigError


def generate(arguments: list[str]) -> int:
    """Prints the model's greedy answer. Raises ConfigError if an argument is missing or names nothing."""
    if len(arguments) < 2:
        raise ConfigError("generate needs a model folder and a question: m4train generate MODEL QUESTION [IMAGE ...].")
    folder, question, *paths = arguments
    for path in [folder, *paths]:
        if not Path(path).exists():
            raise ConfigError(f"{path} does not exist.")
    import torch
    from PIL import Image

    from m4train import AutoModelForImageTextToText, AutoProcessor
    from m4train.config import DecodingConfig
    from m4train.evaluation.decoding import Decoding

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    content = [{"type": "image"} for _ in paths] + [{"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [Image.open(path) for path in paths]
    inputs = processor(text=[prompt], images=[images] if images else None, return_tensors="pt")
    decoding = Decoding.of(model, processor, DecodingConfig(), 256)
    with torch.inference_mode():
        ids = model.generate(**inputs, generation_config=decoding.settings())
    print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip())
    return 0
