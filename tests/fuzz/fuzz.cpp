// What reads other people's bytes, fed with any: no input may crash it, make it hang, or take much more memory than its own size.
// libFuzzer's main program; FUZZ_TARGET names one of the targets below. "make fuzz" runs each of them in turn.
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <string>

#include "formats/dataset.h"
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
