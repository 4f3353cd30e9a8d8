"""ManiSkill's lift-cube, which version 3 no longer has: its PickCube scene without the goal.

Only maniskill.py imports this, when a ManiSkill task is made; importing it registers `LiftCube-v1`.
"""

from __future__ import annotations

from typing import Any

import sapien
import torch
from mani_skill.envs.tasks import PickCubeEnv
from mani_skill.utils.registration import register_env


@register_env("LiftCube-v1", max_episode_steps=100)
class LiftCubeEnv(PickCubeEnv):
    """Raise the cube by 0.2 m and hold it there, the robot still.

    Observation [36]: the robot's 9 joint positions and 9 velocities, whether the cube is grasped, the tool's pose, the
    cube's pose, tool to cube. Everything is a batch of one environment.
    """

    goal_height = 0.2  # metres

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict) -> None:
        super()._initialize_episode(env_idx, options)
        self.goal_site.set_pose(sapien.Pose([0.0, 0.0, -10.0]))  # below the floor, where no picture shows it

    def _get_obs_extra(self, info: dict) -> dict[str, torch.Tensor]:
        cube, tool = self.cube.pose, self.agent.tcp_pose
        return {
            "is_grasped": info["is_grasped"],
            "tcp_pose": tool.raw_pose,
            "obj_pose": cube.raw_pose,
            "tcp_to_obj_pos": cube.p - tool.p,
        }

    def _lifted(self) -> torch.Tensor:
        return self.cube.pose.p[:, 2] - self.cube_half_size

    def evaluate(self) -> dict[str, torch.Tensor]:
        still, high = self.agent.is_static(0.2), self._lifted() >= self.goal_height
        return {"success": high & still, "is_grasped": self.agent.is_grasping(self.cube, max_angle=30)}

    def compute_dense_reward(self, obs: Any, action: torch.Tensor, info: dict) -> torch.Tensor:
        """Reach in [0, 1] + 0.25 for the grasp + lift in [0, 1] while grasped; their sum, 2.25, on success."""
        distance = torch.linalg.norm(self.cube.pose.p - self.agent.tcp_pose.p, dim=1)
        reach, lift = 1 - torch.tanh(5 * distance), (self._lifted() / self.goal_height).clamp(max=1.0)
        reward = reach + info["is_grasped"] * (0.25 + lift)
        return torch.where(info["success"], 2.25, reward)

    def compute_normalized_dense_reward(self, obs: Any, action: torch.Tensor, info: dict) -> torch.Tensor:
        return self.compute_dense_reward(obs, action, info) / 2.25
