// Options of a program's command line.
#pragma once

#include <string>
#include <type_traits>

#include "files.h"

// Numbers are read strictly: CLI11 itself takes 010 for 8, nothing for 0, and what is out of range for its end.
template <class App, class T>
auto* add_option(App& app, const std::string& flag, T& field, const std::string& help) {
    auto* option = app.add_option(flag, field, help);
    if constexpr (std::is_arithmetic_v<T>)
        option->transform([flag](const std::string& text) {
            T value{};
            if (const std::errc error = parse_number(text, value); error != std::errc())
                fail("%s: '%s' is not a %snumber%s", flag.c_str(), text.c_str(), std::is_integral_v<T> ? "whole " : "",
                     error == std::errc::result_out_of_range ? " in range" : std::is_unsigned_v<T> ? " from 0 on" : "");
            if constexpr (std::is_integral_v<T>) return std::to_string(value);
            else return text;
        });
    return option;
}

// Fields has each_field(fields, f), which calls f(flag name, field, help, least, most): fails at the first number beyond its range.
template <class Fields>
void check_ranges(const Fields& fields) {
    Fields::each_field(fields, [](const char* flag, const auto& field, const char*, double least, double most) {
        if constexpr (std::is_arithmetic_v<std::decay_t<decltype(field)>>)
            if (!(double(field) >= least && double(field) <= most))  // so that NaN is beyond any
                fail("--%s %g: must be between %g and %g", flag, double(field), least, most);
    });
}
