"""Multi-task runs as a user sees them: files, kills, devices, processes, evaluation, folding. Real processes are what
is killed, what runs side by side and what others go on from."""

import csv
import dataclasses
import json
import signal
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from conftest import SMALL, with_devices
from helpers import ROOT, as_flags, meta_of, read_scalars, two_processes, wait_for
from imageio_ffmpeg import get_ffmpeg_exe
from many_tasks import state_of

import envs
import tdmpc2_jax_mt as mt
from tdmpc2_support import devices
from tdmpc2_support.agents.pretrained import load_multitask
from tdmpc2_support.cli import settings
from tdmpc2_support.run.checkpoints import complete_checkpoints
from tdmpc2_support.run.reports import joined
from tdmpc2_support.run.schedule import random_streams
from tdmpc2_support.run.video import grid, side_by_side

SCRIPT = mt
TASKS = ("cartpole-balance", "mw-reach")
FOLDER = "cartpole-balance+mw-reach/tdmpc2_jax_mt/1"
SIZES = {"enc_dim": 16, "mlp_dim": 16, "latent_dim": 16, "num_enc_layers": 2, "num_q": 2}
BY_POLICY = mt.Agent(mpc=False)
LOSSES = ("losses/total_loss", "losses/value_loss", "losses/pi_loss", "losses/grad_norm", "losses/pi_grad_norm")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Random episodes of both tasks, as --save-episodes writes them."""
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        vector, writer = envs.make_envs(task, 2, 0, num_workers=0), envs.EpisodeWriter(folder, task, 2)
        rng, (obs, _) = np.random.default_rng(0), vector.reset(seed=0)
        action, reward = np.zeros((2, *vector.single_action_space.shape), np.float32), np.zeros(2)
        for step in range(envs.task_spec(task).episode_length + 1):
            writer.add(obs, action, reward, np.full(2, step == 0))
            action = rng.uniform(-1, 1, action.shape).astype(np.float32)
            obs, reward, *_ = vector.step(action)
        writer.flush()
        vector.close()
    return folder


@pytest.fixture
def flags(data_dir):
    """What all runs here have in common."""
    lengths = ("--num-updates", 60, "--checkpoint-freq", 20, "--eval-freq", 1000, "--log-freq", 1)
    return ("--tasks", ",".join(TASKS), "--data-dir", data_dir, *lengths, "--no-mpc")


def losses_of(folder):
    return {tag: np.array([value for _, value in read_scalars(folder, tag)]) for tag in LOSSES}


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """Folder of a run of 60 updates on one device that nothing has interrupted; what it printed."""
    runs, flags = tmp_path_factory.mktemp("whole"), "--num-updates 60 --checkpoint-freq 20 --eval-freq 1000 --no-mpc"
    command = [sys.executable, ROOT / "tdmpc2_jax_mt.py", *SMALL["tdmpc2_jax_mt.py"], "--runs-dir", runs]
    command += ["--tasks", ",".join(TASKS), "--data-dir", data_dir, "--log-freq", "1", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return runs / FOLDER, done.stdout


def test_a_run_says_what_it_needs_and_leaves_its_curves_arguments_and_checkpoint(whole):
    folder, out = whole
    first, second, _, row = out.splitlines()
    assert all(f"{part} 0.0" in first for part in ("parameters", "optimiser", "data", "activations"))
    assert "2 task(s): 39 observations, 4 actions" in second and "4 episodes" in second and "in memory" in second
    assert row.split()[0] == "60" and "normalized score" in row and "DMControl return" in row
    assert "Meta-World success rate" in row
    rows = list(csv.DictReader((folder / "eval.csv").open()))
    assert [(row["step"], row["task"], row["seed"]) for row in rows] == [("60", task, "1") for task in TASKS]
    assert [step for step, _ in read_scalars(folder, "losses/total_loss")] == list(range(1, 61))
    score = read_scalars(folder, "eval/normalized_score")[0][1]
    assert score == pytest.approx((float(rows[0]["reward"]) / 10 + 100 * float(rows[1]["success"])) / 2, rel=1e-5)
    assert json.loads((folder / "args.json").read_text())["num_updates"] == 60
    meta = meta_of(folder, "tdmpc2_jax_mt")
    assert meta["count"]["updates"] == 60 and meta["tasks"] == list(TASKS)


@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(here, flags, whole, tmp_path):
    folder = tmp_path / "runs" / FOLDER
    for updates in (30, 60):
        flags = (*flags, "--num-updates", updates, "--storage", "disk", "--resume")
        status, _, err = here(*flags, name="tdmpc2_jax_mt.py")
        assert status == 0, err
    for mine, uninterrupted in zip(state_of(folder), state_of(whole[0]), strict=True):
        np.testing.assert_array_equal(mine, uninterrupted)
    assert [step for step, _ in read_scalars(folder, "losses/total_loss")] == list(range(1, 61)), "none twice"


@pytest.mark.slow
def test_a_signal_ends_the_run_with_a_checkpoint_of_the_last_update(start, flags, tmp_path):
    folder = tmp_path / "runs" / FOLDER
    child = start(*flags, "--num-updates", 1_000_000, name="tdmpc2_jax_mt.py")
    wait_for(lambda: complete_checkpoints(folder), child)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM, err
    updates = meta_of(folder, "tdmpc2_jax_mt")["count"]["updates"]
    assert f"at update {updates}; --resume continues the run" in err


@pytest.mark.slow
def test_a_run_killed_on_eight_devices_with_parameters_spread_goes_on_on_one(start, here, flags, whole, tmp_path):
    folder = tmp_path / "runs" / FOLDER
    eight = {"name": "tdmpc2_jax_mt.py", "devices": 8}
    child = start(*flags, "--shard-params", "yes", **eight)
    wait_for(lambda: complete_checkpoints(folder), child)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert meta_of(folder, "tdmpc2_jax_mt")["count"]["updates"] in (20, 40, 60)
    status, out, err = here(*flags, "--resume", name="tdmpc2_jax_mt.py")
    assert status == 0 and "parameters, on cpu;" in out, err
    for tag, values in losses_of(folder).items():
        np.testing.assert_allclose(values, losses_of(whole[0])[tag], rtol=2e-3, err_msg=tag)
        np.testing.assert_allclose(values[:20], losses_of(whole[0])[tag][:20], rtol=1e-4, atol=1e-6, err_msg=tag)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_until_a_signal_comes_to_either(start, flags, whole, tmp_path):
    lengths = ("--num-updates", 1_000_000, "--eval-freq", 60)
    children = [start(*flags, *lengths, *process, name="tdmpc2_jax_mt.py", devices=1) for process in two_processes()]
    folder = tmp_path / "runs" / FOLDER
    curve = folder / "eval.csv"
    wait_for(lambda: curve.exists() and curve.read_text().count("\n") > 2, children[0])
    children[1].send_signal(signal.SIGTERM)
    outputs = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [128 + signal.SIGTERM] * 2, outputs
    assert "on 2 x cpu" in outputs[0][0] and "normalized score" in outputs[0][0]
    assert "normalized score" not in outputs[1][0]
    updates = meta_of(folder, "tdmpc2_jax_mt")["count"]["updates"]
    assert f"at update {updates}; --resume continues the run" in outputs[0][1] and updates >= 60
    for tag, values in losses_of(folder).items():
        np.testing.assert_allclose(values[:20], losses_of(whole[0])[tag][:20], rtol=1e-4, atol=1e-6, err_msg=tag)
    assert [row["step"] for row in csv.DictReader(curve.open())][:2] == ["60", "60"]


DEVICES = """
import jax, numpy as np
from jax.sharding import Mesh
import envs, tdmpc2_jax_mt as mt
from tdmpc2_support.data.device_data import Source
from tdmpc2_support.devices import global_arrays, replicated
from tdmpc2_support.run.schedule import random_streams
tasks = {tasks!r}
agent = mt.for_tasks(mt.Agent(enc_dim=16, mlp_dim=16, latent_dim=16, num_q=3, task_dim=8, batch_size=16), tasks)
data = envs.load_dataset(tasks, {data_dir!r})

def losses(devices, storage, shard):
    mesh = Mesh(np.array(jax.devices()[:devices]), "devices")
    constants = global_arrays(mt.make_tasks(agent, tasks), replicated(mesh))
    source = Source(data, storage, "files", mesh, agent.batch_size, agent.horizon)
    program, shapes = mt.compile_train(mt.Args(shard_params=shard), agent, mesh, constants, source.shapes())
    places = jax.tree.map(lambda x: x.sharding, shapes)
    state = jax.jit(lambda: mt.fresh_state(agent, random_streams(1)), out_shardings=places)()
    source.load()
    rows = []
    for batch, _ in zip(source.batches(seed=1, first=0, readers=4), range(20)):
        state, info = program(state, batch)
        rows.append([float(info[name]) for name in ("total_loss", "value_loss", "pi_loss", "grad_norm")])
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.params))
    return np.array(rows), here / sum(x.nbytes for x in jax.tree.leaves(state.params))

for storage, shard in (("disk", "no"), ("device", "yes")):
    one, _ = losses(1, storage, "no")
    eight, part = losses(8, storage, shard)
    np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-6, err_msg=storage + shard)
    assert part < 0.3 if shard == "yes" else part == 1, part
print("equal")
"""


@pytest.mark.slow
def test_eight_devices_learn_what_one_learns_with_data_and_parameters_copied_or_spread(data_dir):
    code = DEVICES.format(tasks=TASKS, data_dir=str(data_dir))
    done = subprocess.run([sys.executable, "-c", code], env=with_devices(8), cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["equal"], done.stderr


def test_an_evaluation_prints_every_task_and_writes_it_to_a_file(whole, tmp_path, capsys):
    path = tmp_path / "results.json"
    args = mt.Args(evaluate=True, checkpoint=str(whole[0]), eval_episodes=2, json=str(path), agent=BY_POLICY)
    mt.main(as_flags(args))
    lines, results = capsys.readouterr().out.splitlines(), json.loads(path.read_text())
    assert [line.split()[0] for line in lines] == ["task", *TASKS, "normalized"]
    assert list(results["tasks"]) == list(TASKS) and results["domains"].keys() == {"DMControl", "Meta-World"}
    cartpole, reach = results["tasks"].values()
    assert len(cartpole["returns"]) == len(reach["successes"]) == 2
    assert cartpole["success_rate"] is None and cartpole["score"] == pytest.approx(cartpole["mean"] / 10)
    assert reach["score"] == pytest.approx(100 * reach["success_rate"])
    assert results["normalized_score"] == pytest.approx((cartpole["score"] + reach["score"]) / 2)
    assert f"normalized score {results['normalized_score']:.1f} " in lines[-1]

    mt.main(as_flags(dataclasses.replace(args, tasks="mw-reach")))
    assert list(json.loads(path.read_text())["tasks"]) == ["mw-reach"], "a part of what it knows"


def test_a_folded_task_of_an_own_run_acts_as_the_multi_task_agent_does(whole, tmp_path):
    import tdmpc2_jax as td

    path = tmp_path / "results.json"
    common = {"evaluate": True, "checkpoint": str(whole[0]), "eval_episodes": 2, "json": str(path)}
    mt.main(as_flags(mt.Args(tasks="cartpole-balance", agent=BY_POLICY, **common)))
    many = json.loads(path.read_text())["tasks"]["cartpole-balance"]["returns"]
    common["agent"] = td.Agent(mpc=False, **SIZES)
    td.main(as_flags(td.Args(source_task="cartpole-balance", **common)))
    np.testing.assert_allclose(json.loads(path.read_text())["returns"], many, rtol=1e-3)
    for source, words in ((None, "name its task with --source-task"), ("dog-run", "it knows cartpole-balance, mw-re")):
        with pytest.raises(SystemExit, match=words):
            td.main(as_flags(td.Args(task="cartpole-balance", source_task=source, **common)))


@pytest.mark.slow
def test_all_tasks_are_planned_for_in_one_call_and_their_episodes_end_by_themselves(whole, monkeypatch):
    calls, act = [], mt.act
    monkeypatch.setattr(mt, "act", lambda *args, **kwargs: calls.append(len(args[3])) or act(*args, **kwargs))
    agent = mt.Agent(num_samples=16, num_elites=4, num_pi_trajs=2, iterations=1)
    agent, loaded = mt.load_agent(mt.Args(checkpoint=str(whole[0]), agent=agent))
    vector = envs.make_envs(loaded.tasks, 2, 3)
    stepped, step = [], vector.step
    vector.step = lambda action, active: stepped.append(active.sum()) or step(action, active)
    ids, tasks = np.array([0, 0, 1, 1]), mt.make_tasks(agent, loaded.tasks)
    returns, successes, frames = mt.evaluate(agent, tasks, loaded.params, ids, vector, jax.random.key(0))
    vector.close()
    assert calls == stepped == [4] * 100 + [2] * 400, "Meta-World's episodes have 100 decisions, DMControl's 500"
    assert returns.shape == successes.shape == (4,) and (returns > 0).all() and not frames


@pytest.fixture
def made(monkeypatch):
    """The vector environments that the script has made so far."""
    vectors, make_envs = [], envs.make_envs

    def make(*args, **kwargs):
        assert all(vector.closed for vector in vectors), "one at a time"
        vectors.append(make_envs(*args, **kwargs))
        return vectors[-1]

    monkeypatch.setattr(envs, "make_envs", make)
    return vectors


@pytest.mark.slow
def test_as_many_tasks_as_fit_into_memory_are_evaluated_at_a_time_in_the_same_environments(
    whole, made, tmp_path, monkeypatch
):
    path = tmp_path / "results.json"
    args = mt.Args(evaluate=True, checkpoint=str(whole[0]), eval_episodes=2, json=str(path), agent=BY_POLICY)
    results = []
    for free, num_envs in ((10**10, [4]), (3 * 2 * mt.ENV_BYTES, [2, 2]), (0, [2, 2])):
        monkeypatch.setattr(devices, "available_bytes", lambda device=None, free=free: free)
        mt.main(as_flags(args))
        assert [vector.num_envs for vector in made] == num_envs and all(vector.closed for vector in made)
        results.append([row["returns"] for row in json.loads(path.read_text())["tasks"].values()])
        made.clear()
    np.testing.assert_allclose(results[1], results[0], rtol=1e-3)
    assert results[2] == results[1]


@pytest.mark.slow
def test_a_run_has_environments_during_an_evaluation_only(here, flags, made, monkeypatch):
    events, log_losses = [], mt.Logger.log_losses

    def log(logger, step, *args):
        assert all(vector.closed for vector in made)
        events.append((step, len(made)))
        log_losses(logger, step, *args)

    monkeypatch.setattr(mt.Logger, "log_losses", log)
    status, _, err = here(*flags, "--num-updates", 4, "--eval-freq", 2, "--eval-episodes", 1, name="tdmpc2_jax_mt.py")
    assert status == 0, err
    assert events == [(1, 0), (2, 0), (3, 1), (4, 1)] and len(made) == 2 and made[1].closed


def test_a_simulator_that_is_missing_is_refused_before_anything_is_learned(refused, flags, monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    assert "Meta-World cannot be imported" in refused(*flags)


def test_films_of_tasks_that_were_evaluated_at_different_times_are_one_grid():
    def pictures(value):
        return np.full((384, 384, 3), value, np.uint8)

    def part(values, steps):
        frames = [mt.thumbnails([pictures(value + step) for value in values], 3) for step in range(steps)]
        return np.arange(2 * len(values)), np.zeros(2 * len(values)), frames

    result = joined(("a", "b", "c"), [part([10, 20], 5), part([30], 2)])
    assert result.returns.tolist() == [[0, 1], [2, 3], [0, 1]] and len(result.frames) == 5
    assert result.frames[4].shape == (768, 768, 3), "two by two"
    assert [frame[500, 10, 0] for frame in result.frames] == [30, 31, 31, 31, 31], "the last picture stands still"
    assert result.frames[4][10, 10, 0] == 14 and result.frames[4][10, 500, 0] == 24
    assert joined(("a",), [(np.zeros(2), np.zeros(2), [])]).frames == []


def test_no_random_key_is_used_twice(data_dir):
    """JAX checks it while a program is traced."""
    agent = mt.for_tasks(dataclasses.replace(BY_POLICY, **SIZES, task_dim=8, batch_size=4), TASKS)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "devices")
    source = mt.Source(envs.load_dataset(TASKS, data_dir), "device", "files", mesh, 4, agent.horizon)
    tasks = mt.make_tasks(agent, TASKS)

    def learn_and_act(seed, agent, batch):
        streams = random_streams(seed)
        state, _ = mt.train(agent, mesh, tasks, mt.fresh_state(agent, streams), batch)
        obs, mean = np.zeros((2, agent.obs_dim), np.float32), np.zeros((2, agent.horizon, agent.action_dim))
        act = partial(mt.act, agent, tasks, state.params, obs, np.arange(2), explore=False)
        for key in jax.random.split(jax.random.fold_in(streams.evaluate, 5), 2):
            for first in (np.ones(2, bool), np.zeros(2, bool)):
                action, mean, key = act(prev_mean=mean, first=first, key=key)
        return action

    with jax.debug_key_reuse(True):
        for mpc in (True, False):
            acting = partial(learn_and_act, 1, dataclasses.replace(agent, mpc=mpc))
            assert jax.eval_shape(acting, source.shapes()).shape == (2, 4)


@pytest.mark.slow
def test_a_video_of_an_evaluation_is_written(whole, capsys):
    try:
        envs.check_rendering("cartpole-balance")
    except envs.UserError as error:
        pytest.skip(str(error))
    common = {"evaluate": True, "eval_episodes": 1, "agent": BY_POLICY, "capture_video": True}
    shorter = "mw-reach"  # of the two tasks' episodes
    mt.main(as_flags(mt.Args(checkpoint=str(whole[0]), tasks=shorter, **common)))
    video = whole[0] / "videos" / "evaluate.mp4"
    assert f"film: {video}" in capsys.readouterr().out, "in the folder of the agent's run"
    command = [get_ffmpeg_exe(), "-loglevel", "error", "-i", video, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    frames = np.frombuffer(raw, np.uint8).reshape(101, 384, 384, 3)
    assert frames[0].std() > 10 and np.abs(frames[0].astype(int) - frames[90]).mean() > 0.1


@pytest.mark.slow
def test_collected_episodes_come_from_the_online_script(here, tmp_path):
    command = ("--task", "cartpole-balance", "--seed-steps", 1500, "--total-timesteps", 2400, "--checkpoint-freq", 1200)
    status, _, err = here(*command, "--eval-freq", 10_000, "--eval-episodes", 1, "--save-episodes", tmp_path / "data")
    assert status == 0, err
    data = envs.load_dataset(["cartpole-balance"], tmp_path / "data")
    assert data.num_episodes == 2 and len(data.chunks) == 2, "one in each half of the run, the third was not over"
    read = data.read(0, 501)
    assert np.abs(read["action"][1:]).max() <= 1 and read["reward"].sum() > 50
    run = tmp_path / "runs" / "cartpole-balance" / "tdmpc2_jax" / "1"
    returns = [value for _, value in read_scalars(run, "charts/episodic_return")]
    np.testing.assert_allclose(read["reward"].sum(), returns[0], rtol=1e-4)


@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint_in_a_run_of_its_own(whole, data_dir, tmp_path):
    agent = dataclasses.replace(BY_POLICY, **SIZES, batch_size=16, task_dim=8)
    args = mt.Args(tasks=",".join(TASKS), data_dir=str(data_dir), runs_dir=str(tmp_path), num_updates=1, agent=agent)
    mt.main(as_flags(dataclasses.replace(args, checkpoint=str(whole[0]), eval_episodes=1)))
    new, old = (load_multitask(str(folder), (), "tdmpc2_jax_mt").params for folder in (tmp_path / FOLDER, whole[0]))
    fresh = mt.fresh_state(mt.for_tasks(agent, TASKS), random_streams(1)).params
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), new, old)
    assert 0 < max(jax.tree.leaves(moved)) < 1e-3, "one step of Adam"
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), new, fresh))) > 5e-3


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--tasks", "mt31"], ["mt31", "mt30 and mt80"]),
        (["--tasks", "walker-walk,dog-rum"], ["dog-rum", "dog-run"]),
        (["--tasks", "walker-walk,walker_walk"], ["walker-walk", "twice"]),
        (["--tasks", "walker-walk,Hopper-v5"], ["Hopper-v5", "cannot be in a set"]),
        ([], ["--data-dir"]),
        (["--data-dir", "nowhere"], ["nowhere", "chunk_0.pt"]),
        (["--evaluate"], ["--evaluate needs --checkpoint"]),
        (["--evaluate", "--checkpoint", "nowhere"], ["nowhere", "does not exist"]),
        (["--data-dir", "x", "--json", "x.json"], ["--json goes with --evaluate"]),
        (["--data-dir", "x", "--process-id", 1], ["go with --distributed"]),
        (["--data-dir", "x", "--distributed", "--process-id", 1], ["go together"]),
        (["--data-dir", "x", "--readers", 0], ["--readers", "from 1 to"]),
        (["--data-dir", "x", "--distributed", "--evaluate", "--checkpoint", "x.pt"], ["leave out --distributed"]),
        (["--data-dir", "x", "--simnorm-dim", 7], ["--latent-dim must be a multiple of --simnorm-dim"]),
        (["--quantize", "int8", "--output", "x"], ["--quantize, --output", "python deploy.py --checkpoint"]),
        (["--keep_target_q"], ["--keep-target-q", "python deploy.py --checkpoint"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_arguments_that_cannot_work_are_refused_in_one_sentence(refused, flags, words):
    sentence = refused(*flags)
    assert all(word in sentence for word in words), sentence


def test_processes_that_find_no_cluster_are_told_how_to_start(refused, monkeypatch):
    def initialize(*arguments):
        raise ValueError("no cluster")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert "start it under SLURM" in refused("--data-dir", "x", "--distributed")


def test_checkpoints_and_tasks_that_do_not_belong_together_are_refused(refused, golden, whole, data_dir):
    assert "single-task agent" in refused("--evaluate", "--checkpoint", golden("single.pt"))
    assert "an agent of Newt, of" in refused("--evaluate", "--checkpoint", golden("newt.pt"))
    assert "was not trained on dog-run" in refused("--evaluate", "--checkpoint", whole[0], "--tasks", "dog-run")
    assert "does not fit" in refused("--evaluate", "--checkpoint", whole[0], "--mlp-dim", 32)
    names = ("--tasks", "mw-reach,cartpole-balance", "--data-dir", data_dir)
    assert "in another order" in refused(*names, "--checkpoint", whole[0])


def test_what_cannot_fit_into_memory_is_refused_before_anything_is_allocated(refused, data_dir, monkeypatch):
    flags = ("--tasks", ",".join(TASKS), "--data-dir", data_dir, "--model-size", 317)
    sentence = refused(*flags, "--batch-size", 2**20)  # without compiling: XLA divides by zero where there is one core
    assert "GB do not fit into" in sentence and "--batch-size" in sentence
    monkeypatch.setattr(devices, "least_available_bytes", lambda: 4 * 10**9)
    assert "4.00 GB" in refused(*flags), "317M parameters, target values and two moments are 5 GB"


def test_the_largest_model_is_as_large_as_it_is_called_and_says_so(capsys, refused, data_dir, monkeypatch):
    monkeypatch.setattr(devices, "least_available_bytes", lambda: 10**9)
    refused("--tasks", ",".join(TASKS), "--data-dir", data_dir, "--model-size", 317)
    words = capsys.readouterr().out.split()
    parameters, optimiser = (float(words[words.index(name) + 1]) for name in ("parameters", "optimiser"))
    assert 1.9 < parameters < 2.1 and 2.5 < optimiser < 2.6  # 317M numbers of 4 bytes, with target Qs; two moments


@pytest.mark.parametrize("size", mt.MODEL_SIZES)
def test_released_sizes(size):
    """Of the released multi-task agents: mt30's and mt80's embeddings, and the latent size of mt30 at 19M."""
    for name, tasks in envs.TASK_SETS.items():
        agent = mt.with_model_size(mt.Agent(model_size=size), tasks)
        assert agent.task_dim == (64 if name == "mt30" and size in (5, 19, 48) else 96)
        assert agent.latent_dim == (512 if (name, size) == ("mt30", 19) else mt.MODEL_SIZES[size][2])


def test_help_explains_every_argument(here):
    status, out, _ = here("--help", small=False, name="tdmpc2_jax_mt.py")
    assert status == 0
    for name in settings(mt.Args()):
        assert f"--{name.replace('_', '-')}" in out


def test_grids_hold_every_picture():
    pictures = tuple(np.full((384, 384, 3), i, np.uint8) if i % 2 else None for i in range(11))
    picture = grid(pictures)
    assert picture.shape == (192 * 2, 192 * 3, 3), "every other pixel, to be at most 768 wide"
    places = [(100 + 192 * row, 100 + 192 * column) for row in (0, 1) for column in (0, 1, 2)]
    assert [picture[place][0] for place in places] == [1, 3, 5, 7, 9, 0]


def test_pictures_of_several_sizes_stand_side_by_side_each_with_the_room_of_the_largest():
    sizes = (384, 384), (400, 600), (210, 160)
    frames = [[np.full((*size, 3), i + 1, np.uint8)] for i, size in enumerate(sizes)]
    (picture,) = side_by_side(frames)
    height, width = 200, 300  # every other pixel of the largest
    assert picture.shape == (2 * height, 2 * width, 3)
    assert (picture[:192, :192] == 1).all() and not picture[192:height, :192].any()
    assert (picture[:height, width:] == 2).all()
    assert (picture[height : height + 105, :80] == 3).all() and not picture[height:, 80:].any()
