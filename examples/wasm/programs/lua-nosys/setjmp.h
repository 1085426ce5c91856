/* Lua includes <setjmp.h>; lua_embed.h leaves it nothing to use. */
