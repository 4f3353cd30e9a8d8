"""TD-MPC from pixels: the original's encoder and shifts, a replay of single pictures, and runs as a user sees them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL
from helpers import count_of
from recordings import close

import tdmpc_jax as td
from tdmpc2_support.agents import pretrained
from tdmpc2_support.run.schedule import random_streams

SCRIPT, NAME = td, "tdmpc_jax.py"
AGENT = td.Agent(
    obs="rgb",
    num_channels=4,
    latent_dim=10,
    mlp_dim=24,
    batch_size=4,
    lr=1e-3,
    iterations=1,
    horizon=2,
    obs_dim=84 * 84 * 3,
    action_dim=6,
)
update = jax.jit(partial(td.update, AGENT))
RUN = ("--task", "strange_envs:Pixels84-v0", "--obs", "rgb", "--num-channels", 4, "--batch-size", 4, "--no-mpc")


@pytest.mark.golden
def test_pictures_are_shifted_and_encoded_as_recorded(golden):
    recording = golden("tdmpc1_rgb_encoder.npz")
    params, target = pretrained.read_tdmpc(golden("tdmpc1_rgb.pt"), "rgb")
    like = jax.eval_shape(partial(td.init_params, AGENT), jax.random.key(0))
    pretrained.check_shapes(params, like, "tdmpc1_rgb.pt", "the model")
    assert jax.tree.map(jnp.shape, target["encoder"]) == jax.tree.map(jnp.shape, params["encoder"])
    encode = jax.jit(td.encode, static_argnums=0)
    stacks = jnp.asarray(recording["in_obs"].transpose(0, 2, 3, 1))  # [2, 84, 84, 9]
    close(encode(AGENT, params["encoder"], stacks), recording["encode"], 1e-4)
    for i in range(3):
        shifted = jax.vmap(td.shift_stack, in_axes=(0, None))(stacks, jnp.asarray(recording[f"shift{i}"]))
        np.testing.assert_array_equal(shifted.transpose(0, 3, 1, 2), recording[f"shifted{i}"])
        close(encode(AGENT, params["encoder"], shifted), recording[f"encode_shifted{i}"], 1e-4)


def test_the_encoder_has_the_originals_size_and_starts_orthogonal():
    agent = dataclasses.replace(AGENT, num_channels=32, latent_dim=50)
    params = jax.jit(partial(td.init_params, agent))(jax.random.key(0))["encoder"]["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == 72_722
    kernel = params["kernel_1"].reshape(-1, 32)
    np.testing.assert_allclose(kernel.T @ kernel, 2 * np.eye(32), atol=1e-4)


@pytest.mark.parametrize("seed", range(2))
def test_learning_sees_the_stacks_that_acting_saw_across_resets_and_the_end_of_the_ring(seed):
    """Pictures are of one number each; rows that are overwritten are in no stack."""
    rng = np.random.default_rng(seed)
    n, capacity = 2, 12
    add = partial(td.add, AGENT)
    replay = td.init_replay(AGENT, capacity, n)
    seen = None
    history = []
    first = np.ones(n, bool)
    for step in range(3 * capacity):
        numbers = np.array([2 * step, 2 * step + 1], np.uint8)
        obs = np.broadcast_to(numbers[:, None, None, None], (n, 84, 84, 3))
        seen = td.see(AGENT, seen, obs, first)
        zeros = np.zeros(n, np.float32)
        replay = add(replay, td.Step(obs, np.zeros((n, 6), np.float32), zeros, zeros > 0, first))
        history.append(seen[:, 0, 0, ::3])  # [n, 3] numbers of the stack's pictures, oldest first
        first = ~first & (rng.random(n) < 0.2)
    drawn = np.flatnonzero(np.asarray(replay.tree[0]).ravel() > 0)
    assert 0 < len(drawn) == int(replay.size)
    batch = td.stack_windows(AGENT, td.windows(AGENT, replay, jnp.asarray(drawn)))
    stacks = np.asarray(batch.obs)[:, :, 5, 7, ::3]  # [H+1, B, 3]
    newest = stacks[:, :, -1].astype(int)
    for row in range(AGENT.horizon + 1):
        for window in range(len(drawn)):
            step, env = divmod(newest[row, window], 2)
            np.testing.assert_array_equal(stacks[row, window], history[step][env])
    assert (np.diff(newest, axis=0) == 2).all()


@pytest.fixture(scope="module")
def learner():
    """A learning state, and a replay of random pictures."""
    rng = np.random.default_rng(0)
    state = td.fresh_state(AGENT, random_streams(0))["train"]
    replay = td.init_replay(AGENT, 20, 1)
    for step in range(15):
        obs = rng.integers(0, 256, (1, 84, 84, 3), np.uint8)
        action = rng.uniform(-1, 1, (1, 6)).astype(np.float32)
        replay = td.add(
            AGENT, replay, td.Step(obs, action, np.ones(1, np.float32), np.zeros(1, bool), np.array([step == 0]))
        )
    return state, replay


@pytest.mark.slow
def test_batches_from_another_memory_are_learned_from_and_their_priorities_kept(learner):
    state, replay = jax.tree.map(jnp.copy, learner)
    before = np.asarray(replay.tree[0]).ravel()
    key = jax.random.key(3)
    drawn, batches = td.draw_many(AGENT, replay, key, 7, 1)
    batch = td.stack_windows(AGENT, jax.tree.map(lambda x: x[0], batches))
    expected = update(state, batch, td.update_noise(AGENT, jax.random.split(state.key)[1]))
    args = td.Args(agent=AGENT, storage="host")
    state, replay, info = td.learn(args, AGENT, state, replay, key, 7, 1)
    assert int(state.updates) == 1
    close(state.params["encoder"]["params"]["kernel_0"], expected[0].params["encoder"]["params"]["kernel_0"], 1e-4)
    after = np.asarray(replay.tree[0]).ravel()
    changed = np.flatnonzero(before != after)
    assert {*changed} == {*np.asarray(drawn).ravel()}
    np.testing.assert_allclose(
        after[np.asarray(drawn[0])].max(), float(expected[1].max()) ** AGENT.per_alpha, rtol=1e-4
    )


@pytest.mark.slow
def test_all_encoders_see_the_same_shifted_pictures(learner):
    """Shifting what is given and shifting in the update are the same; without the shift it is another update."""
    state, replay = learner
    batch = td.stack_windows(AGENT, td.windows(AGENT, replay, jnp.array([2, 3, 4, 5])))
    noise = td.update_noise(AGENT, jax.random.key(1))
    shifted = batch._replace(obs=jax.vmap(jax.vmap(td.shift_stack))(batch.obs, noise.shift))
    still = noise._replace(shift=jnp.full_like(noise.shift, td.SHIFT))
    losses = [float(update(state, *given)[2]["consistency_loss"]) for given in ((batch, noise), (shifted, still))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(float(update(state, batch, still)[2]["consistency_loss"]), rel=1e-5)


@pytest.mark.slow
def test_a_run_from_pictures_is_resumed_and_evaluated(here, tmp_path):
    flags = (*RUN, "--eval-freq", 1000, "--checkpoint-freq", 60)
    status, out, err = here(*flags, "--total-timesteps", 120, name=NAME)
    assert status == 0 and "3 pictures of 84 x 84" in out, err
    status, out, err = here(*flags, "--total-timesteps", 160, "--resume", name=NAME)
    assert status == 0, err
    folder = tmp_path / "runs" / "strange_envs:Pixels84-v0" / "tdmpc_jax" / "1"
    assert count_of(folder)["decisions"] == 160 and count_of(folder)["updates"] == 159
    status, out, err = here("--evaluate", "--checkpoint", folder, "--eval-episodes", 1, name=NAME, small=False)
    assert status == 0 and "return" in out, err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--task", "myo-reach", "--obs", "rgb"), "pixels as observations exist for DMControl and Meta-World"),
        (("--task", "strange_envs:Pixels-v0", "--obs", "rgb"), "takes pictures of 84 x 84, not 64 x 64"),
        (("--task", "strange_envs:Point-v0", "--obs", "rgb"), "has no pictures of 84 x 84"),
        ((*RUN, "--save-episodes", "data"), "--save-episodes goes with --obs state"),
    ],
)
def test_what_cannot_work_from_pictures_is_refused_in_one_sentence(refused, flags, words):
    assert words in refused(*SMALL[NAME], *flags)


@pytest.mark.golden
def test_agents_of_states_and_of_pictures_are_not_taken_for_each_other(refused, golden):
    flags = ("--task", "cheetah-run", "--evaluate", "--checkpoint")
    assert "it is one for --obs rgb" in refused(*flags, golden("tdmpc1_rgb.pt"))
    assert "it is one for --obs state" in refused(*flags, golden("tdmpc1.pt"), "--obs", "rgb")


def test_pictures_have_the_originals_settings():
    args = td.with_task_defaults(td.Args(task="walker-walk", agent=td.Agent(obs="rgb")))
    agent = args.agent
    assert (agent.batch_size, agent.lr, agent.action_repeat, agent.latent_dim) == (256, 3e-4, 2, 50)
    assert args.total_timesteps == 3_000_000
