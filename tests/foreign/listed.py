"""Tests of transformers that need internals m4train does not have: the reason, and patterns of `Class::test`."""

LISTED: dict[str, tuple[str, ...]] = {}
