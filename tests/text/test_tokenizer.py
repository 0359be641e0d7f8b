"""Tokenizer: the real Qwen3 files, the one rebuilt from SmolLM2's GGUF, encoding off the loop."""

import asyncio
import hashlib
import json
import random
import unicodedata

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from minisgl_fast.errors import ContextLengthError, ModelError, RequestError
from minisgl_fast.model.gguf_metadata import read_metadata
from minisgl_fast.text.gguf_tokenizer import build_tokenizer
from minisgl_fast.text.tokenizer import MAX_INLINE_CHARACTERS, MAX_NFC_SHRINK, Tokenizer
from minisgl_fast.text.tokenizer_config import TokenizerConfig, from_gguf

NO_CONFIG = TokenizerConfig({}, (), {})
TEXTS = {
    "Hello, world!": [9707, 11, 1879, 0],
    "What is the capital of France?": [3838, 374, 279, 6722, 315, 9625, 30],
    "你好，世界": [108386, 3837, 99489],
    "12345": [16, 17, 18, 19, 20],
    "<|im_start|>user\nHi<|im_end|>\n": [151644, 872, 198, 13048, 151645, 198],
}


def test_qwen3_encodes_as_published(qwen3):
    assert {text: qwen3.encode(text) for text in TEXTS} == TEXTS
    assert {text: qwen3.encode_prompt(text) for text in TEXTS} == TEXTS  # it puts nothing around


def test_qwen3_knows_its_ids(qwen3):
    assert qwen3.vocab_size == 151669
    assert qwen3.eos_ids == {151645}
    assert qwen3.bos_id is None
    assert qwen3.is_special(151643)
    assert not qwen3.is_special(151667)  # <think> stays in the text
    assert qwen3.token_bytes(151667) == b"<think>"
    assert qwen3.token_bytes(151669) == b""


def test_decode_returns_the_text_and_can_keep_special_tokens(qwen3):
    ids = qwen3.encode("<|im_start|>naïve 😀<|im_end|>")
    assert qwen3.decode(ids) == "naïve 😀"
    assert qwen3.decode(ids, skip_special_tokens=False) == "<|im_start|>naïve 😀<|im_end|>"
    assert qwen3.decode([10**6]) == ""


@pytest.mark.parametrize("token", [-1, 2**31])
def test_decode_refuses_what_is_no_id(qwen3, token):
    with pytest.raises(RequestError) as caught:
        qwen3.decode([1, token])
    assert caught.value.param == "tokens"


def test_text_that_is_no_unicode_is_the_clients_fault(qwen3):
    with pytest.raises(RequestError):
        qwen3.encode("a\ud800")
    with pytest.raises(RequestError):
        qwen3.stream(["\ud800"])


def test_truncation_and_padding_in_the_file_are_ignored(qwen3_folder):
    fast = FastTokenizer.from_file(str(qwen3_folder / "tokenizer.json"))
    fast.enable_truncation(max_length=2)
    fast.enable_padding(length=9)
    assert Tokenizer(fast, NO_CONFIG).encode("12345") == [16, 17, 18, 19, 20]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelError, match="Cannot read"):
        Tokenizer.load(tmp_path)


# Off the loop


def test_short_text_is_encoded_without_leaving_the_loop(qwen3):
    async def run():
        events = []
        asyncio.get_running_loop().call_soon(events.append, "loop")
        events.append((await qwen3.encode_async("12345")).tolist())
        return events

    assert asyncio.run(run()) == [[16, 17, 18, 19, 20], "loop"]


def test_long_text_is_encoded_while_the_loop_goes_on(qwen3):
    text = "The quick brown fox, 1234 times. " * 20000
    expected = qwen3.encode(text)
    assert len(text) > MAX_INLINE_CHARACTERS

    async def run():
        events = []

        async def tick():
            while True:
                await asyncio.sleep(0.001)
                events.append("tick")

        ticking = asyncio.create_task(tick())
        ids = (await qwen3.encode_async(text)).tolist()
        events.append("encoded")
        ticking.cancel()
        return ids, events

    ids, events = asyncio.run(run())
    assert ids == expected
    # Encoding takes a good part of a second. With the GIL held the loop would tick once or twice.
    assert events.index("encoded") > 20


def test_many_texts_at_once_come_back_to_their_askers(qwen3):
    texts = [f"{i} " * (10 + 400 * (i % 5)) for i in range(40)]

    async def run():
        return await asyncio.gather(*map(qwen3.encode_async, texts))

    assert [ids.tolist() for ids in asyncio.run(run())] == [qwen3.encode(text) for text in texts]


# The lower bound


def test_no_text_has_fewer_tokens_than_the_bound(qwen3):
    rng = random.Random(3)
    alphabets = [
        " ", "ab \n", "한각", "e\u0301", "\u1112\u1161\u11ab", "\u212a", "😀", "\x04é",
        "\u1fbe\u0308\u0301",
    ]  # fmt: skip
    longest = max(range(qwen3.vocab_size), key=lambda token: len(qwen3.token_bytes(token)))
    texts = ["", qwen3.token_bytes(longest).decode() * 50, "\u1fbe\u0308\u0301" * 500]
    texts += ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(900))) for _ in range(200)]
    for text in texts:
        assert qwen3.min_num_tokens(text) <= len(qwen3.encode(text))
    assert qwen3.min_num_tokens("a" * 12800) == 100  # its longest token has 128 bytes
    assert qwen3.min_num_tokens("é" * 6400) == 25  # NFC might shorten it to a quarter


def test_nfc_never_shortens_more_than_assumed():
    def parts(text):
        return unicodedata.normalize("NFD", text)

    changed = [chr(code) for code in range(0x80, 0x110000) if not 0xD800 <= code < 0xE000]
    changed = [character for character in changed if parts(character) != character]
    sizes = {}  # of the longest single character that stands for a part
    for character in changed:
        if len(parts(character)) == 1:
            part = parts(character)
            sizes[part] = max(sizes.get(part, 0), len(character.encode()))
    outputs = {unicodedata.normalize("NFC", character) for character in changed}

    def longest_source(text):
        return sum(max(sizes.get(part, 0), len(part.encode())) for part in parts(text))

    for character in changed:
        assert len(character.encode()) <= longest_source(character)
    for text in outputs:
        assert longest_source(text) <= MAX_NFC_SHRINK * len(text.encode())
    assert unicodedata.normalize("NFC", "\u1fbe\u0308\u0301") == "\u0390"


def test_text_too_long_for_the_context_is_refused_unread(qwen3, monkeypatch):
    monkeypatch.setattr(qwen3, "encode_array", None)
    qwen3.check_fits("a" * 128 * 99, 100, param="prompt")
    with pytest.raises(ContextLengthError, match="at least 100 tokens") as caught:
        qwen3.check_fits("a" * (128 * 99 + 1), 100, param="prompt")
    assert caught.value.param == "prompt"


def byte_level(**changes):
    fast = FastTokenizer(
        models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, [])
    )
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = ByteLevel()
    for name, value in changes.items():
        setattr(fast, name, value)
    return fast


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({}, 10),
        ({"normalizer": normalizers.NFC()}, 10),
        ({"normalizer": normalizers.Strip()}, 0),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, 0),
        ({"pre_tokenizer": pre_tokenizers.Split("x", "removed")}, 0),
    ],
)
def test_a_tokenizer_that_may_drop_text_has_no_bound(changes, bound):
    assert Tokenizer(byte_level(**changes), NO_CONFIG).min_num_tokens("x" * 10) == bound


def test_a_token_that_swallows_blanks_leaves_no_bound():
    fast = byte_level()
    fast.add_tokens([AddedToken("<x>", rstrip=True)])
    tokenizer = Tokenizer(fast, NO_CONFIG)
    assert len(tokenizer.encode("<x>" + " " * 100)) == 1
    assert tokenizer.min_num_tokens("<x>" + " " * 100) == 0


# From GGUF


@pytest.mark.demo
def test_smollm2_rebuilt_from_gguf_is_the_published_file(smollm2_gguf):
    parts = json.loads(build_tokenizer(read_metadata(smollm2_gguf)).to_str())
    parts["model"]["merges"] = [" ".join(merge) for merge in parts["model"]["merges"]]
    written = json.dumps(parts, indent=2, ensure_ascii=False).encode()
    assert hashlib.sha256(written).hexdigest() == (
        "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"
    )


@pytest.mark.demo
def test_smollm2_from_gguf_knows_its_ids(smollm2):
    assert smollm2.encode("  42") == [256, 36, 34]
    assert smollm2.encode_prompt("  42") == [256, 36, 34]
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_ids) == (49152, 1, {2})
    assert [smollm2.is_special(token) for token in (0, 16, 17)] == [True, True, False]


@pytest.mark.demo
def test_bytes_that_smollm2_drops_do_not_count(smollm2):
    assert smollm2.encode("\x04" * 1000) == []
    assert smollm2.min_num_tokens("\x04" * 1000) == 0
    assert smollm2.min_num_tokens("a" * 1000) > 0


def gguf_metadata(qwen3_folder):
    """What llama.cpp's converter writes for the tokenizer of qwen3_folder."""
    parts = json.loads((qwen3_folder / "tokenizer.json").read_bytes())
    tokens = dict(parts["model"]["vocab"])
    types = dict.fromkeys(tokens.values(), 1)
    for added in parts["added_tokens"]:
        tokens[added["content"]] = added["id"]
        types[added["id"]] = 3 if added["special"] else 4
    for unused in range(len(tokens), 151936):
        tokens[f"[PAD{unused}]"] = unused
        types[unused] = 5
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": sorted(tokens, key=tokens.__getitem__),
        "tokenizer.ggml.token_type": [types[i] for i in range(len(types))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in parts["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 151645,
        "tokenizer.ggml.bos_token_id": 151643,
        "tokenizer.ggml.add_bos_token": False,
    }


def test_qwen3_rebuilt_from_gguf_metadata_encodes_as_its_own_file(qwen3, qwen3_folder):
    metadata = gguf_metadata(qwen3_folder)
    rebuilt = Tokenizer(build_tokenizer(metadata), from_gguf(metadata))
    assert rebuilt.vocab_size == qwen3.vocab_size
    assert rebuilt.eos_ids == {151643, 151645}  # as generation_config.json has it
    assert (rebuilt.bos_id, rebuilt.encode_prompt("12")) == (151643, [16, 17])
    rng = random.Random(11)
    texts = [*TEXTS, "  42  ½\r\n\t e\u0301 it's I'LL <think>\n", "<|fim_prefix|>x<tool_call>"]
    for _ in range(200):
        codes = rng.choices([*range(0x20, 0x250), *range(0x4E00, 0x4F00), 10, 13, 0x1F600], k=30)
        texts.append("".join(map(chr, codes)))
    for text in texts:
        assert rebuilt.encode(text) == qwen3.encode(text)
        ids = qwen3.encode(text)
        assert rebuilt.decode(ids) == qwen3.decode(ids)


def test_llama3_rebuilt_from_gguf_metadata_adds_bos_and_splits_by_threes():
    tokens = [*pre_tokenizers.ByteLevel.alphabet(), "12", "123", "<s>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": ["1 2"],
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
    }
    tokenizer = Tokenizer(build_tokenizer(metadata), NO_CONFIG)
    assert tokenizer.encode("12312") == [257, 256]  # whole words need no merges there
    assert tokenizer.encode_prompt("12312") == [258, 257, 256]
    assert [tokenizer.decode([token]) for token in tokenizer.encode("<s> a")] == ["", " ", "a"]
    metadata["tokenizer.ggml.add_bos_token"] = False
    assert Tokenizer(build_tokenizer(metadata), NO_CONFIG).encode_prompt("123") == [257]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "'llama'"),
        ({"pre": "gpt-4o"}, "'gpt-4o'"),
        ({"merges": None}, "merges"),
        ({"merges": ["a nonsense-token"]}, "merges"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "same text"),
    ],
)
def test_gguf_metadata_that_cannot_be_rebuilt_is_refused(changes, message):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
    } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    with pytest.raises(ModelError, match=message):
        build_tokenizer(metadata)


@pytest.mark.parametrize("spaced", [False, True])
def test_blanks_between_special_tokens_are_those_of_transformers(tmp_path, spaced):
    fast = FastTokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    if not spaced:
        fast.decoder = decoders.Fuse()
    fast.add_special_tokens(["<s>", "</s>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    ids = [3, 4, 0, 3]
    for asked in (False, True):  # no fast tokenizer of theirs looks at the flag
        theirs = PreTrainedTokenizerFast(tokenizer_object=fast).decode(
            ids, skip_special_tokens=False, spaces_between_special_tokens=asked
        )
        assert tokenizer.decode(ids, skip_special_tokens=False) == theirs
    assert theirs == ("<s> </s> a <s>" if spaced else "<s></s>a<s>")
    assert tokenizer.puts_spaces is spaced
    tokenizer.close()
