#!/usr/bin/env python3
"""Makes the tables of docs/replication.md and README.md, and the pictures of docs/replication/, from docs/replication/results/ alone.

    tools/report.py [--check]      --check: changes nothing, and fails if anything is not what the results say

A table stands between <!-- NAME --> and <!-- /NAME -->. Pictures need matplotlib (python3-matplotlib); without it they stay as they are."""
import argparse
import glob
import io
import math
import os
import re
import statistics
import sys

from replicate import FOLDER, VOCABULARY, definition, fail, in_one_line, read_experiments, read_lines, seeds_of, write_whole

PAGES = ("docs/replication.md", "README.md")
RESULTS = {}  # {experiment: {seed: line}}


# ---- results

def unsound(line, experiment):
    """The first key of a result that is not as tables and pictures read it."""
    number = lambda x: isinstance(x, (int, float)) and math.isfinite(x)
    curve = lambda x: len(x) == len(line["step"]) > 0 and all(map(number, x))
    if "decode" in experiment:
        points = [[int(x) for x in point.split(":")] for point in experiment["decode"].split()]
        keys = {"points": lambda x: [[p["batch"], p["context"]] for p in x] == points and all(number(value) for p in x for value in p.values())}
    else:
        keys = {key: number for key in ("parameters", "active_parameters", "steps", "tokens_per_step", "seconds")}
        keys |= {key: curve for key in ("step", "loss", "expert_load", "dropped", "gain") if key in ("step", "loss") or key in line}
        keys["validation"] = lambda x: len(x) > 0 and all(number(step) and number(loss) for step, loss in x)
        if "score" in experiment:
            keys["score"] = lambda x: all(number(x[name]["known"]) for name in experiment["score"].split())
        if "gains" in experiment:
            keys["gains"] = lambda x: [row[0] for row in x] == [int(tokens) for tokens in experiment["gains"].split()]
    for key, sound in keys.items():
        try:
            if sound(line[key]):
                continue
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            pass
        return key
    return None


def read_results(check):
    """Those of experiments as they are defined now. On one dataset all have seen the same tokens."""
    experiments = {e["name"]: e for e in read_experiments()}
    of_data, others = {}, 0
    for path in sorted(glob.glob(f"{FOLDER}/results/*.jsonl")):
        for line in read_lines(path):
            e, where = experiments.get(line["name"]), f"{path}: {line['name']}, seed {line['seed']}"
            if not e or line["seed"] not in seeds_of(e) or line["definition"] != definition(e):
                others += 1
                continue
            if wrong := unsound(line, e):
                fail(f"{where}: {wrong} is missing or damaged; remove the line, and its experiment is run again")
            if "decode" not in e and of_data.setdefault(e["data"], line["data"]) != line["data"]:
                fail(f"{where}, is of other tokens than the results before it, and cannot be compared with them")
            RESULTS.setdefault(line["name"], {})[line["seed"]] = line
    missing = [f"{name}, seed {seed}" for name, e in experiments.items() for seed in seeds_of(e) if seed not in RESULTS.get(name, {})]
    tell = fail if check else lambda text: print(f"note: {text}", file=sys.stderr)
    if others:
        tell(f"{FOLDER}/results: {others} of experiments that experiments.ini does not have, or defines otherwise, are left out")
    if missing:
        tell(f"{FOLDER}/results: {len(missing)} are missing, the first {missing[0]}: make replicate")


def validation(line):
    return line["validation"][-1][1]


def training(line):
    """Over the last tenth of the steps."""
    return statistics.mean(line["loss"][-max(1, len(line["loss"]) // 10):])


def known(dataset):
    return lambda line: line["score"][dataset]["known"]


def end_of(key):
    """Of what is logged in training: its mean over the last half."""
    return lambda line: statistics.mean(line[key][len(line[key]) // 2:])


def values(name, measure=validation):
    return {seed: measure(line) for seed, line in sorted(RESULTS.get(name, {}).items())}


def margin(numbers):
    """Two standard errors of the mean."""
    return 2 * statistics.stdev(numbers) / math.sqrt(len(numbers))


def shown(numbers, digits=3, sign=""):
    numbers = list(numbers)
    if not numbers:
        return "-"
    return f"{statistics.mean(numbers):{sign}.{digits}f}" + (f" ± {margin(numbers):.{digits}f}" if len(numbers) > 1 else "")


def differences(left, right, measure=validation):
    """left - right, seed by seed: both have seen the same tokens in the same order."""
    a, b = values(left, measure), values(right, measure)
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def judged(holds, contradicted):
    return "holds" if holds else "contradicted" if contradicted else "does not show at this size"


def verdict(numbers):
    """Of differences that a claim wants below 0."""
    if len(numbers) < 3:
        return "-"
    mean, least = statistics.mean(numbers), margin(numbers)
    return judged(mean < -least, mean > least)


def steps_to_reach(line, loss):
    """Share of the steps after which validation is at most this loss, between validations linearly; infinite, if it never is."""
    before = None
    for step, value in line["validation"]:
        if value <= loss:
            share = step if before is None else before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
            return share / line["steps"]
        before = (step, value)
    return math.inf


# ---- tables

def table(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])


def or_dash(x, digits):
    return "-" if math.isnan(x) else f"{x:.{digits}f}"


def millions(number):
    return f"{number / 1e6:.2f} M"


FIVE = {"equal/transformer": "Transformer", "equal/mamba-mlp": "Mamba-MLP", "five/mamba": "Mamba", "equal/transformer-moe": "Transformer-MoE, 8 experts",
        "equal/moe-mamba": "MoE-Mamba, 8 experts", "equal/moe-mamba-32": "MoE-Mamba, 32 experts"}
PAPER_FIVE = {"equal/transformer": ("3.66", "> 100 %"), "equal/mamba-mlp": ("3.56", "> 100 %"), "five/mamba": ("3.51", "100 %"),
              "equal/transformer-moe": ("3.54 (32 experts)", "> 100 %"), "equal/moe-mamba": ("3.51", "91 %"), "equal/moe-mamba-32": ("3.41", "46 %")}
PRESETS = {"five/transformer": "Transformer", "five/mamba-mlp": "Mamba-MLP", "five/mamba": "Mamba", "five/transformer-moe": "Transformer-MoE, 8 experts",
           "five/moe-mamba": "MoE-Mamba, 8 experts", "experts/32": "MoE-Mamba, 32 experts", "experts/32-no-capacity": "MoE-Mamba, 32 experts, no capacity"}


def percent(share):
    return "> 100 %" if math.isinf(share) else f"{100 * share:.0f} %"


def shares_of(name):
    """Steps to Mamba's loss at the end, of each seed."""
    mamba = values("five/mamba")
    return [steps_to_reach(line, mamba[seed]) for seed, line in sorted(RESULTS.get(name, {}).items()) if seed in mamba]


def steps(name):
    return "100 %" if name == "five/mamba" else ", ".join(map(percent, shares_of(name))) or "-"


def sizes(name):
    """Parameters; active ones for a token, embedding and head aside, as papers count."""
    for line in RESULTS.get(name, {}).values():
        width = int(re.search(r"--d-model (\d+)", line["definition"])[1])
        return [millions(line["parameters"]), f"{(line['active_parameters'] - 2 * VOCABULARY * width) / 1000:.0f} K"]
    return ["-", "-"]


def beside_mamba(name):
    return [*sizes(name), shown(values(name).values()), "" if name == "five/mamba" else shown(differences(name, "five/mamba")), steps(name)]


BESIDE_MAMBA = ["parameters", "active", "validation loss", "minus Mamba's", "steps to Mamba's loss, by seed"]


def five():
    return table(["", *BESIDE_MAMBA, "paper (25M): loss", "steps"], [[title, *beside_mamba(name), *PAPER_FIVE[name]] for name, title in FIVE.items()])


def presets():
    return table(["", *BESIDE_MAMBA], [[title, *beside_mamba(name)] for name, title in PRESETS.items()])


RATES = ("2e-3", "4e-3", "8e-3")


def rates():
    def cell(name, rate):
        found = values(name if rate == "4e-3" else f"lr/{name.split('/')[1]}-{rate}").get(1)
        return "-" if found is None else f"{found:.3f}"
    rows = {name: title for name, title in PRESETS.items() if name.startswith("five/")}
    rows |= {"mixcon/2-6": "MixCon, 2 : 6, dense", "mixcon/8-0": "attention alone, 16 steps deep as MixCon"}
    return table(["", *RATES], [[title, *(cell(name, rate) for rate in RATES)] for name, title in rows.items()])


EXPERTS = (1, 2, 4, 8, 16, 32)
PAPER_EXPERTS = {1: ("3.76", "3.79"), 2: ("3.74", "3.77"), 4: ("3.71", "3.74"), 8: ("3.69", "3.72"), 16: ("3.67", "3.70"), 32: ("3.66", "3.69")}


def sequential(experts):
    return "five/moe-mamba" if experts == 8 else f"experts/{experts}"


def experts():
    rows = []
    for e in EXPERTS:
        one, two = sequential(e), f"experts/{e}-parallel"
        rows.append([e, sizes(one)[0], shown(values(one).values()), shown(values(two).values()), shown(differences(one, two)), *PAPER_EXPERTS[e]])
    return table(["experts", "parameters", "one after the other", "in parallel", "difference", "paper: one after the other", "paper: in parallel"], rows)


RATIOS = {"1-5": "1 : 5", "2-4": "2 : 4", "3-3": "3 : 3", "4-2": "4 : 2", "5-1": "5 : 1", "6-0": "6 : 0 (no experts)"}


def ratio_name(ratio):
    return "five/moe-mamba" if ratio == "3-3" else f"ratio/{ratio}"


def ratio():
    return table(["Mamba : experts, active parameters", "parameters", "active", "validation loss", "minus that of 3 : 3"],
                 [[title, *sizes(ratio_name(key)), shown(values(ratio_name(key)).values()), "" if key == "3-3" else shown(differences(ratio_name(key), "five/moe-mamba"))]
                  for key, title in RATIOS.items()])


ROUTERS = {"five/moe-mamba": "capacity 1, balancing loss 0.01", "router/no-capacity": "no capacity", "router/no-balance": "no balancing loss",
           "router/neither": "neither", "router/expert-choice": "Expert Choice (not causal)"}


def router():
    return table(["", "training loss at the end", "validation loss", "fullest expert over the mean", "dropped"],
                 [[title, shown(values(name, training).values()), shown(values(name).values()) if "choice" not in name else "",
                   shown(values(name, end_of("expert_load")).values(), 2), shown([100 * x for x in values(name, end_of("dropped")).values()], 1) + " %"]
                  for name, title in ROUTERS.items()])


MIXCON = {"0-8": "0 : 8 (pure Conba)", "1-7": "1 : 7", "2-6": "2 : 6", "8-0": "8 : 0 (attention alone, RoPE)", "2-6-mamba": "2 : 6, Mamba for Conba"}


def mixcon():
    return table(["attention : Conba", "active, dense", "loss, dense", "with experts", "with experts minus dense"],
                 [[title, sizes(f"mixcon/{key}")[1], shown(values(f"mixcon/{key}").values()), shown(values(f"mixcon/{key}-moe").values()),
                   shown(differences(f"mixcon/{key}-moe", f"mixcon/{key}"))] for key, title in MIXCON.items()])


CONBA = {"mixcon/2-6-moe": "all terms, alpha 0.01", "conba/no-selection": "without selection", "conba/no-control": "without control and adaptation",
         "conba/no-adaptation": "without adaptation (alpha 0)", "conba/no-delay": "without delay", "conba/no-scaling": "without scaling", "conba/noise": "with noise (0.01)",
         "conba/alpha-1e-3": "alpha 0.001", "conba/alpha-1e-1": "alpha 0.1", "mixcon/2-6-mamba-moe": "none of them: Mamba"}


def conba():
    return table(["", "validation loss", "minus that of all terms", "largest gain k at the end of training"],
                 [[title, shown(values(name).values()), "" if name == "mixcon/2-6-moe" else shown(differences(name, "mixcon/2-6-moe")),
                   shown([line["gain"][-1] for line in RESULTS.get(name, {}).values() if "gain" in line], 2)] for name, title in CONBA.items()])


TASKS = ("recall", "induction", "copying")
LEARNERS = {"transformer": "Transformer (AFAF)", "mamba": "Mamba (MMMM)", "moe-mamba": "MoE-Mamba (MEME)", "conba": "Conba (CFCF)", "jamba": "Mamba and attention (MFAF)",
            "mixcon": "Conba and attention (CFAF)"}


def context():
    def cell(task, model, length):
        numbers = values(f"{task}/{model}", known(f"{task}-{length}")).values()
        return " ".join(f"{number:.0f}" for number in numbers) or "-"
    return table(["", *(f"{task}, {length}" for task in TASKS for length in (64, 128, 256))],
                 [[title, *(cell(task, model, length) for task in TASKS for length in (64, 128, 256))] for model, title in LEARNERS.items()])


def rounds(model, batch, context, key="decode"):
    """{round: value}; not every round has measured memory."""
    name = f"decode64k/{model}" if context == 65536 and model in ("mixtral", "jamba", "mixcon") else f"decode/{model}"
    return {seed: p[key] for seed, line in RESULTS.get(name, {}).items() for p in line["points"]
            if (p["batch"], p["context"]) == (batch, context) and key in p}


def measured(model, batch, context, key="decode"):
    """Median over the rounds."""
    found = rounds(model, batch, context, key).values()
    return statistics.median(found) if found else math.nan


def speedups(other, batch, context):
    """MixCon's speed by another's, round by round."""
    mixcon, others = rounds("mixcon", batch, context), rounds(other, batch, context)
    return [mixcon[i] / others[i] for i in sorted(mixcon.keys() & others.keys())]


def ratio_shown(numbers):
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f} to {max(numbers):.2f})" if numbers else "-"


BATCHES, CONTEXTS = (1, 2, 4, 8, 16), (1024, 2048, 4096, 16384, 65536)


def throughput():
    def row(title, batch, context):
        return [title, *(or_dash(measured(model, batch, context), 0) for model in ("mixtral", "jamba", "mixcon")),
                *(ratio_shown(speedups(other, batch, context)) for other in ("mixtral", "jamba"))]
    rows = [row(f"{batch} at once, 2K", batch, 2048) for batch in BATCHES] + [row(f"1, {context // 1024}K", 1, context) for context in CONTEXTS if context != 2048]
    return table(["sequences, context", "Mixtral", "Jamba", "MixCon", "MixCon / Mixtral", "MixCon / Jamba"], rows)


def memory():
    rows = []
    for model, title in (("mixtral", "Mixtral"), ("jamba", "Jamba"), ("mixcon", "MixCon"), ("transformer", "Transformer"), ("mamba", "Mamba"), ("moe-mamba", "MoE-Mamba")):
        for what, key, scale, digits in (("ms a token", "decode", None, 1), ("keys and values, MB", "cache_mb", 1, 1), ("recurrent state, MB", "recurrent_mb", 1, 2),
                                         ("peak memory, MB", "peak_memory", 1e-6, 0)):
            numbers = [measured(model, 1, context, key) for context in CONTEXTS]
            cells = [or_dash(1000 / x if scale is None else x * scale, digits) for x in numbers]
            rows.append([f"{title}: {what}", *cells])
    return table(["one sequence, context", *(f"{context // 1024}K" for context in CONTEXTS)], rows)


def setup():
    lines = [line for seeds in RESULTS.values() for line in seeds.values()]
    rows = []
    for title, group in (("on text", [line for line in lines if "steps" in line and "score" not in line]), ("on tasks", [line for line in lines if "score" in line])):
        if group:
            tokens = sorted({line["steps"] * line["tokens_per_step"] for line in group})
            minutes = [line["seconds"] / 60 for line in group]
            rows.append([title, len(group), " or ".join(millions(x) for x in tokens), f"{min(minutes):.1f} to {max(minutes):.1f}", f"{sum(minutes) / 60:.1f}"])
    return table(["", "runs", "tokens of a run", "minutes of its training steps, one core", "core hours of all"], rows)


def better(claim, paper, numbers):
    """A row: numbers are differences, that the claim wants below 0."""
    return [claim, paper, shown(numbers, 3, "+"), verdict(numbers)]


def recalls_more(claim, length):
    numbers = differences("recall/mixcon", "recall/conba", known(f"recall-{length}"))
    return [claim, "no figure", shown(numbers, 0, "+") + (" points" if numbers else ""), verdict([-x for x in numbers])]


def decodes_faster(claim, paper, other, batch, context):
    """A row. One round may be disturbed."""
    numbers = speedups(other, batch, context)
    if len(numbers) < 3:
        return [claim, paper, "-", "-"]
    counted = sorted(numbers)
    return [claim, paper, ratio_shown(numbers) + " x", judged(counted[1] > 1.05, counted[-2] < 0.95)]


def claim_rows():
    gap = differences
    in_all_numbers = [gap(sequential(e), f"experts/{e}-parallel") for e in EXPERTS]
    rows = [better("MoE-Mamba, 32 experts, has a lower loss than Mamba", "-0.10", gap("equal/moe-mamba-32", "five/mamba")),
            better("MoE-Mamba, 8 experts, has a lower loss than Mamba-MLP", "-0.05", gap("equal/moe-mamba", "equal/mamba-mlp")),
            better("Mamba has a lower loss than the Transformer", "-0.15", gap("five/mamba", "equal/transformer")),
            better("Transformer-MoE, 8 experts, has a lower loss than the Transformer", "-0.12 (32 experts)", gap("equal/transformer-moe", "equal/transformer")),
            better("MoE-Mamba has a lower loss than Transformer-MoE, 8 experts", "-0.13 (32 experts)", gap("equal/moe-mamba", "equal/transformer-moe")),
            better("Mamba has a lower loss than Mamba-MLP", "-0.05", gap("five/mamba", "equal/mamba-mlp"))]
    shares = shares_of("equal/moe-mamba-32")
    if len(shares) >= 3:
        rows.append(["MoE-Mamba, 32 experts, reaches Mamba's loss in fewer steps", "46 %; 43 % at 100M", ", ".join(map(percent, shares)),
                     judged(max(shares) < 1, min(shares) > 1)])
    return rows + [
        better("32 experts have a lower loss than 8", "-0.03", gap("experts/32", "five/moe-mamba")),
        better("8 experts have a lower loss than 1", "-0.07", gap("five/moe-mamba", "experts/1")),
        better("One after the other beats in parallel, mean over 1 to 32 experts", "-0.03", [statistics.mean(of_seed) for of_seed in zip(*in_all_numbers)]),
        better("Half the active parameters in Mamba (3:3) beat a sixth (1:5)", "below 0 (a figure)", gap("five/moe-mamba", "ratio/1-5")),
        better("Experts beat a wider Mamba of as many active parameters", "-0.07", gap("equal/moe-mamba", "ratio/6-0")),
        better("The hybrid (2:6) has a lower loss than pure Conba, dense", "HellaSwag +2.2", gap("mixcon/2-6", "mixcon/0-8")),
        better("the same, with experts", "", gap("mixcon/2-6-moe", "mixcon/0-8-moe")),
        better("The hybrid (2:6) has a lower loss than attention alone, dense", "HellaSwag +0.2", gap("mixcon/2-6", "mixcon/8-0")),
        better("the same, with experts", "", gap("mixcon/2-6-moe", "mixcon/8-0-moe")),
        better("2:6 has a lower loss than 1:7, dense", "HellaSwag -0.1", gap("mixcon/2-6", "mixcon/1-7")),
        better("the same, with experts", "", gap("mixcon/2-6-moe", "mixcon/1-7-moe")),
        better("Experts improve the hybrid (2:6)", "HellaSwag +5.3", gap("mixcon/2-6-moe", "mixcon/2-6")),
        better("Conba has a lower loss than Mamba in its place, dense", "no figure", gap("mixcon/2-6", "mixcon/2-6-mamba")),
        better("the same, with experts", "", gap("mixcon/2-6-moe", "mixcon/2-6-mamba-moe")),
        recalls_more("The hybrid recalls more than pure Conba, 64 tokens", 64),
        recalls_more("the same, at four times the length of training", 256),
        decodes_faster("MixCon decodes faster than Mixtral, 16 sequences of 2K", "3 x (8K)", "mixtral", 16, 2048),
        decodes_faster("MixCon decodes faster than Jamba, 16 sequences of 2K", "2 x (8K)", "jamba", 16, 2048),
        decodes_faster("MixCon decodes faster than Mixtral, one sequence of 64K", "4.5 x (128K)", "mixtral", 1, 65536),
        decodes_faster("MixCon decodes faster than Jamba, one sequence of 64K", "1.5 x (128K)", "jamba", 1, 65536)]


def claims():
    return table(["claim", "paper", "here", ""], claim_rows())


def headline():
    rows = [[title, PAPER_FIVE[name][0], shown(values(name).values()), PAPER_FIVE[name][1], steps(name)] for name, title in FIVE.items()]
    verdicts = [row[-1] for row in claim_rows()]
    count = lambda text: verdicts.count(text)
    return table(["", "loss in the paper", "here", "steps to Mamba's loss in the paper", "here, by seed"], rows) + (
        f"\n\nOf {len(verdicts) - count('-')} claims that were tried, {count('holds')} hold here, {count('does not show at this size')} do not show, "
        f"{count('contradicted')} are contradicted.")


TABLES = {f.__name__: f for f in (setup, claims, headline, five, presets, rates, experts, ratio, router, mixcon, conba, context, throughput, memory)}


def read(path):
    """"" if there is no such file."""
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as f:
        return f.read()


def fill(pages):
    """The pages with their tables as the results have them."""
    for name, make in TABLES.items():
        places = 0
        for path, text in pages.items():
            table_of = lambda found: found[1] + "\n" + make() + "\n\n" + found[2]
            pages[path], here = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", table_of, text, flags=re.DOTALL)
            places += here
        if places != 1:
            fail(f"{' and '.join(pages)}: the lines <!-- {name} --> and <!-- /{name} --> must stand there once, they do {places} times")
    return pages


# ---- pictures

REACH = 2  # a smoothed point is the mean of so many on either side


def smooth(numbers):
    return [statistics.mean(numbers[i - REACH:i + REACH + 1]) for i in range(REACH, len(numbers) - REACH)]


def band(axis, name, label, key="loss"):
    """A quantity over training: mean of the seeds, and from the least to the greatest."""
    lines = [line for _, line in sorted(RESULTS.get(name, {}).items()) if key in line]
    if not lines:
        return
    tokens = [step * lines[0]["tokens_per_step"] / 1e6 for step in lines[0]["step"][REACH:-REACH]]
    columns = list(zip(*(smooth(line[key]) for line in lines)))
    color = axis.plot(tokens, [statistics.mean(column) for column in columns], label=label)[0].get_color()
    axis.fill_between(tokens, [min(column) for column in columns], [max(column) for column in columns], alpha=0.2, color=color, linewidth=0)


def seeds_and_mean(axis, names, label, at=None, measure=validation, **style):
    """A line through the means, and a dot for each seed."""
    at = at or list(range(len(names)))
    groups = [list(values(name, measure).values()) for name in names]
    pairs = [(x, group) for x, group in zip(at, groups) if group]
    if not pairs:
        return
    color = axis.plot([x for x, _ in pairs], [statistics.mean(group) for _, group in pairs], label=label, **style)[0].get_color()
    for x, group in pairs:
        axis.plot([x] * len(group), group, "o", markersize=3, alpha=0.6, color=color)


def finish(axis, title, x, y=None, legend=True):
    axis.set_title(title, fontsize="medium")
    axis.set_xlabel(x)
    if y:
        axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small")


def picture_five(pyplot):
    figure, (curves, end) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(3, 2))
    for name, title in FIVE.items():
        band(curves, name, title)
    lowest = [min(line["loss"]) for name in FIVE for line in RESULTS.get(name, {}).values()]
    if lowest:
        curves.set_ylim(min(lowest) - 0.05, min(lowest) + 1.8)
    finish(curves, "training loss, smoothed (band: three seeds)", "million tokens", "nats a token")
    for i, (name, title) in enumerate(FIVE.items()):
        group = list(values(name).values())
        if group:
            end.plot(group, [i] * len(group), "o", markersize=5, alpha=0.6, color=f"C{i}")
            end.plot([statistics.mean(group)], [i], "|", markersize=22, color=f"C{i}")
    end.set_yticks(range(len(FIVE)), list(FIVE.values()))
    end.set_ylim(len(FIVE) - 0.4, -0.6)
    finish(end, "validation loss at the end (dots: seeds)", "nats a token")
    return figure


def picture_experts(pyplot):
    figure, (number, share) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    seeds_and_mean(number, [sequential(e) for e in EXPERTS], "one after the other", list(EXPERTS))
    seeds_and_mean(number, [f"experts/{e}-parallel" for e in EXPERTS], "in parallel", list(EXPERTS))
    mamba = list(values("five/mamba").values())
    if mamba:
        number.axhline(statistics.mean(mamba), color="gray", linestyle="--", label="Mamba")
    number.set_xscale("log", base=2)
    number.set_xticks(EXPERTS, EXPERTS)
    finish(number, "number of experts", "experts in each layer", "validation loss, nats a token")
    seeds_and_mean(share, [ratio_name(key) for key in RATIOS], None)
    share.set_xticks(range(len(RATIOS)), [title.split(" (")[0] for title in RATIOS.values()])
    finish(share, "active parameters", "in Mamba : in the experts", "validation loss, nats a token", legend=False)
    return figure


def picture_router(pyplot):
    figure, (load, loss) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, title in ROUTERS.items():
        if "choice" not in name:
            band(load, name, title, "expert_load")
        band(loss, name, title)
    lowest = [min(line["loss"]) for name in ROUTERS for line in RESULTS.get(name, {}).values()]
    if lowest:
        loss.set_ylim(min(lowest) - 0.05, min(lowest) + 1.4)
    load.set_ylim(bottom=0.9)
    finish(load, "load of 8 experts over training, smoothed (band: three seeds)", "million tokens", "fullest expert over the mean")
    finish(loss, "training loss, smoothed", "million tokens", "nats a token")
    return figure


def picture_mixcon(pyplot):
    figure, (curves, terms) = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for key, title in MIXCON.items():
        band(curves, f"mixcon/{key}-moe", title)
    lowest = [min(line["loss"]) for key in MIXCON for line in RESULTS.get(f"mixcon/{key}-moe", {}).values()]
    if lowest:
        curves.set_ylim(min(lowest) - 0.05, min(lowest) + 1.4)
    finish(curves, "training loss with experts; attention : Conba\n(smoothed; band: three seeds)", "million tokens", "nats a token")
    names = [name for name in CONBA if name != "mixcon/2-6-moe"]
    for i, name in enumerate(names):
        gaps = differences(name, "mixcon/2-6-moe")
        if gaps:
            terms.plot(gaps, [i] * len(gaps), "o", markersize=4, alpha=0.6, color="C0")
            terms.errorbar([statistics.mean(gaps)], [i], xerr=[margin(gaps)], fmt="|", markersize=14, color="C0", capsize=3)
    terms.axvline(0, color="gray", linestyle="--")
    terms.set_yticks(range(len(names)), [CONBA[name] for name in names])
    terms.invert_yaxis()
    finish(terms, "terms of Conba: loss minus that of all terms\n(dots: seeds; bar: two standard errors)", "nats a token; above 0: worse", legend=False)
    return figure


def picture_gains(pyplot):
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained", sharey=True)
    for axis, (name, title) in zip(axes, {"conba/alpha-1e-3": "alpha 0.001", "mixcon/2-6-moe": "alpha 0.01", "conba/alpha-1e-1": "alpha 0.1"}.items()):
        line = RESULTS.get(name, {}).get(1)
        if line:
            at = [row[0] for row in line["gains"]]
            for layer in range(len(line["gains"][0][1])):
                color = axis.plot(at, [row[1][layer] for row in line["gains"]], color=f"C{layer}", label=f"Conba layer {layer + 1}")[0].get_color()
                axis.plot(at, [row[2][layer] for row in line["gains"]], color=color, linestyle=":")
        axis.set_xscale("log", base=2)
        finish(axis, title, "tokens of the sequence", legend=axis is axes[0])
    axes[0].set_ylabel("|gain k| of the channels: mean, largest (dotted)")
    return figure


def picture_context(pyplot):
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained", sharey=True)
    for axis, task in zip(axes, TASKS):
        for model, title in LEARNERS.items():
            points = [(length, list(values(f"{task}/{model}", known(f"{task}-{length}")).values())) for length in (64, 128, 256)]
            points = [(length, group) for length, group in points if group]
            if points:
                color = axis.plot([x for x, _ in points], [statistics.mean(group) for _, group in points], marker="o", label=title)[0].get_color()
                axis.fill_between([x for x, _ in points], [min(group) for _, group in points], [max(group) for _, group in points], alpha=0.12, color=color,
                                  linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks((64, 128, 256), ("64\n(trained)", 128, 256))
        axis.set_ylim(-3, 103)
        finish(axis, task, "tokens of an example", "answers known, %" if axis is axes[0] else None, legend=False)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    return figure


def picture_throughput(pyplot):
    figure, (batch, context, memory_axis) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    models = {"mixtral": "Mixtral", "jamba": "Jamba", "mixcon": "MixCon", "transformer": "Transformer", "mamba": "Mamba", "moe-mamba": "MoE-Mamba"}
    for i, (model, title) in enumerate(models.items()):
        def line(axis, at, numbers):
            kept = [(x, y) for x, y in zip(at, numbers) if not math.isnan(y)]
            if kept:
                axis.plot(*zip(*kept), marker="o", markersize=4, label=title, color=f"C{i}", linestyle="-" if i < 3 else "--")
        if i < 3:
            line(batch, BATCHES, [measured(model, b, 2048) for b in BATCHES])
        line(context, CONTEXTS, [measured(model, 1, c) for c in CONTEXTS])
        line(memory_axis, CONTEXTS, [measured(model, 1, c, "cache_mb") + measured(model, 1, c, "recurrent_mb") for c in CONTEXTS])
    for axis, ticks in ((batch, BATCHES), (context, CONTEXTS), (memory_axis, CONTEXTS)):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [t if t < 1024 else f"{t // 1024}K" for t in ticks])
    batch.set_ylim(bottom=0)
    memory_axis.set_yscale("log")
    finish(batch, "decoding, context 2K", "sequences at once", "tokens/s")
    finish(context, "decoding, one sequence", "context", "tokens/s")
    finish(memory_axis, "what a sequence keeps", "context", "MB", legend=False)
    return figure


PICTURES = {f.__name__.removeprefix("picture_"): f for f in (picture_five, picture_experts, picture_router, picture_mixcon, picture_gains, picture_context, picture_throughput)}


def draw(make, matplotlib):
    from matplotlib import pyplot
    figure = make(pyplot)
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": f"matplotlib {matplotlib.__version__}"})
    pyplot.close(figure)
    return out.getvalue().decode()


def main():
    argparse.ArgumentParser.error = lambda self, message: fail(message)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if anything is not what the results say")
    arguments = parser.parse_args()
    read_results(arguments.check)
    made = fill({page: read(page) for page in PAGES})
    try:
        import matplotlib
    except ImportError:
        matplotlib = None
    if matplotlib:
        matplotlib.use("agg")
        matplotlib.rcParams.update({"svg.hashsalt": "moemamba", "svg.fonttype": "none"})  # the same results, the same file
        for name, make in PICTURES.items():
            made[f"{FOLDER}/{name}.svg"] = draw(make, matplotlib)
    for path in (f"{FOLDER}/{name}.svg" for name in PICTURES):
        if arguments.check and not read(path).endswith("</svg>\n"):
            fail(f"{path} is missing or damaged: make replicate-report")
    for path, text in made.items():
        old = read(path)
        if old == text:
            continue
        if not arguments.check:
            write_whole(path, text)
            print(path)
        elif not path.endswith(".svg") or f"matplotlib {matplotlib.__version__}<" in old:  # another version draws otherwise
            fail(f"{path} is not what the results say: make replicate-report")
    if not matplotlib:
        print("no matplotlib (python3-matplotlib): the pictures stay as they are")


if __name__ == "__main__":
    in_one_line(main)
