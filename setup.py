"""Builds the compiled libraries against LibTorch's stable ABI; everything else is in pyproject.toml.

veerloss/_C has the CPU kernels, veerloss/_C_cuda those of CUDA: it is built wherever nvcc is found, also beside a CPU-only
torch, and loaded only beside a CUDA build of torch. Both need torch's headers and its libtorch_cpu, not torch itself: they are
found in the environment that pip installs into, which pip's isolated build environment hides from `import` alone.

In the environment: VEERLOSS_NATIVE=0 gives a pure-Python install, as does a missing C++ compiler. VEERLOSS_CUDA=0 leaves the
CUDA library out; VEERLOSS_CUDA=1 makes it an error if nvcc fails, which otherwise is told and leaves it out too.
TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX" names the architectures to compile for; by default that of the GPU at hand, or where there is
none 8.0 with PTX, which newer ones compile when it is loaded. CUDA_HOME says where nvcc is.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ABI3 = "cp310"  # one binary for every Python from 3.10 on
TORCH_TARGET = "0x020a000000000000"  # and for every torch from 2.10 on

#: -fno-trapping-math lets the compiler turn selects into vector code; NaN and infinity keep their meaning. Instruction sets are
#: chosen at run time (csrc/cpu/for_each_target.h), never with -march=native.
COMPILE_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-g0",
]
DEFINES = [("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", "0x030a0000")]
#: Relaxed constexpr: the shared headers have constexpr functions of the standard library. No fast maths: NaN stays NaN.
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"]


def find_torch() -> Path | None:
    """The folder of the installed torch package."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((p for p in places if (p / "include/torch/csrc/stable/library.h").exists()), None)


def say(message: str) -> None:
    print(f"veerloss: {message}", file=sys.stderr, flush=True)


def compiler_command() -> str:
    return os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"


def compiler() -> str | None:
    return shutil.which(shlex.split(compiler_command())[0])


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


def extensions(torch: Path | None) -> list[Extension]:
    pure = "pure-Python install (backends 'reference' and 'triton')"
    if os.environ.get("VEERLOSS_NATIVE", "1") == "0":
        say(f"VEERLOSS_NATIVE=0: {pure}")
        return []
    if compiler() is None:
        say(f"no C++ compiler found: {pure}. Install one, or set CXX, and reinstall for the fast kernels")
        return []
    if torch is None:
        return []  # setup_requires asks for torch; the build proper comes after
    say(f"compiling against {torch}")
    common = {
        "depends": sorted(str(p) for p in Path("csrc").rglob("*.*h")),
        "include_dirs": [str(torch / "include"), str(torch / "include/torch/csrc/api/include")],
        "extra_compile_args": COMPILE_FLAGS,
        "library_dirs": [str(torch / "lib")],
        "libraries": ["torch_cpu"],
        "language": "c++",
        "py_limited_api": True,
    }
    found = [Extension("veerloss._C", sorted(map(str, Path("csrc/cpu").glob("*.cpp"))), define_macros=DEFINES, **common)]
    if os.environ.get("VEERLOSS_CUDA", "1") == "0":
        say("VEERLOSS_CUDA=0: no CUDA library")
    elif cuda_home() is None:
        say("no nvcc found: no CUDA library. Install the CUDA toolkit, or set CUDA_HOME, and reinstall for it")
    else:
        say(f"compiling the CUDA library of {cuda_home()} for {' '.join(architectures())}")
        sources = sorted(str(p) for p in Path("csrc/cuda").iterdir() if p.suffix in {".cpp", ".cu"})
        defines = [*DEFINES, ("VEERLOSS_CUDA", "1"), ("USE_CUDA", "1")]  # USE_CUDA: torch's headers then declare the stream
        optional = os.environ.get("VEERLOSS_CUDA") != "1"
        found.append(Extension("veerloss._C_cuda", sources, define_macros=defines, optional=optional, **common))
    return found


class BuildExt(build_ext):
    """The libraries hold operators, not Python modules: they are loaded with torch.ops.load_library and export no PyInit."""

    def get_export_symbols(self, ext):
        return ext.export_symbols

    def build_extension(self, ext):
        cuda = [s for s in ext.sources if s.endswith(".cu")]
        if cuda:
            ext.extra_objects = self.compile_cuda(cuda)
            ext.sources = [s for s in ext.sources if not s.endswith(".cu")]
            home = cuda_home()
            ext.include_dirs.append(str(home / "include"))
            ext.library_dirs += [str(p) for p in (home / "lib64", home / "lib") if p.is_dir()]
            # The runtime is linked in, its symbols hidden: it needs no library beside the driver, of nvcc's version or newer.
            # A CUDA build of torch brings libtorch_cuda, which has the current stream; a CPU-only one has none to link with,
            # and an empty one of that name does.
            ext.extra_link_args = ["-Wl,--no-as-needed", self.empty_torch_cuda(), "-Wl,--as-needed", "-Wl,--exclude-libs,ALL"]
            ext.libraries += ["cudart_static", "pthread", "dl", "rt"]
        super().build_extension(ext)

    def compile_cuda(self, sources: list[str]) -> list[str]:
        """Objects of .cu files, side by side."""
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / f"{Path(s).stem}.o") for s in sources]
        commands = [
            [str(cuda_home() / "bin/nvcc"), *NVCC_FLAGS, *architectures(), "-c", source, "-o", target]
            for source, target in zip(sources, objects, strict=True)
        ]
        running = [subprocess.Popen(command) for command in commands]
        for process, command in [(p, c) for p, c in zip(running, commands, strict=True) if p.wait() != 0]:
            say(f"no CUDA library: nvcc failed with {process.returncode}: {shlex.join(command)}")
            raise CompileError("nvcc failed")
        return objects

    def empty_torch_cuda(self) -> str:
        folder = Path(self.build_temp) / "empty"
        folder.mkdir(parents=True, exist_ok=True)
        source, library = folder / "empty.cpp", folder / "libtorch_cuda.so"
        source.write_text("")
        command = [*shlex.split(compiler_command()), "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        return str(library)


torch_folder = find_torch()
built = extensions(torch_folder)
setup(
    ext_modules=built,
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": ABI3}} if built else {},
    # Reached only where no torch is installed at all: pip then fetches it for the build as well.
    setup_requires=[] if torch_folder or os.environ.get("VEERLOSS_NATIVE", "1") == "0" else ["torch>=2.10"],
)
