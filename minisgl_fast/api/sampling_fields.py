"""SamplingFields: what the bodies of all generating routes share.

Types are checked by the Struct, ranges by sampling_params.py; the descriptions are those of
``/openapi.json`` and docs/api.md.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from minisgl_fast.api.body import doc
from minisgl_fast.api.logprobs import (
    MAX_LOGPROB_IDS,
    MAX_TOP_LOGPROBS,
    NO_LOGPROBS,
    LogprobOptions,
)
from minisgl_fast.params import (
    MAX_BANNED_TOKEN_IDS,
    MAX_INT32,
    MAX_LOGIT_BIAS,
    MAX_SEED,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)

MAX_N = 128


class StreamOptions(msgspec.Struct):
    include_usage: Annotated[bool | None, doc("A last event carries the usage.")] = None
    continuous_usage_stats: Annotated[
        bool | None, doc("Every event of a choice carries the usage of that choice so far.")
    ] = None
    include_obfuscation: Annotated[
        bool | None,
        doc("Random padding in every event hides from onlookers how long its text is."),
    ] = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """What all generating routes share."""

    model: Annotated[
        str | None, doc("The served model's name, or `default`; another name is a 404.")
    ] = None
    max_tokens: Annotated[int | None, doc("Most tokens to generate.", minimum=0)] = None
    min_tokens: Annotated[
        int | None,
        doc("Fewest tokens before an end or a stop counts.", minimum=0, maximum=MAX_INT32),
    ] = None
    temperature: Annotated[
        float | None, doc("0 always takes the likeliest token.", minimum=0, maximum=100)
    ] = None
    top_p: Annotated[
        float | None,
        doc("Sample from the likeliest tokens of this mass.", exclusiveMinimum=0, maximum=1),
    ] = None
    top_k: Annotated[
        int | None,
        doc("Sample from so many of the likeliest; 0 and -1: all.", minimum=-1, maximum=MAX_INT32),
    ] = None
    min_p: Annotated[
        float | None,
        doc("Least probability, as a share of the likeliest's.", minimum=0, maximum=1),
    ] = None
    seed: Annotated[
        int | None,
        doc("The same seed and request give the same text.", minimum=-(2**63), maximum=MAX_SEED),
    ] = None
    presence_penalty: Annotated[
        float | None, doc("Off the logits of tokens that came.", minimum=-2, maximum=2)
    ] = None
    frequency_penalty: Annotated[
        float | None, doc("The same, for each time they came.", minimum=-2, maximum=2)
    ] = None
    repetition_penalty: Annotated[
        float | None,
        doc(
            "Divides the logits of tokens that stand in the prompt or came.",
            exclusiveMinimum=0,
            maximum=2,
        ),
    ] = None
    logit_bias: Annotated[
        dict[int, Annotated[float, doc("Added to the logit.", minimum=-100, maximum=100)]] | None,
        doc(
            "By token id.",
            maxProperties=MAX_LOGIT_BIAS,
            propertyNames={"pattern": "^[0-9]+$"},
        ),
    ] = None
    bad_words: Annotated[
        list[str] | None,
        doc(
            "Words that must not come, with or without a blank before them: the last token of a "
            "word is banned where its others were the last to come.",
            maxItems=MAX_BANNED_TOKEN_IDS // 2,
        ),
    ] = None
    allowed_token_ids: Annotated[
        list[int] | None,
        doc("The only tokens that may come; an end of text must be among them.", minItems=1),
    ] = None
    stop: Annotated[
        str | list[str] | None,
        doc(
            f"Strings that end the text, up to {MAX_STOP_STRINGS} of 256 characters, wherever "
            "tokens cut them."
        ),
    ] = None
    stop_regex: Annotated[
        str | list[str] | None,
        doc(
            "Patterns that end the text where one is first complete. Python's syntax without "
            "anchors, look-around and back-references; matched in linear time."
        ),
    ] = None
    stop_token_ids: Annotated[
        list[int] | None, doc("Tokens that end the text.", maxItems=MAX_STOP_TOKEN_IDS)
    ] = None
    ignore_eos: Annotated[bool | None, doc("Go on behind the model's own end.")] = None
    include_stop_str_in_output: Annotated[
        bool | None, doc("Keep what stopped the text at its end.")
    ] = None
    no_stop_trim: Annotated[bool | None, doc("The same, by SGLang's name.")] = None
    skip_special_tokens: Annotated[
        bool | None, doc("Leave special tokens out of the text (default true).")
    ] = None
    spaces_between_special_tokens: Annotated[
        bool | None,
        doc(
            "Blanks between special tokens that are shown are those that the tokenizer's decoder "
            "puts there, most often none; `false` is refused where it does."
        ),
    ] = None
    n: Annotated[int | None, doc("Answers per prompt.", minimum=1, maximum=MAX_N)] = None
    stream: Annotated[bool | None, doc("Answer in server-sent events.")] = None
    stream_options: Annotated[StreamOptions | None, doc("Only with `stream`.")] = None
    response_format: Annotated[
        dict[str, Any] | None,
        doc(
            "What the text must be: of type `json_object`, `json_schema` (with `strict`, keywords "
            "that cannot be enforced are an error), `structural_tag`, or `text`."
        ),
    ] = None
    regex: Annotated[
        str | None, doc("A regular expression of the whole text; no look-around, no references.")
    ] = None
    ebnf: Annotated[
        str | None, doc("A grammar of the text, in llama.cpp's, SGLang's or Lark's notation.")
    ] = None
    json_schema: Annotated[
        str | dict[str, Any] | None, doc("A JSON schema of the text, or its JSON in a string.")
    ] = None
    structural_tag: Annotated[
        str | dict[str, Any] | None,
        doc("Markup in a free text that has a form to keep, or its JSON in a string."),
    ] = None
    structured_outputs: Annotated[
        dict[str, Any] | None,
        doc(
            "One of `json`, `regex`, `choice`, `grammar`, `json_object`, `structural_tag`, as "
            "vLLM has them."
        ),
    ] = None
    prompt_logprobs: Annotated[
        int | None,
        doc(
            "Add, of every token of the prompt, the log-probability and those of so many of the "
            "likeliest, as `prompt_logprobs`; not streamed.",
            minimum=0,
            maximum=MAX_TOP_LOGPROBS,
        ),
    ] = None
    logprob_token_ids: Annotated[
        list[int] | None,
        doc(
            "With `logprobs`: list these tokens at every position, behind the likeliest that are "
            "asked for, or else behind the token that came.",
            maxItems=MAX_LOGPROB_IDS,
        ),
    ] = None
    return_tokens_as_token_ids: Annotated[
        bool | None, doc("Call tokens `token_id:5` where log-probabilities are listed.")
    ] = None
    return_token_ids: Annotated[
        bool | None, doc("Add `prompt_token_ids`, and `token_ids` to every choice and its events.")
    ] = None
    return_prompt_token_ids: Annotated[bool | None, doc("Add `prompt_token_ids`.")] = None
    add_special_tokens: Annotated[
        bool | None,
        doc(
            "Put what the tokenizer puts around a text, such as bos, around the prompt (default: "
            "for a raw prompt, not for a chat, whose template writes it)."
        ),
    ] = None
    truncate_prompt_tokens: Annotated[
        int | None,
        doc("Cut a longer prompt to so many tokens; -1: to what the context holds.", minimum=-1),
    ] = None
    truncation_side: Annotated[
        Literal["left", "right"] | None, doc("Which side of the prompt is cut (default left).")
    ] = None
    priority: Annotated[
        int | None,
        doc(
            "Higher runs first; equal ones in the order they came.",
            minimum=-MAX_INT32,
            maximum=MAX_INT32,
        ),
    ] = None
    cache_salt: Annotated[
        str | None, doc("Cached prefixes are shared only among requests with the same salt.")
    ] = None
    extra_key: Annotated[str | None, doc("The same; with both, both must be equal.")] = None
    rid: Annotated[
        str | None,
        doc("The answer's `id`, and its name for `/abort_request`.", pattern="^[!-~]{1,128}$"),
    ] = None
    request_id: Annotated[
        str | None, doc("The same, by vLLM's name.", pattern="^[!-~]{1,128}$")
    ] = None
    user: Annotated[
        str | None, doc("Defined by OpenAI as a label of the end user; no part of the answer.")
    ] = None
    metadata: Annotated[
        dict[str, str] | None,
        doc("Defined by OpenAI as labels of a stored answer; no part of the answer."),
    ] = None
    store: Annotated[
        bool | None,
        doc("Defined by OpenAI for its own evaluation products; no part of the answer."),
    ] = None
    service_tier: Annotated[
        Literal["auto", "default", "flex", "scale", "priority", "fast"] | None,
        doc("There is one tier: the answer says `default`."),
    ] = None

    @property
    def num_choices(self) -> int:
        """Answers per prompt."""
        return 1 if self.n is None else self.n

    @property
    def num_generated(self) -> int:
        """Choices per prompt that the engine makes."""
        return self.num_choices

    def logprobs_with(self, num_top: int, *, of_prompt: bool = False) -> LogprobOptions:
        """What the engine is asked for where ``num_top`` are listed behind each token (-1: there
        is no list), ``of_prompt`` behind those of the prompt too; and for ``prompt_logprobs``."""
        ids = tuple(self.logprob_token_ids or ())
        if self.prompt_logprobs is not None:
            return LogprobOptions(max(num_top, self.prompt_logprobs), prompt_from=0, ids=ids)
        if num_top < 0:
            return NO_LOGPROBS
        return LogprobOptions(num_top, prompt_from=0 if of_prompt else -1, ids=ids)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_prompt_ids(self) -> bool:
        return bool(self.return_token_ids or self.return_prompt_token_ids)
