"""As gdb.py, inside lldb. The program has been started, with a breakpoint, and stands at its first stop."""
import os
import sys

import lldb

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from chains import CHAINS, FRAMES, STEPS, Steps, missing, plain


def backtrace(thread):
    return [plain(frame.GetFunctionName() or frame.GetSymbol().GetName()) for frame in thread.get_thread_frames()[:FRAMES]]


def fail(debugger, what):
    print("FAILED:", what)
    for command in ("bt 60", "disassemble --pc", "register read", "kill"):
        debugger.HandleCommand(command)
    sys.stdout.flush()
    os._exit(1)


def in_inlined_switch(thread):
    return (thread.GetFrameAtIndex(0).GetLineEntry().GetFileSpec().fullpath or "").endswith("src/switch/inlined.rs")


def stopped(process):
    """The thread that has stopped for a reason, once the process has stopped for one."""
    return next((thread for thread in process if thread.GetStopReason() == lldb.eStopReasonBreakpoint), process.GetSelectedThread())


def step_to(debugger, thread, place, number):
    steps = Steps()
    while steps.count < STEPS:
        thread.StepInstruction(False)
        # To go from an inlined function into the one around it is a step for lldb.
        if thread.GetFrameAtIndex(0).GetPC() == place and steps.count == 0:
            continue
        if thread.GetFrameAtIndex(0).GetPC() == place:
            print(f"        {steps}")
            return
        wrong = steps.look(backtrace(thread), in_inlined_switch(thread))
        if wrong:
            fail(debugger, f"after stop {number}: {wrong}")
    fail(debugger, f"no next stop within {STEPS} instructions of stop {number}")


def run(debugger):
    debugger.SetAsync(False)
    target = debugger.GetSelectedTarget()
    process = target.GetProcess()
    if not process.IsValid() or process.GetNumThreads() == 0:
        fail(debugger, f"lldb cannot run the program: {process}")
    place = stopped(process).GetFrameAtIndex(0).GetPC()
    for number, chain in enumerate(CHAINS, 1):
        thread = stopped(process)
        names = backtrace(thread)
        lacking = missing(chain, names)
        if lacking:
            fail(debugger, f"stop {number}: '{lacking}' does not hold of the backtrace {names}")
        print(f"stop {number}: {' < '.join(names)}")
        if number < len(CHAINS):
            step_to(debugger, thread, place, number) if STEPS else process.Continue()
    target.DeleteAllBreakpoints()
    process.Continue()
    if process.GetState() != lldb.eStateExited or process.GetExitStatus() != 0:
        fail(debugger, f"the program's own end is {process}")


def __lldb_init_module(debugger, _):
    run(debugger)
    print("every backtrace is whole")
    sys.stdout.flush()
    os._exit(0)
