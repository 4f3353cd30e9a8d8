"""Many environments that step together, in this process or in worker processes."""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import CloudpickleWrapper, batch_space

from tdmpc2_support.envs import rendering
from tdmpc2_support.envs.tasks import TASKS, jax_domain
from tdmpc2_support.errors import UserError
from tdmpc2_support.processes import SIGNALS, held_back


class Padded(gym.Wrapper):
    """Observations with zeros behind them, and actions of which the first entries count: one shape for many tasks."""

    def __init__(self, env: gym.Env, obs_size: int, action_size: int):
        super().__init__(env)
        self._own, self._padding = env.action_space.shape[0], (0, obs_size - env.observation_space.shape[0])
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_size,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (action_size,), np.float32)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        obs, info = self.env.reset(**kwargs)
        return np.pad(obs, self._padding), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, *rest = self.env.step(action[: self._own])
        return np.pad(obs, self._padding), *rest


def default_workers(tasks: str | Sequence[str], num_envs: int, cores: int | None = None, obs: str = "state") -> int:
    """The number of worker processes that should step num_envs environments of each task fastest; 0: this process does.

    n environments of t µs take n·t in this process. w workers take 1.3·⌈n/w⌉·t (their caches cool while they wait)
    and 50 + 30·w for the messages, as measured by benchmarks/environments.py. So 8 cartpoles (30 µs) stay here and two
    dogs (1.4 ms) get a worker each. Other Gymnasium tasks are taken for 100 µs, and drawing an observation for 2 ms (on
    a GPU less, in software 3 to 16).
    """
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tasks = [tasks] if isinstance(tasks, str) else tasks
    if any(jax_domain(task) for task in tasks):
        return 0  # each process would load JAX and its programs, and beside a GPU take its memory
    each = np.mean([cost_of(task) for task in tasks]) + 2000 * (obs != "state")
    num_envs *= len(tasks)
    workers = range(2, min(num_envs, cores) + 1)
    times = {0: num_envs * each} | {w: 1.3 * -(-num_envs // w) * each + 50 + 30 * w for w in workers}
    return min(times, key=times.get)


def cost_of(task: str) -> float:
    """Microseconds of CPU that a decision takes, about."""
    return TASKS[task].microseconds if task in TASKS else 100


def shared_out(costs: Sequence[float], num_workers: int) -> list[list[int]]:
    """The environments of each worker, by number, so that all have as much to do: the dearest first, each to the worker
    that has least so far."""
    load = [0.0] * num_workers
    rows: list[list[int]] = [[] for _ in range(num_workers)]
    for row in sorted(range(len(costs)), key=lambda row: -costs[row]):
        worker = load.index(min(load))
        load[worker] += costs[row]
        rows[worker].append(row)
    return [sorted(own) for own in rows]


def env_seeds(seed: int | Sequence[int], num_envs: int) -> list[int]:
    """A seed for each of num_envs environments: those of neighbouring seeds are as far apart as any, and environment
    i's is the same whatever num_envs is.

    Args:
        seed: a number from 0 on, or several, such as (seed, 1, step).

    Raises:
        UserError: it is something else.
    """
    entropy = [seed] if np.ndim(seed) == 0 else [*cast(Sequence[int], seed)]
    try:  # the length first: SeedSequence itself takes (1,) and (1, 0) for the same
        return np.random.SeedSequence([len(entropy), *entropy]).generate_state(num_envs).tolist()
    except (TypeError, ValueError) as error:
        raise UserError(f"a seed is a whole number from 0 on, or several of them, not {seed!r}") from error


class TaskVectorEnv(gym.vector.VectorEnv):
    """Environments of one shape, stepped one after the other in this process, in NEXT_STEP autoreset mode.

    What an environment returns depends on its seed and its actions only.

    Args:
        tasks: name of each environment's task [num_envs].
        makers: functions that make the environments [num_envs].
        render_mode: None if no environment draws.
        share: (k, of how many), if these are the environments k, k + how many, ... of all.
    """

    metadata: dict[str, Any]

    def __init__(self, tasks: list[str], makers: list[Any], render_mode: str | None, share: tuple[int, int] = (0, 1)):
        self._task = tasks[0] if tasks[0] == tasks[-1] else f"{tasks[0]}, … {tasks[-1]}"
        self._share = share
        self.num_envs, self.render_mode, self._envs = len(makers), render_mode, []
        self._open(tasks, makers)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.metadata = {**self.metadata, "autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def _open(self, tasks: list[str], makers: list[Any]) -> None:
        try:
            for make in makers:
                self._envs.append(make())
        except BaseException:
            self.close()
            raise
        first = self._envs[0]
        self.single_observation_space, self.single_action_space = first.observation_space, first.action_space
        self.metadata = first.metadata
        self._records = np.zeros(self.num_envs, _record(first.observation_space, first.action_space))

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Starts an episode in every environment → obs [num_envs, …], infos. Environment i of all gets number i of
        `env_seeds(seed, …)`; without a seed its random stream goes on."""
        k, parts = self._share
        seeds: list[int | None] = [None] * self.num_envs
        if seed is not None:
            seeds = [*env_seeds(seed, self.num_envs * parts)[k::parts]]
        self._reset_all(seeds, options)
        return self._observations(), self._infos()

    def _reset_all(self, seeds: list[int | None], options: dict | None) -> None:
        for record, env, seed in zip(self._records, self._envs, seeds, strict=True):
            _record_reset(record, env.reset(seed=seed, options=options))

    def step(
        self, actions: np.ndarray, active: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """One decision in every environment, actions [num_envs, size] → obs, rewards, terminated, truncated, infos.

        Where active [num_envs] is False, an environment is left as it is, and returns its last observation, a reward of
        0, and that its episode goes on.
        """
        rec, active = self._records, np.ones(self.num_envs, bool) if active is None else np.asarray(active, bool)
        rec["action"], rec["active"] = np.reshape(actions, self.action_space.shape), active
        self._step_all()
        rewards, ends = np.where(active, rec["reward"], 0.0), (active & rec["terminated"], active & rec["truncated"])
        return self._observations(), rewards, *ends, self._infos()

    def _step_all(self) -> None:
        for record, env in zip(self._records, self._envs, strict=True):
            _record_step(record, env)

    def _observations(self) -> Any:
        obs = self._records["obs"]
        return {name: obs[name].copy() for name in obs.dtype.names} if obs.dtype.names else obs.copy()

    def _infos(self) -> dict[str, np.ndarray]:
        return {"success": self._records["success"].copy(), "_success": np.ones(self.num_envs, bool)}

    def render(self) -> tuple[np.ndarray | None, ...] | None:
        """A frame or None for every environment."""
        return None if self.render_mode is None else tuple(env.render() for env in self._envs)

    def close_extras(self, **kwargs: Any) -> None:
        """Frees the simulators."""
        for env in self._envs:
            env.close()


class WorkerVectorEnv(TaskVectorEnv):
    """The same in worker processes, several environments to a worker, with everything but commands in shared memory.

    A worker is a fresh Python that imports this module and the simulator, nothing else. Gymnasium's AsyncVectorEnv
    either forks a process that has JAX's threads (deadlock), or imports the user's script, and with it JAX, in every
    worker, and waits forever for one whose exception cannot be pickled. Built around so that it does neither, and has
    several environments in a worker, it needed more lines than this and 1.2 times the time for a step of four walkers.
    Our workers end when their pipe is closed, so none outlives its parent by more than the step under way.
    """

    def __init__(self, tasks: list[str], *arguments: Any, num_workers: int):
        self.processes: list[subprocess.Popen] = []
        self._pipes: list[Connection] = []
        self._rows_of = shared_out([cost_of(task) for task in tasks], num_workers)
        super().__init__(tasks, *arguments)

    def _open(self, tasks: list[str], makers: list[Any]) -> None:
        # Tasks that the user's script registered are unknown to a fresh Python
        registered = [gym.registry[task] for task in dict.fromkeys(tasks) if task in gym.registry]
        num_workers = len(self._rows_of)
        with tempfile.TemporaryFile() as shared:  # nameless: the kernel frees it with the last process, come what may
            try:
                for number, rows in enumerate(self._rows_of):
                    job = registered, number, rows, [makers[row] for row in rows]
                    self._start(shared.fileno(), job)
                (self.single_observation_space, self.single_action_space, self.metadata), *_ = (
                    self._receive(worker) for worker in range(num_workers)
                )
                record = _record(self.single_observation_space, self.single_action_space)
                os.ftruncate(shared.fileno(), record.itemsize * self.num_envs)
                self._records = np.frombuffer(mmap.mmap(shared.fileno(), 0), record)
                self._command_all("share", [None] * num_workers)
            except BaseException:
                self.close()
                raise

    def _start(self, shared: int, job: tuple) -> None:
        ours, theirs = Pipe()
        # Ctrl-C, the end of a terminal and what batch systems send reach all processes; the parent decides on the end.
        # They are held back until the worker has handlers that do nothing; its own children do not inherit these.
        code = f"import signal as s; numbers = {[*map(int, SIGNALS)]}; "
        code += "[(s.signal(number, lambda *_: None), s.siginterrupt(number, False)) for number in numbers]; "
        code += "s.pthread_sigmask(s.SIG_UNBLOCK, numbers); import sys; sys.path.insert(0, sys.argv[1]); "
        code += "from tdmpc2_support.envs import vector as v; "
        code += "v._work(*map(int, sys.argv[2:]))"
        here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}  # cores are XLA's
        with theirs, held_back():
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, here, str(theirs.fileno()), str(shared)],
                env={**os.environ, **one_thread},
                pass_fds=(theirs.fileno(), shared),
                stdin=subprocess.DEVNULL,
            )
        self.processes.append(process)
        self._pipes.append(ours)
        self._send(len(self._pipes) - 1, sys.path)
        self._send(len(self._pipes) - 1, CloudpickleWrapper(job))  # by value what the user's script defines

    def _send(self, worker: int, message: Any) -> None:
        try:
            self._pipes[worker].send_bytes(pickle.dumps(message))  # Connection.send's pickler takes 5 µs longer
        except OSError:
            pass  # it has ended: _receive tells why

    def _receive(self, worker: int) -> Any:
        """A worker's answer; raises what went wrong if it failed or died."""
        try:
            answer, value = self._pipes[worker].recv()
        except (EOFError, OSError):
            code = self.processes[worker].wait()
            reason = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            name = f"environment worker {worker} (process {self.processes[worker].pid})"
            raise UserError(f"task {self._task!r}: {name} {reason}") from None
        if answer == "done":
            return value
        raise UserError(value) if answer == "user error" else RuntimeError(f"task {self._task!r}: {value}")

    def _command_all(self, command: str, arguments: list[Any]) -> list[Any]:
        if self.closed:
            raise RuntimeError(f"task {self._task!r}: these environments are closed")
        try:
            for worker, argument in enumerate(arguments):
                self._send(worker, (command, argument))
            return [self._receive(worker) for worker in range(len(arguments))]
        except BaseException:  # a KeyboardInterrupt, too: unread answers would be taken for those of later commands
            self.close()
            raise

    def _reset_all(self, seeds: list[int | None], options: dict | None) -> None:
        self._command_all("reset", [([seeds[i] for i in rows], options) for rows in self._rows_of])

    def _step_all(self) -> None:
        self._command_all("step", [None] * len(self._pipes))

    def render(self) -> tuple[np.ndarray | None, ...] | None:
        """A frame or None for every environment."""
        if self.render_mode is None:
            return None
        frames = self._command_all("render", [None] * len(self._pipes))
        frame_of = {}
        for rows, drawn in zip(self._rows_of, frames, strict=True):
            frame_of.update(zip(rows, drawn, strict=True))
        return tuple(frame_of[row] for row in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the workers within 5 s, also those that hang or have failed."""
        deadline = time.monotonic() + 5
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _record(obs_space: gym.Space, action_space: gym.spaces.Box) -> np.dtype:
    """What parent and worker share of one environment."""
    if isinstance(obs_space, gym.spaces.Dict):
        parts = [(name, space.dtype, space.shape) for name, space in obs_space.items()]
        fields: list[tuple[Any, ...]] = [("obs", np.dtype(parts, align=True))]
    else:
        fields = [("obs", obs_space.dtype, obs_space.shape)]
    fields += [("action", action_space.dtype, action_space.shape)]
    fields += [("reward", "f8"), ("terminated", "?"), ("truncated", "?"), ("success", "f8"), ("active", "?")]
    return np.dtype(fields, align=True)


def _work(pipe_fd: int, shared_fd: int) -> None:
    """A worker process: makes its environments, then obeys until the pipe is closed."""
    pipe = Connection(pipe_fd)
    for descriptor in (pipe_fd, shared_fd):  # a child of an environment that outlives it would keep the pipe open
        os.set_inheritable(descriptor, False)
    envs: list[gym.Env] = []
    try:
        sys.path[:] = pipe.recv()
        registered, rendering._worker, rows, makers = pipe.recv().fn
        gym.registry.update({spec.id: spec for spec in registered})
        for make in makers:
            envs.append(make())
        _report(pipe, "done", (envs[0].observation_space, envs[0].action_space, envs[0].metadata))
        record = _record(envs[0].observation_space, envs[0].action_space)
        while True:
            try:
                command, argument = pipe.recv()
            except (EOFError, ConnectionResetError):
                break  # the parent has closed the pipe, or is no more
            value = None
            if command == "share":  # the parent has given the shared file its size
                shared = np.frombuffer(mmap.mmap(shared_fd, 0), record)
                records = [shared[row] for row in rows]  # views
            elif command == "reset":
                for record, env, seed in zip(records, envs, argument[0], strict=True):
                    _record_reset(record, env.reset(seed=seed, options=argument[1]))
            elif command == "step":
                for record, env in zip(records, envs, strict=True):
                    _record_step(record, env)
            elif command == "render":
                value = [env.render() for env in envs]
            _report(pipe, "done", value)
    except UserError as error:
        _report(pipe, "user error", str(error))
    except BaseException:
        _report(pipe, "failed", f"an environment of worker process {os.getpid()} raised\n{traceback.format_exc()}")
    finally:
        for env in envs:
            env.close()


def _report(pipe: Connection, kind: str, value: Any) -> None:
    message = pickle.dumps((kind, value))  # Connection.send's pickler takes 5 µs longer
    with contextlib.suppress(OSError):  # the parent may be gone
        pipe.send_bytes(message)


def _record_obs(record: np.void, obs: Any) -> None:
    record["obs"] = tuple(obs.values()) if isinstance(obs, dict) else obs


def _record_reset(record: np.void, result: tuple[np.ndarray, dict]) -> None:
    obs, info = result
    _record_obs(record, obs)
    record["reward"], record["terminated"], record["truncated"], record["success"] = 0.0, False, False, info["success"]


def _record_step(record: np.void, env: gym.Env) -> None:
    if not record["active"]:
        return
    if record["terminated"] or record["truncated"]:  # NEXT_STEP autoreset
        _record_reset(record, env.reset())
    else:
        obs, record["reward"], record["terminated"], record["truncated"], info = env.step(record["action"])
        _record_obs(record, obs)
        record["success"] = info["success"]
