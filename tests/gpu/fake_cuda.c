/* A CUDA driver without a device, for tests: it keeps the rules that a call must keep (initialise, retain a context,
   make it current, load before launching), and writes every launch into the file $FAKE_CUDA_LOG:

       launch FUNCTION grid X Y Z block X Y Z shared N stream S parameters HEX

   $FAKE_CUDA_ARCH is the compute capability, as 90; $FAKE_CUDA_FAIL = "FUNCTION:STATUS" makes one function fail.
   Compiled against NVIDIA's own cuda.h, so that its types are the real ones. */
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NEED(condition, error) if (!(condition)) return (error)
#define MAY_FAIL(name) do { int s = failing(name); if (s) return (CUresult)s; } while (0)

static int started, retained, current;
static long shared_allowed = 48 << 10;
static char loaded[64][128];
static int modules;

static int failing(const char *name) {
    const char *wanted = getenv("FAKE_CUDA_FAIL");
    size_t n = strlen(name);
    return wanted && !strncmp(wanted, name, n) && wanted[n] == ':' ? atoi(wanted + n + 1) : 0;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "as the test wanted";
    return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) {
    MAY_FAIL("cuInit");
    NEED(flags == 0, CUDA_ERROR_INVALID_VALUE);
    started = 1;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int number) {
    NEED(started, CUDA_ERROR_NOT_INITIALIZED);
    NEED(number >= 0 && number < 2, CUDA_ERROR_INVALID_DEVICE);
    *device = number;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    snprintf(name, length, "Fake GPU %d", device);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    int arch = atoi(getenv("FAKE_CUDA_ARCH"));
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = arch / 10; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = arch % 10; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 50 << 20; return CUDA_SUCCESS;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    MAY_FAIL("cuDevicePrimaryCtxRetain");
    *context = (CUcontext)(size_t)(0xc0 + device);
    retained = 1;
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
    NEED(retained && ((size_t)context & ~1ul) == 0xc0, CUDA_ERROR_INVALID_CONTEXT);
    current++;
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    NEED(current > 0, CUDA_ERROR_INVALID_CONTEXT);
    current--;
    *context = NULL;
    return CUDA_SUCCESS;
}

/* $FAKE_CUDA_BOUND: the device's context is current already, as where a library has used it on this thread. */
CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = retained && (current || getenv("FAKE_CUDA_BOUND")) ? (CUcontext)(size_t)0xc0 : NULL;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    MAY_FAIL("cuModuleLoadData");
    NEED(current == 1, CUDA_ERROR_INVALID_CONTEXT);
    NEED(!memcmp(image, "\177ELF", 4) && modules < 64, CUDA_ERROR_INVALID_IMAGE);
    *module = (CUmodule)(size_t)(0x300 + modules++);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    size_t n = (size_t)module - 0x300;
    NEED(current == 1 && n < (size_t)modules, CUDA_ERROR_INVALID_HANDLE);
    snprintf(loaded[n], sizeof loaded[n], "%s", name);
    *function = (CUfunction)loaded[n];
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    NEED(current == 1 && function, CUDA_ERROR_INVALID_HANDLE);
    NEED(attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CUDA_ERROR_INVALID_VALUE);
    shared_allowed = value;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared, CUstream stream, void **parameters, void **extra) {
    MAY_FAIL("cuLaunchKernel");
    NEED(current == 1 || getenv("FAKE_CUDA_BOUND"), CUDA_ERROR_INVALID_CONTEXT);
    NEED(gx > 0 && shared <= shared_allowed && !parameters, CUDA_ERROR_INVALID_VALUE);
    NEED(extra[0] == CU_LAUNCH_PARAM_BUFFER_POINTER && extra[2] == CU_LAUNCH_PARAM_BUFFER_SIZE, CUDA_ERROR_INVALID_VALUE);
    NEED(extra[4] == CU_LAUNCH_PARAM_END, CUDA_ERROR_INVALID_VALUE);
    const unsigned char *block = extra[1];
    size_t size = *(size_t *)extra[3];
    if (!getenv("FAKE_CUDA_LOG")) return CUDA_SUCCESS; /* where time is measured */
    FILE *log = fopen(getenv("FAKE_CUDA_LOG"), "a");
    fprintf(log, "launch %s grid %u %u %u block %u %u %u shared %u stream %zu parameters ", (char *)function, gx, gy, gz,
            bx, by, bz, shared, (size_t)stream);
    for (size_t i = 0; i < size; i++) fprintf(log, "%02x", block[i]);
    fprintf(log, "\n");
    fclose(log);
    return CUDA_SUCCESS;
}
