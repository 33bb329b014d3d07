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

template <class S>
void correct(const CorrectionRow& row) {
  typedef typename WideOf<S>::Type W;
  typedef typename S::Vector V;
  const V most = broadcast<S>(kMaxOutput);
  along<S>(0, row.size,
           [&](const auto& fetch, const auto& fetch_wide, const auto& put, const auto&) __attribute__((always_inline)) {
             const V c =
                 row.slope_per_element ? fetch_wide(row.slope) : V{} + *static_cast<const typename W::Item*>(row.slope);
             const V now = fetch(row.now), output = fetch(row.draft_output);
             const V sanitized = (output > -most) & (output < most) ? output : c * now;
             V change = sanitized - c * (row.x != nullptr ? now - fetch(row.x) : now);
             if (row.x != nullptr) {
               change -= fetch(row.draft_cache);
               for (int j = 0; j < row.count; ++j) {
                 change += broadcast<S>(row.gamma[j]) * (fetch(row.remainder[j]) - fetch(row.own_remainder));
               }
             }
             put(row.correction, change);
             put(row.draft_cache, sanitized);
           });
}

template <class S>
void subtract(const void* a, const void* b, const void* slope, bool slope_per_element, void* out, int64_t size) {
  typedef typename WideOf<S>::Type W;
  typedef typename S::Vector V;
  along<S>(0, size,
           [&](const auto& fetch, const auto& fetch_wide, const auto& put, const auto&) __attribute__((always_inline)) {
             V c = V{} + 1;
             if (slope != nullptr)
               c = slope_per_element ? fetch_wide(slope) : V{} + *static_cast<const typename W::Item*>(slope);
             put(out, fetch(a) - c * fetch(b));
           });
}

template <class S>
constexpr DraftKernels kernels() {
  return {correct<S>, subtract<S>};
}

}  // namespace

namespace DEQDIFF_ISA {
extern const DraftTable draft_table;
const DraftTable draft_table = {DEQDIFF_NAME(DEQDIFF_ISA),
                                {kernels<Float32>(), kernels<Float64>(), kernels<BFloat16>()}};
}  // namespace DEQDIFF_ISA

}  // namespace deqdiff
