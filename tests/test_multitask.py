"""Multi-task runs as a user sees them: files, kills, devices, processes, evaluation, folding. Real processes are what
is killed, what runs side by side and what others go on from."""

import csv
import dataclasses
import json
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT, SMALL, meta_of, said, with_devices
from imageio_ffmpeg import get_ffmpeg_exe
from test_runs import read_scalars, wait_for

import envs
import tdmpc2_jax_mt as mt
from tdmpc2_support.agents.pretrained import load_multitask
from tdmpc2_support.run.checkpoints import complete_checkpoints, find_checkpoint

SCRIPT = mt
TASKS = ("cartpole-balance", "mw-reach")
FOLDER = "cartpole-balance+mw-reach/tdmpc2_jax_mt/1"
SIZES = {name: 16 for name in ("enc_dim", "mlp_dim", "latent_dim", "num_enc_layers")} | {
    "num_enc_layers": 2,
    "num_q": 2,
}
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


def state_of(folder):
    """All arrays of the last checkpoint's learning state."""
    leaves = jax.tree.leaves(ocp.PyTreeCheckpointer().restore(find_checkpoint(folder).absolute() / "state"))
    is_key = [jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    return [jax.random.key_data(x) if key else x for x, key in zip(leaves, is_key, strict=True)]


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


def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(here, flags, whole, tmp_path):
    folder = tmp_path / "runs" / FOLDER
    for updates in (30, 60):
        flags = (*flags, "--num-updates", updates, "--storage", "disk", "--resume")
        status, _, err = here(*flags, name="tdmpc2_jax_mt.py")
        assert status == 0, err
    for mine, uninterrupted in zip(state_of(folder), state_of(whole[0]), strict=True):
        np.testing.assert_array_equal(mine, uninterrupted)
    assert [step for step, _ in read_scalars(folder, "losses/total_loss")] == list(range(1, 61)), "none twice"


def test_a_signal_ends_the_run_with_a_checkpoint_of_the_last_update(start, flags, tmp_path):
    folder = tmp_path / "runs" / FOLDER
    child = start(*flags, "--num-updates", 1_000_000, name="tdmpc2_jax_mt.py")
    wait_for(lambda: complete_checkpoints(folder), child)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM, err
    updates = meta_of(folder, "tdmpc2_jax_mt")["count"]["updates"]
    assert f"at update {updates}; --resume continues the run" in err


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


def test_two_processes_learn_what_one_learns(start, flags, whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = ("--distributed", "--coordinator", f"127.0.0.1:{port}", "--num-processes", 2)
    children = [start(*flags, *cluster, "--process-id", i, name="tdmpc2_jax_mt.py") for i in range(2)]
    outputs = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert "on 2 x cpu" in outputs[0][0] and "normalized score" not in outputs[1][0]
    folder = tmp_path / "runs" / FOLDER
    for tag, values in losses_of(folder).items():
        np.testing.assert_allclose(values[:20], losses_of(whole[0])[tag][:20], rtol=1e-4, atol=1e-6, err_msg=tag)
    assert meta_of(folder, "tdmpc2_jax_mt")["count"]["updates"] == 60
    assert [row["step"] for row in csv.DictReader((folder / "eval.csv").open())] == ["60", "60"]


DEVICES = """
import jax, numpy as np
from jax.sharding import Mesh
import envs, tdmpc2_jax_mt as mt
args = mt.Args(enc_dim=16, mlp_dim=16, latent_dim=16, num_q=3, task_dim=8, batch_size=16)
tasks = {tasks!r}
data, model = envs.load_dataset(tasks, {data_dir!r}), mt.make_model(args, tasks)

def losses(devices, storage, shard):
    mesh = Mesh(np.array(jax.devices()[:devices]), "devices")
    constants = mt.global_arrays(mt.make_tasks(args, tasks), mt.replicated(mesh))
    chosen = mt.dataclasses.replace(args, shard_params=shard)
    source = mt.batch_shapes(args, model, mesh)
    source = mt.data_shapes(data, args.storage_dtype, mesh) if storage == "device" else source
    program, shapes = mt.compile_train(chosen, model, mesh, constants, source)
    places = jax.tree.map(lambda x: x.sharding, shapes)
    state = jax.jit(lambda: mt.fresh_state(args, model), out_shardings=places)()
    held, rows = mt.to_devices(data, args.storage_dtype, mesh, args.horizon) if storage == "device" else data, []
    for batch, _ in zip(mt.sources(args, held, mesh, 0), range(20)):
        state, info = program(constants, state, batch)
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


def test_eight_devices_learn_what_one_learns_with_data_and_parameters_copied_or_spread(data_dir):
    code = DEVICES.format(tasks=TASKS, data_dir=str(data_dir))
    done = subprocess.run([sys.executable, "-c", code], env=with_devices(8), cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["equal"], done.stderr


def test_an_evaluation_prints_every_task_and_writes_it_to_a_file(whole, tmp_path, capsys):
    path = tmp_path / "results.json"
    args = mt.Args(evaluate=True, checkpoint=str(whole[0]), eval_episodes=2, json=str(path), mpc=False)
    mt.main(said(args))
    lines, results = capsys.readouterr().out.splitlines(), json.loads(path.read_text())
    assert [line.split()[0] for line in lines] == ["task", *TASKS, "normalized"]
    assert list(results["tasks"]) == list(TASKS) and results["domains"].keys() == {"DMControl", "Meta-World"}
    cartpole, reach = results["tasks"].values()
    assert len(cartpole["returns"]) == len(reach["successes"]) == 2
    assert cartpole["success_rate"] is None and cartpole["score"] == pytest.approx(cartpole["mean"] / 10)
    assert reach["score"] == pytest.approx(100 * reach["success_rate"])
    assert results["normalized_score"] == pytest.approx((cartpole["score"] + reach["score"]) / 2)
    assert f"normalized score {results['normalized_score']:.1f} " in lines[-1]

    mt.main(said(dataclasses.replace(args, tasks="mw-reach")))
    assert list(json.loads(path.read_text())["tasks"]) == ["mw-reach"], "a part of what it knows"


def test_a_folded_task_of_an_own_run_acts_as_the_multi_task_agent_does(whole, tmp_path):
    import tdmpc2_jax as td

    path = tmp_path / "results.json"
    common = {"evaluate": True, "checkpoint": str(whole[0]), "eval_episodes": 2, "json": str(path), "mpc": False}
    mt.main(said(mt.Args(tasks="cartpole-balance", **common)))
    many = json.loads(path.read_text())["tasks"]["cartpole-balance"]["returns"]
    td.main(said(td.Args(source_task="cartpole-balance", **common, **SIZES)))
    np.testing.assert_allclose(json.loads(path.read_text())["returns"], many, rtol=1e-3)
    for source, words in ((None, "name its task with --source-task"), ("dog-run", "it knows cartpole-balance, mw-re")):
        with pytest.raises(SystemExit, match=words):
            td.main(said(td.Args(task="cartpole-balance", source_task=source, **common, **SIZES)))


def test_all_tasks_are_planned_for_in_one_call_and_their_episodes_end_by_themselves(whole, monkeypatch):
    calls, act = [], mt.act
    monkeypatch.setattr(mt, "act", lambda *args, **kwargs: calls.append(len(args[4])) or act(*args, **kwargs))
    args = mt.Args(
        checkpoint=str(whole[0]), eval_episodes=2, mpc=True, num_samples=16, num_elites=4, num_pi_trajs=2, iterations=1
    )
    args, model, agent = mt.load_agent(args)
    names, vector = agent.tasks, mt.make_eval_envs(args, agent.tasks, agent.tasks)
    ids, tasks = np.arange(2), mt.make_tasks(args, names)
    stepped, step = [], vector.step
    vector.step = lambda action, active: stepped.append(active.sum()) or step(action, active)
    result = mt.evaluate(args, model, tasks, agent.params, names, ids, vector, seed=3)
    vector.close()
    assert calls == stepped == [4] * 100 + [2] * 400, "Meta-World's episodes have 100 decisions, DMControl's 500"
    assert result.returns.shape == result.successes.shape == (2, 2) and (result.returns > 0).all()


def test_a_video_of_an_evaluation_is_written(whole, capsys):
    try:
        envs.check_rendering("cartpole-balance")
    except envs.UserError as error:
        pytest.skip(str(error))
    common = {"evaluate": True, "eval_episodes": 2, "mpc": False, "capture_video": True}
    mt.main(said(mt.Args(checkpoint=str(whole[0]), tasks="mw-reach", **common)))  # the task with the shorter episodes
    video = whole[0] / "videos" / "evaluate.mp4"
    assert f"film: {video}" in capsys.readouterr().out, "in the folder of the agent's run"
    command = [get_ffmpeg_exe(), "-loglevel", "error", "-i", video, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    frames = np.frombuffer(raw, np.uint8).reshape(101, 384, 384, 3)
    assert frames[0].std() > 10 and np.abs(frames[0].astype(int) - frames[90]).mean() > 0.1


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


def test_training_goes_on_from_a_checkpoint_in_a_run_of_its_own(whole, data_dir, tmp_path):
    sizes = {name: 16 for name in ("enc_dim", "mlp_dim", "latent_dim", "batch_size")} | {"num_q": 2, "task_dim": 8}
    args = mt.Args(tasks=",".join(TASKS), data_dir=str(data_dir), runs_dir=str(tmp_path), num_updates=1, **sizes)
    mt.main(said(dataclasses.replace(args, checkpoint=str(whole[0]), eval_episodes=1, mpc=False)))
    new, old = (load_multitask(str(folder), (), "tdmpc2_jax_mt").params for folder in (tmp_path / FOLDER, whole[0]))
    fresh = mt.fresh_state(args, mt.make_model(args, TASKS)).params
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
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_arguments_that_cannot_work_are_refused_in_one_sentence(refused, flags, words):
    sentence = refused(*flags)
    assert all(word in sentence for word in words), sentence


def test_checkpoints_and_tasks_that_do_not_belong_together_are_refused(refused, golden, whole, data_dir):
    assert "single-task agent" in refused("--evaluate", "--checkpoint", golden("single.pt"))
    assert "was not trained on dog-run" in refused("--evaluate", "--checkpoint", whole[0], "--tasks", "dog-run")
    assert "does not fit" in refused("--evaluate", "--checkpoint", whole[0], "--mlp-dim", 32)
    names = ("--tasks", "mw-reach,cartpole-balance", "--data-dir", data_dir)
    assert "in another order" in refused(*names, "--checkpoint", whole[0])


def test_what_cannot_fit_into_memory_is_refused_before_anything_is_allocated(refused, data_dir, monkeypatch):
    flags = ("--tasks", ",".join(TASKS), "--data-dir", data_dir, "--model-size", 317)
    sentence = refused(*flags, "--batch-size", 2**20)  # 317M parameters take long to count
    assert "GB do not fit into" in sentence and "--batch-size" in sentence
    monkeypatch.setattr(mt, "least_available_bytes", lambda: 4 * 10**9)
    assert "4.00 GB" in refused(*flags), "317M parameters, target values and two moments are 5 GB"


def test_the_largest_model_is_as_large_as_it_is_called_and_says_so(capsys, refused, data_dir, monkeypatch):
    monkeypatch.setattr(mt, "least_available_bytes", lambda: 10**9)
    refused("--tasks", ",".join(TASKS), "--data-dir", data_dir, "--model-size", 317)
    words = capsys.readouterr().out.split()
    parameters, optimiser = (float(words[words.index(name) + 1]) for name in ("parameters", "optimiser"))
    assert 1.9 < parameters < 2.1 and 2.5 < optimiser < 2.6  # 317M numbers of 4 bytes, with target Qs; two moments


@pytest.mark.parametrize("size", mt.MODEL_SIZES)
def test_released_sizes(size):
    """Of the released multi-task agents: mt30's and mt80's embeddings, and the latent size of mt30 at 19M."""
    for name, tasks in envs.TASK_SETS.items():
        args = mt.with_model_size(mt.Args(model_size=size), tasks)
        assert args.task_dim == (64 if name == "mt30" and size in (5, 19, 48) else 96)
        assert args.latent_dim == (512 if (name, size) == ("mt30", 19) else mt.MODEL_SIZES[size][2])


def test_help_explains_every_argument(here):
    status, out, _ = here("--help", small=False, name="tdmpc2_jax_mt.py")
    assert status == 0
    for field in dataclasses.fields(mt.Args):
        assert f"--{field.name.replace('_', '-')}" in out


def test_grids_hold_every_picture():
    pictures = tuple(np.full((384, 384, 3), i, np.uint8) if i % 2 else None for i in range(11))
    grid = mt.grid(pictures)
    assert grid.shape == (192 * 2, 192 * 3, 3), "every other pixel, to be at most 768 wide"
    assert [grid[100 + 192 * row, 100 + 192 * column, 0] for row in (0, 1) for column in (0, 1, 2)] == [
        1,
        3,
        5,
        7,
        9,
        0,
    ]
