"""What a paper would show stands in every script, letter for letter the same; what keeps a run is imported."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("tdmpc*.py"))
COPIES = {
    "tdmpc2_jax_mt": """
        MODEL_SIZES discount_of
        symlog symexp two_hot two_hot_inv soft_ce mish simnorm
        Linear MLP PolicySample pick_heads dropout_mask
        PlanNoise plan_noise two_heads
        UpdateNoise update_noise optimizers
    """.split(),
    "tdmpc2_jax_rgb": """
        discount_of
        symlog symexp two_hot two_hot_inv soft_ce mish simnorm
        Linear MLP PolicySample policy q_logits pick_heads dropout_mask
        two_heads estimate_value
        TrainState optimizers init_state td_target policy_loss
        fresh_state
    """.split(),
    "tdmpc_jax": [],  # the first version has the same blocks in the same order, and something else in each
    "world_model": """
        MODEL_SIZES SCRIPTS SIZE_FIELDS with_model_size discount_of
        symlog symexp two_hot two_hot_inv soft_ce mish simnorm
        Linear MLP WorldModel make_model init_params
        PolicySample policy q_logits pick_heads dropout_mask
        PlanNoise plan_noise two_heads estimate_value plan act
        TrainState Batch UpdateNoise update_noise optimizers init_state td_target model_loss policy_loss update
        Replay init_replay add sample train fresh_state
    """.split(),
    "tdmpc2_jax_diffusion": [],
}


def blocks(script):
    """Text of every function, class and constant of a script's algorithm, with its decorators and the comment above."""
    lines, found = (ROOT / f"{script}.py").read_text().splitlines(), {}
    for node in ast.parse("\n".join(lines)).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        name = getattr(target, "id", getattr(node, "name", None))
        if name in (None, "main"):
            continue
        start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
        while lines[start - 1].startswith("#") and "----" not in lines[start - 1]:
            start -= 1
        found[name] = "\n".join(lines[start : node.end_lineno])
    return found


@pytest.mark.parametrize("script", COPIES)
def test_blocks_of_the_algorithm_that_are_the_same_are_those_named_here_letter_for_letter(script):
    original, copy = blocks("tdmpc2_jax"), blocks(script)
    equal = {name for name in original.keys() & copy.keys() if original[name] == copy[name]}
    assert equal == {*COPIES[script]}


def test_the_table_of_the_papers_equations_names_what_the_script_has():
    text = (ROOT / "README.md").read_text()
    rows = re.search(r"\| in the paper \|.*?\n\n", text, re.DOTALL)[0].strip().splitlines()[2:]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[-2])}
    assert len(rows) > 10 and named <= blocks("tdmpc2_jax").keys()


def test_the_first_version_has_its_blocks_in_the_order_of_the_second():
    original, copy = blocks("tdmpc2_jax"), blocks("tdmpc_jax")
    assert [name for name in original if name in copy] == [name for name in copy if name in original]


def arguments(script):
    """Type, default and explanation of every argument: one line each."""
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    body = next(node for node in ast.parse("\n".join(lines)).body if getattr(node, "name", "") == "Args").body
    fields = [re.fullmatch(r"    (\w+): (.+?) = (.+)  # (.+)", lines[node.lineno - 1]) for node in body]
    assert all(fields) and all(node.lineno == node.end_lineno for node in body)
    return {field[1]: field.groups()[1:] for field in fields}


MEANT = {  # arguments that mean something else in another script
    "tdmpc2_jax_mt": "exp_name seed resume checkpoint_freq log_freq eval_freq eval_episodes capture_video evaluate "
    "checkpoint model_size batch_size",
    "tdmpc2_jax_rgb": "task exp_name checkpoint model_size mlp_dim latent_dim buffer_size",
    "tdmpc_jax": "exp_name enc_dim mlp_dim latent_dim batch_size seed_steps lr grad_clip_norm tau consistency_coef "
    "reward_coef horizon iterations num_pi_trajs min_std total_timesteps checkpoint eval_freq save_episodes",
    "world_model": "",
    "tdmpc2_jax_diffusion": "exp_name checkpoint evaluate eval_freq checkpoint_freq log_freq total_timesteps",
}


@pytest.mark.parametrize("script", COPIES)
def test_the_arguments_that_two_scripts_share_have_the_same_type_default_and_explanation(script):
    first, second = arguments("tdmpc2_jax"), arguments(script)
    differ = {name for name in first.keys() & second.keys() if first[name] != second[name]}
    assert differ == {*MEANT[script].split()}


def test_importing_envs_loads_no_simulator_and_no_jax():
    code = "import sys, envs; print(*(m for m in sys.modules if m in sys.argv))"
    heavy = ["mujoco", "dm_control", "metaworld", "myosuite", "mani_skill", "jax", "flax", "orbax", "torch"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout.split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_starts_nothing(script):
    assert importlib.import_module(script).Args
