"""Answers to held-out conversations, and their scores.

- `generation.py`: generates answers in batches, on any number of ranks
- `answers.py`: the questions of held-out sources, and what is shown of the answers
- `decoding.py`: the one rule by which answers are decoded
- `likelihood.py`: how likely given answers are
- `metrics/`: the scores, each as its reference implementation gives it, or a function of one's own
"""
