// Compiled once per instruction set, with DEQDIFF_ISA naming it (CMakeLists.txt).
#include "inverse_rows.h"

#include "vector.h"

#ifndef DEQDIFF_ISA
#error "compile with -DDEQDIFF_ISA=baseline, avx2 or avx512"
#endif
#define DEQDIFF_NAME2(name) #name
#define DEQDIFF_NAME(name) DEQDIFF_NAME2(name)

namespace deqdiff {
namespace {

constexpr int64_t kSpan = 1024;  // sums run in the wide type within a span and in double across spans

template <class S, int J>
void measure_span(InverseRow& row, int64_t begin, int64_t size) {
  typedef typename S::Vector V;
  typedef typename WideOf<S>::Type W;
  constexpr int kDots = J * (J + 1) / 2;
  V miss = {}, rho_norm = {}, reached_norm = {}, x_norm = {}, next_norm = {}, with_rho[J + 1], gram[kDots + 1];
  for (int j = 0; j < J; ++j) with_rho[j] = V{};
  for (int k = 0; k < kDots; ++k) gram[k] = V{};
  const V a = broadcast<S>(row.state_coef[0]), b = broadcast<S>(row.model_coef[0]);
  const auto at = [&](const auto& fetch, const auto& fetch_wide, const auto&,
                      const auto& put_wide) __attribute__((always_inline)) {
    const V x = fetch(row.states[0]), prediction = fetch(row.predictions[0]), next = fetch(row.next);
    V reached = a * x + b * prediction;
    for (int lag = 1; lag < row.lags; ++lag) {
      reached += broadcast<S>(row.state_coef[lag]) * fetch(row.states[lag]);
      reached += broadcast<S>(row.model_coef[lag]) * fetch(row.predictions[lag]);
    }
    if (row.drift != nullptr) reached += fetch(row.drift);
    const V rho = next - reached;
    const V weight =
        row.weight_per_element ? fetch_wide(row.weight) : V{} + *static_cast<const typename W::Item*>(row.weight);
    const V missed = weight * (fetch(row.old_next) - reached);
    put_wide(row.rho, rho);
    miss += missed * missed;
    rho_norm += rho * rho;
    reached_norm += reached * reached;
    x_norm += x * x;
    next_norm += next * next;
    V dg[J + 1];
    for (int j = 0; j < J; ++j) dg[j] = a * (fetch(row.z[j]) - x) + b * (fetch(row.e[j]) - prediction);
    for (int j = 0, k = 0; j < J; ++j) {
      with_rho[j] += dg[j] * rho;
      for (int l = 0; l <= j; ++l, ++k) gram[k] += dg[j] * dg[l];
    }
  };
  along<S>(begin, begin + size, at);
  row.miss += sum<S>(miss);
  row.rho_norm += sum<S>(rho_norm);
  row.reached_norm += sum<S>(reached_norm);
  row.x_norm += sum<S>(x_norm);
  row.next_norm += sum<S>(next_norm);
  for (int j = 0, k = 0; j < J; ++j) {
    row.with_rho[j] += sum<S>(with_rho[j]);
    for (int l = 0; l <= j; ++l, ++k) row.gram[j][l] += sum<S>(gram[k]);
  }
}

template <class S>
void measure(InverseRow& row) {
  typedef void (*Span)(InverseRow&, int64_t, int64_t);
  static const Span table[kMaxSecants + 1] = {measure_span<S, 0>, measure_span<S, 1>, measure_span<S, 2>,
                                              measure_span<S, 3>, measure_span<S, 4>, measure_span<S, 5>,
                                              measure_span<S, 6>, measure_span<S, 7>};
  row.miss = row.rho_norm = row.reached_norm = row.x_norm = row.next_norm = 0;
  for (int j = 0; j < row.count; ++j) {
    row.with_rho[j] = 0;
    for (int l = 0; l <= j; ++l) row.gram[j][l] = 0;
  }
  for (int64_t begin = 0; begin < row.size; begin += kSpan) {
    table[row.count](row, begin, row.size - begin < kSpan ? row.size - begin : kSpan);
  }
}

template <class S>
void step_span(InverseRow& row, int64_t begin, int64_t size) {
  typedef typename S::Vector V;
  typedef typename WideOf<S>::Type W;
  V step_sum = {};
  const V a = broadcast<S>(row.state_coef[0]), b = broadcast<S>(row.model_coef[0]);
  const V damping = broadcast<S>(row.damping);
  const auto at = [&](const auto& fetch, const auto& fetch_wide, const auto& put,
                      const auto&) __attribute__((always_inline)) {
    const V x = fetch(row.states[0]), prediction = fetch(row.predictions[0]);
    const V c = row.slope_per_element ? fetch_wide(row.slope) : V{} + *static_cast<const typename W::Item*>(row.slope);
    V rest = fetch_wide(row.rho), moved = {};
    for (int j = 0; j < row.count; ++j) {
      const V gamma = broadcast<S>(row.gamma[j]), dx = fetch(row.z[j]) - x;
      moved += gamma * dx;
      rest -= gamma * (a * dx + b * (fetch(row.e[j]) - prediction));
    }
    // lanes past the end hold no slope; a rest of zero is left alone whatever it is divided by
    moved += damping * rest / (rest == V{} ? V{} + 1 : a + b * c);
    step_sum += moved * moved;
    put(row.keep_state, x);
    put(row.keep_prediction, prediction);
    put(row.out, x + moved);
  };
  along<S>(begin, begin + size, at);
  row.step += sum<S>(step_sum);
}

template <class S>
void step(InverseRow& row) {
  row.step = 0;
  for (int64_t begin = 0; begin < row.size; begin += kSpan) {
    step_span<S>(row, begin, row.size - begin < kSpan ? row.size - begin : kSpan);
  }
}

template <class S>
void shorten(InverseRow& row, double factor) {
  typedef typename S::Vector V;
  const V part = broadcast<S>(factor);
  const int64_t whole = row.size - row.size % Lanes<S>::count;
  int64_t i = 0;
  for (; i < whole; i += Lanes<S>::count) {
    const V x = load<S>(row.keep_state, i);
    store<S>(row.out, i, x + part * (load<S>(row.out, i) - x));
  }
  if (i < row.size) {
    const V x = load_tail<S>(row.keep_state, i, row.size - i);
    store_tail<S>(row.out, i, x + part * (load_tail<S>(row.out, i, row.size - i) - x), row.size - i);
  }
}

template <class S>
constexpr InverseKernels kernels() {
  return {measure<S>, step<S>, shorten<S>};
}

}  // namespace

namespace DEQDIFF_ISA {
extern const InverseTable inverse_table;
const InverseTable inverse_table = {DEQDIFF_NAME(DEQDIFF_ISA),
                                    {kernels<Float32>(), kernels<Float64>(), kernels<BFloat16>()}};
}  // namespace DEQDIFF_ISA

}  // namespace deqdiff
