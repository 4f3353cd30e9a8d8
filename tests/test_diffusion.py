"""Latent diffusion MPC: schedule, sampler, losses and planner, and runs on recorded episodes as a user sees them."""

import csv
import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from diffusion_helpers import (
    OBS,
    SMALL,
    TINY,
    A,
    F,
    Z,
    cartpole_episodes,
    changed,
    encode,
    make_planner,
    make_windows,
    one,
    policy_mean,
    static,
)
from helpers import jitter, meta_of

import envs
import tdmpc2_jax as td
import tdmpc2_jax_diffusion as diffusion
import tdmpc2_jax_rgb as rgb
from benchmarks import diffusion as benchmark
from tdmpc2_support.cli import settings
from tdmpc2_support.data import recorded as recorded_data
from tdmpc2_support.data.recorded import read_recorded, windows_at
from tdmpc2_support.run.checkpoints import (
    complete_checkpoints,
    find_checkpoint,
    read_agent,
    read_meta,
    write_checkpoint,
)
from tdmpc2_support.run.planner_table import table_rows
from tdmpc2_support.run.schedule import random_streams

SCRIPT = diffusion


# ------------------------------------------------------------------------------------------- Schedule and sampler
def test_the_schedule_is_the_cosine_one():
    abar = diffusion.signal_powers()
    for k, power in ((0, 0.9999), (500, 0.4921), (900, 0.02361), (961, 0.003502), (999, 2.4e-10)):
        assert abar[k] == pytest.approx(power, rel=0.03 if k == 999 else 1e-3)
    assert (np.diff(abar) < 0).all()


MOMENTS = {  # sampling steps: std of N(0, 1); mean and std of N(.5, .3); mass of modes at +-.7 between them
    1: (0.000, 0.500, 0.000, 1.000),
    2: (0.500, 0.500, 0.082, 0.573),
    8: (0.856, 0.501, 0.222, 0.024),
    32: (0.962, 0.501, 0.278, 0.001),
}


def exact(x, k):
    """Answers of exact denoisers for rows of samples of N(0, 1), N(.5, .3) and two modes at +-.7 with std .1."""
    abar = jnp.asarray(diffusion.signal_powers(), jnp.float32)[k.astype(int)]

    def gauss(x, mean, std):
        return mean + jnp.sqrt(abar) * std**2 / (abar * std**2 + 1 - abar) * (x - jnp.sqrt(abar) * mean)

    up = jax.nn.sigmoid(2 * jnp.sqrt(abar) * 0.7 * x[2] / (abar * 0.1**2 + 1 - abar))
    modes = up * gauss(x[2], 0.7, 0.1) + (1 - up) * gauss(x[2], -0.7, 0.1)
    return jnp.stack([gauss(x[0], 0.0, 1.0), gauss(x[1], 0.5, 0.3), modes])


@pytest.mark.parametrize("steps", MOMENTS)
def test_samples_of_exact_denoisers_have_the_moments_that_this_many_steps_leave(steps):
    sample = jax.jit(lambda key: diffusion.sample_ddim(exact, key, (3, 20_000), steps, 10.0))
    x = np.asarray(sample(jax.random.key(0)))
    assert np.isfinite(x).all()
    unit, mean, std, between = MOMENTS[steps]
    assert x[0].std() == pytest.approx(unit, abs=0.02)
    assert (x[1].mean(), x[1].std()) == pytest.approx((mean, std), abs=0.02)
    assert (np.abs(x[2]) < 0.35).mean() == pytest.approx(between, abs=0.02)
    assert (x[2] > 0).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("steps", [1, 8, 32])
def test_a_denoiser_that_knows_the_answer_is_answered_with_it(steps):
    """With any other power than 1 behind the last level, noise would come out."""
    truth = np.linspace(-0.9, 0.9, 24).reshape(4, 6)
    sample = jax.jit(lambda key: diffusion.sample_ddim(lambda x, k: truth, key, (4, 6), steps, 10.0))
    np.testing.assert_allclose(sample(jax.random.key(0)), truth, atol=1e-5)


@pytest.mark.slow
def test_a_denoiser_learns_a_linear_gaussian_future():
    """Mean and spread of the samples, at every step, against the truth."""
    net = diffusion.Denoiser(2, diffusion.Transformer(32, blocks=1, heads=2, dtype="float32"))
    mix = jnp.asarray(np.random.default_rng(0).normal(size=(F, 3, 2)) * 0.5, jnp.float32)
    tx = optax.adam(optax.cosine_decay_schedule(5e-3, 400))

    def loss(params, key):
        keys = jax.random.split(key, 3)
        z = jax.random.normal(keys[0], (128, 3))
        x0 = jnp.einsum("bz,fzo->bfo", z, mix) + 0.6 * jax.random.normal(keys[1], (128, F, 2))
        each = lambda z, x0, key: diffusion.denoising_loss(lambda x, k: net.apply(params, z, x, k), x0, key)  # noqa: E731
        return jax.vmap(each)(z, x0, jax.random.split(keys[2], 128)).mean()

    def step(carry, key):
        params, opt = carry
        change, opt = tx.update(jax.grad(loss)(params, key), opt)
        return (optax.apply_updates(params, change), opt), None

    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros(3), jnp.zeros((F, 2)), 0)
    keys = jax.random.split(jax.random.key(1), 400)
    params = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), keys)[0][0])(params)
    z = jax.random.normal(jax.random.key(2), (16, 3))
    denoise = lambda x, k: jax.vmap(jax.vmap(lambda z, x: net.apply(params, z, x, k), (None, 0)))(z, x)  # noqa: E731
    draw = jax.jit(lambda key: diffusion.sample_ddim(denoise, key, (16, 200, F, 2), 10, 6.0))
    x, mean = draw(jax.random.key(3)), jnp.einsum("bz,fzo->bfo", z, mix)
    errors = ((x.mean(1) - mean) ** 2).mean((0, 2)) / (mean**2).mean((0, 2))
    assert (errors < 0.05).all(), errors
    ratio = x.std(1).mean((0, 2)) / 0.6
    assert ((ratio > 0.75) & (ratio < 1.1)).all(), ratio  # exact denoisers leave about 0.83


# ----------------------------------------------------------------------------------------------------------- Windows
@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Episodes as they are read, with observations where latent states will be; and their folder."""
    folder = tmp_path_factory.mktemp("recorded")
    cartpole_episodes(folder)
    return read_recorded(["cartpole-swingup"], folder, F, Z), folder


def test_actions_and_rewards_of_a_window_lead_from_one_latent_state_to_the_next(recorded):
    data, _ = recorded
    windows = windows_at(data, data.starts, F)
    assert all(np.isfinite(x).all() for x in windows), "filler is never read"
    obs, action, reward = windows.z, windows.action, windows.reward
    assert obs.shape[1:] == (F + 1, OBS) and action.shape[1:] == (F, 1)
    np.testing.assert_allclose(reward, 2 * obs[:, :-1, 0] + action[..., 0], atol=1e-5)
    np.testing.assert_allclose(obs[:, 1:, :4], 0.9 * obs[:, :-1, :4] + 0.1 * action, atol=1e-5)
    assert (obs[..., 4] == obs[:, :1, 4]).all(), "no window crosses from one episode to another"
    assert len(data.starts) + len(data.held_out) == 12 * (40 - F), "all windows that there are"
    episodes = [{*np.asarray(data.obs[starts, 4])} for starts in (data.starts, data.held_out)]
    assert episodes == [{*range(12)} - {5}, {5}], "one episode is held out"


def test_latent_states_are_those_of_the_observations(recorded):
    data, folder = recorded
    world = make_planner()[0].world
    args = diffusion.Args(task="cartpole-swingup", data_dir=str(folder))
    encoded = diffusion.encoded(args, SMALL, world).obs
    np.testing.assert_allclose(encoded, encode(world.params["encoder"], data.obs), atol=1e-6)


# -------------------------------------------------------------------------------------------- What p_d diffuses, and y
def test_what_d_leaves_open_put_back_is_the_true_future(monkeypatch):
    world, windows = make_planner()[0].world, make_windows(8)
    stats = diffusion.statistics(SMALL, world, windows)
    assert (stats.std >= 1e-2).all() and (stats.sigma >= 0.02).all()
    window, key = one(windows), jax.random.key(0)
    monkeypatch.setattr(diffusion, "LATENT_CLIP", 1e6)
    for scale, steps in enumerate((1, 4)):

        def exactly(window, scale=scale, steps=steps):
            rest = diffusion.left_open(SMALL, world, stats, window, steps)
            x0 = (rest - stats.mu[scale]) / stats.sigma[scale]
            monkeypatch.setattr(diffusion.Denoiser, "apply", lambda *x, **options: x0)
            planner = diffusion.Planner({"dynamics": None}, stats, world)
            return diffusion.rollout(SMALL, planner, window.z[0], window.action[None, : F * steps], key, scale)[0]

        np.testing.assert_allclose(jax.jit(exactly)(window), window.z[: F * steps + 1 : steps], atol=1e-5)
        monkeypatch.undo()
        monkeypatch.setattr(diffusion, "LATENT_CLIP", 1e6)


roll_out = jax.jit(diffusion.rollout, static_argnums=(0, 5))


def test_a_network_that_answers_zero_leaves_the_one_step_roll_out():
    planner, _ = make_planner()
    stats = planner.stats._replace(mu=jnp.zeros_like(planner.stats.mu))
    planner = planner._replace(nets=jax.tree.map(jnp.zeros_like, planner.nets), stats=stats)
    actions, z, key = make_windows(5).action, make_windows(1).z[0, 0], jax.random.key(0)
    step = jax.jit(td.networks(SMALL).dynamics.apply)
    for scale, steps in enumerate((1, 4)):
        zs = roll_out(SMALL, planner, z, actions[:, : F * steps], key, scale)
        onestep = roll_out(changed(rollouts="onestep"), planner, z, actions[:, : F * steps], key, scale)
        np.testing.assert_allclose(zs, onestep, atol=1e-5)
        np.testing.assert_allclose(np.reshape(zs, (-1, 2, 8)).sum(-1), 1, atol=1e-5)
        state = z
        for action in actions[2, :steps]:
            state = step(planner.world.params["dynamics"], state, action)
        np.testing.assert_allclose(np.asarray(zs)[2, 1], state, atol=1e-5)
    far = np.random.default_rng(0).normal(0, 5, (7, Z)).astype(np.float32)
    other = np.asarray(static(diffusion.denormalise)(SMALL, stats, far))
    assert (other > 0).all()
    np.testing.assert_allclose(other.reshape(-1, 2, 8).sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("ends", [0.0, 1.0])
def test_the_advantage_is_that_of_a_plain_loop_with_the_target_values(ends):
    world, window = make_planner()[0].world, one(make_windows(1))
    window.terminated[F - 1] = ends

    @jax.jit
    def v(z):
        mean = td.policy(SMALL, world.params["pi"], z, jnp.zeros(A)).mean
        heads = [one(world.target_q, i) for i in range(2)]
        return sum(td.two_hot_inv(SMALL, td.networks(SMALL).q.apply(p, z, mean)) for p in heads) / 2

    y = sum(0.9**i * float(window.reward[i]) for i in range(F)) + 0.9**F * (1 - ends) * float(v(window.z[F]))
    found = static(diffusion.advantage)(SMALL, world, window)
    assert float(found) == pytest.approx(y - float(v(window.z[0])), abs=1e-4)


def test_the_models_score_is_that_of_a_plain_loop_and_ends_where_an_end_is_predicted():
    world = make_planner()[0].world
    zs, actions = make_windows(3).z[:, : F + 1], make_windows(3).action[:, :F]
    terminating = changed(can_terminate=True)
    net = td.networks(terminating).termination
    logit = jax.jit(net.apply)
    head = jitter(jax.jit(net.init)(jax.random.key(0), zs[0, 0]), 1.0)
    fourth = np.sort(np.ravel(logit(head, zs[:, 1:])))[-4]
    head["params"]["linear_2"]["bias"] -= fourth  # three of twelve are ends
    episodic = world._replace(params=world.params | {"termination": head})
    reward = jax.jit(lambda z, a: td.two_hot_inv(SMALL, td.networks(SMALL).reward.apply(world.params["reward"], z, a)))
    value, logits = static(diffusion.value), np.asarray(logit(head, zs))[..., 0]
    plain, ending = [], []
    for z, action, logit in zip(zs, actions, logits, strict=True):
        values = [float(reward(*pair)) for pair in zip(z[:-1], action, strict=True)]
        values.append(float(value(SMALL, world, z[F])))
        alive = np.append(1, np.cumprod(logit[1:] <= 0))
        plain.append(sum(0.9**i * r for i, r in enumerate(values)))
        ending.append(sum(0.9**i * alive[i] * r for i, r in enumerate(values)))
    assert not np.allclose(plain, ending)
    score = static(diffusion.score_by_model)
    np.testing.assert_allclose(score(SMALL, world, zs, actions), plain, atol=1e-4)
    np.testing.assert_allclose(score(terminating, episodic, zs, actions), ending, atol=1e-4)


score_by_objective = static(diffusion.score_by_objective)


def test_js_score_is_in_the_unit_of_rewards():
    planner, windows = make_planner()[0], make_windows(3)

    def score(stats):
        zs, actions = windows.z[:, : F + 1], windows.action[:, :F]
        return score_by_objective(SMALL, planner._replace(stats=stats), zs, actions)

    stats = planner.stats._replace(adv_mean=jnp.float32(0), adv_std=jnp.float32(1))
    moved = stats._replace(adv_mean=jnp.float32(3), adv_std=jnp.float32(2))
    np.testing.assert_allclose(score(moved), 3 + 2 * score(stats), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- Masks
candidates_at = static(diffusion.candidates_at)


def test_actions_that_the_task_lacks_are_zero_and_without_effect():
    planner, state = make_planner()
    world = planner.world._replace(mask=jnp.array([1.0, 0.0]))
    z, key = make_windows(1).z[0, 0], jax.random.key(0)
    best = np.zeros((F, A), np.float32)
    candidates = np.asarray(candidates_at(SMALL, planner._replace(world=world), z, best, np.array(False), key))
    assert (candidates[..., 1] == 0).all() and (candidates[:-1, :, 0] != 0).any()
    window, loss = one(make_windows(1)), static(diffusion.proposal_loss)
    other = window._replace(action=window.action * np.float32([1, 0]) + np.float32([0, 0.7]))
    losses = [loss(SMALL, state.params, state.stats, world, w, key) for w in (window, other)]
    assert losses[0] == losses[1] != 0
    apply = diffusion.diffusion_networks(SMALL)["proposal"].apply

    @jax.jit
    def errors_of(window):
        denoise = partial(apply, state.params["proposal"], diffusion.normalise(state.stats, window.z[0]))
        return diffusion.denoising_loss(denoise, window.action[:F], key, world.mask)

    errors = np.asarray(errors_of(window))
    assert float(losses[0]) == pytest.approx(float(errors[:, 0].mean()), rel=1e-5), "divided by the real actions"


def test_slots_of_a_chunk_beyond_its_scale_are_without_effect():
    actions = make_windows(1).action[0]
    chunks = jax.jit(diffusion.chunks, static_argnums=(0, 2))
    fine, coarse = (np.asarray(chunks(SMALL, actions, scale)) for scale in (1, 4))
    assert fine.shape == coarse.shape == (F, 4 * (A + 1))
    np.testing.assert_array_equal(coarse[1], [*actions[4:8].ravel(), 1, 1, 1, 1])
    np.testing.assert_array_equal(fine[2], [*actions[2], *np.zeros(3 * A), 1, 0, 0, 0])
    np.testing.assert_array_equal(chunks(SMALL, actions[:F], 1), fine)
    np.testing.assert_array_equal(chunks(changed(scales="1"), actions[:F], 1), actions[:F])


# --------------------------------------------------------------------------------------------------------- Networks
@pytest.mark.parametrize(
    "width, blocks, future, sizes",
    [(64, 2, 8, (160_512, 144_001, 110_721)), (128, 3, 16, (781_312, 748_417, 616_321))],
    ids=["as they are by default", "the larger ones of the results"],
)
def test_networks_have_as_many_parameters_as_the_results_say(width, blocks, future, sizes):
    blocks = dict.fromkeys(("dynamics_blocks", "proposal_blocks", "objective_blocks"), blocks)
    agent = diffusion.Agent(model_size=1, width=width, future=future, obs_dim=5, action_dim=1, **blocks)
    params = jax.eval_shape(partial(diffusion.init_nets, td.with_model_size(agent)), jax.random.key(0))
    found = {name: sum(p.size for p in jax.tree.leaves(net)) for name, net in params.items()}
    assert tuple(found[name] for name in ("dynamics", "proposal", "objective")) == sizes


def test_answers_depend_on_all_inputs_their_order_and_nothing_else():
    planner, _ = make_planner()
    windows = make_windows(3)
    z, actions, key = windows.z[0, 0], windows.action[:, :F], jax.random.key(0)
    zs = np.asarray(roll_out(SMALL, planner, z, actions, key, 0))
    assert zs.shape == (3, F + 1, Z)
    for i in range(F):
        moved = actions.copy()
        moved[0, i] += 0.5
        other = np.asarray(roll_out(SMALL, planner, z, moved, key, 0))
        assert not np.allclose(other[0], zs[0], atol=1e-6), f"action {i}"
        np.testing.assert_allclose(other[1:], zs[1:], atol=1e-6)
    turned = np.asarray(roll_out(SMALL, planner, z, actions[:, ::-1], key, 0))
    assert not np.allclose(turned[0, F], zs[0, F], atol=1e-5)
    elsewhere = np.asarray(roll_out(SMALL, planner, windows.z[1, 0], actions, key, 0))
    assert not np.allclose(elsewhere[:, 1:], zs[:, 1:], atol=1e-5)
    coarse = np.asarray(roll_out(SMALL, planner, z, windows.action, key, 1))
    assert not np.allclose(coarse[:, 1:], zs[:, 1:], atol=1e-5)
    apply = jax.jit(partial(diffusion.diffusion_networks(SMALL)["dynamics"].apply, planner.nets["dynamics"]))
    chunk = np.asarray(jax.jit(diffusion.chunks, static_argnums=(0, 2))(SMALL, actions[0], 1))
    now, x = jax.jit(diffusion.normalise)(planner.stats, z), np.ones((F, Z), np.float32)
    for other in ((now, x, 500.0, chunk, 1), (now, x, 10.0, chunk, 0), (now, x[::-1] * 2, 500.0, chunk, 0)):
        assert not np.allclose(apply(*other), apply(now, x, 500.0, chunk, 0), atol=1e-5)
    three = np.tile(zs[:1], (3, 1, 1))
    score = score_by_objective(SMALL, planner, three, actions)
    assert not np.allclose(score, score_by_objective(SMALL, planner, three, actions[:, ::-1]), atol=1e-6)
    assert not np.allclose(score, score_by_objective(SMALL, planner, three[:, ::-1], actions), atol=1e-6)


def test_every_loss_moves_its_own_network_only():
    planner, state = make_planner()
    windows = make_windows(16)

    def losses(params):
        return diffusion.diffusion_losses(SMALL, params, state.stats, planner.world, windows, jax.random.key(0))

    for name, of_nets in jax.jit(jax.jacrev(losses))(state.params).items():
        moved = {net for net, grad in of_nets.items() if any(np.any(g) for g in jax.tree.leaves(grad))}
        assert moved == {name}


# --------------------------------------------------------------------------------------------------------- Planning
OBSERVED = np.random.default_rng(0).normal(size=(3, OBS)).astype(np.float32)


def act(planner, agent=SMALL, key=0, best=None):
    """What `diffusion.act` returns at the start of three episodes, or after these plans."""
    first = np.full(3, best is None)
    best = np.zeros((3, F, A), np.float32) if best is None else best
    return diffusion.act(agent, planner, OBSERVED, best, first, jax.random.key(key), explore=False)


def test_plans_depend_on_the_key_and_on_the_slow_copies_alone():
    planner, state = make_planner()
    agent = changed(num_policy=0)  # then all candidates are rho's
    action, best, failed, _ = act(planner, agent)
    assert action.shape == (3, A) and best.shape == (3, F, A) and not failed.any()
    np.testing.assert_array_equal(action, np.asarray(best)[:, 0])
    same = act(diffusion.planner_of(state._replace(params=jitter(state.params, 1.0)), planner.world), agent)
    np.testing.assert_array_equal(same[0], action)
    assert not np.array_equal(act(planner, agent, key=1)[0], action)
    ema = diffusion.planner_of(state._replace(ema=jitter(state.ema, 0.3)), planner.world)
    assert not np.array_equal(act(ema, agent)[0], action)


def test_the_last_plan_shifted_by_one_is_a_candidate():
    planner, best = make_planner()[0], np.arange(F * A, dtype=np.float32).reshape(F, A) / 10
    z, key = make_windows(1).z[0, 0], jax.random.key(0)
    of = lambda first: np.asarray(candidates_at(SMALL, planner, z, best, np.array(first), key))  # noqa: E731
    later, begin = of(False), of(True)
    assert later.shape == (4 + 3 + 1, F, A)
    np.testing.assert_array_equal(later[-1], best[[1, 2, 3, 3]])
    np.testing.assert_array_equal(begin[-1], begin[0])
    mean = policy_mean(planner.world.params, z)
    np.testing.assert_allclose(later[4, 0], mean, atol=1e-6)  # of the policy's candidates the first is without noise


def test_the_candidate_that_is_truly_best_is_played(monkeypatch):
    planner, key = make_planner()[0], jax.random.key(0)
    truth = lambda actions: -((actions - 0.3) ** 2).sum((1, 2))  # noqa: E731
    monkeypatch.setattr(diffusion, "score", lambda agent, planner, zs, actions, key: truth(actions))
    begin = np.zeros((F, A), np.float32), np.array(True)
    action, best, failed = jax.jit(partial(diffusion.plan_by_diffusion, SMALL))(planner, OBSERVED[0], *begin, key)
    z = encode(planner.world.params["encoder"], OBSERVED[0])
    candidates = np.asarray(candidates_at(SMALL, planner, z, *begin, jax.random.split(key, 6)[0]))
    np.testing.assert_allclose(best, candidates[np.argmax(truth(candidates))], atol=1e-6)
    np.testing.assert_array_equal(action, np.asarray(best)[0])


def test_where_nothing_can_be_scored_the_policy_acts_and_that_is_counted():
    planner = make_planner()[0]
    nan = jax.tree.map(lambda p: np.full(p.shape, np.nan, np.float32), planner.nets["dynamics"])
    action, best, failed, _ = act(planner._replace(nets=planner.nets | {"dynamics": nan}))
    assert failed.all() and (best == 0).all()
    mean = policy_mean(planner.world.params, encode(planner.world.params["encoder"], OBSERVED))
    np.testing.assert_allclose(action, mean, atol=1e-6)


def test_refinement_without_iterations_is_the_mean_of_the_best_and_with_some_improves_on_its_value():
    world, agent = make_planner()[0].world, changed(refine_iterations=4)
    z, candidates = make_windows(1).z[0, 0], make_windows(3).action[:, :F]
    refine = static(diffusion.refine)
    start = refine(changed(refine_iterations=0), world, z, candidates, jax.random.key(0))
    np.testing.assert_allclose(start, candidates[:, :3].mean(0), atol=1e-6)

    @jax.jit
    def worth(mean):
        heads, eps = jnp.array([0, 1]), jnp.zeros((1, A))
        return td.estimate_value(SMALL, world.params, z[None], mean[:, None], heads, eps)[0]

    assert float(worth(refine(agent, world, z, candidates, jax.random.key(0)))) > float(worth(start))


@pytest.mark.slow
def test_a_refined_plan_begins_with_what_is_refined():
    planner = make_planner()[0]
    action, best, _, _ = act(planner, changed(planner="ssr_mppi"))
    np.testing.assert_array_equal(action, np.clip(best[:, 0], -1, 1))
    assert not np.allclose(best, act(planner)[1])


@pytest.mark.slow
def test_mppi_is_that_of_the_first_script_bit_for_bit():
    planner, mean = make_planner()[0], jnp.full((3, 3, A), 0.1)
    fields = {field.name: getattr(SMALL, field.name) for field in dataclasses.fields(td.Agent)}
    first = jnp.zeros(3, bool)
    theirs = td.act(td.Agent(**fields), planner.world.params, OBSERVED, mean, first, jax.random.key(0), explore=False)
    action, best, failed, key = act(planner, changed(planner="mppi"), best=jnp.zeros((3, F, A)).at[:, :3].set(mean))
    np.testing.assert_array_equal(action, theirs[0])
    np.testing.assert_array_equal(best[:, :3], theirs[1])


def test_the_rows_of_the_table_are_all_combinations_that_differ():
    agent = changed(planner="ssr,pi", scorer="model,random", rollouts="diffusion,onestep")
    assert [(row.planner, row.scorer, row.rollouts) for row in table_rows(agent)] == [
        ("ssr", "model", "diffusion"),
        ("ssr", "model", "onestep"),
        ("ssr", "random", "-"),
        ("pi", "-", "-"),
    ]


# -------------------------------------------------------------------------------------------------------------- Runs
@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Flags that name a run of the first script and episodes of its task."""
    folder = tmp_path_factory.mktemp("diffusion")
    sizes = {"enc_dim": 16, "mlp_dim": 16, "latent_dim": 16, "num_q": 2}
    args = td.Args(task="cartpole-swingup", agent=td.Agent(**sizes))
    agent = dataclasses.replace(td.with_model_size(args.agent), obs_dim=5, action_dim=1)
    meta = {"script": "tdmpc2_jax", "args": settings(args), "count": {}}
    with ocp.CheckpointManager(folder / "world" / "checkpoints") as manager:
        write_checkpoint(manager, 1, meta, state=td.fresh_state(agent, random_streams(0)))
    cartpole_episodes(folder / "data", 4, 30)
    return ["--world-model", str(folder / "world"), "--data-dir", str(folder / "data")]


RUN = [*TINY, *"--planner pi --num-updates 80 --checkpoint-freq 40 --eval-freq 1000 --log-freq 20".split()]
NAME = "cartpole-swingup/tdmpc2_jax_diffusion/1"


def final(folder):
    """World model and learning state of a run's last checkpoint, and what it says of itself."""
    meta = meta_of(folder, "tdmpc2_jax_diffusion")
    record = {name: value for name, value in meta["args"].items() if hasattr(SMALL, name)}
    args = diffusion.Args(task="cartpole-swingup", checkpoint=str(folder))
    agent = dataclasses.replace(td.with_model_size(diffusion.Agent(**record)), obs_dim=5, action_dim=1)
    return *diffusion.read_run(args, agent), meta


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """Folder of a run that was not interrupted."""
    runs = tmp_path_factory.mktemp("finished")
    diffusion.main([*files, *RUN, "--runs-dir", str(runs)])
    return runs / NAME


def test_a_run_takes_task_and_sizes_from_its_world_model_and_leaves_curve_and_checkpoint(finished, files):
    world, state, meta = final(finished)
    assert meta["count"]["updates"] == 80 == int(state.updates)
    assert (meta["args"]["task"], meta["args"]["mlp_dim"]) == ("cartpole-swingup", 16)
    rows = list(csv.DictReader((finished / "eval.csv").open()))
    assert [(row["step"], row["seed"]) for row in rows] == [("80", "1")]
    of_world = find_checkpoint(files[1])
    theirs = read_agent(of_world, read_meta(of_world, "tdmpc2_jax"), ("params",))
    jax.tree.map(np.testing.assert_array_equal, world.params, theirs["params"])
    assert float(world.discount) == pytest.approx(0.99)


def resume(folder, files, *flags):
    """Continues a run in this process; what is not said is as it was, in the run of the world model's task."""
    diffusion.main([*files, *flags, "--no-compile-cache", "--runs-dir", str(folder.parents[2]), "--resume"])


def test_a_run_that_has_all_its_updates_says_so_and_does_not_ask_for_more_than_it_would_make(finished, files, capsys):
    resume(finished, files)
    assert "all 80 updates have been made\n" in capsys.readouterr().out, "their number shapes the learning rate"
    with pytest.raises(SystemExit, match="--num-updates 80"):
        resume(finished, files, "--num-updates", "90")


def test_a_run_that_goes_on_from_a_checkpoint_ends_where_the_uninterrupted_one_does(finished, files, tmp_path):
    folder = shutil.copytree(finished, tmp_path / NAME)
    shutil.rmtree(complete_checkpoints(folder)[0])
    assert meta_of(folder, "tdmpc2_jax_diffusion")["count"]["updates"] == 40
    with pytest.raises(SystemExit, match="--world-model"):
        resume(folder, ["--world-model", str(shutil.copytree(files[1], tmp_path / "another")), *files[2:]])
    resume(folder, files, "--top", "5")  # of the planner, which learning does not see
    one, other = final(folder)[1], final(finished)[1]
    assert jax.random.key_data(one.key).tolist() == jax.random.key_data(other.key).tolist()
    jax.tree.map(np.testing.assert_array_equal, one._replace(key=0), other._replace(key=0))


def rewrite_args(folder, **changes):
    """Makes a run's record that of a version with these arguments."""
    checkpoint = complete_checkpoints(folder)[0]
    meta = read_meta(checkpoint)
    meta = meta | {"args": meta["args"] | changes}
    meta.pop("checksum", None)
    (checkpoint / "meta" / "metadata").write_text(json.dumps(meta))
    (folder / "args.json").write_text(json.dumps(meta["args"]))


@pytest.mark.slow
def test_options_that_are_gone_are_ignored_at_the_value_that_remained_and_refused_at_another(
    finished, files, tmp_path, capsys
):
    folder = shutil.copytree(finished, tmp_path / NAME)
    before = {"preset": "base", "anchor": "onestep", "prediction": "x0", "draws": 1, "eta": 0.0, "beta": 0.0}
    rewrite_args(folder, **before, warm_start=True, mppi_min_std=0.05)
    resume(folder, files)
    evaluate = ["--evaluate", "--checkpoint", str(folder), "--no-compile-cache"]
    diffusion.main([*evaluate, "--eval-episodes", "1"])
    assert "\npi " in capsys.readouterr().out
    rewrite_args(folder, anchor="none", draws=2)
    for start in (partial(diffusion.main, evaluate), partial(resume, folder, files)):
        with pytest.raises(SystemExit, match="made with --anchor none, --draws 2, which this version does not have"):
            start()


def test_options_that_are_gone_are_unknown_to_the_command_line(capsys):
    flags = "--preset --anchor --prediction --draws --eta --beta --warm-start --mppi-min-std".split()
    with pytest.raises(SystemExit):
        diffusion.main([word for flag in flags for word in (flag, "1")])
    message = capsys.readouterr().err
    assert "nrecognized" in message and all(flag in message for flag in flags), message


@pytest.mark.slow
def test_the_table_has_a_row_for_each_combination_and_what_the_networks_know(finished, tmp_path, capsys, monkeypatch):
    planned = []
    plan = diffusion.plan_by_diffusion
    monkeypatch.setattr(diffusion, "plan_by_diffusion", lambda *x, **how: planned.append(1) or plan(*x, **how))
    flags = (
        "--planner ssr,pi --scorer random --top 7 --eval-episodes 1 --no-compile-cache".split()
    )  # no other test's agent
    diffusion.main(["--evaluate", "--checkpoint", str(finished), *flags, "--json", str(tmp_path / "x.json")])
    assert len(planned) == 1, "traced once, for all steps of all episodes"
    out, results = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    rows = [(row["planner"], row["scorer"], len(row["returns"])) for row in results["table"]]
    assert rows == [("ssr", "random", 1), ("pi", "-", 1)]
    assert f"{results['table'][1]['returns'][0]:.1f}" in out and "p_d shuffled, scale 1" in out
    assert {*results["held_out"]["nmse"]["1"]} == {"copy", "p_d", "p_d shuffled", "d", "d shuffled"}
    assert {*results["held_out"]["advantages"]} == {f"{s} on {z}" for s in ("model", "J") for z in ("true", "p_d", "d")}
    assert {*results["held_out"]["actions"]} == {"rho", "recorded"}


def test_the_benchmark_collects_finished_parts_without_running_them_again(tmp_path):
    row = {"planner": "ssr", "scorer": "random", "rollouts": "-", "returns": [1.0, 3.0]}
    for part in ("SSR", "p_d in 1 step"):
        held_out = {"nmse": {"1": {"p_d": [0.5] if part == "SSR" else [0.7]}}}
        text = json.dumps({"task": "walker-walk", "table": [row], "held_out": held_out})
        (tmp_path / f"{part.replace(' ', '-')}.json").write_text(text)
    args = {"checkpoint": "nowhere", "folder": str(tmp_path), "json": str(tmp_path / "all.json")}
    benchmark.main(benchmark.Args(**args, parts="SSR,p_d in 1 step", add=(f"other={tmp_path / 'SSR.json'}",)))
    results = json.loads((tmp_path / "all.json").read_text())
    assert [row["part"] for row in results["table"]] == ["SSR", "p_d in 1 step"]
    assert results["nmse"] == {"p_d in 1 step": [0.7]} and results["held_out"]["nmse"]["1"]["p_d"] == [0.5]
    assert results["learned_otherwise"]["other"]["table"] == [row]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--world-model", "nowhere"], ["nowhere", "does not exist"]),
        (["--data-dir", "nowhere"], ["nowhere", "chunk_0.pt"]),
        (["--mlp-dim", 24], ["does not fit", "--mlp-dim 16"]),
        (["--future", 40], ["4 episode(s) of at most 30 entries", "windows of 41 entries"]),
        (["--scorer", "modell"], ["--scorer", "model, J, random", "modell"]),
        (["--planner", "ssr,pi"], ["--planner", "--evaluate"]),
        (["--width", 10, "--heads", 2], ["--width", "--heads"]),
        (["--future", 2], ["--horizon", "--future"]),
        (["--num-proposals", 0, "--num-policy", 0], ["no candidate"]),
        (["--proposal-steps", 1001], ["1000"]),
        (["--diffusion-lr", "nan"], ["--diffusion-lr"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_what_cannot_work_is_refused_in_one_sentence(refused, files, flags, words):
    sentence = refused(*files, *flags)
    assert all(word in sentence for word in words), sentence


def test_damaged_episodes_are_refused(refused, files, tmp_path):
    chunk = shutil.copytree(files[3], tmp_path / "data") / "cartpole-swingup" / "chunk_0.pt"
    with open(chunk, "r+b") as file:
        file.seek(chunk.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    assert "damaged" in refused(*files[:2], "--data-dir", tmp_path / "data")


def test_training_needs_a_world_model_and_episodes(refused, files):
    assert "--world-model" in refused("--task", "cartpole-swingup", *files[2:])
    assert "--data-dir" in refused(*files[:2])


# --------------------------------------------------------------------------------------------------------- Pictures
@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """Folder with a world model of mw-reach that sees pictures, fresh, and episodes of random pictures."""
    folder = tmp_path_factory.mktemp("pictured")
    agent = rgb.Agent(mlp_dim=16, latent_dim=16, num_q=2, num_samples=16, num_elites=4, num_pi_trajs=4, iterations=1)
    agent = dataclasses.replace(rgb.with_model_size(agent), shadows=False)
    args = rgb.Args(task="mw-reach", agent=agent)
    of_task = dataclasses.replace(agent, action_dim=4)
    params = jitter(rgb.init_params(of_task, jax.random.key(0)), 0.2)
    state = {"params": params, "target_q": params["q"], "q_scale": jnp.float32(1)}
    with ocp.CheckpointManager(folder / "world" / "checkpoints") as manager:
        meta = {"script": "tdmpc2_jax_rgb", "args": settings(args)}
        write_checkpoint(manager, 5, meta, state={"train": state})
    rng = np.random.default_rng(0)
    writer = envs.EpisodeWriter(folder / "data", "mw-reach", 4, obs="rgb")
    seen = []
    for step in range(101):
        obs = rng.integers(0, 256, (4, 64, 64, 3), np.uint8)
        writer.add(obs, rng.uniform(-1, 1, (4, 4)), rng.random(4), np.full(4, step == 0))
        seen.append(obs)
    writer.flush()
    return folder, np.stack(seen, 1).reshape(-1, 64, 64, 3)


@pytest.mark.slow
def test_latent_states_of_recorded_pictures_are_those_of_acting(pictured, monkeypatch):
    folder, pictures = pictured
    monkeypatch.setattr(recorded_data, "PICTURES_AT_ONCE", 150)  # pieces end within episodes
    args = diffusion.parse(["--world-model", str(folder / "world"), "--data-dir", str(folder / "data"), *TINY])
    assert (args.agent.obs, args.agent.shadows, args.task) == ("rgb", False, "mw-reach")
    agent = dataclasses.replace(args.agent, action_dim=4)
    init = partial(rgb.init_params, agent)
    world = diffusion.load_world(str(folder / "world"), ["mw-reach"], [0.9], init, 0, *rgb.SCRIPTS, obs="rgb")
    latents = diffusion.encoded(args, agent, world).obs
    key = random_streams(args.seed).batches
    acted = []
    seen = None
    for i, picture in enumerate(pictures):
        seen = rgb.stack_pictures(seen, picture[None], np.array([i % 101 == 0]))
        acted.append(seen[0])
    for start in (0, 150, 300):
        stacks = jnp.asarray(acted[start : start + 150])
        shifts = rgb.draw_shifts(jax.random.fold_in(key, start), len(stacks))
        expected = rgb.encode(agent, world.params["encoder"], stacks, shifts)
        np.testing.assert_allclose(latents[start : start + 150], expected, atol=1e-5)


@pytest.mark.slow
def test_a_world_model_of_pictures_is_planned_on_and_the_run_resumed(pictured, here, tmp_path):
    folder, _ = pictured
    flags = ["--world-model", folder / "world", "--data-dir", folder / "data", *TINY, "--refine-samples", 8]
    name = "tdmpc2_jax_diffusion.py"
    status, out, err = here(*flags, "--num-updates", 40, "--eval-freq", 40, name=name, small=False)
    assert status == 0, err
    run = tmp_path / "runs" / "mw-reach" / "tdmpc2_jax_diffusion" / "1"
    shutil.rmtree(complete_checkpoints(run)[0])
    status, out, err = here(*flags, "--num-updates", 40, "--eval-freq", 40, "--resume", name=name, small=False)
    assert status == 0, err
    planners = ["--evaluate", "--checkpoint", run, "--planner", "ssr,mppi,pi"]
    status, out, err = here(*planners, name=name, small=False)
    assert status == 0 and "mppi" in out and "copy" in out, err


@pytest.mark.slow
def test_pictures_and_states_are_not_taken_for_each_other(pictured, refused, tmp_path):
    folder, pictures = pictured
    world = ("--world-model", folder / "world")
    cartpole_episodes(tmp_path / "states")
    states = tmp_path / "states" / "cartpole-swingup"
    states.rename(tmp_path / "states" / "mw-reach")
    assert "holds episodes of states, pictures are needed" in refused(*world, "--data-dir", tmp_path / "states", *TINY)
    small = {"obs": pictures[:8, :32, :32].reshape(2, 4, 32, 32, 3), "action": np.zeros((2, 4, 4), np.float32)}
    small |= {"reward": np.zeros((2, 4), np.float32), "task": np.zeros((2, 4), np.int64)}
    (tmp_path / "small" / "mw-reach").mkdir(parents=True)
    envs.save_tensordict(tmp_path / "small" / "mw-reach" / "chunk_0.pt", small)
    sentence = refused(*world, "--data-dir", tmp_path / "small", *TINY)
    assert "pictures are 32 x 32 x 3, 64 x 64 x 3 is needed" in sentence
    assert "learns from states" in refused("--mode", "joint", "--obs", "rgb", "--task", "mw-reach")
