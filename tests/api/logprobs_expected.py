"""What tests of log-probabilities share: requests for some, and those of the fake engine."""

from api_client import CHAT, COMPLETIONS, ok
from fake_engine import ANSWER, EOS, logprob_of, top_of

MESSAGES = [{"role": "user", "content": "Say something."}]
PROMPT = "Once upon a time in Zürich 🥐, there was"


def chat(server, **body):
    """The choices of a chat; those of a stream as in ``choices_of``."""
    return choices_of(ok(server, CHAT, messages=MESSAGES, **body))


def complete(server, **body):
    """The choices of a completion; those of a stream as in ``choices_of``."""
    return choices_of(ok(server, COMPLETIONS, **{"prompt": PROMPT, **body}))


def choices_of(answer):
    """The choices of an answer; those of a stream as (index, text, logprobs, reason) per event."""
    if isinstance(answer, dict):
        return answer["choices"]
    events = []
    for event in answer:
        (choice,) = event["choices"]
        text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
        events.append((choice["index"], text, choice["logprobs"], choice["finish_reason"]))
    return events


def tokens_of(server, seed, *, eos=True):
    """What the fake engine says to a request with this seed."""
    encode = server.frontend.tokenizer.encode
    return [*encode(f"{seed}. "), *encode(ANSWER), *([EOS] if eos else [])]


def entry(server, position, token):
    data = server.frontend.tokenizer.token_bytes(token)
    text = data.decode("utf-8", "replace")
    return {"token": text, "logprob": logprob_of(position, token), "bytes": list(data)}


def chat_entries(server, tokens, num_prompt, num_top):
    return [
        {
            **entry(server, num_prompt + i, token),
            "top_logprobs": [
                {**entry(server, 0, one), "logprob": value}
                for one, value in top_of(num_prompt + i, num_top)
            ],
        }
        for i, token in enumerate(tokens)
    ]


def num_prompt_of(server):
    return len(server.engine.added[-1].prompt)
