"""A run as a user sees it: files, kills, resumes, broken environments, equal seeds. Real processes are what is killed
and what another process goes on from; where files and words are looked at, `main` of the script runs in this one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import SMALL
from diffusion_helpers import TINY
from helpers import ROOT, children, count_of, gone, meta_of, read_curve, read_scalars, wait_for
from imageio_ffmpeg import get_ffmpeg_exe

import envs
from tdmpc2_support.run.checkpoints import complete_checkpoints, find_checkpoint, read_agent, read_meta

POINT = ("--task", "strange_envs:Point-v0", "--eval-freq", 100, "--checkpoint-freq", 100)
FOLDER = "strange_envs:Point-v0/tdmpc2_jax/1"
FIRST_VERSION = pytest.param("tdmpc_jax", marks=pytest.mark.slow)
BOTH = pytest.mark.parametrize("name", ["tdmpc2_jax", FIRST_VERSION])  # for what a script's own loop can do wrong


@pytest.fixture(scope="module", params=["tdmpc2_jax", FIRST_VERSION])  # for what a script's own loop can do wrong
def finished(request, tmp_path_factory):
    """Name of a script, folder of a run of 300 steps that it made as a process of its own, and what that printed."""
    name, runs = request.param, tmp_path_factory.mktemp("finished")
    command = [sys.executable, ROOT / f"{name}.py", *SMALL[f"{name}.py"], *map(str, POINT), "--total-timesteps", "300"]
    environment = os.environ | {"JAX_LOG_COMPILES": "1"}
    done = subprocess.run([*command, "--runs-dir", runs], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (runs / "stderr").write_text(done.stderr)
    return name, runs / "strange_envs:Point-v0" / name / "1", done.stdout


def test_a_run_leaves_its_curve_scalars_arguments_and_checkpoint(finished, here, tmp_path):
    name, folder, out = finished
    steps, rewards = read_curve(folder)
    assert steps == [0, 100, 200, 300] and np.isfinite(rewards).all()
    assert all(f"{step:>10}" in out for step in steps), "each evaluation is a line of the table"
    assert json.loads((folder / "args.json").read_text())["total_timesteps"] == 300
    assert count_of(folder)["decisions"] == 300
    assert count_of(folder)["updates"] == 299  # 100 at the end of the seed phase, then one before each next decision
    assert [step for step, _ in read_scalars(folder, "charts/episodic_return")] == [40 * i for i in range(1, 8)]
    for tag in ("losses/value_loss", "losses/pi_loss", "charts/SPS", "eval/episodic_return"):
        assert read_scalars(folder, tag), tag

    how = ("--evaluate", "--checkpoint", folder, "--eval-episodes", 3, "--json", "result.json")
    status, out, err = here(*how, small=False, name=f"{name}.py")
    assert status == 0, err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["task"] == "strange_envs:Point-v0" and len(result["returns"]) == len(result["successes"]) == 3
    assert f"{result['mean']:.1f} ± {result['std']:.1f}" in out and out.count("episode ") == 3


def test_the_programs_of_a_loop_are_compiled_once_for_each_of_their_ways_to_act(finished):
    name, folder, _ = finished
    told = (folder.parents[2] / "stderr").read_text()
    acting = "add_and_act" if name == "tdmpc2_jax" else "act"  # random, or planned; the other one evaluates, too:
    ways = 2 if name == "tdmpc2_jax" else 4  # by the policy at step 0, and planned without exploration
    assert told.count(f"Finished XLA compilation of jit({acting})") == ways
    assert told.count("Finished XLA compilation of jit(add)") == (0 if name == "tdmpc2_jax" else 1)


@pytest.mark.slow
def test_equal_seeds_give_equal_runs_bit_for_bit_and_others_differ(finished, here, tmp_path):
    name, folder, _ = finished

    def numbers(folder):
        tags = ("losses/total_loss", "losses/pi_loss", "losses/grad_norm", "charts/episodic_return")
        return [read_curve(folder)[1]] + [read_scalars(folder, tag) for tag in tags]

    def run(exp_name, seed):  # in this process; the other run was made by another
        flags = ("--total-timesteps", 300, "--exp-name", exp_name, "--seed", seed)
        status, _, err = here(*POINT, *flags, name=f"{name}.py")
        assert status == 0, err
        return numbers(tmp_path / "runs" / "strange_envs:Point-v0" / exp_name / str(seed))

    first = numbers(folder)
    assert all(first) and first == run("b", 1)
    other = run("c", 2)
    assert all(mine != others for mine, others in zip(first, other, strict=True))


KILLS = ["training", "checkpoint"]  # where it is killed
MORE_KILLS = [pytest.param(name, KILLS * 3, marks=pytest.mark.slow) for name in ("tdmpc2_jax", "tdmpc_jax")]


@pytest.mark.parametrize("name, kills", [("tdmpc2_jax", ["checkpoint"]), *MORE_KILLS])
def test_a_run_killed_again_and_again_goes_on_and_counts_no_step_twice(start, here, tmp_path, name, kills):
    folder, total = tmp_path / "runs" / "strange_envs:Point-v0" / name / "1", 200 * len(kills) + 300
    flags = (*POINT, "--total-timesteps", total, "--resume")
    for kill, where in enumerate(kills):
        child = start(*flags, name=f"{name}.py")
        reached = 200 * (kill + 1)

        def checkpointed(reached=reached):
            return (folder / "checkpoints" / str(reached)).exists()

        wait_for(checkpointed, child)
        if where == "checkpoint":  # the next one is being written
            wait_for(lambda: any("tmp" in path.name for path in (folder / "checkpoints").iterdir()), child)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert count_of(folder)["decisions"] >= reached
    status, _, err = here(*flags, name=f"{name}.py")
    assert status == 0, err

    assert read_curve(folder)[0] == list(range(0, total + 1, 100))
    count = count_of(folder)
    assert count["decisions"] == total and count["updates"] == total - 1
    ends = [step for step, _ in read_scalars(folder, "charts/episodic_return")]
    assert ends == sorted(set(ends)), "no episode stands twice in the curve"
    assert [step for step, _ in read_scalars(folder, "eval/episodic_return")] == list(range(0, total + 1, 100))


def test_a_run_whose_first_checkpoint_was_cut_off_starts_again(here, tmp_path):
    flags = ("--task", "strange_envs:Point-v0", "--eval-freq", 60, "--total-timesteps", 60)
    status, _, err = here(*flags)
    assert status == 0, err
    folder = tmp_path / "runs" / FOLDER
    (folder / "checkpoints" / "60").rename(folder / "checkpoints" / "60.orbax-checkpoint-tmp")
    status, out, err = here(*flags, "--resume")
    assert status == 0 and "from simulator step 0" in out, err
    assert read_curve(folder)[0] == [0, 60] and count_of(folder)["decisions"] == 60

    status, out, err = here(*flags, "--resume")
    assert status == 0 and "have been made: ask for more to go on" in out, err
    assert read_curve(folder)[0] == [0, 60]


def test_a_ctrl_c_before_the_run_has_begun_is_one_sentence(start, tmp_path):
    child = start(*POINT, "--total-timesteps", 1_000_000)
    wait_for(lambda: (tmp_path / "runs" / FOLDER / ".lock").exists(), child)  # it makes its environments now
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "--resume" in err and "Traceback" not in err


SIGNALS = [(signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM), pytest.param((signal.SIGINT,), marks=pytest.mark.slow)]


@pytest.mark.parametrize("numbers", SIGNALS, ids=lambda numbers: "-".join(number.name for number in numbers))
def test_signals_end_the_run_with_a_checkpoint_of_the_last_step(start, here, tmp_path, numbers):
    folder = tmp_path / "runs" / FOLDER
    child = start(*POINT, "--total-timesteps", 100_000)
    wait_for(lambda: (folder / "checkpoints" / "200").exists(), child)
    for number in numbers:
        child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode - 128 in numbers and "--resume" in err and "Traceback" not in err
    count = count_of(folder)
    assert f"at simulator step {count['decisions']};" in err and count["decisions"] >= 200
    status, _, err = here(*POINT, "--total-timesteps", count["decisions"] + 50, "--resume")
    assert status == 0, err
    assert count_of(folder)["decisions"] == count["decisions"] + 50


OTHER_LOOPS = {  # the task of each, and flags
    "tdmpc2_jax_rgb.py": ("strange_envs:Pixels-v0", SMALL["tdmpc2_jax_rgb.py"]),
    "tdmpc_jax.py": ("strange_envs:Point-v0", SMALL["tdmpc_jax.py"]),
    "tdmpc2_jax_device.py": ("jax_toys:point", [*SMALL["tdmpc2_jax_device.py"], "--no-mpc", "--chunk", "10"]),
    "tdmpc2_jax_diffusion.py": ("strange_envs:Point-v0", [*SMALL["tdmpc2_jax.py"], *TINY, "--mode", "joint"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_LOOPS)
def test_a_signal_ends_the_loop_of_every_script_with_a_checkpoint_that_goes_on(start, tmp_path, name):
    task, flags = OTHER_LOOPS[name]
    folder = tmp_path / "runs" / task / name.removesuffix(".py") / "1"
    flags = (*flags, "--task", task, "--eval-freq", 10_000, "--checkpoint-freq", 50)
    child = start(*flags, small=False, name=name)
    wait_for(lambda: complete_checkpoints(folder), child)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=300)
    step = meta_of(folder, folder.parent.name)["count"]["decisions"]
    assert child.returncode == 128 + signal.SIGTERM, err
    assert f"stopped by SIGTERM at simulator step {step}; --resume continues the run" in err
    child = start(*flags, "--resume", "--total-timesteps", step + 30, small=False, name=name)
    _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    assert meta_of(folder, folder.parent.name)["count"]["decisions"] == step + 30


NOT_FINITE = [
    ("NanReward", "step returned a reward of nan", 200),
    ("HugeObs", "the agent's action is not finite: its networks have diverged", 100),
]


@pytest.mark.parametrize("task, words, kept", NOT_FINITE)
def test_a_number_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    here, tmp_path, task, words, kept
):
    task = f"strange_envs:{task}-v0"
    status, _, err = here("--task", task, "--checkpoint-freq", 100, "--total-timesteps", 400)
    sentence = err.splitlines()[-1]
    assert status == 1 and words in sentence, err
    assert "Traceback" not in err
    folder = tmp_path / "runs" / task / "tdmpc2_jax" / "1"
    assert count_of(folder)["decisions"] == kept
    check_that_it_evaluates(here, folder)


def check_that_it_evaluates(here, folder):
    """At a name that is the same in all tests: equal arguments are traced once."""
    Path("evaluated").symlink_to(folder)
    flags = ("--evaluate", "--checkpoint", "evaluated", "--task", "strange_envs:Point-v0", "--eval-episodes", 2)
    status, out, err = here(*flags, small=False, name=f"{folder.parent.name}.py")
    assert status == 0 and "return" in out, err


@pytest.mark.parametrize(
    "num_envs", [1, pytest.param(8, marks=pytest.mark.slow)]
)  # 8 are stepped by workers, where there are cores for them
def test_an_environment_that_raises_ends_the_run_with_its_traceback(here, tmp_path, num_envs):
    flags = ("--task", "strange_envs:Raising-v0", "--num-envs", num_envs, "--checkpoint-freq", 20 * num_envs)
    status, _, err = here(*flags, "--eval-freq", 10_000)
    assert status != 0 and "the simulator broke" in err and "strange_envs.py" in err
    check_that_it_evaluates(here, tmp_path / "runs" / "strange_envs:Raising-v0" / "tdmpc2_jax" / "1")


@pytest.mark.slow
def test_a_task_with_goals_and_matrices_of_actions_trains_as_any_other(here, tmp_path):
    task = "strange_envs:Goal-v0"
    status, out, err = here("--task", task, "--eval-freq", 60, "--total-timesteps", 60)
    assert status == 0 and "Traceback" not in err, err
    assert f"{task}: 3 observations (achieved_goal 1, observation 2), 1 actions ((1, 1) flattened), 1 env" in out
    rows = (tmp_path / "runs" / task / "tdmpc2_jax" / "1" / "eval.csv").read_text().splitlines()
    assert [row.split(",")[2] for row in rows[1:]] == ["1.0", "1.0"]


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_its_task_named_and_leaves_a_usable_checkpoint(start, here, tmp_path):
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("no workers on one core")
    child = start(*POINT, "--num-envs", 8, "--total-timesteps", 1_000_000)
    folder = tmp_path / "runs" / FOLDER
    wait_for(lambda: (folder / "checkpoints" / "200").exists(), child)
    workers = children(child.pid)
    os.kill(workers[0], signal.SIGKILL)
    _, err = child.communicate(timeout=60)
    assert child.returncode not in (0, -9) and "Traceback" not in err
    sentence = err.strip().splitlines()[-1]
    assert "strange_envs:Point-v0" in sentence and f"(process {workers[0]}) was killed by signal 9" in sentence
    assert gone(workers)
    check_that_it_evaluates(here, folder)


def test_a_signal_during_an_evaluation_ends_the_run_in_order(start, here, tmp_path):
    number = signal.SIGINT
    flags = ("--task", "strange_envs:Slow-v0", "--num-envs", 2, "--eval-episodes", 8, "--eval-freq", 60)
    flags = (*flags, "--checkpoint-freq", 50, "--no-mpc")  # its plans would take longer to compile than all else
    child = start(*flags, "--total-timesteps", 1_000_000)
    folder = tmp_path / "runs" / "strange_envs:Slow-v0" / "tdmpc2_jax" / "1"
    wait_for(lambda: (folder / "checkpoints" / "50").exists(), child)
    wait_for(lambda: (tmp_path / "slow").exists(), child)  # it is in the evaluation, of at least 40 slow steps
    assert len((folder / "eval.csv").read_text().splitlines()) == 2  # header and step 0
    workers = children(child.pid)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 128 + number and "Traceback" not in err
    assert "at simulator step 60; --resume" in err, "in the middle of the evaluation that is due there"
    assert gone(workers)
    check_that_it_evaluates(here, folder)


@pytest.mark.slow
def test_the_success_rate_is_the_headline_of_tasks_that_have_one(here, tmp_path):
    flags = ("--task", "mw-reach", "--total-timesteps", 200, "--eval-freq", 10_000, "--seed-steps", 200)
    status, out, err = here(*flags, "--eval-episodes", 1)
    assert status == 0, err
    assert out.splitlines()[1].split()[:3] == ["step", "success", "return"]
    assert [len(line.split()) for line in out.splitlines()[2:]] == [5, 5]
    folder, results = tmp_path / "runs" / "mw-reach" / "tdmpc2_jax" / "1", tmp_path / "results.json"
    flags = ("--evaluate", "--checkpoint", folder, "--no-mpc", "--eval-episodes", 2, "--json", results)
    status, out, err = here(*flags, small=False)
    assert status == 0, err
    assert out.splitlines()[-1].startswith("mw-reach: success rate 0.")
    assert json.loads(results.read_text())["success_rate"] == np.mean(json.loads(results.read_text())["successes"])


def parameters(folder):
    """Those of a run's newest checkpoint, one below the other."""
    checkpoint = find_checkpoint(folder)
    params = read_agent(checkpoint, read_meta(checkpoint), ("params",))["params"]
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


@pytest.mark.slow
def test_a_run_begins_with_the_agent_of_another_and_goes_on_with_its_own(finished, here, tmp_path):
    name, before, _ = finished
    folder = tmp_path / "runs" / "strange_envs:Point-v0" / "tuned" / "1"
    flags = (*POINT, "--exp-name", "tuned", "--checkpoint", before)

    def run(steps, *more):
        status, _, err = here(*flags, "--total-timesteps", steps, *more, name=f"{name}.py")
        assert status == 0, err
        return parameters(folder)

    given = parameters(before)
    np.testing.assert_array_equal(run(60), given)  # nothing is learned yet
    tuned = run(140, "--resume")
    again = run(142, "--resume")
    assert np.linalg.norm(again - tuned) < 0.2 * np.linalg.norm(tuned - given), "not from that agent again"
    assert meta_of(folder, name)["count"]["decisions"] == 142


@BOTH
def test_several_environments_with_terminations_share_one_run(here, tmp_path, name):
    flags = ("--task", "strange_envs:Falling-v0", "--num-envs", 4, "--utd", 0.5, "--eval-freq", 10_000)
    status, _, err = here(*flags, "--total-timesteps", 400, name=f"{name}.py")
    assert status == 0, err
    folder = tmp_path / "runs" / "strange_envs:Falling-v0" / name / "1"
    meta = meta_of(folder, name)
    assert 400 <= meta["count"]["decisions"] < 404
    if name == "tdmpc2_jax":
        termination = [value for _, value in read_scalars(folder, "losses/termination_loss")]
        assert termination and min(termination) > 0, "it has a termination head"
    due = 100 + (meta["count"]["decisions"] - 100) * 0.5
    assert due - 4 <= meta["count"]["updates"] <= due
    assert {value for _, value in read_scalars(folder, "charts/episodic_length")} - {40.0}, "some episodes fell"


@pytest.mark.slow
def test_a_video_of_each_evaluation_is_written_to_the_folder(here, tmp_path):
    try:
        envs.check_rendering("InvertedPendulum-v5")
    except envs.UserError as error:
        pytest.skip(str(error))
    flags = ("--task", "InvertedPendulum-v5", "--total-timesteps", 50, "--eval-freq", 50, "--capture-video")
    status, _, err = here(*flags)
    assert status == 0, err
    folder = tmp_path / "runs" / "InvertedPendulum-v5" / "tdmpc2_jax" / "1"
    videos = sorted((folder / "videos").iterdir())
    assert [video.name for video in videos] == ["step-000000000.mp4", "step-000000050.mp4"]
    command = [get_ffmpeg_exe(), "-loglevel", "error", "-i", videos[0], "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    frames = np.frombuffer(raw, np.uint8).reshape(-1, 384, 384, 3)
    assert len(frames) > 1 and frames[0].std() > 10, "pictures with something on them"
