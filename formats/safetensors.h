// safetensors files: 8 bytes of header length, a JSON header (names, types, shapes, offsets, metadata), then the tensors.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "files.h"

struct Safetensors {  // a file, open for reading
    using Metadata = std::vector<std::pair<std::string, std::string>>;
    struct Entry {
        std::string dtype;  // F64, F32, BF16, I64, I32
        std::vector<int64_t> shape;
        int64_t offset, bytes, count;  // offset from the start of the file
    };
    const std::string path;
    std::vector<std::pair<std::string, Entry>> entries;
    Metadata metadata;
    explicit Safetensors(const std::string& path);  // fails on anything malformed
    bool has(const std::string& name) const;
    const Entry& find(const std::string& name) const;  // fails if there is none
    std::string meta(const std::string& key) const;    // fails if there is none
    std::string meta(const std::string& key, const std::string& otherwise) const;
    void read(const std::string& name, double* out) const;  // converts
    void read(const std::string& name, float* out) const;
    void read(const std::string& name, int* out) const;

    struct NewEntry {
        std::string name, dtype;
        std::vector<int64_t> shape;
        int64_t bytes;
    };
    // Writes a whole file, atomically. data(i): the bytes of tensor i, which are used until the next call.
    static void write(const std::string& path, const std::vector<NewEntry>& list, const Metadata& metadata,
                      const std::function<const void*(size_t i)>& data);

   private:
    InputFile file;
};
