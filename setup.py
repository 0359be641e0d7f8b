"""Builds the Cython modules; everything else about the package stands in pyproject.toml.

Every ``minisgl_fast/**/*.pyx`` becomes one C++ extension with the directives below, so that no file
sets its own. Three environment variables are for developers:

    MINISGL_DEBUG=1      bounds and None checks, C asserts, no optimisation
    MINISGL_ANNOTATE=1   an HTML page beside each generated source, showing where Python is touched
    MINISGL_ONLY=sched   build only the modules whose path contains this word
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("MINISGL_DEBUG") == "1"
ONLY = os.environ.get("MINISGL_ONLY", "")

FLAGS = ["-O0", "-g", "-UNDEBUG"] if DEBUG else ["-O3", "-DNDEBUG"]
DIRECTIVES = {
    "language_level": 3,
    "embedsignature": True,
    "boundscheck": DEBUG,
    "wraparound": False,
    "initializedcheck": DEBUG,
    "nonecheck": DEBUG,
    "cdivision": True,
}


def extensions() -> list[Extension]:
    return [
        Extension(
            ".".join(path.with_suffix("").parts),
            [str(path)],
            language="c++",
            extra_compile_args=["-std=c++17", *FLAGS],
        )
        for path in sorted(Path("minisgl_fast").rglob("*.pyx"))
        if ONLY in str(path)
    ]


setup(
    ext_modules=cythonize(
        extensions(),
        compiler_directives=DIRECTIVES,
        build_dir="build/cython-debug" if DEBUG else "build/cython",
        annotate=os.environ.get("MINISGL_ANNOTATE") == "1",
    ),
    options={"build_ext": {"parallel": os.cpu_count()}},
)
