"""What the Triton kernels become: compile them for GPUs that are not there, and count and check their instructions.

    python tools/triton_code.py [--target cuda:90 ...] [--way langevin ...] [--out bench/results/triton-code.json]

The launches are those of the backend's own plan (deeprelax_cuda/backends/triton.py) for tensors of the CPU, and are compiled as
a launch compiles them; only the driver is a stand-in that names the target. Each row is one kernel for one way of calling and
one target; tests/test_triton_code.py says what must hold. nvdisasm and cuobjdump are looked for as in tools/sass.py; the triton
package has them.

The hot path is that of tools/sass.py: the way of whole, aligned packets. Every condition of a call but one is settled when its
kernel is compiled, so the path has what the call does and nothing else; with a clock it is that of a step that ends a period.
On AMD a block that jumps to itself is passed once: there, a buffer's address that is not known to be the same in all lanes is
tried for one lane after the other, and for ours the first turn serves all.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import sass
import torch

from deeprelax_cuda.clock import NUMBERS, Clock, Law, Rule
from deeprelax_cuda.noise import as_place
from deeprelax_cuda.steps import NARROW, Scalars, Tensors, compute_type, round_scalar

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NUMEL = 5000
#: The letters of the formula for the roles of `Tensors`.
LETTERS = {
    "params": "y",
    "anchors": "x",
    "averages": "m",
    "momenta": "v",
    "outer_momenta": "w",
    "consensus": "c",
    "masters": "master",
}

# ---- Ways of calling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A way of calling the step, with numbers that stand for all others: a kernel depends on which of them are 0 or 1."""

    name: str
    scalars: dict[str, Any] = field(default_factory=dict)
    masters: bool = False
    scaled: bool = False  # with inv_scale and found_inf
    clock: Law | None = None
    counted: bool = False  # the clock has the average's number too
    ends: bool = True  # with a clock: periods do
    pitched: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES


_A = {"eta": 0.11, "k": 0.37, "s": 0.051, "a": 0.26}
_B = {"family": "gradient_average", "c": 0.23, "s": 0.043, "a": 0.31}
_MOMENTUM = {"mu": 0.83, "nesterov": True, "wd": 0.013}
_OUTER = {"outer": True, "lr": 0.41, "mu_o": 0.77, "nesterov_o": True, "wd_o": 0.017, "kr": 0.19}

WAYS = (
    Way("langevin", _A),
    Way("noise-free", {**_A, "s": 0.0}),
    Way("momentum", {**_A, **_MOMENTUM}),
    Way("fused-outer", {**_A, **_MOMENTUM, **_OUTER}),
    Way("outer", {**_A, **_OUTER, "inner": False}),
    Way("gradient-average", _B),
    Way("gradient-average-fused", {**_B, **_OUTER, "wd": 0.013}),
    Way("scaled", {**_A, "maximize": True}, scaled=True),
    Way("clock", {**_A, **_MOMENTUM, **_OUTER, "outer": False}, clock=Law()),
    Way("clock-plain-mean", {**_B, **_OUTER, "outer": False}, clock=Law(), counted=True, scaled=True),
    # Those of Hamilton-Jacobi relaxation, Heat-SGD and SGLD.
    Way("clock-drift", {**_B, **_OUTER, "outer": False}, clock=Law("drift", average="restart"), counted=True),
    Way("clock-variance", {**_B, **_OUTER, "c": 0.0, "outer": False}, clock=Law("variance", temperature=0.7), counted=True),
    Way("clock-inner", {**_A, "a": 0.0}, clock=Law(lr="inner", temperature=0.7), ends=False),
    Way("pitched", _A, pitched=True),
    Way("masters", {**_A, **_MOMENTUM, **_OUTER}, masters=True, dtypes=NARROW),
    Way("stochastic", {**_A, "rounding": "stochastic"}, dtypes=(torch.bfloat16,)),
    Way("stochastic-fused", {**_B, **_OUTER, "rounding": "stochastic"}, pitched=True, dtypes=(torch.bfloat16,)),
    Way("gaussian", dtypes=(torch.float32,)),
)
#: What `--brief` compiles for types other than float32, in less than half of the time.
BRIEF = {
    torch.float64: ("langevin", "fused-outer", "outer", "gradient-average"),
    torch.bfloat16: (
        *("langevin", "noise-free", "fused-outer", "outer", "gradient-average", "clock-plain-mean"),
        *("masters", "stochastic", "stochastic-fused"),
    ),
    torch.float16: ("langevin", "masters"),
}


def launches(way: Way, dtype: torch.dtype, backend: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """Yield what a call launches, and for the step what it reads and writes, in letters."""
    from deeprelax_cuda.backends import triton as ours

    if way.name == "gaussian":
        yield ours.launch_of_normals(torch.empty(NUMEL), 1, 2, 3, 0, backend), {"writes": "y"}
        return
    numbers = {name: round_scalar(name, x, dtype) if type(x) is float else x for name, x in way.scalars.items()}
    scalars = Scalars(**numbers, seed=1, step=2)
    # a clock decides on the device whether there is an outer step
    outer = scalars.outer or (way.clock is not None and way.ends)
    reads, writes = (getattr(replace(scalars, outer=outer), what) for what in ("reads", "writes"))
    if way.masters:  # the parameter is the rounding of what was read
        reads -= {"params"}
    else:
        reads, writes = reads - {"masters"}, writes - {"masters"}

    def role(name: str) -> list[torch.Tensor]:
        return [torch.zeros(NUMEL, dtype=compute_type(dtype))] if name in reads | writes else []

    params = [torch.zeros(NUMEL, dtype=dtype)]
    grads = [torch.zeros(NUMEL, dtype=dtype)] if scalars.inner else []
    place = as_place("place", (8, 1000, 3000) if way.pitched else 8, NUMEL)
    states = {name: role(name) for name in LETTERS if name != "params"}
    plan = ours.TritonPlan(Tensors(params, **states, numbers=[5], places=[place]), target=backend)
    inv_scale, found_inf = (torch.ones((), dtype=compute_type(dtype)), torch.zeros(())) if way.scaled else (None, None)
    for launch in plan.launches(grads, scalars, inv_scale, found_inf, clock=clock(way)):
        if launch.kernel != "step_kernel":
            if dtype == compute_type(dtype):  # or else it is float32's
                yield launch, {}
            continue
        read = [LETTERS[name] for name in LETTERS if name in reads] + ["g"] * scalars.inner
        yield launch, {"reads": " ".join(read), "writes": " ".join(LETTERS[name] for name in LETTERS if name in writes)}


def clock(way: Way) -> Clock | None:
    if way.clock is None:
        return None

    def count() -> torch.Tensor:
        return torch.zeros((), dtype=torch.int64)

    number = torch.ones((), dtype=torch.float64)
    counted = count() if way.counted else None
    numbers = torch.zeros(NUMBERS, dtype=torch.uint8)
    rule = Rule(20 if way.ends else 0, 1e3, 1e-3, 1e-4, 0.0, 0.1)
    return Clock(count(), count(), count(), number, number.clone(), counted, numbers, True, rule, way.clock)


# ---- Compiling ---------------------------------------------------------------------------------------------------------------


class Driver:
    """What Triton asks of a driver in order to compile: the target, which is also its name for the device."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)

    def get_current_stream(self, device: str) -> int:
        return 0


def use_kernels(folder: Path | None) -> None:
    """Have ``deeprelax_cuda.triton_kernels`` be that folder; without one, the installed package, or else that of this tree."""
    name = "deeprelax_cuda.triton_kernels"
    if folder is None and importlib.util.find_spec(name):
        return
    path = folder or ROOT / "triton_kernels"
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])
    assert spec
    assert spec.loader
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def compile_launch(launch: Any, target: str, loose: bool) -> tuple[Any, float]:
    """Return the compiled kernel of a launch, and the seconds that it took."""
    import triton
    from triton.backends.compiler import GPUTarget

    from deeprelax_cuda.triton_kernels import kernels

    backend, arch = target.split(":")
    triton.runtime.driver.set_active(Driver(GPUTarget(backend, int(arch) if arch.isdigit() else arch, WAVE[backend])))
    # Memory of a GPU starts at multiples of 256 bytes; that of the host need not even at those of 16.
    given = (*launch.arguments, *launch.integers)
    arguments = [torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in given]
    began = time.perf_counter()
    options = {"num_warps": launch.warps, "enable_fp_fusion": loose}
    if loose and backend == "hip":
        options["allow_flush_denorm"] = True
    compiled = getattr(kernels, launch.kernel).warmup(*arguments, *launch.settled, grid=(launch.blocks,), **options)
    return compiled, time.perf_counter() - began


WAVE = {"cuda": 32, "hip": 64}  # threads of a warp; HIP's is that of CDNA

# ---- Reading: NVIDIA ---------------------------------------------------------------------------------------------------------


def sources() -> Path:
    return Path(sys.modules["deeprelax_cuda.triton_kernels"].__path__[0])


def read_cuda(compiled: Any, target: str) -> tuple[sass.Kernel, dict[str, Any]]:
    """Return the kernel, and what else is said of it."""
    nvdisasm, cuobjdump = sass.find("nvdisasm"), sass.find("cuobjdump")
    if not (nvdisasm and cuobjdump):
        raise RuntimeError("triton_code: nvdisasm or cuobjdump is neither on PATH, beside nvcc, nor in the triton package")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        code = list(sass.instructions(sass.run(nvdisasm, "-c", "-gi", cubin), sources()))
        usage = sass.run(cuobjdump, "--dump-resource-usage", cubin)
    registers, stack, local = (int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    kernel = sass.Kernel(compiled.name, compiled.name, "", target, registers, stack + local, 0, code)
    ptx = [line.strip() for line in compiled.asm["ptx"].splitlines()]
    fused = [line for line in ptx if re.match(r"(@\S+ )?(fma|mad)\.\S*f\d\d", line)]
    return kernel, {
        "spilled": len(kernel.local),
        "contracted": [*fused, *map(str, kernel.contracted)],
        "flushing": [*(line for line in ptx if ".ftz" in line), *map(str, kernel.flushing)],
    }


# ---- Reading: AMD ------------------------------------------------------------------------------------------------------------


class AmdInstruction(sass.Instruction):
    """A line of the assembly. Those that branch have NVIDIA's opcodes, by which `sass.Kernel` finds its way."""

    @property
    def accesses_global(self) -> bool:
        """Whether each lane accesses an address of its own; tables are read by scalar loads too."""
        return self.opcode.startswith(("global_", "buffer_", "flat_")) and bool(re.search("load|store|atomic", self.opcode))

    @property
    def width(self) -> int:
        if found := re.search(r"_dwordx(\d)", self.opcode):
            return 4 * int(found[1])
        return 1 if "byte" in self.opcode else 2 if "short" in self.opcode else 4

    def writes(self, register: str) -> bool:
        first = re.fullmatch(r"v(\d+)|v\[(\d+):(\d+)\]", self.operands[0]) if self.operands else None
        if not first or re.search("store|ds_write", self.opcode):
            return False
        low, high = (first[1], first[1]) if first[1] else first.groups()[1:]
        return int(low) <= int(register[1:]) <= int(high)


class AmdKernel(sass.Kernel):
    """A kernel for AMD."""

    def turns(self, block: sass.Block) -> bool:
        return any(other.reaches(block) for other in block.after if other is not block)

    def ways(self, block: sass.Block, known: sass.Known) -> list[tuple[sass.Block, sass.Known]]:
        """Leave out the ways that no wave takes.

        An `if` is written as two in a row, each skipping one of its branches; the second asks for a mask that the first branch
        sets to 0 at its end, and is -1 where it was skipped. And a wave has lanes, unless a mask was put on them.
        """
        masks: dict[str, bool] = dict(known)  # whether a mask has all lanes, or none
        lanes: bool | None = True  # whether there are any, where it is known
        for i in block.code:
            to, source, third = [*i.operands, "", "", ""][:3]
            if i.opcode == "s_and_saveexec_b64":
                lanes = masks.get(source)
            elif to == "exec":
                lanes = masks.get(third) if i.opcode == "s_and_b64" else True if i.opcode in ("s_or_b64", "s_mov_b64") else None
            if i.opcode == "s_mov_b64" and source in ("0", "-1"):
                masks[to] = source == "-1"
            elif i.opcode in ("s_and_b64", "s_andn2_b64") and (to, source) == ("vcc", "exec") and third in masks:
                masks[to] = masks[third] == (i.opcode == "s_and_b64")
            else:
                written = i.operands[: 0 if i.opcode == "BRA" else 2 if i.opcode.startswith("v_") else 1]  # a sum, its carry
                masks = {mask: value for mask, value in masks.items() if not any(overlap(mask, to) for to in written)}
        end = block.code[-1]
        after = [other for other in block.after if other is not block]
        asked = re.fullmatch(r"s_cbranch_(vcc|exec)(n?z)", end.predicate)
        answer = (masks.get("vcc") if asked[1] == "vcc" else lanes) if asked else None
        if asked and answer is not None and len(after) == 2:
            after = [other for other in after if (other.code[0].address == end.target) == (answer == (asked[2] == "nz"))]
        return [(other, tuple(sorted(masks.items()))) for other in after]

    @cached_property
    def root(self) -> set[sass.Instruction]:
        """The fused multiply-adds of square roots, which have two: the residuals of the neighbours of r = v_sqrt_f32(x).

        They are x - (r - 1) * r and x - (r + 1) * r, where 1 is one unit of the last place and so an integer is added to r.
        Their signs choose among the three numbers, which makes the root correctly rounded; so LLVM writes a root, and nobody
        else: a product with r contracted would have neither r's neighbour for a factor nor the number under the root for a sum.
        """
        found: set[sass.Instruction] = set()
        for i, block in self.home.items():
            if not i.opcode.startswith("v_fma_f32"):
                continue
            neighbour, r, x = (self.value(block, i, operand) for operand in i.operands[1:])
            if not (neighbour and r and x and r.opcode.startswith("v_sqrt_f32")):
                continue
            if self.value(self.home[r], r, r.operands[1]) is not x or not i.operands[1].startswith("-"):
                continue
            if not (neighbour.opcode.startswith("v_add_u32") and neighbour.operands[1] in ("1", "-1")):
                continue
            if self.value(self.home[neighbour], neighbour, neighbour.operands[2]) is r:
                found.add(i)
        return found

    @property
    def contracted(self) -> list[sass.Instruction]:
        """Floating-point instructions that multiply and add in one, but those of roots and of the division of integers.

        The latter, which has numbers of 64 bits in halves, multiplies by 2**32 or -2**32: that is exact, so nothing is rounded
        once less.
        """
        fused = re.compile(r"v_(pk_|dot\d*\w*_|div_)?(fm|ma)[acdm]\w*_(f16|f32|f64|bf16|legacy)")
        found = [i for i in self.code if fused.match(i.opcode) and i not in self.root]
        return [i for i in found if not {"0x4f800000", "0xcf800000"} & set(i.operands[1:3])]

    @property
    def local(self) -> list[sass.Instruction]:
        return [i for i in self.code if i.opcode.startswith("scratch_")]


def overlap(a: str, b: str) -> bool:
    """Whether two operands have a scalar register in common."""

    def registers(operand: str) -> set[str]:
        if found := re.fullmatch(r"s\[(\d+):(\d+)\]", operand):
            return {f"s{number}" for number in range(int(found[1]), int(found[2]) + 1)}
        return {"vcc" if operand.startswith("vcc") else operand}

    return bool(registers(a) & registers(b))


def amd_instructions(text: str, folder: Path) -> Iterator[AmdInstruction]:
    """Yield the instructions of the assembly of one kernel."""
    labels: dict[str, int] = {}
    files: dict[str, str] = {}
    found: list[AmdInstruction] = []
    where: tuple[str, str] | None = None
    for line in text[: text.index(".section\t.rodata")].splitlines():
        line = line.partition(";")[0].strip()
        if file := re.match(r'\.file\s+(\d+) "([^"]*)" "([^"]*)"', line):
            files[file[1]] = os.path.join(file[2], file[3])
        elif place := re.match(r"\.loc\s+(\d+) (\d+)", line):
            where = sass.place(files[place[1]], int(place[2]), folder)
        elif label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = 16 * len(found)
        elif code := re.match(r"([a-z]\w+)(?:\s+(.*))?$", line):
            operands = [operand.strip() for operand in code[2].split(",")] if code[2] else []
            i = AmdInstruction(16 * len(found), "", code[1], operands, "", (where,) if where else ())
            if i.opcode.startswith("s_cbranch"):
                i.opcode, i.predicate = "BRA", i.opcode
            elif i.opcode in ("s_branch", "s_endpgm"):
                i.opcode = "BRA" if i.opcode == "s_branch" else "EXIT"
            elif re.match(r"s_(swappc|setpc|call|cbranch_[gij])", i.opcode):
                raise RuntimeError(f"triton_code: the graph of branches does not know {i}")
            found.append(i)
    for i in found:
        if i.opcode == "BRA":
            i.operands[-1] = hex(labels[i.operands[-1]])
        yield i


def read_hip(compiled: Any, target: str) -> tuple[sass.Kernel, dict[str, Any]]:
    """Return the kernel, and what else is said of it."""
    if not target.startswith("hip:gfx9"):
        raise RuntimeError(f"triton_code: it can read the assembly of gfx9, not {target}")
    text = compiled.asm["amdgcn"]

    def said(name: str) -> int:
        found = re.search(rf"\.{name}:?\s+(\d+)", text)
        if not found:
            raise RuntimeError(f"triton_code: the assembly does not say its {name}")
        return int(found[1])

    code: list[sass.Instruction] = list(amd_instructions(text, sources()))
    stack = said("amdhsa_private_segment_fixed_size")
    kernel = AmdKernel(compiled.name, compiled.name, "", target, said("vgpr_count"), stack, 0, code)
    modes = [f"{name} {said(name)}" for name in ("amdhsa_float_denorm_mode_32", "amdhsa_float_denorm_mode_16_64")]
    changed = [str(i) for i in code if re.match("s_(denorm_mode|setreg)", i.opcode)]
    return kernel, {
        "scalar_registers": said("sgpr_count"),
        "spilled": said("vgpr_spill_count") + len(kernel.local),
        "scalars_in_lanes": said("sgpr_spill_count"),  # of a vector register, so not in memory
        "contracted": list(map(str, kernel.contracted)),
        "flushing": [mode for mode in modes if not mode.endswith(" 3")] + changed,  # 3: subnormal numbers in and out
        "wave": said("wavefront_size"),
    }


# ---- One row -----------------------------------------------------------------------------------------------------------------

READERS: dict[str, Callable[[Any, str], tuple[sass.Kernel, dict[str, Any]]]] = {"cuda": read_cuda, "hip": read_hip}
#: What passes values from thread to thread.
EXCHANGES = re.compile(r"LDS|STS|SHFL|BAR|ATOMS|LDSM|ds_|s_barrier|v_permlane|v_\w+_dpp")


def conversions(ttgir: str) -> tuple[int, int]:
    """Return how many changes of layout are on wide ways, and how many elsewhere: in the `else` of an `if wide`."""
    counts = [0, 0]
    regions: list[str] = []  # around a line: "wide" and "not wide" for the two of an `if wide`, and "" for all others
    for line in ttgir.splitlines():
        line = re.sub(r"\s+loc\(\S+\)$", "", line).strip()
        if "ttg.convert_layout" in line:
            counts["not wide" in regions] += 1
        left = regions.pop() if line.startswith("}") else ""
        if line.endswith("{"):
            regions.append("wide" if "scf.if %wide" in line else "not wide" if left == "wide" else "")
    return counts[0], counts[1]


def moves_data(i: sass.Instruction) -> bool:
    """Whether an access is of the tensors, not of the table or of numbers of the call."""
    return i.inside("read", "write", "gaussian_kernel")


def widths(code: list[sass.Instruction], what: str) -> dict[str, int]:
    """Return how many loads ("LD", "load") or stores ("ST", "store") of tensors there are, by bytes."""
    pattern = re.compile({"load": "LD|.*_load", "store": "ST|.*_store"}[what])
    found = [i for i in code if i.accesses_global and moves_data(i) and pattern.match(i.opcode)]
    return {str(width): count for width, count in sorted(Counter(i.width for i in found).items(), reverse=True)}


def row(way: Way, dtype: torch.dtype, target: str, launch: Any, roles: dict[str, str], loose: bool) -> dict[str, Any]:
    """Compile a launch and return what is written of it."""
    backend = target.split(":")[0]
    compiled, seconds = compile_launch(launch, target, loose)
    kernel, said = READERS[backend](compiled, target)
    converted = conversions(compiled.asm["ttgir"])
    found = {
        "target": target,
        "dtype": str(dtype).removeprefix("torch."),
        "way": way.name,
        "kernel": launch.kernel,
        **roles,
        "registers": kernel.registers,
        "stack": kernel.stack,
        **said,
        "shared": compiled.metadata.shared,
        "conversions": converted[0],
        "conversions_elsewhere": converted[1],
        "fused_of_roots": sum("FMA" in i.opcode or "fma" in i.opcode for i in kernel.root),
        "seconds": round(seconds, 2),
    }
    if launch.kernel == "advance_kernel":  # it has no elements, and so no hot path
        return found
    hot, home = kernel.hot, kernel.home
    block = launch.settled[-1] if launch.kernel == "gaussian_kernel" else launch.settled[1]
    elements = block // (launch.warps * WAVE[backend])
    return found | {
        "elements": elements,
        "instructions": len(hot),
        "per_element": round(len(hot) / elements, 1),
        "parts": dict(Counter(i.where[0][0] if i.where else "triton" for i in hot).most_common()),
        "loops": sum(i is home[i].code[0] and home[i] in home[i].after for i in hot),
        "loads": widths(hot, "load"),
        "stores": widths(hot, "store"),
        "all_loads": widths(kernel.code, "load"),
        "all_stores": widths(kernel.code, "store"),
        "table_loads": sum(i.accesses_global and not moves_data(i) for i in hot),
        "exchanges": [str(i) for i in hot if EXCHANGES.match(i.opcode)],
    }


def audit_one(job: tuple[Way, torch.dtype, str, bool]) -> list[dict[str, Any]]:
    way, dtype, target, loose = job
    return [row(way, dtype, target, *launch, loose) for launch in launches(way, dtype, target.split(":")[0])]


def audit(chosen: list[tuple[Way, torch.dtype, str, bool]], kernels: Path | None) -> list[dict[str, Any]]:
    """Return the rows of ways, types and targets, compiled as they are or loosely."""
    with tempfile.TemporaryDirectory() as folder:
        # What this process has of a Triton that interprets, or of its cache, is nothing to the ones that compile.
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ["TRITON_CACHE_DIR"] = folder
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), context, use_kernels, (kernels,)) as pool:
            return [row for rows in pool.map(audit_one, chosen) for row in rows]


def main() -> None:
    ways, dtypes = {way.name: way for way in WAYS}, {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    parser = argparse.ArgumentParser(description="Count the instructions of the Triton kernels.")
    parser.add_argument("--target", nargs="+", default=TARGETS, help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--way", nargs="+", default=ways, choices=ways, metavar="WAY", help=f"of {', '.join(ways)}")
    parser.add_argument("--dtype", nargs="+", default=dtypes, choices=dtypes, metavar="TYPE", help=f"of {', '.join(dtypes)}")
    parser.add_argument("--brief", action="store_true", help="leave out what is made of parts that are compiled anyhow")
    parser.add_argument("--kernels", type=Path, help="a folder of kernels other than the package's")
    parser.add_argument("--loose", action="store_true", help="fuse and flush, which the contract forbids, to see it found")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    rows = audit(
        [
            (way, dtype, target, args.loose)
            for target in args.target
            for way in map(ways.get, args.way)
            for dtype in way.dtypes
            if dtype in map(dtypes.get, args.dtype) and not (args.brief and way.name not in BRIEF.get(dtype, ways))
        ],
        args.kernels,
    )
    print(f"{'':10} {'':8} {'':22} {'':15} registers instructions an element  bytes loaded stored  shared  seconds")
    for r in rows:
        said = f"{r['target']:10} {r['dtype']:8} {r['way']:22} {r['kernel']:15} {r['registers']:9}"
        if "instructions" in r:
            moved = [sum(int(width) * count for width, count in r[what].items()) for what in ("loads", "stores")]
            said += f" {r['instructions']:12} {r['per_element']:10.1f} {moved[0]:13} {moved[1]:6}"
        print(f"{said:114} {r['shared']:7} {r['seconds']:8.1f}")
    if args.out:
        head = {name: importlib.metadata.version(name) for name in ("triton", "torch")}
        lines = ",\n".join(f"  {json.dumps(r)}" for r in rows)
        args.out.write_text(f'{{\n {json.dumps(head)[1:-1]},\n "kernels": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
