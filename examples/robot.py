"""A control loop at a fixed rate, with NumPy and onnxruntime alone: runs a file of `deploy.py --export onnx`.

    python examples/robot.py robot.onnx            # a simulator stands in for the robot

On a robot `reset` and `step` are your own, by the file's "observation", "action_low" (-1) and "action_high" (1)."""

import argparse
import json
import time

import numpy as np
import onnxruntime


def draw(rng, wanted, value_heads):
    """One input of the planner's noise, by its name."""
    if wanted.name == "heads":  # two different ones for each iteration
        return np.stack([rng.permutation(value_heads)[:2] for _ in range(wanted.shape[0])]).astype(np.int32)
    noise = rng.gumbel if wanted.name == "gumbel" else rng.standard_normal
    return noise(size=wanted.shape).astype(np.float32)


def control(session, robot, seconds=None, seed=0):
    """One episode. Returns its return, its decisions, and how many of them came too late for their period."""
    about = session.get_modelmeta().custom_metadata_map
    period = seconds or json.loads(about["control_period"])
    if period is None:
        raise SystemExit("the file does not say how long a decision is kept: give --period")
    shapes = {wanted.name: wanted.shape for wanted in session.get_inputs()}
    draws = [wanted for wanted in session.get_inputs() if wanted.name not in ("obs", "previous_mean", "first")]
    rng = np.random.default_rng(seed)
    inputs = {"previous_mean": np.zeros(shapes.get("previous_mean", 0), np.float32), "first": np.array(True)}
    obs, _ = robot.reset(seed=seed)
    rewards, late, ended = [], 0, False
    deadline = time.monotonic() + period
    while not ended:
        inputs["obs"] = np.asarray(obs, np.float32)
        inputs |= {wanted.name: draw(rng, wanted, int(about["value_heads"])) for wanted in draws}
        action, *mean = session.run(None, {name: inputs[name] for name in shapes})
        if mean:
            inputs |= {"previous_mean": mean[0], "first": np.array(False)}
        late += time.monotonic() > deadline
        time.sleep(max(0.0, deadline - time.monotonic()))
        deadline = max(deadline, time.monotonic()) + period
        obs, reward, terminated, truncated, _ = robot.step(np.clip(action, -1, 1))
        rewards.append(reward)
        ended = terminated or truncated
    return sum(rewards), len(rewards), late


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--period", type=float, help="seconds between two decisions, if not the task's")
    args = parser.parse_args()
    from envs import make_env  # the stand-in: any Gymnasium environment with actions in [-1, 1]

    session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    robot = make_env(session.get_modelmeta().custom_metadata_map["task"])
    print("return {:.1f}, {} decisions, {} of them late".format(*control(session, robot, args.period)))
