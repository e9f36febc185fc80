// CUDA on a CPU, as far as kernels/bins/bins.cu and kernels/shared/nvrtc.py need it: CUDA's keywords are
// macros, and the functions of the driver run a kernel in a plain loop over all threads of the grid.

#include <math.h>
#include <stddef.h>
#include <string.h>
#include <utility>

#define __device__
#define __global__
// Where a thread writes is its own affair, so this may stay as the last thread left it.
#define __shared__ static
#define __launch_bounds__(threads)

struct Index { unsigned x; };
static Index blockIdx, threadIdx;

static inline float __int_as_float(int bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#include "bins.cu"

// --- the driver, for one GPU ---------------------------------------------------------------------

typedef void Run(void** arguments, unsigned blocks, unsigned threads);

template <typename... Arguments, size_t... I>
static void run_all(
    void (*kernel)(Arguments...), void** arguments, unsigned blocks, unsigned threads, std::index_sequence<I...>)
{
    // Backwards, because no order is promised.
    for (blockIdx.x = blocks; blockIdx.x-- > 0;)
        for (threadIdx.x = threads; threadIdx.x-- > 0;) kernel(*static_cast<Arguments*>(arguments[I])...);
}

template <typename... Arguments>
static void run(void (*kernel)(Arguments...), void** arguments, unsigned blocks, unsigned threads)
{
    run_all(kernel, arguments, blocks, threads, std::index_sequence_for<Arguments...>());
}

#define KERNEL(name) {#name, [](void** arguments, unsigned blocks, unsigned threads) { run(name, arguments, blocks, threads); }}

static const struct { const char* name; Run* run; } KERNELS[] = {
    KERNEL(bin_rows_float32), KERNEL(bin_rows_bfloat16), KERNEL(bin_edges_float32), KERNEL(bin_edges_bfloat16),
};

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
static void* current;

extern "C" {

// The tests read these, and write the last one: what a launch returns if it is not 0.
int launches, contexts, refusal;

int cuInit(unsigned flags) { return SUCCESS; }

int cuCtxGetCurrent(void** context)
{
    *context = current;
    return SUCCESS;
}

int cuDeviceGet(int* device, int ordinal)
{
    *device = ordinal;
    return ordinal == 0 ? SUCCESS : INVALID_VALUE;
}

int cuDevicePrimaryCtxRetain(void** context, int device)
{
    *context = &contexts;
    contexts++;
    return SUCCESS;
}

int cuCtxSetCurrent(void* context)
{
    current = context;
    return SUCCESS;
}

int cuModuleLoadData(void** module, const void* image)
{
    *module = const_cast<void*>(image);
    return current == nullptr ? INVALID_CONTEXT : SUCCESS;
}

int cuModuleGetFunction(void** function, void* module, const char* name)
{
    for (const auto& kernel : KERNELS) {
        if (strcmp(kernel.name, name) == 0) {
            *function = reinterpret_cast<void*>(kernel.run);
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

int cuLaunchKernel(
    void* function, unsigned blocks_x, unsigned blocks_y, unsigned blocks_z, unsigned threads_x, unsigned threads_y,
    unsigned threads_z, unsigned shared_bytes, void* stream, void** arguments, void** extra)
{
    if (current == nullptr) return INVALID_CONTEXT;
    if (blocks_y != 1 || blocks_z != 1 || threads_x != COLUMNS || threads_y != 1 || threads_z != 1) return INVALID_VALUE;
    if (shared_bytes != 0 || stream != nullptr || extra != nullptr) return INVALID_VALUE;
    if (refusal != SUCCESS) return refusal;
    launches++;
    reinterpret_cast<Run*>(function)(arguments, blocks_x, threads_x);
    return SUCCESS;
}

int cuGetErrorString(int error, const char** text)
{
    *text = error == 701 ? "too many resources requested for launch" : "another error";
    return SUCCESS;
}

}
