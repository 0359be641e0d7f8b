"""Answers of a tiny random model that obeys the grammar of a request's fields, without a server."""

from __future__ import annotations

import json
from array import array

from minisgl_fast.api.chat_grammar import chat_grammar
from minisgl_fast.api.openai_request import check_chat
from minisgl_fast.api.structured import plain_grammar
from minisgl_fast.config import Config
from minisgl_fast.engine.engine import Engine
from minisgl_fast.engine.grammar_check import Checker
from minisgl_fast.params import SamplingParams
from minisgl_fast.parsers.select import Formats
from minisgl_fast.progress import silent
from minisgl_fast.text.tokenizer import Tokenizer
from minisgl_fast.wire import FinishReason, pack_add, unpack_step

USER = [{"role": "user", "content": "x"}]


class GrammarDriver:
    """One engine; grammars go through the same check as in a server, in this process."""

    def __init__(self, folder, **settings):
        self.tokenizer = Tokenizer.load(folder)
        vocabulary = self.tokenizer.vocabulary()
        self.checker = Checker(len(vocabulary), sorted(vocabulary.special_ids))
        settings = {"num_pages": 2048, "num_threads": 1, "device": "cpu"} | settings
        config = Config(model=str(folder), dtype="float32", **settings)
        self.engine = Engine(
            config, folder, len(vocabulary), self.tokenizer.eos_ids, silent, vocabulary
        )
        self._num_requests = 0

    def close(self):
        self.engine.close()
        self.tokenizer.close()

    def grammar(self, formats=None, prompt="", **fields):
        """What the engine gets for a chat with these fields."""
        body, _ = check_chat({"messages": USER, **fields})
        if formats is None:
            made = plain_grammar(body, self.tokenizer)
        else:
            made = chat_grammar(body, formats, self.tokenizer, prompt)
        assert made is not None
        checked = self.checker.check(made.text)
        assert "error" not in checked, checked
        return checked["grammar"].encode()

    def texts(self, grammars, *, max_tokens=3000, temperature=1.0, seed=0, prompt=(72,)):
        """The answers' texts, None for one that did not come to its end."""
        rids = {}
        for index, grammar in enumerate(grammars):
            rid = self._num_requests
            self._num_requests += 1
            rids[rid] = []
            params = SamplingParams(temperature=temperature)
            self.engine.add(
                0,
                pack_add(
                    rid, params, array("i", prompt), seed=seed + index, max_tokens=max_tokens,
                    grammar=grammar,
                ),
            )  # fmt: skip
        reasons = {}
        while self.engine.has_work:
            for _, _, payload in self.engine.step():
                for rid, token, reason in unpack_step(payload)[0]:
                    rids[rid].append(token)
                    reasons[rid] = FinishReason(reason)
        self.engine.check()
        return [
            self.tokenizer.decode(tokens[:-1], skip_special_tokens=False)
            if reasons[rid] == FinishReason.EOS
            else reasons[rid].name
            for rid, tokens in rids.items()
        ]


def parsed(formats, text, tools, prompt=""):
    """(calls as (name, arguments), content, reasoning) of an answer."""
    from minisgl_fast.parsers.events import CallArguments, CallEnd, CallStart, Content, Reasoning

    parser = formats.parser(prompt, tools)
    events = parser.feed(text) + parser.finish()
    names, arguments, ended = [], {}, set()
    content, reasoning = "", ""
    for event in events:
        if isinstance(event, CallStart):
            names.append(event.name)
            arguments[event.index] = ""
        elif isinstance(event, CallArguments):
            arguments[event.index] += event.text
        elif isinstance(event, CallEnd):
            ended.add(event.index)
        elif isinstance(event, Content):
            content += event.text
        elif isinstance(event, Reasoning):
            reasoning += event.text
    assert ended == set(range(len(names)))
    calls = [(name, json.loads(arguments[i])) for i, name in enumerate(names)]
    return calls, content, reasoning


__all__ = ["USER", "Formats", "GrammarDriver", "parsed"]
