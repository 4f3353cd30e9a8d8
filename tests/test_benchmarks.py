"""The benchmarks count what they claim to count and write what they promise; no timings are judged here."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT

import envs
import tdmpc2_jax as td
from benchmarks import distillation, environments, learning, multitask, speed, timing
from tdmpc2_support.agents.pretrained import LoadedAgent
from tdmpc2_support.run.schedule import random_streams

O, A = 5, 3  # noqa: E741
SMALL = {"enc_dim": 24, "mlp_dim": 48, "latent_dim": 32, "num_enc_layers": 2, "num_q": 3, "num_bins": 21}
AGENT = td.Agent(**SMALL, batch_size=16, num_samples=64, num_elites=8, num_pi_trajs=8, obs_dim=O, action_dim=A)


@pytest.fixture(scope="module")
def traced():
    """Jaxprs of one update and of one plan of a small model."""
    shapes = jax.eval_shape(lambda: (td.fresh_state(AGENT, random_streams(0))["train"], td.init_replay(AGENT, 50, 1)))
    obs, prev_mean, first = jnp.zeros((1, O)), jnp.zeros((1, AGENT.horizon, A)), jnp.ones(1, bool)
    update = td.train.trace(AGENT, *shapes, num_updates=2)
    plan = td.act.trace(AGENT, shapes[0].params, obs, prev_mean, first, jax.random.key(0), explore=True)
    return update.jaxpr, plan.jaxpr


def forward(inputs: int, hidden: int, out: int) -> int:
    """Operations per row of an MLP with two hidden layers."""
    return 2 * (inputs * hidden + hidden * hidden + hidden * out)


# operations per row, and those of the hidden and last layers alone
W, Z, K = SMALL["mlp_dim"], SMALL["latent_dim"], SMALL["num_bins"]
ENCODER, ENCODER_FIRST = 2 * (O * SMALL["enc_dim"] + SMALL["enc_dim"] * Z), 2 * O * SMALL["enc_dim"]
DYNAMICS, HEAD, PI = forward(Z + A, W, Z), forward(Z + A, W, K), forward(Z, W, 2 * A)
FROM_Z, FROM_A = 2 * Z * W, 2 * A * W  # first layers' shares


def test_products_of_an_update_agree_with_a_count_by_hand(traced):
    H, B, q = AGENT.horizon, AGENT.batch_size, AGENT.num_q
    target = H * B * (ENCODER + PI + 2 * HEAD)
    # behind a forward pass: the weights' gradients (as much again), and the inputs' but for what needs none
    encoder = B * (3 * ENCODER - ENCODER_FIRST)
    rollout = H * B * (3 * DYNAMICS - FROM_A)
    heads = (1 + q) * H * B * (3 * HEAD - FROM_A)
    policy = (H + 1) * B * (3 * PI - FROM_Z + 2 * (2 * HEAD - FROM_Z))
    counted = timing.total_gflop(timing.count_products(traced[0])) * 1e9
    assert counted == pytest.approx(2 * (target + encoder + rollout + heads + policy), rel=0.02)


def test_products_of_a_plan_agree_with_a_count_by_hand(traced):
    H, N, P = AGENT.horizon, AGENT.num_samples, AGENT.num_pi_trajs
    proposals = P * ((H - 1) * DYNAMICS + H * PI)
    iteration = N * (H * (DYNAMICS + HEAD) + PI + 2 * HEAD - FROM_Z)  # the first dynamics share their z among samples
    counted = timing.total_gflop(timing.count_products(traced[1])) * 1e9
    assert counted == pytest.approx(proposals + AGENT.iterations * iteration, rel=0.02)


def test_products_in_a_loop_of_unknown_length_are_refused():
    def loop(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="while"):
        timing.count_products(jax.make_jaxpr(loop)(jnp.eye(3)).jaxpr)


def test_products_alone_are_those_that_were_counted():
    def program(x):  # 5 products of a scan, and one with a batch axis
        y, _ = jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)
        return jnp.einsum("bij,bjk->bik", y[None], x[None])

    products = timing.count_products(jax.make_jaxpr(program)(jnp.ones((4, 4))).jaxpr)
    assert sorted(products.values()) == [1, 5]
    assert timing.total_gflop(products) * 1e9 == 6 * 2 * 4**3
    shapes = [out.shape for out in timing.products_alone(products)()]
    assert sorted(shapes) == [(1, 4, 4), (4, 4)]


@pytest.fixture
def quick_compilation():
    """Compiles without most optimisations: half the time, for programs that run but a few times."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


SIZES = "model_size=1 enc_dim=16 mlp_dim=16 latent_dim=16 num_enc_layers=1 num_q=2 iterations=1 num_samples=32"
SIZES += " num_elites=4 num_pi_trajs=4 batch_size=8 horizon=2"


def measured(script, *parts, fields=SIZES, **options):
    """Rows of speed.py, measured for a moment in this process: only that all are there means anything."""
    args = speed.Args(
        (script,), parts, (1,), fields=tuple(fields.split()), repeats=1, limit_s=0.1, seconds=0.1, **options
    )
    rows = []
    for part, setting in speed.settings_of(args):
        rows += speed.in_a_process(part, setting, contextlib.nullcontext())
    return {row["call"]: row for row in rows}


@pytest.mark.slow
def test_every_figure_is_measured(quick_compilation):
    rows = measured("tdmpc2_jax", task="cartpole-swingup")
    assert list(rows) == ["update", "plan", "step", "loop step by step"]
    for call in ("update", "plan"):
        for figure in ("ms", "units", "gflop", "gflops_per_s", "of_peak", "compile_s", "products", "draws"):
            assert rows[call][figure] >= 0
        assert rows[call]["gflop"] > 0 and rows[call]["ms"] > 0
        assert sum(rows[call][share] for share in ("products", "draws", "rest")) == pytest.approx(1)
        assert rows[call]["peak_rss_mb"] > 0 and rows[call]["unit_ms"] > 0
    assert rows["update"]["in_a_row_ms"] > 0
    assert rows["step"]["decisions_per_s"] > 0 and rows["loop step by step"]["decisions_per_s"] > 0


TREE = "enc_dim=16 mlp_dim=16 latent_dim=16 iterations=1 num_samples=32 num_elites=4 num_pi_trajs=4 batch_size=8"


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, parts, fields, options, found",
    [
        ("tdmpc2_jax_rgb", ["replay", "calls"], SIZES, {}, {"draw", "add", "update"}),
        ("tdmpc2_jax_rgb", ["pictures"], SIZES, {"tasks": ("cartpole-swingup",)}, {"cartpole-swingup"}),
        ("tdmpc_jax", ["horizons"], TREE, {"horizons": (2,)}, {"plan 2", "plan 2 apart"}),
        ("tdmpc_jax", ["replay"], TREE, {"entries": (1000,)}, {"draw", "flat", "set", "add"}),
        (
            "tdmpc2_jax_diffusion",
            ["calls"],
            f"{SIZES} width=16 future=4 diffusion_batch_size=8",
            {},
            {"update", "plan"},
        ),
        ("tdmpc2_jax_mt", ["calls", "planning"], f"{SIZES} task_dim=8", {}, {"update", "batched", "one by one"}),
        ("tdmpc2_jax_mt", ["tiers"], f"{SIZES} task_dim=8", {"dataset_gb": 0.01}, {"disk", "host", "device"}),
        ("tdmpc2_jax_mt", ["teacher"], f"{SIZES} task_dim=8", {"teacher_size": 1}, {"update with"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*of the 4 files of mt30")
def test_every_part_of_every_script_is_measured(quick_compilation, script, parts, fields, options, found):
    assert found <= set(measured(script, *parts, fields=fields, **options))


def test_a_part_that_no_asked_script_has_is_refused():
    with pytest.raises(SystemExit, match="error: tiers: parts of tdmpc2_jax are calls, loop"):
        speed.settings_of(speed.Args(("tdmpc2_jax",), ("tiers",)))


def test_a_table_has_a_column_for_every_figure_of_any_row():
    lines = timing.table(
        [{"call": "a", "ms": 1234.5}, {"call": "b", "share": 0.25, "unit_ms": 3}], ("unit_ms",)
    ).splitlines()
    assert lines[0].split() == "| call | ms | share |".split()
    assert lines[2].split() == "| a | 1,234 | |".split() and len(set(map(len, lines))) == 1


@pytest.mark.slow
def test_what_is_shown_of_a_plan_is_what_the_planner_looked_at():
    watch = pytest.importorskip("benchmarks.watch")
    params = jax.tree.map(lambda x: x + 0.05, td.init_params(AGENT, jax.random.key(0)))  # heads that are not zero
    obs, mean, first, key = jnp.ones((1, O)), jnp.zeros((1, AGENT.horizon, A)), np.ones(1, bool), jax.random.key(1)
    action, new_mean, rounds = watch.Listener(AGENT, params)(obs, mean, first, key)
    noise, heads = td.plan_noise(AGENT, key, 1)
    plan = jax.jit(td.plan, static_argnums=(0, 7))
    script_action, script_mean = plan(AGENT, params, obs, mean, first, noise, heads, False)
    np.testing.assert_allclose(action, script_action, atol=1e-5)
    np.testing.assert_allclose(new_mean, script_mean, atol=1e-5)
    assert rounds.values.shape == (AGENT.iterations, AGENT.num_samples)
    weights = jax.nn.softmax(AGENT.temperature * rounds.values[-1][rounds.elites])
    elites = rounds.sequences[-1][:, rounds.elites]
    np.testing.assert_allclose(jnp.einsum("e,hea->ha", weights, elites), rounds.mean, atol=1e-4)


def test_memory_growth_is_judged_from_the_first_reading_with_a_full_buffer():
    memory = pytest.importorskip("benchmarks.memory")
    rows = [{"decisions": d, "rss_mb": mb} for d, mb in ((20, 100), (40, 150), (60, 200), (80, 206), (100, 202))]
    assert memory.growth_when_full(rows, buffer_size=50) == pytest.approx(0.03)
    with pytest.raises(SystemExit, match="two reports"):
        memory.growth_when_full(rows, buffer_size=90)


def test_curves_of_several_seeds_and_labels_are_drawn_beside_the_published(tmp_path, capsys):
    plot_curves = pytest.importorskip("benchmarks.plot_curves")
    (tmp_path / "curves").mkdir()
    head = "step,reward,success,seed\n"
    (tmp_path / "curves/walker-walk.csv").write_text(head + "0,1,0,1\n500,3,0,1\n0,3,0,2\n500,9,0,2\n900,9,0,2\n")
    (tmp_path / "curves/walker-walk__5M.csv").write_text(head + "0,1,0,1\n500,900,0,1\n")
    (tmp_path / "curves/mw-push.csv").write_text(head + "0,1,0,1\n500,900,1,1\n")
    (tmp_path / "curves/walker-walk__pixels_5M.csv").write_text(head + "0,1,0,1\n500,80,0,1\n")
    (tmp_path / "scores.csv").write_text(
        "method,task,metric,step,mean,min,max,seeds\ntdmpc2,walker-walk,reward,0,5,1,9,3\nother,walker-walk,reward,0,0,0,0,3\n"
        "tdmpc2,walker-walk,reward,1000,960,950,970,3\ntdmpc2,mw-push,success,0,0,0,0,3\n"
    )
    curves = plot_curves.read_curves(tmp_path / "curves")
    panels = {panel: list(labels) for panel, labels in plot_curves.by_panel(curves).items()}
    pixels = {("walker-walk", True): ["pixels 5M"]}
    assert panels == {("mw-push", False): [""], ("walker-walk", False): ["", "5M"]} | pixels
    steps, values = plot_curves.shared_steps(plot_curves.by_seed(curves["walker-walk"][""], "reward"))
    assert steps.tolist() == [0, 500] and values.tolist() == [[1, 3], [3, 9]]  # 900 was reached by one seed only
    late = {
        "1": (np.array([0, 10_002, 100_001]), np.arange(3)),
        "2": (np.array([0, 10_000, 100_003]), np.arange(3) + 5),
    }
    steps, values = plot_curves.shared_steps(late)
    assert steps.tolist() == [0, 10_000, 100_000] and values.tolist() == [[0, 1, 2], [5, 6, 7]]
    often = {"1": (np.array([0, 500, 900]), np.array([0, 5, 9])), "2": (np.array([0, 1000]), np.array([0, 20]))}
    steps, values = plot_curves.shared_steps(often)
    assert steps.tolist() == [0, 500, 900] and values.tolist() == [[0, 5, 9], [0, 10, 18]], "none evaluated it at 500"
    picture, reference = tmp_path / "curves.png", str(tmp_path / "scores.csv")
    plot_curves.main(plot_curves.Args(str(tmp_path / "curves"), str(picture), reference))
    assert picture.stat().st_size > 10_000
    table = capsys.readouterr().out
    assert (
        "| walker-walk |  | 2 | 500 | return 6.0 (3.0 to 9.0) | 4.0 (2.0 to 6.0) | 960 (950 to 970) at 1,000 |" in table
    )
    assert "| mw-push |  | 1 | 500 | success 1.00 | 0.50 |  |" in table


def test_environments_are_stepped_with_and_without_workers_and_beside_dm_controls(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environments, "ROUND", 0.05)
    path = tmp_path / "envs.json"
    tasks = {"tasks": ("cartpole-swingup",), "stock": ("cartpole-swingup",), "started": ("cartpole-swingup",)}
    started = {"started_envs": (2,), "against": str(ROOT)}
    environments.main(environments.Args(**tasks, **started, num_envs=2, workers=(0, 2), rounds=1, json=str(path)))
    results = json.loads(path.read_text())
    assert all(min(figures) > 0 for figures in results["workers"]["cartpole-swingup"].values())
    assert list(results["workers"]["cartpole-swingup"]) == ["0", "2"] and len(results["stock"]["cartpole-swingup"]) == 2
    ours, other = results["start"]["cartpole-swingup x 2"]
    assert min(*ours, *other) > 0 and 10 < ours[2] < 1000  # MB
    assert capsys.readouterr().out.count("| cartpole-swingup |") == 3


@pytest.mark.filterwarnings("ignore:.*of the 4 files of mt30")
def test_the_synthetic_dataset_is_one_of_mt30_of_the_size_asked_for(tmp_path):
    speed.write_dataset(tmp_path, 1.02e-2)
    data = envs.load_dataset("mt30", tmp_path)
    assert data.nbytes == pytest.approx(1.02e7, rel=0.01) and len(data.chunks) == 1
    assert set(data.read(0, data.num_entries)["task"]) == set(range(30))


def test_rates_count_what_was_done_in_the_time(monkeypatch):
    clock = [100.0]  # each call takes a quarter of a second of it
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    calls = []

    def step():
        calls.append(1)
        clock[0] += 0.25

    assert timing.per_second(step, 3) == 4
    assert len(calls) == 2 + 13, "two to warm up, then until the three seconds are over"


def test_a_finished_stage_of_the_multi_task_benchmark_is_not_run_again(tmp_path):
    (tmp_path / "agent.json").write_text('{"mean": 3.0}')
    assert multitask.evaluation(tmp_path, "no such script", "agent", 1) == {"mean": 3.0}
    (tmp_path / "eval.csv").write_text("step,reward,success,seed\n0,1.5,0.0,1\n100,2.5,0.0,1\n")
    assert multitask.curve(tmp_path) == [[0, 1.5], [100, 2.5]]


def test_a_suites_curves_are_those_of_its_runs_one_seed_below_the_other(tmp_path):
    rows = [learning.Row("walker-walk", (1, 2), label="twice"), learning.Row("dog-run")]
    args = learning.Args("cpu", folder=tmp_path / "runs", curves=tmp_path / "curves", jobs=0)
    for seed in (1, 2):
        folder = learning.folder_of(args, rows[0], seed)
        folder.mkdir(parents=True)
        (folder / "eval.csv").write_text(f"step,reward,success,seed\n0,{seed}.5,0.0,{seed}\n")
    learning.collect(args, rows)
    curve = args.curves / "walker-walk__twice.csv"
    assert curve.read_text() == "step,reward,success,seed\n0,1.5,0.0,1\n0,2.5,0.0,2\n"
    assert list(args.curves.iterdir()) == [curve], "what has not begun has no curve"


def test_curves_of_several_machines_add_up(tmp_path):
    args = learning.Args("cpu", folder=tmp_path / "runs", curves=tmp_path)
    row = learning.Row("walker-walk", (1, 2, 3))
    curve = tmp_path / "walker-walk.csv"
    curve.write_text("step,reward,success,seed\n0,1.5,0.0,1\n0,9.5,0.0,2\n500,9.5,0.0,2\n0,4.5,0.0,10\n")
    for seed in (2, 3):
        learning.folder_of(args, row, seed).mkdir(parents=True)
    (learning.folder_of(args, row, 2) / "eval.csv").write_text("step,reward,success,seed\n0,2.5,0.0,2\n")
    (learning.folder_of(args, row, 3) / "eval.csv").write_text("step,reward,success,seed\n")  # just begun
    for _ in range(2):
        learning.collect(args, [row])
        assert curve.read_text() == "step,reward,success,seed\n0,1.5,0.0,1\n0,2.5,0.0,2\n0,4.5,0.0,10\n"


def test_runs_of_other_settings_have_folders_of_their_own():
    args, settings = learning.Args("cpu"), {}
    for flags, rows in learning.SUITES.values():
        for row in rows:
            folder = learning.folder_of(args, row, 1)
            assert settings.setdefault(folder, (flags, row.flags)) == (flags, row.flags), folder


def test_reward_errors_are_those_of_the_entries_after_the_first_of_each_episode(tmp_path, monkeypatch):
    tasks = ("cartpole-balance", "pendulum-swingup")
    for i, task in enumerate(tasks):
        obs, action = np.random.default_rng(i).normal(size=(2, 3, 9, 5)).astype(np.float32)
        row = envs.TASKS[task]
        obs, action, reward = obs[..., : row.obs_size], action[..., : row.action_size], np.full((3, 9), np.nan, "f4")
        reward[:, 1:] = obs[:, :-1, 0] + action[:, 1:, 0] + i * np.array([1, -1] * 4)
        action[:, 0] = np.nan
        (tmp_path / task).mkdir()
        tensors = {"obs": obs, "action": action, "reward": reward, "task": np.zeros((3, 9), np.int64)}
        envs.save_tensordict(tmp_path / task / "chunk_0.pt", tensors)
    monkeypatch.setattr(distillation.mt, "load_agent", lambda args: (None, LoadedAgent({}, {})))
    monkeypatch.setattr(
        distillation.mt, "predict_reward", lambda agent, params, obs, action, task: obs[:, 0] + action[:, 0]
    )
    found = distillation.reward_errors(tmp_path / "run", envs.load_dataset(tasks, tmp_path))
    assert found == pytest.approx({"cartpole-balance": 0, "pendulum-swingup": 1, "all": 0.5**0.5}, abs=1e-6)


def test_smooth_random_actions_are_collected_as_whole_episodes(tmp_path):
    distillation.collect(tmp_path, "pendulum-swingup", 2, seed=3)
    data = envs.load_dataset(["pendulum-swingup"], tmp_path)
    read = data.read(0, data.num_entries)
    assert data.num_episodes == 2 and data.num_entries == 1002 and np.abs(read["action"]).max() <= 1
    change = np.abs(np.diff(read["action"][1:501, 0])).mean()
    assert 0 < change < 0.9 * np.abs(np.subtract.outer(*2 * [read["action"][1:501, 0]])).mean(), "smoother than noise"
