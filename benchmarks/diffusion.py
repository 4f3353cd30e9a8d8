"""What each part of latent diffusion MPC is worth: planners, scorers, roll-outs and candidates from one checkpoint.

    python benchmarks/diffusion.py --checkpoint runs/cartpole-swingup/tdmpc2_jax_diffusion/1 --folder diffusion \
        --json benchmarks/results/diffusion_cartpole.json --picture benchmarks/results/diffusion_cartpole.png

Every part is a command of tdmpc2_jax_diffusion.py, printed before it runs; a part that has been finished is not run
again. All act in the same episodes.
"""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import tdmpc2_jax as td
import tdmpc2_jax_diffusion as diffusion
from benchmarks.multitask import same_arguments
from tdmpc2_support.cli import with_settings
from tdmpc2_support.data.recorded import spread_out, windows_at
from tdmpc2_support.run.checkpoints import find_checkpoint, read_meta

ROOT = Path(__file__).parent.parent
PARTS = {  # flags of --evaluate
    "SSR": "--planner ssr --scorer model,random --rollouts diffusion,onestep",
    "without diffusion": "--planner mppi,pi",
    "refined": "--planner ssr_mppi --scorer model --rollouts diffusion,onestep",
    "other scorers": "--planner ssr --scorer J --rollouts diffusion",
    "policy's candidates alone": "--rollouts diffusion,onestep --num-proposals 0 --num-policy 48",
    "rho's candidates alone": "--rollouts diffusion,onestep --num-proposals 48 --num-policy 0",
    "p_d in 1 step": "--dynamics-steps 1",
    "p_d in 10 steps": "--dynamics-steps 10",
    "rho in 2 steps": "--rollouts diffusion,onestep --num-proposals 48 --num-policy 0 --proposal-steps 2",
}


@dataclasses.dataclass(frozen=True)
class Args:
    checkpoint: str
    """a run of tdmpc2_jax_diffusion.py, whose episodes are still where it found them"""
    folder: str
    """folder for the results of the parts"""
    json: str | None = None
    """write all results to this file"""
    picture: str | None = None
    """draw the table, and futures as they were imagined and as they came"""
    parts: str = ",".join(PARTS)
    """parts to run"""
    episodes: int = 5
    """episodes of each row"""
    seed: int = 100
    """of the episodes"""
    add: tuple[str, ...] = ()
    """results of --evaluate --json of runs that have learned otherwise, to be kept beside these: NAME=FILE"""


def evaluation(args: Args, part: str) -> dict:
    """What --evaluate says of a part."""
    path = Path(args.folder).absolute() / f"{part.replace(' ', '-')}.json"
    if not path.exists():
        words = f"--evaluate {PARTS[part]} --eval-episodes {args.episodes} --seed {args.seed}".split()
        words += ["--checkpoint", args.checkpoint, "--json", str(path)]
        print(f"\n$ python tdmpc2_jax_diffusion.py {shlex.join(words)}", flush=True)
        subprocess.run([sys.executable, ROOT / "tdmpc2_jax_diffusion.py", *words], check=True)
    return json.loads(path.read_text())


def load(checkpoint: str):
    """Agent, planner, learning state and recorded episodes of an offline run of one task."""
    meta = read_meta(find_checkpoint(checkpoint), *diffusion.SCRIPTS)
    args = with_settings(diffusion.Args(), meta["args"])
    args = dataclasses.replace(args, checkpoint=checkpoint, eval_episodes=1)
    (agent,) = diffusion.agents_of(args)
    world, state = diffusion.read_run(args, agent)
    return agent, diffusion.planner_of(state, world), state, diffusion.encoded(args, agent, world)


def imagined(checkpoint: str, number: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rewards [B, F] and values [B, F+1] that the world model's heads see in held-out futures: true, p_d's, d's."""
    agent, planner, _, data = load(checkpoint)
    windows = windows_at(data, spread_out(data.held_out, number), diffusion.window_steps(agent))
    futures = diffusion.answers(agent, planner, windows, jax.random.key(0))["futures"]["1"]
    actions = windows.action[:, : agent.future]
    decoded = {}
    for name in ("true", "p_d", "d"):
        zs = jnp.concatenate([windows.z[:, :1], futures[name]], axis=1)
        logits = td.networks(agent).reward.apply(planner.world.params["reward"], zs[:, :-1], actions)
        rewards = np.asarray(td.two_hot_inv(agent, logits))
        decoded[name] = rewards, np.asarray(diffusion.value(agent, planner.world, zs))
    return decoded


def draw(results: dict, decoded: dict, path: str) -> None:
    """Left the table as bars, right rewards and values of some held-out futures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 5), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=[2.2, 1, 1, 1])
    bars = figure.add_subplot(grid[:, 0])
    labels, means, errors = [], [], []
    for row in results["table"]:
        part = "" if row["part"] in ("SSR", "without diffusion", "refined", "other scorers") else f" ({row['part']})"
        labels.append(" ".join(row[k] for k in ("planner", "scorer", "rollouts") if row[k] != "-") + part)
        means.append(np.mean(row["returns"]))
        errors.append(np.std(row["returns"], ddof=1) / np.sqrt(len(row["returns"])))
    bars.barh(labels[::-1], means[::-1], xerr=errors[::-1], color="tab:blue")
    bars.set_xlabel(f"return in {results['task']}, ± standard error")
    for column in range(3):
        for line, (name, i) in enumerate((("reward", 0), ("value", 1))):
            axes = figure.add_subplot(grid[line, 1 + column])
            for kind, style in (("true", "k-"), ("p_d", "tab:blue"), ("d", "tab:orange")):
                axes.plot(decoded[kind][i][column], style, label=kind, linewidth=1.2)
            axes.set_title(f"{name} in held-out future {column + 1}", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.legend(fontsize=7) if line == column == 0 else None
    figure.savefig(path, dpi=110)


def main(args: Args) -> None:
    if unknown := set(filter(None, args.parts.split(","))) - set(PARTS):
        sys.exit(f"error: {', '.join(sorted(unknown))}: parts are {', '.join(PARTS)}")
    same_arguments(Path(args.folder), {name: getattr(args, name) for name in ("checkpoint", "episodes", "seed")})
    results = {"table": []}
    for part in filter(None, args.parts.split(",")):
        found = evaluation(args, part)
        results = {"task": found["task"], "held_out": results.get("held_out", found["held_out"])} | results
        results["table"] += [{"part": part} | row for row in found["table"]]
        if "p_d" in part:
            results.setdefault("nmse", {})[part] = found["held_out"]["nmse"]["1"]["p_d"]
    print(f"\n{'part':<28}{'planner':<10}{'scorer':<8}{'roll-outs':<11}{'return':>8} {'± error':>8}")
    for row in results["table"]:
        mean, error = np.mean(row["returns"]), np.std(row["returns"], ddof=1) / np.sqrt(len(row["returns"]))
        print("{part:<28}{planner:<10}{scorer:<8}{rollouts:<11}".format(**row) + f"{mean:>8.1f} {error:>8.1f}")
    results |= {"learned_otherwise": {k: json.loads(Path(f).read_text()) for k, f in (x.split("=") for x in args.add)}}
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    if args.picture:
        draw(results, imagined(args.checkpoint, 3), args.picture)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
