"""Builds the compiled libraries against LibTorch's stable ABI; everything else is in pyproject.toml.

veerloss/_C has the CPU kernels, veerloss/_C_cuda those of CUDA: it is built wherever nvcc is found, also beside a CPU-only
torch, and loaded only beside a CUDA build of torch. Both need torch's headers and its libtorch_cpu, not torch itself: they are
found in the environment that pip installs into, which pip's isolated build environment hides from `import` alone.

In the environment: VEERLOSS_NATIVE=0 gives a pure-Python install, as does a missing C++ compiler. VEERLOSS_CUDA=0 leaves the
CUDA library out; VEERLOSS_CUDA=1 makes it an error if it does not compile, which otherwise is told and leaves it out too.
TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX" names the architectures to compile for; by default that of the GPU at hand, or where there is
none 8.0 with PTX, which newer ones compile when it is loaded. CUDA_HOME says where nvcc is, MAX_JOBS how many compilers run.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from multiprocessing.pool import ThreadPool
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ABI3 = "cp310"  # one binary for every Python from 3.10 on
TORCH_TARGET = "0x020a000000000000"  # and for every torch from 2.10 on
CXX = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
#: -fno-trapping-math lets the compiler turn selects into vector code; NaN and infinity keep their meaning. Instruction sets are
#: chosen at run time (dispatch_isa.h), never with -march=native.
CXX_FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"]
#: Relaxed constexpr: the shared headers have constexpr functions of the standard library. No fast maths: NaN stays NaN.
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"]
#: Where objects are kept from one build to the next; pip gives an editable install a new build_temp each time.
OBJECTS = Path("build/objects")
#: A CUDA build of torch brings libtorch_cuda, which has the current stream; a CPU-only one has none to link with, and an empty
#: one of that name does.
TORCH_CUDA_STUB = OBJECTS / "libtorch_cuda.so"


def say(message: str) -> None:
    print(f"veerloss: {message}", file=sys.stderr, flush=True)


def find_torch() -> Path | None:
    """The folder of the installed torch package."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((p for p in places if (p / "include/torch/csrc/stable/library.h").exists()), None)


def cuda_home() -> Path | None:
    """The folder of the CUDA toolkit, 12 or newer: older compilers do not know C++20."""
    found = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), found and Path(found).resolve().parents[1], "/usr/local/cuda"]
    complete = (Path(p) for p in places if p and (Path(p) / "include/cuda_runtime_api.h").exists())
    return next((p for p in complete if (p / "bin/nvcc").exists()), None)


def architectures() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST."""
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not names and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True).stdout
        names = ";".join(sorted(set(re.findall(r"^\d+\.\d+$", answer, re.MULTILINE))))
    flags = []
    for name in re.split(r"[;, ]+", names.strip() or "8.0+PTX"):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if not match:
            raise SystemExit(f'veerloss: TORCH_CUDA_ARCH_LIST holds {name!r}, expected numbers as in "8.0;9.0+PTX"')
        if int(match[1]) < 8:
            say(f"no CUDA kernels for {name}: they need 8.0 or newer; backend='triton' does not")
            continue
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags or ["-gencode=arch=compute_80,code=compute_80"]


def library(name: str, torch: Path, *patterns: str) -> Extension:
    """A library of operators, for torch.ops.load_library, of the sources of csrc that match one of the patterns."""
    return Extension(
        name,
        sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern)),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
        include_dirs=[str(torch / "include"), str(torch / "include/torch/csrc/api/include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        language="c++",
        py_limited_api=True,
    )


def cuda_library(torch: Path, cuda: Path) -> Extension:
    generated = architectures()
    say(f"compiling the CUDA library of {cuda} for {' '.join(generated)}")
    ext = library(
        "veerloss._C_cuda", torch, "ops/compound.cpp", "ops/focal_*.cpp", "ops/lovasz_*.cpp", "ops/region.cpp", "cuda/**/*.cu"
    )
    ext.optional = os.environ.get("VEERLOSS_CUDA") != "1"
    ext.nvcc = [str(cuda / "bin/nvcc"), *NVCC_FLAGS, *generated]
    ext.define_macros += [("VEERLOSS_CUDA", "1"), ("USE_CUDA", "1")]  # USE_CUDA: torch's headers then declare the stream
    ext.include_dirs.append(str(cuda / "include"))
    ext.library_dirs += [str(cuda / "lib64"), str(cuda / "lib")]
    # The runtime is linked in, its symbols hidden: it needs no library beside the driver, of nvcc's version or newer.
    ext.libraries += ["cudart_static", "pthread", "dl", "rt"]
    ext.extra_link_args = ["-Wl,--no-as-needed", str(TORCH_CUDA_STUB), "-Wl,--as-needed", "-Wl,--exclude-libs,ALL"]
    return ext


def extensions(torch: Path | None) -> list[Extension]:
    pure = "pure-Python install (backends 'reference' and 'triton')"
    if os.environ.get("VEERLOSS_NATIVE", "1") == "0":
        say(f"VEERLOSS_NATIVE=0: {pure}")
        return []
    if shutil.which(CXX[0]) is None:
        say(f"no C++ compiler found: {pure}. Install one, or set CXX, and reinstall for the fast kernels")
        return []
    if torch is None:
        return []  # setup_requires asks for torch; the build proper comes after
    say(f"compiling against {torch}")
    found = [library("veerloss._C", torch, "ops/*.cpp", "cpu/**/*.cpp")]
    if os.environ.get("VEERLOSS_CUDA", "1") == "0":
        say("VEERLOSS_CUDA=0: no CUDA library")
    elif cuda := cuda_home():
        found.append(cuda_library(torch, cuda))
    else:
        say("no nvcc found: no CUDA library. Install the CUDA toolkit, or set CUDA_HOME, and reinstall for it")
    return found


class BuildExt(build_ext):
    """ninja compiles, setuptools links."""

    def run(self):
        for library in Path(self.build_lib, "veerloss").glob("_C*"):
            library.unlink()  # of an earlier build: a wheel would take it along, and one whose source is gone seems up to date
        super().run()

    def build_extension(self, ext):
        objects = self.compile(ext)
        if str(TORCH_CUDA_STUB) in ext.extra_link_args:
            stub = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-x", "c++", "/dev/null", "-o", str(TORCH_CUDA_STUB)]
            self.spawn([*CXX, *stub])
        ext.sources, ext.extra_objects = [], objects
        super().build_extension(ext)

    def compile(self, ext) -> list[str]:
        """The objects. ninja compiles those whose source, headers or command changed; without a ninja all are compiled."""
        folder = OBJECTS / ext.name
        macros = [f"-D{name}={value}" for name, value in ext.define_macros]
        cxx = [*self.compiler.compiler_so_cxx, *macros, *(f"-I{path}" for path in ext.include_dirs), *CXX_FLAGS]
        lines = [f"builddir = {folder}", "rule compile", "  command = $command", "  description = $out"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
        commands = {}
        for source in ext.sources:
            target = folder / f"{source}.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            # -MD, not -MMD: an upgrade of torch or of the toolkit changes headers as well.
            compiler = ext.nvcc if source.endswith(".cu") else cxx
            command = [*compiler, "-MD", "-MF", f"{target}.d", "-c", source, "-o", str(target)]
            lines += [f"build {target}: compile {source}", f"  command = {shlex.join(command).replace('$', '$$')}"]
            commands[str(target)] = command
        jobs = os.environ.get("MAX_JOBS")
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else [shutil.which("ninja")]
        if ninja[0]:
            (folder / "build.ninja").write_text("\n".join([*lines, ""]))
            failed = subprocess.call([*ninja, "-f", str(folder / "build.ninja"), *(["-j", jobs] if jobs else [])])
        else:
            say("no ninja found: every source is compiled")
            with ThreadPool(int(jobs or os.cpu_count())) as pool:
                failed = any(pool.map(subprocess.call, commands.values()))
        if failed and ext.optional:
            say("no CUDA library: its sources do not compile, see above")
        if failed:
            raise CompileError(f"the sources of {ext.name} do not compile")
        return list(commands)


torch_folder = find_torch()
built = extensions(torch_folder)
setup(
    ext_modules=built,
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": ABI3}} if built else {},
    # Reached only where no torch is installed at all: pip then fetches it for the build as well.
    setup_requires=[] if torch_folder or os.environ.get("VEERLOSS_NATIVE", "1") == "0" else ["torch>=2.10"],
)
