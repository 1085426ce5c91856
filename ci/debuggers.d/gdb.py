"""Stops a program on its innermost stack again and again and checks the backtrace at each stop; between stops it goes by
single instructions, with a backtrace at each. Run by ci/debuggers inside gdb; chains.py says what comes in the environment.
"""
import os
import sys

import gdb
import gdb.unwinder

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from chains import CHAINS, FRAMES, MANAGED, REMOTE, STEPS, STOP, Steps, missing, plain


class Managed(gdb.unwinder.Unwinder):
    """Goes through code that belongs to no file, which is a code generator's: by its frame records, as lldb does by itself. On arm64
    the return address in one is signed."""

    REGISTERS = {"i386:x86-64": ("rip", "rsp", "rbp"), "aarch64": ("pc", "sp", "x29")}
    ADDRESS = (1 << 48) - 1

    def __init__(self):
        super().__init__("managed code")

    def __call__(self, pending):
        names = self.REGISTERS.get(pending.architecture().name())
        if names is None:
            return None
        pc, sp, fp = (pending.read_register(name) for name in names)
        address = int(pc) & self.ADDRESS
        if address < 0x10000 or gdb.current_progspace().objfile_for_address(address) is not None:
            return None
        record = int(fp) & self.ADDRESS
        memory = gdb.selected_inferior().read_memory(record, 16).tobytes()
        caller_fp, caller_pc = (int.from_bytes(memory[at : at + 8], "little") for at in (0, 8))
        unwound = pending.create_unwind_info(gdb.unwinder.FrameId(gdb.Value(record + 16), pc))
        for name, before, value in zip(names, (pc, sp, fp), (caller_pc & self.ADDRESS, record + 16, caller_fp)):
            unwound.add_saved_register(name, gdb.Value(value).cast(before.type))
        # What is not said here is lost to all older frames: among it, where on arm64 addresses end and signatures begin.
        for register in pending.architecture().registers():
            if register.name.startswith("pauth_"):
                unwound.add_saved_register(register.name, pending.read_register(register.name))
        return unwound


def backtrace():
    """The names of all frames, and why there are no more."""
    names, reason = [], 0
    frame = gdb.newest_frame()
    while frame is not None and len(names) < FRAMES:
        names.append(plain(frame.name()))
        reason = frame.unwind_stop_reason()
        frame = frame.older()
    return names, gdb.frame_stop_reason_string(reason)


def fail(what):
    print("FAILED:", what)
    gdb.execute("bt 60")
    gdb.execute("x/3i $pc")
    gdb.execute("info registers")
    gdb.execute("kill", to_string=True)
    sys.stdout.flush()
    os._exit(1)


def run():
    if MANAGED:
        gdb.unwinder.register_unwinder(None, Managed())
    stop = gdb.Breakpoint(STOP)
    if REMOTE:
        gdb.execute(f"target remote localhost:{REMOTE}", to_string=True)
        gdb.execute("continue", to_string=True)
    else:
        gdb.execute("run", to_string=True)
    place = gdb.newest_frame().pc()
    for number, chain in enumerate(CHAINS, 1):
        names, reason = backtrace()
        lacking = missing(chain, names)
        if lacking:
            fail(f"stop {number}: '{lacking}' does not hold of the backtrace {names} ({reason})")
        print(f"stop {number}: {' < '.join(names)}")
        if number < len(CHAINS):
            step_to(place, number) if STEPS else gdb.execute("continue", to_string=True)
    stop.delete()
    gdb.execute("continue", to_string=True)
    code = gdb.convenience_variable("_exitcode")
    if code is None or int(code) != 0:
        fail(f"the program's own status is {code}")


def in_inlined_switch():
    table = gdb.newest_frame().find_sal().symtab
    return table is not None and table.filename.endswith("src/switch/inlined.rs")


def step_to(place, number):
    """Goes on to the next stop."""
    steps = Steps()
    while steps.count < STEPS:
        gdb.execute("stepi", to_string=True)
        if gdb.newest_frame().pc() == place:
            print(f"        {steps}")
            return
        names, reason = backtrace()
        wrong = steps.look(names, in_inlined_switch())
        if wrong:
            fail(f"after stop {number}: {wrong} ({reason})")
    fail(f"no next stop within {STEPS} instructions of stop {number}")


for setting in ("pagination off", "confirm off", "debuginfod enabled off", "height 0", "print inferior-events off", "auto-load python-scripts off"):
    gdb.execute(f"set {setting}")
try:
    run()
except gdb.error as error:
    fail(f"gdb says: {error}")
print("every backtrace is whole")
