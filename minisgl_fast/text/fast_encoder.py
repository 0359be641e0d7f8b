"""FastEncoder: fastokens, an optional package, in place of ``tokenizers`` for text to ids.

It is some fifty times faster (20 us for a thousand tokens) and young, so it is used only for a
tokenizer on which both agree, id for id, on a corpus that holds what tokenizers trip over.

Rules: whatever goes wrong here, at load or with one text, leaves ``tokenizers`` to do the work;
``encode`` gives up the GIL.
"""

from __future__ import annotations

import logging
import random
import struct
import threading
import unicodedata
from array import array
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

log = logging.getLogger("minisgl_fast.text")

# Conversations come again with one turn more: ids of the pieces between special tokens are kept.
SEGMENT_CACHE_BYTES = 16 << 20
NUM_RANDOM_TEXTS = 300
_INT_IS_32_BITS = array("i").itemsize == 4


class FastEncoder:
    """One tokenizer's fastokens; may be called from any thread."""

    def __init__(self, json_text: str) -> None:
        """``json_text``: of a tokenizer.json. Any exception if it cannot be taken."""
        from fastokens import _native

        self._tokenizer: Any = _native.Tokenizer.from_json_str(json_text)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.enable_segment_cache(SEGMENT_CACHE_BYTES)

    def encode(self, text: str, add_special_tokens: bool) -> array[int] | None:
        """The ids, or None where it gives up (half of a surrogate pair, a limit of a regex)."""
        try:
            data, _ = self._tokenizer.encode_batch_flat([text], add_special_tokens)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of Rust is no Exception
            return None
        ids = array("i")
        ids.frombytes(data)
        return ids


def fast_encoder(oracle: FastTokenizer) -> FastEncoder | None:
    """A FastEncoder that gives the same ids as ``oracle``; None if there is none, or if the
    process ends meanwhile."""
    if not _INT_IS_32_BITS or struct.pack("=I", 1) != struct.pack("<I", 1):
        return None
    try:
        encoder = FastEncoder(oracle.to_str())
    except ImportError:
        return None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        log.info("fastokens cannot take this tokenizer: %s", error)
        return None
    special = [token.content for token in oracle.get_added_tokens_decoder().values()]
    main_thread = threading.main_thread()
    for text in corpus(special):
        if not main_thread.is_alive():
            return None
        for add_special_tokens in (False, True):
            expected = oracle.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            if encoder.encode(text, add_special_tokens) != array("i", expected[0].ids):
                log.info("fastokens is not used: it differs from tokenizers on %r", text[:80])
                return None
    log.info("text is tokenized with fastokens")
    return encoder


def corpus(special: list[str]) -> Iterator[str]:
    """Texts that show how tokenizers differ; ``special``: added tokens to put among them."""
    yield from _TEXTS
    yield "\n".join(_TEXTS) * 2
    yield "".join(_TEXTS)
    for token in special[:64]:
        yield from (
            token,
            f" {token} ",
            f"a{token}b{token}",
            f"\n{token}\n\n",
            token[:-1],
            token * 3,
        )
        yield token.upper() + token.lower()
    # Blocks of Unicode by themselves, then everything mixed.
    for start in range(0x20, 0x3000, 64):
        yield "".join(map(chr, range(start, start + 64)))
    rng = random.Random(1)
    for _ in range(NUM_RANDOM_TEXTS):
        pieces = []
        for _ in range(rng.randrange(1, 24)):
            low, high = rng.choice(_RANGES)
            letters = (chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 8)))
            pieces.append("".join(letters))
            pieces.append(rng.choice(("", "", " ", "  ", "\n", "\t", "\r\n", *special[:8])))
        text = "".join(pieces)
        yield text
        yield unicodedata.normalize("NFD", text)


_RANGES = (
    (0x20, 0x7F), (0x20, 0x7F), (0x30, 0x3A), (0x00, 0x20), (0x7F, 0x100), (0x100, 0x250),
    (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE80), (0x10A0, 0x1200),
    (0x1E00, 0x2070), (0x2070, 0x2C00), (0x3000, 0x3130), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4),
    (0xE000, 0xE100), (0xFB00, 0x10000), (0x10000, 0x10400), (0x1D400, 0x1D800),
    (0x1F300, 0x1FB00), (0x20000, 0x2A000), (0xE0000, 0xE0200),
)  # fmt: skip

_TEXTS = (
    "",
    " ",
    "\n",
    "The quick brown fox jumps over the lazy dog. It's 12:30, isn't it? I'LL say WE'VE won.",
    "  leading, trailing and   inner   blanks  ",
    "tabs\tand\t\ttabs, ends\n\nof\r\nlines\r and\x0bothers\x0c \n \n  \n\t\n",
    '    def f(x: int) -> str:\n        return f"{x!r:>{10}}"  # hash\n\n\n\nclass A(B):\n\tpass\n',
    '{"key": [1, 2.5e-10, null, true], "nested": {"a\\u00e9": "\\n"}}\n<div class="a">&amp;</div>',
    "0 00 000 0000 12345678901234567890 3.14159 1,000,000 0x7fFF ½ ² ③ Ⅳ ٣ ३",
    "http://example.org/a/b?c=d&e=%20f#g user.name+tag@example.co.uk C:\\dir\\file.txt",
    "naïve café Ångström Straße İstanbul ſ ﬁ ﬀ Ǆ Σίσυφος ς ΑΒΓ",
    "e\u0301 a\u0308 n\u0303 \u1e9b\u0323 A\u030a \u1fbe\u0308\u0301 \u0958 \uac00 \u1112\u1161",
    "快速的棕色狐狸跳过了懒狗。你好，世界！「こんにちは」、カタカナ ｶﾀｶﾅ ﾊﾟ 안녕하세요 한글",
    "Привет, как дела? Ёлка Їжак مرحبا بالعالم שָׁלוֹם नमस्ते दुनिया สวัสดีชาวโลก ຂອບໃຈ გამარჯობა",
    "😀😃 👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 ❤️ ☃ ⁉️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 \U0001fae0",
    "zero\u200bwidth\u200d joiner\ufeffbom\u00adsoft\u2028line\u2029par\u0085nel\u00a0no\u3000wide",
    "control \x00\x01\x07\x1b\x7f\x80\x9f end",
    "a" * 600,
    "ab" * 300 + " " * 300 + "!" * 300 + "\n" * 60 + "1" * 300 + "é" * 100 + "中" * 100,
    "'s 's's 'S 'T 'RE've'll ''d '' ‘s ’s ’t don’t 'ſ 'K",
    "SHOUTING camelCase snake_case kebab-case XMLHttpRequest iPhone15Pro v2.0.1-rc3",
    "…—–“”„‚«»¿¡§¶†‡•°±×÷≠≤≥∞√∑∫€£¥₹₿™®©",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|></s><s>[INST] [/INST]<|eot_id|><think>\n</think>",
)
