"""What prompts of a wanted length are made of: units of one token each.

Three vocabularies, by what is known of the server's tokenizer:
- its files are here (``TextCounter``): words that are one token each, checked by encoding many of
  them together, so a text of n units has exactly n tokens;
- nothing, prompts may be token ids (``token_ids``): exactly n tokens;
- nothing, prompts are text (``common_words``): about one token a word, as common English words
  with the space before them are in the vocabularies of today's models. The server's usage tells
  the true number.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHARACTERS_PER_TOKEN = 4  # of English text, where no tokenizer tells
MIN_UNITS = 16
CHECKED_UNITS = 2000
# Special and control tokens stand at either end of most vocabularies.
LOWEST_ID_SHARE = 30

_TEXT = """time year people way day man thing woman life child world school state family student
group country problem hand part place case week company system program question work government
number night point home water room mother area money story fact month lot right study book eye job
word business issue side kind head house service friend father power hour game line end member law
car city community name president team minute idea kid body information back parent face others
level office door health person art war history party result change morning reason research girl guy
moment air teacher force education foot boy age policy music market sense nation plan college
interest death experience effect use class control field development role effort rate heart drug
show leader light voice wife police mind price report decision son view relationship town road arm
difference value building action season society tax director position player record paper space
ground form event matter center couple site project activity star table need court oil situation
cost industry figure street image phone data picture practice piece land product doctor wall patient
worker news test movie north love support technology step baby computer type attention film tree
source organization hair look window culture chance brother energy period course summer plant
opportunity term letter condition choice rule daughter south husband floor campaign material
population call economy hospital church risk fire future defense security bank west sport board
subject officer rest behavior performance top goal order author agency nature color store
sound movement page race concern series language response animal factor decade article east
artist scene stock career treatment approach size fund media sign thought list individual quality
pressure answer resource meeting disease success cup amount ability staff character growth loss
degree attack region television box training trade deal election feeling standard bill message
analysis benefit forward lawyer section glass skill sister professor operation stage
authority design sort knowledge station strategy truth song example environment leg dark
understanding cell reading green red blue black white small large long short early late high low"""
WORDS = _TEXT.split()


@dataclass(frozen=True)
class Vocabulary:
    """Units of one token each: words with the space before them, or token ids.

    exact: a prompt of n units has n tokens, before what a chat template adds.
    """

    units: Sequence[str] | Sequence[int]
    exact: bool

    def sample(self, rng: random.Random, num_tokens: int) -> list[str] | list[int]:
        """Units drawn at random, with repetition."""
        return rng.choices(self.units, k=num_tokens)  # type: ignore[return-value]

    def render(self, units: Sequence[str] | Sequence[int] | Sequence[str | int]) -> str | list[int]:
        """The prompt that these units make."""
        if units and isinstance(units[0], int):
            return list(units)  # type: ignore[arg-type]
        return "".join(units)  # type: ignore[arg-type]


def common_words() -> Vocabulary:
    """English words, about one token each."""
    return Vocabulary([f" {word}" for word in WORDS], exact=False)


def token_ids(vocab_size: int) -> Vocabulary:
    """Ids below ``vocab_size``, without the lowest ones."""
    return Vocabulary(range(vocab_size // LOWEST_ID_SHARE, vocab_size), exact=True)


class TextCounter:
    """Counts the tokens of text: with the tokenizer of a folder, else by its characters."""

    def __init__(self, tokenizer: Path | None) -> None:
        self._tokenizer = None
        if tokenizer is not None:
            from minisgl_fast.text.tokenizer import Tokenizer

            self._tokenizer = Tokenizer.load(tokenizer)

    @property
    def exact(self) -> bool:
        return self._tokenizer is not None

    def count(self, text: str) -> int:
        """Tokens, at least 1."""
        if self._tokenizer is None:
            return max(1, round(len(text) / CHARACTERS_PER_TOKEN))
        return max(1, len(self._tokenizer.encode(text)))

    def vocabulary(self) -> Vocabulary:
        """Common words: those that are one token each, where a tokenizer tells."""
        if self._tokenizer is None:
            return common_words()
        encode = self._tokenizer.encode
        units = [unit for unit in map(str, common_words().units) if len(encode(unit)) == 1]
        if len(units) < MIN_UNITS:
            return common_words()
        text = "".join(random.Random(0).choices(units, k=CHECKED_UNITS))
        return Vocabulary(units, exact=len(encode(text)) == CHECKED_UNITS)
