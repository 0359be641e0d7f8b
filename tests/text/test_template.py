"""ChatTemplate: goldens of transformers, sources of templates, faults of clients and operators."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from minisgl_fast.errors import ModelError, RequestError
from minisgl_fast.text import template as template_module
from minisgl_fast.text.template import MAX_MESSAGES, ChatTemplate

GOLDENS = Path(__file__).parents[1] / "data" / "chat-template-golden"
USER = [{"role": "user", "content": "Hi"}]


def golden(name):
    return json.loads((GOLDENS / f"{name}.json").read_text())["cases"]


def render_golden(template, case):
    kwargs = dict(case["kwargs"])
    return template.render(
        case["messages"],
        case["tools"],
        add_generation_prompt=kwargs.pop("add_generation_prompt"),
        continue_final_message=case["name"] == "continue_final_message",
        chat_template_kwargs=kwargs,
    )


def inline(source, messages=USER, tools=None, **options):
    return ChatTemplate({"default": source}, {"bos_token": "<s>"}).render(
        messages, tools, **options
    )


# Goldens

SPECIAL_CASES = {
    "content_parts_list_is_dropped_by_template",
    "system_content_parts_list",
}


@pytest.fixture(scope="module")
def qwen3_template(qwen3_folder):
    return ChatTemplate.load(qwen3_folder)


@pytest.mark.parametrize(
    "case",
    [case for case in golden("qwen3") if case["name"] not in SPECIAL_CASES],
    ids=lambda case: case["name"],
)
def test_qwen3_renders_and_encodes_as_transformers(case, qwen3_template, qwen3):
    assert render_golden(qwen3_template, case) == case["rendered"]
    assert qwen3.encode(case["rendered"]) == case["token_ids"]


@pytest.mark.demo
@pytest.mark.parametrize("case", golden("smollm2"), ids=lambda case: case["name"])
def test_smollm2_renders_and_encodes_as_transformers(case, smollm2_gguf, smollm2):
    rendered = render_golden(ChatTemplate.load(smollm2_gguf), case)
    assert rendered == case["rendered"]
    assert smollm2.encode(rendered) == case["token_ids"]


@pytest.mark.parametrize("name", sorted(SPECIAL_CASES - {"continue_final_message"}))
def test_content_parts_render_as_one_string(name, qwen3_template):
    case = next(case for case in golden("qwen3") if case["name"] == name)
    joined = [
        {**message, "content": message["content"] if isinstance(message["content"], str)
         else "".join(part["text"] for part in message["content"])}
        for message in case["messages"]
    ]  # fmt: skip
    assert render_golden(qwen3_template, case) == qwen3_template.render(joined)
    assert any(message["content"] in ("Hello world", "Be brief.") for message in joined)


# Messages


def test_developer_is_system_and_null_content_is_empty():
    one = "[{{ m.role }}|{{ m.content }}|{{ m.content is string }}]"
    source = "{% for m in messages %}" + one + "{% endfor %}"
    messages = [{"role": "developer", "content": "x"}, {"role": "assistant", "content": None}]
    assert inline(source, messages) == "[system|x|True][assistant||True]"
    assert messages[0]["role"] == "developer"  # the caller's own is left alone
    assert inline(source, [{"role": "assistant"}]) == "[assistant||True]"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "text"},
        {"type": "text", "text": 1},
        3,
    ],
)
def test_parts_that_are_no_text_are_refused(part):
    with pytest.raises(RequestError, match=r"messages\[1\]") as caught:
        inline("{{ messages }}", [*USER, {"role": "user", "content": ["a", part]}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("messages", [[], USER * (MAX_MESSAGES + 1)])
def test_no_messages_or_too_many_are_refused(messages):
    with pytest.raises(RequestError) as caught:
        inline("x", messages)
    assert caught.value.param == "messages"


def test_variables_reach_the_template():
    source = (
        "{{ bos_token }}{{ tools[0].name }}{{ documents[0] }}{{ add_generation_prompt }}{{ a }}"
    )
    options = {
        "tools": [{"name": "t"}],
        "documents": ["d"],
        "add_generation_prompt": False,
        "chat_template_kwargs": {"a": 1},
    }
    assert inline(source, **options) == "<s>tdFalse1"
    assert inline("{{ tools is none }}{{ documents is none }}{{ eos_token }}") == "TrueTrue"


@pytest.mark.parametrize("name", ["messages", "tools", "documents", "add_generation_prompt"])
def test_client_variables_cannot_replace_the_requests_own(name):
    with pytest.raises(RequestError) as caught:
        inline("x", chat_template_kwargs={name: 1})
    assert caught.value.param == "chat_template_kwargs"


# Faults while rendering


def test_raise_exception_reaches_the_client():
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        inline("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"
    with pytest.raises(RequestError) as caught:
        inline("{{ raise_exception('x' * 9999) }}")
    assert len(caught.value.message) == 500


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].nothing.at_all }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].content['x'] | tojson }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ dict.__class__.__mro__ }}",
        "{% set n = namespace(__class__=1) %}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{% for i in range(1000000) %}x{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1 // 0 }}",
    ],
)
def test_other_faults_do_too_without_foreign_texts(source):
    with pytest.raises(RequestError, match="chat template cannot render") as caught:
        inline(source)
    assert caught.value.param == "messages"


def test_the_rendered_text_is_bounded(monkeypatch):
    monkeypatch.setattr(template_module, "MAX_CHARACTERS", 100)
    assert len(inline("{% for i in range(10) %}{{ messages[0].content * 5 }}{% endfor %}")) == 100
    with pytest.raises(RequestError, match="longer than 100"):
        inline("{% for i in range(100000) %}{{ messages[0].content * 100 }}{% endfor %}")


# transformers' environment


def test_blocks_are_trimmed():
    assert inline("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_tojson_is_plain_json():
    value = {"b": "<é>&'", "a": [1, None, True]}
    assert inline("{{ v | tojson }}", chat_template_kwargs={"v": value}) == json.dumps(
        value, ensure_ascii=False
    )
    assert inline("{{ v | tojson(indent=2) }}", chat_template_kwargs={"v": value}) == json.dumps(
        value, ensure_ascii=False, indent=2
    )


def test_loop_controls_generation_tag_and_date():
    assert (
        inline("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "012"
    )
    tag = "a{% set x = 1 %}{% generation %}b{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert inline(tag) == "ab21"
    assert inline("{{ strftime_now('%Y') }}") in (
        str(datetime.now().year - 1),
        str(datetime.now().year),
    )


@pytest.mark.parametrize(
    "source",
    [
        "{% set n = namespace(a=1, self=2) %}{% set n.a = 3 %}{{ n.a }}{{ n.self }}",
        "{{ dict(a=1) }}{{ dict([('b', 2)]).items() | list }}{{ dict.fromkeys('ab', 1) }}",
        "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}\n"
        "{{- x }}{% endfor %}",
        "{{ messages | tojson(indent=1, sort_keys=true) }}{{ 'é<' | tojson(ensure_ascii=true) }}",
        "{{ messages[0] | tojson(separators=(',', ':')) }}{{ messages[0] }}",
        "  {% for m in messages %}\n  {%- if loop.last %}{% continue %}{% endif %}\n x{# c #}\n"
        "{% endfor %}",
        "{{ messages[0].content.strip() }}{{ messages[0]['content'] | trim | upper }}{{ none }}\n",
        "{{ messages[0].content.split('i')[-1] }}{{ messages[1:] | length }}{{ tools is defined }}",
        "{%- macro f(x) -%} [{{ x }}] {%- endmacro -%}{{ f(1) }}{{ f(messages[-1].role) }}",
    ],
)
def test_templates_render_as_in_transformers(source):
    messages = [*USER, {"role": "assistant", "content": " <é>\n"}]
    (expected,), _ = render_jinja_template([messages], chat_template=source)
    assert inline(source, messages, add_generation_prompt=False) == expected


# Sources


def write(folder, config=None, jinja=None):
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return folder


def test_sources_in_order(tmp_path):
    write(tmp_path, {"chat_template": "config", "eos_token": {"content": "</s>"}})
    assert ChatTemplate.load(tmp_path).render(USER) == "config"
    write(tmp_path, jinja="file {{ eos_token }}")
    assert ChatTemplate.load(tmp_path).render(USER) == "file </s>"
    override = tmp_path / "other.txt"
    override.write_text("other {{ eos_token }}")
    assert ChatTemplate.load(tmp_path, str(override)).render(USER) == "other </s>"
    assert ChatTemplate.load(tmp_path, "text {{ eos_token }}").render(USER) == "text </s>"


def test_named_templates(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    template = ChatTemplate.load(write(tmp_path, {"chat_template": named}))
    assert template.render(USER) == "plain"
    assert template.render(USER, []) == "plain"
    assert template.render(USER, [{"name": "t"}]) == "tools"


def test_a_model_without_a_template_says_so(tmp_path):
    template = ChatTemplate.load(tmp_path)
    assert not template
    with pytest.raises(RequestError, match="no chat template") as caught:
        template.render(USER)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "config", [{"chat_template": "{% if %}"}, {"chat_template": [{"name": "default"}]}, [], "x"]
)
def test_broken_files_are_the_operators_fault(tmp_path, config):
    with pytest.raises(ModelError):
        ChatTemplate.load(write(tmp_path, config))


def test_a_template_flag_that_is_neither_file_nor_template_is_refused(tmp_path):
    with pytest.raises(ModelError, match="neither"):
        ChatTemplate.load(tmp_path, "no_such_file.jinja")
    with pytest.raises(ModelError, match="neither"):
        ChatTemplate.load(tmp_path, "x" * 5000)


# Continuing the last message

TEMPLATES = {
    "plain": "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}",
    "trims": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>\n{% endfor %}",
}


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize(
    "content", ["The", "The end ", " a\n\n", "", "雪 👩‍👩‍👧", "x</>", "CONTINUE_FINAL_MESSAGE"]
)
def test_a_message_is_continued_as_in_transformers(source, content):
    messages = [*USER, {"role": "assistant", "content": content}]
    expected = render_jinja_template([messages], chat_template=source, continue_final_message=True)
    assert inline(source, messages, continue_final_message=True) == expected[0][0]
    assert messages[-1]["content"] == content


def test_only_the_last_place_of_the_message_is_continued():
    source = "{{ messages[-1].content }}#{% for m in messages %}{{ m.content }};{% endfor %}"
    messages = [*USER, {"role": "assistant", "content": "The"}]
    assert inline(source, messages, continue_final_message=True) == "The#Hi;The"


def test_qwen3_continues_behind_its_reasoning(qwen3_template):
    messages = [*USER, {"role": "assistant", "content": "<think>\nso\n</think>\n\nThe"}]
    text = qwen3_template.render(messages, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\n<think>\nso\n</think>\n\nThe")


def test_a_template_that_hides_the_last_message_cannot_continue_it():
    with pytest.raises(RequestError) as caught:
        inline("{{ messages[0].content }}", [*USER, {"role": "assistant", "content": "a"}],
               continue_final_message=True)  # fmt: skip
    assert caught.value.param == "continue_final_message"
