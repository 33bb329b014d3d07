// The innermost loops of the inverse scan, on one whole row. Compiled once per instruction set, like rows.h.
#pragma once

#include <cstdint>

#include "newton_rows.h"

namespace deqdiff {

// reached = sum_l a[l] states[l] + b[l] predictions[l] + drift,  rho = next - reached
// out = x + sum_j gamma[j] dx[j] + damping (rho - sum_j gamma[j] dg[j]) / (a[0] + b[0] slope)
// with x = states[0], dx[j] = z[j] - x, dg[j] = a[0] dx[j] + b[0] (e[j] - predictions[0]).
struct InverseRow {
  const void* states[kMaxLags];
  const void* predictions[kMaxLags];
  double state_coef[kMaxLags];
  double model_coef[kMaxLags];
  int lags;
  const void* drift;     // or null
  const void* old_next;  // the state after this one as it was, and as this scan has it
  const void* next;
  const void* slope;   // wide type, one value or `size` of them
  const void* weight;  // likewise
  bool slope_per_element, weight_per_element;
  const void* z[kMaxSecants];
  const void* e[kMaxSecants];
  int count;
  double gamma[kMaxSecants];
  double damping;
  void* rho;         // wide type, written by `measure`
  void* out;         // may be states[0]
  void* keep_state;  // ring columns that take states[0] and predictions[0]
  void* keep_prediction;
  std::int64_t size;
  // Results of `measure`: |weight (old_next - reached)|^2, |rho|^2, |reached|^2, |x|^2, |next|^2, dg[j].rho and the
  // lower triangle dg[j].dg[k], k <= j; of `step`: |out - x|^2.
  double miss, rho_norm, reached_norm, x_norm, next_norm, step;
  double with_rho[kMaxSecants];
  double gram[kMaxSecants][kMaxSecants];
};

struct InverseKernels {
  void (*measure)(InverseRow&);
  void (*step)(InverseRow&);
  void (*shorten)(InverseRow&, double factor);  // out = x + factor (out - x), x taken from keep_state
};

struct InverseTable {
  const char* name;
  InverseKernels kernels[3];  // indexed by Dtype
};

const InverseTable& inverse_table();
inline const InverseKernels& inverse_kernels(Dtype dtype) { return inverse_table().kernels[static_cast<int>(dtype)]; }

}  // namespace deqdiff
