// Tokenizers of SentencePiece (.model), through its library. A build without the library has none of them.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace sentencepiece {
class SentencePieceProcessor;
}

struct SentencePiece {
    std::string file;  // the .model
    int vocab = 0, end_of_text = -1;
    // Fails on what is no such model, or has no end-of-text (</s>); and where the library was absent when this was built.
    explicit SentencePiece(const std::string& path);
    ~SentencePiece();
    // Appends; valid UTF-8. follows: the text goes on after another, behind a word's end. Many models put a space in front of a text: there not.
    void encode(std::vector<int>& tokens, std::string_view text, bool follows) const;
    std::string piece(int token) const;  // its text; "" of those that stand for none

   private:
    std::unique_ptr<sentencepiece::SentencePieceProcessor> processor;
    bool adds_space = false;
};
