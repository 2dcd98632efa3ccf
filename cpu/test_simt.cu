// Tests of simt.h: that it computes what CUDA does, and that it catches every fault it claims to. Each planted fault runs in a child
// process, which must end with exit code 1 and a report that says what is wrong; beside it runs its twin without the fault.
#include "cpu/simt.h"
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif
#include <memory>
#include <sys/wait.h>

namespace {

#ifdef __SANITIZE_THREAD__
constexpr bool watched = true;
#else
constexpr bool watched = false;
#endif
#ifdef __SANITIZE_ADDRESS__
constexpr bool address_sanitizer = true;
#else
constexpr bool address_sanitizer = false;
#endif
const bool closed = simt::options.closed = true;

template <class T> struct Buffer {                            // device memory with a host's vector to fill it from
    T* data = nullptr;
    size_t size;
    explicit Buffer(size_t size, const char* name = "buffer") : size(size) {
        REQUIRE(cudaMalloc(&data, size * sizeof(T)) == cudaSuccess);
        simt::name_allocation(data, name);
    }
    explicit Buffer(const std::vector<T>& from) : Buffer(from.size()) {
        cudaMemcpy(data, from.data(), size * sizeof(T), cudaMemcpyHostToDevice);
    }
    ~Buffer() { cudaFree(data); }
    Buffer(const Buffer&) = delete;
    std::vector<T> host() const {
        std::vector<T> to(size);
        cudaMemcpy(to.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost);
        return to;
    }
};
template <class T> std::vector<T> count_up(size_t n, T from = 0) {
    std::vector<T> v(n);
    for (size_t i = 0; i < n; ++i) v[i] = T(from + T(i));
    return v;
}

// Runs this in a child process, which must end with exit code 1 and a report with all of these phrases.
template <class Body>
void reports(Body body, std::initializer_list<const char*> phrases, simt::Location where = simt::Location::current()) {
    int ends[2], status;
    REQUIRE(pipe(ends) == 0);
    fflush(nullptr);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        alarm(60);                                            // a hang is a failure
        simt::options.threads = 1;                            // OpenMP's other threads are not there after a fork
        body();
        _exit(0);
    }
    close(ends[1]);
    std::string text;
    char part[4096];
    for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) text.append(part, size_t(n));
    close(ends[0]);
    waitpid(child, &status, 0);
    INFO("line " << where.line() << ": " << text);
    CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 1));
    for (const char* phrase : phrases) {
        INFO("must say: " << phrase);
        CHECK(text.find(phrase) != std::string::npos);
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// What kernels can do

__global__ void indices_kernel(int* out) {
    unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    unsigned i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
    out[i] = int(threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * blockIdx.x + 10000 * blockIdx.y + 100000 * blockIdx.z);
}

template <int threads> __global__ void __launch_bounds__(threads) reduce_kernel(float* out, const float* in, int n) {
    SHARED(float[threads / 32], warp_sums);
    float sum = 0;
    for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += int(gridDim.x * blockDim.x)) sum += in[i];
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < threads / 32; ++w) sum += warp_sums[w];
        out[blockIdx.x] = sum;
    }
}

template <class T> __global__ void shuffle_kernel(T* out, int width) {
    T mine = T(threadIdx.x + 100);
    T* row = out + threadIdx.x;
    row[0 * 64] = __shfl_sync(~0u, mine, 5, width);
    row[1 * 64] = __shfl_up_sync(~0u, mine, 3, width);
    row[2 * 64] = __shfl_xor_sync(~0u, mine, 5, width);
    if (threadIdx.x % 2) row[3 * 64] = __shfl_sync(0xaaaaaaaa, mine, 7);
    else row[3 * 64] = __shfl_sync(0x55555555, mine, 8);
}

__global__ void vote_kernel(unsigned* out) {
    int lane = int(threadIdx.x % 32);
    unsigned* row = out + 3 * threadIdx.x;
    row[0] = __ballot_sync(~0u, lane % 3 == 0);
    if (lane < 8) row[1] = __ballot_sync(0xff, lane & 1);
    else row[1] = 0;
    row[2] = unsigned(__syncthreads_count(threadIdx.x % 5 == 0));
}

template <class T> __global__ void atomics_kernel(T* out) { atomicAdd(out, T(threadIdx.x)); }

__global__ void reverse_kernel(double* data, int n) {         // dynamic shared memory
    DYNAMIC_SHARED(double, buffer);
    for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) buffer[i] = data[i];
    __syncthreads();
    for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) data[i] = buffer[n - 1 - i];
}

template <int n> __device__ int own_array(int value) {        // each instance of a template has shared arrays of its own
    SHARED(int[n], values);
    if (threadIdx.x < n) values[threadIdx.x] = value;
    __syncthreads();
    return values[n - 1];
}
__global__ void instances_kernel(int* out) {
    int a = own_array<4>(1), b = own_array<8>(2), c = own_array<4>(0);
    out[threadIdx.x] = 100 * a + 10 * b + c;
}

__global__ void scale_kernel(float* data, float by, int n) {  // no barrier: a plain loop
    int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) data[i] *= by;
}

struct alignas(16) Four { float v[4]; };                      // what moves through one 16-byte access
struct alignas(8) Two { float v[2]; };
__global__ void copy_kernel(Four* to, const Four* from, __nv_bfloat16* halves, int n) {
    int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) {
        Four x = from[i];
        x.v[0] += 1;
        to[i] = x;
        halves[i] = x.v[1];
    }
}

// A neighbourhood sum in several steps: its threads depend on each other through shared memory, warps and blocks through atomics.
__global__ void mixed_kernel(float* out, unsigned* total, const float* in) {
    SHARED(float[64], tile);
    float x = in[blockIdx.x * 64 + threadIdx.x];
    for (int step = 0; step < 4; ++step) {
        tile[threadIdx.x] = x;
        __syncthreads();
        x = 0.5f * x + 0.3f * tile[(threadIdx.x + 1) % 64] + 0.2f * __shfl_up_sync(~0u, x, 1);
        __syncthreads();
    }
    out[blockIdx.x * 64 + threadIdx.x] = x;
    atomicAdd(total, threadIdx.x);
}

__global__ void arrivals_kernel(int* out, int* next) { out[atomicAdd(next, 1)] = int(blockIdx.x * blockDim.x + threadIdx.x); }

template <class Body> void in_every_order(Body body) {
    simt::Options before = simt::options;
    for (int i = 0; i < 5; ++i) {
        simt::options.order = i == 0 ? simt::forward : i == 1 ? simt::reverse : simt::shuffled;
        simt::options.seed = uint64_t(i);
        body();
    }
    simt::options = before;
}
}

TEST_CASE("indices in three dimensions", "[simt]") {
    Buffer<int> out(2 * 3 * 4 * 5 * 6 * 2);
    LAUNCH(indices_kernel, dim3(2, 3, 4), dim3(5, 6, 2), 0, nullptr)(out.data);
    std::vector<int> got = out.host(), want;
    for (int bz = 0; bz < 4; ++bz) for (int by = 0; by < 3; ++by) for (int bx = 0; bx < 2; ++bx)
        for (int z = 0; z < 2; ++z) for (int y = 0; y < 6; ++y) for (int x = 0; x < 5; ++x)
            want.push_back(x + 10 * y + 100 * z + 1000 * bx + 10000 * by + 100000 * bz);
    CHECK(got == want);
}

TEST_CASE("block reduction", "[simt]") {
    Buffer<float> in(count_up<float>(1000)), out(3);
    LAUNCH((reduce_kernel<128>), 3, 128, 0, nullptr)(out.data, in.data, 1000);
    std::vector<float> sums = out.host();
    CHECK(sums[0] + sums[1] + sums[2] == 499500);
}

TEMPLATE_TEST_CASE("shuffles", "[simt]", int, unsigned, float, double, long long) {
    for (int width : {32, 16, 8, 4, 1}) {
        Buffer<TestType> out(4 * 64);
        LAUNCH(shuffle_kernel<TestType>, 1, 64, 0, nullptr)(out.data, width);
        std::vector<TestType> got = out.host();
        for (int t = 0; t < 64; ++t) {
            int warp = t / 32 * 32, lane = t % 32, first = lane / width * width, last = first + width - 1;
            int from[4] = {first + 5 % width, lane - 3 < first ? lane : lane - 3, (lane ^ 5) > last ? lane : lane ^ 5, lane % 2 ? 7 : 8};
            for (int kind = 0; kind < 4; ++kind) CHECK(got[size_t(kind * 64 + t)] == TestType(100 + warp + from[kind]));
        }
    }
}

TEST_CASE("votes", "[simt]") {
    in_every_order([] {
        Buffer<unsigned> out(64 * 3);
        LAUNCH(vote_kernel, 1, 64, 0, nullptr)(out.data);
        std::vector<unsigned> got = out.host();
        for (size_t t = 0; t < 64; ++t) {
            unsigned want[3] = {0x49249249, t % 32 < 8 ? 0xaau : 0u, 13};
            for (size_t i = 0; i < 3; ++i) CHECK(got[3 * t + i] == want[i]);
        }
    });
}

TEMPLATE_TEST_CASE("atomics", "[simt]", int, unsigned, unsigned long long, float, double) {
    Buffer<TestType> out(std::vector<TestType>{5});
    LAUNCH(atomics_kernel<TestType>, 8, 100, 0, nullptr)(out.data);
    CHECK(out.host()[0] == 5 + 8 * 4950);
}

TEST_CASE("dynamic shared memory, past 48 KB with the attribute", "[simt]") {
    for (int n : {100, 6144, 12000}) {
        Buffer<double> data(count_up<double>(size_t(n)));
        if (n > 6144) REQUIRE(cudaFuncSetAttribute(reverse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n * 8) == cudaSuccess);
        LAUNCH(reverse_kernel, 1, 64, size_t(n) * 8, nullptr)(data.data, n);
        std::vector<double> got = data.host(), want = count_up<double>(size_t(n));
        CHECK(std::equal(got.begin(), got.end(), want.rbegin()));
    }
    CHECK(cudaFuncSetAttribute(reverse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 * 1024) == cudaErrorInvalidValue);
}

TEST_CASE("shared arrays belong to their declaration and template instance", "[simt]") {
    Buffer<int> out(16);
    LAUNCH(instances_kernel, 1, 16, 0, nullptr)(out.data);
    CHECK(out.host() == std::vector<int>(16, 120));
}

TEST_CASE("vector types and launches of uneven size", "[simt]") {
    Buffer<float> from(count_up<float>(4 * 100)), to(4 * 100);
    Buffer<__nv_bfloat16> halves(100);
    LAUNCH(copy_kernel, 4, 32, 0, nullptr)(reinterpret_cast<Four*>(to.data), reinterpret_cast<const Four*>(from.data), halves.data, 100);
    std::vector<float> got = to.host();
    for (size_t i = 0; i < 400; ++i) CHECK(got[i] == float(i) + (i % 4 == 0));
    CHECK(float(halves.host()[2]) == 9);
}

TEST_CASE("every order gives the same bits", "[simt]") {
    std::vector<float> first;
    in_every_order([&] {
        Buffer<float> in(count_up<float>(64 * 7)), out(64 * 7);
        Buffer<unsigned> total(std::vector<unsigned>{0});
        LAUNCH(mixed_kernel, 7, 64, 0, nullptr)(out.data, total.data, in.data);
        if (first.empty()) first = out.host();
        CHECK(memcmp(first.data(), out.host().data(), first.size() * 4) == 0);
        CHECK(total.host()[0] == 7 * 2016);
    });
}

TEST_CASE("the order of threads and of blocks is the one asked for", "[simt]") {
    simt::Options before = simt::options;
    for (auto [blocks, threads] : {std::pair(1, 64), {64, 1}, {4, 16}}) {
        auto arrivals = [&, blocks = blocks, threads = threads](simt::Order order, uint64_t seed) {
            simt::options.order = order, simt::options.seed = seed, simt::options.threads = 1;
            Buffer<int> out(64), next(std::vector<int>{0});
            LAUNCH(arrivals_kernel, blocks, threads, 0, nullptr)(out.data, next.data);
            return out.host();
        };
        std::vector<int> up = count_up<int>(64), down(up.rbegin(), up.rend());
        std::vector<int> one = arrivals(simt::shuffled, 1), two = arrivals(simt::shuffled, 2);
        INFO(blocks << " blocks of " << threads);
        CHECK(arrivals(simt::forward, 0) == up);
        CHECK(arrivals(simt::reverse, 0) == down);
        CHECK((one != two && one != up && one != down && two != up && two != down));
        CHECK(arrivals(simt::shuffled, 1) == one);
        for (auto* each : {&one, &two}) std::sort(each->begin(), each->end());
        CHECK((one == up && two == up));
    }
    simt::options = before;
}

TEST_CASE("launches from OS threads that end", "[simt]") {
    for (int i = 0; i < 20; ++i) {
        Buffer<int> out(64), next(std::vector<int>{0});
        std::thread([&] { LAUNCH(arrivals_kernel, 4, 16, 0, nullptr)(out.data, next.data); }).join();
        CHECK(next.host()[0] == 64);
    }
}

// out = out + a b, for 16 x 16 matrices: a by rows of ld_a, b by columns. Where a sum is, numbers that are loaded as sums are say.
__global__ void warp_matrix_kernel(float* out, const __nv_bfloat16* a, int ld_a, const __nv_bfloat16* b, const float* numbers) {
    using namespace nvcuda::wmma;
    fragment<matrix_a, 16, 16, 16, __nv_bfloat16, row_major> left;
    fragment<matrix_b, 16, 16, 16, __nv_bfloat16, col_major> right;
    fragment<accumulator, 16, 16, 16, float> number, sum;
    load_matrix_sync(number, numbers, 16, mem_row_major);
    fill_fragment(sum, 1);
    for (int i = 0; i < sum.num_elements; i++) sum.x[i] += out[int(number.x[i])];
    load_matrix_sync(left, a, ld_a);
    load_matrix_sync(right, b, 16);
    mma_sync(sum, left, right, sum);
    for (int i = 0; i < sum.num_elements; i++) out[int(number.x[i])] = sum.x[i];
}
TEST_CASE("products of a warp's matrices against plain loops", "[simt]") {
    std::vector<__nv_bfloat16> a(16 * 24), b(16 * 16);
    for (size_t i = 0; i < a.size(); ++i) a[i] = __nv_bfloat16(int(i * 7 % 13) - 6);
    for (size_t i = 0; i < b.size(); ++i) b[i] = __nv_bfloat16(int(i * 5 % 11) - 5);
    std::vector<float> want(256);
    for (int i = 0; i < 256; ++i) {
        want[i] = float(i + 1);
        for (int k = 0; k < 16; ++k) want[i] += float(a[i / 16 * 24 + k]) * float(b[i % 16 * 16 + k]);
    }
    const Buffer<__nv_bfloat16> on_a(a), on_b(b);
    const Buffer<float> numbers(count_up<float>(256));
    in_every_order([&] {
        Buffer<float> out(count_up<float>(256));
        LAUNCH(warp_matrix_kernel, 1, 32, 0, nullptr)(out.data, on_a.data, 24, on_b.data, numbers.data);
        CHECK(out.host() == want);
    });
    Buffer<float> out(count_up<float>(256));
    reports([&] { LAUNCH(warp_matrix_kernel, 1, 32, 0, nullptr)(out.data, on_a.data + 8, 24, on_b.data, numbers.data); },
            {"warp_matrix_kernel", "load_matrix_sync()", "misaligned"});
    reports([&] { LAUNCH(warp_matrix_kernel, 1, 32, 0, nullptr)(out.data, on_a.data, 20, on_b.data, numbers.data); }, {"misaligned", "20"});
    reports([&] { LAUNCH(warp_matrix_kernel, 1, 31, 0, nullptr)(out.data, on_a.data, 24, on_b.data, numbers.data); },
            {"warp_matrix_kernel", "whole warps"});
}

TEST_CASE("bfloat16", "[simt]") {
    int wrong = 0;
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        float value = std::bit_cast<float>(bits << 16);
        __nv_bfloat16 half = std::bit_cast<__nv_bfloat16>(uint16_t(bits));
        wrong += std::bit_cast<uint32_t>(float(half)) != bits << 16;
        wrong += value == value ? std::bit_cast<uint16_t>(__nv_bfloat16(value)) != bits : !std::isnan(float(__nv_bfloat16(value)));
        if (!std::isfinite(value)) continue;
        // What lies between this one and the next, and which of the two is nearer; a tie goes to the even one.
        for (uint32_t low : {1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
            uint32_t want = low < 0x8000 ? bits : low > 0x8000 ? bits + 1 : bits + bits % 2;
            wrong += std::bit_cast<uint16_t>(__nv_bfloat16(std::bit_cast<float>(bits << 16 | low))) != want;
        }
    }
    CHECK(wrong == 0);
    CHECK(float(__nv_bfloat16(3)) == 3);
    CHECK(int(__nv_bfloat16(2.5)) == 2);
    CHECK(double(__nv_bfloat16(0.1f)) == 0.10009765625);
    CHECK(float(__nv_bfloat16(1.0f) + __nv_bfloat16(2.0f)) == 3);
}

TEST_CASE("the runtime's calls", "[simt]") {
    size_t before, after, total;
    cudaMemGetInfo(&before, &total);
    {
        Buffer<int> a(count_up<int>(1000)), b(1000);
        cudaMemGetInfo(&after, &total);
        CHECK(before - after == 8000);
        CHECK(uintptr_t(a.data) % 256 == 0);
        cudaMemcpyAsync(b.data, a.data, 4000, cudaMemcpyDeviceToDevice);
        CHECK(b.host() == a.host());
        cudaMemsetAsync(b.data, 0, 4000);
        CHECK(b.host() == std::vector<int>(1000));
    }
    cudaMemGetInfo(&after, &total);
    CHECK(before == after);
    float* p;
    CHECK(cudaMalloc(&p, size_t(1) << 40) == cudaErrorMemoryAllocation);
    Buffer<float> fresh(3);
    CHECK(std::isnan(fresh.host()[2]));
    std::vector<std::unique_ptr<Buffer<int>>> held;           // more than is gone through before freed addresses come again
    for (int i = 0; i < 60; ++i) {
        held.push_back(std::make_unique<Buffer<int>>(std::vector<int>(1 << 18, i)));
        if (i % 3 == 2) held[i / 3].reset();
    }
    for (int i = 20; i < 60; ++i) CHECK((held[i]->host() == std::vector<int>(1 << 18, i)));
    held.clear();
    for (int i = 0; i < 5000; ++i) {                          // a program may allocate and free for as long as it likes
        Buffer<char> b(size_t(i) * 7 + 1);
        if (i % 1000 == 0) CHECK(cudaMemset(b.data, 0, b.size) == cudaSuccess);
    }
}

TEST_CASE("what the runtime says of the device is the options'", "[simt]") {
    simt::Options before = simt::options;
    simt::options.multiprocessors = 132, simt::options.blocks_per_multiprocessor = 7, simt::options.shared_optin = 64 << 10;
    simt::options.device_count = 3, simt::options.driver_version = 12040, simt::options.runtime_version = 12080;
    int n = 0;
    CHECK((cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && n == 132));
    CHECK((cudaDeviceGetAttribute(&n, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == cudaSuccess && n == 65536));
    CHECK((cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, reverse_kernel, 64, 0) == cudaSuccess && n == 7));
    CHECK((cudaGetDeviceCount(&n) == cudaSuccess && n == 3));
    CHECK((cudaDriverGetVersion(&n) == cudaSuccess && n == 12040));
    CHECK((cudaRuntimeGetVersion(&n) == cudaSuccess && n == 12080));
    CHECK(cudaFuncSetAttribute(reverse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536) == cudaSuccess);
    CHECK(cudaFuncSetAttribute(reverse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 65537) == cudaErrorInvalidValue);
    cudaFuncAttributes attributes;
    CHECK(cudaFuncGetAttributes(&attributes, reverse_kernel) == cudaSuccess);
    simt::options.device_status = cudaErrorInsufficientDriver, simt::options.code_status = cudaErrorNoKernelImageForDevice;
    CHECK((cudaGetDeviceCount(&n) == cudaErrorInsufficientDriver && n == 0));
    CHECK(cudaFuncGetAttributes(&attributes, reverse_kernel) == cudaErrorNoKernelImageForDevice);
    CHECK(std::string(cudaGetErrorName(cudaErrorInsufficientDriver)) == "cudaErrorInsufficientDriver");
    simt::options = before;
    cudaDeviceProp properties;
    CHECK((cudaGetDeviceProperties(&properties, 0) == cudaSuccess && std::string(properties.name) == "simt"));
    CHECK((cublasGetVersion(nullptr, &n) == CUBLAS_STATUS_SUCCESS && n > 0));
}

TEST_CASE("launches and waits are counted", "[simt]") {
    cudaStream_t stream, other;
    REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    REQUIRE(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking) == cudaSuccess);
    CHECK((stream && other && stream != other));
    cublasHandle_t handle;
    REQUIRE(cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS);
    Buffer<float> buffer(64);
    float pageable[64] = {}, one = 1, *locked;
    REQUIRE(cudaMallocHost(&locked, 64 * sizeof(float)) == cudaSuccess);
    std::fill_n(locked, 64, 1.0f);
    auto counts = [&](uint64_t launches, uint64_t waits, auto work) {
        const uint64_t launched = simt::launches, waited = simt::waits;
        work();
        CHECK(simt::launches - launched == launches);
        CHECK(simt::waits - waited == waits);
    };
    counts(1, 0, [&] { LAUNCH(scale_kernel, 2, 32, 0, stream)(buffer.data, 2, 0); });
    counts(2, 0, [&] { cudaMemsetAsync(buffer.data, 0, 256, stream), cudaMemset(buffer.data, 0, 256); });
    counts(2, 0, [&] {
        for (int batches : {1, 3})
            cublasGemmStridedBatchedEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, 2, 2, 2, &one, buffer.data, CUDA_R_32F, 2, 4, buffer.data,
                                       CUDA_R_32F, 2, 4, &one, buffer.data + 16, CUDA_R_32F, 2, 4, batches, CUBLAS_COMPUTE_32F,
                                       CUBLAS_GEMM_DEFAULT);
    });
    counts(1, 0, [&] {
        cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, 2, 2, 2, &one, buffer.data, CUDA_R_32F, 2, buffer.data, CUDA_R_32F, 2, &one,
                     buffer.data + 16, CUDA_R_32F, 2, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    });
    counts(0, 0, [&] { cudaMemcpyAsync(buffer.data, locked + 32, 128, cudaMemcpyHostToDevice, stream); });
    counts(0, 1, [&] { cudaMemcpyAsync(buffer.data, pageable, 256, cudaMemcpyHostToDevice, stream); });
    counts(0, 1, [&] {
        cudaMemcpyAsync(pageable, buffer.data, 256, cudaMemcpyDeviceToHost, stream);
        cudaStreamSynchronize(stream);
    });
    counts(0, 1, [] { cudaDeviceSynchronize(); });
    cudaFreeHost(locked);
    CHECK((cublasDestroy(handle) == CUBLAS_STATUS_SUCCESS && cudaStreamDestroy(stream) == cudaSuccess));
    cudaStreamDestroy(other);
    reports([&] { cudaFreeHost(pageable); }, {"cudaFreeHost", "never returned"});
}

TEMPLATE_TEST_CASE("matrix products against plain loops", "[simt]", float, double, __nv_bfloat16) {
    using Sum = std::conditional_t<std::is_same_v<TestType, double>, double, float>;
    constexpr bool half = std::is_same_v<TestType, __nv_bfloat16>;
    const cudaDataType_t type = half ? CUDA_R_16BF : std::is_same_v<TestType, double> ? CUDA_R_64F : CUDA_R_32F;
    constexpr cublasComputeType_t compute = std::is_same_v<Sum, double> ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
    const int m = 5, n = 7, k = 3, batches = 3, ld = 9;
    auto values = [&](int seed) {
        std::vector<TestType> v(size_t(batches * ld * ld));
        for (size_t i = 0; i < v.size(); ++i) v[i] = TestType(Sum(int(i * 37 + size_t(seed) * 11) % 17 - 8));
        return v;
    };
    for (int flags = 0; flags < 8; ++flags) for (Sum beta : {Sum(0), Sum(1), Sum(-2)}) {
        const bool float_out = flags & 4, tA = flags & 2, tB = flags & 1;
        if (float_out && !half) continue;
        std::vector<TestType> a = values(1), b = values(2), c = values(3);
        Buffer<TestType> A(a), B(b), C(c);
        std::vector<float> wide(c.size());
        for (size_t i = 0; i < c.size(); ++i) wide[i] = float(c[i]);
        Buffer<float> W(wide);
        Sum alpha = 2;
        void* out = float_out ? static_cast<void*>(W.data) : C.data;
        auto out_type = float_out ? CUDA_R_32F : type;
        const auto opA = tA ? CUBLAS_OP_T : CUBLAS_OP_N, opB = tB ? CUBLAS_OP_T : CUBLAS_OP_N;
        REQUIRE(cublasGemmStridedBatchedEx(nullptr, opA, opB, m, n, k, &alpha, A.data, type, ld, ld * ld, B.data, type, ld, ld * ld, &beta,
                                           out, out_type, ld, ld * ld, batches, compute, CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS);
        std::vector<TestType> got = C.host();
        std::vector<float> got_wide = W.host();
        int wrong = 0;
        for (int batch = 0; batch < batches; ++batch)
            for (int j = 0; j < ld; ++j) for (int i = 0; i < ld; ++i) {
                size_t at = size_t(batch * ld * ld + j * ld + i), offset = size_t(batch * ld * ld);
                Sum want = Sum(c[at]);
                if (i < m && j < n) {
                    want *= beta;
                    for (int l = 0; l < k; ++l)
                        want += 2 * Sum(a[offset + size_t(tA ? i * ld + l : l * ld + i)]) *
                                Sum(b[offset + size_t(tB ? l * ld + j : j * ld + l)]);
                }
                wrong += float_out ? got_wide[at] != float(want) : Sum(got[at]) != Sum(TestType(want));
            }
        CHECK(wrong == 0);
    }
    Sum one = 1, zero = 0;
    Buffer<TestType> A(values(1)), B(values(2)), C(values(3));
    auto product = [&](int m, int n, int k, int lda, int ldb, int ldc) {
        return cublasGemmEx(nullptr, CUBLAS_OP_N, CUBLAS_OP_N, m, n, k, &one, A.data, type, lda, B.data, type, ldb, &zero, C.data, type,
                            ldc, compute, CUBLAS_GEMM_DEFAULT);
    };
    CHECK(product(4, 4, 4, 3, 4, 4) == CUBLAS_STATUS_INVALID_VALUE);
    reports([&] { product(10, 100, 10, 10, 10, 10); }, {"cublasGemm", "past the end of 'buffer'"});
    CHECK(cublasSetMathMode(nullptr, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION) == CUBLAS_STATUS_SUCCESS);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// What kernels must not do. Each kernel below is right as kernel<false> and at fault as kernel<true>.

namespace {
template <bool fault> __global__ void neighbour_kernel(int* out) {             // the missing barrier
    SHARED(int[64], tile);
    tile[threadIdx.x] = -1;
    __syncthreads();
    tile[threadIdx.x] = int(threadIdx.x);
    if (!fault) __syncthreads();
    out[threadIdx.x] = tile[(threadIdx.x + 32) % 64];
}
template <bool fault> __global__ void overwrite_kernel(int* out) {             // reads, and then writes, without a barrier between
    SHARED(int[64], tile);
    tile[threadIdx.x] = -1;
    __syncthreads();
    tile[threadIdx.x] = int(threadIdx.x);
    __syncthreads();
    int x = tile[63 - threadIdx.x];
    if (!fault) __syncthreads();
    tile[threadIdx.x] = x;
    out[threadIdx.x] = x;
}
template <bool fault> __global__ void warp_kernel(int* out) {                  // a warp needs __syncwarp, which orders nobody else
    SHARED(int[64], tile);
    tile[threadIdx.x] = -1;
    __syncthreads();
    tile[threadIdx.x] = int(threadIdx.x);
    __syncwarp();
    out[threadIdx.x] = tile[fault ? 63 - threadIdx.x : threadIdx.x ^ 1];
}
template <bool fault> __global__ void shuffle_orders_nothing_kernel(int* out) {
    SHARED(int[32], tile);
    tile[threadIdx.x] = -1;
    __syncthreads();
    tile[threadIdx.x] = int(threadIdx.x);
    int other = __shfl_xor_sync(~0u, int(threadIdx.x), 1);
    if (!fault) __syncwarp();
    out[threadIdx.x] = tile[other];
}
template <bool fault> __global__ void sum_kernel(int* out) {                   // blocks that add up into one place
    if (threadIdx.x) return;
    if (fault) out[0] += 1;
    else atomicAdd(&out[0], 1);
}
template <bool fault> __global__ void read_sum_kernel(int* out, int* sum) {     // the others' atomics are not all done
    int before = atomicAdd(&sum[0], 1);
    out[blockIdx.x] = fault && before % 8 == 7 ? sum[0] : before;
}
template <bool fault> __global__ void read_across_kernel(int* out, int* in) {  // a block writes what others read
    int x = in[0];
    if (fault && blockIdx.x == 2) in[0] = x + 1;
    out[blockIdx.x] = x;
}
template <bool fault> __global__ void mixed_atomic_kernel(int* out) {          // atomic here, plain there
    SHARED(int, count);
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    if (threadIdx.x != 62 || !fault) atomicAdd(&count, 1);
    else count = 5;
    __syncthreads();
    out[threadIdx.x] = count;
}
template <bool fault> __global__ void plain_then_atomic_kernel(int* sum) {     // block 0's own atomic does not excuse its plain write
    if (fault && blockIdx.x == 0 && threadIdx.x == 0) sum[0] = 0;
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(&sum[0], 1);
}
template <bool fault> __global__ void warp_plain_then_atomic_kernel(int* out) { // nor does that of its warp
    SHARED(int, count);
    if (threadIdx.x == 0) count = -1;
    __syncthreads();
    if (threadIdx.x == 0) count = 0;
    if (fault) __syncwarp();
    else __syncthreads();
    atomicAdd(&count, 1);
    __syncthreads();
    out[threadIdx.x] = count;
}
template <class T> __global__ void small_neighbours_kernel(T* out) {           // no race: every thread has its own bytes
    out[threadIdx.x] = T(int(threadIdx.x));
    __syncthreads();
    if (threadIdx.x % 2) out[threadIdx.x] = T(out[threadIdx.x] + T(1));
}
template <bool fault> __global__ void exit_before_barrier_kernel(int* out) {
    if (fault && threadIdx.x == 40) return;
    __syncthreads();
    out[threadIdx.x] = 1;
}
template <bool fault> __global__ void two_barriers_kernel(int* out) {
    if (fault && threadIdx.x >= 32) __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = 1;
}
template <bool fault> __global__ void missing_lane_kernel(int* out) {
    int x = 0;
    if (!fault || threadIdx.x % 32 < 31) x = __shfl_sync(~0u, 1, 0);
    else x = 1;
    out[threadIdx.x] = x;
}
template <bool fault> __global__ void vote_after_exit_kernel(int* out) {
    if (threadIdx.x % 32 >= 16) { out[threadIdx.x] = 1; return; }
    out[threadIdx.x] = __ballot_sync(fault ? 0xffffffff : 0xffff, 1) == 0xffff;
}
template <bool fault> __global__ void not_in_mask_kernel(int* out) {
    out[threadIdx.x] = __ballot_sync(fault ? 0xfffffffe : 0xffffffff, 1) != 0;
}
template <bool fault> __global__ void absent_source_kernel(int* out) {         // asks a lane outside the mask
    out[threadIdx.x] = threadIdx.x % 32 < 16 ? __shfl_sync(0xffff, 1, fault ? 20 : 3) : 1;
}
template <bool fault> __global__ void two_masks_kernel(int* out) {
    out[threadIdx.x] = __shfl_sync(fault && threadIdx.x % 32 >= 16 ? 0xffff0001 : ~0u, 1, 0);
}
template <int offset> __global__ void global_write_kernel(char* out) { out[int(threadIdx.x) + offset] = 1; }
template <int offset> __global__ void global_read_kernel(char* out, const char* in) { out[threadIdx.x] = in[int(threadIdx.x) + offset]; }
template <bool fault> __global__ void far_kernel(char* out) { out[threadIdx.x + fault * 300] = 1; }
template <bool fault> __global__ void shared_bounds_kernel(char* out) {
    SHARED(char[65], array);
    char* const tile = array;                                 // else the compiler knows the bound, and UndefinedBehaviorSanitizer is first
    tile[threadIdx.x + 1 + (fault && threadIdx.x == 63)] = 1;
    out[threadIdx.x] = tile[threadIdx.x + 1];
}
template <bool fault> __global__ void shared_read_kernel(char* out) {
    SHARED(char[64], array);
    char* const tile = array;
    tile[threadIdx.x] = 1;
    out[threadIdx.x] = tile[threadIdx.x + (fault && threadIdx.x == 63)];
}
__global__ void fresh_shared_kernel(float* out) {             // finds nothing of what an earlier block has left
    SHARED(float[64], fixed);
    DYNAMIC_SHARED(float, dynamic);
    out[(blockIdx.x * 64 + threadIdx.x) * 2] = fixed[threadIdx.x];
    out[(blockIdx.x * 64 + threadIdx.x) * 2 + 1] = dynamic[threadIdx.x];
    fixed[threadIdx.x] = dynamic[threadIdx.x] = 1;
}
[[gnu::noipa]] __device__ int deep(int levels) {
    volatile int local[1000];
    local[0] = 1;
    return levels ? deep(levels - 1) : local[0];
}
template <bool fault> __global__ void stack_kernel(int* out) { out[threadIdx.x] = deep(fault ? 1000 : 10); }
template <bool fault> __global__ void dynamic_bounds_kernel(char* out) {
    DYNAMIC_SHARED(char, tile);
    tile[threadIdx.x + 1 + (fault && threadIdx.x == 63)] = 1;
    out[threadIdx.x] = tile[threadIdx.x + 1];
}
template <int offset, class T> __global__ void misaligned_read_kernel(float* to, const float* from) {
    const T x = *reinterpret_cast<const T*>(from + offset);
    for (size_t i = 0; i < sizeof x.v / 4; ++i) to[i] = x.v[i];
}
template <int offset, class T> __global__ void misaligned_write_kernel(float* to, T x) { *reinterpret_cast<T*>(to + offset) = x; }
const int constants[3] = {1, 2, 3};
template <bool fault> __global__ void host_memory_kernel(int* out, const int* in) {
    out[threadIdx.x] = (fault ? in : constants)[threadIdx.x % 3 * !fault];
}
template <bool fault> __global__ void unwritten_kernel(int* out, const int* in, int n) {
    out[threadIdx.x] = int(threadIdx.x) < n + fault ? in[threadIdx.x] : 1;
}
template <bool fault> __global__ void unwritten_shared_kernel(int* out) {
    SHARED(int[64], tile);
    if (!fault || blockIdx.x == 0) tile[threadIdx.x] = 1;     // the second block does not find what the first one left
    out[blockIdx.x * 64 + threadIdx.x] = tile[threadIdx.x];
}
template <bool fault> __global__ void local_address_kernel(int* out) {         // another thread's local variable
    SHARED(int*, address);
    int local[2] = {int(threadIdx.x), 1};
    asm volatile("" : : "r"(local) : "memory");
    if (threadIdx.x == 0) address = local;
    __syncthreads();
    out[threadIdx.x] = fault ? address[1] : local[1];
}
__global__ void static_kernel(int* out) {
    SHARED(char[49 * 1024], large);
    large[threadIdx.x] = 1;
    out[threadIdx.x] = large[threadIdx.x];
}
template <bool fault> __global__ void copy_bytes_kernel(char* to, const char* from, int n) {   // plain memcpy and memset
    char local[128];                                          // of known size: _FORTIFY_SOURCE would have a function of its own
    memcpy(local, from, size_t(n + fault));
    memset(to, 2, size_t(n));
    memcpy(to, local, size_t(n));
}
__global__ void ones_kernel(int* out) { out[threadIdx.x] = 1; }

template <class T = int> struct Ones : Buffer<T> {            // 64 elements that a right kernel sets to 1
    Ones() : Buffer<T>(64, "ones") {}
    void check() { CHECK(this->host() == std::vector<T>(64, T(1))); }
};
}

#define FAULT_AND_TWIN(name, ...)                                                                                                    \
    do {                                                                                                                             \
        in_every_order([&] {                                                                                                         \
            Ones<> out;                                                                                                              \
            LAUNCH(name##_kernel<false>, 1, 64, 0, nullptr)(out.data);                                                               \
            out.check();                                                                                                             \
            reports([&] { LAUNCH(name##_kernel<true>, 1, 64, 0, nullptr)(out.data); },                                               \
                    {"kernel " #name "_kernel<true>", "thread (", __VA_ARGS__});                                                     \
        });                                                                                                                          \
    } while (false)

TEST_CASE("divergent barriers and warp operations", "[simt]") {
    FAULT_AND_TWIN(exit_before_barrier, "divergent barrier", "thread (40,0,0) has exited", "test_simt.cu");
    FAULT_AND_TWIN(two_barriers, "divergent barrier", "while thread (32,0,0) waits at __syncthreads()");
    FAULT_AND_TWIN(missing_lane, "divergent warp", "thread (31,0,0) has exited", "__shfl_sync");
    FAULT_AND_TWIN(vote_after_exit, "divergent warp", "has exited", "__ballot_sync");
    FAULT_AND_TWIN(not_in_mask, "the calling lane is not in it", "0xfffffffe");
    FAULT_AND_TWIN(absent_source, "asks for the value of a lane that is not in it");
    FAULT_AND_TWIN(two_masks, "divergent warp: waits at __shfl_sync()", "with another mask");
}

TEST_CASE("a kernel thread without stack", "[simt]") { FAULT_AND_TWIN(stack, "stack overflow", "256 KB"); }

TEST_CASE("launches that a GPU refuses", "[simt]") {
    Buffer<int> out(1024);
    LAUNCH(ones_kernel, 1, 1024, 48 * 1024, nullptr)(out.data);
    CHECK(out.host() == std::vector<int>(1024, 1));
    reports([&] { LAUNCH(ones_kernel, 0, 32, 0, nullptr)(out.data); }, {"kernel ones_kernel", "zero blocks"});
    reports([&] { LAUNCH(ones_kernel, 1, dim3(1, 0), 0, nullptr)(out.data); }, {"kernel ones_kernel", "zero blocks or threads"});
    reports([&] { LAUNCH(ones_kernel, 1, 1025, 0, nullptr)(out.data); }, {"kernel ones_kernel", "more than 1024 threads"});
    reports([&] { LAUNCH(ones_kernel, 1, dim3(41, 25), 0, nullptr)(out.data); }, {"kernel ones_kernel", "more than 1024 threads"});
    reports([&] { LAUNCH(ones_kernel, 1, dim3(1, 1, 65), 0, nullptr)(out.data); }, {"kernel ones_kernel", "64 threads in z"});
    reports([&] { LAUNCH(ones_kernel, dim3(1, 65536), 1, 0, nullptr)(out.data); }, {"kernel ones_kernel", "65535 in y or z"});
    reports([&] { LAUNCH(ones_kernel, dim3(1, 1, 65536), 1, 0, nullptr)(out.data); }, {"kernel ones_kernel", "65535 in y or z"});
    reports([&] { LAUNCH(ones_kernel, dim3(1u << 31), 1, 0, nullptr)(out.data); }, {"kernel ones_kernel", "2147483647 blocks"});
    reports([&] { LAUNCH(ones_kernel, 1, 1, 49 * 1024, nullptr)(out.data); },
            {"kernel ones_kernel", "more than 48 KB", "cudaFuncSetAttribute"});
    reports([&] { LAUNCH(static_kernel, 1, 1, 0, nullptr)(out.data); }, {"kernel static_kernel", "'large'", "50176 bytes"});
    reports([&] {                                             // the attribute is for dynamic memory only
        cudaFuncSetAttribute(static_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 * 1024);
        LAUNCH(static_kernel, 1, 1, 0, nullptr)(out.data);
    }, {"kernel static_kernel", "'large'", "50176 bytes of static arrays"});
}

TEST_CASE("host code touching device memory", "[simt]") {
    Buffer<int> a(count_up<int>(100));
    simt::name_allocation(a.data, "params");
    simt::name_allocation(a.data + 10, "params.weight");
    reports([&] { printf("%d", *const_cast<volatile int*>(a.data + 3)); }, {"host code touches byte 12 of 'params'", "cudaMemcpy"});
    reports([&] { *const_cast<volatile int*>(a.data + 11) = 1; }, {"host code touches byte 4 of 'params.weight'"});
    reports([&] { Buffer<int> b(100); cudaMemcpy(b.data, a.data, 404, cudaMemcpyDeviceToDevice); },
            {"cudaMemcpy of 404 bytes", "3 bytes past the end"});
    reports([&] { std::vector<int> h(100); cudaMemcpy(a.data + 1, h.data(), 400, cudaMemcpyHostToDevice); },
            {"cudaMemcpy of 400 bytes", "past the end"});
    reports([&] { cudaMemset(a.data, 0, 401); }, {"cudaMemset of 401 bytes", "0 bytes past the end"});
    reports([&] { std::vector<int> h(100); cudaMemcpy(a.data, h.data(), 400, cudaMemcpyDeviceToHost); }, {"Check its direction"});
    reports([&] { std::vector<int> h(100); cudaMemcpy(h.data(), h.data() + 1, 4, cudaMemcpyDeviceToHost); },
            {"which is not device memory"});
    reports([&] { cudaFree(a.data + 1); }, {"cudaFree"});
    reports([&] { cudaFree(a.data), cudaFree(a.data); }, {"cudaFree of byte 0 of 'params'", "since freed"});
    CHECK(a.host() == count_up<int>(100));
}

TEST_CASE("a kernel far outside its memory", "[simt]") {
    Ones<char> out;
    LAUNCH(far_kernel<false>, 1, 64, 0, nullptr)(out.data);
    out.check();
    reports([&] { LAUNCH(far_kernel<true>, 1, 64, 0, nullptr)(out.data); },
            {"kernel far_kernel<true>", "thread (0,0,0)", "past the end of 'ones'"});
    reports([&] { cudaFree(out.data); LAUNCH(far_kernel<false>, 1, 64, 0, nullptr)(out.data); },
            {"kernel far_kernel<false>", "since freed with cudaFree"});
    reports([&] { LAUNCH(far_kernel<false>, 1, 64, 0, nullptr)(nullptr); }, {"kernel far_kernel<false>", "thread (0,0,0)"});
}

TEST_CASE("one byte past the end, written", "[simt]") {
    in_every_order([] {
        Ones<char> out;
        LAUNCH(global_write_kernel<0>, 1, 64, 0, nullptr)(out.data);
        out.check();
        reports([&] { LAUNCH(global_write_kernel<1>, 1, 64, 0, nullptr)(out.data); },
                {"global_write_kernel<1>", "0 bytes past the end of 'ones'"});
        LAUNCH(shared_bounds_kernel<false>, 1, 64, 0, nullptr)(out.data);
        out.check();
        reports([&] { LAUNCH(shared_bounds_kernel<true>, 1, 64, 0, nullptr)(out.data); },
                {"shared_bounds_kernel<true>", "0 bytes past the end of shared array 'array'"});
        LAUNCH(dynamic_bounds_kernel<false>, 1, 64, 65, nullptr)(out.data);
        out.check();
        reports([&] { LAUNCH(dynamic_bounds_kernel<true>, 1, 64, 65, nullptr)(out.data); },
                {"dynamic_bounds_kernel<true>", "0 bytes past the end of shared array 'dynamic shared memory'"});
    });
}

// Writes to global memory where neither sanitizer looks: what cudaFree finds when all else has failed.
[[gnu::noipa]] __attribute__((no_sanitize("address", "thread"))) void poke(char* p) { *p = 1; }
TEST_CASE("cudaFree finds what was written past the end", "[simt]") {
    for (int offset : {0, 1, 191}) {
        auto write_and_free = [&](int at) {
            Buffer<char> a(64, "a");
            simt::Open open;
            poke(a.data + at);
        };
        write_and_free(63);
        std::string text = "the host wrote " + std::to_string(offset) + " bytes past the end of 'a'";
        reports([&] { write_and_free(64 + offset); }, {text.c_str()});
    }
}

template <int offset, class T> void test_alignment(const char* name, const char* text) {
    Buffer<float> to(64), from(std::vector<float>(64, 1));
    constexpr int good = sizeof(T) / 4;
    LAUNCH((misaligned_read_kernel<good, T>), 1, 1, 0, nullptr)(to.data, from.data);
    LAUNCH((misaligned_write_kernel<good, T>), 1, 1, 0, nullptr)(to.data, T{{1}});
    CHECK(to.host()[0] == 1);
    CHECK(to.host()[good] == 1);
    INFO(name);
    reports([&] { LAUNCH((misaligned_read_kernel<offset, T>), 1, 1, 0, nullptr)(to.data, from.data); },
            {"kernel (misaligned_read_kernel", "thread (0,0,0): ", "misaligned a", text});
    reports([&] { LAUNCH((misaligned_write_kernel<offset, T>), 1, 1, 0, nullptr)(to.data, T{}); },
            {"kernel (misaligned_write_kernel", "thread (0,0,0): ", "misaligned a", text});
}
// Watched builds see the access, those with sanitizers have UndefinedBehaviorSanitizer look at the pointer.
TEST_CASE("misaligned vectors", "[simt]") {
    Buffer<int> n(4);
    reports([&] { LAUNCH(atomics_kernel<int>, 1, 1, 0, nullptr)(reinterpret_cast<int*>(reinterpret_cast<char*>(n.data) + 2)); },
            {"atomics_kernel<int>", "misaligned"});
    if (!watched && !address_sanitizer) return;
    test_alignment<1, Four>("16 bytes at 4", watched ? "not a multiple of 16" : "requires 16 byte alignment");
    test_alignment<2, Four>("16 bytes at 8", watched ? "not a multiple of 16" : "requires 16 byte alignment");
    test_alignment<1, Two>("8 bytes at 4", watched ? "not a multiple of 8" : "requires 8 byte alignment");
}

TEST_CASE("one byte outside", "[simt]") {
    if (!watched && !address_sanitizer) return;
    Ones<char> out;
    Buffer<char> in(std::vector<char>(64, 1));
    simt::name_allocation(in.data, "in");
    LAUNCH(global_read_kernel<0>, 1, 64, 0, nullptr)(out.data, in.data);
    out.check();
    reports([&] { LAUNCH(global_read_kernel<1>, 1, 64, 0, nullptr)(out.data, in.data); },
            {"kernel global_read_kernel<1>", "thread (63,0,0)", "0 bytes past the end of 'in'"});
    reports([&] { LAUNCH(global_read_kernel<-1>, 1, 64, 0, nullptr)(out.data, in.data); },
            {"kernel global_read_kernel<-1>", "thread (0,0,0)", "1 bytes before 'in'"});
    reports([&] { LAUNCH(global_write_kernel<-1>, 1, 64, 0, nullptr)(out.data); },
            {"kernel global_write_kernel<-1>", "thread (0,0,0)", "1 bytes before 'ones'"});
    LAUNCH(shared_read_kernel<false>, 1, 64, 0, nullptr)(out.data);
    out.check();
    reports([&] { LAUNCH(shared_read_kernel<true>, 1, 64, 0, nullptr)(out.data); },
            {"kernel shared_read_kernel<true>", "thread (63,0,0)", "0 bytes past the end of shared array 'array'"});
}

TEST_CASE("fresh shared memory is NaN", "[simt]") {
    if (watched) return;                                      // there it is a fault: see "reading what nothing has written"
    Buffer<float> out(std::vector<float>(256));
    LAUNCH(fresh_shared_kernel, 2, 64, 64 * sizeof(float), nullptr)(out.data);
    for (float x : out.host()) CHECK(std::isnan(x));
}

TEST_CASE("traffic is counted to the byte", "[simt]") {
    Buffer<float> data(count_up<float>(1000)), out(3);
    simt::traffic_reset();
    LAUNCH(scale_kernel, 10, 128, 0, nullptr)(data.data, 2.f, 1000);
    LAUNCH(scale_kernel, 10, 128, 0, nullptr)(data.data, 2.f, 500);
    LAUNCH((reduce_kernel<128>), 3, 128, 0, nullptr)(out.data, data.data, 1000);
    Buffer<int> sum(std::vector<int>{0});
    LAUNCH(sum_kernel<false>, 8, 32, 0, nullptr)(sum.data);
    auto scale = simt::traffics["scale_kernel"], reduce = simt::traffics["reduce_kernel"], atomics = simt::traffics["sum_kernel"];
    CHECK((scale.launches == 2 && reduce.launches == 1 && atomics.launches == 1));
    if (watched) {
        CHECK((scale.read == 6000 && scale.written == 6000));
        CHECK((reduce.read == 4000 && reduce.written == 12));
        CHECK((atomics.read == 32 && atomics.written == 32));
    }
    simt::traffic_reset();
    CHECK(simt::traffics.empty());
}
#ifdef __SANITIZE_THREAD__
TEST_CASE("races between the threads of a block", "[simt]") {
    in_every_order([] {
        for (int kind = 0; kind < 4; ++kind) {
            Buffer<int> out(64);
            int n = kind < 3 ? 64 : 32;
            const char* names[] = {"neighbour", "overwrite", "warp", "shuffle_orders_nothing"};
            void (*kernels[][2])(int*) = {{neighbour_kernel<false>, neighbour_kernel<true>},
                                          {overwrite_kernel<false>, overwrite_kernel<true>},
                                          {warp_kernel<false>, warp_kernel<true>},
                                          {shuffle_orders_nothing_kernel<false>, shuffle_orders_nothing_kernel<true>}};
            simt::launch(names[kind], kernels[kind][0], 1, n, 0, nullptr)(out.data);
            std::vector<int> got = out.host();
            int from[] = {(n / 2 + 1) % n, n - 2, 0, 0};      // what thread 1 finds
            CHECK(got[1] == from[kind]);
            reports([&] { simt::launch(names[kind], kernels[kind][1], 1, n, 0, nullptr)(out.data); },
                    {names[kind], "race:", "shared array 'tile'", "which thread (", "__syncthreads()"});
        }
        Buffer<int> out(64);
        LAUNCH(mixed_atomic_kernel<false>, 1, 64, 0, nullptr)(out.data);
        CHECK(out.host() == std::vector<int>(64, 64));
        reports([&] { LAUNCH(mixed_atomic_kernel<true>, 1, 64, 0, nullptr)(out.data); },
                {"mixed_atomic_kernel<true>", "race:", "shared array 'count'"});
        LAUNCH(warp_plain_then_atomic_kernel<false>, 1, 64, 0, nullptr)(out.data);
        CHECK(out.host() == std::vector<int>(64, 64));
        reports([&] { LAUNCH(warp_plain_then_atomic_kernel<true>, 1, 64, 0, nullptr)(out.data); },
                {"warp_plain_then_atomic_kernel<true>", "race:", "shared array 'count'"});
        Buffer<__nv_bfloat16> halves(64);                     // neighbours within a word do not race
        LAUNCH(small_neighbours_kernel<__nv_bfloat16>, 1, 64, 0, nullptr)(halves.data);
        CHECK(float(halves.host()[7]) == 8);
        Buffer<unsigned char> bytes(64);
        LAUNCH(small_neighbours_kernel<unsigned char>, 1, 64, 0, nullptr)(bytes.data);
        CHECK(bytes.host()[7] == 8);
    });
}

TEST_CASE("races between blocks", "[simt]") {
    in_every_order([] {
        Buffer<int> sum(std::vector<int>{0}), out(8);
        LAUNCH(sum_kernel<false>, 8, 32, 0, nullptr)(sum.data);
        CHECK(sum.host()[0] == 8);
        reports([&] { LAUNCH(sum_kernel<true>, 8, 32, 0, nullptr)(sum.data); },
                {"sum_kernel<true>", "race:", "byte 0 of 'buffer'", "block ("});
        LAUNCH(read_across_kernel<false>, 8, 1, 0, nullptr)(out.data, sum.data);
        CHECK(out.host() == std::vector<int>(8, 8));
        reports([&] { LAUNCH(read_across_kernel<true>, 8, 1, 0, nullptr)(out.data, sum.data); },
                {"read_across_kernel<true>", "race:", "byte 0 of 'buffer'", "block"});
        LAUNCH(read_sum_kernel<false>, 8, 1, 0, nullptr)(out.data, sum.data);
        CHECK(sum.host()[0] == 16);
        reports([&] { LAUNCH(read_sum_kernel<true>, 8, 1, 0, nullptr)(out.data, sum.data); },
                {"read_sum_kernel<true>", "race: reads byte 0 of 'buffer'", "another block updated"});
        Buffer<int> total(std::vector<int>{0});
        LAUNCH(plain_then_atomic_kernel<false>, 4, 64, 0, nullptr)(total.data);
        CHECK(total.host()[0] == 4);
        reports([&] { LAUNCH(plain_then_atomic_kernel<true>, 4, 64, 0, nullptr)(total.data); },
                {"plain_then_atomic_kernel<true>", "race:", "byte 0 of 'buffer'", "Blocks of one launch have no order"});
    });
}

TEST_CASE("kernels touching host memory", "[simt]") {
    Buffer<int> out(64);
    LAUNCH(host_memory_kernel<false>, 1, 64, 0, nullptr)(out.data, nullptr);
    CHECK(out.host()[2] == 3);
    static int host_global = 1;
    std::vector<int> heap(1);
    int local = 0;
    for (const int* p : {static_cast<const int*>(&host_global), static_cast<const int*>(heap.data()), static_cast<const int*>(&local)})
        reports([&] { LAUNCH(host_memory_kernel<true>, 1, 64, 0, nullptr)(out.data, p); },
                {"kernel host_memory_kernel<true>", "thread (0,0,0)", "host memory"});
    reports([&] { LAUNCH(host_memory_kernel<false>, 1, 64, 0, nullptr)(const_cast<int*>(constants), nullptr); },
            {"host_memory_kernel<false>", "writes 4 bytes", "host memory"});
    Ones<> ones;
    LAUNCH(local_address_kernel<false>, 1, 64, 0, nullptr)(ones.data);
    ones.check();
    reports([&] { LAUNCH(local_address_kernel<true>, 1, 64, 0, nullptr)(ones.data); }, {"local_address_kernel<true>", "host memory"});
}

TEST_CASE("reading what nothing has written", "[simt]") {
    Ones<> out;
    Buffer<int> in(10, "in");
    int one = 1;
    for (int i = 0; i < 9; ++i) cudaMemcpy(in.data + i, &one, 4, cudaMemcpyHostToDevice);
    LAUNCH(unwritten_kernel<false>, 1, 64, 0, nullptr)(out.data, in.data, 9);
    out.check();
    reports([&] { LAUNCH(unwritten_kernel<true>, 1, 64, 0, nullptr)(out.data, in.data, 9); },
            {"unwritten_kernel<true>", "thread (9,0,0)", "byte 36 of 'in'", "nothing has written"});
    Buffer<int> copy(10, "copy");                             // a copy is as unwritten as its source
    cudaMemcpy(copy.data, in.data, 40, cudaMemcpyDeviceToDevice);
    reports([&] { LAUNCH(unwritten_kernel<true>, 1, 64, 0, nullptr)(out.data, copy.data, 9); },
            {"thread (9,0,0)", "byte 36 of 'copy'", "nothing has written"});
    Buffer<int> two(128);
    LAUNCH(unwritten_shared_kernel<false>, 2, 64, 0, nullptr)(two.data);
    CHECK(two.host() == std::vector<int>(128, 1));
    reports([&] { LAUNCH(unwritten_shared_kernel<true>, 2, 64, 0, nullptr)(two.data); },
            {"unwritten_shared_kernel<true>", "block (1,0,0)", "byte 0 of shared array 'tile'", "nothing has written"});
    float alpha = 1, beta = 0;
    Buffer<float> a(4, "a"), b(std::vector<float>(4)), c(4);
    reports([&] {
        cublasGemmEx(nullptr, CUBLAS_OP_N, CUBLAS_OP_N, 2, 2, 2, &alpha, a.data, CUDA_R_32F, 2, b.data, CUDA_R_32F, 2, &beta, c.data,
                     CUDA_R_32F, 2, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    }, {"cublasGemm reads byte 0 of 'a'", "nothing has written"});
}

TEST_CASE("memcpy and memset in kernels", "[simt]") {
    Ones<char> out;
    Buffer<char> in(std::vector<char>(64, 1));
    LAUNCH(copy_bytes_kernel<false>, 1, 1, 0, nullptr)(out.data, in.data, 64);
    out.check();
    reports([&] { LAUNCH(copy_bytes_kernel<true>, 1, 1, 0, nullptr)(out.data, in.data, 64); },
            {"copy_bytes_kernel<true>", "reads 65 bytes", "0 bytes past the end"});
}
#endif
