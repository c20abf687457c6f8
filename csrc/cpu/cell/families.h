// Which family of the fused kernels computes what, by the sizes of the cell alone: a thread's share, and how many there
// are, must not change a result. The kernels ask here, and so does the plan that is printed.
#pragma once
#include <cstdint>

namespace rnn_ext::cpu {

// Forward. The rows of the output that come first are sums of outer products (or products of pairs), a panel of rows at
// a time; the others are dot products.
//
// A panel's cost is that of all its rows: it is taken where at most a fifth would be lost.
struct PanelShape {
  int64_t rows;
  int64_t worth;  // as many rows by dot products cost the same

  constexpr int64_t fewest() const { return (worth * 4 + 4) / 5; }
};
constexpr PanelShape outer_panel_shape(int64_t lanes) { return {lanes, lanes}; }
constexpr PanelShape kPairPanelShape = {32, 16};  // of vectors of 16: as much as one of 16 without pairs

// Transposing needs enough columns to be worth it.
constexpr int64_t kFewestPanelCols = 48;

constexpr int64_t rows_in_panels(int64_t batch, int64_t hidden_size, PanelShape panel) {
  if (hidden_size < kFewestPanelCols) return 0;
  const int64_t rest = batch % panel.rows;
  return rest < panel.fewest() ? batch - rest : batch;
}

// Backward. All products are sums of outer products, or products of pairs: packing these pays from so many rows and
// terms, which are B and H or H and B.
constexpr int64_t kFewestForPairs = 8;
constexpr bool pairs_pay(int64_t rows, int64_t terms) { return rows >= kFewestForPairs && terms >= kFewestForPairs; }

}  // namespace rnn_ext::cpu
