"""SendRing: many sends on many sockets as one system call, by Linux's io_uring.

A step of the engine brings a chunk for every stream, each on a socket of its own, and entering the
kernel for each is a good part of what a chunk costs. Here all are queued in memory shared with the
kernel and done in one call; see io_uring(7) and io_uring_enter(2).

Rules:
- Every send is done when ``send`` returns: MSG_DONTWAIT makes the kernel answer EAGAIN where it
  would have to wait, instead of keeping the request (and a pointer into our buffer).
- What the ring does not take is sent by send(2), and where there is no ring (an old kernel, a
  container that forbids it, a library built without its header) everything is.
"""

from libcpp.vector cimport vector

cdef extern from *:
    """
    #include <errno.h>
    #include <string.h>
    #include <sys/socket.h>

    #if defined(__linux__) && defined(__has_include)
    #if __has_include(<linux/io_uring.h>)
    #include <linux/io_uring.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #if defined(__NR_io_uring_setup) && defined(IORING_FEAT_RW_CUR_POS)
    #define HAS_RING 1
    #endif
    #endif
    #endif

    #ifdef HAS_RING
    struct Ring {
        int descriptor;
        unsigned num_entries, sq_mask, cq_mask;
        unsigned *sq_head, *sq_tail, *cq_head, *cq_tail;
        struct io_uring_sqe *entries;
        struct io_uring_cqe *completions;
        void *rings;
        size_t rings_size, entries_size;
    };

    static void ring_free(void *pointer) {
        Ring *ring = (Ring *)pointer;
        if (!ring) return;
        if (ring->rings != MAP_FAILED) munmap(ring->rings, ring->rings_size);
        if ((void *)ring->entries != MAP_FAILED) munmap(ring->entries, ring->entries_size);
        close(ring->descriptor);
        delete ring;
    }

    static void *ring_new(unsigned num_entries) {
        struct io_uring_params params;
        memset(&params, 0, sizeof params);
        int descriptor = (int)syscall(__NR_io_uring_setup, num_entries, &params);
        if (descriptor < 0) return NULL;
        Ring *ring = new Ring();
        ring->descriptor = descriptor;
        ring->num_entries = params.sq_entries;
        size_t sq_size = params.sq_off.array + params.sq_entries * sizeof(unsigned);
        size_t cq_size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
        ring->rings_size = sq_size > cq_size ? sq_size : cq_size;
        ring->entries_size = params.sq_entries * sizeof(struct io_uring_sqe);
        int access = PROT_READ | PROT_WRITE, kind = MAP_SHARED | MAP_POPULATE;
        ring->rings = mmap(NULL, ring->rings_size, access, kind, descriptor, IORING_OFF_SQ_RING);
        ring->entries = (struct io_uring_sqe *)mmap(
            NULL, ring->entries_size, access, kind, descriptor, IORING_OFF_SQES);
        // Linux 5.6 has the last of these, and IORING_OP_SEND.
        unsigned needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_RW_CUR_POS;
        if (ring->rings == MAP_FAILED || (void *)ring->entries == MAP_FAILED ||
            (params.features & needed) != needed) {
            ring_free(ring);
            return NULL;
        }
        char *rings = (char *)ring->rings;
        ring->sq_head = (unsigned *)(rings + params.sq_off.head);
        ring->sq_tail = (unsigned *)(rings + params.sq_off.tail);
        ring->sq_mask = *(unsigned *)(rings + params.sq_off.ring_mask);
        ring->cq_head = (unsigned *)(rings + params.cq_off.head);
        ring->cq_tail = (unsigned *)(rings + params.cq_off.tail);
        ring->cq_mask = *(unsigned *)(rings + params.cq_off.ring_mask);
        ring->completions = (struct io_uring_cqe *)(rings + params.cq_off.cqes);
        unsigned *places = (unsigned *)(rings + params.sq_off.array);
        for (unsigned i = 0; i < params.sq_entries; i++) places[i] = i;
        return ring;
    }

    static void ring_put(
        void *pointer, unsigned index, int descriptor, const void *data, size_t size) {
        Ring *ring = (Ring *)pointer;
        struct io_uring_sqe *entry = &ring->entries[(*ring->sq_tail + index) & ring->sq_mask];
        memset(entry, 0, sizeof *entry);
        entry->opcode = IORING_OP_SEND;
        entry->fd = descriptor;
        entry->addr = (unsigned long)data;
        entry->len = (unsigned)size;
        entry->msg_flags = MSG_DONTWAIT | MSG_NOSIGNAL;
        entry->user_data = index;
    }

    /* Has the kernel do what was put; how many it took, all of which are done then. */
    static unsigned ring_enter(void *pointer, unsigned num) {
        Ring *ring = (Ring *)pointer;
        unsigned start = *ring->sq_tail;
        __atomic_store_n(ring->sq_tail, start + num, __ATOMIC_RELEASE);
        unsigned taken = 0;
        for (;;) {
            long done = syscall(__NR_io_uring_enter, ring->descriptor, num - taken, num,
                                IORING_ENTER_GETEVENTS, NULL, 0);
            taken = __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE) - start;
            unsigned waiting = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE) - *ring->cq_head;
            if (taken == num && waiting >= num) return num;
            if (done < 0 && errno == EINTR) continue;
            if (done > 0) continue;
            // It takes no more: the rest is taken back. What it took is done.
            __atomic_store_n(ring->sq_tail, start + taken, __ATOMIC_RELEASE);
            return waiting < taken ? waiting : taken;
        }
    }

    static int ring_take(void *pointer, int *result) {
        Ring *ring = (Ring *)pointer;
        unsigned head = *ring->cq_head;
        struct io_uring_cqe *completion = &ring->completions[head & ring->cq_mask];
        int index = (int)completion->user_data;
        *result = completion->res;
        __atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
        return index;
    }

    static unsigned ring_size(void *ring) { return ((Ring *)ring)->num_entries; }
    #else
    static void *ring_new(unsigned num_entries) { (void)num_entries; return NULL; }
    static void ring_free(void *ring) { (void)ring; }
    static void ring_put(
        void *ring, unsigned index, int descriptor, const void *data, size_t size) {
        (void)ring, (void)index, (void)descriptor, (void)data, (void)size;
    }
    static unsigned ring_enter(void *ring, unsigned num) { (void)ring, (void)num; return 0; }
    static int ring_take(void *ring, int *result) { (void)ring, (void)result; return 0; }
    static unsigned ring_size(void *ring) { (void)ring; return 0; }
    #endif

    static int plain_send(int descriptor, const void *data, size_t size) {
        ssize_t sent = send(descriptor, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
        return sent < 0 ? -errno : (int)sent;
    }
    """
    void *ring_new(unsigned num_entries) nogil
    void ring_free(void *ring) nogil
    void ring_put(
        void *ring, unsigned index, int descriptor, const void *data, size_t size
    ) nogil
    unsigned ring_enter(void *ring, unsigned num) nogil
    int ring_take(void *ring, int *result) nogil
    unsigned ring_size(void *ring) nogil
    int plain_send(int descriptor, const void *data, size_t size) nogil

cdef enum:
    NUM_ENTRIES = 256
    # Fewer sends than these gain nothing.
    MIN_SENDS = 4


cdef class SendRing:

    def __dealloc__(self):
        ring_free(self._ring)

    cdef void send(self, vector[Send] &sends) noexcept nogil:
        """Do every send; ``result`` tells what came of it."""
        cdef size_t num = sends.size()
        cdef size_t start = 0
        cdef size_t i
        cdef unsigned batch, taken
        cdef int result
        cdef int index
        if num >= MIN_SENDS and not self.is_open:
            self.is_open = True
            self._ring = ring_new(NUM_ENTRIES)
        while self._ring != NULL and num - start >= MIN_SENDS:
            batch = <unsigned>min(num - start, <size_t>ring_size(self._ring))
            for i in range(batch):
                ring_put(
                    self._ring, <unsigned>i, sends[start + i].descriptor, sends[start + i].data,
                    sends[start + i].size,
                )
            taken = ring_enter(self._ring, batch)
            for _ in range(taken):
                index = ring_take(self._ring, &result)
                sends[start + <size_t>index].result = result
            start += taken
            if taken < batch:
                ring_free(self._ring)
                self._ring = NULL
        for i in range(start, num):
            sends[i].result = plain_send(sends[i].descriptor, sends[i].data, sends[i].size)

    # For tests

    @property
    def works(self):
        """Whether a ring is in use: from the first send of several on."""
        return self._ring != NULL

    def send_all(self, pairs):
        """Send (descriptor, bytes) pairs; the results."""
        cdef vector[Send] sends
        cdef Send one
        one.result = 0
        for descriptor, data in pairs:
            one.descriptor = descriptor
            one.data = data
            one.size = <size_t>len(data)
            sends.push_back(one)
        with nogil:
            self.send(sends)
        return [send.result for send in sends]
