#!/usr/bin/env python3
"""Writes bpe.json, beside this script: two small byte-level BPE tokenizers, as Hugging Face's tokenizers library trains and saves them, and the
tokens that it and tiktoken give for texts of every kind. In the second every digit is a word of its own, which tiktoken's pattern has to be told.
Texts are hexadecimal bytes, not all of them UTF-8: Python's errors="replace" is what both libraries see."""
import json, os, random, sys

import tiktoken
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

FOLDER = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
random.seed(1)

english = ("It's what we've said: they'll go, I'd stay, you're late, I'm not, don't. 'Tis 1984, or 12,345.67 of them!\n\n"
           "  The LORD said unto him, What is that in thine hand? And he said, A rod.  \n\tfor (int i = 0; i < n; i++) x[i] += 1;\r\n")
scripts = "Ελληνικά и русский текст, עברית, العربية ١٢٣, हिन्दी २०२४, ไทย, 한국어, 日本語と中文、ⅣⅫ ½ ²³ é e\u0301 Straße ﬁ\n"
emoji = "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 e\u20e3 \U0001F1E9\U0001F1EA"
spaces = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and (chr(c).isspace() or c in (0x180E, 0x200B, 0x2060, 0xFEFF))]


def code_point():
    while True:
        c = random.choice([random.randrange(128), random.randrange(0x800), random.randrange(0x10000), random.randrange(0x110000)])
        if not 0xD800 <= c < 0xE000:
            return chr(c)


texts = [english, scripts, emoji, "", " ", "  ", "a", "a b", " a", "a ", "a  ", "  a", "\n\n\na\n\n", "a\r\nb\r\n\r\n  c", "\t\t x", "''s 's' 'S 're 'll'",
         "a<|endoftext|>b <|endoftext|>", "1 12 1234 a1b2 1.5e-3 x 7", "a" * 500, " " * 300 + "x", "\n" * 200, "7" * 100, "!" * 100, "é" * 100]
texts += [f"a{s}b {s}c{s}{s}d{s} 1{s}\n" for s in spaces]
texts += ["".join(code_point() for _ in range(40)) for _ in range(60)]
texts += ["".join(random.choice("ab 'st1\n\u3000é") for _ in range(40)) for _ in range(60)]
raw = [t.encode() for t in texts]
raw += [bytes(random.randrange(256) for _ in range(60)) for _ in range(40)]
raw += [bytes(random.choice(b"\xc2\xe0\xed\xf0\xf4\x80\x90\xa0\xbf\x9f\x8f\xff\xc0\xf5 a") for _ in range(60)) for _ in range(40)]
raw += [scripts.encode()[:n] for n in range(1, 24)]


def make(digits):
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]) if digits else level
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  show_progress=False)
    t.train_from_iterator([english] * 3 + [scripts] * 2 + [emoji, "a" * 64, " " * 64], trainer)
    saved = json.loads(t.to_str())
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    ranks = {bytes(byte_of[c] for c in token): i for token, i in saved["model"]["vocab"].items() if token != "<|endoftext|>"}
    # tiktoken wants a byte's rank below that of every merge, and ranks in the order of the merges: as the trainer numbers them.
    peer = tiktoken.Encoding("peer", pat_str=DIGITS if digits else GPT2, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 0})
    ids = []
    for b in raw:
        text = b.decode("utf-8", "replace")
        ids.append(peer.encode_ordinary(text))
        if "<|endoftext|>" not in text:  # there it would find the special token
            assert t.encode(text, add_special_tokens=False).ids == ids[-1], (digits, text)
    return saved, ids


(plain, plain_ids), (digits, digits_ids) = make(False), make(True)
cases = [{"text": b.hex(), "tokens": p, "digits_apart": d} for b, p, d in zip(raw, plain_ids, digits_ids)]

# A tokenizer that data_prep is to make too: of words that repeat, every digit apart, and with ties between pairs.
words = (english + scripts + emoji).split(" ") + ["aaaa", "aaaaaaa", "abcabc", "bcabca", "1999", "2024", "x1", "zz"]
made_of = " ".join(random.choice(words) for _ in range(3000)) + "\n" * 9 + "a" * 300
level = pre_tokenizers.ByteLevel(add_prefix_space=False)
t = Tokenizer(models.BPE())
t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
t.train_from_iterator([made_of], trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False,
                                                     initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
model = json.loads(t.to_str())["model"]

# As GPT-NeoX's, which Mamba's checkpoints have: NFC, and runs of spaces that are tokens.
neox = Tokenizer.from_str(json.dumps(plain))
neox.normalizer = normalizers.NFC()
neox.add_tokens([AddedToken(" " * n, normalized=True) for n in (24, 8, 5, 3, 2)])
neox_texts = [t for t in texts if "<|endoftext|>" not in t] + ["e\u0301 \u1100\u1161 \u212b" + " " * n + "x\n" + " " * n for n in range(1, 60)]
neox_cases = [{"text": t.encode().hex(), "tokens": neox.encode(t, add_special_tokens=False).ids} for t in neox_texts]
trained = {"text": made_of.encode().hex(), "vocab": model["vocab"], "merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]}

with open(os.path.join(FOLDER, "bpe.json"), "w") as f:
    json.dump({"tokenizer": plain, "digits_apart": digits, "cases": cases, "trained": trained,
               "neox": {"tokenizer": json.loads(neox.to_str()), "cases": neox_cases}}, f, separators=(",", ":"))
    f.write("\n")
print(len(cases), "texts")
