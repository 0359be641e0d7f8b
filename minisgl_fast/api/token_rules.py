"""``bad_words`` and ``allowed_token_ids`` of vLLM: from words and ids to what the engine is asked.

A word is banned as it stands and with a blank before it, as vLLM has it: the second only where the
tokenizer joins blank and word, so that both have as many tokens.

Rules: a word of one token is a bias; longer ones, and a list of what is allowed, are masks, which
every step of the request then takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from minisgl_fast.api.sampling_fields import SamplingFields
from minisgl_fast.errors import RequestError
from minisgl_fast.params import MAX_BANNED_TOKEN_IDS, MAX_STOP_CHARACTERS
from minisgl_fast.text.tokenizer import Tokenizer
from minisgl_fast.token_rules import TokenRules, bits_of

Word = tuple[int, ...]


def banned_words(words: Sequence[str], tokenizer: Tokenizer) -> list[Word]:
    """The tokens of ``bad_words``, each word in up to two forms. RequestError."""
    if len(words) > MAX_BANNED_TOKEN_IDS // 2:
        raise RequestError(
            f"bad_words must hold at most {MAX_BANNED_TOKEN_IDS // 2} words, got {len(words)}.",
            param="bad_words",
        )
    banned: dict[Word, None] = {}
    for index, word in enumerate(words):
        where = f"bad_words[{index}]"
        if not 0 < len(word) <= MAX_STOP_CHARACTERS or not word.strip():
            raise RequestError(
                f"{where} must have 1 to {MAX_STOP_CHARACTERS} characters, not blanks alone.",
                param=where,
            )
        bare, blank = (tuple(tokenizer.encode(text + word.lstrip())) for text in ("", " "))
        banned[bare] = None
        if blank[0] != bare[0] and len(blank) == len(bare):
            banned[blank] = None
    return list(banned)


def token_rules(
    body: SamplingFields, tokenizer: Tokenizer, vocab_size: int
) -> tuple[TokenRules, str] | None:
    """What must be a mask, and the field that asks for it; None if nothing must."""
    ids = body.allowed_token_ids
    if ids is None and not body.bad_words:
        return None
    words = [word for word in banned_words(body.bad_words or (), tokenizer) if len(word) > 1]
    if ids is None and not words:
        return None
    name = "bad_words" if ids is None else "allowed_token_ids"
    if ids is not None and not ids:
        raise RequestError("allowed_token_ids must not be empty.", param=name)
    if ids is not None and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise RequestError(f"{name} must hold token ids in [0, {vocab_size - 1}].", param=name)
    allowed = None if ids is None else bits_of(ids, vocab_size)
    return TokenRules(allowed, tuple(words)), name
