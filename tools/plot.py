#!/usr/bin/env python3
"""Pictures of one or more runs, from their log.jsonl: loss against tokens and against time, validation, load of the experts.

    tools/plot.py RUN... [--output FILE.svg]      RUN: a directory of train, or its log.jsonl; FILE: .svg, .png or .pdf

Needs matplotlib (python3-matplotlib)."""
import argparse
import json
import os
import sys


def fail(message):
    sys.exit(f"error: {message}")


def read_log(path):
    """A run's tokens a step, its training and its validations, from its log. What a kill has left of a last line is left out."""
    file = os.path.join(path, "log.jsonl") if os.path.isdir(path) else path
    try:
        with open(file, encoding="utf-8") as log:
            lines = log.read().split("\n")
    except (OSError, UnicodeDecodeError) as e:
        fail(f"cannot read {file}: {getattr(e, 'strerror', None) or 'it is no text'}")
    run, train, val, minutes = None, [], [], 0.0
    for number, text in enumerate(lines, 1):
        if not text or (number == len(lines) and not text.endswith("}")):
            continue
        try:
            line = json.loads(text)
            if line["kind"] == "run":
                sizes = line["training"]
                run = {"tokens": int(sizes["batch"]) * int(sizes["seq-len"]) * int(sizes["grad-accum"]), "layers": str(line["config"]["layers"])}
            elif line["kind"] == "train":
                minutes += float(line["ms"]) / 60000
                train.append((int(line["step"]), float(line["loss"]), float(line["expert_load"]), float(line["dropped"]), minutes))
            elif line["kind"] == "val":
                val.append((int(line["step"]), float(line["loss"])))
        except (ValueError, KeyError, TypeError, RecursionError):
            fail(f"{file}, line {number}: no line of a log that train writes")
    if run is None or not train:
        fail(f"{file}: no run with steps in it")
    columns = dict(zip(("step", "loss", "expert_load", "dropped", "minutes"), map(list, zip(*train))))
    return {**run, **columns, "val": val}


def smooth(values, weight=0.9):
    """A running mean, unbiased from the first value on."""
    total, count, out = 0.0, 0.0, []
    for value in values:
        total = weight * total + (1 - weight) * value
        count = weight * count + (1 - weight)
        out.append(total / count)
    return out


def draw(runs, pyplot):
    experts = any("E" in run["layers"] for run in runs.values())
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    (by_tokens, by_time), (validation, load) = axes
    longest = max(run["step"][-1] * run["tokens"] for run in runs.values())
    unit, unit_name = (1e6, "million tokens") if longest >= 2e6 else (1e3, "thousand tokens")
    for name, run in runs.items():
        tokens = [step * run["tokens"] / unit for step in run["step"]]
        color = by_tokens.plot(tokens, run["loss"], alpha=0.25, linewidth=0.8)[0].get_color()
        by_tokens.plot(tokens, smooth(run["loss"]), color=color, label=name)
        by_time.plot(run["minutes"], smooth(run["loss"]), color=color, label=name)
        if run["val"]:
            validation.plot([step * run["tokens"] / unit for step, _ in run["val"]], [loss for _, loss in run["val"]], color=color, marker="o",
                            markersize=4, label=f"{name}, at last {run['val'][-1][1]:.4f}")
        if "E" in run["layers"]:
            load.plot(tokens, smooth(run["expert_load"]), color=color, label=f"{name}, load")
            load.plot(tokens, smooth(run["dropped"]), color=color, linestyle=":", label=f"{name}, dropped")
    for axis, title, x in ((by_tokens, "training loss, nats a token", unit_name), (by_time, "training loss, nats a token", "minutes"),
                           (validation, "validation loss, nats a token", unit_name),
                           (load, "fullest expert over the mean; share of choices dropped", unit_name)):
        axis.set_title(title)
        axis.set_xlabel(x)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize="small")
    if not experts:
        load.set_axis_off()
    return figure


def main():
    argparse.ArgumentParser.error = lambda self, message: fail(message)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Several runs are drawn over one another.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a directory that train wrote, or its log.jsonl")
    parser.add_argument("--output", default="runs.svg", help="file to write: .svg, .png or .pdf (%(default)s)")
    arguments = parser.parse_args()
    if not arguments.output.endswith((".svg", ".png", ".pdf")):
        fail(f"--output {arguments.output}: must end in .svg, .png or .pdf")
    paths = [path[:-len("/log.jsonl")] if path.endswith("/log.jsonl") else path for path in arguments.runs]
    names = [os.path.basename(os.path.abspath(path)) for path in paths]
    if len(set(names)) < len(names):
        names = paths
    runs = {name: read_log(path) for name, path in zip(names, arguments.runs)}
    try:
        import matplotlib
    except ImportError:
        fail("no matplotlib: install python3-matplotlib, or pip install matplotlib")
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "moemamba"  # the same runs, the same file
    from matplotlib import pyplot
    figure = draw(runs, pyplot)
    partial = arguments.output + ".tmp"
    try:
        kind = arguments.output.rsplit(".", 1)[1]
        figure.savefig(partial, format=kind, metadata={"Date": None} if kind == "svg" else None)
        os.replace(partial, arguments.output)
    except OSError as e:
        fail(f"cannot write {arguments.output}: {e.strerror}")
    print(f"{arguments.output}: {', '.join(runs)}")


if __name__ == "__main__":
    main()
