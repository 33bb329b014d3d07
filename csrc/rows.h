// The innermost loops, on one strip of one row. rows.cpp is compiled once per instruction set and picked at run time.
#pragma once

#include <cstdint>

namespace deqdiff {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2 };

constexpr int kMaxHistory = 8;
constexpr int kMaxLags = 16;
constexpr int kMaxTerms = 2 * kMaxLags + 1;
// Sums run in the wide type inside one block and in double across blocks, so results do not depend on the partition.
constexpr std::int64_t kBlock = 256;

inline std::int64_t item_size(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }
inline std::int64_t block_count(std::int64_t size) { return (size + kBlock - 1) / kBlock; }

// f = sum_k coef[k] terms[k];  partial = |f - state|^2, |f|^2 and, with g = f - state, <g, g>, <g, older[j]>...
struct DdimRow {
  const void* terms[kMaxTerms];
  double coef[kMaxTerms];
  int term_count;
  const void* state;  // the old value of the state that f replaces
  void* f;            // may equal state
  void* g;            // null: no history, two sums per block
  const void* older[kMaxHistory];
  int older_count;
  std::int64_t size;    // elements of this strip, which starts at a block boundary
  double* partial;      // one group of sums per block
  std::int64_t stride;  // doubles from one group to the next
};

// out = newest + sum_j weight[j] (f[j] - newest) + sum_k g_weight[k] g[k]
struct MixRow {
  const void* newest;
  const void* f[kMaxHistory];
  double weight[kMaxHistory];
  int f_count;
  const void* g[kMaxHistory];
  double g_weight[kMaxHistory];
  int g_count;
  void* out;
  std::int64_t size;
};

struct RowKernels {
  void (*affine)(const DdimRow&);
  void (*mix)(const MixRow&);
};

struct IsaTable {
  const char* name;
  RowKernels kernels[3];  // indexed by Dtype
};

// The best table that this CPU runs; the environment variable DEQDIFF_FAST_ISA (baseline, avx2, avx512) can lower it.
const IsaTable& isa_table();
inline const RowKernels& row_kernels(Dtype dtype) { return isa_table().kernels[static_cast<int>(dtype)]; }

}  // namespace deqdiff
