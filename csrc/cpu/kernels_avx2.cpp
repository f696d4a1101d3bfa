#define DOMERGE_ISA avx2
#include "table.h"
