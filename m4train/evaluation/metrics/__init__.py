"""Scores of answers, each as its reference implementation gives it.

- `said.py`: what a metric is given and what it returns, with 95 % intervals
- `registry.py`: the metrics by name, and functions of one's own
- `vqa.py`: VQA accuracy: official, TextVQA's, and a lenient one
- `texts.py`: exact match, ANLS, relaxed accuracy, OCRBench, perplexity of references
- `choices.py`, `open_answers.py`: multiple choice, MMMU, MathVista
- `yes_no.py`: MME and the rule part of HallusionBench
- `ptb.py`, `cider.py`: captions
"""
