// Compiled once per instruction set, with DEQDIFF_ISA naming it (CMakeLists.txt).
#include "rows.h"

#include "vector.h"

#ifndef DEQDIFF_ISA
#error "compile with -DDEQDIFF_ISA=baseline, avx2 or avx512"
#endif
#define DEQDIFF_NAME2(name) #name
#define DEQDIFF_NAME(name) DEQDIFF_NAME2(name)

namespace deqdiff {
namespace {

// One block: f, g and the two residual sums. K terms, or term_count of them when K is 0.
template <class S, int K>
void affine_block(const DdimRow& row, int64_t begin, int64_t size, double* partial) {
  typedef typename S::Vector V;
  const int count = K > 0 ? K : row.term_count;
  V coef[K > 0 ? K : kMaxTerms];
  for (int k = 0; k < count; ++k) coef[k] = broadcast<S>(row.coef[k]);
  V diff_sum = {}, norm_sum = {}, g_sum = {};
  const auto step = [&](const auto& fetch, const auto& put) __attribute__((always_inline)) {
    V f = coef[0] * fetch(row.terms[0]);
    for (int k = 1; k < count; ++k) f += coef[k] * fetch(row.terms[k]);
    const V state = fetch(row.state);
    const V diff = f - state;
    diff_sum += diff * diff;
    norm_sum += f * f;
    put(row.f, f);
    if (row.g != nullptr) {
      const V g = stored<S>(stored<S>(f) - state);
      g_sum += g * g;
      put(row.g, g);
    }
  };
  const int64_t end = begin + size, whole = end - size % Lanes<S>::count;
  int64_t at = begin;
  for (; at < whole; at += Lanes<S>::count) {
    prefetch<S, false>(row.terms[1], at);
    prefetch<S, true>(row.state, at);
    if (row.g != nullptr) {
      prefetch<S, true>(row.f, at);
      prefetch<S, true>(row.g, at);
    }
    step([&](const void* p) { return load<S>(p, at); }, [&](void* p, const V& v) { store<S>(p, at, v); });
  }
  if (at < end) {
    step([&](const void* p) { return load_tail<S>(p, at, end - at); },
         [&](void* p, const V& v) { store_tail<S>(p, at, v, end - at); });
  }
  partial[0] = sum<S>(diff_sum);
  partial[1] = sum<S>(norm_sum);
  if (row.g != nullptr) partial[2] = sum<S>(g_sum);
}

// One block: <g, older[j]> for J older columns; g was just written and sits in the first-level cache.
template <class S, int J>
void dots_block(const DdimRow& row, int64_t begin, int64_t size, double* partial) {
  typedef typename S::Vector V;
  V sums[J > 0 ? J : 1] = {};
  const int64_t end = begin + size, whole = end - size % Lanes<S>::count;
  int64_t at = begin;
  for (; at < whole; at += Lanes<S>::count) {
    const V g = load<S>(row.g, at);
    for (int j = 0; j < J; ++j) prefetch<S, false>(row.older[j], at);
    for (int j = 0; j < J; ++j) sums[j] += g * load<S>(row.older[j], at);
  }
  if (at < end) {
    const V g = load_tail<S>(row.g, at, end - at);
    for (int j = 0; j < J; ++j) sums[j] += g * load_tail<S>(row.older[j], at, end - at);
  }
  for (int j = 0; j < J; ++j) partial[j] = sum<S>(sums[j]);
}

typedef void (*BlockKernel)(const DdimRow&, int64_t, int64_t, double*);

template <class S>
void affine(const DdimRow& row) {
  static const BlockKernel dots[kMaxHistory] = {dots_block<S, 0>, dots_block<S, 1>, dots_block<S, 2>, dots_block<S, 3>,
                                                dots_block<S, 4>, dots_block<S, 5>, dots_block<S, 6>, dots_block<S, 7>};
  BlockKernel block = affine_block<S, 0>;
  if (row.term_count == 2) block = affine_block<S, 2>;
  if (row.term_count == 3) block = affine_block<S, 3>;
  double* partial = row.partial;
  for (int64_t begin = 0; begin < row.size; begin += kBlock, partial += row.stride) {
    const int64_t size = row.size - begin < kBlock ? row.size - begin : kBlock;
    block(row, begin, size, partial);
    if (row.g != nullptr && row.older_count > 0) dots[row.older_count](row, begin, size, partial + 3);
  }
}

// Differences from the newest column: the weights sum to one only up to rounding, and near the solution the columns
// agree in most digits, so this form loses none of them.
template <class S, int J, bool kDamped>
void mix_rows(const MixRow& row) {
  typedef typename S::Vector V;
  V weight[J > 0 ? J : 1], g_weight[kMaxHistory];
  for (int j = 0; j < J; ++j) weight[j] = broadcast<S>(row.weight[j]);
  for (int k = 0; kDamped && k < row.g_count; ++k) g_weight[k] = broadcast<S>(row.g_weight[k]);
  const auto combine = [&](const auto& fetch) __attribute__((always_inline)) {
    const V newest = fetch(row.newest);
    V out = newest;
    for (int j = 0; j < J; ++j) out += weight[j] * (fetch(row.f[j]) - newest);
    for (int k = 0; kDamped && k < row.g_count; ++k) out += g_weight[k] * fetch(row.g[k]);
    return out;
  };
  const int64_t whole = row.size - row.size % Lanes<S>::count;
  int64_t at = 0;
  for (; at < whole; at += Lanes<S>::count) {
    for (int j = 0; j < J; ++j) prefetch<S, false>(row.f[j], at);
    store<S>(row.out, at, combine([&](const void* p) { return load<S>(p, at); }));
  }
  if (at < row.size) {
    const int64_t items = row.size - at;
    store_tail<S>(row.out, at, combine([&](const void* p) { return load_tail<S>(p, at, items); }), items);
  }
}

typedef void (*MixKernel)(const MixRow&);

template <class S, bool kDamped>
void mix_any(const MixRow& row) {
  static const MixKernel table[kMaxHistory] = {
      mix_rows<S, 0, kDamped>, mix_rows<S, 1, kDamped>, mix_rows<S, 2, kDamped>, mix_rows<S, 3, kDamped>,
      mix_rows<S, 4, kDamped>, mix_rows<S, 5, kDamped>, mix_rows<S, 6, kDamped>, mix_rows<S, 7, kDamped>};
  table[row.f_count](row);
}

template <class S>
void mix(const MixRow& row) {
  row.g_count > 0 ? mix_any<S, true>(row) : mix_any<S, false>(row);
}

}  // namespace

namespace DEQDIFF_ISA {
extern const IsaTable table;
const IsaTable table = {
    DEQDIFF_NAME(DEQDIFF_ISA),
    {{affine<Float32>, mix<Float32>}, {affine<Float64>, mix<Float64>}, {affine<BFloat16>, mix<BFloat16>}}};
}  // namespace DEQDIFF_ISA

}  // namespace deqdiff
