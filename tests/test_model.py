"""The model, the planner and the update, as far as the recordings do not show them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tdmpc2_jax as td
from benchmarks.speed import count_products

SMALL = td.Args(
    enc_dim=16, mlp_dim=16, latent_dim=16, num_enc_layers=2, num_q=5, num_samples=32, num_elites=8, num_pi_trajs=4,
    iterations=2, batch_size=8, dropout=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def agent():
    """(model, learning state) of a small agent with 4 observations, 2 actions and a termination head."""
    model = td.make_model(SMALL, 4, 2, episodic=True)
    state = jax.jit(td.fresh_state, static_argnums=(0, 1))(SMALL, model)["train"]
    noise = iter(jax.random.split(jax.random.key(1), 200))
    jitter = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(next(noise), p.shape), state.params)
    return model, state._replace(params=jitter)


@pytest.mark.parametrize("size", td.MODEL_SIZES)
def test_model_sizes_have_the_parameters_they_are_named_after(size):
    args = td.Args(model_size=size)
    model = td.make_model(args, 24, 6, episodic=False)
    params = jax.eval_shape(lambda: td.init_params(args, model, jax.random.key(0)))
    millions = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) / 1e6
    assert 0.9 * size < millions < 1.25 * size


def test_a_fresh_agent_predicts_no_reward_and_no_value():
    model = td.make_model(SMALL, 4, 2, episodic=False)
    params = jax.jit(td.fresh_state, static_argnums=(0, 1))(SMALL, model)["train"].params
    z, action = jnp.ones((7, 16)), jnp.ones((7, 2))
    assert (model.reward.apply(params["reward"], z, action) == 0).all()
    assert (td.q_logits(model, params["q"], z, action) == 0).all()


@pytest.mark.parametrize("length, discount", [(500, 0.99), (100, 0.95), (1000, 0.995), (50, 0.95), (27, 0.95)])
def test_the_discount_follows_from_the_episode_length(length, discount):
    assert td.discount_of(td.Args(), length) == pytest.approx(discount)


def test_large_action_spaces_get_two_more_iterations():
    for action_dim, iterations in ((19, 6), (20, 8)):
        model = td.make_model(td.Args(), 4, action_dim, episodic=False)
        draw = jax.eval_shape(lambda key, model=model: td.plan_noise(td.Args(), model, key, 3), jax.random.key(0))
        noise, heads = draw
        assert heads.shape == (iterations, 2)
        assert noise.sample.shape == (3, iterations, 3, 512 - 24, action_dim)


def test_two_heads_are_different_and_all_pairs_equally_likely(agent):
    pairs = jax.vmap(lambda key: td.two_heads(agent[0], key))(jax.random.split(jax.random.key(0), 8000))
    pairs, counts = np.unique(np.asarray(pairs), axis=0, return_counts=True)
    assert len(pairs) == 20 and (pairs[:, 0] != pairs[:, 1]).all()
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400)


def test_a_plan_for_many_environments_is_the_plan_for_each(agent):
    model, state = agent
    rng = np.random.default_rng(0)
    obs, mean = rng.normal(size=(3, 4)).astype(np.float32), rng.uniform(-1, 1, (3, 3, 2)).astype(np.float32)
    first = np.array([False, True, False])
    noise, heads = td.plan_noise(SMALL, model, jax.random.key(3), 3)
    plan = jax.jit(td.plan, static_argnums=(0, 1, 9))
    action, means = plan(SMALL, model, state.params, obs, mean, first, 0.99, noise, heads, True)
    assert (np.abs(action) <= 1).all() and not np.allclose(action[0], action[2])
    for i in range(3):
        only = td.PlanNoise(*(x[i : i + 1] for x in noise))
        one = slice(i, i + 1)
        alone = plan(SMALL, model, state.params, obs[one], mean[one], first[one], 0.99, only, heads, True)
        np.testing.assert_allclose(alone[0][0], action[i], atol=1e-4)
        np.testing.assert_allclose(alone[1][0], means[i], atol=1e-4)


def test_bfloat16_changes_the_products_only(agent):
    model, state = agent
    half = td.make_model(td.dataclasses.replace(SMALL, compute_dtype="bfloat16"), 4, 2, episodic=True)
    obs, action = jnp.ones((5, 4)), jnp.full((5, 2), 0.5)
    z, z_half = model.encoder.apply(state.params["encoder"], obs), half.encoder.apply(state.params["encoder"], obs)
    assert z_half.dtype == jnp.float32 and not (z == z_half).all()
    np.testing.assert_allclose(z, z_half, atol=0.02)
    logits = td.q_logits(half, state.params["q"], z, action)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(td.q_logits(model, state.params["q"], z, action), logits, atol=0.15)


def test_dropout_keeps_the_mean_and_drops_its_share():
    mask = td.dropout_mask(td.Args(), jax.random.key(0), (1000, 1000))
    assert float((mask == 0).mean()) == pytest.approx(0.01, rel=0.05)
    assert float(mask.mean()) == pytest.approx(1, abs=1e-3)
    assert td.dropout_mask(td.dataclasses.replace(SMALL, dropout=0.0), jax.random.key(0), (3,)) is None


@pytest.mark.parametrize("dropout", [0.01, 0.3, 0.9])
def test_units_drop_independently_of_their_place_and_of_each_other(dropout):
    """Means over many masks lie within 5 standard errors of those of independent draws, at every place."""
    args, masks, units = td.dataclasses.replace(td.Args(), dropout=dropout), 40_000, (2, 30)
    draw = jax.jit(jax.vmap(lambda key: td.dropout_mask(args, key, units).ravel() == 0))
    drops = np.asarray(draw(jax.random.split(jax.random.key(0), masks)), np.float64)
    error = 5 * np.sqrt(dropout * (1 - dropout) / masks)
    np.testing.assert_allclose(drops.mean(0), dropout, atol=error)  # first and last unit like any other
    deviations = (drops - dropout) / np.sqrt(dropout * (1 - dropout))
    correlations = deviations.T @ deviations / masks
    np.testing.assert_allclose(correlations[~np.eye(60, dtype=bool)], 0, atol=5 / np.sqrt(masks))
    assert drops.mean() == pytest.approx(dropout, abs=error / np.sqrt(60))


def test_a_burst_of_updates_is_that_many_single_updates(agent):
    model, state = agent
    rng, replay = np.random.default_rng(0), td.init_replay(50, 1, 4, 2)
    for i in range(40):
        entry = (rng.normal(size=(1, 4)), rng.uniform(-1, 1, (1, 2)), rng.random(1))
        replay = td.add(replay, 3, *(x.astype(np.float32) for x in entry), np.zeros(1, bool), np.array([i == 0]))
    copy = jax.tree.map(jnp.copy, state)
    burst, _ = td.train(SMALL, model, copy, replay, 0.99, num_updates=3)
    single = jax.tree.map(jnp.copy, state)
    for _ in range(3):
        single, _ = td.train(SMALL, model, single, replay, 0.99, num_updates=1)
    assert int(burst.updates) == int(single.updates) == 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), burst.params, single.params)


def test_all_products_of_an_update_are_bfloat16_if_asked_for():
    args = td.dataclasses.replace(SMALL, compute_dtype="bfloat16")
    model = td.make_model(args, 4, 2, episodic=True)
    shapes = jax.eval_shape(lambda: (td.fresh_state(args, model)["train"], td.init_replay(50, 1, 4, 2)))
    products = count_products(td.train.trace(args, model, *shapes, 0.99, num_updates=1).jaxpr)
    assert len(products) > 20
    assert {(product.lhs_dtype, product.rhs_dtype) for product in products} == {("bfloat16", "bfloat16")}
