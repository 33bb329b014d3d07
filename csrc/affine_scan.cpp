#include "affine_scan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace deqdiff {
namespace {

constexpr std::int64_t kStripBlocks = 16;  // 16 KB of float32: the lagged rows stay in the second-level cache

struct Addresses {
  const ScanProblem& problem;
  const HistoryView& history;
  std::int64_t item, row_bytes;

  Addresses(const ScanProblem& p, const HistoryView& h)
      : problem(p), history(h), item(item_size(p.dtype)), row_bytes(p.size * item_size(p.dtype)) {}

  char* at(const void* base, std::int64_t row, std::int64_t b, std::int64_t element) const {
    char* bytes = const_cast<char*>(static_cast<const char*>(base));
    return bytes + (row * problem.batch + b) * row_bytes + element * item;
  }
  char* ring(const void* base, std::int64_t column, std::int64_t i, std::int64_t b, std::int64_t element) const {
    return at(base, column * history.width + i % history.width, b, element);
  }
  // The value of state i on the scan: known states as they are, later ones as this round computed them.
  const char* scanned(std::int64_t i, std::int64_t b, std::int64_t element) const {
    if (history.f == nullptr || i <= problem.lo[b]) return at(problem.states, i, b, element);
    return ring(history.f, history.column, i - 1, b, element);
  }
};

int collect_terms(const Addresses& where, std::int64_t i, std::int64_t b, std::int64_t element, AffineRow* row) {
  const ScanProblem& p = where.problem;
  int count = 0;
  const auto add = [&](double coef, const void* term) {
    row->coef[count] = coef;
    row->terms[count++] = term;
  };
  for (std::int64_t lag = 0; lag < p.lags && lag <= i; ++lag) {
    const double state = p.state_coef[i * p.lags + lag], model = p.model_coef[i * p.lags + lag];
    // A lag that the schedule does not use must not be read: it may lie outside the window.
    if (lag == 0 || state != 0) add(state, where.scanned(i - lag, b, element));
    if (lag == 0 || model != 0) add(model, where.at(p.predictions, i - lag, b, element));
  }
  if (p.drift != nullptr) add(1.0, where.at(p.drift, i, b, element));
  return count;
}

void scan_strip(const Addresses& where, const RowIndex& index, std::int64_t b, std::int64_t block, std::int64_t blocks,
                double* partial, int sums) {
  const ScanProblem& p = where.problem;
  const HistoryView& h = where.history;
  const RowKernels& kernels = row_kernels(p.dtype);
  const std::int64_t element = block * kBlock, all_blocks = block_count(p.size);
  AffineRow row;
  row.size = std::min(p.size, element + blocks * kBlock) - element;
  row.stride = sums;
  for (std::int64_t i = p.lo[b]; i < p.hi[b]; ++i) {
    row.term_count = collect_terms(where, i, b, element, &row);
    row.state = where.at(p.states, i + 1, b, element);
    row.f = const_cast<void*>(row.state);
    row.g = nullptr;
    row.older_count = 0;
    if (h.f != nullptr) {
      row.f = where.ring(h.f, h.column, i, b, element);
      row.g = where.ring(h.g, h.column, i, b, element);
      row.older_count = std::clamp<int>(h.filled[i % h.width * p.batch + b], 0, h.history - 1);
      for (int j = 0; j < row.older_count; ++j) {
        row.older[j] = where.ring(h.g, (h.column - 1 - j + h.history) % h.history, i, b, element);
      }
    }
    row.partial = partial + (index.row(b, i) * all_blocks + block) * sums;
    kernels.affine(row);
  }
}

}  // namespace

RowIndex::RowIndex(const ScanProblem& problem, std::int64_t width) : problem_(problem) {
  first_.reserve(problem.batch + 1);
  first_.push_back(0);
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const std::int64_t lo = problem.lo[b], hi = problem.hi[b];
    if (lo < 0 || hi > problem.steps || hi - lo > width) {
      throw std::invalid_argument("lo, hi: window [" + std::to_string(lo) + ", " + std::to_string(hi) + ") of sample " +
                                  std::to_string(b) + " must lie within [0, " + std::to_string(problem.steps) +
                                  ") and hold at most " + std::to_string(width) + " rows");
    }
    first_.push_back(first_.back() + std::max<std::int64_t>(hi - lo, 0));
  }
}

std::int64_t RowIndex::sample(std::int64_t row) const {
  return std::upper_bound(first_.begin(), first_.end(), row) - first_.begin() - 1;
}

double* scratch(std::size_t doubles) {
  static thread_local std::vector<double> memory;
  if (memory.size() < doubles) memory.resize(doubles);
  return memory.data();
}

void scan_rows(const ScanProblem& problem, const HistoryView& history, const RowIndex& index, double* partial, int sums) {
  const Addresses where(problem, history);
  const std::int64_t blocks = block_count(problem.size);
  const int parts = useful_threads(index.rows() * problem.size, problem.threads);
  parallel_for(problem.batch * blocks, parts, [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) {
      const std::int64_t b = begin / blocks, block = begin % blocks;
      const std::int64_t count = std::min({end - begin, blocks - block, kStripBlocks});
      scan_strip(where, index, b, block, count, partial, sums);
      begin += count;
    }
  });
}

void ddim_update(const ScanProblem& problem) {
  const RowIndex index(problem, problem.steps);
  const std::int64_t blocks = block_count(problem.size);
  const int sums = 2;
  double* partial = scratch(index.rows() * blocks * sums);
  scan_rows(problem, HistoryView{}, index, partial, sums);
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    for (std::int64_t i = problem.lo[b]; i < problem.hi[b]; ++i) {
      const double* group = partial + index.row(b, i) * blocks * sums;
      double diff = 0, norm = 0;
      for (std::int64_t block = 0; block < blocks; ++block, group += sums) {
        diff += group[0];
        norm += group[1];
      }
      problem.sq_diff[i * problem.batch + b] = diff;
      problem.sq_norm[i * problem.batch + b] = norm;
    }
  }
}

}  // namespace deqdiff
