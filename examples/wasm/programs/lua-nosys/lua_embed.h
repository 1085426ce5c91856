/* Given to every Lua source with -include, this folder first in its path: an error ends the program, so no
 * setjmp; a fixed hash seed, so each run is the same; and room for deep C calls. */
#define LUAI_THROW(L, c) __builtin_trap()
#define LUAI_TRY(L, c, a) { a }
#define luai_jmpbuf int
#define l_signalT int
#define luai_makeseed(L) 0x5eedu
#define LUAI_MAXCCALLS 60000
