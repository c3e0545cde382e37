/* The part of the binding that must be compiled against the installed StarPU: codelets whose tasks run a kernel of
   flashtile on the tiles that StarPU hands them, jobs that count tasks and keep the first error, and batches. */

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <starpu.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include "launch_internal.h"
#include "shim.h"

#define CACHE_LINE 64
#define NODE_OF(address) ((address) ? STARPU_MAIN_RAM : -1)

typedef int32_t (*cpu_kernel)(const char *params, int64_t begin, int64_t end, char *scratch);

struct ft_codelet {
	struct starpu_codelet cl; /* first: a task's codelet is cast back */
	struct starpu_perfmodel model;
	char name[64];
};

struct ft_job {
	int64_t pending;
	_Atomic int stopped;
	ft_report first;
};

/* What StarPU copies for each task. */
typedef struct {
	ft_task task;
	ft_job *job;
	ft_event *event; /* NULL: no profile */
	ft_codelet *codelet;
	int buffers;
} argument;

/* One lock for the counters of all jobs, so that a job may be freed as soon as its last task has left it. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t idle = PTHREAD_COND_INITIALIZER;

/* ---- runtime ---- */

int ft_version(int *runtime)
{
	starpu_get_version(&runtime[0], &runtime[1], &runtime[2]);
	return STARPU_MAJOR_VERSION * 10000 + STARPU_MINOR_VERSION * 100 + STARPU_RELEASE_VERSION;
}

int ft_constant(const char *name)
{
	static const struct { const char *name; int value; } table[] = {
		{"R", STARPU_R}, {"W", STARPU_W}, {"RW", STARPU_RW}, {"SCRATCH", STARPU_SCRATCH},
		{"COMMUTE", STARPU_COMMUTE}, {"CPU", STARPU_CPU}, {"CUDA", STARPU_CUDA},
		{"MAXCPUS", STARPU_MAXCPUS}, {"NMAXWORKERS", STARPU_NMAXWORKERS}, {"NMAXBUFS", STARPU_NMAXBUFS},
#ifdef STARPU_USE_CUDA
		{"USE_CUDA", 1},
#else
		{"USE_CUDA", 0},
#endif
	};
	for (size_t i = 0; i < sizeof table / sizeof *table; i++)
		if (!strcmp(name, table[i].name)) return table[i].value;
	return -1;
}

int ft_scheduler_name(int n, char *name, int size)
{
	struct starpu_sched_policy **policies = starpu_sched_get_predefined_policies();
	for (int i = 0; policies[i]; i++)
		if (i == n) { snprintf(name, size, "%s", policies[i]->policy_name); return 1; }
	return 0;
}

int ft_is_initialized(void) { return starpu_is_initialized(); }

int ft_init(int cpus, int cudas, const char *scheduler, int calibrate)
{
	struct starpu_conf conf;
	int status = starpu_conf_init(&conf); /* reads the environment; what the caller chose comes on top */
	if (status) return status;
	if (cpus >= 0 || cudas >= 0) conf.precedence_over_environment_variables = 1;
	if (cpus >= 0) conf.ncpus = cpus;
	if (cudas >= 0) conf.ncuda = cudas;
	if (*scheduler) conf.sched_policy_name = scheduler;
	if (calibrate >= 0) conf.calibrate = calibrate;
	conf.catch_signals = 0; /* Ctrl-C belongs to Python */
	return starpu_init(&conf);
}

void ft_shutdown(void)
{
	starpu_shutdown();
	ft_driver_forget(); /* the contexts of its workers ended */
}

void ft_pause(void) { starpu_pause(); }
void ft_resume(void) { starpu_resume(); }

int ft_workers(int architecture)
{
	if (architecture == STARPU_CUDA) return (int)starpu_cuda_worker_get_count();
	return architecture == STARPU_CPU ? (int)starpu_cpu_worker_get_count() : (int)starpu_worker_get_count();
}

int ft_worker_name(int worker, char *name, int size)
{
	if (worker < 0 || worker >= (int)starpu_worker_get_count()) return 0;
	starpu_worker_get_name(worker, name, size);
	return 1;
}

/* ---- jobs ---- */

ft_job *ft_job_new(void) { return calloc(1, sizeof(ft_job)); }
void ft_job_free(ft_job *job) { free(job); }
void ft_job_stop(ft_job *job) { job->stopped = 1; }

static void change_pending(ft_job *job, int64_t by)
{
	pthread_mutex_lock(&lock);
	job->pending += by;
	if (!job->pending) pthread_cond_broadcast(&idle);
	pthread_mutex_unlock(&lock);
}

int ft_job_wait(ft_job *job, int milliseconds)
{
	struct timespec until;
	int64_t pending;
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += milliseconds / 1000;
	until.tv_nsec += milliseconds % 1000 * 1000000L;
	if (until.tv_nsec >= 1000000000L) { until.tv_sec++; until.tv_nsec -= 1000000000L; }
	pthread_mutex_lock(&lock);
	while (job->pending && pthread_cond_timedwait(&idle, &lock, &until) != ETIMEDOUT)
		continue;
	pending = job->pending;
	pthread_mutex_unlock(&lock);
	return pending != 0;
}

void ft_job_report(ft_job *job, ft_report *report)
{
	pthread_mutex_lock(&lock);
	*report = job->first;
	report->pending = job->pending;
	pthread_mutex_unlock(&lock);
}

void ft_job_clear(ft_job *job)
{
	pthread_mutex_lock(&lock);
	memset(&job->first, 0, sizeof job->first);
	job->stopped = 0;
	pthread_mutex_unlock(&lock);
}

/* head: which one of the task's; detail: the reason in words, where there is more to say than the status. */
static void record(const argument *a, int head, int32_t status, const char *detail)
{
	pthread_mutex_lock(&lock);
	if (!a->job->first.status) {
		ft_report *first = &a->job->first;
		first->status = status;
		first->worker = starpu_worker_get_id();
		memcpy(first->tile, a->task.tile, sizeof first->tile);
		if (a->task.program->heads) {
			int64_t heads = a->task.program->heads, at = first->tile[0] * heads + first->tile[1] + head;
			first->tile[0] = at / heads;
			first->tile[1] = at % heads;
		}
		snprintf(first->codelet, sizeof first->codelet, "%s", a->codelet->name);
		snprintf(first->detail, sizeof first->detail, "%s", detail);
	}
	a->job->stopped = 1;
	pthread_mutex_unlock(&lock);
}

static void task_done(void *job) { change_pending(job, -1); }

/* As task_done, with what StarPU measured; its times are there before the callback runs, and gone after it. */
static void profiled_task_done(void *job)
{
	struct starpu_task *task = starpu_task_get_current();
	const struct starpu_profiling_task_info *info = task->profiling_info;
	ft_event *event = ((const argument *)task->cl_arg)->event;
	if (info) {
		event->submit = starpu_timing_timespec_to_us((struct timespec *)&info->submit_time);
		event->start = starpu_timing_timespec_to_us((struct timespec *)&info->start_time);
		event->end = starpu_timing_timespec_to_us((struct timespec *)&info->end_time);
		event->worker = info->workerid;
	}
	change_pending(job, -1);
}

/* Whether StarPU measures every task; returns whether it did before. */
int ft_profiling(int on)
{
	return starpu_profiling_status_set(on ? STARPU_PROFILING_ENABLE : STARPU_PROFILING_DISABLE);
}

/* ---- codelets ---- */

/* Where a tile lies: bytes between its rows, 0 where they are adjacent, and between its heads, 0 where it has but one. */
typedef struct { uintptr_t address; int64_t row_bytes, plane_bytes; } where;

/* The tile behind one interface; turned: in a block, heads are the axis in the middle. */
static where locate(void *interface, int turned)
{
	enum starpu_data_interface_id id = *(enum starpu_data_interface_id *)interface;
	if (id == STARPU_MATRIX_INTERFACE_ID) {
		int64_t row = (int64_t)STARPU_MATRIX_GET_LD(interface) * STARPU_MATRIX_GET_ELEMSIZE(interface);
		return (where){STARPU_MATRIX_GET_PTR(interface), row, 0};
	}
	if (id == STARPU_BLOCK_INTERFACE_ID) {
		int64_t size = STARPU_BLOCK_GET_ELEMSIZE(interface);
		int64_t y = size * STARPU_BLOCK_GET_LDY(interface), z = size * STARPU_BLOCK_GET_LDZ(interface);
		return (where){STARPU_BLOCK_GET_PTR(interface), turned ? z : y, turned ? y : z};
	}
	return (where){STARPU_VARIABLE_GET_PTR(interface), 0, 0};
}

static where locate_of(const argument *a, void *buffers[], int handle)
{
	return locate(buffers[handle], a->task.turned >> handle & 1);
}

static uintptr_t cache_line(uintptr_t address) { return (address + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE; }

/* The scratch buffer, which follows the program's own handles. */
static uintptr_t scratch_of(const argument *a, void *buffers[])
{
	int n = a->task.program->handles;
	return a->buffers <= n ? 0 : cache_line(locate(buffers[n], 0).address);
}

/* Fills in a parameter block for one head of the task. */
static void bind(const argument *a, void *buffers[], int64_t *block, int head)
{
	const ft_task *task = &a->task;
	const ft_program *p = task->program;
	uintptr_t address[FT_BUFFERS];
	memcpy(block, p->block, p->words * sizeof *block);
	for (int n = 0; n < p->bindings; n++) {
		int h = p->handle[n];
		where tile = locate_of(a, buffers, h);
		address[n] = tile.address + head / p->per[n] * tile.plane_bytes;
		if (p->stride_word[n] >= 0) {
			int64_t *word = &block[p->stride_word[n]];
			if (tile.row_bytes) *word = tile.row_bytes;
			address[n] -= task->rows[h] * *word;
		}
		address[n] -= task->bytes[h] + head * p->moves[n];
		block[p->address_word[n]] = address[n] - (p->from[n] < 0 ? 0 : address[p->from[n]]);
	}
	for (int n = 0; n < p->values; n++)
		block[p->value_word[n]] = task->values[n];
	if (p->inner_word >= 0) block[p->inner_word] = (intptr_t)&block[p->inner_at];
}

static void run_cpu(void *buffers[], void *cl_arg)
{
	const argument *a = cl_arg;
	int64_t block[FT_WORDS];
	if (a->job->stopped || !a->task.program) return; /* stopped: an earlier task failed, its results are void */
	cpu_kernel kernel = (cpu_kernel)a->task.program->cpu;
	char *scratch = (char *)scratch_of(a, buffers);
	int32_t status = 0;
	int head = 0;
	do {
		int64_t further = head * a->task.step;
		bind(a, buffers, block, head);
		status = kernel((const char *)block, a->task.begin + further, a->task.end + further, scratch);
	} while (!status && ++head < a->task.heads && !a->job->stopped);
	if (a->event) { a->event->ran = 1; a->event->status = status; }
	if (status) record(a, head, status, "");
}

/* The stream of the calling CUDA worker. Only a StarPU with CUDA has the function, so the binding is not linked to it. */
static int local_stream(void **stream)
{
	void *(*get)(void) = (void *(*)(void))dlsym(RTLD_DEFAULT, "starpu_cuda_get_local_stream");
	if (get) *stream = get();
	return get != NULL;
}

/* Runs on a CUDA worker, whose context is current, and returns when the launches are in its stream (STARPU_CUDA_ASYNC).
   The tiles keep their own addresses: kernels work on a tile as if there were no other. */
static void run_cuda(void *buffers[], void *cl_arg)
{
	const argument *a = cl_arg;
	const ft_program *p = a->task.program;
	char detail[FT_DETAIL] = "this StarPU has no starpu_cuda_get_local_stream";
	int status = FT_NO_STREAM;
	void *stream;
	ft_place place = {0};
	if (a->job->stopped || !p) return;
	for (int h = 0; h < p->handles; h++) {
		where tile = locate_of(a, buffers, h);
		place.address[h] = tile.address;
		place.row_bytes[h] = tile.row_bytes;
		place.plane_bytes[h] = tile.plane_bytes;
	}
	place.scratch = scratch_of(a, buffers);
	memcpy(place.sizes, a->task.sizes, sizeof place.sizes);
	if (!place.sizes[FT_HEADS]) place.sizes[FT_HEADS] = a->task.heads > 1 ? a->task.heads : 1;
	if (local_stream(&stream)) status = ft_launch((const ft_kernels *)p->cuda, &place, a->task.values, stream, detail);
	if (a->event) { a->event->ran = 1; a->event->status = status; }
	if (status) record(a, 0, status, detail);
}

/* StarPU asks for each worker: a task goes where its program has a kernel. Without a program it is empty, for tests. */
static int can_execute(unsigned worker, struct starpu_task *task, unsigned implementation)
{
	const ft_program *p = ((const argument *)task->cl_arg)->task.program;
	(void)implementation;
	if (!p) return 1;
	return (starpu_worker_get_type(worker) == STARPU_CUDA_WORKER ? p->cuda : p->cpu) != 0;
}

/* Everything that sets the cost is hashed at submission (footprint.py). */
static uint32_t footprint(struct starpu_task *task)
{
	return task->cl_arg ? ((const argument *)task->cl_arg)->task.footprint : 0;
}

ft_codelet *ft_codelet_new(const char *name)
{
	ft_codelet *c = calloc(1, sizeof *c);
	if (!c) return NULL;
	starpu_codelet_init(&c->cl);
	snprintf(c->name, sizeof c->name, "%s", name);
	c->cl.name = c->name;
	c->cl.can_execute = can_execute;
	c->cl.nbuffers = STARPU_VARIABLE_NBUFFERS; /* modes come with each task: the first of a chain writes, later ones update */
	c->model.type = STARPU_HISTORY_BASED;
	c->model.symbol = c->name;
	c->model.footprint = footprint;
	c->cl.model = &c->model;
	return c;
}

void ft_codelet_free(ft_codelet *codelet) { free(codelet); }

void ft_codelet_implement(ft_codelet *c, int architectures)
{
	c->cl.where = architectures;
	c->cl.cpu_funcs[0] = architectures & STARPU_CPU ? run_cpu : NULL;
	c->cl.cuda_funcs[0] = architectures & STARPU_CUDA ? run_cuda : NULL;
	c->cl.cuda_flags[0] = STARPU_CUDA_ASYNC;
}

void ft_codelet_where(ft_codelet *c, int architectures) { c->cl.where = architectures; }

/* ---- submission ---- */

static struct starpu_task *make_task(ft_job *job, ft_codelet *codelet, const uint64_t *handles, const int32_t *modes,
	int count, const ft_task *source, ft_event *event)
{
	struct starpu_task *task = starpu_task_create();
	argument *copy = malloc(sizeof *copy);
	*copy = (argument){*source, job, event, codelet, count};
	task->cl = &codelet->cl;
	task->cl_arg = copy;
	task->cl_arg_size = sizeof *copy;
	task->cl_arg_free = 1;
	task->flops = source->flops;
	int low = starpu_sched_get_min_priority(), high = starpu_sched_get_max_priority();
	task->priority = source->priority < low ? low : source->priority > high ? high : source->priority;
	task->nbuffers = count;
	if (count > STARPU_NMAXBUFS) {
		task->dyn_handles = malloc(count * sizeof *task->dyn_handles);
		task->dyn_modes = malloc(count * sizeof *task->dyn_modes);
	}
	for (int n = 0; n < count; n++) {
		STARPU_TASK_SET_HANDLE(task, (starpu_data_handle_t)(uintptr_t)handles[n], n);
		STARPU_TASK_SET_MODE(task, (enum starpu_data_access_mode)modes[n], n);
	}
	return task;
}

/* Submits n tasks of `buffers` handles each, in order, until one is refused; returns its status, 0 if none was.
   events: n of them, filled in as tasks end; NULL without a profile. */
int ft_submit(ft_job *job, ft_codelet *codelet, int64_t n, int buffers, const uint64_t *handles, const int32_t *modes,
	const ft_task *tasks, ft_event *events, int64_t *submitted)
{
	change_pending(job, n);
	for (int64_t i = 0; i < n; i++) {
		struct starpu_task *task = make_task(job, codelet, handles + i * buffers, modes + i * buffers, buffers, tasks + i,
			events ? events + i : NULL);
		task->callback_func = events ? profiled_task_done : task_done;
		task->callback_arg = job;
		int status = starpu_task_submit(task);
		if (status) {
			task->destroy = 0;
			starpu_task_destroy(task);
			job->stopped = 1;
			change_pending(job, i - n);
			*submitted = i;
			return status;
		}
	}
	*submitted = n;
	return 0;
}

/* ---- data ---- */

void ft_register_matrices(int64_t n, const uint64_t *address, const uint32_t *ld, const uint32_t *columns,
	const uint32_t *rows, uint64_t itemsize, uint64_t *handles)
{
	for (int64_t i = 0; i < n; i++) {
		starpu_data_handle_t handle;
		starpu_matrix_data_register(&handle, NODE_OF(address[i]), address[i], ld[i], columns[i], rows[i], itemsize);
		handles[i] = (uintptr_t)handle;
	}
}

void ft_register_variables(int64_t n, const uint64_t *address, const uint64_t *nbytes, uint64_t *handles)
{
	for (int64_t i = 0; i < n; i++) {
		starpu_data_handle_t handle;
		starpu_variable_data_register(&handle, NODE_OF(address[i]), address[i], nbytes[i]);
		handles[i] = (uintptr_t)handle;
	}
}

/* Of several heads each: nz planes of ny rows, or turned the other way round, of nx elements. */
void ft_register_blocks(int64_t n, const uint64_t *address, const uint32_t *ldy, const uint32_t *ldz, const uint32_t *nx,
	const uint32_t *ny, const uint32_t *nz, uint64_t itemsize, uint64_t *handles)
{
	for (int64_t i = 0; i < n; i++) {
		starpu_data_handle_t handle;
		starpu_block_data_register(&handle, NODE_OF(address[i]), address[i], ldy[i], ldz[i], nx[i], ny[i], nz[i], itemsize);
		handles[i] = (uintptr_t)handle;
	}
}

/* how: 0 waits and brings the contents home, 1 waits and drops them, 2 drops them when the last task is done. */
void ft_unregister(int64_t n, const uint64_t *handles, int how)
{
	for (int64_t i = 0; i < n; i++) {
		starpu_data_handle_t handle = (starpu_data_handle_t)(uintptr_t)handles[i];
		if (how == 0) starpu_data_unregister(handle);
		else if (how == 1) starpu_data_unregister_no_coherency(handle);
		else starpu_data_unregister_submit(handle);
	}
}

/* Does not wait: nonzero if tasks submitted earlier still need the tile. */
int ft_acquire(uint64_t handle, int mode)
{
	return starpu_data_acquire_try((starpu_data_handle_t)(uintptr_t)handle, (enum starpu_data_access_mode)mode);
}

void ft_release(uint64_t handle) { starpu_data_release((starpu_data_handle_t)(uintptr_t)handle); }

uintptr_t ft_pointer(uint64_t handle, int turned, int64_t *row_bytes, int64_t *plane_bytes)
{
	void *interface = starpu_data_get_interface_on_node((starpu_data_handle_t)(uintptr_t)handle, STARPU_MAIN_RAM);
	where tile = locate(interface, turned);
	*row_bytes = tile.row_bytes;
	*plane_bytes = tile.plane_bytes;
	return tile.address;
}

/* Bytes of a tile of the matrix, vector or variable interface; -1 for any other, -2 for what cannot be a handle's
   address: a number that came instead of one. */
int64_t ft_nbytes(uint64_t handle)
{
	uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
	unsigned char resident;
	if (handle % sizeof(void *) || mincore((void *)(uintptr_t)(handle - handle % page), 1, &resident)) return -2;
	starpu_data_handle_t h = (starpu_data_handle_t)(uintptr_t)handle;
	enum starpu_data_interface_id id = starpu_data_get_interface_id(h);
	int known = id == STARPU_MATRIX_INTERFACE_ID || id == STARPU_VECTOR_INTERFACE_ID || id == STARPU_VARIABLE_INTERFACE_ID;
	return known ? (int64_t)starpu_data_get_size(h) : -1;
}

/* What the performance model expects of a task on worker 0, in microseconds; NaN before it is calibrated. */
double ft_expected_length(ft_codelet *codelet, uint64_t *handles, const int32_t *modes, int n, const ft_task *task)
{
	struct starpu_task *t = make_task(NULL, codelet, handles, modes, n, task, NULL);
	double length = starpu_task_expected_length(t, starpu_worker_get_perf_archtype(0, STARPU_NMAX_SCHED_CTXS), 0);
	t->destroy = 0;
	starpu_task_destroy(t);
	return length;
}

/* Calls the codelet's CUDA implementation as a worker would, on n handles that stand for tiles on a device: matrices of
   ld[n] elements between rows, or variables where that is 0; where ldz[n] is not, blocks with so many between planes.
   For tests, which have no device and no worker of one. */
void ft_run_cuda(ft_job *job, ft_codelet *codelet, const ft_task *task, int n, const uint64_t *address,
	const uint32_t *ld, const uint32_t *ldz, const uint64_t *itemsize)
{
	union {
		struct starpu_matrix_interface matrix;
		struct starpu_block_interface block;
		struct starpu_variable_interface variable;
	} interfaces[FT_HANDLES + 1] = {0};
	void *buffers[FT_HANDLES + 1];
	argument a = {*task, job, NULL, codelet, n};
	for (int h = 0; h < n; h++) {
		buffers[h] = &interfaces[h];
		if (ldz[h]) {
			struct starpu_block_interface *b = &interfaces[h].block;
			b->id = STARPU_BLOCK_INTERFACE_ID;
			b->ptr = address[h];
			b->ldy = ld[h];
			b->ldz = ldz[h];
			b->elemsize = itemsize[h];
		} else if (ld[h]) {
			struct starpu_matrix_interface *m = &interfaces[h].matrix;
			m->id = STARPU_MATRIX_INTERFACE_ID;
			m->ptr = address[h];
			m->ld = ld[h];
			m->elemsize = itemsize[h];
		} else {
			interfaces[h].variable.id = STARPU_VARIABLE_INTERFACE_ID;
			interfaces[h].variable.ptr = address[h];
		}
	}
	codelet->cl.cuda_funcs[0](buffers, &a);
}
