// Text to tokens and back. A tokenizer is named in a data directory's dataset.json and in a checkpoint's metadata, so that nothing else
// needs a flag for it. The vocabulary of one that has a file lies beside them: tokenizer.json of byte-level BPE, tokenizer.model of SentencePiece.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "bpe.h"
#include "sentencepiece.h"

inline const std::string kSentencePieceFile = "tokenizer.model";

struct Tokenizer {
    std::string kind = "bytes";  // token = byte; or "bpe", "sentencepiece"; "none", of a model that comes without one, has no text
    int vocab = 257, end_of_text = 256;  // end_of_text: -1, if there is none
    std::shared_ptr<const Bpe> bpe = {};
    std::shared_ptr<const SentencePiece> sentencepiece = {};

    // "bytes"; a .model of SentencePiece; where Bpe::load finds one; or a directory with one of them.
    static Tokenizer load(const std::string& name);
    static Tokenizer of_bpe(const std::string& file, const std::string& where);  // a tokenizer.json
    static Tokenizer none(int vocab, int end_of_text);
    // Appends. Returns how much of the text was not UTF-8 and became U+FFFD; the bytes tokenizer takes it as it is.
    // follows: the text goes on after another, behind a word's end.
    int64_t encode(std::vector<int>& tokens, std::string_view text, bool follows = false) const;
    std::string decode(int token) const;  // its bytes: not always whole characters; end-of-text: ""
    bool same_as(const Tokenizer& other) const;
    std::string to_json() const;
    static Tokenizer from_json(const std::string& text, const std::string& where);  // where: the file that names it. Fails unless it is whole
    // Its file, if it has one: a name, and what is in it.
    std::string file_name() const;
    const std::string& file() const;
    void save(const std::string& directory) const;  // so that transformers too finds it: of bytes, as tokenizer.json
};
