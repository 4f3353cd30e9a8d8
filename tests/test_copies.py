"""Scripts share no library: what two of them need stands in both, letter for letter the same."""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COPIES = {
    "tdmpc2_jax_mt.py": """
        MODEL_SIZES discount_of
        symlog symexp two_hot two_hot_inv soft_ce mish simnorm
        Linear MLP Policy pick_heads dropout_mask
        PlanNoise plan_noise two_heads envs_at_once
        UpdateNoise update_noise optimizers
        from_torch find_checkpoint has_checkpoint restore restore_multitask
        SCRIPTS write_video write_atomically render_mode
        as_flag open_run trim_curve catch_signals start_writer crossed
    """.split(),
    "tdmpc2_jax_rgb.py": """
        discount_of
        symlog symexp two_hot two_hot_inv soft_ce mish simnorm
        Linear MLP Policy policy q_logits pick_heads dropout_mask
        two_heads envs_at_once estimate_value
        TrainState optimizers init_state td_target policy_loss
        find_checkpoint has_checkpoint SCRIPTS restore on_device fresh_state
        Evaluation write_video write_atomically render_mode run_folder seed_steps_of
        as_flag open_run EVAL_COLUMNS trim_curve catch_signals check_finite start_writer record_evaluation
        crossed updates_due main
    """.split(),
}


def blocks(script):
    """Text of every function, class and constant of a script, with its decorators and the comment above."""
    lines, found = (ROOT / script).read_text().splitlines(), {}
    for node in ast.parse("\n".join(lines)).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        name = getattr(target, "id", getattr(node, "name", None))
        if name is None:
            continue
        start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
        while lines[start - 1].startswith("#") and "----" not in lines[start - 1]:
            start -= 1
        found[name] = found.get(name, "") + "\n".join(lines[start : node.end_lineno])  # X = …, then X |= …
    return found


@pytest.mark.parametrize("script", COPIES)
def test_copied_blocks_equal_those_of_the_first_script_letter_for_letter(script):
    original, copy = blocks("tdmpc2_jax.py"), blocks(script)
    different = [name for name in COPIES[script] if original[name] != copy[name]]
    assert not different


@pytest.mark.parametrize("script", COPIES)
def test_every_block_that_is_the_same_is_named_here(script):
    original, copy = blocks("tdmpc2_jax.py"), blocks(script)
    equal = {name for name in original.keys() & copy.keys() if original[name] == copy[name]}
    assert equal == set(COPIES[script])


@pytest.mark.parametrize("script", COPIES)
def test_a_script_imports_envs_and_no_other_script(script):
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"envs"}
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not scripts & set(names)


MEANT = {  # arguments that mean something else in another script
    "tdmpc2_jax_mt.py": "exp_name seed resume checkpoint_freq log_freq eval_freq eval_episodes capture_video evaluate "
    "checkpoint model_size batch_size",
    "tdmpc2_jax_rgb.py": "task exp_name checkpoint model_size mlp_dim latent_dim buffer_size",
}


def arguments(script):
    """Type, default and explanation of every argument."""
    lines = (ROOT / script).read_text().splitlines()
    body = next(node for node in ast.parse("\n".join(lines)).body if getattr(node, "name", "") == "Args").body
    pairs = [(a, b) for a, b in zip(body, body[1:], strict=False) if isinstance(a, ast.AnnAssign)]
    return {a.target.id: (ast.unparse(a.annotation), ast.unparse(a.value), b.value.value) for a, b in pairs}


@pytest.mark.parametrize("script", COPIES)
def test_the_arguments_that_two_scripts_share_have_the_same_type_default_and_explanation(script):
    first, second = arguments("tdmpc2_jax.py"), arguments(script)
    assert len(first) == len(dataclasses.fields(importlib.import_module("tdmpc2_jax").Args))
    assert len(second) == len(dataclasses.fields(importlib.import_module(script[:-3]).Args))
    differ = {name for name in first.keys() & second.keys() if first[name] != second[name]}
    assert differ == set(MEANT[script].split())
