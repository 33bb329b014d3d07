// Compiled once per instruction set, with DEQDIFF_ISA naming it (CMakeLists.txt).
#include "node_rows.h"

#include "vector.h"

#ifndef DEQDIFF_ISA
#error "compile with -DDEQDIFF_ISA=baseline, avx2 or avx512"
#endif
#define DEQDIFF_NAME2(name) #name
#define DEQDIFF_NAME(name) DEQDIFF_NAME2(name)

namespace deqdiff {
namespace {

// The elements of one vector, for all samples. L lags and P nodes of the stencil, or as many as the row says where they
// are 0.
template <class S, int L, int P, class Fetch, class FetchWide, class Put, class PutWide>
DEQDIFF_INLINE void step_vector(const NodeRow& row, const typename Lanes<S>::Index& places, const Fetch& fetch,
                                const FetchWide& fetch_wide, const Put& put, const PutWide& put_wide) {
  typedef typename S::Vector V;
  typedef typename S::Wide Wide;
  typedef typename S::Item Item;
  constexpr int kLags = L > 0 ? L : kMaxLags, kStencil = P > 0 ? P : kMaxStencil;
  const int lags = L > 0 ? L : row.lags, stencil = P > 0 ? P : row.stencil;
  const auto coefficient = [&](const void* table, int k) __attribute__((always_inline)) {
    const Wide* own = static_cast<const Wide*>(table) + k * row.kinds;
    return row.classes == nullptr ? V{} + *own : gather<S>(own, places);
  };
  V a[kLags * kLags], c[kStencil * kLags];
  for (int k = 0; k < lags * lags; ++k) a[k] = coefficient(row.state_coef, k);
  for (int l = 0; l < lags; ++l) {
    for (int s = 0; s < stencil; ++s) c[s * lags + l] = coefficient(row.remainder_coef, l * stencil + s);
  }
  Wide* carried = static_cast<Wide*>(row.carried);
  const Item* remainder = static_cast<const Item*>(row.remainder);
  const Item* drift = static_cast<const Item*>(row.drift);
  Item* state = static_cast<Item*>(row.state);
  for (int64_t b = 0; b < row.samples; ++b) {
    V before[kLags], after[kLags];
    for (int m = 0; m < lags; ++m) before[m] = fetch_wide(carried + m * row.carried_stride);
    for (int l = 0; l < lags; ++l) {
      after[l] = a[l * lags] * before[0];
      for (int m = 1; m < lags; ++m) after[l] += a[l * lags + m] * before[m];
    }
    for (int s = 0; s < stencil; ++s) {
      const V nearby = fetch(remainder + s * row.row_stride);
      for (int l = 0; l < lags; ++l) after[l] += c[s * lags + l] * nearby;
    }
    for (int l = 0; l < lags; ++l) {
      if (drift != nullptr) after[l] += fetch(drift + l * row.row_stride);
      put_wide(carried + l * row.carried_stride, after[l]);
      if (l == 0) put(state, after[l]);
    }
    carried += lags * row.carried_stride;
    remainder += row.sample_stride;
    drift = drift == nullptr ? nullptr : drift + row.sample_stride;
    state += row.sample_stride;
  }
}

// Whole vectors; returns where what is left begins.
template <class S, int L, int P>
int64_t step_whole(const NodeRow& given) {
  const NodeRow row = given;  // nothing that is stored can be part of it
  typedef typename S::Vector V;
  typedef typename WideOf<S>::Type W;
  int64_t at = 0;
  for (; at + Lanes<S>::count <= row.size; at += Lanes<S>::count) {
    typename Lanes<S>::Index places = {};
    if (row.classes != nullptr) memcpy(&places, row.classes + at, sizeof(places));
    step_vector<S, L, P>(
        row, places, [&](const void* p) { return load<S>(p, at); }, [&](const void* p) { return load<W>(p, at); },
        [&](void* p, const V& v) { store<S>(p, at, v); }, [&](void* p, const V& v) { store<W>(p, at, v); });
  }
  return at;
}

template <class S, int L>
void step_tail(const NodeRow& row, int64_t at) {
  typedef typename S::Vector V;
  typedef typename WideOf<S>::Type W;
  const int64_t items = row.size - at;
  typename Lanes<S>::Index places = {};
  if (row.classes != nullptr) memcpy(&places, row.classes + at, items * sizeof(int32_t));
  step_vector<S, L, 0>(
      row, places, [&](const void* p) { return load_tail<S>(p, at, items); },
      [&](const void* p) { return load_tail<W>(p, at, items); },
      [&](void* p, const V& v) { store_tail<S>(p, at, v, items); },
      [&](void* p, const V& v) { store_tail<W>(p, at, v, items); });
}

template <class S>
void step(const NodeRow& row) {
  const int usual = row.stencil == 4;
  static int64_t (*const table[4][2])(const NodeRow&) = {{step_whole<S, 0, 0>, step_whole<S, 0, 0>},
                                                         {step_whole<S, 1, 0>, step_whole<S, 1, 4>},
                                                         {step_whole<S, 2, 0>, step_whole<S, 2, 4>},
                                                         {step_whole<S, 3, 0>, step_whole<S, 3, 4>}};
  const int64_t done = table[row.lags <= 3 ? row.lags : 0][usual](row);
  if (done < row.size) row.lags == 1 ? step_tail<S, 1>(row, done) : step_tail<S, 0>(row, done);
}

}  // namespace

namespace DEQDIFF_ISA {
extern const NodeTable node_table;
const NodeTable node_table = {DEQDIFF_NAME(DEQDIFF_ISA), {{step<Float32>}, {step<Float64>}, {step<BFloat16>}}};
}  // namespace DEQDIFF_ISA

}  // namespace deqdiff
