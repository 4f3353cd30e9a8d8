"""What a paper would show stands in every script, letter for letter the same; what keeps a run is imported."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for pattern in ("tdmpc*.py", "newt*.py") for path in ROOT.glob(pattern))
DIFFERENT = {  # what a script changes in a block of tdmpc2_jax.py; all other blocks of the same name are the same
    "tdmpc2_jax_mt": """
        Agent Args SCRIPTS SIZE_FIELDS with_model_size
        Networks networks init_params policy q_logits dropout_mask
        estimate_value plan act
        TrainState Batch init_state td_target model_loss policy_loss update
        sample train
        evaluate evaluate_checkpoint
        fresh_state start_or_resume loop run
    """.split(),
    "tdmpc2_jax_rgb": """
        Agent Args SCRIPTS for_task
        Networks networks init_params
        PlanNoise plan_noise plan act
        Batch UpdateNoise update_noise model_loss update
        Step Replay init_replay add sample train
        make_eval_envs evaluate evaluate_checkpoint
        start_or_resume loop run
    """.split(),
    "tdmpc_jax": """
        Agent Args SCRIPTS for_task
        Linear MLP Networks networks init_params PolicySample policy
        PlanNoise plan_noise estimate_value plan act
        TrainState Batch UpdateNoise update_noise optimizers init_state td_target model_loss policy_loss update
        Step Replay init_replay add train
        make_eval_envs evaluate evaluate_checkpoint
        fresh_state start_or_resume loop run
    """.split(),
    "newt_jax": """
        Agent Args MODEL_SIZES SCRIPTS with_model_size
        networks init_params
        estimate_value plan act
        TrainState Batch init_state td_target model_loss policy_loss update
        sample train
        evaluate evaluate_checkpoint
        fresh_state start_or_resume loop run
    """.split(),
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


@pytest.mark.parametrize("script", DIFFERENT)
def test_blocks_of_one_name_are_the_same_to_the_letter_but_for_those_that_the_script_changes(script):
    original, copy = blocks("tdmpc2_jax"), blocks(script)
    different = {name for name in original.keys() & copy.keys() if original[name] != copy[name]}
    assert different <= {*DIFFERENT[script]}


def code(block):
    """The lines of a function without its docstring, comments and decorators."""
    [function] = ast.parse(block).body
    function.decorator_list = []
    function.body = function.body[1:] if ast.get_docstring(function) else function.body
    return ast.unparse(function).splitlines()[1:]


@pytest.mark.parametrize("name", ["plan", "model_loss", "update", "evaluate", "td_target", "policy_loss"])
def test_from_pixels_nothing_differs_but_what_is_seen(name):
    states, pixels = (code(blocks(script)[name]) for script in ("tdmpc2_jax", "tdmpc2_jax_rgb"))
    assert all("obs" in line for line in states if line not in pixels)
    assert all(re.search(r"obs|seen|stacks|len\(first\)|reward\.shape", line) for line in pixels if line not in states)


def test_the_table_of_the_papers_equations_names_what_the_script_has():
    text = (ROOT / "README.md").read_text()
    rows = re.search(r"\| in the paper \|.*?\n\n", text, re.DOTALL)[0].strip().splitlines()[2:]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[-2])}
    assert len(rows) > 10 and named <= blocks("tdmpc2_jax").keys()


def arguments_of(function):
    """Names that a function hands to others, each with the name of the one that it is handed to."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            yield from ((value.id, called) for value in values if isinstance(value, ast.Name))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_key_that_numbers_are_folded_into_is_used_for_nothing_else(script):
    """Folding i into a key gives the one that splitting it puts at place i, which JAX does not notice."""
    for function in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
        if isinstance(function, ast.FunctionDef):
            handed = {*arguments_of(function)}
            folded = {name for name, called in handed if called == "fold_in" and "key" in name}
            assert not {(name, called) for name, called in handed if name in folded and called != "fold_in"}


@pytest.mark.parametrize("script", DIFFERENT)
def test_blocks_stand_in_the_same_order(script):
    original, copy = blocks("tdmpc2_jax"), blocks(script)
    assert [name for name in original if name in copy] == [name for name in copy if name in original]


def arguments(script):
    """Type, default and explanation of every argument: one line each."""
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    classes = {node.name: node.body for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.ClassDef)}
    nodes = [node for name in ("Agent", "Args") for node in classes.get(name, ()) if isinstance(node, ast.AnnAssign)]
    nodes = [node for node in nodes if node.target.id != "agent"]
    fields = [re.fullmatch(r"    (\w+): (.+?) = (.+)  # (.+)", lines[node.lineno - 1]) for node in nodes]
    assert all(fields) and all(node.lineno == node.end_lineno for node in nodes)
    return {field[1]: field.groups()[1:] for field in fields}


MEANT = {  # arguments that mean something else in another script
    "tdmpc2_jax_mt": "exp_name seed resume checkpoint_freq log_freq eval_freq eval_episodes capture_video evaluate "
    "checkpoint model_size batch_size",
    "tdmpc2_jax_rgb": "task exp_name checkpoint model_size enc_dim latent_dim num_enc_layers obs_dim buffer_size "
    "save_episodes",
    "tdmpc_jax": "exp_name enc_dim mlp_dim latent_dim batch_size seed_steps lr grad_clip_norm tau consistency_coef "
    "reward_coef horizon iterations num_pi_trajs min_std total_timesteps checkpoint eval_freq save_episodes discount "
    "buffer_size obs_dim",
    "tdmpc2_jax_device": "task exp_name save_episodes",
    "newt_jax": "exp_name model_size batch_size rho dropout num_envs buffer_size seed_steps utd total_timesteps "
    "checkpoint evaluate eval_freq eval_episodes checkpoint_freq log_freq capture_video resume can_terminate",
    "tdmpc2_jax_diffusion": "exp_name checkpoint evaluate eval_freq checkpoint_freq log_freq total_timesteps "
    "save_episodes source_task mpc",
}


@pytest.mark.parametrize("script", MEANT)
def test_the_arguments_that_two_scripts_share_have_the_same_type_default_and_explanation(script):
    first, second = arguments("tdmpc2_jax"), arguments(script)
    differ = {name for name in first.keys() & second.keys() if first[name] != second[name]}
    assert differ <= {*MEANT[script].split()}


LAYERS = {  # what a module of the package may import of it, beside what its own folder has
    "errors": set(),
    "bounds": set(),
    "files": set(),
    "convolution": set(),
    "processes": set(),
    "envs": {"errors", "files", "processes"},
    "cli": {"bounds", "envs", "errors"},
    "backend": set(),
    "devices": {"backend", "errors"},
    "data": {"envs", "cli", "devices", "errors", "files"},
    "run": {"agents", "backend", "data", "envs", "cli", "devices", "errors", "files", "processes"},
    "agents": {"run", "data", "envs", "cli", "devices", "errors", "files"},
}


def imports(path):
    """Names of the project's modules that a file imports, as the parts of their dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [
                f"{node.module}.{alias.name}" if node.module == "tdmpc2_support" else node.module
                for alias in node.names
            ]
        yield from (name.split(".") for name in names)


@pytest.mark.parametrize("path", sorted((ROOT / "tdmpc2_support").rglob("*.py")), ids=lambda path: path.stem)
def test_a_module_of_the_package_imports_what_lies_below_it_and_no_script(path):
    layer = path.relative_to(ROOT / "tdmpc2_support").parts[0].removesuffix(".py")
    for first, *rest in imports(path):
        assert first not in {*SCRIPTS, "envs", "deploy"}, f"{path.name} imports {first}"
        if first == "tdmpc2_support" and layer != "__init__":
            assert rest[0] == layer or rest[0] in LAYERS[layer], f"{path.name} imports {'.'.join(rest)}"


def test_importing_envs_loads_no_simulator_and_no_jax():
    code = "import sys, envs; print(*(m for m in sys.modules if m in sys.argv))"
    heavy = ["mujoco", "dm_control", "metaworld", "myosuite", "mani_skill", "jax", "flax", "orbax", "torch"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout.split()


def test_importing_a_script_starts_nothing(tmp_path):
    """No device (there is none of that name), no thread, no file, no line of output."""
    code = (
        "import sys, threading; before = threading.active_count(), [*sys.argv]; "
        f"import {', '.join(SCRIPTS)}; assert before == (threading.active_count(), [*sys.argv])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "nothing"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.stem)
def test_no_test_imports_a_test(path):
    tree = ast.parse(path.read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.startswith("test_")]
