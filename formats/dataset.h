// Datasets, as data_prep writes them: a directory of token files (.bin, llm.c's format) and a dataset.json that names their tokenizer.
//   train_000000.bin, val_000000.bin, ...   256 int32 {kTokenMagic, version, count, 0...}, then count tokens: uint16 (version 1) or uint32 (2)
//   dataset.json                            {"tokenizer": {...}, "train_tokens", "val_tokens", "documents", "split"}; of a task besides
//                                           {"example_tokens", "answer_mark"}
// llm.c's own files can be read without a dataset.json: of GPT-2's tokens (kTokenMagic, version 1), or of Llama 3's (kLlamaMagic, version 7: uint32).
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "files.h"
#include "tokenizer.h"

inline constexpr int kTokenMagic = 20240520, kLlamaMagic = 20240801, kTokenHeaderInts = 256;
inline constexpr int64_t kTokenHeaderBytes = kTokenHeaderInts * sizeof(int32_t);
inline const std::string kDatasetFile = "dataset.json";

// The token files of one split as one long stream. They are read as they are needed, from what was there when it was opened: neither a new
// dataset in their place nor a file cut short is taken for the old one.
struct TokenStream {
    struct Shard {
        InputFile file;
        int32_t magic;
        int width;             // bytes of a token
        int64_t first, count;  // position of its first token in the stream, tokens
    };
    std::vector<Shard> shards;
    int64_t count = 0;
    int vocab;
    TokenStream(const std::vector<std::string>& paths, int vocab);
    // The files of a split in a directory; fails unless they hold so many
    TokenStream(const std::string& directory, const std::string& split, int64_t expected, int vocab);
    std::string fingerprint() const;  // of the files' sizes, and of the tokens they begin and end with
    void read(int* out, int64_t first, int64_t n) const;                                               // fails at a token beyond vocab
};

struct Dataset {
    Tokenizer tokenizer;
    std::unique_ptr<TokenStream> train, val;
    std::string fingerprint;  // of train
    // Of a task (data_prep --task): tokens of each example, and the token that stands before each answer. Answers alone are to be predicted.
    int example_tokens = 0, answer_mark = -1;
    explicit Dataset(const std::string& directory);
    // A stream in windows of T tokens. That of a text reads a token more, which its last one is to predict; behind a task's example nothing is.
    int beyond() const { return example_tokens > 0 ? 0 : 1; }
    int64_t windows(const TokenStream& stream, int T) const { return std::max<int64_t>(stream.count - beyond(), 0) / T; }
    void check_length(const char* flag, int T) const;  // fails if T tokens are no whole examples
    // The tokens [index T, index T + T), and for each the next, or -1 where that is not to be predicted.
    void window(const TokenStream& stream, int64_t index, int T, int* tokens, int* targets) const;
    // Token files. named: their tokenizer, as Tokenizer::load; "": none, and the vocabulary is `vocab`, or if that is 0 what llm.c's files have.
    Dataset(const std::vector<std::string>& train, const std::vector<std::string>& val, const std::string& named, int vocab);
};
