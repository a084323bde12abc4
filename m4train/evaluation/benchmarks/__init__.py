"""Public benchmarks: `conf/benchmark/NAME.yaml` says what is asked and how it is scored.

- `spec.py`: what such a file holds
- `records.py`: the records of a benchmark, from parquet, JSON or canonical shards
- `questions.py`: a record as a question, with the prompt of the model's family
- `run.py`: answers, scores, the lines of every sample, and the files of test servers
- `compare.py`: two results against each other, sample by sample
"""
