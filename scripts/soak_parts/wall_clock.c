/*
 * A wall clock for one process, for LD_PRELOAD: the machine's, moved by the seconds in the file $SOAK_CLOCK (a
 * 64-bit number, which may change at any time). All other clocks, and so all waits, stay those of the machine.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long moved_s(void)
{
    static volatile long *seconds;
    if (!seconds) {
        const char *file = getenv("SOAK_CLOCK");
        int descriptor = file ? open(file, O_RDONLY | O_CLOEXEC) : -1;
        void *mapped;
        if (descriptor < 0)
            return 0;
        mapped = mmap(0, sizeof *seconds, PROT_READ, MAP_SHARED, descriptor, 0);
        close(descriptor);
        if (mapped == MAP_FAILED)
            return 0;
        seconds = mapped;
    }
    return *seconds;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = syscall(SYS_clock_gettime, clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += moved_s();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    int result = syscall(SYS_gettimeofday, now, zone);
    if (result == 0 && now)
        now->tv_sec += moved_s();
    return result;
}

time_t time(time_t *to)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (to)
        *to = now.tv_sec;
    return now.tv_sec;
}
