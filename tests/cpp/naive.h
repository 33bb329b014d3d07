// One round in plain double arithmetic, straight from the definitions: what the kernels are compared with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "anderson_step.h"
#include "ridge_solve.h"

namespace naive {

using deqdiff::Dtype;

inline double round_to(Dtype dtype, double value) {
  if (dtype == Dtype::kFloat64) return value;
  const float wide = static_cast<float>(value);
  if (dtype == Dtype::kFloat32) return wide;
  std::uint32_t word;
  std::memcpy(&word, &wide, 4);
  word += 0x7FFFu + ((word >> 16) & 1u);
  word &= 0xFFFF0000u;
  float narrow;
  std::memcpy(&narrow, &word, 4);
  return narrow;
}

// A tensor in storage type with canaries on both sides, and its values in double.
class Storage {
 public:
  Storage(Dtype dtype, const std::vector<double>& values)
      : dtype_(dtype), count_(values.size()), memory_(size() + 2 * kGuard, 0xA5) {
    for (std::size_t k = 0; k < count_; ++k) put(k, values[k]);
  }
  void* data() { return memory_.data() + kGuard; }
  std::vector<double> values() const {
    std::vector<double> result(count_);
    for (std::size_t k = 0; k < count_; ++k) result[k] = get(k);
    return result;
  }
  bool intact() const {
    const auto marked = [](unsigned char byte) { return byte == 0xA5; };
    return std::all_of(memory_.begin(), memory_.begin() + kGuard, marked) &&
           std::all_of(memory_.end() - kGuard, memory_.end(), marked);
  }
  bool operator==(const Storage& other) const { return memory_ == other.memory_; }

 private:
  static constexpr std::size_t kGuard = 64;
  std::size_t item() const { return static_cast<std::size_t>(deqdiff::item_size(dtype_)); }
  std::size_t size() const { return count_ * item(); }
  const unsigned char* at(std::size_t k) const { return memory_.data() + kGuard + k * item(); }
  void put(std::size_t k, double value) {
    unsigned char* to = memory_.data() + kGuard + k * item();
    const double rounded = round_to(dtype_, value);
    const float wide = static_cast<float>(rounded);
    if (dtype_ == Dtype::kFloat64) std::memcpy(to, &rounded, 8);
    if (dtype_ == Dtype::kFloat32) std::memcpy(to, &wide, 4);
    if (dtype_ == Dtype::kBFloat16) std::memcpy(to, reinterpret_cast<const char*>(&wide) + 2, 2);  // little endian
  }
  double get(std::size_t k) const {
    double value;
    float wide = 0;
    if (dtype_ == Dtype::kFloat64) return std::memcpy(&value, at(k), 8), value;
    if (dtype_ == Dtype::kFloat32) return std::memcpy(&wide, at(k), 4), wide;
    return std::memcpy(reinterpret_cast<char*>(&wide) + 2, at(k), 2), wide;
  }

  Dtype dtype_;
  std::size_t count_;
  std::vector<unsigned char> memory_;
};

struct State {
  std::int64_t steps, batch, size, width;
  int lags, history;
  Dtype dtype;
  std::vector<double> x, e, drift, state_coef, model_coef, sq_diff, sq_norm, f, g, gram;
  std::vector<std::int32_t> lo, hi, filled;
};

// Row i+1 of the scan for sample b, from the plain states so far.
inline std::vector<double> next_state(const State& s, const std::vector<double>& plain, std::int64_t i,
                                      std::int64_t b) {
  const std::int64_t line = s.size, step = s.batch * s.size;
  std::vector<double> next(s.size, 0.0);
  for (std::int64_t d = 0; d < s.size; ++d) {
    for (int lag = 0; lag < s.lags && lag <= i; ++lag) {
      const std::int64_t at = (i - lag) * step + b * line + d;
      next[d] += s.state_coef[i * s.lags + lag] * plain[at] + s.model_coef[i * s.lags + lag] * s.e[at];
    }
    if (!s.drift.empty()) next[d] += s.drift[i * step + b * line + d];
  }
  return next;
}

// Writes sq_diff and sq_norm; returns the plain states.
inline std::vector<double> ddim_update(State* s) {
  std::vector<double> plain = s->x;
  for (std::int64_t b = 0; b < s->batch; ++b) {
    for (std::int64_t i = s->lo[b]; i < s->hi[b]; ++i) {
      const std::vector<double> next = next_state(*s, plain, i, b);
      double diff = 0, norm = 0;
      for (std::int64_t d = 0; d < s->size; ++d) {
        double& old = plain[((i + 1) * s->batch + b) * s->size + d];
        diff += (next[d] - old) * (next[d] - old);
        norm += next[d] * next[d];
        old = round_to(s->dtype, next[d]);
      }
      s->sq_diff[i * s->batch + b] = diff;
      s->sq_norm[i * s->batch + b] = norm;
    }
  }
  return plain;
}

class Anderson {
 public:
  Anderson(State* state, const deqdiff::AndersonProblem& settings) : s_(*state), p_(settings) {}

  void run() {
    const std::vector<double> plain = ddim_update(&s_);
    for (std::int64_t b = 0; b < s_.batch; ++b) {
      for (std::int64_t i = s_.lo[b]; i < s_.hi[b]; ++i) remember(plain, i, b);
      for (std::int64_t i = s_.lo[b]; i < s_.hi[b]; ++i) mix(plain, i, b);
    }
  }

 private:
  std::int64_t slot(std::int64_t i, std::int64_t b) const { return i % s_.width * s_.batch + b; }
  int column(int age) const { return (p_.column - age + s_.history) % s_.history; }
  double* ring(std::vector<double>& base, int age, std::int64_t i, std::int64_t b) {
    return base.data() + (column(age) * s_.width * s_.batch + slot(i, b)) * s_.size;
  }
  double& gram(std::int64_t i, std::int64_t b, int r, int c) {
    return s_.gram[(slot(i, b) * s_.history + r) * s_.history + c];
  }

  void remember(const std::vector<double>& plain, std::int64_t i, std::int64_t b) {
    const std::int64_t at = ((i + 1) * s_.batch + b) * s_.size;
    for (std::int64_t d = 0; d < s_.size; ++d) {
      ring(s_.f, 0, i, b)[d] = plain[at + d];
      ring(s_.g, 0, i, b)[d] = round_to(s_.dtype, plain[at + d] - s_.x[at + d]);
    }
    std::int32_t& filled = s_.filled[slot(i, b)];
    filled = std::min(s_.history, filled + 1);
    for (int age = 0; age < filled; ++age) {
      double dot = 0;
      for (std::int64_t d = 0; d < s_.size; ++d) dot += ring(s_.g, 0, i, b)[d] * ring(s_.g, age, i, b)[d];
      gram(i, b, column(0), column(age)) = gram(i, b, column(age), column(0)) = dot;
    }
  }

  void mix(const std::vector<double>& plain, std::int64_t i, std::int64_t b) {
    double* out = s_.x.data() + ((i + 1) * s_.batch + b) * s_.size;
    if (i == s_.lo[b]) {
      std::copy_n(plain.begin() + (out - s_.x.data()), s_.size, out);
      return;
    }
    const bool alone = p_.scope == deqdiff::Scope::kTimestep;
    const std::int64_t from = alone ? i : s_.lo[b], to = p_.scope == deqdiff::Scope::kTrajectory ? s_.hi[b] : i + 1;
    int n = s_.history;
    for (std::int64_t j = from; j < to; ++j) n = std::min(n, s_.filled[slot(j, b)]);
    std::vector<double> total(n * n, 0.0), alpha(n);
    for (std::int64_t j = from; j < to; ++j) {
      for (int r = 0; r < n; ++r) {
        for (int c = 0; c < n; ++c) total[r * n + c] += gram(j, b, column(n - 1 - r), column(n - 1 - c));
      }
    }
    deqdiff::solve_alpha(total.data(), n, n, p_.ridge, p_.relative_ridge, p_.stale, alpha.data());
    for (std::int64_t d = 0; d < s_.size; ++d) {
      double value = 0;
      for (int age = 0; age < n; ++age) {
        value += alpha[n - 1 - age] * (ring(s_.f, age, i, b)[d] - (1 - p_.damping) * ring(s_.g, age, i, b)[d]);
      }
      out[d] = round_to(s_.dtype, value);
    }
  }

  State& s_;
  const deqdiff::AndersonProblem& p_;
};

}  // namespace naive
