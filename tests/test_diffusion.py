"""Latent diffusion MPC: schedule, sampler, losses and planner, and runs as a user sees them."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import meta_of
from jax.experimental.compilation_cache import compilation_cache
from scipy.stats import spearmanr
from test_runs import wait_for

import envs
import tdmpc2_jax as first_script
import tdmpc2_jax_diffusion as td
from benchmarks import diffusion as benchmark
from tdmpc2_support.data.recorded import agreement, nmse, read_recorded, spread_out, variety, window_starts
from tdmpc2_support.run.checkpoints import (
    complete_checkpoints,
    find_checkpoint,
    read_agent,
    read_checkpoint,
    read_meta,
    write_checkpoint,
)

SCRIPT = td
A, Z, F = 2, 16, 4
SMALL = td.with_preset(
    td.Args(
        enc_dim=16,
        mlp_dim=16,
        latent_dim=Z,
        num_enc_layers=2,
        num_q=2,
        num_samples=32,
        num_elites=8,
        num_pi_trajs=4,
        iterations=2,
        width=16,
        heads=2,
        dynamics_blocks=1,
        proposal_blocks=1,
        objective_blocks=1,
        future=F,
        num_proposals=4,
        num_policy=3,
        top=3,
        scales="1,4",
        refine_samples=16,
        diffusion_batch_size=16,
    )  # fmt: skip
)
MODEL = td.make_model(SMALL, 5, A, episodic=False)


@pytest.fixture(scope="module", autouse=True)
def compile_in_less_time(tmp_path_factory):
    """Programs of tiny networks run as fast without optimisation; compiling them is what takes the time here. A run in
    another folder has the same programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)  # as it was
    compilation_cache.reset_cache()


static = partial(jax.jit, static_argnums=(0, 1))  # one program in place of one for each operation


def changed(**fields):
    return dataclasses.replace(SMALL, **fields)


def jitter(params, scale, seed=0):
    """Parameters that are all different from zero."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [p + scale * rng.normal(size=p.shape).astype(np.float32) for p in leaves])


def make_windows(number, seed=0, steps=4 * F):
    rng = np.random.default_rng(seed)
    z = rng.dirichlet(np.ones(8), (number, steps + 1, 2)).reshape(number, steps + 1, Z)
    action, reward = rng.uniform(-1, 1, (number, steps, A)), rng.random((number, steps))
    return td.Windows(*(jnp.asarray(x, jnp.float32) for x in (z, action, reward, np.zeros((number, steps)))))


@pytest.fixture(scope="module")
def made():
    """(planner with networks that answer anything but zero, learning state) for `MODEL`."""
    parts = jax.jit(td.fresh, static_argnums=(0, 1))(SMALL, MODEL)
    params = jitter(parts["world"].params, 0.3)
    world = td.World(params, jitter(params["q"], 0.3, 1), jnp.ones(A), jnp.float32(0.9))
    stats = td.statistics(SMALL, MODEL, world, make_windows(64))
    state = parts["state"]._replace(stats=stats, params=jitter(parts["state"].params, 0.1))
    state = state._replace(ema=jitter(parts["state"].params, 0.1, 2))
    return td.planner_of(state, world), state


# ------------------------------------------------------------------------------------------- Schedule and sampler
def test_the_schedule_is_the_cosine_one():
    abar = td.signal_powers()
    for k, power in ((0, 0.9999), (500, 0.4921), (900, 0.02361), (961, 0.003502), (999, 2.4e-10)):
        assert abar[k] == pytest.approx(power, rel=0.03 if k == 999 else 1e-3)
    assert (np.diff(abar) < 0).all()


MOMENTS = {  # n: std of N(0, 1); mean and std of N(.5, .3); mass of modes +-.7 between them; then from the eps levels
    1: (0.000, 0.500, 0.000, 1.000, 1.000, 0.005, 0.999),
    2: (0.500, 0.500, 0.082, 0.573, 0.709, 0.456, 0.127),
    4: (0.729, 0.501, 0.160, 0.157, 0.791, 0.467, 0.181),
    8: (0.856, 0.501, 0.222, 0.024, 0.874, 0.479, 0.231),
    10: (0.884, 0.501, 0.236, 0.012, 0.896, 0.482, 0.243),
    16: (0.926, 0.501, 0.259, 0.003, 0.932, 0.487, 0.263),
    32: (0.962, 0.501, 0.278, 0.001, 0.965, 0.493, 0.281),
}


def answer_of(prediction, x0, x, abar):
    """What a network says that means x0."""
    noise = (x - jnp.sqrt(abar) * x0) / jnp.sqrt(1 - abar)
    return td.target_of(prediction, x0, noise, abar)


def exact(prediction, x, k):
    """Answers of exact denoisers for rows of samples of N(0, 1), N(.5, .3) and two modes at +-.7 with std .1."""
    abar = jnp.asarray(td.signal_powers(), jnp.float32)[k.astype(int)]

    def gauss(x, mean, std):
        return mean + jnp.sqrt(abar) * std**2 / (abar * std**2 + 1 - abar) * (x - jnp.sqrt(abar) * mean)

    odds = 2 * jnp.sqrt(abar) * 0.7 * x[2] / (abar * 0.1**2 + 1 - abar)
    up = jax.nn.sigmoid(odds)
    modes = up * gauss(x[2], 0.7, 0.1) + (1 - up) * gauss(x[2], -0.7, 0.1)
    return answer_of(prediction, jnp.stack([gauss(x[0], 0.0, 1.0), gauss(x[1], 0.5, 0.3), modes]), x, abar)


@pytest.mark.parametrize("prediction", ["x0", "v", "eps"])
@pytest.mark.parametrize("steps", [1, 8, 10, 32])
def test_samples_of_exact_denoisers_have_the_moments_that_this_many_steps_leave(steps, prediction):
    answer = lambda x, k: exact(prediction, x, k)  # noqa: E731
    x = np.asarray(td.sample_ddim(answer, jax.random.key(0), (3, 20_000), steps, 10.0, prediction))
    assert np.isfinite(x).all()
    unit, mean, std, between, *eps = MOMENTS[steps]
    if prediction == "eps":
        unit, mean, std = eps
    else:
        assert (np.abs(x[2]) < 0.35).mean() == pytest.approx(between, abs=0.02)
        assert (x[2] > 0).mean() == pytest.approx(0.5, abs=0.02)
    assert x[0].std() == pytest.approx(unit, abs=0.02)
    assert (x[1].mean(), x[1].std()) == pytest.approx((mean, std), abs=0.02)


@pytest.mark.parametrize("prediction", ["x0", "v", "eps"])
@pytest.mark.parametrize("steps", [1, 8, 10, 32])
def test_a_denoiser_that_knows_the_answer_is_answered_with_it(steps, prediction):
    """With any other power than 1 behind the last level, noise would come out."""
    truth = jnp.linspace(-0.9, 0.9, 24).reshape(4, 6)
    abar = jnp.asarray(td.signal_powers(), jnp.float32)
    answer = lambda x, k: answer_of(prediction, truth, x, abar[k.astype(int)])  # noqa: E731
    x = td.sample_ddim(answer, jax.random.key(0), (4, 6), steps, 10.0, prediction)
    np.testing.assert_allclose(x, truth, atol=1e-5)


def test_fresh_noise_in_every_step_narrows_the_samples_less():
    x = td.sample_ddim(lambda x, k: exact("x0", x, k), jax.random.key(0), (3, 20_000), 10, 10.0, "x0", 1.0)
    assert float(x[0].std()) == pytest.approx(0.822, abs=0.02)


def test_a_denoiser_learns_a_linear_gaussian_future():
    """Mean and spread of the samples, at every step, against the truth."""
    net = td.Denoiser(2, td.Transformer(32, blocks=1, heads=2, dtype="float32"))
    mix = jnp.asarray(np.random.default_rng(0).normal(size=(F, 3, 2)) * 0.5, jnp.float32)
    args, tx = changed(prediction="x0"), optax.adam(optax.cosine_decay_schedule(5e-3, 400))

    def loss(params, key):
        keys = jax.random.split(key, 4)
        z, k = jax.random.normal(keys[0], (128, 3)), jax.random.randint(keys[1], (128,), 0, td.LEVELS)
        x0 = jnp.einsum("bz,fzo->bfo", z, mix) + 0.6 * jax.random.normal(keys[2], (128, F, 2))
        noise = jax.random.normal(keys[3], x0.shape)
        one = lambda z, x0, k, noise: td.denoising_loss(args, lambda x, k: net.apply(params, z, x, k), x0, k, noise)  # noqa: E731
        return jax.vmap(one)(z, x0, k, noise).mean()

    def step(carry, key):
        params, opt = carry
        change, opt = tx.update(jax.grad(loss)(params, key), opt)
        return (optax.apply_updates(params, change), opt), None

    params = net.init(jax.random.key(0), jnp.zeros(3), jnp.zeros((F, 2)), 0)
    keys = jax.random.split(jax.random.key(1), 400)
    params = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), keys)[0][0])(params)
    z = jax.random.normal(jax.random.key(2), (16, 3))
    denoise = lambda x, k: jax.vmap(jax.vmap(lambda z, x: net.apply(params, z, x, k), (None, 0)))(z, x)  # noqa: E731
    draw = jax.jit(lambda key: td.sample_ddim(denoise, key, (16, 200, F, 2), 10, 6.0))
    x, mean = draw(jax.random.key(3)), jnp.einsum("bz,fzo->bfo", z, mix)
    errors = ((x.mean(1) - mean) ** 2).mean((0, 2)) / (mean**2).mean((0, 2))
    assert (errors < 0.05).all(), errors
    ratio = x.std(1).mean((0, 2)) / 0.6
    assert ((ratio > 0.75) & (ratio < 1.1)).all(), ratio  # exact denoisers leave about 0.83


# ----------------------------------------------------------------------------------------------------------- Windows
def make_dataset(episodes=12, length=40, seed=0):
    """Episodes in which reward and next observation tell the observation and the action before; filler is NaN."""
    rng = np.random.default_rng(seed)
    obs, action = np.zeros((episodes, length, 5), np.float32), rng.uniform(-1, 1, (episodes, length, 1))
    obs[:, 0] = rng.normal(size=(episodes, 5))
    obs[..., 4] = np.arange(episodes)[:, None]
    reward = np.full((episodes, length), np.nan, np.float32)
    for i in range(1, length):
        obs[:, i, :4] = 0.9 * obs[:, i - 1, :4] + 0.1 * action[:, i]
        reward[:, i] = 2 * obs[:, i - 1, 0] + action[:, i, 0]
    action[:, 0] = np.nan
    task = np.zeros((episodes, length), np.int64)
    chunk = envs.Chunk(Path("chunk_0.pt"), obs, action.astype(np.float32), reward, task, np.zeros(1, int))
    return envs.Dataset(("cartpole-swingup",), [chunk])


def write_dataset(folder, dataset):
    chunk = dataset.chunks[0]
    (folder / "cartpole-swingup").mkdir(parents=True)
    tensors = {"obs": chunk.obs, "action": chunk.action, "reward": chunk.reward, "task": chunk.task}
    envs.save_tensordict(folder / "cartpole-swingup" / "chunk_0.pt", tensors)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Episodes as they are read, with observations where latent states will be."""
    folder = tmp_path_factory.mktemp("recorded")
    write_dataset(folder, make_dataset())
    return read_recorded(["cartpole-swingup"], folder, F)


def test_actions_and_rewards_of_a_window_lead_from_one_latent_state_to_the_next(recorded):
    windows = td.windows_at(recorded, recorded.starts, F)
    assert all(np.isfinite(x).all() for x in windows), "filler is never read"
    obs, action, reward = windows.z, windows.action, windows.reward
    assert obs.shape[1:] == (F + 1, 5) and action.shape[1:] == (F, 1)
    np.testing.assert_allclose(reward, 2 * obs[:, :-1, 0] + action[..., 0], atol=1e-5)
    np.testing.assert_allclose(obs[:, 1:, :4], 0.9 * obs[:, :-1, :4] + 0.1 * action, atol=1e-5)
    assert (obs[..., 4] == obs[:, :1, 4]).all(), "no window crosses from one episode to another"
    assert len(recorded.starts) + len(recorded.held_out) == 12 * (40 - F), "all windows that there are"


def test_latent_states_are_those_of_the_observations(recorded, made, monkeypatch):
    monkeypatch.setattr(td, "read_recorded", lambda *x: recorded)
    encoder, data = made[0].world.params["encoder"], td.encoded(SMALL, MODEL, made[0].world)
    np.testing.assert_allclose(data.obs, MODEL.encoder.apply(encoder, recorded.obs), atol=1e-6)


def test_every_tenth_episode_is_held_out(recorded):
    episodes = [{*np.asarray(recorded.obs[starts, 4])} for starts in (recorded.starts, recorded.held_out)]
    assert episodes == [{*range(12)} - {5}, {5}]
    lengths, task = np.full(31, 20), np.zeros(31, int)
    assert {*(window_starts(lengths, F, task)[1] // 20)} == {5, 15, 25}
    assert {*(window_starts(lengths[:2], F, task[:2])[1] // 20)} == {1}
    assert {*(window_starts(lengths, F, np.arange(31) % 3)[1] // 20)} == {15, 16, 17}, "of each task every tenth"
    few = spread_out(recorded.starts, 50)
    assert len(few) == 50 and {*np.asarray(recorded.obs[few, 4])} == episodes[0]
    assert len(spread_out(recorded.starts, 10_000)) == len(recorded.starts)


# -------------------------------------------------------------------------------------------- What p_d diffuses, and y
@pytest.mark.parametrize("anchor", ["onestep", "current", "none"])
def test_what_is_left_open_and_put_back_is_the_true_future(made, anchor, monkeypatch):
    (nets, _, world), _ = made
    args, windows = changed(anchor=anchor, prediction="v", rollouts="diffusion"), make_windows(8)
    stats = td.statistics(args, MODEL, world, windows)
    for scale, s in enumerate((1, 4)):
        rest = jax.vmap(lambda w, s=s: td.rest_of(args, MODEL, world, stats, w, s))(windows)
        x0 = (rest - stats.mu[scale]) / stats.sigma[scale]
        abar = jnp.asarray(td.signal_powers(), jnp.float32)
        window = jax.tree.map(lambda x: x[0], windows)
        oracle = lambda self, params, now, x, k, *condition, task: answer_of("v", x0[0], x, abar[k.astype(int)])  # noqa: E731, B023
        monkeypatch.setattr(td.Denoiser, "apply", oracle)
        monkeypatch.setattr(td, "LATENT_CLIP", 1e6)
        planner = td.Planner({"dynamics": None}, stats, world)
        actions = window.action[None, : F * s]
        zs = td.rollout(args, MODEL, planner, window.z[0], actions, jax.random.key(0), scale)[0, 0]
        np.testing.assert_allclose(zs, window.z[: F * s + 1 : s], atol=1e-5)
        monkeypatch.undo()
    assert (stats.std >= 1e-2).all() and (stats.sigma >= 0.02).all()
    if anchor == "none":
        assert (stats.mu == 0).all() and (stats.sigma == 1).all()


def test_a_network_that_answers_zero_leaves_the_one_step_roll_out(made):
    planner, _ = made
    S = planner.stats
    planner = planner._replace(
        nets=jax.tree.map(jnp.zeros_like, planner.nets), stats=S._replace(mu=jnp.zeros_like(S.mu))
    )
    actions, z, key = make_windows(5).action, make_windows(1).z[0, 0], jax.random.key(0)
    for scale, s in enumerate((1, 4)):
        roll = jax.jit(td.rollout, static_argnums=(0, 1, 6))
        zs = roll(SMALL, MODEL, planner, z, actions[:, : F * s], key, scale)
        onestep = roll(changed(rollouts="onestep"), MODEL, planner, z, actions[:, : F * s], key, scale)
        np.testing.assert_allclose(zs, onestep, atol=1e-5)
        np.testing.assert_allclose(zs.reshape(-1, 2, 8).sum(-1), 1, atol=1e-5)
        state = z
        for action in actions[2, :s]:
            state = MODEL.dynamics.apply(planner.world.params["dynamics"], state, action)
        np.testing.assert_allclose(zs[0, 2, 1], state, atol=1e-5)
    other = td.denormalise(SMALL, S, 5 * jax.random.normal(key, (7, Z)))
    assert (other > 0).all()
    np.testing.assert_allclose(other.reshape(-1, 2, 8).sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("ends", [0.0, 1.0])
def test_the_advantage_is_that_of_a_plain_loop_with_the_target_values(made, ends):
    world = made[0].world
    window = jax.tree.map(lambda x: x[0], make_windows(1))
    window = window._replace(terminated=window.terminated.at[F - 1].set(ends))

    @jax.jit
    def v(z):
        mean = td.policy(SMALL, MODEL, world.params["pi"], z, jnp.zeros(A)).mean
        heads = [jax.tree.map(lambda p, i=i: p[i], world.target_q) for i in range(2)]
        return sum(td.two_hot_inv(SMALL, MODEL.q.apply(p, z, mean)) for p in heads) / 2

    y = sum(0.9**i * float(window.reward[i]) for i in range(F)) + 0.9**F * (1 - ends) * float(v(window.z[F]))
    found = static(td.advantage)(SMALL, MODEL, world, window)
    assert float(found) == pytest.approx(y - float(v(window.z[0])), abs=1e-4)


def test_the_models_score_is_that_of_a_plain_loop_and_ends_where_an_end_is_predicted(made):
    world = made[0].world
    zs, actions = make_windows(3).z[:, : F + 1], make_windows(3).action[:, :F]
    model = td.make_model(SMALL, 5, A, episodic=True)
    head = jitter(model.termination.init(jax.random.key(0), zs[0, 0]), 1.0)
    logits = model.termination.apply(head, zs[:, 1:])
    head["params"]["linear_2"]["bias"] -= jnp.sort(logits.ravel())[-4]  # three of twelve states are ends
    episodic = world._replace(params=world.params | {"termination": head})
    reward = jax.jit(lambda z, a: td.two_hot_inv(SMALL, MODEL.reward.apply(world.params["reward"], z, a)))
    value, logits = static(td.value), np.asarray(model.termination.apply(head, zs)[..., 0])
    plain, ending = [], []
    for z, action, logit in zip(zs, actions, logits, strict=True):
        values = [float(reward(*pair)) for pair in zip(z[:-1], action, strict=True)]
        values.append(float(value(SMALL, MODEL, world, z[F])))
        alive = np.append(1, np.cumprod(logit[1:] <= 0))
        plain.append(sum(0.9**i * r for i, r in enumerate(values)))
        ending.append(sum(0.9**i * alive[i] * r for i, r in enumerate(values)))
    assert not np.allclose(plain, ending)
    np.testing.assert_allclose(static(td.score_by_model)(SMALL, MODEL, world, zs, actions), plain, atol=1e-4)
    np.testing.assert_allclose(static(td.score_by_model)(SMALL, model, episodic, zs, actions), ending, atol=1e-4)


def test_js_score_is_in_the_unit_of_rewards(made):
    planner = made[0]
    windows = make_windows(3)

    def score(stats):
        zs, actions = windows.z[:, : F + 1], windows.action[:, :F]
        return static(td.score_by_objective)(SMALL, MODEL, planner._replace(stats=stats), zs, actions)

    stats = planner.stats._replace(adv_mean=jnp.float32(0), adv_std=jnp.float32(1))
    moved = stats._replace(adv_mean=jnp.float32(3), adv_std=jnp.float32(2))
    np.testing.assert_allclose(score(moved), 3 + 2 * score(stats), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- Masks
def test_actions_that_the_task_lacks_are_zero_and_without_effect(made):
    planner, state = made
    world = planner.world._replace(mask=jnp.array([1.0, 0.0]))
    padded = planner._replace(world=world)
    z, key, best = make_windows(1).z[0, 0], jax.random.key(0), jnp.zeros((F, A))
    candidates = static(td.propose)(SMALL, MODEL, padded, z, best, jnp.array(False), key)
    assert (candidates[..., 1] == 0).all() and (candidates[:-1, :, 0] != 0).any()
    window = jax.tree.map(lambda x: x[0], make_windows(1))
    noise = jax.tree.map(lambda x: x[0], td.diffusion_noise(SMALL, MODEL, key, 1))
    loss = lambda w: static(td.proposal_loss)(SMALL, MODEL, state.params, state.stats, world, w, noise)  # noqa: E731
    other = window._replace(action=window.action.at[:, 1].set(0.7))
    assert loss(window) == loss(other) != 0
    far = noise._replace(actions=noise.actions.at[:, 1].set(9.0))
    assert static(td.proposal_loss)(SMALL, MODEL, state.params, state.stats, world, window, far) == loss(window)
    net = td.make_nets(SMALL, MODEL)["proposal"]
    denoise = lambda x, k: net.apply(state.params["proposal"], td.normalise(state.stats, window.z[0]), x, k)  # noqa: E731
    one = td.denoising_loss(SMALL, denoise, window.action[:F], noise.proposal_level, noise.actions, world.mask)
    assert float(loss(window)) == pytest.approx(float(one[:, 0].mean()), rel=1e-5), "divided by the real actions"


def test_slots_of_a_chunk_beyond_its_scale_are_without_effect():
    actions = make_windows(1).action[0]
    fine, coarse = td.chunks(SMALL, actions, 1), td.chunks(SMALL, actions, 4)
    assert fine.shape == coarse.shape == (F, 4 * (A + 1))
    np.testing.assert_array_equal(coarse[1], [*actions[4:8].ravel(), 1, 1, 1, 1])
    np.testing.assert_array_equal(fine[2], [*actions[2], *np.zeros(3 * A), 1, 0, 0, 0])
    np.testing.assert_array_equal(td.chunks(SMALL, actions[:F], 1), fine)
    np.testing.assert_array_equal(td.chunks(changed(scales="1"), actions[:F], 1), actions[:F])


# --------------------------------------------------------------------------------------------------------- Networks
def test_presets_have_the_parameters_that_they_say():
    sizes = {"small": (160_512, 144_001, 110_721), "base": (781_312, 748_417, 616_321)}
    sizes["paper"] = (4_583_808, 4_518_145, 7_940_609)
    for preset, expected in sizes.items():
        args = td.with_preset(td.Args(model_size=1, preset=preset))
        model = td.make_model(args, 5, 1, episodic=False)
        params = jax.eval_shape(lambda args=args, model=model: td.init_nets(args, model, jax.random.key(0)))
        found = {name: sum(p.size for p in jax.tree.leaves(net)) for name, net in params.items()}
        assert tuple(found[name] for name in ("dynamics", "proposal", "objective")) == expected


def test_answers_depend_on_all_inputs_their_order_and_nothing_else(made):
    planner, _ = made
    window = make_windows(3)
    z, actions, key = window.z[0, 0], window.action[:, :F], jax.random.key(0)
    roll = jax.jit(lambda z, a, scale: td.rollout(SMALL, MODEL, planner, z, a, key, scale), static_argnums=2)
    zs = roll(z, actions, 0)
    assert zs.shape == (1, 3, F + 1, Z)
    for i in range(F):
        other = roll(z, actions.at[0, i].add(0.5), 0)
        assert not np.allclose(other[0, 0], zs[0, 0], atol=1e-6), f"action {i}"
        np.testing.assert_allclose(other[0, 1:], zs[0, 1:], atol=1e-6)
    assert not np.allclose(roll(z, actions[:, ::-1], 0)[0, 0, F], zs[0, 0, F], atol=1e-5)
    assert not np.allclose(roll(window.z[1, 0], actions, 0)[..., 1:, :], zs[..., 1:, :], atol=1e-5)
    coarse = roll(z, window.action, 1)
    assert not np.allclose(coarse[..., 1:, :], zs[..., 1:, :], atol=1e-5)
    net = td.make_nets(SMALL, MODEL)["dynamics"]
    apply = lambda *x: net.apply(planner.nets["dynamics"], *x)  # noqa: E731
    chunk, now, x = td.chunks(SMALL, actions[0], 1), td.normalise(planner.stats, z), jnp.ones((F, Z))
    for other in ((now, x, 500.0, chunk, 1), (now, x, 10.0, chunk, 0), (now, x[::-1] * 2, 500.0, chunk, 0)):
        assert not np.allclose(apply(*other), apply(now, x, 500.0, chunk, 0), atol=1e-5)
    objective = lambda zs, a: td.score_by_objective(SMALL, MODEL, planner, zs, a)  # noqa: E731
    assert not np.allclose(objective(zs[0], actions), objective(zs[0], actions[:, ::-1]), atol=1e-6)
    assert not np.allclose(objective(zs[0], actions), objective(zs[0][:, ::-1], actions), atol=1e-6)


# --------------------------------------------------------------------------------------------------------- Learning
def test_every_loss_moves_its_own_network_and_none_the_world_model(made):
    planner, state = made
    windows, noise = make_windows(16), td.diffusion_noise(SMALL, MODEL, jax.random.key(0), 16)

    def losses(params, world):
        return td.diffusion_losses(SMALL, MODEL, params, state.stats, world, windows, noise)

    grads = jax.jit(jax.jacrev(losses))(state.params, planner.world)
    for name, of_nets in grads.items():
        moved = {net for net, grad in of_nets.items() if any(np.any(g) for g in jax.tree.leaves(grad))}
        assert moved == {name}


# --------------------------------------------------------------------------------------------------------- Planning
OBS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)


def call(planner, args=SMALL, key=0, best=None, first=False):
    best = jnp.zeros((3, F, A)) if best is None else best
    return td.act_by(args, MODEL, planner, OBS, best, jnp.full(3, first), jax.random.key(key))


def test_plans_depend_on_the_key_and_on_the_slow_copies_alone(made):
    (planner, state), args = made, changed(num_policy=0, warm_start=False)  # then all candidates are rho's
    action, best, failed, _ = call(planner, args)
    assert action.shape == (3, A) and best.shape == (3, F, A) and not failed.any()
    np.testing.assert_array_equal(action, best[:, 0])
    same = call(td.planner_of(state._replace(params=jitter(state.params, 1.0)), planner.world), args)
    np.testing.assert_array_equal(same[0], action)
    assert not np.array_equal(call(planner, args, key=1)[0], action)
    ema = td.planner_of(state._replace(ema=jitter(state.ema, 0.3)), planner.world)
    assert not np.array_equal(call(ema, args)[0], action)


def test_the_last_plan_shifted_by_one_is_a_candidate(made):
    planner, best = made[0], jnp.arange(F * A).reshape(F, A) / 10.0
    z, key = make_windows(1).z[0, 0], jax.random.key(0)
    later = static(td.propose)(SMALL, MODEL, planner, z, best, jnp.array(False), key)
    begin = static(td.propose)(SMALL, MODEL, planner, z, best, jnp.array(True), key)
    assert later.shape == (4 + 3 + 1, F, A)
    np.testing.assert_array_equal(later[-1], best[jnp.array([1, 2, 3, 3])])
    np.testing.assert_array_equal(begin[-1], begin[0])
    mean = td.policy(SMALL, MODEL, planner.world.params["pi"], z, jnp.zeros(A)).mean
    np.testing.assert_allclose(later[4, 0], mean, atol=1e-6)  # of the policy's candidates the first is without noise


def test_the_candidate_that_is_truly_best_is_played(made, monkeypatch):
    planner, seen = made[0], {}

    def truth(args, model, planner, zs, actions, key):
        seen["actions"], seen["returns"] = actions, -((actions - 0.3) ** 2).sum((1, 2))
        return seen["returns"]

    monkeypatch.setattr(td, "score", truth)
    plan = (SMALL, MODEL, planner, OBS[0], jnp.zeros((F, A)), jnp.array(True), jax.random.key(0))
    action, best, failed = td.plan_by_diffusion(*plan)
    np.testing.assert_array_equal(best, seen["actions"][np.argmax(seen["returns"])])
    np.testing.assert_array_equal(action, best[0])


def test_where_nothing_can_be_scored_the_policy_acts_and_that_is_counted(made):
    planner = made[0]
    broken = planner._replace(
        nets=planner.nets | {"dynamics": jax.tree.map(lambda p: p * jnp.nan, planner.nets["dynamics"])}
    )
    action, best, failed, _ = call(broken)
    assert failed.all() and (best == 0).all()
    z = MODEL.encoder.apply(planner.world.params["encoder"], OBS)
    mean = td.policy(SMALL, MODEL, planner.world.params["pi"], z, jnp.zeros((3, A))).mean
    np.testing.assert_allclose(action, mean, atol=1e-6)


def test_refinement_without_iterations_is_the_mean_of_the_best(made, monkeypatch):
    planner, seen = made[0], {}
    args, score = changed(planner="ssr_mppi", refine_iterations=0), td.score
    monkeypatch.setattr(td, "score", lambda *x: seen.setdefault("scores", (x[4], score(*x)))[1])
    plan = (args, MODEL, planner, OBS[0], jnp.zeros((F, A)), jnp.array(True), jax.random.key(0))
    action, best, failed = td.plan_by_diffusion(*plan)
    candidates, scores = seen["scores"]
    mean = candidates[np.argsort(-np.asarray(scores))[:3], :3].mean(0)
    np.testing.assert_allclose(best[:3], mean, atol=1e-6)
    np.testing.assert_allclose(action, mean[0], atol=1e-6)


def test_refinement_improves_on_the_value_of_where_it_starts(made):
    planner = made[0]
    z, candidates = make_windows(1).z[0, 0], make_windows(3).action[:, :F]
    args, world, heads = changed(refine_iterations=4, mppi_min_std=0.5), planner.world, jnp.array([0, 1])

    def worth(mean):
        return static(td.world_model.estimate_value)(
            args, MODEL, world.params, z[None], mean[:, None], world.discount, heads, jnp.zeros((1, A))
        )

    mean = static(td.refine)(args, MODEL, world, z, candidates, jax.random.key(0))
    assert float(worth(mean)[0]) > float(worth(candidates[:, :3].mean(0))[0])


def test_mppi_is_the_first_scripts_bit_for_bit(made):
    planner, mean = made[0], jnp.full((3, 3, A), 0.1)
    args = first_script.Args(**{f.name: getattr(SMALL, f.name) for f in dataclasses.fields(first_script.Args)
                                if f.name in dataclasses.asdict(SMALL) and f.name not in ("exp_name",)})  # fmt: skip
    model = first_script.make_model(args, 5, A, episodic=False)
    world, first = planner.world, jnp.zeros(3, bool)
    theirs = first_script.act(args, model, world.params, OBS, mean, first, world.discount, jax.random.key(0), False)
    best = jnp.zeros((3, F, A)).at[:, :3].set(mean)
    action, best, failed, key = call(planner, changed(planner="mppi"), best=best)
    np.testing.assert_array_equal(action, theirs[0])
    np.testing.assert_array_equal(best[:, :3], theirs[1])


# ---------------------------------------------------------------------------------------------------------- Measures
def test_rank_correlation_and_explained_variance_are_the_usual_ones():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=50).astype(np.float32)
    guess = (truth + rng.normal(size=50)).astype(np.float32)
    found = agreement(guess, truth)
    assert found["spearman"] == pytest.approx(spearmanr(guess, truth).statistic, abs=1e-5)
    assert found["r2"] == pytest.approx(1 - ((guess - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())
    futures = rng.normal(size=(200, F, 3)) + np.arange(F)[:, None]
    assert nmse(np.broadcast_to(futures.mean(0), futures.shape), futures)[0] == pytest.approx(
        ((futures - futures.mean(0)) ** 2).sum(-1).mean(0)[0]
        / ((futures - futures.mean((0, 1))) ** 2).sum(-1).mean(0)[0]
    )
    walk = np.cumsum(rng.normal(size=(2000, 3, 1)), 1)
    assert variety(rng.normal(size=(2000, 6, 2)) * 0.5)["std"] == pytest.approx(0.5, rel=0.05)
    assert variety(walk)["correlation"] > 0.4 > 0.1 > abs(variety(rng.normal(size=(2000, 6, 2)))["correlation"])


def test_the_rows_of_the_table_are_all_combinations_that_differ():
    args = changed(planner="ssr,pi", scorer="model,random", rollouts="diffusion,onestep")
    rows = [(row.planner, row.scorer, row.rollouts) for row in td.table_rows(args)]
    assert rows == [
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
    args = first_script.Args(task="cartpole-swingup", enc_dim=16, mlp_dim=16, latent_dim=16, num_q=2)
    model = first_script.make_model(args, 5, 1, episodic=False)
    state = jax.jit(first_script.fresh_state, static_argnums=(0, 1))(args, model)
    with ocp.CheckpointManager(folder / "world" / "checkpoints") as manager:
        write_checkpoint(
            manager, 1, {"script": "tdmpc2_jax", "args": dataclasses.asdict(args), "count": {}}, state=state
        )
    write_dataset(folder / "data", make_dataset(4, 30))
    return ["--world-model", str(folder / "world"), "--data-dir", str(folder / "data")]


TINY = """--width 16 --heads 2 --dynamics-blocks 1 --proposal-blocks 1 --objective-blocks 1 --future 4 --num-proposals 2
--num-policy 1 --diffusion-batch-size 8 --num-updates 400 --checkpoint-freq 100 --eval-freq 1000 --eval-episodes 1
--log-freq 20 --no-compile-cache""".split()
NAME = "cartpole-swingup/tdmpc2_jax_diffusion/1"


def final(folder):
    """The learning state in a run's last checkpoint, and what it says of itself."""
    checkpoint = find_checkpoint(folder)
    meta = meta_of(folder, "tdmpc2_jax_diffusion")
    args = td.with_preset(td.Args(**meta["args"]))
    like = jax.eval_shape(lambda: td.fresh(args, td.make_model(args, 5, 1, episodic=False)))
    return read_checkpoint(checkpoint, meta, **like), meta


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """Folder of a run that was not interrupted."""
    runs = tmp_path_factory.mktemp("finished")
    td.main([*files, *TINY, "--planner", "pi", "--runs-dir", str(runs)])  # compiled in less time
    return runs / NAME


def test_a_run_takes_task_and_sizes_from_its_world_model_and_leaves_curve_and_checkpoint(finished, files):
    found, meta = final(finished)
    assert meta["count"]["updates"] == 400 == int(found["state"].updates)
    assert (meta["args"]["task"], meta["args"]["mlp_dim"]) == ("cartpole-swingup", 16)
    assert (finished / "eval.csv").read_text().startswith("step,reward,success,seed\n400,")
    world = find_checkpoint(files[1])
    theirs = read_agent(world, read_meta(world, "tdmpc2_jax"), ("params",))
    jax.tree.map(np.testing.assert_array_equal, found["world"].params, theirs["params"])
    assert float(found["world"].discount) == pytest.approx(0.99)


def test_a_run_that_has_all_its_updates_says_so_and_does_not_ask_for_more_than_it_would_make(
    finished, files, tmp_path, capsys
):
    shutil.copytree(finished, tmp_path / NAME)
    td.main([*files, "--no-compile-cache", "--runs-dir", str(tmp_path), "--resume"])
    assert "all 400 updates have been made\n" in capsys.readouterr().out, "their number shapes the learning rate"


def test_the_table_has_a_row_for_each_combination_and_what_the_networks_know(finished, tmp_path, capsys):
    flags = "--planner ssr,pi --scorer random --eval-episodes 1 --no-compile-cache".split()
    programs = td.act_by._cache_size()
    td.main(["--evaluate", "--checkpoint", str(finished), *flags, "--json", str(tmp_path / "x.json")])
    assert td.act_by._cache_size() == programs + 2, "one program a row, compiled once"
    out, results = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    assert [(row["planner"], row["scorer"], len(row["returns"])) for row in results["table"]] == [
        ("ssr", "random", 1),
        ("pi", "-", 1),
    ]
    assert f"{results['table'][1]['returns'][0]:.1f}" in out and "p_d shuffled, scale 1" in out
    assert {*results["held_out"]["nmse"]["1"]} == {"copy", "p_d", "p_d shuffled", "d", "d shuffled"}
    assert {*results["held_out"]["advantages"]} == {f"{s} on {z}" for s in ("model", "J") for z in ("true", "p_d", "d")}
    assert {*results["held_out"]["actions"]} == {"rho", "recorded"}


def test_a_killed_run_ends_where_the_uninterrupted_one_does(finished, files, start, tmp_path):
    child = start(*files, *TINY, "--planner", "pi", small=False, name="tdmpc2_jax_diffusion.py")
    folder = tmp_path / "runs" / NAME
    wait_for(lambda: complete_checkpoints(folder), child)
    child.kill()
    child.wait()
    assert 100 <= meta_of(folder, "tdmpc2_jax_diffusion")["count"]["updates"] < 400
    again = ["--no-compile-cache", "--runs-dir", str(tmp_path / "runs"), "--resume"]
    with pytest.raises(SystemExit, match="--world-model"):
        td.main(["--world-model", str(shutil.copytree(files[1], tmp_path / "another")), *files[2:], *again])
    td.main([*files, *again])  # what is not said is as it was, in the run of the world model's task
    one, other = final(folder)[0]["state"], final(finished)[0]["state"]
    assert jax.random.key_data(one.key).tolist() == jax.random.key_data(other.key).tolist()
    close = partial(np.testing.assert_allclose, atol=1e-5)  # the child is compiled otherwise
    jax.tree.map(close, one._replace(key=0), other._replace(key=0))


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
        (["--scorer", "modell"], ["--scorer", "model, J, mix, random", "modell"]),
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
