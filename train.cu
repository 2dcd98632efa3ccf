// Training: token shards -> batches -> forward, backward, update -> a line a step, a JSON-lines log, checkpoints that resume bit for bit.
//
//   OUT/model.safetensors          weights; its metadata holds the config, the step, the tokenizer and the flags that define the run
//   OUT/optimizer-STEP.safetensors AdamW's moments after that step
//   OUT/config.json                what Hugging Face's transformers reads beside the weights,
//   OUT/tokenizer.json             and the tokenizer (tokenizer.model, of SentencePiece)
//   OUT/log.jsonl                  one object a line: the run, then "train" and "val" lines with their step
#include "moemamba.h"

#include <fcntl.h>
#include <omp.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <sstream>

#include "formats/dataset.h"
#include "formats/json.h"
#include "formats/options.h"

namespace fs = std::filesystem;

// ------------------------------------------------------------------------------------------------------------------
// What defines a run besides the model: on the same data, device, build and number of threads, the same values give the same bits.
struct Run {
    int batch = 16, seq_len = 256, grad_accum = 1, steps = 1000;
    double lr = 1e-3;
    int warmup = 0;
    std::string schedule = "cosine";
    double weight_decay = 0.1, grad_clip = 0.5, beta1 = 0.9, beta2 = 0.999;
    uint64_t seed = 1;

    // As Config::each_field.
    template <class Self, class F>
    static void each_field(Self& r, F&& f) {
        constexpr double kMost = 1e9, kLargest = 1e38, kBelowOne = 0.999999;
        f("batch", r.batch, "sequences B in a batch", 1, kMost);
        f("seq-len", r.seq_len, "tokens T in a sequence", 1, kMost);
        f("grad-accum", r.grad_accum, "batches whose gradients make one step", 1, kMost);
        f("steps", r.steps, "steps in all", 1, kMost);
        f("lr", r.lr, "highest learning rate", 0, kLargest);
        f("warmup", r.warmup, "steps of linear warm-up; 0 = 1 % of the steps", 0, kMost);
        f("schedule", r.schedule, "after warm-up: cosine (to 10 % of --lr) or constant", 0, 0);
        f("weight-decay", r.weight_decay, "decoupled weight decay, on matrices only", 0, kLargest);
        f("grad-clip", r.grad_clip, "largest global norm of the gradient; 0 = no limit", 0, kLargest);
        f("beta1", r.beta1, "AdamW's decay of the first moment", 0, kBelowOne);
        f("beta2", r.beta2, "AdamW's decay of the second moment", 0, kBelowOne);
        f("seed", r.seed, "of initialisation, order of the data and samples", 0, 0x1p64);
    }
    void resolve() {
        check_ranges(*this);
        if (schedule != "cosine" && schedule != "constant") fail("--schedule %s: must be cosine or constant", schedule.c_str());
        if (warmup == 0) warmup = (steps - 1) / 100 + 1;
    }
    double learning_rate(int step) const {  // step counts from 1
        if (step <= warmup) return lr * step / warmup;
        if (schedule == "constant") return lr;
        const double final_share = 0.1, progress = double(step - warmup) / double(steps - warmup);
        return lr * (final_share + (1 - final_share) * 0.5 * (1 + std::cos(M_PI * progress)));
    }
};

// ------------------------------------------------------------------------------------------------------------------
// Batches of windows of T + 1 tokens, T apart, so that every token but the first, and what does not fill a last window, is a target once
// in an epoch. The order of an epoch is a pure function of seed and epoch, so a position is just the number of sequences drawn: to
// resume, the step is enough.
struct Loader {
    const Dataset& data;
    const TokenStream& stream;
    const int T;
    const int64_t windows;

    Loader(const Dataset& data, const TokenStream& stream, int T, const char* what)
        : data(data), stream(stream), T(T), windows(data.windows(stream, T)) {
        if (windows < 1)
            fail("%s data: %lld tokens, but one sequence of --seq-len %d needs %d; use more text or a shorter --seq-len", what,
                 (long long)stream.count, T, T + data.beyond());
    }
    // Sequence i of an epoch, shuffled: a Feistel network permutes [0, 4^k), the smallest that holds all windows; what falls outside is
    // sent through again until it falls inside. That is a permutation of the windows, in constant memory.
    int64_t shuffled(uint64_t seed, int64_t epoch, int64_t i) const {
        int half_bits = 1;
        while (int64_t(1) << (2 * half_bits) < windows) half_bits++;
        const uint64_t mask = (uint64_t(1) << half_bits) - 1, rounds = 4;
        uint64_t x = uint64_t(i);
        do {
            uint64_t left = x >> half_bits, right = x & mask;
            for (uint64_t round = 0; round < rounds; round++) {
                const uint64_t key = (uint64_t(epoch) * rounds + round) << 32 | right;
                left = std::exchange(right, left ^ (random_bits(seed, kShuffleStream, key) & mask));
            }
            x = left << half_bits | right;
        } while (x >= uint64_t(windows));
        return int64_t(x);
    }
    int64_t evaluated(int64_t tokens) const { return std::min(windows, (tokens - 1) / T + 1); }  // windows that hold so many, or all
    void read(int* tokens, int* targets, int64_t index) {  // (T), (T)
        data.window(stream, index, T, tokens, targets);
    }
};

// ------------------------------------------------------------------------------------------------------------------
// Checkpoints. The optimizer is written first, under a name of its own; renaming model.safetensors, which names it, is the moment at which
// both become the checkpoint; then older optimizers go. Wherever a run is killed, one whole checkpoint is there.
// Optimizers of other steps, and what a kill left half written. What cannot be removed is no reason to end a run.
static void remove_others(const fs::path& out, const std::string& optimizer) {
    try {
        for (const std::string& name : list_directory(out.string())) {
            int step = 0, length = 0;  // optimizer-STEP.safetensors
            if (sscanf(name.c_str(), "optimizer-%d.safetensors%n", &step, &length) != 1 || length == 0) continue;
            const std::string rest = name.substr(length);
            if (name != optimizer && (rest.empty() || rest == ".tmp")) remove_file((out / name).string());
        }
    } catch (const Error& e) {
        fprintf(stderr, "warning: %s; the checkpoint is whole\n", printable(e.what()).c_str());
    }
}

static void save_checkpoint(const Model& model, const fs::path& out, int step, const Run& run, const Dataset& data) {
    const std::string optimizer = "optimizer-" + std::to_string(step) + ".safetensors";
    try {
        model.save_optimizer((out / optimizer).string(), {});
        model.save((out / kModelFile).string(), {{"step", std::to_string(step)},
                                                 {"tokenizer", data.tokenizer.to_json()},
                                                 {"training", fields_to_json(run).text()},
                                                 {"train_tokens", std::to_string(data.train->count)},
                                                 {"train_data", data.fingerprint},
                                                 {"machine", model.layers.machine()},
                                                 {"optimizer", optimizer}});
    } catch (const NotFlushed&) {
        throw;  // both have their names
    } catch (...) {
        std::error_code ignored;
        fs::remove(out / optimizer, ignored);
        throw;
    }
    remove_others(out, optimizer);
}

struct Checkpoint {
    ModelFiles files;
    std::string optimizer;  // path
    std::string machine;    // that wrote it; "": it does not say
    Tokenizer tokenizer;
    Config config;
    Run run;
    int step = 0;
    int64_t train_tokens = 0;

    explicit Checkpoint(const fs::path& out) : files(out.string()), config(files.config) {
        const Safetensors& file = files.weights;
        const std::string& model = file.path;
        optimizer = (out / fs::path(file.meta("optimizer")).filename()).string();
        machine = file.meta("machine", "");
        tokenizer = files.tokenizer();
        const auto number = [&](const char* key) {
            const std::string text = file.meta(key);
            int64_t value = 0;
            if (parse_number(text, value) != std::errc() || value < 1)
                fail("%s: its metadata has \"%s\": \"%s\", where a count belongs", model.c_str(), key, text.c_str());
            return value;
        };
        fields_from_json(run, JsonObject(file.meta("training"), model + ": what it says of its training"));
        try {
            run.resolve();
        } catch (const Error& e) {
            fail("%s: what it says of its training is damaged: %s", model.c_str(), e.what());
        }
        train_tokens = number("train_tokens");
        const int64_t done = number("step");
        if (done > run.steps) fail("%s: it is of step %lld of %d", model.c_str(), (long long)done, run.steps);
        step = int(done);
    }
};

// Fields is Config or Run: `base`, changed by what the command line has.
template <class Fields>
static Fields overlay(Fields base, const Fields& flags, const CommandLine& command) {
    const JsonObject given = fields_to_json(flags);
    Fields::each_field(base, [&](const char* flag, auto& field, auto...) {
        if (command.has(std::string("--") + flag)) given.get(flag, field);
    });
    base.resolve();
    return base;
}

// A run is defined when it starts: what is given again to resume it must be the same.
template <class Fields>
static void check_same(const Fields& given, const Fields& saved) {
    const JsonObject here = fields_to_json(given), there = fields_to_json(saved);
    Fields::each_field(given, [&](const char* flag, auto...) {
        if (here.text(flag) != there.text(flag))
            fail("--resume: --%s is %s here, %s in the checkpoint. A run is what it was when it began: only --steps can grow, with --schedule "
                 "constant; for another one, --init-from that checkpoint with another --out", flag, here.text(flag).c_str(), there.text(flag).c_str());
    });
}

// As long as it lives, no other training runs in the directory: two would overwrite each other's checkpoints. The lock is on the directory
// itself, so that no file is left behind and it ends with the process, however that ends. A file system without locks has none.
struct DirectoryLock {
    const int directory;

    explicit DirectoryLock(const std::string& path) : directory(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
        if (directory < 0) fail("--out %s: %s", path.c_str(), strerror(errno));
        if (flock(directory, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) return;
        close(directory);
        fail("%s: another training is running in it (the directory is locked); wait for its end, or choose another --out", path.c_str());
    }
    DirectoryLock(const DirectoryLock&) = delete;
    ~DirectoryLock() { close(directory); }
};

// ------------------------------------------------------------------------------------------------------------------
// The log. On resume, lines of steps after the checkpoint go: they are about to be computed again.
struct Log {
    const std::string path;
    int file;

    Log(const fs::path& out, int resumed_step) : path((out / "log.jsonl").string()) {
        if (resumed_step > 0) {
            std::istringstream old(fs::exists(path) ? read_file(path, "log") : "");
            write_atomically(path, [&](NewFile& kept) {
                for (std::string line; std::getline(old, line);) {
                    int step = 0;  // the first line, of the run, has none
                    try {
                        const JsonObject json(line, path);
                        if (json.has("step")) json.get("step", step);
                    } catch (const Error&) {  // a kill can leave half a line
                        continue;
                    }
                    if (step <= resumed_step) kept.write(line + "\n");
                }
            });
        }
        // O_NONBLOCK: a pipe would wait for its reader
        file = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_NONBLOCK | O_CLOEXEC, 0666);
        struct stat info;
        if (file < 0 || fstat(file, &info) != 0) fail("cannot write %s: %s", path.c_str(), strerror(errno));
        if (!S_ISREG(info.st_mode)) fail("%s: not a file", path.c_str());
        if (resumed_step == 0 && ftruncate(file, 0) != 0) fail("cannot write %s: %s", path.c_str(), strerror(errno));
    }
    Log(const Log&) = delete;
    ~Log() {
        if (file >= 0) ::close(file);
    }
    void write(const JsonObject& json) {
        const std::string line = json.text() + "\n";
        write_all(file, path, line.data(), line.size());
    }
    void close() {
        if (::close(std::exchange(file, -1)) != 0) fail("cannot write %s: %s", path.c_str(), strerror(errno));
    }
};

// ------------------------------------------------------------------------------------------------------------------
static std::string scaled(double value, double base, const char* unit) {
    const char* const prefixes[] = {"", "K", "M", "G", "T", "P"};
    size_t i = 0;
    for (; value >= base && i + 1 < std::size(prefixes); i++) value /= base;
    char text[64];
    snprintf(text, sizeof(text), i ? "%.2f %s%s%s" : "%.0f %s%s%s", value, prefixes[i], i && base == 1024 ? "i" : "", unit);
    return text;
}
static std::string bytes_text(double bytes) { return scaled(bytes, 1024, "B"); }

static std::string count_text(int64_t count) { return scaled(double(count), 1000, ""); }

static void print_model(const Model& model, int T) {
    const Config& c = model.config;
    const std::string experts = c.count('E') ? ", " + std::to_string(c.experts) + " experts" : "";
    printf("model        %s, width %d%s, vocabulary %d, in %s\n", c.layers.c_str(), c.d_model, experts.c_str(), c.vocab, kPrecision);
    const int64_t active = model.active_parameter_count();
    printf("parameters   %s, active per token %s, %s active without embedding and head\n", count_text(model.parameter_count()).c_str(),
           count_text(active).c_str(), count_text(active - model.outer_parameter_count()).c_str());
    printf("compute      %sFLOP per token in training, matrix products only, T = %d\n",
           scaled(model.matmul_flops_per_token(T, true), 1000, "").c_str(), T);
}

// What decoding takes, per sequence, and what fits.
struct Decoding {
    int bits = 16;       // of a number in the weights and in the KV cache; the recurrent state has float32
    double memory = 0;   // bytes, of a device; 0: not asked
};
// Models side by side, a row for each thing that is said of them.
struct Table {
    std::vector<std::string> names;
    std::vector<std::unique_ptr<Model>> models;

    void add(const std::string& name, const Config& config) {
        names.push_back(name);
        models.push_back(std::make_unique<Model>(config, plain::layers));
    }
    void header(const std::string& title) const {
        printf("  %-26s", title.c_str());
        for (const std::string& name : names) printf(" %18s", name.c_str());
        printf("\n");
    }
    void row(const std::string& title, const std::function<std::string(Model&)>& text) const {
        printf("  %-26s", title.c_str());
        for (const auto& model : models) printf(" %18s", text(*model).c_str());
        printf("\n");
    }
};
static void print_decoding(const Table& table, const Decoding& decoding) {
    printf("\nmemory for decoding a sequence\n");
    table.header("KV cache, " + std::to_string(decoding.bits) + " bit");
    for (int64_t context = 1 << 10; context <= 1 << 20; context *= 4)
        table.row("  at " + std::to_string(context >> 10) + "K",
                  [&](Model& m) { return bytes_text(m.decode_state_bytes(context, decoding.bits).cache); });
    table.row("recurrent state, always", [&](Model& m) { return bytes_text(m.decode_state_bytes(0, decoding.bits).recurrent); });
    const auto weights = [&](Model& m) { return double(m.parameter_count()) * decoding.bits / 8; };
    table.row("weights", [&](Model& m) { return bytes_text(weights(m)); });
    if (decoding.memory > 0)
        table.row("tokens in " + bytes_text(decoding.memory), [&](Model& m) -> std::string {
            const double left = decoding.memory - weights(m) - m.decode_state_bytes(0, decoding.bits).recurrent;
            const double token = m.decode_state_bytes(1, decoding.bits).cache;
            return left < 0 ? "does not fit" : token == 0 ? "any" : count_text(int64_t(left / token));
        });
}
static void compare(const std::string& presets, const Decoding& decoding) {
    Table table;
    std::istringstream list(presets + ",");  // so that what follows a last comma is a name too, of no preset
    for (std::string name; std::getline(list, name, ',');) table.add(name, find_preset(name).config);
    table.header("");
    table.row("layers", [](Model& m) { return m.config.layers; });
    table.row("width", [](Model& m) { return std::to_string(m.config.d_model); });
    table.row("parameters", [](Model& m) { return count_text(m.parameter_count()); });
    table.row("active per token", [](Model& m) { return count_text(m.active_parameter_count()); });
    table.row("without embedding and head", [](Model& m) { return count_text(m.active_parameter_count() - m.outer_parameter_count()); });
    print_decoding(table, decoding);
}
// "80GB": decimal, as makers of memory count; GiB and MiB are binary.
static double parse_bytes(const std::string& flag, const std::string& text) {
    const size_t digits = text.find_first_not_of("0123456789.");
    const std::map<std::string, double> units = {{"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}, {"MiB", 0x1p20}, {"GiB", 0x1p30}, {"TiB", 0x1p40}};
    const auto unit = digits == std::string::npos ? units.end() : units.find(text.substr(digits));
    double number = 0;
    if (unit == units.end() || parse_number(text.substr(0, digits), number) != std::errc() || !(number > 0))
        fail("%s %s: must be a number and MB, GB, TB, MiB, GiB or TiB, like 80GB", flag.c_str(), text.c_str());
    return number * unit->second;
}

// What training would take, without taking any of it.
static void dry_run(const Config& config, const Layers& layers, const Run& run, const Decoding& decoding) {
    Model model(config, layers);
    model.plan_training(run.batch, run.seq_len, run.grad_accum);
    const Config& c = model.config;
    print_model(model, run.seq_len);
    printf("\nconfiguration\n");
    const JsonObject values = fields_to_json(c);
    Config::each_field(c, [&](const char* flag, auto...) { printf("  %-36s %14s\n", flag, values.text(flag).c_str()); });
    printf("\nmemory for training, B = %d, T = %d\n", run.batch, run.seq_len);
    double total = 0;
    for (const Arena* arena : {&model.weights, &model.masters, &model.gradients, &model.moments, &model.activations}) {
        if (arena->bytes > 0) printf("  %-36s %14s\n", arena->name.c_str(), bytes_text(double(arena->bytes)).c_str());
        total += double(arena->bytes);
    }
    printf("  %-36s %14s\n", "total", bytes_text(total).c_str());
    Table table;
    table.add("this model", config);
    print_decoding(table, decoding);
}

static void list_presets() {
    for (const Preset& preset : presets()) {
        const Model model(preset.config, cpu::layers);
        const int64_t active = model.active_parameter_count();
        printf("%-24s %-10s width %4d  %9s parameters, %9s active, %9s active without embedding and head  %s\n", preset.name,
               preset.config.layers.c_str(), preset.config.d_model, count_text(model.parameter_count()).c_str(), count_text(active).c_str(),
               count_text(active - model.outer_parameter_count()).c_str(), preset.note);
    }
}

// Mean cross-entropy over the validation split's first windows, as many as hold so many tokens: the same, however they are batched. Every
// batch is B x T, for which there is memory; the last one is filled up with windows that have no targets.
static double validate(Model& model, Loader& loader, int B, int64_t eval_tokens) {
    const int T = loader.T;
    const int64_t count = loader.evaluated(eval_tokens);
    std::vector<int> tokens(int64_t(B) * T), targets(tokens.size());
    double sum = 0;
    int64_t counted = 0;  // targets: in a task not every window has as many
    for (int64_t first = 0; first < count; first += B) {
        const int64_t rows = std::min<int64_t>(B, count - first);
        for (int64_t b = 0; b < rows; b++) loader.read(&tokens[b * T], &targets[b * T], first + b);
        std::fill(targets.begin() + rows * T, targets.end(), -1);
        const int64_t here = int64_t(targets.size()) - std::count(targets.begin(), targets.end(), -1);
        sum += model.evaluate(tokens.data(), targets.data(), B, T) * double(here);
        counted += here;
    }
    return sum / double(counted);
}

static volatile std::sig_atomic_t interrupted = 0;

// The first signal ends the run after its step; the second, as usual, at once.
static void stop_on_signals() {
    struct sigaction action{};
    action.sa_handler = [](int) { interrupted = 1; };
    action.sa_flags = SA_RESETHAND | SA_RESTART;
    for (int signal : {SIGINT, SIGTERM}) sigaction(signal, &action, nullptr);
}

struct Options {
    std::vector<std::string> data, val_data;
    std::string tokenizer, out, init_from, device = "auto", preset, sample_prompt, memory, compare;
    int save_every = 100, eval_every = 100, sample_every = 0, sample_tokens = 256;
    int64_t eval_tokens = 131072;
    double max_minutes = 0, peak_flops = 0;
    bool resume = false, dry_run = false, list_presets = false;
    Decoding decoding;

    std::string data_flags() const {
        std::string text;
        for (const auto& [flag, paths] : {std::pair(" --data", data), std::pair(" --val-data", val_data)}) {
            if (!paths.empty()) text += flag;
            for (const std::string& path : paths) text += " " + path;
        }
        return text.substr(1) + (tokenizer.empty() ? "" : " --tokenizer " + tokenizer);
    }
    void check() {
        if (!dry_run && (!memory.empty() || !compare.empty() || decoding.bits != Decoding().bits))
            fail("--memory, --bits and --compare belong to --dry-run");
        if (!compare.empty() && !(preset.empty() && init_from.empty())) fail("--compare names all its presets: it does not go with another model");
        if (!init_from.empty() && (resume || !preset.empty())) fail("--init-from goes with neither --resume nor --preset");
        if (decoding.bits != 8 && decoding.bits != 16) fail("--bits %d: must be 8 or 16", decoding.bits);
        if (!memory.empty()) decoding.memory = parse_bytes("--memory", memory);
        const std::pair<const char*, int> counts[] = {
            {"save-every", save_every}, {"eval-every", eval_every}, {"sample-every", sample_every}};
        for (const auto& [flag, value] : counts)
            if (value < 0) fail("--%s %d: must be at least 0", flag, value);
        if (eval_tokens < 1) fail("--eval-tokens %lld: must be at least 1", (long long)eval_tokens);
        if (sample_tokens < 1) fail("--sample-tokens %d: must be at least 1", sample_tokens);
        if (!(max_minutes >= 0)) fail("--max-minutes %g: must be at least 0", max_minutes);
        if (!(peak_flops >= 0)) fail("--peak-flops %g: must be at least 0", peak_flops);
    }
};

// Steps done + 1 to run.steps, or until stopped. val may be null; peak: FLOP/s.
static void train_steps(Model& model, const Options& options, const Run& run, const Dataset& data, Loader& train, Loader* val, int done,
                        double peak) {
    const int B = run.batch, T = run.seq_len, G = run.grad_accum;
    const Config& config = model.config;
    const fs::path out(options.out);
    // The memory of samples is taken now: what does not fit must not end a run halfway.
    std::vector<int> prompt;
    data.tokenizer.encode(prompt, options.sample_prompt);
    DecodeState sampler;
    if (options.sample_every > 0) model.start(sampler, 1, std::max<int64_t>(1, prompt.size()) + options.sample_tokens);
    const double sequences = double(run.steps) * G * B;

    print_model(model, run.seq_len);
    printf("data         %lld tokens, %lld sequences of %d, %.2f epochs; %s\n", (long long)data.train->count, (long long)train.windows, T,
           sequences / double(train.windows), val ? "validated" : "no validation");
    printf("device       %s, matrix products at %sFLOP/s\n", model.layers.device, scaled(peak, 1000, "").c_str());
    printf("run          %d steps of %d x %d x %d tokens, seed %llu, %s\n\n", run.steps, G, B, T, (unsigned long long)run.seed,
           done ? ("resumed after step " + std::to_string(done)).c_str() : "from the start");

    Log log(out, done);
    model.save_config(options.out, data.tokenizer);
    if (done == 0) {
        log.write(JsonObject().set("kind", "run").set("config", fields_to_json(config)).set("training", fields_to_json(run))
                      .set("device", model.layers.device).set("precision", kPrecision).set("parameters", model.parameter_count())
                      .set("active_parameters", model.active_parameter_count()).set("peak_flops", peak));
    }
    std::vector<int> tokens(int64_t(B) * T), targets(tokens.size());
    AdamW optimizer{.lr = 0, .beta1 = run.beta1, .beta2 = run.beta2, .weight_decay = run.weight_decay, .grad_clip = run.grad_clip};
    int saved = done;
    const auto checkpoint = [&] { return saved ? "the checkpoint of step " + std::to_string(saved) : std::string("no checkpoint yet"); };
    const double start = omp_get_wtime();
    for (int step = done + 1; step <= run.steps; step++) {
        const double step_start = omp_get_wtime();
        model.zero_gradients();
        model.noise_seed = random_bits(run.seed, kNoiseStream, uint64_t(step));
        for (int g = 0; g < G; g++) {
            try {
                for (int b = 0; b < B; b++) {
                    const int64_t drawn = (int64_t(step - 1) * G + g) * B + b;
                    const int64_t index = train.shuffled(run.seed, drawn / train.windows, drawn % train.windows);
                    train.read(&tokens[int64_t(b) * T], &targets[int64_t(b) * T], index);
                }
            } catch (const Error&) {  // of the data: the model is whole
                if (step - 1 > saved) save_checkpoint(model, out, step - 1, run, data);
                throw;
            }
            model.forward_backward(tokens.data(), targets.data(), G);
        }
        const Losses losses = model.read_losses();
        const double aux = config.balance_loss * losses.balance + config.z_loss * losses.z;
        if (!std::isfinite(losses.cross_entropy + aux + losses.grad_norm))
            fail("step %d: loss %g, gradient norm %g; stopped before the update. First bad tensor: %s. %s has %s", step,
                 losses.cross_entropy, losses.grad_norm, model.first_bad_tensor().c_str(), options.out.c_str(), checkpoint().c_str());
        optimizer.lr = run.learning_rate(step);
        model.update(optimizer, losses, step);

        const double now = omp_get_wtime(), seconds = now - step_start, rate = double(G) * B * T / seconds;
        const double share = model.matmul_flops_per_token(run.seq_len, true) * rate / peak;
        const long left = long((now - start) / (step - done) * (run.steps - step));
        printf("step %*d/%d  loss %.4f", int(std::to_string(run.steps).size()), step, run.steps, losses.cross_entropy);
        if (config.count('E')) printf("  aux %.4f  load %.2f  dropped %4.1f %%", aux, losses.expert_load, 100 * losses.dropped);
        std::vector<double> mean_gains, largest_gains;  // of each layer with control
        for (const Gains& gains : losses.gains) mean_gains.push_back(gains.mean), largest_gains.push_back(gains.largest);
        if (!losses.gains.empty()) printf("  gain %.3f", *std::max_element(largest_gains.begin(), largest_gains.end()));
        printf("  norm %7.3f  lr %.2e  %6.0f ms  %7.0f tokens/s  %4.1f %% of peak  %ld:%02ld left\n", losses.grad_norm, optimizer.lr,
               1e3 * seconds, rate, 100 * share, left / 60, left % 60);
        JsonObject line;
        line.set("kind", "train").set("step", step).set("loss", losses.cross_entropy).set("aux", aux).set("balance", losses.balance)
            .set("z", losses.z).set("grad_norm", losses.grad_norm).set("lr", optimizer.lr).set("ms", 1e3 * seconds)
            .set("tokens_per_second", rate).set("peak_share", share).set("expert_load", losses.expert_load).set("dropped", losses.dropped)
            .set("seconds_left", left);
        if (!losses.gains.empty()) line.set("mean_gains", mean_gains).set("largest_gains", largest_gains);
        log.write(line);

        const bool last = step == run.steps;
        auto due = [&](int every) { return every > 0 && step % every == 0; };
        if (val && (last || due(options.eval_every))) {
            const double loss = validate(model, *val, B, options.eval_tokens), bits = loss / std::log(2.0);
            printf("validation after step %d: %.4f nats a token", step, loss);
            if (data.tokenizer.kind == "bytes" && data.answer_mark < 0) printf(", %.4f bits a byte", bits);
            printf("\n");
            log.write(JsonObject().set("kind", "val").set("step", step).set("loss", loss).set("bits_per_token", bits));
        }
        if (due(options.sample_every)) {
            std::string text = options.sample_prompt;
            int64_t replaced = 0;
            const Sampling sampling{.seed = run.seed};
            generate(model, sampler, data.tokenizer, prompt, options.sample_tokens, sampling, step, 1, [&](int, int token) {
                text += data.tokenizer.decode(token);
                return true;
            });
            printf("sample after step %d: %s\n", step, valid_utf8(text, &replaced).c_str());
        }
        const bool stop = interrupted || (options.max_minutes > 0 && now - start > 60 * options.max_minutes);
        if (last || stop || due(options.save_every)) {
            const double loss = model.evaluate(tokens.data(), targets.data(), B, T);
            if (!std::isfinite(loss))  // the update itself has ruined the weights
                fail("step %d: after its update the loss is %g: not saved, %s has %s; a lower --lr may help", step, loss,
                     options.out.c_str(), checkpoint().c_str());
            save_checkpoint(model, out, step, run, data);
            saved = step;
        }
        if (stop && !last) {
            printf("stopped after step %d and saved; continue with: train %s --out %s --resume\n", step, options.data_flags().c_str(),
                   options.out.c_str());
            break;
        }
    }
    log.close();
}

// vocab: of the model, or 0 if only the data says it.
static std::unique_ptr<const Dataset> open_dataset(const Options& options, int vocab) {
    std::error_code ignored;
    const bool directory = fs::is_directory(options.data[0], ignored);
    if (directory && options.data.size() > 1) fail("--data: one directory, or files");
    if (directory && !(options.val_data.empty() && options.tokenizer.empty()))
        fail("--val-data and --tokenizer go with token files, not with a directory (%s), which has its own", options.data[0].c_str());
    if (directory || !fs::exists(options.data[0], ignored)) return std::make_unique<Dataset>(options.data[0]);
    return std::make_unique<Dataset>(options.data, options.val_data, options.tokenizer, vocab);
}

// Whether the tokens of the data mean what they meant to the model that a run begins with, as far as can be seen.
static void compare_tokens(const ModelFiles& origin, const Dataset& data) {
    std::string problem;
    try {
        const Tokenizer theirs = origin.tokenizer();
        const auto differs = [&](int token) { return theirs.decode(token) != data.tokenizer.decode(token); };
        for (int token = 0; problem.empty() && data.tokenizer.kind != "none" && token < std::min(theirs.vocab, data.tokenizer.vocab); token++)
            if (theirs.kind != "none" && differs(token) && token != theirs.end_of_text && token != data.tokenizer.end_of_text)
                problem = "its token " + std::to_string(token) + " is another text than the data's";
    } catch (const Error& e) {
        problem = std::string("whether its tokens are the data's cannot be seen: ") + e.what();
    }
    if (problem.empty() && data.tokenizer.vocab < origin.config.vocab)
        printf("note: the data has %d of the model's %d tokens\n", data.tokenizer.vocab, origin.config.vocab);
    if (!problem.empty()) fprintf(stderr, "warning: --init-from %s: %s\n", origin.weights.path.c_str(), printable(problem).c_str());
}

static int train(int argc, char** argv) {
    Options options;
    Run run_flags;
    Config model_flags;
    CommandLine command("Trains a model on token files. Needs --preset or --layers, --init-from or --resume. Ctrl-C: finish the step, save, "
                        "stop.");
    command.add("--data", options.data, "directory that data_prep wrote; or token files, as llm.c writes them");
    command.add("--val-data", options.val_data, "token files for validation, where --data has files");
    command.add("--tokenizer", options.tokenizer, "of such files, as data_prep's; without it there are tokens, but no text");
    command.add("--out", options.out, "directory for checkpoint and log; created if need be");
    command.add("--init-from", options.init_from,
                "begin with the weights of a checkpoint, or of a directory of Hugging Face's transformers (mamba, jamba, mixtral), and its model; "
                "flags of the model may change what has no weights");
    command.add("--device", options.device, "auto, cpu, simt, plain or cuda; auto is the fastest there is");
    command.add("--save-every", options.save_every, "steps from one checkpoint to the next, beside the last; 0 = only the last");
    command.add("--eval-every", options.eval_every, "steps from one validation to the next, beside the last; 0 = none");
    command.add("--eval-tokens", options.eval_tokens,
                "tokens in a validation: whole sequences from the start of the validation split, or all there are, whatever --batch is");
    command.add("--sample-every", options.sample_every, "steps from one sample to the next; 0 = none");
    command.add("--sample-tokens", options.sample_tokens, "most tokens in a sample");
    command.add("--sample-prompt", options.sample_prompt, "what a sample continues; empty: a new document");
    command.add("--max-minutes", options.max_minutes, "stop and save, as on Ctrl-C, after so long; 0 = no limit");
    command.add("--peak-flops", options.peak_flops, "operations/s of matrix products that count as the peak; 0 = measure them now");
    command.add("--resume", options.resume,
                "continue the run in --out, bit for bit on the same device with as many threads; it knows its model and its run: "
                "only --steps can grow, with a constant schedule");
    command.add("--dry-run", options.dry_run, "print parameters, memory and compute, take none of them; needs no --out, and --data only for the vocabulary");
    command.add("--memory", options.memory, "--dry-run: also the longest context that fits into so much, like 80GB, beside the weights");
    command.add("--bits", options.decoding.bits, "--dry-run: of a number in weights and KV cache while decoding, 8 or 16");
    command.add("--compare", options.compare, "--dry-run: these presets side by side, like mixtral-8x7b,jamba-v0.1");
    command.add("--list-presets", options.list_presets, "print the presets");
    Run::each_field(run_flags, [&](const char* flag, auto& field, const char* help, auto...) {
        command.add(std::string("--") + flag, field, help, "The run");
    });
    command.add("--preset", options.preset, "a model by name (see --list-presets); the flags below change it", "The model");
    Config::each_field(model_flags, [&](const char* flag, auto& field, const char* help, auto...) {
        command.add(std::string("--") + flag, field, help, "The model");
    });
    if (!command.parse(argc, argv)) return 0;
    if (options.list_presets) return list_presets(), 0;
    options.check();
    const Layers& layers = find_device(options.device);
    if (!options.compare.empty()) return compare(options.compare, options.decoding), 0;
    std::unique_ptr<ModelFiles> origin;
    if (!options.init_from.empty()) origin = std::make_unique<ModelFiles>(options.init_from);
    if (!options.resume && !origin && options.preset.empty() && !command.has("--layers"))
        fail("which model? Give --preset (see --list-presets), --layers or --init-from");
    const Config base = origin ? origin->config : options.preset.empty() ? Config() : find_preset(options.preset).config;
    if (options.dry_run) {
        Config config = overlay(base, model_flags, command);
        if (!options.data.empty() && !command.has("--vocab") && !origin) config.vocab = open_dataset(options, 0)->tokenizer.vocab;
        dry_run(config, layers, overlay(Run(), run_flags, command), options.decoding);
        return 0;
    }

    if (options.data.empty()) fail("--data is required%s", options.resume ? ", with --resume too" : "");
    if (options.out.empty()) fail("--out is required");
    Config config;
    Run run;
    if (!options.resume) {
        config = overlay(base, model_flags, command);
        run = overlay(Run(), run_flags, command);
    }
    std::unique_ptr<const Dataset> opened;  // before a new run's directory is made, after an old run's model is known
    if (!options.resume) opened = open_dataset(options, command.has("--vocab") ? model_flags.vocab : origin ? origin->config.vocab : 0);
    std::error_code error;
    if (!options.resume) fs::create_directories(options.out, error);
    if (error) fail("cannot create directory %s: %s", options.out.c_str(), error.message().c_str());
    const DirectoryLock lock(options.out);  // before what is in it is read
    const bool found = fs::exists(fs::path(options.out) / kModelFile);
    if (found && !options.resume) fail("%s has a checkpoint: continue it with --resume, or choose another --out", options.out.c_str());
    if (!found && options.resume) fail("--resume: %s has no %s", options.out.c_str(), kModelFile);
    std::unique_ptr<Checkpoint> checkpoint;
    if (options.resume) {
        checkpoint = std::make_unique<Checkpoint>(options.out);
        remove_others(options.out, fs::path(checkpoint->optimizer).filename().string());
        config = overlay(options.preset.empty() ? checkpoint->config : base, model_flags, command);
        if (!command.has("--vocab")) config.vocab = checkpoint->config.vocab;
        check_same(config, checkpoint->config);
        run = overlay(checkpoint->run, run_flags, command);
        if (run.schedule == "constant" && run.steps > checkpoint->run.steps) checkpoint->run.steps = run.steps;
        check_same(run, checkpoint->run);
        opened = open_dataset(options, config.vocab);
    } else if (!command.has("--vocab") && !origin) {
        config.vocab = opened->tokenizer.vocab;
    }
    const Dataset& data = *opened;
    if (config.vocab < data.tokenizer.vocab)
        fail("%s: its model has %d tokens, the data's tokenizer %d", origin ? options.init_from.c_str() : "--vocab", config.vocab,
             data.tokenizer.vocab);
    if (checkpoint && !checkpoint->tokenizer.same_as(data.tokenizer))
        fail("--resume: %s has another tokenizer than the run began with", options.data[0].c_str());
    if (checkpoint && checkpoint->train_tokens != data.train->count)
        fail("--resume: %s has %lld training tokens, the run began with %lld", options.data[0].c_str(), (long long)data.train->count,
             (long long)checkpoint->train_tokens);
    if (checkpoint && checkpoint->files.weights.meta("train_data", data.fingerprint) != data.fingerprint)
        fail("--resume: %s has other training tokens than the run began with, or in another order", options.data[0].c_str());
    if (checkpoint && checkpoint->step >= run.steps) {
        printf("%s is complete: %d of %d steps\n", options.out.c_str(), checkpoint->step, run.steps);
        return 0;
    }

    if (data.tokenizer.kind == "none" && options.sample_every > 0) fail("--sample-every: the data's tokens have no texts; give --tokenizer");
    if (!config.causal() && options.sample_every > 0) fail("--sample-every: with --routing expert-choice a model cannot continue a text");
    if (!config.causal())
        fprintf(stderr, "warning: with --routing expert-choice a token's experts depend on the tokens after it: losses, validation's too, are not "
                        "those of a model that predicts text, and infer refuses it\n");
    data.check_length("--seq-len", run.seq_len);
    Loader train(data, *data.train, run.seq_len, "training");
    std::unique_ptr<Loader> val;
    if (options.eval_every > 0 && data.val->count > 0) {
        val = std::make_unique<Loader>(data, *data.val, run.seq_len, "validation");
        std::vector<int> tokens(run.seq_len), targets(run.seq_len);  // what is wrong with them must not end a run after its first steps
        for (int64_t i = 0; i < val->evaluated(options.eval_tokens); i++) val->read(tokens.data(), targets.data(), i);
    }
    if (origin) compare_tokens(*origin, data);

    setvbuf(stdout, nullptr, _IOLBF, 0);  // a line a step, wherever it goes
    stop_on_signals();
    // As large as it takes to reach the peak, and no slower. Before the model takes its memory: one that just fits leaves none for this.
    const std::string device = layers.device;
    const int size = device == "cuda" ? 8192 : device == "cpu" ? 2048 : 64;
    const double peak = options.peak_flops > 0 ? options.peak_flops : measure_matmul_flops(layers, size);
    Model model(config, layers);
    if (checkpoint) model.load(checkpoint->files);
    else if (origin) model.load(*origin);
    else model.initialize(run.seed);
    model.allocate_training(run.batch, run.seq_len, run.grad_accum);
    if (checkpoint) model.load_optimizer(checkpoint->optimizer);
    const std::string machine = layers.machine();
    if (checkpoint && checkpoint->machine.empty())
        printf("note: the checkpoint does not say on what it was written; unless that was %s, it goes on the same to rounding, not to the "
               "bit\n", machine.c_str());
    else if (checkpoint && checkpoint->machine != machine)
        printf("note: the checkpoint was written on %s; here it is %s: the same to rounding, not to the bit\n",
               printable(checkpoint->machine).c_str(), machine.c_str());
    train_steps(model, options, run, data, train, val.get(), checkpoint ? checkpoint->step : 0, peak);
    return 0;
}

int main(int argc, char** argv) {
    set_up_libraries(argv);
    return run_main(train, argc, argv);
}
