#include "json.h"

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <type_traits>
#include <vector>

#include "files.h"

using Json = nlohmann::ordered_json;

template <class AnyJson>
AnyJson parse_json(const std::string& text, const std::string& where) {
    constexpr int kDeepest = 32;  // printing it, or taking it apart, is recursive
    try {
        return AnyJson::parse(text, [&](int depth, typename AnyJson::parse_event_t, AnyJson&) {
            if (depth > kDeepest) fail("%s: JSON nested deeper than %d", where.c_str(), kDeepest);
            return true;
        });
    } catch (const typename AnyJson::exception& e) {
        fail("%s: not readable as JSON (%s)", where.c_str(), e.what());
    }
}
template nlohmann::json parse_json(const std::string&, const std::string&);
template Json parse_json(const std::string&, const std::string&);

JsonObject::JsonObject() : json(std::make_unique<Json>(Json::object())) {}
JsonObject::JsonObject(JsonObject&&) noexcept = default;
JsonObject::~JsonObject() = default;

JsonObject::JsonObject(const std::string& text, const std::string& where)
    : json(std::make_unique<Json>(parse_json<Json>(text, where))), where(where) {
    if (!json->is_object()) fail("%s: not a JSON object", where.c_str());
}

bool JsonObject::has(const std::string& name) const { return json->contains(name); }
std::vector<std::string> JsonObject::names() const {
    std::vector<std::string> all;
    for (const auto& [name, value] : json->items()) all.push_back(name);
    return all;
}
std::string JsonObject::text(const std::string& name) const { return json->at(name).dump(); }
std::string JsonObject::text(int indent) const { return json->dump(indent); }

template <class T>
JsonObject& JsonObject::set(const std::string& name, const T& value) {
    if constexpr (std::is_same_v<T, JsonObject>) (*json)[name] = *value.json;
    else (*json)[name] = value;
    return *this;
}
JsonObject& JsonObject::set_null(const std::string& name) {
    (*json)[name] = nullptr;
    return *this;
}

JsonObject& JsonObject::add(const JsonObject& others) {
    json->update(*others.json);
    return *this;
}

template <class T>
void JsonObject::get(const std::string& name, T& value) const {
    const auto found = json->find(name);
    if (found == json->end()) fail("%s: has no \"%s\"", where.c_str(), name.c_str());
    const auto wrong = [&](const char* wanted) {
        fail("%s: \"%s\" is %.100s, not %s", where.c_str(), name.c_str(), found->dump().c_str(), wanted);
    };
    if constexpr (std::is_same_v<T, JsonObject>) {
        if (!found->is_object()) wrong("an object");
        *value.json = *found;
        value.where = where + ": \"" + name + "\"";
    } else {
        if constexpr (std::is_same_v<T, std::string>) {
            if (!found->is_string()) wrong("a text");
        } else if constexpr (std::is_same_v<T, std::vector<std::string>>) {
            if (!found->is_array() || !std::all_of(found->begin(), found->end(), [](const Json& e) { return e.is_string(); }))
                wrong("a list of texts");
        } else if constexpr (std::is_same_v<T, std::vector<double>>) {
            if (!found->is_array() || !std::all_of(found->begin(), found->end(), [](const Json& e) { return e.is_number(); }))
                wrong("a list of numbers");
        } else if constexpr (std::is_same_v<T, std::vector<int>>) {
            const auto whole = [](const Json& e) { return e.is_number_unsigned() && std::in_range<int>(e.template get<uint64_t>()); };
            if (!found->is_array() || !std::all_of(found->begin(), found->end(), whole)) wrong("a list of whole numbers");
        } else if constexpr (std::is_same_v<T, double>) {
            if (!found->is_number()) wrong("a number");
        } else {  // a whole number is read as uint64_t, a negative one as int64_t, and what fits neither, like what has a point, as double
            const bool fits = found->is_number_unsigned() ? std::in_range<T>(found->template get<uint64_t>())
                                                          : found->is_number_integer() && std::in_range<T>(found->template get<int64_t>());
            if (!fits) wrong("a whole number in range");
        }
        found->get_to(value);
    }
}

#define INSTANTIATE(T)                                                         \
    template JsonObject& JsonObject::set<T>(const std::string&, const T&);     \
    template void JsonObject::get<T>(const std::string&, T&) const;
INSTANTIATE(int)
INSTANTIATE(int64_t)
INSTANTIATE(uint64_t)
INSTANTIATE(double)
INSTANTIATE(std::string)
INSTANTIATE(std::vector<std::string>)
INSTANTIATE(std::vector<int>)
INSTANTIATE(std::vector<double>)
INSTANTIATE(JsonObject)
#undef INSTANTIATE
template JsonObject& JsonObject::set<bool>(const std::string&, const bool&);
