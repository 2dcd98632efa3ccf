// ------------------------------------------------------------------------------------------------------------------
// Host code only from here on: errors, random numbers, Config, the Model, files. It calls kernels through a table of Layers and does
// not know which device it has.
#include "moemamba.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdarg>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>

using Json = nlohmann::ordered_json;

void fail(const char* format, ...) {
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    throw Error(text);
}

int run_main(int (*body)(int, char**), int argc, char** argv) {
    try {
        return body(argc, argv);
    } catch (const std::bad_alloc&) {
        fprintf(stderr, "error: out of memory on the host; use a smaller model, --batch or --seq-len\n");
    } catch (const std::exception& e) {
        fprintf(stderr, "error: %s\n", e.what());
    }
    return 1;
}

const Layers& find_device(const std::string& name) {
    if (name == "cpu") return cpu::layers;
#ifdef USE_CUDA
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (name == "auto") return status == cudaSuccess && count > 0 ? gpu::layers : cpu::layers;
    if (name == "cuda") {
        if (status != cudaSuccess || count == 0)
            fail("--device cuda: no GPU can be used here (%s); use --device cpu", cudaGetErrorString(status));
        return gpu::layers;
    }
    fail("--device %s: this build has auto, cpu and cuda", name.c_str());
#else
    if (name == "auto") return cpu::layers;
    if (name == "simt") return gpu::layers;
    fail("--device %s: this build has auto, cpu and simt%s", name.c_str(), name == "cuda" ? "; build with nvcc: make CUDA=1" : "");
#endif
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

// Splits "ME(ME)*4" into the steps of one repeat and the number of repeats.
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
        } else if (strchr("MFE", letter)) {
            if (group) unit.back() += letter;
            else unit.emplace_back(1, letter);
        } else {
            bad(i, std::string("'") + letter + "' is no layer; there are M (Mamba), F (feed-forward), E (experts) and (..) for a parallel group");
        }
    }
    if (group) bad(text.size(), "a '(' is not closed");
    if (unit.empty()) bad(0, "no layer; for example \"ME*4\"");
    if (i < text.size()) {
        char* end = nullptr;
        errno = 0;
        repeats = strtol(text.c_str() + i + 1, &end, 10);
        if (end == text.c_str() + i + 1 || *end || errno || repeats < 1 || repeats > 10000) bad(i, "'*' needs a count of 1 to 10000 after it, at the end");
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
    auto between = [](const char* flag, double value, double low, double high) {
        if (!(value >= low && value <= high)) fail("--%s %g: must be between %g and %g", flag, value, low, high);
    };
    constexpr double kLargest = 1 << 24;  // keeps every product of two sizes far inside 64 bits
    between("vocab", vocab, 2, kLargest);
    between("d-model", d_model, 1, kLargest);
    between("d-inner", d_inner, 0, kLargest);
    between("d-state", d_state, 1, 128);
    between("d-conv", d_conv, 1, 8);
    between("dt-rank", dt_rank, 0, kLargest);
    between("d-ff", d_ff, 0, kLargest);
    between("d-expert", d_expert, 0, kLargest);
    between("experts", experts, 1, 256);
    between("top-k", top_k, 1, experts);
    between("capacity", capacity, 0, 1e6);
    between("balance-loss", balance_loss, 0, 1e6);
    between("z-loss", z_loss, 0, 1e6);
    between("norm-eps", norm_eps, 1e-12, 1);
    between("swiglu-experts", swiglu_experts, 0, 1);
    between("renormalize", renormalize, 0, 1);
    between("tied", tied, 0, 1);
    if (!d_inner) d_inner = 2 * d_model;
    if (!dt_rank) dt_rank = (d_model + 15) / 16;
    if (!d_ff) d_ff = 2 * d_model;
    if (!d_expert) d_expert = (swiglu_experts ? 2 : 3) * d_model;
}

int Config::capacity_rows(int rows) const {
    if (capacity == 0) return 0;
    return std::max(1, int(std::min(double(rows) * top_k, std::floor(capacity * rows * top_k / experts))));
}

double Config::matmul_flops_per_token(bool training) const {
    const double C = d_model, D = d_inner, R = dt_rank, N = d_state;
    const double mamba = C * 2 * D + D * (R + 2 * N) + R * D + D * C;
    const double feed_forward = 3 * C * d_ff;
    const double moe = experts * C + top_k * (swiglu_experts ? 3 : 2) * C * d_expert;
    const double weights = count('M') * mamba + count('F') * feed_forward + count('E') * moe + C * padded_vocab();
    return 2 * weights * (training ? 3 : 1);
}

std::string Config::to_json() const {
    Json json;
    each_field(*this, [&](const char* flag, const auto& field, const char*) { json[flag] = field; });
    return json.dump();
}

Config Config::from_json(const std::string& text, const std::string& where) {
    Config config;
    try {
        const Json json = Json::parse(text);
        each_field(config, [&](const char* flag, auto& field, const char*) { json.at(flag).get_to(field); });
    } catch (const Json::exception& e) {
        fail("%s: the model's config cannot be read (%s)", where.c_str(), e.what());
    }
    config.resolve();
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
        for (Preset& preset : all) preset.config.resolve();
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

void Arena::allocate(const Layers& on) {
    device = &on;
    // Under simt.h every tensor is an allocation of its own, so that one byte past it is reported with its name.
    if (std::string(on.device) == "simt")
        for (Entry& entry : entries) entry.memory = on.allocate(std::max<size_t>(entry.bytes, 1), entry.name.c_str());
    else {
        memory = static_cast<char*>(on.allocate(std::max<size_t>(bytes, 1), name.c_str()));
        for (Entry& entry : entries) entry.memory = memory + entry.offset;
    }
    bind();
}

void Arena::bind() const {
    for (const Entry& entry : entries) *entry.pointer = entry.memory;
}

void Arena::release() {
    if (memory) device->release(memory);
    else
        for (Entry& entry : entries)
            if (entry.memory) device->release(entry.memory);
    memory = nullptr;
    entries.clear();
    top = bytes = 0;
}

// ------------------------------------------------------------------------------------------------------------------
// Model: parameters

Model::Model(const Config& given, const Layers& layers) : config(given), layers(layers) {
    config.resolve();
    const int64_t C = config.d_model, D = config.d_inner, N = config.d_state, R = config.dt_rank, W = config.d_conv, E = config.experts,
                  Vp = config.padded_vocab(), kGated = 2;
    const std::vector<std::string> layout = config.steps();
    int additions = 0;
    for (const std::string& step : layout) additions += int(step.size());
    const double moe_scale = 0.1;  // Switch's small init: deviation sqrt(0.1 / fan_in)

    auto tensor = [&](Tensor& t, const std::string& name, int64_t count, Init init, double scale, bool decay) {
        t.name = name;
        t.count = count;
        t.init = init;
        t.scale = scale;
        t.decay = decay;
        tensors.push_back(&t);
    };
    // A tensor that checkpoints know under one name.
    auto single = [&](Tensor& t, const std::string& name, std::vector<int64_t> shape, Init init, double scale, bool decay) {
        int64_t count = 1;
        for (int64_t n : shape) count *= n;
        tensor(t, name, count, init, scale, decay);
        parameters.push_back({name, shape, &t, 0, count});
    };
    // The next (rows, columns) of a tensor that checkpoints know in parts.
    auto part = [&](Tensor& t, int64_t& offset, const std::string& name, int64_t rows, int64_t columns) {
        parameters.push_back({name, {rows, columns}, &t, offset, rows * columns});
        offset += rows * columns;
    };
    auto fan_in = [&](int64_t n) { return std::sqrt(moe_scale / double(n)); };

    single(embedding, "backbone.embeddings.weight", {Vp, C}, Init::normal, 0.02, true);
    for (size_t s = 0; s < layout.size(); s++) {
        Step& step = *steps.emplace_back(std::make_unique<Step>());
        const std::string prefix = "backbone.layers." + std::to_string(s) + ".";
        single(step.norm, prefix + "norm.weight", {C}, Init::one, 0, false);
        for (size_t l = 0; l < layout[s].size(); l++) {
            Layer& layer = *step.layers.emplace_back(std::make_unique<Layer>());
            layer.kind = layout[s][l];
            // In a parallel group with two layers of one kind, the second has a number.
            const auto twins = std::count(layout[s].begin(), layout[s].begin() + l, layer.kind);
            auto named = [&](const char* what) { return prefix + what + (twins ? "_" + std::to_string(twins) : "") + "."; };
            if (layer.kind == 'M') {
                MambaLayer& m = layer.mamba;
                const std::string p = named("mixer");
                const double conv = 1 / std::sqrt(double(W)), in = 1 / std::sqrt(double(C)), inner = 1 / std::sqrt(double(D));
                single(m.A_log, p + "A_log", {D, N}, Init::log_state, 0, false);
                single(m.skip, p + "D", {D}, Init::one, 0, false);
                single(m.conv_weight, p + "conv1d.weight", {D, 1, W}, Init::uniform, conv, true);
                single(m.conv_bias, p + "conv1d.bias", {D}, Init::uniform, conv, false);
                single(m.in_proj, p + "in_proj.weight", {2 * D, C}, Init::uniform, in, true);
                single(m.x_proj, p + "x_proj.weight", {R + 2 * N, D}, Init::uniform, inner, true);
                single(m.dt_proj, p + "dt_proj.weight", {D, R}, Init::uniform, 1 / std::sqrt(double(R)), true);
                single(m.dt_bias, p + "dt_proj.bias", {D}, Init::dt_bias, 0, false);
                single(m.out_proj, p + "out_proj.weight", {C, D}, Init::uniform, inner / std::sqrt(double(additions)), true);
            } else if (layer.kind == 'F') {
                FeedForwardLayer& f = layer.feed_forward;
                const int64_t F = config.d_ff;
                const std::string p = named("feed_forward");
                tensor(f.gate_up, p + "gate_up", kGated * F * C, Init::normal, fan_in(C), true);
                int64_t offset = 0;
                part(f.gate_up, offset, p + "gate_proj.weight", F, C);
                part(f.gate_up, offset, p + "up_proj.weight", F, C);
                single(f.down, p + "down_proj.weight", {C, F}, Init::normal, fan_in(F), true);
            } else {
                ExpertsLayer& e = layer.experts;
                const int64_t F = config.d_expert, wide = config.swiglu_experts ? kGated * F : F;
                const std::string p = named("moe");
                single(e.router, p + "router.weight", {E, C}, Init::normal, fan_in(C), true);
                tensor(e.in, p + "experts.in", E * wide * C, Init::normal, fan_in(C), true);
                tensor(e.out, p + "experts.out", E * C * F, Init::normal, fan_in(F), true);
                int64_t in_offset = 0, out_offset = 0;
                for (int64_t i = 0; i < E; i++) {
                    const std::string q = p + "experts." + std::to_string(i) + ".";
                    if (config.swiglu_experts) part(e.in, in_offset, q + "gate_proj.weight", F, C);
                    part(e.in, in_offset, q + "up_proj.weight", F, C);
                    part(e.out, out_offset, q + "down_proj.weight", C, F);
                }
            }
        }
    }
    Step& last = *steps.emplace_back(std::make_unique<Step>());
    single(last.norm, "backbone.norm_f.weight", {C}, Init::one, 0, false);
    head = &embedding;
    if (!config.tied) {
        head = &head_table;
        single(head_table, "lm_head.weight", {Vp, C}, Init::normal, fan_in(C), true);
    }
}

Model::~Model() = default;

int64_t Model::parameter_count() const {
    int64_t n = 0;
    for (const Tensor* t : tensors) n += t->count;
    return n;
}

int64_t Model::active_parameter_count() const {
    int64_t idle = 0;
    for (const auto& step : steps)
        for (const auto& layer : step->layers)
            if (layer->kind == 'E') idle += (layer->experts.in.count + layer->experts.out.count) / config.experts * (config.experts - config.top_k);
    return parameter_count() - idle;
}

void Model::plan_weights() {
    for (Tensor* t : tensors) {
        masters.add(&t->master, t->name, t->count);
        if (kMixedPrecision) weights.add(&t->weight, t->name, t->count);
    }
}

void Model::allocate_weights() {
    if (masters.device) return;
    if (masters.entries.empty()) plan_weights();
    masters.allocate(layers);
    if (kMixedPrecision) weights.allocate(layers);
    else
        for (Tensor* t : tensors) t->weight = reinterpret_cast<floatX*>(t->master);  // one type, one copy
}

// Copies `count` values to the master and the rounded weight of a tensor.
static void set_tensor(const Model& model, const Tensor& t, int64_t offset, const std::vector<real>& values) {
    model.layers.upload(t.master + offset, values.data(), values.size() * sizeof(real), model.stream);
    if (kMixedPrecision) {
        const std::vector<floatX> rounded(values.begin(), values.end());
        model.layers.upload(t.weight + offset, rounded.data(), rounded.size() * sizeof(floatX), model.stream);
        model.layers.synchronize(model.stream);
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
    layers.synchronize(stream);
}

// ------------------------------------------------------------------------------------------------------------------
// Model: activations

// The head's logits would be the largest tensor of all (rows, V): they are made, and turned into gradients, this many rows at a time.
static constexpr int kHeadRows = 1024;

// Training keeps what the backward pass needs. Without it every step works in the same memory.
void Model::plan_activations(Arena& arena, int B, int T, bool training) {
    const int64_t C = config.d_model, D = config.d_inner, N = config.d_state, R = config.dt_rank, E = config.experts, K = config.top_k;
    const int64_t rows = int64_t(B) * T;
    const int64_t slots = expert_slots(int(rows), int(E), int(K), training ? config.capacity_rows(int(rows)) : 0);
    auto add = [&](auto** pointer, const std::string& name, int64_t count) { arena.add(pointer, name, count); };

    add(&buffers.tokens, "tokens", rows);
    add(&buffers.targets, "targets", rows);
    add(&buffers.losses, "losses", kLossCount);
    add(&buffers.row_losses, "row losses", rows);
    add(&buffers.loads, "expert loads", std::max<int64_t>(1, config.count('E') * E));
    add(&buffers.branch, "branch", rows * C);
    add(&buffers.logits, "logits", std::min<int64_t>(rows, kHeadRows) * config.padded_vocab());
    add(&buffers.probs, "probabilities", int64_t(B) * config.vocab);
    arena.add(&buffers.scratch, "scratch", int64_t(std::max(layers.scratch_bytes(config, B, T), layers.scratch_bytes(config, B, 1))));

    const size_t base = arena.top;
    int experts_layers = 0;
    for (size_t s = 0; s < steps.size(); s++) {
        Step& step = *steps[s];
        const std::string prefix = "step " + std::to_string(s) + " ";
        if (!training) arena.rewind(base);
        add(&step.sum, prefix + "residual", rows * C);
        add(&step.rstd, prefix + "rstd", rows);
        add(&step.normed, prefix + "normed", rows * C);
        const size_t after_norm = arena.top;
        for (const auto& layer : step.layers) {
            if (!training) arena.rewind(after_norm);
            if (layer->kind == 'M') {
                MambaLayer& m = layer->mamba;
                add(&m.xz, prefix + "xz", rows * 2 * D);
                add(&m.u, prefix + "u", rows * D);
                add(&m.x_dbl, prefix + "dt, B, C", rows * (R + 2 * N));
                add(&m.dt, prefix + "dt", rows * D);
                add(&m.y, prefix + "y", rows * D);
                add(&m.chunk_states, prefix + "chunk states", training ? B * scan_chunks(T) * D * N : 0);
            } else if (layer->kind == 'F') {
                FeedForwardLayer& f = layer->feed_forward;
                add(&f.gate_up_out, prefix + "gate, up", rows * 2 * config.d_ff);
                add(&f.hidden, prefix + "hidden", rows * config.d_ff);
            } else {
                ExpertsLayer& e = layer->experts;
                const int64_t F = config.d_expert;
                e.index = experts_layers++;
                add(&e.probs, prefix + "router probabilities", rows * E);
                add(&e.lse, prefix + "router logsumexp", rows);
                add(&e.gates, prefix + "gates", rows * K);
                add(&e.experts, prefix + "chosen experts", rows * K);
                add(&e.slot, prefix + "slots of choices", rows * K);
                add(&e.choice, prefix + "choices of slots", slots);
                add(&e.offset, prefix + "expert offsets", E + 1);
                add(&e.dispatched, prefix + "dispatched", slots * C);
                add(&e.gate_up, prefix + "expert gate, up", config.swiglu_experts ? slots * 2 * F : 0);
                add(&e.hidden, prefix + "expert hidden", slots * F);
                add(&e.y, prefix + "expert outputs", slots * C);
            }
        }
    }
    if (!training) return;
    add(&buffers.d_sum, "d residual", rows * C);
    add(&buffers.d_branch, "d branch", rows * C);
    add(&buffers.d_normed, "d normed", rows * C);
    const size_t shared = arena.top;  // gradients inside a layer: dead when it is done
    add(&buffers.d_y, "d y", rows * D);
    add(&buffers.d_xz, "d xz", rows * 2 * D);
    add(&buffers.d_u, "d u", rows * D);
    add(&buffers.d_x_dbl, "d dt, B, C", rows * (R + 2 * N));
    add(&buffers.d_dt, "d dt", rows * D);
    arena.rewind(shared);
    add(&buffers.d_gate_up, "d gate, up", rows * 2 * config.d_ff);
    add(&buffers.d_hidden, "d hidden", rows * config.d_ff);
    arena.rewind(shared);
    add(&buffers.d_gates, "d gates", rows * K);
    add(&buffers.d_slots, "d expert inputs, outputs", slots * C);
    add(&buffers.d_expert_gate_up, "d expert gate, up", config.swiglu_experts ? slots * 2 * config.d_expert : 0);
    add(&buffers.d_expert_hidden, "d expert hidden", slots * config.d_expert);
}

void Model::plan_training(int B, int T) {
    if (B < 1 || T < 1 || int64_t(B) * T > (1 << 24)) fail("--batch %d --seq-len %d: both must be at least 1, and their product at most 2^24", B, T);
    batch = B;
    time = T;
    if (masters.entries.empty()) plan_weights();
    for (Tensor* t : tensors) {
        gradients.add(&t->grad, "gradient of " + t->name, t->count);
        moments.add(&t->m, "first moment of " + t->name, t->count);
        moments.add(&t->v, "second moment of " + t->name, t->count);
    }
    plan_activations(activations, B, T, true);
}

void Model::allocate_training(int B, int T) {
    plan_training(B, T);
    allocate_weights();
    gradients.allocate(layers);
    moments.allocate(layers);
    activations.allocate(layers);
    for (Tensor* t : tensors) {
        layers.zero(t->m, t->count * sizeof(real), stream);
        layers.zero(t->v, t->count * sizeof(real), stream);
    }
    zero_gradients();
}

// ------------------------------------------------------------------------------------------------------------------
// Model: forward. Each layer reads `normed` and writes its output to `branch`, or adds it where a parallel group has begun one.

void Model::mamba_forward(MambaLayer& m, const floatX* normed, bool accumulate, int B, int T, DecodeState::Mixer* state, int current) {
    const int rows = B * T, C = config.d_model, D = config.d_inner, N = config.d_state, R = config.dt_rank, W = config.d_conv, ld = R + 2 * N;
    const real *conv_in = nullptr, *scan_in = nullptr;
    real *conv_out = nullptr, *scan_out = nullptr, *chunk_states = m.chunk_states;
    if (state) {
        conv_in = state->conv[current], conv_out = state->conv[1 - current];
        scan_in = state->scan[current], scan_out = state->scan[1 - current];
    }
    if (!training_pass) chunk_states = nullptr;
    layers.linear_forward(m.xz, 2 * D, normed, C, m.in_proj.weight, rows, C, 2 * D, false, stream);
    layers.conv_forward(m.u, conv_out, m.xz, 2 * D, m.conv_weight.master, m.conv_bias.master, conv_in, B, T, D, W, stream);
    layers.linear_forward(m.x_dbl, ld, m.u, D, m.x_proj.weight, rows, D, ld, false, stream);
    layers.linear_forward(m.dt, D, m.x_dbl, ld, m.dt_proj.weight, rows, R, D, false, stream);
    layers.scan_forward(m.y, scan_out, chunk_states, m.u, m.dt, m.x_dbl + R, m.x_dbl + R + N, ld, m.xz + D, 2 * D, m.A_log.master,
                        m.skip.master, m.dt_bias.master, scan_in, buffers.scratch, B, T, D, N, stream);
    layers.linear_forward(buffers.branch, C, m.y, D, m.out_proj.weight, rows, D, C, accumulate, stream);
}

void Model::mamba_backward(MambaLayer& m, const floatX* normed, bool accumulate) {
    const int B = batch, T = time, rows = B * T, C = config.d_model, D = config.d_inner, N = config.d_state, R = config.dt_rank,
              W = config.d_conv, ld = R + 2 * N;
    Buffers& b = buffers;
    layers.linear_backward(b.d_y, D, m.out_proj.grad, b.d_branch, C, m.y, D, m.out_proj.weight, rows, D, C, false, stream);
    layers.scan_backward(b.d_u, b.d_dt, b.d_x_dbl + R, b.d_x_dbl + R + N, b.d_xz + D, m.A_log.grad, m.skip.grad, m.dt_bias.grad, nullptr,
                         b.d_y, nullptr, m.u, m.dt, m.x_dbl + R, m.x_dbl + R + N, ld, m.xz + D, 2 * D, m.A_log.master, m.skip.master,
                         m.dt_bias.master, m.chunk_states, b.scratch, B, T, D, N, stream);
    layers.linear_backward(b.d_x_dbl, ld, m.dt_proj.grad, b.d_dt, D, m.x_dbl, ld, m.dt_proj.weight, rows, R, D, false, stream);
    layers.linear_backward(b.d_u, D, m.x_proj.grad, b.d_x_dbl, ld, m.u, D, m.x_proj.weight, rows, D, ld, true, stream);
    layers.conv_backward(b.d_xz, 2 * D, m.conv_weight.grad, m.conv_bias.grad, nullptr, b.d_u, nullptr, m.xz, 2 * D, m.conv_weight.master,
                         m.conv_bias.master, nullptr, b.scratch, B, T, D, W, stream);
    layers.linear_backward(b.d_normed, C, m.in_proj.grad, b.d_xz, 2 * D, normed, C, m.in_proj.weight, rows, C, 2 * D, accumulate, stream);
}

void Model::feed_forward_forward(FeedForwardLayer& f, const floatX* normed, bool accumulate, int rows) {
    const int C = config.d_model, F = config.d_ff;
    layers.linear_forward(f.gate_up_out, 2 * F, normed, C, f.gate_up.weight, rows, C, 2 * F, false, stream);
    layers.swiglu_forward(f.hidden, f.gate_up_out, rows, F, stream);
    layers.linear_forward(buffers.branch, C, f.hidden, F, f.down.weight, rows, F, C, accumulate, stream);
}

void Model::feed_forward_backward(FeedForwardLayer& f, const floatX* normed, bool accumulate) {
    const int rows = batch * time, C = config.d_model, F = config.d_ff;
    Buffers& b = buffers;
    layers.linear_backward(b.d_hidden, F, f.down.grad, b.d_branch, C, f.hidden, F, f.down.weight, rows, F, C, false, stream);
    layers.swiglu_backward(b.d_gate_up, b.d_hidden, f.gate_up_out, rows, F, stream);
    layers.linear_backward(b.d_normed, C, f.gate_up.grad, b.d_gate_up, 2 * F, normed, C, f.gate_up.weight, rows, C, 2 * F, accumulate, stream);
}

void Model::experts_forward(ExpertsLayer& e, const floatX* normed, bool accumulate, int rows, int capacity) {
    const int C = config.d_model, F = config.d_expert, E = config.experts, K = config.top_k;
    const int slots = expert_slots(rows, E, K, capacity);
    int* load = buffers.loads + int64_t(e.index) * E;
    layers.router_forward(e.probs, e.lse, e.experts, e.gates, normed, e.router.master, buffers.scratch, rows, C, E, K, config.renormalize, stream);
    layers.dispatch_plan(e.slot, e.choice, load, e.offset, e.experts, buffers.scratch, rows, E, K, capacity, stream);
    layers.router_losses(buffers.losses + kBalance, e.probs, e.lse, load, buffers.scratch, rows, E, stream);
    if (capacity == 0) {  // only then does the host have to know how many rows each expert has
        e.host_offset.resize(E + 1);
        layers.download(e.host_offset.data(), e.offset, (E + 1) * sizeof(int), stream);
    }
    const int* offset = capacity ? nullptr : e.host_offset.data();
    layers.dispatch_forward(e.dispatched, normed, e.choice, slots, C, K, stream);
    if (config.swiglu_experts) {
        layers.experts_forward(e.gate_up, e.dispatched, e.in.weight, offset, slots, C, 2 * F, E, capacity, stream);
        layers.swiglu_forward(e.hidden, e.gate_up, slots, F, stream);
    } else {
        layers.experts_forward(e.hidden, e.dispatched, e.in.weight, offset, slots, C, F, E, capacity, stream);
        layers.relu_forward(e.hidden, e.hidden, int64_t(slots) * F, stream);
    }
    layers.experts_forward(e.y, e.hidden, e.out.weight, offset, slots, F, C, E, capacity, stream);
    layers.combine_forward(buffers.branch, e.y, e.gates, e.slot, rows, C, K, accumulate, stream);
}

void Model::experts_backward(ExpertsLayer& e, const floatX* normed, bool accumulate, int accumulation) {
    const int rows = batch * time, C = config.d_model, F = config.d_expert, E = config.experts, K = config.top_k;
    const int capacity = config.capacity_rows(rows), slots = expert_slots(rows, E, K, capacity);
    const real share = real(1) / real(accumulation * config.count('E'));
    const int *load = buffers.loads + int64_t(e.index) * E, *offset = capacity ? nullptr : e.host_offset.data();
    Buffers& b = buffers;
    layers.combine_backward(b.d_slots, b.d_gates, b.d_branch, e.y, e.gates, e.slot, e.choice, rows, slots, C, K, stream);
    layers.experts_backward(b.d_expert_hidden, e.out.grad, b.d_slots, e.hidden, e.out.weight, offset, slots, F, C, E, capacity, stream);
    const floatX* d_in = b.d_expert_hidden;
    if (config.swiglu_experts) {
        layers.swiglu_backward(b.d_expert_gate_up, b.d_expert_hidden, e.gate_up, slots, F, stream);
        d_in = b.d_expert_gate_up;
    } else {
        layers.relu_backward(b.d_expert_hidden, b.d_expert_hidden, e.hidden, int64_t(slots) * F, stream);
    }
    const int wide = config.swiglu_experts ? 2 * F : F;
    layers.experts_backward(b.d_slots, e.in.grad, d_in, e.dispatched, e.in.weight, offset, slots, C, wide, E, capacity, stream);
    layers.dispatch_backward(b.d_normed, b.d_slots, e.slot, rows, C, K, accumulate, stream);
    layers.router_backward(b.d_normed, e.router.grad, b.d_gates, e.probs, e.lse, e.experts, e.gates, load, normed, e.router.master, b.scratch,
                           rows, C, E, K, config.renormalize, real(config.balance_loss) * share, real(config.z_loss) * share, stream);
}

// From tokens (on the host) to the normed residual stream that the head reads.
void Model::forward(const int* tokens, int B, int T, DecodeState* state) {
    const int rows = B * T, C = config.d_model;
    const int capacity = training_pass ? config.capacity_rows(rows) : 0;
    layers.upload(buffers.tokens, tokens, rows * sizeof(int), stream);
    layers.embedding_forward(steps[0]->sum, buffers.tokens, embedding.weight, rows, C, stream);
    const real* residual = steps[0]->sum;
    const floatX* branch = nullptr;
    size_t mixer = 0;
    for (const auto& step : steps) {
        layers.rmsnorm_forward(step->normed, step->sum, step->rstd, residual, branch, step->norm.master, rows, C, real(config.norm_eps), stream);
        for (const auto& layer : step->layers) {
            const bool accumulate = layer != step->layers.front();
            switch (layer->kind) {
                case 'M':
                    mamba_forward(layer->mamba, step->normed, accumulate, B, T, state ? &state->mixers[mixer] : nullptr, state ? state->current : 0);
                    mixer++;
                    break;
                case 'F': feed_forward_forward(layer->feed_forward, step->normed, accumulate, rows); break;
                case 'E': experts_forward(layer->experts, step->normed, accumulate, rows, capacity); break;
            }
        }
        residual = step->sum;
        branch = buffers.branch;
    }
    if (state) state->current = 1 - state->current;
}

// Runs the head over `rows` rows of normed, kHeadRows at a time, and calls each(first row, rows) with their logits in buffers.logits.
template <class F>
void Model::head_blocks(const floatX* normed, int ld_normed, int rows, F&& each) {
    const int C = config.d_model, Vp = config.padded_vocab();
    for (int first = 0; first < rows; first += kHeadRows) {
        const int block = std::min(kHeadRows, rows - first);
        layers.linear_forward(buffers.logits, Vp, normed + int64_t(first) * ld_normed, ld_normed, head->weight, block, C, Vp, false, stream);
        each(first, block);
    }
}

// Adds the sum of the rows' cross-entropies to losses[kCrossEntropy]. d_loss != 0: logits become gradients, `each` uses them.
template <class F>
void Model::cross_entropy(const int* targets, int rows, real d_loss, F&& each) {
    const floatX* normed = steps.back()->normed;
    layers.upload(buffers.targets, targets, rows * sizeof(int), stream);
    head_blocks(normed, config.d_model, rows, [&](int first, int block) {
        layers.classifier(buffers.row_losses + first, buffers.logits, buffers.targets + first, block, config.vocab, config.padded_vocab(), d_loss, stream);
        each(first, block);
    });
    layers.sum(buffers.losses + kCrossEntropy, buffers.row_losses, buffers.scratch, rows, stream);
}

void Model::forward_backward(const int* tokens, const int* targets, int accumulation) {
    const int rows = batch * time, C = config.d_model, Vp = config.padded_vocab();
    Buffers& b = buffers;
    activations.bind();
    training_pass = true;
    forward(tokens, batch, time, nullptr);
    const int64_t counted = rows - std::count(targets, targets + rows, -1);
    parts++;
    targets_seen += counted;
    const floatX* normed = steps.back()->normed;
    cross_entropy(targets, rows, real(1) / real(std::max<int64_t>(1, counted) * accumulation), [&](int first, int block) {
        const int64_t at = int64_t(first) * C;
        layers.linear_backward(b.d_normed + at, C, head->grad, b.logits, Vp, normed + at, C, head->weight, block, C, Vp, false, stream);
    });
    layers.zero(b.d_sum, size_t(rows) * C * sizeof(real), stream);
    for (size_t s = steps.size(); s-- > 0;) {
        Step& step = *steps[s];
        bool accumulate = false;
        for (const auto& layer : step.layers) {
            switch (layer->kind) {
                case 'M': mamba_backward(layer->mamba, step.normed, accumulate); break;
                case 'F': feed_forward_backward(layer->feed_forward, step.normed, accumulate); break;
                case 'E': experts_backward(layer->experts, step.normed, accumulate, accumulation); break;
            }
            accumulate = true;
        }
        layers.rmsnorm_backward(b.d_sum, b.d_branch, step.norm.grad, b.d_normed, step.sum, step.rstd, step.norm.master, b.scratch, rows, C, stream);
    }
    layers.embedding_backward(embedding.grad, b.d_sum, b.tokens, b.scratch, rows, Vp, C, stream);
}

void Model::zero_gradients() {
    activations.bind();
    for (Tensor* t : tensors) layers.zero(t->grad, t->count * sizeof(real), stream);
    layers.zero(buffers.losses, kLossCount * sizeof(real), stream);
    parts = 0;
    targets_seen = 0;
}

Losses Model::read_losses() {
    const int E = config.experts, moe_layers = config.count('E'), rows = batch * time, capacity = config.capacity_rows(rows);
    for (Tensor* t : tensors) layers.sum_of_squares(buffers.losses + kGradSquares, t->grad, buffers.scratch, t->count, stream);
    real sums[kLossCount];
    std::vector<int> loads(int64_t(moe_layers) * E);
    layers.download(sums, buffers.losses, sizeof(sums), stream);
    if (moe_layers) layers.download(loads.data(), buffers.loads, loads.size() * sizeof(int), stream);
    layers.zero(buffers.losses + kGradSquares, sizeof(real), stream);  // so that reading twice gives the same
    Losses losses;
    losses.cross_entropy = sums[kCrossEntropy] / double(std::max<int64_t>(1, targets_seen));
    losses.grad_norm = std::sqrt(double(sums[kGradSquares]));
    if (!moe_layers) return losses;
    losses.balance = sums[kBalance] / double(std::max(1, parts) * moe_layers);
    losses.z = sums[kZ] / double(std::max(1, parts) * moe_layers);
    int64_t dropped = 0;
    int fullest = 0;
    for (int load : loads) {
        fullest = std::max(fullest, load);
        if (capacity) dropped += std::max(0, load - capacity);
    }
    const double choices = double(rows) * config.top_k;
    losses.expert_load = fullest / (choices / E);
    losses.dropped = double(dropped) / (choices * moe_layers);
    return losses;
}

std::string Model::first_bad_tensor() {
    for (const char* what : {"weight", "gradient"})
        for (Tensor* t : tensors) {
            layers.zero(buffers.losses + kGradSquares, sizeof(real), stream);
            layers.sum_of_squares(buffers.losses + kGradSquares, what[0] == 'w' ? t->master : t->grad, buffers.scratch, t->count, stream);
            real squares;
            layers.download(&squares, buffers.losses + kGradSquares, sizeof(real), stream);
            if (!std::isfinite(squares)) return std::string(what) + " of " + t->name;
        }
    return "";
}

void Model::update(const AdamW& o, const Losses& losses, int step) {
    const double clip = o.grad_clip > 0 && losses.grad_norm > o.grad_clip ? o.grad_clip / losses.grad_norm : 1;
    for (Tensor* t : tensors)
        layers.adamw(t->master, kMixedPrecision ? t->weight : nullptr, t->m, t->v, t->grad, t->count, real(o.lr), real(o.beta1), real(o.beta2),
                     real(o.eps), t->decay ? real(o.weight_decay) : 0, real(clip), step, stream);
}

// ------------------------------------------------------------------------------------------------------------------
// Model: evaluation and decoding. They have an arena of their own, so that they can run between two training steps.

void Model::begin_inference(int B, int T) {
    if (B != inference_batch || T > inference_time) {
        inference.release();
        inference_batch = B;
        inference_time = std::max(1, T);
        plan_activations(inference, B, inference_time, false);
        inference.allocate(layers);
    }
    inference.bind();
    training_pass = false;
    layers.zero(buffers.losses, kLossCount * sizeof(real), stream);
}

double Model::evaluate(const int* tokens, const int* targets, int B, int T) {
    const int rows = B * T;
    begin_inference(B, T);
    forward(tokens, B, T, nullptr);
    cross_entropy(targets, rows, 0, [](int, int) {});
    real sum;
    layers.download(&sum, buffers.losses + kCrossEntropy, sizeof(sum), stream);
    return sum / double(std::max<int64_t>(1, rows - std::count(targets, targets + rows, -1)));
}

void Model::start(DecodeState& state, int B) {
    const int64_t D = config.d_inner, N = config.d_state, W = config.d_conv;
    state.arena.release();
    state.B = B;
    state.current = 0;
    state.mixers.assign(config.count('M'), {});
    for (size_t i = 0; i < state.mixers.size(); i++)
        for (int side : {0, 1}) {
            state.arena.add(&state.mixers[i].conv[side], "conv state " + std::to_string(i), B * std::max<int64_t>(1, W - 1) * D);
            state.arena.add(&state.mixers[i].scan[side], "scan state " + std::to_string(i), B * D * N);
        }
    state.arena.allocate(layers);
    for (const Arena::Entry& entry : state.arena.entries) layers.zero(*entry.pointer, entry.bytes, stream);
}

size_t Model::decode_state_bytes() const {
    return size_t(config.count('M')) * 2 * config.d_inner * (config.d_conv - 1 + config.d_state) * sizeof(real);
}

const real* Model::decode(DecodeState& state, const int* tokens, int T, real temperature) {
    const int B = state.B, C = config.d_model, V = config.vocab, Vp = config.padded_vocab();
    begin_inference(B, T);
    forward(tokens, B, T, &state);
    // Only the last position of each sequence reaches the head: rows that lie T * C apart.
    const floatX* last = steps.back()->normed + int64_t(T - 1) * C;
    probabilities.resize(int64_t(B) * V);
    head_blocks(last, T * C, B, [&](int first, int block) {
        layers.softmax_forward(buffers.probs + int64_t(first) * V, buffers.logits, block, V, Vp, temperature > 0 ? temperature : 1, stream);
    });
    layers.download(probabilities.data(), buffers.probs, probabilities.size() * sizeof(real), stream);
    return probabilities.data();
}

std::vector<real> Model::logits(const int* tokens, int B, int T) {
    const int V = config.vocab, Vp = config.padded_vocab();
    begin_inference(B, T);
    forward(tokens, B, T, nullptr);
    std::vector<real> out;
    out.reserve(int64_t(B) * T * V);
    head_blocks(steps.back()->normed, config.d_model, B * T, [&](int, int block) {
        std::vector<floatX> padded(int64_t(block) * Vp);
        layers.download(padded.data(), buffers.logits, padded.size() * sizeof(floatX), stream);
        for (int r = 0; r < block; r++)
            for (int v = 0; v < V; v++) out.push_back(real(padded[int64_t(r) * Vp + v]));
    });
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

// ------------------------------------------------------------------------------------------------------------------
// Files

std::string read_file(const std::string& path, const char* what) {
    std::FILE* file = fopen(path.c_str(), "rb");
    if (!file) fail("%s %s: %s", what, path.c_str(), strerror(errno));
    std::string text;
    char block[1 << 16];
    size_t n;
    while ((n = fread(block, 1, sizeof(block), file)) > 0) text.append(block, n);
    const bool broken = ferror(file);
    fclose(file);
    if (broken) fail("%s %s: cannot be read (%s)", what, path.c_str(), strerror(errno));
    return text;
}

void write_atomically(const std::string& path, const std::function<void(std::FILE*)>& write) {
    const std::string temporary = path + ".tmp";
    std::FILE* file = fopen(temporary.c_str(), "wb");
    if (!file) fail("cannot write %s: %s", temporary.c_str(), strerror(errno));
    errno = 0;
    write(file);
    bool good = !ferror(file) && fflush(file) == 0 && fsync(fileno(file)) == 0;
    int reason = errno;
    if (fclose(file) != 0 && good) good = false, reason = errno;
    if (good && rename(temporary.c_str(), path.c_str()) != 0) good = false, reason = errno;
    if (!good) {
        unlink(temporary.c_str());
        fail("cannot write %s: %s; what was there before is unharmed", path.c_str(), strerror(reason));
    }
    // The new name is safe only when the directory is.
    const size_t slash = path.rfind('/');
    const int directory = open(slash == std::string::npos ? "." : path.substr(0, slash + 1).c_str(), O_RDONLY);
    if (directory >= 0) {
        fsync(directory);
        close(directory);
    }
}

void Tokenizer::encode(std::vector<int>& tokens, const char* text, size_t size) const {
    for (size_t i = 0; i < size; i++) tokens.push_back(static_cast<unsigned char>(text[i]));
}

std::string Tokenizer::decode(int token) const { return token == end_of_text ? "" : std::string(1, char(token)); }

std::string Tokenizer::to_json() const { return Json{{"kind", kind}, {"vocab", vocab}, {"end_of_text", end_of_text}}.dump(); }

Tokenizer Tokenizer::from_json(const std::string& text, const std::string& where) {
    Tokenizer t;
    try {
        const Json json = Json::parse(text);
        json.at("kind").get_to(t.kind);
        json.at("vocab").get_to(t.vocab);
        json.at("end_of_text").get_to(t.end_of_text);
    } catch (const Json::exception& e) {
        fail("%s: the tokenizer cannot be read (%s)", where.c_str(), e.what());
    }
    if (t.kind != "bytes") fail("%s: tokenizer \"%s\" is unknown; there is \"bytes\"", where.c_str(), t.kind.c_str());
    if (t.vocab != 257 || t.end_of_text != 256) fail("%s: the bytes tokenizer has vocab 257 and end_of_text 256", where.c_str());
    return t;
}

static int64_t dtype_bytes(const std::string& dtype) {
    if (dtype == "F64" || dtype == "I64") return 8;
    if (dtype == "F32" || dtype == "I32") return 4;
    if (dtype == "BF16") return 2;
    return 0;
}

Safetensors::Safetensors(const std::string& path) : path(path) {
    const char* p = path.c_str();
    file = fopen(p, "rb");
    if (!file) fail("%s: %s", p, strerror(errno));
    try {
        uint64_t header_bytes = 0;
        if (fseek(file, 0, SEEK_END) != 0) fail("%s: not a regular file", p);
        const int64_t size = ftell(file);
        rewind(file);
        if (size < 8 || fread(&header_bytes, 8, 1, file) != 1) fail("%s: too short for a safetensors file (%lld bytes)", p, (long long)size);
        if (header_bytes > uint64_t(size - 8)) fail("%s: not a safetensors file, or cut off: it claims a header of %llu bytes and has %lld in all", p, (unsigned long long)header_bytes, (long long)size);
        std::string header(header_bytes, 0);
        if (fread(header.data(), 1, header.size(), file) != header.size()) fail("%s: cannot be read (%s)", p, strerror(errno));
        const Json json = Json::parse(header);
        const int64_t data = 8 + int64_t(header_bytes);
        for (const auto& [name, value] : json.items()) {
            if (name == "__metadata__") {
                for (const auto& [key, text] : value.items()) metadata.emplace_back(key, text.get<std::string>());
                continue;
            }
            Entry e;
            value.at("dtype").get_to(e.dtype);
            value.at("shape").get_to(e.shape);
            const auto ends = value.at("data_offsets").get<std::vector<int64_t>>();
            e.count = 1;
            for (int64_t n : e.shape)
                if (n < 0 || __builtin_mul_overflow(e.count, n, &e.count)) fail("%s: tensor %s has an impossible shape", p, name.c_str());
            const int64_t width = dtype_bytes(e.dtype);
            if (!width) fail("%s: tensor %s has dtype %s; F64, F32, BF16, I64 and I32 can be read", p, name.c_str(), e.dtype.c_str());
            if (ends.size() != 2 || ends[0] < 0 || ends[1] < ends[0] || ends[1] > size - data)
                fail("%s: cut off or damaged: tensor %s lies outside the file", p, name.c_str());
            e.offset = data + ends[0];
            e.bytes = ends[1] - ends[0];
            if (e.count > e.bytes / width || e.bytes != e.count * width) fail("%s: tensor %s has %lld bytes, its shape says otherwise", p, name.c_str(), (long long)e.bytes);
            entries.emplace_back(name, e);
        }
    } catch (const Json::exception& e) {
        fclose(file);
        fail("%s: not a safetensors file: its header is no JSON of the right form", p);
    } catch (...) {
        fclose(file);
        throw;
    }
}

Safetensors::~Safetensors() { fclose(file); }

bool Safetensors::has(const std::string& name) const {
    return std::any_of(entries.begin(), entries.end(), [&](const auto& e) { return e.first == name; });
}

const Safetensors::Entry& Safetensors::find(const std::string& name) const {
    for (const auto& [key, entry] : entries)
        if (key == name) return entry;
    fail("%s: has no tensor %s", path.c_str(), name.c_str());
}

std::string Safetensors::meta(const std::string& key) const {
    for (const auto& [name, text] : metadata)
        if (name == key) return text;
    fail("%s: its metadata has no \"%s\"; it was not written by this project's train", path.c_str(), key.c_str());
}

template <class Stored, class T>
static void convert(T* out, const std::vector<char>& raw) {
    for (size_t i = 0; i < raw.size() / sizeof(Stored); i++) {
        Stored value;
        memcpy(&value, raw.data() + i * sizeof(Stored), sizeof(Stored));
        if constexpr (std::is_same_v<Stored, __nv_bfloat16>) out[i] = T(float(value));
        else out[i] = T(value);
    }
}

template <class T>
static void read_tensor(std::FILE* file, const std::string& path, const std::string& name, const Safetensors::Entry& e, T* out) {
    std::vector<char> raw(e.bytes);
    if (fseek(file, e.offset, SEEK_SET) != 0 || fread(raw.data(), 1, raw.size(), file) != raw.size())
        fail("%s: tensor %s cannot be read (%s)", path.c_str(), name.c_str(), strerror(errno));
    if (e.dtype == "F64") convert<double>(out, raw);
    else if (e.dtype == "F32") convert<float>(out, raw);
    else if (e.dtype == "BF16") convert<__nv_bfloat16>(out, raw);
    else if (e.dtype == "I64") convert<int64_t>(out, raw);
    else convert<int32_t>(out, raw);
}

void Safetensors::read(const std::string& name, double* out) const { read_tensor(file, path, name, find(name), out); }
void Safetensors::read(const std::string& name, float* out) const { read_tensor(file, path, name, find(name), out); }
void Safetensors::read(const std::string& name, int* out) const { read_tensor(file, path, name, find(name), out); }

struct NamedTensor {
    std::string name;
    std::vector<int64_t> shape;
    const real* data;  // on the device
    int64_t count;
};

static void write_safetensors(const std::string& path, const Model& model, const std::vector<NamedTensor>& list, const Model::Metadata& metadata) {
    Json header;
    for (const auto& [key, text] : metadata) header["__metadata__"][key] = text;
    int64_t offset = 0;
    for (const NamedTensor& t : list) {
        const int64_t end = offset + t.count * int64_t(sizeof(real));
        header[t.name] = {{"dtype", sizeof(real) == 8 ? "F64" : "F32"}, {"shape", t.shape}, {"data_offsets", {offset, end}}};
        offset = end;
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the data is aligned
    write_atomically(path, [&](std::FILE* file) {
        const uint64_t size = text.size();
        fwrite(&size, 8, 1, file);
        fwrite(text.data(), 1, text.size(), file);
        std::vector<real> values;
        for (const NamedTensor& t : list) {
            values.resize(t.count);
            model.layers.download(values.data(), t.data, t.count * sizeof(real), model.stream);
            if (fwrite(values.data(), sizeof(real), t.count, file) != size_t(t.count)) return;  // write_atomically reports it
        }
    });
}

void Model::save(const std::string& path, const Metadata& metadata) const {
    std::vector<NamedTensor> list;
    for (const Parameter& p : parameters) list.push_back({p.name, p.shape, p.tensor->master + p.offset, p.count});
    Metadata all = {{"format", "pt"}, {"config", config.to_json()}};
    all.insert(all.end(), metadata.begin(), metadata.end());
    write_safetensors(path, *this, list, all);
}

void Model::save_optimizer(const std::string& path, const Metadata& metadata) const {
    std::vector<NamedTensor> list;
    for (const Parameter& p : parameters) {
        list.push_back({p.name + ".m", p.shape, p.tensor->m + p.offset, p.count});
        list.push_back({p.name + ".v", p.shape, p.tensor->v + p.offset, p.count});
    }
    write_safetensors(path, *this, list, metadata);
}

// Every tensor of the file is one that the model has, and the other way round.
static void check_tensors(const Safetensors& file, const Model& model, const std::vector<std::string>& suffixes) {
    for (const Parameter& p : model.parameters)
        for (const std::string& suffix : suffixes)
            if (file.find(p.name + suffix).shape != p.shape) fail("%s: tensor %s has another shape than the model's config says", file.path.c_str(), (p.name + suffix).c_str());
    if (file.entries.size() != model.parameters.size() * suffixes.size())
        fail("%s: has %zu tensors, the model's config says %zu", file.path.c_str(), file.entries.size(), model.parameters.size() * suffixes.size());
}

void Model::load(const std::string& path) {
    const Safetensors file(path);
    check_tensors(file, *this, {""});
    allocate_weights();
    for (const Parameter& p : parameters) {
        std::vector<real> values(p.count);
        file.read(p.name, values.data());
        set_tensor(*this, *p.tensor, p.offset, values);
    }
    layers.synchronize(stream);
}

void Model::load_optimizer(const std::string& path) {
    const Safetensors file(path);
    check_tensors(file, *this, {".m", ".v"});
    for (const Parameter& p : parameters) {
        std::vector<real> values(p.count);
        file.read(p.name + ".m", values.data());
        layers.upload(p.tensor->m + p.offset, values.data(), values.size() * sizeof(real), stream);
        file.read(p.name + ".v", values.data());
        layers.upload(p.tensor->v + p.offset, values.data(), values.size() * sizeof(real), stream);
        layers.synchronize(stream);
    }
}
