"""PlainSession: a generation of one choice, of which the text alone is wanted, as most are.

What does not depend on the prompt is in a Recipe, made once for all requests that ask for the same
(recipes.py): the packed part of the ADD frame, an unused TextStream, and the answer in molds. What
is left to do for a request is done here, without Python's help where nothing is to be parsed.

Rules: what a client gets is what Session would give it, byte for byte. Session's own rules hold.
A whole chat answer goes through its parser only where it holds a byte that markup begins with.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from cpython.time cimport time
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport int64_t
from libc.string cimport memchr
from libcpp.string cimport string, to_string

from minisgl_fast.api.generation cimport Generation
from minisgl_fast.api.mold cimport CREATED, END, NUM_GAPS, REQUEST_ID, TEXT, USAGE
from minisgl_fast.api.usage cimport append_usage
from minisgl_fast.server.response cimport Choice
from minisgl_fast.server.string_bytes cimport append, to_bytes
from minisgl_fast.text.stream cimport TextStream

from minisgl_fast.api.response_format import Answer, Usage, end_keys
from minisgl_fast.api.session import fresh_seed


cdef class Recipe:

    def __init__(
        self, task not None, TextStream text not None, dict molds not None, make_form,
        make_output=None, bytes watched=None, template_kwargs=None,
    ):
        """``task``: one of these requests. ``text``: as it begins. ``molds``: by the names of
        ResponseFormat's methods, those of a stream or "body". ``make_form(request_id, created)``
        makes the format that they are of. ``watched``: what Formats.watched makes of their prompts;
        if it is not None, ``make_output(form)`` makes a ChatOutput."""
        params = task.params
        self.route = task.route
        self.param = task.param
        self.add_special_tokens = task.add_special_tokens
        self.streams = task.stream
        self.add = task.add_template()
        self.text = text
        self.include_stop = params.include_stop_str_in_output
        self.stops = params.stops
        self.seed = None if params.seed is None else params.seed % 2**64
        self.max_tokens = task.max_tokens or 0
        self.default_max_tokens = task.default_max_tokens or 0
        self.template_kwargs = template_kwargs
        self.make_form = make_form
        self.make_output = make_output
        self.watched = watched
        self.mark_token = self.mark_token_2 = -1
        if watched is not None:
            form = make_form("", b"")
            self.mark_token, self.mark_token_2 = make_output(form).end_tokens
        self.body = molds.get("body")
        self.opening = molds.get("opening")
        self.prefix = molds.get("prefix")
        self.suffix = molds.get("suffix")
        self.closing = molds.get("closing")
        self.closing_text = molds.get("closing_text")
        self.ending = molds.get("ending")

    cdef int64_t limit(self, int64_t room, int64_t asked) noexcept:
        """How many tokens to generate where the context has ``room`` for so many; 0 if they do not
        fit. ``asked``: the request's own ``max_tokens``, -1 for the recipe's."""
        if asked < 0:
            asked = self.max_tokens
        elif asked == 0:
            return 0
        if room < 1 or asked > room:
            return 0
        if asked:
            return asked
        return min(room, self.default_max_tokens) if self.default_max_tokens else room


cdef class PlainSession(Generation):

    def __init__(
        self, frontend, metrics, exchange, double received, Recipe recipe not None
    ):
        # Not through the bases: their arguments would have to be packed.
        self.frontend = frontend
        self.metrics = metrics
        self.exchange = exchange
        self.route = recipe.route
        self.received = received
        self.streaming = recipe.streams
        self.recipe = recipe

    cdef int start(self, prompt, int64_t max_tokens, int64_t own_seed) except -1:
        """Send it to the engine: so many tokens behind the prompt. ``own_seed``: -1 for that of the
        recipe."""
        cdef Recipe recipe = self.recipe
        cdef Py_ssize_t size
        cdef const char *request_id = PyUnicode_AsUTF8AndSize(
            self.exchange.request.request_id, &size
        )
        cdef string prefix, suffix
        self.values.resize(NUM_GAPS)
        self.values[<size_t>REQUEST_ID].assign(request_id, <size_t>size)
        if recipe.streams:
            self.values[<size_t>CREATED] = to_string(<long>time())
            recipe.prefix.fill(self.values, prefix)
            recipe.suffix.fill(self.values, suffix)
        cdef Choice choice = Choice(
            self, 0, recipe.text.fresh(), to_bytes(prefix), to_bytes(suffix), recipe.include_stop,
            self.received,
        )
        if recipe.watched is not None:
            choice.mark_token, choice.mark_token_2 = recipe.mark_token, recipe.mark_token_2
            if recipe.streams:
                self._begin_output()
                choice.is_parsed = True
        self.num_prompt = <size_t>len(prompt)
        self.start_choices([choice])
        seed = recipe.seed if own_seed < 0 else own_seed
        if seed is None:
            seed = fresh_seed()
        self.frontend.submit(choice, prompt, recipe.add, seed, max_tokens)
        self.metrics.num_prompt_tokens += self.num_prompt
        return 0

    def open_stream(self):
        cdef string out
        self.exchange.start_stream()
        self.recipe.opening.fill(self.values, out)
        return to_bytes(out)

    def parse_text(self, Choice choice, bytes text):
        return self.feed_output(self.output, choice, text)

    def failure_events(self, error):
        request_id = self.exchange.request.request_id
        return self.recipe.make_form(request_id, b"").failure(error, request_id)

    cpdef release(self):
        Generation.release(self)
        self.form = self.output = None

    cdef int _close(self, Choice choice) except -1:
        cdef Recipe recipe = self.recipe
        cdef tuple end = self.end_of(choice, recipe.stops, None)
        cdef string *text = &self.values[<size_t>TEXT]
        cdef long num_reasoning = -1 if recipe.watched is None else 0
        if self.output is not None or self._has_watched(choice):
            return self._close_output(choice, end)
        self.finish_reason = end[0]
        append(self.values[<size_t>END], end_keys(*end))
        append_usage(
            self.values[<size_t>USAGE], self.num_prompt, choice.num_tokens, choice.num_cached,
            num_reasoning,
        )
        choice.text.drain(text[0], True)
        if not recipe.streams:
            self.values[<size_t>CREATED] = to_string(<long>time())
            recipe.body.fill(self.values, self.out)
        elif text.empty():
            recipe.closing.fill(self.values, self.out)
        else:
            recipe.closing_text.fill(self.values, self.out)
        return 0

    cdef int _complete(self) except -1:
        if self.streaming:
            self.recipe.ending.fill(self.values, self.out)
            self.exchange.finish(to_bytes(self.out))
        else:
            self.exchange.respond(200, to_bytes(self.out))
        self.succeed(self.finish_reason)
        return 0

    # Of answers with parts

    cdef bint _has_watched(self, Choice choice) noexcept:
        """Whether markup may be in the text of a whole answer."""
        cdef const string *pending = &choice.text.pending
        cdef bytes watched = self.recipe.watched
        if watched is None:
            return False
        if not watched:
            return True
        return memchr(pending.data(), PyBytes_AS_STRING(watched)[0], pending.size()) != NULL

    cdef int _begin_output(self) except -1:
        """Make what takes the text apart."""
        cdef bytes created = b"%d" % <long>time()
        if self.streaming:
            created = to_bytes(self.values[<size_t>CREATED])
        self.form = self.recipe.make_form(self.exchange.request.request_id, created)
        self.output = self.recipe.make_output(self.form)
        return 0

    cdef int _close_output(self, Choice choice, tuple end) except -1:
        """_close, by the format itself."""
        if self.output is None:
            self._begin_output()
            choice.is_parsed = True
        text = choice.text.take() if choice.is_parsed else choice.text.take_json()
        answer = Answer(0, text, *end)
        events = self.close_output(self.output, choice, answer)
        usage = Usage(
            self.num_prompt, choice.num_tokens, choice.num_cached, answer.num_reasoning_tokens
        )
        self.finish_reason = answer.finish_reason
        if self.streaming:
            append(self.values[<size_t>USAGE], usage.to_json())
            append(self.out, events + self.form.closing(answer))
        else:
            append(self.out, self.form.body([answer], usage))
        return 0
