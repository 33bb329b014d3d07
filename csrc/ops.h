// Every op that Python calls, once. A new one is a line here and a function `<name>_call` in its own file.
#pragma once

#include "arguments.h"

#define DEQDIFF_OPS(X) \
  X(ddim_update)       \
  X(anderson_step)     \
  X(newton_scan)       \
  X(inverse_scan)      \
  X(node_scan)         \
  X(secant_fit)        \
  X(mark_converged)

namespace deqdiff {

#define DEQDIFF_DECLARE(name) void name##_call(Arguments& arguments);
DEQDIFF_OPS(DEQDIFF_DECLARE)
#undef DEQDIFF_DECLARE

}  // namespace deqdiff
