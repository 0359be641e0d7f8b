"""Fields of the public APIs that ask for what this server does not do: refused, not ignored."""

from __future__ import annotations

from typing import Any

from minisgl_fast.errors import RequestError

# By name, with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "logprob_token_ids": (),
    "return_logprob": (False,),
    "return_hidden_states": (False,),
    "return_token_ids": (False,),
    "return_prompt_token_ids": (False,),
    "return_routed_experts": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "regex": (),
    "ebnf": (),
    "json_schema": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "thinking_token_budget": (),
    "stop_regex": (),
    "no_stop_trim": (False,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "input_ids": (),
    "input_embeds": (),
    "prompt_embeds": (),
    "text": (),
    "sampling_params": (),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "truncate_prompt_tokens": (),
    "lora_path": (),
    "custom_logit_processor": (),
}
# The same for the routes without messages.
REFUSED_OUTSIDE_CHAT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "reasoning": (),
    "reasoning_effort": (),
    "separate_reasoning": (False,),
    "include_reasoning": (False,),
}


def check_refused(fields: dict[str, Any], *, is_chat: bool) -> None:
    """RequestError if a body has such a field with a value that asks for something."""
    refused = REFUSED if is_chat else REFUSED | REFUSED_OUTSIDE_CHAT
    for name in fields.keys() & refused.keys():
        value = fields[name]
        harmless = any(value == ok and type(value) is type(ok) for ok in refused[name])
        if value is not None and not harmless:
            raise unsupported(name)


def unsupported(name: str) -> RequestError:
    """The error for a field that is not supported."""
    return RequestError(f"This server does not support {name} yet.", param=name)
