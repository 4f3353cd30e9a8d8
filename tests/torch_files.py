"""Writes PyTorch's files without torch, for tests."""

import io
import pickle
import zipfile
from collections import OrderedDict


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
