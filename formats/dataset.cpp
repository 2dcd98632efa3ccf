#include "dataset.h"

#include <algorithm>
#include <cstring>

#include "json.h"

static TokenStream::Shard open_shard(const std::string& path, int64_t first) {
    TokenStream::Shard shard{InputFile(path), 0, 0, first, 0};
    const char* p = path.c_str();
    const int64_t size = shard.file.size;
    if (size < kTokenHeaderBytes)
        fail("%s: not a token file: %lld bytes, its header alone has %lld", p, (long long)size, (long long)kTokenHeaderBytes);
    int32_t header[3];
    shard.file.read(0, header, sizeof(header));
    const bool llama = header[0] == kLlamaMagic;
    if (header[0] != kTokenMagic && !llama) fail("%s: not a token file: it starts with %d, not %d or %d", p, header[0], kTokenMagic, kLlamaMagic);
    if (llama ? header[1] != 7 : header[1] != 1 && header[1] != 2)
        fail("%s: version %d of the token format is unknown; there %s", p, header[1], llama ? "is 7" : "are 1 and 2");
    shard.magic = header[0];
    shard.width = header[1] == 1 ? 2 : 4;
    shard.count = header[2];
    if (shard.count < 1 || kTokenHeaderBytes + shard.count * shard.width != size)
        fail("%s: damaged: its header claims %lld tokens, it holds %lld", p, (long long)shard.count,
             (long long)((size - kTokenHeaderBytes) / shard.width));
    return shard;
}

TokenStream::TokenStream(const std::vector<std::string>& paths, int vocab) : vocab(vocab) {
    for (const std::string& path : paths) {
        shards.push_back(open_shard(path, count));
        count += shards.back().count;
    }
}

static std::vector<std::string> files_of(const std::string& directory, const std::string& split) {
    std::vector<std::string> paths;
    for (const std::string& name : list_directory(directory))
        if (name.starts_with(split + "_") && name.ends_with(".bin")) paths.push_back(directory + "/" + name);
    return paths;
}
TokenStream::TokenStream(const std::string& directory, const std::string& split, int64_t expected, int vocab)
    : TokenStream(files_of(directory, split), vocab) {
    if (count != expected)
        fail("%s: its %s_*.bin hold %lld tokens, %s says %lld; run data_prep again", directory.c_str(), split.c_str(), (long long)count,
             kDatasetFile.c_str(), (long long)expected);
}

std::string TokenStream::fingerprint() const {
    uint64_t hash = 0xCBF29CE484222325u;  // FNV-1a
    const auto add = [&](uint64_t number) {
        for (int byte = 0; byte < 8; byte++) hash = (hash ^ (number >> 8 * byte & 0xFF)) * 0x100000001B3u;
    };
    for (const Shard& shard : shards) {
        std::vector<int> tokens(std::min<int64_t>(shard.count, 1024));
        add(shard.count);
        for (const int64_t from : {shard.first, shard.first + shard.count - int64_t(tokens.size())}) {
            read(tokens.data(), from, int64_t(tokens.size()));
            for (const int token : tokens) add(token);
        }
    }
    char text[24];
    snprintf(text, sizeof(text), "%016llx", (unsigned long long)hash);
    return text;
}

void TokenStream::read(int* out, int64_t first, int64_t n) const {
    auto shard = std::upper_bound(shards.begin(), shards.end(), first, [](int64_t at, const Shard& s) { return at < s.first; }) - 1;
    for (std::vector<char> bytes; n > 0; ++shard) {
        const int64_t from = first - shard->first, here = std::min(n, shard->count - from);
        bytes.resize(size_t(here) * shard->width);
        shard->file.read(kTokenHeaderBytes + from * shard->width, bytes.data(), bytes.size());
        for (int64_t i = 0; i < here; i++) {
            uint32_t token = 0;  // little-endian, as the format and every machine this runs on
            memcpy(&token, &bytes[i * shard->width], shard->width);
            if (token >= uint32_t(vocab))
                fail("%s: token %lld is %u, beyond the vocabulary of %d", shard->file.path.c_str(), (long long)(from + i), token, vocab);
            *out++ = int(token);
        }
        first += here, n -= here;
    }
}

Dataset::Dataset(const std::string& directory) {
    const std::string path = directory + "/" + kDatasetFile;
    const JsonObject json(read_file(path, "dataset (made by data_prep)"), path);
    JsonObject named;
    int64_t train_tokens = 0, val_tokens = 0;
    json.get("tokenizer", named);
    json.get("train_tokens", train_tokens);
    json.get("val_tokens", val_tokens);
    tokenizer = Tokenizer::from_json(named.text(), path);
    train = std::make_unique<TokenStream>(directory, "train", train_tokens, tokenizer.vocab);
    val = std::make_unique<TokenStream>(directory, "val", val_tokens, tokenizer.vocab);
    if (json.has("answer_mark")) {
        json.get("example_tokens", example_tokens);
        json.get("answer_mark", answer_mark);
        if (example_tokens < 1 || answer_mark < 0 || answer_mark >= tokenizer.vocab)
            fail("%s: \"example_tokens\" is %d, \"answer_mark\" %d, of %d tokens", path.c_str(), example_tokens, answer_mark, tokenizer.vocab);
    }
    fingerprint = train->fingerprint();
}

void Dataset::check_length(const char* flag, int T) const {
    if (example_tokens > 0 && T % example_tokens)
        fail("%s %d: must be a multiple of %d, the tokens of an example in the data", flag, T, example_tokens);
}

void Dataset::window(const TokenStream& stream, int64_t index, int T, int* tokens, int* targets) const {
    std::vector<int> read(T + 1, -1);
    stream.read(read.data(), index * T, T + beyond());
    std::copy_n(read.begin(), T, tokens);
    for (int t = 0; t < T; t++) targets[t] = answer_mark < 0 || read[t] == answer_mark ? read[t + 1] : -1;
}

Dataset::Dataset(const std::vector<std::string>& train_files, const std::vector<std::string>& val_files, const std::string& named,
                 int vocab) {
    train = std::make_unique<TokenStream>(train_files, 0);
    val = std::make_unique<TokenStream>(val_files, 0);
    const TokenStream::Shard& first = train->shards.at(0);
    for (const TokenStream* stream : {train.get(), val.get()})
        for (const TokenStream::Shard& shard : stream->shards)
            if (shard.magic != first.magic || shard.width != first.width)
                fail("%s and %s: token files of two kinds", first.file.path.c_str(), shard.file.path.c_str());
    if (!named.empty()) tokenizer = Tokenizer::load(named);
    else if (first.magic == kLlamaMagic) tokenizer = Tokenizer::none(128256, 128001);
    else if (first.width == 2) tokenizer = Tokenizer::none(50257, 50256);
    else if (vocab > 0) tokenizer = Tokenizer::none(vocab, -1);
    else fail("%s: whose tokens are they? Give --tokenizer, or --vocab, or the directory that data_prep wrote", first.file.path.c_str());
    if (named.empty() && vocab > 0) tokenizer = Tokenizer::none(vocab, tokenizer.end_of_text < vocab ? tokenizer.end_of_text : -1);
    train->vocab = val->vocab = tokenizer.vocab;
    fingerprint = train->fingerprint();
}
