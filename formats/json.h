// JSON objects: dataset.json, what a checkpoint says of itself, lines of a log. Read strictly: a member is there, of the right type and in
// its range, or it is an error that names it.
#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

// Json is nlohmann::ordered_json, or nlohmann::json, which does not keep the order and is the one for large objects. where: what errors call it.
template <class Json> Json parse_json(const std::string& text, const std::string& where);

class JsonObject {
   public:
    JsonObject();
    JsonObject(const std::string& text, const std::string& where);  // fails unless it is one object
    JsonObject(JsonObject&&) noexcept;
    ~JsonObject();

    // T is bool (set alone), int, int64_t, uint64_t, double, std::string, a vector of std::string, int or double, or JsonObject. Members keep
    // the order in which they were set.
    template <class T> JsonObject& set(const std::string& name, const T& value);
    template <class T> void get(const std::string& name, T& value) const;
    JsonObject& set(const std::string& name, const char* value) { return set(name, std::string(value)); }
    JsonObject& set_null(const std::string& name);
    JsonObject& add(const JsonObject& others);  // their members
    bool has(const std::string& name) const;
    std::vector<std::string> names() const;           // of all members
    std::string text(const std::string& name) const;  // a member as JSON
    std::string text(int indent = -1) const;          // all of it; in one line unless there is an indent

   private:
    std::unique_ptr<nlohmann::ordered_json> json;
    std::string where;
};

// Fields has each_field(fields, f), which calls f(flag name, field, ...) for each.
template <class Fields>
JsonObject fields_to_json(const Fields& fields) {
    JsonObject json;
    Fields::each_field(fields, [&](const char* flag, const auto& field, auto...) { json.set(flag, field); });
    return json;
}
template <class Fields>
void fields_from_json(Fields& fields, const JsonObject& json) {
    Fields::each_field(fields, [&](const char* flag, auto& field, auto...) { json.get(flag, field); });
}
