/* What Python sees of the shim: plain C, read by cffi. No StarPU struct appears here, because their sizes depend on
   StarPU's version and configuration; only shim.c, compiled against the installed header, knows them. */

#define FT_BUFFERS 12
#define FT_VALUES 6
#define FT_WORDS 160

typedef struct ft_codelet ft_codelet;
typedef struct ft_job ft_job;

/* A kernel with the parameter block that its tasks share; not written while a task may run. Binding n: the address of
   the task's handle number handle[n] goes to block[address_word[n]], less the address of binding from[n] unless that is
   -1; its bytes between rows go to block[stride_word[n]], unless that is -1. Where inner_word is not -1, that word
   becomes the address of word inner_at of the task's own copy of the block.

   A task of several heads runs once for each: head m is plane m / per[n] of the handle, and m * moves[n] bytes from where
   its kernel, which counts heads itself, would look. heads: of a batch, to name the one that failed; 0 if there are none.

   cpu: int32_t (const char *params, int64_t begin, int64_t end, char *scratch), cuda: a ft_kernels (launch.h); either is 0
   where there is none. A task goes only where its program has a kernel. */
typedef struct {
	uintptr_t cpu, cuda;
	int32_t words, handles, bindings, values, inner_word, inner_at, heads;
	int32_t handle[FT_BUFFERS], address_word[FT_BUFFERS], stride_word[FT_BUFFERS], from[FT_BUFFERS], per[FT_BUFFERS];
	int64_t moves[FT_BUFFERS];
	int32_t value_word[FT_VALUES];
	int64_t block[FT_WORDS];
} ft_program;

/* One task: work items [begin, end) of a program, and with several heads those of each, `step` further on. Handle n stands
   rows[n] rows and bytes[n] bytes into the whole that a CPU's kernel believes it works on; sizes are what a GPU's kernels
   need (cuda.py). tile: the numbers by which an error names the task. Bit n of turned: in the block of handle n heads lie
   closer together than rows. */
typedef struct {
	const ft_program *program;
	int64_t begin, end, step;
	int64_t rows[FT_BUFFERS], bytes[FT_BUFFERS], values[FT_VALUES], sizes[FT_SIZES], tile[4];
	double flops;
	uint32_t footprint;
	int32_t priority, heads;
	uint32_t turned;
} ft_task;

typedef struct {
	int32_t status, worker;
	int64_t tile[4], pending;
	char codelet[64], detail[FT_DETAIL];
} ft_report;

/* What a profile keeps of one task: microseconds of StarPU's clock; ran: 0 where an earlier error skipped it. */
typedef struct {
	double submit, start, end;
	int32_t worker, ran, status;
} ft_event;

int ft_version(int *runtime);
int ft_constant(const char *name);
int ft_scheduler_name(int n, char *name, int size);
int ft_is_initialized(void);
int ft_init(int cpus, int cudas, const char *scheduler, int calibrate);
void ft_shutdown(void);
void ft_pause(void);
void ft_resume(void);
int ft_workers(int architecture);
int ft_worker_name(int worker, char *name, int size);

ft_codelet *ft_codelet_new(const char *name);
void ft_codelet_free(ft_codelet *codelet);
void ft_codelet_implement(ft_codelet *codelet, int architectures);
void ft_codelet_where(ft_codelet *codelet, int architectures);

ft_job *ft_job_new(void);
void ft_job_free(ft_job *job);
int ft_job_wait(ft_job *job, int milliseconds);
void ft_job_stop(ft_job *job);
void ft_job_report(ft_job *job, ft_report *report);
void ft_job_clear(ft_job *job);

int ft_submit(ft_job *job, ft_codelet *codelet, int64_t n, int buffers, const uint64_t *handles, const int32_t *modes,
	const ft_task *tasks, ft_event *events, int64_t *submitted);
int ft_profiling(int on);

void ft_register_matrices(int64_t n, const uint64_t *address, const uint32_t *ld, const uint32_t *columns,
	const uint32_t *rows, uint64_t itemsize, uint64_t *handles);
void ft_register_variables(int64_t n, const uint64_t *address, const uint64_t *nbytes, uint64_t *handles);
void ft_register_blocks(int64_t n, const uint64_t *address, const uint32_t *ldy, const uint32_t *ldz, const uint32_t *nx,
	const uint32_t *ny, const uint32_t *nz, uint64_t itemsize, uint64_t *handles);
void ft_unregister(int64_t n, const uint64_t *handles, int how);
int ft_acquire(uint64_t handle, int mode);
void ft_release(uint64_t handle);
uintptr_t ft_pointer(uint64_t handle, int turned, int64_t *row_bytes, int64_t *plane_bytes);
int64_t ft_nbytes(uint64_t handle);

double ft_expected_length(ft_codelet *codelet, uint64_t *handles, const int32_t *modes, int n, const ft_task *task);
void ft_run_cuda(ft_job *job, ft_codelet *codelet, const ft_task *task, int n, const uint64_t *address,
	const uint32_t *ld, const uint32_t *ldz, const uint64_t *itemsize);
