/* Launches kernels compiled ahead of time through NVIDIA's driver, which is opened at run time: this builds and loads
   where there is no CUDA. The few declarations are those of cuda.h; its ABI has kept them since CUDA 4, cuLaunchKernelEx
   since 11.8. */

#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "launch_internal.h"

typedef int status;
typedef void *context, *module, *function;

/* CUlaunchAttribute and CUlaunchConfig. */
typedef struct {
	int id;
	char pad[4];
	union { unsigned dimensions[3]; char bytes[64]; } value;
} attribute;
typedef struct {
	unsigned grid[3], block[3], shared;
	void *stream;
	attribute *attributes;
	unsigned count;
} configuration;

enum { CLUSTER_DIMENSION = 4, MAX_DYNAMIC_SHARED = 8, PLAIN_SHARED = 48 << 10 };
#define PARAMETERS_END ((void *)0)
#define PARAMETERS_POINTER ((void *)1)
#define PARAMETERS_SIZE ((void *)2)

static struct {
	status (*context_current)(context *);
	status (*module_load)(module *, const void *);
	status (*module_function)(function *, module, const char *);
	status (*function_set)(function, int, int);
	status (*launch)(function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
	status (*launch_in_clusters)(const configuration *, function, void **, void **);
	status (*error_name)(status, const char **);
} driver;

static const struct { void **place; const char *name; int needed; } symbols[] = {
	{(void **)&driver.context_current, "cuCtxGetCurrent", 1},
	{(void **)&driver.module_load, "cuModuleLoadData", 1},
	{(void **)&driver.module_function, "cuModuleGetFunction", 1},
	{(void **)&driver.function_set, "cuFuncSetAttribute", 1},
	{(void **)&driver.launch, "cuLaunchKernel", 1},
	{(void **)&driver.launch_in_clusters, "cuLaunchKernelEx", 0},
	{(void **)&driver.error_name, "cuGetErrorName", 1},
};

/* What is loaded on a device. Kernels are few, and a list is as long as they are. */
typedef struct loaded {
	struct loaded *next;
	uint64_t id;
	function function;
} loaded;

/* A device, by its worker's context. Loading takes long, so each has a lock of its own: none waits for another's. */
typedef struct device {
	struct device *next;
	context where;
	pthread_mutex_t lock;
	loaded *first;
} device;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of the two that follow */
static device *devices;
static int opened;

int ft_driver_open(const char *path, char *why, int size)
{
	void *library;
	int result = -1;
	pthread_mutex_lock(&lock);
	if (opened) { pthread_mutex_unlock(&lock); return 0; }
	library = dlopen(path, RTLD_NOW);
	if (!library) snprintf(why, size, "%s", dlerror());
	for (size_t i = 0; library && i < sizeof symbols / sizeof *symbols; i++) {
		*symbols[i].place = dlsym(library, symbols[i].name);
		if (!*symbols[i].place && symbols[i].needed) {
			snprintf(why, size, "%s has no %s", path, symbols[i].name);
			dlclose(library);
			library = NULL;
		}
	}
	if (library) { opened = 1; result = 0; }
	pthread_mutex_unlock(&lock);
	return result;
}

void ft_driver_forget(void)
{
	pthread_mutex_lock(&lock);
	while (devices) {
		device *d = devices;
		devices = d->next;
		while (d->first) {
			loaded *next = d->first->next;
			free(d->first);
			d->first = next;
		}
		pthread_mutex_destroy(&d->lock);
		free(d);
	}
	pthread_mutex_unlock(&lock);
}

/* A call of the driver: its status, and in `detail` what failed if it did. */
static status checked(status s, const char *call, const ft_kernel *kernel, char *detail)
{
	const char *name = NULL;
	if (!s) return 0;
	if (driver.error_name(s, &name) || !name) name = "unknown error";
	snprintf(detail, FT_DETAIL, "%s of kernel %s: %s", call, kernel->function, name);
	return s;
}

static status load(const ft_kernel *kernel, device *d, function *found, char *detail)
{
	module m;
	status s = checked(driver.module_load(&m, (const void *)kernel->image), "cuModuleLoadData", kernel, detail);
	if (!s) s = checked(driver.module_function(found, m, kernel->function), "cuModuleGetFunction", kernel, detail);
	if (!s && kernel->shared > PLAIN_SHARED)
		s = checked(driver.function_set(*found, MAX_DYNAMIC_SHARED, kernel->shared), "cuFuncSetAttribute", kernel, detail);
	if (s) return s;
	loaded *l = malloc(sizeof *l);
	*l = (loaded){d->first, kernel->id, *found};
	d->first = l;
	return 0;
}

static device *device_of(context here)
{
	pthread_mutex_lock(&lock);
	device *d = devices;
	while (d && d->where != here) d = d->next;
	if (!d) {
		d = malloc(sizeof *d);
		*d = (device){devices, here, PTHREAD_MUTEX_INITIALIZER, NULL};
		devices = d;
	}
	pthread_mutex_unlock(&lock);
	return d;
}

/* The kernel in the context of the calling worker, loaded at its first launch there. */
static status find(const ft_kernel *kernel, function *found, char *detail)
{
	context here;
	status s = checked(driver.context_current(&here), "cuCtxGetCurrent", kernel, detail);
	if (s) return s;
	device *d = device_of(here);
	pthread_mutex_lock(&d->lock);
	loaded *l = d->first;
	while (l && l->id != kernel->id) l = l->next;
	if (l) *found = l->function;
	else s = load(kernel, d, found, detail);
	pthread_mutex_unlock(&d->lock);
	return s;
}

static int64_t tiles(int64_t size, int64_t unit) { return (size + unit - 1) / unit; }

/* Fills in the block of parameters of one launch. */
static int fill(const ft_kernel *kernel, const ft_place *place, int64_t programs, int64_t *block, char *detail)
{
	memcpy(block, kernel->block, kernel->bytes);
	for (int n = 0; n < kernel->arguments; n++) {
		const ft_argument *a = &kernel->argument[n];
		int64_t value = 0;
		switch (a->source) {
		case FT_ADDRESS: value = place->address[a->index] + (a->other < 0 ? 0 : place->sizes[a->other]); break;
		case FT_ROW:
			if (!place->row_bytes[a->index]) continue;
			value = place->row_bytes[a->index] / a->unit;
			break;
		case FT_PLANE:
			if (!place->plane_bytes[a->index]) continue;
			value = place->plane_bytes[a->index] * a->other / a->unit;
			break;
		case FT_APART: value = (place->address[a->index] - place->address[a->other]) / a->unit; break;
		case FT_SIZE: value = place->sizes[a->index]; break;
		case FT_TILES: value = tiles(place->sizes[a->index], a->unit); break;
		case FT_SCRATCH: value = place->scratch + a->index; break;
		case FT_PROGRAMS: value = programs; break;
		}
		if (value % a->multiple) {
			snprintf(detail, FT_DETAIL, "kernel %s: got %lld for the argument at byte %d, expected a multiple of %d",
				kernel->function, (long long)value, a->offset, a->multiple);
			return FT_MISALIGNED;
		}
		memcpy((char *)block + a->offset, &value, a->size); /* little endian, as every host of a GPU */
	}
	return 0;
}

static status launch(const ft_kernel *kernel, const ft_place *place, void *stream, char *detail)
{
	int64_t block[FT_BLOCK];
	function f;
	size_t size = kernel->bytes;
	void *parameters[] = {PARAMETERS_POINTER, block, PARAMETERS_SIZE, &size, PARAMETERS_END};
	int64_t grid = 1;
	for (int n = 0; n < 3; n++)
		grid *= kernel->grid_size[n] < 0 ? kernel->grid_unit[n] : tiles(place->sizes[kernel->grid_size[n]], kernel->grid_unit[n]);
	status s = fill(kernel, place, grid, block, detail);
	if (s || !grid) return s;
	if ((s = find(kernel, &f, detail))) return s;
	if (kernel->cluster == 1)
		return checked(driver.launch(f, grid, 1, 1, kernel->threads, 1, 1, kernel->shared, stream, NULL, parameters),
			"cuLaunchKernel", kernel, detail);
	if (!driver.launch_in_clusters) {
		snprintf(detail, FT_DETAIL, "kernel %s wants clusters, this driver has no cuLaunchKernelEx", kernel->function);
		return FT_NO_DRIVER;
	}
	attribute cluster = {CLUSTER_DIMENSION, {0}, {{kernel->cluster, 1, 1}}};
	configuration c = {{grid * kernel->cluster, 1, 1}, {kernel->threads, 1, 1}, kernel->shared, stream, &cluster, 1};
	return checked(driver.launch_in_clusters(&c, f, NULL, parameters), "cuLaunchKernelEx", kernel, detail);
}

int ft_launch(const ft_kernels *kernels, const ft_place *place, const int64_t *values, void *stream, char *detail)
{
	int variant = 0;
	for (int n = 0; n < 2; n++)
		if (kernels->which[n] >= 0 && values[kernels->which[n]]) variant |= 1 << n;
	if (!opened) {
		snprintf(detail, FT_DETAIL, "NVIDIA's driver was not opened");
		return FT_NO_DRIVER;
	}
	for (int n = 0; n < FT_HANDLES; n++) {
		int64_t rows = place->row_bytes[n], heads = place->plane_bytes[n];
		int64_t packed = kernels->packed[n] * place->sizes[FT_ROWS];
		int apart = kernels->dense[n] && rows && rows != kernels->dense[n];
		if (!apart && !(packed && heads && heads != packed)) continue;
		snprintf(detail, FT_DETAIL, "got %s of handle %d that lie %lld bytes apart, expected %lld", apart ? "rows" : "heads", n,
			(long long)(apart ? rows : heads), (long long)(apart ? kernels->dense[n] : packed));
		return FT_ROWS_APART;
	}
	for (int n = 0; n < kernels->launches[variant]; n++) {
		int s = launch(kernels->kernel[variant][n], place, stream, detail);
		if (s) return s;
	}
	return 0;
}
