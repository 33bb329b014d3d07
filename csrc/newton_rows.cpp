// Compiled once per instruction set, with DEQDIFF_ISA naming it (CMakeLists.txt).
#include "newton_rows.h"

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
void secant_span(SecantRow& row, int64_t begin, int64_t size) {
  typedef typename S::Vector V;
  constexpr int kDots = J * (J + 1) / 2;
  V norm = {}, with_dx[J], gram[kDots];
  for (int j = 0; j < J; ++j) with_dx[j] = V{};
  for (int k = 0; k < kDots; ++k) gram[k] = V{};
  const auto step = [&](const auto& fetch) __attribute__((always_inline)) {
    const V x = fetch(row.x), dx = fetch(row.now) - x;
    V dz[J];
    for (int j = 0; j < J; ++j) dz[j] = fetch(row.z[j]) - x;
    norm += x * x;
    for (int j = 0, k = 0; j < J; ++j) {
      with_dx[j] += dz[j] * dx;
      for (int l = 0; l <= j; ++l, ++k) gram[k] += dz[j] * dz[l];
    }
  };
  const int64_t end = begin + size, whole = end - size % Lanes<S>::count;
  int64_t at = begin;
  for (; at < whole; at += Lanes<S>::count) step([&](const void* p) { return load<S>(p, at); });
  if (at < end) step([&](const void* p) { return load_tail<S>(p, at, end - at); });
  row.norm += sum<S>(norm);
  for (int j = 0, k = 0; j < J; ++j) {
    row.with_dx[j] += sum<S>(with_dx[j]);
    for (int l = 0; l <= j; ++l, ++k) row.gram[j][l] += sum<S>(gram[k]);
  }
}

template <class S>
void secants(SecantRow& row) {
  typedef void (*Span)(SecantRow&, int64_t, int64_t);
  static const Span table[kMaxSecants] = {secant_span<S, 1>, secant_span<S, 2>, secant_span<S, 3>, secant_span<S, 4>,
                                          secant_span<S, 5>, secant_span<S, 6>, secant_span<S, 7>};
  row.norm = 0;
  for (int j = 0; j < row.count; ++j) {
    row.with_dx[j] = 0;
    for (int l = 0; l <= j; ++l) row.gram[j][l] = 0;
  }
  for (int64_t begin = 0; begin < row.size; begin += kSpan) {
    table[row.count - 1](row, begin, row.size - begin < kSpan ? row.size - begin : kSpan);
  }
}

template <class S>
void newton_span(NewtonRow& row, int64_t begin, int64_t size) {
  typedef typename S::Vector V;
  typedef typename WideOf<S>::Type W;
  V step_sum = {}, residual_sum = {}, norm_sum = {};
  const auto step = [&](const auto& fetch, const auto& fetch_wide, const auto& put,
                        const auto& put_wide) __attribute__((always_inline)) {
    const V prediction = fetch(row.prediction), now = fetch(row.now[0]);
    const V c = row.slope_per_element ? fetch_wide(row.slope) : V{} + *static_cast<const typename W::Item*>(row.slope);
    const V x = row.x != nullptr ? fetch(row.x) : V{};
    V e_hat = prediction + c * (now - x);
    for (int j = 0; j < row.count; ++j) {
      e_hat += broadcast<S>(row.gamma[j]) * ((fetch(row.e[j]) - prediction) - c * (fetch(row.z[j]) - x));
    }
    V next = broadcast<S>(row.state_coef[0]) * now + broadcast<S>(row.model_coef[0]) * e_hat;
    V plain = broadcast<S>(row.state_coef[0]) * fetch_wide(row.plain[0]) + broadcast<S>(row.model_coef[0]) * prediction;
    for (int lag = 1; lag < row.lags; ++lag) {
      const V a = broadcast<S>(row.state_coef[lag]), b = broadcast<S>(row.model_coef[lag]);
      next += a * fetch(row.now[lag]) + b * fetch_wide(row.e_hat[lag]);
      plain += a * fetch_wide(row.plain[lag]) + b * fetch(row.predictions[lag]);
    }
    if (row.drift != nullptr) {
      const V drift = fetch(row.drift);
      next += drift;
      plain += drift;
    }
    const V old = fetch(row.old_next);
    const V moved = next - old, missed = plain - old;
    step_sum += moved * moved;
    residual_sum += missed * missed;
    norm_sum += next * next;
    if (row.e_hat[0] != nullptr) put_wide(row.e_hat[0], e_hat);
    if (row.keep_prediction != nullptr) put(row.keep_prediction, prediction);
    if (row.keep_next != nullptr) put(row.keep_next, old);
    put(row.next, next);
    put_wide(row.plain_next, plain);
  };
  along<S>(begin, begin + size, step);
  row.step += sum<S>(step_sum);
  row.residual += sum<S>(residual_sum);
  row.norm += sum<S>(norm_sum);
}

template <class S>
void newton(NewtonRow& row) {
  row.step = row.residual = row.norm = 0;
  for (int64_t begin = 0; begin < row.size; begin += kSpan) {
    newton_span<S>(row, begin, row.size - begin < kSpan ? row.size - begin : kSpan);
  }
}

template <class S>
void widen(const void* from, void* to, int64_t size) {
  along<S>(0, size,
           [&](const auto& fetch, const auto&, const auto&, const auto& put_wide)
               __attribute__((always_inline)) { put_wide(to, fetch(from)); });
}

template <class S>
constexpr NewtonKernels kernels() {
  return {secants<S>, newton<S>, widen<S>};
}

}  // namespace

namespace DEQDIFF_ISA {
extern const NewtonTable newton_table;
const NewtonTable newton_table = {DEQDIFF_NAME(DEQDIFF_ISA),
                                  {kernels<Float32>(), kernels<Float64>(), kernels<BFloat16>()}};
}  // namespace DEQDIFF_ISA

}  // namespace deqdiff
