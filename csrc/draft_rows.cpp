// Compiled once per instruction set, with DEQDIFF_ISA naming it (CMakeLists.txt).
#include "draft_rows.h"

#include "vector.h"

#ifndef DEQDIFF_ISA
#error "compile with -DDEQDIFF_ISA=baseline, avx2 or avx512"
#endif
#define DEQDIFF_NAME2(name) #name
#define DEQDIFF_NAME(name) DEQDIFF_NAME2(name)

namespace deqdiff {
namespace {

// Runs step(fetch, fetch_wide, put) over whole vectors and then over what is left of a row.
template <class S, class Step>
DEQDIFF_INLINE void along(int64_t size, const Step& step) {
  typedef typename WideOf<S>::Type W;
  typedef typename S::Vector V;
  const int64_t whole = size - size % Lanes<S>::count;
  int64_t at = 0;
  for (; at < whole; at += Lanes<S>::count) {
    step([&](const void* p) { return load<S>(p, at); }, [&](const void* p) { return load<W>(p, at); },
         [&](void* p, const V& v) { store<S>(p, at, v); });
  }
  if (at < size) {
    const int64_t items = size - at;
    step([&](const void* p) { return load_tail<S>(p, at, items); },
         [&](const void* p) { return load_tail<W>(p, at, items); },
         [&](void* p, const V& v) { store_tail<S>(p, at, v, items); });
  }
}

template <class S>
void turn(const TurnRow& row) {
  typedef typename WideOf<S>::Type W;
  typedef typename S::Vector V;
  const V wild = broadcast<S>(kWild);
  along<S>(row.size, [&](const auto& fetch, const auto& fetch_wide, const auto& put) __attribute__((always_inline)) {
    const V c = row.slope_per_element ? fetch_wide(row.slope) : V{} + *static_cast<const typename W::Item*>(row.slope);
    const V now = fetch(row.now), said = fetch(row.said);
    const V heard = (said > -wild) & (said < wild) ? said : c * now;
    V change = heard - c * (row.x != nullptr ? now - fetch(row.x) : now);
    if (row.x != nullptr) {
      change -= fetch(row.made);
      for (int j = 0; j < row.count; ++j) {
        change += broadcast<S>(row.gamma[j]) * (fetch(row.rest[j]) - fetch(row.own_rest));
      }
    }
    put(row.turn, change);
    put(row.made, heard);
  });
}

template <class S>
void rest(const void* a, const void* b, const void* slope, bool slope_per_element, void* out, int64_t size) {
  typedef typename WideOf<S>::Type W;
  typedef typename S::Vector V;
  along<S>(size, [&](const auto& fetch, const auto& fetch_wide, const auto& put) __attribute__((always_inline)) {
    V c = V{} + 1;
    if (slope != nullptr)
      c = slope_per_element ? fetch_wide(slope) : V{} + *static_cast<const typename W::Item*>(slope);
    put(out, fetch(a) - c * fetch(b));
  });
}

template <class S>
constexpr DraftKernels kernels() {
  return {turn<S>, rest<S>};
}

}  // namespace

namespace DEQDIFF_ISA {
extern const DraftTable draft_table;
const DraftTable draft_table = {DEQDIFF_NAME(DEQDIFF_ISA),
                                {kernels<Float32>(), kernels<Float64>(), kernels<BFloat16>()}};
}  // namespace DEQDIFF_ISA

}  // namespace deqdiff
