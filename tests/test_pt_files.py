"""Files of PyTorch are read without PyTorch, and only what they should hold: none runs code, reaches beyond itself, or
costs more memory than twice its size and 64 MB."""

import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import fuzz_pt
import numpy as np
import pytest
from torch_files import Call, FakeTorch, Storage, pickled, tensor, write_pt

from tdmpc2_support.data.pt import check_pt, load_pt, save_tensordict
from tdmpc2_support.errors import UserError

ROOT = Path(__file__).parent.parent

MODELS = ["single", "wide", "episodic", "two_q", "multitask"]
CHUNKS = [f"{version}_{kind}" for version in ("0.1.2", "0.2.1", "0.12.4") for kind in ("float32", "float16")]
CHUNKS += ["0.1.2_views", "0.12.4_views"]


@pytest.mark.golden
@pytest.mark.parametrize("layout", ["", "_released_layout"])
@pytest.mark.parametrize("model", MODELS)
def test_both_layouts_of_every_model_load(golden, model, layout):
    tensors = load_pt(golden(f"{model}{layout}.pt"))["model"]
    assert all(isinstance(value, np.ndarray) for value in tensors.values())
    assert tensors["_encoder.state.0.weight"].shape[0] == len(tensors["_encoder.state.0.bias"])
    assert tensors["_dynamics.0.weight"].dtype == np.float32
    assert np.isfinite(tensors["_dynamics.0.weight"]).all() and tensors["_dynamics.0.weight"].std() > 0


@pytest.mark.golden
@pytest.mark.parametrize("model", MODELS)
def test_the_two_layouts_hold_the_same_numbers(golden, model):
    current, released = (load_pt(golden(f"{model}{layout}.pt"))["model"] for layout in ("", "_released_layout"))
    for name in released:
        if "Qs" not in name:
            np.testing.assert_array_equal(current[name], released[name])
    np.testing.assert_array_equal(current["_Qs.params.1.ln.bias"], released["_Qs.params.7"])
    np.testing.assert_array_equal(current["_target_Qs_params.2.weight"], released["_target_Qs.params.8"])


def test_a_file_is_read_without_torch_being_imported(tmp_path):
    path = write_pt(tmp_path / "a.pt", pickled({"model": {}}))
    code = f"import envs, sys; envs.load_pt({str(path)!r}); print('torch' in sys.modules, 'mujoco' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.split() == ["False", "False"], run.stderr


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("FloatStorage", np.float32),
        ("HalfStorage", np.float16),
        ("DoubleStorage", np.float64),
        ("LongStorage", np.int64),
        ("CharStorage", np.int8),
        ("BoolStorage", np.bool_),
    ],
)
def test_every_number_type_is_read(tmp_path, kind, dtype):
    numbers = np.array([0, 1, 1, 0, 1, 0], dtype)
    path = write_pt(tmp_path / "a.pt", pickled(tensor(kind, "0", 6, 0, (2, 3), (3, 1))), {"0": numbers.tobytes()})
    result = load_pt(path)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, numbers.reshape(2, 3))


def test_bfloat16_becomes_float32(tmp_path):
    numbers = np.array([1.0, -2.5, 0.0, 384.0], np.float32)
    stored = (numbers.view(np.uint32) >> 16).astype("<u2")
    data = pickled(tensor("BFloat16Storage", "0", 4, 0, (4,), (1,)))
    path = write_pt(tmp_path / "a.pt", data, {"0": stored.tobytes()})
    for in_place in (False, True):
        result = load_pt(path, in_place)
        np.testing.assert_array_equal(result, numbers)
        assert result.flags.writeable != in_place


def test_views_with_offset_and_strides_are_read(tmp_path):
    numbers = np.arange(24, dtype=np.float32)
    path = write_pt(
        tmp_path / "a.pt", pickled(tensor("FloatStorage", "7", 24, 2, (3, 4), (1, 5))), {"7": numbers.tobytes()}
    )
    expected = np.array([[2 + row + 5 * column for column in range(4)] for row in range(3)])
    np.testing.assert_array_equal(load_pt(path), expected)


def test_quantised_tensors_become_their_values(tmp_path):
    quantiser = (FakeTorch("torch", "per_tensor_affine"), 0.5, 3)
    storage = Storage("QInt8Storage", "0", 4)
    data = pickled(Call("torch._utils", "_rebuild_qtensor", storage, 0, (4,), (1,), quantiser, False, OrderedDict()))
    path = write_pt(tmp_path / "a.pt", data, {"0": np.array([3, 4, -1, 5], np.int8).tobytes()})
    result = load_pt(path)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, [0.0, 0.5, -2.0, 1.0])


def test_containers_and_scalars_are_read(tmp_path):
    value = {"a": [1, 2.5, None, True, "text"], "b": (1, 2), "c": {"d": {}}}
    assert load_pt(write_pt(tmp_path / "a.pt", pickled(value))) == value


@pytest.mark.parametrize("call", ["posix.system", "os.system", "builtins.eval", "numpy.load", "builtins.getattr"])
def test_a_pickle_that_names_a_function_is_refused_and_not_run(tmp_path, call):
    module, name = call.split(".")
    victim = tmp_path / "victim"
    path = write_pt(tmp_path / "evil.pt", pickled({"model": Call(module, name, f"touch {victim}")}))
    with pytest.raises(UserError, match=f"evil.pt: refused, since it would run {call}"):
        load_pt(path)
    assert not victim.exists()


def test_a_real_malicious_pickle_is_refused_and_not_run(tmp_path):
    victim = tmp_path / "victim"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {victim}",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = write_pt(tmp_path / "evil.pt", pickle.dumps({"model": Evil()}, protocol))
        with pytest.raises(UserError, match="refused"):
            load_pt(path)
    assert not victim.exists()


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    numbers = np.zeros(4, np.float32).tobytes()
    for offset, size, stride in [
        (1, (4,), (1,)),
        (0, (2, 2), (3, 1)),
        (-1, (2,), (1,)),
        (3, (2,), (-1,)),
        (0, (9,), (9,)),
    ]:
        path = write_pt(
            tmp_path / "a.pt", pickled(tensor("FloatStorage", "0", 4, offset, size, stride)), {"0": numbers}
        )
        with pytest.raises(UserError, match="reaches beyond its storage"):
            load_pt(path)


def good_file(tmp_path):
    numbers = np.random.default_rng(0).random(4096).astype(np.float32)
    data = pickled({"model": {"weight": tensor("FloatStorage", "0", 4096, 0, (64, 64), (64, 1))}})
    return write_pt(tmp_path / "good.pt", data, {"0": numbers.tobytes()}).read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_one_sentence(tmp_path, share):
    content = good_file(tmp_path)
    (tmp_path / "cut.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="cut.pt") as error:
        load_pt(tmp_path / "cut.pt")
    assert "\n" not in str(error.value)


def test_a_damaged_number_is_noticed(tmp_path):
    content = bytearray(good_file(tmp_path))
    content[len(content) // 2] ^= 1
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(UserError, match="bad.pt"):
        load_pt(tmp_path / "bad.pt")


def test_files_of_another_kind_are_one_sentence(tmp_path):
    (tmp_path / "text.pt").write_text("these are no weights\n")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"model": {}}))
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    write_pt(tmp_path / "garbage.pt", b"\x80\x02garbage")
    for name in ("text.pt", "pickle.pt", "zip.pt", "garbage.pt", "missing.pt", "."):
        with pytest.raises(UserError) as error:
            load_pt(tmp_path / name)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.golden
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_datasets_of_three_tensordict_versions_are_read(golden, chunk, in_place):
    tensors, expected = load_pt(golden(f"chunk_{chunk}.pt"), in_place), golden(f"chunk_{chunk}.npz")
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value)
        assert tensors[name].dtype == value.dtype and tensors[name].flags.writeable != in_place


def test_numbers_in_place_cost_no_memory_of_the_process(tmp_path):
    size = 64 * 2**20
    path = write_pt(tmp_path / "a.pt", pickled({"obs": tensor("FloatStorage", "0", size, 0, (size // 4, 4), (4, 1))}))
    with zipfile.ZipFile(path, "a") as archive, archive.open("archive/data/0", "w", force_zip64=True) as file:
        for i in range(16):
            file.write(np.full(size // 16, i, "<f4").tobytes())
    code = f"""
import envs
def anonymous():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
before = anonymous()
obs = envs.load_pt({str(path)!r}, in_place=True)["obs"]
print(sum(float(obs[i : i + 2**20].sum()) for i in range(0, len(obs), 2**20)), anonymous() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    total, grown = map(float, run.stdout.split())
    assert total == size // 16 * sum(range(16)) and grown < 0.05 * 4 * size


@pytest.mark.parametrize("in_place", [False, True])
def test_a_dataset_that_names_anything_else_is_refused(tmp_path, in_place):
    state = {"_tensordict": {"obs": Call("os", "getcwd")}}
    call = Call("tensordict._reductions", "_make_td", FakeTorch("tensordict._td", "TensorDict"), state)
    path = write_pt(tmp_path / "chunk_0.pt", pickled(call))
    with pytest.raises(UserError, match="refused, since it would run os.getcwd"):
        load_pt(path, in_place)


# ------------------------------------------------------------------------------------------------- Hostile files
MEBIBYTE = 2**20
FLOATS = np.arange(6, dtype="<f4").tobytes()


def opcodes(*parts):
    """A pickle of protocol 2 from its opcodes, given as bytes; a number stands for the opcode that pushes it."""
    parts = (b"\x8a\x09" + part.to_bytes(9, "little", signed=True) if isinstance(part, int) else part for part in parts)
    return b"\x80\x02" + b"".join(parts) + b"."


def refusal(path, in_place=False):
    """The sentence with which a file is refused; the memory that it cost on the way is checked."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            load_pt(path, in_place)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    sentence = str(error.value)
    assert sentence.startswith(str(path)) and sentence.isprintable() and len(sentence) < len(str(path)) + 300, sentence
    assert peak < 2 * path.stat().st_size + 64 * MEBIBYTE
    return sentence


def refused_pickle(tmp_path, data, in_place=False):
    return refusal(write_pt(tmp_path / "a.pt", data, {"0": FLOATS, "1": bytes(24)}), in_place)


def rebuilt(storage, offset, size, stride):
    return Call("torch._utils", "_rebuild_tensor_v2", storage, offset, size, stride, False, OrderedDict())


SIX = Storage("FloatStorage", "0", 6)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "storage",
    [
        rebuilt(SIX, 0, (6,), (1,)),
        rebuilt(SIX, 0, (6,), (0,)),  # more numbers than bytes behind it
        rebuilt(SIX, 0, (10**9, 0), (0, 0)),  # a length without any bytes
        Call("torch._utils", "_rebuild_parameter", rebuilt(SIX, 0, (6,), (1,)), False, OrderedDict()),
        FakeTorch("torch", "FloatStorage"),
        ("storage", FakeTorch("torch", "FloatStorage"), "0", "cpu", 6),
        (bytes(24).decode(), "<f4", 6, "torch.FloatStorage"),
        None,
    ],
)
def test_a_tensor_is_made_of_a_storage_of_the_file_only(tmp_path, storage, in_place):
    assert "makes no sense" in refused_pickle(tmp_path, pickled(rebuilt(storage, 0, (6,), (1,))), in_place)


@pytest.mark.parametrize("in_place", [False, True])
def test_positions_are_plain_whole_numbers(tmp_path, in_place):
    number = rebuilt(Storage("LongStorage", "1", 3), 0, (), ())  # an array without axes, whose arithmetic wraps
    for wrong in (number, True, 1.0, None, "1", (1,), [1]):
        for offset, size, stride in [(wrong, (2,), (1,)), (0, (wrong,), (1,)), (0, (2,), (wrong,))]:
            assert "makes no sense" in refused_pickle(tmp_path, pickled(rebuilt(SIX, offset, size, stride)), in_place)
    for offset, size, stride in [(0, [2], (1,)), (0, (2,), [1]), (0, (2, 1), (1,)), (0, (1,) * 33, (1,) * 33)]:
        assert "makes no sense" in refused_pickle(tmp_path, pickled(rebuilt(SIX, offset, size, stride)), in_place)


@pytest.mark.parametrize("in_place", [False, True])
def test_positions_do_not_wrap_around(tmp_path, in_place):
    for offset, size, stride in [
        (0, (2,), (2**62 + 1,)),
        (0, (5,), (2**62,)),
        (2**62, (1,), (1,)),
        (2**64, (1,), (1,)),
        (0, (2**62 + 1, 4), (0, 1)),
        (0, (2**33, 2**33), (0, 0)),
        (-(2**62), (2,), (2**62,)),
        (0, (2**70,), (1,)),
        (2**63 + 1, (2,), (2**64 - 2**63,)),
    ]:
        sentence = refused_pickle(tmp_path, pickled(rebuilt(SIX, offset, size, stride)), in_place)
        assert "reaches beyond its storage" in sentence or "more numbers than its storage" in sentence
    for size, stride in [((1,), (2**62,)), ((0, 2**62), (1, 1)), ((0, 2**70), (1, 1))]:  # numpy's own limits
        refused_pickle(tmp_path, pickled(rebuilt(SIX, 0, size, stride)), in_place)


def test_a_tensor_of_no_numbers_is_read(tmp_path):
    value = [rebuilt(SIX, offset, size, stride) for offset, size, stride in [(0, (0, 4), (4, 1)), (6, (2, 0), (1, 1))]]
    arrays = load_pt(write_pt(tmp_path / "a.pt", pickled(value), {"0": FLOATS}))
    assert [array.shape for array in arrays] == [(0, 4), (2, 0)]


CODE = b"ctorch._utils\n_rebuild_tensor_v2\n"
DEFAULTS = b"}X\x0c\x00\x00\x00__defaults__)s"


@pytest.mark.parametrize(
    "target",
    [
        CODE,
        b"ccollections\nOrderedDict\n",
        b"ccollections\nOrderedDict\n)R",
        b"ctensordict.tensordict\nTensorDict\n",
        b"ctensordict.tensordict\nTensorDict\n)\x81",
        b"ctorch\nFloatStorage\n",
        b"}",
        b"]",
        b")",
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000NK\x06tQ",
    ],
)
def test_no_file_sets_the_state_of_anything_but_tensordicts(tmp_path, target):
    for state in (DEFAULTS, b"N" + DEFAULTS + b"\x86"):  # the second sets attributes of objects with slots
        sentence = refused_pickle(tmp_path, opcodes(target, state, b"b"))
        assert "sets the state" in sentence or "makes no sense" in sentence
    path = write_pt(tmp_path / "good.pt", pickled(rebuilt(SIX, 0, (2, 3), (3, 1))), {"0": FLOATS})
    np.testing.assert_array_equal(load_pt(path), [[0, 1, 2], [3, 4, 5]])  # nothing of it is left


def test_the_notes_of_a_state_dict_are_passed_over(tmp_path):
    notes = b"}X\x09\x00\x00\x00_metadata}s"
    path = write_pt(tmp_path / "a.pt", opcodes(b"ccollections\nOrderedDict\n)RX\x01\x00\x00\x00aK\x01s", notes, b"b"))
    assert load_pt(path) == {"a": 1}


def test_devices_are_read_as_text(tmp_path):
    assert load_pt(write_pt(tmp_path / "a.pt", pickled(Call("torch", "device", "cuda", 0)))) == "cuda:0"
    for arguments in ((1.5,), ("x" * 100,), ([],)):
        assert "makes no sense" in refused_pickle(tmp_path, pickled(Call("torch", "device", *arguments)))


@pytest.mark.parametrize("opcode", [b"r\x00\xc2\xeb\x0b", b"q\x05", b"r\xff\xff\xff\xff"])
def test_the_memo_grows_by_one_at_a_time(tmp_path, opcode):
    assert "makes no sense" in refused_pickle(tmp_path, opcodes(b"}", opcode))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_tensor_has_no_more_numbers_than_its_storage(tmp_path, in_place):
    for size, stride in [((10**9,), (0,)), ((7,), (0,)), ((2, 4), (2, 1)), ((4, 4), (1, 0))]:
        sentence = refused_pickle(tmp_path, pickled(rebuilt(SIX, 0, size, stride)), in_place)
        assert "more numbers than its storage" in sentence
    path = write_pt(tmp_path / "b.pt", pickled(rebuilt(SIX, 1, (2, 3), (2, 1))), {"0": FLOATS})
    np.testing.assert_array_equal(load_pt(path, in_place), [[1, 2, 3], [3, 4, 5]])  # overlapping rows fit


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("member", ["data/0", "data.pkl"])
def test_compressed_members_are_refused_before_they_are_unpacked(tmp_path, member, in_place):
    members = {"data.pkl": pickled(tensor("FloatStorage", "0", 2**24, 0, (2**24,), (1,))), "data/0": bytes(2**26)}
    members |= {"data/0": bytes(24)} if member == "data.pkl" else {}
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name, content in members.items():
            kind = zipfile.ZIP_DEFLATED if name == member else zipfile.ZIP_STORED
            archive.writestr(f"archive/{name}", content, kind)
    assert "refused, it is compressed or encrypted" in refusal(tmp_path / "a.pt", in_place)


@pytest.mark.parametrize("kind", ["FloatStorage", "BFloat16Storage"])
def test_many_tensors_of_one_storage_cannot_be_larger_than_the_file(tmp_path, kind):
    numbers = bytes(4 * MEBIBYTE)
    length = len(numbers) // (4 if kind == "FloatStorage" else 2)
    whole = rebuilt(Storage(kind, "0", length), 0, (length,), (1,))
    path = write_pt(tmp_path / "a.pt", pickled([whole] * 40), {"0": numbers})
    assert "tensors are larger than the file" in refusal(path)
    if kind == "FloatStorage":
        assert len(load_pt(path, in_place=True)) == 40  # views cost nothing
    path = write_pt(tmp_path / "b.pt", pickled([whole] * 2), {"0": numbers})
    assert len(load_pt(path)) == 2


def test_quantised_tensors_count_as_what_they_become(tmp_path):
    size = 32 * MEBIBYTE
    quantiser = (FakeTorch("torch", "per_tensor_affine"), 0.5, 0)
    arguments = (Storage("QInt8Storage", "0", size), 0, (size,), (1,), quantiser, False, OrderedDict())
    path = write_pt(
        tmp_path / "a.pt", pickled(Call("torch._utils", "_rebuild_qtensor", *arguments)), {"0": bytes(size)}
    )
    assert "tensors are larger than the file" in refusal(path)


@pytest.mark.parametrize(
    "quantiser",
    [
        (FakeTorch("torch", "per_tensor_affine"), float("nan"), 0),
        (FakeTorch("torch", "per_tensor_affine"), 1e300, 0),
        (FakeTorch("torch", "per_tensor_affine"), 0.5, 2**70),
        (FakeTorch("torch", "per_tensor_affine"), "1", 0),
        ("per_tensor_affine", 0.5, 0),
        (FakeTorch("torch", "Size"), 0.5, 0),
        [],
    ],
)
def test_quantisers_that_make_no_numbers_are_refused(tmp_path, quantiser):
    arguments = (Storage("QInt8Storage", "0", 24), 0, (24,), (1,), quantiser, False, OrderedDict())
    assert "makes no sense" in refused_pickle(tmp_path, pickled(Call("torch._utils", "_rebuild_qtensor", *arguments)))


def test_int8_weights_that_were_rounded_to_whole_numbers_are_warned_of(tmp_path):
    def write(kind, scale):
        quantiser = (FakeTorch("torch", "per_tensor_affine"), scale, 0)
        arguments = (Storage(kind, "0", 24), 0, (24,), (1,), quantiser, False, OrderedDict())
        data = pickled({"model": {"a": Call("torch._utils", "_rebuild_qtensor", *arguments)}})
        return write_pt(tmp_path / f"{scale}.pt", data, {"0": bytes(24)})

    with pytest.warns(UserWarning, match=r"1.0.pt: its int8 weights have scale 1.0, so they are useless"):
        load_pt(write("QInt8Storage", 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pt(write("QInt8Storage", 0.5))


@pytest.mark.parametrize(
    "keys",
    [
        [(2**61 - 1) * i for i in range(20_000)],  # whole numbers with one and the same hash
        [2**17 * i for i in range(20_000)],
        [-1],
        [True],
        [None],
        [1.5],
        [("a",)],
        [rebuilt(SIX, 0, (6,), (1,))],
    ],
)
def test_keys_are_text_or_small_whole_numbers(tmp_path, keys):
    pairs = b"".join(pickled(key)[2:-1] + b"N" for key in keys)
    assert "neither text nor small whole numbers" in refused_pickle(tmp_path, opcodes(b"}(", pairs, b"u"))
    names = b"".join(pickled(key)[2:-1] for key in keys)
    call = opcodes(b"c__builtin__\nset\n](", names, b"e\x85R")
    assert "neither text nor small whole numbers" in refused_pickle(tmp_path, call)


def test_numbered_states_of_an_optimiser_are_read(tmp_path):
    state = {i: {"step": 1.0} for i in range(200)}
    assert load_pt(write_pt(tmp_path / "a.pt", pickled({"state": state})))["state"] == state


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([b"}" * 300_000], "more objects than any of a model"),
        ([b"(" * 300_000], "more objects than any of a model"),
        ([b"X", struct.pack("<I", 5 * MEBIBYTE), bytes(5 * MEBIBYTE)], "larger than any of a model"),
        ([b"}", b"X\x01\x00\x00\x00aK\x01s", b"2" * 10], "DUP, which torch.save does not write"),
        ([b"d"], "DICT, which torch.save does not write"),
        ([b"(S'a'\nS'b'\no"], "which torch.save does not write"),
        ([b"\x82\x01"], "EXT1, which torch.save does not write"),
    ],
)
def test_pickles_that_no_model_has_are_refused(tmp_path, parts, words):
    assert words in refused_pickle(tmp_path, opcodes(*parts))


def test_copies_of_a_large_dict_are_counted(tmp_path):
    pairs = b"".join(b"X" + struct.pack("<I", 5) + b"%05d" % i + b"N" for i in range(20_000))
    state = b"}(X\x0b\x00\x00\x00_tensordict}(" + pairs + b"uu"
    copies = b"".join(b"h\x00)\x81h\x01b" for _ in range(20_000))
    program = opcodes(b"](ctensordict.tensordict\nTensorDict\nq\x00", state, b"q\x01", copies, b"e")
    assert "larger than the file" in refused_pickle(tmp_path, program)


def test_sentences_are_short_and_printable_whatever_a_file_says(tmp_path):
    long, escape = b"x" * MEBIBYTE, b"\x1b[31m\x07\r"
    for name in (long, escape + b"red", escape * 1000):
        sentence = refused_pickle(tmp_path, opcodes(b"cos\n" + name + b"\n"))
        assert "refused, since it would run os." in sentence
        for kind, key in ((b"FloatStorage", name), (b"FloatStorage", b"7")):
            pid = b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\nX" + struct.pack("<I", len(key)) + key + b"NK\x06tQ"
            refused_pickle(tmp_path, opcodes(pid))
    refused_pickle(tmp_path, opcodes(b"\x8a\xff", b"\x7f" * 255, b"0"))


# What stands in the list of members, and where
def rewritten(path, change):
    """The file with `change` applied to the fields of the first member in its directory; they are as in the format."""
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\1\2")
    fields = list(struct.unpack_from("<4s6H3I5H2I", content, start))
    change(fields)
    struct.pack_into("<4s6H3I5H2I", content, start, *fields)
    path.write_bytes(content)
    return path


def put(index, value):
    return lambda fields: fields.__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(3, 1), "compressed or encrypted"),
        (put(7, 0), "damaged"),  # checksum
        (put(8, 5), "has a wrong size"),
        (put(9, 10**6), "has a wrong size"),
        (put(16, 7), "is not where its directory says"),
        (put(16, 10**9), "is not where its directory says"),
        (put(4, 8), "compressed or encrypted"),
    ],
)
def test_a_member_that_is_not_as_its_directory_says_is_refused(tmp_path, change, words):
    path = rewritten(write_pt(tmp_path / "a.pt", pickled(rebuilt(SIX, 0, (6,), (1,))), {"0": FLOATS}), change)
    assert words in refusal(path)
    with pytest.raises(UserError, match=r"a\.pt"):
        check_pt(path)


def test_members_of_one_name_or_of_one_place_are_refused(tmp_path):
    path = write_pt(tmp_path / "a.pt", pickled(rebuilt(SIX, 0, (6,), (1,))), {"0": FLOATS})
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")  # zipfile's own
        archive.writestr("archive/data/0", FLOATS)
    assert "two of its members have the same name" in refusal(path)
    storages = [rebuilt(Storage("FloatStorage", str(i), 2**20), 0, (2**20,), (1,)) for i in range(9)]
    path = write_pt(tmp_path / "b.pt", pickled(storages), {"0": bytes(2**22)} | {str(i): b"" for i in range(1, 9)})
    content = bytearray(path.read_bytes())
    first = content.index(b"PK\1\2", content.index(b"PK\1\2") + 1)  # of byteorder
    places, start = [], content.index(b"PK\1\2", first + 1)
    while start > 0:
        places.append(start)
        start = content.find(b"PK\1\2", start + 1)
    for place in places[1:]:  # all are where the first is
        content[place + 16 : place + 28] = content[places[0] + 16 : places[0] + 28]
        content[place + 42 : place + 46] = content[places[0] + 42 : places[0] + 46]
    path.write_bytes(content)
    for in_place in (False, True):
        assert "has a wrong size" in refusal(path, in_place)


def test_a_list_of_members_that_is_too_long_is_refused_before_it_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickled({}))
        for i in range(20_000):
            archive.writestr(f"archive/data/{i}", b"")
    assert "list of members is longer than any of PyTorch" in refusal(tmp_path / "a.pt")


def test_numbers_of_another_byte_order_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickled({}))
        archive.writestr("archive/byteorder", "big")
    assert "another byte order" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("length", [5, 7, 2**40, -1])
def test_a_storage_is_as_large_as_the_pickle_says(tmp_path, length):
    data = pickled(rebuilt(Storage("FloatStorage", "0", length), 0, (1,), (1,)))
    assert "of another size than its pickle says" in refused_pickle(tmp_path, data)


def test_a_file_that_is_damaged_anywhere_is_noticed_when_it_is_checked(tmp_path):
    path = tmp_path / "a.pt"
    save_tensordict(path, {"obs": np.ones((2, 3, 4), np.float32), "task": np.zeros((2, 3), np.int64)})
    check_pt(path)
    content = bytearray(path.read_bytes())
    content[content.index(np.ones(24, "<f4").tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.pt is damaged"):
        check_pt(path)
    for name in ("nowhere.pt", "."):
        with pytest.raises(UserError):
            check_pt(tmp_path / name)


@pytest.mark.slow
def test_two_thousand_mutated_files_are_read_or_refused_and_nothing_else_happens():
    """What `tests/fuzz_pt.py` does at length."""
    total = fuzz_pt.fuzz(seed=0, first=0, count=2000)
    assert not total.faults, total.faults
    assert sum(total.refused.values()) > 1000 and sum(total.read.values()) > 100
