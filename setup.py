"""Builds the optional native extension. Everything else about the package is in pyproject.toml.

No -march and no -ffast-math: one binary must run on every x86-64 or ARM machine (hot loops pick their instruction set at
load time), and a library linked with -ffast-math flushes denormals in the whole process.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import BaseError, CCompilerError

FAILURES = (BaseError, CCompilerError, OSError)
SLOWER = (
    "rsvlm_infer._C was not built ({reason}). The package works without it; slower then: "
    "pack_tiles (resample + normalise + patchify, uses Pillow), complexity_map (planner, uses numpy), "
    "cell_means (coarse copies, uses numpy), "
    "cue_search (uses numpy) and the model's ops (use torch). "
    "Install a C++17 compiler and reinstall to get the native versions."
)


ParallelCompile().install()  # files side by side on all cores: one after another they take minutes


class OptionalBuildExt(build_ext):
    """Compiles what it can: without a compiler the package installs and says what is slower."""

    def run(self) -> None:
        try:
            super().run()
        except FAILURES as error:
            self.extensions = []
            print(SLOWER.format(reason=error), file=sys.stderr)

    def build_extensions(self) -> None:
        if self.compiler.compiler_type != "msvc":
            openmp = ["-fopenmp"] if self._compiles_openmp() else []
            for extension in self.extensions:
                extension.extra_compile_args += ["-O3", "-ffp-contract=off", "-Wall", "-Wextra", *openmp]
                extension.extra_link_args += openmp
        super().build_extensions()

    def _compiles_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "openmp.cpp"
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(objects, "openmp", output_dir=folder, extra_postargs=["-fopenmp"])
            except FAILURES:
                return False
        return True


setup(
    ext_modules=[
        Pybind11Extension(
            "rsvlm_infer._C",
            sorted(str(path) for folder in ("ops", "cpu", "model", "python") for path in Path("csrc", folder).glob("*.cpp")),
            include_dirs=["csrc/include", "csrc/python"],
            depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
