#!/usr/bin/env python3
"""Corrects the source of Bochs 3.0; run in its root.

1. A RAM image larger than one memory block is read block by block (else it overruns the first).
2. HLT goes straight to the next timer event instead of counting ten ticks at a time.
3. XRSTOR of the compacted format steps over every component that the area holds, also one that was not asked for;
   else SSP is now and then restored from the wrong place.
4. The AVX10 sources compile when AVX is on and EVEX is off.
"""
import glob


def replace(path, old, new):
    with open(path) as file:
        text = file.read()
    if text.count(old) != 1:
        raise SystemExit(f"{path}: the text to correct occurs {text.count(old)} times; this is not Bochs 3.0")
    with open(path, "w") as file:
        file.write(text.replace(old, new))


replace(
    "memory/misc_mem.cc",
    "    ret = read(fd, (bx_ptr_t) BX_MEM_THIS get_vector(offset), size);\n",
    "    unsigned long room = BX_MEM_THIS block_size - (offset & (BX_MEM_THIS block_size - 1));\n"
    "    ret = read(fd, (bx_ptr_t) BX_MEM_THIS get_vector(offset), size < room ? size : room);\n",
)
replace(
    "cpu/event.cc",
    "BX_TICKN(10);",
    "BX_TICKN(bx_pc_system.getNumCpuTicksLeftNextEvent());",
)
replace(
    "cpu/xsave.cc",
    """        if (format & feature_mask)
          offset += xsave_restore[feature].len;
      }
    }
  }
  else {""",
    """      }

      if (format & feature_mask)
        offset += xsave_restore[feature].len;
    }
  }
  else {""",
)
for path in glob.glob("cpu/avx/avx10*.cc"):
    with open(path) as file:
        lines = file.readlines()
    with open(path, "w") as file:
        file.writelines("#if BX_SUPPORT_EVEX\n" if line == "#if BX_SUPPORT_AVX\n" else line for line in lines)
