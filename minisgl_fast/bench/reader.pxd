from libc.stdint cimport uint64_t
from libcpp.string cimport string
from libcpp.vector cimport vector


cdef class ResponseReader:
    cdef:
        readonly int status
        readonly bint keep_alive
        readonly bint done
        readonly size_t num_bytes
        readonly size_t num_events
        readonly size_t num_reads
        readonly double start_s
        readonly double first_s
        readonly double last_s
        vector[float] gaps_s
        int _state
        int _api
        bint _keep_text
        bint _event_stream
        bint _event_has_data
        bint _event_has_text
        size_t _remaining
        string _frame
        string _line
        bint _has_shape
        string _before  # what the last event with text had before its text, up to the quote
        string _behind  # and behind it, from the quote on
        string _usage
        string _error
        string _text
        uint64_t[::1] _credit  # counts events for somebody else; may be None

    cdef int take(self, const char *data, size_t size, double now) except -1
    cdef int _feed(self, const char *data, size_t size, double now) except -1
    cdef size_t _take_frame(self, const char *data, size_t size, size_t limit) except? 0
    cdef size_t _take_chunk_line(self, const char *data, size_t size, double now) except? 0
    cdef int _on_chunk_line(self, const char *line, size_t size, double now) except -1
    cdef int _on_head(self) except -1
    cdef int _body(self, const char *data, size_t size, double now) except -1
    cdef int _on_line(self, const char *line, size_t size, double now) except -1
    cdef int _on_data(self, const char *data, size_t size) except -1
    cdef bint _has_text_in_shape(
        self, const char *data, size_t size, const char **text, size_t *length
    ) noexcept
    cdef void _keep_shape(
        self, const char *data, size_t size, const char *text, size_t length
    ) noexcept
    cdef int _end_event(self, double now) except -1
    cdef int _end_message(self, double now) except -1
