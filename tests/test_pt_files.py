"""Checkpoints of PyTorch are read without PyTorch, and only what they should hold."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

import envs

MODELS = ["single", "wide", "episodic", "two_q", "multitask"]
CHUNKS = [f"{version}_{kind}" for version in ("0.1.2", "0.2.1", "0.12.4") for kind in ("float32", "float16")]
CHUNKS += ["0.1.2_views", "0.12.4_views"]


def write_pt(path, data, storages=None, folder="archive"):
    """A zip file as torch.save writes it, around a given pickle and storages {key: bytes}."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{folder}/data.pkl", data)
        archive.writestr(f"{folder}/byteorder", "little")
        for key, content in (storages or {}).items():
            archive.writestr(f"{folder}/data/{key}", content)
    return path


class FakeTorch:
    """Stands for a global of torch, which is not installed."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class TorchPickler(pickle._Pickler):
    """Writes FakeTorch as globals and storages as persistent ids, as torch.save does."""

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Storage) else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, FakeTorch):
            self.write(pickle.GLOBAL + obj.module.encode() + b"\n" + obj.name.encode() + b"\n")
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


class Storage:
    def __init__(self, kind, key, size):
        self.pid = ("storage", FakeTorch("torch", kind), key, "cpu", size)


class Call:
    def __init__(self, module, name, *arguments):
        self.function, self.arguments = FakeTorch(module, name), arguments


def pickled(value):
    buffer = io.BytesIO()
    TorchPickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def tensor(kind, key, storage_size, offset, size, stride):
    storage = Storage(kind, key, storage_size)
    return Call("torch._utils", "_rebuild_tensor_v2", storage, offset, size, stride, False, OrderedDict())


@pytest.mark.golden
@pytest.mark.parametrize("layout", ["", "_released_layout"])
@pytest.mark.parametrize("model", MODELS)
def test_both_layouts_of_every_model_load(golden, model, layout):
    tensors = envs.load_pt(golden(f"{model}{layout}.pt"))["model"]
    assert all(isinstance(value, np.ndarray) for value in tensors.values())
    assert tensors["_encoder.state.0.weight"].shape[0] == len(tensors["_encoder.state.0.bias"])
    assert tensors["_dynamics.0.weight"].dtype == np.float32
    assert np.isfinite(tensors["_dynamics.0.weight"]).all() and tensors["_dynamics.0.weight"].std() > 0


@pytest.mark.golden
@pytest.mark.parametrize("model", MODELS)
def test_the_two_layouts_hold_the_same_numbers(golden, model):
    current, released = (envs.load_pt(golden(f"{model}{layout}.pt"))["model"] for layout in ("", "_released_layout"))
    for name in released:
        if "Qs" not in name:
            np.testing.assert_array_equal(current[name], released[name])
    np.testing.assert_array_equal(current["_Qs.params.1.ln.bias"], released["_Qs.params.7"])
    np.testing.assert_array_equal(current["_target_Qs_params.2.weight"], released["_target_Qs.params.8"])


def test_a_file_is_read_without_torch_being_imported(tmp_path):
    path = write_pt(tmp_path / "a.pt", pickled({"model": {}}))
    code = f"import envs, sys; envs.load_pt({str(path)!r}); print('torch' in sys.modules, 'mujoco' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=os.path.dirname(envs.__file__)
    )
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
    result = envs.load_pt(path)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, numbers.reshape(2, 3))


def test_bfloat16_becomes_float32(tmp_path):
    numbers = np.array([1.0, -2.5, 0.0, 384.0], np.float32)
    stored = (numbers.view(np.uint32) >> 16).astype("<u2")
    data = pickled(tensor("BFloat16Storage", "0", 4, 0, (4,), (1,)))
    path = write_pt(tmp_path / "a.pt", data, {"0": stored.tobytes()})
    np.testing.assert_array_equal(envs.load_pt(path), numbers)


def test_views_with_offset_and_strides_are_read(tmp_path):
    numbers = np.arange(24, dtype=np.float32)
    path = write_pt(
        tmp_path / "a.pt", pickled(tensor("FloatStorage", "7", 24, 2, (3, 4), (1, 5))), {"7": numbers.tobytes()}
    )
    expected = np.array([[2 + row + 5 * column for column in range(4)] for row in range(3)])
    np.testing.assert_array_equal(envs.load_pt(path), expected)


def test_quantised_tensors_become_their_values(tmp_path):
    quantiser = (FakeTorch("torch", "per_tensor_affine"), 0.5, 3)
    storage = Storage("QInt8Storage", "0", 4)
    data = pickled(Call("torch._utils", "_rebuild_qtensor", storage, 0, (4,), (1,), quantiser, False, OrderedDict()))
    path = write_pt(tmp_path / "a.pt", data, {"0": np.array([3, 4, -1, 5], np.int8).tobytes()})
    result = envs.load_pt(path)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, [0.0, 0.5, -2.0, 1.0])


def test_containers_and_scalars_are_read(tmp_path):
    value = {"a": [1, 2.5, None, True, "text"], "b": (1, 2), "c": {"d": {}}}
    assert envs.load_pt(write_pt(tmp_path / "a.pt", pickled(value))) == value


@pytest.mark.parametrize("call", ["posix.system", "os.system", "builtins.eval", "numpy.load", "builtins.getattr"])
def test_a_pickle_that_names_a_function_is_refused_and_not_run(tmp_path, call):
    module, name = call.split(".")
    victim = tmp_path / "victim"
    path = write_pt(tmp_path / "evil.pt", pickled({"model": Call(module, name, f"touch {victim}")}))
    with pytest.raises(envs.UserError, match=f"evil.pt: refused, since it would run {call}"):
        envs.load_pt(path)
    assert not victim.exists()


def test_a_real_malicious_pickle_is_refused_and_not_run(tmp_path):
    victim = tmp_path / "victim"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {victim}",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = write_pt(tmp_path / "evil.pt", pickle.dumps({"model": Evil()}, protocol))
        with pytest.raises(envs.UserError, match="refused"):
            envs.load_pt(path)
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
        with pytest.raises(envs.UserError, match="reaches beyond its storage"):
            envs.load_pt(path)


def good_file(tmp_path):
    numbers = np.random.default_rng(0).random(4096).astype(np.float32)
    data = pickled({"model": {"weight": tensor("FloatStorage", "0", 4096, 0, (64, 64), (64, 1))}})
    return write_pt(tmp_path / "good.pt", data, {"0": numbers.tobytes()}).read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_one_sentence(tmp_path, share):
    content = good_file(tmp_path)
    (tmp_path / "cut.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(envs.UserError, match="cut.pt") as error:
        envs.load_pt(tmp_path / "cut.pt")
    assert "\n" not in str(error.value)


def test_a_damaged_number_is_noticed(tmp_path):
    content = bytearray(good_file(tmp_path))
    content[len(content) // 2] ^= 1
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(envs.UserError, match="bad.pt"):
        envs.load_pt(tmp_path / "bad.pt")


def test_files_of_another_kind_are_one_sentence(tmp_path):
    (tmp_path / "text.pt").write_text("these are no weights\n")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"model": {}}))
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    write_pt(tmp_path / "garbage.pt", b"\x80\x02garbage")
    for name in ("text.pt", "pickle.pt", "zip.pt", "garbage.pt", "missing.pt", "."):
        with pytest.raises(envs.UserError) as error:
            envs.load_pt(tmp_path / name)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.golden
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_datasets_of_three_tensordict_versions_are_read(golden, chunk, in_place):
    tensors, expected = envs.load_pt(golden(f"chunk_{chunk}.pt"), in_place), golden(f"chunk_{chunk}.npz")
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
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=os.path.dirname(envs.__file__)
    )
    assert run.returncode == 0, run.stderr
    total, grown = map(float, run.stdout.split())
    assert total == size // 16 * sum(range(16)) and grown < 0.05 * 4 * size


def test_compressed_numbers_cannot_be_read_in_place(tmp_path):
    path = write_pt(tmp_path / "a.pt", pickled(tensor("FloatStorage", "0", 4, 0, (4,), (1,))))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(16))
    assert envs.load_pt(path).tolist() == [0.0] * 4
    with pytest.raises(envs.UserError, match="compressed"):
        envs.load_pt(path, in_place=True)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_dataset_that_names_anything_else_is_refused(tmp_path, in_place):
    state = {"_tensordict": {"obs": Call("os", "getcwd")}}
    call = Call("tensordict._reductions", "_make_td", FakeTorch("tensordict._td", "TensorDict"), state)
    path = write_pt(tmp_path / "chunk_0.pt", pickled(call))
    with pytest.raises(envs.UserError, match="refused, since it would run os.getcwd"):
        envs.load_pt(path, in_place)
