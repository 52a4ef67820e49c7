"""The one part that is compiled; the rest is said in pyproject.toml."""

from __future__ import annotations

import sys
import sysconfig
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")  # one build for all versions of Python


class Build(build_ext):
    """Asks for threads where torch brings what they need: it is loaded before, and so nothing is linked for them."""

    def build_extension(self, ext: Any) -> None:
        if self.compiler.compiler_type == "unix":
            ext.extra_compile_args = ["-O3", "-ffp-contract=off"]  # the same bits on every processor
            if sys.platform.startswith("linux") and "clang" not in self.compiler.compiler_so[0]:
                ext.extra_compile_args.append("-fopenmp")
        super().build_extension(ext)


setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        Extension(
            "lightning_lance.tensors._native",
            ["lightning_lance/tensors/_native.c"],
            define_macros=[("Py_LIMITED_API", "0x030A0000")] if LIMITED else [],
            py_limited_api=LIMITED,
            optional=True,  # without a compiler, kernels of torch and NumPy do the same
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
)
