"""What is due at a step of a run."""

import pytest

from tdmpc2_support.errors import UserError
from tdmpc2_support.run.schedule import check_windows, due, updates_due


def test_something_is_due_once_in_every_multiple_and_at_the_end():
    last, done = 0, []
    for step in range(0, 101, 7):
        if due(step, last, 20, end=step == 98):
            done.append(step)
            last = step
    assert done == [21, 42, 63, 84, 98]
    assert not due(98, 98, 20, end=True), "the end was done already"
    assert due(0, -1, 20), "the first time"


@pytest.mark.parametrize("utd, envs", [(1.0, 1), (1.0, 4), (0.5, 4), (0.25, 1), (3.0, 1)])
def test_updates_follow_the_decisions_after_as_many_at_once_as_there_were_random_ones(utd, envs):
    burst, updates, at = max(1, int(utd * envs)), 0, {}
    for decisions in range(0, 400, envs):
        updates += burst * updates_due(decisions, updates, 100, utd, burst, windows=decisions > 10)
        at[decisions] = updates
    assert set(value for decisions, value in at.items() if decisions < 100) == {0}
    assert at[100] == 100 - 100 % burst
    for decisions, value in at.items():
        if decisions >= 100:
            assert 0 <= 100 + (decisions - 100) * utd - value < burst + 1


def test_learning_waits_for_the_first_window():
    assert updates_due(150, 0, 100, 1.0, 1, windows=0) == 0
    assert updates_due(150, 0, 100, 1.0, 1, windows=1) == 150
    assert updates_due(200, 150, 100, 1.0, 1, windows=0) == 50, "it is not asked for any more"


def test_a_run_whose_episodes_are_all_shorter_than_a_window_is_stopped_early():
    with pytest.raises(UserError, match="in 200 decisions there is nothing to learn from: all episodes are shorter"):
        updates_due(200, 0, 100, 1.0, 1, windows=0)
    assert updates_due(242, 0, 0, 0.075, 9, windows=0, num_envs=121) == 0, "two decisions in each are no episode yet"
    with pytest.raises(UserError, match="nothing to learn from"):
        updates_due(200 * 121, 0, 0, 0.075, 9, windows=0, num_envs=121)


def test_a_replay_that_has_lost_all_windows_is_told_from_one_that_had_none_yet():
    check_windows(0, 0, 3)
    check_windows(5, 10, 3)
    with pytest.raises(UserError, match="no window of 4 entries"):
        check_windows(0, 10, 3)
