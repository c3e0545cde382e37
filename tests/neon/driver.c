/* Calls a kernel in this (emulated) process on the memory of the process that started it.
 *
 * usage: driver PID ARGUMENT...     up to 8 integers or addresses, as the caller has them
 *
 * A page of the caller is copied to the same address here when the kernel first touches it; at the end just the bytes
 * that changed are written back.  So the kernel sees the addresses that it would see at home, whatever they
 * point to, and an access to memory that the caller does not have ends this process as it would the caller. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 1 << 16, NO_MEMORY = 120, NO_PAGE, NO_ROOM, NO_WRITE };

int32_t ENTRY(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);

static int memory;
static size_t count;
static struct page { char *here, *before; } pages[PAGES];

static void end(int status, const char *reason, const void *address) {
    fprintf(stderr, "driver: %s at %p\n", reason, address);
    _exit(status);
}

static void bring(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    char *at = (char *)((uintptr_t)info->si_addr & ~(uintptr_t)(PAGE - 1));
    if (count == PAGES)
        end(NO_ROOM, "more pages than the table holds", at);
    char *before = malloc(PAGE);
    if (pread(memory, before, PAGE, (off_t)(uintptr_t)at) != PAGE)
        end(NO_PAGE, "the kernel touches memory that its caller does not have,", info->si_addr);
    char *here = mmap(at, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (here != at)
        end(NO_ROOM, "the emulator itself lives", at);
    memcpy(here, before, PAGE);
    pages[count++] = (struct page){here, before};
}

static void give_back(struct page p) {
    for (int i = 0; i < PAGE; i++) {
        int from = i;
        while (i < PAGE && p.here[i] != p.before[i])
            i++;
        if (i > from && pwrite(memory, p.here + from, i - from, (off_t)(uintptr_t)(p.here + from)) != i - from)
            end(NO_WRITE, "cannot write the caller's memory", p.here + from);
    }
}

int main(int argc, char **argv) {
    char path[64];
    int64_t a[8] = {0};
    snprintf(path, sizeof path, "/proc/%s/mem", argv[1]);
    if ((memory = open(path, O_RDWR)) < 0) {
        perror(path);
        return NO_MEMORY;
    }
    for (int i = 2; i < argc && i < 10; i++)
        a[i - 2] = strtoll(argv[i], NULL, 10);
    struct sigaction action = {.sa_sigaction = bring, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, NULL);
    int32_t status = ENTRY(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
    for (size_t i = 0; i < count; i++)
        give_back(pages[i]);
    return status;
}
