// Text to tokens and back. A tokenizer is named in a data directory's dataset.json and in a checkpoint's metadata, so that nothing else
// needs a flag for it.
#pragma once

#include <string>
#include <vector>

struct Tokenizer {
    std::string kind = "bytes";  // token = byte
    int vocab = 257, end_of_text = 256;
    void encode(std::vector<int>& tokens, const char* text, size_t size) const;  // appends
    std::string decode(int token) const;                                         // end-of-text: ""
    std::string to_json() const;
    static Tokenizer from_json(const std::string& text, const std::string& where);  // fails on an unknown kind or bad sizes
};
