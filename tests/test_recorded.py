"""Measures of recorded episodes, where these do not move."""

import json

import numpy as np

from tdmpc2_support.data.recorded import measures


def test_measures_of_what_never_changes_are_finite_numbers():
    constant = np.ones((20, 4, 3))
    answers = {
        "futures": {1: {"true": constant, "exact": constant, "off": constant + 1}},
        "advantages": {"true": np.zeros(20), "exact": np.zeros(20)},
        "actions": {"recorded": constant},
    }
    found = measures(answers)
    assert found["nmse"][1]["exact"] == [0, 0, 0, 0]
    assert min(found["nmse"][1]["off"]) > 1e6, "no error is small beside no variance"
    assert found["actions"]["recorded"] == {"std": 0, "correlation": 0}
    json.dumps(found, allow_nan=False)
