// HSIC and CKA of all pairs of layers under the linear kernel, from the statistics of gram.h: whether those were good
// enough, and the derivatives.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"

namespace pyrepr::cpu {

struct HsicRule {
  int64_t layers, n;
  bool biased;      // (Gretton et al. 2005), else unbiased (Song et al. 2012, eq. 5)
  bool normalised;  // CKA
};

struct HsicLimits {
  double eps;          // of the numbers that were multiplied
  double loss;         // what may be lost, relative to a result
  double least, most;  // squared norms of rows between which products are safe
};

// Of a layer: its own HSIC is no more than rounding; its digits are lost.
enum HsicState : int32_t { kRight, kAlike, kLost };

inline double dot_of(const double* x, const double* y, int64_t n) {
  double sum[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int64_t j = 0; j < 4; j++) sum[j] += x[i + j] * y[i + j];
  for (; i < n; i++) sum[0] += x[i] * y[i];
  return sum[0] + sum[1] + (sum[2] + sum[3]);
}

// HSIC of two layers as a sum of terms. S is the sum over i != j of centred products; rows of centred kernels add up to
// zero, so that row sums are minus the diagonal D, the squared norms of the rows:
//   biased    [S + D.D] / (n - 1)^2
//   unbiased  [S + sum D sum D / ((n - 1)(n - 2)) - 2/(n - 2) D.D] / (n (n - 3))
class HsicTerms {
 public:
  // s [M, M], norms [M, n]
  HsicTerms(const HsicRule& rule, const double* s, const double* norms) : rule_(rule), s_(s), norms_(norms) {
    const auto n = static_cast<double>(rule.n);
    share = rule.biased ? (n - 1) * (n - 1) : n * (n - 3);
    totals_ = rule.biased ? 0 : 1 / ((n - 1) * (n - 2));
    products_ = rule.biased ? 1 : -2 / (n - 2);
    for (int64_t l = 0; l < rule.layers; l++) {
      double sum = 0;
      for (int64_t i = 0; i < rule.n; i++) sum += row(l)[i];
      sums_.push_back(sum);
    }
  }
  double operator()(int64_t a, int64_t b, double* size = nullptr) const {
    const double s = s_[a * rule_.layers + b], squares = sum(a) * sum(b) * totals_;
    const double products = dot_of(row(a), row(b), rule_.n) * products_;
    if (size) *size = (s + squares + std::fabs(products)) / share;
    return (s + squares + products) / share;
  }
  // grad_a [n] += slope times the derivative of (a, b) in the norms of a.
  void add_slope(int64_t b, double slope, double* grad_a) const {
    for (int64_t i = 0; i < rule_.n; i++) grad_a[i] += slope / share * (totals_ * sum(b) + products_ * row(b)[i]);
  }

  double share;

 private:
  const double* row(int64_t l) const { return norms_ + l * rule_.n; }
  double sum(int64_t l) const { return sums_[static_cast<size_t>(l)]; }

  const HsicRule& rule_;
  const double *const s_, *const norms_;
  std::vector<double> sums_;  // of the norms of each layer
  double totals_, products_;
};

// values [M, M] and states [M]
inline void hsic_of(const HsicRule& rule, const HsicLimits& limits, const double* s, const double* norms,
                    double* values, int32_t* states) {
  const int64_t m = rule.layers;
  const HsicTerms terms(rule, s, norms);
  std::vector<double> roots;
  for (int64_t a = 0; a < m; a++) {
    double size = 0, largest = 0;
    bool finite = true;
    const double own = values[a * m + a] = terms(a, a, &size);
    for (int64_t i = a * rule.n; i < (a + 1) * rule.n; i++) {
      finite = finite && std::isfinite(norms[i]);
      largest = std::max(largest, norms[i]);
    }
    const bool lost = !(size * limits.eps <= limits.loss * own) || largest < limits.least || largest > limits.most;
    states[a] = lost && finite && largest > 0 ? kLost : own <= 8 * limits.eps * size ? kAlike : kRight;
    for (int64_t b = a + 1; b < m; b++) values[a * m + b] = values[b * m + a] = terms(a, b);
    roots.push_back(std::sqrt(own));
  }
  for (int64_t i = 0; rule.normalised && i < m * m; i++)
    values[i] /= roots[static_cast<size_t>(i / m)] * roots[static_cast<size_t>(i % m)];
}

// From grad [M, M] of the values, of the pairs of `split` alone: grad_s [M, M] and grad_norms [M, n].
inline void hsic_slopes(const HsicRule& rule, int64_t split, const double* s, const double* norms, const double* grad,
                        double* grad_s, double* grad_norms) {
  const int64_t m = rule.layers;
  const HsicTerms terms(rule, s, norms);
  std::fill(grad_s, grad_s + m * m, 0.0);
  std::fill(grad_norms, grad_norms + m * rule.n, 0.0);
  const auto add = [&](int64_t a, int64_t b, double slope) {
    grad_s[a * m + b] += slope / terms.share;
    terms.add_slope(b, slope, grad_norms + a * rule.n);
    terms.add_slope(a, slope, grad_norms + b * rule.n);
  };
  for (int64_t a = 0; a < m; a++)
    for (int64_t b = 0; b < m; b++) {
      const double pull = grad[a * m + b];
      if (a != b && split && (a < split) == (b < split)) continue;
      if (!rule.normalised) {
        add(a, b, pull);
      } else if (a != b) {  // CKA of a layer with itself is 1
        const double own_a = terms(a, a), own_b = terms(b, b), root = std::sqrt(own_a) * std::sqrt(own_b);
        const double value = terms(a, b) / root;
        add(a, b, pull / root);
        add(a, a, -pull * value / (2 * own_a));
        add(b, b, -pull * value / (2 * own_b));
      }
    }
}

}  // namespace pyrepr::cpu
