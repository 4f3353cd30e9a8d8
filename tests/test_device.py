"""The script with everything on the accelerator: the same runs as step by step, alone or side by side, or killed."""

import csv
import shutil
from fractions import Fraction
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL

import tdmpc2_jax as td
import tdmpc2_jax_device as SCRIPT
from tdmpc2_support.run.checkpoints import complete_checkpoints, find_checkpoint, read_agent, read_meta

DEVICE = "tdmpc2_jax_device.py"


def learned(folder):
    """Parameters and target values of a run, as a dict of arrays by their paths."""
    checkpoint = find_checkpoint(folder)
    meta = read_meta(checkpoint)
    state = read_agent(checkpoint, meta, ("params", "target_q", "q_scale", "updates"))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def count_of(folder):
    return {**read_meta(find_checkpoint(folder))["count"], "seconds": 0}


def curve(folder):
    rows = list(csv.DictReader((folder / "eval.csv").open()))
    return np.array([[float(row["step"]), float(row["reward"])] for row in rows])


def assert_close(one, other):
    """But for the rounding of hundreds of updates, which grows in single numbers."""
    assert one.keys() == other.keys()
    close = [np.isclose(values, other[name], rtol=1e-3, atol=1e-5).ravel() for name, values in one.items()]
    assert np.concatenate(close).mean() > 0.999
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], rtol=1e-3, atol=1e-4, err_msg=name)


def run_of(tmp_path, task, name="tdmpc2_jax_device", seed=1):
    return tmp_path / "runs" / f"jax_toys:{task}" / name / str(seed)


# One elite: which one of two with nearly the same value is drawn would hang on the last bit.
FIXED = "--task jax_toys:fixed --eval-freq 100 --num-elites 1 --num-pi-trajs 1".split()


@pytest.fixture(scope="module")
def run_200(tmp_path_factory):
    """A run of 200 decisions, in a task that terminates and has one first state only."""
    folder = tmp_path_factory.mktemp("device")
    SCRIPT.main([*SMALL[DEVICE], *FIXED, "--total-timesteps", "200", "--runs-dir", str(folder / "runs")])
    return run_of(folder, "fixed")


def test_a_run_is_that_of_the_first_script_with_the_same_draws(run_200, here, tmp_path):
    status, _, err = here(*FIXED, "--total-timesteps", 200)
    assert not status, err
    other = run_of(tmp_path, "fixed", "tdmpc2_jax")
    assert count_of(run_200) == count_of(other) and count_of(other)["updates"] > 190
    assert_close(learned(run_200), learned(other))


def test_a_run_that_was_stopped_goes_on_as_the_one_that_was_not_whatever_its_chunks(run_200, here, tmp_path):
    """To the last bit. It is stopped amid an episode."""
    flags = [*FIXED, "--exp-name", "stopped", "--checkpoint-freq", 30]
    assert not here(*flags, "--total-timesteps", 170, "--chunk", 7, name=DEVICE)[0]
    stopped = run_of(tmp_path, "fixed", "stopped")
    checkpoints = complete_checkpoints(stopped)
    assert [checkpoint.name for checkpoint in checkpoints] == ["170", "150"]
    shutil.rmtree(checkpoints[0])  # as if it had been killed before it was there
    status, _, err = here(*flags, "--total-timesteps", 200, "--resume", name=DEVICE)
    assert not status, err
    assert (stopped / "eval.csv").read_bytes() == (run_200 / "eval.csv").read_bytes()
    one, other = learned(run_200), learned(stopped)
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.slow
def test_a_run_is_evaluated_step_by_step_too(run_200, here):
    for name in (DEVICE, "tdmpc2_jax.py"):
        status, out, err = here("--evaluate", "--checkpoint", run_200, "--eval-episodes", 2, small=False, name=name)
        assert not status, err
        assert "jax_toys:fixed: return" in out


@pytest.mark.slow
def test_a_run_becomes_a_small_file_that_the_first_script_evaluates(run_200, here, tmp_path):
    made = ("--checkpoint", run_200, "--output", "small.safetensors", "--quantize", "float16")
    status, _, err = here(*made, small=False, name="deploy.py")
    assert not status, err
    how = ("--evaluate", "--checkpoint", "small.safetensors", "--no-mpc", "--eval-episodes", 2)
    status, out, err = here(*how, small=False)
    assert not status and "jax_toys:fixed: return" in out, err


@pytest.mark.slow
def test_each_of_several_seeds_goes_on_alone(here, tmp_path):
    flags = [*FIXED, "--exp-name", "pair", "--no-mpc"]
    assert not here(*flags, "--num-seeds", 2, "--total-timesteps", 100, name=DEVICE)[0]
    for seed in (1, 2):
        status, _, err = here(*flags, "--seed", seed, "--resume", "--total-timesteps", 140, name=DEVICE)
        assert not status, err
        folder = run_of(tmp_path, "fixed", "pair", seed)
        assert count_of(folder)["decisions"] == 140
        assert curve(folder)[:, 0].tolist() == [0, 100, 140]


@pytest.mark.slow
def test_seeds_whose_folders_are_in_use_are_refused(run_200, here):
    runs = run_200.parents[2]
    status, _, err = here(*FIXED, "--seed", 0, "--num-seeds", 2, "--runs-dir", runs, name=DEVICE)
    assert status and f"{run_200} holds a run" in err
    assert not (run_200.parent / "0").exists()


@pytest.mark.slow
def test_seeds_side_by_side_are_the_runs_that_they_are_alone_and_one_that_breaks_stops_alone(here, tmp_path):
    """The draws of the first states decide which one meets a reward that is not a number."""
    flags = "--task jax_toys:bad --num-envs 2 --utd 0.7 --total-timesteps 240 --eval-freq 120 --no-mpc".split()
    status, out, err = here(*flags, "--num-seeds", 3, "--exp-name", "together", name=DEVICE)
    sentence = err.strip().splitlines()[-1]
    broken = []
    for seed in (1, 2, 3):
        alone, together = (run_of(tmp_path, "bad", name, seed) for name in ("tdmpc2_jax_device", "together"))
        stopped, _, own = here(*flags, "--seed", seed, name=DEVICE)
        np.testing.assert_allclose(curve(alone), curve(together), rtol=1e-3, atol=1e-3)
        if stopped:
            broken.append(seed)
            assert "reward is not finite at simulator step" in own
            assert f"{together.relative_to(tmp_path)} stops here" in sentence
        else:
            assert out.count(f"seed {seed}: ") == 3
            assert count_of(alone) == count_of(together)
            assert_close(learned(alone), learned(together))
    assert status == 1 and 0 < len(broken) < 3


def test_updates_are_due_as_often_as_asked_for_however_long_the_run():
    for utd in (0.075, 1.0, 1 / 3, 2.5, 1 / 1024, 0.0001, 0.00012, 20.5):
        schedule = SCRIPT.schedule_of(SCRIPT.Args(utd=utd, seed_steps=1000), SimpleNamespace(spec=None))
        assert float(schedule.utd) == pytest.approx(utd, rel=1e-6), "as it was asked for, however small"
        decisions = np.array([999, 1000, 1001, 123_456, 2**24 + 1, 100_000_000])
        due = jax.vmap(lambda d, schedule=schedule: SCRIPT.updates_due(schedule, d, 0, 1))(jnp.asarray(decisions))
        exact = [1000 + int((int(d) - 1000) * schedule.utd) if d >= 1000 else 0 for d in decisions]
        assert due.tolist() == exact
    assert SCRIPT.updates_due(schedule, 5000, 0, 0) == 0, "there is no window to learn from"


def test_what_does_not_fit_in_memory_is_refused_before_anything_is_compiled(refused, monkeypatch):
    monkeypatch.setattr(SCRIPT, "available_bytes", lambda device: 10**10)
    flags = "--task jax_toys:point --seed-steps 5000 --num-envs 1000".split()
    sentence = refused(*flags, "--buffer-size", 2_000_000_000)
    assert "GB are free" in sentence and "--buffer-size" in sentence
    assert "--num-seeds 900" in refused(*flags, "--buffer-size", 10_000_000, "--num-seeds", 900)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("walker-walk", "is not in JAX"),
        ("jax_toys:pictures", "image observations"),
        ("jax_toys:changing", "different shapes or types: .info"),
        ("jax_toys:nothing", "lacks reset, step"),
        ("jax_toys:missing", "unknown task"),
        ("no_such_module:make", "cannot be imported"),
    ],
)
def test_tasks_that_are_no_environments_in_jax_are_refused(task, words, refused):
    assert words in refused("--task", task)


@pytest.mark.slow
def test_the_replay_is_not_copied_in_a_dispatch():
    """What a dispatch of two seeds needs beside its arguments is less than half of their replays."""
    agent = td.Agent(enc_dim=8, mlp_dim=8, latent_dim=8, num_q=2, batch_size=4, num_samples=8, num_elites=2, mpc=False)
    env = SCRIPT.open_jax("jax_toys:point")
    agent = td.for_task(agent, env.spec.name, env)
    streams = jax.vmap(SCRIPT.random_streams)(jnp.arange(2))
    runs = jax.eval_shape(jax.vmap(lambda streams: SCRIPT.fresh_run(agent, env, 2**20, 1, streams)), streams)
    memory = (
        SCRIPT.advance.lower(agent, env, SCRIPT.Schedule(0, 10, Fraction(1)), runs, 1, 0).compile().memory_analysis()
    )
    assert memory.temp_size_in_bytes < 0.5 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(runs.replay))
