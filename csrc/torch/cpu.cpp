// CPU implementations of the operators that every compiled backend has.
#include "cpu.h"

#include "conv.h"
#include "copy.h"
#include "norm.h"

CNX_LIBRARY_IMPL(CNX_LIBRARY, CPU, m) {
  CNX_IMPLEMENT_SHARED(m, cnx::binding::Cpu);
}
