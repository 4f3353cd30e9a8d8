"""What pixels change: shifts, the replay of single pictures, both places of it, and runs as a user sees them."""

import contextlib
import dataclasses
import json
import signal
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import AS_USERS_COMPILE, ROOT, SMALL
from helpers import count_of, likelihoods, meta_of, read_curve, read_scalars, terminations, wait_for, write_episodes
from scipy.stats import chisquare

import envs
import tdmpc2_jax as td
import tdmpc2_jax_rgb as rgb
from tdmpc2_support.cli import settings
from tdmpc2_support.convolution import convolve_on_cpu
from tdmpc2_support.devices import shapes_on
from tdmpc2_support.envs import rendering
from tdmpc2_support.run.checkpoints import find_checkpoint, read_checkpoint
from tdmpc2_support.run.schedule import random_streams

H = 3
SCRIPT = rgb
NAME = "tdmpc2_jax_rgb.py"
PIXELS = ("--task", "strange_envs:Pixels-v0", "--eval-freq", 100, "--checkpoint-freq", 100)
FOLDER = "strange_envs:Pixels-v0/tdmpc2_jax_rgb/1"


# ------------------------------------------------------------------------------------------------------------- Shifts
def test_every_shift_is_a_copy_of_pixels_with_the_edge_repeated():
    stack = np.random.default_rng(0).integers(0, 256, (64, 64, 9), dtype=np.uint8)
    shifts = np.stack(np.meshgrid(np.arange(7), np.arange(7)), -1).reshape(-1, 2)
    shifted = jax.vmap(rgb.shift_stack, in_axes=(None, 0))(stack, jnp.asarray(shifts))
    for (x, y), picture in zip(shifts, np.asarray(shifted), strict=True):
        rows, columns = np.clip(np.arange(64) + y - 3, 0, 63), np.clip(np.arange(64) + x - 3, 0, 63)
        np.testing.assert_array_equal(picture, stack[rows][:, columns])


def test_shifts_are_drawn_uniformly_for_every_picture_and_axis():
    agent = rgb.Agent(batch_size=2000, mlp_dim=8, latent_dim=16, num_q=2, dropout=0.0, action_dim=1)
    shift = np.asarray(jax.jit(rgb.update_noise, static_argnums=0)(agent, jax.random.key(0)).shift)
    assert shift.shape == (H + 1, 2000, 2)
    counts = np.stack([(shift == i).sum((0, 1)) for i in range(7)])
    assert counts.sum() == shift.size and (np.abs(counts / 8000 - 1 / 7) < 0.02).all()
    assert (shift[0] != shift[1]).any(-1).mean() > 0.9, "the pictures of a window move independently"
    assert np.ptp(np.asarray(rgb.plan_noise(agent, jax.random.key(0), 50)[0].shift)) == 6


@pytest.mark.parametrize("size, stride, height, channels", [(7, 2, 64, 9), (5, 2, 29, 32), (3, 1, 6, 32), (4, 2, 5, 3)])
def test_convolutions_by_matrix_products_are_xlas_and_so_are_their_gradients(size, stride, height, channels):
    rng, out = np.random.default_rng(0), (height - size) // stride + 1
    shapes = (2, height, height, channels), (size, size, channels, 5), (2, out, out, 5)
    x, kernel, weights = (rng.normal(size=shape).astype(np.float32) for shape in shapes)

    def xlas(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=layout)

    def with_gradients(convolve):
        answer, backward = jax.vjp(convolve, x, kernel)
        return answer, *backward(weights)

    mine, others = jax.jit(
        lambda: (with_gradients(lambda *args: convolve_on_cpu(*args, stride)), with_gradients(xlas))
    )()
    for one, other in zip(mine, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_stacks_are_encoded_alike_however_many_there_are(learner):
    agent, state, _ = learner
    stacks = np.random.default_rng(0).integers(0, 256, (11, 64, 64, 9), dtype=np.uint8)
    shift = jnp.full((11, 2), 1)
    encode = jax.jit(partial(rgb.encode, agent, state.params["encoder"]))
    z = encode(stacks, shift)
    for few in (slice(0, 1), slice(5, 11), slice(2, 10)):
        np.testing.assert_allclose(encode(stacks[few], shift[few]), z[few], atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- Replay
class Named:
    """The script's replay for `write_episodes`, whose observations of three numbers become pictures of one colour."""

    Step = rgb.Step
    init_replay = staticmethod(rgb.init_replay)

    @staticmethod
    def add(agent, replay, step):
        pictures = np.broadcast_to(step.obs[:, None, None].astype(np.uint8), (len(step.obs), 64, 64, 3))
        return rgb.add(agent, replay, step._replace(obs=pictures))


BOTH = pytest.mark.parametrize("way", ["episodes", "windows"])


@partial(jax.jit, static_argnums=0)
def stacked_windows(agent, replay, key):
    return rgb.stack_windows(rgb.sample(agent, replay, key))


def drawn_from(way, seed, *episodes):
    """500 windows from a replay of random episodes (see `write_episodes`), and which windows are valid."""
    agent = rgb.Agent(action_dim=1, batch_size=500, sample=way)
    replay, valid = write_episodes(Named, agent, seed, *episodes)
    return agent, replay, valid, stacked_windows(agent, replay, jax.random.key(seed)) if valid else None


@BOTH
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_stacks_are_those_of_whole_episodes_across_resets_and_the_end_of_the_ring(way, seed):
    rng = np.random.default_rng(seed)
    num_envs, capacity = int(rng.integers(1, 5)), int(rng.integers(10, 40))
    episodes = capacity, num_envs, int(rng.integers(5, 150)), rng.uniform(0.02, 0.4)
    _, replay, valid, batch = drawn_from(way, seed, *episodes)
    if not valid:
        assert int(replay.size) == 0
        return
    assert batch.obs.shape == (H + 1, 500, 64, 64, 9) and batch.obs.dtype == jnp.uint8
    obs = np.asarray(batch.obs)
    np.testing.assert_array_equal(obs, np.broadcast_to(obs[:, :, :1, :1], obs.shape))  # whole pictures
    names = obs[:, :, 0, 0].reshape(H + 1, 500, 3, 3)  # of the three pictures of each stack, oldest first
    newest = names[:, :, 2].astype(int)
    assert {tuple(name) for name in newest[0].tolist()} <= valid
    assert (np.diff(newest, axis=0) == [0, 0, 1]).all(), "entries follow each other in one episode"
    for age in (1, 2):  # the picture before, or the episode's first one again
        expected = newest - [0, 0, age]
        expected[..., 2] = np.maximum(expected[..., 2], 0)
        np.testing.assert_array_equal(names[:, :, 2 - age], expected)
    np.testing.assert_array_equal(np.asarray(batch.action)[..., 0], newest[1:, :, 2])
    np.testing.assert_array_equal(batch.reward, newest[1:, :, 2] * 10)
    names = np.asarray(replay.obs)[:, :, :3] if replay.obs.ndim == 3 else np.asarray(replay.obs)[:, :, 0, 0]
    np.testing.assert_array_equal(batch.terminated, terminations(replay._replace(obs=names), newest[1:]))


@BOTH
def test_windows_are_as_likely_as_they_should_be(way):
    agent = rgb.Agent(action_dim=1, batch_size=500, sample=way)
    replay, valid = write_episodes(Named, agent, 1, 25, 3, 90, 0.15)
    first_names = jax.jit(lambda replay, key: rgb.sample(agent, replay, key).obs[rgb.FRAMES - 1, :, 0, 0])
    names = np.concatenate([first_names(replay, jax.random.key(i)) for i in range(16)])  # of windows' first entries
    drawn = Counter(map(tuple, names.tolist()))
    assert drawn.keys() <= valid
    expected = len(names) * likelihoods(agent, valid)
    assert expected.min() > 5
    assert chisquare([drawn[window] for window in sorted(valid)], expected).pvalue > 1e-3


def test_acting_sees_the_stacks_that_learning_sees():
    rng, first = np.random.default_rng(0), np.ones(2, bool)
    seen, pictures = np.zeros((2, 64, 64, 9), np.uint8), [[], []]
    for _ in range(30):
        obs = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
        seen = rgb.stack_pictures(seen, obs, first)
        for env in range(2):
            pictures[env] = [obs[env]] * 3 if first[env] else [*pictures[env], obs[env]]
            np.testing.assert_array_equal(seen[env], np.concatenate(pictures[env][-3:], -1))
        first = rng.random(2) < 0.2


@pytest.mark.parametrize("num_envs, action_dim", [(1, 1), (16, 6), (1, 38)])
def test_an_entry_takes_little_more_than_its_picture(num_envs, action_dim):
    agent = rgb.Agent(action_dim=action_dim)
    replay = jax.eval_shape(lambda: rgb.init_replay(agent, 1_000_000 // num_envs, num_envs))
    each = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(replay)) / 1_000_000
    assert each <= 12_500, each


@pytest.fixture(scope="module")
def learner():
    """An agent, its fresh learning state, and a replay of a bar that moves, with rewards of where it is."""
    import strange_envs

    sizes = {"mlp_dim": 32, "latent_dim": 128, "num_q": 2, "batch_size": 16}
    quickly = {"lr": 3e-3, "enc_lr_scale": 1.0, "consistency_coef": 2.0, "reward_coef": 1.0}
    agent = rgb.Agent(
        **sizes, **quickly, num_samples=32, num_elites=8, num_pi_trajs=4, iterations=2, action_dim=1, discount=0.9
    )
    env = strange_envs.Pixels()
    replay, rng = rgb.init_replay(agent, 1000, 1), np.random.default_rng(0)
    for step in range(800):
        first, action, reward = step % 20 == 0, rng.uniform(-2, 2, 1).astype(np.float32), 0.0
        if first:
            obs, _ = env.reset(seed=step)
        else:
            obs, reward, *_ = env.step(action)
        step = rgb.Step(obs[None], action[None], np.float32([reward]), np.zeros(1, bool), np.array([first]))
        replay = rgb.add(agent, replay, step)
    return agent, rgb.fresh_state(agent, random_streams(1))["train"], replay


@pytest.mark.slow
def test_batches_from_the_machines_memory_are_learned_from_as_those_of_the_device(learner):
    agent, state, replay = learner

    def learned(source):
        lowered = rgb.train.lower(agent, state, source, num_updates=5)
        return lowered.compile(AS_USERS_COMPILE)(jax.tree.map(jnp.copy, state), source)

    here, info = learned(replay)
    key, drawn = state.key, []
    for _ in range(5):
        key, sample_key, _ = jax.random.split(key, 3)
        drawn.append(rgb.sample(agent, replay, sample_key))
    there, other = learned(jax.tree.map(lambda *batches: jnp.stack(batches), *drawn))
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (here.params, info), (there.params, other))


def test_batches_are_those_of_their_update_whatever_happens_to_the_replay(learner):
    agent, _, replay = learner

    def drawn(replay, updates):
        return rgb.replay_or_batches(rgb.Args(storage="host"), agent, replay, jax.random.key(0), updates, 2)

    mine = jax.tree.map(jnp.copy, replay)
    before = drawn(mine, 7)
    no = np.zeros(1, bool)
    entry = rgb.Step(np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, 1), np.float32), np.zeros(1, np.float32), no, no)
    rgb.add(agent, mine, entry)  # takes the memory of `mine`
    jax.tree.map(np.testing.assert_array_equal, before, drawn(replay, 7))
    assert (before.obs != drawn(replay, 8).obs).any(), "each update has its own"
    assert before.obs.shape[:3] == (2, H + 3, agent.batch_size) and (before.obs[0] != before.obs[1]).any()


@pytest.mark.slow
def test_acting_and_learning_shift_what_they_encode(learner):
    """A shift of 3 leaves a stack as it is, so other shifts of a stack are shifts of 3 of the moved one."""
    agent, state, replay = learner
    batch = rgb.stack_windows(rgb.sample(agent, replay, jax.random.key(0)))
    noise = rgb.update_noise(agent, jax.random.key(1))
    moved = jax.vmap(jax.vmap(rgb.shift_stack))(batch.obs, noise.shift)
    still = noise._replace(shift=jnp.full_like(noise.shift, rgb.SHIFT))
    update = jax.jit(rgb.update, static_argnums=0)
    _, info = update(agent, state, batch, noise)
    _, same = update(agent, state, batch._replace(obs=moved), still)
    _, other = update(agent, state, batch, still)
    assert info["consistency_loss"] == same["consistency_loss"] != other["consistency_loss"]
    obs, mean, first = batch.obs[0, :2], jnp.zeros((2, H, 1)), np.ones(2, bool)
    noise, heads = rgb.plan_noise(agent, jax.random.key(2), 2)
    noise = noise._replace(shift=jnp.array([[0, 6], [5, 1]]))
    still, moved = noise._replace(shift=jnp.full((2, 2), rgb.SHIFT)), jax.vmap(rgb.shift_stack)(obs, noise.shift)
    plan = jax.jit(rgb.plan, static_argnames=("agent", "explore"))
    cases = ((obs, noise), (moved, still), (obs, still))
    plans = (plan(agent, state.params, stacks, mean, first, draws, heads, explore=False) for stacks, draws in cases)
    means = [means for _, means in plans]
    np.testing.assert_array_equal(means[0], means[1])
    assert (means[0] != means[2]).any()


@pytest.mark.slow
def test_the_model_learns_to_tell_rewards_from_pictures(learner):
    agent, state, replay = learner
    state = jax.tree.map(jnp.copy, state)
    for _ in range(20):
        state, info = rgb.train(agent, state, replay, num_updates=5)
    batch = rgb.stack_windows(rgb.sample(dataclasses.replace(agent, batch_size=256), replay, jax.random.key(0)))
    z = rgb.encode(agent, state.params["encoder"], batch.obs[0], jnp.full((256, 2), rgb.SHIFT))
    logits = rgb.networks(agent).reward.apply(state.params["reward"], z, batch.action[0])
    assert np.corrcoef(rgb.two_hot_inv(agent, logits), batch.reward[0])[0, 1] > 0.7, info


@pytest.mark.slow
def test_no_random_number_is_used_twice(learner):
    """JAX checks it while a program is traced and run."""
    agent, state, replay = learner
    with jax.debug_key_reuse(True):
        streams = random_streams(3)
        fresh = rgb.fresh_state(agent, streams)
        rgb.train(agent, fresh["train"], replay, num_updates=2)
        batches = rgb.replay_or_batches(rgb.Args(storage="host"), agent, replay, streams.batches, 7, 2)
        rgb.train(agent, rgb.fresh_state(agent, random_streams(4))["train"], batches, num_updates=2)
        obs, mean, first = jnp.zeros((2, 64, 64, 9), jnp.uint8), jnp.zeros((2, H, 1)), jnp.ones(2, bool)
        key = fresh["act_key"]
        for acts in (agent, dataclasses.replace(agent, mpc=False)):
            for explore in (True, False):
                *_, key = rgb.act(acts, state.params, obs, mean, first, key, explore=explore)
        rgb.act(agent, state.params, obs, mean, first, streams.evaluate, explore=False)


# ------------------------------------------------------------------------------------------------ Pictures and states
BESIDE = ("--task", "strange_envs:PixelsAndNumbers-v0", "--obs", "rgb+state", "--state-keys", "speed,left")


class NamedTwice(Named):
    """The same with the three numbers beside the pictures."""

    @staticmethod
    def add(agent, replay, step):
        pictures = np.broadcast_to(step.obs[:, None, None].astype(np.uint8), (len(step.obs), 64, 64, 3))
        return rgb.add(agent, replay, step._replace(obs={"rgb": pictures, "state": step.obs}))


def test_states_are_those_of_the_newest_pictures_of_their_stacks():
    agent = rgb.Agent(obs="rgb+state", obs_dim=3, action_dim=1, batch_size=500)
    replay, _ = write_episodes(NamedTwice, agent, 0, 25, 3, 90)
    batch = jax.device_get(stacked_windows(agent, replay, jax.random.key(0)))
    assert batch.obs["rgb"].shape == (H + 1, 500, 64, 64, 9) and batch.obs["state"].dtype == jnp.float32
    np.testing.assert_array_equal(batch.obs["state"], batch.obs["rgb"][:, :, 0, 0, 6:])
    assert np.unique(batch.obs["state"][0], axis=0).shape[0] > 10


def test_acting_sees_the_newest_state_beside_a_stack():
    rng, seen, alone = np.random.default_rng(0), None, None
    for first in (np.ones(2, bool), np.array([False, True]), np.zeros(2, bool)):
        obs = {"rgb": rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8), "state": rng.normal(size=(2, 5))}
        seen, alone = rgb.stack_pictures(seen, obs, first), rgb.stack_pictures(alone, obs["rgb"], first)
        np.testing.assert_array_equal(seen["rgb"], alone)
        np.testing.assert_array_equal(seen["state"], obs["state"])


def test_what_the_encoders_of_pictures_and_of_states_have_before_simnorm_is_normalised_and_added():
    """So z is the normalised product of two softmaxes, group by group."""
    sizes = {"mlp_dim": 16, "latent_dim": 16, "num_q": 2, "enc_dim": 8, "num_enc_layers": 2}
    pixels = rgb.Agent(**sizes, action_dim=1)
    both = dataclasses.replace(pixels, obs="rgb+state", obs_dim=4)
    rng = np.random.default_rng(0)
    stack, state = rng.integers(0, 256, (3, 64, 64, 9), dtype=np.uint8), rng.normal(size=(3, 4)).astype(np.float32)
    shift = jnp.full((3, 2), 1)
    params = jax.jit(rgb.init_params, static_argnums=0)(both, jax.random.key(0))["encoder"]
    of_state = {k: params["params"].pop(k) for k in ("state", "state_norm", "picture_norm")}
    encode = jax.jit(rgb.encode, static_argnums=0)
    z = encode(both, {"params": params["params"] | of_state}, {"rgb": stack, "state": state}, shift)
    one_group = dataclasses.replace(pixels, simnorm_dim=16)  # its logarithm is what was before SimNorm, and a constant
    logits = np.log(encode(one_group, params, stack, shift))
    logits = (logits - logits.mean(-1, keepdims=True)) / np.sqrt(logits.var(-1, keepdims=True) + 1e-5)
    of_pictures = jax.jit(td.simnorm, static_argnums=1)(logits, 8)
    mlp = td.MLP((8,), 16, simnorm_dim=8)  # the encoder of states alone, as tdmpc2_jax.py has it
    of_states = jax.jit(mlp.apply)({"params": of_state["state"] | {"norm_1": of_state["state_norm"]}}, state)
    product = np.asarray(of_pictures * of_states).reshape(3, -1, 8)
    np.testing.assert_allclose(z, (product / product.sum(-1, keepdims=True)).reshape(3, 16), atol=1e-5)


@pytest.mark.slow
def test_a_run_sees_pictures_and_parts_of_the_state(here, tmp_path):
    flags = (*BESIDE, "--enc-dim", 8, "--num-envs", 2, "--utd", 0.5, "--no-mpc", "--seed-steps", 20)
    status, out, err = here(*flags, "--total-timesteps", 24, name=NAME)
    assert status == 0, err
    assert "3 pictures of 64 x 64 and 4 numbers" in out
    status, _, err = here(*BESIDE[:2], "--resume", "--total-timesteps", 30, name=NAME, small=False)  # else as it was
    assert status == 0, err
    folder = tmp_path / "runs" / "strange_envs:PixelsAndNumbers-v0" / "tdmpc2_jax_rgb" / "1"
    steps, _ = read_curve(folder)
    assert len(steps) == 3 and steps[0] == 0 and 24 <= steps[1] < 30 <= steps[2] == count_of(folder)["decisions"]
    assert count_of(folder)["updates"] > 20

    # What the run has kept is what its first environments gave: the state, and the picture that belongs to it
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = shapes_on(place, lambda: rgb.init_replay(rgb.Agent(obs="rgb+state", obs_dim=4, action_dim=1), 1500, 2))
    kept = read_checkpoint(find_checkpoint(folder), meta_of(folder, "tdmpc2_jax_rgb"), replay=like)["replay"]
    with contextlib.closing(envs.make_envs(BESIDE[1], 2, obs="rgb+state:speed,left")) as again:
        obs, _ = again.reset(seed=(1, 0, 0))
        for row in range(12):
            obs = again.step(np.asarray(kept.action[row]))[0] if row else obs
            np.testing.assert_array_equal(kept.obs["state"][row], obs["state"])
            np.testing.assert_array_equal(kept.obs["rgb"][row].reshape(obs["rgb"].shape), obs["rgb"])

    flags = ("--evaluate", "--checkpoint", folder, "--eval-episodes", 2, "--capture-video")
    status, out, err = here(*flags, name=NAME, small=False)
    assert status == 0 and out.count("episode ") == 2, err
    assert list(tmp_path.rglob("*.mp4"))


def test_a_run_of_pixels_alone_is_not_resumed_with_states(refused, tmp_path):
    folder = tmp_path / "runs" / "strange_envs:PixelsAndNumbers-v0" / "tdmpc2_jax_rgb" / "1"
    folder.mkdir(parents=True)
    (folder / "eval.csv").write_text("step,reward,success,seed\n0,1,0,1\n")
    (folder / "args.json").write_text('{"buffer_size": 3000}')  # as written before there was a choice
    sentence = refused(*BESIDE, "--buffer-size", 3000, "--resume", "--runs-dir", tmp_path / "runs")
    assert "--resume continues a run as it was started" in sentence and "--obs rgb" in sentence


# --------------------------------------------------------------------------------------------------------------- Runs
@pytest.mark.slow
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on(start, here, tmp_path):
    folder, flags = tmp_path / "runs" / FOLDER, (*PIXELS, "--total-timesteps", 200, "--no-mpc", "--resume")
    child = start(*flags, name=NAME)
    wait_for(lambda: (folder / "checkpoints" / "100").exists(), child)
    wait_for(lambda: any("tmp" in path.name for path in (folder / "checkpoints").iterdir()), child)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert count_of(folder)["decisions"] >= 100
    status, out, err = here(*flags, name=NAME)
    assert status == 0, err
    assert "replay of 3000 decisions: 0.0 GB in the machine's memory" in out and "3 pictures of 64 x 64" in out
    assert read_curve(folder)[0] == [0, 100, 200]
    assert count_of(folder)["decisions"] == 200 and count_of(folder)["updates"] == 199
    assert [step for step, _ in read_scalars(folder, "charts/episodic_return")] == sorted(
        {step for step, _ in read_scalars(folder, "charts/episodic_return")}
    )
    flags = ("--evaluate", "--checkpoint", folder, "--eval-episodes", 2, "--json", "result.json")
    status, out, err = here(*flags, name=NAME, small=False)
    assert status == 0, err
    assert len(json.loads((tmp_path / "result.json").read_text())["returns"]) == 2 and out.count("episode ") == 2


@pytest.mark.slow
def test_equal_seeds_give_equal_runs_bit_for_bit(here, tmp_path):
    def run(name):
        status, _, err = here(*PIXELS, "--total-timesteps", 150, "--no-mpc", "--exp-name", name, name=NAME)
        assert status == 0, err
        folder = tmp_path / "runs" / "strange_envs:Pixels-v0" / name / "1"
        tags = ("losses/total_loss", "losses/pi_loss", "charts/episodic_return")
        return [read_curve(folder)[1]] + [read_scalars(folder, tag) for tag in tags]

    assert run("a") == run("b")


@pytest.mark.slow
def test_an_untrained_agent_is_evaluated_by_its_policy_on_a_cpu(here, monkeypatch):
    plans = []

    def evaluate(agent, *others):
        plans.append(agent.mpc)
        return original(agent, *others)

    original = rgb.evaluate
    monkeypatch.setattr(rgb, "evaluate", evaluate)
    status, _, err = here(*PIXELS, "--total-timesteps", 100, name=NAME)  # the seed phase: nothing is learned
    assert status == 0, err
    assert plans == [False, True], "at steps 0 and 100"


@pytest.mark.slow
def test_several_environments_with_terminations_draw_from_the_machines_memory(here, tmp_path):
    flags = ("--task", "strange_envs:PixelsFalling-v0", "--num-envs", 4, "--utd", 0.5, "--eval-freq", 10_000)
    status, out, err = here(*flags, "--total-timesteps", 200, "--storage", "host", "--no-mpc", name=NAME)
    assert status == 0, err
    folder = tmp_path / "runs" / "strange_envs:PixelsFalling-v0" / "tdmpc2_jax_rgb" / "1"
    meta = meta_of(folder, "tdmpc2_jax_rgb")
    due = 100 + (meta["count"]["decisions"] - 100) * 0.5
    assert due - 4 <= meta["count"]["updates"] <= due
    assert all(value > 0 for _, value in read_scalars(folder, "losses/termination_loss")), "it has a termination head"
    assert "(--storage host)" in out

    # What the run has kept is what the environments gave, though it kept it behind the updates in flight
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = shapes_on(here, lambda: rgb.init_replay(rgb.Agent(action_dim=1), 3000 // 4, 4))
    kept = read_checkpoint(find_checkpoint(folder), meta, replay=like)["replay"]
    with contextlib.closing(envs.make_envs("strange_envs:PixelsFalling-v0", 4, (1, 0), obs="rgb")) as again:
        obs, _ = again.reset(seed=(1, 0, 0))
        over = np.ones(4, bool)
        for row in range(int(kept.rows)):
            np.testing.assert_array_equal(kept.first[row], over)
            if row:
                obs, reward, terminated, truncated, _ = again.step(np.asarray(kept.action[row]))
                np.testing.assert_array_equal(kept.reward[row], reward.astype(np.float32))
                np.testing.assert_array_equal(kept.terminated[row], terminated)
                over = terminated | truncated
            else:
                over = np.zeros(4, bool)
            np.testing.assert_array_equal(kept.obs[row].reshape(obs.shape), obs)
    assert kept.terminated.any() and int(kept.first.sum()) > 4, "of several episodes"


ELSEWHERE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import jax
import tdmpc2_jax_rgb as rgb
from tdmpc2_support.convolution import convolve_on_cpu
rgb.place_replay = lambda *_: jax.devices()[1]
rgb.main()
"""


@pytest.mark.slow
def test_a_replay_lies_on_another_device_than_the_one_that_learns_and_is_resumed_on_that(script, here, tmp_path):
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    flags = (*SMALL[NAME], *PIXELS, "--no-mpc", "--resume")
    status, _, err = script(*flags, "--total-timesteps", 150, name=tmp_path / "elsewhere.py", small=False, devices=2)
    assert status == 0, err
    for steps, storage in ((170, "device"), (200, "host")):  # each where the one before has left it
        status, out, err = here(*flags, "--total-timesteps", steps, "--storage", storage, name=NAME)
        assert status == 0 and f"(--storage {storage})" in out, err
    folder = tmp_path / "runs" / FOLDER
    assert count_of(folder)["updates"] == 199 and read_curve(folder)[0] == [0, 100, 150, 170, 200]


@pytest.mark.slow
def test_a_simulator_is_learned_from(here, tmp_path):
    try:
        envs.check_rendering("mw-reach", "rgb", None)
    except envs.UserError as error:
        pytest.skip(str(error))
    flags = ("--task", "mw-reach", "--num-envs", 2, "--total-timesteps", 240, "--eval-freq", 10_000, "--no-mpc")
    status, out, err = here(*flags, "--no-shadows", "--eval-episodes", 1, name=NAME)
    assert status == 0, err
    folder = tmp_path / "runs" / "mw-reach" / "tdmpc2_jax_rgb" / "1"
    assert read_curve(folder)[0] == [0, 240] and "success" in out


# ---------------------------------------------------------------------------------------------------------- Bad input
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--task", "myo-reach"], ["pixels", "DMControl and Meta-World", "myo-reach"]),
        (["--task", "InvertedPendulum-v5"], ["InvertedPendulum-v5", "64 x 64"]),
        (["--task", "strange_envs:LargePixels-v0"], ["64 x 64"]),
        (["--task", "strange_envs:Pixels-v0", "--no-shadows"], ["--no-shadows", "DMControl"]),
        (["--task", "strange_envs:Pixels-v0", "--latent-dim", 24], ["--latent-dim", "16"]),
        ([*BESIDE, "--state-keys", "left,velocity"], ["no 'velocity'", "it has left, place, speed"]),
        ([*BESIDE, "--state-keys", ""], ["no ''", "it has left, place, speed"]),
        ([*BESIDE, "--obs", "rgb"], ["--state-keys", "--obs rgb+state"]),
        (["--task", "strange_envs:Pixels-v0", "--obs", "rgb+state"], ["no state vector"]),
        (["--task", "strange_envs:PixelsInDict-v0", "--obs", "rgb+state"], ["no state vector"]),
        (
            ["--task", "strange_envs:TwoCameras-v0", "--obs", "rgb+state"],
            ["several pictures", "['left_eye'], ['right_eye']"],
        ),
        (["--task", "InvertedPendulum-v5", "--obs", "rgb+state"], ["InvertedPendulum-v5", "no pictures"]),
        (["--task", "myo-reach", "--obs", "rgb+state"], ["pixels", "DMControl and Meta-World", "myo-reach"]),
        (
            ["--task", "strange_envs:Pixels-v0", "--buffer-size", 10**9],
            ["--buffer-size 1000000000", "GB are free", "enough"],
        ),
        (["--task", "strange_envs:Pixels-v0", "--evaluate", "--checkpoint", "nowhere"], ["does not exist"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:60],
)
def test_arguments_that_cannot_work_are_refused_in_one_sentence(refused, flags, words):
    sentence = refused(*flags)
    assert all(word in sentence for word in words), sentence


def test_agents_of_states_and_of_pixels_are_not_taken_for_each_other(refused, tmp_path, golden):
    pixels = ("--task", "strange_envs:Pixels-v0", "--evaluate", "--checkpoint")
    states = ("--task", "strange_envs:Point-v0", "--evaluate", "--checkpoint")
    assert "one of states, for tdmpc2_jax.py" in refused(*pixels, golden("single.pt"))
    assert "one of pixels, for tdmpc2_jax_rgb.py" in refused(*states, golden("rgb.pt"), script=td)
    for script, flags, other in ((rgb, pixels, "tdmpc2_jax"), (td, states, "tdmpc2_jax_rgb")):
        meta = tmp_path / other / "checkpoints" / "100" / "meta"
        meta.mkdir(parents=True)
        (meta / "metadata").write_text(json.dumps({"script": other, "args": {}}))
        assert f"is a checkpoint of {other}.py" in refused(*flags, tmp_path / other, script=script)
    assert "it has --mlp-dim 24" in refused(*pixels, golden("rgb.pt"))


def test_no_gl_library_is_one_sentence_that_names_the_packages(refused, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(rendering.subprocess, "run", lambda *_, **__: type("Failed", (), {"returncode": 1})())
    assert "apt-get install -y" in refused("--task", "walker-walk")


def test_help_explains_every_argument(here):
    status, out, _ = here("--help", small=False, name=NAME)
    assert status == 0
    assert all(f"--{name.replace('_', '-')}" in out for name in settings(rgb.Args()))
    assert "shadows and reflections" in out
