"""Answers to held-out conversations: `generation` asks the model, `metrics` scores, `answers` puts both to the sources."""
