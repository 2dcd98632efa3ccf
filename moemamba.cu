// The layers on a GPU, and the Model on top of them.
//
// namespace gpu holds the kernels and launchers of struct Layers (moemamba.h), in its order, forward beside backward; the functions
// in cpu/plain.cpp have the same names and arguments, and say in plain loops what is computed here. What all kernels have in common:
//  - floatX in memory, real in registers. Rows are read 16 bytes at a time where alignment allows (kWidth elements), else one by one:
//    the same kernel, instantiated for both widths.
//  - No float atomics. Where many blocks add to one sum, each writes its part to scratch and reduce_partials adds the parts in order,
//    so that a result depends on the sizes and the device alone, never on timing.
//  - Long dimensions lie in gridDim.x; offsets into tensors are 64-bit.
// The Model, after it, is host code only: it calls the layers of whichever device it was given.
#include "moemamba.h"
#include "formats/huggingface.h"
#include "formats/json.h"
#include "formats/options.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <numeric>
#include <span>
#include <type_traits>
#include <unordered_set>

namespace fs = std::filesystem;

namespace gpu {
namespace {

// ------------------------------------------------------------------------------------------------------------------
// Common parts
#ifdef USE_CUDA
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")  // where a longer body would cost registers
#else
#define UNROLL
#define NO_UNROLL
#endif

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kThreads = 256;                            // per block, where nothing speaks for another number
constexpr int kWidth = 16 / sizeof(floatX);              // elements in the widest load or store
constexpr size_t kMaxShared = 99 << 10;                  // bytes of shared memory that a block may have on every GPU since 2020
constexpr real kLowest = std::numeric_limits<real>::lowest();  // finite, so that kLowest - kLowest is 0

void check_cuda(cudaError_t status, const char* file, int line) {
    if (status == cudaSuccess) return;
    fail("CUDA: %s (%s) at %s:%d. Errors of kernels are reported late: run again with CUDA_LAUNCH_BLOCKING=1, or under compute-sanitizer, "
         "to see which one it was.", cudaGetErrorString(status), cudaGetErrorName(status), file, line);
}
void check_cublas(cublasStatus_t status, const char* file, int line) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    fail("cuBLAS: %s at %s:%d. Run again with CUBLAS_LOGDEST_DBG=stderr CUBLAS_LOGINFO_DBG=1 to see the call.",
         cublasGetStatusString(status), file, line);
}
#define CUDA_CHECK(call) check_cuda(call, __FILE__, __LINE__)
#define CUBLAS_CHECK(call) check_cublas(call, __FILE__, __LINE__)
#define CHECK_LAUNCH() CUDA_CHECK(cudaGetLastError())

int multiprocessors() {
    int device = 0, n = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device));
    return n;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
unsigned blocks_for(int64_t work, int per_block) {
    const int64_t blocks = ceil_div(work, per_block);
    if (blocks > std::numeric_limits<int>::max()) fail("a launch of %lld blocks is too large: use a smaller batch", (long long)blocks);
    return unsigned(blocks);
}
// Threads for a row of so many vectors: whole warps, as few as one.
int row_threads(int64_t vectors, int most = kThreads) { return int(std::min<int64_t>(ceil_div(vectors, kWarp) * kWarp, most)); }

// Carves scratch memory into arrays. With a null base it only counts, so that one layout serves scratch_bytes and the launch.
struct Scratch {
    char* base;
    size_t used = 0;
    explicit Scratch(void* memory) : base(static_cast<char*>(memory)) {}
    template <class T>
    T* take(int64_t count) {
        T* array = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += (size_t(count) * sizeof(T) + 255) / 256 * 256;
        return array;
    }
};

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
// Calls f with a compile-time width: kWidth if all these sizes (in elements) and addresses allow 16-byte accesses, else 1.
template <int wide = kWidth, class F>
void with_width(std::initializer_list<int64_t> sizes, std::initializer_list<const void*> addresses, F&& f) {
    const bool fits = std::all_of(sizes.begin(), sizes.end(), [](int64_t n) { return n % kWidth == 0; }) &&
                      std::all_of(addresses.begin(), addresses.end(), aligned);
    if (fits) f(std::integral_constant<int, wide>());
    else f(std::integral_constant<int, 1>());
}

// Elements as they lie in memory, moved in one access, and as numbers to calculate with.
template <class T, int count>
struct alignas(sizeof(T) * count) Packed {
    T v[count];
};
using Vector = Packed<floatX, kWidth>;
template <int width>
struct Reals {
    real v[width];
};

template <int width, class T>
__device__ __forceinline__ Reals<width> load(const T* p) {
    constexpr int piece = width * sizeof(T) <= 16 ? width : 16 / sizeof(T);
    Reals<width> x;
    UNROLL for (int i = 0; i < width; i += piece) {
        const Packed<T, piece> part = *reinterpret_cast<const Packed<T, piece>*>(p + i);
        UNROLL for (int j = 0; j < piece; j++) x.v[i + j] = real(part.v[j]);
    }
    return x;
}
template <int width, class T>
__device__ __forceinline__ void store(T* p, const Reals<width>& x) {
    constexpr int piece = width * sizeof(T) <= 16 ? width : 16 / sizeof(T);
    UNROLL for (int i = 0; i < width; i += piece) {
        Packed<T, piece> part;
        UNROLL for (int j = 0; j < piece; j++) part.v[j] = T(x.v[i + j]);
        *reinterpret_cast<Packed<T, piece>*>(p + i) = part;
    }
}

// One spelling of the mathematics for both types of real; the accurate functions, not the fast ones.
__device__ __forceinline__ real exp_(real x) { return sizeof(real) == 8 ? real(exp(double(x))) : real(expf(float(x))); }
__device__ __forceinline__ real expm1_(real x) { return sizeof(real) == 8 ? real(expm1(double(x))) : real(expm1f(float(x))); }
__device__ __forceinline__ real log_(real x) { return sizeof(real) == 8 ? real(log(double(x))) : real(logf(float(x))); }
__device__ __forceinline__ real log1p_(real x) { return sizeof(real) == 8 ? real(log1p(double(x))) : real(log1pf(float(x))); }
__device__ __forceinline__ real sqrt_(real x) { return sizeof(real) == 8 ? real(sqrt(double(x))) : real(sqrtf(float(x))); }
// The quick quotient is good to 2 units in the last place here, and gives 0 where the exponential overflows.
__device__ __forceinline__ real sigmoid(real x) {
    return sizeof(real) == 8 ? 1 / (1 + exp_(-x)) : real(__fdividef(1.0f, float(1 + exp_(-x))));
}
__device__ __forceinline__ real softplus(real x) { return x <= 20 ? log1p_(exp_(x)) : x; }

// Sums and maxima over a warp or a block. The order is fixed, and every thread gets the same bits.
__device__ __forceinline__ int lane_id() { return int(threadIdx.x % kWarp); }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x / kWarp); }
__device__ __forceinline__ real warp_sum(real x) {
    UNROLL for (int mask = kWarp / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
    return x;
}
__device__ __forceinline__ real warp_max(real x) {
    UNROLL for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        const real other = __shfl_xor_sync(kAllLanes, x, mask);
        x = other > x ? other : x;
    }
    return x;
}
template <bool maximum>
__device__ __forceinline__ real block_combine(real x) {
    SHARED(real[kWarp], of_warp);
    x = maximum ? warp_max(x) : warp_sum(x);
    if (lane_id() == 0) of_warp[warp_id()] = x;
    __syncthreads();
    x = lane_id() < int(blockDim.x) / kWarp ? of_warp[lane_id()] : maximum ? kLowest : 0;
    x = maximum ? warp_max(x) : warp_sum(x);
    __syncthreads();  // of_warp may be needed again
    return x;
}
__device__ __forceinline__ real block_sum(real x) { return block_combine<false>(x); }
__device__ __forceinline__ real block_max(real x) { return block_combine<true>(x); }

// The second stage of sums over blocks:  out[i] += sum over p of partials[p, i], for partials (parts, count); up to three such sums, with
// as many parts, in one launch. 16 threads share the parts of one i; each adds its own in order, then the first adds the 16.
struct PartialSum {
    real* out;
    const real* partials;
    int64_t count;
};
struct PartialSums {
    PartialSum sum[3];
};
constexpr int kReduceRows = 16;
__global__ void reduce_partials_kernel(PartialSums sums, int parts) {
    SHARED(real[kReduceRows][kWarp], of_row);
    const PartialSum s = blockIdx.y == 0 ? sums.sum[0] : blockIdx.y == 1 ? sums.sum[1] : sums.sum[2];  // no index: that takes a stack
    const int64_t i = int64_t(blockIdx.x) * kWarp + threadIdx.x;
    real sum = 0;
    if (i < s.count)
        for (int p = threadIdx.y; p < parts; p += kReduceRows) sum += s.partials[p * s.count + i];
    of_row[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || i >= s.count) return;
    for (int y = 1; y < kReduceRows; y++) sum += of_row[y][threadIdx.x];
    s.out[i] += sum;
}
void reduce_partials(int parts, std::initializer_list<PartialSum> list, cudaStream_t stream) {
    PartialSums sums = {};
    std::copy(list.begin(), list.end(), sums.sum);
    int64_t longest = 0;
    for (const PartialSum& s : list) longest = std::max(longest, s.count);
    LAUNCH(reduce_partials_kernel, dim3(blocks_for(longest, kWarp), unsigned(list.size())), dim3(kWarp, kReduceRows), 0, stream)(sums, parts);
    CHECK_LAUNCH();
}

// ------------------------------------------------------------------------------------------------------------------
// Memory
void* allocate(size_t bytes, const char* name) {
    if (bytes == 0) return nullptr;
    void* memory = nullptr;
    if (cudaMalloc(&memory, bytes) != cudaSuccess) {
        cudaGetLastError();  // it is reported here, and must not be reported again at the next launch
        size_t unused = 0, total = 0;
        if (cudaMemGetInfo(&unused, &total) != cudaSuccess) cudaGetLastError();
        fail("%s: cannot allocate %.1f MiB of device memory (%.1f of %.1f MiB are free). Use a smaller batch, sequence or model.", name,
             bytes / 1048576.0, unused / 1048576.0, total / 1048576.0);
    }
#ifndef USE_CUDA
    simt::name_allocation(memory, name);
#endif
    return memory;
}
void release(void* memory) { cudaFree(memory); }  // called by destructors; an error that it repeats was reported where it happened
void* allocate_host(size_t bytes, const char* name) {
    void* memory = nullptr;
    if (cudaMallocHost(&memory, bytes) != cudaSuccess) {
        cudaGetLastError();
        fail("%s: cannot allocate %zu bytes of page-locked host memory. Use a smaller batch.", name, bytes);
    }
    return memory;
}
void release_host(void* memory) { cudaFreeHost(memory); }
void zero(void* memory, size_t bytes, cudaStream_t stream) {
    if (bytes > 0) CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, stream));
}
void synchronize(cudaStream_t stream) { CUDA_CHECK(cudaStreamSynchronize(stream)); }
void upload_later(void* to_device, const void* from_host, size_t bytes, cudaStream_t stream) {
    if (bytes > 0) CUDA_CHECK(cudaMemcpyAsync(to_device, from_host, bytes, cudaMemcpyHostToDevice, stream));
}
void upload(void* to_device, const void* from_host, size_t bytes, cudaStream_t stream) {
    upload_later(to_device, from_host, bytes, stream);
    synchronize(stream);  // a GPU that shares the host's memory may read pageable memory late, too
}
void download(void* to_host, const void* from_device, size_t bytes, cudaStream_t stream) {
    if (bytes > 0) CUDA_CHECK(cudaMemcpyAsync(to_host, from_device, bytes, cudaMemcpyDeviceToHost, stream));
    synchronize(stream);
}
void copy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
    if (bytes > 0) CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
}

// ------------------------------------------------------------------------------------------------------------------
// Matrix products by cuBLAS, which is column-major: a row-major matrix is its transpose there, so C^T = B^T A^T.
template <class T>
constexpr cudaDataType_t data_type() {
    return sizeof(T) == 2 ? CUDA_R_16BF : sizeof(T) == 4 ? CUDA_R_32F : CUDA_R_64F;
}
// Products in float32 are float32: no TF32. The fast build is the bf16 one.
constexpr cublasComputeType_t kCompute = sizeof(real) == 8 ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;

cublasHandle_t cublas(cudaStream_t stream) {
    static const cublasHandle_t handle = [] {
        cublasHandle_t created;
        CUBLAS_CHECK(cublasCreate(&created));
        // Where cuBLAS cuts k into parts, it adds them up in float32, not in the type of the output.
        CUBLAS_CHECK(cublasSetMathMode(created, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
        return created;
    }();
    CUBLAS_CHECK(cublasSetStream(handle, stream));  // this takes the workspace away: set it again
    // With a workspace of our own, results do not depend on what else ran: on this stream, the only one there is.
    constexpr size_t workspace_bytes = 32 << 20;
    static void* const workspace = [] {
        void* memory;
        CUDA_CHECK(cudaMalloc(&memory, workspace_bytes));
        return memory;
    }();
    CUBLAS_CHECK(cublasSetWorkspace(handle, workspace, workspace_bytes));
    return handle;
}

template <class T>
struct Matrix {  // row-major
    T* data;
    int ld;
    int64_t stride = 0;  // to the next one of a batch
    bool transposed = false;
    Matrix t() const { return {data, ld, stride, true}; }  // the same memory, read as its transpose
};
using In = Matrix<const floatX>;
using Out = Matrix<floatX>;
using Gradient = Matrix<real>;
using RealIn = Matrix<const real>;

// c (m, n) = a (m, k) b (k, n), plus what c was if accumulate
template <class C, class AB>
void matmul(Matrix<C> c, Matrix<const AB> a, Matrix<const AB> b, int m, int n, int k, bool accumulate, cudaStream_t stream,
            int batch = 1) {
    const cublasHandle_t handle = cublas(stream);
    const real one = 1, keep = accumulate ? 1 : 0;
    const auto op = [](bool transposed) { return transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
    constexpr cudaDataType_t in = data_type<AB>(), out = data_type<C>();
    if (batch == 1)
        CUBLAS_CHECK(cublasGemmEx(handle, op(b.transposed), op(a.transposed), n, m, k, &one, b.data, in, b.ld, a.data, in, a.ld, &keep,
                                  c.data, out, c.ld, kCompute, CUBLAS_GEMM_DEFAULT));
    else
        CUBLAS_CHECK(cublasGemmStridedBatchedEx(handle, op(b.transposed), op(a.transposed), n, m, k, &one, b.data, in, b.ld, b.stride,
                                                a.data, in, a.ld, a.stride, &keep, c.data, out, c.ld, c.stride, batch, kCompute,
                                                CUBLAS_GEMM_DEFAULT));
}

// ------------------------------------------------------------------------------------------------------------------
// Linear
void linear_forward(floatX* out, int ld_out, const Linear& l, bool accumulate, cudaStream_t stream) {
    if (l.rows == 0) return;
    matmul(Out{out, ld_out}, In{l.in, l.ld_in}, In{l.weight, l.I}.t(), l.rows, l.O, l.I, accumulate, stream);
}
void linear_backward(floatX* d_in, int ld_d_in, real* d_weight, const floatX* d_out, int ld_d_out, const Linear& l, bool accumulate,
                     bool add_weight, cudaStream_t stream) {
    if (l.rows == 0) return;
    if (d_in) matmul(Out{d_in, ld_d_in}, In{d_out, ld_d_out}, In{l.weight, l.I}, l.rows, l.I, l.O, accumulate, stream);
    matmul(Gradient{d_weight, l.I}, In{d_out, ld_d_out}.t(), In{l.in, l.ld_in}, l.O, l.I, l.rows, add_weight, stream);
}

// ------------------------------------------------------------------------------------------------------------------
// Activations
template <int width>
__global__ void swiglu_forward_kernel(floatX* out, const floatX* gate_up, int F) {
    const int64_t row = blockIdx.x;
    for (int f = threadIdx.x * width; f < F; f += blockDim.x * width) {
        auto gate = load<width>(gate_up + row * 2 * F + f);
        const auto up = load<width>(gate_up + row * 2 * F + F + f);
        UNROLL for (int j = 0; j < width; j++) gate.v[j] *= sigmoid(gate.v[j]) * up.v[j];
        store(out + row * F + f, gate);
    }
}
void swiglu_forward(floatX* out, const floatX* gate_up, int rows, int F, cudaStream_t stream) {
    if (rows == 0) return;
    with_width({F}, {out, gate_up}, [&](auto width) {
        LAUNCH(swiglu_forward_kernel<width>, rows, row_threads(ceil_div(F, width)), 0, stream)(out, gate_up, F);
    });
    CHECK_LAUNCH();
}
template <int width>
__global__ void swiglu_backward_kernel(floatX* d_gate_up, const floatX* d_out, const floatX* gate_up, int F) {
    const int64_t row = blockIdx.x;
    for (int f = threadIdx.x * width; f < F; f += blockDim.x * width) {
        auto gate = load<width>(gate_up + row * 2 * F + f), up = load<width>(gate_up + row * 2 * F + F + f);
        const auto d = load<width>(d_out + row * F + f);
        UNROLL for (int j = 0; j < width; j++) {
            const real g = gate.v[j], s = sigmoid(g);
            gate.v[j] = d.v[j] * up.v[j] * s * (1 + g * (1 - s));
            up.v[j] = d.v[j] * g * s;
        }
        store(d_gate_up + row * 2 * F + f, gate);
        store(d_gate_up + row * 2 * F + F + f, up);
    }
}
void swiglu_backward(floatX* d_gate_up, const floatX* d_out, const floatX* gate_up, int rows, int F, cudaStream_t stream) {
    if (rows == 0) return;
    with_width({F}, {d_gate_up, d_out, gate_up}, [&](auto width) {
        LAUNCH(swiglu_backward_kernel<width>, rows, row_threads(ceil_div(F, width)), 0, stream)(d_gate_up, d_out, gate_up, F);
    });
    CHECK_LAUNCH();
}

template <int width>
__global__ void relu_forward_kernel(floatX* out, const floatX* in, int64_t count) {
    const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * width;
    if (i >= count) return;
    auto x = load<width>(in + i);
    UNROLL for (int j = 0; j < width; j++) x.v[j] = x.v[j] <= 0 ? 0 : x.v[j];  // so that NaN stays NaN
    store(out + i, x);
}
void relu_forward(floatX* out, const floatX* in, int64_t count, cudaStream_t stream) {
    if (count == 0) return;
    with_width({count}, {out, in}, [&](auto width) {
        LAUNCH(relu_forward_kernel<width>, blocks_for(count, kThreads * width), kThreads, 0, stream)(out, in, count);
    });
    CHECK_LAUNCH();
}
template <int width>
__global__ void relu_backward_kernel(floatX* d_in, const floatX* d_out, const floatX* in, int64_t count) {
    const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * width;
    if (i >= count) return;
    const auto x = load<width>(in + i);
    auto d = load<width>(d_out + i);
    UNROLL for (int j = 0; j < width; j++) d.v[j] = x.v[j] <= 0 ? 0 : d.v[j];
    store(d_in + i, d);
}
void relu_backward(floatX* d_in, const floatX* d_out, const floatX* in, int64_t count, cudaStream_t stream) {
    if (count == 0) return;
    with_width({count}, {d_in, d_out, in}, [&](auto width) {
        LAUNCH(relu_backward_kernel<width>, blocks_for(count, kThreads * width), kThreads, 0, stream)(d_in, d_out, in, count);
    });
    CHECK_LAUNCH();
}

// ------------------------------------------------------------------------------------------------------------------
// RMSNorm fused with the residual add: a warp per row
constexpr int kNormWarps = 4;
template <int width>
__global__ void rmsnorm_forward_kernel(floatX* out, real* sum, real* rstd, const real* residual, const floatX* branch, const real* weight,
                                       int rows, int C, real eps) {
    const int64_t row = int64_t(blockIdx.x) * kNormWarps + warp_id();
    if (row >= rows) return;
    real squares = 0;
    for (int c = lane_id() * width; c < C; c += kWarp * width) {
        auto x = load<width>(residual + row * C + c);
        if (branch) {
            const auto add = load<width>(branch + row * C + c);
            UNROLL for (int j = 0; j < width; j++) x.v[j] += add.v[j];
        }
        UNROLL for (int j = 0; j < width; j++) squares += x.v[j] * x.v[j];
        store(sum + row * C + c, x);
    }
    const real scale = 1 / sqrt_(warp_sum(squares) / C + eps);
    if (lane_id() == 0) rstd[row] = scale;
    for (int c = lane_id() * width; c < C; c += kWarp * width) {
        auto x = load<width>(sum + row * C + c);
        const auto w = load<width>(weight + c);
        UNROLL for (int j = 0; j < width; j++) x.v[j] *= scale * w.v[j];
        store(out + row * C + c, x);
    }
}
void rmsnorm_forward(floatX* out, real* sum, real* rstd, const real* residual, const floatX* branch, const real* weight, int rows, int C,
                     real eps, cudaStream_t stream) {
    if (rows == 0) return;
    with_width({C}, {out, sum, residual, branch, weight}, [&](auto width) {
        LAUNCH(rmsnorm_forward_kernel<width>, blocks_for(rows, kNormWarps), kNormWarps * kWarp, 0, stream)
        (out, sum, rstd, residual, branch, weight, rows, C, eps);
    });
    CHECK_LAUNCH();
}

// out (C) = the sum of what the block's warps have in shared memory: of_warps (warps, C)
__device__ void sum_warps(real* out, const real* of_warps, int C) {
    __syncthreads();
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        real total = 0;
        for (int w = 0; w < int(blockDim.x) / kWarp; w++) total += of_warps[w * C + c];
        out[c] = total;
    }
}
// d_x = rstd (g - x rstd^2 mean(g x)), g = weight d_out. The weight's gradient is a sum over rows: each warp keeps that of its rows
// in shared memory, each block writes one part.   partials (blocks, C)
template <int width>
__global__ void rmsnorm_backward_kernel(real* d_sum, floatX* d_branch, real* partials, const floatX* d_out, const real* sum,
                                        const real* rstd, const real* weight, int rows, int C) {
    DYNAMIC_SHARED(real, d_weight);  // (warps, C)
    const int warps = blockDim.x / kWarp;
    real* mine = d_weight + warp_id() * C;
    for (int c = lane_id() * width; c < C; c += kWarp * width) store(mine + c, Reals<width>{});
    for (int64_t row = int64_t(blockIdx.x) * warps + warp_id(); row < rows; row += int64_t(gridDim.x) * warps) {
        real dot = 0;
        for (int c = lane_id() * width; c < C; c += kWarp * width) {
            const auto x = load<width>(sum + row * C + c), w = load<width>(weight + c), d = load<width>(d_out + row * C + c);
            UNROLL for (int j = 0; j < width; j++) dot += w.v[j] * d.v[j] * x.v[j];
        }
        const real scale = rstd[row], pull = warp_sum(dot) / C * scale * scale;
        for (int c = lane_id() * width; c < C; c += kWarp * width) {
            const auto x = load<width>(sum + row * C + c), w = load<width>(weight + c), d = load<width>(d_out + row * C + c);
            auto total = load<width>(d_sum + row * C + c), sums = load<width>(mine + c);
            UNROLL for (int j = 0; j < width; j++) {
                sums.v[j] += d.v[j] * x.v[j] * scale;
                total.v[j] += scale * (w.v[j] * d.v[j] - x.v[j] * pull);
            }
            store(mine + c, sums);
            store(d_sum + row * C + c, total);
            if (d_branch) store(d_branch + row * C + c, total);
        }
    }
    sum_warps(partials + int64_t(blockIdx.x) * C, d_weight, C);
}
int rmsnorm_backward_warps(int C) {
    const int64_t most = (48 << 10) / (int64_t(C) * sizeof(real));
    if (most == 0) fail("rmsnorm_backward: rows of %d are too long for shared memory, which holds %d", C, int((48 << 10) / sizeof(real)));
    return int(std::min<int64_t>(most, 8));
}
int rmsnorm_backward_blocks(int rows, int C) {
    return int(std::min<int64_t>(ceil_div(rows, rmsnorm_backward_warps(C)), 2 * multiprocessors()));
}
struct NormScratch : Scratch {
    real* partials;
    NormScratch(void* memory, int rows, int C) : Scratch(memory) { partials = take<real>(int64_t(rmsnorm_backward_blocks(rows, C)) * C); }
};
size_t rmsnorm_scratch(int rows, int C) { return NormScratch(nullptr, rows, C).used; }
void rmsnorm_backward(real* d_sum, floatX* d_branch, real* d_weight, const floatX* d_out, const real* sum, const real* rstd,
                      const real* weight, void* scratch, int rows, int C, cudaStream_t stream) {
    if (rows == 0) return;
    const NormScratch s(scratch, rows, C);
    const int blocks = rmsnorm_backward_blocks(rows, C), warps = rmsnorm_backward_warps(C);
    with_width({C}, {d_sum, d_branch, d_out, sum, weight}, [&](auto width) {
        LAUNCH(rmsnorm_backward_kernel<width>, blocks, warps * kWarp, warps * C * sizeof(real), stream)
        (d_sum, d_branch, s.partials, d_out, sum, rstd, weight, rows, C);
    });
    reduce_partials(blocks, {{d_weight, s.partials, C}}, stream);
}

// ------------------------------------------------------------------------------------------------------------------
// RMSNorm of slices: narrow ones, of a row's dt, B or C; a warp per row, element by element
__device__ __forceinline__ real slice_rstd(const floatX* in, int C, real eps) {
    real squares = 0;
    for (int c = lane_id(); c < C; c += kWarp) squares += real(in[c]) * real(in[c]);
    return 1 / sqrt_(warp_sum(squares) / C + eps);
}
__global__ void slice_norm_forward_kernel(floatX* out, int ld_out, SliceNorm n) {
    const int64_t row = int64_t(blockIdx.x) * kNormWarps + warp_id();
    if (row >= n.rows) return;
    const floatX* const in = n.in + row * n.ld_in;
    const real rstd = slice_rstd(in, n.C, n.eps);
    for (int c = lane_id(); c < n.C; c += kWarp) out[row * ld_out + c] = floatX(real(in[c]) * rstd * n.weight[c]);
}
void slice_norm_forward(floatX* out, int ld_out, const SliceNorm& n, cudaStream_t stream) {
    if (n.rows == 0) return;
    LAUNCH(slice_norm_forward_kernel, blocks_for(n.rows, kNormWarps), kNormWarps * kWarp, 0, stream)(out, ld_out, n);
    CHECK_LAUNCH();
}
// As rmsnorm_backward_kernel.   partials (blocks, C)
__global__ void slice_norm_backward_kernel(floatX* d_in, real* partials, const floatX* d_out, int ld_d_out, SliceNorm n) {
    DYNAMIC_SHARED(real, d_weight);  // (warps, C)
    const int warps = blockDim.x / kWarp;
    real* const mine = d_weight + warp_id() * n.C;
    for (int c = lane_id(); c < n.C; c += kWarp) mine[c] = 0;
    for (int64_t row = int64_t(blockIdx.x) * warps + warp_id(); row < n.rows; row += int64_t(gridDim.x) * warps) {
        const floatX *const in = n.in + row * n.ld_in, *const d = d_out + row * ld_d_out;
        const real rstd = slice_rstd(in, n.C, n.eps);
        real dot = 0;
        for (int c = lane_id(); c < n.C; c += kWarp) dot += real(d[c]) * n.weight[c] * real(in[c]);
        const real pull = warp_sum(dot) / n.C * rstd * rstd;
        for (int c = lane_id(); c < n.C; c += kWarp) {
            mine[c] += real(d[c]) * real(in[c]) * rstd;
            d_in[row * n.ld_in + c] = floatX(rstd * (real(d[c]) * n.weight[c] - real(in[c]) * pull));
        }
    }
    sum_warps(partials + int64_t(blockIdx.x) * n.C, d_weight, n.C);
}
void slice_norm_backward(floatX* d_in, real* d_weight, const floatX* d_out, int ld_d_out, const SliceNorm& n, void* scratch,
                         cudaStream_t stream) {
    if (n.rows == 0) return;
    const NormScratch s(scratch, n.rows, n.C);
    const int blocks = rmsnorm_backward_blocks(n.rows, n.C), warps = rmsnorm_backward_warps(n.C);
    LAUNCH(slice_norm_backward_kernel, blocks, warps * kWarp, warps * n.C * sizeof(real), stream)(d_in, s.partials, d_out, ld_d_out, n);
    reduce_partials(blocks, {{d_weight, s.partials, n.C}}, stream);
}

// ------------------------------------------------------------------------------------------------------------------
// Stable counting sort into at most 256 buckets: embedding_backward sorts rows by token with it, 8 bits at a time, and dispatch_plan
// choices by expert. Three parts: count per tile of items; first position of each tile in each bucket; place the items, each behind those
// of its bucket that came before it. They are three kernels, or one where a single tile holds all.
constexpr int kBuckets = 256, kSortTile = 16 * kBuckets;  // items per block
static_assert(kBuckets == kThreads, "a thread for every bucket");
struct Sort {
    int *position_of = nullptr, *placed = nullptr;  // placed[position] = item, position_of[item] = position, or -1 past the bucket's capacity; or null
    int64_t slots = 0;  // of placed: those that no item takes become -1. 0: every item has its place
    int *load = nullptr, *offset = nullptr;  // (buckets) items of each, or null; (buckets + 1) where each starts: the running
                                             // sum of load, or e * capacity if there is one
    int* counts = nullptr;      // scratch (tiles, kBuckets): items of each bucket in each tile; then in the tiles before it
    const int *keys = nullptr, *items = nullptr;  // an item's bucket is its key's 8 bits from `shift` on; items, or null: 0, 1, 2, ...
    int shift = 0, count = 0, buckets = 0, capacity = 0;
};
int sort_tiles(int64_t count) { return int(std::max<int64_t>(1, ceil_div(count, kSortTile))); }
__device__ __forceinline__ int bucket_of(const Sort& s, int64_t i) {
    return (s.keys[s.items ? s.items[i] : int(i)] >> s.shift) & (kBuckets - 1);
}

__device__ __forceinline__ void sort_count(const Sort& s) {
    SHARED(int[kBuckets], found);
    const int t = threadIdx.x;
    found[t] = 0;
    __syncthreads();
    const int64_t first = int64_t(blockIdx.x) * kSortTile;
    for (int64_t i = first + t; i < min(first + kSortTile, int64_t(s.count)); i += kThreads)
        atomicAdd(&found[bucket_of(s, i)], 1);  // integers: the order does not matter
    for (int64_t i = int64_t(blockIdx.x) * kThreads + t; i < s.slots; i += int64_t(gridDim.x) * kThreads) s.placed[i] = -1;
    __syncthreads();
    s.counts[int64_t(blockIdx.x) * kBuckets + t] = found[t];
}

// One block, a thread for every bucket.
__device__ __forceinline__ void sort_scan(const Sort& s, int tiles) {
    SHARED(int[kBuckets / kWarp], of_warp);
    const int t = threadIdx.x;
    int total = 0;
    for (int tile = 0; tile < tiles; tile++) {
        const int n = s.counts[int64_t(tile) * kBuckets + t];
        s.counts[int64_t(tile) * kBuckets + t] = total;
        total += n;
    }
    int upto = total;  // of this bucket and those before it
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const int before = __shfl_up_sync(kAllLanes, upto, distance);
        if (lane_id() >= distance) upto += before;
    }
    if (lane_id() == kWarp - 1) of_warp[warp_id()] = upto;
    __syncthreads();
    for (int w = 0; w < warp_id(); w++) upto += of_warp[w];
    if (t >= s.buckets) return;
    if (s.load) s.load[t] = total;
    if (t == 0) s.offset[0] = 0;
    s.offset[t + 1] = s.capacity > 0 ? (t + 1) * s.capacity : upto;
}

__device__ __forceinline__ void sort_place(const Sort& s) {
    constexpr int warps = kThreads / kWarp;
    SHARED(int[warps][kBuckets], rank_of);  // of each warp's first item in each bucket
    SHARED(int[kBuckets], next);            // rank of each bucket's next item
    const int t = threadIdx.x;
    const int64_t first = int64_t(blockIdx.x) * kSortTile, last = min(first + kSortTile, int64_t(s.count));
    next[t] = s.counts[int64_t(blockIdx.x) * kBuckets + t];
    for (int64_t round = first; round < last; round += kThreads) {
        const int64_t i = round + t;
        const bool here = i < last;
        const int bucket = here ? bucket_of(s, i) : 0;
        unsigned peers = __ballot_sync(kAllLanes, here);  // lanes whose item goes to the same bucket
        for (int bit = 1; bit < kBuckets; bit *= 2) {
            const unsigned set = __ballot_sync(kAllLanes, (bucket & bit) != 0);
            peers &= (bucket & bit) != 0 ? set : ~set;
        }
        const int earlier = __popc(peers & ((1u << lane_id()) - 1));
        for (int w = 0; w < warps; w++) rank_of[w][t] = 0;
        __syncthreads();
        if (here && earlier == 0) rank_of[warp_id()][bucket] = __popc(peers);
        __syncthreads();
        int rank = next[t];
        for (int w = 0; w < warps; w++) {
            const int n = rank_of[w][t];
            rank_of[w][t] = rank;
            rank += n;
        }
        next[t] = rank;
        __syncthreads();
        if (here) {
            const int item = s.items ? s.items[i] : int(i), in_bucket = rank_of[warp_id()][bucket] + earlier;
            const bool fits = s.capacity == 0 || in_bucket < s.capacity;
            const int position = fits ? s.offset[bucket] + in_bucket : -1;
            if (s.position_of) s.position_of[item] = position;
            if (fits) s.placed[position] = item;
        }
        __syncthreads();
    }
}

__global__ void sort_count_kernel(Sort s) { sort_count(s); }
__global__ void sort_scan_kernel(Sort s, int tiles) { sort_scan(s, tiles); }
__global__ void sort_place_kernel(Sort s) { sort_place(s); }
__global__ void sort_kernel(Sort s) {
    sort_count(s);
    sort_scan(s, 1);
    sort_place(s);  // has barriers before it reads the offset
}
void counting_sort(const Sort& s, cudaStream_t stream) {
    const int tiles = sort_tiles(s.count);
    if (tiles == 1) LAUNCH(sort_kernel, 1, kThreads, 0, stream)(s);
    else {
        LAUNCH(sort_count_kernel, tiles, kThreads, 0, stream)(s);
        LAUNCH(sort_scan_kernel, 1, kThreads, 0, stream)(s, tiles);
        LAUNCH(sort_place_kernel, tiles, kThreads, 0, stream)(s);
    }
    CHECK_LAUNCH();
}

// ------------------------------------------------------------------------------------------------------------------
// Embedding
template <int width>
__global__ void embedding_forward_kernel(real* out, const int* tokens, const floatX* table, int C) {
    const int64_t row = blockIdx.x;
    const floatX* from = table + int64_t(tokens[row]) * C;
    for (int c = threadIdx.x * width; c < C; c += blockDim.x * width) store(out + row * C + c, load<width>(from + c));
}
void embedding_forward(real* out, const int* tokens, const floatX* table, int rows, int C, cudaStream_t stream) {
    if (rows == 0) return;
    with_width({C}, {out, table}, [&](auto width) {
        LAUNCH(embedding_forward_kernel<width>, rows, row_threads(ceil_div(C, width)), 0, stream)(out, tokens, table, C);
    });
    CHECK_LAUNCH();
}

// A block per position in the sorted order; the block at the head of a run of equal tokens adds up the run. Runs can be long (every
// fifth byte of a text is a space): blockDim.y groups of threads take every blockDim.y-th row of it, then the first adds the groups.
template <int width>
__global__ void embedding_backward_kernel(real* d_table, const real* d_out, const int* tokens, const int* sorted, int rows, int C) {
    SHARED(real[kThreads * width], sums);  // (groups, vectors of a row, width)
    const int first = blockIdx.x, token = tokens[sorted[first]];
    if (first > 0 && tokens[sorted[first - 1]] == token) return;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y, groups = blockDim.y;
    int last = first + 1, same;
    do {
        const int candidate = last + thread;
        same = __syncthreads_count(candidate < rows && tokens[sorted[min(candidate, rows - 1)]] == token);
        last += same;
    } while (same == threads);
    for (int begin = 0; begin < C; begin += blockDim.x * width) {
        const int c = begin + threadIdx.x * width;
        Reals<width> sum = {};
        for (int i = first + threadIdx.y; i < last && c < C; i += groups) {
            const auto x = load<width>(d_out + int64_t(sorted[i]) * C + c);
            UNROLL for (int j = 0; j < width; j++) sum.v[j] += x.v[j];
        }
        store(sums + thread * width, sum);
        __syncthreads();
        if (threadIdx.y == 0 && c < C) {
            real* to = d_table + int64_t(token) * C + c;
            auto total = load<width>(to);
            for (int y = 0; y < groups; y++) {
                const auto x = load<width>(sums + (y * blockDim.x + threadIdx.x) * width);
                UNROLL for (int j = 0; j < width; j++) total.v[j] += x.v[j];
            }
            store(to, total);
        }  // no barrier: a row that takes another round leaves room for one group only, whose threads read what is their own
    }
}
struct EmbeddingScratch : Scratch {
    int *sorted[2], *counts, *offset;
    EmbeddingScratch(void* memory, int64_t rows) : Scratch(memory) {
        for (int*& array : sorted) array = take<int>(rows);
        counts = take<int>(int64_t(sort_tiles(rows)) * kBuckets);
        offset = take<int>(kBuckets + 1);
    }
};
size_t embedding_scratch(int rows) { return EmbeddingScratch(nullptr, rows).used; }
void embedding_backward(real* d_table, const real* d_out, const int* tokens, void* scratch, int rows, int V, int C, cudaStream_t stream) {
    if (rows == 0) return;
    const EmbeddingScratch s(scratch, rows);
    const int* sorted = nullptr;  // in the order of the rows, until the first pass
    for (int shift = 0, pass = 0; shift == 0 || (shift < 32 && (V - 1) >> shift > 0); shift += 8, pass ^= 1) {
        counting_sort({.placed = s.sorted[pass], .offset = s.offset, .counts = s.counts, .keys = tokens, .items = sorted, .shift = shift,
                       .count = rows, .buckets = kBuckets}, stream);
        sorted = s.sorted[pass];
    }
    with_width({C}, {d_table, d_out}, [&](auto width) {
        const int vectors = row_threads(ceil_div(C, width));
        LAUNCH(embedding_backward_kernel<width>, rows, dim3(vectors, kThreads / vectors), 0, stream)
        (d_table, d_out, tokens, sorted, rows, C);
    });
    CHECK_LAUNCH();
}

// ------------------------------------------------------------------------------------------------------------------
// Causal depthwise convolution and SiLU. A thread owns some channels of a segment of time and slides a window of the last `taps`
// inputs through its registers, so that an input is read once, and taps - 1 of them again where a segment starts.
// Two instances: taps = 4 with vectors, which is every published model, and one that takes whatever comes.
// Weights lie by lag: w[k] multiplies the input of k steps ago; window[i] is the input of taps - 1 - i steps ago.
constexpr int kConvWidth = kWidth < 4 ? kWidth : 4;  // channels per thread: with more, the backward pass has no registers for them
constexpr int kConvTaps = 4;
constexpr int kConvSegments = 8;       // threads of a block along time; kWarp along channels
constexpr int kConvLeastSteps = 16, kConvMostSteps = 128;  // of a segment
constexpr int kConvBatch = 4;          // steps whose loads are under way together

struct ConvLayout {
    int segment_steps, segment_blocks, channel_blocks;
};
template <int width>
ConvLayout conv_layout(const Conv& c) {
    // Segments as long as can be while there are a thousand threads for each multiprocessor: short ones read more of their past.
    const int64_t columns = c.B * ceil_div(c.D, width), wanted = std::max<int64_t>(1, int64_t(multiprocessors()) * 1024 / columns);
    const int steps = int(std::clamp<int64_t>(ceil_div(ceil_div(c.T, wanted), kConvBatch) * kConvBatch, kConvLeastSteps, kConvMostSteps));
    return {steps, int(ceil_div(c.T, int64_t(steps) * kConvSegments)), int(ceil_div(c.D, kWarp * width))};
}
struct ConvThread {
    int64_t b;
    int d, begin, end, part;
    bool active;
};
template <int width>
__device__ __forceinline__ ConvThread conv_thread(const Conv& c, const ConvLayout& layout) {
    ConvThread t;
    const int channel_block = blockIdx.x % layout.channel_blocks;
    t.part = blockIdx.x / layout.channel_blocks;  // b * segment_blocks + block of segments
    t.b = t.part / layout.segment_blocks;
    t.d = (channel_block * kWarp + threadIdx.x) * width;
    const int64_t begin = (int64_t(t.part % layout.segment_blocks) * kConvSegments + threadIdx.y) * layout.segment_steps;
    t.active = t.d < c.D && begin < c.T;
    t.begin = t.active ? int(begin) : 0;
    t.end = t.active ? int(min(begin + layout.segment_steps, int64_t(c.T))) : 0;
    return t;
}
// Inputs before the first come from the state, which holds the last W - 1 of them.
template <int width>
__device__ __forceinline__ Reals<width> conv_input(const Conv& c, const ConvThread& thread, int t) {
    if (t >= 0) return load<width>(c.in + (thread.b * c.T + t) * c.ld_in + thread.d);
    if (c.initial_state && t >= 1 - c.W) return load<width>(c.initial_state + (thread.b * (c.W - 1) + c.W - 1 + t) * c.D + thread.d);
    return {};
}
template <int width, int taps>
struct ConvWindow {
    Reals<width> w[taps], x[taps];
    __device__ __forceinline__ ConvWindow(const Conv& c, const ConvThread& thread) {
        UNROLL for (int k = 0; k < taps; k++) {
            UNROLL for (int j = 0; j < width; j++) w[k].v[j] = k < c.W ? c.weight[int64_t(thread.d + j) * c.W + c.W - 1 - k] : 0;
            x[k] = k > 0 && k > taps - c.W ? conv_input<width>(c, thread, thread.begin - taps + k) : Reals<width>{};
        }
    }
    __device__ __forceinline__ void push(const Reals<width>& next) {
        UNROLL for (int i = 1; i < taps; i++) x[i - 1] = x[i];
        x[taps - 1] = next;
    }
    __device__ __forceinline__ real sum(int W, int j, real bias) const {  // tests k < W, as 0 * infinity is not 0
        UNROLL for (int k = 0; k < taps; k++)
            if (k < W) bias += w[k].v[j] * x[taps - 1 - k].v[j];
        return bias;
    }
};

template <int width, int taps>
__global__ void conv_forward_kernel(floatX* out, real* final_state, Conv c, ConvLayout layout) {
    const ConvThread thread = conv_thread<width>(c, layout);
    if (!thread.active) return;
    const int D = c.D, W = c.W;
    ConvWindow<width, taps> window(c, thread);
    const auto bias = load<width>(c.bias + thread.d);
    for (int first = thread.begin; first < thread.end; first += kConvBatch) {
        Reals<width> x[kConvBatch];
        UNROLL for (int i = 0; i < kConvBatch; i++)
            if (first + i < thread.end) x[i] = conv_input<width>(c, thread, first + i);
        UNROLL for (int i = 0; i < kConvBatch; i++) {
            const int t = first + i;
            if (t >= thread.end) break;
            window.push(x[i]);
            Reals<width> y;
            UNROLL for (int j = 0; j < width; j++) {
                const real a = window.sum(W, j, bias.v[j]);
                y.v[j] = a * sigmoid(a);
            }
            store(out + (thread.b * c.T + t) * D + thread.d, y);
        }
    }
    if (final_state && thread.end == c.T)
        UNROLL for (int i = 0; i < taps; i++)
            if (i > taps - W) store(final_state + (thread.b * (W - 1) + i - (taps - W + 1)) * D + thread.d, window.x[i]);
}
// Calls f with the instance's width and taps.
template <class F>
void with_conv(const Conv& c, std::initializer_list<const void*> addresses, F&& f) {
    if (c.W < 1 || c.W > kMaxConv) fail("the convolution's width is %d: 1 to %d are supported", c.W, kMaxConv);
    with_width<kConvWidth>({c.D, c.ld_in}, addresses, [&](auto width) {
        if constexpr (width > 1)
            if (c.W <= kConvTaps) return f(width, std::integral_constant<int, kConvTaps>());
        f(std::integral_constant<int, 1>(), std::integral_constant<int, kMaxConv>());
    });
}
void conv_forward(floatX* out, real* final_state, const Conv& c, cudaStream_t stream) {
    if (c.B == 0 || c.T == 0) return;
    with_conv(c, {out, final_state, c.in, c.bias, c.initial_state}, [&](auto width, auto taps) {
        const ConvLayout layout = conv_layout<width>(c);
        LAUNCH((conv_forward_kernel<width, taps>), blocks_for(int64_t(c.B) * layout.segment_blocks * layout.channel_blocks, 1),
               dim3(kWarp, kConvSegments), 0, stream)(out, final_state, c, layout);
    });
    CHECK_LAUNCH();
}

// Forward in time as well: at step t the window gives a[t] and so its gradient d_a[t], and the last `taps` of those give
// d_in[t - (taps - 1)] = sum_k w[k] d_a[t - (taps - 1) + k]. A segment runs on past its end until its own inputs are done, without
// adding to the weights there. Before the first input lies the initial state, behind the last the final state's gradient.
// weight_parts (B segment_blocks, D, W), bias_parts (B segment_blocks, D)
template <int width, int taps>
__global__ void conv_backward_kernel(ConvGradients out, real* weight_parts, real* bias_parts, const floatX* d_out,
                                     const real* d_final_state, Conv c, ConvLayout layout) {
    SHARED(real[kConvSegments][kWarp * width], sums);
    const ConvThread thread = conv_thread<width>(c, layout);
    const int T = c.T, D = c.D, W = c.W;
    Reals<width> d_w[taps] = {}, d_b = {};
    if (thread.active) {
        ConvWindow<width, taps> window(c, thread);
        const auto bias = load<width>(c.bias + thread.d);
        Reals<width> d_a[taps] = {};
        const int known = min(thread.end + W - 1, T);  // steps from here on add nothing
        for (int first = thread.begin; first < thread.end + taps - 1; first += kConvBatch) {
            Reals<width> x[kConvBatch] = {}, d[kConvBatch] = {};
            UNROLL for (int i = 0; i < kConvBatch; i++)
                if (first + i < known) {
                    x[i] = conv_input<width>(c, thread, first + i);
                    d[i] = load<width>(d_out + (thread.b * T + first + i) * D + thread.d);
                }
            UNROLL for (int i = 0; i < kConvBatch; i++) {
                const int t = first + i, s = t - (taps - 1);
                if (t >= thread.end + taps - 1) break;
                window.push(x[i]);
                UNROLL for (int k = 1; k < taps; k++) d_a[k - 1] = d_a[k];
                UNROLL for (int j = 0; j < width; j++) {
                    const real a = window.sum(W, j, bias.v[j]), gate = sigmoid(a);
                    d_a[taps - 1].v[j] = t < known ? d[i].v[j] * gate * (1 + a * (1 - gate)) : 0;
                    if (t < thread.end) {
                        d_b.v[j] += d_a[taps - 1].v[j];
                        UNROLL for (int k = 0; k < taps; k++)
                            if (k < W) d_w[k].v[j] += d_a[taps - 1].v[j] * window.x[taps - 1 - k].v[j];
                    }
                }
                if (s < thread.begin && !(thread.begin == 0 && s >= 1 - W && out.d_initial_state)) continue;
                Reals<width> g = {};
                if (d_final_state && s > T - W) g = load<width>(d_final_state + (thread.b * (W - 1) + s - (T - W + 1)) * D + thread.d);
                UNROLL for (int k = 0; k < taps; k++)
                    if (k < W)
                        UNROLL for (int j = 0; j < width; j++) g.v[j] += window.w[k].v[j] * d_a[k].v[j];
                if (s >= 0) store(out.d_in + (thread.b * T + s) * c.ld_in + thread.d, g);
                else store(out.d_initial_state + (thread.b * (W - 1) + s + W - 1) * D + thread.d, g);
            }
        }
    }
    // Add up the block's segments, earliest first: the bias (k = -1), then each weight.
    UNROLL for (int k = -1; k < taps; k++) {
        if (k >= W) break;
        UNROLL for (int j = 0; j < width; j++) sums[threadIdx.y][threadIdx.x * width + j] = k < 0 ? d_b.v[j] : d_w[k < 0 ? 0 : k].v[j];
        __syncthreads();
        if (threadIdx.y == 0 && thread.d < D)
            UNROLL for (int j = 0; j < width; j++) {
                real total = 0;
                for (int y = 0; y < kConvSegments; y++) total += sums[y][threadIdx.x * width + j];
                const int64_t channel = int64_t(thread.part) * D + thread.d + j;
                if (k < 0) bias_parts[channel] = total;
                else weight_parts[channel * W + W - 1 - k] = total;
            }
        __syncthreads();
    }
}
struct ConvScratch : Scratch {
    real *weight_parts, *bias_parts;
    ConvScratch(void* memory, int64_t parts, int D, int W) : Scratch(memory) {
        weight_parts = take<real>(parts * D * W);
        bias_parts = take<real>(parts * D);
    }
};
// As many parts as the shortest segments give, whatever the instance.
size_t conv_scratch(int B, int T, int D, int W) {
    return ConvScratch(nullptr, B * ceil_div(T, kConvSegments * kConvLeastSteps), D, W).used;
}
void conv_backward(const ConvGradients& d, const floatX* d_out, const real* d_final_state, const Conv& c, void* scratch,
                   cudaStream_t stream) {
    if (c.B == 0 || c.T == 0) return;
    with_conv(c, {d.d_in, d.d_initial_state, d_out, d_final_state, c.in, c.bias, c.initial_state}, [&](auto width, auto taps) {
        const ConvLayout layout = conv_layout<width>(c);
        const int parts = c.B * layout.segment_blocks;
        const ConvScratch s(scratch, parts, c.D, c.W);
        LAUNCH((conv_backward_kernel<width, taps>), blocks_for(int64_t(parts) * layout.channel_blocks, 1), dim3(kWarp, kConvSegments), 0,
               stream)(d, s.weight_parts, s.bias_parts, d_out, d_final_state, c, layout);
        reduce_partials(parts, {{d.d_weight, s.weight_parts, int64_t(c.D) * c.W}, {d.d_bias, s.bias_parts, c.D}}, stream);
    });
}

// ------------------------------------------------------------------------------------------------------------------
// Selective scan
//
// Per channel, with h (N) its state, . a product over its N states:
//   delta = softplus(dt + dt_bias);   A = -exp(A_log);   a = exp(delta A)
//   h_t = a h_{t-1} + delta u B_t;    y = C_t . h_t + skip u;   out = y silu(z)
// Backward, from the last step to the first. dh is the gradient of h_t, to begin with what comes of later steps; g that of y:
//   g = d_out silu(z);   d_z = d_out y silu'(z);   d_skip += g u
//   dh += g C_t;         d_C_t = sum over channels of g h_t;   d_B_t = sum over channels of dh delta u
//   d_delta = u (dh . B_t) + (dh a h_{t-1}) . A;   d_dt = d_delta softplus'(dt + dt_bias);   d_dt_bias += d_dt
//   dA += dh a h_{t-1} delta;   d_u = delta (dh . B_t) + skip g
//   dh = a dh            for the step before: the gradient of h_{t-1}
//
// Threads. A thread holds 4 states of a channel, and `split` threads hold a channel: 4 for N <= 16, 8 for N <= 32, 16 for N <= 64;
// states past N are zero. They lie in one warp, which has the channels in the low bits of the lane: its threads then read the same few
// B_t and C_t, and neighbouring channels of everything else. With N <= 16 a block's rows of channels are 256 bytes long.
//
// Tiles. Time passes in tiles, which come to shared memory by 16-byte loads, every element once, B_t and C_t for all of the block's
// channels, dt as delta. What is computed overwrites what is no longer needed, and leaves by 16-byte stores. Steps past the end have
// delta = 0, which leaves every state as it is.
//
// Sums over states are made for four steps together. Each of four threads of the channel ends up with one step's sum: that takes
// 3 shuffles instead of 8, and what follows from the sums is computed for four steps at once.
//
// Segments. Where sequences and channels do not fill the chip, time is cut into segments of whole chunks. A first pass finds what each
// segment but the last makes of a zero state, scan_carry turns that into the state that enters each one, and a second pass does the
// work. Both passes are one kernel. Backward is the same, right to left.
//
// Backward needs every state. The forward pass leaves one per chunk of kScanChunk = 64 steps. From it the chunk is run again, down a
// tree with branches of 4: keeping the states before each 16 steps, then before each 4, then before each one together with its a. That
// is 12 + 12 + 32 numbers in registers, and each a is computed 48/64 + 12/16 + 1 = 2.5 times. a h_{t-1} is never h_t - delta u B_t.
//
// Bytes from and to device memory, per token and channel, N = 16, one segment, D a multiple of the block's channels:
//                                        bf16                              float
//   forward   u dt z out                 8                                 16
//             chunk_states               1    (4 N / 64)                    1
//             B_t C_t                    0.5  (2 N 2 / 128 channels)        2    (2 N 4 / 64 channels)
//             in all / least             9.5 / 8 = 1.19                    19 / 16 = 1.19
//   backward  u dt z d_out; du d_dt dz   14                                28
//             chunk_states, B_t C_t      1.5                                3
//             parts of d_B_t d_C_t       2    (2 N 4, written and read)     4
//             in all / least             17.5 / 14 = 1.25                  35 / 28 = 1.25
// Sums over time (dA, d_skip, d_dt_bias) are parts per sequence and segment, (N + 2) 8 / T bytes. With segments, the first pass adds
// u and dt (forward: 4 or 8 bytes) or dt, z and d_out (backward: 6 or 12) of all segments but one.
struct ScanLaunch : Scan {
    int chunks, channel_blocks, segments, segment_steps;
    bool vectors, state_vectors;  // whether rows of activations, and of states, may be accessed 16 bytes at a time
};
constexpr int kScanThreads = 1024 / sizeof(floatX);  // of a block
constexpr int kStates = 4;                           // per thread
constexpr int kScanSteps = 4;                        // whose sums over states are made together
constexpr real kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Untimed tuning: these follow the assembler's report of registers and spills, never a clock.
//  - Blocks of scan_forward_kernel on a multiprocessor. It leaves a thread 64 registers in bf16, and every one of them is used.
//  - opaque(x) hides where x comes from: what follows from it is then computed again each time, instead of waiting in registers. Without
//    it scan_forward_kernel spills a few bytes.
//  - NO_UNROLL in scan_backward_kernel keeps one copy of its steps in the code.
constexpr int kForwardBlocks = sizeof(real) == 8 ? 1 : sizeof(floatX) == 4 ? 3 : 2;
__device__ __forceinline__ unsigned opaque(unsigned x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Arrays for `parts` sequences and segments, and parts of d_B_t and d_C_t (channel_blocks, rows, 2N).
struct ScanScratch : Scratch {
    real *segment_states, *delta_sums;  // (parts, D, N), (parts, D): see scan_carry
    real *A, *skip, *bias, *bc;         // parts of d_A_log, d_skip, d_dt_bias, (parts, D, N), (parts, D), (parts, D); of d_B_t and d_C_t
    ScanScratch(void* memory, int64_t parts, int64_t rows, int channel_blocks, int D, int N) : Scratch(memory) {
        segment_states = take<real>(parts * D * N);
        delta_sums = take<real>(parts * D);
        A = take<real>(parts * D * N);
        skip = take<real>(parts * D);
        bias = take<real>(parts * D);
        bc = take<real>(channel_blocks * rows * 2 * N);
    }
};

// A thread's states of the row that starts at p.
__device__ __forceinline__ Reals<kStates> load_states(const real* p, int n, int N, bool vectors) {
    Reals<kStates> x = {};
    if (vectors && n < N) x = load<kStates>(p + n);
    else UNROLL for (int j = 0; j < kStates; j++)
        if (n + j < N) x.v[j] = p[n + j];
    return x;
}
__device__ __forceinline__ void store_states(real* p, const Reals<kStates>& x, int n, int N, bool vectors) {
    if (vectors && n < N) store(p + n, x);
    else UNROLL for (int j = 0; j < kStates; j++)
        if (n + j < N) p[n + j] = x.v[j];
}
// log2(e) A, so that a = exp(delta A) is one power of two.
__device__ __forceinline__ Reals<kStates> load_decay(const real* A_log, int64_t d, int n, int N) {
    Reals<kStates> x = {};
    UNROLL for (int j = 0; j < kStates; j++)
        if (n + j < N) x.v[j] = -kLog2e * exp_(A_log[d * N + n + j]);
    return x;
}
// 2^x for x <= 0. The instruction's relative error is 2^-22.5; its results below 1e-38 are zero, which is all the same for a decay.
__device__ __forceinline__ real power_of_two(real x) {
#if defined(USE_CUDA) && !defined(PRECISION_DOUBLE)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return sizeof(real) == 8 ? real(exp2(double(x))) : real(exp2f(float(x)));
#endif
}

// A step of summing two values over lanes at once: lanes with this bit go on with the second, their partners with the first.
__device__ __forceinline__ real exchange(real first, real second, int bit) {
    const bool upper = lane_id() & bit;
    return (upper ? second : first) + __shfl_xor_sync(kAllLanes, upper ? first : second, bit);
}
__device__ __forceinline__ Vector& as_vector(floatX* p) { return *reinterpret_cast<Vector*>(p); }

// What the backward pass carries from step to step.
struct RunningGradients {
    Reals<kStates> dh = {}, dA = {};
    real d_skip = 0, d_bias = 0;
};
// A thread of a scan kernel: its place, its block's tile in shared memory, and what it does with them. Backward, a tile is a chunk.
template <int split, bool backward>
struct ScanThread {
    static constexpr int warps = kScanThreads / kWarp, channels = kScanThreads / split, warp_channels = kWarp / split;
    static constexpr int row_vectors = channels / kWidth;
    static constexpr int states = kStates * split, columns = 2 * states;  // of B_t and C_t
    // Forward: at most one vector of each array per thread, so that the next tile can wait in registers.
    static constexpr int steps = backward ? kScanChunk : std::min({32, kScanThreads / row_vectors, 128 / split});
    static constexpr int vectors = steps * row_vectors, elements = steps * channels;
    static constexpr int own_columns = steps * columns / kScanThreads;  // elements of B_t and C_t per thread
    static constexpr int sums = backward ? kScanSteps * columns : 0;    // of d_B_t and d_C_t, by each warp
    static constexpr size_t bytes = elements * (sizeof(real) + (backward ? 3 : 2) * sizeof(floatX)) +
                                    (steps * columns + 2 * channels + warps * sums) * sizeof(real);
    static_assert(steps % kScanSteps == 0 && kScanChunk % steps == 0 && own_columns * kScanThreads == steps * columns);
    static_assert(bytes <= (backward ? kMaxShared : 48 << 10));  // the first passes ask for no more than every kernel may have

    const ScanLaunch& in;
    int segment, begin, end;  // of the block, and its steps
    int part, n, channel;     // which of the channel's `split` threads it is; its first state; its channel in the block
    real *delta, *bc;         // (steps, channels), becomes d_dt; (steps, 2, states)
    real *bias, *skip;        // (channels)
    real* warp_sums;          // (warps, kScanSteps, 2, states)
    floatX *u, *z, *d_out;    // (steps, channels); z becomes out, or u and z become d_u and d_z
    Reals<kStates> decay;     // log2(e) A, so that a = exp(delta A) is one power of two

    // Needs a __syncthreads() before bias and skip are used.
    __device__ __forceinline__ ScanThread(const ScanLaunch& in, real* shared, int first_segment = 0) : in(in) {
        segment = first_segment + blockIdx.z;
        begin = segment * in.segment_steps;
        end = min(begin + in.segment_steps, in.T);
        part = lane_id() / warp_channels;
        n = part * kStates;
        channel = warp_id() * warp_channels + lane_id() % warp_channels;
        delta = shared, bc = delta + elements, bias = bc + steps * columns, skip = bias + channels, warp_sums = skip + channels;
        u = reinterpret_cast<floatX*>(warp_sums + warps * sums), z = u + elements, d_out = z + elements;
        if (threadIdx.x < channels) {
            const int d = blockIdx.y * channels + threadIdx.x;
            bias[threadIdx.x] = d < in.D ? in.dt_bias[d] : 0;
            skip[threadIdx.x] = d < in.D ? in.skip[d] : 0;
        }
        decay = has_channel() ? load_decay(in.A_log, d(), n, in.N) : Reals<kStates>{};
    }
    __device__ __forceinline__ int64_t b() const { return opaque(blockIdx.x); }
    __device__ __forceinline__ int d() const { return opaque(blockIdx.y) * channels + channel; }
    __device__ __forceinline__ bool has_channel() const { return d() < in.D; }
    __device__ __forceinline__ bool has_step() const { return part < kScanSteps; }  // of each four
    __device__ __forceinline__ int at(int step) const { return step * channels + channel; }
    // Rows of (B, D, N), (B, segments, D, N) and (B, chunks, D, N) tensors.
    __device__ __forceinline__ int64_t state_row() const { return b() * in.D + d(); }
    __device__ __forceinline__ int64_t segment_row() const { return (b() * in.segments + segment) * in.D + d(); }
    __device__ __forceinline__ int64_t chunk_row(int chunk) const { return (b() * in.chunks + chunk) * in.D + d(); }
    __device__ __forceinline__ Reals<kStates> load_row(const real* tensor, int64_t row) const {  // zeros without a tensor
        return tensor && has_channel() ? load_states(tensor + row * in.N, n, in.N, in.state_vectors) : Reals<kStates>{};
    }
    __device__ __forceinline__ void store_row(real* tensor, int64_t row, const Reals<kStates>& x) const {
        if (tensor && has_channel()) store_states(tensor + row * in.N, x, n, in.N, in.state_vectors);
    }

    // -------- between device memory and a tile, whose first step is `first`
    struct Place {
        int at, column;   // of a vector in the tile, and in its row there
        int d, channels;  // its first channel; how many of its channels exist, 0 past the segment's end
        int64_t row;      // of (B, T, ...) tensors
    };
    __device__ __forceinline__ Place place(unsigned vector, int first) const {
        const int step = vector / row_vectors, column = vector % row_vectors * kWidth, d = opaque(blockIdx.y) * channels + column;
        const int exist = first + step < end ? max(0, min(in.D - d, kWidth)) : 0;
        return {step * channels + column, column, d, exist, b() * in.T + first + step};
    }
    __device__ __forceinline__ Vector load_vector(const floatX* tensor, int ld, const Place& p) const {  // zeros for what does not exist
        const floatX* from = tensor + p.row * ld + p.d;
        Vector x;
        if (in.vectors && p.channels == kWidth) x = *reinterpret_cast<const Vector*>(from);
        else UNROLL for (int i = 0; i < kWidth; i++) x.v[i] = i < p.channels ? from[i] : floatX(real(0));
        return x;
    }
    __device__ __forceinline__ void store_vector(floatX* tensor, int ld, const Place& p, const Vector& x) const {
        floatX* to = tensor + p.row * ld + p.d;
        if (in.vectors && p.channels == kWidth) *reinterpret_cast<Vector*>(to) = x;
        else UNROLL for (int i = 0; i < kWidth; i++)
            if (i < p.channels) to[i] = x.v[i];
    }
    __device__ __forceinline__ void store_delta(const Vector& dt, const Place& p) const {
        Reals<kWidth> x;
        UNROLL for (int i = 0; i < kWidth; i++) x.v[i] = i < p.channels ? softplus(real(dt.v[i]) + bias[p.column + i]) : 0;
        store(delta + p.at, x);
    }
    // Element k of B_t and C_t (steps, 2, states).
    __device__ __forceinline__ floatX load_column(unsigned k, int first, bool want_B = true, bool want_C = true) const {
        const int t = first + int(k / columns), m = k % states;
        const bool is_C = k % columns >= states, exists = t < end && m < in.N && (is_C ? want_C : want_B);
        return exists ? (is_C ? in.C_t : in.B_t)[(b() * in.T + t) * in.ld_bc + m] : floatX(real(0));
    }
    // A thread's share of a tile, on its way while the block computes the tile before.
    struct Share {
        Vector u, dt, z;
        floatX bc[own_columns];
    };
    __device__ __forceinline__ void start_load(Share& s, int first, bool from_zero) const {
        const Place p = place(opaque(threadIdx.x), opaque(threadIdx.x) < vectors ? first : end);
        s.u = load_vector(in.u, in.D, p);
        s.dt = load_vector(in.dt, in.D, p);
        if (!from_zero) s.z = load_vector(in.z, in.ld_z, p);
        UNROLL for (int i = 0; i < own_columns; i++) s.bc[i] = load_column(opaque(threadIdx.x) + i * kScanThreads, first, true, !from_zero);
    }
    __device__ __forceinline__ void finish_load(const Share& s, int first, bool from_zero) const {
        if (opaque(threadIdx.x) < vectors) {
            const Place p = place(opaque(threadIdx.x), first);
            store_delta(s.dt, p);
            as_vector(u + p.at) = s.u;
            if (!from_zero) as_vector(z + p.at) = s.z;
        }
        UNROLL for (int i = 0; i < own_columns; i++) bc[threadIdx.x + i * kScanThreads] = real(s.bc[i]);
    }
    __device__ __forceinline__ void load_chunk(const floatX* d_out_tensor, int first) const {
        for (unsigned i = threadIdx.x; i < vectors; i += kScanThreads) {
            const Place p = place(i, first);
            as_vector(u + p.at) = load_vector(in.u, in.D, p);
            as_vector(z + p.at) = load_vector(in.z, in.ld_z, p);
            as_vector(d_out + p.at) = load_vector(d_out_tensor, in.D, p);
            store_delta(load_vector(in.dt, in.D, p), p);
        }
        for (unsigned k = threadIdx.x; k < steps * columns; k += kScanThreads) bc[k] = real(load_column(k, first));
    }
    __device__ __forceinline__ void store_chunk(const ScanGradients& d, int first) const {
        for (unsigned i = threadIdx.x; i < vectors; i += kScanThreads) {
            const Place p = place(i, first);
            Vector d_dt;
            UNROLL for (int j = 0; j < kWidth; j++) d_dt.v[j] = floatX(delta[p.at + j]);
            store_vector(d.d_dt, in.D, p, d_dt);
            store_vector(d.d_u, in.D, p, as_vector(u + p.at));
            store_vector(d.d_z, in.ld_z, p, as_vector(z + p.at));
        }
    }

    // -------- steps of the tile
    __device__ __forceinline__ Reals<kStates> B_t(int step) const { return load<kStates>(bc + step * columns + n); }
    __device__ __forceinline__ Reals<kStates> C_t(int step) const { return load<kStates>(bc + step * columns + states + n); }
    // Sums over the states of a channel, that is over its threads, for four steps. Thread `part` gets that of step part % 4.
    __device__ __forceinline__ real sum_over_states(const real (&x)[kScanSteps]) const {
        constexpr int stride = warp_channels;  // between the lanes of a channel
        real sum = exchange(exchange(x[0], x[1], stride), exchange(x[2], x[3], stride), 2 * stride);
        UNROLL for (int bit = 4; bit < split; bit *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit * stride);
        return sum;
    }
    // h = a h + delta u B_t
    __device__ __forceinline__ void advance(Reals<kStates>& h, int step) const {
        const real delta_t = delta[at(step)], delta_u = delta_t * real(u[at(step)]);
        const auto B = B_t(step);
        UNROLL for (int j = 0; j < kStates; j++) h.v[j] = power_of_two(delta_t * decay.v[j]) * h.v[j] + delta_u * B.v[j];
    }
    __device__ __forceinline__ void advance_four(Reals<kStates>& h, int first) const {
        UNROLL for (int s = 0; s < kScanSteps; s++) advance(h, first + s);
    }
    // Four steps of the forward pass; out takes the place of z.
    __device__ __forceinline__ void forward_four(Reals<kStates>& h, int first) const {
        real y[kScanSteps] = {};
        UNROLL for (int s = 0; s < kScanSteps; s++) {
            advance(h, first + s);
            const auto C = C_t(first + s);
            UNROLL for (int j = 0; j < kStates; j++) y[s] += C.v[j] * h.v[j];
        }
        const real sum = sum_over_states(y);
        if (!has_step()) return;
        const int own = at(first + part);
        const real gate = real(z[own]);
        z[own] = floatX((sum + skip[channel] * real(u[own])) * gate * sigmoid(gate));
    }
    // Four steps of the backward pass, given the state before the first of them: d_u, d_z and d_dt take the places of u, z and delta; each
    // warp's sums of d_B_t and d_C_t go to warp_sums.
    __device__ __forceinline__ void backward_four(RunningGradients& running, const Reals<kStates>& h_before, int first) const {
        // Forward through them, keeping every state, h[s] before step s, and every a.
        Reals<kStates> h[kScanSteps + 1], a[kScanSteps];
        real y[kScanSteps] = {};
        h[0] = h_before;
        UNROLL for (int s = 0; s < kScanSteps; s++) {
            const real delta_t = delta[at(first + s)], delta_u = delta_t * real(u[at(first + s)]);
            const auto B = B_t(first + s), C = C_t(first + s);
            UNROLL for (int j = 0; j < kStates; j++) {
                a[s].v[j] = power_of_two(delta_t * decay.v[j]);
                h[s + 1].v[j] = a[s].v[j] * h[s].v[j] + delta_u * B.v[j];
                y[s] += C.v[j] * h[s + 1].v[j];
            }
        }
        // Each of four threads has the sum of one step, its own, finds d_z and g of that step, and lends g to the others.
        const int own = at(first + part % kScanSteps);
        const real y_own = sum_over_states(y), delta_own = delta[own], u_own = real(u[own]);
        real g_own = 0;
        if (has_step()) {
            const real z_own = real(z[own]), d = real(d_out[own]), gate = sigmoid(z_own);
            g_own = d * z_own * gate;
            z[own] = floatX(d * (y_own + skip[channel] * u_own) * gate * (1 + z_own * (1 - gate)));
            running.d_skip += g_own * u_own;
        }
        // Backward through them.
        real dh_B[kScanSteps], dh_a_h_A[kScanSteps];  // dh . B_t;  (dh a h_{t-1}) . A log2(e)
        __syncthreads();                              // warp_sums of the four steps before have been read
        UNROLL for (int s = kScanSteps - 1; s >= 0; s--) {
            const real delta_t = delta[at(first + s)], delta_u = delta_t * real(u[at(first + s)]);
            const real g = __shfl_sync(kAllLanes, g_own, s * warp_channels + lane_id() % warp_channels);
            const auto B = B_t(first + s), C = C_t(first + s);
            real d_bc[kStates];
            dh_B[s] = dh_a_h_A[s] = 0;
            UNROLL for (int j = 0; j < kStates; j++) {
                const real dh = running.dh.v[j] + g * C.v[j], dh_a = dh * a[s].v[j], dh_a_h = dh_a * h[s].v[j];
                dh_B[s] += dh * B.v[j];
                dh_a_h_A[s] += dh_a_h * decay.v[j];
                running.dA.v[j] += dh_a_h * delta_t;
                d_bc[j] = exchange(dh * delta_u, g * h[s + 1].v[j], warp_channels / 2);
                running.dh.v[j] = dh_a;
            }
            sum_over_channels(warp_sums + warp_id() * sums + s * columns, d_bc);
        }
        const real dh_B_own = sum_over_states(dh_B), dh_a_h_A_own = sum_over_states(dh_a_h_A);
        __syncwarp();  // all lanes have read delta and u
        if (!has_step()) return;
        const real slope = delta_own > 20 ? 1 : -expm1_(-delta_own);  // softplus'(x) = sigmoid(x) = 1 - exp(-softplus(x))
        const real d_dt = (u_own * dh_B_own + kLn2 * dh_a_h_A_own) * slope;
        u[own] = floatX(delta_own * dh_B_own + skip[channel] * g_own);
        delta[own] = d_dt;
        running.d_bias += d_dt;
    }
    // Sums over the warp's channels of d_B_t and d_C_t of the thread's states. One exchange has been done: x is a sum of d_B_t in the
    // lower half of the channels, of d_C_t in the upper.
    __device__ __forceinline__ void sum_over_channels(real* to, real (&x)[kStates]) const {
        constexpr int left = split / 4;  // sums for each lane, in the end
        UNROLL for (int bit = warp_channels / 4, half = kStates / 2; bit > 0; bit /= 2, half /= 2)
            UNROLL for (int i = 0; i < half; i++) x[i] = exchange(x[i], x[i + half], bit);
        UNROLL for (int i = 0; i < left; i++) {
            const int k = lane_id() % warp_channels * left + i;  // 0..3: d_B_t of the four states, 4..7: d_C_t
            to[k / kStates * states + n + k % kStates] = x[i];
        }
    }
    // d_B_t and d_C_t of four steps: the sum of warp_sums.
    __device__ __forceinline__ void store_sums(real* bc_parts, int first) const {
        for (unsigned k = threadIdx.x; k < sums; k += kScanThreads) {
            real sum = 0;
            UNROLL for (int w = 0; w < warps; w++) sum += warp_sums[w * sums + k];
            const int t = first + int(k / columns), is_C = k / states % 2, m = k % states;
            if (t < end && m < in.N)
                bc_parts[((int64_t(blockIdx.y) * in.B + b()) * in.T + t) * 2 * in.N + is_C * in.N + m] = sum;
        }
    }
};

// from_zero: the first pass, which leaves what each segment makes of a zero state (segment_states) and the sum of its deltas
// (delta_sums), both (B, segments, ...). Else the work: the state that enters comes from segment_states, or, without segments, from
// initial_state.
template <int split, bool from_zero>
__global__ void __launch_bounds__(kScanThreads, kForwardBlocks)
scan_forward_kernel(floatX* out, real* final_state, real* chunk_states, ScanScratch scratch, ScanLaunch in) {
    DYNAMIC_SHARED(real, shared);
    const ScanThread<split, false> thread(in, shared);
    typename ScanThread<split, false>::Share next;
    thread.start_load(next, thread.begin, from_zero);
    Reals<kStates> h = {};
    if (!from_zero) {
        const bool first = in.segments == 1;
        h = thread.load_row(first ? in.initial_state : scratch.segment_states, first ? thread.state_row() : thread.segment_row());
    }
    real delta_sum = 0;
    __syncthreads();
    thread.finish_load(next, thread.begin, from_zero);
    __syncthreads();
    for (int first = thread.begin; first < thread.end; first += thread.steps) {
        if (!from_zero && unsigned(first) % kScanChunk == 0) thread.store_row(chunk_states, thread.chunk_row(first / kScanChunk), h);
        const bool more = first + thread.steps < thread.end;
        if (more) thread.start_load(next, first + thread.steps, from_zero);
        for (int step = 0; step < min(thread.steps, thread.end - first); step += kScanSteps) {
            if (!from_zero) thread.forward_four(h, step);
            else thread.advance_four(h, step);
            if (from_zero) UNROLL for (int s = 0; s < kScanSteps; s++) delta_sum += thread.delta[thread.at(step + s)];
        }
        __syncthreads();
        if (!from_zero && opaque(threadIdx.x) < thread.vectors) {
            const auto p = thread.place(opaque(threadIdx.x), first);
            thread.store_vector(out, in.D, p, as_vector(thread.z + p.at));
        }
        if (more) thread.finish_load(next, first + thread.steps, from_zero);
        __syncthreads();
    }
    if (!from_zero) {
        if (thread.end == in.T) thread.store_row(final_state, thread.state_row(), h);
        return;
    }
    thread.store_row(scratch.segment_states, thread.segment_row(), h);
    if (thread.has_channel() && thread.part == 0) scratch.delta_sums[thread.segment_row()] = delta_sum;
}

// The first pass backward: what a segment adds to the gradient of the state that enters it, if that of the state it leaves is zero.
// Not for the first segment, before which nothing comes.
template <int split>
__global__ void __launch_bounds__(kScanThreads, 1)
scan_backward_from_zero_kernel(ScanScratch scratch, const floatX* d_out, ScanLaunch in) {
    DYNAMIC_SHARED(real, shared);
    const ScanThread<split, false> thread(in, shared, 1);
    real* const g = reinterpret_cast<real*>(thread.u);  // (steps, channels), in the place of u and z
    static_assert(2 * sizeof(floatX) >= sizeof(real));
    Reals<kStates> dh = {};  // of the state before the step
    real delta_sum = 0;
    __syncthreads();
    const int last = (thread.end - 1 - thread.begin) / thread.steps * thread.steps;
    for (int first = thread.begin + last; first >= thread.begin; first -= thread.steps) {
        if (threadIdx.x < thread.vectors) {
            const auto p = thread.place(threadIdx.x, first);
            const Vector z = thread.load_vector(in.z, in.ld_z, p), d = thread.load_vector(d_out, in.D, p);
            Reals<kWidth> g_part;
            UNROLL for (int i = 0; i < kWidth; i++) g_part.v[i] = real(d.v[i]) * real(z.v[i]) * sigmoid(real(z.v[i]));
            store(g + p.at, g_part);
            thread.store_delta(thread.load_vector(in.dt, in.D, p), p);
        }
        for (unsigned k = threadIdx.x; k < thread.steps * thread.columns; k += kScanThreads)
            thread.bc[k] = real(thread.load_column(k, first, false, true));
        __syncthreads();
        UNROLL for (int step = thread.steps - 1; step >= 0; step--) {
            const real delta_t = thread.delta[thread.at(step)], g_t = g[thread.at(step)];
            const auto C = thread.C_t(step);
            UNROLL for (int j = 0; j < kStates; j++) dh.v[j] = power_of_two(delta_t * thread.decay.v[j]) * (dh.v[j] + g_t * C.v[j]);
            delta_sum += delta_t;
        }
        __syncthreads();
    }
    thread.store_row(scratch.segment_states, thread.segment_row(), dh);
    if (thread.has_channel() && thread.part == 0) scratch.delta_sums[thread.segment_row()] = delta_sum;
}

// Turns what each segment makes of zero (segment_states) into what enters it, from the first segment on, or from the last if reverse:
//   what enters the next one = exp(A sum of delta) * what enters + segment_states.    first (B, D, N) enters the first; or null: zeros
__global__ void scan_carry_kernel(ScanScratch scratch, const real* first, ScanLaunch in, bool reverse) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, DN = int64_t(in.D) * in.N, b = i / DN, dn = i % DN;
    if (b >= in.B) return;
    const real A = -exp_(in.A_log[dn]);
    real entering = first ? first[i] : 0;
    for (int k = 0; k < in.segments; k++) {
        const int64_t at = (b * in.segments + (reverse ? in.segments - 1 - k : k)) * DN + dn;
        const real next = k + 1 < in.segments ? exp_(A * scratch.delta_sums[at / in.N]) * entering + scratch.segment_states[at] : 0;
        scratch.segment_states[at] = entering;
        entering = next;
    }
}
void scan_carry(const ScanScratch& scratch, const real* first, const ScanLaunch& in, bool reverse, cudaStream_t stream) {
    LAUNCH(scan_carry_kernel, blocks_for(int64_t(in.B) * in.D * in.N, kThreads), kThreads, 0, stream)(scratch, first, in, reverse);
    CHECK_LAUNCH();
}

// One step, as in decoding: the states are read and written once, and nothing else counts. `split` neighbours share a channel.
constexpr int kStepThreads = 128;
__global__ void scan_step_kernel(floatX* out, real* final_state, real* chunk_states, Scan in, int split, bool state_vectors) {
    const int64_t group = (int64_t(blockIdx.x) * kStepThreads + threadIdx.x) / split;
    const bool valid = group < int64_t(in.B) * in.D;
    const int64_t i = valid ? group : 0, b = i / in.D, d = i % in.D;
    const int part = threadIdx.x % split, n = part * kStates;
    const real delta = softplus(real(in.dt[i]) + in.dt_bias[d]), u = real(in.u[i]);
    const Reals<kStates> decay = load_decay(in.A_log, d, n, in.N);
    Reals<kStates> h = {};
    if (in.initial_state) h = load_states(in.initial_state + i * in.N, n, in.N, state_vectors);
    if (chunk_states && valid) store_states(chunk_states + i * in.N, h, n, in.N, state_vectors);
    real y = 0;
    UNROLL for (int j = 0; j < kStates; j++)
        if (n + j < in.N) {
            h.v[j] = power_of_two(delta * decay.v[j]) * h.v[j] + delta * u * real(in.B_t[b * in.ld_bc + n + j]);
            y += real(in.C_t[b * in.ld_bc + n + j]) * h.v[j];
        }
    for (int mask = split / 2; mask > 0; mask /= 2) y += __shfl_xor_sync(kAllLanes, y, mask);
    if (!valid) return;
    if (final_state) store_states(final_state + i * in.N, h, n, in.N, state_vectors);
    if (part > 0) return;
    const real z = real(in.z[b * in.ld_z + d]);
    out[i] = floatX((y + in.skip[d] * u) * z * sigmoid(z));
}

// The last few states in registers: a stack whose indices are constants, since registers have no addresses.
struct StateStack {
    static constexpr int depth = kScanSteps - 1;
    Reals<kStates> x[depth] = {};
    __device__ __forceinline__ void push(const Reals<kStates>& h) {
        UNROLL for (int i = 1; i < depth; i++) x[i - 1] = x[i];
        x[depth - 1] = h;
    }
    __device__ __forceinline__ Reals<kStates> pop() {
        const Reals<kStates> h = x[depth - 1];
        UNROLL for (int i = depth - 1; i > 0; i--) x[i] = x[i - 1];
        return h;
    }
};

template <int split>
__global__ void __launch_bounds__(kScanThreads, 1)
scan_backward_kernel(ScanGradients d, ScanScratch parts, const floatX* d_out, const real* d_final_state, const real* chunk_states,
                     ScanLaunch in) {
    constexpr int kGroup = kScanSteps * kScanSteps;
    DYNAMIC_SHARED(real, shared);
    const ScanThread<split, true> thread(in, shared);
    const bool last = in.segments == 1;
    RunningGradients running;
    running.dh = thread.load_row(last ? d_final_state : parts.segment_states, last ? thread.state_row() : thread.segment_row());
    __syncthreads();
    for (int chunk = (thread.end - 1) / kScanChunk; chunk * kScanChunk >= thread.begin; chunk--) {
        Reals<kStates> h = thread.load_row(chunk_states, thread.chunk_row(chunk));
        thread.load_chunk(d_out, chunk * kScanChunk);
        __syncthreads();
        StateStack before_16, before_4;
        NO_UNROLL for (int step = 0; step < kScanChunk - kGroup; step += kScanSteps) {
            if (step % kGroup == 0) before_16.push(h);
            thread.advance_four(h, step);
        }
        NO_UNROLL for (int group = kScanChunk - kGroup; group >= 0; group -= kGroup) {
            NO_UNROLL for (int step = group; step < group + kGroup - kScanSteps; step += kScanSteps) {
                before_4.push(h);
                thread.advance_four(h, step);
            }
            NO_UNROLL for (int step = group + kGroup - kScanSteps; step >= group; step -= kScanSteps) {
                thread.backward_four(running, h, step);
                __syncthreads();
                thread.store_sums(parts.bc, chunk * kScanChunk + step);
                h = before_4.pop();
            }
            h = before_16.pop();
        }
        thread.store_chunk(d, chunk * kScanChunk);
    }
    UNROLL for (int bit = 1; bit < kScanSteps; bit *= 2) {
        running.d_skip += __shfl_xor_sync(kAllLanes, running.d_skip, bit * thread.warp_channels);
        running.d_bias += __shfl_xor_sync(kAllLanes, running.d_bias, bit * thread.warp_channels);
    }
    if (blockIdx.z == 0) thread.store_row(d.d_initial_state, thread.state_row(), running.dh);
    UNROLL for (int j = 0; j < kStates; j++) running.dA.v[j] *= thread.decay.v[j] * kLn2;  // A is its own derivative by A_log
    thread.store_row(parts.A, thread.segment_row(), running.dA);
    if (!thread.has_channel() || thread.part > 0) return;
    parts.skip[thread.segment_row()] = running.d_skip;
    parts.bias[thread.segment_row()] = running.d_bias;
}

// d_B_t and d_C_t: sums over channel blocks, in their order.   parts (channel_blocks, rows, 2N)
__global__ void scan_backward_bc_kernel(floatX* d_B_t, floatX* d_C_t, int ld_bc, const real* parts, int channel_blocks, int64_t rows,
                                        int N) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, count = rows * 2 * N;
    if (i >= count) return;
    real sum = 0;
    for (int p = 0; p < channel_blocks; p++) sum += parts[p * count + i];
    const int64_t row = i / (2 * N);
    const int n = int(i % (2 * N));
    (n < N ? d_B_t + n : d_C_t + n - N)[row * ld_bc] = floatX(sum);
}

// Calls f with the number of threads that hold a channel.
template <class F>
void with_split(int N, F&& f) {
    if (N < 1 || N > kMaxStates) fail("the scan has %d states per channel: 1 to %d are supported", N, kMaxStates);
    if (N <= 16) f(std::integral_constant<int, 4>());
    else if (N <= 32) f(std::integral_constant<int, 8>());
    else f(std::integral_constant<int, 16>());
}
// How many of the kernel's blocks run at once. Also lets it have that much shared memory.
template <class... P>
int blocks_at_once(void (*kernel)(P...), int threads, size_t shared_bytes) {
    int blocks = 0;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
    return blocks * multiprocessors();
}
template <int split>
int scan_blocks(bool backward) {
    if (backward) return blocks_at_once(scan_backward_kernel<split>, kScanThreads, ScanThread<split, true>::bytes);
    return std::min(blocks_at_once(scan_forward_kernel<split, true>, kScanThreads, ScanThread<split, false>::bytes),
                    blocks_at_once(scan_forward_kernel<split, false>, kScanThreads, ScanThread<split, false>::bytes));
}
// As many segments as run at once. They cost a first pass, so there are at least two or none.
template <int split>
ScanLaunch scan_launch(const Scan& s, bool backward, std::initializer_list<const void*> activations,
                       std::initializer_list<const void*> states) {
    ScanLaunch in{s, int(scan_chunks(s.T)), int(ceil_div(s.D, ScanThread<split, false>::channels)), 0, 0, false, false};
    const int64_t wanted = std::clamp<int64_t>(scan_blocks<split>(backward) / (int64_t(s.B) * in.channel_blocks), 1, in.chunks);
    const int segment_chunks = int(ceil_div(in.chunks, wanted));
    in.segments = int(ceil_div(in.chunks, segment_chunks));
    in.segment_steps = segment_chunks * kScanChunk;
    in.vectors = s.D % kWidth == 0 && s.ld_z % kWidth == 0 && aligned(s.u) && aligned(s.dt) && aligned(s.z) &&
                 std::all_of(activations.begin(), activations.end(), aligned);
    in.state_vectors = s.N % kStates == 0 && std::all_of(states.begin(), states.end(), aligned);
    return in;
}
ScanScratch scan_arrays(void* scratch, const ScanLaunch& in) {
    return ScanScratch(scratch, int64_t(in.B) * in.segments, int64_t(in.B) * in.T, in.channel_blocks, in.D, in.N);
}
// Fewer sequences have more segments each. Together they are as many as run at once, or a segment for each sequence; each has a chunk.
size_t scan_scratch(int B, int T, int D, int N) {
    size_t bytes = 0;
    with_split(N, [&](auto split) {
        const int channel_blocks = int(ceil_div(D, ScanThread<split, false>::channels));
        const int at_once = std::max(scan_blocks<split>(false), scan_blocks<split>(true)) / channel_blocks;
        const int64_t parts = std::min<int64_t>(std::max(B, at_once), B * scan_chunks(T));
        bytes = ScanScratch(nullptr, parts, int64_t(B) * T, channel_blocks, D, N).used;
    });
    return bytes;
}
void scan_step(floatX* out, real* final_state, real* chunk_states, const Scan& s, cudaStream_t stream) {
    int split = 1;
    while (split * kStates < s.N) split *= 2;
    const bool vectors = s.N % kStates == 0 && aligned(final_state) && aligned(chunk_states) && aligned(s.initial_state);
    LAUNCH(scan_step_kernel, blocks_for(int64_t(s.B) * s.D * split, kStepThreads), kStepThreads, 0, stream)
    (out, final_state, chunk_states, s, split, vectors);
    CHECK_LAUNCH();
}
void scan_forward(floatX* out, real* final_state, real* chunk_states, const Scan& s, void* scratch, cudaStream_t stream) {
    if (s.B == 0 || s.T == 0) return;
    if (s.T == 1) return scan_step(out, final_state, chunk_states, s, stream);
    with_split(s.N, [&](auto split) {
        const ScanLaunch in = scan_launch<split>(s, false, {out}, {final_state, chunk_states, s.initial_state});
        const ScanScratch arrays = scan_arrays(scratch, in);
        const auto blocks = [&](int segments) { return dim3(s.B, in.channel_blocks, segments); };
        constexpr size_t bytes = ScanThread<split, false>::bytes;
        if (in.segments > 1) {
            LAUNCH((scan_forward_kernel<split, true>), blocks(in.segments - 1), kScanThreads, bytes, stream)
            (out, final_state, chunk_states, arrays, in);
            scan_carry(arrays, s.initial_state, in, false, stream);
        }
        LAUNCH((scan_forward_kernel<split, false>), blocks(in.segments), kScanThreads, bytes, stream)
        (out, final_state, chunk_states, arrays, in);
    });
    CHECK_LAUNCH();
}
void scan_backward(const ScanGradients& d, const floatX* d_out, const real* d_final_state, const Scan& s, const real* chunk_states,
                   void* scratch, cudaStream_t stream) {
    if (s.B == 0 || s.T == 0) return;
    with_split(s.N, [&](auto split) {
        const ScanLaunch in = scan_launch<split>(s, true, {d.d_u, d.d_dt, d.d_z, d_out}, {d.d_initial_state, d_final_state, chunk_states});
        const ScanScratch arrays = scan_arrays(scratch, in);
        const auto blocks = [&](int segments) { return dim3(s.B, in.channel_blocks, segments); };
        if (in.segments > 1) {
            LAUNCH(scan_backward_from_zero_kernel<split>, blocks(in.segments - 1), kScanThreads, (ScanThread<split, false>::bytes), stream)
            (arrays, d_out, in);
            scan_carry(arrays, d_final_state, in, true, stream);
        }
        LAUNCH(scan_backward_kernel<split>, blocks(in.segments), kScanThreads, (ScanThread<split, true>::bytes), stream)
        (d, arrays, d_out, d_final_state, chunk_states, in);
        const int64_t rows = int64_t(s.B) * s.T, DN = int64_t(s.D) * s.N;
        LAUNCH(scan_backward_bc_kernel, blocks_for(rows * 2 * s.N, kThreads), kThreads, 0, stream)
        (d.d_B_t, d.d_C_t, s.ld_bc, arrays.bc, in.channel_blocks, rows, s.N);
        const std::initializer_list<PartialSum> sums = {{d.d_A_log, arrays.A, DN}, {d.d_skip, arrays.skip, s.D},
                                                        {d.d_dt_bias, arrays.bias, s.D}};
        reduce_partials(s.B * in.segments, sums, stream);
    });
}

// ------------------------------------------------------------------------------------------------------------------
// Selective scan in a closed loop (moemamba.h has the equations, cpu/plain.cpp their derivatives). The output comes back as input, so time
// can be cut neither into segments nor into tiles that look ahead: a channel is walked step by step, by `lanes` threads with kStates states
// each. What no state depends on, they all compute alike. B_t, C_t and C_t . B_t of a chunk come to shared memory, for all channels of a
// block. Backward runs a chunk of kLoopChunk steps again from the states before it, keeps what it needs of each step in shared memory, and
// then goes back through them.
//
// Bytes from and to device memory, per token and channel, N = 16, tau = 8, in float (16 channels a block):
//   forward    u dt z out 16;  chunk_states 6.5 (4 (N + 2 + tau) / 16);  B_t C_t 8 (2 N 4 / 16)
//   backward   u twice, dt twice, z d_out d_u d_dt d_z 36;  chunk_states 6.5;  B_t C_t 8;  parts of d_B_t d_C_t 16 (written and read)
constexpr int kLoopThreads = sizeof(real) == 8 ? 32 : 64;  // of a block
struct LoopTile {
    real B[kLoopChunk][kMaxStates], C[kLoopChunk][kMaxStates], CB[kLoopChunk], BB[kLoopChunk], CC[kLoopChunk];
    __device__ __forceinline__ void load(const Scan& s, int64_t row, int count) {
        __syncthreads();  // the last one may be in use
        for (int i = threadIdx.x; i < count * s.N; i += kLoopThreads) {
            const int t = i / s.N, n = i % s.N;
            B[t][n] = real(s.B_t[(row + t) * s.ld_bc + n]);
            C[t][n] = real(s.C_t[(row + t) * s.ld_bc + n]);
        }
        __syncthreads();
        for (int t = threadIdx.x; t < count; t += kLoopThreads) {
            CB[t] = BB[t] = CC[t] = 0;
            for (int n = 0; n < s.N; n++) {
                CB[t] += C[t][n] * B[t][n];
                BB[t] += B[t][n] * B[t][n];
                CC[t] += C[t][n] * C[t][n];
            }
        }
        __syncthreads();
    }
};
// A thread's place, and the parameters of its channel and of its states n to n + kStates - 1.
struct LoopThread {
    int lanes, d, n;  // threads of a channel; channel; first state
    int64_t b;
    bool there, first;  // or else there is no such channel: it goes along with the last one, and stores nothing; first of its channel
    real skip, dt_bias, delay = 0, output_noise = 0;
    int slowest = 0;  // state, of the least |A|
    real slowest_time;  // 1/a
    Reals<kStates> decay, zeta = {}, gamma = {};  // decay: log2(e) A
    static __host__ __device__ int blocks(int D, int lanes) { return int(ceil_div(D, kLoopThreads / lanes)); }
    __device__ __forceinline__ LoopThread(const ClosedLoop& c, int lanes) : lanes(lanes) {
        const Scan& s = c.plant;
        const int of_sequence = blocks(s.D, lanes), channel = int(blockIdx.x % of_sequence) * (kLoopThreads / lanes) + int(threadIdx.x) / lanes;
        b = blockIdx.x / of_sequence;
        there = channel < s.D;
        d = there ? channel : s.D - 1;
        n = int(threadIdx.x) % lanes * kStates;
        first = there && n == 0;
        skip = s.skip[d], dt_bias = s.dt_bias[d];
        if (c.delay) delay = c.delay[d];
        if (c.output_noise) output_noise = c.output_noise[d];
        decay = load_decay(s.A_log, d, n, s.N);
        const real* const A_log = s.A_log + int64_t(d) * s.N;
        for (int i = 1; i < s.N; i++)
            if (A_log[i] < A_log[slowest]) slowest = i;
        slowest_time = exp_(-A_log[slowest]);
        if (c.zeta) zeta = load_states(c.zeta + int64_t(d) * s.N, n, s.N, false), gamma = load_states(c.gamma + int64_t(d) * s.N, n, s.N, false);
    }
    __device__ __forceinline__ real sum(real x) const {  // over the channel's threads
        for (int mask = lanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
        return x;
    }
    __device__ __forceinline__ real noise(const ClosedLoop& c, int64_t row, int of) const {
        return c.noise_seed ? real(random_normal(c.noise_seed, kNoiseStream, uint64_t((row * c.plant.D + d) * (c.plant.N + 1) + of))) : 0;
    }
    __device__ __forceinline__ real rho(const LoopTile& tile, int t, real delta) const {
        return 1 / ((slowest_time + delta) * sqrt_(tile.BB[t] * tile.CC[t] + kLoopTiny));
    }
    __device__ __forceinline__ int64_t states_at(const ClosedLoop& c, int64_t group) const {  // of the channel; group: b, or chunk of b
        return (group * c.plant.D + d) * (c.plant.N + 2 + c.tau);
    }
    // h, k and p; the past outputs, newest first, go to past[tau - 1], past[tau - 2], ... , kLoopThreads apart
    __device__ __forceinline__ void load(const real* from, const ClosedLoop& c, Reals<kStates>& h, real& k, real& p, real* past) const {
        const int N = c.plant.N;
        h = load_states(from, n, N, false);
        k = from[N], p = from[N + 1];
        for (int m = 0; m < c.tau; m++) past[(c.tau - 1 - m) * kLoopThreads] = from[N + 2 + m];
    }
    // oldest: where in past the oldest is, of tau places in a ring
    __device__ __forceinline__ void store(real* all, const ClosedLoop& c, int64_t group, const Reals<kStates>& h, real k, real p,
                                          const real* past, int oldest) const {
        const int N = c.plant.N;
        real* const to = all + states_at(c, group);
        if (there) store_states(to, h, n, N, false);
        if (!first) return;
        to[N] = k, to[N + 1] = p;
        for (int m = 0; m < c.tau; m++) to[N + 2 + m] = past[(oldest + c.tau - 1 - m) % c.tau * kLoopThreads];
    }
};
// One step; newest: y_{t-1}, delayed: y_{t-tau}. Gives y_t and, before the clip, k_t.
struct LoopStep {
    real y, moved;
};
__device__ __forceinline__ LoopStep loop_step(const ClosedLoop& c, const LoopThread& me, const LoopTile& tile, int t, int64_t row,
                                              Reals<kStates>& h, real& k, real& p, real newest, real delayed) {
    const Scan& s = c.plant;
    const real u = real(s.u[row * s.D + me.d]), delta = softplus(real(s.dt[row * s.D + me.d]) + me.dt_bias), e = newest - u;
    const real moved = k + c.alpha * (e / sqrt_(e * e + c.eps * c.eps)) * p;
    k = moved > c.kappa ? c.kappa : moved < -c.kappa ? -c.kappa : moved;
    const real rho = me.rho(tile, t, delta);
    p = delta * rho * tile.CB[t] * e;
    const real v = u + rho * (me.delay * delayed - (c.gain ? k * e : 0));
    real sum = 0;
    UNROLL for (int j = 0; j < kStates; j++) {
        if (me.n + j >= s.N) break;
        h.v[j] = power_of_two(delta * me.decay.v[j]) * h.v[j] + delta * v * tile.B[t][me.n + j];
        if (c.state_noise != 0) h.v[j] += c.state_noise * me.noise(c, row, me.n + j);
        const real inside = me.zeta.v[j] * h.v[j] + me.gamma.v[j];
        sum += tile.C[t][me.n + j] * (c.zeta ? h.v[j] * inside * sigmoid(inside) : h.v[j]);
    }
    real y = me.skip * u + me.sum(sum);
    if (c.output_noise) y += me.output_noise * me.noise(c, row, s.N);
    return {y, moved};
}
__global__ void __launch_bounds__(kLoopThreads, 1) closed_loop_forward_kernel(floatX* out, real* final_state, real* chunk_states, ClosedLoop c,
                                                                         int lanes) {
    SHARED(LoopTile, tile);
    SHARED(real[kMaxDelay * kLoopThreads], outputs);  // of the last tau steps, each thread's own
    const Scan& s = c.plant;
    const LoopThread me(c, lanes);
    real* const past = outputs + threadIdx.x;
    Reals<kStates> h = {};
    real k = 0, p = 0, newest = 0;
    for (int m = 0; m < c.tau; m++) past[m * kLoopThreads] = 0;
    if (s.initial_state) me.load(s.initial_state + me.states_at(c, me.b), c, h, k, p, past);
    newest = past[(c.tau - 1) * kLoopThreads];
    if (c.gain) k += c.gain[me.d];
    int oldest = 0;  // place in past
    for (int begin = 0; begin < s.T; begin += kLoopChunk) {
        const int count = min(kLoopChunk, s.T - begin);
        const int64_t row = me.b * s.T + begin;
        tile.load(s, row, count);
        if (chunk_states) me.store(chunk_states, c, me.b * ceil_div(s.T, kLoopChunk) + begin / kLoopChunk, h, k, p, past, oldest);
        for (int t = 0; t < count; t++) {
            real& place = past[oldest * kLoopThreads];
            const LoopStep x = loop_step(c, me, tile, t, row + t, h, k, p, newest, place);
            place = newest = x.y;
            oldest = oldest + 1 < c.tau ? oldest + 1 : 0;
            const real z = real(s.z[(row + t) * s.ld_z + me.d]);
            if (me.first) out[(row + t) * s.D + me.d] = floatX(x.y * z * sigmoid(z));
        }
    }
    if (final_state) me.store(final_state, c, me.b, h, k - (c.gain ? c.gain[me.d] : 0), p, past, oldest);
}

// What backward keeps of a chunk: each thread its own numbers, kLoopThreads apart.
struct LoopKept {
    static constexpr int numbers = kLoopChunk * (kStates + 3) + 2 * (kMaxDelay + kLoopChunk);
    static constexpr size_t bytes = sizeof(real) * (numbers * kLoopThreads + 2 * kLoopChunk * kMaxStates * (kLoopThreads / kWarp));
    real* memory;
    __device__ __forceinline__ real& at(int i) const { return memory[i * kLoopThreads + threadIdx.x]; }
    __device__ __forceinline__ real& h(int t, int j) const { return at(t * kStates + j); }  // before the step
    __device__ __forceinline__ real& k(int t) const { return at(kLoopChunk * kStates + t); }
    __device__ __forceinline__ real& p(int t) const { return at(kLoopChunk * (kStates + 1) + t); }
    __device__ __forceinline__ real& moved(int t) const { return at(kLoopChunk * (kStates + 2) + t); }
    __device__ __forceinline__ real& y(int i) const { return at(kLoopChunk * (kStates + 3) + i); }  // y(tau + t): of step t
    __device__ __forceinline__ real& d_y(int i) const { return at(kLoopChunk * (kStates + 3) + kMaxDelay + kLoopChunk + i); }
    __device__ __forceinline__ real* warp_sums(int warp, int t) const {  // (2, kMaxStates): d_B_t, d_C_t
        return memory + numbers * kLoopThreads + (warp * kLoopChunk + t) * 2 * kMaxStates;
    }
};
// Parts of the parameters' gradients, one for each sequence, (B, D, N) and (B, D); of those of B_t and C_t, one for each of its blocks.
struct LoopParts : Scratch {
    real *A, *zeta, *gamma, *skip, *bias, *gain, *delay, *noise, *bc;  // bc: (blocks, B, T, 2N)
    LoopParts(void* memory, int64_t B, int64_t T, int D, int N, int blocks) : Scratch(memory) {
        for (real** part : {&A, &zeta, &gamma}) *part = take<real>(B * D * N);
        for (real** part : {&skip, &bias, &gain, &delay, &noise}) *part = take<real>(B * D);
        bc = take<real>(blocks * B * T * 2 * N);
    }
};
__global__ void __launch_bounds__(kLoopThreads, 1) closed_loop_backward_kernel(ClosedLoopGradients d, LoopParts parts, const floatX* d_out,
                                                                          const real* d_final_state, const real* chunk_states, ClosedLoop c,
                                                                          int lanes) {
    DYNAMIC_SHARED(real, memory);
    SHARED(LoopTile, tile);
    const LoopKept kept{memory};
    const Scan& s = c.plant;
    const int N = s.N, tau = c.tau, chunks = int(ceil_div(s.T, kLoopChunk));
    const LoopThread me(c, lanes);
    Reals<kStates> dh = {}, d_A = {}, d_zeta = {}, d_gamma = {};
    real d_k = 0, d_p = 0, d_skip = 0, d_bias = 0, d_gain = 0, d_delay = 0, d_noise = 0, d_slowest = 0;
    for (int i = 0; i < tau; i++) kept.d_y(i) = 0;
    if (d_final_state) me.load(d_final_state + me.states_at(c, me.b), c, dh, d_k, d_p, &kept.d_y(0));
    d_gain -= d_k;  // the final state has the gain less k_0
    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        const int count = min(kLoopChunk, s.T - chunk * kLoopChunk);
        const int64_t first_row = me.b * s.T + chunk * kLoopChunk;
        tile.load(s, first_row, count);
        Reals<kStates> h;
        real k, p;
        me.load(chunk_states + me.states_at(c, me.b * chunks + chunk), c, h, k, p, &kept.y(0));
        for (int t = 0; t < count; t++) {
            UNROLL for (int j = 0; j < kStates; j++) kept.h(t, j) = h.v[j];
            kept.p(t) = p;
            const LoopStep x = loop_step(c, me, tile, t, first_row + t, h, k, p, kept.y(tau + t - 1), kept.y(t));
            kept.k(t) = k, kept.moved(t) = x.moved, kept.y(tau + t) = x.y;
        }
        // The gradients of the outputs before this chunk's end move to their places in it; of its own outputs none is known yet.
        for (int i = tau - 1; i >= 0; i--) kept.d_y(count + i) = kept.d_y(i);
        for (int i = 0; i < count; i++) kept.d_y(i) = 0;
        for (int t = count - 1; t >= 0; t--) {
            const int64_t row = first_row + t, at = row * s.D + me.d;
            const real u = real(s.u[at]), raw = real(s.dt[at]) + me.dt_bias, delta = softplus(raw), e = kept.y(tau + t - 1) - u;
            const real z = real(s.z[row * s.ld_z + me.d]), gate = sigmoid(z), d_o = real(d_out[at]), CB = tile.CB[t];
            const real k_t = kept.k(t), delayed = kept.y(t), rho = me.rho(tile, t, delta), size = tile.BB[t] * tile.CC[t] + kLoopTiny;
            const real action = me.delay * delayed - (c.gain ? k_t * e : 0), v = u + rho * action;
            const real d_y = d_o * z * gate + kept.d_y(tau + t), d_CB = d_p * delta * rho * e;
            real dh_B = 0, dh_A = 0;
            Reals<kStates> d_B = {}, d_C = {};
            UNROLL for (int j = 0; j < kStates; j++) {
                if (me.n + j >= N) break;
                const real B = tile.B[t][me.n + j], C = tile.C[t][me.n + j];
                const real a = power_of_two(delta * me.decay.v[j]), decayed = a * kept.h(t, j);
                real h_t = decayed + delta * v * B, scaled, d_h = dh.v[j];
                if (c.state_noise != 0) h_t += c.state_noise * me.noise(c, row, me.n + j);
                if (c.zeta) {
                    const real inside = me.zeta.v[j] * h_t + me.gamma.v[j], share = sigmoid(inside), r = inside * share;
                    const real d_inside = d_y * C * h_t * (share + r * (1 - share));
                    scaled = r * h_t;
                    d_zeta.v[j] += d_inside * h_t;
                    d_gamma.v[j] += d_inside;
                    d_h += d_y * C * r + d_inside * me.zeta.v[j];
                } else {
                    scaled = h_t;
                    d_h += d_y * C;
                }
                d_B.v[j] = d_h * delta * v + d_CB * C;
                d_C.v[j] = d_y * scaled + d_CB * B;
                dh_B += d_h * B;
                dh_A += d_h * decayed * me.decay.v[j];
                d_A.v[j] += d_h * decayed * delta;
                dh.v[j] = d_h * a;
            }
            dh_B = me.sum(dh_B);
            dh_A = me.sum(dh_A);
            const real d_v = dh_B * delta, d_action = d_v * rho, d_log = (d_p * delta * CB * e + d_v * action) * rho;
            const real d_time = d_log / (me.slowest_time + delta);
            UNROLL for (int j = 0; j < kStates; j++) {
                if (me.n + j < N) {
                    d_B.v[j] -= d_log * tile.B[t][me.n + j] * (tile.CC[t] / size);
                    d_C.v[j] -= d_log * tile.C[t][me.n + j] * (tile.BB[t] / size);
                }
                real b = me.there ? d_B.v[j] : 0, g = me.there ? d_C.v[j] : 0;
                for (int mask = lanes; mask < kWarp; mask *= 2) {
                    b += __shfl_xor_sync(kAllLanes, b, mask);
                    g += __shfl_xor_sync(kAllLanes, g, mask);
                }
                if (lane_id() >= lanes || me.n + j >= N) continue;
                kept.warp_sums(warp_id(), t)[me.n + j] = b;
                kept.warp_sums(warp_id(), t)[kMaxStates + me.n + j] = g;
            }
            const real d_raw = (d_p * rho * CB * e + v * dh_B + kLn2 * dh_A - d_time) * (raw > 20 ? 1 : sigmoid(raw));
            real d_e = d_p * delta * rho * CB, d_u = d_y * me.skip + d_v;
            d_slowest += d_time * me.slowest_time;
            d_skip += d_y * u;
            d_bias += d_raw;
            if (c.output_noise) d_noise += d_y * me.noise(c, row, N);
            d_delay += d_action * delayed;
            kept.d_y(t) += d_action * me.delay;
            if (c.gain) {
                d_k -= d_action * e;
                d_e -= d_action * k_t;
            }
            if (kept.moved(t) != k_t) d_k = 0;  // clipped
            const real length = sqrt_(e * e + c.eps * c.eps);
            d_p = d_k * c.alpha * e / length;
            d_e += d_k * c.alpha * kept.p(t) * (c.eps * c.eps / (length * length * length));
            kept.d_y(tau + t - 1) += d_e;
            d_u -= d_e;
            if (!me.first) continue;
            d.plant.d_u[at] = floatX(d_u);
            d.plant.d_dt[at] = floatX(d_raw);
            d.plant.d_z[row * s.ld_z + me.d] = floatX(d_o * kept.y(tau + t) * gate * (1 + z * (1 - gate)));
        }
        __syncthreads();
        const int64_t block = blockIdx.x % LoopThread::blocks(s.D, lanes), rows = int64_t(s.B) * s.T;
        for (int i = threadIdx.x; i < count * 2 * N; i += kLoopThreads) {
            const int t = i / (2 * N), of = i % (2 * N);
            real sum = 0;
            for (int warp = 0; warp < kLoopThreads / kWarp; warp++) sum += kept.warp_sums(warp, t)[of < N ? of : kMaxStates + of - N];
            parts.bc[(block * rows + first_row + t) * 2 * N + of] = sum;
        }
    }
    d_gain += d_k;
    if (d.plant.d_initial_state) me.store(d.plant.d_initial_state, c, me.b, dh, d_k, d_p, &kept.d_y(0), 0);
    const int64_t channel = me.b * s.D + me.d;
    UNROLL for (int j = 0; j < kStates; j++) {
        d_A.v[j] *= me.decay.v[j] * kLn2;  // A is its own derivative by A_log
        if (me.n + j == me.slowest) d_A.v[j] += d_slowest;
    }
    if (me.there) {
        store_states(parts.A + channel * N, d_A, me.n, N, false);
        store_states(parts.zeta + channel * N, d_zeta, me.n, N, false);
        store_states(parts.gamma + channel * N, d_gamma, me.n, N, false);
    }
    if (!me.first) return;
    parts.skip[channel] = d_skip, parts.bias[channel] = d_bias, parts.gain[channel] = d_gain, parts.delay[channel] = d_delay;
    parts.noise[channel] = d_noise;
}
int loop_lanes(int N, int tau) {
    if (N < 1 || N > kMaxStates || tau < 1 || tau > kMaxDelay)
        fail("a closed loop with %d states and a delay of %d: 1 to %d, and 1 to %d, are supported", N, tau, kMaxStates, kMaxDelay);
    int lanes = 1;
    while (lanes * kStates < N) lanes *= 2;
    return lanes;
}
size_t closed_loop_scratch(int B, int T, int D, int N, int tau) {
    return LoopParts(nullptr, B, T, D, N, LoopThread::blocks(D, loop_lanes(N, tau))).used;
}
void closed_loop_forward(floatX* out, real* final_state, real* chunk_states, const ClosedLoop& c, void*, cudaStream_t stream) {
    if (c.plant.B == 0 || c.plant.T == 0) return;
    const int lanes = loop_lanes(c.plant.N, c.tau);
    LAUNCH(closed_loop_forward_kernel, blocks_for(int64_t(c.plant.B) * LoopThread::blocks(c.plant.D, lanes), 1), kLoopThreads, 0, stream)
    (out, final_state, chunk_states, c, lanes);
    CHECK_LAUNCH();
}
void closed_loop_backward(const ClosedLoopGradients& d, const floatX* d_out, const real* d_final_state, const ClosedLoop& c,
                          const real* chunk_states, void* scratch, cudaStream_t stream) {
    const Scan& s = c.plant;
    if (s.B == 0 || s.T == 0) return;
    const int lanes = loop_lanes(s.N, c.tau), blocks = LoopThread::blocks(s.D, lanes);
    const LoopParts parts(scratch, s.B, s.T, s.D, s.N, blocks);
    CUDA_CHECK(cudaFuncSetAttribute(closed_loop_backward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(LoopKept::bytes)));
    LAUNCH(closed_loop_backward_kernel, blocks_for(int64_t(s.B) * blocks, 1), kLoopThreads, LoopKept::bytes, stream)
    (d, parts, d_out, d_final_state, chunk_states, c, lanes);
    const int64_t rows = int64_t(s.B) * s.T, DN = int64_t(s.D) * s.N;
    LAUNCH(scan_backward_bc_kernel, blocks_for(rows * 2 * s.N, kThreads), kThreads, 0, stream)
    (d.plant.d_B_t, d.plant.d_C_t, s.ld_bc, parts.bc, blocks, rows, s.N);
    reduce_partials(s.B, {{d.plant.d_A_log, parts.A, DN}, {d.plant.d_skip, parts.skip, s.D}, {d.plant.d_dt_bias, parts.bias, s.D}}, stream);
    if (c.zeta) reduce_partials(s.B, {{d.d_zeta, parts.zeta, DN}, {d.d_gamma, parts.gamma, DN}}, stream);
    if (c.gain) reduce_partials(s.B, {{d.d_gain, parts.gain, s.D}}, stream);
    if (c.delay) reduce_partials(s.B, {{d.d_delay, parts.delay, s.D}}, stream);
    if (c.output_noise) reduce_partials(s.B, {{d.d_output_noise, parts.noise, s.D}}, stream);
}

// ------------------------------------------------------------------------------------------------------------------
// Rotary positions
//   A pair is a thread's for kRotateRows rows, so that its frequency is computed once for them. Angles are in turns, and in double until
//   whole turns are gone: see plain. sincospi(), because sin() takes a stack.
constexpr int kRotateRows = 16;
template <class T>
__device__ __forceinline__ void sine_and_cosine(T turns, T& sine, T& cosine) {
    if constexpr (sizeof(T) == 8) sincospi(2 * turns, &sine, &cosine);
    else sincospif(2 * turns, &sine, &cosine);
}
__global__ void rotate_kernel(floatX* out, int ld_out, int64_t stride_out, Rotary r, double log2_base, bool back, int row_blocks) {
    const int half = r.S / 2, pair = int(blockIdx.x / row_blocks * blockDim.x + threadIdx.x);
    if (pair >= r.heads * half) return;
    const int i = pair % half, at = pair / half * r.S + i;
    const double turns = exp2(-2.0 * i / r.S * log2_base) / 6.283185307179586;
    const int64_t first = int64_t(blockIdx.x % row_blocks) * kRotateRows, rows = min(first + kRotateRows, int64_t(r.B) * r.T);
    for (int64_t row = first; row < rows; row++) {
        const int64_t b = row / r.T, t = row % r.T;
        const floatX* const x = r.in + row * r.ld_in + at;
        floatX* const y = out + b * stride_out + t * ld_out + at;
        const floatX x0 = x[0], x1 = x[half];
        if (r.base == 0) {
            y[0] = x0, y[half] = x1;
            continue;
        }
        const double angle = double(r.position + t) * turns;
        real sine, cosine;
        sine_and_cosine(real(angle - floor(angle)), sine, cosine);
        if (back) sine = -sine;
        y[0] = floatX(real(x0) * cosine - real(x1) * sine);
        y[half] = floatX(real(x1) * cosine + real(x0) * sine);
    }
}
void rotate(floatX* out, int ld_out, int64_t stride_out, const Rotary& r, bool back, cudaStream_t stream) {
    const int64_t rows = int64_t(r.B) * r.T;
    if (rows == 0) return;
    const int row_blocks = int(ceil_div(rows, kRotateRows));
    const int64_t blocks = ceil_div(int64_t(r.heads) * (r.S / 2), kThreads) * row_blocks;
    LAUNCH(rotate_kernel, blocks_for(blocks, 1), kThreads, 0, stream)
    (out, ld_out, stride_out, r, r.base == 0 ? 0 : std::log2(r.base), back, row_blocks);
    CHECK_LAUNCH();
}

// ------------------------------------------------------------------------------------------------------------------
// Attention, a tile of kTile queries and kTile keys at a time: no more scores than that exist at once.
//
//   forward     each block has a tile of queries of one head and passes over the tiles of keys that they see. Softmax over what has been seen
//               so far (online, arXiv 2205.14135): where a larger score comes, the sums so far shrink by exp(old largest - new).
//   backward    p is computed again from lse. One kernel has a block for each tile of keys, which passes over the queries of all heads in the
//               group and sums d_k and d_v; another one for each tile of queries sums d_q. So there are no atomics, for 7 products, not 5.
//   One query   (decoding): attention_step_kernel, further down.
//
// A pair of tiles costs 2 products forward and 7 backward, of 2 kTile^2 S operations each, and reads, from L2 mostly, 2 kTile S elements
// forward (3, where S > kPart) and 10 backward: in bf16 64 operations a byte forward. Per head, device memory sees q and out once, and
// k and v once for each tile of queries that runs at another time.
//
// Sums lie in registers, in pieces of 16 x 16 that a warp shares; a head is in shared memory kPart columns at a time, so that any S fits.
constexpr int kTile = 128 / sizeof(floatX), kPart = 64, kPiece = 16;
constexpr int kTilePieces = kTile / kPiece, kPartPieces = kPart / kPiece, kWarps = kThreads / kWarp;
constexpr int kLdPart = kPart + 8, kLdScores = kTile + 8;  // in shared memory: so that rows begin in different banks
constexpr int kScorePieces = int(ceil_div(kTilePieces * kTilePieces, kWarps));  // of a warp
constexpr int kOutPieces = int(ceil_div(kTilePieces * kPartPieces, kWarps));
constexpr int kRowThreads = kThreads / kTile;  // that share a row of scores

// A 16 x 16 piece of sums, eight of them in each lane of a warp, and products of 16 x 16 matrices in shared memory that are added to it.
// By plain arithmetic, or for bf16 by tensor cores. Places: where in the piece a lane's sums are.
struct Places {
    int of[8];  // row * kPiece + column
    __device__ __forceinline__ int row(int i) const { return of[i] / kPiece; }
    __device__ __forceinline__ int column(int i) const { return of[i] % kPiece; }
};
template <class T>
struct PlainSum {
    real sum[8];
    __device__ __forceinline__ real& operator[](int i) { return sum[i]; }
    __device__ __forceinline__ void clear() {
        UNROLL for (int i = 0; i < 8; i++) sum[i] = 0;
    }
    template <bool a_transposed, bool b_transposed>
    __device__ __forceinline__ void add_product(const T* a, int ld_a, const T* b, int ld_b) {
        const int row = lane_id() / 2, column = lane_id() % 2 * 8;
        for (int k = 0; k < kPiece; k++) {
            const real x = real(a_transposed ? a[k * ld_a + row] : a[row * ld_a + k]);
            UNROLL for (int i = 0; i < 8; i++) sum[i] += x * real(b_transposed ? b[(column + i) * ld_b + k] : b[k * ld_b + column + i]);
        }
    }
    static __device__ __forceinline__ Places places() {
        Places at;
        UNROLL for (int i = 0; i < 8; i++) at.of[i] = lane_id() * 8 + i;  // half a row
        return at;
    }
};
template <class T>
struct TensorCoreSum {
    template <class Use, class Number, class... Layout>
    using Fragment = nvcuda::wmma::fragment<Use, kPiece, kPiece, kPiece, Number, Layout...>;
    Fragment<nvcuda::wmma::accumulator, float> sum;
    __device__ __forceinline__ float& operator[](int i) { return sum.x[i]; }
    __device__ __forceinline__ void clear() { nvcuda::wmma::fill_fragment(sum, 0.0f); }
    template <bool a_transposed, bool b_transposed>
    __device__ __forceinline__ void add_product(const T* a, int ld_a, const T* b, int ld_b) {
        using namespace nvcuda::wmma;
        Fragment<matrix_a, T, std::conditional_t<a_transposed, col_major, row_major>> left;
        Fragment<matrix_b, T, std::conditional_t<b_transposed, col_major, row_major>> right;
        load_matrix_sync(left, a, ld_a);
        load_matrix_sync(right, b, ld_b);
        mma_sync(sum, left, right, sum);
    }
    // CUDA does not say. But what is loaded lies as sums do.
    static __device__ __forceinline__ Places places() {
        SHARED(float[kPiece * kPiece], numbers);
        numbers[threadIdx.x] = float(threadIdx.x);
        __syncthreads();
        Fragment<nvcuda::wmma::accumulator, float> number;
        nvcuda::wmma::load_matrix_sync(number, numbers, kPiece, nvcuda::wmma::mem_row_major);
        Places at;
        UNROLL for (int i = 0; i < 8; i++) at.of[i] = int(number.x[i]);
        return at;
    }
};
static_assert(kThreads == kPiece * kPiece, "a thread for every place");
using Sum = std::conditional_t<std::is_same_v<floatX, __nv_bfloat16>, TensorCoreSum<floatX>, PlainSum<floatX>>;

// A head's rows in memory, from the first of a tile on.
struct HeadRows {
    const floatX* from;
    int64_t ld, rows;  // rows: that there are
};
// What all three kernels do. Every thread of the block comes to each function.
struct AttentionTile {
    floatX *left, *right;  // (kTile, kPart) with kLdPart
    real* scores;          // (kTile, kTile) with kLdScores
    floatX* p;             // the same
    Places at;
    int S;
    real scale;
    // The scores that a thread turns into probabilities: of one row, every kRowThreads-th.
    int row, first;

    __device__ __forceinline__ AttentionTile(const Attention& a, floatX* left, floatX* right, real* scores, floatX* p)
        : left(left), right(right), scores(scores), p(p), at(Sum::places()), S(a.S), scale(1 / sqrt_(real(a.S))),
          row(int(threadIdx.x) / kRowThreads), first(int(threadIdx.x) % kRowThreads) {}
    __device__ __forceinline__ int columns(int part) const { return min(kPart, S - part * kPart); }
    // A part of a tile; zeros where there are no rows, or columns.
    __device__ __forceinline__ void load(floatX* to, const HeadRows& h, int part) const {
        constexpr int vectors = kPart / kWidth;
        for (int i = threadIdx.x; i < kTile * vectors; i += kThreads) {
            const int r = i / vectors, c = i % vectors * kWidth;
            Reals<kWidth> x = {};
            if (r < h.rows && c < columns(part)) x = ::gpu::load<kWidth>(h.from + r * h.ld + part * kPart + c);
            store(to + r * kLdPart + c, x);
        }
    }
    // scores = a b^T, over all columns; a is there already if it is `kept` and has one part.
    __device__ __forceinline__ void multiply(const HeadRows& a, const HeadRows& b, bool kept = false) const {
        Sum sums[kScorePieces];
        UNROLL for (int n = 0; n < kScorePieces; n++) sums[n].clear();
        for (int part = 0; part * kPart < S; part++) {
            __syncthreads();  // left and right may be in use
            if (!kept || S > kPart) load(left, a, part);
            load(right, b, part);
            __syncthreads();
            UNROLL for (int n = 0; n < kScorePieces; n++) {
                const int piece = warp_id() + n * kWarps, i = piece / kTilePieces * kPiece, j = piece % kTilePieces * kPiece;
                if (i < kTile)
                    for (int k = 0; k < columns(part); k += kPiece)
                        sums[n].template add_product<false, true>(left + i * kLdPart + k, kLdPart, right + j * kLdPart + k, kLdPart);
            }
        }
        UNROLL for (int n = 0; n < kScorePieces; n++) {
            const int piece = warp_id() + n * kWarps, i = piece / kTilePieces * kPiece, j = piece % kTilePieces * kPiece;
            if (i < kTile)
                UNROLL for (int e = 0; e < 8; e++) scores[(i + at.row(e)) * kLdScores + j + at.column(e)] = sums[n][e];
        }
        __syncthreads();
    }
    // sums += p b, or p^T b, for a part of b in shared memory
    template <bool transposed>
    __device__ __forceinline__ void accumulate(Sum (&sums)[kOutPieces], const floatX* b, int part) const {
        UNROLL for (int n = 0; n < kOutPieces; n++) {
            const int piece = warp_id() + n * kWarps, i = piece / kPartPieces * kPiece, j = piece % kPartPieces * kPiece;
            if (i < kTile && j < columns(part))
                for (int k = 0; k < kTile; k += kPiece)
                    sums[n].template add_product<transposed, false>(p + (transposed ? k * kLdScores + i : i * kLdScores + k), kLdScores,
                                                                    b + k * kLdPart + j, kLdPart);
        }
    }
    // out = sums * factor[row], for the rows that there are
    __device__ __forceinline__ void write(floatX* out, int64_t ld, int64_t rows, Sum (&sums)[kOutPieces], int part,
                                          const real* factor) const {
        UNROLL for (int n = 0; n < kOutPieces; n++) {
            const int piece = warp_id() + n * kWarps, i = piece / kPartPieces * kPiece, j = piece % kPartPieces * kPiece;
            if (i < kTile)
                UNROLL for (int e = 0; e < 8; e++) {
                    const int r = i + at.row(e), c = j + at.column(e);
                    if (r < rows && c < columns(part))
                        out[r * ld + part * kPart + c] = floatX(factor ? sums[n][e] * factor[r] : sums[n][e]);
                }
        }
    }
    // p = exp(score - lse), 0 for keys that the query does not see. Returns the sum of what the thread has computed, before rounding.
    __device__ __forceinline__ real probabilities(int64_t visible, real lse) const {
        real sum = 0;
        for (int c = first; c < kTile; c += kRowThreads) {
            const real x = c <= visible ? exp_(scores[row * kLdScores + c] * scale - lse) : real(0);
            p[row * kLdScores + c] = floatX(x);
            sum += x;
        }
        return sum;
    }
    // With the d_p in scores, p becomes d_score = p (d_p - delta) scale.
    __device__ __forceinline__ void d_scores(real delta) const {
        for (int c = first; c < kTile; c += kRowThreads) {
            floatX& x = p[row * kLdScores + c];
            x = floatX(real(x) * (scores[row * kLdScores + c] - delta) * scale);
        }
    }
};
#define ATTENTION_TILE(name, a)                                                                             \
    SHARED(floatX[kTile * kLdPart], name##_left);                                                           \
    SHARED(floatX[kTile * kLdPart], name##_right);                                                          \
    SHARED(real[kTile * kLdScores], name##_scores);                                                         \
    SHARED(floatX[kTile * kLdScores], name##_p);                                                            \
    const AttentionTile name(a, name##_left, name##_right, name##_scores, name##_p)

__device__ __forceinline__ real row_sum(real x) {
    UNROLL for (int mask = kRowThreads / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
    return x;
}
__device__ __forceinline__ real row_max(real x) {
    UNROLL for (int mask = kRowThreads / 2; mask > 0; mask /= 2) x = max(x, __shfl_xor_sync(kAllLanes, x, mask));
    return x;
}

// Heads wider than 128 have two blocks, each with the sums of half their columns: more would not fit into registers.
template <int parts>
struct HeadBlock {
    int S, first;    // first part
    unsigned index;  // of the block, among those with other heads or tiles
    __device__ __forceinline__ explicit HeadBlock(int S) : S(S) {
        const unsigned blocks = S > parts * kPart ? 2 : 1;
        first = int(blockIdx.x % blocks) * parts;
        index = blockIdx.x / blocks;
    }
    __device__ __forceinline__ bool has(int part) const { return (first + part) * kPart < S; }
};

template <int parts>
__global__ void __launch_bounds__(kThreads, 1) attention_forward_kernel(floatX* out, real* lse, Attention a) {
    ATTENTION_TILE(tile, a);
    SHARED(real[kTile], factor);
    // The last tiles see the most keys: they begin.
    const HeadBlock<parts> block(a.S);
    const int h = int(block.index % a.H), b = int(block.index / a.H % a.B), group = h / (a.H / a.G);
    const int64_t t0 = (ceil_div(a.T, kTile) - 1 - block.index / (a.H * a.B)) * kTile, rows = a.T - t0;
    const int64_t keys = a.past + min(t0 + kTile, int64_t(a.T));
    const floatX *const k = a.k + b * a.stride_kv + group * a.S, *const v = a.v + b * a.stride_kv + group * a.S;
    const HeadRows q{a.q + (int64_t(b) * a.T + t0) * a.ld_q + h * a.S, a.ld_q, rows};
    Sum sums[parts][kOutPieces];
    UNROLL for (int part = 0; part < parts; part++)
        UNROLL for (int n = 0; n < kOutPieces; n++) sums[part][n].clear();
    real largest = kLowest, total = 0;  // of the thread's row, over the keys so far
    for (int64_t j0 = 0; j0 < keys; j0 += kTile) {
        tile.multiply(q, {k + j0 * a.ld_kv, a.ld_kv, keys - j0}, j0 > 0);
        const int64_t visible = a.past + t0 + tile.row - j0;
        const real* const scores = tile.scores + tile.row * kLdScores;
        real most = largest;
        for (int c = tile.first; c < kTile && c <= visible; c += kRowThreads) most = max(most, scores[c] * tile.scale);
        most = row_max(most);
        const real sum = tile.probabilities(visible, most);
        const real shrink = exp_(largest - most);
        total = total * shrink + row_sum(sum);
        largest = most;
        if (tile.first == 0) factor[tile.row] = shrink;
        UNROLL for (int part = 0; part < parts; part++) {
            if (!block.has(part)) break;
            if (part > 0) __syncthreads();  // right may be in use
            tile.load(tile.right, {v + j0 * a.ld_kv, a.ld_kv, keys - j0}, block.first + part);
            __syncthreads();  // p and factor are there, too
            UNROLL for (int n = 0; n < kOutPieces; n++) {
                const int i = (warp_id() + n * kWarps) / kPartPieces * kPiece;
                if (i < kTile)
                    UNROLL for (int e = 0; e < 8; e++) sums[part][n][e] *= factor[i + tile.at.row(e)];
            }
            tile.accumulate<false>(sums[part], tile.right, block.first + part);
        }
        __syncthreads();  // factor is in use
    }
    if (tile.first == 0) {
        factor[tile.row] = 1 / total;
        if (lse && block.first == 0 && tile.row < rows) lse[(int64_t(b) * a.T + t0 + tile.row) * a.H + h] = largest + log_(total);
    }
    __syncthreads();
    const int64_t width = int64_t(a.H) * a.S;
    UNROLL for (int part = 0; part < parts; part++)
        if (block.has(part))
            tile.write(out + (int64_t(b) * a.T + t0) * width + h * a.S, width, rows, sums[part], block.first + part, factor);
}

// delta (B * T, H) = sum_s d_out out; a warp for each
__global__ void attention_delta_kernel(real* delta, const floatX* d_out, const floatX* out, int64_t count, int S) {
    const int64_t i = int64_t(blockIdx.x) * kWarps + warp_id();
    if (i >= count) return;
    real sum = 0;
    for (int s = lane_id(); s < S; s += kWarp) sum += real(d_out[i * S + s]) * real(out[i * S + s]);
    sum = warp_sum(sum);
    if (lane_id() == 0) delta[i] = sum;
}

// For a tile of queries and one of keys: p and, when d_v needs p no more, d_score in its place. d_v += p^T d_out, if there is a d_v.
template <int parts, bool with_d_v>
__device__ __forceinline__ void attention_d_scores(const AttentionTile& tile, const HeadBlock<parts>& block, Sum (*d_v)[kOutPieces],
                                                   const HeadRows& q, const HeadRows& k, const HeadRows& v, const HeadRows& d_out,
                                                   int64_t visible, const real* lse, const real* delta, int H) {
    const bool there = tile.row < q.rows;
    tile.multiply(q, k);
    tile.probabilities(there ? visible : -1, there ? lse[int64_t(tile.row) * H] : 0);
    tile.multiply(d_out, v);
    if constexpr (with_d_v) {
        UNROLL for (int part = 0; part < parts; part++) {
            if (!block.has(part)) break;
            if (tile.S > kPart) {  // else it is there
                __syncthreads();
                tile.load(tile.left, d_out, block.first + part);
                __syncthreads();
            }
            tile.accumulate<true>(d_v[part], tile.left, block.first + part);
        }
        __syncthreads();  // p is in use
    }
    tile.d_scores(there ? delta[int64_t(tile.row) * H] : 0);
}

template <int parts>
__global__ void __launch_bounds__(kThreads, 1)
attention_backward_keys_kernel(floatX* d_k, floatX* d_v, const floatX* d_out, const real* lse, const real* delta, Attention a) {
    ATTENTION_TILE(tile, a);
    const HeadBlock<parts> block(a.S);
    const int group = int(block.index % a.G), b = int(block.index / a.G % a.B);
    const int64_t j0 = int64_t(block.index / (a.G * a.B)) * kTile, at = b * a.stride_kv + j0 * a.ld_kv + group * a.S;
    const HeadRows k{a.k + at, a.ld_kv, a.T - j0}, v{a.v + at, a.ld_kv, a.T - j0};
    Sum sum_k[parts][kOutPieces], sum_v[parts][kOutPieces];
    UNROLL for (int part = 0; part < parts; part++)
        UNROLL for (int n = 0; n < kOutPieces; n++) sum_k[part][n].clear(), sum_v[part][n].clear();
    for (int h = group * (a.H / a.G); h < (group + 1) * (a.H / a.G); h++)
        for (int64_t t0 = j0; t0 < a.T; t0 += kTile) {
            const int64_t row = int64_t(b) * a.T + t0, width = int64_t(a.H) * a.S, rows = a.T - t0;
            const HeadRows q{a.q + row * a.ld_q + h * a.S, a.ld_q, rows}, d{d_out + row * width + h * a.S, width, rows};
            attention_d_scores<parts, true>(tile, block, sum_v, q, k, v, d, t0 + tile.row - j0, lse + row * a.H + h,
                                            delta + row * a.H + h, a.H);
            UNROLL for (int part = 0; part < parts; part++) {
                if (!block.has(part)) break;
                __syncthreads();  // left may be in use
                tile.load(tile.left, q, block.first + part);
                __syncthreads();
                tile.accumulate<true>(sum_k[part], tile.left, block.first + part);
            }
        }
    UNROLL for (int part = 0; part < parts; part++)
        if (block.has(part)) {
            tile.write(d_k + at, a.ld_kv, k.rows, sum_k[part], block.first + part, nullptr);
            tile.write(d_v + at, a.ld_kv, k.rows, sum_v[part], block.first + part, nullptr);
        }
}
template <int parts>
__global__ void __launch_bounds__(kThreads, 1)
attention_backward_queries_kernel(floatX* d_q, const floatX* d_out, const real* lse, const real* delta, Attention a) {
    ATTENTION_TILE(tile, a);
    const HeadBlock<parts> block(a.S);
    const int h = int(block.index % a.H), b = int(block.index / a.H % a.B), group = h / (a.H / a.G);
    const int64_t t0 = (ceil_div(a.T, kTile) - 1 - block.index / (a.H * a.B)) * kTile, rows = a.T - t0;
    const int64_t row = int64_t(b) * a.T + t0, width = int64_t(a.H) * a.S;
    const HeadRows q{a.q + row * a.ld_q + h * a.S, a.ld_q, rows}, d{d_out + row * width + h * a.S, width, rows};
    Sum sum_q[parts][kOutPieces];
    UNROLL for (int part = 0; part < parts; part++)
        UNROLL for (int n = 0; n < kOutPieces; n++) sum_q[part][n].clear();
    for (int64_t j0 = 0; j0 <= t0; j0 += kTile) {
        const int64_t at = b * a.stride_kv + j0 * a.ld_kv + group * a.S;
        const HeadRows k{a.k + at, a.ld_kv, a.T - j0}, v{a.v + at, a.ld_kv, a.T - j0};
        attention_d_scores<parts, false>(tile, block, nullptr, q, k, v, d, t0 + tile.row - j0, lse + row * a.H + h, delta + row * a.H + h,
                                         a.H);
        UNROLL for (int part = 0; part < parts; part++) {
            if (!block.has(part)) break;
            __syncthreads();  // right may be in use
            tile.load(tile.right, k, block.first + part);
            __syncthreads();
            tile.accumulate<false>(sum_q[part], tile.right, block.first + part);
        }
    }
    UNROLL for (int part = 0; part < parts; part++)
        if (block.has(part)) tile.write(d_q + row * a.ld_q + h * a.S, a.ld_q, rows, sum_q[part], block.first + part, nullptr);
}

// One query: a block for a head and a share of its keys. Groups of lanes have a key at a time, and the columns of the head in vectors; each
// goes its own way through its keys, then the groups are put together, and in attention_step_sum_kernel the shares, in order. The heads of a
// group read the same keys, at about the same time: from device memory once.
constexpr int kStepVectors = std::max(1, kMaxHeadSize / (kWarp * kWidth));

// Of the columns that a lane has: sum over keys of exp(score - largest) v, and of the exponentials.
struct OnlineSum {
    real largest = kLowest, total = 0;
    Reals<kWidth> sum[kStepVectors] = {};
    __device__ __forceinline__ void scale(real by) {
        total *= by;
        UNROLL for (int n = 0; n < kStepVectors; n++)
            UNROLL for (int i = 0; i < kWidth; i++) sum[n].v[i] *= by;
    }
};
__global__ void __launch_bounds__(kThreads, 1)
attention_step_kernel(floatX* out, real* parts, Attention a, int lanes, int64_t share, int shares) {
    SHARED(real[kWarps][2], of_warp);
    SHARED(real[kMaxHeadSize], of_columns);
    const int h = int(blockIdx.x % a.H), b = int(blockIdx.x / a.H % a.B), group = h / (a.H / a.G);
    const int64_t which = blockIdx.x / (a.H * a.B), first = which * share, last = min(first + share, a.past + a.T);
    const int lane = lane_id() % lanes, groups = kThreads / lanes;
    const floatX* const q = a.q + int64_t(b) * a.ld_q + h * a.S;
    const int64_t at = b * a.stride_kv + group * a.S;
    const real scale = 1 / sqrt_(real(a.S));
    Reals<kWidth> of_q[kStepVectors] = {};
    UNROLL for (int n = 0; n < kStepVectors; n++)
        if ((lane + n * kWarp) * kWidth < a.S) of_q[n] = load<kWidth>(q + (lane + n * kWarp) * kWidth);
    OnlineSum mine;
    for (int64_t j0 = first; j0 < last; j0 += groups) {  // all lanes of a warp come to the shuffles
        const int64_t j = j0 + threadIdx.x / lanes;
        real score = 0;
        UNROLL for (int n = 0; n < kStepVectors; n++)
            if (j < last && (lane + n * kWarp) * kWidth < a.S) {
                const Reals<kWidth> k = load<kWidth>(a.k + at + j * a.ld_kv + (lane + n * kWarp) * kWidth);
                UNROLL for (int i = 0; i < kWidth; i++) score += of_q[n].v[i] * k.v[i];
            }
        for (int mask = lanes / 2; mask > 0; mask /= 2) score += __shfl_xor_sync(kAllLanes, score, mask);
        if (j >= last) continue;
        const real most = max(mine.largest, score * scale), p = exp_(score * scale - most);
        mine.scale(exp_(mine.largest - most));
        mine.largest = most;
        mine.total += p;
        UNROLL for (int n = 0; n < kStepVectors; n++)
            if ((lane + n * kWarp) * kWidth < a.S) {
                const Reals<kWidth> v = load<kWidth>(a.v + at + j * a.ld_kv + (lane + n * kWarp) * kWidth);
                UNROLL for (int i = 0; i < kWidth; i++) mine.sum[n].v[i] += p * v.v[i];
            }
    }
    const real most = block_max(mine.largest);
    mine.scale(exp_(mine.largest - most));
    for (int mask = lanes; mask < kWarp; mask *= 2) {
        mine.total += __shfl_xor_sync(kAllLanes, mine.total, mask);
        UNROLL for (int n = 0; n < kStepVectors; n++)
            UNROLL for (int i = 0; i < kWidth; i++) mine.sum[n].v[i] += __shfl_xor_sync(kAllLanes, mine.sum[n].v[i], mask);
    }
    real total = 0;
    if (lane_id() == 0) of_warp[warp_id()][0] = mine.total;
    for (int w = 0; w < kWarps; w++) {  // the warps add to the columns in turn
        if (warp_id() == w && lane_id() < lanes)
            UNROLL for (int n = 0; n < kStepVectors; n++)
                UNROLL for (int i = 0; i < kWidth; i++) {
                    const int s = (lane + n * kWarp) * kWidth + i;
                    if (s < a.S) of_columns[s] = (w == 0 ? 0 : of_columns[s]) + mine.sum[n].v[i];
                }
        __syncthreads();
        total += of_warp[w][0];
    }
    const int64_t head = int64_t(b) * a.H + h;
    real* const part = parts + (head * shares + which) * (a.S + 2);  // largest, total, sums
    for (int s = threadIdx.x; s < a.S; s += kThreads)
        if (shares == 1) out[head * a.S + s] = floatX(of_columns[s] / total);
        else part[2 + s] = of_columns[s];
    if (shares > 1 && threadIdx.x == 0) part[0] = most, part[1] = total;
}
__global__ void attention_step_sum_kernel(floatX* out, const real* parts, int S, int shares) {
    const real* const mine = parts + int64_t(blockIdx.x) * shares * (S + 2);
    real most = kLowest, total = 0;
    for (int n = 0; n < shares; n++) most = max(most, mine[n * (S + 2)]);
    for (int n = 0; n < shares; n++) total += mine[n * (S + 2) + 1] * exp_(mine[n * (S + 2)] - most);
    for (int s = threadIdx.x; s < S; s += blockDim.x) {
        real sum = 0;
        for (int n = 0; n < shares; n++) sum += mine[n * (S + 2) + 2 + s] * exp_(mine[n * (S + 2)] - most);
        out[int64_t(blockIdx.x) * S + s] = floatX(sum / total);
    }
}

// Shares of the keys of one query: enough to fill the chip, of at least kStepKeys keys.
constexpr int kStepKeys = 128;
int attention_shares(int B, int H, int64_t keys) {
    return int(std::min(ceil_div(2 * multiprocessors(), int64_t(B) * H), ceil_div(keys, kStepKeys)));
}
struct AttentionScratch : Scratch {
    real *delta, *parts;
    AttentionScratch(void* memory, int64_t B, int64_t T, int H, int S)
        : Scratch(memory), delta(take<real>(B * T * H)), parts(take<real>((2 * int64_t(multiprocessors()) + B * H) * (S + 2))) {}
};
size_t attention_scratch(int B, int T, int H, int S) { return AttentionScratch(nullptr, B, T, H, S).used; }

// Calls f with the number of parts of a head of this size that a block has, and the number of blocks that share a head.
template <class F>
void with_parts(int S, F&& f) {
    static_assert(kMaxHeadSize <= 4 * kPart);
    if (S < 8 || S > kMaxHeadSize || S % 8) fail("heads of size %d: multiples of 8 from 8 to %d are supported", S, kMaxHeadSize);
    if (S <= kPart) f(std::integral_constant<int, 1>(), 1);
    else f(std::integral_constant<int, 2>(), S <= 2 * kPart ? 1 : 2);
}
void attention_step(floatX* out, const Attention& a, void* scratch, cudaStream_t stream) {
    int lanes = 1;
    while (lanes < kWarp && lanes * kWidth < a.S) lanes *= 2;
    const int64_t share = ceil_div(a.keys(), attention_shares(a.B, a.H, a.keys()));
    const int shares = int(ceil_div(a.keys(), share));
    real* const parts = AttentionScratch(scratch, a.B, a.T, a.H, a.S).parts;
    LAUNCH(attention_step_kernel, blocks_for(int64_t(shares) * a.B * a.H, 1), kThreads, 0, stream)(out, parts, a, lanes, share, shares);
    CHECK_LAUNCH();
    if (shares == 1) return;
    LAUNCH(attention_step_sum_kernel, blocks_for(int64_t(a.B) * a.H, 1), row_threads(a.S), 0, stream)(out, parts, a.S, shares);
    CHECK_LAUNCH();
}
void attention_forward(floatX* out, real* lse, const Attention& a, void* scratch, cudaStream_t stream) {
    if (a.B == 0 || a.T == 0) return;
    with_parts(a.S, [&](auto parts, int blocks) {
        if (a.T == 1 && !lse) return attention_step(out, a, scratch, stream);
        LAUNCH(attention_forward_kernel<parts>, blocks_for(ceil_div(a.T, kTile) * a.B * a.H * blocks, 1), kThreads, 0, stream)(out, lse, a);
        CHECK_LAUNCH();
    });
}
void attention_backward(floatX* d_q, floatX* d_k, floatX* d_v, const floatX* d_out, const floatX* out, const real* lse, const Attention& a,
                        void* scratch, cudaStream_t stream) {
    if (a.B == 0 || a.T == 0) return;
    real* const delta = AttentionScratch(scratch, a.B, a.T, a.H, a.S).delta;
    const int64_t heads = int64_t(a.B) * a.T * a.H, tiles = ceil_div(a.T, kTile);
    LAUNCH(attention_delta_kernel, blocks_for(heads, kWarps), kThreads, 0, stream)(delta, d_out, out, heads, a.S);
    with_parts(a.S, [&](auto parts, int blocks) {
        LAUNCH(attention_backward_keys_kernel<parts>, blocks_for(tiles * a.B * a.G * blocks, 1), kThreads, 0, stream)
        (d_k, d_v, d_out, lse, delta, a);
        LAUNCH(attention_backward_queries_kernel<parts>, blocks_for(tiles * a.B * a.H * blocks, 1), kThreads, 0, stream)
        (d_q, d_out, lse, delta, a);
    });
    CHECK_LAUNCH();
}

// ------------------------------------------------------------------------------------------------------------------
// Router: a warp per row; lane l holds the values of experts l, l + 32, ...
constexpr int kRouterWarps = 4, kLaneExperts = kMaxExperts / kWarp;
static_assert(kMaxExperts <= kBuckets);
void check_experts(int E, int K) {
    if (E < 1 || E > kMaxExperts) fail("%d experts: this build supports 1 to %d", E, kMaxExperts);
    if (K < 0 || K > E) fail("%d experts per token out of %d", K, E);
}

// From p, the row's logits in the lanes of a warp, to everything that the router gives.
__device__ __forceinline__ void route(const Routing& out, int64_t row, real (&p)[kLaneExperts], int E, int K, bool renormalize) {
    const int lane = lane_id();
    real most = kLowest, sum = 0;
    UNROLL for (int i = 0; i < kLaneExperts; i++) most = p[i] > most ? p[i] : most;
    most = warp_max(most);
    UNROLL for (int i = 0; i < kLaneExperts; i++) {
        p[i] = lane + i * kWarp < E ? exp_(p[i] - most) : 0;
        sum += p[i];
    }
    sum = warp_sum(sum);
    UNROLL for (int i = 0; i < kLaneExperts; i++) {
        p[i] /= sum;
        if (lane + i * kWarp < E) out.probs[row * E + lane + i * kWarp] = p[i];
    }
    if (lane == 0) out.lse[row] = most + log_(sum);

    unsigned taken = 0;  // bit i: this lane's expert lane + 32 i was chosen
    real chosen_sum = 0;
    for (int k = 0; k < K; k++) {
        real best = -1;
        int expert = E;  // none yet; a NaN is taken when nothing else is left, and always some expert is
        UNROLL for (int i = 0; i < kLaneExperts; i++) {
            const int e = lane + i * kWarp;
            if (e < E && !(taken >> i & 1) && (expert == E || p[i] > best)) best = p[i], expert = e;
        }
        UNROLL for (int mask = kWarp / 2; mask > 0; mask /= 2) {
            const real other = __shfl_xor_sync(kAllLanes, best, mask);
            const int other_expert = __shfl_xor_sync(kAllLanes, expert, mask);
            if (other_expert < E && (expert == E || other > best || (other == best && other_expert < expert)))
                best = other, expert = other_expert;
        }
        // With NaN the lanes may disagree: they follow the first.
        expert = __shfl_sync(kAllLanes, expert, 0);
        best = __shfl_sync(kAllLanes, best, 0);
        if (lane == expert % kWarp) taken |= 1u << expert / kWarp;
        chosen_sum += best;
        if (lane == k % kWarp) {
            out.experts[row * K + k] = expert;
            out.gates[row * K + k] = best;
        }
    }
    if (renormalize)
        for (int k = lane; k < K; k += kWarp) out.gates[row * K + k] /= chosen_sum;
}

// In bf16 the weights, which are float32, are cut into three bf16 matrices that add up to them, (kParts E, C). One product on tensor
// cores then gives the parts of every logit: as exact as a float32 product, without a float32 copy of x.
constexpr int kParts = kMixedPrecision ? 3 : 1;
__global__ void router_split_kernel(floatX* parts, const real* weight, int64_t count) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= count) return;
    real rest = weight[i];
    for (int part = 0; part < kParts; part++) {
        const floatX rounded = floatX(rest);
        parts[part * count + i] = rounded;
        rest -= real(rounded);
    }
}
// weight in floatX, in kParts parts: itself where it is one type with real
const floatX* router_split(floatX* parts, const Router& r, cudaStream_t stream) {
    if constexpr (!kMixedPrecision) return reinterpret_cast<const floatX*>(r.weight);
    const int64_t count = int64_t(r.E) * r.C;
    LAUNCH(router_split_kernel, blocks_for(count, kThreads), kThreads, 0, stream)(parts, r.weight, count);
    CHECK_LAUNCH();
    return parts;
}
struct RouterScratch : Scratch {
    int ld_logits, ld_d;  // whole vectors, which is what products like best
    floatX *parts, *d_logits;
    real* logits;
    RouterScratch(void* memory, int rows, int C, int E) : Scratch(memory) {
        ld_logits = int(ceil_div(kParts * E, 8) * 8), ld_d = int(ceil_div(E, 8) * 8);
        parts = take<floatX>(int64_t(kParts) * E * C);
        logits = take<real>(int64_t(rows) * ld_logits);
        d_logits = take<floatX>(int64_t(rows) * ld_d);
    }
};
size_t router_scratch(int rows, int C, int E) { return RouterScratch(nullptr, rows, C, E).used; }

__global__ void router_forward_kernel(Routing out, const real* logits, int ld_logits, int rows, int E, int K, bool renormalize) {
    const int64_t row = int64_t(blockIdx.x) * kRouterWarps + warp_id();
    if (row >= rows) return;
    real p[kLaneExperts];
    UNROLL for (int i = 0; i < kLaneExperts; i++) {
        const int e = lane_id() + i * kWarp;
        p[i] = e < E ? 0 : kLowest;
        for (int part = kParts - 1; part >= 0 && e < E; part--) p[i] += logits[row * ld_logits + part * E + e];  // the smallest first
    }
    route(out, row, p, E, K, renormalize);
}
// A few rows, as in decoding: one launch. A block per row, whose warps take the experts in turn.
constexpr int kFewRows = 8;
__global__ void router_few_kernel(Routing out, Router r) {
    SHARED(real[kMaxExperts], logits);
    const int64_t row = blockIdx.x;
    for (int e = warp_id(); e < r.E; e += kThreads / kWarp) {
        real dot = 0;
        for (int c = lane_id(); c < r.C; c += kWarp) dot += real(r.x[row * r.C + c]) * r.weight[int64_t(e) * r.C + c];
        dot = warp_sum(dot);
        if (lane_id() == 0) logits[e] = dot;
    }
    __syncthreads();
    if (warp_id() > 0) return;
    real p[kLaneExperts];
    UNROLL for (int i = 0; i < kLaneExperts; i++) p[i] = lane_id() + i * kWarp < r.E ? logits[lane_id() + i * kWarp] : kLowest;
    route(out, row, p, r.E, r.K, r.renormalize);
}
void router_forward(const Routing& out, const Router& r, void* scratch, cudaStream_t stream) {
    check_experts(r.E, r.K);
    if (r.rows == 0) return;
    if (r.rows <= kFewRows) {
        LAUNCH(router_few_kernel, r.rows, kThreads, 0, stream)(out, r);
    } else {
        const RouterScratch s(scratch, r.rows, r.C, r.E);
        const floatX* const weight = router_split(s.parts, r, stream);
        matmul(Gradient{s.logits, s.ld_logits}, In{r.x, r.C}, In{weight, r.C}.t(), r.rows, kParts * r.E, r.C, false, stream);
        LAUNCH(router_forward_kernel, blocks_for(r.rows, kRouterWarps), kRouterWarps * kWarp, 0, stream)
        (out, s.logits, s.ld_logits, r.rows, r.E, r.K, r.renormalize);
    }
    CHECK_LAUNCH();
}

// parts (2, blocks): sums of f_e p[r, e] over the block's rows, and of lse^2
__global__ void router_losses_kernel(real* parts, const real* probs, const real* lse, const int* load, int rows, int E) {
    real balance = 0, squares = 0;
    const int64_t stride = int64_t(gridDim.x) * kThreads, first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    for (int64_t i = first; i < int64_t(rows) * E; i += stride) balance += probs[i] * (real(load[i % E]) / rows);
    for (int64_t i = first; i < rows; i += stride) squares += lse[i] * lse[i];
    balance = block_sum(balance);
    squares = block_sum(squares);
    if (threadIdx.x > 0) return;
    parts[blockIdx.x] = balance;
    parts[gridDim.x + blockIdx.x] = squares;
}
// One block: out[i] += scale[i] * sum of parts[i, :], i < 2
__global__ void router_losses_sum_kernel(real* losses, const real* parts, int count, real balance_scale, real z_scale) {
    for (int i = 0; i < 2; i++) {
        real sum = 0;
        for (int p = threadIdx.x; p < count; p += kThreads) sum += parts[i * count + p];
        sum = block_sum(sum);
        if (threadIdx.x == 0) losses[i] += sum * (i == 0 ? balance_scale : z_scale);
    }
}
constexpr int kSumParts = 1024;  // at most, of a sum over everything: enough threads for any GPU
static_assert(2 * kSumParts * sizeof(real) <= kSumScratch);
int sum_parts(int64_t work) { return int(std::clamp<int64_t>(ceil_div(work, 4 * kThreads), 1, kSumParts)); }
void router_losses(real* losses, const real* probs, const real* lse, const int* load, void* scratch, int rows, int E, cudaStream_t stream) {
    if (rows == 0) return;
    real* const parts = static_cast<real*>(scratch);
    const int blocks = sum_parts(int64_t(rows) * E);
    LAUNCH(router_losses_kernel, blocks, kThreads, 0, stream)(parts, probs, lse, load, rows, E);
    LAUNCH(router_losses_sum_kernel, 1, kThreads, 0, stream)(losses, parts, blocks, real(E) / rows, real(1) / rows);
    CHECK_LAUNCH();
}

__global__ void router_backward_kernel(floatX* d_logits, int ld_d, const real* d_gates, Routing out, const int* load, int rows, int E, int K,
                                       bool renormalize, real balance_weight, real z_weight) {
    const int64_t row = int64_t(blockIdx.x) * kRouterWarps + warp_id();
    if (row >= rows) return;
    const int lane = lane_id();
    real p[kLaneExperts], d_p[kLaneExperts];
    UNROLL for (int i = 0; i < kLaneExperts; i++) {
        const int e = lane + i * kWarp;
        p[i] = e < E ? out.probs[row * E + e] : 0;
        d_p[i] = e < E ? balance_weight * E * (real(load[e]) / rows) / rows : 0;
        if (K == 0 && e < E) d_p[i] += d_gates[row * E + e];  // the experts chose
    }
    // gate = p / S with S the sum of the K chosen p:  d_p = (d_gate - sum of d_gate gate) / S
    real pull = 0, chosen_sum = 1;
    if (renormalize) {
        chosen_sum = 0;
        for (int k = 0; k < K; k++) {
            pull += d_gates[row * K + k] * out.gates[row * K + k];
            chosen_sum += out.probs[row * E + out.experts[row * K + k]];
        }
    }
    for (int k = 0; k < K; k++) {
        const int expert = out.experts[row * K + k];
        const real d = (d_gates[row * K + k] - pull) / chosen_sum;
        UNROLL for (int i = 0; i < kLaneExperts; i++)
            if (lane + i * kWarp == expert) d_p[i] += d;
    }
    real dot = 0;
    UNROLL for (int i = 0; i < kLaneExperts; i++) dot += p[i] * d_p[i];
    dot = warp_sum(dot);
    const real d_lse = z_weight * 2 * out.lse[row] / rows;
    UNROLL for (int i = 0; i < kLaneExperts; i++)
        if (lane + i * kWarp < E) d_logits[row * ld_d + lane + i * kWarp] = floatX(p[i] * (d_p[i] - dot + d_lse));
}
// The gradient of the logits is rounded to floatX for its two products, as that of any other linear layer.
void router_backward(floatX* d_x, real* d_weight, const real* d_gates, const Routing& out, const int* load, const Router& r,
                     real balance_weight, real z_weight, void* scratch, cudaStream_t stream) {
    check_experts(r.E, r.K);
    if (r.rows == 0) return;
    const RouterScratch s(scratch, r.rows, r.C, r.E);
    LAUNCH(router_backward_kernel, blocks_for(r.rows, kRouterWarps), kRouterWarps * kWarp, 0, stream)
    (s.d_logits, s.ld_d, d_gates, out, load, r.rows, r.E, r.K, r.renormalize, balance_weight, z_weight);
    CHECK_LAUNCH();
    const In d_logits{s.d_logits, s.ld_d};
    matmul(Gradient{d_weight, r.C}, d_logits.t(), In{r.x, r.C}, r.E, r.C, r.rows, true, stream);
    matmul(Out{d_x, r.C}, d_logits, In{router_split(s.parts, r, stream), r.C}, r.rows, r.C, r.E, true, stream);
}

// ------------------------------------------------------------------------------------------------------------------
// Dispatch and combine
struct DispatchScratch : Scratch {
    int* counts;
    DispatchScratch(void* memory, int64_t choices) : Scratch(memory) { counts = take<int>(int64_t(sort_tiles(choices)) * kBuckets); }
};
size_t dispatch_scratch(int64_t choices) { return DispatchScratch(nullptr, choices).used; }
void dispatch_plan(const Dispatch& to, const int* experts, void* scratch, cudaStream_t stream) {
    check_experts(to.E, to.K);
    const int64_t choices = int64_t(to.rows) * to.K, slots = Dispatch::slots(to.rows, to.E, to.K, to.capacity);
    if (std::max(choices, slots) > std::numeric_limits<int>::max())
        fail("%d rows of %d choices: over 2^31; use a smaller batch", to.rows, to.K);
    const DispatchScratch s(scratch, choices);
    counting_sort({.position_of = to.slot, .placed = to.choice, .slots = slots, .load = to.load, .offset = to.offset, .counts = s.counts,
                   .keys = experts, .count = int(choices), .buckets = to.E, .capacity = to.capacity}, stream);
}

// Expert Choice: a block per expert. It first finds the probability of the last row that the expert takes, 8 bits at a time from the top:
// counts the rows that agree with the bits found so far by their next 8, and takes those 8 where the count from above reaches how many are
// wanted. Then it goes over the rows again and takes what is larger, and of what is equal the first.
using ProbabilityBits = std::conditional_t<sizeof(real) == 8, uint64_t, uint32_t>;
__device__ __forceinline__ ProbabilityBits bits_of(real p) {  // which are in the order of the numbers, as none is negative; of a NaN: 0
    if (!(p > 0)) return 0;
    if constexpr (sizeof(real) == 8) return ProbabilityBits(__double_as_longlong(p));
    else return __float_as_uint(p);
}
// How many threads of the block before this one say so; `all`: and in the whole block.
__device__ __forceinline__ int block_rank(bool yes, int& all) {
    SHARED(int[kThreads / kWarp], of_warp);
    const unsigned lanes = __ballot_sync(kAllLanes, yes);
    if (lane_id() == 0) of_warp[warp_id()] = __popc(lanes);
    __syncthreads();
    int rank = __popc(lanes & ((1u << lane_id()) - 1));
    all = 0;
    for (int w = 0; w < kThreads / kWarp; w++) {
        rank += w < warp_id() ? of_warp[w] : 0;
        all += of_warp[w];
    }
    __syncthreads();  // of_warp may be needed again
    return rank;
}
__global__ void expert_choice_kernel(Dispatch to, const real* probs) {
    SHARED(int[kBuckets], found);
    SHARED(int[2], reached);  // the next 8 bits, and the rows above them
    const int e = blockIdx.x, t = threadIdx.x;
    ProbabilityBits last = 0;  // of the last row that is taken: the bits found so far
    int wanted = to.capacity;  // of the rows that agree with them
    for (int shift = 8 * (sizeof(real) - 1); shift >= 0; shift -= 8) {
        found[t] = 0;
        __syncthreads();
        for (int64_t r = t; r < to.rows; r += kThreads) {
            const ProbabilityBits p = bits_of(probs[r * to.E + e]);
            if (p >> shift >> 8 == last >> shift >> 8) atomicAdd(&found[p >> shift & (kBuckets - 1)], 1);  // integers: the order does not matter
        }
        __syncthreads();
        int above = 0;
        for (int bucket = t + 1; bucket < kBuckets; bucket++) above += found[bucket];
        if (above < wanted && above + found[t] >= wanted) reached[0] = t, reached[1] = above;
        __syncthreads();
        last |= ProbabilityBits(reached[0]) << shift;
        wanted -= reached[1];
    }
    int taken = 0, equal = 0;  // rows before this round's
    for (int64_t first = 0; first < to.rows; first += kThreads) {
        const int64_t r = first + t;
        const ProbabilityBits p = r < to.rows ? bits_of(probs[r * to.E + e]) : 0;
        const bool is_last = r < to.rows && p == last;
        int now_equal, now_taken;
        const int rank = equal + block_rank(is_last, now_equal);
        const bool take = r < to.rows && (p > last || (is_last && rank < wanted));
        const int slot = e * to.capacity + taken + block_rank(take, now_taken);
        if (r < to.rows) to.slot[r * to.E + e] = take ? slot : -1;
        if (take) to.choice[slot] = int(r * to.E + e);
        equal += now_equal;
        taken += now_taken;
    }
    if (t > 0) return;
    to.load[e] = to.capacity;
    to.offset[e] = e * to.capacity;
    if (e == to.E - 1) to.offset[to.E] = to.E * to.capacity;
}
void expert_choice_plan(const Dispatch& to, const real* probs, cudaStream_t stream) {
    if (to.rows == 0) return;
    if (int64_t(to.rows) * to.E > std::numeric_limits<int>::max()) fail("%d rows for %d experts: over 2^31; use a smaller batch", to.rows, to.E);
    LAUNCH(expert_choice_kernel, to.E, kThreads, 0, stream)(to, probs);
    CHECK_LAUNCH();
}

template <int width>
__global__ void dispatch_forward_kernel(floatX* out, const floatX* x, const int* choice, int C, int K) {
    const int64_t s = blockIdx.x;
    const int from = choice[s];
    for (int c = threadIdx.x * width; c < C; c += blockDim.x * width)
        store(out + s * C + c, from < 0 ? Reals<width>{} : load<width>(x + int64_t(from / K) * C + c));
}
void dispatch_forward(floatX* out, const floatX* x, const Dispatch& to, int C, cudaStream_t stream) {
    if (to.rows == 0) return;
    with_width({C}, {out, x}, [&](auto width) {
        LAUNCH(dispatch_forward_kernel<width>, to.slots(), row_threads(ceil_div(C, width)), 0, stream)(out, x, to.choice, C, to.K);
    });
    CHECK_LAUNCH();
}

// out[r] = sum over k of gates[r, k] in[slot[r, k]], with gates of 1 if null: combine forward, and dispatch backward
template <int width>
__global__ void gather_kernel(floatX* out, const floatX* in, const real* gates, const int* slot, int C, int K, bool accumulate) {
    const int64_t row = blockIdx.x;
    for (int c = threadIdx.x * width; c < C; c += blockDim.x * width) {
        Reals<width> sum = {};
        if (accumulate) sum = load<width>(out + row * C + c);
        for (int k = 0; k < K; k++) {
            const int s = slot[row * K + k];
            if (s < 0) continue;
            const auto x = load<width>(in + int64_t(s) * C + c);
            const real gate = gates ? gates[row * K + k] : 1;
            UNROLL for (int j = 0; j < width; j++) sum.v[j] += gate * x.v[j];
        }
        store(out + row * C + c, sum);
    }
}
void gather(floatX* out, const floatX* in, const real* gates, const Dispatch& to, int C, bool accumulate, cudaStream_t stream) {
    if (to.rows == 0) return;
    with_width({C}, {out, in}, [&](auto width) {
        LAUNCH(gather_kernel<width>, to.rows, row_threads(ceil_div(C, width)), 0, stream)(out, in, gates, to.slot, C, to.K, accumulate);
    });
    CHECK_LAUNCH();
}
void dispatch_backward(floatX* d_x, const floatX* d_out, const Dispatch& to, int C, bool accumulate, cudaStream_t stream) {
    gather(d_x, d_out, nullptr, to, C, accumulate, stream);
}
void combine_forward(floatX* out, const floatX* y, const real* gates, const Dispatch& to, int C, bool accumulate, cudaStream_t stream) {
    gather(out, y, gates, to, C, accumulate, stream);
}

// A block per slot writes d_y and, from the same two rows, the gradient of the gate that goes with it.
template <int width>
__global__ void combine_backward_kernel(floatX* d_y, real* d_gates, const floatX* d_out, const floatX* y, const real* gates,
                                        const int* choice, int C, int K) {
    const int64_t s = blockIdx.x;
    const int from = choice[s];
    const int64_t row = from / K;
    const real gate = from < 0 ? 0 : gates[from];
    real dot = 0;
    for (int c = threadIdx.x * width; c < C; c += blockDim.x * width) {
        Reals<width> d = {};
        if (from >= 0) {
            d = load<width>(d_out + row * C + c);
            const auto x = load<width>(y + s * C + c);
            UNROLL for (int j = 0; j < width; j++) {
                dot += d.v[j] * x.v[j];
                d.v[j] *= gate;
            }
        }
        store(d_y + s * C + c, d);
    }
    dot = block_sum(dot);
    if (threadIdx.x == 0 && from >= 0) d_gates[from] = dot;
}
void combine_backward(floatX* d_y, real* d_gates, const floatX* d_out, const floatX* y, const real* gates, const Dispatch& to, int C,
                      cudaStream_t stream) {
    if (to.rows == 0) return;
    zero(d_gates, int64_t(to.rows) * to.K * sizeof(real), stream);  // dropped choices have no slot
    with_width({C}, {d_y, d_out, y}, [&](auto width) {
        LAUNCH(combine_backward_kernel<width>, to.slots(), row_threads(ceil_div(C, width)), 0, stream)
        (d_y, d_gates, d_out, y, gates, to.choice, C, to.K);
    });
    CHECK_LAUNCH();
}

// ------------------------------------------------------------------------------------------------------------------
// Experts. With a capacity: one strided-batched product. Without: one for each expert that has rows, which the host must know; or, of a
// few slots, a kernel that finds them on the device.
struct ExpertRows {
    int64_t first;  // slot
    int count;
};
ExpertRows expert_rows(const Experts& e, int expert) {
    return {e.host_offset[expert], e.host_offset[expert + 1] - e.host_offset[expert]};
}

// A warp per output of an expert takes kTogether of its slots at a time: all of them read the weights once.
constexpr int kFewWarps = 8, kTogether = 4;
template <int width>
__global__ void experts_few_kernel(floatX* out, Experts e) {
    const int expert = blockIdx.y, o = blockIdx.x * kFewWarps + warp_id();
    if (o >= e.O) return;
    const int last = e.to.offset[expert + 1];
    const floatX* const weight = e.weight + (int64_t(expert) * e.O + o) * e.I;
    for (int first = e.to.offset[expert]; first < last; first += kTogether) {
        real sums[kTogether] = {};
        for (int i = lane_id() * width; i < e.I; i += kWarp * width) {
            const auto w = load<width>(weight + i);
            UNROLL for (int s = 0; s < kTogether; s++) {
                if (first + s >= last) break;
                const auto x = load<width>(e.in + int64_t(first + s) * e.I + i);
                UNROLL for (int j = 0; j < width; j++) sums[s] += w.v[j] * x.v[j];
            }
        }
        UNROLL for (int s = 0; s < kTogether; s++) {
            const real sum = warp_sum(sums[s]);
            if (lane_id() == 0 && first + s < last) out[int64_t(first + s) * e.O + o] = floatX(sum);
        }
    }
}
void experts_forward(floatX* out, const Experts& e, cudaStream_t stream) {
    if (e.to.rows == 0) return;
    const int64_t one = int64_t(e.O) * e.I, capacity = e.to.capacity;  // an expert's weights and slots
    if (capacity > 0) {
        matmul(Out{out, e.O, capacity * e.O}, In{e.in, e.I, capacity * e.I}, In{e.weight, e.I, one}.t(), int(capacity), e.O, e.I, false,
               stream, e.to.E);
    } else if (e.host_offset) {
        for (int i = 0; i < e.to.E; i++)
            if (const auto [first, count] = expert_rows(e, i); count > 0)
                matmul(Out{out + first * e.O, e.O}, In{e.in + first * e.I, e.I}, In{e.weight + i * one, e.I}.t(), count, e.O, e.I, false,
                       stream);
    } else {
        with_width({e.I}, {e.in, e.weight}, [&](auto width) {
            LAUNCH(experts_few_kernel<width>, dim3(blocks_for(e.O, kFewWarps), e.to.E), kFewWarps * kWarp, 0, stream)(out, e);
        });
        CHECK_LAUNCH();
    }
}
void experts_backward(floatX* d_in, real* d_weight, const floatX* d_out, const Experts& e, bool add_weight, cudaStream_t stream) {
    if (e.to.rows == 0) return;
    const int64_t one = int64_t(e.O) * e.I, capacity = e.to.capacity;
    if (capacity > 0) {
        const In d{d_out, e.O, capacity * e.O};
        matmul(Out{d_in, e.I, capacity * e.I}, d, In{e.weight, e.I, one}, int(capacity), e.I, e.O, false, stream, e.to.E);
        matmul(Gradient{d_weight, e.I, one}, d.t(), In{e.in, e.I, capacity * e.I}, e.O, e.I, int(capacity), add_weight, stream, e.to.E);
        return;
    }
    for (int i = 0; i < e.to.E; i++) {
        const auto [first, count] = expert_rows(e, i);
        const In d{d_out + first * e.O, e.O};
        if (count > 0) {
            matmul(Out{d_in + first * e.I, e.I}, d, In{e.weight + i * one, e.I}, count, e.I, e.O, false, stream);
            matmul(Gradient{d_weight + i * one, e.I}, d.t(), In{e.in + first * e.I, e.I}, e.O, e.I, count, add_weight, stream);
        } else if (!add_weight) {
            zero(d_weight + i * one, one * sizeof(real), stream);
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Classifier: a block per row. The maximum and the sum of exponentials come from one pass over the logits: when a larger maximum turns
// up, the sum so far is scaled down to it.
constexpr int kClassifierThreads = 512;

struct Softmax {
    real most, sum;  // of logits * scale: the largest; the sum of exp(x - most)
};
template <int width>
__device__ __forceinline__ Softmax softmax_of_row(const floatX* row, int V, real scale) {
    real most = kLowest, sum = 0;
    for (int c = threadIdx.x * width; c < V; c += blockDim.x * width) {
        const auto x = load<width>(row + c);  // perhaps with some that lie past V: rows are padded to whole vectors
        real larger = most;
        UNROLL for (int j = 0; j < width; j++) larger = max(larger, c + j < V ? x.v[j] * scale : kLowest);
        sum *= exp_(most - larger);
        UNROLL for (int j = 0; j < width; j++)
            if (c + j < V) sum += exp_(x.v[j] * scale - larger);
        most = larger;
    }
    const real of_all = block_max(most);
    return {of_all, block_sum(sum * exp_(most - of_all))};
}

template <int width>
__global__ void classifier_kernel(real* losses, floatX* logits, const int* targets, int V, int ld, real d_loss) {
    const int64_t r = blockIdx.x;
    floatX* const row = logits + r * ld;
    const int target = targets[r];
    if (target < 0) {
        if (threadIdx.x == 0) losses[r] = 0;
        if (d_loss != 0)
            for (int c = threadIdx.x * width; c < ld; c += blockDim.x * width) store(row + c, Reals<width>{});
        return;
    }
    const real at_target = real(row[target]);  // read by all before block_max, written by one after it
    const Softmax s = softmax_of_row<width>(row, V, 1);
    if (threadIdx.x == 0) losses[r] = s.most + log_(s.sum) - at_target;
    if (d_loss == 0) return;
    const real scale = d_loss / s.sum;
    for (int c = threadIdx.x * width; c < ld; c += blockDim.x * width) {
        auto x = load<width>(row + c);
        UNROLL for (int j = 0; j < width; j++)
            x.v[j] = c + j < V ? exp_(x.v[j] - s.most) * scale - (c + j == target ? d_loss : 0) : 0;
        store(row + c, x);
    }
}
void classifier(real* losses, floatX* logits, const int* targets, int rows, int V, int ld, real d_loss, cudaStream_t stream) {
    if (rows == 0) return;
    with_width({ld}, {logits}, [&](auto width) {
        LAUNCH(classifier_kernel<width>, rows, row_threads(ceil_div(ld, width), kClassifierThreads), 0, stream)
        (losses, logits, targets, V, ld, d_loss);
    });
    CHECK_LAUNCH();
}

template <int width>
__global__ void softmax_forward_kernel(real* probs, const floatX* logits, int V, int ld, real scale) {
    const int64_t r = blockIdx.x;
    const floatX* const row = logits + r * ld;
    const Softmax s = softmax_of_row<width>(row, V, scale);
    for (int c = threadIdx.x; c < V; c += blockDim.x) probs[r * V + c] = exp_(real(row[c]) * scale - s.most) / s.sum;
}
void softmax_forward(real* probs, const floatX* logits, int rows, int V, int ld, real temperature, cudaStream_t stream) {
    if (rows == 0) return;
    with_width({ld}, {logits}, [&](auto width) {
        LAUNCH(softmax_forward_kernel<width>, rows, row_threads(ceil_div(V, width), kClassifierThreads), 0, stream)
        (probs, logits, V, ld, 1 / temperature);
    });
    CHECK_LAUNCH();
}

// ------------------------------------------------------------------------------------------------------------------
// Sums over everything, and the optimizer
// A thread has a sum for each element of its vectors: none grows long, so that little is lost to rounding.   parts (blocks)
template <int width, bool squares>
__global__ void sum_kernel(real* parts, const real* in, int64_t count) {
    Reals<width> sums = {};
    for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * width; i < count; i += int64_t(gridDim.x) * kThreads * width) {
        const auto x = load<width>(in + i);
        UNROLL for (int j = 0; j < width; j++) sums.v[j] += squares ? x.v[j] * x.v[j] : x.v[j];
    }
    real sum = 0;
    UNROLL for (int j = 0; j < width; j++) sum += sums.v[j];
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
template <bool squares>
void sum_all(real* out, const real* in, void* scratch, int64_t count, cudaStream_t stream) {
    if (count == 0) return;
    real* const parts = static_cast<real*>(scratch);
    const int blocks = sum_parts(count);
    with_width({count}, {in}, [&](auto width) {
        LAUNCH((sum_kernel<width, squares>), blocks, kThreads, 0, stream)(parts, in, count);
    });
    reduce_partials(blocks, {{out, parts, 1}}, stream);
}
void sum(real* out, const real* in, void* scratch, int64_t count, cudaStream_t stream) { sum_all<false>(out, in, scratch, count, stream); }
void sum_of_squares(real* out, const real* in, void* scratch, int64_t count, cudaStream_t stream) {
    sum_all<true>(out, in, scratch, count, stream);
}

struct AdamWFactors {
    real lr, beta1, beta2, eps, weight_decay, grad_scale;
    real new1, new2;        // 1 - beta, of which 1 - real(beta) has only four digits
    real m_scale, v_scale;  // correct for moments that started at zero
};
template <int width>
__global__ void adamw_kernel(real* master, floatX* weight, real* m, real* v, const real* grad, int64_t count, AdamWFactors f) {
    const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * width;
    if (i >= count) return;
    auto w = load<width>(master + i), m_i = load<width>(m + i), v_i = load<width>(v + i);
    const auto g_i = load<width>(grad + i);
    UNROLL for (int j = 0; j < width; j++) {
        const real g = f.grad_scale * g_i.v[j];
        m_i.v[j] = f.beta1 * m_i.v[j] + f.new1 * g;
        v_i.v[j] = f.beta2 * v_i.v[j] + f.new2 * g * g;
        w.v[j] -= f.lr * (m_i.v[j] * f.m_scale / (sqrt_(v_i.v[j] * f.v_scale) + f.eps) + f.weight_decay * w.v[j]);
    }
    store(m + i, m_i);
    store(v + i, v_i);
    store(master + i, w);
    if (weight) store(weight + i, w);
}
void adamw(real* master, floatX* weight, real* m, real* v, const real* grad, int64_t count, const AdamW& o, real grad_scale, int step,
           cudaStream_t stream) {
    if (count == 0) return;
    const AdamWFactors factors = {real(o.lr), real(o.beta1), real(o.beta2), real(o.eps), real(o.weight_decay), grad_scale,
                                  real(1 - o.beta1), real(1 - o.beta2),
                                  real(1 / (1 - std::pow(o.beta1, step))), real(1 / (1 - std::pow(o.beta2, step)))};
    with_width({count}, {master, weight, m, v, grad}, [&](auto width) {
        LAUNCH(adamw_kernel<width>, blocks_for(count, kThreads * width), kThreads, 0, stream)(master, weight, m, v, grad, count, factors);
    });
    CHECK_LAUNCH();
}

// ------------------------------------------------------------------------------------------------------------------
// The device
cudaStream_t open() {  // one stream for the process: the default one cannot be captured into a graph
    static const cudaStream_t stream = [] {
        cudaStream_t created;
        CUDA_CHECK(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking));
        cublas(created);  // takes its workspace
        return created;
    }();
    return stream;
}

std::string machine() {
#ifdef USE_CUDA
    int device = 0, version = 0;
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    CUBLAS_CHECK(cublasGetVersion(cublas(open()), &version));
    return std::string(properties.name) + " with " + std::to_string(multiprocessors()) + " multiprocessors, cuBLAS " +
           std::to_string(version) + ", in " + kPrecision;
#else
    return std::string("simt in ") + kPrecision;
#endif
}

}  // namespace

// Why no GPU can be used here: "" if one can. `absent`: there is none, or nothing to drive one with.
std::string problem(bool& absent) {
    int count = 0, driver = 0, runtime = 0, device = 0, shared = 0;
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaGetDeviceCount(&count), versions = cudaDriverGetVersion(&driver);
    absent = status == cudaErrorNoDevice || (status == cudaSuccess && count == 0) || (versions == cudaSuccess && driver == 0);
    cudaGetLastError();  // an error is reported here, and not again at the next launch
    if (absent) return "no GPU";
    cudaRuntimeGetVersion(&runtime);
    if (status != cudaSuccess)
        return std::string(cudaGetErrorString(status)) + " (the driver serves CUDA " + std::to_string(driver / 1000) + "." +
               std::to_string(driver % 1000 / 10) + ", this build is of " + std::to_string(runtime / 1000) + "." +
               std::to_string(runtime % 1000 / 10) + ")";
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (size_t(shared) < kMaxShared)
        return "the GPU gives a block " + std::to_string(shared >> 10) + " KB of shared memory, the scan needs " +
               std::to_string(kMaxShared >> 10);
    if (const cudaError_t code = cudaFuncGetAttributes(&attributes, reduce_partials_kernel); code != cudaSuccess) {
        cudaGetLastError();
        return std::string("this build has no code for the GPU (") + cudaGetErrorString(code) + "); run make again on this machine";
    }
    return "";
}

const Layers layers = {
#ifdef USE_CUDA
    .device = "cuda",
#else
    .device = "simt",
#endif
    .machine = machine,
    .open = open,
    .allocate = allocate,
    .release = release,
    .allocate_host = allocate_host,
    .release_host = release_host,
    .zero = zero,
    .upload = upload,
    .upload_later = upload_later,
    .download = download,
    .copy = copy,
    .synchronize = synchronize,
    .linear_forward = linear_forward,
    .linear_backward = linear_backward,
    .swiglu_forward = swiglu_forward,
    .swiglu_backward = swiglu_backward,
    .relu_forward = relu_forward,
    .relu_backward = relu_backward,
    .rmsnorm_forward = rmsnorm_forward,
    .rmsnorm_backward = rmsnorm_backward,
    .rmsnorm_scratch = rmsnorm_scratch,
    .slice_norm_forward = slice_norm_forward,
    .slice_norm_backward = slice_norm_backward,
    .embedding_forward = embedding_forward,
    .embedding_backward = embedding_backward,
    .embedding_scratch = embedding_scratch,
    .conv_forward = conv_forward,
    .conv_backward = conv_backward,
    .conv_scratch = conv_scratch,
    .scan_forward = scan_forward,
    .scan_backward = scan_backward,
    .scan_scratch = scan_scratch,
    .closed_loop_forward = closed_loop_forward,
    .closed_loop_backward = closed_loop_backward,
    .closed_loop_scratch = closed_loop_scratch,
    .rotate = rotate,
    .attention_forward = attention_forward,
    .attention_backward = attention_backward,
    .attention_scratch = attention_scratch,
    .router_forward = router_forward,
    .router_losses = router_losses,
    .router_backward = router_backward,
    .router_scratch = router_scratch,
    .dispatch_plan = dispatch_plan,
    .dispatch_scratch = dispatch_scratch,
    .expert_choice_plan = expert_choice_plan,
    .dispatch_forward = dispatch_forward,
    .dispatch_backward = dispatch_backward,
    .combine_forward = combine_forward,
    .combine_backward = combine_backward,
    .experts_forward = experts_forward,
    .experts_backward = experts_backward,
    .classifier = classifier,
    .softmax_forward = softmax_forward,
    .sum = sum,
    .sum_of_squares = sum_of_squares,
    .adamw = adamw,
};
}  // namespace gpu

// ------------------------------------------------------------------------------------------------------------------
// Host code only from here on: Config, the kinds of layers, the Model. It calls kernels through a table of Layers and does not know which
// device it has.

const Layers& find_device(const std::string& name) {
    const std::string gpu_name = gpu::layers.device;
    const bool simulated = gpu_name == "simt";
    if (name == "cpu" || (name == "auto" && simulated)) return cpu::layers;
    if (name == "plain") return plain::layers;
    if (name != "auto" && name != gpu_name)
        fail("--device %s: this build has auto, cpu, plain and %s%s", name.c_str(), gpu_name.c_str(),
             name == "cuda" ? "; build with nvcc: make CUDA=1" : "");
    bool absent;
    const std::string problem = gpu::problem(absent);
    if (problem.empty()) return gpu::layers;
    if (name != "auto" || !absent) fail("--device %s: %s; or use --device cpu", name.c_str(), problem.c_str());
    fprintf(stderr, "note: there is %s here: this runs on the CPU\n", problem.c_str());
    return cpu::layers;
}

// Median seconds of one call of `work`, which starts something on the stream.
template <class F>
static double median_seconds(const Layers& layers, cudaStream_t stream, int repeats, F&& work) {
    std::vector<double> seconds;
    for (int i = -1; i < repeats; i++) {  // the first is a warm-up
        const auto start = std::chrono::steady_clock::now();
        work();
        layers.synchronize(stream);
        if (i >= 0) seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::nth_element(seconds.begin(), seconds.begin() + repeats / 2, seconds.end());
    return seconds[repeats / 2];
}

double measure_matmul_flops(const Layers& layers, int size) {
    const cudaStream_t stream = layers.open();
    Arena arena("matrix products");
    floatX *out, *in, *weight;
    const int64_t count = int64_t(size) * size;
    for (floatX** matrix : {&out, &in, &weight}) arena.add(matrix, "matrix", count);
    arena.allocate(layers);
    std::vector<floatX> values(count);  // random: numbers whose bits do not change take less power, and flatter a GPU
#pragma omp parallel for
    for (int64_t i = 0; i < count; i++) values[i] = floatX(real(2 * random_uniform(0, kInitStream, i) - 1));
    for (floatX* matrix : {in, weight}) layers.upload(matrix, values.data(), count * sizeof(floatX), stream);
    const double seconds = median_seconds(layers, stream, 5, [&] {
        layers.linear_forward(out, size, {in, size, weight, size, size, size}, false, stream);
    });
    return 2.0 * double(count) * size / seconds;
}

double measure_read_bandwidth(const Layers& layers, size_t bytes) {
    const cudaStream_t stream = layers.open();
    Arena arena("bandwidth");
    real *in, *out;
    char* scratch;
    const int64_t count = int64_t(bytes / sizeof(real));
    arena.add(&in, "input", count);
    arena.add(&out, "sum", 1);
    arena.add(&scratch, "scratch", kSumScratch);
    arena.allocate(layers);
    layers.zero(in, count * sizeof(real), stream);
    layers.zero(out, sizeof(real), stream);
    return double(count * sizeof(real)) / median_seconds(layers, stream, 7, [&] { layers.sum(out, in, scratch, count, stream); });
}

// ------------------------------------------------------------------------------------------------------------------
// Config

// The kinds of layers: a letter, how it is called, how its parameters are, and its struct (below).
struct Kind {
    char letter;
    const char *name, *parameters;
    std::unique_ptr<Layer> (*make)(Model& model, const std::string& name);
};
template <class L>
static std::unique_ptr<Layer> make(Model& model, const std::string& name);
struct MambaLayer;
struct ConbaLayer;
struct AttentionLayer;
struct FeedForwardLayer;
struct ExpertsLayer;
static const Kind kKinds[] = {{'M', "Mamba", "mixer", make<MambaLayer>},
                              {'C', "Conba", "conba", make<ConbaLayer>},
                              {'A', "attention", "self_attn", make<AttentionLayer>},
                              {'F', "feed-forward", "feed_forward", make<FeedForwardLayer>},
                              {'E', "experts", "moe", make<ExpertsLayer>}};
static const Kind* find_kind(char letter) {
    const Kind* const kind = std::find_if(std::begin(kKinds), std::end(kKinds), [&](const Kind& k) { return k.letter == letter; });
    return kind == std::end(kKinds) ? nullptr : kind;
}

// The steps of "ME(ME)*4", repeated.
static std::vector<std::string> parse_layers(const std::string& text) {
    std::vector<std::string> unit;
    auto bad = [&](size_t i, const std::string& what) {
        fail("--layers \"%.80s%s\", character %zu: %s", text.c_str(), text.size() > 80 ? "..." : "", i + 1, what.c_str());
    };
    bool group = false;
    int repeats = 1;
    size_t i = 0;
    for (; i < text.size() && text[i] != '*'; i++) {
        const char letter = text[i];
        if (letter == '(') {
            if (group) bad(i, "'(' inside a group");
            group = true;
            unit.emplace_back();
        } else if (letter == ')') {
            if (!group) bad(i, "')' without '('");
            if (unit.back().empty()) bad(i, "an empty group");
            group = false;
        } else if (find_kind(letter)) {
            if (group) unit.back() += letter;
            else unit.emplace_back(1, letter);
        } else {
            std::string known;
            for (const Kind& kind : kKinds) known += std::string(1, kind.letter) + " (" + kind.name + "), ";
            bad(i, std::string("'") + letter + "' is no layer; there are " + known + "and (..) for a parallel group");
        }
    }
    if (group) bad(text.size(), "a '(' is not closed");
    if (unit.empty()) bad(0, "no layer; for example \"ME*4\"");
    constexpr int kMost = 4096;  // layers: a model takes memory for each, before it has read any weights
    if (i < text.size()) {
        const std::string count = text.substr(i + 1);
        if (parse_number(count, repeats) != std::errc() || repeats < 1 || repeats > kMost || count[0] == '0')
            bad(i, "'*' needs a count of 1 to " + std::to_string(kMost) + " after it, at the end");
    }
    if (i * size_t(repeats) > kMost) bad(i, "more than " + std::to_string(kMost) + " layers and parentheses in all");
    std::vector<std::string> steps;
    for (int r = 0; r < repeats; r++) steps.insert(steps.end(), unit.begin(), unit.end());
    return steps;
}

std::vector<std::string> Config::steps() const { return parse_layers(layers); }

int Config::count(char letter) const {
    int n = 0;
    for (const std::string& step : steps()) n += int(std::count(step.begin(), step.end(), letter));
    return n;
}

void Config::resolve() {
    parse_layers(layers);
    check_ranges(*this);
    if (!d_inner) d_inner = 2 * d_model;
    if (!dt_rank) dt_rank = (d_model + 15) / 16;
    if (!heads) heads = std::max(1, d_model / 64);
    if (!kv_heads) kv_heads = heads;
    if (count('A') && !head_dim) {
        if (d_model % heads) fail("--heads %d does not divide --d-model %d: change one, or give --head-dim", heads, d_model);
        head_dim = d_model / heads;
    }
    if (count('A')) {
        if (heads % kv_heads) fail("--kv-heads %d does not divide --heads %d", kv_heads, heads);
        if (head_dim % 8 || head_dim > kMaxHeadSize)
            fail("--head-dim %d: must be a multiple of 8, at most %d (it is --d-model / --heads if not given)", head_dim, kMaxHeadSize);
        if (rope_base != 0 && rope_base <= 1) fail("--rope-base %g: must be 0 (no positions) or larger than 1", rope_base);
    }
    if (routing != "token-choice" && routing != "expert-choice")
        fail("--routing %s: there are token-choice and expert-choice", printable(routing).c_str());
    if (expert_choice()) {
        if (top_k != 1 || renormalize) fail("--routing expert-choice goes with --top-k 1 and --renormalize 0: no token chooses");
        if (capacity == 0) fail("--routing expert-choice needs --capacity above 0: of T * B tokens an expert takes capacity * T * B / experts");
        balance_loss = 0;  // all experts have as many tokens
    }
    std::string terms;  // in one order, so that equal configs have equal texts
    for (const char* term : kConbaTerms)
        if (conba_has(term)) terms += std::string(terms.empty() ? "" : ",") + term;
    if (conba != "none" && (terms.empty() || terms.size() != conba.size()))
        fail("--conba %.80s: must be none, or some of selection,control,delay,scaling,noise,adaptation, each once and without spaces",
             printable(conba).c_str());
    if (conba != "none") conba = terms;
    if (conba_sigma != 0 && !conba_has("noise")) fail("--conba-sigma %g: there is no noise in --conba %s", conba_sigma, conba.c_str());
    if (!d_ff) d_ff = (swiglu_ff ? 2 : 4) * d_model;
    if (!d_expert) d_expert = (swiglu_experts ? 2 : 3) * d_model;
}

int Config::capacity_rows(int rows) const {
    if (capacity == 0) return 0;
    const double choices = double(rows) * top_k, largest = std::numeric_limits<int>::max();
    return int(std::clamp(std::floor(capacity * choices / experts), 1.0, std::min(choices, largest)));
}

std::string Config::to_json() const { return fields_to_json(*this).text(); }

Config Config::from_json(const std::string& text, const std::string& where, bool whole) {
    Config config;
    const JsonObject json(text, where + ": the model's config");
    const std::string added[] = {"mamba-norms", "conba", "conba-tau", "conba-alpha", "conba-kappa", "conba-eps", "conba-sigma", "heads",
                                 "kv-heads", "head-dim", "rope-base", "swiglu-ff", "routing"};  // older files lack them
    each_field(config, [&](const char* flag, auto& field, auto...) {
        const bool may_lack = !whole || std::find(std::begin(added), std::end(added), flag) != std::end(added);
        if (json.has(flag) || !may_lack) json.get(flag, field);
    });
    try {
        config.resolve();
    } catch (const Error& e) {
        fail("%s: %s: %s", where.c_str(), whole ? "the model's config is damaged" : "its model cannot be built", e.what());
    }
    return config;
}

const std::vector<Preset>& presets() {
    static const std::vector<Preset> list = [] {
        std::vector<Preset> all;
        struct Size {
            const char *name, *note;
            int vocab, d_model, pairs, experts;
        };
        // Papers: arXiv 2401.04081 v2 (25m: E = 42, v1: E = 32; 100m: E = 42). CPU sizes: bytes as tokens.
        const Size sizes[] = {{"tiny", "trains in minutes on a laptop's CPU", 257, 128, 4, 8},
                              {"10m", "about 10M active parameters, for a CPU", 257, 384, 6, 8},
                              {"25m", "arXiv 2401.04081v2", 50257, 512, 8, 42},
                              {"25m-v1", "arXiv 2401.04081v1", 50257, 512, 8, 32},
                              {"100m", "arXiv 2401.04081v2", 50257, 768, 16, 42}};
        const struct {
            const char *name, *unit;
        } families[] = {{"mamba", "MM"}, {"mamba-mlp", "MF"}, {"moe-mamba", "ME"}, {"moe-mamba-parallel", "(ME)"},
                        {"transformer", "AF"}, {"transformer-moe", "AE"}};
        static std::vector<std::string> names;
        names.reserve(std::size(families) * std::size(sizes));
        for (const auto& family : families)
            for (const Size& size : sizes) {
                Config c;
                c.layers = std::string(family.unit) + "*" + std::to_string(size.pairs);
                c.vocab = size.vocab;
                c.d_model = size.d_model;
                c.experts = size.experts;
                if (family.unit[0] == 'A') {  // the papers' baselines: ReLU everywhere, of 4 C; 32 experts
                    c.swiglu_ff = 0;
                    c.d_expert = 4 * c.d_model;
                    c.experts = std::min(c.experts, 32);
                }
                names.push_back(std::string(family.name) + "-" + size.name);
                all.push_back({names.back().c_str(), size.note, c});
            }
        Config c;
        c.layers = "M*24";
        c.vocab = 50280;
        c.d_model = 768;
        c.tied = 1;
        all.push_back({"mamba-130m", "arXiv 2312.00752, state-spaces/mamba-130m", c});

        Config mixtral{.layers = "AE*32", .vocab = 32000, .d_model = 4096, .heads = 32, .kv_heads = 8, .rope_base = 1e6, .d_expert = 14336,
                       .top_k = 2, .capacity = 0, .swiglu_experts = 1, .renormalize = 1, .balance_loss = 0.02};
        all.push_back({"mixtral-8x7b", "arXiv 2401.04088", mixtral});
        mixtral.layers = "AE*4", mixtral.vocab = 257, mixtral.d_model = 128, mixtral.heads = 4, mixtral.kv_heads = 2, mixtral.d_expert = 0;
        all.push_back({"mixtral-tiny", "trains in minutes on a laptop's CPU", mixtral});
        mixtral.layers = "AE*8", mixtral.d_model = 288, mixtral.heads = 6;
        all.push_back({"mixtral-10m", "for a CPU", mixtral});

        Config jamba{.layers = "MFMEMFMEAFMEMFME*4", .vocab = 65536, .d_model = 4096, .mamba_norms = 1, .heads = 32, .kv_heads = 8,
                     .rope_base = 0, .d_ff = 14336, .d_expert = 14336, .experts = 16, .top_k = 2, .capacity = 0, .swiglu_experts = 1,
                     .balance_loss = 0.001, .norm_eps = 1e-6};
        all.push_back({"jamba-v0.1", "arXiv 2403.19887", jamba});
        Config jamba_large = jamba;
        jamba.layers = "MFMEMFMEAFMEMFME", jamba.vocab = 257, jamba.d_model = 96, jamba.heads = 4, jamba.kv_heads = 2, jamba.experts = 4;
        jamba.d_ff = jamba.d_expert = 0;
        all.push_back({"jamba-tiny", "trains in minutes on a laptop's CPU", jamba});
        const Config jamba_tiny = jamba;
        jamba.d_model = 288, jamba.heads = 6, jamba.experts = 8;
        all.push_back({"jamba-10m", "for a CPU", jamba});

        // Jamba's sizes. 8 groups of keys and values take 8 GiB at 256K tokens; the 2 GB of the paper need 2.
        const auto mixcon = [&](const char* name, const char* note, Config c, const char* layers) {
            c.layers = layers;
            all.push_back({name, note, c});
        };
        jamba_large.vocab = 1 << 18;
        mixcon("mixcon", "doi 10.3233/FAIA240593", jamba_large, "CFCECFAEAFCECFCE*4");
        jamba_large.kv_heads = 2;
        mixcon("mixcon-2kv", "with the KV cache that the paper states", jamba_large, "CFCECFAEAFCECFCE*4");
        mixcon("mixcon-tiny", "trains in minutes on a laptop's CPU", jamba_tiny, "CFCECFAEAFCECFCE");
        mixcon("mixcon-10m", "for a CPU", jamba, "CFCECFAEAFCECFCE");

        Config llama{.layers = "AF*32", .vocab = 32000, .d_model = 4096, .heads = 32, .d_ff = 11008};
        all.push_back({"llama-2-7b", "arXiv 2307.09288", llama});
        llama.layers = "AF*80", llama.d_model = 8192, llama.heads = 64, llama.kv_heads = 8, llama.d_ff = 28672;
        all.push_back({"llama-2-70b", "arXiv 2307.09288", llama});
        return all;
    }();
    return list;
}

const Preset& find_preset(const std::string& name) {
    std::string known;
    for (const Preset& preset : presets()) {
        if (name == preset.name) return preset;
        known += std::string(known.empty() ? "" : ", ") + preset.name;
    }
    fail("--preset %s: unknown; there are %s", name.c_str(), known.c_str());
}

// ------------------------------------------------------------------------------------------------------------------
// Arena

void Arena::add_bytes(void** pointer, const std::string& tensor, size_t size) {
    constexpr size_t kAlign = 256;  // as cudaMalloc
    entries.push_back({tensor, pointer, top, size});
    top += (size + kAlign - 1) / kAlign * kAlign;
    bytes = std::max(bytes, top);
}

void Arena::allocate(const Layers& on, const Arena* lender) {
    device = &on;
    // Under simt.h every tensor is an allocation of its own, so that one byte past it is reported with its name.
    if (std::string(on.device) == "simt")
        for (Entry& entry : entries) entry.memory = on.allocate(std::max<size_t>(entry.bytes, 1), entry.name.c_str());
    else {
        borrowed = lender && lender->memory && bytes <= lender->bytes;
        memory = borrowed ? lender->memory : static_cast<char*>(on.allocate(std::max<size_t>(bytes, 1), name.c_str()));
        for (Entry& entry : entries) entry.memory = memory + entry.offset;
    }
    bind();
}

void Arena::bind() const {
    for (const Entry& entry : entries) *entry.pointer = entry.memory;
}

void Arena::release() {
    if (memory && !borrowed) device->release(memory);
    for (Entry& entry : entries)
        if (!memory && entry.memory) device->release(entry.memory);
    memory = nullptr;
    borrowed = false;
    entries.clear();
    top = bytes = 0;
}

// ------------------------------------------------------------------------------------------------------------------
// The kinds of layers. Deviation of a matrix with n inputs: sqrt(0.1 / n), Switch's small initialisation, where nothing else is said.
static double fan_in(int64_t n) { return std::sqrt(0.1 / double(n)); }
template <class L>
static std::unique_ptr<Layer> make(Model& model, const std::string& name) {
    return std::make_unique<L>(model, name);
}

struct MambaLayer : Layer {
    const int C, D, N, R, W;
    const int ld;  // of x_dbl: whole vectors, for every R
    const bool normed_slices;  // RMSNorm on dt, B and C
    Tensor in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, skip, out_proj, dt_norm, b_norm, c_norm;
    floatX *xz, *u, *x_dbl, *dt, *y;           // (rows, 2D) = [x | z]; (rows, D); (rows, ld) = [dt | B | C]; (rows, D); (rows, D)
    floatX* x_raw;                             // as x_dbl, before the norms
    real* chunk_states;                        // (B, chunks, D, N)
    floatX *d_xz, *d_u, *d_x_dbl, *d_dt, *d_y;
    real *conv_state[2], *scan_state[2];       // (B, W-1, D), (B, D, states()): one side is read, the other written

    MambaLayer(Model& model, const std::string& name) : MambaLayer(model, name, model.config.mamba_norms) {}
    MambaLayer(Model& model, const std::string& name, bool normed_slices)
        : Layer(model, name), C(model.config.d_model), D(model.config.d_inner), N(model.config.d_state), R(model.config.dt_rank),
          W(model.config.d_conv), ld((R + 2 * N + 7) / 8 * 8), normed_slices(normed_slices) {
        const double conv = 1 / std::sqrt(double(W)), inner = 1 / std::sqrt(double(D));
        model.add(A_log, name + "A_log", {D, N}, Init::log_state, 0, Tensor::plain);
        model.add(skip, name + "D", {D}, Init::constant, 1, Tensor::plain);
        model.add(conv_weight, name + "conv1d.weight", {D, 1, W}, Init::uniform, conv, Tensor::decayed);
        model.add(conv_bias, name + "conv1d.bias", {D}, Init::uniform, conv, Tensor::plain);
        model.add(in_proj, name + "in_proj.weight", {2 * D, C}, Init::uniform, 1 / std::sqrt(double(C)), Tensor::matrix);
        model.add(x_proj, name + "x_proj.weight", {R + 2 * N, D}, Init::uniform, inner, Tensor::matrix);
        model.add(dt_proj, name + "dt_proj.weight", {D, R}, Init::uniform, 1 / std::sqrt(double(R)), Tensor::matrix);
        model.add(dt_bias, name + "dt_proj.bias", {D}, Init::dt_bias, 0, Tensor::plain);
        model.add(out_proj, name + "out_proj.weight", {C, D}, Init::uniform, inner / std::sqrt(double(model.additions)), Tensor::matrix);
        if (!normed_slices) return;
        model.add(dt_norm, name + "dt_layernorm.weight", {R}, Init::constant, 1, Tensor::plain);
        model.add(b_norm, name + "b_layernorm.weight", {N}, Init::constant, 1, Tensor::plain);
        model.add(c_norm, name + "c_layernorm.weight", {N}, Init::constant, 1, Tensor::plain);
    }
    void plan_activations(Plan& plan) override {
        plan.arena.add(&xz, name + "xz", plan.rows() * 2 * D);
        plan.arena.add(&u, name + "u", plan.rows() * D);
        plan.arena.add(&x_dbl, name + "dt, B, C", plan.rows() * ld);
        plan.arena.add(&x_raw, name + "dt, B, C before norms", normed_slices ? plan.rows() * ld : 0);
        plan.arena.add(&dt, name + "dt", plan.rows() * D);
        plan.arena.add(&y, name + "y", plan.rows() * D);
        plan.arena.add(&chunk_states, name + "chunk states", plan.training ? plan.B * chunks(plan.T) * D * states() : 0);
        plan.need(mix_scratch(plan.B, plan.T));
        if (plan.training) plan.need(model.layers.conv_scratch(plan.B, plan.T, D, W));
        if (plan.training && normed_slices) plan.need(model.layers.rmsnorm_scratch(int(plan.rows()), std::max(R, N)));
    }
    void plan_gradients(Plan& plan) override {
        plan.arena.add(&d_xz, "d xz", plan.rows() * 2 * D);
        plan.arena.add(&d_u, "d u", plan.rows() * D);
        plan.arena.add(&d_x_dbl, "d dt, B, C", plan.rows() * ld);
        plan.arena.add(&d_dt, "d dt", plan.rows() * D);
        plan.arena.add(&d_y, "d y", plan.rows() * D);
    }
    void plan_state(Arena& arena, int B, int64_t) override {
        for (int side : {0, 1}) {
            arena.add(&conv_state[side], name + "conv state " + std::to_string(side), int64_t(B) * std::max(1, W - 1) * D);
            arena.add(&scan_state[side], name + "scan state " + std::to_string(side), int64_t(B) * D * states());
        }
    }
    Conv conv(const Pass& p) const {
        return {xz, 2 * D, conv_weight.master, conv_bias.master, p.state < 0 ? nullptr : conv_state[p.state], p.B, p.T, D, W};
    }
    Scan scan(const Pass& p) const {
        return {u, dt, x_dbl + R, x_dbl + R + N, ld, xz + D, 2 * D, A_log.master, skip.master, dt_bias.master,
                p.state < 0 ? nullptr : scan_state[p.state], p.B, p.T, D, N};
    }
    floatX* projected() const { return normed_slices ? x_raw : x_dbl; }
    // What another kind of mixer has in place of the scan; and what it adds to dt, B and C before their norms.
    virtual int64_t states() const { return N; }  // of a channel
    virtual int64_t chunks(int T) const { return scan_chunks(T); }
    virtual size_t mix_scratch(int B, int T) const { return model.layers.scan_scratch(B, T, D, N); }
    virtual void mix_forward(const Pass& p) {
        model.layers.scan_forward(y, p.state < 0 ? nullptr : scan_state[1 - p.state], p.training ? chunk_states : nullptr, scan(p),
                                  model.buffers.scratch, model.stream);
    }
    ScanGradients scan_gradients() const {
        return {d_u, d_dt, d_x_dbl + R, d_x_dbl + R + N, d_xz + D, A_log.grad, skip.grad, dt_bias.grad, nullptr};
    }
    virtual void mix_backward(const Pass& p) {
        model.layers.scan_backward(scan_gradients(), d_y, nullptr, scan(p), chunk_states, model.buffers.scratch, model.stream);
    }
    virtual void select_forward(const Pass&) {}
    virtual void select_backward(const Pass&) {}
    // Calls f(first column, norm) for the slices dt, B and C of x_dbl.
    template <class F>
    void each_slice(const Pass& p, F&& f) {
        for (const auto& [column, width, norm] : {std::tuple(0, R, &dt_norm), std::tuple(R, N, &b_norm), std::tuple(R + N, N, &c_norm)})
            f(column, *norm, SliceNorm{x_raw + column, ld, norm->master, p.rows(), width, real(model.config.norm_eps)});
    }
    void forward(const Pass& p, const floatX* normed, floatX* out, bool accumulate) override {
        const Layers& l = model.layers;
        const cudaStream_t stream = model.stream;
        const int rows = p.rows();
        l.linear_forward(xz, 2 * D, {normed, C, in_proj.weight, rows, C, 2 * D}, false, stream);
        l.conv_forward(u, p.state < 0 ? nullptr : conv_state[1 - p.state], conv(p), stream);
        l.linear_forward(projected(), ld, {u, D, x_proj.weight, rows, D, R + 2 * N}, false, stream);
        select_forward(p);
        if (normed_slices)
            each_slice(p, [&](int column, Tensor&, const SliceNorm& n) { l.slice_norm_forward(x_dbl + column, ld, n, stream); });
        l.linear_forward(dt, D, {x_dbl, ld, dt_proj.weight, rows, R, D}, false, stream);
        mix_forward(p);
        l.linear_forward(out, C, {y, D, out_proj.weight, rows, D, C}, accumulate, stream);
    }
    void backward(const Pass& p, floatX* d_normed, const floatX* d_out, const floatX* normed, bool accumulate) override {
        const Layers& l = model.layers;
        const cudaStream_t stream = model.stream;
        const int rows = p.rows();
        const bool add = p.part > 0;
        l.linear_backward(d_y, D, out_proj.grad, d_out, C, {y, D, out_proj.weight, rows, D, C}, false, add, stream);
        mix_backward(p);
        l.linear_backward(d_x_dbl, ld, dt_proj.grad, d_dt, D, {x_dbl, ld, dt_proj.weight, rows, R, D}, false, add, stream);
        if (normed_slices)  // in place: a row's gradient is read before it is written
            each_slice(p, [&](int column, Tensor& norm, const SliceNorm& n) {
                l.slice_norm_backward(d_x_dbl + column, norm.grad, d_x_dbl + column, ld, n, model.buffers.scratch, stream);
            });
        l.linear_backward(d_u, D, x_proj.grad, d_x_dbl, ld, {u, D, x_proj.weight, rows, D, R + 2 * N}, true, add, stream);
        select_backward(p);
        l.conv_backward({d_xz, conv_weight.grad, conv_bias.grad, nullptr}, d_u, nullptr, conv(p), model.buffers.scratch, stream);
        l.linear_backward(d_normed, C, in_proj.grad, d_xz, 2 * D, {normed, C, in_proj.weight, rows, C, 2 * D}, accumulate, add, stream);
    }
    int64_t products(int) const override { return in_proj.count + x_proj.count + dt_proj.count + out_proj.count; }
};

// A Mamba mixer with norms, whose scan runs in a closed loop (Layers::closed_loop_forward), and whose dt, B and C come of a nonlinear selection
// too:  x_proj u + W_s (silu(U_1 u) * (U_2 u)), W_s = 0 at first. Every term is the identity at first.
struct ConbaLayer : MambaLayer {
    const bool selects, controls, delays, scales, adapts, noisy;
    const uint64_t number;                       // unlike any other layer's: draws its noise
    Tensor select_in, select_out;                // (2R, D) = [U_1 | U_2], (R + 2N, R)
    Tensor gain, delay, zeta, gamma, output_noise;  // (D) k_0, (D), (D, N), (D, N), (D)
    floatX *select_gate_up, *selected, *d_select_gate_up, *d_selected;  // (rows, 2R), (rows, R)
    real* final_states;                          // (B, D, states()) of training

    ConbaLayer(Model& model, const std::string& name)
        : MambaLayer(model, name, true), selects(model.config.conba_has("selection")), controls(model.config.conba_has("control")),
          delays(model.config.conba_has("delay")), scales(model.config.conba_has("scaling")), adapts(model.config.conba_has("adaptation")),
          noisy(model.config.conba_has("noise")), number(model.tensors.size()) {}
    void add_optional() override {
        if (selects) {
            model.add_block(select_in, name + "select_in", int64_t(2 * R) * D, Init::uniform, 1 / std::sqrt(double(D)), Tensor::matrix);
            model.add_part(select_in, name + "select_gate_proj.weight", R, D);
            model.add_part(select_in, name + "select_up_proj.weight", R, D);
            model.add(select_out, name + "select_proj.weight", {R + 2 * N, R}, Init::constant, 0, Tensor::matrix);
        }
        if (controls) model.add(gain, name + "gain", {D}, Init::constant, 0, Tensor::plain);
        if (delays) model.add(delay, name + "delay", {D}, Init::constant, 0, Tensor::plain);
        if (scales) {
            const double one = 1.2784645427610738;  // silu(one) = 1
            model.add(zeta, name + "scaling_zeta", {D, N}, Init::constant, 0, Tensor::plain);
            model.add(gamma, name + "scaling_gamma", {D, N}, Init::constant, one, Tensor::plain);
        }
        if (noisy) model.add(output_noise, name + "output_noise", {D}, Init::constant, 0, Tensor::plain);
    }
    void plan_activations(Plan& plan) override {
        MambaLayer::plan_activations(plan);
        plan.arena.add(&select_gate_up, name + "selection's gate, up", selects ? plan.rows() * 2 * R : 0);
        plan.arena.add(&selected, name + "selection", selects ? plan.rows() * R : 0);
        plan.arena.add(&final_states, name + "final states", plan.training ? int64_t(plan.B) * D * states() : 0);
    }
    void plan_gradients(Plan& plan) override {
        MambaLayer::plan_gradients(plan);
        plan.arena.add(&d_select_gate_up, "d selection's gate, up", selects ? plan.rows() * 2 * R : 0);
        plan.arena.add(&d_selected, "d selection", selects ? plan.rows() * R : 0);
    }
    ClosedLoop loop(const Pass& p) const {
        const Config& c = model.config;
        return {scan(p), gain.master, delay.master, zeta.master, gamma.master, output_noise.master, noisy ? real(c.conba_sigma) : 0,
                noisy && p.noise ? random_bits(p.noise, kNoiseStream, number) : 0, adapts ? real(c.conba_alpha) : 0, real(c.conba_kappa),
                real(c.conba_eps), c.conba_tau};
    }
    int64_t states() const override { return N + 2 + model.config.conba_tau; }
    int64_t chunks(int T) const override { return loop_chunks(T); }
    size_t mix_scratch(int B, int T) const override { return model.layers.closed_loop_scratch(B, T, D, N, model.config.conba_tau); }
    void mix_forward(const Pass& p) override {
        model.layers.closed_loop_forward(y, p.training ? final_states : p.state < 0 ? nullptr : scan_state[1 - p.state],
                                         p.training ? chunk_states : nullptr, loop(p), model.buffers.scratch, model.stream);
    }
    void mix_backward(const Pass& p) override {
        model.layers.closed_loop_backward({scan_gradients(), gain.grad, delay.grad, zeta.grad, gamma.grad, output_noise.grad}, d_y, nullptr,
                                          loop(p), chunk_states, model.buffers.scratch, model.stream);
    }
    void select_forward(const Pass& p) override {
        if (!selects) return;
        const Layers& l = model.layers;
        const int rows = p.rows();
        l.linear_forward(select_gate_up, 2 * R, {u, D, select_in.weight, rows, D, 2 * R}, false, model.stream);
        l.swiglu_forward(selected, select_gate_up, rows, R, model.stream);
        l.linear_forward(projected(), ld, {selected, R, select_out.weight, rows, R, R + 2 * N}, true, model.stream);
    }
    void select_backward(const Pass& p) override {
        if (!selects) return;
        const Layers& l = model.layers;
        const int rows = p.rows();
        const bool add = p.part > 0;
        l.linear_backward(d_selected, R, select_out.grad, d_x_dbl, ld, {selected, R, select_out.weight, rows, R, R + 2 * N}, false, add,
                          model.stream);
        l.swiglu_backward(d_select_gate_up, d_selected, select_gate_up, rows, R, model.stream);
        l.linear_backward(d_u, D, select_in.grad, d_select_gate_up, 2 * R, {u, D, select_in.weight, rows, D, 2 * R}, true, add, model.stream);
    }
    int64_t products(int T) const override { return MambaLayer::products(T) + select_in.count + select_out.count; }
    std::vector<real> gains(int B) const override {
        if (!controls) return {};
        std::vector<real> all(int64_t(B) * D * states()), first(D), gains;
        model.layers.download(all.data(), final_states, all.size() * sizeof(real), model.stream);
        model.layers.download(first.data(), gain.master, first.size() * sizeof(real), model.stream);
        for (int64_t i = 0; i < int64_t(B) * D; i++) gains.push_back(all[i * states() + N] + first[i % D]);
        return gains;
    }
};

struct AttentionLayer : Layer {
    const int C, H, G, S;
    const int ld, ld_cache;      // of qkv_out; of the cache
    Tensor qkv, out;             // ((H + 2G) S, C), (C, H S)
    floatX *qkv_out, *heads;     // (rows, ld) = [queries | keys | values]; (rows, H S)
    real* lse;                   // (rows, H)
    floatX *d_qkv, *d_heads;
    floatX* cache;               // (B, context, 2 G S) = [keys | values], keys turned to their positions

    AttentionLayer(Model& model, const std::string& name)
        : Layer(model, name), C(model.config.d_model), H(model.config.heads), G(model.config.kv_heads), S(model.config.head_dim),
          ld((H + 2 * G) * S), ld_cache(2 * G * S) {
        model.add_block(qkv, name + "qkv", int64_t(ld) * C, Init::normal, fan_in(C), Tensor::matrix);
        model.add_part(qkv, name + "q_proj.weight", H * S, C);
        model.add_part(qkv, name + "k_proj.weight", G * S, C);
        model.add_part(qkv, name + "v_proj.weight", G * S, C);
        model.add(out, name + "o_proj.weight", {C, H * S}, Init::normal, fan_in(H * S), Tensor::matrix);
    }
    void plan_activations(Plan& plan) override {
        plan.arena.add(&qkv_out, name + "queries, keys, values", plan.rows() * ld);
        plan.arena.add(&heads, name + "heads", plan.rows() * H * S);
        plan.arena.add(&lse, name + "logsumexp of scores", plan.training ? plan.rows() * H : 0);
        plan.need(model.layers.attention_scratch(plan.B, plan.T, H, S));
    }
    void plan_gradients(Plan& plan) override {
        plan.arena.add(&d_qkv, "d queries, keys, values", plan.rows() * ld);
        plan.arena.add(&d_heads, "d heads", plan.rows() * H * S);
    }
    void plan_state(Arena& arena, int B, int64_t context) override {
        arena.add(&cache, name + "KV cache", B * context * ld_cache);
    }
    Rotary rotary(const Pass& p, const floatX* in, int heads, double base) const { return {in, ld, p.B, p.T, heads, S, p.position, base}; }
    Attention attention(const Pass& p) const {
        const floatX* const keys = p.state < 0 ? qkv_out + H * S : cache;
        return {qkv_out, keys, keys + G * S, ld, p.state < 0 ? ld : ld_cache, p.state < 0 ? int64_t(p.T) * ld : p.context * ld_cache,
                p.B, p.T, H, G, S, p.position};
    }
    void forward(const Pass& p, const floatX* normed, floatX* branch, bool accumulate) override {
        const Layers& l = model.layers;
        const cudaStream_t stream = model.stream;
        const double base = model.config.rope_base;
        l.linear_forward(qkv_out, ld, {normed, C, qkv.weight, p.rows(), C, ld}, false, stream);
        if (p.state < 0) {
            if (base != 0) l.rotate(qkv_out, ld, int64_t(p.T) * ld, rotary(p, qkv_out, H + G, base), false, stream);
        } else {  // keys and values go to where the cache has the tokens' positions
            if (base != 0) l.rotate(qkv_out, ld, int64_t(p.T) * ld, rotary(p, qkv_out, H, base), false, stream);
            floatX* const at = cache + p.position * ld_cache;
            l.rotate(at, ld_cache, p.context * ld_cache, rotary(p, qkv_out + H * S, G, base), false, stream);
            l.rotate(at + G * S, ld_cache, p.context * ld_cache, rotary(p, qkv_out + (H + G) * S, G, 0), false, stream);
        }
        l.attention_forward(heads, p.training ? lse : nullptr, attention(p), model.buffers.scratch, stream);
        l.linear_forward(branch, C, {heads, H * S, out.weight, p.rows(), H * S, C}, accumulate, stream);
    }
    void backward(const Pass& p, floatX* d_normed, const floatX* d_out, const floatX* normed, bool accumulate) override {
        const Layers& l = model.layers;
        const cudaStream_t stream = model.stream;
        const int rows = p.rows();
        const bool add = p.part > 0;
        l.linear_backward(d_heads, H * S, out.grad, d_out, C, {heads, H * S, out.weight, rows, H * S, C}, false, add, stream);
        l.attention_backward(d_qkv, d_qkv + H * S, d_qkv + (H + G) * S, d_heads, heads, lse, attention(p), model.buffers.scratch, stream);
        if (model.config.rope_base != 0)
            l.rotate(d_qkv, ld, int64_t(p.T) * ld, rotary(p, d_qkv, H + G, model.config.rope_base), true, stream);
        l.linear_backward(d_normed, C, qkv.grad, d_qkv, ld, {normed, C, qkv.weight, rows, C, ld}, accumulate, add, stream);
    }
    int64_t cache_elements() const override { return ld_cache; }
    int64_t products(int T) const override { return qkv.count + out.count + int64_t(H) * S * (T + 1); }  // 2 H S, half the keys
};

struct FeedForwardLayer : Layer {
    const int C, F;
    const bool swiglu;
    const int F_in;                // outputs of the first product: 2F or F
    Tensor in, down;               // (F_in, C), (C, F)
    floatX *gate_up, *hidden;      // (rows, 2F), SwiGLU only; (rows, F)
    floatX *d_gate_up, *d_hidden;

    FeedForwardLayer(Model& model, const std::string& name)
        : Layer(model, name), C(model.config.d_model), F(model.config.d_ff), swiglu(model.config.swiglu_ff), F_in(swiglu ? 2 * F : F) {
        model.add_block(in, name + "in", int64_t(F_in) * C, Init::normal, fan_in(C), Tensor::matrix);
        if (swiglu) model.add_part(in, name + "gate_proj.weight", F, C);
        model.add_part(in, name + "up_proj.weight", F, C);
        model.add(down, name + "down_proj.weight", {C, F}, Init::normal, fan_in(F), Tensor::matrix);
    }
    void plan_activations(Plan& plan) override {
        plan.arena.add(&gate_up, name + "gate, up", swiglu ? plan.rows() * F_in : 0);
        plan.arena.add(&hidden, name + "hidden", plan.rows() * F);
    }
    void plan_gradients(Plan& plan) override {
        plan.arena.add(&d_gate_up, "d gate, up", swiglu ? plan.rows() * F_in : 0);
        plan.arena.add(&d_hidden, "d hidden", plan.rows() * F);
    }
    void forward(const Pass& p, const floatX* normed, floatX* out, bool accumulate) override {
        const Layers& l = model.layers;
        const int rows = p.rows();
        l.linear_forward(swiglu ? gate_up : hidden, F_in, {normed, C, in.weight, rows, C, F_in}, false, model.stream);
        if (swiglu) l.swiglu_forward(hidden, gate_up, rows, F, model.stream);
        else l.relu_forward(hidden, hidden, int64_t(rows) * F, model.stream);
        l.linear_forward(out, C, {hidden, F, down.weight, rows, F, C}, accumulate, model.stream);
    }
    void backward(const Pass& p, floatX* d_normed, const floatX* d_out, const floatX* normed, bool accumulate) override {
        const Layers& l = model.layers;
        const int rows = p.rows();
        const bool add = p.part > 0;
        l.linear_backward(d_hidden, F, down.grad, d_out, C, {hidden, F, down.weight, rows, F, C}, false, add, model.stream);
        if (swiglu) l.swiglu_backward(d_gate_up, d_hidden, gate_up, rows, F, model.stream);
        else l.relu_backward(d_hidden, d_hidden, hidden, int64_t(rows) * F, model.stream);
        l.linear_backward(d_normed, C, in.grad, swiglu ? d_gate_up : d_hidden, F_in, {normed, C, in.weight, rows, C, F_in}, accumulate, add,
                          model.stream);
    }
    int64_t products(int) const override { return in.count + down.count; }
};

struct ExpertsLayer : Layer {
    const bool expert_choice;
    const int C, F, E, K;                   // K = E with Expert Choice: any number of them may choose a token
    const bool swiglu;
    const int F_in;                         // outputs of the first product: 2F or F
    Tensor router, in, out;                 // (E, C); per expert (F_in, C), (C, F)
    Routing routing;
    int *slot, *choice, *offset;            // as in Dispatch; its load lies among the counters
    std::vector<int> host_offset;
    floatX *dispatched, *gate_up, *hidden, *y;    // (slots, C); (slots, 2F), SwiGLU only; (slots, F); (slots, C)
    floatX *d_slots, *d_gate_up, *d_hidden;       // (slots, C) first the gradient of y, then of dispatched
    real* d_gates;

    ExpertsLayer(Model& model, const std::string& name)
        : Layer(model, name), expert_choice(model.config.expert_choice()), C(model.config.d_model), F(model.config.d_expert),
          E(model.config.experts), K(expert_choice ? E : model.config.top_k), swiglu(model.config.swiglu_experts), F_in(swiglu ? 2 * F : F) {
        model.expert_layers++;
        model.add(router, name + "router.weight", {E, C}, Init::normal, fan_in(C), Tensor::decayed);
        model.add_block(in, name + "experts.in", int64_t(E) * F_in * C, Init::normal, fan_in(C), Tensor::matrix);
        model.add_block(out, name + "experts.out", int64_t(E) * C * F, Init::normal, fan_in(F), Tensor::matrix);
        for (int e = 0; e < E; e++) {
            const std::string expert = name + "experts." + std::to_string(e) + ".";
            if (swiglu) model.add_part(in, expert + "gate_proj.weight", F, C);
            model.add_part(in, expert + "up_proj.weight", F, C);
            model.add_part(out, expert + "down_proj.weight", C, F);
        }
    }
    // Rows of each expert; 0: no limit. Without Expert Choice nothing is dropped but in training.
    int capacity(int64_t rows, bool training) const { return training || expert_choice ? model.config.capacity_rows(int(rows)) : 0; }
    int64_t slots(const Plan& plan) const {
        const int64_t n = Dispatch::slots(plan.rows(), E, K, capacity(plan.rows(), plan.training));
        if (n > std::numeric_limits<int>::max())
            fail("%lld tokens in a batch make %lld rows for the experts, more than 2^31 - 1: use a smaller batch, --top-k or --capacity",
                 (long long)plan.rows(), (long long)n);
        return n;
    }
    void plan_activations(Plan& plan) override {
        const int64_t rows = plan.rows(), n = slots(plan);
        plan.arena.add(&routing.probs, name + "router probabilities", rows * E);
        plan.arena.add(&routing.lse, name + "router logsumexp", rows);
        plan.arena.add(&routing.gates, name + "gates", expert_choice ? 0 : rows * K);
        plan.arena.add(&routing.experts, name + "chosen experts", expert_choice ? 0 : rows * K);
        plan.arena.add(&slot, name + "slots of choices", rows * K);
        plan.arena.add(&choice, name + "choices of slots", n);
        plan.arena.add(&offset, name + "expert offsets", E + 1);
        plan.arena.add(&dispatched, name + "dispatched", n * C);
        plan.arena.add(&gate_up, name + "expert gate, up", swiglu ? n * F_in : 0);
        plan.arena.add(&hidden, name + "expert hidden", n * F);
        plan.arena.add(&y, name + "expert outputs", n * C);
        plan.need(model.layers.router_scratch(int(rows), C, E));
        plan.need(model.layers.dispatch_scratch(rows * K));
        host_offset.resize(E + 1);
    }
    void plan_gradients(Plan& plan) override {
        const int64_t n = slots(plan);
        plan.arena.add(&d_gates, "d gates", plan.rows() * K);
        plan.arena.add(&d_slots, "d expert inputs, outputs", n * C);
        plan.arena.add(&d_gate_up, "d expert gate, up", swiglu ? n * F_in : 0);
        plan.arena.add(&d_hidden, "d expert hidden", n * F);
    }
    Dispatch to(const Pass& p) const {
        int* const load = model.buffers.counters + int64_t(p.part % model.planned_parts) * model.counters + first_counter;
        return {slot, choice, load, offset, p.rows(), E, K, capacity(p.rows(), p.training)};
    }
    Router router_of(const Pass& p, const floatX* normed) const {
        return {normed, router.master, p.rows(), C, E, expert_choice ? 0 : K, bool(model.config.renormalize)};
    }
    const real* gates() const { return expert_choice ? routing.probs : routing.gates; }
    void forward(const Pass& p, const floatX* normed, floatX* branch, bool accumulate) override {
        const Layers& l = model.layers;
        const cudaStream_t stream = model.stream;
        char* const scratch = model.buffers.scratch;
        const Dispatch to = this->to(p);
        l.router_forward(routing, router_of(p, normed), scratch, stream);
        if (expert_choice) l.expert_choice_plan(to, routing.probs, stream);
        else l.dispatch_plan(to, routing.experts, scratch, stream);
        if (p.training) l.router_losses(model.buffers.losses + Model::kBalance, routing.probs, routing.lse, to.load, scratch, p.rows(), E, stream);
        const bool counted = to.capacity == 0 && (p.training || to.slots() > kFewSlots);
        if (counted) l.download(host_offset.data(), offset, (E + 1) * sizeof(int), stream);
        const int* const known = counted ? host_offset.data() : nullptr;
        l.dispatch_forward(dispatched, normed, to, C, stream);
        floatX* const first = swiglu ? gate_up : hidden;
        l.experts_forward(first, {dispatched, in.weight, to, known, C, F_in}, stream);
        if (swiglu) l.swiglu_forward(hidden, gate_up, to.slots(), F, stream);
        else l.relu_forward(hidden, hidden, int64_t(to.slots()) * F, stream);
        l.experts_forward(y, {hidden, out.weight, to, known, F, C}, stream);
        l.combine_forward(branch, y, gates(), to, C, accumulate, stream);
    }
    void backward(const Pass& p, floatX* d_normed, const floatX* d_out, const floatX* normed, bool accumulate) override {
        const Layers& l = model.layers;
        const cudaStream_t stream = model.stream;
        const Dispatch to = this->to(p);
        const bool add = p.part > 0;
        const int* const known = to.capacity ? nullptr : host_offset.data();
        const real share = real(1) / real(p.parts * model.expert_layers);
        l.combine_backward(d_slots, d_gates, d_out, y, gates(), to, C, stream);
        l.experts_backward(d_hidden, out.grad, d_slots, {hidden, out.weight, to, known, F, C}, add, stream);
        if (swiglu) l.swiglu_backward(d_gate_up, d_hidden, gate_up, to.slots(), F, stream);
        else l.relu_backward(d_hidden, d_hidden, hidden, int64_t(to.slots()) * F, stream);
        l.experts_backward(d_slots, in.grad, swiglu ? d_gate_up : d_hidden, {dispatched, in.weight, to, known, C, F_in}, add, stream);
        l.dispatch_backward(d_normed, d_slots, to, C, accumulate, stream);
        l.router_backward(d_normed, router.grad, d_gates, routing, to.load, router_of(p, normed), real(model.config.balance_loss) * share,
                          real(model.config.z_loss) * share, model.buffers.scratch, stream);
    }
    double experts_per_token() const { return expert_choice ? std::min<double>(model.config.capacity, E) : K; }
    int64_t products(int) const override { return router.count + int64_t(double((in.count + out.count) / E) * experts_per_token()); }
    int64_t idle_parameters() const override { return in.count + out.count + router.count - products(1); }
    int counters() const override { return E; }
    void report(Losses& losses, const int* load, int rows, double share) const override {
        const int capacity = this->capacity(rows, true);
        const double choices = double(rows) * model.config.top_k;
        for (int e = 0; e < E; e++) {
            losses.expert_load = std::max(losses.expert_load, load[e] / (choices / E));
            if (capacity) losses.dropped += std::max(0, load[e] - capacity) / choices * share / model.expert_layers;
        }
    }
};

// ------------------------------------------------------------------------------------------------------------------
// Model: parameters

Model::Model(const Config& given, const Layers& layers) : config(given), layers(layers) {
    config.resolve();
    const int64_t C = config.d_model, Vp = config.padded_vocab();
    const std::vector<std::string> layout = config.steps();
    for (const std::string& step : layout) additions += int(step.size());
    add(embedding, "backbone.embeddings.weight", {Vp, C}, Init::normal, 0.02, Tensor::matrix);
    for (size_t s = 0; s < layout.size(); s++) {
        Step& step = *steps.emplace_back(std::make_unique<Step>());
        const std::string prefix = "backbone.layers." + std::to_string(s) + ".";
        add(step.norm, prefix + "norm.weight", {C}, Init::constant, 1, Tensor::plain);
        for (size_t l = 0; l < layout[s].size(); l++) {
            // In a parallel group with two layers of one kind, the second has a number.
            const auto twins = std::count(layout[s].begin(), layout[s].begin() + l, layout[s][l]);
            const Kind& kind = *find_kind(layout[s][l]);
            step.layers.push_back(kind.make(*this, prefix + kind.parameters + (twins ? std::string("_") + std::to_string(twins) : "") + "."));
            step.layers.back()->first_counter = counters;
            counters += step.layers.back()->counters();
        }
    }
    add(steps.emplace_back(std::make_unique<Step>())->norm, "backbone.norm_f.weight", {C}, Init::constant, 1, Tensor::plain);
    head = &embedding;
    if (!config.tied) {
        head = &head_table;
        add(head_table, "lm_head.weight", {Vp, C}, Init::normal, fan_in(C), Tensor::matrix);
    }
    for (const auto& step : steps)
        for (const auto& layer : step->layers) layer->add_optional();
}

Model::~Model() { layers.release_host(staging); }

void Model::add_block(Tensor& t, const std::string& name, int64_t count, Init init, double scale, Tensor::Update update) {
    t.name = name;
    t.count = count;
    t.init = init;
    t.scale = scale;
    t.update = update;
    tensors.push_back(&t);
}

static int64_t product(const std::vector<int64_t>& shape) {
    return std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<>());
}
static std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text;
    for (const int64_t size : shape) text += (text.empty() ? "(" : ", ") + std::to_string(size);
    return text + ")";
}
void Model::add(Tensor& t, const std::string& name, std::vector<int64_t> shape, Init init, double scale, Tensor::Update update) {
    const int64_t count = product(shape);
    add_block(t, name, count, init, scale, update);
    parameters.push_back({name, std::move(shape), &t, 0, count});
}

void Model::add_part(Tensor& t, const std::string& name, int64_t rows, int64_t columns) {
    int64_t offset = 0;
    for (const Parameter& p : parameters)
        if (p.tensor == &t) offset = p.offset + p.count;
    parameters.push_back({name, {rows, columns}, &t, offset, rows * columns});
}

int64_t Model::parameter_count() const {
    int64_t n = 0;
    for (const Tensor* t : tensors) n += t->count;
    return n;
}

int64_t Model::active_parameter_count() const {
    int64_t n = parameter_count();
    for (const auto& step : steps)
        for (const auto& layer : step->layers) n -= layer->idle_parameters();
    return n;
}

int64_t Model::read_parameter_count() const {
    return active_parameter_count() - (config.tied ? 0 : int64_t(config.padded_vocab() - 1) * config.d_model);
}
int64_t Model::outer_parameter_count() const { return embedding.count + head_table.count; }

double Model::matmul_flops_per_token(int T, bool training) const {
    int64_t products = head->count;
    for (const auto& step : steps)
        for (const auto& layer : step->layers) products += layer->products(T);
    return 2.0 * double(products) * (training ? 3 : 1);
}

// In each arena tensors lie by their kind of update, so that one launch updates all of a kind.
void Model::plan_tensors() {
    constexpr int64_t kAlign = 128;  // elements: 256 bytes of bf16
    int64_t at = 0;
    for (Tensor::Update update : {Tensor::matrix, Tensor::decayed, Tensor::plain, Tensor::never}) {
        for (Tensor* t : tensors)
            if (t->update == update) {
                t->at = at;
                at += (t->count + kAlign - 1) / kAlign * kAlign;
            }
        ends[update] = at;
    }
    masters.add(&buffers.master, "master weights", at - first_master());
    if (kMixedPrecision) weights.add(&buffers.weight, "weights", trains ? at : ends[Tensor::matrix]);
}
int64_t Model::first_master() const { return kMixedPrecision && !trains ? ends[Tensor::matrix] : 0; }

void Model::allocate_weights() {
    if (masters.device) return;
    if (masters.entries.empty()) plan_tensors();
    stream = layers.open();
    masters.allocate(layers);
    if (kMixedPrecision) weights.allocate(layers);
    else buffers.weight = reinterpret_cast<floatX*>(buffers.master);  // one type, one copy
    for (const Arena* arena : {&masters, &weights})  // what lies between tensors, too, and what files leave out: rows that pad the vocabulary
        for (const Arena::Entry& entry : arena->entries) layers.zero(entry.memory, entry.bytes, stream);
    for (Tensor* t : tensors) {
        const bool matrix = t->update == Tensor::matrix;
        t->master = matrix && first_master() > 0 ? nullptr : buffers.master + (t->at - first_master());
        t->weight = matrix || trains ? buffers.weight + t->at : nullptr;
    }
}

// Copies values to the master and the rounded weight of a tensor, or to that of them which there is.
static void set_tensor(const Model& model, const Tensor& t, int64_t offset, const std::vector<real>& values) {
    if (t.master) model.layers.upload(t.master + offset, values.data(), values.size() * sizeof(real), model.stream);
    if (kMixedPrecision && t.weight) {
        const std::vector<floatX> rounded(values.begin(), values.end());
        model.layers.upload(t.weight + offset, rounded.data(), rounded.size() * sizeof(floatX), model.stream);
    }
}

void Model::initialize(uint64_t seed) {
    allocate_weights();
    for (size_t i = 0; i < tensors.size(); i++) {
        const Tensor& t = *tensors[i];
        const uint64_t stream = kInitStream + (i << 8);
        std::vector<real> values(t.count);
        auto draw = [&](int64_t k) -> double {
            switch (t.init) {
                case Init::constant: return t.scale;
                case Init::uniform: return t.scale * (2 * random_uniform(seed, stream, k) - 1);
                case Init::normal: return t.scale * random_normal(seed, stream, k);
                case Init::log_state: return std::log(double(k % config.d_state + 1));
                case Init::dt_bias: {  // the bias at which softplus gives a dt that is log-uniform in [1e-3, 1e-1]
                    const double dt = std::exp(std::log(1e-3) + random_uniform(seed, stream, k) * std::log(1e-1 / 1e-3));
                    return dt + std::log(-std::expm1(-dt));
                }
            }
            return 0;
        };
#pragma omp parallel for
        for (int64_t k = 0; k < t.count; k++) values[k] = real(draw(k));
        set_tensor(*this, t, 0, values);
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Model: activations

// The head's logits would be the largest tensor of all (rows, V): they are made, and turned into gradients, this many rows at a time.
int Model::head_rows() const {
    constexpr int64_t kBytes = 64 << 20, kLeast = 128;
    return int(std::max<int64_t>(kLeast, kBytes / (config.padded_vocab() * int64_t(sizeof(floatX)))));
}

// Training keeps what the backward pass needs. Without it every step works in the same memory.
void Model::plan_activations(Arena& arena, int B, int T, bool training) {
    Plan plan{arena, B, T, training, kSumScratch};
    const int64_t C = config.d_model, rows = plan.rows();
    arena.add(&buffers.tokens, "tokens", rows);
    arena.add(&buffers.targets, "targets", rows);
    arena.add(&buffers.row_losses, "row losses", rows);
    arena.add(&buffers.evaluated, "sum of row losses", 1);
    arena.add(&buffers.counters, "counters", int64_t(training ? planned_parts : 1) * std::max(1, counters));
    arena.add(&buffers.branch, "branch", rows * C);
    arena.add(&buffers.logits, "logits", std::min<int64_t>(rows, head_rows()) * config.padded_vocab());
    arena.add(&buffers.probs, "probabilities", int64_t(B) * config.vocab);
    const size_t base = arena.top;
    for (size_t s = 0; s < steps.size(); s++) {
        Step& step = *steps[s];
        const std::string prefix = "step " + std::to_string(s) + " ";
        if (!training) arena.rewind(base);
        arena.add(&step.sum, prefix + "residual", rows * C);
        arena.add(&step.rstd, prefix + "rstd", rows);
        arena.add(&step.normed, prefix + "normed", rows * C);
        const size_t after_norm = arena.top;
        for (const auto& layer : step.layers) {
            if (!training) arena.rewind(after_norm);
            layer->plan_activations(plan);
        }
    }
    arena.rewind(arena.bytes);
    if (training) {
        arena.add(&buffers.d_sum, "d residual", rows * C);
        arena.add(&buffers.d_branch, "d branch", rows * C);
        arena.add(&buffers.d_normed, "d normed", rows * C);
        const size_t shared = arena.top;  // gradients inside a layer: dead when it is done
        for (const auto& step : steps)
            for (const auto& layer : step->layers) {
                arena.rewind(shared);
                layer->plan_gradients(plan);
            }
        arena.rewind(arena.bytes);
        plan.need(layers.rmsnorm_scratch(int(rows), config.d_model));
        plan.need(layers.embedding_scratch(int(rows)));
    }
    arena.add(&buffers.scratch, "scratch", int64_t(plan.scratch));
}

void Model::plan_training(int B, int T, int accumulation) {
    if (B < 1 || T < 1 || int64_t(B) * T > (1 << 24))
        fail("--batch %d --seq-len %d: both must be at least 1, and their product at most 2^24", B, T);
    batch = B;
    time = T;
    planned_parts = accumulation;
    if (masters.entries.empty()) plan_tensors();
    gradients.add(&buffers.grad, "gradients, losses", ends[Tensor::never] + kLossCount);
    moments.add(&buffers.m, "first moments", ends[Tensor::plain]);
    moments.add(&buffers.v, "second moments", ends[Tensor::plain]);
    plan_activations(activations, B, T, true);
    Arena evaluation("evaluation");  // works in the same memory, between two steps
    plan_activations(evaluation, B, T, false);
    activations.bytes = std::max(activations.bytes, evaluation.bytes);
}

// Everything that training takes, evaluation of as many tokens included: what did not fit would otherwise fail late, with work lost.
void Model::allocate_training(int B, int T, int accumulation) {
    plan_training(B, T, accumulation);
    allocate_weights();
    gradients.allocate(layers);
    buffers.losses = buffers.grad + ends[Tensor::never];
    moments.allocate(layers);
    activations.allocate(layers);
    for (Tensor* t : tensors) {
        t->grad = buffers.grad + t->at;  // of those that are never updated, too: layers write it, nobody reads it
        if (t->update == Tensor::never) continue;
        t->m = buffers.m + t->at;
        t->v = buffers.v + t->at;
    }
    for (real* moment : {buffers.m, buffers.v}) layers.zero(moment, ends[Tensor::plain] * sizeof(real), stream);
    reserve_staging(int64_t(2) * accumulation * B * T);
    begin_inference(B, T);
    activations.bind();
    zero_gradients();
}

// ------------------------------------------------------------------------------------------------------------------
// Model: forward and backward

// Room on the host for so many tokens and targets that wait to be read by the device.
void Model::reserve_staging(int64_t count) {
    if (count <= staging_count) return;
    if (staged > 0) layers.synchronize(stream);
    staged = 0;
    layers.release_host(staging);
    staging = nullptr;
    staging = static_cast<int*>(layers.allocate_host(count * sizeof(int), "tokens on their way to the device"));
    staging_count = count;
}

// Uploads from there, without waiting as long as there is room.
void Model::stage(int* to_device, const int* from, int count) {
    if (staged + count > staging_count) {
        layers.synchronize(stream);
        staged = 0;
    }
    int* const to = staging + staged;
    staged += count;
    std::copy_n(from, count, to);
    layers.upload_later(to_device, to, count * sizeof(int), stream);
}

// From tokens to the normed residual stream that the head reads. Both on the host; targets or null, for cross_entropy: they are uploaded
// here because an upload between two layers would wait for the first.
void Model::forward(const Pass& pass, const int* tokens, const int* targets) {
    const int rows = pass.rows(), C = config.d_model;
    stage(buffers.tokens, tokens, rows);
    if (targets) stage(buffers.targets, targets, rows);
    layers.embedding_forward(steps[0]->sum, buffers.tokens, embedding.weight, rows, C, stream);
    const real* residual = steps[0]->sum;
    const floatX* branch = nullptr;
    for (const auto& step : steps) {
        layers.rmsnorm_forward(step->normed, step->sum, step->rstd, residual, branch, step->norm.master, rows, C, real(config.norm_eps),
                               stream);
        for (const auto& layer : step->layers) layer->forward(pass, step->normed, buffers.branch, layer != step->layers.front());
        residual = step->sum;
        branch = buffers.branch;
    }
}

// Runs the head over `rows` rows of normed, head_rows() at a time, and calls each(first row, rows) with their logits in buffers.logits.
template <class F>
void Model::head_blocks(const floatX* normed, int ld_normed, int rows, F&& each) {
    const int C = config.d_model, Vp = config.padded_vocab();
    for (int first = 0; first < rows; first += head_rows()) {
        const int block = std::min(head_rows(), rows - first);
        layers.linear_forward(buffers.logits, Vp, {normed + int64_t(first) * ld_normed, ld_normed, head->weight, block, C, Vp}, false, stream);
        each(first, block);
    }
}

// Adds the rows' cross-entropies to *sum. d_loss != 0: logits become gradients, `each` uses them.
template <class F>
void Model::cross_entropy(real* sum, int rows, real d_loss, F&& each) {
    head_blocks(steps.back()->normed, config.d_model, rows, [&](int first, int block) {
        layers.classifier(buffers.row_losses + first, buffers.logits, buffers.targets + first, block, config.vocab, config.padded_vocab(),
                          d_loss, stream);
        each(first, block);
    });
    layers.sum(sum, buffers.row_losses, buffers.scratch, rows, stream);
}

void Model::forward_backward(const int* tokens, const int* targets, int accumulation) {
    const Pass pass{.B = batch, .T = time, .training = true, .part = parts, .parts = accumulation,
                    .noise = noise_seed ? random_bits(noise_seed, kNoiseStream, parts) : 0};
    const int rows = pass.rows(), C = config.d_model, Vp = config.padded_vocab();
    Buffers& b = buffers;
    activations.bind();
    forward(pass, tokens, targets);
    const int64_t counted = rows - std::count(targets, targets + rows, -1);
    const floatX* normed = steps.back()->normed;
    cross_entropy(b.losses + kCrossEntropy, rows, real(1) / real(std::max<int64_t>(1, counted) * accumulation), [&](int first, int block) {
        const int64_t at = int64_t(first) * C;
        layers.linear_backward(b.d_normed + at, C, head->grad, b.logits, Vp, {normed + at, C, head->weight, block, C, Vp}, false,
                               parts > 0 || first > 0, stream);
    });
    layers.zero(b.d_sum, size_t(rows) * C * sizeof(real), stream);
    for (size_t s = steps.size(); s-- > 0;) {
        Step& step = *steps[s];
        for (const auto& layer : step.layers)
            layer->backward(pass, b.d_normed, b.d_branch, step.normed, layer != step.layers.front());
        layers.rmsnorm_backward(b.d_sum, b.d_branch, step.norm.grad, b.d_normed, step.sum, step.rstd, step.norm.master, b.scratch, rows,
                                C, stream);
    }
    layers.embedding_backward(embedding.grad, b.d_sum, b.tokens, b.scratch, rows, Vp, C, stream);
    parts++;
    targets_seen += counted;
}

void Model::zero_gradients() {
    layers.zero(buffers.grad, (ends[Tensor::never] + kLossCount) * sizeof(real), stream);
    parts = 0;
    targets_seen = 0;
}

Losses Model::read_losses() {
    activations.bind();
    layers.sum_of_squares(buffers.losses + kGradSquares, buffers.grad, buffers.scratch, ends[Tensor::plain], stream);
    real sums[kLossCount];
    const int kept = std::min(parts, planned_parts);
    std::vector<int> counts(int64_t(kept) * counters);
    layers.download(sums, buffers.losses, sizeof(sums), stream);
    if (!counts.empty()) layers.download(counts.data(), buffers.counters, counts.size() * sizeof(int), stream);
    layers.zero(buffers.losses + kGradSquares, sizeof(real), stream);  // so that reading twice gives the same
    staged = 0;
    Losses losses;
    losses.cross_entropy = sums[kCrossEntropy] / double(std::max<int64_t>(1, targets_seen));
    losses.grad_norm = std::sqrt(double(sums[kGradSquares]));
    losses.balance = sums[kBalance] / (std::max(1.0, double(parts)) * std::max(1, expert_layers));
    losses.z = sums[kZ] / (std::max(1.0, double(parts)) * std::max(1, expert_layers));
    for (const auto& step : steps)
        for (const auto& layer : step->layers) {
            for (int part = 0; part < kept; part++)
                layer->report(losses, counts.data() + int64_t(part) * counters + layer->first_counter, batch * time, 1.0 / kept);
            const std::vector<real> all = parts > 0 ? layer->gains(batch) : std::vector<real>();
            if (all.empty()) continue;
            Gains& gains = losses.gains.emplace_back(Gains{layer->name, 0, 0});
            for (const real k : all) {
                gains.mean += std::fabs(double(k)) / double(all.size());
                gains.largest = std::max(gains.largest, std::fabs(double(k)));
            }
        }
    return losses;
}

std::string Model::first_bad_tensor() {
    activations.bind();
    const auto squares = [&](const real* values, int64_t count) {
        real sum = 0;
        layers.zero(buffers.losses + kGradSquares, sizeof(real), stream);
        layers.sum_of_squares(buffers.losses + kGradSquares, values, buffers.scratch, count, stream);
        layers.download(&sum, buffers.losses + kGradSquares, sizeof(real), stream);
        layers.zero(buffers.losses + kGradSquares, sizeof(real), stream);
        return double(sum);
    };
    for (const Tensor* t : tensors)
        if (!std::isfinite(squares(t->master, t->count))) return "weight of " + t->name;
    for (size_t s = 0; parts > 0 && s < steps.size(); s++)
        if (!std::isfinite(squares(steps[s]->sum, int64_t(batch) * time * config.d_model)))
            return "residual stream that reaches " + steps[s]->norm.name;
    double largest = 0;
    std::string name;
    for (size_t i = tensors.size(); i-- > 0;) {
        const double size = squares(tensors[i]->grad, tensors[i]->count);
        if (!std::isfinite(size)) return "gradient of " + tensors[i]->name;
        if (size > largest) largest = size, name = tensors[i]->name;
    }
    return name.empty() ? "" : "gradient of " + name + ", the largest";
}

void Model::update(const AdamW& o, const Losses& losses, int step) {
    const double clip = o.grad_clip > 0 && losses.grad_norm > o.grad_clip ? o.grad_clip / losses.grad_norm : 1;
    int64_t first = 0;
    for (Tensor::Update update : {Tensor::decayed, Tensor::plain}) {  // the first are matrices too
        AdamW options = o;
        if (update == Tensor::plain) options.weight_decay = 0;
        layers.adamw(buffers.master + first, kMixedPrecision ? buffers.weight + first : nullptr, buffers.m + first, buffers.v + first,
                     buffers.grad + first, ends[update] - first, options, real(clip), step, stream);
        first = ends[update];
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Model: evaluation and decoding. They run between two training steps, in the activations' memory where that is enough.

void Model::begin_inference(int B, int T) {
    if (int64_t(T) * config.d_model > std::numeric_limits<int>::max())
        fail("%d tokens at once are too many for a model of width %d: give the text in parts", T, config.d_model);
    if (B != inference_batch || T > inference_time) {
        inference.release();
        inference_batch = B;
        inference_time = std::max(1, T);
        plan_activations(inference, B, inference_time, false);
        inference.allocate(layers, &activations);
    }
    inference.bind();
    reserve_staging(int64_t(2) * B * T);
}

void Model::begin_evaluation(const int* tokens, const int* targets, int B, int T) {
    begin_inference(B, T);
    layers.zero(buffers.evaluated, sizeof(real), stream);
    forward({.B = B, .T = T}, tokens, targets);
    cross_entropy(buffers.evaluated, B * T, 0, [](int, int) {});
}
double Model::evaluate(const int* tokens, const int* targets, int B, int T) {
    begin_evaluation(tokens, targets, B, T);
    real sum;
    layers.download(&sum, buffers.evaluated, sizeof(sum), stream);
    staged = 0;
    const int64_t rows = int64_t(B) * T;
    return sum / double(std::max<int64_t>(1, rows - std::count(targets, targets + rows, -1)));
}
std::vector<real> Model::token_losses(const int* tokens, const int* targets, int B, int T) {
    begin_evaluation(tokens, targets, B, T);
    std::vector<real> losses(int64_t(B) * T);
    layers.download(losses.data(), buffers.row_losses, losses.size() * sizeof(real), stream);
    staged = 0;
    return losses;
}

void Model::start(DecodeState& state, int B, int64_t context) {
    if (!config.causal())
        fail("this model cannot continue a text: its experts choose their tokens from the whole batch (--routing expert-choice), later ones "
             "included");
    if (state.B != B || state.context != context) {
        state.arena.release();
        state.B = 0;
        for (const auto& step : steps)
            for (const auto& layer : step->layers) layer->plan_state(state.arena, B, context);
        try {
            state.arena.allocate(layers);
        } catch (const Error& e) {
            fail("%s. It is for %d texts of at most %lld tokens each, with the prompt: ask for fewer or shorter ones", e.what(), B,
                 (long long)context);
        }
        state.B = B;
        state.context = context;
    }
    state.position = state.current = 0;
    for (const Arena::Entry& entry : state.arena.entries) layers.zero(entry.memory, entry.bytes, stream);
}

// Both arenas have the same tensors, of which the first dimension is the sequence; `to` may have room for more tokens.
void Model::copy_state(DecodeState& to, const DecodeState& from) {
    for (size_t i = 0; i < to.arena.entries.size(); i++) {
        const Arena::Entry &all = to.arena.entries[i], &one = from.arena.entries[i];
        const size_t stride = all.bytes / to.B;
        for (int b = 0; b < to.B; b++) layers.copy(static_cast<char*>(all.memory) + b * stride, one.memory, one.bytes, stream);
    }
    to.position = from.position;
    to.current = from.current;
}

Model::StateBytes Model::decode_state_bytes(int64_t context, int bits) {
    Arena arena("one sequence, without its tokens");
    int64_t elements = 0;
    for (const auto& step : steps)
        for (const auto& layer : step->layers) {
            layer->plan_state(arena, 1, 0);
            elements += layer->cache_elements();
        }
    return {double(elements) * double(context) * bits / 8, double(arena.bytes)};
}

const real* Model::decode(DecodeState& state, const int* tokens, int T, real temperature) {
    const int B = state.B, C = config.d_model, V = config.vocab, Vp = config.padded_vocab();
    if (state.position + T > state.context)
        fail("decoding %d tokens after %lld: there is room for %lld in all", T, (long long)state.position, (long long)state.context);
    begin_inference(B, T);
    state.arena.bind();
    forward({.B = B, .T = T, .state = state.current, .position = state.position, .context = state.context}, tokens, nullptr);
    state.current = 1 - state.current;
    state.position += T;
    // Only the last position of each sequence reaches the head: rows that lie T * C apart.
    const floatX* last = steps.back()->normed + int64_t(T - 1) * C;
    probabilities.resize(int64_t(B) * V);
    head_blocks(last, T * C, B, [&](int first, int block) {
        layers.softmax_forward(buffers.probs + int64_t(first) * V, buffers.logits, block, V, Vp, temperature > 0 ? temperature : 1, stream);
    });
    layers.download(probabilities.data(), buffers.probs, probabilities.size() * sizeof(real), stream);
    staged = 0;
    return probabilities.data();
}

std::vector<real> Model::logits(const int* tokens, int B, int T) {
    const int V = config.vocab, Vp = config.padded_vocab();
    begin_inference(B, T);
    forward({.B = B, .T = T}, tokens, nullptr);
    std::vector<real> out;
    out.reserve(int64_t(B) * T * V);
    head_blocks(steps.back()->normed, config.d_model, B * T, [&](int, int block) {
        std::vector<floatX> padded(int64_t(block) * Vp);
        layers.download(padded.data(), buffers.logits, padded.size() * sizeof(floatX), stream);
        for (int r = 0; r < block; r++)
            for (int v = 0; v < V; v++) out.push_back(real(padded[int64_t(r) * Vp + v]));
    });
    staged = 0;
    return out;
}

int sample_token(const real* probs, int V, bool greedy, int top_k, double top_p, double u) {
    if (greedy) return int(std::max_element(probs, probs + V) - probs);
    std::vector<int> order(V);
    for (int v = 0; v < V; v++) order[v] = v;
    const bool all = top_p >= 1 && (top_k <= 0 || top_k >= V);
    if (!all) std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return probs[a] > probs[b]; });
    if (top_k > 0 && top_k < V) order.resize(top_k);
    double total = 0;
    for (int v : order) total += probs[v];
    if (top_p < 1) {  // of the top_k, the fewest whose share reaches top_p
        double reached = 0;
        size_t kept = 0;
        while (kept < order.size() && (kept == 0 || reached < top_p * total)) reached += probs[order[kept++]];
        order.resize(kept);
        total = reached;
    }
    double left = u * total;
    for (int v : order)
        if ((left -= probs[v]) < 0) return v;
    return order.back();
}

void generate(Model& model, DecodeState& state, const Tokenizer& tokenizer, std::vector<int> prompt, int64_t count,
              const Sampling& sampling, int64_t sample, int texts, const std::function<bool(int, int)>& emit) {
    if (prompt.empty()) prompt.push_back(tokenizer.end_of_text);
    const int64_t length = int64_t(prompt.size()), V = model.config.vocab;
    DecodeState alone, &reader = texts > 1 ? alone : state;  // of the prompt, for all texts
    model.start(state, texts, length + count);
    if (texts > 1) model.start(alone, 1, length);
    std::vector<int> tokens(texts);  // the last one of each
    std::vector<char> ended(texts);
    for (int64_t i = 0; i < count; i++) {
        const bool first = i == 0;
        const real* const probs = first ? model.decode(reader, prompt.data(), int(length), real(sampling.temperature))
                                        : model.decode(state, tokens.data(), 1, real(sampling.temperature));
        if (first && texts > 1) model.copy_state(state, alone);
        bool finite = true;
#pragma omp parallel for if (texts > 1) reduction(&& : finite)
        for (int text = 0; text < texts; text++) {
            if (ended[text]) continue;  // what it still computes, nobody reads
            const real* p = probs + (first ? 0 : text * V);
            finite = finite && std::isfinite(std::accumulate(p, p + tokenizer.vocab, 0.0));
            const double u = random_uniform(sampling.seed, kSampleStream, uint64_t(sample + text) << 32 | uint64_t(i));
            tokens[text] = sample_token(p, tokenizer.vocab, sampling.temperature == 0, sampling.top_k, sampling.top_p, u);
        }
        if (!finite) fail("the model's probabilities are not finite: its weights are damaged, perhaps by too high a learning rate");
        bool all_ended = true;
        for (int text = 0; text < texts; text++) {
            if (tokens[text] == tokenizer.end_of_text) ended[text] = true;
            if (ended[text]) continue;
            all_ended = false;
            if (!emit(text, tokens[text])) return;
        }
        if (all_ended) return;
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Model: checkpoints

// One of the optimizer's moments, or the masters, of each parameter that has them.
using Values = real* Tensor::*;
struct Kept {
    const char* suffix;
    Values values;
};
static const Kept kMasters[] = {{"", &Tensor::master}}, kMoments[] = {{".m", &Tensor::m}, {".v", &Tensor::v}};

template <class F>
static void each_kept(const Model& model, std::span<const Kept> kept, F&& f) {
    for (const Parameter& p : model.parameters)
        for (const Kept& k : kept)
            if (k.values == &Tensor::master || p.tensor->update != Tensor::never) f(p, p.name + k.suffix, p.tensor->*k.values + p.offset);
}

// names: of each tensor, and its shape, as the file has them; they may be fewer rows than there are.
using Names = std::function<void(std::string& name, std::vector<int64_t>& shape, const Parameter&)>;
static void save_tensors(const Model& model, std::span<const Kept> kept, const std::string& path, const Model::Metadata& metadata,
                         const Names& names) {
    std::vector<Safetensors::NewEntry> list;
    std::vector<const real*> sources;
    each_kept(model, kept, [&](const Parameter& p, const std::string& name, const real* from) {
        Safetensors::NewEntry& entry = list.emplace_back(Safetensors::NewEntry{name, sizeof(real) == 8 ? "F64" : "F32", p.shape, 0});
        names(entry.name, entry.shape, p);
        entry.bytes = product(entry.shape) * int64_t(sizeof(real));
        sources.push_back(from);
    });
    std::vector<char> bytes;
    Safetensors::write(path, list, metadata, [&](size_t i) {
        bytes.resize(list[i].bytes);
        model.layers.download(bytes.data(), sources[i], bytes.size(), model.stream);
        return bytes.data();
    });
}

// Calls f(values, where they go in the parameter) for a tensor, piece by piece: what is loaded does not exist twice.
template <class F>
static void read_in_pieces(const Safetensors& file, const std::string& name, int64_t first, int64_t count, F&& f) {
    constexpr int64_t kMost = 1 << 20;
    std::vector<real> values;
    for (int64_t at = 0; at < count; at += kMost) {
        values.resize(std::min(kMost, count - at));
        file.read(name, values.data(), first + at, int64_t(values.size()));
        f(values, at);
    }
}

static std::string family(const Config& config) { return huggingface::family(JsonObject(config.to_json(), "config"), config.steps()); }

void Model::save(const std::string& path, const Metadata& metadata) const {
    Metadata all = {{"format", "pt"}, {"config", config.to_json()}};
    all.insert(all.end(), metadata.begin(), metadata.end());
    save_tensors(*this, kMasters, path, all, [&, family = family(config)](std::string& name, std::vector<int64_t>& shape, const Parameter& p) {
        name = huggingface::tensor_name(family, name);
        if (of_vocabulary(p)) shape[0] = config.vocab;
    });
}

void Model::save_optimizer(const std::string& path, const Metadata& metadata) const {
    save_tensors(*this, kMoments, path, metadata, [](std::string&, std::vector<int64_t>&, const Parameter&) {});
}

void Model::save_config(const std::string& directory, const Tokenizer& tokenizer) const {
    const JsonObject json = huggingface::write_config(JsonObject(config.to_json(), "config"), config.steps(), tokenizer.end_of_text,
                                                      sizeof(real) == 8 ? "float64" : "float32");
    write_atomically(directory + "/" + huggingface::kConfigFile, [&](NewFile& file) { file.write(json.text(2) + "\n"); });
    tokenizer.save(directory);
}

// Where a file has a parameter: the name of a tensor, and the first of its elements.
struct Place {
    std::string name;
    int64_t first = 0, count = 0;  // count 0: it has none, and the parameter is zero
};
static Place find_place(const Model& model, const Safetensors& file, const std::string& family, const Parameter& p, bool conv_bias) {
    const std::string name = huggingface::tensor_name(family, p.name), fused = huggingface::fused_name(family, p.name);
    const auto place = [&](const std::string& name, const std::vector<int64_t>& shape, int64_t first) {
        if (const std::vector<int64_t>& there = file.find(name).shape; there != shape)
            fail("%s: tensor %s has shape %s, the model's config says %s", file.path.c_str(), name.c_str(), shape_text(there).c_str(),
                 shape_text(shape).c_str());
        return Place{name, first, std::min(p.count, product(shape))};
    };
    if (!conv_bias && name.ends_with("conv1d.bias")) return {};
    std::vector<int64_t> shape = p.shape;
    if (model.of_vocabulary(p)) {
        shape[0] = model.config.vocab;
        const std::string older = file.has(name) ? name : p.name;  // with its padding
        if (file.has(older) && file.find(older).shape == p.shape) return {older, 0, p.count};
    }
    if (!fused.empty() && !file.has(name) && file.has(fused)) {
        if (fused.ends_with(".weight")) return place(fused, shape, 0);
        return place(fused, {model.config.experts, p.tensor->count / model.config.experts / shape[1], shape[1]}, p.offset);
    }
    if (!file.has(name) && file.has(p.name)) return place(p.name, shape, 0);  // of checkpoints from before: all had our names
    return place(name, shape, 0);
}

void Model::load(const ModelFiles& files) {
    const Safetensors& file = files.weights;
    std::vector<Place> places;
    std::unordered_set<std::string> used;
    const std::string names = family(files.config);
    for (const Parameter& p : parameters) used.insert(places.emplace_back(find_place(*this, file, names, p, files.conv_bias)).name);
    if (config.tied) used.insert("lm_head.weight");  // what some files have all the same
    for (const auto& [name, entry] : file.entries)
        if (!used.count(name)) fail("%s: has a tensor %s; a model of its config has none", file.path.c_str(), name.c_str());
    if (!files.note.empty()) fprintf(stderr, "note: %s\n", files.note.c_str());
    allocate_weights();
    for (size_t i = 0; i < parameters.size(); i++)
        read_in_pieces(file, places[i].name, places[i].first, places[i].count, [&](const std::vector<real>& values, int64_t at) {
            set_tensor(*this, *parameters[i].tensor, parameters[i].offset + at, values);
        });
}

void Model::load_optimizer(const std::string& path) {
    const Safetensors file(path);
    size_t count = 0;
    each_kept(*this, kMoments, [&](const Parameter& p, const std::string& name, real*) {
        if (file.find(name).shape != p.shape)
            fail("%s: tensor %s has another shape than the model's config says", file.path.c_str(), name.c_str());
        count++;
    });
    if (file.entries.size() != count)
        fail("%s: has %zu tensors, the model's config says %zu", file.path.c_str(), file.entries.size(), count);
    each_kept(*this, kMoments, [&](const Parameter& p, const std::string& name, real* to) {
        read_in_pieces(file, name, 0, p.count, [&](const std::vector<real>& values, int64_t at) {
            layers.upload(to + at, values.data(), values.size() * sizeof(real), stream);
        });
    });
}

// ------------------------------------------------------------------------------------------------------------------
// A model on disk

static std::string weights_in(const std::string& path) {
    std::error_code ignored;
    if (!fs::is_directory(path, ignored)) return path;
    const fs::path one = fs::path(path) / kModelFile, index = fs::path(path) / (std::string(kModelFile) + ".index.json");
    return fs::exists(index, ignored) && !fs::exists(one, ignored) ? index.string() : one.string();
}

ModelFiles::ModelFiles(const std::string& path) : weights(weights_in(path)) {
    if (ours()) {
        config = Config::from_json(weights.meta("config"), weights.path);
        return;
    }
    const fs::path directory = fs::path(weights.path).parent_path();
    const std::string file = (directory / huggingface::kConfigFile).string();
    std::error_code ignored;
    if (!fs::exists(file, ignored))
        fail("%s: no \"config\" in its metadata, as train writes it, and no %s beside it, as transformers does", weights.path.c_str(),
             huggingface::kConfigFile.c_str());
    huggingface::TheirConfig theirs = huggingface::read_config(JsonObject(read_file(file, "config"), file), file);
    config = Config::from_json(theirs.config.text(), file, false);
    conv_bias = theirs.conv_bias;
    end_of_text = theirs.end_of_text;
    std::string unknown;
    for (const std::string& name : theirs.unknown) unknown += (unknown.empty() ? "" : ", ") + printable(name);
    if (!unknown.empty()) note = file + ": not known here, and not used: " + unknown;
}

Tokenizer ModelFiles::tokenizer() const {
    const fs::path directory = fs::path(weights.path).parent_path();
    Tokenizer t = ours() ? Tokenizer::from_json(weights.meta("tokenizer"), weights.path) : Tokenizer::load(directory.string());
    if (config.vocab < t.vocab)
        fail("%s: its model has %d tokens, its tokenizer %d", weights.path.c_str(), config.vocab, t.vocab);
    for (const int token : end_of_text)
        if (token < t.vocab) t.end_of_text = token;
    return t;
}
