"""MuJoCo Playground: DMControl's suite and robots, simulated by MJX."""

import difflib
import subprocess
from pathlib import Path
from typing import Any

import jax

from tdmpc2_support.envs.tasks import import_simulator
from tdmpc2_support.errors import UserError

SUITE_REPEAT = 2  # simulator steps of a decision, as in DMControl; robots have their own


def load(task: str, physics: str) -> "Playground":
    """The environment of a task `playground/NAME`.

    Args:
        task: its name.
        physics: "jax" or "warp".

    Raises:
        UserError: there is no such task, the package is missing, or the models of its robot are.
    """
    import_simulator("Playground")
    import mujoco_playground
    from mujoco_playground import registry

    name = task.partition("/")[2]
    if name not in registry.ALL_ENVS:
        near = difflib.get_close_matches(name, registry.ALL_ENVS, n=3)
        hint = f"did you mean {' or '.join(repr(f'playground/{other}') for other in near)}?" if near else ""
        raise UserError(f"unknown task {task!r}; {hint or 'MuJoCo Playground lists its environments'}")
    config = registry.get_default_config(name)
    overrides = {"impl": physics} if "impl" in config else {}
    try:
        return Playground(name, config, registry.load(name, config_overrides=overrides))
    except (subprocess.CalledProcessError, OSError) as error:
        folder = Path(mujoco_playground.__file__).parent / "external_deps" / "mujoco_menagerie"
        what = f"task {task!r} needs models of robots, which could not be fetched"
        raise UserError(f"{what} ({error}): put a clone of mujoco_menagerie at {folder}") from error
    except Exception as error:  # of this version of MuJoCo or of a package that only this task needs
        raise UserError(f"task {task!r} cannot be loaded: {error}") from error


class Playground:
    """An environment of MuJoCo Playground as `jax_env` wants it."""

    def __init__(self, name: str, config: Any, env: Any):
        import mujoco
        from mujoco_playground import dm_control_suite

        self.env = env
        in_suite = name in dm_control_suite.ALL_ENVS
        self.action_size = env.action_size
        self.episode_length = config.episode_length
        self.action_repeat = SUITE_REPEAT if in_suite else config.action_repeat
        self.can_terminate = not in_suite  # there only a number that is not finite ends an episode
        self.dt = env.dt
        self.reset = env.reset
        self.step = env.step
        self._model = env.mj_model
        self._data = mujoco.MjData(env.mj_model)

    def select(self, condition: jax.Array, new: Any, old: Any) -> Any:
        """One of two states; MJX knows which of its arrays all environments share."""
        data = old.data.where(condition, new.data)
        rest = jax.tree.map(lambda x, y: jax.numpy.where(condition, x, y), new.replace(data=()), old.replace(data=()))
        return rest.replace(data=data)

    def scene(self, state: Any) -> tuple[Any, Any]:
        """MjModel and MjData of a state, to be drawn."""
        import mujoco

        for name in ("qpos", "qvel", "mocap_pos", "mocap_quat"):
            getattr(self._data, name)[:] = getattr(state.data, name)
        mujoco.mj_forward(self._model, self._data)
        return self._model, self._data
