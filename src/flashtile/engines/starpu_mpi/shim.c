/* The part that must be compiled against the installed StarPU-MPI and MPI. A communicator comes by its address
   (mpi4py's MPI._addressof). Transfers are detached: StarPU-MPI's own thread makes them progress; a send waits for
   the tasks that write the tile, tasks that read a received tile wait for it. */

#include <stdatomic.h>
#include <stdint.h>
#include <starpu_mpi.h>
#include "shim.h"

static _Atomic int64_t pending;

static void transferred(void *unused)
{
	(void)unused;
	atomic_fetch_sub(&pending, 1);
}

/* StarPU runs already, and so does MPI. */
int ftm_start(uintptr_t communicator) { return starpu_mpi_init_comm(NULL, NULL, 0, *(MPI_Comm *)communicator); }

void ftm_stop(void) { starpu_mpi_shutdown(); }

/* Transfers that were begun here and are not done. */
int64_t ftm_pending(void) { return atomic_load(&pending); }

static void send(int64_t n, const uint64_t *handles, const int32_t *ranks, const int64_t *tags, uintptr_t communicator,
                 int priority)
{
	MPI_Comm comm = *(MPI_Comm *)communicator;
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
	atomic_fetch_add(&pending, n);
	for (int64_t i = 0; i < n; i++)
		starpu_mpi_irecv_detached((starpu_data_handle_t)(uintptr_t)handles[i], ranks[i], tags[i], comm, transferred, NULL);
}
