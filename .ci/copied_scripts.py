"""Copies each script alone into an empty folder and starts it twice there, the second time with --resume: what somebody
does who takes one file of this project into a repository of theirs.

    python .ci/copied_scripts.py    # with the Python of an environment that this project is installed in

Then it puts packages and folders with generic names beside the scripts: a script works there, or says in one sentence
what is in its way. At last it compares the list of installed files with what may be installed under its own name.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
GENERIC = "envs", "files", "runs", "domains", "arguments", "devices", "utils"
TASK = "--task mw-reach --seed-steps 50 --buffer-size 3000"  # episodes of 100 decisions: short
NETWORKS = "--mlp-dim 16 --latent-dim 16"
PLANNER = "--num-samples 16 --num-elites 4 --num-pi-trajs 4 --iterations 1 --batch-size 8 --eval-episodes 1"
DIFFUSION = "--diffusion-batch-size 8 --eval-episodes 1 --num-updates 20"
DATA = "../tdmpc2_jax/data"  # the first script's run and episodes are what others need
RUN = "../tdmpc2_jax/runs/mw-reach/tdmpc2_jax/1"
TWO_STARTS = "--total-timesteps 240", "--total-timesteps 480 --resume"
SCRIPTS = {  # flags, and what the first and the second start have besides
    "tdmpc2_jax": (f"{TASK} {NETWORKS} {PLANNER} --save-episodes data", *TWO_STARTS),
    "tdmpc2_jax_rgb": (f"{TASK} {NETWORKS} {PLANNER}", *TWO_STARTS),
    "tdmpc_jax": (f"{TASK} {NETWORKS} {PLANNER} --enc-dim 16", *TWO_STARTS),
    "tdmpc2_jax_mt": (
        f"--tasks mw-reach {NETWORKS} {PLANNER} --data-dir {DATA}",
        "--num-updates 20",
        "--num-updates 40 --resume",
    ),
    "newt_jax": (
        f"--tasks mw-reach {NETWORKS} {PLANNER} --num-envs 2 --buffer-size 3000 --seed-steps 50 "
        f"--demos {DATA} --pretrain-updates 10",
        "--total-timesteps 240",
        "--total-timesteps 480 --resume",
    ),
    "tdmpc2_jax_diffusion": (f"--data-dir {DATA} --world-model {RUN} {DIFFUSION}", "", "--resume"),
    "tdmpc2_jax_device": (
        f"--task robot:make --seed-steps 50 --buffer-size 3000 {NETWORKS} {PLANNER}",
        *TWO_STARTS,
    ),
    "deploy": (
        f"--checkpoint {RUN} --data-dir {DATA} --quantize int8",
        "--output 1.safetensors",
        "--output 2.safetensors",
    ),
}
MAY_BE_INSTALLED = ("tdmpc", "newt_jax", "envs.py", "deploy.py", "__pycache__/", "__editable__")


class Failed(Exception):
    """A script did not do what it should; the message has all that it printed."""


def start(folder: Path, script: str, flags: str) -> subprocess.CompletedProcess:
    """Runs the copy of a script that is in this folder, from there."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles faster; what is computed is tested elsewhere
    }
    command = [sys.executable, f"{script}.py", *flags.split()]
    before = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    print(f"{folder.name:32}{' '.join(flags.split()[-3:]):36}{time.monotonic() - before:6.1f} s", flush=True)
    return done


def copied(script: str, folder: Path) -> Path:
    """A new folder with nothing but this script in it, and the environment in JAX that it needs, which docs/ show."""
    folder.mkdir()
    (folder / f"{script}.py").write_bytes((ROOT / f"{script}.py").read_bytes())
    if script == "tdmpc2_jax_device":
        page = (ROOT / "docs" / "device.md").read_text()
        (folder / "robot.py").write_text(re.search(r"(?ms)^```python\n(.*?)^```", page)[1])
    return folder


def check_two_starts(work: Path, script: str) -> None:
    """Starts it, and starts it again, in a folder that was empty; Failed if either ends badly."""
    flags, *starts = SCRIPTS[script]
    folder = copied(script, work / script)
    for more in starts:
        done = start(folder, script, f"{flags} {more}")
        if done.returncode:
            raise Failed(f"{script}.py {flags} {more}: status {done.returncode}\n{done.stdout}{done.stderr}")


def check_beside_generic_names(work: Path, script: str, packages: bool) -> None:
    """Starts beside folders of the fork's own; Failed if it ends with more than one sentence."""
    flags, first, _ = SCRIPTS[script]
    folder = copied(script, work / f"{script}, {'packages' if packages else 'folders'}")
    for generic in GENERIC:
        (folder / generic).mkdir()
        if packages:
            (folder / generic / "__init__.py").touch()
    done = start(folder, script, f"{flags} {first}" if packages else "--help")
    if done.returncode:
        print(f"  {done.stderr.strip()}", flush=True)
    if done.returncode and not re.fullmatch("error: [^\n]*\n", done.stderr):
        raise Failed(f"{folder.name}: status {done.returncode}\n{done.stdout}{done.stderr}")


def check_installed_names() -> None:
    """Failed if something is installed under a name that is not a script's, the package's or envs.py."""
    files = [str(path) for path in importlib.metadata.files("tdmpc2-jax-single-file") or []]
    generic = [path for path in files if not path.startswith(MAY_BE_INSTALLED)]
    if generic or not files:
        raise Failed(f"installed under generic names: {', '.join(generic) or 'nothing is installed'}")


def main() -> None:
    others = [script for script in SCRIPTS if script != "tdmpc2_jax"]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        work = Path(name)
        check_two_starts(work, "tdmpc2_jax")
        checks = [pool.submit(check_two_starts, work, script) for script in others]
        for packages in (False, True):
            checks += [pool.submit(check_beside_generic_names, work, script, packages) for script in SCRIPTS]
        for check in checks:
            check.result()
        check_installed_names()
    print(f"{len(SCRIPTS)} scripts run and resume where they were copied to")


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        sys.exit(str(failure))
