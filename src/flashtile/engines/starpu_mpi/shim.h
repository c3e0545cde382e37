/* Tiles sent and received by StarPU-MPI: plain C, read by cffi. Handles are those of the StarPU in this process. */

int ftm_start(uintptr_t communicator);
void ftm_stop(void);
void ftm_send(int64_t n, const uint64_t *handles, const int32_t *ranks, const int64_t *tags, uintptr_t communicator);
void ftm_send_first(int64_t n, const uint64_t *handles, const int32_t *ranks, const int64_t *tags, uintptr_t communicator);
void ftm_receive(int64_t n, const uint64_t *handles, const int32_t *ranks, const int64_t *tags, uintptr_t communicator);
int64_t ftm_pending(void);
/* When a transfer was begun or done last: CLOCK_MONOTONIC, ns. */
int64_t ftm_last_event(void);
/* From now on threads that wait in MPI sleep between polls, for workers that share their CPUs. StarPU-MPI's thread polls as
   long as anything is under way, and takes half of a worker's core; with Open MPI's mpi_yield_when_idle it gives up a time
   slice at every poll, and a message takes 10 ms. -1: this MPI has no place for it. */
int ftm_share(void);
