"""The one part that is compiled; the rest is said in pyproject.toml."""

import sys

from setuptools import Extension, setup

on_linux = sys.platform.startswith("linux")

setup(
    ext_modules=[
        Extension(
            "lightning_lance.tensors._native",
            ["lightning_lance/tensors/_native.c"],
            extra_compile_args=["-O3", "-fopenmp"] if on_linux else [],
            # Torch's own OpenMP, which is loaded before, is the one that is found.
            extra_link_args=["-fopenmp"] if on_linux else [],
            py_limited_api=True,
            optional=True,  # without a compiler, torch's kernels and NumPy's do the same
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
