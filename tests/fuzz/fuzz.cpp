// What reads other people's bytes, fed with any: no input may crash it, make it hang, or take much more memory than its own size.
// libFuzzer's main program; FUZZ_TARGET names one of the targets below. "make fuzz" runs each of them in turn.
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <string>

#include "formats/dataset.h"
#include "formats/safetensors.h"
#include "moemamba.h"

static std::string directory() {
    static const std::string name = [] {
        std::string path = "/tmp/moemamba-fuzz.XXXXXX";
        if (!mkdtemp(path.data())) abort();
        atexit([] { system(("rm -r " + directory()).c_str()); });
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
static void layers(const std::string& bytes) {
    Config config;
    config.layers = bytes;
    config.resolve();
    if (config.steps().empty()) abort();
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const std::map<std::string, void (*)(const std::string&)> targets = {
        {"safetensors", safetensors}, {"tokens", tokens}, {"dataset", dataset}, {"config", config}, {"tokenizer", tokenizer}, {"layers", layers}};
    static void (*const target)(const std::string&) = targets.at(getenv("FUZZ_TARGET"));
    try {
        target(std::string(reinterpret_cast<const char*>(data), size));
    } catch (const Error&) {
    }
    return 0;
}
