"""Copies each script alone into an empty folder and starts it twice there, the second time with --resume: what somebody
does who takes one file of this project into a repository of theirs.

    python .ci/copied_scripts.py    # with the Python of an environment that this project is installed in

Then it puts packages and folders with generic names beside the scripts: a script works there, or says in one sentence
what is in its way. At last it compares the list of installed files with what may be installed under its own name.
"""

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
GENERIC = "envs", "files", "runs", "domains", "arguments", "devices", "utils"
TASK = "--task mw-reach --seed-steps 50 --buffer-size 3000"  # episodes of 100 decisions: short
NETWORKS = "--mlp-dim 16 --latent-dim 16"
PLANNER = "--num-samples 16 --num-elites 4 --num-pi-trajs 4 --iterations 1 --batch-size 8 --eval-episodes 1"
ONLINE = "../tdmpc2_jax"  # the first script's folder: its run is the world model of another, its episodes are data
SETS = f"--data-dir {ONLINE}/data"
WORLD_MODEL = f"--world-model {ONLINE}/runs/mw-reach/tdmpc2_jax/1"
SCRIPTS = {  # flags, and how the second start goes further than the first
    "tdmpc2_jax": (f"{TASK} {NETWORKS} {PLANNER} --save-episodes data", "--total-timesteps", 240, 480),
    "tdmpc2_jax_rgb": (f"{TASK} {NETWORKS} {PLANNER}", "--total-timesteps", 240, 480),
    "tdmpc_jax": (f"{TASK} {NETWORKS} {PLANNER} --enc-dim 16", "--total-timesteps", 240, 480),
    "tdmpc2_jax_mt": (f"--tasks mw-reach {NETWORKS} {PLANNER} {SETS}", "--num-updates", 20, 40),
    "tdmpc2_jax_diffusion": (f"{SETS} {WORLD_MODEL} --batch-size 8 --eval-episodes 1", "--num-updates", 20, 40),
}
MAY_BE_INSTALLED = ("tdmpc", "envs.py", "deploy.py", "__pycache__/", "__editable__")


def start(folder: Path, script: str, flags: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Runs the copy of a script that is in this folder, from there."""
    command = [sys.executable, f"{script}.py", *flags.split()]
    before = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    print(f"{script:22}{' '.join(flags.split()[-3:]):40}{time.monotonic() - before:6.1f} s", flush=True)
    return done


def copied(script: str, folder: Path) -> Path:
    """A new folder with nothing but this script in it."""
    folder.mkdir()
    (folder / f"{script}.py").write_bytes((ROOT / f"{script}.py").read_bytes())
    return folder


def one_sentence(done: subprocess.CompletedProcess) -> bool:
    """Whether a script has ended with an error of one line."""
    lines = done.stderr.strip().splitlines()
    return done.returncode != 0 and len(lines) == 1 and lines[0].startswith("error: ")


def failed(done: subprocess.CompletedProcess, what: str) -> None:
    sys.exit(f"{what} failed with status {done.returncode}:\n{done.stdout}{done.stderr}")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles faster; what is computed is tested elsewhere
        }
        for script, (flags, length, first, second) in SCRIPTS.items():
            folder = copied(script, work / script)
            for more in (f"{length} {first}", f"{length} {second} --resume"):
                done = start(folder, script, f"{flags} {more}", environment)
                if done.returncode:
                    failed(done, f"{script}.py {flags} {more}")
        for kind in ("folders", "packages"):
            for script, (flags, length, first, _) in SCRIPTS.items():
                folder = copied(script, work / f"{script}_{kind}")
                for generic in GENERIC:
                    (folder / generic).mkdir()
                    if kind == "packages":
                        (folder / generic / "__init__.py").touch()
                more = "--help" if kind == "folders" else f"{length} {first}"
                done = start(folder, script, f"{flags} {more}", environment)
                if done.returncode and not one_sentence(done):
                    failed(done, f"{script}.py beside {kind} with generic names")
                if done.returncode:
                    print(f"  {done.stderr.strip()}")
    files = [str(path) for path in importlib.metadata.files("tdmpc2-jax-single-file") or []]
    generic = [path for path in files if not path.startswith(MAY_BE_INSTALLED)]
    if generic:
        sys.exit(f"installed under generic names: {', '.join(generic)}")
    print(f"{len(SCRIPTS)} scripts run and resume where they were copied to; {len(files)} files are installed")


if __name__ == "__main__":
    main()
