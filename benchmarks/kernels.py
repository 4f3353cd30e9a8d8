"""Kernels that updates and plans launch on a GPU, counted without one: the programs are compiled for a described H200.

    uv pip install -e '.[gpu-aot]' -c constraints.txt            # XLA's compiler for NVIDIA GPUs; no driver is needed
    python benchmarks/kernels.py                                 # every script, 5M
    python benchmarks/kernels.py --scripts tdmpc2_jax --model-size 1 5 --num-envs 1 8 --lines 20
    python benchmarks/kernels.py --compare ../before --json kernels.json            # git worktree add ../before COMMIT

At these sizes a kernel takes some microseconds whatever it computes, so their number is what a call costs. `launches`
are all kernels, copies and fills of one call, loops with all their rounds (once where only the device knows how many);
`chain` is the longest sequence of launches of which each needs the one before: what is left if all others run beside
it; `products` of the launches multiply matrices. `graphs` are launches of CUDA graphs, which hold all but those
`outside`. `temporary_mb` is memory that the program takes for itself. `--lines` tells from which lines of the script
launches come.

Nothing is timed. Which kernels XLA would choose after trying them on the card is not known here: products are by Triton
(`--options xla_gpu_enable_triton_gemm=false`: by cuBLAS, a few launches less).
"""

import dataclasses
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "-1"  # whole stacks, or libraries' frames push out the script's

import jax
import tyro
from jax.experimental import topologies

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.programs import PROGRAMS, a_round  # noqa: E402

H200 = """
platform_name: "CUDA"  device_description_str: "NVIDIA H200"
runtime_version { major: 13 }  dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  memory_bandwidth: 4800000000000  device_memory_size: 150000000000  l2_cache_size: 52428800
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"  dnn_version: "9.10.0"
}
"""  # versions from 12.3 on, or XLA leaves loops and products out of CUDA graphs
NO_LAUNCH = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "opt-barrier", "iota"}
FIGURES = ("launches", "chain", "products", "graphs", "outside", "temporary_mb")
DEVICE = "tdmpc2_jax_device"
BUILDERS = PROGRAMS | {DEVICE: a_round}
CALLS = Literal["update", "plan", "round"]  # of the script on the accelerator a round is all that there is


@dataclasses.dataclass(frozen=True)
class Args:
    scripts: tuple[Literal[tuple(BUILDERS)], ...] = tuple(PROGRAMS)  # what is compiled
    calls: tuple[CALLS, ...] = CALLS.__args__  # train and act, as the loop calls them; a round of the compiled loop
    model_size: tuple[int, ...] = (5,)  # millions of parameters, one or several
    num_envs: tuple[int, ...] = (1,)  # environments that plans are made for, one or several
    fields: tuple[str, ...] = ()  # settings of the agent NAME=VALUE, as compute_dtype=bfloat16
    options: tuple[str, ...] = ()  # XLA's options NAME=VALUE, beside those that the script sets
    compare: Path | None = None  # another checkout, whose figures stand in front of this one's
    lines: int = 0  # how many lines of the script are listed for each program, those with most launches first
    json: str | None = None  # write the figures to this file


# ------------------------------------------------------------------------------------------- What was compiled to
class Program:
    """A compiled program as XLA prints it: instructions by name, in the computations that they are in."""

    def __init__(self, text: str):
        self.operation: dict[str, str] = {}
        self.operands: dict[str, list[str]] = {}
        self.attributes: dict[str, str] = {}
        self.computations: dict[str, list[str]] = defaultdict(list)
        for line in text.splitlines():
            if head := re.match(r"(?:ENTRY )?%(\S+) \(.*\{$", line):
                current = self.computations[head[1]]
                if line.startswith("ENTRY"):
                    self.entry = current
            elif found := re.match(r"  (?:ROOT )?%(\S+) = .*?\s([a-z][\w-]*)\((.*?)\)(.*)$", line):
                name, self.operation[found[1]], operands, self.attributes[found[1]] = found.groups()
                self.operands[name] = re.findall(r"%([^\s,]+)", operands)
                current.append(name)
        self.files = dict(re.findall(r'^(\d+) "(.*/.*)"$', text, re.M))
        places = re.findall(r"^(\d+) \{file_name_id=(\d+) function_name_id=\d+ line=(\d+)", text, re.M)
        self.places = {place: (file, int(line)) for place, file, line in places}
        frames = re.findall(r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", text, re.M)
        self.frames = {frame: (place, str(int(above or 1) - 1)) for frame, place, above in frames}  # stored as one more

    def inside(self, name: str) -> list[str]:
        """Instructions that a kernel was fused of, or of a loop's round."""
        found = re.search(r"(?:calls|body)=%([^\s,]+)", self.attributes.get(name, ""))
        return self.computations[found[1]] if found else []

    def rounds(self, loop: str) -> int:
        """Of a loop, 1 if only the device knows."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.attributes.get(loop, ""))
        return int(found[1]) if found else 1

    def multiplies(self, name: str) -> bool:
        """Whether a kernel is a product of matrices or a convolution."""
        found = re.search(r'custom_call_target="([^"]*)', self.attributes.get(name, ""))
        in_library = found and re.search("cublas|cudnn.conv", found[1])
        return bool(in_library) or any(self.operation.get(i) in ("dot", "convolution") for i in self.inside(name))

    def chain(self, instructions: list[str]) -> int:
        """Length of the longest sequence of launches of which each needs the one before."""
        length = {}
        for name in instructions:
            own = 1 - (self.operation[name] in NO_LAUNCH)
            if self.operation[name] == "while":
                own = self.rounds(name) * self.chain(self.inside(name))
            length[name] = own + max((length.get(operand, 0) for operand in self.operands[name]), default=0)
        return max(length.values(), default=0)

    def line(self, name: str, folder: Path) -> tuple[str, int]:
        """File and line in a folder that a kernel comes from: the innermost, of its result if that says it."""
        for i in (name, *reversed(self.inside(name))):
            found = re.search(r"stack_frame_id=(\d+)", self.attributes.get(i, ""))
            frame = found[1] if found else ""
            while frame in self.frames:
                place, frame = self.frames[frame]
                file, line = self.places[place]
                if Path(self.files[file]).parent == folder:
                    return Path(self.files[file]).name, line
        return "no line", 0


def launches(program: Program, thunks: str, metadata: str) -> Iterator[tuple[str, str, int, bool]]:
    """Kind, instruction, number and whether in a CUDA graph of everything that is launched, the graphs among it, from
    what XLA writes of a program's execution: a line for each launch, indented below the loop or graph that has it."""
    names = {int(i): name for name, i in re.findall(r'annotation: "([^"]*)"\s+thunk_id: (\d+)', metadata)}
    around: list[tuple[int, int, bool]] = []  # (indentation, rounds, is a graph) of what a line stands below
    loop = 1  # rounds of the last loop that began
    loop_indent = 0  # where it stands; its parts are not indented as it is
    for line in thunks.splitlines():
        found = re.match(r"( *)(?:(\d+): (k\w+)|(condition|body):)", line)
        if not found:
            continue
        number, kind, part = found[2], found[3], found[4]
        indent = loop_indent if part else len(found[1])
        around = [level for level in around if level[0] < indent]
        times = math.prod(rounds for _, rounds, _ in around)
        name = names.get(int(number or 0), "")
        if kind == "kWhile":
            loop = program.rounds(name)
            loop_indent = indent
        elif part == "condition":  # computed only where the number of rounds is not known
            around.append((indent, 0 if loop > 1 else 1, False))
        elif part == "body":
            around.append((indent, loop, False))
        elif kind == "kCommandBuffer":
            yield kind, name, times, False
            around.append((indent, 1, True))
        elif kind not in ("kSequential", "kConditional", "kDynamicSliceFusion"):
            yield kind, name, times, any(graph for _, _, graph in around)


# ------------------------------------------------------------------------------------------------------------ Figures
def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE as a pair; numbers, true and false are no strings."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def figures(folder: Path, script: str, call: str, size: int, n: int, fields: dict[str, Any], options: dict[str, Any]):
    """Those of one program of the checkout in this folder, which the interpreter looks into first."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def place(make):
        shapes = jax.eval_shape(make)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

    module = importlib.import_module(script)
    if Path(module.__file__).parent != folder:
        raise RuntimeError(f"{folder} was asked for, {module.__file__} was imported")
    with mock.patch("jax.default_backend", lambda: "gpu"), tempfile.TemporaryDirectory() as dumped:
        more = {"device": topology.devices[0]} if script in ("tdmpc2_jax_mt", "newt_jax") else {}
        program = BUILDERS[script](module, call, n, 100_000, model_size=size, **fields, **more)
        traced = program.trace(*place(program.inputs))
        dump = {"xla_dump_to": dumped, "xla_dump_hlo_as_text": True, "xla_gpu_autotune_level": 0}
        compiled = traced.lower().compile(compiler_options=dump | options)
        thunks = next(Path(dumped).glob("*.thunk_sequence_after_thunk_passes.txt")).read_text()
        metadata = next(Path(dumped).glob("*.thunk_metadata.txt")).read_text()
    program = Program(compiled.as_text())
    rows = list(launches(program, thunks, metadata))
    kernels = [row for row in rows if row[0] != "kCommandBuffer"]
    lines: Counter = Counter()
    for _, name, times, _ in kernels:
        lines[program.line(name, folder)] += times
    return {
        "launches": sum(times for _, _, times, _ in kernels),
        "chain": program.chain(program.entry),
        "products": sum(times for _, name, times, _ in kernels if program.multiplies(name)),
        "graphs": sum(row[2] for row in rows) - sum(row[2] for row in kernels),
        "outside": sum(times for _, _, times, in_graph in kernels if not in_graph),
        "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "lines": [(*place, number) for place, number in lines.most_common()],
    }


def search_first(folder: str) -> None:
    sys.path.insert(0, folder)


def in_checkout(folder: Path, function: Callable, calls: list[tuple]) -> Iterator[Any]:
    """function(folder, *call) of each call in turn, in a process that imports from this folder first."""
    folder = folder.resolve()
    options = {"initializer": search_first, "initargs": (str(folder),)}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), **options) as process:
        yield from process.map(partial(function, folder), *zip(*calls, strict=True))


def main(args: Args) -> None:
    fields = dict(map(setting, args.fields))
    options = dict(map(setting, args.options))
    calls = []
    for script, call, size in itertools.product(args.scripts, args.calls, args.model_size):
        if (call == "round") == (script == DEVICE):
            for n in (1,) if call == "update" else args.num_envs:
                calls.append((script, call, size, n, fields, options))
    folders = [args.compare, ROOT] if args.compare else [ROOT]
    rows = []
    print("| script | call | " + " | ".join(FIGURES) + " |\n" + "|---" * (2 + len(FIGURES)) + "|")
    for call, *found in zip(calls, *(in_checkout(folder, figures, calls) for folder in folders), strict=True):
        script, name, size, n = call[:4]
        rows += [{"script": script, "call": name, "model_size": size, "num_envs": n, "checkouts": found}]
        cells = [" → ".join(f"{figure[name]:.0f}" for figure in found) for name in FIGURES]
        print(f"| {script} {size}M | {name}{f' n={n}' if n > 1 else ''} | " + " | ".join(cells) + " |", flush=True)
        for file, line, number in found[-1]["lines"][: args.lines]:
            text = (ROOT / file).read_text().splitlines()[line - 1].strip() if line else ""
            print(f"    {number:4d} {file}:{line} {text[:90]}", flush=True)
    if args.json:
        facts = {"jax_version": jax.__version__, "device": "described: NVIDIA H200", "options": options}
        Path(args.json).write_text(json.dumps(facts | {"fields": fields, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
