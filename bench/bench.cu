// Speed as ratios: every figure is held against a limit of the machine that is measured in the same run, in turn with it, so that a
// machine that is slow today does not look like slow code. Prints a table and writes it to build/bench.tsv.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "moemamba.h"

struct Row {
    std::string name;
    double value;
    const char* unit;
    std::string against;
    double ratio;
    double target;  // the ratio is meant to be at least this; 0: no target
};

static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

static double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

template <class F>
static double seconds_of(F&& work) {
    const double start = now();
    work();
    return now() - start;
}

static std::vector<int> random_tokens(int64_t count, int vocab) {
    std::vector<int> tokens(count);
    for (int64_t i = 0; i < count; i++) tokens[i] = int(random_bits(1, kSampleStream, i) % vocab);
    return tokens;
}

static constexpr int kPeakSize = 2048;

// Training steps of a model, in turn with 2048^3 products: tokens/s, and the share of the products' rate that goes into useful products.
static void bench_training(std::vector<Row>& rows, const Layers& layers, const char* preset, int tokens_per_step, int T) {
    Model model(find_preset(preset).config, layers);
    const int B = tokens_per_step / T;
    model.initialize(1);
    model.allocate_training(B, T);
    const std::vector<int> tokens = random_tokens(tokens_per_step + 1, model.config.vocab);
    std::vector<double> shares, rates;
    for (int step = -1; step < 5; step++) {
        const double peak = measure_matmul_flops(layers, kPeakSize);
        const double seconds = seconds_of([&] {
            model.zero_gradients();
            model.forward_backward(tokens.data(), tokens.data() + 1, 1);
            model.update(AdamW(), model.read_losses(), std::max(1, step + 2));
            layers.synchronize(model.stream);
        });
        if (step < 0) continue;
        rates.push_back(tokens_per_step / seconds);
        shares.push_back(rates.back() * model.matmul_flops_per_token(T, true) / peak);
    }
    rows.push_back({std::string("train ") + preset, median(rates), "tokens/s", "matrix products at the 2048^3 rate", median(shares), 0.40});
}

// Decoding and a 512-token prompt of mamba-130m's shape with random weights.
static void bench_inference(std::vector<Row>& rows, const Layers& layers) {
    Model model(find_preset("mamba-130m").config, layers);
    model.initialize(1);
    const double bytes_per_token = double(model.active_parameter_count()) * sizeof(floatX);
    const std::vector<int> prompt = random_tokens(512, model.config.vocab);
    constexpr int kRuns = 8, kTokens = 32;
    DecodeState state;
    model.start(state, 1, kRuns * (512 + kTokens));
    std::vector<double> decode, decode_share, prefill, prefill_share;
    for (int run = 0; run < kRuns; run++) {
        const double seconds = seconds_of([&] { model.decode(state, prompt.data(), 512, 1); });
        const double peak = measure_matmul_flops(layers, kPeakSize);
        const double bandwidth = measure_read_bandwidth(layers, size_t(1) << 29);
        const double decoding = seconds_of([&] {
            for (int i = 0; i < kTokens; i++) model.decode(state, &prompt[i], 1, 1);
        });
        if (run == 0) continue;
        prefill.push_back(512 / seconds);
        // llama.cpp: 338 prompt tokens/s where BLAS gave 390 GFLOP/s on two threads
        prefill_share.push_back(prefill.back() / (338 * peak / 390e9));
        decode.push_back(kTokens / decoding);
        decode_share.push_back(decode.back() * bytes_per_token / bandwidth);
    }
    rows.push_back({"decode mamba-130m", median(decode), "tokens/s", "reading the weights at the measured bandwidth",
                    median(decode_share), 0.85});
    rows.push_back({"prompt mamba-130m, 512 tokens", median(prefill), "tokens/s", "llama.cpp (338 at 390 GFLOP/s)", median(prefill_share),
                    3});
}

// Time and memory per token of a training step against T, at constant tokens per step: rounds over all T, so that drift cancels.
static void bench_length(std::vector<Row>& rows, const Layers& layers) {
    constexpr int kTokens = 16384;
    const int lengths[] = {256, 1024, 4096, 16384};
    const Config config = find_preset("mamba-tiny").config;
    std::vector<double> seconds[std::size(lengths)];
    size_t bytes[std::size(lengths)];
    const std::vector<int> tokens = random_tokens(kTokens + 1, config.vocab);
    for (int round = 0; round < 5; round++)
        for (size_t i = 0; i < std::size(lengths); i++) {
            Model model(config, layers);
            model.initialize(1);
            model.allocate_training(kTokens / lengths[i], lengths[i]);
            bytes[i] = model.activations.bytes;
            model.forward_backward(tokens.data(), tokens.data() + 1, 1);  // the first touches the memory
            model.read_losses();
            seconds[i].push_back(seconds_of([&] {
                model.forward_backward(tokens.data(), tokens.data() + 1, 1);
                model.read_losses();
            }));
        }
    for (size_t i = 0; i < std::size(lengths); i++) {
        std::vector<double> ratios;
        for (size_t round = 0; round < seconds[i].size(); round++) ratios.push_back(seconds[i][round] / seconds[0][round]);
        const std::string name = "mamba-tiny, T = " + std::to_string(lengths[i]);
        rows.push_back({name + ", time", median(seconds[i]) / kTokens * 1e6, "us/token", "T = 256", median(ratios), 0});
        rows.push_back({name + ", activations", double(bytes[i]) / kTokens, "bytes/token", "T = 256", double(bytes[i]) / double(bytes[0]),
                        0});
    }
}

static int body(int argc, char** argv) {
    if (argc > 2) fail("usage: bench [cpu|cuda]");
    const Layers& layers = find_device(argc > 1 ? argv[1] : "auto");
    std::vector<Row> rows;
    rows.push_back({"matrix product 2048^3", measure_matmul_flops(layers, kPeakSize) / 1e9, "GFLOP/s", "itself", 1, 0});
    rows.push_back({"read bandwidth", measure_read_bandwidth(layers, size_t(1) << 30) / 1e9, "GB/s", "itself", 1, 0});
    fprintf(stderr, "training moe-mamba-10m ...\n");
    bench_training(rows, layers, "moe-mamba-10m", 4096, 256);
    fprintf(stderr, "inference mamba-130m ...\n");
    bench_inference(rows, layers);
    fprintf(stderr, "length of context ...\n");
    bench_length(rows, layers);

    std::FILE* file = fopen("build/bench.tsv", "w");
    if (!file) fail("cannot write build/bench.tsv: %s", strerror(errno));
    fprintf(file, "name\tvalue\tunit\tagainst\tratio\n");
    printf("\n%-36s %12s %-12s %8s  %s\n", "", "value", "unit", "ratio", "held against");
    for (const Row& row : rows) {
        fprintf(file, "%s\t%.6g\t%s\t%s\t%.4f\n", row.name.c_str(), row.value, row.unit, row.against.c_str(), row.ratio);
        char target[32] = "";
        if (row.target > 0) snprintf(target, sizeof(target), " (target %.2f)", row.target);
        printf("%-36s %12.1f %-12s %8.3f  %s%s\n", row.name.c_str(), row.value, row.unit, row.ratio, row.against.c_str(), target);
    }
    const bool good = fclose(file) == 0;
    if (!good) fail("cannot write build/bench.tsv: %s", strerror(errno));
    printf("\n%s build on device %s; the table is in build/bench.tsv\n", kPrecision, layers.device);
    return 0;
}

int main(int argc, char** argv) { return run_main(body, argc, argv); }
