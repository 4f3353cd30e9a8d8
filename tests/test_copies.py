"""Scripts share no library: what two of them need stands in both, letter for letter the same."""

import ast
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
        write_video write_atomically render_mode
        as_flag open_run trim_curve catch_signals start_writer crossed
    """.split(),
}


def blocks(script):
    """Text of every function, class and constant of a script, with its decorators and the comment above."""
    lines, found = (ROOT / script).read_text().splitlines(), {}
    for node in ast.parse("\n".join(lines)).body:
        name = node.targets[0].id if isinstance(node, ast.Assign) else getattr(node, "name", None)
        if name is None:
            continue
        start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
        while lines[start - 1].startswith("#") and "----" not in lines[start - 1]:
            start -= 1
        found[name] = "\n".join(lines[start : node.end_lineno])
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


def test_the_arguments_that_two_scripts_share_have_the_same_type_default_and_explanation():
    import dataclasses

    import tdmpc2_jax
    import tdmpc2_jax_mt

    def fields(script):
        lines = (ROOT / script).read_text().splitlines()
        body = next(node for node in ast.parse("\n".join(lines)).body if getattr(node, "name", "") == "Args").body
        pairs = [(a, b) for a, b in zip(body, body[1:], strict=False) if isinstance(a, ast.AnnAssign)]
        return {a.target.id: (ast.unparse(a.annotation), ast.unparse(a.value), b.value.value) for a, b in pairs}

    first, second = fields("tdmpc2_jax.py"), fields("tdmpc2_jax_mt.py")
    assert len(first) == len(dataclasses.fields(tdmpc2_jax.Args))
    assert len(second) == len(dataclasses.fields(tdmpc2_jax_mt.Args))
    differ = {name for name in first.keys() & second.keys() if first[name] != second[name]}
    meant = "exp_name seed resume checkpoint_freq log_freq eval_freq eval_episodes capture_video evaluate checkpoint"
    assert differ == {*meant.split(), "model_size", "batch_size"}
