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

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <span>
#include <type_traits>

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
    const PartialSum& s = sums.sum[blockIdx.y];
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
    __syncthreads();
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        real total = 0;
        for (int w = 0; w < warps; w++) total += d_weight[w * C + c];
        partials[int64_t(blockIdx.x) * C + c] = total;
    }
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
    __syncthreads();  // offset
    sort_place(s);
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
constexpr int kConvSegments = 8;  // threads of a block along time; kWarp along channels
constexpr int kConvBatch = 4;     // steps whose loads are under way together

struct ConvShape {
    int T, D, W, ld_in, segment_steps, segment_blocks, channel_blocks;
};
constexpr int kLeastConvSteps = 16, kMostConvSteps = 128;
template <int width>
ConvShape conv_shape(const Conv& c) {
    // Segments as long as can be while there are a thousand threads for each multiprocessor: short ones read more of their past.
    const int64_t columns = c.B * ceil_div(c.D, width), wanted = std::max<int64_t>(1, int64_t(multiprocessors()) * 1024 / columns);
    const int steps = int(std::clamp<int64_t>(ceil_div(ceil_div(c.T, wanted), kConvBatch) * kConvBatch, kLeastConvSteps, kMostConvSteps));
    return {c.T, c.D, c.W, c.ld_in, steps, int(ceil_div(c.T, int64_t(steps) * kConvSegments)), int(ceil_div(c.D, kWarp * width))};
}
struct ConvThread {
    int64_t b;
    int d, begin, end, part;
    bool active;
};
template <int width>
__device__ __forceinline__ ConvThread conv_thread(const ConvShape& shape) {
    ConvThread t;
    const int channel_block = blockIdx.x % shape.channel_blocks;
    t.part = blockIdx.x / shape.channel_blocks;  // b * segment_blocks + block of segments
    t.b = t.part / shape.segment_blocks;
    t.d = (channel_block * kWarp + threadIdx.x) * width;
    const int64_t begin = (int64_t(t.part % shape.segment_blocks) * kConvSegments + threadIdx.y) * shape.segment_steps;
    t.active = t.d < shape.D && begin < shape.T;
    t.begin = t.active ? int(begin) : 0;
    t.end = t.active ? int(min(begin + shape.segment_steps, int64_t(shape.T))) : 0;
    return t;
}
// Inputs before the first come from the state, which holds the last W - 1 of them.
template <int width>
__device__ __forceinline__ Reals<width> conv_input(const ConvShape& shape, const ConvThread& thread, const floatX* in, const real* state,
                                                   int t) {
    if (t >= 0) return load<width>(in + (thread.b * shape.T + t) * shape.ld_in + thread.d);
    if (state && t >= 1 - shape.W) return load<width>(state + (thread.b * (shape.W - 1) + shape.W - 1 + t) * shape.D + thread.d);
    return {};
}
template <int width, int taps>
struct ConvWindow {
    Reals<width> w[taps], x[taps];
    __device__ __forceinline__ void start(const ConvShape& shape, const ConvThread& thread, const floatX* in, const real* weight,
                                          const real* state) {
        UNROLL for (int k = 0; k < taps; k++) {
            UNROLL for (int j = 0; j < width; j++) w[k].v[j] = k < shape.W ? weight[int64_t(thread.d + j) * shape.W + shape.W - 1 - k] : 0;
            x[k] = k > 0 && k > taps - shape.W ? conv_input<width>(shape, thread, in, state, thread.begin - taps + k) : Reals<width>{};
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
__global__ void conv_forward_kernel(floatX* out, real* final_state, const floatX* in, const real* weight, const real* bias,
                                    const real* initial_state, ConvShape shape) {
    const ConvThread thread = conv_thread<width>(shape);
    if (!thread.active) return;
    const int D = shape.D, W = shape.W;
    ConvWindow<width, taps> window;
    window.start(shape, thread, in, weight, initial_state);
    const auto b = load<width>(bias + thread.d);
    for (int first = thread.begin; first < thread.end; first += kConvBatch) {
        Reals<width> x[kConvBatch];
        UNROLL for (int i = 0; i < kConvBatch; i++)
            if (first + i < thread.end) x[i] = conv_input<width>(shape, thread, in, initial_state, first + i);
        UNROLL for (int i = 0; i < kConvBatch; i++) {
            const int t = first + i;
            if (t >= thread.end) break;
            window.push(x[i]);
            Reals<width> y;
            UNROLL for (int j = 0; j < width; j++) {
                const real a = window.sum(W, j, b.v[j]);
                y.v[j] = a * sigmoid(a);
            }
            store(out + (thread.b * shape.T + t) * D + thread.d, y);
        }
    }
    if (final_state && thread.end == shape.T)
        UNROLL for (int i = 0; i < taps; i++)
            if (i > taps - W) store(final_state + (thread.b * (W - 1) + i - (taps - W + 1)) * D + thread.d, window.x[i]);
}
template <class F>
void with_conv_width(int W, std::initializer_list<int64_t> sizes, std::initializer_list<const void*> addresses, F&& f) {
    if (W < 1 || W > kMaxConv) fail("the convolution's width is %d: 1 to %d are supported", W, kMaxConv);
    with_width<kConvWidth>(sizes, addresses, [&](auto width) {
        if constexpr (width > 1)
            if (W <= kConvTaps) return f(width, std::integral_constant<int, kConvTaps>());
        f(std::integral_constant<int, 1>(), std::integral_constant<int, kMaxConv>());
    });
}
void conv_forward(floatX* out, real* final_state, const Conv& c, cudaStream_t stream) {
    if (c.B == 0 || c.T == 0) return;
    with_conv_width(c.W, {c.D, c.ld_in}, {out, final_state, c.in, c.bias, c.initial_state}, [&](auto width, auto taps) {
        const ConvShape shape = conv_shape<width>(c);
        LAUNCH((conv_forward_kernel<width, taps>), blocks_for(int64_t(c.B) * shape.segment_blocks * shape.channel_blocks, 1),
               dim3(kWarp, kConvSegments), 0, stream)(out, final_state, c.in, c.weight, c.bias, c.initial_state, shape);
    });
    CHECK_LAUNCH();
}

// Forward in time as well: at step t the window gives a[t] and so its gradient d_a[t], and the last `taps` of those give
// d_in[t - (taps - 1)] = sum_k w[k] d_a[t - (taps - 1) + k]. A segment runs on past its end until its own inputs are done, without
// adding to the weights there. Before the first input lies the initial state, behind the last the final state's gradient.
// weight_parts (B segment_blocks, D, W), bias_parts (B segment_blocks, D)
template <int width, int taps>
__global__ void conv_backward_kernel(floatX* d_in, real* weight_parts, real* bias_parts, real* d_initial_state,
                                     const floatX* d_out, const real* d_final_state, const floatX* in, const real* weight, const real* bias,
                                     const real* initial_state, ConvShape shape) {
    SHARED(real[kConvSegments][kWarp * width], sums);
    const ConvThread thread = conv_thread<width>(shape);
    const int T = shape.T, D = shape.D, W = shape.W;
    Reals<width> d_w[taps] = {}, d_b = {};
    if (thread.active) {
        ConvWindow<width, taps> window;
        window.start(shape, thread, in, weight, initial_state);
        const auto b = load<width>(bias + thread.d);
        Reals<width> d_a[taps] = {};
        const int known = min(thread.end + W - 1, T);  // steps from here on add nothing
        for (int first = thread.begin; first < thread.end + taps - 1; first += kConvBatch) {
            Reals<width> x[kConvBatch] = {}, d[kConvBatch] = {};
            UNROLL for (int i = 0; i < kConvBatch; i++)
                if (first + i < known) {
                    x[i] = conv_input<width>(shape, thread, in, initial_state, first + i);
                    d[i] = load<width>(d_out + (thread.b * T + first + i) * D + thread.d);
                }
            UNROLL for (int i = 0; i < kConvBatch; i++) {
                const int t = first + i, s = t - (taps - 1);
                if (t >= thread.end + taps - 1) break;
                window.push(x[i]);
                UNROLL for (int k = 1; k < taps; k++) d_a[k - 1] = d_a[k];
                UNROLL for (int j = 0; j < width; j++) {
                    const real a = window.sum(W, j, b.v[j]), gate = sigmoid(a);
                    d_a[taps - 1].v[j] = t < known ? d[i].v[j] * gate * (1 + a * (1 - gate)) : 0;
                    if (t < thread.end) {
                        d_b.v[j] += d_a[taps - 1].v[j];
                        UNROLL for (int k = 0; k < taps; k++)
                            if (k < W) d_w[k].v[j] += d_a[taps - 1].v[j] * window.x[taps - 1 - k].v[j];
                    }
                }
                if (s < thread.begin && !(thread.begin == 0 && s >= 1 - W && d_initial_state)) continue;
                Reals<width> g = {};
                if (d_final_state && s > T - W) g = load<width>(d_final_state + (thread.b * (W - 1) + s - (T - W + 1)) * D + thread.d);
                UNROLL for (int k = 0; k < taps; k++)
                    if (k < W)
                        UNROLL for (int j = 0; j < width; j++) g.v[j] += window.w[k].v[j] * d_a[k].v[j];
                if (s >= 0) store(d_in + (thread.b * T + s) * shape.ld_in + thread.d, g);
                else store(d_initial_state + (thread.b * (W - 1) + s + W - 1) * D + thread.d, g);
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
size_t conv_scratch(int B, int T, int D, int W) {  // for the shortest segments that there are
    return ConvScratch(nullptr, B * ceil_div(T, kLeastConvSteps * kConvSegments), D, W).used;
}
void conv_backward(const ConvGradients& d, const floatX* d_out, const real* d_final_state, const Conv& c, void* scratch,
                   cudaStream_t stream) {
    if (c.B == 0 || c.T == 0) return;
    const std::initializer_list<const void*> addresses = {d.d_in, d.d_initial_state, d_out, d_final_state, c.in, c.bias, c.initial_state};
    with_conv_width(c.W, {c.D, c.ld_in}, addresses, [&](auto width, auto taps) {
        const ConvShape shape = conv_shape<width>(c);
        const int parts = c.B * shape.segment_blocks;
        const ConvScratch s(scratch, parts, c.D, c.W);
        LAUNCH((conv_backward_kernel<width, taps>), blocks_for(int64_t(parts) * shape.channel_blocks, 1), dim3(kWarp, kConvSegments), 0,
               stream)
        (d.d_in, s.weight_parts, s.bias_parts, d.d_initial_state, d_out, d_final_state, c.in, c.weight, c.bias, c.initial_state, shape);
        reduce_partials(parts, {{d.d_weight, s.weight_parts, int64_t(c.D) * c.W}, {d.d_bias, s.bias_parts, c.D}}, stream);
    });
}

// ------------------------------------------------------------------------------------------------------------------
// Selective scan
//
// Mapping. A thread holds 4 of a channel's states, a group of `lanes` threads a channel (4 lanes for N <= 16; four instances serve any
// N <= 128, states past N are zero). The group lies in one warp with channels in the low bits of the lane number: the warp's threads
// then read the same few B_t and C_t, and neighbouring channels of everything else. A block has 1024 / sizeof(floatX) threads: for
// N <= 16 its rows of channels are 256 bytes long. B_t and C_t are loaded once per block for all its channels.
//
// Time passes in tiles. Tiles come to shared memory by 16-byte loads, every element once, with the softplus done on the way; the
// recurrence reads shared memory; what it gives overwrites what it no longer needs, and leaves by 16-byte stores. Time steps past T
// have delta = 0, and a step with delta = 0 leaves every state as it is.
//
// The sums over a channel's lanes are done four steps at a time, which leaves each of four lanes with one step's sum (sum_lanes): 3
// shuffles instead of 8, and the gates of the four steps are then computed by four lanes, not four times.
//
// Parallel over time. Where batch and channels do not fill the chip, time is cut into segments of whole chunks. A first pass finds what
// each segment but the last makes of a zero state, a scan over segments turns that into the state that enters each one, and the final pass
// does the work. Its own input enters through the state, so that both passes are one kernel. Backward is the same, right to left.
//
// Backward. The forward pass leaves one state per kScanChunk = 64 steps. From it the chunk is run again, down a tree with branches of 4:
// keeping the states at the start of each 16 steps, then of each 4 steps, then of each step together with its exp(delta A). What is
// kept is 12 + 12 + 32 numbers, all in registers, and an exponential is computed 48/64 + 12/16 + 1 = 2.5 times. (Two levels, of 8 and 8
// steps, would do with 1.9, but keep 28 + 64, and 512 threads have 128 registers each. The arithmetic around it, 24 instructions for
// each state, takes longer than the exponentials either way.) dA and d delta use a_t h_{t-1} itself, never h_t - delta B u.
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
struct ScanInput : Scan {
    int chunks, channel_blocks, segments, segment_steps;
    bool vectors, state_vectors;  // whether rows of activations, and of states, may be accessed 16 bytes at a time
};
constexpr int kStates = 4;     // per thread
constexpr int kScanSteps = 4;  // that sum_lanes sums together
constexpr real kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <int lanes>
struct ScanBlock {
    static constexpr int threads = 1024 / sizeof(floatX), warps = threads / kWarp;
    static constexpr int channels = threads / lanes, warp_channels = kWarp / lanes;
    static constexpr int row_vectors = channels / kWidth;
    static constexpr int columns = 2 * kStates * lanes;  // of B_t and C_t, padded with zeros
    // Forward: a tile has at most one vector per thread and array, so that the next one can wait in registers.
    static constexpr int tile = std::min({32, threads / row_vectors, 128 / lanes});
    static constexpr int tile_columns = tile * columns / threads;  // elements of B_t and C_t per thread
    static constexpr size_t forward_bytes =
        tile * channels * (sizeof(real) + 2 * sizeof(floatX)) + (tile * columns + 2 * channels) * sizeof(real);
    // Blocks that share a multiprocessor's registers: as many as leave no thread with too few.
    static constexpr int forward_blocks = sizeof(real) == 8 ? 1 : sizeof(floatX) == 4 ? 3 : 2;
    static constexpr int chunk_tile = kScanChunk;  // backward
    static constexpr int sums = kScanSteps * columns;  // of d_B_t and d_C_t, by each warp
    static constexpr size_t backward_bytes =
        chunk_tile * channels * (sizeof(real) + 3 * sizeof(floatX)) + (chunk_tile * columns + 2 * channels + warps * sums) * sizeof(real);
    static_assert(tile % kScanSteps == 0 && kScanChunk % tile == 0 && tile * columns % threads == 0);
    static_assert(forward_bytes <= kMaxShared && backward_bytes <= kMaxShared);
};

// Hides where a value comes from: what follows from it is computed again each time, instead of waiting in registers while the
// recurrence needs them.
__device__ __forceinline__ unsigned opaque(unsigned x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Where a thread stands.
template <int lanes>
struct ScanThread {
    int segment, begin, end;  // of the block, and its steps
    int lane, n, channel;     // lane of the channel's group; its first state; channel in the block
    __device__ __forceinline__ explicit ScanThread(const ScanInput& in, int first_segment = 0) {
        using Block = ScanBlock<lanes>;
        segment = first_segment + blockIdx.z;
        begin = segment * in.segment_steps;
        end = min(begin + in.segment_steps, in.T);
        lane = lane_id() / Block::warp_channels;
        n = lane * kStates;
        channel = warp_id() * Block::warp_channels + lane_id() % Block::warp_channels;
    }
    __device__ __forceinline__ int64_t b() const { return opaque(blockIdx.x); }
    __device__ __forceinline__ int d() const { return opaque(blockIdx.y) * ScanBlock<lanes>::channels + channel; }
    // Rows of (B, D, N), (B, segments, D, N) and (B, chunks, D, N) tensors.
    __device__ __forceinline__ int64_t state_row(const ScanInput& in) const { return b() * in.D + d(); }
    __device__ __forceinline__ int64_t segment_row(const ScanInput& in) const { return (b() * in.segments + segment) * in.D + d(); }
    __device__ __forceinline__ int64_t chunk_row(const ScanInput& in, int chunk) const { return (b() * in.chunks + chunk) * in.D + d(); }
};

// Where vector i of the tile that starts at `first` lies: the tile has row_vectors of them in a row.
template <int lanes>
struct ScanPlace {
    int at, column;  // in the tile, in its row
    int d, channels;  // first channel; how many of its channels exist, 0 from `end` on
    int64_t row;          // of (B, T, ...) tensors
    __device__ __forceinline__ ScanPlace(const ScanInput& in, unsigned i, int first, int end) {
        using Block = ScanBlock<lanes>;
        const int step = i / Block::row_vectors;
        column = i % Block::row_vectors * kWidth;
        at = step * Block::channels + column;
        d = opaque(blockIdx.y) * Block::channels + column;
        channels = first + step < end ? max(0, min(in.D - d, kWidth)) : 0;
        row = int64_t(opaque(blockIdx.x)) * in.T + first + step;
    }
};

// Sixteen bytes of a row, of which `valid` elements exist; the others are zero. As words, since two bf16 share a register only then.
struct alignas(16) Words {
    unsigned v[4];
    __device__ __forceinline__ Vector vector() const {
        Vector x;
        memcpy(&x, v, sizeof x);
        return x;
    }
};
__device__ __forceinline__ Words load_part(const floatX* p, int valid, bool vectors) {
    Vector x;
    if (vectors && valid == kWidth) x = *reinterpret_cast<const Vector*>(p);
    else UNROLL for (int i = 0; i < kWidth; i++) x.v[i] = i < valid ? p[i] : floatX(real(0));
    Words words;
    memcpy(words.v, &x, sizeof x);
    return words;
}
__device__ __forceinline__ void store_part(floatX* p, const Vector& x, int valid, bool vectors) {
    if (vectors && valid == kWidth) *reinterpret_cast<Vector*>(p) = x;
    else UNROLL for (int i = 0; i < kWidth; i++)
        if (i < valid) p[i] = x.v[i];
}
// A thread's states of the row that starts at p, or zeros if p is null.
__device__ __forceinline__ Reals<kStates> load_states(const real* p, int n, int N, bool vectors) {
    Reals<kStates> x = {};
    if (p && vectors && n < N) x = load<kStates>(p + n);
    else if (p)
        UNROLL for (int j = 0; j < kStates; j++)
            if (n + j < N) x.v[j] = p[n + j];
    return x;
}
__device__ __forceinline__ void store_states(real* p, const Reals<kStates>& x, int n, int N, bool vectors) {
    if (vectors && n < N) store(p + n, x);
    else UNROLL for (int j = 0; j < kStates; j++)
        if (n + j < N) p[n + j] = x.v[j];
}
// log2(e) A, so that exp(delta A) is one power of two.
__device__ __forceinline__ Reals<kStates> load_decay(const real* A_log, int64_t row, int n, int N, bool valid) {
    Reals<kStates> x = {};
    UNROLL for (int j = 0; j < kStates; j++)
        if (valid && n + j < N) x.v[j] = -kLog2e * exp_(A_log[row * N + n + j]);
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
// Sums each of 4 values over a channel's lanes. Lane n gets the sum of value n % 4.
template <int lanes>
__device__ __forceinline__ real sum_lanes(const real (&x)[kScanSteps]) {
    constexpr int stride = ScanBlock<lanes>::warp_channels;  // lanes of a channel lie that far apart
    real sum = exchange(exchange(x[0], x[1], stride), exchange(x[2], x[3], stride), 2 * stride);
    UNROLL for (int bit = 4; bit < lanes; bit *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit * stride);
    return sum;
}

// local: from a zero state, for the state that the segment leaves behind (segment_states) and the sum of its deltas (delta_sums), both
// (B, segments, ...); not for the last segment, after which nothing comes. Else the final pass: the state enters from segment_states if
// there are segments, else from initial_state.
template <int lanes, bool local>
__global__ void __launch_bounds__(ScanBlock<lanes>::threads, local ? 1 : ScanBlock<lanes>::forward_blocks)
scan_forward_kernel(floatX* out, real* final_state, real* chunk_states, real* segment_states, real* delta_sums, ScanInput in) {
    using Block = ScanBlock<lanes>;
    DYNAMIC_SHARED(real, delta);                                    // (tile, channels)
    real* const bc = delta + Block::tile * Block::channels;         // (tile, 2, states)
    real* const bias = bc + Block::tile * Block::columns;           // (channels)
    real* const skip = bias + Block::channels;                      // (channels)
    floatX* const u = reinterpret_cast<floatX*>(skip + Block::channels);  // (tile, channels)
    floatX* const z = u + Block::tile * Block::channels;            // (tile, channels); then out
    const ScanThread<lanes> thread(in);
    const bool valid_channel = thread.d() < in.D;

    // The part of a tile that this thread brings in: a vector of one row, and some of the row's B_t and C_t.
    struct {
        Words u, dt, z;
        unsigned bc[Block::tile_columns * sizeof(floatX) / sizeof(unsigned)];  // words too
    } next;
    const auto brings = [] { return opaque(threadIdx.x) < Block::tile * Block::row_vectors; };
    const auto fetch = [&](int first) {
        const ScanPlace<lanes> p(in, opaque(threadIdx.x), first, brings() ? thread.end : 0);
        next.u = load_part(in.u + p.row * in.D + p.d, p.channels, in.vectors);
        next.dt = load_part(in.dt + p.row * in.D + p.d, p.channels, in.vectors);
        if (!local) next.z = load_part(in.z + p.row * in.ld_z + p.d, p.channels, in.vectors);
        floatX columns[Block::tile_columns];
        UNROLL for (int i = 0; i < Block::tile_columns; i++) {
            const unsigned k = opaque(threadIdx.x) + i * Block::threads;
            const int t = first + int(k / Block::columns), n = k % (Block::columns / 2);
            const bool is_c = k % Block::columns >= Block::columns / 2, wanted = t < thread.end && n < in.N && !(local && is_c);
            columns[i] = wanted ? (is_c ? in.C_t : in.B_t)[(thread.b() * in.T + t) * in.ld_bc + n] : floatX(real(0));
        }
        memcpy(next.bc, columns, sizeof columns);
    };
    const auto put = [&](int first) {
        const ScanPlace<lanes> p(in, opaque(threadIdx.x), first, thread.end);
        if (brings()) {
            const Vector dt = next.dt.vector();
            Reals<kWidth> x;
            UNROLL for (int i = 0; i < kWidth; i++) x.v[i] = i < p.channels ? softplus(real(dt.v[i]) + bias[p.column + i]) : 0;
            store(delta + p.at, x);
            *reinterpret_cast<Vector*>(u + p.at) = next.u.vector();
            if (!local) *reinterpret_cast<Vector*>(z + p.at) = next.z.vector();
        }
        floatX columns[Block::tile_columns];
        memcpy(columns, next.bc, sizeof columns);
        UNROLL for (int i = 0; i < Block::tile_columns; i++) bc[threadIdx.x + i * Block::threads] = real(columns[i]);
    };
    const auto store_out = [&](int first) {
        const ScanPlace<lanes> p(in, opaque(threadIdx.x), first, thread.end);
        if (brings()) store_part(out + p.row * in.D + p.d, *reinterpret_cast<const Vector*>(z + p.at), p.channels, in.vectors);
    };

    if (threadIdx.x < Block::channels) {
        const int d = blockIdx.y * Block::channels + threadIdx.x;
        bias[threadIdx.x] = d < in.D ? in.dt_bias[d] : 0;
        skip[threadIdx.x] = d < in.D ? in.skip[d] : 0;
    }
    fetch(thread.begin);
    const Reals<kStates> decay = load_decay(in.A_log, thread.d(), thread.n, in.N, valid_channel);
    Reals<kStates> h = {};
    if (!local && valid_channel) {
        const real* enters = in.segments > 1 ? segment_states + thread.segment_row(in) * in.N
                           : in.initial_state ? in.initial_state + thread.state_row(in) * in.N : nullptr;
        h = load_states(enters, thread.n, in.N, in.state_vectors);
    }
    real delta_sum = 0;
    __syncthreads();  // bias, skip
    put(thread.begin);
    __syncthreads();
    for (int first = thread.begin; first < thread.end; first += Block::tile) {
        if (!local && chunk_states && unsigned(first) % kScanChunk == 0 && valid_channel)
            store_states(chunk_states + thread.chunk_row(in, first / kScanChunk) * in.N, h, thread.n, in.N,
                         in.state_vectors);
        const bool more = first + Block::tile < thread.end;
        if (more) fetch(first + Block::tile);  // on its way while this tile is computed
        NO_UNROLL for (int sub = 0; sub < min(Block::tile, thread.end - first); sub += kScanSteps) {
            real y[kScanSteps] = {};
            UNROLL for (int s = 0; s < kScanSteps; s++) {
                const int at = (sub + s) * Block::channels + thread.channel;
                const real dt = delta[at], du = dt * real(u[at]);
                const auto b = load<kStates>(bc + (sub + s) * Block::columns + thread.n);
                UNROLL for (int j = 0; j < kStates; j++) h.v[j] = power_of_two(dt * decay.v[j]) * h.v[j] + du * b.v[j];
                if (local) delta_sum += dt;
                else {
                    const auto c = load<kStates>(bc + (sub + s) * Block::columns + Block::columns / 2 + thread.n);
                    UNROLL for (int j = 0; j < kStates; j++) y[s] += c.v[j] * h.v[j];
                }
            }
            if (local) continue;
            const real sum = sum_lanes<lanes>(y);
            if (thread.lane < kScanSteps) {
                const int at = (sub + thread.lane) * Block::channels + thread.channel;
                const real gate = real(z[at]);
                z[at] = floatX((sum + skip[thread.channel] * real(u[at])) * gate * sigmoid(gate));
            }
        }
        __syncthreads();
        if (!local) store_out(first);
        if (more) put(first + Block::tile);
        __syncthreads();
    }
    if (!valid_channel) return;
    if (local) {
        const int64_t at = thread.segment_row(in);
        store_states(segment_states + at * in.N, h, thread.n, in.N, in.state_vectors);
        if (thread.lane == 0) delta_sums[at] = delta_sum;
    } else if (final_state && thread.end == in.T) {
        store_states(final_state + thread.state_row(in) * in.N, h, thread.n, in.N, in.state_vectors);
    }
}

// The same for gradients, right to left: what a segment adds to the gradient of the state that enters it, if that of the state it
// leaves is zero. Not for the first segment, before which nothing comes.
template <int lanes>
__global__ void __launch_bounds__(ScanBlock<lanes>::threads, 1)
scan_backward_local_kernel(real* segment_grads, real* delta_sums, const floatX* d_out, ScanInput in) {
    using Block = ScanBlock<lanes>;
    SHARED(real[Block::tile * Block::channels], delta);
    SHARED(real[Block::tile * Block::channels], g);
    SHARED(real[Block::tile * Block::columns / 2], c);
    const ScanThread<lanes> thread(in, 1);
    const bool valid_channel = thread.d() < in.D;
    const Reals<kStates> decay = load_decay(in.A_log, thread.d(), thread.n, in.N, valid_channel);
    Reals<kStates> dh = {};  // of the state before the step
    real delta_sum = 0;
    for (int first = thread.begin + int(ceil_div(thread.end - thread.begin, Block::tile) - 1) * Block::tile; first >= thread.begin;
         first -= Block::tile) {
        if (threadIdx.x < Block::tile * Block::row_vectors) {
            const ScanPlace<lanes> p(in, threadIdx.x, first, thread.end);
            const Vector dt = load_part(in.dt + p.row * in.D + p.d, p.channels, in.vectors).vector();
            const Vector d = load_part(d_out + p.row * in.D + p.d, p.channels, in.vectors).vector();
            const Vector z = load_part(in.z + p.row * in.ld_z + p.d, p.channels, in.vectors).vector();
            Reals<kWidth> delta_part = {}, g_part = {};
            UNROLL for (int i = 0; i < kWidth; i++)
                if (i < p.channels) {
                    delta_part.v[i] = softplus(real(dt.v[i]) + in.dt_bias[p.d + i]);
                    g_part.v[i] = real(d.v[i]) * real(z.v[i]) * sigmoid(real(z.v[i]));
                }
            store(delta + p.at, delta_part);
            store(g + p.at, g_part);
        }
        for (unsigned k = threadIdx.x; k < Block::tile * Block::columns / 2; k += Block::threads) {
            const int t = first + int(k / (Block::columns / 2)), n = k % (Block::columns / 2);
            c[k] = t < thread.end && n < in.N ? real(in.C_t[(thread.b() * in.T + t) * in.ld_bc + n]) : 0;
        }
        __syncthreads();
        UNROLL for (int s = Block::tile - 1; s >= 0; s--) {
            const real dt = delta[s * Block::channels + thread.channel], gs = g[s * Block::channels + thread.channel];
            const auto cs = load<kStates>(c + s * (Block::columns / 2) + thread.n);
            UNROLL for (int j = 0; j < kStates; j++) dh.v[j] = power_of_two(dt * decay.v[j]) * (dh.v[j] + gs * cs.v[j]);
            delta_sum += dt;
        }
        __syncthreads();
    }
    if (!valid_channel) return;
    const int64_t at = thread.segment_row(in);
    store_states(segment_grads + at * in.N, dh, thread.n, in.N, in.state_vectors);
    if (thread.lane == 0) delta_sums[at] = delta_sum;
}

// Turns what each segment makes of zero (states) into what enters it, from the first segment on, or from the last if reverse:
//   next = exp(A sum of delta) enters + states.     entry (B, D, N): what enters the first one, or null (zeros)
__global__ void scan_carry_kernel(real* states, const real* delta_sums, const real* A_log, const real* entry, int64_t count, int64_t DN,
                                  int N, int segments, bool reverse) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= count) return;
    const int64_t b = i / DN, dn = i % DN;
    const real A = -exp_(A_log[dn]);
    real enters = entry ? entry[i] : 0;
    for (int k = 0; k < segments; k++) {
        const int64_t at = (b * segments + (reverse ? segments - 1 - k : k)) * DN + dn;
        const real leaves = k + 1 < segments ? exp_(A * delta_sums[at / N]) * enters + states[at] : 0;
        states[at] = enters;
        enters = leaves;
    }
}

// One step, as in decoding: the states are read and written once, and nothing else counts. `lanes` neighbours share a channel.
constexpr int kStepThreads = 128;
__global__ void scan_step_kernel(floatX* out, real* final_state, real* chunk_states, ScanInput in, int64_t channels, int lanes) {
    const int64_t group = (int64_t(blockIdx.x) * kStepThreads + threadIdx.x) / lanes;
    const bool valid = group < channels;
    const int64_t i = valid ? group : 0, b = i / in.D, d = i % in.D;
    const int lane = threadIdx.x % lanes, n = lane * kStates;
    const real dt = softplus(real(in.dt[i]) + in.dt_bias[d]), du = dt * real(in.u[i]);
    const Reals<kStates> decay = load_decay(in.A_log, d, n, in.N, true);
    Reals<kStates> h = load_states(in.initial_state ? in.initial_state + i * in.N : nullptr, n, in.N, in.state_vectors);
    if (chunk_states && valid) store_states(chunk_states + i * in.N, h, n, in.N, in.state_vectors);
    real y = 0;
    UNROLL for (int j = 0; j < kStates; j++)
        if (n + j < in.N) {
            h.v[j] = power_of_two(dt * decay.v[j]) * h.v[j] + du * real(in.B_t[b * in.ld_bc + n + j]);
            y += real(in.C_t[b * in.ld_bc + n + j]) * h.v[j];
        }
    for (int mask = lanes / 2; mask > 0; mask /= 2) y += __shfl_xor_sync(kAllLanes, y, mask);
    if (!valid) return;
    if (final_state) store_states(final_state + i * in.N, h, n, in.N, in.state_vectors);
    if (lane == 0) {
        const real z = real(in.z[b * in.ld_z + d]);
        out[i] = floatX((y + in.skip[d] * real(in.u[i])) * z * sigmoid(z));
    }
}

// Calls f with the number of lanes for N states.
template <class F>
void with_lanes(int N, F&& f) {
    if (N < 1 || N > kMaxStates) fail("the scan has %d states per channel: 1 to %d are supported", N, kMaxStates);
    if (N <= 16) f(std::integral_constant<int, 4>());
    else if (N <= 32) f(std::integral_constant<int, 8>());
    else f(std::integral_constant<int, 16>());
}
template <class Kernel>
void allow_shared(Kernel* kernel, size_t bytes) {
    if (bytes > (48 << 10)) CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}
// Blocks of a kernel that run at once.
template <class Kernel>
int wave(Kernel* kernel, int threads, size_t shared_bytes) {
    int blocks = 0;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
    return std::max(1, blocks) * multiprocessors();
}
template <int lanes>
int forward_wave() {
    using Block = ScanBlock<lanes>;
    allow_shared(scan_forward_kernel<lanes, false>, Block::forward_bytes);
    return wave(scan_forward_kernel<lanes, false>, Block::threads, Block::forward_bytes);
}
// The scan of s with `blocks` at once: as many segments as one wave holds, or one if that is less than two, since segments cost a first
// pass. activations, states: addresses of what else is read and written.
ScanInput scan_input(const Scan& s, int channels, int blocks, std::initializer_list<const void*> activations,
                     std::initializer_list<const void*> states) {
    ScanInput in = {};
    static_cast<Scan&>(in) = s;
    in.vectors = s.D % kWidth == 0 && s.ld_z % kWidth == 0 && aligned(s.u) && aligned(s.dt) && aligned(s.z) &&
                 std::all_of(activations.begin(), activations.end(), aligned);
    in.state_vectors = s.N % kStates == 0 && aligned(s.initial_state) && std::all_of(states.begin(), states.end(), aligned);
    in.channel_blocks = int(ceil_div(s.D, channels));
    in.chunks = int(scan_chunks(s.T));
    const int wanted = int(std::clamp<int64_t>(blocks / (int64_t(s.B) * in.channel_blocks), 1, in.chunks));
    const int segment_chunks = int(ceil_div(in.chunks, wanted));
    in.segments = int(ceil_div(in.chunks, segment_chunks));
    in.segment_steps = segment_chunks * kScanChunk;
    return in;
}
void scan_carry(real* states, const real* delta_sums, const real* entry, const ScanInput& in, bool reverse, cudaStream_t stream) {
    const int64_t DN = int64_t(in.D) * in.N, count = in.B * DN;
    LAUNCH(scan_carry_kernel, blocks_for(count, kThreads), kThreads, 0, stream)
    (states, delta_sums, in.A_log, entry, count, DN, in.N, in.segments, reverse);
    CHECK_LAUNCH();
}

// `units`: sequences x segments
struct ScanScratch : Scratch {
    real *segment_states, *delta_sums;
    ScanScratch(void* memory, int64_t units, int D, int N) : Scratch(memory) {
        segment_states = take<real>(units * D * N);
        delta_sums = take<real>(units * D);
    }
};
void scan_forward(floatX* out, real* final_state, real* chunk_states, const Scan& scan, void* scratch, cudaStream_t stream) {
    if (scan.B == 0 || scan.T == 0) return;
    with_lanes(scan.N, [&](auto lanes) {
        using Block = ScanBlock<lanes>;
        const ScanInput in = scan_input(scan, Block::channels, forward_wave<lanes>(), {out}, {final_state, chunk_states});
        if (in.T == 1) {
            int step_lanes = 1;
            while (step_lanes * kStates < in.N) step_lanes *= 2;
            const int64_t channels = int64_t(in.B) * in.D;
            LAUNCH(scan_step_kernel, blocks_for(channels * step_lanes, kStepThreads), kStepThreads, 0, stream)
            (out, final_state, chunk_states, in, channels, step_lanes);
            return;
        }
        const ScanScratch s(scratch, int64_t(in.B) * in.segments, in.D, in.N);
        const dim3 blocks(in.B, in.channel_blocks, in.segments);
        if (in.segments > 1) {
            const dim3 others(in.B, in.channel_blocks, in.segments - 1);
            allow_shared(scan_forward_kernel<lanes, true>, Block::forward_bytes);
            LAUNCH((scan_forward_kernel<lanes, true>), others, Block::threads, Block::forward_bytes, stream)
            (nullptr, nullptr, nullptr, s.segment_states, s.delta_sums, in);
            scan_carry(s.segment_states, s.delta_sums, in.initial_state, in, false, stream);
        }
        LAUNCH((scan_forward_kernel<lanes, false>), blocks, Block::threads, Block::forward_bytes, stream)
        (out, final_state, chunk_states, s.segment_states, nullptr, in);
    });
    CHECK_LAUNCH();
}

// The last few states in registers: a stack whose indices are constants, since registers have no addresses.
template <int depth>
struct StateStack {
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

// bc_parts (channel_blocks, B, T, 2N); A_parts (B, segments, D, N); skip_parts, bias_parts (B, segments, D).
// segment_grads: the gradient of the state that each segment leaves, or null if there is one segment, which takes d_final_state.
template <int lanes>
__global__ void __launch_bounds__(ScanBlock<lanes>::threads, 1)
scan_backward_kernel(floatX* d_u, floatX* d_dt, floatX* d_z, real* bc_parts, real* A_parts, real* skip_parts, real* bias_parts,
                     real* d_initial_state, const floatX* d_out, const real* d_final_state, const real* segment_grads, ScanInput in,
                     const real* chunk_states) {
    using Block = ScanBlock<lanes>;
    constexpr int kGroup = kScanSteps * kScanSteps;
    DYNAMIC_SHARED(real, delta);                                         // (tile, channels); then d_dt
    real* const bc = delta + Block::chunk_tile * Block::channels;        // (tile, 2, states)
    real* const bias = bc + Block::chunk_tile * Block::columns;          // (channels)
    real* const skip = bias + Block::channels;                           // (channels)
    real* const bc_sums = skip + Block::channels;                        // (warps, steps, 2, states)
    floatX* const u = reinterpret_cast<floatX*>(bc_sums + Block::warps * Block::sums);  // (tile, channels); then d_u
    floatX* const z = u + Block::chunk_tile * Block::channels;           // (tile, channels); then d_z
    floatX* const dy = z + Block::chunk_tile * Block::channels;          // (tile, channels): d_out
    const ScanThread<lanes> thread(in);
    const bool valid_channel = thread.d() < in.D;
    const int own = thread.lane % kScanSteps;            // the step whose sums this lane gets
    const bool owner = thread.lane < kScanSteps;

    const auto load_tile = [&](int first) {
        NO_UNROLL for (unsigned i = opaque(threadIdx.x); i < Block::chunk_tile * Block::row_vectors; i += Block::threads) {
            const ScanPlace<lanes> p(in, i, first, thread.end);
            const Vector dt = load_part(in.dt + p.row * in.D + p.d, p.channels, in.vectors).vector();
            *reinterpret_cast<Vector*>(u + p.at) = load_part(in.u + p.row * in.D + p.d, p.channels, in.vectors).vector();
            *reinterpret_cast<Vector*>(z + p.at) = load_part(in.z + p.row * in.ld_z + p.d, p.channels, in.vectors).vector();
            *reinterpret_cast<Vector*>(dy + p.at) = load_part(d_out + p.row * in.D + p.d, p.channels, in.vectors).vector();
            Reals<kWidth> x;
            UNROLL for (int j = 0; j < kWidth; j++) x.v[j] = j < p.channels ? softplus(real(dt.v[j]) + bias[p.column + j]) : 0;
            store(delta + p.at, x);
        }
        for (unsigned k = opaque(threadIdx.x); k < Block::chunk_tile * Block::columns; k += Block::threads) {
            const int t = first + int(k / Block::columns), n = k % (Block::columns / 2);
            const floatX* from = k % Block::columns < Block::columns / 2 ? in.B_t : in.C_t;
            bc[k] = t < thread.end && n < in.N ? real(from[(thread.b() * in.T + t) * in.ld_bc + n]) : 0;
        }
    };
    const auto store_tile = [&](int first) {
        NO_UNROLL for (unsigned i = opaque(threadIdx.x); i < Block::chunk_tile * Block::row_vectors; i += Block::threads) {
            const ScanPlace<lanes> p(in, i, first, thread.end);
            const auto x = load<kWidth>(delta + p.at);
            Vector narrow;
            UNROLL for (int j = 0; j < kWidth; j++) narrow.v[j] = floatX(x.v[j]);
            store_part(d_dt + p.row * in.D + p.d, narrow, p.channels, in.vectors);
            store_part(d_u + p.row * in.D + p.d, *reinterpret_cast<const Vector*>(u + p.at), p.channels, in.vectors);
            store_part(d_z + p.row * in.ld_z + p.d, *reinterpret_cast<const Vector*>(z + p.at), p.channels, in.vectors);
        }
    };

    if (threadIdx.x < Block::channels) {
        const int d = blockIdx.y * Block::channels + threadIdx.x;
        bias[threadIdx.x] = d < in.D ? in.dt_bias[d] : 0;
        skip[threadIdx.x] = d < in.D ? in.skip[d] : 0;
    }
    __syncthreads();
    const Reals<kStates> decay = load_decay(in.A_log, thread.d(), thread.n, in.N, valid_channel);
    Reals<kStates> dh = {}, dA = {};  // gradient of the state after the step, but for what the step's own output adds; of A
    if (valid_channel) {
        const real* arrives = in.segments > 1 ? segment_grads + thread.segment_row(in) * in.N
                            : d_final_state   ? d_final_state + thread.state_row(in) * in.N : nullptr;
        dh = load_states(arrives, thread.n, in.N, in.state_vectors);
    }
    real d_skip = 0, d_bias = 0;

    const auto advance = [&](Reals<kStates>& h, int first) {  // by four steps
        UNROLL for (int s = 0; s < kScanSteps; s++) {
            const int at = (first + s) * Block::channels + thread.channel;
            const real dt = delta[at], du = dt * real(u[at]);
            const auto b = load<kStates>(bc + (first + s) * Block::columns + thread.n);
            UNROLL for (int j = 0; j < kStates; j++) h.v[j] = power_of_two(dt * decay.v[j]) * h.v[j] + du * b.v[j];
        }
    };

    for (int tile = (thread.end - 1) / Block::chunk_tile * Block::chunk_tile; tile >= thread.begin; tile -= Block::chunk_tile) {
        const int chunk = tile / kScanChunk;
        Reals<kStates> h = load_states(valid_channel ? chunk_states + thread.chunk_row(in, chunk) * in.N : nullptr, thread.n, in.N,
                                       in.state_vectors);
        load_tile(tile);
        __syncthreads();
        StateStack<kScanSteps - 1> group_starts;
        NO_UNROLL for (int group = 0; group < Block::chunk_tile - kGroup; group += kGroup) {
            group_starts.push(h);
            NO_UNROLL for (int s = 0; s < kGroup; s += kScanSteps) advance(h, group + s);
        }
        NO_UNROLL for (int group = Block::chunk_tile - kGroup; group >= 0; group -= kGroup) {
            StateStack<kScanSteps - 1> starts;
            NO_UNROLL for (int s = 0; s < kGroup - kScanSteps; s += kScanSteps) {
                starts.push(h);
                advance(h, group + s);
            }
            NO_UNROLL for (int first = group + kGroup - kScanSteps; first >= group; first -= kScanSteps) {
                const int own_at = (first + own) * Block::channels + thread.channel;
                // Forward through the four steps, keeping the state before each one and its decay.
                Reals<kStates> before[kScanSteps + 1], a[kScanSteps];
                real y[kScanSteps] = {};
                before[0] = h;
                UNROLL for (int s = 0; s < kScanSteps; s++) {
                    const int at = (first + s) * Block::channels + thread.channel;
                    const real dt = delta[at], du = dt * real(u[at]);
                    const auto b = load<kStates>(bc + (first + s) * Block::columns + thread.n);
                    const auto c = load<kStates>(bc + (first + s) * Block::columns + Block::columns / 2 + thread.n);
                    UNROLL for (int j = 0; j < kStates; j++) {
                        a[s].v[j] = power_of_two(dt * decay.v[j]);
                        before[s + 1].v[j] = a[s].v[j] * before[s].v[j] + du * b.v[j];
                        y[s] += c.v[j] * before[s + 1].v[j];
                    }
                }
                // out = (y + skip u) silu(z): each of four lanes does its own step, and tells the others g = d (y + skip u).
                const real y_own = sum_lanes<lanes>(y);
                const real dt_own = delta[own_at], u_own = real(u[own_at]);
                real g_own = 0;
                if (owner) {
                    const real z_own = real(z[own_at]), d_own = real(dy[own_at]), gate = sigmoid(z_own);
                    g_own = d_own * z_own * gate;
                    z[own_at] = floatX(d_own * (y_own + skip[thread.channel] * u_own) * gate * (1 + z_own * (1 - gate)));
                    d_skip += g_own * u_own;
                }
                // Backward through them.
                real dh_b[kScanSteps], dh_ah[kScanSteps];  // sums over states: dh B; dh a h A log2(e)
                __syncthreads();                           // bc_sums of the steps done before have been read
                UNROLL for (int s = kScanSteps - 1; s >= 0; s--) {
                    const int at = (first + s) * Block::channels + thread.channel;
                    const real dt = delta[at], du = dt * real(u[at]);
                    const real g = __shfl_sync(kAllLanes, g_own, s * Block::warp_channels + lane_id() % Block::warp_channels);
                    const auto b = load<kStates>(bc + (first + s) * Block::columns + thread.n);
                    const auto c = load<kStates>(bc + (first + s) * Block::columns + Block::columns / 2 + thread.n);
                    // d_B_t and d_C_t of 4 states, summed over the warp's channels: a channel's lane ends up with lanes / 4 of the 8.
                    real d_bc[kStates];
                    dh_b[s] = dh_ah[s] = 0;
                    UNROLL for (int j = 0; j < kStates; j++) {
                        dh.v[j] += g * c.v[j];
                        const real dh_a = dh.v[j] * a[s].v[j], decayed = dh_a * before[s].v[j];
                        dh_b[s] += dh.v[j] * b.v[j];
                        dh_ah[s] += decayed * decay.v[j];
                        dA.v[j] += decayed * dt;
                        const real d_b = dh.v[j] * du, d_c = g * before[s + 1].v[j];
                        d_bc[j] = exchange(d_b, d_c, Block::warp_channels / 2);
                        dh.v[j] = dh_a;
                    }
                    UNROLL for (int bit = Block::warp_channels / 4, half = kStates / 2; bit > 0; bit /= 2, half /= 2)
                        UNROLL for (int i = 0; i < half; i++) d_bc[i] = exchange(d_bc[i], d_bc[i + half], bit);
                    UNROLL for (int i = 0; i < lanes / 4; i++) {
                        const int k = lane_id() % Block::warp_channels * (lanes / 4) + i;  // 0..3: d_B_t, 4..7: d_C_t of the 4 states
                        const int column = k < kStates ? thread.n + k : Block::columns / 2 + thread.n + k - kStates;
                        bc_sums[warp_id() * Block::sums + s * Block::columns + column] = d_bc[i];
                    }
                }
                const real dh_b_own = sum_lanes<lanes>(dh_b), dh_ah_own = sum_lanes<lanes>(dh_ah);
                __syncwarp();  // all lanes have read delta and u
                if (owner) {
                    // The derivative of softplus at raw is sigmoid(raw) = 1 - exp(-softplus(raw)).
                    const real slope = dt_own > 20 ? 1 : -expm1_(-dt_own);
                    const real d_dt_own = (u_own * dh_b_own + kLn2 * dh_ah_own) * slope;
                    u[own_at] = floatX(dt_own * dh_b_own + skip[thread.channel] * g_own);
                    delta[own_at] = d_dt_own;
                    d_bias += d_dt_own;
                }
                __syncthreads();  // bc_sums
                for (unsigned k = opaque(threadIdx.x); k < Block::sums; k += Block::threads) {
                    real sum = 0;
                    UNROLL for (int w = 0; w < Block::warps; w++) sum += bc_sums[w * Block::sums + k];
                    const int t = tile + first + int(k / Block::columns), half = k / (Block::columns / 2) % 2, n = k % (Block::columns / 2);
                    if (t < thread.end && n < in.N)
                        bc_parts[((int64_t(opaque(blockIdx.y)) * in.B + thread.b()) * in.T + t) * 2 * in.N + half * in.N + n] = sum;
                }
                h = starts.pop();
            }
            h = group_starts.pop();
        }
        store_tile(tile);  // complete since the barrier of the last bc_sums
    }
    UNROLL for (int bit = 1; bit < kScanSteps; bit *= 2) {
        d_skip += __shfl_xor_sync(kAllLanes, d_skip, bit * Block::warp_channels);
        d_bias += __shfl_xor_sync(kAllLanes, d_bias, bit * Block::warp_channels);
    }
    if (!valid_channel) return;
    if (d_initial_state && blockIdx.z == 0)
        store_states(d_initial_state + thread.state_row(in) * in.N, dh, thread.n, in.N, in.state_vectors);
    UNROLL for (int j = 0; j < kStates; j++) dA.v[j] *= decay.v[j] * kLn2;  // A is its own derivative by A_log
    const int64_t at = thread.segment_row(in);
    store_states(A_parts + at * in.N, dA, thread.n, in.N, in.state_vectors);
    if (thread.lane > 0) return;
    skip_parts[at] = d_skip;
    bias_parts[at] = d_bias;
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
struct ScanBackwardScratch : ScanScratch {
    real *bc_parts, *A_parts, *skip_parts, *bias_parts;
    ScanBackwardScratch(void* memory, int64_t units, int channel_blocks, int64_t rows, int D, int N) : ScanScratch(memory, units, D, N) {
        bc_parts = take<real>(channel_blocks * rows * 2 * N);
        A_parts = take<real>(units * D * N);
        skip_parts = take<real>(units * D);
        bias_parts = take<real>(units * D);
    }
};
template <int lanes>
int backward_wave() {
    using Block = ScanBlock<lanes>;
    allow_shared(scan_backward_kernel<lanes>, Block::backward_bytes);
    return wave(scan_backward_kernel<lanes>, Block::threads, Block::backward_bytes);
}
// However B and T are cut: units are no more than a wave of blocks, or one for each sequence.
size_t scan_scratch(int B, int T, int D, int N) {
    size_t bytes = 0;
    with_lanes(N, [&](auto lanes) {
        const int64_t channel_blocks = ceil_div(D, ScanBlock<lanes>::channels);
        const int64_t most = std::max(forward_wave<lanes>(), backward_wave<lanes>()) / channel_blocks;
        const int64_t units = std::max<int64_t>(B, std::min(most, B * scan_chunks(T)));
        bytes = ScanBackwardScratch(nullptr, units, int(channel_blocks), int64_t(B) * T, D, N).used;
    });
    return bytes;
}
void scan_backward(const ScanGradients& d, const floatX* d_out, const real* d_final_state, const Scan& scan, const real* chunk_states,
                   void* scratch, cudaStream_t stream) {
    if (scan.B == 0 || scan.T == 0) return;
    const int64_t rows = int64_t(scan.B) * scan.T, D = scan.D, N = scan.N;
    with_lanes(scan.N, [&](auto lanes) {
        using Block = ScanBlock<lanes>;
        const ScanInput in = scan_input(scan, Block::channels, backward_wave<lanes>(), {d.d_u, d.d_dt, d.d_z, d_out},
                                        {d.d_initial_state, d_final_state, chunk_states});
        const int units = in.B * in.segments;
        const ScanBackwardScratch s(scratch, units, in.channel_blocks, rows, in.D, in.N);
        const dim3 blocks(in.B, in.channel_blocks, in.segments);
        if (in.segments > 1) {
            const dim3 others(in.B, in.channel_blocks, in.segments - 1);
            LAUNCH(scan_backward_local_kernel<lanes>, others, Block::threads, 0, stream)(s.segment_states, s.delta_sums, d_out, in);
            scan_carry(s.segment_states, s.delta_sums, d_final_state, in, true, stream);
        }
        LAUNCH(scan_backward_kernel<lanes>, blocks, Block::threads, Block::backward_bytes, stream)
        (d.d_u, d.d_dt, d.d_z, s.bc_parts, s.A_parts, s.skip_parts, s.bias_parts, d.d_initial_state, d_out, d_final_state,
         s.segment_states, in, chunk_states);
        LAUNCH(scan_backward_bc_kernel, blocks_for(rows * 2 * N, kThreads), kThreads, 0, stream)
        (d.d_B_t, d.d_C_t, in.ld_bc, s.bc_parts, in.channel_blocks, rows, in.N);
        reduce_partials(units, {{d.d_A_log, s.A_parts, D * N}, {d.d_skip, s.skip_parts, D}, {d.d_dt_bias, s.bias_parts, D}}, stream);
    });
}

// ------------------------------------------------------------------------------------------------------------------
// Router: a warp per row; lane l holds the values of experts l, l + 32, ...
constexpr int kRouterWarps = 4, kLaneExperts = kMaxExperts / kWarp;
static_assert(kMaxExperts <= kBuckets);
void check_experts(int E, int K) {
    if (E < 1 || E > kMaxExperts) fail("%d experts: this build supports 1 to %d", E, kMaxExperts);
    if (K < 1 || K > E) fail("%d experts per token out of %d", K, E);
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
    real lr, beta1, beta2, eps, weight_decay, grad_scale, m_scale, v_scale;  // the scales correct for moments that started at zero
};
template <int width>
__global__ void adamw_kernel(real* master, floatX* weight, real* m, real* v, const real* grad, int64_t count, AdamWFactors f) {
    const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * width;
    if (i >= count) return;
    auto w = load<width>(master + i), m_i = load<width>(m + i), v_i = load<width>(v + i);
    const auto g_i = load<width>(grad + i);
    UNROLL for (int j = 0; j < width; j++) {
        const real g = f.grad_scale * g_i.v[j];
        m_i.v[j] = f.beta1 * m_i.v[j] + (1 - f.beta1) * g;
        v_i.v[j] = f.beta2 * v_i.v[j] + (1 - f.beta2) * g * g;
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
static std::string problem(bool& absent) {
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
    .embedding_forward = embedding_forward,
    .embedding_backward = embedding_backward,
    .embedding_scratch = embedding_scratch,
    .conv_forward = conv_forward,
    .conv_backward = conv_backward,
    .conv_scratch = conv_scratch,
    .scan_forward = scan_forward,
    .scan_backward = scan_backward,
    .scan_scratch = scan_scratch,
    .router_forward = router_forward,
    .router_losses = router_losses,
    .router_backward = router_backward,
    .router_scratch = router_scratch,
    .dispatch_plan = dispatch_plan,
    .dispatch_scratch = dispatch_scratch,
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
// Host code only from here on: random numbers, Config, the kinds of layers, the Model. It calls kernels through a table of Layers and
// does not know which device it has.
using Json = nlohmann::ordered_json;

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

// ---- random numbers: the finaliser of splitmix64 (Steele, Lea, Flood 2014), applied to each of the three words in turn

static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t counter) {
    constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio: keeps small words apart
    return mix(mix(mix(seed + kStep) + stream * kStep) + counter * kStep);
}

double random_uniform(uint64_t seed, uint64_t stream, uint64_t counter) {
    return double(random_bits(seed, stream, counter) >> 11) * 0x1p-53;
}

double random_normal(uint64_t seed, uint64_t stream, uint64_t counter) {
    const uint64_t bits = random_bits(seed, stream, counter);
    const double u = double((bits >> 32) + 1) * 0x1p-32, v = double(bits & 0xffffffffu) * 0x1p-32;  // u in (0, 1], so that log is finite
    return std::sqrt(-2 * std::log(u)) * std::cos(2 * M_PI * v);
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
struct FeedForwardLayer;
struct ExpertsLayer;
static const Kind kKinds[] = {{'M', "Mamba", "mixer", make<MambaLayer>},
                              {'F', "feed-forward", "feed_forward", make<FeedForwardLayer>},
                              {'E', "experts", "moe", make<ExpertsLayer>}};
static const Kind* find_kind(char letter) {
    const Kind* const kind = std::find_if(std::begin(kKinds), std::end(kKinds), [&](const Kind& k) { return k.letter == letter; });
    return kind == std::end(kKinds) ? nullptr : kind;
}

// The steps of "ME(ME)*4", repeated.
static std::vector<std::string> parse_layers(const std::string& text) {
    std::vector<std::string> unit;
    const char* where = "--layers \"%s\", character %zu: %s";
    auto bad = [&](size_t i, const std::string& what) { fail(where, text.c_str(), i + 1, what.c_str()); };
    bool group = false;
    long repeats = 1;
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
    if (i < text.size()) {
        char* end = nullptr;
        errno = 0;
        repeats = strtol(text.c_str() + i + 1, &end, 10);
        if (end == text.c_str() + i + 1 || *end || errno || repeats < 1 || repeats > 10000)
            bad(i, "'*' needs a count of 1 to 10000 after it, at the end");
    }
    std::vector<std::string> steps;
    for (long r = 0; r < repeats; r++) steps.insert(steps.end(), unit.begin(), unit.end());
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
    each_field(*this, [](const char* flag, const auto& field, const char*, double least, double most) {
        if constexpr (std::is_arithmetic_v<std::decay_t<decltype(field)>>)
            if (!(field >= least && field <= most)) fail("--%s %g: must be between %g and %g", flag, double(field), least, most);
    });
    if (!d_inner) d_inner = 2 * d_model;
    if (!dt_rank) dt_rank = (d_model + 15) / 16;
    if (!d_ff) d_ff = 2 * d_model;
    if (!d_expert) d_expert = (swiglu_experts ? 2 : 3) * d_model;
}

int Config::capacity_rows(int rows) const {
    if (capacity == 0) return 0;
    const double choices = double(rows) * top_k, largest = std::numeric_limits<int>::max();
    return int(std::clamp(std::floor(capacity * choices / experts), 1.0, std::min(choices, largest)));
}

std::string Config::to_json() const {
    Json json;
    each_field(*this, [&](const char* flag, const auto& field, auto...) { json[flag] = field; });
    return json.dump();
}

Config Config::from_json(const std::string& text, const std::string& where) {
    Config config;
    try {
        const Json json = Json::parse(text);
        each_field(config, [&](const char* flag, auto& field, auto...) { json.at(flag).get_to(field); });
    } catch (const Json::exception& e) {
        fail("%s: the model's config cannot be read (%s)", where.c_str(), e.what());
    }
    try {
        config.resolve();
    } catch (const Error& e) {
        fail("%s: the model's config is damaged: %s", where.c_str(), e.what());
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
        } families[] = {{"mamba", "MM"}, {"mamba-mlp", "MF"}, {"moe-mamba", "ME"}, {"moe-mamba-parallel", "(ME)"}};
        static std::vector<std::string> names;
        names.reserve(std::size(families) * std::size(sizes));
        for (const auto& family : families)
            for (const Size& size : sizes) {
                Config c;
                c.layers = std::string(family.unit) + "*" + std::to_string(size.pairs);
                c.vocab = size.vocab;
                c.d_model = size.d_model;
                c.experts = size.experts;
                names.push_back(std::string(family.name) + "-" + size.name);
                all.push_back({names.back().c_str(), size.note, c});
            }
        Config c;
        c.layers = "M*24";
        c.vocab = 50280;
        c.d_model = 768;
        c.tied = 1;
        all.push_back({"mamba-130m", "arXiv 2312.00752, state-spaces/mamba-130m", c});
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
    Tensor in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, skip, out_proj;
    floatX *xz, *u, *x_dbl, *dt, *y;           // (rows, 2D) = [x | z]; (rows, D); (rows, ld) = [dt | B | C]; (rows, D); (rows, D)
    real* chunk_states;                        // (B, chunks, D, N)
    floatX *d_xz, *d_u, *d_x_dbl, *d_dt, *d_y;
    real *conv_state[2], *scan_state[2];       // (B, W-1, D), (B, D, N): one side is read, the other written

    MambaLayer(Model& model, const std::string& name)
        : Layer(model, name), C(model.config.d_model), D(model.config.d_inner), N(model.config.d_state), R(model.config.dt_rank),
          W(model.config.d_conv), ld((R + 2 * N + 7) / 8 * 8) {
        const double conv = 1 / std::sqrt(double(W)), inner = 1 / std::sqrt(double(D));
        model.add(A_log, name + "A_log", {D, N}, Init::log_state, 0, Tensor::plain);
        model.add(skip, name + "D", {D}, Init::one, 0, Tensor::plain);
        model.add(conv_weight, name + "conv1d.weight", {D, 1, W}, Init::uniform, conv, Tensor::decayed);
        model.add(conv_bias, name + "conv1d.bias", {D}, Init::uniform, conv, Tensor::plain);
        model.add(in_proj, name + "in_proj.weight", {2 * D, C}, Init::uniform, 1 / std::sqrt(double(C)), Tensor::decayed);
        model.add(x_proj, name + "x_proj.weight", {R + 2 * N, D}, Init::uniform, inner, Tensor::decayed);
        model.add(dt_proj, name + "dt_proj.weight", {D, R}, Init::uniform, 1 / std::sqrt(double(R)), Tensor::decayed);
        model.add(dt_bias, name + "dt_proj.bias", {D}, Init::dt_bias, 0, Tensor::plain);
        model.add(out_proj, name + "out_proj.weight", {C, D}, Init::uniform, inner / std::sqrt(double(model.additions)), Tensor::decayed);
    }
    void plan_activations(Plan& plan) override {
        plan.arena.add(&xz, name + "xz", plan.rows() * 2 * D);
        plan.arena.add(&u, name + "u", plan.rows() * D);
        plan.arena.add(&x_dbl, name + "dt, B, C", plan.rows() * ld);
        plan.arena.add(&dt, name + "dt", plan.rows() * D);
        plan.arena.add(&y, name + "y", plan.rows() * D);
        plan.arena.add(&chunk_states, name + "chunk states", plan.training ? plan.B * scan_chunks(plan.T) * D * N : 0);
        plan.need(model.layers.scan_scratch(plan.B, plan.T, D, N));
        if (plan.training) plan.need(model.layers.conv_scratch(plan.B, plan.T, D, W));
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
            arena.add(&scan_state[side], name + "scan state " + std::to_string(side), int64_t(B) * D * N);
        }
    }
    Conv conv(const Pass& p) const {
        return {xz, 2 * D, conv_weight.master, conv_bias.master, p.state < 0 ? nullptr : conv_state[p.state], p.B, p.T, D, W};
    }
    Scan scan(const Pass& p) const {
        return {u, dt, x_dbl + R, x_dbl + R + N, ld, xz + D, 2 * D, A_log.master, skip.master, dt_bias.master,
                p.state < 0 ? nullptr : scan_state[p.state], p.B, p.T, D, N};
    }
    void forward(const Pass& p, const floatX* normed, floatX* out, bool accumulate) override {
        const Layers& l = model.layers;
        const cudaStream_t stream = model.stream;
        const int rows = p.rows();
        l.linear_forward(xz, 2 * D, {normed, C, in_proj.weight, rows, C, 2 * D}, false, stream);
        l.conv_forward(u, p.state < 0 ? nullptr : conv_state[1 - p.state], conv(p), stream);
        l.linear_forward(x_dbl, ld, {u, D, x_proj.weight, rows, D, R + 2 * N}, false, stream);
        l.linear_forward(dt, D, {x_dbl, ld, dt_proj.weight, rows, R, D}, false, stream);
        l.scan_forward(y, p.state < 0 ? nullptr : scan_state[1 - p.state], p.training ? chunk_states : nullptr, scan(p),
                       model.buffers.scratch, stream);
        l.linear_forward(out, C, {y, D, out_proj.weight, rows, D, C}, accumulate, stream);
    }
    void backward(const Pass& p, floatX* d_normed, const floatX* d_out, const floatX* normed, bool accumulate) override {
        const Layers& l = model.layers;
        const cudaStream_t stream = model.stream;
        const int rows = p.rows();
        const bool add = p.part > 0;
        l.linear_backward(d_y, D, out_proj.grad, d_out, C, {y, D, out_proj.weight, rows, D, C}, false, add, stream);
        l.scan_backward({d_u, d_dt, d_x_dbl + R, d_x_dbl + R + N, d_xz + D, A_log.grad, skip.grad, dt_bias.grad, nullptr}, d_y, nullptr,
                        scan(p), chunk_states, model.buffers.scratch, stream);
        l.linear_backward(d_x_dbl, ld, dt_proj.grad, d_dt, D, {x_dbl, ld, dt_proj.weight, rows, R, D}, false, add, stream);
        l.linear_backward(d_u, D, x_proj.grad, d_x_dbl, ld, {u, D, x_proj.weight, rows, D, R + 2 * N}, true, add, stream);
        l.conv_backward({d_xz, conv_weight.grad, conv_bias.grad, nullptr}, d_u, nullptr, conv(p), model.buffers.scratch, stream);
        l.linear_backward(d_normed, C, in_proj.grad, d_xz, 2 * D, {normed, C, in_proj.weight, rows, C, 2 * D}, accumulate, add, stream);
    }
    int64_t matmul_weights() const override { return in_proj.count + x_proj.count + dt_proj.count + out_proj.count; }
};

struct FeedForwardLayer : Layer {
    const int C, F;
    Tensor gate_up, down;          // (2F, C), (C, F)
    floatX *gate_up_out, *hidden;  // (rows, 2F), (rows, F)
    floatX *d_gate_up, *d_hidden;

    FeedForwardLayer(Model& model, const std::string& name) : Layer(model, name), C(model.config.d_model), F(model.config.d_ff) {
        model.add_block(gate_up, name + "gate_up", int64_t(2) * F * C, Init::normal, fan_in(C), Tensor::decayed);
        model.add_part(gate_up, name + "gate_proj.weight", F, C);
        model.add_part(gate_up, name + "up_proj.weight", F, C);
        model.add(down, name + "down_proj.weight", {C, F}, Init::normal, fan_in(F), Tensor::decayed);
    }
    void plan_activations(Plan& plan) override {
        plan.arena.add(&gate_up_out, name + "gate, up", plan.rows() * 2 * F);
        plan.arena.add(&hidden, name + "hidden", plan.rows() * F);
    }
    void plan_gradients(Plan& plan) override {
        plan.arena.add(&d_gate_up, "d gate, up", plan.rows() * 2 * F);
        plan.arena.add(&d_hidden, "d hidden", plan.rows() * F);
    }
    void forward(const Pass& p, const floatX* normed, floatX* out, bool accumulate) override {
        const Layers& l = model.layers;
        l.linear_forward(gate_up_out, 2 * F, {normed, C, gate_up.weight, p.rows(), C, 2 * F}, false, model.stream);
        l.swiglu_forward(hidden, gate_up_out, p.rows(), F, model.stream);
        l.linear_forward(out, C, {hidden, F, down.weight, p.rows(), F, C}, accumulate, model.stream);
    }
    void backward(const Pass& p, floatX* d_normed, const floatX* d_out, const floatX* normed, bool accumulate) override {
        const Layers& l = model.layers;
        const int rows = p.rows();
        const bool add = p.part > 0;
        l.linear_backward(d_hidden, F, down.grad, d_out, C, {hidden, F, down.weight, rows, F, C}, false, add, model.stream);
        l.swiglu_backward(d_gate_up, d_hidden, gate_up_out, rows, F, model.stream);
        l.linear_backward(d_normed, C, gate_up.grad, d_gate_up, 2 * F, {normed, C, gate_up.weight, rows, C, 2 * F}, accumulate, add,
                          model.stream);
    }
    int64_t matmul_weights() const override { return gate_up.count + down.count; }
};

struct ExpertsLayer : Layer {
    const int C, F, E, K;
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
        : Layer(model, name), C(model.config.d_model), F(model.config.d_expert), E(model.config.experts), K(model.config.top_k),
          swiglu(model.config.swiglu_experts), F_in(swiglu ? 2 * F : F) {
        model.expert_layers++;
        model.add(router, name + "router.weight", {E, C}, Init::normal, fan_in(C), Tensor::decayed);
        model.add_block(in, name + "experts.in", int64_t(E) * F_in * C, Init::normal, fan_in(C), Tensor::decayed);
        model.add_block(out, name + "experts.out", int64_t(E) * C * F, Init::normal, fan_in(F), Tensor::decayed);
        for (int e = 0; e < E; e++) {
            const std::string expert = name + "experts." + std::to_string(e) + ".";
            if (swiglu) model.add_part(in, expert + "gate_proj.weight", F, C);
            model.add_part(in, expert + "up_proj.weight", F, C);
            model.add_part(out, expert + "down_proj.weight", C, F);
        }
    }
    int64_t slots(const Plan& plan) const {
        const int64_t n = Dispatch::slots(plan.rows(), E, K, plan.training ? model.config.capacity_rows(int(plan.rows())) : 0);
        if (n > std::numeric_limits<int>::max())
            fail("%lld tokens in a batch make %lld rows for the experts, more than 2^31 - 1: use a smaller batch, --top-k or --capacity",
                 (long long)plan.rows(), (long long)n);
        return n;
    }
    void plan_activations(Plan& plan) override {
        const int64_t rows = plan.rows(), n = slots(plan);
        plan.arena.add(&routing.probs, name + "router probabilities", rows * E);
        plan.arena.add(&routing.lse, name + "router logsumexp", rows);
        plan.arena.add(&routing.gates, name + "gates", rows * K);
        plan.arena.add(&routing.experts, name + "chosen experts", rows * K);
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
        return {slot, choice, load, offset, p.rows(), E, K, p.training ? model.config.capacity_rows(p.rows()) : 0};
    }
    Router router_of(const Pass& p, const floatX* normed) const {
        return {normed, router.master, p.rows(), C, E, K, bool(model.config.renormalize)};
    }
    void forward(const Pass& p, const floatX* normed, floatX* branch, bool accumulate) override {
        const Layers& l = model.layers;
        const cudaStream_t stream = model.stream;
        char* const scratch = model.buffers.scratch;
        const Dispatch to = this->to(p);
        l.router_forward(routing, router_of(p, normed), scratch, stream);
        l.dispatch_plan(to, routing.experts, scratch, stream);
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
        l.combine_forward(branch, y, routing.gates, to, C, accumulate, stream);
    }
    void backward(const Pass& p, floatX* d_normed, const floatX* d_out, const floatX* normed, bool accumulate) override {
        const Layers& l = model.layers;
        const cudaStream_t stream = model.stream;
        const Dispatch to = this->to(p);
        const bool add = p.part > 0;
        const int* const known = to.capacity ? nullptr : host_offset.data();
        const real share = real(1) / real(p.parts * model.expert_layers);
        l.combine_backward(d_slots, d_gates, d_out, y, routing.gates, to, C, stream);
        l.experts_backward(d_hidden, out.grad, d_slots, {hidden, out.weight, to, known, F, C}, add, stream);
        if (swiglu) l.swiglu_backward(d_gate_up, d_hidden, gate_up, to.slots(), F, stream);
        else l.relu_backward(d_hidden, d_hidden, hidden, int64_t(to.slots()) * F, stream);
        l.experts_backward(d_slots, in.grad, swiglu ? d_gate_up : d_hidden, {dispatched, in.weight, to, known, C, F_in}, add, stream);
        l.dispatch_backward(d_normed, d_slots, to, C, accumulate, stream);
        l.router_backward(d_normed, router.grad, d_gates, routing, to.load, router_of(p, normed), real(model.config.balance_loss) * share,
                          real(model.config.z_loss) * share, model.buffers.scratch, stream);
    }
    int64_t matmul_weights() const override { return router.count + (in.count + out.count) / E * K; }
    int64_t idle_parameters() const override { return (in.count + out.count) / E * (E - K); }
    int counters() const override { return E; }
    void report(Losses& losses, const int* load, int rows, double share) const override {
        const int capacity = model.config.capacity_rows(rows);
        const double choices = double(rows) * K;
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
    add(embedding, "backbone.embeddings.weight", {Vp, C}, Init::normal, 0.02, Tensor::decayed);
    for (size_t s = 0; s < layout.size(); s++) {
        Step& step = *steps.emplace_back(std::make_unique<Step>());
        const std::string prefix = "backbone.layers." + std::to_string(s) + ".";
        add(step.norm, prefix + "norm.weight", {C}, Init::one, 0, Tensor::plain);
        for (size_t l = 0; l < layout[s].size(); l++) {
            // In a parallel group with two layers of one kind, the second has a number.
            const auto twins = std::count(layout[s].begin(), layout[s].begin() + l, layout[s][l]);
            const Kind& kind = *find_kind(layout[s][l]);
            step.layers.push_back(kind.make(*this, prefix + kind.parameters + (twins ? "_" + std::to_string(twins) : "") + "."));
            step.layers.back()->first_counter = counters;
            counters += step.layers.back()->counters();
        }
    }
    add(steps.emplace_back(std::make_unique<Step>())->norm, "backbone.norm_f.weight", {C}, Init::one, 0, Tensor::plain);
    head = &embedding;
    if (!config.tied) {
        head = &head_table;
        add(head_table, "lm_head.weight", {Vp, C}, Init::normal, fan_in(C), Tensor::decayed);
    }
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

void Model::add(Tensor& t, const std::string& name, std::vector<int64_t> shape, Init init, double scale, Tensor::Update update) {
    const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<>());
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

int64_t Model::outer_parameter_count() const { return embedding.count + head_table.count; }

double Model::matmul_flops_per_token(bool training) const {
    int64_t weights = head->count;
    for (const auto& step : steps)
        for (const auto& layer : step->layers) weights += layer->matmul_weights();
    return 2.0 * double(weights) * (training ? 3 : 1);
}

// In each arena tensors lie by their kind of update, so that one launch updates all of a kind, and what is never updated has no gradient.
void Model::plan_tensors() {
    constexpr int64_t kAlign = 128;  // elements: 256 bytes of bf16
    int64_t at = 0;
    for (Tensor::Update update : {Tensor::decayed, Tensor::plain, Tensor::never}) {
        for (Tensor* t : tensors)
            if (t->update == update) {
                t->at = at;
                at += (t->count + kAlign - 1) / kAlign * kAlign;
            }
        ends[update] = at;
    }
    masters.add(&buffers.master, "master weights", at);
    if (kMixedPrecision) weights.add(&buffers.weight, "weights", at);
}

void Model::allocate_weights() {
    if (masters.device) return;
    if (masters.entries.empty()) plan_tensors();
    stream = layers.open();
    masters.allocate(layers);
    layers.zero(buffers.master, ends[Tensor::never] * sizeof(real), stream);  // what lies between tensors, too
    if (kMixedPrecision) weights.allocate(layers);
    else buffers.weight = reinterpret_cast<floatX*>(buffers.master);  // one type, one copy
    for (Tensor* t : tensors) {
        t->master = buffers.master + t->at;
        t->weight = buffers.weight + t->at;
    }
}

// Copies `count` values to the master and the rounded weight of a tensor.
static void set_tensor(const Model& model, const Tensor& t, int64_t offset, const std::vector<real>& values) {
    model.layers.upload(t.master + offset, values.data(), values.size() * sizeof(real), model.stream);
    if (kMixedPrecision) {
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
                case Init::zero: return 0;
                case Init::one: return 1;
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
    gradients.add(&buffers.grad, "gradients, losses", ends[Tensor::plain] + kLossCount);
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
    buffers.losses = buffers.grad + ends[Tensor::plain];
    moments.allocate(layers);
    activations.allocate(layers);
    for (Tensor* t : tensors)
        if (t->update != Tensor::never) {
            t->grad = buffers.grad + t->at;
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
    const Pass pass{.B = batch, .T = time, .training = true, .part = parts, .parts = accumulation};
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
    layers.zero(buffers.grad, (ends[Tensor::plain] + kLossCount) * sizeof(real), stream);
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
    for (int part = 0; part < kept; part++)
        for (const auto& step : steps)
            for (const auto& layer : step->layers)
                layer->report(losses, counts.data() + int64_t(part) * counters + layer->first_counter, batch * time, 1.0 / kept);
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
        const double size = tensors[i]->grad ? squares(tensors[i]->grad, tensors[i]->count) : 0;
        if (!std::isfinite(size)) return "gradient of " + tensors[i]->name;
        if (size > largest) largest = size, name = tensors[i]->name;
    }
    return name.empty() ? "" : "gradient of " + name + ", the largest";
}

void Model::update(const AdamW& o, const Losses& losses, int step) {
    const double clip = o.grad_clip > 0 && losses.grad_norm > o.grad_clip ? o.grad_clip / losses.grad_norm : 1;
    int64_t first = 0;
    for (Tensor::Update update : {Tensor::decayed, Tensor::plain}) {
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

double Model::evaluate(const int* tokens, const int* targets, int B, int T) {
    const int rows = B * T;
    begin_inference(B, T);
    layers.zero(buffers.evaluated, sizeof(real), stream);
    forward({.B = B, .T = T}, tokens, targets);
    cross_entropy(buffers.evaluated, rows, 0, [](int, int) {});
    real sum;
    layers.download(&sum, buffers.evaluated, sizeof(sum), stream);
    staged = 0;
    return sum / double(std::max<int64_t>(1, rows - std::count(targets, targets + rows, -1)));
}

void Model::start(DecodeState& state, int B, int64_t context) {
    if (state.B != B || state.context != context) {
        state.arena.release();
        state.B = B;
        state.context = context;
        for (const auto& step : steps)
            for (const auto& layer : step->layers) layer->plan_state(state.arena, B, context);
        state.arena.allocate(layers);
    }
    state.position = state.current = 0;
    for (const Arena::Entry& entry : state.arena.entries) layers.zero(entry.memory, entry.bytes, stream);
}

size_t Model::decode_state_bytes(int64_t context) {
    Arena arena("one sequence");
    for (const auto& step : steps)
        for (const auto& layer : step->layers) layer->plan_state(arena, 1, context);
    return arena.bytes;
}

const real* Model::decode(DecodeState& state, const int* tokens, int T, real temperature) {
    const int B = state.B, C = config.d_model, V = config.vocab, Vp = config.padded_vocab();
    if (state.position + T > state.context)
        fail("decoding %d tokens after %lld: there is room for %lld in all", T, (long long)state.position, (long long)state.context);
    begin_inference(B, T);
    state.arena.bind();
    forward({.B = B, .T = T, .state = state.current, .position = state.position}, tokens, nullptr);
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
              const Sampling& sampling, int64_t sample, const std::function<bool(int)>& emit) {
    if (prompt.empty()) prompt.push_back(tokenizer.end_of_text);
    model.start(state, 1, int64_t(prompt.size()) + count);
    for (int64_t i = 0; i < count; i++) {
        const real* probs = model.decode(state, prompt.data(), int(prompt.size()), real(sampling.temperature));
        if (!std::isfinite(std::accumulate(probs, probs + tokenizer.vocab, 0.0)))
            fail("the model's probabilities are not finite: its weights are damaged, perhaps by too high a learning rate");
        const double u = random_uniform(sampling.seed, kSampleStream, uint64_t(sample) << 32 | uint64_t(i));
        const int token = sample_token(probs, tokenizer.vocab, sampling.temperature == 0, sampling.top_k, sampling.top_p, u);
        if (token == tokenizer.end_of_text || !emit(token)) return;
        prompt.assign(1, token);
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Model: checkpoints

// One of the optimizer's moments, or the masters, of each parameter that has them.
struct Kept {
    const char* suffix;
    real* Tensor::*values;
};
static const Kept kMasters[] = {{"", &Tensor::master}}, kMoments[] = {{".m", &Tensor::m}, {".v", &Tensor::v}};

template <class F>
static void each_kept(const Model& model, std::span<const Kept> kept, F&& f) {
    for (const Parameter& p : model.parameters)
        for (const Kept& k : kept)
            if (k.values == &Tensor::master || p.tensor->update != Tensor::never) f(p, p.name + k.suffix, p.tensor->*k.values + p.offset);
}

static void save_tensors(const Model& model, std::span<const Kept> kept, const std::string& path, const Model::Metadata& metadata) {
    std::vector<Safetensors::NewEntry> list;
    std::vector<const real*> sources;
    each_kept(model, kept, [&](const Parameter& p, const std::string& name, const real* from) {
        list.push_back({name, sizeof(real) == 8 ? "F64" : "F32", p.shape, p.count * int64_t(sizeof(real))});
        sources.push_back(from);
    });
    std::vector<char> bytes;
    Safetensors::write(path, list, metadata, [&](size_t i) {
        bytes.resize(list[i].bytes);
        model.layers.download(bytes.data(), sources[i], bytes.size(), model.stream);
        return bytes.data();
    });
}

// Every tensor of the file is one that the model has, and the other way round. set(parameter, where it goes, values)
template <class F>
static void load_tensors(const Model& model, std::span<const Kept> kept, const Safetensors& file, F&& set) {
    size_t count = 0;
    each_kept(model, kept, [&](const Parameter& p, const std::string& name, real*) {
        if (file.find(name).shape != p.shape)
            fail("%s: tensor %s has another shape than the model's config says", file.path.c_str(), name.c_str());
        count++;
    });
    if (file.entries.size() != count)
        fail("%s: has %zu tensors, the model's config says %zu", file.path.c_str(), file.entries.size(), count);
    each_kept(model, kept, [&](const Parameter& p, const std::string& name, real* to) {
        std::vector<real> values(p.count);
        file.read(name, values.data());
        set(p, to, values);
    });
}

void Model::save(const std::string& path, const Metadata& metadata) const {
    Metadata all = {{"format", "pt"}, {"config", config.to_json()}};
    all.insert(all.end(), metadata.begin(), metadata.end());
    save_tensors(*this, kMasters, path, all);
}

void Model::save_optimizer(const std::string& path, const Metadata& metadata) const { save_tensors(*this, kMoments, path, metadata); }

void Model::load(const std::string& path) {
    const Safetensors file(path);
    allocate_weights();
    load_tensors(*this, kMasters, file, [&](const Parameter& p, real*, const std::vector<real>& values) {
        set_tensor(*this, *p.tensor, p.offset, values);
    });
}

void Model::load_optimizer(const std::string& path) {
    load_tensors(*this, kMoments, Safetensors(path), [&](const Parameter&, real* to, const std::vector<real>& values) {
        layers.upload(to, values.data(), values.size() * sizeof(real), stream);
    });
}
