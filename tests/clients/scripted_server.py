"""A whole frontend before a fake engine that says what it is told, as a process.

    python scripted_server.py      prints its URL; ends when its standard input does

Runs with the project's own Python, the clients with theirs. What the engine says: the text that
stands between ``<<`` and ``>>`` in the last user's message, else what REPLIES has for its words.
"""

import gzip
import re
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from api_server import QWEN3, servers  # noqa: E402
from fake_engine import EOS  # noqa: E402

from minisgl_fast.text.template import ChatTemplate  # noqa: E402
from minisgl_fast.text.tokenizer import Tokenizer  # noqa: E402


def call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


# The first pattern that is found in the last user's message. What langchain-tests ask for.
REPLIES = [
    (r"magic_function\(3\)", call("magic_function", '{"input": 3}')),
    (r"magic_function_no_args\(\)", call("magic_function_no_args", "{}")),
    (r"Pirate greeting", call("greeting_generator", '{"answer_style": "pirate"}')),
    (r"weather in San Francisco", call("get_weather", '{"location": "San Francisco, CA"}')),
    (r"'([^']+)' \(Hello \w+\)", lambda m: call("unicode_customer", customer(m[1]))),
    (r"^Hello!$", call("magic_function", '{"input": 3}')),
    (r"joke", '{"setup": "Why was the cat on the computer?", "punchline": "To watch the mouse."}'),
]
OTHERWISE = "Hello 👋, how are you?"


def customer(name):
    return f'{{"customer_name": "{name}", "description": "技術"}}'


def reply(prompt):
    """What the engine says to a prompt of Qwen3's template."""
    *_, turn = prompt.split("<|im_start|>user\n")
    message, _, _ = turn.partition("<|im_end|>")
    if "<tool_response>" in message:
        return "It is done."
    told = re.search(r"<<(.*)>>", message, re.DOTALL)
    if told:
        return told[1]
    for pattern, text in REPLIES:
        found = re.search(pattern, message)
        if found and pattern == "joke" and '"name": "Joke"' in prompt:
            return call("Joke", text)
        if found:
            return text if isinstance(text, str) else text(found)
    return OTHERWISE


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = gzip.decompress((QWEN3 / "tokenizer.json.gz").read_bytes())
        (folder / "tokenizer.json").write_bytes(text)
        config = "tokenizer_config.json"
        (folder / config).write_bytes((QWEN3 / config).read_bytes())
        tokenizer, template = Tokenizer.load(folder), ChatTemplate.load(folder)

    def script(request):
        prompt = tokenizer.decode(request.prompt, skip_special_tokens=False)
        return [*tokenizer.encode(reply(prompt)), EOS]

    with servers(tokenizer, template) as start:
        server = start(served_model_name="scripted")
        server.engine.script = script
        print(server.url, flush=True)
        sys.stdin.read()


main()
