// What reads other people's bytes, fed with any: no input may crash it, make it hang, or take much more memory than its own size.
// libFuzzer's main program; FUZZ_TARGET names one of the targets below. "make fuzz" runs each of them in turn.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <string>

#include "formats/dataset.h"
#include "formats/documents.h"
#include "formats/huggingface.h"
#include "formats/safetensors.h"
#include "moemamba.h"

// In memory, where there is such a directory. Removed at the end; never destroyed, because that is later.
static const std::string& directory() {
    static const std::string& name = *[] {
        auto* const path = new std::string(std::string(access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp") + "/moemamba-fuzz.XXXXXX");
        if (!mkdtemp(path->data())) abort();
        atexit([] { std::filesystem::remove_all(directory()); });
        return path;
    }();
    return name;
}
static std::string file_of(const std::string& name, const std::string& bytes) {
    const std::string path = directory() + "/" + name;
    FILE* file = fopen(path.c_str(), "w");
    if (!file || fwrite(bytes.data(), 1, bytes.size(), file) != bytes.size() || fclose(file) != 0) abort();
    return path;
}

static void safetensors(const std::string& bytes) {
    const Safetensors file(file_of("model.safetensors", bytes));
    for (const auto& [name, entry] : file.entries) {
        std::vector<double> values(entry.count);
        file.read(name, values.data());
    }
}
static void tokens(const std::string& bytes) {
    file_of("train_000000.bin", bytes);
    const TokenStream stream(directory(), "train", bytes.size() / 2 - kTokenHeaderInts * 2, 257);
    std::vector<int> all(stream.count);
    stream.read(all.data(), 0, stream.count);
}
static void dataset(const std::string& bytes) {
    static const bool once = [] {
        std::string shard(kTokenHeaderBytes + 6, 0);
        const int32_t header[] = {kTokenMagic, 1, 3};
        shard.replace(0, sizeof(header), reinterpret_cast<const char*>(header), sizeof(header));
        file_of("train_000000.bin", shard);
        file_of("val_000000.bin", shard);
        return true;
    }();
    (void)once;
    file_of(kDatasetFile, bytes);
    const Dataset data(directory());
}
static void config(const std::string& bytes) { Config::from_json(bytes, "config"); }
static void tokenizer(const std::string& bytes) { Tokenizer::from_json(bytes, "tokenizer"); }
// A tokenizer's file, and a text for it.
static void bpe(const std::string& bytes) {
    file_of(kTokenizerFile, bytes);
    const Bpe bpe = Bpe::load(directory() + "/" + kTokenizerFile);
    std::vector<int> tokens;
    int64_t replaced = 0;
    bpe.encode(tokens, valid_utf8(bytes, &replaced));
}
static std::string smallest_bpe() {
    std::string vocabulary;
    for (int b = 0, next = 256; b < 256; b++) {
        const int code = (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD) ? b : next++;
        char text[24];
        snprintf(text, sizeof(text), "\"\\u%04x\":%d,", code, b);
        vocabulary += text;
    }
    return R"({"added_tokens":[{"id":257,"content":"</s>"}],"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false},"model":{"vocab":{)" +
           vocabulary + R"("ab":256},"merges":["a b"]}})";
}
// GPT-2's two files, with a byte 1 between them.
static void bpe_pair(const std::string& bytes) {
    const size_t cut = std::min(bytes.find('\1'), bytes.size());
    file_of("encoder.json", bytes.substr(0, cut));
    file_of("vocab.bpe", bytes.substr(std::min(cut + 1, bytes.size())));
    const Bpe bpe = Bpe::load(directory());
    std::vector<int> tokens;
    bpe.encode(tokens, "ab abc");
}
static std::string smallest_pair() {
    const std::string whole = smallest_bpe(), begin = "\"vocab\":";
    const size_t from = whole.find(begin) + begin.size(), to = whole.find(",\"merges\"");
    std::string vocabulary = whole.substr(from, to - from);
    vocabulary.insert(vocabulary.size() - 1, ",\"<|endoftext|>\":257");
    return vocabulary + "\1#version: 0.2\na b\n";
}
static void their_config(const std::string& bytes) {
    const huggingface::TheirConfig theirs = huggingface::read_config(JsonObject(bytes, "config.json"), "config.json");
    Config config = Config::from_json(theirs.config.text(), "config.json", false);
    huggingface::write_config(JsonObject(config.to_json(), "config"), config.steps(), 0, "float32");
}
static void index(const std::string& bytes) {
    static const std::string shard = R"({"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}})";
    const uint64_t size = shard.size();
    file_of("a.safetensors", std::string(reinterpret_cast<const char*>(&size), 8) + shard + "1234");
    const Safetensors file(file_of("model.safetensors.index.json", bytes));
    float values[2];
    file.read("a", values);
}
static void json_lines(const std::string& bytes) {
    for (size_t at = 0, end; at <= bytes.size(); at = end + 1) {
        end = std::min(bytes.find('\n', at), bytes.size());
        std::string text, problem;
        if (read_json_line(std::string_view(bytes).substr(at, end - at), "text", text, problem) != problem.empty()) abort();
        if (text.size() > bytes.size()) abort();
    }
}
static void compressed(const std::string& bytes) {
    const std::string path = file_of("text", bytes);
    TextFile file(path, open(path.c_str(), O_RDONLY | O_CLOEXEC));
    std::string block(1 << 16, 0);
    for (size_t n = 0, total = 0; (n = file.read(block.data(), block.size())) > 0 && total < 64 << 20;) total += n;
}
static std::string gzip_of(const std::string& text) {
    const std::string path = directory() + "/text.gz";
    gzFile file = gzopen(path.c_str(), "wb9");
    if (gzwrite(file, text.data(), unsigned(text.size())) != int(text.size()) || gzclose(file) != Z_OK) abort();
    std::string bytes(std::filesystem::file_size(path), 0);
    FILE* read = fopen(path.c_str(), "r");
    if (fread(bytes.data(), 1, bytes.size(), read) != bytes.size()) abort();
    fclose(read);
    return bytes;
}
static void layers(const std::string& bytes) {
    Config config;
    config.layers = bytes;
    config.resolve();
    if (config.steps().empty()) abort();
}

struct Target {
    void (*read)(const std::string&);
    std::string whole;  // an input without fault, from which others are made
};
static const Target& target() {
    const auto little_endian = [](auto number) { return std::string(reinterpret_cast<const char*>(&number), sizeof(number)); };
    static const std::string header = R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},)"
                                      R"("b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]}})";
    static const std::string shard = little_endian(kTokenMagic) + little_endian(1) + little_endian(3) +
                                     std::string(kTokenHeaderBytes - 12, 0) + std::string("a\0b\0\0\1", 6);
    static const std::map<std::string, Target> targets = {
        {"safetensors", {safetensors, little_endian(uint64_t(header.size())) + header + std::string(14, 'x')}},
        {"tokens", {tokens, shard}},
        {"dataset",
         {dataset, "{\"tokenizer\":" + Tokenizer().to_json() + R"(,"train_tokens":3,"val_tokens":3,"documents":1,"split":"pieces"})"}},
        {"config", {config, Config().to_json()}},
        {"tokenizer", {tokenizer, Tokenizer().to_json()}},
        {"bpe", {bpe, smallest_bpe()}},
        {"bpe_pair", {bpe_pair, smallest_pair()}},
        {"their_config",
         {their_config, R"({"model_type":"jamba","hidden_size":16,"num_hidden_layers":4,"num_attention_heads":2,"rope_parameters":{"rope_theta":1e6},)"
                        R"("num_key_value_heads":1,"num_experts":4,"num_local_experts":2,"attn_layer_period":2,"expert_layer_offset":0,"eos_token_id":[1]})"}},
        {"index", {index, R"({"metadata":{"total_size":4},"weight_map":{"a":"a.safetensors"}})"}},
        {"json_lines", {json_lines, R"({"url":"x","text":"a\u00e9\n","list":[1,-2.5e3,{"text":null}]})"}},
        {"gzip", {compressed, gzip_of("and the river and the river\n")}},
        // A frame of zstd that holds "abab...": magic, descriptor, size, a block of one byte repeated, and one as it is
        {"zstd", {compressed, std::string("\x28\xb5\x2f\xfd\x20\x0c\x52\x00\x00\x61\x11\x00\x00\x62\x63", 15)}},
        {"layers", {layers, "ME(ME)F*2"}}};
    const char* const name = getenv("FUZZ_TARGET");
    if (!name || !targets.count(name)) fprintf(stderr, "error: FUZZ_TARGET: none of those in the Makefile\n"), exit(1);
    return targets.at(name);
}

// libFuzzer calls this once, with its flags and the directory of inputs that it keeps.
extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
    const std::string first = std::string((*argv)[*argc - 1]) + "/whole";
    if (FILE* file = fopen(first.c_str(), "w")) fwrite(target().whole.data(), 1, target().whole.size(), file), fclose(file);
    target().read(target().whole);  // throws, if it is not
    return 0;
}
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const Target& fed = target();
    try {
        fed.read(std::string(reinterpret_cast<const char*>(data), size));
    } catch (const Error&) {
    }
    return 0;
}
