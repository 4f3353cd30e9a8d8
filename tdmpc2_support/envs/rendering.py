"""Pictures of MuJoCo models without a display, drawn by `mujoco.Renderer`."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import os
import subprocess
import sys
import weakref
from collections.abc import MutableMapping
from typing import Any

import numpy as np

from tdmpc2_support.errors import UserError

FRAME = 384  # height and width of render()
PIXELS = 64  # height and width of an rgb observation
GL_PACKAGES = "libegl1 libosmesa6 libgl1 libgl1-mesa-dri"

_worker = 0  # this process's number among the workers of a vector environment


def choose_gl() -> str:
    """Sets MUJOCO_GL to a way of drawing that works here: the user's choice, else EGL (GPU or Mesa), else OSMesa (CPU).

    Whether one works is not known before a context is made (the library may be there without a device), and PyOpenGL
    cannot change over in a process that has loaded the wrong one: so each is tried in a process of its own. Workers
    inherit the choice.

    Raises:
        UserError: none works, or the user's choice is that there be no pictures.
    """
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    if chosen in ("disable", "disabled", "off", "false", "0"):
        raise UserError(f"MUJOCO_GL={chosen} forbids pictures: unset it, or set it to egl or osmesa")
    if chosen:
        return chosen
    for name in ("egl", "osmesa", "glfw"):
        probe = f"from mujoco.{name} import GLContext; GLContext({PIXELS}, {PIXELS}).make_current()"
        environment = {**os.environ, "MUJOCO_GL": "disable"}
        run = subprocess.run([sys.executable, "-P", "-c", probe], env=environment, capture_output=True, check=False)
        if run.returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return name
    raise UserError(f"pictures need OpenGL, and neither EGL nor OSMesa works here: apt-get install -y {GL_PACKAGES}")


class Camera:
    """Draws square RGB frames of a MuJoCo model.

    Args:
        model: the MjModel to draw.
        size: height and width in pixels.
        camera: a camera of the model; the free camera if it has none.
        effects: draw shadows and reflections.

    Raises:
        UserError: pictures cannot be drawn here.
    """

    def __init__(self, model: Any, size: int, camera: int, effects: bool = True):
        self._renderer = None
        import mujoco
        from mujoco.rendering.classic import gl_context

        gl_context.GLContext = _gl_context  # else of the library that MUJOCO_GL named when MuJoCo was imported
        self.model, self._camera = model, camera if model.ncam else -1
        # The offscreen buffer has the model's size, and copying one of 640 × 480 costs more than a small picture.
        settings = model.vis.global_
        before = settings.offwidth, settings.offheight
        settings.offwidth = settings.offheight = size
        try:
            self._renderer = mujoco.Renderer(model, size, size)
        finally:
            settings.offwidth, settings.offheight = before
        for effect in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[effect] &= effects
        self._option = mujoco.MjvOption()
        self._option.flags[mujoco.mjtVisFlag.mjVIS_RANGEFINDER] = False  # sensor beams are no part of the scene
        _open_cameras.add(self)

    def frame(self, data: Any) -> np.ndarray:
        """The picture of a state (MjData): uint8 [size, size, 3], right way up."""
        self._renderer.update_scene(data, self._camera, self._option)
        return self._renderer.render()

    def close(self) -> None:
        """Frees the GL context."""
        renderer, self._renderer = self._renderer, None
        if renderer is not None:  # frees in its own context; the renderer would in whichever is current
            renderer._gl_context.make_current()
            renderer._mjr_context.free()
            renderer.close()

    def __del__(self) -> None:
        self.close()


_open_cameras: weakref.WeakSet[Camera] = weakref.WeakSet()


def _gl_context(width: int, height: int) -> Any:
    """A GL context of the chosen library; with EGL on the GPU of CUDA_VISIBLE_DEVICES, if it can be opened."""
    name = choose_gl()
    try:
        gl: Any = importlib.import_module(f"mujoco.{name}")
        chosen = name == "egl" and _choose_gpu(os.environ, _worker)
        try:
            context = gl.GLContext(width, height)
        except (ImportError, RuntimeError):
            if not chosen:
                raise
            del os.environ["MUJOCO_EGL_DEVICE_ID"]
            gl.EGL_DISPLAY = None  # not the one that could not be opened
            context = gl.GLContext(width, height)
    except (ImportError, RuntimeError, AttributeError) as error:  # the last from PyOpenGL, without a library
        raise UserError(
            f"pictures need OpenGL, and MUJOCO_GL={name} does not work here ({error}): apt-get install -y {GL_PACKAGES}"
        ) from error
    _close_cameras_at_exit()
    return context


def _choose_gpu(environment: MutableMapping[str, str], worker: int) -> bool:
    """Lets MuJoCo draw where the process computes, on the GPUs of CUDA_VISIBLE_DEVICES (worker processes in turn),
    unless the user's MUJOCO_EGL_DEVICE_ID says where; returns whether it did. MuJoCo would take the first of all."""
    gpus = [gpu.strip() for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip().isdecimal()]
    if not gpus or "MUJOCO_EGL_DEVICE_ID" in environment:
        return False
    environment["MUJOCO_EGL_DEVICE_ID"] = gpus[worker % len(gpus)]
    return True


@functools.cache
def _close_cameras_at_exit() -> None:
    """To be called when a GL context was made: MuJoCo's own exit handler ends EGL, and the last ones run first."""

    def close() -> None:
        for camera in list(_open_cameras):
            with contextlib.suppress(Exception):  # another library's handler may have ended EGL already
                camera.close()

    atexit.register(close)


def turn_upright(model: Any, data: Any, camera: int) -> None:
    """Turns a camera that hangs upside down in this state by 180° about its line of sight."""
    import mujoco

    mujoco.mj_forward(model, data)
    if data.cam_xmat[camera, 7] < -0.5:  # z of the picture's upward direction
        mujoco.mju_mulQuat(model.cam_quat[camera], model.cam_quat[camera].copy(), [0.0, 0.0, 0.0, 1.0])
