#include "documents.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "files.h"

#ifdef HAS_ZSTD
#include <zstd.h>
#endif

// ------------------------------------------------------------------------------------------------------------------
// Compressed files
static constexpr size_t kBlock = 1 << 16;

#ifdef HAS_ZSTD
struct TextFile::Zstd {
    std::unique_ptr<ZSTD_DStream, size_t (*)(ZSTD_DStream*)> stream{ZSTD_createDStream(), ZSTD_freeDStream};
    std::string block = std::string(kBlock, 0);  // of what is compressed
    ZSTD_inBuffer in{block.data(), 0, 0};
    bool whole = true;  // at the end of a frame
};
#else
struct TextFile::Zstd {};
#endif

TextFile::TextFile(const std::string& name, int descriptor) : name(name), descriptor(descriptor), file(nullptr, gzclose) {
    file.reset(descriptor < 0 ? nullptr : gzdopen(descriptor, "rb"));
    if (!file) fail("cannot read %s: %s", name.c_str(), strerror(errno));
    gzbuffer(file.get(), kBlock);
}
TextFile::~TextFile() = default;
int64_t TextFile::consumed() const { return std::max<int64_t>(gzoffset(file.get()), 0); }  // -1: of a pipe

// zlib passes on what is not gzip's as it is.
size_t TextFile::read_gzip(char* to, size_t most) {
    const int n = gzread(file.get(), to, unsigned(most));
    int error = Z_OK;
    const char* const reason = gzerror(file.get(), &error);
    if (n < 0) fail("cannot read %s: %s", name.c_str(), error == Z_ERRNO ? strerror(errno) : reason);
    if (n == 0 && error == Z_BUF_ERROR) fail("%s is truncated: its gzip data has no end", name.c_str());
    return size_t(n);
}

size_t TextFile::read(char* to, size_t most) {
    if (!began) {
        began = true;
        first.resize(4);  // gzread gives as many as there are
        first.resize(read_gzip(first.data(), first.size()));
        if (first == "\x28\xB5\x2F\xFD") {
#ifdef HAS_ZSTD
            zstd = std::make_unique<Zstd>();
            // Whoever writes a small file needs no large window: as much memory as a few bytes can ask for is bounded.
            struct stat info;
            const bool small = fstat(descriptor, &info) == 0 && S_ISREG(info.st_mode) && info.st_size < 1 << 20;
            ZSTD_DCtx_setParameter(zstd->stream.get(), ZSTD_d_windowLogMax, small ? 23 : 27);
            zstd->in.size = first.copy(zstd->block.data(), first.size());
            first.clear();
#else
            fail("%s is compressed by zstd, whose library was not there when this was built: install libzstd-dev (make deps), then make",
                 name.c_str());
#endif
        }
    }
    if (!first.empty()) {
        const size_t n = first.copy(to, most);
        first.erase(0, n);
        return n + (n < most ? read_gzip(to + n, most - n) : 0);
    }
    if (!zstd) return read_gzip(to, most);
#ifdef HAS_ZSTD
    ZSTD_outBuffer out{to, most, 0};
    while (out.pos == 0) {
        ZSTD_inBuffer& in = zstd->in;
        const size_t left = in.size - in.pos;
        if (left == 0 || (zstd->whole && left < 4)) {
            memmove(zstd->block.data(), zstd->block.data() + in.pos, left);
            in.pos = 0;
            in.size = left + read_gzip(zstd->block.data() + left, zstd->block.size() - left);
            if (in.size == 0 && zstd->whole) break;
            if (in.size == left) fail("%s is truncated: its zstd data has no end", name.c_str());
        }
        // The library knows older formats too, which heed no limit of the window.
        uint32_t magic = 0;
        if (zstd->whole) memcpy(&magic, zstd->block.data() + in.pos, std::min<size_t>(4, in.size - in.pos));
        if (zstd->whole && magic != ZSTD_MAGICNUMBER && (magic & 0xFFFFFFF0) != 0x184D2A50)
            fail("cannot read %s: what follows its zstd data is something else", name.c_str());
        const size_t status = ZSTD_decompressStream(zstd->stream.get(), &out, &in);
        if (ZSTD_isError(status)) fail("cannot read %s: zstd: %s", name.c_str(), ZSTD_getErrorName(status));
        zstd->whole = status == 0;
    }
    return out.pos;
#endif
    return 0;
}

// ------------------------------------------------------------------------------------------------------------------
// JSON lines

namespace {
// Keeps one text of the outermost object, and nothing else: no line takes more memory than its own size.
struct FieldReader : nlohmann::json_sax<nlohmann::json> {
    const std::string& field;
    std::string& text;
    std::string problem;
    bool found = false, wanted = false;
    int depth = 0;

    FieldReader(const std::string& field, std::string& text) : field(field), text(text) {}
    bool value() {
        if (depth == 0) problem = "not an object";
        else if (wanted) problem = "\"" + field + "\" is no text";
        return problem.empty();
    }
    bool open() {
        depth++;
        return true;
    }
    bool null() override { return value(); }
    bool boolean(bool) override { return value(); }
    bool number_integer(number_integer_t) override { return value(); }
    bool number_unsigned(number_unsigned_t) override { return value(); }
    bool number_float(number_float_t, const string_t&) override { return value(); }
    bool binary(binary_t&) override { return value(); }
    bool string(string_t& s) override {
        if (!wanted) return value();
        text = std::move(s);
        wanted = false;
        found = true;
        return true;
    }
    bool start_object(std::size_t) override { return (depth == 0 || value()) && open(); }
    bool start_array(std::size_t) override { return value() && open(); }
    bool key(string_t& name) override {
        wanted = depth == 1 && name == field;
        return true;
    }
    bool end_object() override { return depth--, true; }
    bool end_array() override { return depth--, true; }
    bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& e) override {
        const std::string what = e.what();
        problem = what.substr(std::min(what.size(), what.find("syntax error") == std::string::npos ? 0 : what.find("syntax error")));
        return false;
    }
};
}  // namespace

bool read_json_line(std::string_view line, const std::string& field, std::string& text, std::string& problem) {
    FieldReader reader(field, text);
    nlohmann::json::sax_parse(line, &reader);
    problem = reader.problem.empty() && !reader.found ? "has no \"" + field + "\"" : reader.problem;
    return problem.empty();
}
