// The batched DDIM update across timesteps: an affine recursion in time, elementwise over D.
//   F[i+1] = sum_l state_coef[i,l] F[i-l] + model_coef[i,l] E[i-l] + drift[i]   for lo[b] <= i < hi[b]
// Song, Meng, Ermon 2021 (DDIM, equation 12), all steps at once as in Pokle, Geng, Kolter 2022.
#pragma once

#include <cstdint>
#include <vector>

#include "arguments.h"
#include "parallel.h"
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

// Where an Anderson round keeps F and G = F - X: rings (M, W, B, D), row i in slot i % W.
struct HistoryView {
  void* f = nullptr;  // null: no history, F goes to the states themselves
  void* g = nullptr;
  const std::int32_t* filled = nullptr;  // (W, B) older columns of a row, before this round
  int history = 1;
  std::int64_t width = 1;
  int column = 0;
};

// Active rows of all samples, numbered sample by sample.
class RowIndex {
 public:
  // Throws std::invalid_argument when a window is none of require_windows().
  RowIndex(const ScanProblem& problem, std::int64_t width);

  std::int64_t rows() const { return first_.back(); }
  std::int64_t count(std::int64_t b) const { return first_[b + 1] - first_[b]; }
  std::int64_t row(std::int64_t b, std::int64_t i) const { return first_[b] + i - lo_[b]; }

 private:
  const std::int32_t* lo_;
  std::vector<std::int64_t> first_;
};

// Blocks [begin, end) of sample b, to be walked through time by one thread.
struct BlockRange {
  std::int64_t b, begin, end;
};
// What a thread that owns `range` of all samples' blocks owns of sample b.
BlockRange blocks_of(const Range& range, std::int64_t blocks, std::int64_t b);

// The recursion and its partial sums: `sums` doubles for every block of every active row.
class DdimScan {
 public:
  DdimScan(const ScanProblem& problem, const HistoryView& history, const RowIndex& index, double* partial, int sums);

  // Rows [from, to) of the piece. The piece's earlier rows must have been run.
  void run(const BlockRange& piece, std::int64_t from, std::int64_t to) const;

  // total[k] = the sum over blocks, in block order, for k < count.
  void reduce(std::int64_t b, std::int64_t i, int count, double* total) const;

  // Address of an element of row `row` of a (rows, B, D) tensor, and of ring column `column` for row i.
  char* at(const void* base, std::int64_t row, std::int64_t b, std::int64_t element) const;
  char* ring(const void* base, int column, std::int64_t i, std::int64_t b, std::int64_t element) const;

 private:
  void run_strip(const BlockRange& strip, std::int64_t from, std::int64_t to) const;
  int collect_terms(std::int64_t i, std::int64_t b, std::int64_t element, DdimRow* row) const;
  const char* scanned(std::int64_t i, std::int64_t b, std::int64_t element) const;

  const ScanProblem& p_;
  HistoryView h_;
  const RowIndex& index_;
  double* partial_;
  int sums_;
  std::int64_t blocks_, item_;
  const RowKernels& kernels_;
};

// Memory for sums and weights, kept by the calling thread from one call to the next.
double* scratch(std::size_t doubles);

void ddim_update(const ScanProblem& problem);

// What the scans over a chain are called with; the last two are the names of the sums.
ScanProblem read_scan(Arguments& arguments, const char* sq_diff = "sq_diff", const char* sq_norm = "sq_norm");

// Rings (H + 1, W, B, D) of states and predictions, row i in slot i % W, the round in `column`.
struct Rings {
  void* z = nullptr;  // null: none
  void* e = nullptr;
  std::int32_t* filled = nullptr;  // (W, B) how many of the most recent columns are valid
  int columns = 0;                 // H + 1
  std::int64_t width = 0;          // W
  int column = 0;
};
Rings read_rings(Arguments& arguments, const ScanProblem& scan, int least);

// A table (T, 1) or (T, D) in float32, or float64 where the states are.
struct RowTable {
  const void* data;
  bool per_element;
};
RowTable read_table(Arguments& arguments, const ScanProblem& scan, const char* name);

inline bool has_rows(const ScanProblem& scan) { return scan.steps > 0 && scan.batch > 0; }
inline bool has_data(const ScanProblem& scan) { return has_rows(scan) && scan.size > 0; }
inline std::size_t wide_size(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

}  // namespace deqdiff
