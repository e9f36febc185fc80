// The bins in CUDA C++: bin_edges and bin_rows of __init__.py, with one thread per column.
//
// NVRTC compiles this file when the first bins on a GPU are made; cuda.py does so and launches it.
// Triton cannot express them, because its threads have no array that they could index by a number
// found a moment before. Its bin_rows compares each value with all edges instead.
//
// Every thread works alone: it reads and writes its own column only, in global and in shared memory.
// There is no barrier and no atomic operation. Results are therefore the same in every run, and a
// plain loop over the threads on a CPU computes the same; the tests run this file in that way.
//
// It must be compiled without contraction of a * b + c, with exact square roots and divisions, and
// without flushing subnormal numbers to zero. Each operation is then rounded as IEEE 754 says, on
// every processor, and the edges are the same on every GPU, to the bit.
//
// Shapes: R rows, S sampled rows, P columns, B bins, E = B - 1 edges; offsets have 64 bits. Rows are
// finite.
//
// cuda.py defines COLUMNS (threads per block), BINS (the most bins that bin_rows knows), SAMPLED (the
// most rows that bin_edges sorts), and WIDEST_GAP and GUARD of reference.py.

// Edges between 32 bins are a complete binary tree of five levels, which bin_rows goes down.
static_assert(BINS == 32);
// Batcher's sort and the search for an edge halve this number again and again.
static_assert((SAMPLED & (SAMPLED - 1)) == 0);
// While the values of this number of rows are added, those of as many further rows are loaded.
constexpr int ROWS_AT_ONCE = 8;

typedef unsigned short uint16;
typedef long long int64;

__device__ inline float infinite() { return __int_as_float(0x7f800000); }

// A stored update as a float. A bfloat16 is the upper half of a float.
__device__ inline float widened(float stored) { return stored; }
__device__ inline float widened(uint16 stored) { return __int_as_float((int)((unsigned)stored << 16)); }

// --- bin_rows ------------------------------------------------------------------------------------

// Read and written by one instruction of 8 bytes.
struct alignas(8) Bin {
    float sum;
    unsigned count;
};

// The bin of a value is the number of edges that the value has reached. Edge 15, the root of the
// tree, tells its highest binary digit; edge 7 or 23 tells the next one, and so on. A thread's edges
// and bins lie COLUMNS apart in shared memory, so that the 32 threads of a warp use 32 different
// banks, whichever bins they need; `at` counts in these units.
template <typename Stored>
__device__ inline void add_rows(
    const Stored* __restrict__ rows,  // (R, P), `stride` apart
    const float* __restrict__ edges,  // (B - 1, P)
    uint16* __restrict__ counts,      // (B, P), added to
    float* __restrict__ sums,         // (B, P), added to
    float* __restrict__ squares,      // (B, P), added to
    float* __restrict__ ends,         // (2, P), widened
    int num_rows, int num_bins, int64 num_cols, int64 stride)
{
    __shared__ float edges_of[BINS][COLUMNS];
    __shared__ Bin bins_of[BINS][COLUMNS];
    // Apart from the other two, because a bin of 16 bytes would leave a quarter of the memory empty.
    __shared__ float squares_of[BINS][COLUMNS];
    const int64 col = (int64)blockIdx.x * COLUMNS + threadIdx.x;
    if (col >= num_cols) return;
    float* edge = &edges_of[0][threadIdx.x];
    Bin* bin = &bins_of[0][threadIdx.x];
    float* square = &squares_of[0][threadIdx.x];

    // No value reaches the edges of bins that are not there.
    for (int b = 0; b < BINS; b++) edge[b * COLUMNS] = b < num_bins - 1 ? edges[b * num_cols + col] : infinite();
    for (int b = 0; b < num_bins; b++) {
        bin[b * COLUMNS] = {sums[b * num_cols + col], counts[b * num_cols + col]};
        square[b * COLUMNS] = squares[b * num_cols + col];
    }
    const float origin = edges[(num_bins - 1) / 2 * num_cols + col];
    float lowest = ends[col], highest = ends[num_cols + col];

    // Three levels of the tree stay in registers; the other two are read from shared memory.
    const float level_1 = edge[15 * COLUMNS];
    const float level_2[2] = {edge[7 * COLUMNS], edge[23 * COLUMNS]};
    const float level_3[4] = {edge[3 * COLUMNS], edge[11 * COLUMNS], edge[19 * COLUMNS], edge[27 * COLUMNS]};
    const auto find = [&](float value) {
        const bool digit_1 = value >= level_1;
        const bool digit_2 = value >= (digit_1 ? level_2[1] : level_2[0]);
        const float if_0 = digit_2 ? level_3[1] : level_3[0], if_1 = digit_2 ? level_3[3] : level_3[2];
        const bool digit_3 = value >= (digit_1 ? if_1 : if_0);
        int at = (digit_1 ? 16 * COLUMNS : 0) + (digit_2 ? 8 * COLUMNS : 0) + (digit_3 ? 4 * COLUMNS : 0);
        at += value >= edge[at + COLUMNS] ? 2 * COLUMNS : 0;
        at += value >= edge[at] ? COLUMNS : 0;
        return at;
    };
    const auto add = [&](float value, int at) {
        Bin cell = bin[at];
        cell.sum += value;
        cell.count += 1;
        bin[at] = cell;
        square[at] += (value - origin) * (value - origin);
        lowest = fminf(lowest, value);
        highest = fmaxf(highest, value);
    };

    // Rows are added one after the other, so that blocks of rows give the same sums as all at once.
    // What takes long is done for several rows together: loads, and the ways down the tree.
    const int in_blocks = num_rows / ROWS_AT_ONCE * ROWS_AT_ONCE;
    const Stored* block = rows + col;
    Stored stored[ROWS_AT_ONCE];
    if (in_blocks > 0) {
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; i++) stored[i] = block[i * stride];
    }
    for (int row = 0; row < in_blocks; row += ROWS_AT_ONCE) {
        float value[ROWS_AT_ONCE];
        int at[ROWS_AT_ONCE];
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; i++) value[i] = widened(stored[i]);
        // The last block is loaded once more, for nothing. Under a condition, the compiler would
        // load the next block at the end, and then every warp would wait for it.
        block += row + ROWS_AT_ONCE < in_blocks ? ROWS_AT_ONCE * stride : 0;
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; i++) stored[i] = block[i * stride];
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; i++) at[i] = find(value[i]);
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; i++) add(value[i], at[i]);
    }
    for (int row = in_blocks; row < num_rows; row++) {
        const float value = widened(rows[row * stride + col]);
        add(value, find(value));
    }

    for (int b = 0; b < num_bins; b++) {
        sums[b * num_cols + col] = bin[b * COLUMNS].sum;
        squares[b * num_cols + col] = square[b * COLUMNS];
        counts[b * num_cols + col] = (uint16)bin[b * COLUMNS].count;
    }
    ends[col] = lowest;
    ends[num_cols + col] = highest;
}

// --- bin_edges -----------------------------------------------------------------------------------

// Batcher's odd-even merge sort (1968): all comparisons at a distance of K, while sorted runs of P
// values are merged into runs of 2 P. Which two values are compared depends on no value, so the
// loop is unrolled, its conditions are known to the compiler, and the values stay in registers.
template <int P, int K>
__device__ inline void sort(float (&value)[SAMPLED])
{
#pragma unroll
    for (int i = K % P; i + K < SAMPLED; i++) {
        if ((i - K % P) / K % 2 == 0 && i / (2 * P) == (i + K) / (2 * P)) {
            const float a = value[i], b = value[i + K];
            value[i] = fminf(a, b);
            value[i + K] = fmaxf(a, b);
        }
    }
    if constexpr (K > 1) sort<P, K / 2>(value);
    else if constexpr (2 * P < SAMPLED) sort<2 * P, 2 * P>(value);
}

template <typename Stored>
__device__ inline void find_edges(
    const Stored* __restrict__ rows,    // (R, P), `stride` apart
    const int64* __restrict__ sampled,  // (S,)
    float* __restrict__ edges,          // (E, P), written
    int num_rows, int num_sampled, int num_edges, int64 num_cols, int64 stride)
{
    // The sorted values, and the sums of the roots of the gaps up to each of them.
    __shared__ float values_of[SAMPLED][COLUMNS];
    __shared__ float sums_of[SAMPLED][COLUMNS];
    const int64 col = (int64)blockIdx.x * COLUMNS + threadIdx.x;
    if (col >= num_cols) return;
    float* sorted = &values_of[0][threadIdx.x];
    float* reached = &sums_of[0][threadIdx.x];

    float value[SAMPLED];
#pragma unroll
    for (int i = 0; i < SAMPLED; i++) {
        value[i] = infinite();
        if (i < num_sampled) {
            // The row numbers are not checked, because that would make the host wait. A wrong one
            // must not read other memory.
            int64 row = sampled[i];
            row = row < 0 ? 0 : row < num_rows ? row : num_rows - 1;
            value[i] = widened(rows[row * stride + col]);
        }
    }
    sort<1, 1>(value);
    // Registers have no address that could be computed, so the search below needs a copy.
#pragma unroll
    for (int i = 0; i < SAMPLED; i++) sorted[i * COLUMNS] = value[i];

    const int last = num_sampled - 1;
    const float lowest = sorted[0], highest = sorted[last * COLUMNS];
    float spread = sorted[3 * last / 4 * COLUMNS] - sorted[last / 4 * COLUMNS];
    spread = spread > 0 ? spread : highest - lowest;
    float whole = 0;
#pragma unroll
    for (int i = 0; i < SAMPLED; i++) {
        // Nothing more is reached beyond the last value.
        if (i > 0 && i <= last) whole += sqrtf(fminf(value[i] - value[i - 1], WIDEST_GAP * spread));
        reached[i * COLUMNS] = whole;
    }

    float edge = lowest - GUARD * spread;
    float* out = edges + col;
    *out = edge;
    for (int inner = 1; inner < num_edges - 1; inner++) {
        const float target = whole * ((float)inner / (float)(num_edges - 1));
        // The number of sums below the target, again by a binary search. The last sum is not below.
        int after = 0;
#pragma unroll
        for (int half = SAMPLED / 2; half > 0; half /= 2) after += reached[(after + half - 1) * COLUMNS] < target ? half : 0;
        // None is below if there are no gaps.
        const int before = after > 0 ? after - 1 : 0;
        const float lower = sorted[before * COLUMNS], upper = sorted[after * COLUMNS];
        const float start = reached[before * COLUMNS], end = reached[after * COLUMNS];
        const float back = end > start ? (end - target) / (end - start) : 0;
        const float between = upper - (upper - lower) * back;
        edge = between > edge ? between : edge;
        out += num_cols;
        *out = edge;
    }
    out[num_cols] = highest + GUARD * spread;
}

// --- what is launched ----------------------------------------------------------------------------

#define BIN_ROWS(name, Stored)                                                                           \
    extern "C" __global__ void __launch_bounds__(COLUMNS) name(                                          \
        const Stored* rows, const float* edges, uint16* counts, float* sums, float* squares, float* ends, \
        int num_rows, int num_bins, int64 num_cols, int64 stride)                                        \
    {                                                                                                    \
        add_rows(rows, edges, counts, sums, squares, ends, num_rows, num_bins, num_cols, stride);        \
    }
#define BIN_EDGES(name, Stored)                                                                          \
    extern "C" __global__ void __launch_bounds__(COLUMNS) name(                                          \
        const Stored* rows, const int64* sampled, float* edges,                                          \
        int num_rows, int num_sampled, int num_edges, int64 num_cols, int64 stride)                      \
    {                                                                                                    \
        find_edges(rows, sampled, edges, num_rows, num_sampled, num_edges, num_cols, stride);            \
    }

BIN_ROWS(bin_rows_float32, float)
BIN_ROWS(bin_rows_bfloat16, uint16)
BIN_EDGES(bin_edges_float32, float)
BIN_EDGES(bin_edges_bfloat16, uint16)
