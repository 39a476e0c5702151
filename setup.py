"""Builds the compiled library veerloss/_C against LibTorch's stable ABI; everything else is in pyproject.toml.

The library needs torch's headers and its libtorch_cpu, not torch itself: they are found in the environment that pip installs
into, which pip's isolated build environment hides from `import` alone. VEERLOSS_NATIVE=0, or no C++ compiler, gives a
pure-Python install.
"""

import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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


def find_torch() -> Path | None:
    """The folder of the installed torch package."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((p for p in places if (p / "include/torch/csrc/stable/library.h").exists()), None)


def say(message: str) -> None:
    print(f"veerloss: {message}", file=sys.stderr, flush=True)


def compiler() -> str | None:
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    return shutil.which(shlex.split(command)[0])


def extensions(torch: Path | None) -> list[Extension]:
    pure = "pure-Python install (backend 'reference' only)"
    if os.environ.get("VEERLOSS_NATIVE", "1") == "0":
        say(f"VEERLOSS_NATIVE=0: {pure}")
        return []
    if compiler() is None:
        say(f"no C++ compiler found: {pure}. Install one, or set CXX, and reinstall for the fast kernels")
        return []
    if torch is None:
        return []  # setup_requires asks for torch; the build proper comes after
    say(f"compiling against {torch}")
    library = torch / "lib"
    return [
        Extension(
            "veerloss._C",
            sources=sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp")),
            depends=sorted(str(p) for p in Path("csrc").rglob("*.h")),
            include_dirs=[str(torch / "include"), str(torch / "include/torch/csrc/api/include")],
            define_macros=DEFINES,
            extra_compile_args=COMPILE_FLAGS,
            library_dirs=[str(library)],
            libraries=["torch_cpu"],
            language="c++",
            py_limited_api=True,
        )
    ]


class BuildExt(build_ext):
    """The library holds operators, not a Python module: it is loaded with torch.ops.load_library and exports no PyInit."""

    def get_export_symbols(self, ext):
        return ext.export_symbols


torch_folder = find_torch()
built = extensions(torch_folder)
setup(
    ext_modules=built,
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": ABI3}} if built else {},
    # Reached only where no torch is installed at all: pip then fetches it for the build as well.
    setup_requires=[] if torch_folder or os.environ.get("VEERLOSS_NATIVE", "1") == "0" else ["torch>=2.10"],
)
