"""``bench offline`` and its like: the scripts of tools/, run from the command line."""

import sys

import pytest
import torch

from minisgl_fast.bench import tools
from minisgl_fast.bench.cli import main
from minisgl_fast.bench.tools import SCRIPTS, run_tool, tools_folder
from minisgl_fast.errors import ConfigError


def test_every_script_is_there():
    assert all((tools_folder() / script).is_file() for script in SCRIPTS.values())


@pytest.mark.parametrize("name", ["offline", "latency"])  # the second imports the first
def test_the_help_of_a_script_names_the_command(name, capsys):
    assert main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: minisgl-fast bench {name} [") and "--dummy-weight" in said


def test_a_usage_error_has_its_exit_code(capsys):
    assert main(["offline"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: minisgl-fast bench offline [") and "--model" in said


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Writes a script that stands in for bench_offline.py."""
    monkeypatch.delitem(sys.modules, "bench_offline", raising=False)

    def write(text):
        (tmp_path / SCRIPTS["offline"]).write_text(f"def main():\n    {text}\n")
        monkeypatch.setattr(tools, "tools_folder", lambda: tmp_path)

    return write


@pytest.mark.parametrize(
    "text, code",
    [
        ("pass", 0),
        ("return 0", 0),
        ("return 4", 4),
        ("raise SystemExit", 0),
        ("raise SystemExit(3)", 3),
    ],
)
def test_exit_codes_are_the_scripts(script, text, code):
    script(text)
    argv, path = sys.argv, sys.path
    assert run_tool("offline", []) == code
    assert (sys.argv, sys.path) == (argv, path)


def test_the_message_of_a_script_is_the_error(script):
    script("raise SystemExit('needs more')")
    with pytest.raises(ConfigError, match="bench offline: needs more"):
        run_tool("offline", [])


def test_a_model_with_too_few_ids_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="ids up to 10000"):
        run_tool("latency", ["--model", str(tiny_model), "--device", "cpu"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_without_a_gpu_are_refused():
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        run_tool("kernels", [])


def test_what_is_not_installed_is_named(script):
    script("raise ModuleNotFoundError('No module', name='torch')")
    with pytest.raises(ConfigError, match="bench offline needs torch"):
        run_tool("offline", [])
    script("import no_such_module_of_ours")
    with pytest.raises(ModuleNotFoundError):
        run_tool("offline", [])


def test_an_installation_without_them_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(tools, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    monkeypatch.setattr(tools.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="lacks the scripts"):
        tools_folder()
