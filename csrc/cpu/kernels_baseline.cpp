#define DOMERGE_ISA baseline
#include "table.h"
