import numpy as np
import pytest

from m4train.data.plan.permutation import Permutation, WindowOrder


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_it_is_a_permutation_that_can_be_entered_anywhere(size: int) -> None:
    order = Permutation(size, "key")
    whole = order.take(0, size + 5)
    assert sorted(whole.tolist()) == list(range(size))
    for start in range(0, size, max(1, size // 7)):
        assert order.take(start, 10).tolist() == whole[start : start + 10].tolist()


def test_keys_give_unrelated_orders_without_pattern() -> None:
    first, second = (Permutation(100_000, key).take(0, 100_000) for key in ("0 pages 0", "0 pages 1"))
    assert (first == second).mean() < 0.001
    assert abs(np.corrcoef(first, np.arange(100_000))[0, 1]) < 0.02
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


def test_the_order_is_fixed_for_good() -> None:
    assert Permutation(10, "seed").take(0, 10).tolist() == [0, 5, 1, 8, 7, 3, 4, 9, 6, 2]


@pytest.mark.parametrize("window", [1, 3, 100])
def test_windows_hold_whole_blocks_and_every_sample_comes_once(window: int) -> None:
    ends = np.cumsum([3, 1, 7, 5, 2, 4])
    order, whole, position = WindowOrder(ends, window, "key"), [], 0
    while position < order.size:
        part = order.take(position, 4).tolist()
        whole += part
        position += len(part)
    assert sorted(whole) == list(range(22))
    for start in range(22):
        assert order.take(start, 2).tolist()[0] == whole[start]
    blocks = np.searchsorted(ends, whole, side="right")
    changes = int((np.diff(blocks) != 0).sum())
    assert changes == 5 if window == 1 else changes > 5
