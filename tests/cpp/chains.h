// What the tests of the scans share: random numbers and how far two chains are apart.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "rows.h"

namespace chains {

inline std::vector<double> normal(std::mt19937_64* generator, std::size_t count, double scale) {
  std::normal_distribution<double> draw(0.0, scale);
  std::vector<double> values(count);
  for (double& value : values) value = draw(*generator);
  return values;
}

inline double error(const std::vector<double>& got, const std::vector<double>& wanted) {
  double difference = 0, norm = 0;
  for (std::size_t k = 0; k < got.size(); ++k) {
    difference += (got[k] - wanted[k]) * (got[k] - wanted[k]);
    norm += wanted[k] * wanted[k];
  }
  return std::sqrt(difference / norm);
}

inline double tolerance(deqdiff::Dtype dtype) {
  return dtype == deqdiff::Dtype::kFloat64 ? 1e-12 : dtype == deqdiff::Dtype::kFloat32 ? 1e-5 : 3e-2;
}

}  // namespace chains
