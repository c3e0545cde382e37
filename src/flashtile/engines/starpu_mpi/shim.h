/* Tiles sent and received by StarPU-MPI: plain C, read by cffi. Handles are those of the StarPU in this process. */

int ftm_start(uintptr_t communicator);
void ftm_stop(void);
void ftm_send(int64_t n, const uint64_t *handles, const int32_t *ranks, const int64_t *tags, uintptr_t communicator);
void ftm_send_first(int64_t n, const uint64_t *handles, const int32_t *ranks, const int64_t *tags, uintptr_t communicator);
void ftm_receive(int64_t n, const uint64_t *handles, const int32_t *ranks, const int64_t *tags, uintptr_t communicator);
int64_t ftm_pending(void);
