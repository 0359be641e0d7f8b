/* The floor of a streaming server: one epoll thread that writes finished bytes and does nothing else.
 *
 *   floor PORT_FILE CPU TICK_US CREDIT_FILE EVENTS_A_WRITE
 *
 * Every POST is answered with max_tokens events of the size of a real chunk, one send() each (or
 * EVENTS_A_WRITE at once), if it says "stream":true (blanks allowed), else with one small JSON body.
 * Nothing is parsed beyond the end of the head, Content-Length and max_tokens; nothing is checked.
 * TICK_US 0: a token for every stream as soon as all have one, but never more than 8 a stream ahead
 * of the count in CREDIT_FILE ("-": none), where the client keeps how many events it has read.
 * TICK_US > 0: one for every stream each tick. The port goes to PORT_FILE once it listens.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { MAX_CONNECTIONS = 1 << 14, BODY = 1 << 16, AHEAD = 8, LONGEST_WAIT_NS = 20 * 1000 * 1000 };

typedef struct {
    int fd, size, left, place;
    char *input;
} Connection;

static Connection *running[MAX_CONNECTIONS];
static int num_running, epoll_fd, events_a_write;
static volatile uint64_t *credit, no_credit;
static char chunk[1 << 14];
static int chunk_size;
static const char HEAD[] =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    "transfer-encoding: chunked\r\n\r\n";
static const char END[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
static const char EVENT[] =
    "data: {\"id\":\"chatcmpl-req-0123456789ab-1f\",\"object\":\"chat.completion.chunk\","
    "\"created\":1700000000,\"model\":\"fake\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" fox\"},"
    "\"logprobs\":null,\"finish_reason\":null}]}\n\n";
static char answer[1024];

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* All bytes, waiting where the socket is full: the client reads on, so that is short. */
static void put(int fd, const char *data, int size) {
    while (size > 0) {
        ssize_t n = send(fd, data, size, MSG_NOSIGNAL);
        if (n >= 0) {
            data += n;
            size -= n;
        } else if (errno != EAGAIN) {
            return;
        }
    }
}

static void stop(Connection *c) {
    running[c->place] = running[--num_running];
    running[c->place]->place = c->place;
    c->place = -1;
}

static void take_request(Connection *c) {
    char *end, *length, *tokens;
    c->input[c->size] = 0;
    end = memmem(c->input, c->size, "\r\n\r\n", 4);
    if (!end) return;
    length = strcasestr(c->input, "\r\ncontent-length:");
    int body = length && length < end ? atoi(length + 17) : 0;
    if (c->size < end + 4 - c->input + body) return;
    tokens = strstr(end, "\"max_tokens\":");
    char *stream = strstr(end, "\"stream\":");
    c->size = 0;
    if (stream && strncmp(stream + 9 + strspn(stream + 9, " "), "true", 4) == 0) {
        put(c->fd, HEAD, sizeof HEAD - 1);
        c->left = tokens ? atoi(tokens + 13) : 1;
        c->place = num_running;
        running[num_running++] = c;
    } else {
        put(c->fd, answer, strlen(answer));
    }
}

static uint64_t step(void) {
    uint64_t sent = 0;
    for (int i = num_running - 1; i >= 0; i--) {
        Connection *c = running[i];
        int n = c->left < events_a_write ? c->left : events_a_write;
        put(c->fd, chunk, chunk_size / events_a_write * n);
        sent += n;
        c->left -= n;
        if (!c->left) {
            put(c->fd, END, sizeof END - 1);
            stop(c);
        }
    }
    return sent;
}

int main(int argc, char **argv) {
    if (argc < 6) return 2;
    signal(SIGPIPE, SIG_IGN);
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(atoi(argv[2]), &cpus);
    sched_setaffinity(0, sizeof cpus, &cpus);
    uint64_t tick_ns = atoll(argv[3]) * 1000, next_tick = 0, sent = 0, origin, last = 0;
    credit = &no_credit;
    int has_credit = strcmp(argv[4], "-") != 0;
    if (has_credit) {
        int file = open(argv[4], O_RDWR);
        credit = mmap(0, 8, PROT_READ, MAP_SHARED, file, 0);
    }
    origin = *credit;
    events_a_write = atoi(argv[5]);
    for (int i = 0; i < events_a_write; i++)
        chunk_size += sprintf(chunk + chunk_size, "%zx\r\n%s\r\n", sizeof EVENT - 1, EVENT);
    const char *body = "{\"id\":\"x\",\"object\":\"text_completion\",\"created\":1700000000,\"model\":"
                       "\"fake\",\"choices\":[{\"index\":0,\"text\":\" fox\",\"logprobs\":null,"
                       "\"finish_reason\":\"length\"}],\"usage\":{\"prompt_tokens\":8,"
                       "\"completion_tokens\":1,\"total_tokens\":9}}";
    sprintf(answer, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s",
            strlen(body), body);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    if (bind(listener, (void *)&address, size) || listen(listener, 4096)) return 1;
    getsockname(listener, (void *)&address, &size);
    FILE *file = fopen(argv[1], "w");
    fprintf(file, "%d\n", ntohs(address.sin_port));
    fclose(file);
    epoll_fd = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN}, found[512];
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int n, wait_ms = num_running ? 0 : -1;
        if (num_running && tick_ns) {
            uint64_t now = now_ns();
            if (now < next_tick) {
                struct timespec rest = {0, next_tick - now};
                n = epoll_pwait2(epoll_fd, found, 512, &rest, 0);
                if (n <= 0) continue;
                goto handle;
            }
        }
        n = epoll_wait(epoll_fd, found, 512, wait_ms);
    handle:
        for (int i = 0; i < n; i++) {
            Connection *c = found[i].data.ptr;
            if (!c) {
                int fd;
                while ((fd = accept4(listener, 0, 0, SOCK_NONBLOCK)) >= 0) {
                    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    c = calloc(1, sizeof *c);
                    *c = (Connection){.fd = fd, .place = -1, .input = malloc(BODY + 1)};
                    event.data.ptr = c;
                    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
                }
                continue;
            }
            ssize_t got = recv(c->fd, c->input + c->size, BODY - c->size, 0);
            if (got > 0) {
                c->size += got;
                take_request(c);
            } else if (got == 0 || errno != EAGAIN) {
                if (c->place >= 0) stop(c);
                close(c->fd);
                free(c->input);
                free(c);
            }
        }
        if (!num_running) {
            sent = 0;
            origin = *credit;
            continue;
        }
        uint64_t now = now_ns();
        if (tick_ns) {
            if (now < next_tick) continue;
            next_tick = now > next_tick + tick_ns ? now + tick_ns : next_tick + tick_ns;
        } else if (has_credit && sent > *credit - origin + (uint64_t)AHEAD * num_running &&
                   now < last + LONGEST_WAIT_NS) {
            continue;
        }
        last = now;
        sent += step();
    }
}
