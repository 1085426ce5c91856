/* Lua includes <signal.h>; lua_embed.h leaves it nothing to use. */
