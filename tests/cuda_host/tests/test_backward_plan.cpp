// The backward's plan by itself: each tile is on the list once, tiles nobody needs are not, and there is a kernel for
// every case.
#include <set>
#include <tuple>

#include "cuda/plan/cell_backward.h"
#include "check.h"

namespace {

using namespace rnn_ext::cuda;

constexpr BackwardCase everything(int64_t batch, int64_t input_size, int64_t hidden_size) {
  BackwardCase c = {};
  c.batch = batch;
  c.input_size = input_size;
  c.hidden_size = hidden_size;
  c.dtype = Dtype::kHalf;
  c.grad_input = c.grad_hx = c.grad_weight_ih = c.grad_weight_hh = c.grad_bias = true;
  c.vector_bytes = 16;
  return c;
}

TEST(backward_plan_lists_each_tile_once) {
  constexpr int64_t kShapes[][3] = {{1, 1, 1}, {64, 64, 64}, {65, 33, 130}, {7, 200, 40}, {40, 0, 70}};
  for (const auto& [B, I, H] : kShapes) {
    for (int wanted = 0; wanted < 32; ++wanted) {
      BackwardCase c = everything(B, I, H);
      c.grad_input = wanted & 1, c.grad_hx = wanted & 2, c.grad_weight_ih = wanted & 4, c.grad_weight_hh = wanted & 8;
      c.grad_bias = wanted & 16;
      const BackwardPlan plan = plan_backward(c, {}, wanted % 2 == 0 ? "tiled_small" : "tiled_large");
      const BackwardTiledKernel& k = kBackwardTiled[plan.kernel];
      const auto tiles = [&](int64_t rows, int64_t columns, const BackwardTileShape& t) {
        return ceil_div(rows, t.bm) * ceil_div(columns, t.bn);
      };
      int64_t expected = (c.grad_input ? tiles(B, I, k.data) : 0) + (c.grad_hx ? tiles(B, H, k.data) : 0) +
                         (c.grad_weight_ih ? tiles(H, I, k.weight) : 0) +
                         (c.grad_weight_hh ? tiles(H, H, k.weight) : 0);
      const bool has_weight_tiles = (c.grad_weight_ih && I > 0) || c.grad_weight_hh;
      const int64_t bias_tiles = c.grad_bias ? ceil_div(H, k.weight.bm) : 0;
      if (!has_weight_tiles) expected += bias_tiles;
      CHECK(plan.schedule.size() == expected);
      CHECK(plan.blocks <= expected && (plan.blocks > 0 || expected == 0));

      std::set<std::tuple<bool, int, int64_t, int64_t>> seen;
      int64_t first_columns = 0;
      for (int64_t i = 0; i < plan.schedule.size(); ++i) {
        const BackwardSchedule::Tile t = plan.schedule.at(i);
        seen.insert({t.is_data, t.matrix, t.row, t.column});
        const BackwardTileShape& shape = t.is_data ? k.data : k.weight;
        CHECK(t.row * shape.bm < (t.is_data ? B : H));
        CHECK(t.column * shape.bn < (t.matrix == 0 ? I : H));
        first_columns += !t.is_data && t.is_first_column;
      }
      CHECK(static_cast<int64_t>(seen.size()) == expected);
      if (c.grad_bias) CHECK(first_columns == bias_tiles);
    }
  }
}

TEST(backward_plan_counts_in_64_bits) {
  BackwardSchedule s;
  s.data = {int64_t{1} << 35, {3, int64_t{1} << 20}};
  s.weight = {5, {7, 11}};
  const BackwardSchedule::Tile t = s.at(s.data.rows * 9 + 12345678901);
  CHECK(t.is_data && t.matrix == 1 && t.column == 6 && t.row == 12345678901);
  const BackwardSchedule::Tile last = s.at(s.size() - 1);
  CHECK(!last.is_data && last.matrix == 1 && last.column == 10 && last.row == 4);
}

TEST(backward_plan_has_a_kernel_for_everything) {
  for (const int sm : {75, 80, 86, 89, 90, 100, 120}) {
    for (int dtype = 0; dtype < 4; ++dtype) {
      for (const int vector_bytes : {0, 4, 8, 16}) {
        BackwardCase c = everything(40, 30, 50);
        c.dtype = static_cast<Dtype>(dtype);
        c.vector_bytes = vector_bytes;
        const Device device = {sm, 80, (sm == 75 ? 64u : 99u) * 1024};
        const BackwardPlan plan = plan_backward(c, device, nullptr);
        CHECK(plan.kernel >= 0 && plan.blocks > 0 && plan.microseconds > 0);
        if (sm == 75) CHECK(!kBackwardTiled[plan.kernel].async);  // cp.async traps there
        if (vector_bytes == 0 && bytes_of(c.dtype) == 2) CHECK(!kBackwardTiled[plan.kernel].async);
      }
    }
  }
}

// The longer kind first: few rows make deep data tiles, many rows deep weight tiles.
TEST(backward_plan_starts_with_the_longest_tiles) {
  CHECK(plan_backward(everything(16, 1024, 1024), {}, nullptr).schedule.data_first);
  CHECK(!plan_backward(everything(1 << 16, 64, 64), {}, nullptr).schedule.data_first);
}

// dz is worth a launch of its own where every tile would form it again many times over.
TEST(backward_plan_takes_two_launches_for_large_shapes) {
  CHECK(plan_backward(everything(16, 256, 256), {}, nullptr).launches() == 1);
  CHECK(plan_backward(everything(64, 1024, 1024), {}, nullptr).launches() == 1);
  const BackwardPlan large = plan_backward(everything(4096, 4096, 4093), {}, nullptr);
  CHECK(large.launches() == 2);
  CHECK(large.dz_stride == 4096 && large.workspace_bytes == int64_t{4096} * 4096 * 2);
}

// fp16 and bf16 on sm_90a, from the size on where there are tiles enough.
TEST(backward_plan_takes_wgmma_for_large_shapes) {
  BackwardCase c = everything(4096, 4096, 4096);
  const auto runs_on_wgmma = [&](int sm) {
    return plan_backward(c, {sm}, nullptr).family == BackwardPlan::Family::kWgmma;
  };
  CHECK(!runs_on_wgmma(90));  // whose rows TMA can't take
  c.tensor_maps = true;
  CHECK(runs_on_wgmma(90) && !runs_on_wgmma(80) && !runs_on_wgmma(100));
  c.dtype = Dtype::kFloat;
  CHECK(!runs_on_wgmma(90));
  c = everything(16, 256, 256);
  c.tensor_maps = true;
  CHECK(!runs_on_wgmma(90));
}

TEST(backward_plan_of_wgmma) {
  BackwardCase c = everything(100, 72, 40);
  c.tensor_maps = true;
  BackwardPlan plan = plan_backward(c, {}, "wgmma_128x256");
  // Two kinds of one tile for I and one for H; dz in rows of 40, and sums of 32 rows.
  CHECK(plan.blocks == 2 * 4 && plan.launches() == 2 && plan.dz_stride == 40);
  CHECK(plan.workspace_bytes == 100 * 40 * 2 + 4 * 40 * 4);
  c.grad_bias = c.grad_hx = false;
  plan = plan_backward(c, {}, "wgmma_128x128");
  CHECK(plan.blocks == 3 && plan.workspace_bytes == 100 * 40 * 2);
  c.grad_input = c.grad_weight_ih = c.grad_weight_hh = false;
  CHECK(plan_backward(c, {}, "wgmma_128x128").blocks == 0);
  c.grad_bias = true;
  CHECK(plan_backward(c, {}, "wgmma_128x256").blocks == 2);
}

}  // namespace
