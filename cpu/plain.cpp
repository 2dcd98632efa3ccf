// The specification: what every layer computes, forward and backward, in the fewest plain loops that say it. The functions of
// `struct Layers`, in its order; cpu/layers.cpp and the kernels in moemamba.cu compute the same faster, and are held against these.
//
// How to read it: shape letters and arguments are in moemamba.h; the equations of a function stand above its loops, which do what they
// say. d_x is the derivative of the loss by x. A backward pass is the chain rule: each place where a number was used adds to its d_.
// floatX is how numbers lie in memory, real is how they are computed with: a sum is kept in real and rounded once, as it is stored.
//
// Slow on purpose: no vectors, no threads, no blocks, nothing that must be undone in the mind before the layer can be seen.
#include "../moemamba.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

namespace plain {
namespace {

real sigmoid(real x) { return 1 / (1 + std::exp(-x)); }

// log(1 + e^x), which from 20 on is x to all digits of a float; log1p keeps the digits where e^x is tiny. Its derivative is sigmoid(x).
real softplus(real x) { return x > 20 ? x : std::log1p(std::exp(x)); }
real d_softplus(real x) { return x > 20 ? 1 : sigmoid(x); }

// silu(x) = x sigmoid(x)  and, as sigmoid' = sigmoid (1 - sigmoid):  silu'(x) = sigmoid(x) (1 + x (1 - sigmoid(x)))
real silu(real x) { return x * sigmoid(x); }
real d_silu(real x) { return sigmoid(x) * (1 + x * (1 - sigmoid(x))); }

// ------------------------------------------------------------------------------------------------------------------
// Memory: the device is the host, so that a copy is a copy and nothing is ever waited for.
std::string machine() { return std::string("plain in ") + kPrecision; }

cudaStream_t open() { return nullptr; }
void* allocate(size_t bytes, const char* name) {
    void* memory = std::malloc(bytes > 0 ? bytes : 1);
    if (!memory) fail("cannot allocate %zu bytes for %s: out of memory", bytes, name);
    return memory;
}
void release(void* memory) { std::free(memory); }
void zero(void* memory, size_t bytes, cudaStream_t) {
    if (bytes > 0) std::memset(memory, 0, bytes);
}
void copy(void* to, const void* from, size_t bytes, cudaStream_t) {
    if (bytes > 0) std::memcpy(to, from, bytes);
}
void synchronize(cudaStream_t) {}

// No function here needs memory beside its arguments and a few local variables.
template <class... Sizes>
size_t no_scratch(Sizes...) { return 0; }

// ------------------------------------------------------------------------------------------------------------------
// Linear
//   out[r, o] = sum_i in[r, i] weight[o, i]
void linear_forward(floatX* out, int ld_out, const Linear& l, bool accumulate, cudaStream_t) {
    for (int64_t r = 0; r < l.rows; r++)
        for (int64_t o = 0; o < l.O; o++) {
            real sum = accumulate ? real(out[r * ld_out + o]) : 0;
            for (int64_t i = 0; i < l.I; i++) sum += real(l.in[r * l.ld_in + i]) * real(l.weight[o * l.I + i]);
            out[r * ld_out + o] = floatX(sum);
        }
}
// in[r, i] is used by every output of its row, weight[o, i] by every row:
//   d_in[r, i] = sum_o d_out[r, o] weight[o, i]
//   d_weight[o, i] = sum_r d_out[r, o] in[r, i]
void linear_backward(floatX* d_in, int ld_d_in, real* d_weight, const floatX* d_out, int ld_d_out, const Linear& l, bool accumulate,
                     bool add_weight, cudaStream_t) {
    if (l.rows == 0) return;
    for (int64_t r = 0; d_in && r < l.rows; r++)
        for (int64_t i = 0; i < l.I; i++) {
            real sum = accumulate ? real(d_in[r * ld_d_in + i]) : 0;
            for (int64_t o = 0; o < l.O; o++) sum += real(d_out[r * ld_d_out + o]) * real(l.weight[o * l.I + i]);
            d_in[r * ld_d_in + i] = floatX(sum);
        }
    for (int64_t o = 0; o < l.O; o++)
        for (int64_t i = 0; i < l.I; i++) {
            real sum = add_weight ? d_weight[o * l.I + i] : 0;
            for (int64_t r = 0; r < l.rows; r++) sum += real(d_out[r * ld_d_out + o]) * real(l.in[r * l.ld_in + i]);
            d_weight[o * l.I + i] = sum;
        }
}

// ------------------------------------------------------------------------------------------------------------------
// Activations
//   out = silu(gate) up;  gate and up are the halves of a row
void swiglu_forward(floatX* out, const floatX* gate_up, int rows, int F, cudaStream_t) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t f = 0; f < F; f++) {
            const real gate = real(gate_up[r * 2 * F + f]), up = real(gate_up[r * 2 * F + F + f]);
            out[r * F + f] = floatX(silu(gate) * up);
        }
}
//   d_gate = d_out silu'(gate) up;  d_up = d_out silu(gate)
void swiglu_backward(floatX* d_gate_up, const floatX* d_out, const floatX* gate_up, int rows, int F, cudaStream_t) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t f = 0; f < F; f++) {
            const real gate = real(gate_up[r * 2 * F + f]), up = real(gate_up[r * 2 * F + F + f]), d = real(d_out[r * F + f]);
            d_gate_up[r * 2 * F + f] = floatX(d * d_silu(gate) * up);
            d_gate_up[r * 2 * F + F + f] = floatX(d * silu(gate));
        }
}
//   out = max(in, 0).  Nothing compares with a NaN: it is not <= 0, and stays.
void relu_forward(floatX* out, const floatX* in, int64_t count, cudaStream_t) {
    for (int64_t i = 0; i < count; i++) out[i] = floatX(real(in[i]) <= 0 ? real(0) : real(in[i]));
}
//   d_in = d_out where in > 0, else 0
void relu_backward(floatX* d_in, const floatX* d_out, const floatX* in, int64_t count, cudaStream_t) {
    for (int64_t i = 0; i < count; i++) d_in[i] = floatX(real(in[i]) <= 0 ? real(0) : real(d_out[i]));
}

// ------------------------------------------------------------------------------------------------------------------
// RMSNorm fused with the residual add
//   x = residual + branch;  rstd = 1 / sqrt(mean_c(x[c]^2) + eps);  out[c] = x[c] rstd weight[c]
void rmsnorm_forward(floatX* out, real* sum, real* rstd, const real* residual, const floatX* branch, const real* weight, int rows, int C,
                     real eps, cudaStream_t) {
    for (int64_t r = 0; r < rows; r++) {
        real squares = 0;
        for (int64_t c = 0; c < C; c++) {
            const real x = residual[r * C + c] + (branch ? real(branch[r * C + c]) : 0);
            sum[r * C + c] = x;
            squares += x * x;
        }
        rstd[r] = 1 / std::sqrt(squares / C + eps);
        for (int64_t c = 0; c < C; c++) out[r * C + c] = floatX(sum[r * C + c] * rstd[r] * weight[c]);
    }
}
// x[c] is used by its own output, by rstd (drstd/dx[c] = -rstd^3 x[c] / C), and past the norm by the residual stream, which brings d_sum:
//   d_weight[c] = sum_r d_out[c] x[c] rstd
//   d_x[c] = d_sum[c] + rstd (d_out[c] weight[c] - x[c] rstd^2 mean_j(d_out[j] weight[j] x[j]))
// x is a plain sum: d_residual = d_branch = d_x.
void rmsnorm_backward(real* d_sum, floatX* d_branch, real* d_weight, const floatX* d_out, const real* sum, const real* rstd,
                      const real* weight, void*, int rows, int C, cudaStream_t) {
    for (int64_t r = 0; r < rows; r++) {
        real dot = 0;
        for (int64_t c = 0; c < C; c++) dot += real(d_out[r * C + c]) * weight[c] * sum[r * C + c];
        for (int64_t c = 0; c < C; c++) {
            const real x = sum[r * C + c], d = real(d_out[r * C + c]);
            d_weight[c] += d * x * rstd[r];
            d_sum[r * C + c] += rstd[r] * (d * weight[c] - x * rstd[r] * rstd[r] * dot / C);
            if (d_branch) d_branch[r * C + c] = floatX(d_sum[r * C + c]);
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------
// RMSNorm of slices: the same without a residual stream, and rstd is computed again in the backward pass.
real slice_rstd(const SliceNorm& n, int64_t r) {
    real squares = 0;
    for (int64_t c = 0; c < n.C; c++) squares += real(n.in[r * n.ld_in + c]) * real(n.in[r * n.ld_in + c]);
    return 1 / std::sqrt(squares / n.C + n.eps);
}
void slice_norm_forward(floatX* out, int ld_out, const SliceNorm& n, cudaStream_t) {
    for (int64_t r = 0; r < n.rows; r++) {
        const real rstd = slice_rstd(n, r);
        for (int64_t c = 0; c < n.C; c++) out[r * ld_out + c] = floatX(real(n.in[r * n.ld_in + c]) * rstd * n.weight[c]);
    }
}
void slice_norm_backward(floatX* d_in, real* d_weight, const floatX* d_out, int ld_d_out, const SliceNorm& n, void*, cudaStream_t) {
    for (int64_t r = 0; r < n.rows; r++) {
        const real rstd = slice_rstd(n, r);
        real dot = 0;
        for (int64_t c = 0; c < n.C; c++) dot += real(d_out[r * ld_d_out + c]) * n.weight[c] * real(n.in[r * n.ld_in + c]);
        for (int64_t c = 0; c < n.C; c++) {
            const real x = real(n.in[r * n.ld_in + c]), d = real(d_out[r * ld_d_out + c]);
            d_weight[c] += d * x * rstd;
            d_in[r * n.ld_in + c] = floatX(rstd * (d * n.weight[c] - x * rstd * rstd * dot / n.C));
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Embedding
//   out[r] = table[tokens[r]]
void embedding_forward(real* out, const int* tokens, const floatX* table, int rows, int C, cudaStream_t) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < C; c++) out[r * C + c] = real(table[int64_t(tokens[r]) * C + c]);
}
// A token may stand in many rows:
//   d_table[v] += sum over the rows r with tokens[r] = v of d_out[r]
void embedding_backward(real* d_table, const real* d_out, const int* tokens, void*, int rows, int, int C, cudaStream_t) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < C; c++) d_table[int64_t(tokens[r]) * C + c] += d_out[r * C + c];
}

// ------------------------------------------------------------------------------------------------------------------
// Causal depthwise convolution and SiLU. Each channel is on its own. x is its initial state (W-1 inputs) and then its T inputs, so that
// x[W-1 + t] is the input of step t, and the last W-1 of x are the final state, however short T is.
//   a[t] = bias + sum_w weight[w] x[t + w];  out[t] = silu(a[t])
void conv_forward(floatX* out, real* final_state, const Conv& c, cudaStream_t) {
    const int64_t T = c.T, D = c.D, W = c.W;
    if (T == 0) return;
    std::vector<real> x(W - 1 + T);
    for (int64_t b = 0; b < c.B; b++)
        for (int64_t d = 0; d < D; d++) {
            for (int64_t j = 0; j < W - 1; j++) x[j] = c.initial_state ? c.initial_state[(b * (W - 1) + j) * D + d] : 0;
            for (int64_t t = 0; t < T; t++) x[W - 1 + t] = real(c.in[(b * T + t) * c.ld_in + d]);
            for (int64_t t = 0; t < T; t++) {
                real a = c.bias[d];
                for (int64_t w = 0; w < W; w++) a += c.weight[d * W + w] * x[t + w];
                out[(b * T + t) * D + d] = floatX(silu(a));
            }
            for (int64_t j = 0; final_state && j < W - 1; j++) final_state[(b * (W - 1) + j) * D + d] = x[T + j];
        }
}
// a[t] used the bias, every weight, and W values of x, some of which are the final state too:
//   d_a[t] = d_out[t] silu'(a[t]);  d_bias += d_a[t];  d_weight[w] += d_a[t] x[t + w]
//   d_x[t + w] += d_a[t] weight[w],  on top of d_final_state
void conv_backward(const ConvGradients& g, const floatX* d_out, const real* d_final_state, const Conv& c, void*, cudaStream_t) {
    const int64_t T = c.T, D = c.D, W = c.W;
    if (T == 0) return;
    std::vector<real> x(W - 1 + T), d_x(W - 1 + T);
    for (int64_t b = 0; b < c.B; b++)
        for (int64_t d = 0; d < D; d++) {
            for (int64_t j = 0; j < W - 1; j++) x[j] = c.initial_state ? c.initial_state[(b * (W - 1) + j) * D + d] : 0;
            for (int64_t t = 0; t < T; t++) x[W - 1 + t] = real(c.in[(b * T + t) * c.ld_in + d]);
            for (real& d_x_t : d_x) d_x_t = 0;
            for (int64_t j = 0; d_final_state && j < W - 1; j++) d_x[T + j] = d_final_state[(b * (W - 1) + j) * D + d];
            for (int64_t t = 0; t < T; t++) {
                real a = c.bias[d];
                for (int64_t w = 0; w < W; w++) a += c.weight[d * W + w] * x[t + w];
                const real d_a = real(d_out[(b * T + t) * D + d]) * d_silu(a);
                g.d_bias[d] += d_a;
                for (int64_t w = 0; w < W; w++) {
                    g.d_weight[d * W + w] += d_a * x[t + w];
                    d_x[t + w] += d_a * c.weight[d * W + w];
                }
            }
            for (int64_t t = 0; t < T; t++) g.d_in[(b * T + t) * c.ld_in + d] = floatX(d_x[W - 1 + t]);
            for (int64_t j = 0; g.d_initial_state && j < W - 1; j++) g.d_initial_state[(b * (W - 1) + j) * D + d] = d_x[j];
        }
}

// ------------------------------------------------------------------------------------------------------------------
// Selective scan. Each channel d has N states h[n] of its own; B_t and C_t are shared by all channels. A < 0 and delta > 0, so that
// exp(delta A) is between 0 and 1: each step forgets some of the state, and how much depends on the input.
//   delta = softplus(dt + dt_bias);  A[n] = -exp(A_log[n])
//   h_t[n] = exp(delta A[n]) h_{t-1}[n] + delta u B_t[n]
//   y = skip u + sum_n C_t[n] h_t[n];  out = y silu(z)
void scan_forward(floatX* out, real* final_state, real* chunk_states, const Scan& s, void*, cudaStream_t) {
    const int64_t T = s.T, D = s.D, N = s.N;
    if (T == 0) return;
    for (int64_t b = 0; b < s.B; b++)
        for (int64_t d = 0; d < D; d++) {
            real h[kMaxStates] = {};
            for (int64_t n = 0; s.initial_state && n < N; n++) h[n] = s.initial_state[(b * D + d) * N + n];
            for (int64_t t = 0; t < T; t++) {
                const int64_t row = b * T + t, chunk = b * scan_chunks(s.T) + t / kScanChunk;
                if (chunk_states && t % kScanChunk == 0)
                    for (int64_t n = 0; n < N; n++) chunk_states[(chunk * D + d) * N + n] = h[n];
                const real u = real(s.u[row * D + d]), z = real(s.z[row * s.ld_z + d]);
                const real delta = softplus(real(s.dt[row * D + d]) + s.dt_bias[d]);
                real y = s.skip[d] * u;
                for (int64_t n = 0; n < N; n++) {
                    const real A = -std::exp(s.A_log[d * N + n]);
                    h[n] = std::exp(delta * A) * h[n] + delta * u * real(s.B_t[row * s.ld_bc + n]);
                    y += h[n] * real(s.C_t[row * s.ld_bc + n]);
                }
                out[row * D + d] = floatX(y * silu(z));
            }
            for (int64_t n = 0; final_state && n < N; n++) final_state[(b * D + d) * N + n] = h[n];
        }
}
// Backward through time. With a = exp(delta A), of step t, and d_h the gradient of h_t: what step t itself and all later steps add to it.
//   d_y = d_out silu(z);  d_z = d_out y silu'(z);  d_skip += d_y u
//   d_h[n] = d_y C_t[n] + what came from step t+1 (after the last step: d_final_state)
//   d_C_t[n] = sum_d d_y h_t[n];  d_B_t[n] = sum_d d_h[n] delta u
//   d_u = d_y skip + sum_n d_h[n] delta B_t[n]
//   d_delta = sum_n d_h[n] (A[n] a h_{t-1}[n] + u B_t[n]);  d_dt = d_delta softplus'(dt + dt_bias);  d_dt_bias += d_dt
//   d_A_log[n] += d_h[n] delta a h_{t-1}[n] A[n],  as dA/dA_log = A
//   to step t-1: a d_h[n]
// a h_{t-1} is computed as that. It is also h_t - delta u B_t, but this difference of close numbers would have few correct digits.
// The states are computed again, one chunk at a time, from the one stored before it. The sums over channels are why d is an inner loop.
void scan_backward(const ScanGradients& g, const floatX* d_out, const real* d_final_state, const Scan& s, const real* chunk_states, void*,
                   cudaStream_t) {
    const int64_t T = s.T, D = s.D, N = s.N;
    if (T == 0) return;
    std::vector<real> d_h(D * N);
    for (int64_t b = 0; b < s.B; b++) {
        for (int64_t i = 0; i < D * N; i++) d_h[i] = d_final_state ? d_final_state[b * D * N + i] : 0;
        for (int64_t chunk = scan_chunks(s.T) - 1; chunk >= 0; chunk--) {
            const int64_t first = b * T + chunk * kScanChunk, steps = std::min<int64_t>(kScanChunk, T - chunk * kScanChunk);
            real d_B[kScanChunk][kMaxStates] = {}, d_C[kScanChunk][kMaxStates] = {};
            for (int64_t d = 0; d < D; d++) {
                real h[kScanChunk + 1][kMaxStates];  // h[i] is the state before step i of the chunk, h[i + 1] the one after it
                for (int64_t n = 0; n < N; n++) h[0][n] = chunk_states[((b * scan_chunks(s.T) + chunk) * D + d) * N + n];
                for (int64_t i = 0; i < steps; i++) {
                    const int64_t row = first + i;
                    const real u = real(s.u[row * D + d]), delta = softplus(real(s.dt[row * D + d]) + s.dt_bias[d]);
                    for (int64_t n = 0; n < N; n++) {
                        const real A = -std::exp(s.A_log[d * N + n]);
                        h[i + 1][n] = std::exp(delta * A) * h[i][n] + delta * u * real(s.B_t[row * s.ld_bc + n]);
                    }
                }
                for (int64_t i = steps - 1; i >= 0; i--) {
                    const int64_t row = first + i;
                    const real u = real(s.u[row * D + d]), z = real(s.z[row * s.ld_z + d]), d_o = real(d_out[row * D + d]);
                    const real raw = real(s.dt[row * D + d]) + s.dt_bias[d], delta = softplus(raw), d_y = d_o * silu(z);
                    real y = s.skip[d] * u, d_u = d_y * s.skip[d], d_delta = 0;
                    for (int64_t n = 0; n < N; n++) {
                        const real A = -std::exp(s.A_log[d * N + n]), a = std::exp(delta * A), decayed = a * h[i][n];
                        const real B_t = real(s.B_t[row * s.ld_bc + n]), C_t = real(s.C_t[row * s.ld_bc + n]);
                        real& d_h_n = d_h[d * N + n];
                        d_h_n += d_y * C_t;
                        y += h[i + 1][n] * C_t;
                        d_C[i][n] += d_y * h[i + 1][n];
                        d_B[i][n] += d_h_n * delta * u;
                        d_u += d_h_n * delta * B_t;
                        d_delta += d_h_n * (A * decayed + u * B_t);
                        g.d_A_log[d * N + n] += d_h_n * delta * decayed * A;
                        d_h_n *= a;
                    }
                    const real d_dt = d_delta * d_softplus(raw);
                    g.d_u[row * D + d] = floatX(d_u);
                    g.d_dt[row * D + d] = floatX(d_dt);
                    g.d_z[row * s.ld_z + d] = floatX(d_o * y * d_silu(z));
                    g.d_skip[d] += d_y * u;
                    g.d_dt_bias[d] += d_dt;
                }
            }
            for (int64_t i = 0; i < steps; i++)
                for (int64_t n = 0; n < N; n++) {
                    g.d_B_t[(first + i) * s.ld_bc + n] = floatX(d_B[i][n]);
                    g.d_C_t[(first + i) * s.ld_bc + n] = floatX(d_C[i][n]);
                }
        }
        for (int64_t i = 0; g.d_initial_state && i < D * N; i++) g.d_initial_state[b * D * N + i] = d_h[i];
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Selective scan in a closed loop: see moemamba.h for the equations. One step of one channel, from its states to its states; what it
// computes on the way is what the backward pass asks for.
struct LoopStep {
    real u, delta, CB, BB, CC;             // inputs: u, softplus(dt + dt_bias), C_t . B_t, |B_t|^2, |C_t|^2
    int64_t slowest;                       // state, of the least |A|
    real a, rho, action;                   // that; factor, and delta y_{t-tau} - k_t e_t
    real e, smooth_sign, d_smooth_sign;    // error; s(e) and s'(e)
    real gain, moved, delayed, v, y;       // k_t, and before the clip; y_{t-tau}; input of the plant; output before the gate
};
real loop_noise(const ClosedLoop& c, int64_t row, int64_t d, int64_t n) {  // n < N: of a state; N: of the output
    const uint64_t counter = uint64_t((row * c.plant.D + d) * (c.plant.N + 1) + n);
    return c.noise_seed ? real(random_normal(c.noise_seed, kNoiseStream, counter)) : 0;
}
LoopStep loop_step(const ClosedLoop& c, int64_t row, int64_t d, real* state) {
    const Scan& s = c.plant;
    const int64_t N = s.N;
    real *const h = state, &gain = state[N], &pending = state[N + 1], *const past = state + N + 2;
    const floatX *const B_t = s.B_t + row * s.ld_bc, *const C_t = s.C_t + row * s.ld_bc;
    LoopStep x{};
    x.u = real(s.u[row * s.D + d]);
    x.delta = softplus(real(s.dt[row * s.D + d]) + s.dt_bias[d]);
    for (int64_t n = 0; n < N; n++) {
        x.CB += real(C_t[n]) * real(B_t[n]);
        x.BB += real(B_t[n]) * real(B_t[n]);
        x.CC += real(C_t[n]) * real(C_t[n]);
    }
    x.slowest = std::min_element(s.A_log + d * N, s.A_log + (d + 1) * N) - (s.A_log + d * N);
    x.a = std::exp(s.A_log[d * N + x.slowest]);
    x.rho = 1 / ((1 / x.a + x.delta) * std::sqrt(x.BB * x.CC + kLoopTiny));
    x.e = past[0] - x.u;
    const real length = std::sqrt(x.e * x.e + c.eps * c.eps);
    x.smooth_sign = x.e / length;
    x.d_smooth_sign = c.eps * c.eps / (length * length * length);
    x.moved = gain + c.alpha * x.smooth_sign * pending;
    x.gain = gain = std::clamp(x.moved, -c.kappa, c.kappa);
    pending = x.delta * x.rho * x.CB * x.e;
    x.delayed = past[c.tau - 1];
    x.action = (c.delay ? c.delay[d] * x.delayed : 0) - (c.gain ? x.gain * x.e : 0);
    x.v = x.u + x.rho * x.action;
    x.y = s.skip[d] * x.u + (c.output_noise ? c.output_noise[d] * loop_noise(c, row, d, N) : 0);
    for (int64_t n = 0; n < N; n++) {
        const real A = -std::exp(s.A_log[d * N + n]);
        h[n] = std::exp(x.delta * A) * h[n] + x.delta * x.v * real(B_t[n]) + c.state_noise * loop_noise(c, row, d, n);
        x.y += real(C_t[n]) * h[n] * (c.zeta ? silu(c.zeta[d * N + n] * h[n] + c.gamma[d * N + n]) : 1);
    }
    std::copy_backward(past, past + c.tau - 1, past + c.tau);
    past[0] = x.y;
    return x;
}
// State k is what the gain has become beyond k_0: so that a state of zeros is the start.
void loop_start(const ClosedLoop& c, int64_t d, const real* from, real* state) {
    for (int64_t i = 0; i < c.states(); i++) state[i] = from ? from[i] : 0;
    state[c.plant.N] += c.gain ? c.gain[d] : 0;
}
constexpr int kMaxLoopStates = kMaxStates + 2 + kMaxDelay;
void closed_loop_forward(floatX* out, real* final_state, real* chunk_states, const ClosedLoop& c, void*, cudaStream_t) {
    const Scan& s = c.plant;
    const int64_t T = s.T, D = s.D, states = c.states();
    for (int64_t b = 0; b < s.B && T > 0; b++)
        for (int64_t d = 0; d < D; d++) {
            real state[kMaxLoopStates];
            loop_start(c, d, s.initial_state ? s.initial_state + (b * D + d) * states : nullptr, state);
            for (int64_t t = 0; t < T; t++) {
                const int64_t row = b * T + t, chunk = b * loop_chunks(s.T) + t / kLoopChunk;
                if (chunk_states && t % kLoopChunk == 0) std::copy_n(state, states, chunk_states + (chunk * D + d) * states);
                const LoopStep x = loop_step(c, row, d, state);
                out[row * D + d] = floatX(x.y * silu(real(s.z[row * s.ld_z + d])));
            }
            if (!final_state) continue;
            std::copy_n(state, states, final_state + (b * D + d) * states);
            final_state[(b * D + d) * states + s.N] -= c.gain ? c.gain[d] : 0;
        }
}
// Backward through one step. d_state: in, the gradient of the states after it; out, of those before it. before, after: the states.
//   y_t reached out_t, and as past[0] whatever read it later:  d_y = d_out silu(z) + d_past[0];  the older ones move back one place
//   each n:  x = zeta h + gamma;  d_h += d_y C (r + h silu'(x) zeta);  d_zeta += d_y C h silu'(x) h;  d_gamma += d_y C h silu'(x);  d_C += d_y r h
//   p_t = delta rho CB e:  d_delta += d_p rho CB e;  d_e = d_p delta rho CB;  d_CB = d_p delta rho e;  d_rho = d_p delta CB e
//   plant:  d_v = sum_n d_h delta B;  d_delta += sum_n d_h (A a h_{t-1} + v B);  d_B += d_h delta v + d_CB C;  d_C += d_CB B;  d_h_{t-1} = a d_h
//   v_t = u + rho action:  d_u += d_v;  d_action = d_v rho;  d_rho += d_v action
//   action:  d_k += -d_action e;  d_e += -d_action k;  d_delay += d_action y_{t-tau};  d_y_{t-tau} += d_action delay
//   rho = 1 / ((1/a + delta) |B| |C|), d_log = d_rho rho:  d_delta -= d_log / (1/a + delta);  d_A_log += d_log / (1 + a delta), of the slowest
//     state;  d_B -= d_log B / |B|^2;  d_C -= d_log C / |C|^2
//   k_t:  d_moved = d_k, or 0 where the clip binds;  d_k_{t-1} = d_moved;  d_p_{t-1} = d_moved alpha s(e);  d_e += d_moved alpha p_{t-1} s'(e)
//   e_t:  d_y_{t-1} += d_e;  d_u -= d_e
void loop_step_backward(const ClosedLoopGradients& g, real* d_state, real* d_B, real* d_C, real d_out, const ClosedLoop& c, const LoopStep& x,
                        int64_t row, int64_t d, const real* before, const real* after) {
    const Scan& s = c.plant;
    const int64_t N = s.N;
    const floatX *const B_t = s.B_t + row * s.ld_bc, *const C_t = s.C_t + row * s.ld_bc;
    const real z = real(s.z[row * s.ld_z + d]), d_p = d_state[N + 1];
    real* const d_past = d_state + N + 2;
    const real d_y = d_out * silu(z) + d_past[0];
    std::copy(d_past + 1, d_past + c.tau, d_past);
    d_past[c.tau - 1] = 0;
    real d_u = d_y * s.skip[d], d_v = 0, d_delta = d_p * x.rho * x.CB * x.e, d_e = d_p * x.delta * x.rho * x.CB;
    const real d_CB = d_p * x.delta * x.rho * x.e;
    g.plant.d_skip[d] += d_y * x.u;
    if (c.output_noise) g.d_output_noise[d] += d_y * loop_noise(c, row, d, N);
    for (int64_t n = 0; n < N; n++) {
        const int64_t i = d * N + n;
        const real A = -std::exp(s.A_log[i]), decayed = std::exp(x.delta * A) * before[n], h = after[n], B = real(B_t[n]), C = real(C_t[n]);
        real r = 1, d_r = 0;  // and its derivative by zeta h + gamma
        if (c.zeta) {
            r = silu(c.zeta[i] * h + c.gamma[i]);
            d_r = d_silu(c.zeta[i] * h + c.gamma[i]);
            g.d_zeta[i] += d_y * C * h * d_r * h;
            g.d_gamma[i] += d_y * C * h * d_r;
        }
        d_state[n] += d_y * C * (c.zeta ? r + h * d_r * c.zeta[i] : 1);
        d_C[n] += d_y * r * h + d_CB * B;
        d_B[n] += d_state[n] * x.delta * x.v + d_CB * C;
        d_v += d_state[n] * x.delta * B;
        d_delta += d_state[n] * (A * decayed + x.v * B);
        g.plant.d_A_log[i] += d_state[n] * x.delta * decayed * A;
        d_state[n] *= std::exp(x.delta * A);
    }
    d_u += d_v;
    const real d_action = d_v * x.rho, d_log = (d_p * x.delta * x.CB * x.e + d_v * x.action) * x.rho;
    d_delta -= d_log / (1 / x.a + x.delta);
    g.plant.d_A_log[d * N + x.slowest] += d_log / (1 + x.a * x.delta);
    for (int64_t n = 0; n < N; n++) {
        d_B[n] -= d_log * real(B_t[n]) * (x.CC / (x.BB * x.CC + kLoopTiny));
        d_C[n] -= d_log * real(C_t[n]) * (x.BB / (x.BB * x.CC + kLoopTiny));
    }
    if (c.delay) {
        g.d_delay[d] += d_action * x.delayed;
        d_past[c.tau - 1] += d_action * c.delay[d];
    }
    if (c.gain) {
        d_state[N] -= d_action * x.e;
        d_e -= d_action * x.gain;
    }
    if (x.moved != x.gain) d_state[N] = 0;  // clipped
    d_state[N + 1] = d_state[N] * c.alpha * x.smooth_sign;
    d_e += d_state[N] * c.alpha * before[N + 1] * x.d_smooth_sign;
    d_past[0] += d_e;
    d_u -= d_e;
    const real d_dt = d_delta * d_softplus(real(s.dt[row * s.D + d]) + s.dt_bias[d]);
    g.plant.d_u[row * s.D + d] = floatX(d_u);
    g.plant.d_dt[row * s.D + d] = floatX(d_dt);
    g.plant.d_z[row * s.ld_z + d] = floatX(d_out * x.y * d_silu(z));
    g.plant.d_dt_bias[d] += d_dt;
}
// As of the scan: the steps of a chunk once more from the states before it, then backward through them.
void closed_loop_backward(const ClosedLoopGradients& g, const floatX* d_out, const real* d_final_state, const ClosedLoop& c,
                          const real* chunk_states, void*, cudaStream_t) {
    const Scan& s = c.plant;
    const int64_t T = s.T, D = s.D, N = s.N, states = c.states();
    std::vector<real> d_state(D * states);
    for (int64_t b = 0; b < s.B && T > 0; b++) {
        for (int64_t i = 0; i < D * states; i++) d_state[i] = d_final_state ? d_final_state[b * D * states + i] : 0;
        for (int64_t d = 0; c.gain && d_final_state && d < D; d++) g.d_gain[d] -= d_state[d * states + N];
        for (int64_t chunk = loop_chunks(s.T) - 1; chunk >= 0; chunk--) {
            const int64_t first = b * T + chunk * kLoopChunk, steps = std::min<int64_t>(kLoopChunk, T - chunk * kLoopChunk);
            real d_B[kLoopChunk][kMaxStates] = {}, d_C[kLoopChunk][kMaxStates] = {};
            for (int64_t d = 0; d < D; d++) {
                real state[kLoopChunk + 1][kMaxLoopStates];
                LoopStep step[kLoopChunk];
                std::copy_n(chunk_states + ((b * loop_chunks(s.T) + chunk) * D + d) * states, states, state[0]);
                for (int64_t i = 0; i < steps; i++) {
                    std::copy_n(state[i], states, state[i + 1]);
                    step[i] = loop_step(c, first + i, d, state[i + 1]);
                }
                for (int64_t i = steps - 1; i >= 0; i--)
                    loop_step_backward(g, &d_state[d * states], d_B[i], d_C[i], real(d_out[(first + i) * D + d]), c, step[i], first + i, d,
                                       state[i], state[i + 1]);
            }
            for (int64_t i = 0; i < steps; i++)
                for (int64_t n = 0; n < N; n++) {
                    g.plant.d_B_t[(first + i) * s.ld_bc + n] = floatX(d_B[i][n]);
                    g.plant.d_C_t[(first + i) * s.ld_bc + n] = floatX(d_C[i][n]);
                }
        }
        for (int64_t d = 0; c.gain && d < D; d++) g.d_gain[d] += d_state[d * states + N];
        for (int64_t i = 0; g.plant.d_initial_state && i < D * states; i++) g.plant.d_initial_state[b * D * states + i] = d_state[i];
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Rotary positions: the plane of x[i] and x[i + S/2] is turned by an angle that grows with the position, so that the product of a query and a
// key depends on how far apart they are. The angle is kept in double: at position 10^6 a float would have lost three of its digits.
//   (x[i], x[j]) becomes (x[i] cos - x[j] sin,  x[j] cos + x[i] sin),  j = i + S/2,  angle = position base^(-2i/S)
void rotate(floatX* out, int ld_out, int64_t stride_out, const Rotary& r, bool back, cudaStream_t) {
    for (int64_t b = 0; b < r.B; b++)
        for (int64_t t = 0; t < r.T; t++)
            for (int64_t h = 0; h < r.heads; h++) {
                const floatX* const x = r.in + (b * r.T + t) * r.ld_in + h * r.S;
                floatX* const y = out + b * stride_out + t * ld_out + h * r.S;
                if (r.base == 0)
                    for (int64_t s = 0; s < r.S; s++) y[s] = x[s];
                else
                    for (int64_t i = 0, j = r.S / 2; j < r.S; i++, j++) {
                        const double angle = double(r.position + t) * std::pow(r.base, -2 * double(i) / r.S);
                        const real cosine = real(std::cos(angle)), sine = real(back ? -std::sin(angle) : std::sin(angle));
                        const real first = real(x[i]), second = real(x[j]);
                        y[i] = floatX(first * cosine - second * sine);
                        y[j] = floatX(second * cosine + first * sine);
                    }
            }
}

// ------------------------------------------------------------------------------------------------------------------
// Causal attention
//   score[j] = q . k[j] / sqrt(S),  j <= past + t;  lse = log sum_j exp(score[j]);  p[j] = exp(score[j] - lse);  out = sum_j p[j] v[j]
real dot(const floatX* a, const floatX* b, int64_t count) {
    real sum = 0;
    for (int64_t i = 0; i < count; i++) sum += real(a[i]) * real(b[i]);
    return sum;
}
void attention_forward(floatX* out, real* lse, const Attention& a, void*, cudaStream_t) {
    std::vector<real> p(a.keys()), sum(a.S);
    for (int64_t b = 0; b < a.B; b++)
        for (int64_t t = 0; t < a.T; t++)
            for (int64_t h = 0; h < a.H; h++) {
                const int64_t row = b * a.T + t, keys = a.past + t + 1, group = h / (a.H / a.G);
                const floatX* const q = a.q + row * a.ld_q + h * a.S;
                const floatX *const k = a.k + b * a.stride_kv + group * a.S, *const v = a.v + b * a.stride_kv + group * a.S;
                for (int64_t j = 0; j < keys; j++) p[j] = dot(q, k + j * a.ld_kv, a.S) / std::sqrt(real(a.S));
                const real largest = *std::max_element(p.begin(), p.begin() + keys);
                real total = 0;
                for (int64_t j = 0; j < keys; j++) total += std::exp(p[j] - largest);
                const real log_sum = largest + std::log(total);
                std::fill(sum.begin(), sum.end(), 0);
                for (int64_t j = 0; j < keys; j++)
                    for (int64_t s = 0; s < a.S; s++) sum[s] += std::exp(p[j] - log_sum) * real(v[j * a.ld_kv + s]);
                for (int64_t s = 0; s < a.S; s++) out[(row * a.H + h) * a.S + s] = floatX(sum[s]);
                if (lse) lse[row * a.H + h] = log_sum;
            }
}
// A key and a value are used by every query from their own time on, of every head in the group:
//   d_v[j] = sum_t p[t, j] d_out[t];   d_p[t, j] = d_out[t] . v[j]
//   softmax:  d_score[t, j] = p[t, j] (d_p[t, j] - sum_i p[t, i] d_p[t, i]),  and that sum is d_out[t] . out[t]
//   d_q[t] = sum_j d_score[t, j] k[j] / sqrt(S);   d_k[j] = sum_t d_score[t, j] q[t] / sqrt(S)
void attention_backward(floatX* d_q, floatX* d_k, floatX* d_v, const floatX* d_out, const floatX* out, const real* lse, const Attention& a,
                        void*, cudaStream_t) {
    const int64_t S = a.S;
    const real scale = 1 / std::sqrt(real(S));
    for (int64_t b = 0; b < a.B; b++)
        for (int64_t group = 0; group < a.G; group++) {
            const int64_t first = b * a.stride_kv + group * S;  // of the group, in k and v
            std::vector<real> sum_k(a.T * S), sum_v(a.T * S);
            for (int64_t h = group * (a.H / a.G); h < (group + 1) * (a.H / a.G); h++)
                for (int64_t t = 0; t < a.T; t++) {
                    const int64_t row = b * a.T + t, at_q = row * a.ld_q + h * S, at_out = (row * a.H + h) * S;
                    const real all = dot(d_out + at_out, out + at_out, S);
                    std::vector<real> sum_q(S);
                    for (int64_t j = 0; j <= t; j++) {
                        const floatX *const k = a.k + first + j * a.ld_kv, *const v = a.v + first + j * a.ld_kv;
                        const real p = std::exp(dot(a.q + at_q, k, S) * scale - lse[row * a.H + h]);
                        const real d_score = p * (dot(d_out + at_out, v, S) - all) * scale;
                        for (int64_t s = 0; s < S; s++) {
                            sum_q[s] += d_score * real(k[s]);
                            sum_k[j * S + s] += d_score * real(a.q[at_q + s]);
                            sum_v[j * S + s] += p * real(d_out[at_out + s]);
                        }
                    }
                    for (int64_t s = 0; s < S; s++) d_q[at_q + s] = floatX(sum_q[s]);
                }
            for (int64_t j = 0; j < a.T; j++)
                for (int64_t s = 0; s < S; s++) {
                    d_k[first + j * a.ld_kv + s] = floatX(sum_k[j * S + s]);
                    d_v[first + j * a.ld_kv + s] = floatX(sum_v[j * S + s]);
                }
        }
}

// ------------------------------------------------------------------------------------------------------------------
// Router
//   l[e] = sum_c x[c] weight[e, c];  lse = log sum_e exp(l[e]);  p[e] = exp(l[e] - lse)
//   experts: the K of largest p;  gate[k] = p[experts[k]], or p[experts[k]] / S with S = sum_k p[experts[k]]
// The largest logit is subtracted before exp, which changes no p, and lets nothing overflow.
void router_forward(const Routing& out, const Router& r, void*, cudaStream_t) {
    for (int64_t row = 0; row < r.rows; row++) {
        real *p = out.probs + row * r.E, *gates = out.gates + row * r.K, largest = -INFINITY, sum = 0, S = 0;
        int* experts = out.experts + row * r.K;  // K = 0: no row chooses
        for (int64_t e = 0; e < r.E; e++) {
            p[e] = 0;
            for (int64_t c = 0; c < r.C; c++) p[e] += real(r.x[row * r.C + c]) * r.weight[e * r.C + c];
            largest = std::max(largest, p[e]);
        }
        for (int64_t e = 0; e < r.E; e++) {
            p[e] = std::exp(p[e] - largest);
            sum += p[e];
        }
        for (int64_t e = 0; e < r.E; e++) p[e] /= sum;
        out.lse[row] = largest + std::log(sum);
        for (int k = 0; k < r.K; k++) {
            int best = -1;  // the first that is left, then whatever is larger: there is always one, even among NaNs
            for (int e = 0; e < r.E; e++) {
                bool taken = false;
                for (int j = 0; j < k; j++) taken = taken || experts[j] == e;
                if (!taken && (best < 0 || p[e] > p[best])) best = e;
            }
            experts[k] = best;
            gates[k] = p[best];
            S += p[best];
        }
        for (int k = 0; r.renormalize && k < r.K; k++) gates[k] /= S;
    }
}
//   balance = E sum_e f[e] mean_r(p[r, e]),  f[e] = load[e] / rows;  z = mean_r(lse[r]^2)
// Balance is K where the load is even and grows as the experts that have the rows also have the probability.
void router_losses(real* losses, const real* probs, const real* lse, const int* load, void*, int rows, int E, cudaStream_t) {
    if (rows == 0) return;
    double balance = 0, z = 0;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t e = 0; e < E; e++) balance += E * (double(load[e]) / rows) * double(probs[r * E + e]) / rows;
        z += double(lse[r]) * double(lse[r]) / rows;
    }
    losses[0] += real(balance);
    losses[1] += real(z);
}
// The choice of experts has no derivative, nor has f; the probabilities have.
//   d_p[e] = balance_weight E f[e] / rows  (balance)
//   d_p[experts[k]] += d_gate[k],  or if renormalised:  (d_gate[k] - sum_j d_gate[j] gate[j]) / S,  or if experts choose:  d_p[e] += d_gate[e]
//   d_l[e] = p[e] (d_p[e] - sum_j p[j] d_p[j])  (softmax)  +  z_weight 2 lse / rows p[e],  as dlse/dl[e] = p[e]
//   d_x[c] += sum_e d_l[e] weight[e, c];  d_weight[e, c] += sum_r d_l[e] x[c]
void router_backward(floatX* d_x, real* d_weight, const real* d_gates, const Routing& out, const int* load, const Router& r,
                     real balance_weight, real z_weight, void*, cudaStream_t) {
    for (int64_t row = 0; row < r.rows; row++) {
        const real *p = out.probs + row * r.E, *gates = out.gates + row * r.K, *d_gate = d_gates + row * r.K;
        const int* experts = out.experts + row * r.K;
        real d_p[kMaxExperts], d_l[kMaxExperts], S = 0, d_gate_gate = 0, p_d_p = 0;
        for (int64_t e = 0; e < r.E; e++) d_p[e] = balance_weight * r.E * (real(load[e]) / r.rows) / r.rows;
        for (int64_t k = 0; k < r.K; k++) {
            S += p[experts[k]];
            d_gate_gate += d_gate[k] * gates[k];
        }
        for (int64_t k = 0; k < r.K; k++) d_p[experts[k]] += r.renormalize ? (d_gate[k] - d_gate_gate) / S : d_gate[k];
        for (int64_t e = 0; e < r.E && r.K == 0; e++) d_p[e] += d_gates[row * r.E + e];
        for (int64_t e = 0; e < r.E; e++) p_d_p += p[e] * d_p[e];
        for (int64_t e = 0; e < r.E; e++) d_l[e] = p[e] * (d_p[e] - p_d_p + z_weight * 2 * out.lse[row] / r.rows);
        for (int64_t c = 0; c < r.C; c++) {
            real sum = real(d_x[row * r.C + c]);
            for (int64_t e = 0; e < r.E; e++) {
                sum += d_l[e] * r.weight[e * r.C + c];
                d_weight[e * r.C + c] += d_l[e] * real(r.x[row * r.C + c]);
            }
            d_x[row * r.C + c] = floatX(sum);
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Dispatch: count the choices of each expert, which says where its slots begin; then give out the slots, first come first served.
void dispatch_plan(const Dispatch& to, const int* experts, void*, cudaStream_t) {
    const int64_t choices = int64_t(to.rows) * to.K;
    for (int e = 0; e < to.E; e++) to.load[e] = 0;
    for (int64_t i = 0; i < choices; i++) to.load[experts[i]]++;
    to.offset[0] = 0;
    for (int e = 0; e < to.E; e++) to.offset[e + 1] = to.offset[e] + (to.capacity > 0 ? to.capacity : to.load[e]);
    for (int s = 0; s < to.slots(); s++) to.choice[s] = -1;
    std::vector<int> next(to.offset, to.offset + to.E);  // the slot that an expert gives out next
    for (int64_t i = 0; i < choices; i++) {
        const int e = experts[i];
        to.slot[i] = next[e] < to.offset[e + 1] ? next[e]++ : -1;
        if (to.slot[i] >= 0) to.choice[to.slot[i]] = int(i);
    }
}
// Expert Choice: every expert has its rows in the order of their probability, the earlier of equal ones first, and takes the first of them.
void expert_choice_plan(const Dispatch& to, const real* probs, cudaStream_t) {
    std::vector<int> rows(to.rows);
    for (int e = 0; e < to.E && to.rows > 0; e++) {
        const auto p = [&](int64_t row) { return probs[row * to.E + e] > 0 ? probs[row * to.E + e] : 0; };  // a NaN is as unlikely as can be
        std::iota(rows.begin(), rows.end(), 0);
        std::stable_sort(rows.begin(), rows.end(), [&](int a, int b) { return p(a) > p(b); });
        std::sort(rows.begin(), rows.begin() + to.capacity);
        for (int64_t r = 0; r < to.rows; r++) to.slot[r * to.E + e] = -1;
        for (int i = 0; i < to.capacity; i++) {
            const int slot = e * to.capacity + i, choice = rows[i] * to.E + e;
            to.slot[choice] = slot;
            to.choice[slot] = choice;
        }
        to.load[e] = to.capacity;
        to.offset[e] = e * to.capacity;
        to.offset[e + 1] = (e + 1) * to.capacity;
    }
}
//   out[s] = x[choice[s] / K], or 0 for an empty slot
void dispatch_forward(floatX* out, const floatX* x, const Dispatch& to, int C, cudaStream_t) {
    if (to.rows == 0) return;
    for (int64_t s = 0; s < to.slots(); s++)
        for (int64_t c = 0; c < C; c++) out[s * C + c] = to.choice[s] < 0 ? floatX(real(0)) : x[int64_t(to.choice[s] / to.K) * C + c];
}
// A row went to as many slots as it has choices that were not dropped:
//   d_x[r] = sum_k d_out[slot[r, k]]
void dispatch_backward(floatX* d_x, const floatX* d_out, const Dispatch& to, int C, bool accumulate, cudaStream_t) {
    for (int64_t r = 0; r < to.rows; r++)
        for (int64_t c = 0; c < C; c++) {
            real sum = accumulate ? real(d_x[r * C + c]) : 0;
            for (int64_t i = r * to.K; i < (r + 1) * to.K; i++)
                if (to.slot[i] >= 0) sum += real(d_out[int64_t(to.slot[i]) * C + c]);
            d_x[r * C + c] = floatX(sum);
        }
}

// Combine
//   out[r] = sum_k gates[r, k] y[slot[r, k]]
void combine_forward(floatX* out, const floatX* y, const real* gates, const Dispatch& to, int C, bool accumulate, cudaStream_t) {
    for (int64_t r = 0; r < to.rows; r++)
        for (int64_t c = 0; c < C; c++) {
            real sum = accumulate ? real(out[r * C + c]) : 0;
            for (int64_t i = r * to.K; i < (r + 1) * to.K; i++)
                if (to.slot[i] >= 0) sum += gates[i] * real(y[int64_t(to.slot[i]) * C + c]);
            out[r * C + c] = floatX(sum);
        }
}
// Each filled slot was used once, by one choice of one row, r = choice[s] / K:
//   d_y[s] = gates[choice[s]] d_out[r], or 0 for an empty slot
//   d_gates[r, k] = sum_c d_out[r, c] y[slot[r, k], c], or 0 if dropped
void combine_backward(floatX* d_y, real* d_gates, const floatX* d_out, const floatX* y, const real* gates, const Dispatch& to, int C,
                      cudaStream_t) {
    if (to.rows == 0) return;
    for (int64_t s = 0; s < to.slots(); s++)
        for (int64_t c = 0; c < C; c++) {
            const int64_t choice = to.choice[s];
            d_y[s * C + c] = floatX(choice < 0 ? real(0) : gates[choice] * real(d_out[choice / to.K * C + c]));
        }
    for (int64_t r = 0; r < to.rows; r++)
        for (int64_t i = r * to.K; i < (r + 1) * to.K; i++) {
            d_gates[i] = 0;
            for (int64_t c = 0; to.slot[i] >= 0 && c < C; c++)
                d_gates[i] += real(d_out[r * C + c]) * real(y[int64_t(to.slot[i]) * C + c]);
        }
}

// ------------------------------------------------------------------------------------------------------------------
// Experts: a linear layer for each expert e, on the slots s from offset[e] to offset[e + 1]. Empty ones are rows of zeros.
//   out[s, o] = sum_i in[s, i] weight[e, o, i]
void experts_forward(floatX* out, const Experts& x, cudaStream_t) {
    const int64_t I = x.I, O = x.O;
    if (x.to.rows == 0) return;
    for (int64_t e = 0; e < x.to.E; e++)
        for (int64_t s = x.to.offset[e]; s < x.to.offset[e + 1]; s++)
            for (int64_t o = 0; o < O; o++) {
                real sum = 0;
                for (int64_t i = 0; i < I; i++) sum += real(x.in[s * I + i]) * real(x.weight[(e * O + o) * I + i]);
                out[s * O + o] = floatX(sum);
            }
}
//   d_in[s, i] = sum_o d_out[s, o] weight[e, o, i]
//   d_weight[e, o, i] = sum over the slots s of e of d_out[s, o] in[s, i]
void experts_backward(floatX* d_in, real* d_weight, const floatX* d_out, const Experts& x, bool add_weight, cudaStream_t) {
    const int64_t I = x.I, O = x.O;
    if (x.to.rows == 0) return;
    for (int64_t e = 0; e < x.to.E; e++) {
        for (int64_t s = x.to.offset[e]; s < x.to.offset[e + 1]; s++)
            for (int64_t i = 0; i < I; i++) {
                real sum = 0;
                for (int64_t o = 0; o < O; o++) sum += real(d_out[s * O + o]) * real(x.weight[(e * O + o) * I + i]);
                d_in[s * I + i] = floatX(sum);
            }
        for (int64_t o = 0; o < O; o++)
            for (int64_t i = 0; i < I; i++) {
                real sum = add_weight ? d_weight[(e * O + o) * I + i] : 0;
                for (int64_t s = x.to.offset[e]; s < x.to.offset[e + 1]; s++) sum += real(d_out[s * O + o]) * real(x.in[s * I + i]);
                d_weight[(e * O + o) * I + i] = sum;
            }
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Classifier: softmax, cross-entropy and its gradient, in place. With p = softmax(logits):
//   loss = -log p[target] = log(sum_v exp(logits[v])) - logits[target]
//   d_logits[v] = d_loss (p[v] - (1 if v is the target, else 0))
void classifier(real* losses, floatX* logits, const int* targets, int rows, int V, int ld, real d_loss, cudaStream_t) {
    for (int64_t r = 0; r < rows; r++) {
        floatX* row = logits + r * ld;
        const bool ignored = targets[r] < 0;
        real largest = -INFINITY, sum = 0;
        for (int v = 0; v < V; v++) largest = std::max(largest, real(row[v]));
        for (int v = 0; v < V; v++) sum += std::exp(real(row[v]) - largest);
        losses[r] = ignored ? 0 : std::log(sum) - (real(row[targets[r]]) - largest);
        if (d_loss == 0) continue;
        for (int v = 0; v < ld; v++) {  // past V there is only padding
            const real p = v < V ? std::exp(real(row[v]) - largest) / sum : 0;
            row[v] = floatX(ignored || v >= V ? real(0) : d_loss * (p - (v == targets[r])));
        }
    }
}
//   probs[v] = exp(logits[v] / temperature) / sum_j exp(logits[j] / temperature)
void softmax_forward(real* probs, const floatX* logits, int rows, int V, int ld, real temperature, cudaStream_t) {
    for (int64_t r = 0; r < rows; r++) {
        real largest = -INFINITY, sum = 0;
        for (int v = 0; v < V; v++) largest = std::max(largest, real(logits[r * ld + v]));
        for (int v = 0; v < V; v++) sum += std::exp((real(logits[r * ld + v]) - largest) / temperature);
        for (int v = 0; v < V; v++) probs[r * V + v] = std::exp((real(logits[r * ld + v]) - largest) / temperature) / sum;
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Reductions, over as many numbers as a model has parameters: in double, because a float stops growing at 2^24 ones.
void sum(real* out, const real* in, void*, int64_t count, cudaStream_t) {
    double total = out[0];
    for (int64_t i = 0; i < count; i++) total += double(in[i]);
    out[0] = real(total);
}
void sum_of_squares(real* out, const real* in, void*, int64_t count, cudaStream_t) {
    double total = out[0];
    for (int64_t i = 0; i < count; i++) total += double(in[i]) * double(in[i]);
    out[0] = real(total);
}

// AdamW. m and v are running means of g and g^2; they start at 0, so that after `step` steps their weights sum to 1 - beta^step only.
//   m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  m_hat = m / (1 - beta1^step);  v_hat = v / (1 - beta2^step)
//   master -= lr (m_hat / (sqrt(v_hat) + eps) + weight_decay master)
void adamw(real* master, floatX* weight, real* m, real* v, const real* grad, int64_t count, const AdamW& o, real grad_scale, int step,
           cudaStream_t) {
    const real lr = real(o.lr), eps = real(o.eps), weight_decay = real(o.weight_decay);
    const real m_correction = real(1 - std::pow(o.beta1, step)), v_correction = real(1 - std::pow(o.beta2, step));
    for (int64_t i = 0; i < count; i++) {
        const real g = grad_scale * grad[i];
        m[i] = real(o.beta1) * m[i] + real(1 - o.beta1) * g;
        v[i] = real(o.beta2) * v[i] + real(1 - o.beta2) * g * g;
        const real m_hat = m[i] / m_correction, v_hat = v[i] / v_correction;
        master[i] -= lr * (m_hat / (std::sqrt(v_hat) + eps) + weight_decay * master[i]);
        if (weight) weight[i] = floatX(master[i]);
    }
}

}  // namespace

const Layers layers = {
    .device = "plain",
    .machine = machine,
    .open = open,
    .allocate = allocate,
    .release = release,
    .allocate_host = allocate,
    .release_host = release,
    .zero = zero,
    .upload = copy,
    .upload_later = copy,
    .download = copy,
    .copy = copy,
    .synchronize = synchronize,
    .linear_forward = linear_forward,
    .linear_backward = linear_backward,
    .swiglu_forward = swiglu_forward,
    .swiglu_backward = swiglu_backward,
    .relu_forward = relu_forward,
    .relu_backward = relu_backward,
    .rmsnorm_forward = rmsnorm_forward,
    .rmsnorm_backward = rmsnorm_backward,
    .rmsnorm_scratch = no_scratch,
    .slice_norm_forward = slice_norm_forward,
    .slice_norm_backward = slice_norm_backward,
    .embedding_forward = embedding_forward,
    .embedding_backward = embedding_backward,
    .embedding_scratch = no_scratch,
    .conv_forward = conv_forward,
    .conv_backward = conv_backward,
    .conv_scratch = no_scratch,
    .scan_forward = scan_forward,
    .scan_backward = scan_backward,
    .scan_scratch = no_scratch,
    .closed_loop_forward = closed_loop_forward,
    .closed_loop_backward = closed_loop_backward,
    .closed_loop_scratch = no_scratch,
    .rotate = rotate,
    .attention_forward = attention_forward,
    .attention_backward = attention_backward,
    .attention_scratch = no_scratch,
    .router_forward = router_forward,
    .router_losses = router_losses,
    .router_backward = router_backward,
    .router_scratch = no_scratch,
    .dispatch_plan = dispatch_plan,
    .dispatch_scratch = no_scratch,
    .expert_choice_plan = expert_choice_plan,
    .dispatch_forward = dispatch_forward,
    .dispatch_backward = dispatch_backward,
    .combine_forward = combine_forward,
    .combine_backward = combine_backward,
    .experts_forward = experts_forward,
    .experts_backward = experts_backward,
    .classifier = classifier,
    .softmax_forward = softmax_forward,
    .sum = sum,
    .sum_of_squares = sum_of_squares,
    .adamw = adamw,
};

}  // namespace plain
