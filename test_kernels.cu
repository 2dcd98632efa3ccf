// The tests of layers, kernels and the Model. A layer is described once, as a body that declares its tensors by name and calls its
// forward and backward functions; four tests read nothing but these descriptions:
//   [fd]      each gradient of the plain loops against central differences of <upstream gradient, output>         (double build)
//   [gpu]     each output of a kernel against the plain loops', from poisoned memory, and the same bits in every schedule of threads
//             and blocks
//   [cpu]     each output of the fast CPU functions against the plain loops', with one thread, two and five
//   [oracle]  inputs, outputs and gradients against files that PyTorch and transformers wrote (oracle/make_reference.py)
// Then [layers] alone asks what holds for all sizes, [traffic] counts the bytes that the scan moves, [model] holds whole models to what
// they must do, and [launches] counts launches and waits.
// MOEMAMBA_TEST_SEED=n draws other inputs; a failure prints the seed that it had. MOEMAMBA_TEST_LAYER=name runs only the layers so named.
#include "moemamba.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <numeric>
#include <optional>
#include <set>
#include <sstream>
#include <omp.h>
#include <unistd.h>
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif

namespace {
// ------------------------------------------------------------------------------------------------------------------
// Numbers

constexpr bool kDouble = sizeof(floatX) == sizeof(double);
constexpr double by_precision(double in_double, double in_float, double in_bf16) {
    return kDouble ? in_double : kMixedPrecision ? in_bf16 : in_float;
}
constexpr double kClose = by_precision(1e-12, 5e-6, 1e-2);  // of two implementations, ||a - b|| / ||b||

const uint64_t seed = getenv("MOEMAMBA_TEST_SEED") ? strtoull(getenv("MOEMAMBA_TEST_SEED"), nullptr, 10) : 1;

template <class T> T narrow(double value) {
    if constexpr (std::is_same_v<T, floatX> && kMixedPrecision) return floatX(float(value));
    else return T(value);
}
template <class T> double widen(T value) {
    if constexpr (std::is_same_v<T, floatX> && kMixedPrecision) return float(value);
    else return value;
}

double norm(const std::vector<double>& a) {
    double sum = 0;
    for (double x : a) sum += x * x;
    return std::sqrt(sum);
}
// Relative where b is not all zero. A NaN anywhere gives NaN, which is not <= anything.
double distance(std::vector<double> a, const std::vector<double>& b) {
    REQUIRE(a.size() == b.size());
    for (size_t i = 0; i < a.size(); ++i) a[i] -= b[i];
    return norm(b) > 0 ? norm(a) / norm(b) : norm(a);
}

// Element i of the tensor that has this random stream.
using Values = std::function<double(uint64_t stream, int64_t i)>;
Values normal(double deviation = 1, double mean = 0) {
    return [=](uint64_t stream, int64_t i) { return mean + deviation * random_normal(seed, stream, i); };
}
Values integers(int low, int high) {  // [low, high)
    return [=](uint64_t stream, int64_t i) { return low + std::floor((high - low) * random_uniform(seed, stream, i)); };
}
Values constants(std::vector<double> values) {
    return [=](uint64_t, int64_t i) { return values[i % values.size()]; };
}
uint64_t stream_of(const std::string& name) { return std::hash<std::string>()(name); }

// ------------------------------------------------------------------------------------------------------------------
// Devices

bool gpu_is_here() {
#ifdef USE_CUDA
    static const bool here = [] {
        int count = 0;
        bool found = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
        if (!found) printf("skipped: kernels on a GPU, for there is none here\n");
        return found;
    }();
    return here;
#else
    return true;
#endif
}
std::vector<const Layers*> devices() {  // the first is what the others are held against
    std::vector<const Layers*> all = {&plain::layers, &cpu::layers};
    if (gpu_is_here()) all.push_back(&gpu::layers);
    return all;
}
cudaStream_t device_stream(const Layers& on) {
    static std::map<const Layers*, cudaStream_t> streams;
    const auto [stream, is_new] = streams.try_emplace(&on);
    if (is_new) stream->second = on.open();
    return stream->second;
}

// The order of threads and blocks: 0 forward, 1 reverse, else random. A GPU has an order of its own, another one each time.
#ifdef __SANITIZE_ADDRESS__
constexpr int kSchedules = 2;  // which memory is touched does not hang on the order; that results do not, the other builds show
#else
constexpr int kSchedules = 5;
#endif
#ifndef USE_CUDA
// To close device memory to the host takes a fifth of the time, and the host's code is the same in every precision: one of them is enough.
[[maybe_unused]] const bool closed = simt::options.closed = simt::options.closed && sizeof(floatX) == sizeof(float);
#endif
struct Schedule {
#ifdef USE_CUDA
    explicit Schedule(int) {}
    ~Schedule() {}
#else
    const simt::Options before = simt::options;
    explicit Schedule(int schedule) {
        simt::options.order = schedule == 0 ? simt::forward : schedule == 1 ? simt::reverse : simt::shuffled;
        simt::options.seed = seed + schedule;
    }
    ~Schedule() { simt::options = before; }
#endif
};

// ------------------------------------------------------------------------------------------------------------------
// One execution of a layer's description

// Rows in memory; elements between the rows, where ld > width, belong to someone else.
struct Shape {
    int64_t rows, width, ld, offset;
    Shape(int64_t count) : Shape(1, count) {}
    Shape(int64_t rows, int64_t width) : Shape(rows, width, width, 0) {}
    Shape(int64_t rows, int64_t width, int64_t ld, int64_t offset) : rows(rows), width(width), ld(ld), offset(offset) {}
    int64_t count() const { return rows * width; }
    int64_t size() const { return rows * ld; }
    int64_t at(int64_t i) const { return i / width * ld + offset + i % width; }
};

struct Array {
    enum Role { input, output, sum } role;  // sum: an output that is added to
    std::string name;
    Shape shape;
    bool integer;
    bool rewritten = false;  // another output has taken its memory
    void* memory;
    std::vector<unsigned char> before, after;
    double (*get)(const unsigned char* bytes, int64_t i);

    std::vector<double> values(const std::vector<unsigned char>& bytes) const {
        std::vector<double> all(shape.count());
        for (int64_t i = 0; i < shape.count(); ++i) all[i] = get(bytes.data(), shape.at(i));
        return all;
    }
    // What the call itself gave: of a sum, what it added.
    std::vector<double> result() const {
        std::vector<double> all = values(after);
        if (role == sum)
            for (int64_t i = 0; i < shape.count(); ++i) all[i] -= get(before.data(), shape.at(i));
        return all;
    }
    size_t element() const { return before.size() / shape.size(); }  // bytes
};

constexpr bool accumulated = true;
constexpr int kIntegerPoison = 0x7f7f7f7f;

class Run {
   public:
    using Body = std::function<void(Run&)>;
    using Given = std::function<std::optional<std::vector<double>>(const Array&)>;

    const Layers& on;
    const cudaStream_t stream;
    const Body body;
    const bool forward_only;
    std::vector<Array> arrays;

    // Inputs, and the first contents of sums, are those given, else random.
    Run(const Layers& on, const Body& body, bool forward_only = false, Given given = nullptr)
        : on(on), stream(device_stream(on)), body(body), forward_only(forward_only), given(std::move(given)) {
        body(*this);
        on.synchronize(stream);
        for (Array& a : arrays) {
            a.after.resize(a.before.size());
            on.download(a.after.data(), a.memory, a.after.size(), stream);
        }
        memory.clear();
    }

    // Null for an empty shape: how a body leaves out what is "or null".
    template <class T> T* in(const std::string& name, Shape shape, const Values& values = normal()) {
        return declare<T>(Array::input, name, shape, values);
    }
    template <class T> T* out(const std::string& name, Shape shape, bool accumulate = false) {
        return declare<T>(accumulate ? Array::sum : Array::output, name, shape, accumulate ? normal(0.1) : nullptr);
    }
    // A call has left an output of this name where something else was.
    void becomes(const std::string& name, const void* slice) {
        auto was = std::find_if(arrays.begin(), arrays.end(), [&](const Array& a) {
            return static_cast<const char*>(a.memory) + a.shape.offset * a.element() == slice && !a.rewritten;
        });
        REQUIRE(was != arrays.end());
        Array a = *was;
        was->rewritten = true;
        a.role = Array::output, a.name = name;
        arrays.push_back(a);
    }
    void* scratch(size_t bytes) {
        void* p = allocate(bytes, "scratch");
        std::vector<unsigned char> poison(bytes, 0xff);
        if (strcmp(on.device, "simt")) on.upload(p, poison.data(), bytes, stream);  // simt itself knows what was never written
        return p;
    }

    const Array* find(const std::string& name) const {
        auto a = std::find_if(arrays.begin(), arrays.end(), [&](const Array& a) { return a.name == name; });
        return a == arrays.end() ? nullptr : &*a;
    }
    const Layers* operator->() const { return &on; }

   private:
    struct Release {
        const Layers* on;
        void operator()(void* p) const { on->release(p); }
    };
    Given given;
    std::vector<std::unique_ptr<void, Release>> memory;

    void* allocate(size_t bytes, const char* name) {
        memory.emplace_back(on.allocate(bytes, name), Release{&on});
        return memory.back().get();
    }
    template <class T> T* declare(Array::Role role, const std::string& name, Shape shape, const Values& values) {
        if (shape.count() == 0) return nullptr;
        REQUIRE(find(name) == nullptr);
        Array a{role, name, shape, std::is_same_v<T, int>, false, nullptr, {}, {}, [](const unsigned char* bytes, int64_t i) {
            return widen(reinterpret_cast<const T*>(bytes)[i]);
        }};
        a.before.assign(shape.size() * sizeof(T), a.integer ? kIntegerPoison & 0xff : 0xff);  // else NaN; between rows it stays
        if (values) {
            std::optional<std::vector<double>> known = given ? given(a) : std::nullopt;
            REQUIRE((!known || int64_t(known->size()) == shape.count()));
            for (int64_t i = 0; i < shape.count(); ++i)
                reinterpret_cast<T*>(a.before.data())[shape.at(i)] = narrow<T>(known ? (*known)[i] : values(stream_of(name), i));
        }
        a.memory = allocate(a.before.size(), name.c_str());
        on.upload(a.memory, a.before.data(), a.before.size(), stream);
        arrays.push_back(a);
        return static_cast<T*>(a.memory) + shape.offset;
    }
};

// ------------------------------------------------------------------------------------------------------------------
// The layers. A tensor X has the gradient d_X: an output where X is an input, an input where X is an output.

struct Case {
    std::string name;
    Run::Body body;
};
std::string title(const char* layer, std::initializer_list<std::pair<const char*, double>> sizes) {
    std::ostringstream text;
    text << layer;
    for (auto& [name, value] : sizes) text << ' ' << name << '=' << value;
    return text.str();
}

Case embedding(int rows, int V, int C) {
    return {title("embedding", {{"rows", rows}, {"V", V}, {"C", C}}), [=](Run& r) {
        const int* tokens = r.in<int>("tokens", rows, integers(0, V));
        const floatX* table = r.in<floatX>("table", {V, C});
        real* out = r.out<real>("out", {rows, C});
        r->embedding_forward(out, tokens, table, rows, C, r.stream);
        if (r.forward_only) return;
        const real* d_out = r.in<real>("d_out", {rows, C});
        real* d_table = r.out<real>("d_table", {V, C}, accumulated);
        r->embedding_backward(d_table, d_out, tokens, r.scratch(r->embedding_scratch(rows)), rows, V, C, r.stream);
    }};
}

Case rmsnorm(int rows, int C, bool with_branch, bool in_place) {
    return {title("rmsnorm", {{"rows", rows}, {"C", C}, {"branch", with_branch}, {"in_place", in_place}}), [=](Run& r) {
        const Shape shape{rows, C};
        real* residual = r.in<real>("residual", shape);
        const floatX* branch = r.in<floatX>("branch", {with_branch * rows, C});
        const real* weight = r.in<real>("weight", C, normal(0.3, 1));
        floatX* out = r.out<floatX>("out", shape);
        real* sum = in_place ? residual : r.out<real>("sum", shape);
        real* rstd = r.out<real>("rstd", rows);
        r->rmsnorm_forward(out, sum, rstd, residual, branch, weight, rows, C, real(1e-5), r.stream);
        if (in_place) r.becomes("sum", residual);
        if (r.forward_only) return;
        const floatX* d_out = r.in<floatX>("d_out", shape);
        real* d_sum = r.in<real>("d_sum", shape);
        floatX* d_branch = r.out<floatX>("d_branch", {with_branch * rows, C});
        real* d_weight = r.out<real>("d_weight", C, accumulated);
        r->rmsnorm_backward(d_sum, d_branch, d_weight, d_out, sum, rstd, weight, r.scratch(r->rmsnorm_scratch(rows, C)), rows, C, r.stream);
        r.becomes("d_residual", d_sum);
    }};
}

Case slice_norm(int rows, int C, int gap, bool in_place) {
    return {title("slice_norm", {{"rows", rows}, {"C", C}, {"gap", gap}, {"in_place", in_place}}), [=](Run& r) {
        const Shape shape{rows, C, C + gap, gap / 2};
        const floatX* in = r.in<floatX>("in", shape);
        const real* weight = r.in<real>("weight", C, normal(0.3, 1));
        floatX* out = r.out<floatX>("out", shape);
        const SliceNorm n{in, C + gap, weight, rows, C, real(1e-5)};
        r->slice_norm_forward(out, C + gap, n, r.stream);
        if (r.forward_only) return;
        floatX* d_out = r.in<floatX>("d_out", shape);
        floatX* d_in = in_place ? d_out : r.out<floatX>("d_in", shape);
        real* d_weight = r.out<real>("d_weight", C, accumulated);
        r->slice_norm_backward(d_in, d_weight, d_out, C + gap, n, r.scratch(r->rmsnorm_scratch(rows, C)), r.stream);
        if (in_place) r.becomes("d_in", d_out);
    }};
}

Case linear(int rows, int I, int O, int gap, bool accumulate, bool add_weight, bool with_d_in = true) {
    return {title("linear", {{"rows", rows}, {"I", I}, {"O", O}, {"gap", gap}, {"accumulate", accumulate}, {"add_weight", add_weight},
                             {"d_in", with_d_in}}), [=](Run& r) {
        const Shape narrow{rows, I, I + gap, gap / 2}, wide{rows, O, O + gap, gap / 2};
        const floatX* in = r.in<floatX>("in", narrow);
        const floatX* weight = r.in<floatX>("weight", {O, I});
        floatX* out = r.out<floatX>("out", wide, accumulate);
        const Linear l{in, I + gap, weight, rows, I, O};
        r->linear_forward(out, O + gap, l, accumulate, r.stream);
        if (r.forward_only) return;
        const floatX* d_out = r.in<floatX>("d_out", wide);
        floatX* d_in = r.out<floatX>("d_in", with_d_in ? narrow : 0, accumulate);
        real* d_weight = r.out<real>("d_weight", {O, I}, add_weight);
        r->linear_backward(d_in, I + gap, d_weight, d_out, O + gap, l, accumulate, add_weight, r.stream);
    }};
}

Case conv(int B, int T, int D, int W, int gap, bool initial, bool final, int start = 0) {
    return {title("conv", {{"B", B}, {"T", T}, {"D", D}, {"W", W}, {"gap", gap}, {"initial", initial}, {"final", final},
                           {"start", start}}), [=](Run& r) {
        const Shape shape{B * T, D, D + gap, start}, state{B * (W - 1), D};
        const floatX* in = r.in<floatX>("in", shape);
        const real* weight = r.in<real>("weight", {D, W}, normal(0.5));
        const real* bias = r.in<real>("bias", D, normal(0.5));
        const real* initial_state = r.in<real>("initial_state", initial ? state : 0);
        floatX* out = r.out<floatX>("out", {B * T, D});
        real* final_state = r.out<real>("final_state", final ? state : 0);
        const Conv c{in, D + gap, weight, bias, initial_state, B, T, D, W};
        r->conv_forward(out, final_state, c, r.stream);
        if (r.forward_only) return;
        const floatX* d_out = r.in<floatX>("d_out", {B * T, D});
        const real* d_final_state = r.in<real>("d_final_state", final ? state : 0);
        floatX* d_in = r.out<floatX>("d_in", shape);
        real* d_weight = r.out<real>("d_weight", {D, W}, accumulated);
        real* d_bias = r.out<real>("d_bias", D, accumulated);
        real* d_initial_state = r.out<real>("d_initial_state", initial ? state : 0);
        r->conv_backward({d_in, d_weight, d_bias, d_initial_state}, d_out, d_final_state, c, r.scratch(r->conv_scratch(B, T, D, W)),
                         r.stream);
    }};
}

// B_t, C_t and z lie where the Model has them: in rows [dt | B | C] of R + 2N, and [x | z] of 2D; with R = 0, [B | C] and [z | x]; with
// slices = false, alone.
Case scan(int B, int T, int D, int N, bool initial, bool final, int R = 0, bool slices = false, double dt_mean = -1) {
    return {title("scan", {{"B", B}, {"T", T}, {"D", D}, {"N", N}, {"initial", initial}, {"final", final}, {"R", R}, {"slices", slices},
                           {"dt", dt_mean}}), [=](Run& r) {
        const int rows = B * T, ld_bc = slices ? R + 2 * N : N, ld_z = slices ? 2 * D : D;
        const Shape shape{rows, D}, b_shape{rows, N, ld_bc, slices ? R : 0}, c_shape{rows, N, ld_bc, slices ? R + N : 0},
            z_shape{rows, D, ld_z, slices && R ? D : 0}, state{B * D, N};
        const floatX* u = r.in<floatX>("u", shape);
        const floatX* dt = r.in<floatX>("dt", shape);
        const floatX* B_t = r.in<floatX>("B_t", b_shape);
        const floatX* C_t = r.in<floatX>("C_t", c_shape);
        const floatX* z = r.in<floatX>("z", z_shape);
        const real* A_log = r.in<real>("A_log", {D, N}, [N, dt_mean](uint64_t stream, int64_t i) {
            // Up to 16, a large dt has slow decays: or else gradients would be too small to be seen in differences.
            return std::log((1 + i % N) / std::clamp(dt_mean, 1.0, 16.0)) + 0.1 * random_normal(seed, stream, i);
        });
        const real* skip = r.in<real>("skip", D, normal(0.2, 1));
        const real* dt_bias = r.in<real>("dt_bias", D, normal(0.5, dt_mean));
        const real* initial_state = r.in<real>("initial_state", initial ? state : 0);
        floatX* out = r.out<floatX>("out", shape);
        real* final_state = r.out<real>("final_state", final ? state : 0);
        real* chunk_states = r.out<real>("chunk_states", {B * scan_chunks(T) * D, N});
        void* scratch = r.scratch(r->scan_scratch(B, T, D, N));
        Scan s{u, dt, B_t, C_t, ld_bc, z, ld_z, A_log, skip, dt_bias, initial_state, B, T, D, N};
        r->scan_forward(out, final_state, chunk_states, s, scratch, r.stream);
        if (r.forward_only) return;
        const floatX* d_out = r.in<floatX>("d_out", shape);
        const real* d_final_state = r.in<real>("d_final_state", final ? state : 0);
        floatX* d_u = r.out<floatX>("d_u", shape);
        floatX* d_dt = r.out<floatX>("d_dt", shape);
        floatX* d_B_t = r.out<floatX>("d_B_t", b_shape);
        floatX* d_C_t = r.out<floatX>("d_C_t", c_shape);
        floatX* d_z = r.out<floatX>("d_z", z_shape);
        real* d_A_log = r.out<real>("d_A_log", {D, N}, accumulated);
        real* d_skip = r.out<real>("d_skip", D, accumulated);
        real* d_dt_bias = r.out<real>("d_dt_bias", D, accumulated);
        real* d_initial_state = r.out<real>("d_initial_state", initial ? state : 0);
        s.initial_state = nullptr;  // chunk_states has it
        r->scan_backward({d_u, d_dt, d_B_t, d_C_t, d_z, d_A_log, d_skip, d_dt_bias, d_initial_state}, d_out, d_final_state, s, chunk_states,
                         scratch, r.stream);
    }};
}

struct Loop {
    int B, T, D, N, tau = 3;
    bool control = true, delay = true, scaling = true, noise = true, initial = true, final = true;
    double alpha = 0.1, kappa = 0.5, eps = 0.1;
};
Case closed_loop(Loop l) {
    return {title("closed_loop", {{"B", l.B}, {"T", l.T}, {"D", l.D}, {"N", l.N}, {"tau", l.tau}, {"control", l.control}, {"delay", l.delay},
                                  {"scaling", l.scaling}, {"noise", l.noise}, {"initial", l.initial}, {"final", l.final}, {"alpha", l.alpha},
                                  {"kappa", l.kappa}, {"eps", l.eps}}), [=](Run& r) {
        const auto& [B, T, D, N, tau, control, delay, scaling, noise, initial, final, alpha, kappa, eps] = l;
        const int states = N + 2 + tau;
        const Shape shape{B * T, D}, row{B * T, N}, all{B * D, states}, of_channel{D, N};
        const Values size = normal(1 / std::sqrt(N));  // larger ones make a loop that rings, and rounding errors grow with it
        ClosedLoop c{.plant = {r.in<floatX>("u", shape), r.in<floatX>("dt", shape), r.in<floatX>("B_t", row, size), r.in<floatX>("C_t", row, size), N,
                               r.in<floatX>("z", shape), D, r.in<real>("A_log", of_channel, [N = N](uint64_t stream, int64_t i) {
                                   return std::log(1 + i % N) + 0.1 * random_normal(seed, stream, i);
                               }), r.in<real>("skip", D, normal(0.2, 0.5)), r.in<real>("dt_bias", D, normal(0.5, -1)),
                               r.in<real>("initial_state", initial ? all : 0, normal(0.2)), B, T, D, N},
                     .gain = r.in<real>("gain", control ? D : 0, normal(0.2)), .delay = r.in<real>("delay", delay ? D : 0, normal(0.1)),
                     .zeta = r.in<real>("zeta", scaling ? of_channel : 0, normal(0.3)),
                     .gamma = r.in<real>("gamma", scaling ? of_channel : 0, normal(0.2, 1.28)),
                     .output_noise = r.in<real>("output_noise", noise ? D : 0, normal(0.1)), .state_noise = real(noise ? 0.05 : 0),
                     .noise_seed = noise ? seed : 0, .alpha = real(alpha), .kappa = real(kappa), .eps = real(eps), .tau = tau};
        floatX* out = r.out<floatX>("out", shape);
        real* final_state = r.out<real>("final_state", final ? all : 0);
        real* chunk_states = r.out<real>("chunk_states", {B * loop_chunks(T) * D, states});
        void* scratch = r.scratch(r->closed_loop_scratch(B, T, D, N, tau));
        r->closed_loop_forward(out, final_state, chunk_states, c, scratch, r.stream);
        if (r.forward_only) return;
        const floatX* d_out = r.in<floatX>("d_out", shape);
        const real* d_final_state = r.in<real>("d_final_state", final ? all : 0);
        const ClosedLoopGradients d{
            .plant = {r.out<floatX>("d_u", shape), r.out<floatX>("d_dt", shape), r.out<floatX>("d_B_t", row), r.out<floatX>("d_C_t", row),
                      r.out<floatX>("d_z", shape), r.out<real>("d_A_log", of_channel, accumulated), r.out<real>("d_skip", D, accumulated),
                      r.out<real>("d_dt_bias", D, accumulated), r.out<real>("d_initial_state", initial ? all : 0)},
            .d_gain = r.out<real>("d_gain", control ? D : 0, accumulated), .d_delay = r.out<real>("d_delay", delay ? D : 0, accumulated),
            .d_zeta = r.out<real>("d_zeta", scaling ? of_channel : 0, accumulated),
            .d_gamma = r.out<real>("d_gamma", scaling ? of_channel : 0, accumulated),
            .d_output_noise = r.out<real>("d_output_noise", noise ? D : 0, accumulated)};
        c.plant.initial_state = nullptr;  // chunk_states has it
        r->closed_loop_backward(d, d_out, d_final_state, c, chunk_states, scratch, r.stream);
    }};
}

// q, k and v lie as the Model has them: in rows [q | k | v] of `gap` more elements; with a past, k and v are a cache with room for more.
struct Heads {
    int B, T, H, G, S, past = 0, gap = 0;
    double size = 1;  // of the queries: large ones make scores that differ much
};
Case attention(Heads x) {
    return {title("attention", {{"B", x.B}, {"T", x.T}, {"H", x.H}, {"G", x.G}, {"S", x.S}, {"past", x.past}, {"gap", x.gap},
                                {"size", x.size}}),
            [=](Run& r) {
        const auto& [B, T, H, G, S, past, gap, size] = x;
        const int ld = (H + 2 * G) * S + gap, room = past ? past + T + 3 : T, ld_kv = past ? 2 * G * S : ld;
        const Shape q_shape{B * T, H * S, ld, 0};
        const auto kv_shape = [&](int at) {
            return past ? Shape{B * room, G * S, ld_kv, at == H ? 0 : G * S} : Shape{B * T, G * S, ld, at * S};
        };
        const floatX* q = r.in<floatX>("q", q_shape, normal(size));
        const floatX* k = r.in<floatX>("k", kv_shape(H));
        const floatX* v = r.in<floatX>("v", kv_shape(H + G));
        floatX* out = r.out<floatX>("out", {B * T, H * S});
        const bool step = past && T == 1;
        real* lse = r.out<real>("lse", {step ? 0 : B * T, H});
        void* scratch = r.scratch(r->attention_scratch(B, T, H, S));
        const Attention a{q, k, v, ld, ld_kv, int64_t(room) * ld_kv, B, T, H, G, S, past};
        r->attention_forward(out, lse, a, scratch, r.stream);
        if (r.forward_only || past) return;
        const floatX* d_out = r.in<floatX>("d_out", {B * T, H * S});
        floatX* d_q = r.out<floatX>("d_q", q_shape);
        floatX* d_k = r.out<floatX>("d_k", kv_shape(H));
        floatX* d_v = r.out<floatX>("d_v", kv_shape(H + G));
        r->attention_backward(d_q, d_k, d_v, d_out, out, lse, a, scratch, r.stream);
    }};
}
Case rotate(int B, int T, int heads, int S, int gap, int position, double base, bool in_place) {
    return {title("rotate", {{"B", B}, {"T", T}, {"heads", heads}, {"S", S}, {"gap", gap}, {"position", position}, {"base", base},
                             {"in_place", in_place}}), [=](Run& r) {
        const Shape shape{B * T, heads * S, heads * S + gap, gap / 2};
        const int ld_out = in_place ? heads * S + gap : heads * S, room = in_place ? T : T + gap;  // as in a cache, for more tokens
        floatX* in = r.in<floatX>("in", shape);
        floatX* out = in_place ? in : r.out<floatX>("out", {B, T * heads * S, room * heads * S, 0});
        r->rotate(out, ld_out, int64_t(room) * ld_out, {in, heads * S + gap, B, T, heads, S, position, base}, false, r.stream);
        if (in_place) r.becomes("out", in);
        if (r.forward_only) return;
        const floatX* d_out = r.in<floatX>("d_out", shape);
        floatX* d_in = r.out<floatX>("d_in", {B * T, heads * S});
        r->rotate(d_in, heads * S, int64_t(T) * heads * S, {d_out, heads * S + gap, B, T, heads, S, position, base}, true, r.stream);
    }};
}

// Router, dispatch, experts, combine. few: the forward pass finds the experts on the device; skew: how much lower each expert's logits are
// than those of the one before it; tied: from which expert on all have the same logit, exactly. expert_choice: the experts choose; K = E.
struct Moe {
    int rows, C, F, E, K, capacity;
    bool swiglu = false, renormalize = false, accumulate = false, add_weight = true, few = false, expert_choice = false;
    double skew = 0, balance_weight = 0.3, z_weight = 0.2;
    int tied = 256;
};
Case moe(Moe m) {
    return {title("moe", {{"rows", m.rows}, {"C", m.C}, {"F", m.F}, {"E", m.E}, {"K", m.K}, {"capacity", m.capacity},
                          {"swiglu", m.swiglu}, {"renormalize", m.renormalize}, {"accumulate", m.accumulate},
                          {"add_weight", m.add_weight}, {"few", m.few}, {"expert_choice", m.expert_choice}, {"skew", m.skew}}),
            [=](Run& r) {
        const auto& [rows, C, F, E, K, capacity, swiglu, renormalize, accumulate, add_weight, few, expert_choice, skew, balance_weight,
                     z_weight, tied] = m;
        const int chosen = expert_choice ? 0 : K;  // by a row
        REQUIRE((!expert_choice || K == E));
        const int slots = int(Dispatch::slots(rows, E, K, capacity)), F_in = swiglu ? 2 * F : F;
        REQUIRE((!few || (capacity == 0 && slots <= kFewSlots)));
        const floatX* x = r.in<floatX>("x", {rows, C}, normal(1, 0.5));
        const real* router = r.in<real>("router", {E, C}, [C = C, skew = skew, tied = tied](uint64_t stream, int64_t i) {
            return i / C >= tied ? 0 : random_normal(seed, stream, i) / std::sqrt(C) - 2 * skew * (i / C) / C;
        });
        const floatX* in_weight = r.in<floatX>("in_weight", {E * F_in, C}, normal(1 / std::sqrt(C)));
        const floatX* out_weight = r.in<floatX>("out_weight", {E * C, F}, normal(1 / std::sqrt(F)));

        const Router routed{x, router, rows, C, E, chosen, renormalize};
        const Routing routing{r.out<real>("probs", {rows, E}), r.out<real>("lse", rows), r.out<int>("experts", {rows, chosen}),
                              r.out<real>("gates", {rows, chosen})};
        const real* gates = expert_choice ? routing.probs : routing.gates;
        void *router_scratch = r.scratch(r->router_scratch(rows, C, E)), *sum_scratch = r.scratch(kSumScratch);
        r->router_forward(routing, routed, router_scratch, r.stream);
        const Dispatch to{r.out<int>("slot", {rows, K}), r.out<int>("choice", slots), r.out<int>("load", E), r.out<int>("offset", E + 1),
                          rows, E, K, capacity};
        if (expert_choice) r->expert_choice_plan(to, routing.probs, r.stream);
        else r->dispatch_plan(to, routing.experts, r.scratch(r->dispatch_scratch(int64_t(rows) * K)), r.stream);
        real* losses = r.out<real>("losses", 2, accumulated);
        r->router_losses(losses, routing.probs, routing.lse, to.load, sum_scratch, rows, E, r.stream);
        std::vector<int> offset(E + 1);
        r->download(offset.data(), to.offset, (E + 1) * sizeof(int), r.stream);
        Experts first{nullptr, in_weight, to, capacity || few ? nullptr : offset.data(), C, F_in}, second = first;
        floatX* dispatched = r.out<floatX>("dispatched", {slots, C});
        r->dispatch_forward(dispatched, x, to, C, r.stream);
        floatX* hidden_in = r.out<floatX>("hidden_in", {slots, F_in});
        first.in = dispatched;
        r->experts_forward(hidden_in, first, r.stream);
        floatX* hidden = r.out<floatX>("hidden", {slots, F});
        if (swiglu) r->swiglu_forward(hidden, hidden_in, slots, F, r.stream);
        else r->relu_forward(hidden, hidden_in, int64_t(slots) * F, r.stream);
        floatX* y = r.out<floatX>("y", {slots, C});
        second.in = hidden, second.weight = out_weight, second.I = F, second.O = C;
        r->experts_forward(y, second, r.stream);
        floatX* out = r.out<floatX>("out", {rows, C}, accumulate);
        r->combine_forward(out, y, gates, to, C, accumulate, r.stream);
        if (r.forward_only) return;

        if (few) first.host_offset = second.host_offset = offset.data();
        const floatX* d_out = r.in<floatX>("d_out", {rows, C});
        r.in<real>("d_losses", 2, constants({balance_weight, z_weight}));
        floatX* d_y = r.out<floatX>("d_y", {slots, C});
        real* d_gates = r.out<real>(expert_choice ? "d_probs" : "d_gates", {rows, K});  // which are one thing where experts choose
        r->combine_backward(d_y, d_gates, d_out, y, gates, to, C, r.stream);
        floatX* d_hidden = r.out<floatX>("d_hidden", {slots, F});
        real* d_out_weight = r.out<real>("d_out_weight", {E * C, F}, add_weight);
        r->experts_backward(d_hidden, d_out_weight, d_y, second, add_weight, r.stream);
        floatX* d_hidden_in = r.out<floatX>("d_hidden_in", {slots, F_in});
        if (swiglu) r->swiglu_backward(d_hidden_in, d_hidden, hidden_in, slots, F, r.stream);
        else r->relu_backward(d_hidden_in, d_hidden, hidden_in, int64_t(slots) * F, r.stream);
        floatX* d_dispatched = r.out<floatX>("d_dispatched", {slots, C});
        real* d_in_weight = r.out<real>("d_in_weight", {E * F_in, C}, add_weight);
        r->experts_backward(d_dispatched, d_in_weight, d_hidden_in, first, add_weight, r.stream);
        floatX* d_x = r.out<floatX>("d_x", {rows, C}, accumulate);
        r->dispatch_backward(d_x, d_dispatched, to, C, accumulate, r.stream);
        real* d_router = r.out<real>("d_router", {E, C}, accumulated);
        r->router_backward(d_x, d_router, d_gates, routing, to.load, routed, real(balance_weight), real(z_weight), router_scratch,
                           r.stream);
    }};
}

Case feed_forward(int rows, int C, int F) {
    return {title("feed-forward", {{"rows", rows}, {"C", C}, {"F", F}}), [=](Run& r) {
        const floatX* x = r.in<floatX>("x", {rows, C});
        const floatX* gate_up_weight = r.in<floatX>("gate_up_weight", {2 * F, C}, normal(1 / std::sqrt(C)));
        const floatX* down_weight = r.in<floatX>("down_weight", {C, F}, normal(1 / std::sqrt(F)));
        floatX* gate_up = r.out<floatX>("gate_up", {rows, 2 * F});
        const Linear up{x, C, gate_up_weight, rows, C, 2 * F};
        r->linear_forward(gate_up, 2 * F, up, false, r.stream);
        floatX* hidden = r.out<floatX>("hidden", {rows, F});
        r->swiglu_forward(hidden, gate_up, rows, F, r.stream);
        floatX* out = r.out<floatX>("out", {rows, C});
        const Linear down{hidden, F, down_weight, rows, F, C};
        r->linear_forward(out, C, down, false, r.stream);
        if (r.forward_only) return;
        const floatX* d_out = r.in<floatX>("d_out", {rows, C});
        floatX* d_hidden = r.out<floatX>("d_hidden", {rows, F});
        real* d_down_weight = r.out<real>("d_down_weight", {C, F}, accumulated);
        r->linear_backward(d_hidden, F, d_down_weight, d_out, C, down, false, accumulated, r.stream);
        floatX* d_gate_up = r.out<floatX>("d_gate_up", {rows, 2 * F});
        r->swiglu_backward(d_gate_up, d_hidden, gate_up, rows, F, r.stream);
        floatX* d_x = r.out<floatX>("d_x", {rows, C});
        real* d_gate_up_weight = r.out<real>("d_gate_up_weight", {2 * F, C});
        r->linear_backward(d_x, C, d_gate_up_weight, d_gate_up, 2 * F, up, false, false, r.stream);
    }};
}

Case relu(int count, bool in_place) {
    return {title("relu", {{"count", count}, {"in_place", in_place}}), [=](Run& r) {
        floatX* in = r.in<floatX>("in", count);
        floatX* out = in_place ? in : r.out<floatX>("out", count);
        r->relu_forward(out, in, count, r.stream);
        if (in_place) r.becomes("out", in);
        if (r.forward_only) return;
        floatX* d_out = r.in<floatX>("d_out", count);
        floatX* d_in = in_place ? d_out : r.out<floatX>("d_in", count);
        r->relu_backward(d_in, d_out, in, count, r.stream);
        if (in_place) r.becomes("d_in", d_out);
    }};
}

Values some_ignored(int V) {
    return [=](uint64_t stream, int64_t i) { return i % 4 == 3 ? -1 : integers(0, V)(stream, i); };
}
// What lies past V must not count, however large it is.
Values padded_logits(int V, int ld, double mean) {
    return [=](uint64_t stream, int64_t i) { return i % ld < V ? normal(3, mean)(stream, i) : 1000; };
}
Values padded_ramp(int V, int ld) {
    return [=](uint64_t, int64_t i) { return i % ld < V ? i % ld : 1000; };
}
Case classifier(int rows, int V, int ld, double d_loss, double mean = 0) {
    return {title("classifier", {{"rows", rows}, {"V", V}, {"ld", ld}, {"d_loss", d_loss}, {"mean", mean}}), [=](Run& r) {
        floatX* logits = r.in<floatX>("logits", {rows, ld}, padded_logits(V, ld, mean));
        const int* targets = r.in<int>("targets", rows, some_ignored(V));
        real* losses = r.out<real>("losses", rows);
        r->classifier(losses, logits, targets, rows, V, ld, real(d_loss), r.stream);
        if (d_loss == 0) return;  // then the logits must still be what they were
        r.in<real>("d_losses", rows, constants({d_loss}));
        r.becomes("d_logits", logits);
    }};
}
Case head(int rows, int C, int V, int ld, double d_loss) {
    return {title("head", {{"rows", rows}, {"C", C}, {"V", V}, {"ld", ld}}), [=](Run& r) {
        const floatX* x = r.in<floatX>("x", {rows, C});
        const floatX* weight = r.in<floatX>("weight", {ld, C});
        const int* targets = r.in<int>("targets", rows, some_ignored(V));
        floatX* logits = r.out<floatX>("logits", {rows, ld});
        const Linear l{x, C, weight, rows, C, ld};
        r->linear_forward(logits, ld, l, false, r.stream);
        real* losses = r.out<real>("losses", rows);
        r->classifier(losses, logits, targets, rows, V, ld, real(d_loss), r.stream);
        r.becomes("d_logits", logits);
        if (r.forward_only) return;
        r.in<real>("d_losses", rows, constants({d_loss}));
        floatX* d_x = r.out<floatX>("d_x", {rows, C});
        real* d_weight = r.out<real>("d_weight", {ld, C}, accumulated);
        r->linear_backward(d_x, C, d_weight, logits, ld, l, false, accumulated, r.stream);
    }};
}

Case softmax(int rows, int V, int ld, double temperature, double mean = 0, bool ramp = false) {
    return {title("softmax", {{"rows", rows}, {"V", V}, {"ld", ld}, {"temperature", temperature}, {"mean", mean}, {"ramp", ramp}}),
            [=](Run& r) {
        const floatX* logits = r.in<floatX>("logits", {rows, ld}, ramp ? padded_ramp(V, ld) : padded_logits(V, ld, mean));
        r->softmax_forward(r.out<real>("probs", {rows, V}), logits, rows, V, ld, real(temperature), r.stream);
    }};
}

Case sums(int count) {
    return {title("sum, sum_of_squares", {{"count", count}}), [=](Run& r) {
        const real* in = r.in<real>("in", count, normal(1, 0.5));
        void* scratch = r.scratch(kSumScratch);
        r->sum(r.out<real>("sum", 1, accumulated), in, scratch, count, r.stream);
        r->sum_of_squares(r.out<real>("sum of squares", 1, accumulated), in, scratch, count, r.stream);
    }};
}

Case adamw(int count, int step, bool with_weight) {
    return {title("adamw", {{"count", count}, {"step", step}, {"weight", with_weight}}), [=](Run& r) {
        real* master = r.in<real>("master", count);
        const double had = step > 1 ? 0.1 : 0;  // the first step finds none, so that v shows 1 - beta2 to all its digits
        real* m = r.in<real>("m", count, normal(had));
        real* v = r.in<real>("v", count, [=](uint64_t stream, int64_t i) { return had * random_uniform(seed, stream, i); });
        const real* grad = r.in<real>("grad", count);
        floatX* weight = r.out<floatX>("weight", with_weight * count);
        const AdamW o{.lr = 0.01, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.1, .grad_clip = NAN};  // which nobody reads
        r->adamw(master, weight, m, v, grad, count, o, real(0.7), step, r.stream);
        r.becomes("new master", master);
        r.becomes("new m", m);
        r.becomes("new v", v);
    }};
}

// Those of the layer in MOEMAMBA_TEST_LAYER, if it is set.
std::vector<Case> selected(std::vector<Case> all) {
    const char* layer = getenv("MOEMAMBA_TEST_LAYER");
    if (layer) std::erase_if(all, [&](const Case& c) { return !c.name.starts_with(layer); });
    return all;
}
// Sizes: one element; no multiple of a vector, warp, block or chunk; several of each.
// Every subset of the loop's terms, and its edges.
std::vector<Case> closed_loops() {
    std::vector<Loop> loops;
    for (int terms = 0; terms < 32; ++terms)
        loops.push_back({.B = 2, .T = 9, .D = 3, .N = 4, .control = bool(terms & 1), .delay = bool(terms & 2), .scaling = bool(terms & 4),
                         .noise = bool(terms & 8), .initial = bool(terms & 1), .final = bool(terms & 2), .alpha = terms & 16 ? 0.1 : 0});
    loops.insert(loops.end(), {{.B = 1, .T = 1, .D = 1, .N = 1, .tau = 1}, {.B = 1, .T = 5, .D = 3, .N = 2, .tau = 8},
                               {.B = 1, .T = 2 * kLoopChunk + 5, .D = 2, .N = 3, .tau = 2},
                               {.B = 2, .T = kLoopChunk, .D = 70, .N = 16, .tau = 8}, {.B = 2, .T = 18, .D = 9, .N = 17, .tau = 20},
                               {.B = 1, .T = 12, .D = 5, .N = 3, .kappa = 0.05},
                               {.B = 1, .T = 12, .D = 3, .N = 3, .eps = 0.02}, {.B = 1, .T = 3, .D = 2, .N = kMaxStates, .tau = kMaxDelay}});
    std::vector<Case> all;
    for (const Loop& loop : loops) all.push_back(closed_loop(loop));
    return all;
}

const std::vector<Case>& cases() {
    constexpr int chunk = kScanChunk, kWidth = 16 / sizeof(floatX);  // the widest load or store
    static const std::vector<Case> all = selected([] {
      std::vector<Case> list = {
        embedding(1, 3, 1), embedding(67, 11, 40), embedding(130, 300, 17), embedding(700, 2, 5), embedding(9, 4, 2056),
        rmsnorm(1, 1, true, false), rmsnorm(5, 40, true, false), rmsnorm(67, 33, false, false), rmsnorm(9, 1032, true, true),
        slice_norm(1, 3, 0, false), slice_norm(37, 5, 8, true), slice_norm(70, 40, 3, false), slice_norm(5, 256, 32, true),
        linear(1, 1, 1, 0, false, true), linear(5, 7, 9, 0, true, false), linear(37, 24, 40, 6, false, false),
        linear(64, 33, 17, 3, true, true), linear(3, 20, 24, 4, false, true), linear(11, 9, 16, 2, false, false, false),
        conv(1, 1, 1, 4, 0, false, false), conv(3, 1, 21, 4, 21, true, true), conv(2, 2, 40, 4, 40, true, true),
        conv(1, 67, 24, 4, 3, false, true), conv(2, 133, 21, 2, 0, true, false), conv(3, 70, 128, 4, 128, false, false),
        conv(1, 9, 16, 4, 16, false, false, 1),
        conv(1, 12, 16, 8, 0, true, true), conv(2, 9, 16, 1, 0, false, false),
        scan(1, 1, 1, 1, false, false), scan(3, 1, 21, 16, true, true, 3, true), scan(1, 67, 24, 16, false, false),
        scan(2, 3 * chunk + 5, 21, 5, true, true, 3, true), scan(1, chunk, 128, 16, true, false),
        scan(3, chunk + 1, 40, 24, false, true, 1, true),
        scan(1, 2 * chunk, 136, 16, false, false, 8, true), scan(1, chunk + 6, 5, kMaxStates, true, true),
        scan(2, 1, 9, 50, true, true), scan(2, 3 * chunk + 3, 6, 50, true, true, 2, true),  // on simt: four segments
        scan(2, 41, 16, 16, false, true, 0, false, 16),
        scan(2, 7, 5 * kWidth / 2, 16, true, true, 0, true),  // rows of z allow the widest loads, those of u do not
        scan(4, 3 * chunk + 5, 3, 16, true, true), scan(9, 2 * chunk + 3, 20, 4, true, true),  // on simt: two segments of two chunks; one of three
        attention({1, 1, 1, 1, 8}), attention({2, 61, 4, 4, 16}), attention({2, 37, 6, 2, 24, 0, 8}), attention({1, 130, 2, 1, 64}),
        attention({1, 67, 3, 3, 72, 0, 0, 4}), attention({1, 35, 4, 1, 128}), attention({1, 40, 1, 1, 256}),
        attention({1, 9, 2, 1, 136}), attention({3, 2, 4, 4, 40, 5}),
        attention({2, 70, 2, 1, 32, 33}), attention({2, 1, 6, 2, 24, 36}), attention({1, 1, 7, 7, 8, 300}),
        attention({1, 1, 2, 1, 256, 700, 0, 3}),
        attention({5, 1, 4, 1, 136, 7}),
        rotate(1, 1, 1, 2, 0, 0, 10000, false), rotate(2, 37, 3, 24, 5, 11, 10000, true),
        rotate(2, 5, 5, 128, 0, kDouble ? 1000 : 1000000, 1e6, false),
        rotate(2, 9, 5, 8, 8, 0, 0, false),
        moe({.rows = 1, .C = 3, .F = 5, .E = 1, .K = 1, .capacity = 0}),
        moe({.rows = 37, .C = 24, .F = 40, .E = 4, .K = 1, .capacity = 9, .skew = 0.5}),
        moe({.rows = 37, .C = 17, .F = 9, .E = 5, .K = 2, .capacity = 0, .swiglu = true, .renormalize = true, .accumulate = true}),
        moe({.rows = 29, .C = 16, .F = 24, .E = 4, .K = 2, .capacity = 6, .swiglu = true, .accumulate = true, .add_weight = false,
             .skew = 1}),
        moe({.rows = 5, .C = 8, .F = 12, .E = 13, .K = 1, .capacity = 1, .add_weight = false}),
        moe({.rows = 6, .C = 8, .F = 4, .E = 40, .K = 3, .capacity = 0, .renormalize = true, .add_weight = false}),  // experts without rows
        moe({.rows = 11, .C = 40, .F = 8, .E = 4, .K = 4, .capacity = 0, .swiglu = true, .renormalize = true}),
        moe({.rows = 300, .C = 8, .F = 8, .E = 8, .K = 2, .capacity = 70, .skew = 0.2}),
        // Few rows, as in decoding: of the router, of the experts.
        moe({.rows = 1, .C = 40, .F = 24, .E = 5, .K = 2, .capacity = 0, .swiglu = true, .few = true}),
        moe({.rows = 2, .C = 33, .F = 9, .E = 42, .K = 1, .capacity = 0, .add_weight = false, .few = true}),
        moe({.rows = 8, .C = 136, .F = 5, .E = 9, .K = 3, .capacity = 0, .renormalize = true, .accumulate = true, .few = true}),
        moe({.rows = 9, .C = 24, .F = 5 * kWidth / 2, .E = 4, .K = 4, .capacity = 0, .swiglu = true, .few = true}),
        moe({.rows = kFewSlots, .C = 8, .F = 4, .E = 3, .K = 1, .capacity = 0, .few = true}),
        moe({.rows = 37, .C = 24, .F = 16, .E = 5, .K = 5, .capacity = 9, .swiglu = true, .accumulate = true, .expert_choice = true}),
        moe({.rows = 1, .C = 8, .F = 4, .E = 3, .K = 3, .capacity = 1, .add_weight = false, .expert_choice = true}),
        moe({.rows = 12, .C = 8, .F = 8, .E = 2, .K = 2, .capacity = 12, .expert_choice = true, .skew = 4}),  // everybody takes all
        feed_forward(1, 1, 1), feed_forward(37, 24, 21), feed_forward(16, 8, 64), feed_forward(5, 8, 5 * kWidth / 2),
        relu(1, false), relu(1003, true), relu(4096, false),
        classifier(1, 1, 1, 1), classifier(37, 37, 40, 0.25), classifier(5, 37, 40, 0), classifier(9, 1500, 1504, 0.1),
        classifier(2, 4500, 4504, 0.1), classifier(3, 37, 40, 0.5, -100),
        classifier(5, 37, 37, 0.25), classifier(9, 1501, 1501, 0.1), classifier(4, 35, 38, 0.5),  // rows that no whole vectors fill
        head(21, 24, 13, 16, 0.5),
        softmax(1, 5, 8, 1), softmax(3, 37, 40, 0.7), softmax(2, 1500, 1504, 1.3), softmax(2, 37, 40, 1, -100),
        softmax(3, 37, 37, 0.7), softmax(2, 1501, 1501, 1.3), softmax(3, 35, 38, 1),
        softmax(1, 5, 8, 0.01, 0, true),  // near-zero temperature: what is not divided by it is far from the maximum
        sums(1), sums(1000), sums(70001),
        adamw(1, 1, true), adamw(500, 1, true), adamw(1003, 3, true), adamw(4096, 100, false),
    };
      for (const Case& c : closed_loops()) list.push_back(c);
      return list;
    }());
    if (all.empty()) fail("MOEMAMBA_TEST_LAYER=%s: no case has a name that begins so", getenv("MOEMAMBA_TEST_LAYER"));
    return all;
}
// Not for finite differences: ties, where a choice jumps; gradients that are nearly zero; and what is too much for them: several tiles of
// the counting sort, and whatever else it takes many rows to reach. The CPU's threads are woken only for so much work.
const std::vector<Case>& long_cases() {
    static const std::vector<Case> all = [] {
        std::vector<Case> list = {moe({.rows = 37, .C = 9, .F = 4, .E = 70, .K = 5, .capacity = 0, .tied = 3}),
                                  // Of equal probabilities the first rows are taken: of an only expert, all are 1; more rows than a block.
                                  moe({.rows = 700, .C = 8, .F = 4, .E = 1, .K = 1, .capacity = 300, .expert_choice = true}),
                                  moe({.rows = 600, .C = 8, .F = 4, .E = 3, .K = 3, .capacity = 280, .expert_choice = true, .skew = 9}),
                                  moe({.rows = 9000, .C = 2, .F = 2, .E = 3, .K = 1, .capacity = 2900}), embedding(8200, 300, 2),
                                  // One expert has it all.
                                  moe({.rows = 21, .C = 40, .F = 16, .E = 6, .K = 1, .capacity = 0, .few = true, .skew = 20}),
                                  moe({.rows = 70, .C = 40, .F = 16, .E = 6, .K = 1, .capacity = 0, .add_weight = false, .skew = 20}),
                                  moe({.rows = 21, .C = 40, .F = 16, .E = 6, .K = 1, .capacity = 4, .add_weight = false, .skew = 20}),
                                  scan(2, 9, 16, 16, false, true, 0, false, 300),  // states that vanish
                                  rmsnorm(520, 40, true, false), linear(6, 200, 90, 0, true, false), linear(6, 200, 90, 0, false, true),
                                  classifier(20, 1500, 1504, 0.1), feed_forward(200, 16, 96), relu(20000, false), adamw(20000, 3, true)};
#ifdef USE_CUDA  // as many sequences as it takes to leave a GPU's multiprocessors few segments each, or one
        list.insert(list.end(), {scan(100, 4 * kScanChunk + 5, 24, 16, true, true), scan(300, 2 * kScanChunk + 5, 24, 16, true, true),
                                 rmsnorm(5000, 40, true, false), conv(64, 1024, 512, 4, 512, true, true)});
#endif
        return selected(list);
    }();
    return all;
}

// ------------------------------------------------------------------------------------------------------------------
// What every layer must do

// Inputs are as they were; outputs are written everywhere, and nowhere else.
void check_memory(const Run& r) {
    for (const Array& a : r.arrays) {
        if (a.rewritten) continue;
        INFO(r.on.device << ": " << a.name);
        std::vector<unsigned char> others = a.after;
        if (a.role != Array::input) {
            const size_t element = a.element();
            bool written = true;
            for (int64_t i = 0; i < a.shape.count(); ++i) {
                const int64_t at = a.shape.at(i);
                written &= a.integer ? a.get(a.after.data(), at) != kIntegerPoison : std::isfinite(a.get(a.after.data(), at));
                memcpy(&others[at * element], &a.before[at * element], element);
            }
            CHECK(written);
        }
        CHECK((others == a.before));
    }
}

// The same from inputs that each differ in their last place: what that moves, no implementation can be expected to have much closer.
Run rounded_anew(const Run& r) {
    return Run(r.on, r.body, r.forward_only, [&](const Array& a) {
        const Array& was = *r.find(a.name);
        std::vector<double> values = was.values(was.before);
        const double unit = was.element() == 2 ? 0x1p-8 : was.element() == 4 ? 0x1p-23 : 0x1p-52;
        for (size_t i = 0; i < values.size() && !a.integer; ++i)
            values[i] *= random_uniform(seed, stream_of(a.name + " anew"), i) < 0.5 ? 1 - unit : 1 + unit;
        return values;
    });
}
bool same_choices(const Run& a, const Run& b) {
    for (size_t i = 0; i < a.arrays.size(); ++i)
        if (a.arrays[i].integer && a.arrays[i].after != b.arrays[i].after) return false;
    return true;
}
void check_close(const Run& got, const Run& want) {
    REQUIRE(got.arrays.size() == want.arrays.size());
    std::optional<Run> anew;  // asked for seldom
    for (size_t i = 0; i < got.arrays.size(); ++i) {
        const Array &a = got.arrays[i], &b = want.arrays[i];
        if (a.role == Array::input || a.rewritten) continue;
        INFO(got.on.device << " against " << want.on.device << ": " << a.name);
        // `result`: of a sum, what was added too: it may be small beside what was there. Subtracting costs digits: those of the sum.
        const auto check = [&](std::vector<double> (*values)(const Array&), double close) {
            const double apart = distance(values(a), values(b));
            if (apart > close && !a.integer) {
                if (!anew) anew.emplace(rounded_anew(want));
                if (same_choices(*anew, want)) close = std::max(close, 8 * distance(values(anew->arrays[i]), values(b)));
            }
            CHECK(apart <= close);
        };
        check([](const Array& a) { return a.values(a.after); }, a.integer ? 0 : kClose);
        if (const double gained = norm(b.result()); a.role == Array::sum && gained > 0)
            check([](const Array& a) { return a.result(); }, kClose * std::max(1.0, norm(b.values(b.after)) / gained));
    }
}

void check_same_bits(const Run& got, const Run& want) {
    for (size_t i = 0; i < got.arrays.size(); ++i) {
        INFO(got.on.device << ": " << got.arrays[i].name);
        CHECK((got.arrays[i].after == want.arrays[i].after));
    }
}

void check_gpu(const Case& c) {
    INFO("MOEMAMBA_TEST_SEED=" << seed);
    const Run want(plain::layers, c.body), got(gpu::layers, c.body);
    check_memory(want);
    check_memory(got);
    check_close(got, want);
    for (int schedule = 1; schedule < kSchedules; ++schedule) {
        const Schedule set(schedule);
        INFO("schedule " << schedule);
        check_same_bits(Run(gpu::layers, c.body), got);
    }
}
TEST_CASE("a layer gives the same on the GPU as in plain loops, and the same bits in every schedule", "[layers][gpu]") {
    if (!gpu_is_here()) return;
    for (const auto& list : {cases(), long_cases()})
        for (const Case& c : list) DYNAMIC_SECTION(c.name) { check_gpu(c); }
}

#ifndef USE_CUDA
struct ManyMultiprocessors {
    const simt::Options before = simt::options;
    ManyMultiprocessors() { simt::options.multiprocessors = 64; }
    ~ManyMultiprocessors() { simt::options = before; }
};
TEST_CASE("what is cut by the GPU's multiprocessors gives the same on one that has many", "[layers][gpu]") {
    const int chunk = kScanChunk;
    auto scratch = [&] { return gpu::layers.scan_scratch(2, 5 * chunk + 3, 40, 50); };
    const size_t with_few = scratch();
    const ManyMultiprocessors many;
    CHECK(scratch() > with_few);  // of segments, which it has now
    for (const Case& c : selected({scan(1, 5 * chunk + 3, 40, 50, true, true), scan(1, 4 * chunk + 1, 24, 33, false, true, 3, true),
                                   scan(2, 3 * chunk, 40, 17, true, false), scan(2, 5 * chunk + 3, 40, 16, true, true),
                                   conv(2, 133, 40, 4, 40, true, true), rmsnorm(700, 40, true, false), sums(70001)}))
        DYNAMIC_SECTION(c.name) { check_gpu(c); }
}
#endif

struct Threads {
    const int before = omp_get_max_threads();
    explicit Threads(int threads) { omp_set_num_threads(threads); }
    ~Threads() { omp_set_num_threads(before); }
};
#if defined(__SSE2__) || defined(__aarch64__)
TEST_CASE("each of the CPU's threads takes a number below 1e-38 for 0", "[layers][cpu]") {
    device_stream(cpu::layers);
    int denormals = 0;
    const Threads set(3);
#pragma omp parallel reduction(+ : denormals)
    {
        volatile float small = 1e-30f;
        denormals += small * 1e-10f != 0;
    }
    CHECK(denormals == 0);
}
#endif
TEST_CASE("a layer gives the same on the CPU as in plain loops, and with two threads always the same bits", "[layers][cpu]") {
    const std::vector<Case> five_segments = selected({scan(1, 5 * kScanChunk + 3, 3, 16, true, true)});  // for five threads
    for (const auto& list : {cases(), long_cases(), five_segments})
        for (const Case& c : list) DYNAMIC_SECTION(c.name) {
            INFO("MOEMAMBA_TEST_SEED=" << seed);
            const Run want(plain::layers, c.body);
            check_memory(want);
            std::optional<Run> two;
            for (const int threads : {1, 2, 2, 5}) {
                const Threads set(threads);
                INFO(threads << " threads");
                Run got(cpu::layers, c.body);
                check_memory(got);
                check_close(got, want);
                if (threads != 2) continue;
                if (two) check_same_bits(got, *two);
                else two.emplace(std::move(got));
            }
        }
}

// ------------------------------------------------------------------------------------------------------------------
// Sizes of zero, and scratch

// A pointer to memory of whatever type is asked for, each time to some more. It is an input: it must stay as it is.
struct Anything {
    Run& r;
    template <class T> operator T*() const {
        using Element = std::conditional_t<std::is_void_v<T>, real, std::remove_const_t<T>>;
        return r.in<Element>("argument " + std::to_string(r.arrays.size()), 64, std::is_same_v<Element, int> ? constants({1}) : normal());
    }
};
// A call of every function, in the order of the table, with B * T = 0 rows.
std::vector<Case> empty_calls(int B, int T, int capacity) {
    REQUIRE(B * T == 0);
    std::vector<Case> all;
    auto add = [&](const char* name, auto call) {
        all.push_back({title(name, {{"B", B}, {"T", T}, {"capacity", capacity}}), [=](Run& r) { call(r.on, Anything{r}, r.stream); }});
    };
    using A = const Anything&;
    using S = cudaStream_t;
    const int C = 4, E = 2, K = 1;
    static const int host_offset[E + 1] = {};
    auto dispatch = [=](A a) { return Dispatch{a, a, a, a, 0, E, K, capacity}; };
    auto experts = [=](A a, const int* offset) { return Experts{a, a, dispatch(a), offset, C, C}; };
    auto routing = [](A a) { return Routing{a, a, a, a}; };
    auto scan = [=](A a) { return Scan{a, a, a, a, 4, a, 4, a, a, a, a, B, T, 3, 4}; };
    add("zero", [](const Layers& l, A a, S s) { l.zero(a, 0, s); });
    add("upload", [](const Layers& l, A a, S s) { l.upload(a, host_offset, 0, s); });
    add("upload_later", [](const Layers& l, A a, S s) { l.upload_later(a, host_offset, 0, s); });
    add("download", [](const Layers& l, A a, S s) { int to = 0; l.download(&to, a, 0, s); });
    add("copy", [](const Layers& l, A a, S s) { l.copy(a, a, 0, s); });
    for (const bool accumulate : {false, true}) {
        add("linear_forward", [=](const Layers& l, A a, S s) { l.linear_forward(a, C, {a, C, a, 0, C, C}, accumulate, s); });
        add("linear_backward", [=](const Layers& l, A a, S s) {
            l.linear_backward(a, C, a, a, C, {a, C, a, 0, C, C}, accumulate, accumulate, s);
        });
    }
    add("swiglu_forward", [](const Layers& l, A a, S s) { l.swiglu_forward(a, a, 0, C, s); });
    add("swiglu_backward", [](const Layers& l, A a, S s) { l.swiglu_backward(a, a, a, 0, C, s); });
    add("relu_forward", [](const Layers& l, A a, S s) { l.relu_forward(a, a, 0, s); });
    add("relu_backward", [](const Layers& l, A a, S s) { l.relu_backward(a, a, a, 0, s); });
    add("rmsnorm_forward", [](const Layers& l, A a, S s) { l.rmsnorm_forward(a, a, a, a, a, a, 0, C, 1, s); });
    add("rmsnorm_backward", [](const Layers& l, A a, S s) { l.rmsnorm_backward(a, a, a, a, a, a, a, a, 0, C, s); });
    add("slice_norm_forward", [](const Layers& l, A a, S s) { l.slice_norm_forward(a, C, {a, C, a, 0, C, 1}, s); });
    add("slice_norm_backward", [](const Layers& l, A a, S s) { l.slice_norm_backward(a, a, a, C, {a, C, a, 0, C, 1}, a, s); });
    add("embedding_forward", [](const Layers& l, A a, S s) { l.embedding_forward(a, a, a, 0, C, s); });
    add("embedding_backward", [](const Layers& l, A a, S s) { l.embedding_backward(a, a, a, a, 0, 5, C, s); });
    add("conv_forward", [=](const Layers& l, A a, S s) { l.conv_forward(a, a, {a, 3, a, a, a, B, T, 3, 4}, s); });
    add("conv_backward", [=](const Layers& l, A a, S s) {
        l.conv_backward({a, a, a, a}, a, a, {a, 3, a, a, a, B, T, 3, 4}, a, s);
    });
    add("scan_forward", [=](const Layers& l, A a, S s) { l.scan_forward(a, a, a, scan(a), a, s); });
    add("scan_backward", [=](const Layers& l, A a, S s) {
        l.scan_backward({a, a, a, a, a, a, a, a, a}, a, a, scan(a), a, a, s);
    });
    const auto loop = [=](A a) { return ClosedLoop{scan(a), a, a, a, a, a, 1, 1, 1, 1, 1, 2}; };
    add("closed_loop_forward", [=](const Layers& l, A a, S s) { l.closed_loop_forward(a, a, a, loop(a), a, s); });
    add("closed_loop_backward", [=](const Layers& l, A a, S s) {
        l.closed_loop_backward({{a, a, a, a, a, a, a, a, a}, a, a, a, a, a}, a, a, loop(a), a, a, s);
    });
    add("rotate", [=](const Layers& l, A a, S s) { l.rotate(a, 8, 8, {a, 8, B, T, 1, 8, 0, 100}, false, s); });
    auto attention = [=](A a) { return Attention{a, a, a, 8, 8, 8, B, T, 1, 1, 8, 0}; };
    add("attention_forward", [=](const Layers& l, A a, S s) { l.attention_forward(a, a, attention(a), a, s); });
    add("attention_backward", [=](const Layers& l, A a, S s) { l.attention_backward(a, a, a, a, a, a, attention(a), a, s); });
    add("router_forward", [=](const Layers& l, A a, S s) { l.router_forward(routing(a), {a, a, 0, C, E, K, true}, a, s); });
    add("router_losses", [](const Layers& l, A a, S s) { l.router_losses(a, a, a, a, a, 0, E, s); });
    add("router_backward", [=](const Layers& l, A a, S s) {
        l.router_backward(a, a, a, routing(a), a, {a, a, 0, C, E, K, true}, 1, 1, a, s);
    });
    add("expert_choice_plan", [=](const Layers& l, A a, S s) { l.expert_choice_plan(dispatch(a), a, s); });
    add("dispatch_forward", [=](const Layers& l, A a, S s) { l.dispatch_forward(a, a, dispatch(a), C, s); });
    add("combine_backward", [=](const Layers& l, A a, S s) { l.combine_backward(a, a, a, a, a, dispatch(a), C, s); });
    for (const bool accumulate : {false, true}) {
        add("dispatch_backward", [=](const Layers& l, A a, S s) { l.dispatch_backward(a, a, dispatch(a), C, accumulate, s); });
        add("combine_forward", [=](const Layers& l, A a, S s) { l.combine_forward(a, a, a, dispatch(a), C, accumulate, s); });
        add("experts_forward", [=](const Layers& l, A a, S s) { l.experts_forward(a, experts(a, accumulate ? host_offset : nullptr), s); });
        add("experts_backward", [=](const Layers& l, A a, S s) { l.experts_backward(a, a, a, experts(a, host_offset), accumulate, s); });
    }
    for (const real d_loss : {0, 1})
        add("classifier", [=](const Layers& l, A a, S s) { l.classifier(a, a, a, 0, 5, 8, d_loss, s); });
    add("softmax_forward", [](const Layers& l, A a, S s) { l.softmax_forward(a, a, 0, 5, 8, 1, s); });
    add("sum", [](const Layers& l, A a, S s) { l.sum(a, a, a, 0, s); });
    add("sum_of_squares", [](const Layers& l, A a, S s) { l.sum_of_squares(a, a, a, 0, s); });
    add("adamw", [](const Layers& l, A a, S s) { l.adamw(a, a, a, a, a, 0, {}, 1, 1, s); });
    return all;
}
TEST_CASE("of nothing, nothing is made", "[layers][gpu]") {
    for (const Layers* on : devices())
        for (const int capacity : {0, 2}) {
            for (const auto& [B, T] : {std::pair(0, 3), {3, 0}, {0, 0}})
                for (const Case& c : empty_calls(B, T, capacity)) {
                    INFO(c.name);
                    check_memory(Run(*on, c.body));
                }
            // But of no rows there is a plan: every slot is empty.
            const int E = 3;
            const Run plan(*on, [&](Run& r) {
                const Anything a{r};
                const Dispatch to{a, r.out<int>("choice", E * capacity), r.out<int>("load", E), r.out<int>("offset", E + 1), 0, E, 1,
                                  capacity};
                r->dispatch_plan(to, a, r.scratch(r->dispatch_scratch(0)), r.stream);
            });
            check_memory(plan);
            auto values = [&](const char* name) { return plan.find(name)->values(plan.find(name)->after); };
            INFO(on->device << ", capacity " << capacity);
            const double c = capacity;
            CHECK(values("load") == std::vector<double>{0, 0, 0});
            CHECK(values("offset") == std::vector<double>{0, c, 2 * c, 3 * c});
            if (capacity) CHECK(values("choice") == std::vector<double>(E * capacity, -1));
        }
}

TEST_CASE("scratch for some sizes is enough for smaller ones", "[layers]") {
    auto check = [](const Layers& l) {
        auto grows = [&](const std::string& name, auto&& scratch) {
            INFO(l.device << ": " << name);
            size_t most = 0;
            for (int n = 1; n < 20 * kScanChunk; n += 37) {
                const size_t bytes = scratch(n);
                CHECK(bytes >= most);
                most = bytes;
            }
        };
        grows("rmsnorm", [&](int rows) { return l.rmsnorm_scratch(rows, 40); });
        grows("embedding", [&](int rows) { return l.embedding_scratch(rows); });
        grows("router", [&](int rows) { return l.router_scratch(rows, 40, 6); });
        grows("dispatch", [&](int choices) { return l.dispatch_scratch(choices); });
        for (const int D : {3, 40, 300})
            for (int n = 1; n < 9; ++n) {
                const std::string sizes = " D=" + std::to_string(D) + " and " + std::to_string(n);
                grows("conv, longer," + sizes, [&](int T) { return l.conv_scratch(n, T, D, 4); });
                grows("scan, longer," + sizes, [&](int T) { return l.scan_scratch(n, T, D, 16); });
                grows("conv, wider," + sizes, [&](int B) { return l.conv_scratch(B / 37 + 1, n * 90, D, 4); });
                grows("closed loop, longer," + sizes, [&](int T) { return l.closed_loop_scratch(n, T, D, 16, 8); });
                grows("closed loop, wider," + sizes, [&](int B) { return l.closed_loop_scratch(B / 37 + 1, n * 90, D, 16, 8); });
                grows("scan, wider," + sizes, [&](int B) { return l.scan_scratch(B / 37 + 1, n * 90, D, 16); });
            }
    };
    for (const Layers* on : devices()) check(*on);
    for (const int threads : {1, 2, 5}) {
        const Threads set(threads);
        check(cpu::layers);
    }
#ifndef USE_CUDA
    const ManyMultiprocessors many;
    check(gpu::layers);
#endif
}

// ------------------------------------------------------------------------------------------------------------------
// Finite differences

// The slope of f at 0: central differences, extrapolated from two step sizes. Where these disagree there is a kink (ReLU) or a jump
// (another expert) within reach, or strong curvature: then closer.
double slope(const std::function<double(double)>& f) {
    double best = NAN, least = INFINITY;
    for (double h : {1e-4, 1e-5, 1e-6}) {
        const double near = (f(h) - f(-h)) / (2 * h), far = (f(2 * h) - f(-2 * h)) / (4 * h), apart = std::fabs(near - far);
        if (apart < least) least = apart, best = (4 * near - far) / 3;
        if (apart <= 1e-7 * std::fabs(near)) break;
    }
    return best;
}

// f is the objective at a displacement of the tensor: of a small one each element in turn, else all of them, with random signs.
void check_gradient(const std::string& name, const std::vector<double>& gradient, int directions,
                    const std::function<double(const std::vector<double>& displacement)>& f) {
    const size_t n = gradient.size();
    const bool each = n <= 12 && directions > 1;
    std::vector<double> got, want;
    for (size_t i = 0; i < (each ? n : directions); ++i) {
        std::vector<double> direction(n), displacement(n);
        for (size_t j = 0; j < n; ++j) direction[j] = each ? i == j : random_bits(seed + i, stream_of(name), j) & 1 ? 1 : -1;
        got.push_back(std::inner_product(gradient.begin(), gradient.end(), direction.begin(), 0.0));
        want.push_back(slope([&](double step) {
            for (size_t j = 0; j < n; ++j) displacement[j] = step * direction[j];
            return f(displacement);
        }));
    }
    INFO(name);
    CHECK(distance(got, want) <= 1e-6);
}

TEST_CASE("a layer's gradients are those of its forward function", kDouble ? "[layers][fd]" : "[.double]") {
    for (const Case& c : cases()) DYNAMIC_SECTION(c.name) {
        INFO("MOEMAMBA_TEST_SEED=" << seed);
        const Run base(plain::layers, c.body);
        std::vector<const Array*> upstream;
        for (const Array& a : base.arrays) {
            if (!a.name.starts_with("d_")) continue;
            INFO(a.name << " belongs to a tensor");
            REQUIRE(base.find(a.name.substr(2)));
            if (a.role != Array::input) continue;
            REQUIRE(base.find(a.name.substr(2))->role != Array::input);
            upstream.push_back(&a);
        }
        for (const Array& gradient : base.arrays) {
            if (gradient.role == Array::input || !gradient.name.starts_with("d_")) continue;
            const Array& of = *base.find(gradient.name.substr(2));
            if (of.role != Array::input) continue;  // of something in between
            check_gradient(gradient.name, gradient.result(), 4, [&](const std::vector<double>& displacement) {
                const Run moved(plain::layers, c.body, true, [&](const Array& a) -> std::optional<std::vector<double>> {
                    const Array& same = *base.find(a.name);
                    std::vector<double> values = same.values(same.before);
                    for (size_t i = 0; &same == &of && i < values.size(); ++i) values[i] += displacement[i];
                    return values;
                });
                double objective = 0;  // its change: the difference of elements, not of sums, keeps the digits
                for (const Array* up : upstream) {
                    const Array *out = moved.find(up->name.substr(2)), *still = base.find(out->name);
                    const std::vector<double> weight = up->values(up->before);
                    const std::vector<double> a = out->values(out->after), b = still->values(still->after);
                    for (size_t i = 0; i < a.size(); ++i) objective += weight[i] * (a[i] - b[i]);
                }
                return objective;
            });
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------
// References: layers held against files that PyTorch and transformers wrote

const std::string oracle = getenv("MOEMAMBA_ORACLE") ? getenv("MOEMAMBA_ORACLE") : "oracle";
constexpr double kOracleClose = by_precision(1e-10, 1e-5, 3e-2);  // bf16: the inputs themselves are rounded

std::vector<std::string> split(const std::string& names) {
    std::vector<std::string> all;
    std::istringstream text(names);
    for (std::string name; std::getline(text, name, '+');) all.push_back(name);
    return all;
}
// A tensor of the file. "a+b": both, one after the other; for each expert, if they have three dimensions.
std::vector<double> read(const Safetensors& file, const std::string& names) {
    std::vector<std::vector<double>> parts;
    size_t blocks = 1;
    for (const std::string& name : split(names)) {
        const Safetensors::Entry& entry = file.find(name);
        if (entry.shape.size() == 3) blocks = entry.shape[0];
        file.read(name, parts.emplace_back(entry.count).data());
    }
    std::vector<double> all;
    for (size_t b = 0; b < blocks; ++b)
        for (const auto& part : parts) all.insert(all.end(), &part[part.size() / blocks * b], &part[0] + part.size() / blocks * (b + 1));
    return all;
}

using Names = std::map<std::string, std::string>;
struct Reference {
    std::string file, prefix;
    Case layer;
    Names names;                   // of our tensors, where the file has others; "": it has none
    std::set<std::string> unused;  // what only the file has

    // There X.grad is the gradient of X, and dX an upstream one.
    std::string find(const std::string& ours, bool input) const {
        auto known = names.find(ours);
        std::string found = known == names.end() ? ours : known->second, all;
        const bool derived = known == names.end() && ours.starts_with("d_");
        if (derived) {
            known = names.find(ours.substr(2));
            found = known == names.end() ? ours.substr(2) : known->second;
        }
        for (const std::string& name : split(found))
            all += (all.empty() ? "" : "+") + prefix + (derived && input ? "d" : "") + name + (derived && !input ? ".grad" : "");
        return all;
    }
};
Names operator+(Names a, const Names& b) {
    for (const auto& [key, value] : b) a[key] = value;
    return a;
}

const std::vector<Reference>& references() {
    const std::string layers = "layers.safetensors";
    const Names conv_names = {{"in", "x"}, {"initial_state", "state"}, {"final_state", "state_out"}},
        conv_final = conv_names + Names{{"d_in", "x.grad_with_state"}, {"d_initial_state", "state.grad_with_state"}},
        switch_names = {{"router", "router.weight"}, {"in_weight", "wi"}, {"out_weight", "wo"}, {"probs", "router_probs"},
            {"experts", "expert_index"}, {"gates", ""}, {"losses", "aux_loss+z_loss"}, {"d_losses", ""}},
        swiglu_names = switch_names + Names{{"in_weight", "gate+up"}, {"out_weight", "down"}, {"gates", "expert_weight"}},
        choice_names = {{"experts", ""}, {"gates", ""}};
    const std::set<std::string> conv_unused = {"state_out", "dstate_out", "x.grad_with_state", "state.grad_with_state"},
        final_unused = {"x.grad", "state.grad"}, moe_unused = {"router_logits", "router_logits.grad", "kept", "loss"},
        switch_unused = {"router_logits", "router_logits.grad", "kept", "loss", "expert_weight"};  // theirs is 0 for a dropped token
    const Moe switch_moe{.rows = 24, .C = 12, .F = 20, .E = 4, .K = 1, .capacity = 6, .balance_weight = 0.01, .z_weight = 0.001};
    Moe mixtral = switch_moe, jamba;
    mixtral.rows = 17, mixtral.K = 2, mixtral.capacity = 0, mixtral.swiglu = mixtral.few = true;
    jamba = mixtral;
    mixtral.renormalize = true;
    Moe choice = switch_moe;  // of experts
    choice.rows = 23, choice.K = choice.E, choice.capacity = 5, choice.swiglu = choice.expert_choice = true, choice.balance_weight = 0;
    static std::vector<Reference> all = {
        {layers, "rms_norm.", rmsnorm(10, 24, true, false), {{"branch", "x"}}, {}},
        {layers, "conv1d.", conv(2, 9, 20, 4, 0, true, false), conv_names, conv_unused},
        {layers, "conv1d.", conv(2, 9, 20, 4, 0, true, true), conv_final, final_unused},
        {layers, "conv1d_short.", conv(2, 2, 20, 4, 0, true, false), conv_names, conv_unused},
        {layers, "conv1d_short.", conv(2, 2, 20, 4, 0, true, true), conv_final, final_unused},
        {layers, "scan.", scan(2, 37, 20, 16, true, true), {{"dt", "dt_raw"}, {"B_t", "B"}, {"C_t", "C"}, {"skip", "D"},
            {"initial_state", "h0"}, {"final_state", "h_last"}}, {"y", "A", "A.grad"}},
        {layers, "swiglu.", feed_forward(10, 12, 20), {{"gate_up_weight", "gate+up"}, {"down_weight", "down"}}, {}},
        {layers, "embedding.", embedding(18, 11, 8), {{"table", "weight"}}, {}},
        {layers, "linear.", linear(10, 12, 20, 0, false, true), {{"in", "x"}, {"out", ""}, {"d_out", "dout"}},
            {"out", "bias", "bias.grad"}},
        {layers, "classifier.", head(14, 12, 13, 16, 1 / 14.0), {{"d_losses", ""}}, {"logits", "loss"}},
        {layers, "attention.", attention({1, 21, 6, 2, 24}), {}, {}},
        {layers, "rotate.", rotate(1, 21, 6, 24, 0, 0, 10000, false), {}, {}},
        {"closed_loop.safetensors", "", closed_loop({.B = 2, .T = 23, .D = 6, .N = 5, .noise = false, .kappa = 0.2}), {}, {"A"}},
    };
    if (!kMixedPrecision && all.size() == 13)  // a router that sees rounded inputs may choose another expert
        all.insert(all.end(), {{"switch.safetensors", "", moe(switch_moe), switch_names, switch_unused},
                               {"mixtral.safetensors", "", moe(mixtral), swiglu_names, moe_unused},
                               {"jamba_moe.safetensors", "", moe(jamba), swiglu_names, moe_unused},
                               {"expert_choice.safetensors", "", moe(choice), swiglu_names + choice_names, {}}});
    return all;
}

TEST_CASE("layers agree with PyTorch and transformers", "[layers][oracle]") {
    for (const Layers* on : devices())
        for (const Reference& ref : references()) DYNAMIC_SECTION(on->device << ": " << ref.file << ' ' << ref.layer.name) {
            const Safetensors file(oracle + "/" + ref.file);
            std::set<std::string> used;
            auto use = [&](const std::string& names) {
                for (const std::string& name : split(names)) used.insert(name);
                return read(file, names);
            };
            const Run run(*on, ref.layer.body, false, [&](const Array& a) -> std::optional<std::vector<double>> {
                if (a.role == Array::sum) return std::vector<double>(a.shape.count());
                const std::string name = ref.find(a.name, true);
                if (name.empty()) return std::nullopt;
                return use(name);
            });
            for (const Array& a : run.arrays) {
                const std::string name = ref.find(a.name, false);
                if (a.role == Array::input || a.rewritten || name.empty() || !file.has(split(name)[0])) continue;
                INFO(a.name << " against " << name);
                CHECK(distance(a.result(), use(name)) <= kOracleClose);
            }
            for (const auto& [name, entry] : file.entries) {
                if (!name.starts_with(ref.prefix)) continue;
                INFO(name << " has been compared");
                CHECK(used.count(name) + ref.unused.count(name.substr(ref.prefix.size())) == 1);
            }
        }
}

// h_t = h_{t-1} / 2 + g v_t, y = h, is to follow two sines; half-way g changes its sign. Without control the loop is open, v = u.
TEST_CASE("the gain adapts to a plant whose input gain changes its sign", "[layers]") {
    const int T = 4000;
    const auto errors = [&](const Layers& on, double alpha) {  // root mean squares of y_{t-1} - u_t in both halves
        const Loop loop{.B = 1, .T = T, .D = 1, .N = 1, .tau = 1, .delay = false, .scaling = false, .noise = false, .initial = false,
                        .final = false, .alpha = alpha, .kappa = 1, .eps = 0.1};
        const std::map<std::string, std::function<double(int)>> inputs = {
            {"u", [](int t) { return std::sin(0.05 * t) + 0.5 * std::sin(0.13 * t); }}, {"dt", [](int) { return 0; }},
            {"B_t", [&](int t) { return t < T / 2 ? 0.6 : -0.6; }}, {"C_t", [](int) { return 1; }}, {"z", [](int) { return 1.2784645; }},
            {"A_log", [](int) { return std::log(std::log(2.0)); }}, {"skip", [](int) { return 0; }},
            {"dt_bias", [](int) { return std::log(std::exp(1.0) - 1); }}, {"gain", [](int) { return 0; }}};
        const Run run(on, closed_loop(loop).body, true, [&](const Array& a) -> std::optional<std::vector<double>> {
            if (a.role != Array::input || !inputs.count(a.name)) return std::nullopt;
            std::vector<double> values(a.shape.count());
            for (size_t i = 0; i < values.size(); ++i) values[i] = inputs.at(a.name)(int(i));
            return values;
        });
        const std::vector<double> y = run.find("out")->result();
        std::array<double, 2> sums{};
        for (int t = 1; t < T; ++t) sums[t >= T / 2] += std::pow(y[t - 1] - inputs.at("u")(t), 2);
        return std::array{std::sqrt(sums[0] / (T / 2)), std::sqrt(sums[1] / (T / 2))};
    };
    for (const Layers* on : devices()) DYNAMIC_SECTION(on->device) {
        const auto open = errors(*on, 0), adapted = errors(*on, 0.01);
        INFO(open[0] << ' ' << open[1] << " with a gain of 0, " << adapted[0] << ' ' << adapted[1] << " with one that adapts");
        CHECK(adapted[0] < 0.8 * open[0]);
        CHECK(adapted[1] < 0.7 * open[1]);
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Traffic: device memory is what bounds the scan on a GPU

#ifndef USE_CUDA
TEST_CASE("the scan moves at most 1.3 times the bytes that it must, as its table says", kDouble ? "[.not double]" : "[traffic]") {
    if (!simt::watched) {
        printf("skipped: memory traffic, which only builds with -fsanitize=thread count\n");
        return;
    }
    const int B = 3, T = 512, D = 256, N = 16;  // enough blocks for one segment; long enough for what is per sequence to vanish
    simt::traffic_reset();
    const Run run(gpu::layers, scan(B, T, D, N, false, false).body);
    auto bytes = [&](const std::string& prefix) {  // per token and channel
        double all = 0;
        for (const auto& [kernel, t] : simt::traffics)
            if (kernel.starts_with(prefix)) {
                all += double(t.read + t.written) / (B * T * D);
                printf("%-36s %6.2f bytes read, %6.2f written per token and channel (%s)\n", kernel.c_str(), double(t.read) / (B * T * D),
                       double(t.written) / (B * T * D), kPrecision);
            }
        return all;
    };
    const double forward = bytes("scan_forward"), backward = bytes("scan_backward");
    CHECK(forward <= 1.3 * 4 * sizeof(floatX));   // u, dt, z; out
    CHECK(backward <= 1.3 * 7 * sizeof(floatX));  // u, dt, z, d_out; d_u, d_dt, d_z
    CHECK(distance({forward, backward}, {by_precision(NAN, 19, 9.5), by_precision(NAN, 35, 17.5)}) <= 0.04);
}
#endif

// ------------------------------------------------------------------------------------------------------------------
// Models

struct Family {
    const char* name;
    Config config;
};
const std::vector<Family>& families() {
    static const std::vector<Family> all = [] {
        std::vector<Family> f = {{"Mamba", {.layers = "MM"}}, {"Mamba-MLP", {.layers = "MF"}}, {"MoE-Mamba", {.layers = "ME*2"}},
                                 {"parallel MoE-Mamba", {.layers = "(ME)*2"}},
                                 {"Mixtral's experts", {.layers = "ME", .top_k = 2, .capacity = 0, .swiglu_experts = 1, .renormalize = 1}},
                                 {"Jamba's experts", {.layers = "(MF)E", .top_k = 2, .capacity = 1.25, .swiglu_experts = 1, .z_loss = 0.02,
                                                      .tied = 1}},
                                 {"Transformer", {.layers = "AF*2", .heads = 2, .swiglu_ff = 0}},
                                 {"Mixtral", {.layers = "AE", .heads = 4, .kv_heads = 2, .head_dim = 8, .rope_base = 100, .top_k = 2,
                                              .capacity = 0, .swiglu_experts = 1, .renormalize = 1}},
                                 {"Jamba", {.layers = "MFAEME", .mamba_norms = 1, .heads = 2, .kv_heads = 1, .rope_base = 0, .top_k = 2,
                                            .capacity = 0, .swiglu_experts = 1, .norm_eps = 1e-6}},
                                 {"MixCon", {.layers = "CFAECE", .conba = "selection,control,delay,scaling,noise,adaptation", .conba_tau = 3,
                                             .conba_alpha = 0.1, .conba_kappa = 0.3, .conba_sigma = 0.1, .heads = 2, .kv_heads = 1,
                                             .rope_base = 0, .top_k = 2, .capacity = 0, .swiglu_experts = 1}},
                                 {"Expert Choice", {.layers = "AE", .heads = 2, .routing = "expert-choice", .capacity = 1.5, .z_loss = 0.02}}};
        for (auto& [name, c] : f) {
            c.vocab = 37, c.d_model = 16, c.d_inner = 24, c.d_state = 5, c.dt_rank = 3, c.d_ff = c.d_expert = 20, c.experts = 4;
            c.balance_loss = 0.05;
        }
        return f;
    }();
    return all;
}

template <class T> std::vector<double> get(const Model& model, const T* from, int64_t count) {
    std::vector<T> all(count);
    model.layers.download(all.data(), from, count * sizeof(T), model.stream);
    std::vector<double> wide(count);
    for (int64_t i = 0; i < count; ++i) wide[i] = widen(all[i]);
    return wide;
}
template <class T> void put(const Model& model, T* to, const std::vector<double>& values) {
    std::vector<T> all(values.size());
    for (size_t i = 0; i < values.size(); ++i) all[i] = narrow<T>(values[i]);
    model.layers.upload(to, all.data(), all.size() * sizeof(T), model.stream);
}
std::vector<double> weights_of(const Model& model, const Tensor& t) { return get(model, t.master, t.count); }
std::vector<double> gradient_of(const Model& model, const Tensor& t) { return get(model, t.grad, t.count); }
void set_weights(const Model& model, const Tensor& t, const std::vector<double>& values, int64_t offset = 0) {
    put(model, t.master + offset, values);
    if (kMixedPrecision) put(model, t.weight + offset, values);
}
const Tensor& tensor(const Model& model, const std::string& name) {
    auto found = std::find_if(model.tensors.begin(), model.tensors.end(), [&](const Tensor* t) { return t->name == name; });
    INFO(name);
    REQUIRE(found != model.tensors.end());
    return **found;
}

struct Batch {
    int B, T;
    std::vector<int> tokens, targets;
    Batch(int V, int B, int T) : B(B), T(T), tokens(B * T), targets(B * T) {
        for (int i = 0; i < B * T; ++i) tokens[i] = int(random_bits(seed, 100, i) % V), targets[i] = int(random_bits(seed, 101, i) % V);
    }
    std::vector<int> columns(int first, int count) const {  // tokens (B, count)
        std::vector<int> all;
        for (int b = 0; b < B; ++b) all.insert(all.end(), &tokens[b * T + first], &tokens[b * T + first] + count);
        return all;
    }
};

struct TemporaryFile {
    static inline int count = 0;
    const std::string path = std::filesystem::temp_directory_path() /
                             ("moemamba-test-" + std::to_string(getpid()) + "-" + std::to_string(count++) + ".safetensors");
    ~TemporaryFile() { std::filesystem::remove(path); }
};

// Initialised, then moved: at initialisation many numbers are round, and some gradients nearly zero.
void initialize_off_centre(Model& model) {
    model.initialize(seed);
    for (const Tensor* t : model.tensors) {
        std::vector<double> values = weights_of(model, *t);
        for (size_t i = 0; i < values.size(); ++i) values[i] += 0.2 * random_normal(seed, stream_of(t->name), i);
        set_weights(model, *t, values);
    }
}
Losses run_step(Model& model, const Batch& batch) {
    model.zero_gradients();
    model.noise_seed = seed;
    model.forward_backward(batch.tokens.data(), batch.targets.data(), 1);
    return model.read_losses();
}
using Loads = std::vector<std::vector<int>>;  // of each step: the tokens that chose each expert of each layer
std::vector<double> train(Model& model, const std::vector<Batch>& batches, int steps, const AdamW& optimizer, Loads* loads = nullptr) {
    std::vector<double> losses;
    for (int step = 1; step <= steps; ++step) {
        const Losses l = run_step(model, batches[(step - 1) % batches.size()]);
        losses.push_back(l.cross_entropy);
        if (loads) {
            std::vector<int>& counts = loads->emplace_back(model.counters);
            model.layers.download(counts.data(), model.buffers.counters, counts.size() * sizeof(int), model.stream);
        }
        model.update(optimizer, l, step);
    }
    return losses;
}

void check_model_gradients(Model& model, const Batch& batch, int directions) {
    run_step(model, batch);
    std::vector<std::vector<double>> gradients;
    for (const Tensor* t : model.tensors) gradients.push_back(gradient_of(model, *t));
    for (size_t i = 0; i < gradients.size(); ++i) {
        const Tensor& t = *model.tensors[i];
        const std::vector<double> values = weights_of(model, t);
        check_gradient(t.name, gradients[i], directions, [&](std::vector<double> moved) {
            for (size_t j = 0; j < moved.size(); ++j) moved[j] += values[j];
            set_weights(model, t, moved);
            const Losses l = run_step(model, batch);
            return l.cross_entropy + model.config.balance_loss * l.balance + model.config.z_loss * l.z;
        });
        set_weights(model, t, values);
    }
}
TEST_CASE("a model's gradients are those of its loss", kDouble ? "[model][fd]" : "[.double]") {
    for (const Layers* on : {&cpu::layers, &plain::layers})
        for (const Family& f : families()) {
            // What it is that the Model connects, one family shows: 20 steps of the others are compared with plain's to 1e-12 below.
            if (on != &cpu::layers && std::string(f.name) != "MoE-Mamba") continue;
            DYNAMIC_SECTION(on->device << ": " << f.name) {
                INFO("MOEMAMBA_TEST_SEED=" << seed);
                Model model(f.config, *on);
                const Batch batch(f.config.vocab, 2, 7);
                initialize_off_centre(model);
                model.allocate_training(batch.B, batch.T);
                check_model_gradients(model, batch, on == &cpu::layers ? 3 : 1);
            }
        }
}

TEST_CASE("Conba's gradients are those of its loss, with every subset of its terms", kDouble ? "[model][fd]" : "[.double]") {
    for (int subset = 0; subset < 64; ++subset) {
        Config config{.layers = "C", .vocab = 5, .d_model = 3, .d_inner = 5, .d_state = 2, .d_conv = 2, .dt_rank = 2, .conba = "none",
                      .conba_tau = 2, .conba_alpha = 0.3, .conba_kappa = 0.25, .conba_eps = 0.1};
        for (int term = 0; term < 6; ++term)
            if (subset >> term & 1) config.conba = (config.conba == "none" ? "" : config.conba + ",") + kConbaTerms[term];
        if (config.conba_has("noise")) config.conba_sigma = 0.1;
        INFO(config.conba);
        Model model(config, plain::layers);
        const Batch batch(config.vocab, 1, 6);
        initialize_off_centre(model);
        model.allocate_training(batch.B, batch.T);
        check_model_gradients(model, batch, 1);
    }
}

TEST_CASE("Conba without its terms is a Mamba mixer with norms; at first its terms change nothing, but for the gain that adapts", "[model]") {
    const Config mamba{.layers = "MM", .vocab = 37, .d_model = 16, .d_inner = 24, .d_state = 5, .mamba_norms = 1};
    for (const Layers* on : devices())
        for (const char* terms : {"none", "selection,control,delay,scaling,noise", "adaptation", "control,adaptation"})
            for (const bool off_centre : {false, true}) DYNAMIC_SECTION(on->device << ": " << terms << (off_centre ? ", trained" : "")) {
                if (off_centre && std::string(terms) != "none") continue;
                Config conba = mamba;
                conba.layers = "CC", conba.conba = terms;
                Model with(conba, *on), without(mamba, *on);
                if (off_centre) initialize_off_centre(without);
                else without.initialize(seed);
                with.initialize(seed);
                Config none = conba;  // the other tensors are drawn alike, whatever the terms
                none.conba = "none";
                Model bare(none, *on);
                bare.initialize(seed);
                for (const Tensor* t : bare.tensors) CHECK(weights_of(with, tensor(with, t->name)) == weights_of(bare, *t));
                const auto twin = [&](const Tensor& t) -> const Tensor& {  // of a tensor of `without`, in `with`
                    const size_t at = t.name.find("mixer");
                    return tensor(with, at == std::string::npos ? t.name : std::string(t.name).replace(at, 5, "conba"));
                };
                for (const Tensor* t : without.tensors) set_weights(with, twin(*t), weights_of(without, *t));
                const Batch batch(37, 2, 40);
                for (Model* model : {&with, &without}) model->allocate_training(batch.B, batch.T), run_step(*model, batch);
                const std::vector<real> got = with.logits(batch.tokens.data(), 2, 40), want = without.logits(batch.tokens.data(), 2, 40);
                const double apart = distance({got.begin(), got.end()}, {want.begin(), want.end()});
                if (std::string(terms) == "control,adaptation") {
                    CHECK((apart > 0 && apart < 0.1));
                    continue;
                }
                CHECK(apart <= kClose);
                for (const Tensor* t : without.tensors) {
                    INFO(t->name);
                    CHECK(distance(gradient_of(with, twin(*t)), gradient_of(without, *t)) <= by_precision(1e-11, 1e-4, 5e-2));
                }
            }
}

TEST_CASE("noise is drawn in training alone, and anew in each layer, part and step", "[model]") {
    const int V = 37, B = 2, T = 9;
    const Config config{.layers = "(CC)", .vocab = V, .d_model = 16, .d_state = 5, .conba = "noise", .conba_sigma = 0.1};
    const std::string one = "backbone.layers.0.conba.", other = "backbone.layers.0.conba_1.";
    for (const Layers* on : devices()) DYNAMIC_SECTION(on->device) {
        Model model(config, *on);
        initialize_off_centre(model);
        for (const Tensor* t : model.tensors)  // so that the two layers differ in nothing but their noise
            if (t->name.starts_with(one)) set_weights(model, tensor(model, other + t->name.substr(one.size())), weights_of(model, *t));
        const Batch batch(V, B, T);
        model.allocate_training(B, T, 2);
        const auto loss = [&](uint64_t noise_seed, int parts) {
            model.zero_gradients();
            model.noise_seed = noise_seed;
            for (int part = 0; part < parts; ++part) model.forward_backward(batch.tokens.data(), batch.targets.data(), parts);
            return model.read_losses().cross_entropy;
        };
        const auto alike = [&] {
            return gradient_of(model, tensor(model, one + "A_log")) == gradient_of(model, tensor(model, other + "A_log"));
        };
        const double quiet = loss(0, 1);
        CHECK(alike());
        CHECK(distance({model.evaluate(batch.tokens.data(), batch.targets.data(), B, T)}, {quiet}) <= kClose);
        const double first = loss(5, 1);
        CHECK(!alike());
        CHECK(first == loss(5, 1));
        CHECK(std::set<double>{quiet, first, loss(6, 1), loss(5, 2)}.size() == 4);
        CHECK(distance({model.evaluate(batch.tokens.data(), batch.targets.data(), B, T)}, {quiet}) <= kClose);
    }
}

TEST_CASE("the gains that are reported are those that sequences end with", "[model]") {
    for (const Layers* on : devices()) DYNAMIC_SECTION(on->device) {
        const int B = 2, T = 19, D = 24, N = 5, tau = 3;
        Model model({.layers = "CMC", .vocab = 37, .d_model = 16, .d_inner = D, .d_state = N, .conba_tau = tau, .conba_alpha = 0.3}, *on);
        initialize_off_centre(model);
        const Batch batch(37, B, T);
        model.allocate_training(B, T);
        CHECK(model.read_losses().gains.empty());
        const Losses losses = run_step(model, batch);
        REQUIRE(losses.gains.size() == 2);
        DecodeState state;
        model.start(state, B, T);
        model.decode(state, batch.tokens.data(), T, 0);
        for (int i = 0; i < 2; ++i) {
            const std::string layer = losses.gains[i].layer;
            CHECK(layer == "backbone.layers." + std::to_string(2 * i) + ".conba.");
            const std::vector<double> first = weights_of(model, tensor(model, layer + "gain"));
            double sum = 0, largest = 0;
            for (const Arena::Entry& entry : state.arena.entries) {
                if (entry.name != layer + "scan state " + std::to_string(state.current)) continue;
                const int states = N + 2 + tau;
                const std::vector<double> all = get(model, static_cast<const real*>(entry.memory), B * D * states);
                for (int b = 0; b < B * D; ++b) {
                    const double k = std::fabs(first[b % D] + all[b * states + N]);
                    sum += k, largest = std::max(largest, k);
                }
            }
            CHECK(distance({losses.gains[i].mean, losses.gains[i].largest}, {sum / (B * D), largest}) <= by_precision(1e-12, 1e-5, 3e-2));
            CHECK(largest > losses.gains[i].mean);
        }
    }
}

TEST_CASE("a prompt at once, in parts, or token by token: the same probabilities", "[model]") {
    for (const Layers* on : devices())
        for (const Family& f : families()) DYNAMIC_SECTION(on->device << ": " << f.name) {
            if (!f.config.causal()) continue;
            INFO("MOEMAMBA_TEST_SEED=" << seed);
            const int T = kScanChunk + 7, V = f.config.vocab, B = 2;
            Model model(f.config, *on);
            initialize_off_centre(model);
            const Batch batch(V, B, T);
            // Probabilities after T - 2 tokens, after T - 1 and after T, of each sequence, when they came in these parts.
            auto decode = [&](const std::vector<int>& parts) {
                DecodeState state;
                model.start(state, B, T);
                std::vector<double> all;
                int done = 0;
                for (int part : parts) {
                    const real* probs = model.decode(state, batch.columns(done, part).data(), part, 0);
                    if ((done += part) >= T - 2) all.insert(all.end(), probs, probs + B * V);
                }
                REQUIRE(done == T);
                return all;
            };
            const std::vector<double> at_once = decode({T - 2, 1, 1});
            const double tolerance = by_precision(1e-11, 1e-5, 5e-2);
            CHECK(distance(decode({1, 5, 2, T - 10, 1, 1}), at_once) <= tolerance);
            // Under simt.h, which is slow, one family shows it, with every kind of state.
            if (on != &gpu::layers || std::string(f.name) == "Jamba")
                CHECK(distance(decode(std::vector<int>(T, 1)), at_once) <= tolerance);

            const std::vector<real> logits = model.logits(batch.tokens.data(), B, T);
            std::vector<double> probs;
            for (int t = T - 3; t < T; ++t)
                for (int b = 0; b < B; ++b) {
                    const real* row = &logits[(b * T + t) * V];
                    const double sum = std::accumulate(row, row + V, 0.0, [](double s, real x) { return s + std::exp(double(x)); });
                    for (int v = 0; v < V; ++v) probs.push_back(std::exp(double(row[v])) / sum);
                }
            CHECK(distance(probs, at_once) <= tolerance);
        }
}

TEST_CASE("texts drawn side by side are those drawn one at a time", "[model][gpu]") {
    for (const Layers* on : devices())
        for (const Family& f : families()) DYNAMIC_SECTION(on->device << ": " << f.name) {
            if (!f.config.causal() || (on == &gpu::layers && std::string(f.name) != "Jamba")) continue;  // as above
            INFO("MOEMAMBA_TEST_SEED=" << seed);
            Model model(f.config, *on);
            initialize_off_centre(model);
            const int V = f.config.vocab, texts = 3, T = 12, first = 5;  // tokens; of them in the prompt
            const Batch batch(V, texts, T);
            DecodeState alone, together;
            model.start(together, texts, T);
            model.start(alone, 1, first);
            model.decode(alone, batch.tokens.data(), first, 0);
            model.copy_state(together, alone);
            std::vector<std::vector<double>> got(texts), want(texts);
            for (int t = first; t < T; ++t) {
                const real* probs = model.decode(together, batch.columns(t, 1).data(), 1, 0);
                for (int i = 0; i < texts; ++i) got[i].insert(got[i].end(), probs + i * V, probs + (i + 1) * V);
            }
            for (int i = 0; i < texts; ++i) {
                model.start(alone, 1, T);
                model.decode(alone, batch.tokens.data(), first, 0);
                for (int t = first; t < T; ++t) {
                    const real* probs = model.decode(alone, &batch.tokens[i * T + t], 1, 0);
                    want[i].insert(want[i].end(), probs, probs + V);
                }
                CHECK(distance(got[i], want[i]) <= by_precision(1e-11, 1e-5, 5e-2));
            }
            if (kMixedPrecision) continue;  // there, rounding decides what is drawn
            Tokenizer tokenizer;
            tokenizer.vocab = V;
            tokenizer.end_of_text = 3;  // soon drawn
            std::vector<std::vector<int>> drawn(texts), drawn_alone(texts);
            generate(model, together, tokenizer, {7, 8, 9}, 20, {.seed = seed}, 4, texts, [&](int text, int token) {
                drawn[text].push_back(token);
                return true;
            });
            for (int i = 0; i < texts; ++i)
                generate(model, alone, tokenizer, {7, 8, 9}, 20, {.seed = seed}, 4 + i, 1, [&](int text, int token) {
                    CHECK(text == 0);
                    drawn_alone[i].push_back(token);
                    return true;
                });
            CHECK(drawn == drawn_alone);
            CHECK(drawn[0] != drawn[1]);
        }
}

TEST_CASE("accumulated parts of a batch give the gradients of the whole", "[model]") {
    for (Family f : families()) DYNAMIC_SECTION(f.name) {
        if (f.config.expert_choice()) continue;
        f.config.capacity = f.config.balance_loss = f.config.z_loss = 0;  // these depend on the batch as a whole
        f.config.conba = Config().conba, f.config.conba_sigma = 0;        // and noise on the place in it
        const int parts = 4, T = 9;
        const Batch batch(f.config.vocab, parts, T);
        Model whole(f.config, cpu::layers), in_parts(f.config, cpu::layers);
        initialize_off_centre(whole);
        initialize_off_centre(in_parts);
        whole.allocate_training(parts, T);
        in_parts.allocate_training(1, T, parts);
        const Losses want = run_step(whole, batch);
        in_parts.zero_gradients();
        for (int i = 0; i < parts; ++i) in_parts.forward_backward(&batch.tokens[i * T], &batch.targets[i * T], parts);
        const Losses got = in_parts.read_losses();
        const double tolerance = by_precision(1e-12, 1e-5, 3e-2);
        CHECK(distance({got.cross_entropy, got.grad_norm}, {want.cross_entropy, want.grad_norm}) <= tolerance);
        for (size_t i = 0; i < whole.tensors.size(); ++i) {
            INFO(whole.tensors[i]->name);
            CHECK(distance(gradient_of(in_parts, *in_parts.tensors[i]), gradient_of(whole, *whole.tensors[i])) <= tolerance);
        }
    }
}

TEST_CASE("a saved model, loaded, gives the same logits", "[model]") {
    for (const Layers* on : devices())
        for (const Family& f : families()) DYNAMIC_SECTION(on->device << ": " << f.name) {
            const TemporaryFile temporary;
            const std::string& path = temporary.path;
            Model saved(f.config, *on);
            initialize_off_centre(saved);
            saved.save(path, {{"note", "of a test"}});
            const Safetensors file(path);
            CHECK(file.meta("note") == "of a test");
            const ModelFiles files(path);
            const Batch batch(f.config.vocab, 2, 5);
            size_t bytes[2];
            for (const bool trains : {false, true}) {
                Model loaded(files.config, *on);
                loaded.trains = trains;
                loaded.load(files);
                CHECK((loaded.logits(batch.tokens.data(), 2, 5) == saved.logits(batch.tokens.data(), 2, 5)));
                bytes[trains] = loaded.masters.bytes + loaded.weights.bytes;
            }
            // What is only sampled from has each weight once.
            size_t once = 0;
            for (const Tensor* t : saved.tensors)
                once += size_t(t->count + 128) * (t->update == Tensor::matrix ? sizeof(floatX) : sizeof(real));
            CHECK(bytes[false] <= once);
            CHECK((bytes[true] > bytes[false]) == kMixedPrecision);
        }
}

TEST_CASE("an initialised model knows nothing: its loss is ln V", "[model]") {
    for (Family f : families()) DYNAMIC_SECTION(f.name) {
        f.config.vocab = 257, f.config.d_model = 64, f.config.d_inner = f.config.d_expert = f.config.d_ff = 0;
        Model model(f.config, cpu::layers);
        model.initialize(seed);
        const Batch batch(f.config.vocab, 4, 64);
        CHECK(distance({model.evaluate(batch.tokens.data(), batch.targets.data(), batch.B, batch.T)}, {std::log(257)}) <= 0.02);
    }
}

TEST_CASE("a tiny model learns one batch by heart", "[model]") {
    for (const Family& f : families()) DYNAMIC_SECTION(f.name) {
        Model model(f.config, cpu::layers);
        const Batch batch(f.config.vocab, 2, 16);
        model.initialize(seed);
        model.allocate_training(batch.B, batch.T);
        train(model, {batch}, 300, {.lr = 0.01, .weight_decay = 0, .grad_clip = 1});
        CHECK(run_step(model, batch).cross_entropy < 0.05);
    }
}

TEST_CASE("20 training steps: the same losses and the same text on every device", "[model][gpu]") {
    for (const Family& f : families()) DYNAMIC_SECTION(f.name) {
        INFO("MOEMAMBA_TEST_SEED=" << seed);
        const int B = 2, T = 11, V = f.config.vocab, steps = kMixedPrecision ? 5 : 20;  // bf16's blocks are the widest: slow on simt
        std::vector<Batch> batches(4, Batch(V, B, T));
        for (int i = 0; i < 4; ++i)  // something to learn: each sequence counts by threes, from a start of its own
            for (int r = 0; r < B * T; ++r) {
                batches[i].tokens[r] = (7 * i + 5 * (r / T) + 3 * (r % T)) % V;
                batches[i].targets[r] = (batches[i].tokens[r] + 3) % V;
            }
        std::vector<std::vector<double>> losses;
        std::vector<Loads> loads;
        std::vector<std::vector<int>> texts;
        for (const Layers* on : devices()) {
            Model model(f.config, *on);
            model.initialize(seed);
            model.allocate_training(B, T);
            losses.push_back(train(model, batches, steps, {.lr = 0.01}, &loads.emplace_back()));
            if (!f.config.causal()) continue;
            DecodeState state;
            model.start(state, 1, 14);
            std::vector<int>& text = texts.emplace_back(1, 4);
            while (text.size() < 15) text.push_back(sample_token(model.decode(state, &text.back(), 1, 0), V, true, 0, 1, 0));
        }
        for (size_t d = 1; d < losses.size(); ++d) {
            for (size_t of = 0; of < d; ++of) {
                INFO(devices()[d]->device << " against " << devices()[of]->device);
                double limit = by_precision(1e-12, 1e-5, 1e-2);
                if (!kMixedPrecision) CHECK(loads[d][0] == loads[of][0]);
                for (int i = 0; i < steps; ++i) {
                    INFO("step " << i + 1 << ": " << losses[d][i] << ", " << losses[of][i]);
                    if (loads[d][i] != loads[of][i]) limit = 0.1;  // from here on: rounding has chosen another expert for a token
                    CHECK(std::fabs(losses[d][i] - losses[of][i]) <= limit);
                }
            }
            if (loads[d] == loads[0] && !kMixedPrecision && f.config.causal()) CHECK(texts[d] == texts[0]);
        }
        if (!kMixedPrecision) CHECK(losses[0].back() < losses[0].front() - 0.3);  // or else they agree on nothing much
    }
}

TEST_CASE("training is repeatable to the bit, in every schedule", "[model]") {
    for (const Layers* on : devices())
        for (const Family& f : families()) DYNAMIC_SECTION(on->device << ": " << f.name) {
            std::vector<std::vector<double>> weights(3);
            for (int i = 0; i < 3; ++i) {
                const Schedule set(i);
                Model model(f.config, *on);
                model.initialize(seed);
                model.allocate_training(2, 11);
                train(model, {Batch(f.config.vocab, 2, 11)}, 2, {});
                for (const Tensor* t : model.tensors)
                    for (double w : weights_of(model, *t)) weights[i].push_back(w);
            }
            CHECK((weights[1] == weights[0]));
            CHECK((weights[2] == weights[0]));
        }
}

TEST_CASE("training may drop tokens; evaluation and decoding never do", "[model]") {
    const int V = 37, B = 2, T = 12;
    Config config{.layers = "ME", .vocab = V, .d_model = 16, .d_state = 5, .experts = 4, .capacity = 0.25};
    Model dropping(config, cpu::layers);
    config.capacity = 0;
    Model keeping(config, cpu::layers);
    const Batch batch(V, B, T);
    const int *tokens = batch.tokens.data(), *targets = batch.targets.data();
    for (Model* model : {&dropping, &keeping}) initialize_off_centre(*model), model->allocate_training(B, T);
    const Losses with = run_step(dropping, batch), without = run_step(keeping, batch);
    CHECK(with.dropped >= 0.75);
    CHECK(without.dropped == 0);
    CHECK(with.cross_entropy != without.cross_entropy);
    CHECK(dropping.evaluate(tokens, targets, B, T) == keeping.evaluate(tokens, targets, B, T));
    CHECK(distance({dropping.evaluate(tokens, targets, B, T)}, {without.cross_entropy}) <= kClose);
    CHECK((dropping.logits(tokens, B, T) == keeping.logits(tokens, B, T)));
    DecodeState a, b;
    dropping.start(a, B, T), keeping.start(b, B, T);
    dropping.decode(a, tokens, T, 0), keeping.decode(b, tokens, T, 0);
    CHECK((dropping.probabilities == keeping.probabilities));
}

TEST_CASE("a training step waits for nothing but the counts of experts without capacity, a decoded token for nothing", "[model]") {
    // A device that reads what is uploaded later only when someone waits for it: until then it must stay as it was.
    struct Late { const unsigned char* from; std::vector<unsigned char> bytes; };
    static std::vector<Late> late;
    static std::vector<std::pair<const unsigned char*, size_t>> host;
    static int waits, changed, pageable;
    waits = changed = pageable = 0, host.clear();
    Layers layers = cpu::layers;
    layers.allocate_host = [](size_t bytes, const char* name) {
        void* memory = cpu::layers.allocate_host(bytes, name);
        host.emplace_back(static_cast<unsigned char*>(memory), bytes);
        return memory;
    };
    layers.synchronize = [](cudaStream_t) {
        for (const Late& l : late) changed += memcmp(l.from, l.bytes.data(), l.bytes.size()) != 0;
        late.clear();
        ++waits;
    };
    static auto wait = layers.synchronize;
    layers.upload = [](void* to, const void* from, size_t bytes, cudaStream_t) {
        memcpy(to, from, bytes);
        ++waits;
    };
    layers.upload_later = [](void* to, const void* from, size_t bytes, cudaStream_t) {
        memcpy(to, from, bytes);
        const auto* p = static_cast<const unsigned char*>(from);
        late.push_back({p, {p, p + bytes}});
        pageable += std::none_of(host.begin(), host.end(), [&](const auto& h) { return p >= h.first && p + bytes <= h.first + h.second; });
    };
    layers.download = [](void* to, const void* from, size_t bytes, cudaStream_t stream) {
        memcpy(to, from, bytes);
        wait(stream);
    };
    for (const double capacity : {1.0, 0.0}) {
        const Config config{.layers = "ME*2", .vocab = 37, .d_model = 16, .d_state = 5, .experts = 4, .capacity = capacity};
        const int B = 2, T = 5, planned = 3, counts = capacity > 0 ? 0 : 2;  // of two E layers
        Model model(config, layers);
        model.initialize(seed);
        model.allocate_training(B, T, planned);
        for (const int parts : {planned, planned + 1}) {
            model.zero_gradients();
            waits = 0;
            for (int i = 0; i < parts; ++i) {
                const Batch batch(config.vocab - i, B, T);  // each part's memory is gone when it has been called
                model.forward_backward(batch.tokens.data(), batch.targets.data(), parts);
            }
            CHECK(waits == parts * counts + (parts > planned));  // one more part than there is room for waits
            model.update({}, model.read_losses(), 1);
            CHECK(late.empty());
        }
        DecodeState state;
        model.start(state, B, T + 3);  // at most kFewSlots choices: each expert's are found on the device
        for (const int tokens : {T, 1, 1, 1}) {
            waits = 0;
            model.decode(state, Batch(config.vocab, B, tokens).tokens.data(), tokens, 0);
            CHECK(waits == 1);  // for the probabilities
            CHECK(late.empty());
        }
    }
    CHECK(changed == 0);
    CHECK(pageable == 0);
}

#ifndef USE_CUDA
TEST_CASE("a training step takes few launches, a decoded token few launches and one wait", "[model][launches]") {
    Config config = find_preset("moe-mamba-100m").config;
    REQUIRE((config.layers == "ME*16" && config.experts == 42 && config.capacity == 1));
    config.vocab = 300, config.d_model = 16, config.d_inner = config.dt_rank = config.d_expert = 0;
    Model model(config, gpu::layers);
    model.initialize(seed);
    const Batch batch(config.vocab, 2, 24);
    model.allocate_training(batch.B, batch.T);
    auto count = [](const char* what, auto&& work) {
        const uint64_t launches = simt::launches, waits = simt::waits;
        work();
        const std::pair counted(simt::launches - launches, simt::waits - waits);
        printf("%-34s %4d launches, %d waits (%s)\n", what, int(counted.first), int(counted.second), kPrecision);
        return counted;
    };
    Losses losses;
    const auto part = count("zero_gradients, forward_backward", [&] {
        model.zero_gradients();
        model.forward_backward(batch.tokens.data(), batch.targets.data(), 1);
    });
    const auto read = count("read_losses", [&] { losses = model.read_losses(); });
    const auto update = count("update", [&] { model.update({}, losses, 1); });
    CHECK(part.first + read.first + update.first <= 900);
    CHECK(part.second + update.second == 0);
    CHECK(read.second <= 2);  // losses; experts' loads

    DecodeState state;
    model.start(state, 1, 8);
    for (int i = 0; i < 3; ++i) {
        const auto token = count("a decoded token", [&] { model.decode(state, &batch.tokens[i], 1, 1); });
        CHECK((i == 0 || token.first <= 250));
        CHECK((i == 0 || token.second == 1));  // between its upload and this download the host knows nothing of what it computes
    }
}
#endif

TEST_CASE("everything that training takes is taken before the first step", "[model]") {
    static std::vector<std::string> taken;
    Layers layers = cpu::layers;
    layers.allocate = [](size_t bytes, const char* name) { return taken.push_back(name), cpu::layers.allocate(bytes, name); };
    layers.allocate_host = [](size_t bytes, const char* name) { return taken.push_back(name), cpu::layers.allocate_host(bytes, name); };
    for (const Family& f : families()) DYNAMIC_SECTION(f.name) {
        const TemporaryFile file;
        const Batch batch(f.config.vocab, 2, 13);
        Model model(f.config, layers);
        model.initialize(seed);
        model.allocate_training(batch.B, batch.T, 2);
        taken.clear();
        for (int step = 1; step <= 2; ++step) {
            model.zero_gradients();
            for (int part = 0; part < 2; ++part) model.forward_backward(batch.tokens.data(), batch.targets.data(), 2);
            model.update({}, model.read_losses(), step);
            model.evaluate(batch.tokens.data(), batch.targets.data(), batch.B, batch.T);
            model.save(file.path, {});
            model.save_optimizer(file.path, {});
        }
        CHECK(taken == std::vector<std::string>{});
    }
}

TEST_CASE("a parameter that is never trained stays as it was, and is saved", "[model]") {
    for (const Layers* on : devices()) DYNAMIC_SECTION(on->device) {
        const Family& f = families()[2];
        Model model(f.config, *on);
        Tensor& fixed = model.steps[0]->norm;
        fixed.update = Tensor::never;  // before memory is planned, which is when tensors get their places
        initialize_off_centre(model);
        model.allocate_training(2, 9);
        std::vector<std::vector<double>> before;
        for (const Tensor* t : model.tensors) before.push_back(weights_of(model, *t));
        train(model, {Batch(f.config.vocab, 2, 9)}, 2, {});
        for (size_t i = 0; i < before.size(); ++i) {
            INFO(model.tensors[i]->name);
            CHECK((weights_of(model, *model.tensors[i]) == before[i]) == (model.tensors[i] == &fixed));
        }
        const TemporaryFile weights, moments;
        model.save(weights.path, {});
        model.save_optimizer(moments.path, {});
        CHECK(read(Safetensors(weights.path), fixed.name) == weights_of(model, fixed));
        const Safetensors optimizer(moments.path);
        bool trained = false, others = false;
        for (const auto& [name, entry] : optimizer.entries) (name.starts_with(fixed.name) ? trained : others) = true;
        CHECK((others && !trained));
    }
}

TEST_CASE("a token's loss is that of its logits, and their mean the loss", "[model]") {
    for (const Layers* on : devices()) DYNAMIC_SECTION(on->device) {
        const Config& config = families().back().config;
        Model model(config, *on);
        initialize_off_centre(model);
        Batch batch(config.vocab, 3, 7);
        batch.targets[5] = batch.targets[20] = -1;
        const std::vector<real> losses = model.token_losses(batch.tokens.data(), batch.targets.data(), 3, 7);
        const std::vector<real> logits = model.logits(batch.tokens.data(), 3, 7);
        std::vector<double> want(21);
        for (int i = 0; i < 21; ++i) {
            const real* const row = &logits[i * config.vocab];
            for (int v = 0; v < config.vocab; ++v) want[i] += std::exp(double(row[v]));
            want[i] = batch.targets[i] < 0 ? 0 : std::log(want[i]) - double(row[batch.targets[i]]);
        }
        CHECK(distance({losses.begin(), losses.end()}, want) <= kClose);
        const double mean = std::accumulate(want.begin(), want.end(), 0.0) / 19;
        CHECK(distance({model.evaluate(batch.tokens.data(), batch.targets.data(), 3, 7)}, {mean}) <= kClose);
    }
}

TEST_CASE("expert load and dropped tokens are those of all parts of a step", "[model]") {
    const Config config{.layers = "ME*2", .vocab = 37, .d_model = 16, .d_state = 5, .experts = 4, .capacity = 0.5};
    const int B = 2, T = 12, parts = 3;
    Model one(config, cpu::layers), all(config, cpu::layers);
    for (Model* model : {&one, &all}) initialize_off_centre(*model), model->allocate_training(B, T, model == &all ? parts : 1);
    const Batch batch(config.vocab, B * parts, T);
    double dropped = 0, load = 0;
    all.zero_gradients();
    for (int i = 0; i < parts; ++i) {
        const int *tokens = &batch.tokens[i * B * T], *targets = &batch.targets[i * B * T];
        one.zero_gradients();
        one.forward_backward(tokens, targets, 1);
        const Losses losses = one.read_losses();
        dropped += losses.dropped / parts;
        load = std::max(load, losses.expert_load);
        all.forward_backward(tokens, targets, parts);
    }
    const Losses losses = all.read_losses();
    CHECK(std::fabs(losses.dropped - dropped) < 1e-12);
    CHECK(losses.expert_load == load);
    CHECK(dropped > 0.3);
}

TEST_CASE("weight decay shrinks matrices, and leaves A_log, D, biases and norms alone", "[model]") {
    for (const Family& f : families()) DYNAMIC_SECTION(f.name) {
        Model model(f.config, cpu::layers);
        model.initialize(seed);
        model.allocate_training(1, 1);
        auto weights = [&](const Parameter& p) { return get(model, p.tensor->master + p.offset, p.count); };
        std::vector<std::vector<double>> want;
        for (const Parameter& p : model.parameters) want.push_back(weights(p));
        model.update({.lr = 0.1, .weight_decay = 0.5}, Losses{}, 1);  // gradients are zero
        for (size_t i = 0; i < want.size(); ++i) {
            const std::string& name = model.parameters[i].name;
            auto ends = [&](const char* suffix) { return name.ends_with(suffix); };
            const bool kept = ends(".A_log") || ends(".D") || ends(".bias") || ends("norm.weight") || ends("norm_f.weight") ||
                              ends(".gain") || ends(".delay") || ends("_zeta") || ends("_gamma") || ends("_noise");
            for (double& w : want[i]) w *= kept ? 1 : 0.95;
            INFO(name);
            CHECK((model.parameters[i].tensor->update == Tensor::plain) == kept);
            CHECK(distance(weights(model.parameters[i]), want[i]) <= (kept ? 0 : sizeof(real) == 8 ? 1e-15 : 1e-7));
        }
    }
}

TEST_CASE("a NaN is found and named", "[model]") {
    Model model(families()[2].config, cpu::layers);
    model.initialize(seed);
    model.allocate_training(1, 3);
    run_step(model, Batch(37, 1, 3));
    auto by_norm = [&](const Tensor* a, const Tensor* b) { return norm(gradient_of(model, *a)) < norm(gradient_of(model, *b)); };
    const Tensor& largest = **std::max_element(model.tensors.begin(), model.tensors.end(), by_norm);
    CHECK(model.first_bad_tensor().starts_with("gradient of " + largest.name));  // for want of a bad one
    const Tensor &router = tensor(model, "backbone.layers.1.moe.router.weight"), &A_log = tensor(model, "backbone.layers.0.mixer.A_log");
    // In the order in which a NaN spreads: weights, then up the residual stream, then down the gradients.
    put(model, A_log.grad + 2, {by_precision(1e200, 1e30, 1e30)});  // whose square is infinite
    CHECK(model.first_bad_tensor().starts_with("gradient of backbone.layers.0.mixer.A_log"));
    put(model, A_log.grad + 2, {0});
    put(model, model.embedding.grad, {NAN});
    CHECK(model.first_bad_tensor() == "gradient of backbone.embeddings.weight");
    put(model, router.grad + 5, {NAN});
    CHECK(model.first_bad_tensor() == "gradient of backbone.layers.1.moe.router.weight");
    put(model, model.steps[2]->sum + 7, {INFINITY});
    CHECK(model.first_bad_tensor() == "residual stream that reaches backbone.layers.2.norm.weight");
    put(model, router.master, {-INFINITY});
    CHECK(model.first_bad_tensor() == "weight of backbone.layers.1.moe.router.weight");
}

TEST_CASE("tokens are drawn as asked", "[model]") {
    const real probs[] = {real(0.1), real(0.3), real(0.05), real(0.3), real(0.25)};
    auto draw = [&](bool greedy, int top_k, double top_p) {
        std::map<int, int> counts;
        for (int i = 0; i < 1000; ++i) ++counts[sample_token(probs, 5, greedy, top_k, top_p, (i + 0.5) / 1000)];
        return counts;
    };
    using Counts = std::map<int, int>;
    CHECK(draw(true, 0, 1) == Counts{{1, 1000}});  // of two equals, the lower
    CHECK(draw(false, 0, 1) == Counts{{0, 100}, {1, 300}, {2, 50}, {3, 300}, {4, 250}});
    CHECK(draw(false, 1, 1) == Counts{{1, 1000}});
    CHECK(draw(false, 2, 1) == Counts{{1, 500}, {3, 500}});
    CHECK(draw(false, 0, 0.55) == Counts{{1, 500}, {3, 500}});
    CHECK(draw(false, 0, 0.1) == Counts{{1, 1000}});
}

// ------------------------------------------------------------------------------------------------------------------
// References of whole models

int number(const Safetensors& file, const char* key) { return std::stoi(file.meta(key)); }
Config config_of(const Safetensors& file, const char* layers, int vocab) {
    return {.layers = layers, .vocab = vocab, .d_model = number(file, "d_model"), .d_inner = number(file, "d_inner"),
            .d_state = number(file, "d_state"), .d_conv = number(file, "d_conv"), .dt_rank = number(file, "dt_rank"), .tied = 1};
}
// Calls f(parameter, its name in the file) for all that the file has.
template <class F> int each_reference(const Model& model, const Safetensors& file, const std::string& prefix, F&& f) {
    int found = 0;
    for (const Parameter& p : model.parameters)
        if (p.name.starts_with(prefix) && file.has(p.name.substr(prefix.size()))) f(p, p.name.substr(prefix.size())), ++found;
    return found;
}
int load_reference(Model& model, const Safetensors& file, const std::string& prefix) {
    model.initialize(seed);
    return each_reference(model, file, prefix, [&](const Parameter& p, const std::string& name) {
        set_weights(model, *p.tensor, read(file, name), p.offset);
    });
}
void check_reference_gradients(const Model& model, const Safetensors& file, const std::string& prefix) {
    each_reference(model, file, prefix, [&](const Parameter& p, const std::string& name) {
        INFO(name);
        CHECK(distance(get(model, p.tensor->grad + p.offset, p.count), read(file, name + ".grad")) <= kOracleClose);
    });
}

void check_reference_model(const Safetensors& file, const Config& config, const Layers& on) {
    Batch batch(1, number(file, "B"), number(file, "T"));
    file.read("tokens", batch.tokens.data());
    file.read("targets", batch.targets.data());
    Model model(config, on);
    CHECK(load_reference(model, file, "") == int(model.parameters.size()));
    const std::vector<real> logits = model.logits(batch.tokens.data(), batch.B, batch.T);
    CHECK(distance({logits.begin(), logits.end()}, read(file, "logits")) <= kOracleClose);
    model.allocate_training(batch.B, batch.T);
    CHECK(distance({run_step(model, batch).cross_entropy}, read(file, "loss")) <= kOracleClose);
    check_reference_gradients(model, file, "");
}
TEST_CASE("a Mamba model agrees with transformers' MambaForCausalLM", "[model][oracle]") {
    const Safetensors file(oracle + "/mamba_lm.safetensors");
    for (const Layers* on : devices())
        DYNAMIC_SECTION(on->device) check_reference_model(file, config_of(file, "MM", number(file, "vocab_size")), *on);
}
// In bf16 rounded weights are enough to change its smallest gradients by a tenth.
TEST_CASE("a Conba model agrees with PyTorch", kMixedPrecision ? "[.not bf16]" : "[model][oracle]") {
    const Safetensors file(oracle + "/conba_lm.safetensors");
    Config c = config_of(file, "CC", number(file, "vocab_size"));
    const auto value = [&](const char* key) { return std::stod(file.meta(key)); };
    c.conba_tau = number(file, "tau"), c.conba_alpha = value("alpha"), c.conba_kappa = value("kappa"), c.conba_eps = value("eps");
    for (const Layers* on : devices()) DYNAMIC_SECTION(on->device) check_reference_model(file, c, *on);
}
// In bf16 rounding sends tokens to other experts than theirs.
TEST_CASE("Mixtral and Jamba agree with transformers", kMixedPrecision ? "[.not bf16]" : "[model][oracle]") {
    for (const char* name : {"mixtral_lm", "jamba_lm"}) {
        const Safetensors file(oracle + "/" + name + ".safetensors");
        const bool jamba = file.meta("d_inner", "") != "";
        Config c = jamba ? config_of(file, "", 0) : Config{.d_model = number(file, "d_model")};
        c.layers = file.meta("layers"), c.vocab = number(file, "vocab_size"), c.tied = 0, c.mamba_norms = jamba;
        c.heads = number(file, "heads"), c.kv_heads = number(file, "kv_heads"), c.head_dim = number(file, "head_dim");
        c.rope_base = std::stod(file.meta("rope_base")), c.norm_eps = std::stod(file.meta("norm_eps"));
        c.d_ff = c.d_expert = number(file, "d_ff"), c.swiglu_experts = 1;
        c.experts = number(file, "experts"), c.top_k = number(file, "top_k"), c.renormalize = number(file, "renormalize");
        c.capacity = c.balance_loss = 0;
        for (const Layers* on : devices()) DYNAMIC_SECTION(name << ", " << on->device) check_reference_model(file, c, *on);
    }
}

// Whole directories, in every form that they come in. transformers rounds what its norms compute to float32, whatever else is float64. In bf16
// rounding sends tokens to other experts than theirs.
TEST_CASE("what transformers has saved gives the logits that it computes", kMixedPrecision ? "[.not bf16]" : "[model][oracle]") {
    for (const char* name : {"mamba", "mamba-f16-sharded", "mamba-no-conv-bias", "jamba-sharded", "jamba-fused", "jamba-dense", "mixtral",
                             "mixtral-fused"})
        for (const Layers* on : devices()) DYNAMIC_SECTION(name << ", " << on->device) {
            const std::string directory = oracle + "/huggingface/" + name;
            const ModelFiles files(directory);
            CHECK(!files.ours());
            const Safetensors expected(directory + "/expected.safetensors");
            const std::vector<int64_t>& shape = expected.find("tokens").shape;
            Batch batch(files.config.vocab, int(shape[0]), int(shape[1]));
            expected.read("tokens", batch.tokens.data());
            Model model(files.config, *on);
            model.trains = false;
            model.load(files);
            const std::vector<real> logits = model.logits(batch.tokens.data(), batch.B, batch.T);
            CHECK(distance({logits.begin(), logits.end()}, read(expected, "logits")) <= (sizeof(real) == 8 ? 1e-6 : 1e-5));
        }
}
TEST_CASE("the mixer agrees with transformers' MambaMixer, and goes on from its state", "[model][oracle]") {
    for (const Layers* on : devices()) DYNAMIC_SECTION(on->device) {
        const Safetensors file(oracle + "/mamba_mixer.safetensors");
        const int B = number(file, "B"), T = number(file, "T"), more = number(file, "decode_steps");
        const std::string prefix = "backbone.layers.0.mixer.";
        Model model(config_of(file, "M", 8), *on);
        CHECK(load_reference(model, file, prefix) == 9);
        const int C = model.config.d_model, D = model.config.d_inner, N = model.config.d_state, W = model.config.d_conv;
        Step& step = *model.steps[0];
        Layer& mixer = *step.layers[0];

        model.allocate_training(B, T);
        model.activations.bind();
        const Pass pass{.B = B, .T = T, .training = true};
        put(model, step.normed, read(file, "x"));
        mixer.forward(pass, step.normed, model.buffers.branch, false);
        CHECK(distance(get(model, model.buffers.branch, B * T * C), read(file, "out")) <= kOracleClose);
        put(model, model.buffers.d_branch, read(file, "dout"));
        mixer.backward(pass, model.buffers.d_normed, model.buffers.d_branch, step.normed, false);
        CHECK(distance(get(model, model.buffers.d_normed, B * T * C), read(file, "x.grad")) <= kOracleClose);
        check_reference_gradients(model, file, prefix);

        DecodeState state;
        model.start(state, B, T + more);
        model.begin_inference(B, T);
        auto forward = [&](const std::vector<double>& x) {  // (B, T, C) from the state on
            const int T = int(x.size()) / (B * C);
            put(model, step.normed, x);
            mixer.forward({.B = B, .T = T, .state = state.current, .position = state.position}, step.normed, model.buffers.branch, false);
            state.current = 1 - state.current;
            state.position += T;
            return get(model, model.buffers.branch, x.size());
        };
        auto current = [&](const std::string& name) {
            for (const Arena::Entry& entry : state.arena.entries)
                if (entry.name.ends_with(name + " " + std::to_string(state.current))) return static_cast<const real*>(entry.memory);
            FAIL("no " << name);
            return static_cast<const real*>(nullptr);
        };
        auto check_states = [&](const std::string& which) {
            CHECK(distance(get(model, current("scan state"), B * D * N), read(file, which + "ssm_state")) <= kOracleClose);
            const std::vector<double> theirs = read(file, which + "conv_state");  // (B, D, W); ours is (B, W-1, D)
            std::vector<double> want;
            for (int b = 0; b < B; ++b)
                for (int w = 1; w < W; ++w)
                    for (int d = 0; d < D; ++d) want.push_back(theirs[(b * D + d) * W + w]);
            CHECK(distance(get(model, current("conv state"), want.size()), want) <= kOracleClose);
        };
        forward(read(file, "x"));
        check_states("");
        const std::vector<double> x = read(file, "decode_x"), want = read(file, "decode_out");
        for (int t = 0; t < more; ++t) {
            std::vector<double> x_t, want_t;
            for (int b = 0; b < B; ++b)
                for (int c = 0; c < C; ++c) x_t.push_back(x[(b * more + t) * C + c]), want_t.push_back(want[(b * more + t) * C + c]);
            CHECK(distance(forward(x_t), want_t) <= kOracleClose);
        }
        check_states("decode_");
    }
}

TEST_CASE("clipping and AdamW agree with PyTorch", "[model][oracle]") {
    for (const Layers* on : devices()) DYNAMIC_SECTION(on->device) {
        const Safetensors file(oracle + "/adamw.safetensors");
        Model model({.layers = "M", .vocab = 8, .d_model = 6, .d_inner = 8, .d_state = 2}, *on);
        model.initialize(seed);
        model.allocate_training(1, 1);
        // The reference's two parameters take the place of the first elements of one that decays, and of one that does not.
        const std::pair<const char*, Tensor*> parameters[] = {{"matrix.", &model.embedding}, {"vector.", &model.steps[0]->norm}};
        for (const auto& [name, tensor] : parameters) set_weights(model, *tensor, read(file, std::string(name) + "init"));
        auto option = [&](const char* key) { return std::stod(file.meta(key)); };
        const std::vector<double> lr = read(file, "lr");
        const int steps = int(lr.size());
        for (int step = 0; step < steps; ++step) {
            auto now = [&](const std::string& name) {
                const std::vector<double> all = read(file, name);
                const size_t size = all.size() / steps;
                return std::vector<double>(&all[step * size], &all[0] + (step + 1) * size);
            };
            INFO("step " << step);
            model.zero_gradients();
            for (const auto& [name, tensor] : parameters) put(model, tensor->grad, now(std::string(name) + "grads"));
            const Losses losses = model.read_losses();
            CHECK(distance({losses.grad_norm}, now("norms")) <= kOracleClose);
            model.update({.lr = lr[step], .beta1 = option("beta1"), .beta2 = option("beta2"), .eps = option("eps"),
                          .weight_decay = option("matrix.weight_decay"), .grad_clip = option("max_norm")}, losses, step + 1);
            const std::pair<const char*, real* Tensor::*> results[] = {{"steps", &Tensor::master}, {"m", &Tensor::m}, {"v", &Tensor::v}};
            for (const auto& [name, tensor] : parameters)
                for (const auto& [what, member] : results) {
                    const std::vector<double> want = now(std::string(name) + what);
                    INFO(name << what);
                    // 1e-6: PyTorch clips by norm + 1e-6
                    CHECK(distance(get(model, tensor->*member, want.size()), want) <= std::max(kOracleClose, 1e-6));
                }
        }
    }
}
}  // namespace
