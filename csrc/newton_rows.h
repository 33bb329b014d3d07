// The innermost loops of the quasi-Newton scan, on one whole row. Compiled once per instruction set, like rows.h.
#pragma once

#include <cstdint>

#include "rows.h"

namespace deqdiff {

constexpr int kMaxSecants = kMaxHistory - 1;

// Dots of the kept steps dz[j] = z[j] - x with each other and with dx = now - x.
struct SecantRow {
  const void* x;    // the state at which the prediction was made
  const void* now;  // the state as this scan has it
  const void* z[kMaxSecants];
  int count;
  std::int64_t size;
  // Results: |x|^2, dz[j].dx, and the lower triangle dz[j].dz[k], k <= j.
  double norm;
  double with_dx[kMaxSecants];
  double gram[kMaxSecants][kMaxSecants];
};

// e_hat = E + c dx + sum_j gamma[j] ((e[j] - E) - c (z[j] - x))
// now[next] = sum a now + b e_hat + drift, plain[next] likewise from E; both in the wide type, later stored.
struct NewtonRow {
  const void* x;           // null: zero
  const void* prediction;  // E
  const void* slope;       // wide type, one value or `size` of them
  bool slope_per_element;
  const void* z[kMaxSecants];
  const void* e[kMaxSecants];
  double gamma[kMaxSecants];
  int count;
  const void* drift;  // or null
  int lags;
  double state_coef[kMaxLags];
  double model_coef[kMaxLags];
  const void* now[kMaxLags];          // the scan's states i, i-1, ...
  const void* plain[kMaxLags];        // the plain scan's states, wide type
  const void* predictions[kMaxLags];  // entry 0 unused: E itself
  void* e_hat[kMaxLags];              // wide type; entry 0 is written
  const void* old_next;               // the state that is replaced
  void* next;                         // may equal old_next
  void* plain_next;                   // wide type
  void* keep_prediction;              // ring column that takes E, or null
  void* keep_next;                    // ring column that takes old_next, or null
  std::int64_t size;
  // Results: |next - old|^2, |plain - old|^2, |next|^2.
  double step, residual, norm;
};

struct NewtonKernels {
  void (*secants)(SecantRow&);
  void (*newton)(NewtonRow&);
  void (*widen)(const void* from, void* to, std::int64_t size);
};

struct NewtonTable {
  const char* name;
  NewtonKernels kernels[3];  // indexed by Dtype
};

const NewtonTable& newton_table();
inline const NewtonKernels& newton_kernels(Dtype dtype) { return newton_table().kernels[static_cast<int>(dtype)]; }

}  // namespace deqdiff
