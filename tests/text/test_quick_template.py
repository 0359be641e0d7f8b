"""QuickTemplate: what it renders is what jinja2 renders, and it renders nothing else."""

import random

import pytest

from minisgl_fast.text.template import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
LOOP = "{% for m in messages %}"
CHATML = LOOP + (
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}" + LOOP + "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
# The system block is always there, with a date in it.
LLAMA31 = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{ 'Today: ' ~ date_string ~ '\n\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
    "{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}"
    + LLAMA3.removeprefix("{{ bos_token }}")
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content | trim + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set first = '' %}{% endif %}" + LOOP + "{% if (m.role == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ first if loop.first else '' }}{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = LOOP + (
    "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
TEMPLATES = {
    "chatml": CHATML, "llama3": LLAMA3, "llama31": LLAMA31, "gemma": GEMMA, "phi": PHI,
    "default_system": DEFAULT_SYSTEM,
}  # fmt: skip


def both(template):
    """The template as it is, and one whose jinja2 renders everything."""
    slow = ChatTemplate({"default": template.source}, SPECIAL)
    slow._quick = None
    return template, slow


@pytest.fixture(params=[*TEMPLATES, "qwen3"])
def template(request, qwen3_folder):
    if request.param == "qwen3":
        return ChatTemplate.load(qwen3_folder)
    return ChatTemplate({"default": TEMPLATES[request.param]}, SPECIAL)


def outcome(template, messages, **options):
    try:
        return template.render(messages, **options)
    except Exception as error:
        return type(error), error.message, error.param


def test_random_conversations_render_as_by_jinja2(template):
    assert template._quick is not None
    quick, slow = both(template)
    rng = random.Random(7)
    pieces = (
        "Hi", " ", "\n", "<think>", "</think>", "a\n\n", "<|im_end|>", "你好", "<tool_response>",
        "{{x}}", "</s>", "\t", "",
    )  # fmt: skip
    extras = ({}, {}, {}, {"name": "n"}, {"reasoning_content": "r"}, {"tool_calls": []})
    num_quick = 0
    for _ in range(800):
        messages = []
        for index in range(rng.randrange(1, 7)):
            role = ("user", "assistant")[index % 2]
            if rng.random() < 0.15:
                role = rng.choice(("system", "user", "assistant", "developer", "tool"))
            content = "".join(rng.choice(pieces) for _ in range(rng.randrange(4)))
            messages.append({"role": role, "content": content, **rng.choice(extras)})
        options = {
            "add_generation_prompt": rng.random() < 0.7,
            "chat_template_kwargs": rng.choice(
                ({}, {"enable_thinking": False}, {"enable_thinking": True, "thinking": True},
                 {"enable_thinking": 0}, {"thinking": None}, {"other": 1})
            ),
        }  # fmt: skip
        num_quick += (
            quick._quick.render(
                messages, options["add_generation_prompt"], options["chat_template_kwargs"]
            )
            is not None
        )
        assert outcome(quick, messages, **options) == outcome(slow, messages, **options)
    assert num_quick > 20


def test_a_system_message_is_rendered_without_jinja2(template):
    messages = [{"role": "system", "content": " S "}, {"role": "user", "content": " Q "}]
    text = template._quick.render(messages, True, {})
    assert text is not None and text == both(template)[1].render(messages)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "assistant", "content": "A"}],
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
        [{"role": "user", "content": "Q"}] * 2,
        [{"role": "user", "content": [{"type": "text", "text": "Q"}]}],
        [{"role": "user", "content": None}],
        [{"role": "user"}],
        [{"role": "user", "content": "Q", "name": "n"}],
        [{"role": "user", "content": "a </think> b"}],
        [{"role": "user", "content": "Q"}, {"role": "system", "content": "S"}],
        [{"role": "tool", "content": "Q"}],
    ],
)
def test_all_else_is_left_to_jinja2(template, messages):
    assert template._quick.render(messages, True, {}) is None


@pytest.mark.parametrize(
    "source",
    [
        CHATML.replace("m.content", "m.content.strip('\n')"),
        CHATML.replace("m.content", "m.content.split('[INST]')[-1]"),
        CHATML.replace("m.content", "(m.content | upper)"),
        CHATML + "{{ strftime_now('%Y') }}",
        CHATML + "{{ [1, 2] | random }}",
        CHATML + "{{ messages | length }}",
        CHATML.replace(LOOP, "{% for m in messages[-3:] %}"),
        "{{ messages[0].content }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_other_templates_have_none(source):
    assert ChatTemplate({"default": source}, SPECIAL)._quick is None
