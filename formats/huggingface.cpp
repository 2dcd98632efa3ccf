#include "huggingface.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "files.h"

namespace huggingface {
namespace {
template <class T>
T field(const JsonObject& json, const std::string& name) {
    T value{};
    json.get(name, value);
    return value;
}
// What is null is not given, as there.
bool given(const JsonObject& json, const std::string& name) { return json.has(name) && json.text(name) != "null"; }
}  // namespace

// ------------------------------------------------------------------------------------------------------------------
// Tensors. Ours are backbone.layers.STEP.REST; a layer of Jamba and Mixtral is two steps.
static std::string replaced(const std::string& text, const std::vector<std::pair<std::string, std::string>>& beginnings) {
    for (const auto& [from, to] : beginnings)
        if (text.starts_with(from)) return to + text.substr(from.size());
    return text;
}

std::string tensor_name(const std::string& family, const std::string& ours) {
    if (family != "jamba" && family != "mixtral") return ours;
    const bool jamba = family == "jamba";
    const std::string layers = "backbone.layers.";
    if (!ours.starts_with(layers))
        return replaced(ours, {{"backbone.embeddings.", "model.embed_tokens."},
                               {"backbone.norm_f.", jamba ? "model.final_layernorm." : "model.norm."}});
    size_t digits = 0;
    const int step = std::stoi(ours.substr(layers.size()), &digits);
    std::string rest = ours.substr(layers.size() + digits + 1);
    const bool second = step % 2;
    rest = replaced(rest, {{"norm.", !second ? "input_layernorm." : jamba ? "pre_ff_layernorm." : "post_attention_layernorm."},
                           {"mixer.", "mamba."},
                           {"moe.router.", jamba ? "feed_forward.router." : "block_sparse_moe.gate."},
                           {"moe.", jamba ? "feed_forward." : "block_sparse_moe."}});
    if (rest.starts_with("block_sparse_moe."))
        for (const auto& [from, to] : {std::pair("gate_proj", "w1"), std::pair("up_proj", "w3"), std::pair("down_proj", "w2")})
            if (const size_t at = rest.find(from); at != std::string::npos) rest.replace(at, strlen(from), to);
    return "model.layers." + std::to_string(step / 2) + "." + rest;
}

std::string fused_name(const std::string& family, const std::string& ours) {
    if (family != "jamba" && family != "mixtral") return "";
    const size_t moe = ours.find(".moe.");
    if (moe == std::string::npos) return "";
    const std::string layer = tensor_name(family, ours.substr(0, moe + 1));  // "model.layers.N."
    const std::string block = layer + (family == "jamba" ? "feed_forward." : "mlp.");
    if (ours.ends_with(".router.weight")) return block + (family == "jamba" ? "router.weight" : "gate.weight");
    return block + "experts." + (ours.ends_with(".down_proj.weight") ? "down_proj" : "gate_up_proj");
}

// ------------------------------------------------------------------------------------------------------------------
// Which family a model is of

// (period, offset) of the layers that have the letter; false: they are not regular. There, i % period == offset.
static bool regular(const std::vector<char>& layers, char letter, int& period, int& offset) {
    const int n = int(layers.size());
    const auto first = std::find(layers.begin(), layers.end(), letter);
    const auto second = first == layers.end() ? first : std::find(first + 1, layers.end(), letter);
    offset = int(first - layers.begin());  // n, if there is none
    period = second != layers.end() ? int(second - first) : std::max(n, offset + 1);
    for (int i = 0; i < n; i++)
        if ((i % period == offset) != (layers[i] == letter)) return false;
    return true;
}

struct Pairs {  // of steps: the layers of Jamba and Mixtral
    std::vector<char> mixers, others;
    int attention_period, attention_offset, expert_period, expert_offset;
    bool regular = false;
    explicit Pairs(const std::vector<std::string>& steps) {
        for (size_t s = 0; s < steps.size(); s++) {
            if (steps[s].size() != 1) return;
            (s % 2 ? others : mixers).push_back(steps[s][0]);
        }
        regular = mixers.size() == others.size() && huggingface::regular(mixers, 'A', attention_period, attention_offset) &&
                  huggingface::regular(others, 'E', expert_period, expert_offset);
    }
    bool have(char letter) const { return std::count(mixers.begin(), mixers.end(), letter) + std::count(others.begin(), others.end(), letter); }
    bool only(const std::string& first, const std::string& second) const {
        const auto among = [](const std::vector<char>& layers, const std::string& letters) {
            return std::all_of(layers.begin(), layers.end(), [&](char c) { return letters.find(c) != std::string::npos; });
        };
        return among(mixers, first) && among(others, second);
    }
};

std::string family(const JsonObject& config, const std::vector<std::string>& steps) {
    const auto number = [&](const char* name) { return field<int>(config, name); };
    const int C = number("d-model");
    const bool expands = number("d-inner") % C == 0;
    if (std::all_of(steps.begin(), steps.end(), [](const std::string& s) { return s == "M"; }))
        return expands && !number("mamba-norms") ? "mamba" : "moemamba";
    const Pairs pairs(steps);
    if (!pairs.regular) return "moemamba";
    const bool experts = pairs.have('E'), rope = field<double>(config, "rope-base") != 0, renormalized = number("renormalize");
    if (experts && (!number("swiglu-experts") || field<std::string>(config, "routing") != "token-choice")) return "moemamba";
    if (pairs.only("A", "E") && rope && renormalized) return "mixtral";
    const bool jamba = pairs.only("MA", "FE") && !(pairs.have('M') && !(expands && number("mamba-norms"))) &&
                       !(pairs.have('A') && (rope || number("head-dim") * number("heads") != C)) &&
                       !(pairs.have('F') && !number("swiglu-ff")) && !(experts && (renormalized || number("experts") < 2)) &&
                       !(experts && pairs.have('F') && number("d-ff") != number("d-expert"));
    return jamba ? "jamba" : "moemamba";
}

// ------------------------------------------------------------------------------------------------------------------
// config.json

JsonObject write_config(const JsonObject& config, const std::vector<std::string>& steps, int end_of_text, const std::string& dtype) {
    const std::string kind = family(config, steps);
    const auto number = [&](const char* name) { return field<int>(config, name); };
    JsonObject json;
    const auto same = [&](const char* theirs, const char* ours) { json.set(theirs, number(ours)); };
    const char* const model = kind == "mamba" ? "Mamba" : kind == "jamba" ? "Jamba" : kind == "mixtral" ? "Mixtral" : "MoeMamba";
    json.set("architectures", std::vector<std::string>{std::string(model) + "ForCausalLM"}).set("model_type", kind).set("dtype", dtype);
    same("vocab_size", "vocab");
    same("hidden_size", "d-model");
    json.set("tie_word_embeddings", number("tied") != 0);
    json.set_null("pad_token_id");  // or else one would be that, and not be trained
    for (const char* token : {"bos_token_id", "eos_token_id"})
        end_of_text >= 0 ? json.set(token, end_of_text) : json.set_null(token);
    if (kind == "moemamba") {
        json.set("moemamba", config);
        return json;
    }
    json.set("hidden_act", "silu");
    json.set(kind == "mamba" ? "layer_norm_epsilon" : "rms_norm_eps", field<double>(config, "norm-eps"));
    const int layers = int(steps.size()) / (kind == "mamba" ? 1 : 2), expand = number("d-inner") / number("d-model");
    json.set("num_hidden_layers", layers);
    if (kind == "mamba") {
        same("state_size", "d-state");
        same("conv_kernel", "d-conv");
        same("time_step_rank", "dt-rank");
        json.set("expand", expand).set("use_bias", false).set("use_conv_bias", true);
        json.set("pad_vocab_size_multiple", 1);  // llama.cpp's converter takes 8 unless told
        return json;
    }
    const Pairs pairs(steps);
    json.set("intermediate_size", number(pairs.have('E') ? "d-expert" : "d-ff"));
    same("num_attention_heads", "heads");
    same("num_key_value_heads", "kv-heads");
    same("num_experts_per_tok", "top-k");
    json.set("router_aux_loss_coef", field<double>(config, "balance-loss"));
    if (kind == "mixtral") {
        same("head_dim", "head-dim");
        same("num_local_experts", "experts");
        json.set("rope_parameters", JsonObject().set("rope_type", "default").set("rope_theta", field<double>(config, "rope-base")));
        return json;
    }
    json.set("num_experts", pairs.have('E') ? number("experts") : 1);
    json.set("attn_layer_period", pairs.attention_period).set("attn_layer_offset", pairs.attention_offset);
    json.set("expert_layer_period", pairs.expert_period).set("expert_layer_offset", pairs.expert_offset);
    same("mamba_d_state", "d-state");
    same("mamba_d_conv", "d-conv");
    same("mamba_dt_rank", "dt-rank");
    json.set("mamba_expand", expand).set("mamba_conv_bias", true).set("mamba_proj_bias", false);
    return json;
}

// A list of steps as a unit and how often it comes.
static std::string repeated(const std::string& steps) {
    size_t unit = 1;
    while (steps.size() % unit || steps.substr(unit) != steps.substr(0, steps.size() - unit)) unit++;
    return steps.substr(0, unit) + "*" + std::to_string(steps.size() / unit);
}

namespace {
// Takes what it knows of a config.json, member by member.
struct Reader {
    const JsonObject& json;
    const std::string where;
    std::vector<std::string> known = {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
                                      "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range",
                                      // of training, of initialisation, of other programs' ways to compute the same
                                      "max_position_embeddings", "attention_dropout", "router_jitter_noise", "output_router_logits",
                                      "num_logits_to_keep", "use_mamba_kernels", "use_mambapy", "use_associative_scan", "rescale_prenorm_residual",
                                      "residual_in_fp32", "time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme",
                                      "time_step_floor", "pad_vocab_size_multiple", "is_decoder", "is_encoder_decoder"};

    template <class T>
    T get(const std::string& name, const T& otherwise) {
        known.push_back(name);
        return given(json, name) ? field<T>(json, name) : otherwise;
    }
    int size(const std::string& name, int otherwise) {
        const int value = get(name, otherwise);
        if (value < 1 || value > 1 << 24) fail("%s: \"%s\" is %d: must be from 1 to 2^24", where.c_str(), name.c_str(), value);
        return value;
    }
    int rank(const std::string& name, int C) {
        known.push_back(name);
        return !given(json, name) || json.text(name) == "\"auto\"" ? (C + 15) / 16 : size(name, 0);
    }
    bool boolean(const std::string& name, bool otherwise) {
        known.push_back(name);
        if (!given(json, name)) return otherwise;
        const std::string text = json.text(name);
        if (text != "true" && text != "false") fail("%s: \"%s\" is %.100s, not true or false", where.c_str(), name.c_str(), text.c_str());
        return text == "true";
    }
    // Nothing here could compute with another value.
    void must_be(const std::string& name, const std::string& only) {
        known.push_back(name);
        if (given(json, name) && json.text(name) != only)
            fail("%s: \"%s\" is %.100s; the models here have %s", where.c_str(), name.c_str(), json.text(name).c_str(), only.c_str());
    }
};
}  // namespace

static void read_mixers(Reader& read, JsonObject& ours, int C, bool jamba) {
    ours.set("d-state", read.size(jamba ? "mamba_d_state" : "state_size", 16)).set("d-conv", read.size(jamba ? "mamba_d_conv" : "conv_kernel", 4));
    ours.set("dt-rank", read.rank(jamba ? "mamba_dt_rank" : "time_step_rank", C));
    ours.set("d-inner", int64_t(read.size(jamba ? "mamba_expand" : "expand", 2)) * C).set("mamba-norms", int(jamba));
    read.must_be(jamba ? "mamba_proj_bias" : "use_bias", "false");
}
static void read_attention(Reader& read, JsonObject& ours, int C) {
    const int H = read.size("num_attention_heads", 32), S = read.size("head_dim", std::max(1, C / H));
    if (C % H && !given(read.json, "head_dim")) fail("%s: \"num_attention_heads\" %d does not divide \"hidden_size\" %d", read.where.c_str(), H, C);
    ours.set("heads", H).set("kv-heads", read.get("num_key_value_heads", read.json.has("num_key_value_heads") ? H : 8)).set("head-dim", S);
    read.must_be("sliding_window", "null");
    read.must_be("attention_bias", "false");
}
static void read_experts(Reader& read, JsonObject& ours, const char* experts, int otherwise, int F) {
    ours.set("experts", read.size(experts, otherwise)).set("top-k", read.size("num_experts_per_tok", 2)).set("d-expert", F).set("swiglu-experts", 1);
    ours.set("capacity", 0.0).set("balance-loss", read.get("router_aux_loss_coef", 0.001));
}
static double read_rope(Reader& read) {
    const double old = read.get("rope_theta", 1e6);
    read.must_be("rope_scaling", "null");
    if (!given(read.json, "rope_parameters")) return read.known.push_back("rope_parameters"), old;
    const JsonObject rope(read.json.text("rope_parameters"), read.where + ": \"rope_parameters\"");
    read.known.push_back("rope_parameters");
    Reader inner{rope, read.where + ": \"rope_parameters\""};
    inner.must_be("rope_type", "\"default\"");
    inner.must_be("partial_rotary_factor", "1.0");
    return inner.get("rope_theta", old);
}

TheirConfig read_config(const JsonObject& theirs, const std::string& where) {
    TheirConfig result;
    Reader read{theirs, where};
    JsonObject& ours = result.config;
    const std::string kind = field<std::string>(theirs, "model_type");
    if (kind != "mamba" && kind != "jamba" && kind != "mixtral" && kind != "moemamba")
        fail("%s: \"model_type\" is \"%.80s\"; mamba, jamba, mixtral and moemamba can be read", where.c_str(), printable(kind).c_str());
    if (kind == "moemamba") {
        theirs.get("moemamba", ours);
    } else {
        constexpr int kMostLayers = 2048;
        const bool jamba = kind == "jamba";
        const int C = read.size("hidden_size", kind == "mamba" ? 768 : 4096), n = read.size("num_hidden_layers", 32);
        if (n > kMostLayers) fail("%s: \"num_hidden_layers\" is %d: at most %d", where.c_str(), n, kMostLayers);
        ours.set("vocab", read.size("vocab_size", kind == "mamba" ? 50280 : jamba ? 65536 : 32000)).set("d-model", C);
        ours.set("tied", int(read.boolean("tie_word_embeddings", kind == "mamba")));
        ours.set("norm-eps", read.get(kind == "mamba" ? "layer_norm_epsilon" : "rms_norm_eps", jamba ? 1e-6 : 1e-5));
        read.must_be("hidden_act", "\"silu\"");
        std::string steps;
        if (kind == "mamba") {
            read_mixers(read, ours, C, false);
            read.known.push_back("intermediate_size");  // there it is always expand * hidden_size
            steps = std::string(n, 'M');
        } else {
            const int F = read.size("intermediate_size", 14336);
            read_attention(read, ours, C);
            read_experts(read, ours, jamba ? "num_experts" : "num_local_experts", jamba ? 16 : 8, F);
            ours.set("renormalize", int(!jamba)).set("rope-base", jamba ? 0.0 : read_rope(read));
            if (jamba) {
                read_mixers(read, ours, C, true);
                ours.set("d-ff", F);
                const int attention = read.size("attn_layer_period", 8), at = read.get("attn_layer_offset", 4);
                const int expert = read.size("expert_layer_period", 2), from = read.get("expert_layer_offset", 1);
                const bool experts = field<int>(ours, "experts") > 1;
                for (int i = 0; i < n; i++) steps += {i % attention == at ? 'A' : 'M', experts && i % expert == from ? 'E' : 'F'};
                if (!experts) ours.set("top-k", 1);
            } else {
                for (int i = 0; i < n; i++) steps += "AE";
            }
        }
        if (kind != "mixtral") result.conv_bias = read.boolean(jamba ? "mamba_conv_bias" : "use_conv_bias", true);
        ours.set("layers", repeated(steps));
    }
    if (given(theirs, "quantization_config")) fail("%s: \"quantization_config\": quantized tensors cannot be read", where.c_str());
    if (!theirs.has("eos_token_id") && kind != "moemamba") result.end_of_text = {kind == "mamba" ? 0 : 2};
    if (given(theirs, "eos_token_id")) {
        const std::string text = theirs.text("eos_token_id");
        if (text[0] == '[') theirs.get("eos_token_id", result.end_of_text);
        else result.end_of_text = {field<int>(theirs, "eos_token_id")};
    }
    for (const std::string& name : theirs.names())
        if (kind != "moemamba" && std::find(read.known.begin(), read.known.end(), name) == read.known.end()) result.unknown.push_back(name);
    return result;
}
}  // namespace huggingface
