/* The part that must be compiled against the installed StarPU-MPI and MPI. A communicator comes by its address
   (mpi4py's MPI._addressof). Transfers are detached: StarPU-MPI's own thread makes them progress; a send waits for
   the tasks that write the tile, tasks that read a received tile wait for it. */

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <starpu_mpi.h>
#include "shim.h"

#define POLLS_NS 5000        /* for so long a thread polls at a stretch: once around all that is under way */
#define SHORTEST_NAP_NS 20000
#define LONGEST_NAP_NS 500000 /* a wake-up costs up to 40 us of a core in a virtual machine */
#define ELSEWHERE_NS 100000  /* who has not polled for so long was not waiting */
#define SLICE_NS 100000      /* the least that Linux allows */

static _Atomic int64_t pending, last_event;

static int64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void transferred(void *unused)
{
	(void)unused;
	atomic_store(&last_event, now());
	atomic_fetch_sub(&pending, 1);
}

/* Let StarPU-MPI's thread, when it wakes, take a core from a worker at once rather than at the next tick. */
static void be_brief(void)
{
	struct { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority; uint64_t slice, rest[2]; } a;
	char name[16] = "";
	pthread_getname_np(pthread_self(), name, sizeof name);
	if (strcmp(name, "MPI")) return;
	prctl(PR_SET_TIMERSLACK, 1000ul);
	if (syscall(SYS_sched_getattr, 0, &a, (unsigned)sizeof a, 0u)) return;
	a.flags = 0;
	a.slice = SLICE_NS; /* ignored before Linux 6.12 */
	syscall(SYS_sched_setattr, 0, &a, 0u);
}

/* Open MPI calls it whenever a thread has polled. Who polls in vain sleeps a quarter of the time it has waited. */
static int nap(void)
{
	static __thread int64_t since, woke;
	static __thread bool known;
	int64_t t = now(), event = atomic_load(&last_event);
	if (!known) be_brief(), known = true;
	if (t - woke > ELSEWHERE_NS) since = woke = t;
	if (event > since) since = event;
	if (t - woke < POLLS_NS) return 0;
	int64_t ns = (t - since) / 4;
	ns = ns < SHORTEST_NAP_NS ? SHORTEST_NAP_NS : ns > LONGEST_NAP_NS ? LONGEST_NAP_NS : ns;
	nanosleep(&(struct timespec){0, ns}, NULL);
	woke = now();
	return 0;
}

int ftm_share(void)
{
	static bool registered;
	/* Of Open MPI's library below its MPI; other MPIs have no such place. */
	int (*add)(int (*)(void)) = (int (*)(int (*)(void)))dlsym(RTLD_DEFAULT, "opal_progress_register");
	bool (*yields)(bool) = (bool (*)(bool))dlsym(RTLD_DEFAULT, "opal_progress_set_yield_when_idle");
	if (!add || !yields) return -1;
	if (!registered && add(nap)) return -1;
	registered = true;
	yields(false);
	return 0;
}

/* StarPU runs already, and so does MPI. */
int ftm_start(uintptr_t communicator) { return starpu_mpi_init_comm(NULL, NULL, 0, *(MPI_Comm *)communicator); }

void ftm_stop(void) { starpu_mpi_shutdown(); }

int64_t ftm_last_event(void) { return atomic_load(&last_event); }

/* Transfers that were begun here and are not done. */
int64_t ftm_pending(void) { return atomic_load(&pending); }

static void send(int64_t n, const uint64_t *handles, const int32_t *ranks, const int64_t *tags, uintptr_t communicator,
                 int priority)
{
	MPI_Comm comm = *(MPI_Comm *)communicator;
	atomic_store(&last_event, now());
	atomic_fetch_add(&pending, n);
	for (int64_t i = 0; i < n; i++)
		starpu_mpi_isend_detached_prio((starpu_data_handle_t)(uintptr_t)handles[i], ranks[i], tags[i], priority, comm,
		                               transferred, NULL);
}

void ftm_send(int64_t n, const uint64_t *handles, const int32_t *ranks, const int64_t *tags, uintptr_t communicator)
{
	send(n, handles, ranks, tags, communicator, 0);
}

void ftm_send_first(int64_t n, const uint64_t *handles, const int32_t *ranks, const int64_t *tags, uintptr_t communicator)
{
	send(n, handles, ranks, tags, communicator, 1);
}

void ftm_receive(int64_t n, const uint64_t *handles, const int32_t *ranks, const int64_t *tags, uintptr_t communicator)
{
	MPI_Comm comm = *(MPI_Comm *)communicator;
	atomic_store(&last_event, now());
	atomic_fetch_add(&pending, n);
	for (int64_t i = 0; i < n; i++)
		starpu_mpi_irecv_detached((starpu_data_handle_t)(uintptr_t)handles[i], ranks[i], tags[i], comm, transferred, NULL);
}
