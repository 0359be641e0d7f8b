/* A closed-loop client of requests that are not streamed: one epoll thread.
 *
 *   requests PORT CONNECTIONS ROUNDS REQUEST_FILE CPU
 *
 * Every connection sends the bytes of REQUEST_FILE ROUNDS times, each after the whole answer to the
 * last (Content-Length). Prints JSON: seconds, completed, failed (a status other than 200, or a cut).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum { MAX_ANSWER = 1 << 16 };

typedef struct {
    int fd, size, left;
    char answer[MAX_ANSWER + 1];
} Connection;

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

int main(int argc, char **argv) {
    if (argc < 6) return 2;
    int num = atoi(argv[2]), rounds = atoi(argv[3]), open = num, one = 1;
    long completed = 0, failed = 0;
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(atoi(argv[5]), &cpus);
    sched_setaffinity(0, sizeof cpus, &cpus);
    static char request[1 << 20];
    FILE *file = fopen(argv[4], "rb");
    size_t size = fread(request, 1, sizeof request, file);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1])),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int epoll_fd = epoll_create1(0);
    Connection *all = calloc(num, sizeof *all);
    struct epoll_event event = {.events = EPOLLIN}, found[256];
    for (int i = 0; i < num; i++) {
        all[i].fd = socket(AF_INET, SOCK_STREAM, 0);
        all[i].left = rounds;
        if (connect(all[i].fd, (void *)&address, sizeof address)) return 1;
        setsockopt(all[i].fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        event.data.ptr = &all[i];
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, all[i].fd, &event);
    }
    usleep(50000);
    double start = now_s();
    for (int i = 0; i < num; i++)
        if (send(all[i].fd, request, size, 0) < 0) return 1;
    while (open) {
        int n = epoll_wait(epoll_fd, found, 256, 30000);
        if (n <= 0) break;
        for (int i = 0; i < n; i++) {
            Connection *c = found[i].data.ptr;
            ssize_t got = recv(c->fd, c->answer + c->size, MAX_ANSWER - c->size, 0);
            if (got <= 0) {
                failed++, open--;
                close(c->fd);
                continue;
            }
            c->size += got;
            c->answer[c->size] = 0;
            char *end = strstr(c->answer, "\r\n\r\n"), *length;
            if (!end) continue;
            length = strcasestr(c->answer, "\r\ncontent-length:");
            if (!length || c->size < end + 4 - c->answer + atoi(length + 17)) continue;
            if (memcmp(c->answer + 9, "200", 3) == 0) completed++;
            else failed++;
            c->size = 0;
            if (--c->left) {
                if (send(c->fd, request, size, 0) < 0) failed++, open--;
            } else {
                open--;
            }
        }
    }
    printf("{\"seconds\": %.6f, \"completed\": %ld, \"failed\": %ld}\n", now_s() - start, completed, failed);
    return 0;
}
