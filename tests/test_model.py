"""The model, the planner and the update, as far as the recordings do not show them."""

import contextlib
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import jitter

import envs
import newt_jax as newt
import tdmpc2_jax as td
import tdmpc2_jax_mt as mt
import tdmpc2_jax_rgb as rgb
import tdmpc_jax
from benchmarks.timing import count_products
from tdmpc2_support.run.schedule import random_streams

SMALL = td.Agent(
    enc_dim=16, mlp_dim=16, latent_dim=16, num_enc_layers=2, num_q=5, num_samples=32, num_elites=8, num_pi_trajs=4,
    iterations=2, batch_size=8, dropout=0.5, obs_dim=4, action_dim=2, can_terminate=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def state():
    """Learning state of a small agent with 4 observations, 2 actions and a termination head."""
    state = td.fresh_state(SMALL, random_streams(0))["train"]
    return state._replace(params=jitter(state.params, 0.3, 1))


@pytest.mark.parametrize("size", td.MODEL_SIZES)
def test_model_sizes_have_the_parameters_they_are_named_after(size):
    agent = td.with_model_size(td.Agent(model_size=size, obs_dim=24, action_dim=6))
    params = jax.eval_shape(lambda: td.init_params(agent, jax.random.key(0)))
    millions = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) / 1e6
    assert 0.9 * size < millions < 1.25 * size


def test_a_fresh_agent_predicts_no_reward_and_no_value():
    params = td.fresh_state(SMALL, random_streams(0))["train"].params
    z, action = jnp.ones((7, 16)), jnp.ones((7, 2))
    assert (td.networks(SMALL).reward.apply(params["reward"], z, action) == 0).all()
    assert (td.q_logits(SMALL, params["q"], z, action) == 0).all()


@pytest.mark.parametrize("length, discount", [(500, 0.99), (100, 0.95), (1000, 0.995), (50, 0.95), (27, 0.95)])
def test_the_discount_follows_from_the_episode_length(length, discount):
    assert td.discount_of(td.Agent(), length) == pytest.approx(discount)


def test_large_action_spaces_get_two_more_iterations():
    for action_dim, iterations in ((19, 6), (20, 8)):
        agent = td.Agent(obs_dim=4, action_dim=action_dim, num_q=5)
        noise, heads = jax.eval_shape(lambda key, agent=agent: td.plan_noise(agent, key, 3), jax.random.key(0))
        assert heads.shape == (iterations, 2)
        assert noise.sample.shape == (3, iterations, 3, 512 - 24, action_dim)


@pytest.mark.parametrize("script", [td, mt, rgb], ids=lambda script: script.__name__)
def test_simnorm_takes_arrays_without_rows_as_plans_without_a_policys_sequences_have_them(script):
    assert script.simnorm(jnp.ones((0, 16)), 8).shape == (0, 16)
    np.testing.assert_allclose(script.simnorm(jnp.zeros((2, 3, 16)), 8), 1 / 8)


def test_plans_need_no_sequences_of_the_policy(state):
    agent = dataclasses.replace(SMALL, num_pi_trajs=0)
    noise, heads = jax.eval_shape(partial(td.plan_noise, agent, n=2), jax.random.key(0))
    obs, mean, first = jnp.ones((2, 4)), jnp.zeros((2, 3, 2)), jnp.ones(2, bool)
    planned = jax.eval_shape(partial(td.plan, agent, explore=True), state.params, obs, mean, first, noise, heads)
    assert planned[0].shape == (2, 2)


@pytest.mark.parametrize("script", [td, tdmpc_jax], ids=lambda script: script.__name__)
def test_a_return_is_that_of_an_environments_first_episode_whenever_it_ends(script):
    first_version = script is tdmpc_jax
    sizes = {"enc_dim": 8, "mlp_dim": 8, "latent_dim": 8, "obs_dim": 2, "action_dim": 1, "mpc": False}
    agent = script.Agent(**sizes) if first_version else script.Agent(**sizes, num_enc_layers=2, num_q=2)
    params = jax.jit(script.init_params, static_argnums=0)(agent, jax.random.key(0))
    how = (10_000,) if first_version else ()
    n = 8
    with contextlib.closing(envs.make_envs("strange_envs:Falling-v0", n, num_workers=0)) as vector:
        step, seen = vector.step, []
        vector.step = lambda action: seen.append(step(action)) or seen[-1]
        result = script.evaluate(agent, params, *how, vector, jax.random.key(0), 3)
    rewards, ended = np.array([x[1] for x in seen]), np.array([x[2] | x[3] for x in seen])
    last = ended.argmax(0)  # [n] the decision with which the first episode ends
    assert len({*last.tolist()}) > 1 and last.max() + 1 == len(seen), "at different times; no longer than the last"
    expected = [rewards[: end + 1, i].sum() for i, end in enumerate(last)]
    np.testing.assert_allclose(result.returns, expected, rtol=1e-6)
    succeeded = np.array([x[4]["success"] for x in seen])
    np.testing.assert_array_equal(result.successes, [succeeded[end, i] for i, end in enumerate(last)])


@pytest.mark.parametrize("script", [td, rgb, tdmpc_jax, newt], ids=lambda script: script.__name__)
def test_random_actions_fill_the_space_evenly(script):
    n = 4000
    agent = script.Agent(action_dim=2)
    before = (jnp.zeros((n, 1)), jnp.zeros((n, agent.horizon, 2)), jnp.ones(n, bool))
    if script is newt:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "devices")
        tasks = newt.Tasks(jnp.array([[1.0, 1], [1, 0]]), jnp.ones(2), jnp.zeros(2), jnp.arange(n) % 2)
        how = (1.0, jax.random.key(0), "chance", True)
        action = np.array(newt.act(agent, mesh, tasks, {"task_emb": jnp.zeros((2, 0))}, *before, *how)[0])
        assert not action[1::2, 1].any(), "the second task has one action"
        action = action[::2]
    else:
        limits = (None,) if script is tdmpc_jax else ()
        action = np.asarray(script.act(agent, {}, *before, *limits, jax.random.key(0), explore=True, random=True)[0])
    assert np.histogram(action, 8, (-1, 1))[0] == pytest.approx(action.size / 8, rel=0.2)


def test_two_heads_are_different_and_all_pairs_equally_likely():
    pairs = jax.vmap(lambda key: td.two_heads(SMALL, key))(jax.random.split(jax.random.key(0), 8000))
    pairs, counts = np.unique(np.asarray(pairs), axis=0, return_counts=True)
    assert len(pairs) == 20 and (pairs[:, 0] != pairs[:, 1]).all()
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400)


@pytest.mark.parametrize("at_once", [100, 2], ids=["all at once", "two and then one"])
def test_a_plan_for_many_environments_is_the_plan_for_each(state, at_once, monkeypatch):
    monkeypatch.setattr(td, "environments_at_once", lambda agent: at_once)
    rng = np.random.default_rng(0)
    obs, mean = rng.normal(size=(3, 4)).astype(np.float32), rng.uniform(-1, 1, (3, 3, 2)).astype(np.float32)
    first = np.array([False, True, False])
    noise, heads = jax.device_get(jax.jit(td.plan_noise, static_argnums=(0, 2))(SMALL, jax.random.key(3), 3))
    plan = jax.jit(lambda *inputs: td.plan(*inputs), static_argnums=(0, 7))  # not kept with another limit
    action, means = jax.device_get(plan(SMALL, state.params, obs, mean, first, noise, heads, True))
    assert (np.abs(action) <= 1).all() and not np.allclose(action[0], action[2])
    for i in range(3):
        only = td.PlanNoise(*(x[i : i + 1] for x in noise))
        one = slice(i, i + 1)
        alone = jax.device_get(plan(SMALL, state.params, obs[one], mean[one], first[one], only, heads, True))
        np.testing.assert_allclose(alone[0][0], action[i], atol=1e-4)
        np.testing.assert_allclose(alone[1][0], means[i], atol=1e-4)


def test_bfloat16_changes_the_products_only(state):
    half = td.dataclasses.replace(SMALL, compute_dtype="bfloat16")
    obs, action = jnp.ones((5, 4)), jnp.full((5, 2), 0.5)
    z, z_half = (jax.jit(td.networks(a).encoder.apply)(state.params["encoder"], obs) for a in (SMALL, half))
    assert z_half.dtype == jnp.float32 and not (z == z_half).all()
    np.testing.assert_allclose(z, z_half, atol=0.02)
    q_logits = jax.jit(td.q_logits, static_argnums=0)
    logits = q_logits(half, state.params["q"], z, action)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(q_logits(SMALL, state.params["q"], z, action), logits, atol=0.15)


def test_dropout_keeps_the_mean_and_drops_its_share():
    mask = td.dropout_mask(td.Agent(), jax.random.key(0), (1000, 1000))
    assert float((mask == 0).mean()) == pytest.approx(0.01, rel=0.05)
    assert float(mask.mean()) == pytest.approx(1, abs=1e-3)
    assert td.dropout_mask(td.dataclasses.replace(SMALL, dropout=0.0), jax.random.key(0), (3,)) is None


def test_dropout_acts_on_the_first_layer_of_every_value_head(state):
    rng = np.random.default_rng(0)
    z, action = rng.random((2, 7, 16), np.float32), rng.random((2, 7, 2), np.float32)
    factors = jnp.ones((SMALL.num_q, 2, 7, SMALL.mlp_dim)).at[0].set(0.0)
    found = td.q_logits(SMALL, state.params["q"], z, action, factors)
    np.testing.assert_allclose(found[1:], td.q_logits(SMALL, state.params["q"], z, action)[1:], atol=1e-5)
    spread = np.ptp(found, axis=(1, 2)).max(1)
    assert spread[0] < 1e-6 < spread[1], "nothing goes through head 0"


def test_dropout_is_drawn_for_values_and_for_the_policy_each(state):
    noise = td.update_noise(SMALL, jax.random.key(0))
    H, B = SMALL.horizon, SMALL.batch_size
    batch = td.Batch(jnp.ones((H + 1, B, 4)), jnp.ones((H, B, 2)), jnp.ones((H, B)), jnp.zeros((H, B)))
    update = jax.jit(td.update, static_argnums=0)
    losses = [
        update(SMALL, state, batch, noise._replace(**{name: jnp.ones_like(getattr(noise, name))}))[1]
        for name in ("next_action", "dropout", "pi_dropout")  # the first is only another draw
    ]
    same = update(SMALL, state, batch, noise)[1]
    assert losses[1]["value_loss"] != same["value_loss"] and losses[1]["reward_loss"] == same["reward_loss"]
    assert losses[2]["value_loss"] == same["value_loss"] and losses[2]["pi_loss"] != same["pi_loss"]


@pytest.mark.parametrize("dropout", [0.01, 0.3, 0.9])
def test_units_drop_independently_of_their_place_and_of_each_other(dropout):
    """Means over many masks lie within 5 standard errors of those of independent draws, at every place."""
    agent, masks, units = td.Agent(dropout=dropout), 40_000, (2, 30)
    draw = jax.jit(jax.vmap(lambda key: td.dropout_mask(agent, key, units).ravel() == 0))
    drops = np.asarray(draw(jax.random.split(jax.random.key(0), masks)), np.float64)
    error = 5 * np.sqrt(dropout * (1 - dropout) / masks)
    np.testing.assert_allclose(drops.mean(0), dropout, atol=error)  # first and last unit like any other
    deviations = (drops - dropout) / np.sqrt(dropout * (1 - dropout))
    correlations = deviations.T @ deviations / masks
    np.testing.assert_allclose(correlations[~np.eye(60, dtype=bool)], 0, atol=5 / np.sqrt(masks))
    assert drops.mean() == pytest.approx(dropout, abs=error / np.sqrt(60))


def filled_replay():
    """A replay of an episode of 40 random entries."""
    rng, replay = np.random.default_rng(0), td.init_replay(SMALL, 50, 1)
    for i in range(40):
        obs, action, reward = rng.normal(size=(1, 4)), rng.uniform(-1, 1, (1, 2)), rng.random(1)
        numbers = (x.astype(np.float32) for x in (obs, action, reward))
        step = td.Step(*numbers, terminated=np.zeros(1, bool), first=np.array([i == 0]))
        replay = td.add(SMALL, replay, step)
    return replay


@pytest.mark.slow
def test_a_burst_of_updates_is_that_many_single_updates(state):
    replay = filled_replay()
    burst, _ = td.train(SMALL, jax.tree.map(jnp.copy, state), replay, num_updates=3)
    single = jax.tree.map(jnp.copy, state)
    for _ in range(3):
        single, _ = td.train(SMALL, single, replay, num_updates=1)
    assert int(burst.updates) == int(single.updates) == 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), burst.params, single.params)


def test_all_products_of_an_update_are_bfloat16_if_asked_for():
    agent = td.dataclasses.replace(SMALL, compute_dtype="bfloat16")
    shapes = jax.eval_shape(lambda: (td.fresh_state(agent, random_streams(0))["train"], td.init_replay(agent, 50, 1)))
    products = count_products(td.train.trace(agent, *shapes, num_updates=1).jaxpr)
    assert len(products) > 20
    assert {(product.lhs_dtype, product.rhs_dtype) for product in products} == {("bfloat16", "bfloat16")}


def test_no_random_number_is_used_twice():
    """JAX checks it while a program is traced."""

    def learn_and_act(replay):
        streams = random_streams(3)
        learner = td.fresh_state(SMALL, streams)
        state, _ = td.train(SMALL, learner["train"], replay, num_updates=2)
        obs, mean, first = jnp.zeros((2, 4)), jnp.zeros((2, 3, 2)), jnp.ones(2, bool)
        key = learner["act_key"]
        for explore in (True, False):
            *_, key = td.act(SMALL, state.params, obs, mean, first, key, explore=explore)
        return td.act(SMALL, state.params, obs, mean, first, streams.evaluate, explore=False)[0]

    with jax.debug_key_reuse(True):
        assert jax.eval_shape(learn_and_act, td.init_replay(SMALL, 50, 1)).shape == (2, 2)
