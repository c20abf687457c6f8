// Which forward kernel runs when: the table of kernels, and the model that picks one of them for a case; the backward's
// are in cell_backward.h. Plain C++ without torch or CUDA, so that it also runs where there is no GPU: `python -m
// rnn_ext --explain`.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/plan/types.h"

namespace rnn_ext::cuda {

// ---- the kernels ----------------------------------------------------------------------------------------------------

// `tiled`: one block a BM×BN tile of the output, or `splits` blocks that share its K. The numbers instantiate the
// kernel's template, so a row here and the code can't disagree. `parts_m` by `parts_n` are the warps' parts of the tile
// (tensor cores) or a thread's part of it (SIMT); `groups` of warps share the depth BK of a slice.
struct ForwardTiledKernel {
  const char* name;
  Math math;
  Fill fill;
  bool fp32, fp64, fp16, bf16;  // the operands' dtypes
  int bm, bn, bk;
  int parts_m, parts_n, groups;
  int stages, blocks_per_sm;  // blocks_per_sm: what the registers are limited for
  int first_sm, last_sm;      // compute capabilities, 10 * major + minor

  constexpr bool takes(Dtype dtype) const { return is_marked(dtype, fp32, fp64, fp16, bf16); }
  constexpr int threads() const {
    return (math == Math::kSimt ? bm / parts_m * (bn / parts_n) : 32 * parts_m * parts_n) * groups;
  }
  // Bytes of the pipeline's ring and of the sums that take its place, as mainloop.cuh lays them out.
  constexpr size_t smem_bytes(Dtype dtype) const {
    const size_t sum_bytes = sum_bytes_of(dtype);
    const size_t element = math == Math::kSimt ? sum_bytes : bytes_of(dtype);
    const size_t padding = math == Math::kSimt ? 8 : 0;
    const size_t ring = (bm + bn + padding) * bk * element * stages;
    const size_t sums = sum_bytes * groups * bm * (bn + 8);
    return ring > sums ? ring : sums;
  }
};

// The tiles: small ones, of which many fit a small problem, with more warps than they have parts so that an SM has
// enough loads in flight; large ones, which read less from L2 for a product. Those of one row serve the dtypes that it
// marks. Which one runs is up to plan_forward's model below; the remark says where that ends up on an H100.
// clang-format off
constexpr ForwardTiledKernel kForwardTiled[] = {
    // name             math               fill           fp32   fp64   fp16   bf16    BM   BN  BK  parts  gr st bl  sm
    {"tiled_16x64",     Math::kTensorCore, Fill::kAsync,  false, false, true,  true,   16,  64, 64, 1, 2,  2, 4, 4,  80, kAnySm},  // B <= 16
    {"tiled_32x64",     Math::kTensorCore, Fill::kAsync,  false, false, true,  true,   32,  64, 64, 1, 2,  2, 4, 3,  80, kAnySm},  // B <= 32
    {"tiled_64x64",     Math::kTensorCore, Fill::kAsync,  false, false, true,  true,   64,  64, 64, 2, 2,  1, 4, 3,  80, kAnySm},  // B <= 64
    {"tiled_128x64",    Math::kTensorCore, Fill::kAsync,  false, false, true,  true,  128,  64, 64, 4, 2,  1, 3, 2,  80, kAnySm},  // between the two
    {"tiled_128x128",   Math::kTensorCore, Fill::kAsync,  false, false, true,  true,  128, 128, 64, 2, 4,  1, 3, 2,  80, kAnySm},  // B >= 128
    {"staged_16x64",    Math::kTensorCore, Fill::kStaged, false, false, true,  true,   16,  64, 64, 1, 2,  2, 2, 3,  75, kAnySm},  // odd strides, and
    {"staged_64x64",    Math::kTensorCore, Fill::kStaged, false, false, true,  true,   64,  64, 64, 2, 2,  1, 2, 2,  75, kAnySm},  //   sm_75
    {"tiled_16x64",     Math::kSimt,       Fill::kAsync,  true,  false, false, false,  16,  64, 32, 4, 4,  4, 4, 2,  80, kAnySm},
    {"tiled_64x64",     Math::kSimt,       Fill::kAsync,  true,  false, false, false,  64,  64, 32, 8, 8,  4, 3, 2,  80, kAnySm},
    {"tiled_128x64",    Math::kSimt,       Fill::kAsync,  true,  false, false, false, 128,  64, 16, 8, 8,  1, 3, 2,  80, kAnySm},
    {"tiled_128x128",   Math::kSimt,       Fill::kAsync,  true,  false, false, false, 128, 128, 16, 8, 8,  1, 3, 2,  80, kAnySm},
    {"staged_16x64",    Math::kSimt,       Fill::kStaged, true,  true,  false, true,   16,  64, 32, 4, 4,  4, 2, 2,  75, 75},
    {"staged_64x64",    Math::kSimt,       Fill::kStaged, true,  false, false, true,   64,  64, 16, 8, 4,  2, 2, 2,  75, 75},
    {"tf32_16x64",      Math::kTf32,       Fill::kAsync,  true,  false, false, false,  16,  64, 32, 1, 2,  2, 4, 3,  80, kAnySm},
    {"tf32_64x64",      Math::kTf32,       Fill::kAsync,  true,  false, false, false,  64,  64, 32, 2, 2,  1, 4, 2,  80, kAnySm},
    {"tf32_128x128",    Math::kTf32,       Fill::kAsync,  true,  false, false, false, 128, 128, 32, 2, 4,  1, 3, 1,  80, kAnySm},
    {"tiled_16x64",     Math::kTensorCore, Fill::kAsync,  false, true,  false, false,  16,  64, 16, 1, 2,  2, 4, 2,  80, kAnySm},
    {"tiled_64x64",     Math::kTensorCore, Fill::kAsync,  false, true,  false, false,  64,  64, 16, 2, 2,  1, 3, 2,  80, kAnySm},
};
// clang-format on
constexpr int kNumForwardTiled = static_cast<int>(sizeof(kForwardTiled) / sizeof(kForwardTiled[0]));

// `wgmma`: sm_90a's own tensor-core instructions, fed by TMA, in tiles 128 high. One block a multiprocessor takes tile
// after tile of the output. Where there are few, `splits` blocks share the K of a tile, 1, 2 or 4, and a cluster has as
// many times more blocks.
struct ForwardWgmmaKernel {
  const char* name;
  Math math;
  int bn;
  int cluster;      // where the weights are most of what a tile loads, two blocks share them
  int most_splits;  // smaller tiles load more for a product: the L2 cache would bound them, split or not

  static constexpr int bm = 128;
  constexpr bool takes(Dtype dtype) const {
    return math == Math::kTensorCore ? bytes_of(dtype) == 2 : dtype == Dtype::kFloat;
  }
};

// clang-format off
constexpr ForwardWgmmaKernel kForwardWgmma[] = {
    // name                math               BN   cluster, splits
    {"wgmma_128x256",      Math::kTensorCore, 256, 2, 4},  // 1024 x 1024 and larger
    {"wgmma_128x128",      Math::kTensorCore, 128, 1, 1},
    {"wgmma_128x64",       Math::kTensorCore, 64,  1, 1},
    {"wgmma_tf32_128x256", Math::kTf32,       256, 2, 4},
    {"wgmma_tf32_128x128", Math::kTf32,       128, 1, 1},
    {"wgmma_tf32_128x64",  Math::kTf32,       64,  1, 1},
    {"3xtf32_128x128",     Math::kSplitTf32,  128, 1, 1},  // no thread has the registers for more: two sums an element
    {"3xtf32_128x64",      Math::kSplitTf32,  64,  1, 1},
};
// clang-format on
constexpr int kNumForwardWgmma = static_cast<int>(sizeof(kForwardWgmma) / sizeof(kForwardWgmma[0]));

// Sums of fewer products are off by less in fp32 than three products of tf32 are.
constexpr int64_t kMin3xTf32Depth = 1024;

// `gemv`: a group of warps computes a few outputs of every batch row, the weights passing by once. Every dtype and
// architecture, up to this many rows.
constexpr int forward_gemv_max_batch(Dtype dtype) { return dtype == Dtype::kFloat ? 16 : 8; }
constexpr int kForwardGemvWarps = 8;
// The batch that the kernel is compiled for, and how many rows of the weights a warp takes with it, so that the loads
// of x and h are shared.
constexpr int forward_gemv_batch(int64_t batch, Dtype dtype, bool vectors) {
  if (!vectors) return batch <= 1 ? 1 : forward_gemv_max_batch(dtype) > 8 && batch > 8 ? 16 : 8;
  return batch <= 1 ? 1 : batch <= 2 ? 2 : batch <= 4 ? 4 : batch <= 8 ? 8 : 16;
}
constexpr int forward_gemv_rows(int batch, Dtype dtype) { return batch <= 2 ? batch : dtype == Dtype::kDouble ? 2 : 4; }

// ---- the choice -----------------------------------------------------------------------------------------------------

// All that the choice depends on.
struct ForwardCase {
  int64_t batch, input_size, hidden_size;
  bool hx;
  Dtype dtype;
  int vector_bytes;        // 16, 8 or 4: what all operands are aligned to, with unit stride along K; 0: less than that
  bool tensor_maps;        // TMA can take all operands and the output: rows at multiples of 16 bytes, K > 0
  bool tf32 = false;       // PyTorch allows tf32 in matrix products
  bool split_tf32 = true;  // three products of tf32 may stand in for fp32

  bool operator==(const ForwardCase& o) const {
    return batch == o.batch && input_size == o.input_size && hidden_size == o.hidden_size && hx == o.hx &&
           dtype == o.dtype && vector_bytes == o.vector_bytes && tensor_maps == o.tensor_maps && tf32 == o.tf32 &&
           split_tf32 == o.split_tf32;
  }
};

// Whether RNN_EXT_3XTF32, given as the environment has it (or null), lets fp32 be computed as three products of tf32:
// 1, empty and unset do, 0 does not. Throws std::invalid_argument for anything else.
bool allows_split_tf32(const char* variable);

enum class Reduction {
  kNone,
  kCluster,    // blocks of one tile are a cluster and read each other's shared memory (sm_90 and later)
  kWorkspace,  // they leave their sums in global memory, and the last to arrive adds them in order
};

struct ForwardPlan {
  // kCublas: cuBLAS multiplies, and one launch of ours adds up and activates. Three launches, and sums that pass
  // through memory.
  enum class Family { kGemv, kTiled, kWgmma, kCublas };
  Family family = Family::kGemv;
  int kernel = -1;        // the row of kForwardTiled or kForwardWgmma
  int warps_per_row = 1;  // gemv: how many warps share K
  int splits = 1;         // tiled, wgmma: how many blocks share K
  Reduction reduction = Reduction::kNone;
  bool early = false;  // gemv: the launch may overlap the end of the one before
  int64_t blocks = 0;
  int64_t workspace_bytes = 0;  // Reduction::kWorkspace: uninitialised, of this launch alone. kCublas: x Wᵀ, and after
                                // it h Uᵀ, unless hx is absent, in fp32 (fp64)
  double microseconds = 0;      // what the model predicts

  bool takes(Dtype dtype) const {  // whether it is compiled for it
    return family == Family::kTiled   ? kForwardTiled[kernel].takes(dtype)
           : family == Family::kWgmma ? kForwardWgmma[kernel].takes(dtype)
                                      : true;
  }
  const char* name() const {
    return family == Family::kGemv     ? "gemv"
           : family == Family::kCublas ? "cublas"
           : family == Family::kTiled  ? kForwardTiled[kernel].name
                                       : kForwardWgmma[kernel].name;
  }
};

// Counters that one launch may use: one a tile whose K is split through global memory. They are zero between launches.
constexpr int kMaxCounters = 256;

// The best kernel by the model, or the one that `forced` names: NAME, NAME:SPLITS or NAME:SPLITS:workspace (null or
// empty: no force). Throws std::invalid_argument if there is no such kernel or it can't take the case.
ForwardPlan plan_forward(const ForwardCase& c, const Device& device, const char* forced);

// The choice and the alternatives, with the model's reasons, for people.
std::string explain_forward(const ForwardCase& c, const Device& device, const char* forced);

}  // namespace rnn_ext::cuda
