// Which kernels run the recurrence of a layer over a sequence when: the table, and the model that picks one of them for
// a case. Plain C++ without torch or CUDA, as for the cell's.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/plan/cell_forward.h"
#include "cuda/plan/resident.h"
#include "cuda/plan/types.h"

namespace rnn_ext::cuda {

// ---- the kernels ----------------------------------------------------------------------------------------------------

// `stepped`: a launch a step, a tile of (B, H) to a block, which has all of K = H. So its smallest tiles are narrow: a
// step of few rows must still occupy the GPU. What a row says is what it says of the cell's tiles.
using SteppedKernel = ForwardTiledKernel;

// clang-format off
constexpr SteppedKernel kStepped[] = {
    // name               math               fill           fp32   fp64   fp16   bf16    BM   BN   BK  parts  gr st bl  sm
    {"stepped_16x16",     Math::kTensorCore, Fill::kAsync,  false, false, true,  true,   16,  16, 128, 1, 1,  8, 4, 4,  80, kAnySm},
    {"stepped_32x32",     Math::kTensorCore, Fill::kAsync,  false, false, true,  true,   32,  32,  64, 1, 2,  4, 4, 3,  80, kAnySm},
    {"stepped_64x64",     Math::kTensorCore, Fill::kAsync,  false, false, true,  true,   64,  64,  64, 2, 2,  1, 4, 3,  80, kAnySm},
    {"stepped_128x128",   Math::kTensorCore, Fill::kAsync,  false, false, true,  true,  128, 128,  64, 2, 4,  1, 3, 2,  80, kAnySm},
    {"stepped_16x32",     Math::kSimt,       Fill::kAsync,  true,  false, false, false,  16,  32,  32, 4, 4,  8, 4, 2,  80, kAnySm},
    {"stepped_32x32",     Math::kSimt,       Fill::kAsync,  true,  false, false, false,  32,  32,  32, 4, 4,  4, 4, 2,  80, kAnySm},
    {"stepped_64x64",     Math::kSimt,       Fill::kAsync,  true,  false, false, false,  64,  64,  32, 8, 8,  4, 3, 2,  80, kAnySm},
    {"stepped_128x128",   Math::kSimt,       Fill::kAsync,  true,  false, false, false, 128, 128,  16, 8, 8,  1, 3, 2,  80, kAnySm},
    {"stepped_tf32_16x64",   Math::kTf32,    Fill::kAsync,  true,  false, false, false,  16,  64,  32, 1, 2,  2, 4, 3,  80, kAnySm},
    {"stepped_tf32_64x64",   Math::kTf32,    Fill::kAsync,  true,  false, false, false,  64,  64,  32, 2, 2,  1, 4, 2,  80, kAnySm},
    {"stepped_tf32_128x128", Math::kTf32,    Fill::kAsync,  true,  false, false, false, 128, 128,  32, 2, 4,  1, 3, 1,  80, kAnySm},
    {"stepped_16x16",     Math::kTensorCore, Fill::kAsync,  false, true,  false, false,  16,  16,  32, 1, 1,  4, 4, 2,  80, kAnySm},
    {"stepped_64x64",     Math::kTensorCore, Fill::kAsync,  false, true,  false, false,  64,  64,  16, 2, 2,  1, 3, 2,  80, kAnySm},
    {"stepped_16x64",     Math::kTensorCore, Fill::kStaged, false, false, true,  false,  16,  64,  64, 1, 2,  2, 2, 3,  75, 75},
    {"stepped_16x64",     Math::kSimt,       Fill::kStaged, true,  false, false, true,   16,  64,  32, 4, 4,  4, 2, 2,  75, 75},
    {"stepped_16x64",     Math::kSimt,       Fill::kStaged, false, true,  false, false,  16,  64,  32, 4, 4,  4, 2, 1,  75, 75},
};
// clang-format on
constexpr int kNumStepped = static_cast<int>(sizeof(kStepped) / sizeof(kStepped[0]));

// The families that keep U on the chip, `resident`, `cluster` and `grid`, are the rows of kResident.

// ---- the choice -----------------------------------------------------------------------------------------------------

// All that the choice depends on. `batch`: that of the first step.
struct SequenceCase {
  int64_t steps, batch, hidden_size;
  Dtype dtype;
  bool backward = false;
  bool packs_weight = false;  // U is not read as it lies: its rows along K don't start at multiples of 16 bytes
  bool tf32 = false;          // PyTorch allows tf32 in matrix products
  bool whole_gpu = true;  // a grid, or a cluster of more than 8 blocks, finds room; false: such a launch was refused

  bool operator==(const SequenceCase& o) const {
    return steps == o.steps && batch == o.batch && hidden_size == o.hidden_size && dtype == o.dtype &&
           backward == o.backward && packs_weight == o.packs_weight && tf32 == o.tf32 && whole_gpu == o.whole_gpu;
  }
};

// What the steps hand on, at which byte of the workspace: rows of `stride` elements, which start at multiples of 16
// bytes.
struct SteppedWorkspace {
  explicit SteppedWorkspace(const SequenceCase& c)
      : stride(ceil_div(c.hidden_size * bytes_of(c.dtype), 16) * 16 / bytes_of(c.dtype)),
        state_bytes(c.batch * stride * bytes_of(c.dtype)),
        last(2 * state_bytes),
        weight(last + (c.backward ? state_bytes : 0)),
        bytes(weight + (c.packs_weight ? c.hidden_size * stride * bytes_of(c.dtype) : 0)) {}

  int64_t stride;
  int64_t state_bytes;  // of h or dz of one step; there are two of them, the first at 0
  int64_t last;         // backward: each row's dz of its first step
  int64_t weight;       // U, or Uᵀ in the backward, where it is packed
  int64_t bytes;
};

struct SequencePlan {
  enum class Family { kStepped, kResident };
  Family family = Family::kStepped;
  int kernel = -1;        // the row of kStepped or kResident
  bool early = false;     // stepped: a step's launch may overlap the end of the one before
  ResidentLaunch launch;  // of a row of kResident
  int64_t workspace_bytes = 0;
  double microseconds = 0;  // a step, by the model

  bool takes(Dtype dtype) const {
    return family == Family::kStepped ? kStepped[kernel].takes(dtype) : kResident[kernel].takes(dtype);
  }
  const char* name() const { return family == Family::kStepped ? kStepped[kernel].name : kResident[kernel].name; }
};

// The best kernel by the model, or the one that `forced` names (null or empty: no force). Throws std::invalid_argument
// if there is no such kernel or it can't take the case.
SequencePlan plan_sequence(const SequenceCase& c, const Device& device, const char* forced);

// The choice and the alternatives, with the model's reasons, for people.
std::string explain_sequence(const SequenceCase& c, const Device& device, const char* forced);

}  // namespace rnn_ext::cuda
