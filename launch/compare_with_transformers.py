"""Loads an exported folder with m4train and with transformers, and compares logits and a generated answer.

    python launch/compare_with_transformers.py EXPORT [IMAGE]

Without IMAGE a picture with a drawn digit is used. Exits with 1 if the two disagree.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from PIL import Image, ImageDraw

TOLERANCE = 1e-4  # largest difference of fp32 logits
QUESTION = "Which digit is this?"


def main(folder: str, image: Image.Image) -> int:
    import transformers

    import m4train

    transformers.utils.logging.disable_progress_bar()
    ours = _run(m4train, folder, image)
    theirs = _run(transformers, folder, image)
    difference = (ours["logits"] - theirs["logits"]).abs().max().item()
    print(f"prompt       {ours['prompt']!r}")
    print(f"ids equal    {torch.equal(ours['ids'], theirs['ids'])} ({ours['ids'].shape[1]} tokens)")
    print(f"logits       largest difference {difference:.1e} (fp32, at most {TOLERANCE:.0e})")
    print(f"m4train      answers {ours['answer']!r}")
    print(f"transformers answers {theirs['answer']!r}")
    same = torch.equal(ours["ids"], theirs["ids"]) and ours["answer"] == theirs["answer"] and difference <= TOLERANCE
    print("the two agree" if same else "THE TWO DISAGREE")
    return 0 if same else 1


@torch.inference_mode()
def _run(library, folder: str, image: Image.Image) -> dict:
    """Prompt, ids, logits and greedy answer of one library; both offer the same classes."""
    processor = library.AutoProcessor.from_pretrained(folder)
    model = library.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = _inputs(processor, image)
    ids = inputs["input_ids"]
    generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = processor.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)[0]
    return {"prompt": processor.decode(ids[0]), "ids": ids, "logits": model(**inputs).logits, "answer": answer}


def _inputs(processor, image: Image.Image) -> dict:
    """A question about the image, as the documentation of the processor's model asks it."""
    if type(processor).__name__ == "IdeficsProcessor":  # takes text and images in one list, and has no chat template
        asked = ["User:", image, f"{QUESTION}<end_of_utterance>\nAssistant:"]
        return processor(text=[asked], return_tensors="pt")
    if hasattr(processor, "space_after_image"):
        processor.space_after_image = True  # Idefics2 in transformers 5 writes a space behind an image, 4.46 none
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=[prompt], images=[[image]], return_tensors="pt", add_special_tokens=False)


def _drawn_digit() -> Image.Image:
    image = Image.new("L", (32, 32))
    ImageDraw.Draw(image).line([(10, 8), (22, 8), (15, 25)], fill=255, width=3)
    return image.convert("RGB")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], Image.open(sys.argv[2]).convert("RGB") if len(sys.argv) == 3 else _drawn_digit()))
