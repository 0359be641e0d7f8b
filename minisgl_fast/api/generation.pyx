"""Generation: what every HTTP generation has, whatever it asks for: how it begins and ends.

Session (session.py) can do all that a request may ask for; PlainSession (plain_session.pyx) is for
requests of one choice and text alone, which are most.

Rules: each choice gets exactly one finish_reason; an answer is counted exactly once, by its route,
status and first finish_reason; when the client goes, every open choice is aborted at once; whatever
the end, nothing is left that refers to itself.
"""

from cpython.time cimport perf_counter

from minisgl_fast.server.response cimport STOP_STRING, Choice, Response
from minisgl_fast.wire cimport ABORTED, EOS, ERROR, GRAMMAR, LENGTH, STOP_TOKEN

from minisgl_fast.errors import EngineError, RequestError

# By plain integers: a member takes long to hash.
cdef dict _FINISH_REASONS = {
    <int>EOS: "stop",
    <int>STOP_TOKEN: "stop",
    <int>LENGTH: "length",
    <int>ABORTED: "abort",
}


cdef class Generation(Response):

    def __init__(
        self, frontend, metrics, exchange, str route not None, double received, bint streaming,
        text_event=None,
    ):
        """``received``: when the request came; ``route``: what metrics call it."""
        Response.__init__(self, exchange, streaming, text_event)
        self.frontend = frontend
        self.metrics = metrics
        self.route = route
        self.received = received
        self.choices = []

    cpdef start_choices(self, list choices):
        """The choices are about to be submitted."""
        self.choices = choices
        self.exchange.on_disconnect = self._disconnected
        if self.streaming:
            self.exchange.on_resume = self.write_ready

    cpdef tuple end_of(self, Choice choice, tuple stops, grammar_param):
        """(finish_reason, the string or token that matched or None, whether it is the model's own
        end) of a choice that has ended. EngineError or RequestError if that is no end.

        ``stops``: what the text's ``matched`` counts; ``grammar_param``: the field of its grammar.
        """
        if choice.reason == ERROR:
            raise EngineError("The engine could not compute this request.")
        if choice.reason == GRAMMAR:
            raise RequestError(
                f"{grammar_param} cannot be followed any further: no token of the model may come "
                "next, or to find out takes too long.",
                param=grammar_param,
            )
        if choice.reason == STOP_STRING:
            return "stop", stops[choice.text.matched], False
        reason = _FINISH_REASONS[<int>choice.reason]
        return reason, choice.last_token if reason == "stop" else None, choice.reason == EOS

    cpdef bytes feed_output(self, output, Choice choice, bytes text):
        """The events of the next text of a choice that a ChatOutput takes apart."""
        events = output.feed(text)
        choice.is_parsed = not output.is_plain
        choice.set_lane(*output.lane())
        return events

    cpdef bytes close_output(self, output, Choice choice, answer):
        """The last events of such a choice; changes the Answer, whose text is UTF-8 or, if the
        choice is no longer parsed, JSON-escaped."""
        events = b""
        if choice.is_parsed:
            events = output.finish(answer.text)
            answer.text = b""
            if not self.streaming:
                answer.message = output.message()
        answer.finish_reason = output.finish_reason(answer.finish_reason)
        answer.num_reasoning_tokens = output.num_reasoning_tokens(
            choice.num_tokens, choice.num_at_mark, self.frontend.tokenizer.encode
        )
        return events

    cpdef succeed(self, str finish_reason):
        """The answer is complete."""
        self.metrics.count_request(self.route, 200, finish_reason)
        self.metrics.observe_end_to_end(perf_counter() - self.received)
        self.release()

    def failure_events(self, error):
        """The events that end a stream with an error."""
        raise TypeError("a Generation that streams must have failure_events")

    def fail(self, error):
        """End the answer with an error, in the stream if one has begun."""
        if self.ended:
            return
        self.ended = True
        self._abort_choices("engine")
        if self.exchange.started:
            self.exchange.finish(self.failure_events(error), close=True)
        else:
            self.exchange.fail(error)
        self.metrics.count_request(self.route, error.http_status, "error")
        self.release()

    cpdef release(self):
        """Break the reference cycles, so that no garbage collection is needed."""
        self.forget()
        self.exchange.on_disconnect = None
        self.exchange.on_resume = None
        self.choices = []

    def _disconnected(self):
        if not self.ended:
            self.ended = True
            self._abort_choices("client")
            self.metrics.count_request(self.route, 499, "disconnect")
            self.release()

    def _abort_choices(self, str reason):
        cdef int num_aborted = 0
        for choice in self.choices:
            num_aborted += self.frontend.abort(choice)
        self.metrics.count_abort(reason, num_aborted)
