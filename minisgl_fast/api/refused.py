"""Fields of the public APIs that ask for what this server does not do: refused, not ignored."""

from __future__ import annotations

from typing import Any, NamedTuple

from minisgl_fast.errors import RequestError


class Refusal(NamedTuple):
    """``why``, for the client; ``harmless``: values that ask for nothing."""

    why: str
    harmless: tuple[Any, ...] = ()


_NOT_YET = "it is not built yet"
_NO_IMAGES = "it serves text alone"
_SCHEMA = "response_format and structured_outputs say it"

REFUSED: dict[str, Refusal] = {
    "return_logprob": Refusal("logprobs asks for them", (False,)),
    "return_hidden_states": Refusal("hidden states are not kept", (False,)),
    "return_meta_info": Refusal("/generate has meta_info", (False,)),
    "return_routed_experts": Refusal("no served model has experts", (False,)),
    "routed_experts_start_len": Refusal("no served model has experts", (0,)),
    "routed_experts_prompt_start": Refusal("no served model has experts", (0,)),
    "return_cached_tokens_details": Refusal("usage has cached_tokens", (False,)),
    "return_spec_tokens_details": Refusal("nothing is speculated", (False,)),
    "functions": Refusal("tools has taken its place", ([],)),
    "function_call": Refusal("tool_choice has taken its place", ("none", "auto")),
    "guided_json": Refusal(_SCHEMA),
    "guided_regex": Refusal(_SCHEMA),
    "guided_choice": Refusal(_SCHEMA),
    "guided_grammar": Refusal(_SCHEMA),
    "modalities": Refusal(_NO_IMAGES, (["text"],)),
    "audio": Refusal(_NO_IMAGES),
    "mm_processor_kwargs": Refusal(_NO_IMAGES, ({},)),
    "web_search_options": Refusal("it does not search the web"),
    "moderation": Refusal("it does not moderate"),
    "chat_template": Refusal("templates of clients are not run; --chat-template sets one"),
    "input_embeds": Refusal("prompts are text or token ids"),
    "prompt_embeds": Refusal("prompts are text or token ids"),
    "text": Refusal("the prompt's name is prompt or messages"),
    "sampling_params": Refusal("its fields stand beside the prompt"),
    "use_beam_search": Refusal("it samples; best_of takes the best of several", (False,)),
    "length_penalty": Refusal("there is no beam search", (1, 1.0)),
    "repetition_detection": Refusal("repetition_penalty and max_tokens bound it"),
    "lora_path": Refusal("it serves no adapters"),
    "custom_logit_processor": Refusal("code of clients is not run"),
    "custom_params": Refusal("code of clients is not run", ({},)),
    "vllm_xargs": Refusal("it has no extensions", ({},)),
    "watermark": Refusal("it has no watermarks", (False,)),
    "kv_transfer_params": Refusal("it does not split prefill and decode", ({},)),
    "session_params": Refusal("sessions need no name here: cached prefixes are found", ({},)),
    "session_id": Refusal("sessions need no name here: cached prefixes are found"),
}
# The same for the routes without messages.
_CHAT_ONLY = "it belongs to /v1/chat/completions"
REFUSED_OUTSIDE_CHAT: dict[str, Refusal] = {
    "top_logprobs": Refusal("logprobs says how many are listed", (0,)),
    "tools": Refusal(_CHAT_ONLY, ([],)),
    "tool_choice": Refusal(_CHAT_ONLY, ("none", "auto")),
    "reasoning": Refusal(_CHAT_ONLY),
    "reasoning_effort": Refusal(_CHAT_ONLY),
    "thinking_token_budget": Refusal(_CHAT_ONLY, (-1,)),
    "separate_reasoning": Refusal(_CHAT_ONLY, (False,)),
    "include_reasoning": Refusal(_CHAT_ONLY, (False,)),
    "continue_final_message": Refusal(_CHAT_ONLY, (False,)),
    "documents": Refusal(_CHAT_ONLY, ([],)),
    "chat_template_kwargs": Refusal(_CHAT_ONLY, ({},)),
    "input_ids": Refusal("prompt takes token ids"),
}
# And for the route with messages.
REFUSED_IN_CHAT: dict[str, Refusal] = {
    "suffix": Refusal("it belongs to /v1/completions", ("",)),
    "best_of": Refusal("it belongs to /v1/completions", (1,)),
}


def check_refused(fields: dict[str, Any], *, is_chat: bool) -> None:
    """RequestError if a body has such a field with a value that asks for something."""
    refused = REFUSED | (REFUSED_IN_CHAT if is_chat else REFUSED_OUTSIDE_CHAT)
    for name in fields.keys() & refused.keys():
        value = fields[name]
        harmless = any(value == ok and type(value) is type(ok) for ok in refused[name].harmless)
        if value is not None and not harmless:
            raise unsupported(name, refused[name].why)


def unsupported(name: str, why: str = _NOT_YET) -> RequestError:
    """The error for a field that is not supported."""
    return RequestError(f"This server does not support {name}: {why}.", param=name)
