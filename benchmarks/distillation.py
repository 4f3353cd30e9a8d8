"""Distillation on a CPU: do students with a teacher predict rewards better?

    python benchmarks/distillation.py --folder FOLDER --json benchmarks/results/distillation.json

The experiment: episodes of a few tasks by smooth random actions, an agent that learns from them (the teacher), and
students of a quarter of its size that learn from the same episodes for as many updates with and without it. Judged on
episodes that nobody has learned from: the root mean square error of the reward that a student expects of an entry, in
its own latent state. Every stage is a command of the script, printed before it runs; one that is finished is not run
again.
"""

import csv
import dataclasses
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import envs as environments
import tdmpc2_jax_mt as mt
from benchmarks.multitask import call


@dataclasses.dataclass(frozen=True)
class Args:
    folder: str
    """folder for episodes and runs"""
    json: str | None = None
    """write the results to this file"""
    tasks: str = "cartpole-balance,cartpole-swingup,pendulum-spin"
    """tasks to learn together"""
    episodes: int = 32
    """episodes of each task to learn from"""
    held_out: int = 8
    """episodes of each task to judge by"""
    teacher_updates: int = 3000
    """updates of the teacher"""
    updates: int = 1000
    """updates of a student"""
    seeds: int = 3
    """students with and without the teacher"""
    teacher: str = "--enc-dim 128 --mlp-dim 256 --latent-dim 128"
    """sizes of the teacher"""
    student: str = "--enc-dim 64 --mlp-dim 112 --latent-dim 64"
    """sizes of the students"""
    common: str = (
        "--num-q 2 --task-dim 32 --batch-size 128 --num-samples 64 --num-elites 16 --num-pi-trajs 8 --iterations 3 "
        "--eval-episodes 5"
    )
    """further arguments of all runs"""


def collect(folder: Path, task: str, episodes: int, seed: int) -> None:
    """Writes episodes of smooth random actions: their noise lasts from 1 to 50 decisions, another in every episode."""
    envs, writer = environments.make_envs(task, episodes, seed), environments.EpisodeWriter(folder, task, episodes)
    rng, (obs, _) = np.random.default_rng(seed), envs.reset(seed=seed)
    keep = 1 - 1 / rng.uniform(1, 50, (episodes, 1))
    noise = rng.normal(size=(episodes, *envs.single_action_space.shape))
    action, reward, length = np.zeros(noise.shape, np.float32), np.zeros(episodes), environments.task_spec(task)
    for step in range(length.episode_length + 1):
        writer.add(obs, action, reward, np.full(episodes, step == 0))
        noise = keep * noise + np.sqrt(1 - keep**2) * rng.normal(size=noise.shape)
        action = np.clip(noise, -1, 1).astype(np.float32)
        obs, reward, *_ = envs.step(action)
    writer.flush()
    envs.close()


def reward_errors(run: Path, data: environments.Dataset) -> dict[str, float]:
    """Root mean square error of a run's reward predictions for all entries of a dataset, of all tasks and of each."""
    agent, loaded = mt.load_agent(mt.Args(checkpoint=str(run)))
    batch, rows = data.read(0, data.num_entries), []
    first = np.concatenate([np.arange(c.task.size) % c.obs.shape[1] == 0 for c in data.chunks])
    before, after = np.flatnonzero(~first) - 1, np.flatnonzero(~first)  # an entry holds the action that led to it
    predict = jax.jit(partial(mt.predict_reward, agent, loaded.params))
    task = batch["task"][before].astype(int)
    for part in np.array_split(np.arange(len(before)), 20):
        rows.append(predict(batch["obs"][before[part]], batch["action"][after[part]], task[part]))
    error = np.concatenate(rows) - batch["reward"][after]
    found = {name: error[task == i] for i, name in enumerate(data.tasks)} | {"all": error}
    return {name: float(np.sqrt(np.mean(values**2))) for name, values in found.items()}


def experiment(args: Args) -> dict[str, Any]:
    """Collects, teaches, and compares; prints the table."""
    folder, tasks, results = Path(args.folder).absolute(), tuple(args.tasks.split(",")), {"students": []}
    for name, episodes, seed in (("data", args.episodes, 1), ("held-out", args.held_out, 2)):
        for task in tasks:
            if not any((folder / name / task).glob("chunk_*.pt")):
                collect(folder / name, task, episodes, seed)
    held_out = environments.load_dataset(tasks, folder / "held-out")
    reward = held_out.read(0, held_out.num_entries)["reward"]
    results["reward_std"] = float(reward.std())

    def train(name: str, seed: int, updates: int, *flags: str) -> dict[str, Any]:
        lengths = f"--num-updates {updates} --eval-freq {updates} --checkpoint-freq {updates} --resume --seed {seed}"
        common = f"--tasks {args.tasks} --data-dir data --exp-name {name}"
        call(folder, "tdmpc2_jax_mt.py", common, lengths, args.common, *flags)
        (run,) = (folder / "runs").glob(f"*/{name}/{seed}")
        rows = list(csv.DictReader((run / "eval.csv").open()))[-len(tasks) :]
        row = {"errors": reward_errors(run, held_out), "returns": {r["task"]: float(r["reward"]) for r in rows}}
        count = sum(x.size for x in jax.tree.leaves(mt.load_multitask(str(run), (), "tdmpc2_jax_mt").params))
        return row | {"parameters": count, "run": str(run.relative_to(folder))}

    results["teacher"] = train("teacher", 1, args.teacher_updates, args.teacher)
    path = results["teacher"]["run"]
    for seed in range(1, args.seeds + 1):
        for name, flags in (("alone", ()), ("distilled", (f"--teacher {path}",))):
            results["students"].append(
                {"kind": name, "seed": seed} | train(name, seed, args.updates, args.student, *flags)
            )
    print(f"\nreward: standard deviation {results['reward_std']:.3f}; errors (rms) on held-out episodes, returns")
    print(f"{'':<12}{'parameters':>11}{'error':>9}  " + "  ".join(f"{task:>17}" for task in tasks))
    for row in ({"kind": "teacher", "seed": 1} | results["teacher"], *results["students"]):
        returns = "  ".join(f"{row['errors'][task]:>8.4f} {row['returns'][task]:>8.1f}" for task in tasks)
        print(f"{row['kind']:<10}{row['seed']:>2}{row['parameters']:>11}{row['errors']['all']:>9.4f}  {returns}")
    return results


def main(args: Args) -> None:
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    results = {"arguments": dataclasses.asdict(args) | {"folder": None, "json": None}, "cpu_cores": os.cpu_count()}
    results |= {"device": jax.devices()[0].device_kind, "jax_version": jax.__version__}
    results |= experiment(args)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
