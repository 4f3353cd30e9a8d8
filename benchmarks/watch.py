"""What does an agent of tdmpc2_jax.py imagine while it acts: an episode as a film, beside its planner's futures.

    python benchmarks/watch.py --checkpoint runs/cartpole-swingup/tdmpc2_jax/1 --output futures.mp4
    python benchmarks/watch.py --checkpoint RUN --output futures.mp4 --horizon 10 --steps 200 --stills 4

Left the episode. Top right the last round of the plan for this very state: rewards that the world model expects of each
sampled action sequence, step by step, elites bright, in black of the plan that they are averaged to. Middle: values of
all sequences, which are rewards over the horizon and the learned value behind it, round by round. Below: the rewards
that came, and what the plan had expected of them one step and one horizon before. A longer --horizon than the agent's
shows how far its model carries. The plans are the script's own: `estimate_value` is listened to while `plan` calls it.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

import envs as environments  # noqa: E402
import tdmpc2_jax as td  # noqa: E402
from tdmpc2_support.agents.pretrained import load_agent, read_record  # noqa: E402
from tdmpc2_support.bounds import Count, Natural, NewFile  # noqa: E402
from tdmpc2_support.run.video import write_video  # noqa: E402

ELITE, SAMPLE, PLAN, CAME = "#e07a3f", "#9aa7b4", "black", "#1f6fb2"


@dataclasses.dataclass(frozen=True)
class Args:
    checkpoint: str  # a run of tdmpc2_jax.py, a checkpoint of it, or a small file that deploy.py has made
    output: NewFile  # the film, an .mp4
    horizon: Count | None = None  # steps of a plan, if not the agent's own
    steps: Count = 250  # decisions that are shown, at most
    stills: Natural = 0  # also write so many single frames, as OUTPUT-NUMBER.png
    seed: Natural = 0  # of the environment


class Rounds(NamedTuple):
    """What one plan has looked at."""

    sequences: np.ndarray  # [iterations, H, N, A]
    values: np.ndarray  # [iterations, N]
    elites: np.ndarray  # [num_elites] of the last round
    mean: np.ndarray  # [H, A] that it ends with
    rewards: np.ndarray  # [H, N] expected of the sequences of the last round
    rewards_of_mean: np.ndarray  # [H]


def load(args: Args):
    """The agent, its parameters and its task."""
    record = read_record(args.checkpoint, *td.SCRIPTS)["args"]
    settings = td.cli.with_settings(td.Args(), record)
    with contextlib.closing(environments.make_envs(settings.task, 1)) as envs:
        agent = td.for_task(settings.agent, settings.task, envs)
    params = load_agent(args.checkpoint, None, partial(td.init_params, agent), *td.SCRIPTS).params
    agent = dataclasses.replace(agent, mpc=True, horizon=args.horizon or agent.horizon)
    return agent, params, settings.task


@partial(jax.jit, static_argnames="agent")
def expected_rewards(agent: td.Agent, params, obs, actions) -> jax.Array:
    """Rewards [H, N] that the world model expects of action sequences [H, N, A] from obs [O] on."""
    model = td.networks(agent)

    def step(z, action):
        reward = td.two_hot_inv(agent, model.reward.apply(params["reward"], z, action))
        return model.dynamics.apply(params["dynamics"], z, action), reward

    z = model.encoder.apply(params["encoder"], obs)
    return jax.lax.scan(step, jnp.broadcast_to(z, (actions.shape[1], agent.latent_dim)), actions)[1]


class Listener:
    """`td.plan`, compiled so that it tells what its calls of `estimate_value` were asked and what they answered."""

    def __init__(self, agent: td.Agent, params):
        self.agent, self.params = agent, params
        self.heard: list[tuple] = []
        self.noise = jax.jit(partial(td.plan_noise, agent, n=1))
        estimate_value = td.estimate_value

        def overheard(agent, params, z, actions, heads, eps):
            values = estimate_value(agent, params, z, actions, heads, eps)
            jax.debug.callback(lambda *call: self.heard.append(call), eps, actions, values)
            return values

        def plan(*inputs):
            with mock.patch.object(td, "estimate_value", overheard):  # while it is traced
                return td.plan(agent, *inputs, explore=False)

        self.plan = jax.jit(plan)

    def __call__(self, obs, mean, first, key) -> tuple[np.ndarray, Any, Rounds]:
        """Action [1, A], the planner's mean, and what it has looked at, for obs [1, O]."""
        self.heard.clear()
        noise, heads = self.noise(key)
        action, mean = self.plan(self.params, obs, mean, first, noise, heads)
        jax.block_until_ready(mean)
        jax.effects_barrier()
        drawn = np.asarray(noise.terminal[0])  # [iterations, N, A]: tells which round a call was of
        order = [next(i for i, eps in enumerate(drawn) if np.array_equal(eps, call[0])) for call in self.heard]
        _, sequences, values = zip(*(self.heard[order.index(i)] for i in range(len(drawn))), strict=True)
        elites = np.argsort(-values[-1])[: self.agent.num_elites]
        rewards = expected_rewards(self.agent, self.params, obs[0], sequences[-1])
        of_mean = expected_rewards(self.agent, self.params, obs[0], mean[0][:, None])[:, 0]
        rows = np.stack(sequences), np.stack(values), elites, np.asarray(mean[0]), np.asarray(rewards)
        return np.asarray(action), mean, Rounds(*rows, np.asarray(of_mean))


def episode(args: Args, agent: td.Agent, params, task: str) -> Iterator[tuple[np.ndarray, Rounds, float]]:
    """Picture, plan and reward of every decision."""
    listener, key = Listener(agent, params), jax.random.key(args.seed)
    with contextlib.closing(environments.make_envs(task, 1, args.seed, render_mode="rgb_array")) as envs:
        obs, _ = envs.reset(seed=args.seed)
        mean, first = jnp.zeros((1, agent.horizon, agent.action_dim)), np.ones(1, bool)
        for step in range(args.steps):
            picture = envs.render()[0]
            action, mean, rounds = listener(obs, mean, first, jax.random.fold_in(key, step))
            obs, reward, terminated, truncated, _ = envs.step(action)
            first = np.zeros(1, bool)
            yield picture, rounds, float(reward[0])
            if terminated[0] or truncated[0]:
                return


class Canvas:
    """Draws frame after frame on one figure; axes keep their limits, so that nothing jumps."""

    def __init__(self, agent: td.Agent, task: str, seen: list[tuple[np.ndarray, Rounds, float]]):
        self.agent, self.seen = agent, seen
        self.figure = plt.figure(figsize=(10.24, 5.12), dpi=100)
        grid = self.figure.add_gridspec(3, 2, width_ratios=[1, 1.15], left=0.02, right=0.98, top=0.93, bottom=0.1)
        self.picture = self.figure.add_subplot(grid[:, 0])
        self.axes = [self.figure.add_subplot(grid[i, 1]) for i in range(3)]
        self.figure.subplots_adjust(hspace=0.85, wspace=0.16)
        self.figure.suptitle(task, x=0.02, ha="left", fontweight="bold")
        rewards = np.concatenate([[reward for *_, reward in seen], *(rounds.rewards.ravel() for _, rounds, _ in seen)])
        values = np.concatenate([rounds.values.ravel() for _, rounds, _ in seen])
        self.reward_limits = padded(*np.percentile(rewards, [0.2, 99.8]))
        self.value_limits = padded(*np.percentile(values, [0.5, 99.9]))

    def draw(self, number: int) -> np.ndarray:
        """The frame of this decision, uint8 [height, width, 3]."""
        picture, rounds, _ = self.seen[number]
        for axes in (self.picture, *self.axes):
            axes.clear()
        self.picture.imshow(picture)
        self.picture.axis("off")
        self.picture.set_title(f"decision {number + 1}", fontsize=9, loc="right")
        self.futures(self.axes[0], rounds)
        self.rounds(self.axes[1], rounds)
        self.past(self.axes[2], number)
        self.figure.canvas.draw()
        return np.asarray(self.figure.canvas.buffer_rgba())[..., :3].copy()

    def futures(self, axes, rounds: Rounds) -> None:
        steps = np.arange(1, self.agent.horizon + 1)
        others = np.setdiff1d(np.arange(rounds.rewards.shape[1]), rounds.elites)
        marker = "." if self.agent.horizon == 1 else None
        axes.plot(steps, rounds.rewards[:, others], color=SAMPLE, linewidth=0.6, alpha=0.35, marker=marker)
        axes.plot(steps, rounds.rewards[:, rounds.elites], color=ELITE, linewidth=0.9, alpha=0.6, marker=marker)
        axes.plot(steps, rounds.rewards_of_mean, color=PLAN, linewidth=1.8, marker=marker)
        axes.set_title(
            "reward expected of each sampled future (bright: elites, black: the plan)", fontsize=9, loc="left"
        )
        axes.set(xlim=(0.95, max(steps[-1], 1.5) + 0.05), ylim=self.reward_limits, xticks=steps)
        axes.set_xlabel("decisions ahead", fontsize=8)
        axes.tick_params(labelsize=8)

    def rounds(self, axes, rounds: Rounds) -> None:
        count = len(rounds.values)
        for i, values in enumerate(rounds.values):
            elites = np.argsort(-values)[: self.agent.num_elites]
            spread = 0.3 * np.sin(7919.0 * np.arange(len(values)))  # the same in every frame
            colours = np.where(np.isin(np.arange(len(values)), elites), ELITE, SAMPLE)
            axes.scatter(values, i + 1 + spread, s=2, c=colours, alpha=0.6, linewidths=0)
        axes.set_title("value of each sampled future, round by round of the plan", fontsize=9, loc="left")
        axes.set(xlim=self.value_limits, ylim=(count + 0.7, 0.3), yticks=range(1, count + 1))
        axes.set_xlabel("rewards over the horizon + value behind it", fontsize=8)
        axes.tick_params(labelsize=8)

    def past(self, axes, number: int) -> None:
        H = self.agent.horizon
        done = np.arange(number + 1)
        came = np.array([reward for *_, reward in self.seen])
        axes.plot(done + 1, came[: number + 1], color=CAME, linewidth=3, alpha=0.5, label="came")
        for ahead, style in ((1, "-"), (H, ":")):
            expected = [self.seen[i - ahead + 1][1].rewards_of_mean[ahead - 1] for i in done if i - ahead + 1 >= 0]
            first = number + 2 - len(expected)
            name = f"expected {ahead} ahead"
            axes.plot(np.arange(first, number + 2), expected, PLAN, linestyle=style, linewidth=1, label=name)
            if H == 1:
                break
        axes.set_title("reward", fontsize=9, loc="left")
        axes.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=3, frameon=False)
        axes.set(xlim=(0, len(self.seen)), ylim=self.reward_limits)
        axes.set_xlabel("decision", fontsize=8)
        axes.tick_params(labelsize=8)


def padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * max(high - low, 1e-3)
    return low - margin, high + margin


def main(args: Args) -> None:
    with td.cli.errors_as_sentences():
        td.cli.check_fields(args)
        agent, params, task = load(args)
        environments.check_rendering(task)
        seen = list(episode(args, agent, params, task))
        canvas = Canvas(agent, task, seen)
        frames = [canvas.draw(number) for number in range(len(seen))]
        write_video(Path(args.output), frames, fps=15)
        print(f"{args.output}: {len(frames)} decisions of {task}, return {sum(reward for *_, reward in seen):.1f}")
        for i, number in enumerate(np.linspace(0, len(frames) - 1, args.stills).astype(int)):
            path = Path(args.output).with_name(f"{Path(args.output).stem}-{i}.png")
            matplotlib.image.imsave(path, frames[number])
            print(path)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
