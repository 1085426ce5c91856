"""check.py MANIFEST: runs each line's export in wasmtime; exits 0 if all results are right.

Prints each with the Wasm instructions it executed, and the count of right and wrong.
"""
import ctypes
import os
import sys
import threading

import wasmtime
from wasmtime import _bindings

STACK = 256 << 20


def config():
    c = wasmtime.Config()
    c.consume_fuel = True
    # The Python package has no name for the C API's setting that bounds the next one.
    limit = _bindings.dll.wasmtime_config_async_stack_size_set
    limit.restype, limit.argtypes = None, [ctypes.c_void_p, ctypes.c_size_t]
    limit(ctypes.cast(c.ptr(), ctypes.c_void_p), STACK)
    c.max_wasm_stack = STACK
    return c


def call(engine, path, export, args):
    store = wasmtime.Store(engine)
    store.set_fuel(1 << 40)
    instance = wasmtime.Instance(store, wasmtime.Module.from_file(engine, path), [])
    try:
        result = str(instance.exports(store)[export](store, *args))
    except wasmtime.Trap as trap:
        codes = wasmtime.TrapCode
        result = {codes.STACK_OVERFLOW: "trap:stack",
                  codes.UNREACHABLE: "trap:unreachable"}.get(trap.trap_code, str(trap))
    return result, (1 << 40) - store.get_fuel()


def main():
    engine = wasmtime.Engine(config())
    folder = os.path.dirname(os.path.abspath(sys.argv[1]))
    for line in open(sys.argv[1]):
        if line.startswith("#"):
            continue
        name, file, export, args, want = line.rstrip("\n").split("\t")[:5]
        args = [] if args == "-" else [int(a) for a in args.split(",")]
        got, fuel = call(engine, os.path.join(folder, file), export, args)
        print(f"{name:16} {got:18} {fuel / 1e6:8.1f} M instructions")
        if got != want:
            print(f"{name}: {want} expected")
        tally[got == want] += 1
    done.set()


tally = {True: 0, False: 0}
done = threading.Event()
threading.stack_size(2 * STACK)
t = threading.Thread(target=main)
t.start()
t.join()
print(f"{tally[True]} passed, {tally[False]} failed")
sys.exit(not done.is_set() or tally[False] > 0 or tally[True] == 0)
