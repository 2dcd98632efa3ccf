// simt.h: CUDA on a CPU. Lets g++ compile the kernels of a .cu file so that every one of them runs here, under closer watch than on a GPU.
//
//   g++ -std=c++20 -O2 -g -fopenmp -fsanitize=thread,alignment -x c++ -c kernels.cu   and link WITHOUT -fsanitize: this header is the
//   g++ kernels.o ... -fopenmp -lboost_context -lopenblas                             sanitizers' runtime, so it sees every memory access
//
// The threads of a block are fibers that take turns on one OS thread; a thread that never waits runs as a plain call. What is caught:
//   in every build       a kernel running off the pages of an allocation or using one after cudaFree; the host touching device memory;
//                        writes between an allocation's end and its page's; barriers and warp operations that some threads never
//                        reach; stack overflow; launches that a GPU refuses. Fresh memory is NaN.
//   -fsanitize=thread    each access against the exact bytes of allocations and shared arrays, whether they have been written, whether
//                        they are the device's at all, are aligned, and whether another thread touched them with no barrier between
//                        (a data race)
//   -fsanitize=address   the exact bytes of allocations and shared arrays; with ",undefined" alignment too; what the host touches only with
//                        options.closed, because to open and to close memory is slow there
// A fault is reported on stderr (kernel, block, thread, memory, what to do) and ends the process with exit code 1.
//
// Stricter than CUDA on purpose: every thread of a block must come to each __syncthreads(), and those that meet must stand at the same
// line of the source; so must the lanes of a warp operation, none of which may have exited. Shuffles and votes do not order memory
// (the CUDA guide says they need not): only __syncwarp, here of whole warps, and __syncthreads do. Blocks of one launch may share memory
// through atomics only. What is here is what the kernels and their host code use of CUDA; add what else they come to need.
#pragma once
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <source_location>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#include <boost/context/detail/fcontext.hpp>
#include <cblas.h>
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)0)
#define __sanitizer_start_switch_fiber(...) ((void)0)
#define __sanitizer_finish_switch_fiber(...) ((void)0)
#endif

// ---------------------------------------------------------------------------------------------------------------------------------
// The language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define LAUNCH(kernel, grid, block, shared_bytes, stream) simt::launch(#kernel, kernel, grid, block, shared_bytes, stream)
// The lambda has a type of its own for each declaration and template instance: the key of the array within its block.
#define SHARED(type, name) auto& name = simt::shared<type, decltype([] {})>(#name)
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(simt::dynamic_shared())
#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())

// Code of this header that runs inside kernels is not itself watched.
#define SIMT_UNWATCHED __attribute__((no_sanitize("thread")))

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct __nv_bfloat16 {                                        // the upper half of a float
    uint16_t bits;
    __nv_bfloat16() = default;
    template <class T> requires std::is_arithmetic_v<T> __forceinline__ __nv_bfloat16(T value) : bits(round(float(value))) {}
    __forceinline__ operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
    static __forceinline__ uint16_t round(float value) {      // to nearest, ties to even; every NaN becomes 0x7fff, as on the GPU
        uint32_t wide = std::bit_cast<uint32_t>(value);
        return value != value ? 0x7fff : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    }
};
// Both these operators and the conversion fit "bfloat16 * float", which is therefore ambiguous, as it is in cuda_bf16.h.
#define SIMT_BFLOAT16(Result, op) __forceinline__ Result operator op(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) op float(b); }
SIMT_BFLOAT16(__nv_bfloat16, +) SIMT_BFLOAT16(__nv_bfloat16, -) SIMT_BFLOAT16(__nv_bfloat16, *) SIMT_BFLOAT16(__nv_bfloat16, /)
SIMT_BFLOAT16(bool, ==) SIMT_BFLOAT16(bool, <) SIMT_BFLOAT16(bool, >)
#undef SIMT_BFLOAT16

inline void sincospi(double x, double* sine, double* cosine) { *sine = std::sin(x * M_PI), *cosine = std::cos(x * M_PI); }
inline void sincospif(float x, float* sine, float* cosine) { *sine = float(std::sin(x * M_PI)), *cosine = float(std::cos(x * M_PI)); }
__forceinline__ float __fdividef(float x, float y) { return x / y; }
__forceinline__ int __popc(unsigned x) { return std::popcount(x); }
__forceinline__ unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
__forceinline__ long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
// Of a number and a NaN they return the number, as fmin and fmax do.
template <class T> requires std::is_arithmetic_v<T> constexpr T min(T a, T b) { return b < a || !(a == a) ? b : a; }
template <class T> requires std::is_arithmetic_v<T> constexpr T max(T a, T b) { return a < b || !(a == a) ? b : a; }

enum cudaError_t {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInsufficientDriver = 35, cudaErrorNoDevice = 100,
    cudaErrorNoKernelImageForDevice = 209
};

namespace simt {
// ---------------------------------------------------------------------------------------------------------------------------------
// Threads, warps, blocks

inline constexpr size_t max_shared = 99 << 10, default_shared = 48 << 10, max_arrays = 64, red_zone = 256;
inline constexpr size_t arena_bytes = max_shared + (max_arrays + 2) * 2 * red_zone;

enum Order { forward, reverse, shuffled };
struct Options {
    Order order = forward;                                    // of the threads between barriers, and of the blocks of a launch
    uint64_t seed = 0;                                        // for Order::shuffled
    int threads = std::clamp(int(std::thread::hardware_concurrency()), 1, 16);   // OS threads that share the blocks of a launch
    // What the runtime says of the device and of itself, so that a test can have another GPU, a broken driver, or none.
    int multiprocessors = 4, blocks_per_multiprocessor = 2;
    size_t shared_optin = max_shared;                         // bytes that a block may have at most; max_shared at most
    cudaError_t device_status = cudaSuccess;                  // of cudaGetDeviceCount
    int device_count = 1, driver_version = 13000, runtime_version = 13000;
    cudaError_t code_status = cudaSuccess;                    // of cudaFuncGetAttributes: has the program code for this device?
#ifdef __SANITIZE_ADDRESS__
    bool closed = false;                                      // device memory is closed to the host; to be set before there is any
#else
    bool closed = true;
#endif
};
inline Options options;

inline uint64_t launches = 0;                                 // kernels, memsets and cuBLAS calls so far
inline uint64_t waits = 0;                                    // of the host: synchronisations, copies from memory that is not page-locked

using Location = std::source_location;
SIMT_UNWATCHED inline bool same(const Location& a, const Location& b) {
    if (!__builtin_memcmp(&a, &b, sizeof a)) return true;     // one place has one record of it, unless a template was compiled twice
    return a.line() == b.line() && a.column() == b.column() && !strcmp(a.file_name(), b.file_name());
}

// Who last read, or wrote, some bytes. "epoch" counts the intervals between barriers, over all blocks of all launches; within an
// epoch, "clock" counts the __syncwarps of the warp. Several lanes are held as their set, at the clock of the latest.
struct Stamp {
    uint32_t epoch, lanes;
    uint32_t clock : 24, warp : 5;
    uint32_t warps : 1;                                       // threads of other warps did too, in this epoch
    uint32_t blocks : 1;                                      // other blocks did too, in this launch
};
struct Cell { Stamp write, update, read; };                    // update: atomically

struct Warp {
    uint32_t exists = 0, waiting = 0;                         // lanes
    uint32_t clock = 1;                                       // see Stamp; it restarts at each barrier
};

struct Fiber {
    boost::context::detail::fcontext_t context;
    char* stack;
    void* fake = nullptr;                                     // AddressSanitizer's
};
inline constexpr size_t stack_bytes = 256 << 10, guard_bytes = 64 << 10;

struct Thread {
    enum State { fresh, ready, waiting, done } state;
    uint3 index;
    unsigned lane;
    Warp* warp;
    Fiber* fiber;
    Stamp now;
    const char* at;                                           // the name of what it waits at
    Location where;
    uint32_t mask;                                            // of lanes, or 0 at a barrier of the block
    uint64_t value, result;                                   // given to, and had from, the others
    int source;                                               // the lane whose value it asks for
    uint32_t votes;                                           // of the lanes, or the count over the block
};

struct Launch {
    const char* name;
    dim3 grid, block;
    size_t dynamic_bytes, shared_limit;
    void (*call)(const void* arguments);
    const void* arguments;
    size_t argument_bytes;
};

struct Array { const void* key; const char* name; char* data; size_t bytes; };

struct Device;
struct Worker {                                               // an OS thread that runs blocks
    Device* device;
    const Launch* launch = nullptr;
    uint3 block;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<unsigned> order;
    std::vector<Fiber*> idle;
    std::minstd_rand random;
    Thread* thread = nullptr;                                 // threads.data(), order.data(): vectors are watched code, and slow
    const unsigned* turns = nullptr;
    Thread* running = nullptr;                                // whose turn it is, in the runtime too; null in the scheduler
    size_t count = 0, turn = 0, left = 0;                     // of threads; position in turns; threads not done
    boost::context::detail::fcontext_t scheduler;
    void* scheduler_fake = nullptr;                           // AddressSanitizer's
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;
    char* arena = nullptr;                                    // shared memory, with red zones between the arrays
    Array arrays[max_arrays];
    size_t array_count = 0, arena_used = 0, shared_used = 0;
    uint32_t arrived = 0, votes = 0;                          // at the block's barrier
    uint32_t epoch = 0, launch_epoch = 0, block_epoch = 0;    // now, and the first of the launch and of the block
    std::vector<std::pair<uint32_t, uint3>> block_epochs;     // to name the other block of a race
    uint64_t read = 0, written = 0;                           // bytes of global memory
    ~Worker() { for (Fiber* fiber : idle) munmap(fiber->stack - guard_bytes, guard_bytes + stack_bytes), delete fiber; }
};
inline constinit thread_local Worker* worker = nullptr;
inline constinit thread_local Thread* self = nullptr;         // the kernel thread whose code runs now; null in the runtime and on the host

// By value, in registers, and the same for as long as a kernel runs: the compiler calls each once.
[[gnu::const]] SIMT_UNWATCHED inline uint3 thread_index() { return self->index; }
[[gnu::const]] SIMT_UNWATCHED inline uint3 block_index() { return worker->block; }
[[gnu::const]] SIMT_UNWATCHED inline dim3 block_size() { return worker->launch->block; }
[[gnu::const]] SIMT_UNWATCHED inline dim3 grid_size() { return worker->launch->grid; }

// ---------------------------------------------------------------------------------------------------------------------------------
// Device memory: one range of addresses, inaccessible except while kernels, copies and cuBLAS run. Each allocation ends as close before
// an inaccessible page as its alignment to 256 bytes allows. Addresses are used in turn, so that one which was freed stays free for a while;
// begin_again: the fewer pages were ever touched, the less it costs to open and close them.

inline constexpr size_t range_bytes = size_t(4) << 30, begin_again = 16 << 20;
inline bool watched = false;                                  // some code is compiled with -fsanitize=thread

struct Allocation { size_t bytes; bool live; std::map<uintptr_t, std::string> names; };
struct Device {
    uintptr_t base = 0, next = 0;
    std::map<uintptr_t, Allocation> allocations;              // the freed ones too
    std::map<uintptr_t, size_t> live;                         // and without them: start, bytes
    std::map<uintptr_t, size_t> page_locked;                  // of the host's, by cudaMallocHost: start, bytes
    size_t used = 0, page = size_t(sysconf(_SC_PAGESIZE));
    int open = 0;
    std::recursive_mutex mutex;
    std::mutex launching;
    // Of each aligned word of device memory: bits 0-3: byte initialised, bits 4-6: bytes allocated (0 to 4), bit 7: split.
    // Its races are followed in cells[0][word], or if it was ever touched in part, byte by byte in cells[byte][word].
    uint8_t* state = nullptr;
    Cell* cells[4] = {};
    uint32_t epoch = 1;
    std::vector<std::pair<uintptr_t, uintptr_t>> constants;   // the read-only data of the program
    std::map<const void*, size_t> max_dynamic;                // cudaFuncSetAttribute
    Device();
    uintptr_t page_start(uintptr_t address) const { return address & ~(page - 1); }
    uintptr_t page_end(uintptr_t address) const { return page_start(address + page - 1); }
};
inline Device& device() { static Device* d = new Device; return *d; }   // never destroyed: static objects may hold device memory

inline bool on_device(uintptr_t address) { return address - device().base < range_bytes; }
inline std::string triple(const auto& v) { return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")"; }

inline std::string describe(uintptr_t address) {              // "byte 12 of 'params' (400 bytes)"
    if (!on_device(address)) return "memory that is not the device's";
    auto place = [&](uintptr_t start, size_t bytes, uintptr_t from, const std::string& of) {
        return address < start ? std::to_string(start - address) + " bytes before " + of
             : address < start + bytes ? "byte " + std::to_string(address - from) + " of " + of
             : std::to_string(address - start - bytes) + " bytes past the end of " + of;
    };
    for (size_t i = 0; worker && i < worker->array_count; ++i) {
        const Array& a = worker->arrays[i];
        uintptr_t start = uintptr_t(a.data);
        if (address >= start - red_zone && address < start + a.bytes + red_zone)
            return place(start, a.bytes, start, std::string("shared array '") + a.name + "' (" + std::to_string(a.bytes) + " bytes)");
    }
    const auto& all = device().allocations;
    auto after = all.upper_bound(address), it = after;
    if (it != all.begin()) --it;
    if (it == all.end()) return "device memory that was never allocated";
    if (after != all.end() && it != after && address >= it->first + it->second.bytes &&
        after->first - address < address - (it->first + it->second.bytes)) it = after;
    auto& [start, a] = *it;
    auto name = a.names.upper_bound(std::max(address, start));
    bool named = name != a.names.begin();
    return place(start, a.bytes, named ? std::prev(name)->first : start, (named ? "'" + std::prev(name)->second + "'" : "allocation") +
                 " (" + std::to_string(a.bytes) + " bytes" + (a.live ? ")" : ", since freed with cudaFree)"));
}

SIMT_UNWATCHED inline void report(const char* message) {
    static std::atomic_flag reported;
    self = nullptr;
    while (reported.test_and_set()) pause();                  // another OS thread is at it, and will end the process
    std::string text = "simt: ";
    if (worker && worker->launch) text += std::string("kernel ") + worker->launch->name;
    if (worker && worker->running) text += ", block " + triple(worker->block) + ", thread " + triple(worker->running->index);
    if (text.back() != ' ') text += ": ";
    fflush(stdout);
    fprintf(stderr, "%s%s\n", text.c_str(), message);
}
[[noreturn, gnu::format(printf, 1, 2)]] SIMT_UNWATCHED inline void stop(const char* format, ...) {
    char message[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    report(message);
    _exit(1);
}

// The last resort, and in unwatched builds the only one: a page that may not be touched.
inline struct sigaction previous_action[2];
SIMT_UNWATCHED inline void on_fault(int signal, siginfo_t* info, void*) {
    self = nullptr;                                           // what follows may be watched code, and is not the kernel's
    uintptr_t address = uintptr_t(info->si_addr);
    bool ours = on_device(address);
    std::string what = describe(address);
    if (Thread* t = worker ? worker->running : nullptr) {
        if (address - uintptr_t(t->fiber->stack - guard_bytes) < guard_bytes)
            stop("stack overflow.\n  A kernel thread has %zu KB here: use smaller local arrays, or less recursion.", stack_bytes >> 10);
        // x86's aligned vector instructions fault with no address.
        if (info->si_code == SI_KERNEL && !address) stop("misaligned access: a vector, not at a multiple of 16, or no address at all.");
        stop("touches %s.\n  %s", what.c_str(),
             ours ? "Check the index against the allocation's size." : "Pass pointers from cudaMalloc, and no null.");
    }
    if (ours) stop("host code touches %s.\n  Device memory can be reached from kernels, cudaMemcpy and cudaMemset only.", what.c_str());
    sigaction(signal, &previous_action[signal == SIGBUS], nullptr);            // not our affair: return, and fault again
}
inline void catch_faults() {                                  // at every opening: others, such as Catch2, may have put theirs in front
    struct sigaction action = {}, before;
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int signal : {SIGSEGV, SIGBUS}) {
        sigaction(signal, &action, &before);
        if (before.sa_sigaction != on_fault) previous_action[signal == SIGBUS] = before;
    }
}

inline Device::Device() {
    auto reserve = [](size_t bytes, int protection) {
        void* p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) stop("cannot reserve %zu GB of address space.", bytes >> 30);
        return p;
    };
    next = base = uintptr_t(reserve(range_bytes, PROT_NONE));
    if (watched) {
        state = static_cast<uint8_t*>(reserve(range_bytes / 4, PROT_READ | PROT_WRITE));
        for (Cell*& plane : cells) plane = static_cast<Cell*>(reserve(range_bytes / 4 * sizeof(Cell), PROT_READ | PROT_WRITE));
    }
    dl_iterate_phdr([](dl_phdr_info* info, size_t, void* self) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& p = info->dlpi_phdr[i];
            if ((p.p_type == PT_LOAD && !(p.p_flags & PF_W)) || p.p_type == PT_GNU_RELRO)
                static_cast<Device*>(self)->constants.emplace_back(info->dlpi_addr + p.p_vaddr, info->dlpi_addr + p.p_vaddr + p.p_memsz);
        }
        return 0;
    }, this);
}

// Opens device memory for as long as one of these lives.
struct Open {
    Open() { protect(PROT_READ | PROT_WRITE, 1); }
    ~Open() { protect(PROT_NONE, -1); }
    static void protect(int protection, int change) {
        Device& d = device();
        std::lock_guard lock(d.mutex);
        d.open += change;
        if (d.open == 1 && change == 1) catch_faults();
        if (!options.closed || d.open != (change > 0)) return;   // the first one opens, the last one closes
        if (watched) {                                        // every byte is checked as it is touched: the whole range at once is faster
            mprotect(reinterpret_cast<void*>(d.base), range_bytes, protection);
            return;
        }
        for (auto& [start, bytes] : d.live)
            mprotect(reinterpret_cast<void*>(d.page_start(start)), d.page_end(start + bytes) - d.page_start(start), protection);
    }
};

inline void set_state(uintptr_t address, size_t bytes, bool allocated) {       // and not initialised; address is a multiple of 4
    Device& d = device();
    if (!watched) return;
    uint8_t* state = d.state + (address - d.base) / 4;
    memset(state, allocated ? 0x40 : 0, bytes / 4);
    if (unsigned rest = bytes % 4) state[bytes / 4] = allocated ? rest << 4 : 0;
}
inline bool initialised(uintptr_t address) {
    size_t at = address - device().base;
    return !watched || device().state[at / 4] >> at % 4 & 1;
}
// Of the word that holds byte "at": a bit for each byte from there on, up to the end.
SIMT_UNWATCHED __forceinline__ unsigned bits_of(size_t at, size_t end) {
    size_t first = at & 3, last = end - (at - first) < 4 ? end - (at - first) : 4;
    return (1u << last) - (1u << first);
}
inline void set_initialised(uintptr_t address, size_t bytes, bool value = true) {
    size_t at = address - device().base, end = at + bytes;
    for (uint8_t* state = device().state; watched && at < end; at = (at | 3) + 1)
        value ? state[at / 4] |= bits_of(at, end) : state[at / 4] &= ~bits_of(at, end);
}

// For the host's calls: stops unless all of these bytes are in one allocation.
inline void check_range(const char* call, const void* p, size_t bytes, bool must_be_initialised = false) {
    if (!bytes) return;
    Device& d = device();
    std::lock_guard lock(d.mutex);
    uintptr_t address = uintptr_t(p), end = address + bytes;
    auto it = d.allocations.upper_bound(address);
    if (address - d.base >= range_bytes)
        stop("%s is given %p, which is not device memory.\n  Pass a pointer from cudaMalloc.", call, p);
    if (it == d.allocations.begin() || (--it, !it->second.live) || end > it->first + it->second.bytes)
        stop("%s of %zu bytes at %s reaches %s.\n  Check the size.", call, bytes, describe(address).c_str(), describe(end - 1).c_str());
    for (; must_be_initialised && address < end; ++address)
        if (!initialised(address))
            stop("%s reads %s, which nothing has written.\n  Write or cudaMemset it first.", call, describe(address).c_str());
}

// Has anybody written between the end of an allocation and that of its page?
inline void check_tail(const std::string& who, uintptr_t start, const Allocation& a) {
    Device& d = device();
    size_t bytes = d.page_end(start + a.bytes) - (start + a.bytes);
    ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<void*>(start + a.bytes), bytes);
    const uint8_t* tail = reinterpret_cast<const uint8_t*>(start + a.bytes);
    for (size_t i = 0; i < bytes; ++i)
        if (tail[i] != 0xff) stop("%s wrote %s.\n  Check the index against the size.", who.c_str(), describe(uintptr_t(tail + i)).c_str());
    ASAN_POISON_MEMORY_REGION(reinterpret_cast<void*>(start + a.bytes), bytes);
}

inline void* allocate(size_t bytes, const char* name) {
    Device& d = device();
    std::lock_guard lock(d.mutex);
    size_t rounded = (bytes + 255) / 256 * 256, span = d.page_end(rounded) + d.page;           // with the page that may not be touched
    if (span > range_bytes - d.page) return nullptr;
    for (bool wrapped = false;;) {                            // the first gap from next on
        if (d.next + span > d.base + (wrapped ? range_bytes : begin_again)) {
            if (wrapped) return nullptr;
            wrapped = true, d.next = d.base;
        }
        auto end = [&](auto it) { return d.page_end(it->first + it->second) + d.page; };
        auto it = d.live.lower_bound(d.next);
        if (it != d.live.begin() && end(std::prev(it)) > d.next) --it;
        if (it == d.live.end() || d.page_start(it->first) >= d.next + span) break;
        d.next = end(it);
    }
    d.allocations.erase(d.allocations.lower_bound(d.next), d.allocations.lower_bound(d.next + span));      // freed ones
    uintptr_t start = d.next + span - d.page - rounded, page = d.page_start(start);
    d.next += span;
    if (mprotect(reinterpret_cast<void*>(page), d.next - d.page - page, PROT_READ | PROT_WRITE)) return nullptr;
    ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<void*>(page), d.next - d.page - page);
    uintptr_t fresh = watched ? start + bytes : page;         // where reads are watched, nobody sees what was there (nor does cudaMemcpy)
    memset(reinterpret_cast<void*>(fresh), 0xff, d.next - d.page - fresh);     // NaN
    ASAN_POISON_MEMORY_REGION(reinterpret_cast<void*>(page), d.next - d.page - page);
    ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<void*>(start), bytes);
    if (!d.open && options.closed) mprotect(reinterpret_cast<void*>(page), d.next - d.page - page, PROT_NONE);
    d.allocations[start] = {bytes, true, {}};
    d.live[start] = bytes;
    if (name) d.allocations[start].names[start] = name;
    d.used += bytes;
    set_state(start, bytes, true);
    return reinterpret_cast<void*>(start);
}

// Names device memory in reports; p may also point into an allocation, at the start of a part of it.
inline void name_allocation(const void* p, const char* name) {
    Device& d = device();
    std::lock_guard lock(d.mutex);
    auto it = d.allocations.upper_bound(uintptr_t(p));
    if (it != d.allocations.begin()) std::prev(it)->second.names[uintptr_t(p)] = name;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Every access of a watched kernel comes here

enum Access { reads, writes, updates };                       // updates are atomic

// Is all that s holds certain to come before what t does now? Epochs before "since" are of earlier launches, or for shared memory blocks.
SIMT_UNWATCHED __forceinline__ bool ordered(const Stamp& s, const Thread& t, uint32_t since) {
    if (s.epoch < since) return true;
    if (s.blocks || s.epoch < worker->block_epoch) return false;
    if (s.epoch != t.now.epoch) return true;
    if (s.warps || s.warp != t.now.warp) return false;
    return s.clock < t.warp->clock || !(s.lanes & ~t.now.lanes);
}
// Adds t to s, or replaces what must come before it anyway.
SIMT_UNWATCHED __forceinline__ void record(Stamp& s, const Thread& t, uint32_t since) {
    Stamp now = t.now;
    now.clock = t.warp->clock;
    if (s.epoch < since) { s = now; return; }                 // first of all of this launch, most often
    now.blocks = s.blocks || s.epoch < worker->block_epoch;
    if (s.epoch == now.epoch && (s.warps || s.warp != now.warp || s.clock == now.clock)) {
        now.warps = s.warps || s.warp != now.warp;
        now.lanes |= s.lanes;
    }
    s = now;
}

inline std::string code_at(const void* pc) {                  // how to find the line
    Dl_info info;
    if (!pc || !dladdr(pc, &info)) return "";
    char text[1200];
    snprintf(text, sizeof text, "  addr2line -Cife %s %#zx\n", info.dli_fname, size_t(pc) - size_t(info.dli_fbase) - 1);
    return text;
}

inline const char* verb(Access access) { return access == reads ? "reads" : access == writes ? "writes" : "updates"; }

[[noreturn]] SIMT_UNWATCHED inline void report_race(const Cell& cell, const Thread& t, uint32_t since, uintptr_t address, Access access,
                                                    const void* pc) {
    self = nullptr;
    Worker& w = *worker;
    auto [s, did] = !ordered(cell.write, t, since) ? std::pair(cell.write, "wrote")
                  : access != updates && !ordered(cell.update, t, since) ? std::pair(cell.update, "updated") : std::pair(cell.read, "read");
    bool across = s.blocks || s.epoch < w.block_epoch;        // between blocks
    std::string other = "another block";
    if (!across) {
        uint32_t lanes = s.lanes & (s.warp == t.now.warp ? ~t.now.lanes : ~0u);
        other = s.warps || !lanes ? "another thread" : "thread " + triple(w.threads[s.warp * 32 + __builtin_ctz(lanes)].index);
    } else if (!s.blocks) {
        auto it = std::upper_bound(w.block_epochs.begin(), w.block_epochs.end(), s.epoch, [](uint32_t e, auto& b) { return e < b.first; });
        other = "block " + triple(std::prev(it)->second);
    }
    stop("race: %s %s, which %s %s with nothing to order them.\n%s  %s", verb(access), describe(address).c_str(), other.c_str(), did,
         code_at(pc).c_str(),
         across ? "Blocks of one launch have no order: give each its own bytes, use atomics, or split the launch."
                : "Put a __syncthreads() between, or within a warp a __syncwarp(), or give each its own bytes.");
}

SIMT_UNWATCHED __forceinline__ void touch(Cell& cell, Thread& t, uint32_t since, uintptr_t address, Access access, const void* pc) {
    if (!ordered(cell.write, t, since) || (access != updates && !ordered(cell.update, t, since)) ||
        (access != reads && !ordered(cell.read, t, since)))
        report_race(cell, t, since, address, access, pc);
    record(access == reads ? cell.read : access == writes ? cell.write : cell.update, t, since);
}

[[noreturn]] SIMT_UNWATCHED inline void report_access(uintptr_t address, size_t bytes, Access access, const char* wrong, const void* pc,
                                                      const char* advice) {
    self = nullptr;
    std::string what = on_device(address) ? describe(address) : "host memory at " + std::to_string(address);
    stop("%s %zu bytes at %s%s.\n%s  %s", verb(access), bytes, what.c_str(), wrong, code_at(pc).c_str(), advice);
}

[[gnu::cold]] SIMT_UNWATCHED inline void access_elsewhere(uintptr_t address, size_t bytes, Access access, const void* pc) {
    const Launch& launch = *worker->launch;
    if (access == reads && address - uintptr_t(launch.arguments) < launch.argument_bytes) return;
    Thread* t = self;
    self = nullptr;                                           // below is the standard library's code, which is watched
    for (auto& [start, end] : worker->device->constants)
        if (access == reads && address >= start && address + bytes <= end) { self = t; return; }
    report_access(address, bytes, access, "", pc,
                  "Kernels can reach device memory, constants and their own local variables only: pass what they need as an argument.");
}

SIMT_UNWATCHED __forceinline__ void access(const void* p, size_t bytes, Access access, const void* pc) {
    Thread& t = *self;
    Worker& w = *worker;
    Device& d = *w.device;
    uintptr_t address = uintptr_t(p);
    size_t at = address - d.base;
    if (at >= range_bytes) {
        if (address - uintptr_t(t.fiber->stack) >= stack_bytes) access_elsewhere(address, bytes, access, pc);
        return;
    }
    uint32_t since = w.block_epoch;
    if (address - uintptr_t(w.arena) >= arena_bytes) {
        since = w.launch_epoch;
        if (access != writes) w.read += bytes;
        if (access != reads) w.written += bytes;
    }
    // The common case first: words that are allocated, initialised if they are read, and were never touched in part.
    const size_t end = at + bytes;
    for (; end - at >= 4 && at % 4 == 0; at += 4) {
        uint8_t& state = d.state[at / 4];
        if (access == writes && state >> 4 == 4) state = 0x4f;
        if (state != 0x4f) break;
        touch(d.cells[0][at / 4], t, since, d.base + at, access, pc);
    }
    for (; at < end; at = (at | 3) + 1) {
        const unsigned bits = bits_of(at, end), allocated = (1u << (d.state[at / 4] >> 4 & 7)) - 1;
        uint8_t& state = d.state[at / 4];
        if (bits & ~allocated)
            report_access(d.base + std::max<size_t>(at, (at & ~size_t(3)) + std::popcount(allocated)), bytes, access, "", pc,
                          "Check the index against the size; allocate before and free after use.");
        if (access != writes && bits & ~state)
            report_access(d.base + at, bytes, access, ", which nothing has written", pc,
                          "Write it first (is a barrier missing?): fresh memory is NaN here, and anything at all on a GPU.");
        if (access != reads) state |= bits;
        if (bits != 15 && !(state & 0x80)) {
            for (int byte = 1; byte < 4; ++byte) d.cells[byte][at / 4] = d.cells[0][at / 4];
            state |= 0x80;
        }
        if (!(state & 0x80)) touch(d.cells[0][at / 4], t, since, d.base + at, access, pc);
        else for (unsigned left = bits; left; left &= left - 1) {
            unsigned byte = __builtin_ctz(left);
            touch(d.cells[byte][at / 4], t, since, d.base + (at & ~size_t(3)) + byte, access, pc);
        }
    }
}

[[noreturn]] SIMT_UNWATCHED inline void misaligned(const void* address, size_t alignment) {
    stop("misaligned access: %p, which is not a multiple of %zu.\n  Vector types must lie at multiples of their size.", address, alignment);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Taking turns

SIMT_UNWATCHED inline void swap_in(Worker& w, Thread& t) {    // from the scheduler to a thread, until that waits or is done
    Fiber& fiber = *t.fiber;
    __sanitizer_start_switch_fiber(&w.scheduler_fake, fiber.stack, stack_bytes);
    w.running = &t;
    fiber.context = boost::context::detail::jump_fcontext(fiber.context, &w).fctx;
    w.running = nullptr;
    __sanitizer_finish_switch_fiber(w.scheduler_fake, nullptr, nullptr);
}
SIMT_UNWATCHED inline void swap_out(Worker& w, [[maybe_unused]] Fiber& fiber) {
    __sanitizer_start_switch_fiber(&fiber.fake, w.scheduler_stack, w.scheduler_stack_bytes);
    w.scheduler = boost::context::detail::jump_fcontext(w.scheduler, nullptr).fctx;
    __sanitizer_finish_switch_fiber(fiber.fake, &w.scheduler_stack, &w.scheduler_stack_bytes);
}

// A fiber runs the thread whose turn it is, and if that never waited, the next one of the block, and so on: a plain loop.
SIMT_UNWATCHED inline void fiber_main(boost::context::detail::transfer_t from) noexcept {
    Worker& w = *static_cast<Worker*>(from.data);
    w.scheduler = from.fctx;
    Fiber* fiber = w.thread[w.turns[w.turn]].fiber;
    __sanitizer_finish_switch_fiber(nullptr, &w.scheduler_stack, &w.scheduler_stack_bytes);
    for (;;) {
        Thread* t = &w.thread[w.turns[w.turn]];
        t->fiber = fiber;
        self = w.running = t;
        w.launch->call(w.launch->arguments);
        self = nullptr;
        t->state = Thread::done;
        --w.left;
        if (w.turn + 1 < w.count && w.thread[w.turns[w.turn + 1]].state == Thread::fresh) ++w.turn;
        else {
            w.idle.push_back(fiber);
            swap_out(w, *fiber);
        }
    }
}

inline Fiber* make_fiber() {
    void* memory = mmap(nullptr, guard_bytes + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard_bytes, PROT_NONE)) stop("no memory for the stacks of the threads.");
    char* stack = static_cast<char*>(memory) + guard_bytes;
    return new Fiber{boost::context::detail::make_fcontext(stack + stack_bytes, stack_bytes, fiber_main), stack};
}

// Every thread that is not done waits, for some that never come.
[[noreturn]] SIMT_UNWATCHED inline void report_stuck(Worker& w) {
    auto place = [](const Thread& t) {
        std::string file = t.where.file_name();
        return std::string(t.at) + " (" + file.substr(file.rfind('/') + 1) + ":" + std::to_string(t.where.line()) + ")";
    };
    Thread* t = nullptr, *other = nullptr;
    for (auto& each : w.threads)
        if (each.state == Thread::waiting && (!t || (each.mask && !t->mask))) t = &each;
    for (auto& each : w.threads) {                            // whom does it wait for?
        if (t->mask && (each.warp != t->warp || !(t->mask >> each.lane & 1))) continue;
        if (each.state == Thread::done || each.mask != t->mask || !same(each.where, t->where)) { other = &each; break; }
    }
    std::string here = place(*t), name = other ? "thread " + triple(other->index) : "another thread";
    std::string does = !other ? "does not" : other->state == Thread::done ? "has exited" : "waits at " + place(*other);
    if (t->mask && other && other->state != Thread::done && other->mask && other->mask != t->mask) does += " with another mask";
    w.running = t;
    if (!t->mask)
        stop("divergent barrier: waits at %s, while %s %s.\n  Every thread of the block must come to the same __syncthreads().",
             here.c_str(), name.c_str(), does.c_str());
    stop("divergent warp: waits at %s with mask 0x%08x, while %s %s.\n  All lanes of the mask must come to the same call with that mask.",
         here.c_str(), t->mask, name.c_str(), does.c_str());
}

inline void permute(std::vector<unsigned>& order, size_t n, std::minstd_rand& random) {
    order.resize(n);
    for (size_t i = 0; i < n; ++i) order[i] = unsigned(options.order == reverse ? n - 1 - i : i);
    if (options.order == shuffled) std::shuffle(order.begin(), order.end(), random);
}

inline void clear_arena(const Worker& w, size_t bytes) {      // of arrays: nothing but red zone
    ASAN_UNPOISON_MEMORY_REGION(w.arena, bytes);
    memset(w.arena, 0xff, bytes);
    ASAN_POISON_MEMORY_REGION(w.arena, bytes);
    set_state(uintptr_t(w.arena), bytes, false);
}
inline void fill_array(Array& a) {                            // NaN, and not yet written
    ASAN_UNPOISON_MEMORY_REGION(a.data, a.bytes);
    memset(a.data, 0xff, a.bytes);
    set_state(uintptr_t(a.data), a.bytes, true);
}

inline constexpr const char* allow_dynamic = "Allow for more dynamic memory, up to 99 KB in all, with "
                                             "cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes).";
inline void* add_array(Worker& w, const void* key, const char* name, size_t bytes, size_t alignment) {
    w.shared_used += bytes;
    if (w.array_count == max_arrays) stop("more than %zu shared arrays.", max_arrays);
    if (size_t fixed = w.shared_used - w.launch->dynamic_bytes; fixed > default_shared)
        stop("shared memory: '%s' makes it %zu bytes of static arrays, and %zu are allowed.\n  Past 48 KB it must be dynamic.",
             name, fixed, default_shared);
    if (w.shared_used > w.launch->shared_limit)
        stop("shared memory: '%s' makes it %zu bytes, and %zu are allowed.\n  %s", name, w.shared_used, w.launch->shared_limit,
             w.launch->shared_limit == default_shared ? allow_dynamic : "Use less.");
    size_t start = (w.arena_used + red_zone + alignment - 1) / alignment * alignment;
    w.arena_used = start + bytes + red_zone;
    w.arrays[w.array_count] = {key, name, w.arena + start, bytes};
    fill_array(w.arrays[w.array_count]);
    return w.arrays[w.array_count++].data;
}

template <class T, class Key> SIMT_UNWATCHED T& shared(const char* name) {
    static const char key = 0;
    Worker& w = *worker;
    for (size_t i = 0; i < w.array_count; ++i)
        if (w.arrays[i].key == &key) return *reinterpret_cast<T*>(w.arrays[i].data);
    Thread* t = self;
    self = nullptr;
    void* p = add_array(w, &key, name, sizeof(T), std::max<size_t>(32, alignof(T)));
    self = t;
    return *static_cast<T*>(p);
}
SIMT_UNWATCHED inline void* dynamic_shared() { return worker->arrays[0].data; }

SIMT_UNWATCHED inline void run_block(Worker& w) {
    size_t n = w.count;
    w.block_epoch = ++w.epoch;
    if (watched) w.block_epochs.emplace_back(w.block_epoch, w.block);
    for (size_t i = 0; i < w.array_count; ++i) fill_array(w.arrays[i]);
    for (Warp& warp : w.warps) warp.waiting = 0, warp.clock = 1;
    for (size_t i = 0; i < n; ++i) w.thread[i].state = Thread::fresh, w.thread[i].now.epoch = w.block_epoch;
    w.arrived = w.votes = 0;
    for (w.left = n; w.left;) {
        if (w.order.size() != n || options.order == shuffled) permute(w.order, n, w.random), w.turns = w.order.data();
        bool moved = false;
        for (w.turn = 0; w.turn < n; ++w.turn) {
            Thread& t = w.thread[w.turns[w.turn]];
            if (t.state == Thread::done || t.state == Thread::waiting) continue;
            moved = true;
            if (t.state == Thread::ready) swap_in(w, t);
            else {
                if (w.idle.empty()) w.idle.push_back(make_fiber());
                t.fiber = w.idle.back();
                w.idle.pop_back();
                swap_in(w, t);
            }
        }
        if (!moved) report_stuck(w);
    }
    for (size_t i = 0; i < w.array_count; ++i) {              // the red zones
        Array& a = w.arrays[i];
        ASAN_UNPOISON_MEMORY_REGION(a.data - red_zone, a.bytes + 2 * red_zone);
        for (size_t k = 0; k < 2 * red_zone; ++k) {
            char* p = k < red_zone ? a.data - red_zone + k : a.data + a.bytes + k - red_zone;
            if (*p != char(0xff)) stop("wrote %s.\n  Check the index against the array's size.", describe(uintptr_t(p)).c_str());
        }
        ASAN_POISON_MEMORY_REGION(a.data - red_zone, a.bytes + 2 * red_zone);
    }
}

// Runs some of the blocks of a launch on this OS thread; next() gives their numbers.
template <class Next> void run_blocks(const Launch& launch, Next& next, std::atomic<uint64_t>& read, std::atomic<uint64_t>& written) {
    static thread_local Worker w;
    static thread_local char signal_stack[64 << 10];          // for faults when a fiber has no stack left
    stack_t alternate = {}, previous;
    alternate.ss_sp = signal_stack, alternate.ss_size = sizeof signal_stack;
    sigaltstack(&alternate, &previous);                       // AddressSanitizer unmaps the one that it finds when the OS thread ends
    if (!w.arena) {
        w.device = &device();
        w.arena = static_cast<char*>(allocate(arena_bytes, "shared memory"));
        clear_arena(w, arena_bytes);
    }
    Open open;
    worker = &w;
    w.launch = &launch;
    w.launch_epoch = (w.epoch = w.device->epoch) + 1;
    w.block_epochs.clear();
    w.random.seed(unsigned(options.seed * 2 + 1));
    w.order.clear();
    w.array_count = w.arena_used = w.shared_used = w.read = w.written = 0;
    dim3 size = launch.block;
    unsigned n = size.x * size.y * size.z;
    w.threads.resize(n), w.thread = w.threads.data(), w.count = n;
    w.warps.resize((n + 31) / 32);
    for (Warp& warp : w.warps) warp.exists = 0;
    for (unsigned i = 0; i < n; ++i) {
        Thread& t = w.threads[i];
        t.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
        t.lane = i % 32, t.warp = &w.warps[i / 32];
        t.warp->exists |= 1u << t.lane;
        t.now = {};
        t.now.lanes = 1u << t.lane, t.now.warp = i / 32;
    }
    add_array(w, nullptr, "dynamic shared memory", launch.dynamic_bytes, 16);
    for (size_t b; next(b);) {
        w.block = {unsigned(b % launch.grid.x), unsigned(b / launch.grid.x % launch.grid.y), unsigned(b / launch.grid.x / launch.grid.y)};
        run_block(w);
    }
    if (watched) w.device->epoch = w.epoch;
    read += w.read, written += w.written;
    clear_arena(w, w.arena_used);                             // another launch has its red zones elsewhere
    w.array_count = 0;
    w.launch = nullptr;
    worker = nullptr;
    sigaltstack(&previous, nullptr);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Barriers, shuffles, votes

SIMT_UNWATCHED inline void wait(Worker& w, Thread& t) {       // until whoever comes last has made t ready
    t.state = Thread::waiting;
    swap_out(w, *t.fiber);
}

// Returns how many voted for it.
SIMT_UNWATCHED inline int barrier(bool vote, const char* name, const Location& where) {
    Thread& t = *self;
    Worker& w = *worker;
    self = nullptr;
    t.at = name, t.where = where, t.mask = 0;
    w.votes += vote;
    size_t n = w.count;
    bool all = ++w.arrived == n;
    for (size_t i = 0; all && i < n; ++i) all = same(w.thread[i].where, where);
    if (!all) wait(w, t);
    else {
        ++w.epoch;
        for (size_t i = 0; i < n; ++i) {
            Thread& each = w.thread[i];
            each.state = Thread::ready, each.votes = w.votes, each.now.epoch = w.epoch;
        }
        for (Thread* each = w.thread; each < w.thread + n; each += 32) each->warp->clock = 1;
        w.arrived = w.votes = 0;
    }
    self = &t;
    return int(t.votes);
}

// Waits for all lanes of the mask that exist, at one line of the source. The last to come does their common work: meet(lanes, members),
// which is not watched if it says so itself.
template <class F>
SIMT_UNWATCHED void gather(uint32_t mask, const char* name, const Location& where, F&& meet) {
    Thread& t = *self;
    Worker& w = *worker;
    Warp& warp = *t.warp;
    self = nullptr;
    t.at = name, t.where = where, t.mask = mask;
    Thread* lanes = &t - t.lane;
    uint32_t members = mask & warp.exists;
    if (!(mask >> t.lane & 1))
        stop("%s with mask 0x%08x: the calling lane is not in it.\n  A lane must name itself in its mask.", name, mask);
    warp.waiting |= 1u << t.lane;
    bool all = (warp.waiting & members) == members;
    for (uint32_t m = members; all && m; m &= m - 1) {
        Thread& each = lanes[__builtin_ctz(m)];
        all = each.mask == mask && same(each.where, where);
    }
    if (!all) wait(w, t);
    else {
        meet(lanes, members);
        for (uint32_t m = members; m; m &= m - 1) lanes[__builtin_ctz(m)].state = Thread::ready;
        warp.waiting &= ~members;
    }
    self = &t;
}
// All lanes give a value and get that of the lane they ask for, and in votes who gave other than 0.
SIMT_UNWATCHED inline uint64_t exchange(uint32_t mask, uint64_t value, int source, bool orders, const char* name, const Location& where) {
    Thread& t = *self;
    t.value = value, t.source = source;
    if (!((mask & t.warp->exists) >> source & 1) && mask >> t.lane & 1) {
        self = nullptr;
        stop("%s with mask 0x%08x: asks for the value of a lane that is not in it, or is not there.\n  Such a value is undefined.", name, mask);
    }
    gather(mask, name, where, [&](Thread* lanes, uint32_t members) SIMT_UNWATCHED {
        uint32_t votes = 0;
        for (uint32_t m = members; m; m &= m - 1) votes |= uint32_t(lanes[__builtin_ctz(m)].value != 0) << __builtin_ctz(m);
        for (uint32_t m = members; m; m &= m - 1) {
            Thread& each = lanes[__builtin_ctz(m)];
            each.votes = votes, each.result = lanes[each.source].value;
        }
        if (orders && ++t.warp->clock == 1u << 24) stop("more than 16 million __syncwarps between barriers.");
    });
    return t.result;
}
template <class T> SIMT_UNWATCHED T shuffle(uint32_t mask, T value, int from, const char* name, const Location& where) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles take numbers of 4 or 8 bytes");
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof value);
    bits = exchange(mask, bits, from, false, name, where);
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
SIMT_UNWATCHED inline int lane() { return int(self->lane); }
SIMT_UNWATCHED inline unsigned votes() { return self->votes; }
}

#define SIMT_HERE simt::Location where = simt::Location::current()
inline void __syncthreads(SIMT_HERE) { simt::barrier(false, "__syncthreads()", where); }
inline int __syncthreads_count(int vote, SIMT_HERE) { return simt::barrier(vote, "__syncthreads_count()", where); }
inline void __syncwarp(SIMT_HERE) { simt::exchange(~0u, 0, simt::lane(), true, "__syncwarp()", where); }
inline unsigned __ballot_sync(unsigned mask, int vote, SIMT_HERE) {
    simt::exchange(mask, vote != 0, simt::lane(), false, "__ballot_sync()", where);
    return simt::votes();
}
// Groups of "width" lanes shuffle among themselves; who asks beyond its group keeps its own value.
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_HERE) {
    return simt::shuffle(mask, value, (simt::lane() & -width) | (source & (width - 1)), "__shfl_sync()", where);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
    int lane = simt::lane(), from = lane - int(delta);
    return simt::shuffle(mask, value, from < (lane & -width) ? lane : from, "__shfl_up_sync()", where);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SIMT_HERE) {
    int lane = simt::lane(), from = lane ^ bits;
    return simt::shuffle(mask, value, from > (lane | (width - 1)) ? lane : from, "__shfl_xor_sync()", where);
}

// Products of 16 x 16 matrices by a warp (mma.h), of bfloat16 with float sums. Where an element is, in which lane and place, is a secret of
// the device: here it is another mapping than on any GPU. On a GPU the lanes of a warp come to each of these functions together, and so here.
namespace nvcuda::wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
template <class Use, int m, int n, int k, class T, class Layout = void> struct fragment {
    static_assert(m == 16 && n == 16 && k == 16);
    static constexpr int num_elements = 8;
    T x[num_elements];
};
}
namespace simt {
SIMT_UNWATCHED inline int matrix_row(int lane, int i) { return (lane * 5 + i * 2) % 16; }
SIMT_UNWATCHED inline int matrix_column(int lane, int i) { return (lane / 16 * 8 + i) ^ 5; }
template <class T> SIMT_UNWATCHED void check_matrix(const T* memory, unsigned ld, const char* name, const Location& where) {
    gather(~0u, name, where, [](Thread*, uint32_t) SIMT_UNWATCHED {});
    Thread* t = self;
    self = nullptr;
    if (t->warp->exists != ~0u) stop("%s: not all 32 lanes are there.\n  Launch whole warps.", name);
    if (uintptr_t(memory) % 32 || ld * sizeof(T) % 16)
        stop("%s at %p with %u elements from row to row: misaligned.\n  A matrix begins at a multiple of 32 bytes, its rows at multiples of 16.",
             name, static_cast<const void*>(memory), ld);
    self = t;
}
}
namespace nvcuda::wmma {
template <class Fragment, class T>
void load_matrix(Fragment& f, const T* memory, unsigned ld, bool by_columns, const simt::Location& where) {
    simt::check_matrix(memory, ld, "load_matrix_sync()", where);
    for (int i = 0, lane = simt::lane(); i < f.num_elements; i++) {
        const unsigned row = simt::matrix_row(lane, i), column = simt::matrix_column(lane, i);
        f.x[i] = memory[by_columns ? column * ld + row : row * ld + column];
    }
}
template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* memory, unsigned ld, SIMT_HERE) {
    load_matrix(f, memory, ld, std::is_same_v<Layout, col_major>, where);
}
inline void load_matrix_sync(fragment<accumulator, 16, 16, 16, float>& f, const float* memory, unsigned ld, layout_t layout, SIMT_HERE) {
    load_matrix(f, memory, ld, layout == mem_col_major, where);
}
inline void fill_fragment(fragment<accumulator, 16, 16, 16, float>& f, float value) {
    for (float& x : f.x) x = value;
}
// d = a b + c, which may be d
template <class A, class B>
SIMT_UNWATCHED void mma_sync(fragment<accumulator, 16, 16, 16, float>& d, const fragment<matrix_a, 16, 16, 16, __nv_bfloat16, A>& a,
                             const fragment<matrix_b, 16, 16, 16, __nv_bfloat16, B>& b,
                             const fragment<accumulator, 16, 16, 16, float>& c, SIMT_HERE) {
    struct Given { decltype(&d) out; decltype(&a) left; decltype(&b) right; decltype(&c) in; } given{&d, &a, &b, &c};
    simt::self->value = uint64_t(&given);
    simt::gather(~0u, "mma_sync()", where, [](simt::Thread* lanes, uint32_t) SIMT_UNWATCHED {
        float of_a[16][16], of_b[16][16];
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 8; i++) {
                const Given& g = *reinterpret_cast<const Given*>(lanes[lane].value);
                const int row = simt::matrix_row(lane, i), column = simt::matrix_column(lane, i);
                of_a[row][column] = g.left->x[i], of_b[row][column] = g.right->x[i];
            }
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 8; i++) {
                const Given& g = *reinterpret_cast<const Given*>(lanes[lane].value);
                float sum = g.in->x[i];
                for (int k = 0; k < 16; k++) sum += of_a[simt::matrix_row(lane, i)][k] * of_b[k][simt::matrix_column(lane, i)];
                g.out->x[i] = sum;
            }
    });
}
}
#undef SIMT_HERE

// ---------------------------------------------------------------------------------------------------------------------------------
// Launches

using cudaStream_t = struct simt_stream*;

namespace simt {
struct Traffic { uint64_t read = 0, written = 0, launches = 0; };              // bytes of global memory; atomics count as both
// Of all launches of a kernel, by its name without template arguments, since the last reset. Bytes are counted in watched builds only.
inline std::map<std::string, Traffic> traffics;
inline void traffic_reset() { traffics.clear(); }

template <class... P> struct Launcher {
    const char* name;
    void (*kernel)(P...);
    dim3 grid, block;
    size_t dynamic_bytes;

    using Call = std::pair<void (*)(P...), std::tuple<P...>>;
    template <size_t... i> SIMT_UNWATCHED static void call(const Call& c, std::index_sequence<i...>) { c.first(std::get<i>(c.second)...); }
    SIMT_UNWATCHED static void call(const void* c) { call(*static_cast<const Call*>(c), std::index_sequence_for<P...>()); }

    void operator()(std::type_identity_t<P>... arguments) const {
        Device& d = device();
        std::lock_guard lock(d.launching);
        Call it{kernel, {arguments...}};
        size_t attribute = d.max_dynamic.count(reinterpret_cast<void*>(kernel)) ? d.max_dynamic[reinterpret_cast<void*>(kernel)] : 0;
        Launch launch = {name, grid, block, dynamic_bytes, attribute ? max_shared : default_shared, call, &it, sizeof it};
        uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, threads = uint64_t(block.x) * block.y * block.z;
        auto refuse = [&](const char* what, const char* advice) {
            stop("kernel %s: <<<%s, %s, %zu>>> cannot be launched: %s.\n  %s", name, triple(grid).c_str(), triple(block).c_str(),
                 dynamic_bytes, what, advice);
        };
        if (!blocks || !threads) refuse("zero blocks or threads", "Skip the launch when there is nothing to do.");
        if (threads > 1024 || block.x > 1024 || block.y > 1024) refuse("more than 1024 threads per block", "Use more blocks.");
        if (block.z > 64) refuse("more than 64 threads in z", "Use x or y.");
        if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
            refuse("more than 2147483647 blocks in x, or 65535 in y or z", "Put the long dimension in x, or loop.");
        if (dynamic_bytes > default_shared && dynamic_bytes > attribute) refuse("more than 48 KB of dynamic shared memory", allow_dynamic);
        if (d.epoch > 1u << 31) {                             // start counting anew
            for (Cell* plane : d.cells) if (plane) madvise(plane, range_bytes / 4 * sizeof(Cell), MADV_DONTNEED);
            d.epoch = 1;
        }
        std::vector<unsigned> order;
        std::minstd_rand random(unsigned(options.seed * 2 + 1));
        permute(order, blocks, random);
        std::atomic<uint64_t> taken = 0;
        auto next = [&](size_t& b) {
            uint64_t i = taken++;
            if (i < blocks) b = order[i];
            return i < blocks;
        };
        // Watched blocks run on one OS thread: what is kept of each byte then needs no locks, and a fault is found where it was last time.
        int workers = watched ? 1 : int(std::min<uint64_t>(blocks, options.threads));
        ++launches;
        Open open;
        std::atomic<uint64_t> read = 0, written = 0;
        if (workers == 1) run_blocks(launch, next, read, written);
        else {
#pragma omp parallel num_threads(workers)
            run_blocks(launch, next, read, written);
        }
        worker = nullptr;
        if (!watched)
            for (auto& [start, bytes] : d.live) check_tail(std::string("kernel ") + name, start, d.allocations[start]);
        std::string base = name + strspn(name, "( ");
        Traffic& t = traffics[base.substr(0, base.find_first_of("<) "))];
        t.read += read, t.written += written, ++t.launches;
    }
};
template <class... P>
Launcher<P...> launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t) {
    return {name, kernel, grid, block, dynamic_bytes};
}

}

template <class T> SIMT_UNWATCHED T atomicAdd(T* p, std::type_identity_t<T> value) {
    if (uintptr_t(p) % sizeof(T)) simt::misaligned(p, sizeof(T));
    if (simt::watched && simt::self) simt::access(p, sizeof(T), simt::updates, __builtin_return_address(0));
    T old, sum;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do sum = old + value;
    while (!__atomic_compare_exchange(p, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// The runtime: everything happens at once and in order

enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
struct cudaDeviceProp { char name[256]; };
struct cudaFuncAttributes { int maxThreadsPerBlock; };
struct simt_stream {};

inline const char* cudaGetErrorName(cudaError_t e) {
    switch (e) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
        case cudaErrorNoDevice: return "cudaErrorNoDevice";
        case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
        default: return "cudaErrorInvalidValue";
    }
}
inline const char* cudaGetErrorString(cudaError_t e) { return cudaGetErrorName(e); }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = simt::options.device_status == cudaSuccess ? simt::options.device_count : 0;
    return simt::options.device_status;
}
inline cudaError_t cudaGetDevice(int* id) { *id = 0; return cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) { strcpy(p->name, "simt"); return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? simt::options.multiprocessors : int(simt::options.shared_optin);
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { *version = simt::options.driver_version; return cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { *version = simt::options.runtime_version; return cudaSuccess; }
template <class... P> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(P...)) {
    *attributes = {1024};
    return simt::options.code_status;
}
template <class... P> cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int value) {
    if (value < 0 || size_t(value) > std::min(simt::options.shared_optin, simt::max_shared)) return cudaErrorInvalidValue;
    simt::device().max_dynamic[reinterpret_cast<void*>(kernel)] = size_t(value);
    return cudaSuccess;
}
template <class... P> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int, size_t) {
    *blocks = simt::options.blocks_per_multiprocessor;
    return cudaSuccess;
}

inline constexpr unsigned cudaStreamNonBlocking = 1;
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { *stream = new simt_stream; return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { delete stream; return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { ++simt::waits; return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { ++simt::waits; return cudaSuccess; }

template <class T> cudaError_t cudaMalloc(T** p, size_t bytes) {
    *p = bytes ? static_cast<T*>(simt::allocate(bytes, nullptr)) : nullptr;
    return *p || !bytes ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* p) {
    if (!p) return cudaSuccess;
    simt::Device& d = simt::device();
    std::lock_guard lock(d.mutex);
    auto it = d.allocations.find(uintptr_t(p));
    if (it == d.allocations.end()) simt::stop("cudaFree of %p, which cudaMalloc never returned.\n  Free the pointer that it did.", p);
    auto& [start, a] = *it;
    if (!a.live) simt::stop("cudaFree of %s.\n  Free it once.", simt::describe(start).c_str());
    void* pages = reinterpret_cast<void*>(d.page_start(start));
    size_t bytes = d.page_end(start + a.bytes) - d.page_start(start);
    mprotect(pages, bytes, PROT_READ | PROT_WRITE);
    simt::check_tail("the host", start, a);
    madvise(pages, bytes, MADV_DONTNEED);
    mprotect(pages, bytes, PROT_NONE);
    simt::set_state(start, a.bytes, false);
    d.used -= a.bytes;
    a.live = false;
    d.live.erase(start);
    return cudaSuccess;
}
template <class T> cudaError_t cudaMallocHost(T** p, size_t bytes) {
    if (!(*p = static_cast<T*>(malloc(bytes)))) return cudaErrorMemoryAllocation;
    std::lock_guard lock(simt::device().mutex);
    simt::device().page_locked[uintptr_t(*p)] = bytes;
    return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* p) {
    std::lock_guard lock(simt::device().mutex);
    if (p && !simt::device().page_locked.erase(uintptr_t(p)))
        simt::stop("cudaFreeHost of %p, which cudaMallocHost never returned.\n  Free the pointer that it did, once.", p);
    free(p);
    return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
    *total = simt::range_bytes, *unused = simt::range_bytes - simt::device().used;
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    ++simt::launches;
    simt::check_range("cudaMemset", to, bytes);
    simt::Open open;
    memset(to, value, bytes);
    simt::set_initialised(uintptr_t(to), bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t = nullptr) {
    bool to_device = kind != cudaMemcpyDeviceToHost, from_device = kind != cudaMemcpyHostToDevice;
    for (auto [p, expected] : {std::pair<const void*, bool>(to, to_device), {from, from_device}}) {
        if (expected) simt::check_range("cudaMemcpy", p, bytes);
        else if (bytes && simt::on_device(uintptr_t(p)))
            simt::stop("cudaMemcpy takes for the host's: %s.\n  Check its direction.", simt::describe(uintptr_t(p)).c_str());
    }
    simt::Open open;
    if (!from_device) {                                       // such a copy is through with pageable memory when it returns
        std::lock_guard lock(simt::device().mutex);
        auto& blocks = simt::device().page_locked;
        auto it = blocks.upper_bound(uintptr_t(from));
        simt::waits += it == blocks.begin() || (--it, uintptr_t(from) + bytes > it->first + it->second);
    }
    memcpy(to, from, bytes);
    if (!from_device) simt::set_initialised(uintptr_t(to), bytes);
    for (size_t i = 0; simt::watched && from_device && i < bytes; ++i) {       // a copy is as unwritten as its source: NaN, for the host
        bool written = simt::initialised(uintptr_t(from) + i);
        if (to_device) simt::set_initialised(uintptr_t(to) + i, 1, written);
        else if (!written) static_cast<uint8_t*>(to)[i] = 0xff;
    }
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) { return cudaMemset(to, value, bytes); }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    cudaMemcpyAsync(to, from, bytes, kind);
    return cudaStreamSynchronize(nullptr);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// cuBLAS: column-major, as in Fortran

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasMath_t { CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16 };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1 };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_R_16BF = 14 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_64F = 70 };
using cublasHandle_t = struct simt_cublas*;
namespace simt { inline size_t bytes_of(cudaDataType_t type) { return type == CUDA_R_16BF ? 2 : type == CUDA_R_32F ? 4 : 8; } }

inline const char* cublasGetStatusString(cublasStatus_t s) {
    return s == CUBLAS_STATUS_SUCCESS ? "success" : s == CUBLAS_STATUS_INVALID_VALUE ? "invalid value" : "not supported";
}
struct simt_cublas {};
inline cublasStatus_t cublasCreate(cublasHandle_t* handle) { *handle = new simt_cublas; return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasDestroy(cublasHandle_t handle) { delete handle; return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasGetVersion(cublasHandle_t, int* version) { *version = 130000; return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t) { return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasSetWorkspace(cublasHandle_t, void*, size_t) { return CUBLAS_STATUS_SUCCESS; }

inline cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t opA, cublasOperation_t opB, int m, int n, int k, const void* alpha,
                                   const void* A, cudaDataType_t typeA, int lda, const void* B, cudaDataType_t typeB, int ldb,
                                   const void* beta, void* C, cudaDataType_t typeC, int ldc, cublasComputeType_t compute,
                                   cublasGemmAlgo_t) {
    ++simt::launches;
    bool wide = compute == CUBLAS_COMPUTE_64F;
    int rowsA = opA == CUBLAS_OP_N ? m : k, columnsA = opA == CUBLAS_OP_N ? k : m;
    int rowsB = opB == CUBLAS_OP_N ? k : n, columnsB = opB == CUBLAS_OP_N ? n : k;
    if (m < 0 || n < 0 || k < 0 || lda < std::max(1, rowsA) || ldb < std::max(1, rowsB) || ldc < std::max(1, m))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (typeA != typeB || (typeA == CUDA_R_64F) != wide || (typeC == CUDA_R_64F) != wide || (typeA == CUDA_R_32F && typeC == CUDA_R_16BF))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    auto check = [](const void* matrix, cudaDataType_t type, int rows, int columns, int ld, bool initialised) {
        for (size_t j = 0; j < size_t(columns); ++j)
            simt::check_range("cublasGemm", static_cast<const char*>(matrix) + j * ld * simt::bytes_of(type), rows * simt::bytes_of(type),
                              initialised);
    };
    check(A, typeA, rowsA, columnsA, lda, true);
    check(B, typeB, rowsB, columnsB, ldb, true);
    check(C, typeC, m, n, ldc, wide ? *static_cast<const double*>(beta) != 0 : *static_cast<const float*>(beta) != 0);
    simt::Open open;
    auto transA = opA == CUBLAS_OP_N ? CblasNoTrans : CblasTrans, transB = opB == CUBLAS_OP_N ? CblasNoTrans : CblasTrans;
    if (wide)
        cblas_dgemm(CblasColMajor, transA, transB, m, n, k, *static_cast<const double*>(alpha), static_cast<const double*>(A), lda,
                    static_cast<const double*>(B), ldb, *static_cast<const double*>(beta), static_cast<double*>(C), ldc);
    else {
        std::vector<float> copies[3];                         // of bfloat16 matrices
        auto as_float = [](std::vector<float>& copy, const void* matrix, cudaDataType_t type, int rows, int columns, int ld) {
            if (type == CUDA_R_32F) return static_cast<const float*>(matrix);
            auto from = static_cast<const __nv_bfloat16*>(matrix);
            copy.resize(size_t(columns) * ld);
            for (size_t j = 0; j < size_t(columns); ++j) std::copy_n(from + j * ld, rows, &copy[j * ld]);
            return static_cast<const float*>(copy.data());
        };
        const float* a = as_float(copies[0], A, typeA, rowsA, columnsA, lda), *b = as_float(copies[1], B, typeB, rowsB, columnsB, ldb);
        float* c = const_cast<float*>(as_float(copies[2], C, typeC, m, n, ldc));
        cblas_sgemm(CblasColMajor, transA, transB, m, n, k, *static_cast<const float*>(alpha), a, lda, b, ldb,
                    *static_cast<const float*>(beta), c, ldc);
        for (size_t j = 0; typeC == CUDA_R_16BF && j < size_t(n); ++j)
            std::copy_n(c + j * ldc, m, static_cast<__nv_bfloat16*>(C) + j * ldc);
    }
    for (size_t j = 0; j < size_t(n); ++j)
        simt::set_initialised(uintptr_t(C) + j * ldc * simt::bytes_of(typeC), m * simt::bytes_of(typeC));
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t opA, cublasOperation_t opB, int m, int n, int k,
                                                 const void* alpha, const void* A, cudaDataType_t typeA, int lda, long long strideA,
                                                 const void* B, cudaDataType_t typeB, int ldb, long long strideB, const void* beta, void* C,
                                                 cudaDataType_t typeC, int ldc, long long strideC, int batches,
                                                 cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    auto at = [](auto* matrix, int64_t element, cudaDataType_t type) {
        return reinterpret_cast<decltype(matrix)>(uintptr_t(matrix) + element * simt::bytes_of(type));
    };
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    const uint64_t launches = simt::launches + 1;             // one, whatever the number of batches
    simt::Open open;
    for (int i = 0; i < batches && status == CUBLAS_STATUS_SUCCESS; ++i)
        status = cublasGemmEx(handle, opA, opB, m, n, k, alpha, at(A, i * strideA, typeA), typeA, lda, at(B, i * strideB, typeB), typeB,
                              ldb, beta, at(C, i * strideC, typeC), typeC, ldc, compute, algorithm);
    simt::launches = launches;
    return status;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// What the compiler's instrumentation calls. Weak: each watched file brings these, and the program keeps one.

#define SIMT_RUNTIME extern "C" __attribute__((weak, used, no_sanitize("thread")))
#ifdef __SANITIZE_THREAD__
SIMT_RUNTIME void __tsan_init() { simt::watched = true; }     // before any constructor of the program's
SIMT_RUNTIME void __tsan_func_entry(void*) {}
SIMT_RUNTIME void __tsan_func_exit() {}
SIMT_RUNTIME void __tsan_vptr_update(void**, void*) {}
SIMT_RUNTIME void __tsan_vptr_read(void**) {}
// Host code returns at once. A type that is aligned to less than its size, or than 8, is a range: what comes as 16 bytes is one vector.
template <size_t bytes, simt::Access access> [[gnu::noinline]] SIMT_UNWATCHED void simt_access(const void* p, const void* pc) {
    if (uintptr_t(p) % bytes && uintptr_t(p) - simt::worker->device->base < simt::range_bytes) simt::misaligned(p, bytes);
    simt::access(p, bytes, access, pc);
}
#define SIMT_ACCESS(bytes)                                                                                                           \
    SIMT_RUNTIME void __tsan_read##bytes(void* p) { if (simt::self) simt_access<bytes, simt::reads>(p, __builtin_return_address(0)); } \
    SIMT_RUNTIME void __tsan_write##bytes(void* p) { if (simt::self) simt_access<bytes, simt::writes>(p, __builtin_return_address(0)); }
SIMT_ACCESS(1) SIMT_ACCESS(2) SIMT_ACCESS(4) SIMT_ACCESS(8) SIMT_ACCESS(16)
#undef SIMT_ACCESS
SIMT_RUNTIME void __tsan_read_range(void* p, size_t bytes) {
    if (simt::self) simt::access(p, bytes, simt::reads, __builtin_return_address(0));
}
SIMT_RUNTIME void __tsan_write_range(void* p, size_t bytes) {
    if (simt::self) simt::access(p, bytes, simt::writes, __builtin_return_address(0));
}
// A vector whose elements are used one by one is read in parts, each of them aligned: here the compiler checks the whole's address.
struct simt_mismatch { const char* file; unsigned line, column; const void* type; unsigned char log_alignment, kind; };
SIMT_RUNTIME void __ubsan_handle_type_mismatch_v1(const simt_mismatch* what, const void* p) {
    if (simt::self) simt::misaligned(p, size_t(1) << what->log_alignment);
}
// std::atomic and the guards of static variables, which are the host's: atomics of kernels are above.
#define SIMT_FETCH(bits, T, name)                                                                                                    \
    SIMT_RUNTIME T __tsan_atomic##bits##_fetch_##name(volatile T* p, T v, int) { return __atomic_fetch_##name(p, v, __ATOMIC_SEQ_CST); }
#define SIMT_COMPARE(bits, T, strength, weak)                                                                                        \
    SIMT_RUNTIME bool __tsan_atomic##bits##_compare_exchange_##strength(volatile T* p, T* expected, T v, int, int) {                  \
        return __atomic_compare_exchange_n(p, expected, v, weak, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                                \
    }
#define SIMT_ATOMICS(bits, T)                                                                                                        \
    SIMT_RUNTIME T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }              \
    SIMT_RUNTIME void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }              \
    SIMT_RUNTIME T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }    \
    SIMT_FETCH(bits, T, add) SIMT_FETCH(bits, T, sub) SIMT_FETCH(bits, T, and) SIMT_FETCH(bits, T, or) SIMT_FETCH(bits, T, xor)      \
    SIMT_COMPARE(bits, T, strong, false) SIMT_COMPARE(bits, T, weak, true)
SIMT_ATOMICS(8, unsigned char) SIMT_ATOMICS(16, unsigned short) SIMT_ATOMICS(32, unsigned int) SIMT_ATOMICS(64, unsigned long)
#undef SIMT_ATOMICS
#undef SIMT_COMPARE
#undef SIMT_FETCH
SIMT_RUNTIME void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
SIMT_RUNTIME void __tsan_atomic_signal_fence(int) {}

// Calls of these, the compiler's own among them, are not instrumented: in watched files they go by other names.
extern "C" void* simt_libc_memcpy(void*, const void*, size_t) __asm__("memcpy");
extern "C" void* simt_libc_memmove(void*, const void*, size_t) __asm__("memmove");
extern "C" void* simt_libc_memset(void*, int, size_t) __asm__("memset");
SIMT_RUNTIME void* simt_memcpy(void* to, const void* from, size_t bytes) {
    if (simt::self) __tsan_read_range(const_cast<void*>(from), bytes), __tsan_write_range(to, bytes);
    return simt_libc_memcpy(to, from, bytes);
}
SIMT_RUNTIME void* simt_memmove(void* to, const void* from, size_t bytes) {
    if (simt::self) __tsan_read_range(const_cast<void*>(from), bytes), __tsan_write_range(to, bytes);
    return simt_libc_memmove(to, from, bytes);
}
SIMT_RUNTIME void* simt_memset(void* to, int value, size_t bytes) {
    if (simt::self) __tsan_write_range(to, bytes);
    return simt_libc_memset(to, value, bytes);
}
extern "C" void* memcpy(void*, const void*, size_t) noexcept __asm__("simt_memcpy");
extern "C" void* memmove(void*, const void*, size_t) noexcept __asm__("simt_memmove");
extern "C" void* memset(void*, int, size_t) noexcept __asm__("simt_memset");
#endif
#ifdef __SANITIZE_ADDRESS__
// The sanitizers call these ahead of their own reports.
SIMT_RUNTIME void __asan_on_error() {
    if (!simt::self) return;
    std::string what = simt::describe(uintptr_t(__asan_get_report_address()));
    simt::report(("touches " + what + ".\n  Check the index against the size.").c_str());
}
extern "C" __attribute__((weak)) void __ubsan_get_current_report_data(const char** kind, const char** message, const char** file,
                                                                      unsigned* line, unsigned* column, char** address);
SIMT_RUNTIME void __ubsan_on_report() {
    if (!simt::self) return;
    const char *kind, *message, *file;
    unsigned line, column;
    char* address;
    __ubsan_get_current_report_data(&kind, &message, &file, &line, &column, &address);
    simt::stop("%s.\n  %s at %s:%u.", message, kind, file, line);
}
#endif
#undef SIMT_RUNTIME
