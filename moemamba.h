// MoE-Mamba and its relatives: the vocabulary. Everything that the other files share is declared here, once:
// shape letters, number types, Config, the table of layer functions, the Model, and the files it reads and writes.
//
// Shapes. Activations are row-major with time before channels, so nothing is ever transposed between two layers.
//   B batch   T time   C model width   D inner width of a Mamba mixer   N state per channel   R rank of dt   W width of the conv
//   F hidden width of a feed-forward or expert   E experts   K experts per token   V vocabulary
//   H heads of queries   G heads of keys and values   S size of a head
//   rows      B*T, where a function does not care which is which
//   ld_x      distance between two rows of x, in elements, where x may be a slice of wider rows
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "formats/files.h"
#include "formats/random.h"
#include "formats/safetensors.h"
#include "formats/tokenizer.h"

// ------------------------------------------------------------------------------------------------------------------
// Two compilers. nvcc builds define USE_CUDA; g++ builds run the same kernels through cpu/simt.h. Three spellings differ:
//   LAUNCH(kernel, grid, block, shared_bytes, stream)(arguments);    a launch
//   SHARED(float[32][33], tile);                                     static shared memory, 32-byte aligned
//   DYNAMIC_SHARED(float, buffer);                                   dynamic shared memory, 16-byte aligned
#ifdef USE_CUDA
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <mma.h>
#define LAUNCH(kernel, ...) kernel<<<__VA_ARGS__>>>
#define SHARED(type, name) __shared__ __align__(32) std::type_identity_t<type> name
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
// Likewise the closed loop, whose chunks are as short as what a thread can keep of each step in shared memory.
inline constexpr int kLoopChunk = 16;
inline constexpr real kLoopTiny = real(1e-12);  // beside |B_t|^2 |C_t|^2, which may be 0
inline int64_t loop_chunks(int T) { return (T + kLoopChunk - 1) / kLoopChunk; }

inline constexpr const char* kConbaTerms[] = {"selection", "control", "delay", "scaling", "noise", "adaptation"};

// The largest that every implementation of the layers serves.
inline constexpr int kMaxStates = 64, kMaxConv = 8, kMaxExperts = 256, kMaxHeadSize = 256, kMaxDelay = 32;

// ------------------------------------------------------------------------------------------------------------------
// Config: what defines a model. One list of fields serves flags, presets, checkpoints and --help.
//
// A model is a string of residual steps x += f(norm(x)), one letter each, with an optional repeat:
//   M Mamba   C Conba: Mamba in a closed loop   A causal attention   F dense feed-forward   E mixture of experts
//   (ME) a parallel group: one norm, outputs summed
//   Mamba "MM*8"   Mamba-MLP "MF*8"   MoE-Mamba "ME*8"   parallel MoE-Mamba "(ME)*8"
//   Transformer "AF*8"   Transformer-MoE, Mixtral "AE*8"   Jamba "MFMEMFMEAFMEMFME*4"   MixCon "CFCECFAEAFCECFCE*4"
struct Config {
    std::string layers = "ME*4";
    int vocab = 257;             // V
    int d_model = 192;           // C
    int d_inner = 0;             // D; 0 = 2 C
    int d_state = 16;            // N
    int d_conv = 4;              // W
    int dt_rank = 0;             // R; 0 = ceil(C / 16)
    int mamba_norms = 0;         // 1: RMSNorm on dt, B and C (Jamba); Conba always has it
    std::string conba = "selection,control,delay,scaling,adaptation";  // what a C layer has beside a Mamba mixer: of kConbaTerms, or "none"
    int conba_tau = 8;           // steps that the delayed output is old
    double conba_alpha = 1e-2;   // rate at which the gain adapts
    double conba_kappa = 1;      // its bound
    double conba_eps = 0.1;      // error up to which |error| is smooth
    double conba_sigma = 0;      // deviation of the noise on a state, in training
    int heads = 0;               // H of attention; 0 = one for each 64 of C
    int kv_heads = 0;            // G; 0 = H
    int head_dim = 0;            // S; 0 = C / H
    double rope_base = 10000;    // of rotary positions; 0 = none
    int d_ff = 0;                // F of dense feed-forward layers; 0 = 2 C with SwiGLU (6 C^2 weights, as a Mamba layer), 4 C with ReLU
    int swiglu_ff = 1;           // 0: ReLU
    int d_expert = 0;            // F of experts; 0 = 3 C with ReLU, 2 C with SwiGLU
    int experts = 8;             // E
    std::string routing = "token-choice";  // who chooses: or "expert-choice", where each expert takes its most probable tokens of the batch
    int top_k = 1;               // K
    double capacity = 1.0;       // rows per expert = floor(capacity * T * B * K / E) in training; 0 = no limit, no token dropped
    int swiglu_experts = 0;      // 0: ReLU
    int renormalize = 0;         // divide the K gates by their sum (Mixtral)
    double balance_loss = 0.01;  // weight of the load-balancing loss, averaged over the E layers; 0 with expert-choice
    double z_loss = 0.0;         // weight of mean(logsumexp(logits)^2), likewise
    int tied = 0;                // head shares the embedding's table
    double norm_eps = 1e-5;

    // Calls f(flag name, field, help, least, most) for every field, in order; of text, least and most mean nothing.
    template <class Self, class F>
    static void each_field(Self& c, F&& f) {
        constexpr double kMost = 1 << 24;  // keeps every product of two sizes far inside 64 bits
        f("layers", c.layers, "residual steps: M Mamba, C Conba, A attention, F feed-forward, E experts, (ME) parallel; \"ME*4\" repeats", 0, 0);
        f("vocab", c.vocab, "vocabulary; from the data where there is any", 2, kMost);
        f("d-model", c.d_model, "model width C", 1, kMost);
        f("d-inner", c.d_inner, "inner width D of a Mamba mixer; 0 = 2 C", 0, kMost);
        f("d-state", c.d_state, "state N per channel", 1, kMaxStates);
        f("d-conv", c.d_conv, "width of the causal convolution", 1, kMaxConv);
        f("dt-rank", c.dt_rank, "rank R of the dt projection; 0 = ceil(C/16)", 0, kMost);
        f("mamba-norms", c.mamba_norms, "1: RMSNorm on dt, B and C of a Mamba mixer, as Jamba", 0, 1);
        f("conba", c.conba, "terms of a C layer: selection,control,delay,scaling,noise,adaptation, some of them, or none", 0, 0);
        f("conba-tau", c.conba_tau, "steps after which an output is fed back by delay", 1, kMaxDelay);
        f("conba-alpha", c.conba_alpha, "rate of adaptation of the gain of control", 0, 1e3);
        f("conba-kappa", c.conba_kappa, "largest gain of control; 1 is what cannot make the loop ring", 0, 1);
        f("conba-eps", c.conba_eps, "error below which the gain adapts less", 1e-9, 1e3);
        f("conba-sigma", c.conba_sigma, "deviation of noise on the states, in training, where --conba has noise", 0, 1e3);
        f("heads", c.heads, "heads H of attention; 0 = one for each 64 of C", 0, kMost);
        f("kv-heads", c.kv_heads, "heads G of its keys and values, each for H/G of its queries; 0 = H", 0, kMost);
        f("head-dim", c.head_dim, "size S of a head; 0 = C / H", 0, kMaxHeadSize);
        f("rope-base", c.rope_base, "base of rotary positions; 0 = none", 0, 1e12);
        f("d-ff", c.d_ff, "width of dense feed-forward layers; 0 = 2 C with SwiGLU, 4 C with ReLU", 0, kMost);
        f("swiglu-ff", c.swiglu_ff, "1: SwiGLU in dense feed-forward layers, 0: ReLU", 0, 1);
        f("d-expert", c.d_expert, "width of an expert; 0 = 3 C with ReLU, 2 C with SwiGLU", 0, kMost);
        f("experts", c.experts, "experts E in each E layer", 1, kMaxExperts);
        f("routing", c.routing, "token-choice, or expert-choice: each expert takes its share of the batch; not causal, for comparisons", 0, 0);
        f("top-k", c.top_k, "experts K that a token goes to", 1, c.experts);
        f("capacity", c.capacity, "rows per expert over an even share, in training; 0 = drop nothing", 0, 1e6);
        f("swiglu-experts", c.swiglu_experts, "1: SwiGLU experts, 0: ReLU", 0, 1);
        f("renormalize", c.renormalize, "1: gates of the K experts sum to one", 0, 1);
        f("balance-loss", c.balance_loss, "weight of the load-balancing loss", 0, 1e6);
        f("z-loss", c.z_loss, "weight of the router z-loss", 0, 1e6);
        f("tied", c.tied, "1: the head shares the embedding's table", 0, 1);
        f("norm-eps", c.norm_eps, "epsilon of RMSNorm", 1e-12, 1);
    }

    void resolve();                                 // replaces every 0 that means "derived"; fails on what cannot be built
    std::vector<std::string> steps() const;         // {"M", "E", ...}, a parallel group is one entry: "ME"
    int count(char letter) const;                   // how many layers of that kind
    bool conba_has(const std::string& term) const { return ("," + conba + ",").find("," + term + ",") != std::string::npos; }
    bool expert_choice() const { return routing == "expert-choice"; }
    bool causal() const { return !(expert_choice() && count('E')); }  // or else a token's output depends on later tokens
    int padded_vocab() const { return (vocab + 7) / 8 * 8; }
    int capacity_rows(int rows) const;              // per expert; 0 = no limit
    std::string to_json() const;
    static Config from_json(const std::string& text, const std::string& where, bool whole = true);  // whole: no field may lack
};
struct Preset {
    const char *name, *note;
    Config config;
};
const std::vector<Preset>& presets();
const Preset& find_preset(const std::string& name);  // fails with the list of names

// ------------------------------------------------------------------------------------------------------------------
// Arguments that a layer's forward and backward functions share: the inputs, and the sizes.

struct Linear {
    const floatX* in;  // (rows, I) with ld_in
    int ld_in;
    const floatX* weight;  // (O, I)
    int rows, I, O;
};
struct SliceNorm {
    const floatX* in;  // (rows, C) with ld_in
    int ld_in;
    const real* weight;  // (C)
    int rows, C;
    real eps;
};
struct Conv {
    const floatX* in;  // (B, T, D) with ld_in
    int ld_in;
    const real *weight, *bias;   // (D, W), (D)
    const real* initial_state;   // (B, W-1, D), the last W-1 inputs, oldest first; or null: zeros
    int B, T, D, W;              // W <= kMaxConv
};
struct ConvGradients {
    floatX* d_in;            // with ld_in
    real *d_weight, *d_bias;
    real* d_initial_state;   // overwritten; or null
};
struct Scan {
    const floatX *u, *dt;       // (B, T, D)
    const floatX *B_t, *C_t;    // (B, T, N) with ld_bc
    int ld_bc;
    const floatX* z;            // (B, T, D) with ld_z
    int ld_z;
    const real *A_log, *skip, *dt_bias;  // (D, N), (D), (D)
    const real* initial_state;  // (B, D, N), or null: zeros
    int B, T, D, N;             // N <= kMaxStates
};
struct ScanGradients {  // shapes and ld of what they are gradients of
    floatX *d_u, *d_dt, *d_B_t, *d_C_t, *d_z;
    real *d_A_log, *d_skip, *d_dt_bias;
    real* d_initial_state;  // overwritten; or null
};
// A selective scan in a closed loop (Conba). States of a channel: h (N), gain k, pending gradient p, outputs y of the last `tau` steps, the
// newest first: all that plant.initial_state (B, D, states()) and its gradient have.
struct ClosedLoop {
    Scan plant;
    const real* gain;           // (D) k_0, or null: no control
    const real* delay;          // (D) delta, or null: none
    const real *zeta, *gamma;   // (D, N) of scaling, or null: none
    const real* output_noise;   // (D) nu, or null: none
    real state_noise;           // sigma
    uint64_t noise_seed;        // of this layer in this step of training; 0: no noise at all
    real alpha, kappa, eps;     // adaptation of k: rate (0: none), bound, width in which |e| is smooth
    int tau;                    // 1 to kMaxDelay
    int states() const { return plant.N + 2 + tau; }
};
struct ClosedLoopGradients {
    ScanGradients plant;
    real *d_gain, *d_delay, *d_zeta, *d_gamma, *d_output_noise;  // null where what they are gradients of is
};
struct Rotary {
    const floatX* in;  // (B, T, heads, S) with ld_in
    int ld_in;
    int B, T, heads, S;  // S even
    int64_t position;    // of the first of the T tokens
    double base;         // 0: nothing turns, it is a copy
};
struct Attention {       // head h reads the keys and values of head h / (H / G)
    const floatX *q;     // (B, T, H, S) with ld_q
    const floatX *k, *v; // (B, past + T, G, S) with ld_kv, and from one sequence to the next stride_kv elements
    int ld_q, ld_kv;     // multiples of 8 elements, as S and stride_kv are; q, k, v and what is like them begin at multiples of 16 bytes
    int64_t stride_kv;
    int B, T, H, G, S;   // G divides H; S <= kMaxHeadSize
    int64_t past;        // keys before that of the first query
    int64_t keys() const { return past + T; }
};
struct Router {
    const floatX* x;     // (rows, C)
    const real* weight;  // (E, C)
    int rows, C, E, K;   // E <= kMaxExperts; K = 0: the experts choose. Then Routing's experts and gates are not used: gates are the
                         // probs, d_gates (rows, E)
    bool renormalize;    // divide the K gates by their sum
};
struct Routing {  // what the router gives
    real *probs, *lse;  // (rows, E), (rows) logsumexp of the logits
    int* experts;       // (rows, K), the most probable first
    real* gates;        // (rows, K)
};
// Where the rows go. A choice is a pair row * K + k; a slot is a row of the experts' input. Slots of expert e start at offset[e].
// capacity > 0: offset[e] = e * capacity, first come first served; a choice that finds its expert full is dropped.
// capacity = 0: nothing is dropped, offset is the running sum of load.
struct Dispatch {
    int *slot, *choice;  // (rows, K), -1 if dropped; (slots), -1 if empty
    int *load, *offset;  // (E) choices of each expert, before dropping; (E+1)
    // Expert Choice: K = E, and choice row * E + e is taken if expert e has chosen the row.
    int rows, E, K, capacity;
    int slots() const { return int(slots(rows, E, K, capacity)); }
    static int64_t slots(int64_t rows, int E, int K, int capacity) { return capacity > 0 ? int64_t(E) * capacity : rows * K; }
};
// out[s] = in[s] W_e^T for the slots s of expert e. With a capacity, empty slots of `in` are zero and those of `out` become zero.
struct Experts {
    const floatX* in;      // (slots, I)
    const floatX* weight;  // (E, O, I)
    Dispatch to;
    // (E+1) to.offset, read back to the host: without it a device cannot start a product for each expert. Null with a capacity, and for
    // at most kFewSlots slots without one: then each expert's weights are found on the device, and nobody waits.
    const int* host_offset;
    int I, O;
};
inline constexpr int kFewSlots = 64;
struct AdamW {
    double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.1, grad_clip = 0.5;
};

// ------------------------------------------------------------------------------------------------------------------
// The table of layer functions: one declaration each, three implementations (namespace plain, cpu, gpu).
// Argument order: outputs, inputs, scratch, sizes, stream. Pointers are device pointers of that table's device.
//  - d_x is the gradient of x. Gradients of parameters (real) are added to, gradients of activations are overwritten, unless the
//    function has a flag: `accumulate` for its output, `add_weight` for a matrix's gradient.
//  - "or null" arguments may be nullptr; outputs never overlap inputs unless it says so. With B, T, rows or a count of 0 nothing is written,
//    not even a gradient that would be overwritten; but there is a dispatch_plan of no rows.
//  - scratch: contents undefined before and after, shared by all calls on one stream. X_scratch() says how many bytes X_forward and
//    X_backward need at most, for these sizes and for any smaller B, T or rows.
//  - Every function is deterministic: same inputs, same sizes, same device: same bits.
struct Layers {
    const char* device;  // "plain", "cpu", "cuda" or "simt"
    std::string (*machine)();  // what the bits depend on besides inputs and sizes: device, threads, versions

    // -------- memory
    cudaStream_t (*open)();  // the stream that the Model works on; takes whatever a device needs beside the memory below
    void* (*allocate)(size_t bytes, const char* name);       // contents undefined; fails with name and size
    void (*release)(void* memory);                           // null is fine
    void* (*allocate_host)(size_t bytes, const char* name);  // on the host, for upload_later
    void (*release_host)(void* memory);                      // null is fine
    void (*zero)(void* memory, size_t bytes, cudaStream_t stream);
    void (*upload)(void* to_device, const void* from_host, size_t bytes, cudaStream_t stream);  // returns when from_host has been read
    // Returns at once: from_host, of allocate_host, must stay as it is until the next synchronize() or download().
    void (*upload_later)(void* to_device, const void* from_host, size_t bytes, cudaStream_t stream);
    void (*download)(void* to_host, const void* from_device, size_t bytes, cudaStream_t stream);  // returns when done
    void (*copy)(void* to, const void* from, size_t bytes, cudaStream_t stream);  // both on the device; they do not overlap
    void (*synchronize)(cudaStream_t stream);

    // -------- linear, no bias:  out = in W^T (+ out if accumulate);  out (rows, O) with ld_out
    void (*linear_forward)(floatX* out, int ld_out, const Linear& l, bool accumulate, cudaStream_t stream);
    // d_in = d_out W (+ d_in if accumulate), or null;  d_weight = d_out^T in (+ d_weight if add_weight)
    void (*linear_backward)(floatX* d_in, int ld_d_in, real* d_weight, const floatX* d_out, int ld_d_out, const Linear& l,
                            bool accumulate, bool add_weight, cudaStream_t stream);

    // -------- activations
    // SwiGLU:  out = silu(gate) * up;  gate_up (rows, 2F) = [gate | up];  out (rows, F)
    void (*swiglu_forward)(floatX* out, const floatX* gate_up, int rows, int F, cudaStream_t stream);
    void (*swiglu_backward)(floatX* d_gate_up, const floatX* d_out, const floatX* gate_up, int rows, int F, cudaStream_t stream);
    // ReLU:  out may be in; d_in may be d_out; `in` of the backward pass may be forward's in or out, which have the same signs
    void (*relu_forward)(floatX* out, const floatX* in, int64_t count, cudaStream_t stream);
    void (*relu_backward)(floatX* d_in, const floatX* d_out, const floatX* in, int64_t count, cudaStream_t stream);

    // -------- RMSNorm fused with the residual add:  x = residual + branch;  out = x * rstd * weight,  rstd = 1/sqrt(mean(x^2) + eps)
    // out (rows, C); sum (rows, C) = x; rstd (rows); residual (rows, C); branch (rows, C) or null; weight (C). sum may be residual.
    void (*rmsnorm_forward)(floatX* out, real* sum, real* rstd, const real* residual, const floatX* branch, const real* weight, int rows,
                            int C, real eps, cudaStream_t stream);
    // d_sum (rows, C): in, the gradient reaching x from later steps; out, that plus the norm's own; d_branch: the same, as floatX, or null.
    void (*rmsnorm_backward)(real* d_sum, floatX* d_branch, real* d_weight, const floatX* d_out, const real* sum, const real* rstd,
                             const real* weight, void* scratch, int rows, int C, cudaStream_t stream);
    size_t (*rmsnorm_scratch)(int rows, int C);

    // -------- RMSNorm of slices of rows:  out = in * rstd * weight;  out (rows, C) with ld_out, d_in with ld_in; d_in may be d_out
    void (*slice_norm_forward)(floatX* out, int ld_out, const SliceNorm& n, cudaStream_t stream);
    void (*slice_norm_backward)(floatX* d_in, real* d_weight, const floatX* d_out, int ld_d_out, const SliceNorm& n, void* scratch,
                                cudaStream_t stream);  // scratch: rmsnorm_scratch

    // -------- embedding:  out[r] = table[tokens[r]]
    // out (rows, C) real, the residual stream; tokens (rows), all in [0, V); table (V, C)
    void (*embedding_forward)(real* out, const int* tokens, const floatX* table, int rows, int C, cudaStream_t stream);
    // Sums the rows of each token in a fixed order (on a GPU: a stable sort by token, then one sum per run).
    void (*embedding_backward)(real* d_table, const real* d_out, const int* tokens, void* scratch, int rows, int V, int C,
                               cudaStream_t stream);
    size_t (*embedding_scratch)(int rows);

    // -------- causal depthwise convolution and SiLU:  a[t] = bias + sum_w weight[w] in[t - (W-1) + w];  out = a * sigmoid(a)
    // out (B, T, D); final_state as initial_state, or null
    void (*conv_forward)(floatX* out, real* final_state, const Conv& c, cudaStream_t stream);
    void (*conv_backward)(const ConvGradients& d, const floatX* d_out, const real* d_final_state, const Conv& c, void* scratch,
                          cudaStream_t stream);  // d_final_state or null
    size_t (*conv_scratch)(int B, int T, int D, int W);

    // -------- selective scan (arXiv 2312.00752, section 3):  per channel d, over time t, with h (N) the state
    //   delta = softplus(dt + dt_bias) (threshold 20);  A = -exp(A_log);  h_t = exp(delta A) h_{t-1} + delta u B_t
    //   y = C_t . h_t + skip u;  out = y * silu(z)
    // out (B, T, D); final_state (B, D, N) or null; chunk_states (B, scan_chunks(T), D, N): the state before each chunk, for the
    // backward pass, or null.
    void (*scan_forward)(floatX* out, real* final_state, real* chunk_states, const Scan& s, void* scratch, cudaStream_t stream);
    // d_dt is the gradient of dt before the bias; d_final_state or null. s.initial_state is not read: chunk_states has it.
    void (*scan_backward)(const ScanGradients& d, const floatX* d_out, const real* d_final_state, const Scan& s, const real* chunk_states,
                          void* scratch, cudaStream_t stream);
    size_t (*scan_scratch)(int B, int T, int D, int N);

    // -------- selective scan in a closed loop (Conba; after MixCon, doi 10.3233/FAIA240593), per channel, over time:
    //   e_t = y_{t-1} - u_t;  k_t = clip(k_{t-1} + alpha s(e_t) p_{t-1}, -kappa, kappa),  s(e) = e / sqrt(e^2 + eps^2),  k_{-1} = k_0 + state
    //   v_t = u_t + rho_t (delta y_{t-tau} - k_t e_t),  rho_t = 1 / ((1/a + dt_t) |B_t| |C_t|),  a = min_n |A_n|
    //   h_t = exp(dt_t A) h_{t-1} + dt_t v_t B_t + sigma w_t;  p_t = dt_t rho_t (C_t . B_t) e_t
    //   y_t = sum_n C_{t,n} r_n h_{t,n} + skip u_t + nu n_t,  r_n = silu(zeta_n h_{t,n} + gamma_n);  out_t = y_t silu(z_t)
    // rho keeps the loop from ringing: what |k| = 1 feeds back moves h by dt rho |B| |C| |h| at most, and since 1 - exp(-x) > x / (1 + x)
    // that is less than (1 - exp(-a dt)) |h|, what h loses. So for r = 1, C_t of one length and |k| + |delta| < 1 the loop contracts.
    // Shapes as of the scan; final_state (B, D, states()), chunk_states (B, loop_chunks(T), D, states()), in which k has k_0 in it.
    void (*closed_loop_forward)(floatX* out, real* final_state, real* chunk_states, const ClosedLoop& c, void* scratch, cudaStream_t stream);
    void (*closed_loop_backward)(const ClosedLoopGradients& d, const floatX* d_out, const real* d_final_state, const ClosedLoop& c,
                                 const real* chunk_states, void* scratch, cudaStream_t stream);
    size_t (*closed_loop_scratch)(int B, int T, int D, int N, int tau);

    // -------- rotary positions (RoPE, arXiv 2104.09864):  in every head the pair (x[i], x[i + S/2]) turns by (position + t) base^(-2i/S)
    // out (B, T, heads, S) with ld_out, and from one sequence to the next stride_out elements; it may be in, at the same rows. back: turns
    // the other way, which is the backward pass.
    void (*rotate)(floatX* out, int ld_out, int64_t stride_out, const Rotary& r, bool back, cudaStream_t stream);

    // -------- causal attention (arXiv 1706.03762), grouped queries (2305.13245):
    //   p_j = softmax over j <= past + t of (q_t . k_j) / sqrt(S);  out_t = sum_j p_j v_j
    // out (B, T, H, S); lse (B * T, H), for the backward pass: logsumexp of the scores; or null
    void (*attention_forward)(floatX* out, real* lse, const Attention& a, void* scratch, cudaStream_t stream);
    // past = 0. d_q, d_k, d_v lie as q, k, v do.
    void (*attention_backward)(floatX* d_q, floatX* d_k, floatX* d_v, const floatX* d_out, const floatX* out, const real* lse,
                               const Attention& a, void* scratch, cudaStream_t stream);
    size_t (*attention_scratch)(int B, int T, int H, int S);  // whatever the past

    // -------- router (Switch, arXiv 2101.03961):  p = softmax(x W^T);  the K largest, ties to the lower expert;  gate = p, or p / sum of K
    void (*router_forward)(const Routing& out, const Router& r, void* scratch, cudaStream_t stream);
    // losses[0] += E sum_e f_e mean(p_e), f_e = load[e] / rows;  losses[1] += mean(lse^2).  scratch: kSumScratch
    void (*router_losses)(real* losses, const real* probs, const real* lse, const int* load, void* scratch, int rows, int E,
                          cudaStream_t stream);
    // Through gates, softmax, and both losses times their weights.  d_x += ...;  d_gates (rows, K), of dropped choices: 0
    void (*router_backward)(floatX* d_x, real* d_weight, const real* d_gates, const Routing& out, const int* load, const Router& r,
                            real balance_weight, real z_weight, void* scratch, cudaStream_t stream);
    size_t (*router_scratch)(int rows, int C, int E);

    // -------- dispatch: rows to the experts that they chose, and back
    void (*dispatch_plan)(const Dispatch& to, const int* experts, void* scratch, cudaStream_t stream);  // all four arrays of `to`
    size_t (*dispatch_scratch)(int64_t choices);
    // Expert Choice (arXiv 2202.09368): the same four arrays. Expert e takes the `capacity` rows (1 to rows) of largest probs[:, e], ties
    // to the earlier row; its slots are in the order of the rows. probs (rows, E)
    void (*expert_choice_plan)(const Dispatch& to, const real* probs, cudaStream_t stream);
    // out (slots, C): out[s] = x[choice[s] / K], or 0 for an empty slot
    void (*dispatch_forward)(floatX* out, const floatX* x, const Dispatch& to, int C, cudaStream_t stream);
    // d_x (rows, C): d_x[r] = sum_k d_out[slot[r, k]] (+ d_x if accumulate)
    void (*dispatch_backward)(floatX* d_x, const floatX* d_out, const Dispatch& to, int C, bool accumulate, cudaStream_t stream);
    // out (rows, C): out[r] = sum_k gates[r, k] y[slot[r, k]] (+ out if accumulate); dropped choices add nothing; y (slots, C)
    void (*combine_forward)(floatX* out, const floatX* y, const real* gates, const Dispatch& to, int C, bool accumulate,
                            cudaStream_t stream);
    // d_y[s] = gate * d_out[row], 0 for an empty slot;  d_gates[r, k] = d_out[r] . y[slot[r, k]], 0 if dropped
    void (*combine_backward)(floatX* d_y, real* d_gates, const floatX* d_out, const floatX* y, const real* gates, const Dispatch& to, int C,
                             cudaStream_t stream);

    // -------- experts: linear with a weight per expert; out (slots, O)
    void (*experts_forward)(floatX* out, const Experts& e, cudaStream_t stream);
    // d_in (slots, I), overwritten;  d_weight (E, O, I) = sums over each expert's slots (+ d_weight if add_weight)
    void (*experts_backward)(floatX* d_in, real* d_weight, const floatX* d_out, const Experts& e, bool add_weight, cudaStream_t stream);

    // -------- classifier fused with softmax and cross-entropy, in place
    // losses (rows) = logsumexp(logits[r, :V]) - logits[r, target];  logits (rows, ld) become d_loss * (softmax - onehot), 0 past V,
    // or stay as they are if d_loss == 0. A target of -1 is ignored: loss and gradient 0. V <= ld.
    void (*classifier)(real* losses, floatX* logits, const int* targets, int rows, int V, int ld, real d_loss, cudaStream_t stream);
    // probs (rows, V) = softmax(logits[:, :V] / temperature): for sampling
    void (*softmax_forward)(real* probs, const floatX* logits, int rows, int V, int ld, real temperature, cudaStream_t stream);

    // -------- reductions and the optimizer.  scratch: kSumScratch
    void (*sum)(real* out, const real* in, void* scratch, int64_t count, cudaStream_t stream);                // out[0] += sum of in
    void (*sum_of_squares)(real* out, const real* in, void* scratch, int64_t count, cudaStream_t stream);     // out[0] += sum of in^2
    // AdamW (arXiv 1711.05101), g = grad_scale * grad, bias-corrected by `step` (from 1):  m, v as usual;
    // master -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * master);  weight = floatX(master), or null.  o.grad_clip is not read.
    void (*adamw)(real* master, floatX* weight, real* m, real* v, const real* grad, int64_t count, const AdamW& o, real grad_scale,
                  int step, cudaStream_t stream);
};
inline constexpr size_t kSumScratch = 16 << 10;  // bytes, for any count
namespace plain { extern const Layers layers; }
namespace cpu { extern const Layers layers; }
namespace gpu { extern const Layers layers; }
// "auto" = a GPU that can run this build, or else "cpu", saying so where a GPU was to be expected; fails with what is wrong.
const Layers& find_device(const std::string& name);

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
    bool borrowed = false;

    explicit Arena(std::string name) : name(std::move(name)) {}
    Arena(const Arena&) = delete;
    ~Arena() { release(); }
    template <class T>
    void add(T** pointer, const std::string& tensor, int64_t count) {
        add_bytes(reinterpret_cast<void**>(pointer), tensor, size_t(count) * sizeof(T));
    }
    void rewind(size_t mark) { top = mark; }  // what is added next shares memory with what was added since the mark
    // One allocation, or none where another arena, whose contents are dead by then, has room; binds.
    void allocate(const Layers& on, const Arena* lender = nullptr);
    void bind() const;  // sets every entry's pointer
    void release();     // forgets the entries too

   private:
    void add_bytes(void** pointer, const std::string& tensor, size_t size);
};

// ------------------------------------------------------------------------------------------------------------------
// Parameters: each is named, sized and described once, by the layer that has it; initialisation, weight decay, optimizer, checkpoints
// and tests read the list. A Tensor is what layer functions and the optimizer see. A Parameter is what a checkpoint names: a whole
// Tensor, or a part of one, where gate and up projections, or the matrices of all experts, lie in one block for one product.
enum class Init { constant, uniform, normal, log_state, dt_bias };  // scale is the constant, the most, the deviation; see initialize()
struct Tensor {
    std::string name;
    int64_t count = 0;
    Init init = Init::constant;
    double scale = 0;
    // By AdamW: with weight decay, of matrices that are used as `weight` and of what is used as `master`; without; or only saved and loaded.
    enum Update { matrix, decayed, plain, never } update = plain;
    int64_t at = 0;            // its first element in each of the model's arenas
    real* master = nullptr;    // what the optimizer updates; small parameters are used in this form. Null of a matrix that is not trained
    floatX* weight = nullptr;  // what matrix products read: master rounded to floatX, or master itself where they are one type. Of a matrix
    real *grad = nullptr, *m = nullptr, *v = nullptr;
};
struct Parameter {
    std::string name;
    std::vector<int64_t> shape;
    Tensor* tensor;
    int64_t offset, count;  // elements of the tensor
};

// ------------------------------------------------------------------------------------------------------------------
// A layer is the f of a step x += f(norm(x)). Each kind is one struct in moemamba.cu with all that is its own; the Model only loops.
struct Gains {
    std::string layer;  // that its parameters' names begin with
    double mean, largest;
};
struct Losses {               // of one optimizer step: means over its accumulation parts
    double cross_entropy = 0;  // nats per token
    double balance = 0, z = 0;  // mean over the layers with experts, unweighted
    double grad_norm = 0;
    double expert_load = 0, dropped = 0;  // fullest expert over the mean, worst layer and part; share of choices dropped
    std::vector<Gains> gains;  // of every layer with control: |k| at the ends of the last part's sequences
};
struct Pass {  // one way through the model, forward or backward
    int B, T;
    bool training = false;
    int part = 0, parts = 1;  // training: which of so many parts of a step, whose gradients add up
    uint64_t noise = 0;       // training: seed of this part's noise; 0: none
    int state = -1;           // decoding: layers read their state [state] and write the other, [1 - state]
    int64_t position = 0;     // decoding: tokens that each sequence has behind it
    int64_t context = 0;      // decoding: tokens that the state has room for
    int rows() const { return B * T; }
};
struct Plan {  // memory for such passes, of at most B sequences of T tokens
    Arena& arena;
    int B, T;
    bool training;
    size_t scratch = 0;  // the most that a function of the passes needs
    int64_t rows() const { return int64_t(B) * T; }
    void need(size_t bytes) { scratch = std::max(scratch, bytes); }
};
struct Model;
struct Layer {
    Model& model;
    const std::string name;  // that its parameters' names begin with

    Layer(Model& model, const std::string& name) : model(model), name(name) {}  // and lists the parameters: see Model::add
    virtual ~Layer() = default;
    virtual void add_optional() {}  // lists parameters that a flag adds: after all others, which are then drawn alike with and without them
    virtual void plan_activations(Plan& plan) = 0;                      // what forward leaves behind for backward
    virtual void plan_gradients(Plan& plan) = 0;                        // what only backward uses: one memory for all layers
    virtual void plan_state(Arena&, int /*B*/, int64_t /*context*/) {}  // what decoding carries over, for so many tokens in all
    // Reads normed (rows, C); out (rows, C) = f(normed) (+ out if accumulate).
    virtual void forward(const Pass& pass, const floatX* normed, floatX* out, bool accumulate) = 0;
    // d_normed (rows, C) = gradient of normed (+ d_normed if accumulate), and the parameters' gradients.
    virtual void backward(const Pass& pass, floatX* d_normed, const floatX* d_out, const floatX* normed, bool accumulate) = 0;
    virtual int64_t products(int T) const = 0;             // a token's multiply-adds in matrix products, the mean over T of them
    virtual int64_t idle_parameters() const { return 0; }  // that a token does not use
    virtual int64_t cache_elements() const { return 0; }   // of floatX, that a token of context takes while decoding
    virtual int counters() const { return 0; }             // ints that a training pass leaves for report()
    // Adds to the report of a step what one part of it has left, of so many rows; `share`: of the part in the step
    virtual void report(Losses&, const int* /*counters*/, int /*rows*/, double /*share*/) const {}
    virtual std::vector<real> gains(int /*B*/) const { return {}; }  // (B, D) at the ends of the sequences of the last training pass
    int first_counter = 0;                                          // among all layers'
};
struct Step {  // x += sum of its layers' f(norm(x)); the last one has no layers: the norm before the head
    Tensor norm;
    std::vector<std::unique_ptr<Layer>> layers;
    real *sum, *rstd;  // (rows, C) the residual stream before the norm; (rows)
    floatX* normed;    // (rows, C)
};

// What decoding carries from one call to the next, for B sequences of at most `context` tokens. start() registers what the layers need.
struct DecodeState {
    int B = 0;
    int64_t context = 0, position = 0;  // tokens that there is room for; that have been decoded
    int current = 0;
    Arena arena{"decode state"};
};

struct ModelFiles;
struct Model {
    Config config;
    const Layers& layers;
    cudaStream_t stream = nullptr;
    std::vector<Parameter> parameters;
    bool trains = true;  // false, before weights are allocated: of matrices only what products read is kept

    Model(const Config& config, const Layers& layers);  // resolves config, lists the parameters, allocates nothing
    ~Model();
    Model(const Model&) = delete;
    int64_t parameter_count() const;
    int64_t active_parameter_count() const;  // per token: K of E experts
    int64_t outer_parameter_count() const;   // of embedding and head, which papers leave out of both counts
    int64_t read_parameter_count() const;    // by a token that is decoded: of an embedding that is not also the head, one row
    double matmul_flops_per_token(int T, bool training) const;  // in sequences of T; multiply and add are two; training = forward + backward
    void initialize(uint64_t seed);          // allocates the weights and draws them

    // ---- training: plan_training() only computes sizes; allocate_training() takes the memory, that of evaluate(B, T) included.
    void plan_training(int B, int T, int accumulation = 1);
    void allocate_training(int B, int T, int accumulation = 1);
    // One of `accumulation` equal parts of a step: gradients of mean cross-entropy + weighted auxiliary losses are added to grad.
    // tokens, targets (B, T) on the host, where they may change afterwards; a target of -1 is ignored. Returns while the device computes:
    // it waits for nothing but the counts of E layers without capacity.
    void forward_backward(const int* tokens, const int* targets, int accumulation);
    void zero_gradients();
    uint64_t noise_seed = 0;            // of a step's noise, where the config has noise: to be set before each step; 0: none
    Losses read_losses();               // waits; losses and gradient norm since the last zero_gradients()
    // The first with a NaN or infinity, or whose squares overflow: of the weights, of the residual stream on its way up, of the gradients
    // on theirs down; if there is none, the largest gradient.
    std::string first_bad_tensor();
    void update(const AdamW& optimizer, const Losses& losses, int step);  // step counts from 1
    double evaluate(const int* tokens, const int* targets, int B, int T);  // mean cross-entropy; no token is dropped
    std::vector<real> token_losses(const int* tokens, const int* targets, int B, int T);  // (B, T), the same for each; of target -1: 0

    // ---- decoding: T tokens of each of the state's B sequences; T = the prompt, a part of it, or 1. No token is dropped.
    void start(DecodeState& state, int B, int64_t context);  // takes the memory, unless it has it from an earlier start
    void copy_state(DecodeState& to, const DecodeState& from);  // each sequence of `to` goes on after what `from`, of one sequence, has read
    // probabilities of the next token at this temperature (0: as 1), (B, V) on the host, valid until the next call
    const real* decode(DecodeState& state, const int* tokens, int T, real temperature);
    std::vector<real> logits(const int* tokens, int B, int T);  // (B, T, V), for tests and small inputs
    struct StateBytes {
        double cache, recurrent;  // cache: of numbers with so many bits
    };
    StateBytes decode_state_bytes(int64_t context, int bits);  // per sequence

    // ---- checkpoints: safetensors; metadata holds "config" and whatever the caller adds. Weights have the names and shapes that Hugging Face's
    // transformers gives them, if it has such a model, without the rows that pad the vocabulary.
    using Metadata = Safetensors::Metadata;
    void save(const std::string& path, const Metadata& metadata) const;            // master weights
    void save_optimizer(const std::string& path, const Metadata& metadata) const;  // m and v
    void save_config(const std::string& directory, const Tokenizer& tokenizer) const;  // what else transformers reads: config.json, tokenizer.json
    void load(const ModelFiles& files);            // allocates the weights if need be; fails on any missing, extra or misshapen tensor
    void load_optimizer(const std::string& path);  // after allocate_training

    // ---- for layers, as they are constructed: a tensor that checkpoints know under one name; or one that they know in parts,
    // and its next part (rows, columns)
    void add(Tensor& t, const std::string& name, std::vector<int64_t> shape, Init init, double scale, Tensor::Update update);
    void add_block(Tensor& t, const std::string& name, int64_t count, Init init, double scale, Tensor::Update update);
    void add_part(Tensor& t, const std::string& name, int64_t rows, int64_t columns);

    // ---- what the above is made of
    Arena weights{"weights"}, masters{"master weights"}, gradients{"gradients"}, moments{"optimizer"}, activations{"activations"},
        inference{"validation and sampling"};
    std::vector<std::unique_ptr<Step>> steps;
    int additions = 0;             // layers whose outputs are added to the residual stream
    int expert_layers = 0;         // layers that add to the auxiliary losses
    Tensor embedding, head_table;
    Tensor* head;                  // &embedding if tied
    std::vector<Tensor*> tensors;  // all of them, in the order of the parameters
    int64_t ends[4] = {};          // in the arenas, of the tensors with each kind of update
    enum { kCrossEntropy, kBalance, kZ, kGradSquares, kLossCount };
    struct Buffers {                // shared by all layers
        real *master, *grad, *m, *v;  // all tensors
        floatX* weight;
        real *losses;               // (kLossCount), sums over a step, behind the gradients
        int *tokens, *targets;      // (rows)
        real *row_losses, *evaluated;  // (rows); (1)
        int* counters;              // (accumulation, counters of all layers)
        floatX *branch, *logits;    // (rows, C) the current step's output; (head_rows, Vp)
        real* probs;                // (B, V)
        char* scratch;
        real* d_sum;                    // (rows, C) gradient of the residual stream
        floatX *d_branch, *d_normed;    // (rows, C)
    } buffers{};
    int batch = 0, time = 0;                       // of training
    int inference_batch = 0, inference_time = 0;   // what the inference arena has room for
    int planned_parts = 1;                         // accumulation parts that buffers.counters and staging have room for
    int counters = 0;                              // of all layers
    int* staging = nullptr;                        // (staging_count) on the host: tokens and targets, from where they are uploaded
    int64_t staging_count = 0, staged = 0;         // of them, those that the device may not have read yet
    int parts = 0;                                 // accumulation parts and targets since zero_gradients()
    int64_t targets_seen = 0;
    std::vector<real> probabilities;

    bool of_vocabulary(const Parameter& p) const { return p.tensor == &embedding || p.tensor == &head_table; }  // a row for each token
    int64_t first_master() const;  // of the elements of all tensors
    void plan_tensors();
    void allocate_weights();
    void plan_activations(Arena& arena, int B, int T, bool training);
    void begin_inference(int B, int T);
    void begin_evaluation(const int* tokens, const int* targets, int B, int T);
    void reserve_staging(int64_t count);
    void stage(int* to_device, const int* from, int count);
    void forward(const Pass& pass, const int* tokens, const int* targets);
    int head_rows() const;
    template <class F> void head_blocks(const floatX* normed, int ld_normed, int rows, F&& each);
    template <class F> void cross_entropy(real* sum, int rows, real d_loss, F&& each);
};

// A model on disk: a checkpoint of train, or a directory of Hugging Face's transformers with its config.json.
struct ModelFiles {
    const Safetensors weights;
    Config config;
    std::vector<int> end_of_text;                  // tokens that config.json names
    explicit ModelFiles(const std::string& path);  // model.safetensors, or its index, or the directory that either is in
    Tokenizer tokenizer() const;                   // fails if there is none, or none that is known
    bool ours() const { return !weights.meta("config", "").empty(); }

   private:
    bool conv_bias = true;  // false: Mamba's convolutions have none
    std::string note;       // what of config.json is not used
    friend struct Model;
};

// Draws an index from probabilities: the top_k largest (0 = all), of those the fewest that reach top_p, by u in [0, 1).
// greedy: the largest, ties to the lower index.
int sample_token(const real* probs, int V, bool greedy, int top_k, double top_p, double u);

// Reads the prompt once, then draws so many texts side by side, of up to `count` tokens each, and hands each token to emit(text, token),
// until every text has met its end-of-text or `emit` returns false. Text i is sample number sample + i of the seed: to rounding it does
// not depend on which others are drawn with it. An empty prompt starts from end-of-text: that is what a new document follows in
// training, and there has to be something to predict from. Memory, for all of the texts, is taken first.
struct Sampling {
    double temperature = 0.8, top_p = 1.0;  // temperature 0: always the most probable token
    int top_k = 0;                          // 0: all
    uint64_t seed = 0;
};
void generate(Model& model, DecodeState& state, const Tokenizer& tokenizer, std::vector<int> prompt, int64_t count,
              const Sampling& sampling, int64_t sample, int texts, const std::function<bool(int, int)>& emit);
