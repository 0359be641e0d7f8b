"""``bench offline``, ``bench latency`` and ``bench kernels``: fronts of the scripts in ``tools/``.

An installed package carries that folder as ``minisgl_fast.tools``; a checkout has it beside the
package. They need torch, and ``kernels`` a GPU; nothing else of the load tester does.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from minisgl_fast.errors import ConfigError

SCRIPTS = {
    "offline": "bench_offline.py",
    "latency": "bench_latency.py",
    "kernels": "bench_kernels.py",
}


def tools_folder() -> Path:
    """Where the scripts are. ConfigError if this installation has none."""
    spec = importlib.util.find_spec("minisgl_fast.tools")
    folders = [Path(path) for path in spec.submodule_search_locations or ()] if spec else []
    folders.append(Path(__file__).parents[2] / "tools")
    for folder in folders:
        if (folder / SCRIPTS["offline"]).is_file():
            return folder
    raise ConfigError("this installation lacks the scripts of tools/")


def run_tool(name: str, arguments: Sequence[str]) -> int:
    """Run a script as ``python tools/SCRIPT ARGUMENTS`` would; its exit code.

    ConfigError if it ends with a message, or lacks a package.
    """
    script = tools_folder() / SCRIPTS[name]
    argv, path = sys.argv, sys.path
    sys.argv = [f"minisgl-fast bench {name}", *arguments]  # which its help shows
    sys.path = [str(script.parent), *path]
    try:
        code = _load(script).main()
    except SystemExit as end:
        if isinstance(end.code, str):
            raise ConfigError(f"bench {name}: {end.code}") from end
        return end.code if isinstance(end.code, int) else 0
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "cupy"):
            raise
        raise ConfigError(f"bench {name} needs {error.name}, which is not installed") from error
    finally:
        sys.argv, sys.path = argv, path
    return code if isinstance(code, int) else 0


def _load(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    spec.loader.exec_module(module)
    return module
