// Speed as ratios: every figure is held against a limit of the machine that is measured in the same run, in turn with it, so that a
// machine that is slow today does not look like slow code. Prints a table and writes it to build/bench.tsv.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>

#include "moemamba.h"

struct Row {
    std::string name;
    double value;
    const char* unit;
    std::string against;
    double ratio;
    double target;  // the ratio is meant to be at least this, or at most this if it is negative; 0: no target
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

// Two transformers: the first is held against other trainers (README), the second is as large as the Mamba that is decoded.
static const Config kSmall{.layers = "AF*4", .vocab = 512, .d_model = 256, .heads = 4, .swiglu_ff = 0},
    kLarge{.layers = "AF*12", .vocab = 50257, .d_model = 768, .heads = 12, .swiglu_ff = 0};

// Training steps of a model, in turn with 2048^3 products: tokens/s, and the share of the products' rate that goes into useful products.
static void bench_training(std::vector<Row>& rows, const Layers& layers, const std::string& name, const Config& config, int tokens_per_step,
                           int T) {
    Model model(config, layers);
    const int B = tokens_per_step / T;
    model.initialize(1);
    model.allocate_training(B, T);
    const std::vector<int> tokens = random_tokens(tokens_per_step + 1, model.config.vocab);
    std::vector<double> shares, rates;
    for (int step = -1; step < 9; step++) {
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
    rows.push_back({"train " + name, median(rates), "tokens/s", "matrix products at the 2048^3 rate", median(shares), 0.40});
}

// A prompt and, after so much context, decoding, with random weights. against, FLOP/s -> tokens/s: what the prompt is held against, where
// matrix products have that rate; or else the rate itself, in useful products.
static void bench_inference(std::vector<Row>& rows, const Layers& layers, const std::string& name, const Config& config, int prompt, int context,
                            const char* against, double target, const std::function<double(double)>& against_rate = {}) {
    Model model(config, layers);
    model.initialize(1);
    const Config& c = model.config;
    const double weight_bytes = double(model.read_parameter_count()) * sizeof(floatX);
    // Only the last token of a prompt goes through the head.
    const double flops = model.matmul_flops_per_token(prompt, false) - 2.0 * c.padded_vocab() * c.d_model * (prompt - 1) / prompt;
    const std::vector<int> tokens = random_tokens(std::max(prompt, context), c.vocab);
    constexpr int kRuns = 8, kTokens = 32;
    std::vector<double> decode, decode_share, prefill, prefill_share;
    DecodeState state;
    for (int run = 0; run < kRuns; run++) {
        model.start(state, 1, prompt);
        const double seconds = seconds_of([&] { model.decode(state, tokens.data(), prompt, 1); });
        const double peak = measure_matmul_flops(layers, kPeakSize);
        if (run == 0) continue;
        prefill.push_back(prompt / seconds);
        prefill_share.push_back(prefill.back() / (against_rate ? against_rate(peak) : peak / flops));
    }
    model.start(state, 1, context + kRuns * kTokens);
    for (int done = 0; done < context; done += prompt) model.decode(state, &tokens[done], std::min(prompt, context - done), 1);
    for (int run = 0; run < kRuns; run++) {
        const double bandwidth = measure_read_bandwidth(layers, size_t(1) << 29);
        const double bytes = weight_bytes + model.decode_state_bytes(state.position + kTokens / 2, 8 * sizeof(floatX)).cache;
        const double seconds = seconds_of([&] {
            for (int i = 0; i < kTokens; i++) model.decode(state, &tokens[i], 1, 1);
        });
        if (run == 0) continue;
        decode.push_back(kTokens / seconds);
        decode_share.push_back(decode.back() * bytes / bandwidth);
    }
    rows.push_back({"decode " + name + " after " + std::to_string(context), median(decode), "tokens/s",
                    "reading weights and KV cache at the measured bandwidth", median(decode_share), 0.80});
    rows.push_back({"prompt " + name + ", " + std::to_string(prompt) + " tokens", median(prefill), "tokens/s", against, median(prefill_share),
                    target});
}

// Time and memory per token of a training step against T, at constant tokens per step: rounds over all T, so that drift cancels.
static void bench_length(std::vector<Row>& rows, const Layers& layers, const std::string& name, const Config& config,
                         const std::vector<int>& lengths) {
    const int tokens_per_step = lengths.back();
    std::vector<std::vector<double>> seconds(lengths.size());
    std::vector<double> flops(lengths.size()), bytes(lengths.size());
    const std::vector<int> tokens = random_tokens(tokens_per_step + 1, config.vocab);
    for (int round = 0; round < 5; round++)
        for (size_t i = 0; i < lengths.size(); i++) {
            Model model(config, layers);
            model.initialize(1);
            model.allocate_training(tokens_per_step / lengths[i], lengths[i]);
            bytes[i] = double(model.activations.bytes);
            flops[i] = model.matmul_flops_per_token(lengths[i], true);
            model.forward_backward(tokens.data(), tokens.data() + 1, 1);  // the first touches the memory
            model.read_losses();
            seconds[i].push_back(seconds_of([&] {
                model.forward_backward(tokens.data(), tokens.data() + 1, 1);
                model.read_losses();
            }));
        }
    for (size_t i = 0; i < lengths.size(); i++) {
        std::vector<double> ratios;
        for (size_t round = 0; round < seconds[i].size(); round++) ratios.push_back(seconds[i][round] / seconds[0][round]);
        char operations[64];
        snprintf(operations, sizeof operations, "T = %d; operations %.2f", lengths[0], flops[i] / flops[0]);
        const std::string row = name + ", T = " + std::to_string(lengths[i]);
        rows.push_back({row + ", time", median(seconds[i]) / tokens_per_step * 1e6, "us/token", operations, median(ratios), 0});
        rows.push_back({row + ", activations", bytes[i] / tokens_per_step, "bytes/token", "T = " + std::to_string(lengths[0]),
                        bytes[i] / bytes[0], 0});
    }
}

// What a layer of one kind adds to the time of a training step against one of another kind, in turn: models of 6 layers less those of 2.
static void bench_layer(std::vector<Row>& rows, const Layers& layers, char letter, char against, const Config& base, int B, int T, double most) {
    std::vector<std::unique_ptr<Model>> models;
    for (const char kind : {letter, against})
        for (const char* count : {"*2", "*6"}) {
            Config config = base;
            config.layers = kind + std::string(count);
            models.push_back(std::make_unique<Model>(config, layers));
            models.back()->initialize(1);
            models.back()->allocate_training(B, T);
        }
    const std::vector<int> tokens = random_tokens(int64_t(B) * T + 1, base.vocab);
    std::vector<double> times, ratios;
    for (int round = -1; round < 9; round++) {
        double seconds[4];
        for (size_t i = 0; i < models.size(); i++)
            seconds[i] = seconds_of([&] {
                models[i]->zero_gradients();
                models[i]->forward_backward(tokens.data(), tokens.data() + 1, 1);
                models[i]->read_losses();
            });
        if (round < 0) continue;
        times.push_back((seconds[1] - seconds[0]) / 4 / (B * T) * 1e6);
        ratios.push_back((seconds[1] - seconds[0]) / (seconds[3] - seconds[2]));
    }
    rows.push_back({std::string("train a layer ") + letter + ", width " + std::to_string(base.d_model), median(times), "us/token",
                    std::string("a layer ") + against, median(ratios), -most});
}

static int body(int argc, char** argv) {
    if (argc > 2) fail("usage: bench [cpu|cuda]");
    const Layers& layers = find_device(argc > 1 ? argv[1] : "auto");
    std::vector<Row> rows;
    rows.push_back({"matrix product 2048^3", measure_matmul_flops(layers, kPeakSize) / 1e9, "GFLOP/s", "itself", 1, 0});
    rows.push_back({"read bandwidth", measure_read_bandwidth(layers, size_t(1) << 30) / 1e9, "GB/s", "itself", 1, 0});
    fprintf(stderr, "training ...\n");
    bench_training(rows, layers, "moe-mamba-10m", find_preset("moe-mamba-10m").config, 4096, 256);
    bench_training(rows, layers, "transformer, 4 x 256", kSmall, 1024, 256);
    Config mixcon = find_preset("mixcon-10m").config;
    bench_layer(rows, layers, 'C', 'M', mixcon, 8, 256, 1.6);
    fprintf(stderr, "inference ...\n");
    bench_inference(rows, layers, "mixcon-10m", mixcon, 512, 512, "matrix products at the 2048^3 rate", 0);
    bench_inference(rows, layers, "mamba-130m", find_preset("mamba-130m").config, 512, 512, "llama.cpp (338 at 390 GFLOP/s)", 3,
                    [](double peak) { return 338 * peak / 390e9; });
    bench_inference(rows, layers, "transformer, 12 x 768", kLarge, 2048, 8192, "matrix products at the 2048^3 rate", 0.60);
    fprintf(stderr, "length of context ...\n");
    bench_length(rows, layers, "mamba-tiny", find_preset("mamba-tiny").config, {256, 1024, 4096, 16384});
    mixcon.layers = "C*8", mixcon.d_model = 128;
    bench_length(rows, layers, "conba, 8 x 128", mixcon, {256, 1024, 4096, 16384});
    bench_length(rows, layers, "transformer, 4 x 256", kSmall, {256, 512, 1024, 2048, 4096, 8192});

    std::FILE* file = fopen("build/bench.tsv", "w");
    if (!file) fail("cannot write build/bench.tsv: %s", strerror(errno));
    fprintf(file, "name\tvalue\tunit\tagainst\tratio\n");
    printf("\n%-48s %12s %-12s %8s  %s\n", "", "value", "unit", "ratio", "held against");
    for (const Row& row : rows) {
        fprintf(file, "%s\t%.6g\t%s\t%s\t%.4f\n", row.name.c_str(), row.value, row.unit, row.against.c_str(), row.ratio);
        char target[32] = "";
        if (row.target != 0) snprintf(target, sizeof(target), " (%s %.2f)", row.target > 0 ? "target" : "at most", std::fabs(row.target));
        printf("%-48s %12.1f %-12s %8.3f  %s%s\n", row.name.c_str(), row.value, row.unit, row.ratio, row.against.c_str(), target);
    }
    const bool good = fclose(file) == 0;
    if (!good) fail("cannot write build/bench.tsv: %s", strerror(errno));
    printf("\n%s build on device %s; the table is in build/bench.tsv\n", kPrecision, layers.device);
    return 0;
}

int main(int argc, char** argv) {
    set_up_libraries(argv);
    return run_main(body, argc, argv);
}
