"""Quantised agents: what the files hold, who reads them, what is refused, and how little the agent changes."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import envs
import tdmpc2_jax as td
import tdmpc2_jax_mt as mt
from tdmpc2_support.agents import pretrained
from tdmpc2_support.agents.fold import fold_task
from tdmpc2_support.agents.quantized import (
    dequantize,
    errors,
    flat,
    nested,
    quantize,
    read_safetensors,
    write_safetensors,
)
from tdmpc2_support.errors import UserError

SCRIPT = mt
MT = "tdmpc2_jax_mt"


@pytest.fixture(scope="module")
def agent(golden):
    return pretrained.load_multitask(str(golden("multitask.pt")), ())


@pytest.fixture(scope="module")
def file(agent, tmp_path_factory):
    """file("int8") -> path of the recorded agent's file of that variant."""
    folder = tmp_path_factory.mktemp("files")

    def write(variant, target_q=False):
        path = folder / f"{variant}-{target_q}.safetensors"
        if not path.exists():
            pretrained.write_quantized(str(path), agent, variant, MT, {"vmin": -10.0}, target_q)
        return str(path)

    return write


def test_an_int8_kernel_is_within_half_a_step_of_the_weights_and_each_output_uses_all_steps():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(2, 30, 7)).astype(np.float32) * rng.uniform(1e-4, 10, (2, 1, 7)).astype(np.float32)
    kernel[1, :, 3] = 0
    tensors = quantize({"q": {"params": {"linear_0": {"kernel": kernel}}}}, "int8")
    q, scale = tensors["q.linear_0.kernel"], tensors["q.linear_0.kernel_scale"]
    assert q.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (2, 7)
    live = np.arange(14).reshape(2, 7) != 10
    assert (np.abs(q.astype(int)).max(1)[live] == 127).all() and scale[1, 3] == 1 and not q[1, :, 3].any()
    back = nested(dequantize(tensors))["q"]["params"]["linear_0"]["kernel"]
    assert (np.abs(back - kernel) <= scale[:, None] * 0.5001).all()


@pytest.mark.golden
def test_kernels_are_int8_the_encoder_of_mixed_and_all_else_float16(agent, file):
    for variant in ("float16", "int8", "mixed"):
        tensors, _, record = read_safetensors(file(variant))
        small = {name for name, array in tensors.items() if array.dtype == np.int8}
        kernels = {name for name in flat(agent.params) if name.endswith("kernel")}
        expected = {"float16": set(), "int8": kernels, "mixed": {k for k in kernels if not k.startswith("encoder")}}
        assert small == expected[variant]
        scales = {f"{name}_scale" for name in small} | {"q_scale"}
        assert {name for name, array in tensors.items() if array.dtype == np.float32} == scales
        assert {array.dtype for name, array in tensors.items() if name not in small | scales} == {np.dtype(np.float16)}
        assert record["variant"] == variant and json.loads(record["tasks"]) == list(envs.TASK_SETS["mt30"])
        assert json.loads(record["args"]) == {"vmin": -10}
        assert {name.partition(".")[0] for name in tensors} == {*agent.params, "q_scale"}, "no target Qs"


@pytest.mark.golden
def test_a_file_gives_the_agent_back(agent, file):
    for variant, tolerance in (("float16", 6e-4), ("mixed", 5e-3), ("int8", 5e-3)):
        again = pretrained.load_multitask(file(variant), (), MT)
        assert again.tasks == agent.tasks and again.stored == variant and again.q_scale == 1

        def close(a, b, tolerance=tolerance):
            assert a.dtype == jnp.float32 and np.abs(a - b).max() <= tolerance * np.abs(b).max()

        jax.tree.map(close, again.params, agent.params)
        jax.tree.map(np.testing.assert_array_equal, again.target_q, again.params["q"])
    kept = pretrained.load_multitask(file("float16", target_q=True), (), MT)
    jax.tree.map(lambda a, b: close(a, b, 6e-4), kept.target_q, agent.target_q)
    parts = pretrained.load_teacher(file("int8"), agent.tasks, MT)
    assert parts.params.keys() == {"encoder", "reward", "task_emb"}
    jax.tree.map(np.testing.assert_array_equal, parts.params, {k: again.params[k] for k in parts.params})


@pytest.mark.golden
def test_plain_numpy_and_the_package_safetensors_read_the_files(file):
    tensors = read_safetensors(file("int8")).tensors
    content = open(file("int8"), "rb").read()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start, stop = header["pi.linear_1.kernel"]["data_offsets"]
    kernel = np.frombuffer(content[8 + length + start : 8 + length + stop], np.int8)
    np.testing.assert_array_equal(kernel.reshape(header["pi.linear_1.kernel"]["shape"]), tensors["pi.linear_1.kernel"])
    loaded = load_file(file("int8"))
    assert loaded.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)


def test_a_file_that_an_earlier_version_wrote_by_hand_is_read(tmp_path):
    kernel = np.arange(-3, 3, dtype=np.int8).reshape(3, 2)
    scale = np.array([0.5, 2], np.float32)
    header = {"a.linear_0.kernel_scale": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    header["a.linear_0.kernel"] = {"dtype": "I8", "shape": [3, 2], "data_offsets": [8, 14]}
    header["__metadata__"] = {"script": "a"}
    numbers = scale.tobytes() + kernel.tobytes()
    checksum = zlib.crc32(numbers, zlib.crc32(json.dumps(header, sort_keys=True).encode()))
    header["__metadata__"]["crc32"] = str(checksum)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    stored = read_safetensors(path)
    assert stored.record == {"script": "a"}
    np.testing.assert_array_equal(dequantize(stored.tensors)["a.linear_0.kernel"], kernel * scale, strict=True)
    assert read_safetensors(path, parts=("b",)).tensors == {}, "of other components nothing is kept"


def test_arrays_come_back_in_the_shapes_that_they_had(tmp_path):
    arrays = {"scalar": np.asarray(3.0, np.float32), "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    write_safetensors(tmp_path / "a.safetensors", arrays, {})
    for name, found in read_safetensors(tmp_path / "a.safetensors").tensors.items():
        np.testing.assert_array_equal(found, arrays[name], strict=True)


def test_the_files_of_the_1m_model_are_as_small_as_they_are_called(tmp_path):
    tasks, rng = envs.TASK_SETS["mt30"], np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: mt.init_params(mt.for_tasks(mt.Agent(model_size=1), tasks), jax.random.key(0)))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    agent = pretrained.LoadedAgent(params, {}, 1.0, tasks=tasks)
    exact = sum(4 * x.size for x in jax.tree.leaves(params))
    for variant, most in (("float16", 0.51), ("mixed", 0.28), ("int8", 0.27)):
        path = tmp_path / variant
        pretrained.write_quantized(str(path), agent, variant, MT, {})
        assert path.stat().st_size < most * exact


@pytest.mark.golden
def test_a_damaged_file_is_one_sentence_wherever_the_damage_is(file, tmp_path):
    whole, path = open(file("int8"), "rb").read(), tmp_path / "a.safetensors"
    rng = np.random.default_rng(0)
    cut = [whole[:at] for at in (0, 1, 7, 8, 9, 500, len(whole) - 1)] + [whole + b"x"]
    flipped = [bytearray(whole) for _ in range(60)]
    for i, content in enumerate(flipped):
        content[i % 12 if i < 12 else rng.integers(len(whole))] ^= 1 << rng.integers(8)
    lies = []
    for change in ({"dtype": "I8"}, {"shape": [7]}, {"shape": [-1]}, {"data_offsets": [0, 10**12]}, {"dtype": "C64"}):
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        header["task_emb"] |= change
        text = json.dumps(header).encode()
        lies.append(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    for content in [*cut, *flipped, *lies, b"hello", b"[]" * 50, (2).to_bytes(8, "little") + b"{}"]:
        path.write_bytes(content)
        with pytest.raises(UserError, match="a.safetensors (is damaged or no quantised agent|cannot be read)") as error:
            pretrained.load_multitask(str(path), (), MT)
        assert "\n" not in str(error.value)


def test_files_of_others_are_refused(tmp_path, file):
    path = str(tmp_path / "a.safetensors")
    record = {"script": "other", "variant": "int8", "tasks": "[]", "args": "{}"}
    for told, words in (
        ({}, "holds no agent of this project"),
        (record, "is an agent of other.py, not of tdmpc2_jax_mt.py"),
        (record | {"script": MT}, "holds no whole agent"),
    ):
        write_safetensors(path, {"x": np.zeros(3, np.float32)}, told)
        with pytest.raises(UserError, match=words):
            pretrained.load_multitask(path, (), MT)
        with pytest.raises(UserError, match="exists: choose another"):
            write_safetensors(path, {"x": np.zeros(3, np.float32)}, record)
        (tmp_path / "a.safetensors").unlink()
    save_file({"x": np.zeros(3, np.float64)}, path)
    with pytest.raises(UserError, match="is damaged or no quantised agent .numbers of type F64 are not read"):
        read_safetensors(path)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(UserError, match="x/a cannot be written"):
        write_safetensors(tmp_path / "x" / "a", {}, {})
    assert not list(tmp_path.iterdir()), "nothing is left"


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("reward.linear_0.kernel_scale", np.ones(1, np.float32)),
        ("reward.linear_0.kernel_scale", np.full(24, np.nan, np.float32)),
        ("q_scale", np.ones(2, np.float32)),
        ("encoder", np.ones(2, np.float32)),
        ("task_emb", np.ones((29, 20), np.float32)),
        ("task_emb", np.ones(20, np.float32)),
    ],
)
def test_tensors_that_do_not_make_an_agent_are_one_sentence(file, tmp_path, name, tensor):
    stored = read_safetensors(file("int8"))
    path = str(tmp_path / "a.safetensors")
    write_safetensors(path, stored.tensors | {name: tensor}, stored.record)
    with pytest.raises(UserError, match=r"a.safetensors (holds no whole agent|.*kernel_scale is not one positive)"):
        pretrained.load_multitask(path, (), MT)


@pytest.mark.parametrize(
    "told",
    [{"tasks": "[" * 10**5}, {"tasks": '["nonsense"]'}, {"tasks": '[["a"], 3]'}, {"args": '{"vmin": [1]}'}],
    ids=["nested", "unknown", "of a list", "no number"],
)
def test_a_record_that_says_nothing_usable_is_one_sentence(file, tmp_path, told):
    stored = read_safetensors(file("int8"))
    path = str(tmp_path / "a.safetensors")
    write_safetensors(path, stored.tensors, stored.record | told)
    with pytest.raises(UserError, match="a.safetensors holds no agent of this project"):
        pretrained.load_multitask(path, (), MT)


def test_numbers_that_float16_does_not_have_are_refused():
    for value, words in ((1e5, "beyond 65504"), (np.nan, "not finite")):
        with pytest.raises(UserError, match=f"task_emb holds numbers.* {words}"):
            quantize({"task_emb": np.full((2, 2), value, np.float32)}, "float16")


@pytest.mark.golden
def test_a_task_of_a_file_is_folded_in(file, refused):
    agent = pretrained.load_multitask(file("int8"), (), MT)
    emb = agent.params["task_emb"][envs.TASK_SETS["mt30"].index("walker-walk")]
    networks = {name: value for name, value in agent.params.items() if name != "task_emb"}
    expected = fold_task(networks, emb, 24, 6)
    loaded = pretrained.load_agent(file("int8"), "walker-walk", lambda key: expected, "tdmpc2_jax", MT)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
    flags = ("--task", "walker-walk", "--evaluate", "--checkpoint", file("int8"))
    assert "is a multi-task agent: name its task with --source-task" in refused(*flags, script=td)


def test_errors_are_relative_but_for_those_of_the_actions_that_a_task_has():
    none = np.nan
    before = {
        "z": np.array([[3.0, 4], [0, 10]]),
        "Q": np.array([3.0, 4]),
        "action": np.array([[0.5, 0.5], [0.5, none]]),
    }
    after = {
        "z": np.array([[3.3, 4.4], [0, 10]]),
        "Q": np.array([3.0, 4.5]),
        "action": np.array([[0.5, 0.8], [0.5, none]]),
    }
    found = errors(before, after)
    assert found == pytest.approx({"z": 0.05, "Q": 0.1, "action": 0.3 / 3**0.5, "action_moved": 1 / 3})
