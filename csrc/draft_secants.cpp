#include "draft_secants.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cholesky.h"
#include "draft_rows.h"
#include "ops.h"
#include "parallel.h"

namespace deqdiff {
namespace {

// The inverse of the system of `row.gram`, column by column; left alone where it has none.
void invert(const SecantRow& row, double ridge, double floor, double* secant_weights, int stride) {
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
    for (int c = 0; c < count; ++c) secant_weights[kept[r] * stride + kept[c]] = found[c][r] * scale[r] * scale[c];
  }
}

void record(const DraftSecantsProblem& p, std::int64_t n, std::int64_t b) {
  const std::int64_t item = item_size(p.dtype), line = p.size * item;
  const auto at = [&](const void* base, std::int64_t row) {
    return const_cast<char*>(static_cast<const char*>(base)) + (row * p.batch + b) * line;
  };
  const auto ring = [&](const void* base, int back) {
    return at(base, (p.column - back + p.ring) % p.ring * p.anchors + n);
  };
  std::int32_t& filled = p.filled[n * p.batch + b];
  const int secants = p.ring - 1, count = std::clamp<int>(filled, 0, secants);
  double* secant_weights = p.secant_weights + (n * p.batch + b) * secants * secants;
  std::fill(secant_weights, secant_weights + secants * secants, 0.0);
  if (count > 0) {
    SecantRow row;
    row.x = row.now = at(p.states, p.anchor_rows[n]);
    row.count = count;
    row.size = p.size;
    for (int j = 0; j < count; ++j) row.z[j] = ring(p.z, j + 1);
    newton_kernels(p.dtype).secants(row);
    invert(row, p.ridge, p.floor, secant_weights, secants);
  }
  std::memcpy(ring(p.z, 0), at(p.states, p.anchor_rows[n]), line);
  draft_kernels(p.dtype).subtract(at(p.predictions, p.anchor_rows[n]), at(p.draft_cache, n), nullptr, false,
                                  ring(p.remainder, 0), p.size);
  filled = count + 1;
}

}  // namespace

void draft_secants(const DraftSecantsProblem& p) {
  require_windows(p.lo, p.hi, p.batch, p.steps, p.steps);
  for (std::int64_t n = 0; n < p.anchors; ++n) {
    if (p.anchor_rows[n] < 0 || p.anchor_rows[n] >= p.steps) {
      throw std::invalid_argument("anchor_rows: row " + std::to_string(p.anchor_rows[n]) + " must lie within [0, " +
                                  std::to_string(p.steps) + ")");
    }
  }
  const std::int64_t pairs = p.anchors * p.batch;
  parallel_for(pairs, useful_threads(pairs * p.size, p.threads), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      const std::int64_t n = k / p.batch, b = k % p.batch;
      if (p.lo[b] <= p.anchor_rows[n] && p.anchor_rows[n] < p.hi[b]) record(p, n, b);
    }
  });
}

void draft_secants_call(Arguments& a) {
  DraftSecantsProblem p;
  p.dtype = static_cast<Dtype>(a.integer("dtype", 0, 2));  // float32, float64, bfloat16
  p.steps = a.integer("T", 0, std::int64_t{1} << 30);
  p.batch = a.integer("B", 0, std::int64_t{1} << 30);
  p.size = a.integer("D", 0, std::int64_t{1} << 40);
  p.threads = static_cast<int>(a.integer("threads", 1, 1 << 20));
  p.anchors = a.integer("A", 0, p.steps);
  p.ring = static_cast<int>(a.integer("ring", 1, kMaxSecants + 1));
  require_addressable("T, ring, B, D", {p.steps + 1, p.ring, p.batch, p.size});
  const bool rows = p.anchors > 0 && p.batch > 0, data = rows && p.size > 0;
  const auto item = static_cast<std::size_t>(item_size(p.dtype));
  p.states = a.address("states", item, data);
  p.predictions = a.address("predictions", item, data);
  p.draft_cache = a.address("draft_cache", item, data);
  p.anchor_rows = a.table<const std::int64_t>("anchor_rows", p.anchors > 0);
  p.lo = a.table<const std::int32_t>("lo", p.batch > 0);
  p.hi = a.table<const std::int32_t>("hi", p.batch > 0);
  p.z = a.address("z", item, data);
  p.remainder = a.address("remainder", item, data);
  p.filled = a.table<std::int32_t>("filled", rows);
  p.secant_weights = a.table<double>("secant_weights", rows && p.ring > 1);
  p.column = static_cast<int>(a.integer("column", 0, p.ring - 1));
  p.ridge = a.number("ridge", true, true);
  p.floor = a.number("floor", false, true);
  a.finish();
  draft_secants(p);
}

}  // namespace deqdiff
