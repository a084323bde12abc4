"""Pairs of nodes: each is measured once, and slow ones speak against the right node."""

from itertools import combinations

import pytest

from m4train.commands.pairs import pair_speeds, rounds, slow_nodes, slow_pairs
from tests.helpers.distributed import end_ranks, start_ranks


@pytest.mark.parametrize("count", range(9))
def test_every_pair_meets_once_and_nobody_twice_in_a_round(count):
    found = rounds(count)
    assert sorted(pair for pairs in found for pair in pairs) == list(combinations(range(count), 2))
    for pairs in found:
        met = [number for pair in pairs for number in pair]
        assert len(met) == len(set(met))
    assert len(found) <= max(count, 1)


def speeds(names, slow):
    return {pair: 0.5 if set(pair) in slow else 10.0 + number for number, pair in enumerate(combinations(names, 2))}


@pytest.mark.parametrize(
    ("names", "slow", "accused"),
    [
        ("abcd", [], {}),
        ("abcd", ["ca", "cb", "cd"], {"c": ["a", "b", "d"]}),  # half of all pairs
        ("abc", ["ca", "cb"], {"c": ["a", "b"]}),
        ("abcd", ["ab"], {"a": ["b"], "b": ["a"]}),  # a link alone
        ("abcdef", ["ab", "ac", "ad", "ae", "af", "eb", "ec", "ed", "ef"], {"a": [*"bcdef"], "e": [*"abcdf"]}),
        ("ab", ["ab"], {}),  # the only pair is the usual one
        ("a", [], {}),
    ],
)
def test_the_node_that_is_slow_to_most_is_named(names, slow, accused):
    measured = speeds(names, [set(pair) for pair in slow])
    assert slow_nodes(slow_pairs(measured)) == accused


def _measure(folder):
    import os
    from datetime import timedelta
    from pathlib import Path

    from m4train.training.engines.processes import Processes

    processes = Processes(timedelta(seconds=60))
    node = f"n{(processes.rank + 1) // 2}"  # n0, then n1 with two ranks
    found = pair_speeds(processes, node)
    Path(folder, str(os.getpid())).write_text(f"{sorted(found)} {all(0 < speed < 1000 for speed in found.values())}")
    processes.shutdown()


@pytest.mark.slow
def test_nodes_of_several_ranks_exchange_by_their_first(tmp_path):
    out = tmp_path / "found"
    out.mkdir()
    ranks = start_ranks(_measure, 3, str(out), folder=tmp_path)
    try:
        assert [child.wait(timeout=120) for child in ranks] == [0, 0, 0]
    finally:
        end_ranks(ranks)
    assert {path.read_text() for path in out.iterdir()} == {"[('n0', 'n1')] True"}
