// MoE-Mamba and its relatives: the vocabulary. Everything that the other files share is declared here, once:
// shape letters, number types, Config, the table of layer functions, the Model, and the files it reads and writes.
//
// Shapes. Activations are row-major with time before channels, so nothing is ever transposed between two layers.
//   B batch   T time   C model width   D inner width of a Mamba mixer   N state per channel   R rank of dt   W width of the conv
//   F hidden width of a feed-forward or expert   E experts   K experts per token   H heads   V vocabulary
//   rows      B*T, where a function does not care which is which
//   ld_x      distance between two rows of x, in elements, where x may be a slice of wider rows
#pragma once

#include <charconv>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

// ------------------------------------------------------------------------------------------------------------------
// Two compilers. nvcc builds define USE_CUDA; g++ builds run the same kernels through cpu/simt.h. Three spellings differ:
//   LAUNCH(kernel, grid, block, shared_bytes, stream)(arguments);    a launch
//   SHARED(float[32][33], tile);                                     static shared memory, 16-byte aligned
//   DYNAMIC_SHARED(float, buffer);                                   dynamic shared memory, 16-byte aligned
#ifdef USE_CUDA
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#define LAUNCH(kernel, ...) kernel<<<__VA_ARGS__>>>
#define SHARED(type, name) __shared__ __align__(16) std::type_identity_t<type> name
#define DYNAMIC_SHARED(type, name)                            \
    extern __shared__ __align__(16) unsigned char name##_bytes[]; \
    type* name = reinterpret_cast<type*>(name##_bytes)
#else
#include "cpu/simt.h"
#endif

// ------------------------------------------------------------------------------------------------------------------
// Numbers. floatX: activations and matrices. real: whatever must not lose bits: accumulators, recurrent state, softmax,
// router, norms, the residual stream, every small parameter, gradients of parameters, master weights, the optimizer.
#if defined(PRECISION_DOUBLE)
using floatX = double;
using real = double;
inline constexpr const char* kPrecision = "double";
#elif defined(PRECISION_BF16)
using floatX = __nv_bfloat16;
using real = float;
inline constexpr const char* kPrecision = "bf16";
#elif defined(PRECISION_FLOAT)
using floatX = float;
using real = float;
inline constexpr const char* kPrecision = "float";
#else
#error "define PRECISION_FLOAT, PRECISION_BF16 or PRECISION_DOUBLE (make PRECISION=float|bf16|double)"
#endif
inline constexpr bool kMixedPrecision = sizeof(floatX) != sizeof(real);  // then matrices exist twice: floatX and master

// The scan keeps one state per kScanChunk steps for its backward pass, which recomputes the others from it.
// 64 makes that traffic one byte per token and channel (N = 16), beside 8 to 28 bytes that nothing can avoid.
inline constexpr int kScanChunk = 64;
inline int64_t scan_chunks(int T) { return (T + kScanChunk - 1) / kScanChunk; }

// Rows of the experts' input: with a capacity each expert has that many, without one there is a row for every choice.
inline int64_t expert_slots(int rows, int E, int K, int capacity) { return capacity > 0 ? int64_t(E) * capacity : int64_t(rows) * K; }

// ------------------------------------------------------------------------------------------------------------------
// Errors. Whatever a user can cause is one clear line (what is wrong, where, what to do) and exit code 1.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);  // throws Error
int run_main(int (*body)(int, char**), int argc, char** argv);               // prints "error: ..." to stderr, returns 1

// The whole text as a decimal number. Not std::errc(): it is none, or out of T's range.
template <class T>
std::errc parse_number(const std::string& text, T& value) {
    const char* last = text.data() + text.size();
    const auto [end, error] = std::from_chars(text.data(), last, value);
    return error == std::errc() && end != last ? std::errc::invalid_argument : error;
}
// An option of a CLI::App. Numbers are read strictly: CLI11 itself takes 010 for 8, nothing for 0, and what is out of range for its end.
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

// ------------------------------------------------------------------------------------------------------------------
// Random numbers: a hash of (seed, stream, counter), so that any draw can be repeated in any order on any device.
enum RandomStream : uint64_t { kInitStream = 1, kShuffleStream, kSampleStream };
uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t counter);
double random_uniform(uint64_t seed, uint64_t stream, uint64_t counter);  // [0, 1), 53 bits
double random_normal(uint64_t seed, uint64_t stream, uint64_t counter);   // Box-Muller; uses one counter

// ------------------------------------------------------------------------------------------------------------------
// Config: what defines a model. One list of fields serves flags, presets, checkpoints and --help.
//
// A model is a string of residual steps x += f(norm(x)), one letter each, with an optional repeat:
//   M Mamba   F dense SwiGLU feed-forward   E mixture of experts   (ME) a parallel group: one norm, outputs summed
//   Mamba "MM*8"   Mamba-MLP "MF*8"   MoE-Mamba "ME*8"   parallel MoE-Mamba "(ME)*8"
struct Config {
    std::string layers = "ME*4";
    int vocab = 257;             // V
    int d_model = 192;           // C
    int d_inner = 0;             // D; 0 = 2 C
    int d_state = 16;            // N
    int d_conv = 4;              // W
    int dt_rank = 0;             // R; 0 = ceil(C / 16)
    int d_ff = 0;                // F of dense feed-forward layers; 0 = 2 C (SwiGLU: 6 C^2 weights, as a Mamba layer)
    int d_expert = 0;            // F of experts; 0 = 3 C with ReLU, 2 C with SwiGLU
    int experts = 8;             // E
    int top_k = 1;               // K
    double capacity = 1.0;       // rows per expert = floor(capacity * T * B * K / E) in training; 0 = no limit, no token dropped
    int swiglu_experts = 0;      // 0: ReLU
    int renormalize = 0;         // divide the K gates by their sum (Mixtral)
    double balance_loss = 0.01;  // weight of the load-balancing loss, averaged over the E layers
    double z_loss = 0.0;         // weight of mean(logsumexp(logits)^2), likewise
    int tied = 0;                // head shares the embedding's table
    double norm_eps = 1e-5;

    // Calls f(flag name, field, help) for every field, in order.
    template <class Self, class F>
    static void each_field(Self& c, F&& f) {
        f("layers", c.layers, "residual steps: M Mamba, F feed-forward, E experts, (ME) parallel; \"ME*4\" repeats");
        f("vocab", c.vocab, "vocabulary; from the data where there is any");
        f("d-model", c.d_model, "model width C");
        f("d-inner", c.d_inner, "inner width D of a Mamba mixer; 0 = 2 C");
        f("d-state", c.d_state, "state N per channel");
        f("d-conv", c.d_conv, "width of the causal convolution");
        f("dt-rank", c.dt_rank, "rank R of the dt projection; 0 = ceil(C/16)");
        f("d-ff", c.d_ff, "width of dense SwiGLU feed-forward layers; 0 = 2 C");
        f("d-expert", c.d_expert, "width of an expert; 0 = 3 C with ReLU, 2 C with SwiGLU");
        f("experts", c.experts, "experts E in each E layer");
        f("top-k", c.top_k, "experts K that a token goes to");
        f("capacity", c.capacity, "rows per expert over an even share, in training; 0 = drop nothing");
        f("swiglu-experts", c.swiglu_experts, "1: SwiGLU experts, 0: ReLU");
        f("renormalize", c.renormalize, "1: gates of the K experts sum to one");
        f("balance-loss", c.balance_loss, "weight of the load-balancing loss");
        f("z-loss", c.z_loss, "weight of the router z-loss");
        f("tied", c.tied, "1: the head shares the embedding's table");
        f("norm-eps", c.norm_eps, "epsilon of RMSNorm");
    }

    void resolve();                                 // replaces every 0 that means "derived"; fails on what cannot be built
    std::vector<std::string> steps() const;         // {"M", "E", ...}, a parallel group is one entry: "ME"
    int count(char letter) const;                   // how many layers of that kind
    int padded_vocab() const { return (vocab + 7) / 8 * 8; }
    int capacity_rows(int rows) const;              // per expert; 0 = no limit
    double matmul_flops_per_token(bool training) const;  // multiply and add counted as two; training = forward + backward
    std::string to_json() const;
    static Config from_json(const std::string& text, const std::string& where);
};
struct Preset {
    const char *name, *note;
    Config config;
};
const std::vector<Preset>& presets();
const Preset& find_preset(const std::string& name);  // fails with the list of names

// ------------------------------------------------------------------------------------------------------------------
// The table of layer functions: one declaration each, two implementations (namespace cpu, namespace gpu).
// Argument order: outputs, inputs, scratch, sizes, stream. Pointers are device pointers of that table's device.
//  - d_x_ is the gradient of x. Parameter gradients (real) are accumulated, activation gradients are overwritten,
//    unless the function has a flag `accumulate`.
//  - "or null" arguments may be nullptr; outputs never overlap inputs unless it says so.
//  - scratch: at least scratch_bytes() bytes, contents undefined before and after, shared by all calls on one stream.
//  - Every function is deterministic: same inputs, same sizes, same device: same bits.
struct Layers {
    const char* device;  // "cpu", "cuda" or "simt"

    // -------- memory
    void* (*allocate)(size_t bytes, const char* name);  // contents undefined; fails with name and size
    void (*release)(void* memory);                      // null is fine
    void* (*allocate_host)(size_t bytes, const char* name);  // on the host, where upload returns at once and reads later
    void (*release_host)(void* memory);                 // null is fine
    void (*zero)(void* memory, size_t bytes, cudaStream_t stream);
    void (*upload)(void* to_device, const void* from_host, size_t bytes, cudaStream_t stream);
    void (*download)(void* to_host, const void* from_device, size_t bytes, cudaStream_t stream);  // returns when done
    void (*synchronize)(cudaStream_t stream);
    size_t (*scratch_bytes)(const Config& config, int B, int T);  // the most that any function below needs

    // -------- embedding:  out[r] = table[tokens[r]]
    // out (rows, C) real, the residual stream; tokens (rows), all in [0, V); table (V, C)
    void (*embedding_forward)(real* out, const int* tokens, const floatX* table, int rows, int C, cudaStream_t stream);
    // Sums the rows of each token in a fixed order (on a GPU: a stable sort by token, then one sum per run).
    void (*embedding_backward)(real* d_table, const real* d_out, const int* tokens, void* scratch, int rows, int V, int C,
                               cudaStream_t stream);

    // -------- RMSNorm fused with the residual add:  x = residual + branch;  out = x * rstd * weight,  rstd = 1/sqrt(mean(x^2) + eps)
    // out (rows, C); sum (rows, C) = x; rstd (rows); residual (rows, C); branch (rows, C) or null; weight (C). sum may be residual.
    void (*rmsnorm_forward)(floatX* out, real* sum, real* rstd, const real* residual, const floatX* branch, const real* weight, int rows,
                            int C, real eps, cudaStream_t stream);
    // d_sum (rows, C): in, the gradient reaching x from later steps; out, that plus the norm's own; d_branch: the same, as floatX, or null.
    void (*rmsnorm_backward)(real* d_sum, floatX* d_branch, real* d_weight, const floatX* d_out, const real* sum, const real* rstd,
                             const real* weight, void* scratch, int rows, int C, cudaStream_t stream);

    // -------- linear, no bias:  out = in W^T (+ out if accumulate)
    // out (rows, O) with ld_out; in (rows, I) with ld_in; weight (O, I)
    void (*linear_forward)(floatX* out, int ld_out, const floatX* in, int ld_in, const floatX* weight, int rows, int I, int O,
                           bool accumulate, cudaStream_t stream);
    // d_in = d_out W (+ d_in if accumulate), or null;  d_weight += d_out^T in
    void (*linear_backward)(floatX* d_in, int ld_d_in, real* d_weight, const floatX* d_out, int ld_d_out, const floatX* in, int ld_in,
                            const floatX* weight, int rows, int I, int O, bool accumulate, cudaStream_t stream);

    // -------- causal depthwise convolution and SiLU:  a[t] = bias + sum_w weight[w] in[t - (W-1) + w];  out = a * sigmoid(a)
    // out (B, T, D); in (B, T, D) with ld_in; weight (D, W); bias (D). States hold the last W-1 inputs, oldest first: (B, W-1, D);
    // initial_state or null (zeros); final_state or null. W <= 8.
    void (*conv_forward)(floatX* out, real* final_state, const floatX* in, int ld_in, const real* weight, const real* bias,
                         const real* initial_state, int B, int T, int D, int W, cudaStream_t stream);
    // d_initial_state or null (output, overwritten); d_final_state or null (input)
    void (*conv_backward)(floatX* d_in, int ld_d_in, real* d_weight, real* d_bias, real* d_initial_state, const floatX* d_out,
                          const real* d_final_state, const floatX* in, int ld_in, const real* weight, const real* bias,
                          const real* initial_state, void* scratch, int B, int T, int D, int W, cudaStream_t stream);

    // -------- selective scan (arXiv 2312.00752, section 3):  per channel d, over time t, with h (N) the state
    //   delta = softplus(dt + dt_bias) (threshold 20);  A = -exp(A_log);  h_t = exp(delta A) h_{t-1} + delta u B_t
    //   y = C_t . h_t + skip u;  out = y * silu(z)
    // out, u, dt (B, T, D); z (B, T, D) with ld_z; B_t, C_t (B, T, N) with ld_bc; A_log (D, N); skip, dt_bias (D);
    // states (B, D, N), initial_state or null (zeros), final_state or null; chunk_states (B, scan_chunks(T), D, N): the state before
    // each chunk, for the backward pass, or null. N <= 128.
    void (*scan_forward)(floatX* out, real* final_state, real* chunk_states, const floatX* u, const floatX* dt, const floatX* B_t,
                         const floatX* C_t, int ld_bc, const floatX* z, int ld_z, const real* A_log, const real* skip,
                         const real* dt_bias, const real* initial_state, void* scratch, int B, int T, int D, int N,
                         cudaStream_t stream);
    // Gradients have the shapes and ld of what they are gradients of; d_dt is that of dt before the bias.
    // d_initial_state or null (output, overwritten); d_final_state or null (input)
    void (*scan_backward)(floatX* d_u, floatX* d_dt, floatX* d_B_t, floatX* d_C_t, floatX* d_z, real* d_A_log, real* d_skip,
                          real* d_dt_bias, real* d_initial_state, const floatX* d_out, const real* d_final_state, const floatX* u,
                          const floatX* dt, const floatX* B_t, const floatX* C_t, int ld_bc, const floatX* z, int ld_z,
                          const real* A_log, const real* skip, const real* dt_bias, const real* chunk_states, void* scratch, int B,
                          int T, int D, int N, cudaStream_t stream);

    // -------- router (Switch, arXiv 2101.03961):  p = softmax(x W^T);  the K largest, ties to the lower expert;  gate = p, or p / sum of K
    // probs (rows, E); lse (rows) = logsumexp of the logits; experts, gates (rows, K), largest first; x (rows, C); weight (E, C)
    void (*router_forward)(real* probs, real* lse, int* experts, real* gates, const floatX* x, const real* weight, void* scratch,
                           int rows, int C, int E, int K, bool renormalize, cudaStream_t stream);
    // losses[0] += E sum_e f_e mean(p_e), f_e = load[e] / rows;  losses[1] += mean(lse^2)
    void (*router_losses)(real* losses, const real* probs, const real* lse, const int* load, void* scratch, int rows, int E,
                          cudaStream_t stream);
    // Through gates, softmax, and both losses times their weights.  d_x += ...;  d_gates (rows, K), of dropped choices: 0
    void (*router_backward)(floatX* d_x, real* d_weight, const real* d_gates, const real* probs, const real* lse, const int* experts,
                            const real* gates, const int* load, const floatX* x, const real* weight, void* scratch, int rows, int C,
                            int E, int K, bool renormalize, real balance_weight, real z_weight, cudaStream_t stream);

    // -------- dispatch: rows to the experts that they chose, and back.
    // A choice is a pair row * K + k; a slot is a row of the experts' input.
    // Slots of expert e start at offset[e]. capacity > 0: offset[e] = e * capacity, first come first served, a choice that finds its
    // expert full is dropped. capacity = 0: nothing is dropped, offset is the running sum of load.
    // slot (rows, K), -1 if dropped; choice (slots), -1 if empty; load (E): choices of each expert, before dropping; offset (E+1)
    void (*dispatch_plan)(int* slot, int* choice, int* load, int* offset, const int* experts, void* scratch, int rows, int E, int K,
                          int capacity, cudaStream_t stream);
    // out (slots, C): out[s] = x[choice[s] / K], or 0 for an empty slot
    void (*dispatch_forward)(floatX* out, const floatX* x, const int* choice, int slots, int C, int K, cudaStream_t stream);
    // d_x (rows, C): d_x[r] = sum_k d_out[slot[r, k]] (+ d_x if accumulate)
    void (*dispatch_backward)(floatX* d_x, const floatX* d_out, const int* slot, int rows, int C, int K, bool accumulate,
                              cudaStream_t stream);
    // out (rows, C): out[r] = sum_k gates[r, k] y[slot[r, k]] (+ out if accumulate); dropped choices add nothing; y (slots, C)
    void (*combine_forward)(floatX* out, const floatX* y, const real* gates, const int* slot, int rows, int C, int K, bool accumulate,
                            cudaStream_t stream);
    // d_y[s] = gate * d_out[row], 0 for an empty slot;  d_gates[r, k] = d_out[r] . y[slot[r, k]], 0 if dropped
    void (*combine_backward)(floatX* d_y, real* d_gates, const floatX* d_out, const floatX* y, const real* gates, const int* slot,
                             const int* choice, int rows, int slots, int C, int K, cudaStream_t stream);

    // -------- experts: linear with a weight per expert.  out[s] = in[s] W_e^T for the slots s of expert e
    // out (slots, O); in (slots, I); weight (E, O, I). capacity > 0: one strided-batched product over all slots; empty slots of `in` are
    // zero and those of `out` become zero. capacity = 0: E products, for which host_offset (E+1) is dispatch_plan's offset, read back to
    // the host (null with a capacity).
    void (*experts_forward)(floatX* out, const floatX* in, const floatX* weight, const int* host_offset, int slots, int I, int O, int E,
                            int capacity, cudaStream_t stream);
    void (*experts_backward)(floatX* d_in, real* d_weight, const floatX* d_out, const floatX* in, const floatX* weight,
                             const int* host_offset, int slots, int I, int O, int E, int capacity, cudaStream_t stream);

    // -------- activations
    // SwiGLU:  out = silu(gate) * up;  gate_up (rows, 2F) = [gate | up];  out (rows, F)
    void (*swiglu_forward)(floatX* out, const floatX* gate_up, int rows, int F, cudaStream_t stream);
    void (*swiglu_backward)(floatX* d_gate_up, const floatX* d_out, const floatX* gate_up, int rows, int F, cudaStream_t stream);
    // ReLU:  out may be in; d_in may be d_out; `in` of the backward pass may be forward's in or out, which have the same signs
    void (*relu_forward)(floatX* out, const floatX* in, int64_t count, cudaStream_t stream);
    void (*relu_backward)(floatX* d_in, const floatX* d_out, const floatX* in, int64_t count, cudaStream_t stream);

    // -------- classifier fused with softmax and cross-entropy, in place
    // losses (rows) = logsumexp(logits[r, :V]) - logits[r, target];  logits (rows, ld) become d_loss * (softmax - onehot), 0 past V,
    // or stay as they are if d_loss == 0. A target of -1 is ignored: loss and gradient 0. V <= ld.
    void (*classifier)(real* losses, floatX* logits, const int* targets, int rows, int V, int ld, real d_loss, cudaStream_t stream);
    // probs (rows, V) = softmax(logits[:, :V] / temperature): for sampling
    void (*softmax_forward)(real* probs, const floatX* logits, int rows, int V, int ld, real temperature, cudaStream_t stream);

    // -------- reductions and the optimizer
    void (*sum)(real* out, const real* in, void* scratch, int64_t count, cudaStream_t stream);                // out[0] += sum of in
    void (*sum_of_squares)(real* out, const real* in, void* scratch, int64_t count, cudaStream_t stream);     // out[0] += sum of in^2
    // AdamW (arXiv 1711.05101), g = grad_scale * grad, bias-corrected by `step` (from 1):  m, v as usual;
    // master -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * master);  weight = floatX(master), or null
    void (*adamw)(real* master, floatX* weight, real* m, real* v, const real* grad, int64_t count, real lr, real beta1, real beta2,
                  real eps, real weight_decay, real grad_scale, int step, cudaStream_t stream);
};
namespace cpu { extern const Layers layers; }
namespace gpu { extern const Layers layers; }
const Layers& find_device(const std::string& name);  // "auto" = the fastest there is; fails with what this build and machine have

// What the machine can do, measured through the same functions: the marks that speeds are held against. Medians of a few runs.
double measure_matmul_flops(const Layers& layers, int size);      // FLOP/s of one product of two (size, size) matrices of floatX
double measure_read_bandwidth(const Layers& layers, size_t bytes);  // bytes/s of reading that much once

// ------------------------------------------------------------------------------------------------------------------
// Memory: a few arenas, each planned before it is allocated, so that --dry-run can print what would be needed.
struct Arena {
    struct Entry {
        std::string name;
        void** pointer;  // set by bind()
        size_t offset, bytes;
        void* memory = nullptr;
    };
    std::string name;
    std::vector<Entry> entries;
    size_t top = 0, bytes = 0;  // where the next entry goes; the highest top so far
    const Layers* device = nullptr;
    char* memory = nullptr;

    explicit Arena(std::string name) : name(std::move(name)) {}
    Arena(const Arena&) = delete;
    ~Arena() { release(); }
    template <class T>
    void add(T** pointer, const std::string& tensor, int64_t count) {
        add_bytes(reinterpret_cast<void**>(pointer), tensor, size_t(count) * sizeof(T));
    }
    void rewind(size_t mark) { top = mark; }  // what is added next shares memory with what was added since the mark
    void allocate(const Layers& on);          // one allocation; binds
    void bind() const;                        // sets every entry's pointer
    void release();                           // forgets the entries too

   private:
    void add_bytes(void** pointer, const std::string& tensor, size_t size);
};

// ------------------------------------------------------------------------------------------------------------------
// Parameters: each is named, sized and described once, in Model's constructor; initialisation, weight decay, optimizer, checkpoints
// and tests read the list. A Tensor is what layer functions and the optimizer see. A Parameter is what a checkpoint names: a whole
// Tensor, or a part of one, where gate and up projections, or the matrices of all experts, lie in one block for one product.
enum class Init { zero, one, uniform, normal, log_state, dt_bias };  // uniform: +-scale; normal: deviation scale; see initialize()
struct Tensor {
    std::string name;
    int64_t count = 0;
    Init init = Init::zero;
    double scale = 0;
    bool decay = false;        // weight decay applies
    real* master = nullptr;    // what the optimizer updates; small parameters are used in this form
    floatX* weight = nullptr;  // what matrix products read: master rounded to floatX, or master itself where they are one type
    real *grad = nullptr, *m = nullptr, *v = nullptr;
};
struct Parameter {
    std::string name;
    std::vector<int64_t> shape;
    Tensor* tensor;
    int64_t offset, count;  // elements of the tensor
};

struct MambaLayer {
    Tensor in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, skip, out_proj;
    floatX *xz, *u, *x_dbl, *dt, *y;  // (rows, 2D) = [x | z]; (rows, D); (rows, R+2N) = [dt | B | C]; (rows, D); (rows, D)
    real* chunk_states;               // (B, chunks, D, N)
};
struct FeedForwardLayer {
    Tensor gate_up, down;        // (2F, C), (C, F)
    floatX *gate_up_out, *hidden;  // (rows, 2F), (rows, F)
};
struct ExpertsLayer {
    int index;               // among the model's E layers
    Tensor router, in, out;  // (E, C); per expert (2F or F, C), (C, F)
    real *probs, *lse, *gates;
    int *experts, *slot, *choice, *offset;        // as in Layers
    int* load;                                    // this layer's and part's place in buffers.loads
    std::vector<int> host_offset;                 // offset on the host, read back only where there is no capacity
    floatX *dispatched, *gate_up, *hidden, *y;    // (slots, C); (slots, 2F), SwiGLU only; (slots, F); (slots, C)
};
struct Layer {
    char kind;  // M, F or E
    MambaLayer mamba;
    FeedForwardLayer feed_forward;
    ExpertsLayer experts;
};
struct Step {  // x += sum of its layers' f(norm(x)); the last one has no layers: the norm before the head
    Tensor norm;
    std::vector<std::unique_ptr<Layer>> layers;
    real *sum, *rstd;  // (rows, C) the residual stream before the norm; (rows)
    floatX* normed;    // (rows, C)
};

// What decoding carries from one call to the next, for B sequences: no part of it grows with the context.
struct DecodeState {
    int B = 0;
    Arena arena{"decode state"};
    struct Mixer {
        real *conv[2], *scan[2];  // (B, W-1, D), (B, D, N); [0] is read, [1] written, then they change places
    };
    std::vector<Mixer> mixers;  // one for each M layer, in order
    int current = 0;
};

struct Losses {               // of one optimizer step: means over its accumulation parts
    double cross_entropy = 0;  // nats per token
    double balance = 0, z = 0;  // mean over the E layers, unweighted
    double grad_norm = 0;
    double expert_load = 0, dropped = 0;  // fullest expert over the mean, worst layer and part; share of choices dropped
};
struct AdamW {
    double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.1, grad_clip = 0.5;
};

struct Model {
    Config config;
    const Layers& layers;
    cudaStream_t stream = nullptr;
    std::vector<Parameter> parameters;

    Model(const Config& config, const Layers& layers);  // resolves config, lists the parameters, allocates nothing
    ~Model();
    Model(const Model&) = delete;
    int64_t parameter_count() const;
    int64_t active_parameter_count() const;  // per token: K of E experts
    void initialize(uint64_t seed);          // allocates the weights and draws them

    // ---- training: plan_training() only computes sizes; allocate_training() takes the memory.
    void plan_training(int B, int T, int accumulation = 1);
    void allocate_training(int B, int T, int accumulation = 1);
    // One of `accumulation` equal parts of a step: gradients of mean cross-entropy + weighted auxiliary losses are added to grad.
    // tokens, targets (B, T) on the host, where they may change afterwards; a target of -1 is ignored. Returns while the device computes:
    // it waits for nothing but the counts of E layers without capacity.
    void forward_backward(const int* tokens, const int* targets, int accumulation);
    void zero_gradients();
    Losses read_losses();               // waits; losses and gradient norm since the last zero_gradients()
    // The first with a NaN or infinity: of the weights, of the residual stream on its way up, of the gradients on theirs down; "" if none.
    std::string first_bad_tensor();
    void update(const AdamW& optimizer, const Losses& losses, int step);  // step counts from 1
    double evaluate(const int* tokens, const int* targets, int B, int T);  // mean cross-entropy; no token is dropped

    // ---- decoding: T tokens of each of the state's B sequences; T = the prompt, a part of it, or 1. No token is dropped.
    void start(DecodeState& state, int B);
    // probabilities of the next token at this temperature (0: as 1), (B, V) on the host, valid until the next call
    const real* decode(DecodeState& state, const int* tokens, int T, real temperature);
    std::vector<real> logits(const int* tokens, int B, int T);  // (B, T, V), for tests and small inputs

    // ---- checkpoints: safetensors; metadata holds "config" and whatever the caller adds
    using Metadata = std::vector<std::pair<std::string, std::string>>;
    void save(const std::string& path, const Metadata& metadata) const;            // master weights
    void save_optimizer(const std::string& path, const Metadata& metadata) const;  // m and v
    void load(const std::string& path);            // allocates the weights if need be; fails on any missing, extra or misshapen tensor
    void load_optimizer(const std::string& path);  // after allocate_training

    size_t decode_state_bytes() const;  // per sequence

    // ---- what the above is made of
    Arena weights{"weights"}, masters{"master weights"}, gradients{"gradients"}, moments{"optimizer"}, activations{"activations"},
        inference{"validation and sampling"};
    std::vector<std::unique_ptr<Step>> steps;
    Tensor embedding, head_table;
    Tensor* head;                  // &embedding if tied
    std::vector<Tensor*> tensors;  // all of them, in the order of the parameters
    enum { kCrossEntropy, kBalance, kZ, kGradSquares, kLossCount };
    struct Buffers {                // shared by all layers
        int *tokens, *targets;      // (rows)
        real *losses, *row_losses;  // (kLossCount), sums over a step; (rows)
        int* loads;                 // (accumulation, E layers, E)
        floatX *branch, *logits;    // (rows, C) the current step's output; (kHeadRows, Vp)
        real* probs;                // (B, V)
        char* scratch;
        real* d_sum;                                                 // (rows, C) gradient of the residual stream
        floatX *d_branch, *d_normed;                                 // (rows, C)
        floatX *d_y, *d_xz, *d_u, *d_x_dbl, *d_dt;                   // as in MambaLayer
        floatX *d_gate_up, *d_hidden;                                // as in FeedForwardLayer
        real* d_gates;                                               // (rows, K)
        floatX *d_slots, *d_expert_gate_up, *d_expert_hidden;        // as dispatched and y in turn, gate_up, hidden of ExpertsLayer
    } buffers{};
    int batch = 0, time = 0;                       // of training
    int inference_batch = 0, inference_time = 0;   // what the inference arena has room for
    bool training_pass = false;                    // is the forward pass now running one of training?
    int planned_parts = 1;                         // accumulation parts that buffers.loads and staging have room for
    int* staging = nullptr;                        // (planned_parts, 2, rows) on the host: tokens, targets of each part, for upload
    int staged = 0;                                // parts in it that the device may not have read yet
    int parts = 0;                                 // accumulation parts and targets since zero_gradients()
    int64_t targets_seen = 0;
    std::vector<real> probabilities;

    void plan_weights();
    void allocate_weights();
    void plan_activations(Arena& arena, int B, int T, bool training);
    void begin_inference(int B, int T);
    void forward(const int* tokens, const int* targets, int B, int T, DecodeState* state);
    void mamba_forward(MambaLayer& m, const floatX* normed, bool accumulate, int B, int T, DecodeState::Mixer* state, int current);
    void mamba_backward(MambaLayer& m, const floatX* normed, bool accumulate);
    void feed_forward_forward(FeedForwardLayer& f, const floatX* normed, bool accumulate, int rows);
    void feed_forward_backward(FeedForwardLayer& f, const floatX* normed, bool accumulate);
    void experts_forward(ExpertsLayer& e, const floatX* normed, bool accumulate, int rows, int capacity);
    void experts_backward(ExpertsLayer& e, const floatX* normed, bool accumulate, int accumulation);
    template <class F> void head_blocks(const floatX* normed, int ld_normed, int rows, F&& each);
    template <class F> void cross_entropy(int rows, real d_loss, F&& each);
};

// Draws an index from probabilities: the top_k largest (0 = all), of those the fewest that reach top_p, by u in [0, 1).
// greedy: the largest, ties to the lower index.
int sample_token(const real* probs, int V, bool greedy, int top_k, double top_p, double u);

// ------------------------------------------------------------------------------------------------------------------
// Files.
// Tokens (.bin, llm.c's format): 256 int32 {kTokenMagic, version, count, 0...}, then count tokens: uint16 (version 1) or uint32 (2).
inline constexpr int kTokenMagic = 20240520, kTokenHeaderInts = 256;

// Named in a data directory's dataset.json and in a checkpoint's metadata, so that nothing else needs a flag for it.
struct Tokenizer {
    std::string kind = "bytes";  // token = byte
    int vocab = 257, end_of_text = 256;
    void encode(std::vector<int>& tokens, const char* text, size_t size) const;  // appends
    std::string decode(int token) const;                                         // end-of-text: ""
    std::string to_json() const;
    static Tokenizer from_json(const std::string& text, const std::string& where);  // fails on an unknown kind or bad sizes
};

// Feeds the prompt, then draws up to `count` tokens and hands each to `emit`, until end-of-text or until `emit` returns false.
// `sample` tells apart texts drawn with one seed. An empty prompt starts from end-of-text: that is what a new document follows in
// training, and there has to be something to predict from. Memory does not grow with the text.
struct Sampling {
    double temperature = 0.8, top_p = 1.0;  // temperature 0: always the most probable token
    int top_k = 0;                          // 0: all
    uint64_t seed = 0;
};
void generate(Model& model, const Tokenizer& tokenizer, std::vector<int> prompt, int64_t count, const Sampling& sampling, int64_t sample,
              const std::function<bool(int)>& emit);

// A safetensors file open for reading: 8 bytes of header length, a JSON header, then the tensors.
struct Safetensors {
    struct Entry {
        std::string dtype;  // F64, F32, BF16, I64, I32
        std::vector<int64_t> shape;
        int64_t offset, bytes, count;  // offset from the start of the file
    };
    std::string path;
    std::vector<std::pair<std::string, Entry>> entries;
    Model::Metadata metadata;
    explicit Safetensors(const std::string& path);  // fails on anything malformed
    ~Safetensors();
    Safetensors(const Safetensors&) = delete;
    bool has(const std::string& name) const;
    const Entry& find(const std::string& name) const;        // fails if there is none
    std::string meta(const std::string& key) const;          // fails if there is none
    void read(const std::string& name, double* out) const;   // converts
    void read(const std::string& name, float* out) const;
    void read(const std::string& name, int* out) const;

   private:
    std::FILE* file = nullptr;
};

// Writes path + ".tmp", flushes it to the disk, renames it to path: a reader sees the old file or the new one, whatever happens.
void write_atomically(const std::string& path, const std::function<void(std::FILE*)>& write);
std::string read_file(const std::string& path, const char* what);  // fails with path and reason
