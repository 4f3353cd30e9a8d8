# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # TD-MPC2, from the equations to pictures
#
# An agent that has learned a model of the world can ask it what would happen. This lecture looks into one: how it
# writes down rewards, what its states are, how it plans, and what is lost where a part is taken away. All functions
# are those of `tdmpc2_jax.py`, imported as `td`; what you change here changes what they compute. The agent is small
# (180,000 parameters) and swings up a pendulum, Gymnasium's Pendulum-v1: its motor is too weak to lift it at once,
# and each decision costs from 0 (it stands still, upright) to 16.
#
# It takes some minutes on two cores. To run it:
#
# ```bash
# pip install uv && uv pip install -e '.[notebook]' jupyterlab -c constraints.txt
# jupyter lab examples/lecture.ipynb
# ```

# %%
import contextlib
import csv
import dataclasses
import io
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import envs as environments
import tdmpc2_jax as td
from tdmpc2_support.agents.pretrained import read_record

ROOT = Path(td.__file__).parent
plt.rcParams |= {"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
BLUE, ORANGE, GREEN, GREY = "#1f6fb2", "#c8502d", "#3b8f4f", "#bbbbbb"

# %%
TASK = "Pendulum-v1"
# python tdmpc2_jax.py --task Pendulum-v1 --model-size 1 --enc-dim 64 --mlp-dim 128 --latent-dim 64 --batch-size 128
#   --num-samples 128 --num-elites 32 --num-pi-trajs 16 --total-timesteps 15000; then deploy.py --quantize float16
FILE = str(ROOT / "examples" / "pendulum.safetensors")
env = environments.make_envs(TASK, 1, seed=0)
args = td.cli.with_settings(td.Args(), read_record(FILE, "tdmpc2_jax")["args"])
agent = td.for_task(args.agent, TASK, env)  # all that defines it, hashable: the static argument of what is compiled
params = td.load_agent(FILE, None, partial(td.init_params, agent), "tdmpc2_jax").params
{name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}

# %% [markdown]
# ## How a number is written down
#
# Rewards and values of different tasks differ by orders of magnitude, so they are not regressed but classified: first
# squeezed by symlog, sign(x) log(1 + |x|), then spread over the two nearest of 101 bins, so that the mean of the bins
# is the number again. The loss is a cross entropy with these targets, and its gradient does not grow with the number.

# %%
returns = jnp.array([0.0, 0.4, 7.0, 150.0, 20_000.0])
targets = td.two_hot(agent, returns)
bins = np.linspace(agent.vmin, agent.vmax, agent.num_bins)
fig, axes = plt.subplots(1, 2, figsize=(10, 3))
x = np.linspace(-200, 200, 401)
axes[0].plot(x, td.symlog(x), color=BLUE)
axes[0].set(title="symlog", xlabel="x", ylabel="symlog(x)")
for i, (value, target) in enumerate(zip(returns, targets, strict=True)):
    shown = np.flatnonzero(target)
    axes[1].vlines(bins[shown], 0, target[shown], linewidth=5, color=f"C{i}", label=f"{value:,.1f}")
axes[1].legend(title="return")
axes[1].set(title="two-hot targets of five returns", xlabel="bin, in symlog space", ylim=(0, 1.1), xlim=(-1, 19))
plt.show()
print("back again:", td.two_hot_inv(agent, jnp.log(targets + 1e-9)))

# %% [markdown]
# ## What a state is: SimNorm
#
# A latent state is 64 numbers in eight groups; each group is a softmax, so a point of a simplex. Nothing in it can
# grow without bound when the model's predictions are fed back to it. Here are groups of three, that one can draw:
# normal numbers land inside the triangle, larger ones at its corners.

# %%
corners = np.array([[0, 0], [1, 0], [0.5, np.sqrt(0.75)]])
numbers = jax.random.normal(jax.random.key(0), (600, 3))
fig, axes = plt.subplots(1, 4, figsize=(11, 2.6), width_ratios=[1, 1, 1, 1.6])
for ax, scale in zip(axes, (0.3, 1.0, 4.0), strict=False):
    points = td.simnorm(scale * numbers, 3) @ corners
    ax.plot(*corners[[0, 1, 2, 0]].T, color=GREY)
    ax.plot(*points.T, ".", color=BLUE, markersize=2)
    ax.set(title=f"inputs × {scale:g}", aspect="equal", xticks=[], yticks=[])
    ax.axis("off")
obs, _ = env.reset(seed=7)  # it hangs
z = td.networks(agent).encoder.apply(params["encoder"], obs)[0]
axes[3].imshow(z.reshape(-1, agent.simnorm_dim), cmap="Blues", vmin=0, vmax=1)
axes[3].set(title="a latent state: rows sum to 1", xlabel="unit of a group", ylabel="group")
plt.show()

# %% [markdown]
# ## A plan
#
# MPPI draws action sequences from a Gaussian, beside some of the policy's, asks the model for their values, and fits
# the Gaussian to the best ones, six times. Below is that loop, written for one state as a lecture would write it,
# with the script's own draws (`plan_noise`) and the script's own value of a sequence (`estimate_value`). In the end
# it must agree with `td.plan`, and it is compared with it.

# %%
# Some seconds of an episode, to have states to plan from: it swings once to the other side, then up
mean, key = jnp.zeros((1, agent.horizon, agent.action_dim)), jax.random.key(3)
first = np.ones(1, bool)
observations, actions, rewards, means = [obs], [], [], [mean]
for _ in range(150):
    action, mean, key = td.act(agent, params, obs, mean, first, key, explore=False)
    obs, reward, *_ = env.step(np.asarray(action))
    first = np.zeros(1, bool)
    observations.append(obs)
    actions.append(np.asarray(action))
    rewards.append(float(reward[0]))
    means.append(mean)
angle = np.abs([np.arctan2(o[0, 1], o[0, 0]) for o in observations])
fig, axes = plt.subplots(1, 2, figsize=(10, 2.6))
axes[0].plot(np.degrees(angle), color=BLUE)
axes[0].set(title="angle from upright, degrees", xlabel="decision", ylim=(-5, 185), yticks=[0, 90, 180])
axes[1].plot(np.array(actions)[:, 0, 0], color=ORANGE, label="torque")
axes[1].plot(rewards, color=GREEN, label="reward")
axes[1].set(title="what it does, what it gets", xlabel="decision")
axes[1].legend(loc="lower left")
plt.show()

# %%
START = 40  # the decision that is looked at: it is nearly upright and has to brake
obs, last_mean = observations[START], means[START]
noise, heads = td.plan_noise(agent, jax.random.key(7), 1)


@partial(jax.jit, static_argnames="agent")
def rounds_of(agent, params, obs, last_mean, noise, heads):
    """All rounds of a plan for one state: sequences [H, N, A], values [N], elites, means and spreads [H, A] of each."""
    z = td.networks(agent).encoder.apply(params["encoder"], obs)  # [1, Z]
    of_policy, pi_z = [], z
    for t in range(agent.horizon):
        of_policy.append(td.policy(agent, params["pi"], pi_z, noise.pi[0, t]).action)
        pi_z = td.networks(agent).dynamics.apply(params["dynamics"], pi_z, of_policy[t])
    mean = jnp.roll(last_mean[0], -1, axis=0).at[-1].set(0.0)  # the last plan, one decision further
    std = jnp.full_like(mean, agent.max_std)
    rounds = []
    for i in range(agent.iterations):
        sampled = jnp.clip(mean[:, None] + std[:, None] * noise.sample[0, i], -1, 1)
        sequences = jnp.concatenate([jnp.stack(of_policy), sampled], axis=1)
        values = td.estimate_value(agent, params, z, sequences, heads[i], noise.terminal[0, i])
        best, elites = jax.lax.top_k(values, agent.num_elites)
        weights = jax.nn.softmax(agent.temperature * best)
        mean = jnp.einsum("e,hea->ha", weights, sequences[:, elites])
        variance = jnp.einsum("e,hea->ha", weights, (sequences[:, elites] - mean[:, None]) ** 2)
        std = jnp.clip(jnp.sqrt(variance), agent.min_std, agent.max_std)
        rounds.append((sequences, values, elites, mean, std))
    return rounds


rounds = rounds_of(agent, params, obs, last_mean, noise, heads)
plan = jax.jit(td.plan, static_argnums=(0, 7))
_, mean_of_script = plan(agent, params, obs, last_mean, np.zeros(1, bool), noise, heads, False)
print("largest difference to td.plan:", float(abs(mean_of_script[0] - rounds[-1][3]).max()))
assert np.allclose(mean_of_script[0], rounds[-1][3], atol=1e-4)

# %% [markdown]
# Top: all first and second actions that were tried, by round, elites in orange, the mean as a cross. The first round
# covers everything, the last one a spot (the dots far from it are the policy's sequences, which stay). Bottom left:
# the predicted returns of all sequences, those of the elites, and that of the mean. Bottom right: the spread of the
# Gaussian for each step of the plan, which ends at its lower bound where the model is sure.

# %%
fig, axes = plt.subplots(2, agent.iterations, figsize=(12, 5.6), height_ratios=[1, 1.2])
for i, (sequences, _values, elites, mean, _std) in enumerate(rounds):
    ax = axes[0, i]
    ax.plot(*sequences[:2, :, 0], ".", color=GREY, markersize=3)
    ax.plot(*sequences[:2, elites, 0], ".", color=ORANGE, markersize=3)
    ax.plot(*mean[:2, 0], "+", color="black", markersize=12)
    ax.set(title=f"round {i + 1}", xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal", xlabel="first action")
axes[0, 0].set_ylabel("second action")
for ax in axes[1]:
    ax.remove()
left, right = fig.add_subplot(2, 2, 3), fig.add_subplot(2, 2, 4)
number = np.arange(1, agent.iterations + 1)
z = td.networks(agent).encoder.apply(params["encoder"], obs)
of_mean = [
    td.estimate_value(agent, params, z, mean[:, None], two, noise.terminal[0, i, :1])[0]
    for i, (two, (*_, mean, _)) in enumerate(zip(heads, rounds, strict=True))
]
for i, (_, values, elites, *_) in enumerate(rounds):
    left.plot(np.full(len(values), i + 1) + 0.25 * np.random.default_rng(i).uniform(-1, 1, len(values)), values, ".",
              color=GREY, markersize=2, zorder=0)  # fmt: skip
    left.plot(np.full(len(elites), i + 1.0), values[elites], ".", color=ORANGE, markersize=4)
left.plot(number, of_mean, "o-", color="black", label="of the mean")
left.plot([], [], ".", color=ORANGE, label="of the elites")
left.plot([], [], ".", color=GREY, label="of all sequences")
lowest = np.quantile(rounds[0][1], 0.1)  # the worst of the first round are left out
left.set(title="predicted return", xlabel="round", xticks=number, xlim=(0.5, 9.5), ylim=(lowest, None))
left.legend(loc="center right")
stds = np.array([agent.max_std * np.ones((agent.horizon, 1)), *(std for *_, std in rounds)])[:, :, 0]
for t in range(agent.horizon):
    right.plot(np.arange(len(stds)), stds[:, t], "o-", label=f"step {t + 1} of the plan")
right.axhline(agent.min_std, color=GREY, linestyle="--", label="lower bound")
right.set(title="spread of the Gaussian", xlabel="after round", yscale="log", xlim=(-0.3, 10.5), xticks=range(7))
right.legend(loc="upper right")
fig.tight_layout()
plt.show()

# %% [markdown]
# ## Is the model right?
#
# The actions of the episode above are given to the model, from one of its states on, for 25 steps: far beyond the
# horizon of 3 that it was trained for. The rewards that it expects stand beside those that came. Its states are no
# observations, but a linear map, fitted to other episodes, reads observations off them.

# %%
model = td.networks(agent)


def imagine(z, actions):
    """Latent states [T+1, Z] and rewards [T] that the model expects of actions [T, A] from z [Z] on."""

    def step(z, action):
        reward = td.two_hot_inv(agent, model.reward.apply(params["reward"], z, action))
        z = model.dynamics.apply(params["dynamics"], z, action)
        return z, (z, reward)

    _, (zs, expected) = jax.lax.scan(step, z, actions)
    return jnp.concatenate([z[None], zs]), expected


def encode(obs):
    return model.encoder.apply(params["encoder"], obs)


rng = np.random.default_rng(0)
seen = []
others = environments.make_envs(TASK, 4, seed=5)
obs, _ = others.reset(seed=5)
mean, first = jnp.zeros((4, agent.horizon, agent.action_dim)), np.ones(4, bool)
for _ in range(100):
    action, mean, key = td.act(agent, params, obs, mean, first, key, explore=True)
    action = np.where(rng.random((4, 1)) < 0.3, rng.uniform(-1, 1, (4, 1)), action)  # not only where it is good
    obs, *_ = others.step(action.astype(np.float32))
    first = np.zeros(4, bool)
    seen.append(obs)
seen = np.concatenate(seen)
design = np.column_stack([encode(seen), np.ones(len(seen))])
read_off, *_ = np.linalg.lstsq(design, seen, rcond=None)

episode, done = np.concatenate(observations), np.concatenate(actions)
T = 25
fig, axes = plt.subplots(2, 3, figsize=(12, 5), sharex="col")
for line, start in zip(axes, (2, 40), strict=True):
    zs, expected = imagine(encode(episode[start]), done[start : start + T])
    guessed = np.column_stack([zs, np.ones(T + 1)]) @ read_off
    true = episode[start : start + T + 1]
    line[0].plot(rewards[start : start + T], color=GREY, linewidth=5, label="came")
    line[0].plot(expected, color=BLUE, label="expected")
    line[0].set(ylabel=f"from decision {start}", title="reward")
    line[1].plot(true[:, 0], color=GREY, linewidth=5)
    line[1].plot(guessed[:, 0], color=BLUE)
    line[1].set(title="cosine of the angle (1: upright)", ylim=(-1.3, 1.3))
    line[2].plot(true[:, 2], color=GREY, linewidth=5)
    line[2].plot(guessed[:, 2], color=BLUE)
    line[2].set(title="velocity")
    for ax in line:
        ax.axvspan(0, agent.horizon, color=ORANGE, alpha=0.15, linewidth=0)
for ax in axes[1]:
    ax.set_xlabel("steps ahead (shaded: the horizon)")
axes[0, 0].legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# ## What the value at the end adds
#
# A plan of three steps sees 0.15 seconds of a pendulum, while swinging up takes several seconds, in which it first has
# to lose height again. What is behind the horizon is the learned value's affair. Without it (all its weights set to
# zero: a value of 0 everywhere) the planner is greedy, and stays below.
#
# With the value the pendulum comes up from both starts whether a plan looks one step ahead or five: what the plan does
# not see, the value knows. (Early in training, when the value is wrong about states that the agent has not been in, a
# longer plan is no remedy: it lives in what model and value believe.)

# %%
blind = dict(params, q=jax.tree.map(jnp.zeros_like, params["q"]))
E = 2
playing = environments.make_envs(TASK, E, seed=11)
found = {}
for horizon in (1, 3, 5):
    of_horizon = dataclasses.replace(agent, horizon=horizon)
    for name, weights in (("with the value", params), ("without", blind)):
        result = td.evaluate(of_horizon, weights, playing, jax.random.key(0), 11)
        found[name, horizon] = result.returns
        print(f"H = {horizon}, {name:<15}", result.returns.round(0))
fig, ax = plt.subplots(figsize=(6, 3))
for i, (name, colour) in enumerate((("with the value", BLUE), ("without", GREY))):
    x = np.arange(3) + 0.2 * (2 * i - 1)
    ax.bar(x, [found[name, horizon].mean() for horizon in (1, 3, 5)], 0.36, color=colour, label=name)
    for j, horizon in enumerate((1, 3, 5)):
        ax.plot(np.full(E, x[j]), found[name, horizon], ".", color="black")
ax.set(xticks=range(3), xticklabels=["H = 1", "H = 3", "H = 5"], ylabel="return of an episode", title="dots: episodes")
ax.legend()
plt.show()

# %% [markdown]
# ## Learn
#
# Now a fresh agent: it balances a pole (Gymnasium's InvertedPendulum: 1 for every decision until it
# falls, a thousand at most; a random agent lasts for 5). The same function runs as on the command line.

# %%
FLAGS = """--task InvertedPendulum-v5 --num-envs 4 --total-timesteps 2000 --seed-steps 500 --buffer-size 10000
    --enc-dim 32 --mlp-dim 64 --latent-dim 32 --num-q 2 --batch-size 64 --num-samples 64 --num-elites 16
    --num-pi-trajs 8 --iterations 3 --eval-freq 500 --eval-episodes 2""".split()


def learn(name, seed=1):
    """Steps and mean returns of evaluations of a run that is made here, below runs/lecture."""
    folder = Path("runs/lecture/InvertedPendulum-v5") / name / str(seed)
    flags = ["--runs-dir", "runs/lecture", "--exp-name", name, "--seed", str(seed), "--resume"]
    with contextlib.redirect_stdout(io.StringIO()):
        td.main([*FLAGS, *flags])
    rows = list(csv.DictReader((folder / "eval.csv").open()))
    return [int(row["step"]) for row in rows], [float(row["reward"]) for row in rows]


curves = {"as it is": learn("as_it_is")}

# %% [markdown]
# ## Change a loss
#
# The model learns its states by predicting the next one (the first term of eq. 3). Is that needed, if it predicts
# rewards and values? Take it away and see. `td.train` has been compiled with the old loss, so what was compiled is
# forgotten first.
#
# **Your turn**: leave out the reward, the value, or the policy's entropy; train it for longer; try another seed, as
# one curve of one seed says little.

# %%
model_loss = td.model_loss


def without_consistency(agent, params, batch, next_z, target, noise):
    total, (zs, info) = model_loss(agent, params, batch, next_z, target, noise)
    return total - agent.consistency_coef * info["consistency_loss"], (zs, info)


td.model_loss = without_consistency
jax.clear_caches()
curves["without consistency"] = learn("without_consistency")
td.model_loss = model_loss
jax.clear_caches()

# %%
fig, ax = plt.subplots(figsize=(6, 3))
for (name, curve), colour in zip(curves.items(), (BLUE, ORANGE), strict=False):
    ax.plot(*curve, "o-", color=colour, label=name)
ax.set(title="InvertedPendulum-v5, one seed", xlabel="simulator steps", ylabel="return, mean of 2 episodes")
ax.legend()
plt.show()
