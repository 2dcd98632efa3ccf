// Models as Hugging Face's transformers has them: a directory with config.json and model.safetensors, or shards of it and an index. Three
// families exist there that are models of ours: mamba, jamba and mixtral. What is none of these is of family "moemamba", which only we know.
//
// A config of ours is here the JSON of moemamba.h's Config, and its steps: the letters of its layers, one text for each residual step.
#pragma once

#include <string>
#include <vector>

#include "json.h"

namespace huggingface {
inline const std::string kConfigFile = "config.json";

std::string family(const JsonObject& config, const std::vector<std::string>& steps);
// config.json. end_of_text: a token; dtype: of the tensors, "float32" or "float64"
JsonObject write_config(const JsonObject& config, const std::vector<std::string>& steps, int end_of_text, const std::string& dtype);

struct TheirConfig {
    JsonObject config;                 // ours
    bool conv_bias = true;             // false: the checkpoint has no bias of the convolution, which is to be zero
    std::vector<int> end_of_text;      // tokens
    std::vector<std::string> unknown;  // members that nothing here knows
};
TheirConfig read_config(const JsonObject& theirs, const std::string& where);  // fails, with its name, at what our models cannot do

// The name that a family has for a tensor of ours, like "backbone.layers.3.moe.router.weight".
std::string tensor_name(const std::string& family, const std::string& ours);
// Where all experts of a layer are in one tensor, its name, for one expert's matrix; "" for any other tensor.
std::string fused_name(const std::string& family, const std::string& ours);
}  // namespace huggingface
