// The scan over nodes: a chain in composite steps, its remainders interpolated between nodes nearby.
//   y_l <- sum_m state_coef[j,l,m,k] y_m + sum_s remainder_coef[j,l,s,k] remainder[start[j]+s] + drift[j,l]
//   states[j+1] <- y_0, from y = (states[0], 0, ...); k = classes[d], j = 0 ... T - 1
// Exponential integrators (Hochbruck, Ostermann 2010), for diffusion as in Lu et al. 2022.
#pragma once

#include <cstdint>

#include "node_rows.h"

namespace deqdiff {

// Addresses are borrowed for the call. Contiguous: states (T+1, B, D), remainder (M, B, D), drift (T, L, B, D).
struct NodeProblem {
  Dtype dtype;
  void* states;
  const void* remainder;
  const void* state_coef;                         // (T, L, L, K), wide type
  const void* remainder_coef;                     // (T, L, S, K), wide type
  const std::int32_t* start;                      // (T,) within [0, M - S]
  const std::int32_t* classes;                    // (D,) within [0, K), or null
  const void* drift;                              // or null
  std::int64_t steps, nodes, batch, size, kinds;  // T, M, B, D, K
  int lags, stencil;
  int threads;
};

// Throws std::invalid_argument when a start or a class is out of range, before anything is written.
void node_scan(const NodeProblem& problem);

}  // namespace deqdiff
