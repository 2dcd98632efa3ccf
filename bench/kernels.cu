// What each layer function takes at one realistic size, against what it could not take less of: where memory is the limit, the bytes of
// its inputs and outputs at the bandwidth of a plain copy; of a matrix product, its operations at the rate of a large square one. Both
// limits are measured here. Then whole training steps. The device is the build's: a GPU (make CUDA=1) or the CPU.
#include "moemamba.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <unistd.h>

static cudaStream_t stream;  // of everything here

// ---- the two devices: time, a plain copy, free memory
#ifdef USE_CUDA
constexpr const char* kDevice = "cuda";
struct Size {
    int B = 16, T = 1024, experts = 16, square = 8192;
    int64_t parameters = 1 << 26, evicted = 1 << 26;
    const char* preset = "moe-mamba-25m";
    int train_T = 1024, train_B = 64;
};
static void check(cudaError_t status) {
    if (status != cudaSuccess) fail("CUDA: %s", cudaGetErrorString(status));
}
class Stopwatch {
   public:
    explicit Stopwatch(const Layers& layers) : layers(layers) {
        check(cudaEventCreate(&begin));
        check(cudaEventCreate(&end));
    }
    Stopwatch(const Stopwatch&) = delete;
    ~Stopwatch() { cudaEventDestroy(begin), cudaEventDestroy(end); }
    void start() { check(cudaEventRecord(begin, stream)); }
    double milliseconds() {
        float elapsed;
        check(cudaEventRecord(end, stream));
        layers.synchronize(stream);
        check(cudaEventElapsedTime(&elapsed, begin, end));
        return elapsed;
    }

   private:
    const Layers& layers;
    cudaEvent_t begin, end;
};
static void copy(char* to, const char* from, int64_t bytes) { check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream)); }
static double free_memory() {
    size_t free, total;
    check(cudaMemGetInfo(&free, &total));
    return double(free);
}
#else
constexpr const char* kDevice = "cpu";
struct Size {
    int B = 1, T = 1024, experts = 8, square = 2048;
    int64_t parameters = 1 << 23, evicted = 1 << 26;
    const char* preset = "moe-mamba-10m";
    int train_T = 256, train_B = 16;
};
class Stopwatch {
   public:
    explicit Stopwatch(const Layers& layers) : layers(layers) {}
    void start() { begin = std::chrono::steady_clock::now(); }
    double milliseconds() {
        layers.synchronize(stream);
        return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
    }

   private:
    const Layers& layers;
    std::chrono::steady_clock::time_point begin;
};
static void copy(char* to, const char* from, int64_t bytes) {
    constexpr int64_t kBlock = 1 << 18;
#pragma omp parallel for
    for (int64_t at = 0; at < bytes; at += kBlock) memcpy(to + at, from + at, std::min(kBlock, bytes - at));
}
static double free_memory() { return double(sysconf(_SC_AVPHYS_PAGES)) * double(sysconf(_SC_PAGESIZE)); }
#endif

// ---- arrays on the device
template <class T>
struct Array {
    T* data;
    int64_t count;
    operator T*() const { return data; }
    double bytes() const { return double(count) * sizeof(T); }
    Array part(int64_t first, int64_t size) const { return {data + first, size}; }  // of a slice of columns: its start, and its size
};

class Memory {
   public:
    explicit Memory(const Layers& layers) : layers(layers) {}
    Memory(const Memory&) = delete;
    ~Memory() {
        for (void* p : blocks) layers.release(p);
    }
    // Filled with numbers as they come in training: how long a kernel takes can depend on them.
    template <class T>
    Array<T> normal(int64_t count, double deviation = 1, double mean = 0) {
        return filled<T>(count, [=](int64_t i) { return T(real(mean + deviation * random_normal(1, kInitStream, i))); });
    }
    Array<int> integers(int64_t count, int below) {
        return filled<int>(count, [=](int64_t i) { return int(random_bits(1, kInitStream, i) % below); });
    }
    void* bytes(size_t size) { return blocks.emplace_back(layers.allocate(size, "benchmark")); }

   private:
    template <class T, class F>
    Array<T> filled(int64_t count, F&& value) {
        constexpr int64_t kPeriod = 99991;  // a prime, so that no two rows are alike
        std::vector<T> values(std::min(count, kPeriod));
        for (size_t i = 0; i < values.size(); i++) values[i] = value(i);
        T* data = static_cast<T*>(bytes(count * sizeof(T)));
        for (int64_t at = 0; at < count; at += kPeriod)
            layers.upload(data + at, values.data(), std::min(kPeriod, count - at) * sizeof(T), stream);
        layers.synchronize(stream);
        return {data, count};
    }
    const Layers& layers;
    std::vector<void*> blocks;
};

// Median milliseconds of ten calls, the caches emptied before each (which also keeps a GPU busy while the launches are queued).
static double median_milliseconds(const Layers& layers, const Array<real>& evicted, const std::function<void()>& work) {
    Stopwatch watch(layers);
    std::vector<double> all;
    for (int i = -2; i < 10; i++) {
        layers.zero(evicted, size_t(evicted.bytes()), stream);
        if (!strcmp(kDevice, "cpu")) layers.synchronize(stream);
        watch.start();
        work();
        const double elapsed = watch.milliseconds();
        if (i >= 0) all.push_back(elapsed);
    }
    std::sort(all.begin(), all.end());
    return all[all.size() / 2];
}

// ---- the table of layer functions
struct Entry {
    std::string name;
    double bytes, flops;  // one of them is 0
    std::function<void()> run;
};
// The least that must move: each array once; one that is read and written is named twice.
template <class... Arrays>
static double once(const Arrays&... arrays) {
    return (0.0 + ... + arrays.bytes());
}

static void bench_layers(const Layers& l, const Size& size, double copy_bandwidth, double flops, const Array<real>& evicted) {
    Config c;
    c.layers = "ME";
    c.vocab = 50257;
    c.d_model = 768;
    c.experts = size.experts;
    c.resolve();
    const int B = size.B, T = size.T, rows = B * T, C = c.d_model, D = c.d_inner, N = c.d_state, R = c.dt_rank, W = c.d_conv, V = c.vocab,
              Vp = c.padded_vocab(), E = c.experts, K = c.top_k, F = c.d_expert, capacity = c.capacity_rows(rows), slots = E * capacity,
              ld_x_dbl = R + 2 * N, head_rows = std::min(rows, 1024);
    Memory memory(l);
    void* const scratch = memory.bytes(std::max({kSumScratch, l.embedding_scratch(rows), l.rmsnorm_scratch(rows, C),
                                                 l.conv_scratch(B, T, D, W), l.scan_scratch(B, T, D, N), l.router_scratch(rows, C, E),
                                                 l.dispatch_scratch(rows * K)}));
    std::vector<Entry> entries;
    auto memory_bound = [&](const char* name, double bytes, std::function<void()> run) {
        entries.push_back({name, bytes, 0, std::move(run)});
    };

    const auto tokens = memory.integers(rows, V);
    const auto table = memory.normal<floatX>(int64_t(Vp) * C, 0.02);
    const auto residual = memory.normal<real>(int64_t(rows) * C), d_residual = memory.normal<real>(int64_t(rows) * C);
    const auto d_table = memory.normal<real>(int64_t(Vp) * C);
    const int64_t seen = int64_t(std::min(rows, V)) * C;  // of the table
    memory_bound("embedding_forward", once(tokens, table.part(0, seen), residual),
                 [=] { l.embedding_forward(residual, tokens, table, rows, C, stream); });
    memory_bound("embedding_backward", once(tokens, d_residual, d_table.part(0, seen), d_table.part(0, seen)),
                 [=] { l.embedding_backward(d_table, d_residual, tokens, scratch, rows, V, C, stream); });

    const auto normed = memory.normal<floatX>(int64_t(rows) * C), branch = memory.normal<floatX>(int64_t(rows) * C);
    const auto d_normed = memory.normal<floatX>(int64_t(rows) * C), d_branch = memory.normal<floatX>(int64_t(rows) * C);
    const auto sum = memory.normal<real>(int64_t(rows) * C), rstd = memory.normal<real>(rows), norm = memory.normal<real>(C, 0.1, 1);
    const auto d_norm = memory.normal<real>(C);
    memory_bound("rmsnorm_forward", once(residual, branch, sum, normed, rstd),
                 [=] { l.rmsnorm_forward(normed, sum, rstd, residual, branch, norm, rows, C, real(1e-5), stream); });
    memory_bound("rmsnorm_backward", once(d_residual, d_residual, d_branch, d_normed, sum, rstd),
                 [=] { l.rmsnorm_backward(d_residual, d_branch, d_norm, d_normed, sum, rstd, norm, scratch, rows, C, stream); });

    const auto xz = memory.normal<floatX>(int64_t(rows) * 2 * D), d_xz = memory.normal<floatX>(int64_t(rows) * 2 * D);
    const auto x = xz.part(0, int64_t(rows) * D), d_x = d_xz.part(0, int64_t(rows) * D), z = xz.part(D, int64_t(rows) * D),
               d_z = d_xz.part(D, int64_t(rows) * D);
    const auto u = memory.normal<floatX>(int64_t(rows) * D), d_u = memory.normal<floatX>(int64_t(rows) * D);
    const auto conv_weight = memory.normal<real>(D * W), conv_bias = memory.normal<real>(D);
    const auto d_conv_weight = memory.normal<real>(D * W), d_conv_bias = memory.normal<real>(D);
    const Conv conv{x, 2 * D, conv_weight, conv_bias, nullptr, B, T, D, W};
    memory_bound("conv_forward", once(x, u), [=] { l.conv_forward(u, nullptr, conv, stream); });
    memory_bound("conv_backward", once(d_u, x, d_x),
                 [=] { l.conv_backward({d_x, d_conv_weight, d_conv_bias, nullptr}, d_u, nullptr, conv, scratch, stream); });

    const auto dt = memory.normal<floatX>(int64_t(rows) * D, 0.5), d_dt = memory.normal<floatX>(int64_t(rows) * D);
    const auto x_dbl = memory.normal<floatX>(int64_t(rows) * ld_x_dbl), d_x_dbl = memory.normal<floatX>(int64_t(rows) * ld_x_dbl);
    const auto B_and_C = x_dbl.part(R, int64_t(rows) * 2 * N), d_B_and_C = d_x_dbl.part(R, int64_t(rows) * 2 * N);
    const auto y = memory.normal<floatX>(int64_t(rows) * D), d_y = memory.normal<floatX>(int64_t(rows) * D);
    const auto A_log = memory.normal<real>(D * N, 0.5, 1), skip = memory.normal<real>(D, 0.1, 1), dt_bias = memory.normal<real>(D, 1, -4);
    const auto d_A_log = memory.normal<real>(D * N), d_skip = memory.normal<real>(D), d_dt_bias = memory.normal<real>(D);
    const auto chunk_states = memory.normal<real>(B * scan_chunks(T) * D * N);
    const Scan scan{u, dt, B_and_C, B_and_C + N, ld_x_dbl, z, 2 * D, A_log, skip, dt_bias, nullptr, B, T, D, N};
    memory_bound("scan_forward", once(u, dt, z, B_and_C, y, chunk_states),
                 [=] { l.scan_forward(y, nullptr, chunk_states, scan, scratch, stream); });
    memory_bound("scan_backward", once(u, dt, z, d_y, B_and_C, chunk_states, d_u, d_dt, d_z, d_B_and_C), [=] {
        l.scan_backward({d_u, d_dt, d_B_and_C, d_B_and_C + N, d_z, d_A_log, d_skip, d_dt_bias, nullptr}, d_y, nullptr, scan, chunk_states,
                        scratch, stream);
    });

    const auto router_weight = memory.normal<real>(E * C, 0.02), d_router_weight = memory.normal<real>(E * C);
    const auto probs = memory.normal<real>(int64_t(rows) * E), lse = memory.normal<real>(rows), gates = memory.normal<real>(rows * K),
               d_gates = memory.normal<real>(rows * K), losses = memory.normal<real>(2);
    const auto experts = memory.integers(rows * K, E), slot = memory.integers(rows * K, 1), choice = memory.integers(slots, 1),
               load = memory.integers(E, rows), offset = memory.integers(E + 1, 1);
    const auto d_routed = memory.normal<floatX>(int64_t(rows) * C);
    const Router router{normed, router_weight, rows, C, E, K, false};
    const Routing routing{probs, lse, experts, gates};
    const Dispatch to{slot, choice, load, offset, rows, E, K, capacity};
    memory_bound("router_forward", once(normed, router_weight, probs, lse, experts, gates),
                 [=] { l.router_forward(routing, router, scratch, stream); });
    memory_bound("dispatch_plan", once(experts, slot, choice), [=] { l.dispatch_plan(to, experts, scratch, stream); });
    memory_bound("router_losses", once(probs, lse), [=] { l.router_losses(losses, probs, lse, load, scratch, rows, E, stream); });
    memory_bound("router_backward", once(d_routed, d_routed, normed, d_gates, probs, lse, experts, gates), [=] {
        l.router_backward(d_routed, d_router_weight, d_gates, routing, load, router, real(0.01), real(0.001), scratch, stream);
    });

    const auto dispatched = memory.normal<floatX>(int64_t(slots) * C), returned = memory.normal<floatX>(int64_t(slots) * C);
    const auto hidden = memory.normal<floatX>(int64_t(slots) * F), d_hidden = memory.normal<floatX>(int64_t(slots) * F);
    memory_bound("dispatch_forward", once(choice, normed, dispatched), [=] { l.dispatch_forward(dispatched, normed, to, C, stream); });
    memory_bound("dispatch_backward", once(slot, dispatched, d_routed),
                 [=] { l.dispatch_backward(d_routed, dispatched, to, C, false, stream); });
    memory_bound("combine_forward", once(slot, gates, returned, branch),
                 [=] { l.combine_forward(branch, returned, gates, to, C, false, stream); });
    memory_bound("combine_backward", once(d_branch, returned, gates, slot, choice, dispatched, d_gates),
                 [=] { l.combine_backward(dispatched, d_gates, d_branch, returned, gates, to, C, stream); });
    memory_bound("relu_forward", once(hidden, hidden), [=] { l.relu_forward(hidden, hidden, hidden.count, stream); });
    memory_bound("relu_backward", once(hidden, d_hidden, d_hidden),
                 [=] { l.relu_backward(d_hidden, d_hidden, hidden, hidden.count, stream); });
    memory_bound("swiglu_forward", once(xz, y), [=] { l.swiglu_forward(y, xz, rows, D, stream); });
    memory_bound("swiglu_backward", once(xz, d_y, d_xz), [=] { l.swiglu_backward(d_xz, d_y, xz, rows, D, stream); });

    const auto logits = memory.normal<floatX>(int64_t(head_rows) * Vp);
    const auto next = memory.normal<real>(int64_t(B) * V), row_losses = memory.normal<real>(rows);
    memory_bound("classifier", once(logits, logits),
                 [=] { l.classifier(row_losses, logits, tokens, head_rows, V, Vp, real(1.0 / rows), stream); });
    memory_bound("softmax_forward", once(logits.part(0, int64_t(B) * Vp), next),
                 [=] { l.softmax_forward(next, logits, B, V, Vp, real(0.7), stream); });

    const auto master = memory.normal<real>(size.parameters), grad = memory.normal<real>(size.parameters);
    const auto m = memory.normal<real>(size.parameters, 0.1), v = memory.normal<real>(size.parameters, 0.01, 1);
    const auto weight = memory.normal<floatX>(kMixedPrecision ? size.parameters : 1);
    memory_bound("sum", once(grad), [=] { l.sum(losses, grad, scratch, grad.count, stream); });
    memory_bound("sum_of_squares", once(grad), [=] { l.sum_of_squares(losses, grad, scratch, grad.count, stream); });
    memory_bound("adamw", once(master, master, m, m, v, v, grad) + (kMixedPrecision ? weight.bytes() : 0), [=] {
        l.adamw(master, kMixedPrecision ? weight.data : nullptr, m, v, grad, master.count, AdamW(), real(1), 10, stream);
    });

    // Matrix products; in, out and weight large enough for all of them.
    const struct {
        const char* name;
        int rows, I, O;
    } products[] = {{"in_proj", rows, C, 2 * D}, {"x_proj", rows, D, ld_x_dbl}, {"dt_proj", rows, R, D}, {"out_proj", rows, D, C},
                    {"head", head_rows, C, Vp}},
      expert_products[] = {{"in", slots, C, F}, {"out", slots, F, C}};
    int64_t most_in = 0, most_out = 0, most_weight = int64_t(E) * C * F;
    for (const auto& p : products) {
        most_in = std::max({most_in, int64_t(p.rows) * p.I, int64_t(slots) * F});
        most_out = std::max({most_out, int64_t(p.rows) * p.O, int64_t(slots) * F});
        most_weight = std::max(most_weight, int64_t(p.I) * p.O);
    }
    const auto in = memory.normal<floatX>(most_in), out = memory.normal<floatX>(most_out), matrix = memory.normal<floatX>(most_weight);
    const auto d_in = memory.normal<floatX>(most_in);
    const auto d_matrix = memory.normal<real>(most_weight);
    for (const auto& p : products) {
        const double work = 2.0 * p.rows * p.I * p.O;
        const std::string name = std::string(" ") + p.name;
        const Linear linear{in, p.I, matrix, p.rows, p.I, p.O};
        entries.push_back({"linear_forward" + name, 0, work, [=] { l.linear_forward(out, p.O, linear, false, stream); }});
        entries.push_back({"linear_backward" + name, 0, 2 * work,
                           [=] { l.linear_backward(d_in, p.I, d_matrix, out, p.O, linear, false, true, stream); }});
    }
    for (const auto& p : expert_products) {
        const double work = 2.0 * p.rows * p.I * p.O;
        const std::string name = std::string(" ") + p.name;
        const Experts product{in, matrix, to, nullptr, p.I, p.O};
        entries.push_back({"experts_forward" + name, 0, work, [=] { l.experts_forward(out, product, stream); }});
        entries.push_back({"experts_backward" + name, 0, 2 * work,
                           [=] { l.experts_backward(d_in, d_matrix, out, product, true, stream); }});
    }

    printf("\nB %d, T %d, C %d, D %d, N %d, R %d, E %d, F %d, V %d in %s; the head has %d rows, swiglu F = D, adamw %lld parameters\n", B, T, C, D,
           N, R, E, F, V, kPrecision, head_rows, static_cast<long long>(size.parameters));
    printf("%-28s %10s %10s %-9s %12s\n", "", "ms", "", "", "% of limit");
    for (const Entry& e : entries) {
        const double seconds = median_milliseconds(l, evicted, e.run) * 1e-3;
        const double rate = (e.flops + e.bytes) / seconds;
        printf("%-28s %10.4f %10.2f %-9s %12.1f\n", e.name.c_str(), seconds * 1e3, e.flops > 0 ? rate * 1e-12 : rate * 1e-9,
               e.flops > 0 ? "TFLOP/s" : "GB/s", 100 * rate / (e.flops > 0 ? flops : copy_bandwidth));
        fflush(stdout);
    }
}

// ---- whole steps: forward, backward and update of the preset, with the largest batch that fits
static void bench_training(const Layers& layers, const Size& size, double flops) {
    const int T = size.train_T;
    int B = size.train_B;
    auto fits = [&] {
        Model plan(find_preset(size.preset).config, layers);
        plan.plan_training(B, T);
        double bytes = 0;
        for (const Arena* arena : {&plan.weights, &plan.masters, &plan.gradients, &plan.moments, &plan.activations}) bytes += double(arena->bytes);
        return bytes < 0.9 * free_memory();
    };
    while (!fits()) {
        if (B == 1) fail("%s does not fit into %.1f GB", size.preset, free_memory() * 1e-9);
        B /= 2;
    }
    Model model(find_preset(size.preset).config, layers);
    model.initialize(1);
    model.allocate_training(B, T);
    std::vector<int> tokens(int64_t(B) * T + 1);
    for (size_t i = 0; i < tokens.size(); i++) tokens[i] = int(random_bits(1, kShuffleStream, i) % model.config.vocab);
    Stopwatch watch(layers);
    std::vector<double> seconds;
    for (int step = 1; step <= 7; step++) {
        watch.start();
        model.zero_gradients();
        model.forward_backward(tokens.data(), tokens.data() + 1, 1);
        model.update(AdamW(), model.read_losses(), step);
        const double elapsed = watch.milliseconds() * 1e-3;
        if (step > 2) seconds.push_back(elapsed);
    }
    std::sort(seconds.begin(), seconds.end());
    const double rate = double(B) * T / seconds[seconds.size() / 2];
    printf("\ntraining %s, B %d, T %d, %s: %.0f tokens/s, %.1f ms a step, MFU %.1f %% of the measured rate\n", size.preset, B, T, kPrecision, rate,
           seconds[seconds.size() / 2] * 1e3, 100 * rate * model.matmul_flops_per_token(T, true) / flops);
}

static int body(int argc, char** argv) {
    if (argc > 2 || (argc == 2 && strcmp(argv[1], kDevice)))
        fail("usage: kernels [%s]; this build measures %s only (simt counts and checks, its times mean nothing)", kDevice, kDevice);
    const Layers& layers = find_device(kDevice);
    stream = layers.open();
    const Size size;
    const double flops = measure_matmul_flops(layers, size.square);
    double copy_bandwidth;
    {
        Memory memory(layers);
        const Array<real> evicted = memory.normal<real>(size.evicted), to = memory.normal<real>(size.evicted);
        const double ms = median_milliseconds(layers, evicted, [&] {
            copy(reinterpret_cast<char*>(to.data), reinterpret_cast<const char*>(evicted.data), int64_t(to.bytes()));
        });
        copy_bandwidth = 2 * to.bytes() / (ms * 1e-3);
        printf("limits: copy %.1f GB/s (read and written), %d^3 product %.2f TFLOP/s\n", copy_bandwidth * 1e-9, size.square, flops * 1e-12);
        bench_layers(layers, size, copy_bandwidth, flops, evicted);
    }
    bench_training(layers, size, flops);
    return 0;
}

int main(int argc, char** argv) { return run_main(body, argc, argv); }
