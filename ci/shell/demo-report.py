#!/usr/bin/env python3
"""Reports what ci/demo ran, as a table or as JSON lines.

    demo-report.py text|json FOLDER CLASS…

FOLDER holds, for each class, CLASS.plan (a line for each command: purpose, program, attack) and CLASS.output (what the commands
wrote, each closed by a line "=== STATUS"), or CLASS.missing (why the class did not run). Where FOLDER/must-grow is, some program must
grow on every class; where FOLDER/may-lack is, a class may be missing.
Ends with 1 when a result differed, a change went uncaught where something is enforced, a command left no report, or one of these
two was not met.
"""
import json
import os
import re
import sys

FATAL = re.compile(r"fatal (SIG[A-Z]+) si_code=(-?\d+)")
SIGNALS = {4: "SIGILL", 5: "SIGTRAP", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 11: "SIGSEGV"}
TAMPERING = "cfi-stack: tampering:"
UNTOUCHED = "nothing was changed"
# What marks out the end by one mechanism, (signal, si_code); see ends_of().
REFUSED = {("SIGILL", 2): "the CPU refused the signature"}
CHECKED = {("SIGTRAP", 1): "the library's check of the signature", ("SIGSEGV", 1): "the return ran into the poisoned address"}
CHECK_ONLY = {("SIGTRAP", 1): "the library's check of the signature"}
SHADOWED = {("SIGSEGV", 10): "the shadow stack differs"}


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
            return None, file.read().strip(), True
    with open(os.path.join(folder, name + ".plan")) as file:
        plan = [line.rstrip("\n").split("\t") for line in file]
    with open(os.path.join(folder, name + ".output"), errors="replace") as file:
        text = file.read()
    done = list(sections(text))
    if len(done) < len(plan):
        return None, "the machine ended after %d of %d runs: %s" % (len(done), len(plan), " / ".join(text.splitlines()[-3:])), False
    runs = []
    for (purpose, program, attack), (lines, status) in zip(plan, done):
        signal = SIGNALS.get(status - 128, str(status - 128)) if status > 128 else None
        # What the program says of its end counts only where its status says the same.
        fatal = next((match for match in map(FATAL.search, lines) if match and match.group(1) == signal), None)
        runs.append({
            "purpose": purpose, "program": program, "attack": attack, "status": status, "report": read_report(lines),
            "signal": signal,
            "si_code": int(fatal.group(2)) if fatal else None,
            "words": next((line for line in lines if line.startswith(TAMPERING)), None) or
                     next((line for line in lines if line and not line.startswith(("{", "ci/on", "qemu:"))), ""),
            "untouched": any(UNTOUCHED in line for line in lines),
        })
    return runs, None, False


def read_report(lines):
    """The report that a run left, None when it left none or only a part of it."""
    for line in lines:
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                return None
    return None


def same(run, other):
    """Whether two runs came to the same: trap, result, the program's status and its output, and the status of the process."""
    if run["report"] is None or other["report"] is None:
        return False
    return run["status"] == other["status"] and all(
        run["report"].get(key) == other["report"].get(key) for key in ("trap", "result", "status", "output"))


def compare(name, runs):
    """A row for each program of the first part."""
    fixed = {run["program"]: run for run in runs if run["purpose"] == "fixed"}
    for run in runs:
        if run["purpose"] != "grown":
            continue
        report = run["report"] or {}
        equal = same(run, fixed[run["program"]])
        yield {
            "kind": "run", "class": name, "program": run["program"], "enforced": report.get("enforced"),
            "growths": report.get("growths"), "frames_moved": report.get("frames_moved"), "rebound": report.get("rebound"),
            "largest_stack": report.get("largest_stack"), "result": report.get("result"), "trap": report.get("trap"), "equal": equal,
            "signal": run["signal"], "si_code": run["si_code"],
        }


def ends_of(enforced):
    """The ends by which what is enforced shows that it caught a change: (signal, si_code) with their meaning. None: nothing is."""
    pac = any(word.startswith("pac-i") for word in enforced)
    shadow = "gcs" in enforced or "shstk" in enforced
    if not pac and not shadow:
        return None
    ends = {}
    if pac and "fpac" in enforced:
        ends.update(REFUSED)
        if shadow:
            ends.update(CHECK_ONLY)
    elif pac:
        ends.update(CHECKED)
    if shadow:
        ends.update(SHADOWED)
    return ends


def meaning(row):
    """What a tampered run's end says about protection: (caught, words)."""
    code = (row["signal"], row["si_code"])
    ends = ends_of(row["enforced"] or [])
    seen = row["signal"] == "SIGABRT" and row["words"].startswith(TAMPERING)
    if row["untouched"]:
        end = "nothing was changed: the stack never grew with so many frames on it"
    elif row["signal"]:
        end = "it ended in an unexpected way, by %s code %s" % code
    elif row["equal"]:
        end = "the result is right all the same"
    else:
        end = "a wrong end, status %s" % row["status"]
    if row["enforced"] is None:
        return False, "the honest run left no report, so what is enforced is not known"
    if ends is None:
        return None, "not protected here: " + (row["words"] if seen else end)
    if seen:
        return True, "the library saw it: " + row["words"]
    if code in ends:
        return True, ends[code]
    return False, "NOT CAUGHT: " + end


def attacks(name, runs):
    """A row for each attack of the second part."""
    grown = {run["program"]: run for run in runs if run["purpose"] == "grown"}
    for run in runs:
        if run["purpose"] != "tamper":
            continue
        honest = grown[run["program"]]
        frame, bit, moment = run["attack"].split(":")
        row = {
            "kind": "tamper", "class": name, "program": run["program"], "frame": int(frame), "bit": int(bit), "moment": moment,
            "enforced": (honest["report"] or {}).get("enforced"), "signal": run["signal"], "si_code": run["si_code"], "words": run["words"],
            "status": run["status"], "untouched": run["untouched"], "equal": same(run, honest),
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
    may_lack = os.path.exists(os.path.join(folder, "may-lack"))
    must_grow = os.path.exists(os.path.join(folder, "must-grow"))
    rows, attacked, absent, broken = [], [], [], []
    for name in classes:
        runs, reason, lacking = read_class(folder, name)
        if runs is None:
            absent.append({"kind": "absent", "class": name, "reason": reason})
            if not (lacking and may_lack):
                broken.append("%s did not run" % name)
            continue
        compared = list(compare(name, runs))
        rows += compared
        attacked += attacks(name, runs)
        if must_grow and not any(row["growths"] for row in compared):
            broken.append("no program grew on %s" % name)
    broken += ["%s on %s: not as on a fixed 8 MiB" % (row["program"], row["class"]) for row in rows if not row["equal"]]
    broken += ["%s on %s, %s the move: %s" % (row["program"], row["class"], row["moment"], row["meaning"])
               for row in attacked if row["caught"] is False]
    if not rows:
        broken.append("nothing ran")
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
    sys.stdout.flush()
    for words in broken:
        print("ci/demo: " + words, file=sys.stderr)
    sys.exit(1 if broken else 0)


main()
