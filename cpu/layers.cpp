// The layers on a CPU, the fast version: the functions of `struct Layers`, in its order, with threads (OpenMP), vector registers (SIMD) and
// a BLAS. It trains and samples where there is no GPU. cpu/plain.cpp is the specification that it is held against.
//
// Matrix products go to a CBLAS, except for a handful of rows (decoding): those only stream the weights through once, which a BLAS
// does slowly. All else is cut into parts that depend on sizes and on omp_get_max_threads() alone, and partial sums are added
// in the order of the parts: the same bits every time for one number of threads.
#include "../moemamba.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cblas.h>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <omp.h>
#include <string_view>
#include <type_traits>
#ifdef __SSE2__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace cpu {
namespace {

std::string machine() {
    const std::string blas = blas_processor();
    return std::string("cpu in ") + kPrecision + ", threads: " + std::to_string(omp_get_max_threads()) + (blas.empty() ? "" : ", BLAS for " + blas);
}

// From here on this thread, and those that it starts later, take a number below 1e-38 for 0. Attention that is sure of itself is full of them, and so
// are AdamW's moments; for most processors one costs as much time as a hundred others, and beside those it is nothing.
void flush_denormals() {
#if defined(__SSE2__)
    _mm_setcsr(_mm_getcsr() | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
#elif defined(__aarch64__)
    uint64_t control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    asm volatile("msr fpcr, %0" : : "r"(control | uint64_t(1) << 24));  // FZ
#endif
}
cudaStream_t open() {
#pragma omp parallel  // for those that it has started already
    flush_denormals();
    return nullptr;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Waking the other threads costs a few microseconds: below this many elements one thread is faster.
constexpr bool worth_threads(int64_t elements) { return elements >= 16384; }

// Part `part` of `parts` of [0, count), in multiples of `unit`: units of a cache line keep two threads from writing the same one.
struct Range {
    int64_t begin, end;
    Range(int64_t count, int64_t part, int64_t parts, int64_t unit = 1) {
        const int64_t units = ceil_div(count, unit);
        begin = std::min(count, units * part / parts * unit);
        end = std::min(count, units * (part + 1) / parts * unit);
    }
};
constexpr int kLine = 64;  // bytes

// Cuts scratch into arrays that begin on a cache line. On a null pointer it only counts, so that one piece of code both states
// how much a function needs and hands it out.
struct Cutter {
    char* base;
    size_t used;
    explicit Cutter(void* scratch) : base(static_cast<char*>(scratch)), used(-reinterpret_cast<uintptr_t>(scratch) % kLine) {}
    template <class T>
    T* cut(int64_t count) {
        T* array = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += round_up(count * int64_t(sizeof(T)), kLine);
        return array;
    }
    size_t bytes() const { return used + (base ? 0 : kLine); }
};
// What one array needs.
template <class T>
constexpr size_t cut_bytes(int64_t count) { return round_up(count * sizeof(T), kLine) + kLine; }

// ------------------------------------------------------------------------------------------------------------------
// Numbers. Conversions of bfloat16 are written out, on bits, because the compiler vectorises that.
inline real load(real x) { return x; }
inline void store(real& to, real x) { to = x; }
#ifdef PRECISION_BF16
inline real load(floatX x) { return std::bit_cast<float>(uint32_t(std::bit_cast<uint16_t>(x)) << 16); }
inline void store(floatX& to, real x) {  // to nearest, ties to even; a NaN must not round to infinity
    const uint32_t bits = std::bit_cast<uint32_t>(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to = std::bit_cast<floatX>(uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded));
}
#endif

// A vector register of reals. The scan has a channel in each lane; as a type, rather than a loop that the compiler may
// or may not vectorise, it uses the widest registers there are. +, * and < act lane by lane; real op vec broadcasts.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / sizeof(real);
template <int kBytes>
using Vector __attribute__((vector_size(kBytes))) = real;
using vec = Vector<kVectorBytes>;
typedef int32_t ivec __attribute__((vector_size(kVectorBytes)));
typedef uint16_t half_vec __attribute__((vector_size(kLanes * 2)));
typedef uint32_t uvec __attribute__((vector_size(kLanes * 4)));

template <class To, class From>
inline To copy_bits(const From* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}
inline vec load_vec(const real* x) { return copy_bits<vec>(x); }
inline void store_vec(real* x, vec v) { std::memcpy(x, &v, sizeof v); }
#ifdef PRECISION_BF16
inline vec load_vec(const floatX* x) { return (vec)(__builtin_convertvector(copy_bits<half_vec>(x), uvec) << 16); }
// Of 2 kLanes numbers those at even and at odd places: one operation each, where to widen kLanes neighbours takes five. A dot
// product does not mind the order.
inline vec load_even(const floatX* x) { return (vec)(copy_bits<uvec>(x) << 16); }
inline vec load_odd(const floatX* x) { return (vec)(copy_bits<uvec>(x) & 0xffff0000); }
inline void store_vec(floatX* x, vec v) {
    const uvec bits = (uvec)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const half_vec half = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff + uvec{} : rounded, half_vec);
    std::memcpy(static_cast<void*>(x), &half, sizeof half);
}
#endif
// The first `count` lanes; the others are zero.
template <class T>
inline vec load_vec(const T* x, int count) {
    if (count == kLanes) return load_vec(x);
    vec v = {};
    for (int lane = 0; lane < count; lane++) v[lane] = load(x[lane]);
    return v;
}
// The same from the end of a longer array: loads all lanes up to x[count - 1], and clears those that come before x[0].
template <class T>
inline vec load_last(const T* x, int count) {
    decltype(vec{} < vec{}) index;
    for (int lane = 0; lane < kLanes; lane++) index[lane] = lane;
    return index < kLanes - count ? vec{} : load_vec(x + count - kLanes);
}
template <class T>
inline void store_vec(T* x, vec v, int count) {
    if (count == kLanes) return store_vec(x, v);
    for (int lane = 0; lane < count; lane++) store(x[lane], v[lane]);
}
// These also ask for the lanes after, of the block that the caller comes to next: one cache line of each of many rows is a pattern
// that no hardware prefetcher sees. It matters most for stores, which must own a line before they can change a part of it.
template <class T>
inline vec load_ahead(const T* x, int count) {
    __builtin_prefetch(x + kLanes);
    return load_vec(x, count);
}
template <class T>
inline void store_ahead(T* x, vec v, int count) {
    __builtin_prefetch(x + kLanes, 1);
    store_vec(x, v, count);
}
template <int kBytes = kVectorBytes>
inline real sum_lanes(Vector<kBytes> v) {
    if constexpr (kBytes == sizeof(real)) return v[0];
    else {
        Vector<kBytes / 2> halves[2];
        std::memcpy(halves, &v, kBytes);
        return sum_lanes<kBytes / 2>(halves[0] + halves[1]);
    }
}

// ------------------------------------------------------------------------------------------------------------------
// exp and what is made of it, for V = real (in loops that the compiler vectorises) and V = vec. The C library's expf is not vectorised
// without -ffast-math, which would break NaN and infinity; these have no branch. About 1 ulp. In double: the C library's.
inline int32_t to_bits(float x) { return std::bit_cast<int32_t>(x); }
inline float from_bits(int32_t x) { return std::bit_cast<float>(x); }
inline ivec to_bits(vec x) { return (ivec)x; }
inline vec from_bits(ivec x) { return (vec)x; }
constexpr bool kOwnExp = std::is_same_v<real, float>;
constexpr real kLog2e = real(1.4426950408889634074), kLn2 = real(0.69314718055994530942);
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // n * kLn2High is exact
// Adding 1.5 * 2^23 rounds a float to an integer, which is left in the low bits of the sum.
constexpr float kRound = 12582912.0f;

template <class F>
inline real each_lane(real x, F f) { return f(x); }
template <class F>
inline vec each_lane(vec x, F f) {
    for (int lane = 0; lane < kLanes; lane++) x[lane] = f(x[lane]);
    return x;
}

// 2^r, -1/2 <= r <= 1/2, to 2e-9
template <class V>
inline V exp2_polynomial(V r) {
    return 1.0f + r * (0.6931472028551201f + r * (0.24022647913606357f + r * (0.055503324710391634f +
           r * (0.009618437359971546f + r * (0.0013398874441646605f + r * 0.0001535336134192148f)))));
}
// 2^x for x <= 0, the decay of the scan's state, of which there are B*T*D*N: anything below 2^-126 is 2^-126.
template <class V>
inline V exp2_negative(V x) {
    if constexpr (!kOwnExp) return each_lane(x, [](real x) { return std::exp2(x); });
    else {
        x = x < -126.0f ? -126.0f : x;                      // written so that a NaN stays one
        const V rounded = x + (kRound + 127), n = rounded - (kRound + 127);  // 127, the exponent's bias, goes in for free
        return exp2_polynomial(x - n) * from_bits(to_bits(rounded) << 23);
    }
}
template <class V>
inline V exp(V x) {
    if constexpr (!kOwnExp) return each_lane(x, [](real x) { return std::exp(x); });
    else {
        x = x < -104.0f ? -104.0f : x;  // e^-104 rounds to 0, e^89 to infinity
        x = x > 89.0f ? 89.0f : x;
        const V rounded = x * kLog2e + kRound, n = rounded - kRound, r = x - n * kLn2High - n * kLn2Low;
        const auto exponent = to_bits(rounded) - to_bits(kRound), half = exponent >> 1;  // 2^128 and 2^-140 are no normal numbers
        return exp2_polynomial(r * kLog2e) * from_bits((half + 127) << 23) * from_bits((exponent - half + 127) << 23);
    }
}
template <class V>
inline V sigmoid(V x) {
    if constexpr (!kOwnExp) return 1 / (1 + exp(-x));
    else {  // from e = exp(-|x|), which cannot overflow: half the operations of exp
        V e = x < 0.0f ? x : -x;
        e = e < -87.0f ? -87.0f : e;
        const V rounded = e * kLog2e + (kRound + 127), n = rounded - (kRound + 127);
        e = exp2_polynomial(e * kLog2e - n) * from_bits(to_bits(rounded) << 23);
        return (x < 0.0f ? e : 1.0f) / (1 + e);
    }
}

// k of x = 2^k (1 + f), sqrt(1/2) < 1 + f < sqrt(2)
template <class V>
inline auto log2_floor(V x) { return (to_bits(x) - to_bits(0.70710678f)) >> 23; }
// log(2^k (1 + f)): Cephes' polynomial
template <class V>
inline V log_of(V f, decltype(to_bits(V())) k) {
    const V n = from_bits(k + to_bits(kRound)) - kRound;
    V p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    for (const float c : {1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f,
                          -2.4999993993e-1f, 3.3333331174e-1f})
        p = p * f + c;
    return f + (f * f * (f * p - 0.5f) + n * kLn2Low) + n * kLn2High;
}

// log(1 + exp(x)), with all its digits where that is tiny too
template <class V>
inline V softplus(V x) {
    if constexpr (!kOwnExp) return each_lane(x, [](real x) { return x > 20 ? x : std::log1p(std::exp(x)); });
    else {
        const V e = exp(x), u = 1 + e;
        const auto k = log2_floor(u);
        return x > 20.0f ? x : log_of(from_bits(to_bits(u) - (k << 23)) - 1, k) + (e - (u - 1)) / u;  // plus what rounding took from u
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Memory
void* allocate(size_t bytes, const char* name) {
    constexpr size_t kHugePage = 2 << 20;
    const size_t alignment = bytes >= kHugePage ? kHugePage : kLine;
    const size_t size = (std::max<size_t>(bytes, 1) + alignment - 1) / alignment * alignment;  // 0 if there is no such number
    void* memory = size >= bytes ? std::aligned_alloc(alignment, size) : nullptr;
    if (!memory) fail("cannot allocate %zu bytes for %s: out of memory", bytes, name);
#ifdef MADV_HUGEPAGE
    if (alignment == kHugePage) madvise(memory, size, MADV_HUGEPAGE);  // streams through weights without a TLB miss every 4 KB
#endif
    return memory;
}
void release(void* memory) { std::free(memory); }
void zero(void* memory, size_t bytes, cudaStream_t) {
    const int parts = omp_get_max_threads();
#pragma omp parallel for if (worth_threads(bytes / 8))
    for (int part = 0; part < parts; part++) {
        const Range range(bytes, part, parts, 4096);
        std::fill_n(static_cast<char*>(memory) + range.begin, range.end - range.begin, char(0));
    }
}
void copy(void* to, const void* from, size_t bytes, cudaStream_t) {
    std::copy_n(static_cast<const char*>(from), bytes, static_cast<char*>(to));
}

// ------------------------------------------------------------------------------------------------------------------
// Linear: matrix products of row-major matrices.  op(a) (m, k), op(b) (k, n), c (m, n) = op(a) op(b) + beta c
void gemm(CBLAS_TRANSPOSE a_op, CBLAS_TRANSPOSE b_op, int m, int n, int k, const real* a, int ld_a, const real* b, int ld_b, real beta,
          real* c, int ld_c) {
    if constexpr (std::is_same_v<real, double>)
        cblas_dgemm(CblasRowMajor, a_op, b_op, m, n, k, 1, (const double*)a, ld_a, (const double*)b, ld_b, beta, (double*)c, ld_c);
    else
        cblas_sgemm(CblasRowMajor, a_op, b_op, m, n, k, 1, (const float*)a, ld_a, (const float*)b, ld_b, beta, (float*)c, ld_c);
}

// BLAS has no bfloat16 to rely on: blocks of such matrices are converted. The copies live in buffers that grow to the largest block
// and stay; they are thread_local because experts of different threads use them at the same time.
struct Buffer {
    real* data = nullptr;
    int64_t size = 0;
    ~Buffer() { release(data); }
    real* need(int64_t count) {
        if (count > size) {
            release(data);
            data = static_cast<real*>(allocate(count * sizeof(real), "a block of a matrix in float32"));
            size = count;
        }
        return data;
    }
};
thread_local Buffer out_buffer, in_buffer, weight_buffer;
constexpr int kBlockRows = 1024;
template <class T>
constexpr int block_rows(int rows) { return std::is_same_v<T, real> ? rows : kBlockRows; }

struct Block {
    real* data;
    int ld;
};
// A block of a matrix as reals: the matrix itself if it has them, or else a copy.
template <class T>
Block real_block(Buffer& buffer, const T* x, int ld, int rows, int columns, bool copy = true) {
    if constexpr (std::is_same_v<T, real>) return {const_cast<real*>(x), ld};
    else {
        real* to = buffer.need(int64_t(rows) * columns);
        if (!copy) return {to, columns};
#pragma omp parallel for if (worth_threads(int64_t(rows) * columns))
        for (int r = 0; r < rows; r++)
#pragma omp simd
            for (int c = 0; c < columns; c++) to[int64_t(r) * columns + c] = load(x[int64_t(r) * ld + c]);
        return {to, columns};
    }
}
template <class T>
void write_back(T* x, int ld, Block block, int rows, int columns) {
    if constexpr (!std::is_same_v<T, real>) {
#pragma omp parallel for if (worth_threads(int64_t(rows) * columns))
        for (int r = 0; r < rows; r++)
#pragma omp simd
            for (int c = 0; c < columns; c++) store(x[int64_t(r) * ld + c], block.data[int64_t(r) * block.ld + c]);
    }
}

// A few rows: dot products, each weight read once, in the order of memory, at its speed. The first half of the outputs goes beside the
// second: two streams, because one alone does not keep enough loads in flight.
constexpr int kFewRows = 8;
template <int kRows, class Out, class Weight>
void dot_rows(Out* out, int ld_out, const floatX* in, int ld_in, const Weight* weight, int I, Range outputs, bool accumulate) {
    constexpr int kStreams = 2, kSums = kRows == 1 ? 2 : 1;  // sums of each dot product: one alone would wait for its additions
    const int64_t half = ceil_div(outputs.end - outputs.begin, kStreams);
    for (int64_t o = outputs.begin; o < outputs.begin + half; o++) {
        const int64_t last = outputs.end - 1;  // past it the work is repeated and not stored
        const Weight* w[kStreams] = {weight + o * I, weight + std::min(o + half, last) * I};
        vec sums[kStreams][kRows][kSums] = {};
        const auto add = [&](int i, int sum, auto load) {
#pragma GCC unroll 2
            for (int j = 0; j < kStreams; j++) {
                const vec v = load(w[j] + i);
#pragma GCC unroll 8
                for (int r = 0; r < kRows; r++) sums[j][r][sum] += load(in + int64_t(r) * ld_in + i) * v;
            }
        };
        constexpr int kStep = 2 * kLanes;
        int i = 0;
        for (; i + kStep <= I; i += kStep)
            if constexpr (kMixedPrecision && std::is_same_v<Weight, floatX>) {
                add(i, 0, [](auto* x) { return load_even(x); });
                add(i, kSums - 1, [](auto* x) { return load_odd(x); });
            } else {
                add(i, 0, [](auto* x) { return load_vec(x); });
                add(i + kLanes, kSums - 1, [](auto* x) { return load_vec(x); });
            }
        if (i + kLanes <= I) add(i, 0, [](auto* x) { return load_vec(x); }), i += kLanes;
        if (i < I) add(i, 0, [=](auto* x) { return i > 0 ? load_last(x, I - i) : load_vec(x, I - i); });
#pragma GCC unroll 2
        for (int j = 0; j < kStreams; j++)
#pragma GCC unroll 8
            for (int r = 0; r < kRows; r++)
                if (const int64_t of = o + j * half; of <= last) {
                    Out& y = out[int64_t(r) * ld_out + of];
                    store(y, sum_lanes(sums[j][r][0] + (kSums > 1 ? sums[j][r][kSums - 1] : vec{})) + (accumulate ? load(y) : 0));
                }
    }
}

// out (rows, O) = in (rows, I) W^T (+ out).  Also called from inside parallel regions, where it runs on one thread.
template <class Out, class Weight>
void multiply(Out* out, int ld_out, const floatX* in, int ld_in, const Weight* weight, int rows, int I, int O, bool accumulate) {
    if (rows == 0) return;
    if (rows <= kFewRows) {
        const auto dot = [&]<int... kRows>(std::integer_sequence<int, kRows...>) {
            return std::array{dot_rows<kRows + 1, Out, Weight>...}[rows - 1];
        }(std::make_integer_sequence<int, kFewRows>());
        const int parts = omp_get_max_threads();
#pragma omp parallel for if (worth_threads(int64_t(I) * O))
        for (int part = 0; part < parts; part++) dot(out, ld_out, in, ld_in, weight, I, Range(O, part, parts), accumulate);
        return;
    }
    const int row_step = block_rows<floatX>(rows), out_step = block_rows<Weight>(O);
    for (int r = 0; r < rows; r += row_step) {
        const int block = std::min(row_step, rows - r);
        const Block x = real_block(in_buffer, in + int64_t(r) * ld_in, ld_in, block, I);
        for (int o = 0; o < O; o += out_step) {
            const int outs = std::min(out_step, O - o);
            Out* to = out + int64_t(r) * ld_out + o;
            const Block w = real_block(weight_buffer, weight + int64_t(o) * I, I, outs, I);
            const Block y = real_block(out_buffer, to, ld_out, block, outs, accumulate);
            gemm(CblasNoTrans, CblasTrans, block, outs, I, x.data, x.ld, w.data, w.ld, accumulate, y.data, y.ld);
            write_back(to, ld_out, y, block, outs);
        }
    }
}
// d_in = d_out W (+ d_in), d_weight = d_out^T in (+ d_weight); either may be null.
template <class DOut, class Weight>
void multiply_backward(floatX* d_in, int ld_d_in, real* d_weight, const DOut* d_out, int ld_d_out, const floatX* in, int ld_in,
                       const Weight* weight, int rows, int I, int O, bool accumulate, bool add_weight) {
    const int row_step = block_rows<floatX>(rows), out_step = block_rows<Weight>(O);
    for (int r = 0; r < rows; r += row_step) {
        const int block = std::min(row_step, rows - r);
        Block x{}, d_x{};
        if (d_weight) x = real_block(in_buffer, in + int64_t(r) * ld_in, ld_in, block, I);
        if (d_in) d_x = real_block(out_buffer, d_in + int64_t(r) * ld_d_in, ld_d_in, block, I, accumulate);
        for (int o = 0; o < O; o += out_step) {
            const int outs = std::min(out_step, O - o);
            thread_local Buffer d_out_buffer;
            const Block d = real_block(d_out_buffer, d_out + int64_t(r) * ld_d_out + o, ld_d_out, block, outs);
            if (d_in) {
                const Block w = real_block(weight_buffer, weight + int64_t(o) * I, I, outs, I);
                gemm(CblasNoTrans, CblasNoTrans, block, I, outs, d.data, d.ld, w.data, w.ld, accumulate || o > 0, d_x.data, d_x.ld);
            }
            if (d_weight)
                gemm(CblasTrans, CblasNoTrans, outs, I, block, d.data, d.ld, x.data, x.ld, add_weight || r > 0,
                     d_weight + int64_t(o) * I, I);
        }
        if (d_in) write_back(d_in + int64_t(r) * ld_d_in, ld_d_in, d_x, block, I);
    }
}
void linear_forward(floatX* out, int ld_out, const Linear& l, bool accumulate, cudaStream_t) {
    multiply(out, ld_out, l.in, l.ld_in, l.weight, l.rows, l.I, l.O, accumulate);
}
void linear_backward(floatX* d_in, int ld_d_in, real* d_weight, const floatX* d_out, int ld_d_out, const Linear& l, bool accumulate,
                     bool add_weight, cudaStream_t) {
    multiply_backward(d_in, ld_d_in, d_weight, d_out, ld_d_out, l.in, l.ld_in, l.weight, l.rows, l.I, l.O, accumulate, add_weight);
}

// ------------------------------------------------------------------------------------------------------------------
// Activations
void swiglu_forward(floatX* out, const floatX* gate_up, int rows, int F, cudaStream_t) {
#pragma omp parallel for if (worth_threads(int64_t(rows) * F))
    for (int r = 0; r < rows; r++) {
        const floatX *gate = gate_up + int64_t(r) * 2 * F, *up = gate + F;
        floatX* to = out + int64_t(r) * F;
#pragma omp simd
        for (int f = 0; f < F; f++) {
            const real g = load(gate[f]);
            store(to[f], g * sigmoid(g) * load(up[f]));
        }
    }
}
void swiglu_backward(floatX* d_gate_up, const floatX* d_out, const floatX* gate_up, int rows, int F, cudaStream_t) {
#pragma omp parallel for if (worth_threads(int64_t(rows) * F))
    for (int r = 0; r < rows; r++) {
        const floatX *gate = gate_up + int64_t(r) * 2 * F, *up = gate + F, *d = d_out + int64_t(r) * F;
        floatX *d_gate = d_gate_up + int64_t(r) * 2 * F, *d_up = d_gate + F;
#pragma omp simd
        for (int f = 0; f < F; f++) {
            const real g = load(gate[f]), s = sigmoid(g), d_f = load(d[f]);
            store(d_gate[f], d_f * load(up[f]) * s * (1 + g * (1 - s)));
            store(d_up[f], d_f * g * s);
        }
    }
}
// Written so that a NaN stays one.
void relu_forward(floatX* out, const floatX* in, int64_t count, cudaStream_t) {
#pragma omp parallel for simd if (parallel : worth_threads(count))
    for (int64_t i = 0; i < count; i++) {
        const real x = load(in[i]);
        store(out[i], x < 0 ? 0 : x);
    }
}
void relu_backward(floatX* d_in, const floatX* d_out, const floatX* in, int64_t count, cudaStream_t) {
#pragma omp parallel for simd if (parallel : worth_threads(count))
    for (int64_t i = 0; i < count; i++) store(d_in[i], load(in[i]) <= 0 ? 0 : load(d_out[i]));
}

// ------------------------------------------------------------------------------------------------------------------
// RMSNorm fused with the residual add
void rmsnorm_forward(floatX* out, real* sum, real* rstd, const real* residual, const floatX* branch, const real* weight, int rows, int C,
                     real eps, cudaStream_t) {
#pragma omp parallel for if (worth_threads(int64_t(rows) * C))
    for (int r = 0; r < rows; r++) {
        const int64_t row = int64_t(r) * C;
        real squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int c = 0; c < C; c++) {
            const real x = branch ? residual[row + c] + load(branch[row + c]) : residual[row + c];
            sum[row + c] = x;
            squares += x * x;
        }
        const real scale = 1 / std::sqrt(squares / C + eps);
        rstd[r] = scale;
#pragma omp simd
        for (int c = 0; c < C; c++) store(out[row + c], sum[row + c] * scale * weight[c]);
    }
}

// In scratch: (threads, stride), each part's sum over its rows.
int64_t rmsnorm_stride(int C) { return round_up(C, kLine / sizeof(real)); }
size_t rmsnorm_scratch(int, int C) { return cut_bytes<real>(omp_get_max_threads() * rmsnorm_stride(C)); }
void rmsnorm_backward(real* d_sum, floatX* d_branch, real* d_weight, const floatX* d_out, const real* sum, const real* rstd,
                      const real* weight, void* scratch, int rows, int C, cudaStream_t) {
    if (rows == 0) return;
    const int parts = omp_get_max_threads();
    const int64_t stride = rmsnorm_stride(C);
    real* const d_weight_parts = Cutter(scratch).cut<real>(parts * stride);
#pragma omp parallel for if (worth_threads(int64_t(rows) * C))
    for (int part = 0; part < parts; part++) {
        real* d_weight_part = d_weight_parts + part * stride;
        std::fill_n(d_weight_part, C, real(0));
        const Range range(rows, part, parts);
        for (int64_t r = range.begin; r < range.end; r++) {
            const int64_t row = r * C;
            real dot = 0;  // of the gradient of x * rstd with x
#pragma omp simd reduction(+ : dot)
            for (int c = 0; c < C; c++) dot += load(d_out[row + c]) * weight[c] * sum[row + c];
            const real mean = dot * rstd[r] * rstd[r] / C;
#pragma omp simd
            for (int c = 0; c < C; c++) {
                const real x = sum[row + c], d = load(d_out[row + c]);
                d_weight_part[c] += d * x * rstd[r];
                const real d_x = d_sum[row + c] + rstd[r] * (d * weight[c] - x * mean);
                d_sum[row + c] = d_x;
                if (d_branch) store(d_branch[row + c], d_x);
            }
        }
    }
    for (int part = 0; part < parts; part++)
#pragma omp simd
        for (int c = 0; c < C; c++) d_weight[c] += d_weight_parts[part * stride + c];
}

// ------------------------------------------------------------------------------------------------------------------
// RMSNorm of slices
real slice_rstd(const floatX* in, int C, real eps) {
    real squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int c = 0; c < C; c++) squares += load(in[c]) * load(in[c]);
    return 1 / std::sqrt(squares / C + eps);
}
void slice_norm_forward(floatX* out, int ld_out, const SliceNorm& n, cudaStream_t) {
#pragma omp parallel for if (worth_threads(int64_t(n.rows) * n.C))
    for (int64_t r = 0; r < n.rows; r++) {
        const floatX* const in = n.in + r * n.ld_in;
        const real rstd = slice_rstd(in, n.C, n.eps);
#pragma omp simd
        for (int c = 0; c < n.C; c++) store(out[r * ld_out + c], load(in[c]) * rstd * n.weight[c]);
    }
}
void slice_norm_backward(floatX* d_in, real* d_weight, const floatX* d_out, int ld_d_out, const SliceNorm& n, void* scratch, cudaStream_t) {
    if (n.rows == 0) return;
    const int parts = omp_get_max_threads(), C = n.C;
    const int64_t stride = rmsnorm_stride(C);
    real* const sums = Cutter(scratch).cut<real>(parts * stride);
#pragma omp parallel for if (worth_threads(int64_t(n.rows) * C))
    for (int part = 0; part < parts; part++) {
        real* const sum = sums + part * stride;
        std::fill_n(sum, C, real(0));
        const Range rows(n.rows, part, parts);
        for (int64_t r = rows.begin; r < rows.end; r++) {
            const floatX *const in = n.in + r * n.ld_in, *const d = d_out + r * ld_d_out;
            const real rstd = slice_rstd(in, C, n.eps);
            real dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int c = 0; c < C; c++) dot += load(d[c]) * n.weight[c] * load(in[c]);
            const real pull = dot * rstd * rstd / C;
#pragma omp simd
            for (int c = 0; c < C; c++) {
                sum[c] += load(d[c]) * load(in[c]) * rstd;
                store(d_in[r * n.ld_in + c], rstd * (load(d[c]) * n.weight[c] - load(in[c]) * pull));
            }
        }
    }
    for (int part = 0; part < parts; part++)
        for (int c = 0; c < C; c++) d_weight[c] += sums[part * stride + c];
}

// ------------------------------------------------------------------------------------------------------------------
// Embedding
void embedding_forward(real* out, const int* tokens, const floatX* table, int rows, int C, cudaStream_t) {
#pragma omp parallel for if (worth_threads(int64_t(rows) * C))
    for (int r = 0; r < rows; r++) {
        const int64_t from = int64_t(tokens[r]) * C, to = int64_t(r) * C;
        for (int c = 0; c < C; c++) out[to + c] = load(table[from + c]);
    }
}
// Each thread has some of the channels, of all rows: rows of one token are added in order, whatever the number of threads.
void embedding_backward(real* d_table, const real* d_out, const int* tokens, void*, int rows, int, int C, cudaStream_t) {
    const int parts = omp_get_max_threads();
#pragma omp parallel for if (worth_threads(int64_t(rows) * C))
    for (int part = 0; part < parts; part++) {
        const Range channels(C, part, parts, kLine / sizeof(real));
        for (int r = 0; r < rows; r++) {
            const int64_t from = int64_t(r) * C, to = int64_t(tokens[r]) * C;
#pragma omp simd
            for (int64_t c = channels.begin; c < channels.end; c++) d_table[to + c] += d_out[from + c];
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Causal depthwise convolution and SiLU. The work is cut into (sequence, tile of channels); a tile walks through time with the
// inputs of the last steps in a ring.
constexpr int kConvTile = 128;
struct ConvTile {
    int D, W, d, count;  // channels d .. d + count - 1
    real weight[kMaxConv][kConvTile], bias[kConvTile], x[kMaxConv][kConvTile], a[kConvTile];

    // The smallest tiles are a cache line, the largest stay in L1 with room to spare.
    static int width(int B, int D) {
        return std::clamp<int>(round_up(ceil_div(int64_t(B) * D, omp_get_max_threads()), kLanes), kLanes, kConvTile);
    }
    ConvTile(const Conv& conv, int b, int d, int width) : D(conv.D), W(conv.W), d(d), count(std::min(width, D - d)) {
        for (int c = 0; c < count; c++) {
            bias[c] = conv.bias[d + c];
            for (int w = 0; w < W; w++) weight[w][c] = conv.weight[int64_t(d + c) * W + w];
        }
        for (int j = 0; j < W - 1; j++)
            for (int c = 0; c < count; c++) x[slot(j - (W - 1))][c] = conv.initial_state ? conv.initial_state[state(b, j) + c] : 0;
    }
    static int slot(int t) { return (t + kMaxConv) % kMaxConv; }                  // of step t >= -kMaxConv in the ring
    int64_t state(int b, int j) const { return (int64_t(b) * (W - 1) + j) * D + d; }  // where step j of the states begins
    void step(int t, const floatX* in) {  // a = bias + sum of weight * input
        real* newest = x[slot(t)];
#pragma omp simd
        for (int c = 0; c < count; c++) {
            newest[c] = load(in[c]);
            a[c] = bias[c] + weight[W - 1][c] * newest[c];
        }
        for (int w = 0; w < W - 1; w++) {
            const real* older = x[slot(t - (W - 1) + w)];
#pragma omp simd
            for (int c = 0; c < count; c++) a[c] += weight[w][c] * older[c];
        }
    }
};
void conv_forward(floatX* out, real* final_state, const Conv& conv, cudaStream_t) {
    const int B = conv.B, T = conv.T, D = conv.D, W = conv.W;
    if (T == 0) return;
    const int width = ConvTile::width(B, D);
#pragma omp parallel for collapse(2) if (worth_threads(int64_t(B) * T * D))
    for (int b = 0; b < B; b++)
        for (int d = 0; d < D; d += width) {
            ConvTile tile(conv, b, d, width);
            for (int t = 0; t < T; t++) {
                const int64_t row = int64_t(b) * T + t;
                tile.step(t, conv.in + row * conv.ld_in + d);
#pragma omp simd
                for (int c = 0; c < tile.count; c++) store(out[row * D + d + c], tile.a[c] * sigmoid(tile.a[c]));
            }
            for (int j = 0; j < W - 1 && final_state; j++)
                std::copy_n(tile.x[tile.slot(T - (W - 1) + j)], tile.count, final_state + tile.state(b, j));
        }
}

// In scratch: (B, W + 1, D), each sequence's gradients of the weights and, last, of the bias.
size_t conv_scratch(int B, int, int D, int W) { return cut_bytes<real>(int64_t(B) * (W + 1) * D); }
void conv_backward(const ConvGradients& out, const floatX* d_out, const real* d_final_state, const Conv& conv, void* scratch,
                   cudaStream_t) {
    const int B = conv.B, T = conv.T, D = conv.D, W = conv.W;
    if (T == 0) return;
    real* const sums = Cutter(scratch).cut<real>(int64_t(B) * (W + 1) * D);
    const int width = ConvTile::width(B, D);
#pragma omp parallel for collapse(2) if (worth_threads(int64_t(B) * T * D))
    for (int b = 0; b < B; b++)
        for (int d = 0; d < D; d += width) {
            ConvTile tile(conv, b, d, width);
            const int count = tile.count;
            real d_x[kMaxConv][kConvTile] = {}, d_w[kMaxConv + 1][kConvTile] = {}, d_a[kConvTile];
            // Step t (negative: of the initial state) has all its gradients once step t + W - 1 is done; its place is then free.
            const auto finish = [&](int t) {
                real* d = d_x[tile.slot(t)];
                if (const int j = t - (T - (W - 1)); j >= 0 && d_final_state)
                    for (int c = 0; c < count; c++) d[c] += d_final_state[tile.state(b, j) + c];
                if (t >= 0)
                    for (int c = 0; c < count; c++) store(out.d_in[(int64_t(b) * T + t) * conv.ld_in + tile.d + c], d[c]);
                else if (out.d_initial_state)
                    std::copy_n(d, count, out.d_initial_state + tile.state(b, t + W - 1));
                std::fill_n(d, count, real(0));
            };
            for (int t = 0; t < T; t++) {
                const int64_t row = int64_t(b) * T + t;
                tile.step(t, conv.in + row * conv.ld_in + d);
#pragma omp simd
                for (int c = 0; c < count; c++) {
                    const real gate = sigmoid(tile.a[c]);
                    d_a[c] = load(d_out[row * D + d + c]) * gate * (1 + tile.a[c] * (1 - gate));
                    d_w[W][c] += d_a[c];
                }
                for (int w = 0; w < W; w++) {
                    const int slot = tile.slot(t - (W - 1) + w);
#pragma omp simd
                    for (int c = 0; c < count; c++) {
                        d_w[w][c] += d_a[c] * tile.x[slot][c];
                        d_x[slot][c] += d_a[c] * tile.weight[w][c];
                    }
                }
                finish(t - (W - 1));
            }
            for (int t = T - (W - 1); t < T; t++) finish(t);
            for (int w = 0; w <= W; w++) std::copy_n(d_w[w], count, sums + (int64_t(b) * (W + 1) + w) * D + d);
        }
#pragma omp parallel for if (worth_threads(int64_t(B) * W * D))
    for (int first = 0; first < D; first += kConvTile)
        for (int b = 0; b < B; b++)
            for (int w = 0; w <= W; w++)
                for (int d = first; d < std::min(D, first + kConvTile); d++)
                    (w < W ? out.d_weight[int64_t(d) * W + w] : out.d_bias[d]) += sums[(int64_t(b) * (W + 1) + w) * D + d];
}

// ------------------------------------------------------------------------------------------------------------------
// Selective scan. A block is kLanes channels, one in each lane, with all N states: B_t[n] and C_t[n] are broadcast to all lanes and
// nothing is summed across lanes but the gradients of B_t and C_t. The decay is exp(delta A) = 2^(delta A log2(e)); "A" below is
// A log2(e), hence a factor ln 2 in its gradients.
//
// Threads share sequences x blocks. Where these are too few, time is cut into segments too: a first pass runs each
// segment from a zero state; since the state is linear in where it started, h_end = (product of decays) h_start + that, and the
// product is 2^(A * sum of delta), the segments' true starts follow one by one; the second pass is the ordinary one.
// The backward pass does the same to the gradient of the state, from the end of time.
struct ScanScratch {
    int threads = omp_get_max_threads(), blocks, segments, segment_steps, groups;
    vec* h;           // (B, segments, blocks, N): forward, the state; backward, the gradient of the state from later steps
    vec* local;       // (B, segments, blocks, N): backward, what a segment adds to it
    vec* delta_sum;   // (B, segments, blocks)
    vec* d_params;    // (B, segments, blocks, N + 2): backward, each segment's sums of d_A, d_skip, d_dt_bias
    vec* chunk_d_BC;  // (threads, N, kScanChunk, 2): backward, d_B and d_C of one chunk, a group's sum in each lane
    real* d_BC;       // (groups, B, T, 2N): backward, each group's sum over its channels
    int64_t chunk_d_BC_size;

    explicit ScanScratch(int D) : blocks(ceil_div(D, kLanes)) {}
    ScanScratch(void* scratch, int B, int T, int D, int N) : ScanScratch(D) {
        segment_steps = ceil_div(scan_chunks(T), most_segments(B, T)) * kScanChunk;
        segments = ceil_div(T, segment_steps);
        groups = fewest_groups(int64_t(B) * segments);
        cut(scratch, int64_t(B) * segments * blocks, int64_t(groups) * B * T, N);
    }
    int64_t most_segments(int64_t B, int T) const { return std::clamp<int64_t>(threads / (B * blocks), 1, scan_chunks(T)); }
    // The blocks of a group take turns chunk by chunk, and share the sums of d_B and d_C: the fewest groups that keep the threads busy.
    int fewest_groups(int64_t segments_of_all) const {
        const auto busy = [&](int64_t units) { return units >= 0.9 * double(round_up(units, threads)); };
        int n = 1;
        while (n < blocks && !busy(segments_of_all * n)) n++;
        return n;
    }
    size_t cut(void* scratch, int64_t units, int64_t group_rows, int N) {
        Cutter cutter(scratch);
        chunk_d_BC_size = int64_t(N) * kScanChunk * 2;
        h = cutter.cut<vec>(units * N);
        delta_sum = cutter.cut<vec>(units);
        local = cutter.cut<vec>(units * N);
        d_params = cutter.cut<vec>(units * (N + 2));
        chunk_d_BC = cutter.cut<vec>(threads * chunk_d_BC_size);
        d_BC = cutter.cut<real>(group_rows * 2 * N);
        return cutter.bytes();
    }
};
// Segments and groups can become fewer as B or T grows. The most of any B and T up to these: B * segments * blocks is at most the larger
// of B * blocks and the number of threads; groups are tried for every number of segments.
size_t scan_scratch(int B, int T, int D, int N) {
    ScanScratch s(D);
    int64_t groups = 0;  // of all sequences
    for (int b = 1; b <= B && T > 0; b++)
        for (int64_t segments = s.most_segments(b, T); segments > 0; segments--)
            groups = std::max(groups, b * int64_t(s.fewest_groups(b * segments)));
    return s.cut(nullptr, std::max<int64_t>(int64_t(B) * s.blocks, s.threads), groups * T, N);
}

// The channels of one block, and what depends on them alone.
struct ScanBlock {
    int d, count, N;  // channels d .. d + count - 1; lanes past them are zero and stay so
    vec skip, dt_bias, A[kMaxStates];
    ScanBlock(int block, const Scan& s)
        : d(block * kLanes), count(std::min(kLanes, s.D - d)), N(s.N), skip(load_vec(s.skip + d, count)),
          dt_bias(load_vec(s.dt_bias + d, count)) {
        load_state(A, s.A_log + int64_t(d) * N);
        for (int n = 0; n < N; n++) A[n] = exp(A[n]) * -kLog2e;
    }
    // (channels, N) in memory, (N, lanes) here; from null: zeros, to null: nothing
    void load_state(vec* state, const real* from) const { load_rows(state, from, N); }
    void store_state(real* to, const vec* state) const { store_rows(to, state, N); }
    void load_rows(vec* state, const real* from, int width) const {
        real* to = reinterpret_cast<real*>(state);
        if (count < kLanes || !from) std::fill_n(state, width, vec{});
        for (int lane = 0; lane < count && from; lane++)
            for (int n = 0; n < width; n++) to[n * kLanes + lane] = from[int64_t(lane) * width + n];
    }
    void store_rows(real* to, const vec* state, int width) const {
        const real* from = reinterpret_cast<const real*>(state);
        for (int lane = 0; lane < count && to; lane++)
            for (int n = 0; n < width; n++) to[int64_t(lane) * width + n] = from[n * kLanes + lane];
    }
};
inline real* offset_or_null(real* x, int64_t offset) { return x ? x + offset : nullptr; }
inline const real* offset_or_null(const real* x, int64_t offset) { return x ? x + offset : nullptr; }

// What a block needs of each step besides the states, for up to one chunk. It is computed ahead of the recurrence, where
// steps do not wait for one another.
struct ScanSteps {
    int count;
    vec u[kScanChunk], delta[kScanChunk], delta_u[kScanChunk];
    ScanSteps(const ScanBlock& block, const Scan& s, int64_t first_row, int count) : count(count) {
        for (int t = 0; t < count; t++) {
            const int64_t at = (first_row + t) * s.D + block.d;
            u[t] = load_ahead(s.u + at, block.count);
            delta[t] = softplus(load_ahead(s.dt + at, block.count) + block.dt_bias);
            delta_u[t] = delta[t] * u[t];
        }
    }
};

// One step: there is no time to walk along, so the lanes take the states of a channel, which lie side by side in memory.
void scan_step(floatX* out, real* final_state, real* chunk_states, const Scan& s) {
    const int B = s.B, D = s.D, N = s.N;
#pragma omp parallel for collapse(2) if (worth_threads(int64_t(B) * D * N))
    for (int b = 0; b < B; b++)
        for (int first = 0; first < D; first += kLanes) {
            const int channels = std::min(kLanes, D - first);
            const int64_t at = int64_t(b) * D + first;
            const vec u_d = load_vec(s.u + at, channels), z_d = load_vec(s.z + int64_t(b) * s.ld_z + first, channels);
            const vec delta = softplus(load_vec(s.dt + at, channels) + load_vec(s.dt_bias + first, channels)), delta_u = delta * u_d;
            vec y = load_vec(s.skip + first, channels) * u_d;
            for (int lane = 0; lane < channels; lane++) {
                vec sum = {};
                for (int n = 0; n < N; n += kLanes) {
                    const int states = std::min(kLanes, N - n);
                    const int64_t state = (at + lane) * N + n, bc = int64_t(b) * s.ld_bc + n;
                    const vec A = exp(load_vec(s.A_log + int64_t(first + lane) * N + n, states)) * -kLog2e;
                    vec h = s.initial_state ? load_vec(s.initial_state + state, states) : vec{};
                    if (chunk_states) store_vec(chunk_states + state, h, states);
                    h = exp2_negative(delta[lane] * A) * h + delta_u[lane] * load_vec(s.B_t + bc, states);
                    if (final_state) store_vec(final_state + state, h, states);
                    sum += h * load_vec(s.C_t + bc, states);
                }
                y[lane] += sum_lanes(sum);
            }
            store_vec(out + at, y * z_d * sigmoid(z_d), channels);
        }
}

void scan_forward(floatX* out, real* final_state, real* chunk_states, const Scan& s, void* scratch, cudaStream_t) {
    const int B = s.B, T = s.T, D = s.D, N = s.N;
    if (B == 0 || T == 0) return;
    if (T == 1) return scan_step(out, final_state, chunk_states, s);
    const ScanScratch w(scratch, B, T, D, N);
    const bool parallel = worth_threads(int64_t(B) * T * D * N);

    if (w.segments > 1) {
#pragma omp parallel for collapse(3) if (parallel)
        for (int b = 0; b < B; b++)
            for (int segment = 0; segment < w.segments - 1; segment++)
                for (int i = 0; i < w.blocks; i++) {
                    const ScanBlock block(i, s);
                    const int64_t unit = (int64_t(b) * w.segments + segment) * w.blocks + i;
                    vec *h = w.h + unit * N, delta_sum = {};
                    std::fill_n(h, N, vec{});
                    for (int begin = segment * w.segment_steps; begin < (segment + 1) * w.segment_steps; begin += kScanChunk) {
                        const int64_t row = int64_t(b) * T + begin;
                        const ScanSteps steps(block, s, row, kScanChunk);
                        for (int t = 0; t < steps.count; t++) {
                            const floatX* b_t = s.B_t + (row + t) * s.ld_bc;
                            for (int n = 0; n < N; n++)
                                h[n] = exp2_negative(steps.delta[t] * block.A[n]) * h[n] + steps.delta_u[t] * load(b_t[n]);
                            delta_sum += steps.delta[t];
                        }
                    }
                    w.delta_sum[unit] = delta_sum;
                }
#pragma omp parallel for collapse(2) if (parallel)
        for (int b = 0; b < B; b++)
            for (int i = 0; i < w.blocks; i++) {
                const ScanBlock block(i, s);
                vec start[kMaxStates];
                block.load_state(start, offset_or_null(s.initial_state, (int64_t(b) * D + block.d) * N));
                for (int segment = 0; segment < w.segments; segment++) {  // the place of each local end takes the true start
                    const int64_t unit = (int64_t(b) * w.segments + segment) * w.blocks + i;
                    for (int n = 0; n < N; n++) {
                        const vec end = exp2_negative(w.delta_sum[unit] * block.A[n]) * start[n] + w.h[unit * N + n];
                        w.h[unit * N + n] = start[n];
                        start[n] = end;
                    }
                }
            }
    }

#pragma omp parallel for collapse(3) if (parallel)
    for (int b = 0; b < B; b++)
        for (int segment = 0; segment < w.segments; segment++)
            for (int group = 0; group < w.groups; group++) {
                const Range members(w.blocks, group, w.groups);
                const int begin = segment * w.segment_steps, end = std::min(T, begin + w.segment_steps);
                for (int64_t chunk = begin / kScanChunk; chunk * kScanChunk < end; chunk++) {
                    const int64_t row = int64_t(b) * T + chunk * kScanChunk;
                    const int count = std::min<int>(kScanChunk, end - chunk * kScanChunk);
                    for (int64_t i = members.begin; i < members.end; i++) {
                        const ScanBlock block(i, s);
                        const ScanSteps steps(block, s, row, count);
                        const int64_t d = block.d;
                        vec *h = w.h + ((int64_t(b) * w.segments + segment) * w.blocks + i) * N, y[kScanChunk];
                        if (chunk == 0) block.load_state(h, offset_or_null(s.initial_state, (int64_t(b) * D + d) * N));
                        block.store_state(offset_or_null(chunk_states, ((b * scan_chunks(T) + chunk) * D + d) * N), h);
                        for (int t = 0; t < count; t++) {
                            const floatX *b_t = s.B_t + (row + t) * s.ld_bc, *c_t = s.C_t + (row + t) * s.ld_bc;
                            const vec delta = steps.delta[t], delta_u = steps.delta_u[t];
                            vec sum = block.skip * steps.u[t];
                            for (int n = 0; n < N; n++) {
                                h[n] = exp2_negative(delta * block.A[n]) * h[n] + delta_u * load(b_t[n]);
                                sum += h[n] * load(c_t[n]);
                            }
                            y[t] = sum;
                        }
                        for (int t = 0; t < count; t++) {
                            const vec z_t = load_ahead(s.z + (row + t) * s.ld_z + d, block.count);
                            store_ahead(out + (row + t) * D + d, y[t] * z_t * sigmoid(z_t), block.count);
                        }
                        if (chunk == scan_chunks(T) - 1)
                            block.store_state(offset_or_null(final_state, (int64_t(b) * D + d) * N), h);
                    }
                }
            }
}

// Gradients of B_t and C_t, which all channels share. Of one chunk, to (count, 2, N), from pairs of d_BC so far apart:
void sum_channels(real* to, const vec* d_BC, int count, int N, int from_step_to_step, int from_state_to_state) {
    for (int t = 0; t < count; t++)
        for (int n = 0; n < N; n++)
            for (int of : {0, 1})
                to[(2 * t + of) * N + n] = sum_lanes(d_BC[(t * from_step_to_step + n * from_state_to_state) * 2 + of]);
}
// from d_BC (groups, B, T, 2, N):
void sum_groups(const ScanGradients& out, const real* d_BC, int groups, const Scan& s) {
    const int64_t rows = int64_t(s.B) * s.T, N = s.N;
#pragma omp parallel for if (worth_threads(rows * 2 * N * groups))
    for (int64_t row = 0; row < rows; row++)
        for (int n = 0; n < N; n++) {
            real d_b = 0, d_c = 0;
            for (int group = 0; group < groups; group++) {
                const real* from = d_BC + (group * rows + row) * 2 * N;
                d_b += from[n];
                d_c += from[N + n];
            }
            store(out.d_B_t[row * s.ld_bc + n], d_b);
            store(out.d_C_t[row * s.ld_bc + n], d_c);
        }
}
void scan_backward(const ScanGradients& out, const floatX* d_out, const real* d_final_state, const Scan& s, const real* chunk_states,
                   void* scratch, cudaStream_t) {
    const int B = s.B, T = s.T, D = s.D, N = s.N;
    if (B == 0 || T == 0) return;
    const ScanScratch w(scratch, B, T, D, N);
    const bool parallel = worth_threads(int64_t(B) * T * D * N);

    if (w.segments > 1) {
#pragma omp parallel for collapse(3) if (parallel)
        for (int b = 0; b < B; b++)
            for (int segment = 1; segment < w.segments; segment++)
                for (int i = 0; i < w.blocks; i++) {
                    const ScanBlock block(i, s);
                    const int64_t unit = (int64_t(b) * w.segments + segment) * w.blocks + i;
                    const int end = std::min(T, (segment + 1) * w.segment_steps);
                    vec *dh = w.local + unit * N, delta_sum = {};
                    std::fill_n(dh, N, vec{});
                    for (int begin = (end - 1) / kScanChunk * kScanChunk; begin >= segment * w.segment_steps; begin -= kScanChunk) {
                        const int64_t row = int64_t(b) * T + begin;
                        const ScanSteps steps(block, s, row, std::min(kScanChunk, end - begin));
                        for (int t = steps.count - 1; t >= 0; t--) {
                            const floatX* c_t = s.C_t + (row + t) * s.ld_bc;
                            const vec z_t = load_vec(s.z + (row + t) * s.ld_z + block.d, block.count);
                            const vec g = load_vec(d_out + (row + t) * D + block.d, block.count) * z_t * sigmoid(z_t);
                            for (int n = 0; n < N; n++)
                                dh[n] = exp2_negative(steps.delta[t] * block.A[n]) * (dh[n] + g * load(c_t[n]));
                            delta_sum += steps.delta[t];
                        }
                    }
                    w.delta_sum[unit] = delta_sum;
                }
    }
#pragma omp parallel for collapse(2) if (parallel)
    for (int b = 0; b < B; b++)
        for (int i = 0; i < w.blocks; i++) {
            const ScanBlock block(i, s);
            const int64_t last = (int64_t(b) * w.segments + w.segments - 1) * w.blocks + i;
            block.load_state(w.h + last * N, offset_or_null(d_final_state, (int64_t(b) * D + block.d) * N));
            for (int segment = w.segments - 1; segment > 0; segment--) {
                const int64_t unit = (int64_t(b) * w.segments + segment) * w.blocks + i;
                for (int n = 0; n < N; n++)
                    w.h[(unit - w.blocks) * N + n] =
                        exp2_negative(w.delta_sum[unit] * block.A[n]) * w.h[unit * N + n] + w.local[unit * N + n];
            }
        }

#pragma omp parallel for collapse(3) if (parallel)
    for (int b = 0; b < B; b++)
        for (int segment = 0; segment < w.segments; segment++)
            for (int group = 0; group < w.groups; group++) {
                const Range members(w.blocks, group, w.groups);
                const int64_t first_unit = (int64_t(b) * w.segments + segment) * w.blocks;
                std::fill_n(w.d_params + (first_unit + members.begin) * (N + 2), (members.end - members.begin) * (N + 2), vec{});
                vec* d_BC = w.chunk_d_BC + omp_get_thread_num() * w.chunk_d_BC_size;
                const int begin = segment * w.segment_steps, end = std::min(T, begin + w.segment_steps);
                for (int64_t chunk = (end - 1) / kScanChunk; chunk >= begin / kScanChunk; chunk--) {
                    const int64_t row = int64_t(b) * T + chunk * kScanChunk;
                    const int count = std::min<int>(kScanChunk, end - chunk * kScanChunk);
                    std::fill_n(d_BC, w.chunk_d_BC_size, vec{});
                    for (int64_t i = members.begin; i < members.end; i++) {
                        const ScanBlock block(i, s);
                        const ScanSteps steps(block, s, row, count);
                        const int d = block.d;
                        vec start[kMaxStates], g[kScanChunk], y[kScanChunk], dh_B[kScanChunk] = {}, dh_A[kScanChunk] = {};
                        block.load_state(start, chunk_states + ((b * scan_chunks(T) + chunk) * D + d) * N);
                        for (int t = 0; t < count; t++) {
                            const vec z_t = load_ahead(s.z + (row + t) * s.ld_z + d, block.count);
                            g[t] = load_ahead(d_out + (row + t) * D + d, block.count) * z_t * sigmoid(z_t);
                            y[t] = block.skip * steps.u[t];
                        }

                        vec* d_params = w.d_params + (first_unit + i) * (N + 2);
                        // kStates states at a time: their part of the chunk stays in L1, their sums in registers.
                        const auto states = [&]<int kStates>(int first) {
                            vec decays[kScanChunk][kStates];   // a_t
                            vec decayed[kScanChunk][kStates];  // a_t h_{t-1} itself: recovered as h_t - delta u B it would cancel
                            vec h[kStates], dh[kStates], d_A[kStates] = {}, *later = w.h + (first_unit + i) * N + first;
                            std::copy_n(start + first, kStates, h);
                            std::copy_n(later, kStates, dh);
                            for (int t = 0; t < count; t++) {
                                const floatX* b_t = s.B_t + (row + t) * s.ld_bc + first;
                                for (int n = 0; n < kStates; n++) {
                                    decays[t][n] = exp2_negative(steps.delta[t] * block.A[first + n]);
                                    decayed[t][n] = decays[t][n] * h[n];
                                    h[n] = decayed[t][n] + steps.delta_u[t] * load(b_t[n]);
                                }
                            }
                            for (int t = count - 1; t >= 0; t--) {
                                const floatX *b_t = s.B_t + (row + t) * s.ld_bc + first, *c_t = s.C_t + (row + t) * s.ld_bc + first;
                                for (int n = 0; n < kStates; n++) {
                                    const real b_n = load(b_t[n]), c_n = load(c_t[n]);
                                    const vec h_t = decayed[t][n] + steps.delta_u[t] * b_n;
                                    dh[n] += g[t] * c_n;
                                    const vec dh_decayed = dh[n] * decayed[t][n];
                                    vec* d_bc = d_BC + ((first + n) * kScanChunk + t) * 2;
                                    d_bc[0] += dh[n] * steps.delta_u[t];
                                    d_bc[1] += g[t] * h_t;
                                    y[t] += h_t * c_n;
                                    dh_B[t] += dh[n] * b_n;
                                    dh_A[t] += dh_decayed * block.A[first + n];
                                    d_A[n] += dh_decayed * steps.delta[t];
                                    dh[n] *= decays[t][n];
                                }
                            }
                            std::copy_n(dh, kStates, later);
                            for (int n = 0; n < kStates; n++) d_params[first + n] += d_A[n];
                        };
                        int n = 0;
                        for (; n + 4 <= N; n += 4) states.template operator()<4>(n);
                        for (; n < N; n++) states.template operator()<1>(n);
                        if (chunk == 0)
                            block.store_state(offset_or_null(out.d_initial_state, (int64_t(b) * D + d) * N), w.h + (first_unit + i) * N);

                        for (int t = 0; t < count; t++) {
                            const int64_t at = (row + t) * D + d, at_z = (row + t) * s.ld_z + d;
                            const vec raw = load_vec(s.dt + at, block.count) + block.dt_bias;
                            const vec d_raw = (steps.u[t] * dh_B[t] + kLn2 * dh_A[t]) * (raw > 20 ? 1 : sigmoid(raw));
                            const vec z_t = load_vec(s.z + at_z, block.count), gate = sigmoid(z_t);
                            d_params[N] += g[t] * steps.u[t];
                            d_params[N + 1] += d_raw;
                            store_ahead(out.d_dt + at, d_raw, block.count);
                            store_ahead(out.d_u + at, block.skip * g[t] + steps.delta[t] * dh_B[t], block.count);
                            const vec d_silu = gate * (1 + z_t * (1 - gate));
                            store_ahead(out.d_z + at_z, load_vec(d_out + at, block.count) * y[t] * d_silu, block.count);
                        }
                    }
                    sum_channels(w.d_BC + (int64_t(group) * B * T + row) * 2 * N, d_BC, count, N, 1, kScanChunk);
                }
            }
    sum_groups(out, w.d_BC, w.groups, s);
#pragma omp parallel for if (parallel)
    for (int i = 0; i < w.blocks; i++)
        for (int n = 0; n < N + 2; n++) {
            vec sum = {};
            for (int64_t segment = 0; segment < int64_t(B) * w.segments; segment++)
                sum += w.d_params[(segment * w.blocks + i) * (N + 2) + n];
            for (int lane = 0; lane < std::min(kLanes, D - i * kLanes); lane++) {
                const int64_t d = i * kLanes + lane;
                if (n < N) out.d_A_log[d * N + n] -= sum[lane] * std::exp(s.A_log[d * N + n]);  // dA/dA_log = A
                else (n == N ? out.d_skip : out.d_dt_bias)[d] += sum[lane];
            }
        }
}

// ------------------------------------------------------------------------------------------------------------------
// Selective scan in a closed loop: blocks of channels as in the scan, but time cannot be cut, since the output comes back as input.
// In lanes past the last channel nothing is read, and what is computed there is not stored.
constexpr int kMaxLoopStates = kMaxStates + 2 + kMaxDelay;
// random_normal, with the counters first, first + step, ... in the lanes
inline vec random_normals(uint64_t seed, uint64_t stream, uint64_t first, uint64_t step) {
    vec w;
#ifdef PRECISION_DOUBLE
    for (int lane = 0; lane < kLanes; lane++) w[lane] = random_normal(seed, stream, first + lane * step);
#else
    typedef uint64_t words __attribute__((vector_size(kLanes * 8)));
    words bits;
    for (int lane = 0; lane < kLanes; lane++) bits[lane] = lane;
    bits = random_key(seed, stream) + first * kRandomStep + bits * (step * kRandomStep);
    mix_bits(bits);
    const uvec high = __builtin_convertvector(bits >> 32, uvec), low = __builtin_convertvector(bits, uvec);
    // log u, u = (high + 1) / 2^32. Near 1 it begins with 1 - u, which has all its digits.
    const vec u = (__builtin_convertvector(high, vec) + 1) * 0x1p-32f, below = __builtin_convertvector(~high, vec) * 0x1p-32f;
    const ivec k = log2_floor(u);
    const vec squares = -2 * log_of(k == 0 ? -below : from_bits(to_bits(u) - (k << 23)) - 1, k);
    // cos(2 pi low / 2^32) = cos(x + quarter pi / 2), |x| <= pi / 4 (Cephes' polynomials)
    const uvec quarter = (low + (1u << 29)) >> 30;
    const vec x = __builtin_convertvector((ivec)(low - (quarter << 30)), vec) * float(M_PI * 0x1p-31), z = x * x;
    const vec cosine = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1;
    const vec sine = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * x + x;
    w = (quarter & 1) != 0 ? sine : cosine;
    w = each_lane(squares, [](real x) { return std::sqrt(x); }) * (((quarter + 1) & 2) != 0 ? -w : w);
#endif
    return w;
}
struct LoopBlock : ScanBlock {
    vec gain, delay, output_noise, zeta[kMaxStates], gamma[kMaxStates];
    vec slowest = {};  // 1/a, the longest time constant
    LoopBlock(int block, const ClosedLoop& c) : ScanBlock(block, c.plant) {
        const auto load_or_zero = [&](const real* x) { return x ? load_vec(x + d, count) : vec{}; };
        gain = load_or_zero(c.gain), delay = load_or_zero(c.delay), output_noise = load_or_zero(c.output_noise);
        load_state(zeta, offset_or_null(c.zeta, int64_t(d) * N));
        load_state(gamma, offset_or_null(c.gamma, int64_t(d) * N));
        for (int n = 0; n < N; n++) {
            const vec time = -kLog2e / A[n];  // A has log2(e) in it
            slowest = time > slowest ? time : slowest;
        }
    }
    vec noise(const ClosedLoop& c, int64_t row, int n) const {  // n < N: of a state; N: of the output
        vec w = random_normals(c.noise_seed, kNoiseStream, uint64_t((row * c.plant.D + d) * (N + 1) + n), uint64_t(N + 1));
        for (int lane = count; lane < kLanes; lane++) w[lane] = 0;
        return w;
    }
};
// What the steps of a chunk compute. y[tau + t] is the output of step t, so that y[t] is the one that is tau steps older.
struct LoopChunk {
    int count;
    real CB[kLoopChunk], BB[kLoopChunk], CC[kLoopChunk];  // C . B, |B|^2, |C|^2
    vec u[kLoopChunk], delta[kLoopChunk], e[kLoopChunk], length[kLoopChunk], gain[kLoopChunk], moved[kLoopChunk], pending[kLoopChunk],
        rho[kLoopChunk], action[kLoopChunk], v[kLoopChunk], y[kMaxDelay + kLoopChunk];  // pending: before the step
    vec *h, *decay, *share;  // (count + 1, N) the state before each step, and after the last; (count, N) exp(dt A), sigmoid(zeta h + gamma);
                             // or null: nobody asks for them
    // From the states before the chunk to those after it.
    void run(vec* state, const LoopBlock& block, const ClosedLoop& c, int64_t row, int steps) {
        const Scan& s = c.plant;
        const int N = s.N, tau = c.tau;
        const bool noisy = c.noise_seed && c.state_noise != 0;
        count = steps;
        for (int m = 0; m < tau; m++) y[tau - 1 - m] = state[N + 2 + m];
        if (h) std::copy_n(state, N, h);
        vec unasked[kMaxStates];
        for (int t = 0; t < count; t++, row++) {
            const vec* const before = h ? h + t * N : state;
            vec *const after = h ? h + (t + 1) * N : state, *const a = h ? decay + t * N : unasked, *const shares = h ? share + t * N : unasked;
            const floatX *const b_t = s.B_t + row * s.ld_bc, *const c_t = s.C_t + row * s.ld_bc;
            const int64_t at = row * s.D + block.d;
            CB[t] = BB[t] = CC[t] = 0;
            for (int n = 0; n < N; n++) {
                const real b = load(b_t[n]), c = load(c_t[n]);
                CB[t] += c * b, BB[t] += b * b, CC[t] += c * c;
            }
            u[t] = load_vec(s.u + at, block.count);
            delta[t] = softplus(load_vec(s.dt + at, block.count) + block.dt_bias);
            e[t] = y[tau + t - 1] - u[t];
            length[t] = each_lane(e[t] * e[t] + c.eps * c.eps, [](real x) { return std::sqrt(x); });
            pending[t] = state[N + 1];
            moved[t] = state[N] + c.alpha * (e[t] / length[t]) * pending[t];
            vec clipped = moved[t] > c.kappa ? c.kappa + vec{} : moved[t];
            gain[t] = state[N] = clipped < -c.kappa ? vec{} - c.kappa : clipped;
            rho[t] = 1 / ((block.slowest + delta[t]) * std::sqrt(BB[t] * CC[t] + kLoopTiny));
            state[N + 1] = delta[t] * rho[t] * CB[t] * e[t];
            action[t] = block.delay * y[t] - (c.gain ? gain[t] * e[t] : vec{});
            v[t] = u[t] + rho[t] * action[t];
            vec sum = block.skip * u[t];
            if (c.noise_seed && c.output_noise) sum += block.output_noise * block.noise(c, row, N);
            const vec delta_v = delta[t] * v[t];
            for (int n = 0; n < N; n++) {
                a[n] = exp2_negative(delta[t] * block.A[n]);
                after[n] = a[n] * before[n] + delta_v * load(b_t[n]);
            }
            for (int n = 0; n < N && noisy; n++) after[n] += c.state_noise * block.noise(c, row, n);
            if (c.zeta)
                for (int n = 0; n < N; n++) {
                    const vec x = block.zeta[n] * after[n] + block.gamma[n];
                    shares[n] = sigmoid(x);
                    sum += load(c_t[n]) * (after[n] * x * shares[n]);
                }
            else
                for (int n = 0; n < N; n++) sum += load(c_t[n]) * after[n];
            y[tau + t] = sum;
        }
        for (int m = 0; m < tau; m++) state[N + 2 + m] = y[count + tau - 1 - m];
    }
};
void closed_loop_forward(floatX* out, real* final_state, real* chunk_states, const ClosedLoop& c, void*, cudaStream_t) {
    const Scan& s = c.plant;
    const int B = s.B, T = s.T, D = s.D, states = c.states(), blocks = int(ceil_div(D, kLanes));
    if (T == 0) return;
#pragma omp parallel for collapse(2) if (worth_threads(int64_t(B) * T * D * s.N))
    for (int b = 0; b < B; b++)
        for (int i = 0; i < blocks; i++) {
            const LoopBlock block(i, c);
            const int64_t channel = int64_t(b) * D + block.d;
            LoopChunk x;
            x.h = x.decay = x.share = nullptr;
            vec state[kMaxLoopStates];
            block.load_rows(state, offset_or_null(s.initial_state, channel * states), states);
            state[s.N] += block.gain;
            for (int first = 0; first < T; first += kLoopChunk) {
                const int64_t row = int64_t(b) * T + first, chunk = b * loop_chunks(T) + first / kLoopChunk;
                block.store_rows(offset_or_null(chunk_states, (chunk * D + block.d) * states), state, states);
                x.run(state, block, c, row, std::min(kLoopChunk, T - first));
                for (int t = 0; t < x.count; t++) {
                    const vec z = load_ahead(s.z + (row + t) * s.ld_z + block.d, block.count);
                    store_ahead(out + (row + t) * D + block.d, x.y[c.tau + t] * z * sigmoid(z), block.count);
                }
            }
            state[s.N] -= block.gain;
            block.store_rows(offset_or_null(final_state, channel * states), state, states);
        }
}
struct LoopScratch : ScanScratch {
    enum LoopParams { skip, dt_bias, gain, delay, output_noise, slowest, kLoopParams };
    int params;       // sums of the gradients of parameters, for each channel: A_log, zeta, gamma (N each), and those of LoopParams
    vec* states;      // (threads, 3 kLoopChunk + 1, N)
    LoopScratch(void* scratch, int B, int T, int D, int N, int tau) : ScanScratch(D), params(3 * N + kLoopParams) {
        for (int b = 1; b <= B; b++) group_sequences = std::max(group_sequences, b * int64_t(fewest_groups(b)));
        groups = fewest_groups(B);
        Cutter cutter(scratch);
        chunk_d_BC_size = int64_t(N) * kLoopChunk * 2;
        h = cutter.cut<vec>(int64_t(B) * blocks * (N + 2 + tau));
        d_params = cutter.cut<vec>(int64_t(B) * blocks * params);
        chunk_d_BC = cutter.cut<vec>(threads * chunk_d_BC_size);
        states = cutter.cut<vec>(threads * states_size(N));
        d_BC = cutter.cut<real>(group_sequences * T * 2 * N);
        bytes = cutter.bytes();
    }
    static int64_t states_size(int N) { return int64_t(3 * kLoopChunk + 1) * N; }
    int64_t group_sequences = 0;
    size_t bytes;
};
size_t closed_loop_scratch(int B, int T, int D, int N, int tau) { return LoopScratch(nullptr, B, T, D, N, tau).bytes; }

// Backward through the steps of a chunk: see the plain version for what each line is. d_state (states): in, of the states after the chunk;
// out, of those before it.
void loop_chunk_backward(const ClosedLoopGradients& out, vec* d_state, vec* d_params, vec* d_BC, const LoopChunk& x, const LoopBlock& block,
                         const floatX* d_out, const ClosedLoop& c, int64_t first_row) {
    const Scan& s = c.plant;
    const int N = s.N, tau = c.tau;
    vec *const d_A = d_params, *const d_zeta = d_A + N, *const d_gamma = d_zeta + N, *const sums = d_gamma + N;
    vec d_y_of[kMaxDelay + kLoopChunk] = {};
    for (int m = 0; m < tau; m++) d_y_of[x.count + tau - 1 - m] = d_state[N + 2 + m];
    for (int t = x.count - 1; t >= 0; t--) {
        const int64_t row = first_row + t, at = row * s.D + block.d, at_z = row * s.ld_z + block.d;
        const floatX *const b_t = s.B_t + row * s.ld_bc, *const c_t = s.C_t + row * s.ld_bc;
        const vec z = load_vec(s.z + at_z, block.count), gate = sigmoid(z), d_o = load_vec(d_out + at, block.count);
        const vec u = x.u[t], delta = x.delta[t], e = x.e[t], v = x.v[t], d_y = d_o * z * gate + d_y_of[tau + t], d_p = d_state[N + 1];
        const vec rho = x.rho[t], d_CB = d_p * delta * rho * e, delta_v = delta * v;
        vec dh_B = {}, dh_A = {}, d_e = d_p * delta * rho * x.CB[t];
        const vec *const h = x.h + (t + 1) * N, *const h_before = x.h + t * N, *const a = x.decay + t * N, *const shares = x.share + t * N;
        vec scaled[kMaxStates], d_h[kMaxStates];
        for (int n = 0; n < N; n++) {
            const vec d_scaled = d_y * load(c_t[n]);
            if (c.zeta) {
                const vec inside = block.zeta[n] * h[n] + block.gamma[n], share = shares[n], r = inside * share;
                const vec d_inside = d_scaled * h[n] * (share + r * (1 - share));
                scaled[n] = r * h[n];
                d_zeta[n] += d_inside * h[n];
                d_gamma[n] += d_inside;
                d_state[n] += d_scaled * r + d_inside * block.zeta[n];
            } else {
                scaled[n] = h[n];
                d_state[n] += d_scaled;
            }
        }
        for (int n = 0; n < N; n++) {
            d_h[n] = d_state[n];
            const vec d_h_a = d_h[n] * a[n], dh_decayed = d_h_a * h_before[n];
            dh_B += d_h[n] * load(b_t[n]);
            dh_A += dh_decayed * block.A[n];
            d_A[n] += dh_decayed * delta;
            d_state[n] = d_h_a;
        }
        const vec d_v = dh_B * delta, d_action = d_v * rho, d_log = (d_p * delta * x.CB[t] * e + d_v * x.action[t]) * rho;
        const real size = x.BB[t] * x.CC[t] + kLoopTiny;
        const vec d_log_B = d_log * (x.CC[t] / size), d_log_C = d_log * (x.BB[t] / size), d_time = d_log / (block.slowest + delta);
        for (int n = 0; n < N; n++) {
            const real b = load(b_t[n]), c = load(c_t[n]);
            vec* const d_bc = d_BC + (t * N + n) * 2;
            d_bc[0] += d_h[n] * delta_v + d_CB * c - d_log_B * b;
            d_bc[1] += d_y * scaled[n] + d_CB * b - d_log_C * c;
        }
        sums[LoopScratch::slowest] += d_time * block.slowest;
        vec d_u = d_y * block.skip + d_v;
        sums[LoopScratch::skip] += d_y * u;
        if (c.noise_seed && c.output_noise) sums[LoopScratch::output_noise] += d_y * block.noise(c, row, N);
        sums[LoopScratch::delay] += d_action * x.y[t];
        d_y_of[t] += d_action * block.delay;
        if (c.gain) {
            d_state[N] -= d_action * e;
            d_e -= d_action * x.gain[t];
        }
        d_state[N] = x.moved[t] != x.gain[t] ? vec{} : d_state[N];  // clipped
        const vec length = x.length[t];  // sqrt(e^2 + eps^2):  s(e) = e / length,  s'(e) = eps^2 / length^3
        d_state[N + 1] = d_state[N] * c.alpha * (e / length);
        d_e += d_state[N] * c.alpha * x.pending[t] * (c.eps * c.eps / (length * length * length));
        d_y_of[tau + t - 1] += d_e;
        d_u -= d_e;
        const vec raw = load_vec(s.dt + at, block.count) + block.dt_bias;
        const vec d_raw = (d_p * x.CB[t] * rho * e + v * dh_B + kLn2 * dh_A - d_time) * (raw > 20 ? 1 : sigmoid(raw));
        sums[LoopScratch::dt_bias] += d_raw;
        store_ahead(out.plant.d_u + at, d_u, block.count);
        store_ahead(out.plant.d_dt + at, d_raw, block.count);
        store_ahead(out.plant.d_z + at_z, d_o * x.y[tau + t] * gate * (1 + z * (1 - gate)), block.count);
    }
    for (int m = 0; m < tau; m++) d_state[N + 2 + m] = d_y_of[tau - 1 - m];
}
void closed_loop_backward(const ClosedLoopGradients& out, const floatX* d_out, const real* d_final_state, const ClosedLoop& c,
                          const real* chunk_states, void* scratch, cudaStream_t) {
    const Scan& s = c.plant;
    const int B = s.B, T = s.T, D = s.D, N = s.N, states = c.states();
    if (B == 0 || T == 0) return;
    const LoopScratch w(scratch, B, T, D, N, c.tau);
    const bool parallel = worth_threads(int64_t(B) * T * D * N);
#pragma omp parallel for collapse(2) if (parallel)
    for (int b = 0; b < B; b++)
        for (int group = 0; group < w.groups; group++) {
            const Range members(w.blocks, group, w.groups);
            vec *const d_BC = w.chunk_d_BC + omp_get_thread_num() * w.chunk_d_BC_size;
            vec *const kept = w.states + omp_get_thread_num() * w.states_size(N);
            for (int64_t chunk = loop_chunks(T) - 1; chunk >= 0; chunk--) {
                const int64_t row = int64_t(b) * T + chunk * kLoopChunk;
                const int count = std::min<int>(kLoopChunk, T - chunk * kLoopChunk);
                std::fill_n(d_BC, w.chunk_d_BC_size, vec{});
                for (int64_t i = members.begin; i < members.end; i++) {
                    const LoopBlock block(i, c);
                    const int64_t unit = int64_t(b) * w.blocks + i, channel = int64_t(b) * D + block.d;
                    vec *const d_state = w.h + unit * states, *const d_params = w.d_params + unit * w.params;
                    if (chunk == loop_chunks(T) - 1) {
                        block.load_rows(d_state, offset_or_null(d_final_state, channel * states), states);
                        std::fill_n(d_params, w.params, vec{});
                        d_params[3 * N + LoopScratch::gain] = vec{} - d_state[N];  // the final state has the gain less k_0
                    }
                    LoopChunk x;
                    x.h = kept, x.decay = x.h + (kLoopChunk + 1) * N, x.share = x.decay + kLoopChunk * N;
                    vec state[kMaxLoopStates];
                    block.load_rows(state, chunk_states + ((b * loop_chunks(T) + chunk) * D + block.d) * states, states);
                    x.run(state, block, c, row, count);
                    loop_chunk_backward(out, d_state, d_params, d_BC, x, block, d_out, c, row);
                    if (chunk > 0) continue;
                    d_params[3 * N + LoopScratch::gain] += d_state[N];
                    block.store_rows(offset_or_null(out.plant.d_initial_state, channel * states), d_state, states);
                }
                sum_channels(w.d_BC + (int64_t(group) * B * T + row) * 2 * N, d_BC, count, N, N, 1);
            }
        }
    sum_groups(out.plant, w.d_BC, w.groups, s);
    real* const of_channel[] = {out.plant.d_skip, out.plant.d_dt_bias, out.d_gain, out.d_delay, out.d_output_noise};
#pragma omp parallel for if (parallel)
    for (int i = 0; i < w.blocks; i++)
        for (int n = 0; n < w.params; n++) {
            vec sum = {};
            for (int64_t b = 0; b < B; b++) sum += w.d_params[(b * w.blocks + i) * w.params + n];
            for (int lane = 0; lane < std::min(kLanes, D - i * kLanes); lane++) {
                const int64_t d = i * kLanes + lane, at = d * N + n % N;
                if (n < N) out.plant.d_A_log[at] -= sum[lane] * std::exp(s.A_log[at]);  // dA/dA_log = A
                else if (n < 3 * N) {
                    if (c.zeta) (n < 2 * N ? out.d_zeta : out.d_gamma)[at] += sum[lane];
                } else if (n - 3 * N == LoopScratch::slowest) {
                    const real* const A_log = s.A_log + int64_t(d) * N;
                    out.plant.d_A_log[std::min_element(A_log, A_log + N) - s.A_log] += sum[lane];
                } else if (real* const to = of_channel[n - 3 * N]) to[d] += sum[lane];
            }
        }
}

// ------------------------------------------------------------------------------------------------------------------
// Softmax of a row, in place or not; returns log(sum(exp(in))). With scale: of scale * in.
template <class In>
real softmax_row(real* out, const In* in, int count, real scale = 1) {
    real largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < count; i++) largest = std::max(largest, load(in[i]) * scale);
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; i++) {
        const real e = exp(load(in[i]) * scale - largest);
        out[i] = e;
        sum += e;
    }
#pragma omp simd
    for (int i = 0; i < count; i++) out[i] /= sum;
    return largest + std::log(sum);
}

// ------------------------------------------------------------------------------------------------------------------
// Rotary positions: the angles of a row serve all its heads.
void rotate(floatX* out, int ld_out, int64_t stride_out, const Rotary& r, bool back, cudaStream_t) {
    const int half = r.S / 2;
    const int64_t rows = int64_t(r.B) * r.T;
    std::array<double, kMaxHeadSize / 2> turns{};
    for (int i = 0; i < half && r.base > 0; i++) turns[i] = std::pow(r.base, -2 * double(i) / r.S);
#pragma omp parallel for if (worth_threads(rows * r.heads * r.S))
    for (int64_t row = 0; row < rows; row++) {
        const int64_t b = row / r.T, t = row % r.T;
        const floatX* x = r.in + row * r.ld_in;
        floatX* y = out + b * stride_out + t * ld_out;
        if (r.base == 0) {
            std::copy_n(x, int64_t(r.heads) * r.S, y);
            continue;
        }
        real cosine[kMaxHeadSize / 2], sine[kMaxHeadSize / 2];
        for (int i = 0; i < half; i++) {
            const double angle = double(r.position + t) * turns[i];
            cosine[i] = real(std::cos(angle)), sine[i] = real(back ? -std::sin(angle) : std::sin(angle));
        }
        for (int h = 0; h < r.heads; h++, x += r.S, y += r.S)
#pragma omp simd
            for (int i = 0; i < half; i++) {
                const real first = load(x[i]), second = load(x[i + half]);
                store(y[i], first * cosine[i] - second * sine[i]);
                store(y[i + half], second * cosine[i] + first * sine[i]);
            }
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Attention, kQueryTile queries and kKeyTile keys at a time. Forward, tiles of queries go to threads, and softmax is over the keys so far
// (see the kernels in moemamba.cu); backward, a group of heads of one sequence goes to a thread, which has the sums of all its d_k and d_v.
constexpr int kQueryTile = 64, kKeyTile = 256;
void copy_rows(real* to, const floatX* from, int64_t ld, int rows, int S, real scale) {
    for (int r = 0; r < rows; r++)
#pragma omp simd
        for (int s = 0; s < S; s++) to[r * S + s] = load(from[r * ld + s]) * scale;
}
void copy_back(floatX* to, int64_t ld, const real* from, int64_t rows, int S, real scale) {
    for (int64_t r = 0; r < rows; r++)
#pragma omp simd
        for (int s = 0; s < S; s++) store(to[r * ld + s], from[r * S + s] * scale);
}
// x = exp(x - largest) for `count` numbers, whose sum is returned.
real exp_and_sum(real* x, int count, real largest) {
    vec sum = {};
    for (int i = 0; i < count; i += kLanes) {
        const int n = std::min(kLanes, count - i);
        vec e = exp(load_vec(x + i, n) - largest);
        for (int lane = n; lane < kLanes; lane++) e[lane] = 0;
        store_vec(x + i, e, n);
        sum += e;
    }
    return sum_lanes(sum);
}
void attention_tile(floatX* out, real* lse, const Attention& a, int64_t b, int h, int t0) {
    thread_local Buffer memory, key_buffer, value_buffer;
    const int S = a.S, rows = std::min(kQueryTile, a.T - t0), group = h / (a.H / a.G);
    real* const q = memory.need(int64_t(kQueryTile) * (2 * S + kKeyTile));
    real *const sum = q + kQueryTile * S, *const scores = sum + kQueryTile * S;
    const int64_t row = b * a.T + t0, keys = a.past + t0 + rows;
    copy_rows(q, a.q + row * a.ld_q + h * S, a.ld_q, rows, S, 1 / std::sqrt(real(S)));
    std::fill_n(sum, rows * S, real(0));
    std::array<real, kQueryTile> largest, total{};
    largest.fill(std::numeric_limits<real>::lowest());
    for (int64_t j0 = 0; j0 < keys; j0 += kKeyTile) {
        const int n = int(std::min<int64_t>(kKeyTile, keys - j0));
        const int64_t at = b * a.stride_kv + j0 * a.ld_kv + group * S;
        const Block k = real_block(key_buffer, a.k + at, a.ld_kv, n, S), v = real_block(value_buffer, a.v + at, a.ld_kv, n, S);
        gemm(CblasNoTrans, CblasTrans, rows, n, S, q, S, k.data, k.ld, 0, scores, kKeyTile);
        for (int r = 0; r < rows; r++) {
            real* const p = scores + r * kKeyTile;
            const int seen = int(std::clamp<int64_t>(a.past + t0 + r + 1 - j0, 0, n));
            const real most = std::max(largest[r], seen ? *std::max_element(p, p + seen) : largest[r]);
            const real shrink = exp(largest[r] - most);
            total[r] = total[r] * shrink + exp_and_sum(p, seen, most);
            largest[r] = most;
            std::fill(p + seen, p + n, real(0));
#pragma omp simd
            for (int s = 0; s < S; s++) sum[r * S + s] *= shrink;
        }
        gemm(CblasNoTrans, CblasNoTrans, rows, S, n, scores, kKeyTile, v.data, v.ld, 1, sum, S);
    }
    for (int r = 0; r < rows; r++) {
        copy_back(out + ((row + r) * a.H + h) * S, S, sum + r * S, 1, S, 1 / total[r]);
        if (lse) lse[(row + r) * a.H + h] = largest[r] + std::log(total[r]);
    }
}
// One query, by dot products. Shares of the keys go to threads, which read the cache in the order of memory: a row of it has the keys of all
// heads, and then their values. Each is read once for the heads of its group.
constexpr int kStepKeys = 64;
struct StepScratch {
    real *sums, *largest, *total, *scores;  // (B, shares, H, S); (B, shares, H); (B, shares, H, kStepKeys)
    size_t bytes;
    StepScratch(void* scratch, int64_t B, int H, int S, int shares) {
        Cutter cutter(scratch);
        sums = cutter.cut<real>(B * shares * H * S);
        largest = cutter.cut<real>(B * shares * H);
        total = cutter.cut<real>(B * shares * H);
        scores = cutter.cut<real>(B * shares * H * kStepKeys);
        bytes = cutter.bytes();
    }
};
int step_shares() { return omp_get_max_threads(); }
size_t attention_scratch(int B, int, int H, int S) { return StepScratch(nullptr, B, H, S, step_shares()).bytes; }
// Calls f(s, count) for the vectors of S numbers: where each begins, and how many it has: kLanes, known to the compiler, but for the last.
template <class F>
void each_vector(int S, F&& f) {
    int s = 0;
    for (; s + kLanes <= S; s += kLanes) f(s, std::integral_constant<int, kLanes>());
    if (s < S) f(s, S - s);
}
void attention_share(real* sums, real* largest, real* total, real* scores, const floatX* q, const floatX* k, const floatX* v, int ld,
                     int64_t keys, int H, int heads, int S) {
    constexpr int kRows = 4;  // keys at a time, for sums that do not wait for each other
    const real scale = 1 / std::sqrt(real(S));
    std::fill_n(sums, int64_t(H) * S, real(0));
    std::fill_n(largest, H, std::numeric_limits<real>::lowest());
    std::fill_n(total, H, real(0));
    for (int64_t j0 = 0; j0 < keys; j0 += kStepKeys) {
        const int n = int(std::min<int64_t>(kStepKeys, keys - j0));
        // f(j, h, rows) for kRows keys from j on and each head h: where the head finds them. Past the last key, it is the last again.
        const auto each_part = [&](const floatX* in, auto f) {
            for (int j = 0; j < n; j += kRows) {
                const floatX* rows[kRows];
                for (int i = 0; i < kRows; i++) rows[i] = in + (j0 + std::min(j + i, n - 1)) * ld;
                for (int h = 0; h < H; h++) {
                    if (h && h % heads == 0) for (const floatX*& row : rows) row += S;
                    f(j, h, rows);
                }
            }
        };
        each_part(k, [&](int j, int h, const floatX* const* key) {
            vec sum[kRows] = {};
            each_vector(S, [&](int s, auto count) {
                const vec query = load_vec(q + h * S + s, count);
#pragma GCC unroll 4
                for (int i = 0; i < kRows; i++) {
                    __builtin_prefetch(key[i] + s + kRows * ld);  // no processor foresees that it will be needed
                    sum[i] += query * load_vec(key[i] + s, count);
                }
            });
#pragma GCC unroll 4
            for (int i = 0; i < kRows; i++) scores[h * kStepKeys + j + i] = sum_lanes(sum[i]) * scale;
        });
        for (int h = 0; h < H; h++) {
            real* const p = scores + h * kStepKeys;
            const real most = std::max(largest[h], *std::max_element(p, p + n)), shrink = exp(largest[h] - most);
            total[h] = total[h] * shrink + exp_and_sum(p, n, most);
            largest[h] = most;
            std::fill(p + n, p + kStepKeys, real(0));
#pragma omp simd
            for (int s = 0; s < S; s++) sums[h * S + s] *= shrink;
        }
        each_part(v, [&](int j, int h, const floatX* const* value) {
            const real* const p = scores + h * kStepKeys + j;
            each_vector(S, [&](int s, auto count) {
                vec sum = load_vec(sums + h * S + s, count);
#pragma GCC unroll 4
                for (int i = 0; i < kRows; i++) {
                    __builtin_prefetch(value[i] + s + kRows * ld);
                    sum += p[i] * load_vec(value[i] + s, count);
                }
                store_vec(sums + h * S + s, sum, count);
            });
        });
    }
}
void attention_step(floatX* out, const Attention& a, void* scratch) {
    const int shares = step_shares(), H = a.H, S = a.S;
    const StepScratch part(scratch, a.B, H, S, shares);
#pragma omp parallel for collapse(2) if (worth_threads(a.keys() * a.G * S * a.B))
    for (int64_t b = 0; b < a.B; b++)
        for (int share = 0; share < shares; share++) {
            const int64_t at = (b * shares + share) * H;
            const Range keys(a.keys(), share, shares);
            const int64_t from = b * a.stride_kv + keys.begin * a.ld_kv;
            attention_share(part.sums + at * S, part.largest + at, part.total + at, part.scores + at * kStepKeys, a.q + b * a.ld_q, a.k + from,
                            a.v + from, a.ld_kv, keys.end - keys.begin, H, H / a.G, S);
        }
    for (int64_t head = 0; head < int64_t(a.B) * H; head++) {
        const auto at = [&](int share) { return (head / H * shares + share) * H + head % H; };
        real most = part.largest[at(0)], total = 0;
        for (int n = 1; n < shares; n++) most = std::max(most, part.largest[at(n)]);
        real sum[kMaxHeadSize] = {};
        for (int n = 0; n < shares; n++) {
            const real shrink = exp(part.largest[at(n)] - most);
            total += part.total[at(n)] * shrink;
            for (int s = 0; s < S; s++) sum[s] += part.sums[at(n) * S + s] * shrink;
        }
        copy_back(out + head * S, S, sum, 1, S, 1 / total);
    }
}
void attention_forward(floatX* out, real* lse, const Attention& a, void* scratch, cudaStream_t) {
    if (a.T == 1 && !lse) return attention_step(out, a, scratch);
    const int tiles = int(ceil_div(a.T, kQueryTile));
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int back = 0; back < tiles; back++)  // the last tiles, which see the most keys, first
        for (int64_t b = 0; b < a.B; b++)
            for (int h = 0; h < a.H; h++) attention_tile(out, lse, a, b, h, (tiles - 1 - back) * kQueryTile);
}
void attention_backward_group(floatX* d_q, floatX* d_k, floatX* d_v, const floatX* d_out, const floatX* out, const real* lse,
                              const Attention& a, int64_t b, int group) {
    thread_local Buffer memory, sums, key_buffer, value_buffer;
    const int S = a.S;
    const real scale = 1 / std::sqrt(real(S));
    real* const q = memory.need(int64_t(kQueryTile) * (3 * S + 2 * kKeyTile));
    real *const d = q + kQueryTile * S, *const sum_q = d + kQueryTile * S;
    real *const p = sum_q + kQueryTile * S, *const d_p = p + kQueryTile * kKeyTile;
    real *const sum_k = sums.need(int64_t(2) * a.T * S), *const sum_v = sum_k + int64_t(a.T) * S;
    std::fill_n(sum_k, int64_t(2) * a.T * S, real(0));
    const int64_t first = b * a.stride_kv + group * S;
    for (int h = group * (a.H / a.G); h < (group + 1) * (a.H / a.G); h++)
        for (int t0 = 0; t0 < a.T; t0 += kQueryTile) {
            const int rows = std::min(kQueryTile, a.T - t0);
            const int64_t row = b * a.T + t0, width = int64_t(a.H) * S, at = row * width + h * S;
            copy_rows(q, a.q + row * a.ld_q + h * S, a.ld_q, rows, S, scale);
            copy_rows(d, d_out + at, width, rows, S, 1);
            copy_rows(sum_q, out + at, width, rows, S, 1);
            std::array<real, kQueryTile> delta{};
            for (int r = 0; r < rows; r++)
                for (int s = 0; s < S; s++) delta[r] += d[r * S + s] * sum_q[r * S + s];
            std::fill_n(sum_q, rows * S, real(0));
            for (int j0 = 0; j0 < t0 + rows; j0 += kKeyTile) {
                const int n = std::min(kKeyTile, t0 + rows - j0);
                const Block k = real_block(key_buffer, a.k + first + int64_t(j0) * a.ld_kv, a.ld_kv, n, S);
                const Block v = real_block(value_buffer, a.v + first + int64_t(j0) * a.ld_kv, a.ld_kv, n, S);
                gemm(CblasNoTrans, CblasTrans, rows, n, S, q, S, k.data, k.ld, 0, p, kKeyTile);
                gemm(CblasNoTrans, CblasTrans, rows, n, S, d, S, v.data, v.ld, 0, d_p, kKeyTile);
                for (int r = 0; r < rows; r++) {
                    const int seen = std::clamp(t0 + r + 1 - j0, 0, n);
                    exp_and_sum(p + r * kKeyTile, seen, lse[(row + r) * a.H + h]);
                    std::fill(p + r * kKeyTile + seen, p + r * kKeyTile + n, real(0));
#pragma omp simd
                    for (int j = 0; j < n; j++) d_p[r * kKeyTile + j] = p[r * kKeyTile + j] * (d_p[r * kKeyTile + j] - delta[r]);
                }
                gemm(CblasTrans, CblasNoTrans, n, S, rows, p, kKeyTile, d, S, 1, sum_v + int64_t(j0) * S, S);
                gemm(CblasTrans, CblasNoTrans, n, S, rows, d_p, kKeyTile, q, S, 1, sum_k + int64_t(j0) * S, S);
                gemm(CblasNoTrans, CblasNoTrans, rows, S, n, d_p, kKeyTile, k.data, k.ld, 1, sum_q, S);
            }
            copy_back(d_q + row * a.ld_q + h * S, a.ld_q, sum_q, rows, S, scale);
        }
    copy_back(d_k + first, a.ld_kv, sum_k, a.T, S, 1);
    copy_back(d_v + first, a.ld_kv, sum_v, a.T, S, 1);
}
void attention_backward(floatX* d_q, floatX* d_k, floatX* d_v, const floatX* d_out, const floatX* out, const real* lse, const Attention& a,
                        void*, cudaStream_t) {
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < a.B; b++)
        for (int group = 0; group < a.G; group++) attention_backward_group(d_q, d_k, d_v, d_out, out, lse, a, b, group);
}

// ------------------------------------------------------------------------------------------------------------------
// Router
void router_forward(const Routing& out, const Router& router, void*, cudaStream_t) {
    const int rows = router.rows, C = router.C, E = router.E, K = router.K;
    multiply(out.probs, E, router.x, C, router.weight, rows, C, E, false);
#pragma omp parallel for if (worth_threads(int64_t(rows) * E))
    for (int r = 0; r < rows; r++) {
        real *p = out.probs + int64_t(r) * E, *gate = out.gates + int64_t(r) * K;
        int* chosen = out.experts + int64_t(r) * K;
        out.lse[r] = softmax_row(p, p, E);
        real total = 0;
        for (int k = 0; k < K; k++) {
            int best = -1;  // always found, even among NaNs
            for (int e = 0; e < E; e++)
                if (std::find(chosen, chosen + k, e) == chosen + k && (best < 0 || p[e] > p[best])) best = e;
            chosen[k] = best;
            gate[k] = p[best];
            total += p[best];
        }
        for (int k = 0; k < K && router.renormalize; k++) gate[k] /= total;
    }
}
void router_losses(real* losses, const real* probs, const real* lse, const int* load, void*, int rows, int E, cudaStream_t) {
    if (rows == 0) return;
    double balance = 0, z = 0;
    for (int64_t r = 0; r < rows; r++) {
        for (int e = 0; e < E; e++) balance += double(load[e]) * probs[r * E + e];
        z += double(lse[r]) * lse[r];
    }
    losses[0] += real(balance * E / (double(rows) * rows));
    losses[1] += real(z / rows);
}

// In scratch: d_logits (rows, E).
size_t router_scratch(int rows, int, int E) { return cut_bytes<real>(int64_t(rows) * E); }
void router_backward(floatX* d_x, real* d_weight, const real* d_gates, const Routing& out, const int* load, const Router& router,
                     real balance_weight, real z_weight, void* scratch, cudaStream_t) {
    const int rows = router.rows, C = router.C, E = router.E, K = router.K;
    real* const d_logits = Cutter(scratch).cut<real>(int64_t(rows) * E);
#pragma omp parallel for if (worth_threads(int64_t(rows) * E))
    for (int r = 0; r < rows; r++) {
        const int64_t row = int64_t(r) * E, choices = int64_t(r) * K;
        const real *p = out.probs + row, *d_gate = d_gates + choices;
        const int* chosen = out.experts + choices;
        real* d = d_logits + row;  // first d_probs
        for (int e = 0; e < E; e++) d[e] = balance_weight * E * load[e] / (real(rows) * rows);
        real total = 0, mean = 0;  // of a renormalised gate: p_k / total
        for (int k = 0; k < K; k++) {
            total += p[chosen[k]];
            mean += d_gate[k] * out.gates[choices + k];
        }
        for (int k = 0; k < K; k++) d[chosen[k]] += router.renormalize ? (d_gate[k] - mean) / total : d_gate[k];
        for (int e = 0; e < E && K == 0; e++) d[e] += d_gates[row + e];  // the experts chose
        real dot = 0;
        for (int e = 0; e < E; e++) dot += p[e] * d[e];
        for (int e = 0; e < E; e++) d[e] = p[e] * (d[e] - dot + z_weight * 2 * out.lse[r] / rows);
    }
    multiply_backward(d_x, C, d_weight, d_logits, E, router.x, C, router.weight, rows, C, E, true, true);
}

// ------------------------------------------------------------------------------------------------------------------
// Dispatch and combine
void dispatch_plan(const Dispatch& to, const int* experts, void*, cudaStream_t) {
    const int choices = to.rows * to.K;
    std::fill_n(to.load, to.E, 0);
    for (int i = 0; i < choices; i++) to.load[experts[i]]++;
    to.offset[0] = 0;
    for (int e = 0; e < to.E; e++) to.offset[e + 1] = to.offset[e] + (to.capacity > 0 ? to.capacity : to.load[e]);
    std::fill_n(to.choice, to.slots(), -1);
    std::fill_n(to.load, to.E, 0);
    for (int i = 0; i < choices; i++) {
        const int e = experts[i], place = to.offset[e] + to.load[e]++;
        to.slot[i] = place < to.offset[e + 1] ? place : -1;
        if (to.slot[i] >= 0) to.choice[place] = i;
    }
}
void expert_choice_plan(const Dispatch& to, const real* probs, cudaStream_t) {
    if (to.rows == 0) return;
    const int E = to.E, capacity = to.capacity;
    std::fill_n(to.slot, int64_t(to.rows) * E, -1);
#pragma omp parallel for if (worth_threads(int64_t(to.rows) * E))
    for (int e = 0; e < E; e++) {
        const auto p = [&](int64_t row) { return probs[row * E + e] > 0 ? probs[row * E + e] : 0; };  // no NaN, which has no order
        const auto more_probable = [&](int a, int b) { return p(a) > p(b) || (p(a) == p(b) && a < b); };
        std::vector<int> rows(to.rows);
        std::iota(rows.begin(), rows.end(), 0);
        std::nth_element(rows.begin(), rows.begin() + capacity - 1, rows.end(), more_probable);
        std::sort(rows.begin(), rows.begin() + capacity);
        for (int i = 0; i < capacity; i++) {
            const int slot = e * capacity + i, choice = rows[i] * E + e;
            to.slot[choice] = slot;
            to.choice[slot] = choice;
        }
        to.load[e] = capacity;
    }
    for (int e = 0; e <= E; e++) to.offset[e] = e * capacity;
}
void dispatch_forward(floatX* out, const floatX* x, const Dispatch& to, int C, cudaStream_t) {
    const int slots = to.rows > 0 ? to.slots() : 0;
#pragma omp parallel for if (worth_threads(int64_t(slots) * C))
    for (int s = 0; s < slots; s++) {
        floatX* row = out + int64_t(s) * C;
        if (to.choice[s] < 0) std::fill_n(row, C, floatX(0));
        else std::copy_n(x + int64_t(to.choice[s] / to.K) * C, C, row);
    }
}

// out[r] = sum over k of weight(r, k) * in[slot[r, k]] (+ out)
template <class F>
void gather(floatX* out, const floatX* in, const Dispatch& to, int C, bool accumulate, F weight) {
    const int K = to.K;
#pragma omp parallel for if (worth_threads(int64_t(to.rows) * C * K))
    for (int r = 0; r < to.rows; r++) {
        constexpr int kTile = 256;  // the sum of a tile is kept in real over all k, and rounded once
        for (int begin = 0; begin < C; begin += kTile) {
            const int count = std::min(kTile, C - begin);
            floatX* tile = out + int64_t(r) * C + begin;
            real sum[kTile];
#pragma omp simd
            for (int c = 0; c < count; c++) sum[c] = accumulate ? load(tile[c]) : 0;
            for (int k = 0; k < K; k++) {
                const int64_t i = int64_t(r) * K + k;
                if (to.slot[i] < 0) continue;
                const floatX* from = in + int64_t(to.slot[i]) * C + begin;
                const real scale = weight(i);
#pragma omp simd
                for (int c = 0; c < count; c++) sum[c] += scale * load(from[c]);
            }
#pragma omp simd
            for (int c = 0; c < count; c++) store(tile[c], sum[c]);
        }
    }
}
void dispatch_backward(floatX* d_x, const floatX* d_out, const Dispatch& to, int C, bool accumulate, cudaStream_t) {
    gather(d_x, d_out, to, C, accumulate, [](int64_t) { return real(1); });
}
void combine_forward(floatX* out, const floatX* y, const real* gates, const Dispatch& to, int C, bool accumulate, cudaStream_t) {
    gather(out, y, to, C, accumulate, [=](int64_t i) { return gates[i]; });
}
void combine_backward(floatX* d_y, real* d_gates, const floatX* d_out, const floatX* y, const real* gates, const Dispatch& to, int C,
                      cudaStream_t) {
    const int choices = to.rows * to.K, slots = to.rows > 0 ? to.slots() : 0;
#pragma omp parallel for if (worth_threads(int64_t(choices) * C))
    for (int i = 0; i < choices; i++)
        if (to.slot[i] < 0) d_gates[i] = 0;
#pragma omp parallel for if (worth_threads(int64_t(slots) * C))
    for (int s = 0; s < slots; s++) {
        floatX* d_row = d_y + int64_t(s) * C;
        const int choice = to.choice[s];
        if (choice < 0) {
            std::fill_n(d_row, C, floatX(0));
            continue;
        }
        const floatX *from = d_out + int64_t(choice / to.K) * C, *output = y + int64_t(s) * C;
        const real gate = gates[choice];
        real dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int c = 0; c < C; c++) {
            const real d = load(from[c]);
            dot += d * load(output[c]);
            store(d_row[c], gate * d);
        }
        d_gates[choice] = dot;
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Experts. The products are small and many: threads share pieces of them, each of which BLAS computes on one thread. Which thread
// takes a piece does not change its result.
struct ExpertPiece {
    int expert, row, rows, out, outs;
};
// Cuts every expert's product into ranges of its rows, or into ranges of its outputs: in all, a few pieces for each thread.
void add_pieces(std::vector<ExpertPiece>& pieces, const Dispatch& to, int O, bool by_rows) {
    const auto rows_of = [&](int e) { return to.offset[e + 1] - to.offset[e]; };
    int64_t total = 0;
    for (int e = 0; e < to.E; e++) total += by_rows ? rows_of(e) : rows_of(e) > 0 ? O : 0;
    const int64_t size = std::max<int64_t>(ceil_div(total, 4 * omp_get_max_threads()), 64);
    for (int e = 0; e < to.E; e++) {
        const int rows = rows_of(e), row_parts = by_rows ? ceil_div(rows, size) : rows > 0, out_parts = by_rows ? 1 : ceil_div(O, size);
        for (int i = 0; i < row_parts * out_parts; i++) {
            const Range r(rows, by_rows ? i : 0, row_parts), o(O, by_rows ? 0 : i, out_parts, 32);
            pieces.push_back({e, to.offset[e] + int(r.begin), int(r.end - r.begin), int(o.begin), int(o.end - o.begin)});
        }
    }
}
void experts_forward(floatX* out, const Experts& x, cudaStream_t) {
    if (x.to.rows == 0) return;
    const int I = x.I, O = x.O, slots = x.to.slots();
    std::vector<ExpertPiece> pieces;
    add_pieces(pieces, x.to, O, slots > x.to.E * kFewRows);
#pragma omp parallel for schedule(dynamic) if (worth_threads(int64_t(slots) * I * O))
    for (const ExpertPiece& p : pieces)
        multiply(out + int64_t(p.row) * O + p.out, O, x.in + int64_t(p.row) * I, I, x.weight + (int64_t(p.expert) * O + p.out) * I, p.rows,
                 I, p.outs, false);
}
void experts_backward(floatX* d_in, real* d_weight, const floatX* d_out, const Experts& x, bool add_weight, cudaStream_t stream) {
    if (x.to.rows == 0) return;
    const int I = x.I, O = x.O;
    for (int e = 0; e < x.to.E && !add_weight; e++)  // no piece comes by where there are no rows
        if (x.to.offset[e] == x.to.offset[e + 1]) zero(d_weight + int64_t(e) * O * I, sizeof(real) * O * I, stream);
    std::vector<ExpertPiece> pieces;
    add_pieces(pieces, x.to, O, true);
    const size_t d_in_pieces = pieces.size();
    add_pieces(pieces, x.to, O, false);
#pragma omp parallel for schedule(dynamic) if (worth_threads(int64_t(x.to.slots()) * I * O))
    for (size_t i = 0; i < pieces.size(); i++) {
        const ExpertPiece& p = pieces[i];
        const bool for_d_in = i < d_in_pieces;
        const int64_t w = (int64_t(p.expert) * O + p.out) * I;
        multiply_backward(for_d_in ? d_in + int64_t(p.row) * I : nullptr, I, for_d_in ? nullptr : d_weight + w,
                          d_out + int64_t(p.row) * O + p.out, O, x.in + int64_t(p.row) * I, I, x.weight + w, p.rows, I, p.outs, false,
                          add_weight);
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Classifier and softmax
void classifier(real* losses, floatX* logits, const int* targets, int rows, int V, int ld, real d_loss, cudaStream_t) {
#pragma omp parallel for if (worth_threads(int64_t(rows) * V))
    for (int r = 0; r < rows; r++) {
        floatX* row = logits + int64_t(r) * ld;
        const int target = targets[r];
        if (target < 0) {
            losses[r] = 0;
            if (d_loss != 0) std::fill_n(row, ld, floatX(0));
            continue;
        }
        real largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
        for (int v = 0; v < V; v++) largest = std::max(largest, load(row[v]));
#pragma omp simd reduction(+ : sum)
        for (int v = 0; v < V; v++) sum += exp(load(row[v]) - largest);
        const real of_target = load(row[target]) - largest;
        losses[r] = std::log(sum) - of_target;
        if (d_loss == 0) continue;
        const real scale = d_loss / sum;
#pragma omp simd
        for (int v = 0; v < V; v++) store(row[v], scale * exp(load(row[v]) - largest));
        store(row[target], scale * exp(of_target) - d_loss);
        std::fill_n(row + V, ld - V, floatX(0));
    }
}
void softmax_forward(real* probs, const floatX* logits, int rows, int V, int ld, real temperature, cudaStream_t) {
#pragma omp parallel for if (worth_threads(int64_t(rows) * V))
    for (int r = 0; r < rows; r++) softmax_row(probs + int64_t(r) * V, logits + int64_t(r) * ld, V, 1 / temperature);
}

// ------------------------------------------------------------------------------------------------------------------
// Reductions, in double, over a fixed number of parts: the result does not depend on the number of threads.
constexpr int kSumParts = 1024;
static_assert(cut_bytes<double>(kSumParts) <= kSumScratch);
template <class F>
void add_sum(real* out, const real* in, void* scratch, int64_t count, F term) {
    if (count == 0) return;
    double* const partial = Cutter(scratch).cut<double>(kSumParts);
#pragma omp parallel for if (worth_threads(count))
    for (int part = 0; part < kSumParts; part++) {
        const Range range(count, part, kSumParts, kLine / sizeof(real));
        constexpr int kSums = 32;  // in four vectors: one alone would wait for its additions, not for memory
        double sums[kSums] = {};
        int64_t i = range.begin;
        for (; i + kSums <= range.end; i += kSums)
#pragma omp simd
            for (int j = 0; j < kSums; j++) sums[j] += term(double(in[i + j]));
        for (; i < range.end; i++) sums[0] += term(double(in[i]));
        partial[part] = std::accumulate(sums, sums + kSums, 0.0);
    }
    out[0] = real(out[0] + std::accumulate(partial, partial + kSumParts, 0.0));
}
void sum(real* out, const real* in, void* scratch, int64_t count, cudaStream_t) {
    add_sum(out, in, scratch, count, [](double x) { return x; });
}
void sum_of_squares(real* out, const real* in, void* scratch, int64_t count, cudaStream_t) {
    add_sum(out, in, scratch, count, [](double x) { return x * x; });
}

// AdamW
void adamw(real* master, floatX* weight, real* m, real* v, const real* grad, int64_t count, const AdamW& o, real grad_scale, int step,
           cudaStream_t) {
    const real lr = o.lr, beta1 = o.beta1, beta2 = o.beta2, eps = o.eps, weight_decay = o.weight_decay;
    const real new1 = 1 - o.beta1, new2 = 1 - o.beta2;  // 1 - real(beta) has only four digits of them
    const real m_scale = 1 / (1 - std::pow(o.beta1, step)), v_scale = 1 / (1 - std::pow(o.beta2, step));
#pragma omp parallel for simd if (parallel : worth_threads(count))
    for (int64_t i = 0; i < count; i++) {
        const real g = grad_scale * grad[i];
        m[i] = beta1 * m[i] + new1 * g;
        v[i] = beta2 * v[i] + new2 * g * g;
        master[i] -= lr * (m[i] * m_scale / (std::sqrt(v[i] * v_scale) + eps) + weight_decay * master[i]);
        if (weight) store(weight[i], master[i]);
    }
}

// OpenBLAS takes a buffer of 128 MiB for each thread, the first of them as it is loaded, and where there is no room for one it tries again for
// ever, deaf to signals. So the limit on memory (ulimit -v) is looked at before any library begins: there is no allocator yet, and no getenv().
constexpr rlim_t kBlasBytes = 256u << 20, kThreadBytes = 208u << 20;  // measured; a thread's are the buffer, its heap and its stack
[[gnu::no_sanitize("address", "undefined")]] void check_memory_limit(int, char**, char** environment) {
    rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return;
    int threads = int(sysconf(_SC_NPROCESSORS_ONLN));
    constexpr std::string_view kWanted = "OMP_NUM_THREADS=";
    for (; *environment; environment++)
        if (std::string_view(*environment).starts_with(kWanted)) threads = atoi(*environment + kWanted.size());
    const rlim_t needed = kBlasBytes + std::max(1, threads) * kThreadBytes;
    if (limit.rlim_cur >= needed) return;
    dprintf(STDERR_FILENO, "error: memory is limited to %llu MiB (ulimit -v), and matrix products on %d threads need %llu: raise it, or set "
                           "OMP_NUM_THREADS=1\n", (unsigned long long)(limit.rlim_cur >> 20), threads, (unsigned long long)(needed >> 20));
    _exit(1);
}
[[gnu::section(".preinit_array"), gnu::used]] void (*const before_libraries)(int, char**, char**) = check_memory_limit;

}  // namespace

const Layers layers = {
    .device = "cpu",
    .machine = machine,
    .open = open,
    .allocate = allocate,
    .release = release,
    .allocate_host = allocate,
    .release_host = release,
    .zero = zero,
    .upload = copy,
    .upload_later = copy,
    .download = copy,
    .copy = copy,
    .synchronize = [](cudaStream_t) {},
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
    .embedding_scratch = [](int) -> size_t { return 0; },
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
    .dispatch_scratch = [](int64_t) -> size_t { return 0; },
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

}  // namespace cpu
