/* A CUDA driver without a device, and StarPU's stream, for tests of launches from tasks. It keeps the rules that a worker
   must keep (a context is current, load before launching, ask for much shared memory first) and writes every call into
   the file $FAKE_DRIVER_LOG:

       load CONTEXT
       launch FUNCTION image CHECKSUM context C grid X Y Z cluster N block X Y Z shared N stream S parameters HEX

   $FAKE_DRIVER_CONTEXT is the current context, 0 for none, unless the thread has called fake_driver_context;
   $FAKE_DRIVER_FAIL = "FUNCTION:STATUS" makes one fail. With $FAKE_DRIVER_MEET = N no load ends before N have begun.
   Compiled against NVIDIA's own cuda.h, so that its structs and constants are the real ones. */
#include <cuda.h>
#include <elf.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NEED(condition, error) if (!(condition)) return (error)
#define MAY_FAIL(name) do { int s = failing(name); if (s) return (CUresult)s; } while (0)
#define STREAM ((CUstream)0x5f)

typedef struct { char name[64]; unsigned checksum; long context, shared_allowed; } kernel; /* one a module */
static kernel kernels[256];
static int modules, loading;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t met = PTHREAD_COND_INITIALIZER;
static __thread long own_context;

void fake_driver_context(long context) { own_context = context; }

static int failing(const char *name) {
    const char *wanted = getenv("FAKE_DRIVER_FAIL");
    size_t n = strlen(name);
    return wanted && !strncmp(wanted, name, n) && wanted[n] == ':' ? atoi(wanted + n + 1) : 0;
}

/* Adler-32 of machine code as far as its headers reach: which file it is. */
static unsigned checksum(const void *image) {
    const Elf64_Ehdr *h = image;
    size_t sections = h->e_shoff + h->e_shnum * h->e_shentsize, segments = h->e_phoff + h->e_phnum * h->e_phentsize;
    unsigned a = 1, b = 0;
    for (size_t i = 0; i < (sections > segments ? sections : segments); i++) {
        a = (a + ((const unsigned char *)image)[i]) % 65521;
        b = (b + a) % 65521;
    }
    return b << 16 | a;
}

static long current(void) { return own_context ? own_context : atol(getenv("FAKE_DRIVER_CONTEXT")); }
static FILE *opened(void) { return fopen(getenv("FAKE_DRIVER_LOG"), "a"); }

CUstream starpu_cuda_get_local_stream(void) { return STREAM; }

CUresult cuGetErrorName(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_THE_TEST";
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    MAY_FAIL("cuCtxGetCurrent");
    *context = (CUcontext)current();
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    MAY_FAIL("cuModuleLoadData");
    NEED(current() && modules < 255, CUDA_ERROR_INVALID_CONTEXT);
    NEED(!memcmp(image, "\177ELF", 4), CUDA_ERROR_INVALID_IMAGE);
    pthread_mutex_lock(&lock);
    const char *meet = getenv("FAKE_DRIVER_MEET");
    loading++;
    pthread_cond_broadcast(&met);
    while (meet && loading < atoi(meet)) pthread_cond_wait(&met, &lock);
    kernels[++modules] = (kernel){"", checksum(image), current(), 48 << 10};
    *module = (CUmodule)(size_t)modules;
    FILE *log = opened();
    fprintf(log, "load %ld\n", current());
    fclose(log);
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    MAY_FAIL("cuModuleGetFunction");
    kernel *k = &kernels[(size_t)module];
    NEED((size_t)module <= (size_t)modules && k->context == current(), CUDA_ERROR_INVALID_HANDLE);
    snprintf(k->name, sizeof k->name, "%s", name);
    *function = (CUfunction)k;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    MAY_FAIL("cuFuncSetAttribute");
    NEED(attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CUDA_ERROR_INVALID_VALUE);
    NEED(value <= 227 << 10, CUDA_ERROR_INVALID_VALUE);
    ((kernel *)function)->shared_allowed = value;
    return CUDA_SUCCESS;
}

static CUresult write_down(const CUlaunchConfig *c, CUfunction function, unsigned cluster, void **parameters, void **extra) {
    kernel *k = (kernel *)function;
    NEED(k >= kernels && k < kernels + 256 && k->context == current(), CUDA_ERROR_INVALID_HANDLE);
    NEED(c->gridDimX && c->gridDimX % cluster == 0 && c->sharedMemBytes <= k->shared_allowed, CUDA_ERROR_INVALID_VALUE);
    NEED(c->hStream == STREAM && !parameters, CUDA_ERROR_INVALID_VALUE);
    NEED(extra[0] == CU_LAUNCH_PARAM_BUFFER_POINTER && extra[2] == CU_LAUNCH_PARAM_BUFFER_SIZE, CUDA_ERROR_INVALID_VALUE);
    NEED(extra[4] == CU_LAUNCH_PARAM_END, CUDA_ERROR_INVALID_VALUE);
    const unsigned char *block = extra[1];
    size_t size = *(size_t *)extra[3];
    FILE *log = opened();
    fprintf(log, "launch %s image %u context %ld grid %u %u %u cluster %u block %u %u %u shared %u stream %zu parameters ", k->name,
            k->checksum, k->context, c->gridDimX, c->gridDimY, c->gridDimZ, cluster, c->blockDimX, c->blockDimY, c->blockDimZ,
            c->sharedMemBytes, (size_t)c->hStream);
    for (size_t i = 0; i < size; i++) fprintf(log, "%02x", block[i]);
    fprintf(log, "\n");
    fclose(log);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared, CUstream stream, void **parameters, void **extra) {
    MAY_FAIL("cuLaunchKernel");
    CUlaunchConfig c = {gx, gy, gz, bx, by, bz, shared, stream, NULL, 0};
    return write_down(&c, function, 1, parameters, extra);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
    MAY_FAIL("cuLaunchKernelEx");
    NEED(c->numAttrs == 1 && c->attrs[0].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, CUDA_ERROR_INVALID_VALUE);
    NEED(c->attrs[0].value.clusterDim.y == 1 && c->attrs[0].value.clusterDim.z == 1, CUDA_ERROR_INVALID_VALUE);
    return write_down(c, function, c->attrs[0].value.clusterDim.x, parameters, extra);
}
