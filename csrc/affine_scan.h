// The batched DDIM update across timesteps: an affine recursion in time, elementwise over D.
//   F[i+1] = sum_l state_coef[i,l] F[i-l] + model_coef[i,l] E[i-l] + drift[i]   for lo[b] <= i < hi[b]
// Song, Meng, Ermon 2021 (DDIM, equation 12), all steps at once as in Pokle, Geng, Kolter 2022.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace deqdiff {

// Addresses are borrowed for the call. Time-major and contiguous: states (T+1, B, D), predictions and drift (T, B, D).
struct ScanProblem {
  Dtype dtype;
  void* states;
  const void* predictions;
  const double* state_coef;  // (T, L)
  const double* model_coef;  // (T, L)
  const void* drift;         // or null
  const std::int32_t* lo;    // (B,)
  const std::int32_t* hi;    // (B,)
  double* sq_diff;           // (T, B)
  double* sq_norm;           // (T, B)
  std::int64_t steps, batch, size;
  int lags;
  int threads;
};

// Where row i+1 of sample b is written, what its older columns are, and how many sums each block yields.
struct HistoryView {
  void* f = nullptr;  // (M, W, B, D); null: results go to the states themselves
  void* g = nullptr;
  const std::int32_t* filled = nullptr;  // (W, B)
  int history = 1;
  std::int64_t width = 1;
  int column = 0;
};

// Active rows of all samples, numbered sample by sample, and the partial sums of each of their blocks.
class RowIndex {
 public:
  // Throws std::invalid_argument when a window reaches outside [0, steps] or is wider than `width`.
  RowIndex(const ScanProblem& problem, std::int64_t width);

  std::int64_t rows() const { return first_.back(); }
  std::int64_t row(std::int64_t b, std::int64_t i) const { return first_[b] + i - problem_.lo[b]; }
  std::int64_t sample(std::int64_t row) const;
  std::int64_t step(std::int64_t row, std::int64_t b) const { return problem_.lo[b] + row - first_[b]; }

 private:
  const ScanProblem& problem_;
  std::vector<std::int64_t> first_;
};

// Memory for the sums, kept by the calling thread from one call to the next.
double* scratch(std::size_t doubles);

// Runs the recursion. partial: (rows, blocks, sums) doubles, sums = 2, or 3 + M - 1 with a history.
void scan_rows(const ScanProblem& problem, const HistoryView& history, const RowIndex& index, double* partial, int sums);

void ddim_update(const ScanProblem& problem);

}  // namespace deqdiff
