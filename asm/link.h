/* struct Record's second part, struct LinkCall and what else the stubs of linked segments know on either ISA: src/abi.rs, src/link.rs. */

#define REC_PREVIOUS    40
#define REC_LINK_RECORD 48
#define REC_LINK_SEAL   56
#define REC_NEXT        64
#define REC_LIMIT       72
#define REC_ROOM        80
#define REC_AREA        88              /* 32 bits */
#define REC_SHADOWED    92              /* 32 bits */
#define REC_SHADOW_SEAL 112

#define CALL_CALLEE     0
#define CALL_AREA       8
#define CALL_RESULTS    12
#define CALL_TOTAL      16
#define CALL_ARGUMENTS  20

#define ACT_LIMIT       0
#define ACT_LINK        24
