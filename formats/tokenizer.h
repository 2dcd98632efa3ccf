// Text to tokens and back. A tokenizer is named in a data directory's dataset.json and in a checkpoint's metadata, so that nothing else
// needs a flag for it. The vocabulary of one that has a file, tokenizer.json, lies beside them.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "bpe.h"

struct Tokenizer {
    std::string kind = "bytes";  // token = byte; or "bpe"
    int vocab = 257, end_of_text = 256;
    std::shared_ptr<const Bpe> bpe = {};

    // "bytes", or where Bpe::load finds one.
    static Tokenizer load(const std::string& name);
    // Appends. Returns how much of the text was not UTF-8 and became U+FFFD; the bytes tokenizer takes it as it is.
    int64_t encode(std::vector<int>& tokens, std::string_view text) const;
    std::string decode(int token) const;  // its bytes: not always whole characters; end-of-text: ""
    std::string to_json() const;
    static Tokenizer from_json(const std::string& text, const std::string& where);  // where: the file that names it. Fails unless it is whole
    void save(const std::string& directory) const;                                  // its file, if it has one
};
