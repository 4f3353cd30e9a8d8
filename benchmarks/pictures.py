"""What the agent of tdmpc2_jax_rgb.py sees: a picture of stacks, one row per task, to be looked at.

    python benchmarks/pictures.py --output benchmarks/results/pictures.png

From left to right: the first stack of an episode (one picture three times); the stack eight random decisions later,
oldest picture first; that stack as two random shifts of it are encoded; its last picture without shadows and
reflections. Printed for DMControl: by how much a picture differs from one of dm_control's own renderer.
"""

import dataclasses
import sys
from pathlib import Path

import imageio.v3 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import envs as environments
import tdmpc2_jax_rgb as rgb
from tdmpc2_support.envs import rendering


@dataclasses.dataclass(frozen=True)
class Args:
    tasks: tuple[str, ...] = ("walker-walk", "reacher-easy", "quadruped-run", "mw-reach")
    """tasks to draw"""
    output: str = "benchmarks/results/pictures.png"
    """picture to write"""
    scale: int = 2
    """pixels of the output for each pixel of a picture"""


def row(task: str) -> np.ndarray:
    """The pictures of one task side by side, uint8 [64, width, 3]."""
    rng, last = np.random.default_rng(0), {}
    for shadows in (True, False):
        env = environments.make_env(task, seed=0, obs="rgb", shadows=shadows)
        obs, _ = env.reset()
        start = seen = np.tile(obs[None], rgb.FRAMES)
        actions = np.random.default_rng(1).uniform(-1, 1, (8, *env.action_space.shape))
        for action in actions:
            obs, *_ = env.step(action)
            seen = rgb.stack_pictures(seen, obs[None], np.zeros(1, bool))
        last[shadows] = obs, start[0], seen[0]
        if shadows and environments.task_spec(task).domain == "DMControl":
            camera = 2 if "quadruped" in task else 0
            theirs = env.unwrapped.physics.render(rgb.PIXELS, rgb.PIXELS, camera_id=camera)
            difference = np.abs(obs.astype(int) - theirs)
            print(f"{task}: differs from dm_control's picture by at most {difference.max()} in a value")
        env.close()
    shifts = jnp.asarray(rng.integers(0, 2 * rgb.SHIFT + 1, (2, 2)))
    obs, start, seen = last[True]
    shifted = np.asarray(jax.vmap(rgb.shift_stack, in_axes=(None, 0))(jnp.asarray(seen), shifts))
    groups = [*map(split, (start, seen, *shifted)), [last[False][0]]]
    gap = np.full((rgb.PIXELS, 6, 3), 255, np.uint8)
    return np.concatenate([part for group in groups for part in (*group, gap)], axis=1)


def split(stack: np.ndarray) -> list[np.ndarray]:
    """The pictures of a stack [64, 64, 9]."""
    return np.split(stack, rgb.FRAMES, axis=-1)


def main(args: Args) -> None:
    rendering.choose_gl()  # dm_control's renderer wants to know before it is imported
    rows = [row(task) for task in args.tasks]
    gap = np.full((6, rows[0].shape[1], 3), 255, np.uint8)
    picture = np.concatenate([part for one in rows for part in (one, gap)])
    imageio.imwrite(args.output, picture.repeat(args.scale, 0).repeat(args.scale, 1))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
