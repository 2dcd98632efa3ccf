#!/usr/bin/env python3
"""Writes the reference files (*.safetensors, beside this script) that the C++ tests compare our layers with.

Three rules hold in every file:
  - the gradient of the tensor X is stored as X.grad; given upstream gradients are called dout, dh_last, ...
  - activations are (B, T, C), row-major; real numbers are float64, integers int32
  - sizes, options and library versions are strings in __metadata__
mamba_mixer, mamba_lm, mixtral_lm, jamba_lm, switch, mixtral and jamba_moe come from the transformers library; the others from PyTorch.
The functions rms_norm ... moe below are this project's definitions in plain PyTorch. They produce
layers.safetensors, and every output and gradient that transformers gives is first held against them, to 1e-12 of its size:
the check that the library and our facts agree, and that no float32 is left on the library's way.
"""
import contextlib, json, math, os, struct, sys

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import torch.nn.functional as F
import transformers
from transformers import (JambaConfig, JambaForCausalLM, MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM,
                          SwitchTransformersConfig)
from transformers.cache_utils import DynamicCache
from transformers.models.jamba import modeling_jamba as jamba
from transformers.models.mamba import modeling_mamba as hf_mamba
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.switch_transformers import modeling_switch_transformers as switch

transformers.logging.set_verbosity_error()  # else it warns that its CUDA kernels are missing
torch.set_num_threads(1)  # one order of summation: the same bits every time
torch.use_deterministic_algorithms(True)
torch.set_default_dtype(torch.float64)  # modules are then built in float64
FOLDER = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
VERSIONS = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
summary = []


@contextlib.contextmanager
def float32_is_float64():
    """transformers casts to float32 inside: A, D, the dt bias, B, u and the recurrent state (Mamba), the norms, the residual
    stream, the logits, the routers' softmax and the balancing losses. While this is in force those casts give float64."""
    saved = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved


def save(name, tensors, **metadata):
    """Writes one file. (safetensors' own writer puts the metadata in a random order; here the same run gives the same bytes.)"""
    header = {"__metadata__": {k: str(v) for k, v in sorted({**metadata, **VERSIONS}.items())}}
    data = b""
    for key, t in sorted(tensors.items(), key=lambda kv: (not kv[1].is_floating_point(), kv[0])):  # float64 first: aligned
        t = t.detach().contiguous() if t.is_floating_point() else t.to(torch.int32).contiguous()
        assert t.dtype in (torch.float64, torch.int32), key
        assert not t.is_floating_point() or torch.isfinite(t).all(), key
        raw = t.numpy().tobytes()
        dtype = "F64" if t.is_floating_point() else "I32"
        header[key] = {"dtype": dtype, "shape": list(t.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(FOLDER, name), "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)
    summary.append((name, 8 + len(text) + len(data), len(tensors)))


def agree(what, got, want):
    """got, of the library, equals want, of our definition."""
    assert got.dtype == torch.float64 and got.shape == want.shape, what
    error = ((got - want).abs().max() / (want.abs().max() + 1e-30)).item()
    assert error < 1e-12, f"{what}: the library differs from our definition by {error:.1e}"


def with_grads(tensors, loss, also=()):
    """tensors, and for each leaf among them (and each extra name in also) its gradient of loss, as NAME.grad."""
    names = [n for n, t in tensors.items() if t.requires_grad and (t.is_leaf or n in also)]
    grads = torch.autograd.grad(loss, [tensors[n] for n in names], retain_graph=True)
    return {**tensors, **{n + ".grad": g for n, g in zip(names, grads)}}


class Random:
    """A fixed sequence of random numbers: r(2, 3) is normal; leaf(...) is the same, to be differentiated."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, scale=1.0):
        return torch.randn(*shape, generator=self.generator) * scale

    def leaf(self, *shape, scale=1.0, plus=0.0):
        return (self(*shape, scale=scale) + plus).requires_grad_()

    def ints(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator)


# ---------------------------------------------------------------- our definitions

def rms_norm(x, weight, eps=1e-5):
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def conv1d_silu(x, weight, bias, state):
    """x (B,T,D), weight (D,K), state (B,K-1,D): the inputs before x, oldest first. Returns silu(conv), the last K-1 inputs."""
    K, T = weight.shape[1], x.shape[1]
    seen = torch.cat([state, x], 1)
    return F.silu(bias + sum(seen[:, k:k + T] * weight[:, k] for k in range(K))), seen[:, T:]


def scan(u, dt_raw, dt_bias, A, B, C, D, z, h):
    """u, dt_raw, z (B,T,D); A (D,N); B, C (B,T,N); h (B,D,N) the state. Returns y before the gate, y * silu(z), the last state."""
    dt = dt_raw + dt_bias
    dt = torch.where(dt <= 20, torch.log1p(torch.exp(dt.clamp(max=20))), dt)
    ys = []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1) + D * u[:, t])
    y = torch.stack(ys, 1)
    return y, y * F.silu(z), h


def closed_loop(u, dt_raw, dt_bias, A, B, C, D, z, gain, delay, zeta, gamma, state, alpha, kappa, eps):
    """scan, in a closed loop (the equations are in moemamba.h); state (B,D,N+2+tau): h, what the gain has become beyond `gain`,
    the pending gradient of the error, the last outputs, newest first. Returns y before the gate, y * silu(z), the last state."""
    N = A.shape[1]
    dt = F.softplus(dt_raw + dt_bias)
    rho = 1 / ((1 / (-A).min(-1).values + dt) * (B.square().sum(-1) * C.square().sum(-1) + 1e-12).sqrt()[..., None])
    h, k, p = state[..., :N], gain + state[..., N], state[..., N + 1]
    past = list(state[..., N + 2:].unbind(-1))
    ys = []
    for t in range(u.shape[1]):
        e = past[0] - u[:, t]
        k = (k + alpha * e / (e**2 + eps**2).sqrt() * p).clamp(-kappa, kappa)
        v = u[:, t] + rho[:, t] * (delay * past[-1] - k * e)
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * v)[..., None] * B[:, t, None, :]
        y = (C[:, t, None, :] * F.silu(zeta * h + gamma) * h).sum(-1) + D * u[:, t]
        p = dt[:, t] * rho[:, t] * (C[:, t] * B[:, t]).sum(-1)[:, None] * e
        past = [y] + past[:-1]
        ys.append(y)
    y = torch.stack(ys, 1)
    return y, y * F.silu(z), torch.cat([h, (k - gain)[..., None], p[..., None], torch.stack(past, -1)], -1)


def mamba(x, w, conv_state=None, h=None, eps=None, loop=None):
    """The mixer, w by Hugging Face's names; with eps, RMSNorm on dt, B and C. Returns its output and both states.
    With loop, which has tau, alpha, kappa and eps, it is Conba, with selection and a closed loop in place of the scan."""
    D, N = w["A_log"].shape
    R = w["dt_proj.weight"].shape[1]
    u, z = (x @ w["in_proj.weight"].T).split(D, -1)
    conv_state = u.new_zeros(len(x), 3, D) if conv_state is None else conv_state
    u, conv_state = conv1d_silu(u, w["conv1d.weight"][:, 0], w["conv1d.bias"], conv_state)
    projected = u @ w["x_proj.weight"].T
    if loop:
        projected = projected + swiglu(u, *(w[f"select_{n}.weight"] for n in ("gate_proj", "up_proj", "proj")))
    dt, B, C = projected.split([R, N, N], -1)
    if eps:
        dt, B, C = (rms_norm(t, w[n + "_layernorm.weight"], eps) for t, n in ((dt, "dt"), (B, "b"), (C, "c")))
    h = u.new_zeros(len(x), D, N + 2 + loop["tau"] if loop else N) if h is None else h
    plant = u, dt @ w["dt_proj.weight"].T, w["dt_proj.bias"], -torch.exp(w["A_log"]), B, C, w["D"], z
    if loop:
        terms = (w[n] for n in ("gain", "delay", "scaling_zeta", "scaling_gamma"))
        _, out, h = closed_loop(*plant, *terms, h, loop["alpha"], loop["kappa"], loop["eps"])
    else:
        _, out, h = scan(*plant, h)
    return out @ w["out_proj.weight"].T, conv_state, h


def rotate(x, base):
    """x (B,T,H,S): RoPE at positions 0, 1, ..."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None, None] * base ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def attention(q, k, v):
    """q (B,T,H,S), k and v (B,T,G,S): causal, each key head for H/G query heads."""
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bths,bjhs->bhtj", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(T, T).tril() == 0, -math.inf)
    return torch.einsum("bhtj,bjhs->bths", scores.softmax(-1), v)


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def moe(x, router, expert, top_k, renormalise=False, capacity=None):
    """x (T,C). Returns y, logits, probabilities, the chosen experts (T,k) best first, their weights (also where dropped), and
    the load-balancing and z losses."""
    E = len(router)
    logits = x @ router.T
    probs = logits.softmax(-1)
    weight, index = probs.topk(top_k)
    if renormalise:
        weight = weight / weight.sum(-1, keepdim=True)
    kept = torch.ones_like(index)
    if capacity is not None:  # first come, first served
        kept = F.one_hot(index[:, 0], E).cumsum(0).gather(1, index) <= capacity
    y = torch.stack([sum(kept[t, k] * weight[t, k] * expert(x[t], index[t, k]) for k in range(top_k)) for t in range(len(x))])
    f = F.one_hot(index, E).sum((0, 1)) / len(x)  # tokens that chose an expert, before dropping; sums to top_k
    return y, logits, probs, index, weight, E * (f * probs.mean(0)).sum(), logits.logsumexp(-1).square().mean()


# ---------------------------------------------------------------- the files

def random_mamba_weights(r, named_parameters):
    """Fills a Hugging Face Mamba with numbers at the size of its initialisation, none of them a round constant."""
    with torch.no_grad():
        for name, p in sorted(named_parameters):
            if name.endswith("A_log"):
                p.copy_(torch.arange(1.0, p.shape[1] + 1).log() + r(*p.shape, scale=0.1))
            elif name.endswith("dt_proj.bias"):  # softplus of it between about 0.01 and 1
                p.copy_(r(*p.shape) - 2)
            elif name.endswith(("norm.weight", "norm_f.weight", ".D")) or name == "D":
                p.copy_(1 + r(*p.shape, scale=0.2))
            else:
                fan_in = math.prod(p.shape[1:])
                p.copy_(r(*p.shape, scale=0.3 if p.dim() == 1 or "embeddings" in name else fan_in**-0.5))


def mamba_config(**more):
    return MambaConfig(hidden_size=16, state_size=8, expand=2, conv_kernel=4, time_step_rank=3, num_hidden_layers=2,
                       layer_norm_epsilon=1e-5, residual_in_fp32=True, use_mambapy=False, use_associative_scan=False, **more)


def make_mamba_mixer():
    r, B, T, C, steps = Random(1), 2, 13, 16, 3
    config = mamba_config()
    mixer = hf_mamba.MambaMixer(config, layer_idx=0).eval()
    random_mamba_weights(r, mixer.named_parameters())
    w = dict(mixer.named_parameters())
    x, dout, decode_x = r.leaf(B, T, C), r(B, T, C), r(B, steps, C)
    with float32_is_float64():
        out = mixer(x)  # no kernels package and no GPU: the plain loop
    tensors = with_grads({"x": x, **w, "out": out, "dout": dout}, (dout * out).sum())

    ours, conv_state, h = mamba(x, w)
    check = with_grads({"x": x, **w, "out": ours}, (dout * ours).sum())
    for name in check:
        agree("mamba_mixer " + name, tensors[name], check[name])

    with torch.no_grad(), float32_is_float64():  # again, with a cache, and on from there one token at a time
        cache = DynamicCache(config=config)
        agree("cached out", mixer(x, cache_params=cache), out)

        def states():
            return cache.layers[0].conv_states[0].clone(), cache.layers[0].recurrent_states[0].clone()
        tensors["conv_state"], tensors["ssm_state"] = states()
        tensors["decode_x"] = decode_x
        tensors["decode_out"] = torch.cat([mixer(decode_x[:, t:t + 1], cache_params=cache) for t in range(steps)], 1)
        tensors["decode_conv_state"], tensors["decode_ssm_state"] = states()
        agree("conv state", tensors["conv_state"][:, :, 1:], conv_state.transpose(1, 2))
        agree("ssm state", tensors["ssm_state"], h)
        ours, conv_state, h = mamba(decode_x, w, conv_state, h)
        agree("decode out", tensors["decode_out"], ours)
        agree("decode conv state", tensors["decode_conv_state"][:, :, 1:], conv_state.transpose(1, 2))
        agree("decode ssm state", tensors["decode_ssm_state"], h)
    save("mamba_mixer.safetensors", tensors, B=B, T=T, d_model=C, d_inner=32, d_state=8, d_conv=4, dt_rank=3, decode_steps=steps,
         conv_state="(B, D, 4): the last 4 inputs of the convolution, oldest first; after x, and after decode_x",
         source="MambaMixer, the slow path, all in float64")


def make_mamba_lm():
    r, B, T, V = Random(2), 2, 11, 40
    model = MambaForCausalLM(mamba_config(vocab_size=V, tie_word_embeddings=True)).eval()
    random_mamba_weights(r, model.named_parameters())  # the tied lm_head.weight is not among them
    w = dict(model.named_parameters())
    assert model.lm_head.weight is w["backbone.embeddings.weight"]
    sequence = r.ints(V, B, T + 1)
    tokens, targets = sequence[:, :-1], sequence[:, 1:]
    with float32_is_float64():
        logits = model(input_ids=tokens, use_cache=False).logits
    loss = F.cross_entropy(logits.reshape(-1, V), targets.reshape(-1))
    tensors = with_grads({**w, "tokens": tokens, "targets": targets, "logits": logits, "loss": loss}, loss)

    x = w["backbone.embeddings.weight"][tokens]
    for i in range(2):
        layer = {n.removeprefix(f"backbone.layers.{i}."): p for n, p in w.items()}
        mixer = {n.removeprefix("mixer."): p for n, p in layer.items()}
        x = x + mamba(rms_norm(x, layer["norm.weight"]), mixer)[0]
    ours = rms_norm(x, w["backbone.norm_f.weight"]) @ w["backbone.embeddings.weight"].T
    our_loss = -ours.log_softmax(-1).gather(-1, targets[..., None]).mean()
    check = with_grads({**w, "logits": ours, "loss": our_loss}, our_loss)
    for name in check:
        agree("mamba_lm " + name, tensors[name], check[name])
    save("mamba_lm.safetensors", tensors, B=B, T=T, vocab_size=V, d_model=16, n_layers=2, d_inner=32, d_state=8, d_conv=4, dt_rank=3,
         rms_norm_eps=1e-5, tie_word_embeddings="true", layers="MM", source="MambaForCausalLM, all in float64")


def make_hybrid_lm(name, seed, model, T, config, layers, rename, normed_slices=False, **metadata):
    """A transformers model with attention and experts. rename(its name of a tensor) is ours; our layers, by these names, must agree."""
    r, B, V, C, H, G = Random(seed), 2, 40, config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    model.eval()
    with torch.no_grad():
        for n, p in sorted(model.named_parameters()):
            norm = n.endswith("norm.weight") or n.endswith(".D")
            if n.endswith("A_log"):
                p.copy_(torch.arange(1.0, p.shape[1] + 1).log() + r(*p.shape, scale=0.1))
            elif n.endswith("dt_proj.bias"):
                p.copy_(r(*p.shape) - 2)
            else:
                p.copy_(1 + r(*p.shape, scale=0.2) if norm else r(*p.shape, scale=0.3 if p.dim() == 1 else 0.6 * p.shape[-1] ** -0.5))
    sequence = r.ints(V, B, T + 1)
    tokens, targets = sequence[:, :-1], sequence[:, 1:]
    with float32_is_float64():
        logits = model(input_ids=tokens, use_cache=False).logits
    loss = F.cross_entropy(logits.reshape(-1, V), targets.reshape(-1))
    w, gradients = {}, {}
    for n, p in model.named_parameters():
        g, = torch.autograd.grad(loss, p, retain_graph=True)
        for ours, part in rename(n).items():
            w[ours], gradients[ours + ".grad"] = part(p).detach().requires_grad_(), part(g)

    x = w["backbone.embeddings.weight"][tokens]
    for i, letter in enumerate(layers):
        layer = {n.removeprefix(f"backbone.layers.{i}."): p for n, p in w.items()}
        normed = rms_norm(x, layer["norm.weight"], config.rms_norm_eps)
        if letter == "A":
            q, k, v = ((normed @ layer[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (h, -1)) for n, h in (("q", H), ("k", G), ("v", G)))
            if metadata["rope_base"]:
                q, k = rotate(q, metadata["rope_base"]), rotate(k, metadata["rope_base"])
            x = x + attention(q, k, v).flatten(2) @ layer["self_attn.o_proj.weight"].T
        elif letter == "M":
            mixer = {n.removeprefix("mixer."): p for n, p in layer.items()}
            x = x + mamba(normed, mixer, eps=config.rms_norm_eps)[0]
        elif letter == "F":
            x = x + swiglu(normed, *(layer[f"feed_forward.{n}_proj.weight"] for n in ("gate", "up", "down")))
        else:
            def expert(row, e):
                return swiglu(row, *(layer[f"moe.experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")))
            y = moe(normed.flatten(0, 1), layer["moe.router.weight"], expert, config.num_experts_per_tok, metadata["renormalize"])[0]
            x = x + y.unflatten(0, (B, T))
    ours = rms_norm(x, w["backbone.norm_f.weight"], config.rms_norm_eps) @ w["lm_head.weight"].T
    agree(name + " logits", logits, ours)
    our_loss = -ours.log_softmax(-1).gather(-1, targets[..., None]).mean()
    for n, p in w.items():
        agree(f"{name} {n}.grad", gradients[n + ".grad"], torch.autograd.grad(our_loss, p, retain_graph=True)[0])
    save(name + ".safetensors", {**w, **gradients, "tokens": tokens, "targets": targets, "logits": logits, "loss": loss}, B=B, T=T,
         vocab_size=V, d_model=C, layers=layers, heads=H, kv_heads=G, head_dim=config.head_dim if hasattr(config, "head_dim") else C // H,
         top_k=config.num_experts_per_tok, d_ff=config.intermediate_size, norm_eps=config.rms_norm_eps, **metadata)


def common_names(n):
    """Of a tensor of Jamba or Mixtral: our names, and how each is a part of it."""
    whole = lambda t: t
    outer = {"model.embed_tokens.weight": "backbone.embeddings.weight", "lm_head.weight": "lm_head.weight",
             "model.norm.weight": "backbone.norm_f.weight", "model.final_layernorm.weight": "backbone.norm_f.weight"}
    if n in outer:
        return {outer[n]: whole}
    _, _, i, rest = n.split(".", 3)
    first, second = f"backbone.layers.{2 * int(i)}.", f"backbone.layers.{2 * int(i) + 1}."
    if rest == "input_layernorm.weight":
        return {first + "norm.weight": whole}
    if rest in ("post_attention_layernorm.weight", "pre_ff_layernorm.weight"):
        return {second + "norm.weight": whole}
    if rest.startswith(("self_attn.", "mamba.")):
        return {first + rest.replace("mamba.", "mixer."): whole}
    rest = rest.split(".", 1)[1]  # of the feed-forward layer or the experts
    if rest in ("gate.weight", "router.weight"):
        return {second + "moe.router.weight": whole}
    if rest == "experts.gate_up_proj":
        half = lambda e, which: lambda t: t[e].chunk(2)[which].contiguous()
        return {f"{second}moe.experts.{e}.{which}_proj.weight": half(e, i) for e in range(3) for i, which in enumerate(("gate", "up"))}
    if rest == "experts.down_proj":
        return {f"{second}moe.experts.{e}.down_proj.weight": (lambda e: lambda t: t[e].contiguous())(e) for e in range(3)}
    return {second + "feed_forward." + rest: whole}


def make_mixtral_lm():
    config = MixtralConfig(vocab_size=40, hidden_size=20, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
                           num_key_value_heads=2, head_dim=24, num_local_experts=3, num_experts_per_tok=2, rms_norm_eps=1e-5,
                           sliding_window=None, tie_word_embeddings=False, attn_implementation="eager", experts_implementation="eager",
                           rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    with float32_is_float64():  # the frequencies of RoPE are computed here
        model = MixtralForCausalLM(config)
    make_hybrid_lm("mixtral_lm", 61, model, 37, config, "AEAE", common_names, rope_base=100.0, renormalize=1, experts=3,
                   source="MixtralForCausalLM, all in float64")


def make_jamba_lm():
    config = JambaConfig(vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
                         attn_layer_period=4, attn_layer_offset=2, expert_layer_period=2, expert_layer_offset=1, num_experts=3,
                         num_experts_per_tok=2, rms_norm_eps=1e-6, mamba_d_state=5, mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=3,
                         use_mamba_kernels=False, pad_token_id=None, tie_word_embeddings=False, attn_implementation="eager",
                         experts_implementation="eager")
    make_hybrid_lm("jamba_lm", 71, JambaForCausalLM(config), 19, config, "MFMEAFME", common_names, rope_base=0, renormalize=0, experts=3,
                   d_inner=32, d_state=5, d_conv=4, dt_rank=3, source="JambaForCausalLM, the slow path of its mixers, all in float64")


def make_moe(name, seed, T, top_k, renormalise, capacity, block, router, expert_weights, z_loss, aux_loss, **metadata):
    """block: a transformers MoE module, in float64; router: its router, whose last linear layer's weight is the router weight;
    expert_weights: name -> (E, rows, columns), leaves that the block's parameters have been made of. aux_loss(logits, index)."""
    r, E, C = Random(seed), 4, 12
    router_weight = next(router.parameters())
    with torch.no_grad():
        router_weight.copy_(r(E, C, scale=0.6))
    caught = {}
    hook = router.register_forward_hook(lambda module, args, result: caught.update(result=result))
    x, dout = r.leaf(1, T, C), r(1, T, C)
    with float32_is_float64():
        out = block(x)
        hook.remove()
        logits = next(t for t in caught["result"] if t.shape[-1] == E and t.is_floating_point())
        probs = logits.reshape(T, E).softmax(-1)
        index = probs.topk(top_k).indices
        aux, z = aux_loss(logits, index), z_loss(logits.reshape(1, T, E))
    loss = (dout * out).sum() + 0.01 * aux + 0.001 * z
    if capacity is None:
        kept, weight = torch.ones(T, top_k), caught["result"][1]
    else:
        kept = caught["result"][0].reshape(T, E).sum(-1, keepdim=True)
        weight = caught["result"][1].reshape(T, 1)
        assert 3 <= (kept == 0).sum() and (out[0, kept[:, 0] == 0] == 0).all()
    tensors = {"x": x, "router.weight": router_weight, **expert_weights, "router_logits": logits, "router_probs": probs,
               "expert_index": index, "expert_weight": weight, "load": F.one_hot(index, E).sum((0, 1)),
               "kept": kept.to(torch.int32), "out": out, "dout": dout, "aux_loss": aux, "z_loss": z, "loss": loss}
    tensors = with_grads(tensors, loss, also=["router_logits"])
    for n in tensors:
        if n.startswith("router_logits"):
            tensors[n] = tensors[n].reshape(T, E)

    def expert(x, e):
        if "wi" in expert_weights:
            return F.relu(x @ expert_weights["wi"][e].T) @ expert_weights["wo"][e].T
        return swiglu(x, *(expert_weights[n][e] for n in ("gate", "up", "down")))
    y, logits, probs, index, weight, aux, z = moe(x[0], router_weight, expert, top_k, renormalise, capacity)
    loss = (dout[0] * y).sum() + 0.01 * aux + 0.001 * z
    check = {"x": x, "router.weight": router_weight, **expert_weights, "router_logits": logits, "router_probs": probs,
             "expert_weight": weight, "out": y[None], "aux_loss": aux, "z_loss": z, "loss": loss}
    check = with_grads(check, loss, also=["router_logits"])
    for n in check:
        agree(f"{name} {n}", tensors[n], check[n])
    assert (index == tensors["expert_index"]).all()
    sorted_probs = probs.sort(descending=True).values  # no near tie that float32 could decide otherwise
    assert (sorted_probs[:, :top_k] - sorted_probs[:, 1:top_k + 1]).min() > 1e-3, "near tie: change the seed"
    save(name, tensors, T=T, d_model=C, d_ff=20, E=E, top_k=top_k, renormalise=str(renormalise).lower(),
         expert_capacity="none" if capacity is None else capacity, aux_weight=0.01, z_weight=0.001,
         loss_is="sum(dout * out) + 0.01 * aux_loss + 0.001 * z_loss", **metadata)


def make_switch():
    r, E, C, D_ff, T = Random(31), 4, 12, 20, 24
    capacity = T // E  # capacity factor 1
    config = SwitchTransformersConfig(hidden_size=C, d_model=C, d_ff=D_ff, num_experts=E, expert_capacity=capacity, dropout_rate=0.0,
                                      router_bias=False, router_jitter_noise=0.0, dense_act_fn="relu")
    block = switch.SwitchTransformersSparseMLP(config).eval()
    block.router.dtype = torch.float64  # its configuration allows no more than float32
    weights = {"wi": r.leaf(E, D_ff, C, scale=C**-0.5), "wo": r.leaf(E, C, D_ff, scale=D_ff**-0.5)}
    for e in range(E):  # parts of our leaves in place of the experts' own parameters
        for n in weights:
            linear = getattr(block.experts[f"expert_{e}"], n)
            del linear.weight
            linear.weight = weights[n][e]
    make_moe("switch.safetensors", 32, T, 1, False, capacity, block, block.router, weights, switch.router_z_loss_func,
             lambda logits, index: switch.load_balancing_loss_func(logits.softmax(-1), index.reshape(1, T)),
             capacity_factor=1, activation="relu", dropped="output 0; first come, first served over all T tokens",
             aux_loss_is="E sum_i f_i P_i, f_i = share of tokens whose first choice is i, before dropping",
             source="SwitchTransformersSparseMLP, load_balancing_loss_func and router_z_loss_func, all in float64")


def make_swiglu_moe(name, seed, config, block_class, renormalise, aux_loss, source):
    r, E, C, D_ff, T = Random(seed), 4, 12, 20, 17
    config._experts_implementation = "eager"
    block = block_class(config).eval()
    weights = {"gate": r.leaf(E, D_ff, C, scale=C**-0.5), "up": r.leaf(E, D_ff, C, scale=C**-0.5),
               "down": r.leaf(E, C, D_ff, scale=D_ff**-0.5)}
    del block.experts.gate_up_proj, block.experts.down_proj  # the library keeps gate and up as one parameter (E, 2 d_ff, C)
    block.experts.gate_up_proj, block.experts.down_proj = torch.cat([weights["gate"], weights["up"]], 1), weights["down"]
    router = block.gate if renormalise else block.router
    make_moe(name, seed + 1, T, 2, renormalise, None, block, router, weights, switch.router_z_loss_func,
             lambda logits, index: aux_loss((logits,), E, top_k=2), activation="swiglu: down(silu(gate x) * up x)",
             aux_loss_is="E sum_i f_i P_i, f_i = choices of expert i / T: the f_i sum to 2", source=source + ", all in float64")


def make_mixtral():
    config = MixtralConfig(hidden_size=12, intermediate_size=20, num_local_experts=4, num_experts_per_tok=2)
    make_swiglu_moe("mixtral.safetensors", 41, config, mixtral.MixtralSparseMoeBlock, True, mixtral.load_balancing_loss_func,
                    "MixtralSparseMoeBlock, its load_balancing_loss_func; z_loss as in Switch")


def make_jamba_moe():
    config = JambaConfig(hidden_size=12, intermediate_size=20, num_experts=4, num_experts_per_tok=2)
    make_swiglu_moe("jamba_moe.safetensors", 51, config, jamba.JambaSparseMoeBlock, False, jamba.load_balancing_loss_func,
                    "JambaSparseMoeBlock, its load_balancing_loss_func; z_loss as in Switch")


def make_expert_choice():
    """Expert Choice (arXiv 2202.09368): each expert takes its `capacity` most probable tokens of all."""
    r, E, C, D_ff, T = Random(62), 4, 12, 20, 23
    capacity = T // E
    x, router, dout = r.leaf(T, C), r.leaf(E, C, scale=0.6), r(T, C)
    w = {"gate": r.leaf(E, D_ff, C, scale=C**-0.5), "up": r.leaf(E, D_ff, C, scale=C**-0.5), "down": r.leaf(E, C, D_ff, scale=D_ff**-0.5)}
    probs = (x @ router.T).softmax(-1)
    weight, rows = probs.topk(capacity, dim=0)  # (capacity, E)
    out = torch.zeros(T, C)
    for e in range(E):
        out = out.index_add(0, rows[:, e], weight[:, e, None] * swiglu(x[rows[:, e]], *(w[n][e] for n in ("gate", "up", "down"))))
    aux = E * (capacity / T * probs.mean(0)).sum()  # of an even load: nothing to learn from
    z = (x @ router.T).logsumexp(-1).square().mean()
    takers = F.one_hot(rows, T).sum((0, 1))
    assert (takers == 0).any() and (takers > 1).any(), takers
    ordered = probs.sort(0, descending=True).values  # no near tie that float32 could decide otherwise
    assert (ordered[capacity - 1] - ordered[capacity]).min() > 1e-3, "near tie: change the seed"
    tensors = {"x": x, "router.weight": router, **w, "router_probs": probs, "out": out, "dout": dout, "aux_loss": aux,
               "z_loss": z}
    save("expert_choice.safetensors", with_grads(tensors, (dout * out).sum() + 0.001 * z), T=T, d_model=C, d_ff=D_ff, E=E,
         expert_capacity=capacity, z_weight=0.001, activation="swiglu: down(silu(gate x) * up x)",
         loss_is="sum(dout * out) + 0.001 * z_loss", source="plain PyTorch")


def make_closed_loop():
    r, B, T, D, N, tau = Random(71), 2, 23, 6, 5, 3
    A_log = (torch.arange(1.0, N + 1).log() + r(D, N, scale=0.1)).requires_grad_()
    s = dict(u=r.leaf(B, T, D), dt=r.leaf(B, T, D), dt_bias=r.leaf(D, scale=0.5, plus=-1), A=-torch.exp(A_log), B_t=r.leaf(B, T, N),
             C_t=r.leaf(B, T, N, scale=0.5), skip=r.leaf(D, scale=0.2, plus=0.5), z=r.leaf(B, T, D), gain=r.leaf(D, scale=0.2), delay=r.leaf(D, scale=0.2),
             zeta=r.leaf(D, N, scale=0.3), gamma=r.leaf(D, N, scale=0.2, plus=1.28), initial_state=r.leaf(B, D, N + 2 + tau, scale=0.3))
    constants = dict(alpha=0.1, kappa=0.2, eps=0.1)
    y, out, final_state = closed_loop(*s.values(), **constants)
    gains = final_state[..., N] + s["gain"]
    assert (gains.abs() == 0.2).any() and (gains.abs() < 0.2).any()  # clipped, and not
    dout, dfinal_state = r(B, T, D), r(B, D, N + 2 + tau)
    tensors = dict(A_log=A_log, **s, out=out, final_state=final_state, dout=dout, dfinal_state=dfinal_state)
    save("closed_loop.safetensors", with_grads(tensors, (dout * out).sum() + (dfinal_state * final_state).sum()), tau=tau, **constants,
         loss_is="sum(dout * out) + sum(dfinal_state * final_state)", source="plain PyTorch")


def make_conba_lm():
    r, B, T, V, C, D, N, R, layers = Random(72), 2, 13, 40, 16, 20, 5, 3, 2
    loop = dict(tau=3, alpha=0.1, kappa=0.3, eps=0.1)
    w = {"backbone.embeddings.weight": r.leaf(V, C, scale=0.3), "backbone.norm_f.weight": r.leaf(C, scale=0.2, plus=1)}
    for i in range(layers):
        layer = {"norm.weight": r.leaf(C, scale=0.2, plus=1)}
        mixer = {"in_proj.weight": r.leaf(2 * D, C, scale=C**-0.5), "conv1d.weight": r.leaf(D, 1, 4, scale=0.5), "conv1d.bias": r.leaf(D, scale=0.3),
                 "x_proj.weight": r.leaf(R + 2 * N, D, scale=D**-0.5), "dt_proj.weight": r.leaf(D, R, scale=R**-0.5),
                 "dt_proj.bias": r.leaf(D, plus=-2), "A_log": r.leaf(D, N, scale=0.1, plus=torch.arange(1.0, N + 1).log()),
                 "D": r.leaf(D, scale=0.2, plus=1), "out_proj.weight": r.leaf(C, D, scale=D**-0.5),
                 "dt_layernorm.weight": r.leaf(R, scale=0.2, plus=1), "b_layernorm.weight": r.leaf(N, scale=0.2, plus=0.5),
                 "c_layernorm.weight": r.leaf(N, scale=0.2, plus=0.5), "select_gate_proj.weight": r.leaf(R, D, scale=D**-0.5),
                 "select_up_proj.weight": r.leaf(R, D, scale=D**-0.5), "select_proj.weight": r.leaf(R + 2 * N, R, scale=R**-0.5),
                 "gain": r.leaf(D, scale=0.2), "delay": r.leaf(D, scale=0.2), "scaling_zeta": r.leaf(D, N, scale=0.3),
                 "scaling_gamma": r.leaf(D, N, scale=0.2, plus=1.28)}
        w.update({f"backbone.layers.{i}.{n}": t for n, t in [*layer.items(), *(("conba." + n, t) for n, t in mixer.items())]})
    sequence = r.ints(V, B, T + 1)
    tokens, targets = sequence[:, :-1], sequence[:, 1:]
    x = w["backbone.embeddings.weight"][tokens]
    for i in range(layers):
        layer = {n.removeprefix(f"backbone.layers.{i}."): t for n, t in w.items()}
        x = x + mamba(rms_norm(x, layer["norm.weight"]), {n.removeprefix("conba."): t for n, t in layer.items()}, eps=1e-5, loop=loop)[0]
    logits = rms_norm(x, w["backbone.norm_f.weight"]) @ w["backbone.embeddings.weight"].T
    loss = F.cross_entropy(logits.reshape(-1, V), targets.reshape(-1))
    save("conba_lm.safetensors", with_grads({**w, "tokens": tokens, "targets": targets, "logits": logits, "loss": loss}, loss), B=B, T=T,
         vocab_size=V, d_model=C, d_inner=D, d_state=N, d_conv=4, dt_rank=R, layers="CC", **loop, source="plain PyTorch")


def make_layers():
    r = Random(6)
    tensors = {}

    def put(group, named, loss, also=()):
        tensors.update({f"{group}.{n}": t for n, t in with_grads(named, loss, also).items()})

    # RMSNorm of a sum: sum = x + residual goes on as the residual stream, with its own upstream gradient dsum
    x, residual, weight = r.leaf(2, 5, 24), r.leaf(2, 5, 24, scale=2), r.leaf(24, scale=0.3, plus=1)
    total = x + residual
    out, dout, dsum = rms_norm(total, weight), r(2, 5, 24), r(2, 5, 24)
    agree("rms_norm", F.rms_norm(total, (24,), weight, 1e-5), out)
    put("rms_norm", dict(x=x, residual=residual, weight=weight, sum=total, out=out, dout=dout, dsum=dsum),
        (dout * out).sum() + (dsum * total).sum())

    # convolution: T = 9, and T = 2, shorter than the state; x.grad is for dout alone, x.grad_with_state for dout and dstate_out
    for group, T in ("conv1d", 9), ("conv1d_short", 2):
        x, weight, bias, state = r.leaf(2, T, 20), r.leaf(20, 4, scale=0.5), r.leaf(20, scale=0.5), r.leaf(2, 3, 20)
        out, state_out = conv1d_silu(x, weight, bias, state)
        library = F.conv1d(torch.cat([state, x], 1).transpose(1, 2), weight[:, None], bias, groups=20).transpose(1, 2)
        agree("conv1d", F.silu(library), out)
        dout, dstate_out = r(2, T, 20), r(2, 3, 20)
        put(group, dict(x=x, weight=weight, bias=bias, state=state, out=out, state_out=state_out, dout=dout, dstate_out=dstate_out),
            (dout * out).sum())
        both = torch.autograd.grad((dout * out).sum() + (dstate_out * state_out).sum(), [x, state])
        tensors[f"{group}.x.grad_with_state"], tensors[f"{group}.state.grad_with_state"] = both

    # selective scan; five of the dt = dt_raw + dt_bias lie just under and over softplus's threshold of 20
    B, T, D, N = 2, 37, 20, 16
    bias = r(D) - 3
    dt_raw = r(B, T, D)
    for (b, t, d), value in {(0, 3, 1): 19.5, (0, 9, 7): 20.5, (1, 0, 2): 22.0, (1, 20, 19): 27.0, (1, 36, 5): 24.0}.items():
        dt_raw[b, t, d] = value - bias[d]
    A_log = (torch.arange(1.0, N + 1).log() + r(D, N, scale=0.1)).requires_grad_()
    s = dict(u=r.leaf(B, T, D), dt_raw=dt_raw.requires_grad_(), dt_bias=bias.requires_grad_(), A=-torch.exp(A_log), B=r.leaf(B, T, N),
             C=r.leaf(B, T, N), D=r.leaf(D, scale=0.2, plus=1), z=r.leaf(B, T, D), h0=r.leaf(B, D, N))
    y, out, h_last = scan(*s.values())
    dt = s["dt_raw"] + s["dt_bias"]
    assert (dt > 20).sum() == 4
    dout, dh_last = r(B, T, D), r(B, D, N)
    put("scan", dict(A_log=A_log, **s, y=y, out=out, h_last=h_last, dout=dout, dh_last=dh_last),
        (dout * out).sum() + (dh_last * h_last).sum(), also=["A"])

    x, gate, up, down = r.leaf(2, 5, 12), r.leaf(20, 12, scale=0.3), r.leaf(20, 12, scale=0.3), r.leaf(12, 20, scale=0.3)
    out, dout = swiglu(x, gate, up, down), r(2, 5, 12)
    put("swiglu", dict(x=x, gate=gate, up=up, down=down, out=out, dout=dout), (dout * out).sum())

    tokens, weight, dout = r.ints(7, 2, 9), r.leaf(11, 8), r(2, 9, 8)  # tokens below 7: repeats, and rows never used
    out = F.embedding(tokens, weight)
    put("embedding", dict(tokens=tokens, weight=weight, out=out, dout=dout), (dout * out).sum())

    x, weight, bias, dout = r.leaf(2, 5, 12), r.leaf(20, 12, scale=0.3), r.leaf(20), r(2, 5, 20)
    out = F.linear(x, weight, bias)
    put("linear", dict(x=x, weight=weight, bias=bias, out=out, dout=dout), (dout * out).sum())

    # classifier with softmax and cross-entropy: the last 3 of 16 columns are padding, not part of the softmax, gradient 0
    x, weight, targets = r.leaf(2, 7, 12), r.leaf(16, 12, scale=0.5), r.ints(13, 2, 7)
    logits = F.linear(x, weight)
    losses = F.cross_entropy(logits[..., :13].reshape(14, 13), targets.reshape(14), reduction="none").reshape(2, 7)
    put("classifier", dict(x=x, weight=weight, targets=targets.clone(), logits=logits, losses=losses, loss=losses.mean()), losses.mean(),
        also=["logits"])
    targets[0, 2] = targets[1, 6] = -1  # the same logits with two targets to be ignored
    losses = F.cross_entropy(logits[..., :13].reshape(14, 13), targets.reshape(14), ignore_index=-1, reduction="none").reshape(2, 7)
    put("classifier_ignore", dict(logits=logits, targets=targets, losses=losses, loss=losses.sum() / 12), losses.sum() / 12,
        also=["logits"])

    # attention: 6 heads of queries, 2 of keys and values, after RoPE
    q, k, v = r.leaf(1, 21, 6, 24), r.leaf(1, 21, 2, 24), r.leaf(1, 21, 2, 24)
    turned, out, dout = rotate(q, 10000.0), attention(q, k, v), r(1, 21, 6, 24)
    library = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True).transpose(1, 2)
    agree("attention", library, out)
    put("attention", dict(q=q, k=k, v=v, out=library, dout=dout), (dout * library).sum())
    put("rotate", {"in": q, "out": turned, "dout": dout}, (dout * turned).sum())

    save("layers.safetensors", tensors, rms_norm_eps=1e-5, **{
        "conv1d.state": "(B, 3, D): the inputs before x, oldest first; state_out: the last 3 of state and x together",
        "conv1d.grads": "NAME.grad is for dout alone; x.grad_with_state and state.grad_with_state for dout and dstate_out together",
        "scan.is": "dt = softplus(dt_raw + dt_bias), linear above 20; h = exp(dt A) h + dt u B; y = C.h + D u; out = y silu(z); "
                   "gradients for dout and dh_last together, from a loop over time",
        "classifier.vocab_size": "13, padded to 16; loss is the mean of losses, over the 12 targets not -1 in classifier_ignore"})


def make_adamw():
    r, steps, decay, max_norm = Random(7), 5, 0.1, 0.5
    matrix, vector = r.leaf(7, 5), r.leaf(6)
    parameters = {"matrix": matrix, "vector": vector}
    optimizer = torch.optim.AdamW([dict(params=[matrix], weight_decay=decay), dict(params=[vector], weight_decay=0.0)],
                                  betas=(0.9, 0.95), eps=1e-8, foreach=False)
    lr = torch.tensor([0.01, 0.02, 0.015, 0.01, 0.005])
    tensors = {"lr": lr, "norms": [], "clip_coefs": []}
    for n, p in parameters.items():
        tensors[n + ".init"] = p.detach().clone()
        tensors.update({f"{n}.{what}": [] for what in ("grads", "steps", "m", "v")})
    for step in range(steps):
        for n, p in parameters.items():
            p.grad = r(*p.shape, scale=0.02 if step == 2 else 1.0)  # the third is small: not clipped
            tensors[n + ".grads"].append(p.grad.clone())
        norm = torch.nn.utils.clip_grad_norm_([matrix, vector], max_norm, foreach=False)
        assert (norm < max_norm) == (step == 2)
        tensors["norms"].append(norm)
        tensors["clip_coefs"].append((max_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in optimizer.param_groups:
            group["lr"] = lr[step].item()
        optimizer.step()
        for n, p in parameters.items():
            agree("clipping", p.grad, tensors[n + ".grads"][-1] * tensors["clip_coefs"][-1])
            tensors[n + ".steps"].append(p.detach().clone())
            tensors[n + ".m"].append(optimizer.state[p]["exp_avg"].clone())
            tensors[n + ".v"].append(optimizer.state[p]["exp_avg_sq"].clone())
    tensors = {n: torch.stack(t) if isinstance(t, list) else t for n, t in tensors.items()}
    save("adamw.safetensors", tensors, beta1=0.9, beta2=0.95, eps=1e-8, steps=steps, max_norm=max_norm, **{
        "matrix.weight_decay": decay, "vector.weight_decay": 0,
        "clip": "gradients times min(1, max_norm / (norm + 1e-6)), norm over matrix and vector together",
        "order": "grads are as given, before clipping; steps, m and v after each step, first index"})


for make in make_mamba_mixer, make_mamba_lm, make_mixtral_lm, make_jamba_lm, make_switch, make_mixtral, make_jamba_moe, \
        make_expert_choice, make_closed_loop, make_conba_lm, make_layers, make_adamw:
    make()
print(f"{'file':26}{'bytes':>9}{'tensors':>9}")
for row in summary + [("all", sum(s[1] for s in summary), sum(s[2] for s in summary))]:
    print(f"{row[0]:26}{row[1]:9}{row[2]:9}")
assert summary and sum(s[1] for s in summary) < 1_800_000
