from m4train.evaluation.metrics import exact_match


def test_exact_match_ignores_only_white_space():
    assert exact_match(" The  first.\n", "The first.") == 1.0
    assert exact_match("the first.", "The first.") == 0.0
    assert exact_match("3", "3, 5") == 0.0
    assert exact_match("", "") == 1.0
