#include "options.h"

#include <CLI/CLI.hpp>
#include <cstdint>
#include <vector>

CommandLine::CommandLine(const std::string& about) : app(std::make_unique<CLI::App>(about)) {
    app->option_defaults()->always_capture_default();
    app->allow_extras();  // for parse() to name them
}
CommandLine::~CommandLine() = default;

template <class T>
void CommandLine::add(const std::string& flag, T& field, const std::string& help, const std::string& group) {
    if constexpr (std::is_same_v<T, bool>) {
        app->add_flag(flag, field, help)->group(group);
    } else {
        CLI::Option* option = app->add_option(flag, field, help)->group(group);
        if constexpr (std::is_arithmetic_v<T>)  // CLI11 itself takes 010 for 8, nothing for 0, and what is out of range for its end
            option->transform([flag](const std::string& text) {
                T value{};
                if (const std::errc error = parse_number(text, value); error != std::errc())
                    fail("%s: '%s' is not a %snumber%s", flag.c_str(), text.c_str(), std::is_integral_v<T> ? "whole " : "",
                         error == std::errc::result_out_of_range ? " in range" : std::is_unsigned_v<T> ? " from 0 on" : "");
                if constexpr (std::is_integral_v<T>) return std::to_string(value);
                else return text;
            });
    }
}

#define INSTANTIATE(T) template void CommandLine::add<T>(const std::string&, T&, const std::string&, const std::string&);
INSTANTIATE(bool)
INSTANTIATE(int)
INSTANTIATE(int64_t)
INSTANTIATE(uint64_t)
INSTANTIATE(double)
INSTANTIATE(std::string)
INSTANTIATE(std::vector<std::string>)
#undef INSTANTIATE

bool CommandLine::parse(int argc, char** argv) {
    try {
        app->parse(argc, argv);
    } catch (const CLI::Success& help) {
        app->exit(help);
        return false;
    } catch (const CLI::ArgumentMismatch& mismatch) {
        fail("%s; a flag is given once, with its value", mismatch.what());
    }
    for (const std::string& unknown : app->remaining()) fail("%s: no flag has this name; --help lists them all", unknown.c_str());
    return true;
}

bool CommandLine::has(const std::string& flag) const { return app->count(flag) > 0; }
