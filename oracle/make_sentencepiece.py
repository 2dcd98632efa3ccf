#!/usr/bin/env python3
"""Writes sentencepiece.json, beside this script: two small models of SentencePiece, and the tokens that they give for some texts, as hexadecimal
bytes. The first is as Llama's: BPE, spaces as they are, bytes for what it does not know."""
import io, json, os, sys

import sentencepiece

FOLDER = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
words = "and the river went down to old city where nobody lived any more".split()
text = [" ".join(words[(i * i * 7 + j * (i + 3)) % len(words)] for j in range(12)) + [".", "!", " 1984", "  two"][i % 4] for i in range(400)]
texts = ["", "a", " a", "the river", "the  river ", "the\nriver\n\n went", "\tnobody 1984!", "Ωé中 " + "\U0001f600", "x" * 50, " ".join(text[:9])]

made = []
for kind, more in (("bpe", dict(byte_fallback=True, remove_extra_whitespaces=False)), ("unigram", {})):
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=file, vocab_size=300 if kind == "bpe" else 60,
                                             model_type=kind, hard_vocab_limit=False, minloglevel=2,
                                             normalization_rule_name="identity", **more)
    model = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    made.append({"model": file.getvalue().hex(), "cases": [{"text": t.encode().hex(), "tokens": model.encode(t)} for t in texts]})
with open(os.path.join(FOLDER, "sentencepiece.json"), "w") as f:
    json.dump(made, f, separators=(",", ":"))
    f.write("\n")
