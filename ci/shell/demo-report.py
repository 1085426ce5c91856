#!/usr/bin/env python3
"""Reports what ci/demo ran, as a table or as JSON lines.

    demo-report.py text|json FOLDER CLASS…

FOLDER holds, for each class, CLASS.plan (a line for each command: purpose, program, attack) and CLASS.output (what the commands
wrote, each closed by a line "=== STATUS"), or CLASS.missing (why the class did not run).
Ends with 1 when a result differed, a change went uncaught where something is enforced, or a command left no report.
"""
import json
import os
import re
import sys

FATAL = re.compile(r"fatal (SIG[A-Z]+) si_code=(-?\d+)")
SIGNALS = {4: "SIGILL", 5: "SIGTRAP", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 11: "SIGSEGV"}


def sections(text):
    """The output of each command and its status."""
    lines = []
    for line in text.splitlines():
        if re.fullmatch(r"=== \d+", line):
            yield lines, int(line[4:])
            lines = []
        else:
            lines.append(line)


def read_class(folder, name):
    """A list of runs of one class, or the reason why there are none."""
    missing = os.path.join(folder, name + ".missing")
    if os.path.exists(missing):
        with open(missing) as file:
            return None, file.read().strip()
    with open(os.path.join(folder, name + ".plan")) as file:
        plan = [line.rstrip("\n").split("\t") for line in file]
    with open(os.path.join(folder, name + ".output"), errors="replace") as file:
        text = file.read()
    done = list(sections(text))
    if len(done) < len(plan):
        return None, "the machine ended after %d of %d runs: %s" % (len(done), len(plan), " / ".join(text.splitlines()[-3:]))
    runs = []
    for (purpose, program, attack), (lines, status) in zip(plan, done):
        report = next((json.loads(line) for line in lines if line.startswith("{")), None)
        fatal = next((match for match in map(FATAL.search, lines) if match), None)
        runs.append({
            "purpose": purpose, "program": program, "attack": attack, "status": status, "report": report,
            "signal": fatal.group(1) if fatal else SIGNALS.get(status - 128, None if status < 128 else str(status - 128)),
            "si_code": int(fatal.group(2)) if fatal else None,
            "words": next((line for line in lines if line and not line.startswith(("{", "ci/on", "qemu:"))), ""),
        })
    return runs, None


def outcome(report):
    """What a run came to: its result or its trap."""
    if report is None:
        return None
    return ("trap", report["trap"]) if report.get("trap") else ("result", report["result"])


def compare(name, runs):
    """A row for each program of the first part."""
    fixed = {run["program"]: run for run in runs if run["purpose"] == "fixed"}
    for run in runs:
        if run["purpose"] != "grown":
            continue
        report = run["report"] or {}
        other = fixed[run["program"]]["report"]
        equal = run["report"] is not None and outcome(run["report"]) == outcome(other)
        yield {
            "kind": "run", "class": name, "program": run["program"], "enforced": report.get("enforced"),
            "growths": report.get("growths"), "frames_moved": report.get("frames_moved"), "rebound": report.get("rebound"),
            "largest_stack": report.get("largest_stack"), "result": report.get("result"), "trap": report.get("trap"), "equal": equal,
            "signal": run["signal"], "si_code": run["si_code"],
        }


def meaning(row):
    """What a tampered run's end says about protection: (caught, words)."""
    code = (row["signal"], row["si_code"])
    if not any(word.startswith("pac-i") or word in ("gcs", "shstk") for word in row["enforced"] or []):
        end = "ran on to its end, result equal" if row["equal"] else "ran on to a wrong result"
        if row["signal"]:
            end = "crashed by chance, %s code %s" % code
        return None, "not protected here: " + end
    words = {
        ("SIGILL", 2): "the CPU refused the signature",
        ("SIGTRAP", 1): "the library's check of the signature",
        ("SIGSEGV", 10): "the shadow stack differs",
        ("SIGSEGV", 1): "the return ran into the poisoned address",
    }
    if code in words:
        return True, words[code]
    if row["signal"] == "SIGABRT":
        return True, "the library saw it: " + row["words"]
    if row["signal"]:
        return False, "ended in an unexpected way"
    if row["equal"]:
        return True, "without effect: the result is right all the same"
    return False, "NOT CAUGHT: a wrong result"


def attacks(name, runs):
    """A row for each attack of the second part."""
    grown = {run["program"]: run for run in runs if run["purpose"] == "grown"}
    for run in runs:
        if run["purpose"] != "tamper":
            continue
        honest = grown[run["program"]]["report"] or {}
        frame, bit, moment = run["attack"].split(":")
        row = {
            "kind": "tamper", "class": name, "program": run["program"], "frame": int(frame), "bit": int(bit), "moment": moment,
            "enforced": honest.get("enforced"), "signal": run["signal"], "si_code": run["si_code"], "words": run["words"],
            "equal": run["report"] is not None and outcome(run["report"]) == outcome(honest),
        }
        row["caught"], row["meaning"] = meaning(row)
        yield row


def size(number):
    if number is None:
        return "-"
    return "%d KiB" % (number >> 10) if number < 1 << 20 else "%g MiB" % (number / (1 << 20))


def table(header, rows, right):
    cells = [header] + [["-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip())


def main():
    form, folder, classes = sys.argv[1], sys.argv[2], sys.argv[3:]
    rows, attacked, absent = [], [], []
    for name in classes:
        runs, reason = read_class(folder, name)
        if runs is None:
            absent.append({"kind": "absent", "class": name, "reason": reason})
            continue
        rows += compare(name, runs)
        attacked += attacks(name, runs)
    good = all(row["equal"] for row in rows) and all(row["caught"] is not False for row in attacked) and rows
    broken = [row for row in absent if not row["reason"].count("not set up")]
    if form == "json":
        for row in rows + attacked + absent:
            print(json.dumps(row))
    else:
        print("Each program starts on 4 KiB and grows by moving its frames")
        table(
            ["program", "class", "enforced", "growths", "frames moved", "re-bound", "largest", "as on a fixed 8 MiB"],
            [[r["program"], r["class"], " ".join(r["enforced"] or []) or "nothing", r["growths"], r["frames_moved"], r["rebound"],
              size(r["largest_stack"]), ("yes: " if r["equal"] else "NO: ") +
              (r["trap"] or " ".join(map(str, r["result"] or [])) or (r["signal"] and "%s code %s" % (r["signal"], r["si_code"])) or "-")]
             for r in sorted(rows, key=lambda r: [x["program"] for x in rows].index(r["program"]))],
            {3, 4, 5, 6},
        )
        print("\nOne bit of a saved return address is changed while it runs")
        table(
            ["program", "class", "frame", "bit", "when", "signal", "code", "what it means"],
            [[r["program"], r["class"], r["frame"], r["bit"], r["moment"] + " the move", r["signal"] or "none", r["si_code"], r["meaning"]]
             for r in attacked],
            {2, 3, 6},
        )
        for row in absent:
            print("\n%s did not run: %s" % (row["class"], row["reason"]))
    sys.exit(0 if good and not broken else 1)


main()
