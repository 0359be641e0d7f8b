"""What a wheel carries: everything that the installed command needs."""

from pathlib import Path

import pytest

setuptools = pytest.importorskip("setuptools")

ROOT = Path(__file__).parents[1]
KERNELS = {path.name for pattern in ("*.cu", "*.cuh") for path in (ROOT / "kernels").glob(pattern)}
FRONT = {path.name for path in (ROOT / "tools" / "front").iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def packed():
    """The files that setuptools would put into a wheel, but for compiled ones, by package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        distribution = setuptools.Distribution({"script_name": "setup.py"})
        distribution.parse_config_files()
        command = distribution.get_command_obj("build_py")
        command.ensure_finalized()
        found = {package: set() for package in distribution.packages}
        for package, _, path in command.find_all_modules():
            found[package].add(Path(path).name)
        for package, folder, _, names in command.data_files:
            for name in names:
                assert (Path(folder) / name).is_file()
            found[package].update(names)
        yield found


def test_every_package_is_packed(packed):
    folders = {path.parent for path in (ROOT / "minisgl_fast").rglob("*.py")}
    folders = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(packed) == folders | {"minisgl_fast.kernels", "minisgl_fast.tools"}


def test_modules_stubs_and_declarations_are_packed(packed):
    for package, names in packed.items():
        if package.rpartition(".")[2] in ("kernels", "tools"):
            continue
        folder = ROOT.joinpath(*package.split("."))
        for pattern in ("*.py", "*.pyi", "*.pxd", "py.typed"):
            assert {path.name for path in folder.glob(pattern)} <= names, package
    assert "py.typed" in packed["minisgl_fast"]


def test_kernels_are_packed_as_source(packed):
    assert KERNELS
    assert packed["minisgl_fast.kernels"] >= KERNELS


def test_the_scripts_behind_bench_are_packed_with_what_they_import(packed):
    scripts = {path.name for path in (ROOT / "tools").glob("*.py")}
    assert {"bench_offline.py", "bench_latency.py", "bench_kernels.py"} <= scripts
    assert scripts | {f"front/{name}" for name in FRONT} <= packed["minisgl_fast.tools"]
