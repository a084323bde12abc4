"""Batches from a plan (`loader`, `rank_plan`, `collate`) or from streams (`stream_loader`), and what was left out (`quarantine`)."""
