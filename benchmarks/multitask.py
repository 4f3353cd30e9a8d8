"""From nothing to a fine-tuned agent, on a CPU: collect tasks online, learn them all offline, fold, fine-tune on one.

    python benchmarks/multitask.py --folder FOLDER --json benchmarks/results/multitask_cpu.json

Every stage is a command of the scripts, printed before it runs; a stage that has been finished is not run again.
"""

import csv
import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Args:
    folder: str
    """folder for runs, episodes and evaluations"""
    json: str | None = None
    """write the results to this file"""
    tasks: str = "cartpole-balance:16000,pendulum-spin:16000,walker-stand:40000"
    """tasks to collect and to learn together, each with the simulator steps of its collecting run; as long, its agent
    then acts in eight environments without learning"""
    fine_tune: str = "walker-stand:walker-stand"
    """pairs SOURCE:TASK: the task to fine-tune on and the learned one to start from"""
    updates: int = 12_000
    """updates of the multi-task agent"""
    fine_tune_steps: int = 5_000
    """simulator steps of fine-tuning and of learning from scratch beside it"""
    episodes: int = 10
    """episodes of each final evaluation"""
    sizes: str = (
        "--enc-dim 128 --mlp-dim 192 --latent-dim 64 --num-q 2 --num-samples 128 --num-elites 32 --num-pi-trajs 16 "
        "--iterations 4"
    )
    """a model and a planner small enough for a CPU"""
    online: str = "--batch-size 128 --seed-steps 1000"
    """further arguments of the online runs"""
    offline: str = "--batch-size 256"
    """further arguments of the multi-task run"""


def call(folder: Path, script: str, *flags) -> None:
    """Runs a script in the folder; its output goes on to the terminal."""
    words = [str(word) for flag in flags for word in (shlex.split(flag) if isinstance(flag, str) else [flag])]
    print(f"\n$ python {script} {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, ROOT / script, *words], cwd=folder, check=True)


def evaluation(folder: Path, script: str, name: str, episodes: int, *flags) -> dict:
    """The results of an evaluation, made if they are not there yet."""
    path = folder / f"{name}.json"
    if not path.exists():
        call(folder, script, f"--evaluate --eval-episodes {episodes} --seed 100 --json {path.name}", *flags)
    return json.loads(path.read_text())


def same_arguments(folder: Path, arguments: dict) -> None:
    """Refuses a folder whose results were made with others: what has been finished is not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    told = folder / "arguments.json"
    text = json.dumps(arguments)
    if told.exists() and told.read_text() != text:
        sys.exit(f"error: {folder} holds results of other arguments: choose another --folder")
    told.write_text(text)


def curve(folder: Path) -> list[list[float]]:
    """[simulator step, return] of each evaluation of a run."""
    return [[int(row["step"]), float(row["reward"])] for row in csv.DictReader((folder / "eval.csv").open())]


def main(args: Args) -> None:
    folder, online = Path(args.folder).absolute(), "tdmpc2_jax.py"
    steps_of = dict(pair.split(":") for pair in args.tasks.split(","))
    same_arguments(folder, dataclasses.asdict(args) | {"folder": None, "json": None})
    results = {"arguments": dataclasses.asdict(args) | {"folder": None, "json": None}, "tasks": {}, "fine_tuning": {}}

    for task, steps in steps_of.items():
        freq = f"--total-timesteps {steps} --eval-freq {int(steps) // 4} --checkpoint-freq {int(steps) // 4}"
        flags = f"--task {task} --exp-name collect --save-episodes data --resume --eval-episodes 5"
        call(folder, online, flags, freq, args.sizes, args.online)
        path = f"runs/{task}/collect/1"
        flags = f"--task {task} --exp-name collect-more --save-episodes data --resume --checkpoint {path} --num-envs 8"
        lengths = f"--total-timesteps {steps} --seed-steps 1000000 --buffer-size 1100000"  # it never learns
        lengths += f" --eval-freq 1000000 --eval-episodes 5 --checkpoint-freq {int(steps) // 2}"
        call(folder, online, flags, lengths, args.sizes, "--batch-size 128")
        found = evaluation(folder, online, f"collect-{task}", args.episodes, f"--checkpoint {path}")
        results["tasks"][task] = {"collector": found["mean"]}

    freq = f"--num-updates {args.updates} --eval-freq {args.updates // 4} --checkpoint-freq {args.updates // 4}"
    flags = f"--tasks {','.join(steps_of)} --data-dir data --resume --eval-episodes 5"
    call(folder, "tdmpc2_jax_mt.py", flags, freq, args.sizes, args.offline)
    (agent,) = (folder / "runs").glob("*/tdmpc2_jax_mt/1")
    path = agent.relative_to(folder)
    found = evaluation(folder, "tdmpc2_jax_mt.py", "multitask", args.episodes, f"--checkpoint {path}")
    for task, row in found["tasks"].items():
        results["tasks"][task] |= {"multitask": row["mean"], "share": row["mean"] / results["tasks"][task]["collector"]}
    results["share"] = sum(row["share"] for row in results["tasks"].values()) / len(steps_of)

    freq = f"--total-timesteps {args.fine_tune_steps} --eval-freq {args.fine_tune_steps // 5} --eval-episodes 5"
    for source, task in (pair.split(":") for pair in args.fine_tune.split(",")):
        flags = f"--task {task} --resume"
        start = f"--checkpoint {path} --source-task {source} --exp-name fine-tune"
        call(folder, online, flags, freq, args.sizes, args.online, start)
        call(folder, online, flags, freq, args.sizes, args.online, "--exp-name scratch")
        runs = {name: curve(folder / "runs" / task / name / "1") for name in ("fine-tune", "scratch")}
        results["fine_tuning"][f"{source} -> {task}"] = runs

    print(f"\n{'task':<20}{'collector':>11}{'multi-task':>12}{'share':>8}")
    for task, row in results["tasks"].items():
        print(f"{task:<20}{row['collector']:>11.1f}{row['multitask']:>12.1f}{row['share']:>8.0%}")
    for name, runs in results["fine_tuning"].items():
        print(f"\n{name}\n{'step':>8}{'fine-tuned':>12}{'scratch':>10}")
        for (step, tuned), (_, scratch) in zip(runs["fine-tune"], runs["scratch"], strict=False):
            print(f"{step:>8}{tuned:>12.1f}{scratch:>10.1f}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
