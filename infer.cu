// Sampling: a checkpoint and a prompt become text. The prompt goes through the model at once, then one token at a time, in memory that
// is taken before the first. --choices answers multiple choice. --bench times prompt and text, and holds decoding against the machine's read
// bandwidth.
#include "moemamba.h"

#include <omp.h>
#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <sstream>

#include "formats/dataset.h"
#include "formats/json.h"
#include "formats/options.h"

namespace fs = std::filesystem;

struct Options {
    static constexpr int kMostSamples = 1 << 16;  // of a batch
    std::string checkpoint, preset, tokenizer, prompt, prompt_file, prompt_tokens, choices, score, device = "auto";
    int score_length = 0, bench_prompt = 0;
    int64_t score_tokens = 131072;
    int64_t tokens = 256;
    int samples = 1;
    Sampling sampling;
    bool bench = false, tokenize = false, print_tokens = false;

    void check(const CommandLine& command) const {
        if (tokens < 0 || tokens > UINT32_MAX) fail("--tokens %lld: must be from 0 to 2^32 - 1", (long long)tokens);
        if (samples < 1 || samples > kMostSamples) fail("--samples %d: must be from 1 to %d", samples, kMostSamples);
        if (sampling.temperature != 0 && !(sampling.temperature >= 1e-3 && std::isfinite(sampling.temperature)))
            fail("--temperature %g: must be 0, or at least 0.001", sampling.temperature);
        if (sampling.top_k < 0) fail("--top-k %d: must be at least 0", sampling.top_k);
        if (!(sampling.top_p > 0 && sampling.top_p <= 1)) fail("--top-p %g: must be above 0 and at most 1", sampling.top_p);
        const int prompts = !prompt.empty() + !prompt_file.empty() + !prompt_tokens.empty();
        if (prompts > 1) fail("--prompt, --prompt-file or --prompt-tokens, not several");
        if (!choices.empty() && (bench || prompts)) fail("--choices goes with no prompt and no --bench");
        if (!score.empty() && (bench || prompts || !choices.empty() || tokenize)) fail("--score goes with no prompt, --choices, --tokenize or --bench");
        if (score.empty() && score_length != 0) fail("--score-length goes with --score");
        if (score_length < 0 || score_length > 1 << 24) fail("--score-length %d: must be from 0 to 2^24", score_length);
        if (score_tokens < 1) fail("--score-tokens %lld: must be at least 1", (long long)score_tokens);
        if (bench_prompt < 0 || bench_prompt > 1 << 24) fail("--bench-prompt %d: must be from 0 to 2^24", bench_prompt);
        if (bench_prompt > 0 && (!bench || prompts)) fail("--bench-prompt goes with --bench and no prompt");
        if (tokenize && (bench || !choices.empty())) fail("--tokenize goes with neither --bench nor --choices");
        const bool draws = !bench && !tokenize && score.empty() && choices.empty();
        for (const char* flag : {"--tokens", "--temperature", "--top-k", "--top-p", "--print-tokens"})
            if (!draws && command.has(flag)) fail("%s is for drawing text: it goes with no --score, --choices, --tokenize or --bench", flag);
        if (!draws && !bench && command.has("--samples")) fail("--samples goes with drawing text or --bench");
        if (tokenize && !tokenizer.empty()) return;  // that is all it needs
        if (checkpoint.empty() == preset.empty()) fail("give --checkpoint, or --preset for random weights, and not both");
        if (!preset.empty() && !bench) fail("--preset has random weights: only for --bench");
    }
};

static volatile std::sig_atomic_t interrupted = 0;

static void print(const std::string& text) {
    if (fwrite(text.data(), 1, text.size(), stdout) != text.size() || fflush(stdout) != 0)
        fail("cannot write the text: %s", strerror(errno));
}

// Prints a text as it comes: whole characters, with U+FFFD for what is none; or tokens.
struct Printer {
    const Tokenizer& tokenizer;
    const bool tokens;
    std::string waiting = {};  // the beginning of a character
    bool first = true;

    void add(int token) {
        if (tokens) return print((std::exchange(first, false) ? "" : ",") + std::to_string(token));
        waiting += tokenizer.decode(token);
        const size_t whole = whole_characters(waiting);
        write(waiting.substr(0, whole));
        waiting.erase(0, whole);
    }
    void end() {
        write(waiting);
        print("\n");
    }

   private:
    static void write(const std::string& text) {
        int64_t replaced = 0;
        if (!text.empty()) print(valid_utf8(text, &replaced));
    }
};

// One text appears as it is drawn; several, which are drawn in one batch, one after the other when they are done.
static void sample(Model& model, const Tokenizer& tokenizer, const std::vector<int>& prompt, const std::string& prompt_text,
                   const Options& options) {
    const bool alone = options.samples == 1;
    std::vector<std::vector<int>> drawn(options.samples);
    const auto begin = [&](Printer& printer) {
        if (!options.print_tokens && options.prompt_tokens.empty()) print(prompt_text);
        else for (const int token : prompt) printer.add(token);
    };
    Printer printer{tokenizer, options.print_tokens};
    if (alone) begin(printer);
    const double start = omp_get_wtime();
    double first = start, shown = start;
    int64_t count = 0;
    DecodeState state;
    generate(model, state, tokenizer, prompt, options.tokens, options.sampling, 0, options.samples, [&](int text, int token) {
        const double now = omp_get_wtime();
        if (count++ == 0) first = now;
        if (alone) printer.add(token);
        else drawn[text].push_back(token);
        if (!alone && now - shown >= 1) {
            shown = now;
            fprintf(stderr, "%lld of at most %lld tokens\n", (long long)count, (long long)(options.tokens * options.samples));
        }
        return !interrupted;
    });
    const double decoding = omp_get_wtime() - first;
    if (alone) printer.end();
    for (int i = 0; i < options.samples && !alone; i++) {
        if (!options.print_tokens) print((i ? "\n---- sample " : "---- sample ") + std::to_string(i + 1) + "\n");
        Printer one{tokenizer, options.print_tokens};
        begin(one);
        for (const int token : drawn[i]) one.add(token);
        one.end();
    }
    fprintf(stderr, "[prompt: %zu tokens in %.0f ms; text: %lld tokens", std::max<size_t>(prompt.size(), 1), 1e3 * (first - start),
            (long long)count);
    if (count > options.samples) fprintf(stderr, ", %.1f tokens/s", double(count - options.samples) / decoding);
    fprintf(stderr, "]\n");
}

// ------------------------------------------------------------------------------------------------------------------
// Multiple choice, as HellaSwag is scored: which choice does the model find the most probable continuation of the context? A line of the file:
// {"context": "...", "choices": ["...", ...], "label": 0}
struct Continuation {
    std::vector<int> tokens;  // end-of-text, the context, the choice
    size_t from;              // first token of the choice
    double log_probability = 0;
};
struct Question {
    std::vector<Continuation> choices;
    int label;
    // Whether the right choice has the largest value: the first, if several have.
    template <class F>
    bool right(F&& value) const {
        const auto less = [&](const Continuation& a, const Continuation& b) { return value(a) < value(b); };
        return std::max_element(choices.begin(), choices.end(), less) - choices.begin() == label;
    }
};

static std::vector<Question> read_questions(const std::string& path, const Tokenizer& tokenizer) {
    std::istringstream lines(read_file(path, "--choices"));
    std::vector<Question> questions;
    int64_t number = 0;
    for (std::string line; std::getline(lines, line);) {
        const std::string where = path + ", line " + std::to_string(++number);
        if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
        const JsonObject json(line, where);
        std::string context;
        std::vector<std::string> choices;
        Question& question = questions.emplace_back();
        json.get("context", context);
        json.get("choices", choices);
        json.get("label", question.label);
        if (choices.size() < 2) fail("%s: %zu choices; there must be at least two", where.c_str(), choices.size());
        if (question.label < 0 || question.label >= int(choices.size()))
            fail("%s: \"label\" is %d, of %zu choices counted from 0", where.c_str(), question.label, choices.size());
        for (const std::string& choice : choices) {
            if (choice.empty()) fail("%s: an empty choice", where.c_str());
            Continuation& c = question.choices.emplace_back(Continuation{{tokenizer.end_of_text}, 0});
            tokenizer.encode(c.tokens, context);
            c.from = c.tokens.size();
            tokenizer.encode(c.tokens, choice);
        }
    }
    if (questions.empty()) fail("%s: no questions in it", path.c_str());
    return questions;
}

static void answer(Model& model, const Tokenizer& tokenizer, const std::string& path) {
    std::vector<Question> questions = read_questions(path, tokenizer);
    std::vector<Continuation*> all;
    for (Question& question : questions)
        for (Continuation& c : question.choices) all.push_back(&c);
    // In batches of like lengths, so that little is filled up.
    std::stable_sort(all.begin(), all.end(),
                     [](const Continuation* a, const Continuation* b) { return a->tokens.size() < b->tokens.size(); });
    constexpr size_t kRows = 8192;  // of a batch, unless one sequence is longer
    double shown = omp_get_wtime();
    for (size_t first = 0, last; first < all.size(); first = last) {
        size_t T = 0;
        for (last = first; last < all.size(); last++) {
            const size_t longer = std::max(T, all[last]->tokens.size() - 1);
            if (last > first && (last - first + 1) * longer > kRows) break;
            T = longer;
        }
        const size_t B = last - first;
        std::vector<int> tokens(B * T), targets(B * T, -1);
        for (size_t b = 0; b < B; b++) {
            const Continuation& c = *all[first + b];
            std::copy(c.tokens.begin(), c.tokens.end() - 1, &tokens[b * T]);
            std::copy(c.tokens.begin() + c.from, c.tokens.end(), &targets[b * T + c.from - 1]);
        }
        const std::vector<real> losses = model.token_losses(tokens.data(), targets.data(), int(B), int(T));
        for (size_t b = 0; b < B; b++)
            for (size_t t = 0; t < T; t++) all[first + b]->log_probability -= losses[b * T + t];
        if (interrupted) fail("interrupted");
        if (omp_get_wtime() - shown < 1) continue;
        shown = omp_get_wtime();
        fprintf(stderr, "%zu of %zu choices\n", last, all.size());
    }
    int64_t by_sum = 0, by_mean = 0;
    for (const Question& question : questions) {
        by_sum += question.right([](const Continuation& c) { return c.log_probability; });
        by_mean += question.right([](const Continuation& c) { return c.log_probability / double(c.tokens.size() - c.from); });
    }
    const auto line = [&](const char* how, int64_t right) {
        printf("%s: %lld of %zu right, %.2f %%\n", how, (long long)right, questions.size(), 100.0 * double(right) / double(questions.size()));
    };
    line("by log-probability of the choice", by_sum);
    line("by its mean over the tokens", by_mean);
}

// The validation split of a dataset in windows of T tokens, or of a task's examples: mean loss, and how often a target is more probable than all
// other tokens together.
static void score(Model& model, const Tokenizer& tokenizer, const Dataset& data, const Options& options) {
    if (data.tokenizer.vocab > model.config.vocab)
        fail("--score %s: its tokens are %d, the model's %d", options.score.c_str(), data.tokenizer.vocab, model.config.vocab);
    if (tokenizer.kind != "none" && !tokenizer.same_as(data.tokenizer))
        fail("--score %s: its tokens are of another tokenizer than the model's", options.score.c_str());
    const int T = options.score_length > 0 ? options.score_length : data.answer_mark >= 0 ? data.example_tokens : 256;
    data.check_length("--score-length", T);
    const int64_t windows = std::min(data.windows(*data.val, T), (options.score_tokens - 1) / T + 1);
    if (windows < 1)
        fail("--score: %lld tokens of validation, one window needs %d; use a shorter --score-length or more text", (long long)data.val->count,
             T + data.beyond());
    const int64_t rows = 8192, B = std::clamp<int64_t>(rows / T, 1, windows);
    double loss = 0;
    int64_t targets_seen = 0, right = 0;
    std::vector<int> tokens(B * T), targets(B * T);
    for (int64_t first = 0; first < windows; first += B) {
        std::fill(targets.begin(), targets.end(), -1);
        for (int64_t b = 0; b < std::min(B, windows - first); b++) data.window(*data.val, first + b, T, &tokens[b * T], &targets[b * T]);
        const std::vector<real> losses = model.token_losses(tokens.data(), targets.data(), int(B), T);
        for (int64_t i = 0; i < B * T; i++) {
            if (targets[i] < 0) continue;
            targets_seen++;
            loss += losses[i];
            right += losses[i] < std::log(2.0);
        }
        if (interrupted) fail("interrupted");
    }
    if (targets_seen == 0) fail("--score: no target in %lld windows", (long long)windows);
    printf("%s: %.6f nats a target, %.2f %% of %lld targets above one half, in %lld windows of %d\n", options.score.c_str(), loss / double(targets_seen),
           100.0 * double(right) / double(targets_seen), (long long)targets_seen, (long long)windows, T);
}

// Of `repeats` times after a warm-up; of fewer, but one, if they take longer than 10 s in all.
template <class F>
static double median_seconds(int repeats, F&& work) {
    constexpr double kPatience = 10;
    std::vector<double> seconds;
    const double begin = omp_get_wtime();
    for (int i = -1; i < repeats && !interrupted; i++) {
        const double start = omp_get_wtime();
        if (start - begin > kPatience && !seconds.empty()) break;
        work();
        const double end = omp_get_wtime();
        if (i >= 0 || end - begin > kPatience) seconds.push_back(end - start);
    }
    if (seconds.empty()) fail("interrupted");
    std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
    return seconds[seconds.size() / 2];
}

// A prompt of one sequence, then B sequences that go on after it.
static void bench(Model& model, std::vector<int> prompt, int B, int length) {
    constexpr int kPart = 2048;  // of a long prompt, so that its activations take no more memory than they do of a short one
    const Config& config = model.config;
    // Arbitrary tokens: with experts, ever the same token would read ever the same weights.
    uint64_t drawn = 0;
    auto any_token = [&] { return int(random_bits(0, kSampleStream, drawn++) % uint64_t(config.vocab)); };
    const std::string device = model.layers.device;
    const bool slow = device == "simt" || device == "plain";
    if (prompt.empty()) {
        prompt.resize(length > 0 ? length : slow ? 64 : 512);
        std::generate(prompt.begin(), prompt.end(), any_token);
    }
    const int block = slow ? 4 : 32, blocks = 7, P = int(prompt.size());
    const int64_t context = P + (blocks + 1) * block;  // one block to warm up
    DecodeState alone, many, &state = B > 1 ? many : alone;
    const double prefill = median_seconds(5, [&] {
        model.start(alone, 1, context);
        for (int at = 0; at < P; at += kPart) model.decode(alone, prompt.data() + at, std::min(kPart, P - at), 1);
    });
    if (B > 1) model.start(many, B, context), model.copy_state(many, alone);
    std::vector<int> tokens(B);
    const double decode = median_seconds(blocks, [&] {
        for (int i = 0; i < block; i++) {
            std::generate(tokens.begin(), tokens.end(), any_token);
            model.decode(state, tokens.data(), 1, 1);
        }
    });
    const double weight_bytes = double(model.read_parameter_count()) * sizeof(floatX);
    const double rate = block / decode;
    const Model::StateBytes bytes = model.decode_state_bytes(context, 8 * sizeof(floatX));
    printf("model       %s, width %d, %s, on %s\n", config.layers.c_str(), config.d_model, kPrecision, device.c_str());
    printf("weights     %.1f MB, of which a token reads %.1f MB\n", double(model.parameter_count()) * sizeof(floatX) / 1e6,
           weight_bytes / 1e6);
    printf("state       %.3f MB of keys and values, %.3f MB of recurrent state (a sequence of %lld tokens)\n", bytes.cache / 1e6,
           bytes.recurrent / 1e6, (long long)context);
    printf("prompt      %.1f tokens/s (%d tokens)\n", P / prefill, P);
    printf("decode      %.1f tokens/s (%d at once, median of %d blocks of %d)\n", B * rate, B, blocks, block);
    rusage used{};
    getrusage(RUSAGE_SELF, &used);
    printf("memory      %.1f MB at most, with weights\n", used.ru_maxrss * 1024 / 1e6);
    if (B > 1) return;  // experts: how many of them a batch reads depends on its tokens
    const double bandwidth = measure_read_bandwidth(model.layers, slow ? 1 << 20 : 1 << 30);  // beyond caches, where it is fast
    printf("read        %.2f GB/s of weights, %.1f %% of the %.2f GB/s that this machine reads\n", rate * weight_bytes / 1e9,
           100 * rate * weight_bytes / bandwidth, bandwidth / 1e9);
}

// That of the checkpoint. Where there is none, and tokens are all that is wanted, there need not be one.
static Tokenizer find_tokenizer(const ModelFiles& files, const Options& options) {
    const bool text = !options.prompt.empty() || !options.prompt_file.empty() || !options.choices.empty() || options.tokenize ||
                      !(options.print_tokens || options.bench);
    try {
        return files.tokenizer();
    } catch (const Error& e) {
        if (!text) return Tokenizer::none(files.config.vocab, files.end_of_text.empty() ? -1 : files.end_of_text[0]);
        fail("%s; or give --tokenizer, or --prompt-tokens and --print-tokens", e.what());
    }
}

// "12,7,3"
static std::vector<int> parse_tokens(const std::string& text, int vocab) {
    std::vector<int> tokens;
    std::istringstream list(text);
    for (std::string number; std::getline(list, number, ',');) {
        int token = 0;
        if (parse_number(number, token) != std::errc() || token < 0 || token >= vocab)
            fail("--prompt-tokens: \"%.40s\" is no token; they are from 0 to %d, with commas between them", printable(number).c_str(), vocab - 1);
        tokens.push_back(token);
    }
    if (text.ends_with(',')) fail("--prompt-tokens: nothing follows the last comma");
    return tokens;
}

// With \xNN for each byte that is of no character.
static std::string quoted(const std::string& piece) {
    std::string text;
    for (size_t at = 0, n; at < piece.size(); at += n) {
        const auto valid = [&] {
            int64_t replaced = 0;
            valid_utf8(piece.substr(at, n), &replaced);
            return replaced == 0;
        };
        for (n = 1; n <= 4 && !valid();) n++;
        char code[8];
        snprintf(code, sizeof(code), "\\x%02x", static_cast<unsigned char>(piece[at]));
        text += n <= 4 ? printable(piece.substr(at, n)) : code;
        if (n > 4) n = 1;
    }
    return "\"" + text + "\"";
}

static int infer(int argc, char** argv) {
    Options options;
    CommandLine command("Samples text from a checkpoint of train, or of Hugging Face's transformers. Ctrl-C ends it cleanly.");
    command.add("--checkpoint", options.checkpoint,
                "model.safetensors, its index, or the directory that it is in: of train, or of Hugging Face's transformers (mamba, jamba, mixtral)");
    command.add("--prompt", options.prompt, "text to continue; empty: a new document");
    command.add("--prompt-file", options.prompt_file, "file with the text to continue; - = standard input");
    command.add("--prompt-tokens", options.prompt_tokens, "tokens to continue, like 12,7,3: for a model without a tokenizer");
    command.add("--print-tokens", options.print_tokens, "print tokens, not text");
    command.add("--tokenizer", options.tokenizer, "instead of the checkpoint's: as data_prep's, or a directory with a dataset or checkpoint; only its tokens are drawn");
    command.add("--tokenize", options.tokenize, "only print the prompt's tokens with their texts; needs --checkpoint or --tokenizer");
    command.add("--tokens", options.tokens, "most tokens to draw; end-of-text ends a sample before");
    command.add("--temperature", options.sampling.temperature, "below 1 favours probable tokens; 0 takes the most probable one");
    command.add("--top-k", options.sampling.top_k, "draw from the k most probable tokens; 0 = all");
    command.add("--top-p", options.sampling.top_p, "of those, from the fewest that have this share of the probability");
    command.add("--seed", options.sampling.seed, "same seed, same text");
    command.add("--samples", options.samples, "texts to draw, side by side; they are printed when all of them are done");
    command.add("--device", options.device, "auto, cpu, simt, plain or cuda; auto is the fastest there is");
    command.add("--choices", options.choices,
                "instead of drawing text, answer multiple choice: a file of lines {\"context\": ..., \"choices\": [...], \"label\": from 0}; a "
                "choice follows its context as it is");
    command.add("--score", options.score, "instead of drawing text: a directory of data_prep; the loss of its validation split, and of a task the share of "
                                          "answers that are known");
    command.add("--score-length", options.score_length, "tokens of a window; 0 = 256, or a task's example");
    command.add("--score-tokens", options.score_tokens, "tokens to look at, from the beginning");
    command.add("--bench", options.bench, "time a prompt and decoding after it, of --samples sequences at once");
    command.add("--bench-prompt", options.bench_prompt, "with --bench and no prompt: tokens of one; 0 = 512, or 64 on simt and plain");
    command.add("--preset", options.preset, "with --bench, instead of --checkpoint: a model of train --list-presets, random weights");
    if (!command.parse(argc, argv)) return 0;
    options.check(command);
    if (command.has("--score") && options.score.empty()) fail("--score: of which directory?");
    Config config;
    Tokenizer tokenizer;
    std::unique_ptr<ModelFiles> files;
    if (!options.checkpoint.empty()) {
        files = std::make_unique<ModelFiles>(options.checkpoint);
        config = files->config;
        if (!config.causal() && !options.tokenize)
            fail("%s: its experts choose their tokens from a whole batch (--routing expert-choice), later ones included: such a model can be "
                 "trained and compared, not continue a text", files->weights.path.c_str());
    } else if (!options.preset.empty()) {
        config = find_preset(options.preset).config;
    }
    if (!options.tokenizer.empty()) tokenizer = Tokenizer::load(options.tokenizer);
    else if (files) tokenizer = find_tokenizer(*files, options);
    if (files && config.vocab < tokenizer.vocab)
        fail("%s: its model has %d tokens, the tokenizer %d", files->weights.path.c_str(), config.vocab, tokenizer.vocab);
    std::string text = options.prompt;
    if (options.prompt_file == "-") text = read_standard_input();
    else if (!options.prompt_file.empty()) text = read_file(options.prompt_file, "--prompt-file");
    std::vector<int> prompt = parse_tokens(options.prompt_tokens, options.checkpoint.empty() ? tokenizer.vocab : config.vocab);
    if (const int64_t replaced = tokenizer.encode(prompt, text))
        fprintf(stderr, "warning: %lld places in the prompt are not UTF-8 and became U+FFFD\n", (long long)replaced);
    if (options.tokenize) {
        for (const int token : prompt) printf("%7d  %s\n", token, quoted(tokenizer.decode(token)).c_str());
        return 0;
    }
    if (tokenizer.kind == "none" && !options.print_tokens && !options.bench)
        fail("%s has no tokenizer: give --tokenizer, or --prompt-tokens and --print-tokens", options.checkpoint.c_str());
    if (prompt.empty() && tokenizer.end_of_text < 0 && !options.bench)
        fail("a model without end-of-text needs a prompt to begin with: --prompt-tokens");
    const Layers& layers = find_device(options.device);
    if (prompt.size() > size_t(1) << 24) fail("the prompt has %zu tokens; at most 2^24 can go in at once", prompt.size());

    struct sigaction action{};
    action.sa_handler = [](int) { interrupted = 1; };
    action.sa_flags = SA_RESETHAND | SA_RESTART;  // a second Ctrl-C ends it at once
    sigaction(SIGINT, &action, nullptr);
    Model model(config, layers);
    model.trains = false;
    if (files) model.load(*files);
    else model.initialize(options.sampling.seed);
    if (options.bench) bench(model, prompt, options.samples, options.bench_prompt);
    else if (!options.score.empty()) score(model, tokenizer, Dataset(options.score), options);
    else if (!options.choices.empty()) answer(model, tokenizer, options.choices);
    else sample(model, tokenizer, prompt, text, options);
    return 0;
}

int main(int argc, char** argv) {
    set_up_libraries(argv);
    return run_main(infer, argc, argv);
}
