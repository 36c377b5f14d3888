"""What the CUDA kernels become: compile them, disassemble them, and count and check their instructions. No GPU is needed.

    python tools/sass.py [--arch sm_90 ...] [--out bench/results/sass.json]

`audit` gives one `Kernel` for each kernel and architecture; tests/test_sass.py says what must hold. nvdisasm is looked for on
PATH, beside nvcc, and in the triton package.

The hot path of a kernel is the longest way from its entry to an EXIT

* without a call (the root of zero or a subnormal number, the division of 64-bit integers) and without a turn of a loop (the
  search for the row of a block takes none for one tensor; the instructions of one turn are reported as `search`),
* and, among these ways, with the most accesses of 16 bytes and then the fewest narrower ones: so it is that of whole packets
  with aligned addresses.

Every instruction on it counts, predicated or not: one that is predicated off is issued too. It is an upper bound, as it takes
every option of the step that is not settled when the kernel is compiled, even two that exclude each other.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
#: Those of CMakeLists.txt, and line numbers, which change no instruction.
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-lineinfo", f"-I{CSRC}", f"-I{CSRC / 'include'}")
STORAGE = {"f": "float", "d": "double", "NS_8BFloat16E": "BFloat16", "NS_7Float16E": "Float16"}
ELEMENTS = {"float": 4, "double": 4, "BFloat16": 8, "Float16": 8}  # of a packet, as in csrc/cuda/arguments.h

# ---- Reading -----------------------------------------------------------------------------------------------------------------


def find(program: str) -> str | None:
    """Return the path of one of nvcc's companions, or None where there is none."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    if nvcc := shutil.which("nvcc"):
        folders.append(str(Path(nvcc).resolve().parent))
    if importlib.util.find_spec("triton") and (nvidia := importlib.util.find_spec("triton.backends.nvidia")):
        folders += [str(Path(path) / "bin") for path in nvidia.submodule_search_locations or ()]
    return shutil.which(program, path=os.pathsep.join(folders))


def run(*command: object) -> str:
    """Return what a command writes, or raise RuntimeError with it where the command fails."""
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


@dataclass(eq=False)
class Instruction:
    """One line of the disassembly."""

    address: int
    predicate: str
    opcode: str
    operands: list[str]
    subroutine: str  # that it belongs to: "" for the kernel itself
    where: tuple[tuple[str, str], ...]  # file and function in the sources, from the innermost inlined one outwards

    def __str__(self) -> str:
        return f"{self.address:#06x} {self.predicate} {self.opcode} {', '.join(self.operands)}"

    def inside(self, *functions: str) -> bool:
        return any(function in functions for _, function in self.where)

    @property
    def width(self) -> int:
        """How many bytes this loads or stores, if it does."""
        sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
        return next((sizes[part] for part in self.opcode.split(".") if part in sizes), 4)

    @property
    def wide(self) -> bool:
        """Whether this accesses 16 bytes of global memory or more."""
        return self.accesses_global and self.width >= 16

    @property
    def accesses_global(self) -> bool:
        return self.opcode.startswith(("LDG", "STG", "LD.", "ST.", "ATOM", "RED"))

    @property
    def target(self) -> int | None:
        """Where this branches to."""
        return int(self.operands[-1], 16) if self.opcode.startswith("BRA") else None

    @property
    def calls(self) -> bool:
        return self.opcode.startswith("CALL")

    @property
    def ends(self) -> bool:
        return self.opcode.startswith(("BRA", "EXIT", "RET"))

    def writes(self, register: str) -> bool:
        first = re.fullmatch(r"R(\d+)", self.operands[0]) if self.operands else None
        if not first or self.opcode.startswith(("ST", "RED")):
            return False
        double = self.opcode[0] == "D" or re.search(r"\.(64|WIDE|F64)\b", self.opcode) or self.opcode == "CS2R"
        count = 4 if ".128" in self.opcode else 8 if ".256" in self.opcode else 2 if double else 1
        return 0 <= int(register[1:]) - int(first[1]) < count


@cache
def functions(file: str) -> list[tuple[int, str]]:
    """Return the lines on which the device functions of a source file begin, in C++ or Python, and their names."""
    lines = enumerate(Path(file).read_text().splitlines(), 1)
    return [(number, found[1]) for number, line in lines if (found := re.match(r"\s*(?:DR_FN\b.*?|def )(\w+)\(", line))]


def place(file: str, line: int, sources: Path = CSRC) -> tuple[str, str] | None:
    """Return file and function of a source line, None where it is not ours."""
    path = Path(os.path.normpath(file))
    if sources not in path.parents:
        return None
    return path.name, next((name for number, name in reversed(functions(str(path))) if number <= line), "")


def readable(symbol: str) -> tuple[str, str]:
    """Return the name of a kernel as in the sources and its storage type."""
    found = re.search(
        r"\d(langevin_step|gradient_average_step|outer_step|advance_clock|gaussian_kernel_of)"
        r"(?:I(?:NS\w*?_\d+([A-Z][A-Za-z]+)I)?(NS_\d+B?Float16E|[fd])((?:L(?:b|NS_6FamilyE)\dE)*)E)?",
        symbol,
    )
    if not found:
        raise RuntimeError(f"sass: the symbol {symbol} is not of a known kernel")
    operator, kind, storage, options = found.groups()
    if not storage:
        return operator, "float"
    names = [STORAGE[storage]]
    for what, value in re.findall(r"L(b|NS_6FamilyE)(\d)E", options):
        names.append(("langevin" if value == "0" else "gradient_average") if what != "b" else ("false", "true")[int(value)])
    return f"{operator}<{kind}<{', '.join(names)}>>" if kind else f"{operator}<{names[0]}>", names[0]


def instructions(text: str, sources: Path = CSRC) -> Iterator[Instruction]:
    """Yield the instructions of one kernel's section; ``sources`` is the folder that it was compiled from."""
    labels: dict[str, int] = {}
    found: list[Instruction] = []
    where: list[tuple[str, str] | None] = []
    subroutine, fresh = "", True
    for line in text.splitlines():
        if note := re.match(r'\s*//## File "([^"]+)", line (\d+)', line):
            where = [] if fresh else where
            where, fresh = [*where, place(note[1], int(note[2]), sources)], False
        elif label := re.match(r"([.$\w]+):$", line):
            labels[label[1]] = found[-1].address + 16 if found else 0
            subroutine = label[1] if label[1].startswith("$") else subroutine
        elif code := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;", line):
            operands = [operand.strip().replace(".reuse", "") for operand in code[4].split(",")] if code[4] else []
            places = tuple(p for p in where if p)
            found.append(Instruction(int(code[1], 16), code[2] or "", code[3], operands, subroutine, places))
            fresh = True
    for i in found:
        if i.opcode.startswith(("BRX", "JMP", "JMX", "BREAK")):
            raise RuntimeError(f"sass: the graph of branches does not know {i}")
        if i.opcode.startswith("BRA") and (label := re.search(r"`\((.*)\)", i.operands[-1])):
            i.operands[-1] = hex(labels[label[1]])
        yield i


# ---- One kernel --------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Block:
    """Instructions that are entered at the first and left at the last."""

    code: list[Instruction] = field(default_factory=list)
    after: list[Block] = field(default_factory=list)
    before: list[Block] = field(default_factory=list)

    @property
    def calls(self) -> bool:
        return any(i.calls for i in self.code)

    def reaches(self, other: Block) -> bool:
        """Whether a way of one step or more leads from here to a block."""
        seen: set[int] = set()
        rest = [*self.after]
        while rest:
            block = rest.pop()
            if block is other:
                return True
            if id(block) not in seen:
                seen.add(id(block))
                rest += block.after
        return False


#: What is known of conditions at a place of a way, by their names.
Known = tuple[tuple[str, bool], ...]


@dataclass
class Kernel:
    """A kernel on one architecture."""

    symbol: str
    name: str
    storage: str
    arch: str
    registers: int
    stack: int  # bytes
    spilled: int  # bytes
    code: list[Instruction]

    @cached_property
    def blocks(self) -> list[Block]:
        """The graph of branches, subroutines left out. The first block is the entry."""
        own = [i for i in self.code if not i.subroutine]
        starts = {own[0].address} | {i.target for i in own if i.target is not None}
        starts |= {i.address + 16 for i in own if i.ends or i.calls}
        blocks: dict[int, Block] = {}
        for i in own:
            if i.address in starts:
                blocks[i.address] = Block()
                last = blocks[i.address]
            last.code.append(i)
        for block in blocks.values():
            end = block.code[-1]
            always = end.ends and not end.predicate and not re.match(r"!?UP\d", end.operands[0] if end.operands else "")
            ways = [end.target] + ([] if always else [end.address + 16])
            block.after = [blocks[way] for way in ways if way in blocks]
            for other in block.after:
                other.before.append(block)
        return list(blocks.values())

    @cached_property
    def home(self) -> dict[Instruction, Block]:
        return {i: block for block in self.blocks for i in block.code}

    @cached_property
    def hot(self) -> list[Instruction]:
        """The instructions of the hot path."""
        usable = {id(b) for b in self.blocks if not b.calls and not self.turns(b)}
        best: dict[tuple[int, Known], tuple[int, int, int, list[Instruction]] | None] = {}

        def longest(block: Block, known: Known) -> tuple[int, int, int, list[Instruction]] | None:
            if (at := (id(block), known)) not in best:
                ways = [(other, then) for other, then in self.ways(block, known) if other is not block and id(other) in usable]
                rests = [rest for way in ways if (rest := longest(*way))]
                if any(i.opcode == "EXIT" for i in block.code):
                    rests.append((0, 0, 0, []))
                best[at] = None
                if rests:
                    wide, narrow, count, path = max(rests, key=lambda rest: rest[:3])
                    wide += sum(i.wide for i in block.code)
                    narrow -= sum(i.accesses_global and not i.wide for i in block.code)
                    best[at] = wide, narrow, count + len(block.code), block.code + path
            return best[at]

        if not (path := longest(self.blocks[0], ())):
            raise RuntimeError(f"sass: {self.name} has no way from entry to EXIT without a loop")
        return path[3]

    def turns(self, block: Block) -> bool:
        """Whether a block is part of a loop that the hot path takes no turn of."""
        return block.reaches(block)

    def ways(self, block: Block, known: Known) -> list[tuple[Block, Known]]:
        """Return the blocks that may come after one on the hot path, and what is known of conditions there: nothing."""
        return [(other, known) for other in block.after]

    @property
    def search(self) -> int:
        """How many instructions one turn of the search for a block's row has."""
        turns = [b for b in self.blocks if b.reaches(b) and any(i.inside("row_of") for i in b.code)]
        return sum(len(b.code) for b in turns)

    @property
    def parts(self) -> dict[str, int]:
        """The instructions of the hot path by where they come from: a file of csrc/core, or a function of csrc/cuda."""
        counts: Counter[str] = Counter()
        for i in self.hot:
            own = [p for p in i.where if p[0] not in ("lanes.h", "kernels.cuh")] or [("", "entry")]
            counts[own[0][0] if own[0][0] in ("philox.h", "gaussian.h", "update.h", "rounding.h") else own[0][1]] += 1
        return dict(counts.most_common())

    @property
    def local(self) -> list[Instruction]:
        """Accesses of local memory."""
        return [i for i in self.code if re.match(r"(LDL|STL)\b", i.opcode)]

    def accesses(self, what: str, *, wide: bool) -> list[Instruction]:
        """Return the loads ("LD") or stores ("ST") of global memory, of 16 bytes or narrower."""
        return [i for i in self.code if i.accesses_global and i.opcode.startswith(what) and i.wide == wide]

    # ---- Rounding ----

    def value(self, block: Block, before: Instruction, operand: str) -> Instruction | None:
        """Return the instruction that made an operand, where all ways lead back to one.

        Blocks with a call are left out: the special cases of an earlier root, say, which join its usual case.
        """
        if not (found := re.search(r"\b[Rv]\d+", operand)):
            return None
        makers: set[Instruction] = set()
        rest, seen = [block.code[: block.code.index(before)]], {id(block)}
        blocks = [block]
        while rest:
            code, block = rest.pop(), blocks.pop()
            if maker := next((i for i in reversed(code) if i.writes(found[0])), None):
                makers.add(maker)
                continue
            for other in block.before:
                if not other.calls and id(other) not in seen:
                    seen.add(id(other))
                    rest.append(other.code)
                    blocks.append(other)
        return makers.pop() if len(makers) == 1 else None

    @cached_property
    def root(self) -> set[Instruction]:
        """The multiplications of square roots: of r = MUFU.RSQ(x), the lines h = x * r, q = 0.5 * r, e = x - h * h, h + e * q.

        h and q round to nearest (FTZ does not matter, as the slow path has the x that are small), and e and the last line are
        the correction that makes the root correctly rounded; so ptxas writes __fsqrt_rn, and nobody else.
        """
        roots: set[Instruction] = set()
        home = self.home
        for i, block in home.items():
            if i.opcode != "FFMA":
                continue
            a, b, c = (self.value(block, i, operand) for operand in i.operands[1:])
            # e = x - h * h
            if a and a is b and c and a.opcode == "FMUL.FTZ" and i.operands[1].startswith("-") != i.operands[2].startswith("-"):
                made = [self.value(home[a], a, operand) for operand in a.operands[1:]]
                rsq = next((v for v in made if v and v.opcode == "MUFU.RSQ"), None)
                if rsq and c in made and self.value(home[rsq], rsq, rsq.operands[1]) is c:
                    roots |= {i, a}
            # h + e * q
            if a in roots and b and c in roots and b.opcode == "FMUL.FTZ" and b.operands[2] == "0.5":
                rsq = self.value(home[b], b, b.operands[1])
                if rsq and rsq.opcode == "MUFU.RSQ":
                    roots |= {i, b}
        return roots

    def divides(self, i: Instruction) -> bool:
        """Return whether a value is made from what the division of binary64 numbers begins with, MUFU.RCP64H, or their root."""
        seen: set[Instruction] = set()
        rest = [i]
        while rest:
            i = rest.pop()
            if i.opcode in ("MUFU.RCP64H", "MUFU.RSQ64H"):
                return True
            if i in self.home and i not in seen:
                seen.add(i)
                lower = [int(number) for operand in i.operands[1:] for number in re.findall(r"\bR(\d+)", operand)]
                halves = [f"R{number + half}" for number in lower for half in (0, 1)]  # of a binary64 number
                rest += [made for half in halves if (made := self.value(self.home[i], i, half))]
        return False

    @property
    def contracted(self) -> list[Instruction]:
        """Fused multiply-adds of neither a root nor a division of binary64 numbers: the results of those are correctly rounded.

        The functions that ptxas adds for their special cases have "_rn" in their names. With -RZ and RZ for factors and
        numbers for the rest, HFMA2 and FFMA move a number to a register.
        """

        def moves(i: Instruction) -> bool:
            factors, rest = [operand.lstrip("-") for operand in i.operands[1:3]], i.operands[3:]
            return factors == ["RZ", "RZ"] and not any(re.search(r"\bU?R\d", operand) for operand in rest)

        fused = [i for i in self.code if re.match(r"[FHD]FMA", i.opcode) and not moves(i) and "_rn" not in i.subroutine]
        return [i for i in fused if i not in self.root and not self.divides(i)]

    @property
    def flushing(self) -> list[Instruction]:
        """Operations on binary32 that take subnormal numbers for zero, but those of roots."""
        found = [i for i in self.code if re.match(r"F[A-Z].*\.FTZ", i.opcode) and "_rn" not in i.subroutine]
        return [i for i in found if i not in self.root]


# ---- All kernels -------------------------------------------------------------------------------------------------------------


def audit_file(source: Path, arch: str, folder: Path) -> list[Kernel]:
    """Compile a source file into ``folder`` and return its kernels."""
    nvdisasm = find("nvdisasm")
    if not nvdisasm:
        raise RuntimeError("sass: nvdisasm was found neither on PATH, beside nvcc, nor in the triton package")
    cubin = folder / f"{source.stem}.{arch}.cubin"
    said = run("nvcc", "-cubin", f"-arch={arch}", *FLAGS, "-Xptxas=-v", source, "-o", cubin)
    used = {}
    for part in said.split("Compiling entry function '")[1:]:
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers", part, re.DOTALL)
        if not numbers:
            raise RuntimeError(f"sass: ptxas does not say what it used\n{part}")
        used[part.split("'")[0]] = map(int, numbers.groups())
    kernels = []
    for section in re.split(r"^\.text\.", run(nvdisasm, "-c", "-gi", cubin), flags=re.MULTILINE)[1:]:
        symbol = section.split(":", 1)[0]
        stack, spilled, registers = used[symbol]
        name, storage = readable(symbol)
        kernels.append(Kernel(symbol, name, storage, arch, registers, stack, spilled, list(instructions(section))))
    return kernels


def audit(folder: Path, architectures: tuple[str, ...] = ARCHITECTURES) -> list[Kernel]:
    """Return all kernels for all architectures, in the order of architectures, storage types and names."""
    jobs = [(source, arch, folder) for arch in architectures for source in sorted((CSRC / "cuda").glob("*.cu"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [kernel for kernels in pool.map(lambda job: audit_file(*job), jobs) for kernel in kernels]
    order = list(STORAGE.values())
    return sorted(found, key=lambda k: (architectures.index(k.arch), order.index(k.storage), k.name))


def row(kernel: Kernel) -> dict[str, Any]:
    """Return what is written of a kernel."""
    count = len(kernel.hot)
    return {
        "registers": kernel.registers,
        "stack": kernel.stack,
        "instructions": count,
        "per_element": round(count / ELEMENTS[kernel.storage], 1),
        "search": kernel.search,
        "parts": kernel.parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the instructions of the CUDA kernels.")
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help=f"default: {' '.join(ARCHITECTURES)}")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kernels = audit(Path(folder), tuple(args.arch))
    print(f"{'':52} {'':7} registers instructions an element  search")
    for k in kernels:
        count = len(k.hot)
        print(f"{k.name:52} {k.arch:7} {k.registers:9} {count:12} {count / ELEMENTS[k.storage]:10.1f} {k.search:7}")
    if args.out:
        version = re.search(r"V([\d.]+)", run("nvcc", "--version"))
        rows = [f"  {json.dumps({'arch': k.arch, 'kernel': k.name, **row(k)})}" for k in kernels]
        head = json.dumps({"nvcc": version and version[1], "flags": " ".join(FLAGS[:3])})[1:-1]
        args.out.write_text(f'{{\n {head},\n "kernels": [\n' + ",\n".join(rows) + "\n ]\n}\n")


if __name__ == "__main__":
    main()
