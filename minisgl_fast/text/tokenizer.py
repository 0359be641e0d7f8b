"""Tokenizer: text to token ids and back, through the ``tokenizers`` package.

Rules:
- Long text never blocks the event loop: ``encode_batch_fast`` gives up the GIL (``encode`` does
  not) and runs in a small pool of threads.
- Where fastokens is installed and agrees (fast_encoder.py), it makes the ids, and far more text
  counts as short.
- Text that cannot fit the context is refused by its length, before it is tokenized
  (``check_fits``).
- ``vocab_size`` counts the ids that have a text; a model's logits may have more columns.
"""

from __future__ import annotations

import asyncio
import json
import threading
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from minisgl_fast.errors import ContextLengthError, ModelError, RequestError
from minisgl_fast.model.gguf_metadata import read_metadata
from minisgl_fast.text.fast_encoder import FastEncoder, fast_encoder
from minisgl_fast.text.gguf_tokenizer import build_tokenizer
from minisgl_fast.text.stop_regex import StopProgram
from minisgl_fast.text.stream import TextStream, TokenTable
from minisgl_fast.text.tokenizer_config import TokenizerConfig, from_gguf, load_tokenizer_config
from minisgl_fast.text.window import WindowDecoder
from minisgl_fast.vocabulary import Vocabulary

MAX_INLINE_CHARACTERS = 2000  # about 1 ms
# With fastokens: about 0.1 ms, or 0.25 ms of the worst text.
MAX_FAST_INLINE_ASCII = 16_000
MAX_FAST_INLINE_CHARACTERS = 1_500
NUM_THREADS = 2
# Turn ends that some models' files forget to name as eos.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
# NFC shortens UTF-8 most where U+1FBE U+0308 U+0301, seven bytes, become U+0390, two.
MAX_NFC_SHRINK = 4


class Tokenizer:
    """One model's tokenizer; all methods may be called from any thread.

    vocab_size: one more than the highest id that has a text.
    eos_ids: ids that end a generation by what the tokenizer's files say; bos_id: id or None.
    """

    def __init__(self, tokenizer: FastTokenizer, config: TokenizerConfig) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._fast: FastEncoder | None = None
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="encode")
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self.table = _token_table(tokenizer, self._byte_level)
        self.vocab_size = len(self.table)
        self.special_tokens = config.special_tokens
        self.bos_id = self._id_of(config.special_tokens.get("bos_token"))
        ends = (self._id_of(text) for text in (*config.end_tokens, *TURN_ENDS))
        self.eos_ids = frozenset(token for token in ends if token is not None)
        self._shrink, self._dropped = _max_shrink(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a folder with tokenizer.json or from a .gguf file. ModelError if there is none."""
        path = Path(path)
        if path.suffix == ".gguf":
            metadata = read_metadata(path)
            return cls(build_tokenizer(metadata), from_gguf(metadata))
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ModelError(f"There is no tokenizer.json in {path}.")
        try:
            tokenizer = FastTokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"Cannot read {file}: {error}.") from error
        return cls(tokenizer, load_tokenizer_config(path))

    def accelerate(self) -> bool:
        """Encode with fastokens from now on, if it is there and agrees; takes seconds. Returns
        whether it does."""
        self._fast = fast_encoder(self._tokenizer)
        return self._fast is not None

    def accelerate_later(self) -> None:
        """``accelerate`` in a thread of its own, which gives up when the process ends.

        No daemon: the interpreter's end would catch one inside Rust, and that aborts the process.
        """
        threading.Thread(target=self.accelerate, name="accelerate").start()

    def close(self) -> None:
        """End the threads once they are idle; texts that wait for one are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # Text to ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text whose special tokens are written in it, as templates do."""
        return list(self.encode_array(text))

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a raw prompt: with what the tokenizer puts around it, such as bos."""
        return list(self.encode_array(text, add_special_tokens=True))

    def encode_array(self, text: str, *, add_special_tokens: bool = False) -> array[int]:
        """``encode`` (or ``encode_prompt``) without an object per id, as the engine gets them."""
        if self._fast is not None:
            ids = self._fast.encode(text, add_special_tokens)
            if ids is not None:
                return ids
        try:
            encoded = self._tokenizer.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        except TypeError as error:  # a lone surrogate has no UTF-8
            raise RequestError("The text is not valid Unicode.", param="prompt") from error
        return array("i", encoded[0].ids)

    async def encode_async(self, text: str, *, add_special_tokens: bool = False) -> array[int]:
        """``encode_array`` that leaves the event loop free if text is long."""
        encode = partial(self.encode_array, text, add_special_tokens=add_special_tokens)
        if self.is_short(len(text), text.isascii()):
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._pool, encode)

    def is_short(self, num_characters: int, is_ascii: bool) -> bool:
        """Whether text of this length is encoded so fast that the event loop can wait for it."""
        if self._fast is None:
            return num_characters <= MAX_INLINE_CHARACTERS
        return num_characters <= (MAX_FAST_INLINE_ASCII if is_ascii else MAX_FAST_INLINE_CHARACTERS)

    def min_num_tokens(self, text: str) -> int:
        """A number of tokens that no encoding of the text can go below, without encoding it.

        The length in bytes over that of the longest token; 0 where a tokenizer may drop text.
        """
        if self._shrink == 0:
            return 0
        is_ascii = text.isascii()
        shrink = 1 if is_ascii else self._shrink  # NFC leaves ASCII as it is
        num_bytes = len(text)
        if not is_ascii or self._dropped:
            data = text.encode("utf-8", "replace")
            num_bytes = len(data.translate(None, delete=self._dropped))
        return -(-num_bytes // (self.table.max_token_bytes * shrink))

    def check_fits(self, text: str, max_model_len: int, *, param: str) -> None:
        """ContextLengthError if the text is surely as long as the context or longer."""
        if 4 * len(text) < max_model_len:  # no character has more bytes, no byte more tokens
            return
        num_tokens = self.min_num_tokens(text)
        if num_tokens >= max_model_len:
            raise ContextLengthError(
                f"This model's maximum context length is {max_model_len} tokens. "
                f"However, your {param} has at least {num_tokens} tokens.",
                param=param,
            )

    # Ids to text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of all ids at once; ids without a text count as empty."""
        if any(not 0 <= token < 2**31 for token in ids):
            raise RequestError("Token ids must be in [0, 2^31).", param="tokens")
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def puts_spaces(self) -> bool:
        """Whether its decoder puts blanks between special tokens that follow each other."""
        special = [token for token in range(self.vocab_size) if self.is_special(token)][:2]
        apart = "".join(self.decode([token], skip_special_tokens=False) for token in special)
        return self.decode(special, skip_special_tokens=False) != apart

    def stream(
        self,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        patterns: StopProgram | None = None,
    ) -> TextStream:
        """Incremental decoding of one generation. RequestError(param="stop") if a stop is bad."""
        window = None if self._byte_level else WindowDecoder(self._tokenizer)
        texts = [stop.encode("utf-8", "surrogatepass") for stop in stops]
        return TextStream(
            self.table, texts, include_stop, skip_special_tokens, window, min_tokens, patterns
        )

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to the text (a blank for SentencePiece's low line, too)."""
        return self.table[token]

    def vocabulary(self) -> Vocabulary:
        """Every token, for who has no tokenizer."""
        ids = range(self.vocab_size)
        return Vocabulary([self.table[i] for i in ids], frozenset(filter(self.is_special, ids)))

    def is_special(self, token: int) -> bool:
        return self.table.is_special(token)

    def _id_of(self, text: str | None) -> int | None:
        return None if text is None else self._tokenizer.token_to_id(text)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's reversible map: printable Latin-1 stands for itself, other bytes for U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF = _byte_of_character()


def _token_table(tokenizer: FastTokenizer, byte_level: bool) -> TokenTable:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    bytes_of = _byte_level_bytes if byte_level else _sentencepiece_bytes
    tokens = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for text, index in vocabulary.items():
        tokens[index] = bytes_of(text)
    added = tokenizer.get_added_tokens_decoder()
    return TokenTable(tokens, [index for index, token in added.items() if token.special])


def _byte_level_bytes(text: str) -> bytes:
    """As the ByteLevel decoder: a token with any character outside the map is its own text."""
    try:
        return bytes([_BYTE_OF[character] for character in text])
    except KeyError:
        return text.encode()


def _sentencepiece_bytes(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes.fromhex(text[3:5])
        except ValueError:
            pass
    return text.replace("\u2581", " ").encode()


def _max_shrink(tokenizer: FastTokenizer) -> tuple[int, bytes]:
    """How much longer a text can be than its tokens, as a factor of bytes (0: nobody knows), not
    counting bytes that the tokenizer drops because they are no token (SmolLM2 lacks U+0004).

    Known for byte-level BPE where no added token swallows blanks around it, without a normalizer
    or, if it drops no byte, with NFC.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    if (
        not isinstance(tokenizer.model, models.BPE)
        or not isinstance(tokenizer.decoder, decoders.ByteLevel)
        or not _keeps_every_byte(_state(tokenizer.pre_tokenizer))
        or any(token.lstrip or token.rstrip for token in added)
    ):
        return 0, b""
    dropped = bytes(
        byte for character, byte in _BYTE_OF.items() if tokenizer.token_to_id(character) is None
    )
    normalizer = _state(tokenizer.normalizer)
    if normalizer in (None, {"type": "Sequence", "normalizers": []}):
        return 1, dropped
    return (MAX_NFC_SHRINK, b"") if normalizer == {"type": "NFC"} and not dropped else (0, b"")


def _keeps_every_byte(pre_tokenizer: Any) -> bool:
    if pre_tokenizer is None:
        return False
    if pre_tokenizer["type"] == "Sequence":
        return any(part["type"] == "ByteLevel" for part in pre_tokenizer["pretokenizers"]) and all(
            _keeps_every_byte(part) for part in pre_tokenizer["pretokenizers"]
        )
    if pre_tokenizer["type"] == "Split":
        return bool(pre_tokenizer["behavior"] != "Removed")
    return pre_tokenizer["type"] in ("ByteLevel", "Digits")


def _state(component: Any) -> Any:
    return None if component is None else json.loads(component.__getstate__())
