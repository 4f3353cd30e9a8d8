"""What devices.py says of memory and does with arrays."""

import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from tdmpc2_support import devices
from tdmpc2_support.devices import available_bytes, committed, keep_freed_memory
from tdmpc2_support.errors import UserError

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

GB = 10**9
NO_LIMIT_V1 = 2**63 - 4096  # what the kernel writes where version 2 writes the word max
MOUNT_V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
MOUNT_V1 = """\
31 23 0:28 / /sys/fs/cgroup rw,nosuid - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
33 31 0:30 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"""


@pytest.fixture
def machine(tmp_path):
    """machine(cgroup, mountinfo, {group: {file: text}}) -> the root of a machine of which 20 GB are free, whose kernel
    says these things of the process's control groups."""

    def write(cgroup, mountinfo, groups):
        files = {"proc/meminfo": "MemTotal: 32000000 kB\nMemAvailable: 20000000 kB\n"}
        files |= {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo}
        files |= {f"sys/fs/cgroup{group}/{name}": text for group in groups for name, text in groups[group].items()}
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n" if text else "")
        return tmp_path

    return write


def group_v2(limit, used=0, cached=0, shared=0, high="max"):
    """A control group's files: its limit in GB, what it uses, and how much of that is cached files or shared memory."""
    stat = f"file {(cached + shared) * GB}\nshmem {shared * GB}\ninactive_anon {shared * GB}\nactive_anon 0\n"
    stat += f"inactive_file {cached * GB // 4}\nactive_file {cached * GB * 3 // 4}"
    limits = {"memory.max": limit if limit == "max" else limit * GB, "memory.high": high}
    return limits | {"memory.current": used * GB, "memory.stat": stat}


def group_v1(limit, used=0, cached=0, below=0):
    """The same of version 1; so much of the cached files are of the groups below this one."""
    stat = f"cache {(cached - below) * GB}\ninactive_file {(cached - below) * GB}\nactive_file 0\n"
    stat += f"total_cache {cached * GB}\ntotal_inactive_file {cached * GB}\ntotal_active_file 0"
    usage = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used * GB}
    return usage | {"memory.stat": stat}


# A program with 100 MB of temporary memory, and the page faults of a call once small blocks have found their places
FAULTS = """
import resource, sys, jax, jax.numpy as jnp
from tdmpc2_support.devices import keep_freed_memory
assert "keep" not in sys.argv or keep_freed_memory()
product = jax.jit(lambda a, b, c: a @ b @ c)
a, b, c = jnp.ones((5000, 8)), jnp.ones((8, 5000)), jnp.ones((5000, 8))
for i in range(40):
    if i == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    product(a, b, c).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20)
"""

# Debuggers, profilers and notebooks run a script in a process that is not its own
BY_RUNPY = """
import runpy, sys
print("started")
sys.argv = ["tdmpc2_jax.py", "--help"]
try:
    runpy.run_path("tdmpc2_jax.py", run_name="__main__")
finally:
    print("ended")
"""


def child(code, *args, **env):
    """What a Python process prints that runs this code, with no allocator's settings but these."""
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES" and not k.startswith("MALLOC_")} | env
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout


@GLIBC
def test_temporary_memory_is_kept_between_calls_of_a_program():
    assert int(child(FAULTS, "keep")) < 8_000 < 20_000 < int(child(FAULTS))


@GLIBC
@pytest.mark.parametrize("variable", [("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"), ("MALLOC_ARENA_MAX", "4")])
def test_the_users_own_settings_of_the_allocator_stay(variable, monkeypatch, tmp_path):
    monkeypatch.setenv(*variable)
    assert not keep_freed_memory(root=tmp_path)


@pytest.mark.parametrize("name", ["nvidia0", "accel0", "kfd"])
def test_beside_an_accelerator_the_allocator_stays_as_it_is(name, monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / name).touch()
    assert not keep_freed_memory(root=tmp_path)


def test_without_glibc_nothing_is_done(monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))  # as on macOS
    assert not keep_freed_memory(root=tmp_path)


def test_a_script_runs_once_in_the_process_that_started_it():
    printed = child(BY_RUNPY).splitlines()
    assert printed.count("started") == 1
    assert printed[-1] == "ended"


def test_without_control_groups_the_memory_is_what_the_kernel_calls_available(machine):
    assert available_bytes(root=machine("", "", {})) == 20_000_000 * 1024


def test_a_control_group_without_a_limit_takes_nothing_away(machine):
    groups = {"/user.slice": group_v2("max", used=5)}
    assert available_bytes(root=machine("0::/user.slice", MOUNT_V2, groups)) == 20_000_000 * 1024


def test_the_limit_of_the_own_control_group_counts(machine):
    groups = {"/job": group_v2(8, used=3), "/other": group_v2(1)}
    assert available_bytes(root=machine("0::/job", MOUNT_V2, groups)) == 5 * GB


def test_the_smallest_of_the_limits_above_the_own_control_group_counts(machine):
    path = "/system.slice/slurmstepd.scope/job_7"
    groups = {path: group_v2(6, used=2), f"{path}/step_0": group_v2("max"), f"{path}/step_0/task_0": group_v2(9)}
    groups["/system.slice"] = group_v2(100, used=50)
    assert available_bytes(root=machine(f"0::{path}/step_0/task_0", MOUNT_V2, groups)) == 4 * GB


def test_the_limit_from_which_a_control_group_is_slowed_down_counts_as_one(machine):
    groups = {"/unit.service": group_v2(8, used=1, high=5 * GB)}
    assert available_bytes(root=machine("0::/unit.service", MOUNT_V2, groups)) == 4 * GB


def test_cached_files_give_way_and_shared_memory_does_not(machine):
    groups = {"/job": group_v2(8, used=7, cached=2, shared=4)}
    assert available_bytes(root=machine("0::/job", MOUNT_V2, groups)) == 3 * GB


def test_a_container_sees_its_limit_at_the_mount_point(machine):
    groups = {"": group_v2(8, used=3)}
    assert available_bytes(root=machine("0::/", MOUNT_V2, groups)) == 5 * GB
    of_the_host = MOUNT_V1.replace("0:30 / ", "0:30 /docker/1f ")  # the path is the host's, the mount a part of it
    groups = {"/memory": group_v1(2 * GB), "/memory/child": group_v1(GB)}
    root = machine("2:cpu:/docker/1f\n1:memory:/docker/1f/child", of_the_host, groups)
    assert available_bytes(root=root) == GB


def test_limits_of_version_1_count_with_the_files_cached_for_all_groups_below(machine):
    groups = {
        "/memory": group_v1(NO_LIMIT_V1, used=30),
        "/memory/slurm/job_7": group_v1(6 * GB, used=5, cached=3, below=2),
        "/memory/slurm/job_7/step_0": group_v1(NO_LIMIT_V1, used=4, cached=2),
    }
    cgroup = "3:cpu:/other\n2:memory:/slurm/job_7/step_0\n0::/"
    assert available_bytes(root=machine(cgroup, MOUNT_V1, groups)) == 4 * GB


def test_what_is_used_beyond_a_limit_leaves_nothing(machine):
    assert available_bytes(root=machine("0::/job", MOUNT_V2, {"/job": group_v2(2, used=3)})) == 0


def test_this_machine_has_memory_for_this_test():
    assert 10**7 < available_bytes() < 10**15


def test_groups_take_a_third_of_the_memory_that_is_free_and_one_item_at_least(monkeypatch):
    monkeypatch.setattr(devices, "available_bytes", lambda: 10 * GB)
    assert devices.groups_that_fit("abcdefgh", GB) == ["abc", "def", "gh"]
    assert devices.groups_that_fit(("a", "b"), 20 * GB) == [("a",), ("b",)]
    assert devices.groups_that_fit("abcdefgh", 1) == ["abcdefgh"]


def test_a_program_that_does_not_fit_beside_its_inputs_is_refused(monkeypatch, capsys):
    x = jax.ShapeDtypeStruct((1000, 1000), np.float32)

    def compile_with(free):
        monkeypatch.setattr(devices, "least_available_bytes", lambda: free)
        return devices.compile_within_memory(lambda x: x @ x.T + 1, (x,), {"matrix": 4 * 10**6}, "a smaller matrix")

    assert compile_with(GB)(np.ones((1000, 1000), np.float32))[0, 0] == 1001
    assert capsys.readouterr().out.startswith("memory of each device: matrix 0.00 GB, activations 0.0")
    with pytest.raises(UserError, match="GB do not fit into 0.00 GB .a smaller matrix"):
        compile_with(10**6)
    assert "activations" not in capsys.readouterr().out, "it was not compiled"


def test_a_program_that_takes_too_much_at_least_is_not_even_traced(monkeypatch):
    def function(x):
        raise AssertionError("it is traced")

    monkeypatch.setattr(devices, "least_available_bytes", lambda: GB)
    with pytest.raises(UserError, match="2.00 GB do not fit into 1.00 GB"):
        devices.compile_within_memory(function, (1.0,), {"input": 4, "activations": 2 * 10**9}, "a smaller batch")


def test_a_loop_that_starts_with_committed_arrays_compiles_its_step_once(caplog):
    @jax.jit
    def a_step_of_the_loop(state, constant):
        return jax.tree.map(lambda x: x + constant, state)

    on_device = jax.device_put(jnp.float32(1), jax.devices()[0])  # as a replay is that was placed there
    state = committed({"a": jnp.zeros(3), "b": np.zeros(2, np.float32)})
    with jax.log_compiles():
        for _ in range(3):
            state = a_step_of_the_loop(state, on_device)
    compiled = [line for line in caplog.messages if "XLA compilation" in line and "a_step_of_the_loop" in line]
    assert len(compiled) == 1
    np.testing.assert_array_equal(state["a"], 3.0)
