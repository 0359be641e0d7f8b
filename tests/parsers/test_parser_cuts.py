"""Parsers give the same however the text is cut, and lose nothing."""

import copy
import random

import pytest
from parser_cases import FORMATS, make, run, texts

from minisgl_fast.parsers.events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Reasoning,
    join,
)
from minisgl_fast.text.stream import TextStream, TokenTable


@pytest.mark.parametrize("name", FORMATS)
def test_every_cut_of_200_texts_gives_the_same_events(name):
    generator = random.Random(name)
    for text in texts(name):
        whole = join(run(make(name), [text]))
        for at in range(len(text) + 1):
            assert join(run(make(name), [text[:at], text[at:]])) == whole, (text, at)
        assert join(run(make(name), text)) == whole, text
        for _ in range(3):
            cuts = sorted(generator.choices(range(len(text) + 1), k=generator.randint(2, 8)))
            pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            assert join(run(make(name), pieces)) == whole, pieces


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_that_are_single_bytes_of_utf8_give_the_same_events(name):
    table = TokenTable([bytes((byte,)) for byte in range(256)], [])
    for text in texts(name, 40):
        stream = TextStream(table)
        pieces = []
        for byte in text.encode():
            stream.feed(byte)
            pieces.append(stream.take().decode())
        stream.finish()
        pieces.append(stream.take().decode())
        assert join(run(make(name), pieces)) == join(run(make(name), [text])), text


@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_numbered_and_well_formed(name):
    num_calls = num_ends = 0
    for text in texts(name):
        events = run(make(name), text)
        started, ended = [], []
        for event in events:
            if isinstance(event, CallStart):
                started.append(event.index)
            elif isinstance(event, CallArguments):
                assert event.index == started[-1]
                assert event.index not in ended
            elif isinstance(event, CallEnd):
                assert event.index == started[-1]
                ended.append(event.index)
        assert started == list(range(len(started)))
        assert len(set(ended)) == len(ended)
        num_calls += len(started)
        num_ends += len(ended)
    assert bool(num_calls) == bool(FORMATS[name][1])
    assert bool(num_ends) == bool(FORMATS[name][1])


@pytest.mark.parametrize("name", FORMATS)
def test_every_letter_of_the_text_comes_out_but_for_markup(name):
    # Letters that no markup has, behind each piece of a text.
    for seed, text in enumerate(texts(name, 100)):
        generator = random.Random(seed)
        marked = "".join(
            c + ("雪" if c in " \n" and generator.random() < 0.5 else "") for c in text
        )
        if FORMATS[name][1] in ("pythonic", "gpt-oss", "mistral") and "雪" in marked:
            marked = text + "雪"
        found = ""
        for event in run(make(name), marked):
            if isinstance(event, (Content, Reasoning, CallArguments)):
                found += event.text
            elif isinstance(event, CallStart):
                found += event.name
        # A key or a value that is not the call's own may be skipped, never more.
        missing = marked.count("雪") - found.count("雪")
        assert missing <= marked.count('"type"') + marked.count('"n"'), marked


@pytest.mark.parametrize("name", FORMATS)
def test_steady_text_need_not_be_fed(name):
    more = "plain 完\n 7"
    num_steady = 0
    for text in texts(name, 60):
        parser = make(name)
        for char in text:
            parser.feed(char)
            steady = parser.steady
            if steady is not None:
                num_steady += 1
                fed = copy.deepcopy(parser)
                assert fed.feed(more) == [steady.kind(more)]
                assert fed.steady == steady
                assert parser.feed("") in ([], [steady.kind("")])
                parser = fed if num_steady % 2 else parser
    assert num_steady
