"""What a backtrace must hold at each stop. Shared by the scripts for both debuggers.

CHAINS in the environment names the functions that a backtrace at each stop must hold, youngest first: commas between them,
semicolons between stops; one with ! in front must not be there at all, name*N stands for N of them, and name=N says that there are N
in the whole backtrace.
"""
import os
import re

def words(chain):
    for word in chain.split(","):
        name, _, count = word.partition("*")
        yield from [name] * int(count or 1)


CHAINS = [list(words(chain)) for chain in os.environ["CHAINS"].split(";")]
STOP = os.environ["STOP"]
REMOTE = os.environ.get("REMOTE")
# The program runs code that has no unwinding tables; ? in a chain is a frame of such code.
MANAGED = "?" in os.environ["CHAINS"]
# Instructions from one stop to the next after which to give up; 0: go there at once.
STEPS = int(os.environ.get("STEPS", "0"))
# More frames than there are.
FRAMES = 400
# lldb names a frame of assembly by the last label before the address that it returns to: a function's call sites have some.
LABELS = {"cfi_stack_entry_return": "cfi_stack_enter"}
SITES = re.compile("(_exit)?_site$")


def plain(name):
    """A function's name without its path, its generic arguments and its hash."""
    name = re.sub("::h[0-9a-f]{16}$|::<.*|<.*|\\(.*", "", name or "?").rsplit("::", 1)[-1]
    return LABELS.get(name, SITES.sub("", name))


def missing(chain, names):
    """The first word of the chain that does not hold; None when all do."""
    position = 0
    for wanted in chain:
        name, equal, count = wanted.partition("=")
        if equal:
            if names.count(name) != int(count):
                return wanted
        elif wanted.startswith("!"):
            if wanted[1:] in names:
                return wanted
        elif wanted in names[position:]:
            position = names.index(wanted, position) + 1
        else:
            return wanted
    return None


class Steps:
    """The backtraces at the instructions between two stops."""

    def __init__(self):
        self.count = 0
        self.stubs = {}
        self.inlined = 0

    def look(self, names, in_switch):
        """What is wrong with a backtrace, or None. Within an inlined switch the tables of the function around it do not hold."""
        self.count += 1
        if names[0].startswith("cfi_stack_"):
            self.stubs[names[0]] = self.stubs.get(names[0], 0) + 1
        if "main" in names:
            return None
        if in_switch:
            self.inlined += 1
            return None
        return f"{self.count} instructions on, the backtrace is {names}"

    def __str__(self):
        stubs = ", ".join(f"{count} in {name}" for name, count in sorted(self.stubs.items()))
        inlined = f"; {self.inlined} within inlined switches have none" if self.inlined else ""
        return f"{self.count} instructions, a backtrace to main at each{': ' + stubs if stubs else ''}{inlined}"
