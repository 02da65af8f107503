/* An emulated network link: two network namespaces, each with a TUN device, and between them, in each direction on its own, a drop-tail queue, a
 * transmitter of fixed rate, random loss and a fixed delay. Needs no netem in the kernel.
 *
 *   emulator ONE_WAY_US LOSS_PERCENT RATE_MBIT QUEUE_PACKETS SEED
 *
 * Says "ready FD_A FD_B" when both sides (10.9.0.1 and 10.9.0.2, device "wire") are up; /proc/PID/fd/FD_A is the first namespace. Answers each line
 * on standard input with a line of counters, "packets bytes dropped lost delivered" from A to B and the same from B to A, and ends with its input. The
 * namespaces have no names: they end with the last process in them, and nothing is left to clean up however this one ends.
 *
 * Exit status 2: this machine, or this user, may not have namespaces or TUN devices. 1: anything else.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MTU = 1500, SLOTS = 1 << 16, BATCH = 64, TUN_QUEUE = 10000, UNAVAILABLE = 2 };

struct packet {
    uint64_t departs_ns; /* when its last bit has left the transmitter */
    uint16_t length;
    uint8_t lost;
    uint8_t data[MTU];
};

/* Slots are used round: [arrived, departed) are on their way, [departed, end) wait for the transmitter or are in it. */
struct direction {
    int from, to;
    struct packet *slots;
    uint32_t arrived, departed, end;
    uint64_t free_ns; /* when the transmitter is done with what it has */
    uint64_t random;
    uint64_t packets, bytes, dropped, lost, delivered;
};

struct link {
    uint64_t delay_ns;
    double loss, ns_per_byte;
    uint32_t queue;
};

static void die(const char *what, int status) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(status);
}

static void check(int result, const char *what) {
    if (result < 0)
        die(what, errno == EPERM || errno == EACCES || errno == ENOSYS ? UNAVAILABLE : 1);
}

static uint64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* splitmix64 (Steele, Lea, Flood 2014), as a number in [0, 1) */
static double draw(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (double)((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

static void set_address(int control, struct ifreq *request, unsigned long what, const char *address) {
    struct sockaddr_in *in = (struct sockaddr_in *)&request->ifr_addr;
    in->sin_family = AF_INET;
    inet_pton(AF_INET, address, &in->sin_addr);
    check(ioctl(control, what, request), "cannot set the address of the TUN device");
}

static void bring_up(int control, const char *device) {
    struct ifreq request = {0};
    strcpy(request.ifr_name, device);
    request.ifr_flags = IFF_UP;
    check(ioctl(control, SIOCSIFFLAGS, &request), "cannot bring a device up");
}

/* Moves this process into a new namespace with a TUN device in it; returns the namespace. */
static int make_side(const char *address, int *tun) {
    check(unshare(CLONE_NEWNET), "cannot make a network namespace");
    *tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (*tun < 0)
        die("cannot open /dev/net/tun", UNAVAILABLE);
    struct ifreq request = {0};
    strcpy(request.ifr_name, "wire");
    request.ifr_flags = IFF_TUN | IFF_NO_PI;
    check(ioctl(*tun, TUNSETIFF, &request), "cannot make a TUN device");

    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    check(control, "socket");
    set_address(control, &request, SIOCSIFADDR, address);
    set_address(control, &request, SIOCSIFNETMASK, "255.255.255.0");
    request.ifr_mtu = MTU;
    check(ioctl(control, SIOCSIFMTU, &request), "cannot set the MTU of the TUN device");
    request.ifr_qlen = TUN_QUEUE; /* what is to be dropped is dropped and counted here, not there */
    check(ioctl(control, SIOCSIFTXQLEN, &request), "cannot set the queue of the TUN device");
    int ipv6 = open("/proc/sys/net/ipv6/conf/all/disable_ipv6", O_WRONLY | O_CLOEXEC);
    if (ipv6 >= 0) { /* it sends packets of its own accord, which would be counted and lost like the others */
        check((int)write(ipv6, "1", 1), "cannot turn IPv6 off");
        close(ipv6);
    }
    bring_up(control, "lo");
    bring_up(control, "wire");
    close(control);
    int namespace = open("/proc/self/ns/net", O_RDONLY);
    check(namespace, "cannot open the namespace");
    return namespace;
}

static void take(struct direction *way, const struct link *link) {
    for (int i = 0; i < BATCH; i++) {
        struct packet *packet = &way->slots[way->end % SLOTS];
        uint8_t spare[MTU];
        int full = way->end - way->departed >= link->queue || way->end - way->arrived >= SLOTS;
        ssize_t length = read(way->from, full ? spare : packet->data, MTU);
        if (length < 0 && errno != EAGAIN)
            die("cannot read from a TUN device", 1);
        if (length <= 0)
            return;
        way->packets++;
        way->bytes += (uint64_t)length;
        if (full) {
            way->dropped++;
            continue;
        }
        uint64_t now = now_ns(), starts = way->free_ns > now ? way->free_ns : now;
        packet->departs_ns = way->free_ns = starts + (uint64_t)((double)length * link->ns_per_byte);
        packet->length = (uint16_t)length;
        packet->lost = draw(&way->random) < link->loss;
        way->end++;
    }
}

static void deliver(struct direction *way, const struct link *link) {
    uint64_t now = now_ns();
    while (way->departed != way->end && way->slots[way->departed % SLOTS].departs_ns <= now)
        way->departed++;
    for (; way->arrived != way->departed; way->arrived++) {
        const struct packet *packet = &way->slots[way->arrived % SLOTS];
        if (packet->departs_ns + link->delay_ns > now)
            return;
        if (packet->lost)
            way->lost++;
        else if (write(way->to, packet->data, packet->length) != packet->length)
            die("cannot write to a TUN device", 1);
        else
            way->delivered++;
    }
}

/* When deliver() has something to do. */
static uint64_t due_ns(const struct direction *way, const struct link *link) {
    return way->arrived == way->end ? UINT64_MAX : way->slots[way->arrived % SLOTS].departs_ns + link->delay_ns;
}

/* Returns 0 at the end of the input. */
static int answer(const struct direction ways[2]) {
    char lines[256];
    ssize_t length = read(STDIN_FILENO, lines, sizeof lines);
    for (ssize_t i = 0; i < length; i++)
        if (lines[i] == '\n') {
            for (int d = 0; d < 2; d++)
                printf("%lu %lu %lu %lu %lu%c", ways[d].packets, ways[d].bytes, ways[d].dropped, ways[d].lost, ways[d].delivered, d ? '\n' : ' ');
            fflush(stdout);
        }
    return length > 0;
}

int main(int count, char **arguments) {
    if (count != 6) {
        fprintf(stderr, "usage: emulator ONE_WAY_US LOSS_PERCENT RATE_MBIT QUEUE_PACKETS SEED\n");
        return 1;
    }
    struct link link = {
        .delay_ns = (uint64_t)(atof(arguments[1]) * 1e3),
        .loss = atof(arguments[2]) / 100,
        .ns_per_byte = 8e3 / atof(arguments[3]),
        .queue = (uint32_t)atoi(arguments[4]),
    };
    uint64_t seed = strtoull(arguments[5], NULL, 10);
    int tuns[2];
    int a = make_side("10.9.0.1", &tuns[0]), b = make_side("10.9.0.2", &tuns[1]);
    struct direction ways[2] = {{.from = tuns[0], .to = tuns[1], .random = 2 * seed}, {.from = tuns[1], .to = tuns[0], .random = 2 * seed + 1}};
    for (int d = 0; d < 2; d++)
        if ((ways[d].slots = malloc(SLOTS * sizeof *ways[d].slots)) == NULL)
            die("malloc", 1);
    prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
    printf("ready %d %d\n", a, b);
    fflush(stdout);

    struct pollfd ready[3] = {{tuns[0], POLLIN, 0}, {tuns[1], POLLIN, 0}, {STDIN_FILENO, POLLIN, 0}};
    for (;;) {
        uint64_t first = UINT64_MAX, now = now_ns();
        for (int d = 0; d < 2; d++) {
            uint64_t due = due_ns(&ways[d], &link);
            first = due < first ? due : first;
        }
        uint64_t wait = first > now ? first - now : 0;
        struct timespec timeout = {(time_t)(wait / 1000000000u), (long)(wait % 1000000000u)};
        if (ppoll(ready, 3, first == UINT64_MAX ? NULL : &timeout, NULL) < 0 && errno != EINTR)
            die("ppoll", 1);
        for (int d = 0; d < 2; d++) {
            deliver(&ways[d], &link);
            take(&ways[d], &link);
        }
        if (ready[2].revents && !answer(ways))
            return 0;
    }
}
