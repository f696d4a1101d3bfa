#define DOMERGE_ISA avx512
#include "table.h"
