// A program's command line. Numbers are read strictly: the whole text, decimal, in range.
#pragma once

#include <memory>
#include <string>
#include <type_traits>

#include "files.h"

namespace CLI {
class App;
}

class CommandLine {
   public:
    explicit CommandLine(const std::string& about);
    ~CommandLine();
    // A field that a flag sets; help shows what it holds now. T is bool (the flag takes no value), int, int64_t, uint64_t, double,
    // std::string or std::vector<std::string>.
    template <class T> void add(const std::string& flag, T& field, const std::string& help, const std::string& group = "Options");
    bool parse(int argc, char** argv);  // fails on what it does not know; false: help was asked for, and printed
    bool has(const std::string& flag) const;

   private:
    std::unique_ptr<CLI::App> app;
};

// Fields has each_field(fields, f), which calls f(flag name, field, help, least, most): fails at the first number beyond its range.
template <class Fields>
void check_ranges(const Fields& fields) {
    Fields::each_field(fields, [](const char* flag, const auto& field, const char*, double least, double most) {
        if constexpr (std::is_arithmetic_v<std::decay_t<decltype(field)>>)
            if (!(double(field) >= least && double(field) <= most))  // so that NaN is beyond any
                fail("--%s %g: must be between %g and %g", flag, double(field), least, most);
    });
}
