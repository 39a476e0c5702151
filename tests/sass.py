"""What nvcc makes of the kernels of a .cu file, counted in its machine code: instructions, registers, spills, occupancy.

    python tests/sass.py csrc/cuda/focal_softmax.cu --kernel 'forward.*float.*17' --elements 19 --listing

Nothing runs, and no GPU is needed: nvcc compiles, nvdisasm (of the CUDA toolkit, or of Triton) lists. test_counts.py holds
kernels to budgets.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
#: Where machine code is kept; git ignores it.
CACHE = ROOT / "build/sass"
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Werror=all-warnings"]
#: By architecture: the PTX that ptxas compiles, as the wheel's would be but for its number.
PTX = {80: 80, 86: 80, 89: 80, 90: 90, 100: 100, 120: 120}


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks of a multiprocessor share: table "Technical Specifications per Compute Capability" of the CUDA C++
    Programming Guide."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 64 * 1024


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 * 1024),
    86: Multiprocessor(48, 16, 100 * 1024),
    89: Multiprocessor(48, 24, 100 * 1024),
    90: Multiprocessor(64, 32, 228 * 1024),
    100: Multiprocessor(64, 32, 228 * 1024),
    120: Multiprocessor(48, 24, 100 * 1024),
}


@dataclass(frozen=True)
class Instruction:
    text: str  # with its predicate: "@!P0 BRA `(.L_x_3)"
    label: str | None  # of the place where it stands
    targets: tuple[str, ...]  # labels that it names

    @property
    def opcode(self) -> str:
        return self.text.removeprefix(self.predicate).split()[0]

    @property
    def operands(self) -> list[str]:
        rest = self.text.removeprefix(self.predicate).strip().partition(" ")[2]
        return [part.strip() for part in rest.split(",") if part.strip()]

    @property
    def predicate(self) -> str:
        found = re.match(r"@!?U?P\w+\s+", self.text)
        return found[0] if found else ""

    @property
    def is_wide_multiply(self) -> bool:
        """A product of 64 bits of two numbers that are not known when compiling: a 64-bit multiplication, which is one of these
        and three more, or part of a division. One with an immediate factor is the address of an element, and as good as an
        addition; those of the uniform data path (UIMAD) are once for a warp."""
        if not re.match(r"IMAD\.(WIDE|HI)", self.opcode):
            return False
        return not any(re.fullmatch(r"-?0x[0-9a-f]+", factor) for factor in self.operands[1:3])


@dataclass(frozen=True)
class Kernel:
    name: str  # demangled, without namespaces and parameters
    arch: int
    registers: int
    spilled: int  # bytes, stored
    shared_bytes: int  # static
    threads: int  # of a block, at most
    code_bytes: int
    listing: str  # by nvdisasm; "" where it was not asked for

    @functools.cached_property
    def instructions(self) -> tuple[Instruction, ...]:
        return _instructions(self.listing)

    @functools.cached_property
    def flow(self) -> Flow:
        return Flow(self.instructions)

    @functools.cached_property
    def main_loop(self) -> set[int]:
        """The blocks of the largest loop, that over pixels; without a loop, those of the kernel."""
        loops = self.flow.loops()
        return loops[0] if loops else set(self.flow.before)

    @functools.cached_property
    def iteration(self) -> tuple[Instruction, ...]:
        """What an iteration of the main loop executes at most."""
        return self.flow.instructions(self.flow.longest_way(self.main_loop))

    def iteration_with(self, opcode: str) -> tuple[Instruction, ...]:
        """The same of the smallest loop that has such an instruction."""
        has = [any(i.opcode.startswith(opcode) for i in block) for block in self.flow.blocks]
        loop = next(loop for loop in reversed(self.flow.loops()) if any(has[b] for b in loop))
        return self.flow.instructions(self.flow.longest_way(loop))

    @functools.cached_property
    def inner_iteration(self) -> tuple[Instruction, ...]:
        """What an iteration of the largest loop without another one in it executes at most."""
        loops = self.flow.loops()
        innermost = next(loop for loop in loops if not any(other < loop for other in loops))
        return self.flow.instructions(self.flow.longest_way(innermost))

    @property
    def way(self) -> tuple[Instruction, ...]:
        """What the kernel executes at most, loops once."""
        return self.flow.instructions(self.flow.longest_way(set(self.flow.before)))

    @property
    def wide_multiplies(self) -> int:
        return sum(i.is_wide_multiply for i in self.iteration)

    def warps(self, dynamic_shared: int = 0) -> int:
        """That are on a multiprocessor at a time."""
        limits, warps = MULTIPROCESSORS[self.arch], -(-self.threads // 32)
        registers = -(-self.registers * 32 // 256) * 256  # of a warp; a multiprocessor's are in four parts
        blocks = min(
            limits.blocks,
            limits.warps // warps,
            limits.registers // 4 // registers * 4 // warps,
            limits.shared_bytes // (self.shared_bytes + dynamic_shared + 1024),
        )
        return blocks * warps


def histogram(instructions) -> str:
    """The opcodes without their modifiers, the most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in Counter(i.opcode.split(".")[0] for i in instructions).most_common(24))


# ---- control flow


class Flow:
    """Basic blocks, and which may follow which."""

    def __init__(self, instructions: tuple[Instruction, ...]):
        places = {i.label: k for k, i in enumerate(instructions) if i.label}
        begins = sorted({0, *places.values(), *(k + 1 for k, i in enumerate(instructions[:-1]) if _ends_block(i))})
        at = {begin: block for block, begin in enumerate(begins)}
        self.blocks = [instructions[i:j] for i, j in zip(begins, [*begins[1:], len(instructions)], strict=True)]
        self.after: list[set[int]] = []
        for b, block in enumerate(self.blocks):
            targets = {at[places[t]] for t in block[-1].targets if t in places} if _is_branch(block[-1]) else set()
            next_one = {b + 1} if _falls_through(block[-1]) and b + 1 < len(self.blocks) else set()
            self.after.append(targets | next_one)
        order = self._from_first_to_last()
        self.before: dict[int, set[int]] = {b: set() for b in order}  # in this order, without those that cannot be reached
        for b in order:
            for n in self.after[b]:
                self.before[n].add(b)
        self.dominators = self._dominators(order)

    def loops(self) -> list[set[int]]:
        """The blocks of each natural loop, that is what can reach a branch to a place that dominates it. (A branch to lower
        addresses is no loop where code has been moved out of the way.)"""
        bodies: dict[int, set[int]] = {}
        for b in self.before:
            for head in self.after[b] & self.dominators[b]:
                body, todo = bodies.setdefault(head, {head}), [b]
                while todo:
                    if (at := todo.pop()) not in body:
                        body.add(at)
                        todo += self.before[at]
        return sorted(bodies.values(), key=self.size, reverse=True)

    def longest_way(self, body: set[int]) -> set[int]:
        """The blocks on the longest way through a loop, or a kernel: loops inside it once, of branches the longer side. (A warp
        whose threads part takes both sides: what they part for should be short.)"""
        lengths: dict[int, int] = {}
        follower: dict[int, int] = {}
        for b in reversed(self.before):
            onward = {n: lengths[n] for n in self.after[b] & body - self.dominators[b]} if b in body else {}
            if onward:
                follower[b] = max(onward, key=onward.get)
            lengths[b] = len(self.blocks[b]) + max(onward.values(), default=0)
        way = [next(b for b in self.before if b in body)]
        while way[-1] in follower:
            way.append(follower[way[-1]])
        return set(way)

    def size(self, blocks: set[int]) -> int:
        return sum(len(self.blocks[b]) for b in blocks)

    def instructions(self, blocks: set[int]) -> tuple[Instruction, ...]:
        return tuple(i for b in sorted(blocks) for i in self.blocks[b])

    def _from_first_to_last(self) -> list[int]:
        """The blocks that can be reached, each after one that leads to it (in reverse postorder)."""
        order, seen, stack = [], {0}, [(0, iter(self.after[0]))]
        while stack:
            block, rest = stack[-1]
            following = next((n for n in rest if n not in seen), None)
            if following is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.after[following])))
        return order[::-1]

    def _dominators(self, order: list[int]) -> dict[int, set[int]]:
        """Of each block: those on every way to it."""
        found: dict[int, set[int]] = {0: {0}}
        changed = True
        while changed:
            changed = False
            for b in order[1:]:
                new = set.intersection(*(found[p] for p in self.before[b] if p in found)) | {b}
                changed |= new != found.get(b)
                found[b] = new
        return found


def _is_branch(i: Instruction) -> bool:
    return re.match(r"BRA|BRX|JMP|JMX", i.opcode) is not None


def _ends_block(i: Instruction) -> bool:
    return _is_branch(i) or re.match(r"EXIT|RET", i.opcode) is not None


def _falls_through(i: Instruction) -> bool:
    """Whether the next instruction may follow. (BSYNC always stands before the place that it goes to.)"""
    return not _ends_block(i) or bool(i.predicate) or (i.opcode.startswith("BRA") and len(i.operands) > 1)


# ---- from nvcc


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; Triton brings some."""
    nvcc, triton = shutil.which("nvcc"), importlib.util.find_spec("triton")
    places = [Path(nvcc).resolve().parent] if nvcc else []
    places += [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    return shutil.which(name) or next((str(p / name) for p in places if (p / name).exists()), None)


def compiled(source: Path, arch: int) -> tuple[Path, str]:
    """The machine code of a .cu file, a cubin, and what ptxas said of it. Only what has changed is compiled."""
    headers = sorted(path for path in CSRC.rglob("*.*h") if CSRC / "cpu" not in path.parents)
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    contents = [" ".join([version, *FLAGS]).encode(), *(path.read_bytes() for path in [*headers, source])]
    key = f"{source.stem}-{hashlib.sha256(b'|'.join(contents)).hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    ptx, cubin, said = CACHE / f"{key}.{PTX[arch]}.ptx", CACHE / f"{key}.{arch}.cubin", CACHE / f"{key}.{arch}.txt"
    with FileLock(f"{ptx}.lock"):
        if not ptx.exists():
            _nvcc(*FLAGS, f"-arch=compute_{PTX[arch]}", "-ptx", source, to=ptx)
    with FileLock(f"{cubin}.lock"):
        if not cubin.exists():
            said.write_text(_nvcc(f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin", ptx, to=cubin))
    return cubin, said.read_text()


def _nvcc(*arguments, to: Path) -> str:
    partial = to.with_suffix(f".{os.getpid()}{to.suffix}")
    done = subprocess.run(["nvcc", *map(str, arguments), "-o", str(partial)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed:\n{done.stdout[-8000:]}{done.stderr[-8000:]}")
    partial.replace(to)
    return done.stdout + done.stderr


@functools.cache
def kernels(source: Path, arch: int, *, listed: bool = True) -> list[Kernel]:
    cubin, said = compiled(source, arch)
    listings: dict[str, str] = {}
    if listed:
        text = subprocess.run([tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
        listings = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^//-----|\Z)", text, re.DOTALL | re.MULTILINE))
    attributes = _attributes(cubin.read_bytes())
    entries = re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", said, re.DOTALL)
    names = "\n".join(name for name, _ in entries)
    demangled = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout.splitlines()
    return [
        Kernel(
            short_name(readable),
            arch,
            *(int(found[1]) if (found := re.search(pattern, text)) else 0 for pattern in _RESOURCES),
            *attributes[name],
            listings.get(name, ""),
        )
        for (name, text), readable in zip(entries, demangled, strict=True)
    ]


#: registers, bytes spilled, bytes of static shared memory in what ptxas says
_RESOURCES = (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes smem")


def short_name(demangled: str) -> str:
    """Without namespaces, the result and the parameters: "softmax_focal_forward_kernel<float, ClassRange<17, 20>>"."""
    name = re.sub(r"\(anonymous namespace\)::|veerloss::|^void ", "", demangled).replace("> >", ">>")
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name


def _instructions(text: str) -> tuple[Instruction, ...]:
    found, label = [], None
    for line in text.splitlines():
        if line.startswith(".L_") and line.endswith(":"):
            label = line[:-1]
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;?$", line):
            instruction = match[1].rstrip(" ;")
            targets = tuple(re.findall(r"\.L_\w+", instruction))
            found.append(Instruction(re.sub(r"\s*\(\*.*?\*\)", "", instruction), label, targets))
            label = None
    # The instructions after the last are never reached: a branch to itself, and padding.
    while found and (found[-1].opcode == "NOP" or (_is_branch(found[-1]) and found[-1].label in found[-1].targets)):
        found.pop()
    return tuple(found)


def _attributes(elf: bytes) -> dict[str, tuple[int, int]]:
    """By kernel: the threads of its __launch_bounds__, which are attribute 5 of section .nv.info.<kernel>, in the format 4 (a
    size, then the value); and the bytes of its code, section .text.<kernel>."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<II4QII2Q", elf, table + entry * i) for i in range(count)]
    threads, code = {}, {}
    for name, _, _, _, begin, size, *_ in sections:
        at = sections[names][4] + name
        title = elf[at : elf.index(b"\0", at)].decode()
        if title.startswith(".text."):
            code[title.removeprefix(".text.")] = size
        while title.startswith(".nv.info.") and size >= 4:
            form, attribute, value = struct.unpack_from("<BBH", elf, begin)
            if (form, attribute) == (4, 5):
                (threads[title.removeprefix(".nv.info.")],) = struct.unpack_from("<I", elf, begin + 4)
            step = 4 + (value if form == 4 else 0)
            begin, size = begin + step, size - step
    return {name: (threads.get(name, 1024), size) for name, size in code.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--arch", type=int, choices=list(PTX), default=90)
    parser.add_argument("--kernel", default="", help="a regular expression that the name matches somewhere")
    parser.add_argument("--elements", type=int, default=1, help="that an iteration of the main loop is for")
    parser.add_argument("--shared", type=int, default=0, help="bytes of dynamic shared memory")
    parser.add_argument("--listing", action="store_true", help="with the instructions of an iteration")
    options = parser.parse_args()
    for kernel in kernels(options.source, options.arch):
        if not re.search(options.kernel, kernel.name):
            continue
        loops = [kernel.flow.size(loop) for loop in kernel.flow.loops()]
        print(
            f"{kernel.name}\n  {len(kernel.instructions)} instructions; {len(kernel.iteration)} in an iteration of "
            f"{f'the largest of the loops {loops}' if loops else 'all, there is no loop'}: "
            f"{len(kernel.iteration) / options.elements:.1f} an element, {kernel.wide_multiplies} wide multiplies\n"
            f"  {kernel.registers} registers, {kernel.spilled} bytes spilled, {kernel.shared_bytes} static shared, "
            f"{kernel.threads} threads, {kernel.warps(options.shared)} of {MULTIPROCESSORS[kernel.arch].warps} warps\n"
            f"  {histogram(kernel.iteration)}"
        )
        if options.listing:
            print("\n".join(f"    {i.label or '':10} {i.text}" for i in kernel.iteration))


if __name__ == "__main__":
    main()
