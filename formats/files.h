// What every format and program shares: errors, how threads wait, numbers in text, whole files. No kernel, no Model is known in formats/.
#pragma once

#include <charconv>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>

// ---- errors: whatever a user can cause is one clear line (what is wrong, where, what to do) and exit code 1
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);  // throws Error
int run_main(int (*body)(int, char**), int argc, char** argv);               // prints "error: ..." to stderr, returns 1

// ---- threads. The first call in the main() of a program that computes: see files.cpp. Starts the program anew, if need be.
void spin_briefly(char** argv);

// ---- numbers. The whole text as a decimal number. Not std::errc(): it is none, or out of T's range.
template <class T>
std::errc parse_number(const std::string& text, T& value) {
    const char* last = text.data() + text.size();
    const auto [end, error] = std::from_chars(text.data(), last, value);
    return error == std::errc() && end != last ? std::errc::invalid_argument : error;
}

// ---- files
// Writes path + ".tmp", flushes it to the disk, renames it to path: a reader sees the old file or the new one, whatever happens.
void write_atomically(const std::string& path, const std::function<void(std::FILE*)>& write);
std::string read_file(const std::string& path, const char* what);  // fails with path and reason

// Tokens (.bin, llm.c's format): 256 int32 {kTokenMagic, version, count, 0...}, then count tokens: uint16 (version 1) or uint32 (2).
inline constexpr int kTokenMagic = 20240520, kTokenHeaderInts = 256;
