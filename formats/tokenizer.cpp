#include "tokenizer.h"

#include <nlohmann/json.hpp>

#include "files.h"

using Json = nlohmann::ordered_json;

void Tokenizer::encode(std::vector<int>& tokens, const char* text, size_t size) const {
    for (size_t i = 0; i < size; i++) tokens.push_back(static_cast<unsigned char>(text[i]));
}

std::string Tokenizer::decode(int token) const { return token == end_of_text ? "" : std::string(1, char(token)); }

std::string Tokenizer::to_json() const { return Json{{"kind", kind}, {"vocab", vocab}, {"end_of_text", end_of_text}}.dump(); }

Tokenizer Tokenizer::from_json(const std::string& text, const std::string& where) {
    Tokenizer t;
    try {
        const Json json = Json::parse(text);
        json.at("kind").get_to(t.kind);
        json.at("vocab").get_to(t.vocab);
        json.at("end_of_text").get_to(t.end_of_text);
    } catch (const Json::exception& e) {
        fail("%s: the tokenizer cannot be read (%s)", where.c_str(), e.what());
    }
    if (t.kind != "bytes") fail("%s: tokenizer \"%s\" is unknown; there is \"bytes\"", where.c_str(), t.kind.c_str());
    if (t.vocab != 257 || t.end_of_text != 256) fail("%s: the bytes tokenizer has vocab 257 and end_of_text 256", where.c_str());
    return t;
}
