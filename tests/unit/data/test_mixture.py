from hypothesis import given
from hypothesis import strategies as st

from m4train.data.mixture import Mixture

weights = st.lists(st.floats(0.01, 10), min_size=1, max_size=6)


@given(weights)
def test_every_prefix_is_within_one_sample_of_the_shares(values: list[float]) -> None:
    shares = {str(number): value for number, value in enumerate(values)}
    total = sum(values)
    mixture, drawn = Mixture(shares), dict.fromkeys(shares, 0)
    for draws in range(1, 400):
        drawn[mixture.next()] += 1
        for name, share in shares.items():
            assert abs(drawn[name] - share / total * draws) < 1 + 1e-6


def test_a_source_that_ends_leaves_its_share_to_the_others() -> None:
    mixture = Mixture({"a": 2, "b": 1, "c": 1})
    for _ in range(10):
        mixture.next()
    mixture.end("a")
    later = [mixture.next() for _ in range(10)]
    assert later.count("b") == later.count("c") == 5
