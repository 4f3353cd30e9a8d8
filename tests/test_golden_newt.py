"""Newt's numbers: same inputs, same recorded random draws, same outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN_DIR
from recordings import close, draws_of

import envs
import newt_jax as newt
import tdmpc2_jax as td
import tdmpc2_jax_mt as mt
from tdmpc2_support.agents.pretrained import from_torch, load_newt, padding_of, sizes_of
from tdmpc2_support.data.demonstrations import read_demonstrations

pytestmark = pytest.mark.golden


def settings(recording, key="cfg_"):
    return {k.removeprefix(key): v.item() for k, v in recording.items() if k.startswith(key) and v.ndim == 0}


@pytest.fixture(scope="module")
def recorded(golden):
    """Recording of updates, agent, tasks, params, target_q."""
    recording = golden("newt_update.npz")
    loaded = load_newt(str(golden("newt.pt")))
    config = settings(recording)
    shared = {name: config[name] for name in vars(newt.Agent()) if name in config and name not in ("model_size", "mpc")}
    shared |= sizes_of(loaded.params)
    action_dim = padding_of(loaded)["pad_action"]
    agent = newt.Agent(
        **{name: value for name, value in shared.items() if name not in ("task_dim", "obs_dim", "action_dim")},
        warmup_updates=config["warmup_steps"],
        constraint_start=config["constraint_start_step"],
        constraint_end=config["constraint_final_step"],
        obs_dim=padding_of(loaded)["pad_obs"],
        action_dim=action_dim,
        task_dim=loaded.task_emb.shape[1],
        num_tasks=len(loaded.task_emb),
    )
    assert agent.batch_size == recording["update0_in_obs"].shape[1] and not loaded.learned_emb
    T = agent.num_tasks
    mask = jnp.asarray(np.arange(action_dim) < recording["cfg_task_action"][:, None], jnp.float32)
    discount = jnp.asarray(recording["cfg_task_discounts"], jnp.float32)
    tasks = newt.Tasks(mask, discount, jnp.zeros(T), jnp.arange(T))
    return recording, agent, tasks, loaded.params | {"task_emb": loaded.task_emb}, loaded.target_q


def test_both_layouts_of_checkpoints_are_read_as_the_same_agent_with_its_masks(golden, recorded):
    recording, _, tasks, params, target_q = recorded
    other = load_newt(str(golden("newt_ddp.pt")))
    jax.tree.map(np.testing.assert_array_equal, params, other.params | {"task_emb": other.task_emb})
    jax.tree.map(np.testing.assert_array_equal, target_q, other.target_q)
    np.testing.assert_array_equal(params["task_emb"], recording["in_embeddings"])
    np.testing.assert_array_equal(tasks.mask, envs.load_pt(golden("newt.pt"))["model"]["_action_masks"])


def test_the_networks_equal_the_recording(recorded):
    recording, agent, tasks, params, target_q = recorded
    model = newt.networks(agent)
    obs, action, ids = (recording[f"parts_in_{k}"] for k in ("obs", "action", "task"))
    task = newt.task_input(agent, tasks, params["task_emb"], ids[0])
    z = model.encoder.apply(params["encoder"], obs[0], task.emb)
    close(z, recording["parts_z"], 1e-5)
    close(model.dynamics.apply(params["dynamics"], z, task.emb, action[0]), recording["parts_next"], 1e-5)
    close(model.reward.apply(params["reward"], z, task.emb, action[0]), recording["parts_reward_logits"], 1e-5)
    close(mt.q_logits(agent, params["q"], z, task.emb, action[0]), recording["parts_q_logits"], 1e-5)
    close(mt.q_logits(agent, target_q, z, task.emb, action[0]), recording["parts_q_target_logits"], 1e-5)
    pi = mt.policy(agent, params["pi"], z, task, draws_of(recording, "parts")[0])
    for field in pi._fields:
        close(getattr(pi, field), recording[f"parts_pi_{field}"], 1e-5)


def changes_are_close(mine, theirs, before):
    """Of every array the change since the checkpoint, too, whose single entries may be noise of Adam."""
    for x, y, start in zip(*map(jax.tree.leaves, (mine, theirs, before)), strict=True):
        close(x, y, 5e-5)
        change = np.linalg.norm(np.asarray(y) - start)
        assert np.linalg.norm(np.asarray(x) - y) <= 2e-3 * change


@pytest.mark.slow
def test_three_updates_of_the_pretraining_and_three_after_it_equal_the_recording(recorded):
    recording, agent, tasks, params, target_q = recorded
    state = newt.init_state(agent, params, target_q, 1.0, jax.random.key(0))
    update = jax.jit(newt.update, static_argnums=(0, 5))
    for i in range(6):
        pretraining = i < 3
        if i == 3:
            state = newt.after_pretraining(state)
        obs, action, reward, ids = (recording[f"update{i}_in_{k}"] for k in ("obs", "action", "reward", "task"))
        batch = newt.Batch(obs, action, reward[..., 0], np.zeros_like(reward[..., 0]), ids[0])
        draws = draws_of(recording, f"update{i}")
        pi_action = np.concatenate([draws[2], draws[2][:1]]) if pretraining else draws[2]
        pi_heads = draws[1][:2] if pretraining else draws[3][:2]
        noise = mt.UpdateNoise(draws[0], draws[1][:2], pi_action, pi_heads, None, None)
        rate = newt.learning_rate(agent, state.updates)
        close(rate, recording[f"update{i}_lr_pi"], 1e-6)
        close(rate * agent.enc_lr_scale, recording[f"update{i}_lr_encoder"], 1e-6)
        state, info = update(agent, tasks, state, batch, noise, pretraining)
        compared = 0
        for key, value in recording.items():
            name = key.removeprefix(f"update{i}_info_")
            if name != key and name in info:
                least = 1.0 if name.startswith("pi_") and name != "pi_grad_norm" else 1e-8
                assert abs(info[name] - value) <= 5e-5 * max(abs(value), least), key
                compared += 1
        assert compared >= (10 if pretraining else 12)
        close(state.q_scale, recording[f"update{i}_scale"], 5e-5)
        if i in (2, 5):
            prefix = f"update{i}_after_"
            after = from_torch({k.removeprefix(prefix): v for k, v in recording.items() if k.startswith(prefix)})
            changes_are_close(
                {k: state.params[k] for k in after.params}, after.params, {k: params[k] for k in after.params}
            )
            changes_are_close(state.target_q, after.target_q, target_q)
    np.testing.assert_array_equal(state.params["task_emb"], params["task_emb"])


@pytest.mark.parametrize("point", ["start", "half", "final", "late", "free"])
@pytest.mark.parametrize("mode", ["explore", "eval"])
def test_plans_for_three_tasks_at_once_equal_the_recording(recorded, golden, point, mode):
    _, agent, tasks, params, _ = recorded
    recording = golden("newt_plan.npz")
    n, H, A, P = 3, agent.horizon, agent.action_dim, agent.num_pi_trajs
    task = newt.task_input(agent, tasks, params["task_emb"], recording["in_task"])
    step = int(recording[f"{point}_step"])
    share = newt.prior_share(agent, None if step < 0 else step)
    plan = jax.jit(newt.plan, static_argnums=(0, 9))
    mean = np.zeros((n, H, A), np.float32)
    calls = [i for i in range(2) if f"{point}_{mode}{i}_action" in recording]
    assert calls
    for i in calls:
        draws = draws_of(recording, f"{point}_{mode}{i}")
        loop = draws[H : H + 3 * agent.iterations]
        noise = mt.PlanNoise(
            pi=np.stack([draw.reshape(n, P, A) for draw in draws[:H]], axis=1),
            sample=np.stack(loop[0::3], axis=1),
            terminal=np.stack(loop[1::3], axis=1),
            gumbel=draws[H + 3 * agent.iterations],
            exploration=draws[-1] if mode == "explore" else np.zeros((n, A), np.float32),
        )
        heads = np.stack(loop[2::3])[:, :2]
        obs, first = recording["in_obs"][i], recording["in_t0"][i].astype(bool)
        action, mean = plan(agent, params, obs, task, mean, first, share, noise, heads, mode == "explore")
        close(action, recording[f"{point}_{mode}{i}_action"], 1e-4)
        close(mean, recording[f"{point}_{mode}{i}_mean"], 1e-4)


def test_acting_by_the_policy_equals_the_recording(recorded, golden):
    _, agent, tasks, params, _ = recorded
    recording = golden("newt_plan.npz")
    task = newt.task_input(agent, tasks, params["task_emb"], recording["in_task"])
    z = newt.networks(agent).encoder.apply(params["encoder"], recording["in_obs"][2], task.emb)
    pi = mt.policy(agent, params["pi"], z, task, draws_of(recording, "policy_explore")[0])
    close(pi.action, recording["policy_explore_action"], 1e-5)
    close(pi.mean, recording["policy_eval_action"], 1e-5)


# ------------------------------------------------------------------------------------------------------------- Replay
RING = 50


def entries_of(recording, added):
    """What the recorded replays were given: the demonstrations, then so many episodes. In one column."""
    rows = [
        dict(zip(("obs", "action", "reward"), row, strict=True))
        for row in zip(
            recording["demos_obs"], recording["demos_action"], recording["demos_reward"].reshape(-1), strict=True
        )
    ]
    for i in range(added):
        for t in range(recording["added_length"][i] + 1):
            episode = 3 + i
            obs = np.zeros(12, np.float32)
            obs[:3] = recording["added_task"][i], episode, t
            action = np.zeros(4, np.float32)
            action[:2] = episode, t
            rows.append({"obs": obs, "action": action, "reward": 100 * episode + t})
    first = np.array([row["obs"][2] == 0 for row in rows])
    return td.Step(
        obs=np.stack([row["obs"] for row in rows])[:, None],
        action=np.nan_to_num([row["action"] for row in rows])[:, None].astype(np.float32),
        reward=np.nan_to_num([row["reward"] for row in rows])[:, None].astype(np.float32),
        terminated=np.zeros((len(rows), 1), bool),
        first=first[:, None],
    )


def filled(agent, capacity, steps):
    replay = td.init_replay(agent, capacity, 1)
    return newt.add_all(agent, replay, steps)


def in_queue(agent, replay, number):
    """Recorded episodes are numbered by the places of their last rows in the ring, ours by the time of their end."""
    size = int(replay.size)
    starts = np.asarray(replay.starts)[(int(replay.head) + np.arange(size)) % len(replay.starts)]
    ends = (starts + agent.horizon) % len(replay.first)
    return np.argsort(ends)[number]


@pytest.mark.parametrize("name, added", [("demos_only", 0), ("after4", 5), ("after8", 9)])
def test_batches_of_both_replays_equal_the_recording(golden, name, added):
    recording = golden("newt_buffer.npz")
    agent = newt.Agent(obs_dim=12, action_dim=4, batch_size=8)
    tasks = newt.Tasks(jnp.ones((1, 4)), jnp.ones(1), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    demos = filled(agent, len(recording["demos_obs"]), entries_of(recording, 0))
    online = filled(agent, RING, entries_of(recording, added))
    stored = np.asarray(online.obs)[: min(RING, int(online.rows)), 0]
    np.testing.assert_array_equal(stored[:, 1], recording[f"{name}_storage_episode"])
    np.testing.assert_array_equal(stored[:, 2], recording[f"{name}_storage_t"])
    draws = draws_of(recording, name)
    halves = []
    for replay, (number, place) in ((demos, draws[:2]), (online, draws[2:])):
        chosen = newt.WindowDraws(jnp.asarray(in_queue(agent, replay, number)), jnp.asarray(place, jnp.float32))
        halves.append(newt.windows(agent, tasks, replay, chosen))
    for field in ("obs", "action", "reward"):
        mine = np.concatenate([getattr(half, field) for half in halves], axis=1)
        np.testing.assert_array_equal(mine, recording[f"{name}_{field}"].reshape(mine.shape))


@pytest.mark.parametrize("version", ["0.10.0", "0.12.4"])
def test_demonstrations_of_mmbench_are_read(golden, tmp_path, version):
    if not (GOLDEN_DIR / "newt_demos.npz").exists():
        pytest.skip("these files were made once")
    recording = golden("newt_demos.npz")
    (tmp_path / "walker-walk.pt").write_bytes(golden(f"newt_demos_{version}.pt").read_bytes())
    episodes = read_demonstrations(("walker-walk",), tmp_path)
    assert [len(episode.reward) for episode in episodes] == [7, 7]
    for field in ("obs", "action", "reward"):
        mine = np.concatenate([getattr(episode, field) for episode in episodes])
        theirs = np.nan_to_num(recording[field])
        np.testing.assert_array_equal(mine, theirs.reshape(mine.shape))
