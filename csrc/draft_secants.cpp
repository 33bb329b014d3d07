#include "draft_secants.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cholesky.h"
#include "draft_rows.h"
#include "parallel.h"

namespace deqdiff {
namespace {

// The inverse of the system of `row.gram`, column by column; left alone where it has none.
void invert(const SecantRow& row, double ridge, double floor, double* weights, int stride) {
  int kept[kMaxSecants], count = 0;
  double scale[kMaxSecants], found[kMaxSecants][kMaxSecants];
  for (int j = 0; j < row.count; ++j) {
    const double length = std::sqrt(row.gram[j][j]);
    if (!(length > floor * std::sqrt(row.norm))) continue;  // a step of rounding size says nothing about the slope
    scale[count] = 1 / length;
    kept[count++] = j;
  }
  for (int c = 0; c < count; ++c) {
    double lower[kMaxSecants][kMaxSecants];
    for (int r = 0; r < count; ++r) {
      for (int k = 0; k <= r; ++k) lower[r][k] = row.gram[kept[r]][kept[k]] * scale[r] * scale[k];
      lower[r][r] += ridge;
      found[c][r] = r == c ? 1 : 0;
    }
    if (!cholesky_solve(lower, found[c], count)) return;
  }
  for (int r = 0; r < count; ++r) {
    for (int c = 0; c < count; ++c) weights[kept[r] * stride + kept[c]] = found[c][r] * scale[r] * scale[c];
  }
}

void remember(const DraftSecantsProblem& p, std::int64_t n, std::int64_t b) {
  const std::int64_t item = item_size(p.dtype), line = p.size * item;
  const auto at = [&](const void* base, std::int64_t row) {
    return const_cast<char*>(static_cast<const char*>(base)) + (row * p.batch + b) * line;
  };
  const auto ring = [&](const void* base, int back) {
    return at(base, (p.column - back + p.ring) % p.ring * p.anchors + n);
  };
  std::int32_t& filled = p.filled[n * p.batch + b];
  const int secants = p.ring - 1, count = std::clamp<int>(filled, 0, secants);
  double* weights = p.weights + (n * p.batch + b) * secants * secants;
  std::fill(weights, weights + secants * secants, 0.0);
  if (count > 0) {
    SecantRow row;
    row.x = row.now = at(p.states, p.at[n]);
    row.count = count;
    row.size = p.size;
    for (int j = 0; j < count; ++j) row.z[j] = ring(p.z, j + 1);
    newton_kernels(p.dtype).secants(row);
    invert(row, p.ridge, p.floor, weights, secants);
  }
  std::memcpy(ring(p.z, 0), at(p.states, p.at[n]), line);
  draft_kernels(p.dtype).rest(at(p.predictions, p.at[n]), at(p.made, n), nullptr, false, ring(p.rest, 0), p.size);
  filled = count + 1;
}

}  // namespace

void draft_secants(const DraftSecantsProblem& p) {
  for (std::int64_t n = 0; n < p.anchors; ++n) {
    if (p.at[n] < 0 || p.at[n] >= p.steps) {
      throw std::invalid_argument("at: row " + std::to_string(p.at[n]) + " must lie within [0, " +
                                  std::to_string(p.steps) + ")");
    }
  }
  const std::int64_t pairs = p.anchors * p.batch;
  parallel_for(pairs, useful_threads(pairs * p.size, p.threads), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      const std::int64_t n = k / p.batch, b = k % p.batch;
      if (p.lo[b] <= p.at[n] && p.at[n] < p.hi[b]) remember(p, n, b);
    }
  });
}

}  // namespace deqdiff
