"""Looking at a run without training: before, while and after it trains.

- `plan_report.py`: epochs, mixture, padding and balance, from the indexes alone
- `preview.py`: packs as the model sees them, as a page
- `validate.py`: every sample of all sources read once, and what is wrong with them
- `bench.py`: how fast the data side is, stage by stage
- `replay.py`: the samples of any step of a run, planned again from the nearest cursor
- `report.py`, with `charts.py` and `stage_charts.py`: one page about a run and those before it
"""
