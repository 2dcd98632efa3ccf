#!/usr/bin/env python3
"""Our programs beside other people's libraries: tokens of tiktoken, tokenizers and SentencePiece, models of transformers in both directions, files of
zstandard and safetensors. make test-peers runs it with the libraries of oracle/requirements.txt. Prints a line for each comparison."""
import gzip, io, json, os, random, re, subprocess, sys, tempfile, warnings

import numpy as np
import sentencepiece
import tiktoken
import tokenizers
import torch
import transformers
import zstandard
from safetensors.numpy import load_file

PROGRAMS = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else ".")
HERE = os.path.dirname(os.path.abspath(__file__))
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
random.seed(int(os.environ.get("MOEMAMBA_TEST_SEED", "1")))
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def run(program, *arguments):
    done = subprocess.run([f"{PROGRAMS}/{program}", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{program} {' '.join(map(str, arguments))}\n{done.stderr}")
    return done.stdout


def check(what, fine):
    print(("passed  " if fine else "FAILED  ") + what, flush=True)
    check.failed += not fine


check.failed = 0


def read_tokens(folder, split="train"):
    """Documents; end-of-text comes before each."""
    end = json.load(open(f"{folder}/dataset.json"))["tokenizer"]["end_of_text"]
    parts = []
    for name in sorted(n for n in os.listdir(folder) if n.startswith(split + "_")):
        version = np.fromfile(f"{folder}/{name}", dtype=np.int32, count=2)[1]
        parts.append(np.fromfile(f"{folder}/{name}", dtype=np.uint16 if version == 1 else np.uint32, offset=1024).astype(np.int64))
    tokens = np.concatenate(parts)
    return tokens, [part[1:].tolist() for part in np.split(tokens, np.flatnonzero(tokens == end))[1:]]


def write_lines(path, texts):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def random_texts(count):
    """Code points of every kind, code, and runs, none of them empty."""
    spaces = [chr(c) for c in [*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]]

    def code_point():
        c = random.choice([random.randrange(1, 128), random.randrange(1, 0x800), random.randrange(1, 0x10000), random.randrange(1, 0x110000)])
        return "x" if 0xD800 <= c < 0xE000 else chr(c)

    kinds = [lambda: code_point() * random.randrange(1, 3), lambda: random.choice("ab 'st1\n\u3000é"), lambda: random.choice(spaces),
             lambda: random.choice(["'ll", "'re", " the", " 1984", "\r\n", "ing", "\U0001F468\u200D\U0001F469", "हिन्दी", " Ⅷ"]), lambda: " " * random.randrange(9)]
    return ["".join(random.choice(kinds)() for _ in range(random.randrange(1, 40))) + "." for _ in range(count)]


# Unicode grows: characters that one library knows and another does not are split differently by each.
def byte_level(at, text):
    path = f"{at}/text.txt"
    with open(path, "w", encoding="utf-8", newline="") as f:
        f.write(text)
    run("data_prep", "--input", path, "--output", f"{at}/own", "--train-tokenizer", 3000, "--val-fraction", 0)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Digits(individual_digits=True), level])
    trained.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=3000, special_tokens=["<|endoftext|>"], initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    theirs, ours = json.loads(trained.to_str())["model"], json.load(open(f"{at}/own/tokenizer.json"))["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in theirs["merges"]]
    check("tokenizers: the same tokenizer is made of a text", theirs["vocab"] == ours["vocab"] and merges == ours["merges"])

    loaded = tokenizers.Tokenizer.from_file(f"{at}/own/tokenizer.json")
    texts = [t for t in random_texts(100_000) if t.strip()]
    write_lines(f"{at}/random.jsonl", texts)
    run("data_prep", "--input", f"{at}/random.jsonl", "--output", f"{at}/random", "--tokenizer", f"{at}/own", "--val-fraction", 0)
    got = read_tokens(f"{at}/random")[1]
    want = [e.ids for e in loaded.encode_batch(texts, add_special_tokens=False)]
    different = [t for t, a, b in zip(texts, got, want) if a != b]
    check(f"tokenizers: the same tokens of {len(texts)} random texts" + (f", but {len(different)}, the first {different[0]!r}" if different else ""),
          len(got) == len(want) and len(different) <= len(texts) // 1000)
    byte_of = {c: b for b, c in enumerate(bytes_to_characters())}
    ranks = {bytes(byte_of[c] for c in token): i for token, i in ours["vocab"].items() if token != "<|endoftext|>"}
    peer = tiktoken.Encoding("peer", pat_str=DIGITS, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 0})
    different = [t for t, a in zip(texts, got) if peer.encode_ordinary(t) != a]
    check(f"tiktoken: the same tokens of them" + (f", but {len(different)}, the first {different[0]!r}" if different else ""),
          len(different) <= len(texts) // 1000)
    check("tokenizers: tokens give the text", all(loaded.decode(a, skip_special_tokens=False) == t for t, a in zip(texts, got)))


def bytes_to_characters():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def sentence_pieces(at, text):
    version = "".join(subprocess.run(["dpkg-query", "-W", "-f", "${Version}", "libsentencepiece0"], capture_output=True, text=True).stdout.split("-")[:1])
    for kind, more in (("bpe", dict(byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)), ("unigram", {})):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text.split("\n")), model_writer=model, vocab_size=2000, model_type=kind,
                                                 minloglevel=2, **more)
        with open(f"{at}/{kind}.model", "wb") as f:
            f.write(model.getvalue())
        peer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        texts = text.split("\n\n") + [text]
        write_lines(f"{at}/texts.jsonl", texts)
        run("data_prep", "--input", f"{at}/texts.jsonl", "--output", f"{at}/{kind}", "--tokenizer", f"{at}/{kind}.model", "--val-fraction", 0)
        got, want = read_tokens(f"{at}/{kind}")[1], [peer.encode(t) for t in texts if t]
        same = sum(a == b for a, b in zip(got, want))
        # Of pieces that are as probable, another version of the library may choose others.
        check(f"sentencepiece: {kind}, {same} of {len(want)} texts have the same tokens (the library {version}, Python's {sentencepiece.__version__})",
              len(got) == len(want) and (same == len(want) if kind == "bpe" else same > 0.9 * len(want)))


def compressed(at, text):
    write_lines(f"{at}/plain.jsonl", text.split("\n"))
    data = open(f"{at}/plain.jsonl", "rb").read()
    half = len(data) // 2
    with open(f"{at}/one.json.zst", "wb") as f:  # two frames, one of them without its size
        f.write(zstandard.ZstdCompressor(level=19).compress(data[:half]))
        f.write(zstandard.ZstdCompressor(write_content_size=False).compress(data[half:]))
    with gzip.open(f"{at}/one.json.gz", "wb") as f:
        f.write(data)
    for name in ("plain.jsonl", "one.json.zst", "one.json.gz"):
        run("data_prep", "--input", f"{at}/{name}", "--output", f"{at}/of-{name}", "--val-fraction", 0)
    want = read_tokens(f"{at}/of-plain.jsonl")[0]
    for name in ("one.json.zst", "one.json.gz"):
        check(f"{name}: as the plain file", np.array_equal(read_tokens(f"{at}/of-{name}")[0], want))


def from_transformers(at):
    sizes = dict(vocab_size=1003, hidden_size=64, num_hidden_layers=4, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    attention = dict(intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    for name, Config, Model, more, saving in (
            ("mamba", transformers.MambaConfig, transformers.MambaForCausalLM, {}, {}),
            ("mamba in bfloat16, head of its own", transformers.MambaConfig, transformers.MambaForCausalLM, dict(tie_word_embeddings=False), {"dtype": torch.bfloat16}),
            ("jamba", transformers.JambaConfig, transformers.JambaForCausalLM, dict(num_experts=4, attn_layer_period=4, attn_layer_offset=1, **attention), {}),
            ("jamba in shards", transformers.JambaConfig, transformers.JambaForCausalLM, dict(num_experts=4, **attention), {"shard": "200KB"}),
            ("mixtral", transformers.MixtralConfig, transformers.MixtralForCausalLM, dict(num_local_experts=4, head_dim=24, **attention), {}),
            ("mixtral in float16", transformers.MixtralConfig, transformers.MixtralForCausalLM, dict(num_local_experts=4, **attention), {"dtype": torch.float16})):
        torch.manual_seed(1)
        model = Model(Config(**sizes, **more)).eval()
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, 0, 0.1)
        model = model.to(saving.get("dtype", torch.float32))
        model.save_pretrained(f"{at}/{name}", **({"max_shard_size": saving["shard"]} if "shard" in saving else {}))
        model, tokens = model.float(), torch.randint(0, 1003, (1, 12))
        prompt = ",".join(map(str, tokens[0].tolist()))
        with torch.no_grad():
            for _ in range(30):
                tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
        got = run("infer", "--checkpoint", f"{at}/{name}", "--prompt-tokens", prompt, "--print-tokens", "--tokens", 30, "--temperature", 0)
        check(f"transformers -> infer: {name}, 30 tokens", got.strip() == ",".join(map(str, tokens[0].tolist())))


def mean_loss(logits, val, T):
    count = (len(val) - 1) // T
    x, y = (torch.from_numpy(val[i:count * T + i].reshape(count, T)) for i in (0, 1))
    with torch.no_grad():
        return sum(torch.nn.functional.cross_entropy(logits(x[i:i + 16]).double().flatten(0, 1), y[i:i + 16].flatten(), reduction="sum").item()
                   for i in range(0, count, 16)) / (count * T)


def readme_program():
    """The definitions of its PyTorch program."""
    program = {}
    with open(f"{HERE}/../README.md", encoding="utf-8") as f:
        exec(re.search(r"```python\n(.*?)```", f.read(), re.S).group(1), program)
    return program


def to_transformers(at):
    write_lines(f"{at}/train.jsonl", [open(__file__, encoding="utf-8").read()] * 8)
    run("data_prep", "--input", f"{at}/train.jsonl", "--output", f"{at}/data", "--val-fraction", 0.1)
    val, T = read_tokens(f"{at}/data", "val")[0], 32
    ours = readme_program()
    for name in ("mamba-tiny", "jamba-tiny", "mixtral-tiny", "moe-mamba-tiny", "moe-mamba-parallel-tiny", "transformer-tiny", "mixcon-tiny"):
        folder = f"{at}/{name}"
        run("train", "--data", f"{at}/data", "--out", folder, "--preset", name, "--d-model", 64, "--batch", 4, "--seq-len", T, "--steps", 10, "--lr", 3e-3,
            "--peak-flops", 1e11, "--eval-every", 5)
        with open(f"{folder}/log.jsonl") as log:
            want = [json.loads(line)["loss"] for line in log if '"val"' in line][-1]
        check(f"safetensors: opens {name}", load_file(f"{folder}/model.safetensors") is not None)
        if json.load(open(f"{folder}/config.json"))["model_type"] == "moemamba":
            loss = mean_loss(lambda tokens: ours["logits"](folder, tokens), val, T)
            check(f"README's PyTorch: {name}, validation loss {loss:.6f}, ours {want:.6f}", abs(loss - want) <= 1e-5)
            continue
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        check(f"transformers: loads {name} without a warning", not said and not any(info.values()))
        check(f"transformers: its tokenizer", tokenizer.encode("Hé 12", add_special_tokens=False) == list("Hé 12".encode()) and tokenizer.eos_token_id == 256)
        loss = mean_loss(lambda tokens: model(tokens, use_cache=False).logits, val, T)
        check(f"transformers: {name}, validation loss {loss:.6f}, ours {want:.6f}", abs(loss - want) <= 1e-5)


def training(at):
    """The same steps by PyTorch's autograd and AdamW. The data are one batch, so that a step sees all of it, in whatever order."""
    B, T, steps, lr = 4, 32, 20, 2e-3
    with open(f"{at}/batch.txt", "w") as f:
        f.write(__doc__[:B * T])
    run("data_prep", "--input", f"{at}/batch.txt", "--output", f"{at}/batch", "--val-fraction", 0)
    windows = torch.from_numpy(read_tokens(f"{at}/batch")[0][:B * T + 1])
    x, y = windows[:-1].reshape(B, T), windows[1:].reshape(B, T)
    ours = readme_program()
    for name in ("moe-mamba-tiny", "transformer-tiny", "mixcon-tiny"):  # SwiGLU: a ReLU that switches in one of the two would part them
        flags = ["--data", f"{at}/batch", "--preset", name, "--d-model", 64, "--swiglu-ff", 1, "--capacity", 0, "--balance-loss", 0, "--batch", B, "--seq-len", T,
                 "--schedule", "constant", "--warmup", 1, "--weight-decay", 0.1, "--grad-clip", 0.5, "--peak-flops", 1e11]
        begin, end = f"{at}/{name}-begin", f"{at}/{name}-end"
        run("train", *flags, "--out", begin, "--steps", 1, "--lr", 0)  # saves the weights of the initialisation
        run("train", *flags, "--out", end, "--steps", steps, "--lr", lr)
        with open(f"{end}/log.jsonl") as log:
            want = [line["loss"] for line in map(json.loads, log) if line["kind"] == "train"]
        weights = {key: torch.nn.Parameter(torch.from_numpy(w)) for key, w in load_file(f"{begin}/model.safetensors").items()}
        ours["load_file"] = lambda path: weights
        decays = lambda key: "proj" in key and "bias" not in key or any(s in key for s in ("conv1d.weight", "router", "embeddings", "lm_head"))
        adamw = torch.optim.AdamW([{"params": [w for key, w in weights.items() if decays(key) == yes], "weight_decay": 0.1 * yes} for yes in (0, 1)], lr)
        losses = []
        for _ in range(steps):
            loss = torch.nn.functional.cross_entropy(ours["logits"](begin, x)[..., :257].flatten(0, 1), y.flatten())
            losses.append(loss.item())
            adamw.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 0.5)
            adamw.step()
        difference = max(abs(a - b) for a, b in zip(losses, want, strict=True))
        check(f"README's PyTorch trains as we do: {name}, losses of {steps} steps from {want[0]:.3f} to {want[-1]:.3f}, at most {difference:.1e} apart",
              difference <= 1e-4 and want[-1] < 0.5 * want[0])


def pictures(at):
    for name, begin in (("runs.png", b"\x89PNG"), ("runs.svg", b"<?xml"), ("runs.pdf", b"%PDF")):
        subprocess.run([sys.executable, f"{HERE}/../tools/plot.py", f"{at}/moe-mamba-tiny", f"{at}/mamba-tiny/log.jsonl", "--output", f"{at}/{name}"],
                       check=True, capture_output=True)
        check(f"tools/plot.py: {name}", open(f"{at}/{name}", "rb").read().startswith(begin))
    for arguments, message in ((["nothing"], "cannot read nothing"), ([f"{at}/mamba-tiny", "--output", "x.doc"], "must end in"),
                               ([f"{at}/mamba-tiny", "--output", f"{at}/no/x.svg"], "cannot write"), ([f"{at}/mamba-tiny/config.json"], "no line of a log")):
        done = subprocess.run([sys.executable, f"{HERE}/../tools/plot.py", *arguments], capture_output=True, text=True)
        check(f"tools/plot.py refuses: {message}", done.returncode == 1 and message in done.stderr)


def main():
    # Long texts of people's, wherever Python is.
    text = "".join(open(f"{os.path.dirname(json.__file__)}/../{name}.py", encoding="utf-8").read() for name in ("typing", "subprocess", "tarfile", "argparse"))
    with tempfile.TemporaryDirectory() as at:
        byte_level(at, text)
        sentence_pieces(at, text)
        compressed(at, text)
        from_transformers(at)
        to_transformers(at)
        training(at)
        pictures(at)
    sys.exit(check.failed > 0)


if __name__ == "__main__":
    main()
