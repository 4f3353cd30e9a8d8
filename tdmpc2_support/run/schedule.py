"""What is due at a step of a run (evaluations, checkpoints, updates), and its random streams."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from tdmpc2_support.cli import number_of_envs
from tdmpc2_support.envs.tasks import TaskSpec, task_spec
from tdmpc2_support.errors import UserError


class Streams(NamedTuple):
    """The random streams of a run, one for each use; environments that are not in JAX have others, of NumPy."""

    init: jax.Array  # of the parameters
    train: jax.Array
    act: jax.Array
    evaluate: jax.Array
    batches: jax.Array  # of batches that are drawn outside of the compiled updates
    environments: jax.Array  # of the first states of episodes, where the environments are compiled, too


def random_streams(seed: int) -> Streams:
    """The streams of the run with this seed."""
    return Streams(*jax.random.split(jax.random.key(seed), len(Streams._fields)))


def due(step: int, last: int, freq: int, end: bool = False) -> bool:
    """Whether a multiple of freq lies in (last, step], or the run ends at a step where it was not done."""
    return step // freq > last // freq or (end and last != step)


def seed_steps_of(args: Any, spec: TaskSpec) -> int:
    """Random decisions at the start of a run: --seed-steps, or the larger of 1000 and five episodes."""
    if args.seed_steps is not None:
        return args.seed_steps
    return max(1000, 5 * spec.episode_length)


def online_seed_steps(args: Any, names: Sequence[str]) -> int:
    """Decisions before planning and learning begin in an online run of several tasks: --seed-steps, or five of the
    longest episodes in every environment."""
    if args.seed_steps is not None:
        return args.seed_steps
    return 5 * number_of_envs(args, names) * max(task_spec(name).episode_length for name in names)


def evaluation_steps(names: Sequence[str], episodes: int) -> int:
    """How many steps an evaluation in all tasks takes, resets among them, if no episode terminates."""
    return episodes * (1 + max(task_spec(name).episode_length for name in names))


def updates_due(
    decisions: int,
    updates: int,
    seed_steps: int,
    utd: float,
    burst: int,
    windows: Any,
    at_once: int | None = None,
    num_envs: int = 1,
) -> int:
    """How many dispatches of `burst` updates are to be made now.

    Nothing is learned in the first seed_steps decisions, which are random. Then as many updates are made at once, and
    from there on utd for every decision. A run with updates behind it has a window to learn from; before the first one
    it is asked for, since all episodes until then may have been shorter than a window.

    Raises:
        UserError: they were for 200 decisions of every environment: later ones will not be longer, where nothing is
            learned.

    Args:
        decisions: made so far, in all environments.
        updates: made so far.
        seed_steps: see `seed_steps_of`.
        utd: updates per decision.
        burst: updates of one dispatch.
        at_once: how many are made at once, if not as many as seed_steps.
        windows: number of windows in the replay; on the device, and only read before the first update.
        num_envs: environments that have made these decisions together; 1 where seed_steps fill a window in each.
    """
    if decisions < seed_steps:
        return 0
    if updates == 0 and not windows:
        check_first_window(decisions, num_envs)
        return 0
    total = int((seed_steps if at_once is None else at_once) + (decisions - seed_steps) * utd)
    return (total - updates) // burst


def check_first_window(decisions: int, num_envs: int) -> None:
    """Stops a run whose replay has never held a window in 200 decisions of every environment.

    Raises:
        UserError: it is so.
    """
    if decisions >= 200 * num_envs:
        short = "all episodes are shorter than a training window (--horizon decisions)"
        raise UserError(f"in {decisions} decisions there is nothing to learn from: {short}")


def check_windows(windows: Any, updates: int, horizon: int) -> None:
    """Stops a run that learns from a replay in which no window is left: all episodes in it are shorter than one.

    Args:
        windows: number of windows in the replay; on the device until here.
        updates: made so far.
        horizon: of a window.

    Raises:
        UserError: there is none, though there was one before.
    """
    if updates and not windows:
        raise UserError(f"the replay holds no window of {horizon + 1} entries any more: all episodes are shorter")
