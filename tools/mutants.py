#!/usr/bin/env python3
"""Plants small faults in the kernels of moemamba.cu, one at a time, and sees whether the tests notice: a test that cannot fail checks nothing.

Each fault replaces a fragment, which must occur exactly once in the function that it is listed under. The kernels are compiled with it,
linked with what the others share, and run through the tests of kernels under cpu/simt.h. Caught: a test fails, simt.h reports a fault, or
nothing comes back in time. Logs stay in build/mutants/, and what is known of a fault there is not tried again: a run that was stopped
goes on where it was."""
import argparse
import concurrent.futures
import hashlib
import itertools
import os
import re
import shlex
import subprocess
import sys
import time

TESTS = "[gpu],[traffic]"
LAYER_TESTS = "a layer gives the same on the GPU*"  # and of those, the ones of a layer
BUILD = "build/mutants"
# A function whose name begins so is tested on its own layer first; most faults show there, and only the others need all tests.
LAYERS = {"embedding|Embedding|sort_|bucket_of|counting_sort": "embedding", "rmsnorm|sum_warps": "rmsnorm", "slice": "slice_norm",
          "rotate": "rotate", "attention|Attention|PlainSum|TensorCoreSum|row_sum|row_max|HeadBlock|OnlineSum|with_parts": "attention", "linear|matmul": "linear", "conv|Conv|with_conv": "conv",
          "closed_loop|Loop|loop_": "closed_loop",
          "scan|Scan|exchange|load_states|store_states|load_decay|with_split|State": "scan",
          "route|Router|dispatch|Dispatch|gather|combine|expert|block_rank|bits_of": "moe", "swiglu": "feed-forward", "relu": "relu",
          "softmax_of_row|classifier": "classifier", "softmax_forward": "softmax", "sum_kernel|sum_all": "sum", "adamw": "adamw"}
# Compiling takes the time. No test of a layer in one of these groups comes through a function of another group: three faults, one from
# each, are compiled together, and tested each on its own layer.
TOGETHER = [{"scan"}, {"closed_loop"}, {"moe", "embedding", "linear", "feed-forward", "relu"}, {"conv", "rmsnorm", "slice_norm", "rotate", "attention", "classifier", "softmax", "sum", "adamw"}]

# function: [(name, fragment, replacement, why it is harmless if it is)]
FAULTS = {
    # ---- common parts
    "sigmoid": [("sign", "float(1 + exp_(-x))", "float(1 + exp_(x))")],
    "softplus": [
        ("threshold 2", "x <= 20", "x <= 2"),
        ("threshold 21", "x <= 20", "x <= 21", "between 20 and 21, log1p(exp(x)) - x < 2.1e-9, below half a unit in the last place of a float"),
        ("exp for log1p", "log1p_(exp_(x))", "log_(exp_(x))"),
    ],
    "with_width": [
        ("sizes of 2", "n % kWidth == 0", "n % 2 == 0"),
        ("no addresses", "std::all_of(addresses.begin(), addresses.end(), aligned)", "true"),
    ],
    "warp_sum": [("distance", "kWarp / 2", "kWarp / 4"), ("last step", "mask > 0", "mask > 1")],
    "warp_max": [("minimum", "other > x ?", "other < x ?"), ("distance", "kWarp / 2", "kWarp / 4")],
    "block_combine": [
        ("barrier 1", "of_warp[warp_id()] = x;\n    __syncthreads();", "of_warp[warp_id()] = x;"),
        ("barrier 2", "__syncthreads();  // of_warp", "// of_warp"),
        ("warps", "int(blockDim.x) / kWarp ?", "int(blockDim.x) / kWarp - 1 ?"),
        ("every warp", "lane_id() < int(blockDim.x) / kWarp ?", "lane_id() < kWarp ?"),
        ("maximum of nothing is 0", "kLowest : 0", "0 : 0"),
        ("second stage", "    x = maximum ? warp_max(x) : warp_sum(x);\n    __syncthreads();  //", "    __syncthreads();  //"),
    ],
    "reduce_partials_kernel": [
        ("every part", "p += kReduceRows", "p += 1"),
        ("last part", "p < parts", "p < parts - 1"),
        ("bounds", "i >= s.count) return", "i > s.count) return"),
        ("barrier", "__syncthreads();", ""),
        ("overwrites", "s.out[i] += sum", "s.out[i] = sum"),
        ("second row", "int y = 1", "int y = 2"),
        ("first sum alone", "blockIdx.y == 1 ? sums.sum[1]", "blockIdx.y == 1 ? sums.sum[0]"),
    ],
    "reduce_partials": [("too few blocks", "blocks_for(longest, kWarp)", "unsigned((longest + kWarp - 2) / kWarp)"),
                        ("one sum less", "unsigned(list.size())", "unsigned(std::max<size_t>(1, list.size() - 1))"),
                        ("the first is the longest", "std::max(longest, s.count)", "list.begin()->count", "every caller names its longest sum first")],

    # ---- counting sort
    "bucket_of": [("no shift", ">> s.shift", ">> 0"), ("no order", "s.items ? s.items[i] : int(i)", "int(i)")],
    "sort_count": [
        ("barrier 1", "found[t] = 0;\n    __syncthreads();", "found[t] = 0;"),
        ("barrier 2", "    __syncthreads();\n    s.counts", "    s.counts"),
        ("past the end", "min(first + kSortTile, int64_t(s.count))", "first + kSortTile"),
        ("stride", "i += kThreads", "i += 2 * kThreads"),
        ("no atomic", "atomicAdd(&found[bucket_of(s, i)], 1)", "found[bucket_of(s, i)] += 1"),
        ("empty slots", "i < s.slots;", "i < s.slots / 2;"),
        ("empty slots of later blocks", "i = int64_t(blockIdx.x) * kThreads + t; i < s.slots; i += int64_t(gridDim.x) * kThreads",
         "i = int64_t(blockIdx.x) * kThreads + t; i < s.slots; i += s.slots"),
    ],
    "sort_scan": [
        ("tiles not added", "total += n;", "total = n;"),
        ("not the tiles before", "* kBuckets + t] = total;", "* kBuckets + t] = 0;"),
        ("distance", "distance *= 2", "distance *= 4"),
        ("lane", ">= distance) upto", "> distance) upto"),
        ("barrier", "__syncthreads();", ""),
        ("own warp twice", "w < warp_id()", "w <= warp_id()"),
        ("bounds", "t >= s.buckets", "t > s.buckets"),
        ("load", "load[t] = total", "load[t] = upto"),
        ("first offset", "if (t == 0) s.offset[0] = 0;", ""),
        ("capacity", "(t + 1) * s.capacity", "t * s.capacity"),
    ],
    "sort_place": [
        ("rank counts itself", "(1u << lane_id()) - 1", "(2u << lane_id()) - 1"),
        ("last bit", "bit < kBuckets;", "bit < kBuckets / 2;"),
        ("peers", "set : ~set", "set : set"),
        ("idle lanes", "__ballot_sync(kAllLanes, here)", "kAllLanes",
         "only the lanes and warps behind the last item are idle: what they add to bucket 0's count is counted behind every item"),
        ("barrier 1", "rank_of[w][t] = 0;\n        __syncthreads();", "rank_of[w][t] = 0;"),
        ("barrier 2", "= __popc(peers);\n        __syncthreads();", "= __popc(peers);"),
        ("barrier 3", "next[t] = rank;\n        __syncthreads();", "next[t] = rank;"),
        ("barrier 4", "        }\n        __syncthreads();\n    }", "        }\n    }"),
        ("ranks start again", "next[t] = rank;\n", "\n"),
        ("not the tiles before", "next[t] = s.counts[int64_t(blockIdx.x) * kBuckets + t];", "next[t] = 0;"),
        ("one too many", "in_bucket < s.capacity", "in_bucket <= s.capacity"),
        ("dropped", "in_bucket : -1", "in_bucket : 0"),
    ],
    "sort_count_kernel": [("nothing", "{ sort_count(s); }", "{}")],
    "sort_scan_kernel": [("one tile", "sort_scan(s, tiles)", "sort_scan(s, 1)")],
    "sort_place_kernel": [("nothing", "{ sort_place(s); }", "{}")],
    "sort_kernel": [("no offset", "sort_scan(s, 1);", "")],
    "counting_sort": [("always one tile", "if (tiles == 1)", "if (tiles >= 1)")],

    # ---- matrix products and memory
    "matmul": [("accumulate", "accumulate ? 1 : 0", "0"), ("transposition", "op(a.transposed), n, m, k, &one, b.data, in, b.ld, a.data, in, a.ld, &keep",
                                                        "op(false), n, m, k, &one, b.data, in, b.ld, a.data, in, a.ld, &keep")],
    "zero": [("half", "memory, 0, bytes, stream", "memory, 0, bytes / 2, stream")],
    "copy": [("half", "to, from, bytes, cuda", "to, from, bytes / 2, cuda")],
    "linear_forward": [("accumulate", "l.I, accumulate", "l.I, false")],
    "linear_backward": [
        ("accumulate", "l.O, accumulate", "l.O, false"),
        ("weight overwritten", "add_weight, stream", "false, stream"),
        ("weight added to", "add_weight, stream", "true, stream"),
        ("ld", "{d_in, ld_d_in}", "{d_in, l.I}"),
    ],

    # ---- embedding
    "embedding_forward_kernel": [("rows", "row * C + c", "row * c + c"), ("stride", "c += blockDim.x * width", "c += blockDim.x")],
    "embedding_forward": [("one row less", "<width>, rows, row_threads", "<width>, rows - 1, row_threads")],
    "embedding_backward_kernel": [
        ("every position", "== token) return;", "== token && false) return;"),
        ("one round", "while (same == threads)", "while (false)"),
        ("not itself", "int i = first + threadIdx.y;", "int i = first + 1 + threadIdx.y;"),
        ("run past the end", "candidate < rows &&", "candidate <= rows &&"),
        ("overwrites", "auto total = load<width>(to)", "auto total = Reals<width>{}"),
        ("first group only", "y < groups", "y < 1"),
        ("rows of other groups", "i += groups", "i += 1"),
        ("barrier", "store(sums + thread * width, sum);\n        __syncthreads();", "store(sums + thread * width, sum);"),
        ("first vectors only", "begin += blockDim.x * width", "begin += C"),
    ],
    "embedding_backward": [
        ("one pass", "(V - 1) >> shift > 0", "(V - 1) >> shift > 1"),
        ("in place", "pass ^= 1", "pass ^= 0"),
    ],
    "EmbeddingScratch": [("counts", "int64_t(sort_tiles(rows)) * kBuckets", "kBuckets")],

    # ---- RMSNorm
    "rmsnorm_forward_kernel": [
        ("bounds", "row >= rows", "row > rows"),
        ("eps", "/ C + eps", "/ C"),
        ("mean", "warp_sum(squares) / C", "warp_sum(squares)"),
        ("branch", "x.v[j] += add.v[j]", "x.v[j] -= add.v[j]"),
        ("weight", "scale * w.v[j]", "scale"),
        ("stride", "c += kWarp * width) {\n        auto x = load<width>(sum", "c += 2 * kWarp * width) {\n        auto x = load<width>(sum"),
    ],
    "rmsnorm_forward": [("blocks", "blocks_for(rows, kNormWarps)", "blocks_for(rows, 2 * kNormWarps)")],
    "sum_warps": [("barrier", "__syncthreads();", ""), ("one warp less", "w < int(blockDim.x) / kWarp", "w < int(blockDim.x) / kWarp - 1")],
    "rmsnorm_backward_kernel": [
        ("not cleared", "store(mine + c, Reals<width>{})", "(void)mine"),
        ("not added up", "store(mine + c, sums)", "store(mine + c, d)"),
        ("sign", "- x.v[j] * pull", "+ x.v[j] * pull"),
        ("scale of the pull", "* scale * scale;", "* scale;"),
        ("scale of the weight's", "d.v[j] * x.v[j] * scale", "d.v[j] * x.v[j]"),
        ("weight in dot", "w.v[j] * d.v[j] * x.v[j]", "d.v[j] * x.v[j]"),
        ("rows of later rounds", "row += int64_t(gridDim.x) * warps", "row += rows"),
        ("d_branch", "store(d_branch + row * C + c, total)", "store(d_branch + row * C + c, d)"),
    ],
    "rmsnorm_backward": [("parts", "reduce_partials(blocks, {", "reduce_partials(blocks - 1, {"),
                         ("shared bytes", "warps * C * sizeof(real), stream", "(warps * C - 1) * sizeof(real), stream")],

    # ---- convolution
    "conv_layout": [("segments end early", "ceil_div(c.T, int64_t(steps) * kConvSegments)", "c.T / (int64_t(steps) * kConvSegments)")],
    "conv_thread": [
        ("past T", "t.end = t.active ? int(min(begin + layout.segment_steps, int64_t(c.T))) : 0;", "t.end = t.active ? int(begin + layout.segment_steps) : 0;"),
        ("past D", "t.d < c.D &&", "t.d <= c.D &&"),
        ("sequence", "t.b = t.part / layout.segment_blocks", "t.b = 0 * t.part"),
    ],
    "conv_input": [
        ("first input", "t >= 0)", "t > 0)"),
        ("oldest of the state", "t >= 1 - c.W", "t > 1 - c.W"),
        ("state's order", "c.W - 1 + t)", "- 1 - t)"),
    ],
    "ConvWindow": [
        ("taps reversed", "c.W + c.W - 1 - k", "c.W + k"),
        ("late", "thread.begin - taps + k", "thread.begin - taps + k + 1"),
        ("a tap less", "if (k < W) bias +=", "if (k < W - 1) bias +="),
        ("stands still", "x[i - 1] = x[i];", ";"),
        ("starts empty", "k > 0 && k > taps - c.W ?", "k > taps ?"),
    ],
    "conv_forward_kernel": [
        ("a step more", "if (t >= thread.end) break;", "if (t > thread.end) break;"),
        ("SiLU", "a * sigmoid(a)", "sigmoid(a)"),
        ("every segment's state", "if (final_state && thread.end == c.T)", "if (final_state)"),
        ("state's row", "i - (taps - W + 1)", "i - (taps - W + 2)"),
        ("bias", "window.sum(W, j, bias.v[j])", "window.sum(W, j, 0)"),
    ],
    "conv_forward": [("a block less", "blocks_for(int64_t(c.B) * layout.segment_blocks * layout.channel_blocks, 1)",
                      "blocks_for(int64_t(c.B) * layout.segment_blocks * layout.channel_blocks - 1, 1)"),
                     ("nothing only if both are empty", "c.B == 0 || c.T == 0", "c.B == 0 && c.T == 0")],
    "with_conv": [("taps", "c.W <= kConvTaps", "c.W <= kMaxConv")],
    "conv_backward_kernel": [
        ("derivative of SiLU", "1 + a * (1 - gate)", "1 - a * (1 - gate)"),
        ("a step twice", "if (t < thread.end) {", "if (t <= thread.end) {"),
        ("last gradients", "min(thread.end + W - 1, T)", "min(thread.end + W - 2, T)"),
        ("final state's", "s > T - W)", "s > T - W + 1)"),
        ("initial state's", "s >= 1 - W &&", "s > 1 - W &&"),
        ("barrier 1", "d_w[k < 0 ? 0 : k].v[j];\n        __syncthreads();", "d_w[k < 0 ? 0 : k].v[j];"),
        ("barrier 2", "            }\n        __syncthreads();\n    }", "            }\n    }"),
        ("a segment less", "y < kConvSegments", "y < kConvSegments - 1"),
        ("taps reversed", "channel * W + W - 1 - k", "channel * W + k"),
        ("bias's", "d_b.v[j] += d_a", "d_b.v[j] -= d_a"),
        ("window of gradients", "d_a[k - 1] = d_a[k];", "d_a[k - 1] = d_a[0];"),
    ],
    "conv_backward": [("bias's parts", "{d.d_bias, s.bias_parts, c.D}", "{d.d_bias, s.weight_parts, c.D}"), ("a part less", "reduce_partials(parts, {", "reduce_partials(parts - 1, {"),
                      ("nothing only if both are empty", "c.B == 0 || c.T == 0", "c.B == 0 && c.T == 0")],
    "conv_scratch": [("half", "D, W).used", "D, W).used / 2")],

    # ---- scan
    "exchange": [("gives what it keeps", "upper ? first : second, bit", "upper ? second : first, bit"), ("distance", "second, bit);", "second, bit / 2);")],
    "load_states": [("a state more", "if (n + j < N)", "if (n + j <= N)"), ("always wide", "vectors && n < N", "n < N")],
    "store_states": [("a state more", "if (n + j < N)", "if (n + j <= N)")],
    "load_decay": [("sign", "-kLog2e", "kLog2e"), ("past N", "n + j < N", "n + j < N - 1")],
    "ScanThread": [
        ("past T", "min(begin + in.segment_steps, in.T)", "begin + in.segment_steps"),
        ("segment", "begin = segment * in.segment_steps", "begin = 0 * in.segment_steps"),
        ("first segment", "segment = first_segment + blockIdx.z", "segment = blockIdx.z"),
        ("part", "part = lane_id() / warp_channels", "part = lane_id() / warp_channels ^ 1"),
        ("first state", "n = part * kStates", "n = part * (kStates - 1)"),
        ("row of a segment", "b() * in.segments + segment", "b() * in.segments"),
        ("row of a chunk", "b() * in.chunks + chunk", "b() + chunk"),
        ("a step past the end", "first + step < end ?", "first + step <= end ?"),
        ("channels past D", "min(in.D - d, kWidth)", "kWidth"),
        ("sequence", "b() * in.T + first + step}", "in.T * 0 + first + step}"),
        ("a channel more is read", "i < p.channels ? from[i]", "i <= p.channels ? from[i]"),
        ("a channel more is written", "if (i < p.channels) to[i]", "if (i <= p.channels) to[i]"),
        ("always written wide", "if (in.vectors && p.channels == kWidth) *reinterpret_cast<Vector*>(to)", "if (in.vectors) *reinterpret_cast<Vector*>(to)"),
        ("bias", "softplus(real(dt.v[i]) + bias[p.column + i])", "softplus(real(dt.v[i]))"),
        ("delta past the end", "i < p.channels ? softplus", "true ? softplus"),
        ("a step less of B and C", "exists = t < end &&", "exists = t < end - 1 &&"),
        ("B and C", "is_C = k % columns >= states", "is_C = k % columns > states"),
        ("a state more", "m < in.N &&", "m <= in.N &&"),
        ("swapped", "exchange(x[0], x[1], stride)", "exchange(x[1], x[0], stride)"),
        ("distance", "2 * stride", "stride"),
        ("more than 4 threads", "bit = 4; bit < split", "bit = 8; bit < split"),
        ("input", "h.v[j] + delta_u * B.v[j];\n    }\n    __device__ __forceinline__ void advance_four", "h.v[j] + delta_t * B.v[j];\n    }\n    __device__ __forceinline__ void advance_four"),
        ("output before input", "y[s] += C.v[j] * h.v[j]", "y[s] += C.v[j]"),
        ("skip", "sum + skip[channel] * real(u[own])", "sum"),
        ("gate", "gate * sigmoid(gate)", "sigmoid(gate)"),
        ("derivative of SiLU", "* gate * (1 + z_own", "* gate * (1 - z_own"),
        ("output of z's", "y_own + skip[channel] * u_own", "y_own"),
        ("skip's", "running.d_skip += g_own * u_own", "running.d_skip += g_own"),
        ("barrier: sums read", "__syncthreads();                              // warp_sums", "// warp_sums"),
        ("C's state", "g * h[s + 1].v[j], warp", "g * h[s].v[j], warp"),
        ("B's", "exchange(dh * delta_u,", "exchange(dh * delta_t,"),
        ("decayed state", "dh_a * h[s].v[j]", "dh_a * h[s + 1].v[j]"),
        ("delta's, of the decay", "dh_a_h * decay.v[j]", "dh_a_h"),
        ("A's", "dh_a_h * delta_t", "dh_a_h"),
        ("gradient does not decay", "running.dh.v[j] = dh_a;", "running.dh.v[j] = dh;"),
        ("output's gradient", "dh = running.dh.v[j] + g * C.v[j]", "dh = g * C.v[j]"),
        ("slope", "-expm1_(-delta_own)", "1"),
        ("u's skip", "delta_own * dh_B_own + skip[channel] * g_own", "delta_own * dh_B_own"),
        ("delta's, of the input", "u_own * dh_B_own + kLn2", "kLn2"),
        ("syncwarp", "__syncwarp();  //", "//"),
        ("another's step", "at(first + part % kScanSteps)", "at(first + (part + 1) % kScanSteps)"),
        ("sums over channels", "half = kStates / 2; bit", "half = kStates / 4; bit"),
        ("bias's", "running.d_bias += d_dt", "running.d_bias -= d_dt"),
        ("a warp less", "w < warps;", "w < warps - 1;"),
    ],
    "scan_forward_kernel": [
        ("barrier: first tile", "thread.finish_load(next, thread.begin, from_zero);\n    __syncthreads();", "thread.finish_load(next, thread.begin, from_zero);"),
        ("barrier: bias", "real delta_sum = 0;\n    __syncthreads();", "real delta_sum = 0;"),
        ("barrier: out", "        __syncthreads();\n        if (!from_zero && opaque", "        if (!from_zero && opaque"),
        ("barrier: next tile", "if (more) thread.finish_load(next, first + thread.steps, from_zero);\n        __syncthreads();", "if (more) thread.finish_load(next, first + thread.steps, from_zero);"),
        ("chunk states", "unsigned(first) % kScanChunk == 0", "first >= 0"),
        ("next tile", "start_load(next, first + thread.steps, from_zero)", "start_load(next, first + thread.steps + 1, from_zero)"),
        ("every segment's state", "if (thread.end == in.T) thread.store_row(final_state", "if (true) thread.store_row(final_state"),
        ("entering state", "first = in.segments == 1", "first = in.segments >= 1"),
        ("sum of deltas", "delta_sum += thread.delta", "delta_sum = thread.delta"),
    ],
    "scan_backward_from_zero_kernel": [
        ("order", "* (dh.v[j] + g_t * C.v[j])", "* dh.v[j] + g_t * C.v[j]"),
        ("barrier 1", "        __syncthreads();\n        UNROLL", "        UNROLL"),
        ("barrier 2", "delta_sum += delta_t;\n        }\n        __syncthreads();", "delta_sum += delta_t;\n        }"),
        ("sum of deltas", "delta_sum += delta_t", "delta_sum = delta_t"),
        ("gate", "* real(z.v[i]) * sigmoid", "* sigmoid"),
        ("last tile", "(thread.end - 1 - thread.begin) / thread.steps * thread.steps", "(thread.end - 1 - thread.begin) / thread.steps * thread.steps - thread.steps"),
    ],
    "scan_carry_kernel": [
        ("order", "reverse ? in.segments - 1 - k : k", "k"),
        ("sign", "exp_(A * scratch", "exp_(-A * scratch"),
        ("what was made", "* entering + scratch.segment_states[at]", "* entering"),
        ("nothing comes after the last", "k + 1 < in.segments ?", "k < in.segments ?"),
        ("first", "first ? first[i] : 0", "0"),
        ("bounds", "b >= in.B", "b > in.B"),
    ],
    "scan_step_kernel": [
        ("last shuffle", "mask > 0", "mask > 1"),
        ("skip", "y + in.skip[d] * u", "y"),
        ("gate", "* z * sigmoid(z)", "* sigmoid(z)"),
        ("bias", "+ in.dt_bias[d])", ")"),
        ("sequence", "in.C_t[b * in.ld_bc", "in.C_t[0 * b * in.ld_bc"),
        ("state", "if (in.initial_state) h", "if (false) h"),
        ("bounds", "group < int64_t(in.B) * in.D", "group <= int64_t(in.B) * in.D"),
        ("chunk state", "chunk_states + i * in.N, h,", "chunk_states + i * in.N, {},"),
    ],
    "scan_launch": [("half the steps", "segment_chunks * kScanChunk", "segment_chunks * kScanChunk / 2"),
                    ("vectors", "s.D % kWidth == 0 &&", ""), ("state vectors", "s.N % kStates == 0 &&", "")],
    "with_split": [("few threads", "N <= 16", "N <= 24")],
    "scan_forward": [("first state", "arrays, s.initial_state, in, false", "arrays, nullptr, in, false"), ("nothing only if both are empty", "s.B == 0 || s.T == 0", "s.B == 0 && s.T == 0")],
    "scan_step": [("threads of a step", "split * kStates < s.N", "2 * split * kStates < s.N")],
    "StateStack": [("push", "x[i - 1] = x[i];", ";"), ("pop", "x[i] = x[i - 1];", ";")],
    "scan_backward_kernel": [
        ("barrier: bias", "thread.segment_row());\n    __syncthreads();", "thread.segment_row());"),
        ("barrier: tile", "thread.load_chunk(d_out, chunk * kScanChunk);\n        __syncthreads();", "thread.load_chunk(d_out, chunk * kScanChunk);"),
        ("barrier: sums", "thread.backward_four(running, h, step);\n                __syncthreads();", "thread.backward_four(running, h, step);"),
        ("starts not popped", "h = before_4.pop();", ";"),
        ("groups not popped", "h = before_16.pop();", ";"),
        ("sums over threads", "bit < kScanSteps; bit *= 2", "bit < 2; bit *= 2"),
        ("every segment's initial state", "if (blockIdx.z == 0)", "if (true)"),
        ("arriving gradient", "last = in.segments == 1", "last = in.segments >= 1"),
        ("A's scale", "*= thread.decay.v[j] * kLn2", "*= thread.decay.v[j]"),
        ("threads write each other's sums", "if (!thread.has_channel() || thread.part > 0) return;", "if (!thread.has_channel()) return;"),
    ],
    "scan_backward_bc_kernel": [("a block less", "p < channel_blocks", "p < channel_blocks - 1"), ("B and C", "n < N ?", "n <= N ?"), ("bounds", "i >= count", "i > count")],
    "scan_backward": [
        ("not reversed", "d_final_state, in, true, stream", "d_final_state, in, false, stream"),
        ("final state's", "scan_carry(arrays, d_final_state", "scan_carry(arrays, nullptr"),
        ("segments", "reduce_partials(s.B * in.segments", "reduce_partials(s.B"),
        ("skip's parts", "{d.d_skip, arrays.skip", "{d.d_skip, arrays.bias"),
        ("nothing only if both are empty", "s.B == 0 || s.T == 0", "s.B == 0 && s.T == 0"),
    ],
    "scan_scratch": [("half", "D, N).used", "D, N).used / 2")],

    # ---- router
    "route": [
        ("no maximum", "exp_(p[i] - most)", "exp_(p[i])"),
        ("lse", "most + log_(sum)", "log_(sum)"),
        ("ties to the higher", "other_expert < expert)", "other_expert > expert)"),
        ("taken twice", "taken |= 1u", "taken |= 0u"),
        ("distance", "mask = kWarp / 2", "mask = kWarp / 4"),
        ("renormalised by one", "chosen_sum += best", "chosen_sum = best"),
        ("padding counts", "lane + i * kWarp < E ? exp_", "lane + i * kWarp <= E ? exp_",
         "past E lies the lowest number there is, whose exponential is the same 0"),
        ("best of the lane", "p[i] > best)", "p[i] < best)"),
    ],
    "router_split_kernel": [("bounds", "i >= count", "i > count", None, "bf16"), ("rest", "rest -= real(rounded);", "", None, "bf16"),
                            ("part", "parts[part * count + i]", "parts[i]", None, "bf16")],
    "router_split": [("half", "blocks_for(count, kThreads)", "blocks_for(count / 2, kThreads)", None, "bf16")],
    "router_forward_kernel": [
        ("bounds", "row >= rows", "row > rows"),
        ("first part alone", "part = kParts - 1", "part = 0", None, "bf16"),
        ("ld", "row * ld_logits", "row * E * kParts"),
    ],
    "router_few_kernel": [
        ("experts", "e += kThreads / kWarp", "e += kThreads"),
        ("half a row", "c < r.C;", "c < r.C / 2;"),
        ("row of x", "real(r.x[row * r.C + c])", "real(r.x[c])"),
        ("barrier", "__syncthreads();", ""),
        ("sum over lanes", "dot = warp_sum(dot);", ""),
    ],
    "RouterScratch": [("logits", "take<real>(int64_t(rows) * ld_logits)", "take<real>(rows)", None, "bf16"), ("ld", "ceil_div(E, 8) * 8);", "E / 8 * 8);")],
    "router_forward": [("blocks", "blocks_for(r.rows, kRouterWarps)", "blocks_for(r.rows, 2 * kRouterWarps)"),
                       ("rows of a few", "router_few_kernel, r.rows,", "router_few_kernel, 1,")],
    "router_losses_kernel": [
        ("share", "real(load[i % E]) / rows", "real(load[i % E])"),
        ("expert", "load[i % E]", "load[i % rows % E]"),
        ("square", "lse[i] * lse[i]", "lse[i]"),
        ("parts", "parts[gridDim.x + blockIdx.x]", "parts[gridDim.x - 1 + blockIdx.x]"),
    ],
    "router_losses_sum_kernel": [("overwrites", "losses[i] += sum", "losses[i] = sum"), ("parts", "parts[i * count + p]", "parts[p]"),
                                 ("a part less", "p < count", "p < count - 1")],
    "router_losses": [("scale", "real(E) / rows, real(1)", "real(1) / rows, real(1)")],
    "router_backward_kernel": [
        ("balance", "balance_weight * E *", "balance_weight *"),
        ("z", "z_weight * 2 *", "z_weight *"),
        ("softmax", "d_p[i] - dot + d_lse", "d_p[i] + d_lse"),
        ("pull", "row * K + k] - pull)", "row * K + k])"),
        ("sum of the chosen", "chosen_sum += out.probs", "chosen_sum = out.probs"),
        ("ld", "row * ld_d", "row * E"),
        ("bounds", "row >= rows", "row > rows"),
        ("gate's", "d_p[i] += d;", "d_p[i] = d;"),
        ("experts' choice", "if (K == 0 && e < E)", "if (K < 0)"),
    ],
    "router_backward": [("weight overwritten", "r.rows, true, stream", "r.rows, false, stream"), ("input overwritten", "r.E, true, stream", "r.E, false, stream")],

    # ---- closed loop
    "LoopTile": [("first barrier", "__syncthreads();  // the last one may be in use", ""), ("second barrier", "}\n        __syncthreads();\n        for (int t", "}\n        for (int t"),
                 ("third barrier", "            }\n        }\n        __syncthreads();\n    }", "            }\n        }\n    }"), ("length of B", "BB[t] += B[t][n] * B[t][n]", "BB[t] += B[t][n]"),
                 ("length of C", "CC[t] += C[t][n] * C[t][n]", "CC[t] += C[t][n] * B[t][n]"),
                 ("row of C", "s.C_t[(row + t)", "s.C_t[row")],
    "LoopThread": [("slowest", "A_log[i] < A_log[slowest]", "A_log[i] > A_log[slowest]"), ("time", "exp_(-A_log[slowest])", "exp_(A_log[slowest])"),
                   ("rho", "1 / ((slowest_time + delta)", "1 / (slowest_time"), ("lengths", "tile.BB[t] * tile.CC[t]", "tile.BB[t] * tile.BB[t]"), ("there", "channel < s.D;", "true;"), ("sum", "mask = lanes / 2", "mask = lanes / 4"), ("noise", "(c.plant.N + 1) + of", "c.plant.N + of"),
                   ("order of the past, loaded", "past[(c.tau - 1 - m) * kLoopThreads] = from", "past[m * kLoopThreads] = from"),
                   ("order of the past, stored", "(oldest + c.tau - 1 - m) % c.tau", "(c.tau - 1 - m)")],
    "loop_step": [("rho of v", "u + rho * (me.delay", "u + (me.delay"), ("rho of p", "p = delta * rho * tile", "p = delta * tile"),
                  ("sign", "k + c.alpha", "k - c.alpha"), ("above", "moved > c.kappa ? c.kappa", "moved > 2 * c.kappa ? c.kappa"),
                  ("below", "moved < -c.kappa ? -c.kappa", "moved < -2 * c.kappa ? -c.kappa"), ("eps", "e * e + c.eps * c.eps", "e * e + c.eps"),
                  ("state", "h.v[j] + delta * v", "h.v[j] + delta * u"), ("noise of the state", "c.state_noise * me.noise", "me.noise"),
                  ("noise of the output", "me.output_noise * me.noise", "me.noise"), ("gate of the state", "h.v[j] * inside *", "inside *")],
    "closed_loop_forward_kernel": [("no past", "past[m * kLoopThreads] = 0;", "past[m * kLoopThreads] = 1;"), ("newest", "newest = past[(c.tau - 1)", "newest = past[0 * (c.tau - 1)"),
                                   ("ring", "oldest + 1 < c.tau", "oldest < c.tau"), ("k_0", "if (c.gain) k += c.gain[me.d];", ""), ("final k", "k - (c.gain ?", "k - (!c.gain ?"),
                                   ("chunk", "+ begin / kLoopChunk, h", "+ 0 * begin, h")],
    "closed_loop_backward_kernel": [
        ("final gain", "d_gain -= d_k;", ""), ("initial gain", "d_gain += d_k;", ""), ("clip", "d_k = 0;  // clipped", ";"), ("carry", "kept.d_y(count + i) = kept.d_y(i);", ""),
        ("clear", "kept.d_y(i) = 0;\n        for", ";\n        for"), ("own outputs", "for (int i = 0; i < count; i++) kept.d_y(i) = 0;", ""),
        ("CB of C", "d_y * scaled + d_CB * B", "d_y * scaled"), ("CB of B", "* v + d_CB * C", "* v"), ("zeta", "+ d_inside * me.zeta.v[j]", ""),
        ("channels of a warp", "mask < kWarp; mask *= 2", "mask < kWarp / 2; mask *= 2"), ("absent channels", "me.there ? d_B.v[j] : 0", "d_B.v[j]"), ("barrier", "__syncthreads();\n        const int64_t block", "const int64_t block"),
        ("error of p", "d_p * rho * CB * e + v", "v"), ("error of k", "d_e -= d_action * k_t;", ""), ("smooth sign", "c.eps * c.eps / (length * length * length)", "1 / length"),
        ("delayed", "kept.d_y(t) += d_action * me.delay;", ""), ("A by A_log", "me.decay.v[j] * kLn2;  // A is", "kLn2;  // A is"), ("warps", "warp < kLoopThreads / kWarp; warp++", "warp < 1; warp++"),
        ("length of B", "(tile.CC[t] / size);", "(tile.BB[t] / size);"), ("length of C", "d_C.v[j] -= d_log", "d_C.v[j] += d_log"), ("dt of rho", " - d_time) *", ") *"),
        ("the slowest", "if (me.n + j == me.slowest) d_A.v[j] += d_slowest;", ""), ("rho of p", "(d_p * delta * CB * e + d_v * action)", "(d_v * action)"),
    ],
    "loop_lanes": [("too few", "lanes * kStates < N", "2 * lanes * kStates < N")],
    "LoopKept": [("numbers", "2 * (kMaxDelay + kLoopChunk);", "(kMaxDelay + kLoopChunk);")],
    "LoopParts": [("blocks", "blocks * B * T * 2 * N", "B * T * 2 * N")],
    "closed_loop_scratch": [("half", "N, tau))).used", "N, tau))).used / 2")],
    "closed_loop_forward": [("blocks", "blocks(c.plant.D, lanes), 1)", "blocks(c.plant.D, lanes) - 1, 1)")],
    "closed_loop_backward": [("a sequence less", "reduce_partials(s.B, {{d.plant.d_A_log", "reduce_partials(s.B - 1, {{d.plant.d_A_log"), ("rows", "parts.bc, blocks, rows", "parts.bc, blocks - 1, rows")],

    # ---- norms of slices, rotary positions, attention
    "slice_rstd": [("mean", "warp_sum(squares) / C", "warp_sum(squares)"), ("eps", "/ C + eps", "/ C")],
    "slice_norm_forward_kernel": [("row", "if (row >= n.rows) return;", "if (row > n.rows) return;"), ("weight", "* rstd * n.weight[c]", "* rstd"),
                                  ("lanes", "c += kWarp) out", "c += 2 * kWarp) out")],
    "slice_norm_backward_kernel": [
        ("pull", "* rstd * rstd;", "* rstd;"), ("weight in dot", "real(d[c]) * n.weight[c] * real(in[c]);\n        const", "real(d[c]) * real(in[c]);\n        const"),
        ("first row only", "row += int64_t(gridDim.x) * warps", "row += n.rows"),
        ("sums begin at 0", "mine[c] = 0", "mine[c] = 1"),
        ("its own sums", "d_weight + warp_id() * n.C", "d_weight"),
    ],
    "slice_norm_backward": [("blocks", "reduce_partials(blocks", "reduce_partials(blocks - 1")],
    "slice_norm_forward": [("rows", "blocks_for(n.rows, kNormWarps)", "blocks_for(n.rows / 2, kNormWarps)")],
    "rotate": [("rows", "ceil_div(rows, kRotateRows)", "ceil_div(rows - 1, kRotateRows)"), ("pairs", "r.heads) * (r.S / 2), kThreads) * row_blocks", "r.heads) * (r.S / 2), 2 * kThreads) * row_blocks")],
    "attention_scratch": [("queries", "nullptr, B, T, H, S)", "nullptr, B, 1, H, S)")],
    "AttentionScratch": [("parts", "(S + 2)", "S")],
    "rotate_kernel": [
        ("pair beyond", "if (pair >= r.heads * half) return;", "if (pair > r.heads * half) return;"), ("frequency", "-2.0 * i", "-1.0 * i"),
        ("sequence", "t = row % r.T", "t = row"), ("position", "double(r.position + t)", "double(t)"), ("whole turns stay", "real(angle - floor(angle))", "real(angle)"),
        ("back", "sine = -sine", "sine = sine"), ("second half", "real(x1) * cosine + real(x0) * sine", "real(x1) * cosine - real(x0) * sine"),
        ("a copy", "if (r.base == 0) {", "if (false) {"), ("stride", "b * stride_out", "b * r.T * ld_out"), ("last row", "first + kRotateRows, int64_t(r.B) * r.T", "first + kRotateRows, int64_t(r.B) * r.T - 1"),
        ("first rows only", "blockIdx.x % row_blocks) * kRotateRows", "0) * kRotateRows"),
    ],
    "TensorCoreSum": [("clear", "fill_fragment(sum, 0.0f)", "fill_fragment(sum, 1.0f)", None, "bf16"), ("a", "a_transposed, col_major", "!a_transposed, col_major", None, "bf16"),
                      ("b", "b_transposed, col_major", "!b_transposed, col_major", None, "bf16"),
                      ("places", "at.of[i] = int(number.x[i])", "at.of[i] = lane_id() * 8 + i", None, "bf16"), ("numbers", "    __syncthreads();", "", None, "bf16")],
    "PlainSum": [
        ("clear", "sum[i] = 0;", "sum[i] = 1;"), ("half of k", "k < kPiece; k++", "k < kPiece / 2; k++"),
        ("a", "a[k * ld_a + row] : a[row * ld_a + k]", "a[row * ld_a + k] : a[row * ld_a + k]"),
        ("b", "b[(column + i) * ld_b + k] : b[k * ld_b + column + i]", "b[k * ld_b + column + i] : b[k * ld_b + column + i]"),
    ],
    "AttentionTile": [
        ("rows beyond", "r < h.rows && c < columns(part)) x", "c < columns(part)) x"), ("columns beyond", "if (r < h.rows && c < columns(part)) x", "if (r < h.rows) x"),
        ("first part only", "part * kPart + c);\n            store", "c);\n            store"),
        ("in use", "__syncthreads();  // left and right may be in use", "// in use"), ("loaded", "load(right, b, part);\n            __syncthreads();", "load(right, b, part);"),
        ("kept", "if (!kept || S > kPart) load", "if (!kept) load"), ("last columns", "k < columns(part); k += kPiece)\n                        sums", "k < columns(part) - kPiece; k += kPiece)\n                        sums"),
        ("scores are there", "sums[n][e];\n        }\n        __syncthreads();", "sums[n][e];\n        }"),
        ("columns of sums", "if (i < kTile && j < columns(part))", "if (i < kTile && j + kPiece < columns(part))"), ("half the keys", "k < kTile; k += kPiece)\n                    sums", "k < kTile / 2; k += kPiece)\n                    sums"),
        ("transposed", "p + (transposed ? k * kLdScores + i : i * kLdScores + k)", "p + (i * kLdScores + k)"), ("rows written", "if (r < rows && c", "if (c"),
        ("columns written", "&& c < columns(part)) out", ") out"), ("factor", "factor ? sums[n][e] * factor[r] : sums[n][e]", "sums[n][e]"),
        ("sees the next", "c <= visible ? exp_(scores", "c <= visible + 1 ? exp_(scores"), ("scale", "* scale - lse)", "- lse)"), ("delta", "- delta) * scale", ") * scale"),
        ("scale of d_score", "- delta) * scale", "- delta)"),
    ],
    "attention_forward_kernel": [
        ("group", "group = h / (a.H / a.G)", "group = h % a.G"), ("past", "visible = a.past + t0", "visible = t0"), ("last keys", "keys = a.past + min(t0 + kTile, int64_t(a.T))", "keys = a.past + t0"),
        ("largest", "real most = largest", "real most = kLowest"), ("shrink", "exp_(largest - most);\n        total", "real(1);\n        total"), ("total", "total * shrink + row_sum(sum)", "total + row_sum(sum)"),
        ("right in use", "if (part > 0) __syncthreads();  //", "//"),
        ("values are there", "keys - j0}, block.first + part);\n            __syncthreads();", "keys - j0}, block.first + part);"), ("sums shrink", "*= factor[i + tile.at.row(e)]", "*= 1"),
        ("factor in use", "__syncthreads();  // factor is in use", "// factor is in use"), ("row of the sum", "row_sum(sum)", "sum"), ("lse", "largest + log_(total)", "largest"),
        ("rows of lse", "block.first == 0 && tile.row < rows)", "block.first == 0)"), ("end", "log_(total);\n    }\n    __syncthreads();", "log_(total);\n    }"), ("most of the row", "most = row_max(most);", ""),
    ],
    "row_sum": [("half", "kRowThreads / 2", "kRowThreads / 4")],
    "row_max": [("half", "kRowThreads / 2", "kRowThreads / 4")],
    "HeadBlock": [("one block", "S > parts * kPart ? 2 : 1", "1"), ("first part", "% blocks) * parts", "% blocks)"), ("beyond", "(first + part) * kPart < S", "part * kPart < S", "a part past the end loads zeros and stores nothing: it takes time")],
    "attention_delta_kernel": [("bounds", "if (i >= count) return;", "if (i > count) return;"), ("lanes", "s += kWarp", "s += 2 * kWarp")],
    "attention_d_scores": [
        ("rows beyond", "there ? visible : -1", "visible", "what such a row has of p meets a d_out of zeros"), ("d_out there", "if (tile.S > kPart) {", "if (false) {"), ("left in use", "{  // else it is there\n                __syncthreads();", "{"),
        ("loaded", "tile.load(tile.left, d_out, block.first + part);\n                __syncthreads();", "tile.load(tile.left, d_out, block.first + part);"), ("p in use", "__syncthreads();  // p is in use", "// p is in use"),
        ("lse of the row", "lse[int64_t(tile.row) * H]", "lse[0]"), ("delta of the row", "delta[int64_t(tile.row) * H]", "delta[0]"),
    ],
    "attention_backward_keys_kernel": [
        ("one head", "h < (group + 1) * (a.H / a.G); h++", "h < group * (a.H / a.G) + 1; h++"), ("one tile of queries", "t0 < a.T; t0 += kTile", "t0 < j0 + 1; t0 += kTile"),
        ("left in use", "__syncthreads();  // left may be in use", "// in use"), ("loaded", "tile.load(tile.left, q, block.first + part);\n                __syncthreads();", "tile.load(tile.left, q, block.first + part);"),
        ("diagonal", "t0 + tile.row - j0, lse", "t0 + tile.row - j0 + 1, lse"), ("d_v", "k.rows, sum_v[part]", "k.rows, sum_k[part]"),
    ],
    "attention_backward_queries_kernel": [
        ("one tile of keys", "j0 <= t0; j0 += kTile", "j0 <= 0; j0 += kTile"), ("right in use", "__syncthreads();  // right may be in use", "// in use"),
        ("loaded", "tile.load(tile.right, k, block.first + part);\n            __syncthreads();", "tile.load(tile.right, k, block.first + part);"), ("group", "group = h / (a.H / a.G)", "group = h % a.G"),
        ("diagonal", "t0 + tile.row - j0, lse", "t0 + tile.row - j0 - 1, lse"),
    ],
    "OnlineSum": [("total", "total *= by;", ""), ("sums", "sum[n].v[i] *= by", "sum[n].v[i] *= 1")],
    "attention_step_kernel": [
        ("group", "group = h / (a.H / a.G)", "group = h % a.G"), ("share", "first = which * share", "first = 0"), ("last", "min(first + share, a.past + a.T)", "first + share"),
        ("scale", "score * scale - most)", "score - most)"), ("largest", "mine.largest = most;", ""), ("shrink", "mine.scale(exp_(mine.largest - most));\n        mine", "mine"),
        ("all groups", "const real most = block_max(mine.largest);", "const real most = mine.largest;"), ("groups of a warp", "mask < kWarp; mask *= 2", "mask < kWarp / 2; mask *= 2"),
        ("turns", "__syncthreads();\n        total", "total"), ("first turn", "(w == 0 ? 0 : of_columns[s])", "of_columns[s]"), ("divided", "of_columns[s] / total", "of_columns[s]"),
        ("last warp", "w < kWarps; w++", "w < kWarps - 1; w++"), ("lanes of a key", "int mask = lanes / 2", "int mask = lanes / 4"), ("beyond", "if (j >= last) continue;", ""),
    ],
    "attention_step_sum_kernel": [("largest", "most = max(most, mine[n * (S + 2)]);", "most = mine[n * (S + 2)];",
                                   "exponents differ by what two shares' largest scores do, and the quotient is the same"),
                                  ("first share", "int n = 0; n < shares; n++) total", "int n = 1; n < shares; n++) total"), ("shrink", "2 + s] * exp_(mine[n * (S + 2)] - most)", "2 + s]"),
                                  ("last share", "int n = 0; n < shares; n++) sum", "int n = 0; n < shares - 1; n++) sum")],
    "attention_step": [("one share", "share = ceil_div(a.keys(), attention_shares(a.B, a.H, a.keys()))", "share = ceil_div(a.keys(), attention_shares(a.B, a.H, a.keys())) - 1")],
    "attention_forward": [("tiles", "ceil_div(a.T, kTile) * a.B", "(ceil_div(a.T, kTile) - 1) * a.B")],
    "attention_backward": [("scratch", "AttentionScratch(scratch, a.B, a.T, a.H, a.S).delta", "static_cast<real*>(nullptr)"), ("queries", "blocks_for(tiles * a.B * a.H * blocks, 1)", "blocks_for(tiles * a.B * a.G * blocks, 1)")],

    # ---- dispatch and combine
    "dispatch_plan": [("empty slots", ".slots = slots", ".slots = 0"), ("capacity", ".capacity = to.capacity", ".capacity = 0"),
                      ("scratch", "const DispatchScratch s(scratch, choices)", "const DispatchScratch s(static_cast<char*>(scratch) + 256, choices)")],
    "block_rank": [("itself too", "<< lane_id()) - 1)", "<< lane_id()))"), ("warps", "w < warp_id() ?", "w <= warp_id() ?"),
                   ("all", "all += of_warp[w]", "all = of_warp[w]")],
    "expert_choice_kernel": [
        ("wanted one less", "wanted = to.capacity;", "wanted = to.capacity - 1;"),
        ("not cleared", "found[t] = 0;", ""),
        ("other prefixes", "p >> shift >> 8 == last >> shift >> 8", "true"),
        ("a bucket too many", "bucket = t + 1;", "bucket = t;"),
        ("not enough", "above + found[t] >= wanted", "above + found[t] > wanted"),
        ("wanted stays", "wanted -= reached[1];", ""),
        ("all equal ones", "rank < wanted", "true"),
        ("no equal one", "(is_last && rank < wanted)", "false"),
        ("equal ones before", "equal += now_equal;", ""),
        ("taken before", "taken += now_taken;", ""),
        ("not taken", "take ? slot : -1", "slot"),
        ("last offset", "to.offset[to.E] = to.E * to.capacity", "to.offset[to.E] = 0"),
        ("load", "to.load[e] = to.capacity", "to.load[e] = 0"),
    ],
    "expert_choice_plan": [("an expert less", "to.E, kThreads, 0", "to.E - 1, kThreads, 0")],
    "dispatch_forward_kernel": [("row of the choice", "from / K", "from"), ("empty slots", "from < 0 ?", "from < -1 ?")],
    "dispatch_forward": [("slots", "to.slots(), row", "to.slots() - 1, row")],
    "dispatch_backward": [("accumulate", "C, accumulate", "C, false")],
    "gather_kernel": [
        ("dropped", "if (s < 0) continue;", "if (s < -1) continue;"),
        ("gate", "gate * x.v[j]", "x.v[j]"),
        ("overwrites", "if (accumulate) sum", "if (false) sum"),
        ("first choice only", "k < K;", "k < 1;"),
    ],
    "gather": [("rows", "<width>, to.rows, row", "<width>, to.rows - 1, row")],
    "combine_forward": [("accumulate", "accumulate, stream);", "false, stream);")],
    "combine_backward_kernel": [
        ("gate", "d.v[j] *= gate", "d.v[j] *= 1"),
        ("row of the choice", "from / K", "from"),
        ("gate's gradient", "dot += d.v[j] * x.v[j];\n                d.v[j] *= gate;", "d.v[j] *= gate;\n                dot += d.v[j] * x.v[j];"),
        ("partial dot", "dot = block_sum(dot);", ""),
    ],
    "combine_backward": [("dropped choices", "zero(d_gates,", "if (false) zero(d_gates,")],

    # ---- experts
    "expert_rows": [("rows", "e.host_offset[expert + 1] - e.host_offset[expert]", "1")],
    "experts_few_kernel": [
        ("bounds", "o >= e.O", "o > e.O"),
        ("expert's weight", "int64_t(expert) * e.O + o", "int64_t(o)"),
        ("stride", "i += kWarp * width", "i += 2 * kWarp * width"),
        ("slots together", "first += kTogether", "first += 2 * kTogether"),
        ("last slot", "first + s >= last", "first + s + 1 >= last"),
        ("sum over lanes", "warp_sum(sums[s])", "sums[s]"),
        ("slot of the output", "out[int64_t(first + s) * e.O + o]", "out[int64_t(first) * e.O + o]"),
    ],
    "experts_forward": [("weight", "In{e.weight + i * one, e.I}.t()", "In{e.weight, e.I}.t()"), ("stride", "In{e.weight, e.I, one}.t()", "In{e.weight, e.I, 0}.t()"),
                        ("last expert", "i < e.to.E;", "i < e.to.E - 1;"), ("outputs of a few", "blocks_for(e.O, kFewWarps)", "blocks_for(e.O, 2 * kFewWarps)")],
    "experts_backward": [
        ("weight overwritten", "int(capacity), add_weight", "int(capacity), false"),
        ("weight added to", "int(capacity), add_weight", "int(capacity), true"),
        ("weight overwritten without capacity", "count, add_weight", "count, false"),
        ("weight added to without capacity", "count, add_weight", "count, true"),
        ("idle experts", "else if (!add_weight)", "else if (false)"),
        ("stride", "const In d{d_out, e.O, capacity * e.O}", "const In d{d_out, e.O, capacity * e.I}"),
        ("weight", "Gradient{d_weight + i * one, e.I}", "Gradient{d_weight, e.I}"),
    ],

    # ---- activations
    "swiglu_forward_kernel": [("halves", "2 * F + F + f", "2 * F + f"), ("gate", "*= sigmoid(gate.v[j]) * up", "= sigmoid(gate.v[j]) * up")],
    "swiglu_forward": [("alignment", "with_width({F}", "with_width({2 * F}")],
    "swiglu_backward_kernel": [("derivative", "1 + g * (1 - s)", "1 + g * s"), ("up", "d.v[j] * g * s", "d.v[j] * s"), ("halves", "+ F + f, up)", "+ F + f, gate)")],
    "swiglu_backward": [("rows", "<width>, rows,", "<width>, rows - 1,")],
    "relu_forward_kernel": [("minimum", "<= 0 ? 0", ">= 0 ? 0"), ("bounds", "i >= count", "i > count")],
    "relu_forward": [("blocks", "blocks_for(count, kThreads * width)", "blocks_for(count, 2 * kThreads * width)")],
    "relu_backward_kernel": [("input", "x.v[j] <= 0 ?", "d.v[j] <= 0 ?"), ("bounds", "i >= count", "i > count")],
    "relu_backward": [("alignment", "with_width({count}", "with_width({0 * count}")],

    # ---- classifier
    "softmax_of_row": [
        ("scale of the sum", "sum *= exp_(most - larger);", ""),
        ("sign", "exp_(most - larger)", "exp_(larger - most)"),
        ("padding", "if (c + j < V) sum", "if (c + j <= V) sum"),
        ("threads' maxima", "sum * exp_(most - of_all)", "sum"),
        ("scale", "c + j < V ? x.v[j] * scale", "c + j < V ? x.v[j]"),
        ("stride", "c += blockDim.x * width", "c += 2 * blockDim.x * width"),
    ],
    "classifier_kernel": [
        ("ignored rows", "target < 0", "target < -1"),
        ("ignored loss", "if (threadIdx.x == 0) losses[r] = 0;", ""),
        ("ignored gradient", "store(row + c, Reals<width>{})", "(void)c"),
        ("target", "c + j == target ? d_loss : 0", "c + j == target ? 1 : 0"),
        ("loss", "log_(s.sum) - at_target", "log_(s.sum) + at_target"),
        ("scale", "d_loss / s.sum", "1 / s.sum"),
        ("kept as they are", "if (d_loss == 0) return;", ""),
        ("padding", "c + j < V ? exp_", "c + j <= V ? exp_"),
        ("target read late", "losses[r] = s.most + log_(s.sum) - at_target;\n    if (d_loss == 0) return;",
         "losses[r] = s.most + log_(s.sum);\n    if (d_loss == 0) return;"),
    ],
    "classifier": [("rows", "<width>, rows, row", "<width>, rows - 1, row"), ("alignment", "with_width({ld}", "with_width({kWidth * ld}")],
    "softmax_forward_kernel": [("scale", "real(row[c]) * scale", "real(row[c])"), ("rows", "probs[r * V + c]", "probs[r * ld + c]")],
    "softmax_forward": [("temperature", "1 / temperature", "temperature")],

    # ---- sums and the optimizer
    "sum_kernel": [("squares", "squares ? x.v[j] * x.v[j] : x.v[j]", "x.v[j] * x.v[j]"), ("stride", "gridDim.x) * kThreads * width", "gridDim.x) * kThreads"),
                   ("one lane", "sum += sums.v[j]", "sum = sums.v[j]")],
    "sum_all": [("parts", "reduce_partials(blocks, {", "reduce_partials(blocks - 1, {")],
    "adamw_kernel": [
        ("first moment", "f.new1 * g;", "f.beta1 * g;"),
        ("second moment", "f.new2 * g * g", "f.new2 * g"),
        ("decay's sign", "+ f.weight_decay", "- f.weight_decay"),
        ("eps", "+ f.eps)", ")"),
        ("scale", "f.grad_scale * g_i.v[j]", "g_i.v[j]"),
        ("bias correction", "v_i.v[j] * f.v_scale", "v_i.v[j] * f.m_scale"),
        ("bounds", "i >= count", "i > count"),
        ("weight", "store(weight + i, w)", "store(weight + i, m_i)"),
    ],
    "adamw": [("step", "std::pow(o.beta1, step)", "std::pow(o.beta1, step + 1)"), ("digits", "real(1 - o.beta2)", "1 - real(o.beta2)")],
    "rmsnorm_scratch": [("half", "C).used", "C).used / 2")],
    "embedding_scratch": [("half", "rows).used", "rows).used / 2")],
    "router_scratch": [("half", "E).used", "E).used / 2")],
    "dispatch_scratch": [("none", "choices).used", "choices).used * 0")],
}


class Fault:
    def __init__(self, number, function, name, old, new, harmless=None, precision="float"):
        self.number, self.function, self.old, self.new, self.harmless, self.precision = number, function, old, new, harmless, precision
        self.layer = next((layer for names, layer in LAYERS.items() if re.match(names, function)), None)
        self.name = f"{function}: {name}"


def faults():
    return [Fault(number, function, *fields) for number, (function, fields) in enumerate(((f, x) for f, all in FAULTS.items() for x in all), 1)]


def kernel_part(source):
    """moemamba.cu before, within and after namespace gpu."""
    begin, end = source.index("\nnamespace gpu {"), source.index("}  // namespace gpu\n") + len("}  // namespace gpu\n")
    return source[:begin], source[begin:end], source[end:]


def region(source, function):
    """The definition of a function or struct: from a line that starts at the margin to the next closing brace there."""
    found = list(re.finditer(rf"^(?:struct|class) {function}\b[^;\n]*{{$|^(?![ #/])[^\n]*\b{function}\((?=[^{{;]*{{)", source, re.M))
    if len(found) != 1:
        raise LookupError(f"{function}: defined {len(found)} times")
    begin = found[0].start()
    return begin, source.index("\n}", begin)


def plant(source, fault):
    begin, end = region(source, fault.function)
    pattern = re.compile(r"\s+".join(re.escape(word) for word in fault.old.split()))  # however it is indented
    found = list(pattern.finditer(source, begin, end))
    if len(found) != 1:
        raise LookupError(f"{fault.name}: its fragment occurs {len(found)} times: {fault.old!r}")
    return source[:found[0].start()] + fault.new + source[found[0].end():]


def uncovered(source):
    """Kernels and functions of the table that no fault is listed for."""
    kernels = re.findall(r"\b(\w+_kernel)\((?=[^;{]*\) {)", source)
    table = re.findall(r"^    \.(\w+) = \1,", source, re.M)
    plain = {"machine", "open", "allocate", "release", "allocate_host", "release_host", "upload", "upload_later", "download", "synchronize", "sum", "sum_of_squares"}  # calls of one line
    return sorted(set(kernels + table) - plain - set(FAULTS))


def run(command, **options):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **options)


class Base:
    """What all faults of a precision share: the objects, the commands, and how long the tests take without a fault."""
    def __init__(self, precision, source):
        self.directory = f"{BUILD}/{precision}"
        make = ["make", "--no-print-directory", "-j2", "CUDA=0", f"PRECISION={precision}", f"BUILD={self.directory}", "OPTIMIZE=-O1"]
        program = f"{self.directory}/test_kernels"
        built = run(make + [program])
        if built.returncode:
            sys.exit(f"{built.stdout}\n{program} cannot be built")
        compile, link = run(make + ["-n", "-W", "moemamba.cu", program]).stdout.strip().splitlines()
        # -Og compiles a third faster than -O1, and so does a header compiled once.
        self.compile = shlex.split(compile) + ["-Og", "-g0", "-w"]
        self.compile.insert(1, f"-I{self.directory}")
        self.build("moemamba.h", f"{self.directory}/moemamba.h.gch", "c++-header")
        # The Model lies behind the kernels in the same file: it is compiled once.
        before, _, after = kernel_part(source)
        includes = "\n".join(line for line in before.splitlines() if line.startswith("#include"))
        host = f"{self.directory}/host.o"
        with open(host[:-2] + ".cu", "w") as file:
            file.write(f"{includes}\nnamespace gpu {{ std::string problem(bool& absent); }}\n{after}")
        self.build(host[:-2] + ".cu", host)
        self.link = shlex.split(link)
        self.link.insert(self.link.index(f"{self.directory}/moemamba.o"), host)
        # What the result depends on besides the kernels.
        files = ["moemamba.h", "test_kernels.cu", "cpu/plain.cpp", "cpu/layers.cpp", "cpu/simt.h"]
        self.rest = after + "".join(open(name).read() for name in files)
        self.limit = 1200
        none, kernels = f"{self.directory}/none", before + kernel_part(source)[1]
        result, seconds = self.known(none, kernels) or self.keep(none, kernels, *self.test(none, kernels))
        if result != "alive":
            sys.exit(f"the tests fail without any fault: {seconds}")
        self.limit = 30 + 5 * float(seconds)

    def build(self, source, object, language="c++"):
        replaced = {"moemamba.cu": source, f"{self.directory}/moemamba.o": object, "c++": language}
        compiled = run([replaced.get(word, word) for word in self.compile])
        if compiled.returncode:
            raise RuntimeError(compiled.stdout)

    def key(self, kernels):
        return hashlib.sha256((self.directory + kernels + self.rest).encode()).hexdigest()

    def known(self, directory, kernels):
        """The result of an earlier test of these kernels, and what was told of it; None if there was none."""
        file = f"{directory}/result"
        said = open(file).read().split("\n", 2) if os.path.exists(file) else [""]
        return (said[1], said[2]) if said[0] == self.key(kernels) else None

    def keep(self, directory, kernels, result, what):
        os.makedirs(directory, exist_ok=True)
        with open(f"{directory}/result.tmp", "w") as out:
            out.write(f"{self.key(kernels)}\n{result}\n{what}")
        os.replace(f"{directory}/result.tmp", f"{directory}/result")
        return result, what

    def program(self, directory, kernels):
        """Their tests, compiled and linked."""
        os.makedirs(directory, exist_ok=True)
        with open(f"{directory}/moemamba.cu", "w") as file:
            file.write(kernels)
        object, program = f"{directory}/moemamba.o", f"{directory}/test_kernels"
        self.build(f"{directory}/moemamba.cu", object)
        replaced = {f"{self.directory}/moemamba.o": object, f"{self.directory}/test_kernels": program}
        linked = run([replaced.get(word, word) for word in self.link])
        os.remove(object)
        if linked.returncode:
            raise RuntimeError(linked.stdout)
        return program

    def failure(self, program, directory, layer):
        """Of the tests of one layer, or if it is None of all: what the first failure says; None if there is none."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"MOEMAMBA_TEST_LAYER": layer} if layer else {})}
        try:
            tests = run([program, LAYER_TESTS if layer else TESTS, "--abort"], timeout=self.limit, env=environment)
        except subprocess.TimeoutExpired:
            return f"not done in {self.limit:.0f} s"
        with open(f"{directory}/log", "w") as file:
            file.write(tests.stdout)
        return first_failure(tests.stdout) if tests.returncode else None

    def test(self, directory, kernels, layer=None):
        """caught, alive or broken; and by what, or how long the tests took"""
        try:
            program = self.program(directory, kernels)
        except RuntimeError as error:
            return "broken", next((line for line in str(error).splitlines() if "error" in line), str(error)[:200])
        start = time.monotonic()
        what = (layer and self.failure(program, directory, layer)) or self.failure(program, directory, None)
        os.remove(program)
        return ("caught", what) if what else ("alive", f"{time.monotonic() - start:.0f}")

    def screen(self, directory, kernels, faults):
        """All of these faults in one program: which of them do their own layers' tests catch?"""
        try:
            program = self.program(directory, kernels)
        except RuntimeError:
            return {}  # each by itself shows which
        caught = {fault: self.failure(program, directory, fault.layer) for fault in faults}
        os.remove(program)
        return {fault: what for fault, what in caught.items() if what}


def first_failure(log):
    report = re.search(r"^simt: (.*)", log, re.M)
    if report:
        return f"simt.h: {report[1]}"
    section = re.search(r"^-{70,}\n(?:.*\n)*?(.*)\n-{70,}\n", log, re.M)
    which = re.search(r"^  (.* against .*|\S+: \S.*)$", log, re.M)
    return " | ".join(part[1].strip() for part in (section, which) if part) or "exit code"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", default="", help="faults whose name matches")
    parser.add_argument("--list", action="store_true", help="lists the faults and checks that each can be planted")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
    source = open("moemamba.cu").read()
    before, kernels, _ = kernel_part(source)

    chosen = [f for f in faults() if re.search(arguments.only, f.name)]
    planted, misplaced = {}, [f"{name}: has no fault listed" for name in uncovered(kernels)]
    for fault in chosen:
        try:
            planted[fault] = plant(kernels, fault)
        except LookupError as error:
            misplaced.append(str(error))
    for line in misplaced:
        print(f"MISPLACED {line}")
    if arguments.list:
        for fault in chosen:
            print(f"{fault.number:3} {fault.name:60} {fault.old!r} -> {fault.new!r}" + (f"  (harmless: {fault.harmless})" if fault.harmless else ""))
    if arguments.list or misplaced:
        print(f"{len(chosen)} mutants, {len(misplaced)} misplaced")
        return 1 if misplaced else 0

    bases = {precision: Base(precision, source) for precision in sorted({f.precision for f in planted})}
    start = time.monotonic()
    results = {}

    def examine(faults):
        """Those whose result is not known: together first, if they are several, then each that this did not catch."""
        results = {}
        for fault in faults:
            results[fault] = bases[fault.precision].known(f"{BUILD}/{fault.number}", before + planted[fault])
        unknown = [fault for fault in faults if not results[fault]]
        caught = {}
        if len(unknown) > 1:
            together = kernels
            for fault in unknown:
                together = plant(together, fault)
            caught = bases[unknown[0].precision].screen(f"{BUILD}/{unknown[0].number}", before + together, unknown)
        for fault in unknown:
            base, directory, source = bases[fault.precision], f"{BUILD}/{fault.number}", before + planted[fault]
            result = ("caught", caught[fault]) if fault in caught else base.test(directory, source, fault.layer)
            results[fault] = base.keep(directory, source, *result)
        return results

    lists = [[fault for fault in planted if fault.precision == "float" and fault.layer in layers] for layers in TOGETHER]
    batches = [[fault for fault in batch if fault] for batch in itertools.zip_longest(*lists)]
    batches += [[fault] for fault in planted if fault not in sum(lists, [])]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for done in concurrent.futures.as_completed([pool.submit(examine, batch) for batch in batches]):
            for fault, (result, what) in done.result().items():
                if result == "alive":
                    what = ""
                if result == "alive" and fault.harmless:
                    result, what = "harmless", fault.harmless
                elif fault.harmless:
                    result, what = "broken", f"said to be harmless ({fault.harmless}), but {result}: {what}"
                results[fault] = result, what
                print(f"{len(results):3}/{len(planted)} {result:8} {fault.name}" + (f": {what}" if what else ""), flush=True)

    count = {kind: sum(result == kind for result, _ in results.values()) for kind in ("caught", "harmless", "alive", "broken")}
    for kind in ("harmless", "broken", "alive"):
        for fault, (result, what) in results.items():
            if result == kind:
                print(f"{kind.upper()} {fault.name}: {fault.old!r} -> {fault.new!r}" + (f": {what}" if what else ""))
    print(f"{time.monotonic() - start:.0f} s")
    print(f"{len(results)} mutants: {count['caught']} caught, {count['harmless']} harmless (argued), {count['alive']} alive"
          + (f", {count['broken']} that do not compile or are not harmless" if count["broken"] else ""))
    return 1 if count["alive"] or count["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
