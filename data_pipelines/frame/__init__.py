"""What every step of a data pipeline stands on, in the order of reading.

- `document.py`: a page or sample on its way: ordered nodes of text and images, and where it is from
- `store.py`: documents and their images on disk between two stages; files written aside and renamed
- `statistics.py`: what went in and out of every step, what was dropped and why, with examples; merged over ranks
- `step.py`: the base of every step
- `config.py`, `options.py`: a pipeline's YAML, and the keys and values that its steps know
- `manifest.py`: what a stage was started with; anything else is refused later
- `rank.py`, `executors.py`, `runner.py`: a rank of a stage, datatrove's executors, and the whole pipeline
"""
