"""ManiSkill 3, with the task of TD-MPC2's that it no longer has."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from tdmpc2_support.envs.adapter import Simulator
from tdmpc2_support.envs.rendering import FRAME
from tdmpc2_support.envs.tasks import PACKAGE_IDS, TaskSpec, import_simulator
from tdmpc2_support.errors import UserError

_ASSETS = {"pick-ycb": "ycb", "turn-faucet": "partnet_mobility_faucet"}


def make(spec: TaskSpec, render_mode: str | None) -> Simulator:
    """A ManiSkill 3 task on its CPU simulator; drawn by the GPU if PyTorch sees one."""
    import_simulator(spec.domain)
    import torch
    from mani_skill.utils import assets
    from mani_skill.utils.wrappers.gymnasium import CPUGymWrapper

    from tdmpc2_support.envs import maniskill_tasks  # noqa: F401  registers LiftCube-v1

    torch.set_num_threads(1)  # its tensors have one row, and the cores are XLA's
    sources = assets.expand_data_group_into_individual_data_source_ids(PACKAGE_IDS[spec.name])
    if not all(map(assets.is_data_source_downloaded, sources)):  # else it would ask on the terminal, and wait
        download = f"python -m mani_skill.utils.download_asset -y {_ASSETS[spec.name]}"
        raise UserError(f"task {spec.name!r} needs files that are not here; download them with {download}")
    try:
        simulator = gym.make(
            PACKAGE_IDS[spec.name],
            obs_mode="state",
            control_mode="pd_ee_delta_pos" if spec.name.endswith("-cube") else "pd_ee_delta_pose",
            sim_backend="physx_cpu",
            render_backend="gpu" if torch.cuda.is_available() else "cpu",
            render_mode=render_mode,
            human_render_camera_configs={"width": FRAME, "height": FRAME},
        ).unwrapped  # without its own time limit
    except RuntimeError as error:
        hint = "apt-get install -y libvulkan1 mesa-vulkan-drivers; without a GPU, Mesa must be 25 or newer"
        raise UserError(f"task {spec.name!r} needs Vulkan, also without pictures ({error}): {hint}") from error
    return Simulator(ManiSkill(CPUGymWrapper(simulator, ignore_terminations=True)), 1 / simulator.control_freq)


class ManiSkill(gym.Wrapper):
    """Every reset with a seed, of a stream of our own: its others draw from PyTorch's global generator."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self._seeds = np.random.default_rng(seed)
        return self.env.reset(seed=int(self._seeds.integers(2**31)), options=options)
