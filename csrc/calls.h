// The kernels with flat arguments, as Python calls them: addresses and sizes, checked. No Python in here.
#pragma once

#include <cstdint>

namespace deqdiff {

using Address = std::uintptr_t;
using Index = std::int64_t;

// All throw std::invalid_argument, naming what is wrong. Shapes and dtypes: see the ops of deqdiff_fast.kernels.
void ddim_update_call(int dtype, Address states, Address predictions, Address state_coef, Address model_coef,
                      Address drift, Address lo, Address hi, Address sq_diff, Address sq_norm, Index T, Index B,
                      Index D, int L, int threads);
void anderson_step_call(int dtype, Address states, Address predictions, Address state_coef, Address model_coef,
                        Address drift, Address lo, Address hi, Address sq_diff, Address sq_norm, Address f, Address g,
                        Address gram, Address filled, Index T, Index B, Index D, int L, int M, Index W, int column,
                        int scope, double ridge, bool relative_ridge, double damping, double stale, int threads);
void newton_scan_call(int dtype, Address states, Address predictions, Address state_coef, Address model_coef,
                      Address drift, Address slope, bool slope_per_element, Address lo, Address hi, Address sq_diff,
                      Address sq_norm, Address z, Address e, Address filled, Index T, Index B, Index D, int L, int ring,
                      Index W, int column, double ridge, double floor, int threads);
void inverse_scan_call(int dtype, Address states, Address predictions, Address state_coef, Address model_coef,
                       Address drift, Address slope, bool slope_per_element, Address weight, bool weight_per_element,
                       Address lo, Address hi, Address sq_miss, Address z, Address e, Address filled, Index T, Index B,
                       Index D, int L, int ring, Index W, int column, double damping, double ridge, double stale,
                       double floor, double reach, int threads);
void draft_secants_call(int dtype, Address states, Address predictions, Address made, Address at, Address lo,
                        Address hi, Address z, Address rest, Address filled, Address weights, Index T, Index A, Index B,
                        Index D, int ring, int column, double ridge, double floor, int threads);
void draft_scan_call(int dtype, Address states, Address predictions, Address said, Address made, Address turn,
                     Address shares, Address state_coef, Address model_coef, Address drift, Address slope,
                     bool slope_per_element, Address lo, Address hi, Address sq_diff, Address sq_norm, Address carry,
                     Address z, Address rest, Address weights, Index T, Index A, Index B, Index D, int L, int ring,
                     int column, Index number, Index previous, Index start, Index stop, bool charting, int threads);
void judge_steps_call(Address sq_diff, Address sq_norm, Address previous, Address strict, Index T, Index B,
                      double freeze, double floor);

}  // namespace deqdiff
