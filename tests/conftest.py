"""What the tests share: recordings, compiled programs, and the script as a child process."""

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", TESTS / "golden"))

# Compilation is what costs: programs are compiled once for all tests and for all processes that they start.
WORKER = "PYTEST_XDIST_WORKER" in os.environ  # started by the process that has made the cache
CACHE = None if WORKER else tempfile.TemporaryDirectory(prefix="tdmpc2-jax-tests-")
FLAGS = "--xla_backend_optimization_level=0"  # with the next, a third of the time to compile
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # later ones stop at it, as unknown
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
AS_USERS_COMPILE = {"xla_cpu_use_fusion_emitters": True} if "emitters" in FLAGS else {}  # for `lowered.compile`
os.environ |= {
    "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
    "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"] if WORKER else CACHE.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", FLAGS),
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",  # where strange_envs.py is
}
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):  # every child would compile all modules anew, for seconds
    os.environ["PYTHONPYCACHEPREFIX"] = f"{os.environ['JAX_COMPILATION_CACHE_DIR']}/bytecode"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it, and children would inherit that
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # so does nohup
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402

gc.set_threshold(50_000, 20, 50)  # programs that are traced are millions of small objects that live long

# Small agents: the environments of most tests are fast and have episodes of 40 decisions
SMALL = (
    "--mlp-dim 16 --latent-dim 16 --num-q 2 --batch-size 16 --num-samples 32 --num-elites 8 "
    "--num-pi-trajs 4 --iterations 2 --eval-episodes 2 --log-freq 50"
).split()
SMALL = {
    "tdmpc2_jax.py": [*SMALL, *"--enc-dim 16 --seed-steps 100 --buffer-size 3000".split()],
    "tdmpc2_jax_device.py": [*SMALL, *"--enc-dim 16 --seed-steps 100 --buffer-size 3000".split()],
    "tdmpc2_jax_rgb.py": [*SMALL, *"--seed-steps 100 --buffer-size 3000 --batch-size 8".split()],
    "tdmpc2_jax_mt.py": [*SMALL, *"--enc-dim 16 --task-dim 8".split()],
    "newt_jax.py": [*SMALL, *"--enc-dim 16 --buffer-size 3000".split()],
    "tdmpc_jax.py": "--enc-dim 16 --seed-steps 100 --buffer-size 3000 --schedule-steps 200".split()
    + SMALL[: SMALL.index("--num-q")]
    + SMALL[SMALL.index("--num-q") + 2 :],
}


GB_A_WORKER = 2.5  # what one takes at most


def pytest_xdist_auto_num_workers(config):
    """As many test processes as there are cores, if there is memory for them."""
    from tdmpc2_support.devices import available_bytes

    return max(1, min(len(os.sched_getaffinity(0)), int(available_bytes() / (GB_A_WORKER * 1e9))))


memory_to_forget_at = 1.4e9


@pytest.fixture(autouse=True)
def forget_programs():
    """Compiled programs go when they have become too many: each takes memory and 100 to 200 of the 65,530 memory maps
    that Linux allows a process. They stay on the disk for the next test that asks for the same."""
    global memory_to_forget_at
    yield
    maps = Path("/proc/self/maps")
    many = maps.exists() and maps.read_bytes().count(b"\n") > 10_000
    memory = psutil.Process().memory_info
    if many or memory().rss > memory_to_forget_at:
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(AttributeError):  # only glibc returns to the system what was freed
            ctypes.CDLL(None).malloc_trim(0)
        memory_to_forget_at = max(1.4e9, memory().rss + 0.4e9)  # what remains is not programs: it would be in vain


# The longest first: of two processes, neither should end with one of them
SLOW = "runs", "envs", "diffusion", "device", "multitask", "rgb", "model", "newt", "deploy", "cli", "golden"


def pytest_collection_modifyitems(items):
    names = {f"test_{name}.py": i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: names.get(item.path.name, len(names)))


@pytest.fixture(scope="session")
def golden():
    """Reads a recording: golden("single_update.npz") -> dict of arrays; golden("single.pt") -> path."""

    def read(name: str):
        path = GOLDEN_DIR / name
        return dict(np.load(path)) if path.suffix == ".npz" else path

    return read


def with_devices(number):
    """The environment of a child process that has so many devices and the compiled programs of this one."""
    more = f" --xla_force_host_platform_device_count={number}" if number > 1 else ""
    return os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + more}


@pytest.fixture
def start(tmp_path):
    """start("--task", ...) -> a child process of a script with a small agent, whose runs go to tmp_path/runs."""
    children = []

    def popen(*flags, small=True, name="tdmpc2_jax.py", devices=1):
        command = [sys.executable, str(ROOT / name), "--runs-dir", str(tmp_path / "runs")]
        command += [*(SMALL[name] if small else []), *map(str, flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        children.append(subprocess.Popen(command, text=True, cwd=tmp_path, env=with_devices(devices), **pipes))
        return children[-1]

    yield popen
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture
def script(start):
    """script("--task", ...) -> (exit status, stdout, stderr) of a finished script."""

    def finish(*flags, **options):
        child = start(*flags, **options)
        out, err = child.communicate(timeout=300)
        return child.returncode, out, err

    return finish


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """What `script` is, in this process: a child imports and traces all anew, which costs more than what it computes,
    and here equal arguments are traced once, whatever the test (so --runs-dir is as it is by default)."""
    monkeypatch.chdir(tmp_path)

    def finish(*flags, small=True, name="tdmpc2_jax.py"):
        status, last = 0, ""
        capsys.readouterr()
        try:
            importlib.import_module(name.removesuffix(".py")).main([*(SMALL[name] if small else []), *map(str, flags)])
        except SystemExit as stop:
            status, last = (1, f"{stop.code}\n") if isinstance(stop.code, str) else (stop.code or 0, "")
        except Exception:
            status, last = 1, traceback.format_exc()
        out, err = capsys.readouterr()
        return status, out, err + last

    return finish


@pytest.fixture
def refused(request, tmp_path):
    """refused("--task", ...) -> how the test module's SCRIPT refuses that in one sentence; in this process (children
    cost)."""

    def refuse(*flags, script=request.module.SCRIPT):
        before, runs = list(tmp_path.rglob("eval.csv")), tmp_path / "refused"
        with pytest.raises(SystemExit) as stop:
            script.main(["--runs-dir", str(runs), *map(str, flags)])
        sentence = str(stop.value.code)
        assert sentence.startswith("error: ") and "\n" not in sentence and len(sentence) < 400, sentence
        assert list(tmp_path.rglob("eval.csv")) == before, "nothing was started"
        assert not list(runs.rglob("*")), "nothing is left of it"
        return sentence

    return refuse
