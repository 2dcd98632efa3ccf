#!/usr/bin/env python3
"""Writes huggingface/NAME, beside this script: small models of transformers with random weights, as save_pretrained writes them and in the other
forms that are found in the wild, each with expected.safetensors: tokens, the logits that transformers computes for them in float64, and the tokens
that it continues with, greedily."""
import json, os, shutil, sys

import torch
from safetensors.torch import load_file, save_file
from transformers import JambaConfig, JambaForCausalLM, MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM

FOLDER = os.path.join(sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__)), "huggingface")
VOCAB = 43  # no multiple of 8

mamba = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=None, bos_token_id=None, eos_token_id=None)
jamba = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
             num_experts=3, mamba_d_state=4, attn_layer_period=4, attn_layer_offset=2, pad_token_id=None, eos_token_id=None)
mixtral = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
               num_local_experts=3, head_dim=8, eos_token_id=None)
KINDS = {"mamba": (MambaConfig, MambaForCausalLM, mamba), "jamba": (JambaConfig, JambaForCausalLM, jamba),
         "mixtral": (MixtralConfig, MixtralForCausalLM, mixtral)}


def fuse(tensors, name):
    """All experts of a layer in one tensor: transformers' own form in memory."""
    gate, up, down = ("gate_proj", "up_proj", "down_proj") if name == "jamba" else ("w1", "w3", "w2")
    out = {}
    for key, t in tensors.items():
        at = key.find(".experts.")
        if at < 0:
            out[key.replace("block_sparse_moe.gate", "mlp.gate")] = t
        elif key.endswith(f".experts.0.{gate}.weight"):
            block, E = key[:at], sum(k.startswith(key[:at] + ".experts.") and k.endswith(gate + ".weight") for k in tensors)
            of = lambda e, part: tensors[f"{block}.experts.{e}.{part}.weight"]
            to = block.replace("block_sparse_moe", "mlp") + ".experts."
            out[to + "gate_up_proj"] = torch.stack([torch.cat([of(e, gate), of(e, up)]) for e in range(E)])
            out[to + "down_proj"] = torch.stack([of(e, down) for e in range(E)])
    return out


def write(name, kind, dtype=torch.float32, shard=None, fused=False, **more):
    torch.manual_seed(len(name))
    Config, Model, sizes = KINDS[kind]
    config = Config(**{**sizes, **more})
    config._experts_implementation = "eager"  # the others know no float64
    model = Model(config)
    for p in model.parameters():
        if p.dim() >= 2:
            torch.nn.init.normal_(p, 0, 0.5 / p.shape[-1] ** 0.5 if p.shape[-1] < 100 else 0.1)
        else:
            p.data += 0.2 * torch.randn_like(p)
    model = model.to(dtype).eval()
    folder = os.path.join(FOLDER, name)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    os.path.exists(f"{folder}/generation_config.json") and os.remove(f"{folder}/generation_config.json")
    if fused:
        path = f"{folder}/model.safetensors"
        save_file(fuse(load_file(path), kind), path, metadata={"format": "pt"})
    if kind == "mixtral" and fused:  # and the older name of its base
        config = json.load(open(f"{folder}/config.json"))
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        json.dump(config, open(f"{folder}/config.json", "w"), indent=2)
    model = model.double()
    tokens = torch.randint(0, VOCAB, (2, 9))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
        greedy = tokens[:1]
        for _ in range(16):
            greedy = torch.cat([greedy, model(greedy, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    save_file({"tokens": tokens.int(), "logits": logits.contiguous(), "greedy": greedy[0].int().contiguous()}, f"{folder}/expected.safetensors")


shutil.rmtree(FOLDER, ignore_errors=True)
write("mamba", "mamba")
write("mamba-f16-sharded", "mamba", dtype=torch.float16, shard="6KB", tie_word_embeddings=False)
write("mamba-no-conv-bias", "mamba", use_conv_bias=False, expand=3)
write("jamba-sharded", "jamba", shard="20KB")
write("jamba-fused", "jamba", dtype=torch.bfloat16, fused=True, tie_word_embeddings=True)
write("jamba-dense", "jamba", num_experts=1, num_experts_per_tok=1)
write("mixtral", "mixtral")
write("mixtral-fused", "mixtral", fused=True, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
