"""Grammars in the engine: an answer obeys its own, whatever the weights, heat and company."""

import json
import random
import re

import pytest

from minisgl_fast.params import SamplingParams
from minisgl_fast.vocabulary import Vocabulary
from minisgl_fast.wire import FinishReason, grammar_of, pack_add

EOS = 258
ENDS = (256, 258)  # generation_config.json names one more
HEAD = '%llguidance {"no_forcing": true}\n'
GREEDY = SamplingParams(temperature=0.0)
WARM = SamplingParams(temperature=1.0)


def lark(rules):
    return (HEAD + rules).encode()


DIGITS = lark("start: /[0-9]{3,8}/")
WORDS = lark('start: ("yes" | "no" | "maybe") ("," ("yes" | "no" | "maybe")){0,3}')
OBJECT = lark(
    'start: %json {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": '
    '["x", "yy"]}}, "required": ["a", "b"], "additionalProperties": false, '
    '"x-guidance": {"whitespace_pattern": "[ ]{0,2}"}}'
)


def text_of(tokenizer, result):
    return b"".join(map(tokenizer.token_bytes, result.tokens[:-1])).decode()


def requests(number, seed=0):
    """A mix of free and constrained requests, greedy and drawn."""
    generator = random.Random(seed)
    made = []
    for index in range(number):
        prompt = [generator.randrange(256) for _ in range(generator.randrange(1, 40))]
        params = generator.choice((GREEDY, WARM, SamplingParams(temperature=2.0, top_k=5)))
        grammar = generator.choice((b"", DIGITS, WORDS, OBJECT))
        max_tokens = generator.choice((3, 200)) if grammar else 20
        made.append(
            {"prompt": prompt, "params": params, "seed": index, "max_tokens": max_tokens}
            | {"grammar": grammar}
        )
    return made


def test_a_vocabulary_survives_its_text(tokenizer):
    vocabulary = tokenizer.vocabulary()
    copy = Vocabulary.from_text(vocabulary.to_text())
    assert copy.tokens == vocabulary.tokens and copy.special_ids == vocabulary.special_ids
    assert copy.truncated(257).special_ids == {256}


def test_the_grammar_of_an_add_is_its_last_bytes():
    payload = pack_add(7, WARM, [1, 2], seed=0, max_tokens=3, grammar=DIGITS)
    assert grammar_of(payload) == (7, DIGITS)
    assert grammar_of(pack_add(8, WARM, [1, 2], seed=0, max_tokens=3)) == (8, b"")


@pytest.mark.parametrize("overlap", [True, False])
def test_answers_obey_their_grammars_and_equal_those_given_alone(make_driver, tokenizer, overlap):
    batch = make_driver(overlap=overlap)
    alone = make_driver(overlap=False, disable_radix_cache=True)
    mixed = requests(40)
    results = batch.outputs(mixed)
    for request, result in zip(mixed, results, strict=True):
        (expected,) = alone.outputs([request])
        assert (result.tokens, result.reason) == (expected.tokens, expected.reason)
        if request["max_tokens"] == 200:
            assert result.reason == FinishReason.EOS and result.tokens[-1] in ENDS
            text = text_of(tokenizer, result)
            if request["grammar"] == DIGITS:
                assert re.fullmatch("[0-9]{3,8}", text)
            elif request["grammar"] == WORDS:
                assert set(text.split(",")) <= {"yes", "no", "maybe"}
            else:
                value = json.loads(text)
                assert isinstance(value["a"], int) and value["b"] in ("x", "yy")


def test_a_preempted_request_goes_on_where_its_grammar_was(make_driver):
    roomy, tight = make_driver(), make_driver(num_pages=12, max_running_requests=8)
    mixed = [
        {"prompt": [i] * 20, "params": WARM, "seed": i, "max_tokens": 60}
        | {"grammar": lark("start: /([a-c][0-9]){25,40}/")}
        for i in range(6)
    ]
    expected = roomy.outputs(mixed)
    assert tight.outputs(mixed) == [
        type(one)(one.tokens, one.reason, other.num_cached)
        for one, other in zip(expected, list(tight.results.values()), strict=True)
    ]
    assert tight.engine.stats()["preemptions"] > 0
    assert roomy.engine.stats()["preemptions"] == 0


def test_a_grammar_is_ended_by_an_abort_at_any_time(make_driver):
    driver = make_driver()
    for num_steps in range(8):
        rid = driver.add([1, 2, 3], WARM, max_tokens=100, grammar=OBJECT)
        other = driver.add([4, 5], WARM, max_tokens=100, grammar=DIGITS)
        for _ in range(num_steps):
            driver.step()
        driver.abort(rid)
        driver.run()
        assert driver.results[rid].reason in (FinishReason.ABORTED, FinishReason.EOS)
        assert driver.results[other].reason == FinishReason.EOS


def test_min_tokens_and_ignored_ends_only_prolong_what_the_grammar_allows(make_driver, tokenizer):
    driver = make_driver()

    def run(grammar, **params):
        rid = driver.add([9], SamplingParams(**params), max_tokens=100, grammar=grammar)
        driver.run()
        result = driver.results[rid]
        assert result.reason == FinishReason.EOS
        return text_of(tokenizer, result)

    for seed in range(5):
        assert len(run(DIGITS, min_tokens=7, seed=seed)) >= 7
        assert run(lark('start: "ab"'), min_tokens=9, seed=seed) == "ab"
        assert len(run(DIGITS, ignore_eos=True, seed=seed)) == 8


def test_stop_tokens_end_a_grammar_early(make_driver, tokenizer):
    driver = make_driver()
    (token,) = tokenizer.encode("5")
    params = SamplingParams(temperature=1.0, stop_token_ids=(token,))
    rid = driver.add([9], params, max_tokens=300, grammar=lark("start: /[0-9]{200,300}/"))
    driver.run()
    result = driver.results[rid]
    assert result.reason == FinishReason.STOP_TOKEN and result.tokens.count(token) == 1


def test_a_dead_end_ends_its_own_request_alone(make_driver, tokenizer):
    driver = make_driver()
    dead = driver.add([1], WARM, max_tokens=50, grammar=lark("start: <[257]> <[300-310]>"))
    free = driver.add([1], GREEDY, max_tokens=10)
    fine = driver.add([1], WARM, max_tokens=50, grammar=WORDS)
    bad = driver.add([1], WARM, max_tokens=50, grammar=b"start: (")
    driver.run()
    assert driver.results[dead].reason == FinishReason.GRAMMAR
    assert driver.results[bad].reason == FinishReason.GRAMMAR
    assert driver.results[free].reason == FinishReason.LENGTH
    assert driver.results[fine].reason == FinishReason.EOS


def test_an_engine_without_a_vocabulary_refuses_grammars(start):
    driver = start()
    rid = driver.add([1], WARM, grammar=DIGITS)
    free = driver.add([1], GREEDY)
    driver.run()
    assert not driver.engine.facts()["grammars"]
    assert driver.results[rid].reason == FinishReason.GRAMMAR
    assert driver.results[free].reason == FinishReason.LENGTH
