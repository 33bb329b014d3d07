#include "node_scan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ddim_update.h"
#include "newton_rows.h"
#include "ops.h"

namespace deqdiff {
namespace {

constexpr std::int64_t kSpan = 2 * kBlock;  // elements: the stencil and what is carried stay in the caches
constexpr std::int64_t kTogether = 8;       // samples that share a look-up of the coefficients

void require_values(const char* names, const std::int32_t* values, std::int64_t count, std::int64_t most,
                    const char* what) {
  bool good = true;
  for (std::int64_t k = 0; k < count; ++k) good &= values[k] >= 0 && values[k] <= most;
  if (good) return;
  for (std::int64_t k = 0; k < count; ++k) {
    if (values[k] >= 0 && values[k] <= most) continue;
    throw std::invalid_argument(names + std::to_string(most) + ", got " + std::to_string(values[k]) + " for " + what +
                                " " + std::to_string(k));
  }
}

// All steps of elements [begin, begin + size) of samples [from, to), with memory for (samples, L, kSpan) wide numbers.
void walk(const NodeProblem& p, std::int64_t begin, std::int64_t size, std::int64_t from, std::int64_t to,
          char* carried) {
  const std::int64_t item = item_size(p.dtype), wide = static_cast<std::int64_t>(wide_size(p.dtype));
  const auto at = [&](const void* base, std::int64_t row, std::int64_t b) {
    return const_cast<char*>(static_cast<const char*>(base)) + ((row * p.batch + b) * p.size + begin) * item;
  };
  const auto step = [&](const void* table, std::int64_t j, int columns) {
    return static_cast<const char*>(table) + j * p.lags * columns * p.kinds * wide;
  };
  NodeRow row;
  row.classes = p.classes == nullptr ? nullptr : p.classes + begin;
  row.kinds = p.kinds;
  row.carried = carried;
  row.carried_stride = kSpan;
  row.row_stride = p.batch * p.size;
  row.sample_stride = p.size;
  row.samples = to - from;
  row.size = size;
  row.lags = p.lags;
  row.stencil = p.stencil;
  for (std::int64_t b = from; b < to; ++b) {
    char* own = carried + (b - from) * p.lags * kSpan * wide;
    std::memset(own, 0, p.lags * kSpan * wide);
    newton_kernels(p.dtype).widen(at(p.states, 0, b), own, size);
  }
  for (std::int64_t j = 0; j < p.steps; ++j) {
    row.state_coef = step(p.state_coef, j, p.lags);
    row.remainder_coef = step(p.remainder_coef, j, p.stencil);
    row.remainder = at(p.remainder, p.start[j], from);
    row.drift = p.drift == nullptr ? nullptr : at(p.drift, j * p.lags, from);
    row.state = at(p.states, j + 1, from);
    node_kernels(p.dtype).step(row);
  }
}

}  // namespace

void node_scan(const NodeProblem& p) {
  require_values("start: expected 0 <= start <= m - S = ", p.start, p.steps, p.nodes - p.stencil, "step");
  if (p.classes != nullptr) {
    require_values("classes: expected 0 <= classes <= K - 1 = ", p.classes, p.size, p.kinds - 1, "element");
  }
  const std::int64_t spans = (p.size + kSpan - 1) / kSpan, room = p.lags * kTogether * kSpan;
  const std::int64_t units = spans * p.batch;  // sample by sample within a span
  const std::int64_t useful = useful_threads(p.steps * p.batch * p.size * p.lags, p.threads);
  const int threads = static_cast<int>(std::max<std::int64_t>(1, std::min(useful, units)));
  double* memory = scratch(threads * room);
  team(threads, [&](int part, int parts) {
    const Range range(units, part, parts);
    char* own = reinterpret_cast<char*>(memory + part * room);
    for (std::int64_t unit = range.begin; unit < range.end;) {
      const std::int64_t begin = unit / p.batch * kSpan, from = unit % p.batch;
      const std::int64_t to = std::min({p.batch, from + kTogether, from + range.end - unit});
      walk(p, begin, std::min(kSpan, p.size - begin), from, to, own);
      unit += to - from;
    }
  });
}

void node_scan_call(Arguments& a) {
  NodeProblem p;
  p.dtype = static_cast<Dtype>(a.integer("dtype", 0, 2));  // float32, float64, bfloat16
  p.steps = a.integer("T", 0, std::int64_t{1} << 30);
  p.nodes = a.integer("M", p.steps > 0, std::int64_t{1} << 30);
  p.batch = a.integer("B", 0, std::int64_t{1} << 30);
  p.size = a.integer("D", 0, std::int64_t{1} << 40);
  p.threads = static_cast<int>(a.integer("threads", 1, 1 << 20));
  p.lags = static_cast<int>(a.integer("L", 1, kMaxLags));
  p.stencil = static_cast<int>(a.integer("S", 1, kMaxStencil));
  require(p.steps == 0 || p.stencil <= p.nodes, "S", "at most M = " + std::to_string(p.nodes));
  p.kinds = a.integer("K", 1, std::int64_t{1} << 31);
  require_addressable("T, L, B, D", {p.steps + 1, p.lags, p.batch, p.size});
  require_addressable("M, B, D", {p.nodes, p.batch, p.size});
  require_addressable("T, L, S, K", {p.steps, p.lags, std::max(p.lags, p.stencil), p.kinds});
  const bool data = p.steps > 0 && p.batch > 0 && p.size > 0;
  const auto item = static_cast<std::size_t>(item_size(p.dtype)), wide = wide_size(p.dtype);
  p.states = a.address("states", item, data);
  p.remainder = a.address("remainder", item, data);
  p.state_coef = a.address("state_coef", wide, p.steps > 0);
  p.remainder_coef = a.address("remainder_coef", wide, p.steps > 0);
  p.start = a.table<const std::int32_t>("start", p.steps > 0);
  p.classes = a.table<const std::int32_t>("classes", p.kinds > 1 && p.size > 0);
  p.drift = a.address("drift", item, false);
  a.finish();
  node_scan(p);
}

}  // namespace deqdiff
