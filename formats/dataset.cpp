#include "dataset.h"

#include <algorithm>
#include <cstring>

#include "json.h"

static TokenStream::Shard open_shard(const std::string& path, int64_t first) {
    TokenStream::Shard shard{InputFile(path), 0, first, 0};
    const char* p = path.c_str();
    const int64_t size = shard.file.size;
    if (size < kTokenHeaderBytes)
        fail("%s: not a token file: %lld bytes, its header alone has %lld", p, (long long)size, (long long)kTokenHeaderBytes);
    int32_t header[3];
    shard.file.read(0, header, sizeof(header));
    if (header[0] != kTokenMagic) fail("%s: not a token file: it starts with %d, not %d", p, header[0], kTokenMagic);
    if (header[1] != 1 && header[1] != 2) fail("%s: version %d of the token format is unknown; there are 1 and 2", p, header[1]);
    shard.width = header[1] == 1 ? 2 : 4;
    shard.count = header[2];
    if (shard.count < 1 || kTokenHeaderBytes + shard.count * shard.width != size)
        fail("%s: damaged: its header claims %lld tokens, it holds %lld", p, (long long)shard.count,
             (long long)((size - kTokenHeaderBytes) / shard.width));
    return shard;
}

TokenStream::TokenStream(const std::string& directory, const std::string& split, int64_t expected, int vocab) : vocab(vocab) {
    for (const std::string& name : list_directory(directory))
        if (name.starts_with(split + "_") && name.ends_with(".bin")) {
            shards.push_back(open_shard(directory + "/" + name, count));
            count += shards.back().count;
        }
    if (count != expected)
        fail("%s: its %s_*.bin hold %lld tokens, %s says %lld; run data_prep again", directory.c_str(), split.c_str(), (long long)count,
             kDatasetFile.c_str(), (long long)expected);
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
    const JsonObject json(read_file(path, "--data: dataset (made by data_prep)"), path);
    JsonObject named;
    int64_t train_tokens = 0, val_tokens = 0;
    json.get("tokenizer", named);
    json.get("train_tokens", train_tokens);
    json.get("val_tokens", val_tokens);
    tokenizer = Tokenizer::from_json(named.text(), path);
    train = std::make_unique<TokenStream>(directory, "train", train_tokens, tokenizer.vocab);
    val = std::make_unique<TokenStream>(directory, "val", val_tokens, tokenizer.vocab);
}
