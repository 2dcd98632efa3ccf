// Tests of the three programs as a user runs them: text -> tokens -> checkpoint -> text, interruption, full disks, and bad input.
// The programs come from the directory in the environment's PROGRAMS_DIR, or from the one given at compile time.
#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif

#include <fcntl.h>
#include <nlohmann/json.hpp>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "formats/random.h"
#include "formats/safetensors.h"
#include "formats/tokenizer.h"

namespace fs = std::filesystem;
using Json = nlohmann::json;
using Arguments = std::vector<std::string>;
template <class T>
static std::vector<T> operator+(std::vector<T> all, const std::vector<T>& more) {
    all.insert(all.end(), more.begin(), more.end());
    return all;
}

// ---- running programs

static std::string program(const std::string& name) {
    const char* directory = getenv("PROGRAMS_DIR");
    return fs::absolute(fs::path(directory ? directory : PROGRAMS_DIR) / name).string();
}
// AddressSanitizer itself reserves terabytes, and keeps what was freed for a while.
static bool sanitized() { return program("train").find("-sanitize/") != std::string::npos; }

static std::string read_text(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}
static void write_text(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

struct Result {
    int code;  // exit code, or minus the signal that ended it
    std::string out, err;
};
struct Limits {
    std::string input = "/dev/null";
    rlim_t file_bytes = RLIM_INFINITY, memory_bytes = RLIM_INFINITY, stack_bytes = RLIM_INFINITY;
    std::function<void(pid_t)> meanwhile = {};
    const char* threads = "2";
    // What the environment says of waiting threads. On a busy machine they must not take the cores from working ones.
    std::map<std::string, std::string> waiting = {{"OMP_WAIT_POLICY", "passive"}};
    std::string output = "";       // instead of a file that is read back
    std::vector<int> closed = {};  // streams that are not open
    Arguments under = {};          // a program that runs it, and its arguments
};

// A directory of its own for each test, removed afterwards.
struct Workplace {
    fs::path path;
    Workplace() {
        std::string name = (fs::temp_directory_path() / "test_programs.XXXXXX").string();
        REQUIRE(mkdtemp(name.data()));
        path = name;
    }
    ~Workplace() {
        std::error_code ignored;
        fs::remove_all(path, ignored);
    }
    std::string operator/(const std::string& name) const { return (path / name).string(); }

    Result run(const std::string& name, const Arguments& arguments, const Limits& limits = {}) const {
        const std::string executable = program(name), out = *this / "stdout", err = *this / "stderr";
        const pid_t child = fork();
        REQUIRE(child >= 0);
        if (child == 0) {
            auto redirect = [](const std::string& path, int flags, int to) {
                const int file = open(path.c_str(), flags, 0600);
                if (file < 0 || dup2(file, to) < 0) _exit(126);
            };
            redirect(limits.input, O_RDONLY, STDIN_FILENO);
            redirect(limits.output.empty() ? out : limits.output, O_WRONLY | O_CREAT | O_TRUNC, STDOUT_FILENO);
            redirect(err, O_WRONLY | O_CREAT | O_TRUNC, STDERR_FILENO);
            const auto limit = [](auto resource, rlim_t bytes) {
                rlimit of{};
                getrlimit(resource, &of);
                of.rlim_cur = of.rlim_max = std::min(of.rlim_max, bytes);
                if (bytes != RLIM_INFINITY) setrlimit(resource, &of);
            };
            limit(RLIMIT_FSIZE, limits.file_bytes);
            limit(RLIMIT_AS, limits.memory_bytes);
            limit(RLIMIT_STACK, limits.stack_bytes);
            setenv("OMP_NUM_THREADS", limits.threads, 1);
            for (const char* name : {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OPENBLAS_CORETYPE"}) unsetenv(name);
            for (const auto& [name, value] : limits.waiting) setenv(name.c_str(), value.c_str(), 1);
            std::vector<char*> argv;
            for (const std::string& argument : limits.under + Arguments{executable} + arguments) argv.push_back(strdup(argument.c_str()));
            argv.push_back(nullptr);
            for (const int stream : limits.closed) close(stream);
            alarm(100);  // seconds until a signal ends what waits for ever
            execvp(argv[0], argv.data());
            _exit(127);
        }
        if (limits.meanwhile) limits.meanwhile(child);
        int status = 0;
        REQUIRE(waitpid(child, &status, 0) == child);
        return {WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status), read_text(out), read_text(err)};
    }
    Result succeed(const std::string& name, const Arguments& arguments, const Limits& limits = {}) const {
        const Result result = run(name, arguments, limits);
        INFO(name << ": " << result.err);
        REQUIRE(result.code == 0);
        return result;
    }
    // Exit code 1 and one line on stderr with all the phrases.
    void refuse(const std::string& name, const Arguments& arguments, const std::vector<std::string>& phrases,
                const Limits& limits = {}) const {
        const Result result = run(name, arguments, limits);
        std::string command = name;
        for (const std::string& argument : arguments) command += " " + argument;
        INFO(command << "\n" << result.err);
        CHECK(result.code == 1);
        CHECK(result.err.starts_with("error: "));
        CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
        CHECK(result.err.ends_with('\n'));
        for (const std::string& phrase : phrases) {
            INFO("expected: " << phrase);
            CHECK(result.err.find(phrase) != std::string::npos);
        }
    }
};

// ---- what they work on

// Made-up prose: predictable enough that a few steps of training lower the loss.
static std::string prose(size_t bytes) {
    const char* const words[] = {"and", "the", "river", "went", "down", "to", "old", "city", "where", "nobody", "lived", "any", "more"};
    std::string text;
    uint32_t state = 1;
    while (text.size() < bytes) {
        state = state * 1664525 + 1013904223;
        text += words[(state >> 16) % std::size(words)];
        text += (state >> 8) % 9 ? ' ' : '\n';
    }
    return text;
}

static std::vector<int> read_tokens(const fs::path& directory, const std::string& split) {
    std::vector<fs::path> paths;
    for (const auto& entry : fs::directory_iterator(directory))
        if (entry.path().filename().string().starts_with(split + "_")) paths.push_back(entry.path());
    std::sort(paths.begin(), paths.end());
    std::vector<int> tokens;
    for (const fs::path& path : paths) {
        const std::string file = read_text(path);
        REQUIRE(file.size() >= 1024);
        int32_t header[256];
        memcpy(header, file.data(), sizeof(header));
        CHECK(header[0] == 20240520);
        CHECK((header[1] == 1 || header[1] == 2));
        const size_t width = header[1] * 2;
        REQUIRE(file.size() == 1024 + size_t(header[2]) * width);
        for (size_t at = 1024; at < file.size(); at += width) {
            uint32_t token = 0;
            memcpy(&token, file.data() + at, width);
            tokens.push_back(int(token));
        }
    }
    return tokens;
}

static std::vector<std::string> documents(const std::vector<int>& tokens) {
    std::vector<std::string> all;
    CHECK((tokens.empty() || tokens[0] == 256));  // end-of-text comes before every document
    for (int token : tokens)
        if (token == 256) all.emplace_back();
        else all.back() += char(token);
    return all;
}

// Checks that the pieces, in some order and each once, are the text. Each must be long enough to be found where it is, and nowhere else.
static void check_joined(const std::vector<std::string>& pieces, const std::string& text) {
    size_t joined = 0;
    std::vector<bool> used(pieces.size());
    while (joined < text.size()) {
        size_t next = pieces.size();
        for (size_t i = 0; i < pieces.size(); i++)
            if (!used[i] && text.compare(joined, pieces[i].size(), pieces[i]) == 0) next = i;
        REQUIRE(next < pieces.size());
        used[next] = true;
        joined += pieces[next].size();
    }
    CHECK(joined == text.size());
    CHECK(std::count(used.begin(), used.end(), false) == 0);
}

static void make_data(const Workplace& at, size_t bytes = 30000) {
    write_text(at / "text.txt", prose(bytes));
    at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "data", "--val-fraction", "0.1"});
}

static const Arguments kModel = {"--layers", "ME(ME)F", "--d-model", "16", "--experts", "4"};
static const Arguments kSize = {"--batch", "4", "--seq-len", "32", "--peak-flops", "1e11"};
static Arguments train_flags(const Workplace& at, const std::string& out, int steps, const std::string& lr = "1e-2") {
    return Arguments{"--data", at / "data", "--out", at / out, "--steps", std::to_string(steps), "--lr", lr} + kModel + kSize;
}

static std::vector<Json> read_log(const std::string& out, const std::string& kind) {
    std::vector<Json> lines;
    std::ifstream file(out + "/log.jsonl");
    for (std::string line; std::getline(file, line);) {
        const Json json = Json::parse(line);
        if (json.at("kind") == kind) lines.push_back(json);
    }
    return lines;
}
static std::vector<double> losses(const std::string& out, const std::string& kind = "train") {
    std::vector<double> all;
    for (const Json& line : read_log(out, kind)) all.push_back(line.at("loss"));
    return all;
}
static std::vector<std::string> files(const fs::path& directory) {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(directory)) names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
}
static void check_same_checkpoint(const std::string& a, const std::string& b, int step) {
    const std::string optimizer = "/optimizer-" + std::to_string(step) + ".safetensors";
    CHECK(read_text(a + "/model.safetensors") == read_text(b + "/model.safetensors"));
    CHECK(!read_text(a + optimizer).empty());
    CHECK(read_text(a + optimizer) == read_text(b + optimizer));
    CHECK(losses(a) == losses(b));
}

// Rewrites a safetensors file with another header before the same tensors.
static void change_header(const fs::path& path, const std::string& original, const std::function<void(Json&)>& change) {
    uint64_t size;
    memcpy(&size, original.data(), 8);
    const std::string tensors = original.substr(8 + size);
    Json header = Json::parse(original.substr(8, size));
    change(header);
    const std::string text = header.dump();
    size = text.size();
    write_text(path, std::string(reinterpret_cast<const char*>(&size), 8) + text + tensors);
}

// Replaces a file by one that not even root can read: a link to itself.
static void unreadable(const fs::path& path) {
    fs::remove(path);
    fs::create_symlink(path.filename(), path);
}
static const char* const kLoop = "Too many levels of symbolic links";

// ------------------------------------------------------------------------------------------------------------------

TEST_CASE("help lists every default and exits with 0") {
    const Workplace at;
    for (const char* name : {"data_prep", "train", "infer"}) CHECK(at.succeed(name, {"--help"}).out.find("--help") != std::string::npos);
    CHECK(at.succeed("data_prep", {"--help"}).out.find("=0.01") != std::string::npos);
    CHECK(at.succeed("train", {"--help"}).out.find("=0.999") != std::string::npos);
    CHECK(at.succeed("infer", {"--help"}).out.find("=0.8") != std::string::npos);
}

// A program that computes starts itself anew, to tell libgomp how threads wait; nobody must notice.
TEST_CASE("how threads wait: the environment decides, or else the program, which stays the same process") {
    const Workplace at;
    make_data(at);
    at.succeed("train", train_flags(at, "run", 1), {.waiting = {}});
    at.refuse("infer", {"--checkpoint", at / "missing"}, {at / "missing"}, {.waiting = {}});
    const Arguments sample = {"--checkpoint", at / "run", "--prompt-file", "-", "--tokens", "20"};
    const std::string text = at.succeed("infer", sample, {.input = at / "text.txt"}).out;
    CHECK(text.size() > 30000);
    CHECK((at.succeed("infer", sample, {.input = at / "text.txt", .waiting = {}}).out == text));
    using Variables = std::map<std::string, std::string>;
    auto seen = [&](const Variables& given) {
        std::string environment, name;
        fs::remove(at / "stdout");  // of the run before
        const Limits limits{.meanwhile = [&](pid_t child) {
            const std::string process = "/proc/" + std::to_string(child);
            for (int i = 0; i < 2000 && read_text(at / "stdout").size() < 1000; i++)
                std::this_thread::sleep_for(std::chrono::milliseconds(5));
            environment = read_text(process + "/environ");
            name = read_text(process + "/comm");
            kill(child, SIGKILL);
        }, .waiting = given};
        CHECK(at.run("infer", {"--checkpoint", at / "run", "--tokens", "1000000000", "--temperature", "0"}, limits).code == -SIGKILL);
        CHECK(name == "infer\n");
        Variables found;
        std::istringstream lines(environment);
        for (std::string line; std::getline(lines, line, '\0');)
            for (const char* variable : {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OPENBLAS_CORETYPE"})
                if (line.starts_with(std::string(variable) + "=")) found[variable] = line.substr(strlen(variable) + 1);
        return found;
    };
    const Variables by_itself = seen({});
    CHECK(by_itself.count("GOMP_SPINCOUNT") == 1);
    CHECK(by_itself.count("OMP_WAIT_POLICY") == 0);
#ifdef __x86_64__  // an OpenBLAS that does not know the processor has been told which it may take it for
    const std::string model = read_text(at / "run/model.safetensors");
    CHECK(model.find(", BLAS for ") != std::string::npos);
    CHECK((model.find(", BLAS for Prescott") == std::string::npos || !__builtin_cpu_supports("avx2")));
#endif
    for (const Variables& waits : {Variables{{"GOMP_SPINCOUNT", "77"}}, Variables{{"OMP_WAIT_POLICY", "active"}}}) {
        Variables given = waits;
        given["OPENBLAS_CORETYPE"] = "Nehalem";
        CHECK(seen(given) == given);
    }
}

TEST_CASE("text becomes tokens, a checkpoint, and text") {
    const Workplace at;
    make_data(at);
    at.succeed("train", train_flags(at, "run", 12) + Arguments{"--eval-every", "6", "--sample-every", "6", "--sample-prompt", "the ri"});
    CHECK(files(at / "run") == std::vector<std::string>{"config.json", "log.jsonl", "model.safetensors", "optimizer-12.safetensors",
                                                        "tokenizer.json", "tokenizer_config.json"});
    const std::vector<double> curve = losses(at / "run");
    REQUIRE(curve.size() == 12);
    CHECK(std::abs(curve[0] - std::log(257.0)) < 0.02 * std::log(257.0));
    CHECK(curve[11] < curve[0] - 0.5);
    const std::vector<Json> validations = read_log(at / "run", "val");
    REQUIRE(validations.size() == 2);
    CHECK(validations[0].at("step") == 6);
    CHECK(validations[1].at("loss").get<double>() < validations[0].at("loss").get<double>());
    CHECK(read_log(at / "run", "run").size() == 1);

    auto text = [&](const Arguments& more, const Limits& limits = {}) {
        return at.succeed("infer", Arguments{"--checkpoint", at / "run", "--tokens", "40"} + more, limits).out;
    };
    write_text(at / "prompt", "the river");
    const std::string drawn = text({"--prompt", "the river"});
    CHECK(drawn.starts_with("the river"));
    CHECK(drawn.size() > strlen("the river"));
    CHECK(text({"--prompt", "the river"}) == drawn);
    CHECK(text({"--prompt-file", at / "prompt"}) == drawn);
    CHECK(text({"--prompt-file", "-"}, {.input = at / "prompt"}) == drawn);
    CHECK(text({"--prompt", "the river", "--seed", "7"}) != drawn);
    CHECK(text({"--prompt", "the river", "--top-k", "1"}) == text({"--prompt", "the river", "--temperature", "0", "--seed", "7"}));
    CHECK(text({"--prompt", "the river", "--top-p", "1e-9"}) == text({"--prompt", "the river", "--temperature", "0"}));
    const std::string two = text({"--prompt", "the river", "--samples", "2"});
    CHECK(two.starts_with("---- sample 1\n" + drawn + "\n---- sample 2\nthe river"));  // the first is that which is drawn alone
    CHECK(!text({}).empty());  // no prompt: a new document
    const std::string model = at / "run/model.safetensors";
    CHECK(at.succeed("infer", {"--checkpoint", model, "--tokens", "40", "--prompt", "the river"}).out == drawn);
}

// The files open in Python's safetensors library because they follow its format: data begins aligned, offsets cover the data without gaps.
TEST_CASE("checkpoints follow the safetensors format") {
    const Workplace at;
    make_data(at);
    at.succeed("train", train_flags(at, "run", 1));
    for (const char* name : {"/model.safetensors", "/optimizer-1.safetensors"}) {
        const std::string file = read_text(at / "run" + name);
        uint64_t header_bytes;
        memcpy(&header_bytes, file.data(), 8);
        CHECK(header_bytes % 8 == 0);
        const Json header = Json::parse(file.substr(8, header_bytes));
        std::vector<std::pair<uint64_t, uint64_t>> spans;
        for (const auto& [key, value] : header.items()) {
            if (key == "__metadata__") {
                for (const auto& [name, text] : value.items()) CHECK(text.is_string());
                continue;
            }
            uint64_t count = 1;
            for (uint64_t n : value.at("shape")) count *= n;
            spans.emplace_back(value.at("data_offsets")[0], value.at("data_offsets")[1]);
            CHECK(spans.back().second - spans.back().first == count * 4);
            CHECK(value.at("dtype") == "F32");
        }
        std::sort(spans.begin(), spans.end());
        uint64_t reached = 0;
        for (const auto& [from, to] : spans) {
            CHECK(from == reached);
            reached = to;
        }
        CHECK(file.size() == 8 + header_bytes + reached);
    }
}

TEST_CASE("Python's safetensors library opens checkpoints") {
    if (system("python3 -c 'import safetensors, numpy' 2> /dev/null") != 0) {
        printf("skipped: Python's safetensors library opens checkpoints (python3 has no safetensors or no numpy)\n");
        return;
    }
    const Workplace at;
    make_data(at);
    at.succeed("train", train_flags(at, "run", 1));
    write_text(at / "list.py", "import json, sys, zlib, safetensors\n"
                               "tensors = {}\n"
                               "with safetensors.safe_open(sys.argv[1], 'np') as file:\n"
                               "    for name in file.keys():\n"
                               "        t = file.get_tensor(name)\n"
                               "        tensors[name] = [list(t.shape), str(t.dtype), zlib.crc32(t.tobytes())]\n"
                               "    print(json.dumps({'metadata': file.metadata(), 'tensors': tensors}))\n");
    for (const char* name : {"/model.safetensors", "/optimizer-1.safetensors"}) {
        const std::string path = at / "run" + name;
        REQUIRE(system(("python3 '" + at / "list.py" + "' '" + path + "' > '" + at / "list.json" + "'").c_str()) == 0);
        const Json list = Json::parse(read_text(at / "list.json"));
        const std::string file = read_text(path);
        uint64_t header_bytes;
        memcpy(&header_bytes, file.data(), 8);
        Json header = Json::parse(file.substr(8, header_bytes));
        CHECK(list.at("metadata") == header.at("__metadata__"));
        CHECK(list.at("metadata").at("step") == "1");
        header.erase("__metadata__");
        CHECK(list.at("tensors").size() == header.size());
        for (const auto& [tensor, entry] : header.items()) {
            const size_t from = entry.at("data_offsets")[0], to = entry.at("data_offsets")[1];
            const auto* data = reinterpret_cast<const Bytef*>(file.data() + 8 + header_bytes + from);
            CHECK(list.at("tensors").at(tensor) == Json{entry.at("shape"), "float32", crc32(0, data, uInt(to - from))});
        }
    }
}

// ---- data_prep

TEST_CASE("one document is split by position: every byte is in exactly one split") {
    const Workplace at;
    const std::string text = prose(50000);
    write_text(at / "text.txt", text);
    auto check = [&](const std::string& out, double fraction) {
        const std::vector<int> train = read_tokens(at / out, "train"), val = read_tokens(at / out, "val");
        const std::vector<std::string> held_out = documents(val);
        CHECK(held_out.size() >= 2);
        CHECK(std::abs(double(val.size()) / double(train.size() + val.size()) - fraction) < 0.5 * fraction);
        check_joined(documents(train) + held_out, text);
        CHECK(Json::parse(read_text(at / out + "/dataset.json")).at("split") == "pieces");
    };
    at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "file", "--val-fraction", "0.05"});
    check("file", 0.05);
    at.succeed("data_prep", {"--input", "-", "--output", at / "stream", "--val-fraction", "0.05"}, {.input = at / "text.txt"});
    check("stream", 0.05);
    // What there is to split is the text, not what else is there.
    fs::create_directory(at / "texts");
    fs::copy(at / "text.txt", at / "texts/text.txt");
    write_text(at / "texts/binary", std::string(10 << 20, 0));
    at.succeed("data_prep", {"--input", at / "texts", "--output", at / "directory", "--val-fraction", "0.05"});
    check("directory", 0.05);
    at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "again", "--val-fraction", "0.05", "--shard-tokens", "1000"});
    CHECK(files(at / "again").size() > 45);
    for (const char* split : {"train", "val"}) CHECK(read_tokens(at / "again", split) == read_tokens(at / "file", split));
    // A second run replaces the shards of the first, all of them.
    at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "again", "--val-fraction", "0"});
    CHECK(files(at / "again") == std::vector<std::string>{"dataset.json", "train_000000.bin"});
    CHECK(documents(read_tokens(at / "again", "train")) == std::vector<std::string>{text});
}

TEST_CASE("many documents are split whole") {
    const Workplace at;
    fs::create_directories(at / "texts/below");
    fs::create_directories(at / "texts/.hidden");
    std::vector<std::string> expected;
    for (int i = 0; i < 40; i++) {
        expected.push_back("document " + std::to_string(i) + "\n" + prose(100 * (i % 7)));
        write_text(at / (i % 2 ? "texts/below/" : "texts/") + std::to_string(i), expected.back());
    }
    write_text(at / "texts/binary", std::string("\0\1\2", 3));
    write_text(at / "texts/.hidden/secret", "secret");
    at.succeed("data_prep", {"--input", at / "texts", "--output", at / "texts/out", "--val-fraction", "0.1"});
    std::vector<std::string> found = documents(read_tokens(at / "texts/out", "train"));
    const std::vector<std::string> val = documents(read_tokens(at / "texts/out", "val"));
    CHECK(val.size() == 4);
    found.insert(found.end(), val.begin(), val.end());
    std::sort(found.begin(), found.end());
    std::sort(expected.begin(), expected.end());
    CHECK(found == expected);
    const Json json = Json::parse(read_text(at / "texts/out/dataset.json"));
    CHECK(json.at("documents") == 40);
    CHECK(json.at("split") == "documents");
    CHECK(json.at("tokenizer").at("kind") == "bytes");
}

static const std::string kSeparatorLine = "<|endoftext|>\n";

TEST_CASE("many documents in one file or stream are split whole") {
    const Workplace at;
    auto check = [&](const std::vector<std::string>& expected, const std::string& fraction, size_t held_out) {
        std::string text;
        for (const std::string& document : expected) text += document + kSeparatorLine;
        write_text(at / "text", text);
        at.succeed("data_prep", {"--input", at / "text", "--output", at / "file", "--val-fraction", fraction});
        at.succeed("data_prep", {"--input", "-", "--output", at / "stream", "--val-fraction", fraction}, {.input = at / "text"});
        for (const char* out : {"file", "stream"}) {
            const std::vector<std::string> val = documents(read_tokens(at / out, "val"));
            CHECK(val.size() == held_out);
            std::vector<std::string> found = documents(read_tokens(at / out, "train")) + val, all = expected;
            std::sort(found.begin(), found.end());
            std::sort(all.begin(), all.end());
            CHECK((found == all));  // in parentheses: too long to be printed
            const Json json = Json::parse(read_text(at / out + "/dataset.json"));
            CHECK(json.at("split") == "documents");
            CHECK(json.at("documents") == expected.size());
        }
    };
    std::vector<std::string> expected;
    for (int i = 0; i < 300; i++) expected.push_back("document " + std::to_string(i) + "\n" + prose(i * 37 % 3000) + "\n");
    check(expected, "0.02", 6);
    // So many that the end is out of sight when the first are dealt, longer than a block, and with lines longer than any limit.
    expected.clear();
    std::string line = prose(100000);
    std::replace(line.begin(), line.end(), '\n', ' ');
    for (int i = 0; i < 200; i++) expected.push_back("document " + std::to_string(i) + " " + line + "\n");
    check(expected, "0.01", 2);
}

TEST_CASE("only a document that is too long for validation is cut") {
    const Workplace at;
    const std::string long_document = "long\n" + prose(200000) + "\n";
    std::vector<std::string> expected;
    for (int i = 0; i < 100; i++) expected.push_back("document " + std::to_string(i) + "\n" + prose(i % 10 * 100) + "\n");
    std::string text;
    for (int i = 0; i < 100; i++) text += expected[i] + kSeparatorLine + (i == 50 ? long_document + kSeparatorLine : "");
    write_text(at / "text", text);
    at.succeed("data_prep", {"--input", at / "text", "--output", at / "data", "--val-fraction", "0.05"});
    const std::vector<int> train = read_tokens(at / "data", "train"), val = read_tokens(at / "data", "val");
    CHECK(std::abs(double(val.size()) / double(train.size() + val.size()) - 0.05) < 0.025);
    std::vector<std::string> whole, pieces;
    for (const std::string& document : documents(train) + documents(val))
        (document.starts_with("document ") ? whole : pieces).push_back(document);
    std::sort(whole.begin(), whole.end());
    std::sort(expected.begin(), expected.end());
    CHECK(whole == expected);
    check_joined(pieces, long_document);
    CHECK(Json::parse(read_text(at / "data/dataset.json")).at("split") == "pieces");
}

TEST_CASE("validation gets its share of documents, whatever the share") {
    const Workplace at;
    std::string text;
    for (int i = 0; i < 200; i++) text += "document " + std::to_string(i) + "\n" + kSeparatorLine;
    write_text(at / "text", text);
    for (const double fraction : {0.03, 0.07, 0.13, 0.22, 0.3, 0.35, 0.4, 0.45, 0.48, 0.5}) {
        INFO(fraction);
        at.succeed("data_prep", {"--input", at / "text", "--output", at / "data", "--val-fraction", std::to_string(fraction)});
        CHECK(std::abs(double(documents(read_tokens(at / "data", "val")).size()) - 200 * fraction) <= 1);
    }
}

TEST_CASE("a text without any newline is split, and not within a character") {
    const Workplace at;
    struct Case {
        int size;
        double fraction;
        int width;  // bytes of a character
    };
    // In the first three the beginning of the document must end at byte 65536 or, the third, at 65535: there ends a block of 64 KiB,
    // after the first, the second and again the second byte of a character.
    for (const auto& [size, fraction, width] : {Case{466040, 0.125, 1}, Case{466040, 0.125, 2}, Case{466032, 0.125, 3},
                                                Case{1000000, 0.5, 1}, Case{200000, 0.05, 3}}) {
        std::string text = prose(size);
        text.resize(size);
        std::replace(text.begin(), text.end(), '\n', ' ');
        for (int i = width - 1; width > 1 && i + width <= size; i += width) {
            text[i] = char((width == 2 ? 0xC2 : 0xE1) + text[i] % 8);
            for (int j = 1; j < width; j++) text[i + j] = char(0x80 + text[i + j] % 64);
        }
        write_text(at / "text", text);
        at.succeed("data_prep", {"--input", "-", "--output", at / "data", "--val-fraction", std::to_string(fraction)},
                   {.input = at / "text"});
        const std::vector<int> train = read_tokens(at / "data", "train"), val = read_tokens(at / "data", "val");
        INFO(size << " bytes, validation " << val.size());
        CHECK(std::abs(double(val.size()) / double(train.size() + val.size()) - fraction) < 0.5 * fraction);
        const std::vector<std::string> pieces = documents(train) + documents(val);
        check_joined(pieces, text);
        for (const std::string& piece : pieces) CHECK((piece[0] & 0xC0) != 0x80);
    }
}

TEST_CASE("data_prep's memory does not grow with its input") {
    const Workplace at;
    const std::string pipe = at / "pipe";
    REQUIRE(mkfifo(pipe.c_str(), 0600) == 0);
    std::string small, endless(1 << 16, 'a');  // many documents; one without any line
    int64_t written = 0, expected = 1;
    while (small.size() < 1 << 16) small += "and the river\n" + kSeparatorLine;
    const Limits limits{.input = pipe, .meanwhile = [&](pid_t child) {
        auto before = signal(SIGPIPE, SIG_IGN);  // should it end early
        const int file = open(pipe.c_str(), O_WRONLY);
        auto feed = [&](const std::string& block, int64_t bytes) {
            for (int64_t end = written + bytes; written < end; written += int64_t(block.size())) {
                if (write(file, block.data(), block.size()) != ssize_t(block.size())) return;
                if (&block == &small) expected += int64_t(block.size() / (strlen("and the river\n") + kSeparatorLine.size()));
            }
        };
        feed(small, 40 << 20);
        // From here on it may take 8 MiB more, and gets 144. AddressSanitizer keeps up to 256 MiB of what was freed.
        const rlim_t more = (sanitized() ? 280 : 8) << 20;
        int64_t pages = 0;
        std::ifstream("/proc/" + std::to_string(child) + "/statm") >> pages;
        CHECK(pages > 0);
        const rlim_t bytes = rlim_t(pages) * rlim_t(sysconf(_SC_PAGESIZE)) + more;
        const rlimit limit{bytes, bytes};
        CHECK(prlimit(child, RLIMIT_AS, &limit, nullptr) == 0);
        feed(small, 72 << 20);
        feed(endless, 72 << 20);
        close(file);
        signal(SIGPIPE, before);
    }};
    at.succeed("data_prep", {"--input", "-", "--output", at / "data"}, limits);
    CHECK(written >= 180 << 20);
    CHECK(Json::parse(read_text(at / "data/dataset.json")).at("documents") == expected);
}

TEST_CASE("separator lines, wherever blocks end, and gzip") {
    const Workplace at;
    const std::string separator = "<|endoftext|>";
    for (int shift = 0; shift < 20; shift++) {  // moves a separator over the end of the first 64 KiB block, byte by byte
        std::vector<std::string> expected = {prose(65536)};
        expected[0].resize(65536 - shift);
        expected[0].back() = '\n';
        expected.push_back("not a line: " + separator + " and " + separator + "\n");
        expected.push_back("last");
        const std::string text = expected[0] + separator + "\n" + expected[1] + separator + "\r\n" + separator + "\n" + expected[2];
        const std::string path = at / "text.gz";
        gzFile file = gzopen(path.c_str(), "wb1");
        REQUIRE(gzwrite(file, text.data(), unsigned(text.size())) == int(text.size()));
        gzclose(file);
        at.succeed("data_prep", {"--input", path, "--output", at / "data", "--val-fraction", "0"});
        CHECK(documents(read_tokens(at / "data", "train")) == expected);
    }
}

// What each example asks for is in it, and what it asks for alone is learned and scored.
TEST_CASE("tasks: examples with answers, of which alone there is a loss") {
    const Workplace at;
    const auto make = [&](const std::string& task, int length) {
        const std::string name = task + "-" + std::to_string(length);
        at.succeed("data_prep", {"--task", task, "--task-length", std::to_string(length), "--task-examples", "300", "--val-fraction", "0.1", "--output", at / name});
        const std::vector<int> train = read_tokens(at / name, "train"), val = read_tokens(at / name, "val");
        CHECK(train.size() == size_t(270 * length));
        CHECK(val.size() == size_t(30 * length));
        std::vector<std::string> examples = documents(train);
        for (const std::string& example : documents(val)) examples.push_back(example);
        CHECK(std::set<std::string>(examples.begin(), examples.end()).size() == 300);
        for (const std::string& example : examples) CHECK(example.size() == size_t(length - 1));
        return examples;
    };
    const auto answers = [](const std::string& example) {
        std::string all;
        for (size_t i = 0; i < example.size(); i++)
            if (example[i] == '=') all += example[i + 1];
        return all;
    };
    for (const int length : {32, 64, 257}) {
        for (const std::string& example : make("recall", length)) {
            const int pairs = std::min(26, length / 8), questions = (length - 1 - 2 * pairs) / 3;
            CHECK(answers(example).size() == size_t(questions));
            for (int i = 0; i < questions; i++) {
                const size_t at = size_t(2 * pairs + 3 * i), key = example.find(example[at]);
                CHECK(key < size_t(2 * pairs));
                CHECK(example[at + 1] == '=');
                CHECK(example[at + 2] == example[key + 1]);
            }
        }
        std::set<size_t> places;
        size_t most = 0;
        for (const std::string& example : make("induction", length)) {
            const size_t mark = example.find('!');
            const std::string all = answers(example);
            places.insert(mark);
            most = std::max(most, all.size());
            CHECK(mark < size_t(length / 4));
            CHECK(!all.empty());
            CHECK(all == std::string(all.size(), example[mark + 1]));
            CHECK(size_t(std::count(example.begin(), example.end(), '!')) == all.size() + 1);
            for (size_t at = example.find('='); at < example.size(); at = example.find('=', at + 1)) CHECK(example[at - 1] == '!');
        }
        CHECK(places.size() == size_t(length / 4));
        CHECK(most > size_t(length / 16));
        for (const std::string& example : make("copying", length)) {
            std::string letters = example.substr(0, size_t(length - 17));
            std::erase(letters, '.');
            CHECK(letters.size() == 8);
            CHECK(answers(example) == letters);
        }
    }
    // Dots could be learned in a few steps, letters cannot be: nearly all that could have a loss here is dots.
    const Arguments run = {"--data", at / "copying-257", "--out", at / "run", "--seq-len", "257", "--batch", "4", "--steps", "60", "--lr", "1e-2", "--eval-every", "60",
                           "--peak-flops", "1e11"};
    const std::string out = at.succeed("train", run + kModel).out;
    CHECK(out.find("bits a byte") == std::string::npos);
    CHECK(losses(at / "run").back() > 2.8);
    CHECK(losses(at / "run").back() < 3.6);  // log 26 = 3.26
    const auto score = [&](const std::string& model, const std::string& data) {
        double loss = 0;
        char unit[8];
        const std::string text = at.succeed("infer", {"--checkpoint", at / model, "--score", at / data}).out, after = text.substr(text.find(": ") + 2);
        CHECK(sscanf(after.c_str(), "%lf %7s", &loss, unit) == 2);
        CHECK(std::string(unit) == "nats");
        return loss;
    };
    CHECK(out.find("270 sequences of 257") != std::string::npos);
    CHECK(std::abs(score("run", "copying-257") - losses(at / "run", "val").back()) < 1e-5);
    // In induction the examples have unequal numbers of answers, and every answer counts alike.
    at.succeed("train", Arguments{"--data", at / "induction-64", "--out", at / "uneven", "--seq-len", "64", "--batch", "7", "--steps", "9", "--lr", "1e-2",
                                  "--eval-every", "9", "--peak-flops", "1e11"} + kModel);
    CHECK(std::abs(score("uneven", "induction-64") - losses(at / "uneven", "val").back()) < 1e-5);
    at.succeed("data_prep", {"--task", "recall", "--task-examples", "2", "--val-fraction", "0", "--output", at / "all"});
    CHECK(at.succeed("train", Arguments{"--data", at / "all", "--out", at / "two", "--seq-len", "64", "--batch", "2", "--steps", "1", "--peak-flops", "1e11"} + kModel)
              .out.find("2 sequences of 64, 1.00 epochs; no validation") != std::string::npos);
    CHECK(at.succeed("infer", {"--checkpoint", at / "run", "--score", at / "copying-257", "--score-tokens", "1"}).out.find("of 8 targets above one half, in 1 windows") !=
          std::string::npos);
    make_data(at);
    at.succeed("train", train_flags(at, "text", 5) + Arguments{"--eval-every", "5"});
    const std::string text = at.succeed("infer", {"--checkpoint", at / "text", "--score", at / "data", "--score-length", "32"}).out;
    CHECK(std::abs(std::stod(text.substr(text.find(": ") + 2)) - losses(at / "text", "val").back()) < 1e-5);

    at.refuse("train", Arguments{"--data", at / "recall-64", "--out", at / "bad", "--seq-len", "96"} + kModel, {"--seq-len 96", "64"});
    at.refuse("infer", {"--checkpoint", at / "run", "--score", at / "recall-64", "--score-length", "6400"}, {"--score", "1920", "6400"});
    at.refuse("infer", {"--checkpoint", at / "run", "--score", at / "recall-64", "--score-length", "33"}, {"--score-length 33", "64"});
    at.refuse("infer", {"--checkpoint", at / "run", "--score", ""}, {"--score"});
    at.refuse("infer", {"--checkpoint", at / "run", "--score", at / "missing"}, {at / "missing"});
    at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "bpe", "--train-tokenizer", "300", "--val-fraction", "0.1"});
    at.refuse("infer", {"--checkpoint", at / "run", "--score", at / "bpe"}, {at / "bpe", "257"});
    at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "bpe", "--train-tokenizer", "257", "--val-fraction", "0.1"});
    at.refuse("infer", {"--checkpoint", at / "run", "--score", at / "bpe"}, {at / "bpe", "another tokenizer"});
    at.refuse("infer", {"--checkpoint", at / "run", "--score", at / "recall-64", "--bench"}, {"--score"});
    at.refuse("infer", {"--checkpoint", at / "run", "--score-length", "8"}, {"--score-length", "--score"});
    at.refuse("infer", {"--checkpoint", at / "run", "--score", at / "recall-64", "--temperature", "0"}, {"--temperature", "--score"});
    at.refuse("infer", {"--checkpoint", at / "run", "--score", at / "recall-64", "--samples", "2"}, {"--samples", "--bench"});
    at.refuse("infer", {"--checkpoint", at / "run", "--bench-prompt", "8"}, {"--bench-prompt", "--bench"});
    at.refuse("infer", {"--bench", "--preset", "mamba-tiny", "--bench-prompt=-8"}, {"--bench-prompt -8"});
    const auto refuse_task = [&](const Arguments& flags, const std::vector<std::string>& phrases) {
        at.refuse("data_prep", Arguments{"--output", at / "recall-64"} + flags, phrases);
    };
    refuse_task({"--task", "juggling"}, {"juggling", "recall", "induction", "copying"});
    refuse_task({"--task", "recall", "--task-length", "31"}, {"--task-length 31", "32"});
    refuse_task({"--task", "recall", "--task-examples", "1"}, {"--task-examples 1"});
    refuse_task({"--task", "recall", "--input", at / "text.txt"}, {"--task", "--input"});
    refuse_task({"--task", "recall", "--tokenizer", "bytes"}, {"--task", "--tokenizer"});
    refuse_task({"--task-length", "64", "--input", at / "text.txt"}, {"--task-length", "--task"});
    at.refuse("data_prep", {"--task", "recall"}, {"--output"});
    const std::string json = at / "recall-64/dataset.json", good = read_text(json);
    for (const auto& [key, value] : std::vector<std::pair<std::string, int>>{{"example_tokens", 0}, {"answer_mark", 257}, {"answer_mark", -2}}) {
        Json about = Json::parse(good);
        about[key] = value;
        write_text(json, about.dump());
        at.refuse("train", Arguments{"--data", at / "recall-64", "--out", at / "bad", "--seq-len", "64"} + kModel, {json, key, std::to_string(value)});
    }
}

static bool skips_python(const char* what) {
    const bool skips = sanitized() || system("python3 -c '' 2> /dev/null") != 0;
    if (skips) printf("skipped: %s (no python3, or under AddressSanitizer, which takes too long)\n", what);
    return skips;
}
// Runs a tool where there is a docs/replication; its output goes to files out and err.
static int run_tool(const Workplace& at, const std::string& before, const std::string& tool, const std::string& flags) {
    const std::string programs = fs::path(program("train")).parent_path().string();
    const std::string command = "cd '" + at.path.string() + "' && PROGRAMS_DIR='" + programs + "' " + before + " '" + fs::absolute(tool).string() + "' " + flags +
                                " > out 2> err";
    return WEXITSTATUS(system(command.c_str()));
}
static void refuse_tool(const Workplace& at, const std::string& tool, const std::string& flags, const std::string& phrase) {
    CHECK(run_tool(at, "", tool, flags) == 1);
    const std::string said = read_text(at / "err");
    INFO(said << "expected: " << phrase);
    CHECK(said.starts_with("error: "));
    CHECK(said.find('\n') == said.size() - 1);
    CHECK(said.find(phrase) != std::string::npos);
}

TEST_CASE("experiments that are stopped go on, those that are done are left alone, and come out again bit for bit") {
    if (skips_python("tools/replicate.py")) return;
    const Workplace at;
    fs::create_directories(at / "docs/replication");
    write_text(at / "docs/replication/experiments.ini",
               "[DEFAULT]\nseeds = 1 2\ndata = recall-32\nscore = recall-32 recall-64\n"
               "run = --batch 4 --seq-len 32 --steps 1500 --lr 1e-2\nmeanwhile = --eval-every 500 --eval-tokens 512 --save-every 20\n"
               "[one/mamba]\nflags = --layers M --d-model 16\n[two/conba]\nflags = --layers CE --d-model 16\ngains = 32 64\n"
               "[three]\nseeds = 1\ndecode = 1:8 2:8\nflags = --preset mamba-tiny\n");
    const auto replicate = [&](const std::string& before, const std::string& flags) { return run_tool(at, before, "tools/replicate.py", flags); };
    int stopped = 0;
    while (replicate("timeout -s INT " + std::to_string(2 + stopped), "one two") != 0) {
        INFO(read_text(at / "err"));
        REQUIRE(read_text(at / "err").starts_with("interrupted"));
        REQUIRE(++stopped < 20);
    }
    CHECK(stopped > 0);
    const std::string one = read_text(at / "docs/replication/results/one.jsonl"), two = read_text(at / "docs/replication/results/two.jsonl");
    for (const std::string& lines : {one, two}) CHECK(std::count(lines.begin(), lines.end(), '\n') == 2);
    const Json line = Json::parse(two.substr(0, two.find('\n')));
    CHECK(line.at("steps") == 1500);
    CHECK(line.at("validation").size() == 3);
    CHECK(line.at("score").at("recall-64").at("loss") > 0);
    CHECK(line.at("gains").size() == 2);
    CHECK(line.at("expert_load").size() == line.at("loss").size());
    CHECK(replicate("", "--again 1 one two") == 0);
    const std::string again = read_text(at / "out");
    CHECK(again.find("one/mamba, seed 1: the same bits") != std::string::npos);
    CHECK(again.find("two/conba, seed 1: the same bits") != std::string::npos);
    CHECK(replicate("", "") == 0);  // what is left is the third
    CHECK(read_text(at / "out").starts_with("1/1  three, seed 1: measured"));
    CHECK(replicate("", "") == 0);
    CHECK(read_text(at / "out").starts_with("all of it is done"));
    CHECK(read_text(at / "docs/replication/results/one.jsonl") == one);
    CHECK(Json::parse(read_text(at / "docs/replication/results/three.jsonl")).at("points").size() == 2);
    const auto refuse = [&](const std::string& flags, const std::string& phrase) { refuse_tool(at, "tools/replicate.py", flags, phrase); };
    refuse("one four", "no experiment of docs/replication/experiments.ini begins with four");
    refuse("one --again 3", "one/mamba: no result of seed 3");
    refuse("--again 1", "which experiments");
    refuse("--again 1 three", "three: is timed");
    refuse("\"\"", "begins with ''");
    refuse("--list --smoke", "not allowed with");
    const std::string results = at / "docs/replication/results/one.jsonl", ini = at / "docs/replication/experiments.ini", experiments = read_text(ini);
    for (const std::string bad : {"{\"name\":\"one/mamba\",\"seed\":1", "garbage", "", "[1]", "{\"name\":\"one/mamba\",\"definition\":\"\"}"}) {
        write_text(results, one + bad + "\n");
        refuse("--list", "one.jsonl, line 3: ");
    }
    write_text(results, one.substr(0, one.find("\"data\":\"") + 8) + "0" + one.substr(one.find("\"data\":\"") + 8));
    write_text(ini, experiments + "[one/other]\nflags = --layers M --d-model 8\n");
    refuse("one/other", "another version of the texts");
    write_text(results, one);
    for (const auto& [line, phrase] : std::vector<std::pair<std::string, std::string>>{
             {"run = %(run)s", "wants run, which wants itself"}, {"run = --steps %(stepps)s", "wants stepps, which nothing says"}, {"stepps = 5", "stepps is no key"},
             {"run = --steps %(seeds", "run cannot be"}, {"seeds = 1 x", "seeds cannot be '1 x'"}, {"seeds =", "seeds cannot be"}, {"seeds = 1 1", "a seed twice"},
             {"data = french", "data cannot be 'french'"}, {"decode = 2048", "decode cannot be '2048'"}, {"gains = x", "gains cannot be"},
             {"flags = --layers 'M", "No closing quotation"}, {"flags", "experiments.ini"}}) {
        write_text(ini, experiments + "[four]\n" + (line.starts_with("flags") ? "" : "flags = --layers M\n") + line + "\n");
        refuse("--list", phrase);
    }
    write_text(ini, "[one]\nflags = --layers M\nseeds = 1\n");
    refuse("--list", "wants data");
    fs::remove(ini);
    refuse("--list", "experiments.ini: No such file");
}

TEST_CASE("the pages of experiments are what their results say") {
    if (skips_python("tools/report.py")) return;
    const Workplace at;
    fs::create_directory(at / "docs");
    const auto restore = [&] {
        fs::remove_all(at / "docs/replication");
        fs::copy("docs/replication", at / "docs/replication", fs::copy_options::recursive);
        for (const char* page : {"README.md", "docs/replication.md"}) fs::copy_file(page, at / page, fs::copy_options::overwrite_existing);
    };
    const auto refuse_after = [&](const std::string& command, const std::string& phrase) {
        INFO(command);
        restore();
        CHECK(system(("cd '" + at.path.string() + "' && " + command).c_str()) == 0);
        refuse_tool(at, "tools/report.py", "--check", phrase);
    };
    restore();
    CHECK(run_tool(at, "", "tools/report.py", "--check") == 0);
    refuse_after("sed -i '0,/± 0.0/s//± 0.1/' docs/replication.md", "docs/replication.md is not what the results say");
    refuse_after("sed -i '/<!-- headline -->/,$s/± 0.0/± 0.1/' README.md", "README.md is not what the results say");
    CHECK(run_tool(at, "", "tools/report.py", "") == 0);  // writes what it has refused
    CHECK(run_tool(at, "", "tools/report.py", "--check") == 0);
    refuse_after("sed -i '/<!-- five -->/d' docs/replication.md", "<!-- five --> and <!-- /five -->");
    refuse_after("rm docs/replication/five.svg", "five.svg is missing");
    refuse_after("truncate -s 300 docs/replication/five.svg", "five.svg is missing or damaged");
    refuse_after("sed -i '1s/\"validation\".*\\]\\]/\"validation\":[[3000,4.5]]/' docs/replication/results/five.jsonl", "is not what the results say");
    refuse_after("sed -i '2s/\"data\":\"/&0/' docs/replication/results/five.jsonl", "of other tokens");
    refuse_after("echo garbage >> docs/replication/results/five.jsonl", "five.jsonl, line");
    refuse_after("sed -i '1s/\"parameters\"/\"parametres\"/' docs/replication/results/five.jsonl", "parameters is missing or damaged");
    refuse_after("sed -i '1s/\"validation\".*/\"validation\":[[3000,NaN]]}/' docs/replication/results/five.jsonl", "validation is missing or damaged");
    refuse_after("sed -i '2d' docs/replication/results/recall.jsonl", "1 are missing, the first recall/");
    refuse_after("sed -i '/^\\[five\\/mamba\\]/,/^flags/s/48/56/' docs/replication/experiments.ini", "defines otherwise");
}

TEST_CASE("data_prep refuses bad input") {
    const Workplace at;
    write_text(at / "text", prose(5000));
    write_text(at / "empty", "");
    write_text(at / "binary", std::string("PK\3\4\0\0", 6));
    fs::create_directory(at / "nothing");
    const std::string text = at / "text", out = at / "out";
    auto refuse = [&](const Arguments& arguments, const std::vector<std::string>& phrases) { at.refuse("data_prep", arguments, phrases); };
    refuse({"--output", out}, {"--input"});
    refuse({"--input", text}, {"--output"});
    refuse({"--input", at / "missing", "--output", out}, {at / "missing", "No such file"});
    refuse({"--input", at / "empty", "--output", out}, {at / "empty", "is empty"});
    refuse({"--input", "-", "--output", out}, {"standard input is empty"});
    refuse({"--input", at / "nothing", "--output", out}, {"no files in"});
    fs::create_symlink("nowhere", at / "nothing/link.txt");
    refuse({"--input", at / "nothing", "--output", out}, {"nothing/link.txt", "a link to nothing"});
    refuse({"--input", at / "binary", "--output", out}, {at / "binary", "not text"});
    refuse({"--input", text, "--output", text}, {"cannot create directory"});
    for (const char* bad : {"0.6", "-0.1", "-.1", "nan", "-nan", "inf"})
        refuse({"--input", text, "--output", out, "--val-fraction", bad}, {"--val-fraction", "0 to 0.5"});
    for (const char* bad : {"x", "0.1x", "0,1", "1e999", "1e-999", "", " "})
        refuse({"--input", text, "--output", out, "--val-fraction", bad},
               {"--val-fraction", std::string("'") + bad + "' is not a number"});
    refuse({"--input", text, "--output", out, "--tokenizer", "words"}, {"words", "No such file"});
    for (const char* bad : {"0", "-1"})
        refuse({"--input", text, "--output", out, "--shard-tokens", bad}, {"--shard-tokens", bad, "at least 1"});
    for (const char* bad : {"3000000000", "9223372036854775808", "99999999999999999999", "10x", "0x10", "1e6", "1.5", "nan", ""})
        refuse({"--input", text, "--output", out, "--shard-tokens", bad},
               {"--shard-tokens", std::string("'") + bad + "' is not a whole number"});
    for (const char* flag : {"--val-fraction", "--shard-tokens"}) {
        refuse({"--input", text, "--output", out, flag}, {flag, "with its value"});
        refuse({"--input", text, "--output", out, flag, "0", flag, "0"}, {flag, "given once"});
    }
    refuse({"--input", text, "--output", out, "--shuffle", "7"}, {"error: --shuffle: no flag"});
    const std::string gz = at / "text.gz";
    gzFile file = gzopen(gz.c_str(), "wb");
    const std::string long_text = prose(200000);
    gzwrite(file, long_text.data(), unsigned(long_text.size()));
    gzclose(file);
    const std::string whole = read_text(gz);
    write_text(gz, whole.substr(0, whole.size() / 2));
    refuse({"--input", gz, "--output", out}, {gz, "truncated"});
    std::string damaged = whole;
    damaged[damaged.size() - 6] ^= 1;  // its checksum
    write_text(gz, damaged);
    refuse({"--input", gz, "--output", out}, {gz});
    CHECK(!fs::exists(out));  // nothing is left of what failed halfway
    fs::create_directory(at / "texts");
    write_text(at / "texts/a", prose(5000));
    for (const char* loop : {"loop", "texts/loop"}) {
        unreadable(at / loop);
        refuse({"--input", fs::path(at / loop).parent_path() == at.path ? at / loop : at / "texts", "--output", out}, {loop, kLoop});
    }
    if (geteuid() != 0) {
        fs::permissions(text, fs::perms::none);
        refuse({"--input", text, "--output", out}, {"Permission denied"});
    }
}

TEST_CASE("data_prep on a full disk leaves the earlier shards") {
    const Workplace at;
    make_data(at);
    const std::vector<int> before = read_tokens(at / "data", "train");
    const std::vector<std::string> names = files(at / "data");
    write_text(at / "more.txt", prose(300000));
    at.refuse("data_prep", {"--input", at / "more.txt", "--output", at / "data", "--shard-tokens", "100000"},
              {"cannot write", "train_000000.bin"}, {.file_bytes = 150000});
    CHECK(files(at / "data") == names);
    CHECK(read_tokens(at / "data", "train") == before);
}

// ---- train: repeatability

TEST_CASE("the same run twice gives the same bits") {
    const Workplace at;
    make_data(at);
    for (const char* out : {"a", "b"}) at.succeed("train", train_flags(at, out, 8) + Arguments{"--eval-every", "4"});
    check_same_checkpoint(at / "a", at / "b", 8);
    CHECK(losses(at / "a", "val").size() == 2);
    CHECK(losses(at / "a", "val") == losses(at / "b", "val"));
    at.succeed("train", train_flags(at, "c", 8) + Arguments{"--seed", "2"});
    CHECK(losses(at / "c") != losses(at / "a"));
}

TEST_CASE("validation is over the same tokens, however they are batched") {
    const Workplace at;
    make_data(at);
    const int64_t windows = (int64_t(read_tokens(at / "data", "val").size()) - 1) / 32;
    REQUIRE(windows > 50);
    int runs = 0;
    auto validation = [&](const char* batch, const Arguments& more) {
        const std::string out = "run" + std::to_string(runs++);
        at.succeed("train", Arguments{"--data", at / "data", "--out", at / out, "--steps", "1", "--lr", "0", "--seq-len", "32",
                                      "--peak-flops", "1e11", "--batch", batch} + kModel + more);
        const std::vector<double> loss = losses(at / out, "val");
        REQUIRE(loss.size() == 1);
        return loss[0];
    };
    auto same = [&](double a, double b) { return std::abs(a - b) < 1e-4 * a; };
    const double all = validation("1", {});
    CHECK(same(validation("4", {}), all));
    CHECK(same(validation("7", {"--grad-accum", "2"}), all));
    CHECK(same(validation("200", {}), all));  // more than there are
    CHECK(same(validation("4", {"--eval-tokens", std::to_string(32 * windows)}), all));
    // So many tokens, in whole windows.
    const double three = validation("1", {"--eval-tokens", "96"});
    CHECK(three != all);
    CHECK(same(validation("2", {"--eval-tokens", "96"}), three));
    CHECK(same(validation("16", {"--eval-tokens", "65"}), three));
    CHECK(validation("1", {"--eval-tokens", "64"}) != three);
}

TEST_CASE("an epoch sees every window once, in an order of its own") {
    const Workplace at;
    write_text(at / "text.txt", prose(32 * 37));
    at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "data", "--val-fraction", "0"});
    // At a learning rate of 0, losses tell windows apart.
    at.succeed("train", {"--data", at / "data", "--out", at / "run", "--layers", "M", "--d-model", "16", "--batch", "1", "--seq-len", "32",
                         "--lr", "0", "--steps", "74", "--peak-flops", "1e11"});
    const std::vector<double> all = losses(at / "run");
    REQUIRE(all.size() == 74);
    std::vector<double> first(all.begin(), all.begin() + 37), second(all.begin() + 37, all.end());
    CHECK(first != second);
    std::sort(first.begin(), first.end());
    std::sort(second.begin(), second.end());
    CHECK(first == second);
    CHECK(std::adjacent_find(first.begin(), first.end()) == first.end());
}

TEST_CASE("Ctrl-C saves, and resuming equals never having stopped") {
    const Workplace at;
    make_data(at);
    const Arguments more = {"--eval-every", "50", "--grad-accum", "2"};
    at.succeed("train", train_flags(at, "whole", 200) + more);
    const Limits interrupt{.meanwhile = [&](pid_t child) {
        for (int i = 0; i < 2000 && read_text(at / "parts/log.jsonl").find("\"step\":20,") == std::string::npos; i++)
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
        kill(child, SIGINT);
    }};
    const Result stopped = at.succeed("train", train_flags(at, "parts", 200) + more, interrupt);
    CHECK(stopped.out.find("stopped after step") != std::string::npos);
    CHECK(stopped.out.find("--resume") != std::string::npos);
    const size_t steps = losses(at / "parts").size();
    CHECK(steps >= 20);
    REQUIRE(steps < 200);
    at.succeed("train", {"--data", at / "data", "--out", at / "parts", "--resume", "--eval-every", "50", "--peak-flops", "1e11"});
    check_same_checkpoint(at / "whole", at / "parts", 200);
    CHECK(losses(at / "whole", "val") == losses(at / "parts", "val"));
    CHECK(at.succeed("train", {"--data", at / "data", "--out", at / "parts", "--resume"}).out.find("complete") != std::string::npos);
}

TEST_CASE("plain loops, and the CUDA kernels run on the CPU, train and sample as the CPU's fast layers do") {
    const Workplace at;
    make_data(at);
    std::vector<std::string> devices = {"cpu", "plain", "simt"};
    const Result probe = at.run("train", {"--dry-run", "--preset", "mamba-tiny", "--device", "simt"});
    if (probe.err.find("this build has") != std::string::npos) {
        printf("skipped: --device simt, which builds by nvcc do not have\n");
        devices.pop_back();
    }
    std::vector<double> curves[3];
    std::string texts[3];
    double tolerance = 1e-5;
    for (size_t i = 0; i < devices.size(); i++) {
        const std::string out = at / devices[i];
        at.succeed("train", train_flags(at, devices[i], 2) + Arguments{"--device", devices[i]});
        const Json run = read_log(out, "run").at(0);
        CHECK(run.at("device") == devices[i]);
        if (run.at("precision") == "bf16") tolerance = 1e-2;
        curves[i] = losses(out);
        for (double loss : losses(out, "val")) curves[i].push_back(loss);
        REQUIRE(curves[i].size() == 3);
        texts[i] = at.succeed("infer", {"--checkpoint", at / "cpu", "--device", devices[i], "--temperature", "0", "--tokens", "40",
                                        "--prompt", "the river"}).out;
    }
    CHECK(texts[0].size() > strlen("the river"));
    for (size_t device = 1; device < devices.size(); device++) {
        for (int i = 0; i < 3; i++) {
            INFO(devices[device] << ": " << curves[0][i] << " " << curves[device][i]);
            CHECK(std::abs(curves[device][i] - curves[0][i]) <= tolerance * curves[0][i]);
        }
        INFO(devices[device]);
        CHECK((texts[0] == texts[device]));  // in parentheses: they are not always printable
    }
}

TEST_CASE("token files of version 2 train as those of version 1") {
    const Workplace at;
    make_data(at);
    at.succeed("train", train_flags(at, "narrow", 2));
    for (const char* split : {"train", "val"}) {
        const std::vector<int> tokens = read_tokens(at / "data", split);
        int32_t header[256] = {20240520, 2, int32_t(tokens.size())};
        std::string file(reinterpret_cast<const char*>(header), sizeof(header));
        for (const uint32_t token : tokens) file.append(reinterpret_cast<const char*>(&token), sizeof(token));
        write_text(at / ("data/" + std::string(split) + "_000000.bin"), file);
    }
    at.succeed("train", train_flags(at, "wide", 2));
    check_same_checkpoint(at / "narrow", at / "wide", 2);
    CHECK(losses(at / "narrow", "val").size() == 1);
    CHECK(losses(at / "narrow", "val") == losses(at / "wide", "val"));
    // A token is all of its 32 bits.
    const std::string shard = at / "data/train_000000.bin";
    std::string file = read_text(shard);
    const uint32_t token = 1 << 16 | 'a';
    memcpy(file.data() + 1024 + 4 * 1234, &token, sizeof(token));
    write_text(shard, file);
    at.refuse("train", train_flags(at, "run", 300) + Arguments{"--save-every", "0"}, {shard, "token 1234 is 65633", "257"});
}

TEST_CASE("a constant schedule can be prolonged") {
    const Workplace at;
    make_data(at);
    const Arguments constant = {"--schedule", "constant", "--warmup", "3"};
    at.succeed("train", train_flags(at, "whole", 12) + constant);
    at.succeed("train", train_flags(at, "parts", 7) + constant);
    at.succeed("train", train_flags(at, "parts", 12) + constant + Arguments{"--resume"});
    check_same_checkpoint(at / "whole", at / "parts", 12);
    at.refuse("train", train_flags(at, "parts", 11) + constant + Arguments{"--resume"}, {"--steps", "11", "12"});
}

TEST_CASE("resuming says when the bits will differ") {
    const Workplace at;
    make_data(at);
    int steps = 1;
    auto says_so = [&](const char* threads, const Arguments& resume) {
        const Arguments flags = train_flags(at, "run", ++steps) + Arguments{"--schedule", "constant"} + resume;
        return at.succeed("train", flags, {.threads = threads}).out.find("not to the bit") != std::string::npos;
    };
    CHECK(!says_so("2", {}));
    CHECK(!says_so("2", {"--resume"}));
    CHECK(says_so("1", {"--resume"}));
    CHECK(!says_so("1", {"--resume"}));
    // An older checkpoint does not say on what it was written: only the promise of the same bits needs that.
    const std::string path = at / "run/model.safetensors";
    change_header(path, read_text(path), [](Json& header) { CHECK(header["__metadata__"].erase("machine") == 1); });
    const std::string out = at.succeed("train", train_flags(at, "run", ++steps) + Arguments{"--schedule", "constant", "--resume"}).out;
    CHECK(out.find("does not say on what it was written") != std::string::npos);
    CHECK(losses(at / "run").size() == size_t(steps));
}

TEST_CASE("one training at a time in a directory") {
    const Workplace at, other;
    make_data(at);
    const std::string log = at / "run/log.jsonl";
    // While the first training runs, no other can, new or resumed; and it ends as only kill -9 can end it.
    auto first = [&](const Arguments& more, const std::function<bool()>& underway) {
        const Limits limits{.meanwhile = [&](pid_t child) {
            for (int i = 0; i < 4000 && !underway(); i++) std::this_thread::sleep_for(std::chrono::milliseconds(5));
            CHECK(underway());
            for (const Arguments& resume : {Arguments{}, Arguments{"--resume"}})
                other.refuse("train", train_flags(at, "run", 1000000) + Arguments{"--schedule", "constant"} + resume,
                             {at / "run", "another training is running"});
            kill(child, SIGKILL);
        }};
        CHECK(at.run("train", train_flags(at, "run", 1000000) + Arguments{"--schedule", "constant"} + more, limits).code == -SIGKILL);
    };
    first({"--save-every", "0"}, [&] { return read_text(log).find("\"step\":2,") != std::string::npos; });
    CHECK(!fs::exists(at / "run/model.safetensors"));
    first({"--save-every", "1"}, [&] { return fs::exists(at / "run/model.safetensors"); });
    const Arguments briefly = {"--schedule", "constant", "--max-minutes", "1e-9"};
    const Result resumed = at.succeed("train", train_flags(at, "run", 1000000) + briefly + Arguments{"--resume"});
    CHECK(resumed.out.find("stopped after step") != std::string::npos);
    for (const std::string& name : files(at / "run"))  // none is there for the lock
        CHECK((name == "log.jsonl" || name == "config.json" || name.starts_with("tokenizer") || name == "model.safetensors" ||
               name.starts_with("optimizer-")));
}

TEST_CASE("kill -9 at any time leaves a checkpoint that resumes") {
    const Workplace at;
    make_data(at);
    const Arguments often = {"--save-every", "1", "--eval-every", "0"};
    const int steps = 150;
    at.succeed("train", train_flags(at, "whole", steps) + often);
    auto flags = [&] {
        const bool resume = fs::exists(at / "parts/model.safetensors");
        return train_flags(at, "parts", steps) + often + (resume ? Arguments{"--resume"} : Arguments{});
    };
    auto saving = [&](const std::string& name) {
        std::error_code ignored;
        for (const auto& entry : fs::directory_iterator(at / "parts", ignored)) {
            const std::string found = entry.path().filename().string();
            if (found.starts_with(name) && found.ends_with(".safetensors.tmp")) return true;
        }
        return false;
    };
    auto steps_logged = [&] {
        const std::string text = read_text(at / "parts/log.jsonl");
        return std::count(text.begin(), text.end(), '\n');
    };
    int kills = 0, inside = 0;
    for (int round = 0; round < 12; round++) {
        // Of four rounds one ends while the optimizer is being saved, one while the model is, two some steps and a bit later.
        const std::string name = round % 4 == 1 ? "optimizer-" : round % 4 == 3 ? "model" : "";
        const auto enough = steps_logged() + 2 + round % 5;
        const Limits limits{.meanwhile = [&](pid_t child) {
            auto running = [&] {
                siginfo_t info{};
                return waitid(P_PID, id_t(child), &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == 0;
            };
            if (name.empty()) {
                while (running() && steps_logged() < enough) std::this_thread::sleep_for(std::chrono::milliseconds(1));
                std::this_thread::sleep_for(std::chrono::microseconds(700 * round));
            }
            while (!name.empty() && running()) {
                if (!saving(name)) continue;
                kill(child, SIGSTOP);  // and look again: it may have gone on
                siginfo_t info{};
                waitid(P_PID, id_t(child), &info, WEXITED | WSTOPPED | WNOWAIT);
                if (saving(name)) break;
                kill(child, SIGCONT);
            }
            kill(child, SIGKILL);
        }};
        const Result result = at.run("train", flags(), limits);
        INFO(result.err);
        REQUIRE((result.code == -SIGKILL || result.code == 0));
        if (result.code == 0) break;
        kills++;
        inside += saving("");
    }
    printf("kill -9: %d, of which %d within a save\n", kills, inside);
    CHECK(kills >= 3);
    CHECK(inside >= 2);
    at.succeed("train", flags());
    check_same_checkpoint(at / "whole", at / "parts", steps);
    CHECK(files(at / "parts") == files(at / "whole"));
}

TEST_CASE("train on a full disk leaves the earlier checkpoint") {
    const Workplace at;
    make_data(at);
    const Arguments constant = {"--schedule", "constant"};
    at.succeed("train", train_flags(at, "run", 3) + constant);
    const std::string model = read_text(at / "run/model.safetensors"), optimizer = read_text(at / "run/optimizer-3.safetensors");
    const std::vector<std::string> names = files(at / "run");
    const Arguments on = train_flags(at, "run", 6) + constant + Arguments{"--resume"};
    for (const size_t limit : {optimizer.size() / 2, model.size() / 2}) {  // the model would fit; neither would
        at.refuse("train", on, {"cannot write", "safetensors"}, {.file_bytes = limit});
        CHECK(files(at / "run") == names);
        CHECK(read_text(at / "run/model.safetensors") == model);
        CHECK(read_text(at / "run/optimizer-3.safetensors") == optimizer);
    }
    // The new optimizer fits, the model after it does not: a directory is in the way of its temporary file.
    fs::create_directory(at / "run/model.safetensors.tmp");
    at.refuse("train", on, {"cannot write", "model.safetensors"});
    fs::remove(at / "run/model.safetensors.tmp");
    CHECK(files(at / "run") == names);
    CHECK(read_text(at / "run/model.safetensors") == model);
    at.succeed("train", on);
    at.succeed("train", train_flags(at, "whole", 6) + constant);
    check_same_checkpoint(at / "whole", at / "run", 6);
}

TEST_CASE("a loss or gradient that is not finite stops before the update, and what an update has ruined is not saved") {
    const Workplace at;
    make_data(at);
    at.refuse("train", train_flags(at, "ruined", 12, "1e30") + Arguments{"--save-every", "1"},
              {"step 1: after its update the loss is", "not saved", "no checkpoint yet", "--lr"});
    CHECK(files(at / "ruined") == std::vector<std::string>{"config.json", "log.jsonl", "tokenizer.json", "tokenizer_config.json"});

    const std::string path = at / "run/model.safetensors";
    const Arguments on = train_flags(at, "run", 4) + Arguments{"--schedule", "constant"};
    at.succeed("train", train_flags(at, "run", 2) + Arguments{"--schedule", "constant"});
    std::string model = read_text(path);
    uint64_t header_bytes;
    memcpy(&header_bytes, model.data(), 8);
    const std::string tensor = "backbone.norm_f.weight";
    const int64_t at_tensor = Json::parse(model.substr(8, header_bytes)).at(tensor).at("data_offsets")[0];
    std::fill_n(&model[8 + header_bytes + at_tensor], sizeof(double), '\xff');  // NaNs
    write_text(path, model);
    at.refuse("train", on + Arguments{"--resume"},
              {"step 3: loss", "before the update", "First bad tensor: weight of " + tensor, "checkpoint of step 2"});
    CHECK(losses(at / "run").size() == 2);
    CHECK((read_text(path) == model));
    CHECK(files(at / "run") == std::vector<std::string>{"config.json", "log.jsonl", "model.safetensors", "optimizer-2.safetensors",
                                                        "tokenizer.json", "tokenizer_config.json"});
    at.refuse("infer", {"--checkpoint", at / "run", "--prompt", "the"}, {"not finite"});
}

// ---- train: presets and flags

TEST_CASE("a dry run of every preset takes no memory") {
    const rlim_t limit = sanitized() ? RLIM_INFINITY : rlim_t(2) << 30;
    const Workplace at;
    std::istringstream list(at.succeed("train", {"--list-presets"}).out);
    int count = 0;
    for (std::string line; std::getline(list, line); count++) {
        const std::string name = line.substr(0, line.find(' '));
        const std::string out = at.succeed("train", {"--dry-run", "--preset", name}, {.memory_bytes = limit}).out;
        for (const char* part : {"parameters", "gradients", "optimizer", "activations", "KV cache", "1024K"})
            CHECK(out.find(part) != std::string::npos);
    }
    CHECK(count >= 20);
    // The published mamba-130m has 129,135,360.
    const std::string published = at.succeed("train", {"--dry-run", "--preset", "mamba-130m"}).out;
    CHECK(published.find("parameters   129.14 M, active") != std::string::npos);
    CHECK(list.str().find("129.14 M parameters") != std::string::npos);
    // Of them 50,280 x 768 are the embedding, which is the head too and counts once.
    CHECK(published.find("129.14 M, 90.52 M active without embedding and head") != std::string::npos);
    CHECK(list.str().find("90.52 M active without embedding and head") != std::string::npos);
    for (const char* published : {"46.70 G parameters,   12.88 G active", "51.57 G parameters,   12.11 G active",  // Mixtral, Jamba
                                  "53.04 G parameters,   13.58 G active", " 6.74 G parameters,", "68.98 G parameters,",    // MixCon, Llama 2
                                  "25.17 M active without embedding and head  arXiv 2401.04081"})                   // Transformer
        CHECK(list.str().find(published) != std::string::npos);
    // Contexts. Papers: 32 GiB, 4 GiB, 2 GiB and 128 GiB at 256K.
    const std::string beside = at.succeed("train", {"--dry-run", "--compare", "mixtral-8x7b,jamba-v0.1,mamba-130m,mixcon,mixcon-2kv,llama-2-7b",
                                                      "--memory", "120GB"}).out;
    std::istringstream rows(beside);
    std::map<std::string, std::vector<std::string>> columns;  // by the first word or two of a row
    for (std::string row; std::getline(rows, row);) {
        if (row.size() < 28) continue;
        std::istringstream words(row.substr(28));
        std::vector<std::string>& cells = columns[row.substr(2, row.find("  ", 6) - 2)];
        for (std::string word, unit; words >> word;) cells.push_back(words >> unit ? word + " " + unit : word);
    }
    CHECK(columns["  at 256K"] == std::vector<std::string>{"32.00 GiB", "4.00 GiB", "0 B", "8.00 GiB", "2.00 GiB", "128.00 GiB"});
    CHECK(columns["  at 1K"] == std::vector<std::string>{"128.00 MiB", "16.00 MiB", "0 B", "32.00 MiB", "8.00 MiB", "512.00 MiB"});
    const double mixtral = (120e9 - 46.70e9 * 2) / (128 << 10), jamba = (120e9 - 51.57e9 * 2 - 33.25 * 1048576) / (16 << 10);
    const std::vector<std::string> longest = columns["tokens in 111.76 GiB"];
    REQUIRE(longest.size() >= 2);
    CHECK(std::fabs(std::stod(longest[0]) / (mixtral / 1e3) - 1) < 0.01);
    CHECK(std::fabs(std::stod(longest[1]) / (jamba / 1e6) - 1) < 0.01);
    CHECK(beside.find(" any ") != std::string::npos);
    const std::string small = at.succeed("train", {"--dry-run", "--preset", "mixtral-8x7b", "--bits", "8"}).out;
    CHECK(small.substr(std::min(small.find("at 256K"), small.size())).find(" 16.00 GiB\n") < 45);
    // Sizes that a preset derives follow from the flags that change it.
    const std::string changed = at.succeed("train", {"--dry-run", "--preset", "moe-mamba-tiny", "--d-model", "32", "--experts", "16"}).out;
    const std::string same = at.succeed("train", {"--dry-run", "--layers", "ME*4", "--d-model", "32", "--experts", "16"}).out;
    CHECK(changed == same);
}

TEST_CASE("train refuses bad flags") {
    const Workplace at;
    make_data(at);
    const Arguments place = {"--data", at / "data", "--out", at / "run"};
    auto refuse = [&](const Arguments& arguments, const std::vector<std::string>& phrases) { at.refuse("train", arguments, phrases); };
    refuse(place, {"--preset", "--layers"});
    refuse(kModel + Arguments{"--out", at / "run"}, {"--data"});
    refuse(kModel + Arguments{"--data", at / "data"}, {"--out"});
    refuse(place + Arguments{"--preset", "gpt-5"}, {"gpt-5", "moe-mamba-tiny"});
    refuse(place + kModel + Arguments{"--dropout", "0.1"}, {"--dropout"});
    refuse(place + Arguments{"--layers", "MX"}, {"--layers", "'X'"});
    refuse(place + Arguments{"--layers", ""}, {"--layers"});
    refuse(place + Arguments{"--layers", "M(E"}, {"--layers", "'('"});
    refuse(place + Arguments{"--layers", "M*0"}, {"--layers", "'*'"});
    for (const char* flag : {"--seq-len", "--batch", "--grad-accum", "--steps", "--d-model", "--eval-tokens"})
        refuse(place + Arguments{"--layers", "M", flag, "0"}, {flag});
    for (const char* flag : {"--lr", "--weight-decay", "--grad-clip", "--save-every", "--eval-every", "--sample-every", "--max-minutes"})
        refuse(place + Arguments{"--layers", "M", std::string(flag) + "=-1"}, {flag});
    refuse(place + kModel + Arguments{"--batch", "many"}, {"--batch", "many"});
    refuse(place + kModel + Arguments{"--batch", "99999999999"}, {"--batch", "in range"});
    refuse(place + kModel + Arguments{"--steps", "2147483647"}, {"--steps", "1e+09"});
    refuse(place + kModel + Arguments{"--seed=-1"}, {"--seed", "'-1'", "from 0"});
    refuse(place + kModel + Arguments{"--seed", "18446744073709551616"}, {"--seed", "in range"});
    refuse(place + kModel + Arguments{"--lr", ""}, {"--lr", "''"});
    refuse(place + kModel + Arguments{"--batch", "1000000", "--seq-len", "100"}, {"--batch"});
    refuse(place + kModel + Arguments{"--beta2", "1"}, {"--beta2"});
    refuse(place + kModel + Arguments{"--lr", "nan"}, {"--lr"});
    refuse(place + kModel + Arguments{"--schedule", "linear"}, {"--schedule", "linear"});
    refuse(place + kModel + Arguments{"--device", "abacus"}, {"--device", "abacus"});
    refuse(place + kModel + Arguments{"--vocab", "256"}, {"--vocab", "257"});
    refuse(place + kModel + Arguments{"--top-k", "9"}, {"--top-k"});
    const Arguments attention = place + Arguments{"--layers", "A", "--d-model", "48"};
    refuse(attention + Arguments{"--heads", "5"}, {"--heads 5", "--d-model 48"});
    refuse(attention + Arguments{"--heads", "3", "--kv-heads", "2"}, {"--kv-heads 2", "--heads 3"});
    const Arguments experts = place + Arguments{"--layers", "ME", "--routing"};
    refuse(experts + Arguments{"random"}, {"--routing random", "expert-choice"});
    refuse(experts + Arguments{"expert-choice", "--top-k", "2"}, {"--routing expert-choice", "--top-k 1"});
    refuse(experts + Arguments{"expert-choice", "--capacity", "0"}, {"--routing expert-choice", "--capacity above 0"});
    refuse(place + Arguments{"--layers", "C", "--conba", ""}, {"--conba", "must be none"});
    refuse(place + Arguments{"--layers", "C", "--conba-sigma", "0.1"}, {"--conba-sigma 0.1", "no noise"});
    for (const char* terms : {" ", "delays", "delay,delay", "delay,", "none,delay", "delay scaling"})
        refuse(place + Arguments{"--layers", "C", std::string("--conba=") + terms},
               {"--conba", "selection,control,delay,scaling,noise,adaptation"});
    refuse(place + Arguments{"--layers", "C", "--conba-tau", "33"}, {"--conba-tau", "32"});
    refuse(place + Arguments{"--layers", "C", "--conba-kappa=-1"}, {"--conba-kappa"});
    refuse(attention + Arguments{"--heads", "4"}, {"--head-dim 12", "multiple of 8"});
    refuse(attention + Arguments{"--head-dim", "264"}, {"--head-dim", "256"});
    refuse(attention + Arguments{"--rope-base", "0.5"}, {"--rope-base 0.5"});
    const Arguments dry = {"--dry-run", "--preset", "jamba-tiny"};
    for (const char* memory : {"80", "GB", "80XB", "-1GB", "80 GB "})
        refuse(dry + Arguments{std::string("--memory=") + memory}, {"--memory", "80GB"});
    refuse(dry + Arguments{"--bits", "4"}, {"--bits 4", "8 or 16"});
    refuse({"--dry-run", "--compare", "jamba-tiny,gpt-5"}, {"gpt-5"});
    refuse({"--dry-run", "--compare", "jamba-tiny,"}, {"--preset"});
    refuse(place + kModel + Arguments{"--memory", "80GB"}, {"--memory", "--dry-run"});
    refuse(place + kModel + Arguments{"--seq-len", "30000"}, {"training data", "--seq-len"});
    refuse(place + kModel + Arguments{"--seq-len", "10000"}, {"validation data", "--seq-len"});
    refuse(place + Arguments{"--resume"}, {"--resume", "no model.safetensors"});
    CHECK(!fs::exists(at / "run/model.safetensors"));

    at.succeed("train", train_flags(at, "run", 3));
    refuse(train_flags(at, "run", 3), {"--resume"});
    const Arguments resume = place + Arguments{"--resume"};
    refuse(resume + Arguments{"--steps", "5"}, {"--steps", "5", "3"});
    refuse(resume + Arguments{"--seed", "2"}, {"--seed"});
    refuse(resume + Arguments{"--d-model", "32"}, {"--d-model", "32", "16"});
    refuse(resume + Arguments{"--preset", "mamba-tiny"}, {"--layers"});
    write_text(at / "text.txt", prose(40000));
    at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "data"});
    refuse(resume, {"training tokens"});
}

TEST_CASE("train refuses bad data") {
    const Workplace at;
    make_data(at);
    const std::string shard = at / "data/train_000000.bin", json = at / "data/dataset.json";
    const std::string good = read_text(shard), good_json = read_text(json);
    auto refuse = [&](const std::vector<std::string>& phrases) { at.refuse("train", train_flags(at, "run", 3), phrases); };
    auto patched = [&](size_t at_byte, const void* value, size_t bytes) {
        std::string text = good;
        memcpy(text.data() + at_byte, value, bytes);
        write_text(shard, text);
    };
    auto header = [&](int field, int32_t value) { patched(field * sizeof(int32_t), &value, sizeof(value)); };
    write_text(shard, "");
    refuse({shard, "0 bytes"});
    write_text(shard, good.substr(0, 1000));
    refuse({shard, "1000 bytes"});
    write_text(shard, good.substr(0, good.size() - 2));
    refuse({shard, "claims"});
    write_text(shard, good + "xx");
    refuse({shard, "claims"});
    write_text(shard, prose(5000));
    refuse({shard, "not a token file"});
    header(1, 3);
    refuse({shard, "version 3"});
    for (const int32_t count : {0, -1, INT32_MAX, INT32_MIN}) {
        header(2, count);
        refuse({shard, "claims " + std::to_string(count)});
    }
    const uint16_t token = 300;
    patched(1024 + 2 * 1234, &token, sizeof(token));  // every epoch draws it, and 300 steps are more than one
    at.refuse("train", train_flags(at, "bad", 300) + Arguments{"--save-every", "0"}, {shard, "token 1234 is 300", "257"});
    fs::remove(shard);
    refuse({"train_*.bin", "0 tokens"});
    fs::create_directory(shard);
    refuse({shard});
    for (const std::string& path : {shard, at / "data/val_000000.bin", json}) {
        const std::string readable = path == shard ? good : read_text(path);
        unreadable(path);
        refuse({path, kLoop});
        fs::remove(path);
        write_text(path, readable);
    }

    fs::remove(json);
    refuse({json, "No such file"});
    fs::create_directory(json);
    refuse({json, "directory"});
    fs::remove(json);
    for (const std::string& text : {std::string(), std::string("not JSON"), std::string("[]"), std::string("{}"),
                                    good_json.substr(0, 40)}) {
        write_text(json, text);
        refuse({json});
    }
    Json changed = Json::parse(good_json);
    changed["tokenizer"]["kind"] = "words";
    write_text(json, changed.dump());
    refuse({json, "words"});
    changed = Json::parse(good_json);
    changed["train_tokens"] = 5;
    write_text(json, changed.dump());
    refuse({"dataset.json says 5"});
    at.refuse("train", Arguments{"--data", at / "missing", "--out", at / "run"} + kModel, {at / "missing"});
    write_text(json, good_json);
    at.refuse("train", train_flags(at, "text.txt", 3), {"text.txt"});
    at.succeed("train", train_flags(at, "run", 3));
}

// ---- infer

TEST_CASE("infer and --resume refuse bad checkpoints and flags") {
    const Workplace at;
    make_data(at);
    at.succeed("train", train_flags(at, "run", 2) + Arguments{"--schedule", "constant"});
    const std::string path = at / "run/model.safetensors", optimizer = at / "run/optimizer-2.safetensors", good = read_text(path);
    const std::string good_optimizer = read_text(optimizer);
    const Arguments infer = {"--checkpoint", at / "run", "--tokens", "1"};
    const Arguments resume = {"--data", at / "data", "--out", at / "run", "--resume", "--steps", "3", "--peak-flops", "1e11"};
    auto refuse_flags = [&](const Arguments& flags, const std::vector<std::string>& phrases) { at.refuse("infer", flags, phrases); };
    auto refuse = [&](const std::vector<std::string>& phrases) {
        at.refuse("infer", infer, phrases);
        at.refuse("train", resume, phrases);
    };
    refuse_flags({}, {"--checkpoint"});
    refuse_flags({"--checkpoint", at / "missing"}, {at / "missing", "No such file"});
    refuse_flags({"--checkpoint", at / "data"}, {"model.safetensors", "No such file"});
    refuse_flags({"--preset", "mamba-tiny"}, {"--bench"});
    refuse_flags({"--bench", "--preset", "mamba-x"}, {"mamba-x"});
    refuse_flags(infer + Arguments{"--temperature=-1"}, {"--temperature"});
    refuse_flags(infer + Arguments{"--temperature", "nan"}, {"--temperature"});
    refuse_flags(infer + Arguments{"--temperature", "1e-40"}, {"--temperature", "0.001"});
    refuse_flags(infer + Arguments{"--top-k=-1"}, {"--top-k"});
    refuse_flags(infer + Arguments{"--top-p", "0"}, {"--top-p"});
    refuse_flags(infer + Arguments{"--top-p", "1.5"}, {"--top-p"});
    refuse_flags(infer + Arguments{"--samples", "0"}, {"--samples"});
    refuse_flags(infer + Arguments{"--samples", "65537"}, {"--samples", "65536"});
    refuse_flags({"--checkpoint", at / "run", "--tokens=-1"}, {"--tokens"});
    refuse_flags(infer + Arguments{"--prompt", "a", "--prompt-file", "b"}, {"--prompt-file"});
    refuse_flags(infer + Arguments{"--prompt-file", at / "missing"}, {at / "missing"});
    refuse_flags(infer + Arguments{"--prompt-file", at / "data"}, {at / "data"});
    refuse_flags(infer + Arguments{"--beam", "4"}, {"--beam"});
    refuse_flags(infer + Arguments{"--device", "abacus"}, {"abacus"});

    uint64_t header_bytes;
    memcpy(&header_bytes, good.data(), 8);
    for (const size_t kept : {size_t(0), size_t(7), size_t(8), size_t(100), size_t(8 + header_bytes), good.size() - 1}) {
        write_text(path, good.substr(0, kept));
        refuse({path});
    }
    write_text(path, prose(5000));
    refuse({path});
    write_text(path, read_text(at / "data/train_000000.bin"));
    refuse({path});
    for (const uint64_t claimed : {UINT64_MAX, uint64_t(1) << 63, header_bytes + 1, uint64_t(2)}) {
        std::string text = good;
        memcpy(text.data(), &claimed, 8);
        write_text(path, text);
        refuse({path});
    }
    // Headers that are JSON but lie, or lack something.
    auto with_header = [&](const std::function<void(Json&)>& change) { change_header(path, good, change); };
    const std::string tensor = "backbone.embeddings.weight";
    with_header([&](Json& h) { h.erase(tensor); });
    refuse({path, tensor});
    with_header([&](Json& h) { h["stranger"] = h[tensor]; });
    refuse({path});
    with_header([&](Json& h) { h[tensor]["shape"] = {2, 2}; });
    refuse({path, tensor});
    with_header([&](Json& h) { h[tensor]["shape"] = {int64_t(1) << 62, 16}; });
    refuse({path});
    with_header([&](Json& h) { h[tensor]["shape"] = {-1, -4224}; });
    refuse({path});
    with_header([&](Json& h) { h[tensor]["data_offsets"] = {0, INT64_MAX}; });
    refuse({path});
    with_header([&](Json& h) { h[tensor]["data_offsets"] = {-8, 16888}; });
    refuse({path});
    with_header([&](Json& h) { h[tensor]["dtype"] = "F8"; });
    refuse({path});
    with_header([&](Json& h) { h[tensor] = 1; });
    refuse({path});
    with_header([](Json& h) { h.erase("__metadata__"); });
    at.succeed("infer", infer);  // of which config.json and tokenizer.json are enough
    at.refuse("train", resume, {path, "\"optimizer\""});
    const std::string config = read_text(at / "run/config.json");
    fs::remove(at / "run/config.json");
    refuse({path, "config"});
    write_text(at / "run/config.json", config);
    with_header([](Json& h) { h["__metadata__"]["config"] = "{}"; });
    refuse({path, "config"});
    with_header([](Json& h) { h["__metadata__"]["tokenizer"] = "{\"kind\": \"words\", \"vocab\": 257, \"end_of_text\": 256}"; });
    at.refuse("infer", infer, {path, "words"});
    for (const char* key : {"training", "step", "optimizer", "train_tokens"}) {
        with_header([&](Json& h) { h["__metadata__"].erase(key); });
        at.refuse("train", resume, {path, key});
        at.succeed("infer", infer);  // which needs none of them
    }
    for (const char* step : {"two", "2x", "0", "-5", "9999"}) {
        with_header([&](Json& h) { h["__metadata__"]["step"] = step; });
        at.refuse("train", resume, {path, "step"});
    }
    fs::remove(path);
    fs::create_directory(path);
    refuse({path});
    unreadable(path);
    refuse({path, kLoop});
    fs::remove(path);
    write_text(path, good);

    unreadable(at / "prompt");
    refuse_flags(infer + Arguments{"--prompt-file", at / "prompt"}, {at / "prompt", kLoop});
    unreadable(optimizer);
    at.refuse("train", resume, {optimizer, kLoop});
    fs::remove(optimizer);
    at.refuse("train", resume, {optimizer, "No such file"});
    write_text(optimizer, good_optimizer.substr(0, good_optimizer.size() / 2));
    at.refuse("train", resume, {optimizer});
    write_text(optimizer, good);
    at.refuse("train", resume, {optimizer});
    write_text(optimizer, good_optimizer);
    at.succeed("train", resume);
    at.succeed("infer", infer);
}

TEST_CASE("infer stops cleanly on Ctrl-C, and benchmarks random weights") {
    const Workplace at;
    make_data(at);
    at.succeed("train", train_flags(at, "run", 1));
    const Limits interrupt{.meanwhile = [&](pid_t child) {
        for (int i = 0; i < 2000 && read_text(at / "stdout").size() < 1000; i++) std::this_thread::sleep_for(std::chrono::milliseconds(5));
        kill(child, SIGINT);
    }};
    // Far more text than the test could wait for.
    const Arguments infer = {"--checkpoint", at / "run", "--tokens", "1000000000"};
    const Result result = at.succeed("infer", infer + Arguments{"--temperature", "0"}, interrupt);
    CHECK(result.out.size() >= 1000);
    CHECK(result.out.ends_with('\n'));
    const Limits interrupt_many{.meanwhile = [&](pid_t child) {
        for (int i = 0; i < 2000 && read_text(at / "stderr").find("tokens\n") == std::string::npos; i++)
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
        kill(child, SIGINT);
    }};
    const Result many = at.succeed("infer", infer + Arguments{"--samples", "5000"}, interrupt_many);
    for (const char* part : {"---- sample 1\n", "\n---- sample 5000\n"}) CHECK(many.out.find(part) != std::string::npos);
    CHECK(many.err.find("of at most 5000000000000 tokens") != std::string::npos);
    const std::string bench = at.succeed("infer", {"--bench", "--preset", "mamba-tiny", "--prompt", "and"}).out;
    for (const char* part : {"state", "prompt", "decode", "memory", "(1 at once", "tokens/s", "GB/s"}) CHECK(bench.find(part) != std::string::npos);
    const std::string long_one = at.succeed("infer", {"--bench", "--preset", "jamba-tiny", "--bench-prompt", "2050", "--samples", "3"}).out;
    // One layer of attention with 2 groups of 24 keys and values each, in 4 bytes, and room for 256 tokens more.
    for (const char* part : {"0.886 MB of keys and values", "of 2306 tokens", "(2050 tokens)", "(3 at once"}) CHECK(long_one.find(part) != std::string::npos);
    const std::string plain = at.succeed("infer", {"--bench", "--checkpoint", at / "run", "--device", "plain"}).out;
    for (const char* part : {"on plain", "(64 tokens)", "decode", "GB/s"}) CHECK(plain.find(part) != std::string::npos);
}

TEST_CASE("multiple choice") {
    const Workplace at;
    make_data(at);
    at.succeed("train", train_flags(at, "run", 80));
    // The right choice is of the words that it was trained on, the others are not; some are long, and one is alone in its batch.
    const std::string text = prose(20000);
    std::string lines;
    const int count = 40;
    for (int i = 0; i < count; i++) {
        const size_t from = size_t(100 + 400 * i), context = i == 7 ? 9000 : size_t(5 * i % 60);
        std::vector<std::string> choices(3, std::string(size_t(10 + i % 7), i % 2 ? 'q' : 'z'));
        choices[size_t(i % 3)] = text.substr(from + context, size_t(8 + i % 9));
        lines += Json({{"context", text.substr(from, context)}, {"choices", choices}, {"label", i % 3}}).dump() + "\n" + (i % 5 ? "" : "\n");
    }
    const std::string path = at / "questions.jsonl";
    write_text(path, lines);
    const Arguments arguments = {"--checkpoint", at / "run", "--choices", path};
    const std::string out = at.succeed("infer", arguments).out;
    for (const char* part : {"by log-probability of the choice: 40 of 40 right, 100.00 %", "by its mean over the tokens: 40 of 40 right"})
        CHECK(out.find(part) != std::string::npos);
    const auto refuse = [&](const std::string& line, const std::vector<std::string>& phrases) {
        write_text(path, lines + line + "\n");
        at.refuse("infer", arguments, phrases + std::vector<std::string>{"questions.jsonl, line 49"});
    };
    refuse("{", {"JSON"});
    refuse(R"({"context": "a", "choices": ["b", "c"]})", {"label"});
    refuse(R"({"context": "a", "choices": ["b", "c"], "label": 2})", {"label", "2"});
    refuse(R"({"context": "a", "choices": ["b", "c"], "label": 0.5})", {"label", "0.5"});
    refuse(R"({"context": "a", "choices": ["b"], "label": 0})", {"two"});
    refuse(R"({"context": "a", "choices": ["b", 1], "label": 0})", {"choices"});
    refuse(R"({"context": "a", "choices": ["b", ""], "label": 0})", {"empty"});
    refuse(R"({"context": 1, "choices": ["b", "c"], "label": 0})", {"context"});
    write_text(path, "\n");
    at.refuse("infer", arguments, {"no questions"});
    at.refuse("infer", arguments + Arguments{"--prompt", "a"}, {"--choices", "no prompt"});
}

TEST_CASE("experts that choose their tokens: trained with a warning, not sampled from") {
    const Workplace at;
    make_data(at);
    const Result trained = at.succeed("train", train_flags(at, "run", 3) + Arguments{"--routing", "expert-choice"});
    CHECK(trained.err.find("warning: with --routing expert-choice") != std::string::npos);
    CHECK(losses(at / "run", "val").size() == 1);
    for (const Json& line : read_log(at / "run", "train")) {
        CHECK(line.at("expert_load") == 1);
        CHECK(line.at("aux") == 0);
    }
    at.refuse("infer", {"--checkpoint", at / "run", "--prompt", "a"}, {"run/model.safetensors", "expert-choice", "not continue a text"});
    at.refuse("train", train_flags(at, "other", 3) + Arguments{"--routing", "expert-choice", "--sample-every", "1"},
              {"--sample-every", "expert-choice"});
}

TEST_CASE("Conba: its gains are in the log, its noise goes on where a run was stopped, sampling goes on from its state") {
    const Workplace at;
    make_data(at);
    const auto flags = [&](const char* out, int steps, const std::string& conba) {
        return Arguments{"--data", at / "data", "--out", at / out, "--steps", std::to_string(steps), "--schedule", "constant",
                         "--layers", "CFCE", "--d-model", "16", "--experts", "4", "--conba", conba, "--conba-sigma", conba.find("noise") == std::string::npos ? "0" : "0.2"} + kSize;
    };
    const std::string noisy = "noise,control,adaptation";  // in another order than they are saved
    const Result whole = at.succeed("train", flags("whole", 4, noisy));
    CHECK(whole.out.find("  gain 0.") != std::string::npos);
    at.succeed("train", flags("parts", 2, noisy));
    at.succeed("train", flags("parts", 4, "control,noise,adaptation") + Arguments{"--resume"});
    check_same_checkpoint(at / "whole", at / "parts", 4);
    at.refuse("train", flags("parts", 5, "control,adaptation") + Arguments{"--resume"}, {"--resume", "--conba", "noise"});
    for (const Json& line : read_log(at / "parts", "train"))
        for (size_t layer : {0, 1}) {
            const double mean = line.at("mean_gains").at(layer), largest = line.at("largest_gains").at(layer);
            CHECK((mean > 0 && mean < largest && largest <= 1));
        }
    at.succeed("train", flags("quiet", 4, "control,adaptation"));
    CHECK(losses(at / "quiet", "train")[0] != losses(at / "whole", "train")[0]);  // of noise alone
    at.succeed("train", flags("none", 1, "none"));
    CHECK(!read_log(at / "none", "train")[0].contains("mean_gains"));
    const Arguments draw = {"--checkpoint", at / "whole", "--prompt", "a", "--tokens", "20", "--seed", "3"};
    CHECK(at.succeed("infer", draw).out == at.succeed("infer", draw + Arguments{"--device", "plain"}).out);
}

// ---- byte-level BPE

static const Json& bpe_reference() {
    static const char* const folder = getenv("MOEMAMBA_ORACLE");
    static const Json all = Json::parse(read_text(fs::path(folder ? folder : "oracle") / "bpe.json"));
    return all;
}
static Bpe bpe_of(const Workplace& at, const Json& tokenizer) {
    write_text(at / "tokenizer.json", tokenizer.dump());
    return Bpe::load(at / "tokenizer.json");
}
static std::string from_hex(const std::string& hex) {
    std::string bytes;
    for (size_t i = 0; i < hex.size(); i += 2) bytes += char(std::stoi(hex.substr(i, 2), nullptr, 16));
    return bytes;
}
static std::vector<int> encode(const Bpe& bpe, const std::string& text) {
    std::vector<int> tokens;
    int64_t replaced = 0;
    bpe.encode(tokens, valid_utf8(text, &replaced));
    return tokens;
}
static std::string decode(const Bpe& bpe, const std::vector<int>& tokens) {
    std::string text;
    for (int token : tokens) text += bpe.pieces.at(token);
    return text;
}

TEST_CASE("byte-level BPE gives the tokens of tiktoken and tokenizers, and these give the text") {
    const Workplace at;
    for (const auto& [tokenizer, tokens] : std::map<std::string, std::string>{{"tokenizer", "tokens"}, {"digits_apart", "digits_apart"}}) {
        const Bpe bpe = bpe_of(at, bpe_reference().at(tokenizer));
        CHECK(bpe.digits_apart == (tokenizer == "digits_apart"));
        for (const Json& one : bpe_reference().at("cases")) {
            const std::string text = from_hex(one.at("text"));
            INFO(one.at("text"));
            const std::vector<int> got = encode(bpe, text);
            CHECK(got == one.at(tokens).get<std::vector<int>>());
            int64_t replaced = 0;
            CHECK(decode(bpe, got) == valid_utf8(text, &replaced));
        }
    }
}

TEST_CASE("a tokenizer that composes characters and has tokens for runs of spaces, as GPT-NeoX's, gives the tokens of tokenizers") {
    const Workplace at;
    const Json& neox = bpe_reference().at("neox");
    const Bpe bpe = bpe_of(at, neox.at("tokenizer"));
    CHECK(bpe.composes);
    CHECK(bpe.spaces.size() == 5);
    for (const Json& one : neox.at("cases")) {
        INFO(one.at("text"));
        CHECK(encode(bpe, from_hex(one.at("text"))) == one.at("tokens").get<std::vector<int>>());
    }
}

TEST_CASE("a text that is cut between two words has the same tokens") {
    const Workplace at;
    const char* const parts[] = {"a", "b", "'s", "'", " ", "  ", "\n", "\r\n", "\t", "1", "!", "é", "\u3000", "\u00a0", "\u2003", "中",
                                 "\xe3\x80", "\x80", "\xff"};
    for (const char* tokenizer : {"tokenizer", "digits_apart", "neox"}) {
        const Json& reference = bpe_reference().at(tokenizer);
        const Bpe bpe = bpe_of(at, reference.contains("tokenizer") ? reference.at("tokenizer") : reference);
        int cuts = 0;
        for (int i = 0; i < 500; i++) {
            std::string text;
            for (int k = 0; k < 20; k++) text += parts[random_bits(i, 0, k) % std::size(parts)];
            const std::vector<int> whole = encode(bpe, text);
            for (size_t cut = 0; (cut = word_boundary(text, cut + 1)) != std::string::npos; cuts++) {
                INFO(Json(std::vector<int>(text.begin(), text.end())) << " at " << cut);
                CHECK(encode(bpe, text.substr(0, cut)) + encode(bpe, text.substr(cut)) == whole);
            }
        }
        CHECK(cuts > 1000);
    }
}

TEST_CASE("a million equal characters are encoded in seconds") {
    const Workplace at;
    const Bpe bpe = bpe_of(at, bpe_reference().at("tokenizer"));
    for (const char* character : {"a", " ", "\n", "1", "!", "é", "\xff"}) {
        std::string text;
        for (int i = 0; i < 1000000; i++) text += character;
        INFO(character);
        const auto start = std::chrono::steady_clock::now();
        encode(bpe, text);
        CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10));  // 1 here; what is quadratic takes hours
    }
}

TEST_CASE("tokens of BPE: the same whatever reads them, named by the dataset and by the checkpoint") {
    const Workplace at;
    const Json& given = bpe_reference().at("tokenizer");
    const Bpe bpe = bpe_of(at, given);
    // GPT-2's own files, which have no tokenizer.json
    fs::create_directory(at / "gpt2");
    write_text(at / "gpt2/encoder.json", given.at("model").at("vocab").dump());
    std::string merges = "#version: 0.2\n";
    for (const Json& merge : given.at("model").at("merges"))
        merges += (merge.is_array() ? merge[0].get<std::string>() + " " + merge[1].get<std::string>() : merge.get<std::string>()) + "\n";
    write_text(at / "gpt2/vocab.bpe", merges);
    // Documents, one of them of several segments
    const std::vector<std::string> texts = {prose(900000) + "\n", "a<|endoftext|>b \xff 1999\n", prose(30000) + "\n"};
    write_text(at / "text.txt", texts[0] + "<|endoftext|>\n" + texts[1] + "<|endoftext|>\n" + texts[2]);
    std::vector<int> want;
    for (const std::string& text : texts) want = want + std::vector<int>{bpe.end_of_text} + encode(bpe, text);
    for (const char* tokenizer : {"tokenizer.json", "gpt2"}) {
        const Result made = at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "data", "--tokenizer", at / tokenizer,
                                                     "--val-fraction", "0"});
        CHECK(made.err.find("1 places in the text are not UTF-8") != std::string::npos);
        CHECK((read_tokens(at / "data", "train") == want));
        CHECK(Json::parse(read_text(at / "data/dataset.json")).at("tokenizer") ==
              Json{{"kind", "bpe"}, {"vocab", bpe.pieces.size()}, {"end_of_text", bpe.end_of_text}});
    }
    CHECK(encode(Bpe::load(at / "data"), texts[2]) == encode(bpe, texts[2]));  // that of gpt2, in another form
    at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "data", "--tokenizer", at / "gpt2", "--val-fraction", "0.1"});
    at.succeed("train", train_flags(at, "run", 2) + Arguments{"--schedule", "constant"});
    Json other = given;
    other["model"]["merges"].erase(200);
    write_text(at / "tokenizer.json", other.dump());
    at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "other", "--tokenizer", at / "tokenizer.json", "--val-fraction", "0.1"});
    Arguments resume = train_flags(at, "run", 3) + Arguments{"--schedule", "constant", "--resume"};
    at.succeed("train", resume);
    resume[1] = at / "other";
    at.refuse("train", resume, {"--resume", "other", "another tokenizer"});
    CHECK(read_text(at / "run/tokenizer.json") == read_text(at / "data/tokenizer.json"));
    const std::string text = at.succeed("infer", {"--checkpoint", at / "run", "--prompt", "the ri", "--tokens", "5"}).out;
    CHECK(text.starts_with("the ri"));
    fs::remove(at / "run/tokenizer.json");
    at.refuse("infer", {"--checkpoint", at / "run", "--prompt", "the ri"}, {"run/tokenizer.json", "No such file"});
    // A word without end is cut, but no character: here behind 4 MiB and some
    std::string endless;
    while (endless.size() < 5 << 20) endless += "é";
    write_text(at / "endless.txt", "a" + endless);
    at.succeed("data_prep", {"--input", at / "endless.txt", "--output", at / "endless", "--tokenizer", at / "gpt2", "--val-fraction", "0"});
    CHECK((decode(bpe, read_tokens(at / "endless", "train")) == "a" + endless));
    // More than 2^16 tokens: 32 bits each
    Json large = given;
    large["model"]["vocab"]["qqqq"] = 67000;
    write_text(at / "tokenizer.json", large.dump());
    at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "wide", "--tokenizer", at / "tokenizer.json", "--val-fraction", "0.1"});
    CHECK((read_tokens(at / "wide", "train") == read_tokens(at / "data", "train")));
    CHECK(fs::file_size(at / "wide/train_000000.bin") - 1024 == 2 * (fs::file_size(at / "data/train_000000.bin") - 1024));
    at.refuse("data_prep", {"--input", at / "text.txt", "--output", at / "run", "--tokenizer", at / "gpt2"}, {"--output", "has a checkpoint"});
    // Bytes again: the shards are new, the tokenizer's file might be somebody's.
    at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "data"});
    CHECK(Json::parse(read_text(at / "data/dataset.json")).at("tokenizer").at("kind") == "bytes");
    CHECK(fs::exists(at / "data/tokenizer.json"));
}

TEST_CASE("a tokenizer that is damaged, or does more than is known here, is refused") {
    const Workplace at;
    write_text(at / "text.txt", prose(3000));
    const auto refuse = [&](const std::function<void(Json&)>& change, const std::vector<std::string>& phrases) {
        Json json = bpe_reference().at("tokenizer");
        change(json);
        write_text(at / "tokenizer.json", json.dump());
        at.refuse("data_prep", {"--input", at / "text.txt", "--output", at / "data", "--tokenizer", at / "tokenizer.json"},
                  std::vector<std::string>{"tokenizer.json"} + phrases);
        CHECK(!fs::exists(at / "data"));
    };
    refuse([](Json& j) { j = Json::array(); }, {"pre_tokenizer"});
    refuse([](Json& j) { j["model"]["type"] = "Unigram"; }, {"its model", "Unigram"});
    refuse([](Json& j) { j["model"]["byte_fallback"] = true; }, {"byte_fallback", "true"});
    refuse([](Json& j) { j["model"]["unk_token"] = "<unk>"; }, {"unk_token", "<unk>"});
    refuse([](Json& j) { j["normalizer"] = {{"type", "NFKC"}}; }, {"normalizer", "NFKC"});
    refuse([](Json& j) { j["added_tokens"][0]["lstrip"] = true; }, {"added token's lstrip"});
    refuse([](Json& j) { j["pre_tokenizer"]["add_prefix_space"] = true; }, {"pre_tokenizer", "add_prefix_space"});
    refuse([](Json& j) { j["pre_tokenizer"] = {{"type", "Whitespace"}}; }, {"pre_tokenizer", "Whitespace"});
    refuse([](Json& j) { j["pre_tokenizer"] = nullptr; }, {"pre_tokenizer", "null"});
    refuse([](Json& j) { j["model"].erase("vocab"); }, {"its vocabulary", "not an object"});
    refuse([](Json& j) { j["model"]["merges"][7] = {"q", "q"}; }, {"merge 8", "both together"});
    refuse([](Json& j) { j["model"]["vocab"].erase("!"); }, {"no token for byte 33"});
    refuse([](Json& j) { j["model"]["vocab"]["\u4e2d"] = 700; }, {"token 700", "not in the characters"});
    refuse([](Json& j) { j["model"]["vocab"]["qqqq"] = 5; }, {"two tokens are number 5"});
    refuse([](Json& j) { j["model"]["vocab"]["qqqq"] = -1; }, {"qqqq", "-1"});
    refuse([](Json& j) { j["model"]["vocab"]["qqqq"] = 1e15; }, {"qqqq"});
    refuse([](Json& j) { j["model"]["vocab"]["qqqq"] = 1LL << 40; }, {"qqqq", "must be below 6"});
    refuse([](Json& j) { j["model"]["merges"] = 3; }, {"no list of merges"});
    refuse([](Json& j) { j["model"]["merges"][7] = "abc"; }, {"merge 8", "two tokens"});
    refuse([](Json& j) { j["model"]["merges"][7] = {"q", "\u0120\u0120q"}; }, {"merge 8", "the second"});
    refuse([](Json& j) { j["added_tokens"] = Json::array(), j["model"]["vocab"].erase("<|endoftext|>"); }, {"no end-of-text token"});
    refuse([](Json& j) { j["added_tokens"][0]["id"] = "x"; }, {"added token 1", "no id"});
    refuse([](Json& j) { j["added_tokens"][0]["special"] = false; }, {"added token 1", "not special"});
    refuse([](Json& j) { j["added_tokens"] = "x"; }, {"list of added tokens"});
    refuse([](Json& j) { j["added_tokens"].push_back({{"id", 0}, {"content", "</s>"}}); }, {"two tokens are number 0"});
    write_text(at / "tokenizer.json", "{");
    at.refuse("data_prep", {"--input", at / "text.txt", "--output", at / "data", "--tokenizer", at / "tokenizer.json"}, {"not readable as JSON"});
    fs::create_directory(at / "gpt2");
    write_text(at / "gpt2/encoder.json", bpe_reference().at("tokenizer").at("model").at("vocab").dump());
    write_text(at / "gpt2/vocab.bpe", "#version: 0.2\n\xff a\n");  // which a fuzzer found: what is not UTF-8 cannot become JSON
    at.refuse("data_prep", {"--input", at / "text.txt", "--output", at / "data", "--tokenizer", at / "gpt2"}, {"merge 1", "the first"});
    fs::create_directory(at / "empty");
    at.refuse("data_prep", {"--input", at / "text.txt", "--output", at / "data", "--tokenizer", at / "empty"}, {"empty", "vocab.bpe"});
}

// ---- tokenizers of one's own, and of SentencePiece

TEST_CASE("a tokenizer made of a text is the one that Hugging Face's trainer makes, and encodes it") {
    const Workplace at;
    const Json& trained = bpe_reference().at("trained");
    const std::string text = from_hex(trained.at("text"));
    write_text(at / "text.txt", text);
    at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "data", "--train-tokenizer", "500", "--val-fraction", "0"});
    const Json made = Json::parse(read_text(at / "data/tokenizer.json"));
    CHECK(made.at("model").at("vocab") == trained.at("vocab"));
    CHECK(made.at("model").at("merges") == trained.at("merges"));
    const Bpe bpe = Bpe::load(at / "data");
    CHECK(bpe.digits_apart);
    CHECK(bpe.pieces.size() == 500);
    CHECK((read_tokens(at / "data", "train") == std::vector<int>{0} + encode(bpe, text)));
    // The same, however the text comes
    fs::create_directory(at / "texts");
    write_text(at / "texts/a.json", Json{{"text", text.substr(0, word_boundary(text, 5000))}}.dump() + "\n");
    write_text(at / "texts/b.jsonl", Json{{"text", text.substr(word_boundary(text, 5000))}}.dump());
    at.succeed("data_prep", {"--input", at / "texts", "--output", at / "parts", "--train-tokenizer", "500", "--val-fraction", "0"}, {.threads = "1"});
    CHECK(read_text(at / "parts/tokenizer.json") == read_text(at / "data/tokenizer.json"));
    // A text that has no more pairs; what cannot be read twice; bad sizes
    write_text(at / "small.txt", "abab abab");
    const Result small = at.succeed("data_prep", {"--input", at / "small.txt", "--output", at / "small", "--train-tokenizer", "262144",
                                                  "--val-fraction", "0"});
    CHECK(small.err.find("not more") != std::string::npos);
    CHECK(Bpe::load(at / "small").pieces.back() == " abab");
    at.refuse("data_prep", {"--input", "-", "--output", at / "no", "--train-tokenizer", "500"}, {"standard input", "twice"}, {.input = at / "text.txt"});
    for (const char* size : {"256", "262145", "-1", "0"})
        at.refuse("data_prep", {"--input", at / "text.txt", "--output", at / "no", "--train-tokenizer", size}, {"--train-tokenizer", size});
    for (const std::string& tokenizer : {at / "data", std::string("bytes")})
        at.refuse("data_prep", {"--input", at / "text.txt", "--output", at / "no", "--train-tokenizer", "500", "--tokenizer", tokenizer}, {"not both"});
    CHECK(!fs::exists(at / "no"));  // what fails leaves nothing
}

TEST_CASE("text of SentencePiece's tokens") {
    const Workplace at;
    static const char* const folder = getenv("MOEMAMBA_ORACLE");
    const Json reference = Json::parse(read_text(fs::path(folder ? folder : "oracle") / "sentencepiece.json"));
    bool absent = false;
    for (const Json& one : reference) {
        write_text(at / "tokenizer.model", from_hex(one.at("model")));
        const Result probe = at.run("infer", {"--tokenize", "--tokenizer", at / "tokenizer.model", "--prompt", "a"});
        if (probe.err.find("library was not there") != std::string::npos) {
            absent = true;
            continue;
        }
        const Tokenizer tokenizer = Tokenizer::load(at / "tokenizer.model");
        for (const Json& pair : one.at("cases")) {
            const std::string text = from_hex(pair.at("text"));
            INFO(pair.at("text"));
            std::vector<int> tokens;
            tokenizer.encode(tokens, text);
            CHECK(tokens == pair.at("tokens").get<std::vector<int>>());
        }
        // A document of several segments has the tokens of the whole
        const std::string text = prose(300000);
        write_text(at / "text.txt", text);
        std::vector<int> whole = {tokenizer.end_of_text};
        tokenizer.encode(whole, text);
        at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "data", "--tokenizer", at / "tokenizer.model", "--val-fraction", "0"});
        CHECK((read_tokens(at / "data", "train") == whole));
        at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "data", "--tokenizer", at.path, "--val-fraction", "0.1"});
        at.succeed("train", train_flags(at, "run-" + std::to_string(tokenizer.vocab), 1));
        const std::string run = at / ("run-" + std::to_string(tokenizer.vocab));
        CHECK(read_text(run + "/tokenizer.model") == from_hex(one.at("model")));
        CHECK(at.succeed("infer", {"--checkpoint", run, "--prompt", "the river", "--tokens", "3"}).out.starts_with("the river"));
    }
    write_text(at / "tokenizer.model", "no model");
    at.refuse("infer", {"--tokenize", "--tokenizer", at / "tokenizer.model"}, {"tokenizer.model"});
    if (absent) printf("skipped: SentencePiece, whose library was not there when this was built (make deps)\n");
}

// ---- other forms of input

TEST_CASE("JSON lines, plain or compressed, are documents") {
    const Workplace at;
    std::vector<std::string> texts;
    std::string lines;
    for (int i = 0; i < 300; i++) {
        texts.push_back("document " + std::to_string(i) + " \"é\u4e2d\U0001f600\"\n" + prose(i * 37 % 3000));
        lines += Json{{"url", "x"}, {"text", texts.back()}, {"meta", {{"text", "another"}, {"list", {1, {{"text", 2}}}}}}}.dump(-1, ' ', i % 2) + "\n";
        if (i == 100) lines += "\n{\"text\": 3}\r\n[1]\n{\"body\": \"x\"}\n{\"text\": \"cut\n" + std::string(40, '[') + "\n\xff\n";
    }
    std::sort(texts.begin(), texts.end());
    const std::string gz = at / "lines.json.gz", plain = at / "lines.jsonl";
    write_text(plain, lines);
    gzFile file = gzopen(gz.c_str(), "wb1");
    gzwrite(file, lines.data(), unsigned(lines.size()));
    gzclose(file);
    std::vector<Arguments> ways = {{"--input", plain}, {"--input", gz}, {"--input", "-", "--format", "jsonl"}};
    if (system("zstd --version > /dev/null 2>&1") == 0) {
        REQUIRE(system(("zstd -q '" + plain + "' -o '" + (at / "lines.json.zst") + "'").c_str()) == 0);
        const Result probe = at.run("data_prep", {"--input", at / "lines.json.zst", "--output", at / "probe"});
        if (probe.err.find("library was not there") != std::string::npos) printf("skipped: zstd, whose library was not there when this was built\n");
        else ways.push_back({"--input", at / "lines.json.zst"});
    } else {
        printf("skipped: zstd (there is no program of that name: make deps)\n");
    }
    for (const Arguments& way : ways) {
        INFO(way[1]);
        const Result made = at.succeed("data_prep", way + Arguments{"--output", at / "data", "--val-fraction", "0.1"}, {.input = plain});
        const std::string name = way[1] == "-" ? "standard input" : way[1];
        CHECK(made.err.find("warning: 6 bad lines skipped; the first: " + name + ", line 103: \"text\" is no text") != std::string::npos);
        std::vector<std::string> found = documents(read_tokens(at / "data", "train")) + documents(read_tokens(at / "data", "val"));
        std::sort(found.begin(), found.end());
        CHECK((found == texts));
        CHECK(documents(read_tokens(at / "data", "val")).size() == 30);
        at.refuse("data_prep", way + Arguments{"--output", at / "no", "--strict"}, {name, "line 103", "--strict"}, {.input = plain});
        if (way.size() == 2 && way[1] != plain) {  // cut off
            const std::string whole = read_text(way[1]), cut = at / ("cut" + fs::path(way[1]).filename().string());
            write_text(cut, whole.substr(0, whole.size() / 2));
            at.refuse("data_prep", {"--input", cut, "--output", at / "no"}, {cut, "truncated"});
        }
    }
    if (ways.size() == 4) {
        // What a fuzzer found: behind a frame of zstd one of a format that its library knows from before, and that asks for any memory.
        write_text(at / "old.zst", std::string("\x28\xb5\x2f\xfd\x26\xb5\x2f\xfd\x00\x00\x00\x00\x25\xb5\x2f\xfd\x0d", 17));
        at.refuse("data_prep", {"--input", at / "old.zst", "--output", at / "no"}, {"old.zst", "zstd"});
        write_text(at / "more.zst", read_text(at / "lines.json.zst") + "more");
        at.refuse("data_prep", {"--input", at / "more.zst", "--output", at / "no"}, {"more.zst", "something else"});
    }
    at.refuse("data_prep", {"--input", plain, "--output", at / "no", "--field", "body", "--strict"}, {"line 1:", "has no \"body\""});
    at.succeed("data_prep", {"--input", plain, "--output", at / "body", "--field", "body", "--val-fraction", "0"});
    CHECK(documents(read_tokens(at / "body", "train")) == std::vector<std::string>{"x"});
    at.succeed("data_prep", {"--input", plain, "--output", at / "text", "--format", "text", "--val-fraction", "0"});
    CHECK((documents(read_tokens(at / "text", "train")) == std::vector<std::string>{lines}));
    at.refuse("data_prep", {"--input", plain, "--output", at / "no", "--format", "xml"}, {"--format", "xml"});
    write_text(at / "open.jsonl", "{\"text\": \"" + std::string(1 << 20, 'a'));  // what is quoted of it is short
    const Result open = at.run("data_prep", {"--input", at / "open.jsonl", "--output", at / "no"});
    CHECK(open.code == 1);
    CHECK(open.err.size() < 500);
    CHECK(open.err.starts_with("error: no text in"));
    // A line that is too long is one bad line, and takes no more memory than that
    write_text(at / "long.jsonl", "{\"text\": \"" + std::string(70 << 20, 'a') + "\"}\n{\"text\": \"b\"}");
    CHECK(at.succeed("data_prep", {"--input", at / "long.jsonl", "--output", at / "long", "--val-fraction", "0"}).err.find("line 1: longer than 64 MiB") !=
          std::string::npos);
    CHECK(documents(read_tokens(at / "long", "train")) == std::vector<std::string>{"b"});
}

TEST_CASE("token files of llm.c go straight into training") {
    const Workplace at;
    const auto write = [&](const std::string& name, int32_t magic, int32_t version, const std::vector<int>& tokens) {
        int32_t header[256] = {magic, version, int32_t(tokens.size())};
        std::string file(reinterpret_cast<const char*>(header), sizeof(header));
        for (const uint32_t token : tokens) file.append(reinterpret_cast<const char*>(&token), version == 1 ? 2 : 4);
        write_text(at / name, file);
    };
    std::vector<int> tokens(500), llama(500);
    for (size_t i = 0; i < tokens.size(); i++) tokens[i] = i % 100 ? int(i * 7 % 50256) : 50256, llama[i] = i % 100 ? int(i * 7 % 128000) : 128001;
    write("train_a.bin", 20240520, 1, tokens);
    write("train_b.bin", 20240520, 1, tokens);
    write("val.bin", 20240520, 1, tokens);
    write("llama.bin", 20240801, 7, llama);
    write("old.bin", 20240801, 1, llama);
    write("ours.bin", 20240520, 2, tokens);
    const Arguments tiny = {"--layers", "M", "--d-model", "8", "--batch", "1", "--seq-len", "8", "--steps", "1", "--peak-flops", "1e9"};
    const Result made = at.succeed("train", Arguments{"--data", at / "train_a.bin", at / "train_b.bin", "--val-data", at / "val.bin", "--out",
                                                      at / "run"} + tiny);
    CHECK(made.out.find("1000 tokens") != std::string::npos);
    CHECK(made.out.find("vocabulary 50257") != std::string::npos);
    CHECK(losses(at / "run", "val").size() == 1);
    at.refuse("infer", {"--checkpoint", at / "run", "--prompt", "a"}, {"no tokenizer"});
    at.refuse("infer", {"--checkpoint", at / "run", "--prompt-tokens", "1"}, {"no tokenizer", "--print-tokens"});
    const std::string drawn = at.succeed("infer", {"--checkpoint", at / "run", "--prompt-tokens", "5,6", "--print-tokens", "--tokens", "4"}).out;
    CHECK(drawn.starts_with("5,6,"));
    CHECK(std::count(drawn.begin(), drawn.end(), ',') == 5);
    at.succeed("train", Arguments{"--data", at / "train_a.bin", at / "train_b.bin", "--val-data", at / "val.bin", "--out", at / "run", "--resume"});
    CHECK(at.succeed("train", Arguments{"--data", at / "llama.bin", "--out", at / "llama"} + tiny).out.find("vocabulary 128256") != std::string::npos);
    const auto refuse = [&](const Arguments& arguments, const std::vector<std::string>& phrases) {
        at.refuse("train", arguments + Arguments{"--out", at / "no"} + tiny, phrases);
    };
    refuse({"--data", at / "train_a.bin", at / "llama.bin"}, {"train_a.bin", "llama.bin", "two kinds"});
    refuse({"--data", at / "train_a.bin", "--val-data", at / "llama.bin"}, {"two kinds"});
    refuse({"--data", at / "old.bin"}, {"old.bin", "version 1"});
    refuse({"--data", at / "ours.bin"}, {"ours.bin", "--tokenizer"});
    refuse({"--data", at / "train_a.bin", "--tokenizer", "bytes"}, {"train_a.bin", "beyond the vocabulary of 257"});
    refuse({"--data", at / "train_a.bin", "--vocab", "1000"}, {"train_a.bin", "beyond the vocabulary of 1000"});
    // Other data than the run began with, or in another order, or with a token that is found late
    write("val.bin", 20240520, 1, std::vector<int>(500, 7));
    at.refuse("train", {"--data", at / "train_b.bin", at / "val.bin", "--out", at / "run", "--resume"}, {"other training tokens"});
    std::vector<int> late(5000, 1);
    late[2500] = 600;
    write("late.bin", 20240520, 1, late);
    write("fine.bin", 20240520, 1, std::vector<int>(5000, 1));
    const Arguments small = {"--layers", "M", "--d-model", "8", "--batch", "1", "--seq-len", "8", "--peak-flops", "1e9", "--vocab", "500"};
    at.refuse("train", Arguments{"--data", at / "fine.bin", "--val-data", at / "late.bin", "--out", at / "never", "--steps", "700"} + small, {"late.bin", "token 2500"});
    CHECK(!fs::exists(at / "never/log.jsonl"));
    at.refuse("train", Arguments{"--data", at / "late.bin", "--out", at / "late", "--steps", "700", "--save-every", "0"} + small, {"late.bin", "token 2500"});
    CHECK(fs::exists(at / "late/model.safetensors"));  // all steps before that
    refuse({"--data", at / "train_a.bin", "--sample-every", "1"}, {"--sample-every"});
    make_data(at);
    refuse({"--data", at / "data", "--val-data", at / "val.bin"}, {"--val-data"});
}

// ---- Hugging Face's directories

static fs::path huggingface_reference() {
    static const char* const folder = getenv("MOEMAMBA_ORACLE");
    return fs::path(folder ? folder : "oracle") / "huggingface";
}

TEST_CASE("what transformers has saved continues a text as there, and can be trained on") {
    const Workplace at;
    make_data(at);
    for (const auto& entry : fs::directory_iterator(huggingface_reference())) {
        const std::string model = entry.path();
        INFO(model);
        const Safetensors expected(model + "/expected.safetensors");
        std::vector<int> greedy(expected.find("greedy").count);
        expected.read("greedy", greedy.data());
        std::string want, prompt;
        for (size_t i = 0; i < greedy.size(); i++) {
            want += (i ? "," : "") + std::to_string(greedy[i]);
            if (i == 8) prompt = want;
        }
        const Arguments draw = {"--prompt-tokens", prompt, "--print-tokens", "--tokens", std::to_string(greedy.size() - 9), "--temperature", "0"};
        CHECK(at.succeed("infer", Arguments{"--checkpoint", model} + draw).out == want + "\n");
        at.refuse("infer", Arguments{"--checkpoint", model, "--prompt", "a"}, {"tokenizer.json", "--prompt-tokens"});
        // Training begins with its weights, and what it saves has them in one form
        const std::string out = at / ("run" + entry.path().filename().string());
        std::vector<int> tokens(200);
        for (size_t i = 0; i < tokens.size(); i++) tokens[i] = int(i * i % 43);
        int32_t header[256] = {20240520, 1, int32_t(tokens.size())};
        std::string file(reinterpret_cast<const char*>(header), sizeof(header));
        for (const uint32_t token : tokens) file.append(reinterpret_cast<const char*>(&token), 2);
        write_text(at / "tokens.bin", file);
        const Arguments train = {"--data", at / "tokens.bin", "--out", out, "--init-from", model, "--batch", "1", "--seq-len", "8", "--steps", "1",
                                 "--peak-flops", "1e9"};
        const Result trained = at.succeed("train", train);
        CHECK(trained.out.find("vocabulary 43") != std::string::npos);
        at.succeed("infer", Arguments{"--checkpoint", out} + draw);
        at.refuse("train", train + Arguments{"--preset", "mamba-tiny"}, {"--init-from", "--preset"});
    }
}

// A copy of a directory of transformers, changed.
static void change_model(const Workplace& at, const std::string& from, const std::function<void(Json&)>& change) {
    fs::remove_all(at / "model");
    fs::copy(huggingface_reference() / from, at / "model");
    Json config = Json::parse(read_text(at / "model/config.json"));
    change(config);
    write_text(at / "model/config.json", config.dump());
}

TEST_CASE("a directory of transformers that our models cannot be is refused by name") {
    const Workplace at;
    const Arguments infer = {"--checkpoint", at / "model", "--prompt-tokens", "1", "--print-tokens", "--tokens", "1"};
    const auto refuse = [&](const std::string& from, const std::function<void(Json&)>& change, const std::vector<std::string>& phrases) {
        change_model(at, from, change);
        at.refuse("infer", infer, phrases);
    };
    const auto set = [](const char* key, const Json& value) { return [=](Json& c) { c[key] = value; }; };
    refuse("mamba", set("use_bias", true), {"config.json", "\"use_bias\" is true"});
    refuse("mamba", set("hidden_act", "gelu"), {"hidden_act", "gelu"});
    refuse("mamba", set("model_type", "llama"), {"model_type", "llama", "mixtral"});
    refuse("mamba", set("model_type", 1), {"model_type", "not a text"});
    refuse("mamba", set("hidden_size", -16), {"hidden_size", "-16"});
    refuse("mamba", set("hidden_size", "16"), {"hidden_size", "\"16\""});
    refuse("mamba", set("hidden_size", 1 << 30), {"hidden_size"});
    refuse("mamba", set("state_size", 65), {"config.json", "65"});
    refuse("mamba", set("num_hidden_layers", 1000000), {"num_hidden_layers"});
    refuse("mamba", set("num_hidden_layers", 3), {"backbone.layers.2."});
    refuse("mamba", set("num_hidden_layers", 1), {"has a tensor backbone.layers.1."});
    refuse("mamba", set("hidden_size", 24), {"shape", "(43, 16)", "(43, 24)"});
    refuse("mamba", set("tie_word_embeddings", false), {"lm_head.weight"});
    refuse("mamba", set("quantization_config", Json::object()), {"quantization_config"});
    refuse("mamba", set("eos_token_id", {1, -2}), {"eos_token_id"});
    refuse("mamba", [](Json& c) { c = Json::array(); }, {"config.json", "not a JSON object"});
    refuse("mixtral", set("sliding_window", 4096), {"sliding_window", "4096"});
    refuse("mixtral", set("rope_scaling", {{"type", "linear"}}), {"rope_scaling"});
    refuse("mixtral", set("rope_parameters", {{"rope_type", "yarn"}}), {"rope_type", "yarn"});
    refuse("mixtral", set("num_key_value_heads", 3), {"config.json"});
    refuse("mixtral", set("num_experts_per_tok", 4), {"top-k"});
    refuse("jamba-sharded", set("mamba_proj_bias", true), {"mamba_proj_bias"});
    refuse("jamba-sharded", set("num_attention_heads", 3), {"num_attention_heads"});
    change_model(at, "jamba-fused", set("num_experts", 2));
    at.refuse("infer", infer, {"shape", "router"});
    change_model(at, "mamba", set("something_new", 1));
    const Result noted = at.succeed("infer", infer);
    CHECK(noted.err.find("not used: something_new") != std::string::npos);
    refuse("mamba", set("use_conv_bias", false), {"has a tensor", "conv1d.bias"});
    const std::string index = at / "model/model.safetensors.index.json";
    const auto refuse_index = [&](const std::function<void(Json&)>& change, const std::vector<std::string>& phrases) {
        change_model(at, "jamba-sharded", [](Json&) {});
        Json json = Json::parse(read_text(index));
        change(json);
        write_text(index, json.dump());
        at.refuse("infer", infer, phrases);
    };
    refuse_index([](Json& j) { j["weight_map"]["lm_head.weight"] = "../x"; }, {"lm_head.weight", "no file beside it"});
    refuse_index([](Json& j) { j["weight_map"]["lm_head.weight"] = "x.safetensors"; }, {"x.safetensors", "No such file"});
    refuse_index([](Json& j) { j["weight_map"].erase("lm_head.weight"); }, {"tensors, it lists"});
    refuse_index([](Json& j) { j["weight_map"]["stranger"] = j["weight_map"]["lm_head.weight"]; }, {"no tensor stranger"});
    refuse_index([](Json& j) { j.erase("weight_map"); }, {"weight_map"});
    fs::remove(at / "model/config.json");
    at.refuse("infer", infer, {"weight_map"});
}

TEST_CASE("every checkpoint is a directory of transformers, and weights go from one training to the next") {
    const Workplace at;
    make_data(at);
    struct Family {
        const char *kind, *layers;
        Arguments more;
    };
    const Family families[] = {{"mamba", "M*2", {"--tied", "1"}},
                               {"jamba", "MFMEAFME", {"--mamba-norms", "1", "--rope-base", "0", "--swiglu-experts", "1", "--d-ff", "24", "--d-expert",
                                                      "24", "--top-k", "2"}},
                               {"mixtral", "AE*2", {"--renormalize", "1", "--swiglu-experts", "1", "--top-k", "2"}},
                               {"moemamba", "ME*2", {}}};
    for (const Family& family : families) {
        INFO(family.kind);
        const std::string out = at / family.kind;
        const Arguments train = Arguments{"--data", at / "data", "--steps", "3", "--seq-len", "32", "--batch", "4", "--peak-flops", "1e9"};
        at.succeed("train", train + Arguments{"--out", out, "--layers", family.layers, "--d-model", "16", "--heads", "2", "--experts", "4"} + family.more);
        const Json config = Json::parse(read_text(out + "/config.json"));
        CHECK(config.at("model_type") == family.kind);
        CHECK(config.at("vocab_size") == 257);
        const Safetensors file(out + "/model.safetensors");
        const bool theirs = std::string(family.kind) == "jamba" || std::string(family.kind) == "mixtral";
        CHECK(file.find(theirs ? "model.embed_tokens.weight" : "backbone.embeddings.weight").shape == std::vector<int64_t>{257, 16});
        CHECK(file.has("lm_head.weight") == (std::string(family.kind) != "mamba"));
        if (std::string(family.kind) == "mixtral") CHECK(file.has("model.layers.1.block_sparse_moe.experts.3.w2.weight"));
        if (std::string(family.kind) == "jamba") CHECK(file.has("model.layers.1.feed_forward.experts.3.down_proj.weight"));
        // Without its own metadata it is somebody else's, and gives the same
        const Arguments draw = {"--prompt", "the river", "--tokens", "20", "--temperature", "0"};
        const std::string text = at.succeed("infer", Arguments{"--checkpoint", out} + draw).out;
        fs::remove_all(at / "other");
        fs::create_directory(at / "other");
        for (const char* name : {"config.json", "tokenizer.json"}) fs::copy(out + "/" + name, at / "other");
        change_header(at / "other/model.safetensors", read_text(out + "/model.safetensors"), [](Json& h) { h.erase("__metadata__"); });
        CHECK(at.succeed("infer", Arguments{"--checkpoint", at / "other"} + draw).out == text);
        // The first loss of what begins with these weights is that of a fourth step, and not of a first
        for (const std::string& from : {out, at / "other"}) {
            const Result begun = at.run("train", train + Arguments{"--out", out + "-on", "--init-from", from, "--balance-loss", "0"});
            INFO(begun.err);
            REQUIRE(begun.code == 0);
            CHECK(begun.err.find("warning") == std::string::npos);
            CHECK(losses(out + "-on")[0] < losses(out)[0] - 0.01);
            fs::remove_all(out + "-on");
        }
        at.refuse("train", train + Arguments{"--out", out + "-on", "--init-from", out, "--d-model", "32"}, {"shape"});
        fs::remove_all(out + "-on");
    }
    // Another tokenizer: said
    bpe_of(at, bpe_reference().at("tokenizer"));
    fs::copy(at / "tokenizer.json", at / "other/tokenizer.json", fs::copy_options::overwrite_existing);
    at.refuse("infer", {"--checkpoint", at / "other", "--prompt", "a"}, {"257", "546"});
    const Result warned = at.succeed("train", {"--data", at / "data", "--steps", "1", "--seq-len", "32", "--batch", "4", "--peak-flops", "1e9", "--out",
                                               at / "warned", "--init-from", at / "other"});
    CHECK(warned.err.find("warning: --init-from") != std::string::npos);
    // Checkpoints from before had padded rows, and names of ours alone
    const std::string model = at / "mixtral/model.safetensors", good = read_text(model);
    const Arguments draw = {"--checkpoint", at / "mixtral", "--prompt", "the river", "--tokens", "20", "--temperature", "0"};
    const std::string text = at.succeed("infer", draw).out;
    uint64_t size;
    memcpy(&size, good.data(), 8);
    std::string tensors = good.substr(8 + size);
    const Json header = Json::parse(good.substr(8, size));
    Json older = {{"__metadata__", header.at("__metadata__")}};
    const auto our_name = [](std::string name) {
        const std::vector<std::pair<std::string, std::string>> parts = {
            {"model.embed_tokens", "backbone.embeddings"}, {"model.norm", "backbone.norm_f"}, {".block_sparse_moe.gate", ".moe.router"},
            {".block_sparse_moe", ".moe"}, {".w1.", ".gate_proj."}, {".w3.", ".up_proj."}, {".w2.", ".down_proj."}};
        for (const auto& [from, to] : parts)
            if (const size_t found = name.find(from); found != std::string::npos) name.replace(found, from.size(), to);
        if (!name.starts_with("model.layers.")) return name;
        const int layer = name[13] - '0', step = 2 * layer + (name.find("post_attention") != std::string::npos || name.find(".moe.") != std::string::npos);
        name = "backbone.layers." + std::to_string(step) + name.substr(14);
        for (const char* norm : {"input_layernorm", "post_attention_layernorm"})
            if (const size_t found = name.find(norm); found != std::string::npos) name.replace(found, strlen(norm), "norm");
        return name;
    };
    for (const auto& [name, entry] : header.items()) {
        if (name == "__metadata__") continue;
        Json changed = entry;
        if (entry.at("shape")[0] == 257) {  // its rows again, at the end, and seven more
            const size_t from = entry.at("data_offsets")[0], to = entry.at("data_offsets")[1], start = tensors.size();
            tensors += tensors.substr(from, to - from) + std::string(7 * 16 * 4, '\0');
            changed["shape"] = {264, 16};
            changed["data_offsets"] = {start, tensors.size()};
        }
        older[our_name(name)] = changed;
    }
    const std::string json = older.dump();
    size = json.size();
    write_text(model, std::string(reinterpret_cast<const char*>(&size), 8) + json + tensors);
    CHECK(at.succeed("infer", draw).out == text);
}

TEST_CASE("tokens in, tokens out, and what they stand for") {
    const Workplace at;
    make_data(at);
    at.succeed("train", train_flags(at, "run", 3));
    const Arguments draw = {"--checkpoint", at / "run", "--tokens", "10", "--seed", "3"};
    const auto numbers = [](const std::string& text) {
        std::string all;
        for (const char c : text) all += (all.empty() ? "" : ",") + std::to_string(static_cast<unsigned char>(c));
        return all;
    };
    const std::string tokens = at.succeed("infer", draw + Arguments{"--prompt", "the", "--print-tokens"}).out;
    CHECK(tokens.starts_with(numbers("the") + ","));
    CHECK(at.succeed("infer", draw + Arguments{"--prompt-tokens", numbers("the"), "--print-tokens"}).out == tokens);
    CHECK(at.succeed("infer", draw + Arguments{"--prompt-tokens", numbers("the")}).out == at.succeed("infer", draw + Arguments{"--prompt", "the"}).out);
    CHECK(at.succeed("infer", draw + Arguments{"--prompt", "the", "--print-tokens", "--samples", "2"}).out.starts_with(tokens));
    for (const char* bad : {"x", "257", "-1", "1,,2", "1,", ",", "1 2", "99999999999"})
        at.refuse("infer", draw + Arguments{std::string("--prompt-tokens=") + bad}, {"--prompt-tokens"});
    at.refuse("infer", draw + Arguments{"--prompt-tokens", "1", "--prompt", "a"}, {"--prompt-tokens"});
    CHECK(at.succeed("infer", {"--checkpoint", at / "run", "--tokenize", "--prompt", "a\né"}).out ==
          "     97  \"a\"\n     10  \"\\n\"\n    195  \"\\xc3\"\n    169  \"\\xa9\"\n");
    bpe_of(at, bpe_reference().at("tokenizer"));
    const std::string pieces = at.succeed("infer", {"--tokenizer", at / "tokenizer.json", "--tokenize", "--prompt", "The LORD said"}).out;
    CHECK(pieces.find("\" LORD\"") != std::string::npos);
    at.refuse("infer", {"--tokenize", "--prompt", "a"}, {"--checkpoint"});
    // Characters are not cut: what does not become one is U+FFFD
    for (const char* seed : {"1", "2", "3"}) {
        const std::string text = at.succeed("infer", {"--checkpoint", at / "run", "--tokens", "200", "--temperature", "100", "--seed", seed}).out;
        int64_t replaced = 0;
        CHECK(valid_utf8(text, &replaced) == text);
        CHECK(replaced == 0);
        CHECK(text.find("\uFFFD") != std::string::npos);
    }
    for (const std::string text : {"", "a", "é", "a\u4e2d\U0001f600", "\xff", "a\x80"}) CHECK(whole_characters(text) == text.size());
    for (const std::string whole : {"é", "\u4e2d", "\U0001f600"})
        for (size_t n = 1; n < whole.size(); n++) CHECK(whole_characters("a" + whole.substr(0, n)) == 1);
}

// ---- streams, names and numbers that somebody else made

TEST_CASE("standard output that cannot be written is an error") {
    const Workplace at;
    make_data(at);
    at.succeed("train", train_flags(at, "run", 1));
    const Limits full{.output = "/dev/full"};
    const std::vector<std::string> phrases = {"standard output cannot be written"};
    for (const char* name : {"train", "infer", "data_prep"}) at.refuse(name, {"--help"}, phrases, full);
    at.refuse("train", {"--list-presets"}, phrases, full);
    at.refuse("train", {"--dry-run", "--preset", "mamba-tiny"}, phrases, full);
    at.refuse("infer", {"--checkpoint", at / "run", "--tokens", "3"}, {"cannot write the text"}, full);
    at.refuse("infer", {"--bench", "--preset", "mamba-tiny", "--prompt", "and"}, phrases, full);
    at.refuse("data_prep", {"--input", at / "text.txt", "--output", at / "more"}, phrases, full);
    CHECK(files(at / "more").size() == 3);
    // A run goes on, and says so in the end.
    at.refuse("train", train_flags(at, "other", 3), phrases, full);
    at.succeed("train", train_flags(at, "same", 3));
    check_same_checkpoint(at / "other", at / "same", 3);
}

TEST_CASE("streams that are not open get nothing that is written elsewhere, and are not read as empty ones") {
    const Workplace at;
    make_data(at);
    at.succeed("train", train_flags(at, "run", 2));
    for (const Arguments::size_type which : {0, 1, 2, 3}) {
        const std::vector<int> closed = which < 3 ? std::vector<int>{int(which)} : std::vector<int>{0, 1, 2};
        const std::string out = "closed" + std::to_string(which);
        at.succeed("train", train_flags(at, out, 2), {.closed = closed});
        check_same_checkpoint(at / out, at / "run", 2);
        at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / out + "/data", "--val-fraction", "0.1"}, {.closed = closed});
        for (const std::string& name : files(at / "data")) CHECK(read_text(at / "data/" + name) == read_text(at / out + "/data/" + name));
    }
    const Arguments from_stdin = {"--checkpoint", at / "run", "--tokens", "1", "--prompt-file", "-"};
    at.refuse("infer", from_stdin, {"standard input", "cannot be read"}, {.closed = {0}});
    at.refuse("infer", from_stdin, {"standard input", "directory"}, {.input = at.path});
    at.refuse("data_prep", {"--input", "-", "--output", at / "none"}, {"standard input"}, {.closed = {0}});
    at.refuse("data_prep", {"--input", "-", "--output", at / "none"}, {"standard input", "directory"}, {.input = at.path});
}

TEST_CASE("a pipe, device or directory where a file is read is refused, and not waited for") {
    const Workplace at;
    make_data(at);
    at.succeed("train", train_flags(at, "run", 2) + Arguments{"--schedule", "constant"});
    const std::string pipe = at / "pipe";
    REQUIRE(mkfifo(pipe.c_str(), 0600) == 0);
    const Arguments infer = {"--checkpoint", at / "run", "--tokens", "1"};
    at.refuse("infer", {"--checkpoint", pipe}, {pipe, "is a pipe"});
    at.refuse("infer", {"--checkpoint", "/dev/null"}, {"/dev/null", "is a device"});
    at.refuse("infer", infer + Arguments{"--prompt-file", pipe}, {pipe, "is a pipe"});
    at.refuse("data_prep", {"--input", pipe, "--output", at / "none"}, {pipe, "is a pipe"});
    at.refuse("data_prep", {"--input", "/dev/zero", "--output", at / "none"}, {"/dev/zero", "is a device"});
    const Arguments resume = {"--data", at / "data", "--out", at / "run", "--resume", "--steps", "3", "--peak-flops", "1e11"};
    for (const char* name : {"data/dataset.json", "data/train_000000.bin", "run/model.safetensors", "run/optimizer-2.safetensors",
                             "run/log.jsonl"}) {
        const std::string whole = read_text(at / name);
        for (const bool directory : {false, true}) {
            fs::remove(at / name);
            if (directory) fs::create_directory(at / name);
            else REQUIRE(mkfifo((at / name).c_str(), 0600) == 0);
            at.refuse("train", resume, {at / name, directory ? "is a directory" : "is a pipe"});
        }
        fs::remove(at / name);
        write_text(at / name, whole);
    }
    at.succeed("train", resume);
}

TEST_CASE("under a temporary name nothing of anybody else's is followed, waited for or written") {
    const Workplace at;
    make_data(at);
    const std::string precious = at / "precious";
    write_text(precious, "precious");
    at.succeed("train", train_flags(at, "whole", 2) + Arguments{"--save-every", "1"});
    for (const bool link : {true, false}) {
        const std::string out = link ? "link" : "pipe";
        fs::create_directory(at / out);
        auto occupy = [&](const std::string& name) {
            if (link) fs::create_symlink(precious, at / name + ".tmp");
            else REQUIRE(mkfifo((at / name + ".tmp").c_str(), 0600) == 0);
        };
        for (const char* name : {"/model.safetensors", "/optimizer-1.safetensors", "/optimizer-2.safetensors", "/train_000000.bin",
                                 "/val_000000.bin", "/dataset.json"})
            occupy(out + name);
        at.succeed("train", train_flags(at, out, 2) + Arguments{"--save-every", "1"});
        check_same_checkpoint(at / out, at / "whole", 2);
        occupy(out + "/log.jsonl");
        at.succeed("train", {"--data", at / "data", "--out", at / out, "--resume", "--peak-flops", "1e11"});
        at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / out, "--val-fraction", "0.1"});
        CHECK(read_tokens(at / out, "train") == read_tokens(at / "data", "train"));
        CHECK(read_text(precious) == "precious");
    }
    // A directory there is named.
    fs::create_directories(at / "taken/model.safetensors.tmp");
    at.refuse("train", train_flags(at, "taken", 1), {"model.safetensors.tmp", "directory"});
    CHECK(files(at / "taken") == std::vector<std::string>{"config.json", "log.jsonl", "model.safetensors.tmp", "tokenizer.json",
                                                          "tokenizer_config.json"});
}

TEST_CASE("small input, large cost") {
    const Workplace at;
    make_data(at);
    at.succeed("train", train_flags(at, "run", 1));
    const Limits limits{.memory_bytes = sanitized() ? RLIM_INFINITY : rlim_t(2) << 30};
    const std::string many(300, 'M'), path = at / "run/model.safetensors", good = read_text(path);
    for (const std::string& layers : {many + "*10000", many + "*14", std::string(5000, 'M'), "(" + std::string(5000, 'M') + ")"}) {
        at.refuse("train", {"--dry-run", "--layers", layers}, {"--layers", "4096"}, limits);
        change_header(path, good, [&](Json& h) {
            Json config = Json::parse(h["__metadata__"]["config"].get<std::string>());
            config["layers"] = layers;
            h["__metadata__"]["config"] = config.dump();
        });
        at.refuse("infer", {"--checkpoint", at / "run"}, {path, "4096"}, limits);
    }
    const std::string deep = std::string(1000000, '['), deeper = std::string(1000000, ' ') + deep;
    for (const char* key : {"config", "tokenizer"}) {
        change_header(path, good, [&](Json& h) { h["__metadata__"][key] = deep; });
        at.refuse("infer", {"--checkpoint", at / "run"}, {path, "nested deeper"}, limits);
    }
    const uint64_t bytes = deeper.size();
    write_text(path, std::string(reinterpret_cast<const char*>(&bytes), 8) + deeper);
    at.refuse("infer", {"--checkpoint", at / "run"}, {path, "nested deeper"}, limits);
    write_text(at / "data/dataset.json", "{\"tokenizer\":" + deep);
    at.refuse("train", train_flags(at, "other", 1), {"dataset.json", "nested deeper"}, limits);
}

TEST_CASE("numbers in files are read as strictly as on the command line") {
    const Workplace at;
    make_data(at);
    at.succeed("train", train_flags(at, "run", 2) + Arguments{"--schedule", "constant"});
    const std::string path = at / "run/model.safetensors", good = read_text(path);
    const Arguments resume = {"--data", at / "data", "--out", at / "run", "--resume", "--steps", "3", "--peak-flops", "1e11"};
    auto change = [&](const char* where, const char* name, const std::string& value) {
        change_header(path, good, [&](Json& h) {
            std::string text = h["__metadata__"][where];
            const size_t from = text.find(std::string("\"") + name + "\":") + strlen(name) + 3;
            REQUIRE(from > strlen(name) + 3);
            text.replace(from, text.find_first_of(",}", from) - from, value);
            h["__metadata__"][where] = text;
        });
    };
    for (const char* value : {"8.9", "16.0", "4294967312", "1e300", "-1", "\"16\"", "null", "true", "[16]"}) {
        change("config", "d-model", value);
        at.refuse("infer", {"--checkpoint", at / "run"}, {path, "d-model"});
        at.refuse("train", resume, {path, "d-model"});
    }
    for (const char* value : {"2.5", "4294967300", "1e300", "-4", "\"4\""}) {
        change("training", "batch", value);
        at.refuse("train", resume, {path, "batch"});
    }
    for (const char* value : {"-1", "1.5", "18446744073709551616", "1e300"}) {
        change("training", "seed", value);
        at.refuse("train", resume, {path, "seed"});
    }
    for (const char* value : {"1e999", "\"0.1\"", "true"}) {
        change("training", "lr", value);
        at.refuse("train", resume, {path});
    }
    for (const char* value : {"16.5", "\"16\"", "1e300", "[[16]]"}) {
        change_header(path, good, [&](Json& h) { h["backbone.embeddings.weight"]["shape"][1] = Json::parse(value); });
        at.refuse("infer", {"--checkpoint", at / "run"}, {path, "backbone.embeddings.weight", "size"});
    }
    write_text(path, good);
    at.succeed("train", resume);
    const std::string json = at / "data/dataset.json", whole = read_text(json);
    for (const char* value : {"38974.5", "1e+300", "-1", "null"}) {
        Json changed = Json::parse(whole);
        changed["train_tokens"] = Json::parse(value);
        write_text(json, changed.dump());
        at.refuse("train", train_flags(at, "other", 1), {"dataset.json", value});
    }
    write_text(json, whole);
    for (const char* layers : {"M* 4", "M*+4", "M*0004", "M*4 ", "M*", "M*4*4"})
        at.refuse("train", {"--dry-run", "--layers", layers}, {"--layers"});
}

TEST_CASE("what others wrote is quoted, and each thing has its name") {
    const Workplace at;
    make_data(at);
    at.succeed("train", train_flags(at, "run", 2) + Arguments{"--schedule", "constant"});
    const std::string path = at / "run/model.safetensors", good = read_text(path);
    change_header(path, good, [&](Json& h) {
        Json config = Json::parse(h["__metadata__"]["config"].get<std::string>());
        config["layers"] = "M\nerror: \033[31mred";
        h["__metadata__"]["config"] = config.dump();
    });
    at.refuse("infer", {"--checkpoint", at / "run"}, {path, "M\\nerror: \\x1b[31mred"});
    change_header(path, good, [&](Json& h) { h["__metadata__"]["machine"] = "a\033[31m\nb"; });
    const Arguments resume = {"--data", at / "data", "--out", at / "run", "--resume", "--steps", "3", "--peak-flops", "1e11"};
    const std::string out = at.succeed("train", resume).out;
    CHECK(out.find("written on a\\x1b[31m\\nb;") != std::string::npos);
    fs::remove_all(at / "dir");
    fs::create_directories(at / "dir/model.safetensors");
    at.refuse("infer", {"--checkpoint", at / "dir"}, {at / "dir/model.safetensors", "is a directory"});
    if (geteuid() != 0) {
        fs::permissions(at / "data", fs::perms::owner_exec);
        at.refuse("train", train_flags(at, "other", 1), {at / "data", "Permission denied"});
        fs::permissions(at / "data", fs::perms::owner_all);
    }
    // A directory that is input and output: what is written there is no text of the next run.
    fs::create_directory(at / "both");
    write_text(at / "both/a.txt", prose(5000));
    for (int run = 0; run < 2; run++) {
        at.succeed("data_prep", {"--input", at / "both", "--output", at / "both", "--val-fraction", "0.1"});
        CHECK(Json::parse(read_text(at / "both/dataset.json")).at("documents") == 1);
    }
}

TEST_CASE("limits are errors, not signals, and nothing waits for ever") {
    const Workplace at;
    make_data(at);
    at.succeed("train", train_flags(at, "run", 2));
    // The first thread's stack, and with it the others', is raised where that is allowed.
    const Arguments small = {"bash", "-c", "ulimit -S -s 64 && exec \"$0\" \"$@\""};
    at.succeed("train", train_flags(at, "small", 2), {.under = small});
    check_same_checkpoint(at / "small", at / "run", 2);
    at.succeed("infer", {"--checkpoint", at / "run", "--tokens", "3"}, {.under = small});
    at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "small"}, {.under = small});
    const Limits smaller{.stack_bytes = 256 << 10};
    at.refuse("train", train_flags(at, "other", 2), {"stack is limited to 256 KB", "ulimit -s"}, smaller);
    at.refuse("infer", {"--checkpoint", at / "run"}, {"stack is limited to 256 KB"}, smaller);
    at.refuse("data_prep", {"--input", at / "text.txt", "--output", at / "small"}, {"stack is limited to 256 KB"}, smaller);
    // A shard that somebody cuts short during training, and a log beyond the file size limit.
    const Limits meanwhile{.meanwhile = [&](pid_t) {
        for (int i = 0; i < 4000 && read_text(at / "cut/log.jsonl").find("\"step\":2,") == std::string::npos; i++)
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
        CHECK(truncate((at / "data/train_000000.bin").c_str(), 2000) == 0);
    }};
    const Arguments unsaved = {"--save-every", "0"};
    at.refuse("train", train_flags(at, "cut", 1000000) + unsaved, {at / "data/train_000000.bin", "cut short"}, meanwhile);
    make_data(at);
    at.refuse("train", train_flags(at, "long", 1000000) + unsaved, {"log.jsonl", "File too large"}, {.file_bytes = 3000});
    if (sanitized()) return;
    for (const rlim_t megabytes : {150, 200, 300, 350, 400, 450, 600})
        at.refuse("train", train_flags(at, "other", 2), {"memory is limited", "OMP_NUM_THREADS"}, {.memory_bytes = megabytes << 20});
    at.succeed("train", train_flags(at, "enough", 2), {.memory_bytes = rlim_t(800) << 20});
    at.succeed("train", train_flags(at, "single", 2), {.memory_bytes = rlim_t(500) << 20, .threads = "1"});
    at.succeed("data_prep", {"--input", at / "text.txt", "--output", at / "small"}, {.memory_bytes = rlim_t(100) << 20});
    at.succeed("train", {"--data", at / "data", "--out", at / "attention", "--layers", "A", "--d-model", "16", "--batch", "1", "--seq-len", "8",
                         "--steps", "1", "--peak-flops", "1e11", "--eval-every", "0"});
    for (const Arguments& more : {Arguments{"--tokens", "4000000000"}, Arguments{"--tokens", "4000000", "--samples", "60000"}})
        at.refuse("infer", Arguments{"--checkpoint", at / "attention", "--prompt", "a"} + more,
                  {"cannot allocate", "decode state", "of at most " + more[1].substr(0, 1) + "00000", "fewer or shorter"});
}

// ---- system calls that fail, and moments at which a program is killed: each of them once

struct Call {
    std::string name, line;
    int index;  // among those of its name, from 1
};
// Those of a program's first thread on files in the workplace.
static std::vector<Call> calls_on_files(const Workplace& at, const std::string& program, const Arguments& arguments) {
    const std::string log = at / "strace", names = "write,pwrite64,fsync,close,openat,getdents64,ftruncate,read,pread64,lseek,?rename,"
                                                  "?renameat,?renameat2,?unlink,?unlinkat,?mkdir,?mkdirat,flock";
    at.succeed(program, arguments, {.under = {"strace", "-f", "-qq", "-y", "-o", log, "-e", "trace=" + names}});
    std::vector<Call> calls;
    std::map<std::string, int> seen;
    std::map<std::string, std::string> opened;  // how
    std::istringstream lines(read_text(log));
    std::string first;
    for (std::string line; std::getline(lines, line);) {
        std::istringstream words(line);
        std::string process, call;
        words >> process >> call;
        if (first.empty()) first = process;
        if (process != first || !isalpha(call[0]) || call.find('(') == std::string::npos) continue;
        const std::string name = call.substr(0, call.find('('));
        const int index = ++seen[name];
        const bool stream = line.find("/stdout>") != std::string::npos || line.find("/stderr>") != std::string::npos;
        if (line.find(at / "") == std::string::npos || stream) continue;
        const std::string file = line.substr(line.rfind('<') + 1, line.rfind('>') - line.rfind('<') - 1);
        if (name == "openat") opened[file] = line;
        calls.push_back({name, name == "close" ? line + ", of " + opened[file] : line, index});
    }
    CHECK(calls.size() > 5);
    return calls;
}
static Limits with_fault(const Call& call, const std::string& fault) {
    return {.under = {"strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=" + call.name, "-e",
                      "inject=" + call.name + ":" + fault + ":when=" + std::to_string(call.index)}};
}
static bool can_inject() {
    const char* why = nullptr;
    if (system("strace -o /dev/null true 2> /dev/null") != 0) why = "no strace, or it may not trace here";
    else if (sanitized()) why = "under AddressSanitizer it takes too long";
    if (why) printf("skipped: failing system calls: %s\n", why);
    return !why;
}
// Begins as `begin` leaves things, and fails at each of the program's calls. Then `check` is told the result: it is right with exit code 0
// if all is done, or with 1 and one line of error.
static void fail_at_each_call(const Workplace& at, const std::string& program, const Arguments& arguments, const std::function<void()>& begin,
                              const std::function<void(const Result&)>& check) {
    begin();
    int faults = 0;
    for (const Call& call : calls_on_files(at, program, arguments)) {
        const bool space = call.name == "write" || call.name == "pwrite64" || call.name == "ftruncate";
        const bool reads = call.name.find("read") != std::string::npos || call.name == "lseek" || call.name == "getdents64" ||
                           (call.name == "openat" && call.line.find("O_CREAT") == std::string::npos);
        const bool writes = space || call.name == "fsync" || call.name.starts_with("rename") ||
                            (call.name == "close" && call.line.find("O_WRONLY") != std::string::npos);
        for (const std::string fault : {space ? "error=ENOSPC" : "error=EIO", "signal=KILL"}) {
            if (reads && fault == "signal=KILL") continue;  // files are as they were at the call before
            INFO(program << ", " << fault << " at call " << call.index << " of " << call.name << ": " << call.line);
            begin();
            const Result result = at.run(program, arguments, with_fault(call, fault));
            INFO("exit code " << result.code << ", " << result.err);
            if (fault == "signal=KILL") CHECK(result.code == -SIGKILL);
            else if (writes) CHECK((result.code == 1 || !result.err.empty()));
            else CHECK((result.code == 0 || result.code == 1));
            if (result.code == 1) CHECK((result.err.starts_with("error: ") && std::count(result.err.begin(), result.err.end(), '\n') == 1));
            check(result);
            faults++;
        }
    }
    printf("%s %s: %d failing system calls and kills\n", program.c_str(), arguments[0].c_str(), faults);
}
static std::map<std::string, std::string> contents(const fs::path& directory) {
    std::map<std::string, std::string> all;
    if (fs::exists(directory))
        for (const std::string& name : files(directory)) all[name] = read_text(directory / name);
    return all;
}

TEST_CASE("data_prep, failing or killed at any system call, leaves the dataset that was there, or the new one") {
    const Workplace at;
    if (!can_inject()) return;
    write_text(at / "old.txt", prose(9000));
    write_text(at / "new.txt", prose(5000) + kSeparatorLine + prose(1000));
    const auto flags = [&](const char* text, const char* out) {
        return Arguments{"--input", at / text, "--output", at / out, "--val-fraction", "0.1", "--shard-tokens", "2000"};
    };
    at.succeed("data_prep", flags("old.txt", "before"));
    at.succeed("data_prep", flags("new.txt", "after"));
    const auto before = contents(at / "before"), after = contents(at / "after");
    CHECK(before.size() > after.size());
    fail_at_each_call(
        at, "data_prep", flags("new.txt", "data"),
        [&] {
            fs::remove_all(at / "data");
            fs::copy(at / "before", at / "data");
        },
        [&](const Result& result) {
            auto now = contents(at / "data");
            if (result.code == 1 && result.err.find("is written") != std::string::npos)  // what was there before may be left
                std::erase_if(now, [](const auto& file) { return file.first.ends_with(".old"); });
            const bool whole = now == before || now == after;
            if (result.code == 0) CHECK((now == after));
            if (result.code == 1) {
                CHECK(whole);
                CHECK((result.err.find("unharmed") == std::string::npos || now == before));
                CHECK((result.err.find("is written") == std::string::npos || now == after));
            }
            // Killed, it can leave files behind; but who reads a dataset there reads a whole one.
            const Arguments train = {"--data", at / "data", "--out", at / "run", "--layers", "M", "--d-model", "16", "--batch", "1",
                                     "--seq-len", "8", "--steps", "1", "--peak-flops", "1e11", "--eval-every", "0"};
            fs::remove_all(at / "run");
            if (fs::exists(at / "data/dataset.json")) at.succeed("train", train);
            at.succeed("data_prep", flags("new.txt", "data"));
            CHECK((contents(at / "data") == after));
        });
}

TEST_CASE("train, failing or killed at any system call, leaves a checkpoint that resumes to the same bits") {
    const Workplace at;
    if (!can_inject()) return;
    make_data(at, 3000);
    const auto flags = [&](const char* out, int steps) {
        return Arguments{"--data", at / "data", "--out", at / out, "--steps", std::to_string(steps), "--layers", "F", "--d-model", "16",
                         "--save-every", "1", "--schedule", "constant", "--eval-tokens", "64"} + kSize;
    };
    at.succeed("train", flags("begun", 2));
    at.succeed("train", flags("whole", 3));
    const auto check = [&](const Result& result, int steps) {
        if (result.code == 0) CHECK(fs::exists(at / "run/optimizer-" + std::to_string(steps) + ".safetensors"));
        const bool saved = fs::exists(at / "run/model.safetensors");
        at.succeed("train", flags("run", 3) + (saved ? Arguments{"--resume"} : Arguments{}));
        check_same_checkpoint(at / "whole", at / "run", 3);
        CHECK(files(at / "run") == files(at / "whole"));
    };
    fail_at_each_call(
        at, "train", flags("run", 2), [&] { fs::remove_all(at / "run"); }, [&](const Result& result) { check(result, 2); });
    fail_at_each_call(
        at, "train", flags("run", 3) + Arguments{"--resume"},
        [&] {
            fs::remove_all(at / "run");
            fs::copy(at / "begun", at / "run");
        },
        [&](const Result& result) {
            CHECK(fs::exists(at / "run/model.safetensors"));
            check(result, 3);
        });
}

TEST_CASE("infer, failing at any system call, says so") {
    const Workplace at;
    if (!can_inject()) return;
    make_data(at, 3000);
    at.succeed("train", train_flags(at, "run", 1));
    write_text(at / "prompt", "and the");
    const Arguments arguments = {"--checkpoint", at / "run", "--prompt-file", at / "prompt", "--tokens", "5"};
    const std::string text = at.succeed("infer", arguments).out;
    fail_at_each_call(at, "infer", arguments, [] {}, [&](const Result& result) {
        if (result.code == 0) CHECK(result.out == text);
    });
}
