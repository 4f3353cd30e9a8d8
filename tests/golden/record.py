"""Records what the original PyTorch implementations compute, in the arrays that the tests read.

    python record.py --original tdmpc2 --original-tdmpc tdmpc --output new                # new inputs, from --seed
    python record.py --original tdmpc2 --original-tdmpc tdmpc --output again --compare .  # the inputs recorded here

The second command takes weights, batches and random draws from the recordings beside this file, runs the originals on
them and prints how far their outputs are from the recorded ones. README.md says what is needed and what the files hold.
"""

import argparse
import contextlib
import importlib.metadata
import io
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

HORIZON = 3
BATCH = 8
NUM_BINS = 101

# The originals run on a GPU only. These replacements in a copy of them make them run on a CPU.
ON_CPU = (
    (".cuda()", ""),
    ("cuda:0", "cpu"),
    ("device('cuda')", "device('cpu')"),
    ("capturable=True", "capturable=False"),
)
# TD-MPC-Opt adds a term to TD-MPC2's loss; it is added here by a function of the agent, which is 0 for all others.
WITH_EXTRA_LOSS = (
    "\t\ttotal_loss.backward()",
    "\t\ttotal_loss = total_loss + self.extra_loss(obs, action, task)\n\t\ttotal_loss.backward()",
)

# The original's config.yaml, with a small model and planner, no dropout and no compilation.
SETTINGS: dict[str, Any] = {
    "obs": "state", "episodic": False, "multitask": False, "episode_length": 500, "compile": False, "mpc": True,
    "batch_size": BATCH, "reward_coef": 0.1, "value_coef": 0.1, "termination_coef": 1, "consistency_coef": 20,
    "rho": 0.5, "lr": 3e-4, "enc_lr_scale": 0.3, "grad_clip_norm": 20, "tau": 0.01,
    "discount_denom": 5, "discount_min": 0.95, "discount_max": 0.995,
    "iterations": 4, "num_samples": 64, "num_elites": 12, "num_pi_trajs": 6, "horizon": HORIZON,
    "min_std": 0.05, "max_std": 2, "temperature": 0.5, "log_std_min": -10, "log_std_max": 2, "entropy_coef": 1e-4,
    "num_bins": NUM_BINS, "vmin": -10, "vmax": 10, "bin_size": 20 / (NUM_BINS - 1),
    "num_enc_layers": 2, "enc_dim": 16, "num_channels": 8, "mlp_dim": 24, "latent_dim": 24, "task_dim": 0, "num_q": 5,
    "dropout": 0.0, "simnorm_dim": 8,
}  # fmt: skip
MT30_ACTION_DIMS = [6, 6, 6, 6, 2, 2, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 5, 4, 4, 6, 6, 6, 6, 6, 6, 4, 3, 3, 2, 1]
MT30: dict[str, Any] = {
    "multitask": True, "tasks": [f"task {i}" for i in range(30)], "episode_lengths": 30 * [500],
    "obs_shape": {"state": (24,)}, "action_dim": 6, "action_dims": MT30_ACTION_DIMS, "task_dim": 20,
}  # fmt: skip
FISH_SWIM = 16  # place in mt30 of the task with the most observations, 24, and not all 6 actions
MODELS: dict[str, dict[str, Any]] = {
    "single": {"obs_shape": {"state": (17,)}, "action_dim": 6},
    "wide": {"obs_shape": {"state": (30,)}, "action_dim": 21, "num_enc_layers": 3},  # from 20 actions on: 6 iterations
    "episodic": {"obs_shape": {"state": (11,)}, "action_dim": 3, "episodic": True, "episode_length": 1000},
    "two_q": {"obs_shape": {"state": (5,)}, "action_dim": 1, "num_q": 2},
    "multitask": MT30,
    "rgb": {"obs_shape": {"rgb": (9, 64, 64)}, "action_dim": 2, "obs": "rgb", "latent_dim": 128},
    "distill_student": MT30,
    "distill_teacher": MT30
    | {"enc_dim": 24, "num_enc_layers": 3, "mlp_dim": 32, "latent_dim": 32, "task_dim": 12, "num_q": 3},
}
# Rows of tables longer than 1 are scaled back when they are read: in both agents of the distillation there are some.
EMBEDDING_STD = {"multitask": 0.05, "distill_student": 0.2, "distill_teacher": 0.3}
TDMPC_SETTINGS: dict[str, Any] = {
    "modality": "state", "device": "cpu",
    "obs_shape": (17,), "action_dim": 6, "enc_dim": 16, "mlp_dim": 24, "latent_dim": 10,
    "horizon": 5, "batch_size": BATCH, "discount": 0.99, "rho": 0.5, "lr": 1e-3, "tau": 0.01, "update_freq": 2,
    "consistency_coef": 2, "reward_coef": 0.5, "value_coef": 0.1, "grad_clip_norm": 1.0,
    "iterations": 4, "num_samples": 64, "num_elites": 12, "mixture_coef": 0.1, "min_std": 0.2, "temperature": 0.5,
    "momentum": 0.1, "seed_steps": 0,
    "std_schedule": "linear(0.5, 0.2, 25000)", "horizon_schedule": "linear(1, 5, 25000)",
}  # fmt: skip
DMCONTROL_TASKS = """
    acrobot-swingup cartpole-balance cartpole-balance-sparse cartpole-swingup cartpole-swingup-sparse cheetah-jump
    cheetah-run cheetah-run-back cheetah-run-backwards cheetah-run-front cup-catch cup-spin dog-run dog-stand dog-trot
    dog-walk finger-spin finger-turn-easy finger-turn-hard fish-swim hopper-hop hopper-hop-backwards hopper-stand
    humanoid-run humanoid-stand humanoid-walk pendulum-spin pendulum-swingup quadruped-run quadruped-walk reacher-easy
    reacher-hard reacher-three-easy reacher-three-hard walker-run walker-run-backwards walker-stand walker-walk
    walker-walk-backwards
""".split()


# ----------------------------------------------------------------------------------------------------- One recording
class Recording:
    """The arrays of one file. Inputs are new, from a seed, or those of an earlier recording; outputs are always new."""

    def __init__(self, seed: int, earlier: Path | None):
        self.arrays: dict[str, np.ndarray] = {}
        self.inputs: set[str] = set()
        self.rng = np.random.default_rng(seed)
        self.earlier: dict[str, np.ndarray] | None = None
        if earlier is not None:
            with np.load(earlier) as file:
                self.earlier = {name: file[name] for name in file}

    def input(self, name: str, make: Callable[[], Any]) -> torch.Tensor:
        value = make() if self.earlier is None else self.earlier[name]
        self.arrays[name] = np.asarray(value)
        self.inputs.add(name)
        return torch.tensor(self.arrays[name])

    def normal(self, *size: int) -> np.ndarray:
        return self.rng.standard_normal(size).astype(np.float32)

    def output(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy().copy()
        self.arrays[name] = np.asarray(value)

    @contextlib.contextmanager
    def draws(self, prefix: str, *modules: Any) -> Iterator[None]:
        """While it is active, each random draw of torch is an input, PREFIX_draw000_KIND, PREFIX_draw001_KIND, ...

        Args:
            modules: those that have imported torch's _standard_normal by name.
        """
        count = 0

        def draw(kind: str, make: Callable[[], np.ndarray]) -> torch.Tensor:
            nonlocal count
            name = f"{prefix}_draw{count:03d}_{kind}"
            count += 1
            return self.input(name, make)

        def randn(*size: int, **options: Any) -> torch.Tensor:
            return draw("normal", lambda: self.normal(*size))

        def randn_like(like: torch.Tensor, **options: Any) -> torch.Tensor:
            return randn(*like.shape)

        def standard_normal(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            return randn(*shape).clone()

        def randperm(n: int, **options: Any) -> torch.Tensor:
            return draw("perm", lambda: self.rng.permutation(n))

        def gumbel(n: int) -> torch.Tensor:
            return draw("gumbel", lambda: self.rng.gumbel(size=n).astype(np.float32))

        def exponential_(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.copy_(torch.exp(-gumbel(len(tensor))))

        def choice(a: np.ndarray, p: np.ndarray) -> int:
            with np.errstate(divide="ignore"):
                return a[np.argmax(np.log(p) + gumbel(len(a)).numpy())]

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch, "randn", randn))
            stack.enter_context(mock.patch.object(torch, "randn_like", randn_like))
            stack.enter_context(mock.patch.object(torch, "randperm", randperm))
            stack.enter_context(mock.patch.object(torch.Tensor, "exponential_", exponential_))
            stack.enter_context(mock.patch.object(np.random, "choice", choice))
            for module in modules:
                stack.enter_context(mock.patch.object(module, "_standard_normal", standard_normal))
            yield


class Recorder:
    """Makes the files of a folder; see `Recording`."""

    def __init__(self, output: Path, compare: Path | None, seed: int):
        self.output = output
        self.compare = compare
        self.seed = seed

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Recording]:
        """Yields a recording, writes it to NAME.npz, and compares it with the earlier one."""
        recording = Recording(self.seed, self.compare and self.compare / f"{name}.npz")
        yield recording
        np.savez_compressed(self.output / f"{name}.npz", **recording.arrays)
        if recording.earlier is not None and recording.arrays.keys() > recording.inputs:
            print_comparison(name, recording)

    def weights(self, name: str) -> Any:
        """The content of an earlier NAME.pt; None if there is none to take."""
        if self.compare is None:
            return None
        return torch.load(self.compare / f"{name}.pt", weights_only=True)


def print_comparison(name: str, recording: Recording) -> None:
    """Prints the largest difference of outputs, each relative to the largest number of its array."""
    earlier = recording.earlier
    differences = {}
    for key, value in recording.arrays.items():
        if key in recording.inputs or key not in earlier or value.dtype.kind not in "fiub":
            continue
        expected = np.asarray(earlier[key], np.float64)
        scale = max(np.abs(expected).max(initial=0), 1e-8)
        difference = np.where(value == expected, 0, value - expected)  # infinite ones, too
        differences[key] = float(np.abs(difference).max(initial=0) / scale)
    worst = max(differences, key=differences.get)
    print(f"{name}: {len(differences)} outputs, largest difference {differences[worst]:.1e} ({worst})")
    missing = sorted(earlier.keys() - recording.arrays.keys())
    if missing:
        print(f"    not made: {len(missing)} arrays, {missing[0]} to {missing[-1]}")
    if recording.arrays.keys() - earlier.keys():
        print(f"    not recorded before: {', '.join(sorted(recording.arrays.keys() - earlier.keys()))}")


def check_weights(recorder: "Recorder", name: str) -> None:
    """Prints if a file of weights differs from the earlier one in a name or a number."""
    made = torch.load(recorder.output / name, weights_only=True)
    earlier = torch.load(recorder.compare / name, weights_only=True)
    for part, tensors in earlier.items():
        same_names = made[part].keys() == tensors.keys()
        if not same_names or not all(torch.equal(made[part][key], tensors[key]) for key in tensors):
            print(f"{name}: {part} has other tensors than in {recorder.compare}")


@contextlib.contextmanager
def cpu_copy(original: Path, replacements: Sequence[tuple[str, str]]) -> Iterator[None]:
    """While it is active, modules are imported from a copy of the original that runs on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "original")
        shutil.copytree(original, copy, ignore=shutil.ignore_patterns(".git"))
        for path in copy.rglob("*.py"):
            text = path.read_text()
            for old, new in replacements:
                text = text.replace(old, new)
            path.write_text(text)
        sys.path.insert(0, str(copy))
        modules = set(sys.modules)
        try:
            yield
        finally:
            sys.path.remove(str(copy))
            for name in set(sys.modules) - modules:
                if name.partition(".")[0] in ("common", "tdmpc2", "envs", "algorithm"):
                    del sys.modules[name]


# ------------------------------------------------------------------------------------------------------------ TD-MPC2
def make_agent(recorder: Recorder, name: str) -> Any:
    """An agent of the original, with the weights of NAME.pt: those recorded earlier, or new ones, which are written."""
    from common import layers
    from tdmpc2 import TDMPC2

    layers.enc.__defaults__[0].clear()  # the encoders of the agent that was made before
    torch.manual_seed(recorder.seed)
    with contextlib.redirect_stdout(io.StringIO()):
        agent = TDMPC2(SimpleNamespace(**SETTINGS | MODELS[name]))
    agent.extra_loss = lambda obs, action, task: 0.0
    earlier = recorder.weights(name)
    if earlier is None:
        jitter(agent.model, np.random.default_rng(recorder.seed), EMBEDDING_STD.get(name, 0.0))
    else:
        agent.model.load_state_dict(with_notes(agent.model, earlier["model"]))
    tensors = {key: value for key, value in agent.model.state_dict().items() if isinstance(value, torch.Tensor)}
    tensors = {key: value.clone() for key, value in tensors.items() if "__" not in key}
    torch.save({"model": tensors}, recorder.output / f"{name}.pt")
    if not name.startswith("distill"):
        torch.save({"model": released_layout(tensors)}, recorder.output / f"{name}_released_layout.pt")
    if recorder.compare:
        for path in sorted(recorder.output.glob(f"{name}*.pt")):
            check_weights(recorder, path.name)
    return agent


def with_notes(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The tensors of a file, and beside them what tensordict notes in a state dict."""
    notes = {key: value for key, value in model.state_dict().items() if "__" in key}
    return tensors | notes


def jitter(model: Any, rng: np.random.Generator, embedding_std: float) -> None:
    """Adds noise to all weights, more to the last layers, which start at 0, so that nothing is trivially right."""
    for key, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor) or "__" in key or value.ndim == 0:
            continue
        if key == "_action_masks" or key.startswith(("_detach", "_target")):
            continue
        std = 0.05
        if re.match(r"_(reward|termination|Qs\.params)\.2\.", key):
            std = 0.6
        if key.startswith("_task_emb"):
            std = embedding_std
        value.add_(torch.tensor(rng.normal(0, std, value.shape), dtype=value.dtype))
    model._target_Qs_params.lerp_(model._detach_Qs_params, 1.0)


def released_layout(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under the names of the checkpoints that were published in 2023."""
    fields = ["weight", "bias", "ln.weight", "ln.bias"]
    released = {}
    for key, value in tensors.items():
        match = re.match(r"_(Qs\.params|target_Qs_params)\.(\d)\.(.*)", key)
        if match:
            network = match[1].removesuffix("_params").removesuffix(".params")
            released[f"_{network}.params.{4 * int(match[2]) + fields.index(match[3])}"] = value
        elif not key.startswith(("_detach", "log_std", "_action_masks")):
            released[key] = value
    return released


def record_maths(recorder: Recorder) -> None:
    from common import math

    cfg = SimpleNamespace(**SETTINGS)
    extreme = [0, 1e-3, -1e-3, 0.5, -0.5, 1, -1, 10, -10, 100, -100, 1e4, -1e4, 2e4, -3e4]
    with recorder.file("maths") as file:
        x = file.input("x", lambda: np.concatenate([extreme, 20 * file.normal(30)]).astype(np.float32)[:, None])
        logits = file.input("logits", lambda: 2 * file.normal(len(x), NUM_BINS))
        file.output("symlog", math.symlog(x))
        file.output("symexp", math.symexp(x.clamp(cfg.vmin, cfg.vmax)))
        file.output("two_hot", math.two_hot(x, cfg))
        file.output("two_hot_inv", math.two_hot_inv(logits, cfg))
        file.output("soft_ce", math.soft_ce(logits, x, cfg))


def record_batch(file: Recording, cfg: Any) -> tuple[torch.Tensor, ...]:
    obs_dim = cfg.obs_shape["state"][0]
    obs = file.input("in_obs", lambda: file.normal(HORIZON + 1, BATCH, obs_dim))
    action = file.input(
        "in_action", lambda: file.rng.uniform(-1, 1, (HORIZON, BATCH, cfg.action_dim)).astype(np.float32)
    )
    reward = file.input("in_reward", lambda: 2.5 * file.normal(HORIZON, BATCH, 1))
    share = 0.25 if cfg.episodic else 0.0
    terminated = file.input(
        "in_terminated", lambda: (file.rng.uniform(size=(HORIZON, BATCH, 1)) < share).astype(np.float32)
    )
    task = None
    if cfg.multitask:
        task = file.input("in_task", lambda: file.rng.choice(len(cfg.tasks), BATCH, replace=False))
    return obs, action, reward, terminated, task


@torch.no_grad()
def record_networks(file: Recording, agent: Any, obs: torch.Tensor, action: torch.Tensor, task: Any) -> None:
    model = agent.model
    z = model.encode(obs, task)
    file.output("encode_obs0", z)
    file.output("next", model.next(z, action, task))
    file.output("reward_logits", model.reward(z, action, task))
    file.output("q_logits_all", model.Q(z, action, task, return_type="all"))
    file.output("q_target_logits_all", model.Q(z, action, task, return_type="all", target=True))
    if agent.cfg.episodic:
        file.output("termination", model.termination(z, task))
    with file.draws("pi"):
        policy_action, info = model.pi(z, task)
    file.output("pi_action", policy_action)
    for key in ("mean", "log_std", "entropy", "scaled_entropy"):
        file.output(f"pi_{key}", info[key])
    file.output("discount", agent.discount)


def record_updates(file: Recording, agent: Any, batch: tuple[torch.Tensor, ...]) -> None:
    """Three updates on the same batch, and all parameters after them."""
    for i in range(3):
        with file.draws(f"update{i}"):
            info = agent._update(*batch)
        for key, value in info.items():
            file.output(f"update{i}_info_{key}", value)
        file.output(f"update{i}_scale", agent.scale.value)
    for key, value in agent.model.state_dict().items():
        if isinstance(value, torch.Tensor) and "__" not in key and not key.startswith("_detach"):
            file.output(f"update2_after_{key}", value)


def record_plans(recorder: Recorder, name: str) -> None:
    """Three consecutive calls of the planner, while exploring and while evaluating."""
    agent = make_agent(recorder, name)
    with recorder.file(f"{name}_plan") as file:
        obs = file.input("in_obs", lambda: file.normal(3, *agent.cfg.obs_shape["state"]))
        task = None
        if agent.cfg.multitask:
            task = int(file.input("in_task", lambda: FISH_SWIM))
        for mode in ("explore", "eval"):
            for i in range(3):
                with file.draws(f"{mode}{i}"):
                    action = agent.act(obs[i], t0=i == 0, eval_mode=mode == "eval", task=task)
                file.output(f"{mode}{i}_action", action)
                file.output(f"{mode}{i}_mean", agent._prev_mean)
        file.output("iterations", agent.cfg.iterations)


def record_model(recorder: Recorder, name: str) -> None:
    agent = make_agent(recorder, name)
    with recorder.file(f"{name}_update") as file:
        obs, action, reward, terminated, task = record_batch(file, agent.cfg)
        record_networks(file, agent, obs[0], action[0], task)
        record_updates(file, agent, (obs, action, reward, terminated, task))
    if name != "two_q":
        record_plans(recorder, name)


def record_distillation(recorder: Recorder) -> None:
    """The update with the term of TD-MPC-Opt: the student's rewards at windows' first steps become the teacher's."""
    from common import math

    teacher = make_agent(recorder, "distill_teacher")
    student = make_agent(recorder, "distill_student")
    with recorder.file("distill_update") as file:
        obs, action, reward, terminated, task = record_batch(file, student.cfg)
        coef = file.input("coef", lambda: np.float32(0.45))
        record_networks(file, student, obs[0], action[0], task)

        def predicted(agent: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            z = agent.model.encode(obs[0], task)
            logits = agent.model.reward(z, action[0], task)
            return z, logits, math.two_hot_inv(logits, agent.cfg)

        with torch.no_grad():
            z, logits, target = predicted(teacher)
        file.output("teacher_encode_obs0", z)
        file.output("teacher_reward_logits", logits)
        file.output("teacher_reward", target)
        losses = []

        def loss(*_: Any) -> torch.Tensor:
            difference = predicted(student)[-1] - target
            losses.append(difference.pow(2).mean())
            return coef * losses[-1]

        file.output("student_reward", predicted(student)[-1])
        loss().backward()
        file.output("distillation_loss", losses[-1])
        for key, value in student.model.named_parameters():
            if value.grad is not None:
                file.output(f"distillation_grad_{key}", value.grad)
        student.model.zero_grad(set_to_none=True)
        student.extra_loss = loss
        losses.clear()
        record_updates(file, student, (obs, action, reward, terminated, task))
        for i, value in enumerate(losses):
            file.output(f"update{i}_info_distillation_loss", value)


@torch.no_grad()
def record_pixels(recorder: Recorder) -> None:
    """The encoder of pictures, each of five times with a shift that is given."""
    agent = make_agent(recorder, "rgb")
    shift_layer = agent.model._encoder["rgb"][0]
    with recorder.file("rgb_encoder") as file:
        obs = file.input("in_obs", lambda: file.rng.integers(0, 256, (2, 9, 64, 64), dtype=np.uint8))
        for i, shift in enumerate(([3, 3], [0, 0], [6, 6], [1, 5], [4, 2])):
            given = file.input(f"shift{i}", lambda shift=shift: np.array(shift))

            def randint(low: int, high: int, size: Sequence[int], given: torch.Tensor = given, **options: Any) -> Any:
                return given.float().expand(size).clone()

            with mock.patch.object(torch, "randint", randint):
                file.output(f"shifted{i}", shift_layer(obs))
                file.output(f"encode{i}", agent.model.encode(obs, None))


# ------------------------------------------------------------------------------------------ TD-MPC, the first version
def make_tdmpc(recorder: Recorder) -> Any:
    from algorithm.tdmpc import TDMPC

    torch.manual_seed(recorder.seed)
    agent = TDMPC(SimpleNamespace(**TDMPC_SETTINGS))
    earlier = recorder.weights("tdmpc1")
    if earlier is None:
        rng = np.random.default_rng(recorder.seed)
        jitter_tdmpc(agent.model, rng)
        agent.model_target.load_state_dict(agent.model.state_dict())
        for value in agent.model_target.state_dict().values():
            value.add_(torch.tensor(rng.normal(0, 0.05, value.shape), dtype=value.dtype))
    else:
        agent.model.load_state_dict(earlier["model"])
        agent.model_target.load_state_dict(earlier["model_target"])
    torch.save(agent.state_dict(), recorder.output / "tdmpc1.pt")
    return agent


def jitter_tdmpc(model: Any, rng: np.random.Generator) -> None:
    for key, value in model.state_dict().items():
        std = 0.6 if re.match(r"_(reward\.4|Q[12]\.5)\.", key) else 0.05
        value.add_(torch.tensor(rng.normal(0, std, value.shape), dtype=value.dtype))
        if key == "_Q2.0.weight":
            value.mul_(0.05)  # so that the small number in its norm's denominator shows


@torch.no_grad()
def record_tdmpc_networks(file: Recording, agent: Any, obs: torch.Tensor, action: torch.Tensor) -> None:
    from algorithm import helper

    model = agent.model
    z = model.h(obs)
    file.output("encode_obs0", z)
    file.output("encode_target_obs0", agent.model_target.h(obs))
    z_next, reward = model.next(z, action)
    file.output("next", z_next)
    file.output("reward", reward)
    file.output("q", torch.stack(model.Q(z, action)))
    file.output("q_target", torch.stack(agent.model_target.Q(z, action)))
    file.output("pi_mean", model.pi(z))
    with file.draws("pi", helper):
        file.output("pi_action", model.pi(z, agent.cfg.min_std))


class GivenWindows:
    """In place of the original's replay: returns a batch, and keeps the priorities that it is given."""

    def __init__(self, obs: torch.Tensor, action: torch.Tensor, reward: torch.Tensor, weights: torch.Tensor):
        def with_unused(values: torch.Tensor) -> torch.Tensor:  # the transition behind the window
            return torch.cat([values, torch.full_like(values[:1], torch.nan)])

        self.batch = (obs[0], with_unused(obs[1:]), with_unused(action), with_unused(reward), None, weights[:, None])
        self.priorities: torch.Tensor | None = None

    def sample(self) -> tuple:
        return self.batch

    def update_priorities(self, idxs: None, priorities: torch.Tensor) -> None:
        self.priorities = priorities[:, 0]


def record_tdmpc_update(file: Recording, agent: Any, name: str, windows: GivenWindows, step: int) -> None:
    """One update, with what the original does not return: targets, losses of each window, norms of both gradients."""
    from algorithm import helper

    targets: list[torch.Tensor] = []
    norms: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    td_target = agent._td_target
    clip_grad_norm = torch.nn.utils.clip_grad_norm_
    clamp = torch.Tensor.clamp

    def recorded_target(*arguments: Any) -> torch.Tensor:
        targets.append(td_target(*arguments))
        return targets[-1]

    def recorded_norm(*arguments: Any, **options: Any) -> torch.Tensor:
        norms.append(clip_grad_norm(*arguments, **options))
        return norms[-1]

    def recorded_clamp(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if options == {"max": 1e4}:
            losses.append(tensor.detach()[:, 0])
        return clamp(tensor, *arguments, **options)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(agent, "_td_target", recorded_target))
        stack.enter_context(mock.patch.object(torch.nn.utils, "clip_grad_norm_", recorded_norm))
        stack.enter_context(mock.patch.object(torch.Tensor, "clamp", recorded_clamp))
        stack.enter_context(file.draws(name, helper))
        info = agent.update(windows, step)
    for key, value in info.items():
        file.output(f"{name}_info_{key}", np.float32(value))
    file.output(f"{name}_info_pi_grad_norm", norms[1])
    cfg = agent.cfg
    total = torch.zeros(BATCH)
    for key, value in zip(("consistency", "reward", "value"), losses, strict=False):
        file.output(f"{name}_per_sample_{key}_loss", value)
        total += getattr(cfg, f"{key}_coef") * value.clamp(max=1e4)
    file.output(f"{name}_per_sample_total_loss", total)
    file.output(f"{name}_td_target", torch.stack(targets))
    file.output(f"{name}_priorities", windows.priorities)
    file.output(f"{name}_std", agent.std)
    file.output(f"{name}_step", step)


def record_tdmpc_batch(file: Recording, prefix: str, scale: np.ndarray) -> tuple[torch.Tensor, ...]:
    cfg = SimpleNamespace(**TDMPC_SETTINGS)
    obs = file.input(f"{prefix}in_obs", lambda: scale[0] * file.normal(cfg.horizon + 1, BATCH, *cfg.obs_shape))
    action = file.input(f"{prefix}in_action", lambda: 0.7 * file.normal(cfg.horizon, BATCH, cfg.action_dim))
    reward = file.input(f"{prefix}in_reward", lambda: scale[1] * file.normal(cfg.horizon, BATCH, 1))
    return obs, action, reward


def record_tdmpc_updates(recorder: Recorder) -> None:
    agent = make_tdmpc(recorder)
    with recorder.file("tdmpc1_update") as file:
        obs, action, reward = record_tdmpc_batch(file, "", np.ones((2, BATCH, 1)).astype(np.float32))
        weights = file.input(
            "in_weights", lambda: (file.rng.uniform(0.2, 1, (3, BATCH)) * [[1], [0.01], [1]]).astype(np.float32)
        )
        record_tdmpc_networks(file, agent, obs[0], action[0])
        for i in range(3):
            windows = GivenWindows(obs, action, reward, weights[i])
            record_tdmpc_update(file, agent, f"update{i}", windows, 5000 + i)
        record_tdmpc_parameters(file, agent, "update2")

        agent = make_tdmpc(recorder)
        scale = np.ones((2, BATCH, 1), np.float32)
        scale[1, 0] = 12_000  # rewards whose errors are beyond the bound
        scale[0, 1] = 1000  # observations whose consistency is
        obs, action, reward = record_tdmpc_batch(file, "bounded_", scale)
        weights = file.input("bounded_in_weights", lambda: file.rng.uniform(0.2, 1, BATCH).astype(np.float32))
        record_tdmpc_update(file, agent, "bounded", GivenWindows(obs, action, reward, weights), 5002)
        record_tdmpc_parameters(file, agent, "bounded")
        for key in "discount min_std horizon rho lr grad_clip_norm tau update_freq".split():
            file.output(f"cfg_{key}", TDMPC_SETTINGS[key])
        for key in ("consistency_coef", "reward_coef", "value_coef"):
            file.output(f"cfg_{key}", TDMPC_SETTINGS[key])


def record_tdmpc_parameters(file: Recording, agent: Any, name: str) -> None:
    for kind, model in (("model", agent.model), ("target", agent.model_target)):
        for key, value in model.state_dict().items():
            file.output(f"{name}_after_{kind}.{key}", value)


def record_tdmpc_plans(recorder: Recorder) -> None:
    """Three consecutive calls of the planner, at two points of the schedules."""
    from algorithm import helper

    with recorder.file("tdmpc1_plan") as file:
        obs = file.input("in_obs", lambda: file.normal(3, *TDMPC_SETTINGS["obs_shape"]))
        for point, step in (("early", 7000), ("late", 30_000)):
            for mode in ("explore", "eval"):
                agent = make_tdmpc(recorder)
                agent.std = helper.linear_schedule(agent.cfg.std_schedule, step)
                for i in range(3):
                    record_tdmpc_plan(file, agent, obs[i].numpy(), f"{point}_{mode}{i}", i == 0, mode == "eval", step)
            file.output(f"{point}_step", step)
            file.output(f"{point}_std_floor", agent.std)
            file.output(f"{point}_horizon", len(agent._prev_mean))
        for key in "iterations num_samples num_elites mixture_coef min_std temperature momentum discount".split():
            file.output(f"cfg_{key}", TDMPC_SETTINGS[key])
        file.output("num_pi_trajs", int(TDMPC_SETTINGS["mixture_coef"] * TDMPC_SETTINGS["num_samples"]))


def record_tdmpc_plan(
    file: Recording, agent: Any, obs: np.ndarray, name: str, first: bool, evaluating: bool, step: int
) -> None:
    from algorithm import helper

    stds: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    topk = torch.topk
    clamp_ = torch.Tensor.clamp_

    def recorded_topk(*arguments: Any, **options: Any) -> Any:
        result = topk(*arguments, **options)
        values.append(result.values)
        return result

    def recorded_clamp(tensor: torch.Tensor, *arguments: Any) -> torch.Tensor:
        stds.append(clamp_(tensor, *arguments))
        return stds[-1]

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "topk", recorded_topk))
        stack.enter_context(mock.patch.object(torch.Tensor, "clamp_", recorded_clamp))
        stack.enter_context(file.draws(name, helper))
        action = agent.plan(obs, eval_mode=evaluating, step=step, t0=first)
    file.output(f"{name}_action", action)
    file.output(f"{name}_mean", agent._prev_mean)
    file.output(f"{name}_std", stds[-1])
    file.output(f"{name}_elite_values", values[-1])


def record_tdmpc_replay(recorder: Recorder) -> None:
    """Six episodes in a replay of four, and the windows that are drawn after each."""
    from algorithm.helper import Episode, ReplayBuffer

    cfg = SimpleNamespace(
        modality="state", obs_shape=(2,), action_dim=1, device="cpu", train_steps=40, max_buffer_size=40,
        episode_length=10, horizon=3, batch_size=6, per_alpha=0.6, per_beta=0.4,
    )  # fmt: skip
    replay = ReplayBuffer(cfg)
    with recorder.file("tdmpc1_replay") as file:
        for e in range(6):
            obs = file.input(f"episode{e}_obs", lambda: file.normal(cfg.episode_length + 1, 2))
            action = file.input(f"episode{e}_action", lambda: file.normal(cfg.episode_length, 1))
            reward = file.input(
                f"episode{e}_reward", lambda: file.rng.uniform(size=cfg.episode_length).astype(np.float32)
            )
            episode = Episode(cfg, obs[0].numpy())
            for t in range(cfg.episode_length):
                episode += (obs[t + 1].numpy(), action[t], float(reward[t]), t + 1 == cfg.episode_length)
            replay += episode
            file.output(f"after{e}_priorities", replay._priorities)
            file.output(f"after{e}_filled", cfg.train_steps if replay._full else replay.idx)
            record_tdmpc_sample(file, replay, f"after{e}")
        for key in ("per_alpha", "per_beta", "horizon", "episode_length"):
            file.output(f"cfg_{key}", getattr(cfg, key))
        file.output("capacity", replay.capacity)


def record_tdmpc_sample(file: Recording, replay: Any, name: str) -> None:
    horizon = replay.cfg.horizon

    def choice(total: int, size: int, p: np.ndarray, replace: bool) -> np.ndarray:
        file.output(f"{name}_probabilities", p)
        file.output(f"{name}_replace", replace)
        probabilities = p / p.sum(dtype=np.float64)
        idxs = file.input(f"{name}_idxs", lambda: file.rng.choice(total, size, p=probabilities, replace=replace))
        return idxs.numpy()

    with mock.patch.object(np.random, "choice", choice):
        obs, next_obs, action, reward, idxs, weights = replay.sample()
    file.output(f"{name}_weights", weights)
    file.output(f"{name}_obs", torch.cat([obs[None], next_obs[:horizon]]))
    file.output(f"{name}_action", action[:horizon])
    file.output(f"{name}_reward", reward[:horizon])
    by_slot = file.rng.uniform(0.1, 5, replay.capacity).astype(np.float32)  # a window drawn twice has one priority
    new = file.input(f"{name}_new_priorities", lambda: by_slot[idxs])
    replay.update_priorities(idxs, new[:, None])


# ------------------------------------------------------------------------------------------- Environments and datasets
def record_rollouts(recorder: Recorder) -> None:
    """25 random decisions in every task of DMControl that this checkout has, from the start state of seed 3."""
    from envs.dmcontrol import make_env

    with recorder.file("dmcontrol_rollouts") as file:
        packages = ("mujoco", "dm_control")
        file.output("versions", [f"{package} {importlib.metadata.version(package)}" for package in packages])
        for task in DMCONTROL_TASKS:
            try:
                env = make_env(SimpleNamespace(task=task, obs="state", seed=3))
            except (ValueError, FileNotFoundError) as error:
                print(f"{task} is left out: {error}")
                continue
            observations = [env.reset()]
            physics = env.unwrapped.physics
            for key in ("qpos", "qvel", "mocap_pos"):
                file.output(f"{task}/{key}", getattr(physics.data, key).copy())
            for key in ("geom_pos", "geom_size", "site_pos"):
                file.output(f"{task}/{key}", getattr(physics.model, key).copy())
            size = env.action_space.shape
            actions = file.input(
                f"{task}/actions", lambda size=size: file.rng.uniform(-1, 1, (25, *size)).astype(np.float32)
            )
            rewards = []
            for action in actions.numpy():
                obs, reward, *_ = env.step(action)
                observations.append(obs)
                rewards.append(reward)
            file.output(f"{task}/obs", np.stack(observations))
            file.output(f"{task}/rewards", np.array(rewards))


def record_chunks(recorder: Recorder) -> None:
    """Dataset files as the installed tensordict writes them."""
    from tensordict import TensorDict

    version = importlib.metadata.version("tensordict")
    for kind in ("float32", "float16", "views"):
        name = f"chunk_{version}_{kind}"
        if recorder.compare and not (recorder.compare / f"{name}.npz").exists():
            print(f"{name} is left out: it is not in {recorder.compare}")
            continue
        with recorder.file(name) as file:
            tensors = chunk_tensors(file, torch.float16 if kind == "float16" else torch.float32)
            if kind == "views":
                tensors = views(tensors)
            path = recorder.output / f"{name}.pt"
            torch.save(TensorDict(tensors, batch_size=(6, 9)), path)
        if recorder.compare:
            same = pickle_of(path) == pickle_of(recorder.compare / path.name)
            print(f"{path.name}: {'the same pickle' if same else 'another pickle'}")


def chunk_tensors(file: Recording, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Six episodes of nine entries; actions and rewards of the first entries are filler."""

    def with_filler(*size: int) -> np.ndarray:
        values = file.normal(6, 9, *size)
        values[:, 0] = np.nan
        return values

    tensors = {
        "obs": file.input("obs", lambda: file.normal(6, 9, 24)),
        "action": file.input("action", lambda: with_filler(6)),
        "reward": file.input("reward", lambda: with_filler()),
    }
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    for key, value in tensors.items():
        file.arrays[key] = value.numpy()
    tensors["task"] = file.input("task", lambda: np.repeat(np.arange(6)[:, None], 9, 1))
    return tensors


def views(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers, observations stored in another order and actions in a part of a larger storage."""
    action = tensors["action"]
    larger = torch.zeros(len(action) + 2, *action.shape[1:], dtype=action.dtype)
    larger[2:] = action
    return tensors | {"obs": tensors["obs"].transpose(0, 1).contiguous().transpose(0, 1), "action": larger[2:]}


def pickle_of(path: Path) -> bytes:
    """The part of a file that says what it holds, in which order and where."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        return archive.read(name)


# --------------------------------------------------------------------------------------------------------------- Main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, help="checkout of nicklashansen/tdmpc2")
    parser.add_argument("--original-tdmpc", type=Path, help="checkout of nicklashansen/tdmpc")
    parser.add_argument("--output", type=Path, required=True, help="folder for the recordings")
    parser.add_argument("--compare", type=Path, help="folder of recordings whose inputs are taken and compared with")
    parser.add_argument("--rollouts", action="store_true", help="of DMControl, too: needs dm_control and MuJoCo")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.compare and args.compare.resolve() == args.output.resolve():
        parser.error("--output must be another folder than --compare")
    args.output.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(args.output, args.compare, args.seed)
    record_chunks(recorder)
    if args.original:
        with cpu_copy(args.original / "tdmpc2", (*ON_CPU, WITH_EXTRA_LOSS)):
            record_maths(recorder)
            for name in ("single", "wide", "episodic", "two_q", "multitask"):
                record_model(recorder, name)
            record_distillation(recorder)
            record_pixels(recorder)
            if args.rollouts:
                record_rollouts(recorder)
    if args.original_tdmpc:
        with cpu_copy(args.original_tdmpc / "src", ON_CPU):
            record_tdmpc_updates(recorder)
            record_tdmpc_plans(recorder)
            record_tdmpc_replay(recorder)


if __name__ == "__main__":
    main()
