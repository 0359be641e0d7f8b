"""fastokens beside tokenizers: the same ids, or it is not used."""

import logging
import subprocess
import sys

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers

from minisgl_fast.text import fast_encoder as module
from minisgl_fast.text.fast_encoder import FastEncoder, corpus, fast_encoder
from minisgl_fast.text.tokenizer import MAX_FAST_INLINE_ASCII, MAX_INLINE_CHARACTERS, Tokenizer

pytest.importorskip("fastokens")


@pytest.fixture(scope="module")
def accelerated(qwen3_folder):
    tokenizer = Tokenizer.load(qwen3_folder)
    assert tokenizer.accelerate()
    yield tokenizer
    tokenizer.close()


def test_ids_are_those_of_tokenizers_on_text_it_was_not_checked_with(accelerated, qwen3):
    source = "\n\n".join(text[::-1] for text in corpus(["<|im_end|>"]))
    for start in range(0, len(source), 997):
        text = source[start : start + 1500]
        assert accelerated.encode(text) == qwen3.encode(text)
        assert accelerated.encode_prompt(text) == qwen3.encode_prompt(text)


def test_a_conversation_that_grows_keeps_its_ids(accelerated, qwen3):
    text = ""
    for turn in range(12):
        text += f"<|im_start|>user\nquestion {turn} 你好<|im_end|>\n<|im_start|>assistant\n"
        assert accelerated.encode(text) == qwen3.encode(text)


def test_half_a_surrogate_pair_is_refused_as_before(accelerated, qwen3):
    for tokenizer in (qwen3, accelerated):
        with pytest.raises(Exception, match="not valid Unicode") as error:
            tokenizer.encode("a\ud800b")
        assert error.value.param == "prompt"


def test_more_text_is_encoded_in_the_loop(accelerated, qwen3):
    assert not qwen3.is_short(MAX_INLINE_CHARACTERS + 1, True)
    assert accelerated.is_short(MAX_FAST_INLINE_ASCII, True)
    assert not accelerated.is_short(MAX_FAST_INLINE_ASCII, False)


def test_an_encoder_that_differs_is_not_used(qwen3_folder, monkeypatch, caplog):
    encode = FastEncoder.encode

    def wrong(self, text, add_special_tokens):
        ids = encode(self, text, add_special_tokens)
        return [*ids, 0] if "😀" in text else ids

    monkeypatch.setattr(FastEncoder, "encode", wrong)
    with caplog.at_level(logging.INFO, logger="minisgl_fast.text"):
        assert not Tokenizer.load(qwen3_folder).accelerate()
    assert "differs from tokenizers" in caplog.text


def test_a_tokenizer_that_it_cannot_take_stays_with_tokenizers(caplog):
    tokenizer = FastTokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with caplog.at_level(logging.INFO, logger="minisgl_fast.text"):
        assert fast_encoder(tokenizer) is None
    assert caplog.text


def test_without_the_package_nothing_changes(qwen3_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    tokenizer = Tokenizer.load(qwen3_folder)
    assert not tokenizer.accelerate()
    assert tokenizer.encode("Hi there") == [13048, 1052]


def test_a_text_that_it_gives_up_on_is_left_to_tokenizers(accelerated, qwen3, monkeypatch):
    class Panic(BaseException):
        pass

    def panics(texts, add_special_tokens):
        raise Panic

    class Broken:
        encode_batch_flat = staticmethod(panics)

    monkeypatch.setattr(accelerated._fast, "_tokenizer", Broken())
    assert accelerated.encode("Hi there") == qwen3.encode("Hi there")
    assert module.FastEncoder.encode(accelerated._fast, "x", False) is None


def test_a_process_may_end_while_it_is_checked(qwen3_folder):
    """The thread must not be in Rust when the interpreter ends, nor keep it from ending."""
    script = (
        "import itertools, sys, threading\n"
        "from minisgl_fast.text import fast_encoder\n"
        "from minisgl_fast.text.tokenizer import Tokenizer\n"
        "fast_encoder.corpus = lambda special: itertools.repeat('some words ' * 10)\n"
        "Tokenizer.load(sys.argv[1]).accelerate_later()\n"
        "(thread,) = [each for each in threading.enumerate() if each.name == 'accelerate']\n"
        "assert not thread.daemon\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, qwen3_folder], capture_output=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
