/*
 * The only program of a lab guest: PID 1, which loads the drivers and then executes lines from a serial line.
 *
 * It is C without a C library, so that tcc alone compiles it, and one process that allocates nothing,
 * so that it still answers when the guest has no memory left. A child holds the memory of the workload;
 * the kernel kills it first, and its end closes a pipe.
 *
 * A line is "<tag> <verb> [numbers]", its answer "<tag> ok [key=value ...]" or "<tag> error <why>".
 * "ready" without a tag is sent once per boot. Sizes are MiB in commands and bytes in answers.
 *
 *   ping                   ok
 *   hold N                 hold N MiB of anonymous memory in all; answered when they are held
 *   grow N RATE            the same at RATE MiB/s; answered at once, "stat" has the progress
 *   cache N                read N MiB of the disk through the page cache
 *   drop                   drop the clean page cache
 *   stat                   total free available cached held oom_kills uptime_ms driver
 *   figures                available held kills: cheap enough to be asked ten times a second
 *   driver load|unload     the balloon driver
 *   reboot, poweroff       not answered
 *
 * Kernel command line: qmpballoon.nodriver, qmpballoon.boot_delay=SECONDS (before any driver loads).
 */

typedef unsigned long word;

/* ---- the processor ---- */

#ifdef __aarch64__

/* As words: tcc has no assembler for this processor. They move the arguments down and do "svc 0; ret". */
static const unsigned svc[] __attribute__((section(".text"))) = {
    0xaa0003e8, 0xaa0103e0, 0xaa0203e1, 0xaa0303e2, 0xaa0403e3, 0xaa0503e4, 0xaa0603e5, 0xd4000001, 0xd65f03c0
};
#define syscall6 ((long (*)(long, long, long, long, long, long, long))svc)

void run(void);
void _start(void) { run(); }

/* include/uapi/asm-generic/unistd.h; "at" is for the calls that have a directory or flags in addition */
enum {
    READ = 63, WRITE = 64, CLOSE = 57, LSEEK = 62, MMAP = 222, IOCTL = 29, MADVISE = 233, NANOSLEEP = 101,
    EXIT = 93, WAIT4 = 260, SYNC = 81, MOUNT = 40, REBOOT = 142, DELETE_MODULE = 106, CLOCK_GETTIME = 113,
    FINIT_MODULE = 273
};
enum { OPENAT = 56, PIPE2 = 59, PPOLL = 73, CLONE = 220 };
#define open_file(path, flags) syscall6(OPENAT, -100, (long)(path), flags, 0, 0, 0)
#define make_pipe(ends) syscall6(PIPE2, (long)(ends), 0, 0, 0, 0, 0)
#define wait_for(ports, count) syscall6(PPOLL, (long)(ports), count, 0, 0, 0, 0)
#define fork() syscall6(CLONE, 17, 0, 0, 0, 0, 0) /* SIGCHLD */
#define LINE "/dev/ttyS0" /* a PCI card; the console is ttyAMA0 */

#else

__asm__(".text\n"
        ".globl _start\n"
        "_start:\n"
        "  call run\n"
        ".globl syscall6\n"
        "syscall6:\n"
        "  mov %rdi, %rax\n"
        "  mov %rsi, %rdi\n"
        "  mov %rdx, %rsi\n"
        "  mov %rcx, %rdx\n"
        "  mov %r8, %r10\n"
        "  mov %r9, %r8\n"
        "  mov 8(%rsp), %r9\n"
        "  syscall\n"
        "  ret\n");

long syscall6(long number, long a, long b, long c, long d, long e, long f);

/* arch/x86/entry/syscalls/syscall_64.tbl */
enum {
    READ = 0, WRITE = 1, OPEN = 2, CLOSE = 3, POLL = 7, LSEEK = 8, MMAP = 9, IOCTL = 16, PIPE = 22,
    MADVISE = 28, NANOSLEEP = 35, FORK = 57, EXIT = 60, WAIT4 = 61, SYNC = 162, MOUNT = 165, REBOOT = 169,
    DELETE_MODULE = 176, CLOCK_GETTIME = 228, FINIT_MODULE = 313
};
#define open_file(path, flags) syscall6(OPEN, (long)(path), flags, 0, 0, 0, 0)
#define make_pipe(ends) syscall6(PIPE, (long)(ends), 0, 0, 0, 0, 0)
#define wait_for(ports, count) syscall6(POLL, (long)(ports), count, -1, 0, 0, 0)
#define fork() syscall6(FORK, 0, 0, 0, 0, 0, 0)
#define LINE "/dev/ttyS1" /* the console is ttyS0 */

#endif

#define SYS(number, a, b, c) syscall6(number, (long)(a), (long)(b), (long)(c), 0, 0, 0)

enum { PAGE = 4096, MIB = 1 << 20, PAGES_PER_MIB = MIB / PAGE, CHUNK_PAGES = 64 };

static const word REGION = 1UL << 36; /* of addresses, not of memory: more than any lab guest has */

struct order { /* shared with the holder; init writes the first three, the holder the last */
    volatile word pages, pages_per_s, number, held;
};

static struct order *order;
static int serial, order_pipe[2], done_pipe[2], holder;
static word kills; /* of the holder, since boot */
static char hold_tag[32]; /* of the "hold" that is not answered yet, or "" */

void *memset(void *to, int byte, word size) { char *p = to; while (size--) *p++ = byte; return to; }
void *memcpy(void *to, const void *from, word size)
{
    char *t = to;
    const char *f = from;
    while (size--) *t++ = *f++;
    return to;
}

/* ---- text ---- */

static word length(const char *s) { word n = 0; while (s[n]) n++; return n; }

static char *find(char *in, const char *what)
{
    for (; *in; in++) {
        word i = 0;
        while (what[i] && in[i] == what[i]) i++;
        if (!what[i]) return in;
    }
    return 0;
}

static int same(const char *a, const char *b) { while (*a && *a == *b) a++, b++; return *a == *b; }

static word number(const char *s)
{
    word n = 0;
    while (*s == ' ') s++;
    while (*s >= '0' && *s <= '9' && n < 1UL << 40) n = n * 10 + (*s++ - '0');
    return n;
}

static char *put(char *to, const char *s) { while (*s) *to++ = *s++; *to = 0; return to; }

static char *put_number(char *to, word n)
{
    char digits[24], *d = digits + sizeof digits - 1;
    *d = 0;
    do *--d = '0' + n % 10; while (n /= 10);
    return put(to, d);
}

static char *put_field(char *to, const char *name, word n)
{
    return put_number(put(put(put(to, " "), name), "="), n);
}

static void send_line(const char *tag, const char *what) /* one write per line, so that lines stay whole */
{
    char line[512], *end = put(line, tag);
    if (*tag) end = put(end, " ");
    end = put(put(end, what), "\n");
    SYS(WRITE, serial, line, end - line);
}

/* ---- kernel ---- */

static word now_ms(void)
{
    long time[2];
    SYS(CLOCK_GETTIME, 1, time, 0); /* CLOCK_MONOTONIC */
    return time[0] * 1000 + time[1] / 1000000;
}

static void sleep_ms(word ms)
{
    long time[2];
    time[0] = ms / 1000;
    time[1] = ms % 1000 * 1000000;
    SYS(NANOSLEEP, time, 0, 0);
}

static char *text_of(const char *path) /* a file's first 16 KiB; the text lives until the next call */
{
    static char text[16384];
    long size = 0, got = 1, file = open_file(path, 0);
    while (file >= 0 && got > 0 && size < sizeof text - 1)
        if ((got = SYS(READ, file, text + size, sizeof text - 1 - size)) > 0) size += got;
    text[size] = 0;
    if (file >= 0) SYS(CLOSE, file, 0, 0);
    return text;
}

static word number_in(const char *path, const char *key)
{
    char *at = find(text_of(path), key);
    return at ? number(at + length(key)) : 0;
}

static long write_file(const char *path, const char *text)
{
    long written, file = open_file(path, 1);
    if (file < 0) return file;
    written = SYS(WRITE, file, text, length(text));
    SYS(CLOSE, file, 0, 0);
    return written;
}

static void *map(word size, int flags) { return (void *)syscall6(MMAP, 0, size, 3, flags, -1, 0); }

static int driver_is_loaded(void)
{
    long file = open_file("/sys/module/virtio_balloon/initstate", 0);
    if (file >= 0) SYS(CLOSE, file, 0, 0);
    return file >= 0;
}

static long load(const char *path)
{
    long result, file = open_file(path, 0);
    if (file < 0) return file;
    result = SYS(FINIT_MODULE, file, "", 0);
    SYS(CLOSE, file, 0, 0);
    return result;
}

/* ---- the holder ---- */

static void hold(void)
{
    char byte[16], *region = map(REGION, 0x4022); /* MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE */
    word seen = 0, start_ms = 0, start_pages = 0, held = 0;
    write_file("/proc/self/oom_score_adj", "1000");
    SYS(MADVISE, region, REGION, 15); /* MADV_NOHUGEPAGE: a page touched is a page held */
    for (;;) {
        word wanted = order->pages, allowed = wanted, stop;
        if (seen != order->number) {
            seen = order->number;
            start_ms = now_ms();
            start_pages = held;
        }
        if (wanted < held) {
            SYS(MADVISE, region + wanted * PAGE, (held - wanted) * PAGE, 4); /* MADV_DONTNEED */
            order->held = held = wanted;
        }
        if (order->pages_per_s) allowed = start_pages + (now_ms() - start_ms) * order->pages_per_s / 1000;
        if (allowed > wanted) allowed = wanted;
        for (stop = held + CHUNK_PAGES; held < allowed && held < stop; held++)
            *(volatile word *)(region + held * PAGE) = held + 1;
        order->held = held;
        if (seen != order->number) continue;
        if (held == wanted) {
            SYS(WRITE, done_pipe[1], "d", 1);
            if (SYS(READ, order_pipe[0], byte, sizeof byte) <= 0) SYS(EXIT, 1, 0, 0);
        } else if (held == allowed) {
            sleep_ms(5);
        }
    }
}

static void close_pipe(int *ends) { SYS(CLOSE, ends[0], 0, 0); SYS(CLOSE, ends[1], 0, 0); }

static int start_holder(void)
{
    order->held = 0;
    if (make_pipe(order_pipe) < 0) return -1;
    if (make_pipe(done_pipe) < 0) return close_pipe(order_pipe), -1;
    holder = fork();
    if (holder < 0) return close_pipe(order_pipe), close_pipe(done_pipe), holder = 0, -1;
    if (!holder) {
        SYS(CLOSE, order_pipe[1], 0, 0);
        SYS(CLOSE, done_pipe[0], 0, 0);
        hold();
    }
    SYS(CLOSE, order_pipe[0], 0, 0);
    SYS(CLOSE, done_pipe[1], 0, 0);
    return 0;
}

static void end_hold(const char *answer)
{
    if (*hold_tag) send_line(hold_tag, answer);
    *hold_tag = 0;
}

static void read_holder(void)
{
    char bytes[16];
    if (SYS(READ, done_pipe[0], bytes, sizeof bytes) > 0) {
        if (order->held == order->pages) end_hold("ok");
        return;
    }
    SYS(CLOSE, order_pipe[1], 0, 0);
    SYS(CLOSE, done_pipe[0], 0, 0);
    syscall6(WAIT4, holder, 0, 0, 0, 0, 0);
    holder = order->held = 0;
    kills++;
    end_hold("error killed");
}

static void give_order(const char *tag, word mib, word mib_per_s, int wait)
{
    end_hold("error superseded");
    if (mib * MIB > REGION) return send_line(tag, "error too-much");
    if (!holder && start_holder() < 0) return send_line(tag, "error no-process");
    order->pages_per_s = mib_per_s * PAGES_PER_MIB;
    order->pages = mib * PAGES_PER_MIB;
    order->number++;
    if (wait) put(hold_tag, tag);
    else send_line(tag, "ok");
    SYS(WRITE, order_pipe[1], "o", 1);
}

/* ---- the commands ---- */

static void stat_line(const char *tag)
{
    char answer[512], *end = put(answer, "ok");
    word cached;
    end = put_field(end, "total", number_in("/proc/meminfo", "MemTotal:") * 1024);
    end = put_field(end, "free", number_in("/proc/meminfo", "MemFree:") * 1024);
    end = put_field(end, "available", number_in("/proc/meminfo", "MemAvailable:") * 1024);
    cached = number_in("/proc/meminfo", "\nCached:") + number_in("/proc/meminfo", "Buffers:");
    end = put_field(end, "cached", cached * 1024);
    end = put_field(end, "held", order->held * PAGE);
    end = put_field(end, "oom_kills", number_in("/proc/vmstat", "\noom_kill "));
    end = put_field(end, "uptime_ms", now_ms());
    put_field(end, "driver", driver_is_loaded());
    send_line(tag, answer);
}

static void figures_line(const char *tag)
{
    char answer[256], *end = put(answer, "ok");
    end = put_field(end, "available", number_in("/proc/meminfo", "MemAvailable:") * 1024);
    end = put_field(end, "held", order->held * PAGE);
    put_field(end, "kills", kills);
    send_line(tag, answer);
}

static void read_disk(const char *tag, word mib)
{
    static char block[65536];
    static long disk = -1; /* stays open: the last close of a disk drops its cache */
    word left = mib * MIB;
    if (disk < 0) disk = open_file("/dev/vda", 0);
    if (disk < 0) return send_line(tag, "error no-disk");
    SYS(LSEEK, disk, 0, 0);
    while (left && SYS(READ, disk, block, sizeof block) == sizeof block) left -= sizeof block;
    send_line(tag, left ? "error disk-too-small" : "ok");
}

static void end_guest(long action)
{
    SYS(SYNC, 0, 0, 0);
    syscall6(REBOOT, 0xfee1dead, 672274793, action, 0, 0, 0);
}

static void execute(char *line)
{
    char *tag = line, *verb, *rest;
    if (!(verb = find(line, " "))) return; /* no tag: noise on the line, or a line cut by a reboot */
    *verb++ = 0;
    if (length(tag) >= sizeof hold_tag) return;
    if ((rest = find(verb, " "))) *rest++ = 0;
    else rest = "";
    if (same(verb, "ping")) send_line(tag, "ok");
    else if (same(verb, "stat")) stat_line(tag);
    else if (same(verb, "figures")) figures_line(tag);
    else if (same(verb, "hold")) give_order(tag, number(rest), 0, 1);
    else if (same(verb, "grow")) {
        char *rate = find(rest, " ");
        if (rate && number(rate)) give_order(tag, number(rest), number(rate), 0);
        else send_line(tag, "error no-rate");
    } else if (same(verb, "cache")) read_disk(tag, number(rest));
    else if (same(verb, "drop")) send_line(tag, write_file("/proc/sys/vm/drop_caches", "3") > 0 ? "ok" : "error");
    else if (same(verb, "driver") && same(rest, "load"))
        send_line(tag, load("/modules/virtio_balloon.ko") ? "error not-loaded" : "ok");
    else if (same(verb, "driver") && same(rest, "unload")) /* 04000 is O_NONBLOCK, as rmmod has it */
        send_line(tag, SYS(DELETE_MODULE, "virtio_balloon", 04000, 0) ? "error not-unloaded" : "ok");
    else if (same(verb, "reboot")) end_guest(0x01234567);
    else if (same(verb, "poweroff")) end_guest(0x4321fedc);
    else send_line(tag, "error unknown-verb");
}

static void load_modules(int with_balloon)
{
    char list[2048], *name, *end;
    put(list, text_of("/modules/order"));
    for (name = list; (end = find(name, "\n")); name = end + 1) {
        *end = 0;
        if ((with_balloon || !find(name, "virtio_balloon")) && load(name)) {
            SYS(WRITE, 1, "lab: cannot load ", 17);
            SYS(WRITE, 1, name, length(name));
            SYS(WRITE, 1, "\n", 1);
        }
    }
}

static void open_serial(void)
{
    unsigned terminal[9]; /* struct termios of the kernel: four flag words, the line, 19 characters */
    serial = open_file(LINE, 02 | 0400);         /* O_RDWR | O_NOCTTY */
    SYS(IOCTL, serial, 0x5401, terminal);        /* TCGETS */
    terminal[0] = terminal[1] = terminal[3] = 0; /* raw: no translation, no echo, no lines */
    terminal[2] = 010002 | 060 | 0200 | 04000;   /* B115200 CS8 CREAD CLOCAL */
    SYS(IOCTL, serial, 0x5402, terminal);        /* TCSETS */
}

void run(void)
{
    static char line[256];
    struct { int fd; short events, revents; } ports[2];
    word used = 0;
    int nodriver;
    SYS(MOUNT, "proc", "/proc", "proc");
    SYS(MOUNT, "sysfs", "/sys", "sysfs");
    SYS(MOUNT, "devtmpfs", "/dev", "devtmpfs");
    order = map(PAGE, 0x21); /* MAP_SHARED | MAP_ANONYMOUS */
    sleep_ms(number_in("/proc/cmdline", "qmpballoon.boot_delay=") * 1000);
    nodriver = find(text_of("/proc/cmdline"), "qmpballoon.nodriver") != 0;
    load_modules(!nodriver);
    open_serial();
    send_line("", "ready");
    for (;;) {
        ports[0].fd = serial;
        ports[1].fd = done_pipe[0];
        ports[0].events = ports[1].events = 1; /* POLLIN */
        ports[0].revents = ports[1].revents = 0;
        wait_for(ports, holder ? 2 : 1);
        if (ports[1].revents) read_holder();
        if (ports[0].revents) {
            char byte;
            if (SYS(READ, serial, &byte, 1) != 1) continue;
            if (byte == '\n') {
                line[used] = 0;
                used = 0;
                execute(line);
            } else if (used < sizeof line - 1) {
                line[used++] = byte;
            }
        }
    }
}
