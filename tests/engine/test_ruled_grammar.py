"""allowed_token_ids, bad_words and thinking_token_budget in the engine, against their
definition and the model's own top tokens, which the answer's log-probabilities tell."""

import random

import pytest

from minisgl_fast.engine.grammar import MaskRow
from minisgl_fast.engine.ruled_grammar import RuledGrammar
from minisgl_fast.params import SamplingParams
from minisgl_fast.token_rules import ThinkingBudget, TokenRules, bits_of, split
from minisgl_fast.wire import FinishReason

EOS = 258
NUM_IDS = 259
DIGITS = b'%llguidance {"no_forcing": true}\nstart: /[0-9]{3,8}/'


@pytest.fixture(scope="module")
def driver(make_driver):
    return make_driver()


def banned(token, before, words):
    """vLLM's definition."""
    return any(
        word[-1] == token
        and len(before) >= len(word) - 1
        and list(before[len(before) - len(word) + 1 :]) == list(word[:-1])
        for word in words
    )


def ask(driver, rules, grammar=b"", **fields):
    params = SamplingParams(temperature=fields.pop("temperature", 0.0), ignore_eos=True)
    request = {"prompt": [1, 2, 3], "params": params, "seed": 5, "max_tokens": 40}
    text = rules.before(grammar) if rules else grammar
    (result,) = driver.outputs([request | {"grammar": text, "num_top_logprobs": 20} | fields])
    return result


def test_rules_stand_before_a_grammar_and_come_back():
    rules = TokenRules(bits_of([0, 9, 258], NUM_IDS), ((1, 2), (3, 4, 5)))
    assert split(rules.before(DIGITS)) == (rules, DIGITS)
    assert split(TokenRules(None, ()).before(b"")) == (TokenRules(None, ()), b"")
    assert split(DIGITS) == (None, DIGITS)
    thinking = TokenRules(None, (), ThinkingBudget(7, 3, False, (4, 5)))
    assert split(thinking.before(b"")) == (thinking, b"")


def test_a_greedy_answer_takes_the_likeliest_token_that_no_word_bans(driver):
    free = ask(driver, None).tokens
    words = [tuple(free[2:4]), tuple(free[6:9]), tuple(free[10:15])]
    result = ask(driver, TokenRules(None, tuple(words)))
    assert result.tokens != free
    num_banned = 0
    for i, entry in enumerate(result.logprobs):
        before = result.tokens[:i]
        likeliest = [t for t, _ in entry.top if t != EOS and t < NUM_IDS]
        allowed = [t for t in likeliest if not banned(t, before, words)]
        num_banned += allowed[0] != likeliest[0]
        assert result.tokens[i] == allowed[0]
    assert num_banned
    assert len(result.tokens) == 40 and result.reason == FinishReason.LENGTH


def test_only_allowed_tokens_come_and_an_end_only_if_it_is_one(driver):
    ids = [3, 77, 78, 200]
    result = ask(driver, TokenRules(bits_of(ids, NUM_IDS), ((77, 78),)), temperature=5.0)
    assert set(result.tokens) <= set(ids) and len(set(result.tokens)) > 1
    assert (77, 78) not in zip(result.tokens, result.tokens[1:], strict=False)
    assert result.reason == FinishReason.LENGTH
    ending = TokenRules(bits_of([EOS], NUM_IDS), ())
    assert ask(driver, ending).tokens == [EOS]


def test_rules_cut_down_a_grammar(driver, tokenizer):
    digits, twice = tokenizer.encode("4567"), tuple(tokenizer.encode("44"))
    rules = TokenRules(bits_of([*digits, EOS], NUM_IDS), (twice,))
    for seed in range(8):
        result = ask(driver, rules, DIGITS, temperature=3.0, seed=seed)
        assert result.reason == FinishReason.EOS
        text = tokenizer.decode(result.tokens[:-1])
        assert set(text) <= set("4567") and "44" not in text and 3 <= len(text) <= 8


def test_rules_that_leave_nothing_end_the_request_alone(driver, tokenizer):
    rules = TokenRules(bits_of(tokenizer.encode("x"), NUM_IDS), ())
    assert ask(driver, rules, DIGITS).reason == FinishReason.GRAMMAR
    rules = TokenRules(bits_of([7], NUM_IDS), ((7, 7),))
    result = ask(driver, rules)
    assert (result.tokens, result.reason) == ([7], FinishReason.GRAMMAR)
    assert len(ask(driver, None).tokens) == 40


def test_masks_are_the_definition_for_any_words():
    generator = random.Random(0)
    for _ in range(200):
        words = [tuple(generator.choices(range(4), k=generator.randrange(2, 5))) for _ in range(5)]
        allowed = generator.sample(range(40), 20) if generator.random() < 0.5 else range(40)
        rules = TokenRules(None if len(allowed) == 40 else bits_of(allowed, 40), tuple(words))
        grammar = RuledGrammar(rules, None, 40)
        before = []
        for _ in range(12):
            avoided = generator.sample(range(40), 2)
            data = memoryview(bytearray(16))
            grammar.fill_mask(MaskRow(0, data), avoided)
            found = {i for i in range(128) if data[i >> 3] >> (i & 7) & 1}
            expected = {t for t in allowed if not banned(t, before, words)}
            assert found == ((expected - set(avoided)) or expected)
            before.append(generator.randrange(4))
            assert grammar.advance(before[-1])


# A budget of reasoning: bytes stand for the marks

START, END, CALL = b"<"[0], b">"[0], b"["[0]


def spent(before, budget, is_open):
    """Whether the end of the reasoning has to come behind these tokens, by the budget's words."""
    if not is_open:
        while before and before[0] in b" \n":
            before = before[1:]
        if before[:1] != [START]:
            return False
        before = before[1:]
    elif before[:1] == [START]:
        before = before[1:]
    return END not in before and CALL not in before and len(before) >= budget


def test_a_reasoning_has_no_more_tokens_than_its_budget():
    generator = random.Random(1)
    ids = b"<>[ ab"
    num_spent = 0
    for _ in range(600):
        is_open, budget = generator.random() < 0.5, generator.randrange(6)
        rule = ThinkingBudget(budget, START, is_open, (END, CALL))
        grammar = RuledGrammar(TokenRules(None, (), rule), None, 256, lambda t: bytes([t]) == b" ")
        before = []
        for _ in range(10):
            data = memoryview(bytearray(32))
            grammar.fill_mask(MaskRow(0, data), [])
            found = {i for i in range(256) if data[i >> 3] >> (i & 7) & 1}
            assert found == ({END} if spent(before, budget, is_open) else set(range(256)))
            num_spent += len(found) == 1
            before.append(generator.choice([i for i in ids if i in found]))
            assert grammar.advance(before[-1])
    assert num_spent > 100


@pytest.mark.parametrize("budget", [0, 1, 9, 39])
def test_a_budget_is_spent_to_the_token_and_then_the_end_comes(driver, tokenizer, budget):
    (end,) = tokenizer.encode("~")
    rules = TokenRules(None, (), ThinkingBudget(budget, -1, True, (end,)))
    bias = {end: -100.0}  # it would not come by itself
    params = SamplingParams(temperature=1.0, ignore_eos=True, logit_bias=bias)
    for seed in range(5):
        tokens = ask(driver, rules, seed=seed, params=params).tokens
        assert (tokens.index(end), len(tokens)) == (budget, 40)
        assert tokens.count(end) == 1  # what follows is free


def test_an_end_that_a_grammar_does_not_allow_yet_comes_when_it_does(driver, tokenizer):
    (end,) = tokenizer.encode("4")
    grammar = b'%llguidance {"no_forcing": true}\nstart: /([a-c]{3}4?){5}/'
    rules = TokenRules(None, (), ThinkingBudget(4, -1, True, (end,)))
    params = SamplingParams(temperature=1.0, logit_bias={end: -100.0})
    result = ask(driver, rules, grammar, params=params)
    text = tokenizer.decode(result.tokens[:-1])
    assert result.reason == FinishReason.EOS
    assert text.index("4") == 6 and text.count("4") == 1
