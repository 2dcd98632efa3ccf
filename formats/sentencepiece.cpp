#include "sentencepiece.h"

#include "files.h"

#ifdef HAS_SENTENCEPIECE
#include <sentencepiece_processor.h>

static const std::string kSpace = "\u2581";  // stands for a space in pieces

SentencePiece::SentencePiece(const std::string& path)
    : file(read_file(path, "tokenizer")), processor(std::make_unique<sentencepiece::SentencePieceProcessor>()) {
    const auto status = processor->LoadFromSerializedProto(file);
    if (!status.ok()) fail("%s: not a model of SentencePiece (%s)", path.c_str(), printable(status.ToString()).c_str());
    vocab = processor->GetPieceSize();
    end_of_text = processor->eos_id();
    if (end_of_text < 0 || end_of_text >= vocab) fail("%s: it has no end-of-text token (</s>)", path.c_str());
    std::vector<int> tokens;
    encode(tokens, "a", false);
    adds_space = !tokens.empty() && processor->IdToPiece(tokens[0]).starts_with(kSpace);
}
SentencePiece::~SentencePiece() = default;

void SentencePiece::encode(std::vector<int>& tokens, std::string_view text, bool follows) const {
    if (follows && adds_space && text.starts_with(' ')) text.remove_prefix(1);
    std::vector<int> more;
    const auto status = processor->Encode({text.data(), text.size()}, &more);
    if (!status.ok()) fail("SentencePiece: %s", printable(status.ToString()).c_str());
    tokens.insert(tokens.end(), more.begin(), more.end());
}

std::string SentencePiece::piece(int token) const {
    if (processor->IsControl(token)) return "";
    if (processor->IsUnknown(token)) return "\uFFFD";
    std::string piece = processor->IdToPiece(token);
    if (processor->IsByte(token)) return std::string(1, char(std::stoi(piece.substr(3, 2), nullptr, 16)));  // <0x0A>
    for (size_t at = 0; (at = piece.find(kSpace, at)) != std::string::npos; at++) piece.replace(at, kSpace.size(), " ");
    return piece;
}
#else
namespace sentencepiece {
class SentencePieceProcessor {};
}  // namespace sentencepiece

SentencePiece::SentencePiece(const std::string& path) {
    fail("%s: a model of SentencePiece, whose library was not there when this was built: install libsentencepiece-dev (make deps), then make",
         path.c_str());
}
SentencePiece::~SentencePiece() = default;
void SentencePiece::encode(std::vector<int>&, std::string_view, bool) const {}
std::string SentencePiece::piece(int) const { return ""; }
#endif
