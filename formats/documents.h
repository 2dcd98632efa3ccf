// Files with documents, as others have them: text or JSON lines, plain or compressed.
#pragma once

#include <zlib.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

// A file or pipe, decompressed as it is read if it is of gzip or zstd. One that nothing follows, where its format has an end, is cut off.
class TextFile {
   public:
    TextFile(const std::string& name, int descriptor);  // name: in errors. Takes the descriptor
    ~TextFile();
    size_t read(char* to, size_t most);  // bytes, 0 at the end
    int64_t consumed() const;            // bytes of the file itself

   private:
    struct Zstd;
    const std::string name;
    const int descriptor;
    std::unique_ptr<gzFile_s, int (*)(gzFile)> file;
    std::unique_ptr<Zstd> zstd;
    std::string first;  // of what is not compressed: read to see what it is
    bool began = false;
    size_t read_gzip(char* to, size_t most);
};

// The text that a line of JSON, an object, has under `field`. False: it has none, and `problem` says why.
bool read_json_line(std::string_view line, const std::string& field, std::string& text, std::string& problem);
